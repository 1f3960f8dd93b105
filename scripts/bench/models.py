"""Measure the models on the CPU, and a straight export of the same weights (convertation/straight_export.py)."""

import hashlib
import json
import math
import shutil
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench.measure import BENCH, REPOSITORY, ROOT, Row, Tree, compare_medians, run_probe, show_progress

RELEASE = "1.18.1"  # the last patch on PyPI of ONNX Runtime's version in the usual release of Triton
SERIES = 400, 512  # slices, pixels
MULTIPLY_ADDS = """import json, sys
from convertation.bpr.vgg import count_multiply_adds
print(count_multiply_adds(json.load(open(sys.argv[1]))))"""

Found = list[dict[str, Any]]


def bench_vit(tree: Tree, rounds: int) -> list[Row]:
    """Measure load, memory and run of the ViT."""
    ours, entry = tree.find_onnx("vit"), tree.find_entry("vit")
    theirs = export_straight(tree, "vit")
    for path in (ours, theirs):  # so that both are later read from the page cache
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    flops = measure_matmul(tree)
    a, b = run_in_turn(tree, ours, theirs, rounds, runs=3)
    flops = max(flops, measure_matmul(tree))
    work, run = 2 * count_multiply_adds(json.loads(entry.read_text())), median(list_times(a))
    difference = max(abs(x - y) for x, y in zip(a[0]["output"], b[0]["output"], strict=True))
    speed = f"{work / run / 1e9:.0f} of {flops / 1e9:.0f} GFLOP/s"
    rows = [
        compare_medians(
            f"session load, ONNX Runtime {a[0]['version']}", list_values(a, "load"), list_values(b, "load"), 1 / 6, "s"
        ),
        compare_medians(
            "most RSS while loading", list_gigabytes(a, "loaded_peak"), list_gigabytes(b, "loaded_peak"), 0.3, "GB"
        ),
        compare_medians("RSS once loaded", list_gigabytes(a, "loaded"), list_gigabytes(b, "loaded"), None, "GB"),
        compare_medians(
            "most RSS, load + one run", list_gigabytes(a, "first_peak"), list_gigabytes(b, "first_peak"), 0.33, "GB"
        ),
        compare_medians("run, batch 1", list_times(a), list_times(b), 1.05, "s"),
        Row("share of the machine's matmul peak", work / run / flops, note=speed),
        Row("difference of the outputs", difference / max(map(abs, b[0]["output"])), note="of the largest value"),
    ]
    try:
        release = {"PYTHONPATH": str(install_onnxruntime(RELEASE))}
    except SystemExit as reason:
        return [Row(f"session load, ONNX Runtime {RELEASE}", None, "≤", 1 / 12, "x", str(reason)), *rows]
    a, b = run_in_turn(tree, ours, theirs, rounds, runs=0, **release)
    if a[0]["version"] != RELEASE:
        raise SystemExit(f"bench: ONNX Runtime {a[0]['version']} was loaded, expected {RELEASE}")
    return [
        compare_medians(
            f"session load, ONNX Runtime {RELEASE}", list_values(a, "load"), list_values(b, "load"), 1 / 12, "s"
        ),
        *rows,
    ]


def bench_export(tree: Tree, rounds: int) -> list[Row]:
    """Compare the export step with the straight export."""
    tree.find_onnx("vit")
    checkpoint, entry, out = tree.find_checkpoint("vit"), tree.find_entry("vit"), BENCH / "exported.onnx"
    ours: Found = []
    theirs: Found = []
    for number in range(rounds):
        show_progress(f"exporting the ViT, {number + 1} of {rounds}")
        words = "--opset", "20", "--weights", "synthetic", checkpoint, entry, out
        ours.append(run_probe("module", "convertation.vit.torch2onnx", *words, cwd=tree.path))
        theirs.append(run_probe("module", "convertation.straight_export", checkpoint, entry, out, cwd=tree.path))
        out.unlink()
    size = checkpoint.stat().st_size
    most, of_straight = ([peak / size for peak in list_values(found, "peak")] for found in (ours, theirs))
    note = f"{median(most) * size / 1e9:.2f} GB; straight {median(of_straight):.2f}"
    return [
        compare_medians("export, time", list_values(ours, "seconds"), list_values(theirs, "seconds"), 0.6, "s"),
        Row("export, most RSS", median(most), "≤", 2.5, "checkpoints", note, most),
    ]


