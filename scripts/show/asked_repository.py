"""One of the two repositories of `make compare`: read its files, serve its models one at a time, and ask them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf import text_format  # type: ignore[import-untyped]
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2 as schema  # type: ignore[import-untyped]

from scripts.publish.prebuilt import GPUS, make_environment
from scripts.serve.model_config import read_config
from scripts.serve.onnx_headers import read_without_weights
from scripts.serve.triton_client import UnservedError, serve_models
from scripts.serve.verdict import stage_files
from scripts.steps.records import hash_file

Array = NDArray[Any]
Request = dict[str, Array]

SCRATCH, LOG, VENV = Path("build/compare"), Path("build/logs/compare.log"), Path(".venv-compare")


class IncomparableError(Exception):
    """Says why two models cannot get the same requests, or why one cannot be asked on this machine."""


class Repository:
    """A repository, its models, and how to serve them.

    `image`: the image whose Triton serves, None: the one installed here. `foreign`: its Python code gets an environment
    with its own requirements. `confined`: its code was not made here, so the server confines it (triton_server).
    """

    def __init__(self, path: Path, image: str | None, *, foreign: bool = False, confined: bool = True) -> None:
        if not any(path.glob("*/config.pbtxt")):
            raise SystemExit(f"{path}: no model repository; expected folders with a config.pbtxt")
        self.path, self.image, self.foreign, self.confined = path.resolve(), image, foreign, confined
        self.models = sorted(config.parent.name for config in path.glob("*/config.pbtxt"))

    def hash_files(self, name: str) -> dict[str, str]:
        """Return the sha256 of each file of a model, without Python's __pycache__."""
        folder = self.path / name
        files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}

    def read_model_config(self, name: str) -> Any:
        """Return the config.pbtxt of a model; IncomparableError if it cannot be read."""
        try:
            return read_config(self.path / name / "config.pbtxt")
        except ValueError as error:
            raise IncomparableError(f"{self.path / name}/config.pbtxt cannot be read: {error}") from None

    def ask_model(self, name: str, config: Any, requests: Iterable[Request]) -> list[Array]:
        """Serve only this model with this config, and return its answers; IncomparableError if it cannot be served."""
        if config.platform == "tensorrt_plan" and not (self.image and GPUS.is_dir()):
            raise IncomparableError(
                f"{self.path / name} is a TensorRT plan: only an image on a machine with a GPU serves it"
            )
        written = SCRATCH / f"{name}.pbtxt"
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(text_format.MessageToString(config))
        contents = [
            f"{name}/{file}={self.path / name / file}" for file in self.hash_files(name) if file != "config.pbtxt"
        ]
        stage_files([f"{name}/config.pbtxt={written}", *contents], SCRATCH / "staging")
        venv = None
        if self.foreign and config.backend == "python" and not self.image:
            venv, trouble = make_environment(self.path, VENV)
            if trouble:
                raise IncomparableError(f"{self.path / name}: {trouble}")
        try:
            with serve_models(SCRATCH / "staging", LOG, image=self.image, venv=venv, foreign=self.confined) as ask:
                return [ask(name, request) for request in requests]
        except UnservedError as error:
            raise IncomparableError(f"{self.path / name}: {error}") from None


def explain_difference(ours: Any, theirs: Any) -> str:
    """Return why models with these configs cannot get the same requests, "" if they can.

    Inputs or outputs that a config leaves out are not compared: Triton completes them.
    """
    for what in ("input", "output"):
        mine, other = list_tensors(ours, what), list_tensors(theirs, what)
        if not mine or not other:
            continue
        if mine.keys() != other.keys():
            return f"{what}: {', '.join(sorted(mine))} in the new one, {', '.join(sorted(other))} in the other"
        for name, (kind, shape) in mine.items():
            other_kind, other_shape = other[name]
            pairs = zip(shape, other_shape, strict=False)
            if (
                kind != other_kind
                or len(shape) != len(other_shape)
                or any(a != b and -1 not in (a, b) for a, b in pairs)
            ):
                return f"{what} {name} is {kind} {shape} in the new one, {other_kind} {other_shape} in the other"
    return ""


def list_tensors(config: Any, what: str) -> dict[str, tuple[str, list[int]]]:
    """Return the type and the shape, with the batch, of each input or output (`what`) by name."""
    batch = [-1] if config.max_batch_size else []
    return {
        tensor.name: (schema.DataType.Name(tensor.data_type).removeprefix("TYPE_"), [*batch, *tensor.dims])
        for tensor in getattr(config, what)
    }


def make_askable(config: Any, partner: Any, image: str | None) -> Any:
    """Return a copy of `config` that Triton can serve on this machine without completing it.

    It runs on the CPU if there is no GPU or no image. What it leaves out is taken from the config of its `partner`,
    the same model in the other repository.
    """
    whole = type(config).FromString(config.SerializeToString())
    if config.platform == "onnxruntime_onnx":
        whole.platform, whole.backend = "", "onnxruntime"
    if not config.input and not config.output:
        whole.max_batch_size = partner.max_batch_size
    for what in ("input", "output"):
        if not getattr(config, what):
            getattr(whole, what).extend(getattr(partner, what))
    if not (config.platform or config.backend):
        whole.platform, whole.backend = partner.platform, partner.backend
    if not (image and GPUS.is_dir()):
        del whole.instance_group[:]
        whole.instance_group.add(count=1, kind=schema.ModelInstanceGroup.KIND_CPU)
    return whole


def read_weights_kind(repository: Path) -> str:
    """Return the kind of weights that the ONNX files' metadata name: synthetic (if one file does), real, or unknown."""
    kinds = set()
    for path in sorted(repository.glob("*/*/model.onnx")):
        try:
            properties = read_without_weights(path)[0].metadata_props
        except (ValueError, OSError):
            continue
        kinds |= {prop.value for prop in properties if prop.key == "weights"}
    return next((kind for kind in ("synthetic", "real") if kind in kinds), "unknown")
