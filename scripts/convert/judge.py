"""The checks of a comparison of an ONNX file. A failed check ends the program with a message."""

from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from scripts.convert.collapse import CAUSE

Array = NDArray[Any]

LEAST = 1e-4  # relative to the scale: answers that differ by less do not depend on the input


class Judge(NamedTuple):
    """Checks answers, and ends the program with what is wrong, where, what it means and what to do next."""

    onnx: Path
    family: str
    tolerance: float  # the largest difference that is allowed, relative to the scale
    of: str = "PyTorch's"  # whose values are the reference, in the words of messages

    def fail(self, what: str, meaning: str) -> NoReturn:
        raise SystemExit(
            f"{self.onnx}: {what}\n{meaning}; nothing is written\n"
            f"next: rm {self.onnx} && make onnx MODEL={self.family}; if the error stays, suspect torch and onnxruntime"
        )

    def check_values(self, name: str, reference: Array, answer: Array) -> None:
        """Check that both have the same shape and type, and that every value is finite."""
        found, expected = (f"{values.dtype} {list(values.shape)}" for values in (answer, reference))
        if found != expected:
            self.fail(f"{name} is {found}, expected {expected}", "the file is not this model's export")
        for side, values in ("PyTorch", reference), ("ONNX Runtime", answer):
            if bad := values.size - int(np.isfinite(values).sum()):
                self.fail(
                    f"{bad} of {values.size} values of {name} by {side} are NaN or infinite, expected none",
                    "the computation overflows, or loses the variance of its input (docs/fidelity.md)",
                )

    def check_dependence(self, name: str, reference: Array, answer: Array) -> None:
        """Check that the samples of a batch get different answers: two constants would agree, too."""
        spread = float(np.abs(reference[1:] - reference[0]).max())
        least = LEAST * float(np.abs(reference).max())
        for side, values, enough in ("PyTorch", reference, least), ("ONNX Runtime", answer, max(least, spread / 2)):
            if not np.abs(values[1:] - values[0]).max() > enough:
                what = f"{name} by {side} does not depend on the input (largest value {np.abs(values).max():.3g})"
                self.fail(
                    f"{what}, expected one answer per sample", f"the network answers the same for every input; {CAUSE}"
                )

    def check_difference(self, name: str, reference: Array, answer: Array) -> float:
        """Check that all values agree, and return the largest difference, relative to the reference's largest value."""
        self.check_values(name, reference, answer)
        scale = np.abs(reference).max()
        apart = np.abs(answer.astype(np.float64) - reference)
        largest = float(apart.max() / scale) if scale else float(apart.max() > 0)
        where = [int(index) for index in np.unravel_index(apart.argmax(), apart.shape)]
        self.check_tolerance(f"{name}, most at {where},", largest, float(scale))
        return largest

    def check_tolerance(self, name: str, difference: float, scale: float) -> None:
        """Check that a difference, relative to the scale, is within the tolerance."""
        if not difference <= self.tolerance:
            self.fail(
                f"{name} differs from {self.of} by {difference:.2e} of its scale {scale:.3g}; "
                f"expected at most {self.tolerance:g}",
                "the file does not compute what the checkpoint does",
            )
