"""How far each hop moves the answers, and what of it reaches a decision: PyTorch, ONNX, fp16, plan, served.

    python -m scripts.show.fidelity --weights synthetic [--deployed PYTHON] pytorch/vit=CHECKPOINT
        onnx/vit=build/onnx/vit.onnx … fp16/vit=… plan/GPU/vit=…
        served/vit_onnx/1/model.onnx=build/onnx/vit.onnx … build/fidelity.json

HOP/MODEL=FILE, for the ViT and each head; served/FILE=SOURCE as in scripts/serve/verdict.py.  Every hop gets the same
seeded CT-like volumes, other ones than the build's checks; its own heads answer on its own embeddings.  It measures,
and refuses nothing: the gates are scripts/convert/compare.py and scripts/serve/verdict.py.
"""

import argparse
import json
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
from scripts.convert.emulate_fp16 import emulated_file
from scripts.convert.judge import Judge
from scripts.convert.probabilities import compute_probabilities, find_changed, normalise_rows
from scripts.convert.sample import make_sample
from scripts.convert.ties import remove_flips
from scripts.serve.model_config import read_config
from scripts.serve.onnx_headers import read_without_weights
from scripts.serve.triton_client import serve_models
from scripts.serve.verdict import stage_files

Array = NDArray[Any]
Files = dict[str, Path]
Volumes = list[NDArray[np.int16]]

VOLUMES = 8
FIRST_SEED = 1  # 0 is what the build's own checks ask
STAGING, LOG = Path("build/staging-fidelity"), Path("build/logs/fidelity.log")
EDGES = np.arange(-10, 0.01, 0.25)  # of the histograms: log10; what is smaller or 0 counts in the first bin
EXPLAINED = 1e-5  # of the scale: far above rounding, far below the 5e-3 that one code of 13,824 makes
LISTED = 1000  # margins of flipped codes, the widest first
TISSUE = {"air and padding": (-1000, -950), "lung": (-950, -500), "soft tissue": (-200, 200), "bone": (300, 1001)}  # HU
NO_PLAN = {"cpu": "no GPU on this machine", "image": "only an image with a GPU serves a plan; make fidelity IMAGE=…"}


class Task(NamedTuple):
    """What every hop is given."""

    entries: dict[str, Any]  # of the ViT and the heads
    volumes: Volumes
    gpu: bool = False
    image: str | None = None  # whose Triton serves
    deployed: Sequence[Path] = ()  # Pythons whose ONNX Runtime answers too

    @property
    def heads(self) -> list[str]:
        return [name for name, entry in self.entries.items() if entry["family"] == "head"]


class Answers(NamedTuple):
    """Of one hop, for all volumes."""

    embedding: Array  # (volumes, output)
    codes: Array | None  # (volumes, tokens); None: they lie inside and cannot be seen
    probabilities: dict[str, Array]  # head: (volumes, findings)
    tokens: Array | None = None  # (volumes, t, h, w, d), where they were asked for


class Hop(NamedTuple):
    name: str
    against: str
    answers: Answers | None
    absent: str = ""  # why there are no answers


def measure_fidelity(hops: dict[str, Files], contents: Sequence[str], task: Task) -> dict[str, Any]:
    """What OUT holds.  `hops`: files by hop and model; `contents`: what the served repository is made of.

    One hop after the other, each gone before the next comes: the ViT's weights lie in memory once.
    """
    batch = task.entries["vit"]["batch"][-1]
    one, many, rounded = "ONNX, batch 1", f"ONNX, batch {batch}", "fp16 as a GPU rounds it"
    first = run_onnxruntime(task, one, hops["onnx"], 1, ("tokens", "codes"))
    found = [
        Hop(one, "PyTorch", first),
        Hop(many, one, run_onnxruntime(task, many, hops["onnx"], batch)),
        *(run_deployed(task, python, hops["onnx"]) for python in task.deployed),
    ]
    if "vit" in hops.get("fp16", {}):
        with emulated_file(hops["fp16"]["vit"]) as file:
            found.append(Hop(rounded, "PyTorch", run_onnxruntime(task, rounded, hops["onnx"] | {"vit": file}, 1)))
    else:
        found.append(Hop(rounded, "PyTorch", None, "not built: make onnx PRECISION=fp16"))
    seen = {hop.name: hop.answers.codes for hop in found if hop.answers}
    pairs = {hop.name: (seen.get(hop.against), hop.answers.codes) for hop in found if hop.answers}
    exact, flips, ties, shared = run_pytorch(task, hops["pytorch"], pairs, first.tokens)
    found += [run_plan(task, key, hops[key]) for key in hops if key.startswith("plan/")]
    if not any(key.startswith("plan/") for key in hops):
        found.append(Hop("plan", "PyTorch", None, "not built: make trt, where there is a GPU"))
    found.append(run_repository(task, contents))
    answers = {"PyTorch": exact} | {hop.name: hop.answers for hop in found if hop.answers}
    scale = float(np.abs(exact.embedding).max())
    return {
        "volumes": VOLUMES,
        "seeds": [FIRST_SEED, FIRST_SEED + VOLUMES - 1],
        "scale": scale,
        "edges": [round(float(edge), 2) for edge in EDGES],
        "tissue": {
            name: round(float(np.mean([((low <= volume) & (volume < high)).mean() for volume in task.volumes])), 4)
            for name, (low, high) in TISSUE.items()
        },
        **shared,
        "probabilities": {head: as_lists(values) for head, values in exact.probabilities.items()},
        "hops": [
            {"hop": hop.name, "against": hop.against}
            | (
                measure_hop(answers[hop.against], hop.answers, scale, flips.get(hop.name), ties, shared["rounding"])
                if hop.answers
                else {"absent": hop.absent}
            )
            for hop in found
        ],
    }


