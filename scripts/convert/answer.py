"""What one side of a comparison answered; shared by the comparisons of all families."""

from typing import Any, NamedTuple

from numpy.typing import NDArray

Array = NDArray[Any]


class Answer(NamedTuple):
    """Of one runtime, to the first samples of the request."""

    name: str  # how it was asked, as messages say it
    values: dict[str, Array]  # `output` and the values inside the graph
