"""Run trtexec in a container of $TENSORRT_IMAGE, as the calling user, without network. Standard library only.

The container sees its inputs read-only under /in and can write only to /out.  Its name is made from the artifact's:
so a container that a killed run left is found and removed first.  A run that is stopped removes its container.
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
REDRAW, SILENCE = 0.5, 30.0  # s between two updates of the time on a terminal, and between two lines in a log


class TrtexecError(Exception):
    """trtexec failed; the text is its whole output."""


def make_command(artifact: str, inputs: dict[str, str], out: str, options: list[str]) -> list[str]:
    """Return the docker command; `inputs`: files by their names under /in, `out`: the folder that becomes /out."""
    mounts = [
        f"--mount=type=bind,source={os.path.realpath(file)},target=/in/{name},readonly" for name, file in inputs.items()
    ]
    mounts.append(f"--mount=type=bind,source={os.path.realpath(out)},target=/out")
    return [
        "docker", "run", "--rm", f"--name={name_container(artifact)}", "--network=none",
        f"--user={os.getuid()}:{os.getgid()}", *gpu.list_gpu_options(), "--env=CUDA_DEVICE_ORDER=PCI_BUS_ID", *mounts,
        os.environ["TENSORRT_IMAGE"], "trtexec", *options,
    ]  # fmt: skip


def name_container(artifact: str) -> str:
    """Return a name that says what is made; it differs between two checkouts on one machine."""
    here = hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:6]
    return f"chest-{here}-{artifact.removeprefix('build/plan/').replace('/', '-')}"


def log_path(artifact: str) -> Path:
    """Return the path of the file that gets trtexec's whole output."""
    return Path("build/logs", f"trtexec-{artifact.removeprefix('build/plan/').replace('/', '-')}.log")


def run_trtexec(artifact: str, inputs: dict[str, str], out: str, options: list[str]) -> str:
    """Run trtexec and return its output; TrtexecError if it does not print PASSED. `out` is an empty folder."""
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
        finally:  # killing docker's client does not stop the container
            if process.poll() is None:
                process.kill()
                process.wait()
                gpu.run_docker("rm", "--force", name)
    said = log.read_text(errors="replace")
    if process.returncode or "&&&& PASSED" not in said:
        raise TrtexecError(f"{said}\n(status {process.returncode})")
    return said


def explain_trouble(error: TrtexecError, artifact: str) -> str:
    """Return what a failure means, trtexec's last errors, and the path of its whole log."""
    said = str(error)
    lines = [line for line in said.splitlines() if re.search(r"\[E\]|ERROR|[Ee]rror:|[Uu]nknown option", line)]
    meaning = gpu.explain_message("\n".join(lines[-5:] or said.splitlines()[-5:]))
    if re.search(r"out of memory|OutOfMemory", said, re.IGNORECASE):
        meaning = "the GPU has too little free memory; stop other programs on it (nvidia-smi), or limit the\n"
        meaning += "workspace of TensorRT: TRTEXEC_FLAGS=--memPoolSize=workspace:4096"
    if "status 137" in said and not meaning:
        meaning = "the container was killed, by hand or because memory ran out"
    return "\n".join(filter(None, [meaning, *(lines or said.splitlines())[-3:], f"whole log: {log_path(artifact)}"]))


def wait_for_container(process: "subprocess.Popen[bytes]", artifact: str) -> None:
    """Wait until the container ends, and print how long it has been running."""
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
                line = f"  {artifact}: trtexec is running, {seconds // 60}:{seconds % 60:02d}"
                print(
                    f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True
                )
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def end_with_parent() -> None:
    """Let signals, and the end of the parent process, raise SystemExit here, so that the container is removed."""

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def raise_exit(number: int, _: FrameType | None) -> None:
        for other in numbers:  # after Ctrl-C the parent ends, too: its signal must not stop the removal
            signal.signal(other, lambda *_: None)
        raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, raise_exit)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
