"""The output folder has one row per study when INPUT grows, is renamed or holds a study twice."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from scripts.infer import __main__ as program
from scripts.infer import tables
from scripts.infer.__main__ import Worker
from scripts.infer.messages import translate
from scripts.infer.tables import COLUMNS, show_path


class Readings:
    """Stands in for the worker: the text in a study's `volume.txt` is its volume."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def row(self, path: Path) -> dict[str, Any]:
        self.paths.append(path.name)
        content = (path / "volume.txt").read_text() if path.is_dir() else path.read_text()
        row: dict[str, Any] = dict.fromkeys(COLUMNS[1:], "") | {"processing_status": "Success"}
        return row | {"study_uid": content, "volume": content, "warnings": [], "failure": "", "error": ""}


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Readings:
    made = Readings()

    class WorkerStandIn(Worker):
        def __init__(self, command: object) -> None:
            self.about = {"weights": "real", "models": "m"}

        def __exit__(self, *_: object) -> None:
            pass

        def rows(self, questions: Sequence[tuple[Path, bool]]) -> Iterator[dict[str, Any]]:
            yield from (made.row(path) for path, _ in questions)

    monkeypatch.setattr(program, "Worker", WorkerStandIn)
    monkeypatch.setattr(tables.fcntl, "flock", lambda *_: None)  # a process holds the lock until it ends
    return made


def run(top: Path, readings: Readings) -> tuple[list[str], list[str]]:
    """The paths of all rows, and the studies that were read in this run."""
    readings.paths.clear()
    assert program.infer_studies(top / "in", top / "out", top, None, again=False) == 0
    document = json.loads((top / "out/output.json").read_text())
    return [row["path_to_study"] for row in document["studies"]], list(readings.paths)


def study(top: Path, name: str, content: str) -> Path:
    (top / "in" / name).mkdir(parents=True)
    (top / "in" / name / "volume.txt").write_text(content)
    return top / "in" / name


def test_a_folder_that_grows_has_its_new_studies_read(tmp_path: Path, readings: Readings) -> None:
    study(tmp_path, "a", "A")
    assert run(tmp_path, readings) == (["a"], ["a"])
    study(tmp_path, "b", "B")
    assert run(tmp_path, readings) == (["a", "b"], ["b"])
    (tmp_path / "in/a/more.txt").write_text("a slice")
    assert run(tmp_path, readings) == (["a", "b"], ["a"])


def test_a_renamed_folder_is_the_same_study(tmp_path: Path, readings: Readings) -> None:
    study(tmp_path, "a", "A")
    study(tmp_path, "c", "C")
    run(tmp_path, readings)
    (tmp_path / "in/a").rename(tmp_path / "in/b")
    assert run(tmp_path, readings) == (["b", "c"], [])
    assert run(tmp_path, readings) == (["b", "c"], [])


def test_a_study_that_returns_under_another_name_replaces_its_row(tmp_path: Path, readings: Readings) -> None:
    old = study(tmp_path, "a", "A")
    run(tmp_path, readings)
    (old / "volume.txt").unlink()
    old.rmdir()
    study(tmp_path, "b", "A")
    assert run(tmp_path, readings) == (["b"], ["b"])


def test_a_study_that_input_holds_twice_is_one_row(tmp_path: Path, readings: Readings) -> None:
    study(tmp_path, "a", "A")
    study(tmp_path, "b", "A")
    study(tmp_path, "c", "C")
    assert run(tmp_path, readings) == (["a", "c"], ["a", "b", "c"])
    assert translate("copies", count=1) in (tmp_path / "out/warnings_and_errors.txt").read_text()
    assert run(tmp_path, readings) == (["a", "c"], [])

    (tmp_path / "in/a/volume.txt").write_text("now another")
    assert run(tmp_path, readings) == (["a", "b", "c"], ["a"])
    assert translate("copies", count=1) not in (tmp_path / "out/warnings_and_errors.txt").read_text()
    (tmp_path / "in/a/volume.txt").write_text("A")
    assert run(tmp_path, readings) == (["a", "c"], ["a"])

    (tmp_path / "in/b").rename(tmp_path / "in/d")
    assert run(tmp_path, readings) == (["a", "c"], ["d"])
    assert translate("copies", count=1) in (tmp_path / "out/warnings_and_errors.txt").read_text()
    (tmp_path / "in/a").rename(tmp_path / "in/e")
    assert run(tmp_path, readings) == (["c", "d"], ["e"])


def test_a_file_as_input_is_one_study(tmp_path: Path, readings: Readings) -> None:
    (tmp_path / "image.dcm").write_text("A")
    assert program.infer_studies(tmp_path / "image.dcm", tmp_path / "out", tmp_path, None, again=False) == 0
    rows = json.loads((tmp_path / "out/output.json").read_text())["studies"]
    assert [row["path_to_study"] for row in rows] == ["image.dcm"]


def test_rows_of_studies_that_are_gone_stay(tmp_path: Path, readings: Readings) -> None:
    gone = study(tmp_path, "a", "A")
    study(tmp_path, "b", "B")
    run(tmp_path, readings)
    (gone / "volume.txt").unlink()
    gone.rmdir()
    assert run(tmp_path, readings) == (["a", "b"], [])


def test_names_of_old_windows_are_shown_in_cyrillic(tmp_path: Path) -> None:
    def path(name: bytes) -> Path:
        return tmp_path / os.fsdecode(name)

    assert show_path(path("Грудь 1".encode("cp1251")), tmp_path) == "Грудь 1"
    assert show_path(path("Грудь 1".encode()), tmp_path) == "Грудь 1"
    assert show_path(path(b"\x98"), tmp_path) == "\\udc98"  # not a letter of that encoding
    path("Грудь 1".encode()).mkdir()
    assert show_path(path("Грудь 1".encode("cp1251")), tmp_path).startswith("\\udcc3")


FIFTY = """
import json, sys
from pathlib import Path
print(json.dumps({"weights": "real", "models": "m"}), flush=True)
for number, line in enumerate(sys.stdin, 1):
    if number > 20:
        import signal; signal.pause()
    row = dict.fromkeys(%r, "") | {"processing_status": "Success", "findings": {}, "warnings": [], "failure": "",
                                   "error": "", "volume": str(number)}
    print(json.dumps(row), flush=True)
"""


def test_ctrl_c_among_fifty_studies_keeps_the_finished_rows(tmp_path: Path) -> None:
    for number in range(50):
        study(tmp_path, f"{number:02}", str(number))
    code = f"""
import sys
from scripts.infer import __main__ as program
real = program.Worker
program.Worker = lambda command: real([sys.executable, "-c", {FIFTY % (COLUMNS[1:],)!r}])
program.main([{str(tmp_path / "in")!r}, {str(tmp_path / "out")!r}])
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env={**os.environ, "LC_ALL": "C"}
    ) as process:
        assert process.stderr
        said = []
        while "20 of 50" not in (line := process.stderr.readline()):
            said.append(line)
            assert line
        process.send_signal(program.signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in rest
    assert said[0].startswith("1 of 50 studies, 0 failed, ") and said[0].endswith(" left\n")
    assert len(json.loads((tmp_path / "out/output.json").read_text())["studies"]) == 20