def bench_heads(tree: Tree, rounds: int) -> list[Row]:
    """Measure a run of each head at its largest batch."""
    rows = []
    for name in ("binary", "multilabel"):
        ours, theirs, entry = tree.find_onnx(name), export_straight(tree, name), tree.find_entry(name)
        batch = str(json.loads(entry.read_text())["batch"][-1])
        show_progress(f"running {name}, batch {batch}")
        found = [run_probe("pair", ours, theirs, entry, batch, cwd=tree.path)["runs"] for _ in range(rounds)]
        a, b = ([1e6 * pair[side] for pair in found] for side in (0, 1))
        rows.append(compare_medians(f"{name}, batch {batch}", a, b, 1.05, "µs"))
    return rows


def bench_fp16(tree: Tree, rounds: int) -> list[Row]:
    """Measure the ViT rounded to fp16: its size, its load in the release, and its runs on a GPU where there is one."""
    exact, entry, rounded = tree.find_onnx("vit"), tree.find_entry("vit"), BENCH / "vit.fp16.onnx"
    show_progress("exporting the ViT for a GPU, and rounding it to fp16")
    tree.make("build/onnx/vit.tf32.onnx")
    run_probe(
        "module", "scripts.convert.round_fp16", tree.path / "build/onnx/vit.tf32.onnx", entry, rounded, cwd=tree.path
    )
    sizes = [path.stat().st_size / 1e9 for path in (rounded, exact)]
    rows = [
        Row("fp16 file, of fp32", sizes[0] / sizes[1], "≤", 0.53, "x", f"{sizes[0]:.3f} GB, fp32 {sizes[1]:.3f} GB")
    ]
    what = f"fp16, session load, ONNX Runtime {RELEASE}"
    try:
        release = {"PYTHONPATH": str(install_onnxruntime(RELEASE))}
        rows.append(Row(what, run_probe("session", rounded, entry, "0", cwd=tree.path, **release)["load"], unit="s"))
    except SystemExit as reason:
        rows.append(Row(what, None, note=str(reason)))
    wanted = ("fp16, run on a GPU, of fp32", 0.3), ("fp16, peak GPU memory, of fp32", 0.6)
    if not shutil.which("nvidia-smi"):
        return [*rows, *(Row(what, None, "≤", goal, "x", "no GPU") for what, goal in wanted)]
    ours, theirs = (
        [run_probe("gpu", path, entry, "20", cwd=tree.path) for _ in range(rounds)] for path in (rounded, exact)
    )
    return [
        *rows,
        compare_medians(wanted[0][0], list_values(ours, "run"), list_values(theirs, "run"), wanted[0][1], "s", "fp32"),
        compare_medians(
            wanted[1][0], list_gigabytes(ours, "most"), list_gigabytes(theirs, "most"), wanted[1][1], "GB", "fp32"
        ),
    ]


def bench_bpr(tree: Tree, rounds: int) -> list[Row]:
    """Measure one series in bpr_model, with the packages that Triton runs it with."""
    tree.build("repository")
    depth, side = SERIES
    flops = measure_matmul(tree)
    show_progress(f"running bpr_model on {side} x {side} x {depth}")
    version = tree.path / REPOSITORY / "bpr_model/1"
    found = run_probe("bpr", version, str(depth), str(side), cwd=tree.path, venv=".venv-triton")
    command = [str(ROOT / ".venv/bin/python"), "-c", MULTIPLY_ADDS, str(tree.find_entry("bpr"))]
    said = subprocess.run(command, cwd=tree.path, stdout=subprocess.PIPE, check=True).stdout
    work, flops = 2 * int(said) * depth, max(flops, found["flops"])
    note = f"{found['seconds']:.1f} s; {work / 1e12:.2f} TFLOP at {flops / 1e9:.0f} GFLOP/s are {work / flops:.1f} s"
    return [
        Row("bpr_model, of its multiply-adds at peak", found["seconds"] / (work / flops), "≤", 1.1, "x", note),
        Row("bpr_model, most RSS", found["most"] / 1e9, "≤", 2.5, "GB", f"ONNX Runtime {found['version']}"),
    ]


