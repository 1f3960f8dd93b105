"""Check a model repository without a server: find what Triton refuses, and what makes the client fail.

    python -m scripts.serve.check_repository model_repository_running [--models build/models]

Prints all findings at once, one line each: file, rule, expected, found. A fault makes the server or the client fail;
with any fault the exit status is 1. A recommendation is a rule of this project alone; its line begins with that word.
The tests compare the rules with verdicts of a real server (tests/serve/server_verdicts.json). Three things only that
server can check: kernels that a provider lacks, how a Python model behaves, what a plan contains.
NGC_RELEASE in the environment names the release; scripts/serve/releases.yaml lists its limits.
`--models`: folder of the models' entries (<name>.json). The configs must have their shapes and batch limits.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2 as schema  # type: ignore[import-untyped]

from scripts.serve import python_model
from scripts.serve.check_onnx import check_onnx
from scripts.serve.client_contract import check_client
from scripts.serve.config_rules import Model, apply_rules
from scripts.serve.findings import Findings
from scripts.serve.model_config import BYTES, FILES, SCHEMA, Tensors, choose_versions, find_backend, read_config
from scripts.serve.onnx_headers import LARGEST_MESSAGE

LAST_VERSION = 2**63 - 1  # a larger number aborts the server
# The tests' stand-in for trtexec writes a file that begins like this, not a plan.
STAND_IN_PLAN = b"stand-in for a TensorRT engine"


def check_repository(root: Path, models: Path | None = None, gpu: bool | None = None) -> list[str]:
    """Return the faults of `find_faults`, without its recommendations."""
    return find_faults(root, models, gpu).faults


def find_faults(root: Path, models: Path | None = None, gpu: bool | None = None) -> Findings:
    """Return faults and recommendations, both sorted by the models' names.

    `models`: folder of the models' entries. `gpu`: whether the server has a GPU (None: as this machine).
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
    """Return the entry that a model was made from: `vit_onnx` has <models>/vit.json. None if there is no such file."""
    path = models / f"{model.rpartition('_')[0]}.json" if models else None
    return json.loads(path.read_text()) if path and path.is_file() else None


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
        # Triton picks a file by the compute capability of the GPU, so it may load any of these
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
    """Return the folders of the versions that Triton loads. Version 1 must be among them: the client asks for it."""
    there: dict[int, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        # Triton reads the name by std::stoll, up to the first character that is no digit: 1.bak is version 1.
        # It skips names like 01.
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


def check_backend(findings: Findings, file: Path, config: Any, versions: Sequence[Path]) -> str:
    """Return the backend, "" if it is none of the three."""
    backend = find_backend(config, versions)
    if not backend:
        expected = 'backend: "onnxruntime", backend: "python" or platform: "tensorrt_plan"'
        found = [f'{key}: "{value}"' for key in ("backend", "platform") if (value := getattr(config, key))]
        findings.add(file, "backend", expected, ", ".join(found) or "neither")
    return backend


def check_tensors(findings: Findings, file: Path, kind: str, tensors: Sequence[Any], batch: int) -> Tensors:
    """Return the inputs or outputs that have no fault, with the batch dimension in their shapes."""
    good: Tensors = {}
    if not tensors:
        findings.add(file, f"{kind}s", f"at least one {kind}", "none")
    for tensor in tensors:
        name = f"{kind} {tensor.name!r}"
        shape = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
        if not tensor.name or tensor.name in good:
            twice = bool(tensor.name) and kind == "output"  # of two outputs with one name the server takes the last
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
            expected = f"at most {(LARGEST_MESSAGE - 1) // max(sample, 1)}, because a gRPC message is below 2 GiB"
            found = f"{batch} of {sample} bytes each"
            findings.add(file, "max_batch_size", expected, found, recommendation=sample < LARGEST_MESSAGE)


def check_instances(findings: Findings, file: Path, config: Any, backend: str, gpu: bool) -> None:
    for group in config.instance_group:
        kind = schema.ModelInstanceGroup.Kind.Name(group.kind)
        if kind == "KIND_GPU" and not gpu:
            findings.add(file, "instance_group", "KIND_AUTO, because this machine has no GPU", kind)
        if kind == "KIND_CPU" and backend == "tensorrt":
            findings.add(file, "instance_group", "KIND_AUTO or KIND_GPU for a TensorRT plan", kind)


def check_plan(findings: Findings, file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(4096)
    if STAND_IN_PLAN in start:
        findings.add(file, "plan", "a TensorRT engine", "a stand-in's file, which is no engine")
    elif all(9 <= byte < 127 for byte in start[:64]):
        findings.add(file, "plan", "a TensorRT engine", "a text")


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
