"""The heads give the reference's logits, folded or not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from convertation.head import mlp

REFERENCE = Path(__file__).parents[1] / "reference"
BINARY = {"family": "head", "network": {"sizes": [512, 256, 128, 2], "activation": "gelu"}}
MULTILABEL = {"family": "head", "network": {"sizes": [512, 512, 256, 128, 20], "activation": "leaky_relu"}}
LIPRO = {"family": "head", "network": {"sizes": [512, 18], "activation": "relu"}}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "binary": ("model_binary.pth", BINARY),
    "multilabel": ("model_multilabel.pth", MULTILABEL),
    "lipro": ("ClassifierHead_LiPro_V2.pt", LIPRO),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "leaky_relu": torch.nn.functional.leaky_relu,
}


def difference(name: str, fold: bool = False) -> float:
    """Return the largest difference between a head's logits and the reference's."""
    checkpoint, entry = HEADS[name]
    reference: dict[str, Tensor] = load_file(REFERENCE / "heads.safetensors")
    network = mlp.load_network(REFERENCE / checkpoint, entry)
    network = network.fold() if fold else network
    return float((network(reference["input"]) - reference[f"{name}_logits"]).abs().max())


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_the_reference(name: str) -> None:
    assert difference(name) < 1e-5


@pytest.mark.parametrize("name", HEADS)
def test_folding_the_normalisation_changes_no_logit(name: str) -> None:
    assert difference(name, fold=True) < 1e-5


def test_folding_leaves_linear_layers_and_activations_alone() -> None:
    kinds = [type(layer).__name__ for layer in mlp.load_network(REFERENCE / "model_binary.pth", BINARY).fold().layers]

    assert kinds == ["Linear", "GELU", "Linear", "GELU", "Linear"]


def test_tanh_gelu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mlp.ACTIVATIONS, "gelu", lambda: torch.nn.GELU(approximate="tanh"))

    assert difference("binary") > 1e-5


def test_another_slope_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mlp.ACTIVATIONS, "leaky_relu", lambda: torch.nn.LeakyReLU(0.02))

    assert difference("multilabel") > 1e-5


def test_a_head_without_its_relu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mlp.ACTIVATIONS, "relu", torch.nn.Identity)

    assert difference("lipro") > 1e-2


@pytest.mark.parametrize("activation, function", FUNCTIONS.items())
def test_a_head_without_hidden_sizes_is_activation_and_linear_under_either_name(
    activation: str, function: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, embedding = (torch.randn(*shape, generator=generator) for shape in ((3, 8), (3,), (5, 8)))
    entry = {"family": "head", "network": {"sizes": [8, 3], "activation": activation}}
    expected = torch.nn.functional.linear(function(embedding), weight, bias)

    for name in ("classifier", "layers.2"):
        torch.save({f"{name}.weight": weight, f"{name}.bias": bias}, tmp_path / "head.pth")
        network = mlp.load_network(tmp_path / "head.pth", entry)
        assert set(network.state_dict()) == {f"{name}.weight", f"{name}.bias"}
        assert torch.equal(network(embedding), expected)
        assert torch.equal(network.fold()(embedding), expected)


def test_relu_stands_between_hidden_layers_and_is_the_default() -> None:
    kinds = [type(layer).__name__ for layer in mlp.MLP([8, 4, 2]).layers]

    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match=r"activation='relu6', expected one of \['gelu', 'leaky_relu', 'relu'\]"):
        mlp.MLP([8, 4, 2], activation="relu6")


@pytest.mark.parametrize("name", HEADS)
def test_synthetic_weights_have_the_keys_shapes_and_types_of_real_ones(name: str) -> None:
    checkpoint, entry = HEADS[name]
    real = torch.load(REFERENCE / checkpoint, weights_only=True)

    made = mlp.make_synthetic_state_dict(entry)

    assert {key: (t.shape, t.dtype) for key, t in made.items()} == {key: (t.shape, t.dtype) for key, t in real.items()}


@pytest.mark.parametrize("name", HEADS)
def test_synthetic_heads_tell_embeddings_apart(name: str) -> None:
    entry = HEADS[name][1]
    network = mlp.build_network(entry).eval()
    network.load_state_dict(mlp.make_synthetic_state_dict(entry), assign=True)
    network.requires_grad_(False)
    embeddings = torch.nn.functional.normalize(torch.randn(16, 512, generator=torch.Generator().manual_seed(0)))

    logits = network(embeddings)

    assert float(logits.std(dim=0).min()) > 1e-3
    assert float(logits.abs().max()) < 30
