"""The series of a study, from DICOM headers alone; no pixel is read."""

import io
import logging
import math
import re
import warnings
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import pydicom
from pydicom.multival import MultiValue
from pydicom.uid import SecondaryCaptureImageStorage

from scripts.infer.messages import StudyError
from scripts.infer.source import Source, is_nifti, limit_files

# pydicom's messages would repeat values of the file
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module="pydicom")

MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
DEFLATED = b"1.2.840.10008.1.2.1.99"  # pydicom inflates such a file without a limit, header included
HEAD = 1 << 16  # bytes read first; the header of a single image is shorter
TAGS = [
    "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "BodyPartExamined", "SliceThickness",
    "WindowCenter", "WindowWidth", "ImageType", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient",
    "PixelSpacing", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation",
    "RescaleSlope", "RescaleIntercept", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "ConvolutionKernel", "KVP", "TemporalPositionIdentifier", "AcquisitionNumber", "AcquisitionDate",
    "AcquisitionTime", "AcquisitionDateTime", "LossyImageCompression",
]  # fmt: skip
# Words in ImageType of images that are not slices of a scan: DICOM PS3.3 C.8.2.1.1.1, and vendors' own
NO_SLICES = (
    "LOCALIZER", "MIP", "MINIP", "MIN IP", "MNIP", "PROJECTION IMAGE", "AVERAGE", "SCREEN SAVE", "SCREENSHOT",
    "CAPTURE", "SUBTRACT", "SUBTRACTION", "DOSE_INFO", "VOLUME_RENDER", "VRT",
)  # fmt: skip
IMAGES = ".dcm", ".dicom", ".ima"  # usual suffixes; other files have none, or the end of a UID
TEXTS = "README", "LICENSE", "VERSION", "COPYING", "INDEX", "CONTENTS"


@dataclass(frozen=True)
class Slice:
    """One image: frame `frame` of a file; None where its header has no value."""

    file: str
    frame: int
    number: int | None
    shape: tuple[int, int]  # rows, columns
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel: tuple[float, ...] | None  # mm between rows, between columns
    slope: float | None  # None also if it is 0, which would erase the image; NaN: it cannot be read
    intercept: float | None
    kinds: tuple[str, ...] = ()  # ImageType, ConvolutionKernel, KVP, TemporalPositionIdentifier
    acquisition: float | None = None  # AcquisitionNumber
    time: str = ""  # of the acquisition


@dataclass
class Series:
    """A series from its headers; `thickness` and `window` come from the first image that has them."""

    uid: str
    study: str
    modality: str = ""
    body_part: str = ""
    thickness: float | None = None
    window: tuple[float, float] | None = None
    kernel: str = ""
    inverted: bool = False
    slices: list[Slice] = field(default_factory=list)
    left_out: int = 0  # localisers, derived images and captures
    warnings: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str]:
        """UIDs of study and series: anonymisers give series of different studies the same UID."""
        return self.study, self.uid


def read_headers(source: Source) -> tuple[list[Series], int]:
    """The series of a study, in the order of their first files, and the number of files skipped as unreadable."""
    found: dict[tuple[str, str], Series] = {}
    skipped = deflated = 0
    for name, size in limit_files(source):
        if is_nifti(name):
            continue
        with source.open(name) as file:
            data = file.read(HEAD)
            packed = data[128:132] == b"DICM" and DEFLATED in data
            header = None if packed else parse_header(data, whole=size <= HEAD)
            if header is None and not packed and data[128:132] == b"DICM" and size > HEAD:
                header = parse_header(data + file.read(), whole=True)
        deflated += packed
        if header is None:
            skipped += data[128:132] == b"DICM" or is_image_name(name)
            continue
        try:
            uid = read_text(header, "SeriesInstanceUID")
            if "Rows" not in header:  # a report, a DICOMDIR, or cut short
                skipped += not uid and header.file_meta.get("MediaStorageSOPClassUID") != MEDIA_DIRECTORY
                skipped += read_text(header, "Modality") == "CT"
            elif uid:
                series = Series(uid, read_text(header, "StudyInstanceUID"))
                add_images(found.setdefault(series.key, series), name, header)
            else:
                skipped += 1
        except MemoryError:
            raise
        except Exception:  # a damaged file may raise anything
            skipped += 1
    if deflated and not found:
        raise StudyError("compression", syntax="Deflated Explicit VR Little Endian")
    return list(found.values()), skipped


def is_image_name(name: str) -> bool:
    """Whether a file of this name is likely DICOM: many studies come with viewers, texts and pictures."""
    path = PurePath(name)
    kind = path.suffix.lower()
    return kind in IMAGES or kind[1:].isdigit() or (not kind and path.name.upper() not in TEXTS)


def parse_header(data: bytes, *, whole: bool) -> Any:
    """The header in `data`, the first bytes of a file; None if it is not DICOM or its header is longer.

    `whole`: `data` is the whole file, so the header may reach its end.
    """
    if data[128:132] != b"DICM":
        return None
    stream = io.BytesIO(data)
    try:
        header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=TAGS)
    except Exception:  # a damaged file may raise anything
        return None
    return header if whole or stream.tell() < len(data) - 12 else None


def read_text(header: Any, name: str) -> str:
    return str(header.get(name) or "").strip()


