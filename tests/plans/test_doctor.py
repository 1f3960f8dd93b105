"""What make doctor says of environments."""

import sys
from pathlib import Path

import pytest

from scripts.plans import doctor


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
