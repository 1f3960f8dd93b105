"""What Triton refuses in a model repository, or serves so that the client fails, found without a server.

    python -m scripts.serve.check_repository model_repository_running [--models build/models]

All findings at once, one line each: file, rule, expected, found. A fault is what the server or the client stumbles
over; exit status 1 where there are any. A recommendation is our own and begins with the word. The rules are held
against the verdicts of a real server (tests/serve/server_verdicts.json); what no rule knows of is left to that server:
kernels that a provider lacks, a Python model's behaviour, the content of a plan.
NGC_RELEASE in the environment tells the release, scripts/serve/releases.yaml what it knows.
`--models`: folder of the models' entries (<name>.json), whose shapes and batch limits the configs must then have.
"""

import argparse
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

from scripts.serve import python_model
from scripts.serve.config_rules import Model, apply_rules
from scripts.serve.onnx_agreement import DOMAINS, MICROSOFT, infer_outputs, mend_model
from scripts.serve.releases import find_release

SCHEMA = ".".join(version_of("tritonclient").split(".")[:2])  # of which a newer server knows every field
LARGEST_MESSAGE = 2 << 30  # of gRPC
LAST_VERSION = 2**63 - 1  # a larger number aborts the server
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
    faults: list[str] = field(default_factory=list)
    recommendations: list[str] = field(default_factory=list)

    def add(self, path: Path, rule: str, expected: object, found: object, recommendation: bool = False) -> None:
        line = f"{path.relative_to(self.root.parent)}: {rule}; expected {expected}, found {found}"
        lines = self.recommendations if recommendation else self.faults
        if line not in lines:
            lines.append(line)


def check_repository(root: Path, models: Path | None = None, gpu: bool | None = None) -> list[str]:
    """The faults alone, as `find_faults` finds them."""
    return find_faults(root, models, gpu).faults


def find_faults(root: Path, models: Path | None = None, gpu: bool | None = None) -> Findings:
    """Faults and recommendations, each in the order of the models' names.

    `models`: folder of the models' entries; `gpu`: whether the server has one (None: as here).
    """
    gpu = Path("/proc/driver/nvidia/gpus").is_dir() if gpu is None else gpu
    root = root.absolute()
    findings = Findings(root)
    if not root.is_dir():
        findings.add(root, "repository", "a folder of models", "a file" if root.exists() else "nothing")
        return findings
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
    return findings


def read_entry(models: Path | None, model: str) -> dict[str, Any] | None:
    """The entry that a model was made from, by the model's name without its last part; None where there is none."""
    path = models / f"{model.rpartition('_')[0]}.json" if models else None
    return json.loads(path.read_text()) if path and path.is_file() else None


def read_config(path: Path) -> Any:
    """The ModelConfig in a config.pbtxt by the schema of the tritonclient here; ValueError where it is none.

    Comments and strings may be in any encoding, as for the server.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    # Python's parser skips more kinds of blanks than the server's
    bare = re.sub(r"""#[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", lambda quoted: " " * len(quoted[0]), text)
    if strange := re.search(r"[^\t-\r -~]", bare):
        line = text.count("\n", 0, strange.start()) + 1
        raise ValueError(f"line {line}: the sign {strange[0]!r} outside of comments and strings")
    try:
        return text_format.Parse(text, schema.ModelConfig())
    except text_format.ParseError as error:
        raise ValueError(str(error)) from error


