"""Checkpoints are read safely, with clear errors."""

import bz2
import gzip
import lzma
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file

from convertation.checkpoint import read_guesses
from convertation.head import mlp
from convertation.vit import ctvit

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
    torch.save(mlp.make_synthetic_state_dict(HEAD), path)
    return path


def refusal(path: Path, entry: dict[str, Any] = HEAD) -> str:
    """Return what the user reads when this checkpoint is refused."""
    with pytest.raises(SystemExit) as caught:
        mlp.load_network(path, entry)
    return str(caught.value).replace(str(path.parent), "…")


def rewrite(path: Path, **changes: Any) -> None:
    """Save the checkpoint again with other values under some keys (a dot is written __); None removes the key."""
    state = torch.load(path, weights_only=True)
    state.update({key.replace("__", "."): value for key, value in changes.items()})
    torch.save({key: value for key, value in state.items() if value is not None}, path)


def test_a_checkpoint_is_loaded_for_inference(checkpoint: Path) -> None:
    network = mlp.load_network(checkpoint, HEAD)

    assert not network.training
    assert not any(weight.requires_grad for weight in network.parameters())
    assert torch.equal(network.layers[0].weight, mlp.make_synthetic_state_dict(HEAD)["layers.0.weight"])


def test_files_in_the_format_before_torch_1_6_are_read(checkpoint: Path) -> None:
    torch.save(mlp.make_synthetic_state_dict(HEAD), checkpoint, _use_new_zipfile_serialization=False)

    mlp.load_network(checkpoint, HEAD)


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
    torch.save(mlp.make_synthetic_state_dict(HEAD), checkpoint, _use_new_zipfile_serialization=zipped)
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(len(content) * kept)])

    size = int(len(content) * kept)
    assert refusal(checkpoint) == (
        f"…/head.pth: truncated or no checkpoint ({size} bytes); expected a file of torch.save; put it there again"
    )


@pytest.mark.parametrize("content", [b"\x89PNG\r\n", b"\0" * 1000, b"{}"])
def test_a_file_that_is_no_checkpoint(checkpoint: Path, content: bytes) -> None:
    checkpoint.write_bytes(content)

    assert "truncated or no checkpoint" in refusal(checkpoint)


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><body>Log in</body></html>", "an HTML page"),
        (b"\n <html>404</html>", "an HTML page"),
        (gzip.compress(b"x" * 100, mtime=0), "packed by gzip"),
        (bz2.compress(b"x" * 100), "packed by bzip2"),
        (lzma.compress(b"x" * 100), "packed by xz"),
        (pickle.dumps({"layers.0.weight": [0.0] * 20}), "a plain pickle"),
        (b"\x93NUMPY" + b"\0" * 100, "a NumPy array"),
    ],
)
def test_each_wrong_kind_of_file_has_its_own_sentence(checkpoint: Path, content: bytes, expected: str) -> None:
    checkpoint.write_bytes(content)

    assert refusal(checkpoint).startswith(f"…/head.pth: {expected}")


def test_archives_that_are_no_checkpoint_have_their_own_sentences(checkpoint: Path) -> None:
    network, content, other = (
        mlp.load_network(checkpoint, HEAD),
        checkpoint.read_bytes(),
        checkpoint.with_suffix(".pt2"),
    )
    torch.jit.save(torch.jit.trace(network, torch.zeros(2, 8)), other)  # type: ignore[no-untyped-call]
    other.replace(checkpoint)  # which is mapped
    assert refusal(checkpoint).startswith("…/head.pth: TorchScript, which is code; expected a state dict\n")

    torch.export.save(torch.export.export(network, (torch.zeros(2, 8),)), other)
    other.replace(checkpoint)
    assert refusal(checkpoint).startswith("…/head.pth: a program of torch.export; expected a state dict\n")

    with checkpoint.open("wb") as file:
        np.savez(file, weight=np.zeros(3))
    assert refusal(checkpoint).startswith("…/head.pth: NumPy arrays (.npz)")

    with zipfile.ZipFile(checkpoint, "w") as archive:
        archive.writestr("CT-RATE/model_binary.pth", content)
    assert refusal(checkpoint) == (
        "…/head.pth: a zip archive around CT-RATE/model_binary.pth; unpack it and put the checkpoint there"
    )

    with tarfile.open(checkpoint, "w") as tar:
        tar.add(__file__)
    assert refusal(checkpoint).startswith("…/head.pth: a tar archive")


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_never_executed(checkpoint: Path, zipped: bool) -> None:
    witness = checkpoint.with_name("executed")
    content = {**mlp.make_synthetic_state_dict(HEAD), "surplus": Malicious(witness)}
    torch.save(content, checkpoint, _use_new_zipfile_serialization=zipped)

    message = refusal(checkpoint)

    assert re.fullmatch(
        r"…/head.pth: refused, reading it would run code \([\w.]+\); expected tensors only\n"
        r"save it with torch.save\(module.state_dict\(\), path\)",
        message,
    )
    assert not witness.exists()


