"""Compare the engine of TensorRT for RTX with ONNX Runtime, on this machine's GPU:

    python -m scripts.plans.compare_rtx RTX_PYTHON ONNX EXPECTED.npy ENTRY.json TOLERANCE.json CHECK.json OUT HEAD …

The judgement is that of scripts/plans/compare_plan.py; RTX_PYTHON, the Python of .venv-rtx, runs the engine.  TensorRT
for RTX is another product than the trtexec that builds plans.  So this is evidence that NVIDIA's optimiser keeps the
answers, and no proof for a plan.  OUT holds the differences and the times, or the reason why this GPU was not asked.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.convert.sample import make_sample
from scripts.plans.compare_plan import compare_answers, find_ties
from scripts.plans.expected import SEED, choose_samples

NOT_RUN = 3  # exit status of scripts/plans/run_rtx.py where there is no GPU that it runs on


def run_on_gpu(python: Path, onnx: Path, entry_file: Path, folder: Path) -> str:
    """Fill `folder` with the outputs and times; return "" or why there are none. SystemExit if the engine fails."""
    entry = json.loads(entry_file.read_text())
    places = choose_samples(entry)
    make_sample(entry, SEED, max(places) + 1)["input"][places].tofile(folder / "request.bin")
    words = [python, "-m", "scripts.plans.run_rtx", onnx, entry_file, folder / "request.bin", folder]
    run = subprocess.run([str(word) for word in words], stderr=subprocess.PIPE, text=True)
    if run.returncode not in (0, NOT_RUN):
        raise SystemExit(f"{onnx}: TensorRT for RTX does not run it on this GPU\n{run.stderr.strip()}")
    return run.stderr.strip() if run.returncode else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in "python", "onnx", "expected", "entry", "tolerance", "check", "out":
        parser.add_argument(name, type=Path)
    parser.add_argument("heads", type=Path, nargs="*")
    given = parser.parse_args()
    entry, tolerance = json.loads(given.entry.read_text()), json.loads(given.tolerance.read_text())
    expected = np.load(given.expected)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if reason := run_on_gpu(given.python, given.onnx, given.entry, folder):
            given.out.write_text(json.dumps({"not_run": reason}) + "\n")
            print(f"  {given.onnx}: not run on a GPU: {reason}")
            return

        def ask(request: NDArray[Any]) -> NDArray[Any]:
            return np.fromfile(folder / f"{len(request)}.bin", np.float32).reshape(len(request), -1)

        ties = find_ties(json.loads(given.check.read_text()))
        result = compare_answers(given.onnx, ask, expected, entry, tolerance, given.heads, ties)
        told = json.loads((folder / "times.json").read_text())
    del result["served"], result["plan_sha256"]
    given.out.write_text(json.dumps(told | result, indent=1) + "\n")
    most = max(told["ms"], key=int)
    print(
        f"  {given.onnx} on {told['gpu']} by {told['judge']}: differs by {result['output']:.1e} of its scale, "
        f"{told['ms'][most]['median']:.2f} ms at batch {most}"
    )


if __name__ == "__main__":
    main()
