"""Judge ONNX models and plans in the real Triton image on a GPU, and measure them.

    python -m scripts.plans.verify_gpu --image IMAGE --gpu-checks build/plan/sm86/{}.check.json FILE=SOURCE... OUT.json

First the verdict on the whole set, as before publishing.  Then each model alone in a server of its own: latency at one
sample and at the most that it takes, and by how much the GPU's used memory grew, read from nvidia-smi five times a
second.  Other work on the GPU spoils both: stop it first.
"""

import argparse
import json
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tritonclient import grpc  # type: ignore[import-untyped]
from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped]

from scripts.convert.sample import sample
from scripts.serve.check_repository import read_config
from scripts.serve.triton_server import triton_server
from scripts.serve.verdict import CHANNEL, as_input, stage, variant, verdict

BUILD = Path("build")
TIMES = 10  # requests of which the median is told, after one that warms up


def used() -> int:
    """MiB in use on all GPUs, whichever of them the container has."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return sum(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"nvidia-smi does not tell the GPU's memory ({error}); run it by hand") from None


@contextmanager
def peak() -> Iterator[dict[str, int]]:
    """Yields what will hold, on leaving, the largest growth of used memory in MiB."""
    told, before, done = {"mib": 0}, used(), threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            told["mib"] = max(told["mib"], used() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield told
    finally:
        done.set()
        thread.join()


def measure(name: str, contents: list[str], image: str) -> dict[str, Any]:
    """Latency in ms and peak memory in MiB of one model, at one sample and at the largest batch."""
    stage([item for item in contents if item.startswith(f"{name}/")], BUILD / "staging")
    entry = json.loads((BUILD / f"models/{name.rpartition('_')[0]}.json").read_text())
    largest = max(1, read_config(BUILD / "staging" / name / "config.pbtxt").max_batch_size)
    result = {}
    for batch in sorted({1, largest}):
        request = sample(entry, 0, batch)
        with peak() as memory, triton_server(BUILD / "staging", BUILD / "logs/verify-gpu.log", image=image) as server:
            client = grpc.InferenceServerClient(server.grpc, channel_args=CHANNEL)
            try:
                inputs = [as_input(key, request.pop(key)) for key in list(request)]
                times = []
                for _ in range(TIMES + 1):
                    start = time.perf_counter()
                    client.infer(name, inputs, model_version="1", client_timeout=600)
                    times.append(1000 * (time.perf_counter() - start))
            except InferenceServerException as error:
                raise SystemExit(
                    f"{name} at batch {batch}: {server.trouble(f'Triton says: {error.message()}')}"
                ) from error
            finally:
                client.close()
        result[str(batch)] = {"latency_ms": round(statistics.median(times[1:]), 1), "memory_mib": memory["mib"]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", required=True)
    parser.add_argument("--gpu-checks", required=True, metavar="PATTERN")
    parser.add_argument("--variant", action="append", default=[], metavar="MODEL.PRECISION", help="such as vit.tf32")
    parser.add_argument("contents", nargs="+", metavar="FILE=SOURCE")
    parser.add_argument("out", type=Path)
    given = parser.parse_intermixed_args()
    stage(given.contents, BUILD / "staging")
    folders = BUILD / "checks", BUILD / "models"
    told = verdict(
        BUILD / "staging", *folders, BUILD / "logs/verify-gpu.log", given.image,
        gpu_checks=given.gpu_checks, variants=given.variant,
    )  # fmt: skip
    plans = {name: given.gpu_checks.format(variant(name, given.variant)) for name in told["models"] if "_trt" in name}
    found = {name: Path(path.replace(".check.json", ".json")) for name, path in plans.items()}
    records = {name: json.loads(path.read_text()) for name, path in found.items() if path.is_file()}
    names = list(told["models"])
    measured = {name: measure(name, given.contents, given.image) for name in names}
    first: dict[str, Any] = next(iter(records.values()), {})
    where = {key: first.get(key) for key in ("gpu", "gpu_memory_mib", "driver", "tensorrt")}
    given.out.write_text(
        json.dumps({"on": where, "verdict": told, "measured": measured, "plans": records}, indent=1) + "\n"
    )
    print(f"{where['gpu']}, driver {where['driver']}, TensorRT {where['tensorrt']}; {told['server']}")
    print(f"{'model':18}{'batch':>6}{'latency, ms':>13}{'peak GPU memory, MiB':>22}{'differs by':>12}")
    for name in names:
        for batch, row in measured[name].items():
            print(
                f"{name:18}{batch:>6}{row['latency_ms']:>13}{row['memory_mib']:>22}{told['models'][name]['relative']:>12.1e}"
            )
    print(given.out)


if __name__ == "__main__":
    main()
