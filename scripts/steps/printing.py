"""Print for someone who may stop reading, as with `| head -1`. Standard library only."""

import os
import sys


def print_text(text: str) -> None:
    """Print `text`; once nobody reads on, whatever this program prints goes nowhere, which is no error."""
    try:
        print(f"{text}\n", end="", flush=True)  # in one piece, beside what others print
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
