"""The exported LayerNorm gives the same for patches of a CT scan as float64, in every version of ONNX Runtime.

Up to 1.22 its LayerNormalization computes the variance as the mean square minus the squared mean. For air, at -1 with
almost no spread, float32 then has no digit left, or NaN, and every study gets the same embedding.
"""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from convertation.vit import ctvit
from convertation.vit import torch2onnx as vit

ROOT = Path(__file__).parents[2]
RUNTIMES = {".venv": "1.31.1", ".venv-triton": "1.19.2", ".venv-inference": "1.22.0"}
ONE_PATCH: dict[str, Any] = {
    "family": "vit",
    "network": {
        "dim": 32, "heads": 2, "dim_head": 16, "spatial_depth": 1, "temporal_depth": 1, "patch": [10, 20, 20],
        "codebook": 64,
    },
    "input": [1, 20, 20, 20],
    "output": [16],
    "batch": [1, 2, 128],
}  # fmt: skip
ASK = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
answer = session.run(names, {"input": numpy.load(sys.argv[2])})
numpy.savez(sys.argv[3], version=onnxruntime.__version__, **dict(zip(names, answer)))
"""
TOLERANCE = 5e-5  # of a spread of 1


def kinds() -> dict[str, NDArray[np.float32]]:
    """Return patches (n, 4000) float32 in HU / 1000 of what scans contain; those of a real study come first."""
    random = np.random.default_rng(0)
    patches = dict(np.load(ROOT / "tests/reference/layernorm_patches.npz"))
    for mean in (-990, -1000):
        for noise in (1, 5, 10):
            patches[f"air of {mean} HU, noise {noise}"] = hounsfield(random.normal(mean, noise, (6, 4000)))
    for value in (-1000, -999, -990, 0, 40, 1000):
        patches[f"constant {value} HU"] = hounsfield(np.full((2, 4000), value))
    metal, padding = random.normal(-995, 3, (2, 4, 4000))
    metal[:, :300] = 3000
    padding[:, :3990] = -1000
    edge = np.full((2, 4000), -1000.0)
    edge[:, -1] = 40
    return patches | {
        "metal": hounsfield(metal), "padding": hounsfield(padding), "one voxel of tissue": hounsfield(edge),
    }  # fmt: skip


def hounsfield(hu: NDArray[Any]) -> NDArray[np.float32]:
    return (np.rint(hu).clip(-1000, 1000) / 1000).astype(np.float32)


def exact(patches: NDArray[np.float32], weight: NDArray[Any], bias: NDArray[Any]) -> NDArray[np.float64]:
    x = patches.astype(np.float64)
    spread = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    return (x - x.mean(axis=-1, keepdims=True)) / spread * weight + bias


def export(folder: Path, target: str) -> Path:
    """Export a ViT whose volumes are two patches; results of the pixels' LayerNorms are further outputs."""
    torch.save(ctvit.make_synthetic_state_dict(ONE_PATCH), folder / "checkpoint.pt")
    vit.torch2onnx(folder / "checkpoint.pt", ONE_PATCH, folder / "vit.onnx", opset=20, metadata={}, target=target)
    model = onnx.load(folder / "vit.onnx")
    norms = [node for node in model.graph.node if any("to_patch_emb.1.weight" in name for name in node.input)]
    assert {node.op_type for node in norms} == {"LayerNormalization"}  # the form that runtimes have a kernel for
    for index, node in enumerate(norms):
        node.output[0], plain = f"normed{index}", node.output[0]
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"normed{index}", onnx.TensorProto.FLOAT, None))
        for user in model.graph.node:
            user.input[:] = [f"normed{index}" if name == plain else name for name in user.input]
    onnx.save(model, folder / "seen.onnx")
    return folder / "seen.onnx"


def errors(path: Path, runtime: str) -> tuple[dict[str, float], bool]:
    """Return for each kind of patch its largest difference from float64 (NaN: infinite); is the output finite?"""
    patches = kinds()
    volumes = np.concatenate(list(patches.values())).reshape(-1, *ONE_PATCH["input"])
    np.save(path.with_name("volumes.npy"), volumes)
    answer = path.with_name(f"answer{runtime}.npz")
    command = [ROOT / runtime / "bin/python", "-c", ASK, path, path.with_name("volumes.npy"), answer]
    subprocess.run(command, check=True, capture_output=True)
    found = np.load(answer)
    assert str(found["version"]) == RUNTIMES[runtime]
    normed = np.concatenate([found[name] for name in sorted(found.files) if name.startswith("normed")], axis=1)
    weights = torch.load(path.with_name("checkpoint.pt"), weights_only=True)
    weight, bias = (weights[f"VIT.to_patch_emb.1.{part}"].double().numpy() for part in ("weight", "bias"))
    flat, start, apart = normed.reshape(-1, 4000), 0, {}
    for kind, rows in patches.items():
        difference = np.abs(flat[start : start + len(rows)] - exact(rows, weight, bias))
        apart[kind] = float(
            np.nan_to_num(difference / np.maximum(1, np.abs(exact(rows, weight, bias))), nan=np.inf).max()
        )
        start += len(rows)
    return apart, bool(np.isfinite(found["output"]).all())


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_kind_of_patch_is_normed_as_in_float64(seen: Path, runtime: str) -> None:
    apart, finite = errors(seen, runtime)

    assert {kind: error for kind, error in apart.items() if error > TOLERANCE} == {}
    assert finite


@pytest.mark.parametrize("runtime", [".venv-triton", ".venv-inference"])
def test_without_the_means_taken_away_air_is_wrong(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ctvit.CTViT, "embed_frames", lambda self, volume: self.VIT.to_patch_emb(ctvit.cut_patches(volume, self.patch))
    )

    apart, _ = errors(export(tmp_path, "cpu"), runtime)

    assert apart["study_reference"] == np.inf  # NaN
    assert apart["air of -990 HU, noise 5"] > 0.1
    assert apart["tissue_40HU_noise_10HU"] < 1e-3
