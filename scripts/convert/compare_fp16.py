"""Compare an fp16 file with the ONNX file from which it was rounded:

    python -m scripts.convert.compare_fp16 --head NAME=HEAD.onnx CHECK.json ENTRY.json TOLERANCE.json ONNX FP16 OUT.json

All get the same seeded input on the CPU. FP16 is computed twice: as a GPU does it, with each operator's result rounded
(scripts/convert/emulate_fp16.py), and as a CPU does it, by our ONNX Runtime and by that of each --deployed PYTHON.
CHECK is the result of comparing ONNX with PyTorch. OUT is written only if all agree. It tells how many codes flip, and
how far the embeddings and each HEAD's probabilities move. It also holds PyTorch's answers, with the wider limits for a
server of FP16.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.convert.compare import INNER, SAMPLES, SEED, ask_deployed, ask_onnxruntime, open_session
from scripts.convert.emulate_fp16 import emulated_file
from scripts.convert.judge import Judge
from scripts.convert.probabilities import compute_probabilities, find_changed, normalise_rows
from scripts.convert.sample import make_sample

Array = NDArray[Any]
Values = dict[str, Array]
COMPARED = "fp16 as a GPU rounds it, emulated on the CPU"


def compare_fp16(
    check: dict[str, Any],
    entry: dict[str, Any],
    tolerance: dict[str, float],
    onnx: Path,
    rounded: Path,
    heads: Mapping[str, Path],
    deployed: Sequence[Path] = (),
) -> dict[str, Any]:
    """Return the content of OUT: differences relative to the scale of the output, flips, answers for a server.

    `tolerance`: `output`, `cosine` and `probability` for the emulation; `output` also for a CPU's answers.
    SystemExit if a limit is exceeded, if a value of the output or inside the graph is NaN or infinite, or if the output
    does not depend on the input.
    """
    inner = INNER.get(entry["family"], ())
    request = make_sample(entry, SEED, SAMPLES)["input"]
    exact = run_one_by_one(Judge(onnx, entry["family"], tolerance["output"]), request, inner)
    judge = Judge(rounded, entry["family"], tolerance["output"], f"{onnx}'s")
    with emulated_file(rounded) as file:
        emulated = run_one_by_one(judge._replace(onnx=file), request, inner)
    answers = {"as a GPU rounds it": emulated, "on a CPU": run_one_by_one(judge, request, inner)}
    for python in deployed:
        answer = ask_deployed(judge, request, python, inner)
        answers[answer.name] = answer.values
    differences = {name: judge_output(judge, name, exact, values) for name, values in answers.items()}

    alike = float(compute_cosines(emulated["output"], exact["output"]).min())
    if not alike >= tolerance["cosine"]:
        judge.fail(
            f"cosine of an embedding, as a GPU rounds it, is {alike:.6f}; expected at least {tolerance['cosine']:g}",
            "rounding turns too many codes",
        )
    decided = {name: compare_decisions(head, exact["output"], emulated["output"]) for name, head in heads.items()}
    for head, found in decided.items():
        if not found["difference"] <= tolerance["probability"]:
            judge.fail(
                f"a probability of {head} moves by {found['difference']:.2e}, as a GPU rounds it; "
                f"expected at most {tolerance['probability']:g}",
                "rounding turns too many codes",
            )
    scale = float(np.abs(exact["output"]).max())
    apart = np.abs(emulated["output"] - exact["output"])
    result = {
        "model": entry["name"],
        "precision": "fp16",
        "compared": COMPARED,
        "difference": differences["as a GPU rounds it"],
        "difference_99_9": float(np.quantile(apart, 0.999)) / scale,
        "differences": differences,
        "cosine": alike,
        "probabilities": decided,
        "tolerance": tolerance["output"],
        "batches": check["batches"],
        "scale": check["scale"],
    }
    if inner:
        flipped = {name: int((values["codes"] != exact["codes"]).sum()) for name, values in answers.items()}
        compared = int(exact["codes"].size)
        tokens = np.abs(emulated["tokens"] - exact["tokens"]).max() / np.abs(exact["tokens"]).max()
        result["codes"] = {
            "compared": compared,
            "flipped": flipped["as a GPU rounds it"],
            "flipped_by": flipped,
            "share": flipped["as a GPU rounds it"] / compared,
            "tokens_difference": float(tokens),
        }
    # `flips` stays empty: which codes flip depends on the runtime, and the wide limits already allow for them
    result["served"] = [
        answer
        | {
            "allowed": tolerance["served"] * check["scale"],
            "allowed_gpu": tolerance["gpu"] * check["scale"],
            "flips": [],
        }
        for answer in check["served"]
    ]
    return result


def run_one_by_one(judge: Judge, request: Array, inner: tuple[str, ...]) -> Values:
    """Return our ONNX Runtime's answers, one sample at a time: a batch of n would take n times the memory."""
    parts = [ask_onnxruntime(judge, request[row : row + 1], [1], inner)[0] for row in range(len(request))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def judge_output(judge: Judge, name: str, exact: Values, found: Values) -> float:
    """Return the largest difference of the output relative to its scale.

    The judge ends the comparison if the difference is beyond the tolerance, or if a value is NaN or infinite.
    """
    for value in exact:
        judge.check_values(f"{value} {name}", exact[value], found[value])
    judge.check_dependence(f"output {name}", exact["output"], found["output"])
    return judge.check_difference(f"output {name}", exact["output"], found["output"])


def compare_decisions(head: Path, before: Array, after: Array) -> dict[str, Any]:
    """Return how far the probabilities of `head`, an ONNX file, move between two embeddings (n, output).

    Also the decisions that change: [sample, finding] of each.
    """
    session = open_session(head)
    old, new = (
        compute_probabilities(session.run(["output"], {"input": normalise_rows(side)})[0]) for side in (before, after)
    )
    return {"difference": float(np.abs(new - old).max()), "compared": int(old.size), "changed": find_changed(old, new)}


def compute_cosines(ours: NDArray[Any], theirs: NDArray[Any]) -> NDArray[np.float64]:
    """(n, output) twice -> (n,) the cosine between both rows of each pair."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    found: NDArray[np.float64] = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in "check", "entry", "tolerance", "onnx", "fp16", "out":
        parser.add_argument(name, type=Path)
    parser.add_argument("--head", action="append", default=[], metavar="NAME=ONNX")
    parser.add_argument("--deployed", action="append", default=[], type=Path, metavar="PYTHON")
    given = parser.parse_args()
    check, entry, tolerance = (json.loads(path.read_text()) for path in (given.check, given.entry, given.tolerance))
    heads = {name: Path(file) for name, _, file in (word.partition("=") for word in given.head)}
    result = compare_fp16(check, entry, tolerance, given.onnx, given.fp16, heads, given.deployed)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{entry['name']}: as a GPU rounds it, fp16 differs by {result['difference']:.1e} of its scale, "
        f"allowed {result['tolerance']:g}"
    )
    if "codes" in result:
        print(f"  codes that flip, of {result['codes']['compared']}: {result['codes']['flipped_by']}")
    for head, found in result["probabilities"].items():
        print(f"  {head}: probabilities move by {found['difference']:.1e}, {len(found['changed'])} decisions change")


if __name__ == "__main__":
    main()
