"""Open a zip archive, refuse a damaged or hostile one, and find and read its members."""

import copy
import errno
import glob
import hashlib
import os
import re
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from scripts.archives.progress import format_bytes

CHUNK = 1 << 20
MOST_BYTES = 500 * 10**9  # unpacked; the real archives are far smaller
MOST_FILES = 100_000
MOST_RATIO = 1100  # unpacked to packed size; deflate reaches at most 1032
READABLE = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # zipfile reads bzip2 and LZMA without a limit on memory
# Not `zip -s 0`: Debian's zip 3.0-13 loses bytes of a member that lies in four parts
IN_PARTS = (
    "{0}: one part of an archive in several parts; unpack them together with 7-Zip (apt install p7zip-full; 7z x the "
    "part that ends in .zip or .001), then pack the files into one archive: zip -r"
)
LONGEST = 255  # bytes; Linux takes no longer file name
# Control characters, surrogates, and characters that change the direction of text: they can disguise a name
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
TURNING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
UTF8 = 0x800  # flag of a member whose name is in UTF-8
DRAFTS, LIST = ".unpacking", ".unpacked"  # names that unpack.py uses in the folder that it unpacks into
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError)

Members = dict[str, zipfile.ZipInfo]


@contextmanager
def open_archive(archive: Path) -> Iterator[tuple[zipfile.ZipFile, Members]]:
    """Open the archive and yield it with its members by path; SystemExit if it is damaged or hostile."""
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
    """Tell whether a file is one part of several, by its first bytes (zip -s) or its name (7-Zip: weights.zip.002)."""
    if re.search(r"\.(z\d\d|zip\.\d{3})$", archive.name.lower()):
        return True
    with archive.open("rb") as file:
        return file.read(4) == b"PK\7\x08"


def list_members(content: zipfile.ZipFile, archive: Path) -> Members:
    """Return the files in the archive by path; SystemExit with the member's name if no harmless archive holds it."""
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
        end = info.header_offset + 30 + info.compress_size  # 30 bytes: the smallest header of a member
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
    """Return a member's name with `/` between its folders, decoded as its archiver meant it.

    Windows PowerShell 5 (.NET before 4.6.1) writes backslashes. zipfile reads a name without the UTF-8 flag as cp437,
    but programs on a Russian Windows write cp866, and some on Linux write UTF-8 without the flag.
    """
    name = info.orig_filename.replace("\\", "/")
    if info.flag_bits & UTF8 or name.isascii():
        return name
    raw = name.encode("cp437")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("cp866")


def select_members(archive: Path, members: Members, pattern: str) -> Members:
    """Return the members of the tree in which `pattern` is found, by their path in that tree; SystemExit if none is."""
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


def list_tops(name: str) -> set[str]:
    """Return the folders in which the tree of a member may begin: the archive's top, and one or two levels below it."""
    above = PurePosixPath(name).parts[:-1]
    return {"", *("/".join(above[:depth]) for depth in (1, 2))}


def matches_pattern(name: str, root: str, pattern: str) -> bool:
    """Tell whether a member matches `pattern` below the folder `root`."""
    path, wanted = PurePosixPath(name), PurePosixPath(glob.escape(root), pattern)
    return len(path.parts) == len(wanted.parts) and path.match(str(wanted))


def compare_content(content: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> str:
    """Return the file's SHA-256 if it has the member's content, else ""; size and CRC are compared before the bytes."""
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


def read_blocks(content: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """Yield the member's content; raise BadZipFile if its CRC or its size is not the declared one."""
    probe = copy.copy(info)
    probe.file_size += 2 * CHUNK  # else zipfile stops at the declared size and does not see that there is more
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
