"""The answer of one runtime in a comparison; the comparisons of all families use it."""

from typing import Any, NamedTuple

from numpy.typing import NDArray

Array = NDArray[Any]


class Answer(NamedTuple):
    """The answer of one runtime to the first samples of the request."""

    name: str  # how the runtime was asked, in the words of messages: "at batch 1"
    values: dict[str, Array]  # `output`, and values inside the graph, by name
