"""Ask Docker which GPU its containers get, and which TensorRT an image has; say what is missing and what helps.

    python3 -sESB -m scripts.plans.gpu [--triton IMAGE] [--flags=OPTIONS]   prints gpu=sm86 tensorrt=10.1.0.27, for make

TENSORRT_IMAGE names the image, DOCKER_GPUS the options that give a container the GPU (default: --gpus all).
--triton: check that this image has the same TensorRT; otherwise its server could not load the plans.  Standard library
only.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

from scripts.archives.base_image import check_base_image
from scripts.plans.trtexec_options import check_options, split_options
from scripts.serve.releases import find_release

# The driver that the release's CUDA needs; on data-centre GPUs some older ones work, too
DRIVER = find_release().driver
INSTALL_TOOLKIT = (
    "apt install nvidia-container-toolkit\n"
    "nvidia-ctk runtime configure --runtime=docker && systemctl restart docker\n"
    "(as root; its package source: https://docs.nvidia.com/datacenter/cloud-native/container-toolkit)"
)
NO_GPU = (
    "there is no NVIDIA GPU here, or no driver for it (no nvidia-smi); plans are built and served on one:\n"
    "use a machine that has one; make repository without FORMAT needs none"
)
CHECK = "without a GPU, NVIDIA's own parser and builder can check the files meant for plans: make trt CHECK=1"
QUERY = ["--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader,nounits"]

# Parts of messages of Docker, NVIDIA's container toolkit or TensorRT, and what they mean; the first that fits counts
MEANINGS = [
    *(
        (sign, "the Docker daemon does not answer; start it: sudo systemctl start docker (as root: dockerd &)")
        for sign in ("cannot connect to the docker daemon", "failed to connect to the docker", "error during connect")
    ),
    ("unable to find image", "the image is not on this machine; make trt gets it, or docker load < image.tgz"),
    (
        "permission denied while trying to connect",
        "this user may not use Docker; join its group: sudo usermod -aG docker $USER, then log in again",
    ),
    ("unsatisfied condition: cuda", f"the NVIDIA driver is too old for this image; install R{DRIVER} or newer"),
    ("driver version is insufficient", f"the NVIDIA driver is too old for this image; install R{DRIVER} or newer"),
    ("driver not loaded", "the NVIDIA driver is not loaded; nvidia-smi tells more: sudo modprobe nvidia, or reboot"),
    (
        "libnvidia-ml.so",
        "there is no NVIDIA driver here; install it: apt install nvidia-driver, or ubuntu-drivers install",
    ),
    ("no devices were found", "there is a driver, but no NVIDIA GPU; plug one in, or use a machine that has one"),
    (
        "no space left on device",
        "the disk is full; `make clean` frees what can be made again, docker image prune images",
    ),
    ("read-only file system", "the folder is read-only; remount it writable or work in a copy of the project"),
]


class Gpu(NamedTuple):
    """One GPU as a container sees it; memory in MiB."""

    name: str
    capability: str
    driver: str
    memory: int

    @property
    def folder(self) -> str:
        """The folder of its plans: sm86 for compute capability 8.6; GPUs of one capability can share plans."""
        return "sm" + self.capability.replace(".", "")


class Image(NamedTuple):
    """An image on this machine: its id, and the TensorRT in it."""

    id: str
    tensorrt: str


def list_gpu_options() -> list[str]:
    """Return the options by which `docker run` gives a container the GPU."""
    return shlex.split(os.environ.get("DOCKER_GPUS") or "--gpus all")


def is_driver_visible() -> bool:
    """Tell whether this machine shows an NVIDIA driver, or was told how containers get the GPU."""
    signs = ("/proc/driver/nvidia/gpus", "/dev/dxg")  # /dev/dxg: in WSL
    return any(Path(sign).exists() for sign in signs) or bool(
        shutil.which("nvidia-smi") or os.environ.get("DOCKER_GPUS")
    )


def run_docker(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a docker command and return its status and output; SystemExit if docker is not installed."""
    if not shutil.which("docker"):
        raise SystemExit(
            "docker is not installed; trtexec and Triton run in it: apt install docker.io\n"
            "(or https://docs.docker.com/engine/install); make repository without FORMAT needs no Docker"
        )
    return subprocess.run(["docker", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def ask_daemon() -> str:
    """Return the version of the Docker daemon; SystemExit if it does not answer."""
    run = run_docker("version", "--format={{.Server.Version}}")
    if run.returncode:
        fail_with(run.stderr)
    return run.stdout.strip()


def find_image(name: str, pull: bool = True) -> Image:
    """Return an image's id and TensorRT; pull it only if it is not on this machine (without a network: docker load)."""
    ask_daemon()
    if (run := run_docker("image", "inspect", name)).returncode:
        if not pull:
            raise SystemExit(f"{name}: not on this machine; get it: docker pull {name}")
        print(f"{name}: pulling, some GB", flush=True, file=sys.stderr)
        if (pulled := run_docker("pull", "--quiet", name)).returncode:
            raise SystemExit(
                f"{name}: not on this machine, and pulling it failed: {find_last_line(pulled.stderr)}\n"
                f"where there is a network: docker pull {name} && docker save {name} | gzip > image.tgz\n"
                "then here: docker load < image.tgz (a mirror of nvcr.io: REGISTRY=registry.example.org/)"
            )
        run = run_docker("image", "inspect", name)
    found = json.loads(run.stdout)[0]
    if pull:  # a question alone, as of make doctor, locks no base image
        check_base_image(name, found)
    environment = dict(item.partition("=")[::2] for item in found["Config"].get("Env") or [])
    version = environment.get("TRT_VERSION") or environment.get("TENSORRT_VERSION") or f"of {name.rpartition(':')[2]}"
    return Image(found["Id"], version.partition("+")[0].replace(" ", "-"))


def find_gpu(name: str) -> Gpu:
    """Return the first GPU that a container of the image gets: --device=0 means this one."""
    run = run_docker(
        "run", "--rm", "--pull=never", "--network=none", "--entrypoint=nvidia-smi", *list_gpu_options(), name, *QUERY
    )
    if run.returncode or not (found := parse_gpu(run.stdout)):
        fail_with(f"{run.stderr}\n{run.stdout}")
    return found


def parse_gpu(said: str) -> Gpu | None:
    """Return the first GPU of nvidia-smi's answer to QUERY."""
    words = [word.strip() for word in said.partition("\n")[0].split(",")]
    if len(words) != 4:
        return None
    return Gpu(words[0], words[1], words[2], int(words[3]) if words[3].isdigit() else 0)


def explain_message(said: str) -> str:
    """Return what a message means and what helps, "" if it is unknown."""
    text = said.lower()
    if "could not select device driver" in text or ("nvidia-smi" in text and "not found" in text):
        if is_driver_visible():
            return f"Docker cannot give containers the GPU; install the NVIDIA Container Toolkit:\n{INSTALL_TOOLKIT}"
        return NO_GPU
    return next((words for sign, words in MEANINGS if sign in text), "")


def fail_with(said: str) -> NoReturn:
    """SystemExit with the meaning of a message, and the message."""
    raise SystemExit(
        "\n".join(
            filter(None, [explain_message(said) or "Docker failed; `make doctor` says more", find_last_line(said)])
        )
    )


def find_last_line(said: str) -> str:
    """Return the last line that is not empty and not Docker's advice to read its help."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and "docker run --help" not in line]
    return lines[-1] if lines else "(it said nothing)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", metavar="IMAGE")
    parser.add_argument("--flags", default="", help="options for trtexec, checked before anything starts")
    given = parser.parse_args()
    check_options(split_options(given.flags))
    try:
        print(answer_make(given.triton))
    except SystemExit as error:
        raise SystemExit(error if given.triton or is_driver_visible() else f"{error}\n{CHECK}") from None


def answer_make(triton: str | None) -> str:
    """Return the words for make that name the GPU and the TensorRT; SystemExit if one is missing."""
    name = os.environ["TENSORRT_IMAGE"]
    ask_daemon()
    if not is_driver_visible():  # checked before some GB are pulled
        raise SystemExit(NO_GPU)
    builder = find_image(name)
    if triton and (server := find_image(triton)).tensorrt != builder.tensorrt:
        raise SystemExit(
            f"{triton} has TensorRT {server.tensorrt}, {name} has {builder.tensorrt}; a plan loads only in the\n"
            f"TensorRT that built it: take both images of one release, NGC_RELEASE={find_release().name}"
        )
    return f"gpu={find_gpu(name).folder} tensorrt={builder.tensorrt}"


if __name__ == "__main__":
    main()
