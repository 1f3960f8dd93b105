"""Archives, read where they lie and checked to their ends: zip, tar and single packed files.

Names in an archive are only ever sorted and looked up in it, so none can lead out of it. What an archive declares is
added up before it is read; no reader gives more than declared.
"""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import inflate64

from scripts.infer.messages import StudyError

MOST_FILES = 50_000
LARGEST_FILE = 1 << 30  # bytes; a multi-frame series of 2000 slices
LARGEST_STUDY = 64 << 30
LONGEST_NAME = 1 << 20
NAMES = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
BROKEN = (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
# Methods of packing a zip's member beside those of zipfile: APPNOTE.TXT 6.3.10, 4.4.5. Windows packs what is over 2 GB
# with Deflate64
DEFLATE64, ZSTD = 9, 93
METHODS = {1: "Shrink", 6: "Implode", 10: "PKWARE", 14: "LZMA", 94: "MP3", 95: "XZ", 96: "JPEG", 97: "WavPack",
           98: "PPMd", 99: "AES"}  # fmt: skip
LOCAL_HEADER = struct.Struct("<26x2H")  # of a zip's member; the lengths of its name and of what follows it
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
AGAIN = "\0"  # before the number of a second member of one name: no real name has it


class Zip:
    """Members in the order of their names."""

    def __init__(self, file: Path | BinaryIO) -> None:
        with archive_errors():
            self.archive = zipfile.ZipFile(file)
        self.members: dict[str, zipfile.ZipInfo] = {}

    def files(self) -> Iterator[tuple[str, int]]:
        for member in sorted(self.archive.infolist(), key=lambda member: member.filename):
            if not member.is_dir():
                if member.flag_bits & 1:
                    raise StudyError("locked_archive")
                yield add_member(self.members, member.filename, member), member.file_size

    def open(self, name: str) -> BinaryIO:
        return self.opened(self.members[name])

    def opened(self, member: zipfile.ZipInfo) -> BinaryIO:
        with archive_errors():
            if member.compress_type in (DEFLATE64, ZSTD):
                return io.BytesIO(self.unpacked(member))
            try:
                return self.archive.open(member)  # type: ignore[return-value]
            except NotImplementedError:
                kind = METHODS.get(member.compress_type, str(member.compress_type))
                raise StudyError("zip_method", kind=kind) from None

    def unpacked(self, member: zipfile.ZipInfo) -> bytes:
        """The content of one packed in a way that zipfile does not know; BadZipFile: it is another than declared."""
        if member.file_size > LARGEST_FILE or member.compress_size > LARGEST_FILE:
            raise StudyError("archive_bomb", what=f"> {LARGEST_FILE >> 30} GB")
        file: Any = self.archive.fp
        file.seek(member.header_offset)
        file.seek(sum(LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))), io.SEEK_CUR)
        packed = file.read(member.compress_size)
        unpack = decompress_deflate64 if member.compress_type == DEFLATE64 else decompress_zstd
        content = unpack(packed, member.file_size)
        if len(content) != member.file_size or zlib.crc32(content) != member.CRC:
            raise zipfile.BadZipFile
        return content

    def check(self) -> None:
        """StudyError where a member differs from its checksum: of most files only the beginning was read."""
        for member in self.archive.infolist():
            with archive_errors(), self.opened(member) as stream:
                read_to_end(stream)

    def close(self) -> None:
        self.archive.close()


def decompress_deflate64(packed: bytes, size: int) -> bytes:
    """Deflate64 -> at most about `size` bytes, taken in pieces so that none grows large beyond that."""
    inflater, parts, total = inflate64.Inflater(), [], 0
    for start in range(0, len(packed), 1 << 14):
        parts.append(inflater.inflate(packed[start : start + (1 << 14)]))
        total += len(parts[-1])
        if total > size:
            raise zipfile.BadZipFile
    return b"".join(parts)


def decompress_zstd(packed: bytes, size: int) -> bytes:
    """Zstandard -> at most `size` bytes."""
    return bytes(imagecodecs.zstd_decode(packed, out=size)) if size else b""


