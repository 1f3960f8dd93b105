"""Compare a model's tensors with what the existing client sends and reads."""

from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2 as schema  # type: ignore[import-untyped]

from scripts.serve.findings import Findings
from scripts.serve.model_config import Shape, Tensors, format_tensor

# What the existing client sends and expects: inputs and outputs of each model. Entries (--models) replace the sizes.
CLIENT: dict[str, tuple[Tensors, Tensors]] = {
    "vit_onnx": (
        {"input": (schema.TYPE_FP32, (-1, 1, 240, 480, 480))},
        {"output": (schema.TYPE_FP32, (-1, 512))},
    ),
    "binary_onnx": (
        {"input": (schema.TYPE_FP32, (-1, 512))},
        {"output": (schema.TYPE_FP32, (-1, 2))},
    ),
    "multilabel_onnx": (
        {"input": (schema.TYPE_FP32, (-1, 512))},
        {"output": (schema.TYPE_FP32, (-1, 20))},
    ),
    "bpr_model": (
        {"input": (schema.TYPE_INT16, (1, -1, -1, -1)), "metadata": (schema.TYPE_FP32, (1, 3))},
        {"output": (schema.TYPE_STRING, (1,))},
    ),
}


def check_client(
    findings: Findings, file: Path, model: str, inputs: Tensors, outputs: Tensors, entry: dict[str, Any] | None
) -> None:
    """Check that the model takes the tensors that the client sends, and answers those that it reads."""
    expected_inputs, expected_outputs = CLIENT.get(model, ({}, {}))
    if entry and model != "bpr_model":  # a model with an entry has one input and one output
        expected_inputs = {"input": (schema.TYPE_FP32, (-1, *entry["input"]))}
        expected_outputs = {"output": (schema.TYPE_FP32, (-1, *entry["output"]))}
    for kind, expected, found in (("input", expected_inputs, inputs), ("output", expected_outputs, outputs)):
        for name, tensor in expected.items():
            # A variable size must stay variable; a fixed size may become variable.
            if name not in found:
                findings.add(
                    file, f"client's contract, {kind}", f"{name} {format_tensor(tensor)}", ", ".join(found) or "none"
                )
            elif found[name][0] != tensor[0] or not fits_shape(found[name][1], tensor[1]):
                findings.add(
                    file, f"client's contract, {kind} {name!r}", format_tensor(tensor), format_tensor(found[name])
                )
        if expected and kind == "input" and (surplus := sorted(set(found) - set(expected))):
            findings.add(file, "client's contract, inputs", ", ".join(expected), f"also {', '.join(surplus)}")


def fits_shape(found: Shape, expected: Shape) -> bool:
    return len(found) == len(expected) and all(a in (b, -1) for a, b in zip(found, expected, strict=True))
