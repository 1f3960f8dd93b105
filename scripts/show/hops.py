"""Get the answers of each hop of `make fidelity` to the seeded volumes: PyTorch, ONNX Runtime, a plan, Triton."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from convertation.head import mlp
from convertation.vit import ctvit
from scripts.convert import compare_vit
from scripts.convert.compare import ask_deployed, open_session
from scripts.convert.judge import Judge
from scripts.convert.probabilities import compute_probabilities, normalise_rows
from scripts.convert.sample import make_sample
from scripts.serve.model_config import read_config
from scripts.serve.onnx_headers import read_without_weights
from scripts.serve.triton_client import serve_models
from scripts.serve.verdict import stage_files

Array = NDArray[Any]
Files = dict[str, Path]
Volumes = list[NDArray[np.int16]]

VOLUMES = 8
FIRST_SEED = 1  # the build's own checks use seed 0
STAGING, LOG = Path("build/staging-fidelity"), Path("build/logs/fidelity.log")
EDGES = np.arange(-10, 0.01, 0.25)  # log10 edges of the histograms; smaller values and 0 count in the first bin
NO_PLAN = {"cpu": "no GPU on this machine", "image": "only an image's Triton serves a plan: make fidelity IMAGE=…"}


class Task(NamedTuple):
    """What every hop gets."""

    entries: dict[str, Any]  # entries of models.yaml for the ViT and the heads
    volumes: Volumes
    gpu: bool = False  # whether this machine has one
    image: str | None = None  # the image whose Triton serves
    deployed: Sequence[Path] = ()  # Pythons whose ONNX Runtime is a hop, too

    @property
    def heads(self) -> list[str]:
        return [name for name, entry in self.entries.items() if entry["family"] == "head"]


class Answers(NamedTuple):
    """The answers of one hop to all volumes."""

    embedding: Array  # (volumes, output)
    codes: Array | None  # (volumes, tokens); None: this hop does not give them out
    probabilities: dict[str, Array]  # head: (volumes, findings)
    tokens: Array | None = None  # (volumes, t, h, w, d), if they were asked for


class Hop(NamedTuple):
    name: str
    against: str  # the name of the hop that it is compared with
    answers: Answers | None
    absent: str = ""  # why there are no answers


def draw_volumes(entry: dict[str, Any]) -> Volumes:
    """Return the seeded volumes, int16 (1, frames, height, width) HU each. HU are whole, so nothing is lost."""
    drawn = []
    for (number,) in iterate_batches("drawing", 1):
        drawn.append(np.rint(make_sample(entry, FIRST_SEED + number, 1)["input"][0] * 1000).astype(np.int16))
    return drawn


def make_request(task: Task, numbers: Sequence[int]) -> NDArray[np.float32]:
    """Return the volumes of these numbers as the ViT takes them: (n, 1, frames, height, width), HU / 1000."""
    filled = np.empty((len(numbers), *task.volumes[0].shape), np.float32)
    for place, number in zip(filled, numbers, strict=True):
        np.divide(task.volumes[number], 1000, out=place, casting="same_kind")
    return filled


def iterate_batches(title: str, size: int) -> Iterator[list[int]]:
    """Yield the numbers of the volumes in batches of `size`, and print the progress."""
    for start in range(0, VOLUMES, size):
        numbers = list(range(start, min(start + size, VOLUMES)))
        print(f"  {title}: {'volumes' if len(numbers) > 1 else 'volume'} ", end="")
        print(f"{'–'.join(str(number + 1) for number in sorted({numbers[0], numbers[-1]}))} of {VOLUMES}", flush=True)
        yield numbers


def run_onnxruntime(task: Task, title: str, files: Files, size: int, inner: tuple[str, ...] = ("codes",)) -> Answers:
    """Ask ONNX Runtime on the CPU, in batches of `size`. Of the values in `inner`, take those in the ViT's graph."""
    path = files["vit"]
    inside = {name for node in read_without_weights(path)[0].graph.node for name in node.output}
    inner = tuple(name for name in inner if name in inside)
    found: dict[str, list[Array]] = {name: [] for name in ("output", *inner)}
    try:
        session = open_session(path, inner)
        for numbers in iterate_batches(title, size):
            for name, values in zip(
                found, session.run(list(found), {"input": make_request(task, numbers)}), strict=True
            ):
                found[name].append(values)
        del session
        whole = {name: np.concatenate(values) for name, values in found.items()}
        embeddings, scores = whole["output"], {}
        for head in task.heads:
            path = files[head]
            (logits,) = open_session(path).run(["output"], {"input": normalise_rows(embeddings)})
            scores[head] = compute_probabilities(logits)
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        if type(error).__module__.split(".")[0] != "onnxruntime":
            raise
        raise SystemExit(
            f"{path}: ONNX Runtime does not run it: {str(error).splitlines()[0]}; next: make onnx"
        ) from None
    codes = whole["codes"].reshape(VOLUMES, -1) if "codes" in whole else None
    return Answers(embeddings, codes, scores, whole.get("tokens"))


