"""`make fidelity` on tiny networks with the real Triton, and each figure on answers with known faults."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import Project, announced
from google.protobuf import text_format
from onnx import numpy_helper
from tritonclient.grpc import model_config_pb2 as schema

from scripts.convert.probabilities import compute_probabilities, find_changed, normalise_rows
from scripts.convert.sample import make_sample
from scripts.show import fidelity, fidelity_table
from scripts.show.fidelity import measure_hop
from scripts.show.hops import (
    Answers,
    Task,
    draw_volumes,
    make_plan_config,
    make_request,
    run_onnxruntime,
    run_plan,
    run_pytorch,
)

NO_TIES = np.zeros((0, 1))


def load(project: Project) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project.path / "build/fidelity.json").read_text())
    return found


def entries(project: Project) -> dict[str, Any]:
    names = ("vit", "binary", "multilabel")
    return {name: json.loads((project.path / f"build/models/{name}.json").read_text()) for name in names}


def task(project: Project) -> Task:
    return Task(entries(project), draw_volumes(entries(project)["vit"]))


def files(project: Project, **others: Path) -> dict[str, Path]:
    """The published ONNX files, or `others` in their place."""
    repository = project.path / "model_repository_running"
    return {name: repository / f"{name}_onnx/1/model.onnx" for name in ("vit", "binary", "multilabel")} | others


def checkpoints(project: Project) -> dict[str, Path]:
    found = {name: project.path / "build/synthetic" / entry["checkpoint"] for name, entry in entries(project).items()}
    return {name: Path(str(path).replace("{VIT}", "LiPro")) for name, path in found.items()}


def altered(path: Path, out: Path, change: Any) -> Path:
    """Write a copy of an ONNX file whose weights `change(name, array)` changed in place."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        change(tensor.name, values)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, out)
    return out


# --- The whole -----------------------------------------------------------------


def test_every_hop_that_exists_is_measured_on_eight_volumes(measured: Project) -> None:
    found = load(measured)

    assert found["weights"] == "synthetic" and found["volumes"] == 8
    hops = {hop["hop"]: hop for hop in found["hops"]}
    deployed = ["ONNX Runtime 1.19.2 of .venv-triton", "ONNX Runtime 1.22.0 of .venv-inference"]
    assert list(hops) == ["ONNX, batch 1", "ONNX, batch 4", *deployed, "fp16 as a GPU rounds it", "plan", "served"]
    for name in ("ONNX, batch 1", "ONNX, batch 4", *deployed, "served"):
        hop = hops[name]
        assert 0 <= hop["embedding"]["p999"] <= hop["embedding"]["max"] < 1e-5, name
        assert sum(hop["embedding"]["histogram"]) == 8 * 24
        assert 0 <= hop["cosine_distance"] < 1e-10
        assert {head: len(score["values"]) for head, score in hop["probabilities"].items()} == {
            "binary": 8,
            "multilabel": 8,
        }
        assert all(score["max"] < 1e-5 and score["changed"] == [] for score in hop["probabilities"].values())
    assert all(hops[name]["codes"]["compared"] == 64 for name in deployed)
    assert hops["ONNX, batch 4"]["against"] == "ONNX, batch 1" and hops["served"]["against"] == "PyTorch"
    assert hops["ONNX, batch 1"]["codes"]["compared"] == sum(found["token_margins"]) == 8 * 2 * 2 * 2
    assert hops["served"]["codes"] is None


def test_a_hop_that_does_not_exist_is_named_with_the_reason(measured: Project) -> None:
    absent = {hop["hop"]: hop["absent"] for hop in load(measured)["hops"] if "absent" in hop}

    assert absent == {
        "fp16 as a GPU rounds it": "not built: make onnx PRECISION=fp16",
        "plan": "not built: make trt on a machine with a GPU",
    }


def test_fp16_is_measured_as_a_gpu_rounds_it(project: Project) -> None:
    project.make("onnx", "MODEL=vit", "PRECISION=fp16")
    project.make("fidelity")

    (hop,) = (hop for hop in load(project)["hops"] if hop["hop"] == "fp16 as a GPU rounds it")
    assert 1e-5 < hop["embedding"]["p999"] <= hop["embedding"]["max"] and hop["codes"]["compared"] == 64


