"""Measure the pipeline: the first build, a build with nothing to do, and what a change rebuilds."""

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from scripts.bench.measure import (
    BENCH,
    ENVIRONMENTS,
    REPOSITORY,
    ROOT,
    Row,
    Tree,
    copy_sources,
    show_progress,
)
from scripts.steps.records import hash_file

HEAD = "binary"
CHANGE = """import sys, torch
state = torch.load(sys.argv[1])
next(iter(state.values())).view(-1)[0] += 0.001
torch.save(state, sys.argv[1])"""
SMALL = 65536  # bytes; copies of smaller files (configs, scripts) are not counted


def bench_cold(tree: Tree, rounds: int) -> list[Row]:
    """Measure `make repository WEIGHTS=synthetic` in a new copy of the project."""
    shutil.rmtree(tree.path, ignore_errors=True)
    show_progress(f"make repository WEIGHTS=synthetic in a new {tree.path.relative_to(ROOT)}")
    tree.update_sources()
    before = sum(os.times()[2:4])
    seconds, _ = tree.make("repository", loud=True)
    cpu = sum(os.times()[2:4]) - before
    tree.current.add("repository")
    took = {path.name.replace("%", "/"): json.loads(path.read_text()) for path in (tree.path / ".make/took").iterdir()}
    largest = max(took, key=lambda name: float(took[name]["peak_mb"]))
    slowest = sorted(took, key=lambda name: -float(took[name]["seconds"]))[:3]
    note = ", ".join(f"{name.removeprefix('build/')} {took[name]['seconds']:.0f} s" for name in slowest)
    return [
        Row("make repository, cold", seconds, "≤", 300, "s", f"slowest: {note}"),
        Row("make repository, cold, lean", seconds, "≤", 180, "s", f"the same run; {cpu:.0f} s of CPU"),
        Row("most memory of a step", took[largest]["peak_mb"] * 1024**2 / 1e9, "≤", 4, "GB", largest),
    ]


def bench_noop(tree: Tree, rounds: int) -> list[Row]:
    """Measure make when little or nothing has changed, and the disk use."""
    tree.build("repository")
    return [
        bench_unchanged(tree),
        bench_without_environments(tree),
        *bench_touched_files(tree, rounds),
        *bench_clone(tree),
        bench_disk_use(tree),
        *bench_one_head(tree),
    ]


def bench_unchanged(tree: Tree) -> Row:
    times = [measure_idle(tree) for _ in range(11)]
    return Row(
        "nothing to do",
        1000 * statistics.median(times),
        "≤",
        50,
        "ms",
        f"at most {1000 * max(times):.0f} ms of 11",
        times,
    )


def bench_without_environments(tree: Tree) -> Row:
    for venv in ENVIRONMENTS:
        (tree.path / venv).unlink()
    try:
        times = [measure_idle(tree) for _ in range(5)]
    finally:
        for venv in ENVIRONMENTS:
            (tree.path / venv).symlink_to(ROOT / venv)
    return Row("nothing to do, no environment", statistics.median(times), "≤", 0.3, "s", "of 5", times)


def bench_touched_files(tree: Tree, rounds: int) -> Iterator[Row]:
    times, steps = [], 0
    for _ in range(rounds):
        show_progress("touching every file")
        for folder, _, names in os.walk(tree.path):
            for name in names:
                os.utime(f"{folder}/{name}", follow_symlinks=False)
        seconds, said = tree.make("repository")
        times.append(seconds)
        steps = max(steps, len(list_announced(said)))
    size = sum(path.stat().st_size for path in list_files(tree.path))
    yield Row(
        "all touched", statistics.median(times), "≤", 2.5, "s", f"{size / 1e9:.1f} GB, each byte read once", times
    )
    yield Row("all touched: steps run", steps, "≤", 0)


def bench_clone(tree: Tree) -> Iterator[Row]:
    """Measure make in a new clone whose records and repository come from a cache, as in CI."""
    archive, fresh = BENCH / "cache.tar", BENCH / "clone"
    shutil.rmtree(fresh, ignore_errors=True)
    show_progress("restoring records and repository into a new copy")
    try:
        subprocess.run(["tar", "cf", archive, ".make", REPOSITORY], cwd=tree.path, check=True)
        start = time.perf_counter()
        fresh.mkdir()
        copy_sources(fresh)
        subprocess.run(["tar", "xmf", archive, "--no-same-owner"], cwd=fresh, check=True)
        restored = time.perf_counter() - start
        made, said = Tree(fresh).make("repository")
    finally:
        archive.unlink(missing_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
    note = f"copying and tar {restored:.2f} s, make {made:.2f} s"
    yield Row("clone + restored cache", restored + made, "≤", 2.5, "s", note)
    yield Row("clone + restored cache: steps run", len(list_announced(said)), "≤", 0)


def bench_disk_use(tree: Tree) -> Row:
    """Measure the bytes on disk divided by the bytes of distinct contents: 1 if each artifact is there once."""
    copies: dict[str, list[Path]] = defaultdict(list)
    inodes: set[int] = set()
    for path in list_files(tree.path):
        if path.stat().st_size > SMALL and path.stat().st_ino not in inodes:
            inodes.add(path.stat().st_ino)
            copies[hash_file(path)].append(path)
    held = sum(path.stat().st_size for paths in copies.values() for path in paths)
    distinct = sum(paths[0].stat().st_size for paths in copies.values())
    twice = [str(path.relative_to(tree.path)) for paths in copies.values() for path in paths[1:]]
    return Row(
        "disk: copies of each artifact",
        held / max(1, distinct),
        "≤",
        1.01,
        "x",
        ", ".join(twice) or f"{held / 1e9:.2f} GB",
    )


def bench_one_head(tree: Tree) -> Iterator[Row]:
    """Change one weight of one head, as a step before would: only its export, its check and the verdict may run."""
    checkpoint = tree.find_checkpoint(HEAD)
    record = tree.path / f".make/made/{str(checkpoint.relative_to(tree.path)).replace('/', '%')}"
    before = hash_file(checkpoint)
    subprocess.run([ROOT / ".venv/bin/python", "-c", CHANGE, checkpoint], check=True)
    record.write_text(record.read_text().replace(before, hash_file(checkpoint), 1))
    show_progress("changing one weight of one head")
    seconds, said = tree.make("repository", loud=True)
    expected = {f"build/onnx/{HEAD}.onnx", f"build/checks/{HEAD}.json", "build/checks/verdict.json"}
    steps = list_announced(said)
    wrong = sorted(steps ^ expected)
    yield Row(
        "one head changed: steps too many or missing",
        len(wrong),
        "≤",
        0,
        note=", ".join(wrong) or f"exactly {len(steps)}: {', '.join(sorted(steps))}",
    )
    yield Row("one head changed", seconds, unit="s", note="mostly the verdict on the whole set")


def measure_idle(tree: Tree) -> float:
    seconds, said = tree.make("repository")
    if list_announced(said):
        raise SystemExit(f"bench: make ran steps, expected nothing to do\n{said}")
    return seconds


def list_announced(said: str) -> set[str]:
    """Return the artifacts that make announced, in lines such as `build/onnx/vit.onnx: models.yaml changed`."""
    return set(re.findall(r"^((?:build|training|\.venv)[^ :]*): (?!waiting)", said, re.MULTILINE))


def list_files(top: Path) -> Iterator[Path]:
    """Yield every file below `top`; links, such as the two environments, are not followed."""
    for folder, _, names in os.walk(top):
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and not path.is_symlink():
                    yield path
