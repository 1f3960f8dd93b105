"""Start a real tritonserver on a model repository, and stop it whatever happens.

    with triton_server(Path("model_repository_running"), Path("build/logs/triton.log")) as server: ...

The server is Triton 2.47.0 of the Python package index, in the environment $TRITON_VENV (.venv-triton, made by
`make .venv-triton/installed`). With an image it is that image's server, in Docker. If a model does not load, it ends.
"""

import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.serve import sandbox
from scripts.serve.ports_and_memory import (
    SHM,
    check_port,
    check_shared_memory,
    estimate_shared_memory,
    find_free_ports,
    open_port,
)
from scripts.serve.server_in_docker import IN_DOCKER, check_image, forward_to_container, make_docker_command
from scripts.serve.server_options import KEY_HEADER, STRICT, list_lock_options, list_port_options
from scripts.serve.server_process import (
    adopt_orphans,
    describe_end,
    die_with_parent,
    read_last_words,
    stop_server,
    unwind_on_signals,
)

STAND_IN = Path(__file__).resolve().parents[2] / "docker/backends/onnxruntime/model.py"
# The server gets these of the user's variables and no others, because others may hold secrets
INHERITED = ("LANG", "LC_ALL", "TZ", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Server:
    """A server that is ready. `http`, `grpc` and `metrics` are `host:port`."""

    process: subprocess.Popen[bytes]
    log: Path
    http: str
    grpc: str
    metrics: str | None
    key: str = field(repr=False)

    def ask(self, path: str, method: str = "GET", timeout: float = 60) -> Any:
        """Return the JSON that answers an HTTP request; OSError or HTTPException if the server does not answer it."""
        connection = http.client.HTTPConnection(self.http, timeout=timeout)
        try:
            connection.request(method, path, headers={KEY_HEADER: self.key})
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise http.client.HTTPException(f"{method} {path}: {response.status} {body.decode(errors='replace')}")
            return json.loads(body) if body else None
        finally:
            connection.close()

    def explain_trouble(self, otherwise: str) -> str:
        """Say how the server ended, or `otherwise` if it still runs; then its last errors."""
        with suppress(subprocess.TimeoutExpired):  # a connection breaks a moment before its process ends
            self.process.wait(2)
            otherwise = f"tritonserver {describe_end(self.process)}"
        return f"{otherwise}\n{read_last_words(self.log)}"


@contextmanager
def triton_server(
    repository: Path,
    log: Path,
    *,
    image: str | None = None,
    venv: Path | None = None,
    address: str = "127.0.0.1",
    ports: Sequence[int] = (),
    timeout: float = 600,
    lock: bool = False,
    maps: Sequence[Path] = (),
    foreign: bool = False,
) -> Iterator[Server]:
    """Yield once every model of the repository is loaded. When the block ends, the server and its processes are gone.

    `ports`: of HTTP, gRPC and metrics; without them free ports are chosen, and there are no metrics.
    `timeout`: seconds until the server must be ready. `lock`: loading and unloading over gRPC needs the server's key.
    `maps`: files in /dev/shm that the server may map, in a container, too.
    `foreign`: the models hold code of others, which gets no network and none of the user's files, see sandbox.py.
    If this machine has no sandbox, a line says so, and the server starts without one.
    SystemExit: no environment or Docker, a taken port, too little shared memory, a server that died or was never ready.
    Call it from the main thread: in the block SIGTERM and SIGHUP raise SystemExit, SIGINT raises KeyboardInterrupt.
    """
    repository = repository.resolve()
    log = log.resolve()
    log.parent.mkdir(parents=True, exist_ok=True)
    shared = estimate_shared_memory(repository)
    if ports:
        for port in ports:
            check_port(address, port)
    else:
        ports = find_free_ports(address, 2)
    with unwind_on_signals(), adopt_orphans(), tempfile.TemporaryDirectory(prefix="triton-", dir=log.parent) as scratch:
        name = Path(scratch).name
        key = secrets.token_hex(16)
        listeners: list[socket.socket] = []
        if image:
            check_image(image)
            environment = dict(os.environ)  # for the docker command
            command = make_docker_command(image, name, repository, address, ports, shared, maps=maps, foreign=foreign)
            command += list_lock_options(key, lock)
            listeners = [open_port(address, port) for port in ports] if foreign else []
            for opened, inner in zip(listeners, IN_DOCKER, strict=False):
                passing = (opened, name, inner)
                threading.Thread(target=forward_to_container, args=passing, daemon=True).start()
        else:
            check_shared_memory(shared)
            environment = make_environment(Path(scratch))
            venv = venv or Path(os.environ.get("TRITON_VENV", ".venv-triton"))
            command = prepare_server(venv, Path(scratch), environment)
            command += [f"--model-repository={repository}", *STRICT, *list_lock_options(key, lock)]
            command += [f"--backend-config=python,shm-region-prefix-name={name}", "--exit-timeout-secs=10"]
            confined = foreign and can_confine()
            command += list_port_options("127.0.0.1" if confined else address, ports)
            if confined:
                listeners = [open_port(address, port) for port in ports]
                inside = {opened.fileno(): port for opened, port in zip(listeners, ports, strict=True)}
                command = sandbox.make_confined_command(command, Path(scratch), list_readable(repository, venv), inside)
        parent = os.getpid()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                pass_fds=[] if image else [opened.fileno() for opened in listeners],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),
            )
        if not image:
            for opened in listeners:
                opened.close()
        host = "127.0.0.1" if address == "0.0.0.0" else address
        urls = [f"{host}:{port}" for port in ports]
        server = Server(process, log, urls[0], urls[1], urls[2] if len(urls) > 2 else None, key)
        try:
            wait_ready(server, timeout)
            yield server
        finally:
            try:
                stop_server(process)
            finally:
                for opened in listeners if image else []:
                    opened.shutdown(socket.SHUT_RDWR)
                    opened.close()
                if image:
                    subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=False)
                for region in SHM.glob(f"{name}*"):
                    region.unlink(missing_ok=True)


