"""Compare an fp16 file with the ONNX file it was rounded from:

    python -m scripts.convert.compare_fp16 CHECK.json ENTRY.json TOLERANCE.json ONNX FP16 OUT.json

Both get the same seeded input, on the CPU, whose ONNX Runtime computes most of it in float32: what it shows is what the
rounding of weights does. CHECK is what comparing ONNX with PyTorch left; OUT, written only if the files agree, has its
answers of PyTorch, which a server of FP16 may miss by more.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.convert.compare import INNER, SEED, ask
from scripts.convert.judge import Judge
from scripts.convert.sample import sample

COMPARED = "fp16 weights, on the CPU; what fp16 arithmetic does, a GPU alone shows"


def compare_fp16(
    check: dict[str, Any], entry: dict[str, Any], tolerance: dict[str, float], onnx: Path, rounded: Path
) -> dict[str, Any]:
    """What OUT holds: differences relative to the output's scale, the share of codes that flipped, served answers.

    SystemExit if an output differs by more than `tolerance["fp16"]`, is NaN or infinite, or does not depend on the
    input.
    """
    inner = INNER.get(entry["family"], ())
    batches: list[int] = check["batches"]
    request = sample(entry, SEED, batches[-1])["input"]
    (exact,) = ask(Judge(onnx, entry["family"], tolerance["fp16"]), request, batches[-1:], inner)
    judge = Judge(rounded, entry["family"], tolerance["fp16"], f"{onnx}'s")
    answers = ask(judge, request, batches, inner)

    expected = [exact["output"][:batch] for batch in batches]
    outputs = [
        (f"output at batch {len(right)}", right, answer["output"])
        for right, answer in zip(expected, answers, strict=True)
    ]
    for output in outputs:
        judge.sane(*output)
    judge.alive(*outputs[-1])
    difference = max(judge.same(*output) for output in outputs)

    scale = float(np.abs(exact["output"]).max())
    apart = np.abs(answers[-1]["output"] - exact["output"])
    result = {
        "model": entry["name"],
        "precision": "fp16",
        "compared": COMPARED,
        "difference": difference,
        "difference_99_9": float(np.quantile(apart, 0.999)) / scale,
        "cosine": float(cosines(answers[-1]["output"], exact["output"]).min()),
        "tolerance": tolerance["fp16"],
        "batches": batches,
        "scale": check["scale"],
    }
    if inner:
        flipped = int(sum((answer["codes"] != exact["codes"][: len(answer["codes"])]).sum() for answer in answers))
        compared = sum(answer["codes"].size for answer in answers)
        tokens = np.abs(answers[-1]["tokens"] - exact["tokens"]).max() / np.abs(exact["tokens"]).max()
        codes = {"compared": compared, "flipped": flipped, "share": flipped / compared}
        result["codes"] = codes | {"tokens_difference": float(tokens)}
    # A code that flips moves the output far beyond rounding, and which ones flip depends on who computes
    allowed = tolerance["fp16"] * check["scale"]
    result["served"] = [answer | {"allowed": allowed, "flips": []} for answer in check["served"]]
    return result


def cosines(ours: NDArray[Any], theirs: NDArray[Any]) -> NDArray[np.float64]:
    """(n, output) twice -> (n,) the cosine between each two rows."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    found: NDArray[np.float64] = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in "check", "entry", "tolerance", "onnx", "fp16", "out":
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    check, entry, tolerance = (json.loads(path.read_text()) for path in (given.check, given.entry, given.tolerance))
    result = compare_fp16(check, entry, tolerance, given.onnx, given.fp16)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    codes = f", {100 * result['codes']['share']:.2g} % of the codes flip" if "codes" in result else ""
    difference, allowed = result["difference"], result["tolerance"]
    print(f"{entry['name']}: fp16 differs by {difference:.1e} of its scale, allowed {allowed:g}{codes}")


if __name__ == "__main__":
    main()
