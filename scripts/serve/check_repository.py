"""Every rule of a release of Triton that a model repository can break, checked without a server.

    python -m scripts.serve.check_repository model_repository_running [--models build/models]

All findings at once, one line each: file, rule, expected, found; exit status 1 where there are any.
NGC_RELEASE in the environment tells the release, scripts/serve/releases.yaml what it knows.
`--models`: folder of the models' entries (<name>.json), whose shapes and batch limits the configs must then have.
"""

import argparse
import ast
import json
import mmap
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version as version_of
from math import prod
from pathlib import Path
from typing import Any

import onnx
from google.protobuf import text_format  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as schema  # type: ignore[import-untyped]

from scripts.serve.releases import release

SCHEMA = ".".join(version_of("tritonclient").split(".")[:2])  # of which a newer server knows every field
LARGEST_MESSAGE = 2 << 30  # of gRPC
FILES = {"onnxruntime": "model.onnx", "python": "model.py", "tensorrt": "model.plan"}
# How the project's own stand-in for trtexec begins the file that it writes in a plan's place.
STAND_IN_PLAN = b"stand-in for a TensorRT engine"

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
# Bytes of one element.
BYTES = {
    schema.TYPE_BOOL: 1,
    schema.TYPE_UINT8: 1,
    schema.TYPE_UINT16: 2,
    schema.TYPE_UINT32: 4,
    schema.TYPE_UINT64: 8,
    schema.TYPE_INT8: 1,
    schema.TYPE_INT16: 2,
    schema.TYPE_INT32: 4,
    schema.TYPE_INT64: 8,
    schema.TYPE_FP16: 2,
    schema.TYPE_FP32: 4,
    schema.TYPE_FP64: 8,
    schema.TYPE_BF16: 2,
}

Shape = tuple[int, ...]  # -1: any size
Tensors = dict[str, tuple[int, Shape]]  # name -> Triton's data type, whole shape with the batch dimension

# What the existing client sends and expects. The sizes are those of the published models; --models replaces them.
CLIENT: dict[str, tuple[Tensors, Tensors]] = {
    "vit_onnx": (
        {"input": (schema.TYPE_FP32, (-1, 1, 240, 480, 480))},
        {"output": (schema.TYPE_FP32, (-1, 512))},
    ),
    "binary_onnx": (
        {"input": (schema.TYPE_FP32, (-1, 512))},
        {"output": (schema.TYPE_FP32, (-1, 2))},
    ),
    "multilabel_onnx": (
        {"input": (schema.TYPE_FP32, (-1, 512))},
        {"output": (schema.TYPE_FP32, (-1, 20))},
    ),
    "bpr_model": (
        {"input": (schema.TYPE_INT16, (1, -1, -1, -1)), "metadata": (schema.TYPE_FP32, (1, 3))},
        {"output": (schema.TYPE_STRING, (1,))},
    ),
}


@dataclass
class Findings:
    """Collects lines `file: rule; expected …, found …`."""

    root: Path
    lines: list[str] = field(default_factory=list)

    def add(self, path: Path, rule: str, expected: object, found: object) -> None:
        self.lines.append(f"{path.relative_to(self.root.parent)}: {rule}; expected {expected}, found {found}")


def check_repository(root: Path, models: Path | None = None, gpu: bool | None = None) -> list[str]:
    """All findings, in the order of the models' names; `gpu`: whether the server has one (None: as here)."""
    gpu = Path("/proc/driver/nvidia/gpus").is_dir() if gpu is None else gpu
    root = root.absolute()
    if not root.is_dir():
        return [
            f"{root.name}: repository; expected a folder of models, found {'a file' if root.exists() else 'nothing'}"
        ]
    findings = Findings(root)
    folders = []
    for path in sorted(root.iterdir()):
        if path.is_symlink() and not path.exists():
            findings.add(path, "link", "an existing file", f"a link to {path.readlink()}, which is not there")
        elif path.is_dir() and path.name.startswith("."):
            findings.add(path, "hidden folder: Triton takes it for a model", "model folders only", path.name)
        elif path.is_dir():
            folders.append(path)
    if not folders:
        findings.add(root, "models", "at least one model folder", "none")
    for folder in folders:
        entry = read_entry(models, folder.name)
        try:
            check_model(findings, folder, entry, gpu)
        except OSError as error:
            findings.add(Path(error.filename or folder), "access", "a readable file", error.strerror)
    return findings.lines


