"""Take all results that the goals need from the shared cache at once, instead of step by step.

    python3 -sESB -m scripts.steps.take_cached GOAL... -- KNOB=VALUE...

If the cache knows what an absent artifact would be, that is noted in its record.  A file is copied only if something
reads it: if it is wanted (a goal, or needed by a goal), if it will be published, or if a step that has to run reads it.
"""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from scripts.steps.cache import Cache, Result
from scripts.steps.printing import print_text
from scripts.steps.records import (
    current_digest,
    find_content,
    known_digest,
    lock_file,
    note_digest,
    read_text,
    record_path,
    write_record,
    written_digest,
)
from scripts.steps.step import CLIENT, KEPT, go_on_in_venv, is_cached, put_result, take_note
from scripts.steps.submake import run_make

AT_ONCE = 8  # files at the same time: a bucket answers slowly, and noting each digest takes 20 ms


def take_results(explained: str) -> None:
    """Take from the cache what the steps in make's explanation would write."""
    wanted = set(re.findall(r"^wanted (\S+)$", explained, re.MULTILINE))
    cache, recipes = Cache(), dict[str, str]()
    stale = set[str]()  # left to make: steps that the cache does not know, and all that depend on them
    for target, command, inputs in read_steps(explained):
        if command.startswith("publish "):
            copies = [name.partition("=") for name in inputs]
            wanted |= {
                source for place, _, source in copies if current_digest(f"{target}/{place}") != known_digest(source)
            }
            continue
        recipe = " ".join([command, ":", *(f"{name}={known_digest(name)}" for name in inputs)])
        if stale.intersection(inputs):
            stale.add(target)
            wanted |= set(inputs) - stale
        elif is_current(target, recipe) or (is_cached(target) and look_up(target, recipe, cache)):
            recipes[target] = recipe
        else:
            stale.add(target)
            wanted |= set(inputs)
    needed = [target for target in recipes if target in wanted and not is_ready(target)]
    with ThreadPoolExecutor(AT_ONCE) as beside:
        list(beside.map(lambda target: bring_result(target, recipes[target], cache), needed))


def is_ready(target: str) -> bool:
    """Tell whether a step can read `target`; an ONNX file can also be read where it is published."""
    return bool(current_digest(target)) or (
        target.startswith("build/onnx/") and bool(find_content(written_digest(target)))
    )


def read_steps(explained: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield target, command with versions, and inputs of each line TARGET=SHA COMMAND : INPUT=SHA ... | NEEDED ..."""
    for line in explained.splitlines():
        if (match := re.fullmatch(r"(\S+)=[0-9a-f]* (.*) : (.*?)(?: \|.*)?", line)) and not match[1].startswith(
            ".venv"
        ):
            yield match[1], match[2], [word.rpartition("=")[0] for word in match[3].split()]


def is_current(target: str, recipe: str) -> bool:
    """Tell whether the record of `target` is true; the file itself may be absent."""
    present = current_digest(target)
    if target.startswith(KEPT) and present not in ("", written_digest(target)):
        return True  # an own file
    return read_text(record_path("made", target)) == f"{target}={present or written_digest(target)} {recipe}"


def look_up(target: str, recipe: str, cache: Cache) -> bool:
    """If the cache knows what the step writes, note that in the record and replace `target` if it is present."""
    with lock_file(target):
        if is_current(target, recipe):  # another make has made it meanwhile
            return True
        started, hit = time.monotonic(), cache.find(target, recipe)
        if not hit:
            return False
        moved = current_digest(target) not in ("", hit.sha)
        if moved and not replace_result(target, hit, cache):
            return False
        write_record(target, hit.sha, recipe)
        take_note(target, "in the cache", started, hit=Result(hit.sha, hit.size if moved else 0))
    return True


def bring_result(target: str, recipe: str, cache: Cache) -> None:
    """Copy an absent `target` from the cache, with the digest that its record has."""
    with lock_file(target):
        started, hit = time.monotonic(), None if current_digest(target) else cache.find(target, recipe)
        if hit and hit.sha == written_digest(target) and replace_result(target, hit, cache):
            take_note(target, "from the cache", started, hit=hit)


def replace_result(target: str, hit: Result, cache: Cache) -> bool:
    """Replace `target` by the cache's file, unless it is now something that no step wrote."""
    os.makedirs(os.path.dirname(out := f".make/out/{target}"), exist_ok=True)
    if not cache.fetch(hit, out):
        return False
    with lock_file("publish", fcntl.LOCK_SH):
        if current_digest(target) not in ("", written_digest(target)):  # the user may have put a file there meanwhile
            os.remove(out)
            return False
        put_result(out, target)
        note_digest(target, hit.sha)
    print_text(f"{target}: from the cache")
    return True


def main(goals: list[str], given: list[str]) -> None:
    """Install the client for buckets if needed, ask make about the goals, and take what the cache has."""
    if os.environ["CACHE"].startswith("s3://"):
        if not current_digest(CLIENT):
            run_make("CACHE=", *(word for word in given if not word.startswith("CACHE=")), CLIENT)
        go_on_in_venv("scripts.steps.take_cached")
    explained = run_make("EXPLAIN=1", *given, *goals, stdout=subprocess.PIPE)
    if explained.returncode == 0:
        take_results(explained.stdout)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.dup2(2, 1)  # make reads standard output
    words = sys.argv[1:]
    middle = words.index("--")
    try:
        main(words[:middle], words[middle + 1 :])
    except OSError as error:
        print_text(f"warning: nothing more is taken from the cache at once: {error}")
