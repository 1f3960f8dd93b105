"""The offline check reaches each verdict of the real server (Triton 2.47.0, its C++ ONNX Runtime 1.18.0 backend), too.

A case's name tells its files; most have the linear model of tests/triton_models.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from scripts.serve.check_repository import find_faults
from tests.triton_models import BPR, WEIGHT, linear

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("server_verdicts.json").read_text())
# These load, but the requests to them fail: a batch of 3 over the limit of 1, FP16 in JSON
ASKED_OTHERWISE = {"mbs_1", "onnx_fp16_cfg"}
FLOAT = TensorProto.FLOAT


def value(name: str, shape: list[int | str] | None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def graph(
    nodes: list[onnx.NodeProto],
    output: onnx.ValueInfoProto | None = None,
    *,
    given: onnx.ValueInfoProto | None = None,
    opset: int = 20,
    domain: str = "",
    weights: list[onnx.TensorProto] | None = None,
) -> onnx.ModelProto:
    """Return a model: `h` (N, 3) = `input` (N, 8) @ `weight`, then `nodes`."""
    first = [] if given else [helper.make_node("MatMul", ["input", "weight"], ["h"])]
    own = [] if given else [numpy_helper.from_array(WEIGHT, "weight")]
    made = helper.make_graph(
        [*first, *nodes],
        "g",
        [given or value("input", ["N", 8])],
        [output or value("output", ["N", 3])],
        [*own, *(weights or [])],
    )
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def node(name: str, *inputs: str, domain: str = "", **attributes: Any) -> list[onnx.NodeProto]:
    return [helper.make_node(name, list(inputs or ["h"]), ["output"], domain=domain, **attributes)]


def changed(model: onnx.ModelProto, change: Any) -> onnx.ModelProto:
    change(model)
    return model


def external(location: str = "weights.data", offset: int = 0) -> onnx.ModelProto:
    model = linear()
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, text in (("location", location), ("offset", str(offset)), ("length", "96")):
        weight.external_data.add(key=key, value=text)
    return model


def bfloat16() -> onnx.ModelProto:
    half = helper.make_tensor("half", TensorProto.BFLOAT16, [3, 3], [1.0] * 9)
    cast = helper.make_node("Cast", ["h"], ["small"], to=TensorProto.BFLOAT16)
    product = helper.make_node("MatMul", ["small", "half"], ["product"])
    return graph([cast, product, *node("Cast", "product", to=FLOAT)], weights=[half])


def model_of(case: str) -> onnx.ModelProto:
    """Return the ONNX model of a case."""
    for prefix, field in (("onnx_opset", "opset"), ("onnx_ir", "ir")):
        if case.startswith(prefix) and case.removeprefix(prefix).isdigit():
            return linear(**{field: int(case.removeprefix(prefix))})
    strings = [value(name, ["N", 8], TensorProto.STRING) for name in ("input", "output")]
    deep = [value(name, ["N", 8, 1, 1, 1, 1, 1]) for name in ("input", "output")]
    shape = numpy_helper.from_array(np.array([1, 3], np.int64), "shape")
    axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
    sequence = helper.make_tensor_sequence_value_info("output", FLOAT, None)
    models: dict[str, Any] = {
        "onnx_fixed1_mbs1": lambda: linear(rows=1),
        "onnx_fixed1_mbs0": lambda: linear(rows=1),
        "onnx_fixed4": lambda: linear(rows=4),
        "onnx_symbolic_feat": lambda: linear(features="F"),
        "onnx_symbolic_cls": lambda: linear(classes="C"),
        "onnx_symbolic_cls_cfgvar": lambda: linear(classes="C"),
        "onnx_out_noshape": lambda: graph(node("Identity"), value("output", None)),
        "onnx_in_noshape": lambda: changed(linear(), lambda m: m.graph.input[0].type.tensor_type.ClearField("shape")),
        "onnx_out_lies5_cfg5": lambda: linear(classes=5),
        "onnx_fp16": lambda: linear(kind=TensorProto.FLOAT16),
        "onnx_fp16_cfg": lambda: linear(kind=TensorProto.FLOAT16),
        "onnx_bf16_in": lambda: linear(kind=TensorProto.BFLOAT16),
        "onnx_extra_input": lambda: linear(extra=True),
        "onnx_ms_gelu": lambda: graph(node("Gelu", domain="com.microsoft"), domain="com.microsoft"),
        "onnx_ai_onnx_ml": lambda: graph(
            node("Scaler", domain="ai.onnx.ml", offset=[0.0], scale=[1.0]), domain="ai.onnx.ml"
        ),
        "onnx_unused_foreign_domain": lambda: graph(node("Identity"), domain="org.example"),
        "onnx_unknown_std_op": lambda: graph(node("NoSuchOp")),
        "onnx_new_op_rmsnorm23": lambda: graph(node("Swish")),
        "onnx_gelu_opset20": lambda: graph(node("Gelu")),
        "onnx_nokernel_bf16_matmul": bfloat16,
        "onnx_dup_output_def": lambda: graph([*node("Identity"), *node("Relu")]),
        "onnx_dup_init": lambda: changed(linear(), lambda m: m.graph.initializer.append(m.graph.initializer[0])),
        "onnx_short_weight": lambda: changed(
            linear(), lambda m: setattr(m.graph.initializer[0], "raw_data", m.graph.initializer[0].raw_data[:-4])
        ),
        "onnx_init_also_input": lambda: changed(linear(), lambda m: m.graph.input.append(value("weight", [8, 3]))),
        "onnx_ext_missing": external,
        "onnx_ext_short": external,
        "onnx_ext_up": lambda: external("../weights.data"),
        "onnx_ext_offset_beyond": lambda: external(offset=4096),
        "onnx_seq_out": lambda: graph(node("SequenceConstruct"), sequence),
        "onnx_string": lambda: graph(node("Identity", "input"), strings[1], given=strings[0]),
        "onnx_scalar_out": lambda: graph(node("ReduceSum", keepdims=0), value("output", [])),
        "onnx_scalar_out_mbs0": lambda: graph(node("ReduceSum", keepdims=0), value("output", [])),
        "onnx_out_N_only_dims1": lambda: graph(
            node("ReduceSum", "h", "axes", keepdims=0), value("output", ["N"]), weights=[axes]
        ),
        "onnx_7d": lambda: graph(node("Relu", "input"), deep[1], given=deep[0]),
        "onnx_dead_node": lambda: graph([*node("Identity"), helper.make_node("Relu", ["h"], ["unused"])]),
        "onnx_bakes_batch1": lambda: graph(node("Reshape", "h", "shape"), weights=[shape]),
    }
    assert case in models or not case.startswith("onnx"), f"{case}: no model for it"
    return models[case]() if case in models else linear()


PYTHON = {
    "py_syntax": "def (\n",
    "py_noclass": "x = 1\n",
    "py_noexecute": BPR.replace("execute", "run"),
    "py_import_error": "import nosuchmodule\n" + BPR,
    "py_empty": "",
    "py_imported_class": "from helper2 import TritonPythonModel\n",
    "py_alias": BPR.replace("TritonPythonModel", "Model") + "\n\nTritonPythonModel = Model\n",
    "py_async_execute": BPR.replace("def execute", "async def execute"),
    "py_match": BPR.replace(
        "        tensor", "        match 1:\n            case _:\n                pass\n        tensor"
    ),
}


def lay(root: Path, case: dict[str, Any]) -> None:
    """Write a case's folder."""
    name, config = case["case"], case["config"]
    if config is None:  # the case's name holds a parameter
        key, _, text = name.removeprefix("par_").rpartition("_")
        good = CASES[0]["config"].replace('"good"', f'"{name}"')
        config = f'{good}parameters {{ key: "{key}" value: {{ string_value: "{text}" }} }}\n'
    encoding = "latin-1" if name.startswith("txt_latin1") else "utf-8"
    for file in case["files"] or ["1/model.onnx", "config.pbtxt"]:
        path = root / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".onnx", ".bin"):
            onnx.save(model_of(name), path)
        elif path.name == "config.pbtxt":
            path.write_bytes(config.encode(encoding, "replace"))
        elif path.name == "model.py":
            path.write_text(PYTHON.get(name, BPR))
        elif path.name == "weights.data":
            path.write_bytes(bytes(10 if name == "onnx_ext_short" else 96))
        else:
            beside = {"helper.py": "TAG = 'CHEST'\n", "helper2.py": BPR, "unused.py": "type X[T] = list[T]\n"}
            path.write_text(beside.get(path.name, "a\nb\nc\n"))
    damages: dict[str, tuple[str, bytes]] = {
        "vp_spec1_2bad": ("2/model.onnx", linear().SerializeToString()[:60]),
        "two_versions_2bad": ("2/model.onnx", linear().SerializeToString()[:60]),
        "file_empty": ("1/model.onnx", b""),
        "file_text": ("1/model.onnx", b"<html>404</html>"),
    }
    if name in damages:
        (root / name / damages[name][0]).write_bytes(damages[name][1])
    if name == "two_versions_2empty":
        (root / name / "2").mkdir()


@pytest.mark.parametrize("case", CASES, ids=[case["case"] for case in CASES])
def test_the_checkers_verdict_is_the_servers(tmp_path: Path, case: dict[str, Any]) -> None:
    root = tmp_path / "repo"
    lay(root, case)
    found = find_faults(root, gpu=False)
    if case["case"] in ASKED_OTHERWISE:
        assert found.recommendations and not found.faults
    else:
        assert (case["server"][0] == "OK") == (not found.faults), (case["server"], found)


def test_the_verdicts_are_of_both_kinds() -> None:
    served = sum(case["server"][0] == "OK" for case in CASES)
    assert (served, len(CASES)) == (109, 266)
