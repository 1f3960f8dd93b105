"""What `make repository` rebuilds and leaves alone: the real Makefile, with a stand-in for Python (see conftest)."""

import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, Project, announced, copy_of_the_project, kill

BINARY = {"build/onnx/binary.onnx", "build/checks/binary.json", "build/checks/verdict.json"}


def forge(path: Path) -> None:
    """Change one byte; size and mtime stay."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


HARM = pytest.mark.parametrize("harm", [Path.unlink, truncate, forge], ids=["deleted", "truncated", "one byte altered"])


# --- Nothing to do ------------------------------------------------------------


def test_a_second_make_runs_no_step_and_needs_no_environment(stand_ins: Project) -> None:
    shutil.rmtree(stand_ins.path / ".venv")
    shutil.rmtree(stand_ins.path / ".venv-triton")
    assert "up to date" in stand_ins.make("repository")


def test_touching_everything_rebuilds_nothing(stand_ins: Project) -> None:
    for path in stand_ins.path.rglob("*"):
        path.touch()
    assert stand_ins.steps() == set()


def test_a_cache_of_records_and_repository_is_enough(stand_ins: Project, tmp_path: Path) -> None:
    """CI restores these by tar after a clone: no checkpoints, no intermediate files, no environments."""
    clone = tmp_path / "elsewhere/clone"
    clone.mkdir(parents=True)
    for name in (
        "Makefile",
        "knobs.mk",
        "artifacts.mk",
        "VERSION",
        *(path.name for path in stand_ins.path.glob("requirements*")),
        "scripts",
        "convertation",
        "docker",
        "training",
    ):
        copy = shutil.copytree if (stand_ins.path / name).is_dir() else shutil.copyfile
        copy(stand_ins.path / name, clone / name)
    for script in clone.glob("scripts/*/*.sh"):
        script.chmod(0o755)
    tar = subprocess.Popen(["tar", "c", ".make", REPOSITORY], cwd=stand_ins.path, stdout=subprocess.PIPE)
    subprocess.run(["tar", "xm", "--no-same-owner"], cwd=clone, stdin=tar.stdout, check=True)
    tar.wait()
    assert Project(clone).steps() == set()
    assert not (clone / "build").exists()


# --- Exactly what depends on a change -----------------------------------------


ALL = ("vit", "binary", "multilabel", "bpr")
CHECKS = {f"build/checks/{name}.json" for name in ALL}
ONNX = {f"build/onnx/{name}.onnx" for name in ALL}
VERDICT = "build/checks/verdict.json"
ENTRY = {"build/models/binary.json", "build/synthetic/CT-RATE/model_binary.pth"}


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        pytest.param("convertation/models.yaml", "gelu", "leaky_relu", ENTRY | BINARY, id="one model's entry"),
        pytest.param("requirements.txt", "requests==", "requests==1.", set(), id="a pin that shapes nothing"),
        pytest.param("requirements.txt", "runtime-gpu==", "runtime-gpu==1.", CHECKS, id="the comparison's pin"),
        pytest.param("knobs.mk", "$(CT_OPSET),20", "$(CT_OPSET),19", ONNX | CHECKS | {VERDICT}, id="a knob"),
        pytest.param("convertation/head/binary.pbtxt", "size: 8", "size: 4", {VERDICT}, id="a config.pbtxt"),
    ],
)
def test_a_change_reaches_just_what_depends_on_it(
    stand_ins: Project, file: str, old: str, new: str, expected: set[str]
) -> None:
    stand_ins.edit(file, old, new)
    made = {path for path in stand_ins.steps() if not path.startswith(".venv")}
    identical = {path for path in made - expected if path.startswith("build/models/")}  # read again, came out the same
    assert made - identical == expected
    assert stand_ins.steps() == set()


def test_a_tolerance_reaches_only_the_checks(stand_ins: Project) -> None:
    models = stand_ins.path / "convertation/models.yaml"
    models.write_text(models.read_text().replace("1.0e-05", "1.0e-06", 1))
    made = stand_ins.steps()
    assert not [path for path in made if "onnx" in path or "synthetic" in path]


def test_a_comment_in_an_export_script_stops_at_the_identical_file(stand_ins: Project) -> None:
    before = {path: path.stat().st_mtime_ns for path in (stand_ins.path / REPOSITORY).rglob("*")}
    stand_ins.append("convertation/head/torch2onnx.py", "# a remark\n")
    assert stand_ins.steps() >= {"build/onnx/binary.onnx", "build/onnx/multilabel.onnx"}
    assert not (stand_ins.path / "build/onnx/binary.onnx").exists()  # it is published, and exists once
    assert {path: path.stat().st_mtime_ns for path in (stand_ins.path / REPOSITORY).rglob("*")} == before


def test_each_step_says_why_it_runs(stand_ins: Project) -> None:
    stand_ins.append("convertation/head/mlp.py", "# a remark\n")
    assert "build/onnx/binary.onnx: mlp.py changed\n" in stand_ins.make("repository")


def test_an_edit_while_its_step_runs_is_not_lost(stand_ins: Project) -> None:
    config = stand_ins.path / "convertation/head/binary.pbtxt"
    config.write_text(config.read_text() + "# one\n")
    run = stand_ins.start("repository", SLOW="1")
    assert run.stdout and run.stdout.readline()
    config.write_text(config.read_text() + "# two\n")
    run.communicate()
    stand_ins.make("repository")
    assert stand_ins.published()["binary_onnx/config.pbtxt"] == config.read_bytes()


def test_verify_takes_the_kind_of_weights_from_the_repository(stand_ins: Project) -> None:
    stand_ins.make("clean")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    run = subprocess.run(["make", "verify"], cwd=stand_ins.path, env=clean, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert "build/synthetic/CT-RATE/model_binary.pth: absent" in run.stdout


# --- Harm ---------------------------------------------------------------------


@HARM
@pytest.mark.parametrize("name", ["binary_onnx/1/model.onnx", "vit_onnx/config.pbtxt", "bpr_model/1/model.py"])
def test_a_harmed_published_file_is_made_again(stand_ins: Project, name: str, harm: Callable[[Path], None]) -> None:
    good = stand_ins.published()
    stand_ins.make("repository")
    harm(stand_ins.path / REPOSITORY / name)
    assert f"published: {REPOSITORY}/{name.partition('/')[0]}" in stand_ins.make("repository")
    assert stand_ins.published() == good


@HARM
def test_a_harmed_intermediate_is_made_again_where_it_is_present(
    stand_ins: Project, harm: Callable[[Path], None]
) -> None:
    stand_ins.make("repository")
    harm(stand_ins.path / "build/checks/binary.json")
    made = stand_ins.steps()
    assert made == (set() if harm is Path.unlink else {"build/checks/binary.json"})  # absent, but vouched for


def test_an_older_published_file_is_replaced(stand_ins: Project) -> None:
    old = stand_ins.published()["binary_onnx/config.pbtxt"]
    stand_ins.append("convertation/head/binary.pbtxt", "# newer\n")
    stand_ins.make("repository")
    new = stand_ins.published()
    (stand_ins.path / REPOSITORY / "binary_onnx/config.pbtxt").write_bytes(old)
    stand_ins.make("repository")
    assert stand_ins.published() == new


@pytest.mark.parametrize(
    "name",
    [
        "convertation/head/torch2onnx.py",
        "convertation/head/binary.pbtxt",
        "convertation/models.yaml",
        "scripts/convert/compare.py",
        "scripts/serve/verdict.py",
    ],
)
def test_a_missing_source_is_an_error_that_names_it(stand_ins: Project, name: str) -> None:
    good = stand_ins.published()
    (stand_ins.path / name).unlink()
    assert name in stand_ins.fail("repository")
    assert stand_ins.published() == good


@pytest.mark.parametrize("kind", ["made", "seen"])
@pytest.mark.parametrize("harm", [truncate, lambda path: path.write_text("")], ids=["truncated", "emptied"])
def test_harmed_records_end_right(stand_ins: Project, kind: str, harm: Callable[[Path], None]) -> None:
    good = stand_ins.published()
    for record in (stand_ins.path / ".make" / kind).iterdir():
        harm(record)
    stand_ins.make("repository")
    assert stand_ins.published() == good
    assert stand_ins.steps() == set()


def test_what_is_absent_is_made_once_a_step_needs_it(stand_ins: Project) -> None:
    shutil.rmtree(stand_ins.path / "build")
    stand_ins.append("scripts/convert/compare.py", "# a remark\n")
    made = stand_ins.steps()
    assert {"build/checks/binary.json", "build/synthetic/CT-RATE/model_binary.pth"} <= made
    assert stand_ins.steps() == set()


# --- Dry runs and other company -------------------------------------------------


def test_a_dry_run_makes_nothing(stand_ins: Project) -> None:
    stand_ins.append("convertation/head/mlp.py", "# a remark\n")
    before = stand_ins.published()
    said = stand_ins.make("-n", "repository")
    assert announced(said) == set() and stand_ins.published() == before
    assert "  build/onnx/binary.onnx: mlp.py changed\n" in said


def test_a_dry_run_publishes_and_downloads_nothing(stand_ins: Project) -> None:
    stand_ins.append("convertation/head/binary.pbtxt", "# a remark\n")
    before = stand_ins.published()
    said = stand_ins.make("-n", "repository")
    assert "-m scripts.publish.publish model_repository_running --weights synthetic" in said
    assert announced(said) == set() and stand_ins.published() == before

    said = stand_ins.make("-n", "weights", WEIGHTS="yandex")
    assert "-m scripts.archives.fetch  weights.zip training/weights.zip" in said


def test_a_dry_run_without_an_environment_installs_nothing(tmp_path: Path) -> None:
    fresh = copy_of_the_project(tmp_path)
    (fresh.path / ".venv").unlink()
    assert "make -n installs nothing" in (said := fresh.fail("-n", "repository"))
    assert "first make .venv/installed" in said
    assert not (fresh.path / ".venv").exists()


def test_the_repository_is_replaced_while_it_is_served(project: Project) -> None:
    """With tiny networks and the real Triton: the server goes on with the models that it has loaded."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = " ".join(str(each.getsockname()[1]) for each in sockets)
    for each in sockets:
        each.close()
    server = project.start("serve", f"PORTS={ports}")
    try:
        assert server.stdout
        said = ""
        while not said.startswith("READY"):
            said = server.stdout.readline()
            assert said
        project.append("convertation/head/binary.pbtxt", "# newer\n")
        assert f"published: {REPOSITORY}/binary_onnx" in project.make("repository")
        assert server.poll() is None
    finally:
        kill(server)


