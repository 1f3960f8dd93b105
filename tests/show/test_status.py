"""`make status` tells exactly what `make repository` then runs, and runs nothing itself."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, Project, announced


def told(said: str, state: str) -> set[str]:
    """Return the files to which the output of `make status` gives this state."""
    return set(re.findall(rf"^{state} +(\S+)", said, re.MULTILINE))


def everything(project: Project) -> dict[str, tuple[int, bytes]]:
    """Return mtime and content of each file that a step or a publication could change."""
    tops = ["build", REPOSITORY, "training", ".make/made", ".make/took", ".make/published"]
    files = [path for top in tops for path in (project.path / top).rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def remove(*names: str) -> Callable[[Project], None]:
    def change(project: Project) -> None:
        for name in names:
            path = project.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def append(name: str) -> Callable[[Project], None]:
    return lambda project: project.append(name, "# a remark\n")


def together(*changes: Callable[[Project], None]) -> Callable[[Project], None]:
    def change(project: Project) -> None:
        for one in changes:
            one(project)

    return change


CHANGES = {
    "a script": append("convertation/head/mlp.py"),
    "an export script": append("convertation/head/torch2onnx.py"),
    "the YAML, a remark": append("convertation/models.yaml"),
    "the YAML, one model": lambda project: project.edit("convertation/models.yaml", "gelu", "leaky_relu"),
    "a knob": lambda project: project.edit("knobs.mk", "$(CT_OPSET),20", "$(CT_OPSET),19"),
    "a config": append("convertation/bpr/config.pbtxt"),
    "an intermediate altered": append("build/checks/binary.json"),
    "a check altered, its script changed": together(
        append("build/checks/vit.json"), append("scripts/convert/compare.py")
    ),
    "a published config altered": append(f"{REPOSITORY}/vit_onnx/config.pbtxt"),
    "a published ONNX deleted": remove(f"{REPOSITORY}/vit_onnx/1/model.onnx"),
    "the repository deleted": remove(REPOSITORY),
    "build deleted": remove("build"),
    "build deleted, a script": together(remove("build"), append("scripts/convert/compare.py")),
    "build deleted, the verdict": together(remove("build"), append("scripts/serve/verdict.py")),
    "everything deleted": remove("build", REPOSITORY, ".make/published"),
    "records deleted": remove(".make/took", ".make/made/build%onnx%vit.onnx"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_status_tells_exactly_what_runs(stand_ins: Project, change: Callable[[Project], None]) -> None:
    change(stand_ins)
    said = stand_ins.make("status")
    will, may = told(said, "will run"), told(said, "may run")
    made = stand_ins.make("repository")
    published = {word for line in made.splitlines() if line.startswith("published: ") for word in line.split()[1:]}
    assert will <= announced(made) | published <= will | may, said + made


@pytest.mark.parametrize("change", ["a script", "build deleted", "the repository deleted"])
def test_status_runs_nothing(stand_ins: Project, change: str) -> None:
    CHANGES[change](stand_ins)
    before = everything(stand_ins)
    stand_ins.make("status")
    assert everything(stand_ins) == before


def test_nothing_to_do_says_so(stand_ins: Project) -> None:
    assert stand_ins.make("status") == "nothing to do: 28 current\n"


def test_absent_files_with_a_valid_record_are_counted(stand_ins: Project) -> None:
    shutil.rmtree(stand_ins.path / "build/synthetic")
    assert stand_ins.make("status") == "nothing to do: 28 current, 5 of them absent with a valid record\n"


def test_each_line_says_why(stand_ins: Project) -> None:
    stand_ins.append("convertation/head/torch2onnx.py", "# a remark\n")
    shutil.rmtree(stand_ins.path / "build/synthetic/CT-RATE")
    lines = [line.split(maxsplit=3)[2:] for line in stand_ins.make("status").splitlines()[:-1]]
    assert ["build/synthetic/CT-RATE/model_binary.pth", "absent, needed for binary.onnx"] in lines
    assert ["build/onnx/binary.onnx", "torch2onnx.py changed"] in lines
    assert ["build/checks/binary.json", "behind binary.onnx"] in lines


def test_a_file_is_shown_with_everything_that_it_depends_on_and_nothing_else(stand_ins: Project) -> None:
    stand_ins.append("convertation/head/torch2onnx.py", "# a remark\n")
    said = stand_ins.make("status", "FILE=./build/onnx/binary.onnx")
    assert told(said, "will run") == {"build/onnx/binary.onnx"}
    assert "source    convertation/models.yaml" in said and "current   build/models/binary.json" in said
    assert "vit" not in said.replace("-vit", "")


def test_a_published_file_depends_on_its_model(stand_ins: Project) -> None:
    said = stand_ins.make("status", f"FILE={REPOSITORY}/binary_onnx/1/model.onnx")
    assert f"current  {REPOSITORY}/binary_onnx" in said and "convertation/head/binary.pbtxt" in said


def test_a_file_that_is_not_an_artifact_is_refused(stand_ins: Project) -> None:
    said = stand_ins.fail("status", "FILE=build/onnx/nothing.onnx")
    assert "build/onnx/nothing.onnx: not an artifact of this pipeline; expected one such as build/onnx/" in said


def test_a_missing_source_is_an_error_that_names_it(stand_ins: Project) -> None:
    (stand_ins.path / "scripts/convert/compare.py").unlink()
    assert "scripts/convert/compare.py" in stand_ins.fail("status")


def test_a_model_no_longer_built_will_be_taken_out(stand_ins: Project) -> None:
    stand_ins.make("repository", "WITH=lipro")
    assert f"will run  {REPOSITORY}/lipro_onnx  taken out, it is no longer built" in stand_ins.make("status")


# --- The archive and the user's own files -------------------------------------


def with_archive(project: Project) -> Project:
    """Put a stand-in archive and the user's own head into place."""
    shutil.rmtree(project.path / REPOSITORY)
    shutil.rmtree(project.path / ".make/published")
    lock = "257a4c075a4c2721970ffc7ef0380d0bf7329185de8f34ff9a6ac8336561c34c"  # of "zip\n"
    (project.path / "training/weights.zip").write_text("zip\n")
    (project.path / "training/weights.zip.lock.json").write_text(f'{{"size": 4, "sha256": "{lock}"}}')
    own = project.path / "training/weights/CT-RATE/model_binary.pth"
    own.parent.mkdir()
    own.write_text("mine")
    return project


