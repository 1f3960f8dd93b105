"""Compare PyTorch with ONNX Runtime: python -m scripts.compare CHECKPOINT ENTRY.json TOLERANCE.json ONNX OUT.json

Both get the same seeded input: PyTorch, the network as trained and not folded, one sample at a time; ONNX Runtime in
batches. OUT, written only if they agree, also holds the answers that a server of this file must give.
"""

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, ValueInfoProto

from scripts.sample import sample

Array = NDArray[Any]

NETWORKS = {"vit": "convertation.vit.ctvit", "head": "convertation.head.mlp", "bpr": "convertation.bpr.vgg"}
INNER = {"vit": ("tokens", "codes")}  # values inside the graph that are compared too
SEED = 0
LARGEST_REQUEST = 256 << 20  # bytes a server is asked at once: a full-size volume is 221 MB, two take long


class Judge(NamedTuple):
    """Ends the comparison with what is wrong, where, what it means and what to do."""

    onnx: Path
    family: str
    tolerance: float
    of: str = "PyTorch's"  # whose values are the reference

    def fail(self, what: str, meaning: str) -> NoReturn:
        raise SystemExit(
            f"{self.onnx}: {what}\n{meaning}; nothing is written\n"
            f"next: rm {self.onnx} && make onnx MODEL={self.family}; if it stays, suspect torch and onnxruntime"
        )

    def sane(self, name: str, reference: Array, answer: Array) -> None:
        """Same shape and type, and every value finite."""
        found, expected = (f"{values.dtype} {list(values.shape)}" for values in (answer, reference))
        if found != expected:
            self.fail(f"{name} is {found}, expected {expected}", "the file is no export of this model")
        for side, values in ("PyTorch", reference), ("ONNX Runtime", answer):
            if bad := values.size - int(np.isfinite(values).sum()):
                self.fail(
                    f"{bad} of {values.size} values of {name} by {side} are NaN or infinite, expected none",
                    "it overflows",
                )

    def alive(self, name: str, reference: Array, answer: Array) -> None:
        """The samples of a batch get different answers; else two sides agree by saying nothing."""
        for side, values in ("PyTorch", reference), ("ONNX Runtime", answer):
            largest = np.abs(values).max()
            if not np.abs(values[1:] - values[0]).max() > 10 * self.tolerance * largest:
                what = f"{name} by {side} does not depend on the input (largest value {largest:.3g})"
                self.fail(f"{what}, expected one answer per sample", "the network answers the same for every input")

    def same(self, name: str, reference: Array, answer: Array) -> float:
        """The largest difference relative to the reference's largest absolute value, if within the tolerance."""
        self.sane(name, reference, answer)
        scale = np.abs(reference).max()
        apart = np.abs(answer.astype(np.float64) - reference)
        largest = float(apart.max() / scale) if scale else float(apart.max() > 0)
        where = [int(index) for index in np.unravel_index(apart.argmax(), apart.shape)]
        self.within(f"{name}, most at {where},", largest, float(scale))
        return largest

    def within(self, name: str, difference: float, scale: float) -> None:
        if not difference <= self.tolerance:
            self.fail(
                f"{name} differs from {self.of} by {difference:.2e} of its scale {scale:.3g}; "
                f"expected at most {self.tolerance:g}",
                "the file does not compute what the checkpoint does",
            )