def test_the_volumes_have_the_statistics_of_ct(measured: Project) -> None:
    tissue = load(measured)["tissue"]

    assert tissue["air and padding"] > 0.3 and tissue["soft tissue"] > 0.1
    assert tissue["lung"] > 0.05 and tissue["bone"] > 0.01


def test_it_is_shown_as_a_table_stamped_synthetic_and_kept(measured: Project) -> None:
    said = measured.make("fidelity")  # for the second time: nothing has changed

    lines = said.splitlines()
    assert announced(said) == set()
    assert lines[0] == "SYNTHETIC weights: this shows that the programs work, and says nothing about diagnoses"
    assert re.sub(" +", " ", lines[2]) == (
        "hop against embedding: max 99.9 % 1 - cosine codes flipped widest margin "
        "binary probability multilabel probability decisions changed"
    )
    assert re.match(r"ONNX, batch 1 +PyTorch +\d\.\de-\d\d .* 0 of 64 +- .* 0 of 168$", lines[3])
    assert "plan: not built: make trt on a machine with a GPU" in lines


def test_it_is_measured_again_only_if_an_input_changes(stand_ins: Project) -> None:
    goal = "build/fidelity.json"
    assert announced(stand_ins.make(goal)) == {goal}
    assert announced(stand_ins.make(goal)) == set()

    stand_ins.append("scripts/convert/probabilities.py", "# a remark\n")
    assert announced(stand_ins.make(goal)) == {goal}

    (stand_ins.path / "build/onnx").mkdir(exist_ok=True)
    (stand_ins.path / "build/onnx/vit.fp16.onnx").write_text("another hop")
    assert goal in announced(stand_ins.make(goal))
    assert "fp16/vit " in (stand_ins.path / goal).read_text()

    plan = stand_ins.path / "build/plan/RTX/vit.plan"
    plan.parent.mkdir(parents=True)
    plan.write_text("and another")
    assert goal in announced(stand_ins.make(goal))
    assert "plan/RTX/vit " in (stand_ins.path / goal).read_text()


def test_the_volumes_are_those_of_make_sample(built: Project) -> None:
    entry = entries(built)["vit"]
    assert (make_request(task(built), [0]) == make_sample(entry, 1, 1)["input"]).all()


# --- Each figure ----------------------------------------------------------------


def test_flips_of_another_network_are_not_taken_for_near_ties(built: Project, tmp_path: Path) -> None:
    def swap(name: str, values: Any) -> None:
        if values.shape == (32, 64):  # the codebook's directions, transposed
            values[:] = values[:, ::-1]

    other = altered(files(built)["vit"], tmp_path / "swapped.onnx", swap)
    right = run_onnxruntime(task(built), "right", files(built), 4)
    wrong = run_onnxruntime(task(built), "wrong", files(built, vit=other), 4)
    assert right.codes is not None and wrong.codes is not None

    exact, flips, ties, shared = run_pytorch(task(built), checkpoints(built), {"wrong": (None, wrong.codes)})
    found = measure_hop(exact, wrong, float(np.abs(exact.embedding).max()), flips["wrong"], ties, shared["rounding"])

    codes = found["codes"]
    assert codes["flipped"] == int((right.codes != wrong.codes).sum()) == sum(codes["per_volume"]) > 50
    assert codes["beyond_rounding"] == codes["flipped"] and max(codes["margins"]) > 0.01 > shared["rounding"]
    assert sum(codes["histogram"]) == codes["flipped"]
    assert found["embedding"]["max"] > 0.01 and found["cosine_distance"] > 1e-4


def test_a_decision_that_changes_is_named() -> None:
    before = Answers(np.ones((2, 3)), None, {"binary": np.array([[0.4], [0.6]])})
    after = Answers(np.ones((2, 3)), None, {"binary": np.array([[0.45], [0.49]])})

    found = measure_hop(before, after, 1.0, None, [NO_TIES] * 2, 0.0)

    score = found["probabilities"]["binary"]
    assert score["changed"] == [[1, 0]] and score["max"] == pytest.approx(0.11)
    assert found["embedding"]["max"] == 0 and found["codes"] is None
    assert found["near_ties"] == {"explain": 0, "per_volume": [0, 0], "remains": 0.0}


