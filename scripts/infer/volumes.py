"""CT studies as the volumes that `make compare INPUT=folder` asks two repositories with.

    python -m scripts.infer.volumes REPOSITORY INPUT OUT

INPUT: studies as `make infer` reads them. OUT: a folder, made anew, with one .npy for each that has a chest: float32
(1, 240, 480, 480), HU / 1000 in [-1, 1]. REPOSITORY: its bpr_model says which series are chests.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

from scripts.infer.models import Local
from scripts.infer.source import studies
from scripts.infer.study import Reading, tensor
from scripts.infer.words import StudyError


def write(repository: Path, top: Path, out: Path) -> None:
    """One .npy for each study that can be read, named like it; SystemExit where none can."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with Local(repository) as models:
        for number, path in enumerate(studies(top, out), 1):
            print(f"  study {number}: {path.name}", flush=True)
            try:
                np.save(out / f"{path.name}.npy", tensor(path, models, Reading(), flat=path == top)[None])
            except StudyError as error:
                print(f"  left out: {error}", flush=True)
    if not any(out.iterdir()):
        raise SystemExit(f"INPUT={top}: no study in it can be read; expected DICOM folders, archives or NIfTI files")


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:]))
