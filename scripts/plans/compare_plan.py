"""Compare a plan with ONNX Runtime:

    python -m scripts.plans.compare_plan PLAN EXPECTED.npy ENTRY.json TOLERANCE.json CHECK.json OUT HEAD …

trtexec runs the plan on seeded inputs at the smallest, usual and largest batch; EXPECTED holds the answers of ONNX
Runtime to the same inputs (scripts/plans/expected.py).  It compares the output, for a ViT also the cosine of each
embedding, and the probabilities of the classes; for a ViT each HEAD, an ONNX file, computes them from both embeddings.
CHECK, the comparison of the ONNX file, lists for each volume the codes that rounding may flip; their effect is removed
first.  OUT is written only if everything is within TOLERANCE (models.yaml: gpu, cosine, probability); it also holds the
answers that a server with a GPU must give.
"""

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
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
    ask: Callable[[Array], Array],
    expected: Array,
    entry: dict[str, Any],
    tolerance: dict[str, float],
    heads: list[Path],
    ties: Mapping[int, Any] = NONE,
) -> dict[str, Any]:
    """Return what OUT holds; SystemExit if an answer differs too much.

    `plan`: the file that is asked; `ask`: its float32 output for a batch of samples, whole.
    `ties`: for each sample, how each flip that is possible there would change the answer, as `remove_flips` takes it.
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
        answer = ask(request[:batch])
        right = expected[:batch]
        where = f"{plan} at batch {batch}"
        if answer.shape != right.shape:
            raise SystemExit(f"{where}: output {answer.shape}, expected {right.shape}; this plan is of another model")
        if bad := int(answer.size - np.isfinite(answer).sum()):
            raise SystemExit(
                f"{where}: {bad} of {answer.size} values are NaN or infinite, expected none; the plan overflows"
            )
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
        raise SystemExit(f"{plan}: gives the same answer for every sample; it does not read its input")
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
            "\n".join(
                [
                    *faults,
                    "nothing is published; TF32 and fp16 round to 10 bits: PRECISION=fp32 builds a plan without them",
                ]
            )
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
    """Return the plan's float32 output for a batch; trtexec prints it with six significant digits."""
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
        raise SystemExit(
            f"{plan}: trtexec does not run this plan\n{trtexec.explain_trouble(error, artifact)}"
        ) from None
    except FileNotFoundError:
        raise SystemExit(f"{plan}: trtexec wrote no output; whole log: {trtexec.log_path(artifact)}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    names = {"nan": "NaN", "inf": "Infinity"}
    text = re.sub(r"(?<=[\s,\[-])(nan|inf)\b", lambda match: names[match[1]], text)  # as C++ spells them
    output = next(tensor for tensor in json.loads(text) if tensor["name"] == "output")
    values = np.array(output["values"], np.float32)
    return values.reshape([int(size) for size in output["dimensions"].split("x")])


def compute_probabilities(entry: dict[str, Any], output: Array, heads: list[Path]) -> list[Array]:
    """Return the classes' probabilities, (batch, classes) for each head, computed as the client computes them."""
    if entry["family"] != "vit":
        return [client.compute_probabilities(output)]
    embedding = client.normalise_rows(output)
    return [client.compute_probabilities(open_onnx(head).run(["output"], {"input": embedding})[0]) for head in heads]


def find_ties(check: dict[str, Any]) -> dict[int, Any]:
    """Return, for each sample that a server is asked, how each possible flip would change the answer."""
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
            f"{given.plan}: must be compared on {given.plan.parent.name}, here is {here.folder} ({here.name});\n"
            "run make trt on a machine with such a GPU, or make trt-fleet"
        )
    scratch, ties = Path(f"{given.out}.d"), find_ties(json.loads(given.check.read_text()))
    result = compare_answers(
        given.plan, lambda request: run_plan(given.plan, request, scratch), np.load(given.expected), entry, tolerance,
        given.heads, ties,
    )  # fmt: skip
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"  {given.plan} differs from ONNX Runtime by {result['output']:.1e} of its scale, "
          f"cosine {result['cosine']:.6f}, probabilities by {result['probability']:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
