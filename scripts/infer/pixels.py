"""The voxels of a series in Hounsfield units, decoded and with gaps filled."""

import io
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from scripts.infer.decode import DamagedError, decode_frame
from scripts.infer.headers import Series, Slice, read_number
from scripts.infer.messages import StudyError, translate
from scripts.infer.source import Source
from scripts.infer.stack import FEWEST, MOST_MISSING, stack_slices
from scripts.infer.volume import Volume, orient_axes

OUTSIDE = -1000  # HU given to padding


def read_volume(source: Source, series: Series) -> tuple[Volume, list[str]]:
    """The volume of a series and its warnings; gaps and damaged images are filled from neighbouring slices.

    StudyError: the series is not a volume, or two different images have the same place.
    """
    whole = stack_slices(series.slices)
    places = {(s.file, s.frame): place for place, there in enumerate(whole.slices) for s in there}
    by_file: dict[str, list[tuple[Slice, int]]] = {}
    for s in series.slices:  # in the order of the files in an archive
        if (s.file, s.frame) in places:
            by_file.setdefault(s.file, []).append((s, places[s.file, s.frame]))
    factors = [v for s in series.slices for v in (s.slope or 1.0, s.intercept or 0.0) if not math.isnan(v)]
    exact = all(float(v).is_integer() for v in factors)
    hu = np.empty((len(whole.slices), *series.slices[0].shape), np.int16 if exact else np.float32)
    present: set[int] = set()
    copies = damaged = 0
    why: StudyError | None = None  # of the first image that is intact, but cannot be used

    def convert(image: Image, s: Slice, place: int) -> Done:
        """Write the plane to its place in `hu`; if several images claim the place, return the plane instead."""
        if math.isnan(s.slope or 1.0) or math.isnan(s.intercept or 0.0):
            raise StudyError("bad_rescale")
        is_only = len(whole.slices[place]) == 1
        plane = hu[place] if is_only else np.empty_like(hu[place])
        pixels, padding = image.read(s)
        convert_to_hu(pixels, 1.0 if s.slope is None else s.slope, s.intercept or 0.0, plane)
        if padding is not None:
            plane[padding] = OUTSIDE
        return place, None if is_only else plane

    for done in run_in_parallel(list_jobs(source, by_file, convert)):
        try:
            place, plane = done()
        except DamagedError:
            damaged += 1
            continue
        except StudyError as error:
            damaged, why = damaged + 1, why or error
            continue
        if plane is None:
            pass
        elif place not in present:
            hu[place] = plane
        elif np.array_equal(plane, hu[place]):
            copies += 1
        else:
            raise StudyError("ambiguous")
        present.add(place)
    filled = sorted(present)
    lacking = sum(map(bool, whole.slices)) - len(present)
    if lacking and (len(filled) < FEWEST or len(hu) - len(filled) > MOST_MISSING * len(hu)):
        raise why or StudyError("damaged", count=damaged)
    warnings = list(whole.warnings)
    if copies:
        warnings.append(translate("duplicates", count=copies))
    if damaged:
        warnings.append(translate("damaged_images", count=damaged))
    fill_missing(hu, filled)
    hu = hu[filled[0] : filled[-1] + 1]
    view, order = orient_axes(hu, whole.directions)
    lengths = np.linalg.norm(whole.directions, axis=0)
    return Volume(view, (lengths[order[0]], lengths[order[1]], lengths[order[2]])), warnings


