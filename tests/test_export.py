"""Checkpoints are read safely, with clear errors; ONNX files are whole, readable by Triton 24.06 and reproducible."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from convertation import export
from convertation.head import mlp
from convertation.head import torch2onnx as head
from convertation.vit import ctvit
from convertation.vit import torch2onnx as vit

ROOT = Path(__file__).parent.parent
HEAD: dict[str, Any] = {
    "family": "head",
    "network": {"sizes": [8, 6, 4, 3], "activation": "gelu"},
    "input": [8],
    "output": [3],
    "batch": [1, 4, 8],
}
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
    "input": [1, 20, 20, 15],
    "output": [16],
    "batch": [1, 2, 4],
}
METADATA = {"weights": "synthetic", "model": "tiny", "checkpoint_sha256": "0" * 64}


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


# ── reading a checkpoint ────────────────────────────────────────────────────────────────────────────────────────────


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


def test_the_command_ends_with_the_message_and_status_1(tmp_path: Path) -> None:
    (tmp_path / "head.pth").write_bytes(b"")
    (tmp_path / "head.json").write_text(json.dumps(HEAD))

    done = convert("head", tmp_path / "head.pth", tmp_path / "head.json", tmp_path / "head.onnx")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"{tmp_path}/head.pth: the file is empty; expected a checkpoint of torch.save; put it there again\n"
    )
    assert not (tmp_path / "head.onnx").exists()


def test_a_full_disk_is_said_in_one_line(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = checkpoint.with_name("head.json")
    entry.write_text(json.dumps(HEAD))
    monkeypatch.setattr(sys, "argv", ["torch2onnx", "--weights", "synthetic", str(checkpoint), str(entry), "/dev/full"])

    with pytest.raises(SystemExit) as caught:
        export.main(head.torch2onnx)

    assert str(caught.value) == "/dev/full: No space left on device; make room or access, then run make again"


# ── the file ────────────────────────────────────────────────────────────────────────────────────────────────────────


def convert(family: str, *paths: Path, root: Path = ROOT, umask: int = 0o022, **environment: str) -> Any:
    command = [sys.executable, "-m", f"convertation.{family}.torch2onnx", "--weights", "synthetic", *map(str, paths)]
    return subprocess.run(
        command, cwd=root, env=os.environ | environment, umask=umask, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def head_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(head.torch2onnx, mlp.synthetic(HEAD), HEAD, tmp_path_factory.mktemp("head"))


@pytest.fixture(scope="module")
def vit_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(vit.torch2onnx, ctvit.synthetic(VIT), VIT, tmp_path_factory.mktemp("vit"))


def exported(
    torch2onnx: Callable[..., None], weights: dict[str, torch.Tensor], entry: dict[str, Any], to: Path
) -> Path:
    torch.save(weights, to / "checkpoint.pt")
    torch2onnx(to / "checkpoint.pt", entry, to / "model.onnx", opset=20, metadata=METADATA)
    return to / "model.onnx"


@pytest.fixture(params=["head", "vit"])
def model(request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any], Any]:
    """(the ONNX file, its entry, its network)"""
    if request.param == "head":
        path = request.getfixturevalue("head_onnx")
        return path, HEAD, mlp.load(path.with_name("checkpoint.pt"), HEAD)
    path = request.getfixturevalue("vit_onnx")
    return path, VIT, ctvit.load(path.with_name("checkpoint.pt"), VIT)


Model = tuple[Path, dict[str, Any], Any]


def test_the_file_is_whole_and_readable_by_the_release(model: Model) -> None:
    path, entry, _ = model
    onnx.checker.check_model(path, full_check=True)
    proto = onnx.load(path, load_external_data=False)

    assert [file.name for file in path.parent.iterdir() if file.name.startswith("model")] == ["model.onnx"]
    assert proto.ir_version == 10
    assert [(used.domain, used.version) for used in proto.opset_import] == [("", 20)]
    assert [shape(value) for value in proto.graph.input] == [("input", ["batch", *entry["input"]])]
    assert [shape(value) for value in proto.graph.output] == [("output", ["batch", *entry["output"]])]


def shape(value: onnx.ValueInfoProto) -> tuple[str, list[str | int]]:
    return value.name, [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def test_the_file_says_who_it_is_and_nothing_about_where_it_was_made(model: Model) -> None:
    path, _, _ = model
    proto = onnx.load(path)

    assert {prop.key: prop.value for prop in proto.metadata_props} == METADATA
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert proto.producer_version == ""
    assert b"/convertation/" not in path.read_bytes() and b".py" not in path.read_bytes()


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_it_computes_what_pytorch_computes_at_any_batch(model: Model, batch: int) -> None:
    path, entry, network = model
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    request = np.random.default_rng(batch).uniform(-1, 1, (batch, *entry["input"])).astype(np.float32)

    (answer,) = session.run(["output"], {"input": request})

    expected = network(torch.from_numpy(request)).numpy()
    assert np.abs(answer - expected).max() < 1e-5 * np.abs(expected).max()


def test_tokens_and_codes_can_be_seen_inside_the_vit(vit_onnx: Path) -> None:
    proto = onnx.load(vit_onnx)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("tokens", onnx.TensorProto.FLOAT, None))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("codes", onnx.TensorProto.INT64, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    volume = np.random.default_rng(0).uniform(-1, 1, (2, *VIT["input"])).astype(np.float32)

    _, tokens, codes = session.run(None, {"input": volume})

    network = ctvit.load(vit_onnx.with_name("checkpoint.pt"), VIT)
    expected = network.encode(torch.from_numpy(volume))
    assert np.abs(tokens - expected.numpy()).max() < 1e-5
    assert (codes == network.quantise(expected).numpy()).all()


def test_what_depends_on_weights_alone_is_constant(vit_onnx: Path, head_onnx: Path) -> None:
    for path in (vit_onnx, head_onnx):
        graph = onnx.load(path).graph
        constants = {initializer.name for initializer in graph.initializer}
        assert [node.name for node in graph.node if set(node.input) <= constants] == []
    kept = {initializer.name for initializer in onnx.load(vit_onnx).graph.initializer}
    assert not any("spatial_rel_pos_bias" in name or "first_frame" in name or "context_norm" in name for name in kept)


def test_the_same_weights_give_the_same_bytes_wherever_and_however_they_are_converted(tmp_path: Path) -> None:
    (tmp_path / "vit.json").write_text(json.dumps(VIT))
    torch.save(ctvit.synthetic(VIT), tmp_path / "vit.pt")
    other = tmp_path / "another directory"
    (other / "convertation").mkdir(parents=True)
    for source in sorted((ROOT / "convertation").glob("*.py")) + sorted((ROOT / "convertation/vit").glob("*.py")):
        copy = other / source.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(source.read_bytes())
    plain = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "UTC"}
    odd = {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "2", "LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Tokyo"}

    for name, root, umask, environment in (("a", ROOT, 0o022, plain), ("b", other, 0o077, odd)):
        paths = [tmp_path / "vit.pt", tmp_path / "vit.json", tmp_path / f"{name}.onnx"]
        done = convert("vit", *paths, root=root, umask=umask, **environment)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout

    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    identity = {prop.key: prop.value for prop in onnx.load(tmp_path / "a.onnx").metadata_props}
    digest = hashlib.sha256((tmp_path / "vit.pt").read_bytes()).hexdigest()
    assert identity == {"weights": "synthetic", "model": "vit", "checkpoint_sha256": digest}
