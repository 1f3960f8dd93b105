"""The NIfTI files of a study: choose one and read its voxels."""

import gzip
import math
import re
from collections.abc import Sequence
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from scripts.infer.containers import archive_errors, read_to_end
from scripts.infer.messages import StudyError, translate
from scripts.infer.source import HALVES, PAIR, Source, is_nifti
from scripts.infer.stack import STEEP, TILT
from scripts.infer.values import check_values
from scripts.infer.volume import SPACING, TURNED, Volume, check_size, measure_turn, orient_axes

# How far sform and qform may differ, as shares of a step. Only sform can hold the shear of a tilted series: up to
# tan 15° across and 1 / cos 15° along the step
FORMS_TURNED, FORMS_LONGER = 0.3, 0.05
MM = {"meter": 1000.0, "micron": 0.001}  # NIfTI's other units of length
HEADERS = {348: (nibabel.Nifti1Image, nibabel.Nifti1Pair), 540: (nibabel.Nifti2Image, nibabel.Nifti2Pair)}
SINGLE, TWO = (b"n+1", b"n+2"), (b"ni1", b"ni2")  # magic words of one file and of a pair


class Image:
    """A NIfTI file whose header has been read."""

    def __init__(self, source: Source, name: str) -> None:
        """StudyError: the file is not NIfTI, or its header is damaged."""
        names = [name]
        if name.lower().endswith(PAIR):
            names += [other for other in source.names if is_half(other, name)][:1]
            if len(names) < 2:
                raise StudyError("no_pair")
        with archive_errors("bad_nifti"):
            self.streams = [open_stream(source, name) for name in names]
            image: Any = find_kind(self.streams[0], two=len(names) > 1).from_file_map(
                {key: nibabel.FileHolder(fileobj=self.streams[-(key == "image")]) for key in ("header", "image")}
            )
            self.image, self.header = image, image.header
            self.shape, affine = tuple(image.shape), np.asarray(image.affine, np.float64)
            unit = self.header.get_xyzt_units()[0]
        while len(self.shape) > 3 and self.shape[-1] == 1:
            self.shape = self.shape[:-1]
        self.steps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3, :3]  # NIfTI's axes are Right, Anterior, Superior
        self.is_marked_wrong = False
        if (scale := MM.get(unit, 1.0)) != 1.0:
            scaled = np.linalg.norm(self.steps, axis=0) * scale
            self.is_marked_wrong = not ((scaled >= SPACING[0]) & (scaled <= SPACING[1])).all()
            self.steps = self.steps * (1.0 if self.is_marked_wrong else scale)
        self.lengths = np.linalg.norm(self.steps, axis=0)

    def read_volume(self, warnings: list[str]) -> Volume:
        """The volume of the file; warnings are added to `warnings`. StudyError: it is not a volume, or damaged."""
        if len(self.shape) != 3:
            raise StudyError("dimensions", count=len(self.shape))
        stored = self.header.get_data_dtype()
        if stored.kind not in "iuf":
            raise StudyError("no_densities", kind="complex" if stored.kind == "c" else "RGB")
        check_size(self.shape, self.lengths.tolist())
        check_forms(self.header)
        if self.is_marked_wrong:
            warnings.append(translate("units"))
        cosines = np.abs(self.steps.T @ self.steps / np.outer(self.lengths, self.lengths)) - np.eye(3)
        angle = math.degrees(math.asin(min(1.0, float(cosines.max()))))
        if angle > STEEP:
            raise StudyError("sheared", angle=f"{angle:.0f}")
        if angle > TILT:
            warnings.append(translate("shear", angle=f"{angle:.1f}"))
        with archive_errors("bad_nifti"):
            raw = self.read_voxels()
            for part in self.streams:  # nibabel stops before the checksum
                if isinstance(part, gzip.GzipFile):
                    read_to_end(part)
        if raw.dtype.kind == "f" and (count := int(np.isnan(raw).sum())):
            warnings.append(translate("not_numbers", count=count))
        if angle <= TILT and (turned := measure_turn(self.steps)) > TURNED:
            warnings.append(translate("turned", angle=f"{turned:.0f}"))
        view, order = orient_axes(raw, self.steps)
        lengths = self.lengths.tolist()
        return Volume(view, (lengths[order[0]], lengths[order[1]], lengths[order[2]]))

    def read_voxels(self) -> NDArray[Any]:
        """The scaled values, int16 or float32."""
        data = self.image.dataobj
        slope, inter = data.slope, data.inter
        raw: NDArray[Any] = np.asanyarray(data.get_unscaled()).reshape(self.shape, order="F")
        if (slope, inter) != (1, 0) or raw.dtype not in (np.int16, np.int8, np.uint8):
            return raw.astype(np.float32) * np.float32(slope) + np.float32(inter)
        return raw if raw.dtype == np.int16 else raw.astype(np.int16)


