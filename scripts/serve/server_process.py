"""A server's process: start it so that it ends with its starter, stop it, and tell how it ended."""

import ctypes
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1

PR_SET_CHILD_SUBREAPER = 36

# What the server prints as errors on every machine without a GPU.
NOISE = ("CudaDriverHelper", "CUDA driver version", "pinned memory pool")


def describe_end(process: subprocess.Popen[bytes]) -> str:
    """How a process ended, in words."""
    code = process.returncode
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def read_last_words(log: Path, count: int = 4) -> str:
    """The last errors in a server's log, without their prefixes; where there are none, its last lines."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line and line[0] not in "+|"]
    errors = [
        line
        for line in lines
        if re.match(r"[EF]\d{4} |error:|docker:|ERROR:", line) and not any(n in line for n in NOISE)
    ]
    words = [re.sub(r"^[A-Z]\d{4} \S+ \d+ \S+\] ", "", line) for line in (errors or lines)[-count:]]
    return "\n".join([*dict.fromkeys(f"  {line[:600]}" for line in words or ["(nothing)"]), f"whole log: {log}"])


def stop_server(process: subprocess.Popen[bytes], patience: float = 15) -> None:
    """Ends the server: asked first, then it and its stubs are killed. It has a process group of its own."""
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with suppress(ChildProcessError):  # its orphans are ours, see adopt_orphans
            while True:
                os.waitpid(-process.pid, 0)


@contextmanager
def adopt_orphans() -> Iterator[None]:
    """The stubs of a server that dies become children of this process, so that it can wait until they are gone."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0)


def die_with_parent(parent: int) -> None:
    """In the child, before the server starts: it is asked to stop when its starter is gone, kill -9 included."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def unwind_on_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP unwind the stack, so that what was started is stopped. For the main thread alone."""

    def leave(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
    number: int
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # `nohup` means its SIGHUP; but a shell's `&` ignores SIGINT, and there kill -INT is to work all the same.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
