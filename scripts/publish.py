"""Put models that were made anew into the published repository, each by one exchange of folders; or undo that.

    python3 -sES scripts/publish.py REPOSITORY --weights KIND --verdict FILE --models MODEL,... FILE=SOURCE...
    python3 -sES scripts/publish.py REPOSITORY --prebuilt FILE FOLDER
    python3 -sES scripts/publish.py REPOSITORY --rollback

--prebuilt: what scripts/prebuilt.py judged and wrote to FILE, from FOLDER; exit status 3 where that is lacking.
Beside REPOSITORY lies its .REPOSITORY/ with next/ (about to be published) and previous/ (what was replaced).
.make/journal/REPOSITORY is a publication under way: `finish` may be cut short at any point and called again.
.make/published/REPOSITORY: kind of weights, then each file ever published there: those alone are ours to replace.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from records import digest, found, holds, known, lock, made_from, note, read, record, write, wrote

# Large and not needed twice: a step that reads one of these later gets a copy of the published
MOVED = ("build/onnx/", "build/prebuilt/")
LACKING = 3


def publish(repository: str, weights: str, verdict: str, models: list[str], sources: dict[str, str]) -> None:
    """Publish `models`, provided that the whole set is what its records say and what the verdict was passed on."""
    with lock("publish"):
        finish(record("journal", repository))
        refuse_what_is_not_ours(repository, weights, models)
        judged = made_from(verdict)
        for path in sources.values():
            if judged.get(path) != known(path) or not holds(verdict):
                raise SystemExit(f"nothing published: {path} is not what {verdict} was passed on; run make again")
        replace(repository, weights, models, {path: (source, known(source)) for path, source in sources.items()})


def publish_prebuilt(repository: str, verdict: str, folder: str) -> None:
    """Publish the models that are not what `verdict` was passed on; SystemExit(LACKING) if their files are nowhere."""
    with lock("publish"):
        finish(record("journal", repository))
        judged: dict[str, str] = json.loads(read(verdict))["files"]
        ours = {path for path in published(repository) if os.path.exists(f"{repository}/{path}")}
        old = {path: digest(f"{repository}/{path}") for path in ours | set(judged)}
        models = sorted({path.partition("/")[0] for path, sha in old.items() if sha != judged.get(path)})
        if not models:
            print(f"{repository} is up to date: {len(judged)} files, nothing published")
        else:
            refuse_what_is_not_ours(repository, "prebuilt", models)
            sources = {path: (f"{folder}/{path}", sha) for path, sha in judged.items()}
            for path, (source, sha) in sources.items():
                if path.partition("/")[0] in models and digest(source) != sha:
                    if not (there := found(sha)) or there.startswith((f"{folder}/", beside(repository, "next"))):
                        print(f"{source} is to be published and is there no more", flush=True)
                        raise SystemExit(LACKING)
                    sources[path] = there, sha
            replace(repository, "prebuilt", models, sources)
        shutil.rmtree(folder, ignore_errors=True)  # the rest of it is published already


def replace(repository: str, weights: str, models: list[str], sources: dict[str, tuple[str, str]]) -> None:
    """Let `models` in the repository be what the sources are, each with its digest."""
    shutil.rmtree(following := beside(repository, "next"), ignore_errors=True)
    os.makedirs(following)  # stays empty where models are only dropped
    notes = {}
    for path, (source, wanted) in sources.items():
        if path.partition("/")[0] in models:
            place(source, f"{following}/{path}")
            if wanted != digest(f"{following}/{path}"):
                raise SystemExit(f"nothing published: {source} changed meanwhile; run make again")
            notes[path] = wanted
    ours = sorted({*published(repository), *sources})
    for path in notes:
        with open(f"{following}/{path}") as file:
            os.fsync(file.fileno())
    begin(repository, record("journal", repository), models, "next", "\n".join([weights, *ours, ""]), notes)
    print(f"published: {' '.join(f'{repository}/{model}' for model in models)}")


def rollback(repository: str) -> None:
    """Let the published models and those that they replaced change places."""
    with lock("publish"):
        finish(journal := record("journal", repository))
        previous = beside(repository, "previous")
        models = sorted(os.listdir(previous)) if os.path.isdir(previous) else []
        earlier = any(os.listdir(f"{previous}/{model}") for model in models)
        if not earlier and {path.name for path in Path(repository).glob("*/")} <= set(models):
            raise SystemExit(f"{repository}: nothing to roll back to, {previous} holds no earlier models")
        begin(repository, journal, models, "previous", read(record("published", repository)), {})
        print(f"rolled back: {' '.join(f'{repository}/{model}' for model in models)}; `make rollback` swaps again,")
        print("`make repository` publishes what the present inputs make")


def refuse_what_is_not_ours(repository: str, weights: str, models: list[str]) -> None:
    """Raise SystemExit if publishing `models` would replace another kind of weights, or a file no step wrote."""
    way_out = f"move it away (mv {repository} {repository}.old) or publish elsewhere (make repository REPOSITORY=dir)"
    ours, kind = published(repository), (read(record("published", repository)).split("\n") or [""])[0]
    for model in models:
        for folder, folders, names in os.walk(f"{repository}/{model}"):
            folders[:] = [name for name in folders if name != "__pycache__"]
            for name in names:
                path = os.path.relpath(f"{folder}/{name}", repository)
                if path not in ours:
                    raise SystemExit(f"{repository}/{path} was not made by this build and is not replaced: {way_out}")
                if kind != weights:
                    raise SystemExit(f"{repository} is made from {kind} weights, these are {weights}: {way_out}")


def published(repository: str) -> set[str]:
    """Return the files that this build has ever published in `repository`, relative to it."""
    return {path for path in read(record("published", repository)).split("\n")[1:] if path}


def place(source: str, path: str) -> None:
    """Move or copy a finished file to `path`."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if source.startswith(MOVED) and not os.path.exists(source):
        source = found(wrote(source)) or source  # published already
    if source.startswith(MOVED):
        try:
            os.rename(source, path)
            os.utime(path)  # the newest mtime in a model's folder tells a running Triton to load it again
            return
        except OSError:
            pass  # another file system
    subprocess.run(["cp", "--reflink=auto", source, path], check=True)


