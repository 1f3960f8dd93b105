"""Convert a head: python -m convertation.head.torch2onnx --weights synthetic|real CHECKPOINT ENTRY.json OUT.onnx"""

from pathlib import Path
from typing import Any

import torch

from convertation.export import export, main
from convertation.head.mlp import load


def torch2onnx(checkpoint: Path, entry: dict[str, Any], out: Path, *, opset: int, metadata: dict[str, str]) -> None:
    """Write the head of `checkpoint` as ONNX: `input` (batch, input) float32 -> `output` (batch, output) logits."""
    sample = torch.zeros(2, *entry["input"])
    export(load(checkpoint, entry).fold(), sample, out, opset=opset, batch_max=entry["batch"][-1], metadata=metadata)


if __name__ == "__main__":
    main(torch2onnx)
