"""What a GPU makes of the networks, with nothing but this checkout, Python and ONNX Runtime with CUDA; no Docker.

    python -m scripts.bench.gpu [--device cpu] [--models models.yaml] [--onnx FOLDER] OUT.json

Weights are made from the seed on the spot, at the size that models.yaml says; ONNX files that FOLDER has (vit.onnx,
vit.tf32.onnx, vit.fp16.onnx, heads and bpr of the same weights) are not made again. Measured are, of each precision of
the ViT at batch 1 and 4: ms with the input on the device and in host memory, the share of the card's own peak, GPU
memory, and on two volumes codes, embedding, probabilities and decisions against float32 on the CPU; then heads, BPR and
the classes of `make infer`. --device cpu tries all of that where there is no GPU, and its times mean nothing.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray

from scripts.bench.models import count_multiply_adds
from scripts.convert.compare import add_outputs
from scripts.convert.model_entry import read_entry, read_models
from scripts.convert.probabilities import compute_probabilities, find_changed, normalise_rows
from scripts.convert.sample import make_sample

Array = NDArray[Any]
ROOT = Path(__file__).resolve().parents[2]
SCRATCH = Path("build/bench/gpu")
SEED, VOLUMES = 7, 2
WARM, TIMES = 3, 10
SLICES = 400  # of a series, for BPR
MATRIX = 8192  # of the product that tells the card's peak
# How each row is asked: the file, and whether a GPU may multiply in TF32; of fp16 that is what is still float32
PRECISIONS = {"fp32": ("vit", False), "tf32": ("vit.tf32", True), "fp16": ("vit.fp16", True)}


class Device(NamedTuple):
    name: str  # cuda or cpu

    @property
    def gpu(self) -> bool:
        return self.name == "cuda"

    def session(self, file: Path, tf32: bool = False, inner: tuple[str, ...] = ()) -> Any:
        """SystemExit where ONNX Runtime does not compute on the device."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        cuda = {"use_tf32": str(int(tf32)), "cudnn_conv_algo_search": "HEURISTIC"}
        providers = [("CUDAExecutionProvider", cuda)] if self.gpu else ["CPUExecutionProvider"]
        with expose_values(file, inner) as path:
            opened = onnxruntime.InferenceSession(path, options, providers)
        if self.gpu and opened.get_providers()[0] != "CUDAExecutionProvider":
            raise SystemExit(
                f"ONNX Runtime {onnxruntime.__version__} has no CUDA here; install onnxruntime-gpu and CUDA's "
                "libraries, or try the rest of this with --device cpu"
            )
        return opened

    def memory(self) -> int:
        """MiB in use on the card; 0 on a CPU."""
        if not self.gpu:
            return 0
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        return int(subprocess.run(query, stdout=subprocess.PIPE, check=True).stdout)


CPU = Device("cpu")


@contextmanager
def expose_values(file: Path, inner: tuple[str, ...]) -> Iterator[str]:
    """A path to `file` with the values named in `inner` among its outputs."""
    if not inner:
        yield os.fspath(file)
        return
    with os.fdopen(os.memfd_create("model"), "wb") as copy:
        with file.open("rb") as source:
            shutil.copyfileobj(source, copy, 1 << 24)
        copy.write(add_outputs(inner))
        copy.flush()
        yield f"/proc/self/fd/{copy.fileno()}"


def bench_gpu(device: Device, models: Path, onnx: Path | None, scratch: Path) -> dict[str, Any]:
    """What OUT holds."""
    started = time.monotonic()
    entries = {
        name: read_entry(models, name) for name, entry in read_models(models).items() if not entry.get("optional")
    }
    device_name, peaks = describe_device(device)
    files = make_files(models, entries, onnx, scratch)
    show_progress("the reference: float32 on the CPU")
    request = make_sample(entries["vit"], SEED, VOLUMES)["input"]
    heads = {name: CPU.session(files[name]) for name, entry in entries.items() if entry["family"] == "head"}
    reference = answer_each(CPU.session(files["vit"], inner=("codes",)), request, ("output", "codes"))
    rows = [
        bench_vit(device, precision, files, entries["vit"], request, reference, heads, peaks)
        for precision in PRECISIONS
    ]
    found = {
        "card": device_name,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "peak_tflops": peaks,
        "volumes": VOLUMES,
        "vit": rows,
        "heads": [bench_head(device, name, files[name], entries[name], heads[name]) for name in heads],
        "bpr": bench_bpr(device, files["bpr"], entries["bpr"]),
        "infer": bench_infer(files, entries, request[0, 0], scratch),
    }
    return found | {"seconds": round(time.monotonic() - started)}


