"""Write an image's bill of materials, in CycloneDX 1.6: base image, packages, models with their origin and licence.

    python -m scripts.deploy.sbom REPOSITORY --base IMAGE [--tag NAME:TAG] --verdict FILE [--pins FILE.txt] OUT.cdx.json

The same image gives the same bytes: no time of day, and a serial number made from the image's digest. It lists what
`make image` added, not the content of the base image. Format: https://cyclonedx.org/docs/1.6/json/
"""

import argparse
import hashlib
import json
import re
import uuid
from pathlib import Path
from typing import Any

from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, Property, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

from scripts.deploy.docker_engine import inspect_object, read_labels
from scripts.deploy.image import choose_tag, list_requirements
from scripts.publish.licences import LICENCES
from scripts.steps.records import read_inputs, read_text, written_digest

ARCHIVES = Path("training/archives.json")
ENTRIES = Path("build/models")
WEIGHTS = (".onnx", ".plan")


def make_bill(tag: str, base: str, files: dict[str, str], kind: str, pins: str, inputs: str, verdict: str) -> str:
    """Return the JSON for an image. `files`: path -> sha256; `pins`: name==version lines; `inputs`: its label."""
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"chest:{inputs}"))
    name, _, version = tag.rpartition(":")
    root = Component(type=ComponentType.CONTAINER, name=name, version=version, bom_ref="image")
    root.properties = [Property(name="chest:inputs", value=inputs), Property(name="chest:weights", value=kind)]
    root.licenses = [make_licence("MIT", "")]
    bom.metadata.component = root
    parts = [describe_base_image(base), *list_packages(pins)]
    for model in sorted({path.partition("/")[0] for path in files}):
        own = {path: sha for path, sha in files.items() if path.startswith(f"{model}/")}
        parts.append(describe_model(model, own, kind, verdict))
    bom.components = parts
    bom.register_dependency(root, parts)
    written = json.loads(make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string())
    del written["metadata"]["timestamp"]  # the library always writes it
    return json.dumps(written, indent=2, sort_keys=True) + "\n"


def describe_base_image(base: str) -> Component:
    """Describe the base image, with the digest that it has on this machine."""
    there = inspect_object("image", base)
    name, _, tag = base.rpartition(":")
    sha = str(there.get("Id", "")).removeprefix("sha256:")
    told = [Property(name="chest:digest", value=value) for value in there.get("RepoDigests") or []]
    return Component(
        type=ComponentType.CONTAINER, name=name, version=tag, bom_ref="base", properties=told,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha)] if sha else [],
        description="the base image; the hash is that of its configuration, as docker image inspect prints it",
    )  # fmt: skip


def list_packages(pins: str) -> list[Component]:
    """List the installed Python packages, from lines name==version."""
    found = {(re.sub("[-_.]+", "-", name).lower(), version) for name, version in
             re.findall(r"^([\w.-]+)==([^\s;\\]+)", pins, re.MULTILINE)}  # fmt: skip
    return [
        Component(type=ComponentType.LIBRARY, name=name, version=version, bom_ref=f"pypi/{name}",
                  purl=PackageURL("pypi", None, name, version))
        for name, version in sorted(found)
    ]  # fmt: skip


def describe_model(model: str, files: dict[str, str], kind: str, verdict: str) -> Component:
    """Describe a published model: digest of its weights, licence, origin, kind of weights, and each of its files."""
    short = model.rpartition("_")[0]
    entry = json.loads(read_text(str(ENTRIES / f"{short}.json")) or "{}")
    weights = {path: sha for path, sha in files.items() if path.endswith(WEIGHTS)}
    told = [Property(name="chest:weights", value=kind)]
    told += [Property(name="chest:origin", value=line) for line in find_origin(files, verdict)]
    known = LICENCES.get(entry.get("family", ""), ("", "unknown"))
    identifier, words = ("", "none: seeded numbers") if kind == "synthetic" else known
    within = [
        Component(type=ComponentType.FILE, name=path, bom_ref=f"file/{path}",
                  hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha)])
        for path, sha in sorted(files.items())
    ]  # fmt: skip
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL, name=model, bom_ref=f"model/{model}", components=within,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha) for sha in weights.values()],
        licenses=[make_licence(identifier, words)], properties=told, external_references=list_downloads(kind),
    )  # fmt: skip


def find_origin(files: dict[str, str], verdict: str) -> list[str]:
    """List what a model was made from, by the records: each checkpoint, or the archive, with its sha256."""
    judged = read_inputs(verdict)
    told = {f"{path} sha256:{sha}" for path, sha in judged.items() if path.endswith(".zip.lock.json")}
    ahead = [(path, sha) for path, sha in judged.items() if path.endswith(WEIGHTS) and sha in files.values()]
    seen = set(ahead)
    while ahead:
        path, sha = ahead.pop()
        if path.endswith((".pt", ".pth")):
            told.add(f"{path} sha256:{sha}")
        elif written_digest(path) == sha:
            ahead += [one for one in read_inputs(path).items() if one not in seen]
            seen |= set(ahead)
    return sorted(told)


def list_downloads(kind: str) -> list[ExternalReference]:
    """List the download links of the weights."""
    if kind == "synthetic":
        return []
    archive = "model_repository_running.zip" if kind == "prebuilt" else "weights.zip"
    link: str = json.loads(ARCHIVES.read_text())["archives"][archive]["link"]
    return [ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(link))]


def make_licence(identifier: str, words: str) -> Any:
    """Return a licence by its SPDX identifier, or else by its name in words."""
    return DisjunctiveLicense(id=identifier) if identifier else DisjunctiveLicense(name=words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository")
    parser.add_argument("out", type=Path, metavar="OUT.cdx.json")
    parser.add_argument("--base", required=True)
    parser.add_argument("--tag", default="")
    parser.add_argument("--verdict", required=True)
    parser.add_argument("--usual", default="chest-ct-triton", help="name of an image without --tag")
    parser.add_argument(
        "--pins", type=Path, help="lock of the packages in the image (nothing: the Python models' requirements)"
    )
    given = parser.parse_args()
    kind, tag = choose_tag(given.usual, given.tag, given.repository)
    told = read_labels(tag)
    if not told.get("chest.inputs"):
        raise SystemExit(f"{tag}: not made by `make image`, so its content is unknown; make image")
    pins = given.pins.read_text() if given.pins else list_requirements(given.repository).decode()
    files = json.loads(told["chest.files"])
    text = make_bill(tag, given.base, files, kind, pins, told["chest.inputs"], given.verdict)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    draft = given.out.with_name(f"{given.out.name}~")
    draft.write_text(text)
    draft.replace(given.out)
    print(f"{given.out}: {tag}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}")


if __name__ == "__main__":
    main()
