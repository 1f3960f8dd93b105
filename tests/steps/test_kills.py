"""Kills and races: whatever ends a make, the next one completes it. The real Makefile, a stand-in for Python."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
from conftest import Project, kill


def test_fifty_kills_do_no_harm(stand_ins: Project) -> None:
    chance = random.Random(7)
    names = stand_ins.published().keys()
    configs = ("binary_onnx", "multilabel_onnx", "bpr_model")
    for turn in range(50):
        for config in ("head/binary", "head/multilabel", "bpr/config"):
            stand_ins.append(f"convertation/{config}.pbtxt", f"# mark {turn}\n")
        stand_ins.append("convertation/head/mlp.py", f"# mark {turn}\n")
        run = stand_ins.start("repository", "-j2", SLOW="0.01")
        time.sleep(chance.uniform(0, 1.2))
        kill(run)
        assert stand_ins.published().keys() == names  # whatever has been done, each model is there
        stand_ins.make("status")  # any make finishes a publication that was cut short
        published = stand_ins.published()
        assert published.keys() == names
        marks = {tuple(published[f"{model}/config.pbtxt"].split(b"# mark ")[1:]) for model in configs}
        assert len(marks) == 1  # a set that was judged together
    stand_ins.make("repository")
    assert stand_ins.steps() == set()
    assert stand_ins.published()["binary_onnx/config.pbtxt"].endswith(b"# mark 49\n")


def content(folder: Path) -> dict[str, bytes]:
    """Return name and content of each file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def in_a_new_upper_layer(folder: Path) -> Iterator[None]:
    """Put what is in `folder` into a lower layer of overlayfs meanwhile, as in an image that holds a checkout."""
    layers = Path(f"{folder}.layers")
    shutil.copytree(folder, layers / "lower", dirs_exist_ok=True)
    layers.joinpath("top").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", layers / "top"], check=False)  # an overlay is no upper layer
    for name in "upper", "work":
        (layers / "top" / name).mkdir()
    options = f"lowerdir={layers}/lower,upperdir={layers}/top/upper,workdir={layers}/top/work"
    command = ["mount", "-t", "overlay", "overlay", "-o", options, folder]
    try:
        if (mounted := subprocess.run(command, capture_output=True, text=True)).returncode:
            pytest.skip(f"overlayfs cannot be mounted here: {mounted.stderr.strip()}")
        yield
        shutil.copytree(folder, layers / "merged")
        subprocess.run(["umount", folder], check=True)
        shutil.rmtree(folder)
        shutil.copytree(layers / "merged", folder)
    finally:
        subprocess.run(["umount", folder], check=False, capture_output=True)
        subprocess.run(["umount", layers / "top"], check=False, capture_output=True)
        shutil.rmtree(layers)


# Where the models are: their folders change places; each file is copied first; the folders themselves are, too
PLACES: dict[str, tuple[str, Callable[[Path], AbstractContextManager[None]]]] = {
    "same disk": ("published", lambda folder: nullcontext()),
    "another disk": ("/dev/shm/test-kills", lambda folder: nullcontext()),
    "a lower layer": ("published", in_a_new_upper_layer),
}


@pytest.mark.parametrize("where", PLACES)
def test_after_ten_kills_in_any_place_all_is_as_a_clean_build_makes_it(
    where: str, stand_ins: Project, built_by_stand_ins: Project, tmp_path: Path
) -> None:
    """Kill at random moments: some in steps, some after the verdict, where journal, copies and exchange are."""
    name, layer = PLACES[where]
    folder = stand_ins.path.joinpath(name) if where != "another disk" else Path(f"{name}-{os.getpid()}")
    here = f"REPOSITORY={folder}/m"
    chance = random.Random(where)
    clean = Project(tmp_path / "clean")
    shutil.copytree(built_by_stand_ins.path, clean.path, copy_function=shutil.copy)
    try:
        stand_ins.make("repository", here)
        names = content(folder / "m").keys()
        if where == "another disk" and folder.stat().st_dev == stand_ins.path.stat().st_dev:
            pytest.skip("/dev/shm is no disk apart from that of the tests")
        for turn in range(10):
            for project in (stand_ins, clean):
                for config in ("head/binary", "head/multilabel", "bpr/config"):
                    project.append(f"convertation/{config}.pbtxt", f"# mark {turn}\n")
                project.append("convertation/head/mlp.py", f"# mark {turn}\n")
            with layer(folder):
                run = stand_ins.start("repository", "-j2", here, SLOW="0.01")
                if turn % 2:
                    assert run.stdout and any("verdict.json: " in line for line in run.stdout)
                time.sleep(chance.uniform(0, 0.3 if turn % 2 else 1.2))
                kill(run)
                assert content(folder / "m").keys() <= names
                stand_ins.make("repository" if turn % 3 == 2 else "status", here)
                assert content(folder / "m").keys() == names
        stand_ins.make("repository", here)
        assert stand_ins.steps(here) == set()
        shutil.rmtree(clean.path / "build")
        for record in (clean.path / ".make/made").iterdir():
            if not record.name.startswith(".venv"):
                record.unlink()
        clean.make("repository")
        assert content(folder / "m") == clean.published()
        assert {path.name for path in folder.iterdir()} <= {"m", ".m"}  # .m: the earlier models, for a rollback
        assert {path.name for path in (folder / ".m").iterdir()} <= {"previous", "harmed"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_two_at_once_run_each_step_once(stand_ins: Project) -> None:
    stand_ins.append("convertation/models.yaml", "# a remark\n")
    stand_ins.edit("knobs.mk", "$(CT_OPSET),20", "$(CT_OPSET),19")
    runs = [stand_ins.start("repository", "-j2", SLOW="0.3") for _ in range(2)]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    both = [line for text in said for line in text.splitlines() if line.startswith("build/") and "waiting" not in line]
    assert len(both) == len(set(both))
    assert "waiting for another make" in said[0] + said[1]
    assert stand_ins.steps() == set()


def test_parallel_and_serial_builds_publish_the_same_bytes(stand_ins: Project) -> None:
    good = stand_ins.published()
    shutil.rmtree(stand_ins.path / "build")
    shutil.rmtree(stand_ins.path / ".make/made")
    for record in (Path(__file__).parents[2] / ".make/made").glob(".venv*"):
        (stand_ins.path / ".make/made").mkdir(exist_ok=True)
        shutil.copy(record, stand_ins.path / ".make/made")
    stand_ins.make("repository", "-j4")
    assert stand_ins.published() == good
