"""What ends a comparison of an ONNX file, in words."""

from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from scripts.convert.collapse import CAUSE

Array = NDArray[Any]

LEAST = 1e-4  # of the scale: answers that are nearer say nothing about their inputs


class Judge(NamedTuple):
    """Ends the comparison with what is wrong, where, what it means and what to do."""

    onnx: Path
    family: str
    tolerance: float
    of: str = "PyTorch's"  # whose values are the reference

    def fail(self, what: str, meaning: str) -> NoReturn:
        raise SystemExit(
            f"{self.onnx}: {what}\n{meaning}; nothing is written\n"
            f"next: rm {self.onnx} && make onnx MODEL={self.family}; if it stays, suspect torch and onnxruntime"
        )

    def sane(self, name: str, reference: Array, answer: Array) -> None:
        """Same shape and type, and every value finite."""
        found, expected = (f"{values.dtype} {list(values.shape)}" for values in (answer, reference))
        if found != expected:
            self.fail(f"{name} is {found}, expected {expected}", "the file is no export of this model")
        for side, values in ("PyTorch", reference), ("ONNX Runtime", answer):
            if bad := values.size - int(np.isfinite(values).sum()):
                self.fail(
                    f"{bad} of {values.size} values of {name} by {side} are NaN or infinite, expected none",
                    "it overflows, or loses the variance of its input (docs/fidelity.md)",
                )

    def alive(self, name: str, reference: Array, answer: Array) -> None:
        """The samples of a batch get different answers; else two sides agree by saying nothing."""
        spread = float(np.abs(reference[1:] - reference[0]).max())
        least = LEAST * float(np.abs(reference).max())
        for side, values, enough in ("PyTorch", reference, least), ("ONNX Runtime", answer, max(least, spread / 2)):
            if not np.abs(values[1:] - values[0]).max() > enough:
                what = f"{name} by {side} does not depend on the input (largest value {np.abs(values).max():.3g})"
                self.fail(
                    f"{what}, expected one answer per sample", f"the network answers the same for every input; {CAUSE}"
                )

    def same(self, name: str, reference: Array, answer: Array) -> float:
        """The largest difference relative to the reference's largest absolute value, if within the tolerance."""
        self.sane(name, reference, answer)
        scale = np.abs(reference).max()
        apart = np.abs(answer.astype(np.float64) - reference)
        largest = float(apart.max() / scale) if scale else float(apart.max() > 0)
        where = [int(index) for index in np.unravel_index(apart.argmax(), apart.shape)]
        self.within(f"{name}, most at {where},", largest, float(scale))
        return largest

    def within(self, name: str, difference: float, scale: float) -> None:
        if not difference <= self.tolerance:
            self.fail(
                f"{name} differs from {self.of} by {difference:.2e} of its scale {scale:.3g}; "
                f"expected at most {self.tolerance:g}",
                "the file does not compute what the checkpoint does",
            )
