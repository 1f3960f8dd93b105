"""How an array gets to a Triton, the cheapest way that the server allows; the same bits whichever it is.

    way = cheapest(client, "localhost:8001", key)
    way.infer("vit_onnx", {"input": volume}, timeout=600)       # the tensor `output` of version 1

Measured, one volume (221 MB) to a server on the same 2 cores: tritonclient's own infer 1; over gRPC in larger frames
and one copy 0.5, raw HTTP no faster; through shared memory 0.1.
"""

import mmap
import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as messages  # type: ignore[import-untyped]
from tritonclient.utils import InferenceServerException, np_to_triton_dtype  # type: ignore[import-untyped]

Array = NDArray[Any]

# A server whose shared memory is locked asks for a key in this header: scripts/serve/triton_server.py
KEY_HEADER = "triton-grpc-protocol-chest-key"
SHM = Path("/dev/shm")
SMALL = 1 << 20  # bytes; less goes in a message, whatever way there is
# Bytes at once; gRPC and protobuf count in int32, and so does Triton 2.47 over HTTP and of shared memory
LARGEST = (1 << 31) - (1 << 20)
OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", (1 << 31) - 1),
    ("grpc.max_receive_message_length", (1 << 31) - 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.http2.max_frame_size", (1 << 24) - 1),  # the most that HTTP/2 has; 16 KiB unless told
    ("grpc.http2.write_buffer_size", 1 << 26),
    ("grpc.initial_reconnect_backoff_ms", 200),  # else up to two minutes pass before a server that is back is seen
    ("grpc.max_reconnect_backoff_ms", 1000),
]
PREFIX = "chest"
NAMESPACE = re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink()))  # in another one process ids mean others
UNANSWERED = "DEADLINE_EXCEEDED", "CANCELLED", "UNAVAILABLE"  # of a request that may be in work all the same
RAW_CONTENTS = 7  # the field raw_input_contents of ModelInferRequest, in KServe's grpc_service.proto
BYTES_FIELD = 2  # protobuf's wire type of what has a length before it


class TooLargeError(Exception):
    """More than Triton takes at once."""


class Messages:
    """Over gRPC: a request's bytes are joined once, where tritonclient and protobuf copy an array three times."""

    def __init__(self, address: str, name: str = "messages") -> None:
        self.name = name
        self.channel = grpc.insecure_channel(address, options=OPTIONS)
        self.send = self.channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda request: request,
            response_deserializer=messages.ModelInferResponse.FromString,
        )

    def infer(self, model: str, inputs: dict[str, Array], timeout: float) -> Array:
        """The tensor `output`. InferenceServerException: the server's own words; TooLargeError."""
        size_in_bytes(inputs)
        parts: list[Any] = [describe_request(model, inputs).SerializeToString()]
        for array in inputs.values():
            parts += [encode_varint(RAW_CONTENTS << 3 | BYTES_FIELD) + encode_varint(array.nbytes), as_bytes(array)]
        return self.ask(b"".join(parts), timeout)

    def ask(self, request: bytes, timeout: float) -> Array:
        try:
            return read_output(self.send(request, timeout=timeout))
        except grpc.RpcError as error:
            raise InferenceServerException(msg=error.details(), status=str(error.code())) from None

    def close(self) -> None:
        self.channel.close()


@dataclass
class Region:
    """Shared memory that the server has mapped, too; without a name in /dev/shm, so that none outlives both."""

    name: str
    memory: mmap.mmap
    asked: bool = False  # a request of it may lie in the server still, which would break if it were unmapped


