"""Judge an archive of finished models: unpack it, check it offline, serve it with a real Triton, ask each model.

    python -m scripts.publish.prebuilt --models build/models training/model_repository_running.zip build/prebuilt OUT

OUT is written only if nothing is wrong: the answer of each model and the sha256 of each file.  A model that cannot be
served on this machine is printed with the reason: a plan or KIND_GPU without a GPU, requirements that cannot be
installed, a Python model that does not start or answer here.  With ACCEPT=unserved in the environment OUT is written
all the same.  That allows nothing else: every model must pass the offline check, and each ONNX model is served if it
can run here.
"""

import argparse
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as schema  # type: ignore[import-untyped]
from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped]

from scripts.archives.unpack import unpack_all
from scripts.convert.sample import make_sample
from scripts.serve.check_repository import find_faults, read_entry
from scripts.serve.client_contract import CLIENT
from scripts.serve.model_config import find_backend, read_config
from scripts.serve.triton_client import CHANNEL, make_input
from scripts.serve.triton_server import Server, triton_server
from scripts.serve.verdict import stage_files

OURS = Path("convertation/bpr/requirements.txt")
SERVER = Path("requirements-triton.txt")
VENV = Path(".venv-prebuilt")
ALWAYS = ["numpy<2"]  # with NumPy 2 Triton's Python stub returns empty tensors
SIGNING = Path(".venv-signing")
STAGING = Path("build/staging-prebuilt")
LOG = Path("build/logs/prebuilt.log")
# A line with a package of the index, its versions and markers; no option, address, path or variable
PLAIN = re.compile(r"\s*(#.*|[A-Za-z0-9][\w.-]*\s*(\[[\w\s,.-]*\])?\s*([<>=!~][^;@#/$\\]*)?(;[^#$\\]*)?(\s#.*)?)?")
GPUS = Path("/proc/driver/nvidia/gpus")


class UnservedError(Exception):
    """A model that this machine does not serve, with the reason."""


def judge_archive(
    archive: Path,
    tree: Path,
    models: Path,
    accept: bool,
    gpu: bool,
    timeout: float = 600,
    key: str = "",
    signature: str = "",
) -> dict[str, Any]:
    """Return the content of OUT; SystemExit with the model and the reason if anything is wrong.

    With a public `key`, the tree is first verified against its `signature`.
    """
    files = unpack_models(archive, tree)
    if key:
        verify_signature(tree, key, signature)
    names = sorted({path.split("/")[0] for path in files})
    if lacking := sorted(set(CLIENT) - set(names)):
        raise SystemExit(
            f"{archive.name} has no {', '.join(lacking)}, which the client asks; it has {', '.join(names)}"
        )
    found = find_faults(tree, models, gpu=True)  # whether there is a GPU here says nothing about the archive
    remarks = found.recommendations
    print("".join(f"{line}; published as it is\n" for line in remarks), end="", flush=True)
    if faults := found.faults:
        raise SystemExit("\n".join([*faults, f"{archive.name}: {len(faults)} findings; nothing was published"]))
    configs = {name: read_config(tree / name / "config.pbtxt") for name in names}
    for name, config in configs.items():
        config.backend = find_backend(config, sorted((tree / name).iterdir()))  # config.pbtxt need not name it
    unserved = {name: reason for name, config in configs.items() if (reason := explain_unservable(config, gpu))}
    own_code = [name for name in names if configs[name].backend == "python" and name not in unserved]
    venv, trouble = make_environment(tree) if own_code else (None, "")
    if trouble:
        unserved |= dict.fromkeys(own_code, trouble)
    served = {name: configs[name] for name in names if name not in unserved}
    try:
        answers = serve_models(tree, files, served, models, venv, timeout)
    except UnservedError as error:
        others = {name: config for name, config in served.items() if config.backend != "python"}
        if len(others) == len(served):
            raise SystemExit(str(error)) from None
        try:
            answers = serve_models(tree, files, others, models, None, timeout)
        except UnservedError as fault:  # so the Python model was not the cause
            raise SystemExit(str(fault)) from None
        unserved |= {name: str(error) for name in served if name not in others}
    for name, answer in answers.items():
        print(f"{name}: READY, {answer['says']}, {answer['latency_ms']} ms")
    for name, reason in unserved.items():
        print(f"{name}: not served here: {reason}")
    if unserved and not accept:
        raise SystemExit(
            f"{archive.name}: {', '.join(unserved)} could not be tried here; nothing was published\n"
            "To publish it untried: make repository FROM=prebuilt ACCEPT=unserved"
        )
    return {"models": answers, "unserved": unserved, "remarks": remarks, "files": files}


