"""Choose the series of a study: CT of the chest, by coverage, slice distance, thickness, window and kernel."""

import math
import re
from collections.abc import Callable

from scripts.infer.headers import Series
from scripts.infer.messages import StudyError, translate
from scripts.infer.stack import FEWEST, measure_extent, split_acquisitions
from scripts.infer.volume import Volume

SOFT_TISSUE = (30, 50), (300, 500)  # WindowCenter, WindowWidth
SOFTEST = 49  # largest number of a soft kernel, such as B30f or Br44
# mm, the height of a chest; share of it, or of the longest series, that counts as a whole chest
CHEST, ENOUGH = 250.0, 0.8


def find_candidates(all_series: list[Series]) -> list[Series]:
    """CT acquisitions with enough slices for a volume."""
    ct = [series for series in all_series if series.modality == "CT"]
    return [one for series in ct for one in split_acquisitions(series) if len(one.slices) >= FEWEST]


def is_soft(series: Series) -> tuple[bool, bool]:
    """Whether the window and whether the kernel is for soft tissue."""
    window = series.window is not None and all(
        low <= value <= high for value, (low, high) in zip(series.window, SOFT_TISSUE, strict=True)
    )
    kernel = series.kernel.upper()
    number = re.search(r"\d+", kernel)
    soft = "SOFT" in kernel or "STANDARD" in kernel or (number is not None and int(number[0]) <= SOFTEST)
    return window, soft


def sort_by_preference(series: list[Series]) -> list[Series]:
    """Sort: whole chests first, then the closest slices, the thinnest, soft-tissue window, soft-tissue kernel."""
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
    """The first CT series, in order of preference, that shows the chest by its header or by the body-part network.

    The network sees a series only when its turn comes. A series that it cannot tag is not a chest. Series that cannot
    be read are passed over. StudyError: no series is left.
    """
    troubles: list[tuple[bool, StudyError]] = []
    possible = find_candidates(all_series)
    for series in sort_by_preference(possible):
        is_chest = series.body_part == "CHEST"
        try:
            volume = read(series)
        except StudyError as error:
            if is_chest or not series.body_part:  # errors of other body parts do not matter
                troubles.append((is_chest, error))
            continue
        if is_chest or body_part(volume) == "CHEST":
            return series, volume
    if troubles:
        raise max(troubles, key=lambda trouble: trouble[0])[1]  # the first error, of a chest series if there is one
    chest = any(series.body_part == "CHEST" for series in all_series)
    ct = any(series.modality == "CT" for series in all_series)
    if ct and not possible:
        raise StudyError("only_scouts")
    raise StudyError("no_chest" if ct else "no_ct" if chest else "nothing")


def explain_choice(all_series: list[Series], chosen: Series) -> str:
    """Why this series was chosen: a sentence for its row."""
    covered, step = measure_extent(chosen.slices)
    count = len(find_candidates(all_series))
    return translate(
        "choice" if count > 1 else "only_choice", count=count, covered=f"{covered:.0f}", step=f"{step:.1f}"
    )


def list_warnings(series: Series) -> list[str]:
    """Warnings about the headers of the chosen series."""
    found = list(series.warnings)
    given = [slice.number for slice in series.slices if slice.number is not None]
    first = min(given, default=1) if series.warnings else 1  # numbers of one of several acquisitions may start later
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
