"""Write the config.pbtxt of a model for a server with a GPU.

    python -m scripts.plans.plan_config CONFIG ENTRY.json OUT sm86 [sm89 ...]        of its plan
    python -m scripts.plans.plan_config --warm CONFIG OUT                            of its ONNX file

CONFIG is that of the model's ONNX file: what the plan takes and gives, how many at once and how they are joined is the
same.  Triton takes the plan of its GPU's compute capability; each lies as 1/sm86.plan in the model's folder.  Both are
asked one sample of zeros before they are READY: the first request of a GPU takes long (the ViT by ONNX Runtime on an
H200 0.6 s, the next ones 0.03 s).  On a CPU it does not, and a start would cost a run of the ViT.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from google.protobuf import text_format  # type: ignore[import-untyped]

from scripts.serve.model_config import read_config


def make_plan_config(onnx: Path, entry: dict[str, Any], folders: list[str]) -> str:
    """Return the text; SystemExit where the ONNX model's config allows more than the plan's profile does."""
    config = read_config(onnx)
    if not 0 < config.max_batch_size <= max(entry["batch"]):
        raise SystemExit(
            f"{onnx}: max_batch_size is {config.max_batch_size}; expected 1 to {max(entry['batch'])},\n"
            "the largest batch in convertation/models.yaml, for which the plan is built"
        )
    config.name = f"{entry['name']}_trt"
    config.backend, config.platform = "", "tensorrt_plan"
    for field in "optimization", "parameters":  # they speak to ONNX Runtime; a plan has its precision inside
        config.ClearField(field)
    add_warm_up(config)
    config.default_model_filename = f"{folders[0]}.plan"
    for folder in folders:
        if not (capability := re.fullmatch(r"sm(\d+)(\d)", folder)):
            raise SystemExit(f"{folder}: expected a folder named by compute capability, such as sm86, in PLANS")
        config.cc_model_filenames[f"{capability[1]}.{capability[2]}"] = f"{folder}.plan"
    return (
        f"# The TensorRT plan of {onnx}, written by scripts/plans/plan_config.py\n{text_format.MessageToString(config)}"
    )


def add_warm_up(config: Any) -> None:
    """Let Triton ask the model one sample of zeros before it is READY."""
    sample = config.model_warmup.add(name="one sample of zeros", batch_size=min(1, config.max_batch_size))
    for tensor in config.input:
        sample.inputs[tensor.name].data_type = tensor.data_type
        sample.inputs[tensor.name].dims.extend(tensor.dims)
        sample.inputs[tensor.name].zero_data = True


def make_warm_config(onnx: Path) -> str:
    """Return the text of an ONNX file's config, with that sample."""
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
