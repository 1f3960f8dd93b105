"""A real Triton starts, with an environment or in Docker, and stops whatever happens."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from scripts.serve import ports_and_memory, server_in_docker
from scripts.serve.model_config import BYTES
from scripts.serve.ports_and_memory import choose_pinned_pool, estimate_shared_memory, find_free_ports
from scripts.serve.server_in_docker import make_docker_command
from scripts.serve.server_options import STRICT
from scripts.serve.server_process import read_last_words
from scripts.serve.triton_server import triton_server
from scripts.serve.verdict import stage_files
from tests.triton_models import FEATURES, bpr, head
from tests.triton_servers import PATIENCE, VENV, judged, processes, regions, until, write_repository

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_VENV", str(VENV))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a proxy that answers nobody
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_repository(tmp_path)


# --- Start and stop -----------------------------------------------------------


def test_without_the_environment_the_make_command_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(SystemExit, match=r"none: no tritonserver there; make it with: make \.venv-triton"),
        triton_server(head(tmp_path / "r").parent, tmp_path / "log", venv=tmp_path / "none"),
    ):
        raise AssertionError


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    head(tmp_path / "r")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(SystemExit, match=f"127.0.0.1:{port}: address already in use; stop what listens there, or"),
            triton_server(tmp_path / "r", tmp_path / "log", venv=VENV, ports=(port, 1, 2)),
        ):
            raise AssertionError


def test_no_free_port_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports_and_memory, "FREE_PORTS", range(port, port + 1))
        with pytest.raises(
            SystemExit, match=f"127.0.0.1: no free port from {port} to {port}; see what listens: ss -ltnp"
        ):
            find_free_ports("127.0.0.1", 2)


def test_too_little_shared_memory_is_said_before_the_start(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/dev/shm")
    monkeypatch.setattr(ports_and_memory.shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    with pytest.raises(
        SystemExit, match="/dev/shm has 64 MiB free, requests to these models need 320 MiB; enlarge it: mount"
    ):
        judged(repository)


def test_the_pinned_pool_holds_two_of_the_largest_batches(tmp_path: Path) -> None:
    head(tmp_path)
    bpr(tmp_path)  # a variable size does not count: its own code moves the data
    assert choose_pinned_pool(tmp_path) == 256 << 20  # Triton's default
    (tmp_path / "vit_onnx").mkdir()
    shutil.copy(ROOT / "convertation/vit/config.pbtxt", tmp_path / "vit_onnx")
    assert choose_pinned_pool(tmp_path) == 2 * 4 * 240 * 480 * 480 * 4

    for gpu, times in ((True, 1), (False, 0)):
        command = make_docker_command("triton:24.06", "x", tmp_path, "127.0.0.1", (1, 2), 0, gpu=gpu)
        assert command.count(f"--pinned-memory-pool-byte-size={choose_pinned_pool(tmp_path)}") == times


def test_a_server_in_docker_maps_the_files_that_it_is_told_of(tmp_path: Path) -> None:
    file = Path("/dev/shm/sample")
    command = make_docker_command("triton:24.06", "x", tmp_path, "127.0.0.1", (1, 2), 0, gpu=False, maps=[file])
    assert f"--mount=type=bind,source={file},target={file}" in command


def test_shared_memory_is_for_one_sample_of_each_model(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    head(root)
    assert estimate_shared_memory(root) == FEATURES * 4 + (64 << 20)
    bpr(root)
    assert estimate_shared_memory(root) == FEATURES * 4 + 512**3 * 2 + 3 * 4 + (64 << 20)
    assert set(BYTES.values()) == {1, 2, 4, 8}


PROGRAM = """
import sys
from pathlib import Path
from scripts.serve.triton_server import triton_server
with triton_server(Path(sys.argv[1]), Path(sys.argv[2])) as server:
    print("ready", server.process.pid, flush=True)
    server.process.wait()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_the_server_is_gone_however_its_starter_ends(repository: Path, number: signal.Signals) -> None:
    shared = regions()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, repository, repository.parent / "log"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # else `nohup make test` would never end
    ) as starter:  # fmt: skip
        assert starter.stdout
        assert starter.stdout.readline().startswith("ready")
        assert processes(repository)
        starter.send_signal(number)
        starter.wait(PATIENCE)
    if number != signal.SIGKILL:
        assert processes(repository) == []
        assert regions() == shared
    until(lambda: not processes(repository) and regions() == shared)


def test_the_log_is_told_in_a_few_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        'E1122 13:00:06.661018 7659 server.cc:241] "CudaDriverHelper has not been initialized."\n'
        'I1122 13:00:06.664154 7659 model_lifecycle.cc:472] "loading: head_onnx:1"\n'
        "E1122 13:00:06.664612 7659 model_lifecycle.cc:641] \"failed to load 'head_onnx' version 1: Internal: no\"\n"
        "| head_onnx | 1 | UNAVAILABLE |\n"
        "error: creating server: Internal - failed to load all models\n"
    )
    assert read_last_words(log).splitlines() == [
        "  \"failed to load 'head_onnx' version 1: Internal: no\"",
        "  error: creating server: Internal - failed to load all models",
        f"whole log: {log}",
    ]
    log.write_text("")
    assert read_last_words(log) == f"  (nothing)\nwhole log: {log}"


