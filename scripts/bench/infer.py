"""Measure `make infer`: the stages of one study, a folder of studies, and the hand-over of a volume to a Triton."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tritonclient import grpc  # type: ignore[import-untyped]

from scripts.bench.measure import (
    BENCH,
    REPOSITORY,
    ROOT,
    Row,
    Tree,
    clean_environment,
    compare_medians,
    run_probe,
    show_progress,
)
from scripts.infer.handover import Messages, Shared
from scripts.serve.triton_client import CHANNEL, make_input
from scripts.serve.triton_server import triton_server

FOLDER = BENCH / "infer"
SLICES, SIDE = 300, 512
MORE = 8  # studies of the folder besides the first
STAGES = "reading", "preprocessing", "networks"
VOLUME = 240, 480, 480
# This model computes nothing, so that only the way of a volume to the server is measured
CONFIG = """name: "vit_onnx"
backend: "python"
max_batch_size: 4
input [{{ name: "input" data_type: TYPE_FP32 dims: [1, {}, {}, {}] }}]
output [{{ name: "output" data_type: TYPE_FP32 dims: [1] }}]
instance_group [{{ count: 1 kind: KIND_CPU }}]
"""
MODEL = """import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "input").as_numpy() for request in requests]
        last = [pb_utils.Tensor("output", array.reshape(len(array), -1)[:, -1:].copy()) for array in inputs]
        return [pb_utils.InferenceResponse([tensor]) for tensor in last]
"""


def bench_infer(tree: Tree, rounds: int) -> list[Row]:
    """Measure stages, folder and memory, then the hand-over."""
    tree.build("repository")
    shutil.rmtree(FOLDER, ignore_errors=True)
    show_progress(f"writing a study of {SLICES} slices of {SIDE} x {SIDE}")
    words = str(FOLDER / "study"), str(SLICES), str(SIDE)
    run_probe("module", "scripts.bench.studies", *words, cwd=ROOT, venv=".venv-inference")
    try:
        return [*bench_folder(tree.path / REPOSITORY, rounds), *bench_handover(rounds)]
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


def bench_folder(repository: Path, rounds: int) -> list[Row]:
    """Measure the stages of one study alone, and how much time each further study of a folder adds."""
    found: dict[int, list[dict[str, Any]]] = {1: [], 1 + MORE: []}
    for number in range(rounds):
        for count, runs in found.items():
            show_progress(f"{number + 1} of {rounds}: make infer, {count} studies")
            runs.append(run_infer(repository, count))
    alone, many = found.values()
    stages = {stage: [one["rows"][0]["seconds"][stage] for one in alone] for stage in STAGES}
    each = [(more["wall"] - one["wall"]) / MORE for one, more in zip(alone, many, strict=True)]
    slowest = max(stages, key=lambda stage: median(stages[stage]))
    most = [one["most"] / 1e9 for one in many]
    return [
        *(Row(f"{stage}, a study alone", median(taken), unit="s", samples=taken) for stage, taken in stages.items()),
        compare_medians("a study of a folder, of its slowest stage alone", each, stages[slowest], 1.1, "s", slowest),
        Row("studies per minute", 60 / median(each), samples=[60 / seconds for seconds in each]),
        Row("most RSS of the process that reads and computes", median(most), unit="GB", samples=most),
    ]


def run_infer(repository: Path, count: int) -> dict[str, Any]:
    """Run `make infer` on `count` copies of the study; return wall time in s, largest RSS in bytes, and rows."""
    top, out = FOLDER / "in", FOLDER / "out"
    for path in (top, out):
        shutil.rmtree(path, ignore_errors=True)
    top.mkdir()
    for number in range(count):
        (top / f"{number:03}").symlink_to(FOLDER / "study")
    command = [str(ROOT / ".venv-inference/bin/python3"), "-m", "scripts.infer", "--models", str(repository)]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, str(top), str(out)],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr
    said = process.stderr.read().decode(errors="replace")
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"bench: make infer ended with {process.returncode}\n{said[-3000:]}")
    rows = json.loads((out / "output.json").read_text())["studies"]
    return {"wall": wall, "most": used.ru_maxrss * 1024, "rows": rows}


def bench_handover(rounds: int) -> list[Row]:
    """Measure the three ways in which a volume can reach a server on this machine, in turn."""
    version = FOLDER / "repository/vit_onnx/1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(CONFIG.format(*VOLUME))
    (version / "model.py").write_text(MODEL)
    volume = np.random.default_rng(0).random((1, 1, *VOLUME), np.float32)
    show_progress("handing a volume to a Triton")
    with triton_server(FOLDER / "repository", FOLDER / "triton.log", venv=ROOT / ".venv-triton") as server:
        client = grpc.InferenceServerClient(server.grpc, channel_args=CHANNEL)
        messages, shared = Messages(server.grpc), Shared(server.grpc, client, server.key)

        def send_plainly() -> Any:
            return client.infer("vit_onnx", [make_input("input", volume)], model_version="1").as_numpy("output")

        ways: dict[str, Callable[[], Any]] = {
            "plain": send_plainly,
            "messages": lambda: messages.infer("vit_onnx", {"input": volume}, 600),
            "shared": lambda: shared.infer("vit_onnx", {"input": volume}, 600),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(1 + 3 * rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                answer = way()
                times[name].append(time.perf_counter() - start)
                if answer.ravel()[0] != volume.ravel()[-1]:
                    raise SystemExit(f"bench: Triton received another volume than was sent ({name})")
        shared.close()
        messages.close()
        client.close()
    taken = {name: seconds[1:] for name, seconds in times.items()}  # the first call of each way prepares it
    return [
        compare_medians(
            "a volume to a Triton here, shared memory", taken["shared"], taken["plain"], 0.35, "s", "plain gRPC"
        ),
        compare_medians(
            "the same in one message, large frames", taken["messages"], taken["plain"], None, "s", "plain gRPC"
        ),
    ]
