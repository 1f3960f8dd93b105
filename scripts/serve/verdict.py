"""Let a real Triton judge a set of models: each must load, answer as PyTorch does, and unload.

    python -m scripts.serve.verdict vit_onnx/1/model.onnx=build/onnx/vit.onnx … build/checks/verdict.json
    python -m scripts.serve.verdict --repository model_repository_running build/verify.json

FILE=SOURCE: a file of the repository, and where it lies now. A fresh staging folder gets links; nothing is copied.
--gpu-checks PATTERN: files with the answers of TensorRT plans on a GPU; {} stands for the model's name without its end.
--repository: judge an existing repository where it lies. The requests and expected answers of model `<name>_…` are in
build/checks/<name>.json. OUT is written only if all is well: per model READY, difference and latency, and the sha256
of each file.
"""

import argparse
import http.client
import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient import grpc  # type: ignore[import-untyped]
from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped]

from scripts.convert.collapse import CAUSE, find_alike_rows
from scripts.convert.sample import make_sample
from scripts.convert.ties import remove_flips
from scripts.serve.check_repository import find_faults
from scripts.serve.model_config import read_config
from scripts.serve.server_in_docker import has_gpu
from scripts.serve.triton_client import CHANNEL, make_input
from scripts.serve.triton_server import Server, triton_server
from scripts.steps.records import hash_file

LARGE = 32 << 20  # bytes; a request of this size or more is timed once, not five times


