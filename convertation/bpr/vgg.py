"""The network of body part regression: one score per CT slice, rising from pelvis to head.

VGG-16's features (Simonyan & Zisserman 2014, arXiv 1409.1556) with one input channel, then a 1x1 convolution, the mean
over the plane and one output: the network of MIC-DKFZ/BodyPartRegression (Schuhegger 2021, arXiv 2110.09148). Attribute
names are the checkpoints' keys.
"""

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convertation.checkpoint import load_state_dict

# Width in multiples of `channels`, number of 3x3 convolutions; a pool follows each block
BLOCKS = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))

# The synthetic network's score: linear in the intensity (+ 1) of a slice's brightest parts, and a little noise
GAIN, OFFSET, LITTLE = 25.2, -38.2, 0.1


class VGG(nn.Module):
    """channels = width of the first block, 64 in the real network; side = pixels of a slice, a multiple of 32."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        if channels < 2 or side < 32 or side % 32:
            raise ValueError(f"{channels=}, {side=}: expected 2 or more channels and a side that is a multiple of 32")
        layers: list[nn.Module] = []
        width = 1
        for multiple, convolutions in BLOCKS:
            for _ in range(convolutions):
                before, width = width, multiple * channels
                layers += [nn.Conv2d(before, width, 3, padding=1, bias=bool(layers)), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.model = nn.Sequential(*layers)
        self.conv6 = nn.Conv2d(width, width, 1)
        self.fc7 = nn.Linear(width, 1)

    def forward(self, slices: Tensor) -> Tensor:
        """(n, 1, side, side) float32, -1000 … 1500 HU as -1 … 1 -> (n,) scores."""
        features = torch.relu(self.conv6(self.model(slices)))
        scores: Tensor = self.fc7(features.mean((2, 3))).squeeze(1)
        return scores


def build_network(entry: dict[str, Any]) -> VGG:
    """Return the network that an entry of models.yaml describes, without memory for its weights."""
    with torch.device("meta"):
        return VGG(**entry["network"], side=entry["input"][-1])


def load_network(checkpoint: Path, entry: dict[str, Any]) -> VGG:
    """Return the network of `entry` with the weights of `checkpoint`; errors as in `load_state_dict`."""
    network = build_network(entry)
    load_state_dict(checkpoint, network, state_dict=entry.get("state_dict", ""))
    return network


def count_multiply_adds(entry: dict[str, Any]) -> int:
    """Return the multiplications (each with its addition) for one slice: the unit of the benchmark."""
    side, total = entry["input"][-1], 0
    for module in build_network(entry).modules():
        if isinstance(module, nn.MaxPool2d):
            side //= 2
        elif isinstance(module, nn.Conv2d):
            total += side * side * module.weight.numel()
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()
    return total


def make_synthetic_state_dict(entry: dict[str, Any]) -> dict[str, Tensor]:
    """Return a seeded state dict of `entry` that gives a tag to a series that brightens from slice to slice.

    Channel 0 carries intensity + 1 through the whole network; the other channels carry random features that change the
    score a little. So every weight counts in a comparison, and the score is still almost linear in the intensity.
    """
    state = {key: _random_tensor(key, tuple(tensor.shape)) for key, tensor in build_network(entry).state_dict().items()}
    for key, tensor in state.items():
        if tensor.ndim == 4:
            tensor[0] = 0
            tensor[0, 0, tensor.shape[2] // 2, tensor.shape[3] // 2] = 1
        elif key != "fc7.weight":
            tensor[0] = 0
    # v + 1 = relu(v) - relu(-v) + 1, since the first convolution has no bias
    state["model.0.weight"][1] = -state["model.0.weight"][0]
    state["model.2.weight"][0, 1, 1, 1] = -1
    state["model.2.bias"][0] = 1
    state["fc7.weight"] *= LITTLE
    state["fc7.weight"][0, 0] = GAIN
    state["fc7.bias"][0] = OFFSET
    return state


def _random_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return weights scaled by their fan-in, so that values keep their size through ReLUs; biases are small."""
    tensor = torch.from_numpy(np.random.default_rng(zlib.crc32(key.encode())).random(shape, dtype=np.float32))
    return tensor.mul_(2).sub_(1).mul_(math.sqrt(6 / math.prod(shape[1:])) if len(shape) > 1 else 0.05)


def make_synthetic_settings(entry: dict[str, Any]) -> dict[str, Any]:
    """Return inference settings for synthetic weights: landmarks evenly from -9 to 9, thresholds as published."""
    names = ["pelvis_start", "femur_end", "pelvis_end", *(f"L{i}" for i in range(5, 0, -1))]
    names += [*(f"Th{i}" for i in range(12, 0, -1)), *(f"C{i}" for i in range(7, 0, -1)), "eyes_end", "head_end"]
    last = names.index("eyes_end")
    original = {name: {"mean": 18 * i / last - 9, "std": 0.5} for i, name in enumerate(names)}
    transformed = {name: {"mean": 100 * i / last, "std": 100 / 36} for i, name in enumerate(names)}
    return {
        "lookuptable_train_val": {"original": original, "transformed": transformed},
        "settings": {"start-landmark": "pelvis_start", "end-landmark": "eyes_end"},
        "slope_mean": 0.118,
        "lower_quantile_tangential_slope": -0.037,
        "upper_quantile_tangential_slope": 0.25,
    }