def run_deployed(task: Task, python: Path, files: Files) -> Hop:
    """Ask the ONNX Runtime of another environment, such as that of `make infer`, one volume at a time."""
    where = python.absolute().parents[1].name
    judge = Judge(files["vit"], "vit", math.inf)  # an infinite tolerance: no difference ends the measurement
    parts = [
        ask_deployed(judge, make_request(task, numbers), python, ("codes",)) for numbers in iterate_batches(where, 1)
    ]
    embeddings, codes = (np.concatenate([part.values[name] for part in parts]) for name in ("output", "codes"))
    scores = {}
    for head in task.heads:
        answer = ask_deployed(judge._replace(onnx=files[head], family="head"), normalise_rows(embeddings), python, ())
        scores[head] = compute_probabilities(answer.values["output"])
    name = parts[0].name.removeprefix("by ").removesuffix(" as deployed")
    return Hop(f"{name} of {where}", "PyTorch", Answers(embeddings, codes.reshape(VOLUMES, -1), scores))


def run_pytorch(
    task: Task, files: Files, pairs: dict[str, tuple[Array | None, Array | None]], theirs: Array | None = None
) -> tuple[Answers, dict[str, list[list[float]]], list[list[Array]], dict[str, Any]]:
    """Ask the network as trained. Return its answers, flips, near ties, and figures about all tokens.

    Flips: for each of `pairs` (codes of two hops; None on the left: PyTorch's), per volume, the margins of the codes
    that differ. A margin is the difference between the cosines of PyTorch's token, in float64, with both codebook rows.
    Near ties: per volume, what each would add to the embedding if the other row were picked
    (compare_vit.find_near_ties).
    Figures: `token_margins`, the histogram of best minus second cosine; `rounding`, the largest margin of a flip that
    float32 explains, on PyTorch's tokens and on `theirs`, computed as in scripts/convert/compare.py.
    """
    network = ctvit.load_network(files["vit"], task.entries["vit"])
    judge = Judge(files["vit"], "vit", math.inf)  # an infinite tolerance: no difference ends the measurement
    flips: dict[str, list[list[float]]] = {name: [] for name, (_, right) in pairs.items() if right is not None}
    embedding, codes, ties, margins = [], [], [], np.zeros(len(EDGES) - 1, np.int64)
    rounding = 0.0
    with torch.inference_mode():
        for (number,) in iterate_batches("PyTorch", 1):
            tokens = network.encode(torch.from_numpy(make_request(task, [number])))
            exact = network.quantise(tokens)
            embedding.append(network.project(exact).numpy())
            codes.append(exact.numpy().reshape(1, -1))
            others = [] if theirs is None else [torch.from_numpy(theirs[number : number + 1])]
            all_tokens = compare_vit.measure_cosines(network, tokens, others)
            margins += count_values(all_tokens.margins.numpy())
            rounding = max(rounding, all_tokens.limit)
            ties.append(compare_vit.find_near_ties(network, tokens, exact, all_tokens))
            for name in flips:
                left, right = pairs[name]
                before, after = (
                    exact if side is None else torch.from_numpy(side[number]).view_as(exact) for side in (left, right)
                )
                flips[name].append(compare_vit.find_flips(network, tokens, before, after, math.inf, name, judge))
        del network
        embeddings, scores = np.concatenate(embedding), {}
        for head in task.heads:
            logits = mlp.load_network(files[head], task.entries[head])(torch.from_numpy(normalise_rows(embeddings)))
            scores[head] = compute_probabilities(logits.numpy())
    shared = {
        "rounding": rounding,
        "token_margins": [int(count) for count in margins],
    }
    return Answers(embeddings, np.concatenate(codes), scores), flips, ties, shared


