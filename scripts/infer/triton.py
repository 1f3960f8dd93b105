"""The four networks of a model repository, asked of a running Triton.

with Triton("localhost:8001", Path("model_repository_running")) as models:
    models.find_body_part(volume); models.infer(tensor)
"""

import os
import re
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.infer.findings import Result, normalise_embedding
from scripts.infer.messages import REPLACED, StudyError
from scripts.infer.models import ONNX, Array, Models, find_weights_kind, open_session, read_volume_shape
from scripts.infer.volume import Volume

SERVED = {"vit": "vit_onnx", "binary": "binary_onnx", "multilabel": "multilabel_onnx", "bpr": "bpr_model"}
PATIENCE = 600  # s for one answer of Triton
RETURN = 120  # s for a Triton that went away
GONE = "UNAVAILABLE", "NOT_FOUND"  # status where the server, or one of its models, is gone
# bpr_model's errors for a volume in which it sees no part of a body: where Local gets ValueError or no slices
REFUSED = re.compile(r"bpr_model: (no slice is left|volume is |spacing \[|\d+ voxels of )")


class UnreachableError(Exception):
    """Triton is gone or serves other models now: the run ends, and no study is to blame."""


class Triton(Models):
    """A server in explicit mode. Models that it has not loaded are loaded at the start and unloaded at the end.

    Triton does not tell which weights it serves. If the heads in `repository` answer as the server's do, the weights
    are those of `repository`, else unknown. If the server goes away, requests wait for it and are sent again.
    """

    sender: Any = None

    def __init__(self, address: str, repository: Path, key: str = "") -> None:
        """`key` unlocks shared memory. SystemExit: no server answers, or it cannot load a model."""
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
                self.load_model(name)
            shapes = {name: self.read_input_shape(served) for name, served in SERVED.items()}
        except self.error as error:
            self.close()
            raise SystemExit(
                f"TRITON={address}: {error.message()}; expected a server with these models: make serve"
            ) from None
        self.sender = choose_handover(self.client, address, key)
        self.handover = self.sender.name
        try:
            self.shape = read_volume_shape(shapes["vit"], f"vit_onnx at {address}")
            self.sizes = {name: shapes[name][-1] for name in ("binary", "multilabel")}
            self.heads = self.ask_heads()
            self.weights = self.find_weights(repository)
        except (SystemExit, UnreachableError) as error:
            self.close()
            raise SystemExit(str(error)) from None

    def read_input_shape(self, name: str) -> list[int]:
        metadata = self.client.get_model_metadata(name, "1", client_timeout=PATIENCE)
        return [int(size) for size in metadata.inputs[0].shape]

    def load_model(self, name: str) -> None:
        if not self.client.is_model_ready(name, "1", client_timeout=PATIENCE):  # else another client's: it stays loaded
            self.client.load_model(name, headers=self.headers, client_timeout=PATIENCE)
            if name not in self.loaded:
                self.loaded.append(name)

    def ask(self, model: str, **inputs: Array) -> Array:
        from scripts.infer.handover import TooLargeError

        returns = self.returns
        for last in (False, True):
            try:
                answer: Array = self.sender.infer(SERVED[model], inputs, PATIENCE)
                return answer
            except TooLargeError as error:
                raise StudyError("network", what=f"{SERVED[model]}: {error}") from None
            except self.error as error:
                if not any(word in str(error.status()) for word in GONE):
                    raise StudyError("network", what=f"{SERVED[model]}: {error.status()}") from error
                if last:
                    raise UnreachableError(f"TRITON={self.address}: the server no longer answers") from None
                self.wait_for_server(returns)
        raise AssertionError("not reached")

    def wait_for_server(self, returns: int) -> None:
        """Wait for a server that was restarted, or load a model again that another client unloaded.

        `returns`: self.returns when the request failed. UnreachableError: the server does not come back.
        """
        with self.lock:  # one of two threads waits for both
            if self.returns > returns:
                return
            end = time.monotonic() + RETURN
            while True:
                try:
                    for name in SERVED.values():
                        self.load_model(name)
                    break
                except self.error as error:
                    if time.monotonic() > end:
                        raise UnreachableError(
                            f"TRITON={self.address}: the server no longer answers ({error.message()})"
                        ) from None
                time.sleep(0.2)
            self.returns += 1

    def infer(self, tensor: NDArray[np.float32]) -> Result:
        """Like Models.infer, with all answers from the same models. UnreachableError: the heads were replaced."""
        while True:
            returns = self.returns
            answer = super().infer(tensor)
            for name, said in self.ask_heads().items():
                before = self.heads.get(name, said)
                if before.shape != said.shape or not np.allclose(before, said, atol=1e-3):
                    raise UnreachableError(REPLACED)
            if self.returns == returns:  # else the server came back meanwhile, perhaps with other models
                return answer

    def ask_heads(self) -> dict[str, Array]:
        """The answers of both heads to one made-up embedding, without a head that fails."""
        found = {}
        for name, size in self.sizes.items():
            with suppress(StudyError):
                found[name] = self.ask(name, input=make_probe(size))
        return found

    def find_body_part(self, volume: Volume) -> str:
        hu, spacing = volume.convert_for_body_part()
        try:
            return str(self.ask("bpr", input=hu[None], metadata=spacing[None])[0].decode())
        except StudyError as error:
            if REFUSED.search(str(error.__cause__)):
                return "NONE"
            raise

    def find_weights(self, repository: Path) -> str:
        """The kind of `repository`'s weights if its heads answer as the server's do, else unknown."""
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
        return find_weights_kind(heads.values())

    def close(self) -> None:
        if self.sender:
            self.sender.close()
        for name in self.loaded:
            with suppress(self.error):
                self.client.unload_model(name, headers=self.headers, client_timeout=PATIENCE)
        self.client.close()


def find_local_key(address: str) -> str:
    """The key that `make serve` of this user left for programs on this machine; "" if there is none."""
    host, _, port = address.rpartition(":")
    path = Path(f"/dev/shm/chest-key-{port}")
    with suppress(OSError, UnicodeDecodeError):
        if host in ("localhost", "127.0.0.1", "[::1]") and path.stat().st_uid == os.geteuid():
            return path.read_text()
    return ""


def make_probe(size: int) -> NDArray[np.float32]:
    """float32 (1, size), length 1: an embedding that no study has."""
    return normalise_embedding(np.cos(np.arange(size, dtype=np.float32))[None])
