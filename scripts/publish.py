"""Put models that were made anew into the published repository, each by one exchange of folders; or undo that.

    python3 -sES scripts/publish.py REPOSITORY --weights KIND --verdict FILE --models MODEL,... FILE=SOURCE...
    python3 -sES scripts/publish.py REPOSITORY --prebuilt FILE FOLDER
    python3 -sES scripts/publish.py REPOSITORY --rollback

--prebuilt: what scripts/prebuilt.py judged and wrote to FILE, from FOLDER; exit status 3 where that is lacking.
Beside REPOSITORY lies its .REPOSITORY/ with next/ (about to be published), previous/ (what was replaced, to roll back
to) and harmed/ (what was replaced because it was no longer what had been published).
.make/journal/REPOSITORY is a publication under way: `finish` may be cut short at any point and called again.
.make/published/REPOSITORY: kind of weights, then a line for all that a model was ever published as: those alone are
ours to replace.
"""

import argparse
import ctypes
import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from records import digest, found, holds, known, lock, made_from, note, owned, read, record, write, wrote

# Large and not needed twice: a step that reads one of these later gets a copy of the published
MOVED = ("build/onnx/", "build/prebuilt/")
LACKING = 3


def publish(repository: str, weights: str, verdict: str, models: list[str], sources: dict[str, str]) -> None:
    """Publish `models`, provided that the whole set is what its records say and what the verdict was passed on."""
    with lock("publish"):
        finish_copies(repository)
        finish(record("journal", repository))
        refuse_what_is_not_ours(repository, weights, models)
        judged = made_from(verdict)
        for path in sources.values():
            if judged.get(path) != known(path):
                raise SystemExit(f"nothing published: {path} is not what {verdict} was passed on; run make again")
        if not holds(verdict):
            raise SystemExit(f"nothing published: an input of {verdict} changed since; run make again")
        files = {path: (source, known(source)) for path, source in sources.items()}
        right = {path: sha for path, (_, sha) in files.items()}
        # Another make may have published them while this one waited; once more would cost what rollback goes back to
        if models := [model for model in models if content(repository, model) != of(model, right)]:
            replace(repository, weights, models, files)


def publish_prebuilt(repository: str, verdict: str, folder: str) -> None:
    """Publish the models that are not what `verdict` was passed on; SystemExit(LACKING) if their files are nowhere."""
    with lock("publish"):
        finish_copies(repository)
        finish(record("journal", repository))
        told = json.loads(read(verdict))
        judged: dict[str, str] = told["files"]
        there = {path.partition("/")[0] for version in versions(repository) for path in version}
        wanted = there | {path.partition("/")[0] for path in judged}
        models = sorted(model for model in wanted if content(repository, model) != of(model, judged))
        if not models:
            print(f"{repository} is up to date: {len(judged)} files, nothing published")
        else:
            refuse_what_is_not_ours(repository, "prebuilt", models)
            if (unserved := told.get("unserved")) and os.environ.get("ACCEPT") != "unserved":
                raise SystemExit(
                    "\n".join([f"{name}: not served here: {reason}" for name, reason in unserved.items()])
                    + "\nnothing was published; to publish it untried: make repository FROM=prebuilt ACCEPT=unserved"
                )
            sources = {path: (f"{folder}/{path}", sha) for path, sha in judged.items()}
            for path, (source, sha) in sources.items():
                if path.partition("/")[0] in models and digest(source) != sha:
                    if not (copy := found(sha)) or copy.startswith((f"{folder}/", beside(repository, "next"))):
                        print(f"{source} is to be published and is there no more", flush=True)
                        raise SystemExit(LACKING)
                    sources[path] = copy, sha
            replace(repository, "prebuilt", models, sources)
        shutil.rmtree(folder, ignore_errors=True)  # the rest of it is published already


