"""Compare an ONNX file with the release of Triton and with its config.pbtxt."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from tritonclient.grpc import model_config_pb2 as schema  # type: ignore[import-untyped]

from scripts.serve.config_rules import Model
from scripts.serve.findings import Findings
from scripts.serve.model_config import Shape, Tensors, format_tensor
from scripts.serve.onnx_agreement import DOMAINS, MICROSOFT, infer_output_shapes, mend_model
from scripts.serve.onnx_headers import WEIGHT, read_without_weights
from scripts.serve.releases import find_release

TYPES = {
    onnx.TensorProto.BOOL: schema.TYPE_BOOL,
    onnx.TensorProto.UINT8: schema.TYPE_UINT8,
    onnx.TensorProto.UINT16: schema.TYPE_UINT16,
    onnx.TensorProto.UINT32: schema.TYPE_UINT32,
    onnx.TensorProto.UINT64: schema.TYPE_UINT64,
    onnx.TensorProto.INT8: schema.TYPE_INT8,
    onnx.TensorProto.INT16: schema.TYPE_INT16,
    onnx.TensorProto.INT32: schema.TYPE_INT32,
    onnx.TensorProto.INT64: schema.TYPE_INT64,
    onnx.TensorProto.FLOAT16: schema.TYPE_FP16,
    onnx.TensorProto.FLOAT: schema.TYPE_FP32,
    onnx.TensorProto.DOUBLE: schema.TYPE_FP64,
    onnx.TensorProto.STRING: schema.TYPE_STRING,
}


def check_onnx(
    findings: Findings, file: Path, config: Path, described: Model, inputs: Tensors, outputs: Tensors
) -> None:
    """Check an ONNX file against the limits of the release, then the config's tensors against the file.

    `inputs`, `outputs`: the config's tensors, shapes with the batch dimension. Triton's C++ backend compares the same
    when it loads the model.
    """
    batch = described.config.max_batch_size
    try:
        model, faults = read_without_weights(file)
    except ValueError as error:
        findings.add(file, "ONNX", "a whole ONNX file", error)
        return
    for fault in faults:
        findings.add(file, "ONNX weights", *fault)
    limits = find_release()
    if model.ir_version > limits.ir:
        findings.add(file, "IR version", f"at most {limits.ir}", model.ir_version)
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > limits.opset:
            findings.add(file, "opset", f"at most {limits.opset}", opset.version)
    own = {(function.domain, function.name) for function in model.functions}
    used = {(node.domain, node.op_type) for node in iterate_nodes(model)} - own
    foreign = sorted(f"{domain}.{name}" for domain, name in used if is_foreign(domain, name))
    if foreign and not described.config.model_operations.op_library_filename:
        findings.add(file, "operators", f"those of ONNX Runtime {limits.onnxruntime}", ", ".join(foreign))
    weights = {value.name for value in model.graph.value_info if value.doc_string == WEIGHT}
    given = {value.name: read_tensor(value) for value in model.graph.input if value.name not in weights}
    mend_model(model)
    shapes, lacking = infer_output_shapes(model)
    made = {value.name: (read_tensor(value)[0], shapes[value.name] or ()) for value in model.graph.output}
    if lacking and not described.gpu:
        findings.add(file, "operators", "a data type that the CPU computes", f"bfloat16 in {', '.join(lacking)}")
    # read_without_weights has moved weights to the inputs; ONNX allows that from IR version 4 on
    model.ir_version = max(model.ir_version, 4)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.HasField("tensor_type"):  # ONNX Runtime needs no shape, the checker does
            value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        findings.add(file, "onnx.checker", "a valid graph", str(error).strip().splitlines()[0])
    fed = {*inputs, *(name for batch_input in described.config.batch_input for name in batch_input.target_name)}
    if inputs and fed != set(given):
        findings.add(config, f"inputs of {file.name}", ", ".join(sorted(given)) or "none", ", ".join(sorted(fed)))
    if missing := sorted(set(outputs) - set(made)):
        findings.add(config, f"outputs of {file.name}", ", ".join(sorted(made)), ", ".join(missing))
    pairs = [("input", name, given[name], inputs[name]) for name in inputs if name in given]
    pairs += [("output", name, made[name], outputs[name]) for name in outputs if name in made]
    for kind, name, theirs, ours in pairs:
        where = f"{kind} {name!r} of {file.name}"
        if theirs[0] == schema.TYPE_INVALID:
            findings.add(file, f"{kind} {name!r}", "a tensor of a type that Triton has", "another")
        elif theirs[0] != ours[0]:
            findings.add(
                config, f"data_type of {where}", schema.DataType.Name(theirs[0]), schema.DataType.Name(ours[0])
            )
        if batch > 0 and theirs[1][:1] != (-1,):
            findings.add(
                config, f"max_batch_size with {where}", "a variable first dimension, or 0", format_tensor(theirs)
            )
        elif not batch and not theirs[1] and ours[1] == (1,):
            pass  # the config writes a scalar as [1]
        # An input may be narrower than the file's; an output must be equal
        elif len(theirs[1]) != len(ours[1]) or any(
            a != b for a, b in zip(theirs[1], ours[1], strict=True) if a != -1 or kind == "output"
        ):
            findings.add(config, f"dims of {where}", format_tensor(theirs), format_tensor(ours))


def is_foreign(domain: str, name: str) -> bool:
    """Tell whether ONNX Runtime 1.18 lacks an operator. onnx.checker judges operators of ONNX's own domains."""
    return domain not in DOMAINS or (domain == "com.microsoft" and name not in MICROSOFT)


def iterate_nodes(model: onnx.ModelProto) -> Iterator[Any]:
    """Yield all nodes, with those of subgraphs and of the model's functions."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs]:
                waiting.extend(graph.node)


def read_tensor(value: Any) -> tuple[int, Shape]:
    """Return Triton's data type and the shape of a graph's input or output; a symbolic or absent size is -1."""
    if not value.type.HasField("tensor_type"):
        return schema.TYPE_INVALID, ()
    sizes = value.type.tensor_type.shape.dim
    shape = tuple(size.dim_value if size.HasField("dim_value") else -1 for size in sizes)
    return TYPES.get(value.type.tensor_type.elem_type, schema.TYPE_INVALID), shape
