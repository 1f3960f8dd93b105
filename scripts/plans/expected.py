"""Write the answers that a plan is compared with: python -m scripts.plans.expected ONNX ENTRY.json OUT.npy

OUT holds the answers of ONNX Runtime on the CPU, float32 (largest batch, ...), to the seeded inputs on which
scripts/plans/compare_plan.py runs a plan.  This needs no GPU, and one OUT serves the plans of all GPUs.  A ViT is asked
the same two volumes in turn, because build/checks/vit.json lists their codes that rounding may flip.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray

from scripts.convert.sample import make_sample

SEED = 0
VOLUMES = 2


def answer_samples(onnx: Path, entry: dict[str, Any]) -> NDArray[Any]:
    """Return what OUT holds; the samples are asked one at a time, so that a large batch needs no more memory."""
    session, places = open_onnx(onnx), choose_samples(entry)
    request = make_sample(entry, SEED, max(places) + 1)["input"]
    answers = np.concatenate([session.run(["output"], {"input": one[None]})[0] for one in request])
    answer: NDArray[Any] = answers[places]
    return answer


def choose_samples(entry: dict[str, Any]) -> list[int]:
    """Return the numbers of the seeded samples that make up a plan's largest batch."""
    return [place % VOLUMES if entry["family"] == "vit" else place for place in range(max(entry["batch"]))]


def open_onnx(file: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in "onnx", "entry", "out":
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    with given.out.open("wb") as file:  # np.save would add .npy to another name
        np.save(file, answer_samples(given.onnx, json.loads(given.entry.read_text())))
