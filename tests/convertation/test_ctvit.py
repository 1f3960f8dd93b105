"""CT-ViT gives every number of the reference, and each plausible mistake in the network is noticed."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from convertation.vit import ctvit

REFERENCE = Path(__file__).parents[1] / "reference"
FULL: dict[str, Any] = {
    "input": [1, 240, 480, 480],
    "output": [512],
    "network": {
        "dim": 512,
        "heads": 8,
        "dim_head": 32,
        "spatial_depth": 4,
        "temporal_depth": 4,
        "patch": [10, 20, 20],
        "codebook": 8192,
    },
}
SMALL: dict[str, Any] = {
    "input": [1, 40, 60, 60],
    "output": [48],
    "network": {
        "dim": 64,
        "heads": 4,
        "dim_head": 16,
        "spatial_depth": 2,
        "temporal_depth": 3,
        "patch": [10, 20, 20],
        "codebook": 256,
    },
}
TOLERANCE = 1e-5


def mismatches(fold: bool = False, gpu: bool = False) -> list[str]:
    """Return the names of the reference's values that the network does not reproduce."""
    reference: dict[str, Tensor] = load_file(REFERENCE / "ctvit_small.safetensors")
    network = ctvit.load_network(REFERENCE / "ProjectionVIT_small.pt", SMALL)
    network = network.fold(gpu) if fold else network
    spatial = network.attend_in_frames(network.embed_volume(reference["input"]))
    tokens = network.attend_along_time(spatial)
    codes = network.quantise(tokens)
    values = {
        "attention_bias": network.bias if network.bias is not None else network.compute_bias(),
        "tokens_after_spatial": spatial.flatten(2, 3).flatten(0, 1),
        "tokens_after_temporal": tokens.permute(0, 2, 3, 1, 4).flatten(1, 2).flatten(0, 1),
        "codes": codes.flatten(1),
        "quantized": network.get_rows()[codes],
        "embedding": network(reference["input"]),
    }
    assert set(values) | {"input"} == set(reference)
    return [name for name, value in values.items() if not close(value, reference[name])]


def close(value: Tensor, reference: Tensor) -> bool:
    if value.shape != reference.shape:
        return False
    exact = not reference.is_floating_point()
    return bool((value == reference).all() if exact else ((value - reference).abs() < TOLERANCE).all())


def test_every_value_is_the_reference() -> None:
    assert mismatches() == []


@pytest.mark.parametrize("gpu", [False, True])
def test_folding_changes_no_value(gpu: bool) -> None:
    assert mismatches(fold=True, gpu=gpu) == []


# ── each mistake must be noticed ────────────────────────────────────────────────────────────────────────────────────


def keys_and_values_of_normed_tokens(patch: pytest.MonkeyPatch) -> None:
    original = ctvit.Attention.project_keys_values
    patch.setattr(ctvit.Attention, "project_keys_values", lambda self, x: original(self, self.norm(x)))


def temporal_positions_with_axes_moved(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ctvit, "reshape_to_grid", lambda x, grid: x.unflatten(1, grid[1:]).permute(0, 3, 1, 2, 4))
    patch.setattr(ctvit, "reshape_to_sequences", lambda x, grid: x.permute(0, 2, 3, 1, 4).flatten(1, 2))


def positions_that_see_the_future(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ctvit, "CAUSAL", (1, 1, 1, 1, 1, 1))


def tanh_gelu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(functional, "gelu", functools.partial(functional.gelu, approximate="tanh"))


def gate_and_value_swapped(patch: pytest.MonkeyPatch) -> None:
    original = ctvit.split_in_two
    patch.setattr(ctvit, "split_in_two", lambda weight: original(weight)[::-1])


def height_and_width_swapped_in_the_bias(patch: pytest.MonkeyPatch) -> None:
    original = ctvit.list_distances
    patch.setattr(ctvit, "list_distances", lambda height, width, like: original(height, width, like).flip(-1))


