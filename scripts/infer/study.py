"""One study, from its files to its result."""

import gzip
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from scripts.infer.findings import Result
from scripts.infer.headers import Series, read_headers
from scripts.infer.models import Models
from scripts.infer.pixels import read_volume
from scripts.infer.series import choose, reason, remarks
from scripts.infer.source import BROKEN, is_nifti, opened, read_to_end
from scripts.infer.stack import STEEP, TILT, measure
from scripts.infer.volume import HU_LIMIT, Volume, check_size, oriented, preprocess
from scripts.infer.words import StudyError, say

LUNG = -500  # HU; air and lung are below, in every chest
MOST_HU, SHARE_OF_METAL = 3071, 0.01  # HU of 12 bits and an intercept of -1024; the share of voxels beyond it
NO_METAL = 0.1  # a share beyond it that no implant reaches
SHARE_OF_BONE = 0.1  # of the voxels above what the network sees
SHORT, PARTLY = 20.0, 100.0  # mm of a chest: less is refused, less is told
# sform and qform of a tilted series differ: only sform can hold the shear, up to tan 15° and 1 / cos 15° of a step
FORMS_TURNED, FORMS_LONGER = 0.3, 0.05


@dataclass
class Reading:
    """What is known of a study so far; without a result where there was trouble."""

    study_uid: str = ""
    series_uid: str = ""
    result: Result | None = None
    warnings: list[str] | None = None
    choice: str = ""  # why this series
    preprocessing: float = 0.0  # s from voxels to the tensor


def examine(path: Path, models: Models, reading: Reading, *, flat: bool = False) -> None:
    """Fills in `reading`, the warnings and UIDs also where StudyError is raised."""
    reading.result = models.read(tensor(path, models, reading, flat=flat))


def tensor(path: Path, models: Models, reading: Reading, *, flat: bool = False) -> NDArray[np.float32]:
    """What the ViT reads of a study, float32 `models.shape`; StudyError as in `examine`."""
    reading.warnings = []
    volume = nifti(path, reading) if is_nifti(path) and path.is_file() else dicom(path, models, reading, flat)
    check_values(volume.hu)
    start = time.monotonic()
    result = preprocess(volume, models.shape)
    reading.preprocessing = time.monotonic() - start
    reading.warnings += doubts(volume.hu)
    return result


def check_values(hu: NDArray[Any]) -> None:
    """StudyError where voxels cannot be Hounsfield units of a chest, by every fourth of them along each axis.

    Nothing is below 0: HU + 1024, a mask, a window, most MR. Much is denser than metal: signed values taken unsigned.
    """
    some = hu[::4, ::4, ::4]
    some = some[np.isfinite(some)] if some.dtype.kind == "f" else some
    share = float((some > MOST_HU).mean()) if some.size else 0.0
    if not some.size or (some.min() >= 0 and hu.min() >= 0) or share > NO_METAL:
        least, most = (f"{some.min():g}", f"{some.max():g}") if some.size else ("?", "?")
        raise StudyError("no_hounsfield", least=least, most=most, share=f"{100 * share:.0f}")


def doubts(hu: NDArray[Any]) -> list[str]:
    """Why voxels may be no Hounsfield units, by every fourth of them along each axis: one sentence each."""
    some = hu[::4, ::4, ::4]
    found = [say("no_air")] if not (some < LUNG).any() else []
    if (share := float((some > MOST_HU).mean())) > SHARE_OF_METAL:
        found.append(say("too_dense", share=f"{100 * share:.0f}", most=MOST_HU))
    elif (share := float((some > HU_LIMIT).mean())) > SHARE_OF_BONE:
        found.append(say("clipped", share=f"{100 * share:.0f}"))
    return found


