"""Check ONNX models and plans in the real Triton image on a GPU, and measure them.

    python -m scripts.plans.verify_gpu --image IMAGE --gpu-checks build/plan/sm86/{}.check.json FILE=SOURCE... OUT.json

First it passes the verdict on the whole set, as before publishing.  Then it serves each model alone: one, two and four
clients ask at once, with one sample and with the largest batch, until the rate is steady.  It also measures how much
the GPU's used memory grows, read from nvidia-smi five times a second.  Requests are in shared memory if the container
can map it, so that their transfer is not measured.  Other work on the GPU falsifies speed and memory: stop it first.
"""

import argparse
import json
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tritonclient import grpc  # type: ignore[import-untyped]
from tritonclient.utils import InferenceServerException, np_to_triton_dtype  # type: ignore[import-untyped]

from scripts.convert.sample import make_sample
from scripts.serve.model_config import read_config
from scripts.serve.ports_and_memory import SHM
from scripts.serve.server_options import KEY_HEADER
from scripts.serve.triton_client import CHANNEL, make_input
from scripts.serve.triton_server import triton_server
from scripts.serve.verdict import find_variant, pass_verdict, stage_files

BUILD = Path("build")
CLIENTS = 1, 2, 4  # at once
WINDOW = 10  # requests of each client; each window gives one rate
# The rate is steady if those of WINDOWS windows in turn spread by at most STEADY; else it ends after MOST_WINDOWS
WINDOWS, STEADY, MOST_WINDOWS = 3, 0.1, 10


