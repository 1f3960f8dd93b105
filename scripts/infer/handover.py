"""Send arrays to a Triton in the fastest way that the server allows. Every way delivers the same bits.

    sender = choose_handover(client, "localhost:8001", key)
    sender.infer("vit_onnx", {"input": volume}, timeout=600)       # the tensor `output` of version 1

Relative times of one volume (221 MB) to a server on the same 2 cores: tritonclient's own infer 1; gRPC with larger
frames and one copy 0.5, raw HTTP no faster; shared memory 0.1.
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

# The header for the key, which a server with locked shared memory asks for: scripts/serve/server_options.py
KEY_HEADER = "triton-grpc-protocol-chest-key"
SHM = Path("/dev/shm")
SMALL = 1 << 20  # bytes; smaller requests always go in a message
# Bytes of one request: gRPC and protobuf count in int32, and so does Triton 2.47 with HTTP and shared memory
LARGEST = (1 << 31) - (1 << 20)
OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", (1 << 31) - 1),
    ("grpc.max_receive_message_length", (1 << 31) - 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.http2.max_frame_size", (1 << 24) - 1),  # the largest of HTTP/2; the default is 16 KiB
    ("grpc.http2.write_buffer_size", 1 << 26),
    ("grpc.initial_reconnect_backoff_ms", 200),  # the default may take two minutes to see that a server is back
    ("grpc.max_reconnect_backoff_ms", 1000),
]
PREFIX = "chest"
NAMESPACE = re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink()))  # process ids count only in the same namespace
UNANSWERED = "DEADLINE_EXCEEDED", "CANCELLED", "UNAVAILABLE"  # status of a request that the server may still work on
RAW_CONTENTS = 7  # the field raw_input_contents of ModelInferRequest, in KServe's grpc_service.proto
BYTES_FIELD = 2  # protobuf's wire type of a field with its length before it


class TooLargeError(Exception):
    """The request is larger than Triton takes."""


class Messages:
    """Sends arrays in gRPC messages. It copies an array once, tritonclient and protobuf three times."""

    def __init__(self, address: str, name: str = "messages") -> None:
        self.name = name
        self.channel = grpc.insecure_channel(address, options=OPTIONS)
        self.send = self.channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda request: request,
            response_deserializer=messages.ModelInferResponse.FromString,
        )

    def infer(self, model: str, inputs: dict[str, Array], timeout: float) -> Array:
        """The tensor `output`. InferenceServerException: the server's own error. TooLargeError."""
        measure_request(inputs)
        parts: list[Any] = [describe_request(model, inputs).SerializeToString()]
        for array in inputs.values():
            parts += [encode_varint(RAW_CONTENTS << 3 | BYTES_FIELD) + encode_varint(array.nbytes), view_bytes(array)]
        return self.ask(b"".join(parts), timeout)

    def ask(self, request: bytes, timeout: float) -> Array:
        """The tensor `output` for a serialised request; errors as in `infer`."""
        try:
            return read_output(self.send(request, timeout=timeout))
        except grpc.RpcError as error:
            raise InferenceServerException(msg=error.details(), status=str(error.code())) from None

    def close(self) -> None:
        self.channel.close()


@dataclass
class Region:
    """Shared memory that the server has mapped, too. Its name in /dev/shm is removed, so a kill leaves no file."""

    name: str
    memory: mmap.mmap
    asked: bool = False  # the server may still have a request for it, and would crash if it were unmapped


