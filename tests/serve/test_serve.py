"""`make serve` as a program: the real Triton runs in the foreground until Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tritonclient import grpc

from scripts.serve.ports_and_memory import find_free_ports
from scripts.serve.triton_client import CHANNEL, make_input
from tests.triton_models import FEATURES, WEIGHT, bpr, head

ROOT = Path(__file__).parents[2]
PATIENCE = 120


class Serving:
    """scripts/serve/serve.py on free ports; `line` is what it printed."""

    def __init__(self, repository: Path) -> None:
        self.ports = find_free_ports("127.0.0.1", 3)
        options = [f"--{name}={port}" for name, port in zip(("http", "grpc", "metrics"), self.ports, strict=True)]
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "scripts.serve.serve",
                repository,
                *options,
                "--log",
                repository.parent / "serve.log",
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TRITON_VENV": str(ROOT / ".venv-triton")},
        )
        assert self.process.stdout
        self.line = self.process.stdout.readline()

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal; return the exit status and stderr."""
        self.process.send_signal(number)
        error = self.process.communicate(timeout=PATIENCE)[1]
        return self.process.returncode, error

    def listens(self) -> list[int]:
        found = []
        for port in self.ports:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    found.append(port)
        return found


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    head(tmp_path / "repository")
    bpr(tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def serving(repository: Path) -> Iterator[Serving]:
    started = Serving(repository)
    yield started
    if started.process.poll() is None:
        started.end(signal.SIGTERM)


def test_it_serves_until_ctrl_c(serving: Serving) -> None:
    http, rpc, metrics = serving.ports
    assert serving.line.startswith(
        f"READY: binary_onnx, bpr_model; HTTP http://127.0.0.1:{http} gRPC 127.0.0.1:{rpc} "
        f"metrics http://127.0.0.1:{metrics}/metrics; "
    )
    assert serving.listens() == serving.ports
    batch = np.ones((2, FEATURES), np.float32)
    client = grpc.InferenceServerClient(f"127.0.0.1:{rpc}", channel_args=CHANNEL)
    for _ in range(2):  # as the client does: load, ask, unload
        client.load_model("binary_onnx")
        result = client.infer("binary_onnx", [make_input("input", batch)], model_version="1")
        np.testing.assert_allclose(result.as_numpy("output"), batch @ WEIGHT, rtol=1e-5)
        client.unload_model("binary_onnx")
    client.close()
    assert serving.end(signal.SIGINT) == (0, "")
    assert serving.listens() == []


def test_other_machines_are_not_served_unless_told(serving: Serving) -> None:
    with socket.socket() as probe:  # all of 127/8 is this machine; only 127.0.0.1 is listened on
        assert probe.connect_ex(("127.0.0.2", serving.ports[0])) != 0


def test_a_server_that_dies_ends_it_with_an_error(serving: Serving) -> None:
    children = Path(f"/proc/{serving.process.pid}/task/{serving.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    error = serving.process.communicate(timeout=PATIENCE)[1]
    assert serving.process.returncode == 1
    assert error.startswith("tritonserver was killed by SIGKILL\n")
    assert "Traceback" not in error


def test_a_taken_port_and_an_empty_repository_are_one_line_each(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.serve.serve", "--log", str(tmp_path / "log")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = subprocess.run([*command, str(repository), f"--http={port}"], cwd=ROOT, capture_output=True, text=True)
    line = f"127.0.0.1:{port}: address already in use; stop what listens there, or choose another port\n"
    assert (run.returncode, run.stdout, run.stderr) == (1, "", line)
    (tmp_path / "empty").mkdir()
    run = subprocess.run([*command, str(tmp_path / "empty")], cwd=ROOT, capture_output=True, text=True)
    line = f"{tmp_path}/empty: no models there; make them with: make repository\n"
    assert (run.returncode, run.stdout, run.stderr) == (1, "", line)