def run_plan(task: Task, key: str, files: Files) -> Hop:
    """Ask the plans for one kind of GPU, served by the image's Triton. A head without a plan is left out."""
    name = key.replace("/", " ")
    if not task.gpu or not task.image:
        return Hop(name, "PyTorch", None, NO_PLAN["image" if task.gpu else "cpu"])
    if "vit" not in files:
        return Hop(name, "PyTorch", None, "the ViT has no plan: make trt")
    contents = []
    for model, plan in files.items():
        config = STAGING.with_name("fidelity-plans") / f"{model}.pbtxt"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(make_plan_config(task.entries[model]))
        contents += [f"{model}_plan/config.pbtxt={config}", f"{model}_plan/1/model.plan={plan}"]
    return run_repository(task, contents, name)


def make_plan_config(entry: dict[str, Any]) -> str:
    """Return the config.pbtxt of a plan that is served only for this measurement."""
    return (
        f'name: "{entry["name"]}_plan" platform: "tensorrt_plan" max_batch_size: {entry["batch"][-1]}\n'
        f'input [{{ name: "input" data_type: TYPE_FP32 dims: {entry["input"]} }}]\n'
        f'output [{{ name: "output" data_type: TYPE_FP32 dims: {entry["output"]} }}]\n'
        "instance_group [{ count: 1 kind: KIND_GPU }]\n"
    )


def run_repository(task: Task, contents: Sequence[str], name: str = "served") -> Hop:
    """Ask the real Triton, serving `contents`, as the client asks: one volume at a time, then each head."""
    stage_files(contents, STAGING)
    names = {path.name.rpartition("_")[0]: path.name for path in STAGING.iterdir()}
    plans = [path for path in STAGING.iterdir() if read_config(path / "config.pbtxt").platform == "tensorrt_plan"]
    if plans and not (task.gpu and task.image):
        return Hop(name, "PyTorch", None, NO_PLAN["image" if task.gpu else "cpu"])
    with serve_models(STAGING, LOG, image=task.image) as ask:
        parts = [ask(names["vit"], {"input": make_request(task, numbers)}) for numbers in iterate_batches(name, 1)]
        embeddings, scores = np.concatenate(parts), {}
        for head in (head for head in task.heads if head in names):
            size = task.entries[head]["batch"][-1]
            rows = [normalise_rows(embeddings)[start : start + size] for start in range(0, VOLUMES, size)]
            scores[head] = compute_probabilities(np.concatenate([ask(names[head], {"input": part}) for part in rows]))
    return Hop(name, "PyTorch", Answers(embeddings, None, scores))


def count_values(values: Array) -> list[int]:
    """Return the counts of `values` in the bins of EDGES."""
    if not values.size:
        return [0] * (len(EDGES) - 1)
    counts, _ = np.histogram(np.log10(np.clip(values, 10.0 ** EDGES[0], 1.0)), bins=EDGES)
    return [int(count) for count in counts]
