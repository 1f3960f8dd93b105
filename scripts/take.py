"""Take from the shared cache, in one go, what make would otherwise ask it for step by step.

    make EXPLAIN=1 GOAL... | python3 -sES scripts/take.py WANTED... [-- NEVER...]

What an absent artifact would be is noted if the cache knows it.  Copied is only what somebody reads: each WANTED file,
what is to be published, and the inputs of a step that will have to run.  Nobody is asked for the NEVER files.
"""

import fcntl
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from cache import Cache, Result
from records import digest, found, known, lock, note, read, record, write, wrote
from step import KEPT, put, take_note


def take(explained: str, wanted: set[str], never: set[str]) -> None:
    """Take what the steps that make says would write."""
    cache, recipes = Cache(), dict[str, str]()
    stale = set[str]()  # what make will look after: steps that the cache does not know, and all behind them
    for target, command, inputs in steps(explained):
        recipe = " ".join([command, ":", *(f"{name}={known(name)}" for name in inputs)])
        if command == "publish":
            wanted |= {name for name in inputs if digest(target) != known(name)}
        elif stale.intersection(inputs):
            stale.add(target)
        elif not (current(target, recipe) or (target not in never and expect(target, recipe, cache))):
            stale.add(target)
            wanted |= set(inputs)
        else:
            recipes[target] = recipe
    needed = [target for target in recipes if target in wanted and not ready(target)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as beside:
        copied = list(beside.map(lambda target: copy(target, recipes[target], cache), needed))
    for target, sha in zip(needed, copied, strict=True):
        if sha:
            note(target, sha)


def ready(target: str) -> bool:
    """Tell whether a step can read `target`: an ONNX file is read where it is published."""
    return bool(digest(target)) or (target.startswith("build/onnx/") and bool(found(wrote(target))))


def steps(explained: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield target, command with versions, and inputs of each line TARGET=SHA COMMAND : INPUT=SHA ... | NEEDED ..."""
    for line in explained.splitlines():
        if (match := re.fullmatch(r"(\S+)=[0-9a-f]* (.*) : (.*?)(?: \|.*)?", line)) and not match[1].startswith(
            ".venv"
        ):
            yield match[1], match[2], [word.rpartition("=")[0] for word in match[3].split()]


def current(target: str, recipe: str) -> bool:
    """Tell whether there is nothing to do for `target`, be it present or not."""
    present = digest(target)
    own = present and target.startswith(KEPT)
    return bool(own) or read(record("made", target)) == f"{target}={present or wrote(target)} {recipe}"


def expect(target: str, recipe: str, cache: Cache) -> bool:
    """Write down what the step of an absent `target` would write, if the cache knows that."""
    with lock(target):
        started, hit = time.monotonic(), None if digest(target) else cache.find(target, recipe)
        if hit:
            write(record("made", target), f"{target}={hit.sha} {recipe}")
            take_note(target, "in the cache", started, hit=Result(hit.sha, 0))
    return bool(hit)


def copy(target: str, recipe: str, cache: Cache) -> str:
    """Copy an absent `target`, as its record has it; return its SHA-256, "" if that is not to be had."""
    with lock(target):
        started, out = time.monotonic(), f".make/out/{target}"
        os.makedirs(os.path.dirname(out), exist_ok=True)
        hit = cache.find(target, recipe)
        if not hit or hit.sha != wrote(target) or not cache.fetch(hit, out):
            return ""
        print(f"{target}: from the cache\n", end="", flush=True)  # in one piece, beside the others'
        with lock("publish", fcntl.LOCK_SH):
            put(out, target)
        take_note(target, "from the cache", started, hit=hit)
    return hit.sha


if __name__ == "__main__":
    words = sys.argv[1:]
    wanted, never = words[: words.index("--")], words[words.index("--") + 1 :]
    try:
        take(sys.stdin.read(), set(wanted), set(never))
    except OSError as error:
        raise SystemExit(f"nothing more was taken from the cache: {error}") from None
