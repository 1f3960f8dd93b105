"""Unpack one member of a zip archive, or the whole tree in it; nothing is written unless the archive is harmless.

    python -m scripts.archives.unpack ARCHIVE MEMBER OUT
    python -m scripts.archives.unpack --all ARCHIVE FOLDER [--tree PATTERN]

The archive may hold its tree in one or two more folders (zip -r weights.zip training/weights): they are found by
MEMBER, or by PATTERN ("CT-RATE/*"), which some member matches.  A file whose content is the member's is left untouched.
With --all, a file that differs is replaced only if a step wrote it (FOLDER/.unpacked lists them, as sha256sum does, and
so do the records of make).
"""

import argparse
import copy
import difflib
import errno
import glob
import hashlib
import os
import re
import shutil
import stat
import sys
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from scripts.archives.progress import Progress, format_bytes
from scripts.steps.records import written_digest as step_wrote

CHUNK = 1 << 20
MOST_BYTES = 500 * 10**9  # unpacked; the real archives are far smaller
MOST_FILES = 100_000
MOST_RATIO = 1100  # unpacked to packed; deflate reaches 1032 at most
READABLE = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # zipfile reads bzip2 and LZMA without a bound on memory
# Not `zip -s 0`: Debian's zip 3.0-13 loses bytes of a member that lies in four parts
IN_PARTS = (
    "{0}: one part of an archive in several; unpack them together with 7-Zip (apt install p7zip-full; 7z x the part "
    "that ends in .zip or .001) and pack them as one: zip -r"
)
LONGEST = 255  # bytes of a file's name that Linux takes
# Control characters, halves of characters, and what turns the direction of writing: a name could look like another
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
TURNING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
UTF8 = 0x800  # flag of a member whose name is in UTF-8
DRAFTS, LIST = ".unpacking", ".unpacked"
NOT_IN_ARCHIVE = 3  # exit status, see scripts/steps/step.py
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError)

Members = dict[str, zipfile.ZipInfo]


def unpack_member(archive: Path, member: str, out: Path) -> None:
    """Make `out` the content of `member`, which may lie in one more top folder of the archive.

    SystemExit(NOT_IN_ARCHIVE) if there is none, and a file of the user's own is where a step would put it.
    """
    target = Path(str(out).removeprefix(".make/out/"))
    with open_archive(archive) as (content, members):
        if target.is_file() and not any(
            matches_pattern(name, root, glob.escape(member)) for name in members for root in list_tops(name)
        ):
            print(f"local: {target} is yours, {archive.name} has none; it is used", flush=True)
            raise SystemExit(NOT_IN_ARCHIVE)
        mention_others(target)
        info = select_members(archive, members, glob.escape(member))[member]
        if out.is_file() and compare_content(content, info, out):
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        check_free_space(out.parent, info.file_size, archive)
        draft = out.with_name(f"{out.name}.part")
        draft.unlink(missing_ok=True)  # of a run that was killed
        try:
            extract_member(content, info, draft)
            draft.replace(out)
        finally:
            draft.unlink(missing_ok=True)


def unpack_all(
    archive: Path,
    folder: Path,
    *,
    tree: str = "",
    ours: Callable[[str, str], bool],
    wrote: Callable[[str, str], None],
    progress: Callable[[int], None] = lambda count: None,
) -> list[Path]:
    """Make every file of the archive's `tree` be in `folder`; return those kept although they differ.

    ours(path, sha256): did a step write this content there?  wrote(path, sha256): it has just been written, or found.
    All new content is written and checked beside the tree before the first file of it is replaced.
    """
    with open_archive(archive) as (content, members):
        kept, new = [], []
        for name, info in (select_members(archive, members, tree) if tree else members).items():
            target = folder / name
            if target.is_file() and (digest := compare_content(content, info, target)):
                wrote(str(target), digest)
                progress(info.file_size)
            elif not is_replaceable(target, folder, ours):
                kept.append(target)
                progress(info.file_size)
            else:
                new.append((target, info))
        folder.mkdir(parents=True, exist_ok=True)
        check_free_space(folder, sum(info.file_size for _, info in new), archive)
        drafts = folder / DRAFTS
        shutil.rmtree(drafts, ignore_errors=True)  # of a run that was killed
        try:
            drafts.mkdir()
            digests = []
            for target, info in new:  # under its own name, which the file system may refuse
                place = target.relative_to(folder)
                with explain_name_errors(archive, place):
                    (drafts / place).parent.mkdir(parents=True, exist_ok=True)
                    digests.append(extract_member(content, info, drafts / place, progress))
            for (target, _), digest in zip(new, digests, strict=True):
                move_draft(drafts / target.relative_to(folder), target)
                wrote(str(target), digest)
        finally:
            shutil.rmtree(drafts, ignore_errors=True)
    return kept


@contextmanager
def explain_name_errors(archive: Path, name: Path) -> Iterator[None]:
    """SystemExit, naming it, where the file system does not take a new file of this name."""
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


