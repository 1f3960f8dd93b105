"""The real Makefile makes a published repository from two archives on a local Yandex.Disk, and does nothing twice.

Where networks do not matter, a stand-in for Python makes the ONNX files (see conftest); fetching is always real.
"""

import io
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PYTHON_STAND_IN, REPOSITORY, Project, announced, copy_of_the_project

from tests.yandex_disk_stand_in import LINK, PREFIX, YandexDisk

BINARY = "CT-RATE/model_binary.pth"
NEEDED = {
    name: f"content of {name}".encode() * 99
    for name in (
        "CT-RATE/ProjectionVIT_LiPro_V2.pt", BINARY, "CT-RATE/model_multilabel.pth", "bpr/model.pt",
        "bpr/inference-settings.json",
    )
}  # fmt: skip
FILES = NEEDED | {"CT-RATE/models/CT_LiPro_v2.pt": b"large", "faiss_database/all/index.faiss": b"index"}
STEPS_OF_BINARY = {"build/onnx/binary.onnx", "build/checks/binary.json", "build/checks/verdict.json"}
UNPACKED = {f"training/weights/{name}" for name in NEEDED}
ZIP, LOCK = "training/weights.zip", "training/weights.zip.lock.json"
PREBUILT = "training/model_repository_running.zip"


