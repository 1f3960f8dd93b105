"""Run an image's Triton in Docker, and forward connections to a container without network."""

import os
import shlex
import shutil
import socket
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from scripts.serve.ports_and_memory import choose_pinned_pool
from scripts.serve.server_options import STRICT

IN_DOCKER = (8000, 8001, 8002)  # ports for HTTP, gRPC and metrics in the container
# Runs in a container: copies standard input to a port there, and its answers to standard output
RELAY = """
import os, socket, sys, threading
inner = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
def send():
    while data := os.read(0, 1 << 20):
        inner.sendall(data)
    inner.shutdown(socket.SHUT_WR)
threading.Thread(target=send, daemon=True).start()
while data := inner.recv(1 << 20):
    while data:
        data = data[os.write(1, data):]
"""


def has_gpu() -> bool:
    """Tell whether a server in Docker gets a GPU. $DOCKER_GPUS holds the options for it, see scripts/plans/gpu.py."""
    return Path("/dev/nvidiactl").exists() or bool(os.environ.get("DOCKER_GPUS"))


def check_image(image: str) -> None:
    """SystemExit if Docker is not installed or the image is not here; `docker run` reports any other fault."""
    if not shutil.which("docker"):
        raise SystemExit(
            f"docker is not installed, so {image} cannot run; without IMAGE the server of .venv-triton is used"
        )
    look = subprocess.run(["docker", "image", "inspect", image], capture_output=True, text=True, check=False)
    if look.returncode and "no such image" in look.stderr.lower():
        raise SystemExit(f"{image} is not here; docker pull {image}, or without a network: docker load --input FILE")


def make_docker_command(
    image: str,
    name: str,
    repository: Path,
    address: str,
    ports: Sequence[int],
    shared: int,
    gpu: bool | None = None,
    maps: Sequence[Path] = (),
    foreign: bool = False,
) -> list[str]:
    """Return the command of an image's server. The repository is mounted read-only under its own path.

    The container installs the Python models' requirements.txt first, because Triton never reads them; pip needs no
    network if the image has the packages already.
    `address`, `ports`, `maps`: see triton_server. `shared`: bytes of /dev/shm. `gpu`: None as has_gpu() says.
    `foreign`: no network, no rights, and only /tmp to write to; the image must have the required packages.
    """
    # Targets of links in the repository are mounted, too, each under its own path
    files = sorted({os.path.realpath(path) for path in repository.rglob("*") if path.is_symlink()})
    mounts = [f"--mount=type=bind,source={path},target={path},readonly" for path in [str(repository), *files]]
    mounts += [f"--mount=type=bind,source={path},target={path}" for path in maps]
    publish = [f"--publish={address}:{port}:{inner}" for port, inner in zip(ports, IN_DOCKER, strict=False)]
    here = has_gpu() if gpu is None else gpu
    gpus = shlex.split(os.environ.get("DOCKER_GPUS") or "--gpus=all") if here else []
    mirrors = [
        f"--env={key}" for key in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST") if key in os.environ
    ]
    if certificate := os.environ.get("PIP_CERT") or os.environ.get("REQUESTS_CA_BUNDLE"):
        mounts.append(f"--mount=type=bind,source={os.path.realpath(certificate)},target=/tmp/ca.pem,readonly")
        mirrors.append("--env=PIP_CERT=/tmp/ca.pem")
    if foreign:
        publish = ["--network=none", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--read-only"]
        publish += ["--tmpfs=/tmp", "--env=HOME=/tmp"]
        mirrors = []
    start = (
        'for needs in "$0"/*/1/requirements.txt; do'
        ' if [ -e "$needs" ]; then python3 -m pip install --quiet --requirement "$needs" || exit; fi; done;'
        ' exec tritonserver --model-repository="$0" "$@"'
    )
    return [
        "docker",
        "run",
        "--rm",
        "--pull=never",
        f"--name={name}",
        f"--shm-size={max(shared, 2 << 30)}",
        *gpus,
        *publish,
        *mounts,
        *mirrors,
        image,
        "bash",
        "-c",
        start,
        str(repository),
        *STRICT,
        *([f"--pinned-memory-pool-byte-size={choose_pinned_pool(repository)}"] if here else []),
        f"--allow-metrics={'true' if len(ports) > 2 else 'false'}",
    ]


def forward_to_container(listening: socket.socket, container: str, port: int) -> None:
    """Forward each connection to a port of a container without network, until the socket is shut down."""
    command = ["docker", "exec", "--interactive", container, "python3", "-c", RELAY, str(port)]

    def forward(outer: socket.socket) -> None:
        with outer:
            subprocess.run(command, stdin=outer.fileno(), stdout=outer.fileno(), stderr=subprocess.DEVNULL, check=False)

    with suppress(OSError):
        while True:
            outer, _ = listening.accept()
            threading.Thread(target=forward, args=(outer,), daemon=True).start()
