"""The four networks of a model repository: opened here, once for all studies, or asked of a running Triton.

with Local(Path("model_repository_running")) as models:
with Triton("localhost:8001", Path("model_repository_running")) as models:
    models.body_part(volume); models.read(tensor)
"""

import importlib
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray

from scripts.infer.findings import FINDINGS, Result, make_result, normalise_embedding
from scripts.infer.messages import REPLACED, StudyError
from scripts.infer.volume import Volume

ONNX = {
    "vit": "vit_onnx/1/model.onnx",
    "binary": "binary_onnx/1/model.onnx",
    "multilabel": "multilabel_onnx/1/model.onnx",
    "bpr": "bpr_model/1/weights/model.onnx",
}
BPREG = "bpr_model/1/bpreg/__init__.py"
SETTINGS = "bpr_model/1/weights/inference-settings.json"
SERVED = {"vit": "vit_onnx", "binary": "binary_onnx", "multilabel": "multilabel_onnx", "bpr": "bpr_model"}
BATCH, BATCH_GPU = 8, 32  # slices that the body-part network scores at a time
PATIENCE = 600  # s for one answer of Triton
RETURN = 120  # s for a Triton that went away
GONE = "UNAVAILABLE", "NOT_FOUND"  # the server; one of its models
# Among the options that config.pbtxt has for ONNX Runtime on a GPU
TF32 = re.compile(r'key\s*:\s*"use_tf32"\s*,?\s*value\s*:\s*"(\w+)"')
# What bpr_model says where it can see no part of a body: Local's `ValueError` and `not len(slices)`
REFUSED = re.compile(r"bpr_model: (no slice is left|volume is |spacing \[|\d+ voxels of )")
Array = NDArray[Any]


class Models:
    """What both kinds of `ask` are used for."""

    shape: tuple[int, int, int]  # of the ViT's input, one volume
    weights: str  # synthetic, real or unknown
    handover = ""  # how volumes get to a Triton

    def ask(self, model: str, **inputs: Array) -> Array:
        raise NotImplementedError

    def body_part(self, volume: Volume) -> str:
        raise NotImplementedError

    def read(self, tensor: NDArray[np.float32]) -> Result:
        """float32 `shape` -> probabilities. StudyError: they are no numbers."""
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
    """ONNX Runtime on the files of a repository; on the GPU where there is one, else on the CPUs."""

    def __init__(self, repository: Path) -> None:
        """SystemExit: a file is missing, cannot be opened or is no such network."""
        check_complete(repository)
        self.sessions = {
            name: open_session(repository / file, may_use_tf32(repository / file)) for name, file in ONNX.items()
        }
        self.shape = volume_shape(self.sessions["vit"].get_inputs()[0].shape, repository / ONNX["vit"])
        if (classes := self.sessions["multilabel"].get_outputs()[0].shape[-1]) != len(FINDINGS):
            raise SystemExit(f"{repository / ONNX['multilabel']}: {classes} findings, expected {len(FINDINGS)}")
        self.weights = kind_of_weights(self.sessions.values())
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
        except Exception as error:  # ONNX Runtime's own classes, of which none is documented
            raise StudyError("network", what=f"{model}: {type(error).__name__}") from None
        return answer

    def body_part(self, volume: Volume) -> str:
        """The tag, as bpr_model answers it; NONE where that has no answer."""
        hu, spacing = volume.for_body_part()
        try:
            slices = self.bpreg.preprocess(hu, spacing, self.side)
        except ValueError:
            return "NONE"
        if not len(slices):
            return "NONE"
        starts = range(0, len(slices), self.batch)
        scores = np.concatenate([self.ask("bpr", input=slices[start : start + self.batch]) for start in starts])
        return str(self.bpreg.tag(scores, float(spacing[2]), self.settings))