def is_replaceable(target: Path, folder: Path, ours: Callable[[str, str], bool]) -> bool:
    """Tell whether nothing is in the way of `target` but a file that a step wrote and nobody has changed since."""
    above = target.relative_to(folder).parents
    if any(os.path.lexists(folder / parent) and not (folder / parent).is_dir() for parent in above):
        return False
    if not os.path.lexists(target):
        return True
    return target.is_file() and not target.is_symlink() and ours(str(target), hash_file(target))


@contextmanager
def open_archive(archive: Path) -> Iterator[tuple[zipfile.ZipFile, Members]]:
    """Open the archive and give its members by their path; SystemExit for one that is damaged or hostile."""
    try:
        content = zipfile.ZipFile(archive)
    except FileNotFoundError:
        raise SystemExit(f"{archive} is missing; make fetches it, see make help") from None
    except DAMAGED as error:
        if is_part(archive) or "multiple disks" in str(error):
            raise SystemExit(IN_PARTS.format(archive)) from None
        raise SystemExit(f"{archive}: no zip archive, or not all of one: {error}; remove and fetch it again") from None
    with content:
        members = list_members(content, archive)
        try:
            yield content, members
        except DAMAGED as error:
            raise SystemExit(f"{archive}: damaged, nothing was unpacked: {error}; remove and fetch it again") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise SystemExit(f"{archive}: not unpacked, what was there before stays: {error.strerror}") from None


def is_part(archive: Path) -> bool:
    """Tell whether a file is one of several, by its first bytes (zip -s) or its name (7-Zip: weights.zip.002)."""
    if re.search(r"\.(z\d\d|zip\.\d{3})$", archive.name.lower()):
        return True
    with archive.open("rb") as file:
        return file.read(4) == b"PK\7\x08"


def list_members(content: zipfile.ZipFile, archive: Path) -> Members:
    """Return the files in the archive by their path; SystemExit, naming the member, for whatever no honest one has."""
    members: Members = {}
    end = total = 0
    if any(info.volume for info in content.infolist()):
        raise SystemExit(IN_PARTS.format(archive))
    for info in sorted(content.infolist(), key=lambda info: info.header_offset):
        name = decode_name(info)
        path = PurePosixPath(name)
        kind = stat.S_IFMT(info.external_attr >> 16)
        folder = name.endswith("/")
        reasons = {
            "an unprintable name": any(unicodedata.category(c) in UNPRINTABLE or c in TURNING for c in name),
            "an absolute path": path.is_absolute() or name[1:2] == ":",
            "a path with ..": ".." in path.parts,
            "no name": not path.parts,
            f"a name of more than {LONGEST} bytes": any(len(os.fsencode(part)) > LONGEST for part in path.parts),
            "a link or a special file": kind not in (0, stat.S_IFDIR if folder else stat.S_IFREG),
            "a password": bool(info.flag_bits & 0x2041),
            "a size that its packed size cannot have": info.file_size > MOST_RATIO * info.compress_size + 4096
            or (info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size),
            "bytes that are another member's too": info.header_offset < end,
            "the same name as another member": str(path) in members,
        }
        if reason := next((reason for reason, found in reasons.items() if found), ""):
            raise SystemExit(f"{archive}: refused, nothing was unpacked: {name!r} has {reason}")
        end = info.header_offset + 30 + info.compress_size  # 30: the least that a member's own header takes
        if folder or "__MACOSX" in path.parts or path.name == ".DS_Store" or path.name.startswith("._"):
            continue
        if info.compress_type not in READABLE:
            packed = f"{archive}: {path} is packed by method {info.compress_type} of zip"
            raise SystemExit(f"{packed}, expected 0 or 8; unpack it with a program that can and pack it anew: zip -r")
        total += info.file_size
        members[str(path)] = info
    for name in members:
        if clash := next((str(above) for above in PurePosixPath(name).parents if str(above) in members), ""):
            raise SystemExit(f"{archive}: refused, nothing was unpacked: {clash!r} is a file and a folder")
        if PurePosixPath(name).parts[0] in (DRAFTS, LIST):
            raise SystemExit(f"{archive}: refused, nothing was unpacked: {name!r} is a name that unpacking itself uses")
    if total > MOST_BYTES or len(members) > MOST_FILES:
        most = f"{format_bytes(MOST_BYTES)} in {MOST_FILES} files"
        held = f"{format_bytes(total)} in {len(members)} files"
        raise SystemExit(f"{archive}: refused, nothing was unpacked: it holds {held}, expected at most {most}")
    return members


def decode_name(info: zipfile.ZipInfo) -> str:
    """Return a member's name with `/` between its folders, as its archiver meant it.

    Windows PowerShell 5 (.NET before 4.6.1) writes backslashes. A name without the flag of UTF-8 is read by zipfile as
    cp437; programs on a Russian Windows write cp866, some on Linux UTF-8 without the flag.
    """
    name = info.orig_filename.replace("\\", "/")
    if info.flag_bits & UTF8 or name.isascii():
        return name
    raw = name.encode("cp437")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("cp866")