def read_numbers(header: Any, name: str) -> tuple[float, ...] | None:
    """The values of a numeric tag, with decimal commas read as points; None if absent, empty or not finite numbers."""
    try:
        value = header.get(name)
        values = [value] if isinstance(value, str | int | float) else list(value or [])
        result = tuple(float(item) for item in values)
    except (ValueError, TypeError, OverflowError, NotImplementedError):  # pydicom reads no commas
        try:
            result = tuple(float(item) for item in read_as_written(header, name).replace(",", ".").split("\\"))
        except ValueError:
            return None
    return result if result and all(map(math.isfinite, result)) else None


def read_number(header: Any, name: str) -> float | None:
    values = read_numbers(header, name)
    return values[0] if values else None


def read_as_written(header: Any, name: str) -> str:
    """The text of a tag as written in the file."""
    value = header.get_item(name).value
    if isinstance(value, bytes):
        return value.decode("ascii", "replace").strip(" \0")
    return "\\".join(map(str, value)) if isinstance(value, list | MultiValue) else str(value or "").strip()


def is_unreadable(header: Any, name: str) -> bool:
    """Whether a numeric tag has a value that is not a number."""
    return name in header and not read_numbers(header, name) and bool(read_as_written(header, name))


def is_derived(header: Any) -> bool:
    """Whether an image is not a slice of a scan. After lossy compression DERIVED alone does not count."""
    words = [word.strip().upper() for word in read_text(header, "ImageType").strip("[]").replace("'", "").split(",")]
    lossy = read_text(header, "LossyImageCompression") == "01"
    parts = {*words, *(part for word in words for part in re.split(r"[ _]", word))}
    shown = not parts.isdisjoint(NO_SLICES)
    return shown or (words[0] == "DERIVED" and not lossy) or header.get("SOPClassUID") == SecondaryCaptureImageStorage


def add_images(series: Series, file: str, header: Any) -> None:
    """Add a file's images to its series, except localisers and derived ones, and fill in what the series lacks."""
    series.modality = series.modality or read_text(header, "Modality").upper()
    series.body_part = series.body_part or read_text(header, "BodyPartExamined").upper()
    if is_derived(header) or int(header.get("SamplesPerPixel") or 1) != 1:
        series.left_out += 1
        return
    if series.thickness is None:
        series.thickness = read_number(header, "SliceThickness") or None
    center, width = read_number(header, "WindowCenter"), read_number(header, "WindowWidth")
    if series.window is None and center is not None and width is not None:
        series.window = center, width
    series.inverted = series.inverted or read_text(header, "PhotometricInterpretation") == "MONOCHROME1"
    shape = int(header.Rows), int(header.Columns)
    instance = read_number(header, "InstanceNumber")
    frames = int(header.get("NumberOfFrames") or 1)
    shared, per_frame = (
        header.get(f"{name}FunctionalGroupsSequence") or [] for name in ("Shared", "PerFrame")
    )  # enhanced CT keeps each image's geometry there
    for frame in range(min(frames, len(per_frame)) if per_frame else 1):
        groups = [*(per_frame[frame : frame + 1]), *shared[:1]]

        def list_items(sequence: str, groups: list[Any] = groups) -> list[Any]:
            return [*(group[sequence].value[0] for group in groups if sequence in group), header]

        def find_numbers(sequence: str, name: str) -> tuple[float, ...] | None:
            return next(filter(None, (read_numbers(item, name) for item in list_items(sequence))), None)

        def find_text(sequence: str, *names: str) -> str:
            return next(filter(None, (read_text(item, name) for item in list_items(sequence) for name in names)), "")

        def find_factor(name: str) -> float | None:
            """NaN if it is there and cannot be read."""
            value = find_numbers("PixelValueTransformationSequence", name)
            broken = any(is_unreadable(item, name) for item in list_items("PixelValueTransformationSequence"))
            return value[0] if value else math.nan if broken else None

        if series.thickness is None and (thickness := find_numbers("PixelMeasuresSequence", "SliceThickness")):
            series.thickness = thickness[0] or None
        kernel = find_text("CTReconstructionSequence", "ConvolutionKernel")
        series.kernel = series.kernel or kernel
        acquisition = find_numbers("FrameContentSequence", "FrameAcquisitionNumber") or find_numbers(
            "", "AcquisitionNumber"
        )
        time = find_text("FrameContentSequence", "FrameAcquisitionDateTime", "AcquisitionDateTime")
        series.slices.append(
            Slice(
                file, frame, frame + 1 if per_frame else None if instance is None else int(instance), shape,
                find_numbers("PlanePositionSequence", "ImagePositionPatient") if frames == 1 or per_frame else None,
                find_numbers("PlaneOrientationSequence", "ImageOrientationPatient"),
                find_numbers("PixelMeasuresSequence", "PixelSpacing"),
                find_factor("RescaleSlope") or None, find_factor("RescaleIntercept"),
                (read_text(header, "ImageType"), kernel, find_text("CTXRayDetailsSequence", "KVP"),
                 find_text("FrameContentSequence", "TemporalPositionIndex", "TemporalPositionIdentifier")),
                acquisition[0] if acquisition else None,
                time or read_text(header, "AcquisitionDate") + read_text(header, "AcquisitionTime"),
            )
        )  # fmt: skip
