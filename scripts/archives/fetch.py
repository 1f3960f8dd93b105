"""Download an archive from Yandex.Disk, or take one fetched by hand, if it is what its lock says.

    python -m scripts.archives.fetch [--from FILE] NAME OUT

NAME is an entry of training/archives.json; its lock, training/NAME.lock.json, is recorded by the first download, but
not under CI=true.  What has come so far is OUT.part, and OUT.part.json says of what; the next run goes on from there.
With --from, OUT becomes a symbolic link to FILE.  An OUT that is right already is left as it is.  Variables of the
environment: scripts/archives/yandex_disk.py.
"""

import argparse
import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import requests

from scripts.archives.partial import CHUNK, Partial
from scripts.archives.progress import Progress, format_bytes
from scripts.archives.unpack import IN_PARTS, is_part, open_archive
from scripts.archives.yandex_disk import (
    Archive,
    Pause,
    RefusedError,
    Source,
    TroubleError,
    ask_for_address,
    ask_for_archive,
    check_https,
    describe_difference,
    find_cause,
    make_busy_error,
    read_lock,
    read_source,
    read_timeouts,
    retry_action,
    write_lock,
)
from scripts.steps.printing import print_text
from scripts.steps.records import current_digest


def fetch_archive(name: str, out: Path, given: Path | None = None, pause: Pause = time.sleep) -> None:
    """Make `out` the archive `name`, from `given` or from Yandex.Disk; SystemExit if it is not what the lock says."""
    origin = read_source(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with wait_for_lock(out):
        lock = read_lock(origin)
        if os.environ.get("CI", "").lower() in ("true", "1") and (lock is None or not lock.sha256):
            lack = "is missing" if lock is None else "has no sha256"
            raise SystemExit(
                f"{origin.lock} {lack}, and CI records none; run make weights on a desk and commit it"
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


def download_archive(origin: Source, lock: Archive | None, out: Path, pause: Pause) -> None:
    """Bring the archive to `out`, in as many tries as it takes."""
    with Partial(out) as part:
        try:
            there = retry_action(
                origin,
                lambda: continue_download(origin, lock, part),
                reached=lambda: part.best,
                pause=pause,
                kept=lambda: f"; {format_bytes(part.size)} of it wait in {part.path}" if part.size else "",
            )
        except KeyboardInterrupt:
            print(f"\n{origin.name}: stopped; the next run goes on from {format_bytes(part.size)}", file=sys.stderr)
            sys.exit(130)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise SystemExit(f"{part.path}: {error.strerror}; free some, the next run goes on from there") from None
        got = replace(there, sha256=part.sha256.hexdigest())
        if wrong := describe_difference(there, replace(got, md5=part.md5.hexdigest() if part.md5 else "")):
            bad = part.set_aside()
            raise SystemExit(
                f"{origin.name}: what came is not what Yandex.Disk announced: {wrong}; it is set aside as {bad}, "
                f"the next run starts anew\n{origin.way_out}"
            )
        if lock and (wrong := describe_difference(lock, got)):  # the API gave no sha256 to compare beforehand
            raise SystemExit(f"{part.set_aside()}: {describe_change(origin, wrong)}")
        if out.exists() and not out.is_symlink():
            print_text(f"{out} was another archive; it is kept as {(old := find_free_name(out))}")
            out.rename(old)
        part.finish(out)
    record_lock(origin, there, got, out)
    print_text(f"{out}: {format_bytes(got.size)}, sha256 {got.sha256}")


def continue_download(origin: Source, lock: Archive | None, part: Partial) -> Archive:
    """Go on from where `part` is to its end; return what the API says the archive is."""
    there = ask_for_archive(origin)
    check_against_lock(origin, lock, there)
    part.belong(there)
    if part.size == there.size:
        return there
    check_free_space(part.path, there.size - part.size, origin.name)
    headers = {"Accept-Encoding": "identity"}
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
        if part.guard:
            headers["If-Range"] = part.guard
    with requests.get(ask_for_address(origin), headers=headers, stream=True, timeout=read_timeouts()) as response:
        check_https(origin, response.url)
        seek_to_answer(response, part, there.size)
        part.guarded_by(response.headers)
        with closing(Progress(origin.name, there.size, part.size)) as progress:
            while block := response.raw.read1(min(CHUNK, there.size + 1 - part.size)):
                if part.size + len(block) > there.size:
                    part.restart()
                    raise TroubleError(f"more came than the {format_bytes(there.size)} announced")
                part.write(block)
                progress.add(len(block))
    if part.size < there.size:
        raise TroubleError(f"the connection ended at {format_bytes(part.size)} of {format_bytes(there.size)}")
    return there


def seek_to_answer(response: requests.Response, part: Partial, size: int) -> None:
    """Put `part` to the byte at which the answer begins; raise TroubleError if it is not an answer to go on with."""
    status, kind = response.status_code, response.headers.get("Content-Type", "")
    if status in (403, 404, 410):
        raise TroubleError(f"the download address has expired ({status})")
    if status == 416:
        part.restart()
        raise TroubleError("the server has no such range (416)")
    if status == 429 or status >= 500:
        raise make_busy_error(response, "")
    if status not in (200, 206):
        raise RefusedError(f"the storage host answered {status}")
    if kind.startswith("text/html"):
        raise TroubleError("a web page came instead of the archive; a portal or a captcha?")
    if status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != part.size or match[2] not in (str(size), "*"):
            part.restart()
            raise TroubleError(f"another range came than the one asked for, of {size} bytes")
        return
    length = response.headers.get("Content-Length")
    if part.size and ("Content-Range" in response.headers or length == str(size - part.size)):
        part.restart()  # some of the rest, called all of it: asked again from the first byte
        raise TroubleError("the server answered a range as if it were all (200)")
    if length and length != str(size):
        part.restart()
        raise TroubleError(f"the file is being replaced: {length} bytes instead of {size}")
    if part.size:
        print("the server starts from the first byte again", file=sys.stderr, flush=True)
        part.restart()


def check_against_lock(origin: Source, lock: Archive | None, there: Archive) -> None:
    """Raise SystemExit if the archive on Yandex.Disk is not the locked one."""
    if lock and (wrong := describe_difference(lock, there)):
        raise SystemExit(describe_change(origin, wrong))


def describe_change(origin: Source, wrong: str) -> str:
    """Return the message about an archive that is not the locked one."""
    return (
        f"{origin.name} is not the one in {origin.lock}: {wrong}\n"
        f"Look at it: make update; take it: make update ACCEPT=1; or go on with the old one: {origin.by_hand}"
    )


def record_lock(origin: Source, told: Archive, got: Archive, path: Path) -> None:
    """Record the lock if there is none, or none with a sha256, as `told` by it or by the API and completed by `got`.

    SystemExit, and no lock, if `path`, the archive, cannot be read.
    """
    lock = read_lock(origin)
    if not (lock and lock.sha256):
        try:
            check_archive(path)
        except SystemExit as unreadable:
            raise SystemExit(
                f"{unreadable}\n{origin.lock} is not recorded; of what you pack anew: {origin.by_hand}"
            ) from None
        write_lock(origin, replace(told, sha256=got.sha256))
        print_text(f"{origin.lock}: recorded, as it was the first time; commit it")


def check_archive(archive: Path) -> None:
    """Raise SystemExit, with the reason, if the list of what `archive` holds cannot be read or is refused."""
    with open_archive(archive) as (_, members):
        if not members:
            raise SystemExit(f"{archive}: a zip archive without a file in it; expected the models' files")


def is_unreadable(archive: Path) -> bool:
    """Tell whether `archive` is there and cannot be read."""
    try:
        if archive.exists():
            check_archive(archive)
    except SystemExit:
        return True
    return False


def link_given(origin: Source, lock: Archive | None, given: Path, out: Path) -> None:
    """Make `out` a link to an archive that was fetched by hand, if it is the right one."""
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
        check_archive(given)  # it was packed anew, since what Yandex.Disk has cannot be read
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
        print_text(f"{out} makes room for a link; it is kept as {(old := find_free_name(out))}")
        out.rename(old)
    out.symlink_to(given.resolve())
    print_text(f"{out}: a link to {given.resolve()}, {format_bytes(here.size)}, sha256 {here.sha256}")


def identify_file(path: Path, like: Archive) -> Archive:
    """Return what the file is: digests only if it has the size of `like`, MD5 only if `like` has no SHA-256."""
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


def check_free_space(path: Path, needed: int, name: str) -> None:
    """Raise SystemExit if the disk has not `needed` bytes free."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise SystemExit(
            f"{name} needs {format_bytes(needed)} more in {path.parent.resolve()}, {format_bytes(free)} are free; "
            "make room first"
        )


def find_free_name(path: Path) -> Path:
    """Return a free name for a file that `path` was."""
    number = 0
    while (old := path.with_name(f"{path.name}.old{number or ''}")).exists():
        number += 1
    return old


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Wait, and say so, until no other process works on `path`; whoever is killed has let go of it."""
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
            if held:  # else the one before removed it between our opening and locking it
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
        if Path(".make").is_dir():  # noted, so that make need not look again
            for path in options.out, Path(f"{options.out}.lock.json"):
                current_digest(str(path))
    except OSError as error:
        raise SystemExit(f"{options.name}: {error}") from None
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
