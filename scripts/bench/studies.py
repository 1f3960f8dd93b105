"""Write a CT study as a scanner does, uncompressed DICOM: python -m scripts.bench.studies FOLDER SLICES SIDE

It runs in .venv-inference, which has pydicom.  The study is a body of 40 HU with noise and a lung of -800 HU, in 1 mm
slices with 0.7 mm pixels.
"""

import sys
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def write_study(folder: Path, slices: int, side: int) -> None:
    """Write one file for each slice: 16-bit values, rescale intercept -1024."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    study, series = (generate_uid(entropy_srcs=[name]) for name in ("study", "series"))
    for index in range(slices):
        stored = chance.integers(1034, 1094, (side, side), np.uint16)
        stored[side // 4 : side // 2, side // 4 : side // 2] -= 840
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(index)])
        ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
        ds.Modality, ds.BodyPartExamined, ds.ImageType = "CT", "CHEST", ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.SliceThickness, ds.InstanceNumber, ds.PixelSpacing = 1, index + 1, [0.7, 0.7]
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, index], [1, 0, 0, 0, 1, 0]
        ds.Rows, ds.Columns = side, side
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
        ds.PixelData = stored.tobytes()
        ds.save_as(folder / f"{index:04}.dcm", enforce_file_format=True)


if __name__ == "__main__":
    write_study(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
