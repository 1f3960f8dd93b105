"""The studies of INPUT and their files. A study is a folder, an archive, a NIfTI file or a DICOM file.

Archives inside a study are read like folders.
"""

import gzip
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any, BinaryIO

from scripts.infer import containers as limits
from scripts.infer.containers import BROKEN, Packed, Tar, Zip, archive_errors
from scripts.infer.messages import StudyError

TARS = ".tar", ".tgz", ".tar.gz", ".tbz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz"
PACKED = ".gz", ".bz2", ".xz"
ARCHIVES = ".zip", *TARS, *PACKED
PAIR = ".hdr", ".hdr.gz"  # the header of NIfTI and Analyze in two files; the voxels are in .img or .img.gz
NIFTI = ".nii", ".nii.gz", *PAIR
HALVES = ".img", ".img.gz"
OTHER_ARCHIVES = ".7z", ".rar", ".zst", ".tzst", ".lz4", ".lzma", ".lz", ".z", ".cab", ".arj", ".iso"
# The first part of a split archive; the name of a DICOM file may end in .001, too
SPLIT = re.compile(r"\.((zip|7z|rar|tar|tgz|gz|iso)\.0*1|z01|r00|part0*1\.rar)$")
OTHER_VOLUMES = ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".mnc"
STUDIES = *ARCHIVES, *NIFTI, *OTHER_ARCHIVES, *OTHER_VOLUMES
WITHIN = "\0/"  # between the name of an archive inside a study and the name of a file in it
DEEPEST = 3  # levels of archives inside archives
IN_MEMORY = 1 << 28  # bytes of an archive inside an archive; a larger one goes to a temporary file without a name


def is_nifti(path: PurePath | str) -> bool:
    return str(path).lower().endswith(NIFTI)


def is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVES) and not name.lower().endswith((*NIFTI, *HALVES))


def is_litter(name: str) -> bool:
    """Whether macOS or Windows made this file, as they do in every folder and archive."""
    parts = PurePath(name).parts
    last = parts[-1] if parts else ""
    return "__MACOSX" in parts or last.startswith("._") or last in (".DS_Store", "Thumbs.db", "desktop.ini")


def find_studies(top: Path, leave_out: Path) -> list[Path]:
    """The studies in folder `top`, sorted: each folder, archive and NIfTI file, and `top` itself if it has loose DICOM.

    Skipped: hidden files, `leave_out` (the output folder), and other files, such as a list of names.
    """
    found, loose = [], False
    for path in sorted(top.iterdir()):
        if path.name.startswith(".") or path.resolve() == leave_out.resolve():
            continue
        if not path.is_dir() and is_dicom(path):
            loose = True
        elif path.is_dir() or (is_lone_half(path) if is_half(path) else is_named_as_study(path)):
            found.append(path)
    return [top, *found] if loose else found


def is_named_as_study(path: Path) -> bool:
    return path.name.lower().endswith(STUDIES) or bool(SPLIT.search(path.name.lower()))


def is_half(path: Path) -> bool:
    return path.name.lower().endswith(HALVES)


def is_lone_half(path: Path) -> bool:
    """Whether this .img has no .hdr; if it has one, the .hdr is the study."""
    stem = re.sub(r"\.img(\.gz)?$", "", path.name.lower())
    return {other.name.lower() for other in path.parent.iterdir()}.isdisjoint(stem + suffix for suffix in PAIR)


def is_dicom(path: Path) -> bool:
    try:
        if not path.is_file():  # a pipe would never end
            return False
        packed = is_archive(path.name) and path.name.lower().endswith(".gz")
        with gzip.open(path) if packed else path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except BROKEN:
        return False


def fingerprint_study(path: Path, top: Path) -> str:
    """Digest of the names, sizes and times of a study's files. It changes when a file does, and reads none.

    It includes ctime, which no program can set, because anonymisers set the modification time to a constant.
    """
    digest = hashlib.sha256()
    try:
        source = Single(path) if path.is_file() else Folder(path, path == top)
        for file in (Path(name) for name, _ in source.list_files()):
            state = file.stat()
            name = file.relative_to(path) if path.is_dir() else file.suffix
            line = f"{name}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ctime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    except OSError as error:  # the digest covers what could be listed, and the error
        digest.update(f"{error.errno}".encode())
    return digest.hexdigest()[:16]


class Folder:
    """The files of a folder and, unless `flat`, of its subfolders. It does not follow links to folders."""

    def __init__(self, path: Path, flat: bool = False) -> None:
        self.path, self.flat = path, flat

    def list_files(self) -> Iterator[tuple[str, int]]:
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
                # Only regular files: reading a pipe would never end
                if stat.S_ISREG(state.st_mode) and not (self.flat and is_study(file)):
                    yield str(file), state.st_size

    def open(self, name: str) -> BinaryIO:
        return Path(name).open("rb")

    def check(self) -> None:
        """Do nothing: files have no checksum."""

    def close(self) -> None:
        pass


def is_study(file: Path) -> bool:
    """Whether a file beside loose DICOM files is a study of its own."""
    return (is_named_as_study(file) or is_half(file)) and not is_dicom(file)


class Single(Folder):
    """One file, or both files of a NIfTI pair."""

    def list_files(self) -> Iterator[tuple[str, int]]:
        name = self.path.name.lower()
        others = [self.path.with_name(self.path.name[: name.rindex(".hdr")] + half) for half in HALVES] if (
            name.endswith(PAIR)
        ) else []  # fmt: skip
        for file in [self.path, *filter(Path.exists, others)]:
            yield str(file), file.stat().st_size


