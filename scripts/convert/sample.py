"""Make a model's seeded request, which both sides of every comparison get.

    make_sample(entry, seed, batch)

A ViT gets volumes like CT, a head unit vectors, BPR one INT16 series. Sample i depends only on (seed, i), so a larger
batch begins with the samples of a smaller one. Voxels are whole Hounsfield units. They are computed from integers of
PCG64 by sums and products in float64, so they are the same on every machine.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float64]

AIR, LUNG, TISSUE, BONE, TABLE, METAL = -1000, -850, 40, 600, 150, 3000  # HU
NOISE = 104.5  # standard deviation of the difference of two random bytes
IN_BODY = 0.3  # times this difference: noise of 31 HU
# Air as scanners show it, (HU, noise): layers in one octant of each volume, so that patches hold nothing but air.
# Their mean is at least a hundred times their spread: a careless float32 variance fails on them.
QUIET = ((-998, 2), (-990, 5), (-1000, 10), (-990, 1), (-1000, 1), (-990, 10), (-1000, 5), (-999, 0))
LAYER = 10  # frames of a layer, at least: a patch of the ViT has so many
LARGEST_REQUEST = 256 << 20  # bytes of one request to a server: a full-size volume has 221 MB, and two take long

PATCHES = 48  # cells of the finest structure across a slice

# A ramp of brightness over 350 mm, bottom to top, that BPR's reference data calls CHEST; only every second slice
RAMP, SERIES, SPACING = (678.6, 1042.1), (36, 90, 100), (3.0, 3.2, 10.0)  # HU; z, y, x voxels; x, y, z mm


def make_sample(entry: dict[str, Any], seed: int, batch: int, first: int = 0) -> dict[str, NDArray[Any]]:
    """Return the inputs by name, as a client sends them: samples `first` to `first + batch - 1` of the seed.

    vit   `input` float32 (batch, 1, frames, height, width), HU / 1000 in [-1, 1]
    head  `input` float32 (batch, features), each row of length 1
    bpr   `input` int16 (1, z, y, x) HU and `metadata` float32 (1, 3), spacing x, y, z in mm; batch is 1; sample 0 shows
          a body from bottom to top, each other sample the same height in every slice
    """
    if entry["family"] == "bpr":
        if batch != 1:
            raise ValueError(f"{batch=}: BPR takes one series per request")
        return {
            "input": make_series(_make_generator(seed, first), rising=not first)[None],
            "metadata": np.array([SPACING], np.float32),
        }
    shape: list[int] = entry["input"]
    request = np.empty((batch, *shape), np.float32)
    for index in range(batch):
        generator = _make_generator(seed, first + index)
        if entry["family"] == "head":
            features = generator.standard_normal(shape)
            request[index] = features / np.sqrt(np.square(features).sum())
        else:
            fill_volume(generator, request[index, 0])
    return {"input": request}


def plan_requests(batches: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Return (first sample, batch) of each request to a server, with samples of `size` bytes.

    There are always at least two samples: one answer does not show whether it depends on the input.
    """
    asked = [(0, batch) for batch in batches if batch * size <= LARGEST_REQUEST]
    return asked if any(batch > 1 for _, batch in asked) else [*asked, (1, 1)]


