"""If a step fails, or models.yaml has a mistake, or the disk is full, the published repository stays as it was."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY, Project


@pytest.mark.parametrize(
    "step",
    ["scripts.convert.synthesize", "convertation.head.torch2onnx", "scripts.convert.compare", "scripts.serve.verdict"],
)
def test_a_step_that_fails_leaves_the_published_set(stand_ins: Project, step: str) -> None:
    """For any reason: no free port, a server that dies, a difference beyond the tolerance."""
    good = stand_ins.published()
    python = next((stand_ins.path / ".venv/bin").iterdir())
    works = python.read_text()
    python.write_text(works.replace("sleep", f'if [[ $2 == {step} ]]; then echo "the reason" >&2; exit 3; fi\nsleep'))
    stand_ins.edit("convertation/models.yaml", "gelu", "leaky_relu")
    stand_ins.append("convertation/head/multilabel.pbtxt", "# newer\n")

    said = stand_ins.fail("repository", "-k")

    assert "the reason" in said and "was not made, what was there before stays" in said
    assert stand_ins.published() == good
    assert "not made" in stand_ins.fail("repository")
    python.write_text(works)
    stand_ins.make("repository")
    assert stand_ins.published()["binary_onnx/1/model.onnx"] != good["binary_onnx/1/model.onnx"]


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("family: head", "family: heads", "unknown family heads; expected one of vit, head, bpr"),
        ("trained_on: LiPro", "trained: LiPro", "unknown key trained"),
        ("batch:\n  - 1\n", "batch:\n  - one\n", "input, output and batch hold whole numbers above 0"),
        ("  family: vit\n", "  family: vit\n :\n", "no valid YAML"),
    ],
    ids=["family", "key", "type", "syntax"],
)
def test_a_mistake_in_models_yaml_is_named(stand_ins: Project, old: str, new: str, expected: str) -> None:
    good = stand_ins.published()
    stand_ins.edit("convertation/models.yaml", old, new)
    said = stand_ins.fail("repository")
    assert "convertation/models.yaml" in said and expected in said
    assert stand_ins.published() == good


def test_a_full_disk_leaves_the_published_set(stand_ins: Project, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk to fill cannot be mounted here: {mounted.stderr.strip()}")
    try:
        project = Project(disk / "project")
        for name in ("build", ".model_repository_running"):
            shutil.rmtree(stand_ins.path / name, ignore_errors=True)
        shutil.copytree(stand_ins.path, project.path, copy_function=shutil.copy)
        good = project.published()
        project.append("convertation/head/mlp.py", "# a remark\n")
        project.append("convertation/head/binary.pbtxt", "# newer\n")
        room = disk / "room"
        with room.open("wb", buffering=0) as file, contextlib.suppress(OSError):  # until the disk is full
            while file.write(bytes(4096)):
                pass
        assert "make repository" in project.make("help")
        for free in (0, 4096, 20480, 61440):
            os.truncate(room, room.stat().st_size - free)
            said = project.start("repository").communicate()[0]
            if f"published: {REPOSITORY}" in said:
                break
            assert "No space left on device" in said, said
            assert "Traceback" not in said, said
            assert project.published() == good
        room.unlink()
        project.make("repository")
        assert project.published()["binary_onnx/config.pbtxt"].endswith(b"# newer\n")
        assert "up to date" in project.make("repository")
    finally:
        subprocess.run(["umount", disk], check=True)
