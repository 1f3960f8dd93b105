"""BPR's part of scripts/compare.py: a whole series from voxels to tag, by PyTorch and by the ONNX file."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import torch

from convertation.bpr.bpreg import Settings, preprocess, tag
from convertation.bpr.vgg import load
from scripts.sample import sample

SEED = 0


def check(checkpoint: Path, entry: dict[str, Any], onnx: Path) -> dict[str, Any]:
    """Compare the scores of every slice of the sample series, and give the tag that a server must answer.

    Returns `difference` (largest of the scores, relative to `scale`), `scale` (largest score of PyTorch) and `served`.
    The settings are the checkpoint's neighbour. SystemExit: no settings or unusable ones, scores that are no numbers
    or all the same, or another tag by ONNX Runtime than by PyTorch.
    """
    path = checkpoint.parent / "inference-settings.json"
    try:
        settings = Settings.read(path)
    except ValueError as error:
        raise SystemExit(f"{error}\nput the network's own beside {checkpoint}") from None
    request = sample(entry, SEED, 1)
    spacing = request["metadata"][0]
    slices = preprocess(request["input"][0], spacing, side=entry["input"][-1])
    batches = np.array_split(slices, range(entry["batch"][1], len(slices), entry["batch"][1]))

    network = load(checkpoint, entry)
    with torch.inference_mode():
        reference = np.concatenate([network(torch.from_numpy(batch)).numpy() for batch in batches])
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    scores = np.concatenate([session.run(["output"], {"input": batch})[0] for batch in batches])

    if not np.isfinite([reference, scores]).all() or np.ptp(reference) == 0:
        raise SystemExit(f"{onnx}: scores are NaN, infinite or the same for every slice; is {checkpoint} trained?")
    expected, found = (tag(values, float(spacing[2]), settings) for values in (reference, scores))
    if found != expected:
        raise SystemExit(
            f"{onnx}: the sample series is {found}, with PyTorch {expected}; next: rm {onnx} && make onnx MODEL=bpr"
        )
    scale = float(np.abs(reference).max())
    return {
        "difference": float(np.abs(scores - reference).max()) / scale,
        "scale": scale,
        "served": [{"seed": SEED, "batch": 1, "output": [expected]}],
    }
