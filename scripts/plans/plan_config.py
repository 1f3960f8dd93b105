"""Write the config.pbtxt of a model for a server with a GPU.

    python -m scripts.plans.plan_config CONFIG ENTRY.json OUT sm86 [sm89 ...]        for its plans
    python -m scripts.plans.plan_config --warm CONFIG OUT                            for its ONNX file

CONFIG is the config.pbtxt of the model's ONNX file: inputs, outputs, batch size and batching of the plan are the same.
Triton loads the plan for its GPU's compute capability; the plans are 1/sm86.plan and so on in the model's folder.
Triton runs both on one sample of zeros before they are READY, because the first request on a GPU is slow (the ViT by
ONNX Runtime on an H200: 0.6 s, later requests 0.03 s).  On a CPU the first request is not
slower, and a warm-up would cost a run of the ViT at each start.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from google.protobuf import text_format  # type: ignore[import-untyped]

from scripts.serve.model_config import read_config


def make_plan_config(onnx: Path, entry: dict[str, Any], folders: list[str]) -> str:
    """Return the text; SystemExit if the ONNX model's config allows a larger batch than the plan's profile."""
    config = read_config(onnx)
    if not 0 < config.max_batch_size <= max(entry["batch"]):
        raise SystemExit(
            f"{onnx}: max_batch_size is {config.max_batch_size}; expected 1 to {max(entry['batch'])},\n"
            "the largest batch in convertation/models.yaml, for which the plan is built"
        )
    config.name = f"{entry['name']}_trt"
    config.backend, config.platform = "", "tensorrt_plan"
    for field in "optimization", "parameters":  # these are for ONNX Runtime only
        config.ClearField(field)
    add_warm_up(config)
    config.default_model_filename = f"{folders[0]}.plan"
    for folder in folders:
        if not (capability := re.fullmatch(r"sm(\d+)(\d)", folder)):
            raise SystemExit(f"{folder}: expected a folder named by compute capability, such as sm86, in PLANS")
        config.cc_model_filenames[f"{capability[1]}.{capability[2]}"] = f"{folder}.plan"
    return f"# The plans of {onnx}, written by scripts/plans/plan_config.py\n{text_format.MessageToString(config)}"


def add_warm_up(config: Any) -> None:
    """Let Triton run the model on one sample of zeros before it is READY."""
    sample = config.model_warmup.add(name="one sample of zeros", batch_size=min(1, config.max_batch_size))
    for tensor in config.input:
        sample.inputs[tensor.name].data_type = tensor.data_type
        sample.inputs[tensor.name].dims.extend(tensor.dims)
        sample.inputs[tensor.name].zero_data = True


def make_warm_config(onnx: Path) -> str:
    """Return the text of an ONNX file's config with this warm-up."""
    config = read_config(onnx)
    warm = type(config)()
    add_warm_up(config)
    warm.model_warmup.extend(config.model_warmup)
    added: str = text_format.MessageToString(warm)
    return f"{onnx.read_text()}# Written by scripts/plans/plan_config.py, for a server with a GPU\n{added}"


if __name__ == "__main__" and sys.argv[1] == "--warm":
    Path(sys.argv[3]).write_text(make_warm_config(Path(sys.argv[2])))
elif __name__ == "__main__":
    onnx, entry, out, *folders = sys.argv[1:]
    Path(out).write_text(make_plan_config(Path(onnx), json.loads(Path(entry).read_text()), folders))
