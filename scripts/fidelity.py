"""How far each hop moves the answers, and what of it reaches a decision: PyTorch, ONNX, fp16, plan, served.

    python -m scripts.fidelity --weights synthetic pytorch/vit=CHECKPOINT onnx/vit=build/onnx/vit.onnx …
        fp16/vit=… plan/GPU/vit=… served/vit_onnx/1/model.onnx=build/onnx/vit.onnx … build/fidelity.json

HOP/MODEL=FILE, for the ViT and each head; served/FILE=SOURCE as in scripts/verdict.py.  Every hop gets the same seeded
CT-like volumes, other ones than the build's checks; its own heads answer on its own embeddings.  It measures, and
refuses nothing: the gates are scripts/compare.py and scripts/verdict.py.
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
from convertation.vit import check_vit, ctvit
from scripts.check_repository import read_config, read_without_weights
from scripts.compare import Judge, open_session
from scripts.probabilities import changed, probabilities, unit
from scripts.sample import sample
from scripts.served import serving
from scripts.verdict import stage, without_flips

Array = NDArray[Any]
Files = dict[str, Path]

VOLUMES = 8
FIRST_SEED = 1  # 0 is what the build's own checks ask
STAGING, LOG = Path("build/staging-fidelity"), Path("build/logs/fidelity.log")
EDGES = np.arange(-10, 0.01, 0.25)  # of the histograms: log10; what is smaller or 0 counts in the first bin
EXPLAINED = 1e-5  # of the scale: far above rounding, far below the 5e-3 that one code of 13,824 makes
LISTED = 1000  # margins of flipped codes, the widest first
HOUNSFIELD = {"air and padding": (-1001, -950), "lung": (-950, -500), "soft tissue": (-200, 200), "bone": (300, 1001)}
NO_PLAN = {"cpu": "no GPU on this machine", "image": "only an image with a GPU serves a plan; make fidelity IMAGE=…"}


class Answers(NamedTuple):
    """Of one hop, for all volumes."""

    embedding: Array  # (volumes, output)
    codes: Array | None  # (volumes, tokens); None: they lie inside and cannot be seen
    probabilities: dict[str, Array]  # head: (volumes, findings)


class Hop(NamedTuple):
    name: str
    against: str
    answers: Answers | None
    absent: str = ""  # why there are no answers


def fidelity(
    hops: dict[str, Files], contents: Sequence[str], entries: dict[str, Any], gpu: bool, image: str | None
) -> dict[str, Any]:
    """What OUT holds.  `hops`: files by hop and model; `contents`: what the served repository is made of.

    One hop after the other, each gone before the next comes: the ViT's weights lie in memory once.
    """
    heads = [name for name, entry in entries.items() if entry["family"] == "head"]
    batch = entries["vit"]["batch"][-1]
    one, many = (f"ONNX, batch {size}" for size in (1, batch))
    found = [
        Hop(one, "PyTorch", by_onnx_runtime(one, hops["onnx"], {}, entries, 1)),
        Hop(many, one, by_onnx_runtime(many, hops["onnx"], {}, entries, batch)),
    ]
    name = "fp16 on a CPU: rounded weights"
    if "vit" in hops.get("fp16", {}):
        found.append(Hop(name, "PyTorch", by_onnx_runtime(name, hops["fp16"], hops["onnx"], entries, 1)))
    else:
        found.append(Hop(name, "PyTorch", None, "not built: make onnx PRECISION=fp16"))
    seen = {hop.name: hop.answers.codes for hop in found if hop.answers}
    pairs = {hop.name: (seen.get(hop.against), hop.answers.codes) for hop in found if hop.answers}
    exact, flips, ties, shared = by_pytorch(hops["pytorch"], entries, pairs)
    found += [by_plan(key, hops[key], entries, heads, gpu, image) for key in hops if key.startswith("plan/")]
    if not any(key.startswith("plan/") for key in hops):
        found.append(Hop("plan", "PyTorch", None, "not built: make trt, where there is a GPU"))
    found.append(by_repository(contents, entries, heads, gpu, image))
    answers = {"PyTorch": exact} | {hop.name: hop.answers for hop in found if hop.answers}
    scale = float(np.abs(exact.embedding).max())
    return {
        "volumes": VOLUMES,
        "seeds": [FIRST_SEED, FIRST_SEED + VOLUMES - 1],
        "scale": scale,
        "edges": [round(float(edge), 2) for edge in EDGES],
        **shared,
        "probabilities": {head: listed(values) for head, values in exact.probabilities.items()},
        "hops": [
            {"hop": hop.name, "against": hop.against}
            | (
                measured(answers[hop.against], hop.answers, scale, flips.get(hop.name), ties, shared["rounding"])
                if hop.answers
                else {"absent": hop.absent}
            )
            for hop in found
        ],
    }


def measured(
    before: Answers, after: Answers, scale: float, flips: list[list[float]] | None, ties: list[Array], rounding: float
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
            "histogram": histogram(apart),
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
            "histogram": histogram(np.array(margins)),
        }
    else:
        rests = [
            without_flips(row, changes, EXPLAINED * scale)
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
            "values": listed(after.probabilities[head]),
            "changed": changed(values, after.probabilities[head]),
        }
        for head, values in before.probabilities.items()
        if head in after.probabilities
    }
    return result


def histogram(values: Array) -> list[int]:
    if not values.size:
        return [0] * (len(EDGES) - 1)
    counts, _ = np.histogram(np.log10(np.clip(values, 10.0 ** EDGES[0], 1.0)), bins=EDGES)
    return [int(count) for count in counts]


def listed(values: Array) -> list[list[float]]:
    return [[float(value) for value in row] for row in values]


def volumes(entry: dict[str, Any], numbers: Sequence[int]) -> NDArray[np.float32]:
    """(len(numbers), 1, frames, height, width), the seeded volumes of these numbers, counted from 0."""
    request = np.empty((len(numbers), *entry["input"]), np.float32)
    for place, number in enumerate(numbers):
        request[place] = sample(entry, FIRST_SEED + number, 1)["input"][0]
    return request


def batches(title: str, size: int) -> Iterator[list[int]]:
    for start in range(0, VOLUMES, size):
        numbers = list(range(start, min(start + size, VOLUMES)))
        print(f"  {title}: {'volumes' if len(numbers) > 1 else 'volume'} ", end="")
        print(f"{'–'.join(str(number + 1) for number in sorted({numbers[0], numbers[-1]}))} of {VOLUMES}", flush=True)
        yield numbers


def by_onnx_runtime(title: str, files: Files, otherwise: Files, entries: dict[str, Any], size: int) -> Answers:
    """ONNX Runtime on the CPU; a head that `files` lacks is taken from `otherwise`."""
    path = files["vit"]
    graph = read_without_weights(path)[0].graph
    inner = tuple(name for node in graph.node for name in node.output if name == "codes")
    embedding, codes = [], []
    try:
        session = open_session(path, inner)
        for numbers in batches(title, size):
            answer = session.run(["output", *inner], {"input": volumes(entries["vit"], numbers)})
            embedding.append(answer[0])
            codes += [one.reshape(len(numbers), -1) for one in answer[1:]]
        del session
        embeddings, scores = np.concatenate(embedding), {}
        for head in (name for name, entry in entries.items() if entry["family"] == "head"):
            path = files[head] if head in files else otherwise[head]
            (logits,) = open_session(path).run(["output"], {"input": unit(embeddings)})
            scores[head] = probabilities(logits)
    except Exception as error:  # ONNX Runtime's own have no common class
        if type(error).__module__.split(".")[0] != "onnxruntime":
            raise
        raise SystemExit(f"{path}: ONNX Runtime does not run it: {str(error).splitlines()[0]}; make onnx") from None
    return Answers(embeddings, np.concatenate(codes) if codes else None, scores)


def by_pytorch(
    files: Files, entries: dict[str, Any], pairs: dict[str, tuple[Array | None, Array | None]]
) -> tuple[Answers, dict[str, list[list[float]]], list[Array], dict[str, Any]]:
    """The network as trained; for each pair of codes (None on the left: PyTorch's) the margins of those that differ.

    The margin is between the cosines of PyTorch's token, in float64, with both codebook rows.  Then, per volume, what
    each near tie would change if it fell the other way (check_vit.near_ties).  And what all tokens have in common:
    `token_margins`, the histogram of best minus second cosine; `rounding`, up to which margin float32 explains a flip;
    and the share of each tissue in the volumes.
    """
    network = ctvit.load(files["vit"], entries["vit"])
    judge = Judge(files["vit"], "vit", math.inf)  # asked, and never to judge
    flips: dict[str, list[list[float]]] = {name: [] for name, (_, right) in pairs.items() if right is not None}
    embedding, codes, ties, margins = [], [], [], np.zeros(len(EDGES) - 1, np.int64)
    tissue, rounding = dict.fromkeys(HOUNSFIELD, 0.0), 0.0
    with torch.inference_mode():
        for (number,) in batches("PyTorch", 1):
            volume = volumes(entries["vit"], [number])
            for name, (low, high) in HOUNSFIELD.items():
                tissue[name] += float(((volume >= low / 1000) & (volume < high / 1000)).mean()) / VOLUMES
            tokens = network.encode(torch.from_numpy(volume))
            del volume
            exact = network.quantise(tokens)
            embedding.append(network.project(exact).numpy())
            codes.append(exact.numpy().reshape(1, -1))
            all_tokens = check_vit.measure(network, tokens, [])
            margins += histogram(all_tokens.margins.numpy())
            rounding = max(rounding, all_tokens.limit)
            ties.append(check_vit.near_ties(network, tokens, exact, all_tokens))
            for name in flips:
                left, right = pairs[name]
                before, after = (
                    exact if side is None else torch.from_numpy(side[number]).view_as(exact) for side in (left, right)
                )
                flips[name].append(check_vit.flips(network, tokens, before, after, math.inf, name, judge))
        del network
        embeddings, scores = np.concatenate(embedding), {}
        for head, entry in entries.items():
            if entry["family"] == "head":
                logits = mlp.load(files[head], entry)(torch.from_numpy(unit(embeddings)))
                scores[head] = probabilities(logits.numpy())
    shared = {
        "rounding": rounding,
        "token_margins": [int(count) for count in margins],
        "tissue": {name: round(share, 4) for name, share in tissue.items()},
    }
    return Answers(embeddings, np.concatenate(codes), scores), flips, ties, shared


def by_plan(key: str, files: Files, entries: dict[str, Any], heads: list[str], gpu: bool, image: str | None) -> Hop:
    """The plans of one kind of GPU, each served by the image's Triton; a head that has none is left out."""
    name = key.replace("/", " ")
    if not gpu or not image:
        return Hop(name, "PyTorch", None, NO_PLAN["image" if gpu else "cpu"])
    if "vit" not in files:
        return Hop(name, "PyTorch", None, "no plan of the ViT: make trt")
    contents = []
    for model, plan in files.items():
        config = STAGING.with_name("fidelity-plans") / f"{model}.pbtxt"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(plan_config(entries[model]))
        contents += [f"{model}_plan/config.pbtxt={config}", f"{model}_plan/1/model.plan={plan}"]
    return by_repository(contents, entries, heads, gpu, image, name)


def plan_config(entry: dict[str, Any]) -> str:
    """The config.pbtxt of a plan that is served for this measurement alone."""
    return (
        f'name: "{entry["name"]}_plan" platform: "tensorrt_plan" max_batch_size: {entry["batch"][-1]}\n'
        f'input [{{ name: "input" data_type: TYPE_FP32 dims: {entry["input"]} }}]\n'
        f'output [{{ name: "output" data_type: TYPE_FP32 dims: {entry["output"]} }}]\n'
        "instance_group [{ count: 1 kind: KIND_GPU }]\n"
    )


def by_repository(
    contents: Sequence[str],
    entries: dict[str, Any],
    heads: list[str],
    gpu: bool,
    image: str | None,
    name: str = "served",
) -> Hop:
    """The real Triton on what is published, asked as the client asks: volumes one by one, then each head once."""
    stage(contents, STAGING)
    names = {path.name.rpartition("_")[0]: path.name for path in STAGING.iterdir()}
    plans = [path for path in STAGING.iterdir() if read_config(path / "config.pbtxt").platform == "tensorrt_plan"]
    if plans and not (gpu and image):
        return Hop(name, "PyTorch", None, NO_PLAN["image" if gpu else "cpu"])
    with serving(STAGING, LOG, image=image) as ask:
        embeddings = np.concatenate(
            [ask(names["vit"], {"input": volumes(entries["vit"], numbers)}) for numbers in batches(name, 1)]
        )
        scores = {}
        for head in (head for head in heads if head in names):
            size = entries[head]["batch"][-1]
            parts = [unit(embeddings)[start : start + size] for start in range(0, VOLUMES, size)]
            scores[head] = probabilities(np.concatenate([ask(names[head], {"input": part}) for part in parts]))
    return Hop(name, "PyTorch", Answers(embeddings, None, scores))


def parse(words: Sequence[str]) -> tuple[dict[str, Files], list[str]]:
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
    parser.add_argument("files", nargs="+", metavar="HOP/MODEL=FILE")
    parser.add_argument("out", type=Path, metavar="OUT")
    given = parser.parse_args(argv)
    hops, contents = parse(given.files)
    entries = {name: json.loads((given.models / f"{name}.json").read_text()) for name in hops["pytorch"]}
    try:
        result = fidelity(hops, contents, entries, given.gpu, given.image or None)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    given.out.write_text(json.dumps({"weights": given.weights, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
