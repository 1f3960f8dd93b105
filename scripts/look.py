"""Before Make decides: take note of every file that moved, finish a publication that was cut short.

    python3 -sES scripts/look.py FILE...

Prints a token of this run, by which steps and the summary know what was made in it.
"""

import fcntl
import os
import sys
import time

from records import digest, lock, look, read, record


def take_notes(files: list[str]) -> None:
    """Bring .make/seen up to date with each of `files` and each file that it has a note of."""
    os.makedirs(".make/seen", exist_ok=True)
    noted = {name.replace("%", "/") for name in os.listdir(".make/seen") if not name.endswith("~")}
    moved = [path for path in noted.union(files) if read(record("seen", path)).split()[1:] != look(path)]
    if moved:
        from concurrent.futures import ThreadPoolExecutor  # hashing releases the interpreter's lock

        list(ThreadPoolExecutor().map(digest, moved))


if __name__ == "__main__":
    if os.path.isdir(".make/journal") and (journals := os.listdir(".make/journal")):
        from publish import finish

        with lock("publish"):
            for journal in journals:
                finish(f".make/journal/{journal}")
    with lock("publish", fcntl.LOCK_SH):
        take_notes(sys.argv[1:])
    print(time.time_ns())
