"""Build the Triton image from the published repository, unless it is up to date.

    python3 -sES -m scripts.deploy.image REPOSITORY --base IMAGE [--tag NAME:TAG] --verdict build/checks/verdict.json

Each file is read once, hashed on the way into the image, and compared with the file that the verdict judged. The label
chest.inputs of an image is a digest of all that it was built from.
"""

import argparse
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from scripts.deploy.docker_engine import inspect_object, pull_base, read_labels, run_docker
from scripts.publish import signature
from scripts.publish.vouch import check_vouched
from scripts.steps.records import lock_file, read_text, record_path

DOCKERFILE = "docker/triton.Dockerfile"
SERVER = "chest-ct-triton-server"
# Variables of the user that pip needs in the image, too
PIP = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST")
INSTALL = b"RUN for name in PIP_INDEX_URL"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")  # in no layer
CERTIFICATES = ("PIP_CERT", "REQUESTS_CA_BUNDLE")
END = bytes(1024)  # ends a tar archive


def list_requirements(repository: str) -> bytes:
    """Return the requirements.txt of a repository's Python models, joined."""
    return b"".join(path.read_bytes() for path in sorted(Path(repository).glob("*/1/requirements.txt")))


def digest_sources(base: str, files: Mapping[str, str], dockerfile: str = DOCKERFILE) -> str:
    """Return one digest of all that an image is built from: base image, Dockerfile, each file's path and digest."""
    told = [base, hashlib.sha256(Path(dockerfile).read_bytes()).hexdigest(), sorted(files.items())]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def build_server_image(repository: str, base: str) -> str:
    """Return the name of the image of Triton with a repository's requirements, and build it if it does not exist."""
    needs = list_requirements(repository)
    sha = hashlib.sha256(needs).hexdigest()
    tag = f"{SERVER}:{digest_sources(pull_base(base), {'requirements.txt': sha})[:12]}"
    if not inspect_object("image", tag):
        run_build(tag, base, {"chest.requirements": sha}, stream_context(needs, repository, {}), target="server")
    return tag


def build_image(repository: str, base: str, tag: str, verdict: str) -> None:
    """Build the published repository's image as `tag`; SystemExit if the repository is not what the verdict judged."""
    run_docker("version")  # fails early, before a gigabyte is read
    with lock_file("publish", fcntl.LOCK_SH):  # nobody may publish while the files are read
        kind, tag = choose_tag("chest-ct-triton", tag, repository)
        files = check_vouched(repository, verdict)
        signed = find_signed_digest(repository, files)
        inputs = digest_sources(pull_base(base), files | ({"signed": signed} if signed else {}))
        if read_labels(tag).get("chest.inputs") == inputs:
            print(f"{tag} is up to date: {len(files)} files of {repository}, nothing rebuilt")
            return
        told = make_labels("Triton with chest-CT models", base, kind, inputs, files)
        told |= {"chest.signed": signed} if signed else {}
        run_build(tag, base, told, stream_context(list_requirements(repository), repository, files))
    print(f"{tag}: {kind} weights, {len(files)} files of {repository}")
    if kind == "synthetic":
        print("the weights are synthetic, so its answers are nonsense; `make push` refuses it")


def find_signed_digest(repository: str, files: Mapping[str, str]) -> str:
    """Return the digest that the repository's signature signs, "" without a signature or if it signs other files."""
    if not os.path.exists(bundle := signature.find_bundle(repository)):
        return ""
    digest, signed = signature.read_bundle(bundle)
    if signed != files:
        print(f"{bundle} signs other files, so the image does not name it; make sign KEY=key.pem")
        return ""
    return digest


def choose_tag(usual: str, tag: str, repository: str) -> tuple[str, str]:
    """Return a repository's kind of weights, and its image's tag; SystemExit if a synthetic image is not tagged so."""
    if not (kind := read_text(record_path("published", repository)).partition("\n")[0]):
        raise SystemExit(f"{repository} was not published here, so no image is made of it; make repository")
    tag = tag or f"{usual}:{kind}"
    name, _, version = tag.rpartition(":")
    if not name or "/" in version:  # the colon is that of a registry's port
        name, version = tag, "latest"
    if kind == "synthetic" and "synthetic" not in version:
        raise SystemExit(f"IMAGE={tag}: the tag of a synthetic image must say so: IMAGE={name}:synthetic")
    return kind, tag


def make_labels(title: str, base: str, kind: str, inputs: str, files: Mapping[str, str]) -> dict[str, str]:
    """Return the labels of an image."""
    return {
        "org.opencontainers.image.title": title,
        "org.opencontainers.image.version": read_text("VERSION").strip(),
        "org.opencontainers.image.revision": read_revision(),
        "org.opencontainers.image.base.name": base,
        "org.opencontainers.image.base.digest": pull_base(base),
        "org.opencontainers.image.licenses": "MIT AND CC-BY-NC-SA-4.0 AND Apache-2.0",
        "chest.weights": kind,
        "chest.inputs": inputs,
        "chest.files": json.dumps(files, sort_keys=True),
    }


def read_revision() -> str:
    """Return the commit that is checked out, with +changes if files differ from it; "" outside of a Git repository."""
    told = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
        capture_output=True, text=True,
    )  # fmt: skip
    return told.stdout.strip()