def check_model(findings: Findings, folder: Path, entry: dict[str, Any] | None, gpu: bool) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.exists():
            findings.add(path, "link", "an existing file", f"a link to {path.readlink()}, which is not there")
    file = folder / "config.pbtxt"
    if not file.is_file():
        findings.add(file, "config", "a file", "a folder" if file.is_dir() else "nothing")
        check_versions(findings, folder, schema.ModelConfig())
        return
    try:
        config = read_config(file)
    except ValueError as error:
        findings.add(
            file, f"config schema of Triton {SCHEMA}", "model_config.proto's text format", " ".join(str(error).split())
        )
        check_versions(findings, folder, schema.ModelConfig())
        return
    versions = check_versions(findings, folder, config)
    if config.name not in ("", folder.name):
        findings.add(file, "name", f'"{folder.name}" like the folder', f'"{config.name}"')
    backend = check_backend(findings, file, config, versions)
    if config.max_batch_size < 0:
        findings.add(file, "max_batch_size", "0 or more", config.max_batch_size)
    inputs = check_tensors(findings, file, "input", config.input, config.max_batch_size)
    outputs = check_tensors(findings, file, "output", config.output, config.max_batch_size)
    check_message(findings, file, inputs, config.max_batch_size)
    check_instances(findings, file, config, backend, gpu)
    model = Model(config, backend, folder, versions, gpu)
    for rule, found in apply_rules(model):
        findings.add(file, rule.field, rule.allowed, found, rule.recommendation)
    check_client(findings, file, folder.name, inputs, outputs, entry)
    if entry and config.max_batch_size > max(entry["batch"]):
        expected = f"at most {max(entry['batch'])}, the model's largest batch"
        findings.add(file, "max_batch_size", expected, config.max_batch_size, recommendation=True)
    for version in versions if backend else []:
        name = config.default_model_filename or FILES[backend]
        # A file for a kind of GPU is looked for on that kind alone
        names = {name, *(config.cc_model_filenames.values() if backend == "tensorrt" else ())}
        for path in sorted(version / name for name in names):
            if backend == "onnxruntime" and path.is_dir():
                path = path / "model.onnx"
            if not path.is_file() or not path.stat().st_size:
                found = "a folder" if path.is_dir() else "an empty file" if path.exists() else "nothing"
                findings.add(path, f"file of backend {backend}", "a file", found)
            elif backend == "onnxruntime":
                check_onnx(findings, path, file, model, inputs, outputs)
            elif backend == "tensorrt":
                check_plan(findings, path)
            else:
                packages = (version / "requirements.txt").is_file() or "EXECUTION_ENV_PATH" in config.parameters
                for fault in python_model.check_model(path, packages):
                    findings.add(*fault)


