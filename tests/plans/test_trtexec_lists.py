"""TensorRT 10.1 and 11.1 have each option that `make trt` gives to trtexec, with a value if the option needs one."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT

from scripts.plans import compare_plan, trtexec
from scripts.plans.plan import list_commands
from scripts.plans.trtexec_options import EITHER, FLAGS, VALUED

LISTS = {
    "10.1": {"flags": FLAGS, "valued": VALUED, "either": EITHER, "ignored": ()},
    "11.1": yaml.safe_load(Path(__file__).with_name("trtexec_11.yaml").read_text()),
}
MODELS = yaml.safe_load((ROOT / "convertation/models.yaml").read_text())


def faults(words: list[str], release: str) -> list[str]:
    """Return what is wrong with these options for the trtexec of a release."""
    known = {kind: set(names) for kind, names in LISTS[release].items()}
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if name not in known["flags"] | known["valued"] | known["either"]:
            found.append(f"{name}: unknown")
        elif name in known["flags"] and equals:
            found.append(f"{name}: takes no value")
        elif name in known["valued"] and not value:
            found.append(f"{name}: lacks its value")
    return found


def built_with(model: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the options in the line that `make trt DRY=1` prints."""
    monkeypatch.setenv("TENSORRT_IMAGE", "tensorrt")
    entry = MODELS[model] | {"name": model}
    lines = list_commands(f"build/plan/sm86/{model}.plan", "model.onnx", entry, precision, "", Path("no.cache"))
    words = shlex.split(next(line for line in lines if line.startswith("docker")))
    return words[words.index("trtexec") + 1 :]


@pytest.mark.parametrize("release", LISTS)
@pytest.mark.parametrize(("model", "precision"), [("vit", "fp32"), ("vit", "fp16"), ("binary", "fp32")])
def test_both_releases_accept_the_options_that_build_a_plan(
    release: str, model: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = built_with(model, precision, monkeypatch)
    assert len(words) >= 8
    assert faults(words, release) == []


@pytest.mark.parametrize("release", LISTS)
def test_both_releases_accept_the_options_that_run_a_plan(
    release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(artifact: str, inputs: dict[str, str], out: str, options: list[str]) -> str:
        asked.append(options)
        output = {"name": "output", "dimensions": "1x2", "values": [0, 1]}
        (Path(out) / "output.json").write_text(json.dumps([output]))
        return ""

    monkeypatch.setattr(trtexec, "run_trtexec", run)
    compare_plan.run_plan(tmp_path / "binary.plan", np.zeros((1, 512), np.float32), tmp_path / "scratch")
    assert len(asked) == 1
    assert faults(asked[0], release) == []


def test_11_ignores_only_an_option_that_is_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """All networks are strongly typed there; each other option of ours must have an effect."""
    names = {word.partition("=")[0] for word in built_with("vit", "fp16", monkeypatch)}
    assert names & set(LISTS["11.1"]["ignored"]) == {"--stronglyTyped"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--restricted", {"10.1": [], "11.1": ["--restricted: unknown"]}),
        ("--maxTactics=4", {"10.1": ["--maxTactics: unknown"], "11.1": []}),
        ("--noTF32=1", {"10.1": ["--noTF32: takes no value"], "11.1": ["--noTF32: takes no value"]}),
        ("--memPoolSize", {"10.1": ["--memPoolSize: lacks its value"], "11.1": ["--memPoolSize: lacks its value"]}),
        ("--sparsity --avgTiming=4", {"10.1": [], "11.1": []}),
    ],
)
def test_options_that_a_release_lacks_are_found(flags: str, expected: dict[str, list[str]]) -> None:
    assert {release: faults(shlex.split(flags), release) for release in LISTS} == expected


@pytest.mark.parametrize(("release", "lists"), LISTS.items())
def test_each_option_is_in_one_list(release: str, lists: dict[str, Iterable[str]]) -> None:
    named = [name for kind in ("flags", "valued", "either") for name in lists[kind]]
    assert len(named) == len(set(named)) > 100
    assert all(name.startswith("--") for name in named)
    assert set(lists["ignored"]) <= set(named)
