"""Convert a head: python -m convertation.head.torch2onnx --weights synthetic|real CHECKPOINT ENTRY.json OUT.onnx

Without arguments, as in `cd convertation/head && python torch2onnx.py`, it runs: make onnx MODEL=head
"""

import os
import shutil
import sys
from pathlib import Path

if __name__ == "__main__" and len(sys.argv) == 1:
    os.chdir(Path(__file__).resolve().parents[2])
    print("this is done by: make onnx MODEL=head", flush=True)
    if not shutil.which("make"):
        raise SystemExit("make is missing; apt install make")
    os.execvp("make", ["make", "onnx", "MODEL=head"])

from typing import Any

import torch

from convertation.export import export_network, main
from convertation.head.mlp import load_network


def torch2onnx(checkpoint: Path, entry: dict[str, Any], out: Path, *, opset: int, metadata: dict[str, str]) -> None:
    """Write the head of `checkpoint` as ONNX: `input` (batch, input) float32 -> `output` (batch, output) logits."""
    sample = torch.zeros(2, *entry["input"])
    export_network(
        load_network(checkpoint, entry).fold(),
        sample,
        out,
        opset=opset,
        batch_max=entry["batch"][-1],
        metadata=metadata,
    )


if __name__ == "__main__":
    main(torch2onnx)
