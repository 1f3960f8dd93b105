"""make infer with a real Triton that restarts, has other clients and loses its models."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import REPOSITORY, ROOT, Project
from onnx import numpy_helper

from scripts.infer import triton as module
from scripts.infer.handover import KEY_HEADER
from scripts.infer.messages import REPLACED
from scripts.infer.triton import SERVED, Triton, UnreachableError, find_local_key
from scripts.serve.ports_and_memory import SHM, find_free_ports
from scripts.serve.serve import publish_key
from scripts.serve.triton_server import Server, triton_server
from tests.dicom_studies import lungs, series

STUDIES = 6


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("studies")
    for number in range(STUDIES):
        series(top / f"{number}", lungs(20, seed=number), study=f"{number}")
    return top


def serve(project: Project, log: Path, ports: list[int]) -> Any:
    return triton_server(project.path / REPOSITORY, log, venv=ROOT / ".venv-triton", ports=ports)


@pytest.fixture
def server(built: Project, tmp_path: Path) -> Iterator[Server]:
    with serve(built, tmp_path / "log", find_free_ports("127.0.0.1", 2)) as started:
        yield started


def start(project: Project, server: Server, top: Path, out: Path) -> "subprocess.Popen[str]":
    words = [project.path / ".venv-inference/bin/python3", "-m", "scripts.infer", "--triton", server.grpc, top, out]
    return subprocess.Popen(
        words, cwd=project.path, text=True, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"LC_ALL": "C", "CHEST_KEY": server.key},
    )  # fmt: skip


def found(out: Path) -> dict[str, Any]:
    """The parts of each row that do not depend on the time."""
    rows = json.loads((out / "output.json").read_text())["studies"]
    keys = "processing_status", "probability_of_pathology", "findings", "warnings"
    return {row["path_to_study"]: {key: row[key] for key in keys} for row in rows}


@pytest.fixture(scope="module")
def expected(built: Project, studies: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    top = tmp_path_factory.mktemp("expected")
    with serve(built, top / "log", find_free_ports("127.0.0.1", 2)) as server:
        run = start(built, server, studies, top / "out")
        said = run.communicate()[1]
    assert run.returncode == 0, said
    assert f"{server.grpc}: volumes are sent through shared memory" in said
    rows = json.loads((top / "out/output.json").read_text())["studies"]
    assert all(set(row["seconds"]) == {"reading", "preprocessing", "networks"} for row in rows)
    return found(top / "out")


def test_a_server_restarted_in_the_middle_loses_no_study(
    built: Project, studies: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    ports = find_free_ports("127.0.0.1", 2)
    with ExitStack() as first:
        server = first.enter_context(serve(built, tmp_path / "log", ports))
        run = start(built, server, studies, tmp_path / "out")
        assert run.stderr
        while f"1 of {STUDIES}" not in run.stderr.readline():
            assert run.poll() is None
        os.killpg(run.pid, signal.SIGSTOP)
        server.process.kill()
    assert not (tmp_path / "out/output.json").exists() or len(found(tmp_path / "out")) < STUDIES
    os.killpg(run.pid, signal.SIGCONT)
    with serve(built, tmp_path / "log", ports):
        said = run.communicate()[1]

    assert run.returncode == 0, said
    assert found(tmp_path / "out") == expected


def test_two_clients_that_unload_their_models_get_the_same_rows(
    built: Project, studies: Path, server: Server, expected: dict[str, Any], tmp_path: Path
) -> None:
    for name in SERVED.values():
        server.ask(f"/v2/repository/models/{name}/unload", "POST")
    runs = [start(built, server, studies, tmp_path / name) for name in ("one", "two")]
    said = [run.communicate()[1] for run in runs]

    assert [run.returncode for run in runs] == [0, 0], said
    assert found(tmp_path / "one") == found(tmp_path / "two") == expected


def test_a_model_that_another_client_unloads_is_loaded_again(built: Project, server: Server) -> None:
    tensor = np.zeros((20, 40, 40), np.float32)
    with Triton(server.grpc, built.path / REPOSITORY, server.key) as triton:
        before = triton.infer(tensor)
        for name in SERVED.values():
            server.ask(f"/v2/repository/models/{name}/unload", "POST")
            assert triton.infer(tensor) == before
        assert triton.returns >= 3


def test_a_server_that_does_not_come_back_ends_the_run(
    built: Project, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETURN", 0.0)
    triton = Triton(server.grpc, built.path / REPOSITORY, server.key)
    server.process.kill()
    server.process.wait()

    with pytest.raises(UnreachableError, match=f"TRITON={server.grpc}: the server no longer answers"):
        triton.infer(np.zeros((20, 40, 40), np.float32))
    triton.close()


def test_a_server_that_comes_back_with_other_heads_ends_the_run(built: Project, tmp_path: Path) -> None:
    """Rows of different models never mix."""
    ports = find_free_ports("127.0.0.1", 2)
    with serve(built, tmp_path / "log", ports) as server:
        triton = Triton(server.grpc, built.path / REPOSITORY, server.key)
    other = Project(tmp_path / "other")
    shutil.copytree(built.path / REPOSITORY, other.path / REPOSITORY)
    file = other.path / REPOSITORY / "binary_onnx/1/model.onnx"
    model = onnx.load(file)
    for initializer in model.graph.initializer:
        initializer.CopyFrom(numpy_helper.from_array(1 - numpy_helper.to_array(initializer), initializer.name))
    onnx.save(model, file)
    with serve(other, tmp_path / "log", ports):
        with pytest.raises(UnreachableError, match=REPLACED):
            triton.infer(np.zeros((20, 40, 40), np.float32))
        triton.close()


def test_with_the_key_locked_models_are_loaded_and_unloaded(built: Project, tmp_path: Path) -> None:
    with triton_server(built.path / REPOSITORY, tmp_path / "log", venv=ROOT / ".venv-triton", lock=True) as server:
        server.ask("/v2/repository/models/vit_onnx/unload", "POST")
        with pytest.raises(SystemExit, match="This protocol is restricted"):
            Triton(server.grpc, built.path / REPOSITORY)
        with Triton(server.grpc, built.path / REPOSITORY, server.key) as triton:
            assert triton.handover == "shared_memory"
        with Triton(server.grpc, built.path / REPOSITORY, server.key) as triton:
            triton.infer(np.zeros((20, 40, 40), np.float32))
            assert triton.client.get_system_shared_memory_status(headers={KEY_HEADER: server.key}).regions == {}


def test_the_key_of_make_serve_is_found_by_its_user_on_its_machine(server: Server) -> None:
    port = server.grpc.rpartition(":")[2]
    with publish_key(server):
        assert find_local_key(f"localhost:{port}") == find_local_key(f"127.0.0.1:{port}") == server.key
        assert find_local_key(f"elsewhere:{port}") == ""
        assert (SHM / f"chest-key-{port}").stat().st_mode & 0o777 == 0o600
    assert find_local_key(f"localhost:{port}") == ""
