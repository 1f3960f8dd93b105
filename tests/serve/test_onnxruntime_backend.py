"""The stand-in for Triton's ONNX Runtime backend, in a real server."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from scripts.serve.triton_client import CHANNEL, make_input
from scripts.serve.triton_server import Server, triton_server
from tests.triton_models import CONFIG, FEATURES, WEIGHT, head, linear
from tests.triton_servers import VENV, until


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Any]]:
    """Two ONNX models: one that joins requests, one without a batch dimension and with two outputs."""
    root = tmp_path_factory.mktemp("served") / "repository"
    head(root)
    model = linear()
    model.graph.node.append(onnx.helper.make_node("Relu", ["output"], ["relu"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("relu", onnx.TensorProto.FLOAT, ["N", 3]))
    config = CONFIG.replace("size: 8", "size: 0").replace("[8]", "[-1, 8]").replace("[3]", "[-1, 3]")
    config = config.replace("dynamic_batching { max_queue_delay_microseconds: 0 }", "")
    head(root, "plain_onnx", model, config + 'output [{ name: "relu" data_type: TYPE_FP32 dims: [-1, 3] }]\n')
    # Requests wait so long that Triton joins several
    joined = (root / "binary_onnx/config.pbtxt").read_text().replace("microseconds: 0", "microseconds: 300000")
    (root / "binary_onnx/config.pbtxt").write_text(joined)
    with triton_server(root, root.parent / "log", venv=VENV) as server:
        client = grpc.InferenceServerClient(server.grpc, channel_args=CHANNEL)
        yield server, client
        client.close()


def rows(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((count, FEATURES)).astype(np.float32)


def test_joined_requests_each_get_their_own_rows(served: tuple[Server, Any]) -> None:
    _, client = served
    batches = [rows(count, count) for count in (1, 2, 3, 2)]
    futures = [client.async_infer for _ in batches]
    answered: dict[int, Any] = {}
    for index, batch in enumerate(batches):
        futures[index](
            "binary_onnx",
            [make_input("input", batch)],
            callback=lambda result, error, index=index: answered.__setitem__(index, error or result.as_numpy("output")),
        )
    until(lambda: len(answered) == len(batches))
    for index, batch in enumerate(batches):
        np.testing.assert_allclose(answered[index], batch @ WEIGHT, rtol=1e-5, atol=1e-5)
    (statistics,) = client.get_inference_statistics("binary_onnx", as_json=True)["model_stats"]
    assert int(statistics["execution_count"]) < int(statistics["inference_count"])


def test_without_a_batch_dimension_requests_of_any_size_are_answered(served: tuple[Server, Any]) -> None:
    _, client = served
    for count in (1, 20):
        result = client.infer("plain_onnx", [make_input("input", rows(count))])
        np.testing.assert_allclose(result.as_numpy("output"), rows(count) @ WEIGHT, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(result.as_numpy("relu"), np.maximum(result.as_numpy("output"), 0))


def test_only_the_outputs_asked_for_are_answered(served: tuple[Server, Any]) -> None:
    _, client = served
    result = client.infer("plain_onnx", [make_input("input", rows(1))], outputs=[grpc.InferRequestedOutput("relu")])
    assert result.as_numpy("output") is None
    assert result.as_numpy("relu").shape == (1, 3)


def test_requests_beyond_the_limits_are_errors_and_the_model_goes_on(served: tuple[Server, Any]) -> None:
    _, client = served
    for wrong in (rows(9), rows(1)[:, :4], rows(1).astype(np.float64)):
        with pytest.raises(InferenceServerException):
            client.infer("binary_onnx", [make_input("input", wrong)])
    assert client.infer("binary_onnx", [make_input("input", rows(8))]).as_numpy("output").shape == (8, 3)


def test_a_loaded_model_is_not_loaded_again(served: tuple[Server, Any]) -> None:
    server, client = served
    count = server.log.read_text().count("successfully loaded")
    client.load_model("binary_onnx")
    assert server.log.read_text().count("successfully loaded") == count
