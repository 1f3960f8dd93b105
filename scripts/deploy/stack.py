"""Start Triton under Docker Compose, stop it, show its log.

    python3 -sES -m scripts.deploy.stack up --image IMAGE
        [--address A|none] [--ports "8000 8001 8002"] [--device cpu] [--lock]
    python3 -sES -m scripts.deploy.stack up --repository FOLDER --base IMAGE     (the same options)
    python3 -sES -m scripts.deploy.stack down | logs

--repository mounts a folder in an image of Triton that has the Python models' requirements; the image of --image brings
its own models. Each container has its own key, see docker/compose.yaml; whoever may use Docker can read it.
"""

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import urllib.request
from contextlib import suppress

from scripts.deploy.docker_engine import find_compose, inspect_object, pull_image, read_labels, run_docker
from scripts.deploy.image import build_server_image
from scripts.publish.published import hash_content
from scripts.publish.vouch import list_models
from scripts.serve.releases import list_notes
from scripts.steps.records import read_text, record_path, write_text

SERVICE = "tritonserver"
SERVING = ".make/serving"  # JSON: the container that runs, and the digest of each model's files that it last loaded


def start_stack(
    image: str, repository: str, base: str, address: str, ports: list[str], device: str, lock: bool = False
) -> None:
    """Return once the container is healthy. If it does not become healthy, SystemExit tells why; a new one is removed.

    `ports`: of HTTP, gRPC and metrics. `lock`: the models are loaded at the start; loading others needs the key, over
    gRPC, too.
    """
    command = find_compose()
    files = ["compose.yaml"]
    if len(ports) != 3 or not all(port.isdecimal() for port in ports):
        raise SystemExit(f"PORTS={' '.join(ports)}: expected three, for HTTP, gRPC and metrics: PORTS='8100 8101 8102'")
    before = find_container()
    chosen = {"HTTP_PORT": ports[0], "GRPC_PORT": ports[1], "METRICS_PORT": ports[2]}
    chosen |= {"CHEST_KEY": (read_key(before) if before else "") or secrets.token_hex(16), "LOCK": "1" if lock else ""}
    chosen |= {"START_PERIOD": "300s"} if lock else {}  # the container is healthy only when its models are loaded
    if repository:
        if not list_models(repository):
            raise SystemExit(f"{repository}: no models there; make repository, or a ready image: make up FROM=prebuilt")
        image = build_server_image(repository, base)
        files.append("compose.repository.yaml")
        chosen |= {"REPOSITORY": os.path.abspath(repository), "REPOSITORY_ID": identify_folder(repository)}
        if owner := os.stat(repository).st_uid:
            chosen["TRITON_USER"] = f"{owner}:{os.stat(repository).st_gid}"
    else:
        pull_image(image)
    if device == "cpu":
        files.append("compose.cpu.yaml")
    if address == "none":
        files.append("compose.private.yaml")
    chosen["ADDRESS"] = "127.0.0.1" if address == "none" else address
    words = [word for file in files for word in ("--file", f"docker/{file}")]
    run = subprocess.Popen(
        [*command, *words, "up", "--detach", "--wait"],
        env=os.environ | chosen | {"IMAGE": image}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert run.stdout
    said = ""
    for line in run.stdout:
        said += line
        print(f"  {line}", end="", flush=True)
    if run.wait():
        why = explain_failure(said)
        if not before:
            subprocess.run([*command, "--file", "docker/compose.yaml", "down"], capture_output=True)
        raise SystemExit(why)
    now = find_container()
    if repository and now != before:
        took = {model: hash_content(repository, model) for model in list_models(repository)}
        write_text(SERVING, json.dumps({"container": now, "models": took}))
    names = ", ".join(sorted(model["name"] for model in read_index(now)))
    kind = (
        read_text(record_path("published", repository)).partition("\n")[0]
        if repository
        else read_labels(image).get("chest.weights")
    )
    if kind == "synthetic":
        print("the weights are synthetic, so the answers are nonsense")
    where = f"HTTP {address}:{ports[0]}, gRPC {address}:{ports[1]}, metrics {address}:{ports[2]}"
    print(f"{SERVICE} is ready: {'no port on this machine' if address == 'none' else where}")
    for told in list_notes() if repository else []:  # an image of others may have any release
        print(told)
    ask = "a client can ask" if lock else "a client loads and asks"
    print(f"in the network {read_networks(now)} its address is {SERVICE}:8001; {ask} {names}")


def explain_failure(said: str) -> str:
    """Return the reason why Compose could not start the container, and what to do."""
    if found := re.search(r"(could not select device driver .*|.*nvidia-container-cli: .*)", said):
        return (
            f"Docker cannot give a GPU: {found[1].strip()}\n"
            "on the CPU: make up DEVICE=cpu; a GPU needs its driver and the NVIDIA Container Toolkit"
        )
    if found := re.search(r"([\d.]+:\d+)[^\n]*(?:already allocated|address already in use)", said):
        return f"{found[1]} is taken; stop what listens there (docker ps, ss -ltnp), or make up PORTS='8100 8101 8102'"
    last = run_docker("logs", "--tail=20", find_container()) if find_container() else ""
    return f"{last}\n{SERVICE} did not become healthy" if last else "nothing was started; see Compose's message above"


def find_container() -> str:
    """Return the id of the service's container, "" if there is none."""
    project = os.environ.get("COMPOSE_PROJECT_NAME", "chest")
    labelled = (f"label=com.docker.compose.{key}={name}" for key, name in (("project", project), ("service", SERVICE)))
    return run_docker("ps", "--no-trunc", "--quiet", *(f"--filter={label}" for label in labelled)).partition("\n")[0]


def read_key(identity: str) -> str:
    """Return a container's key, "" if it has none."""
    told = inspect_object("container", identity).get("Config", {}).get("Env") or []
    return next((word.partition("=")[2] for word in told if word.startswith("CHEST_KEY=")), "")


def find_address(identity: str) -> str:
    """Return host:port where a container answers HTTP: a port of this machine, or else the container's own address."""
    there = inspect_object("container", identity)["NetworkSettings"]
    if bound := (there["Ports"].get("8000/tcp") or [None])[0]:
        return f"{bound['HostIp'].replace('0.0.0.0', '127.0.0.1')}:{bound['HostPort']}"
    if found := [network["IPAddress"] for network in there["Networks"].values() if network["IPAddress"]]:
        return f"{found[0]}:8000"
    raise SystemExit("tritonserver restarts again and again and does not answer; make logs")


def read_networks(identity: str) -> str:
    """Return Docker's names of the networks that a container has joined."""
    return ", ".join(sorted(inspect_object("container", identity)["NetworkSettings"]["Networks"]))


def read_index(identity: str) -> list[dict[str, str]]:
    """Return name, version and state of each model in Triton's index."""
    return list(json.loads(ask_container(identity, "/v2/repository/index", b"") or "[]"))


def ask_container(identity: str, path: str, body: bytes | None = None) -> str:
    """Return a container's answer to an HTTP request with its key; OSError if it does not answer."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands before our own server
    asked = urllib.request.Request(f"http://{find_address(identity)}{path}", body, {"chest-key": read_key(identity)})
    with direct.open(asked, timeout=600) as answer:
        return str(answer.read().decode())


def identify_folder(repository: str) -> str:
    """Return the identity of a folder, which is independent of its name."""
    there = os.stat(repository)
    return f"{there.st_dev}:{there.st_ino}"


def stop_stack() -> None:
    """Stop and remove the container."""
    subprocess.run([*find_compose(), "--file", "docker/compose.yaml", "down"], check=True)


def show_log() -> None:
    """Show the log until Ctrl-C."""
    if not find_container():
        raise SystemExit("no tritonserver runs here; make up")
    with suppress(KeyboardInterrupt):
        subprocess.run(["docker", "logs", "--follow", "--tail=200", find_container()])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("up", "down", "logs"))
    parser.add_argument("--image", default="")
    parser.add_argument("--repository", default="")
    parser.add_argument("--base", default="")
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--ports", default="8000 8001 8002")
    parser.add_argument("--device", default="gpu")
    parser.add_argument("--lock", action="store_true")
    args = parser.parse_args()
    if args.verb == "up":
        start_stack(args.image, args.repository, args.base, args.address, args.ports.split(), args.device, args.lock)
    else:
        sys.exit({"down": stop_stack, "logs": show_log}[args.verb]())
