"""BPR's network gives the original implementation's scores; its synthetic weights and ONNX file are right, too."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor

from convertation.bpr.bpreg import Settings, preprocess, tag
from convertation.bpr.torch2onnx import torch2onnx
from convertation.bpr.vgg import (
    VGG,
    build_network,
    count_multiply_adds,
    load_network,
    make_synthetic_settings,
    make_synthetic_state_dict,
)
from scripts.convert.compare_bpr import check_scores
from scripts.convert.sample import make_sample

REFERENCE = Path(__file__).parents[1] / "reference"
SHAPES = json.loads((REFERENCE / "bpr_state_dict.json").read_text())
FULL: dict[str, Any] = {
    "name": "bpr",
    "family": "bpr",
    "network": {"channels": 64},
    "input": [1, 128, 128],
    "batch": [1, 8, 32],
}
TINY = FULL | {"network": {"channels": 4}}


def test_keys_and_shapes_are_the_checkpoint_s() -> None:
    assert {key: list(tensor.shape) for key, tensor in build_network(FULL).state_dict().items()} == SHAPES


def test_scores_are_the_original_ones() -> None:
    network = VGG(channels=64, side=128).eval()
    network.load_state_dict({key: reference_tensor(key, shape) for key, shape in SHAPES.items()})

    with np.load(REFERENCE / "bpr_volumes.npz") as data, torch.inference_mode():
        for i in range(4):
            scores = network(torch.from_numpy(data[f"slices{i}"][:, None]))
            np.testing.assert_allclose(scores.numpy(), data[f"scores{i}"][::8], rtol=0, atol=1e-3)


def reference_tensor(key: str, shape: list[int]) -> Tensor:
    values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(values * np.float32(np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.05))


def test_a_slice_costs_five_billion_multiply_adds() -> None:
    assert count_multiply_adds(FULL) == 4_996_465_152


@pytest.mark.parametrize("side", [100, 0, 33])
def test_a_side_that_five_pools_do_not_divide_is_an_error(side: int) -> None:
    with pytest.raises(ValueError, match=f"side={side}: expected .* multiple of 32"):
        VGG(channels=4, side=side)


def test_the_synthetic_checkpoint_is_the_real_one_s_twin_and_always_the_same() -> None:
    state = make_synthetic_state_dict(FULL)

    assert {key: list(tensor.shape) for key, tensor in state.items()} == SHAPES
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    again = make_synthetic_state_dict(FULL)
    assert all(torch.equal(tensor, again[key]) for key, tensor in state.items())


@pytest.mark.parametrize("channels", [2, 4, 8])
def test_the_synthetic_network_calls_the_sample_a_chest(channels: int) -> None:
    network = VGG(channels=channels, side=128).eval()
    entry = TINY | {"network": {"channels": channels}}
    network.load_state_dict(make_synthetic_state_dict(entry))

    for seed in range(3):
        request = make_sample(entry, seed, 1)
        with torch.inference_mode():
            scores = network(torch.from_numpy(preprocess(request["input"][0], request["metadata"][0])))
        assert tag(scores.numpy(), request["metadata"][0, 2], Settings.parse(make_synthetic_settings(entry))) == "CHEST"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model.pt, its inference-settings.json and its model.onnx."""
    folder = tmp_path_factory.mktemp("bpr")
    torch.save(make_synthetic_state_dict(TINY) | {"epoch": torch.tensor(7)}, folder / "model.pt")
    (folder / "inference-settings.json").write_text(json.dumps(make_synthetic_settings(TINY)))
    torch2onnx(folder / "model.pt", TINY, folder / "model.onnx", opset=20, metadata={"weights": "synthetic"})
    return folder


def test_the_onnx_file_gives_the_same_scores_for_any_number_of_slices(made: Path) -> None:
    network = load_network(made / "model.pt", TINY)
    session = onnxruntime.InferenceSession(made / "model.onnx", providers=["CPUExecutionProvider"])
    slices = np.random.default_rng(1).uniform(-1, 1, (5, 1, 128, 128)).astype(np.float32)

    for count in 1, 5:
        with torch.inference_mode():
            expected = network(torch.from_numpy(slices[:count])).numpy()
        (scores,) = session.run(["output"], {"input": slices[:count]})
        assert scores.shape == (count,)
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_the_check_returns_the_tag_a_server_must_answer(made: Path) -> None:
    result = check_scores(made / "model.pt", TINY, made / "model.onnx")

    assert result["served"] == [
        {"seed": 0, "first": 0, "batch": 1, "output": ["CHEST"]},
        {"seed": 0, "first": 1, "batch": 1, "output": ["NONE"]},  # the same height in every slice
    ]
    assert 0 <= result["difference"] < 1e-4 < result["scale"]


def test_the_check_says_which_settings_are_missing(made: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt").symlink_to(made / "model.pt")

    with pytest.raises(SystemExit, match=r"inference-settings\.json: no such file; .*\nput the network's own beside"):
        check_scores(tmp_path / "model.pt", TINY, made / "model.onnx")


def test_a_checkpoint_without_a_needed_key_is_an_error_that_names_it(made: Path, tmp_path: Path) -> None:
    state = make_synthetic_state_dict(TINY)
    del state["conv6.bias"]
    torch.save(state, tmp_path / "model.pt")

    with pytest.raises(SystemExit, match=r"model\.pt.*conv6\.bias"):
        load_network(tmp_path / "model.pt", TINY)
