"""Build the image that runs the published networks on CT studies, unless it is there already.

    python3 -sES -m scripts.deploy.inference_image REPOSITORY --base IMAGE [--tag NAME:TAG] --verdict FILE

As scripts/deploy/image.py, which says what the arguments are and how an image tells what it was built from.
"""

import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path

from scripts.deploy.engine import base_of, docker, labels
from scripts.deploy.image import (
    END,
    authority,
    build,
    built_from,
    dockerfile,
    header,
    labels_of,
    main,
    member,
    named,
    verified,
)
from scripts.publish.vouch import vouched_for
from scripts.steps.records import digest, lock

DOCKERFILE, REQUIREMENTS, PROGRAM = "docker/inference.Dockerfile", "requirements-inference.txt", "scripts/infer"
MODELS = "vit_onnx", "binary_onnx", "multilabel_onnx", "bpr_model"


def image(repository: str, base: str, tag: str, verdict: str) -> None:
    """Let `tag` be the image of the repository; SystemExit where that is not what it was judged as, or not whole."""
    docker("version")  # before a gigabyte is read
    with lock("publish", fcntl.LOCK_SH):  # nobody publishes while it is read
        kind, tag = named("chest-ct-inference", tag, repository)
        vouched = vouched_for(repository, verdict)
        for model in MODELS:
            if not any(path.startswith(f"{model}/1/") and path.endswith(".onnx") for path in vouched):
                raise SystemExit(f"{repository}/{model}: no ONNX file there, which this image runs; make repository")
        models = {path: sha for path, sha in vouched.items() if path.startswith(tuple(f"{name}/" for name in MODELS))}
        program = {str(path): digest(str(path)) for path in [Path(REQUIREMENTS), *sorted(Path(PROGRAM).glob("*.py"))]}
        inputs = built_from(base_of(base), {**models, **program}, DOCKERFILE)
        if labels(tag).get("chest.inputs") == inputs:
            print(f"{tag} is up to date: {len(models)} files of {repository}, nothing rebuilt")
            return
        told = labels_of("Findings in chest CT", base, kind, inputs, models)
        build(tag, base, told, context(repository, models, program))
    print(f"{tag}: {kind} weights\n  docker run --rm -v FOLDER:/input:ro -v FOLDER:/output {tag}")


def context(repository: str, models: Mapping[str, str], program: Mapping[str, str]) -> Iterator[bytes]:
    """Yield the tar archive that docker builds from."""
    yield from member("Dockerfile", dockerfile(DOCKERFILE))
    yield from authority()
    places = {path: path for path in program} | {
        f"{'vit' if path.startswith('vit_') else 'models'}/{path}": f"{repository}/{path}" for path in models
    }
    digests = {**program, **{f"{repository}/{path}": sha for path, sha in models.items()}}
    for place, path in sorted(places.items()):
        size = Path(path).stat().st_size
        yield header(place, size)
        yield from verified(path, size, digests[path])
        yield bytes(-size % 512)
    yield END


if __name__ == "__main__":
    main(image, __doc__)
