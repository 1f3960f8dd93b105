"""Code of a foreign archive in the real Triton reads no secret, opens no connection, writes to none of our files."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tritonclient import grpc

from scripts.serve import sandbox
from scripts.serve.ports_and_memory import find_free_ports
from scripts.serve.triton_client import CHANNEL, make_input
from scripts.serve.triton_server import triton_server
from tests.triton_models import bpr

VENV = ROOT / ".venv-triton"
pytestmark = pytest.mark.skipif(
    bool(sandbox.explain_refusal()), reason=f"no sandbox on this machine: {sandbox.explain_refusal()}"
)

# Attempts of the archive's code when it is loaded; its answer holds the results
TRIES = """
import glob, json, os, socket
got = {}
def attempt(name, action):
    try:
        got[name] = str(action())
    except Exception as error:
        got[name] = f"refused: {type(error).__name__}"
def write(path):
    open(path, "w").write("mark")
    return "wrote"
for name, path in json.loads(%r).items():
    attempt(name, lambda: open(path).read() if name.startswith("read") else write(path))
attempt("home", lambda: json.dumps(os.listdir(%r)))
attempt("connect outside", lambda: socket.create_connection(("127.0.0.1", %d), timeout=3))
attempt("docker", lambda: socket.socket(socket.AF_UNIX).connect("/var/run/docker.sock"))
attempt("look up", lambda: socket.getaddrinfo("example.org", 80))
def secrets():
    for path in glob.glob("/proc/[0-9]*/environ"):
        try:
            if b"a-secret" in open(path, "rb").read():
                yield path
        except PermissionError:
            pass
attempt("others' processes", lambda: list(secrets()))
attempt("change the kernel", lambda: os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY))
attempt("kill", lambda: os.kill(%d, 0))
TAG = json.dumps(got)
"""


@pytest.fixture
def neighbour() -> Iterator[int]:
    """A port of this machine where a service listens, such as one of the team's."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_an_archive_that_tries_gets_nothing(
    tmp_path: Path, neighbour: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    secret, home = tmp_path / "credentials", Path.home()
    secret.write_text("a-secret")
    checkout = ROOT / "build"
    checkout.mkdir(exist_ok=True)
    tries = {
        "read a secret": secret, "read the checkout": ROOT / "README.md", "write into the checkout": checkout / "mark",
        "write beside itself": tmp_path / "repository/bpr_model/1/mark", "write to the system": Path("/usr/mark"),
        "write to its environment": VENV / "mark", "read passwords": Path("/etc/shadow"),
    }  # fmt: skip
    folder = bpr(tmp_path / "repository")
    told = json.dumps({name: str(path) for name, path in tries.items()})
    (folder / "1/helper.py").write_text(TRIES % (told, str(home), neighbour, os.getpid()))
    with triton_server(tmp_path / "repository", tmp_path / "logs/log", venv=VENV, foreign=True) as server:
        client = grpc.InferenceServerClient(server.grpc, channel_args=CHANNEL)
        request = {"input": np.zeros((1, 1, 1, 1), np.int16), "metadata": np.ones((1, 3), np.float32)}
        answer = client.infer("bpr_model", [make_input(name, array) for name, array in request.items()])
        got = json.loads(answer.as_numpy("output")[0].decode())
        client.close()
    assert capsys.readouterr().out == ""
    assert got.pop("others' processes") == "[]"
    ours = [path.relative_to(home).parts[0] for path in sandbox.list_python_folders(VENV) if path.is_relative_to(home)]
    if not (there := got.pop("home")).startswith("refused: "):  # at most the folders above its Python
        assert set(json.loads(there)) <= set(ours)
    assert {name for name, what in got.items() if not what.startswith("refused: ")} == set(), got
    assert not any(path.name == "mark" and path.exists() for path in tries.values())
    assert list((tmp_path / "logs").iterdir()) == [tmp_path / "logs/log"]


