"""Say what this machine has, what is needed, and what to do: python3 -sESB -m scripts.plans.doctor [--gpu] [PORT ...]

The first part is about `make repository`, the second about plans and containers.  Exit status 1 if the first part lacks
something; with --gpu also if Docker or the GPU is missing, which is otherwise only printed.  Standard library only.
"""

import argparse
import errno
import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from scripts.plans import gpu
from scripts.serve.releases import list_notes
from scripts.steps.before_make import ENVIRONMENTS
from scripts.steps.printing import print_text

GB = 1e9


class Finding(NamedTuple):
    """One line: what was checked, what was found, what is needed, and what to do ("" if nothing is lacking)."""

    what: str
    found: str
    needed: str
    todo: str


def check_make() -> Finding:
    said = run_command(os.environ.get("MAKE", "make"), "--version")
    version = (re.search(r"GNU Make (\d+)\.(\d+)", said) or [""])[0].removeprefix("GNU Make ") or "none"
    good = tuple(map(int, version.split("."))) >= (4, 3) if version != "none" else False
    return Finding("GNU Make", version, "4.3", "" if good else "apt install make")


def check_python() -> Finding:
    name = os.environ.get("PYTHON", "python3")
    version = (
        run_command(name, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])").strip()
        or "none, or no venv"
    )
    new = re.fullmatch(r"3\.(\d+)", version) is not None and int(version.partition(".")[2]) >= 13
    todo = "" if new or version in ("3.11", "3.12") else "apt install python3 python3-venv, or PYTHON=python3.12"
    needed = "3.11 or 3.12, with venv; if it is newer, python3.12 or the one from uv is used"
    return Finding(f"Python ({name})", version, needed, todo)


def check_checkout() -> Finding:
    """Check that make can write and lock files here; the file of the check is removed."""
    folder = ".make" if Path(".make").is_dir() else "."
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        remedies = {
            errno.EACCES: f"sudo chown -R $(id -u) {Path.cwd()}",
            errno.ENOSPC: "make clean, or a larger disk",
            errno.EDQUOT: "make clean, or a larger quota",
            errno.EROFS: "clone the project to a disk that may be written to",
        }
        other = (
            "a share without locks: mount it with them (NFS: option local_lock=flock or rpc.statd), or clone elsewhere"
        )
        return Finding(
            "checkout", str(error.strerror), "files can be written and locked", remedies.get(error.errno or 0, other)
        )
    return Finding("checkout", "can be written to", "files can be written and locked", "")


def check_environments() -> Finding:
    """Check that each environment in this checkout has a Python that runs."""
    here = [folder for folder in ENVIRONMENTS if Path(folder, "bin").is_dir()]
    dead = [
        folder for folder in here if not any(run_command(str(file), "-c", "print(1)") for file in list_pythons(folder))
    ]
    found = f"{', '.join(dead)}: its Python no longer runs" if dead else ", ".join(here) or "none yet"
    todo = f"rm -rf {' '.join(dead)}; the next make that needs it makes it again" if dead else ""
    return Finding("environments", found, "each with a Python that runs", todo)


def list_pythons(folder: str) -> list[Path]:
    return sorted(Path(folder, "bin").glob("python3.*"))


def check_disk() -> Finding:
    free = shutil.disk_usage(".").free
    return Finding(
        "disk",
        f"{free / GB:.0f} GB free",
        "8 GB, some already used",
        "" if free > 4 * GB else "make clean, or a larger disk",
    )


def check_memory() -> Finding:
    found = re.search(r"MemTotal: *(\d+) kB", Path("/proc/meminfo").read_text())
    size = int(found[1]) * 1024 if found else 0
    return Finding(
        "memory",
        f"{size / GB:.0f} GB",
        "8 GB",
        "" if size > 7 * GB else "the ViT's steps may be killed; use a machine with more memory",
    )


def check_shared_memory() -> Finding:
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    todo = "" if free > 0.9 * GB else "mount -o remount,size=1g /dev/shm; in Docker: --shm-size 2g"
    return Finding("/dev/shm", f"{free / GB:.1f} GB free", "1 GB", todo)


