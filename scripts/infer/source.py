"""Where studies lie: a folder, an archive, a NIfTI or a DICOM file each; archives within it are read as folders are."""

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
PAIR = ".hdr", ".hdr.gz"  # NIfTI and Analyze in two files; the voxels are in .img or .img.gz
NIFTI = ".nii", ".nii.gz", *PAIR
HALVES = ".img", ".img.gz"
OTHER_ARCHIVES = (
    ".7z", ".rar", ".zst", ".tzst", ".lz4", ".lzma", ".lz", ".z", ".cab", ".arj", ".iso",
)  # fmt: skip
SPLIT = re.compile(
    r"\.((zip|7z|rar|tar|tgz|gz|iso)\.0*1|z01|r00|part0*1\.rar)$"
)  # the first part; DICOM ends in .001, too
OTHER_VOLUMES = ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".mnc"
STUDIES = *ARCHIVES, *NIFTI, *OTHER_ARCHIVES, *OTHER_VOLUMES
WITHIN = "\0/"  # between the name of an archive within an archive or folder and a name in it
DEEPEST = 3  # archives within one another
IN_MEMORY = 1 << 28  # bytes of an archive within an archive; beyond, a temporary file without a name


def is_nifti(path: PurePath | str) -> bool:
    return str(path).lower().endswith(NIFTI)


def is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVES) and not name.lower().endswith((*NIFTI, *HALVES))


def is_litter(name: str) -> bool:
    """Whether macOS or Windows left this file: they put such into every folder and archive."""
    parts = PurePath(name).parts
    last = parts[-1] if parts else ""
    return "__MACOSX" in parts or last.startswith("._") or last in (".DS_Store", "Thumbs.db", "desktop.ini")


def find_studies(top: Path, leave_out: Path) -> list[Path]:
    """What in folder `top` is a study, sorted: each folder and archive and NIfTI file; `top` itself for loose DICOM.

    Hidden files and `leave_out`, the output folder, are not looked at; nor are other files, such as a list of names.
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
    """Whether the .hdr of this .img is absent; where it is there, that is the study."""
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
    """Of a study's files: names within it, sizes and times. It changes when a file does, without reading any.

    Anonymisers set the time of modification to a constant; that of the last change no program can set.
    """
    digest = hashlib.sha256()
    try:
        source = Single(path) if path.is_file() else Folder(path, path == top)
        for file in (Path(name) for name, _ in source.files()):
            state = file.stat()
            name = file.relative_to(path) if path.is_dir() else file.suffix
            line = f"{name}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ctime_ns}\n"
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
                if stat.S_ISREG(state.st_mode) and not (self.flat and is_study(file)):  # no pipe, which would never end
                    yield str(file), state.st_size

    def open(self, name: str) -> BinaryIO:
        return Path(name).open("rb")

    def check(self) -> None:
        """Nothing: files have no checksum."""

    def close(self) -> None:
        pass


def is_study(file: Path) -> bool:
    """Whether a file among loose DICOM files is a study of its own."""
    return (is_named_as_study(file) or is_half(file)) and not is_dicom(file)


class Single(Folder):
    """One file, and of a NIfTI in two files the other one."""

    def files(self) -> Iterator[tuple[str, int]]:
        name = self.path.name.lower()
        others = [self.path.with_name(self.path.name[: name.rindex(".hdr")] + half) for half in HALVES] if (
            name.endswith(PAIR)
        ) else []  # fmt: skip
        for file in [self.path, *filter(Path.exists, others)]:
            yield str(file), file.stat().st_size


Container = Folder | Zip | Tar | Packed


def open_container(path: Path | BinaryIO, name: str) -> Container:
    """The archive `path`, which is called `name`. StudyError: it is damaged or of a kind that is not read."""
    name = PurePath(name).name.lower()
    if name.endswith(".zip"):
        return Zip(path)
    if name.endswith(TARS):
        return Tar(path)
    return Packed(path, name)


class Source:
    """The files of a study: those of its folder or archive, and of the archives in that as if these were folders."""

    def __init__(self, outer: Container, deep: int = 0) -> None:
        self.outer, self.deep = outer, deep
        self.names: list[str] = []  # of the files that were listed
        self.unread: list[StudyError] = []  # why archives and volumes in it are left out
        self.within: tuple[str, Source] | None = None  # the archive in it that was opened last

    def files(self) -> Iterator[tuple[str, int]]:
        """Name and size of each file. An archive in it is read to its end before a file of it is named."""
        for name, size in self.outer.files():
            if is_litter(name):
                continue
            if kind := unread_kind(name):
                self.unread.append(kind)
            elif is_archive(name) and self.deep == DEEPEST:
                self.unread.append(StudyError("too_deep", count=DEEPEST))
            elif is_archive(name):
                if size > limits.LARGEST_STUDY:
                    raise StudyError("archive_bomb", what=f"> {limits.LARGEST_STUDY >> 30} GB")
                try:
                    inner = self.inner(name)
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
        return self.inner(outer).open(below) if within else self.outer.open(name)

    def inner(self, name: str) -> "Source":
        """The archive `name` in it; kept until another one is asked for. StudyError: it cannot be opened."""
        if self.within is None or self.within[0] != name:
            if self.within:
                self.within[1].close()
                self.within = None
            with archive_errors():
                file: Any = Path(name) if isinstance(self.outer, Folder) else self.aside(name)
            inner = Source(open_container(file, name), self.deep + 1)
            for _ in inner.outer.files():  # a tar finds its members while they are listed
                pass
            self.within = name, inner
        return self.within[1]

    def aside(self, name: str) -> IO[bytes]:
        """An archive within an archive, where it can be read in any order."""
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


def unread_kind(name: str) -> StudyError | None:
    """Why a file of this name is not read; None where it may be."""
    kind = PurePath(name).suffix.lower()
    if SPLIT.search(name.lower()):
        return StudyError("split_archive")
    if kind in OTHER_ARCHIVES:
        return StudyError("unknown_archive", kind=kind)
    return StudyError("unknown_volume", kind=kind) if kind in OTHER_VOLUMES else None


@contextmanager
def open_study(path: Path, flat: bool = False) -> Iterator[Source]:
    """The folder, archive or file `path`; StudyError where it cannot be opened, breaks when read, or was damaged.

    Checksums are compared when the caller is done with it: what was read is good only after that.
    """
    is_folder = os.path.isdir(path)  # noqa: PTH112  Path's own raises where there is no permission
    if not os.path.exists(path) or not (is_folder or os.path.isfile(path)):  # noqa: PTH110, PTH113
        raise StudyError("unreadable")  # nothing, or a pipe, which would never end
    if is_folder:
        outer: Container = Folder(path, flat)
    elif kind := unread_kind(path.name):
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
    """Name and size of the files of a study; StudyError as soon as they are more than a study can be."""
    total = 0
    for count, (name, size) in enumerate(source.files(), 1):
        total += size
        if count > limits.MOST_FILES:
            raise StudyError("archive_bomb", what=f"> {limits.MOST_FILES}")
        if (largest := limits.LARGEST_FILE) < size or (largest := limits.LARGEST_STUDY) < total:
            raise StudyError("archive_bomb", what=f"> {largest >> 30} GB")
        yield name, size
