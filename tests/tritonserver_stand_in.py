"""Stand-in for the tritonserver of NVIDIA's image: the real server of .venv-triton, with a backend that needs no GPU.

The backend computes plans of tests/trtexec_stand_in.py by ONNX Runtime; scripts/serve/triton_server.py makes the rest.
"""

import os
import sys
from pathlib import Path

BACKEND = """
import json
import sys

sys.path.insert(0, "/opt/stand-in")
import triton_python_backend_utils as pb_utils
from trtexec_stand_in import Engine
from pathlib import Path


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        file = config["cc_model_filenames"]["8.6"]
        self.engine = Engine((Path(args["model_repository"]) / args["model_version"] / file).read_bytes())

    def execute(self, requests):
        arrays = [pb_utils.get_input_tensor_by_name(request, "input").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("output", self.engine.run(one))]) for one in arrays]
"""

if __name__ == "__main__":
    root = Path(os.environ["STAND_IN_ROOT"])
    sys.path.insert(0, str(root))
    from scripts.serve.triton_server import prepare_server

    scratch, environment = Path("/tmp/triton"), dict(os.environ)
    scratch.mkdir()
    command = prepare_server(root / ".venv-triton", scratch, environment)
    (scratch / "backends/tensorrt").mkdir()
    (scratch / "backends/tensorrt/model.py").write_text(BACKEND)
    os.execve(command[0], [*command, *sys.argv[1:]], environment)
