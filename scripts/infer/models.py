"""The four networks of a model repository, opened with ONNX Runtime once for all studies; triton.py asks a server.

with Local(Path("model_repository_running")) as models:
    models.find_body_part(volume); models.infer(tensor)
"""

import importlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray

from scripts.infer.findings import FINDINGS, Result, make_result, normalise_embedding
from scripts.infer.messages import StudyError
from scripts.infer.volume import Volume

ONNX = {
    "vit": "vit_onnx/1/model.onnx",
    "binary": "binary_onnx/1/model.onnx",
    "multilabel": "multilabel_onnx/1/model.onnx",
    "bpr": "bpr_model/1/weights/model.onnx",
}
BPREG = "bpr_model/1/bpreg/__init__.py"
SETTINGS = "bpr_model/1/weights/inference-settings.json"
BATCH, BATCH_GPU = 8, 32  # slices that the body-part network scores at a time
# One of config.pbtxt's options for ONNX Runtime on a GPU
TF32 = re.compile(r'key\s*:\s*"use_tf32"\s*,?\s*value\s*:\s*"(\w+)"')
Array = NDArray[Any]


class Models:
    """The networks of `make infer`; a subclass asks them through `ask`."""

    shape: tuple[int, int, int]  # of the ViT's input, one volume
    weights: str  # synthetic, real or unknown
    handover = ""  # how volumes are sent to a Triton: a key of SENTENCES

    def ask(self, model: str, **inputs: Array) -> Array:
        """The tensor `output` of a model, a key of ONNX. StudyError: the model gives no answer."""
        raise NotImplementedError

    def find_body_part(self, volume: Volume) -> str:
        """The tag that bpr_model gives a volume; NONE if it cannot tag it."""
        raise NotImplementedError

    def infer(self, tensor: NDArray[np.float32]) -> Result:
        """float32 `shape` -> probabilities. StudyError: some are not finite."""
        embedding = normalise_embedding(self.ask("vit", input=tensor[None, None]))
        answer = make_result(self.ask("binary", input=embedding), self.ask("multilabel", input=embedding))
        if not np.isfinite([answer.probability, *answer.findings.values()]).all():
            raise StudyError("network", what="NaN")
        return answer

    def close(self) -> None:
        pass

    def __enter__(self) -> "Models":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Local(Models):
    """ONNX Runtime on the files of a repository, on the GPU if there is one, else on the CPUs."""

    def __init__(self, repository: Path) -> None:
        """SystemExit: a file is missing, cannot be opened or holds another network."""
        check_complete(repository)
        self.sessions = {
            name: open_session(repository / file, may_use_tf32(repository / file)) for name, file in ONNX.items()
        }
        self.shape = read_volume_shape(self.sessions["vit"].get_inputs()[0].shape, repository / ONNX["vit"])
        if (classes := self.sessions["multilabel"].get_outputs()[0].shape[-1]) != len(FINDINGS):
            raise SystemExit(f"{repository / ONNX['multilabel']}: {classes} findings, expected {len(FINDINGS)}")
        self.weights = find_weights_kind(self.sessions.values())
        self.bpreg = import_published(repository / BPREG)
        try:
            self.settings = self.bpreg.Settings.read(repository / SETTINGS)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        on_gpu = self.sessions["bpr"].get_providers()[0] == "CUDAExecutionProvider"
        self.side, self.batch = self.sessions["bpr"].get_inputs()[0].shape[-1], BATCH_GPU if on_gpu else BATCH

    def ask(self, model: str, **inputs: Array) -> Array:
        try:
            answer: Array = self.sessions[model].run(["output"], inputs)[0]
        except Exception as error:  # ONNX Runtime documents none of its own exceptions
            raise StudyError("network", what=f"{model}: {type(error).__name__}") from None
        return answer

    def find_body_part(self, volume: Volume) -> str:
        hu, spacing = volume.convert_for_body_part()
        try:
            slices = self.bpreg.preprocess(hu, spacing, self.side)
        except ValueError:
            return "NONE"
        if not len(slices):
            return "NONE"
        starts = range(0, len(slices), self.batch)
        scores = np.concatenate([self.ask("bpr", input=slices[start : start + self.batch]) for start in starts])
        return str(self.bpreg.tag(scores, float(spacing[2]), self.settings))


def find_weights_kind(sessions: Iterable[Any]) -> str:
    """synthetic if any network says so, real if all say so, else unknown."""
    kinds = {opened.get_modelmeta().custom_metadata_map.get("weights") for opened in sessions}
    return "synthetic" if "synthetic" in kinds else "real" if kinds == {"real"} else "unknown"


def check_complete(repository: Path) -> None:
    """SystemExit if the repository lacks a file that results depend on."""
    missing = [file for file in (*ONNX.values(), BPREG, SETTINGS) if not (repository / file).is_file()]
    if missing:
        raise SystemExit(
            f"{repository} lacks {', '.join(missing)}; expected a whole repository with ONNX files; make repository"
        )


def may_use_tf32(file: Path) -> bool:
    """Whether the config.pbtxt of MODEL/1/model.onnx lets a GPU multiply in TF32; no if it says nothing."""
    config = file.parents[1] / "config.pbtxt"
    found = TF32.search(re.sub("#.*", "", config.read_text())) if config.is_file() else None
    return found is not None and found[1] == "1"


def open_session(file: Path, tf32: bool = False) -> Any:
    """An ONNX Runtime session. `tf32`: a GPU may multiply with 10 bits of mantissa. SystemExit: it cannot be opened."""
    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Only the CPUs that this process may use
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    providers: list[Any] = ["CPUExecutionProvider"]
    if Path("/dev/nvidiactl").exists() and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        cuda = {
            "use_tf32": "1" if tf32 else "0",
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
        }
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    try:
        return onnxruntime.InferenceSession(os.fspath(file), options, providers=providers)
    except Exception:  # ONNX Runtime documents none of its own exceptions
        raise SystemExit(f"{file} cannot be opened as an ONNX file; make verify, or make repository") from None


def read_volume_shape(shape: Sequence[Any], where: object) -> tuple[int, int, int]:
    """frames, height and width of (batch, 1, frames, height, width). SystemExit: `where` takes another shape."""
    sizes = [int(size) for size in list(shape)[2:] if not isinstance(size, str) and int(size) > 0]
    if len(shape) != 5 or len(sizes) != 3:
        raise SystemExit(f"{where} takes {list(shape)}; expected (batch, 1, frames, height, width)")
    return sizes[0], sizes[1], sizes[2]


def import_published(package: Path) -> ModuleType:
    """Import the repository's own package bpreg."""
    sys.path.insert(0, str(package.parents[1].resolve()))
    try:
        return importlib.import_module(package.parent.name)
    finally:
        del sys.path[0]
