"""scripts/convert/compare.py, compare_vit.py and compare_bpr.py: real exports of tiny networks, with planted faults.

One file, though long: the comparisons of all families share the exports and the ways to plant a fault.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import convertation.bpr.torch2onnx
import convertation.head.torch2onnx
import convertation.vit.torch2onnx
from convertation.vit import ctvit
from scripts.convert import compare as program
from scripts.convert import compare_vit
from scripts.convert.compare import compare_with_pytorch
from scripts.convert.compare_vit import bound_rounding
from scripts.convert.sample import make_sample
from scripts.convert.synthesize import synthesize_checkpoint
from scripts.serve import verdict

ENTRIES: dict[str, dict[str, Any]] = {
    "vit": {
        "name": "vit",
        "family": "vit",
        "network": {
            "dim": 32, "heads": 2, "dim_head": 16, "spatial_depth": 1, "temporal_depth": 1, "patch": [10, 20, 20],
            "codebook": 64,
        },
        "input": [1, 40, 60, 60],
        "output": [24],
        "batch": [1, 2, 4],
    },
    "head": {
        "name": "binary",
        "family": "head",
        "network": {"sizes": [24, 16, 2], "activation": "gelu"},
        "input": [24],
        "output": [2],
        "batch": [1, 4, 8],
    },
    "bpr": {
        "name": "bpr",
        "family": "bpr",
        "network": {"channels": 2},
        "input": [1, 128, 128],
        "output": [],
        "batch": [1, 8, 32],
    },
}  # fmt: skip
EXPORTS = {
    "vit": convertation.vit.torch2onnx.torch2onnx,
    "head": convertation.head.torch2onnx.torch2onnx,
    "bpr": convertation.bpr.torch2onnx.torch2onnx,
}
TOLERANCE = {"output": 1e-4, "served": 1e-4}
POSITION = "network.VIT.enc_temporal_transformer.layers.0.0.dsconv.weight"
PROJECTION = "network.projection_layer.columns.0"


class Case(SimpleNamespace):
    """A checkpoint and its ONNX file."""

    checkpoint: Path
    entry: dict[str, Any]
    onnx: Path

    def compare(self, **tolerance: float) -> dict[str, Any]:
        return compare_with_pytorch(self.checkpoint, self.entry, TOLERANCE | tolerance, self.onnx)

    def faulty(self, folder: Path, change: Callable[[onnx.ModelProto], None]) -> "Case":
        """Return a copy of this case whose ONNX file `change` changed."""
        model = onnx.load(self.onnx)
        change(model)
        onnx.save(model, folder / "faulty.onnx")
        return Case(checkpoint=self.checkpoint, entry=self.entry, onnx=folder / "faulty.onnx")


def make(folder: Path, family: str, change: Callable[[dict[str, Any]], None] = lambda state: None) -> Case:
    """Export a seeded checkpoint that `change` changed before."""
    case = Case(checkpoint=folder / f"{family}.pt", entry=ENTRIES[family], onnx=folder / f"{family}.onnx")
    synthesize_checkpoint(case.entry, case.checkpoint)
    state = torch.load(case.checkpoint, weights_only=True)
    change(state)
    torch.save(state, case.checkpoint)
    if family == "bpr":
        synthesize_checkpoint(case.entry, folder / "inference-settings.json")
    EXPORTS[family](case.checkpoint, case.entry, case.onnx, opset=20, metadata={})
    return case


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make(tmp_path_factory.mktemp("vit"), "vit")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make(tmp_path_factory.mktemp("head"), "head")


@pytest.fixture(scope="module")
def bpr(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make(tmp_path_factory.mktemp("bpr"), "bpr")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, vit: Case) -> tuple[Case, int, int]:
    """A ViT with two codebook rows of one direction and different lengths; one is the most frequent code."""
    often = int(np.bincount(codes(vit).ravel()).argmax())
    other = (often + 1) % 64

    def tie(state: dict[str, Any]) -> None:
        embed = state["VIT.vq._codebook.embed"][0]
        embed[other] = 1.5 * embed[often]

    return make(tmp_path_factory.mktemp("tied"), "vit", tie), often, other


def network(case: Case) -> ctvit.CTViT:
    return ctvit.load_network(case.checkpoint, case.entry)


def codes(case: Case) -> NDArray[np.int64]:
    """PyTorch's codes, computed one sample at a time: the batch size may decide a tie."""
    exact = network(case)
    return np.concatenate([exact.quantise(exact.encode(one[None])).numpy() for one in volumes(case)])


