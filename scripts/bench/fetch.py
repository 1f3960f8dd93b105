"""Measure downloading, from a server on this machine, and unpacking."""

import os
import random
import shutil
import statistics
import subprocess
import time
import zipfile
from pathlib import Path

from scripts.bench.measure import BENCH, ROOT, Row, Tree, clean_environment, run_probe, show_progress
from tests.yandex_disk_stand_in import Fault, YandexDisk

SIZE = 1 << 30  # bytes of the archive
PIECE = 1 << 24
FOLDER = BENCH / "fetch"
OUT = "training/weights.zip"


def bench_fetch(tree: Tree, rounds: int) -> list[Row]:
    """Measure a whole download, and one that is killed half way."""
    archive = make_archive()
    bare = run_probe("nothing", cwd=ROOT)["peak"]
    with YandexDisk({"/weights.zip": archive}) as disk:
        disk.describe("/weights.zip")  # compute its digests now: else the first answer would wait for them
        found = []
        for number in range(rounds):
            show_progress(f"downloading {SIZE / 2**30:.2g} GiB, {number + 1} of {rounds}")
            found.append(
                run_probe(
                    "module", "scripts.archives.fetch", "weights.zip", OUT, cwd=make_project(), **name_server(disk)
                )
            )
        cpu, peak = ([one[name] for one in found] for name in ("cpu", "peak"))
        beyond = 100 * measure_kill(disk)
    above = [(bytes_ - bare) / 1e6 for bytes_ in peak]
    seconds = statistics.median(one["seconds"] for one in found)
    return [
        Row("download, CPU", statistics.median(cpu), "≤", 5 * SIZE / 2**30, "s", f"{seconds:.1f} s on the clock", cpu),
        Row("download, RSS above the interpreter's", statistics.median(above), "≤", 100, "MB", samples=above),
        Row("killed half way: beyond the missing half", beyond, "≤", 2, "%"),
    ]


def measure_kill(disk: YandexDisk) -> float:
    """Kill a download (-9) when half was sent, start it again; return the share of a half that was sent twice."""
    folder, before, half = make_project(), disk.sent(), SIZE // 2
    command = [str(ROOT / ".venv/bin/python"), "-m", "scripts.archives.fetch", "weights.zip", OUT]
    variables = clean_environment(PYTHONPATH=str(ROOT), **name_server(disk))
    show_progress("killing a download half way")
    disk.faults["content"] = [Fault(stall=half)]
    with (folder / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=log)
        while disk.sent() - before < half:
            if first.poll() is not None:
                raise SystemExit("bench: the download ended before it could be killed")
            time.sleep(0.01)
        time.sleep(0.5)  # until the program has received what was sent
        first.kill()
        first.wait()
        kept, stopped = (folder / f"{OUT}.part").stat().st_size, disk.sent()
        subprocess.run(command, cwd=folder, env=variables, stdout=log, stderr=log, check=True)
    disk.released.set()
    again = disk.sent() - stopped
    show_progress(f"{half / 1e6:.1f} MB sent, {kept / 1e6:.1f} MB kept, then {again / 1e6:.1f} MB sent")
    return (again - (SIZE - half)) / half


def bench_unpack(tree: Tree, rounds: int) -> list[Row]:
    """Compare the speed of scripts/archives/unpack.py with unzip."""
    if not shutil.which("unzip"):
        return [Row("unpacking, of unzip's speed", None, "≥", 0.8, "x", "no unzip on this machine")]
    archive, folder = make_archive(), FOLDER / "unpacked"
    commands = {
        "ours": [str(ROOT / ".venv/bin/python"), "-m", "scripts.archives.unpack", "--all", str(archive), str(folder)],
        "unzip": ["unzip", "-q", str(archive), "-d", str(folder)],
    }
    took: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds):
        show_progress(f"unpacking, {number + 1} of {rounds}")
        for name, command in commands.items():
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()
            start = time.perf_counter()
            subprocess.run(
                command,
                cwd=ROOT,
                env=clean_environment(),
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
            )
            took[name].append(time.perf_counter() - start)
    shutil.rmtree(folder)
    ours, theirs = (statistics.median(times) for times in took.values())
    speeds = [theirs / time_ for time_ in took["ours"]]
    return [
        Row("unpacking, of unzip's speed", theirs / ours, "≥", 0.8, "x", f"{ours:.2f} s, unzip {theirs:.2f} s", speeds)
    ]


def make_archive() -> Path:
    """Return an archive of SIZE bytes: half of it deflated, like weights, and half stored."""
    path = FOLDER / "weights.zip"
    if path.exists() and path.stat().st_size == SIZE:
        return path
    show_progress(f"making an archive of {SIZE / 2**30:.2g} GiB")
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, path.open("rb") as written:
        number = 0
        while written.seek(0, os.SEEK_END) < SIZE // 2:
            piece = bytearray(generator.randbytes(min(PIECE, SIZE // 8)))
            piece[3::4] = b"\x3d" * len(piece[3::4])  # the exponent of a small float32, as most weights are
            archive.writestr(f"CT-RATE/{number}.pt", piece)
            number += 1
        name = "CT-RATE/models/stored.bin"
        directory = sum(46 + len(info.filename) for info in archive.infolist()) + 46 + len(name) + 22
        left = SIZE - written.seek(0, os.SEEK_END) - 30 - len(name) - directory
        info = zipfile.ZipInfo(name)
        with archive.open(info, "w") as member:
            for start in range(0, left, PIECE):
                member.write(generator.randbytes(min(PIECE, left - start)))
    return path


def make_project() -> Path:
    """Return an empty project folder to download into."""
    shutil.rmtree(folder := FOLDER / "project", ignore_errors=True)
    (folder / "training").mkdir(parents=True)
    shutil.copy(ROOT / "training/archives.json", folder / "training")
    return folder


def name_server(disk: YandexDisk) -> dict[str, str]:
    """Return the variables that make scripts/archives/fetch.py ask this server."""
    return {name: value for name, value in disk.environment().items() if name.startswith(("YANDEX_DISK", "FETCH"))}
