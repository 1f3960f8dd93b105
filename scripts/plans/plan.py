"""Build one TensorRT plan with trtexec in Docker, and write a record beside it. Standard library only.

    python3 -sESB -m scripts.plans.plan --gpu sm86 --tensorrt 10.1.0.27 REQUEST.json ONNX build/plan/sm86/vit.plan OUT
    python3 -sESB -m scripts.plans.plan --print --gpu sm86 [--precision P] [--flags F] ENTRY.json ONNX PLAN

--gpu, --tensorrt: what the plan is for; SystemExit if this machine has others.  --print: only print the commands.
The record, build/plan/sm86/vit.json, says from what, by what and on which GPU the plan was made, and how fast it is.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from scripts.plans import gpu, trtexec
from scripts.plans.plan_request import list_options
from scripts.steps.records import find_content, hash_file, read_inputs, write_text, written_digest

REJECTED = re.compile(r"timing ?cache.*(reject|mismatch|not be used|fail|invalid|different|corrupt|assert|skip)", re.I)
LATENCY = re.compile(r"\[I\] Latency: (.*)")
SPARE = 200 << 20  # bytes that must be free besides a plan as large as its ONNX file


def build_plan(plan: str, out: Path, onnx: str, request: dict[str, Any], folder: str, tensorrt: str) -> dict[str, Any]:
    """Write the plan to `out` and return its record; SystemExit if it cannot be built here."""
    image = os.environ["TENSORRT_IMAGE"]
    builder, here = gpu.find_image(image), gpu.find_gpu(image)
    if (here.folder, builder.tensorrt) != (folder, tensorrt):
        raise SystemExit(
            f"{plan} is for {folder} and TensorRT {tensorrt}; this machine builds for {here.folder} ({here.name}) and\n"
            f"TensorRT {builder.tensorrt}; build it on such a GPU with the same NGC_RELEASE,\n"
            "copy its folder here and name it: PLANS=dir"
        )
    scratch = prepare_folder(out, onnx)
    cache, draft = timing_cache_path(folder, tensorrt), scratch / "timing.cache"
    if cache.exists():
        shutil.copyfile(cache, draft)
    start = time.monotonic()
    words = complete_options(request["options"], Path(plan).name, request["precision"])
    try:
        try:
            said = trtexec.run_trtexec(plan, {"model.onnx": onnx}, str(scratch), words)
        except trtexec.TrtexecError as error:
            if not (cache.exists() and REJECTED.search(str(error))):
                raise
            set_aside_cache(cache)
            draft.unlink(missing_ok=True)
            said = trtexec.run_trtexec(plan, {"model.onnx": onnx}, str(scratch), words)
        if cache.exists() and REJECTED.search(said):
            set_aside_cache(cache)
        seconds = time.monotonic() - start
        made = scratch / Path(plan).name
        if not made.is_file() or not made.stat().st_size:
            raise SystemExit(f"{plan}: trtexec printed PASSED but wrote no plan; whole log: {trtexec.log_path(plan)}")
        if request["precision"] == "fp16":
            check_layers(plan, scratch / "layers.json")
        if draft.is_file():
            cache.parent.mkdir(parents=True, exist_ok=True)
            Path(shutil.copyfile(draft, f"{cache}.{os.uname().nodename}.{os.getpid()}~")).replace(cache)
        shutil.move(made, out)
    except trtexec.TrtexecError as error:
        full = shutil.disk_usage(scratch).free < SPARE
        raise SystemExit(
            f"{'the disk is full: make clean, ' if full else ''}{plan}: trtexec failed\n"
            f"{trtexec.explain_trouble(error, plan)}"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {
        "plan_sha256": hash_file(str(out)),
        "request": request,
        "onnx_sha256": hash_file(onnx),
        "tensorrt": tensorrt,
        "compute_capability": here.capability,
        "gpu": here.name,
        "gpu_memory_mib": here.memory,
        "driver": here.driver,
        "image": image,
        "image_id": builder.id,
        "command": shlex.join(trtexec.make_command(plan, {"model.onnx": onnx}, str(scratch), words)),
        "build_seconds": round(seconds, 1),
        "latency_ms": read_latency(said),
    }


def prepare_folder(out: Path, onnx: str) -> Path:
    """Return an empty folder for the container; SystemExit if it cannot be written or the disk lacks space."""
    scratch = Path(f"{out}.d")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        (scratch / "probe").write_bytes(b"probe")
        (scratch / "probe").unlink()
    except OSError as error:
        raise SystemExit(
            f"{scratch}: {error.strerror}; {gpu.explain_message(str(error)) or 'make it writable: chown, chmod'}"
        ) from None
    free, needed = shutil.disk_usage(scratch).free, Path(onnx).stat().st_size + SPARE
    if free < needed:
        raise SystemExit(
            f"{scratch}: {free >> 20} MiB free, a plan needs {needed >> 20}; make clean deletes what can be made again"
        )
    return scratch


def complete_options(shaping: list[str], name: str, precision: str) -> list[str]:
    """Return all options for trtexec: those that name files, and `shaping`."""
    files = ["--onnx=/in/model.onnx", f"--saveEngine=/out/{name}", "--timingCacheFile=/out/timing.cache"]
    return [*files, *shaping, *(["--exportLayerInfo=/out/layers.json"] if precision == "fp16" else [])]


def timing_cache_path(folder: str, tensorrt: str) -> Path:
    """Return the path of the timing cache: TensorRT's times of kernels, for all models of one GPU and TensorRT."""
    return Path("build/plan/timing", f"{folder}-{tensorrt}.cache")


