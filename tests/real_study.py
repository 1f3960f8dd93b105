"""The published repository, at full size, gives two studies two answers, the same as PyTorch's.

    make repository WEIGHTS=synthetic && .venv/bin/python -m pytest tests/real_study.py

`make test` does not find this file by its name; .ci/run runs it when the repository has been made.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from convertation.head import mlp
from convertation.vit import ctvit
from scripts.infer.findings import FINDINGS
from scripts.infer.volume import preprocess_volume
from tests.dicom_studies import volume_of

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "tests/reference/study.nii.gz"
TOLERANCE = 1.0e-4  # the tables have four digits


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the reference study and a variant of it: reversed, with air of less noise, and with metal."""
    folder = tmp_path_factory.mktemp("studies")
    shutil.copy(STUDY, folder / "a.nii.gz")
    image: Any = nibabel.load(STUDY)
    hu = np.asanyarray(image.dataobj)[::-1].astype(np.int16)
    air = np.random.default_rng(0).normal(-990, 4, hu.shape)
    hu = np.where(hu < -900, air, hu).astype(np.int16)
    hu[tuple(slice(size // 2, size // 2 + 8) for size in hu.shape)] = 3000
    nibabel.save(nibabel.Nifti1Image(hu, image.affine), folder / "b.nii.gz")
    return folder


@pytest.fixture(scope="module")
def expected(studies: Path) -> dict[str, NDArray[np.float64]]:
    """PyTorch's probabilities for each study: of pathology, then of each finding."""
    entries = {
        name: json.loads((ROOT / f"build/models/{name}.json").read_text()) for name in ("vit", "binary", "multilabel")
    }
    files = {
        name: ROOT / "build/synthetic" / entry["checkpoint"].format(VIT="LiPro") for name, entry in entries.items()
    }
    network = ctvit.load_network(files["vit"], entries["vit"])
    binary, multilabel = (mlp.load_network(files[name], entries[name]) for name in ("binary", "multilabel"))
    answers = {}
    for path in sorted(studies.iterdir()):
        volume = torch.from_numpy(preprocess_volume(volume_of(path)))
        embedding = torch.nn.functional.normalize(network(volume[None, None]), dim=-1)
        pathology, findings = binary(embedding).softmax(dim=-1)[0, 1:], multilabel(embedding).sigmoid()[0]
        answers[path.name] = torch.cat([pathology, findings]).double().numpy()
    return answers


def test_two_studies_get_two_answers_and_they_are_pytorchs(
    studies: Path, expected: dict[str, NDArray[np.float64]], tmp_path: Path
) -> None:
    command = ["make", "infer", "WEIGHTS=synthetic", f"INPUT={studies}", f"OUTPUT={tmp_path / 'out'}"]
    subprocess.run(command, cwd=ROOT, check=True)

    rows = {row["path_to_study"]: row for row in json.loads((tmp_path / "out/output.json").read_text())["studies"]}
    assert {name: row["processing_status"] for name, row in rows.items()} == dict.fromkeys(expected, "Success")
    answers = {
        name: np.array([row["probability_of_pathology"], *(row["findings"][finding] for finding in FINDINGS)])
        for name, row in rows.items()
    }
    for name, answer in answers.items():
        assert np.abs(answer - expected[name]).max() < TOLERANCE, name
    assert np.abs(expected["a.nii.gz"] - expected["b.nii.gz"]).max() > 10 * TOLERANCE
