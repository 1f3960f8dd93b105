"""make bench-gpu: without a GPU it says so; --device cpu makes, runs and compares the same models on the CPU."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TINY, Project

from scripts.bench import gpu_models
from scripts.bench.gpu import bench_gpu, format_table
from scripts.bench.gpu_device import CPU, Device


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models.yaml with tiny networks."""
    path = tmp_path_factory.mktemp("models") / "models.yaml"
    models = yaml.safe_load((ROOT / "convertation/models.yaml").read_text())
    for name, tiny in TINY.items():
        models[name] |= tiny
    path.write_text(yaml.safe_dump(models, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def found(models: Path, scratch: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(bench_gpu(CPU, models, None, scratch)))
    return result


def test_each_precision_is_measured_at_batch_one_and_at_the_most_against_float32_on_the_cpu(
    found: dict[str, Any],
) -> None:
    assert [row["precision"] for row in found["vit"]] == ["fp32", "tf32", "fp16"]
    for row in found["vit"]:
        assert list(row["batches"]) == ["1", "4"]
        assert all(times["device_ms"] > 0 and times["host_ms"] > 0 for times in row["batches"].values())
        assert row["codes"] == 2 * 2 * 2 * 2 and row["decisions"] == 2 * (1 + 20)
        assert row["memory_mib"] is None and row["share_of_peak"] is None  # only a GPU has these
    exact, tf32, half = found["vit"]
    assert (exact["embedding"], exact["codes_flipped"], exact["probability"]) == (0, 0, 0)
    assert tf32["embedding"] < 1e-5 < half["embedding"] < 0.05  # a CPU has no TF32


def test_heads_bpr_and_the_classes_of_make_infer_are_asked_too(found: dict[str, Any]) -> None:
    assert [(row["model"], row["batch"], row["difference"]) for row in found["heads"]] == [
        ("binary", 8, 0.0),
        ("multilabel", 8, 0.0),
    ]
    assert found["bpr"]["slices"] == 32 and found["bpr"]["difference"] == 0
    assert list(found["infer"]) == ["fp32", "tf32", "fp16"]
    probabilities = [row["probability"] for row in found["infer"].values()]
    assert probabilities[1] == pytest.approx(probabilities[0], abs=1e-6)
    assert probabilities[2] == pytest.approx(probabilities[0], abs=1e-3)
    assert probabilities[2] != probabilities[0]


def test_the_table_has_a_row_for_each(found: dict[str, Any]) -> None:
    lines = format_table(found)

    assert lines[0] == f"CPU, {os.cpu_count()} cores; ONNX Runtime {found['onnxruntime']}"
    assert lines[1].split("  ")[0] == "ViT" and "codes flipped" in lines[1]
    assert [line.split()[0] for line in lines[2:5]] == ["fp32", "tf32", "fp16"]
    assert lines[5].startswith("binary, batch 8: ") and lines[7].startswith("bpr, 32 slices: ")
    assert lines[10].startswith("make infer, fp16: a volume ") and lines[10].endswith(" ms, by CPUExecutionProvider")


def test_given_files_are_not_made_again(
    found: dict[str, Any], models: Path, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in scratch.glob("*.onnx"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(gpu_models, "run_module", None)

    again = bench_gpu(CPU, models, tmp_path, tmp_path / "scratch")

    assert [row["embedding"] for row in again["vit"]] == [row["embedding"] for row in found["vit"]]


def test_a_step_that_fails_says_what_and_what_to_do(models: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu_models.run_module(
            "convertation.vit.torch2onnx", "--weights", "synthetic", tmp_path / "no.pt", tmp_path / "no.json", "out"
        )

    said = str(caught.value)
    assert said.startswith("convertation.vit.torch2onnx failed: ") and "or bring --onnx FOLDER" in said


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="has a GPU; no GPU is what is tested")
def test_without_a_gpu_it_says_so_before_anything_is_made(project: Project) -> None:
    said = project.fail("bench-gpu", PATH=f"{project.path}/.venv/bin:/usr/bin:/bin")

    assert "no GPU here (nvidia-smi does not answer); --device cpu tries all but the times" in said
    assert not (project.path / "build/bench").exists()


@pytest.mark.skipif(
    Path("/dev/nvidiactl").exists(), reason="has a GPU; a provider that does not load is what is tested"
)
def test_a_session_that_fell_back_to_the_cpu_is_refused(found: dict[str, Any], scratch: Path) -> None:
    with pytest.raises(SystemExit, match="has no CUDA here; install onnxruntime-gpu"):
        Device("cuda").open_session(scratch / "binary.onnx")
