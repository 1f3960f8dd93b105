"""Send volumes to a real Triton: each way delivers the same bits and leaves nothing behind."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from scripts.infer import handover
from scripts.infer.handover import (
    KEY_HEADER,
    LARGEST,
    NAMESPACE,
    Messages,
    Shared,
    TooLargeError,
    choose_handover,
    read_start_time,
)
from scripts.serve.ports_and_memory import SHM
from scripts.serve.triton_server import Server, triton_server

CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: 0
input [{{ name: "input" data_type: TYPE_FP32 dims: [-1] }}, {{ name: "more" data_type: TYPE_INT16 dims: [-1] }}]
output [{{ name: "output" data_type: TYPE_{kind} dims: [-1] }}]
instance_group [{{ count: 1 kind: KIND_CPU }}]
"""
# Answers with the digest of its inputs, or with an input itself
MODEL = """\
import hashlib, os, time
import numpy as np
import triton_python_backend_utils as pb_utils

def array(request, name):
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("output", self.answer(request))]) for request in requests]

    def answer(self, request):
        {answer}
"""
DIGEST = """\
seconds = float(array(request, "input")[0])
        if seconds:
            open(os.path.abspath(__file__ + "/../../../../busy"), "w").close()
            time.sleep(seconds)
        digest = hashlib.sha256(array(request, "input").tobytes() + array(request, "more").tobytes()).hexdigest()
        return np.array([digest.encode()], dtype=object)
"""


def model(repository: Path, name: str, kind: str, answer: str) -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(CONFIG.format(name=name, kind=kind))
    (repository / name / "1/model.py").write_text(MODEL.format(answer=answer))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("handover")
    model(top / "repository", "digest", "STRING", DIGEST)
    model(top / "repository", "echo", "FP32", 'return array(request, "input")')
    with triton_server(top / "repository", top / "log", venv=ROOT / ".venv-triton") as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[grpc.InferenceServerClient]:
    opened = grpc.InferenceServerClient(server.grpc)
    yield opened
    opened.close()


def regions(client: grpc.InferenceServerClient, server: Server) -> list[str]:
    return sorted(client.get_system_shared_memory_status(headers={KEY_HEADER: server.key}).regions)


