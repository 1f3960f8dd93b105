"""Stands in for the inference image's base, which no registry gives here: this machine's own Python, libc and shell.

Made of the files of Debian's packages as they are installed here, so that the image is built and run for real.
"""

import re
import subprocess
import tarfile
from pathlib import Path

NAME = "chest-inference-base-stand-in-test"
PACKAGES = ("python3", "python3-venv", "dash", "coreutils", "libc-bin", "libstdc++6", "base-files", "base-passwd")


def inference_base_stand_in() -> str:
    """The name of the image, imported unless it is there."""
    if subprocess.run(["docker", "image", "inspect", NAME], capture_output=True).returncode:
        run = subprocess.Popen(["docker", "import", "-", NAME], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert run.stdin
        with run.stdin, tarfile.open(fileobj=run.stdin, mode="w|", format=tarfile.PAX_FORMAT) as image:
            for path in files():
                image.add(path, recursive=False)
        assert run.wait() == 0
    return NAME


def files() -> list[str]:
    """Of PACKAGES and all they depend on, each under its real name, for /lib is a link to /usr/lib."""
    asked = "${Package}\t${binary:Package}\t${Provides}\t${Pre-Depends}, ${Depends}\n"
    found = subprocess.run(["dpkg-query", "-W", "-f", asked], capture_output=True, text=True, check=True).stdout
    installed, depends = dict[str, str](), dict[str, list[str]]()
    for line in found.splitlines():
        name, binary, provides, needs = line.split("\t")
        installed |= dict.fromkeys([name, *names(provides)], binary)
        depends[binary] = names(needs)
    wanted, queue = set[str](), list(PACKAGES)
    while queue:
        binary = installed.get(queue.pop(), "")
        if binary and binary not in wanted:
            wanted.add(binary)
            queue += depends[binary]
    listed = subprocess.run(["dpkg", "-L", *sorted(wanted)], capture_output=True, text=True, check=True).stdout
    paths = {Path(line) for line in listed.splitlines() if line.startswith("/") and line != "/."}
    real = {str(path.parent.resolve() / path.name) for path in paths if path.is_symlink() or path.exists()}
    return sorted(real | {link for link in ("/bin", "/sbin", "/lib", "/lib64") if Path(link).is_symlink()})


def names(packages: str) -> list[str]:
    """Of a list such as "libc6 (>= 2.36), python3:any | python3-minimal"."""
    return re.findall(r"[a-z0-9][a-z0-9.+-]+", re.sub(r"\([^)]*\)|:any", "", packages))
