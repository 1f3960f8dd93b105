"""Compare BPR's scores and tags of whole series, by PyTorch and by the ONNX file; for scripts/convert/compare.py."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import torch

from convertation.bpr.bpreg import Settings, preprocess, tag
from convertation.bpr.vgg import load_network
from scripts.convert.sample import make_sample

SEED = 0
SAMPLES = 2


def check_scores(checkpoint: Path, entry: dict[str, Any], onnx: Path) -> dict[str, Any]:
    """Compare the scores of every slice of two sample series, and return the tags that a server must answer.

    The first series shows a body from bottom to top. The second shows the same height in every slice, so it is a series
    of no part of the body.
    Returns `difference` (the largest of the scores, relative to `scale`), `scale` (PyTorch's largest absolute score)
    and `served`. The settings are inference-settings.json beside the checkpoint. SystemExit if the settings are missing
    or unusable, if scores are NaN, infinite or all the same, or if the tags differ.
    """
    path = checkpoint.parent / "inference-settings.json"
    try:
        settings = Settings.read(path)
    except ValueError as error:
        raise SystemExit(f"{error}\nput the network's own beside {checkpoint}") from None
    network = load_network(checkpoint, entry)
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    difference, scale, served = 0.0, 0.0, []
    for first in range(SAMPLES):
        request = make_sample(entry, SEED, 1, first)
        spacing = request["metadata"][0]
        slices = preprocess(request["input"][0], spacing, side=entry["input"][-1])
        batches = np.array_split(slices, range(entry["batch"][1], len(slices), entry["batch"][1]))
        with torch.inference_mode():
            reference = np.concatenate([network(torch.from_numpy(batch)).numpy() for batch in batches])
        scores = np.concatenate([session.run(["output"], {"input": batch})[0] for batch in batches])
        if not np.isfinite([reference, scores]).all() or np.ptp(reference) == 0:
            raise SystemExit(f"{onnx}: scores are NaN, infinite or the same for every slice; is {checkpoint} trained?")
        expected, found = (tag(values, float(spacing[2]), settings) for values in (reference, scores))
        if found != expected:
            raise SystemExit(
                f"{onnx}: the tag of sample series {first} is {found}, expected {expected} as with PyTorch; "
                f"next: rm {onnx} && make onnx MODEL=bpr"
            )
        difference = max(difference, float(np.abs(scores - reference).max()))
        scale = max(scale, float(np.abs(reference).max()))
        served.append({"seed": SEED, "first": first, "batch": 1, "output": [expected]})
    return {"difference": difference / scale, "scale": scale, "served": served}