def zipped(files: dict[str, bytes], top: str = "") -> bytes:
    with zipfile.ZipFile(archive := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as content:
        for name, data in files.items():
            content.writestr(top + name, data)
    return archive.getvalue()


class Desk:
    """A project and the stand-in for Yandex.Disk that it downloads from."""

    def __init__(self, project: Project, disk: YandexDisk) -> None:
        self.project, self.path, self.disk = project, project.path, disk
        self.environment = {
            "YANDEX_DISK_API": disk.url + PREFIX, "YANDEX_DISK_LINK": LINK, "FETCH_BACKOFF": "0.01", "CI": "",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip

    def make(self, *args: str, **environment: str) -> str:
        self.disk.requests.clear()
        return self.project.make(*args, "WEIGHTS=yandex", **self.environment | environment)

    def fail(self, *args: str, **environment: str) -> str:
        self.disk.requests.clear()
        return self.project.fail(*args, "WEIGHTS=yandex", **self.environment | environment)

    def steps(self, *args: str) -> set[str]:
        return {step for step in announced(self.make("repository", *args)) if step != ZIP}

    def serve(self, files: dict[str, bytes], top: str = "") -> None:
        self.disk.files["/weights.zip"] = zipped(files, top)

    def unpacked(self) -> dict[str, bytes]:
        folder = self.path / "training/weights"
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in sorted(files.items()) if not name.startswith(".")}


@pytest.fixture
def desk(stand_ins: Project) -> Iterator[Desk]:
    """A project that has built nothing yet; everything but fetching and unpacking is a stand-in."""
    for folder in ("build", REPOSITORY, f".{REPOSITORY}", ".make/published", ".make/seen"):
        shutil.rmtree(stand_ins.path / folder, ignore_errors=True)
    for made in (stand_ins.path / ".make/made").iterdir():
        if not made.name.startswith(".venv"):
            made.unlink()
    for python in stand_ins.path.glob(".venv*/bin/python3.??"):
        real = "[[ $2 =~ ^scripts.(convert[.]model_entry|archives[.]fetch|archives[.]unpack|archives[.]update)$ ]]"
        python.write_text(PYTHON_STAND_IN.replace("[[ $2 == scripts.convert.model_entry ]]", real))
    with YandexDisk({"/weights.zip": zipped(FILES)}) as disk:
        yield Desk(stand_ins, disk)


@pytest.fixture
def ready(desk: Desk) -> Desk:
    """The project after its first `make repository`."""
    desk.make("repository")
    return desk


# --- weights.zip --------------------------------------------------------------


def test_the_first_make_downloads_locks_unpacks_what_it_needs_and_publishes(desk: Desk) -> None:
    said = desk.make("repository")
    assert "is up to date" not in said  # of what a make within make finds done
    assert desk.disk.kinds() == ["about", "address", "content"]
    assert json.loads((desk.path / LOCK).read_text())["sha256"] == desk.disk.describe("/weights.zip")["sha256"]
    assert f"{LOCK}: recorded" in said
    assert "nothing to download" not in said  # what was hashed as it came is not read once more
    assert desk.unpacked() == dict(sorted(NEEDED.items()))
    assert len(desk.project.published()) > 10
    assert (desk.path / f".make/published/{REPOSITORY}").read_text().startswith("real\n")


def test_the_second_make_runs_no_step_and_asks_nobody(ready: Desk) -> None:
    assert ready.steps() == set()
    assert ready.disk.kinds() == []


def test_without_the_archive_there_is_still_nothing_to_do(ready: Desk) -> None:
    (ready.path / ZIP).unlink()
    assert ready.steps() == set()
    ready.project.append("convertation/head/mlp.py", "# a remark\n")
    assert ready.steps() >= {"build/onnx/binary.onnx", "build/onnx/multilabel.onnx"}
    assert ready.disk.kinds() == [] and not (ready.path / ZIP).exists()


def test_what_is_needed_and_gone_is_downloaded_again(ready: Desk) -> None:
    (ready.path / ZIP).unlink()
    (ready.path / "training/weights" / BINARY).unlink()
    assert ready.steps() == set()
    ready.project.append("convertation/head/torch2onnx.py", "# a remark\n")
    ready.make("repository")
    assert ready.disk.kinds() == ["about", "address", "content"]
    assert ready.unpacked() == dict(sorted(NEEDED.items()))


def test_your_own_checkpoint_wins_and_is_named(desk: Desk) -> None:
    own = desk.path / "training/weights" / BINARY
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    assert f"local: training/weights/{BINARY}" in desk.make("repository")
    assert own.read_bytes() == b"mine"
    assert f"local: training/weights/{BINARY}" in desk.make("repository")
    assert desk.steps() == set()


def test_your_own_checkpoint_may_come_later(ready: Desk) -> None:
    own = ready.path / "training/weights" / BINARY
    own.write_bytes(b"mine")
    said = ready.make("repository")
    assert f"local: training/weights/{BINARY}" in said
    assert announced(said) == STEPS_OF_BINARY
    assert own.read_bytes() == b"mine" and ready.disk.kinds() == []


AGE = """
age:
  family: head
  checkpoint: CT-RATE/model_age.pth
  trained_on: LiPro
  network: {sizes: [24, 4], activation: gelu}
  input: [24]
  output: [4]
  batch: [1, 4, 8]
  tolerance: {output: 1e-5, served: 1e-5}
"""


def add_age(desk: Desk) -> None:
    """Add a head of the user's: an entry, a config.pbtxt, and a checkpoint that is in no archive."""
    desk.project.append("convertation/models.yaml", AGE)
    config = (desk.path / "convertation/head/binary.pbtxt").read_text().replace("binary", "age")
    (desk.path / "convertation/head/age.pbtxt").write_text(config)
    (desk.path / "training/weights/CT-RATE/model_age.pth").write_bytes(b"mine")


def test_a_new_head_of_your_own_needs_no_archive_to_have_it(ready: Desk) -> None:
    add_age(ready)
    said = ready.make("repository")
    assert "local: training/weights/CT-RATE/model_age.pth is yours, weights.zip has none; it is used" in said
    assert f"published: {REPOSITORY}/age_onnx\n" in said and ready.disk.kinds() == []
    assert ready.steps() == set()
    assert "local: training/weights/CT-RATE/model_age.pth is yours" in ready.make("repository")
    assert (ready.path / "training/weights/CT-RATE/model_age.pth").read_bytes() == b"mine"

    (ready.path / "training/weights/CT-RATE/model_age.pth").write_bytes(b"mine, trained on")
    assert announced(ready.make("repository")) >= {"build/onnx/age.onnx"}

    models = ready.path / "convertation/models.yaml"
    models.write_text(models.read_text().replace(AGE, ""))
    said = ready.make("repository")
    assert f"removed: {REPOSITORY}/age_onnx\n" in said and "published:" not in said
    assert not (ready.path / REPOSITORY / "age_onnx").exists()


def test_a_checkpoint_that_is_nowhere_is_told_with_files_that_may_be_meant(ready: Desk) -> None:
    add_age(ready)
    weights = ready.path / "training/weights/CT-RATE"
    (weights / "model_age.pth").rename(weights / "model_age.pt")
    said = ready.fail("repository")
    assert "weights.zip has no CT-RATE/model_age.pth; it holds" in said
    assert "training/weights/CT-RATE/model_age.pt is not read; if it is your own model: mv " in said


def test_a_head_without_a_config_is_told_what_to_type(ready: Desk) -> None:
    add_age(ready)
    (ready.path / "convertation/head/age.pbtxt").unlink()
    said = ready.fail("repository")
    assert "convertation/head/age.pbtxt is missing" in said
    assert "cp convertation/head/binary.pbtxt convertation/head/age.pbtxt" in said


@pytest.mark.parametrize("link", [BINARY, "CT-RATE", "../weights"])
def test_a_link_whose_target_is_away_stops_make(ready: Desk, link: str) -> None:
    """A file on a share that is not mounted is an own file, too: the archive's file does not replace it."""
    before, path = ready.project.published(), ready.path / "training/weights" / link
    path = path.parent.resolve() / path.name
    path.rename(path.with_name("moved"))
    path.symlink_to("/share/that/is/away")
    said = ready.fail("repository")
    assert f"{path.relative_to(ready.path)} is a link to /share/that/is/away, which is not there" in said
    assert path.is_symlink() and ready.project.published() == before


def test_a_new_archive_is_shown_then_accepted_and_rebuilds_only_what_changed(ready: Desk) -> None:
    old = ready.disk.describe("/weights.zip")["sha256"]
    assert "weights.zip: current" in ready.make("update")
    ready.serve(FILES | {BINARY: b"better"})
    new = ready.disk.describe("/weights.zip")["sha256"]
    said = ready.make("update")
    assert old in said and new in said and "make update ACCEPT=1" in said
    assert ready.steps() == set()  # nothing was taken by looking
    ready.make("update", "ACCEPT=1")
    assert ready.disk.kinds() == ["about"]
    times = {path: (ready.path / path).stat().st_mtime_ns for path in UNPACKED}
    assert ready.steps() == UNPACKED | STEPS_OF_BINARY  # each member is compared, and only one was another
    moved = {path for path in UNPACKED if (ready.path / path).stat().st_mtime_ns != times[path]}
    assert moved == {f"training/weights/{BINARY}"}
    assert ready.unpacked()[BINARY] == b"better"
    assert ready.steps() == set()


def test_another_archive_than_the_locked_one_is_an_error_that_names_both(ready: Desk) -> None:
    good, old = ready.project.published(), ready.disk.describe("/weights.zip")["sha256"]
    ready.serve(FILES | {BINARY: b"better"})
    (ready.path / ZIP).unlink()
    (ready.path / "training/weights" / BINARY).unlink()
    ready.project.append("convertation/head/torch2onnx.py", "# a remark\n")
    said = ready.fail("repository")
    assert old in said and ready.disk.describe("/weights.zip")["sha256"] in said
    assert "make update ACCEPT=1" in said
    assert ready.project.published() == good


def test_an_archive_fetched_by_hand_is_used_where_it_lies(desk: Desk, tmp_path: Path) -> None:
    given = tmp_path / "by-hand.zip"
    given.write_bytes(zipped(FILES))
    desk.disk.files.clear()
    desk.make("repository", f"WEIGHTS_ZIP={given}")
    assert "content" not in desk.disk.kinds()
    assert (desk.path / ZIP).resolve() == given
    assert desk.unpacked() == dict(sorted(NEEDED.items()))
    said = desk.make("repository", f"WEIGHTS_ZIP={given}")
    assert announced(said) == set() and "weights.zip" not in said  # not even read again
    assert desk.disk.kinds() == []


def test_an_archive_fetched_by_hand_has_to_be_the_locked_one(ready: Desk, tmp_path: Path) -> None:
    other = tmp_path / "an other.zip"
    other.write_bytes(zipped(FILES | {BINARY: b"better"}))
    assert f"{other}: weights.zip is not the one in {LOCK}" in ready.fail("repository", f"WEIGHTS_ZIP={other}")
    assert ready.steps() == set()


def test_ci_records_no_lock(desk: Desk) -> None:
    assert f"{LOCK} is missing, and CI records none" in desk.fail("repository", CI="true")
    assert desk.disk.kinds() == [] and not (desk.path / LOCK).exists()


@pytest.mark.parametrize("jobs", ["-j1", "-j4"])
def test_make_weights_unpacks_the_whole_tree_and_keeps_your_own(desk: Desk, jobs: str) -> None:
    own = desk.path / "training/weights" / BINARY
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    said = desk.make("weights", jobs)
    assert "is up to date" not in said
    assert desk.unpacked() == dict(sorted((FILES | {BINARY: b"mine"}).items()))
    assert f"local: training/weights/{BINARY}" in said and f"rm {ZIP} would free" in said
    assert desk.disk.kinds() == ["about", "address", "content"]
    (desk.path / ZIP).unlink()
    said = desk.make("repository")
    assert re.findall("local: (.*) is yours", said) == [f"training/weights/{BINARY}"]  # all others are the archive's


def test_the_tree_may_lie_in_one_more_folder(desk: Desk) -> None:
    desk.serve(FILES, "weights/")
    desk.make("repository")
    assert desk.unpacked() == dict(sorted(NEEDED.items()))
    desk.make("weights")
    assert desk.unpacked() == dict(sorted(FILES.items()))


def test_without_a_server_the_error_names_both_ways_out(desk: Desk) -> None:
    said = desk.fail("repository", YANDEX_DISK_API="http://127.0.0.1:9/v1")
    assert "make repository WEIGHTS_ZIP=/path/to/weights.zip" in said
    assert "make repository WEIGHTS=synthetic" in said


def test_an_unknown_origin_is_named(desk: Desk) -> None:
    assert "FROM=elsewhere: expected one of weights prebuilt" in desk.fail("repository", "FROM=elsewhere")


# --- model_repository_running.zip: networks and Triton are real ---------------


@pytest.fixture(scope="session")
def finished(built: Project) -> dict[str, bytes]:
    """What the tiny project has published."""
    return built.published()


def test_one_model_takes_its_own_checkpoint_alone(built: Project, tmp_path: Path) -> None:
    project = copy_of_the_project(tmp_path / "project")
    checkpoint = (built.path / "build/synthetic" / BINARY).read_bytes()
    with YandexDisk({"/weights.zip": zipped(FILES | {BINARY: checkpoint})}) as disk:
        desk = Desk(project, disk)
        desk.make("onnx", "MODEL=binary")
    assert desk.unpacked() == {BINARY: checkpoint}
    assert b"real" in (project.path / "build/onnx/binary.onnx").read_bytes()


@pytest.fixture
def copied(finished: dict[str, bytes], tmp_path: Path) -> Iterator[Desk]:
    """A fresh project, whose Yandex.Disk has the finished repository."""
    project = copy_of_the_project(tmp_path / "project")
    with YandexDisk({"/model_repository_running.zip": zipped(finished)}) as disk:
        yield Desk(project, disk)
    shutil.rmtree(project.path)


def test_a_finished_repository_is_judged_then_published_and_then_left_alone(
    copied: Desk, finished: dict[str, bytes]
) -> None:
    said = copied.make("repository", "FROM=prebuilt")
    assert copied.disk.kinds() == ["about", "address", "content"]
    for model in ("vit_onnx", "binary_onnx", "multilabel_onnx"):
        assert f"{model}: READY, answers within" in said
    assert "bpr_model: READY, says CHEST" in said
    assert copied.project.published() == finished
    assert not (copied.path / "build/prebuilt").exists()  # no second copy of it is kept

    copied.disk.files.clear()
    (copied.path / PREBUILT).unlink()
    shutil.rmtree(copied.path / "build")
    said = copied.make("repository", "FROM=prebuilt")
    assert "up to date" in said and copied.disk.kinds() == [] and "READY" not in said


def test_a_harmed_file_of_it_is_put_back_without_another_verdict(copied: Desk, finished: dict[str, bytes]) -> None:
    copied.make("repository", "FROM=prebuilt")
    for name in ("binary_onnx/1/model.onnx", "bpr_model/1/bpreg/tag.py"):
        with (copied.path / REPOSITORY / name).open("ab") as file:
            file.write(b"harm")
    said = copied.make("repository", "FROM=prebuilt")
    assert f"published: {REPOSITORY}/binary_onnx {REPOSITORY}/bpr_model" in said and "READY" not in said
    assert copied.project.published() == finished
    assert "up to date" in copied.make("repository", "FROM=prebuilt")
    assert "is made from prebuilt weights and these are real" in copied.fail("repository")


def test_a_new_archive_replaces_what_differs_and_a_bad_one_nothing(copied: Desk, finished: dict[str, bytes]) -> None:
    copied.make("repository", "FROM=prebuilt")
    config = "binary_onnx/config.pbtxt"
    broken = finished | {config: finished[config].replace(b"TYPE_FP32", b"TYPE_FP16")}
    copied.disk.files["/model_repository_running.zip"] = zipped(broken, "model_repository_running/")
    copied.make("update", "ACCEPT=1")
    said = copied.fail("repository", "FROM=prebuilt")
    assert f"{config}: client's contract, input 'input'" in said and "nothing was published" in said
    assert copied.project.published() == finished

    kind = finished[config].replace(b"KIND_AUTO", b"KIND_GPU")
    assert kind != finished[config]
    copied.disk.files["/model_repository_running.zip"] = zipped(finished | {config: kind}, "model_repository_running/")
    copied.make("update", "ACCEPT=1")
    said = copied.fail("repository", "FROM=prebuilt")
    assert "binary_onnx: not served here: its config.pbtxt says KIND_GPU" in said
    assert "make repository FROM=prebuilt ACCEPT=unserved" in said
    assert copied.project.published() == finished

    said = copied.make("repository", "FROM=prebuilt", "ACCEPT=unserved")
    assert f"published: {REPOSITORY}/binary_onnx\n" in said
    assert copied.project.published() == finished | {config: kind}
    assert "up to date" in copied.make("repository", "FROM=prebuilt")  # what was accepted stays so
    assert "rolled back" in copied.make("rollback")
    assert copied.project.published() == finished


def test_a_finished_repository_fetched_by_hand_is_used_where_it_lies(
    copied: Desk, finished: dict[str, bytes], tmp_path: Path
) -> None:
    given = tmp_path / "finished.zip"
    given.write_bytes(zipped({**finished, "README.txt": b"hello", "bpr_model/1/__pycache__/model.pyc": b"old"}))
    copied.disk.files.clear()
    said = copied.make("repository", "FROM=prebuilt", f"REPOSITORY_ZIP={given}")
    assert f"{PREBUILT}: a link to {given}" in said
    assert copied.project.published() == finished


def test_your_own_models_are_never_replaced(copied: Desk) -> None:
    own = copied.path / REPOSITORY / "binary_onnx/config.pbtxt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert "was not made by this build; move it away" in copied.fail("repository", "FROM=prebuilt")
    assert own.read_text() == "mine" and copied.disk.kinds() == []
