"""The stored values of one image, decoded by libraries that let other threads run, else by pydicom."""

import struct
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom._uid_dict import UID_dictionary
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from scripts.infer.messages import StudyError

END = b"\xff\xd9"  # ends a JPEG, JPEG-LS or JPEG 2000 image; some decoders do not report that it is missing
# SOF0 to SOF15 without DHT, JPG and DAC, and SOF55: ISO/IEC 10918-1, B.1.1.3; ISO/IEC 14495-1, C.1.1
START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
FILL = 0xFF  # may precede a marker
RLE_HEADER = 64  # bytes
# The start of a JPEG 2000 codestream, and in it the offsets of the image's size and of its precision and sign:
# ISO/IEC 15444-1, A.4.1 and A.5.1
CODESTREAM, EXTENT, PRECISION = b"\xff\x4f\xff\x51", 8, 42
one_at_a_time = threading.Lock()  # pydicom and GDCM do not promise to be thread-safe


class DamagedError(Exception):
    """The pixels of one file cannot be read."""


class UnfitError(Exception):
    """The image is complete but contradicts its DICOM header; pydicom has rules for that."""


def decode_frame(header: Any, syntax: UID, index: int) -> NDArray[Any]:
    """Frame `index`, (rows, columns), in the header's dtype; bits above BitsStored stay as stored.

    DamagedError: it cannot be decoded. StudyError: no decoder here knows this compression.
    """
    decode = DECODERS.get(syntax)
    if decode:
        try:
            return decode(*read_frame(header, index))
        except UnfitError:
            pass
        except MemoryError:
            raise
        except Exception:  # libraries have errors of their own; GDCM is not tried, as damage makes it end the process
            raise DamagedError from None
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        decoder = None
    if decoder is None or not decoder.is_available:
        if decode:
            raise DamagedError
        raise StudyError("compression", syntax=syntax.name if syntax in UID_dictionary else "?")
    try:
        if not syntax.is_compressed:
            return decoder.as_array(header, index=index, raw=True)[0]
        with one_at_a_time:
            return decoder.as_array(header, index=index, raw=True)[0]
    except MemoryError:
        raise
    except Exception:
        raise DamagedError from None


def read_frame(header: Any, index: int) -> tuple[bytes, Any]:
    """The compressed bytes of frame `index`, and the header."""
    offsets = None
    if "ExtendedOffsetTable" in header:
        offsets = header.ExtendedOffsetTable, header.ExtendedOffsetTableLengths
    count = int(header.get("NumberOfFrames") or 1)
    return get_frame(header.PixelData, index, number_of_frames=count, extended_offsets=offsets), header


def convert_to_header(pixels: NDArray[Any], header: Any) -> NDArray[Any]:
    """Decoded values in the header's dtype, widened if needed. DamagedError: their shape or width is another."""
    size = header.BitsAllocated // 8
    if pixels.dtype.itemsize > size or pixels.shape != (header.Rows, header.Columns):
        raise DamagedError
    if pixels.dtype.itemsize < size:
        pixels = pixels.astype(f"{pixels.dtype.kind}{size}")
    return pixels.view(f"{'i' if header.PixelRepresentation else 'u'}{size}")


def is_whole(frame: bytes) -> bool:
    """Whether END ends the frame; padding may follow."""
    return frame[-16:].rstrip(b"\0\xff").endswith(END)


def read_frame_size(frame: bytes) -> tuple[int, int, int]:
    """Precision, rows and columns from the header of a JPEG or JPEG-LS frame."""
    at = 2
    while (kind := frame[at + 1]) not in START_OF_FRAME:
        at += 1 if kind == FILL else 2 + int.from_bytes(frame[at + 2 : at + 4])
    return frame[at + 4], int.from_bytes(frame[at + 5 : at + 7]), int.from_bytes(frame[at + 7 : at + 9])


def check_size(size: tuple[int, ...], header: Any) -> None:
    """DamagedError if a frame's size is not the header's; checked before memory is allocated for it."""
    if size != (header.Rows, header.Columns):
        raise DamagedError


def decode_jpeg(frame: bytes, header: Any) -> NDArray[Any]:
    """Decode JPEG. UnfitError: the frame is cut; libjpeg would fill the rest silently."""
    check_size(read_frame_size(frame)[1:], header)
    if not is_whole(frame):
        raise UnfitError
    return convert_to_header(imagecodecs.jpeg8_decode(frame), header)


def decode_jpegls(frame: bytes, header: Any) -> NDArray[Any]:
    """Decode JPEG-LS. DamagedError: the frame is cut; CharLS could take minutes. UnfitError: another precision."""
    precision, *size = read_frame_size(frame)
    check_size(tuple(size), header)
    if not is_whole(frame):
        raise DamagedError
    pixels = imagecodecs.jpegls_decode(frame)
    if precision != header.BitsStored:
        raise UnfitError
    return convert_to_header(pixels, header)


def decode_jpeg2000(frame: bytes, header: Any, decode: Callable[[bytes], Any] | None = None) -> NDArray[Any]:
    """Decode JPEG 2000. DamagedError: the frame is cut. UnfitError: another precision or sign."""
    start = frame.find(CODESTREAM)
    right, bottom, left, top = struct.unpack_from(">4I", frame, start + EXTENT)
    check_size((bottom - top, right - left), header)
    if not is_whole(frame):
        raise DamagedError
    pixels = decode(frame) if decode else imagecodecs.jpeg2k_decode(frame, numthreads=1)
    if frame[start + PRECISION] != header.BitsStored - 1 | header.PixelRepresentation << 7:
        raise UnfitError
    return convert_to_header(pixels, header)


def decode_htj2k(frame: bytes, header: Any) -> NDArray[Any]:
    return decode_jpeg2000(frame, header, imagecodecs.htj2k_decode)


def decode_rle(frame: bytes, header: Any) -> NDArray[Any]:
    """Decode RLE, DICOM PS3.5 G.5. DamagedError: wrong offsets, which would crash imagecodecs."""
    segments, *offsets = struct.unpack_from("<16I", frame)
    ends = [*offsets[:segments], len(frame)]
    if segments != header.BitsAllocated // 8 or ends[0] != RLE_HEADER or any(a >= b for a, b in pairwise(ends)):
        raise DamagedError
    kind = np.dtype(f"<u{header.BitsAllocated // 8}")
    content = imagecodecs.dicomrle_decode(frame, kind)
    return convert_to_header(np.frombuffer(content, kind).reshape(header.Rows, header.Columns), header)


DECODERS: dict[str, Callable[[bytes, Any], NDArray[Any]]] = {
    **dict.fromkeys((JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1), decode_jpeg),
    **dict.fromkeys((JPEGLSLossless, JPEGLSNearLossless), decode_jpegls),
    **dict.fromkeys((JPEG2000Lossless, JPEG2000), decode_jpeg2000),
    **dict.fromkeys((HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K), decode_htj2k),
    RLELossless: decode_rle,
}
