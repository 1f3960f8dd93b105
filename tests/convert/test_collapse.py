"""A ViT that answers every study alike where it is served, and alone there: each gate says so.

The straight export of CT-ViT lets ONNX Runtime up to 1.22 normalise patches of air whose mean is large beside their
spread: 1.19.2, which serves the verdict, then loses the variance. The network is tiny, its patches as large as real.
"""

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, tiny_dims
from torch import Tensor
from torch.nn import functional

from convertation.vit import ctvit
from convertation.vit.torch2onnx import torch2onnx
from scripts.convert.collapse import find_alike_rows
from scripts.convert.compare import compare_with_pytorch
from scripts.convert.sample import make_sample, plan_requests
from scripts.convert.synthesize import synthesize_checkpoint
from scripts.serve.verdict import check_answers_differ, pass_verdict
from scripts.show import compare_repositories

DEPLOYED = ROOT / ".venv-triton/bin/python3"
TOLERANCE = {"output": 1e-4, "served": 1e-4}


def straight(network: ctvit.CTViT, volume: Tensor) -> Tensor:
    """CTViT.patches as it was: LayerNorm over voxels as they come."""
    _, norm, linear, last = network.VIT.to_patch_emb
    patches = ctvit.cut_patches(volume, network.patch)
    normed = functional.layer_norm(patches, patches.shape[-1:], norm.weight, norm.bias)
    embedded: Tensor = last(linear(normed))
    return embedded


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """old/ and new/: repositories of one checkpoint's ViT, exported as it was and as it is; what judges need beside."""
    top = tmp_path_factory.mktemp("collapse")
    models = yaml.safe_load((ROOT / "convertation/models.yaml").read_text())
    models = {"vit": models["vit"] | TINY["vit"], "bpr": models["bpr"]}
    (top / "models.yaml").write_text(yaml.safe_dump(models))
    entry = {"name": "vit", **models["vit"]}
    for folder in "models", "checks":
        (top / folder).mkdir()
    (top / "models/vit.json").write_text(json.dumps(entry))
    synthesize_checkpoint(entry, top / "vit.pt")
    for name in "new", "old":
        folder = top / name / "vit_onnx/1"
        folder.mkdir(parents=True)
        config = tiny_dims((ROOT / "convertation/vit/config.pbtxt").read_text())
        (folder.parent / "config.pbtxt").write_text(config)
        with pytest.MonkeyPatch.context() as patch:
            if name == "old":
                patch.setattr(ctvit.CTViT, "patches", straight)
            torch2onnx(top / "vit.pt", entry, folder / "model.onnx", opset=20, metadata={})
    return top