def check_ports(numbers: list[int]) -> Finding:
    taken = [str(number) for number in numbers if not is_free(number)]
    found = f"{', '.join(taken)} taken" if taken else "free"
    todo = 'make serve PORTS="8100 8101 8102", or stop what listens: ss -ltnp' if taken else ""
    return Finding(f"ports {' '.join(map(str, numbers))}", found, "free, for make serve", todo)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def check_docker() -> Finding:
    try:
        return Finding("Docker", gpu.ask_daemon(), "20.10 or newer", "")
    except SystemExit as error:
        return Finding("Docker", "none that answers", "20.10 or newer", str(error))


def check_image(variable: str) -> Finding:
    name = os.environ[variable]
    try:
        return Finding(name, f"TensorRT {gpu.find_image(name, pull=False).tensorrt}", "on this machine", "")
    except SystemExit:
        return Finding(
            name,
            "not on this machine",
            "on this machine; it is pulled when it is first needed",
            f"docker pull {name}; without a network: docker load",
        )


def check_gpu() -> Finding:
    needed = "one that containers can use"
    try:
        if not gpu.is_driver_visible():
            return Finding("NVIDIA GPU", "none", needed, gpu.NO_GPU)
        host = gpu.parse_gpu(run_command("nvidia-smi", *gpu.QUERY))
        here = gpu.run_docker("image", "inspect", os.environ["TENSORRT_IMAGE"]).returncode == 0
        found = host if host and not here else gpu.find_gpu(os.environ["TENSORRT_IMAGE"])
    except SystemExit as error:
        return Finding("NVIDIA GPU", "not seen in a container", needed, str(error))
    description = f"{found.name}, compute capability {found.capability}, {found.memory} MiB, driver {found.driver}"
    old = found.driver.partition(".")[0].isdigit() and int(found.driver.partition(".")[0]) < gpu.DRIVER
    todo = (
        f"install R{gpu.DRIVER}, which the images need; on a data-centre GPU some older drivers work, too"
        if old
        else ""
    )
    return Finding("NVIDIA GPU", description, needed, todo)


def check_toolkit() -> Finding:
    name = next(filter(shutil.which, ("nvidia-ctk", "nvidia-container-runtime-hook", "nvidia-container-cli")), "")
    needed = "so that containers can use the GPU"
    if os.environ.get("DOCKER_GPUS"):
        return Finding("NVIDIA Container Toolkit", f"DOCKER_GPUS={os.environ['DOCKER_GPUS']} instead", needed, "")
    return Finding("NVIDIA Container Toolkit", name or "none", needed, "" if name else gpu.INSTALL_TOOLKIT)


def run_command(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def print_findings(findings: list[Finding]) -> None:
    for finding in findings:
        state = "lacking" if finding.todo else "ok     "
        print_text(f"{state}  {finding.what}: {finding.found} (needed: {finding.needed})")
        for line in finding.todo.splitlines():
            print_text(f"             {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpu", action="store_true", help="fail also without Docker or a GPU, which make verify-gpu needs"
    )
    parser.add_argument("ports", type=int, nargs="*")
    given = parser.parse_args()
    checks: list[Callable[[], Finding]] = [
        check_make,
        check_python,
        check_checkout,
        check_environments,
        check_disk,
        check_memory,
        check_shared_memory,
    ]
    needed = [check() for check in checks]
    print_text("make repository:")
    print_findings(needed)
    if given.ports:  # ports in use matter to make serve only
        print_findings([check_ports(given.ports)])
    for note in list_notes():  # notes never count as lacking
        print_text(f"note     {note}")
    print_text("\nplans and containers (make trt, FORMAT=plan or both, make verify-gpu):")
    for_plans = [
        check_docker(),
        check_image("TENSORRT_IMAGE"),
        check_image("TRITON_IMAGE"),
        check_toolkit(),
        check_gpu(),
    ]
    print_findings(for_plans)
    lacking = any(finding.todo for finding in needed)
    no_plans = any(
        finding.found in ("none that answers", "none", "not seen in a container")
        for finding in (for_plans[0], for_plans[-1])
    )
    print_text(f"\nmake repository {'lacks something' if lacking else 'has what it needs'}; "
          f"plans {'cannot be built here yet' if no_plans else 'can be built here'}")  # fmt: skip
    sys.exit(int(lacking or (given.gpu and no_plans)))


if __name__ == "__main__":
    main()
