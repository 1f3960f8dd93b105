"""publish.py changes each model atomically, also if it is killed, and replaces only what was published from here."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.publish import publish
from scripts.steps import before_make, records, swap

SCRIPTS = Path(__file__).parents[2] / "scripts"
REPOSITORY = "repository"
BESIDE = Path(".repository")
VERDICT = "build/checks/verdict.json"
# model -> the mark in its files; "changed" differs, "same" does not, "dropped" leaves, "added" comes
OLD = {"changed": "old", "same": "old", "dropped": "old"}
NEW = {"changed": "new", "same": "old", "added": "new"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh folder to work in; no wait for young files, because nothing here changes a file in place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "SETTLED", 0)
    yield tmp_path
    os.chdir("/")  # a child of a killed test may have left


@pytest.fixture
def ready(place: Path) -> Path:
    """A folder where OLD is published, and NEW is built and has its verdict."""
    publish_set(OLD)
    build(NEW)
    return place


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot exchange folders, such as 9p or some of NFS."""

    def refuse(one: str, other: str) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(swap, "exchange_folders", refuse)


def sources(models: dict[str, str]) -> dict[str, str]:
    """Return FILE=SOURCE of a set."""
    return {f"{model}/config.pbtxt": f"configs/{model}.pbtxt" for model in models} | {
        f"{model}/1/model.onnx": f"build/onnx/{model}.onnx" for model in models
    }


def build(models: dict[str, str]) -> None:
    """Write the sources of `models`, the records of their steps, and a verdict on the set."""
    for path, source in sources(models).items():
        model, _, kind = path.partition("/")
        Path(source).parent.mkdir(parents=True, exist_ok=True)
        Path(source).write_text(f"{kind} of {model}: {models[model]}\n")
        if source.startswith("build/"):
            records.write_text(
                records.record_path("made", source), f"{source}={records.current_digest(source)} export : "
            )
    Path(VERDICT).parent.mkdir(parents=True, exist_ok=True)
    Path(VERDICT).write_text("good\n")
    judged = " ".join(f"{source}={records.current_digest(source)}" for source in sources(models).values())
    records.write_text(
        records.record_path("made", VERDICT), f"{VERDICT}={records.current_digest(VERDICT)} verdict : {judged}"
    )


def publish_set(models: dict[str, str], where: str = REPOSITORY, weights: str = "real") -> None:
    build(models)
    publish.publish_models(where, weights, VERDICT, sources(models))


def present(repository: str = REPOSITORY) -> dict[str, str]:
    """Return each model in the repository with its mark; "broken" if its files are not of one set."""
    marks = {}
    for folder in sorted(Path(repository).iterdir()) if Path(repository).exists() else []:
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        texts = {path.read_text().rpartition(": ")[2].strip() for path in folder.rglob("*") if path.is_file()}
        marks[folder.name] = texts.pop() if len(texts) == 1 and files == ["1/model.onnx", "config.pbtxt"] else "broken"
    return marks


def next_run() -> None:
    """Do what every make does first."""
    before_make.finish_publications()
    before_make.note_digests(set())


# --- A new set takes the place of the old one ---------------------------------


def test_the_set_is_published_the_dropped_model_leaves_and_rollback_brings_it_back(ready: Path) -> None:
    publish_set(NEW)
    assert present() == NEW
    publish.roll_back(REPOSITORY)
    assert present() == OLD
    publish.roll_back(REPOSITORY)
    assert present() == NEW


def test_a_model_that_is_dropped_while_all_others_stay_leaves_and_comes_back(place: Path) -> None:
    publish_set(OLD)
    smaller = {"changed": "old", "same": "old"}
    publish_set(smaller)
    assert present() == smaller
    publish.roll_back(REPOSITORY)
    assert present() == OLD
    publish.roll_back(REPOSITORY)
    assert present() == smaller


def test_where_folders_cannot_be_exchanged_it_ends_the_same(ready: Path, no_exchange: None) -> None:
    publish_set(NEW)
    assert present() == NEW
    publish.roll_back(REPOSITORY)
    assert present() == OLD
    publish.roll_back(REPOSITORY)
    assert present() == NEW


