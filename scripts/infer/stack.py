"""Split a series into acquisitions, and put the slices of one in order by their positions."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.infer.headers import Series, Slice
from scripts.infer.messages import StudyError, translate
from scripts.infer.volume import TURNED, check_size, measure_turn

SAME_PLACE = 0.01  # mm; slices closer than this have the same place
SAME_PIXEL, SAME_ORIENTATION = 1e-3, 1e-3  # share of a pixel's size, and cosine: headers of one scan differ by less
UNEVEN = 0.25  # share of the distance between slices by which a step may be off
MOST_MISSING = 0.5  # share of the slices
FAR, FEW = 4, 0.05  # gap in steps, share of the slices: so few slices beyond such a gap do not belong to the stack
FAR_ASIDE = 10.0  # mm; a few slices this far to the side do not belong to the stack
ASIDE = 1.0  # mm that a slice may lie to the side of the straight line through the stack
TILT, STEEP = 0.5, 15.0  # degrees between the slices' normal and the direction of the stack: warning, failure
FEWEST = 5  # slices of a volume; scouts have two or three
KINDS = "ImageType", "ConvolutionKernel", "KVP", "TemporalPositionIdentifier"  # in the order of Slice.kinds
REGULAR = 0.9  # share of equal steps in an acquisition, and of the slices that are in such acquisitions


@dataclass(frozen=True)
class Stack:
    """The places of a volume from one end to the other, and the slices at each; none where one is missing."""

    slices: list[list[Slice]]
    # (3, 3): columns are the steps in mm to the next slice, row and column, in Left, Posterior, Superior
    directions: NDArray[np.float64]
    warnings: list[str]


def dot_product(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def has_geometry(s: Slice) -> bool:
    if s.position is None or s.orientation is None or s.pixel is None:
        return False
    if len(s.position) != 3 or len(s.orientation) != 6 or len(s.pixel) != 2:
        return False
    across, down = s.orientation[:3], s.orientation[3:]  # plain numbers, because numpy is slower on arrays this small
    dots = (dot_product(across, across), dot_product(down, down), dot_product(across, down))
    return abs(dots[0] - 1) < 1e-2 and abs(dots[1] - 1) < 1e-2 and abs(dots[2]) < 1e-2


def is_alike(one: Slice, other: Slice) -> bool:
    """Whether two slices that have a geometry have the same size, pixel spacing and orientation."""
    if (one.shape, one.pixel, one.orientation) == (other.shape, other.pixel, other.orientation):
        return True
    assert one.pixel and other.pixel and one.orientation and other.orientation
    return (
        one.shape == other.shape
        and all(abs(a - b) <= SAME_PIXEL * abs(b) for a, b in zip(one.pixel, other.pixel, strict=True))
        and all(abs(a - b) <= SAME_ORIENTATION for a, b in zip(one.orientation, other.orientation, strict=True))
    )


def measure_heights(slices: list[Slice]) -> NDArray[np.float64]:
    """(slices,) mm along the normal of the first slice; all slices have a geometry."""
    orientation = np.array(slices[0].orientation)
    normal: NDArray[np.float64] = np.cross(orientation[:3], orientation[3:])
    return np.array([s.position for s in slices], np.float64) @ normal


def list_places(slices: list[Slice]) -> NDArray[np.float64]:
    """(places,) distinct heights in mm, ascending."""
    height = np.sort(measure_heights(slices))
    return height[np.diff(height, prepend=-np.inf) > SAME_PLACE]


def measure_extent(slices: list[Slice]) -> tuple[float, float]:
    """The extent of the slices and the distance between them, mm; 0 and infinity if the headers do not tell."""
    if len(slices) < 2 or not all(map(has_geometry, slices)):
        return 0.0, math.inf
    place = list_places(slices)
    step = float(np.median(np.diff(place))) if len(place) > 1 else math.inf
    return (len(place) * step, step) if len(place) > 1 else (0.0, math.inf)


def split_acquisitions(series: Series) -> list[Series]:
    """Split a series into series of one geometry, acquisition and reconstruction each, with warnings.

    KINDS tell acquisitions apart, then AcquisitionNumber, time and InstanceNumber, but only if they overlap in the
    body: several rotations or breath-holds side by side are one scan.
    """
    usable = [s for s in series.slices if has_geometry(s)]
    if len(usable) < 2:
        return [series]
    found = []
    for group in group_by_geometry(usable):
        rest = len(series.slices) - len(group)
        parts = list(separate_acquisitions(group))
        for part, tags in parts:
            one = replace(series, slices=part, warnings=list(series.warnings), kernel=part[0].kinds[1])
            if rest:
                one.warnings.append(translate("other_geometry", count=rest))
            if tags:
                one.warnings.append(translate("acquisitions", count=len(parts), tags=", ".join(tags), slices=len(part)))
            found.append(one)
    return found


def group_by_geometry(slices: list[Slice]) -> list[list[Slice]]:
    """Group slices of the same size and orientation, in the order of their first slices."""
    groups: list[list[Slice]] = []
    for s in slices:
        for group in groups:
            if is_alike(s, group[0]):
                group.append(s)
                break
        else:
            groups.append([s])
    return groups


def separate_acquisitions(slices: list[Slice]) -> Iterator[tuple[list[Slice], list[str]]]:
    """The acquisitions among slices of one geometry, each with the tags that tell it apart (none if there is one)."""
    keys: list[tuple[str, bool, Callable[[Slice], Any]]] = [
        (name, True, lambda s, index=index: s.kinds[index])  # type: ignore[misc]
        for index, name in enumerate(KINDS)
        if all(len(s.kinds) == len(KINDS) for s in slices)
    ]
    keys += [
        ("AcquisitionNumber", False, lambda s: s.acquisition),
        ("AcquisitionTime", False, lambda s: s.time or None),
        ("InstanceNumber", False, lambda s: s.number),
    ]
    todo = [(slices, list[str]())]
    for name, certain, key in keys:
        next_todo = []
        for part, tags in todo:
            split = group_layers(part, key)
            if len(split) > 1 and (certain or are_acquisitions(split)):
                next_todo += [(layer, [*tags, name]) for layer in split]
            else:
                next_todo.append((part, tags))
        todo = next_todo
    yield from todo


def group_layers(slices: list[Slice], key: Callable[[Slice], Any]) -> list[list[Slice]]:
    """Group slices by the value of `key`; values that do not overlap in the body share a group. None: one group."""
    values: dict[Any, list[tuple[float, Slice]]] = {}
    for s, height in zip(slices, measure_heights(slices).tolist(), strict=True):
        value = key(s)
        if value is None:
            return [slices]
        values.setdefault(value, []).append((height, s))
    if len(values) < 2:
        return [slices]
    found: list[tuple[float, float, list[Slice]]] = []
    for value in sorted(values):
        part = values[value]
        low, high = min(part)[0] if len(part) == 1 else min(h for h, _ in part), max(h for h, _ in part)
        for index, (lowest, highest, layer) in enumerate(found):
            if high < lowest - SAME_PLACE or low > highest + SAME_PLACE:
                layer += [s for _, s in part]
                found[index] = min(low, lowest), max(high, highest), layer
                break
        else:
            found.append((low, high, [s for _, s in part]))
    return [layer for _, _, layer in found]


def are_acquisitions(split: list[list[Slice]]) -> bool:
    """Whether nearly all slices are in evenly spaced layers, so that the split is not due to chance."""

    def is_regular(layer: list[Slice]) -> bool:
        place = list_places(layer)
        if len(place) < max(FEWEST, len(layer)):
            return False
        steps = np.diff(place)
        return float((np.abs(steps / np.median(steps) - 1) < UNEVEN).mean()) >= REGULAR

    return sum(len(layer) for layer in split if is_regular(layer)) >= REGULAR * sum(map(len, split))


def drop_far(height: NDArray[np.float64], order: NDArray[np.intp]) -> NDArray[np.intp]:
    """`order`, indices by ascending height, without a few slices at the ends that lie far from the others."""
    steps = np.diff(height[order])
    usual = float(np.median(steps))
    few = max(1, int(FEW * len(order)))
    first, last = 0, len(order)
    for gap in np.flatnonzero(steps > FAR * usual).tolist():
        if gap + 1 <= few:
            first = gap + 1
        if len(order) - gap - 1 <= few:
            last = min(last, gap + 1)
    return order[first:last]


def drop_between(height: NDArray[np.float64], order: NDArray[np.intp]) -> NDArray[np.intp]:
    """`order` as in `drop_far`, without a few slices between the places of the evenly spaced others."""
    steps = np.diff(height[order])
    usual = float(np.median(steps))

    def is_even(step: float) -> bool:
        return abs(step / usual - max(1, round(step / usual))) <= UNEVEN

    odd = [
        index
        for index in range(1, len(order) - 1)
        if not is_even(steps[index - 1]) and not is_even(steps[index]) and is_even(steps[index - 1] + steps[index])
    ]
    return np.delete(order, odd) if 0 < len(odd) <= max(1, int(FEW * len(order))) else order


def drop_beside(
    positions: NDArray[np.float64], normal: NDArray[np.float64], order: NDArray[np.intp]
) -> NDArray[np.intp]:
    """`order` as in `drop_far`, without a few slices to the side of the straight line through the others."""
    height = (positions[order] @ normal)[:, None]
    aside = positions[order] - height * normal
    way = np.median(np.diff(aside, axis=0) / np.diff(height, axis=0), axis=0)  # the drift of a tilted stack
    aside -= height * way
    off = np.linalg.norm(aside - np.median(aside, axis=0), axis=1)
    odd = off > FAR_ASIDE
    return order[~odd] if 0 < odd.sum() <= max(1, int(FEW * len(order))) else order


def stack_slices(slices: list[Slice]) -> Stack:
    """Put the slices of one acquisition in order by their positions. StudyError: they do not make a volume."""
    first = slices[0]
    check_size((len(slices), *first.shape), (1, 1, 1))
    if not all(map(has_geometry, slices)):
        raise StudyError("no_geometry")
    if len(group_by_geometry(slices)) > 1:
        raise StudyError("mixed")
    assert first.orientation is not None and first.pixel is not None
    across, down = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    normal = np.cross(across, down)
    positions = np.array([s.position for s in slices])
    height = measure_heights(slices)
    order = np.argsort(height, kind="stable")
    kept = order[np.diff(height[order], prepend=-np.inf) > SAME_PLACE]
    if len(kept) < FEWEST:
        raise StudyError("few_slices", count=len(kept))
    warnings = []
    whole, kept = kept, drop_far(height, kept)
    kept = drop_beside(positions, normal, drop_between(height, kept))
    if len(kept) < len(whole):
        warnings.append(translate("far", count=len(whole) - len(kept)))
    if len(kept) < FEWEST:
        raise StudyError("few_slices", count=len(kept))

    steps = np.diff(height[kept])
    usual = float(np.median(steps))
    counts = np.maximum(1, np.rint(steps / usual)).astype(int)
    if (np.abs(steps / usual - counts) > UNEVEN).any():
        raise StudyError("uneven", least=f"{steps.min():.2f}", most=f"{steps.max():.2f}")
    depth = int(counts.sum()) + 1
    if (missing := depth - len(kept)) > MOST_MISSING * depth:
        raise StudyError("gaps", share=f"{100 * missing / depth:.0f}")
    if missing:
        warnings.append(translate("filled", count=missing))
    place_of = np.concatenate([[0], np.cumsum(counts)])
    ordered: list[list[Slice]] = [[] for _ in range(depth)]
    below = np.searchsorted(height[kept], height[order], side="right") - 1
    for index, at in zip(order, below, strict=True):
        if at >= 0 and height[index] - height[kept[at]] <= SAME_PLACE:
            ordered[int(place_of[at])].append(slices[index])

    way = (positions[kept[-1]] - positions[kept[0]]) / (depth - 1)
    off = positions[kept] - (positions[kept[0]] + place_of[:, None] * way)
    aside = np.linalg.norm(off - (off @ normal)[:, None] * normal, axis=1)
    if aside.max() > ASIDE:
        raise StudyError("shifted", most=f"{aside.max():.1f}")
    angle = math.degrees(math.acos(min(1.0, float(way @ normal) / float(np.linalg.norm(way)))))
    if angle > STEEP:
        raise StudyError("tilt_failure", angle=f"{angle:.0f}")
    directions = np.stack([way, down * first.pixel[0], across * first.pixel[1]], axis=1)
    check_size((depth, *first.shape), np.linalg.norm(directions, axis=0).tolist())
    if angle > TILT:
        warnings.append(translate("tilt", angle=f"{angle:.1f}"))
    elif (turned := measure_turn(directions)) > TURNED:
        warnings.append(translate("turned", angle=f"{turned:.0f}"))
    return Stack(ordered, directions, warnings)
