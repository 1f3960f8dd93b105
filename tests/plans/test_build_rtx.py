"""NVIDIA's TensorRT for RTX accepts the ViT on a CPU; what it refuses, or does not recognise, is named."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import ROOT, Project, announced, copy_of_the_project
from onnx import helper

RTX = ROOT / ".venv-rtx/bin/python3"
pytestmark = pytest.mark.skipif(not RTX.exists(), reason="make .venv-rtx/installed brings TensorRT for RTX")
CARDS, FLEET = ROOT / "scripts/plans/cards.yaml", ROOT / "scripts/plans/fleet.yaml"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, str]:
    """The project with tiny networks (one spatial, one temporal layer), and the output of `make trt CHECK=1` in it."""
    project = copy_of_the_project(tmp_path_factory.mktemp("tiny") / "project")
    (project.path / ".venv-rtx").symlink_to(ROOT / ".venv-rtx")
    shutil.copy(ROOT / ".make/made/.venv-rtx%installed", project.path / ".make/made")
    return project, project.make("trt", "CHECK=1")


@pytest.fixture(scope="module")
def vit(tiny: tuple[Project, str]) -> Path:
    return tiny[0].path / "build/onnx/vit.onnx"


@pytest.fixture(scope="module")
def entry(tiny: tuple[Project, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tiny[0].path / "build/models/vit.json").read_text())
    return found


@pytest.fixture
def graph(vit: Path) -> Any:
    """The ViT's graph, which a test changes."""
    return onnx.load(vit)


def judge(file: Path, entry: dict[str, Any], folder: Path, fleet: Path = FLEET) -> "subprocess.CompletedProcess[str]":
    """Run the step in `folder`; it writes vit.rtx.json there."""
    (folder / "entry.json").write_text(json.dumps(entry))
    command = [RTX, "-m", "scripts.plans.build_rtx", CARDS, fleet, file, "entry.json", "vit.rtx.json"]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def refused(model: Any, entry: dict[str, Any], folder: Path) -> str:
    """Check a changed graph, which must fail with a message and write no record; return the message."""
    onnx.save(model, folder / "planted.onnx")
    run = judge(folder / "planted.onnx", entry, folder)
    assert run.returncode == 1, run.stdout
    assert "Traceback" not in run.stderr
    assert not (folder / "vit.rtx.json").exists()
    return run.stderr


def test_make_checks_each_file_meant_for_a_plan_and_prints_what_fits_each_gpu(tiny: tuple[Project, str]) -> None:
    project, said = tiny
    assert {f"build/checks/{name}.rtx.json" for name in ("vit", "binary", "multilabel")} <= announced(said)
    assert said.endswith("each max_batch_size fits each kind of GPU\n")
    assert "rtx3090" in said
    again = project.make("trt", "CHECK=1", "GPUS=l4")
    assert announced(again) == set()
    assert "l4 " in again and "rtx3090" not in again


def test_make_stops_where_a_config_promises_too_much(tiny: tuple[Project, str]) -> None:
    project, _ = tiny
    cards = (project.path / "scripts/plans/cards.yaml").read_text()
    try:
        project.append("scripts/plans/cards.yaml", 'small: {capability: "8.6", memory: 1}\n')
        said = project.fail("trt", "CHECK=1", "GPUS=small", "MODEL=head")
        assert (
            "convertation/head/binary.pbtxt: max_batch_size is 8; the memory of small (1 GiB) is enough for none"
            in said
        )
    finally:
        (project.path / "scripts/plans/cards.yaml").write_text(cards)


def test_the_vit_is_taken_and_each_of_its_attentions_recognised(tiny: tuple[Project, str], vit: Path) -> None:
    found = json.loads((tiny[0].path / "build/checks/vit.rtx.json").read_text())
    softmaxes = [node for node in onnx.load(vit).graph.node if node.op_type == "Softmax"]
    assert found["attention_nodes"] == 3 * len(softmaxes) >= 6
    assert found["built_for"] == ["8.0", "8.6", "8.9"]
    assert found["not_built_for"] == {
        "h100": "it does not know compute capability 9.0",
        "t4": "it has no float32 products for compute capability 7.5",
    }
    assert found["engine_bytes"] > found["weights_bytes"] > 0 < found["activation_bytes"]
    assert "self-attention" in (tiny[0].path / "build/logs/rtx-vit.log").read_text()


def test_the_same_file_gives_the_same_record(vit: Path, entry: dict[str, Any], tmp_path: Path) -> None:
    judge(vit, entry, tmp_path)
    first = (tmp_path / "vit.rtx.json").read_bytes()
    judge(vit, entry, tmp_path)
    assert (tmp_path / "vit.rtx.json").read_bytes() == first


def test_a_node_that_the_parser_does_not_know_is_named(graph: Any, entry: dict[str, Any], tmp_path: Path) -> None:
    graph.graph.node.append(helper.make_node("Unique", ["output"], ["once"], name="planted"))
    said = refused(graph, entry, tmp_path)
    assert "planted.onnx: TensorRT's parser refuses these nodes" in said
    assert "  Unique, node planted: UNSUPPORTED_NODE\n" in said


def test_an_attention_that_is_not_recognised_is_named(graph: Any, entry: dict[str, Any], tmp_path: Path) -> None:
    """A Relu after the softmax changes no answer, but TensorRT would run the attention as separate products."""
    nodes = graph.graph.node
    index, softmax = next((index, node) for index, node in enumerate(nodes) if node.op_type == "Softmax")
    answer = softmax.output[0]
    softmax.output[0] = "before"
    nodes.insert(index + 1, helper.make_node("Relu", ["before"], [answer], name="planted"))
    said = refused(graph, entry, tmp_path)
    assert "TensorRT accepts it but does not recognise 3 of " in said
    assert softmax.name in said


def without_softmaxes(graph: Any, number: int) -> Any:
    """Replace so many softmaxes by Relus, which changes no shapes; return the graph."""
    for node in [node for node in graph.graph.node if node.op_type == "Softmax"][:number]:
        node.op_type = "Relu"
        del node.attribute[:]
    return graph


def test_products_that_lost_their_softmax_are_named(graph: Any, entry: dict[str, Any], tmp_path: Path) -> None:
    said = refused(without_softmaxes(graph, 1), entry, tmp_path)
    assert "TensorRT accepts it but does not recognise 2 of " in said


def test_a_network_with_fewer_attentions_than_layers_is_refused(
    graph: Any, entry: dict[str, Any], tmp_path: Path
) -> None:
    said = refused(without_softmaxes(graph, 100), entry, tmp_path)
    assert "0 softmaxes and " in said and "expected at least 2 and 4" in said


def test_a_refusal_of_the_builder_is_printed_in_its_words(vit: Path, entry: dict[str, Any], tmp_path: Path) -> None:
    other = entry | {"input": [1, 20, 40, 20]}  # a profile that does not fit the graph
    run = judge(vit, other, tmp_path)
    assert run.returncode == 1
    assert "TensorRT's builder refuses it" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_fleet_that_it_does_not_know_is_refused(vit: Path, entry: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text("common: {time: '1:00'}\nh100: {gres: gpu:1}\nbigbox: {gres: gpu:1}\n")
    run = judge(vit, entry, tmp_path, tmp_path / "fleet.yaml")
    assert run.returncode == 1
    assert "builds for none of its kinds of GPU" in run.stderr
    assert "bigbox: scripts/plans/cards.yaml has no compute capability for it" in run.stderr
