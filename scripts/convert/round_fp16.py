"""Round an ONNX file to fp16, but for values that fp16 cannot hold:

    python -m scripts.convert.round_fp16 MODEL.onnx ENTRY.json OUT.onnx

ONNX Runtime computes the values in float32 on the CPU, for the volumes of the build's checks.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, ValueInfoProto, helper
from onnx_ir import DataType

from convertation.fp16 import LARGEST, fill_types, list_measured, round_model
from convertation.onnx_file import write_model
from scripts.convert.onnx_session import open_session
from scripts.convert.sample import make_sample

SEED, SAMPLES = 0, 2  # as in the build's comparisons


def round_fp16(onnx: Path, entry: dict[str, Any], out: Path) -> tuple[list[str], float]:
    """Write `onnx` rounded to `out`. Return the nodes that stay float32 for their range, and the largest fp16 value."""
    model = onnx_ir.load(onnx)
    fill_types(model.graph)
    names = [str(value.name) for value in list_measured(model.graph)]
    largest = measure_largest(onnx, names, make_sample(entry, SEED, SAMPLES)["input"])
    metadata = dict(model.metadata_props)
    kept = round_model(model, largest)
    rounded = [largest[name] for value in list_measured(model.graph) if value.dtype == DataType.FLOAT16
               and (name := str(value.name)) in largest]  # fmt: skip
    write_model(model, out, metadata | {"precision": "fp16"})
    return kept, max(rounded, default=0.0)


def measure_largest(onnx: Path, names: list[str], request: NDArray[np.float32]) -> dict[str, float]:
    """Return the largest absolute value of each of the float values `names`, over all rows of `request`; NaN if one is.

    Two reductions of each value are added to the graph. They run as soon as the value exists, so none has to be kept.
    """
    nodes = [
        helper.make_node(reduction, [name], [f"{name}/{reduction}"], keepdims=0)
        for name in names
        for reduction in ("ReduceMax", "ReduceMin")
    ]
    wanted = [output for node in nodes for output in node.output]
    piece = ModelProto(graph=GraphProto(node=nodes, output=[ValueInfoProto(name=name) for name in wanted]))
    session = open_session(onnx, piece.SerializeToString(), ahead=True)
    found = [np.array(session.run(wanted, {"input": row[None]}), np.float64) for row in request]
    most = np.abs(np.stack(found)).max(axis=0).reshape(-1, 2).max(axis=1)
    return {name: float(value) for name, value in zip(names, most, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in "onnx", "entry", "out":
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    kept, largest = round_fp16(given.onnx, json.loads(given.entry.read_text()), given.out)
    print(f"  largest value in fp16: {largest:.3g}; fp16 holds values up to {LARGEST:.0f}")
    for node in kept:
        print(f"  stays float32 for its range: {node}")


if __name__ == "__main__":
    main()
