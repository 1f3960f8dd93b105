"""The CT series of a study: read from DICOM headers, one chosen, its slices put in order and read."""

import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom._uid_dict import UID_dictionary
from pydicom.pixels.decoders.base import get_decoder

from scripts.infer.source import Source, limited
from scripts.infer.volume import Volume, check_size, oriented
from scripts.infer.words import StudyError, say

# What pydicom would say, it says with values of the file
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module="pydicom")

MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
DEFLATED = b"1.2.840.10008.1.2.1.99"  # pydicom inflates such a file without a limit, header and all
HEAD = 1 << 16  # bytes in which the header of a single image ends
TAGS = [
    "StudyInstanceUID", "SeriesInstanceUID", "Modality", "BodyPartExamined", "SliceThickness", "WindowCenter",
    "WindowWidth", "ImageType", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "RescaleSlope",
    "RescaleIntercept", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
SOFT_TISSUE = (30, 50), (300, 500)  # WindowCenter, WindowWidth
SAME_PLACE = 0.01  # mm; slices nearer than this are one slice twice
UNEVEN = 0.25  # of the distance between slices
MOST_MISSING = 0.5
ASIDE = 1.0  # mm that a slice may lie beside the straight line through the stack
TILT, STEEP = 0.5, 15.0  # degrees between the slices' normal and the way from slice to slice: warning, failure


@dataclass(frozen=True)
class Slice:
    """One image: frame `frame` of a file; what its header lacks is None."""

    file: str
    frame: int
    number: int | None
    shape: tuple[int, int]  # rows, columns
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel: tuple[float, ...] | None  # mm between rows, between columns
    slope: float | None  # 0, which leaves nothing of an image, counts as lacking
    intercept: float | None


@dataclass
class Series:
    """A series as its headers tell; `thickness` and `window` are of the first image that has them."""

    uid: str
    study: str
    modality: str = ""
    body_part: str = ""
    thickness: float | None = None
    window: tuple[float, float] | None = None
    inverted: bool = False
    slices: list[Slice] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str]:
        """Anonymisers give series of different studies the same UID."""
        return self.study, self.uid


def read_headers(source: Source) -> tuple[list[Series], int]:
    """The series of a study, in the order in which their first files are met, and how many files are no DICOM."""
    found: dict[tuple[str, str], Series] = {}
    skipped = deflated = 0
    for name, size in limited(source):
        with source.open(name) as file:
            data = file.read(HEAD)
            packed = data[128:132] == b"DICM" and DEFLATED in data
            header = None if packed else parse(data, whole=size <= HEAD)
            if header is None and not packed and data[128:132] == b"DICM" and size > HEAD:
                header = parse(data + file.read(), whole=True)
        deflated += packed
        if header is None:
            skipped += 1
            continue
        try:
            uid = text(header, "SeriesInstanceUID")
            if "Rows" not in header:  # a report, a DICOMDIR, or cut short
                skipped += not uid and header.file_meta.MediaStorageSOPClassUID != MEDIA_DIRECTORY
                skipped += text(header, "Modality") == "CT"
            elif uid:
                series = Series(uid, text(header, "StudyInstanceUID"))
                add(found.setdefault(series.key, series), name, header)
            else:
                skipped += 1
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, ArithmeticError):
            skipped += 1
    if deflated and not found:
        raise StudyError("compression", syntax="Deflated Explicit VR Little Endian")
    return list(found.values()), skipped


def parse(data: bytes, *, whole: bool) -> Any:
    """The header in the first bytes of a DICOM file, None if it is none or does not end in them."""
    if data[128:132] != b"DICM":
        return None
    stream = io.BytesIO(data)
    try:
        header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=TAGS)
    except Exception:  # a damaged file may raise anything
        return None
    return header if whole or stream.tell() < len(data) - 12 else None


def text(header: Any, name: str) -> str:
    return str(header.get(name) or "").strip()


def numbers(header: Any, name: str) -> tuple[float, ...] | None:
    """The values of a numeric tag; None where it is absent, empty or no number."""
    try:
        value = header.get(name)
        values = [value] if isinstance(value, str | int | float) else list(value or [])
        result = tuple(float(item) for item in values)
    except (ValueError, TypeError, OverflowError):
        return None
    return result if result and all(map(math.isfinite, result)) else None