def list_tops(name: str) -> set[str]:
    """Return the folders from which a member may be found: the archive's top, and one or two below it."""
    above = PurePosixPath(name).parts[:-1]
    return {"", *("/".join(above[:depth]) for depth in (1, 2))}


def mention_others(target: Path) -> None:
    """Say which files beside an absent `target` may be meant for it: the same name but for the end, or nearly so."""
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


def select_members(archive: Path, members: Members, pattern: str) -> Members:
    """Return the members below the folder, the archive's top or one or two below it, from which `pattern` is found."""
    places = sorted({top for name in members for top in list_tops(name)})
    roots = [root for root in places if any(matches_pattern(name, root, pattern) for name in members)]
    if not roots:
        names = sorted(members)
        held = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        raise SystemExit(f"{archive.name} has no {pattern}; it holds {held or 'nothing'}")
    if "" in roots:
        return members
    if len(roots) > 1:
        raise SystemExit(f"{archive.name} has {pattern} in more than one folder: {', '.join(roots)}; expected one")
    return {
        name.removeprefix(f"{roots[0]}/"): info for name, info in members.items() if name.startswith(f"{roots[0]}/")
    }


def matches_pattern(name: str, root: str, pattern: str) -> bool:
    """Tell whether a member is what `pattern` says, seen from the folder `root`."""
    path, wanted = PurePosixPath(name), PurePosixPath(glob.escape(root), pattern)
    return len(path.parts) == len(wanted.parts) and path.match(str(wanted))


def compare_content(content: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> str:
    """Return the file's SHA-256 if it has the member's content, else "": by size, by CRC, only then byte for byte."""
    if path.stat().st_size != info.file_size:
        return ""
    crc, digest = 0, hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            crc = zlib.crc32(block, crc)
    if crc != info.CRC:
        return ""
    with path.open("rb") as file:
        for block in read_blocks(content, info):
            if block != file.read(len(block)):
                return ""
            digest.update(block)
    return digest.hexdigest()


def extract_member(
    content: zipfile.ZipFile, info: zipfile.ZipInfo, out: Path, progress: Callable[[int], None] = lambda count: None
) -> str:
    """Write the member to `out`, with the modes of any new file; return its SHA-256."""
    digest = hashlib.sha256()
    with out.open("xb") as file:
        for block in read_blocks(content, info):
            file.write(block)
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def read_blocks(content: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """Give the member's content; raise BadZipFile if its CRC or its size is not the declared one."""
    probe = copy.copy(info)
    probe.file_size += 2 * CHUNK  # zipfile stops at the declared size and would not notice that there is more
    count = 0
    with content.open(probe) as member:
        while block := member.read(CHUNK):
            count += len(block)
            if count > info.file_size:
                break
            yield block
    if count != info.file_size:
        more = "more" if count > info.file_size else "less"
        raise zipfile.BadZipFile(f"{info.filename!r} holds {more} than the {info.file_size} bytes it declares")


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def move_draft(draft: Path, target: Path) -> None:
    """Put a finished file in its place at one stroke, also where a folder of the tree is on another disk."""
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
    """Raise SystemExit if the disk has not `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        where = folder.resolve()
        raise SystemExit(
            f"{archive} needs {format_bytes(needed)} in {where}, {format_bytes(free)} are free; make room first"
        )


def read_list(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that unpacking has put into `folder`; the last line about a file counts."""
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


def unpack_tree(archive: Path, folder: Path, tree: str) -> None:
    """Unpack all, keep account of it in `folder`/.unpacked, and say what was kept and what the archive takes."""
    account = read_list(folder)
    total = 0
    with open_archive(archive) as (_, members):
        total = sum(info.file_size for info in (select_members(archive, members, tree) if tree else members).values())
    meter = Progress(f"unpacking {archive.name}", total)

    def ours(path: str, digest: str) -> bool:
        return digest in (account.get(str(Path(path).relative_to(folder))), step_wrote(path))

    def wrote(path: str, digest: str) -> None:
        name = str(Path(path).relative_to(folder))
        if account.get(name) != digest:
            account[name] = digest
            with (folder / LIST).open("a", encoding="utf-8") as file:
                file.write(f"{digest}  {name}\n")

    try:
        kept = unpack_all(archive, folder, tree=tree, ours=ours, wrote=wrote, progress=meter.add)
    finally:
        meter.close()
    for path in kept:
        print(f"local: {path} is not what {archive.name} holds; it is kept")
    place = archive.resolve() if archive.is_symlink() else archive
    print(f"{folder}: all of {archive.name}; rm {place} would free {format_bytes(place.stat().st_size)}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        raise SystemExit(f"not unpacked: {error}") from None
