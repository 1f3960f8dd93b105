"""Near ties of the quantiser that fell the other way: what an answer owes to them, and what remains."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def remove_flips(difference: NDArray[Any], ties: Sequence[Any], allowed: float) -> tuple[NDArray[Any], int]:
    """What remains of a difference (output,) when near ties of the quantiser fell the other way, and how many did.

    `ties`: per token that float64 allows another row, what each such row would add: (rows, output).
    The one that explains most is taken out, again and again, each token once; each has a direction of its own, so that
    nothing else is explained by them.
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