def number(header: Any, name: str) -> float | None:
    values = numbers(header, name)
    return values[0] if values else None


def add(series: Series, file: str, header: Any) -> None:
    """Adds the images of a file, except localisers, and what the series still lacks."""
    series.modality = series.modality or text(header, "Modality").upper()
    series.body_part = series.body_part or text(header, "BodyPartExamined").upper()
    if series.thickness is None:
        series.thickness = number(header, "SliceThickness")
    center, width = number(header, "WindowCenter"), number(header, "WindowWidth")
    if series.window is None and center is not None and width is not None:
        series.window = center, width
    series.inverted = series.inverted or text(header, "PhotometricInterpretation") == "MONOCHROME1"
    if "LOCALIZER" in str(header.get("ImageType") or "").upper():
        return
    if int(header.get("SamplesPerPixel") or 1) != 1:
        raise ValueError("colours")
    shape = int(header.Rows), int(header.Columns)
    instance = number(header, "InstanceNumber")
    frames = int(header.get("NumberOfFrames") or 1)
    shared, per_frame = (
        header.get(f"{name}FunctionalGroupsSequence") or [] for name in ("Shared", "PerFrame")
    )  # enhanced CT keeps each image's geometry there
    for frame in range(min(frames, len(per_frame)) if per_frame else 1):
        groups = [*(per_frame[frame : frame + 1]), *shared[:1]]

        def look(sequence: str, name: str, groups: list[Any] = groups) -> tuple[float, ...] | None:
            inside = [group[sequence].value[0] for group in groups if sequence in group]
            return next(filter(None, (numbers(item, name) for item in [*inside, header])), None)

        if series.thickness is None and (thickness := look("PixelMeasuresSequence", "SliceThickness")):
            series.thickness = thickness[0]
        slope = look("PixelValueTransformationSequence", "RescaleSlope")
        intercept = look("PixelValueTransformationSequence", "RescaleIntercept")
        series.slices.append(
            Slice(
                file, frame, frame + 1 if per_frame else None if instance is None else int(instance), shape,
                look("PlanePositionSequence", "ImagePositionPatient") if frames == 1 or per_frame else None,
                look("PlaneOrientationSequence", "ImageOrientationPatient"),
                look("PixelMeasuresSequence", "PixelSpacing"),
                (slope[0] or None) if slope else None, intercept[0] if intercept else None,
            )
        )  # fmt: skip


def by_preference(all_series: list[Series]) -> list[Series]:
    """Volumes of CT: the thinnest slices first, among equals a soft-tissue window; those of unknown thickness last."""

    def key(series: Series) -> tuple[float, bool]:
        if series.thickness is None:
            return math.inf, False
        soft = series.window is not None and all(
            low <= value <= high for value, (low, high) in zip(series.window, SOFT_TISSUE, strict=True)
        )
        return series.thickness, not soft

    return sorted((series for series in all_series if series.modality == "CT" and len(series.slices) > 1), key=key)


def choose(
    all_series: list[Series], read: Callable[[Series], Volume], body_part: Callable[[Volume], str]
) -> tuple[Series, Volume]:
    """The most preferred CT series that is of the chest, by its header or, failing that, by the body-part network.

    Asked in the order of preference, the network sees no more series than it must. One that it cannot tell is no chest.
    Series that cannot be read are passed over; StudyError where none is left.
    """
    troubles: list[tuple[bool, StudyError]] = []
    for series in by_preference(all_series):
        is_chest = series.body_part == "CHEST"
        try:
            volume = read(series)
        except StudyError as error:
            troubles.append((is_chest, error))
            continue
        if is_chest or body_part(volume) == "CHEST":
            return series, volume
    if troubles:
        raise max(troubles, key=lambda trouble: trouble[0])[1]  # the first one, of those of the chest if there are any
    chest = any(series.body_part == "CHEST" for series in all_series)
    ct = any(series.modality == "CT" for series in all_series)
    if ct and not by_preference(all_series):
        raise StudyError("only_scouts")
    raise StudyError("no_chest" if ct else "no_ct" if chest else "nothing")