def set_aside_cache(cache: Path) -> None:
    """Rename a rejected timing cache, so that it can be looked at but is not used."""
    print(f"  {cache}: TensorRT rejects it; renamed to {cache.name}.rejected, the plan is built without it", flush=True)
    with suppress(FileNotFoundError):  # another job has renamed it
        cache.replace(f"{cache}.rejected")


def check_layers(plan: str, file: Path) -> None:
    """SystemExit unless TensorRT's layer information has fp16 tensors, as the ONNX file has."""
    kinds = re.findall(r'"Format/Datatype" *: *"([^"]*)"', file.read_text(errors="replace") if file.is_file() else "")
    half = sum(bool(re.search("FP16|Half", kind, re.IGNORECASE)) for kind in kinds)
    if not half:
        raise SystemExit(
            f"{plan}: asked for fp16, but none of the {len(kinds)} tensors that TensorRT lists is fp16;\n"
            f"whole log: {trtexec.log_path(plan)}"
        )
    print(f"  {plan}: {half} of {len(kinds)} tensors of its layers are fp16", flush=True)


def read_latency(said: str) -> dict[str, float]:
    """Return the numbers of trtexec's last line of latencies: min, max, mean, median, percentile(99%), in ms."""
    lines = LATENCY.findall(said)
    return (
        {name.strip(): float(value) for name, value in re.findall(r"([^,=]+) = ([\d.]+) ms", lines[-1])}
        if lines
        else {}
    )


def list_commands(plan: str, onnx: str, entry: dict[str, Any], precision: str, flags: str, cache: Path) -> list[str]:
    """Return the lines that build a plan by hand."""
    scratch = f".make/out/{plan}.d"
    words = complete_options(list_options(entry, precision, flags), Path(plan).name, precision)
    lines = [f"# {plan}", f"mkdir -p {scratch}"]
    lines += [f"cp {cache} {scratch}/timing.cache"] if cache.exists() else []
    return [*lines, shlex.join(trtexec.make_command(plan, {"model.onnx": onnx}, scratch, words)), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--tensorrt", default="")
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--precision", default="fp32", help="only with --print")
    parser.add_argument("--flags", default="", help="only with --print")
    parser.add_argument("request", type=Path)
    parser.add_argument("onnx")
    parser.add_argument("plan")
    parser.add_argument("out", type=Path, nargs="?")
    given = parser.parse_args()
    onnx, digest = given.onnx, written_digest(given.onnx)
    if digest and not Path(onnx).exists():
        onnx = find_content(digest) or onnx  # the published copy
    content = json.loads(given.request.read_text())
    if given.print:
        cache = timing_cache_path(given.gpu, given.tensorrt)
        print("\n".join(list_commands(given.plan, onnx, content, given.precision, given.flags, cache)))
        return
    if not Path(onnx).exists():
        raise SystemExit(f"{onnx}: no such file; make it with: make onnx")
    if (was := read_inputs(str(given.request)).get(given.onnx)) and was != hash_file(onnx):
        raise SystemExit(
            f"{onnx}: not the file that {given.request} describes, another make replaced it; run make again"
        )
    trtexec.end_with_parent()
    record = build_plan(given.plan, given.out, onnx, content, given.gpu, given.tensorrt)
    write_text(str(Path(given.plan).with_suffix(".json")), json.dumps(record, indent=1) + "\n")
    median = record["latency_ms"].get("median", "?")
    print(f"  {given.plan}: built in {record['build_seconds']} s, answers in {median} ms at the usual batch")


if __name__ == "__main__":
    main()
