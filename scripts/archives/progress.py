"""Show the progress of a long job over bytes: a bar on a terminal, a line every 10 % or 30 s in a log."""

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

REDRAW = 0.2  # s between two drawings of the bar
SILENCE = 30.0  # s without a line in a log
WINDOW = 10.0  # s over which the rate is averaged


class Progress:
    """Show on `stream` how many of `total` bytes are done; `begin` of them were done before.

    `clock` returns seconds; `terminal` says whether the bar can be drawn again in place. Only tests set these two.
    """

    def __init__(
        self,
        title: str,
        total: int,
        begin: int = 0,
        *,
        stream: TextIO | None = None,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.total, self.done = title, total, begin
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty() if terminal is None else terminal
        self.clock = clock
        self.shown, self.shown_at = begin, clock()
        self.past = deque([(self.shown_at, begin)])
        self.open = False  # the bar stands in an unfinished line

    def add(self, count: int) -> None:
        """Count `count` more bytes, and show the progress if enough time or bytes have passed."""
        self.done += count
        now = self.clock()
        waited = now - self.shown_at
        if self.terminal:
            due = waited >= REDRAW or self.done == self.total
        else:
            due = self.done * 10 // (self.total or 1) > self.shown * 10 // (self.total or 1) or waited >= SILENCE
        if due:
            self.show(now)

    def show(self, now: float) -> None:
        """Write the bar or the line as of `now`."""
        self.past.append((now, self.done))
        while len(self.past) > 2 and now - self.past[1][0] >= WINDOW:
            self.past.popleft()
        (since, before), columns = self.past[0], shutil.get_terminal_size().columns
        rate = (self.done - before) / (now - since) if now > since else 0.0
        text = format_status(self.title, self.done, self.total, rate)
        if self.terminal:
            room = max(0, min(40, columns - len(text) - 4))
            filled = room * self.done // self.total if self.total else room
            text = f"\r{text} [{'#' * filled}{'.' * (room - filled)}]"[:columns] + "\x1b[K"
        self.stream.write(text if self.terminal else text + "\n")
        self.stream.flush()
        self.shown, self.shown_at, self.open = self.done, now, self.terminal

    def close(self) -> None:
        """End the bar's line, so that the next output begins a new line."""
        if self.open:
            self.stream.write("\n")
            self.stream.flush()
            self.open = False


def format_status(title: str, done: int, total: int, rate: float) -> str:
    """Return e.g. "weights.zip  40 %  1.2 of 3.0 GB  12.0 MB/s  2:30 left"; `rate` in bytes per second."""
    percent = 100 * done // total if total else 100
    parts = [title, f"{percent:3d} %", f"{format_bytes(done)} of {format_bytes(total)}"]
    if rate > 0:
        seconds = round((total - done) / rate)
        hours = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        parts += [f"{format_bytes(rate)}/s", f"{hours.removeprefix('0:')} left"]
    return "  ".join(parts)


def format_bytes(count: float) -> str:
    """Return a number of bytes in decimal units: "512 bytes", "3.2 GB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale * 0.99995:
            return f"{count / scale:.1f} {unit}"
    return f"{int(count)} bytes"
