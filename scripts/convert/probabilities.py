"""Compute what the client computes from the models' answers: unit vectors for the heads, probabilities, decisions."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

THRESHOLD = 0.5  # a probability above it is a finding


def normalise_rows(embedding: Array) -> NDArray[np.float32]:
    """(n, d) -> (n, d) rows of length 1, as the heads take them; NaN for a row of length 0 or NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled: NDArray[np.float32] = (embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)).astype(np.float32)
    return scaled


def compute_probabilities(logits: Array) -> NDArray[np.float64]:
    """(n, 2) -> (n, 1), the second softmax value: pathology. (n, k) -> (n, k), a sigmoid per finding."""
    exact = logits.astype(np.float64)
    odds = exact[:, 1:] - exact[:, :1] if exact.shape[1] == 2 else exact
    result: NDArray[np.float64] = 0.5 * (1 + np.tanh(0.5 * odds))  # a sigmoid that never overflows
    return result


def find_changed(before: Array, after: Array) -> list[list[int]]:
    """Return [sample, finding] of each decision that differs between two (n, k) probabilities."""
    return [[int(place) for place in where] for where in np.argwhere((before > THRESHOLD) != (after > THRESHOLD))]
