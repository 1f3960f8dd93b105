"""PRECISION=tf32 and fp16: a file for GPUs, rounded where the range allows, compared, published under the same name."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from conftest import REPOSITORY, ROOT, Project
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from convertation.fp16 import round_model
from convertation.onnx_file import write_model
from scripts.convert.compare_fp16 import compare_fp16
from scripts.convert.emulate_fp16 import emulated_file
from scripts.convert.round_fp16 import measure_largest, round_fp16
from scripts.convert.sample import make_sample

TF32 = "build/onnx/vit.tf32.onnx"
FP16 = "build/onnx/vit.fp16.onnx"
MODEL, CONFIG = "vit_onnx/1/model.onnx", "vit_onnx/config.pbtxt"
PRODUCTS = ("MatMul", "Gemm", "Conv")


@pytest.fixture(scope="module")
def made(built: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the built tiny project in which all precisions of the ViT are made and compared; tests only read it."""
    copy = Project(tmp_path_factory.mktemp("fp16") / "project")
    shutil.copytree(built.path, copy.path, symlinks=True, copy_function=shutil.copy)
    copy.make("onnx", "MODEL=vit", "PRECISION=fp16")
    return copy


@pytest.fixture(scope="module")
def files(made: Project) -> tuple[Path, Path]:
    """The tiny ViT for a GPU, in float32 and in fp16."""
    return made.path / TF32, made.path / FP16


def entry_of(made: Project) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((made.path / "build/models/vit.json").read_text())
    return entry