def run_build(tag: str, base: str, told: Mapping[str, str], archive: Iterator[bytes], target: str = "") -> None:
    """Run docker build on a streamed context, which is never stored; SystemExit if it fails."""
    secret = list_secrets()
    given = [f"{name}={os.environ[name]}" for name in (*PIP, *PROXIES) if os.environ.get(name) and name not in secret]
    words = [f"--build-arg={word}" for word in (f"BASE={base}", *given)]
    words += [f"--label={name}={value}" for name, value in told.items()] + ([f"--target={target}"] if target else [])
    words += [f"--secret=id={name},env={name}" for name in secret]
    kit = {"DOCKER_BUILDKIT": "1"} if secret else {}
    print(f"building {tag}", flush=True)
    run = subprocess.Popen(
        ["docker", "build", f"--tag={tag}", *words, "-"],
        stdin=subprocess.PIPE, stdout=sys.stderr, env=os.environ | kit,
    )  # fmt: skip
    assert run.stdin
    try:
        for block in archive:
            run.stdin.write(block)
        run.stdin.close()
    except BrokenPipeError:
        pass  # docker prints the reason
    except BaseException:
        run.kill()
        raise
    finally:
        status = run.wait()
    if status:
        builder = "; an address with a password needs BuildKit: apt install docker-buildx" if secret else ""
        raise SystemExit(f"{tag} was not built, what was there before stays; see Docker's message above{builder}")


def list_secrets() -> list[str]:
    """Return the names of pip's variables that hold a password. It must not get into any layer or history."""
    return [name for name in PIP if "@" in os.environ.get(name, "")]


def read_dockerfile(path: str) -> bytes:
    """Return a Dockerfile whose RUN of pip mounts the secrets, if there are any; only BuildKit knows these mounts."""
    mounts = "".join(f"--mount=type=secret,id={name} " for name in list_secrets())
    return Path(path).read_bytes().replace(INSTALL, INSTALL[:4] + mounts.encode() + INSTALL[4:])


def stream_context(needs: bytes, repository: str, files: Mapping[str, str]) -> Iterator[bytes]:
    """Yield the tar archive that docker builds from: Dockerfile, requirements.txt, and a tar archive for each layer.

    The inner archives hold the folders, too, and every time is 1970, so that ADD makes the same layer on every machine.
    """
    yield from stream_member("Dockerfile", read_dockerfile(DOCKERFILE))
    yield from stream_member("requirements.txt", needs)
    yield from stream_certificates()
    for layer in ("vit", "bpr", "heads"):
        inner = {path: sha for path, sha in sorted(files.items()) if choose_layer(path) == layer}
        folders = {"models"} | {str(folder) for path in inner for folder in Path("models", path).parents if folder.name}
        opened = [make_header(f"{folder}/", 0) for folder in sorted(folders)]
        sizes = {path: os.path.getsize(f"{repository}/{path}") for path in inner}
        named = {path: make_header(f"models/{path}", size) for path, size in sizes.items()}
        size = sum(map(len, [*opened, *named.values(), END])) + sum(size + -size % 512 for size in sizes.values())
        yield make_header(f"{layer}.tar", size)
        yield from opened
        for path, sha in inner.items():
            yield named[path]
            yield from stream_verified(f"{repository}/{path}", sizes[path], sha)
            yield bytes(-sizes[path] % 512)
        yield END
    yield END


def stream_certificates() -> Iterator[bytes]:
    """Yield the certificates that pip trusts on this machine, as ca.pem."""
    if path := next((os.environ[name] for name in CERTIFICATES if os.environ.get(name)), ""):
        yield from stream_member("ca.pem", Path(path).read_bytes())


def choose_layer(path: str) -> str:
    """Return the layer that a file of a model belongs to."""
    return {"vit": "vit", "bpr": "bpr"}.get(path.partition("_")[0], "heads")


def stream_member(name: str, content: bytes) -> Iterator[bytes]:
    """Yield a file of a tar archive."""
    yield make_header(name, len(content))
    yield content + bytes(-len(content) % 512)


def make_header(name: str, size: int) -> bytes:
    """Return the tar header of a file or a folder/. Everyone may read it, and it tells nothing of this machine."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode = tarfile.REGTYPE, size, 0o644
    if name.endswith("/"):
        info.type, info.mode = tarfile.DIRTYPE, 0o755
    return info.tobuf(tarfile.GNU_FORMAT)


def stream_verified(path: str, size: int, sha: str) -> Iterator[bytes]:
    """Yield a file's content; SystemExit, before the last block is sent, if its digest is not `sha`."""
    hashed, sent = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
            sent += len(block)
            if sent >= size and (sent > size or hashed.hexdigest() != sha):
                break
            yield block
    if hashed.hexdigest() != sha:
        raise SystemExit(f"{path} changed while it was read, so no image was made; run make again")


def main(make: Callable[[str, str, str, str], None], description: str | None) -> None:
    """Parse the command line that every image has, and call `make(repository, base, tag, verdict)`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository")
    parser.add_argument("--base", required=True)
    parser.add_argument("--tag", default="")
    parser.add_argument("--verdict", required=True)
    args = parser.parse_args()
    make(args.repository, args.base, args.tag, args.verdict)


if __name__ == "__main__":
    main(build_image, __doc__)
