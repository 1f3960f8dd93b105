"""What `make doctor` says of environments and programs, and how messages of NVIDIA's toolkit are explained."""

import sys
from pathlib import Path

import pytest

from scripts.plans import doctor, gpu


def test_the_doctor_names_an_environment_whose_python_went_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctor.check_environments().found == "none yet" and not doctor.check_environments().todo
    for folder, python in ((".venv", sys.executable), (".venv-triton", "/nowhere/python3.11")):
        Path(folder, "bin").mkdir(parents=True)
        Path(folder, "bin/python3.11").symlink_to(python)
    told = doctor.check_environments()
    assert told.found == ".venv-triton: its Python no longer runs" and "rm -rf .venv-triton;" in told.todo
    Path(".venv-triton/bin/python3.11").unlink()
    Path(".venv-triton/bin/python3.11").symlink_to(sys.executable)
    assert doctor.check_environments().found == ".venv, .venv-triton" and not doctor.check_environments().todo


def test_the_doctor_says_what_the_onnx_path_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAKE", "make-3.81")
    assert doctor.check_make() == ("GNU Make", "none", "4.3", "apt install make")
    monkeypatch.setenv("PYTHON", "python2")
    assert "apt install python3 python3-venv" in doctor.check_python().todo


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.5, please update", "install R555"),
        ("nvidia-container-cli: initialization error: nvml error: driver not loaded", "driver is not loaded"),
        ("load library failed: libnvidia-ml.so.1: cannot open shared object file", "no NVIDIA driver here"),
        ("write /var/lib/docker/tmp: no space left on device", "make clean"),
    ],
)
def test_what_the_toolkit_says_is_explained(said: str, expected: str) -> None:
    assert expected in gpu.explain_message(said)
