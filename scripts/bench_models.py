"""The models' figures against a straight export of the same weights (convertation/straight_export.py), on the CPU."""

import hashlib
import json
import math
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench_measure import BENCH, REPOSITORY, ROOT, Row, Tree, probe, ratio, say

RELEASE = "1.18.1"  # ONNX Runtime of Triton 24.06
SERIES = 400, 512  # slices, pixels


def vit(tree: Tree, rounds: int) -> list[Row]:
    """Load, memory and run of the ViT."""
    ours, entry = tree.onnx("vit"), tree.entry("vit")
    theirs = straight(tree, "vit")
    for path in (ours, theirs):
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)  # both from the page cache
    flops = [probe("matmul", "4096", cwd=tree.path)["flops"]]
    a, b = in_turn(tree, ours, theirs, entry, rounds, runs=3)
    flops.append(probe("matmul", "4096", cwd=tree.path)["flops"])
    work, run = 2 * multiply_adds(json.loads(entry.read_text())), median(runs(a))
    share = work / run / max(flops)
    difference = max(abs(x - y) for x, y in zip(a[0]["output"], b[0]["output"], strict=True))
    scale = max(map(abs, b[0]["output"]))
    pinned = a[0]["version"]
    rows = [
        ratio(f"session load, ONNX Runtime {pinned}", each(a, "load"), each(b, "load"), 1 / 6, "{ours:.2f} s, straight {theirs:.2f} s"),
        ratio("most RSS while loading", giga(a, "loaded_peak"), giga(b, "loaded_peak"), 0.3, "{ours:.2f} GB, straight {theirs:.2f} GB"),
        Row("RSS once loaded", median(giga(a, "loaded")) / median(giga(b, "loaded")), unit="x", note=f"{median(giga(a, 'loaded')):.2f} GB, straight {median(giga(b, 'loaded')):.2f} GB"),
        ratio("most RSS, load + one run", giga(a, "first_peak"), giga(b, "first_peak"), 0.33, "{ours:.2f} GB, straight {theirs:.2f} GB"),
        ratio("run, batch 1", runs(a), runs(b), 1.05, "{ours:.2f} s, straight {theirs:.2f} s"),
        Row("share of the machine's matmul peak", share, note=f"{work / run / 1e9:.0f} of {max(flops) / 1e9:.0f} GFLOP/s; less than it could be where others compute"),
        Row("difference of the two outputs", difference / scale, unit="of scale"),
    ]  # fmt: skip
    try:
        release = {"PYTHONPATH": str(install(RELEASE))}
    except SystemExit as reason:
        return [Row(f"session load, ONNX Runtime {RELEASE}", None, "≤", 1 / 12, "x", str(reason)), *rows]
    a, b = in_turn(tree, ours, theirs, entry, rounds, runs=0, **release)
    if a[0]["version"] != RELEASE:
        raise SystemExit(f"bench: ONNX Runtime {RELEASE} was asked for, {a[0]['version']} loaded")
    note = "{ours:.2f} s, straight {theirs:.2f} s"
    return [ratio(f"session load, ONNX Runtime {RELEASE}", each(a, "load"), each(b, "load"), 1 / 12, note), *rows]


def export(tree: Tree, rounds: int) -> list[Row]:
    """The export step against the straight one."""
    tree.onnx("vit")
    checkpoint, entry, out = tree.checkpoint("vit"), tree.entry("vit"), BENCH / "exported.onnx"
    ours, theirs = [], []
    for number in range(rounds):
        say(f"exporting the ViT, {number + 1} of {rounds}")
        words = "--opset", "20", "--weights", "synthetic", checkpoint, entry, out
        ours.append(probe("module", "convertation.vit.torch2onnx", *words, cwd=tree.path))
        theirs.append(probe("module", "convertation.straight_export", checkpoint, entry, out, cwd=tree.path))
        out.unlink()
    size = checkpoint.stat().st_size
    most = median(each(ours, "peak"))
    note = f"{most / 1e9:.2f} GB for {size / 1e9:.2f} GB; straight {median(each(theirs, 'peak')) / size:.2f} x"
    return [
        ratio("export, time", each(ours, "seconds"), each(theirs, "seconds"), 0.6, "{ours:.1f} s, straight {theirs:.1f} s"),
        Row("export, most RSS, of the checkpoint", most / size, "≤", 2.5, "x", note, [x / size for x in each(ours, "peak")]),
    ]  # fmt: skip


def heads(tree: Tree, rounds: int) -> list[Row]:
    """A run of each head at its largest batch."""
    rows = []
    for name in ("binary", "multilabel"):
        ours, theirs, entry = tree.onnx(name), straight(tree, name), tree.entry(name)
        batch = str(json.loads(entry.read_text())["batch"][-1])
        say(f"{name}, batch {batch}")
        found = [probe("pair", ours, theirs, entry, batch, cwd=tree.path)["runs"] for _ in range(rounds)]
        a, b = ([1e6 * pair[side] for pair in found] for side in (0, 1))
        rows.append(ratio(f"{name}, batch {batch}", a, b, 1.05, "{ours:.0f} µs, straight {theirs:.0f} µs"))
    return rows


