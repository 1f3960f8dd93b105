"""bpr_model's model.py answers as in Triton; `TritonStandIn` stands in for the module that Triton provides."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from convertation.bpr.torch2onnx import torch2onnx
from convertation.bpr.vgg import make_synthetic_settings, make_synthetic_state_dict
from scripts.convert.sample import make_sample

SOURCE = Path(__file__).parents[2] / "convertation" / "bpr"
TINY: dict[str, Any] = {"family": "bpr", "network": {"channels": 4}, "input": [1, 128, 128], "batch": [1, 8, 32]}
CPU = {"model_name": "bpr_model", "model_instance_kind": "CPU", "model_instance_device_id": "0"}


class TritonStandIn(ModuleType):
    """The stand-in for triton_python_backend_utils, which exists only inside Triton."""

    class Tensor:
        def __init__(self, name: str, array: Any) -> None:
            self.name, self.array = name, array

        def as_numpy(self) -> Any:
            return self.array

    class InferenceResponse:
        def __init__(self, output_tensors: list[Any], error: Any = None) -> None:
            self.output_tensors, self.error = output_tensors, error

    class TritonError(str):
        pass

    class Logger:
        said: list[str] = []  # noqa: RUF012

        @classmethod
        def log_info(cls, text: str) -> None:
            cls.said.append(text)

        log_warn = log_info

    @staticmethod
    def get_input_tensor_by_name(request: dict[str, Any], name: str) -> Any:
        return TritonStandIn.Tensor(name, request[name])


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """model.py imported from a version folder of a model repository, as Triton does, and a link as in staging."""
    version = tmp_path_factory.mktemp("repository") / "bpr_model" / "1"
    shutil.copytree(SOURCE / "bpreg", version / "bpreg")
    (version / "model.py").symlink_to(SOURCE / "model.py")
    weights = version / "weights"
    weights.mkdir()
    (weights / "inference-settings.json").write_text(json.dumps(make_synthetic_settings(TINY)))
    torch.save(make_synthetic_state_dict(TINY), version.parent / "model.pt")
    torch2onnx(version.parent / "model.pt", TINY, weights / "model.onnx", opset=20, metadata={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "modules", sys.modules | {"triton_python_backend_utils": TritonStandIn("stand_in")})
        spec = importlib.util.spec_from_file_location("model", version / "model.py")
        assert spec and spec.loader
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        yield loaded


@pytest.fixture
def model(module: ModuleType) -> Any:
    model = module.TritonPythonModel()
    model.initialize(CPU)
    return model


def test_a_series_gets_its_tag_as_one_string_of_bytes(model: Any) -> None:
    (response,) = model.execute([make_sample(TINY, seed=0, batch=1)])

    (output,) = response.output_tensors
    assert output.name == "output" and output.array.shape == (1,) and output.array.dtype == object
    assert output.array[0].decode("utf-8") == "CHEST"


def test_the_number_of_slices_at_a_time_changes_no_tag(model: Any) -> None:
    request = make_sample(TINY, seed=1, batch=1)
    model.batch = 1000

    (response,) = model.execute([request])

    assert response.output_tensors[0].array[0] == b"CHEST"


@pytest.mark.parametrize(
    ("volume", "spacing", "message"),
    [
        (np.zeros((1, 3, 40, 40), np.int16), [0.1, 3.5, 5], "bpr_model: 40 voxels of 0.1 mm resample to 1 of 3.5 mm"),
        (np.zeros((1, 3, 40, 40), np.int16), [np.nan, 3.5, 5], r"bpr_model: spacing \[nan, 3.5, 5.0\]"),
        (np.full((1, 3, 128, 128), 250, np.int16), [3.5, 3.5, 5], "bpr_model: no slice is left"),
        (np.zeros((1, 0, 40, 40), np.int16), [3.5, 3.5, 5], r"bpr_model: volume is int16 \[0, 40, 40\]"),
        (
            np.zeros((3, 40, 40), np.int16),
            [3.5, 3.5, 5],
            r"bpr_model: input \[3, 40, 40\] and metadata \[1, 3\], expected",
        ),
    ],
)
def test_a_bad_request_gets_an_error_and_the_next_one_its_tag(
    model: Any, volume: Any, spacing: Any, message: str
) -> None:
    bad = {"input": volume, "metadata": np.array([spacing], np.float32)}

    refused, answered = model.execute([bad, make_sample(TINY, seed=0, batch=1)])

    assert refused.output_tensors == []
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(refused.error)
    assert answered.error is None and answered.output_tensors[0].array[0] == b"CHEST"


def test_without_a_working_gpu_the_cpu_answers_and_the_log_says_so(module: ModuleType) -> None:
    if "CUDAExecutionProvider" in module.onnxruntime.get_available_providers() and torch.cuda.is_available():
        pytest.skip("no GPU may be there: this is about a machine without one")
    model = module.TritonPythonModel()

    model.initialize(CPU | {"model_instance_kind": "GPU"})

    assert "was given a GPU and runs on the CPU" in TritonStandIn.Logger.said[-1]
    assert model.execute([make_sample(TINY, seed=0, batch=1)])[0].output_tensors[0].array[0] == b"CHEST"


@pytest.mark.parametrize(("kind", "sizes"), [("CPU", []), ("GPU", [(32, 1, 128, 128)])])
def test_a_gpu_runs_once_before_it_is_ready_and_a_cpu_does_not(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, sizes: list[tuple[int, ...]]
) -> None:
    asked = []

    class OnGpu(module.onnxruntime.InferenceSession):  # type: ignore[misc, name-defined]
        def __init__(self, file: Path, providers: object) -> None:
            super().__init__(file, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return [f"{'CUDA' if kind == 'GPU' else kind}ExecutionProvider"]

        def run(self, outputs: list[str], inputs: dict[str, Any]) -> Any:
            asked.append(inputs["input"].shape)
            return super().run(outputs, inputs)

    monkeypatch.setattr(module.onnxruntime, "InferenceSession", OnGpu)
    module.TritonPythonModel().initialize(CPU | {"model_instance_kind": kind})

    assert asked == sizes


def test_missing_settings_stop_the_load_with_the_file_s_name(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HERE", Path("/nowhere"))

    with pytest.raises(ValueError, match=r"/nowhere/weights/inference-settings\.json: no such file"):
        module.TritonPythonModel().initialize(CPU)


def test_the_config_is_the_client_s_contract() -> None:
    config = text_format.Parse((SOURCE / "config.pbtxt").read_text(), ModelConfig())

    tensors = [(t.name, t.data_type, list(t.dims)) for t in [*config.input, *config.output]]
    types = ModelConfig.DESCRIPTOR.file.pool.FindEnumTypeByName("inference.DataType").values_by_name
    numbers = [types[f"TYPE_{name}"].number for name in ("INT16", "FP32", "STRING")]
    assert (config.name, config.backend, config.max_batch_size) == ("bpr_model", "python", 0)
    assert tensors == [
        ("input", numbers[0], [1, -1, -1, -1]),
        ("metadata", numbers[1], [1, 3]),
        ("output", numbers[2], [-1]),
    ]
