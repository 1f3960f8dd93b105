"""The real Triton's verdict on small models, over gRPC."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tritonclient import grpc

from scripts.serve import ports_and_memory, server_in_docker
from scripts.serve import verdict as judge
from scripts.serve.model_config import BYTES
from scripts.serve.ports_and_memory import choose_pinned_pool, estimate_shared_memory, find_free_ports
from scripts.serve.server_in_docker import make_docker_command
from scripts.serve.server_options import STRICT
from scripts.serve.server_process import read_last_words
from scripts.serve.triton_client import make_input
from scripts.serve.triton_server import Server, triton_server
from scripts.serve.verdict import compare_answers, pass_verdict, stage_files
from tests.triton_models import CONFIG, FEATURES, WEIGHT, answers, bpr, head, linear, tag

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-triton"
PATIENCE = 120  # seconds; most waits take a few


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_VENV", str(VENV))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a proxy that answers nobody
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One ONNX and one Python model; tmp_path/build holds the answers that are expected of them."""
    root = tmp_path / "repository"
    head(root)
    bpr(root)
    answers(tmp_path / "build")
    tag(tmp_path / "build")
    return root


def judged(root: Path, **options: Any) -> dict[str, Any]:
    build = root.parent / "build"
    return pass_verdict(root, build / "checks", build / "models", build / "triton.log", **options)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run scripts/serve/verdict.py as a program."""
    words = [sys.executable, "-m", "scripts.serve.verdict", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def folders(build: Path) -> list[object]:
    return ["--checks", build / "checks", "--models", build / "models", "--log", build / "log"]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def processes(repository: Path) -> list[int]:
    """Return the processes of a repository's servers and their stubs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if str(repository).encode() in words and b"triton" in words.split(b"\0")[0]:
            found.append(int(path.parent.name))
    return found


def regions() -> set[str]:
    """Return the servers' regions of shared memory that no process has open; running tests have their own open."""
    used: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # the process has ended
            used |= set(re.findall(r"/dev/shm/(triton-\S+)", maps.read_text()))
    return {path.name for path in Path("/dev/shm").glob("triton-*")} - used


# --- Good ---------------------------------------------------------------------


def test_a_good_repository_is_ready_and_right(repository: Path) -> None:
    before, shared = sorted(repository.rglob("*")), regions()
    result = judged(repository)
    assert result["server"] == "tritonserver 2.47.0"
    assert list(result["models"]) == ["binary_onnx", "bpr_model"]
    binary, tagger = result["models"].values()
    assert (binary["state"], tagger["state"]) == ("READY", "READY")
    assert 0 <= binary["difference"] < 1e-5
    assert 0 <= binary["relative"] < 1e-5
    assert tagger["difference"] == 0
    assert binary["latency_ms"] > 0
    assert sorted(result["files"]) == [
        "binary_onnx/1/model.onnx", "binary_onnx/config.pbtxt",
        "bpr_model/1/helper.py", "bpr_model/1/model.py", "bpr_model/config.pbtxt",
    ]  # fmt: skip
    assert all(len(digest) == 64 for digest in result["files"].values())
    assert sorted(repository.rglob("*")) == before  # no __pycache__
    assert processes(repository) == []
    assert regions() == shared


def test_the_command_judges_links_to_the_sources(repository: Path) -> None:
    build = repository.parent / "build"
    files = [path for path in sorted(repository.rglob("*")) if path.is_file()]
    contents = [f"{path.relative_to(repository)}={path}" for path in files]
    for _ in range(2):  # the second run finds the staging folder of the first
        run = command(*folders(build), "--staging", build / "staging", *contents, build / "verdict.json")
        assert (run.returncode, run.stderr) == (0, "")
    said = [
        line.split(",")[0] for line in run.stdout.splitlines() if not line.startswith("  ")
    ]  # without progress lines
    assert said == ["binary_onnx: READY", "bpr_model: READY"]
    result = json.loads((build / "verdict.json").read_text())
    assert len(result["files"]) == len(files)
    links = [path for path in (build / "staging").rglob("*") if not path.is_dir()]
    assert all(path.is_symlink() for path in links)
    assert not list(repository.rglob("__pycache__")) + list((build / "staging").rglob("__pycache__"))


def test_a_published_repository_is_judged_where_it_lies(repository: Path) -> None:
    build = repository.parent / "build"
    run = command("--repository", repository, *folders(build), build / "verify.json")
    assert run.returncode == 0, run.stderr
    assert json.loads((build / "verify.json").read_text())["models"]["bpr_model"]["state"] == "READY"


# --- Bad ----------------------------------------------------------------------


