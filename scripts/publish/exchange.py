"""Fill the folder next/ with the new files of each model that changes, then exchange the models' folders.

scripts/steps/swap.py does the exchange, and finishes it after a kill.
"""

import json
import os
import shutil
import subprocess

from scripts.publish.published import hash_content, read_versions, select_files
from scripts.steps.printing import print_text
from scripts.steps.records import current_digest, find_content, record_path, write_text, written_digest
from scripts.steps.swap import check_movable, finish_swap, hidden_folder

# Large files that are moved and not copied: a step that reads one later gets a copy of the published file
MOVED = ("build/onnx/", "build/prebuilt/")


def replace_models(repository: str, weights: str, models: list[str], sources: dict[str, tuple[str, str]]) -> None:
    """Replace `models` in the repository by copies of `sources`: path there -> (source, digest)."""
    if os.path.isdir(following := hidden_folder(repository, "next")):
        shutil.rmtree(following)
    os.makedirs(following)  # stays empty if models are only removed
    os.makedirs(repository, exist_ok=True)
    make_readable(repository, ".")
    notes = {}
    for path, (source, wanted) in sources.items():
        if path.partition("/")[0] in models:
            place_file(source, f"{following}/{path}")
            make_readable(following, path)
            if wanted != current_digest(f"{following}/{path}"):
                raise SystemExit(f"nothing published: {source} changed meanwhile; run make again")
            notes[path] = wanted
    for path in notes:
        with open(f"{following}/{path}") as file:
            os.fsync(file.fileno())
    before = read_versions(repository)
    after = [
        *before,
        *(version for model in models if (version := select_files(model, notes)) and version not in before),
    ]
    lines = [" ".join(f"{path}={sha}" for path, sha in sorted(version.items())) for version in after]
    harmed = [model for model in models if (there := hash_content(repository, model)) and there not in before]
    begin_swap(repository, models, "next", "\n".join([weights, *lines, ""]), notes, harmed)
    new = {path.partition("/")[0] for path in notes}
    for what, which in (("published", new), ("removed", set(models) - new)):
        if which:
            print_text(f"{what}: {' '.join(f'{repository}/{model}' for model in models if model in which)}")


def place_file(source: str, path: str) -> None:
    """Move or copy a finished file to `path`."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if source.startswith(MOVED) and not os.path.exists(source):
        source = find_content(written_digest(source)) or source  # it was moved to the published folder already
    if source.startswith(MOVED):
        try:
            os.rename(source, path)
            os.utime(path)  # a running Triton loads a model again if the newest mtime in its folder changes
            return
        except OSError:
            pass  # another file system
    subprocess.run(["cp", "--reflink=auto", source, path], check=True)


def make_readable(folder: str, path: str) -> None:
    """Let every user (the server has its own) read `path` and the folders above it in `folder`, whatever the umask."""
    place = os.path.normpath(f"{folder}/{path}")
    while len(place) >= len(os.path.normpath(folder)):
        mode = os.stat(place).st_mode & 0o7777
        wanted = mode | (0o555 if os.path.isdir(place) else 0o444)
        if wanted != mode:
            os.chmod(place, wanted)
        place = os.path.dirname(place)


def begin_swap(
    repository: str, models: list[str], source: str, record_after: str, notes: dict[str, str], harmed: list[str]
) -> None:
    """Write the journal of an exchange of folders, then do the exchange."""
    folder = hidden_folder(repository, source)
    os.makedirs(repository, exist_ok=True)
    for path in [repository, *(f"{repository}/{model}" for model in models)]:
        if os.path.isdir(path) and os.stat(path).st_dev != os.stat(folder).st_dev:
            raise SystemExit(
                f"nothing published: {path} lies on another file system than {folder}, so that models cannot be\n"
                "exchanged at one stroke; publish to a folder inside the mounted one (make repository REPOSITORY=dir)"
            )
    for model in models:
        check_movable(f"{repository}/{model}", hidden_folder(repository, "copies/live"))
        check_movable(f"{folder}/{model}", hidden_folder(repository, f"copies/{source}"))
    shutil.rmtree(hidden_folder(repository, "copies"), ignore_errors=True)
    inodes = {model: os.stat(path).st_ino if os.path.isdir(path := f"{folder}/{model}") else 0 for model in models}
    job = {"repository": repository, "inodes": inodes, "source": source, "record": record_after, "notes": notes}
    write_text(journal := record_path("journal", repository), json.dumps(job | {"harmed": harmed}))
    finish_swap(journal)
