"""Small models and repositories for the tests of Triton and of the offline check."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from scripts.convert.sample import make_sample

FEATURES, CLASSES = 8, 3
ENTRY: dict[str, Any] = {
    "name": "binary",
    "family": "head",
    "network": {"sizes": [FEATURES, CLASSES]},
    "input": [FEATURES],
    "output": [CLASSES],
    "batch": [1, 4, 8],
}
CONFIG = f"""\
name: "binary_onnx"
backend: "onnxruntime"
max_batch_size: 8
input [{{ name: "input" data_type: TYPE_FP32 dims: [{FEATURES}] }}]
output [{{ name: "output" data_type: TYPE_FP32 dims: [{CLASSES}] }}]
instance_group [{{ count: 1 kind: KIND_AUTO }}]
dynamic_batching {{ max_queue_delay_microseconds: 0 }}
"""
BPR_CONFIG = """\
name: "bpr_model"
backend: "python"
max_batch_size: 0
input [{ name: "input" data_type: TYPE_INT16 dims: [1, -1, -1, -1] }]
input [{ name: "metadata" data_type: TYPE_FP32 dims: [1, 3] }]
output [{ name: "output" data_type: TYPE_STRING dims: [-1] }]
instance_group [{ count: 1 kind: KIND_AUTO }]
"""
BPR = """\
import numpy as np
import triton_python_backend_utils as pb_utils
from helper import TAG


class TritonPythonModel:
    def execute(self, requests):
        tensor = pb_utils.Tensor("output", np.array([TAG], dtype=object))
        return [pb_utils.InferenceResponse([tensor]) for _ in requests]
"""
WEIGHT = np.random.default_rng(0).standard_normal((FEATURES, CLASSES)).astype(np.float32)


def linear(
    *,
    rows: int | str = "N",
    features: int | str = FEATURES,
    classes: int | str = CLASSES,
    names: tuple[str, str] = ("input", "output"),
    kind: int = TensorProto.FLOAT,
    opset: int = 20,
    ir: int = 10,
    operator: str = "MatMul",
    domain: str = "",
    extra: bool = False,
) -> onnx.ModelProto:
    """Return `output` = `input` @ WEIGHT, float32 (rows, FEATURES) -> (rows, CLASSES), as the arguments declare it."""
    inputs = [helper.make_tensor_value_info(names[0], kind, [rows, features])]
    if extra:
        inputs.append(helper.make_tensor_value_info("extra", kind, [rows]))
    output = helper.make_tensor_value_info(names[1], kind, [rows, classes])
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weight = numpy_helper.from_array(WEIGHT.astype(dtype), "weight")
    node = helper.make_node(operator, [names[0], "weight"], [names[1]], domain=domain)
    graph = helper.make_graph([node], "linear", inputs, [output], [weight])
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir)


def head(
    repository: Path, name: str = "binary_onnx", model: onnx.ModelProto | None = None, config: str = CONFIG
) -> Path:
    """Write the folder of a good ONNX model."""
    folder = repository / name
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config.replace("binary_onnx", name))
    onnx.save(model or linear(), folder / "1/model.onnx")
    return folder


def bpr(repository: Path, tag: str = "CHEST") -> Path:
    """Write a Python model with the interface of bpr_model, which always answers `tag`."""
    folder = repository / "bpr_model"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(BPR_CONFIG)
    (folder / "1/model.py").write_text(BPR)
    (folder / "1/helper.py").write_text(f"TAG = {tag!r}\n")
    return folder


def answers(build: Path, name: str = "binary", shift: float = 0.0) -> None:
    """Write entry and expected answers of a head to build/models and build/checks."""
    entry = ENTRY | {"name": name}
    served = []
    for seed, batch in ((0, 1), (1, 4)):
        output = make_sample(entry, seed, batch)["input"].astype(np.float64) @ WEIGHT + shift
        served.append({"seed": seed, "batch": batch, "output": output.tolist(), "allowed": 1e-5})
    write(build, name, entry, {"model": name, "scale": 3.0, "served": served})


def tag(build: Path, expected: str = "CHEST") -> None:
    """Write entry and expected answer of bpr_model."""
    entry = {"name": "bpr", "family": "bpr", "network": {}, "input": [1, 128, 128], "output": [], "batch": [1, 8, 32]}
    served = [{"seed": 0, "batch": 1, "output": [expected], "allowed": 0.0}]
    write(build, "bpr", entry, {"model": "bpr", "scale": 1.0, "served": served})


def write(build: Path, name: str, entry: dict[str, Any], check: dict[str, Any]) -> None:
    for folder, content in (("models", entry), ("checks", check)):
        (build / folder).mkdir(parents=True, exist_ok=True)
        (build / folder / f"{name}.json").write_text(json.dumps(content))