def small(folder: Path, weight: NDArray[np.float32]) -> Path:
    """Write a file with one product by `weight`, then another product, and its ArgMax."""
    nodes = [
        helper.make_node("MatMul", ["input", "weight"], ["moved"], name="node_moved"),
        helper.make_node("MatMul", ["moved", "rows"], ["cosines"], name="node_cosines"),
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


def is_weight(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    return node.input[1] in {weight.name for weight in model.graph.initializer}


def comes_from(node: onnx.NodeProto, name: str, makers: dict[str, onnx.NodeProto]) -> bool:
    """Tell whether `node` takes the value `name` through nodes that move it and the attention's product only."""
    value = node.input[0]
    while (maker := makers.get(value)) is not None and value != name:
        weighing = maker.op_type == "MatMul" and maker.input[1] in makers
        if not weighing and maker.op_type not in ("Reshape", "Transpose"):
            return False
        value = maker.input[1 if weighing else 0]
    return value == name


def rounded(model: Path, largest: float = 1.0, **named: float) -> tuple[onnx.ModelProto, list[str]]:
    """Return a small model in fp16 and the nodes kept in float32 by their range; `named`: largest of some values."""
    ours = onnx_ir.load(model)
    ranges = dict.fromkeys(("input", "moved", "cosines", "output"), largest)
    kept = round_model(ours, ranges | named)
    write_model(ours, model.with_name("rounded.onnx"), {})
    return onnx.load(model.with_name("rounded.onnx")), kept


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every value of a model, as ONNX's own inference finds it."""
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


def test_all_is_fp16_but_the_norm_of_pixels_and_what_the_quantiser_is_asked(files: tuple[Path, Path]) -> None:
    model = onnx.load(files[1])
    kind, makers = types(model), {name: node for node in model.graph.node for name in node.output}

    exact = [
        node.op_type
        for node in model.graph.node
        if kind[node.output[0]] == TensorProto.FLOAT and node.op_type not in ("Reshape", "Transpose", "Cast")
    ]

    # each patch loses its mean, then its norm; after all layers the norm of tokens, and their similarities
    assert exact == ["ReduceMean", "Sub", "LayerNormalization", "LayerNormalization", "MatMul"]
    (quantiser,) = (node for node in model.graph.node if node.op_type == "ArgMax")
    assert kind[makers[quantiser.input[0]].input[0]] == TensorProto.FLOAT
    assert [node.op_type for node in model.graph.node].count("Cast") == 3
    assert sum(node.op_type in PRODUCTS for node in model.graph.node) > 20
    assert {"Softmax", "Pow", "Sqrt", "Div", "Gelu"} <= {node.op_type for node in model.graph.node}


def test_no_value_of_another_type_is_left(files: tuple[Path, Path]) -> None:
    """TensorRT expects this with --stronglyTyped: each operator gets one float type."""
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


def test_the_same_file_gives_the_same_bytes(files: tuple[Path, Path], made: Project, tmp_path: Path) -> None:
    round_fp16(files[0], entry_of(made), tmp_path / "again.onnx")

    assert (tmp_path / "again.onnx").read_bytes() == files[1].read_bytes()


def test_the_similarities_of_the_quantiser_are_exact(tmp_path: Path) -> None:
    """fp16 cannot hold the difference of two rows: 1 + 2**-12 is the nearer one and would become 1."""
    model, _ = rounded(small(tmp_path, np.diag(np.array([1, 1 + 2**-12, 1], np.float32))))

    kind = types(model)

    assert kind["cosines"] == TensorProto.FLOAT
    assert kind["moved"] == TensorProto.FLOAT16


# ── the range ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_largest_of_every_value_is_found_whichever_its_sign(tmp_path: Path) -> None:
    file = small(tmp_path, np.diag(np.array([1, -7, 1], np.float32)))

    found = measure_largest(file, ["input", "moved"], np.array([[1, 2, 3], [-5, 0, 0]], np.float32))

    assert found == {"input": 5.0, "moved": 14.0}


def test_what_is_measured_is_not_kept(tmp_path: Path) -> None:
    """Of 60 values of 16 MB, two or three are in memory at a time; a network of full size would take 12 GB."""
    names = ["input", *(f"value{number}" for number in range(60)), "output"]
    nodes = [helper.make_node("Neg", [one], [other]) for one, other in itertools.pairwise(names)]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1 << 22]) for name in ("input", "output")]
    graph = helper.make_graph(nodes, "main", info[:1], info[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "a.onnx")
    program = f"""if True:
        import resource, sys, numpy
        from pathlib import Path
        from scripts.convert.round_fp16 import measure_largest
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        request, before = numpy.ones((1, 1 << 22), numpy.float32), peak()
        found = measure_largest(Path({str(tmp_path / "a.onnx")!r}), {names!r}, request)
        print(set(found.values()), peak() - before)
    """

    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    ones, grown = said.rsplit(" ", 1)
    assert ones == "{1.0}" and int(grown) < 400


@pytest.mark.parametrize(("largest", "kept"), [(8188.0, []), (8189.0, ["node_moved (MatMul, up to 8.19e+03)"])])
def test_a_value_nearer_than_an_eighth_to_the_largest_of_fp16_keeps_its_node_in_float32(
    tmp_path: Path, largest: float, kept: list[str]
) -> None:
    model, found = rounded(small(tmp_path, np.eye(3, dtype=np.float32)), moved=largest)

    assert found == kept
    assert types(model)["moved"] == (TensorProto.FLOAT if kept else TensorProto.FLOAT16)


def test_an_overflow_between_layers_is_found_and_the_answers_stay(made: Project, tmp_path: Path) -> None:
    """Weights of the attention's values are a million times larger, those after it as much smaller: in float32 the
    network is the same, and in fp16 it would be infinite.
    """
    exact, entry = onnx.load(made.path / TF32), entry_of(made)
    nodes = {name: node for node in exact.graph.node for name in node.output}
    users = [node for node in exact.graph.node if node.op_type == "MatMul"]
    values = next(node for node in users if node.output[0] == "linear_3")
    out = next(node for node in users if comes_from(node, "linear_3", nodes) and is_weight(exact, node))
    for node, factor in ((values, 1e6), (out, 1e-6)):
        weight = next(weight for weight in exact.graph.initializer if weight.name == node.input[1])
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name))
    onnx.save(exact, tmp_path / "exact.onnx")

    kept, largest = round_fp16(tmp_path / "exact.onnx", entry, tmp_path / "rounded.onnx")

    assert kept and all("e+0" in node for node in kept) and largest < 8189
    request = make_sample(entry, 0, 1)
    with emulated_file(tmp_path / "rounded.onnx") as emulated:
        right, ours = (answer(file, request) for file in (tmp_path / "exact.onnx", emulated))
    assert np.abs(ours - right).max() < 0.01 * np.abs(right).max()