def volumes(case: Case) -> torch.Tensor:
    return torch.from_numpy(make_sample(case.entry, 0, 2)["input"])


def change_weight(names: list[str], change: Callable[[NDArray[Any]], None]) -> Callable[[onnx.ModelProto], None]:
    def apply(model: onnx.ModelProto) -> None:
        tensors = [tensor for tensor in model.graph.initializer if tensor.name in names]
        assert len(tensors) == len(names) > 0
        for tensor in tensors:
            values = numpy_helper.to_array(tensor).copy()
            change(values)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return apply


def change_output(operator: str, value: Any, kind: type = np.float32) -> Callable[[onnx.ModelProto], None]:
    """Apply `operator` with a constant to the output."""

    def apply(model: onnx.ModelProto) -> None:
        producer = next(node for node in model.graph.node if "output" in node.output)
        producer.output[list(producer.output).index("output")] = "before"
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, kind), "fault"))
        model.graph.node.append(helper.make_node(operator, ["before", "fault"], ["output"]))

    return apply


def directions(case: Case) -> list[str]:
    """The initializers between tokens and codes: the normalised codebook, transposed, once or more."""
    graph = onnx.load(case.onnx).graph
    initializers = {tensor.name for tensor in graph.initializer if sorted(tensor.dims) == [32, 64]}
    producer = {output: node for node in graph.node for output in node.output}
    found, values = set(), ["codes"]
    while values:
        value = values.pop()
        if value in initializers:
            found.add(value)
        elif value != "tokens" and value in producer:
            values += producer[value].input
    return sorted(found)


def rows(case: Case) -> list[str]:
    """The initializer from which the codes pick rows: the codebook as stored."""
    graph = onnx.load(case.onnx).graph
    producer = {output: node for node in graph.node for output in node.output}
    (value,) = [node.input[0] for node in graph.node if node.op_type == "Gather" and "codes" in node.input]
    while value in producer:
        value = producer[value].input[0]
    return [value]


def swap(first: int, second: int) -> Callable[[NDArray[Any]], None]:
    def apply(values: NDArray[Any]) -> None:
        axis = values.shape.index(64)
        values.swapaxes(0, axis)[[first, second]] = values.swapaxes(0, axis)[[second, first]]

    return apply


def test_a_vit_passes_and_says_what_a_server_must_answer(vit: Case) -> None:
    result = vit.compare()

    assert result["model"] == "vit" and result["batches"] == [1, 2]
    assert 0 < result["difference"] < result["tolerance"] == 1e-4
    assert result["codes"]["compared"] == 3 * 36 and result["codes"]["flipped"] == 0
    assert result["codes"]["distinct"] > 5
    assert 0 < result["codes"]["tokens_difference"] < 1e-4 and result["codes"]["cosine_error"] < bound_rounding(4032)
    reference = network(vit)(volumes(vit)).numpy()
    assert [(answer["seed"], answer["batch"]) for answer in result["served"]] == [(0, 1), (0, 2)]
    for answer in result["served"]:
        assert np.allclose(answer["output"], reference[: answer["batch"]], rtol=0, atol=1e-6 * result["scale"])
        assert np.allclose(answer["allowed"], 1e-4 * np.abs(reference).max(), rtol=1e-5)