def test_a_model_that_answers_otherwise_is_refused(repository: Path) -> None:
    answers(repository.parent / "build", shift=1e-3)
    with pytest.raises(
        SystemExit, match=r"binary_onnx: 3 of 3 values beyond the tolerance, the first at \(0, 0\): expected"
    ):
        judged(repository)
    assert processes(repository) == []


def test_a_wrong_tag_is_refused(repository: Path) -> None:
    tag(repository.parent / "build", "NECK")
    with pytest.raises(SystemExit, match=r"bpr_model: expected \['NECK'\], answered \['CHEST'\]"):
        judged(repository)


def test_a_precision_is_judged_by_its_own_check_and_a_gpu_by_what_it_may_differ(tmp_path: Path) -> None:
    for name, allowed in (("vit", 1), ("vit.tf32", 2), ("binary", 3)):
        answer = {"output": [[0.0]], "allowed": allowed, "allowed_gpu": 10 * allowed, "flips": [[]]}
        (tmp_path / f"{name}.json").write_text(json.dumps({"served": [answer]}))
    (tmp_path / "vit.plan.json").write_text(json.dumps({"served": [{"output": [[0.0]], "allowed": 7}]}))

    def allowed_to(model: str, variants: list[str], gpu: bool = False, pattern: str | None = None) -> float:
        (answer,) = judge.find_expected(tmp_path, pattern, model, variants, gpu=gpu)["served"]
        found: float = answer["allowed"]
        return found

    assert [
        allowed_to("vit_onnx", []),
        allowed_to("vit_trt", ["vit.tf32"]),
        allowed_to("binary_onnx", ["vit.tf32"]),
    ] == [1, 2, 3]
    assert [allowed_to("vit_onnx", ["vit.tf32"], gpu=True), allowed_to("binary_onnx", [], gpu=True)] == [20, 30]
    assert allowed_to("vit_onnx", [], gpu=True, pattern=f"{tmp_path}/{{}}.plan.json") == 7
    tagged = {"output": ["CHEST"]}
    (tmp_path / "bpr.json").write_text(json.dumps({"served": [tagged]}))
    assert judge.find_expected(tmp_path, None, "bpr_model", gpu=True)["served"] == [tagged]
    with pytest.raises(SystemExit, match=r"vit\.fp16\.json: no such file, but vit_onnx is judged by it"):
        allowed_to("vit_onnx", ["vit.fp16"])


@pytest.mark.parametrize(
    ("device", "gpus", "expected"), [(False, "", False), (True, "", True), (False, "--gpus 1", True)]
)
def test_a_server_in_docker_has_the_gpu_that_is_here_or_that_it_is_told_of(
    device: bool, gpus: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_in_docker.Path, "exists", lambda path: device and str(path) == "/dev/nvidiactl")
    monkeypatch.setenv("DOCKER_GPUS", gpus)
    assert server_in_docker.has_gpu() is expected


def test_nan_is_no_answer() -> None:
    answer = {"output": [[1.0, 2.0]], "allowed": 0.1}
    with pytest.raises(SystemExit, match="1 of 2 values beyond the tolerance"):
        compare_answers("m", answer, np.array([[1.0, np.nan]], np.float32))
    with pytest.raises(SystemExit, match=r"expected an answer of shape \(1, 2\), found \(2,\)"):
        compare_answers("m", answer, np.array([1.0, 2.0], np.float32))


def test_a_near_tie_that_fell_the_other_way_is_explained_and_everything_else_is_strict() -> None:
    chance = np.random.default_rng(0)
    flips = chance.normal(size=(40, 64))
    answer = {"output": [[0.0] * 64], "allowed": 1e-3, "flips": [flips.tolist()]}
    turned = (flips[3] + flips[17])[None]
    assert compare_answers("m", answer, turned + 1e-4) == (pytest.approx(1e-4), 2)
    for wrong in (1.1 * turned, turned + 2e-3, chance.normal(size=(1, 64)), turned * np.nan):
        with pytest.raises(SystemExit, match="values beyond the tolerance"):
            compare_answers("m", answer, wrong)


def test_a_token_falls_the_other_way_once_and_nothing_wider_is_forgiven() -> None:
    chance = np.random.default_rng(0)
    ties = [chance.normal(size=(2, 64)).tolist() for _ in range(3)]  # three tokens with two other rows each
    answer = {"output": [[0.0] * 64], "allowed": 1e-3, "flips": [ties]}
    one, other = np.array(ties[0])
    assert compare_answers("m", answer, one[None]) == (pytest.approx(0), 1)
    assert compare_answers("m", answer, (other + ties[1][0])[None]) == (pytest.approx(0), 2)
    for wrong in (2 * one, one + other):  # the same token twice
        with pytest.raises(SystemExit, match="values beyond the tolerance"):
            compare_answers("m", answer, wrong[None])