def test_the_environment_has_the_pinned_versions() -> None:
    (packages,) = VENV.glob("lib/python*/site-packages")
    found = {one.name.lower().replace("_", "-"): one.version for one in distributions(path=[str(packages)])}
    lines = (ROOT / "requirements-triton.txt").read_text().splitlines()
    pins = [line.split("#")[0].strip() for line in lines if line[:1] not in ("#", "-", "")]
    assert pins
    for pin in pins:
        name, version = pin.split("==")
        assert found[name.lower().replace("_", "-")] == version


# --- In Docker ----------------------------------------------------------------


def test_the_image_is_run_with_the_same_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker = tmp_path / "bin/docker"
    docker.parent.mkdir()
    docker.write_text("#!/bin/sh\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(docker.parent))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_CERT", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    source = tmp_path / "vit.onnx"
    source.write_text("")
    stage_files([f"vit_onnx/1/model.onnx={source}"], tmp_path / "staging")
    command = make_docker_command(
        "triton:24.06", "triton-x", tmp_path / "staging", "127.0.0.1", (20001, 20002), 1 << 20, gpu=False
    )
    start = command.index("triton:24.06")
    assert command[:start] == [
        "docker", "run", "--rm", "--pull=never", "--name=triton-x", f"--shm-size={2 << 30}",
        "--publish=127.0.0.1:20001:8000", "--publish=127.0.0.1:20002:8001",
        f"--mount=type=bind,source={tmp_path}/staging,target={tmp_path}/staging,readonly",
        f"--mount=type=bind,source={source},target={source},readonly",
    ]  # fmt: skip
    assert command[start + 1 : start + 3] == ["bash", "-c"]
    assert command[start + 4 :] == [f"{tmp_path}/staging", *STRICT, "--allow-metrics=false"]
    monkeypatch.setenv("PIP_CERT", str(source))
    command = make_docker_command("triton:24.06", "x", tmp_path / "staging", "0.0.0.0", (1, 2, 3), 3 << 30, gpu=True)
    assert {"--env=PIP_CERT=/tmp/ca.pem", f"--mount=type=bind,source={source},target=/tmp/ca.pem,readonly"} <= set(
        command
    )
    assert {"--gpus=all", "--publish=0.0.0.0:3:8002", f"--shm-size={3 << 30}", "--allow-metrics=true"} <= set(command)


DOCKER = """#!{python}
import os
import sys
from pathlib import Path

sys.path.insert(0, "{root}")
from scripts.serve.server_options import list_port_options
from scripts.serve.triton_server import prepare_server

with Path("{log}").open("a") as log:
    print(*sys.argv[1:], file=log)
if sys.argv[1] == "run":
    ports = [int(word.split(":")[1]) for word in sys.argv if word.startswith("--publish=")]
    scratch, environment = Path("{log}.d"), dict(os.environ)
    command = [*prepare_server(Path("{venv}"), scratch, environment), *list_port_options("127.0.0.1", ports)]
    (scratch / "bin/tritonserver").write_text("#!/bin/sh\\nexec " + " ".join(command) + ' "$@"')
    (scratch / "bin/tritonserver").chmod(0o755)
    inside = sys.argv[sys.argv.index("triton:24.06") + 1 :]
    os.execvpe(inside[0], inside, environment)
"""


def test_the_verdict_of_an_image(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Docker runs the container's command without a container."""
    (repository / "bpr_model/1/requirements.txt").write_text("# nothing that the environment lacks\n")
    docker, log = repository.parent / "bin/docker", repository.parent / "docker.log"
    docker.parent.mkdir()
    docker.write_text(DOCKER.format(python=sys.executable, root=ROOT, log=log, venv=VENV))
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent}:{os.environ['PATH']}")
    result = judged(repository, image="triton:24.06")
    assert result["server"] == "triton:24.06 2.47.0"
    assert result["models"]["bpr_model"]["state"] == "READY"
    asked, run, removed = log.read_text().splitlines()
    assert asked == "image inspect triton:24.06"
    name = next(word for word in run.split() if word.startswith("--name=")).removeprefix("--name=")
    assert removed == f"rm --force {name}"


def test_without_docker_an_image_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"docker is not installed, so triton:24\.06 cannot run"):
        server_in_docker.check_image("triton:24.06")


def test_what_docker_says_is_passed_on(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker = repository.parent / "bin/docker"
    docker.parent.mkdir()
    docker.write_text(
        "#!/bin/sh\n[ $1 = run ] && echo 'docker: Error from daemon: No such image: triton:24.06' && exit 125\n"
    )
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent}:{os.environ['PATH']}")
    with pytest.raises(
        SystemExit, match=r"ended with status 125 before it was ready:\n  docker: Error .* No such image"
    ):
        judged(repository, image="triton:24.06")


@pytest.mark.parametrize(
    ("device", "gpus", "expected"), [(False, "", False), (True, "", True), (False, "--gpus 1", True)]
)
def test_a_server_in_docker_has_the_gpu_that_is_here_or_that_it_is_told_of(
    device: bool, gpus: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_in_docker.Path, "exists", lambda path: device and str(path) == "/dev/nvidiactl")
    monkeypatch.setenv("DOCKER_GPUS", gpus)
    assert server_in_docker.has_gpu() is expected