def entry_of(build: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((build / "models/vit.json").read_text())
    return entry


def file(build: Path, name: str) -> Path:
    return build / name / "vit_onnx/1/model.onnx"


@pytest.fixture(scope="module")
def check(build: Path) -> dict[str, Any]:
    """What comparing the new file leaves, both runtimes asked."""
    found = compare_with_pytorch(build / "vit.pt", entry_of(build), TOLERANCE, file(build, "new"), [DEPLOYED])
    (build / "checks/vit.json").write_text(json.dumps(found))
    return found


def test_the_comparison_asks_the_runtime_that_serves_and_says_so(check: dict[str, Any]) -> None:
    ours, deployed = check["compared_by"]
    assert ours.startswith("ONNX Runtime 1.") and deployed == "by ONNX Runtime 1.19.2 as deployed"
    assert check["codes"]["flipped_by"] == {"at batch 1": 0, "at batch 2": 0, deployed: 0}
    assert check["codes"]["compared"] == (1 + 2 + 2) * 8


def test_the_old_file_agrees_on_our_own_runtime_alone(build: Path, check: dict[str, Any]) -> None:
    compare_with_pytorch(build / "vit.pt", entry_of(build), TOLERANCE, file(build, "old"))

    with pytest.raises(SystemExit, match=r"of sample 0 by ONNX Runtime 1\.19\.2 as deployed.* (differs|are NaN)"):
        compare_with_pytorch(build / "vit.pt", entry_of(build), TOLERANCE, file(build, "old"), [DEPLOYED])


def test_the_verdict_passes_the_new_file_and_is_red_for_the_old_one(
    build: Path, check: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_VENV", str(ROOT / ".venv-triton"))

    def judged(name: str) -> dict[str, Any]:
        return pass_verdict(build / name, build / "checks", build / "models", build / "triton.log")

    assert judged("new")["models"]["vit_onnx"]["relative"] < 1e-5
    with pytest.raises(SystemExit, match=r"vit_onnx: (answers different inputs alike|\d+ of \d+ values beyond)"):
        judged("old")


def test_make_compare_names_the_fault_of_an_old_repository(
    build: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_VENV", str(ROOT / ".venv-triton"))
    monkeypatch.chdir(build)
    arguments = ["new", "old", "compare.json", "--models", "models.yaml"]

    with pytest.raises(SystemExit, match="do not agree"):
        compare_repositories.main(arguments)

    said = capsys.readouterr().out
    assert "vit_onnx: answers every study alike" in said
    assert "the other one answers different volumes alike, for example seed 1 and seed 2" in said
    assert "ONNX Runtime up to 1.22" in said


# --- Each rule ------------------------------------------------------------------


def test_answers_less_than_half_as_far_apart_as_they_should_be_are_alike() -> None:
    right = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    assert find_alike_rows(right, right) == [] == find_alike_rows(right, right + 5)
    assert find_alike_rows(right, right * 0.4) == [(0, 1), (0, 2), (1, 2)]
    assert find_alike_rows(right, np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 2.0]])) == [(0, 1)]
    assert find_alike_rows(right, np.full((3, 2), np.nan)) == [(0, 1), (0, 2), (1, 2)]
    assert find_alike_rows(np.ones((2, 2)), np.ones((2, 2))) == []  # the reference does not tell them apart either


def test_a_wide_tolerance_does_not_hide_a_collapse() -> None:
    """As of fp16 or a GPU: each answer is within the tolerance, and both are the same."""
    answers = [{"output": [[0.95, 0.0]], "allowed": 0.1}, {"output": [[1.05, 0.0]], "allowed": 0.1}]
    with pytest.raises(SystemExit, match="m: answers different inputs alike: 1 pairs"):
        check_answers_differ("m", answers, [np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]])])
    check_answers_differ("m", answers, [np.array([[0.95, 0.01]]), np.array([[1.05, 0.01]])])


def test_a_server_is_asked_two_samples_even_where_one_is_all_that_it_takes_at_once() -> None:
    assert plan_requests([1, 2], 100) == [(0, 1), (0, 2)]
    assert plan_requests([1, 2], 221 << 20) == [(0, 1), (1, 1)]
    entry = {"family": "vit", "input": [1, 20, 40, 40]}
    assert np.array_equal(make_sample(entry, 3, 2)["input"][1:], make_sample(entry, 3, 1, first=1)["input"])


def test_few_distinct_codes_where_pytorch_has_many_are_refused(build: Path, tmp_path: Path) -> None:
    """Rows of the codebook that all point one way: what a NaN in every token makes of them, ArgMax takes the first."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(file(build, "new"))
    for tensor in model.graph.initializer:
        if sorted(tensor.dims) == [32, 64]:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))
    onnx.save(model, tmp_path / "flat.onnx")
    with pytest.raises(SystemExit, match=r"codes of sample 0 at batch 1 (are 1 distinct|differ)|expected at most"):
        compare_with_pytorch(build / "vit.pt", entry_of(build), TOLERANCE, tmp_path / "flat.onnx")


def test_what_converts_knows_nothing_of_what_judges() -> None:
    for path in (ROOT / "convertation").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] == "scripts"], path


def test_the_straight_network_of_this_test_is_the_same_network(build: Path) -> None:
    network = ctvit.load_network(build / "vit.pt", entry_of(build))
    volume = torch.from_numpy(make_sample(entry_of(build), 0, 1)["input"])
    with torch.inference_mode():
        assert torch.allclose(straight(network, volume), network.patches(volume), atol=1e-4)