def test_findings_of_the_offline_check_stop_it_before_a_server_starts(repository: Path) -> None:
    (repository / "binary_onnx/1/model.onnx").unlink()
    with pytest.raises(SystemExit, match=r"expected a file, found nothing\n.*1 findings; nothing was served"):
        judged(repository)
    assert not (repository.parent / "build/triton.log").exists()


def test_a_model_that_does_not_load_is_named_with_the_reason(repository: Path) -> None:
    (repository / "bpr_model/1/helper.py").write_text(
        "import importlib\n\nTAG = importlib.import_module('surely_not_installed')\n"
    )
    with pytest.raises(
        SystemExit, match=r"ended with status 1 before it was ready:\n(.|\n)*surely_not_installed"
    ) as error:
        judged(repository)
    assert "bpr_model" in str(error.value)
    assert str(repository.parent / "build/triton.log") in str(error.value)
    assert len(str(error.value).splitlines()) <= 6


def test_a_model_that_cannot_answer_is_named_with_the_reason(repository: Path) -> None:
    model = repository / "bpr_model/1/model.py"
    model.write_text(
        model.read_text().replace(
            "        tensor =", "        if requests:\n            raise ValueError('no slices')\n        tensor ="
        )
    )
    with pytest.raises(SystemExit, match=r"bpr_model: Triton says: .*no slices"):
        judged(repository)


def test_a_model_without_expected_answers_is_an_error(repository: Path) -> None:
    (repository.parent / "build/checks/binary.json").unlink()
    with pytest.raises(
        SystemExit, match=r"binary\.json: no such file, but binary_onnx is judged by it; make it with: make"
    ):
        judged(repository)


def test_a_plan_needs_an_image(repository: Path) -> None:
    folder = repository / "binary_onnx"
    (folder / "config.pbtxt").write_text(CONFIG.replace('backend: "onnxruntime"', 'platform: "tensorrt_plan"'))
    (folder / "1/model.onnx").unlink()
    (folder / "1/model.plan").write_bytes(b"ftrt" + bytes(100))
    with pytest.raises(SystemExit, match="binary_onnx: only an image with a GPU serves a TensorRT plan"):
        judged(repository)


