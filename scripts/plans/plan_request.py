"""Write down everything that determines a plan, except the GPU and TensorRT.

    python -m scripts.plans.plan_request [--precision P] [--flags F] ONNX ENTRY.json OUT.json

--precision fp32|tf32|fp16, --flags '--builderOptimizationLevel=4': options for trtexec besides the profile.
Without --precision tf32 the plan gets --noTF32: it multiplies float32 as float32.
The ONNX file counts by its graph alone; its metadata, which say where the weights come from, change no plan.
"""

import argparse
import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

from scripts.plans.trtexec_options import check_options, split_options

METADATA = 14  # ModelProto.metadata_props


def hash_graph(onnx: Path) -> str:
    """Return the SHA-256 of an ONNX file's bytes without its metadata."""
    from scripts.serve.onnx_headers import read_fields  # imported here: list_options, alone, does not need it

    digest = hashlib.sha256()
    with onnx.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number, start, _, end in read_fields(data, 0, len(data)):
            if number != METADATA:
                digest.update(memoryview(data)[start:end])
    return digest.hexdigest()


def list_options(entry: dict[str, Any], precision: str, flags: str) -> list[str]:
    """Return trtexec's options for a model, except those that name files: ours, as when typed by hand, and `flags`."""
    shapes = ["x".join(map(str, [batch, *entry["input"]])) for batch in entry["batch"]]
    profile = [f"--{end}Shapes=input:{shape}" for end, shape in zip(("min", "opt", "max"), shapes, strict=True)]
    typed = ["--stronglyTyped", "--profilingVerbosity=detailed"] if precision == "fp16" else []
    more = split_options(flags)
    exact = [] if precision == "tf32" else ["--noTF32"]
    ours = [*profile, *typed, *exact, "--verbose", "--device=0"]
    check_options(more, ours)
    return [*ours, *more]


def make_request(onnx: Path, entry: dict[str, Any], precision: str, flags: str) -> dict[str, Any]:
    """Return what OUT holds."""
    profile = {"input": entry["input"], "batch": entry["batch"]}
    return {
        "model": entry["name"],
        "onnx_graph_sha256": hash_graph(onnx),
        "precision": precision,
        "profile": profile,
        "options": list_options(entry, precision, flags),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("entry", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--precision", choices=["fp32", "tf32", "fp16"], default="fp32")
    parser.add_argument("--flags", default="")
    given = parser.parse_args()
    entry = json.loads(given.entry.read_text())
    given.out.write_text(json.dumps(make_request(given.onnx, entry, given.precision, given.flags), indent=1) + "\n")


if __name__ == "__main__":
    main()