class Member(tarfile.TarInfo):
    """One whose names are of sane length: tarfile reads them into memory, however long a packed one unpacks."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Member":
        member = super().frombuf(buf, encoding, errors)
        if member.type in NAMES and member.size > LONGEST_NAME:
            raise tarfile.ReadError
        return member


class Tar:
    """Members in the order in which they lie: a compressed tar is slow to go back in."""

    def __init__(self, file: Path | BinaryIO) -> None:
        self.members: dict[str, tarfile.TarInfo] = {}
        self.is_listed = False
        with archive_errors():
            if isinstance(file, Path):
                self.archive = tarfile.open(file, "r:*", tarinfo=Member)  # noqa: SIM115
            else:
                self.archive = tarfile.open(fileobj=file, mode="r:*", tarinfo=Member)  # noqa: SIM115

    def files(self) -> Iterator[tuple[str, int]]:
        if self.is_listed:
            yield from ((name, member.size) for name, member in self.members.items())
            return
        count = 0
        while True:
            with archive_errors():
                member = self.archive.next()
            if member is None:
                with archive_errors():
                    self.check_end()
                self.is_listed = True
                return
            count += 1
            if count > MOST_FILES:  # folders and links as well, all of which tarfile remembers
                raise StudyError("archive_bomb", what=f"> {MOST_FILES}")
            if member.isreg():  # no link, no device
                yield add_member(self.members, member.name, member), member.size

    def open(self, name: str) -> BinaryIO:
        with archive_errors():
            return self.archive.extractfile(self.members[name])  # type: ignore[return-value]

    def check_end(self) -> None:
        """ReadError unless zeros follow the last member: tarfile takes a broken header and a cut for the end."""
        assert self.archive.fileobj
        self.archive.fileobj.seek(self.archive.offset)
        if self.archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError

    def check(self) -> None:
        """StudyError where a compressed tar differs from its checksum, which stands at its end."""
        if isinstance(self.archive.fileobj, gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile):
            with archive_errors():
                self.archive.fileobj.seek(0)
                read_to_end(self.archive.fileobj)

    def close(self) -> None:
        self.archive.close()


class Packed:
    """One file packed by gzip, bzip2 or xz."""

    def __init__(self, file: Path | BinaryIO, name: str) -> None:
        """StudyError: it is damaged, or larger than a file of a study can be."""
        self.name, dot, kind = name.rpartition(".")
        with archive_errors(), OPENERS[(dot + kind).lower()](file) as stream:
            self.content = stream.read(LARGEST_FILE + 1)  # to its end, where its checksum stands
        if len(self.content) > LARGEST_FILE:
            raise StudyError("archive_bomb", what=f"> {LARGEST_FILE >> 30} GB")

    def files(self) -> Iterator[tuple[str, int]]:
        yield self.name, len(self.content)

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.content)

    def check(self) -> None:
        """Nothing: it was compared when it was read."""

    def close(self) -> None:
        self.content = b""


def add_member(members: dict[str, Any], name: str, member: Any) -> str:
    """`name` or, where an earlier member has that, one of its own; `members` then has it."""
    key, count = name, 1
    while key in members and members[key] is not member:
        count += 1
        key = f"{name}{AGAIN}{count}"
    members[key] = member
    return key


@contextmanager
def archive_errors(key: str = "bad_archive") -> Iterator[None]:
    """StudyError in place of whatever readers raise for a broken file; most of it is undocumented."""
    try:
        yield
    except StudyError:
        raise
    except OSError as error:
        raise StudyError(key if error.errno is None else "unreadable") from None
    except MemoryError:
        raise
    except Exception:
        raise StudyError(key) from None


def read_to_end(stream: Any) -> None:
    """Reads what is left of a compressed stream, so that its checksum is compared; StudyError: it has no end."""
    total = 0
    while data := stream.read(1 << 20):
        total += len(data)
        if total > 2 * LARGEST_STUDY:
            raise StudyError("archive_bomb", what=f"> {2 * LARGEST_STUDY >> 30} GB")
