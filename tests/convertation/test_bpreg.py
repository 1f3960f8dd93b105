"""bpreg gives the original implementation's slices, tags and answers; each special case has its own test."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convertation.bpr.bpreg import Settings, preprocess, read, tag
from convertation.bpr.vgg import VGG

REFERENCE = Path(__file__).parents[1] / "reference"
SCORES = json.loads((REFERENCE / "bpr_scores.json").read_text())
SETTINGS = Settings.parse(SCORES["inference_settings"])
SPACING = (3.5, 3.5, 5.0)  # mm; in x and y as the network wants it


@pytest.mark.parametrize("number", range(4))
def test_slices_are_the_original_ones(number: int) -> None:
    with np.load(REFERENCE / "bpr_volumes.npz") as data:
        volume, spacing, expected, scores = (
            data[f"{name}{number}"] for name in ("volume", "spacing", "slices", "scores")
        )

    slices = preprocess(volume, spacing)

    assert slices.shape == (len(scores), 1, 128, 128) and slices.dtype == np.float32
    np.testing.assert_allclose(slices[::8, 0], expected, rtol=0, atol=1e-6)


def test_slices_do_not_depend_on_how_many_are_worked_on_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = np.random.default_rng(0).integers(-1100, 1600, (7, 60, 50), np.int16)
    together = preprocess(volume, SPACING)

    monkeypatch.setattr(importlib.import_module("convertation.bpr.bpreg.preprocess"), "SLAB", 2 * 60 * 50)

    np.testing.assert_allclose(preprocess(volume, SPACING), together, rtol=0, atol=1e-6)


def test_a_slice_of_250_hu_all_over_is_dropped_unless_padded() -> None:
    volume = np.full((3, 140, 130), 251, np.int16)
    volume[1] = 250

    assert len(preprocess(volume, SPACING)) == 2
    assert len(preprocess(volume[:, :100], SPACING)) == 3


def test_each_side_is_padded_or_cropped_by_itself_and_x_is_the_row_axis() -> None:
    volume = np.full((1, 131, 101), 1500, np.int16)  # y is cropped, x padded by 13 before and 14 after

    (plane,) = preprocess(volume, SPACING)[0]

    assert (plane[13:114] > 0.999).all() and (plane[:13] == -1).all() and (plane[114:] == -1).all()


@pytest.mark.parametrize(
    ("shape", "spacing", "message"),
    [
        ((3, 40, 40), (0.1, 3.5, 5), "40 voxels of 0.1 mm resample to 1 of 3.5 mm, expected 2 or more"),
        ((3, 40, 40), (3.5, 0.01, 5), "40 voxels of 0.01 mm resample to 0 of 3.5 mm, expected 2 or more"),
        ((3, 40, 40), (3.5, 3.5, 0), r"spacing \[3.5, 3.5, 0.0\], expected x, y, z in mm, 0.01 to 1000"),
        ((3, 40, 40), (3.5, np.nan, 5), r"spacing \[3.5, nan, 5.0\], expected x, y, z in mm"),
        ((3, 0, 40), SPACING, r"volume is int16 \[3, 0, 40\], expected int16 \(z, y, x\), none of them 0"),
    ],
)
def test_a_volume_without_an_answer_is_an_error(shape: tuple[int, ...], spacing: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocess(np.zeros(shape, np.int16), spacing)


def test_all_cases_have_the_original_tag_validity_and_direction() -> None:
    cases = SCORES["cases"]
    assert len(cases) == 192

    for case in cases:
        reading = read(case["scores"], case["z_spacing"], SETTINGS)
        valid = float("nan") if np.isnan(reading.slope) else float(reading.valid)

        assert tag(case["scores"], case["z_spacing"], SETTINGS) == case["tag"]
        assert reading.reverse == case["reverse"]
        np.testing.assert_equal(valid, case["valid_zspacing"])


@pytest.mark.parametrize("ramp", SCORES["linear_network"]["ramps"], ids=lambda ramp: ramp["tag"])
def test_ramps_have_the_original_tag_end_to_end(ramp: dict[str, Any]) -> None:
    depth, *_ = ramp["shape"]
    low, high = ramp["hu"]
    volume = low + (high - low) * np.arange(depth)[:, None, None] / (depth - 1)
    volume = np.rint(volume + np.random.RandomState(ramp["seed"]).normal(0, 2, ramp["shape"])).astype(np.int16)
    volume = volume[::-1] if ramp["flip"] else volume

    with torch.inference_mode():
        scores = linear_network()(torch.from_numpy(preprocess(volume, ramp["spacing"])))

    assert tag(scores.numpy(), ramp["spacing"][2], SETTINGS) == ramp["tag"]


def linear_network() -> VGG:
    """The reference's network: only channel 0 carries values, so two channels are as good as 64."""
    network = VGG(channels=2, side=128)
    for key, tensor in network.state_dict().items():
        tensor.zero_()
        if tensor.ndim == 4:
            tensor[0, 0, tensor.shape[2] // 2, tensor.shape[3] // 2] = 1
        elif key == "fc7.weight":
            tensor[0, 0] = SCORES["linear_network"]["gain"]
        elif key == "fc7.bias":
            tensor[0] = SCORES["linear_network"]["bias"]
    return network.eval()


def test_scores_that_are_all_empty_slices_are_nothing() -> None:
    assert tag([6.14, 110.83, 6.22], 5.0, SETTINGS) == "NONE"


def test_no_score_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"scores have shape \[0\], expected .* at least one slice"):
        tag([], 5.0, SETTINGS)


def test_settings_that_cannot_be_used_are_errors_that_say_why(tmp_path: Path) -> None:
    path = tmp_path / "inference-settings.json"
    with pytest.raises(ValueError, match="no such file"):
        Settings.read(path)

    for text, message in (
        ("{", "Expecting property name"),
        ("{}", "lacks 'lookuptable_train_val'"),
        ("[]", "list indices"),
        (json.dumps(SCORES["inference_settings"] | {"slope_mean": float("nan")}), "NaN, infinite"),
        (json.dumps(SCORES["inference_settings"] | {"slope_mean": None}), "float"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"inference-settings.json: .*{message}.*; expected|lacks"):
            Settings.read(path)