class Triton(Models):
    """A server in explicit mode: models that are not loaded are so at the beginning and unloaded at the end.

    What kind of weights it serves, it does not tell; where `repository` is at hand and its heads answer as the
    server's do, they are those. One that goes away is waited for, and a study under way then is read anew.
    """

    way: Any = None

    def __init__(self, address: str, repository: Path, key: str = "") -> None:
        """`key`: where shared memory is locked. SystemExit: no server there, or one that cannot load a model."""
        from tritonclient import grpc  # type: ignore[import-untyped]
        from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped]

        from scripts.infer.handover import KEY_HEADER, OPTIONS, choose_handover

        key = key or find_local_key(address)
        self.error, self.address, self.loaded = InferenceServerException, address, list[str]()
        self.headers = {KEY_HEADER: key} if key else {}
        self.lock, self.returns, self.heads = Lock(), 0, dict[str, Array]()
        self.client = grpc.InferenceServerClient(address, channel_args=OPTIONS)
        try:
            for name in SERVED.values():
                self.load(name)
            shapes = {name: self.input_shape(served) for name, served in SERVED.items()}
        except self.error as error:
            self.close()
            raise SystemExit(
                f"TRITON={address}: {error.message()}; expected a server with these models: make serve"
            ) from None
        self.way = choose_handover(self.client, address, key)
        self.handover = self.way.name
        try:
            self.shape = volume_shape(shapes["vit"], f"vit_onnx at {address}")
            self.sizes = {name: shapes[name][-1] for name in ("binary", "multilabel")}
            self.heads = self.ask_heads()
            self.weights = self.kind(repository)
        except (SystemExit, UnreachableError) as error:
            self.close()
            raise SystemExit(str(error)) from None

    def input_shape(self, name: str) -> list[int]:
        metadata = self.client.get_model_metadata(name, "1", client_timeout=PATIENCE)
        return [int(size) for size in metadata.inputs[0].shape]

    def load(self, name: str) -> None:
        if not self.client.is_model_ready(name, "1", client_timeout=PATIENCE):  # else someone else's, and stays loaded
            self.client.load_model(name, headers=self.headers, client_timeout=PATIENCE)
            if name not in self.loaded:
                self.loaded.append(name)

    def ask(self, model: str, **inputs: Array) -> Array:
        from scripts.infer.handover import TooLargeError

        returns = self.returns
        for last in (False, True):
            try:
                answer: Array = self.way.infer(SERVED[model], inputs, PATIENCE)
                return answer
            except TooLargeError as error:
                raise StudyError("network", what=f"{SERVED[model]}: {error}") from None
            except self.error as error:
                if not any(word in str(error.status()) for word in GONE):
                    raise StudyError("network", what=f"{SERVED[model]}: {error.status()}") from error
                if last:
                    raise UnreachableError(f"TRITON={self.address}: the server no longer answers") from None
                self.wait(returns)
        raise AssertionError("not reached")

    def wait(self, returns: int) -> None:
        """Returns once the server, started anew or without a model that another client unloaded, can be asked again.

        UnreachableError: it does not come back.
        """
        with self.lock:  # of two threads one waits for both
            if self.returns > returns:
                return
            end = time.monotonic() + RETURN
            while True:
                try:
                    for name in SERVED.values():
                        self.load(name)
                    break
                except self.error as error:
                    if time.monotonic() > end:
                        raise UnreachableError(
                            f"TRITON={self.address}: the server no longer answers ({error.message()})"
                        ) from None
                time.sleep(0.2)
            self.returns += 1

    def read(self, tensor: NDArray[np.float32]) -> Result:
        """As Models does it, of one server and one set of models. UnreachableError: its heads were replaced."""
        while True:
            returns = self.returns
            answer = super().read(tensor)
            for name, said in self.ask_heads().items():
                before = self.heads.get(name, said)
                if before.shape != said.shape or not np.allclose(before, said, atol=1e-3):
                    raise UnreachableError(REPLACED)
            if self.returns == returns:  # else it went away in between
                return answer

    def ask_heads(self) -> dict[str, Array]:
        """What both heads say of one made embedding; nothing of one that cannot be asked so."""
        found = {}
        for name, size in self.sizes.items():
            with suppress(StudyError):
                found[name] = self.ask(name, input=make_probe(size))
        return found

    def body_part(self, volume: Volume) -> str:
        hu, spacing = volume.for_body_part()
        try:
            return str(self.ask("bpr", input=hu[None], metadata=spacing[None])[0].decode())
        except StudyError as error:
            if REFUSED.search(str(error.__cause__)):
                return "NONE"
            raise

    def kind(self, repository: Path) -> str:
        try:
            heads = {name: open_session(repository / ONNX[name]) for name in ("binary", "multilabel")}
        except SystemExit:
            return "unknown"
        for name, head in heads.items():
            there = self.heads.get(name)
            size = head.get_inputs()[0].shape[-1]
            here = head.run(["output"], {"input": make_probe(size)})[0]
            if there is None or here.shape != there.shape or not np.allclose(here, there, atol=1e-3):
                return "unknown"
        return kind_of_weights(heads.values())

    def close(self) -> None:
        if self.way:
            self.way.close()
        for name in self.loaded:
            with suppress(self.error):
                self.client.unload_model(name, headers=self.headers, client_timeout=PATIENCE)
        self.client.close()