def run_in_turn(tree: Tree, ours: Path, theirs: Path, rounds: int, runs: int, **more: str) -> tuple[Found, Found]:
    """Measure sessions of both files in turn, each in a process of its own."""
    found: tuple[Found, Found] = ([], [])
    for number in range(rounds):
        for kind, path, into in zip(("ours", "straight"), (ours, theirs), found, strict=True):
            last = run_probe("session", path, tree.find_entry("vit"), str(runs), cwd=tree.path, **more)
            into.append(last)
            times = "".join(f", {seconds:.2f} s" for seconds in last["runs"])
            show_progress(
                f"{number + 1} of {rounds}: {kind}, ONNX Runtime {last['version']}: load {last['load']:.2f} s{times}"
            )
    return found


def export_straight(tree: Tree, model: str) -> Path:
    """Return the straight export of a model's checkpoint; it is made again only if its sources change."""
    out = BENCH / f"straight/{model}.onnx"
    tree.find_onnx(model)
    names = (
        "scripts/convert/synthesize.py",
        *(f"convertation/{name}.py" for name in ("straight_export", "vit/ctvit", "head/mlp")),
    )
    sources = *(tree.path / name for name in names), tree.find_entry(model)
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    note = out.with_suffix(".key")
    if not out.exists() or not note.exists() or note.read_text() != key:
        show_progress(f"making the straight export of {model}")
        out.parent.mkdir(parents=True, exist_ok=True)
        run_probe(
            "module",
            "convertation.straight_export",
            tree.find_checkpoint(model),
            tree.find_entry(model),
            out,
            cwd=tree.path,
        )
        note.write_text(key)
    return out


def install_onnxruntime(version: str) -> Path:
    """Return a folder with this ONNX Runtime; SystemExit with pip's last line if pip cannot install it."""
    folder = BENCH / f"onnxruntime-{version}"
    if not (folder / "onnxruntime").exists():
        show_progress(f"installing ONNX Runtime {version}")
        command = [str(ROOT / ".venv/bin/python"), "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--target", str(folder), f"onnxruntime=={version}"]
        run = subprocess.run(command, text=True, stderr=subprocess.PIPE)
        if run.returncode:
            raise SystemExit(f"pip: {run.stderr.strip().splitlines()[-1]}")
    return folder


def measure_matmul(tree: Tree) -> float:
    """Return the machine's float32 peak in operations per second."""
    return float(run_probe("matmul", "4096", cwd=tree.path)["flops"])


def list_values(found: Found, name: str) -> list[float]:
    return [one[name] for one in found]


def list_gigabytes(found: Found, name: str) -> list[float]:
    return [one[name] / 1e9 for one in found]


def list_times(found: Found) -> list[float]:
    """Return the times of all runs but the first of each session, which allocates memory."""
    return [seconds for one in found for seconds in one["runs"][1:]]


def count_multiply_adds(entry: dict[str, Any]) -> int:
    """Return how many multiplications, each with its addition, one volume costs; without those of the spatial bias."""
    network, (channels, *volume) = entry["network"], entry["input"]
    t, h, w = (size // part for size, part in zip(volume, network["patch"], strict=True))
    dim, inner = int(network["dim"]), network["heads"] * network["dim_head"]
    spatial, temporal = network["spatial_depth"], network["temporal_depth"]
    per_layer = 3 * dim * (dim * 8 // 3) + 4 * dim * inner + 27 * dim  # feed-forward, projections, position
    attention = 2 * inner * (spatial * h * w + temporal * t)
    ends = (network["codebook"] + channels * math.prod(network["patch"])) * dim  # quantiser, patches
    per_token = (spatial + temporal) * per_layer + attention + ends
    return int(t * h * w * per_token + h * w * dim * entry["output"][0])
