"""Convert BPR: python -m convertation.bpr.torch2onnx --weights synthetic|real CHECKPOINT ENTRY.json OUT.onnx"""

from pathlib import Path
from typing import Any

import torch

from convertation.bpr.vgg import load_network
from convertation.export import export_network, main


def torch2onnx(checkpoint: Path, entry: dict[str, Any], out: Path, *, opset: int, metadata: dict[str, str]) -> None:
    """Write the network of `checkpoint` as ONNX: `input` (n, 1, side, side) float32 -> `output` (n,) scores."""
    sample = torch.zeros(2, *entry["input"])
    export_network(
        load_network(checkpoint, entry), sample, out, opset=opset, batch_max=entry["batch"][-1], metadata=metadata
    )


if __name__ == "__main__":
    main(torch2onnx)
