"""The heads: they turn the ViT's embedding into logits.

The layers are one Sequential, so that attribute names are the checkpoints' keys: `layers.0` Linear, `.1` BatchNorm1d,
`.2` activation, `.3` Dropout, and so on for each hidden size, then a last Linear. A head without hidden sizes is
activation, Dropout, Linear: the Linear is `layers.2`, or `classifier` as in CT-CLIP (Hamamci et al. 2024, arXiv
2403.17834).
"""

import itertools
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convertation.checkpoint import load_state_dict
from convertation.checkpoint_file import read_checkpoint, walk_keys

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "leaky_relu": nn.LeakyReLU, "relu": nn.ReLU}


class MLP(nn.Module):
    """sizes = (input, *hidden, output); with `classifier`, the Linear of a head without hidden sizes has that name."""

    def __init__(self, sizes: list[int], activation: str = "relu", classifier: bool = True) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"{activation=}, expected one of {sorted(ACTIVATIONS)}")
        *hidden, last = [nn.Linear(before, after) for before, after in itertools.pairwise(sizes)]
        layers: list[nn.Module] = []
        for linear in hidden:
            layers += [linear, nn.BatchNorm1d(linear.out_features), ACTIVATIONS[activation](), nn.Dropout()]
        if not hidden:
            layers = [ACTIVATIONS[activation](), nn.Dropout()]
        self.classifier: nn.Module = nn.Identity()
        if not hidden and classifier:
            self.classifier = last
        else:
            layers.append(last)
        self.layers = nn.Sequential(*layers)

    def forward(self, embedding: Tensor) -> Tensor:
        """(batch, input) float32, L2-normalised -> (batch, output) logits."""
        logits: Tensor = self.classifier(self.layers(embedding))
        return logits

    def fold(self) -> "MLP":
        """In place, for export: fold each normalisation into the Linear before it, in float64, rounded once."""
        layers: list[Any] = list(self.layers)
        for linear, norm in itertools.pairwise(layers):
            if isinstance(norm, nn.BatchNorm1d):
                assert norm.running_mean is not None and norm.running_var is not None
                scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
                bias = (linear.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
                linear.weight = nn.Parameter((linear.weight.double() * scale[:, None]).float(), requires_grad=False)
                linear.bias = nn.Parameter(bias.float(), requires_grad=False)
        self.layers = nn.Sequential(*[layer for layer in layers if not isinstance(layer, nn.BatchNorm1d | nn.Dropout)])
        return self


def build_network(entry: dict[str, Any], classifier: bool = True) -> MLP:
    """Return the network that an entry of models.yaml describes, without memory for its weights."""
    with torch.device("meta"):
        return MLP(**entry["network"], classifier=classifier)


def load_network(checkpoint: Path, entry: dict[str, Any]) -> MLP:
    """Return the network of `entry` with the weights of `checkpoint`; errors as in `load_state_dict`.

    A head without hidden sizes was saved with one of two names; the checkpoint's keys tell which.
    """
    in_layers = any(re.search(r"(^|\.)2\.weight$", key) for key in walk_keys(read_checkpoint(checkpoint)))
    network = build_network(entry, classifier=not in_layers)
    load_state_dict(checkpoint, network, state_dict=entry.get("state_dict", ""))
    return network


def make_synthetic_state_dict(entry: dict[str, Any]) -> dict[str, Tensor]:
    """Return a seeded state dict of `entry`; each tensor depends only on the file's name, its own key and shape."""
    seed = str(entry.get("checkpoint"))
    return {
        key: _random_tensor(seed + key, tuple(tensor.shape))
        for key, tensor in build_network(entry).state_dict().items()
    }


def _random_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return numbers as after training: means, shifts around 0; variances, factors around 1; weights by fan-in."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1000)
    tensor = torch.from_numpy(np.random.default_rng(zlib.crc32(key.encode())).random(shape, dtype=np.float32))
    tensor = tensor.mul_(2).sub_(1)
    if len(shape) > 1:
        return tensor.mul_(math.sqrt(3 / shape[1]))
    return tensor.mul_(0.3).add_(1) if key.endswith(("weight", "running_var")) else tensor.mul_(0.1)
