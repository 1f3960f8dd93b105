"""ONNX files are whole, readable by Triton 24.06 and reproducible."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
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
from tests.convertation.test_checkpoint import HEAD

ROOT = Path(__file__).parents[2]
VIT: dict[str, Any] = {
    "family": "vit",
    "network": {
        "dim": 32,
        "heads": 2,
        "dim_head": 16,
        "spatial_depth": 3,
        "temporal_depth": 2,
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
    torch.save(mlp.make_synthetic_state_dict(HEAD), path)
    return path


def convert(family: str, *paths: Path | str, root: Path = ROOT, umask: int = 0o022, **environment: str) -> Any:
    command = [sys.executable, "-m", f"convertation.{family}.torch2onnx", "--weights", "synthetic", *map(str, paths)]
    return subprocess.run(
        command, cwd=root, env=os.environ | environment, umask=umask, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def head_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(head.torch2onnx, mlp.make_synthetic_state_dict(HEAD), HEAD, tmp_path_factory.mktemp("head"))


@pytest.fixture(scope="module")
def vit_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(vit.torch2onnx, ctvit.make_synthetic_state_dict(VIT), VIT, tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def gpu_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(
        vit.torch2onnx, ctvit.make_synthetic_state_dict(VIT), VIT, tmp_path_factory.mktemp("gpu"), target="gpu"
    )


def exported(
    torch2onnx: Callable[..., None], weights: dict[str, torch.Tensor], entry: dict[str, Any], to: Path, **options: str
) -> Path:
    torch.save(weights, to / "checkpoint.pt")
    torch2onnx(to / "checkpoint.pt", entry, to / "model.onnx", opset=20, metadata=METADATA, **options)
    return to / "model.onnx"


@pytest.fixture(params=["head", "vit", "gpu"])
def model(request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any], Any]:
    """(the ONNX file, its entry, its network)"""
    if request.param == "head":
        path = request.getfixturevalue("head_onnx")
        return path, HEAD, mlp.load_network(path.with_name("checkpoint.pt"), HEAD)
    path = request.getfixturevalue(f"{request.param}_onnx")
    return path, VIT, ctvit.load_network(path.with_name("checkpoint.pt"), VIT)


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


def test_a_tensor_that_two_places_share_is_theirs_alone(tmp_path: Path) -> None:
    """Layers are copied with their own weights in the graph, also if the first one shares a tensor elsewhere."""
    weights = ctvit.make_synthetic_state_dict(VIT)
    layers = "VIT.enc_spatial_transformer.layers"
    for index in range(3):
        weights[f"{layers}.{index}.1.norm.beta"] = torch.full((32,), 0.3 * index)
    weights["VIT.enc_spatial_transformer.norm_out.beta"] = weights[f"{layers}.0.1.norm.beta"]
    weights[f"{layers}.2.1.norm.gamma"] = weights[f"{layers}.1.1.norm.gamma"]
    path = exported(vit.torch2onnx, weights, VIT, tmp_path)
    volume = np.random.default_rng(0).uniform(-1, 1, (1, *VIT["input"])).astype(np.float32)

    (answer,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": volume})

    expected = ctvit.load_network(tmp_path / "checkpoint.pt", VIT)(torch.from_numpy(volume)).numpy()
    assert np.abs(answer - expected).max() < 1e-5 * np.abs(expected).max()


def test_tokens_and_codes_can_be_seen_inside_the_vit(vit_onnx: Path) -> None:
    proto = onnx.load(vit_onnx)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("tokens", onnx.TensorProto.FLOAT, None))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("codes", onnx.TensorProto.INT64, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    volume = np.random.default_rng(0).uniform(-1, 1, (2, *VIT["input"])).astype(np.float32)

    _, tokens, codes = session.run(None, {"input": volume})

    network = ctvit.load_network(vit_onnx.with_name("checkpoint.pt"), VIT)
    expected = network.encode(torch.from_numpy(volume))
    assert np.abs(tokens - expected.numpy()).max() < 1e-5
    assert (codes == network.quantise(expected).numpy()).all()


def test_for_a_gpu_nothing_is_cut_and_each_part_has_operators_that_it_is_fast_with(
    vit_onnx: Path, gpu_onnx: Path
) -> None:
    plain, fast = (onnx.load(path).graph for path in (vit_onnx, gpu_onnx))
    shapes = {initializer.name: list(initializer.dims) for initializer in fast.initializer}
    layers = 5

    assert not {"ReduceL2", "Clip", "Pad"} & kinds(fast).keys()
    assert all(len(shapes[node.input[1]]) == 4 for node in fast.node if node.op_type == "Conv")  # of frames, not of t
    expected = {"Conv": 3 * layers, "Softmax": layers, "Gelu": layers, "Pow": 2 * layers, "Sqrt": 2 * layers}
    expected |= {"Concat": layers, "Split": 1, "Gather": 1, "ArgMax": 1}  # zero frames; the projection's; the codebook
    assert {kind: kinds(fast)[kind] for kind in expected} == expected
    assert kinds(plain)["Gelu"] == 2 * layers and kinds(plain)["ArgMax"] > 1


def kinds(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def test_onnx_runtime_fuses_all_lengths_of_what_is_made_for_a_gpu(gpu_onnx: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")

    onnxruntime.InferenceSession(gpu_onnx, options, providers=["CPUExecutionProvider"])

    found = kinds(onnx.load(tmp_path / "fused.onnx").graph)
    assert (found["SimplifiedLayerNormalization"], found["Pow"], found["Sqrt"]) == (10, 0, 0)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_inner_size_is_a_multiple_of_32_in_the_file_alone(target: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue({"cpu": "vit_onnx", "gpu": "gpu_onnx"}[target])
    weights = [list(initializer.dims) for initializer in onnx.load(path).graph.initializer]

    # 32 · 8 / 3 = 85
    assert (weights.count([32, 96]), weights.count([96, 32])) == (2 * 5, 5)
    assert ctvit.build_network(VIT).state_dict()["VIT.enc_spatial_transformer.layers.0.3.1.weight"].shape == (
        2 * 85,
        32,
    )


def test_keys_and_queries_of_no_length_stay_zeros(tmp_path: Path) -> None:
    weights = ctvit.make_synthetic_state_dict(VIT)
    for key in weights:
        if key.endswith(("to_q.weight", "to_kv.weight")):
            weights[key] = torch.zeros_like(weights[key])
    volume = np.random.default_rng(0).uniform(-1, 1, (1, *VIT["input"])).astype(np.float32)

    path = exported(vit.torch2onnx, weights, VIT, tmp_path, target="gpu")

    (answer,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": volume})
    expected = ctvit.load_network(tmp_path / "checkpoint.pt", VIT)(torch.from_numpy(volume)).numpy()
    assert np.abs(answer - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_command_takes_what_a_vit_is_made_for(gpu_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "vit.json").write_text(json.dumps(VIT))
    paths = [gpu_onnx.with_name("checkpoint.pt"), tmp_path / "vit.json", tmp_path / "vit.onnx"]

    done = convert("vit", "--for", "gpu", *paths)

    assert (done.returncode, done.stderr) == (0, "")
    assert kinds(onnx.load(tmp_path / "vit.onnx").graph) == kinds(onnx.load(gpu_onnx).graph)


def test_what_depends_on_weights_alone_is_constant(vit_onnx: Path, gpu_onnx: Path, head_onnx: Path) -> None:
    for path in (vit_onnx, gpu_onnx, head_onnx):
        graph = onnx.load(path).graph
        constants = {initializer.name for initializer in graph.initializer}
        assert [node.name for node in graph.node if set(node.input) <= constants] == []
    kept = {initializer.name for initializer in onnx.load(vit_onnx).graph.initializer}
    assert not any("spatial_rel_pos_bias" in name or "first_frame" in name or "context_norm" in name for name in kept)


def test_the_same_weights_give_the_same_bytes_wherever_and_however_they_are_converted(tmp_path: Path) -> None:
    (tmp_path / "vit.json").write_text(json.dumps(VIT))
    torch.save(ctvit.make_synthetic_state_dict(VIT), tmp_path / "vit.pt")
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
