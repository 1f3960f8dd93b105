"""One real tritonserver, started strictly on a model repository and stopped whatever happens.

    with triton_server(Path("model_repository_running"), Path("build/logs/triton.log")) as server: ...

The server is Triton 2.47.0: the one of the Python package index in the environment $TRITON_VENV
(.venv-triton, made by `make .venv-triton/installed`), or, given an image, the one of that image in Docker.
"""

import ctypes
import http.client
import json
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any

from scripts.serve import sandbox
from scripts.serve.check_repository import BYTES, read_config

STAND_IN = Path(__file__).resolve().parents[2] / "docker/backends/onnxruntime/model.py"
# Below the range from which Linux gives ports to outgoing connections, so that none is lost while models load.
FREE_PORTS = range(20000, 32768)
STRICT = ("--model-control-mode=explicit", "--load-model=*", "--exit-on-error=true", "--disable-auto-complete-config")
# What asks for a key, and its name; docker/compose.yaml and docker/triton.Dockerfile say the same.  Whoever may load a
# model may run code.  The team's client loads over gRPC without a key, so there that stays open unless LOCK=1.
KEY_HEADER = "chest-key"
LOCKED = "shared-memory,trace,logging"
# The user's variables that a server gets; nothing else of them, so no secret that happens to be there
INHERITED = ("LANG", "LC_ALL", "TZ", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
# What the server prints as errors on every machine without a GPU.
NOISE = ("CudaDriverHelper", "CUDA driver version", "pinned memory pool")
SHM = Path("/dev/shm")
IN_DOCKER = (8000, 8001, 8002)
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


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

    def trouble(self, otherwise: str) -> str:
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
    shared = shared_memory_size(repository)
    if ports:
        for port in ports:
            check_port(address, port)
    else:
        ports = free_ports(address, 2)
    with unwind_on_signals(), adopt_orphans(), tempfile.TemporaryDirectory(prefix="triton-", dir=log.parent) as scratch:
        name = Path(scratch).name
        key = secrets.token_hex(16)
        listeners: list[socket.socket] = []
        if image:
            refuse_absent(image)
            environment = dict(os.environ)  # docker's own
            command = docker_command(image, name, repository, address, ports, shared, maps=maps, foreign=foreign)
            command += lock_options(key, lock)
            listeners = [open_port(address, port) for port in ports] if foreign else []
            for opened, inner in zip(listeners, IN_DOCKER, strict=False):
                passing = (opened, name, inner)
                threading.Thread(target=sandbox.pass_on_to_docker, args=passing, daemon=True).start()
        else:
            check_shared_memory(shared)
            environment = clean_environment(Path(scratch))
            venv = venv or Path(os.environ.get("TRITON_VENV", ".venv-triton"))
            command = environment_command(venv, Path(scratch), environment)
            command += [f"--model-repository={repository}", *STRICT, *lock_options(key, lock)]
            command += [f"--backend-config=python,shm-region-prefix-name={name}", "--exit-timeout-secs=10"]
            confined = foreign and can_confine()
            command += port_options("127.0.0.1" if confined else address, ports)
            if confined:
                listeners = [open_port(address, port) for port in ports]
                inside = {opened.fileno(): port for opened, port in zip(listeners, ports, strict=True)}
                command = sandbox.confine_command(command, Path(scratch), list_visible(repository, venv), inside)
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


def clean_environment(home: Path) -> dict[str, str]:
    """What a server on this machine starts with; `home`: where it and its Python code may write."""
    chosen = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return chosen | {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "TMPDIR": str(home)}


def lock_options(key: str, lock: bool) -> list[str]:
    """The server's options that ask for `key` where a request could run code, read the disk or another's memory."""
    grpc = f"model-repository,{LOCKED}" if lock else LOCKED
    return [
        f"--http-restricted-api=model-repository,{LOCKED}:{KEY_HEADER}={key}",
        f"--grpc-restricted-protocol={grpc}:{KEY_HEADER}={key}",
    ]


def environment_command(venv: Path, scratch: Path, environment: dict[str, str]) -> list[str]:
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


def has_gpu() -> bool:
    """Whether a server in Docker gets a GPU; $DOCKER_GPUS says how, see scripts/plans/gpu.py."""
    return Path("/dev/nvidiactl").exists() or bool(os.environ.get("DOCKER_GPUS"))


def refuse_absent(image: str) -> None:
    """SystemExit where there is no Docker, or the image is not on this machine; other trouble `docker run` tells."""
    if not shutil.which("docker"):
        raise SystemExit(
            f"docker is not installed, so {image} cannot run; without IMAGE the server of .venv-triton is used"
        )
    look = subprocess.run(["docker", "image", "inspect", image], capture_output=True, text=True, check=False)
    if look.returncode and "no such image" in look.stderr.lower():  # any other trouble, `docker run` tells
        raise SystemExit(
            f"{image} is not here; docker pull {image}, or where there is no network docker load --input FILE"
        )


def docker_command(
    image: str,
    name: str,
    repository: Path,
    address: str,
    ports: Sequence[int],
    shared: int,
    gpu: bool | None = None,
    maps: Sequence[Path] = (),
    foreign: bool = False,
) -> list[str]:
    """The command of an image's server; the repository is mounted read-only under its own path.

    `foreign`: without network, rights and a place to write but /tmp; the image has to have what the models require.

    Python models get their requirements.txt first, which Triton itself never reads; where the image has them
    already, pip needs no network.
    """
    # The files that links in the repository lead to are mounted as well, each where the link says.
    files = sorted({os.path.realpath(path) for path in repository.rglob("*") if path.is_symlink()})
    mounts = [f"--mount=type=bind,source={path},target={path},readonly" for path in [str(repository), *files]]
    mounts += [f"--mount=type=bind,source={path},target={path}" for path in maps]
    publish = [f"--publish={address}:{port}:{inner}" for port, inner in zip(ports, IN_DOCKER, strict=False)]
    here = has_gpu() if gpu is None else gpu
    gpus = shlex.split(os.environ.get("DOCKER_GPUS") or "--gpus=all") if here else []
    mirrors = [
        f"--env={key}" for key in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST") if key in os.environ
    ]
    if certificate := os.environ.get("PIP_CERT") or os.environ.get("REQUESTS_CA_BUNDLE"):
        mounts.append(f"--mount=type=bind,source={os.path.realpath(certificate)},target=/tmp/ca.pem,readonly")
        mirrors.append("--env=PIP_CERT=/tmp/ca.pem")
    if foreign:
        publish = ["--network=none", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--read-only"]
        publish += ["--tmpfs=/tmp", "--env=HOME=/tmp"]
        mirrors = []
    start = (
        'for needs in "$0"/*/1/requirements.txt; do'
        ' if [ -e "$needs" ]; then python3 -m pip install --quiet --requirement "$needs" || exit; fi; done;'
        ' exec tritonserver --model-repository="$0" "$@"'
    )
    return [
        "docker",
        "run",
        "--rm",
        "--pull=never",
        f"--name={name}",
        f"--shm-size={max(shared, 2 << 30)}",
        *gpus,
        *publish,
        *mounts,
        *mirrors,
        image,
        "bash",
        "-c",
        start,
        str(repository),
        *STRICT,
        *([f"--pinned-memory-pool-byte-size={pinned_pool_size(repository)}"] if here else []),
        f"--allow-metrics={'true' if len(ports) > 2 else 'false'}",
    ]


def port_options(address: str, ports: Sequence[int]) -> list[str]:
    """The server's options for its three (or, without metrics, two) ports."""
    options = [f"--{kind}-{what}" for kind in ("http", "grpc", "metrics")[: len(ports)] for what in ("address", "port")]
    values = [str(value) for port in ports for value in (address, port)]
    pairs = [f"{option}={value}" for option, value in zip(options, values, strict=True)]
    return pairs if len(ports) > 2 else [*pairs, "--allow-metrics=false"]


def can_confine() -> bool:
    """Whether code of others can be confined on this machine; says why not."""
    if reason := sandbox.explain_refusal():
        print(f"code of others runs with your rights, for this machine gives no sandbox ({reason})", flush=True)
    return not reason


def list_visible(repository: Path, venv: Path) -> list[Path]:
    """What a confined server may read: the repository, where its links lead to, and its Python."""
    linked = [Path(os.path.realpath(path)) for path in repository.rglob("*") if path.is_symlink()]
    return [repository, *linked, *sandbox.list_python_folders(venv)]


def open_port(address: str, port: int) -> socket.socket:
    """A socket that listens; SystemExit where it cannot."""
    check_port(address, port)
    return socket.create_server((address, port), backlog=128)


def check_port(address: str, port: int) -> None:
    """SystemExit unless the port can be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise SystemExit(f"{address}:{port}: {reason}; stop what listens there, or choose another port") from error


def free_ports(address: str, count: int) -> list[int]:
    """Distinct ports on which nothing listens; SystemExit where there are too few."""
    found: list[int] = []
    for port in random.sample(FREE_PORTS, len(FREE_PORTS)):
        with suppress(SystemExit):
            check_port(address, port)
            found.append(port)
        if len(found) == count:
            return found
    raise SystemExit(f"{address}: no free port from {FREE_PORTS[0]} to {FREE_PORTS[-1]}; see what listens: ss -ltnp")


def shared_memory_size(repository: Path) -> int:
    """Bytes of /dev/shm that the Python backend needs when each model has got one sample.

    A model's region grows to its largest request and stays. An unknown dimension counts as 512: a CT series of 512
    slices of 512 x 512 voxels.
    """
    needed = 64 << 20  # answers, and what several models need besides
    for path in repository.glob("*/config.pbtxt"):
        with suppress(ValueError):
            for tensor in read_config(path).input:
                needed += BYTES.get(tensor.data_type, 8) * prod(512 if size < 0 else size for size in tensor.dims)
    return needed


def pinned_pool_size(repository: Path) -> int:
    """Bytes of the pool that batches are copied to a GPU from: the largest one, twice, for one waits; 256 MB at least.

    From memory that is not pinned copying takes a GPU twice as long (a volume 33 ms on an H200, its network 9 to 28).
    """
    largest = 0
    for path in repository.glob("*/config.pbtxt"):
        with suppress(ValueError):
            config = read_config(path)
            known = [tensor for tensor in config.input if all(size > 0 for size in tensor.dims)]
            size = sum(BYTES.get(tensor.data_type, 8) * prod(tensor.dims) for tensor in known)
            largest = max(largest, size * max(1, config.max_batch_size))
    return max(256 << 20, 2 * largest)


def check_shared_memory(needed: int) -> None:
    """SystemExit where /dev/shm has less than `needed` bytes free."""
    free = shutil.disk_usage(SHM).free if SHM.is_dir() else 0
    if free < needed:
        gigabytes = -(-needed // (1 << 30))
        raise SystemExit(
            f"{SHM} has {free >> 20} MiB free, requests to these models need {needed >> 20} MiB; "
            f"enlarge it: mount -o remount,size={gigabytes}g {SHM} (in Docker: --shm-size {gigabytes}g)"
        )


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


def describe_end(process: subprocess.Popen[bytes]) -> str:
    """How a process ended, in words."""
    code = process.returncode
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def read_last_words(log: Path, count: int = 4) -> str:
    """The last errors in a server's log, without their prefixes; where there are none, its last lines."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line and line[0] not in "+|"]
    errors = [
        line
        for line in lines
        if re.match(r"[EF]\d{4} |error:|docker:|ERROR:", line) and not any(n in line for n in NOISE)
    ]
    words = [re.sub(r"^[A-Z]\d{4} \S+ \d+ \S+\] ", "", line) for line in (errors or lines)[-count:]]
    return "\n".join([*dict.fromkeys(f"  {line[:600]}" for line in words or ["(nothing)"]), f"whole log: {log}"])


def stop_server(process: subprocess.Popen[bytes], patience: float = 15) -> None:
    """Ends the server: asked first, then it and its stubs are killed. It has a process group of its own."""
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with suppress(ChildProcessError):  # its orphans are ours, see adopt_orphans
            while True:
                os.waitpid(-process.pid, 0)


@contextmanager
def adopt_orphans() -> Iterator[None]:
    """The stubs of a server that dies become children of this process, so that it can wait until they are gone."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0)


def die_with_parent(parent: int) -> None:
    """In the child, before the server starts: it is asked to stop when its starter is gone, kill -9 included."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def unwind_on_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP unwind the stack, so that what was started is stopped. For the main thread alone."""

    def leave(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
    number: int
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # `nohup` means its SIGHUP; but a shell's `&` ignores SIGINT, and there kill -INT is to work all the same.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
