"""Run Triton on a model repository until Ctrl-C: python -m scripts.serve.serve model_repository_running"""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from scripts.serve.ports_and_memory import SHM
from scripts.serve.triton_server import Server, triton_server


def serve_repository(
    repository: Path,
    address: str,
    ports: Sequence[int],
    log: Path,
    image: str | None,
    timeout: float,
    lock: bool = False,
    foreign: bool = False,
) -> None:
    """Serve until Ctrl-C; SystemExit if the server cannot start or ends by itself. `lock`, `foreign`: triton_server."""
    if not repository.is_dir() or not any(repository.glob("*/config.pbtxt")):
        raise SystemExit(f"{repository}: no models there; make them with: make repository")
    try:
        with triton_server(
            repository, log, image=image, address=address, ports=ports, timeout=timeout, lock=lock, foreign=foreign
        ) as server:
            models = ", ".join(sorted(model["name"] for model in server.ask("/v2/repository/index", "POST")))
            with publish_key(server):
                print(
                    f"READY: {models}; HTTP http://{server.http} gRPC {server.grpc} "
                    f"metrics http://{server.metrics}/metrics; log {log}; Ctrl-C stops it",
                    flush=True,
                )
                server.process.wait()
            raise SystemExit(server.explain_trouble("tritonserver ended"))
    except KeyboardInterrupt:
        return


@contextmanager
def publish_key(server: Server) -> Iterator[None]:
    """Keep the server's key in /dev/shm/chest-key-PORT (PORT: gRPC) while the block runs.

    Only this user can read it. His programs need it to share memory with the server.
    """
    path = SHM / f"chest-key-{server.grpc.rpartition(':')[2]}"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(server.key)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run Triton on a model repository until Ctrl-C.")
    parser.add_argument("repository", type=Path)
    parser.add_argument("--address", default="127.0.0.1", help="0.0.0.0 lets other machines ask; see docs/serving.md")
    parser.add_argument("--http", type=int, default=8000)
    parser.add_argument("--grpc", type=int, default=8001)
    parser.add_argument("--metrics", type=int, default=8002)
    parser.add_argument("--log", type=Path, default=Path("build/logs/serve.log"))
    parser.add_argument("--image", help="run this image's server in Docker")
    parser.add_argument("--lock", action="store_true", help="loading and unloading over gRPC needs the key")
    parser.add_argument(
        "--foreign", action="store_true", help="models hold code of others: give it no network and none of your files"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds until the server must be ready")
    given = parser.parse_args(argv)
    ports = (given.http, given.grpc, given.metrics)
    serve_repository(
        given.repository, given.address, ports, given.log, given.image or None, given.timeout, given.lock, given.foreign
    )


if __name__ == "__main__":
    main()
