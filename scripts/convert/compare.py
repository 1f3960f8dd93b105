"""Compare PyTorch with ONNX Runtime:

    python -m scripts.convert.compare [--deployed PYTHON] CHECKPOINT ENTRY.json TOLERANCE.json ONNX OUT.json

Both get the same seeded input. PyTorch runs the network as trained, without folded weights, one sample at a time. The
ONNX Runtime of this Python gets batches. The one of each --deployed PYTHON, such as the one that serves the verdict,
gets one sample at a time. OUT is written only if all agree. It also holds the answers that a server of this file must
give.
"""

import argparse
import importlib
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, ValueInfoProto

from scripts.convert import onnx_session
from scripts.convert.answer import Answer
from scripts.convert.judge import Judge
from scripts.convert.sample import make_sample, plan_requests

Array = NDArray[Any]

NETWORKS = {"vit": "convertation.vit.ctvit", "head": "convertation.head.mlp", "bpr": "convertation.bpr.vgg"}
INNER = {"vit": ("tokens", "codes")}  # values inside the graph that are compared, too
SEED = 0
SAMPLES = 2  # for each deployed runtime: enough to see whether answers to different inputs differ
ROOT = Path(__file__).resolve().parents[2]


def compare_with_pytorch(
    checkpoint: Path, entry: dict[str, Any], tolerance: dict[str, float], onnx: Path, deployed: Sequence[Path] = ()
) -> dict[str, Any]:
    """Return the content of OUT: the largest difference relative to the scale, and the answers a server must give.

    The scale is the largest absolute value of PyTorch's output. `tolerance`, relative to it: `output` for this
    comparison, `served` for a server's answers, `gpu` for those of a server with a GPU. `deployed`: Pythons whose ONNX
    Runtime is asked besides our own.
    SystemExit if the sides differ by more, if one has NaN or infinite values, or if the output does not depend on the
    input.
    """
    judge = Judge(onnx, entry["family"], tolerance["output"])
    batches = sorted({1, max(2, entry["batch"][1])})
    request = make_network_input(entry, batches[-1])
    # ONNX Runtime runs first and frees its memory before PyTorch loads: each holds the 604 MB of a ViT's projection
    inner = INNER.get(entry["family"], ())
    answers = [
        Answer(f"at batch {batch}", values)
        for batch, values in zip(batches, ask_onnxruntime(judge, request, batches, inner), strict=True)
    ]
    answers += [ask_deployed(judge, request[:SAMPLES], python, inner) for python in deployed]
    network = importlib.import_module(NETWORKS[entry["family"]]).load_network(checkpoint, entry)
    report: dict[str, Any] = {}
    flips: list[list[Array]] = []
    with torch.inference_mode():
        if entry["family"] == "vit":
            from scripts.convert import compare_vit

            references, expected, flips, report = compare_vit.check_inside(network, request, answers, judge)
        else:
            references = np.concatenate([network(torch.from_numpy(one[None])).numpy() for one in request])
            expected = [references[: len(answer.values["output"])] for answer in answers]
    del network

    outputs = [
        (f"output {answer.name}", right, answer.values["output"])
        for right, answer in zip(expected, answers, strict=True)
    ]
    for output in outputs:
        judge.check_values(*output)
    for output in outputs:
        if len(output[1]) > 1:
            judge.check_dependence(*output)
    difference = max(judge.check_difference(*output) for output in outputs)

    scale = float(np.abs(references).max())
    if report:  # how far the output moves, with the codes that differ
        found = [answer.values["output"] for answer in answers]
        apart = [float(np.abs(values - references[: len(values)]).max()) for values in found]
        report["codes"]["output_difference"] = max(apart) / scale
    served = [
        {
            "seed": SEED,
            "first": first,
            "batch": batch,
            "output": references[first : first + batch].tolist(),
            "allowed": tolerance["served"] * scale,
            **({"allowed_gpu": tolerance["gpu"] * scale} if "gpu" in tolerance else {}),
            "flips": [[tie.astype(np.float32).tolist() for tie in ties] for ties in flips[first : first + batch]],
        }
        for first, batch in plan_requests(batches, request[0].nbytes)
    ]
    result = {
        "model": entry["name"],
        "difference": difference,
        "tolerance": tolerance["output"],
        "batches": batches,
        "compared_by": [
            f"ONNX Runtime {onnxruntime.__version__}",
            *(answer.name for answer in answers[len(batches) :]),
        ],
        "scale": scale,
        **report,
        "served": served,
    }
    if entry["family"] == "bpr":
        from scripts.convert import compare_bpr

        series = compare_bpr.check_scores(checkpoint, entry, onnx)
        judge.check_tolerance("score of the series", series["difference"], series["scale"])
        result |= series | {"difference": max(result["difference"], series["difference"])}
    return result