def make_environment(home: Path) -> dict[str, str]:
    """Return the variables of a server on this machine. `home`: the folder that it and its Python code may write to."""
    chosen = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return chosen | {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "TMPDIR": str(home)}


def prepare_server(venv: Path, scratch: Path, environment: dict[str, str]) -> list[str]:
    """Return the command of the package index's server. Make its backends in `scratch`, add to `environment`."""
    binaries = sorted(venv.resolve().glob("lib/python*/site-packages/pytriton/tritonserver/bin/tritonserver"))
    if not binaries:
        raise SystemExit(f"{venv}: no tritonserver there; make it with: make .venv-triton/installed")
    home = binaries[0].parents[1]
    packages = home.parents[1]
    python = packages.parent.name
    # Copies, because the server refuses a backend library that is a link to another folder
    backends = scratch / "backends"
    shutil.copytree(home / "backends/python", backends / "python", ignore=shutil.ignore_patterns("__pycache__"))
    stub = home / "python_backend_stubs" / python.removeprefix("python") / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    (backends / "onnxruntime").mkdir()
    shutil.copy(STAND_IN, backends / "onnxruntime/model.py")
    # The stub runs the first python3 on PATH, which would write __pycache__ into the repository. Variables and options
    # do not reach that Python, so the stub gets a virtual environment around ours that forbids it.
    site = scratch / "lib" / python / "site-packages"
    site.mkdir(parents=True)
    (site / "triton.pth").write_text(f"{packages}\nimport sys; sys.dont_write_bytecode = True\n")
    (scratch / "bin").mkdir()
    (scratch / "bin/python3").symlink_to(venv.resolve() / "bin/python3")
    shutil.copy(venv / "pyvenv.cfg", scratch)
    path = [str(scratch / "bin"), str(venv.resolve() / "bin"), environment.get("PATH", os.defpath)]
    libraries = [str(packages / "nvidia_pytriton.libs"), environment.get("LD_LIBRARY_PATH", "")]
    environment |= {"PATH": os.pathsep.join(path), "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries))}
    return [str(binaries[0]), f"--backend-directory={backends}"]


def can_confine() -> bool:
    """Tell whether this machine can confine code of others; if not, print the reason."""
    if reason := sandbox.explain_refusal():
        print(f"code of others runs with your rights, because this machine gives no sandbox ({reason})", flush=True)
    return not reason


def list_readable(repository: Path, venv: Path) -> list[Path]:
    """Return the paths that a confined server may read: the repository, the targets of its links, its Python."""
    linked = [Path(os.path.realpath(path)) for path in repository.rglob("*") if path.is_symlink()]
    return [repository, *linked, *sandbox.list_python_folders(venv)]


def wait_ready(server: Server, timeout: float) -> None:
    """Wait until the server reports that it and its models are ready; SystemExit if it ends or is too late."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise SystemExit(
                f"tritonserver {describe_end(server.process)} before it was ready:\n{read_last_words(server.log)}"
            )
        with suppress(OSError, http.client.HTTPException):
            server.ask("/v2/health/ready", timeout=5)
            return
        time.sleep(0.1)
    raise SystemExit(
        f"tritonserver was not ready within {timeout:g} s, so it was stopped:\n{read_last_words(server.log)}"
    )
