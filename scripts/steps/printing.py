"""Print to a reader that may stop reading, such as `head -1`. Standard library only."""

import os
import sys


def print_text(text: str) -> None:
    """Print `text`; if the reader is gone, discard all further output without an error."""
    try:
        print(f"{text}\n", end="", flush=True)  # in one piece: other programs print at the same time
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