def height_and_width_swapped_in_the_patches(patch: pytest.MonkeyPatch) -> None:
    original = ctvit.cut_patches
    patch.setattr(ctvit, "cut_patches", lambda volume, size: original(volume.transpose(-2, -1), size))


def heads_swapped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ctvit, "split_heads", lambda x, heads: x.unflatten(-1, (-1, heads)).movedim(-1, -3))


def codebook_rows_of_length_one(patch: pytest.MonkeyPatch) -> None:
    original = ctvit.CTViT.get_rows
    patch.setattr(ctvit.CTViT, "get_rows", lambda self: functional.normalize(original(self), dim=-1))


def codes_by_product_instead_of_cosine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ctvit.CTViT, "compute_directions", lambda self, dtype=None: self.get_rows())


MISTAKES: list[Callable[[pytest.MonkeyPatch], None]] = [
    keys_and_values_of_normed_tokens,
    temporal_positions_with_axes_moved,
    positions_that_see_the_future,
    tanh_gelu,
    gate_and_value_swapped,
    height_and_width_swapped_in_the_bias,
    height_and_width_swapped_in_the_patches,
    heads_swapped,
    codebook_rows_of_length_one,
    codes_by_product_instead_of_cosine,
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)

    assert mismatches() != []


# ── geometry and synthetic weights ──────────────────────────────────────────────────────────────────────────────────


def test_the_keys_are_those_of_the_full_checkpoint() -> None:
    keys = {key: list(tensor.shape) for key, tensor in ctvit.build_network(FULL).state_dict().items()}

    assert keys == json.loads((REFERENCE / "ctvit_full_state_dict.json").read_text())


def test_a_volume_must_be_made_of_whole_patches() -> None:
    with pytest.raises(ValueError, match=r"input=\[1, 40, 60, 50\] is not made of whole patches, patch=\[10, 20, 20\]"):
        ctvit.build_network(SMALL | {"input": [1, 40, 60, 50]})


@pytest.mark.parametrize("gpu", [False, True])
def test_another_geometry_works(gpu: bool) -> None:
    entry = SMALL | {"input": [2, 50, 40, 80], "output": [16]}  # 5 × 2 × 4 tokens, two channels
    network = ctvit.build_network(entry).eval()
    network.load_state_dict(real_part(entry), assign=True)
    volume = torch.rand(1, 2, 50, 40, 80, generator=torch.Generator().manual_seed(0))

    straight = network.encode(volume)

    assert straight.shape == (1, 5, 2, 4, 64)
    assert torch.allclose(network.fold(gpu).encode(volume), straight, atol=TOLERANCE)
    assert network(volume).shape == (1, 16)


def real_part(entry: dict[str, Any]) -> dict[str, Tensor]:
    """Synthetic weights without the keys that inference ignores."""
    made = ctvit.make_synthetic_state_dict(entry)
    return {key: made[key] for key in ctvit.build_network(entry).state_dict()}


def test_synthetic_weights_have_the_surplus_keys_of_real_files() -> None:
    real = torch.load(REFERENCE / "ProjectionVIT_small.pt", weights_only=True)

    made = ctvit.make_synthetic_state_dict(SMALL)

    assert {key: made[key].shape for key in real} == {key: tensor.shape for key, tensor in real.items()}
    assert all(tensor.dtype == torch.float32 for tensor in made.values())


def test_synthetic_weights_use_many_codes_and_tell_volumes_apart() -> None:
    network = ctvit.build_network(SMALL).eval()
    network.load_state_dict(real_part(SMALL), assign=True)
    network.requires_grad_(False)
    volumes = torch.rand(4, 1, 40, 60, 60, generator=torch.Generator().manual_seed(0)) * 2 - 1

    tokens = network.encode(volumes)
    codes = network.quantise(tokens)
    embeddings = network.project(codes)

    assert 0.3 < float(tokens.std()) < 3
    assert len(codes.unique()) > codes.numel() // 4
    assert float((embeddings[0] - embeddings[1]).abs().max()) > 0.1 * float(embeddings.abs().max())
