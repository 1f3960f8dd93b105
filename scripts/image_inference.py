"""Build the image that runs the published networks on CT studies.

    python3 -sES scripts/image_inference.py REPOSITORY --base IMAGE [--tag NAME:TAG]

Label chest.inputs tells what an image was built from; one that is built from the same is left as it is.
"""

import argparse
import fcntl
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

from records import lock, read, record

DOCKERFILE, REQUIREMENTS, PROGRAM = "docker/inference.Dockerfile", "requirements-inference.txt", "scripts/infer"
MODELS = "vit_onnx", "binary_onnx", "multilabel_onnx", "bpr_model"
# The user's own environment that pip needs in the image as well
GIVEN = (
    "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy",
    "https_proxy", "no_proxy",
)  # fmt: skip
CERTIFICATES = "PIP_CERT", "REQUESTS_CA_BUNDLE"


def context(repository: Path) -> dict[str, Path]:
    """Return each file that goes into the image, by its place in the context; SystemExit where a model lacks."""
    for model in MODELS:
        if not list((repository / model).glob("1/**/*.onnx")):
            raise SystemExit(f"{repository}/{model}: no ONNX file there; expected a whole repository; make repository")
    files = {"Dockerfile": Path(DOCKERFILE), REQUIREMENTS: Path(REQUIREMENTS)}
    files |= {str(path): path for path in sorted(Path(PROGRAM).glob("*.py"))}
    for model in MODELS:
        folder = "vit" if model == "vit_onnx" else "models"
        inside = (path for path in sorted((repository / model / "1").rglob("*")) if path.is_file())
        files |= {
            f"{folder}/{path.relative_to(repository)}": path for path in inside if "__pycache__" not in path.parts
        }
    return files


def image(repository: Path, base: str, tag: str) -> None:
    """Let `tag` be the image of the repository; SystemExit where docker does not build it."""
    with lock("publish", fcntl.LOCK_SH):  # nobody publishes while it is read
        kind = read(record("published", str(repository))).partition("\n")[0] or "other"
        tag = tag or f"chest-ct-inference:{kind}"
        if kind == "synthetic" and "synthetic" not in tag.rpartition(":")[2]:
            raise SystemExit(f"IMAGE={tag}: a synthetic one is tagged as such, {tag.partition(':')[0]}:synthetic, say")
        files = context(repository)
        digests = {place: hashlib.sha256(path.read_bytes()).hexdigest() for place, path in files.items()}
        inputs = hashlib.sha256(json.dumps([base, sorted(digests.items())]).encode()).hexdigest()
        if label(tag) == inputs:
            print(f"{tag} is up to date: {len(files)} files, nothing rebuilt")
            return
        build(tag, base, {"chest.weights": kind, "chest.inputs": inputs}, files)
    print(f"{tag}: {kind} weights\n  docker run --rm -v FOLDER:/input:ro -v FOLDER:/output {tag}")


def label(tag: str) -> str:
    """Return what an image was built from, "" if it is not there; SystemExit if there is no engine to ask."""
    try:
        words = ["docker", "image", "inspect", "--format", '{{index .Config.Labels "chest.inputs"}}', tag]
        run = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit("docker is not installed; on Debian and Ubuntu: sudo apt install docker.io") from None
    said = run.stderr.strip().splitlines()
    if run.returncode and "no such image" not in run.stderr.lower():
        raise SystemExit(f"docker does not answer: {said[-1] if said else 'no reason given'}")
    return run.stdout.strip()


def build(tag: str, base: str, labels: Mapping[str, str], files: Mapping[str, Path]) -> None:
    """Run docker build on a context that is streamed, and copied nowhere; SystemExit if it fails."""
    given = [f"{name}={os.environ[name]}" for name in GIVEN if os.environ.get(name)]
    words = [f"--build-arg={word}" for word in (f"BASE={base}", *given)]
    words += [f"--label={name}={value}" for name, value in labels.items()]
    certificate = next((Path(os.environ[name]) for name in CERTIFICATES if os.environ.get(name)), None)
    print(f"building {tag}", flush=True)
    run = subprocess.Popen(["docker", "build", f"--tag={tag}", *words, "-"], stdin=subprocess.PIPE, stdout=sys.stderr)
    assert run.stdin
    try:
        with run.stdin, tarfile.open(fileobj=run.stdin, mode="w|") as archive:
            for place, path in sorted((dict(files) | ({"ca.pem": certificate} if certificate else {})).items()):
                content = path.read_bytes()
                entry = tarfile.TarInfo(place)  # tells nothing of this machine, readable by all
                entry.size, entry.mode = len(content), 0o644
                archive.addfile(entry, io.BytesIO(content))
    except BrokenPipeError:
        pass  # docker says why
    except BaseException:
        run.kill()
        raise
    finally:
        status = run.wait()
    if status:
        raise SystemExit(f"{tag} was not built, what was there before stays; docker's own words stand above")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--base", required=True)
    parser.add_argument("--tag", default="")
    args = parser.parse_args()
    image(args.repository, args.base, args.tag)
