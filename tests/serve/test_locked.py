"""What the real Triton answers without its key: inference, health, the team's client; it refuses what runs code."""

import base64
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from scripts.serve.server_options import KEY_HEADER
from scripts.serve.triton_client import CHANNEL, make_input
from scripts.serve.triton_server import Server, triton_server
from tests.triton_models import BPR_CONFIG, FEATURES, WEIGHT, bpr, head

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-triton"
# A model that a stranger sends to the port: its code runs when Triton loads it
OWN = {
    "parameters": {
        "config": json.dumps({"name": "own", "backend": "python", "max_batch_size": 0}),
        "file:1/model.py": base64.b64encode(b"class TritonPythonModel: ...").decode(),
    }
}
REFUSED = [
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/binary_onnx/load"),
    ("POST", "/v2/repository/models/own/load"),
    ("POST", "/v2/repository/models/binary_onnx/unload"),
    ("GET", "/v2/systemsharedmemory/status"),
    ("POST", "/v2/systemsharedmemory/region/x/register"),
    ("GET", "/v2/cudasharedmemory/status"),
    ("POST", "/v2/cudasharedmemory/region/x/register"),
    ("GET", "/v2/trace/setting"),
    ("POST", "/v2/trace/setting"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
]
ALLOWED = [
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/binary_onnx",
    "/v2/models/binary_onnx/ready",
    "/v2/models/binary_onnx/config",
    "/v2/models/binary_onnx/stats",
]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("locked") / "repository"
    head(top)
    bpr(top)
    return top


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    with triton_server(repository, repository.parent / "log", venv=VENV) as started:
        yield started


def status(server: Server, method: str, path: str, key: str = "", body: Any = None) -> int:
    connection = http.client.HTTPConnection(server.http, timeout=60)
    try:
        connection.request(method, path, json.dumps(body or {}), {KEY_HEADER: key} if key else {})
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize(("method", "path"), REFUSED)
@pytest.mark.parametrize("key", ["", "wrong"])
def test_http_refuses_without_its_key_what_runs_code_or_reads_memory(
    server: Server, method: str, path: str, key: str
) -> None:
    assert status(server, method, path, key, OWN if "own" in path else None) == 403


@pytest.mark.parametrize("path", ALLOWED)
def test_http_answers_what_reads_a_model_or_health(server: Server, path: str) -> None:
    assert status(server, "GET", path) == 200


def test_http_infers_without_a_key(server: Server) -> None:
    data = np.ones((1, FEATURES)).tolist()
    tensor = {"name": "input", "shape": [1, FEATURES], "datatype": "FP32", "data": data}
    assert status(server, "POST", "/v2/models/binary_onnx/infer", body={"inputs": [tensor]}) == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/binary_onnx/load"),
        ("GET", "/v2/logging"),
        ("GET", "/v2/systemsharedmemory/status"),
    ],
)
def test_the_key_opens_http(server: Server, method: str, path: str) -> None:
    assert status(server, method, path, server.key) == 200


def test_each_start_has_a_key_of_its_own_that_no_message_shows(server: Server) -> None:
    assert len(server.key) == 32
    assert server.key not in repr(server)


@pytest.fixture
def client(server: Server) -> Iterator[grpc.InferenceServerClient]:
    opened = grpc.InferenceServerClient(server.grpc, channel_args=CHANNEL)
    yield opened
    opened.close()


@pytest.mark.parametrize(
    "name",
    [
        "get_system_shared_memory_status",
        "get_cuda_shared_memory_status",
        "unregister_system_shared_memory",
        "get_trace_settings",
        "update_trace_settings",
        "get_log_settings",
    ],
)
def test_grpc_refuses_without_its_key(server: Server, client: grpc.InferenceServerClient, name: str) -> None:
    with pytest.raises(InferenceServerException, match="This protocol is restricted"):
        getattr(client, name)()
    getattr(client, name)(headers={f"triton-grpc-protocol-{KEY_HEADER}": server.key})


def test_the_teams_client_works_unchanged_over_grpc(client: grpc.InferenceServerClient) -> None:
    client.load_model("binary_onnx")
    assert {model.name for model in client.get_model_repository_index().models} == {"binary_onnx", "bpr_model"}
    batch = np.ones((2, FEATURES), np.float32)
    result = client.infer("binary_onnx", [make_input("input", batch)], model_version="1")
    np.testing.assert_allclose(result.as_numpy("output"), batch @ WEIGHT, rtol=1e-5)
    client.unload_model("binary_onnx")
    client.load_model("binary_onnx")


def test_with_lock_grpc_neither_loads_nor_unloads(repository: Path, tmp_path: Path) -> None:
    with triton_server(repository, tmp_path / "log", venv=VENV, lock=True) as server:
        client = grpc.InferenceServerClient(server.grpc, channel_args=CHANNEL)
        for action in (
            lambda: client.load_model("binary_onnx"),
            lambda: client.load_model("own", config=BPR_CONFIG, files={"file:1/model.py": b"..."}),
            lambda: client.unload_model("binary_onnx"),
            lambda: client.get_model_repository_index(),
        ):
            with pytest.raises(InferenceServerException, match="This protocol is restricted"):
                action()
        batch = np.ones((1, FEATURES), np.float32)  # models that were loaded at the start answer
        assert client.infer("binary_onnx", [make_input("input", batch)]).as_numpy("output").shape == (1, 3)
        client.load_model("binary_onnx", headers={f"triton-grpc-protocol-{KEY_HEADER}": server.key})
        client.close()


def test_code_of_a_model_sees_no_variable_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "CI_JOB_TOKEN", "HTTPS_PROXY", "PIP_INDEX_URL"):
        monkeypatch.setenv(name, "a-secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = bpr(tmp_path / "repository")
    (folder / "1/helper.py").write_text("import os\nTAG = repr(dict(os.environ))\n")
    with triton_server(tmp_path / "repository", tmp_path / "log", venv=VENV) as server:
        client = grpc.InferenceServerClient(server.grpc, channel_args=CHANNEL)
        request = {"input": np.zeros((1, 1, 1, 1), np.int16), "metadata": np.ones((1, 3), np.float32)}
        answer = client.infer("bpr_model", [make_input(name, array) for name, array in request.items()])
        seen = answer.as_numpy("output")[0].decode()
        client.close()
    assert "'OMP_NUM_THREADS': '1'" in seen
    assert "a-secret" not in seen