def replace(repository: str, weights: str, models: list[str], sources: dict[str, tuple[str, str]]) -> None:
    """Let `models` in the repository be what the sources are, each with its digest."""
    if os.path.isdir(following := beside(repository, "next")):
        shutil.rmtree(following)
    os.makedirs(following)  # stays empty where models are only dropped
    os.makedirs(repository, exist_ok=True)
    let_all_read(repository, ".")
    notes = {}
    for path, (source, wanted) in sources.items():
        if path.partition("/")[0] in models:
            place(source, f"{following}/{path}")
            let_all_read(following, path)
            if wanted != digest(f"{following}/{path}"):
                raise SystemExit(f"nothing published: {source} changed meanwhile; run make again")
            notes[path] = wanted
    for path in notes:
        with open(f"{following}/{path}") as file:
            os.fsync(file.fileno())
    before = versions(repository)
    after = [*before, *(version for model in models if (version := of(model, notes)) and version not in before)]
    lines = [" ".join(f"{path}={sha}" for path, sha in sorted(version.items())) for version in after]
    harmed = [model for model in models if (there := content(repository, model)) and there not in before]
    begin(repository, models, "next", "\n".join([weights, *lines, ""]), notes, harmed)
    new = {path.partition("/")[0] for path in notes}
    for what, which in (("published", new), ("removed", set(models) - new)):
        if which:
            print(f"{what}: {' '.join(f'{repository}/{model}' for model in models if model in which)}")


def rollback(repository: str) -> None:
    """Let the published models and those that they replaced change places."""
    with lock("publish"):
        finish_copies(repository)
        finish(record("journal", repository))
        previous = beside(repository, "previous")
        models = sorted(os.listdir(previous)) if os.path.isdir(previous) else []
        earlier = any(os.listdir(f"{previous}/{model}") for model in models)
        if not earlier and {path.parent.name for path in Path(repository).glob("*/config.pbtxt")} <= set(models):
            raise SystemExit(f"{repository}: nothing to roll back to, {previous} holds no earlier models")
        ours = {path for version in versions(repository) for path in version}
        for model in models:
            if (there := content(previous, model)) and there not in versions(repository):
                raise SystemExit(
                    f"{previous}/{model} is not as it was published, altered or not whole; nothing rolled back"
                )
            if yours := sorted(content(repository, model).keys() - ours):
                raise SystemExit(f"{repository}/{yours[0]} was not made by this build and would be lost; move it away")
        begin(repository, models, "previous", read(record("published", repository)), {}, [])
        print(f"rolled back: {' '.join(f'{repository}/{model}' for model in models)}; `make rollback` swaps again,")
        print("`make repository` publishes what the present inputs make")


def refuse_what_is_not_ours(repository: str, weights: str, models: list[str]) -> None:
    """Raise SystemExit if publishing `models` would replace another kind of weights, or a file no step wrote."""
    way_out = f"move it away (mv {repository} {repository}.old) or publish elsewhere (make repository REPOSITORY=dir)"
    before, kind = versions(repository), read(record("published", repository)).partition("\n")[0]
    ours = {path for version in before for path in version}
    for model in models:
        there = content(repository, model)
        if foreign := sorted(there.keys() - ours):
            raise SystemExit(f"{repository}/{foreign[0]} was not made by this build and is not replaced: {way_out}")
        if there and not any(there.items() & version.items() for version in before):
            raise SystemExit(f"{repository}/{model} was not made by this build and is not replaced: {way_out}")
        if there and kind != weights:
            raise SystemExit(f"{repository} is made from {kind} weights, these are {weights}: {way_out}")


def versions(repository: str) -> list[dict[str, str]]:
    """Return what each model was ever published as in `repository`: its files, relative to it, and their digests."""
    lines = read(record("published", repository)).split("\n")[1:]
    return [{path: sha for path, _, sha in (word.rpartition("=") for word in line.split())} for line in lines if line]


def content(folder: str, model: str) -> dict[str, str]:
    """Return the files of `model` in `folder`, relative to it, and their digests; what Python caches does not count."""
    there = (
        path for path in sorted(Path(folder, model).rglob("*")) if path.is_file() and "__pycache__" not in path.parts
    )
    return {str(path.relative_to(folder)): digest(str(path)) for path in there}


def of(model: str, files: dict[str, str]) -> dict[str, str]:
    """Return those of `files` that belong to `model`."""
    return {path: sha for path, sha in files.items() if path.partition("/")[0] == model}


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