def unpack_models(archive: Path, tree: Path) -> dict[str, str]:
    """Unpack the archive's models into a new `tree`; return the sha256 of each file by its path."""
    shutil.rmtree(tree, ignore_errors=True)
    digests: dict[str, str] = {}

    def note_written(path: str, digest: str) -> None:
        digests[Path(path).relative_to(tree).as_posix()] = digest

    unpack_all(archive, tree, tree="*/config.pbtxt", is_ours=lambda path, digest: False, note_written=note_written)
    for cache in list(tree.rglob("__pycache__")):  # from the machine that packed the archive
        shutil.rmtree(cache)
    files = {path: digest for path, digest in sorted(digests.items()) if "/" in path and "/__pycache__/" not in path}
    for path in files:
        if not re.fullmatch(r"[\w.-]+/[^%=\n]+", path):
            raise SystemExit(
                f"{archive.name}: {path!r}; expected a model's name of letters, digits, _ . - and no % or ="
            )
    return files


def verify_signature(tree: Path, key: str, signature: str) -> None:
    """Print what was signed; SystemExit if the tree differs from it."""
    pythons = sorted(SIGNING.glob("bin/python3.??"))
    if not pythons:
        raise SystemExit(f"{SIGNING}: not installed; make {SIGNING}/installed")
    words = ["-m", "scripts.publish.signature", "verify", key, str(tree), "--bundle", signature]
    said = subprocess.run([pythons[0], *words], capture_output=True, text=True, check=False)
    if said.returncode:
        raise SystemExit(f"{said.stderr.strip()}; no code of it was run, nothing was published")
    print(said.stdout, end="", flush=True)


def explain_unservable(config: Any, gpu: bool) -> str:
    """Return why this machine cannot serve such a model, "" if it can."""
    if config.platform == "tensorrt_plan" or config.backend == "tensorrt":
        return "only an image with a GPU serves a TensorRT plan"
    if not gpu and any(group.kind == schema.ModelInstanceGroup.KIND_GPU for group in config.instance_group):
        return "its config.pbtxt says KIND_GPU, and this machine has no GPU"
    return ""


def make_environment(tree: Path, venv: Path = VENV) -> tuple[Path | None, str]:
    """Return the environment for a tree's own code (None: the usual one fits), and the reason if it cannot be made."""
    theirs = [path.read_text(encoding="utf-8") for path in sorted(tree.glob("*/*/requirements.txt"))]
    if all(text == OURS.read_text(encoding="utf-8") for text in theirs):
        shutil.rmtree(venv, ignore_errors=True)  # it belongs to an earlier archive, and `make serve` would use it
        return None, ""
    if odd := [line for text in theirs for line in text.splitlines() if not PLAIN.fullmatch(line)]:
        return None, f"its requirements hold more than names and versions, and are not installed: {odd[0].strip()!r}"
    pins = [line for path in (SERVER, OURS) for line in path.read_text(encoding="utf-8").splitlines()]
    wanted = [pin for pin in pins if pin.startswith("nvidia-pytriton")]
    wanted += ALWAYS
    if not any(re.match(r"\s*onnxruntime", line) for text in theirs for line in text.splitlines()):
        wanted += [pin for pin in pins if pin.startswith("onnxruntime")]  # for the ONNX models
    text = "\n".join([*wanted, *theirs])
    done, listed = venv / "requirements.txt", LOG.parent / f"{venv.name.removeprefix('.venv-')}-requirements.txt"
    if done.is_file() and done.read_text(encoding="utf-8") == text:
        return venv, ""
    shutil.rmtree(venv, ignore_errors=True)
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text(text, encoding="utf-8")
    Path(".make/lock").mkdir(parents=True, exist_ok=True)
    # Only wheels, and nothing is started in the environment afterwards: installing runs no code of theirs
    command = ["scripts/steps/venv.sh", sys.executable, str(venv), str(listed), os.devnull]
    wheels = os.environ | {"PIP_ONLY_BINARY": ":all:"}
    made = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, env=wheels)
    if made.returncode:
        words = [line for line in made.stderr.splitlines() if line.startswith("ERROR:")] or made.stderr.splitlines()
        shutil.rmtree(venv, ignore_errors=True)
        return None, f"its requirements cannot be installed ({listed}): {' '.join(words[:2])}"
    done.write_text(text, encoding="utf-8")
    return venv, ""