def pass_verdict(
    repository: Path,
    checks: Path,
    models: Path,
    log: Path,
    image: str | None = None,
    timeout: float = 600,
    gpu_checks: str | None = None,
    variants: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the content of OUT; SystemExit names the model, the fault and what to do."""
    found = find_faults(repository, models)
    print("".join(f"recommendation: {line}\n" for line in found.recommendations), end="", flush=True)
    if found.faults:
        raise SystemExit("\n".join([*found.faults, f"{repository}: {len(found.faults)} findings; nothing was served"]))
    names = sorted(path.name for path in repository.iterdir() if path.is_dir())
    for name in names:
        if not image and read_config(repository / name / "config.pbtxt").platform == "tensorrt_plan":
            raise SystemExit(f"{name}: only an image with a GPU serves a TensorRT plan: make verify FORMAT=both")
    asked = {
        name: (
            read_check(models, name),
            find_expected(checks, gpu_checks, name, variants, gpu=bool(image) and has_gpu()),
        )
        for name in names
    }
    before = read_states(repository)
    files = {path: hash_file(repository / path) for path in before}
    print(f"  starting Triton on {len(names)} models", flush=True)
    with triton_server(repository, log, image=image, timeout=timeout) as server:
        try:
            version = server.ask("/v2")["version"]
            index = {model["name"]: model for model in server.ask("/v2/repository/index", "POST")}
            for name in names:
                if (state := index.get(name, {}).get("state")) != "READY":
                    raise SystemExit(
                        f"{name}: expected READY, found {state}: {index.get(name, {}).get('reason')}; log: {log}"
                    )
            results = {name: ask_model(server, name, *asked[name], timeout) for name in names}
        except (OSError, http.client.HTTPException) as error:
            raise SystemExit(f"{repository}: {server.explain_trouble(str(error))}") from error
    if read_states(repository) != before:
        raise SystemExit(
            f"{repository}: its files changed while they were judged; start again when no program writes there"
        )
    return {"server": f"{image or 'tritonserver'} {version}", "models": results, "files": files}


def ask_model(
    server: Server, name: str, entry: dict[str, Any], check: dict[str, Any], timeout: float
) -> dict[str, Any]:
    """Load, ask and unload one model as the client does. Return its state, differences and median latency."""
    client = grpc.InferenceServerClient(server.grpc, channel_args=CHANNEL)
    print(f"  asking {name}", flush=True)
    try:
        client.load_model(name, client_timeout=timeout)
        largest, relative, flips = 0.0, 0.0, 0
        times: list[float] = []
        outputs: list[NDArray[Any] | None] = []
        for answer in check["served"]:
            request = make_sample(entry, answer["seed"], answer["batch"], answer.get("first", 0))
            small = sum(array.nbytes for array in request.values()) < LARGE
            # Popped to free memory: a volume is 221 MB, and gRPC makes a copy of its own
            inputs = [make_input(key, request.pop(key)) for key in list(request)]
            for _ in range(5 if small else 1):
                start = time.perf_counter()
                result = client.infer(name, inputs, model_version="1", client_timeout=timeout)
                times.append(time.perf_counter() - start)
            outputs.append(result.as_numpy("output"))
        check_answers_differ(name, check["served"], outputs)
        for answer, output in zip(check["served"], outputs, strict=True):
            difference, turned = compare_answers(name, answer, output)
            largest, flips = max(largest, difference), flips + turned
            relative = max(relative, difference / (check["scale"] or 1.0) if difference else 0.0)
        client.unload_model(name, client_timeout=timeout)
    except InferenceServerException as error:
        raise SystemExit(f"{name}: {server.explain_trouble(f'Triton says: {error.message()}')}") from error
    finally:
        client.close()
    milliseconds = round(1000 * statistics.median(times), 1)
    return {
        "state": "READY",
        "difference": largest,
        "relative": relative,
        "codes_flipped": flips,
        "latency_ms": milliseconds,
    }


def check_answers_differ(name: str, answers: Sequence[dict[str, Any]], served: Sequence[NDArray[Any] | None]) -> None:
    """SystemExit if different inputs got nearly equal answers, although PyTorch's answers differ."""
    pairs = [
        (np.asarray(answer["output"], np.float64), output)
        for answer, output in zip(answers, served, strict=True)
        if output is not None and output.dtype != object
    ]
    if not pairs or any(right.shape != output.shape for right, output in pairs):
        return  # compare_answers judges tags, and refuses another shape
    expected, found = (np.concatenate(side) for side in zip(*pairs, strict=True))
    if same := find_alike_rows(expected, found):
        one, other = same[0]
        apart = [np.linalg.norm(side[one].astype(np.float64) - side[other]) for side in (found, expected)]
        raise SystemExit(
            f"{name}: answers different inputs alike: {len(same)} pairs; the first is {apart[0]:.2e} apart, PyTorch's "
            f"{apart[1]:.2e}; {CAUSE}; next: make repository"
        )


def compare_answers(name: str, answer: dict[str, Any], served: NDArray[Any] | None) -> tuple[float, int]:
    """Return the largest absolute difference, and the number of flips that were subtracted before.

    A flip of a code explains its whole change of an answer, see scripts/convert/ties.py. SystemExit if an element
    differs by more than is allowed, or a tag differs at all.
    """
    next_step = (
        "PyTorch answers this otherwise: the model was rolled back, is not published yet, or is wrong; make repository"
    )
    if served is None:
        raise SystemExit(f"{name}: the answer has no tensor `output`, which the client reads")
    if served.dtype == object:
        found = [value.decode() for value in served.ravel()]
        if found != answer["output"]:
            raise SystemExit(f"{name}: expected {answer['output']}, answered {found}; {next_step}")
        return 0.0, 0
    expected = np.asarray(answer["output"], np.float64)
    if served.shape != expected.shape:
        raise SystemExit(f"{name}: expected an answer of shape {expected.shape}, found {served.shape}; {next_step}")
    difference, allowed = served.astype(np.float64) - expected, answer["allowed"]
    flips = 0
    for row, changes in enumerate(answer.get("flips", [])):
        difference[row], count = remove_flips(difference[row], changes, allowed)
        flips += count
    # Every comparison with NaN is false, so test for `within`, not for `beyond`
    within = np.abs(difference) <= allowed
    if not within.all():
        bad = int(within.size - within.sum())
        where = tuple(int(index[0]) for index in np.nonzero(~within))
        raise SystemExit(
            f"{name}: {bad} of {within.size} values beyond the tolerance, the first at {where}: "
            f"expected {expected[where]:.7g}, answered {served[where]:.7g}; {next_step}"
        )
    return float(np.abs(difference).max()), flips


def stage_files(contents: Sequence[str], staging: Path) -> None:
    """Make a fresh folder of links, one for each FILE=SOURCE; SystemExit if the old folder holds anything but links."""
    if staging.exists() or staging.is_symlink():
        for path in [staging, *staging.rglob("*")]:
            if path.is_symlink() == path.is_dir():
                raise SystemExit(
                    f"{path}: no link of an earlier staging; expected {staging} empty or absent; move this away"
                )
        shutil.rmtree(staging)
    for item in contents:
        file, separator, source = item.partition("=")
        if not separator or Path(file).is_absolute() or ".." in Path(file).parts:
            raise SystemExit(f"{item}: expected FILE=SOURCE, such as vit_onnx/1/model.onnx=build/onnx/vit.onnx")
        if not Path(source).is_file():
            raise SystemExit(f"{source}: no such file, expected for {file}; make it with: make repository")
        link = staging / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(source).resolve())


