"""The tensor of a series equals that of SimpleITK's volume from the same files."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # type: ignore[import-untyped]  # noqa: N813

from scripts.infer.headers import read_headers
from scripts.infer.pixels import read_volume
from scripts.infer.series import choose_series
from scripts.infer.source import open_study
from scripts.infer.volume import Volume, preprocess_volume
from tests.dicom_studies import lungs, series, volume_of

SHAPE = 64, 96, 96
C, S = np.cos(np.radians(10)), np.sin(np.radians(10))
TURNED = {  # ImageOrientationPatient, the direction from slice to slice
    "axial": ((1, 0, 0, 0, 1, 0), (0, 0, 1)),
    "reversed": ((1, 0, 0, 0, 1, 0), (0, 0, -1)),
    "feet first": ((-1, 0, 0, 0, 1, 0), (0, 0, -1)),
    "prone": ((-1, 0, 0, 0, -1, 0), (0, 0, 1)),
    "coronal": ((1, 0, 0, 0, 0, -1), (0, 1, 0)),
    "oblique": ((1, 0, 0, 0, C, S), (0, -S, C)),
}


def independent(image: sitk.Image) -> Volume:
    """The volume as SimpleITK turns it; LPS is ITK's patient space, with axes to Left, Posterior, Superior."""
    turned = sitk.DICOMOrient(image, "LPS")
    x, y, z = turned.GetSpacing()
    return Volume(sitk.GetArrayFromImage(turned).transpose(0, 2, 1), (z, x, y))


@pytest.mark.parametrize("turned", TURNED)
def test_dicom_gives_the_tensor_that_simpleitk_s_volume_gives(tmp_path: Path, turned: str) -> None:
    orientation, step = TURNED[turned]
    series(tmp_path, lungs(24), spacing=(3, 1.1, 0.9), orientation=orientation, step=step)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    expected = preprocess_volume(independent(reader.Execute()), SHAPE)

    with open_study(tmp_path) as source:
        _, volume = choose_series(
            read_headers(source)[0], lambda one: read_volume(source, one)[0], lambda volume: "NONE"
        )

    np.testing.assert_allclose(preprocess_volume(volume, SHAPE), expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.1


@pytest.mark.parametrize("letters", ["LPS", "RAS", "LAS", "PSL", "IRA"])
def test_nifti_gives_the_tensor_that_simpleitk_s_volume_gives(tmp_path: Path, letters: str) -> None:
    """`letters`: where each axis points, as in nibabel."""
    image = nibabel.Nifti1Image(lungs(24).transpose(2, 1, 0), np.diag([0.9, 1.1, 3, 1]))
    ours = nibabel.orientations.io_orientation(image.affine)
    wanted = nibabel.orientations.axcodes2ornt(letters)
    image = image.as_reoriented(nibabel.orientations.ornt_transform(ours, wanted))
    assert "".join(nibabel.aff2axcodes(image.affine)) == letters
    path = tmp_path / "v.nii.gz"
    nibabel.save(image, path)

    expected = preprocess_volume(independent(sitk.ReadImage(str(path))), SHAPE)

    np.testing.assert_allclose(preprocess_volume(volume_of(path), SHAPE), expected, rtol=0, atol=1e-6)
