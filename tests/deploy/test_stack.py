"""The Triton image and its stack, in a real Docker engine with a real Compose.

In place of NVIDIA's tritonserver image, which only a registry has, tests/ngc_tritonserver_stand_in.py makes one: Debian
with Triton 24.06 of the Python package index. There is no GPU: tests that reserve one end with Docker's refusal.

The file is longer than 300 lines, because most tests look at one story, a run of minutes.
"""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import server as http_server
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, ROOT, Project
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from tritonclient import grpc

from scripts.serve.ports_and_memory import choose_pinned_pool, find_free_ports
from scripts.serve.server_options import KEY_HEADER, LOCKED
from scripts.serve.triton_client import CHANNEL, make_input
from scripts.serve.triton_server import triton_server
from tests.ngc_tritonserver_stand_in import REGISTRY, stand_in
from tests.triton_models import bpr

NEEDED = [name for name in ("mmdebstrap", "docker-registry") if not shutil.which(name)]
pytestmark = [
    pytest.mark.usefixtures("docker_engine"),
    pytest.mark.skipif(bool(NEEDED), reason=f"not installed here: {', '.join(NEEDED)} (.ci/run installs all)"),
]

NAME = "chest-triton-test"
IMAGE = f"{NAME}:synthetic"
PATIENCE = 120
# A client such as the team's adapter, in a container on the network `chest`: it loads models, asks them, unloads none
CLIENT = """
import os
import numpy as np
from tritonclient import grpc
client = grpc.InferenceServerClient(os.environ["TRITON_URL"])
for name in ("vit_onnx", "binary_onnx", "multilabel_onnx", "bpr_model"):
    client.load_model(name)
def ask(name, **inputs):
    tensors = []
    for key, array in inputs.items():
        tensors.append(grpc.InferInput(key, list(array.shape), {"f": "FP32", "i": "INT16"}[array.dtype.kind]))
        tensors[-1].set_data_from_numpy(array)
    return client.infer(name, tensors, model_version="1").as_numpy("output")
features = ask("vit_onnx", input=np.full((1, 1, 20, 40, 40), 0.1, np.float32))
slices = np.random.default_rng(0).integers(-1000, 1000, (1, 8, 160, 160)).astype(np.int16)
print(ask("binary_onnx", input=features).tolist())
print(ask("multilabel_onnx", input=features).shape)
print(ask("bpr_model", input=slices, metadata=np.ones((1, 3), np.float32))[0].decode())
"""


REFUSED_BY_GRPC = """
    try:
        client.load_model(name)
    except Exception as error:
        print(error.message())"""
# HTTP without a key refuses requests that run code, or read others' memory or settings
REFUSED: list[tuple[str, bytes | None]] = [
    ("/v2/repository/index", b""),
    ("/v2/repository/models/binary_onnx/load", b"{}"),
    ("/v2/repository/models/own/load", b'{"parameters": {"config": "{}", "file:1/model.py": "YWJj"}}'),
    ("/v2/repository/models/binary_onnx/unload", b"{}"),
    ("/v2/systemsharedmemory/status", None),
    ("/v2/cudasharedmemory/status", None),
    ("/v2/trace/setting", None),
    ("/v2/logging", None),
]
ALLOWED: list[tuple[str, bytes | None]] = [
    ("/v2", None),
    ("/v2/health/live", None),
    ("/v2/health/ready", None),
    ("/v2/models/binary_onnx/config", None),
    ("/v2/models/binary_onnx/stats", None),
]
# What a model's code can do in the container
INSIDE = """grep -E '^(CapEff|CapBnd|NoNewPrivs|Uid)' /proc/1/status
for place in / /opt/tritonserver /models /usr /etc /home/triton-server /tmp; do
  if touch $place/probe 2> /dev/null; then echo writes $place; fi
done"""


def key_of(container: Any) -> str:
    return next(word.partition("=")[2] for word in container["Config"]["Env"] if word.startswith("CHEST_KEY="))


def http(port: int, path: str, body: bytes | None = None, key: str = "") -> tuple[int, bytes]:
    """Return status and body of the answer of 127.0.0.1:port."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"chest-key": key} if key else {})
    try:
        with urllib.request.urlopen(request) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def others(image: str) -> dict[str, Any]:
    """Return a Compose file such as the team's, with the client above as the adapter."""
    return {
        "name": f"{NAME}-adapter",
        "services": {
            "tritonserver": {"image": "borntowarn/porcupine-tritonserver", "networks": ["chest"]},
            "adapter": {
                "image": image, "command": ["python3", "-c", CLIENT.replace("$", "$$")], "networks": ["chest"],
                "depends_on": ["tritonserver"], "environment": {"TRITON_URL": "tritonserver:8001"},
            },
        },
        "networks": {"chest": {}},
    }  # fmt: skip


