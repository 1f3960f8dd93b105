"""The stored values of one image, by decoders that let other threads run meanwhile; by pydicom's where those fail."""

import threading
from collections.abc import Callable
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

from scripts.infer.words import StudyError

END = b"\xff\xd9"  # of a JPEG, JPEG-LS or JPEG 2000 image; without it, it was cut, which not every decoder tells
CODESTREAM = b"\xff\x4f\xff\x51"  # JPEG 2000 without the boxes of a file around it: ISO/IEC 15444-1, A.4.1 and A.5.1
SSIZ = 42  # where its precision and sign stand
START_OF_FRAME = 0xF7  # the marker in JPEG-LS after whose length the precision stands: ISO/IEC 14495-1, C.2.2
one_at_a_time = threading.Lock()  # pydicom and GDCM promise nothing to threads


class DamagedError(Exception):
    """The pixels of one file cannot be read."""


class UnfitError(Exception):
    """An image for which pydicom's decoders know more."""


def stored(header: Any, syntax: UID, index: int) -> NDArray[Any]:
    """(rows, columns) of frame `index`, of the dtype that the header says; bits beyond BitsStored as they are.

    DamagedError: it cannot be decoded. StudyError: nothing here decodes this compression.
    """
    decode = DECODERS.get(syntax)
    if decode:
        try:
            return decode(*framed(header, index))
        except MemoryError:
            raise
        except Exception:  # each library has errors of its own
            pass
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


def framed(header: Any, index: int) -> tuple[bytes, Any]:
    offsets = None
    if "ExtendedOffsetTable" in header:
        offsets = header.ExtendedOffsetTable, header.ExtendedOffsetTableLengths
    count = int(header.get("NumberOfFrames") or 1)
    return get_frame(header.PixelData, index, number_of_frames=count, extended_offsets=offsets), header


def as_told(pixels: NDArray[Any], header: Any) -> NDArray[Any]:
    """Decoded values as the header's dtype. UnfitError: they are of another size or shape."""
    kind = np.dtype(f"{'i' if header.PixelRepresentation else 'u'}{header.BitsAllocated // 8}")
    if pixels.dtype.itemsize != kind.itemsize or pixels.shape != (header.Rows, header.Columns):
        raise UnfitError
    return pixels.view(kind)


def check_end(frame: bytes) -> None:
    if not frame[-16:].rstrip(b"\0\xff").endswith(END):
        raise UnfitError


def jpeg(frame: bytes, header: Any) -> NDArray[Any]:
    check_end(frame)
    return as_told(imagecodecs.jpeg8_decode(frame), header)


def jpegls(frame: bytes, header: Any) -> NDArray[Any]:
    check_end(frame)
    at = 2
    while frame[at + 1] != START_OF_FRAME:
        at += 2 + int.from_bytes(frame[at + 2 : at + 4])
    if frame[at + 4] != header.BitsStored:
        raise UnfitError
    return as_told(imagecodecs.jpegls_decode(frame), header)


def jpeg2000(frame: bytes, header: Any, decode: Callable[[bytes], Any] | None = None) -> NDArray[Any]:
    check_end(frame)
    told = header.BitsStored - 1 | header.PixelRepresentation << 7
    if frame[:4] != CODESTREAM or frame[SSIZ] != told:
        raise UnfitError
    return as_told(decode(frame) if decode else imagecodecs.jpeg2k_decode(frame, numthreads=1), header)


def htj2k(frame: bytes, header: Any) -> NDArray[Any]:
    return jpeg2000(frame, header, imagecodecs.htj2k_decode)


def rle(frame: bytes, header: Any) -> NDArray[Any]:
    kind = np.dtype(f"<u{header.BitsAllocated // 8}")
    content = imagecodecs.dicomrle_decode(frame, kind)
    return as_told(np.frombuffer(content, kind).reshape(header.Rows, header.Columns), header)


DECODERS: dict[str, Callable[[bytes, Any], NDArray[Any]]] = {
    **dict.fromkeys((JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1), jpeg),
    **dict.fromkeys((JPEGLSLossless, JPEGLSNearLossless), jpegls),
    **dict.fromkeys((JPEG2000Lossless, JPEG2000), jpeg2000),
    **dict.fromkeys((HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K), htj2k),
    RLELossless: rle,
}