def compare(checkpoint: Path, entry: dict[str, Any], tolerance: dict[str, float], onnx: Path) -> dict[str, Any]:
    """What OUT holds: the largest difference relative to the output's scale, and the answers a server must give.

    `tolerance`: `output` for this comparison, `served` for a server's answers, both relative to the scale, which is the
    largest absolute value of PyTorch's output. SystemExit if the sides differ by more, if either has NaN or infinite
    values, or if the output does not depend on the input.
    """
    judge = Judge(onnx, entry["family"], tolerance["output"])
    batches = sorted({1, max(2, entry["batch"][1])})
    request = network_input(entry, batches[-1])
    # First ONNX Runtime, and gone before PyTorch comes: of a ViT each of them holds the 604 MB of the projection
    answers = ask(judge, request, batches, INNER.get(entry["family"], ()))
    network = importlib.import_module(NETWORKS[entry["family"]]).load(checkpoint, entry)
    report: dict[str, Any] = {}
    flips: list[Array] = []
    with torch.inference_mode():
        if entry["family"] == "vit":
            from convertation.vit import check_vit

            references, expected, flips, report = check_vit.check(network, request, answers, judge)
        else:
            references = np.concatenate([network(torch.from_numpy(one[None])).numpy() for one in request])
            expected = [references[:batch] for batch in batches]
    del network

    outputs = [
        (f"output at batch {batch}", right, answer["output"])
        for batch, right, answer in zip(batches, expected, answers, strict=True)
    ]
    for output in outputs:
        judge.sane(*output)
    judge.alive(*outputs[-1])
    difference = max(judge.same(*output) for output in outputs)

    scale = float(np.abs(references).max())
    if report:  # what the codes that differ do to the output
        apart = [float(np.abs(answer["output"] - references[: len(answer["output"])]).max()) for answer in answers]
        report["codes"]["output_difference"] = max(apart) / scale
    served = [
        {
            "seed": SEED,
            "batch": batch,
            "output": references[:batch].tolist(),
            "allowed": tolerance["served"] * scale,
            "flips": [changes.astype(np.float32).tolist() for changes in flips[:batch]],
        }
        for batch in batches
        if request[:batch].nbytes <= LARGEST_REQUEST
    ]
    result = {
        "model": entry["name"],
        "difference": difference,
        "tolerance": tolerance["output"],
        "batches": batches,
        "scale": scale,
        **report,
        "served": served,
    }
    if entry["family"] == "bpr":
        from convertation.bpr import check_bpr

        series = check_bpr.check(checkpoint, entry, onnx)
        judge.within("score of the series", series["difference"], series["scale"])
        result |= series | {"difference": max(result["difference"], series["difference"])}
    return result


def network_input(entry: dict[str, Any], batch: int) -> NDArray[np.float32]:
    """`batch` seeded samples as the network takes them; of BPR's series slices from bottom to top."""
    if entry["family"] != "bpr":
        return sample(entry, SEED, batch)["input"]
    from convertation.bpr.bpreg import preprocess

    request = sample(entry, SEED, 1)
    slices = preprocess(request["input"][0], request["metadata"][0], side=entry["input"][-1])
    spread: NDArray[np.float32] = slices[np.linspace(0, len(slices) - 1, batch).astype(int)]
    return spread


def ask(
    judge: Judge, request: NDArray[np.float32], batches: list[int], inner: tuple[str, ...]
) -> list[dict[str, Array]]:
    """ONNX Runtime's answer to the first samples of `request`, per batch: `output` and the values named in `inner`."""
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
    except Exception as error:  # ONNX Runtime's own have no common class
        if type(error).__module__.split(".")[0] != "onnxruntime" and not isinstance(error, ValueError):
            raise
        judge.fail(f"ONNX Runtime does not run it: {str(error).splitlines()[0]}", "the file is no export of this model")
    return answers


def open_session(onnx: Path, inner: tuple[str, ...] = ()) -> onnxruntime.InferenceSession:
    """A session on the CPU whose outputs are the file's and the values inside its graph that are named in `inner`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is said by who asks, in one line
    options.enable_cpu_mem_arena = False  # an arena's gigabyte would stay while PyTorch runs
    # A protobuf message may come in pieces: with one more, the values inside the graph are outputs too. The copy lives
    # in memory, and only until it is read.
    with os.fdopen(os.memfd_create("model"), "wb") as copy:
        with onnx.open("rb") as file:
            while os.sendfile(copy.fileno(), file.fileno(), None, 1 << 30):
                pass
        copy.seek(0, os.SEEK_END)
        outputs = [ValueInfoProto(name=name) for name in inner]
        copy.write(ModelProto(graph=GraphProto(output=outputs)).SerializeToString())
        copy.flush()
        return onnxruntime.InferenceSession(f"/proc/self/fd/{copy.fileno()}", options, ["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in "checkpoint", "entry", "tolerance", "onnx", "out":
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    entry, tolerance = json.loads(given.entry.read_text()), json.loads(given.tolerance.read_text())
    result = compare(given.checkpoint, entry, tolerance, given.onnx)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    difference, allowed = result["difference"], result["tolerance"]
    print(f"{entry['name']}: differs from PyTorch by {difference:.1e} of its scale, allowed {allowed:g}")


if __name__ == "__main__":
    main()