def make_network_input(entry: dict[str, Any], batch: int) -> NDArray[np.float32]:
    """Return `batch` seeded samples as the network takes them. For BPR: slices of one series, from bottom to top."""
    if entry["family"] != "bpr":
        return make_sample(entry, SEED, batch)["input"]
    from convertation.bpr.bpreg import preprocess

    request = make_sample(entry, SEED, 1)
    slices = preprocess(request["input"][0], request["metadata"][0], side=entry["input"][-1])
    spread: NDArray[np.float32] = slices[np.linspace(0, len(slices) - 1, batch).astype(int)]
    return spread


def ask_onnxruntime(
    judge: Judge, request: NDArray[np.float32], batches: list[int], inner: tuple[str, ...]
) -> list[dict[str, Array]]:
    """Return ONNX Runtime's answer per batch size, to that many first samples: `output` and the values in `inner`."""
    names = ["output", *inner]
    try:
        session = open_session(judge.onnx, inner)
        answers = []
        for batch in batches:
            print(f"  ONNX Runtime, batch {batch}", flush=True)
            answers.append(dict(zip(names, session.run(names, {"input": request[:batch]}), strict=True)))
    except OSError as error:
        raise SystemExit(
            f"{judge.onnx}: cannot be read ({error.strerror}); next: make onnx MODEL={judge.family}"
        ) from None
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        if type(error).__module__.split(".")[0] != "onnxruntime" and not isinstance(error, ValueError):
            raise
        judge.fail(f"ONNX Runtime does not run it: {str(error).splitlines()[0]}", "the file is not this model's export")
    return answers


def ask_deployed(judge: Judge, request: NDArray[np.float32], python: Path, inner: tuple[str, ...]) -> Answer:
    """Return the answer of another Python's ONNX Runtime, which gets one sample at a time."""
    print(f"  ONNX Runtime of {python}", flush=True)
    names = ["output", *inner]
    with tempfile.TemporaryDirectory() as scratch:
        asked, out = Path(scratch, "request.npy"), Path(scratch, "answer.npz")
        np.save(asked, request)
        files = [judge.onnx.resolve(), add_outputs(inner).hex(), asked, out]
        # not resolved: Python finds its virtual environment by the path of the link that started it
        command = [python.absolute(), "-m", "scripts.convert.onnx_session", *files, *names]
        run = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            last = (run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1]
            judge.fail(f"{python}'s ONNX Runtime does not run it: {last}", "it cannot be served")
        with np.load(out) as found:
            return Answer(f"by ONNX Runtime {found['version']} as deployed", {name: found[name] for name in names})


def open_session(onnx: Path, inner: tuple[str, ...] = ()) -> onnxruntime.InferenceSession:
    """Return a session on the CPU. Its outputs are those of the file, and the values inside its graph in `inner`."""
    return onnx_session.open_session(onnx, add_outputs(inner))


def add_outputs(inner: tuple[str, ...]) -> bytes:
    """Return a piece of a protobuf message that, appended to the file, makes the values in `inner` outputs too."""
    outputs = [ValueInfoProto(name=name) for name in inner]
    piece: bytes = ModelProto(graph=GraphProto(output=outputs)).SerializeToString()
    return piece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in "checkpoint", "entry", "tolerance", "onnx", "out":
        parser.add_argument(name, type=Path)
    parser.add_argument("--deployed", action="append", default=[], type=Path, metavar="PYTHON")
    given = parser.parse_args()
    entry, tolerance = json.loads(given.entry.read_text()), json.loads(given.tolerance.read_text())
    result = compare_with_pytorch(given.checkpoint, entry, tolerance, given.onnx, given.deployed)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    difference, allowed = result["difference"], result["tolerance"]
    print(f"{entry['name']}: differs from PyTorch by {difference:.1e} of its scale, allowed {allowed:g}")
    flipped = f"; codes flipped: {result['codes']['flipped_by']}" if "codes" in result else ""
    print(f"  compared with: {', '.join(result['compared_by'])}{flipped}")


if __name__ == "__main__":
    main()