def test_a_server_that_dies_is_told_from_one_that_answers_wrongly(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(server: Server, *rest: Any) -> dict[str, Any]:
        server.process.kill()
        return ask(server, *rest)

    ask = judge.ask_model
    monkeypatch.setattr(judge, "ask_model", dying)
    with pytest.raises(SystemExit, match=r"binary_onnx: tritonserver was killed by SIGKILL\n"):
        judged(repository)
    assert processes(repository) == []


def test_a_server_that_never_gets_ready_is_stopped(repository: Path) -> None:
    (repository / "bpr_model/1/helper.py").write_text("import time\ntime.sleep(10000)\nTAG = 1\n")
    with pytest.raises(SystemExit, match="tritonserver was not ready within 2 s, so it was stopped:\n"):
        judged(repository, timeout=2)
    assert processes(repository) == []


def test_files_that_change_meanwhile_are_not_judged(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changing(server: Server, name: str, *rest: Any) -> dict[str, Any]:
        os.utime(repository / "bpr_model/config.pbtxt")
        return ask(server, name, *rest)

    ask = judge.ask_model
    monkeypatch.setattr(judge, "ask_model", changing)
    with pytest.raises(SystemExit, match="its files changed while they were judged"):
        judged(repository)


def test_nothing_is_written_when_the_verdict_is_bad(repository: Path) -> None:
    build = repository.parent / "build"
    answers(build, shift=1.0)
    run = command("--repository", repository, *folders(build), build / "out.json")
    assert run.returncode == 1
    assert run.stderr.startswith("binary_onnx: 3 of 3 values beyond the tolerance")
    assert "Traceback" not in run.stderr
    assert not (build / "out.json").exists()


# --- Staging ------------------------------------------------------------------


def test_staging_is_made_anew(tmp_path: Path) -> None:
    source = tmp_path / "a.onnx"
    source.write_text("a")
    stage_files([f"m_onnx/1/model.onnx={source}", f"m_onnx/config.pbtxt={source}"], tmp_path / "staging")
    stage_files([f"m_onnx/1/model.onnx={source}"], tmp_path / "staging")
    links = {path: path.readlink() for path in (tmp_path / "staging").rglob("*") if not path.is_dir()}
    assert links == {tmp_path / "staging/m_onnx/1/model.onnx": source}


@pytest.mark.parametrize("other", ["file", "folder/file", "link"])
def test_staging_clears_nothing_that_it_did_not_make(tmp_path: Path, other: str) -> None:
    staging = tmp_path / "staging"
    (staging / "folder").mkdir(parents=True)
    if other == "link":
        (staging / "link").symlink_to(tmp_path)
    else:
        (staging / other).write_text("mine")
    with pytest.raises(SystemExit, match=rf"staging/{other}: no link of an earlier staging"):
        stage_files([], staging)
    assert os.path.lexists(staging / other)


@pytest.mark.parametrize("item", ["model.onnx", "/etc/model.onnx=a", "../model.onnx=a"])
def test_staging_takes_pairs_inside_the_folder(tmp_path: Path, item: str) -> None:
    with pytest.raises(SystemExit, match="expected FILE=SOURCE"):
        stage_files([item], tmp_path / "staging")


def test_staging_names_a_source_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"vit\.onnx: no such file, expected for m/1/model\.onnx; make it with: make"):
        stage_files([f"m/1/model.onnx={tmp_path}/vit.onnx"], tmp_path / "staging")


# --- The stand-in backend, in a server of its own ------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Any]]:
    """Two ONNX models: one that joins requests, one without a batch dimension and with two outputs."""
    root = tmp_path_factory.mktemp("served") / "repository"
    head(root)
    model = linear()
    model.graph.node.append(onnx.helper.make_node("Relu", ["output"], ["relu"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("relu", onnx.TensorProto.FLOAT, ["N", 3]))
    config = CONFIG.replace("size: 8", "size: 0").replace("[8]", "[-1, 8]").replace("[3]", "[-1, 3]")
    config = config.replace("dynamic_batching { max_queue_delay_microseconds: 0 }", "")
    head(root, "plain_onnx", model, config + 'output [{ name: "relu" data_type: TYPE_FP32 dims: [-1, 3] }]\n')
    # Requests wait so long that Triton joins several
    joined = (root / "binary_onnx/config.pbtxt").read_text().replace("microseconds: 0", "microseconds: 300000")
    (root / "binary_onnx/config.pbtxt").write_text(joined)
    with triton_server(root, root.parent / "log", venv=VENV) as server:
        client = grpc.InferenceServerClient(server.grpc, channel_args=judge.CHANNEL)
        yield server, client
        client.close()


def rows(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((count, FEATURES)).astype(np.float32)


def test_joined_requests_each_get_their_own_rows(served: tuple[Server, Any]) -> None:
    _, client = served
    batches = [rows(count, count) for count in (1, 2, 3, 2)]
    futures = [client.async_infer for _ in batches]
    answered: dict[int, Any] = {}
    for index, batch in enumerate(batches):
        futures[index](
            "binary_onnx",
            [make_input("input", batch)],
            callback=lambda result, error, index=index: answered.__setitem__(index, error or result.as_numpy("output")),
        )
    until(lambda: len(answered) == len(batches))
    for index, batch in enumerate(batches):
        np.testing.assert_allclose(answered[index], batch @ WEIGHT, rtol=1e-5, atol=1e-5)
    (statistics,) = client.get_inference_statistics("binary_onnx", as_json=True)["model_stats"]
    assert int(statistics["execution_count"]) < int(statistics["inference_count"])


def test_without_a_batch_dimension_requests_of_any_size_are_answered(served: tuple[Server, Any]) -> None:
    _, client = served
    for count in (1, 20):
        result = client.infer("plain_onnx", [make_input("input", rows(count))])
        np.testing.assert_allclose(result.as_numpy("output"), rows(count) @ WEIGHT, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(result.as_numpy("relu"), np.maximum(result.as_numpy("output"), 0))


def test_only_the_outputs_asked_for_are_answered(served: tuple[Server, Any]) -> None:
    _, client = served
    result = client.infer("plain_onnx", [make_input("input", rows(1))], outputs=[grpc.InferRequestedOutput("relu")])
    assert result.as_numpy("output") is None
    assert result.as_numpy("relu").shape == (1, 3)


def test_requests_beyond_the_limits_are_errors_and_the_model_goes_on(served: tuple[Server, Any]) -> None:
    _, client = served
    for wrong in (rows(9), rows(1)[:, :4], rows(1).astype(np.float64)):
        with pytest.raises(judge.InferenceServerException):
            client.infer("binary_onnx", [make_input("input", wrong)])
    assert client.infer("binary_onnx", [make_input("input", rows(8))]).as_numpy("output").shape == (8, 3)


def test_a_loaded_model_is_not_loaded_again(served: tuple[Server, Any]) -> None:
    server, client = served
    count = server.log.read_text().count("successfully loaded")
    client.load_model("binary_onnx")
    assert server.log.read_text().count("successfully loaded") == count


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
