"""Compare a plan with ONNX Runtime:

    python -m scripts.plans.compare_plan PLAN EXPECTED.npy ENTRY.json TOLERANCE.json CHECK.json OUT HEAD …

trtexec runs the plan on stored seeded inputs at the smallest, usual and largest batch; EXPECTED is what ONNX Runtime
answers to the same (scripts/plans/expected.py).  Compared are the output, of a ViT also the cosine of each embedding,
and the probabilities of the classes: of a ViT those that each HEAD, an ONNX file, makes of both embeddings.  Codes that
rounding may turn, as CHECK, the ONNX file's own comparison, says of each volume, are taken out first.  OUT, written
only if all are within the tolerance (models.yaml: gpu, cosine, probability), also holds the answers that a server with
a GPU must give.
"""

import argparse
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.convert import probabilities as client
from scripts.convert.sample import make_sample, plan_requests
from scripts.convert.ties import remove_flips
from scripts.plans import gpu, trtexec
from scripts.plans.expected import SEED, choose_samples, open_onnx
from scripts.steps.records import hash_file

Array = NDArray[Any]
NONE: dict[int, Any] = {}


def compare_answers(
    plan: Path,
    expected: Array,
    entry: dict[str, Any],
    tolerance: dict[str, float],
    heads: list[Path],
    scratch: Path,
    ties: Mapping[int, Any] = NONE,
) -> dict[str, Any]:
    """What OUT holds; SystemExit if trtexec does not run the plan, or it differs by more than it may.

    `ties`: of each sample, what the near ties of the quantiser would change, as `remove_flips` takes them.
    """
    wanted = ["gpu", "probability", *(["cosine"] if entry["family"] == "vit" else [])]
    if missing := [key for key in wanted if key not in tolerance]:
        raise SystemExit(f"convertation/models.yaml: {entry['name']}: a plan's tolerance lacks {', '.join(missing)}")
    batches = sorted(set(entry["batch"]))
    places = choose_samples(entry)
    request = make_sample(entry, SEED, max(places) + 1)["input"][places]
    scale = float(np.abs(expected).max())
    result: dict[str, Any] = {"output": 0.0, "cosine": 1.0, "probability": 0.0, "flips": 0}
    for batch in batches:
        answer = run_plan(plan, request[:batch], scratch)
        right = expected[:batch]
        where = f"{plan} at batch {batch}"
        if answer.shape != right.shape:
            raise SystemExit(f"{where}: output {answer.shape}, expected {right.shape}; it is a plan of another model")
        if bad := int(answer.size - np.isfinite(answer).sum()):
            raise SystemExit(f"{where}: {bad} of {answer.size} values are NaN or infinite, expected none; it overflows")
        for row, place in enumerate(places[:batch]):
            left, flips = remove_flips(
                answer[row].astype(np.float64) - right[row], ties.get(place, []), tolerance["gpu"] * scale
            )
            result["flips"] += flips
            if flips:
                answer[row] = right[row] + left
        result["output"] = max(result["output"], float(np.abs(answer - right).max()) / scale)
        if entry["family"] == "vit":
            result["cosine"] = min(result["cosine"], float(compute_cosines(answer, right).min()))
        for ours, theirs in zip(
            compute_probabilities(entry, answer, heads), compute_probabilities(entry, right, heads), strict=True
        ):
            result["probability"] = max(result["probability"], float(np.abs(ours - theirs).max()))
    if batches[-1] > 1 and not np.abs(answer[1:] - answer[0]).max() > np.abs(expected[1:] - expected[0]).max() / 10:
        raise SystemExit(f"{plan}: answers the same for every sample; it does not read its input")
    faults = [
        f"{plan}: {what} differs from ONNX Runtime's by {result[key]:.2e}, expected at most {tolerance[name]:g}"
        for what, key, name in (
            ("output (share of its scale)", "output", "gpu"),
            ("a class's probability", "probability", "probability"),
        )
        if not result[key] <= tolerance[name]
    ]
    if entry["family"] == "vit" and not result["cosine"] >= tolerance["cosine"]:
        faults.append(
            f"{plan}: cosine of an embedding is {result['cosine']:.6f}, expected at least {tolerance['cosine']:g}"
        )
    if faults:
        raise SystemExit(
            "\n".join([*faults, "nothing is published; TF32 and fp16 round to 10 bits: PRECISION=fp32 builds without"])
        )
    served = [
        {
            "seed": SEED,
            "first": first,
            "batch": batch,
            "output": expected[first : first + batch].tolist(),
            "allowed": tolerance["gpu"] * scale,
            "flips": [ties.get(place, []) for place in range(first, first + batch)],
        }
        for first, batch in plan_requests([batch for batch in batches if batch <= max(places) + 1], request[0].nbytes)
    ]
    head = {"model": entry["name"], "plan_sha256": hash_file(str(plan)), "difference": result["output"]}
    judged = {"tolerance": {key: tolerance[key] for key in wanted}, "batches": batches, "scale": scale}
    return head | result | judged | {"served": served}


