"""Explain the difference of an answer by flips of the quantiser's near ties, and compute what remains."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def remove_flips(difference: NDArray[Any], ties: Sequence[Any], allowed: float) -> tuple[NDArray[Any], int]:
    """Return what remains of a difference (output,) without flips of near ties, and the number of flips.

    `ties`: for each token to which float64 allows another row, what each such row would add: (rows, output).
    The flip that explains most is subtracted again and again, at most one per token, until the rest is within `allowed`
    or no flip makes it smaller. Each flip has its own direction, so flips cannot explain other differences.
    """
    left, flips = [np.atleast_2d(np.asarray(tie, np.float64)) for tie in ties], 0
    while left and not (np.abs(difference) <= allowed).all():
        rests = [difference - change for tie in left for change in tie]
        token = [number for number, tie in enumerate(left) for _ in tie]
        remains = np.linalg.norm(rests, axis=1)
        best = int(remains.argmin())
        if not remains[best] < np.linalg.norm(difference):
            break
        difference, flips = rests[best], flips + 1
        del left[token[best]]
    return difference, flips
