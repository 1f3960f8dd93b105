"""Make one artifact, unless its record is true by now.

    python3 -sES -m scripts.steps.step [--keep] [--moved] [--cached] TARGET COMMAND TOOLS INPUT...

COMMAND writes .make/out/TARGET, which takes TARGET's place only if it differs.  TOOLS are the versions that shape it.
--keep: TARGET may be the user's own; only bytes that a step wrote are ever replaced.
--moved: TARGET went where it is published; the same bytes once more are not left here.
--cached: the shared cache (see cache.py) may know what COMMAND would write, or else is told.
"""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

from scripts.steps.cache import Cache, Result
from scripts.steps.records import digest, found, lock, note, owned, read, record, sha256, write, wrote
from scripts.steps.tell import tell

SHOWN = 200  # characters of a command that failed
FLAGS = ("--keep", "--moved", "--cached")
KEPT = "training/weights/"  # where the user's own files may lie
NOT_IN_ARCHIVE = 3  # status of a command that has nothing for TARGET, where the user has laid a file of their own


def step(target: str, command: str, tools: str, *inputs: str, flags: set[str]) -> None:
    """Run `command` if `target` is not what its record says, or was made from something else."""
    out, made = f".make/out/{target}", record("made", target)
    keep, moved = "--keep" in flags, "--moved" in flags
    with lock(target):
        with lock("publish", fcntl.LOCK_SH):
            present, digests = digest(target), {name: digest(name) for name in inputs}
            away = {name: found(wrote(name)) for name in inputs if not digests[name] and wrote(name)}
        digests |= {name: wrote(name) for name in away if away[name]}
        if missing := [name for name in inputs if not digests[name]]:
            raise SystemExit(f"{missing[0]} is missing; {target} is made from it")
        recipe = " ".join([command, *tools.split(), ":", *(f"{name}={digests[name]}" for name in inputs)])
        mine = wrote(target)  # now that no other make is at it
        expected = mine if keep and present else present
        if present and read(made) == f"{target}={expected} {recipe}":
            return
        copy = found(mine) if read(made) == f"{target}={mine} {recipe}" else ""  # published, or replaced there
        reason, started = f"copied from {copy}" if copy else why(target, present, recipe), time.monotonic()
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        if os.path.exists(out):
            os.remove(out)
        cache = Cache() if "--cached" in flags and not copy else None
        hit = cache.find(target, recipe) if cache else None
        if cache and hit and not cache.fetch(hit, out):
            hit = None
        if hit:
            reason = "from the cache"
        tell(f"{target}: {reason}")
        if copy:
            subprocess.run(["cp", "--reflink=auto", copy, out], check=True)
        elif not hit:
            for name, place in away.items():
                command = command.replace(name, place)
            if not run(target, command, out, own=keep and bool(present) and present != mine):
                write(made, f"{target}={mine} {recipe}")
                take_note(target, reason, started, hit=None)
                return
        if not hit and (changed := [name for name in inputs if name not in away and digest(name) != digests[name]]):
            os.remove(out)
            raise SystemExit(f"{changed[0]} changed while {target} was made from it; run make again")
        new = hit.sha if hit else sha256(out)
        if cache and not hit:
            cache.keep(target, recipe, new, out)
        with lock("publish", fcntl.LOCK_SH):
            present = digest(target)  # the user may have been here meanwhile
            if keep and present and present not in (mine, new):
                tell(f"local: {target} is not what its archive holds; it is kept and used")
                os.remove(out)
            elif new == (mine if moved else present):
                os.remove(out)
            else:
                put(out, target)
                note(target, new)
            write(made, f"{target}={new} {recipe}")
            take_note(target, reason, started, hit=hit, stored=cache.stored if cache else 0)


def put(out: str, target: str) -> None:
    """Move a finished file to its place at one stroke."""
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    try:
        os.replace(out, target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # training/weights or build may be a link to another disk
            raise
        os.replace(shutil.copyfile(out, f"{target}.part"), target)
        os.remove(out)


def take_note(target: str, reason: str, started: float, hit: Result | None, stored: int = 0) -> None:
    """Write down for the summary when and why this step ran, and what came from the cache or went there."""
    took = {
        "run": os.environ.get("MAKE_RUN", ""),
        "reason": reason,
        "seconds": round(time.monotonic() - started, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        "stored": stored,
    }
    write(record("took", target), json.dumps(took | ({"read": hit.size} if hit else {})))


def run(target: str, command: str, out: str, own: bool) -> bool:
    """Run `command`; raise SystemExit if it fails or does not write `out`.

    False if it has nothing for `target`, which is the user's `own`.
    """
    status = subprocess.run(["bash", "-euo", "pipefail", "-c", command]).returncode
    if status == 0 and os.path.exists(out):
        return True
    if status == NOT_IN_ARCHIVE and own:
        return False
    if os.path.exists(out):
        os.remove(out)
    free = shutil.disk_usage(".").free // 1_000_000
    full = f"only {free} MB are free on this disk; `make clean` frees some\n" if free < 200 else ""
    happened = f"failed with status {status}" if status else f"wrote nothing to {out}"
    shown = command if len(command) <= SHOWN else f"{command[:SHOWN]} …"
    raise SystemExit(f"{full}{target} was not made, what was there before stays; the command {happened}:\n  {shown}")


def why(target: str, present: str, recipe: str) -> str:
    """Say in a few words what is no longer as the record has it."""
    if not (then := read(record("made", target))):
        return "new"
    before, now = then.split()[1:], recipe.split()
    inputs = {word.rpartition("=")[0] for word in before[before.index(":") + 1 :]} if ":" in before else set()
    reasons = ["altered"] if present not in ("", wrote(target)) else []
    for word in now:
        name = word.rpartition("=")[0]
        if word not in before and name in inputs:
            reasons.append(f"{os.path.basename(name)} changed")
        elif word not in before and word in now[now.index(":") + 1 :]:
            reasons.append(f"now made from {os.path.basename(name)}")
        elif word not in before:
            reasons.append(f"now {word}")
    return ", ".join(
        dict.fromkeys(reasons or [f"no longer {word}" for word in before if word not in now] or ["absent"])
    )


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    words = sys.argv[1:]
    flags = {word for word in words[: len(FLAGS)] if word in FLAGS}
    try:
        step(*words[len(flags) :], flags=flags)
    except PermissionError as error:
        raise SystemExit(f"{words[len(flags)]} was not made: {owned(str(error.filename))}") from None
    except OSError as error:
        raise SystemExit(f"{words[len(flags)]} was not made, what was there before stays: {error}") from None
