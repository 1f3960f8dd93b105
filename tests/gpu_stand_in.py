"""Stand-in for a machine with a GPU: two local images, and options for Docker in place of --gpus all.

NVIDIA's toolkit mounts the host's driver in a container; here DOCKER_GPUS mounts the host's Python and ONNX Runtime.
Docker, its networks, mounts, users and signals are real.
"""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

from conftest import ROOT

RELEASE = "stand-in-test"
REGISTRY = "chest-stand-in-test/"
TENSORRT_IMAGE = f"{REGISTRY}nvcr.io/nvidia/tensorrt:{RELEASE}-py3"
TRITON_IMAGE = f"{REGISTRY}nvcr.io/nvidia/tritonserver:{RELEASE}-py3"
KNOBS = (f"REGISTRY={REGISTRY}", f"NGC_RELEASE={RELEASE}")
GPU = "NVIDIA Stand-in RTX 3090, 8.6, 555.42.06, 24576"
COMMANDS = {
    "trtexec": f'exec {ROOT}/.venv/bin/python -B /opt/stand-in/trtexec_stand_in.py "$@"',
    "tritonserver": f'exec {ROOT}/.venv/bin/python -B /opt/stand-in/tritonserver_stand_in.py "$@"',
    "python3": f'exec {ROOT}/.venv-triton/bin/python3 -B "$@"',
    "nvidia-smi": f'echo "${{STAND_IN_GPU:-{GPU}}}"; exit "${{STAND_IN_GPU_STATUS:-0}}"',
}


def docker_gpus(*more: str) -> str:
    """Return the value of DOCKER_GPUS; `more`: further docker options, such as --env=STAND_IN=fail."""
    # An environment may be a link to that of another checkout
    environments = {str((ROOT / name).resolve()) for name in (".venv", ".venv-triton")}
    folders = {"/usr", str(Path(sys.base_prefix).resolve()), str(ROOT), *environments}
    return " ".join([*(f"--volume={folder}:{folder}:ro" for folder in sorted(folders)), *more])


def import_image(name: str, tensorrt: str = "10.1.0.27") -> None:
    """Make an image with the stand-ins; what else they need is in the host's /usr, which DOCKER_GPUS mounts."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:

        def add(
            path: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", link: str = "", mode: int = 0o755
        ) -> None:
            member = tarfile.TarInfo(path)
            member.type, member.size, member.linkname, member.mode = kind, len(content), link, mode
            tar.addfile(member, io.BytesIO(content))

        for folder in ("usr", "etc", "opt", "opt/stand-in"):
            add(folder, tarfile.DIRTYPE)
        add("tmp", tarfile.DIRTYPE, mode=0o1777)
        for link in ("bin", "sbin", "lib", "lib64"):
            add(link, tarfile.SYMTYPE, link=f"usr/{link}")
        for command, text in COMMANDS.items():
            add(f"opt/stand-in/{command}", content=f"#!/bin/sh\n{text}\n".encode())
        for script in ("trtexec_stand_in.py", "tritonserver_stand_in.py"):
            add(f"opt/stand-in/{script}", content=(ROOT / "tests" / script).read_bytes())
    environment = [
        "PATH=/opt/stand-in:/usr/local/bin:/usr/bin",
        f"TRT_VERSION={tensorrt}+cuda12.5",
        f"STAND_IN_ROOT={ROOT}",
    ]
    changes = [f"--change=ENV {pair}" for pair in environment]
    subprocess.run(["docker", "import", *changes, "-", name], input=packed.getvalue(), check=True, capture_output=True)


def remove_image(name: str) -> None:
    subprocess.run(["docker", "rmi", "--force", name], capture_output=True, check=False)
