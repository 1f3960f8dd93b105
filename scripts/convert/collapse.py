"""Whether one side answers different inputs alike, as another does not."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

CAUSE = (
    "where this is a ViT, its file was made before each patch's own mean was subtracted: ONNX Runtime up to 1.22 then "
    "loses the variance of air in the first LayerNormalization, NaN spreads to every token, and every study gets one "
    "and the same embedding (docs/fidelity.md)"
)


def find_alike_rows(reference: NDArray[Any], answer: NDArray[Any]) -> list[tuple[int, int]]:
    """(n, output) twice -> the pairs of rows less than half as far apart in `answer` as in `reference`; NaN is no
    distance.
    """
    right, found = reference.astype(np.float64), answer.astype(np.float64)
    return [
        (one, other)
        for other in range(len(right))
        for one in range(other)
        if not np.linalg.norm(found[one] - found[other]) >= np.linalg.norm(right[one] - right[other]) / 2
    ]
