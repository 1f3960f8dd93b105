"""`make reload` while clients send requests to the real Triton: no request fails, no memory is lost."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import REPOSITORY, ROOT, Project
from tritonclient import grpc

from scripts.deploy import reload as program
from scripts.deploy.image import list_requirements
from scripts.deploy.stack import identify_folder
from scripts.publish import exchange, publish
from scripts.serve.triton_client import CHANNEL, make_input
from scripts.serve.triton_server import Server, triton_server
from scripts.steps import records
from tests.triton_models import CLASSES, CONFIG, FEATURES, linear

NETWORKS = "vit_onnx", "binary_onnx", "multilabel_onnx"
CLIENTS, REQUESTS, FIRST = 4, 500, 100
LARGEST = 60  # requests of the largest size, before those that differ
GROWTH = 1.05


def sources(number: int) -> dict[str, tuple[str, str]]:
    """Return file -> (source, digest) of set `number`. For an input of ones its networks answer the number."""
    found = {}
    for name in NETWORKS:
        model = linear()
        weight = np.full((FEATURES, CLASSES), number / FEATURES, np.float32)
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "weight"))
        for file, content in (
            ("config.pbtxt", CONFIG.replace("binary_onnx", name).encode()),
            ("1/model.onnx", model.SerializeToString()),
        ):
            source = Path(f"sets/{number}/{name}/{file}")
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_bytes(content)
            found[f"{name}/{file}"] = str(source), records.current_digest(str(source))
    return found


class Clients:
    """Threads that ask the three networks in turn, as for a study, until the block ends and each has sent REQUESTS."""

    def __init__(self, server: Server) -> None:
        self.server, self.count, self.enough = server, 0, threading.Event()
        self.failed: list[str] = []
        self.studies: list[tuple[float, float, list[float]]] = []  # from, to, the set that each network is of
        self.moved = threading.Condition()
        self.threads = [threading.Thread(target=self.run) for _ in range(CLIENTS)]

    def run(self) -> None:
        client = grpc.InferenceServerClient(self.server.grpc, channel_args=CHANNEL)
        ones, asked = np.ones((1, FEATURES), np.float32), 0
        while asked < REQUESTS or not self.enough.is_set():
            start, answers = time.monotonic(), []
            for name in NETWORKS:
                try:
                    result = client.infer(name, [make_input("input", ones)], model_version="1", client_timeout=60)
                    (number,) = {round(float(value), 4) for value in result.as_numpy("output").ravel()}
                    answers.append(number)
                except Exception as error:
                    self.failed.append(f"{name}: {error}")
            asked += len(NETWORKS)
            self.studies.append((start, time.monotonic(), answers))
            with self.moved:
                self.count += len(NETWORKS)
                self.moved.notify_all()
        client.close()

    def wait(self, more: int) -> None:
        """Wait until they have sent `more` requests."""
        with self.moved:
            goal = self.count + more
            self.moved.wait_for(lambda: self.count >= goal)

    def __enter__(self) -> "Clients":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.enough.set()
        for thread in self.threads:
            thread.join()


def memory(server: Server, stubs_alone: bool = False) -> int:
    """Wait until no model unloads; return the KiB of the server and its stubs, shared memory counted once.

    Pages of files (libraries) are left out: programs that map them share their size, so the number would grow
    whenever another Triton on this machine ends.
    `stubs_alone`: only the processes that run Python models, without tritonserver.
    """
    for _ in range(600):
        states = {model.get("state") for model in server.ask("/v2/repository/index", "POST")}
        group = [
            path for path in Path("/proc").iterdir() if path.name.isdecimal() and pgrp(path) == str(server.process.pid)
        ]
        if "UNLOADING" not in states and len(group) == 1 + len(states_of_stubs(server)):
            break
        time.sleep(0.1)
    counted = [path for path in group if not stubs_alone or path.name != str(server.process.pid)]
    lines = [line.split() for path in counted for line in (path / "smaps_rollup").read_text().splitlines()]
    return sum(int(line[1]) for line in lines if line[0] in ("Pss_Anon:", "Pss_Shmem:"))


def pgrp(process: Path) -> str:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[2]
    except OSError:
        return ""


def states_of_stubs(server: Server) -> list[str]:
    """Return the models that are READY; each has a stub."""
    return [model["name"] for model in server.ask("/v2/repository/index", "POST") if model.get("state") == "READY"]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Publish and serve set 1; let `reload` take this server for the container's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "SETTLED", 0)
    exchange.replace_models(REPOSITORY, "synthetic", [*NETWORKS], sources(1))
    with triton_server(Path(REPOSITORY), tmp_path / "log", venv=ROOT / ".venv-triton") as started:
        labels = {"chest.repository": identify_folder(REPOSITORY)}
        labels["chest.requirements"] = hashlib.sha256(list_requirements(REPOSITORY)).hexdigest()
        monkeypatch.setattr(program, "find_container", lambda: "container")
        monkeypatch.setattr(program, "inspect_object", lambda *_: {"Config": {"Labels": labels}})
        monkeypatch.setattr(program, "read_index", lambda _: started.ask("/v2/repository/index", "POST"))
        monkeypatch.setattr(program, "ask_container", lambda _, path, body: started.ask(path, "POST"))
        yield started


def test_no_request_fails_during_reloads_and_a_rollback(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    reloads: list[tuple[float, float, int]] = []  # from, to, the set that was taken

    def take(number: int, put: Callable[[], None]) -> None:
        clients.wait(FIRST)
        put()
        start = time.monotonic()
        program.reload_models(REPOSITORY)
        reloads.append((start, time.monotonic(), number))

    with Clients(server) as clients:
        clients.wait(FIRST)
        before = memory(server)
        for number in (2, 3, 4):
            files = sources(number)
            take(number, lambda files=files: exchange.replace_models(REPOSITORY, "synthetic", [*NETWORKS], files))  # type: ignore[misc]
        take(3, lambda: publish.roll_back(REPOSITORY))
        clients.wait(FIRST)
    after = memory(server)

    assert clients.failed == []
    assert clients.count >= CLIENTS * REQUESTS
    assert len(reloads) == 4
    served = 1
    for (start, end, number), (following, _, _) in zip(reloads, [*reloads[1:], (float("inf"), 0, 0)], strict=True):
        for begun, ended, answers in clients.studies:
            if start <= ended and begun <= end:  # meanwhile each network is of the old set or of the new
                assert set(answers) <= {served, number}
            elif end < begun and ended < following:
                assert set(answers) == {number}
        served = number
    mixed = [study for study in clients.studies if len(set(study[2])) > 1]
    assert all(any(start <= ended and begun <= end for start, end, _ in reloads) for begun, ended, _ in mixed)
    assert capsys.readouterr().out.count("may have answered one study: ask again for the studies of that time") == 4
    assert after <= GROWTH * before


def test_a_reload_of_one_network_or_of_bpr_mixes_no_sets(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    program.reload_models(REPOSITORY)  # so that all is loaded
    capsys.readouterr()
    files = {path: source for path, source in sources(2).items() if path.startswith("binary_onnx/")}
    exchange.replace_models(REPOSITORY, "synthetic", ["binary_onnx"], files)

    program.reload_models(REPOSITORY)

    said = capsys.readouterr().out
    assert "binary_onnx: READY, loaded in" in said and "vit_onnx: unchanged, READY" in said
    assert "may have answered one study" not in said


def test_two_hundred_series_of_different_sizes_leave_no_memory_behind(built: Project, tmp_path: Path) -> None:
    """Series go through the published bpr_model, the largest first: its process, which is counted, keeps that memory.

    The whole server rises and falls by 8 % all the time (glibc's arenas in tritonserver): 145 MB after 160 series, 144
    after 1,000, 153 after 1,600.
    """
    chance, largest = np.random.default_rng(0), (48, 160, 160)
    sizes = [largest] * LARGEST
    sizes += [(int(z), int(y), int(x)) for z, y, x in chance.integers((8, 64, 64), largest, (200, 3))]
    spacing = np.array([[2.5, 2.5, 5]], np.float32)
    whole = tmp_path / "repository"
    whole.mkdir()
    (whole / "bpr_model").symlink_to(built.path / REPOSITORY / "bpr_model")
    with triton_server(whole, tmp_path / "log", venv=ROOT / ".venv-triton") as server:
        client = grpc.InferenceServerClient(server.grpc, channel_args=CHANNEL)
        taken = []  # KiB after each ten
        for number, size in enumerate(sizes, start=1):
            series = chance.integers(-1000, 1000, (1, *size), dtype=np.int16)
            tensors = [make_input("input", series), make_input("metadata", spacing)]
            client.infer("bpr_model", tensors, model_version="1", client_timeout=120)
            if number % 10 == 0:
                taken.append(memory(server, stubs_alone=True))
        client.close()
    after_the_first = (LARGEST + FIRST) // 10
    assert min(taken[-3:]) <= GROWTH * max(taken[:after_the_first]), taken
