"""Make the ONNX files that scripts/bench/gpu.py measures, from seeded weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.bench.measure import show_progress

ROOT = Path(__file__).resolve().parents[2]


def make_files(entries: dict[str, Any], onnx: Path | None, scratch: Path) -> dict[str, Path]:
    """Return the ONNX file of each model, and of the ViT's precisions; make in `scratch` those that `onnx` lacks.

    `entries`: the models of models.yaml by name; their tolerances are deleted here.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    files = {name: scratch / f"{name}.onnx" for name in (*entries, "vit.tf32", "vit.fp16")}
    there = {name: onnx / f"{name}.onnx" for name in files if onnx and (onnx / f"{name}.onnx").is_file()}
    for name, entry in entries.items():
        del entry["tolerance"]
        (scratch / f"{name}.json").write_text(json.dumps(entry))
    lacking = [name for name in files if name not in there]
    for name in sorted({name.partition(".")[0] for name in lacking if name != "vit.fp16" or "vit.tf32" in lacking}):
        show_progress(f"making weights of {name} from the seed")
        run_module("scripts.convert.synthesize", scratch / f"{name}.json", scratch / f"{name}.pt")
    for name in (name for name in lacking if name != "vit.fp16"):
        show_progress(f"exporting {name}")
        model = name.partition(".")[0]
        options = ["--for", "gpu"] if name == "vit.tf32" else []
        words = ["--weights", "synthetic", *options, scratch / f"{model}.pt", scratch / f"{model}.json", files[name]]
        run_module(f"convertation.{entries[model]['family']}.torch2onnx", *words)
    if "vit.fp16" in lacking:
        show_progress("rounding vit.fp16")
        source = there.get("vit.tf32", files["vit.tf32"])
        run_module("scripts.convert.round_fp16", source, scratch / "vit.json", files["vit.fp16"])
    return files | there


def run_module(module: str, *words: object) -> None:
    """Run a program of the project; if it fails, SystemExit with the last line that it printed."""
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = (done.stdout.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise SystemExit(f"{module} failed: {last}; its packages are in requirements.txt, or bring --onnx FOLDER")