@pytest.mark.parametrize("folder", [".venv-rtx", ".venv-prebuilt", ".venv-compare"])
def test_an_environment_that_few_need_is_forgotten_once_its_python_went_away(stand_ins: Project, folder: str) -> None:
    here = stand_ins.path / folder
    (here / "bin").mkdir(parents=True)
    (here / "bin/python3.11").symlink_to("/nowhere/python3.11")
    (mark := here / ("installed" if folder == ".venv-rtx" else "requirements.txt")).touch()
    judged = stand_ins.path / ".make/made/training%model_repository_running.zip.verdict.json"
    judged.touch()
    assert f"{folder}: its Python went away (/nowhere/python3.11); it is made again" in stand_ins.make("status")
    assert not mark.exists()
    assert judged.exists() == (folder != ".venv-prebuilt")
    assert "its Python went away" not in stand_ins.make("status")


def test_an_environment_whose_python_went_away_is_made_anew_by_the_step_that_needs_it(stand_ins: Project) -> None:
    bin_, python = stand_ins.path / ".venv/bin", next((stand_ins.path / ".venv/bin").iterdir())
    python.unlink()
    python.symlink_to("/nowhere/python3.11")
    said = stand_ins.make("repository")
    assert ".venv: its Python went away (/nowhere/python3.11); it is made again when a step needs it" in said
    assert "up to date" in said
    stand_ins.edit(
        "scripts/steps/venv.sh",
        '"$python" -m venv --clear "$folder"',
        'cp "$STAND_IN" "$folder/bin/python$version" --remove-destination',
    )
    stand_ins.append("convertation/head/torch2onnx.py", "# a remark\n")
    stand_in = next((stand_ins.path / ".venv-inference/bin").iterdir())
    said = stand_ins.make("repository", STAND_IN=str(stand_in))
    assert announced(said) >= {".venv/installed", "build/onnx/binary.onnx"}
    assert not next(bin_.iterdir()).is_symlink()
