"""A server's process: let it end with its starter, stop it, say how it ended and what it logged."""

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
PR_SET_PDEATHSIG = 1  # of prctl(2)
PR_SET_CHILD_SUBREAPER = 36
# The server logs these as errors on every machine without a GPU
NOISE = ("CudaDriverHelper", "CUDA driver version", "pinned memory pool")


def describe_end(process: subprocess.Popen[bytes]) -> str:
    """Say how a process ended."""
    code = process.returncode
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def read_last_words(log: Path, count: int = 4) -> str:
    """Return the last errors in a server's log, without prefixes; its last lines if it has no errors."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line and line[0] not in "+|"]
    errors = [
        line
        for line in lines
        if re.match(r"[EF]\d{4} |error:|docker:|ERROR:", line) and not any(n in line for n in NOISE)
    ]
    words = [re.sub(r"^[A-Z]\d{4} \S+ \d+ \S+\] ", "", line) for line in (errors or lines)[-count:]]
    return "\n".join([*dict.fromkeys(f"  {line[:600]}" for line in words or ["(nothing)"]), f"whole log: {log}"])


def stop_server(process: subprocess.Popen[bytes], patience: float = 15) -> None:
    """Ask the server to end; after `patience` seconds kill it and its stubs. They are a process group of their own."""
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with suppress(ChildProcessError):  # adopt_orphans made its stubs our children
            while True:
                os.waitpid(-process.pid, 0)


@contextmanager
def adopt_orphans() -> Iterator[None]:
    """Make the stubs of a server that dies children of this process, so that it can wait for their end."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0)


def die_with_parent(parent: int) -> None:
    """Run in the child before the server starts: Linux sends it SIGTERM when its starter ends, even by kill -9."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def unwind_on_signals() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into exceptions, so that `finally` stops the server. Main thread only."""

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
        # `nohup` ignores SIGHUP on purpose. A shell's `&` ignores SIGINT, but kill -INT must work there, too.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
