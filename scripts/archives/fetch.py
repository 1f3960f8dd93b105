"""Download an archive from Yandex.Disk, or take a file fetched by hand, if it is what its lock says.

    python -m scripts.archives.fetch [--from FILE] NAME OUT

NAME is an entry of training/archives.json.  The first download records its lock, training/NAME.lock.json, but not with
CI=true.  An unfinished download is OUT.part, described by OUT.part.json; the next run goes on from there.  With --from,
OUT becomes a symbolic link to FILE.  If OUT is the right archive already, it stays as it is.  Variables of the
environment: scripts/archives/yandex_disk.py.
"""

import argparse
import fcntl
import hashlib
import os
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from scripts.archives.archive_lock import check_archive, describe_change, read_lock, record_lock, write_lock
from scripts.archives.download import download_archive, find_free_name
from scripts.archives.partial import CHUNK
from scripts.archives.progress import format_bytes
from scripts.archives.yandex_disk import (
    Archive,
    Pause,
    RefusedError,
    Source,
    TroubleError,
    ask_for_archive,
    describe_difference,
    find_cause,
    read_source,
    retry_action,
)
from scripts.archives.zip_archive import IN_PARTS, is_part
from scripts.steps.printing import print_text
from scripts.steps.records import current_digest


def fetch_archive(name: str, out: Path, given: Path | None = None, pause: Pause = time.sleep) -> None:
    """Put the archive `name`, from `given` or from Yandex.Disk, to `out`; SystemExit if it is not the locked one."""
    origin = read_source(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with wait_for_lock(out):
        lock = read_lock(origin)
        if os.environ.get("CI", "").lower() in ("true", "1") and (lock is None or not lock.sha256):
            lack = "is missing" if lock is None else "has no sha256"
            raise SystemExit(
                f"{origin.lock} {lack}, and CI records none; run make weights on your own machine and commit it"
                + (f"\nOr do without it: {origin.without}" if origin.without else "")
            )
        if given is not None:
            link_given(origin, lock, given, out)
            return
        if lock and out.exists() and not describe_difference(lock, here := identify_file(out, lock)):
            record_lock(origin, lock, here, out)
            print_text(f"{out} is what {origin.lock} says; nothing to download")
            return
        if not lock and out.exists():
            there = retry_action(origin, lambda: ask_for_archive(origin), pause=pause)
            if not describe_difference(there, here := identify_file(out, there)):
                record_lock(origin, there, here, out)
                print_text(f"{out} is what Yandex.Disk has; nothing to download")
                return
        download_archive(origin, lock, out, pause)


def link_given(origin: Source, lock: Archive | None, given: Path, out: Path) -> None:
    """Make `out` a link to the archive `given`, which was fetched by hand, if it is the right one."""
    if not given.is_file():
        raise SystemExit(f"{given}: there is no such file; expected {origin.name}, fetched from {origin.link}")
    if is_part(given):
        raise SystemExit(IN_PARTS.format(given))
    if not zipfile.is_zipfile(given):
        raise SystemExit(f"{given}: no zip archive, or only the beginning of one; fetch it again from {origin.link}")
    told = lock
    if not told:
        try:
            told = ask_for_archive(origin)
        except (TroubleError, RefusedError, requests.RequestException) as error:
            print(f"{given}: not compared with Yandex.Disk: {find_cause(error)}", file=sys.stderr, flush=True)
            told = Archive(given.stat().st_size)
    here = identify_file(given, told)
    if (
        (wrong := describe_difference(told, here))
        and is_unreadable(out)
        and not describe_difference(told, identify_file(out, told))
    ):
        check_archive(given)  # the user packed it again, because the archive on Yandex.Disk cannot be read
        print_text(f"{out} cannot be read; {given} takes its place: {wrong}")
        here = told = identify_file(given, Archive(given.stat().st_size))
        write_lock(origin, told)
        print_text(f"{origin.lock}: recorded; commit it")
    elif wrong:
        other = f"not what Yandex.Disk has now: {wrong}; fetch it again from {origin.link}"
        raise SystemExit(f"{given}: {describe_change(origin, wrong) if lock else other}")
    record_lock(origin, told, here, given)
    if out.exists() and (out.samefile(given) or not describe_difference(here, identify_file(out, here))):
        print_text(f"{out}: {format_bytes(here.size)}, used as it is")
        return
    if out.is_symlink():
        out.unlink()
    elif out.exists():
        print_text(f"{out} is replaced by a link; the file is kept as {(old := find_free_name(out))}")
        out.rename(old)
    out.symlink_to(given.resolve())
    print_text(f"{out}: a link to {given.resolve()}, {format_bytes(here.size)}, sha256 {here.sha256}")


def is_unreadable(archive: Path) -> bool:
    """Tell whether `archive` exists and cannot be read."""
    try:
        if archive.exists():
            check_archive(archive)
    except SystemExit:
        return True
    return False


def identify_file(path: Path, like: Archive) -> Archive:
    """Return size and digests of a file: no digest if the size is not that of `like`, MD5 only without a SHA-256."""
    size = path.stat().st_size
    if size != like.size:
        return Archive(size)
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            sha256.update(block)
            if like.md5 and not like.sha256:
                md5.update(block)
    return Archive(size, sha256.hexdigest(), md5.hexdigest() if like.md5 and not like.sha256 else "")


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Wait, with a message, until no other process works on `path`; a killed process releases its lock."""
    guard = path.with_name(f"{path.name}.busy")
    while True:
        with guard.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print_text(f"{path}: waiting for another process that fetches it")
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                held = os.path.samestat(os.fstat(file.fileno()), guard.stat())
            except FileNotFoundError:
                held = False
            if held:  # else the other process removed the file between our open and our lock
                try:
                    yield
                finally:
                    guard.unlink()
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="given", type=Path, metavar="FILE", help="the archive, fetched by hand")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("out", type=Path, metavar="OUT")
    options = parser.parse_args()
    try:
        fetch_archive(options.name, options.out, options.given)
        if Path(".make").is_dir():  # note the digests, so that make need not read the files again
            for path in options.out, Path(f"{options.out}.lock.json"):
                current_digest(str(path))
    except OSError as error:
        raise SystemExit(f"{options.name}: {error}") from None
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
