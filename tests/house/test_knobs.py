"""Knobs: which variables count, that a shell sees each value as one word, which folders are refused, and make help."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Project

KNOBS = re.findall(r"^([A-Z_]+) = .*\$\(CT_", (ROOT / "knobs.mk").read_text(), re.MULTILINE)
VALUES = {"command": "x&{touch,MARK};true", "quote": "'", "newline": "x\ntouch MARK\n#"}
GOALS = ("help", "status", "doctor", "image", "push", "up", "infer", "compare", "trt", "trt-fleet", "bench", "onnx")
COMMON = ("TARGET", "DEVICE", "FORMAT", "FROM", "WITH", "DRY", "FILE", "CHECK", "INPUT", "OUTPUT")


@pytest.fixture(scope="module")
def sources(built_by_stand_ins: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of what the stand-in built, for targets that change nothing in it."""
    folder = tmp_path_factory.mktemp("knobs") / "sources"
    subprocess.run(["cp", "-a", built_by_stand_ins.path, folder], check=True)
    return Project(folder)


def test_there_are_knobs() -> None:
    assert {"IMAGE", "ADDRESS", "WITH", "TRITON", "BASE", "REGISTRY", "OPSET", "PORTS", "REPOSITORY"} <= set(KNOBS)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("knob", KNOBS)
def test_no_value_of_a_knob_runs_as_a_command(sources: Project, knob: str, value: str) -> None:
    (sources.path / "MARK").unlink(missing_ok=True)
    absent = {"PATH": f"{sources.path}/none:{os.environ['PATH']}", "DOCKER_HOST": "unix:///absent"}
    for goal in (goal for goal in GOALS if goal in read_by(knob)):
        given = ["INPUT=none", "OUTPUT=none"] if goal == "infer" else ["WITH=none"] if goal == "compare" else []
        given = [word for word in given if not word.startswith(f"{knob}=")]
        said = sources.start(goal, *given, f"{knob}={VALUES[value]}", **absent).communicate(timeout=120)[0]
        assert not (sources.path / "MARK").exists(), (goal, said)
        assert "syntax error" not in said and "unexpected EOF" not in said, (goal, said)
        if value == "newline":
            assert f"{knob}: expected one line" in said


def read_by(knob: str) -> set[str]:
    """Return the targets whose recipes read a knob; help shows every knob."""
    text = (ROOT / "Makefile").read_text()
    parts = {goal: text.partition(f"\n{goal}:")[2].partition("\n\n")[0] for goal in GOALS}
    parts["image"] += text.partition("\nimage.triton")[2].partition("\n\n")[0]
    reading = {goal for goal, part in parts.items() if f"$({knob})" in part}
    return {"help"} | reading | ({"trt"} if knob in ("NGC_RELEASE", "REGISTRY", "TRTEXEC_FLAGS", "MODEL") else set())


def test_common_names_in_the_environment_change_nothing(stand_ins: Project) -> None:
    theirs = dict.fromkeys([*COMMON, *KNOBS], "theirs")
    assert "up to date" in stand_ins.make("repository", **theirs)
    assert "theirs" not in stand_ins.make("help", **theirs)
    assert "nothing to do" in stand_ins.make("status", **theirs)


def test_knobs_of_the_environment_count_with_their_prefix_and_the_command_line_wins(stand_ins: Project) -> None:
    said = stand_ins.make("help", "KNOBS=1", CT_OPSET="19", CT_IMAGE="a/b:1")
    assert re.search(r"^  OPSET=19$", said, re.MULTILINE) and re.search(r"^  IMAGE=a/b:1$", said, re.MULTILINE)
    assert re.search(r"^  OPSET=21$", stand_ins.make("help", "KNOBS=1", "OPSET=21", CT_OPSET="19"), re.MULTILINE)
    assert "FROM=theirs: expected one of" in stand_ins.fail("repository", CT_FROM="theirs")


@pytest.mark.parametrize(
    "folder", ["scripts", "docker/x", "training/weights", "convertation", "tests", ".git", "..", "docs"]
)
def test_a_repository_inside_the_sources_or_around_them_is_refused(stand_ins: Project, folder: str) -> None:
    before = sorted(stand_ins.path.rglob("*.py"))
    said = stand_ins.fail("repository", f"REPOSITORY={folder}")
    assert "expected a folder apart from the sources" in said and len(said.splitlines()) == 1
    assert sorted(stand_ins.path.rglob("*.py")) == before


def test_a_tilde_is_the_home_folder(stand_ins: Project, tmp_path: Path) -> None:
    stand_ins.make("repository", "REPOSITORY=~/m", HOME=str(tmp_path))
    assert (tmp_path / "m/vit_onnx/1/model.onnx").exists() and not (stand_ins.path / "~").exists()
    assert "up to date" in stand_ins.make("repository", "REPOSITORY=~/m", HOME=str(tmp_path))
    assert "up to date" in stand_ins.make("repository", f"REPOSITORY={tmp_path}/m")


@pytest.mark.parametrize("folder", ["feature%2Fx", "a'b", "a$$b", "a;b", "a(b"])
def test_a_repository_whose_name_make_or_a_shell_would_read_is_refused(stand_ins: Project, folder: str) -> None:
    said = stand_ins.fail("repository", f"REPOSITORY={folder}")
    assert "expected a folder without characters that have a meaning to shells or make" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", ["feature%2Fx", "a b"])
@pytest.mark.parametrize("target", ["help", "doctor", "repository"])
def test_a_checkout_with_such_a_path_is_refused_in_one_sentence(
    built_by_stand_ins: Project, tmp_path: Path, name: str, target: str
) -> None:
    subprocess.run(["cp", "-a", built_by_stand_ins.path, tmp_path / name], check=True)
    said = Project(tmp_path / name).fail(target)
    assert f"{tmp_path}/{name}" in said and "move it to one without" in said and len(said.splitlines()) == 1


def test_help_is_the_default_and_names_targets_and_values(stand_ins: Project) -> None:
    said = stand_ins.make("VIT=Base")
    for target in ("repository", "onnx", "verify", "serve", "rollback", "bench", "test", "clean", "distclean", "help"):
        assert re.search(rf"^  make {target} +\S", said, re.MULTILINE), target
    assert said == stand_ins.make("help", "VIT=Base")
    said = stand_ins.make("help", "VIT=Base", "KNOBS=1")
    assert re.search(r"^  WEIGHTS=synthetic$", said, re.MULTILINE)
    assert re.search(r"^  VIT=Base$", said, re.MULTILINE)


def test_help_needs_nothing_and_leaves_nothing(stand_ins: Project) -> None:
    for name in (".venv", ".venv-triton", "build"):
        shutil.rmtree(stand_ins.path / name)
    stand_ins.make("help")
    assert not any((stand_ins.path / name).exists() for name in (".venv", "build"))