def remarks(series: Series) -> list[str]:
    """What a reader of the result should know of the chosen series' headers."""
    found = []
    given = [slice.number for slice in series.slices if slice.number is not None]
    missing = 1 - len(set(given)) / max(given) if given and max(given) > 0 else 0.0
    if missing > 0:
        found.append(say("missing", share=f"{100 * missing:.0f}"))
    if any(slice.slope is None for slice in series.slices):
        found.append(say("no_slope"))
    if any(slice.intercept is None for slice in series.slices):
        found.append(say("no_intercept"))
    if series.inverted:
        found.append(say("monochrome1"))
    return found


@dataclass(frozen=True)
class Stack:
    """The slices of a volume from one end to the other; None where one is missing."""

    slices: list[Slice | None]
    directions: NDArray[
        np.float64
    ]  # (3, 3): columns are the steps in mm of slice, row, column; Left, Posterior, Superior
    remarks: list[str]


def stack(slices: list[Slice]) -> Stack:
    """Puts slices in order by their positions in the patient. StudyError: no volume can be made of them."""
    first = slices[0]
    check_size((len(slices), *first.shape), (1, 1, 1))
    if any(s.position is None or len(s.position) != 3 or s.pixel is None or len(s.pixel) != 2 for s in slices):
        raise StudyError("no_geometry")
    if first.orientation is None or any(s.orientation is None or len(s.orientation) != 6 for s in slices):
        raise StudyError("no_geometry")
    if len({(s.shape, s.pixel) for s in slices}) > 1 or not np.allclose(
        np.array([s.orientation for s in slices]), first.orientation, atol=1e-3
    ):
        raise StudyError("mixed")
    across, down = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    if not np.allclose([across @ across, down @ down, across @ down], [1, 1, 0], atol=1e-2):
        raise StudyError("no_geometry")
    normal = np.cross(across, down)
    positions = np.array([s.position for s in slices])
    height = positions @ normal
    order = np.argsort(height, kind="stable")
    kept = order[np.diff(height[order], prepend=-np.inf) > SAME_PLACE]
    found = [say("duplicates", count=len(order) - len(kept))] if len(kept) < len(order) else []
    if len(kept) < 2:
        raise StudyError("few_slices", count=len(kept))

    steps = np.diff(height[kept])
    usual = float(np.median(steps))
    counts = np.maximum(1, np.rint(steps / usual)).astype(int)
    if (np.abs(steps / usual - counts) > UNEVEN).any():
        raise StudyError("uneven", least=f"{steps.min():.2f}", most=f"{steps.max():.2f}")
    depth = int(counts.sum()) + 1
    if (missing := depth - len(kept)) > MOST_MISSING * depth:
        raise StudyError("gaps", share=f"{100 * missing / depth:.0f}")
    if missing:
        found.append(say("filled", count=missing))
    places = np.concatenate([[0], np.cumsum(counts)])
    ordered: list[Slice | None] = [None] * depth
    for place, index in zip(places, kept, strict=True):
        ordered[place] = slices[index]

    way = (positions[kept[-1]] - positions[kept[0]]) / (depth - 1)
    off = positions[kept] - (positions[kept[0]] + places[:, None] * way)
    aside = np.linalg.norm(off - (off @ normal)[:, None] * normal, axis=1)
    if aside.max() > ASIDE:
        raise StudyError("shifted", most=f"{aside.max():.1f}")
    angle = math.degrees(math.acos(min(1.0, float(way @ normal) / float(np.linalg.norm(way)))))
    if angle > STEEP:
        raise StudyError("tilt_failure", angle=f"{angle:.0f}")
    if angle > TILT:
        found.append(say("tilt", angle=f"{angle:.1f}"))
    assert first.pixel is not None
    directions = np.stack([way, down * first.pixel[0], across * first.pixel[1]], axis=1)
    check_size((depth, *first.shape), np.linalg.norm(directions, axis=0).tolist())
    return Stack(ordered, directions, found)


