"""Tell whether an archive on Yandex.Disk is still the locked one; nothing is downloaded.

    python -m scripts.archives.update [--accept] NAME...

Exit status, the largest of all names: 0 it is the locked one, or --accept has recorded the present one; 1 it is another
one; 2 it cannot be told.
"""

import argparse
import sys
import traceback

from scripts.archives.archive_lock import read_lock, write_lock
from scripts.archives.yandex_disk import (
    Archive,
    Source,
    ask_for_archive,
    describe_difference,
    read_source,
    retry_action,
)

CURRENT, CHANGED, UNKNOWN = 0, 1, 2


def check_for_update(name: str, accept: bool = False) -> int:
    """Print the locked archive beside the one on Yandex.Disk; return CURRENT, CHANGED or UNKNOWN."""
    origin = read_source(name)
    lock = read_lock(origin)
    there = retry_action(origin, lambda: ask_for_archive(origin))
    state, verdict = compare_with_lock(lock, there)
    print(format_comparison(origin, lock, there))
    print(f"{name}: {verdict}")
    if state == CURRENT:
        return CURRENT
    if accept:
        write_lock(origin, there)
        print(f"{origin.lock}: recorded; commit it, and make fetches what changed")
        return CURRENT
    print(f"take it: make update ACCEPT=1 (records it in {origin.lock})")
    return state


def compare_with_lock(lock: Archive | None, there: Archive) -> tuple[int, str]:
    """Return the state of the lock and a sentence about it."""
    if lock is None:
        return UNKNOWN, "there is no lock yet to compare with; the first download records one"
    if wrong := describe_difference(lock, there):
        return CHANGED, f"changed: {', '.join(word.split()[0] for word in wrong.split(', '))}"
    if (lock.sha256 and there.sha256) or (lock.md5 and there.md5) or lock.modified == there.modified != "":
        return CURRENT, "current"
    return UNKNOWN, "the same size, but no digest to compare; only a download can tell"


def format_comparison(origin: Source, lock: Archive | None, there: Archive) -> str:
    """Return a table of what the lock says and what the API says now."""
    rows = [("", "locked", "on Yandex.Disk now")]
    for key in ("size", "modified", "md5", "sha256"):
        rows.append((key, str(getattr(lock, key, "")) or "-", str(getattr(there, key)) or "-"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in [origin.name, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept", action="store_true", help="record what is on Yandex.Disk now")
    parser.add_argument("names", nargs="+", metavar="NAME")
    options = parser.parse_args()
    worst = CURRENT
    for name in options.names:
        try:
            status = check_for_update(name, options.accept)
        except SystemExit as trouble:
            print(trouble, file=sys.stderr)
            status = UNKNOWN
        except Exception:  # Python would exit with 1, which here means "changed"
            traceback.print_exc()
            status = UNKNOWN
        worst = max(worst, status)
    sys.exit(worst)


if __name__ == "__main__":
    main()