def test_a_value_that_is_not_finite_in_float32_is_refused_by_node(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        rounded(small(tmp_path, np.eye(3, dtype=np.float32)), moved=float("nan"))

    assert str(caught.value) == "node_moved (MatMul): its values are not finite, in float32; no fp16 is made of it"


def test_a_weight_beyond_fp16_is_refused_by_node(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        rounded(small(tmp_path, np.diag(np.full(3, 70000, np.float32))))

    assert str(caught.value) == (
        "node_moved (MatMul): its weight weight goes up to 7e+04, the largest of fp16 is 65504; keep this model in fp32"
    )


def test_what_keeps_a_divisor_from_zero_stays_above_it(files: tuple[Path, Path]) -> None:
    """fp16 has no 1e-24, so a token of zeros would be divided by zero."""
    weights = {weight.name: numpy_helper.to_array(weight) for weight in onnx.load(files[1]).graph.initializer}

    (tiny,) = (array for name, array in weights.items() if name == "new_full_fp16")

    assert tiny.dtype == np.float16 and 0 < tiny < 1e-7


# ── as a GPU rounds it ──────────────────────────────────────────────────────────────────────────────────────────────


def answer(file: Path, request: dict[str, NDArray[Any]]) -> NDArray[Any]:
    found: NDArray[Any] = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(
        ["output"], request
    )[0]
    return found


def chain(folder: Path) -> Path:
    """Make input · weight + bias - bias: in fp16 the result shows what each operator rounded."""
    nodes = [
        helper.make_node("MatMul", ["input", "weight"], ["moved"], name="node_moved"),
        helper.make_node("Add", ["moved", "bias"], ["added"], name="node_added"),
        helper.make_node("Sub", ["added", "bias"], ["output"], name="node_output"),
    ]
    info = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1])
        for name in ("input", "moved", "added", "output")
    ]
    weights = [numpy_helper.from_array(np.full(shape, value, np.float32), name)
               for name, shape, value in (("weight", (1, 1), 1), ("bias", (1,), 2048))]  # fmt: skip
    graph = helper.make_graph(nodes, "main", info[:1], info[3:], weights, value_info=info[1:3])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "chain.onnx"
    )
    return folder / "chain.onnx"


def test_each_operator_is_rounded_where_onnx_runtime_on_a_cpu_rounds_none(tmp_path: Path) -> None:
    """From 2048 on fp16 has only even numbers: 3 + 2048 is 2052, and 1 + 2048 is 2048."""
    model = onnx_ir.load(chain(tmp_path))
    round_model(model, dict.fromkeys(("input", "moved", "added", "output"), 1.0))
    write_model(model, tmp_path / "rounded.onnx", {})
    request = {"input": np.array([[3], [1], [0.1]], np.float32)}

    with emulated_file(tmp_path / "rounded.onnx") as file:
        assert answer(file, request).ravel().tolist() == [4, 0, 0]
    assert answer(tmp_path / "rounded.onnx", {"input": request["input"][:2]}).ravel().tolist() == [3, 1]


def test_an_overflow_is_infinite_there(tmp_path: Path) -> None:
    model = onnx_ir.load(chain(tmp_path))
    round_model(model, dict.fromkeys(("input", "moved", "added", "output"), 1.0))
    write_model(model, tmp_path / "rounded.onnx", {})

    with emulated_file(tmp_path / "rounded.onnx") as file:
        assert answer(file, {"input": np.array([[65000]], np.float32)}).item() == np.inf


def test_answers_differ_by_what_rounding_explains(files: tuple[Path, Path], made: Project) -> None:
    request = make_sample(entry_of(made), 0, 1)

    with emulated_file(files[1]) as file:
        ours, theirs = answer(file, request), answer(files[0], request)

    assert 0 < np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()


# ── the comparison ──────────────────────────────────────────────────────────────────────────────────────────────────


LIMITS = {"output": 0.1, "served": 0.1, "gpu": 0.2, "cosine": 0.99, "probability": 0.01}


def compared(made: Project, exact: Path, rounded: Path, **limits: float) -> dict[str, Any]:
    check = json.loads((made.path / "build/checks/vit.tf32.json").read_text())
    heads = {head: made.path / f"{REPOSITORY}/{head}_onnx/1/model.onnx" for head in ("binary", "multilabel")}
    return compare_fp16(check, entry_of(made), LIMITS | limits, exact, rounded, heads)


