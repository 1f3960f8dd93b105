"""Export a network as one would by hand; this is only for the benchmark.

    python -m convertation.straight_export CHECKPOINT ENTRY.json OUT.onnx

The network is computed as its authors wrote it, the checkpoint is read whole, the exporter optimises as it likes, and
the file is saved at once. Nothing is folded: the spatial bias and the codebook's normalisation stay in the graph.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from convertation.head.mlp import MLP
from convertation.vit.ctvit import (
    LOGIT_SCALE,
    Attention,
    CTViT,
    cut_patches,
    reshape_to_grid,
    reshape_to_sequences,
    split_heads,
)


class Straight(nn.Module):
    """A CT-ViT, computed step by step; shapes as in ctvit.py."""

    def __init__(self, network: CTViT) -> None:
        super().__init__()
        self.network = network

    def forward(self, volume: Tensor) -> Tensor:
        """(b, c, frames, height, width) -> (b, output)"""
        vit, grid = self.network.VIT, self.network.grid
        t, h, w = grid
        x = vit.to_patch_emb(cut_patches(volume, self.network.patch))
        d = x.shape[-1]
        bias = self.compute_bias()
        x = x.reshape(-1, h * w, d)
        for layer in vit.enc_spatial_transformer.layers:
            position, attention, _, feed_forward = layer.children()
            x = position(x.reshape(-1, t, h, w, d)).reshape(-1, h * w, d) + x
            x = apply_attention(attention, x, bias) + x
            x = apply_feed_forward(feed_forward, x) + x
        x = vit.enc_spatial_transformer.norm_out(x)
        x = x.reshape(-1, t, h, w, d).permute(0, 2, 3, 1, 4)
        for layer in vit.enc_temporal_transformer.layers:
            position, attention, _, feed_forward = layer.children()
            x = x.reshape(-1, h * w, t, d)
            x = reshape_to_sequences(position(reshape_to_grid(x, grid)), grid) + x
            x = x.reshape(-1, t, d)
            x = apply_attention(attention, x) + x
            x = apply_feed_forward(feed_forward, x) + x
        x = vit.enc_temporal_transformer.norm_out(x)
        x = x.reshape(-1, h, w, t, d).permute(0, 3, 1, 2, 4)
        rows = self.network.get_rows()
        cosines = torch.einsum("bnd,cd->bnc", normalise(x.reshape(-1, t * h * w, d)), normalise(rows))
        x = functional.embedding(cosines.argmax(dim=-1), rows).reshape(-1, t, h * w * d)
        embedding: Tensor = functional.linear(x.mean(dim=1), self.network.projection_layer.weight)
        return embedding

    def compute_bias(self) -> Tensor:
        """-> (heads, h·w, h·w); the small network is computed for every pair of places."""
        _, h, w = self.network.grid
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        places = torch.stack([y.flatten(), x.flatten()], dim=-1)
        distance = (places[:, None] - places).float()
        bias: Tensor = self.network.VIT.spatial_rel_pos_bias.net(distance.sign() * torch.log(distance.abs() + 1))
        return bias.permute(2, 0, 1)


def apply_attention(part: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """(sequences, n, d), bias (heads, n, n) -> (sequences, n, d)"""
    assert isinstance(part, Attention)
    keys_values = part.to_kv(x).chunk(2, dim=-1)
    q, k, v = (split_heads(tokens, part.heads) for tokens in (part.to_q(part.norm(x)), *keys_values))
    logits = torch.einsum("bhid,bhjd->bhij", normalise(q) * part.q_scale, normalise(k) * part.k_scale) * LOGIT_SCALE
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    mixed = torch.einsum("bhij,bhjd->bhid", weights, v)
    moved: Tensor = part.to_out(mixed.transpose(1, 2).flatten(-2))
    return moved


def apply_feed_forward(part: nn.Module, x: Tensor) -> Tensor:
    """(…, d) -> (…, d), the feed-forward"""
    norm, up, _, _, down = part.children()
    value, gate = up(norm(x)).chunk(2, dim=-1)
    moved: Tensor = down(functional.gelu(gate) * value)
    return moved


def normalise(x: Tensor) -> Tensor:
    return functional.normalize(x, dim=-1)


def straight_export(checkpoint: Path, entry: dict[str, Any], out: Path) -> None:
    """Write the ViT or head of `checkpoint` as ONNX: `input` (batch, …) -> `output` (batch, …)."""
    network: nn.Module
    if entry["family"] == "vit":
        network = CTViT(input=entry["input"], output=entry["output"], **entry["network"])
    elif entry["family"] == "head":
        network = MLP(**entry["network"])
    else:
        raise SystemExit(f"{checkpoint}: family {entry['family']}, expected vit or head")
    network.load_state_dict(torch.load(checkpoint, weights_only=True), strict=False)
    if isinstance(network, CTViT):
        network = Straight(network)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(
        network.eval(),
        (torch.zeros(2, *entry["input"]),),
        dynamo=True,
        opset_version=20,
        input_names=["input"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=entry["batch"][-1])},),
        verbose=False,
    )
    assert program is not None
    program.save(out, external_data=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("entry", type=Path, help="the model's entry, JSON")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    straight_export(given.checkpoint, json.loads(given.entry.read_text()), given.out)


if __name__ == "__main__":
    main()
