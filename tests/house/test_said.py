"""What make says in difficult places: full disks, missing locks, a closed output, a folder instead of a file."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Project

from scripts.plans import doctor


def run_without_reader(project: Project, target: str) -> str:
    """Return make's standard error when nobody reads its standard output any more, as after `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        ["make", "WEIGHTS=synthetic", *target.split()],
        cwd=project.path,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    return run.stderr


@pytest.fixture
def small_disk(stand_ins: Project, tmp_path: Path) -> Iterator[Project]:
    """The project on a tmpfs of its own with 1 MB free."""
    place = tmp_path / "disk"
    place.mkdir()
    used = sum(path.stat().st_size + 8192 for path in stand_ins.path.rglob("*") if not path.is_symlink())
    options = f"size={used + (1 << 20)}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here (only root may)")
    try:
        shutil.copytree(stand_ins.path, place / "project", copy_function=shutil.copy)
        yield Project(place / "project")
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(project: Project) -> None:
    with pytest.raises(OSError, match="No space"), (project.path.parent / "fill").open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)


def test_a_full_disk_is_named_and_the_doctor_still_runs(small_disk: Project) -> None:
    fill(small_disk)
    said = small_disk.fail("status")
    assert "None" not in said
    assert ".make/seen/" in said and ": No space left on device; nothing was made" in said
    said = small_disk.fail("doctor")
    assert "lacking  checkout: No space left on device" in said
    assert "lacking  disk" in said


def test_the_doctor_names_a_checkout_that_cannot_be_written(small_disk: Project) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk.path.parent], check=True)
    assert "lacking  checkout: Read-only file system" in small_disk.fail("doctor")


def test_a_share_without_locks_is_named(stand_ins: Project) -> None:
    stand_ins.edit(
        "scripts/steps/records.py", "fcntl.flock(file, kind | fcntl.LOCK_NB)", "raise OSError(37, 'No locks available')"
    )
    said = stand_ins.fail("repository")
    assert ".make/lock/publish: No locks available; nothing was made" in said
    assert "make doctor tells what helps" in said


def test_the_doctor_tells_of_a_share_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def no_locks(*words: object) -> None:
        raise OSError(37, "No locks available")

    assert doctor.check_checkout().todo == ""
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert doctor.check_checkout().found == "No locks available"
    assert "local_lock=flock" in doctor.check_checkout().todo
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "target", ["help", "status", "status FILE=build/onnx/vit.onnx", "provenance", "graph", "doctor"]
)
def test_a_closed_output_causes_no_error_message(stand_ins: Project, target: str) -> None:
    noise = run_without_reader(stand_ins, target)
    assert noise == "" or (target == "doctor" and "doctor] Error 1" in noise and len(noise.splitlines()) == 1)


def test_a_build_goes_on_when_nobody_reads_its_output(stand_ins: Project) -> None:
    stand_ins.append("convertation/head/mlp.py", "# a remark\n")
    stand_ins.append("convertation/head/binary.pbtxt", "# a remark\n")
    assert run_without_reader(stand_ins, "repository") == ""
    assert stand_ins.published()["binary_onnx/config.pbtxt"].endswith(b"# a remark\n")
    assert run_without_reader(stand_ins, "rollback") == ""
    assert not stand_ins.published()["binary_onnx/config.pbtxt"].endswith(b"# a remark\n")


@pytest.mark.parametrize("name", ["build", "VERSION", "absent.json"])
def test_a_file_that_is_no_provenance_is_refused_in_one_sentence(stand_ins: Project, name: str) -> None:
    said = stand_ins.fail("provenance", f"CHECK={name}")
    assert f"{name}: no provenance; expected what `make provenance > " in said


@pytest.mark.parametrize("target", ["help", "repository", "onnx"])
def test_a_makefile_called_from_elsewhere_names_the_command(stand_ins: Project, tmp_path: Path, target: str) -> None:
    run = subprocess.run(
        ["make", "-f", stand_ins.path / "Makefile", target], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert f"*** make works in the project's folder; make -C {stand_ins.path} {target}.  Stop." in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_a_missing_image_is_named_with_the_command_to_type(tmp_path: Path, docker_engine: None) -> None:
    code = (
        "from pathlib import Path; from scripts.serve.triton_server import triton_server\n"
        "with triton_server(Path('.'), Path('log'), image='registry.invalid/absent:1'): pass"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr == (
        "registry.invalid/absent:1 is not here; docker pull registry.invalid/absent:1, "
        "or without a network: docker load --input FILE\n"
    )
