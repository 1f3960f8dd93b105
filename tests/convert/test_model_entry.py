"""One model's entry in models.yaml: what is written, and an error for each mistake: file, model, key, expectation."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from scripts.convert.model_entry import list_facts, read_entry, read_models, read_tolerance
from scripts.convert.model_rules import LIMITS

MODELS = ROOT / "convertation/models.yaml"
ZERO = {"output": 0, "served": 0}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(MODELS.read_text())
    return path


def change(file: Path, model: str, **keys: Any) -> None:
    """Set keys of one model's entry; None removes a key."""
    models = yaml.safe_load(file.read_text())
    entry = models[model] | keys
    models[model] = {key: value for key, value in entry.items() if value is not None}
    file.write_text(yaml.safe_dump(models, sort_keys=False))


def refusal(file: Path, model: str = "vit") -> str:
    with pytest.raises(SystemExit) as error:
        read_entry(file, model)
    said = str(error.value)
    assert said.startswith(f"{file}: ") and "\n" not in said
    return said.removeprefix(f"{file}: ")


@pytest.mark.parametrize("name", list(yaml.safe_load(MODELS.read_text())))
def test_the_projects_own_entries_are_right(name: str) -> None:
    entry = read_entry(MODELS, name)
    assert entry == {"name": name, **yaml.safe_load(MODELS.read_text())[name]}


def test_the_tolerance_is_written_to_its_own_file(file: Path, tmp_path: Path) -> None:
    for part in ("model", "tolerance"):
        command = [sys.executable, "-m", "scripts.convert.model_entry", file, "vit", part, tmp_path / part]
        subprocess.run(command, cwd=ROOT, check=True)
    entry = read_entry(file, "vit")
    limits = entry.pop("tolerance")
    assert json.loads((tmp_path / "tolerance").read_text()) == {
        key: value for key, value in limits.items() if key not in ("tf32", "fp16")
    }
    assert json.loads((tmp_path / "model").read_text()) == entry


def test_the_limits_of_a_precision_replace_the_general_ones(file: Path) -> None:
    limits = {"output": 1e-4, "served": 1e-4, "gpu": 1e-4, "cosine": 0.99}
    half = {"output": 0.3, "served": 0.3, "gpu": 0.3, "cosine": 0.9, "probability": 0.2}
    change(file, "vit", tolerance=limits | {"tf32": {"gpu": 0.2}, "fp16": half})

    assert read_tolerance(file, "vit") == limits
    assert read_tolerance(file, "vit.tf32") == limits | {"gpu": 0.2}
    assert read_tolerance(file, "vit.fp16") == half


def test_a_precision_that_a_model_does_not_have_is_an_error(file: Path) -> None:
    with pytest.raises(SystemExit) as error:
        read_tolerance(file, "binary.fp16")
    assert str(error.value) == f"{file}: binary: tolerance: fp16 missing, so there is no binary.fp16"


def test_what_is_written_depends_on_this_model_alone(file: Path) -> None:
    before = read_entry(file, "vit")
    change(file, "binary", network={"sizes": [512, 2], "activation": "gelu"})
    assert read_entry(file, "vit") == before


def test_an_unknown_model_is_an_error_that_lists_the_models(file: Path) -> None:
    assert refusal(file, "vitt") == "has no model vitt; expected one of vit, binary, multilabel, lipro, bpr"


@pytest.mark.parametrize("text", ["vit: [", "vit:\n\tfamily: vit", "a: b: c"])
def test_invalid_yaml_is_an_error_of_one_line(file: Path, text: str) -> None:
    file.write_text(text)
    assert refusal(file).startswith("no valid YAML: ")


@pytest.mark.parametrize("text", ["", "- vit\n", "vit\n"])
def test_yaml_without_entries_is_an_error(file: Path, text: str) -> None:
    file.write_text(text)
    assert refusal(file) == "expected one entry per model, such as `vit:`"


def test_a_model_with_two_entries_is_an_error(file: Path) -> None:
    """YAML readers silently take the last entry, and make would take the facts of both."""
    file.write_text(file.read_text() + "\nvit:\n  family: head\n")
    assert "vit" in refusal(file) and "twice" in refusal(file)


