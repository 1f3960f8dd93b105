"""Ask an ONNX file by the ONNX Runtime of whichever Python runs this, on the CPU, row by row:

    .venv-triton/bin/python3 -m scripts.convert.onnx_session MODEL.onnx MORE REQUEST.npy OUT.npz output tokens codes

MORE: hexadecimal, see `open_session`. OUT.npz holds the values so named, and `version`. It imports NumPy and ONNX
Runtime alone, for those are what every environment has.
"""

import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime  # type: ignore[import-untyped]


def open_session(onnx: Path, more: bytes = b"", *, ahead: bool = False) -> onnxruntime.InferenceSession:
    """A session on the CPU; `more`: a further piece of the file's protobuf message, such as outputs.

    `ahead`: that piece comes first, and its nodes run as soon as they can, so that they keep no value to the end.
    """
    options = onnxruntime.SessionOptions()
    if ahead:  # of nodes that are ready, the one that stands first
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.log_severity_level = 4  # what is wrong is said by who asks, in one line
    options.enable_cpu_mem_arena = False  # an arena's gigabyte would stay while PyTorch runs
    # The copy lives in memory, and only until it is read.
    with os.fdopen(os.memfd_create("model"), "wb") as copy:
        copy.write(more if ahead else b"")
        copy.flush()
        with onnx.open("rb") as file:
            while os.sendfile(copy.fileno(), file.fileno(), None, 1 << 30):
                pass
        copy.seek(0, os.SEEK_END)
        copy.write(b"" if ahead else more)
        copy.flush()
        return onnxruntime.InferenceSession(f"/proc/self/fd/{copy.fileno()}", options, ["CPUExecutionProvider"])


def main() -> None:
    model, more, request, out, *names = sys.argv[1:]
    session = open_session(Path(model), bytes.fromhex(more))
    rows = np.load(request, mmap_mode="r")
    answers = [session.run(names, {"input": np.array(rows[index : index + 1])}) for index in range(len(rows))]
    values = {name: np.concatenate(parts) for name, parts in zip(names, zip(*answers, strict=True), strict=True)}
    np.savez(out, version=onnxruntime.__version__, **values)


if __name__ == "__main__":
    main()
