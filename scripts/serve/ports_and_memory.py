"""Ports that are free, and the memory that a repository's models need."""

import random
import shutil
import socket
from contextlib import suppress
from math import prod
from pathlib import Path

from scripts.serve.model_config import BYTES, read_config

SHM = Path("/dev/shm")

# Below the range from which Linux gives ports to outgoing connections, so that none is lost while models load.
FREE_PORTS = range(20000, 32768)


def open_port(address: str, port: int) -> socket.socket:
    """A socket that listens; SystemExit where it cannot."""
    check_port(address, port)
    return socket.create_server((address, port), backlog=128)


def check_port(address: str, port: int) -> None:
    """SystemExit unless the port can be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise SystemExit(f"{address}:{port}: {reason}; stop what listens there, or choose another port") from error


def find_free_ports(address: str, count: int) -> list[int]:
    """Distinct ports on which nothing listens; SystemExit where there are too few."""
    found: list[int] = []
    for port in random.sample(FREE_PORTS, len(FREE_PORTS)):
        with suppress(SystemExit):
            check_port(address, port)
            found.append(port)
        if len(found) == count:
            return found
    raise SystemExit(f"{address}: no free port from {FREE_PORTS[0]} to {FREE_PORTS[-1]}; see what listens: ss -ltnp")


def estimate_shared_memory(repository: Path) -> int:
    """Bytes of /dev/shm that the Python backend needs when each model has got one sample.

    A model's region grows to its largest request and stays. An unknown dimension counts as 512: a CT series of 512
    slices of 512 x 512 voxels.
    """
    needed = 64 << 20  # answers, and what several models need besides
    for path in repository.glob("*/config.pbtxt"):
        with suppress(ValueError):
            for tensor in read_config(path).input:
                needed += BYTES.get(tensor.data_type, 8) * prod(512 if size < 0 else size for size in tensor.dims)
    return needed


def choose_pinned_pool(repository: Path) -> int:
    """Bytes of the pool that batches are copied to a GPU from: the largest one, twice, for one waits; 256 MB at least.

    From memory that is not pinned copying takes a GPU twice as long (a volume 33 ms on an H200, its network 9 to 28).
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
    """SystemExit where /dev/shm has less than `needed` bytes free."""
    free = shutil.disk_usage(SHM).free if SHM.is_dir() else 0
    if free < needed:
        gigabytes = -(-needed // (1 << 30))
        raise SystemExit(
            f"{SHM} has {free >> 20} MiB free, requests to these models need {needed >> 20} MiB; "
            f"enlarge it: mount -o remount,size={gigabytes}g {SHM} (in Docker: --shm-size {gigabytes}g)"
        )