def read_entry(models: Path | None, model: str) -> dict[str, Any] | None:
    """The entry that a model was made from, by the model's name without its last part; None where there is none."""
    path = models / f"{model.rpartition('_')[0]}.json" if models else None
    return json.loads(path.read_text()) if path and path.is_file() else None


def read_config(path: Path) -> Any:
    """The ModelConfig in a config.pbtxt by the schema of the tritonclient here; ValueError where it is none."""
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), schema.ModelConfig())
    except text_format.ParseError as error:
        raise ValueError(str(error)) from error


def check_model(findings: Findings, folder: Path, entry: dict[str, Any] | None, gpu: bool) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.exists():
            findings.add(path, "link", "an existing file", f"a link to {path.readlink()}, which is not there")
    file = folder / "config.pbtxt"
    versions = check_versions(findings, folder)
    if not file.is_file():
        findings.add(file, "config", "a file", "a folder" if file.is_dir() else "nothing")
        return
    try:
        config = read_config(file)
    except ValueError as error:
        findings.add(
            file, f"config schema of Triton {SCHEMA}", "model_config.proto's text format", " ".join(str(error).split())
        )
        return
    if config.name not in ("", folder.name):
        findings.add(file, "name", f'"{folder.name}" like the folder', f'"{config.name}"')
    backend = check_backend(findings, file, config)
    if config.max_batch_size < 0:
        findings.add(file, "max_batch_size", "0 or more", config.max_batch_size)
    inputs = check_tensors(findings, file, "input", config.input, config.max_batch_size)
    outputs = check_tensors(findings, file, "output", config.output, config.max_batch_size)
    check_message(findings, file, inputs, config.max_batch_size)
    check_instances(findings, file, config, backend, gpu)
    check_client(findings, file, folder.name, inputs, outputs, entry)
    if entry and config.max_batch_size > max(entry["batch"]):
        findings.add(
            file, "max_batch_size", f"at most {max(entry['batch'])}, the model's largest batch", config.max_batch_size
        )
    for version in versions if backend else []:
        names = {config.default_model_filename or FILES[backend], *config.cc_model_filenames.values()}
        for path in sorted(version / name for name in names):
            if not path.is_file() or not path.stat().st_size:
                found = "a folder" if path.is_dir() else "an empty file" if path.exists() else "nothing"
                findings.add(path, f"file of backend {backend}", "a file", found)
            elif backend == "onnxruntime":
                check_onnx(findings, path, file, inputs, outputs, config.max_batch_size)
            elif backend == "tensorrt":
                check_plan(findings, path)
        if backend == "python":
            check_python(findings, version / (config.default_model_filename or FILES["python"]))


def check_versions(findings: Findings, folder: Path) -> list[Path]:
    """The version folders whose names Triton reads as they are meant."""
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    good = [path for path in found if re.fullmatch("[1-9][0-9]*", path.name)]
    for path in found:
        if path not in good:
            # Triton reads digits up to the first other sign, so 1.bak is version 1 to it, and 01 is left out.
            findings.add(path, "version folder", "a whole number without a leading zero", path.name)
    if not good:
        findings.add(folder, "version folder", "at least one, such as 1", "none")
    if folder.name in CLIENT and good and "1" not in [path.name for path in good]:
        findings.add(folder, "client's contract", "version 1", ", ".join(path.name for path in good))
    return good


def check_backend(findings: Findings, file: Path, config: Any) -> str:
    """The backend, "" where the config names none of the three in full."""
    known = {
        ("onnxruntime", ""): "onnxruntime",
        ("onnxruntime", "onnxruntime_onnx"): "onnxruntime",
        ("python", ""): "python",
    }
    known |= {("", "tensorrt_plan"): "tensorrt", ("tensorrt", "tensorrt_plan"): "tensorrt"}
    backend = known.get((config.backend, config.platform), "")
    if not backend:
        expected = 'backend: "onnxruntime", backend: "python" or platform: "tensorrt_plan"'
        found = [f'{key}: "{value}"' for key in ("backend", "platform") if (value := getattr(config, key))]
        findings.add(file, "backend", expected, ", ".join(found) or "neither")
    return backend