def fill_volume(generator: np.random.Generator, volume: NDArray[np.float32]) -> None:
    """Fill (frames, height, width) with a chest-like volume, HU / 1000 in [-1, 1].

    The field of view is round. In it, an uneven ellipse of soft tissue lies on a table. The ellipse holds two lungs
    with vessels, which widen and close along z, a spine, ribs, and a metal rod brighter than the clip. The body has
    more noise than the air around it. One octant holds only the air of `QUIET`. Outside the field and at the edges is
    -1, as scanners and preprocessing pad.
    """
    frames, height, width = volume.shape
    first, last, top, bottom, left, right = generator.uniform(0.0, 0.07, 6)
    centre_y, centre_x, lean = generator.uniform(-0.08, 0.08, 3)
    girth, breath, rib = generator.uniform(0.75, 0.95), generator.uniform(0.8, 1.1), generator.integers(5, 9)
    coarse = generator.uniform(-1, 1, (7, 6, 6))
    fine = generator.uniform(-1, 1, (PATCHES // 2, PATCHES, PATCHES))
    late, low, far = (int(side) for side in generator.integers(0, 2, 3))  # which octant is air: half of z, y, x
    view, table = generator.uniform(1.25, 1.6), generator.uniform(0.78, 0.88)
    rod_y, rod_x = generator.uniform(-0.2, 0.3), generator.uniform(-0.3, 0.3)
    around, hiss = AIR + int(generator.integers(0, 16)), int(generator.integers(1, 11)) / NOISE
    half = max(frames // 2, 1)
    air = _halve_axis(height, low), _halve_axis(width, far)
    volume[:] = AIR / 1000
    rows = slice(int(top * height), height - int(bottom * height))
    columns = slice(int(left * width), width - int(right * width))
    y, x = _make_axis(height)[:, None] - centre_y, _make_axis(width)[None] - centre_x
    outside = np.square(_make_axis(height)[:, None]) + np.square(_make_axis(width)[None]) > view
    bench = (np.abs(y - table - 0.1 * np.square(x)) < 0.02) & (np.abs(x) < 0.6)
    for frame in range(int(first * frames), frames - int(last * frames)):
        z = frame / max(frames - 1, 1)
        wave, vessels = _interpolate_slice(coarse, z, height, width), _interpolate_slice(fine, z, height, width)
        across = x + lean * (z - 0.5)
        side = np.abs(across)
        radius = (1.7 * (y * y) + across * across) / (girth * girth) + 0.15 * wave
        body = radius < 1
        open_lung = breath * (0.35 + 2.6 * z * (1 - z)) * (0.6 + 0.3 * wave)  # nearly closed at both ends
        lungs = (9 * np.square(side - 0.42) + 5 * np.square(y + 0.03) < open_lung) & (radius < 0.78)
        bones = 1.5 * np.square(across) + np.square(y - 0.42) < 0.016
        bones |= (radius > 0.80) & (radius < 0.92) & ((rib * z + side) % 1 < 0.3)
        hu = np.where(body, TISSUE + 25 * wave + 15 * vessels, around)
        hu[bench] = TABLE
        hu[lungs & (vessels <= 0.5)] = LUNG
        hu[bones] = BONE + 300 * vessels[bones]
        hu[np.square(y - rod_y) + np.square(across - rod_x) < 0.01] = METAL
        noise = np.where(body, IN_BODY, hiss)
        if 0 <= (depth := frame - late * (frames - half)) < half:
            level, spread = QUIET[depth // max(half // len(QUIET), LAYER) % len(QUIET)]
            hu[air], noise[air] = level, spread / NOISE
        # two random bytes per voxel give triangular noise; whole numbers are the same on every machine
        dice = np.frombuffer(generator.bytes(2 * hu.size), np.uint8).reshape(2, *hu.shape)
        hu += noise * np.subtract(dice[0], dice[1], dtype=np.int16)
        hu[outside] = AIR
        hu = np.clip(np.rint(hu, out=hu), -1000, 1000, out=hu) / 1000
        volume[frame, rows, columns] = hu[rows, columns]


def make_series(generator: np.random.Generator, *, rising: bool) -> NDArray[np.int16]:
    """Return an int16 (z, y, x) series in HU.

    `rising`: each slice is brighter than the one below, so that its score changes along the body. Else all are alike.
    """
    depth, height, width = SERIES
    y, x = _make_axis(height)[:, None], _make_axis(width)[None]
    coarse = generator.uniform(-1, 1, (7, 6, 6))
    volume = np.empty(SERIES, np.int16)
    for index in range(depth):
        z = index / (depth - 1)
        hu = 60 * _interpolate_slice(coarse, z, height, width) + 120 * ((y * y * 1.7 + x * x) < 0.6)
        hu += generator.integers(-4, 5, hu.shape)
        volume[index] = np.rint(RAMP[0] + (RAMP[1] - RAMP[0]) * (z if rising else 0.5) + hu - hu.mean())
    return volume


def _make_generator(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, index]))


def _halve_axis(size: int, second: int) -> slice:
    """Return the first or the second half of an axis."""
    return slice(size - size // 2, size) if second else slice(0, size // 2)


def _make_axis(size: int) -> Field:
    """Return the centres of `size` pixels between -1 and 1."""
    return (2 * np.arange(size) + 1) / size - 1


def _interpolate_slice(grid: Field, z: float, height: int, width: int) -> Field:
    """Return the slice (height, width) at 0 <= z <= 1 of a small grid (z, y, x), interpolated linearly."""
    position = z * (len(grid) - 1)
    below = min(int(position), len(grid) - 2)
    plane = grid[below] + (position - below) * (grid[below + 1] - grid[below])
    result: Field = _compute_weights(height, plane.shape[0]) @ plane @ _compute_weights(width, plane.shape[1]).T
    return result


@cache
def _compute_weights(size: int, cells: int) -> Field:
    """Return (size, cells): in each row, the weights of a pixel's two neighbours in the grid."""
    position = np.linspace(0, cells - 1, size)[:, None]
    return np.maximum(0.0, 1 - np.abs(position - np.arange(cells)))
