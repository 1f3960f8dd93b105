"""Open ONNX files on a GPU or the CPU, describe the device, and time runs on it: used by scripts/bench/gpu.py."""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray

from scripts.convert.compare import add_outputs

Array = NDArray[Any]
WARM, TIMES = 3, 10  # runs that are not timed, and runs that are
MATRIX = 8192  # side of the square matrices whose product measures the GPU's peak


class Device(NamedTuple):
    name: str  # cuda or cpu

    @property
    def is_gpu(self) -> bool:
        return self.name == "cuda"

    def open_session(self, file: Path, tf32: bool = False, inner: tuple[str, ...] = ()) -> Any:
        """Open an ONNX file; it also answers the values named in `inner`. SystemExit if a GPU does not compute it."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        cuda = {"use_tf32": str(int(tf32)), "cudnn_conv_algo_search": "HEURISTIC"}
        providers = [("CUDAExecutionProvider", cuda)] if self.is_gpu else ["CPUExecutionProvider"]
        with expose_values(file, inner) as path:
            session = onnxruntime.InferenceSession(path, options, providers)
        if self.is_gpu and session.get_providers()[0] != "CUDAExecutionProvider":
            raise SystemExit(
                f"ONNX Runtime {onnxruntime.__version__} has no CUDA here; install onnxruntime-gpu and CUDA's "
                "libraries, or try the rest of this with --device cpu"
            )
        return session

    def read_used_memory(self) -> int:
        """Return the MiB in use on the GPU; 0 on a CPU."""
        if not self.is_gpu:
            return 0
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        return int(subprocess.run(query, stdout=subprocess.PIPE, check=True).stdout)

    def choose_runs(self, warm: int, times: int) -> tuple[int, int]:
        """Return how many runs are not timed and how many are; on a CPU, whose times mean nothing, 0 and 1."""
        return (warm, times) if self.is_gpu else (0, 1)


CPU = Device("cpu")


@contextmanager
def expose_values(file: Path, inner: tuple[str, ...]) -> Iterator[str]:
    """Yield a path to `file`, or to a copy in memory whose outputs include the values named in `inner`."""
    if not inner:
        yield os.fspath(file)
        return
    with os.fdopen(os.memfd_create("model"), "wb") as copy:
        with file.open("rb") as source:
            shutil.copyfileobj(source, copy, 1 << 24)
        copy.write(add_outputs(inner))
        copy.flush()
        yield f"/proc/self/fd/{copy.fileno()}"


def describe_device(device: Device) -> tuple[str, dict[str, float]]:
    """Return the device's name and, of a GPU, its driver and its peaks; the peaks need PyTorch with CUDA.

    A peak is the TFLOP/s of one large matrix product in fp32, tf32 or fp16. SystemExit if nvidia-smi does not answer.
    """
    try:
        import torch  # before anything else: it loads CUDA's libraries, which ONNX Runtime then finds
    except ImportError:
        torch = None  # type: ignore[assignment]
    if not device.is_gpu:
        return f"CPU, {os.cpu_count()} cores", {}
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        name = subprocess.run(query, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit("no GPU here (nvidia-smi does not answer); --device cpu tries all but the times") from None
    return name, measure_peaks(torch) if torch is not None and torch.cuda.is_available() else {}


def measure_peaks(torch: Any) -> dict[str, float]:
    """Return the GPU's TFLOP/s in a product of two MATRIX x MATRIX matrices, for each precision."""
    peaks: dict[str, float] = {}
    for name, kind, tf32 in (
        ("fp32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("fp16", torch.half, True),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        matrix = torch.rand(MATRIX, MATRIX, device="cuda", dtype=kind)

        def multiply(matrix: Any = matrix) -> None:
            matrix @ matrix
            torch.cuda.synchronize()

        peaks[name] = round(2 * MATRIX**3 / measure_median_ms(multiply, WARM, TIMES) / 1e9, 1)
    torch.cuda.empty_cache()
    return peaks


def bind_run(device: Device, session: Any, request: Array) -> Callable[[], None]:
    """Return a function that runs the model once; its input lies on the device and its output stays there."""
    binding = session.io_binding()
    place = onnxruntime.OrtValue.ortvalue_from_numpy(request, device.name, 0)
    binding.bind_ortvalue_input("input", place)
    binding.bind_output("output", device.name)

    def run_once() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run_once


def measure_median_ms(work: Callable[[], object], warm: int, times: int) -> float:
    for _ in range(warm):
        work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(taken), 3)
