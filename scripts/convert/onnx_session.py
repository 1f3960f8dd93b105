"""Run an ONNX file with the ONNX Runtime of the Python that runs this program, on the CPU, row by row:

    .venv-triton/bin/python3 -m scripts.convert.onnx_session MODEL.onnx MORE REQUEST.npy OUT.npz output tokens codes

MORE: the argument `more` of `open_session`, in hexadecimal. OUT.npz holds the values named at the end, and `version`.
This program imports only NumPy and ONNX Runtime, which every environment has.
"""

import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime  # type: ignore[import-untyped]


def open_session(onnx: Path, more: bytes = b"", *, ahead: bool = False) -> onnxruntime.InferenceSession:
    """Return a session on the CPU. `more`: one more piece of the file's protobuf message, such as outputs.

    `ahead`: put this piece first and run its nodes as early as possible, so that no value is kept for them to the end.
    """
    options = onnxruntime.SessionOptions()
    if ahead:  # among the nodes that are ready, the first in the file runs next
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.log_severity_level = 4  # the caller reports errors, in one line
    options.enable_cpu_mem_arena = False  # an arena's gigabyte would stay while PyTorch runs
    # A protobuf message may come in pieces, so file and piece are joined in memory until the session has read them
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
