"""Read one study from its files and get its result."""

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
from scripts.infer.series import choose_series, explain_choice, list_warnings
from scripts.infer.source import Source, open_study
from scripts.infer.stack import measure_extent
from scripts.infer.values import check_values, find_doubts
from scripts.infer.volume import Volume, preprocess_volume

SHORT, PARTLY = 20.0, 100.0  # mm that a series covers: below the first a failure, below the second a warning


@dataclass
class Reading:
    """What is known of a study so far; `result` is None until the networks have answered."""

    study_uid: str = ""
    series_uid: str = ""
    result: Result | None = None
    warnings: list[str] | None = None
    choice: str = ""  # why this series or NIfTI file was chosen
    preprocessing: float = 0.0  # s, from voxels to the tensor
    volume: str = ""  # digest of every fourth row and column of the tensor; noise makes volumes differ there, too


def examine_study(path: Path, models: Models, reading: Reading, *, flat: bool = False) -> None:
    """Fill in `reading`; its warnings and UIDs also if StudyError is raised."""
    reading.result = models.infer(make_tensor(path, models, reading, flat=flat))


def make_tensor(path: Path, models: Models, reading: Reading, *, flat: bool = False) -> NDArray[np.float32]:
    """The ViT's input for a study, float32 `models.shape`; StudyError as in `examine_study`."""
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
    """The volume of a study: from its CT series, else from its NIfTI files. StudyError as in `examine_study`."""
    warnings = reading.warnings = reading.warnings or []
    with open_study(path, flat) as source:
        found, skipped = read_headers(source)
        names = nifti.list_names(source)
        if not found and not names and source.unread:
            raise source.unread[0]
        if count := sum(error.key != "unknown_volume" for error in source.unread):
            warnings.append(translate("unread", count=count))
        if not names or any(series.modality == "CT" for series in found):
            if skipped:
                warnings.append(translate("skipped_files", count=skipped))
            return read_dicom(source, found, models, reading)
        warnings.append(translate("unchecked"))
        volume, reading.choice = nifti.read_nifti(source, names, warnings)
    return volume


def read_dicom(source: Source, found: list[Series], models: Models, reading: Reading) -> Volume:
    """The volume of the series that is chosen from `found`."""
    warnings = reading.warnings
    assert warnings is not None
    if (count := len({series.study for series in found})) > 1:
        warnings.append(translate("several_studies", count=count))
    warnings_of: dict[int, list[str]] = {}
    passed_over: list[str] = []

    def read(series: Series) -> Volume:
        chest = series.body_part == "CHEST"
        if chest and not reading.series_uid:  # the study's row shows it if no series can be read
            reading.study_uid, reading.series_uid = series.study, series.uid
        try:
            if SHORT > (covered := measure_extent(series.slices)[0]) > 0:
                raise StudyError("short", covered=f"{covered:.0f}")
            volume, found_there = read_volume(source, series)
        except StudyError as error:
            if chest:
                passed_over.append(str(error))
            raise
        warnings_of[id(series)] = found_there
        return volume

    series, volume = choose_series(found, read, models.find_body_part)
    reading.study_uid, reading.series_uid = series.study, series.uid
    warnings += [translate("passed_over", why=why) for why in passed_over]
    warnings += [*list_warnings(series), *warnings_of[id(series)]]
    if (covered := round(volume.hu.shape[0] * volume.spacing[0])) < PARTLY:
        warnings.append(translate("partly", covered=covered))
    reading.choice = explain_choice(found, series)
    return volume
