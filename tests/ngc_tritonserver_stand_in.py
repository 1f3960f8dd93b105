"""Stand-in for the image nvcr.io/nvidia/tritonserver:24.06-py3, which only a registry has.

It is a Debian root file system with these at the paths of NVIDIA's image: tritonserver 2.47.0 of the Python package
index with its Python backend, the stand-in for the ONNX Runtime backend, curl, pip, the user triton-server. Two
packages that bpr_model requires are left out, so that an image built on it has to install them.
"""

import io
import os
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
REGISTRY = "chest-ngc-tritonserver-stand-in-test/"
IMAGE = f"{REGISTRY}nvcr.io/nvidia/tritonserver:24.06-py3"
PACKAGES = "base-files,bash,dash,coreutils,findutils,grep,sed,python3,libpython3.11,libexpat1,libstdc++6,zlib1g,curl"
SITE = "usr/lib/python3/dist-packages"
LEFT_OUT = ("humanfriendly", "coloredlogs", "nvidia_cudnn", "tensorrt", "onnxruntime/capi/libonnxruntime_providers_")
SERVER = f"""#!/bin/sh
export LD_LIBRARY_PATH=/{SITE}/nvidia_pytriton.libs
exec /{SITE}/pytriton/tritonserver/bin/tritonserver --backend-directory=/opt/tritonserver/backends "$@"
"""


def stand_in(scratch: Path) -> str:
    """Make the image and return its name. Needs root and Debian's mmdebstrap."""
    root = scratch / "root.tar"
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=extract", f"--include={PACKAGES}", "--aptopt=Acquire::Retries 3",
         "bookworm", root,
         "http://deb.debian.org/debian"],
        check=True,
    )  # fmt: skip
    packages = next((ROOT / ".venv-triton").resolve().glob("lib/python3.11/site-packages"))
    home = packages / "pytriton/tritonserver"
    with tarfile.open(root, "a") as tar:
        for path in sorted(packages.iterdir()):
            if not path.name.lower().startswith(LEFT_OUT):
                tar.add(path, f"./{SITE}/{path.name}", filter=unneeded)
        backends = "./opt/tritonserver/backends"
        tar.add(home / "backends/python", f"{backends}/python", filter=unneeded)
        tar.add(
            home / "python_backend_stubs/3.11/triton_python_backend_stub",
            f"{backends}/python/triton_python_backend_stub",
        )
        tar.add(ROOT / "docker/backends/onnxruntime", f"{backends}/onnxruntime", filter=unneeded)
        for name, text, mode in (
            ("./opt/tritonserver/bin/tritonserver", SERVER, 0o755),
            (
                "./etc/passwd",
                "root:x:0:0::/root:/bin/sh\ntriton-server:x:1000:1000::/home/triton-server:/bin/sh\n",
                0o644,
            ),
            ("./etc/pip.conf", "[global]\nbreak-system-packages = true\n", 0o644),  # as in Ubuntu 22.04
            ("./etc/group", "root:x:0:\ntriton-server:x:1000:\n", 0o644),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(text), mode
            tar.addfile(member, io.BytesIO(text.encode()))
        member = tarfile.TarInfo("./home/triton-server")
        member.type, member.mode, member.uid, member.gid = tarfile.DIRTYPE, 0o755, 1000, 1000
        tar.addfile(member)
    subprocess.run(
        ["docker", "import", "--change=ENV PATH=/opt/tritonserver/bin:/usr/bin:/bin", root, IMAGE],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    root.unlink()
    return IMAGE


def unneeded(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out files that only a GPU or a later run reads; let root own all others."""
    left_out = [f"./{SITE}/{name}" for name in LEFT_OUT] + [
        f"./{SITE}/pytriton/tritonserver/python_backend_stubs",
        f"./{SITE}/sympy/tests",
    ]
    if "__pycache__" in member.name or member.name.startswith(tuple(left_out)):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        print(stand_in(Path(folder)))
