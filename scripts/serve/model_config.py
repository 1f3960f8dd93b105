"""Read a config.pbtxt, and tell its backend and the versions that Triton loads."""

import re
from collections.abc import Sequence
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as schema  # type: ignore[import-untyped]

SCHEMA = ".".join(version_of("tritonclient").split(".")[:2])  # a newer server knows every field of this schema
FILES = {"onnxruntime": "model.onnx", "python": "model.py", "tensorrt": "model.plan"}

# Bytes of one element of each data type
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
Tensors = dict[str, tuple[int, Shape]]  # name -> Triton's data type, shape with the batch dimension


def read_config(path: Path) -> Any:
    """Read a config.pbtxt as a ModelConfig of this tritonclient's schema; ValueError if the text does not fit it.

    Comments and strings may have any encoding; the server takes that, too.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    # Python's parser takes kinds of blanks that the server's parser refuses
    bare = re.sub(r"""#[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", lambda quoted: " " * len(quoted[0]), text)
    if strange := re.search(r"[^\t-\r -~]", bare):
        line = text.count("\n", 0, strange.start()) + 1
        raise ValueError(f"line {line}: the character {strange[0]!r} outside of comments and strings")
    try:
        return text_format.Parse(text, schema.ModelConfig())
    except text_format.ParseError as error:
        raise ValueError(str(error)) from error


def choose_versions(there: list[int], policy: Any) -> list[int]:
    """Return the versions that a policy loads; without a policy the latest one."""
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return there
    if choice == "specific":
        return [number for number in there if number in policy.specific.versions]
    count = policy.latest.num_versions if choice == "latest" else 1
    return there[-count:] if count else []


def find_backend(config: Any, versions: Sequence[Path]) -> str:
    """Return the backend that a config names, "" if it is none of the three.

    If the config names none, the model's file decides.
    """
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


def format_tensor(tensor: tuple[int, Shape]) -> str:
    return f"{schema.DataType.Name(tensor[0]).removeprefix('TYPE_')} [{', '.join(map(str, tensor[1]))}]"