def measure_hop(
    before: Answers,
    after: Answers,
    scale: float,
    flips: list[list[float]] | None,
    ties: Sequence[Sequence[Array]],
    rounding: float,
) -> dict[str, Any]:
    """What lies between two hops; `flips`: per volume the margins of the codes that differ, None: codes unseen.

    Then `ties`, per volume what each near tie would change, tell how many of them explain the difference, and what
    remains: an embedding is linear in the codes.
    """
    if bad := int(after.embedding.size - np.isfinite(after.embedding).sum()):
        return {"broken": f"{bad} of {after.embedding.size} values of the embeddings are NaN or infinite: it overflows"}
    apart = np.abs(after.embedding.astype(np.float64) - before.embedding) / scale
    left, right = (side.embedding / np.linalg.norm(side.embedding, axis=1, keepdims=True) for side in (before, after))
    result: dict[str, Any] = {
        "embedding": {
            "max": float(apart.max()),
            "p999": float(np.quantile(apart, 0.999)),
            "per_volume": [float(volume.max()) for volume in apart],
            "histogram": count_values(apart),
        },
        # 1 - cosine of unit vectors, without the digits that the subtraction would lose
        "cosine_distance": float((np.square(left - right, dtype=np.float64).sum(axis=1) / 2).max()),
        "codes": None,
        "near_ties": None,
    }
    if flips is not None and after.codes is not None:
        margins = sorted((margin for volume in flips for margin in volume), reverse=True)
        result["codes"] = {
            "compared": int(after.codes.size),
            "flipped": len(margins),
            "per_volume": [len(volume) for volume in flips],
            "beyond_rounding": sum(margin > rounding for margin in margins),
            "margins": margins[:LISTED],
            "histogram": count_values(np.array(margins)),
        }
    else:
        rests = [
            remove_flips(row, changes, EXPLAINED * scale)
            for row, changes in zip(after.embedding.astype(np.float64) - before.embedding, ties, strict=True)
        ]
        result["near_ties"] = {
            "explain": sum(count for _, count in rests),
            "per_volume": [count for _, count in rests],
            "remains": float(max(np.abs(rest).max() for rest, _ in rests) / scale),
        }
    result["probabilities"] = {
        head: {
            "max": float(np.abs(after.probabilities[head] - values).max()),
            "values": as_lists(after.probabilities[head]),
            "changed": find_changed(values, after.probabilities[head]),
        }
        for head, values in before.probabilities.items()
        if head in after.probabilities
    }
    return result


def count_values(values: Array) -> list[int]:
    if not values.size:
        return [0] * (len(EDGES) - 1)
    counts, _ = np.histogram(np.log10(np.clip(values, 10.0 ** EDGES[0], 1.0)), bins=EDGES)
    return [int(count) for count in counts]


def as_lists(values: Array) -> list[list[float]]:
    return [[float(value) for value in row] for row in values]


def draw_volumes(entry: dict[str, Any]) -> Volumes:
    """The seeded volumes, (1, frames, height, width) HU each: whole numbers, so that nothing is lost."""
    drawn = []
    for (number,) in iterate_batches("drawing", 1):
        drawn.append(np.rint(make_sample(entry, FIRST_SEED + number, 1)["input"][0] * 1000).astype(np.int16))
    return drawn


def make_request(task: Task, numbers: Sequence[int]) -> NDArray[np.float32]:
    """(n, 1, frames, height, width), HU / 1000, the volumes of these numbers as the ViT takes them."""
    filled = np.empty((len(numbers), *task.volumes[0].shape), np.float32)
    for place, number in zip(filled, numbers, strict=True):
        np.divide(task.volumes[number], 1000, out=place, casting="same_kind")
    return filled


def iterate_batches(title: str, size: int) -> Iterator[list[int]]:
    for start in range(0, VOLUMES, size):
        numbers = list(range(start, min(start + size, VOLUMES)))
        print(f"  {title}: {'volumes' if len(numbers) > 1 else 'volume'} ", end="")
        print(f"{'–'.join(str(number + 1) for number in sorted({numbers[0], numbers[-1]}))} of {VOLUMES}", flush=True)
        yield numbers