def bpr(tree: Tree, rounds: int) -> list[Row]:
    """One series through bpr_model, with the packages that Triton runs it with."""
    version = tree.path / REPOSITORY / "bpr_model/1"
    tree.ready("repository")
    depth, side = SERIES
    flops = probe("matmul", "4096", cwd=tree.path)["flops"]
    say(f"bpr_model, {side} x {side} x {depth}")
    found = probe("bpr", version, str(depth), str(side), cwd=tree.path, venv=".venv-triton")
    code = (
        "import json, sys; from convertation.bpr.vgg import multiply_adds as m; print(m(json.load(open(sys.argv[1]))))"
    )
    said = subprocess.run(
        [ROOT / ".venv/bin/python", "-c", code, tree.entry("bpr")], cwd=tree.path, stdout=subprocess.PIPE, check=True
    ).stdout
    work, flops = 2 * int(said) * depth, max(flops, found["flops"])
    note = f"{found['seconds']:.1f} s; {work / 1e12:.2f} TFLOP at {flops / 1e9:.0f} GFLOP/s are {work / flops:.1f} s"
    return [
        Row("bpr_model, of its multiply-adds at peak", found["seconds"] / (work / flops), "≤", 1.1, "x", note),
        Row("bpr_model, most RSS", found["most"] / 1e9, "≤", 2.5, "GB", f"ONNX Runtime {found['version']}, tag {found['tag']}"),
    ]  # fmt: skip


def in_turn(
    tree: Tree, ours: Path, theirs: Path, entry: Path, rounds: int, runs: int, **more: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sessions of both files in turn, each in a process of its own."""
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for number in range(rounds):
        for path, into in zip((ours, theirs), found, strict=True):
            into.append(probe("session", path, entry, str(runs), cwd=tree.path, **more))
            last = into[-1]
            times = "".join(f", {seconds:.2f} s" for seconds in last["runs"])
            kind = "ours" if path == ours else "straight"
            say(f"{number + 1} of {rounds}: {kind}, ONNX Runtime {last['version']}: load {last['load']:.2f} s{times}")
    return found


def straight(tree: Tree, model: str) -> Path:
    """The straight export of a model's checkpoint, made once."""
    out = BENCH / f"straight/{model}.onnx"
    tree.onnx(model)
    checkpoint, entry = tree.checkpoint(model), tree.entry(model)
    made = [tree.path / "convertation" / name for name in ("straight_export.py", "vit/ctvit.py", "head/mlp.py")]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (*made, entry))).hexdigest()
    note = out.with_suffix(".key")
    if not out.exists() or not note.exists() or note.read_text() != key:
        say(f"the straight export of {model}")
        out.parent.mkdir(parents=True, exist_ok=True)
        probe("module", "convertation.straight_export", checkpoint, entry, out, cwd=tree.path)
        note.write_text(key)
    return out


def install(version: str) -> Path:
    """A folder with this ONNX Runtime; SystemExit with pip's last line if there is none to be had."""
    folder = BENCH / f"onnxruntime-{version}"
    if not (folder / "onnxruntime").exists():
        say(f"installing ONNX Runtime {version}")
        command = [ROOT / ".venv/bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        run = subprocess.run([*command, f"onnxruntime=={version}"], text=True, stderr=subprocess.PIPE)
        if run.returncode:
            raise SystemExit(f"pip: {run.stderr.strip().splitlines()[-1]}")
    return folder


def each(found: list[dict[str, Any]], name: str) -> list[float]:
    return [one[name] for one in found]


def giga(found: list[dict[str, Any]], name: str) -> list[float]:
    return [one[name] / 1e9 for one in found]


def runs(found: list[dict[str, Any]]) -> list[float]:
    """The times of all runs but each session's first, which lays out its memory."""
    return [seconds for one in found for seconds in one["runs"][1:]]


def multiply_adds(entry: dict[str, Any]) -> int:
    """Multiplications, each with its addition, that one volume costs; the spatial bias not counted, it is a constant."""
    network, (channels, *volume) = entry["network"], entry["input"]
    t, h, w = (size // part for size, part in zip(volume, network["patch"], strict=True))
    dim, inner, tokens = network["dim"], network["heads"] * network["dim_head"], t * h * w
    layers = network["spatial_depth"] + network["temporal_depth"]
    per_layer = 3 * dim * (dim * 8 // 3) + 4 * dim * inner + 27 * dim  # feed-forward, projections, position
    return (
        tokens
        * (
            layers * per_layer
            + 2 * inner * (network["spatial_depth"] * h * w + network["temporal_depth"] * t)
            + network["codebook"] * dim
            + channels * math.prod(network["patch"]) * dim
        )
        + h * w * dim * entry["output"][0]
    )
