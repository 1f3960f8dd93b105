"""`make graph`: every artifact with its script, coloured by its state, as an SVG."""

import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from conftest import REPOSITORY, Project

FRESH, REBUILT, STALE, MAY, ABSENT, LOCAL = "#e8f5e8", "#a5d6a7", "#f7c1b8", "#ffe7a8", "#ffffff", "#c9dcf7"
SVG = "{http://www.w3.org/2000/svg}"


def drawing(project: Project, *args: str) -> Element:
    """Draw; return the SVG."""
    assert project.make("graph", *args) == "build/graph.svg\n"
    return ElementTree.parse(project.path / "build/graph.svg").getroot()


def named(svg: Element, kind: str) -> Iterator[tuple[str, Element]]:
    """Yield the tooltip and the element of each node or edge."""
    for group in svg.iter(f"{SVG}g"):
        if group.get("class") == kind:
            yield group.findtext(f"{SVG}title", ""), group


def nodes(project: Project, *args: str) -> dict[str, tuple[str, list[str]]]:
    """Draw; return each node's colour and its lines of text."""
    drawn: dict[str, tuple[str, list[str]]] = {}
    for tip, group in named(drawing(project, *args), "node"):
        rectangle = group.find(f"{SVG}rect")
        assert rectangle is not None
        drawn[tip.partition(":")[0]] = rectangle.get("fill", ""), [text.text or "" for text in group.iter(f"{SVG}text")]
    return drawn


def box(group: Element) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a node."""
    rectangle = group.find(f"{SVG}rect")
    assert rectangle is not None
    x, y, width, height = (float(rectangle.get(name, "")) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def rebuild(project: Project) -> None:
    """Run one step, so that all others are reused."""
    project.append("convertation/head/torch2onnx.py", "# a remark\n")
    project.make("onnx", "MODEL=head")


def test_each_artifact_is_a_node_that_names_its_script(stand_ins: Project) -> None:
    rebuild(stand_ins)
    drawn = nodes(stand_ins)
    assert drawn["build/onnx/vit.onnx"] == (FRESH, ["vit.onnx", "convertation/vit/torch2onnx.py"])
    assert drawn["build/checks/verdict.json"] == (FRESH, ["checks/verdict.json", "scripts/serve/verdict.py"])
    assert drawn[f"{REPOSITORY}/bpr_model"] == (FRESH, ["bpr_model", "scripts/publish/publish.py"])
    assert not [name for name in drawn if "build/models" in name or ".venv" in name or name.endswith(".py")]


def test_what_the_last_make_rebuilt_has_its_own_colour(stand_ins: Project) -> None:
    assert nodes(stand_ins)["build/onnx/vit.onnx"][0] == REBUILT
    rebuild(stand_ins)
    drawn = nodes(stand_ins)
    assert drawn["build/onnx/binary.onnx"][0] == REBUILT
    assert drawn["build/onnx/vit.onnx"][0] == drawn["build/checks/vit.json"][0] == FRESH


def test_colours_tell_stale_from_may_and_absent(stand_ins: Project) -> None:
    rebuild(stand_ins)
    shutil.rmtree(stand_ins.path / "build/synthetic/bpr")
    stand_ins.append("convertation/head/torch2onnx.py", "# a remark\n")
    drawn = nodes(stand_ins)
    colour, lines = drawn["build/onnx/binary.onnx"]
    assert colour == STALE and lines == ["binary.onnx", "convertation/head/torch2onnx.py", "torch2onnx.py changed"]
    assert drawn["build/checks/binary.json"][0] == drawn[f"{REPOSITORY}/binary_onnx"][0] == MAY
    assert drawn["build/synthetic/bpr/model.pt"][0] == ABSENT
    assert drawn["build/checks/vit.json"][0] == drawn["build/synthetic/CT-RATE/model_binary.pth"][0] == FRESH


def test_a_part_of_the_yaml_appears_while_it_is_stale(stand_ins: Project) -> None:
    stand_ins.append("convertation/models.yaml", "# a remark\n")
    assert nodes(stand_ins)["build/models/vit.json"][0] == STALE


def test_the_users_own_checkpoint_has_its_colour(stand_ins: Project) -> None:
    own = stand_ins.path / "training/weights/CT-RATE/model_binary.pth"
    own.parent.mkdir()
    own.write_text("mine")
    drawn = nodes(stand_ins, "WEIGHTS=yandex", "REPOSITORY=other")
    assert drawn["training/weights/CT-RATE/model_binary.pth"] == (
        LOCAL,
        ["model_binary.pth", "yours, used as it is"],
    )
    assert drawn["training/weights.zip"][0] == STALE


def test_an_arrow_that_others_imply_is_left_out(stand_ins: Project) -> None:
    edges = [tip for tip, _ in named(drawing(stand_ins), "edge")]
    assert "build/checks/vit.json -> build/checks/verdict.json" in edges
    assert "build/onnx/vit.onnx -> build/checks/verdict.json" not in edges


@pytest.mark.parametrize("change", ["nothing", "a long reason", "another repository"])
def test_boxes_do_not_overlap_and_arrows_lead_to_the_right(stand_ins: Project, change: str) -> None:
    args = ["REPOSITORY=other", "WITH=lipro"] if change == "another repository" else []
    if change == "a long reason":
        stand_ins.append("convertation/models.yaml", "# a remark\n")
        stand_ins.append("requirements.txt", "# a remark\n")
        stand_ins.append("convertation/export.py", "# a remark\n")
    svg = drawing(stand_ins, *args)
    boxes = {tip.partition(":")[0]: box(group) for tip, group in named(svg, "node")}
    for (one, a), (other, b) in combinations(boxes.items(), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{one} and {other} overlap"
    for tip, _ in named(svg, "edge"):
        source, target = tip.split(" -> ")
        assert boxes[source][2] < boxes[target][0], tip
    _, _, width, height = map(float, svg.get("viewBox", "").split())
    assert all(x >= 0 and y >= 0 and right <= width and bottom <= height for x, y, right, bottom in boxes.values())


def test_the_graph_needs_no_program_but_python(stand_ins: Project) -> None:
    path = stand_ins.path / "bin"
    path.mkdir()
    for name in ("bash", "make", "awk", "python3", "sh"):
        where = shutil.which(name)
        assert where
        (path / name).symlink_to(Path(where).resolve())
    assert stand_ins.make("graph", PATH=str(path)) == "build/graph.svg\n"


def test_the_legend_tells_each_colour_in_words(stand_ins: Project) -> None:
    legend = {text.text for text in drawing(stand_ins).iter(f"{SVG}text")}
    assert {"fresh: reused", "fresh: rebuilt by the last make", "stale: will run", "may run", "yours"} <= legend