def serve_models(
    tree: Path,
    files: Iterable[str],
    configs: dict[str, Any],
    models: Path,
    venv: Path | None,
    timeout: float,
) -> dict[str, Any]:
    """Start Triton with these models of the tree only, and ask each one.

    UnservedError if Triton does not start or a Python model does not answer; SystemExit if an answer is wrong.
    """
    if not configs:
        return {}
    stage_files([f"{path}={tree / path}" for path in files if path.split("/")[0] in configs], STAGING)
    with ExitStack() as running:
        try:
            server = running.enter_context(triton_server(STAGING, LOG, venv=venv, timeout=timeout, foreign=True))
        except SystemExit as error:
            if not isinstance(error.code, str):  # a signal
                raise
            raise UnservedError(error.code) from None
        try:
            index = {model["name"]: model for model in server.ask("/v2/repository/index", "POST")}
            for name in configs:
                if (state := index.get(name, {}).get("state")) != "READY":
                    raise SystemExit(f"{name}: expected READY, it is {state}; {LOG}")
            return {
                name: ask_model(server, name, config, read_entry(models, name), timeout)
                for name, config in configs.items()
            }
        except (OSError, http.client.HTTPException) as error:
            raise SystemExit(f"{tree}: {server.explain_trouble(str(error))}") from error


def ask_model(server: Server, name: str, config: Any, entry: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
    """Load one model, ask it twice and unload it, as the client does."""
    answers: list[NDArray[Any]] = []
    client = grpc.InferenceServerClient(server.grpc, channel_args=CHANNEL)
    start = time.perf_counter()
    try:
        client.load_model(name, client_timeout=timeout)
        for seed in (0, 1) if entry else ():
            request = make_sample(entry, seed, 1) if entry else {}
            inputs = [make_input(key, request.pop(key)) for key in list(request)]
            start = time.perf_counter()
            answers.append(client.infer(name, inputs, model_version="1", client_timeout=timeout).as_numpy("output"))
        seconds = time.perf_counter() - start
        client.unload_model(name, client_timeout=timeout)
    except InferenceServerException as error:
        trouble = server.explain_trouble(f"Triton says: {error.message()}")
        raise (UnservedError if config.backend == "python" else SystemExit)(f"{name}: {trouble}") from error
    finally:
        client.close()
    says = check_contract(name, answers, entry) if entry else "not asked, as its inputs are not known here"
    return {"state": "READY", "says": says, "latency_ms": round(1000 * seconds, 1)}


def check_contract(name: str, answers: Sequence[NDArray[Any] | None], entry: dict[str, Any]) -> str:
    """Return in words what a model answered; SystemExit if the client could not read it."""
    if entry["family"] == "bpr":
        one = answers[0]
        if one is None or one.shape != (1,) or not isinstance(one[0], bytes) or not one[0]:
            raise SystemExit(f"{name}: expected one tag, answered {one!r}")
        return f"says {one[0].decode(errors='backslashreplace')}"
    expected = (1, *entry["output"])
    for answer in answers:
        if answer is None or answer.shape != expected or answer.dtype != np.float32:
            raise SystemExit(f"{name}: expected float32 {expected}, answered {getattr(answer, 'shape', 'nothing')}")
        if bad := int(answer.size - np.isfinite(answer).sum()):
            raise SystemExit(f"{name}: {bad} of {answer.size} values of its answer are not finite")
        if answer.size > 1 and np.ptp(answer) == 0:
            raise SystemExit(f"{name}: every value of its answer is {answer.flat[0]:.7g}")
    both = np.array(answers, np.float32)
    if (both[0] == both[1]).all():
        raise SystemExit(f"{name}: two different requests have the same answer")
    return f"answers within {both.min():.3g} … {both.max():.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, metavar="ARCHIVE")
    parser.add_argument("tree", type=Path, metavar="FOLDER", help="where the models are unpacked")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--models", type=Path, default=Path("build/models"), help="folder of the models' entries")
    parser.add_argument("--release", help="NVIDIA's release whose limits count (default: NGC_RELEASE)")
    parser.add_argument("--key", default="", help="public key of the signer")
    parser.add_argument("--signature", default="", metavar="FILE", help="its model-signing bundle")
    given = parser.parse_args()
    if given.release:
        os.environ["NGC_RELEASE"] = given.release
    try:
        accept = os.environ.get("ACCEPT") == "unserved"
        result = judge_archive(
            given.archive, given.tree, given.models, accept, GPUS.is_dir(), key=given.key, signature=given.signature
        )
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