def let_all_read(folder: str, path: str) -> None:
    """Let the server, another user, read `path` and the folders above it in `folder`, whatever the umask."""
    place = os.path.normpath(f"{folder}/{path}")
    while len(place) >= len(os.path.normpath(folder)):
        mode = os.stat(place).st_mode & 0o7777
        wanted = mode | (0o555 if os.path.isdir(place) else 0o444)
        if wanted != mode:
            os.chmod(place, wanted)
        place = os.path.dirname(place)


def begin(
    repository: str, models: list[str], source: str, record_after: str, notes: dict[str, str], harmed: list[str]
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
    for model in models:
        let_it_move(f"{repository}/{model}", beside(repository, "copies/live"))
        let_it_move(f"{folder}/{model}", beside(repository, f"copies/{source}"))
    shutil.rmtree(beside(repository, "copies"), ignore_errors=True)
    inodes = {model: os.stat(path).st_ino if os.path.isdir(path := f"{folder}/{model}") else 0 for model in models}
    job = {"repository": repository, "inodes": inodes, "source": source, "record": record_after, "notes": notes}
    write(journal := record("journal", repository), json.dumps(job | {"harmed": harmed}))
    finish(journal)


def let_it_move(path: str, copies: str) -> None:
    """Make sure, before anything is written down, that the folder `path` can be renamed; SystemExit if it cannot be.

    A folder of a lower layer of overlayfs (an image that holds a built checkout) cannot be renamed: EXDEV, although it
    lies on the same device (docs.kernel.org/filesystems/overlayfs.html, "Renaming directories").  A copy in the upper
    layer takes its place; where a kill comes between, `finish_copies` puts it there.
    """
    if not os.path.isdir(path):
        return
    os.makedirs(f"{copies}/full/of", exist_ok=True)
    try:
        os.rename(
            path, f"{copies}/full"
        )  # never done, as that one is not empty; but what else forbids it is told first
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return
        if error.errno in (errno.EACCES, errno.EPERM):
            raise SystemExit(f"models cannot be exchanged: {owned(path)}") from None
        if error.errno != errno.EXDEV:
            raise
    with open(f"{copies}/file", "w"):
        os.rename(f"{copies}/file", f"{os.path.dirname(path)}/.file")  # EXDEV: mounted apart, a copy would not help
    os.remove(f"{os.path.dirname(path)}/.file")
    copy = f"{copies}/{os.path.basename(path)}"
    shutil.copytree(path, f"{copies}/full/{os.path.basename(path)}", symlinks=True, dirs_exist_ok=True)
    os.rename(f"{copies}/full/{os.path.basename(path)}", copy)
    shutil.rmtree(path)
    os.rename(copy, path)


def finish_copies(repository: str) -> None:
    """Put each folder that was copied as a whole (see `let_it_move`) in its place."""
    for kind, folder in (("live", repository), ("previous", beside(repository, "previous"))):
        copies = beside(repository, f"copies/{kind}")
        for model in os.listdir(copies) if os.path.isdir(copies) else []:
            if model != "full":
                shutil.rmtree(f"{folder}/{model}", ignore_errors=True)
                os.rename(f"{copies}/{model}", f"{folder}/{model}")


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
            new = f"{source}/{model}"
            if model in job["harmed"] and not os.path.exists(new) and not os.path.exists(f"{new}~"):
                continue  # it has gone aside already
            let_it_move(f"{repository}/{model}", beside(repository, "copies/live"))
            swap(new, f"{repository}/{model}", inode)
            if model in job["harmed"]:  # nothing to roll back to
                shutil.rmtree(beside(repository, f"harmed/{model}"), ignore_errors=True)
                os.makedirs(beside(repository, "harmed"), exist_ok=True)
                os.rename(new, beside(repository, f"harmed/{model}"))
        if source != previous and os.listdir(source):
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(source, previous)
        elif source != previous:
            os.rmdir(source)
    shutil.rmtree(beside(repository, "copies"), ignore_errors=True)
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
        if isinstance(error, PermissionError) and error.filename:
            raise SystemExit(f"{args.repository}: {what}: {owned(os.fspath(error.filename))}") from None
        raise SystemExit(f"{args.repository}: {what} ({error})") from None
