"""Stand-in for Triton's C++ ONNX Runtime backend: a Python-based backend for PyPI's tritonserver.

That server carries no ONNX Runtime backend. Put into its backend directory as `onnxruntime/model.py`, this file serves
every model whose config.pbtxt says `backend: "onnxruntime"`, by the `onnxruntime` package, on the CPU. Triton itself
parses the config, checks requests against it and batches them. What the C++ backend checks besides, that config and
ONNX file agree, is left to scripts/serve/check_repository.py.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of one ONNX model."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        file = config.get("default_model_filename") or "model.onnx"
        self.batching: bool = config["max_batch_size"] > 0
        self.inputs: list[str] = [tensor["name"] for tensor in config["input"]]
        options = onnxruntime.SessionOptions()
        # The CPUs this process may use, not all there are; idle threads sleep, for a repository's models take turns.
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = Path(args["model_repository"]) / args["model_version"] / file
        self.session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request. Triton joins only requests of equal shapes, up to max_batch_size rows in all."""
        # Without a batch dimension there is nothing to join along.
        groups = [requests] if self.batching else [[request] for request in requests]
        return [response for group in groups for response in self.answer(group)]

    def answer(self, requests: list[Any]) -> list[Any]:
        wanted = sorted({name for request in requests for name in request.requested_output_names()})
        parts = {
            name: [pb_utils.get_input_tensor_by_name(r, name).as_numpy() for r in requests] for name in self.inputs
        }
        feed = {name: arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for name, arrays in parts.items()}
        try:
            outputs = dict(zip(wanted, self.session.run(wanted, feed), strict=True))
        except Exception as error:  # one bad request must not take the model down
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