def find_local_key(address: str) -> str:
    """The key that `make serve` of this user left for this machine's programs; "" where there is none."""
    host, _, port = address.rpartition(":")
    path = Path(f"/dev/shm/chest-key-{port}")
    with suppress(OSError, UnicodeDecodeError):
        if host in ("localhost", "127.0.0.1", "[::1]") and path.stat().st_uid == os.geteuid():
            return path.read_text()
    return ""


def make_probe(size: int) -> NDArray[np.float32]:
    """float32 (1, size), normalised: an embedding that no study has."""
    return normalise_embedding(np.cos(np.arange(size, dtype=np.float32))[None])


class UnreachableError(Exception):
    """Triton is gone: no fault of a study."""


def kind_of_weights(sessions: Iterable[Any]) -> str:
    """synthetic if any network is, real if all say so, else unknown."""
    kinds = {opened.get_modelmeta().custom_metadata_map.get("weights") for opened in sessions}
    return "synthetic" if "synthetic" in kinds else "real" if kinds == {"real"} else "unknown"


def check_complete(repository: Path) -> None:
    """SystemExit where the repository lacks a file that results come from."""
    missing = [file for file in (*ONNX.values(), BPREG, SETTINGS) if not (repository / file).is_file()]
    if missing:
        raise SystemExit(
            f"{repository} lacks {', '.join(missing)}; expected a whole repository with ONNX files; make repository"
        )


def may_use_tf32(file: Path) -> bool:
    """Whether the config.pbtxt of MODEL/1/model.onnx lets a GPU multiply in TF32; float32 where it says nothing."""
    config = file.parents[1] / "config.pbtxt"
    found = TF32.search(re.sub("#.*", "", config.read_text())) if config.is_file() else None
    return found is not None and found[1] == "1"


def open_session(file: Path, tf32: bool = False) -> Any:
    """`tf32`: a GPU may multiply with 10 bits of mantissa. SystemExit: ONNX Runtime cannot open the file."""
    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # The CPUs that this process may use, not all there are
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
    except Exception:  # ONNX Runtime's own classes, of which none is documented
        raise SystemExit(f"{file} cannot be opened as an ONNX file; make verify, or make repository") from None


def volume_shape(shape: Sequence[Any], where: object) -> tuple[int, int, int]:
    """The three sizes at the end of (batch, 1, frames, height, width)."""
    sizes = [int(size) for size in list(shape)[2:] if not isinstance(size, str) and int(size) > 0]
    if len(shape) != 5 or len(sizes) != 3:
        raise SystemExit(f"{where} takes {list(shape)}; expected (batch, 1, frames, height, width)")
    return sizes[0], sizes[1], sizes[2]


def import_published(package: Path) -> ModuleType:
    """The repository's own bpreg, imported from there."""
    sys.path.insert(0, str(package.parents[1].resolve()))
    try:
        return importlib.import_module(package.parent.name)
    finally:
        del sys.path[0]