class Shared(Messages):
    """Sends arrays through /dev/shm: it copies each into memory that the server has mapped. One region for each model.

    Triton 2.47 crashes if a region is unmapped while a request for it waits, so such a region stays mapped.
    """

    def __init__(self, address: str, client: Any, key: str) -> None:
        super().__init__(address, "shared_memory")
        self.client, self.headers = client, {KEY_HEADER: key} if key else {}
        self.regions: dict[str, Region] = {}
        self.locks: dict[str, Lock] = {}

    def infer(self, model: str, inputs: dict[str, Array], timeout: float) -> Array:
        if (size := measure_request(inputs)) < SMALL:
            return super().infer(model, inputs, timeout)
        with self.locks.setdefault(model, Lock()):
            for attempt in range(2):
                try:
                    region = self.find_region(model, size)
                except (OSError, InferenceServerException):  # /dev/shm is full, or the server is gone
                    return super().infer(model, inputs, timeout)
                request, start = describe_request(model, inputs), 0
                for tensor, array in zip(request.inputs, inputs.values(), strict=True):
                    region.memory[start : start + array.nbytes] = view_bytes(array)
                    tensor.parameters["shared_memory_region"].string_param = region.name
                    tensor.parameters["shared_memory_byte_size"].int64_param = array.nbytes
                    tensor.parameters["shared_memory_offset"].int64_param = start
                    start += array.nbytes
                region.asked, dead = True, self.find_left_behind(model)
                try:
                    answer = self.ask(request.SerializeToString(), timeout)
                    region.asked = False
                    for name in dead:  # requests for them came before this one and are done
                        self.unmap(name)
                    return answer
                except InferenceServerException as error:
                    region.asked = any(word in str(error.status()) for word in UNANSWERED)
                    # A server that was restarted has mapped nothing
                    if attempt or "shared memory region" not in str(error.message()):
                        raise
                    self.drop_region(model)
        raise AssertionError("not reached")

    def find_region(self, model: str, size: int) -> Region:
        """A region of at least `size` bytes. OSError: /dev/shm is full. InferenceServerException: refused."""
        region = self.regions.get(model)
        if region is None or len(region.memory) < size:
            self.drop_region(model)
            region = self.regions[model] = self.register_region(model, size)
        return region

    def register_region(self, model: str, size: int) -> Region:
        """A new region that the server has mapped; errors as in `find_region`."""
        name = f"{PREFIX}.{NAMESPACE}.{os.getpid()}.{read_start_time(os.getpid())}.{model}.{secrets.token_hex(8)}"
        file = os.open(SHM / name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(file, 0, size)  # a full /dev/shm fails here, not by SIGBUS later
            memory = mmap.mmap(file, size)
            self.client.register_system_shared_memory(name, f"/{name}", size, headers=self.headers, client_timeout=30)
        finally:
            os.close(file)
            (SHM / name).unlink(missing_ok=True)
        return Region(name, memory)

    def find_left_behind(self, model: str) -> list[str]:
        """Regions for a model that killed clients left mapped in the server."""
        with suppress(InferenceServerException):
            there = self.client.get_system_shared_memory_status(headers=self.headers, client_timeout=30).regions
            named = [(name, name.split(".")) for name in there if name.startswith(f"{PREFIX}.{NAMESPACE}.")]
            return [name for name, words in named if words[4] == model and read_start_time(words[2]) != words[3]]
        return []

    def unmap(self, name: str) -> None:
        with suppress(InferenceServerException):
            self.client.unregister_system_shared_memory(name, headers=self.headers, client_timeout=30)

    def drop_region(self, model: str) -> None:
        """Forget a model's region and unmap it, unless the server may still have a request for it."""
        region = self.regions.pop(model, None)
        if region and not region.asked:  # else a later client unmaps it
            self.unmap(region.name)

    def close(self) -> None:
        for model in list(self.regions):
            self.drop_region(model)
        super().close()


def choose_handover(client: Any, address: str, key: str) -> Messages:
    """Shared memory if the server can map our region (same host, same /dev/shm, the key if it asks), else messages.

    The `name` of the result is its key in SENTENCES: shared_memory, messages, or locked if only the key is missing.
    """
    shared = Shared(address, client, key)
    try:
        shared.find_region("", mmap.PAGESIZE)
        shared.drop_region("")
    except (OSError, InferenceServerException) as error:
        shared.close()
        return Messages(address, "locked" if "restricted" in str(error) else "messages")
    return shared


def measure_request(inputs: dict[str, Array]) -> int:
    """Bytes of the arrays. TooLargeError: more than LARGEST."""
    if (size := sum(array.nbytes for array in inputs.values())) > LARGEST:
        raise TooLargeError(f"{size >> 20} MiB; Triton takes at most {LARGEST >> 20} at once")
    return size


def describe_request(model: str, inputs: dict[str, Array]) -> Any:
    """A request with names, types and shapes of the arrays, without their content."""
    request = messages.ModelInferRequest(model_name=model, model_version="1")
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
    return request


def read_output(response: Any) -> Array:
    """The tensor `output`; bytes come as an object array, as in tritonclient."""
    from tritonclient.grpc import InferResult

    return np.asarray(InferResult(response).as_numpy("output"))


def view_bytes(array: Array) -> memoryview:
    whole: Any = np.ascontiguousarray(array)
    return memoryview(whole).cast("B")


def encode_varint(number: int) -> bytes:
    """A varint of protobuf: seven bits per byte, the lowest first."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def read_start_time(process: int | str) -> str:
    """When a process on this machine started, in clock ticks since boot; "" if there is no such process."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