def test_a_head_passes_at_one_and_at_its_usual_batch(head: Case) -> None:
    result = head.compare()

    assert result["batches"] == [1, 4] and result["difference"] < 1e-4
    assert [np.shape(answer["output"]) for answer in result["served"]] == [(1, 2), (4, 2)]


def test_bpr_passes_and_its_tag_is_what_a_server_must_answer(bpr: Case) -> None:
    result = bpr.compare()

    assert result["batches"] == [1, 8] and result["difference"] < 1e-4
    assert [answer["output"] for answer in result["served"]] == [["CHEST"], ["NONE"]]


def test_a_wrong_weight_before_the_quantiser_is_found_in_the_tokens(vit: Case, tmp_path: Path) -> None:
    def fault(values: NDArray[Any]) -> None:
        values[3] *= 1.1

    faulty = vit.faulty(tmp_path, change_weight([POSITION], fault))

    with pytest.raises(SystemExit, match=r"tokens of sample 0 at batch 1, most at \[0, .* differs from PyTorch's by"):
        faulty.compare()


def test_a_wrong_weight_after_the_quantiser_is_found_in_the_output(vit: Case, tmp_path: Path) -> None:
    def fault(values: NDArray[Any]) -> None:
        values[5] *= 1.1

    faulty = vit.faulty(tmp_path, change_weight([PROJECTION], fault))

    with pytest.raises(SystemExit, match=r"output at batch 1, most at \[0, 5\], differs from PyTorch's by"):
        faulty.compare()


def test_codebook_rows_swapped_among_the_values_are_found_in_the_output(vit: Case, tmp_path: Path) -> None:
    used, other = np.unique(codes(vit))[:2]
    faulty = vit.faulty(tmp_path, change_weight(rows(vit), swap(used, other)))

    with pytest.raises(SystemExit, match=r"output at batch 1, .* differs from PyTorch's by"):
        faulty.compare()


@pytest.mark.parametrize("where", ["among the directions", "everywhere"])
def test_a_code_that_flips_with_a_large_margin_is_a_failure(vit: Case, tmp_path: Path, where: str) -> None:
    used, other = np.unique(codes(vit))[:2]
    faulty = vit.faulty(tmp_path, change_weight(directions(vit), swap(used, other)))
    if where == "everywhere":  # the embedding is right, but its codes are wrong
        faulty = faulty.faulty(tmp_path, change_weight(rows(vit), swap(used, other)))

    with pytest.raises(
        SystemExit, match=r"codes of sample \d at batch \d differ, most at .* expected at most .*e-0[567]"
    ):
        faulty.compare()


def test_an_output_may_be_off_by_half_the_tolerance_and_not_by_twice(vit: Case, head: Case, tmp_path: Path) -> None:
    for case in vit, head:
        scale = np.abs(case.compare()["served"][0]["output"]).max()  # of the first sample, compared at batch 1
        half = case.faulty(tmp_path, change_output("Add", 0.5 * 1e-4 * scale)).compare()
        assert 0.4e-4 < half["difference"] < 0.6e-4
        twice = case.faulty(tmp_path, change_output("Add", 2 * 1e-4 * scale))
        with pytest.raises(SystemExit, match=r"output at batch 1, .* of its scale .*; expected at most 0\.0001"):
            twice.compare()


