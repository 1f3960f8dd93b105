"""Measure the networks on a GPU; it needs only this checkout, Python and ONNX Runtime with CUDA, no Docker.

    python -m scripts.bench.gpu [--device cpu] [--models models.yaml] [--onnx FOLDER] OUT.json

The ONNX files are made from seeded weights, at the size that models.yaml says; a file that FOLDER has (vit.onnx,
vit.tf32.onnx, vit.fp16.onnx, heads and bpr of the same weights) is not made again.  For each precision of the ViT, at
batch 1 and 4, it measures: ms with the input on the device and in host memory, the share of the GPU's own peak, and GPU
memory.  On two volumes it compares codes, embedding, probabilities and decisions with float32 on the CPU.  Then it
measures the heads, BPR and the classes of `make infer`.  --device cpu runs all of this without a GPU; its times mean
nothing.
"""

import argparse
import json
import platform
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]

from scripts.bench.gpu_device import (
    CPU,
    TIMES,
    WARM,
    Array,
    Device,
    bind_run,
    describe_device,
    measure_median_ms,
)
from scripts.bench.gpu_models import ROOT, make_files
from scripts.bench.measure import show_progress
from scripts.bench.models import count_multiply_adds
from scripts.convert.model_entry import read_entry, read_models
from scripts.convert.probabilities import compute_probabilities, find_changed, normalise_rows
from scripts.convert.sample import make_sample

SCRATCH = Path("build/bench/gpu")
SEED, VOLUMES = 7, 2
SLICES = 400  # of a series, for BPR
# Of each precision: the ONNX file, and whether a GPU may use TF32 where the file still has float32 products
PRECISIONS = {"fp32": ("vit", False), "tf32": ("vit.tf32", True), "fp16": ("vit.fp16", True)}


def bench_gpu(device: Device, models: Path, onnx: Path | None, scratch: Path) -> dict[str, Any]:
    """Return what OUT holds."""
    started = time.monotonic()
    entries = {
        name: read_entry(models, name) for name, entry in read_models(models).items() if not entry.get("optional")
    }
    device_name, peaks = describe_device(device)
    files = make_files(entries, onnx, scratch)
    show_progress("computing the reference: float32 on the CPU")
    request = make_sample(entries["vit"], SEED, VOLUMES)["input"]
    heads = {name: CPU.open_session(files[name]) for name, entry in entries.items() if entry["family"] == "head"}
    reference = answer_each(CPU.open_session(files["vit"], inner=("codes",)), request, ("output", "codes"))
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
    """Return a row of the table: one precision of the ViT."""
    name, tf32 = PRECISIONS[precision]
    show_progress(f"measuring the ViT in {precision}")
    before = device.read_used_memory()
    session = device.open_session(files[name], tf32, inner=("codes",))
    found = answer_each(session, request, ("output", "codes"))
    used = device.read_used_memory() - before
    timed = {}
    for batch in (1, entry["batch"][-1]):
        many = np.resize(request, (batch, *request.shape[1:]))
        on_device = bind_run(device, session, many)
        timed[batch] = {
            "device_ms": measure_median_ms(on_device, *device.choose_runs(WARM, TIMES)),
            "host_ms": measure_median_ms(partial(session.run, ["output"], {"input": many}), *device.choose_runs(1, 3)),
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
    """Return the outputs `names` for the samples of `request`, asked one by one."""
    parts = [session.run(list(names), {"input": request[row : row + 1]}) for row in range(len(request))]
    return {name: np.concatenate(values) for name, values in zip(names, zip(*parts, strict=True), strict=True)}


def bench_head(device: Device, name: str, file: Path, entry: dict[str, Any], reference: Any) -> dict[str, Any]:
    """Measure a head at its largest batch, in float32."""
    session, request = device.open_session(file), make_sample(entry, SEED, entry["batch"][-1])["input"]
    right, ours = (opened.run(["output"], {"input": request})[0] for opened in (reference, session))
    return {
        "model": name,
        "batch": len(request),
        "ms": measure_median_ms(lambda: session.run(["output"], {"input": request}), WARM, TIMES),
        "difference": float(np.abs(ours - right).max() / np.abs(right).max()),
    }


def bench_bpr(device: Device, file: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Measure BPR on the slices of a series, in batches as large as the model takes."""
    show_progress("measuring BPR")
    slices = SLICES if device.is_gpu else entry["batch"][-1]
    chance = np.random.default_rng(SEED)
    request = chance.uniform(0, 1, (slices, *entry["input"])).astype(np.float32)
    size = entry["batch"][-1]

    def score_slices(session: Any) -> Array:
        parts = [
            session.run(["output"], {"input": request[start : start + size]})[0] for start in range(0, slices, size)
        ]
        return np.concatenate(parts)

    session = device.open_session(file)
    right, ours = score_slices(CPU.open_session(file)), score_slices(session)
    return {
        "slices": slices,
        "ms": measure_median_ms(lambda: score_slices(session), *device.choose_runs(1, 3)),
        "difference": float(np.abs(ours - right).max() / np.abs(right).max()),
    }


def bench_infer(files: dict[str, Path], entries: dict[str, Any], volume: Array, scratch: Path) -> dict[str, Any]:
    """Measure the classes of `make infer`, from a volume in host memory to its probabilities.

    They read a repository whose files are links to `files`.
    """
    from scripts.infer.models import ONNX, Local, may_use_tf32, open_session

    show_progress("measuring the classes of make infer")
    found = {}
    for precision, (name, _) in PRECISIONS.items():
        repository = scratch / f"repository.{precision}"
        shutil.rmtree(repository, ignore_errors=True)
        for model, place in ONNX.items():
            (repository / place).parent.mkdir(parents=True)
            (repository / place).symlink_to(files[name if model == "vit" else model].resolve())
        config = ROOT / f"convertation/vit/config{'' if precision == 'fp32' else '.tf32'}.pbtxt"
        (repository / "vit_onnx/config.pbtxt").symlink_to(config)
        local = Local.__new__(Local)  # without __init__, which would read BPR's settings
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
    """Return the results as aligned lines."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--models", type=Path, default=ROOT / "convertation/models.yaml")
    parser.add_argument(
        "--onnx", type=Path, metavar="FOLDER", help="a folder with ONNX files, which are not made again"
    )
    parser.add_argument("out", type=Path, metavar="OUT.json")
    given = parser.parse_args()
    found = bench_gpu(Device(given.device), given.models, given.onnx, SCRATCH.resolve())
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join([*format_table(found), f"{found['seconds']} s; {given.out}"]))


if __name__ == "__main__":
    main()
