"""Put new models into the published repository, each by one exchange of folders; or undo that.

    python3 -sES -m scripts.publish.publish REPOSITORY --weights KIND --verdict FILE FILE=SOURCE...
    python3 -sES -m scripts.publish.publish REPOSITORY --prebuilt ARCHIVE FOLDER
    python3 -sES -m scripts.publish.publish REPOSITORY --rollback

--prebuilt publishes from FOLDER what scripts/publish/prebuilt.py judged of ARCHIVE; if files are absent, ARCHIVE is
unpacked again.
Beside REPOSITORY lies .REPOSITORY/ with next/ (models about to be published), previous/ (the replaced models, for a
rollback) and harmed/ (replaced models that someone had altered after they were published).
.make/journal/REPOSITORY describes a publication under way: `finish_swap` can be killed at any point and called again.
.make/published/REPOSITORY holds the kind of weights, then a line for each version of a model that was published: only
these versions may be replaced.
"""

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

from scripts.publish.exchange import begin_swap, replace_models
from scripts.publish.published import hash_content, read_versions, refuse_foreign_models, select_files
from scripts.steps.printing import print_text
from scripts.steps.records import (
    current_digest,
    explain_ownership,
    find_content,
    is_true,
    known_digest,
    lock_file,
    look_at_tree,
    read_inputs,
    read_text,
    record_path,
    write_text,
)
from scripts.steps.step import is_ready
from scripts.steps.submake import run_make
from scripts.steps.summary import summarise
from scripts.steps.swap import finish_copies, finish_swap, hidden_folder

LACKING = 3
VERIFIED = "build/verify-gpu.json"


def publish_models(repository: str, weights: str, verdict: str, sources: dict[str, str]) -> None:
    """Publish the models that differ, if the whole set is what its records say and what the verdict is about."""
    make_absent(repository, weights, sources)
    with lock_file("publish"):
        finish_copies(repository)
        finish_swap(record_path("journal", repository))
        models = find_differing(repository, sources)
        refuse_foreign_models(repository, weights, models)
        judged = read_inputs(verdict)
        for path in sources.values():
            if judged.get(path) != known_digest(path):
                raise SystemExit(f"nothing published: {path} is not what {verdict} was passed on; run make again")
        if not is_true(verdict):
            raise SystemExit(f"nothing published: an input of {verdict} changed since; run make again")
        files = {path: (source, known_digest(source)) for path, source in sources.items()}
        refuse_slow_plans({path: sha for path, (_, sha) in files.items()})
        right = {path: sha for path, (_, sha) in files.items()}
        # Another make may have published these models while this one waited; to publish them again would lose previous/
        missed = sorted(name.removesuffix("_trt") for name in {path.partition("/")[0] for path in sources})
        missed = [f"{name}_onnx" for name in missed if f"{name}_trt/config.pbtxt" in sources]
        if missed and f"{missed[0]}/config.pbtxt" not in sources:
            print(f"the existing client asks for {' '.join(missed)} and will not find them; FORMAT=both keeps them")
        if models := [model for model in models if hash_content(repository, model) != select_files(model, right)]:
            replace_models(repository, weights, models, files)
        recipe = " ".join(
            [f"publish {weights} :", *(f"{path}={source}={right[path]}" for path, source in sources.items())]
        )
        write_text(record_path("made", repository), f"{repository}={look_at_tree(repository)} {recipe}")


def find_differing(repository: str, sources: dict[str, str]) -> list[str]:
    """Return the models of which a published file differs from its source, and the models that are no longer built."""
    models = {
        path.partition("/")[0]
        for path, source in sources.items()
        if current_digest(f"{repository}/{path}") != known_digest(source)
    }
    ours = {path.partition("/")[0] for version in read_versions(repository) for path in version}
    built = {path.partition("/")[0] for path in sources}
    return sorted(models | {model for model in ours - built if os.path.isdir(f"{repository}/{model}")})


def make_absent(repository: str, weights: str, sources: dict[str, str]) -> None:
    """Make by make each file that will be published and is absent."""
    models = find_differing(repository, sources)
    refuse_foreign_models(repository, weights, models)
    lacking = [source for path, source in sources.items() if path.partition("/")[0] in models and not is_ready(source)]
    if lacking and run_make(*lacking, jobs=True).returncode:
        raise SystemExit(f"nothing published: {lacking[0]} could not be made")


def refuse_slow_plans(files: dict[str, str]) -> None:
    """Raise SystemExit if a plan among `files` is one that `make verify-gpu` found slower than its ONNX model."""
    told = json.loads(read_text(VERIFIED) or "{}")
    measured = told.get("verdict", {}).get("files", {})
    slow = {
        model: figures
        for model, figures in told.get("slower", {}).items()
        if any(measured.get(path) == sha for path, sha in select_files(model, files).items() if path.endswith(".plan"))
    }
    if slow and "slower" not in os.environ.get("ACCEPT", "").split():
        said = [f"{model} is slower than its ONNX model on {told['on']['gpu']}: {slow[model]}" for model in slow]
        raise SystemExit(
            "\n".join(said) + f"\nnothing was published ({VERIFIED}); to publish it all the same: ACCEPT=slower, "
            "or the ONNX models alone: FORMAT=onnx"
        )