def read_used_memory() -> int:
    """Return the MiB in use on all GPUs, because any of them may be the container's."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return sum(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"nvidia-smi does not report the GPU's memory ({error}); run it by hand") from None


@contextmanager
def watch_peak() -> Iterator[dict[str, int]]:
    """Yield a dict whose `mib` is, on leaving, the largest growth of used memory in MiB."""
    peak, before, done = {"mib": 0}, read_used_memory(), threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            peak["mib"] = max(peak["mib"], read_used_memory() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def measure_model(name: str, contents: list[str], image: str) -> dict[str, Any]:
    """Return, for batch 1 and the largest: latency, peak memory in MiB, and `load` by the number of clients at once."""
    stage_files([item for item in contents if item.startswith(f"{name}/")], BUILD / "staging")
    entry = json.loads((BUILD / f"models/{name.rpartition('_')[0]}.json").read_text())
    largest = max(1, read_config(BUILD / "staging" / name / "config.pbtxt").max_batch_size)
    result = {}
    for batch in sorted({1, largest}):
        request = make_sample(entry, 0, batch)
        with (
            put_in_shared_memory(request) as region,
            watch_peak() as memory,
            triton_server(BUILD / "staging", BUILD / "logs/verify-gpu.log", image=image, maps=[region]) as server,
        ):
            client = grpc.InferenceServerClient(server.grpc, channel_args=CHANNEL)
            try:
                way, inputs = map_region(client, server.key, region, request)
                request.clear()

                def ask(client: Any = client, inputs: Any = inputs) -> None:
                    client.infer(name, inputs, model_version="1", client_timeout=600)

                start = time.perf_counter()
                ask()
                first = round(1000 * (time.perf_counter() - start), 1)
                loads = {str(clients): measure_load(ask, clients) for clients in CLIENTS}
            except InferenceServerException as error:
                raise SystemExit(
                    f"{name} at batch {batch}: {server.explain_trouble(f'Triton says: {error.message()}')}"
                ) from error
            finally:
                client.close()
        latency = loads["1"]["p50_ms"]
        result[str(batch)] = {
            "latency_ms": latency, "memory_mib": memory["mib"], "first_ms": first, "way": way, "load": loads,
        }  # fmt: skip
    return result


@contextmanager
def put_in_shared_memory(request: dict[str, NDArray[Any]]) -> Iterator[Path]:
    """Yield a file in /dev/shm with the arrays one after another; any user may read it, the samples are made up."""
    path = SHM / f"verify-gpu-{os.getpid()}"
    try:
        path.write_bytes(b"".join(array.tobytes() for array in request.values()))
        path.chmod(0o666)
        yield path
    finally:
        path.unlink(missing_ok=True)


def map_region(client: Any, key: str, region: Path, request: dict[str, NDArray[Any]]) -> tuple[str, list[Any]]:
    """Return how the arrays reach the server, and a request's inputs; gRPC if the server cannot map the region."""
    size = sum(array.nbytes for array in request.values())
    try:
        headers = {f"triton-grpc-protocol-{KEY_HEADER}": key}
        client.register_system_shared_memory(region.name, f"/{region.name}", size, headers=headers)
    except InferenceServerException:
        return "gRPC", [make_input(name, array) for name, array in request.items()]
    inputs, start = [], 0
    for name, array in request.items():
        inputs.append(grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        inputs[-1].set_shared_memory(region.name, array.nbytes, start)
        start += array.nbytes
    return "shared memory", inputs


def measure_load(ask: Callable[[], None], clients: int) -> dict[str, float]:
    """Return p50 and p95 in ms, requests per second and the spread of the rate, with so many clients at once.

    All are of the last WINDOWS windows: once the rate is steady, or after MOST_WINDOWS windows.
    """
    rates: list[float] = []
    times: list[list[float]] = []
    with ThreadPoolExecutor(clients) as pool:

        def time_request(_: int) -> float:
            start = time.perf_counter()
            ask()
            return 1000 * (time.perf_counter() - start)

        while len(rates) < MOST_WINDOWS and not (len(rates) >= WINDOWS and measure_spread(rates) <= STEADY):
            start = time.perf_counter()
            times.append(list(pool.map(time_request, range(WINDOW * clients))))
            rates.append(len(times[-1]) / (time.perf_counter() - start))
    last = sorted(taken for window in times[-WINDOWS:] for taken in window)
    return {
        "p50_ms": round(statistics.median(last), 2),
        "p95_ms": round(last[int(0.95 * (len(last) - 1))], 2),
        "per_s": round(statistics.median(rates[-WINDOWS:]), 2),
        "spread": round(measure_spread(rates), 3),
    }


def measure_spread(rates: Sequence[float]) -> float:
    """Return the largest minus the smallest rate of the last windows, as a share of their median."""
    last = rates[-WINDOWS:]
    return (max(last) - min(last)) / statistics.median(last)


def find_slower(measured: dict[str, Any]) -> dict[str, str]:
    """Return each plan that is slower than its ONNX model at one sample by more than the spread, with both times."""
    found = {}
    for name, batches in measured.items():
        twin = measured.get(name.replace("_trt", "_onnx"))
        if not name.endswith("_trt") or not twin:
            continue
        ours, theirs = batches["1"]["load"]["1"], twin["1"]["load"]["1"]
        if ours["p50_ms"] > theirs["p50_ms"] * (1 + max(ours["spread"], theirs["spread"])):
            found[name] = f"{ours['p50_ms']:g} ms, the ONNX model {theirs['p50_ms']:g} ms"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", required=True)
    parser.add_argument("--gpu-checks", required=True, metavar="PATTERN")
    parser.add_argument("--variant", action="append", default=[], metavar="MODEL.PRECISION", help="such as vit.tf32")
    parser.add_argument("contents", nargs="+", metavar="FILE=SOURCE")
    parser.add_argument("out", type=Path)
    given = parser.parse_intermixed_args()
    stage_files(given.contents, BUILD / "staging")
    folders = BUILD / "checks", BUILD / "models"
    verdict = pass_verdict(
        BUILD / "staging", *folders, BUILD / "logs/verify-gpu.log", given.image,
        gpu_checks=given.gpu_checks, variants=given.variant,
    )  # fmt: skip
    plans = {
        name: given.gpu_checks.format(find_variant(name, given.variant)) for name in verdict["models"] if "_trt" in name
    }
    found = {name: Path(path.replace(".check.json", ".json")) for name, path in plans.items()}
    records = {name: json.loads(path.read_text()) for name, path in found.items() if path.is_file()}
    names = list(verdict["models"])
    measured = {name: measure_model(name, given.contents, given.image) for name in names}
    first: dict[str, Any] = next(iter(records.values()), {})
    machine = {key: first.get(key) for key in ("gpu", "gpu_memory_mib", "driver", "tensorrt")}
    slower = find_slower(measured)
    result = {"on": machine, "verdict": verdict, "measured": measured, "slower": slower, "plans": records}
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{machine['gpu']}, driver {machine['driver']}, TensorRT {machine['tensorrt']}; {verdict['server']}")
    head = f"{'model':18}{'batch':>6}{'clients':>8}{'p50, ms':>10}{'p95, ms':>10}{'per s':>9}"
    print(f"{head}{'peak GPU memory, MiB':>22}{'differs by':>12}")
    for name in names:
        for batch, row in measured[name].items():
            for clients, one in row["load"].items():
                cells = f"{one['p50_ms']:>10}{one['p95_ms']:>10}{one['per_s']:>9}{row['memory_mib']:>22}"
                print(f"{name:18}{batch:>6}{clients:>8}{cells}{verdict['models'][name]['relative']:>12.1e}")
    for name, figures in slower.items():
        print(f"{name} is slower than its ONNX model on this GPU: {figures}; to publish it: ACCEPT=slower")
    print(given.out)


if __name__ == "__main__":
    main()
