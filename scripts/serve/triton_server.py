"""One real tritonserver, started strictly on a model repository and stopped whatever happens.

    with triton_server(Path("model_repository_running"), Path("build/logs/triton.log")) as server: ...

The server is Triton 2.47.0: the one of the Python package index in the environment $TRITON_VENV
(.venv-triton, made by `make .venv-triton/installed`), or, given an image, the one of that image in Docker.
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
from scripts.serve.server_in_docker import IN_DOCKER, forward_to_container, make_docker_command, refuse_absent
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
# The user's variables that a server gets; nothing else of them, so no secret that happens to be there
INHERITED = ("LANG", "LC_ALL", "TZ", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Server:
    """A server that is ready; the addresses are `host:port`."""

    process: subprocess.Popen[bytes]
    log: Path
    http: str
    grpc: str
    metrics: str | None
    key: str = field(repr=False)

    def ask(self, path: str, method: str = "GET", timeout: float = 60) -> Any:
        """The JSON that an HTTP request is answered with; OSError or HTTPException where the server does not answer."""
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
        """How the server ended and its last words; of one that still runs `otherwise`."""
        with suppress(subprocess.TimeoutExpired):  # a connection breaks a moment before the process is gone
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
    """Yields once every model of the repository is loaded; on leaving the server and all its processes are gone.

    `ports`: HTTP, gRPC and metrics; none: free ones, without metrics. `timeout`: seconds until ready.
    `lock`: gRPC too loads and unloads models only with the server's key. `maps`: files in /dev/shm that it may map,
    in a container too.
    `foreign`: code of others is among the models; it gets neither network nor the user's files, see sandbox.py. Where
    that cannot be had, it is said, and the server starts all the same.
    SystemExit: no environment or Docker, a taken port, too little shared memory, a server that died or never got ready.
    Call from the main thread: SIGTERM and SIGHUP become SystemExit inside the block, SIGINT KeyboardInterrupt.
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
            refuse_absent(image)
            environment = dict(os.environ)  # docker's own
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
    """What a server on this machine starts with; `home`: where it and its Python code may write."""
    chosen = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return chosen | {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "TMPDIR": str(home)}


def prepare_server(venv: Path, scratch: Path, environment: dict[str, str]) -> list[str]:
    """The command of the package index's server, with what it needs made in `scratch`; adds to `environment`."""
    binaries = sorted(venv.resolve().glob("lib/python*/site-packages/pytriton/tritonserver/bin/tritonserver"))
    if not binaries:
        raise SystemExit(f"{venv}: no tritonserver there; make it with: make .venv-triton/installed")
    home = binaries[0].parents[1]
    packages = home.parents[1]
    python = packages.parent.name
    # Copies: the server refuses a backend library that is a link out of its directory.
    backends = scratch / "backends"
    shutil.copytree(home / "backends/python", backends / "python", ignore=shutil.ignore_patterns("__pycache__"))
    stub = home / "python_backend_stubs" / python.removeprefix("python") / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    (backends / "onnxruntime").mkdir()
    shutil.copy(STAND_IN, backends / "onnxruntime/model.py")
    # The stub runs the first python3 on PATH, and that would write __pycache__ into the repository that it serves:
    # it takes no environment variable and no option, so it gets a virtual environment around ours that says no.
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
    """Whether code of others can be confined on this machine; says why not."""
    if reason := sandbox.explain_refusal():
        print(f"code of others runs with your rights, for this machine gives no sandbox ({reason})", flush=True)
    return not reason


def list_readable(repository: Path, venv: Path) -> list[Path]:
    """What a confined server may read: the repository, where its links lead to, and its Python."""
    linked = [Path(os.path.realpath(path)) for path in repository.rglob("*") if path.is_symlink()]
    return [repository, *linked, *sandbox.list_python_folders(venv)]


def wait_ready(server: Server, timeout: float) -> None:
    """Returns once the server says that it and its models are ready."""
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