def describe_device(device: Device) -> tuple[str, dict[str, float]]:
    """Its name and driver; of a GPU that PyTorch is there for, TFLOP/s of one large product in each precision."""
    try:
        import torch  # first, for it brings CUDA's libraries, which ONNX Runtime then finds
    except ImportError:
        torch = None  # type: ignore[assignment]
    if not device.gpu:
        return f"CPU, {os.cpu_count()} cores", {}
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(query, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit("no GPU here (nvidia-smi does not answer); --device cpu tries all but the times") from None
    peaks: dict[str, float] = {}
    if torch is not None and torch.cuda.is_available():
        for name, kind, tf32 in (
            ("fp32", torch.float32, False),
            ("tf32", torch.float32, True),
            ("fp16", torch.half, True),
        ):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            side = torch.rand(MATRIX, MATRIX, device="cuda", dtype=kind)

            def product(side: Any = side) -> None:
                side @ side
                torch.cuda.synchronize()

            peaks[name] = round(2 * MATRIX**3 / measure_median_ms(product, WARM, TIMES) / 1e9, 1)
        torch.cuda.empty_cache()
    return told, peaks


def make_files(models: Path, entries: dict[str, Any], onnx: Path | None, scratch: Path) -> dict[str, Path]:
    """The ONNX file of each model, and of the ViT's precisions, from seeded weights."""
    scratch.mkdir(parents=True, exist_ok=True)
    files = {name: scratch / f"{name}.onnx" for name in (*entries, "vit.tf32", "vit.fp16")}
    there = {name: onnx / f"{name}.onnx" for name in files if onnx and (onnx / f"{name}.onnx").is_file()}
    for name, entry in entries.items():
        del entry["tolerance"]
        (scratch / f"{name}.json").write_text(json.dumps(entry))
    wanted = [name for name in files if name not in there]
    for name in sorted({name.partition(".")[0] for name in wanted if name != "vit.fp16" or "vit.tf32" in wanted}):
        show_progress(f"weights of {name}, from the seed")
        run_module("scripts.convert.synthesize", scratch / f"{name}.json", scratch / f"{name}.pt")
    for name in (name for name in wanted if name != "vit.fp16"):
        show_progress(f"exporting {name}")
        model = name.partition(".")[0]
        options = ["--for", "gpu"] if name == "vit.tf32" else []
        words = ["--weights", "synthetic", *options, scratch / f"{model}.pt", scratch / f"{model}.json", files[name]]
        run_module(f"convertation.{entries[model]['family']}.torch2onnx", *words)
    if "vit.fp16" in wanted:
        show_progress("rounding vit.fp16")
        run_module(
            "scripts.convert.round_fp16",
            there.get("vit.tf32", files["vit.tf32"]),
            scratch / "vit.json",
            files["vit.fp16"],
        )
    return files | there


def run_module(module: str, *words: object) -> None:
    """Run a program of the project; SystemExit with its last words where it fails."""
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = (done.stdout.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise SystemExit(f"{module} failed: {last}; its packages are in requirements.txt, or bring --onnx FOLDER")


def bench_vit(
    device: Device,
    precision: str,
    files: dict[str, Path],
    entry: dict[str, Any],
    request: Array,
    reference: dict[str, Array],
    heads: dict[str, Any],
    peaks: dict[str, float],
) -> dict[str, Any]:
    """A row of the table: one precision of the ViT."""
    name, tf32 = PRECISIONS[precision]
    show_progress(f"the ViT in {precision}")
    before = device.memory()
    session = device.session(files[name], tf32, inner=("codes",))
    found = answer_each(session, request, ("output", "codes"))
    used = device.memory() - before
    timed = {}
    for batch in (1, entry["batch"][-1]):
        many = np.resize(request, (batch, *request.shape[1:]))
        on_device = bind_run(device, session, many)
        timed[batch] = {
            "device_ms": measure_median_ms(on_device, *((WARM, TIMES) if device.gpu else (0, 1))),
            "host_ms": measure_median_ms(
                partial(session.run, ["output"], {"input": many}), *((1, 3) if device.gpu else (0, 1))
            ),
        }
    speed = 2 * count_multiply_adds(entry) / timed[1]["device_ms"] / 1e9
    right, ours = reference["output"], found["output"]
    scores = {
        head: [
            compute_probabilities(opened.run(["output"], {"input": normalise_rows(side)})[0]) for side in (right, ours)
        ]
        for head, opened in heads.items()
    }
    return {
        "precision": precision,
        "batches": timed,
        "tflops": round(speed, 2),
        "share_of_peak": round(speed / peaks[precision], 3) if precision in peaks else None,
        "memory_mib": used or None,
        "embedding": float(np.abs(ours - right).max() / np.abs(right).max()),
        "codes_flipped": int((found["codes"] != reference["codes"]).sum()),
        "codes": int(found["codes"].size),
        "probability": max(float(np.abs(after - before).max()) for before, after in scores.values()),
        "decisions_changed": sum(len(find_changed(before, after)) for before, after in scores.values()),
        "decisions": sum(before.size for before, _ in scores.values()),
    }


def answer_each(session: Any, request: Array, names: tuple[str, ...]) -> dict[str, Array]:
    """The answers to the samples of `request`, one by one."""
    parts = [session.run(list(names), {"input": request[row : row + 1]}) for row in range(len(request))]
    return {name: np.concatenate(values) for name, values in zip(names, zip(*parts, strict=True), strict=True)}


def bind_run(device: Device, session: Any, request: Array) -> Callable[[], None]:
    """A run whose input lies on the device and whose output stays there."""
    binding = session.io_binding()
    place = onnxruntime.OrtValue.ortvalue_from_numpy(request, device.name, 0)
    binding.bind_ortvalue_input("input", place)
    binding.bind_output("output", device.name)

    def once() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return once


def measure_median_ms(work: Callable[[], object], warm: int, times: int) -> float:
    for _ in range(warm):
        work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(taken), 3)


def bench_head(device: Device, name: str, file: Path, entry: dict[str, Any], reference: Any) -> dict[str, Any]:
    """A head at its largest batch, in float32."""
    session, request = device.session(file), make_sample(entry, SEED, entry["batch"][-1])["input"]
    right, ours = (opened.run(["output"], {"input": request})[0] for opened in (reference, session))
    return {
        "model": name,
        "batch": len(request),
        "ms": measure_median_ms(lambda: session.run(["output"], {"input": request}), WARM, TIMES),
        "difference": float(np.abs(ours - right).max() / np.abs(right).max()),
    }


def bench_bpr(device: Device, file: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Scores of the slices of a series, in batches of the largest that the model takes."""
    show_progress("BPR")
    slices = SLICES if device.gpu else entry["batch"][-1]
    chance = np.random.default_rng(SEED)
    request = chance.uniform(0, 1, (slices, *entry["input"])).astype(np.float32)
    size = entry["batch"][-1]

    def scores(session: Any) -> Array:
        parts = [
            session.run(["output"], {"input": request[start : start + size]})[0] for start in range(0, slices, size)
        ]
        return np.concatenate(parts)

    session = device.session(file)
    right, ours = scores(CPU.session(file)), scores(session)
    return {
        "slices": slices,
        "ms": measure_median_ms(lambda: scores(session), *((1, 3) if device.gpu else (0, 1))),
        "difference": float(np.abs(ours - right).max() / np.abs(right).max()),
    }


def bench_infer(files: dict[str, Path], entries: dict[str, Any], volume: Array, scratch: Path) -> dict[str, Any]:
    """The classes of `make infer` on a repository of links: a volume in host memory to its probabilities."""
    from scripts.infer.models import ONNX, Local, may_use_tf32, open_session

    show_progress("make infer's own classes")
    found = {}
    for precision, (name, _) in PRECISIONS.items():
        repository = scratch / f"repository.{precision}"
        shutil.rmtree(repository, ignore_errors=True)
        for model, place in ONNX.items():
            (repository / place).parent.mkdir(parents=True)
            (repository / place).symlink_to(files[name if model == "vit" else model].resolve())
        config = ROOT / f"convertation/vit/config{'' if precision == 'fp32' else '.tf32'}.pbtxt"
        (repository / "vit_onnx/config.pbtxt").symlink_to(config)
        local = Local.__new__(Local)  # without BPR's settings, which are no part of a network
        start = time.perf_counter()
        local.sessions = {
            model: open_session(repository / place, may_use_tf32(repository / place)) for model, place in ONNX.items()
        }
        opened = time.perf_counter() - start
        answer = local.infer(volume)
        again = measure_median_ms(partial(local.infer, volume), 0, 3 if runs_on_cuda(local) else 1)
        found[precision] = {
            "providers": sorted({opened.get_providers()[0] for opened in local.sessions.values()}),
            "open_s": round(opened, 2),
            "read_ms": again,
            "probability": float(answer.probability),
        }
        del local
    return found


def runs_on_cuda(local: Any) -> bool:
    return bool(local.sessions["vit"].get_providers()[0] == "CUDAExecutionProvider")


def format_table(found: dict[str, Any]) -> list[str]:
    """What was found, as aligned lines."""
    batches = list(found["vit"][0]["batches"])
    lines = [f"{found['card']}; ONNX Runtime {found['onnxruntime']}"]
    head_row = ["ViT", *(f"ms, batch {batch}" for batch in batches), "from host", "of peak", "MiB", "of fp32"]
    head_row += ["embedding", "codes flipped", "probability", "decisions"]
    first = found["vit"][0]["batches"][batches[0]]["device_ms"]
    rows = [head_row]
    for row in found["vit"]:
        ms = [row["batches"][batch]["device_ms"] for batch in batches]
        rows.append([
            row["precision"], *(f"{value:.2f}" for value in ms), f"{row['batches'][batches[0]]['host_ms']:.1f}",
            "-" if row["share_of_peak"] is None else f"{row['share_of_peak']:.2f}", str(row["memory_mib"] or "-"),
            f"{ms[0] / first:.2f}", f"{row['embedding']:.1e}", f"{row['codes_flipped']} of {row['codes']}",
            f"{row['probability']:.1e}", f"{row['decisions_changed']} of {row['decisions']}",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines += [
        f"{row['model']}, batch {row['batch']}: {row['ms']:.2f} ms, differs by {row['difference']:.1e}"
        for row in found["heads"]
    ]
    row = found["bpr"]
    lines.append(f"bpr, {row['slices']} slices: {row['ms']:.0f} ms, differs by {row['difference']:.1e}")
    for precision, row in found["infer"].items():
        lines.append(f"make infer, {precision}: a volume {row['read_ms']:.0f} ms, by {', '.join(row['providers'])}")
    return lines


def show_progress(text: str) -> None:
    print(f"  … {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--models", type=Path, default=ROOT / "convertation/models.yaml")
    parser.add_argument("--onnx", type=Path, metavar="FOLDER", help="with ONNX files that need not be made")
    parser.add_argument("out", type=Path, metavar="OUT.json")
    given = parser.parse_args()
    found = bench_gpu(Device(given.device), given.models, given.onnx, SCRATCH.resolve())
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join([*format_table(found), f"{found['seconds']} s; {given.out}"]))


if __name__ == "__main__":
    main()
