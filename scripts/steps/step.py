"""Make one artifact, unless its record has become true meanwhile.

    python3 -sESB -m scripts.steps.step [--wanted] TARGET COMMAND TOOLS INPUT... -- NEEDED...

COMMAND writes .make/out/TARGET, which replaces TARGET only if it differs.  TOOLS are the package versions that shape
the result.  An INPUT or NEEDED file that is absent is made first.  Below training/weights/ TARGET may be an own file: a
step replaces only bytes that a step wrote.  Publishing moves an ONNX file away from build/onnx/; a result equal to the
published file is not put there again, unless --wanted.  If the shared cache (cache.py) knows what COMMAND would write,
that is taken; else the result is put into the cache.
With make -n, -q or -t no command runs; the reason why it would run is printed.
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
from scripts.steps.printing import print_text
from scripts.steps.records import (
    current_digest,
    explain_ownership,
    find_content,
    hash_file,
    known_digest,
    lock_file,
    note_digest,
    read_text,
    record_path,
    write_record,
    write_text,
    written_digest,
)
from scripts.steps.submake import run_make

SHOWN = 200  # characters of a command that failed
UNCACHED = (".venv", "build/checks/verdict.json", "build/fidelity.json", "build/plan/sm")  # true on this machine only
CLIENT = ".venv/installed-for-s3"  # installed for a cache in a bucket
KEPT = "training/weights/"  # own files may lie here
NOT_IN_ARCHIVE = 3  # status of a command that has nothing for TARGET, which is an own file


def run_step(target: str, command: str, tools: str, inputs: list[str], needed: list[str], wanted: bool) -> None:
    """Run `command` if `target` is not what its record says, or was made from other inputs."""
    out, made = f".make/out/{target}", record_path("made", target)
    keep, cached = target.startswith(KEPT), is_cached(target)
    recipe = " ".join([command, *tools.split(), ":", *(f"{name}={known_digest(name)}" for name in inputs)])
    if flags := dry_flags():
        print(f"  {target}: {explain_staleness(target, current_digest(target), recipe)}", flush=True)
        raise SystemExit("q" in flags)
    bucket = [CLIENT] if cached and os.environ["CACHE"].startswith("s3://") else []
    if absent := [name for name in [*inputs, *needed, *bucket] if not is_ready(name)]:
        if keep and current_digest(target) not in ("", written_digest(target)):
            write_record(target, written_digest(target), recipe)
            print(f"local: {target} is yours; it is used as it is", flush=True)
            return
        make_absent(target, absent)
    if bucket:
        go_on_in_venv("scripts.steps.step")
    with lock_file(target):
        with lock_file("publish", fcntl.LOCK_SH):
            present, digests = current_digest(target), {name: current_digest(name) for name in inputs}
            away = {
                name: find_content(written_digest(name))
                for name in inputs
                if not digests[name] and written_digest(name)
            }
        digests |= {name: written_digest(name) for name in away if away[name]}
        if missing := [name for name in inputs if not digests[name]]:
            raise SystemExit(f"{missing[0]} is missing; {target} is made from it")
        recipe = " ".join([command, *tools.split(), ":", *(f"{name}={digests[name]}" for name in inputs)])
        mine = written_digest(target)  # read under the lock
        expected = mine if keep and present else present
        if present and read_text(made) == f"{target}={expected} {recipe}":
            return
        # The published file, or one that it replaced
        copy = find_content(mine) if read_text(made) == f"{target}={mine} {recipe}" else ""
        reason = f"copied from {copy}" if copy else explain_staleness(target, present, recipe)
        started = time.monotonic()
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        if os.path.exists(out):
            os.remove(out)
        cache = Cache() if cached and not copy else None
        moved = not wanted and target.startswith("build/onnx/") and bool(find_content(mine)) and not present
        hit = cache.find(target, recipe) if cache else None
        if cache and hit and not cache.fetch(hit, out):
            hit = None
        if hit:
            reason = "from the cache"
        print_text(f"{target}: {reason}")
        if copy:
            subprocess.run(["cp", "--reflink=auto", copy, out], check=True)
        elif not hit:
            for name, place in away.items():
                command = command.replace(name, place)
            if not run_command(target, command, out, own=keep and bool(present) and present != mine):
                write_record(target, mine, recipe)
                take_note(target, reason, started, hit=None)
                return
        if not hit and (
            changed := [name for name in inputs if name not in away and current_digest(name) != digests[name]]
        ):
            os.remove(out)
            raise SystemExit(f"{changed[0]} changed while {target} was made from it; run make again")
        new = hit.sha if hit else hash_file(out)
        if cache and not hit:
            cache.keep(target, recipe, new, out)
        with lock_file("publish", fcntl.LOCK_SH):
            present = current_digest(target)  # the user may have put a file there meanwhile
            if keep and present and present not in (mine, new):
                print_text(f"local: {target} is not what its archive holds; it is kept and used")
                os.remove(out)
            elif new == (mine if moved else present):
                os.remove(out)
            else:
                put_result(out, target)
                note_digest(target, new)
            write_record(target, new, recipe)
            take_note(target, reason, started, hit=hit, stored=cache.stored if cache else 0)


def is_ready(name: str) -> bool:
    """Tell whether a step can read `name`; a published ONNX file counts, an archive only if it is the locked one."""
    if name.endswith(".zip"):
        return bool(sha := current_digest(name)) and sha in read_text(f"{name}.lock.json")
    return bool(current_digest(name)) or (name.startswith("build/onnx/") and bool(find_content(written_digest(name))))


def make_absent(target: str, absent: list[str]) -> None:
    """Make the absent files by make; SystemExit if that fails."""
    goals = dict.fromkeys(name.removesuffix(".lock.json") for name in absent)  # the archive comes with its lock
    if run_make(*goals, jobs=True).returncode:
        raise SystemExit(f"{target} was not made, what was there before stays: it is made from {absent[0]}")


def is_cached(target: str) -> bool:
    """Tell whether the result for `target` may be in a shared cache."""
    verdict = target.endswith(".verdict.json")
    return bool(os.environ.get("CACHE")) and not target.startswith(UNCACHED) and not verdict


def go_on_in_venv(module: str) -> None:
    """Start this program again in the Python of .venv, which has the client for buckets."""
    if os.environ.get("IN_VENV") != module and os.path.exists(python := os.environ["VENV_PYTHON"]):
        os.environ["IN_VENV"] = module
        os.execv(python, [python, "-sEB", "-m", module, *sys.argv[1:]])


def dry_flags() -> str:
    """Return which of make's flags n, q and t are set; with any of them no command may run."""
    flags = os.environ.get("MAKEFLAGS", "").split(" ")[0]
    return "" if flags.startswith("-") else "".join(flag for flag in flags if flag in "nqt")