@pytest.fixture
def archive(stand_ins: Project) -> Project:
    """A build from the archive and the user's own head; the archive has been deleted since."""
    with_archive(stand_ins).make("repository", "WEIGHTS=yandex")
    (stand_ins.path / "training/weights.zip").unlink()
    return stand_ins


def test_the_first_build_from_the_archive_is_told(stand_ins: Project) -> None:
    said = with_archive(stand_ins).make("status", "WEIGHTS=yandex")
    assert told(said, "local") == {"training/weights/CT-RATE/model_binary.pth"}
    assert "yours, used as it is, once compared with the archive's" in said
    will, may = told(said, "will run"), told(said, "may run")
    steps = stand_ins.steps("WEIGHTS=yandex")
    assert {name for name in will if REPOSITORY not in name} <= steps <= will | may | told(said, "local")


def test_the_users_own_checkpoint_is_shown_as_local(archive: Project) -> None:
    said = archive.make("status", "WEIGHTS=yandex")
    assert said.startswith("local  training/weights/CT-RATE/model_binary.pth  yours, used as it is\nnothing to do: ")
    (archive.path / "training/weights/CT-RATE/model_binary.pth").write_text("mine, trained longer")
    said = archive.make("status", "WEIGHTS=yandex")
    assert told(said, "will run") == {"build/onnx/binary.onnx", "build/checks/binary.json"}
    assert "model_binary.pth changed" in said


def test_the_archive_is_to_be_fetched_only_when_a_step_reads_it(archive: Project) -> None:
    archive.append("convertation/head/torch2onnx.py", "# a remark\n")
    assert "training/weights.zip" not in told(archive.make("status", "WEIGHTS=yandex"), "will run")
    (archive.path / "training/weights/CT-RATE/model_multilabel.pth").unlink()
    said = archive.make("status", "WEIGHTS=yandex")
    assert "training/weights.zip" in told(said, "will run")
    assert "absent, needed for model_multilabel.pth" in said


def test_the_viewers_need_no_environment(stand_ins: Project) -> None:
    shutil.rmtree(stand_ins.path / ".venv/bin")
    Path(stand_ins.path / "convertation/models.yaml").touch()
    assert "nothing to do" in stand_ins.make("status")
    done = subprocess.run(
        ["make", "WEIGHTS=synthetic", "help"], cwd=stand_ins.path, capture_output=True, text=True, check=True
    )
    assert "make status" in done.stdout


def test_ci_can_ask_whether_anything_is_stale(stand_ins: Project) -> None:
    assert "nothing to do" in stand_ins.make("status", "CHECK=1")
    stand_ins.append("convertation/head/mlp.py", "# a remark\n")
    assert "will run" in stand_ins.make("status")
    said = stand_ins.fail("status", "CHECK=1")
    assert "will run" in said and "Error 3" in said