def read_volume(source: Source, series: Series) -> tuple[Volume, list[str]]:
    """The voxels of a series in Hounsfield units; gaps are filled from the slices around them."""
    whole = stack(series.slices)
    present = {(s.file, s.frame): place for place, s in enumerate(whole.slices) if s is not None}
    by_file: dict[str, list[tuple[Slice, int]]] = {}
    for s in series.slices:  # in the order in which they lie in the archive
        if (s.file, s.frame) in present:
            by_file.setdefault(s.file, []).append((s, present[s.file, s.frame]))
    exact = all(float(v).is_integer() for s in series.slices for v in (s.slope or 1.0, s.intercept or 0.0))
    hu = np.empty((len(whole.slices), *series.slices[0].shape), np.int16 if exact else np.float32)
    damaged = 0
    for name, slices in by_file.items():
        try:
            for (s, place), pixels in zip(slices, images(source, name, slices), strict=True):
                to_hu(pixels, 1.0 if s.slope is None else s.slope, s.intercept or 0.0, hu[place])
        except DamagedError:
            damaged += 1
    if damaged:
        raise StudyError("damaged", count=damaged)
    fill(hu, [place for place, s in enumerate(whole.slices) if s is not None])
    view, order = oriented(hu, whole.directions)
    lengths = np.linalg.norm(whole.directions, axis=0)
    return Volume(view, (lengths[order[0]], lengths[order[1]], lengths[order[2]])), whole.remarks


class DamagedError(Exception):
    """The pixels of one file cannot be read."""


def images(source: Source, name: str, slices: list[tuple[Slice, int]]) -> Iterator[NDArray[Any]]:
    """Stored values (rows, columns) of the wanted frames of a file."""
    with source.open(name) as file:
        data = file.read()
    try:
        header = pydicom.dcmread(io.BytesIO(data))
        syntax = header.file_meta.TransferSyntaxUID
    except Exception:  # a damaged file may raise anything
        raise DamagedError from None
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        decoder = None
    if decoder is None or not decoder.is_available:
        raise StudyError("compression", syntax=syntax.name if syntax in UID_dictionary else "?")
    for s, _ in slices:
        try:
            pixels, _ = decoder.as_array(header, index=s.frame, raw=True)
        except MemoryError:
            raise
        except Exception:
            raise DamagedError from None
        if pixels.shape != s.shape:
            raise DamagedError
        yield masked(pixels, header)


def masked(pixels: NDArray[Any], header: Any) -> NDArray[Any]:
    """Stored values without what old scanners keep in the bits above them."""
    spare = int(header.get("BitsAllocated") or 16) - int(header.get("BitsStored") or 16)
    if pixels.dtype.kind not in "iu" or spare <= 0:
        return pixels
    shift = pixels.dtype.itemsize * 8 - int(header.BitsStored)
    return (pixels << shift) >> shift


def to_hu(pixels: NDArray[Any], slope: float, intercept: float, out: NDArray[Any]) -> None:
    """Stored values -> Hounsfield units, into `out` int16 or float32."""
    if out.dtype == np.int16 and pixels.dtype in (np.int16, np.uint16) and slope == 1 and fits(pixels, intercept):
        # Where the sum fits, it does not matter that both count modulo 65536
        np.add(pixels.view(np.uint16), np.uint16(int(intercept) % (1 << 16)), out=out.view(np.uint16))
    elif out.dtype == np.int16:
        wide = np.int64 if pixels.dtype.itemsize > 2 or abs(slope) > 1000 else np.int32
        values: NDArray[np.int64 | np.int32] = pixels.astype(wide)
        values = values * int(slope) + int(np.clip(intercept, -(1 << 30), 1 << 30))
        np.clip(values, -(1 << 15), (1 << 15) - 1, out=out, casting="unsafe")
    else:
        np.multiply(pixels, slope, out=out, casting="unsafe")
        out += intercept


def fits(pixels: NDArray[Any], intercept: float) -> bool:
    """Whether every sum is an int16."""
    return int(pixels.min()) + intercept >= -(1 << 15) and int(pixels.max()) + intercept < 1 << 15


def fill(hu: NDArray[Any], present: list[int]) -> None:
    """Interpolates the planes that are missing between those that are present."""
    for before, after in pairwise(present):
        for place in range(before + 1, after):
            share = (place - before) / (after - before)
            plane = hu[before] * (1 - share) + hu[after] * share
            hu[place] = np.rint(plane) if hu.dtype == np.int16 else plane
