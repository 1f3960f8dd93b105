"""Convert a CT-ViT.

python -m convertation.vit.torch2onnx --weights synthetic|real [--for cpu|gpu] CHECKPOINT ENTRY.json OUT.onnx

Without arguments, as in `cd convertation/vit && python torch2onnx.py`, it runs: make onnx MODEL=vit
"""

import os
import shutil
import sys
from pathlib import Path

if __name__ == "__main__" and len(sys.argv) == 1:
    os.chdir(Path(__file__).resolve().parents[2])
    print("this is done by: make onnx MODEL=vit", flush=True)
    if not shutil.which("make"):
        raise SystemExit("make is missing; apt install make")
    os.execvp("make", ["make", "onnx", "MODEL=vit"])

from typing import Any

import torch
from torch import Tensor, nn

from convertation.export import export_network, main
from convertation.vit.ctvit import CTViT, load_network


class Visible(nn.Module):
    """The network with tokens and codes as outputs, so that the ONNX file names them: a check compares them, too."""

    def __init__(self, network: CTViT) -> None:
        super().__init__()
        self.network = network

    def forward(self, volume: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, 1, frames, height, width) -> output (b, output), tokens (b, t, h, w, d), codes (b, t, h, w)"""
        tokens = self.network.encode(volume)
        codes = self.network.quantise(tokens)
        return self.network.project(codes), tokens, codes


def torch2onnx(
    checkpoint: Path, entry: dict[str, Any], out: Path, *, opset: int, metadata: dict[str, str], target: str = "cpu"
) -> None:
    """Write the CT-ViT of `checkpoint` as ONNX: `input` (batch, 1, frames, height, width) -> `output` (batch, output).

    The values inside named `tokens` (batch, t, h, w, d) and `codes` (batch, t, h, w) int64 keep these names.
    `target`: with "gpu" the file is fast on a GPU, with "cpu" it needs little memory; each file runs on both.
    """
    network = Visible(load_network(checkpoint, entry).fold(gpu=target == "gpu")).eval()
    sample = torch.empty(2, *entry["input"])
    batch_max, inner = entry["batch"][-1], ("tokens", "codes")
    alike = [f"network.VIT.enc_{kind}_transformer.layers" for kind in ("spatial", "temporal")]
    export_network(network, sample, out, opset=opset, batch_max=batch_max, metadata=metadata, inner=inner, alike=alike)


if __name__ == "__main__":
    main(torch2onnx, targets=("cpu", "gpu"))
