"""One run of trtexec in a container of $TENSORRT_IMAGE, as the calling user, without network. Standard library only.

The container sees its inputs read-only under /in and may write to /out alone.  It is named after the artifact: what a
killed run left under that name is removed first, and a stopped one takes its container along.
"""

import ctypes
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from scripts.plans import gpu

PR_SET_PDEATHSIG = 1
REDRAW, SILENCE = 0.5, 30.0  # s between two pictures of the clock on a terminal, two lines in a log


class TrtexecError(Exception):
    """trtexec failed; holds its whole output."""


def make_command(artifact: str, inputs: dict[str, str], out: str, options: list[str]) -> list[str]:
    """Return the docker command; `inputs`: name under /in and the file, `out`: the folder that becomes /out."""
    mounts = [
        f"--mount=type=bind,source={os.path.realpath(file)},target=/in/{name},readonly" for name, file in inputs.items()
    ]
    mounts.append(f"--mount=type=bind,source={os.path.realpath(out)},target=/out")
    return [
        "docker", "run", "--rm", f"--name={name_container(artifact)}", "--network=none",
        f"--user={os.getuid()}:{os.getgid()}", *gpu.gpu_options(), "--env=CUDA_DEVICE_ORDER=PCI_BUS_ID", *mounts,
        os.environ["TENSORRT_IMAGE"], "trtexec", *options,
    ]  # fmt: skip


def name_container(artifact: str) -> str:
    """Return a name that says what is made, and differs between two checkouts on one machine."""
    here = hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:6]
    return f"chest-{here}-{artifact.removeprefix('build/plan/').replace('/', '-')}"


def log_path(artifact: str) -> Path:
    """Return where the whole output goes."""
    return Path("build/logs", f"trtexec-{artifact.removeprefix('build/plan/').replace('/', '-')}.log")


def run_trtexec(artifact: str, inputs: dict[str, str], out: str, options: list[str]) -> str:
    """Run trtexec and return its output; TrtexecError if it does not end with PASSED. `out` is there and empty."""
    words = make_command(artifact, inputs, out, options)
    name, log = name_container(artifact), log_path(artifact)
    log.parent.mkdir(parents=True, exist_ok=True)
    gpu.run_docker("rm", "--force", name)
    with log.open("w") as output:
        print(shlex.join(words), file=output, flush=True)
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_for_container(process, artifact)
        finally:  # the client's death would leave the container running
            if process.poll() is None:
                process.kill()
                process.wait()
                gpu.run_docker("rm", "--force", name)
    said = log.read_text(errors="replace")
    if process.returncode or "&&&& PASSED" not in said:
        raise TrtexecError(f"{said}\n(status {process.returncode})")
    return said


def explain_trouble(error: TrtexecError, artifact: str) -> str:
    """Return what a failed run means, its last errors, and where the rest stands."""
    said = str(error)
    lines = [line for line in said.splitlines() if re.search(r"\[E\]|ERROR|[Ee]rror:|[Uu]nknown option", line)]
    meaning = gpu.explain_message("\n".join(lines[-5:] or said.splitlines()[-5:]))
    if re.search(r"out of memory|OutOfMemory", said, re.IGNORECASE):
        meaning = "the GPU's memory did not suffice; end what else uses it (nvidia-smi), or make it do with less:\n"
        meaning += "TRTEXEC_FLAGS=--memPoolSize=workspace:4096"
    if "status 137" in said and not meaning:
        meaning = "the container was killed, by hand or for want of memory"
    return "\n".join(filter(None, [meaning, *(lines or said.splitlines())[-3:], f"whole log: {log_path(artifact)}"]))


def wait_for_container(process: "subprocess.Popen[bytes]", artifact: str) -> None:
    """Wait for the container and show for how long it has been running."""
    start = shown = time.monotonic()
    terminal = sys.stderr.isatty()
    while process.poll() is None:
        try:
            process.wait(REDRAW)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
            if terminal or now - shown >= SILENCE:
                shown = now
                seconds = int(now - start)
                line = f"  {artifact}: trtexec runs, {seconds // 60}:{seconds % 60:02d}"
                print(
                    f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True
                )
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def end_with_parent() -> None:
    """Signals, and the death of the step that started this, unwind the stack, so that the container is removed."""

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def leave(number: int, _: FrameType | None) -> None:
        for other in numbers:  # Ctrl-C is followed by the step's death, which must not stop the removal
            signal.signal(other, lambda *_: None)
        raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, leave)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
