"""Helpers of the tests that start the real Triton: a small repository, its verdict, what a server leaves behind."""

import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from scripts.serve.verdict import pass_verdict
from tests.triton_models import answers, bpr, head, tag

VENV = Path(__file__).parents[1] / ".venv-triton"
PATIENCE = 120  # seconds; most waits take a few


def write_repository(top: Path) -> Path:
    """Write one ONNX and one Python model to top/repository, and to top/build the answers that are expected of them."""
    head(top / "repository")
    bpr(top / "repository")
    answers(top / "build")
    tag(top / "build")
    return top / "repository"


def judged(root: Path, **options: Any) -> dict[str, Any]:
    """Pass the verdict on a repository of write_repository."""
    build = root.parent / "build"
    return pass_verdict(root, build / "checks", build / "models", build / "triton.log", **options)


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; fail after PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def processes(repository: Path) -> list[int]:
    """Return the processes of a repository's servers and their stubs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if str(repository).encode() in words and b"triton" in words.split(b"\0")[0]:
            found.append(int(path.parent.name))
    return found


def regions() -> set[str]:
    """Return the servers' regions of shared memory that no process has open; running tests have their own open."""
    used: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # the process has ended
            used |= set(re.findall(r"/dev/shm/(triton-\S+)", maps.read_text()))
    return {path.name for path in Path("/dev/shm").glob("triton-*")} - used
