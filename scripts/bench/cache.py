"""Measure the shared cache: taking a whole repository from a warm folder, and putting the results of a build there."""

import json
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from scripts.bench.measure import (
    BENCH,
    ENVIRONMENTS,
    ROOT,
    Row,
    Tree,
    clean_environment,
    copy_sources,
    show_progress,
)
from scripts.steps.records import hash_file

FOLDER = BENCH / "cache"
MODELS = "vit", "binary", "multilabel", "bpr"
GOALS = (
    *(f"build/onnx/{model}.onnx" for model in MODELS),
    *(f"build/checks/{model}.json" for model in MODELS),
    "build/synthetic/bpr/inference-settings.json",
)
# Puts the results of the steps into the cache, as step.py does after each step
FILL = """import os, sys, time
from scripts.steps.cache import Cache
from scripts.steps.records import find_content, read_text, written_digest
cache, start = Cache(), time.perf_counter()
for target in sys.argv[1:]:
    made = read_text(f".make/made/{target.replace('/', '%')}")
    cache.keep(target, made.partition(" ")[2], written_digest(target), find_content(written_digest(target)))
print(time.perf_counter() - start)"""


def bench_cache(tree: Tree, rounds: int) -> list[Row]:
    """Compare a build that fills a cold cache with one without a cache, and taking from a warm cache with `cp`."""
    tree.build("repository")
    shutil.rmtree(FOLDER, ignore_errors=True)
    fresh = BENCH / "empty"
    try:
        return [bench_put(tree), bench_take(fresh, rounds, forget=True), bench_take(fresh, rounds, forget=False)]
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.rmtree(fresh, ignore_errors=True)


def bench_put(tree: Tree) -> Row:
    """Measure how much longer a build takes if all its results are put into the cache."""
    took = {path.name.replace("%", "/"): path for path in (tree.path / ".make/took").iterdir()}
    cached = [name for name in took if not name.startswith((".venv", "build/checks/verdict"))]
    steps = sum(float(json.loads(path.read_text())["seconds"]) for path in took.values())
    show_progress(f"putting {len(cached)} results into a cache folder")
    FOLDER.mkdir(parents=True)
    run = subprocess.run(
        ["/usr/bin/python3", "-c", FILL, *cached], cwd=tree.path, text=True, stdout=subprocess.PIPE, check=True,
        env=clean_environment(CACHE=str(FOLDER), MAKE_RUN=f"{time.time_ns()}"),
    )  # fmt: skip
    seconds = float(run.stdout.split()[-1])
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    if not size:
        raise SystemExit(f"bench: nothing was put into the cache\n{run.stdout}")
    note = f"{len(cached)} results, {size / 1e9:.2f} GB in {seconds:.1f} s beside {steps:.0f} s of steps"
    return Row("a build with a cold cache", (steps + seconds) / steps, "≤", 1.05, "x", note)


def bench_take(fresh: Path, rounds: int, forget: bool) -> Row:
    """Compare the speed of taking all GOALS from the cache on a machine without results with `cp` of the same entries.

    With `forget` they are read from the disk, as on a machine that has just started; without it, from memory.
    """
    makes, copies = list[float](), list[float]()
    where = "disk" if forget else "memory"
    show_progress(f"taking everything from the warm cache folder, then copying it with cp, from {where}")
    for _ in range(rounds):
        shutil.rmtree(fresh, ignore_errors=True)
        (fresh / ".make/made").mkdir(parents=True)
        copy_sources(fresh)
        for venv in ENVIRONMENTS:
            (fresh / venv).symlink_to(ROOT / venv)
            shutil.copy(ROOT / f".make/made/{venv}%installed", fresh / ".make/made")
        # Make notes what is installed before the time is taken
        Tree(fresh).make(*(f"{venv}/installed" for venv in ENVIRONMENTS))
        settle_disk(forget)
        seconds, said = Tree(fresh).make(*GOALS, f"CACHE={FOLDER}", "CACHE_MODE=read")
        if missed := [goal for goal in GOALS if f"{goal}: from the cache" not in said]:
            raise SystemExit(f"bench: {missed[0]} did not come from the cache\n{said[-2000:]}")
        entries = [FOLDER / "files" / hash_file(fresh / goal) for goal in GOALS]
        (fresh / "copy").mkdir()
        settle_disk(forget)
        start = time.perf_counter()
        subprocess.run(["cp", *entries, fresh / "copy"], check=True)
        copies.append(time.perf_counter() - start)
        makes.append(seconds)
    size = sum(path.stat().st_size for path in (fresh / "copy").iterdir())
    make, copy = statistics.median(makes), statistics.median(copies)
    note = f"{size / 1e9:.2f} GB: make {make:.2f} s, cp {copy:.2f} s"
    rates = [copy / seconds for seconds in makes]
    what, goal = f"warm folder cache, from {where}, rate of cp", 0.6 if forget else None
    return Row(what, copy / make, "≥", goal, "x", note, rates)


def settle_disk(forget: bool) -> None:
    """Wait until the disk has written everything; with `forget`, drop the cache's files from memory.

    The copy to `scratch` brings these files into memory.  It also makes the host of a virtual machine provide the
    memory that the measured copies will fill, which takes ten times as long as filling it.
    """
    scratch = FOLDER.with_name("scratch")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(FOLDER / "files", scratch)
    shutil.rmtree(scratch)
    os.sync()
    for path in (FOLDER / "files").iterdir() if forget else ():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