def run(*command: str, folder: Path, ports: dict[int, int] | None = None) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        sandbox.make_confined_command(command, folder, [], ports or {}), pass_fds=list(ports or {}), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_what_is_written_to_its_own_folder_stays(tmp_path: Path) -> None:
    said = run("/bin/sh", "-c", "echo mine > own; pwd", folder=tmp_path).communicate()
    assert said == (f"{tmp_path}\n", "") and (tmp_path / "own").read_text() == "mine\n"


def test_it_has_no_capability_and_can_get_none(tmp_path: Path) -> None:
    said, _ = run(
        "/bin/sh", "-c", "grep -E 'Cap(Prm|Eff|Bnd)|NoNewPrivs' /proc/self/status", folder=tmp_path
    ).communicate()
    assert [line.split()[1] for line in said.splitlines()] == ["0" * 16] * 3 + ["1"]


def test_nobody_is_confined_as_well() -> None:
    if os.geteuid():
        pytest.skip("only root can become nobody; whoever runs this is confined by the tests above")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        (folder := Path(name)).chmod(0o777)
        program = folder / "sandbox.py"
        program.write_text((ROOT / "scripts/serve/sandbox.py").read_text())
        tries = f"id -u; echo > {name}/own; echo > /usr/mark; ls /root"
        command = ["/usr/bin/python3", program, folder, "--", "/bin/sh", "-c", tries]
        said = subprocess.run(command, capture_output=True, text=True, user=65534, group=65534, extra_groups=[])
        assert (said.stdout, (folder / "own").read_text()) == ("65534\n", "\n")
        assert "/usr/mark: Read-only file system" in said.stderr and "'/root': No such file" in said.stderr


def test_connections_are_passed_on_both_ways_and_end_on_both_sides(tmp_path: Path) -> None:
    """Send 4 MB there and back, more than any buffer on the way holds."""
    (inside,) = find_free_ports("127.0.0.1", 1)
    echo = (
        f"import socket\nserver = socket.create_server(('127.0.0.1', {inside}))\nprint('up', flush=True)\n"
        "while True:\n    peer, _ = server.accept()\n"
        "    data = b''.join(iter(lambda: peer.recv(65536), b''))\n    peer.sendall(data[::-1])\n    peer.close()\n"
    )
    data = np.random.default_rng(0).bytes(4_000_000)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = run("/usr/bin/python3", "-c", echo, folder=tmp_path, ports={listening.fileno(): inside})
        address = listening.getsockname()
    assert process.stdout and process.stdout.readline() == "up\n"
    for _ in range(2):
        with socket.create_connection(address) as peer:
            sending = threading.Thread(target=lambda peer=peer: (peer.sendall(data), peer.shutdown(socket.SHUT_WR)))
            sending.start()
            assert b"".join(iter(lambda peer=peer: peer.recv(65536), b"")) == data[::-1]
            sending.join()
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


def test_it_ends_when_whoever_started_it_is_killed(tmp_path: Path) -> None:
    process = run("/bin/sh", "-c", "echo up; sleep 1000", folder=tmp_path)
    assert process.stdout and process.stdout.readline() == "up\n"
    process.kill()
    assert process.stdout.read() == ""  # no process holds the other end any more


@pytest.mark.parametrize(("command", "status"), [("exit 7", 7), ("kill -KILL $$", -signal.SIGKILL)])
def test_its_end_is_the_commands_end(tmp_path: Path, command: str, status: int) -> None:
    process = run("/bin/sh", "-c", command, folder=tmp_path)
    process.communicate()
    assert process.returncode == status


def test_where_there_is_no_sandbox_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.serve import triton_server as module

    monkeypatch.setattr(module.sandbox, "explain_refusal", lambda: "unshare: Operation not permitted")
    assert not module.can_confine()
    assert capsys.readouterr().out == (
        "code of others runs with your rights, because this machine gives no sandbox "
        "(unshare: Operation not permitted)\n"
    )


def test_a_home_is_never_seen_for_the_sake_of_a_python_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(sys.executable)
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python3").symlink_to(tmp_path / "bin/python3")
    seen = sandbox.list_python_folders(tmp_path / "venv")
    assert tmp_path not in seen and tmp_path / "venv" in seen
