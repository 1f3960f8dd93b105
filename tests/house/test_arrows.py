"""Rooms import only from rooms above them, no imports form a circle, tests and map follow the folders."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# A room may use itself, convertation/ and the rooms before it
ROOMS = ["steps", "archives", "convert", "serve", "plans", "publish", "deploy", "show", "infer", "bench"]
ALONE = ["infer"]  # the inference image has this folder and no other
CODE = [*sorted(ROOT.glob("scripts/**/*.py")), *sorted(ROOT.glob("convertation/**/*.py"))]


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in CODE}


def imports(path: Path) -> set[str]:
    """Return the modules of the project that a file imports, also in functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = list(path.relative_to(ROOT).parts[: -node.level]) if node.level else []
            name = ".".join([*package, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" if f"{name}.{alias.name}" in MODULES else name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("scripts", "convertation")}


def test_every_folder_of_scripts_is_a_room_with_a_docstring() -> None:
    there = {path.name for path in (ROOT / "scripts").iterdir()} - {"__pycache__"}
    assert there == set(ROOMS)
    for room in ROOMS:
        assert ast.get_docstring(ast.parse((ROOT / f"scripts/{room}/__init__.py").read_text())), room


def test_every_import_of_the_project_is_a_file_that_is_there() -> None:
    packages = {".".join(name.split(".")[:end]) for name in MODULES for end in range(1, name.count(".") + 1)}
    lacking = {
        str(path.relative_to(ROOT)): wrong for path in CODE if (wrong := imports(path) - set(MODULES) - packages)
    }
    assert lacking == {}


def test_convertation_knows_nothing_of_scripts() -> None:
    knows = [module(path) for path in CODE for name in imports(path)
             if module(path).startswith("convertation.") and name.startswith("scripts")]  # fmt: skip
    assert knows == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_uses_rooms_before_it_alone(room: str) -> None:
    allowed = [room] if room in ALONE else ROOMS[: ROOMS.index(room) + 1]
    wrong = {
        str(path.relative_to(ROOT)): name
        for path in CODE
        if module(path).startswith(f"scripts.{room}.")
        for name in imports(path)
        if name.startswith("scripts.") and name.split(".")[1] not in allowed
    }
    assert wrong == {}


def test_no_file_imports_in_a_circle() -> None:
    try:
        TopologicalSorter({module(path): imports(path) - {module(path)} for path in CODE}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_tests_are_in_the_folder_of_their_room() -> None:
    places = {path.parent.relative_to(ROOT / "tests").as_posix() for path in ROOT.glob("tests/**/test_*.py")}
    assert places <= {*ROOMS, "convertation", "house"}
    names = [path.name for path in ROOT.glob("tests/**/test_*.py")]
    assert len(names) == len(set(names))  # pytest imports a test file by its name without the folder


def map_of_the_house() -> str:
    drawn = re.search(r"```text\n(Makefile.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert drawn, "CONTRIBUTING.md has no map"
    return drawn[1]


def test_the_map_shows_the_rooms_in_order_and_each_script_in_its_room() -> None:
    drawn = re.findall(r"^  ([a-z]+)/ .+\n {14}(\w+(?:, \w+)*)$", map_of_the_house(), re.MULTILINE)
    there = {
        room: sorted({path.stem for path in (ROOT / f"scripts/{room}").glob("*.py")} - {"__init__", "__main__"})
        for room in ROOMS
    }
    assert [room for room, _ in drawn] == ROOMS
    assert {room: names.split(", ") for room, names in drawn} == there


def test_every_path_in_the_map_exists() -> None:
    for path in re.findall(r"^([\w./-]+)", map_of_the_house(), re.MULTILINE):
        assert (ROOT / path).exists(), path


def test_every_path_in_contributing_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in re.findall(r"`((?:scripts|convertation|docs|docker|tests|training)/[\w./-]*\w)`", text):
        assert "NAME" in path or (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
