"""Turn a CT series into the slices that the network scores."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

HU_MIN, HU_MAX = -1000, 1500  # become -1 and 1
PIXEL = 3.5  # mm
SIGMA = 0.8 * 0.25  # of the blur before shrinking, in resampled pixels
TRUNCATE = 3  # sigmas
SPACING = 0.01, 1000.0  # mm; no real volume is beyond these
SLAB = 1 << 22  # voxels worked on at a time, so that memory does not grow with the series


def preprocess(
    volume: NDArray[np.int16], spacing: Sequence[float] | NDArray[np.floating[Any]], side: int = 128
) -> NDArray[np.float32]:
    """int16 (z, y, x) Hounsfield units, spacing (x, y, z) mm -> float32 (kept z, 1, side, side): z, 1, x, y; -1 to 1.

    Blur, bilinear resampling to 3.5 mm and centre crop are linear in a slice, so they are two small matrices per
    volume. Where a slice is smaller, the rest is -1. Slices whose sum is exactly 0 are dropped, as in the original.
    ValueError: wrong type or shape of volume or spacing, or less than 2 resampled pixels in x or y.
    """
    if volume.ndim != 3 or 0 in volume.shape or volume.dtype != np.int16:
        raise ValueError(f"volume is {volume.dtype} {list(volume.shape)}, expected int16 (z, y, x), none of them 0")
    if len(spacing) != 3 or not all(SPACING[0] <= size <= SPACING[1] for size in spacing):
        raise ValueError(
            f"spacing {[float(size) for size in spacing]}, expected x, y, z in mm, {SPACING[0]} to {SPACING[1]:.0f}"
        )
    depth, height, width = volume.shape
    across = axis_matrix(width, float(spacing[0]), side)
    down = axis_matrix(height, float(spacing[1]), side)
    # With the middle of the range subtracted, a slice that has this value everywhere is exactly 0, and so it is dropped
    middle, half = (HU_MIN + HU_MAX) // 2, (HU_MAX - HU_MIN) / 2
    across /= half
    x, y = (side - len(across)) // 2, (side - len(down)) // 2
    slices = np.full((depth, 1, side, side), -1, np.float32)
    step = max(1, SLAB // (height * width))
    for z in range(0, depth, step):
        slab = np.clip(volume[z : z + step], HU_MIN, HU_MAX)
        slab -= middle
        rows = slab.astype(np.float32).reshape(-1, width) @ across.T
        plane = rows.reshape(-1, height, len(across)).transpose(0, 2, 1) @ down.T
        slices[z : z + step, 0, x : x + len(across), y : y + len(down)] = plane
    kept = slices.sum((1, 2, 3), dtype=np.float64) != 0
    return slices if kept.all() else slices[kept]


def axis_matrix(size: int, spacing: float, side: int) -> NDArray[np.float32]:
    """(pixels, size), pixels <= side: the share of each of `size` voxels of `spacing` mm in each resampled pixel.

    Gaussian blur (edges mirrored, SciPy's `reflect`) and bilinear interpolation at (i + 0.5) * size / resampled - 0.5
    (OpenCV's INTER_LINEAR); if there are more than `side` pixels, only those in the centre.
    """
    resampled = int(size * spacing / PIXEL + 0.5)
    if resampled < 2:
        raise ValueError(f"{size} voxels of {spacing:g} mm resample to {resampled} of {PIXEL} mm, expected 2 or more")
    pixels = min(resampled, side)
    sigma = SIGMA * size / resampled
    radius = int(TRUNCATE * sigma + 0.5)
    reach = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (reach / sigma) ** 2)
    kernel /= kernel.sum()

    first = (resampled - pixels) // 2
    position = (np.arange(first, first + pixels) + 0.5) * size / resampled - 0.5
    position = position.clip(0, size - 1)
    below = position.astype(int)
    share = position - below
    matrix = np.zeros((pixels, size))
    for neighbour, weight in ((below, 1 - share), (np.minimum(below + 1, size - 1), share)):
        mirrored = (neighbour[:, None] + reach) % (2 * size)
        mirrored = np.minimum(mirrored, 2 * size - 1 - mirrored)
        np.add.at(matrix, (np.arange(pixels)[:, None], mirrored), weight[:, None] * kernel)
    return matrix.astype(np.float32)
