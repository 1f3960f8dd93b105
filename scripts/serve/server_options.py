"""Options of the tritonserver command that every start here shares."""

from collections.abc import Sequence

STRICT = ("--model-control-mode=explicit", "--load-model=*", "--exit-on-error=true", "--disable-auto-complete-config")

# What asks for a key, and its name; docker/compose.yaml and docker/triton.Dockerfile say the same.  Whoever may load a
# model may run code.  The team's client loads over gRPC without a key, so there that stays open unless LOCK=1.
KEY_HEADER = "chest-key"

LOCKED = "shared-memory,trace,logging"


def list_lock_options(key: str, lock: bool) -> list[str]:
    """The server's options that ask for `key` where a request could run code, read the disk or another's memory."""
    grpc = f"model-repository,{LOCKED}" if lock else LOCKED
    return [
        f"--http-restricted-api=model-repository,{LOCKED}:{KEY_HEADER}={key}",
        f"--grpc-restricted-protocol={grpc}:{KEY_HEADER}={key}",
    ]


def list_port_options(address: str, ports: Sequence[int]) -> list[str]:
    """The server's options for its three (or, without metrics, two) ports."""
    options = [f"--{kind}-{what}" for kind in ("http", "grpc", "metrics")[: len(ports)] for what in ("address", "port")]
    values = [str(value) for port in ports for value in (address, port)]
    pairs = [f"{option}={value}" for option, value in zip(options, values, strict=True)]
    return pairs if len(ports) > 2 else [*pairs, "--allow-metrics=false"]
