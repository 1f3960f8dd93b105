"""If the system's Python is not 3.11 or 3.12, environments use python3.12 or a Python that uv downloads."""

import subprocess
from pathlib import Path

from conftest import ROOT

# Fakes of Python: they tell their version, and make environments whose Python and uv are fakes, too
FAKE = """#!/bin/bash
echo "{name} $*" >> {log}
case "$*" in
  *version_info*) echo {version} ;;
  "-m venv "*) folder=${{!#}}; mkdir -p "$folder/bin"
    for file in python3 python{version} uv; do cp {bin}/made "$folder/bin/$file"; done ;;
esac
"""
MADE = """#!/bin/bash
echo "${{0##*/}} $*" >> {log}
if [[ ${{0##*/}} == uv && {fails} ]]; then exit 2; fi
if [[ ${{0##*/}} == uv ]]; then mkdir -p "${{!#}}/bin"; cp "$0" "${{!#}}/bin/python3.12"; fi
if [[ $3 == freeze ]]; then echo packaging==26.3; fi
"""


def make_environment(
    folder: Path, version: str, *others: str, fails: str = "-n ''"
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run venv.sh with a fake Python of that version and of others; return it and what they saw."""
    (folder / ".make/lock").mkdir(parents=True)
    (folder / "bin").mkdir()
    log = folder / "log"
    for name, tells in [("python3", version), *((f"python{other}", other) for other in others)]:
        text = FAKE.format(name=name, version=tells, log=log, bin=folder / "bin")
        (folder / "bin" / name).write_text(text)
    if "3.12" not in others:
        (folder / "bin/python3.12").write_text("#!/bin/bash\nexit 1\n")  # this machine may have a real one
    (folder / "bin/made").write_text(MADE.format(log=log, fails=fails))
    for file in (folder / "bin").iterdir():
        file.chmod(0o755)
    environment = {"PATH": f"{folder}/bin:/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(
        [ROOT / "scripts/steps/venv.sh", "python3", ".venv", "r.txt", "out"],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    return done, log.read_text()


def test_a_python_that_fits_makes_the_environment(tmp_path: Path) -> None:
    done, log = make_environment(tmp_path, "3.11")
    assert done.returncode == 0 and "python3 -m venv --clear .venv" in log and "uv" not in done.stdout
    assert (tmp_path / "out").read_text() == "packaging==26.3\n"


def test_beside_a_newer_python_the_machines_python3_12_is_taken(tmp_path: Path) -> None:
    done, log = make_environment(tmp_path, "3.14", "3.12")
    assert done.returncode == 0 and "python3 is Python 3.14; .venv needs 3.11 or 3.12" in done.stdout
    assert "python3.12 -m venv --clear .venv" in log and "uv" not in log


def test_where_there_is_none_uv_brings_it(tmp_path: Path) -> None:
    done, log = make_environment(tmp_path, "3.13")
    assert done.returncode == 0, done.stdout
    assert "there is no python3.12 here: uv " in done.stdout
    assert "-m pip install -qq --disable-pip-version-check uv==" in log
    assert "uv --quiet venv --managed-python --seed --clear --python 3.12 .venv" in log
    assert "python3.12 -m pip install" in log and (tmp_path / "out").exists()


def test_where_uv_cannot_the_message_says_what_to_install(tmp_path: Path) -> None:
    done, _ = make_environment(tmp_path, "3.13", fails="-z ''")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert "install Python 3.11 or 3.12 with its venv, and: make … PYTHON=" in done.stdout.splitlines()[-1]