def is_half(other: str, header: str) -> bool:
    """Whether the file `other` holds the voxels for `header`."""
    stem = re.sub(r"\.hdr(\.gz)?$", "", header.lower())
    return other.lower() in [stem + suffix for suffix in HALVES]


def open_stream(source: Source, name: str) -> Any:
    file = source.open(name)
    return gzip.GzipFile(fileobj=file) if name.lower().endswith(".gz") else file


def find_kind(file: Any, *, two: bool) -> Any:
    """nibabel's class for the header in `file`. StudyError: not NIfTI, or Analyze, which has no orientation."""
    start = file.read(348)
    size = next((size for size in HEADERS if start[:4] in (size.to_bytes(4, "little"), size.to_bytes(4, "big"))), 0)
    magic = start[4:7] if size == 540 else start[344:347]
    if size == 348 and two and magic not in (*SINGLE, *TWO):
        raise StudyError("no_orientation")  # Analyze 7.5
    if not size or magic not in (TWO if two else SINGLE):
        raise StudyError("bad_nifti")
    file.seek(0)
    return HEADERS[size][two]


def list_names(source: Source) -> list[str]:
    return [name for name in source.names if is_nifti(name)]


def read_nifti(source: Source, names: Sequence[str], warnings: list[str]) -> tuple[Volume, str]:
    """Read the best volume of a study's NIfTI files; also why it was chosen. Warnings are added to `warnings`.

    Best: in the fewest folders, more than a byte per voxel (others are masks), covers a chest, closest slices; the
    first in this order whose values may be Hounsfield units. StudyError: there is none.
    """
    if len(names) == 1:
        return Image(source, names[0]).read_volume(warnings), ""
    order, troubles = [], []
    for name in names:
        try:
            image = Image(source, name)
            covered, step = measure_extent(image)
        except StudyError as error:
            troubles.append(error)
            continue
        size = image.header.get_data_dtype().itemsize
        order.append((name.count("/"), size == 1, -round(min(covered, 250.0)), round(step, 1), name))
    for *_, name in sorted(order):
        own: list[str] = []
        try:
            volume = Image(source, name).read_volume(own)
            check_values(volume.hu)
        except StudyError as error:
            troubles.append(error)
            continue
        warnings += [translate("several_volumes", count=len(names)), *own]
        covered, step = volume.hu.shape[0] * volume.spacing[0], volume.spacing[0]
        return volume, translate("nifti_choice", count=len(names), covered=f"{covered:.0f}", step=f"{step:.1f}")
    raise troubles[-1] if order else troubles[0]


def measure_extent(image: Image) -> tuple[float, float]:
    """The extent of a volume from head to foot and the distance between its slices, mm."""
    if len(image.shape) != 3 or not np.isfinite(image.lengths).all() or not image.lengths.all():
        return 0.0, math.inf
    axis = int(np.abs(image.steps[2] / image.lengths).argmax())
    return image.shape[axis] * float(image.lengths[axis]), float(image.lengths[axis])


def check_forms(header: Any) -> None:
    """StudyError: a NIfTI header gives no orientation, or two that differ by more than a tilted gantry explains."""
    sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    if sform is None and qform is None:
        raise StudyError("no_orientation")
    if sform is not None and qform is not None:
        ours, other = sform[:3, :3], qform[:3, :3]
        lengths = np.linalg.norm(other, axis=0)
        turned = np.linalg.norm(ours - other, axis=0) > FORMS_TURNED * lengths
        longer = np.abs(np.linalg.norm(ours, axis=0) - lengths) > FORMS_LONGER * lengths
        if turned.any() or longer.any():
            raise StudyError("forms")
