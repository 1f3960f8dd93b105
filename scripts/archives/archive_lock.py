"""The lock of an archive (training/NAME.lock.json): read it, write it, and compare an archive with it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from scripts.archives.yandex_disk import Archive, Source, describe_difference, parse_archive, read_json
from scripts.archives.zip_archive import open_archive
from scripts.steps.printing import print_text


def read_lock(origin: Source) -> Archive | None:
    """Return what the lock says about the archive, None if there is no lock."""
    if not origin.lock.exists():
        return None
    if archive := parse_archive(read_json(origin.lock)):
        return archive
    raise SystemExit(f"{origin.lock}: expected a size in bytes and sha256, md5, modified as text; see git log")


def write_lock(origin: Source, archive: Archive) -> None:
    """Write the lock of the archive."""
    known = {key: value for key, value in asdict(archive).items() if value != ""}
    draft = origin.lock.with_name(f"{origin.lock.name}~")
    draft.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    draft.replace(origin.lock)


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
    """Write the lock if there is none with a sha256: what the old lock or the API `told`, and the sha256 of `got`.

    SystemExit, and no lock is written, if the archive at `path` cannot be read.
    """
    lock = read_lock(origin)
    if not (lock and lock.sha256):
        try:
            check_archive(path)
        except SystemExit as unreadable:
            raise SystemExit(
                f"{unreadable}\n{origin.lock} is not recorded; with an archive that you packed again: {origin.by_hand}"
            ) from None
        write_lock(origin, replace(told, sha256=got.sha256))
        print_text(f"{origin.lock}: recorded, as this is the first archive; commit it")


def check_archive(archive: Path) -> None:
    """Raise SystemExit, with the reason, if the list of the archive's members cannot be read or is refused."""
    with open_archive(archive) as (_, members):
        if not members:
            raise SystemExit(f"{archive}: a zip archive without a file in it; expected the models' files")