def dicom(path: Path, models: Models, reading: Reading, flat: bool) -> Volume:
    """The chosen series of a folder or archive."""
    said = reading.warnings
    assert said is not None
    with opened(path, flat) as source:
        found, skipped = read_headers(source)
        if skipped:
            said.append(say("skipped_files", count=skipped))
        if (count := len({series.study for series in found})) > 1:
            said.append(say("several_studies", count=count))
        of_series: dict[int, list[str]] = {}
        passed_over: list[str] = []

        def read(series: Series) -> Volume:
            chest = series.body_part == "CHEST"
            if chest and not reading.series_uid:  # to be chosen, unless its voxels cannot be read
                reading.study_uid, reading.series_uid = series.study, series.uid
            try:
                if SHORT > (covered := measure(series.slices)[0]) > 0:
                    raise StudyError("short", covered=f"{covered:.0f}")
                volume, said_of = read_volume(source, series)
            except StudyError as error:
                if chest:
                    passed_over.append(str(error))
                raise
            of_series[id(series)] = said_of
            return volume

        series, volume = choose(found, read, models.body_part)
    reading.study_uid, reading.series_uid = series.study, series.uid
    said += [say("passed_over", why=why) for why in passed_over]
    said += [*remarks(series), *of_series[id(series)]]
    if (covered := round(volume.hu.shape[0] * volume.spacing[0])) < PARTLY:
        said.append(say("partly", covered=covered))
    reading.choice = reason(found, series)
    return volume


def nifti(path: Path, reading: Reading) -> Volume:
    """A NIfTI file, taken as it is. StudyError: it is damaged or no volume."""
    assert reading.warnings is not None
    reading.warnings.append(say("unchecked"))
    try:
        path.open("rb").close()
        image: Any = nibabel.load(path)
        shape, affine = tuple(image.shape), np.asarray(image.affine, np.float64)
    except BROKEN as error:
        raise StudyError("unreadable" if isinstance(error, OSError) and error.errno else "bad_nifti") from None
    except MemoryError:
        raise
    except Exception:  # a damaged header may raise anything
        raise StudyError("bad_nifti") from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise StudyError("dimensions", count=len(shape))
    steps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3, :3]  # NIfTI's axes are Right, Anterior, Superior
    lengths = np.linalg.norm(steps, axis=0)
    check_size(shape, lengths.tolist())
    check_forms(image.header)
    cosines = np.abs(steps.T @ steps / np.outer(lengths, lengths)) - np.eye(3)
    angle = math.degrees(math.asin(min(1.0, float(cosines.max()))))
    if angle > STEEP:
        raise StudyError("sheared", angle=f"{angle:.0f}")
    if angle > TILT:
        reading.warnings.append(say("shear", angle=f"{angle:.1f}"))
    try:
        slope, inter = image.dataobj.slope, image.dataobj.inter
        raw = np.asanyarray(image.dataobj.get_unscaled()).reshape(shape, order="F")
        if raw.dtype.kind not in "iuf":  # complex numbers, colours
            raise StudyError("bad_nifti")
        if (slope, inter) != (1, 0) or raw.dtype not in (np.int16, np.int8, np.uint8):
            raw = raw.astype(np.float32) * np.float32(slope) + np.float32(inter)
    except MemoryError:
        raise
    except Exception:
        raise StudyError("bad_nifti") from None
    if path.name.lower().endswith(".gz"):
        try:
            with gzip.open(path) as stream:  # nibabel stops before the checksum
                read_to_end(stream)
        except BROKEN as error:
            raise StudyError("unreadable" if isinstance(error, OSError) and error.errno else "bad_nifti") from None
    if raw.dtype != np.int16 and raw.dtype.kind != "f":
        raw = raw.astype(np.int16)
    if raw.dtype.kind == "f" and (count := int(np.isnan(raw).sum())):
        reading.warnings.append(say("not_numbers", count=count))
    view, order = oriented(raw, steps)
    return Volume(view, (float(lengths[order[0]]), float(lengths[order[1]]), float(lengths[order[2]])))


def check_forms(header: Any) -> None:
    """StudyError where a NIfTI header tells no orientation, or two that disagree by more than a tilted gantry."""
    if not isinstance(header, nibabel.Nifti1Header):
        return
    given: Any = header
    sform, qform = given.get_sform(coded=True)[0], given.get_qform(coded=True)[0]
    if sform is None and qform is None:
        raise StudyError("no_orientation")
    if sform is not None and qform is not None:
        ours, other = sform[:3, :3], qform[:3, :3]
        lengths = np.linalg.norm(other, axis=0)
        turned = np.linalg.norm(ours - other, axis=0) > FORMS_TURNED * lengths
        longer = np.abs(np.linalg.norm(ours, axis=0) - lengths) > FORMS_LONGER * lengths
        if turned.any() or longer.any():
            raise StudyError("forms")