def test_the_top_folder_and_unchanged_models_stay_and_what_changed_is_fresh(ready: Path) -> None:
    def states(folder: str) -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(folder).rglob("*")}

    top, same, start = Path(REPOSITORY).stat().st_ino, states(f"{REPOSITORY}/same"), time.time_ns()
    for path in Path("build").rglob("*"):
        os.utime(path, (0, 0))

    publish_set(NEW)

    assert Path(REPOSITORY).stat().st_ino == top
    assert states(f"{REPOSITORY}/same") == same
    tick = 20_000_000
    assert all(mtime > start - tick for path, (_, mtime) in states(f"{REPOSITORY}/changed").items() if path.is_file())


def test_a_large_file_is_moved_and_has_one_name(ready: Path) -> None:
    inode = Path("build/onnx/changed.onnx").stat().st_ino
    publish.publish_models(REPOSITORY, "real", VERDICT, sources(NEW))

    published = Path(REPOSITORY, "changed/1/model.onnx").stat()
    assert published.st_ino == inode
    assert not Path("build/onnx/changed.onnx").exists()
    everything = [path for top in (REPOSITORY, BESIDE, "build") for path in Path(top).rglob("*") if path.is_file()]
    assert all(path.stat().st_nlink == 1 for path in everything)
    assert not [path for path in everything if path.is_symlink()]


def test_a_repository_on_another_file_system_gets_a_copy(place: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert Path(folder).stat().st_dev != place.stat().st_dev
        publish_set(OLD, f"{folder}/deep/repository")
        assert present(f"{folder}/deep/repository") == OLD
        publish_set(NEW, f"{folder}/deep/repository")
        assert present(f"{folder}/deep/repository") == NEW
        publish.roll_back(f"{folder}/deep/repository")
        assert present(f"{folder}/deep/repository") == OLD


def test_what_was_moved_when_it_was_published_can_be_published_elsewhere(ready: Path) -> None:
    publish.publish_models(REPOSITORY, "real", VERDICT, sources(NEW))
    publish.publish_models("another", "real", VERDICT, sources(NEW))
    assert present("another") == present() == NEW


# --- Kills --------------------------------------------------------------------

# What Python announces before it changes a file or folder; a kill before it only reads is one before the next of these
CHANGES = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.utime", "subprocess.Popen", "ctypes.dlsym"}


def killed_before_change(number: int, act: Callable[[], None]) -> bool:
    """Run `act` in a child that is killed before its number-th change to files; tell whether it was killed.

    The exchange of two folders, called by ctypes, counts when its function is looked up; it comes before the next one.
    """
    child = os.fork()
    if child == 0:
        left = number

        def count(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if event in CHANGES and (event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR)):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.addaudithook(count)
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"failed at change {number}"
    return os.WIFSIGNALED(status)


def is_whole(marks: dict[str, str], before: dict[str, str], after: dict[str, str], exchange: bool) -> bool:
    """Tell whether each model is as before or as after; without exchanges, one model may be absent for a moment."""
    for model in {*before, *after, *marks}:
        allowed = {before.get(model), after.get(model)} | (set() if exchange else {None})
        if marks.get(model) not in allowed:
            return False
    return marks["same"] == "old"


def at_every_change(
    ready: Path, act: Callable[[], None], before: dict[str, str], after: dict[str, str], exchange: bool
) -> int:
    """Kill `act` before each of its changes, in a fresh copy; check what is there then and after the next run."""
    number, killed = 0, True
    while killed:
        number += 1
        copy = ready.with_name(f"copy-{number}")
        shutil.copytree(ready, copy, copy_function=shutil.copy)
        os.chdir(copy)
        killed = killed_before_change(number, act)
        assert is_whole(present(), before, after, exchange), f"killed before change {number}: {present()}"
        if number % 5 == 0:  # and the next run is killed too
            killed_before_change(random.Random(number).randint(1, 30), next_run)
            assert is_whole(present(), before, after, exchange), f"killed twice, {number}: {present()}"
        next_run()
        assert present() in (before, after), f"after the run that follows a kill before change {number}: {present()}"
        assert killed or present() == after
        if present() == before:
            build(NEW)  # what had been moved away is made again
            act()
        assert present() == after, f"killed before change {number}"
        assert not list(Path(".make/journal").iterdir())
        assert not (BESIDE / "next").exists() and not list(BESIDE.rglob("*~"))
        publish.roll_back(REPOSITORY)
        assert present() == before, f"rolled back after a kill before change {number}"
        os.chdir("/")
        shutil.rmtree(copy)
    return number


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "moved in turn"])
def test_a_kill_before_any_change_of_a_publication_leaves_whole_models(
    ready: Path, exchange: bool, request: pytest.FixtureRequest
) -> None:
    if not exchange:
        request.getfixturevalue("no_exchange")
    changes = at_every_change(
        ready, lambda: publish.publish_models(REPOSITORY, "real", VERDICT, sources(NEW)), OLD, NEW, exchange
    )
    assert changes > 50