def run_onnxruntime(task: Task, title: str, files: Files, size: int, inner: tuple[str, ...] = ("codes",)) -> Answers:
    """ONNX Runtime on the CPU, the volumes in batches of `size`; of `inner`, the values that the ViT's graph names."""
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
    except Exception as error:  # ONNX Runtime's own have no common class
        if type(error).__module__.split(".")[0] != "onnxruntime":
            raise
        raise SystemExit(f"{path}: ONNX Runtime does not run it: {str(error).splitlines()[0]}; make onnx") from None
    codes = whole["codes"].reshape(VOLUMES, -1) if "codes" in whole else None
    return Answers(embeddings, codes, scores, whole.get("tokens"))


def run_deployed(task: Task, python: Path, files: Files) -> Hop:
    """The ONNX Runtime of another environment, such as `make infer`'s, volume by volume."""
    where = python.absolute().parents[1].name
    judge = Judge(files["vit"], "vit", math.inf)  # asked, and never to judge
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
    """The network as trained; for each pair of codes (None on the left: PyTorch's) the margins of those that differ.

    The margin is between the cosines of PyTorch's token, in float64, with both codebook rows.  Then, per volume, what
    each near tie would change if it fell the other way (compare_vit.near_ties).  And what all tokens have in common:
    `token_margins`, the histogram of best minus second cosine; `rounding`, up to which margin float32 explains a flip,
    on PyTorch's tokens and on `theirs`, as scripts/convert/compare.py has it.
    """
    network = ctvit.load_network(files["vit"], task.entries["vit"])
    judge = Judge(files["vit"], "vit", math.inf)  # asked, and never to judge
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
    """The plans of one kind of GPU, served by the image's Triton; a head that has none is left out."""
    name = key.replace("/", " ")
    if not task.gpu or not task.image:
        return Hop(name, "PyTorch", None, NO_PLAN["image" if task.gpu else "cpu"])
    if "vit" not in files:
        return Hop(name, "PyTorch", None, "no plan of the ViT: make trt")
    contents = []
    for model, plan in files.items():
        config = STAGING.with_name("fidelity-plans") / f"{model}.pbtxt"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(make_plan_config(task.entries[model]))
        contents += [f"{model}_plan/config.pbtxt={config}", f"{model}_plan/1/model.plan={plan}"]
    return run_repository(task, contents, name)


def make_plan_config(entry: dict[str, Any]) -> str:
    """The config.pbtxt of a plan that is served for this measurement alone."""
    return (
        f'name: "{entry["name"]}_plan" platform: "tensorrt_plan" max_batch_size: {entry["batch"][-1]}\n'
        f'input [{{ name: "input" data_type: TYPE_FP32 dims: {entry["input"]} }}]\n'
        f'output [{{ name: "output" data_type: TYPE_FP32 dims: {entry["output"]} }}]\n'
        "instance_group [{ count: 1 kind: KIND_GPU }]\n"
    )


def run_repository(task: Task, contents: Sequence[str], name: str = "served") -> Hop:
    """The real Triton on what is published, asked as the client asks: volumes one by one, then each head."""
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


def parse_files(words: Sequence[str]) -> tuple[dict[str, Files], list[str]]:
    """HOP/MODEL=FILE … -> files by hop and model, and the FILE=SOURCE of what is served."""
    hops: dict[str, Files] = {}
    contents = []
    for word in words:
        key, separator, file = word.partition("=")
        hop, slash, model = key.rpartition("/")
        if not separator or not slash:
            raise SystemExit(f"{word}: expected HOP/MODEL=FILE, such as onnx/vit=build/onnx/vit.onnx")
        if not Path(file).is_file():
            raise SystemExit(f"{file}: no such file, expected for {key}; make it with: make repository")
        if key.startswith("served/"):
            contents.append(word.removeprefix("served/"))
        else:
            hops.setdefault(hop, {})[model] = Path(file)
    return hops, contents


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=["synthetic", "real"], required=True)
    parser.add_argument("--models", type=Path, default=Path("build/models"), help="folder of the models' entries")
    parser.add_argument("--gpu", action="store_true", help="there is one here")
    parser.add_argument("--image", help="serve by this image's Triton, in Docker")
    parser.add_argument("--deployed", action="append", default=[], type=Path, metavar="PYTHON")
    parser.add_argument("files", nargs="+", metavar="HOP/MODEL=FILE")
    parser.add_argument("out", type=Path, metavar="OUT")
    given = parser.parse_args(argv)
    hops, contents = parse_files(given.files)
    entries = {name: json.loads((given.models / f"{name}.json").read_text()) for name in hops["pytorch"]}
    try:
        task = Task(entries, draw_volumes(entries["vit"]), given.gpu, given.image or None, given.deployed)
        result = measure_fidelity(hops, contents, task)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    given.out.write_text(json.dumps({"weights": given.weights, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
