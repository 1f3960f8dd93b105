"""Check that voxels are Hounsfield units of a chest, by every fourth voxel along each axis."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.infer.messages import StudyError, translate
from scripts.infer.volume import HU_LIMIT

LUNG = -500  # HU; every chest has air and lung below this
MOST_HU, SHARE_OF_METAL = 3071, 0.01  # the largest HU of 12 bits with intercept -1024; share of voxels above: a warning
NO_METAL = 0.1  # share of voxels above MOST_HU that no implant reaches: a failure
SHARE_OF_BONE = 0.1  # share of voxels above HU_LIMIT: a warning


def check_values(hu: NDArray[Any]) -> None:
    """StudyError: the voxels cannot be Hounsfield units of a chest.

    No voxel is below 0: HU + 1024, a mask, a window, most MR. Many are denser than metal: signed values read as
    unsigned.
    """
    some = hu[::4, ::4, ::4]
    some = some[np.isfinite(some)] if some.dtype.kind == "f" else some
    share = float((some > MOST_HU).mean()) if some.size else 0.0
    if not some.size or (some.min() >= 0 and hu.min() >= 0) or share > NO_METAL:
        least, most = (f"{some.min():g}", f"{some.max():g}") if some.size else ("?", "?")
        raise StudyError("no_hounsfield", least=least, most=most, share=f"{100 * share:.0f}")


def find_doubts(hu: NDArray[Any]) -> list[str]:
    """Warnings that the voxels may not be Hounsfield units, or that many were clipped."""
    some = hu[::4, ::4, ::4]
    found = [translate("no_air")] if not (some < LUNG).any() else []
    if (share := float((some > MOST_HU).mean())) > SHARE_OF_METAL:
        found.append(translate("too_dense", share=f"{100 * share:.0f}", most=MOST_HU))
    elif (share := float((some > HU_LIMIT).mean())) > SHARE_OF_BONE:
        found.append(translate("clipped", share=f"{100 * share:.0f}"))
    return found
