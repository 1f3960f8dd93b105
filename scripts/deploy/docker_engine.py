"""Call Docker and Docker Compose; if they cannot answer, say in one sentence what to do. Standard library only."""

import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any

from scripts.archives.base_image import check_base_image

# Words of Docker's error -> our message
STOPPED = "the Docker engine does not answer at {host}; sudo systemctl start docker"
TROUBLES = {
    "permission denied": "no permission on Docker's socket {host}; sudo usermod -aG docker $USER, and log in again",
    "cannot connect": STOPPED,
    "failed to connect": STOPPED,
    "error during connect": STOPPED,
}


def run_docker(*words: str) -> str:
    """Return what `docker WORDS` prints, "" if it fails; SystemExit if no Docker engine answers."""
    if not shutil.which("docker"):
        raise SystemExit("docker is not installed; on Debian and Ubuntu: sudo apt install docker.io")
    run = subprocess.run(["docker", *words], capture_output=True, text=True)
    if run.returncode:
        for sign, meaning in TROUBLES.items():
            if sign in run.stderr.lower():
                raise SystemExit(meaning.format(host=os.environ.get("DOCKER_HOST", "/var/run/docker.sock")))
    return run.stdout.strip() if run.returncode == 0 else ""


def inspect_object(kind: str, name: str) -> dict[str, Any]:
    """Return what `docker KIND inspect NAME` tells, {} if there is no such image or container."""
    said = json.loads(run_docker(kind, "inspect", name) or "[]")
    return dict(said[0]) if said else {}


def read_labels(image: str) -> dict[str, str]:
    """Return the labels of an image, {} if it does not exist or has none."""
    return dict(inspect_object("image", image).get("Config", {}).get("Labels") or {})


def find_compose() -> list[str]:
    """Return the command of Compose 2: Docker's plugin, or the separate program that some distributions have."""
    run_docker("version")
    old = ""
    for words in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(words[0]):
            run = subprocess.run([*words, "version", "--short"], capture_output=True, text=True)
            version = run.stdout.strip().removeprefix("v")
            numbers = re.match(r"(\d+)\.(\d+)", version)
            if run.returncode == 0 and numbers and (int(numbers[1]), int(numbers[2])) >= (2, 24):
                return words
            old = version if run.returncode == 0 else old
    raise SystemExit(
        f"Docker Compose 2.24 or newer is needed, {f'{old} is here' if old else 'none is installed'}; "
        "apt install docker-compose-v2 (Ubuntu), docker-compose (Debian 13), docker-compose-plugin (Docker's packages)"
    )


def pull_base(image: str) -> str:
    """Return the id of a base image, and pull it if it is not here; SystemExit if it is not the locked image."""
    pull_image(image)
    return check_base_image(image, inspect_object("image", image))


def pull_image(image: str) -> str:
    """Return the id of an image, and pull it if it is not here."""
    if identity := str(inspect_object("image", image).get("Id", "")):
        return identity
    print(f"pulling {image}", flush=True)
    if subprocess.run(["docker", "pull", image], stdout=sys.stderr).returncode:
        raise SystemExit(
            f"{image} cannot be pulled; use a mirror: REGISTRY=mirror.example/, or a file: docker load < FILE"
        )
    return str(inspect_object("image", image)["Id"])