class Shared(Messages):
    """Through /dev/shm: an array is copied once, into memory that the server has mapped. A region for each model.

    Triton 2.47 dies of a region that is unmapped while a request of it waits: so none is that may have one.
    """

    def __init__(self, address: str, client: Any, key: str) -> None:
        super().__init__(address, "shared_memory")
        self.client, self.headers = client, {KEY_HEADER: key} if key else {}
        self.regions: dict[str, Region] = {}
        self.locks: dict[str, Lock] = {}

    def infer(self, model: str, inputs: dict[str, Array], timeout: float) -> Array:
        if (size := size_in_bytes(inputs)) < SMALL:
            return super().infer(model, inputs, timeout)
        with self.locks.setdefault(model, Lock()):
            for attempt in range(2):
                try:
                    region = self.region(model, size)
                except (OSError, InferenceServerException):  # no room there, or no server
                    return super().infer(model, inputs, timeout)
                request, start = describe_request(model, inputs), 0
                for tensor, array in zip(request.inputs, inputs.values(), strict=True):
                    region.memory[start : start + array.nbytes] = as_bytes(array)
                    tensor.parameters["shared_memory_region"].string_param = region.name
                    tensor.parameters["shared_memory_byte_size"].int64_param = array.nbytes
                    tensor.parameters["shared_memory_offset"].int64_param = start
                    start += array.nbytes
                region.asked, dead = True, self.left_behind(model)
                try:
                    answer = self.ask(request.SerializeToString(), timeout)
                    region.asked = False
                    for name in dead:  # their requests, if any lay there still, were before this one
                        self.unmap(name)
                    return answer
                except InferenceServerException as error:
                    region.asked = any(word in str(error.status()) for word in UNANSWERED)
                    # Started anew since, it has mapped nothing
                    if attempt or "shared memory region" not in str(error.message()):
                        raise
                    self.forget(model)
        raise AssertionError("not reached")

    def region(self, model: str, size: int) -> Region:
        """One that holds `size` bytes. OSError: /dev/shm is full; InferenceServerException: the server refuses it."""
        region = self.regions.get(model)
        if region is None or len(region.memory) < size:
            self.forget(model)
            region = self.regions[model] = self.registered(model, size)
        return region

    def registered(self, model: str, size: int) -> Region:
        name = f"{PREFIX}.{NAMESPACE}.{os.getpid()}.{read_start_time(os.getpid())}.{model}.{secrets.token_hex(8)}"
        file = os.open(SHM / name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(file, 0, size)  # a full /dev/shm is an error here and not a SIGBUS later
            memory = mmap.mmap(file, size)
            self.client.register_system_shared_memory(name, f"/{name}", size, headers=self.headers, client_timeout=30)
        finally:
            os.close(file)
            (SHM / name).unlink(missing_ok=True)
        return Region(name, memory)

    def left_behind(self, model: str) -> list[str]:
        """The regions of a model's requests that clients left mapped in the server when they were killed."""
        with suppress(InferenceServerException):
            there = self.client.get_system_shared_memory_status(headers=self.headers, client_timeout=30).regions
            named = [(name, name.split(".")) for name in there if name.startswith(f"{PREFIX}.{NAMESPACE}.")]
            return [name for name, words in named if words[4] == model and read_start_time(words[2]) != words[3]]
        return []

    def unmap(self, name: str) -> None:
        with suppress(InferenceServerException):
            self.client.unregister_system_shared_memory(name, headers=self.headers, client_timeout=30)

    def forget(self, model: str) -> None:
        region = self.regions.pop(model, None)
        if region and not region.asked:  # else a later run does it
            self.unmap(region.name)

    def close(self) -> None:
        for model in list(self.regions):
            self.forget(model)
        super().close()


def choose_handover(client: Any, address: str, key: str) -> Messages:
    """Shared memory where the server can map a region of ours: one host, one /dev/shm, and the key where it asks.

    Its name is the key of what is said of it: shared_memory, messages, or locked if the key is what lacks.
    """
    shared = Shared(address, client, key)
    try:
        shared.region("", mmap.PAGESIZE)
        shared.forget("")
    except (OSError, InferenceServerException) as error:
        shared.close()
        return Messages(address, "locked" if "restricted" in str(error) else "messages")
    return shared


def size_in_bytes(inputs: dict[str, Array]) -> int:
    """Bytes; TooLargeError."""
    if (size := sum(array.nbytes for array in inputs.values())) > LARGEST:
        raise TooLargeError(f"{size >> 20} MiB, Triton takes {LARGEST >> 20} at once")
    return size


def describe_request(model: str, inputs: dict[str, Array]) -> Any:
    """The request without the arrays' content."""
    request = messages.ModelInferRequest(model_name=model, model_version="1")
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
    return request


def read_output(response: Any) -> Array:
    """The tensor `output`; of bytes, an object array, as tritonclient gives it."""
    from tritonclient.grpc import InferResult

    return np.asarray(InferResult(response).as_numpy("output"))


def as_bytes(array: Array) -> memoryview:
    whole: Any = np.ascontiguousarray(array)
    return memoryview(whole).cast("B")


def encode_varint(number: int) -> bytes:
    """Protobuf's: seven bits a byte, the lowest first."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def read_start_time(process: int | str) -> str:
    """When a process of this machine was started, in clock ticks since boot; "" if there is none."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
