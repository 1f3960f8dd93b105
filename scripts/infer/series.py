"""Which series of a study is read: CT of the chest, by what it covers, how closely, and for which tissue."""

import math
import re
from collections.abc import Callable

from scripts.infer.headers import Series
from scripts.infer.messages import StudyError, translate
from scripts.infer.stack import FEWEST, measure_extent, split_acquisitions
from scripts.infer.volume import Volume

SOFT_TISSUE = (30, 50), (300, 500)  # WindowCenter, WindowWidth
SOFTEST = 49  # the number in kernels such as B30f and Br44: softer up to here
CHEST, ENOUGH = 250.0, 0.8  # mm that a chest measures; share of it, or of the longest series, that counts as whole


def find_candidates(all_series: list[Series]) -> list[Series]:
    """Acquisitions of CT that may be volumes."""
    ct = [series for series in all_series if series.modality == "CT"]
    return [one for series in ct for one in split_acquisitions(series) if len(one.slices) >= FEWEST]


def is_soft(series: Series) -> tuple[bool, bool]:
    """Whether the window, and whether the kernel, is one for soft tissue."""
    window = series.window is not None and all(
        low <= value <= high for value, (low, high) in zip(series.window, SOFT_TISSUE, strict=True)
    )
    kernel = series.kernel.upper()
    number = re.search(r"\d+", kernel)
    soft = "SOFT" in kernel or "STANDARD" in kernel or (number is not None and int(number[0]) <= SOFTEST)
    return window, soft


def sort_by_preference(series: list[Series]) -> list[Series]:
    """Those that cover a whole chest first, then the closest slices, the thinnest, soft-tissue window and kernel."""
    sizes = [measure_extent(one.slices) for one in series]
    whole = ENOUGH * min(CHEST, max((covered for covered, _ in sizes), default=0.0))

    def key(index: int) -> tuple[float, float, float, bool, bool]:
        covered, step = sizes[index]
        one = series[index]
        window, kernel = is_soft(one)
        thickness = one.thickness if one.thickness and one.thickness > 0 else math.inf
        return -min(covered, whole), round(step, 1), thickness, not window, not kernel

    return [series[index] for index in sorted(range(len(series)), key=key)]


def choose_series(
    all_series: list[Series], read: Callable[[Series], Volume], body_part: Callable[[Volume], str]
) -> tuple[Series, Volume]:
    """The most preferred CT series that is of the chest, by its header or, failing that, by the body-part network.

    Asked in the order of preference, the network sees no more series than it must. One that it cannot tell is no chest.
    Series that cannot be read are passed over; StudyError where none is left.
    """
    troubles: list[tuple[bool, StudyError]] = []
    possible = find_candidates(all_series)
    for series in sort_by_preference(possible):
        is_chest = series.body_part == "CHEST"
        try:
            volume = read(series)
        except StudyError as error:
            if is_chest or not series.body_part:  # of another part of the body it does not matter
                troubles.append((is_chest, error))
            continue
        if is_chest or body_part(volume) == "CHEST":
            return series, volume
    if troubles:
        raise max(troubles, key=lambda trouble: trouble[0])[1]  # the first one, of those of the chest if there are any
    chest = any(series.body_part == "CHEST" for series in all_series)
    ct = any(series.modality == "CT" for series in all_series)
    if ct and not possible:
        raise StudyError("only_scouts")
    raise StudyError("no_chest" if ct else "no_ct" if chest else "nothing")


def explain_choice(all_series: list[Series], chosen: Series) -> str:
    """Why this series, in words for the row."""
    covered, step = measure_extent(chosen.slices)
    count = len(find_candidates(all_series))
    return translate(
        "choice" if count > 1 else "only_choice", count=count, covered=f"{covered:.0f}", step=f"{step:.1f}"
    )


def list_remarks(series: Series) -> list[str]:
    """What a reader of the result should know of the chosen series' headers."""
    found = list(series.remarks)
    given = [slice.number for slice in series.slices if slice.number is not None]
    first = min(given, default=1) if series.remarks else 1  # of several acquisitions each has numbers of its own
    missing = 1 - len(set(given)) / (max(given) - first + 1) if given and max(given) > 0 else 0.0
    if missing > 0:
        found.append(translate("missing", share=f"{100 * missing:.0f}"))
    if any(slice.slope is None for slice in series.slices):
        found.append(translate("no_slope"))
    if any(slice.intercept is None for slice in series.slices):
        found.append(translate("no_intercept"))
    if series.inverted:
        found.append(translate("monochrome1"))
    return found