def check_tensors(findings: Findings, file: Path, kind: str, tensors: Sequence[Any], batch: int) -> Tensors:
    """The config's inputs or outputs with whole shapes, those that can be compared further."""
    good: Tensors = {}
    if not tensors:
        findings.add(file, f"{kind}s", f"at least one {kind}", "none")
    for tensor in tensors:
        name = f"{kind} {tensor.name!r}"
        shape = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
        if not tensor.name or tensor.name in good:
            findings.add(file, f"{kind} name", "a name of its own", repr(tensor.name))
        elif tensor.data_type == schema.TYPE_INVALID:
            findings.add(file, f"data_type of {name}", "one of TYPE_BOOL, TYPE_INT16, TYPE_FP32, …", "none")
        elif not tensor.dims:
            findings.add(file, f"dims of {name}", "at least one dimension", "none")
        elif any(size < 1 and size != -1 for size in tensor.dims):
            findings.add(file, f"dims of {name}", "each at least 1, or -1", list(tensor.dims))
        else:
            good[tensor.name] = (tensor.data_type, ((-1,) if batch > 0 else ()) + tuple(shape))
    return good


def check_message(findings: Findings, file: Path, inputs: Tensors, batch: int) -> None:
    shapes = [(kind, shape[1:] if batch > 0 else shape) for kind, shape in inputs.values()]
    if batch > 0 and all(size > 0 for _, shape in shapes for size in shape):
        sample = sum(BYTES.get(kind, 0) * prod(shape) for kind, shape in shapes)
        if batch * sample >= LARGEST_MESSAGE:
            expected = f"at most {(LARGEST_MESSAGE - 1) // sample}, for a gRPC message is below 2 GiB"
            findings.add(file, "max_batch_size", expected, f"{batch} of {sample} bytes each")


def check_instances(findings: Findings, file: Path, config: Any, backend: str, gpu: bool) -> None:
    for group in config.instance_group:
        kind = schema.ModelInstanceGroup.Kind.Name(group.kind)
        if kind == "KIND_GPU" and not gpu:
            findings.add(file, "instance_group", "KIND_AUTO, for this machine has no GPU", kind)
        if kind == "KIND_CPU" and backend == "tensorrt":
            findings.add(file, "instance_group", "KIND_AUTO or KIND_GPU for a TensorRT plan", kind)
        if kind == "KIND_CPU" and group.gpus:
            findings.add(file, "instance_group", "no gpus for KIND_CPU", f"gpus: {list(group.gpus)}")
        if group.count < 0:
            findings.add(file, "instance_group", "a count of 1 or more", f"count: {group.count}")
    # Unsaid, ONNX Runtime models get two instances on a CPU: the weights twice in memory.
    if backend == "onnxruntime" and not (config.instance_group and all(group.count for group in config.instance_group)):
        found = "no count" if config.instance_group else "no instance_group"
        findings.add(file, "instance_group", "an explicit count: 1", found)


def check_client(
    findings: Findings, file: Path, model: str, inputs: Tensors, outputs: Tensors, entry: dict[str, Any] | None
) -> None:
    """The contract with the client: the tensors that it sends must be taken, those that it reads must come."""
    expected_inputs, expected_outputs = CLIENT.get(model, ({}, {}))
    if entry and model != "bpr_model":  # another model of an entry keeps the same form
        expected_inputs = {"input": (schema.TYPE_FP32, (-1, *entry["input"]))}
        expected_outputs = {"output": (schema.TYPE_FP32, (-1, *entry["output"]))}
    for kind, expected, found in (("input", expected_inputs, inputs), ("output", expected_outputs, outputs)):
        for name, tensor in expected.items():
            # A variable size must stay variable; for a fixed one -1 will do.
            if name not in found:
                findings.add(file, f"client's contract, {kind}", f"{name} {show(tensor)}", ", ".join(found) or "none")
            elif found[name][0] != tensor[0] or not matches(found[name][1], tensor[1]):
                findings.add(file, f"client's contract, {kind} {name!r}", show(tensor), show(found[name]))
        if expected and kind == "input" and (surplus := sorted(set(found) - set(expected))):
            findings.add(file, "client's contract, inputs", ", ".join(expected), f"also {', '.join(surplus)}")


