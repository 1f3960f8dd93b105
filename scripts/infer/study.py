"""One study, from its files to its result."""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scripts.infer import nifti
from scripts.infer.findings import Result
from scripts.infer.headers import Series, read_headers
from scripts.infer.messages import StudyError, translate
from scripts.infer.models import Models
from scripts.infer.pixels import read_volume
from scripts.infer.series import choose_series, explain_choice, list_remarks
from scripts.infer.source import Source, open_study
from scripts.infer.stack import measure_extent
from scripts.infer.values import check_values, find_doubts
from scripts.infer.volume import Volume, preprocess_volume

SHORT, PARTLY = 20.0, 100.0  # mm of a chest: less is refused, less is told


@dataclass
class Reading:
    """What is known of a study so far; without a result where there was trouble."""

    study_uid: str = ""
    series_uid: str = ""
    result: Result | None = None
    warnings: list[str] | None = None
    choice: str = ""  # why this series
    preprocessing: float = 0.0  # s from voxels to the tensor
    volume: str = ""  # a digest of the tensor, by every fourth row and column, and noise makes those differ


def examine_study(path: Path, models: Models, reading: Reading, *, flat: bool = False) -> None:
    """Fills in `reading`, the warnings and UIDs also where StudyError is raised."""
    reading.result = models.infer(make_tensor(path, models, reading, flat=flat))


def make_tensor(path: Path, models: Models, reading: Reading, *, flat: bool = False) -> NDArray[np.float32]:
    """What the ViT reads of a study, float32 `models.shape`; StudyError as in `examine_study`."""
    reading.warnings = []
    volume = read_study(path, models, reading, flat=flat)
    check_values(volume.hu)
    start = time.monotonic()
    result = preprocess_volume(volume, models.shape)
    reading.preprocessing = time.monotonic() - start
    reading.volume = hashlib.sha256(result[:, ::4, ::4].tobytes()).hexdigest()[:16]
    reading.warnings += find_doubts(volume.hu)
    return result


def read_study(path: Path, models: Models, reading: Reading, *, flat: bool = False) -> Volume:
    """The volume of a study: of its CT series or, without any, of its NIfTI files. StudyError as in `examine_study`."""
    said = reading.warnings = reading.warnings or []
    with open_study(path, flat) as source:
        found, skipped = read_headers(source)
        names = nifti.list_names(source)
        if not found and not names and source.unread:
            raise source.unread[0]
        if count := sum(error.key != "unknown_volume" for error in source.unread):
            said.append(translate("unread", count=count))
        if not names or any(series.modality == "CT" for series in found):
            if skipped:
                said.append(translate("skipped_files", count=skipped))
            return read_dicom(source, found, models, reading)
        said.append(translate("unchecked"))
        volume, reading.choice = nifti.read_nifti(source, names, said)
    return volume


def read_dicom(source: Source, found: list[Series], models: Models, reading: Reading) -> Volume:
    """The chosen series of a folder or archive."""
    said = reading.warnings
    assert said is not None
    if (count := len({series.study for series in found})) > 1:
        said.append(translate("several_studies", count=count))
    of_series: dict[int, list[str]] = {}
    passed_over: list[str] = []

    def read(series: Series) -> Volume:
        chest = series.body_part == "CHEST"
        if chest and not reading.series_uid:  # to be chosen, unless its voxels cannot be read
            reading.study_uid, reading.series_uid = series.study, series.uid
        try:
            if SHORT > (covered := measure_extent(series.slices)[0]) > 0:
                raise StudyError("short", covered=f"{covered:.0f}")
            volume, said_of = read_volume(source, series)
        except StudyError as error:
            if chest:
                passed_over.append(str(error))
            raise
        of_series[id(series)] = said_of
        return volume

    series, volume = choose_series(found, read, models.find_body_part)
    reading.study_uid, reading.series_uid = series.study, series.uid
    said += [translate("passed_over", why=why) for why in passed_over]
    said += [*list_remarks(series), *of_series[id(series)]]
    if (covered := round(volume.hu.shape[0] * volume.spacing[0])) < PARTLY:
        said.append(translate("partly", covered=covered))
    reading.choice = explain_choice(found, series)
    return volume
