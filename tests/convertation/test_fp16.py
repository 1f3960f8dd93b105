"""convertation/fp16.py and PRECISION=fp16: rounded where that is safe, compared, published under the same names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from conftest import REPOSITORY, Project
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from convertation.fp16 import fp16
from convertation.onnx_file import write
from scripts.convert.compare_fp16 import compare_fp16
from scripts.convert.sample import sample

VIT = "build/onnx/vit.onnx"
FP16 = "build/onnx/vit.fp16.onnx"
PUBLISHED = f"{REPOSITORY}/vit_onnx/1/model.onnx"
NUMBERS = {"LayerNormalization", "Softmax", "ReduceL2", "ReduceMean", "Div", "Clip", "ArgMax"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, built: Project) -> tuple[Path, Path]:
    """The tiny ViT of the build, and the same in fp16."""
    exact, rounded = built.path / PUBLISHED, tmp_path_factory.mktemp("fp16") / "vit.fp16.onnx"
    round_to(exact, rounded)
    return exact, rounded


def round_to(exact: Path, rounded: Path) -> None:
    write(fp16(onnx_ir.load(exact)), rounded, {"weights": "synthetic"})


def small(folder: Path, weight: NDArray[np.float32]) -> Path:
    """A file with one product by `weight` and, after that, one more, of which an ArgMax is taken."""
    nodes = [
        helper.make_node("MatMul", ["input", "weight"], ["moved"]),
        helper.make_node("MatMul", ["moved", "rows"], ["cosines"]),
        helper.make_node("ArgMax", ["cosines"], ["codes"], axis=-1, keepdims=0),
        helper.make_node("Gather", ["rows", "codes"], ["output"]),
    ]
    values = {name: numpy_helper.from_array(array, name) for name, array in (("weight", weight), ("rows", weight))}
    size = weight.shape[0]
    shapes = {"input": ["batch", size], "output": ["batch", size], "moved": ["batch", size], "cosines": ["batch", size]}
    info = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    codes = helper.make_tensor_value_info("codes", TensorProto.INT64, ["batch"])
    graph = helper.make_graph(
        nodes, "main", [info["input"]], [info["output"]], list(values.values()),
        value_info=[info["moved"], info["cosines"], codes],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "small.onnx")
    return folder / "small.onnx"


def types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value of a model, as ONNX's own inference finds them."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    found = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.input, *graph.output]}
    return found | {weight.name: weight.data_type for weight in graph.initializer}


# ── the file ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_inputs_and_outputs_stay_as_clients_know_them(files: tuple[Path, Path]) -> None:
    exact, rounded = (onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in files)

    for theirs, ours in zip(
        exact.get_inputs() + exact.get_outputs(), rounded.get_inputs() + rounded.get_outputs(), strict=True
    ):
        assert (ours.name, ours.type, ours.shape) == (theirs.name, theirs.type, theirs.shape)


def test_the_products_are_fp16_and_what_overflows_is_not(files: tuple[Path, Path]) -> None:
    model = onnx.load(files[1])
    kind = types(model)

    for node in model.graph.node:
        if node.op_type in NUMBERS:
            assert kind[node.input[0]] == TensorProto.FLOAT, node.name
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    exact = [node for node in products if kind[node.output[0]] == TensorProto.FLOAT]
    quantiser = {node.input[0] for node in model.graph.node if node.op_type == "ArgMax"}
    assert len(products) > 20
    assert {node.output[0] for node in exact} == quantiser


def test_no_value_of_another_type_is_left(files: tuple[Path, Path]) -> None:
    """As TensorRT wants it under --stronglyTyped: each operator gets one type of float."""
    model = onnx.load(files[1])
    kind = types(model)

    onnx.checker.check_model(model, full_check=True)
    for node in model.graph.node:
        assert len({kind[name] for name in node.input} & {TensorProto.FLOAT, TensorProto.FLOAT16}) <= 1, node.name


def test_weights_are_stored_once_and_in_the_type_that_is_used(files: tuple[Path, Path]) -> None:
    exact, rounded = (onnx.load(path).graph for path in files)

    large = {weight.name: weight.data_type for weight in rounded.initializer if "projection" in weight.name}
    assert large and set(large.values()) == {TensorProto.FLOAT16}
    used = {name for node in rounded.node for name in node.input}
    assert {weight.name for weight in rounded.initializer} <= used
    assert len(rounded.initializer) <= len(exact.initializer) + 2


def test_the_same_file_gives_the_same_bytes(files: tuple[Path, Path], tmp_path: Path) -> None:
    round_to(files[0], tmp_path / "again.onnx")

    assert (tmp_path / "again.onnx").read_bytes() == files[1].read_bytes()


def test_answers_differ_by_what_rounding_explains(files: tuple[Path, Path], built: Project) -> None:
    entry = json.loads((built.path / "build/models/vit.json").read_text())
    request = sample(entry, 0, 3)

    exact, rounded = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["output"], request)[0]
        for path in files
    )

    assert 0 < np.abs(rounded - exact).max() < 0.01 * np.abs(exact).max()


def test_the_similarities_of_the_quantiser_are_exact(tmp_path: Path) -> None:
    """Two rows whose difference fp16 does not hold: 1 + 2**-12 is nearer, and would be 1."""
    weight = np.diag(np.array([1, 1 + 2**-12, 1], np.float32))
    model = fp16(onnx_ir.load(small(tmp_path, weight)))
    write(model, tmp_path / "rounded.onnx", {})

    kind = types(onnx.load(tmp_path / "rounded.onnx"))

    assert kind["cosines"] == TensorProto.FLOAT
    assert kind["moved"] == TensorProto.FLOAT16


def test_a_weight_beyond_fp16_is_refused_by_name(tmp_path: Path) -> None:
    weight = np.diag(np.full(3, 70000, np.float32))

    with pytest.raises(SystemExit) as caught:
        fp16(onnx_ir.load(small(tmp_path, weight)))

    assert str(caught.value) == "weight: weights beyond 65504, the largest of fp16; keep this model in fp32"


# ── the comparison ──────────────────────────────────────────────────────────────────────────────────────────────────


def compared(built: Project, exact: Path, rounded: Path, tolerance: float = 0.1) -> dict[str, Any]:
    check, entry = (json.loads((built.path / f"build/{name}/vit.json").read_text()) for name in ("checks", "models"))
    return compare_fp16(check, entry, {"output": 1e-4, "served": 1e-4, "fp16": tolerance}, exact, rounded)


def test_the_report_says_what_was_compared_and_how_far_apart_they_are(files: tuple[Path, Path], built: Project) -> None:
    report = compared(built, *files)

    assert report["compared"] == "fp16 weights, on the CPU; what fp16 arithmetic does, a GPU alone shows"
    assert 0 < report["difference_99_9"] <= report["difference"] < 0.1
    assert report["cosine"] > 0.999
    assert report["codes"]["compared"] == 3 * 2 * 2 * 2  # batch 1 and 2, grid 2 × 2 × 2
    assert [answer["batch"] for answer in report["served"]] == [1, 2]
    assert report["served"][0]["allowed"] == pytest.approx(0.1 * report["scale"])


def test_a_difference_beyond_the_tolerance_ends_it(files: tuple[Path, Path], built: Project) -> None:
    with pytest.raises(SystemExit) as caught:
        compared(built, *files, tolerance=1e-6)

    assert f"differs from {files[0]}'s by " in str(caught.value)
    assert "expected at most 1e-06" in str(caught.value)


def test_a_file_of_another_checkpoint_ends_it(files: tuple[Path, Path], built: Project, tmp_path: Path) -> None:
    model = onnx.load(files[1])
    weight = next(weight for weight in model.graph.initializer if "projection" in weight.name)
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    onnx.save(model, tmp_path / "other.onnx")

    with pytest.raises(SystemExit, match=r"differs from .*model\.onnx's by"):
        compared(built, files[0], tmp_path / "other.onnx")


# ── the build ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_repository_in_fp16_has_the_same_models_and_back_again(project: Project) -> None:
    before = project.published()

    assert project.steps("PRECISION=fp16") >= {FP16, "build/checks/vit.fp16.json", "build/checks/verdict.json"}
    rounded = project.published()
    assert set(rounded) == set(before)
    assert {name for name in before if before[name] != rounded[name]} == {"vit_onnx/1/model.onnx"}
    assert len(rounded["vit_onnx/1/model.onnx"]) < len(before["vit_onnx/1/model.onnx"])
    assert project.steps("PRECISION=fp16") == set()

    assert "fp16" not in project.make("onnx", "MODEL=vit")  # the other is there, too
    project.make("repository")
    assert project.published() == before


def test_verify_and_status_know_what_is_published(project: Project) -> None:
    project.make("repository", "PRECISION=fp16")

    assert "vit_onnx: READY" in project.make("verify")
    assert "nothing to do" in project.make("status")


def test_heads_and_bpr_have_no_fp16_variant(stand_ins: Project) -> None:
    stand_ins.make("onnx", "PRECISION=fp16")

    assert sorted(path.name for path in (stand_ins.path / "build/onnx").glob("*.fp16.onnx")) == ["vit.fp16.onnx"]


def test_fp16_of_a_finished_archive_is_refused(stand_ins: Project) -> None:
    said = stand_ins.fail("repository", "FROM=prebuilt", "PRECISION=fp16")

    assert "PRECISION=fp16 is for models built here, not for FROM=prebuilt; leave one of them out" in said


def test_an_unknown_precision_is_refused(stand_ins: Project) -> None:
    assert "PRECISION=int8: expected one of fp32 fp16" in stand_ins.fail("repository", "PRECISION=int8")
