"""Run an ONNX file by TensorRT for RTX on this machine's GPU and time it:

    python -m scripts.plans.run_rtx ONNX ENTRY.json REQUEST.bin FOLDER

Runs in .venv-rtx.  REQUEST holds float32 samples, as many as the largest batch.  The engine is built for this GPU with
the profile in ENTRY.  For each batch size of the profile FOLDER gets BATCH.bin, the float32 output; times.json has the
times.  Exit status NOT_RUN, with the reason, if there is no GPU that TensorRT for RTX runs on.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt  # type: ignore[import-not-found]
from cuda.bindings import runtime as cuda  # type: ignore[import-not-found]

from scripts.plans.build_rtx import KNOWN, Log, build_engine

NOT_RUN = 3
FLOAT32 = 4  # bytes
WARM, TIMED = 5, 50  # runs before and while the clock is read


class CudaError(Exception):
    """A call of the CUDA runtime that failed."""


def call(answer: tuple[Any, ...]) -> Any:
    """Return what a call of the CUDA runtime returned beside its status; CudaError if the status is not success."""
    status, *values = answer
    if status != cuda.cudaError_t.cudaSuccess:
        raise CudaError(f"{status.name}: {call(cuda.cudaGetErrorString(status)).decode()}")
    return values[0] if values else None


def find_capability() -> tuple[str, str]:
    """Return name and compute capability of the first GPU; CudaError where there is none."""
    properties = call(cuda.cudaGetDeviceProperties(0))
    return properties.name.decode(), f"{properties.major}.{properties.minor}"


def run_batch(context: Any, request: bytes, shape: tuple[int, ...]) -> tuple[bytes, list[float]]:
    """Return the output, float32, and the times in ms of TIMED runs with the input on the GPU already."""
    context.set_input_shape("input", shape)
    size = math.prod(tuple(context.get_tensor_shape("output"))) * FLOAT32
    stream, answer = call(cuda.cudaStreamCreate()), bytearray(size)
    begin, end = call(cuda.cudaEventCreate()), call(cuda.cudaEventCreate())
    source, target = call(cuda.cudaMalloc(len(request))), call(cuda.cudaMalloc(size))
    try:
        call(cuda.cudaMemcpy(source, request, len(request), cuda.cudaMemcpyKind.cudaMemcpyHostToDevice))
        context.set_tensor_address("input", int(source))
        context.set_tensor_address("output", int(target))
        times = []
        for number in range(WARM + TIMED):
            call(cuda.cudaEventRecord(begin, stream))
            if not context.execute_async_v3(int(stream)):
                raise SystemExit(f"batch {shape[0]}: TensorRT for RTX did not run its engine")
            call(cuda.cudaEventRecord(end, stream))
            call(cuda.cudaEventSynchronize(end))
            if number >= WARM:
                times.append(call(cuda.cudaEventElapsedTime(begin, end)))
        call(cuda.cudaMemcpy(answer, target, size, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost))
    finally:
        for pointer in source, target:
            call(cuda.cudaFree(pointer))
        call(cuda.cudaStreamDestroy(stream))
    return bytes(answer), times


def run_engine(onnx: Path, entry: dict[str, Any], capability: str, request: bytes, folder: Path) -> dict[str, Any]:
    """Write the output of each batch size to `folder`; return the times, by batch size, in ms."""
    log = Log()
    engine = trt.Runtime(log).deserialize_cuda_engine(build_engine(onnx, entry, [capability], log)[0])
    if engine is None:
        raise SystemExit(f"{onnx}: TensorRT for RTX does not load its engine:\n" + "\n".join(log.list_texts("ERROR")))
    context, found = engine.create_execution_context(), {}
    for batch in sorted(set(entry["batch"])):
        shape = (batch, *entry["input"])
        print(f"  TensorRT for RTX, batch {batch}", flush=True)
        answer, times = run_batch(context, request[: math.prod(shape) * FLOAT32], shape)
        (folder / f"{batch}.bin").write_bytes(answer)
        ordered = sorted(times)
        found[str(batch)] = {"median": statistics.median(ordered), "p95": ordered[int(0.95 * len(ordered))]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in "onnx", "entry", "request", "folder":
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    try:
        name, capability = find_capability()
    except CudaError as error:
        print(f"no GPU can be asked: {error}", file=sys.stderr)
        sys.exit(NOT_RUN)
    if capability not in KNOWN:
        print(f"TensorRT for RTX does not run on {name}, compute capability {capability}", file=sys.stderr)
        sys.exit(NOT_RUN)
    entry, request = json.loads(given.entry.read_text()), given.request.read_bytes()
    try:
        times = run_engine(given.onnx, entry, capability, request, given.folder)
    except CudaError as error:  # such as too little memory
        raise SystemExit(f"{given.onnx}: {name}: {error}") from None
    told = {"gpu": name, "capability": capability, "judge": f"TensorRT for RTX {trt.__version__}", "ms": times}
    (given.folder / "times.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