@pytest.mark.parametrize("family", ["vit", "head", "bpr"])
def test_an_error_that_only_larger_batches_show_is_found(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    case: Case = request.getfixturevalue(family)
    faulty = case.faulty(tmp_path, change_output("CumSum", 0, np.int64))  # each row plus those before it

    with pytest.raises(SystemExit, match=r"output at batch [248], .* differs from PyTorch's by"):
        faulty.compare()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_failures(vit: Case, head: Case, tmp_path: Path, value: float) -> None:
    for case in vit, head:
        faulty = case.faulty(tmp_path, change_output("Add", value))
        with pytest.raises(
            SystemExit, match="values of output at batch 1 by ONNX Runtime are NaN or infinite, expected none"
        ):
            faulty.compare()


def test_nan_by_pytorch_is_a_failure_too(tmp_path: Path) -> None:
    def overflow(state: dict[str, Any]) -> None:
        state["layers.4.weight"].mul_(3e38)
        state["layers.1.weight"].mul_(1e6)

    with pytest.raises(SystemExit, match="values of output at batch 1 by PyTorch are NaN or infinite, expected none"):
        make(tmp_path, "head", overflow).compare()


@pytest.mark.parametrize("family", ["vit", "head", "bpr"])
def test_an_output_of_zeros_is_a_failure(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(family)
    faulty = case.faulty(tmp_path, change_output("Mul", 0))

    with pytest.raises(SystemExit, match=r"output at batch [248] by ONNX Runtime does not depend on the input"):
        faulty.compare()


def test_agreement_of_two_constants_is_a_failure(tmp_path: Path) -> None:
    def kill(state: dict[str, Any]) -> None:
        state["layers.4.weight"].zero_()

    with pytest.raises(
        SystemExit, match=r"(?s)output at batch 4 by PyTorch does not .*answers the same for every input"
    ):
        make(tmp_path, "head", kill).compare()


def test_a_wrong_score_is_found(bpr: Case, tmp_path: Path) -> None:
    def fault(values: NDArray[Any]) -> None:
        values += 0.01

    bias = next(tensor.name for tensor in onnx.load(bpr.onnx).graph.initializer if tensor.name.endswith("fc7.bias"))

    with pytest.raises(SystemExit, match=r"output at batch 1, most at \[0\], differs from PyTorch's by"):
        bpr.faulty(tmp_path, change_weight([bias], fault)).compare()


def test_near_ties_are_passed_to_the_verdict_and_the_tolerance_stays_strict(tied: tuple[Case, int, int]) -> None:
    case, often, other = tied

    result = case.compare()

    answer = result["served"][-1]
    assert result["codes"]["near_ties"] == int(np.isin(codes(case), [often, other]).sum())
    assert sum(map(len, answer["flips"])) == result["codes"]["near_ties"]  # one per token
    assert answer["allowed"] == pytest.approx(1e-4 * result["scale"])


def test_flips_of_near_ties_are_accepted_and_reported(tied: tuple[Case, int, int], tmp_path: Path) -> None:
    case, often, other = tied

    def prefer_other(values: NDArray[Any]) -> None:
        values[:, other] = values[:, often] * np.float32(1 + 1e-5)  # more than rounding does

    turned = case.faulty(tmp_path, change_weight(directions(case), prefer_other))
    result = turned.compare()

    report, (_, answer) = result["codes"], result["served"]
    ours = codes(case)
    expected = int((ours[:1] == often).sum() + (ours == often).sum())  # compared at batch 1 and at batch 2
    assert report["flipped"] == expected >= 3 and report["share"] == expected / 108
    assert len(report["margins"]) == min(expected, 20) and max(report["margins"]) < 2 * report[
        "cosine_error"
    ] < 2 * bound_rounding(4032)
    (served,) = onnxruntime.InferenceSession(turned.onnx).run(["output"], {"input": volumes(case).numpy()})
    apart = np.abs(served - np.array(answer["output"]))
    assert apart.max() > 100 * answer["allowed"]
    difference, flips = verdict.compare_answers("vit_onnx", answer, served)
    assert difference < answer["allowed"] and flips == int((ours == often).sum())
    assert report["output_difference"] == pytest.approx(apart.max() / result["scale"], rel=1e-3)
    assert result["difference"] < 1e-5


def test_a_flip_is_allowed_to_move_the_output_exactly_as_it_does(tied: tuple[Case, int, int]) -> None:
    case, often, other = tied
    both = network(case)
    tokens = both.encode(volumes(case)[:1])
    ours = both.quantise(tokens)
    theirs = torch.where(ours == often, other, torch.where(ours == other, often, ours))
    one = (ours != theirs).flatten().nonzero()[0, 0]
    flipped = ours.clone()
    flipped.flatten()[one] = theirs.flatten()[one]

    cosines = compare_vit.measure_cosines(both, tokens, [tokens])
    alone = compare_vit.Cosines(torch.full_like(cosines.margins, 1.0), cosines.error)
    alone.margins[one] = 0.0
    ((first, *_), *_) = compare_vit.find_near_ties(both, tokens, ours, alone)

    change = (both.project(flipped) - both.project(ours))[0].numpy()
    assert np.allclose(first, change, rtol=1e-3, atol=1e-5 * np.abs(change).max())


def test_the_message_says_what_where_how_much_and_what_to_do(head: Case, tmp_path: Path) -> None:
    faulty = head.faulty(tmp_path, change_output("Mul", 2))
    scale = np.abs(head.compare()["served"][0]["output"]).max()

    with pytest.raises(SystemExit) as stopped:
        faulty.compare()

    path, where = faulty.onnx, int(np.abs(head.compare()["served"][0]["output"]).argmax())
    assert str(stopped.value) == (
        f"{path}: output at batch 1, most at [0, {where}], differs from PyTorch's by 1.00e+00 of its scale {scale:.3g};"
        " expected at most 0.0001\n"
        "the file does not compute what the checkpoint does; nothing is written\n"
        f"next: rm {path} && make onnx MODEL=head; if the error stays, suspect torch and onnxruntime"
    )


def test_the_file_of_another_model_is_found_by_its_shape(head: Case, vit: Case, tmp_path: Path) -> None:
    wide = {**head.entry, "network": {**head.entry["network"], "sizes": [24, 16, 3]}}
    synthesize_checkpoint(wide, tmp_path / "wide.pt")
    EXPORTS["head"](tmp_path / "wide.pt", wide, tmp_path / "wide.onnx", opset=20, metadata={})

    with pytest.raises(SystemExit, match=r"output at batch 1 is float32 \[1, 3\], expected float32 \[1, 2\]"):
        Case(checkpoint=head.checkpoint, entry=head.entry, onnx=tmp_path / "wide.onnx").compare()
    with pytest.raises(SystemExit, match="ONNX Runtime does not run it: "):
        Case(checkpoint=vit.checkpoint, entry=vit.entry, onnx=head.onnx).compare()


@pytest.mark.parametrize("content", [None, b"", b"no model at all", "half"])
def test_a_file_that_is_not_a_model_is_reported_in_a_few_lines(
    head: Case, tmp_path: Path, content: bytes | str | None
) -> None:
    path = tmp_path / "bad.onnx"
    if content is not None:
        whole = head.onnx.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)

    with pytest.raises(SystemExit, match=r"bad\.onnx: (ONNX Runtime does not run it|cannot be read)") as stopped:
        Case(checkpoint=head.checkpoint, entry=head.entry, onnx=path).compare()
    assert len(str(stopped.value).splitlines()) <= 3


def test_out_is_written_only_when_both_agree(
    head: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry, tolerance, out = tmp_path / "entry.json", tmp_path / "tolerance.json", tmp_path / "out.json"
    entry.write_text(json.dumps(head.entry))
    tolerance.write_text(json.dumps(TOLERANCE))

    def run(model: Path) -> None:
        arguments = ["compare", head.checkpoint, entry, tolerance, model, out]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        program.main()

    with pytest.raises(SystemExit):
        run(head.faulty(tmp_path, change_output("Mul", 2)).onnx)
    assert not out.exists()

    run(head.onnx)
    assert json.loads(out.read_text()) == head.compare()
    assert "differs from PyTorch by" in capsys.readouterr().out


def test_the_onnx_file_stays_as_it_is(head: Case) -> None:
    before = head.onnx.read_bytes()

    head.compare()

    assert head.onnx.read_bytes() == before
