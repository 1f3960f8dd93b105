"""Unpack one member of a zip archive, or all of it; nothing is written if the archive is damaged or hostile.

    python -m scripts.archives.unpack ARCHIVE MEMBER OUT
    python -m scripts.archives.unpack --all ARCHIVE FOLDER [--tree PATTERN]

The archive may hold its tree in one or two more folders (zip -r weights.zip training/weights): MEMBER, or PATTERN
("CT-RATE/*"), which some member matches, shows where the tree begins.  A file that already has the member's content is
left untouched.  With --all, a file with other content is replaced only if a step wrote it: FOLDER/.unpacked lists such
files in the format of sha256sum, and make's records list them too.
"""

import argparse
import difflib
import errno
import glob
import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.archives.progress import Progress, format_bytes
from scripts.archives.zip_archive import (
    DRAFTS,
    LIST,
    compare_content,
    list_tops,
    matches_pattern,
    open_archive,
    read_blocks,
    select_members,
)
from scripts.steps.records import hash_file, written_digest

NOT_IN_ARCHIVE = 3  # exit status, see scripts/steps/step.py


def unpack_member(archive: Path, member: str, out: Path) -> None:
    """Write the content of `member` to `out`; the archive may hold it below one or two more folders.

    SystemExit(NOT_IN_ARCHIVE) if the archive has no such member, and an own file lies where a step would put it.
    """
    target = Path(str(out).removeprefix(".make/out/"))
    with open_archive(archive) as (content, members):
        if target.is_file() and not any(
            matches_pattern(name, root, glob.escape(member)) for name in members for root in list_tops(name)
        ):
            print(f"local: {target} is yours, {archive.name} has none; it is used", flush=True)
            raise SystemExit(NOT_IN_ARCHIVE)
        suggest_files(target)
        info = select_members(archive, members, glob.escape(member))[member]
        if out.is_file() and compare_content(content, info, out):
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        check_free_space(out.parent, info.file_size, archive)
        draft = out.with_name(f"{out.name}.part")
        draft.unlink(missing_ok=True)  # left by a run that was killed
        try:
            extract_member(content, info, draft)
            draft.replace(out)
        finally:
            draft.unlink(missing_ok=True)


def suggest_files(target: Path) -> None:
    """Print which files beside an absent `target` may be meant for it: those with a similar name."""
    if target.exists() or not target.parent.is_dir():
        return
    names = sorted(path.name for path in target.parent.iterdir() if path.is_file())
    stems = {name: name.partition(".")[0].lower() for name in names}
    near = difflib.get_close_matches(target.stem.lower(), sorted(set(stems.values())), cutoff=0.85)
    for name in names:
        if stems[name] in near and not name.endswith(".part"):
            print(
                f"{target.parent / name} is not read; if it is your own model: mv {target.parent / name} {target}",
                flush=True,
            )


def unpack_all(
    archive: Path,
    folder: Path,
    *,
    tree: str = "",
    is_ours: Callable[[str, str], bool],
    note_written: Callable[[str, str], None],
    progress: Callable[[int], None] = lambda count: None,
) -> list[Path]:
    """Put every file of the archive's `tree` into `folder`; return the files there that differ and were kept.

    `is_ours(path, sha256)` tells whether a step wrote this content there.  `note_written(path, sha256)` is called for
    each file that was written, or that was there already.
    All new content is written and checked beside the tree before the first file of the tree is replaced.
    """
    with open_archive(archive) as (content, members):
        kept, new = [], []
        for name, info in (select_members(archive, members, tree) if tree else members).items():
            target = folder / name
            if target.is_file() and (digest := compare_content(content, info, target)):
                note_written(str(target), digest)
                progress(info.file_size)
            elif not is_replaceable(target, folder, is_ours):
                kept.append(target)
                progress(info.file_size)
            else:
                new.append((target, info))
        folder.mkdir(parents=True, exist_ok=True)
        check_free_space(folder, sum(info.file_size for _, info in new), archive)
        drafts = folder / DRAFTS
        shutil.rmtree(drafts, ignore_errors=True)  # left by a run that was killed
        try:
            drafts.mkdir()
            digests = []
            for target, info in new:  # under its final name, because the file system may refuse the name
                place = target.relative_to(folder)
                with explain_name_errors(archive, place):
                    (drafts / place).parent.mkdir(parents=True, exist_ok=True)
                    digests.append(extract_member(content, info, drafts / place, progress))
            for (target, _), digest in zip(new, digests, strict=True):
                move_draft(drafts / target.relative_to(folder), target)
                note_written(str(target), digest)
        finally:
            shutil.rmtree(drafts, ignore_errors=True)
    return kept


