"""Checkpoints are read safely, with clear errors."""

import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convertation.head import mlp

HEAD: dict[str, Any] = {
    "family": "head",
    "network": {"sizes": [8, 6, 4, 3], "activation": "gelu"},
    "input": [8],
    "output": [3],
    "batch": [1, 4, 8],
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "head.pth"
    torch.save(mlp.synthetic(HEAD), path)
    return path


def refusal(path: Path, entry: dict[str, Any] = HEAD) -> str:
    """What the user reads when this checkpoint is not taken."""
    with pytest.raises(SystemExit) as caught:
        mlp.load(path, entry)
    return str(caught.value).replace(str(path.parent), "…")


def rewrite(path: Path, **changes: Any) -> None:
    """Save the checkpoint anew with other values under some keys (dots as __); None removes the key."""
    state = torch.load(path, weights_only=True)
    state.update({key.replace("__", "."): value for key, value in changes.items()})
    torch.save({key: value for key, value in state.items() if value is not None}, path)


def test_a_checkpoint_is_loaded_for_inference(checkpoint: Path) -> None:
    network = mlp.load(checkpoint, HEAD)

    assert not network.training
    assert not any(weight.requires_grad for weight in network.parameters())
    assert torch.equal(network.layers[0].weight, mlp.synthetic(HEAD)["layers.0.weight"])


def test_surplus_keys_are_ignored(checkpoint: Path) -> None:
    rewrite(checkpoint, decoder__weight=torch.zeros(3), epoch=7)

    mlp.load(checkpoint, HEAD)


def test_files_in_the_format_before_torch_1_6_are_read(checkpoint: Path) -> None:
    torch.save(mlp.synthetic(HEAD), checkpoint, _use_new_zipfile_serialization=False)

    mlp.load(checkpoint, HEAD)


def test_an_absent_checkpoint(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path / "head.pth") == "…/head.pth: no such file; put it there, or run make with WEIGHTS=synthetic"
    )


def test_an_empty_checkpoint(checkpoint: Path) -> None:
    checkpoint.write_bytes(b"")

    assert refusal(checkpoint) == (
        "…/head.pth: the file is empty; expected a checkpoint of torch.save; put it there again"
    )


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.01])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_checkpoint(checkpoint: Path, kept: float, zipped: bool) -> None:
    torch.save(mlp.synthetic(HEAD), checkpoint, _use_new_zipfile_serialization=zipped)
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(len(content) * kept)])

    size = int(len(content) * kept)
    assert refusal(checkpoint) == (
        f"…/head.pth: truncated or no checkpoint ({size} bytes); expected a file of torch.save; put it there again"
    )


@pytest.mark.parametrize("content", [b"<html>404</html>", b"\x89PNG\r\n", b"\0" * 1000, b"{}"])
def test_a_file_that_is_no_checkpoint(checkpoint: Path, content: bytes) -> None:
    checkpoint.write_bytes(content)

    assert "truncated or no checkpoint" in refusal(checkpoint)


def test_a_zip_file_that_is_no_checkpoint(checkpoint: Path) -> None:
    with zipfile.ZipFile(checkpoint, "w") as archive:
        archive.writestr("CT-RATE/model_binary.pth", b"")

    assert "truncated or no checkpoint" in refusal(checkpoint)


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_never_executed(checkpoint: Path, zipped: bool) -> None:
    witness = checkpoint.with_name("executed")
    content = {**mlp.synthetic(HEAD), "surplus": Malicious(witness)}
    torch.save(content, checkpoint, _use_new_zipfile_serialization=zipped)

    message = refusal(checkpoint)

    assert message == (
        "…/head.pth: refused, reading it would run code; expected tensors only\n"
        "save it with torch.save(module.state_dict(), path)"
    )
    assert not witness.exists()


def test_a_pickled_module_is_refused(checkpoint: Path) -> None:
    torch.save(torch.nn.Linear(8, 3), checkpoint)

    assert "refused, reading it would run code" in refusal(checkpoint)


def test_a_lone_tensor_is_no_state_dict(checkpoint: Path) -> None:
    torch.save(torch.zeros(3), checkpoint)

    assert refusal(checkpoint) == (
        "…/head.pth: holds a Tensor; expected a state dict\nsave it with torch.save(module.state_dict(), path)"
    )


def test_missing_and_misshapen_keys_are_listed(checkpoint: Path) -> None:
    rewrite(
        checkpoint,
        layers__0__weight=torch.zeros(6, 9),
        layers__0__bias=torch.zeros(6, dtype=torch.float16),
        layers__8__bias=None,
        layers__1__running_mean="none",
    )

    assert refusal(checkpoint).splitlines()[0] == (
        "…/head.pth: not a checkpoint of this model; 1 of 16 keys missing: layers.8.bias; 3 misshapen: "
        "layers.0.weight is float32 [6, 9], expected float32 [6, 8], "
        "layers.0.bias is float16 [6], expected float32 [6], "
        "layers.1.running_mean is a str, expected float32 [6]"
    )


def test_a_checkpoint_of_another_model_says_what_it_holds(checkpoint: Path) -> None:
    torch.save(OrderedDict({"state_dict": mlp.synthetic(HEAD), "epoch": 3}), checkpoint)

    assert refusal(checkpoint) == (
        "…/head.pth: not a checkpoint of this model; 16 of 16 keys missing: layers.0.weight, layers.0.bias, "
        "layers.1.weight, layers.1.bias, layers.1.running_mean, layers.1.running_var, layers.1.num_batches_tracked, "
        "layers.4.weight and 8 more\n"
        "it holds state_dict, epoch\n"
        "put the model's own checkpoint there, or describe this one in convertation/models.yaml"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(checkpoint: Path, value: float) -> None:
    weight = mlp.synthetic(HEAD)["layers.4.weight"]
    weight[1, 2] = value
    rewrite(checkpoint, layers__4__weight=weight)

    assert refusal(checkpoint) == "…/head.pth: NaN or infinite weights in layers.4.weight; put a sound checkpoint there"
