"""Archives, read without unpacking them to disk and checked to their ends: zip, tar and single packed files.

Names in an archive only serve to sort and find its members, so no name can lead out of it. Declared sizes are added up
before anything is read, and no reader returns more than the declared size.
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
NAME_TYPES = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
BROKEN = (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
# Compression methods of zip that zipfile does not know: APPNOTE.TXT 6.3.10, 4.4.5. Windows uses Deflate64 above 2 GB
DEFLATE64, ZSTD = 9, 93
METHODS = {1: "Shrink", 6: "Implode", 10: "PKWARE", 14: "LZMA", 94: "MP3", 95: "XZ", 96: "JPEG", 97: "WavPack",
           98: "PPMd", 99: "AES"}  # fmt: skip
LOCAL_HEADER = struct.Struct("<26x2H")  # of a member: the lengths of its name and of its extra field
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
AGAIN = "\0"  # before the number of a second member of the same name; no real name has it


class Zip:
    """A zip archive, its members sorted by name."""

    def __init__(self, file: Path | BinaryIO) -> None:
        with archive_errors():
            self.archive = zipfile.ZipFile(file)
        self.members: dict[str, zipfile.ZipInfo] = {}

    def list_files(self) -> Iterator[tuple[str, int]]:
        """Name and size of each file. StudyError: the archive has a password."""
        for member in sorted(self.archive.infolist(), key=lambda member: member.filename):
            if not member.is_dir():
                if member.flag_bits & 1:
                    raise StudyError("locked_archive")
                yield add_member(self.members, member.filename, member), member.file_size

    def open(self, name: str) -> BinaryIO:
        return self.open_member(self.members[name])

    def open_member(self, member: zipfile.ZipInfo) -> BinaryIO:
        with archive_errors():
            if member.compress_type in (DEFLATE64, ZSTD):
                return io.BytesIO(self.unpack(member))
            try:
                return self.archive.open(member)  # type: ignore[return-value]
            except NotImplementedError:
                kind = METHODS.get(member.compress_type, str(member.compress_type))
                raise StudyError("zip_method", kind=kind) from None

    def unpack(self, member: zipfile.ZipInfo) -> bytes:
        """The content of a Deflate64 or Zstandard member. BadZipFile: its size or checksum is not as declared."""
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
        """StudyError if a member differs from its checksum; of most files only the start was read before."""
        for member in self.archive.infolist():
            with archive_errors(), self.open_member(member) as stream:
                read_to_end(stream)

    def close(self) -> None:
        self.archive.close()


def decompress_deflate64(packed: bytes, size: int) -> bytes:
    """Deflate64 -> bytes, in small pieces so as to stop soon after `size`. BadZipFile: more than `size`."""
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
    """A member whose name is at most LONGEST_NAME, else ReadError: tarfile reads names of any length into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Member":
        member = super().frombuf(buf, encoding, errors)
        if member.type in NAME_TYPES and member.size > LONGEST_NAME:
            raise tarfile.ReadError
        return member


class Tar:
    """A tar archive, its members in stored order, because going back in a compressed tar is slow."""

    def __init__(self, file: Path | BinaryIO) -> None:
        self.members: dict[str, tarfile.TarInfo] = {}
        self.is_listed = False
        with archive_errors():
            if isinstance(file, Path):
                self.archive = tarfile.open(file, "r:*", tarinfo=Member)  # noqa: SIM115
            else:
                self.archive = tarfile.open(fileobj=file, mode="r:*", tarinfo=Member)  # noqa: SIM115

    def list_files(self) -> Iterator[tuple[str, int]]:
        """Name and size of each regular file. StudyError: the archive is damaged or has too many members."""
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
            if count > MOST_FILES:  # folders and links count, too: tarfile keeps all in memory
                raise StudyError("archive_bomb", what=f"> {MOST_FILES}")
            if member.isreg():  # not a link or a device
                yield add_member(self.members, member.name, member), member.size

    def open(self, name: str) -> BinaryIO:
        with archive_errors():
            return self.archive.extractfile(self.members[name])  # type: ignore[return-value]

    def check_end(self) -> None:
        """ReadError unless zeros follow the last member: tarfile takes a broken header or a cut for the end."""
        assert self.archive.fileobj
        self.archive.fileobj.seek(self.archive.offset)
        if self.archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError

    def check(self) -> None:
        """StudyError if a compressed tar differs from the checksum at its end."""
        if isinstance(self.archive.fileobj, gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile):
            with archive_errors():
                self.archive.fileobj.seek(0)
                read_to_end(self.archive.fileobj)

    def close(self) -> None:
        self.archive.close()


class Packed:
    """One file packed by gzip, bzip2 or xz."""

    def __init__(self, file: Path | BinaryIO, name: str) -> None:
        """StudyError: the file is damaged, or unpacks to more than LARGEST_FILE."""
        self.name, dot, kind = name.rpartition(".")
        with archive_errors(), OPENERS[(dot + kind).lower()](file) as stream:
            self.content = stream.read(LARGEST_FILE + 1)  # to the end, which has the checksum
        if len(self.content) > LARGEST_FILE:
            raise StudyError("archive_bomb", what=f"> {LARGEST_FILE >> 30} GB")

    def list_files(self) -> Iterator[tuple[str, int]]:
        yield self.name, len(self.content)

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.content)

    def check(self) -> None:
        """Do nothing: the checksum was compared when the file was read."""

    def close(self) -> None:
        self.content = b""


def add_member(members: dict[str, Any], name: str, member: Any) -> str:
    """Add `member` to `members` under `name`, or under a new name if another member has that; return the name."""
    key, count = name, 1
    while key in members and members[key] is not member:
        count += 1
        key = f"{name}{AGAIN}{count}"
    members[key] = member
    return key


@contextmanager
def archive_errors(key: str = "bad_archive") -> Iterator[None]:
    """Raise StudyError in place of any error of a reader; readers document few of theirs."""
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
    """Read the rest of a compressed stream, so that its checksum is compared. StudyError: it is endless."""
    total = 0
    while data := stream.read(1 << 20):
        total += len(data)
        if total > 2 * LARGEST_STUDY:
            raise StudyError("archive_bomb", what=f"> {2 * LARGEST_STUDY >> 30} GB")
