"""Find free ports for a server, and the memory that it needs for a repository's models."""

import random
import shutil
import socket
from contextlib import suppress
from math import prod
from pathlib import Path

from scripts.serve.model_config import BYTES, read_config

SHM = Path("/dev/shm")
# Linux takes ports for outgoing connections from 32768 on, so these stay free while models load
FREE_PORTS = range(20000, 32768)


def open_port(address: str, port: int) -> socket.socket:
    """Return a socket that listens; SystemExit if the port is taken."""
    check_port(address, port)
    return socket.create_server((address, port), backlog=128)


def check_port(address: str, port: int) -> None:
    """SystemExit if a server cannot listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise SystemExit(f"{address}:{port}: {reason}; stop what listens there, or choose another port") from error


def find_free_ports(address: str, count: int) -> list[int]:
    """Return different ports on which nothing listens; SystemExit if there are too few."""
    found: list[int] = []
    for port in random.sample(FREE_PORTS, len(FREE_PORTS)):
        with suppress(SystemExit):
            check_port(address, port)
            found.append(port)
        if len(found) == count:
            return found
    raise SystemExit(f"{address}: no free port from {FREE_PORTS[0]} to {FREE_PORTS[-1]}; see what listens: ss -ltnp")


def estimate_shared_memory(repository: Path) -> int:
    """Return the bytes of /dev/shm that the Python backend needs for one sample of each model.

    A model's region grows to its largest request and never shrinks. A variable dimension counts as 512: a CT series
    of 512 slices of 512 x 512 voxels.
    """
    needed = 64 << 20  # for answers and other data of the backend
    for path in repository.glob("*/config.pbtxt"):
        with suppress(ValueError):
            for tensor in read_config(path).input:
                needed += BYTES.get(tensor.data_type, 8) * prod(512 if size < 0 else size for size in tensor.dims)
    return needed


def choose_pinned_pool(repository: Path) -> int:
    """Return the bytes of pinned memory from which batches go to a GPU: two of the largest batches, at least 256 MB.

    Two, because one batch waits while the other is computed. From other memory a copy takes twice as long (on an H200
    33 ms for a volume, whose network takes 9 to 28 ms).
    """
    largest = 0
    for path in repository.glob("*/config.pbtxt"):
        with suppress(ValueError):
            config = read_config(path)
            known = [tensor for tensor in config.input if all(size > 0 for size in tensor.dims)]
            size = sum(BYTES.get(tensor.data_type, 8) * prod(tensor.dims) for tensor in known)
            largest = max(largest, size * max(1, config.max_batch_size))
    return max(256 << 20, 2 * largest)


def check_shared_memory(needed: int) -> None:
    """SystemExit if /dev/shm has less than `needed` bytes free."""
    free = shutil.disk_usage(SHM).free if SHM.is_dir() else 0
    if free < needed:
        gigabytes = -(-needed // (1 << 30))
        raise SystemExit(
            f"{SHM} has {free >> 20} MiB free, requests to these models need {needed >> 20} MiB; "
            f"enlarge it: mount -o remount,size={gigabytes}g {SHM} (in Docker: --shm-size {gigabytes}g)"
        )