def check_versions(findings: Findings, folder: Path, config: Any) -> list[Path]:
    """The folders of the versions that Triton loads; version 1 must be among them, for the client asks that one."""
    there: dict[int, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        # std::stoll reads digits up to the first other sign, so 1.bak is version 1; 01 is left out
        number = re.match(r"\s*[+-]?[0-9]+", path.name)
        if not number or (path.name[0] == "0" and len(path.name) > 1):
            if any(sign.isdigit() for sign in path.name):
                wanted = "a whole number without a leading zero"
                findings.add(path, "version folder", wanted, path.name, recommendation=True)
        elif not 0 <= int(number[0]) <= LAST_VERSION:
            findings.add(path, "version folder", f"a number within 0 … {LAST_VERSION}", path.name)
        else:
            there[int(number[0])] = folder / str(int(number[0]))
            if path.name != str(int(number[0])):
                wanted = "a whole number without a leading zero"
                findings.add(path, "version folder", wanted, path.name, recommendation=True)
    loaded = choose_versions(sorted(there), config.version_policy)
    if not there:
        findings.add(folder, "version folder", "at least one, such as 1", "none")
    elif not loaded:
        findings.add(folder / "config.pbtxt", "version_policy", f"one of {', '.join(map(str, there))}", "none")
    elif 1 not in loaded:
        findings.add(folder, "client's contract", "version 1", ", ".join(map(str, loaded)))
    return [there[number] for number in loaded]


def choose_versions(there: list[int], policy: Any) -> list[int]:
    """The versions that a policy loads; without one the latest."""
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return there
    if choice == "specific":
        return [number for number in there if number in policy.specific.versions]
    count = policy.latest.num_versions if choice == "latest" else 1
    return there[-count:] if count else []


def check_backend(findings: Findings, file: Path, config: Any, versions: Sequence[Path]) -> str:
    """The backend, "" where it is none of the three."""
    backend = find_backend(config, versions)
    if not backend:
        expected = 'backend: "onnxruntime", backend: "python" or platform: "tensorrt_plan"'
        found = [f'{key}: "{value}"' for key in ("backend", "platform") if (value := getattr(config, key))]
        findings.add(file, "backend", expected, ", ".join(found) or "neither")
    return backend


def find_backend(config: Any, versions: Sequence[Path]) -> str:
    """The backend that a config names, "" where it is none of the three; unsaid, the model's file tells it."""
    known = {
        ("onnxruntime", ""): "onnxruntime",
        ("onnxruntime", "onnxruntime_onnx"): "onnxruntime",
        ("", "onnxruntime_onnx"): "onnxruntime",
        ("python", ""): "python",
        ("", "tensorrt_plan"): "tensorrt",
        ("tensorrt", "tensorrt_plan"): "tensorrt",
        ("tensorrt", ""): "tensorrt",
    }
    for backend in ("tensorrt", "onnxruntime", "python"):
        name = config.default_model_filename
        if name == FILES[backend] or (not name and any((path / FILES[backend]).exists() for path in versions)):
            known.setdefault(("", ""), backend)
    return known.get((config.backend, config.platform), "")


def check_tensors(findings: Findings, file: Path, kind: str, tensors: Sequence[Any], batch: int) -> Tensors:
    """The config's inputs or outputs with whole shapes, those that can be compared further."""
    good: Tensors = {}
    if not tensors:
        findings.add(file, f"{kind}s", f"at least one {kind}", "none")
    for tensor in tensors:
        name = f"{kind} {tensor.name!r}"
        shape = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
        if not tensor.name or tensor.name in good:
            twice = bool(tensor.name) and kind == "output"  # the server takes the last
            findings.add(file, f"{kind} name", "a name of its own", repr(tensor.name), recommendation=twice)
        elif tensor.data_type not in schema.DataType.values():
            findings.add(file, f"data_type of {name}", "one of TYPE_BOOL, TYPE_INT16, TYPE_FP32, …", tensor.data_type)
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
            expected = f"at most {(LARGEST_MESSAGE - 1) // max(sample, 1)}, for a gRPC message is below 2 GiB"
            found = f"{batch} of {sample} bytes each"
            findings.add(file, "max_batch_size", expected, found, recommendation=sample < LARGEST_MESSAGE)


def check_instances(findings: Findings, file: Path, config: Any, backend: str, gpu: bool) -> None:
    for group in config.instance_group:
        kind = schema.ModelInstanceGroup.Kind.Name(group.kind)
        if kind == "KIND_GPU" and not gpu:
            findings.add(file, "instance_group", "KIND_AUTO, for this machine has no GPU", kind)
        if kind == "KIND_CPU" and backend == "tensorrt":
            findings.add(file, "instance_group", "KIND_AUTO or KIND_GPU for a TensorRT plan", kind)


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
                findings.add(
                    file, f"client's contract, {kind}", f"{name} {format_tensor(tensor)}", ", ".join(found) or "none"
                )
            elif found[name][0] != tensor[0] or not is_match(found[name][1], tensor[1]):
                findings.add(
                    file, f"client's contract, {kind} {name!r}", format_tensor(tensor), format_tensor(found[name])
                )
        if expected and kind == "input" and (surplus := sorted(set(found) - set(expected))):
            findings.add(file, "client's contract, inputs", ", ".join(expected), f"also {', '.join(surplus)}")


def is_match(found: Shape, expected: Shape) -> bool:
    return len(found) == len(expected) and all(a in (b, -1) for a, b in zip(found, expected, strict=True))


def format_tensor(tensor: tuple[int, Shape]) -> str:
    return f"{schema.DataType.Name(tensor[0]).removeprefix('TYPE_')} [{', '.join(map(str, tensor[1]))}]"


def check_plan(findings: Findings, file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(4096)
    if STAND_IN_PLAN in start:
        findings.add(file, "plan", "a TensorRT engine", "a stand-in's file, which is no engine")
    elif all(9 <= byte < 127 for byte in start[:64]):
        findings.add(file, "plan", "a TensorRT engine", "a text")


def check_onnx(
    findings: Findings, file: Path, config: Path, described: Model, inputs: Tensors, outputs: Tensors
) -> None:
    """The ONNX file against the release, and the config's whole shapes against it, as the C++ backend does at load."""
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
    shapes, lacking = infer_outputs(model)
    made = {value.name: (read_tensor(value)[0], shapes[value.name] or ()) for value in model.graph.output}
    if lacking and not described.gpu:
        findings.add(file, "operators", "a data type that the CPU computes", f"bfloat16 in {', '.join(lacking)}")
    # Weights have become inputs, which ONNX allows anywhere from IR version 4 on.
    model.ir_version = max(model.ir_version, 4)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.HasField("tensor_type"):  # ONNX Runtime does without a shape
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
            pass  # a scalar is written as [1]
        # A narrower input is allowed, an output must be equal.
        elif len(theirs[1]) != len(ours[1]) or any(
            a != b for a, b in zip(theirs[1], ours[1], strict=True) if a != -1 or kind == "output"
        ):
            findings.add(config, f"dims of {where}", format_tensor(theirs), format_tensor(ours))


def is_foreign(domain: str, name: str) -> bool:
    """Whether ONNX Runtime 1.18 has no such operator; those of ONNX's own domains are onnx.checker's matter."""
    return domain not in DOMAINS or (domain == "com.microsoft" and name not in MICROSOFT)


def iterate_nodes(model: onnx.ModelProto) -> Iterator[Any]:
    """All nodes, those of subgraphs and of the model's functions included."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs]:
                waiting.extend(graph.node)


def read_tensor(value: Any) -> tuple[int, Shape]:
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
SMALL = 1024  # bytes of a weight that is read


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
            for number, start, body, end in read_fields(data, 0, len(data)):
                if number != MODEL_GRAPH:
                    model.MergeFromString(data[start:end])
                    continue
                for inner, first, inside, last in read_fields(data, body, end):
                    if inner == GRAPH_INITIALIZER:
                        weight, size = read_weight(data, inside, last)
                        faults += weight_faults(file, weight, size)
                        if weight.data_type == onnx.TensorProto.INT64 and 0 <= size <= SMALL:
                            graph.initializer.add().ParseFromString(data[inside:last])  # it may be a shape
                            continue
                        shape = onnx.helper.make_tensor_type_proto(weight.data_type, list(weight.dims))
                        entry = onnx.helper.make_value_info(weight.name, shape, doc_string=WEIGHT)
                        graph.value_info.append(entry)
                    else:
                        graph.MergeFromString(data[first:last])
        except DecodeError as error:
            raise ValueError(str(error)) from error
    given = {value.name for value in graph.input}
    weights = [value for value in graph.value_info if value.doc_string == WEIGHT]
    for value in weights:
        if value.name not in given:  # ONNX Runtime takes the first of two of one name
            given.add(value.name)
            graph.input.append(value)
    model.graph.CopyFrom(graph)
    if not graph.node or not model.ir_version:
        raise ValueError("no graph in it")
    return model, faults


def read_weight(data: mmap.mmap, start: int, end: int) -> tuple[onnx.TensorProto, int]:
    """A tensor without its raw data, and how many bytes those are (-1: none)."""
    weight = onnx.TensorProto()
    size = -1
    for number, first, body, last in read_fields(data, start, end):
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
        keys = {item.key: item.value for item in weight.external_data}
        location = keys.get("location", "")
        path = file.parent / location
        if not location or Path(location).is_absolute() or not path.is_file():
            yield f"the file with {weight.name} beside the model", location or "no location"
            return
        expected = prod(weight.dims) * dtype.itemsize
        if weight.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
            expected = (prod(weight.dims) + 1) // 2
        offset, length = (keys.get(key, "0") for key in ("offset", "length"))
        if not offset.isdigit() or not length.isdigit():
            yield f"numbers for offset and length of {weight.name}", f"{offset}, {length}"
        elif int(length) not in (0, expected):
            yield f"{expected} bytes for {weight.name}", length
        elif int(offset) + expected > path.stat().st_size:
            yield f"{int(offset) + expected} bytes in {location} for {weight.name}", str(path.stat().st_size)
    elif weight.data_type not in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):  # two to a byte
        expected = prod(weight.dims) * dtype.itemsize
        if size not in (-1, expected):
            yield f"{expected} bytes for {weight.name}", str(size)


def read_fields(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """A protobuf message's fields in turn: number, where the field, its content and the next field start."""
    while position < end:
        start = position
        key, position = read_varint(data, position, end)
        kind = key & 7
        length = 0
        if kind == 0:
            body = position
            _, position = read_varint(data, position, end)
        elif kind == 2:
            length, body = read_varint(data, position, end)
            position = body + length
        elif kind in (1, 5):
            body = position
            position += 8 if kind == 1 else 4
        else:
            raise ValueError(f"no protobuf message at byte {start}")
        if position > end:
            raise ValueError(f"it ends {position - end} bytes too early")
        yield key >> 3, start, body, position


def read_varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
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
    found = find_faults(arguments.repository, arguments.models)
    print("".join(f"recommendation: {line}\n" for line in found.recommendations), end="")
    if found.faults:
        print("\n".join(found.faults))
        sys.exit(1)
    print(f"{arguments.repository}: {'no faults' if found.recommendations else 'no findings'}")


if __name__ == "__main__":
    main()