def publish_archive(repository: str, archive: str, folder: str) -> None:
    """Publish the models of a finished archive; if judged files are absent, unpack the archive again."""
    verdict = f"{archive}.verdict.json"
    try:
        publish_prebuilt(repository, verdict, folder)
    except SystemExit as error:
        if error.code != LACKING:
            raise
        if run_make(archive, jobs=True).returncode:
            raise SystemExit(f"nothing was published: {archive} could not be fetched") from None
        shutil.rmtree(folder, ignore_errors=True)
        unpack = [os.environ["VENV_PYTHON"], "-m", "scripts.archives.unpack", "--all", archive, folder]
        subprocess.run([*unpack, "--tree", "*/config.pbtxt"], check=True)
        publish_prebuilt(repository, verdict, folder)


def publish_prebuilt(repository: str, verdict: str, folder: str) -> None:
    """Publish the models that differ from those of `verdict`; SystemExit(LACKING) if their files are absent."""
    with lock_file("publish"):
        finish_copies(repository)
        finish_swap(record_path("journal", repository))
        told = json.loads(read_text(verdict))
        judged: dict[str, str] = told["files"]
        there = {path.partition("/")[0] for version in read_versions(repository) for path in version}
        wanted = there | {path.partition("/")[0] for path in judged}
        models = sorted(model for model in wanted if hash_content(repository, model) != select_files(model, judged))
        if not models:
            print_text(f"{repository} is up to date: {len(judged)} files, nothing published")
        else:
            refuse_foreign_models(repository, "prebuilt", models)
            if (unserved := told.get("unserved")) and os.environ.get("ACCEPT") != "unserved":
                raise SystemExit(
                    "\n".join([f"{name}: not served here: {reason}" for name, reason in unserved.items()])
                    + "\nnothing was published; to publish it untried: make repository FROM=prebuilt ACCEPT=unserved"
                )
            sources = {path: (f"{folder}/{path}", sha) for path, sha in judged.items()}
            for path, (source, sha) in sources.items():
                if path.partition("/")[0] in models and current_digest(source) != sha:
                    if not (copy := find_content(sha)) or copy.startswith(
                        (f"{folder}/", hidden_folder(repository, "next"))
                    ):
                        print_text(f"{source} has to be published and is absent")
                        raise SystemExit(LACKING)
                    sources[path] = copy, sha
            replace_models(repository, "prebuilt", models, sources)
        shutil.rmtree(folder, ignore_errors=True)  # what is left there is published already


def roll_back(repository: str) -> None:
    """Exchange the published models and those that they replaced."""
    with lock_file("publish"):
        finish_copies(repository)
        finish_swap(record_path("journal", repository))
        previous = hidden_folder(repository, "previous")
        models = sorted(os.listdir(previous)) if os.path.isdir(previous) else []
        earlier = any(os.listdir(f"{previous}/{model}") for model in models)
        if not earlier and {path.parent.name for path in Path(repository).glob("*/config.pbtxt")} <= set(models):
            raise SystemExit(f"{repository}: nothing to roll back to, {previous} holds no earlier models")
        ours = {path for version in read_versions(repository) for path in version}
        for model in models:
            if (there := hash_content(previous, model)) and there not in read_versions(repository):
                raise SystemExit(
                    f"{previous}/{model} is not as it was published, altered or not whole; nothing rolled back"
                )
            if yours := sorted(hash_content(repository, model).keys() - ours):
                raise SystemExit(f"{repository}/{yours[0]} was not made by this build and would be lost; move it away")
        begin_swap(repository, models, "previous", read_text(record_path("published", repository)), {}, [])
        print_text(
            f"rolled back: {' '.join(f'{repository}/{model}' for model in models)}; `make rollback` swaps again,"
        )
        print_text("`make repository` publishes what the present inputs make")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository")
    parser.add_argument("--rollback", action="store_true")
    parser.add_argument("--prebuilt", nargs=2, metavar=("ARCHIVE", "FOLDER"))
    parser.add_argument("--weights", help="kind of weights, synthetic or real")
    parser.add_argument("--verdict", help="artifact that was made from exactly these sources")
    parser.add_argument("files", nargs="*", metavar="FILE=SOURCE")
    args = parser.parse_intermixed_args()
    try:
        if args.rollback:
            roll_back(args.repository)
        elif args.prebuilt:
            publish_archive(args.repository, *args.prebuilt)
        else:
            pairs = dict(pair.split("=", 1) for pair in args.files)
            publish_models(args.repository, args.weights, args.verdict, pairs)
            print("\n".join(["", *summarise([args.verdict])]))
    except (OSError, subprocess.CalledProcessError) as error:
        cut_short = os.path.exists(record_path("journal", args.repository))
        what = "publishing was cut short, the next make ends it" if cut_short else "nothing was published"
        if isinstance(error, PermissionError) and error.filename:
            raise SystemExit(f"{args.repository}: {what}: {explain_ownership(os.fspath(error.filename))}") from None
        raise SystemExit(f"{args.repository}: {what} ({error})") from None
