"""`make trt CHECK=1` on a machine with a GPU: what TensorRT for RTX answers there is compared with ONNX Runtime."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Project

RTX = ROOT / ".venv-rtx/bin/python3"
RECORD = "build/checks/binary.rtx-gpu.json"


@pytest.fixture
def with_gpu(project: Project) -> Project:
    """The tiny project with a stand-in for the Python that runs engines on a GPU."""
    (python := project.path / ".venv-rtx/bin/python3").parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\nexec "{sys.executable}" "{ROOT}/tests/rtx_gpu_stand_in.py" "$@"\n')
    python.chmod(0o755)
    project.edit("Makefile", " requirements-rtx.txt | .venv-rtx/installed\n", " requirements-rtx.txt\n")
    return project


def record(project: Project) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project.path / RECORD).read_text())
    return found


def test_answers_and_times_of_a_gpu_are_recorded(with_gpu: Project) -> None:
    said = with_gpu.make(RECORD, PYTHONPATH=str(ROOT))
    found = record(with_gpu)
    assert "model.onnx on Stand-in RTX 3090 by TensorRT for RTX, a stand-in: differs by 0.0e+00 of its scale" in said
    assert found["ms"]["1"]["median"] == 1.5 and found["output"] == 0 and found["batches"] == [1, 4, 8]


def test_other_answers_are_an_error(with_gpu: Project) -> None:
    said = with_gpu.fail(RECORD, PYTHONPATH=str(ROOT), FAULT="differs")
    assert "model.onnx: output (share of its scale) differs from ONNX Runtime's by" in said
    assert not (with_gpu.path / RECORD).exists()


def test_an_engine_that_does_not_run_is_an_error_in_its_own_words(with_gpu: Project) -> None:
    said = with_gpu.fail(RECORD, PYTHONPATH=str(ROOT), FAULT="refused")
    assert "model.onnx: TensorRT for RTX does not run it on this GPU\nTensorRT for RTX did not run its engine" in said


def test_a_gpu_that_it_does_not_know_is_told_and_is_no_error(with_gpu: Project) -> None:
    said = with_gpu.make(RECORD, PYTHONPATH=str(ROOT), FAULT="unknown")
    assert "not run on a GPU: TensorRT for RTX does not run on Stand-in H100, compute capability 9.0" in said
    assert record(with_gpu) == {"not_run": "TensorRT for RTX does not run on Stand-in H100, compute capability 9.0"}


@pytest.mark.skipif(not RTX.exists(), reason="make .venv-rtx/installed brings TensorRT for RTX")
@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").exists(), reason="there is a GPU here, so it would run")
def test_without_a_gpu_the_program_says_so(tmp_path: Path) -> None:
    run = subprocess.run(
        [RTX, "-m", "scripts.plans.run_rtx", "model.onnx", "entry.json", "request.bin", tmp_path],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 3 and run.stderr.startswith("no GPU can be asked: cudaError")
