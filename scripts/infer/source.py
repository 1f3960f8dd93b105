"""Where studies lie: a folder, an archive or a NIfTI file each; archives are read in place, nothing is unpacked.

Names in an archive are only ever sorted and looked up in it, so none can lead out of it. What an archive declares is
added up before it is read; zip and tar readers give no more than declared.
"""

import gzip
import hashlib
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from scripts.infer.words import StudyError

ARCHIVES = ".zip", ".tar", ".tgz", ".tar.gz"
NIFTI = ".nii", ".nii.gz"
OTHER_ARCHIVES = ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst"
MOST_FILES = 50_000
LARGEST_FILE = 1 << 30  # bytes; a multi-frame series of 2000 slices
LARGEST_STUDY = 64 << 30
LONGEST_NAME = 1 << 20
NAMES = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
BROKEN = (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(NIFTI)


def studies(top: Path, leave_out: Path) -> list[Path]:
    """What in folder `top` is a study, sorted: each folder and archive and NIfTI file; `top` itself for loose DICOM.

    Hidden files and `leave_out`, the output folder, are not looked at; nor are other files, such as a list of names.
    """
    found, loose = [], False
    for path in sorted(top.iterdir()):
        if path.name.startswith(".") or path.resolve() == leave_out.resolve():
            continue
        if path.is_dir() or path.name.lower().endswith((*ARCHIVES, *NIFTI, *OTHER_ARCHIVES)):
            found.append(path)
        else:
            loose = loose or is_dicom(path)
    return [top, *found] if loose else found


def is_dicom(path: Path) -> bool:
    try:
        if not path.is_file():  # a pipe would never end
            return False
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def fingerprint(path: Path, top: Path) -> str:
    """Of a study's files: names, sizes and times. It changes when a file does, without reading any.

    Anonymisers set the time of modification to a constant; that of the last change no program can set.
    """
    digest = hashlib.sha256()
    try:
        for file in [path] if path.is_file() else map(Path, (name for name, _ in Folder(path, path == top).files())):
            state = file.stat()
            line = f"{file.relative_to(top)}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ctime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    except OSError as error:  # what can be read of it, and why no more
        digest.update(f"{error.errno}".encode())
    return digest.hexdigest()[:16]


class Folder:
    """The files of a folder, subfolders included unless `flat`; links to folders are not followed."""

    def __init__(self, path: Path, flat: bool = False) -> None:
        self.path, self.flat = path, flat

    def files(self) -> Iterator[tuple[str, int]]:
        """Name and size of each regular file, sorted by name."""

        def fail(error: OSError) -> None:
            raise error

        for folder, below, names in os.walk(self.path, onerror=fail):
            below.sort()
            if self.flat:
                below.clear()
            for name in sorted(names):
                file = Path(folder, name)
                state = file.stat() if file.exists() else file.lstat()
                if stat.S_ISREG(state.st_mode):  # no pipe, which would never end
                    yield str(file), state.st_size

    def open(self, name: str) -> BinaryIO:
        return Path(name).open("rb")

    def check(self) -> None:
        """Nothing: files have no checksum."""

    def close(self) -> None:
        pass


class Zip:
    def __init__(self, path: Path) -> None:
        with archive_errors():
            self.archive = zipfile.ZipFile(path)

    def files(self) -> Iterator[tuple[str, int]]:
        for member in sorted(self.archive.infolist(), key=lambda member: member.filename):
            if not member.is_dir():
                if member.flag_bits & 1:
                    raise StudyError("locked_archive")
                yield member.filename, member.file_size

    def open(self, name: str) -> BinaryIO:
        with archive_errors():
            return self.archive.open(name)  # type: ignore[return-value]

    def check(self) -> None:
        """StudyError where a member differs from its checksum: of most files only the beginning was read."""
        with archive_errors():
            if self.archive.testzip() is not None:
                raise zipfile.BadZipFile

    def close(self) -> None:
        self.archive.close()


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

    def __init__(self, path: Path) -> None:
        with archive_errors():
            self.archive = tarfile.open(path, "r:*", tarinfo=Member)  # noqa: SIM115
        self.members: dict[str, tarfile.TarInfo] = {}

    def files(self) -> Iterator[tuple[str, int]]:
        count = 0
        while True:
            with archive_errors():
                member = self.archive.next()
            if member is None:
                with archive_errors():
                    self.check_end()
                return
            count += 1
            if count > MOST_FILES:  # folders and links as well, all of which tarfile remembers
                raise StudyError("archive_bomb", what=f"> {MOST_FILES}")
            if member.isreg():  # no link, no device
                self.members[member.name] = member
                yield member.name, member.size

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
        if not isinstance(self.archive.fileobj, io.BufferedReader):
            with archive_errors():
                assert self.archive.fileobj
                self.archive.fileobj.seek(0)
                read_to_end(self.archive.fileobj)

    def close(self) -> None:
        self.archive.close()


@contextmanager
def archive_errors() -> Iterator[None]:
    """StudyError in place of whatever the readers of archives raise for a broken one; most of it is undocumented."""
    try:
        yield
    except StudyError:
        raise
    except OSError as error:
        raise StudyError("bad_archive" if error.errno is None else "unreadable") from None
    except MemoryError:
        raise
    except Exception:
        raise StudyError("bad_archive") from None


def read_to_end(stream: Any) -> None:
    """Reads what is left of a compressed stream, so that its checksum is compared; StudyError: it has no end."""
    total = 0
    while data := stream.read(1 << 20):
        total += len(data)
        if total > 2 * LARGEST_STUDY:
            raise StudyError("archive_bomb", what=f"> {2 * LARGEST_STUDY >> 30} GB")


Source = Folder | Zip | Tar


@contextmanager
def opened(path: Path, flat: bool = False) -> Iterator[Source]:
    """The folder or archive `path`; StudyError where it cannot be opened, breaks while it is read, or was damaged.

    Checksums are compared when the caller is done with it: what was read is good only after that.
    """
    name = path.name.lower()
    is_folder = os.path.isdir(path)  # noqa: PTH112  Path's own raises where there is no permission
    if not is_folder and os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113
        raise StudyError("unreadable")  # a pipe, which would never end
    if not is_folder and not name.endswith(ARCHIVES):
        raise StudyError("unknown_archive" if os.path.exists(path) else "unreadable")  # noqa: PTH110
    source = Folder(path, flat) if is_folder else Zip(path) if name.endswith(".zip") else Tar(path)
    try:
        yield source
        source.check()
    except BROKEN as error:
        readable = not isinstance(error, OSError) or error.errno is None
        raise StudyError("bad_archive" if readable and not is_folder else "unreadable") from None
    finally:
        source.close()


def limited(source: Source) -> Iterator[tuple[str, int]]:
    """Name and size of the files of a study; StudyError as soon as they are more than a study can be."""
    total = 0
    for count, (name, size) in enumerate(source.files(), 1):
        total += size
        if count > MOST_FILES:
            raise StudyError("archive_bomb", what=f"> {MOST_FILES}")
        if size > LARGEST_FILE or total > LARGEST_STUDY:
            raise StudyError(
                "archive_bomb", what=f"> {(LARGEST_FILE if size > LARGEST_FILE else LARGEST_STUDY) >> 30} GB"
            )
        yield name, size
