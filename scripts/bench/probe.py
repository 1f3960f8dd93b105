"""Measure one thing in a process of its own: python -m scripts.bench.probe OUT.json WHAT ARGUMENT...

    nothing                                only the interpreter
    module NAME ARGUMENT...                a program of the project
    session MODEL.onnx ENTRY.json RUNS     ONNX Runtime on the CPU: load, then RUNS runs of one sample
    gpu MODEL.onnx ENTRY.json RUNS         ONNX Runtime on the GPU, one sample: median run, largest memory on the GPU
    pair A.onnx B.onnx ENTRY.json BATCH    two models in turn, thousands of runs
    bpr VERSION_FOLDER DEPTH SIDE          Triton's bpr_model on one series
    matmul SIZE                            the machine's float32 peak: a product of two matrices

Memory is in bytes, of this process alone and from its start.  If PYTHONPATH has an ONNX Runtime, that one is used.
"""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any


def read_memory(name: str) -> int:
    """Return bytes of this process: VmRSS is the memory now, VmHWM its maximum so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def measure_module(name: str, *arguments: str) -> dict[str, Any]:
    sys.argv = [name, *arguments]
    start = time.perf_counter()
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    return {"seconds": time.perf_counter() - start}


def measure_session(path: str, entry: str, runs: str) -> dict[str, Any]:
    import onnxruntime  # type: ignore[import-untyped]

    from scripts.convert.sample import make_sample

    before, start = read_memory("VmRSS"), time.perf_counter()
    model = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    load = time.perf_counter() - start
    measured = {"version": onnxruntime.__version__, "load": load, "before": before}
    measured |= {"loaded": read_memory("VmRSS"), "loaded_peak": read_memory("VmHWM"), "runs": []}
    if int(runs):
        request = make_sample(json.loads(Path(entry).read_text()), 0, 1)
    for run in range(int(runs)):
        start = time.perf_counter()
        output = model.run(["output"], request)[0]
        measured["runs"].append(time.perf_counter() - start)
        if run == 0:
            measured |= {"first_peak": read_memory("VmHWM"), "output": output.ravel().tolist()}
    return measured


def measure_gpu(path: str, entry: str, runs: str) -> dict[str, Any]:
    import numpy as np
    import onnxruntime

    from scripts.convert.sample import make_sample

    def read_used_memory() -> int:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        return int(subprocess.run(query, stdout=subprocess.PIPE, check=True).stdout) << 20

    before = read_used_memory()
    options = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}  # products in float32, without TF32
    model = onnxruntime.InferenceSession(path, providers=[("CUDAExecutionProvider", options)])
    if model.get_providers()[0] != "CUDAExecutionProvider":
        raise SystemExit(f"ONNX Runtime {onnxruntime.__version__} could not load its CUDA provider")
    request, times = make_sample(json.loads(Path(entry).read_text()), 0, 1), []
    for _ in range(int(runs)):
        start = time.perf_counter()
        model.run(["output"], request)
        times.append(time.perf_counter() - start)
    return {"run": float(np.median(times[1:])), "most": read_used_memory() - before}  # the arena returns no memory


def measure_pair(first: str, second: str, entry: str, batch: str) -> dict[str, Any]:
    import numpy as np
    import onnxruntime

    from scripts.convert.sample import make_sample

    request = make_sample(json.loads(Path(entry).read_text()), 0, int(batch))
    models = [onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (first, second)]
    a, b = (model.run(["output"], request)[0] for model in models)
    times: list[list[float]] = [[], []]
    for _ in range(4000):
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            model.run(["output"], request)
            taken.append(time.perf_counter() - start)
    return {"runs": [float(np.median(taken)) for taken in times], "difference": float(np.abs(a - b).max())}


def measure_bpr(version: str, depth: str, side: str) -> dict[str, Any]:
    import numpy as np
    import onnxruntime

    class Tensor:
        def __init__(self, name: str, array: Any) -> None:
            self.name, self.as_numpy = name, lambda: array

    triton: Any = ModuleType("triton_python_backend_utils")  # this module exists inside Triton only
    triton.Tensor = Tensor
    triton.TritonError = str
    triton.InferenceResponse = lambda tensors, error=None: (tensors, error)
    triton.get_input_tensor_by_name = lambda request, name: request[name]
    triton.Logger = type("Logger", (), {"log_info": print, "log_warn": print})
    sys.modules[triton.__name__] = triton
    model = runpy.run_path(f"{version}/model.py")["TritonPythonModel"]()
    model.initialize({"model_name": "bpr_model", "model_instance_kind": "CPU", "model_instance_device_id": "0"})
    peak = multiply_matrices(4096, 3)
    generator = np.random.default_rng(0)
    volume = np.empty((1, int(depth), int(side), int(side)), np.int16)
    for z, plane in enumerate(volume[0]):
        plane[:] = generator.integers(-1000 + z, 400 + z, plane.shape, dtype=np.int16)
    request = {"input": Tensor("input", volume), "metadata": Tensor("metadata", np.array([[0.8, 0.8, 1]], np.float32))}
    start = time.perf_counter()
    ((tensors, error),) = model.execute([request])
    seconds = time.perf_counter() - start
    if error:
        raise SystemExit(error)
    most = read_memory("VmHWM")
    return {
        "version": onnxruntime.__version__,
        "seconds": seconds,
        "most": most,
        "flops": max(peak, multiply_matrices(4096, 3)),
        "tag": tensors[0].as_numpy()[0].decode(),
    }


def measure_matmul(size: str) -> dict[str, Any]:
    import torch

    a = torch.rand(int(size), int(size))
    best = multiply_matrices(int(size), 4)
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * int(size) ** 3 / (time.perf_counter() - start))
    return {"flops": best}


def multiply_matrices(size: int, times: int) -> float:
    """Return floating-point operations per second, the best of `times` products of two float32 matrices."""
    import numpy as np

    a, best = np.random.default_rng(0).random((size, size), np.float32), 0.0
    for _ in range(times):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def main() -> None:
    out, what, *arguments = sys.argv[1:]
    measures = {
        "nothing": dict,
        "module": measure_module,
        "session": measure_session,
        "gpu": measure_gpu,
        "pair": measure_pair,
        "bpr": measure_bpr,
        "matmul": measure_matmul,
    }
    measured = measures[what](*arguments)  # type: ignore[operator]
    measured |= {"cpu": time.process_time(), "peak": read_memory("VmHWM")}
    Path(out).write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
