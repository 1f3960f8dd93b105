"""scripts/convert/sample.py: the seeded requests."""

import hashlib
import time
from typing import Any

import numpy as np
import pytest

from scripts.convert.sample import make_sample

VIT: dict[str, Any] = {"family": "vit", "input": [1, 40, 60, 60]}
HEAD: dict[str, Any] = {"family": "head", "input": [512]}
BPR: dict[str, Any] = {"family": "bpr", "input": [1, 128, 128]}


@pytest.mark.parametrize(
    ("entry", "digest"),
    [(VIT, "70f35864ce97f501"), (HEAD, "98bef159475f241d"), (BPR, "33236fc035fa4c00")],
    ids=["vit", "head", "bpr"],
)
def test_a_request_has_the_same_bytes_everywhere(entry: dict[str, Any], digest: str) -> None:
    request = make_sample(entry, seed=0, batch=1)

    assert hashlib.sha256(request["input"].tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("entry", [VIT, HEAD], ids=["vit", "head"])
def test_a_larger_batch_begins_with_the_samples_of_a_smaller_one(entry: dict[str, Any]) -> None:
    large, small = make_sample(entry, 0, 3)["input"], make_sample(entry, 0, 2)["input"]

    assert np.array_equal(large[:2], small)


@pytest.mark.parametrize("entry", [VIT, HEAD], ids=["vit", "head"])
def test_samples_and_seeds_differ(entry: dict[str, Any]) -> None:
    first, second = make_sample(entry, 0, 2)["input"]
    other = make_sample(entry, 1, 1)["input"][0]

    assert np.abs(first - second).mean() > 0.01
    assert np.abs(first - other).mean() > 0.01


@pytest.mark.parametrize("shape", [[1, 20, 40, 40], [1, 40, 60, 60], [1, 60, 120, 100]])
def test_a_volume_has_padding_air_lung_tissue_and_bone(shape: list[int]) -> None:
    (volume,) = make_sample({"family": "vit", "input": shape}, 0, 1)["input"]
    hu = volume * 1000

    assert volume.shape == tuple(shape) and volume.dtype == np.float32
    assert volume.min() == -1 and volume.max() <= 1
    assert np.array_equal(np.rint(hu), np.float32(hu.round(3)).round())  # whole Hounsfield units
    shares = [
        ((low <= hu) & (hu < high)).mean() for low, high in [(-1001, -950), (-950, -700), (-60, 150), (200, 1001)]
    ]
    assert all(share > 0.01 for share in shares), shares


@pytest.mark.parametrize("shape", [[1, 20, 40, 40], [1, 40, 60, 60], [1, 80, 160, 160]])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_volume_has_patches_of_quiet_air_metal_at_the_clip_and_padding(shape: list[int], seed: int) -> None:
    """Some patches of 10 x 20 x 20 voxels, the ViT's size, have a mean of more than a hundred times their spread."""
    (volume,) = make_sample({"family": "vit", "input": shape}, seed, 1)["input"][0].astype(np.float64)
    t, h, w = (size // part for size, part in zip(volume.shape, (10, 20, 20), strict=True))
    patches = volume.reshape(t, 10, h, 20, w, 20).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 4000)
    mean, spread = patches.mean(axis=1), patches.std(axis=1)

    assert ((np.abs(mean) > 100 * spread) & (spread > 0)).any()
    assert (volume == 1).any() and (volume == -1).mean() > 0.05
    assert ((volume > -1) & (volume < -0.95)).mean() > 0.02


def test_a_full_size_volume_takes_seconds_not_minutes() -> None:
    start = time.process_time()

    make_sample({"family": "vit", "input": [1, 240, 480, 480]}, 0, 1)

    assert time.process_time() - start < 15  # 1.6 s on a quiet machine


def test_features_have_length_one() -> None:
    features = make_sample(HEAD, 0, 8)["input"]

    assert features.shape == (8, 512) and features.dtype == np.float32
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)


def test_a_series_brightens_from_slice_to_slice() -> None:
    request = make_sample(BPR, 0, 1)
    (volume,), ((x, y, z),) = request["input"], request["metadata"]

    assert volume.dtype == np.int16 and request["metadata"].dtype == np.float32
    assert len({x, y, z, *volume.shape}) == 6  # a swapped axis or spacing shows
    assert (np.diff(volume.mean(axis=(1, 2))) > 5).all()
    assert volume.std(axis=(1, 2)).min() > 20


def test_bpr_takes_one_series_at_a_time() -> None:
    with pytest.raises(ValueError, match="batch=2"):
        make_sample(BPR, 0, 2)