class Image:
    """A DICOM file in memory; `header` is None if it is damaged."""

    def __init__(self, data: bytes) -> None:
        self.header: Any = None
        try:
            header = pydicom.dcmread(io.BytesIO(data))
            syntax = header.file_meta.get("TransferSyntaxUID")
            if not syntax:  # some archives lose it; the data then show only plain encodings
                implicit, little = header.original_encoding
                plain = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
                syntax = header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else plain
            self.header, self.syntax = header, syntax
        except MemoryError:
            raise
        except Exception:  # a damaged file may raise anything
            pass

    def read(self, s: Slice) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Stored values (rows, columns) of a frame, and a mask of its padding (None: no padding).

        DamagedError: it cannot be read. StudyError: no decoder here knows this compression.
        """
        if self.header is None:
            raise DamagedError
        pixels = decode_frame(self.header, self.syntax, s.frame)
        if pixels.shape != s.shape:
            raise DamagedError
        try:
            pixels = mask_bits(pixels, self.header)
            return pixels, find_padding(pixels, self.header)
        except (ValueError, TypeError, NotImplementedError):  # tags that are not numbers
            raise DamagedError from None


Done = tuple[int, NDArray[Any] | None]
Job = Callable[[], Done]


def list_jobs(
    source: Source, by_file: dict[str, list[tuple[Slice, int]]], convert: Callable[[Image, Slice, int], Done]
) -> Iterator[Job]:
    """One job for each image, in the order of the files; files are read here, one after another."""
    for name, slices in by_file.items():
        with source.open(name) as file:
            image = Image(file.read())
        for s, place in slices:
            yield partial(convert, image, s, place)


def run_in_parallel(work: Iterator[Job]) -> Iterator[Job]:
    """Run jobs on all CPUs and yield, in order, calls that give each result or raise its error; few jobs wait."""
    workers = len(os.sched_getaffinity(0))
    waiting: deque[Future[Done]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for job in work:
            waiting.append(pool.submit(job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result
        while waiting:
            yield waiting.popleft().result


def find_padding(pixels: NDArray[Any], header: Any) -> NDArray[np.bool_] | None:
    """A mask of PixelPaddingValue, or of its range to PixelPaddingRangeLimit; None if no pixel has it.

    DICOM PS3.3 C.7.5.1.1.2. Its sign often differs from that of the pixels: -2000 as 63536.
    """
    value = read_number(header, "PixelPaddingValue")
    if value is None or pixels.dtype.kind not in "iu":
        return None
    end = read_number(header, "PixelPaddingRangeLimit")
    ends = [convert_sign(int(item), pixels.dtype) for item in (value, value if end is None else end)]
    low, high = min(ends), max(ends)
    found: NDArray[np.bool_] = pixels == low if low == high else (pixels >= low) & (pixels <= high)
    return found if found.any() else None


def convert_sign(value: int, kind: np.dtype[Any]) -> int:
    """The value that has the same bits in the integer type `kind`, signed or not."""
    bits = 8 * kind.itemsize
    value %= 1 << bits
    return value - (1 << bits) if kind.kind == "i" and value >> (bits - 1) else value


def mask_bits(pixels: NDArray[Any], header: Any) -> NDArray[Any]:
    """Stored values without the bits above BitsStored, where old scanners keep other data."""
    spare = int(header.get("BitsAllocated") or 16) - int(header.get("BitsStored") or 16)
    if pixels.dtype.kind not in "iu" or spare <= 0:
        return pixels
    shift = pixels.dtype.itemsize * 8 - int(header.BitsStored)
    return (pixels << shift) >> shift


def convert_to_hu(pixels: NDArray[Any], slope: float, intercept: float, out: NDArray[Any]) -> None:
    """Stored values -> Hounsfield units, written to `out`, int16 or float32."""
    if out.dtype == np.int16 and pixels.dtype in (np.int16, np.uint16) and slope == 1 and fits_int16(pixels, intercept):
        # The sum fits int16, so adding modulo 65536 gives it
        np.add(pixels.view(np.uint16), np.uint16(int(intercept) % (1 << 16)), out=out.view(np.uint16))
    elif out.dtype == np.int16:
        wide = np.int64 if pixels.dtype.itemsize > 2 or abs(slope) > 1000 else np.int32
        values: NDArray[np.int64 | np.int32] = pixels.astype(wide)
        values = values * int(slope) + int(np.clip(intercept, -(1 << 30), 1 << 30))
        np.clip(values, -(1 << 15), (1 << 15) - 1, out=out, casting="unsafe")
    else:
        np.multiply(pixels, slope, out=out, casting="unsafe")
        out += intercept


def fits_int16(pixels: NDArray[Any], intercept: float) -> bool:
    """Whether every pixel plus `intercept` fits int16."""
    return int(pixels.min()) + intercept >= -(1 << 15) and int(pixels.max()) + intercept < 1 << 15


def fill_missing(hu: NDArray[Any], present: list[int]) -> None:
    """Interpolate missing planes between those that are present."""
    for before, after in pairwise(present):
        for place in range(before + 1, after):
            share = (place - before) / (after - before)
            plane = hu[before] * (1 - share) + hu[after] * share
            hu[place] = np.rint(plane) if hu.dtype == np.int16 else plane
