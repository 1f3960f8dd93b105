"""Synthetic checkpoints: the same bytes each time, loadable like real ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from convertation.head import mlp
from convertation.vit import ctvit
from scripts.convert.synthesize import synthesize_checkpoint

HEAD: dict[str, Any] = {"family": "head", "network": {"sizes": [8, 6, 3], "activation": "leaky_relu"}}
VIT: dict[str, Any] = {
    "family": "vit",
    "network": {
        "dim": 32,
        "heads": 2,
        "dim_head": 16,
        "spatial_depth": 1,
        "temporal_depth": 1,
        "patch": [4, 5, 5],
        "codebook": 64,
    },
    "input": [1, 8, 10, 10],
    "output": [16],
}


@pytest.mark.parametrize("entry", [HEAD, VIT], ids=["head", "vit"])
def test_a_checkpoint_has_the_same_bytes_under_any_name(entry: dict[str, Any], tmp_path: Path) -> None:
    synthesize_checkpoint(entry, tmp_path / "one.pt")
    synthesize_checkpoint(entry, tmp_path / "another.pth")

    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another.pth").read_bytes()


def test_a_synthetic_checkpoint_loads_like_a_real_one(tmp_path: Path) -> None:
    synthesize_checkpoint(HEAD, tmp_path / "head.pth")
    synthesize_checkpoint(VIT, tmp_path / "vit.pt")

    mlp.load_network(tmp_path / "head.pth", HEAD)
    ctvit.load_network(tmp_path / "vit.pt", VIT)


def test_variants_of_one_architecture_differ(tmp_path: Path) -> None:
    for name in ("ProjectionVIT_Base_V2", "ProjectionVIT_LiPro_V2"):
        synthesize_checkpoint(VIT | {"checkpoint": f"CT-RATE/{name}.pt"}, tmp_path / name)

    base, lipro = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert base != lipro


def test_bpr_settings_are_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vgg = pytest.importorskip("convertation.bpr.vgg")
    monkeypatch.setattr(vgg, "make_synthetic_settings", lambda entry: {"slope_mean": entry["slope"]}, raising=False)

    synthesize_checkpoint({"family": "bpr", "slope": 0.5}, tmp_path / "inference-settings.json")

    assert json.loads((tmp_path / "inference-settings.json").read_text()) == {"slope_mean": 0.5}