def read_check(folder: Path, model: str, variants: Sequence[str] = ()) -> dict[str, Any]:
    """Return a model's entry or check: vit.json of vit_onnx and vit_trt, vit.tf32.json if `variants` has vit.tf32."""
    path = folder / f"{find_variant(model, variants)}.json"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file, but {model} is judged by it; make it with: make onnx")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def find_expected(
    checks: Path, gpu_checks: str | None, model: str, variants: Sequence[str] = (), *, gpu: bool = False
) -> dict[str, Any]:
    """Return the requests and expected answers of a model.

    If its plan was compared on a GPU, these are the answers of that comparison (`gpu_checks`), else PyTorch's.
    `gpu`: the server has a GPU; PyTorch's answers may then differ by `allowed_gpu`, the error of a GPU's arithmetic.
    """
    on_gpu = Path((gpu_checks or "").format(find_variant(model, variants)))
    if on_gpu.is_file():
        content: dict[str, Any] = json.loads(on_gpu.read_text())
        return content
    content = read_check(checks, model, variants)
    if gpu:
        for answer in content["served"]:
            if "allowed_gpu" in answer:  # tags are the same everywhere
                answer["allowed"] = answer["allowed_gpu"]
    return content


def find_variant(model: str, variants: Sequence[str]) -> str:
    """Return a model's name without its end: vit_onnx or vit_trt -> vit, or vit.tf32 if `variants` has that."""
    name = model.rpartition("_")[0]
    return next((found for found in variants if found.partition(".")[0] == name), name)


def read_states(repository: Path) -> dict[str, tuple[int, int, int]]:
    """Return inode, size and mtime of each file, by its path in the repository; links are followed."""
    files = sorted(path for path in repository.rglob("*") if path.is_file())
    found = [(path.relative_to(repository).as_posix(), path.stat()) for path in files]
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Let a real Triton judge a set of models.")
    parser.add_argument("contents", nargs="*", metavar="FILE=SOURCE")
    parser.add_argument("out", type=Path)
    parser.add_argument("--repository", type=Path, help="judge this repository where it is")
    parser.add_argument("--staging", type=Path, default=Path("build/staging"))
    parser.add_argument("--checks", type=Path, default=Path("build/checks"))
    parser.add_argument("--models", type=Path, default=Path("build/models"))
    parser.add_argument("--variant", action="append", default=[], metavar="MODEL.PRECISION", help="such as vit.tf32")
    parser.add_argument("--log", type=Path, default=Path("build/logs/verdict.log"))
    parser.add_argument("--gpu-checks", metavar="PATTERN", help="files with the answers of plans on a GPU")
    parser.add_argument("--release", help="NVIDIA's release whose limits count (nothing: NGC_RELEASE)")
    parser.add_argument("--image", help="run this image's server in Docker")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a start or an answer")
    given = parser.parse_intermixed_args(argv)  # options may stand between files
    if bool(given.contents) == bool(given.repository):
        parser.error("expected either FILE=SOURCE … or --repository")
    if given.release:
        os.environ["NGC_RELEASE"] = given.release
    if given.contents:
        stage_files(given.contents, given.staging)
    judged = given.repository or given.staging
    try:
        image, timeout = given.image or None, given.timeout
        result = pass_verdict(
            judged, given.checks, given.models, given.log, image, timeout, given.gpu_checks, given.variant
        )
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, model in result["models"].items():
        flipped = f" after {model['codes_flipped']} near ties" if model["codes_flipped"] else ""
        print(
            f"{name}: {model['state']}, differs by {model['relative']:.1e} of its scale{flipped}, "
            f"{model['latency_ms']} ms"
        )


if __name__ == "__main__":
    main()