def test_the_report_says_what_was_compared_and_how_far_apart_they_are(made: Project) -> None:
    report = json.loads((made.path / "build/checks/vit.fp16.json").read_text())

    assert report["compared"] == "fp16 as a GPU rounds it, emulated on the CPU"
    assert 0 < report["difference_99_9"] <= report["difference"] < 0.1
    assert report["cosine"] > 0.999
    names = ["as a GPU rounds it", "on a CPU", "by ONNX Runtime 1.19.2 as deployed"]
    assert list(report["differences"]) == list(report["codes"]["flipped_by"]) == names
    assert report["codes"]["compared"] == 2 * 2 * 2 * 2  # two volumes, grid 2 × 2 × 2
    assert 0 < report["probabilities"]["multilabel"]["difference"] < 1e-3
    assert report["probabilities"]["multilabel"]["compared"] == 2 * 20
    assert [answer["batch"] for answer in report["served"]] == [1, 2]
    first = report["served"][0]
    assert first["allowed"] == first["allowed_gpu"] == pytest.approx(0.14 * report["scale"])


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"output": 1e-6}, "output as a GPU rounds it, most at .* differs from .*'s by .* expected at most 1e-06"),
        ({"cosine": 1 - 1e-12}, "cosine of an embedding, as a GPU rounds it, is .*; expected at least 1"),
        ({"probability": 1e-12}, "a probability of binary moves by .*, as a GPU rounds it; expected at most 1e-12"),
    ],
)
def test_a_difference_beyond_a_tolerance_ends_it(
    files: tuple[Path, Path], made: Project, limits: dict[str, float], expected: str
) -> None:
    with pytest.raises(SystemExit, match=expected):
        compared(made, *files, **limits)


def test_a_file_of_another_checkpoint_ends_it(files: tuple[Path, Path], made: Project, tmp_path: Path) -> None:
    model = onnx.load(files[1])
    for weight in model.graph.initializer:
        if "projection" in weight.name:
            weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    onnx.save(model, tmp_path / "other.onnx")

    with pytest.raises(SystemExit, match=r"differs from .*vit\.tf32\.onnx's by"):
        compared(made, files[0], tmp_path / "other.onnx")


def test_a_value_that_overflows_on_a_gpu_alone_ends_it(files: tuple[Path, Path], made: Project, tmp_path: Path) -> None:
    """A CPU computes it in float32 and answers without an error."""
    model = onnx.load(files[1])
    down = [weight for weight in model.graph.initializer if "gains.0" in weight.name]
    for weight in down:
        weight.CopyFrom(numpy_helper.from_array(np.full(list(weight.dims), 60000, np.float16), weight.name))
    onnx.save(model, tmp_path / "overflow.onnx")

    with pytest.raises(SystemExit, match=r"values of .* as a GPU rounds it by ONNX Runtime are NaN or infinite"):
        compared(made, files[0], tmp_path / "overflow.onnx")


# ── the build ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_a_repository_in_another_precision_has_the_same_models_and_back_again(project: Project, precision: str) -> None:
    before = project.published()
    knob = f"PRECISION={precision}"

    needed = {f"build/onnx/vit.{precision}.onnx", f"build/checks/vit.{precision}.json", "build/checks/verdict.json"}
    assert project.steps(knob) >= needed
    other = project.published()
    assert set(other) == set(before)
    assert {name for name in before if before[name] != other[name]} == {MODEL, CONFIG}
    assert b'key: "use_tf32" value: "1"' in other[CONFIG]
    if precision == "fp16":
        assert len(other[MODEL]) < len(before[MODEL])
    assert project.steps(knob) == set()
    assert "vit_onnx: READY" in project.make("verify")
    assert "nothing to do" in project.make("status")

    assert precision not in project.make("onnx", "MODEL=vit", "PRECISION=fp32")  # the other is there, too
    project.make("repository")
    assert project.published() == before


def test_the_config_of_tf32_differs_in_that_alone() -> None:
    ours, other = ((ROOT / f"convertation/vit/{name}").read_text() for name in ("config.pbtxt", "config.tf32.pbtxt"))

    def without(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("# On a GPU: ")]

    assert without(other) == [line.replace('"use_tf32" value: "0"', '"use_tf32" value: "1"') for line in without(ours)]
    assert without(other) != without(ours)


def test_heads_and_bpr_have_no_other_precision(stand_ins: Project) -> None:
    stand_ins.make("onnx", "PRECISION=fp16")

    names = sorted(path.name for path in (stand_ins.path / "build/onnx").glob("*.*.onnx"))
    assert names == ["vit.fp16.onnx", "vit.tf32.onnx"]


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_another_precision_of_a_finished_archive_is_refused(stand_ins: Project, precision: str) -> None:
    said = stand_ins.fail("repository", "FROM=prebuilt", f"PRECISION={precision}")

    assert f"PRECISION={precision} is for models built here, not for FROM=prebuilt; leave one of them out" in said


def test_an_unknown_precision_is_refused(stand_ins: Project) -> None:
    assert "PRECISION=int8: expected one of fp32 tf32 fp16" in stand_ins.fail("repository", "PRECISION=int8")