def test_an_entry_that_is_not_a_mapping_is_an_error(file: Path) -> None:
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
        ("vit", {"tolerance": {"output": 1e-5, "served": "small"}}, "vit: tolerance: served is 'small'; expected a "),
        ("binary", {"trained_on": None}, "binary: trained_on is missing; name the ViT variant"),
        ("vit", {"input": [1, 240, 480, 0]}, "vit: input, output and batch hold whole numbers above 0; found [1, "),
        ("vit", {"output": ["512"]}, "vit: input, output and batch hold whole numbers above 0; found "),
        ("vit", {"batch": [1, 2]}, "vit: batch is [smallest, usual, largest]; found [1, 2]"),
        ("vit", {"batch": [4, 2, 1]}, "vit: batch is [smallest, usual, largest]; found [4, 2, 1]"),
        ("binary", {"network": {"sizes": [512, 0, 2], "activation": "gelu"}}, "binary: network: sizes "),
        ("binary", {"network": {"sizes": [512, 256, 2], "activation": "relu6"}}, "binary: network: activation "),
        ("vit", {"checkpoint": "../../etc/passwd"}, "vit: checkpoint "),
        ("vit", {"tolerance": {"output": -1.0, "served": 1e-5}}, "vit: tolerance: "),
        ("vit", {"tolerance": {**ZERO, "fp16": 0.1}}, "vit: tolerance: fp16 is 0.1; expected a value"),
        ("vit", {"tolerance": {**ZERO, "tf32": {}}}, "vit: tolerance: tf32: gpu missing"),
        ("vit", {"tolerance": {**ZERO, "tf32": {"gpu": 0}}}, "vit: tolerance: fp16 missing; expected tf32 and fp16"),
        ("vit", {"tolerance": {**ZERO, "tf32": {"gqu": 0}}}, "vit: tolerance: tf32: unknown key gqu; expected "),
        ("vit", {"tolerance": {**ZERO, "tf32": {"gpu": 2.0}, "fp16": dict.fromkeys(LIMITS, 0)}},
         "vit: tolerance: expected fractions of the scale"),
        ("binary", {"tolerance": {**ZERO, "tf32": {"gpu": 0}}}, "binary: tolerance: only a vit may have tf32"),
    ],
)  # fmt: skip
def test_a_mistake_in_an_entry_is_an_error(file: Path, model: str, keys: dict[str, Any], expected: str) -> None:
    change(file, model, **keys)
    assert refusal(file).startswith(expected)
    assert refusal(file, "multilabel") == refusal(file)  # whichever model is asked for


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "1.e-5", "1.0e-5", "+1e-05", "0.00001"])
def test_a_number_is_read_in_every_spelling(file: Path, number: str) -> None:
    """In YAML 1.1, `1e-5` is text."""
    file.write_text(file.read_text().replace("{output: 1.0e-5,", f"{{output: {number},", 1))
    assert read_entry(file, "binary")["tolerance"]["output"] == 1e-5


def test_a_whole_number_is_a_tolerance_too(file: Path) -> None:
    file.write_text(file.read_text().replace("served: 0.0}", "served: 0}", 1))
    assert read_entry(file, "bpr")["tolerance"]["served"] == 0.0


@pytest.mark.parametrize("spelling", ["false", "no", "False", "off"])
def test_false_is_false(file: Path, spelling: str) -> None:
    file.write_text(file.read_text().replace("optional: true", f"optional: {spelling}"))
    assert "lipro.optional" not in list_facts(read_models(file))


@pytest.mark.parametrize(
    "name", ["1", "yes", "null", "a b", "vit.fp16", "a/b", "a%", "$(shell)", "возраст", "-age", "''", "[a]"]
)
def test_a_bad_name_of_a_model_is_refused_with_its_line(file: Path, name: str) -> None:
    file.write_text(file.read_text().replace("lipro:\n", f"{name}:\n"))
    line = next(number for number, text in enumerate(file.read_text().splitlines(), 1) if text == f"{name}:")
    assert "cannot name a model" in refusal(file) and refusal(file).endswith(f"(line {line})")


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("input: [512]\n  output: [2]", "input: [256]\n  output: [2]", "binary: input is [256] and the first of sizes"),
        ("output: [20]", "output: [19]", "multilabel: output is [19] and the last of sizes 20"),
        (", activation: gelu", "", "binary: network: activation is missing"),
        ("sizes: [512, 18]", "sizes: [18]", "lipro: network: sizes is [18]"),
        ("patch: [10, 20, 20]", "patch: [10, 20, 21]", "vit: input is [1, 240, 480, 480]; expected [1, frames, "),
        ("input: [1, 128, 128]", "input: [1, 128, 130]", "bpr: expected input [1, side, side]"),
        ("vit:\n  family: vit", "vit2:\n  family: vit", "vit2: a model of family vit cannot be called vit2"),
        ("CT-RATE/model_multilabel.pth", "CT-RATE/model_binary.pth", "multilabel: CT-RATE/model_binary.pth is "),
        ("CT-RATE/model_binary.pth", '"CT-RATE//model_binary.pth"', "binary: checkpoint is "),
        ("CT-RATE/model_binary.pth", "$(shell touch x)", "binary: checkpoint is "),
        ("trained_on: LiPro", "trained_on: Li Pro", "binary: trained_on is 'Li Pro'"),
        ("  batch: [1, 2, 4]", "  batch: [1, 2, 4]\n  batch: [1, 2, 4]", "vit: batch is there twice"),
        ("optional: true", 'optional: "true"', "lipro: optional is 'true'; expected a value of type bool"),
        ("heads: 8", "heads: 0", "vit: network: heads is 0"),
    ],
)  # fmt: skip
def test_values_that_contradict_each_other_are_refused_with_their_line(
    file: Path, old: str, new: str, expected: str
) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    assert refusal(file).startswith(expected)
    assert re.search(r" \(line \d+\)$", refusal(file))


def test_the_error_names_the_line_of_the_mistake(file: Path) -> None:
    file.write_text(file.read_text().replace("optional: true", "optional: 3"))
    line = next(number for number, text in enumerate(file.read_text().splitlines(), 1) if "optional: 3" in text)
    assert refusal(file).endswith(f"(line {line})")


@pytest.mark.parametrize(
    "text",
    [
        "vit: &a {family: *a}",
        "vit: {batch: &a [*a]}",
        "vit: !!int x",
        "vit: 2001-99-99",
        "vit: !!python/name:os.system",
    ],
)
def test_odd_yaml_gives_no_traceback(file: Path, text: str) -> None:
    file.write_text(text)
    refusal(file)


def test_a_missing_file_gives_no_traceback(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "scripts.convert.model_entry",
        tmp_path / "models.yaml",
        "vit",
        "model",
        tmp_path / "out",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "models.yaml" in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "out").exists()
