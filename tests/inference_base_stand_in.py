"""Stand-in for the base of the inference image, which no registry offers here: this machine's Python, libc and shell.

It holds the files of Debian's packages that are installed here, so that the image is really built and run.
"""

import re
import subprocess
import tarfile
from pathlib import Path

NAME = "chest-inference-base-stand-in-test"
PACKAGES = ("python3", "python3-venv", "dash", "coreutils", "libc-bin", "libstdc++6", "base-files", "base-passwd")


def inference_base_stand_in() -> str:
    """Return the name of the image; import it if it does not exist."""
    if subprocess.run(["docker", "image", "inspect", NAME], capture_output=True).returncode:
        run = subprocess.Popen(["docker", "import", "-", NAME], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert run.stdin
        with run.stdin, tarfile.open(fileobj=run.stdin, mode="w|", format=tarfile.PAX_FORMAT) as image:
            for path in files():
                image.add(path, recursive=False)
        assert run.wait() == 0
    return NAME


def files() -> list[str]:
    """Return the files of PACKAGES and of all they depend on, under their real names: /lib is a link to /usr/lib."""
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
    """Return the package names in a list such as "libc6 (>= 2.36), python3:any | python3-minimal"."""
    return re.findall(r"[a-z0-9][a-z0-9.+-]+", re.sub(r"\([^)]*\)|:any", "", packages))