def put_result(out: str, target: str) -> None:
    """Move a finished file to its place atomically."""
    os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
    try:
        os.replace(out, target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # training/weights or build may be a link to another disk
            raise
        os.replace(shutil.copyfile(out, f"{target}.part"), target)
        os.remove(out)


def take_note(target: str, reason: str, started: float, hit: Result | None, stored: int = 0) -> None:
    """Note for the summary when and why this step ran, and how many bytes came from the cache or went there."""
    took = {
        "run": os.environ.get("MAKE_RUN", ""),
        "reason": reason,
        "seconds": round(time.monotonic() - started, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        "stored": stored,
    }
    write_text(record_path("took", target), json.dumps(took | ({"read": hit.size} if hit else {})))
    if took["run"]:
        os.makedirs(".make/run", exist_ok=True)
        with open(f".make/run/{took['run']}", "a") as mark:  # make sees by this file that something was made
            mark.write(f"{target}\n")


def run_command(target: str, command: str, out: str, own: bool) -> bool:
    """Run `command`; return False if `target` is an `own` file and the archive has none of this name.

    SystemExit if the command fails or does not write `out`.
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


def explain_staleness(target: str, present: str, recipe: str) -> str:
    """Say in a few words what differs from the record."""
    if not (then := read_text(record_path("made", target))):
        return "new"
    before, now = then.split()[1:], recipe.split()
    inputs = {word.rpartition("=")[0] for word in before[before.index(":") + 1 :]} if ":" in before else set()
    reasons = ["altered"] if present not in ("", written_digest(target)) else []
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
    wanted = sys.argv[1] == "--wanted"
    target, command, tools, *files = sys.argv[1 + wanted :]
    middle = files.index("--")
    try:
        run_step(target, command, tools, files[:middle], files[middle + 1 :], wanted)
    except PermissionError as error:
        raise SystemExit(f"{target} was not made: {explain_ownership(str(error.filename))}") from None
    except OSError as error:
        raise SystemExit(f"{target} was not made, what was there before stays: {error}") from None
