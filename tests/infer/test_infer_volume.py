"""The ViT's input equals the original preprocessing and PyTorch's interpolate on the whole volume."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scripts.infer.messages import StudyError
from scripts.infer.volume import TARGET, Volume, make_axis, orient_axes, preprocess_volume
from tests.dicom_studies import volume_of

REFERENCE = Path(__file__).parents[1] / "reference"


def straightforward(volume: Volume, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """The definition: resize the whole volume in float64 with PyTorch, then crop and pad."""
    hu = torch.from_numpy(np.ascontiguousarray(volume.hu).astype(np.float64)).clip(-1000, 1000)
    size = [int(n * (mm / target)) for n, mm, target in zip(volume.hu.shape, volume.spacing, TARGET, strict=True)]
    whole = torch.nn.functional.interpolate(hu[None, None], size=size, mode="trilinear", align_corners=False)[0, 0]
    result = np.full(shape, -1, np.float32)
    inside, outside = [], []
    for n, kept in zip(size, shape, strict=True):
        skip, pad = max(0, (n - kept) // 2), max(0, (kept - n) // 2)
        inside.append(slice(skip, skip + min(n, kept)))
        outside.append(slice(pad, pad + min(n, kept)))
    result[tuple(outside)] = (whole / 1000).numpy()[tuple(inside)]
    return result


def test_the_reference_study_gives_the_original_tensor() -> None:
    tensor = preprocess_volume(volume_of(REFERENCE / "study.nii.gz"))

    with np.load(REFERENCE / "study.npz") as expected:
        assert (1, *tensor.shape) == tuple(expected["shape"])
        np.testing.assert_allclose(tensor[tuple(expected["index"].T)], expected["value"], rtol=0, atol=1e-6)
        mean = tensor.mean((1, 2), dtype=np.float64)
        np.testing.assert_allclose(mean, expected["mean_per_plane"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_the_tensor_equals_interpolation_of_the_whole_volume(seed: int) -> None:
    """Random sizes, spacings, memory orders and flips: cropped, padded, coarser and finer."""
    random = np.random.default_rng(seed)
    size = random.integers(2, 60, 3)
    spacing = tuple(float(mm) for mm in random.uniform(0.3, 4, 3) * (2, 1, 1))
    stored = random.integers(-1500, 1500, size, np.int16)[
        tuple(slice(None, None, random.choice([-1, 1])) for _ in "zyx")
    ]
    order = random.permutation(3)
    hu = np.ascontiguousarray(stored.transpose(order)).transpose(np.argsort(order))
    if seed % 4 == 0:
        hu = hu + random.random(hu.shape, np.float32)
    shape = tuple(int(n) for n in random.integers(8, 70, 3))
    volume = Volume(hu, spacing)  # type: ignore[arg-type]

    if 0 in [int(n * (mm / target)) for n, mm, target in zip(size, spacing, TARGET, strict=True)]:
        with pytest.raises(StudyError):
            preprocess_volume(volume, shape)  # type: ignore[arg-type]
    else:
        tensor = preprocess_volume(volume, shape)  # type: ignore[arg-type]
        np.testing.assert_allclose(tensor, straightforward(volume, shape), rtol=0, atol=2e-6)  # type: ignore[arg-type]


def test_the_tensor_does_not_depend_on_the_number_of_threads() -> None:
    volume = Volume(np.random.default_rng(0).integers(-1100, 1100, (30, 40, 50), np.int16), (2.0, 1.0, 0.9))

    assert np.array_equal(
        preprocess_volume(volume, (24, 48, 48), threads=1), preprocess_volume(volume, (24, 48, 48), threads=5)
    )


def test_the_new_size_is_computed_in_the_original_order_of_operations() -> None:
    assert len(make_axis(500, 0.6, 1.5, 240).below) == 199  # 500 * 0.6 / 1.5 would be 200


@pytest.mark.parametrize("seed", range(20))
def test_axes_become_superior_left_and_posterior_from_any_order(seed: int) -> None:
    """Also if the axes are a little oblique, as with turned heads and tables."""
    random = np.random.default_rng(seed)
    anatomy = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)  # superior, left, posterior
    world = {0: 2, 1: 0, 2: 1}  # its axes among Left, Posterior, Superior
    order, signs = random.permutation(3), random.choice([-1, 1], 3)
    stored = anatomy.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
    directions = np.zeros((3, 3))
    for axis, (source, sign) in enumerate(zip(order, signs, strict=True)):
        directions[world[int(source)], axis] = sign * (axis + 1)
    tilt = np.linalg.qr(np.eye(3) + random.uniform(-0.15, 0.15, (3, 3)))[0]
    tilt *= np.sign(np.diag(tilt))

    view, axes = orient_axes(stored, tilt @ directions)

    assert np.array_equal(view, anatomy)
    assert np.shares_memory(view, anatomy)
    assert [order[axis] for axis in axes] == [0, 1, 2]


def test_the_body_part_network_gets_z_y_x_and_the_spacing_as_x_y_z() -> None:
    hu = np.arange(24, dtype=np.int16).reshape(2, 3, 4)  # superior, left, posterior

    turned, spacing = Volume(hu + np.float32(0.4), (5.0, 0.7, 0.8)).convert_for_body_part()

    assert turned.dtype == np.int16 and np.array_equal(turned, hu.transpose(0, 2, 1))
    np.testing.assert_allclose(spacing, [0.7, 0.8, 5.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "spacing", "key"),
    [
        ((1, 40, 40), (5.0, 1.0, 1.0), "few_slices"),
        ((9, 40, 40), (float("nan"), 1.0, 1.0), "spacing"),
        ((9, 40, 40), (5.0, 0.0, 1.0), "spacing"),
        ((9, 40, 40), (5.0, 1.0, 1e9), "spacing"),
        ((2, 40, 40), (0.5, 1.0, 1.0), "too_small"),
    ],
)
def test_an_impossible_volume_is_refused(shape: tuple[int, ...], spacing: tuple[float, ...], key: str) -> None:
    with pytest.raises(StudyError) as error:
        preprocess_volume(Volume(np.zeros(shape, np.int16), spacing))  # type: ignore[arg-type]
    assert error.value.key == key


def test_a_gigantic_volume_is_refused_by_its_declared_size() -> None:
    nothing = np.broadcast_to(np.int16(0), (60000, 60000, 60000))
    with pytest.raises(StudyError) as error:
        preprocess_volume(Volume(nothing, (1.0, 1.0, 1.0)))
    assert error.value.key == "too_large"


def test_voxels_that_are_not_numbers_count_as_air() -> None:
    hu = np.full((8, 8, 8), np.nan, np.float32)

    assert (preprocess_volume(Volume(hu, (1.5, 0.75, 0.75)), (8, 8, 8)) == -1).all()