def join() -> str:
    """Return join.yml of docs/serving.md, changed to the network of this test."""
    text = (ROOT / "docs/serving.md").read_text()
    block = text[text.index("    networks:\n") : text.index("    docker compose -f")]
    return textwrap.dedent(block).replace("name: chest", f"name: {NAME}")


def docker(*words: str | Path) -> str:
    return subprocess.run(["docker", *map(str, words)], check=True, capture_output=True, text=True).stdout.strip()


def inspect(kind: str, name: str) -> Any:
    return json.loads(docker(kind, "inspect", name))[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The stand-in for NVIDIA's image; at the end it and every image built on it are removed."""
    lacking = [name for name in ("docker", "mmdebstrap", "docker-registry") if not shutil.which(name)]
    if lacking or os.geteuid():
        pytest.skip(f"needs root, and what .ci/run installs: {', '.join(lacking)}")
    name = stand_in(tmp_path_factory.mktemp("base"))
    layer = inspect("image", name)["RootFS"]["Layers"][0]
    yield name
    made = docker("images", "--quiet", "--no-trunc", "--filter=reference=chest-*")
    made += "\n" + docker("images", "--quiet", "--no-trunc", "--filter=dangling=true")
    made += "\n" + inspect("image", name)["Id"]
    newest_first = dict.fromkeys(made.split())  # remove an image after those that were built on it
    ours = [image for image in newest_first if inspect("image", image)["RootFS"]["Layers"][:1] == [layer]]
    subprocess.run(["docker", "rmi", "--force", *ours], capture_output=True)


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Names that nobody else uses in this Docker engine."""
    return {"COMPOSE_PROJECT_NAME": NAME, "NETWORK": NAME}


@dataclass
class Story:
    """What the commands of `story` printed and left behind."""

    said: dict[str, str] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)
    container: Any = None
    index: Any = None
    statuses: dict[str, int] = field(default_factory=dict)
    inside: str = ""
    bills: list[bytes] = field(default_factory=list)
    left: str = ""
    ports: list[int] = field(default_factory=list)


@pytest.fixture(scope="module")
def story(
    built: Project, base: str, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    """Run one project: image, up, load, ask; another head, make, reload, ask; image again; down."""
    project = Project(tmp_path_factory.mktemp("stack") / "project")
    shutil.copytree(built.path, project.path, symlinks=True, copy_function=shutil.copy)
    told = Story(ports=find_free_ports("127.0.0.1", 3))
    options = [f"REGISTRY={REGISTRY}", "DEVICE=cpu", f"PORTS={' '.join(map(str, told.ports))}"]

    def make(name: str, *args: str) -> None:
        told.said[name] = project.make(*args, *options, **environment)

    joining = tmp_path_factory.mktemp("adapter")
    (joining / "docker-compose.yml").write_text(json.dumps(others(base)))
    (joining / "join.yml").write_text(join())

    def ask(name: str) -> None:
        files = ("--file", joining / "docker-compose.yml", "--file", joining / "join.yml")
        told.answers[name] = docker("compose", *files, "run", "--rm", "--no-deps", "adapter").splitlines()[-3:]

    try:
        make("image", "image", f"IMAGE={IMAGE}")
        told.images["first"] = inspect("image", IMAGE)
        told.bills.append((project.path / "build/image-triton.cdx.json").read_bytes())
        for path in (project.path / REPOSITORY).rglob("*"):
            os.utime(path)
        make("image again", "image", f"IMAGE={IMAGE}")
        told.bills.append((project.path / "build/image-triton.cdx.json").read_bytes())
        make("up", "up")
        told.container = inspect("container", f"{NAME}-tritonserver-1")
        ask("first")
        make("reload unchanged", "reload")
        project.edit("convertation/models.yaml", "activation: gelu", "activation: leaky_relu")  # another binary head
        make("repository", "repository")
        make("reload", "reload")
        told.index = json.loads(http(told.ports[0], "/v2/repository/index", b"", key_of(told.container))[1])
        told.statuses = {path: http(told.ports[0], path, body)[0] for path, body in REFUSED + ALLOWED}
        told.inside = docker("exec", f"{NAME}-tritonserver-1", "sh", "-c", INSIDE)
        ask("second")
        make("up again", "up")
        make("image of the second", "image", f"IMAGE={IMAGE}")
        told.images["second"] = inspect("image", IMAGE)
        (project.path / REPOSITORY / "vit_onnx/config.pbtxt").write_text("harmed")
        told.said["harmed"] = project.fail("image", f"IMAGE={IMAGE}", *options, **environment)
        make("down", "down")
        told.left = docker("ps", "--all", "--quiet", f"--filter=name={NAME}")
        make("down again", "down")
        yield told
    finally:
        subprocess.run(["docker", "rm", "--force", f"{NAME}-tritonserver-1"], capture_output=True)
        subprocess.run(["docker", "network", "rm", NAME], capture_output=True)


# --- The image ----------------------------------------------------------------


def test_the_image_holds_the_published_files_and_says_so(story: Story, built: Project) -> None:
    config = story.images["first"]["Config"]
    files = json.loads(config["Labels"]["chest.files"])
    assert files.keys() == built.published().keys()
    inside = docker("run", "--rm", story.images["first"]["Id"], "sh", "-c", "cd /models && sha256sum $(find . -type f)")
    assert {line.split("  ./")[1]: line[:64] for line in inside.splitlines()} == files
    assert config["Labels"]["chest.weights"] == "synthetic"
    assert config["Labels"]["org.opencontainers.image.version"] == (ROOT / "VERSION").read_text().strip()
    assert config["Labels"]["org.opencontainers.image.base.name"].endswith("tritonserver:24.06-py3")
    assert "synthetic weights, 14 files" in story.said["image"]


def test_it_runs_as_nobody_in_explicit_mode_with_a_health_check(story: Story) -> None:
    config = story.images["first"]["Config"]
    assert config["User"] == "1000:1000"
    assert config["Cmd"][:2] == ["sh", "-c"]
    assert "exec tritonserver --model-repository=/models --model-control-mode=explicit" in config["Cmd"][2]
    pool = f"--pinned-memory-pool-byte-size={choose_pinned_pool(ROOT / 'convertation')}"  # as triton_server gives it
    assert pool in config["Cmd"][2] and pool in (ROOT / "docker/compose.yaml").read_text()
    assert "/v2/health/ready" in config["Healthcheck"]["Test"][1]
    assert (
        "packages of bpr_model"
        and docker(
            "run",
            "--rm",
            story.images["first"]["Id"],
            "python3",
            "-c",
            "import coloredlogs; print(coloredlogs.__version__)",
        )
        == "15.0.1"
    )  # which the base image lacks


def test_a_bill_of_materials_tells_what_is_inside_and_is_the_same_twice(story: Story, built: Project) -> None:
    first, again = story.bills
    assert first == again
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(first.decode()) is None
    bill = json.loads(first)
    assert bill["specVersion"] == "1.6" and "timestamp" not in bill["metadata"]
    parts = {part["bom-ref"]: part for part in bill["components"]}
    assert parts["base"]["name"].endswith("nvcr.io/nvidia/tritonserver") and parts["base"]["version"] == "24.06-py3"
    pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "convertation/bpr/requirements.txt").read_text(), re.MULTILINE)
    assert {part["version"] for ref, part in parts.items() if ref.startswith("pypi/")} == {pin for _, pin in pins}
    files = json.loads(story.images["first"]["Config"]["Labels"]["chest.files"])
    for model in ("vit_onnx", "binary_onnx", "multilabel_onnx", "bpr_model"):
        part = parts[f"model/{model}"]
        held = {file["name"]: file["hashes"][0]["content"] for file in part["components"]}
        assert held == {path: sha for path, sha in files.items() if path.startswith(f"{model}/")}
        weights = "1/weights/model.onnx" if model == "bpr_model" else "1/model.onnx"
        assert part["hashes"] == [{"alg": "SHA-256", "content": files[f"{model}/{weights}"]}]
        assert part["licenses"] == [{"license": {"name": "none: seeded numbers"}}]
        told = [(one["name"], one["value"].split(" sha256:")[0]) for one in part["properties"]]
        assert ("chest:weights", "synthetic") in told
        assert next(value for name, value in told if name == "chest:origin").startswith("build/synthetic/")


def test_the_image_names_the_digest_that_was_signed(
    project: Project, base: str, signing: Path, keys: Path, story: Story
) -> None:
    assert "chest.signed" not in story.images["first"]["Config"]["Labels"]
    image = ("image", f"IMAGE={IMAGE}-signed", f"REGISTRY={REGISTRY}")
    digest = project.make("sign", f"KEY={keys}/key.pem").split()[-1]
    project.make(*image)
    assert inspect("image", f"{IMAGE}-signed")["Config"]["Labels"]["chest.signed"] == digest
    assert "up to date" in project.make(*image)
    bundle = project.path / f"{REPOSITORY}.sig"
    signed = json.loads(bundle.read_text())
    statement = base64.b64decode(signed["dsseEnvelope"]["payload"]).replace(b"vit_onnx", b"vit_oxxx")
    bundle.write_text(json.dumps(signed | {"dsseEnvelope": {"payload": base64.b64encode(statement).decode()}}))
    said = project.make(*image)
    assert f"{REPOSITORY}.sig signs other files, so the image does not name it; make sign KEY=key.pem" in said


def test_nothing_is_rebuilt_because_files_are_newer(story: Story) -> None:
    assert f"{IMAGE} is up to date: 14 files of {REPOSITORY}, nothing rebuilt" in story.said["image again"]


def test_another_head_changes_the_last_layer_alone(story: Story) -> None:
    before, after = (story.images[name]["RootFS"]["Layers"] for name in ("first", "second"))
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]
    sizes = docker("history", "--no-trunc", "--human=false", "--format={{.Size}} {{.CreatedBy}}", IMAGE).splitlines()
    heads, bpr, vit = (int(line.split()[0]) for line in sizes if "ADD" in line)
    assert heads < bpr < vit


def test_no_image_is_made_of_what_the_records_do_not_vouch_for(story: Story) -> None:
    assert f"{REPOSITORY}/vit_onnx/config.pbtxt is not what the verdict was passed on" in story.said["harmed"]


def test_the_models_layers_are_the_same_without_a_cache_and_with_buildkit(
    story: Story, built: Project, base: str
) -> None:
    """Debian's Docker client contains BuildKit; newer clients use buildx by default."""
    project, tag = built, f"{NAME}:synthetic-buildkit"
    clients = [path for path in ("/usr/bin/docker",) if Path(path).exists()]
    assert clients, "expected Debian's docker.io"
    project.make(
        "image", f"IMAGE={tag}", f"REGISTRY={REGISTRY}", DOCKER_BUILDKIT="1", PATH=f"/usr/bin:{os.environ['PATH']}"
    )
    assert inspect("image", tag)["RootFS"]["Layers"][-3:] == story.images["first"]["RootFS"]["Layers"][-3:]


def test_a_token_of_pips_reaches_the_index_and_stays_in_no_layer(
    project: Project, base: str, story: Story, tmp_path: Path
) -> None:
    seen: list[str] = []

    class Index(http_server.BaseHTTPRequestHandler):
        """An empty package index that demands a password."""

        def do_GET(self) -> None:
            seen.append(base64.b64decode(self.headers.get("Authorization", "").partition(" ")[2]).decode())
            self.send_response(404 if seen[-1] else 401)
            self.end_headers()

    gateway = docker("network", "inspect", "bridge", "--format={{(index .IPAM.Config 0).Gateway}}")
    tag = f"{NAME}:synthetic-secret"
    with http_server.ThreadingHTTPServer((gateway, 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://someone:token-7f3a@{gateway}:{server.server_port}/simple"
        project.make(
            "image", f"IMAGE={tag}", f"REGISTRY={REGISTRY}", PIP_EXTRA_INDEX_URL=address, PIP_TRUSTED_HOST=gateway,
            PATH=f"/usr/bin:{os.environ['PATH']}",
        )  # fmt: skip
        server.shutdown()
    assert "someone:token-7f3a" in seen
    subprocess.run(["docker", "save", "--output", tmp_path / "image.tar", tag], check=True)
    for part in (tmp_path / "image.tar").read_bytes(), docker("history", "--no-trunc", tag).encode():
        assert b"token-7f3a" not in part
    docker("rmi", tag)


@pytest.mark.parametrize("change", ["gone", "more", "half"])
def test_half_a_repository_makes_no_image(project: Project, base: str, change: str) -> None:
    top = project.path / REPOSITORY
    if change == "gone":
        shutil.rmtree(top / "multilabel_onnx")
    elif change == "more":
        shutil.copytree(top / "multilabel_onnx", top / "other_onnx")
    else:
        (top / "binary_onnx/1/model.onnx").unlink()
    said = project.fail("image", f"IMAGE={IMAGE}-{change}", f"REGISTRY={REGISTRY}")
    assert "no image is made of it; make repository" in said
    assert docker("images", "--quiet", f"{IMAGE}-{change}") == ""


def test_a_moved_tag_is_told_and_needs_consent(project: Project, tmp_path: Path) -> None:
    """The base image is empty, so each build on it fails; but its id is compared before."""
    name = f"{NAME}-moved:1"
    (tmp_path / "first.tar").write_bytes(bytes(10240))
    subprocess.run(["tar", "-cf", tmp_path / "second.tar", "-C", tmp_path, "first.tar"], check=True)
    image = ("image", "TARGET=inference", f"BASE={name}")
    docker("import", tmp_path / "first.tar", name)
    try:
        locked = inspect("image", name)["Id"]
        assert "see Docker's message above" in project.fail(*image)
        assert json.loads((project.path / "docker/images.lock.json").read_text())[name]["id"] == locked
        docker("import", tmp_path / "second.tar", name)
        moved = inspect("image", name)["Id"]
        said = project.fail(*image)
        assert f"{name} is another image than the locked one: expected {locked}, got {moved}" in said
        assert "see Docker's message" not in said
        assert "see Docker's message above" in project.fail(*image, "ACCEPT=1")
        assert "see Docker's message above" in project.fail(*image)
    finally:
        subprocess.run(["docker", "rmi", "--force", name, locked], capture_output=True)


@pytest.mark.parametrize("version", ["", ":1"])
def test_a_synthetic_image_is_tagged_as_one(stand_ins: Project, version: str) -> None:
    said = stand_ins.fail("image", f"IMAGE=registry.example:5000/chest{version}")
    assert "the tag of a synthetic image must say so: IMAGE=registry.example:5000/chest:synthetic\n" in said


# --- The stack ----------------------------------------------------------------


def test_up_ends_when_the_container_is_healthy(story: Story) -> None:
    assert story.container["State"]["Health"]["Status"] == "healthy"
    http, grpc, metrics = story.ports
    assert f"HTTP 127.0.0.1:{http}, gRPC 127.0.0.1:{grpc}, metrics 127.0.0.1:{metrics}\n" in story.said["up"]
    assert "the weights are synthetic, so the answers are nonsense" in story.said["up"]


def test_the_container_is_what_the_team_joins(story: Story) -> None:
    networks = story.container["NetworkSettings"]["Networks"]
    assert list(networks) == [NAME] and "tritonserver" in networks[NAME]["Aliases"]
    assert f"in the network {NAME} its address is tritonserver:8001; a client loads" in story.said["up"]
    assert story.container["HostConfig"]["ShmSize"] == 2 << 30
    assert story.container["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    (mount,) = story.container["Mounts"]
    assert (mount["Destination"], mount["RW"]) == ("/models", False)


def test_http_without_its_key_answers_and_neither_loads_nor_tells_settings(story: Story) -> None:
    assert {path: story.statuses[path] for path, _ in REFUSED} == dict.fromkeys([path for path, _ in REFUSED], 403)
    assert {path: story.statuses[path] for path, _ in ALLOWED} == dict.fromkeys([path for path, _ in ALLOWED], 200)


def test_the_container_has_no_rights_and_writes_nowhere_but_in_tmp(story: Story) -> None:
    status, _, places = story.inside.partition("\nwrites")
    assert dict(line.split()[:2] for line in status.splitlines()) == {
        "CapEff:": "0" * 16, "CapBnd:": "0" * 16, "NoNewPrivs:": "1", "Uid:": "1000",
    }  # fmt: skip
    assert places.split() == ["/tmp"]
    limits = story.container["HostConfig"]
    assert (limits["ReadonlyRootfs"], limits["PidsLimit"], limits["Memory"]) == (True, 4096, 16 << 30)


def test_a_client_on_the_network_loads_and_asks_every_model(story: Story) -> None:
    answer, shape, tag = story.answers["first"]
    assert len(json.loads(answer)[0]) == 2
    assert shape == "(1, 20)"
    assert re.fullmatch(r"[A-Z-]+", tag)


def test_reload_takes_the_head_that_changed_and_leaves_the_rest(story: Story) -> None:
    assert "binary_onnx: unchanged, READY" in story.said["reload unchanged"]
    assert re.search(r"^binary_onnx: READY, loaded in [\d.]+ s$", story.said["reload"], re.MULTILINE)
    for model in ("bpr_model", "multilabel_onnx", "vit_onnx"):
        assert f"{model}: unchanged, READY" in story.said["reload"]
    assert {model["state"] for model in story.index} == {"READY"}
    assert story.answers["first"][0] != story.answers["second"][0]
    assert story.answers["first"][1:] == story.answers["second"][1:]


def test_up_of_what_runs_leaves_it_running(story: Story) -> None:
    assert "Running" in story.said["up again"] and "Recreated" not in story.said["up again"]


def test_down_leaves_nothing(story: Story) -> None:
    assert story.left == ""
    assert "Error" not in story.said["down again"]


def test_a_ready_image_serves_its_own_models(story: Story, project: Project, environment: dict[str, str]) -> None:
    ports = find_free_ports("127.0.0.1", 3)
    try:
        said = project.make("up", f"IMAGE={IMAGE}", "DEVICE=cpu", f"PORTS={' '.join(map(str, ports))}", **environment)
        assert "a client loads and asks binary_onnx, bpr_model, multilabel_onnx, vit_onnx" in said
        assert "tritonserver serves the models of its image" in project.fail("reload", **environment)
        with project.start("logs", **environment) as following:
            assert following.stdout
            line = next(line for line in following.stdout if "Started HTTPService" in line)
            docker("rm", "--force", f"{NAME}-tritonserver-1")  # which ends the log
            following.communicate(timeout=PATIENCE)
        assert "0.0.0.0:8000" in line
    finally:
        project.make("down", **environment)


def test_with_lock_and_without_a_port_models_are_loaded_and_grpc_loads_none(
    story: Story, project: Project, base: str, environment: dict[str, str]
) -> None:
    options = [f"REGISTRY={REGISTRY}", "DEVICE=cpu", "LOCK=1", "ADDRESS=none"]
    asked = CLIENT.replace("client.load_model(name)", REFUSED_BY_GRPC, 1)
    try:
        said = project.make("up", *options, **environment)
        assert "is ready: no port on this machine\n" in said and "a client can ask binary_onnx, bpr_model" in said
        assert docker("port", f"{NAME}-tritonserver-1") == ""
        client = (
            "run",
            "--rm",
            f"--network={NAME}",
            "--env=TRITON_URL=tritonserver:8001",
            base,
            "python3",
            "-c",
            asked,
        )
        answered = docker(*client).splitlines()
        assert answered[:4] == ["This protocol is restricted, expecting header 'triton-grpc-protocol-chest-key'"] * 4
        assert answered[5] == "(1, 20)"
        assert "binary_onnx: unchanged, READY" in project.make("reload", **environment)
        project.edit("convertation/models.yaml", "activation: gelu", "activation: leaky_relu")  # another binary head
        project.make("repository")
        assert "binary_onnx: READY, loaded in" in project.make("reload", **environment)
        assert docker(*client).splitlines()[4] != answered[4]
    finally:
        project.make("down", **environment)


def test_verify_asks_the_triton_of_an_image(project: Project, base: str) -> None:
    """The base image lacks bpr_model's requirements, so they are installed first."""
    said = project.make("verify", f"IMAGE={base}")
    assert re.search(r"^bpr_model: READY, differs by 0.0e\+00", said, re.MULTILINE)


def test_code_of_others_in_a_container_has_no_network_and_writes_nothing(base: str, tmp_path: Path) -> None:
    folder = bpr(tmp_path / "repository")
    (folder / "1/helper.py").write_text(
        "import os, socket\nTAG = ''\n"
        "for name, attempt in {\n"
        "    'connects': lambda: socket.create_connection(('172.17.0.1', 22), 2),\n"
        f"    'writes': lambda: open({str(tmp_path)!r} + '/repository/bpr_model/1/mark', 'w'),\n"
        "    'writes to the image': lambda: open('/opt/mark', 'w'),\n"
        "    'becomes root': lambda: os.chown('/tmp', 1, 1),\n"
        "}.items():\n"
        "    try:\n        attempt()\n        TAG += f'{name};'\n"
        "    except OSError as error:\n        TAG += f'{type(error).__name__};'\n"
        "TAG += ','.join(sorted(os.listdir('/sys/class/net')))\n"
    )
    with triton_server(tmp_path / "repository", tmp_path / "log", image=base, foreign=True) as server:
        client = grpc.InferenceServerClient(server.grpc, channel_args=CHANNEL)
        request = {"input": np.zeros((1, 300, 300, 300), np.int16), "metadata": np.ones((1, 3), np.float32)}  # 54 MB
        answer = client.infer("bpr_model", [make_input(name, array) for name, array in request.items()])
        client.close()
    assert answer.as_numpy("output")[0].decode() == "OSError;OSError;OSError;PermissionError;lo"
    assert docker("ps", "--all", "--quiet", f"--filter=ancestor={base}") == ""


# --- Pushing ------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """host:port of a registry that runs here, and the folder of its files."""
    (port,) = find_free_ports("127.0.0.1", 1)
    config = tmp_path / "registry.yml"
    storage = {"filesystem": {"rootdirectory": f"{tmp_path}/registry"}}
    config.write_text(json.dumps({"version": 0.1, "storage": storage, "http": {"addr": f"127.0.0.1:{port}"}}))
    process = subprocess.Popen(
        ["docker-registry", "serve", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/")
            break
        except OSError:
            time.sleep(0.1)
    yield f"localhost:{port}", tmp_path / "registry"
    process.terminate()
    process.wait()
    pushed = docker("images", "--quiet", f"--filter=reference=localhost:{port}/*")
    subprocess.run(["docker", "rmi", "--force", *pushed.split()], capture_output=True)


def as_real(image: str, tag: str, scratch: Path) -> None:
    """Make an image with the label of real weights, from the models' layers of `image` alone."""
    subprocess.run(f"docker save {image} | tar x -C {scratch}", shell=True, check=True)
    manifest = json.loads((scratch / "manifest.json").read_text())[0]
    context = scratch / "context"
    context.mkdir()
    for number, layer in enumerate(manifest["Layers"][-3:]):
        shutil.move(scratch / layer, context / f"{number}.tar")
    (context / "Dockerfile").write_text("FROM scratch\n" + "".join(f"ADD {n}.tar /\n" for n in range(3)))
    docker("build", f"--tag={tag}", "--label=chest.weights=real", context)


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_push_of_another_head_moves_that_layer_alone(
    story: Story, stand_ins: Project, registry: tuple[str, Path], tmp_path: Path
) -> None:
    address, folder = registry
    moved = []
    for number, name in enumerate(("first", "second"), 1):
        (scratch := tmp_path / name).mkdir()
        before = stored(folder) if folder.exists() else 0
        as_real(story.images[name]["Id"], image := f"{address}/{NAME}:{number}", scratch)
        refused = stand_ins.fail("push", f"IMAGE={image}")
        assert "CC BY-NC-SA 4.0" in refused and f"make push IMAGE={image} ACCEPT=licences" in refused
        assert (stored(folder) if folder.exists() else 0) == before
        stand_ins.make("push", f"IMAGE={image}", "ACCEPT=licences")
        moved.append(stored(folder) - before)
    assert moved[0] > 500_000 > 50_000 > moved[1], moved


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("", "no image is named; make push IMAGE=registry.example/chest-ct-triton:1"),
        (f"{NAME}:absent", f"{NAME}:absent does not exist here; make image IMAGE={NAME}:absent"),
        (IMAGE, f"{IMAGE} holds synthetic weights, which answer nonsense; not pushed"),
        ("base", "was not made by `make image`, so its content is unknown; not pushed"),
    ],
)
def test_what_is_not_pushed(story: Story, base: str, stand_ins: Project, image: str, expected: str) -> None:
    assert expected in stand_ins.fail("push", f"IMAGE={base if image == 'base' else image}", "ACCEPT=licences")


# --- The Compose files --------------------------------------------------------


def composed(*files: str, **environment: str) -> Any:
    """Return Compose's result for docker/FILES."""
    words = [word for file in files for word in ("--file", str(ROOT / "docker" / file))]
    command = ["docker", "compose", *words, "config", "--format=json"]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_gpu_is_reserved_unless_the_cpu_is_chosen() -> None:
    service = composed("compose.yaml")["services"]["tritonserver"]
    assert service["deploy"]["resources"]["reservations"]["devices"] == [
        {"capabilities": ["gpu"], "count": 1, "driver": "nvidia"}
    ]
    on_cpu = composed("compose.yaml", "compose.cpu.yaml")["services"]["tritonserver"]
    assert on_cpu == {key: value for key, value in service.items() if key != "deploy"}


def test_compose_alone_runs_a_ready_image() -> None:
    whole = composed("compose.yaml", IMAGE="registry.example/chest:1")
    service = whole["services"]["tritonserver"]
    assert whole["name"] == "chest"
    assert whole["networks"]["chest"]["name"] == "chest"
    assert service["image"] == "registry.example/chest:1"
    assert service["shm_size"] == str(2 << 30)
    ports = {(port["host_ip"], port["published"], port["target"]) for port in service["ports"]}
    assert ports == {("127.0.0.1", str(port), port) for port in (8000, 8001, 8002)}


def test_the_image_runs_what_compose_runs() -> None:
    """Without Make and Compose the same requests are closed; CHEST_KEY and LOCK are read inside the container."""
    service = composed("compose.yaml")["services"]["tritonserver"]
    lines = (ROOT / "docker/triton.Dockerfile").read_text().replace("\\\n", "").splitlines()
    (command,) = (line for line in lines if line.startswith("CMD ["))
    assert json.loads(command.removeprefix("CMD "))[2] == service["command"][2].replace("$$", "$")
    text = service["command"][2]
    assert f"--http-restricted-api=model-repository,{LOCKED}:" in text
    assert f":+model-repository,}}{LOCKED}:" in text and f"key={KEY_HEADER}=" in text


def test_an_image_of_others_runs_with_as_few_rights() -> None:
    service = composed("compose.yaml", IMAGE="borntowarn/porcupine-tritonserver")["services"]["tritonserver"]
    assert (service["user"], service["cap_drop"], service["read_only"]) == ("1000:1000", ["ALL"], True)
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "ports" not in composed("compose.yaml", "compose.private.yaml")["services"]["tritonserver"]


def test_the_repository_is_mounted_over_the_models() -> None:
    service = composed("compose.yaml", "compose.repository.yaml", REPOSITORY="/srv/models")["services"]["tritonserver"]
    (volume,) = service["volumes"]
    assert (volume["source"], volume["target"], volume["read_only"]) == ("/srv/models", "/models", True)


# --- What is not as it should be ----------------------------------------------


def test_without_an_nvidia_runtime_the_cpu_is_offered(
    story: Story, project: Project, environment: dict[str, str]
) -> None:
    if "nvidia" in docker("info", "--format={{json .Runtimes}}"):
        pytest.skip("an NVIDIA runtime is here, the opposite of no GPU")
    ports = " ".join(map(str, find_free_ports("127.0.0.1", 3)))
    said = project.fail("up", f"REGISTRY={REGISTRY}", f"PORTS={ports}", **environment)
    assert 'Docker cannot give a GPU: could not select device driver "nvidia" with capabilities: [[gpu]]\n' in said
    assert "on the CPU: make up DEVICE=cpu" in said
    assert docker("ps", "--all", "--quiet", f"--filter=name={NAME}") == ""


def test_a_taken_port_is_named(story: Story, project: Project, environment: dict[str, str]) -> None:
    free = find_free_ports("127.0.0.1", 2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = project.fail(
            "up", f"REGISTRY={REGISTRY}", "DEVICE=cpu", f"PORTS={free[0]} {port} {free[1]}", **environment
        )
    assert f"\n127.0.0.1:{port} is taken; stop what listens there" in said
    assert docker("ps", "--all", "--quiet", f"--filter=name={NAME}") == ""


def test_nothing_to_run_and_nothing_that_runs(stand_ins: Project, environment: dict[str, str]) -> None:
    for target in ("reload", "logs"):
        assert "no tritonserver runs here; make up" in stand_ins.fail(target, **environment)
    assert "empty: no models there; make repository" in stand_ins.fail("up", "REPOSITORY=empty", **environment)
    assert "PORTS=8000: expected three" in stand_ins.fail("up", "PORTS=8000", **environment)


@pytest.mark.parametrize("target", ["image", "push", "up", "reload", "logs", "down"])
def test_no_docker_is_one_sentence(stand_ins: Project, tmp_path: Path, target: str) -> None:
    for name in ("make", "bash", "sh", "awk", "python3", "env", "sed", "dirname", "realpath"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    said = stand_ins.fail(target, "IMAGE=chest:synthetic", PATH=str(tmp_path))
    assert "docker is not installed; on Debian and Ubuntu: sudo apt install docker.io\n" in said


@pytest.mark.parametrize("target", ["image", "push", "up", "reload", "logs", "down"])
def test_an_engine_that_does_not_run_is_one_sentence(stand_ins: Project, tmp_path: Path, target: str) -> None:
    host = f"unix://{tmp_path}/absent.sock"
    said = stand_ins.fail(target, "IMAGE=chest:synthetic", DOCKER_HOST=host)
    assert f"the Docker engine does not answer at {host}; sudo systemctl start docker\n" in said


def test_no_permission_on_the_socket_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path := f"/tmp/{NAME}-{os.getpid()}.sock")
        Path(path).chmod(0)
        code = (
            "import os; from scripts.deploy.docker_engine import run_docker; "
            "os.setgid(65534); os.setuid(65534); run_docker('version')"
        )
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"DOCKER_HOST": f"unix://{path}", "DOCKER_CONFIG": "/"},
        )  # fmt: skip
        Path(path).unlink()
    assert (
        run.stderr
        == f"no permission on Docker's socket unix://{path}; sudo usermod -aG docker $USER, and log in again\n"
    )


def test_an_old_compose_is_refused(stand_ins: Project, tmp_path: Path) -> None:
    for name, script in (("docker", "[ $1 = version ]"), ("docker-compose", "echo 1.29.2")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    said = stand_ins.fail("up", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "Docker Compose 2.24 or newer is needed, 1.29.2 is here; apt install" in said
