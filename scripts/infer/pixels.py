"""The voxels of a series: decoded, in Hounsfield units, gaps filled."""

import io
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom._uid_dict import UID_dictionary
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from scripts.infer.headers import Series, Slice, number
from scripts.infer.source import Source
from scripts.infer.stack import FEWEST, MOST_MISSING, stack
from scripts.infer.volume import Volume, oriented
from scripts.infer.words import StudyError, say

OUTSIDE = -1000  # HU of what the scanner padded


class DamagedError(Exception):
    """The pixels of one file cannot be read."""


def read_volume(source: Source, series: Series) -> tuple[Volume, list[str]]:
    """The voxels of a series in Hounsfield units; gaps and damaged images are filled from the slices around them.

    StudyError: no volume can be made of it, or two different images lie in one place.
    """
    whole = stack(series.slices)
    if any(math.isnan(v) for s in series.slices for v in (s.slope or 1.0, s.intercept or 0.0)):
        raise StudyError("bad_rescale")
    places = {(s.file, s.frame): place for place, there in enumerate(whole.slices) for s in there}
    by_file: dict[str, list[tuple[Slice, int]]] = {}
    for s in series.slices:  # in the order in which they lie in the archive
        if (s.file, s.frame) in places:
            by_file.setdefault(s.file, []).append((s, places[s.file, s.frame]))
    exact = all(float(v).is_integer() for s in series.slices for v in (s.slope or 1.0, s.intercept or 0.0))
    hu = np.empty((len(whole.slices), *series.slices[0].shape), np.int16 if exact else np.float32)
    present: set[int] = set()
    copies = damaged = 0
    for name, slices in by_file.items():
        count = 0
        try:
            for (s, place), (pixels, padding) in zip(slices, images(source, name, slices), strict=True):
                plane = np.empty_like(hu[place]) if place in present else hu[place]
                to_hu(pixels, 1.0 if s.slope is None else s.slope, s.intercept or 0.0, plane)
                if padding is not None:
                    plane[padding] = OUTSIDE
                if place in present:
                    if not np.array_equal(plane, hu[place]):
                        raise StudyError("ambiguous")
                    copies += 1
                present.add(place)
                count += 1
        except DamagedError:
            damaged += len(slices) - count
    filled = sorted(present)
    lacking = sum(map(bool, whole.slices)) - len(present)
    if lacking and (len(filled) < FEWEST or len(hu) - len(filled) > MOST_MISSING * len(hu)):
        raise StudyError("damaged", count=damaged)
    found = list(whole.remarks)
    if copies:
        found.append(say("duplicates", count=copies))
    if damaged:
        found.append(say("damaged_images", count=damaged))
    fill(hu, filled)
    hu = hu[filled[0] : filled[-1] + 1]
    view, order = oriented(hu, whole.directions)
    lengths = np.linalg.norm(whole.directions, axis=0)
    return Volume(view, (lengths[order[0]], lengths[order[1]], lengths[order[2]])), found


def images(
    source: Source, name: str, slices: list[tuple[Slice, int]]
) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_] | None]]:
    """Stored values (rows, columns) of the wanted frames of a file, and where they are padding (None: nowhere)."""
    with source.open(name) as file:
        data = file.read()
    try:
        header = pydicom.dcmread(io.BytesIO(data))
        syntax = header.file_meta.get("TransferSyntaxUID")
        if not syntax:  # some archives lose it; only plain pixels can be told from the data themselves
            implicit, little = header.original_encoding
            syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            header.file_meta.TransferSyntaxUID = syntax
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
        yield masked(pixels, header), padded(masked(pixels, header), header)


def padded(pixels: NDArray[Any], header: Any) -> NDArray[np.bool_] | None:
    """Where stored values are PixelPaddingValue, or up to PixelPaddingRangeLimit; None: nowhere.

    DICOM PS3.3 C.7.5.1.1.2. Its sign is often another than the pixels': -2000 as 63536.
    """
    value = number(header, "PixelPaddingValue")
    if value is None or pixels.dtype.kind not in "iu":
        return None
    end = number(header, "PixelPaddingRangeLimit")
    ends = [as_stored(int(item), pixels.dtype) for item in (value, value if end is None else end)]
    low, high = min(ends), max(ends)
    found: NDArray[np.bool_] = pixels == low if low == high else (pixels >= low) & (pixels <= high)
    return found if found.any() else None


def as_stored(value: int, kind: np.dtype[Any]) -> int:
    """A value as one of `kind`, whatever its sign was taken for."""
    bits = 8 * kind.itemsize
    value %= 1 << bits
    return value - (1 << bits) if kind.kind == "i" and value >> (bits - 1) else value


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
