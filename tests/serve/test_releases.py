"""The table of NVIDIA's releases, read with and without a YAML reader, and the notes made from it."""

import re
from pathlib import Path

import onnx
import pytest
import yaml
from conftest import ROOT
from onnx import TensorProto, helper

from scripts.serve import python_model, releases
from scripts.serve.check_repository import check_repository

NEWEST = releases.list_releases(releases.read_table())[-1]


def test_the_table_is_yaml_and_both_readers_agree() -> None:
    assert releases.read_table() == yaml.safe_load(releases.TABLE.read_text())


@pytest.mark.parametrize("name", releases.list_releases(releases.read_table()))
def test_every_release_is_told_whole(name: str) -> None:
    known = releases.find_release(name)
    assert known.name == name
    assert known.opset >= 20, "the knob's default"
    assert known.ir >= 10, "what convertation/onnx_file.py writes"


def test_a_line_that_is_no_pair_is_named(tmp_path: Path) -> None:
    table = tmp_path / "releases.yaml"
    table.write_text('usual: "24.06"\n"24.06":\n  opset: twenty\n')
    with pytest.raises(SystemExit, match=r"releases.yaml:3: opset: twenty; expected name: and a value in JSON"):
        releases.read_table(table)


def test_known_holes_are_told_with_the_release_that_mends_them() -> None:
    assert releases.list_notes("24.06") == [
        "Triton 24.06 has 59 known security holes, the worst rated 9.8 of 10 (NVIDIA's bulletins, 2024-09-30 to "
        "2026-08-18); 26.06 mends them: NGC_RELEASE=26.08"
    ]
    assert releases.list_notes(NEWEST) == []


def test_of_a_release_that_is_unknown_this_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGC_RELEASE", "stand-in")
    assert releases.list_notes() == [
        "NGC_RELEASE=stand-in is not in scripts/serve/releases.yaml, which knows 24.06, 26.08; "
        "files are checked by the limits of 24.06"
    ]
    assert "holes" in releases.list_notes("26.01")[1]
    assert releases.find_release().opset == releases.find_release("24.06").opset


def model(path: Path, opset: int) -> None:
    """Write an ONNX file of one Relu."""
    tensor = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "main", tensor[:1], tensor[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)


def test_the_checker_goes_by_the_chosen_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "repository/relu"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text('name: "relu" platform: "onnxruntime_onnx"\n')
    model(folder / "1/model.onnx", 23)
    for name, expected in (("24.06", ["opset; expected at most 21, found 23"]), (NEWEST, [])):
        monkeypatch.setenv("NGC_RELEASE", name)
        faults = check_repository(tmp_path / "repository")
        assert [line.partition(": ")[2] for line in faults if "opset" in line] == expected


def test_python_is_parsed_as_the_release_s_image_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.py"
    file.write_text(
        "class TritonPythonModel:\n    def execute(self, requests):\n        try: pass\n        except* OSError: pass\n"
    )
    for name, faults in (("24.06", 1), (NEWEST, 0)):
        monkeypatch.setenv("NGC_RELEASE", name)
        assert len(python_model.check_model(file, packages=False)) == faults


def test_no_release_s_number_stands_in_code() -> None:
    number = re.compile(r"(?<![\w.])2[4-9]\.(0[1-9]|1[0-2])(?![\d.])")
    code = [*ROOT.glob("scripts/**/*.py"), *ROOT.glob("convertation/**/*.py"), *ROOT.glob("docker/*ockerfile")]
    code += [*ROOT.glob("docker/**/*.y*ml"), *ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/**/*.mk")]
    found = {str(path.relative_to(ROOT)): said for path in code
             if (said := [line for line in path.read_text().splitlines() if number.search(line)])}  # fmt: skip
    assert found == {}
