"""`make graph`: every artifact with its script, coloured by its state, as an SVG."""

import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import REPOSITORY, Project

needs_dot = pytest.mark.skipif(not shutil.which("dot"), reason="Graphviz is not installed here (apt install graphviz)")
FRESH, STALE, MAY, ABSENT = "#cfe8cf", "#f7c1b8", "#ffe7a8", "#f4faf4"
SVG = "{http://www.w3.org/2000/svg}"


def nodes(project: Project, *args: str) -> dict[str, tuple[str, list[str]]]:
    """Draw; return each node's colour and its lines of text."""
    assert project.make("graph", *args) == "build/graph.svg\n"
    drawn: dict[str, tuple[str, list[str]]] = {}
    for group in ElementTree.parse(project.path / "build/graph.svg").iter(f"{SVG}g"):
        if group.get("class") == "node":
            title, path = group.find(f"{SVG}title"), group.find(f".//{SVG}path")
            assert title is not None and title.text and path is not None
            drawn[title.text] = path.get("fill", ""), [text.text or "" for text in group.iter(f"{SVG}text")]
    return drawn


@needs_dot
def test_each_artifact_is_a_node_that_names_its_script(stand_ins: Project) -> None:
    drawn = nodes(stand_ins)
    assert drawn["build/onnx/vit.onnx"] == (FRESH, ["vit.onnx", "convertation/vit/torch2onnx.py"])
    assert drawn["build/checks/verdict.json"] == (FRESH, ["checks/verdict.json", "scripts/verdict.py"])
    assert drawn[f"{REPOSITORY}/bpr_model"] == (FRESH, ["bpr_model", "scripts/publish.py"])
    assert not [name for name in drawn if "build/models" in name or ".venv" in name or name.endswith(".py")]


@needs_dot
def test_colours_tell_stale_from_may_and_absent(stand_ins: Project) -> None:
    shutil.rmtree(stand_ins.path / "build/synthetic/bpr")
    stand_ins.append("convertation/head/torch2onnx.py", "# a remark\n")
    drawn = nodes(stand_ins)
    colour, lines = drawn["build/onnx/binary.onnx"]
    assert colour == STALE and lines == ["binary.onnx", "convertation/head/torch2onnx.py", "torch2onnx.py changed"]
    assert drawn["build/checks/binary.json"][0] == drawn[f"{REPOSITORY}/binary_onnx"][0] == MAY
    assert drawn["build/synthetic/bpr/model.pt"][0] == ABSENT
    assert drawn["build/checks/vit.json"][0] == drawn["build/synthetic/CT-RATE/model_binary.pth"][0] == FRESH


@needs_dot
def test_a_part_of_the_yaml_appears_while_it_is_stale(stand_ins: Project) -> None:
    stand_ins.append("convertation/models.yaml", "# a remark\n")
    assert nodes(stand_ins)["build/models/vit.json"][0] == STALE


@needs_dot
def test_the_users_own_checkpoint_has_its_colour(stand_ins: Project) -> None:
    own = stand_ins.path / "training/weights/CT-RATE/model_binary.pth"
    own.parent.mkdir()
    own.write_text("mine")
    drawn = nodes(stand_ins, "WEIGHTS=yandex", "REPOSITORY=other")
    assert drawn["training/weights/CT-RATE/model_binary.pth"] == (
        "#c9dcf7",
        ["model_binary.pth", "yours, used as it is"],
    )
    assert drawn["training/weights.zip"][0] == STALE


@needs_dot
def test_only_what_is_not_implied_is_an_edge(stand_ins: Project) -> None:
    stand_ins.make("graph")
    edges = re.findall(r"<title>([^<]*)&#45;&gt;([^<]*)</title>", (stand_ins.path / "build/graph.svg").read_text())
    assert ("build/checks/vit.json", "build/checks/verdict.json") in edges
    assert ("build/onnx/vit.onnx", "build/checks/verdict.json") not in edges


def test_without_graphviz_the_error_is_the_command_to_type(stand_ins: Project) -> None:
    path = stand_ins.path / "bin"
    path.mkdir()
    for name in ("bash", "make", "awk", "python3", "sh"):
        where = shutil.which(name)
        assert where
        (path / name).symlink_to(Path(where).resolve())
    assert "apt install graphviz" in stand_ins.fail("graph", PATH=str(path))
    assert not (stand_ins.path / "build/graph.svg").exists()