def test_unseen_flips_are_found_in_the_embedding() -> None:
    generator = np.random.default_rng(0)
    ties = [0.01 * generator.standard_normal((20, 64)) for _ in range(2)]
    before = Answers(generator.standard_normal((2, 64)), None, {})
    after = Answers(before.embedding + np.stack([ties[0][3] + ties[0][11], np.full(64, 1e-7)]), None, {})

    found = measure_hop(before, after, 1.0, None, ties, 0.0)

    assert found["near_ties"]["per_volume"] == [2, 0] and found["near_ties"]["explain"] == 2
    assert found["near_ties"]["remains"] == pytest.approx(1e-7) and found["embedding"]["max"] > 0.01


def test_an_overflow_is_reported(built: Project, tmp_path: Path) -> None:
    def overflow(name: str, values: Any) -> None:
        if name.endswith("columns.0"):
            values[:] = np.finfo(np.float32).max

    other = altered(files(built)["vit"], tmp_path / "overflow.onnx", overflow)
    hop = run_onnxruntime(task(built), "overflow", files(built, vit=other), 4)

    assert re.fullmatch(
        r"\d+ of 192 values of the embeddings are NaN or infinite: the computation overflows",
        measure_hop(hop, hop, 1.0, None, [NO_TIES] * 8, 0.0)["broken"],
    )


def test_a_tiny_cosine_distance_keeps_its_digits() -> None:
    before = Answers(np.array([[3.0, 4.0]]), None, {})
    after = Answers(np.array([[3.0, 4.0 + 1e-9]]), None, {})

    found = measure_hop(before, after, 5.0, None, [NO_TIES], 0.0)
    assert found["cosine_distance"] == pytest.approx((0.6e-9 / 5) ** 2 / 2, rel=1e-3)


def test_a_plan_without_a_gpu_or_an_image_is_absent_for_that_reason(built: Project) -> None:
    plans = {"vit": Path("build/plan/RTX/vit.plan")}

    assert run_plan(Task(entries(built), []), "plan/RTX", plans).absent == "no GPU on this machine"
    assert "IMAGE=" in run_plan(Task(entries(built), [], gpu=True), "plan/RTX", plans).absent


def test_a_plan_is_served_with_the_shapes_of_models_yaml(built: Project) -> None:
    config = text_format.Parse(make_plan_config(entries(built)["vit"]), schema.ModelConfig())

    assert (config.name, config.platform, config.max_batch_size) == ("vit_plan", "tensorrt_plan", 4)
    assert list(config.input[0].dims) == [1, 20, 40, 40] and list(config.output[0].dims) == [24]


def test_probabilities_are_those_of_the_client() -> None:
    logits = np.array([[0.3, -1.2], [40.0, 41.0]], np.float32)
    assert compute_probabilities(logits)[:, 0] == pytest.approx(torch.from_numpy(logits).softmax(dim=1)[:, 1].numpy())
    many = np.array([[-800.0, 0.0, 3.0, 800.0]])
    assert compute_probabilities(many)[0] == pytest.approx([0.0, 0.5, 1 / (1 + math.exp(-3)), 1.0])


def test_heads_get_unit_vectors() -> None:
    rows = normalise_rows(np.array([[3.0, 4.0], [0.0, 2.0]]))
    assert rows.dtype == np.float32 and rows.tolist() == [pytest.approx([0.6, 0.8]), [0.0, 1.0]]


def test_exactly_half_is_no_finding() -> None:
    assert find_changed(np.array([[0.5, 0.5]]), np.array([[0.51, 0.49]])) == [[0, 0]]


@pytest.mark.parametrize("word", ["onnx/vit", "vit=scripts/show/fidelity.py"])
def test_a_word_that_names_no_hop_is_refused(word: str) -> None:
    with pytest.raises(SystemExit, match=f"{word}: expected HOP/MODEL=FILE"):
        fidelity.parse_files([word])


def test_a_file_that_is_not_there_is_refused_with_the_command_that_makes_it() -> None:
    with pytest.raises(
        SystemExit, match=r"no\.onnx: no such file, expected for onnx/vit; make it with: make repository"
    ):
        fidelity.parse_files(["onnx/vit=no.onnx"])


def test_a_hop_with_nan_has_its_line_in_the_table(measured: Project) -> None:
    found = load(measured)
    found["hops"][0] = {"hop": "ONNX, batch 1", "against": "PyTorch", "broken": "3 of 192 values are NaN"}

    assert "ONNX, batch 1: 3 of 192 values are NaN" in fidelity_table.format_table(found)
