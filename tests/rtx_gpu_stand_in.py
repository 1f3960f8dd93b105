"""Stands in for .venv-rtx on a machine with a GPU: -m scripts.plans.run_rtx ONNX ENTRY.json REQUEST.bin FOLDER

ONNX Runtime answers on the CPU. FAULT=… plants what a GPU may do: other answers, no engine, or no GPU that is known.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

from scripts.plans.compare_rtx import NOT_RUN
from scripts.plans.expected import open_onnx

onnx, entry_file, request_file, folder = (Path(word) for word in sys.argv[3:])
fault, entry = os.environ.get("FAULT", ""), json.loads(entry_file.read_text())
if fault == "unknown":
    sys.exit(
        print("TensorRT for RTX does not run on Stand-in H100, compute capability 9.0", file=sys.stderr) or NOT_RUN
    )
if fault == "refused":
    sys.exit("TensorRT for RTX did not run its engine")
request = np.fromfile(request_file, np.float32).reshape(-1, *entry["input"])
for batch in entry["batch"]:
    answer = open_onnx(onnx).run(["output"], {"input": request[:batch]})[0]
    (answer * (1.1 if fault == "differs" else 1)).astype(np.float32).tofile(folder / f"{batch}.bin")
times = {str(batch): {"median": 1.5, "p95": 1.6} for batch in entry["batch"]}
told = {"gpu": "Stand-in RTX 3090", "capability": "8.6", "judge": "TensorRT for RTX, a stand-in", "ms": times}
(folder / "times.json").write_text(json.dumps(told))
