"""Build the image that runs the published networks on CT studies, unless it is up to date.

    python3 -sES -m scripts.deploy.inference_image REPOSITORY --base IMAGE [--tag NAME:TAG] --verdict FILE

Arguments and labels are those of scripts/deploy/image.py.
"""

import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path

from scripts.deploy.docker_engine import pull_base, read_labels, run_docker
from scripts.deploy.image import (
    END,
    choose_tag,
    digest_sources,
    main,
    make_header,
    make_labels,
    read_dockerfile,
    run_build,
    stream_certificates,
    stream_member,
    stream_verified,
)
from scripts.publish.vouch import check_vouched
from scripts.steps.records import current_digest, lock_file

DOCKERFILE, REQUIREMENTS, PROGRAM = "docker/inference.Dockerfile", "requirements-inference.txt", "scripts/infer"
MODELS = "vit_onnx", "binary_onnx", "multilabel_onnx", "bpr_model"


def build_image(repository: str, base: str, tag: str, verdict: str) -> None:
    """Build the repository's image as `tag`; SystemExit if it is not what the verdict judged, or a model is missing."""
    run_docker("version")  # fails early, before a gigabyte is read
    with lock_file("publish", fcntl.LOCK_SH):  # nobody may publish while the files are read
        kind, tag = choose_tag("chest-ct-inference", tag, repository)
        vouched = check_vouched(repository, verdict)
        for model in MODELS:
            if not any(path.startswith(f"{model}/1/") and path.endswith(".onnx") for path in vouched):
                raise SystemExit(f"{repository}/{model}: no ONNX file, but this image runs one; make repository")
        models = {path: sha for path, sha in vouched.items() if path.startswith(tuple(f"{name}/" for name in MODELS))}
        program = {
            str(path): current_digest(str(path)) for path in [Path(REQUIREMENTS), *sorted(Path(PROGRAM).glob("*.py"))]
        }
        inputs = digest_sources(pull_base(base), {**models, **program}, DOCKERFILE)
        if read_labels(tag).get("chest.inputs") == inputs:
            print(f"{tag} is up to date: {len(models)} files of {repository}, nothing rebuilt")
            return
        told = make_labels("Findings in chest CT", base, kind, inputs, models)
        run_build(tag, base, told, stream_context(repository, models, program))
    print(f"{tag}: {kind} weights\n  docker run --rm -v FOLDER:/input:ro -v FOLDER:/output {tag}")


def stream_context(repository: str, models: Mapping[str, str], program: Mapping[str, str]) -> Iterator[bytes]:
    """Yield the tar archive that docker builds from."""
    yield from stream_member("Dockerfile", read_dockerfile(DOCKERFILE))
    yield from stream_certificates()
    places = {path: path for path in program} | {
        f"{'vit' if path.startswith('vit_') else 'models'}/{path}": f"{repository}/{path}" for path in models
    }
    digests = {**program, **{f"{repository}/{path}": sha for path, sha in models.items()}}
    for place, path in sorted(places.items()):
        size = Path(path).stat().st_size
        yield make_header(place, size)
        yield from stream_verified(path, size, digests[path])
        yield bytes(-size % 512)
    yield END


if __name__ == "__main__":
    main(build_image, __doc__)
