"""The commands of the team's old guide, typed as written there, run make."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY, ROOT, Project

COMMANDS = {
    "cd convertation/vit && python torch2onnx.py": "make onnx MODEL=vit",
    "cd convertation/head && python torch2onnx.py": "make onnx MODEL=head",
    "cd convertation && sh run.sh": "make trt",
    "cd convertation/vit && sh convert2trt.sh": "make trt MODEL=vit",
    "cd convertation/head && sh convert2trt.sh": "make trt MODEL=head",
    "cd / && python {}/convertation/vit/torch2onnx.py": "make onnx MODEL=vit",
    "cd / && sh {}/convertation/head/convert2trt.sh": "make trt MODEL=head",
}


@pytest.mark.parametrize("python", ["/usr/bin/python3 -S", "/usr/bin/python3 -I", "/usr/bin/python3"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_guide_names_its_make_command_and_runs_it(tmp_path: Path, command: str, python: str) -> None:
    """With every Python, also one without packages."""
    shutil.copytree(ROOT / "convertation", tmp_path / "convertation")
    (tmp_path / "Makefile").write_text("onnx trt:\n\t@echo in $(CURDIR): make $@ $(addprefix MODEL=,$(MODEL))\n")
    typed = command.format(tmp_path).replace("python ", f"{python} ")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    run = subprocess.run(["bash", "-c", typed], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True)
    first, *_, last = run.stdout.splitlines()
    assert first.startswith(f"this is done by: {COMMANDS[command]}")
    assert last.strip() == f"in {tmp_path}: {COMMANDS[command]}"


def test_what_is_published_can_be_read_by_the_server_whatever_the_umask(stand_ins: Project) -> None:
    shutil.rmtree(stand_ins.path / REPOSITORY)
    shutil.rmtree(stand_ins.path / "build")
    shutil.rmtree(stand_ins.path / ".make/published")
    umask = os.umask(0o077)
    try:
        stand_ins.make("repository")
    finally:
        os.umask(umask)
    there = [stand_ins.path / REPOSITORY, *(stand_ins.path / REPOSITORY).rglob("*")]
    assert len(there) > 10
    for path in there:
        wanted = 0o555 if path.is_dir() else 0o444
        assert stat.S_IMODE(path.stat().st_mode) & wanted == wanted, path