@pytest.mark.parametrize("draft", ["", '{"repository": "repo'])
def test_a_journal_that_was_cut_short_itself_never_counted(ready: Path, draft: str) -> None:
    Path(".make/journal").mkdir(exist_ok=True)
    Path(".make/journal/repository.123~").write_text(draft)
    next_run()
    assert present() == OLD
    assert not list(Path(".make/journal").iterdir())


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "moved in turn"])
def test_a_kill_before_any_change_of_a_rollback_leaves_whole_models(
    ready: Path, exchange: bool, request: pytest.FixtureRequest
) -> None:
    publish_set(NEW)
    if not exchange:
        request.getfixturevalue("no_exchange")
    changes = at_every_change(ready, lambda: publish.roll_back(REPOSITORY), NEW, OLD, exchange)
    assert changes > 20


# --- Refusals, each with everything left as it was ----------------------------


def refused(*words: str, act: Callable[[], None]) -> None:
    """Check that `act` ends in a message with these words, changes no published file and leaves no journal."""
    before = {path: path.read_bytes() for path in Path(REPOSITORY).rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as refusal:
        act()
    assert [word for word in words if word not in str(refusal.value)] == [], refusal.value
    assert {path: path.read_bytes() for path in Path(REPOSITORY).rglob("*") if path.is_file()} == before
    assert not list(Path(".make/journal").glob("*"))


def test_a_file_that_no_step_published_is_in_the_way(ready: Path) -> None:
    Path(REPOSITORY, "changed/2").mkdir()
    Path(REPOSITORY, "changed/2/model.onnx").write_text("mine")
    way_out = ("move it away (mv repository repository.old)", "REPOSITORY=dir")
    refused("repository/changed/2/model.onnx was not made by this build", *way_out, act=lambda: publish_set(NEW))


def test_a_dropped_model_with_a_file_of_the_users_own_stays(ready: Path) -> None:
    Path(REPOSITORY, "dropped/notes.txt").write_text("mine")
    refused("repository/dropped/notes.txt was not made by this build", act=lambda: publish_set(NEW))


def test_a_link_to_a_folder_is_no_model_of_ours(ready: Path) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/mine").write_text("mine")
    shutil.rmtree(f"{REPOSITORY}/dropped")
    Path(REPOSITORY, "added").symlink_to("../elsewhere")
    refused("repository/added", "was not made by this build", act=lambda: publish_set(NEW))


def test_models_of_the_users_own_beside_ours_are_left_alone(ready: Path) -> None:
    Path(REPOSITORY, "theirs").mkdir()
    Path(REPOSITORY, "theirs/config.pbtxt").write_text("mine")
    publish_set(NEW)
    publish.roll_back(REPOSITORY)
    assert Path(REPOSITORY, "theirs/config.pbtxt").read_text() == "mine"


def test_what_python_caches_in_a_model_is_no_obstacle(ready: Path) -> None:
    Path(REPOSITORY, "changed/1/__pycache__").mkdir()
    Path(REPOSITORY, "changed/1/__pycache__/model.pyc").write_text("")
    publish_set(NEW)
    assert present() == NEW


@pytest.mark.parametrize("before, now", [("real", "synthetic"), ("synthetic", "real")])
def test_one_kind_of_weights_never_replaces_another(place: Path, before: str, now: str) -> None:
    publish_set(OLD, weights=before)
    refused(f"repository is made from {before} weights, these are {now}", "REPOSITORY=dir",
            act=lambda: publish_set(NEW, weights=now))  # fmt: skip


def test_a_source_that_changed_after_the_verdict_is_not_published(ready: Path) -> None:
    Path("configs/changed.pbtxt").write_text("edited meanwhile")
    refused("nothing published: configs/changed.pbtxt is not what build/checks/verdict.json was passed on",
            act=lambda: publish.publish_models(REPOSITORY, "real", VERDICT, sources(NEW)))  # fmt: skip


def test_without_an_earlier_set_there_is_nothing_to_roll_back_to(place: Path) -> None:
    refused("nothing to roll back to", act=lambda: publish.roll_back(REPOSITORY))


def test_the_first_set_cannot_be_rolled_back_to_an_empty_repository(place: Path) -> None:
    publish_set(OLD)
    refused("nothing to roll back to", act=lambda: publish.roll_back(REPOSITORY))
    assert present() == OLD


def test_a_repository_that_is_mounted_from_another_file_system_is_refused(place: Path) -> None:
    """Folders of two file systems cannot be exchanged; here a symbolic link stands for the mount."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        Path(REPOSITORY).symlink_to(folder)
        refused("repository", "another file system", act=lambda: publish_set(OLD))
        assert present() == {}


def test_a_disk_that_is_full_before_the_exchange_changes_nothing(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def full(source: str, path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scripts.publish.exchange.place_file", full)
    with pytest.raises(OSError, match="No space left"):
        publish.publish_models(REPOSITORY, "real", VERDICT, sources(NEW))
    assert present() == OLD
    monkeypatch.undo()
    os.chdir(ready)
    publish_set(NEW)
    assert present() == NEW


# --- What rollback goes back to -----------------------------------------------


def test_a_second_make_with_the_same_set_leaves_what_rollback_goes_back_to(ready: Path) -> None:
    publish_set(NEW)
    publish_set(NEW)  # it has waited for the first
    publish.roll_back(REPOSITORY)
    assert present() == OLD


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_text("config of changed: harm\n")])
def test_a_repair_leaves_what_rollback_goes_back_to(ready: Path, harm: Callable[[Path], None]) -> None:
    publish_set(NEW)
    harm(Path(REPOSITORY, "changed/config.pbtxt"))
    publish_set(NEW)
    assert present() == NEW and (BESIDE / "harmed/changed").is_dir()
    publish.roll_back(REPOSITORY)
    assert present() == OLD


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_text("model of changed: harm\n")])
def test_earlier_models_that_are_no_longer_what_was_published_stay_where_they_are(
    ready: Path, harm: Callable[[Path], None]
) -> None:
    publish_set(NEW)
    harm(BESIDE / "previous/changed/1/model.onnx")
    refused("previous/changed is not as it was published", act=lambda: publish.roll_back(REPOSITORY))
    assert present() == NEW


def test_a_rollback_takes_no_file_of_the_users_own_along(ready: Path) -> None:
    publish_set(NEW)
    Path(REPOSITORY, "changed/notes.txt").write_text("mine\n")
    refused("repository/changed/notes.txt", "move it away", act=lambda: publish.roll_back(REPOSITORY))
    assert Path(REPOSITORY, "changed/notes.txt").read_text() == "mine\n"


def test_another_repository_with_the_same_names_is_not_replaced(ready: Path) -> None:
    for path in [path for path in Path(REPOSITORY).rglob("*") if path.is_file()]:
        path.write_text("made by hand\n")
    refused("repository/changed was not made by this build", act=lambda: publish_set(NEW))
    assert Path(REPOSITORY, "changed/1/model.onnx").read_text() == "made by hand\n"


# --- Where people work: layers of images, files of other users ----------------


@pytest.fixture
def layered(place: Path) -> Iterator[Path]:
    """OLD is published in a lower layer of overlayfs, as in an image with a built checkout; the test works above it."""
    base = place / "layers"
    for name in "lower", "upper", "work", "merged":
        (base / name).mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", base / "upper"], check=False)
    os.chdir(base / "lower")
    publish_set(OLD)
    publish_set(OLD | {"changed": "older"})
    for name in "data", "work":
        (base / "upper" / name).mkdir()
    folders = f"lowerdir={base}/lower,upperdir={base}/upper/data,workdir={base}/upper/work"
    mounted = subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", folders, base / "merged"], capture_output=True, text=True
    )
    if mounted.returncode:
        subprocess.run(["umount", base / "upper"], check=False)
        pytest.skip(f"overlayfs cannot be mounted here: {mounted.stderr.strip()}")
    os.chdir(base / "merged")
    yield base / "merged"
    os.chdir("/")
    subprocess.run(["umount", base / "merged", base / "upper"], check=True)


def test_what_lies_in_a_lower_layer_of_overlayfs_is_replaced_and_rolled_back(layered: Path) -> None:
    with pytest.raises(OSError, match="Invalid cross-device link"):
        Path(REPOSITORY, "changed").rename(Path(REPOSITORY, "elsewhere"))
    publish_set(NEW)
    assert present() == NEW
    publish.roll_back(REPOSITORY)
    assert present() == OLD | {"changed": "older"}
    assert not (BESIDE / "copies").exists() and not [*Path(".make/journal").iterdir()]


def test_a_rollback_is_the_first_thing_done_above_a_lower_layer(layered: Path) -> None:
    publish.roll_back(REPOSITORY)
    assert present() == OLD


def test_a_copy_that_was_complete_when_a_kill_came_is_put_in_its_place(layered: Path) -> None:
    shutil.copytree(f"{REPOSITORY}/changed", BESIDE / "copies/live/changed")
    Path(f"{REPOSITORY}/changed/config.pbtxt").unlink()  # half removed
    publish_set(NEW)
    assert present() == NEW
    publish.roll_back(REPOSITORY)
    assert present() == OLD | {"changed": "older"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file that another user owns")
@pytest.mark.parametrize("folder", ["repository/changed", "repository", ".repository", ".make/seen"])
def test_what_another_user_owns_is_named_with_the_command_that_ends_it(ready: Path, folder: str) -> None:
    shutil.copytree(SCRIPTS, "scripts")  # where that user can read it
    for path in [ready, *ready.rglob("*")]:
        shutil.chown(path, 65534)
    for path in [Path(folder), *Path(folder).rglob("*")]:
        shutil.chown(path, 0)
    ready.parent.chmod(0o755), ready.parent.parent.chmod(0o755), ready.parent.parent.parent.chmod(0o755)
    pairs = [f"{path}={source}" for path, source in sources(NEW).items()]
    words = ["--weights", "real", "--verdict", VERDICT, *pairs]
    done = subprocess.run(
        ["/usr/bin/python3", "-sESB", "-m", "scripts.publish.publish", REPOSITORY, *words],
        user=65534,
        group=65534,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "belongs to root" in done.stderr and "next: sudo chown -R $(id -u) " in done.stderr
    assert "Traceback" not in done.stderr and not Path(".make/journal", REPOSITORY).exists()
    assert present() == OLD


# --- A plan must pay ----------------------------------------------------------


def test_a_plan_that_was_measured_as_slower_is_published_with_consent_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {
        "on": {"gpu": "NVIDIA Stand-in RTX 3090"},
        "verdict": {
            "files": {"vit_trt/1/sm86.plan": "0a", "vit_trt/config.pbtxt": "0b", "binary_trt/1/sm86.plan": "0c"}
        },
        "slower": {"vit_trt": "31 ms, the ONNX model 29 ms"},
    }
    Path("build").mkdir()
    Path(publish.VERIFIED).write_text(json.dumps(told))
    slow = {"vit_trt/1/sm86.plan": "0a", "vit_trt/config.pbtxt": "0b", "vit_onnx/1/model.onnx": "0d"}

    with pytest.raises(SystemExit) as refused:
        publish.refuse_slow_plans(slow)
    assert refused.value.code == (
        "vit_trt is slower than its ONNX model on NVIDIA Stand-in RTX 3090: 31 ms, the ONNX model 29 ms\n"
        "nothing was published (build/verify-gpu.json); to publish it all the same: ACCEPT=slower, "
        "or the ONNX models alone: FORMAT=onnx"
    )
    for other in (
        slow | {"vit_trt/1/sm86.plan": "0e"},  # built anew, so not measured yet
        {"vit_onnx/1/model.onnx": "0d"},
        {"binary_trt/1/sm86.plan": "0c"},
    ):
        publish.refuse_slow_plans(other)
    monkeypatch.setenv("ACCEPT", "slower")
    publish.refuse_slow_plans(slow)


def test_what_no_gpu_has_measured_is_published(place: Path) -> None:
    publish.refuse_slow_plans({"vit_trt/1/sm86.plan": "0a"})
