"""An empty machine takes from the shared cache what another machine made (real Makefile, stand-in for Python)."""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3  # type: ignore[import-untyped]
import pytest
from conftest import REPOSITORY, ROOT, Project, announced
from moto.server import ThreadedMotoServer

VERDICT = "build/checks/verdict.json"


@pytest.fixture(scope="session")
def filled(built_by_stand_ins: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that a first machine filled."""
    folder = tmp_path_factory.mktemp("filled")
    said = empty(built_by_stand_ins, folder / "first").make("repository", CT_CACHE=str(folder / "cache"))
    assert re.search(r"^cache .*: 0 hits, 0.0 MB taken", said, re.MULTILINE)
    return folder / "cache"


@pytest.fixture
def cache(filled: Path, tmp_path: Path) -> Path:
    """A copy of the filled cache."""
    shutil.copytree(filled, tmp_path / "cache")
    return tmp_path / "cache"


def empty(project: Project, path: Path) -> Project:
    """A machine that has only the sources, and stand-ins for its environments."""
    leave = shutil.ignore_patterns("build", ".make", REPOSITORY, f".{REPOSITORY}")
    shutil.copytree(project.path, path, ignore=leave, copy_function=shutil.copy)
    for venv in (".venv", ".venv-triton", ".venv-inference"):
        (path / venv / "installed").unlink()
    return Project(path)


def lock(archive: str, first: Project, *others: Project) -> None:
    """Give all machines the lock of an archive with this content, and the archive itself to the first."""
    (first.path / "training/weights.zip").write_text(archive)
    sha = hashlib.sha256(archive.encode()).hexdigest()
    for machine in first, *others:
        (machine.path / "training/weights.zip.lock.json").write_text(f'{{"sha256": "{sha}"}}')


def ran(said: str) -> set[str]:
    """Return the steps, except environments, that ran and were not taken from the cache."""
    taken = set(re.findall(r"^(.*): from the cache$", said, re.MULTILINE))
    return {step for step in announced(said) - taken if not step.startswith(".venv")}


# --- Taking -------------------------------------------------------------------


def test_an_empty_machine_takes_everything_and_runs_the_verdict_itself(
    stand_ins: Project, cache: Path, tmp_path: Path
) -> None:
    machine = empty(stand_ins, tmp_path / "second")
    assert ran(machine.make("repository", CT_CACHE=str(cache))) == {VERDICT}
    assert machine.published() == stand_ins.published()
    assert machine.steps(CT_CACHE=str(cache)) == set()


def test_what_nothing_needs_is_not_taken(stand_ins: Project, cache: Path, tmp_path: Path) -> None:
    machine = empty(stand_ins, tmp_path / "second")
    machine.make("repository", CT_CACHE=str(cache))
    assert not list(machine.path.glob("build/synthetic/CT-RATE/*"))


def test_a_changed_head_costs_an_empty_machine_its_own_steps(stand_ins: Project, cache: Path, tmp_path: Path) -> None:
    machine = empty(stand_ins, tmp_path / "second")
    machine.edit("convertation/models.yaml", "leaky_relu", "gelu")
    said = machine.make("repository", CT_CACHE=str(cache))
    made = {step for step in ran(said) if step.startswith(("build/onnx", "build/checks"))}
    assert made == {"build/onnx/multilabel.onnx", "build/checks/multilabel.json", VERDICT}


def test_another_version_of_a_package_takes_nothing_that_it_shaped(
    stand_ins: Project, cache: Path, tmp_path: Path
) -> None:
    machine = empty(stand_ins, tmp_path / "second")
    machine.edit("requirements.txt", "onnxscript==0.7.2", "onnxscript==0.7.3")
    made = ran(machine.make("repository", CT_CACHE=str(cache)))
    assert {f"build/onnx/{model}.onnx" for model in ("vit", "binary", "multilabel", "bpr")} <= made


def test_neither_archive_nor_checkpoints_are_fetched(stand_ins: Project, tmp_path: Path) -> None:
    """The lock in git is enough: the cache knows what an archive with that digest holds."""
    command = "repository", "WEIGHTS=yandex", f"CACHE={tmp_path / 'cache'}"
    first, second = empty(stand_ins, tmp_path / "first"), empty(stand_ins, tmp_path / "second")
    lock("an archive", first, second)
    first.make(*command)
    assert ran(second.make(*command)) == {VERDICT}
    assert not (second.path / "training/weights.zip").exists()
    weights = second.path / "training/weights"
    assert [path.name for path in weights.rglob("*") if path.is_file()] == ["inference-settings.json"]


def test_a_newer_archive_that_the_cache_knows_is_not_fetched(stand_ins: Project, tmp_path: Path) -> None:
    """A machine with the files of the older archive also takes those of the newer one."""
    command = "repository", "WEIGHTS=yandex", f"CACHE={tmp_path / 'cache'}"
    first, second = empty(stand_ins, tmp_path / "first"), empty(stand_ins, tmp_path / "second")
    for content in "older", "newer":
        lock(content, first, second)
        first.make(*command)
        assert ran(second.make(*command)) == {VERDICT}
        assert second.published() == first.published()
    assert not (second.path / "training/weights.zip").exists()
    assert not list((second.path / "training/weights").rglob("*.p*"))


def test_a_file_of_your_own_stays_and_is_used(stand_ins: Project, tmp_path: Path) -> None:
    command = "repository", "WEIGHTS=yandex", f"CACHE={tmp_path / 'cache'}"
    first, second = empty(stand_ins, tmp_path / "first"), empty(stand_ins, tmp_path / "second")
    lock("an archive", first, second)
    first.make(*command)
    own = second.path / "training/weights/CT-RATE/model_binary.pth"
    own.parent.mkdir(parents=True)
    own.write_text("my own")

    said = second.make(*command)

    assert ran(said) == {"build/onnx/binary.onnx", "build/checks/binary.json", VERDICT}
    assert "local: training/weights/CT-RATE/model_binary.pth is yours; it is used as it is" in said
    assert own.read_text() == "my own"
    assert second.published() != first.published()


# --- Whom to trust, and what to survive ---------------------------------------


HARM: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "altered": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("kind", ["files", "steps"])
@pytest.mark.parametrize("harm", HARM.values(), ids=list(HARM))
def test_a_spoiled_entry_is_made_again(
    stand_ins: Project, cache: Path, tmp_path: Path, harm: Callable[[Path], object], kind: str
) -> None:
    for entry in (cache / kind).iterdir():
        harm(entry)
    machine = empty(stand_ins, tmp_path / "second")
    said = machine.make("repository", CT_CACHE=str(cache))
    assert "Traceback" not in said
    assert machine.published() == stand_ins.published()


def test_a_spoiled_entry_is_mended(stand_ins: Project, cache: Path, tmp_path: Path) -> None:
    for entry in (cache / "files").iterdir():
        HARM["altered"](entry)
    said = empty(stand_ins, tmp_path / "second").make("repository", CT_CACHE=str(cache))
    assert f"warning: cache {cache}: files/" in said
    assert ran(empty(stand_ins, tmp_path / "third").make("repository", CT_CACHE=str(cache))) == {VERDICT}


def test_a_spoiled_entry_is_told_once(stand_ins: Project, cache: Path, tmp_path: Path) -> None:
    for entry in (cache / "files").iterdir():
        HARM["altered"](entry)
    machine = empty(stand_ins, tmp_path / "second")
    said = machine.make("repository", CT_CACHE=str(cache), CT_CACHE_MODE="read")
    told = re.findall(r"^warning: cache .*: files/(\w+) holds", said, re.MULTILINE)
    assert told and len(told) == len(set(told))
    assert machine.published() == stand_ins.published()


def test_with_mode_read_nothing_is_put_there(stand_ins: Project, cache: Path, tmp_path: Path) -> None:
    before = sorted(cache.rglob("*"))
    machine = empty(stand_ins, tmp_path / "second")
    machine.edit("convertation/models.yaml", "leaky_relu", "gelu")
    machine.make("repository", CT_CACHE=str(cache), CT_CACHE_MODE="read")
    assert sorted(cache.rglob("*")) == before


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("/proc/1/nowhere/cache", "No such file"),
        ("/proc/version", "Not a directory"),
        ("/proc/sys", "Permission denied|not permitted|No such file"),
    ],
)
def test_a_cache_that_cannot_be_reached_or_written_is_one_warning(
    stand_ins: Project, tmp_path: Path, where: str, reason: str
) -> None:
    machine = empty(stand_ins, tmp_path / "second")
    said = machine.make("repository", CT_CACHE=where)
    (warning,) = re.findall(r"^warning: cache .*", said, re.MULTILINE)
    assert re.search(f"({reason}).*going on without it", warning)
    assert machine.published() == stand_ins.published()


def test_two_empty_machines_may_build_at_once(stand_ins: Project, tmp_path: Path) -> None:
    machines = [empty(stand_ins, tmp_path / name) for name in ("one", "two")]
    runs = [machine.start("repository", CT_CACHE=str(tmp_path / "cache"), SLOW="0.1") for machine in machines]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert machines[0].published() == machines[1].published() == stand_ins.published()
    assert not list((tmp_path / "cache").rglob("*~"))
    assert ran(empty(stand_ins, tmp_path / "three").make("repository", CT_CACHE=str(tmp_path / "cache"))) == {VERDICT}


# --- In a bucket --------------------------------------------------------------


@pytest.fixture
def s3_stand_in(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket with a filled cache, on moto's server, which stands in for S3."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stand-in")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "stand-in")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", host)
    bucket = boto3.resource("s3").create_bucket(Bucket="team")
    for entry in (path for path in filled.rglob("*") if path.is_file()):
        bucket.upload_file(str(entry), f"chest/{entry.relative_to(filled)}")
    yield "s3://team/chest"
    server.stop()


def with_client(machine: Project) -> Project:
    """Let the scripts that use the bucket find boto3, by starting the real Python."""
    stand_in = next((machine.path / ".venv/bin").glob("python3.??"))
    real = f'if [[ $3 == scripts.steps.@(step|take) ]]; then exec {ROOT}/.venv/bin/python "$@"; fi\n'
    stand_in.write_text(stand_in.read_text().replace("#!/bin/bash\n", f"#!/bin/bash\n{real}"))
    return machine


def test_a_bucket_serves_as_well_as_a_folder(stand_ins: Project, s3_stand_in: str, tmp_path: Path) -> None:
    machine = with_client(empty(stand_ins, tmp_path / "second"))
    assert ran(machine.make("repository", CT_CACHE=s3_stand_in)) == {VERDICT}
    assert machine.published() == stand_ins.published()


def test_what_a_step_makes_goes_into_the_bucket(stand_ins: Project, s3_stand_in: str, tmp_path: Path) -> None:
    for name in ("second", "third"):
        machine = with_client(empty(stand_ins, tmp_path / name))
        machine.append("convertation/head/torch2onnx.py", "# changed\n")
        made = ran(machine.make("build/onnx/binary.onnx", CT_CACHE=s3_stand_in)) - {
            "build/synthetic/CT-RATE/model_binary.pth"
        }
        assert made == ({"build/onnx/binary.onnx"} if name == "second" else set())


def test_a_spoiled_entry_of_a_bucket_is_made_again(stand_ins: Project, s3_stand_in: str, tmp_path: Path) -> None:
    for entry in boto3.resource("s3").Bucket("team").objects.filter(Prefix="chest/files/"):
        entry.put(Body=entry.get()["Body"].read() + b"?")
    machine = with_client(empty(stand_ins, tmp_path / "second"))
    assert ran(machine.make("build/onnx/binary.onnx", CT_CACHE=s3_stand_in)) >= {"build/onnx/binary.onnx"}


@pytest.mark.parametrize(
    ("bucket", "server", "reason"),
    [("nobody", {}, "NoSuchBucket"), ("team", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "Could not connect")],
)
def test_a_bucket_that_cannot_be_reached_is_one_warning(
    stand_ins: Project, s3_stand_in: str, tmp_path: Path, bucket: str, server: dict[str, str], reason: str
) -> None:
    machine = with_client(empty(stand_ins, tmp_path / "second"))
    said = machine.make("build/onnx/binary.onnx", CT_CACHE=f"s3://{bucket}/chest", **server)
    (warning,) = re.findall(r"^warning: cache .*", said, re.MULTILINE)
    assert reason in warning and "going on without it" in warning