def test_a_pickled_module_is_refused(checkpoint: Path) -> None:
    torch.save(torch.nn.Linear(8, 3), checkpoint)

    assert "refused, reading it would run code (torch.nn.modules.linear.Linear)" in refusal(checkpoint)


def test_a_lone_tensor_is_no_state_dict(checkpoint: Path) -> None:
    torch.save(torch.zeros(3), checkpoint)

    assert refusal(checkpoint) == (
        "…/head.pth: holds a Tensor; expected a state dict\nsave it with torch.save(module.state_dict(), path)"
    )


def test_missing_and_misshapen_keys_are_listed(checkpoint: Path) -> None:
    rewrite(
        checkpoint,
        layers__0__weight=torch.zeros(6, 9),
        layers__0__bias=torch.zeros(6, dtype=torch.int8),
        layers__8__bias=None,
        layers__1__running_mean="none",
    )

    assert refusal(checkpoint).splitlines()[0] == (
        "…/head.pth: not a checkpoint of this model; 1 of 16 keys missing: layers.8.bias; 3 misshapen: "
        "layers.0.weight is float32 [6, 9], expected float32 [6, 8], "
        "layers.0.bias is int8 [6], expected float32 [6], "
        "layers.1.running_mean is a str, expected float32 [6]"
    )


def test_a_checkpoint_of_another_model_says_what_it_holds(checkpoint: Path) -> None:
    torch.save(OrderedDict({"state": {"conv.weight": torch.zeros(3)}, 3: torch.zeros(1)}), checkpoint)

    assert refusal(checkpoint) == (
        "…/head.pth: not a checkpoint of this model; 14 of 16 keys missing: layers.0.weight, layers.0.bias, "
        "layers.1.weight, layers.1.bias, layers.1.running_mean, layers.1.running_var, layers.4.weight, layers.4.bias "
        "and 6 more\n"
        "it holds state, 3\n"
        "put the model's own checkpoint there, or describe this one in convertation/models.yaml"
    )


# --- Files as they are saved ---------------------------------------------------


STATE = mlp.make_synthetic_state_dict(HEAD)
State = dict[Any, Any]


def prefixed(prefix: str) -> State:
    return {prefix + key: value for key, value in STATE.items()}


def cast(dtype: torch.dtype) -> State:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in STATE.items()}


def counters(value: Any) -> State:
    kept = {key: value for key, value in STATE.items() if not key.endswith("num_batches_tracked")}
    return kept if value is None else kept | {key: value for key in STATE if key not in kept}


