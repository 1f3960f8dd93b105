"""The rule of three lines that CONTRIBUTING.md shows works as it stands there; the Make files stay plain."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, Project, announced

MAKE_FILES = sorted([ROOT / "Makefile", ROOT / "knobs.mk", *ROOT.glob("scripts/*/*.mk")])
TARGET, SCRIPT = "build/opsets.json", "scripts/show/opsets.py"


def shown(language: str) -> str:
    """Return the one block of code in this language of CONTRIBUTING.md."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    return str(blocks[0])


def test_the_rule_of_three_lines_makes_its_artifact_and_again_only_when_it_has_to(project: Project) -> None:
    assert len(shown("make").splitlines()) == 3
    (project.path / SCRIPT).write_text(shown("python"))
    project.edit("Makefile", "# --- Build ---", shown("make") + "\n# --- Build ---")

    assert announced(project.make(TARGET)) == {TARGET}
    assert json.loads((project.path / TARGET).read_text()) == [20]
    (project.path / TARGET).touch()
    assert announced(project.make(TARGET)) == set()

    project.append(SCRIPT, "# a remark\n")
    assert f"{TARGET}: opsets.py changed" in project.make(TARGET)
    (project.path / TARGET).unlink()
    assert announced(project.make(TARGET)) == {TARGET}
    assert announced(project.make(TARGET, "OPSET=19")) >= {"build/onnx/binary.onnx", TARGET}
    assert json.loads((project.path / TARGET).read_text()) == [19]


@pytest.mark.parametrize("path", MAKE_FILES, ids=lambda path: path.name)
def test_no_line_of_a_make_file_is_longer_than_120_characters(path: Path) -> None:
    lines = enumerate(path.read_text().splitlines(), start=1)
    assert [f"{number}: {line}" for number, line in lines if len(line) > 120] == []


def test_no_make_file_writes_make() -> None:
    assert {path.name for path in MAKE_FILES if "$(eval" in path.read_text()} == set()
