"""DICOM studies of a made-up patient, written by pydicom: tiny series with the geometry of real ones."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from scripts.infer.models import Models
from scripts.infer.study import Reading, read_study
from scripts.infer.volume import Volume

PATIENT = "Ivanov^Ivan^Ivanovich"  # must not appear in any output


def lungs(depth: int, rows: int = 48, columns: int = 40, seed: int = 0) -> NDArray[np.int16]:
    """Return (z, y, x) HU: noise in a body of 40 HU with a lung of -800 HU."""
    hu = np.random.default_rng(seed).integers(-30, 110, (depth, rows, columns), np.int16)
    hu[:, rows // 4 : rows // 2, columns // 4 : columns // 2] -= 840
    return hu


def uid(*names: object) -> str:
    return generate_uid(entropy_srcs=[str(name) for name in names])


def series(
    folder: Path,
    hu: NDArray[Any],
    *,
    name: str = "series",
    study: str = "study",
    spacing: tuple[float, float, float] = (5.0, 6.0, 6.5),  # mm; slices, rows, columns
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    step: tuple[float, float, float] = (0, 0, 1),
    slope: float = 1,
    intercept: float = -1024,
    signed: bool = False,
    **tags: Any,
) -> list[Path]:
    """Write (z, y, x) HU as one uncompressed file per slice; a tag given as None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = np.rint((hu.astype(np.float64) - intercept) / slope).astype(np.int16 if signed else np.uint16)
    paths = []
    for index, plane in enumerate(stored):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid(study, name, index)
        ds.PatientName, ds.PatientID = PATIENT, "Ivanov-1970"
        ds.StudyInstanceUID, ds.SeriesInstanceUID = uid(study), uid(study, name)
        ds.Modality, ds.BodyPartExamined = "CT", "CHEST"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.SliceThickness = spacing[0]
        ds.WindowCenter, ds.WindowWidth = 40, 400
        ds.InstanceNumber = index + 1
        ds.ImagePositionPatient = [float(f"{-100 + spacing[0] * index * axis:.4f}") for axis in step]
        ds.ImageOrientationPatient = list(orientation)
        ds.PixelSpacing = list(spacing[1:])
        ds.Rows, ds.Columns = plane.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
        ds.PixelRepresentation = int(signed)
        ds.RescaleSlope, ds.RescaleIntercept = slope, intercept
        ds.PixelData = plane.tobytes()
        for tag, value in tags.items():
            if value is None:
                delattr(ds, tag)
            else:
                setattr(ds, tag, value)
        paths.append(folder / f"{name}-{index:03d}.dcm")
        ds.save_as(paths[-1], enforce_file_format=True)
    return paths


def volume_of(study: Path) -> Volume:
    """Read the volume of a study without networks; StudyError as in the program."""
    return read_study(study, Models(), Reading())
