"""Downloading's figures, from a server on this machine, and unpacking's."""

import os
import random
import shutil
import signal
import statistics
import subprocess
import time
import zipfile
from pathlib import Path

from scripts.bench_measure import BENCH, ROOT, Row, Tree, environment, probe, ratio, say
from tests.yandex_disk_stand_in import YandexDisk

SIZE = 1 << 30  # bytes of the archive
PIECE = 1 << 24
FOLDER = BENCH / "fetch"
OUT = "training/weights.zip"


def fetch(tree: Tree, rounds: int) -> list[Row]:
    """A whole download, and one that is killed half way."""
    archive = packed()
    bare = probe("nothing", cwd=ROOT)["peak"]
    with YandexDisk({"/weights.zip": archive}) as disk:
        disk.describe("/weights.zip")  # its digests, which the first answer would wait for
        found = []
        for number in range(rounds):
            say(f"downloading {SIZE / 2**30:.2g} GiB, {number + 1} of {rounds}")
            found.append(probe("module", "scripts.fetch", "weights.zip", OUT, cwd=project(), **served(disk)))
        cpu, peak = ([one[name] for one in found] for name in ("cpu", "peak"))
        beyond = 100 * killed(disk)
    above = [(bytes_ - bare) / 1e6 for bytes_ in peak]
    seconds = statistics.median(one["seconds"] for one in found)
    return [
        Row("download, CPU", statistics.median(cpu), "≤", 5 * SIZE / 2**30, "s", f"{seconds:.1f} s on the clock", cpu),
        Row("download, RSS above the interpreter's", statistics.median(above), "≤", 100, "MB", samples=above),
        Row("killed half way: beyond the missing half", beyond, "≤", 2, "%"),
    ]


def killed(disk: YandexDisk) -> float:
    """Kill -9 when half has come, start again; the share of a half that went over the wire twice."""
    folder, before = project(), disk.sent()
    command = [ROOT / ".venv/bin/python", "-m", "scripts.fetch", "weights.zip", OUT]
    variables = environment(PYTHONPATH=str(ROOT), **served(disk))
    say("killing a download half way")
    first = subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = folder / f"{OUT}.part"
    while not part.exists() or part.stat().st_size < SIZE // 2:
        if first.poll() is not None:
            raise SystemExit("bench: the download ended before it could be killed")
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    kept = part.stat().st_size
    time.sleep(0.5)  # until the server has noticed
    stopped = disk.sent()
    subprocess.run(command, cwd=folder, env=variables, stdout=subprocess.DEVNULL, check=True)
    say(
        f"{(stopped - before) / 1e6:.0f} MB sent, {kept / 1e6:.0f} MB kept, {(disk.sent() - stopped) / 1e6:.0f} MB sent again"
    )
    return (disk.sent() - stopped - (SIZE - SIZE // 2)) / (SIZE / 2)


def unpack(tree: Tree, rounds: int) -> list[Row]:
    """scripts/unpack.py against unzip."""
    if not shutil.which("unzip"):
        return [Row("unpacking, of unzip's speed", None, "≥", 0.8, "x", "no unzip on this machine")]
    archive, ours, theirs = packed(), [], []
    for number in range(rounds):
        say(f"unpacking, {number + 1} of {rounds}")
        for times, command in (
            (ours, [ROOT / ".venv/bin/python", "-m", "scripts.unpack", "--all", archive]),
            (theirs, ["unzip", "-q", archive, "-d"]),
        ):
            shutil.rmtree(folder := FOLDER / "unpacked", ignore_errors=True)
            os.sync()
            start = time.perf_counter()
            subprocess.run(
                [*command, folder],
                cwd=ROOT,
                env=environment(),
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            times.append(time.perf_counter() - start)
    shutil.rmtree(folder)
    row = ratio("", theirs, ours, 0, "{theirs:.1f} s, unzip {ours:.1f} s")
    return [
        Row(
            "unpacking, of unzip's speed",
            row.value,
            "≥",
            0.8,
            "x",
            row.note,
            [b / a for a, b in zip(ours, theirs, strict=True)],
        )
    ]


def packed() -> Path:
    """An archive of SIZE bytes: half deflated, like weights, half stored."""
    path = FOLDER / "weights.zip"
    if path.exists() and path.stat().st_size == SIZE:
        return path
    say(f"making an archive of {SIZE / 2**30:.2g} GiB")
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, path.open("rb") as written:
        number = 0
        while written.seek(0, os.SEEK_END) < SIZE // 2:
            piece = bytearray(generator.randbytes(min(PIECE, SIZE // 8)))
            piece[3::4] = b"\x3d" * len(piece[3::4])  # the exponent of a small float32
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


def project() -> Path:
    """An empty folder to download in."""
    shutil.rmtree(folder := FOLDER / "project", ignore_errors=True)
    (folder / "training").mkdir(parents=True)
    shutil.copy(ROOT / "training/archives.json", folder / "training")
    return folder


def served(disk: YandexDisk) -> dict[str, str]:
    """The variables that make scripts/fetch.py ask this server."""
    return {name: value for name, value in disk.environment().items() if name.startswith(("YANDEX_DISK", "FETCH"))}
