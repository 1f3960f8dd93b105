"""The file VERSION has the version; help, CHANGELOG.md and provenance show it."""

import json
import re

from conftest import ROOT, Project

VERSION = (ROOT / "VERSION").read_text().strip()


def test_the_changes_begin_with_the_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == VERSION


def test_help_and_provenance_show_the_version(stand_ins: Project) -> None:
    (stand_ins.path / "VERSION").write_text("7.8.9\n")
    assert "version 7.8.9" in stand_ins.make("help")
    assert json.loads(stand_ins.make("provenance"))["version"] == "7.8.9"


def test_a_new_version_makes_no_model_again(stand_ins: Project) -> None:
    (stand_ins.path / "VERSION").write_text("7.8.9\n")
    assert stand_ins.steps() == set()
