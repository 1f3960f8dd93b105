"""One model's part of models.yaml: what is written, and each mistake by its file, model, key and expectation."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from scripts.model_entry import model_entry

MODELS = ROOT / "convertation/models.yaml"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(MODELS.read_text())
    return path


def change(file: Path, model: str, **keys: Any) -> None:
    """Set keys of one model's entry; None takes a key out."""
    models = yaml.safe_load(file.read_text())
    entry = models[model] | keys
    models[model] = {key: value for key, value in entry.items() if value is not None}
    file.write_text(yaml.safe_dump(models, sort_keys=False))


def refusal(file: Path, model: str = "vit") -> str:
    with pytest.raises(SystemExit) as error:
        model_entry(file, model)
    said = str(error.value)
    assert said.startswith(f"{file}: ") and "\n" not in said
    return said.removeprefix(f"{file}: ")


@pytest.mark.parametrize("name", list(yaml.safe_load(MODELS.read_text())))
def test_the_projects_own_entries_are_right(name: str) -> None:
    entry = model_entry(MODELS, name)
    assert entry == {"name": name, **yaml.safe_load(MODELS.read_text())[name]}


def test_the_tolerance_lies_apart_from_the_rest(file: Path, tmp_path: Path) -> None:
    for part in ("model", "tolerance"):
        command = [sys.executable, "-m", "scripts.model_entry", file, "vit", part, tmp_path / part]
        subprocess.run(command, cwd=ROOT, check=True)
    entry = model_entry(file, "vit")
    assert json.loads((tmp_path / "tolerance").read_text()) == entry.pop("tolerance")
    assert json.loads((tmp_path / "model").read_text()) == entry


def test_what_is_written_depends_on_this_model_alone(file: Path) -> None:
    before = model_entry(file, "vit")
    change(file, "binary", network={"sizes": [512, 2], "activation": "gelu"})
    assert model_entry(file, "vit") == before


def test_an_unknown_model_is_told_with_those_that_there_are(file: Path) -> None:
    assert refusal(file, "vitt") == "has no model vitt; it describes vit, binary, multilabel, lipro, bpr"


@pytest.mark.parametrize("text", ["vit: [", "vit:\n\tfamily: vit", "a: b: c"])
def test_what_is_no_yaml_is_told_in_one_line(file: Path, text: str) -> None:
    file.write_text(text)
    assert refusal(file).startswith("no valid YAML: ")


@pytest.mark.parametrize("text", ["", "- vit\n", "vit\n"])
def test_a_file_of_something_else(file: Path, text: str) -> None:
    file.write_text(text)
    assert refusal(file) == "expected one entry per model, such as `vit:`"


def test_a_model_that_is_described_twice_is_an_error(file: Path) -> None:
    """YAML readers take the last one silently, Make the facts of both."""
    file.write_text(file.read_text() + "\nvit:\n  family: head\n")
    assert "vit" in refusal(file) and "twice" in refusal(file)


def test_an_entry_that_is_no_mapping(file: Path) -> None:
    file.write_text(file.read_text() + "\nextra: 7\n")
    assert refusal(file).startswith("extra: expected the keys family, ")


@pytest.mark.parametrize(
    "model, keys, expected",
    [
        ("vit", {"chekpoint": "x"}, "vit: unknown key chekpoint; expected family, optional, checkpoint, "),
        ("vit", {"checkpoint": None}, "vit: checkpoint missing"),
        ("vit", {"checkpoint": None, "batch": None}, "vit: checkpoint, batch missing"),
        ("vit", {"checkpoint": 7}, "vit: checkpoint is 7; expected a value of type str"),
        ("lipro", {"optional": "yes"}, "lipro: optional is 'yes'; expected a value of type bool"),
        ("vit", {"family": "resnet"}, "vit: unknown family resnet; expected one of vit, head, bpr"),
        ("vit", {"network": {"dim": 512}}, "vit: network: heads, dim_head, spatial_depth, "),
        ("vit", {"network": {"dimension": 512}}, "vit: network: unknown key dimension; expected dim, heads, "),
        ("bpr", {"network": {"channels": 6.4}}, "bpr: network: channels is 6.4; expected a value of type int"),
        ("bpr", {"network": {"channels": True}}, "bpr: network: channels is True; expected a value of type int"),
        ("vit", {"network": []}, "vit: network is []; expected a value of type dict"),
        ("vit", {"tolerance": {"output": 1e-5}}, "vit: tolerance: served missing"),
        ("vit", {"tolerance": {"output": 1e-5, "served": "1e-5"}}, "vit: tolerance: served is '1e-5'; expected a "),
        ("binary", {"trained_on": None}, "binary: trained_on is missing; name the ViT variant"),
        ("vit", {"input": [1, 240, 480, 0]}, "vit: input, output and batch hold whole numbers above 0; found [1, "),
        ("vit", {"output": ["512"]}, "vit: input, output and batch hold whole numbers above 0; found "),
        ("vit", {"batch": [1, 2]}, "vit: batch is [smallest, usual, largest]; found [1, 2]"),
        ("vit", {"batch": [4, 2, 1]}, "vit: batch is [smallest, usual, largest]; found [4, 2, 1]"),
        ("binary", {"network": {"sizes": [512, 0, 2], "activation": "gelu"}}, "binary: network: sizes "),
        ("binary", {"network": {"sizes": [512, 256, 2], "activation": "relu6"}}, "binary: network: activation "),
        ("vit", {"checkpoint": "../../etc/passwd"}, "vit: checkpoint "),
        ("vit", {"tolerance": {"output": -1.0, "served": 1e-5}}, "vit: tolerance: "),
    ],
)  # fmt: skip
def test_a_mistake_in_an_entry(file: Path, model: str, keys: dict[str, Any], expected: str) -> None:
    change(file, model, **keys)
    assert refusal(file).startswith(expected)
    assert refusal(file, "multilabel") == refusal(file)  # whichever model is asked for


def test_a_number_without_its_point_is_told_as_yaml_reads_it(file: Path) -> None:
    """`1e-5` is text to YAML 1.1; the message shows what it was taken for."""
    file.write_text(file.read_text().replace("{output: 1.0e-5,", "{output: 1e-5,", 1))
    assert "output is '1e-5'" in refusal(file)


def test_a_missing_file_is_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.model_entry", tmp_path / "models.yaml", "vit", "model", tmp_path / "out"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "models.yaml" in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "out").exists()
