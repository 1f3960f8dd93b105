"""Measure how far each hop moves the answers, and how many decisions change: PyTorch, ONNX, fp16, plan, served.

    python -m scripts.show.fidelity --weights synthetic [--deployed PYTHON] pytorch/vit=CHECKPOINT
        onnx/vit=build/onnx/vit.onnx … fp16/vit=… plan/GPU/vit=…
        served/vit_onnx/1/model.onnx=build/onnx/vit.onnx … build/fidelity.json

HOP/MODEL=FILE is given for the ViT and each head; served/FILE=SOURCE as in scripts/serve/verdict.py. Every hop gets the
same seeded CT-like volumes, not those of the build's checks. The heads of a hop get the embeddings of the same hop.
This program only measures. The limits are enforced by scripts/convert/compare.py and scripts/serve/verdict.py.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.convert.emulate_fp16 import emulated_file
from scripts.convert.probabilities import find_changed
from scripts.convert.ties import remove_flips
from scripts.show.hops import (
    EDGES,
    FIRST_SEED,
    VOLUMES,
    Answers,
    Array,
    Files,
    Hop,
    Task,
    count_values,
    draw_volumes,
    run_deployed,
    run_onnxruntime,
    run_plan,
    run_pytorch,
    run_repository,
)

EXPLAINED = 1e-5  # relative to the scale: far above rounding, far below the 5e-3 that one flip of 13,824 codes makes
LISTED = 1000  # margins of flipped codes in the report, the widest first
TISSUE = {"air and padding": (-1000, -950), "lung": (-950, -500), "soft tissue": (-200, 200), "bone": (300, 1001)}  # HU


def measure_fidelity(hops: dict[str, Files], contents: Sequence[str], task: Task) -> dict[str, Any]:
    """Return the content of OUT. `hops`: files by hop and model; `contents`: FILE=SOURCE of the served repository.

    The hops run one after the other, and each frees its memory first: the ViT's weights are in memory only once.
    """
    batch = task.entries["vit"]["batch"][-1]
    one, many, rounded = "ONNX, batch 1", f"ONNX, batch {batch}", "fp16 as a GPU rounds it"
    first = run_onnxruntime(task, one, hops["onnx"], 1, ("tokens", "codes"))
    measured = [
        Hop(one, "PyTorch", first),
        Hop(many, one, run_onnxruntime(task, many, hops["onnx"], batch)),
        *(run_deployed(task, python, hops["onnx"]) for python in task.deployed),
    ]
    if "vit" in hops.get("fp16", {}):
        with emulated_file(hops["fp16"]["vit"]) as file:
            measured.append(Hop(rounded, "PyTorch", run_onnxruntime(task, rounded, hops["onnx"] | {"vit": file}, 1)))
    else:
        measured.append(Hop(rounded, "PyTorch", None, "not built: make onnx PRECISION=fp16"))
    codes = {hop.name: hop.answers.codes for hop in measured if hop.answers}
    pairs = {hop.name: (codes.get(hop.against), hop.answers.codes) for hop in measured if hop.answers}
    exact, flips, ties, shared = run_pytorch(task, hops["pytorch"], pairs, first.tokens)
    measured += [run_plan(task, key, hops[key]) for key in hops if key.startswith("plan/")]
    if not any(key.startswith("plan/") for key in hops):
        measured.append(Hop("plan", "PyTorch", None, "not built: make trt on a machine with a GPU"))
    measured.append(run_repository(task, contents))
    answers = {"PyTorch": exact} | {hop.name: hop.answers for hop in measured if hop.answers}
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
        "probabilities": {head: convert_to_lists(values) for head, values in exact.probabilities.items()},
        "hops": [
            {"hop": hop.name, "against": hop.against}
            | (
                measure_hop(answers[hop.against], hop.answers, scale, flips.get(hop.name), ties, shared["rounding"])
                if hop.answers
                else {"absent": hop.absent}
            )
            for hop in measured
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
    """Return the differences between two hops. `flips`: per volume, the margins of the codes that differ.

    If `flips` is None, the codes cannot be seen. Then `ties` (per volume, what each near tie would add to the
    embedding) tells how many near ties explain the difference, and what remains: an embedding is linear in the codes.
    """
    if bad := int(after.embedding.size - np.isfinite(after.embedding).sum()):
        words = f"{bad} of {after.embedding.size} values of the embeddings are NaN or infinite"
        return {"broken": f"{words}: the computation overflows"}
    apart = np.abs(after.embedding.astype(np.float64) - before.embedding) / scale
    left, right = (side.embedding / np.linalg.norm(side.embedding, axis=1, keepdims=True) for side in (before, after))
    result: dict[str, Any] = {
        "embedding": {
            "max": float(apart.max()),
            "p999": float(np.quantile(apart, 0.999)),
            "per_volume": [float(volume.max()) for volume in apart],
            "histogram": count_values(apart),
        },
        # 1 - cosine of unit vectors, computed so that the subtraction loses no digits
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
            "values": convert_to_lists(after.probabilities[head]),
            "changed": find_changed(values, after.probabilities[head]),
        }
        for head, values in before.probabilities.items()
        if head in after.probabilities
    }
    return result


def convert_to_lists(values: Array) -> list[list[float]]:
    return [[float(value) for value in row] for row in values]


def parse_files(words: Sequence[str]) -> tuple[dict[str, Files], list[str]]:
    """Split the words HOP/MODEL=FILE into files by hop and model, and the FILE=SOURCE of the served repository."""
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
    parser.add_argument("--gpu", action="store_true", help="this machine has a GPU")
    parser.add_argument("--image", help="serve with the Triton of this image, in Docker")
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
