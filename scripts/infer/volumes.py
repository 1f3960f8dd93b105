"""Write CT studies as volumes, with which `make compare INPUT=folder` asks two repositories.

    python -m scripts.infer.volumes REPOSITORY INPUT OUT

INPUT: studies as `make infer` reads them. OUT: a folder, emptied first, with one .npy for each study of a chest:
float32 (1, 240, 480, 480), HU / 1000 in [-1, 1]. REPOSITORY: its bpr_model decides which series show a chest.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

from scripts.infer.messages import StudyError, translate
from scripts.infer.models import Local
from scripts.infer.source import find_studies
from scripts.infer.study import Reading, make_tensor
from scripts.infer.worker import locate_error


def write_volumes(repository: Path, top: Path, out: Path) -> None:
    """Write one .npy for each readable study, named after it. SystemExit: no study is readable."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with Local(repository) as models:
        for number, path in enumerate(find_studies(top, out), 1):
            name = f"{number:03} {path.resolve().name}"
            print(f"  reading study {name}", flush=True)
            try:
                volume = make_tensor(path, models, Reading(), flat=path == top)
            except StudyError as error:
                print(f"  left out: {error}", flush=True)
                continue
            except Exception as bug:  # an error of a library; its text may repeat content of a file
                print(f"  left out: {translate('internal', what=locate_error(bug))}", flush=True)
                continue
            np.save(out / f"{name}.npy", volume[None])
    if not any(out.iterdir()):
        raise SystemExit(f"INPUT={top}: no study in it can be read; expected DICOM folders, archives or NIfTI files")


if __name__ == "__main__":
    try:
        write_volumes(*map(Path, sys.argv[1:]))
    except OSError as error:
        raise SystemExit(
            f"{error.filename or sys.argv[3]}: {error.strerror}; make room or access, then run make compare again"
        ) from None
