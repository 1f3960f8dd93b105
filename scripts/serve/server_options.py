"""Options of the tritonserver command that the environment's server and Docker's server share."""

from collections.abc import Sequence

STRICT = ("--model-control-mode=explicit", "--load-model=*", "--exit-on-error=true", "--disable-auto-complete-config")

# The header with the key, and the requests that need it; docker/compose.yaml and docker/triton.Dockerfile repeat them.
# Whoever can load a model can run code. The team's client loads over gRPC without a key, so loading stays open there
# unless LOCK=1.
KEY_HEADER = "chest-key"
LOCKED = "shared-memory,trace,logging"


def list_lock_options(key: str, lock: bool) -> list[str]:
    """Return the options that demand `key` for requests that could run code, read files or read others' memory."""
    grpc = f"model-repository,{LOCKED}" if lock else LOCKED
    return [
        f"--http-restricted-api=model-repository,{LOCKED}:{KEY_HEADER}={key}",
        f"--grpc-restricted-protocol={grpc}:{KEY_HEADER}={key}",
    ]


def list_port_options(address: str, ports: Sequence[int]) -> list[str]:
    """Return the options for the server's ports: HTTP, gRPC and perhaps metrics."""
    options = [f"--{kind}-{what}" for kind in ("http", "grpc", "metrics")[: len(ports)] for what in ("address", "port")]
    values = [str(value) for port in ports for value in (address, port)]
    pairs = [f"{option}={value}" for option, value in zip(options, values, strict=True)]
    return pairs if len(ports) > 2 else [*pairs, "--allow-metrics=false"]