def begin(
    repository: str, journal: str, models: list[str], source: str, record_after: str, notes: dict[str, str]
) -> None:
    """Write down which folders change places, then let them."""
    folder = beside(repository, source)
    os.makedirs(repository, exist_ok=True)
    for path in [repository, *(f"{repository}/{model}" for model in models)]:
        if os.path.isdir(path) and os.stat(path).st_dev != os.stat(folder).st_dev:
            raise SystemExit(
                f"nothing published: {path} lies on another file system than {folder}, so that models cannot be\n"
                "exchanged at one stroke; publish to a folder inside the mounted one (make repository REPOSITORY=dir)"
            )
    inodes = {model: os.stat(path).st_ino if os.path.isdir(path := f"{folder}/{model}") else 0 for model in models}
    job = {"repository": repository, "inodes": inodes, "source": source, "record": record_after, "notes": notes}
    write(journal, json.dumps(job))
    finish(journal)


def finish(journal: str) -> None:
    """Do what is left of the journal, each part of which may have been done before a kill."""
    if not (text := read(journal)):
        return
    job: dict[str, Any] = json.loads(text)
    repository, source = job["repository"], beside(job["repository"], job["source"])
    previous = beside(repository, "previous")
    if os.path.isdir(source):
        os.makedirs(repository, exist_ok=True)
        for model, inode in job["inodes"].items():
            swap(f"{source}/{model}", f"{repository}/{model}", inode)
        if source != previous:
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(source, previous)
    for path, sha in job["notes"].items():
        note(f"{repository}/{path}", sha)
        Path(record("seen", f"{source}/{path}")).unlink(missing_ok=True)
    for folder, _, names in os.walk(previous):
        for name in names:
            digest(f"{folder}/{name}")
    write(record("published", repository), job["record"])
    os.remove(journal)


def swap(new: str, live: str, inode: int) -> None:
    """Let two folders change places, unless `new` is no longer the folder with this inode: then they have.

    inode 0: there is no `new`, `live` only goes; an empty `new` stands for a model that was not there before.
    """
    aside = f"{new}~"
    if inode == 0:
        if os.path.isdir(live):
            os.rename(live, new)
        return
    if os.path.isdir(new) and os.stat(new).st_ino == inode:
        if not os.path.exists(live):
            os.rename(new, live)
        elif not os.listdir(new):
            os.rename(live, new)
            return
        else:
            try:
                exchange(new, live)
            except (OSError, AttributeError) as error:
                print(f"{live} is away for a moment, as folders cannot be exchanged here ({error})")
                os.rename(live, aside)
                os.rename(new, live)
    if not os.path.exists(new):
        if os.path.exists(aside):
            os.rename(aside, new)
        else:
            os.mkdir(new)


def exchange(one: str, other: str) -> None:
    """Exchange two folders at one stroke: renameat2(2) with RENAME_EXCHANGE, paths relative to here."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def beside(repository: str, name: str) -> str:
    """Return the folder `name` of the hidden folder beside `repository`."""
    head, tail = os.path.split(repository.rstrip("/"))
    return os.path.join(head, f".{tail}", name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository")
    parser.add_argument("--rollback", action="store_true")
    parser.add_argument("--prebuilt", nargs=2, metavar=("FILE", "FOLDER"))
    parser.add_argument("--weights", help="kind of weights, synthetic or real")
    parser.add_argument("--verdict", help="artifact that was made from exactly these sources")
    parser.add_argument("--models", default="", help="comma-separated; one without a FILE is taken out")
    parser.add_argument("files", nargs="*", metavar="FILE=SOURCE")
    args = parser.parse_intermixed_args()
    try:
        if args.rollback:
            rollback(args.repository)
        elif args.prebuilt:
            publish_prebuilt(args.repository, *args.prebuilt)
        else:
            pairs = dict(pair.split("=", 1) for pair in args.files)
            publish(args.repository, args.weights, args.verdict, sorted(args.models.split(",")), pairs)
    except (OSError, subprocess.CalledProcessError) as error:
        cut_short = os.path.exists(record("journal", args.repository))
        what = "publishing was cut short, the next make ends it" if cut_short else "nothing was published"
        raise SystemExit(f"{args.repository}: {what} ({error})") from None
