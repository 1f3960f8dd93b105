"""Checkpoints that are missing or broken are named with the reason; the real steps read them."""

import json
import os
import pickle
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, Project
from published_tree import BINARY, REAL


class Malice:
    """Unpickled without weights_only=True, it makes a folder as a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture(scope="module")
def real(built: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The tiny project, published from own files of the user."""
    project = Project(tmp_path_factory.mktemp("real") / "project")
    shutil.copytree(built.path, project.path, symlinks=True, copy_function=shutil.copy)
    for name in (REPOSITORY, f".{REPOSITORY}"):
        shutil.rmtree(project.path / name)
    shutil.copytree(project.path / "build/synthetic", project.path / "training/weights", dirs_exist_ok=True)
    said = project.make("repository", REAL)
    assert "model_binary.pth (local)" in said
    yield project


def test_the_metadata_of_a_published_file_name_its_checkpoint(real: Project) -> None:
    import onnx

    model = onnx.load(real.path / REPOSITORY / "binary_onnx/1/model.onnx")
    facts = {prop.key: prop.value for prop in model.metadata_props}
    sha256 = subprocess.check_output(["sha256sum", BINARY], cwd=real.path, text=True).split()[0]
    assert facts == {"weights": "real", "model": "model_binary", "checkpoint_sha256": sha256}


def empty(path: Path, trace: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path, trace: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def running_code(path: Path, trace: Path) -> None:
    torch.save({"layers": Malice(trace)}, path)


def running_code_in_the_old_format(path: Path, trace: Path) -> None:
    path.write_bytes(pickle.dumps({"layers": Malice(trace)}, protocol=2))


def of_another_model(path: Path, trace: Path) -> None:
    shutil.copy(path.with_name("model_multilabel.pth"), path)


def with_nan(path: Path, trace: Path) -> None:
    state = torch.load(path, weights_only=True)
    next(tensor for tensor in state.values() if tensor.is_floating_point()).view(-1)[0] = float("nan")
    torch.save(state, path)


def with_infinity(path: Path, trace: Path) -> None:
    state = torch.load(path, weights_only=True)
    next(tensor for tensor in state.values() if tensor.is_floating_point()).view(-1)[0] = float("inf")
    torch.save(state, path)


@pytest.mark.parametrize(
    "harm, expected",
    [
        (empty, "the file is empty"),
        (truncated, "truncated or no checkpoint"),
        (running_code, "refused, reading it would run code"),
        (running_code_in_the_old_format, "a plain pickle, which is never read: that could run code"),
        (of_another_model, "not a checkpoint of this model"),
        (with_nan, "NaN or infinite weights"),
        (with_infinity, "NaN or infinite weights"),
    ],
)
def test_a_broken_checkpoint_is_named_with_the_reason(
    real: Project, tmp_path: Path, harm: Callable[[Path, Path], None], expected: str
) -> None:
    checkpoint, trace, good = real.path / BINARY, tmp_path / "it ran", real.published()
    sound = checkpoint.read_bytes()
    try:
        harm(checkpoint, trace)
        harmed = checkpoint.read_bytes()

        said = real.fail("repository", REAL)

        assert f"{BINARY}: {expected}" in said
        assert "the command failed with status" in said
        assert not trace.exists()
        assert real.published() == good
        assert checkpoint.read_bytes() == harmed  # it is the user's own file, even if broken
    finally:
        checkpoint.write_bytes(sound)
    assert "up to date" in real.make("repository", REAL)


def test_a_reader_without_weights_only_would_leave_the_trace(tmp_path: Path) -> None:
    running_code(tmp_path / "model.pth", tmp_path / "it ran")
    torch.load(tmp_path / "model.pth", weights_only=False)
    assert (tmp_path / "it ran").exists()


@pytest.fixture
def nothing_there() -> Iterator[str]:
    """The address of a server that answers 404 to everything."""

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

    with ThreadingHTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_missing_checkpoints_say_how_to_get_them(real: Project, tmp_path: Path, nothing_there: str) -> None:
    """The file and the archive are missing, and Yandex.Disk does not have them either."""
    checkpoint, good = real.path / BINARY, real.published()
    checkpoint.rename(tmp_path / "away")
    try:
        said = real.fail("repository", REAL, YANDEX_DISK_API=nothing_there)
        assert "make repository WEIGHTS_ZIP=" in said and "make repository WEIGHTS=synthetic" in said
        assert real.published() == good
    finally:
        (tmp_path / "away").rename(checkpoint)


def test_the_checks_record_what_was_measured(real: Project) -> None:
    for name in ("vit", "binary", "multilabel", "bpr"):
        check = json.loads((real.path / f"build/checks/{name}.json").read_text())
        assert 0 <= check["difference"] <= check["tolerance"]
