"""Tell what each model was published as and what its folder holds now; only what was published here is replaced."""

from pathlib import Path

from scripts.steps.records import current_digest, read_text, record_path


def read_versions(repository: str) -> list[dict[str, str]]:
    """Return every version of a model that was published in `repository`: its files, relative to it, and digests."""
    lines = read_text(record_path("published", repository)).split("\n")[1:]
    return [{path: sha for path, _, sha in (word.rpartition("=") for word in line.split())} for line in lines if line]


def hash_content(folder: str, model: str) -> dict[str, str]:
    """Return the files of `model` in `folder`, relative to it, and their digests, without Python's caches."""
    there = (
        path for path in sorted(Path(folder, model).rglob("*")) if path.is_file() and "__pycache__" not in path.parts
    )
    return {str(path.relative_to(folder)): current_digest(str(path)) for path in there}


def select_files(model: str, files: dict[str, str]) -> dict[str, str]:
    """Return the files of `model` among `files`."""
    return {path: sha for path, sha in files.items() if path.partition("/")[0] == model}


def refuse_foreign_models(repository: str, weights: str, models: list[str]) -> None:
    """Raise SystemExit if publishing `models` would replace another kind of weights or a file that no step wrote."""
    way_out = f"move it away (mv {repository} {repository}.old) or publish elsewhere (make repository REPOSITORY=dir)"
    before, kind = read_versions(repository), read_text(record_path("published", repository)).partition("\n")[0]
    ours = {path for version in before for path in version}
    for model in models:
        there = hash_content(repository, model)
        if foreign := sorted(there.keys() - ours):
            raise SystemExit(f"{repository}/{foreign[0]} was not made by this build and is not replaced: {way_out}")
        if there and not any(there.items() & version.items() for version in before):
            raise SystemExit(f"{repository}/{model} was not made by this build and is not replaced: {way_out}")
        if there and kind != weights:
            raise SystemExit(f"{repository} is made from {kind} weights, these are {weights}: {way_out}")
