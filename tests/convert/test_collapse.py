"""A ViT that answers every study alike, but only with the ONNX Runtime that serves it: each gate finds it.

In a straight export of CT-ViT, ONNX Runtime normalises patches of air, whose mean is large compared with their spread.
Versions up to 1.22 then lose the variance, and so does 1.19.2, which serves the verdict. The network here is tiny, but
its patches have the real size.
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
    """CTViT.patches of the older export: LayerNorm over voxels, without subtracting their mean first."""
    _, norm, linear, last = network.VIT.to_patch_emb
    patches = ctvit.cut_patches(volume, network.patch)
    normed = functional.layer_norm(patches, patches.shape[-1:], norm.weight, norm.bias)
    embedded: Tensor = last(linear(normed))
    return embedded


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories old/ and new/ with the ViT of one checkpoint, by the older export and by the present one.

    Beside them is what the verdict and the comparison read.
    """
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
                patch.setattr(ctvit.CTViT, "embed_volume", straight)
            torch2onnx(top / "vit.pt", entry, folder / "model.onnx", opset=20, metadata={})
    return top


def entry_of(build: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((build / "models/vit.json").read_text())
    return entry


def file(build: Path, name: str) -> Path:
    return build / name / "vit_onnx/1/model.onnx"


@pytest.fixture(scope="module")
def check(build: Path) -> dict[str, Any]:
    """The result of comparing the new file with both runtimes."""
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


def test_the_verdict_accepts_the_new_file_and_refuses_the_old_one(
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


def test_answers_with_less_than_half_of_the_right_distance_are_alike() -> None:
    right = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    assert find_alike_rows(right, right) == [] == find_alike_rows(right, right + 5)
    assert find_alike_rows(right, right * 0.4) == [(0, 1), (0, 2), (1, 2)]
    assert find_alike_rows(right, np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 2.0]])) == [(0, 1)]
    assert find_alike_rows(right, np.full((3, 2), np.nan)) == [(0, 1), (0, 2), (1, 2)]
    assert find_alike_rows(np.ones((2, 2)), np.ones((2, 2))) == []  # they are alike in the reference, too


def test_a_wide_tolerance_does_not_hide_a_collapse() -> None:
    """As for fp16 or a GPU: each answer is within the wide tolerance, but both are the same."""
    answers = [{"output": [[0.95, 0.0]], "allowed": 0.1}, {"output": [[1.05, 0.0]], "allowed": 0.1}]
    with pytest.raises(SystemExit, match="m: answers different inputs alike: 1 pairs"):
        check_answers_differ("m", answers, [np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]])])
    check_answers_differ("m", answers, [np.array([[0.95, 0.01]]), np.array([[1.05, 0.01]])])


def test_a_server_gets_two_samples_even_if_a_request_holds_only_one() -> None:
    assert plan_requests([1, 2], 100) == [(0, 1), (0, 2)]
    assert plan_requests([1, 2], 221 << 20) == [(0, 1), (1, 1)]
    entry = {"family": "vit", "input": [1, 20, 40, 40]}
    assert np.array_equal(make_sample(entry, 3, 2)["input"][1:], make_sample(entry, 3, 1, first=1)["input"])


def test_few_distinct_codes_where_pytorch_has_many_are_refused(build: Path, tmp_path: Path) -> None:
    """A codebook of zeros has the effect of NaN in every token: ArgMax always takes the first row."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(file(build, "new"))
    for tensor in model.graph.initializer:
        if sorted(tensor.dims) == [32, 64]:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))
    onnx.save(model, tmp_path / "flat.onnx")
    with pytest.raises(SystemExit, match=r"codes of sample 0 at batch 1 (are 1 distinct|differ)|expected at most"):
        compare_with_pytorch(build / "vit.pt", entry_of(build), TOLERANCE, tmp_path / "flat.onnx")


def test_convertation_imports_nothing_from_scripts() -> None:
    for path in (ROOT / "convertation").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] == "scripts"], path


def test_the_old_way_to_embed_patches_gives_the_same_numbers_in_pytorch(build: Path) -> None:
    network = ctvit.load_network(build / "vit.pt", entry_of(build))
    volume = torch.from_numpy(make_sample(entry_of(build), 0, 1)["input"])
    with torch.inference_mode():
        assert torch.allclose(straight(network, volume), network.embed_volume(volume), atol=1e-4)