def run_plan(plan: Path, request: Array, scratch: Path) -> Array:
    """The plan's float32 output for a batch, by trtexec: six significant digits, which is what it prints."""
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "out").mkdir(parents=True)
    stored = scratch / "input.bin"
    request.tofile(stored)
    shape = "x".join(map(str, request.shape))
    options = [
        "--loadEngine=/in/model.plan", f"--shapes=input:{shape}", "--loadInputs=input:/in/input.bin",
        "--exportOutput=/out/output.json", "--iterations=1", "--warmUp=0", "--duration=0", "--device=0",
    ]  # fmt: skip
    artifact = str(plan.with_suffix(".check.json"))
    print(f"  trtexec, batch {len(request)}", flush=True)
    try:
        inputs = {"model.plan": str(plan), "input.bin": str(stored)}
        trtexec.run_trtexec(artifact, inputs, str(scratch / "out"), options)
        text = (scratch / "out/output.json").read_text()
    except trtexec.TrtexecError as error:
        raise SystemExit(f"{plan}: trtexec does not run it\n{trtexec.explain_trouble(error, artifact)}") from None
    except FileNotFoundError:
        raise SystemExit(f"{plan}: trtexec wrote no output; whole log: {trtexec.log_path(artifact)}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    names = {"nan": "NaN", "inf": "Infinity"}
    text = re.sub(r"(?<=[\s,\[-])(nan|inf)\b", lambda match: names[match[1]], text)  # C++ spells them its own way
    output = next(tensor for tensor in json.loads(text) if tensor["name"] == "output")
    values = np.array(output["values"], np.float32)
    return values.reshape([int(size) for size in output["dimensions"].split("x")])


def compute_probabilities(entry: dict[str, Any], output: Array, heads: list[Path]) -> list[Array]:
    """The classes' probabilities, per head (batch, classes): as the client makes them of logits and embeddings."""
    if entry["family"] != "vit":
        return [client.compute_probabilities(output)]
    embedding = client.normalise_rows(output)
    return [client.compute_probabilities(open_onnx(head).run(["output"], {"input": embedding})[0]) for head in heads]


def find_ties(check: dict[str, Any]) -> dict[int, Any]:
    """Of each sample that a server is asked, what its near ties would change."""
    return {
        answer["first"] + row: ties for answer in check["served"] for row, ties in enumerate(answer.get("flips", []))
    }


def compute_cosines(one: Array, other: Array) -> Array:
    """(batch, n), (batch, n) -> (batch,)"""
    ours, theirs = one.astype(np.float64), other.astype(np.float64)
    angles: Array = (ours * theirs).sum(axis=1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    return angles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in "plan", "expected", "entry", "tolerance", "check", "out":
        parser.add_argument(name, type=Path)
    parser.add_argument("heads", type=Path, nargs="*")
    given = parser.parse_args()
    entry, tolerance = json.loads(given.entry.read_text()), json.loads(given.tolerance.read_text())
    trtexec.end_with_parent()
    if (here := gpu.find_gpu(os.environ["TENSORRT_IMAGE"])).folder != given.plan.parent.name:
        raise SystemExit(
            f"{given.plan}: to be compared on {given.plan.parent.name}, this is {here.folder} ({here.name});\n"
            "make trt on such a machine, or make trt-fleet"
        )
    scratch, ties = Path(f"{given.out}.d"), find_ties(json.loads(given.check.read_text()))
    result = compare_answers(given.plan, np.load(given.expected), entry, tolerance, given.heads, scratch, ties)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"  {given.plan} differs from ONNX Runtime by {result['output']:.1e} of its scale, "
          f"cosine {result['cosine']:.6f}, probabilities by {result['probability']:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