def matches(found: Shape, expected: Shape) -> bool:
    return len(found) == len(expected) and all(a in (b, -1) for a, b in zip(found, expected, strict=True))


def show(tensor: tuple[int, Shape]) -> str:
    return f"{schema.DataType.Name(tensor[0]).removeprefix('TYPE_')} [{', '.join(map(str, tensor[1]))}]"


def check_python(findings: Findings, file: Path) -> None:
    """Every Python file of the version parses, and the model's has a TritonPythonModel with `execute`."""
    image = release()
    for path in sorted(file.parent.rglob("*.py")):
        if not path.exists():
            continue
        try:
            tree = ast.parse(path.read_bytes(), path.name, feature_version=image.grammar)
        except (SyntaxError, ValueError) as error:
            findings.add(path, f"Python {image.python}", "a file that parses", error)
            continue
        if path == file and not any(
            isinstance(node, ast.FunctionDef) and node.name == "execute"
            for model in tree.body
            if isinstance(model, ast.ClassDef) and model.name == "TritonPythonModel"
            for node in model.body
        ):
            findings.add(path, "Python backend", "class TritonPythonModel with execute", "none")


def check_plan(findings: Findings, file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(4096)
    if STAND_IN_PLAN in start:
        findings.add(file, "plan", "a TensorRT engine", "a stand-in's file, which is no engine")
    elif all(9 <= byte < 127 for byte in start[:64]):
        findings.add(file, "plan", "a TensorRT engine", "a text")


def check_onnx(findings: Findings, file: Path, config: Path, inputs: Tensors, outputs: Tensors, batch: int) -> None:
    """The ONNX file against the release, and the config's whole shapes against it, as the C++ backend does at load."""
    try:
        model, faults = read_without_weights(file)
    except ValueError as error:
        findings.add(file, "ONNX", "a whole ONNX file", error)
        return
    for fault in faults:
        findings.add(file, "ONNX weights", *fault)
    limits = release()
    if model.ir_version > limits.ir:
        findings.add(file, "IR version", f"at most {limits.ir}", model.ir_version)
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > limits.opset:
            findings.add(file, "opset", f"at most {limits.opset}", opset.version)
    if foreign := sorted(
        {f"{node.domain}.{node.op_type}" for node in nodes(model) if node.domain not in ("", "ai.onnx")}
    ):
        findings.add(file, "operators", "ONNX's own only", ", ".join(foreign))
    weights = {value.name for value in model.graph.value_info if value.doc_string == WEIGHT}
    given = {value.name: tensor(value) for value in model.graph.input if value.name not in weights}
    made = {value.name: tensor(value) for value in model.graph.output}
    # Weights have become inputs, which ONNX allows anywhere from IR version 4 on.
    model.ir_version = max(model.ir_version, 4)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        findings.add(file, "onnx.checker", "a valid graph", str(error).strip().splitlines()[0])
    if inputs and set(inputs) != set(given):
        findings.add(config, f"inputs of {file.name}", ", ".join(sorted(given)) or "none", ", ".join(sorted(inputs)))
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
            findings.add(config, f"max_batch_size with {where}", "a variable first dimension, or 0", show(theirs))
        # A narrower input is allowed, an output must be equal.
        elif len(theirs[1]) != len(ours[1]) or any(
            a != b for a, b in zip(theirs[1], ours[1], strict=True) if a != -1 or kind == "output"
        ):
            findings.add(config, f"dims of {where}", show(theirs), show(ours))


def nodes(model: onnx.ModelProto) -> Iterator[Any]:
    """All nodes, those of subgraphs and of the model's functions included."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs]:
                waiting.extend(graph.node)


def tensor(value: Any) -> tuple[int, Shape]:
    """Data type and shape of a graph's input or output; a symbolic or unsaid size is -1."""
    if not value.type.HasField("tensor_type"):
        return schema.TYPE_INVALID, ()
    sizes = value.type.tensor_type.shape.dim
    shape = tuple(size.dim_value if size.HasField("dim_value") else -1 for size in sizes)
    return TYPES.get(value.type.tensor_type.elem_type, schema.TYPE_INVALID), shape


# Field numbers of onnx.proto
MODEL_GRAPH = 7
GRAPH_INITIALIZER = 5
TENSOR_RAW_DATA = 9
WEIGHT = "a weight whose data was left out"


def read_without_weights(file: Path) -> tuple[onnx.ModelProto, list[tuple[str, str]]]:
    """The model with each weight's raw data left out and the weight made an input, and what is wrong with the weights.

    Reads the headers alone: a file of 700 MB takes milliseconds. ValueError where it is not a whole ONNX file.
    """
    faults: list[tuple[str, str]] = []
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if len(data) > LARGEST_MESSAGE:
            raise ValueError(f"{len(data)} bytes, more than protobuf's 2 GiB")
        model = onnx.ModelProto()
        graph = onnx.GraphProto()
        try:
            for number, start, body, end in fields(data, 0, len(data)):
                if number != MODEL_GRAPH:
                    model.MergeFromString(data[start:end])
                    continue
                for inner, first, inside, last in fields(data, body, end):
                    if inner == GRAPH_INITIALIZER:
                        weight, size = read_weight(data, inside, last)
                        faults += weight_faults(file, weight, size)
                        shape = onnx.helper.make_tensor_type_proto(weight.data_type, list(weight.dims))
                        entry = onnx.helper.make_value_info(weight.name, shape, doc_string=WEIGHT)
                        graph.value_info.append(entry)
                    else:
                        graph.MergeFromString(data[first:last])
        except DecodeError as error:
            raise ValueError(str(error)) from error
    given = {value.name for value in graph.input}
    weights = [value for value in graph.value_info if value.doc_string == WEIGHT]
    graph.input.extend(value for value in weights if value.name not in given)
    model.graph.CopyFrom(graph)
    if not graph.node or not model.ir_version:
        raise ValueError("no graph in it")
    return model, faults


def read_weight(data: mmap.mmap, start: int, end: int) -> tuple[onnx.TensorProto, int]:
    """A tensor without its raw data, and how many bytes those are (-1: none)."""
    weight = onnx.TensorProto()
    size = -1
    for number, first, body, last in fields(data, start, end):
        if number == TENSOR_RAW_DATA:
            size = last - body
        else:
            weight.MergeFromString(data[first:last])
    return weight, size


def weight_faults(file: Path, weight: onnx.TensorProto, size: int) -> Iterator[tuple[str, str]]:
    """(expected, found) of what is wrong with a weight whose raw data are `size` bytes."""
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)
    except (KeyError, ValueError):
        yield f"a data type for {weight.name}", str(weight.data_type)
        return
    if weight.data_location == onnx.TensorProto.EXTERNAL:
        # .onnx and .data beside each other: both must be in the version folder
        location = {item.key: item.value for item in weight.external_data}.get("location", "")
        if (
            not location
            or Path(location).is_absolute()
            or ".." in Path(location).parts
            or not (file.parent / location).is_file()
        ):
            yield f"the file with {weight.name} beside the model", location or "no location"
    elif weight.data_type not in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):  # two to a byte
        expected = prod(weight.dims) * dtype.itemsize
        if size not in (-1, expected):
            yield f"{expected} bytes for {weight.name}", str(size)


def fields(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """A protobuf message's fields in turn: number, where the field, its content and the next field start."""
    while position < end:
        start = position
        key, position = varint(data, position, end)
        kind = key & 7
        length = 0
        if kind == 0:
            body = position
            _, position = varint(data, position, end)
        elif kind == 2:
            length, body = varint(data, position, end)
            position = body + length
        elif kind in (1, 5):
            body = position
            position += 8 if kind == 1 else 4
        else:
            raise ValueError(f"no protobuf message at byte {start}")
        if position > end:
            raise ValueError(f"it ends {position - end} bytes too early")
        yield key >> 3, start, body, position


def varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """A protobuf integer and the position behind it."""
    value = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
    raise ValueError(
        f"it ends inside a number, at byte {position}" if position >= end else f"no protobuf at byte {position}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Check a Triton model repository without a server.")
    parser.add_argument("repository", type=Path)
    parser.add_argument("--models", type=Path, help="folder of the models' entries, <name>.json")
    arguments = parser.parse_args(argv)
    findings = check_repository(arguments.repository, arguments.models)
    if findings:
        print("\n".join(findings))
        sys.exit(1)
    print(f"{arguments.repository}: no findings")


if __name__ == "__main__":
    main()