Container = Folder | Zip | Tar | Packed


def open_container(path: Path | BinaryIO, name: str) -> Container:
    """The archive `path` of the name `name`. StudyError: it is damaged or cannot be read."""
    name = PurePath(name).name.lower()
    if name.endswith(".zip"):
        return Zip(path)
    if name.endswith(TARS):
        return Tar(path)
    return Packed(path, name)


class Source:
    """The files of a study's folder or archive, and those of the archives in it."""

    def __init__(self, outer: Container, deep: int = 0) -> None:
        self.outer, self.deep = outer, deep
        self.names: list[str] = []  # of the files listed so far
        self.unread: list[StudyError] = []  # why archives and volumes inside are left out
        self.within: tuple[str, Source] | None = None  # the inner archive opened last

    def list_files(self) -> Iterator[tuple[str, int]]:
        """Name and size of each file. An inner archive is read to its end before its files are listed."""
        for name, size in self.outer.list_files():
            if is_litter(name):
                continue
            if kind := explain_unread(name):
                self.unread.append(kind)
            elif is_archive(name) and self.deep == DEEPEST:
                self.unread.append(StudyError("too_deep", count=DEEPEST))
            elif is_archive(name):
                if size > limits.LARGEST_STUDY:
                    raise StudyError("archive_bomb", what=f"> {limits.LARGEST_STUDY >> 30} GB")
                try:
                    inner = self.open_inner(name)
                    inner.check()
                    listed = list(limit_files(inner))
                except StudyError as error:
                    if error.key == "archive_bomb":
                        raise
                    self.unread.append(error)
                    continue
                self.unread += inner.unread
                for below, length in listed:
                    self.names.append(f"{name}{WITHIN}{below}")
                    yield self.names[-1], length
            else:
                self.names.append(name)
                yield name, size

    def open(self, name: str) -> BinaryIO:
        outer, within, below = name.partition(WITHIN)
        return self.open_inner(outer).open(below) if within else self.outer.open(name)

    def open_inner(self, name: str) -> "Source":
        """The inner archive `name`, open until another one is asked for. StudyError: it cannot be opened."""
        if self.within is None or self.within[0] != name:
            if self.within:
                self.within[1].close()
                self.within = None
            with archive_errors():
                file: Any = Path(name) if isinstance(self.outer, Folder) else self.copy_archive(name)
            inner = Source(open_container(file, name), self.deep + 1)
            for _ in inner.outer.list_files():  # a tar learns its members by listing them
                pass
            self.within = name, inner
        return self.within[1]

    def copy_archive(self, name: str) -> IO[bytes]:
        """A copy of an archive inside an archive, which can be read in any order."""
        file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115
        with self.outer.open(name) as stream:
            shutil.copyfileobj(stream, file, 1 << 20)
        file.seek(0)
        return file

    def check(self) -> None:
        self.outer.check()

    def close(self) -> None:
        if self.within:
            self.within[1].close()
        self.outer.close()


def explain_unread(name: str) -> StudyError | None:
    """Why a file of this name cannot be read; None if it may be."""
    kind = PurePath(name).suffix.lower()
    if SPLIT.search(name.lower()):
        return StudyError("split_archive")
    if kind in OTHER_ARCHIVES:
        return StudyError("unknown_archive", kind=kind)
    return StudyError("unknown_volume", kind=kind) if kind in OTHER_VOLUMES else None


@contextmanager
def open_study(path: Path, flat: bool = False) -> Iterator[Source]:
    """Open the folder, archive or file `path`. StudyError: it cannot be opened or read, or is damaged.

    Checksums are compared when the context ends; only then is what was read known to be good.
    """
    is_folder = os.path.isdir(path)  # noqa: PTH112  Path.is_dir raises without permission
    if not os.path.exists(path) or not (is_folder or os.path.isfile(path)):  # noqa: PTH110, PTH113
        raise StudyError("unreadable")  # nothing there, or a pipe: reading it would never end
    if is_folder:
        outer: Container = Folder(path, flat)
    elif kind := explain_unread(path.name):
        raise kind
    elif is_archive(path.name):
        if path.name.lower().endswith(".zip") and path.with_suffix(".z01").exists():
            raise StudyError("split_archive")
        outer = open_container(path, path.name)
    elif is_nifti(path) or is_dicom(path):
        outer = Single(path)
    else:
        raise StudyError("no_pair" if path.name.lower().endswith(HALVES) else "unknown_file")
    source = Source(outer)
    try:
        yield source
        source.check()
    except BROKEN as error:
        readable = not isinstance(error, OSError) or error.errno is None
        raise StudyError("bad_archive" if readable and not is_folder else "unreadable") from None
    finally:
        source.close()


def limit_files(source: Source) -> Iterator[tuple[str, int]]:
    """Name and size of each file of a study. StudyError: there are too many, or they are too large (containers.py)."""
    total = 0
    for count, (name, size) in enumerate(source.list_files(), 1):
        total += size
        if count > limits.MOST_FILES:
            raise StudyError("archive_bomb", what=f"> {limits.MOST_FILES}")
        if (largest := limits.LARGEST_FILE) < size or (largest := limits.LARGEST_STUDY) < total:
            raise StudyError("archive_bomb", what=f"> {largest >> 30} GB")
        yield name, size