def arrays(size: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Random bits, except the first value, the seconds that the model takes: 0."""
    chance = np.random.default_rng(seed)
    found = chance.integers(-(1 << 31), 1 << 31, size, dtype=np.int32).view(np.float32)
    found[0] = 0
    return {"input": found, "more": chance.integers(-1000, 1000, size, dtype=np.int16)}


def test_each_way_delivers_the_same_bits(server: Server, client: grpc.InferenceServerClient) -> None:
    ways = [Messages(server.grpc), Shared(server.grpc, client, server.key)]
    for size in (1, 1000, 300_000, 3_000_001, 700_001):  # small ones, one that enlarges the region, one that fits
        request = arrays(size, seed=size)
        tensors = [grpc.InferInput(name, [size], kind) for name, kind in (("input", "FP32"), ("more", "INT16"))]
        for tensor, array in zip(tensors, request.values(), strict=True):
            tensor.set_data_from_numpy(array)
        expected = client.infer("digest", tensors).as_numpy("output")
        turned = request | {"input": request["input"][::-1][::-1]}  # not contiguous
        for way in ways:
            assert way.infer("digest", turned, 60).tolist() == expected.tolist()
            np.testing.assert_array_equal(
                way.infer("echo", request, 60).view(np.int32), request["input"].view(np.int32)
            )
    for way in ways:
        way.close()


def test_with_the_key_shared_memory_is_used_and_leaves_nothing_behind(
    server: Server, client: grpc.InferenceServerClient
) -> None:
    before = set(SHM.iterdir())
    way = choose_handover(client, server.grpc, server.key)
    way.infer("digest", arrays(1 << 20), 60)

    assert way.name == "shared_memory"
    assert len(regions(client, server)) == 1
    assert not [
        path for path in set(SHM.iterdir()) - before if path.name.startswith("chest-")
    ]  # so a kill leaves nothing
    way.close()
    assert regions(client, server) == []


@pytest.mark.parametrize("key", ["", "wrong"])
def test_without_the_key_volumes_go_in_messages(server: Server, client: grpc.InferenceServerClient, key: str) -> None:
    way = choose_handover(client, server.grpc, key)

    assert type(way) is Messages and way.name == "locked"
    way.infer("digest", arrays(1 << 20), 60)
    way.close()
    assert regions(client, server) == []


def test_a_server_elsewhere_gets_messages(
    server: Server, client: grpc.InferenceServerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server in a container or on another host has another /dev/shm."""
    monkeypatch.setattr(handover, "SHM", tmp_path)

    way = choose_handover(client, server.grpc, server.key)

    assert way.name == "messages"
    way.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_dev_shm_gets_messages(
    server: Server, client: grpc.InferenceServerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = choose_handover(client, server.grpc, server.key)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handover.os, "posix_fallocate", full)
    request = arrays(1 << 20)
    assert np.array_equal(way.infer("echo", request, 60).view(np.int32), request["input"].view(np.int32))
    assert regions(client, server) == []
    way.close()


def test_a_region_that_the_server_lost_is_made_again(server: Server, client: grpc.InferenceServerClient) -> None:
    way = choose_handover(client, server.grpc, server.key)
    expected = way.infer("digest", arrays(1 << 20), 60)
    client.unregister_system_shared_memory(headers={KEY_HEADER: server.key})

    assert way.infer("digest", arrays(1 << 20), 60) == expected
    assert len(regions(client, server)) == 1
    way.close()


def test_the_next_client_frees_what_a_killed_one_left_mapped(
    server: Server, client: grpc.InferenceServerClient
) -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    start = read_start_time(pid)
    os.waitpid(pid, 0)
    kept = [
        "someone-elses",
        f"chest.{NAMESPACE}.{pid}.{start}.echo.1",  # another model's: a request for it may wait
        f"chest.1.{pid}.{start}.digest.1",  # another container has other process ids
        f"chest.{NAMESPACE}.{os.getpid()}.{read_start_time(os.getpid())}.digest.1",  # alive
    ]
    for region in (*kept, f"chest.{NAMESPACE}.{pid}.{start}.digest.1"):
        (SHM / f"{region}.test").write_bytes(bytes(4096))
        try:
            client.register_system_shared_memory(region, f"/{region}.test", 4096, headers={KEY_HEADER: server.key})
        finally:
            (SHM / f"{region}.test").unlink()

    with closing(choose_handover(client, server.grpc, server.key)) as way:
        assert len(regions(client, server)) == 5
        way.infer("digest", arrays(1 << 20), 60)
    assert regions(client, server) == sorted(kept)
    client.unregister_system_shared_memory(headers={KEY_HEADER: server.key})


def test_a_request_that_takes_too_long_fails_and_its_memory_stays_mapped(
    server: Server, client: grpc.InferenceServerClient
) -> None:
    """If it were unmapped while the server reads it, the server would crash."""
    way = choose_handover(client, server.grpc, server.key)
    slow = arrays(1 << 20)
    slow["input"][0] = 3  # s
    with pytest.raises(InferenceServerException) as error:
        way.infer("digest", slow, 0.5)
    assert "DEADLINE_EXCEEDED" in str(error.value.status())
    way.close()
    assert len(regions(client, server)) == 1

    (server.log.parent / "busy").unlink()
    other = choose_handover(client, server.grpc, server.key)
    assert other.infer("digest", arrays(1 << 20), 60).shape == (1,)  # the server still answers
    other.close()
    client.unregister_system_shared_memory(headers={KEY_HEADER: server.key})


@pytest.mark.parametrize("keyed", [True, False])
def test_two_gibibytes_are_refused_before_they_are_copied(
    server: Server, client: grpc.InferenceServerClient, keyed: bool
) -> None:
    most = np.broadcast_to(np.float32(0), LARGEST // 4 + 1)  # 2 GiB that take no memory
    with (
        closing(choose_handover(client, server.grpc, server.key if keyed else "")) as way,
        pytest.raises(TooLargeError, match="2047 MiB; Triton takes at most 2047 at once"),
    ):
        way.infer("digest", {"input": most, "more": np.zeros(1, np.int16)}, 60)


def test_the_caller_gets_the_servers_own_error(server: Server) -> None:
    way = Messages(server.grpc)
    with pytest.raises(InferenceServerException, match=r"expected 2 inputs|unexpected inference input"):
        way.infer("digest", {"less": np.zeros(4, np.float32)}, 60)
    way.close()


def test_a_process_has_a_start_time() -> None:
    assert read_start_time(os.getpid()).isdecimal()
    assert read_start_time(0) == ""


GOES_AWAY = """
import os, sys
import numpy as np
from tritonclient import grpc
from scripts.infer.handover import choose_handover
address, key = sys.argv[1:]
way = choose_handover(grpc.InferenceServerClient(address), address, key)
slow = np.zeros(1 << 20, np.float32)
slow[0] = 3
print(way.name, flush=True)
way.infer("digest", {"input": slow, "more": np.zeros(1, np.int16)}, 60)
"""


@pytest.mark.parametrize("keyed", [True, False])
def test_a_client_killed_during_its_request_disturbs_no_other(
    server: Server, client: grpc.InferenceServerClient, keyed: bool
) -> None:
    """The server is working on its request."""
    key = server.key if keyed else ""
    command = [sys.executable, "-c", GOES_AWAY, server.grpc, key]
    gone = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert gone.stdout and gone.stdout.readline() == ("shared_memory\n" if keyed else "locked\n")
    busy = server.log.parent / "busy"
    while not busy.exists():
        assert gone.poll() is None
    busy.unlink()
    gone.kill()
    gone.wait()

    with closing(choose_handover(client, server.grpc, server.key)) as way:
        assert way.infer("digest", arrays(1 << 20), 60).shape == (1,)
    assert regions(client, server) == []  # its region is unmapped


def test_a_client_killed_while_its_request_waits_does_not_crash_the_server(
    server: Server, client: grpc.InferenceServerClient
) -> None:
    """If its memory were unmapped at once, the server would crash on that request."""
    slow = arrays(1 << 20)
    slow["input"][0] = 8  # s; the request behind it waits
    first = threading.Thread(target=Messages(server.grpc).infer, args=("digest", slow, 60))
    first.start()
    busy = server.log.parent / "busy"
    while not busy.exists():
        assert first.is_alive()
    busy.unlink()
    command = [sys.executable, "-c", GOES_AWAY, server.grpc, server.key]
    gone = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert gone.stdout and gone.stdout.readline() == "shared_memory\n"
    while not any(".digest." in name for name in regions(client, server)):
        assert gone.poll() is None
    time.sleep(0.5)  # time to send its request; if it is not sent yet, none waits
    gone.kill()
    gone.wait()

    with closing(choose_handover(client, server.grpc, server.key)) as way:
        assert way.infer("digest", arrays(1 << 20), 60).shape == (1,)
    first.join()
    busy.unlink(missing_ok=True)
    assert server.process.poll() is None
    assert regions(client, server) == []


@pytest.mark.parametrize("page", ["docs/serving.md", "docs/serving.ru.md"])
def test_the_documented_lines_for_your_own_client_work(
    server: Server, client: grpc.InferenceServerClient, page: str
) -> None:
    text = (ROOT / page).read_text()
    first, second = text[text.index("    import mmap, os") :].split("\n\n")[:2]
    volume = arrays(1 << 20)["input"]
    names: dict[str, Any] = {"np": np, "grpc": grpc, "client": client, "key": server.key, "volume": volume}
    for lines in (first.replace("4 * 240 * 480 * 480 * 4", "1 << 23"), second):
        exec(dedent(lines), names)

    more = grpc.InferInput("more", [2], "INT16")
    more.set_data_from_numpy(np.zeros(2, np.int16))
    answer = client.infer("echo", [names["tensor"], more]).as_numpy("output")

    np.testing.assert_array_equal(answer.view(np.int32), volume.view(np.int32))
    assert not (SHM / "adapter").exists()
    client.unregister_system_shared_memory(headers={KEY_HEADER: server.key})