def is_replaceable(target: Path, folder: Path, is_ours: Callable[[str, str], bool]) -> bool:
    """Tell whether `target` is free, or a file that a step wrote and nobody has changed since."""
    above = target.relative_to(folder).parents
    if any(os.path.lexists(folder / parent) and not (folder / parent).is_dir() for parent in above):
        return False
    if not os.path.lexists(target):
        return True
    return target.is_file() and not target.is_symlink() and is_ours(str(target), hash_file(str(target)))


@contextmanager
def explain_name_errors(archive: Path, name: Path) -> Iterator[None]:
    """Turn the error of a file system that does not take this name into a SystemExit that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG, errno.EEXIST):
            raise
        beside = " beside the others" if error.errno == errno.EEXIST else ""
        raise SystemExit(
            f"{archive}: not unpacked, what was there before stays: {str(name)!r} is no name that this file system "
            f"takes{beside} ({error.strerror}); unpack on another one, or pack the archive anew with another name"
        ) from None


def extract_member(
    content: zipfile.ZipFile, info: zipfile.ZipInfo, out: Path, progress: Callable[[int], None] = lambda count: None
) -> str:
    """Write the member to `out`, with the usual mode of a new file; return its SHA-256."""
    digest = hashlib.sha256()
    with out.open("xb") as file:
        for block in read_blocks(content, info):
            file.write(block)
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def move_draft(draft: Path, target: Path) -> None:
    """Move a finished file to its place atomically, also if a folder of the tree is on another disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(f"{target.name}.part")
        shutil.copyfile(draft, beside)
        beside.replace(target)


def check_free_space(folder: Path, needed: int, archive: Path) -> None:
    """Raise SystemExit if the disk has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        where = folder.resolve()
        raise SystemExit(
            f"{archive} needs {format_bytes(needed)} in {where}, {format_bytes(free)} are free; make room first"
        )


def unpack_tree(archive: Path, folder: Path, tree: str) -> None:
    """Unpack all members, list them in `folder`/.unpacked, and print which files were kept and the archive's size."""
    account = read_list(folder)
    total = 0
    with open_archive(archive) as (_, members):
        total = sum(info.file_size for info in (select_members(archive, members, tree) if tree else members).values())
    meter = Progress(f"unpacking {archive.name}", total)

    def is_ours(path: str, digest: str) -> bool:
        return digest in (account.get(str(Path(path).relative_to(folder))), written_digest(path))

    def note_written(path: str, digest: str) -> None:
        name = str(Path(path).relative_to(folder))
        if account.get(name) != digest:
            account[name] = digest
            with (folder / LIST).open("a", encoding="utf-8") as file:
                file.write(f"{digest}  {name}\n")

    try:
        kept = unpack_all(archive, folder, tree=tree, is_ours=is_ours, note_written=note_written, progress=meter.add)
    finally:
        meter.close()
    for path in kept:
        print(f"local: {path} is not what {archive.name} holds; it is kept")
    place = archive.resolve() if archive.is_symlink() else archive
    print(f"{folder}: all of {archive.name}; rm {place} would free {format_bytes(place.stat().st_size)}", flush=True)


def read_list(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that was unpacked into `folder`; the last line about a file counts."""
    path = folder / LIST
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="unpack the whole tree")
    parser.add_argument("--tree", default="", metavar="PATTERN", help="what the tree's top folder holds")
    parser.add_argument("archive", type=Path, metavar="ARCHIVE")
    parser.add_argument("names", nargs="+", metavar="MEMBER OUT | FOLDER")
    options = parser.parse_args()
    if len(options.names) != (1 if options.all else 2):
        parser.error("expected ARCHIVE MEMBER OUT, or --all ARCHIVE FOLDER")
    if options.all:
        unpack_tree(options.archive, Path(options.names[0]), options.tree)
    else:
        unpack_member(options.archive, options.names[0], Path(options.names[1]))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        raise SystemExit(f"not unpacked: {error}") from None
