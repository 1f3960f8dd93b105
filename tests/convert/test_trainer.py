"""A trained head in training/weights, saved as people save it: the real Makefile builds it, or refuses it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT, TINY, copy_of_the_project

from convertation.head import mlp

ENTRY: dict[str, Any] = {"family": "head", "checkpoint": "CT-RATE/model_binary.pth", **TINY["binary"]}
GUESSES = "import sys; from scripts.publish.provenance import read_guesses; print(read_guesses(sys.argv[1]))"


def test_a_saved_head_is_built_and_one_with_unknown_layers_is_refused(tmp_path: Path) -> None:
    project = copy_of_the_project(tmp_path / "project")
    own, made = project.path / "training/weights/CT-RATE/model_binary.pth", project.path / "build/onnx/binary.onnx"
    own.parent.mkdir()
    state = mlp.make_synthetic_state_dict(ENTRY)
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, own)

    said = project.make("build/onnx/binary.onnx", "WEIGHTS=yandex")

    guess = "the state dict is `state_dict`; keys beside it, not read: epoch; `module.` is no part of its keys"
    assert f"training/weights/CT-RATE/model_binary.pth: {guess}\n" in said
    told = subprocess.run(
        [sys.executable, "-c", GUESSES, made], cwd=ROOT, env=os.environ | {"PYTHONPATH": "."},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout == guess + "\n"

    before = made.read_bytes()
    torch.save(state | {"temperature": torch.tensor(1.5)}, own)
    said = project.fail("build/onnx/binary.onnx", "WEIGHTS=yandex")
    assert "model_binary.pth: holds what this network does not have: temperature;" in said
    assert made.read_bytes() == before
