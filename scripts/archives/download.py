"""Download an archive from Yandex.Disk, from where an earlier run stopped; fetch.py decides whether to download."""

import errno
import re
import shutil
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import requests

from scripts.archives.archive_lock import check_against_lock, describe_change, record_lock
from scripts.archives.partial import CHUNK, Partial
from scripts.archives.progress import Progress, format_bytes
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
    make_busy_error,
    read_timeouts,
    retry_action,
)
from scripts.steps.printing import print_text


def download_archive(origin: Source, lock: Archive | None, out: Path, pause: Pause) -> None:
    """Download the archive to `out`, in several tries if needed."""
    with Partial(out) as part:
        try:
            there = retry_action(
                origin,
                lambda: continue_download(origin, lock, part),
                reached=lambda: part.best,
                pause=pause,
                kept=lambda: f"; {format_bytes(part.size)} of it are kept in {part.path}" if part.size else "",
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
                f"{origin.name}: the download is not what Yandex.Disk announced: {wrong}; it is kept as {bad}, "
                f"the next run starts from the first byte\n{origin.way_out}"
            )
        if lock and (wrong := describe_difference(lock, got)):  # the API gave no sha256 to compare before the download
            raise SystemExit(f"{part.set_aside()}: {describe_change(origin, wrong)}")
        if out.exists() and not out.is_symlink():
            print_text(f"{out} was another archive; it is kept as {(old := find_free_name(out))}")
            out.rename(old)
        part.finish(out)
    record_lock(origin, there, got, out)
    print_text(f"{out}: {format_bytes(got.size)}, sha256 {got.sha256}")


def continue_download(origin: Source, lock: Archive | None, part: Partial) -> Archive:
    """Download what `part` still lacks; return what the API says about the archive."""
    there = ask_for_archive(origin)
    check_against_lock(origin, lock, there)
    part.begin(there)
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
        part.note_guard(response.headers)
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
    """Make `part` end where the answer begins; raise TroubleError or RefusedError if the answer cannot be used."""
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
        part.restart()  # the server sent only the rest with status 200: ask again from the first byte
        raise TroubleError("the server answered a range as if it were all (200)")
    if length and length != str(size):
        part.restart()
        raise TroubleError(f"the file is being replaced: {length} bytes instead of {size}")
    if part.size:
        print("the server sends the archive from the first byte again", file=sys.stderr, flush=True)
        part.restart()


def check_free_space(path: Path, needed: int, name: str) -> None:
    """Raise SystemExit if the disk has less than `needed` bytes free."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise SystemExit(
            f"{name} needs {format_bytes(needed)} more in {path.parent.resolve()}, {format_bytes(free)} are free; "
            "make room first"
        )


def find_free_name(path: Path) -> Path:
    """Return a free name under which the present file at `path` can be kept."""
    number = 0
    while (old := path.with_name(f"{path.name}.old{number or ''}")).exists():
        number += 1
    return old
