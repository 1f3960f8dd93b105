"""`make provenance` traces each published file to an archive, own file or source, and compares with such a JSON."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Project

VIT = f"{REPOSITORY}/vit_onnx/config.pbtxt"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def provenance(project: Project, *args: str) -> Any:
    return json.loads(project.make("provenance", *args))


def test_every_published_file_is_traced_to_sources(stand_ins: Project) -> None:
    told = provenance(stand_ins)
    assert told["weights"] == "synthetic"
    assert told["published"].keys() == stand_ins.published().keys()
    for name, entry in told["published"].items():
        source = entry["copy_of"]
        assert entry["sha256"] == sha256(stand_ins.path / REPOSITORY / name)
        assert entry["sha256"] == (told["made"].get(source) or told["origin"][source])["sha256"]
    for entry in told["made"].values():
        for name, sha in entry["inputs"].items():
            assert (told["made"].get(name) or told["origin"][name])["sha256"] == sha
    for name, entry in told["origin"].items():
        assert entry == {"sha256": sha256(stand_ins.path / name), "kind": "source"}


def test_an_artifact_names_command_and_versions(stand_ins: Project) -> None:
    made = provenance(stand_ins)["made"]["build/onnx/binary.onnx"]
    assert "-m convertation.head.torch2onnx --opset 20 --weights synthetic" in made["command"]
    assert made["versions"].keys() >= {"torch", "onnx", "numpy"}
    assert "build/synthetic/CT-RATE/model_binary.pth" in made["inputs"]


def test_two_builds_tell_the_same(stand_ins: Project) -> None:
    before = stand_ins.make("provenance")
    shutil.rmtree(stand_ins.path / "build")
    stand_ins.append("scripts/convert/compare.py", "# a remark\n")
    stand_ins.make("repository")
    stand_ins.edit("scripts/convert/compare.py", "# a remark\n", "")
    stand_ins.make("repository")
    assert stand_ins.make("provenance") == before


def test_the_archive_and_the_users_own_file_are_told_apart(stand_ins: Project) -> None:
    archive = stand_ins.path / "training/weights.zip"
    archive.write_text("zip\n")
    (stand_ins.path / "training/weights.zip.lock.json").write_text(f'{{"size": 4, "sha256": "{sha256(archive)}"}}')
    own = stand_ins.path / "training/weights/CT-RATE/model_binary.pth"
    own.parent.mkdir()
    own.write_text("mine")
    stand_ins.make("repository", "WEIGHTS=yandex", "REPOSITORY=other")
    told = provenance(stand_ins, "WEIGHTS=yandex", "REPOSITORY=other")
    assert told["weights"] == "real"
    assert told["origin"]["training/weights/CT-RATE/model_binary.pth"] == {"sha256": sha256(own), "kind": "local"}
    assert told["origin"]["training/weights.zip"] == {"kind": "archive", "size": 4, "sha256": sha256(archive)}
    assert "training/weights.zip.lock.json" in told["made"]["training/weights/bpr/model.pt"]["inputs"]


def test_an_edit_that_is_not_built_yet_changes_no_provenance(stand_ins: Project) -> None:
    before = stand_ins.make("provenance")
    stand_ins.append("convertation/head/mlp.py", "# a remark\n")
    stand_ins.append("convertation/head/binary.pbtxt", "# a remark\n")
    assert stand_ins.make("provenance") == before


def test_an_altered_file_has_none(stand_ins: Project) -> None:
    stand_ins.append(VIT, "# altered\n")
    assert f"{VIT} is not what the verdict was passed on" in stand_ins.fail("provenance")
    (stand_ins.path / VIT).unlink()
    assert f"{VIT} is not there; make repository" in stand_ins.fail("provenance")


# --- CHECK=file.json ----------------------------------------------------------


@pytest.fixture
def told(stand_ins: Project) -> Project:
    (stand_ins.path / "told.json").write_text(stand_ins.make("provenance"))
    return stand_ins


def test_the_same_files_agree_wherever_they_are(told: Project) -> None:
    shutil.copytree(told.path / REPOSITORY, told.path / "copy")
    shutil.rmtree(told.path / ".make")
    assert told.make("provenance", "CHECK=told.json", "REPOSITORY=copy") == "copy: 14 files are those of told.json\n"


def test_each_difference_is_named(told: Project) -> None:
    top = told.path / REPOSITORY
    told.append(VIT, "# altered\n")
    (top / "binary_onnx/1/model.onnx").unlink()
    (top / "binary_onnx/1/extra").touch()
    said = told.fail("provenance", "CHECK=told.json")
    assert "binary_onnx/1/extra: not among those told of\nbinary_onnx/1/model.onnx: not there\n" in said
    assert "vit_onnx/config.pbtxt: sha256 is " in said
    assert "bpr_model" not in said


@pytest.mark.parametrize("text", ["", "{}", "[]", "no JSON"])
def test_a_file_that_is_no_provenance_is_refused(told: Project, text: str) -> None:
    (told.path / "told.json").write_text(text)
    assert "told.json: no provenance; expected what `make provenance > told.json` writes" in told.fail(
        "provenance", "CHECK=told.json"
    )
