"""Triton's `bpr_model`: it takes a CT series and answers which part of the body the series shows.

`input` INT16 [1, D, H, W] (z, y, x; Hounsfield units) and `metadata` FP32 [1, 3] (spacing x, y, z in mm)
-> `output` BYTES [1].
`bpreg/` and `weights/`, with `model.onnx` and `inference-settings.json`, lie beside this file.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

HERE = Path(__file__).absolute().parent  # if this file is a link, the folder of the link
sys.path.insert(0, str(HERE))  # Triton appends it at the end, and an installed `bpreg` would come first

from bpreg import Settings, preprocess, tag  # type: ignore[import-not-found]  # noqa: E402

BATCH = 8  # slices at a time; more are not faster on a CPU, and memory stays below half a gigabyte
BATCH_GPU = 32


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        weights = HERE / "weights"
        self.settings = Settings.read(weights / "inference-settings.json")
        providers: list[Any] = ["CPUExecutionProvider"]
        if args["model_instance_kind"] == "GPU":
            options = {
                "device_id": args["model_instance_device_id"],
                "use_tf32": "0",  # float32, which was compared with PyTorch
                "cudnn_conv_algo_search": "HEURISTIC",  # else each new batch size costs seconds
                "arena_extend_strategy": "kSameAsRequested",
            }
            providers.insert(0, ("CUDAExecutionProvider", options))
        self.session = onnxruntime.InferenceSession(weights / "model.onnx", providers=providers)
        self.side = self.session.get_inputs()[0].shape[-1]
        on_gpu = self.session.get_providers()[0] == "CUDAExecutionProvider"
        self.batch = BATCH_GPU if on_gpu else BATCH
        if on_gpu:  # the first run on a GPU takes long, so do it before the model is READY
            size = (self.batch, *self.session.get_inputs()[0].shape[1:])
            self.session.run(["output"], {"input": np.zeros(size, np.float32)})
        if on_gpu or len(providers) == 1:
            pb_utils.Logger.log_info(f"{args['model_name']} runs on the {'GPU' if on_gpu else 'CPU'}")
        else:
            pb_utils.Logger.log_warn(
                f"{args['model_name']} was given a GPU and runs on the CPU: ONNX Runtime {onnxruntime.__version__} "
                "could not load its CUDA provider; requirements.txt fits CUDA 12 with cuDNN 9"
            )

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self.respond(request) for request in requests]

    def respond(self, request: Any) -> Any:
        """Return the tag, or an error for this request only."""
        try:
            volume, spacing = (
                pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("input", "metadata")
            )
            part = self.tag(volume, spacing)
        except Exception as error:
            return pb_utils.InferenceResponse([], pb_utils.TritonError(f"bpr_model: {error or type(error).__name__}"))
        return pb_utils.InferenceResponse([pb_utils.Tensor("output", np.array([part.encode()], object))])

    def tag(self, volume: Any, spacing: Any) -> str:
        if volume.ndim != 4 or len(volume) != 1 or spacing.shape != (1, 3):
            raise ValueError(
                f"input {list(volume.shape)} and metadata {list(spacing.shape)}, expected [1, D, H, W] and [1, 3]"
            )
        slices = preprocess(volume[0], spacing[0], self.side)
        if not len(slices):
            raise ValueError("no slice is left: each is 0 after preprocessing")
        starts = range(0, len(slices), self.batch)
        scores = [self.session.run(["output"], {"input": slices[i : i + self.batch]})[0] for i in starts]
        return str(tag(np.concatenate(scores), float(spacing[0, 2]), self.settings))
