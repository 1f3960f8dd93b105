"""From the voxels of a CT series to the ViT's input tensor.

    tensor = preprocess_volume(volume)         # (240, 480, 480) float32: Superior, Left, Posterior

The numbers are those of a clip, PyTorch's `interpolate(mode="trilinear", align_corners=False)` on the whole volume in
float64, a crop and a pad. Here only the cropped part is computed, plane by plane, in float32.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.infer.messages import StudyError

TARGET = 1.5, 0.75, 0.75  # mm; Superior, Left, Posterior
SHAPE = 240, 480, 480  # what the published ViT takes
HU_LIMIT = 1000  # HU are clipped to ± this, then divided by it
TURNED = 5.0  # degrees between an axis and the patient's; above, a warning
SPACING = 0.01, 100.0  # mm between voxels; other values are errors
APART = 16  # unused columns: rows 2 KiB apart would collide in the cache, and a transpose would take twice as long
LARGEST = 1 << 30  # voxels; 2 GiB of int16, a thousand slices of 1024 x 1024

Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Volume:
    """Hounsfield units (superior, left, posterior), int16 or float32, in any memory order; spacing in mm likewise."""

    hu: NDArray[Any]
    spacing: tuple[float, float, float]

    def convert_for_body_part(self) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
        """The input of bpr_model: int16 (z, y, x) = superior, posterior, left; spacing (x, y, z) in mm."""
        turned = self.hu.transpose(0, 2, 1)
        if turned.dtype != np.int16:
            turned = np.rint(np.clip(turned, -(1 << 15), (1 << 15) - 1)).astype(np.int16)
        superior, left, posterior = self.spacing
        return np.ascontiguousarray(turned), np.array([left, posterior, superior], np.float32)


def check_size(shape: Sequence[int], spacing: Sequence[float]) -> None:
    """StudyError: the declared size is impossible. Checked before any voxel is read."""
    if any(size < 2 for size in shape):
        raise StudyError("few_slices", count=min(shape))
    if float(np.prod([float(size) for size in shape])) > LARGEST:
        raise StudyError("too_large", shape=" × ".join(map(str, shape)))
    if not all(SPACING[0] <= size <= SPACING[1] for size in spacing):  # false for NaN, too
        raise StudyError("spacing", spacing=" × ".join(f"{size:g}" for size in spacing))


def orient_axes(array: NDArray[Any], directions: NDArray[Any]) -> tuple[NDArray[Any], tuple[int, int, int]]:
    """A view of `array` (3-D) with axes Superior, Left, Posterior, and the axis of `array` that each one is.

    `directions` (3, 3): column a is the step along axis a, in Left, Posterior, Superior. An oblique axis becomes the
    nearest patient axis; the axis with the clearest direction is assigned first.
    """
    cosines = directions / np.linalg.norm(directions, axis=0)
    axes, free = [0, 0, 0], np.abs(cosines)
    for _ in range(3):
        world, axis = np.unravel_index(int(free.argmax()), free.shape)
        axes[int(world)] = int(axis)
        free[world], free[:, axis] = -1, -1
    left, posterior, superior = axes
    order = (superior, left, posterior)
    flips = tuple(slice(None, None, -1 if cosines[world, axes[world]] < 0 else 1) for world in (2, 0, 1))
    return array.transpose(order)[flips], order


def measure_turn(directions: NDArray[Any]) -> float:
    """The largest angle in degrees between an axis and the nearest patient axis; `directions` as in `orient_axes`."""
    cosines = np.abs(directions / np.linalg.norm(directions, axis=0))
    return math.degrees(math.acos(min(1.0, float(cosines.max(0).min()))))


@dataclass(frozen=True)
class Axis:
    """Resizing of one axis: output `start + i` is `1 - share[i]` of input `below[i]` plus `share[i]` of `above[i]`."""

    start: int
    below: NDArray[np.intp]
    above: NDArray[np.intp]
    share: Plane


def make_axis(size: int, spacing: float, target: float, length: int) -> Axis:
    """The Axis that resizes `size` voxels of `spacing` mm to `target` mm, cropped or padded evenly to `length`.

    StudyError: less than one voxel is left.
    """
    resized = int(size * (spacing / target))
    if resized < 1:
        raise StudyError("too_small", size=size, spacing=f"{spacing:g}")
    kept, skipped = min(resized, length), max(0, (resized - length) // 2)
    position = (np.arange(skipped, skipped + kept) + 0.5) * (size / resized) - 0.5
    position = position.clip(0)
    below = np.minimum(position.astype(np.intp), size - 1)
    above = np.minimum(below + 1, size - 1)
    return Axis(max(0, (length - resized) // 2), below, above, (position - below).astype(np.float32))


def preprocess_volume(
    volume: Volume,
    shape: tuple[int, int, int] = SHAPE,
    target: tuple[float, float, float] = TARGET,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """(n, m, k) HU -> `shape` float32 in [-1, 1], -1 where padded; axes Superior, Left, Posterior.

    StudyError: an impossible size or spacing, or less than one voxel after resampling.
    """
    check_size(volume.hu.shape, volume.spacing)
    axes = [make_axis(*arguments) for arguments in zip(volume.hu.shape, volume.spacing, target, shape, strict=True)]
    result = np.full(shape, -1, np.float32)
    window = result[tuple(slice(axis.start, axis.start + len(axis.below)) for axis in axes)]
    # Outermost axis in memory first, so that planes are contiguous
    order = sorted(range(3), key=lambda axis: -abs(volume.hu.strides[axis]))
    source, out = volume.hu.transpose(order), window.transpose(order)
    outer, rows, columns = (axes[axis] for axis in order)
    # Either blend two planes and resize the result, or, if several results share planes, resize the planes first
    fewer = len(np.union1d(outer.below, outer.above)) < len(outer.below)

    def fill_planes(part: range) -> None:
        read: Callable[[int], Plane] = lambda index: clip_plane(source[index])  # noqa: E731
        if fewer:
            read = lru_cache(2)(lambda index: resize_plane(clip_plane(source[index]), rows, columns))
        for index in part:
            share = outer.share[index]
            plane = read(int(outer.below[index]))
            if share:
                plane = plane + (read(int(outer.above[index])) - plane) * share
            if not fewer:
                plane = resize_plane(plane, rows, columns)
            np.multiply(plane, np.float32(1 / HU_LIMIT), out=out[index].T)

    workers = threads or len(os.sched_getaffinity(0))
    count = len(outer.below)
    parts = [range(count * part // workers, count * (part + 1) // workers) for part in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(fill_planes, parts))
    return result


def clip_plane(plane: NDArray[Any]) -> Plane:
    """(rows, columns) HU -> float32 (rows, columns + APART), clipped; NaN counts as air."""
    rows, columns = plane.shape
    result = np.empty((rows, columns + APART), np.float32)
    result[:, columns:] = 0
    if plane.dtype != np.int16:
        plane = np.nan_to_num(plane, nan=-HU_LIMIT)
    np.clip(plane, -HU_LIMIT, HU_LIMIT, out=result[:, :columns], casting="unsafe")
    return result


def resize_plane(plane: Plane, rows: Axis, columns: Axis) -> Plane:
    """(rows, columns + APART) -> (new columns, new rows). Transposed, because both steps work on whole rows."""
    return blend_rows(np.ascontiguousarray(blend_rows(plane, rows)[:, :-APART].T), columns)


def blend_rows(plane: Plane, axis: Axis) -> Plane:
    below, result = plane.take(axis.below, 0), plane.take(axis.above, 0)
    result -= below
    result *= axis.share[:, None]
    result += below
    return result
