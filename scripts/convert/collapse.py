"""Find different inputs that one side answers alike although the other side does not."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

CAUSE = (
    "if this is a ViT, an older export made its file, which does not subtract each patch's own mean: ONNX Runtime up "
    "to 1.22 then loses the variance of air in the first LayerNormalization, NaN spreads to every token, and every "
    "study gets the same embedding (docs/fidelity.md)"
)


def find_alike_rows(reference: NDArray[Any], answer: NDArray[Any]) -> list[tuple[int, int]]:
    """(n, output) twice -> the pairs of rows whose distance in `answer` is less than half of that in `reference`.

    A distance that is NaN counts as less.
    """
    right, found = reference.astype(np.float64), answer.astype(np.float64)
    return [
        (one, other)
        for other in range(len(right))
        for one in range(other)
        if not np.linalg.norm(found[one] - found[other]) >= np.linalg.norm(right[one] - right[other]) / 2
    ]
