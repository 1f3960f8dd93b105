"""Stand-in for Triton's C++ ONNX Runtime backend: a Python-based backend for PyPI's tritonserver, which has none.

In that server's backend directory, as `onnxruntime/model.py`, this file serves every model whose config.pbtxt says
`backend: "onnxruntime"`, by the `onnxruntime` package, on the CPU. Triton itself parses the config, checks requests
against it and batches them. Like the C++ backend, this one refuses parameters that do not parse, execution accelerators
that it lacks, optional inputs, and names, types and sizes that differ from the ONNX file. Whatever else the C++ backend
refuses, scripts/serve/check_repository.py finds.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

# Triton's name of a data type -> ONNX Runtime's name
TYPES = {"BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
         "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float", "FP64": "double",
         "STRING": "string"}  # fmt: skip
PARAMETERS = {
    "intra_op_thread_count": r"\s*[+-]?\d+.*",
    "inter_op_thread_count": r"\s*[+-]?\d+.*",
    "execution_mode": r"\s*\+?0*[01](\D.*)?",
    "enable_mem_arena": r"(?i:true|false|on|off|0|1)",
    "enable_mem_pattern": r"(?i:true|false|on|off|0|1)",
}


def refuse_unsupported(config: dict[str, Any]) -> None:
    """Raise pb_utils.TritonModelException on settings that the C++ backend refuses in every model."""
    for key, pattern in PARAMETERS.items():
        value = config.get("parameters", {}).get(key)
        if value is not None and not re.fullmatch(pattern, value.get("string_value", ""), re.DOTALL):
            raise pb_utils.TritonModelException(f"parameter {key}: {value.get('string_value', '')!r}")
    accelerators = config.get("optimization", {}).get("execution_accelerators", {})
    for accelerator in accelerators.get("cpu_execution_accelerator", []):
        raise pb_utils.TritonModelException(f"unknown Execution Accelerator {accelerator['name']!r} is requested")
    if libraries := config.get("model_operations", {}).get("op_library_filename"):
        raise pb_utils.TritonModelException(f"failed to load library {libraries[0]}")


def compare_tensors(config: dict[str, Any], session: Any) -> None:
    """Raise pb_utils.TritonModelException if the tensors of config and ONNX file differ."""
    wanted = [tensor["name"] for tensor in config["input"] if not tensor.get("optional")]
    found = {tensor.name: tensor for tensor in session.get_inputs()}
    if sorted(wanted) != sorted(found):
        raise pb_utils.TritonModelException(f"configuration expects inputs {wanted}, model provides {sorted(found)}")
    made = {tensor.name: tensor for tensor in session.get_outputs()}
    pairs = [("input", tensor, found) for tensor in config["input"]]
    pairs += [("output", tensor, made) for tensor in config["output"]]
    for kind, tensor, theirs in pairs:
        name = tensor["name"]
        if name not in theirs:
            raise pb_utils.TritonModelException(f"unexpected inference {kind} {name!r}, allowed are {sorted(theirs)}")
        expected = f"tensor({TYPES.get(tensor['data_type'].removeprefix('TYPE_'))})"
        if theirs[name].type != expected:
            raise pb_utils.TritonModelException(f"{kind} {name!r}: expected {expected}, is {theirs[name].type}")
        dims = tensor["reshape"].get("shape", []) if "reshape" in tensor else tensor["dims"]
        ours = [-1] * (config["max_batch_size"] > 0) + [int(size) for size in dims]
        shape = [size if isinstance(size, int) else -1 for size in theirs[name].shape]
        if (not shape and ours == [1]) or not theirs[name].shape:
            continue
        narrower = kind == "input"
        if len(shape) != len(ours) or any(
            a != b and not (narrower and a == -1) for a, b in zip(shape, ours, strict=True)
        ):
            raise pb_utils.TritonModelException(f"{kind} {name!r}: expected {shape}, configured {ours}")


class TritonPythonModel:
    """One instance of one ONNX model."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        file = config.get("default_model_filename") or "model.onnx"
        self.batching: bool = config["max_batch_size"] > 0
        self.inputs: list[str] = [tensor["name"] for tensor in config["input"]]
        options = onnxruntime.SessionOptions()
        # The CPUs that this process may use, not all CPUs. Idle threads sleep, because the models take turns.
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = Path(args["model_repository"]) / args["model_version"] / file
        if path.is_dir():
            path = path / "model.onnx"
        refuse_unsupported(config)
        self.session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        compare_tensors(config, self.session)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return a response for each request. Triton joins requests of equal shapes, up to max_batch_size rows."""
        # Without a batch dimension requests cannot be joined
        groups = [requests] if self.batching else [[request] for request in requests]
        return [response for group in groups for response in self.answer_requests(group)]

    def answer_requests(self, requests: list[Any]) -> list[Any]:
        """Run the model once on the joined requests; return a response for each of them."""
        wanted = sorted({name for request in requests for name in request.requested_output_names()})
        parts = {
            name: [pb_utils.get_input_tensor_by_name(r, name).as_numpy() for r in requests] for name in self.inputs
        }
        feed = {name: arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for name, arrays in parts.items()}
        try:
            outputs = dict(zip(wanted, self.session.run(wanted, feed), strict=True))
        except Exception as error:  # a bad request must not stop the model
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))) for _ in requests]
        if len(requests) == 1:
            rows = [slice(None)]
        else:
            ends = np.cumsum([len(array) for array in parts[self.inputs[0]]])
            rows = [slice(end - len(array), end) for end, array in zip(ends, parts[self.inputs[0]], strict=True)]
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, outputs[name][own]) for name in request.requested_output_names()]
            )
            for request, own in zip(requests, rows, strict=True)
        ]