SAVED: dict[str, tuple[State, str]] = {
    "DataParallel": (prefixed("module."), "`module.` is no part of its keys"),
    "torch.compile": (prefixed("_orig_mod."), "`_orig_mod.` is no part of its keys"),
    "both": (prefixed("module._orig_mod."), "`module.` is no part of its keys; nor is `_orig_mod.`"),
    "both, the other way round": (prefixed("_orig_mod.module."), "`module.` is no part of its keys; nor is"),
    "one layer compiled": ({key.replace("s.0.", "s.0._orig_mod."): value for key, value in STATE.items()}, "_orig_mod"),
    "a prefix": (prefixed("head."), "`head.` is no part of its keys"),
    "another": (prefixed("mlp."), "`mlp.` is no part of its keys"),
    "a Sequential": ({key.removeprefix("layers."): value for key, value in STATE.items()}, "lack `layers.`"),
    "a Sequential of another name": (
        {key.replace("layers.", "classifier."): value for key, value in STATE.items()},
        "`classifier.` is no part of its keys; its keys lack `layers.`, which the network's keys begin with",
    ),
    "training state": (
        {"epoch": 3, "model_state_dict": STATE, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        "the state dict is `model_state_dict`; keys beside it, not read: epoch, optimizer",
    ),
    "Lightning": (
        {"state_dict": prefixed("model."), "hyper_parameters": {"lr": 0.1}},
        "`state_dict`; keys beside it, not",
    ),
    "deeper": ({"checkpoint": {"net": STATE}}, "the state dict is `checkpoint.net`"),
    "half": (cast(torch.float16), "float16 became float32"),
    "bfloat16": (cast(torch.bfloat16), "bfloat16 became float32"),
    "double": (cast(torch.float64), "float64 became float32"),
    "without counters": (counters(None), "num_batches_tracked, which inference does not use, is absent"),
    "counters int32": (counters(torch.tensor(3, dtype=torch.int32)), ""),
    "counters float": (counters(torch.tensor(3.0)), ""),
    "counters of one element": (counters(torch.tensor([3])), ""),
    "counters no tensors": (counters(3), ""),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_file_is_read_as_people_save_it_and_what_was_understood_is_said(
    checkpoint: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, expected = SAVED[kind]
    torch.save(content, checkpoint)

    network = mlp.load_network(checkpoint, HEAD)

    for key, value in STATE.items():
        if value.is_floating_point():
            given = value if "became" not in expected else value.to(getattr(torch, kind))
            assert torch.equal(network.state_dict()[key], given.float())
    said = capsys.readouterr().out
    assert expected in read_guesses(network) and expected in said and said.count("\n") == bool(expected)


@pytest.mark.parametrize("name", ["head.safetensors", "head.pth"])
def test_safetensors_are_read_whatever_the_file_is_called(tmp_path: Path, name: str) -> None:
    save_file(prefixed("module."), tmp_path / name)

    assert torch.equal(mlp.load_network(tmp_path / name, HEAD).layers[0].weight, STATE["layers.0.weight"])


def test_a_truncated_file_of_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "head.safetensors")
    (tmp_path / "head.safetensors").write_bytes((tmp_path / "head.safetensors").read_bytes()[:-9])

    assert "truncated or no checkpoint" in refusal(tmp_path / "head.safetensors")


LEFT_OVER: dict[str, State] = {
    "layers.2.weight": {"layers.2.weight": torch.zeros(1)},  # PReLU
    "norm.weight": {"norm.weight": torch.ones(8), "norm.bias": torch.zeros(8)},
    "temperature": {"temperature": torch.tensor(1.5)},
    "skip.weight": {"skip.weight": torch.zeros(3, 8)},
    "gate": {"gate": torch.zeros(4)},
    "layers.9.weight": {"layers.9.weight": torch.ones(3)},
    "scale": {"scale": 1.5},
    "7": {7: torch.zeros(2)},
}


@pytest.mark.parametrize("wrap", ["", "module.", "in a dictionary"])
@pytest.mark.parametrize("key", LEFT_OVER)
def test_layers_that_the_network_does_not_have_are_refused_by_name(checkpoint: Path, key: str, wrap: str) -> None:
    content = STATE | LEFT_OVER[key]
    if wrap == "module.":
        content = {f"module.{key}" if isinstance(key, str) else key: value for key, value in content.items()}
    torch.save({"state_dict": content} if wrap == "in a dictionary" else content, checkpoint)

    said = refusal(checkpoint)
    assert said.startswith("…/head.pth: holds what this network does not have: ") and key in said.splitlines()[0]
    assert "activation" in said


TWO: dict[str, tuple[State, str, str]] = {
    "side by side": ({"model": STATE, "model_ema": cast(torch.float64)}, "model", "model_ema"),
    "by prefix": (prefixed("student.") | prefixed("teacher."), "student", "teacher"),
    "in one": ({**STATE, "ema": STATE}, ".", "ema"),
}


@pytest.mark.parametrize("kind", TWO)
def test_weights_and_their_average_are_refused_and_the_key_for_models_yaml_is_told(checkpoint: Path, kind: str) -> None:
    content, first, second = TWO[kind]
    torch.save(content, checkpoint)

    assert refusal(checkpoint) == (
        f"…/head.pth: holds 2 state dicts of this model: {first}, {second}; name the right one in the model's "
        f"entry of convertation/models.yaml, such as `state_dict: {first}`"
    )
    if kind == "side by side":
        mlp.load_network(checkpoint, HEAD | {"state_dict": second})
        assert "has no state dict ema of this model" in refusal(checkpoint, HEAD | {"state_dict": "ema"})


@pytest.mark.parametrize(
    "value, expected",
    [
        (torch.zeros(6, 8).to_sparse(), "layers.0.weight is sparse float32 [6, 8]"),
        (torch.zeros(6, 8, device="meta"), "layers.0.weight is without its numbers (on meta), float32 [6, 8]"),
        (torch.zeros(6, 8, dtype=torch.complex64), "layers.0.weight is complex64 [6, 8]"),
    ],
)
def test_tensors_of_another_kind_are_no_traceback(checkpoint: Path, value: torch.Tensor, expected: str) -> None:
    rewrite(checkpoint, layers__0__weight=value)

    assert expected in refusal(checkpoint)


@pytest.mark.parametrize("content", [{}, {1: torch.zeros(2)}, {None: {}}, {"a": {2: {"b": 3}}}, {("a", 1): 2}])
def test_a_dictionary_of_something_else_is_no_traceback(checkpoint: Path, content: State) -> None:
    torch.save(content, checkpoint)

    assert "not a checkpoint of this model" in refusal(checkpoint)


def test_a_whole_ct_clip_file_is_recognised(checkpoint: Path) -> None:
    clip = {"visual_transformer.vq._codebook.embed": torch.zeros(1), "to_visual_latent.weight": torch.zeros(1)}
    torch.save(clip, checkpoint)
    assert "a whole CT-CLIP file" in refusal(checkpoint) and "`projection_layer.weight`" in refusal(checkpoint)

    torch.save(
        {f"trained_model.{key}": value for key, value in clip.items()} | {"classifier.weight": torch.zeros(1)},
        checkpoint,
    )
    assert "a whole CT_LiPro file" in refusal(checkpoint)


def test_the_keys_of_a_real_vit_that_inference_does_not_need_are_just_those(tmp_path: Path) -> None:
    entry = {"family": "vit", **TINY["vit"]}
    needed, held = ctvit.build_network(entry).state_dict().keys(), ctvit.make_synthetic_state_dict(entry).keys()
    assert {key for key in held if re.match(ctvit.UNUSED, key)} == held - needed != set()
    torch.save(ctvit.make_synthetic_state_dict(entry) | {"projection_layer.bias": torch.zeros(24)}, tmp_path / "vit.pt")
    with pytest.raises(SystemExit, match=r"does not have: projection_layer\.bias;"):
        ctvit.load_network(tmp_path / "vit.pt", entry)


def test_counters_of_the_training_are_no_layers(checkpoint: Path) -> None:
    rewrite(checkpoint, epoch=torch.tensor(7), n_averaged=torch.tensor(3))

    mlp.load_network(checkpoint, HEAD)


def test_a_negative_variance_is_the_checkpoint_s_fault(checkpoint: Path) -> None:
    rewrite(checkpoint, layers__1__running_var=-torch.ones(6))

    assert refusal(checkpoint).startswith("…/head.pth: variances below 0 in layers.1.running_var")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(checkpoint: Path, value: float) -> None:
    weight = mlp.make_synthetic_state_dict(HEAD)["layers.4.weight"]
    weight[1, 2] = value
    rewrite(checkpoint, layers__4__weight=weight)

    assert refusal(checkpoint) == "…/head.pth: NaN or infinite weights in layers.4.weight; put a sound checkpoint there"
