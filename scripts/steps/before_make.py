"""Do what has to be done before make decides: check the knobs, note which files changed, finish a cut publication.

    python3 -sESB scripts/steps/before_make.py RUN NESTED GOALS GIVEN KNOB=VALUE...

RUN is the token of this run, if make was restarted; NESTED the token of the make that started this make; GIVEN the
names of the knobs that the user gave.  It prints words for make, or one sentence if nothing can be made:

    run=        the token of this run; steps and the summary find by it what this run made
    REPOSITORY= WEIGHTS= PRECISION=  the values that records hold
    python=     the Python of .venv
    models= needs=  makefiles made from models.yaml, and named by its digest
    modules=    the makefile with the files that each script is made of (scripts/steps/modules.py)
"""

import fcntl
import os
import sys
import time

# This file is not run with -m, which would cost every make 5 ms
sys.path[:0] = [os.path.abspath(f"{__file__}/../../..")]

from scripts.steps import knobs as knob  # noqa: E402
from scripts.steps.records import (  # noqa: E402
    current_digest,
    explain_ownership,
    known_digest,
    lock_file,
    look_at_tree,
    read_status,
    read_text,
    record_path,
    write_text,
    written_digest,
)

NAMES = ("", "-triton", "-inference", "-rtx", "-signing", "-prebuilt", "-compare")
ENVIRONMENTS = tuple(f".venv{name}" for name in NAMES)
JUDGED = "training/model_repository_running.zip.verdict.json"  # the step for this file makes .venv-prebuilt
LOOK_AT_NOTHING = {"clean", "distclean", "help", "doctor"}
BUILD = {"repository", "onnx", "trt", "trt-fleet", "weights", "fidelity"}
NEED_NO_MODELS = LOOK_AT_NOTHING | {
    "image", "push", "sign", "up", "reload", "logs", "down", "rollback", "serve", "infer", "update", "test", "bench",
    "bench-gpu",
}  # fmt: skip
SOURCES, MODULES, MODELS = ".make/modules.read", ".make/modules.mk", "convertation/models.yaml"
RUNS, OLD = ".make/run", 86_400  # s


def note_digests(files: set[str]) -> None:
    """Bring .make/seen up to date for `files` and for each file that has a note there.

    For an absent file the digest is the one that its step wrote last, or else the one that the file had.
    """
    os.makedirs(".make/seen", exist_ok=True)
    noted = {name.replace("%", "/") for name in os.listdir(".make/seen") if not name.endswith("~")}
    moved = []
    for path in noted | files:
        note, stat = read_text(record_path("seen", path)).split(), read_status(path)
        if stat and note[1:] != stat:
            moved.append(path)
        elif not stat and note and note != [counts := known_digest(path)]:
            write_text(record_path("seen", path), counts)
    if moved:
        from concurrent.futures import ThreadPoolExecutor  # hashing releases Python's global lock

        list(ThreadPoolExecutor().map(current_digest, moved))


def stamp_sources() -> str:
    """Return a text that changes when a source file is added, removed or written; no file is read for it."""
    words = []
    for top in "scripts", "convertation":
        for folder, folders, names in os.walk(top):
            folders[:] = [name for name in folders if name != "__pycache__"]
            for name in names:
                if name.endswith((".py", ".yaml")):
                    stat = os.stat(path := f"{folder}/{name}")
                    words.append(f"{path}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}")
    return " ".join(sorted(words))


def read_modules() -> None:
    """Find again what each script is made of, if a source file has changed."""
    signature = stamp_sources()
    if read_text(SOURCES) != signature or not os.path.exists(MODULES):
        from scripts.steps import modules  # slow to import, because it parses Python

        try:
            write_text(MODULES, modules.list_modules())
        except SyntaxError as error:
            raise SystemExit(f"{error.filename}:{error.lineno}: {error.msg}; nothing was made") from None
        write_text(SOURCES, signature)


def find_python(command: str, given: bool) -> str:
    """Return the path of .venv's Python, which names its version; without one, the path that `command` will make."""
    folder = ".venv/bin"
    living = [
        name
        for name in (sorted(os.listdir(folder)) if os.path.isdir(folder) else [])
        if name.startswith("python3.") and name[8:].isdigit() and os.access(f"{folder}/{name}", os.X_OK)
    ]
    if living and not given:
        return f"{folder}/{living[0]}"
    import subprocess

    try:
        asked = subprocess.run(
            [command, "-c", "import sys; print(sys.version_info[1])"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise SystemExit(f"PYTHON={command}: {error.strerror}; expected a Python such as python3.11") from None
    return f"{folder}/python3.{asked.stdout.strip() if asked.stdout.strip() in ('11', '12') else 12}"


def forget_dead_environments() -> None:
    """Forget that an environment was installed if its Python, a link, is broken; the next step makes it again."""
    for folder in ENVIRONMENTS:
        if not os.path.isdir(f"{folder}/bin"):
            continue
        marks = [name for name in os.listdir(folder) if name.startswith("installed") or name == "requirements.txt"]
        pythons = [f"{folder}/bin/{name}" for name in os.listdir(f"{folder}/bin") if name.startswith("python3.")]
        if marks and pythons and not any(os.access(python, os.X_OK) for python in pythons):
            for name in marks:
                os.remove(f"{folder}/{name}")
            if folder == ".venv-prebuilt" and os.path.exists(record_path("made", JUDGED)):
                os.remove(record_path("made", JUDGED))
            gone = os.path.realpath(pythons[0])
            print(f"{folder}: its Python went away ({gone}); it is made again when a step needs it", file=sys.stderr)


def refuse_links_to_nowhere() -> None:
    """Raise SystemExit if a link below training/, where own files lie, has no target."""
    for top, folders, names in os.walk("training"):
        for path in (f"{top}/{name}" for name in [*folders, *names]):
            if os.path.islink(path) and not os.path.exists(path):
                raise SystemExit(
                    f"{path} is a link to {os.readlink(path)}, which is not there (a share not mounted?); "
                    f"mount it, or remove the link: rm {path}"
                )


def tell_own_files() -> None:
    """Print which checkpoints are own files: their bytes differ from those in the record."""
    for name in sorted(os.listdir(".make/made")) if os.path.isdir(".make/made") else []:
        path = name.replace("%", "/")
        if path.startswith("training/weights/") and current_digest(path) not in ("", written_digest(path)):
            print(f"local: {path} is yours; it is used as it is", file=sys.stderr, flush=True)


def list_copied() -> list[str]:
    """Return the repositories beside which folders are being copied, or were when a process was killed (swap.py)."""
    names = os.listdir(".make/published") if os.path.isdir(".make/published") else []
    repositories = [name.replace("%", "/") for name in names]
    return [
        path
        for path in repositories
        if os.path.isdir(os.path.join(os.path.dirname(path), f".{os.path.basename(path)}", "copies"))
    ]


def finish_publications() -> None:
    """Finish each publication that was cut short; remove drafts (~) of journals, since nothing had moved by then."""
    if not list_copied() and not (os.path.isdir(".make/journal") and os.listdir(".make/journal")):
        return
    from scripts.steps.swap import finish_copies, finish_swap

    with lock_file("publish"):
        for repository in list_copied():
            finish_copies(repository)
        for journal in os.listdir(".make/journal") if os.path.isdir(".make/journal") else []:
            if journal.endswith("~"):
                os.remove(f".make/journal/{journal}")
                continue
            finish_swap(f".make/journal/{journal}")


def forget_old_runs() -> None:
    """Remove the marks of runs that ended long ago."""
    for name in os.listdir(RUNS) if os.path.isdir(RUNS) else []:
        if time.time() - os.stat(path := f"{RUNS}/{name}").st_mtime > OLD:
            os.remove(path)


def main(run: str, nested: str, goals: set[str], given: set[str], knobs: dict[str, str]) -> str:
    """Do everything; return the words for make."""
    knob.check_knobs(knobs, goals)
    words = {"run": run or str(time.time_ns())}
    if goals - LOOK_AT_NOTHING:
        refuse_links_to_nowhere()
        finish_publications()
        forget_dead_environments()
        with lock_file("publish", fcntl.LOCK_SH):
            note_digests({MODELS, "requirements.txt"})
            look_at_tree(knobs["REPOSITORY"])
        knob.follow_published(knobs, given, goals)
        if not os.path.exists(MODELS):
            raise SystemExit(f"{MODELS} is missing: it describes every model; git checkout {MODELS}")
        told_apart = ({"provenance"} if knobs["CHECK"] else set()) | ({"verify"} if knobs["KEY"] else set())
        if goals - NEED_NO_MODELS - told_apart:
            read_modules()
            words["modules"] = MODULES
            words["models"] = f".make/models/{current_digest(MODELS)[:16]}.mk"
            words["needs"] = f".make/models/{current_digest(MODELS)[:16]}.needs.mk"
        words["python"] = find_python(knobs["PYTHON"], "PYTHON" in given)
        if not nested:
            forget_old_runs()
            builds = goals & BUILD or any("/" in goal for goal in goals)
            if builds and knobs["WEIGHTS"] == "yandex" and knobs["FROM"] == "weights":
                tell_own_files()
    words |= {name: knobs[name] for name in ("REPOSITORY", "WEIGHTS", "PRECISION")}
    return " ".join(f"{name}={value}" for name, value in words.items())


if __name__ == "__main__":
    run, nested, goals, given, *pairs = sys.argv[1:]
    for_make, sys.stdout = sys.stdout, sys.stderr  # make takes all that is printed on standard output for its words
    knobs = dict(pair.split("=", 1) for pair in pairs)
    try:
        said = main(run, nested, set(goals.split()) or {"help"}, set(given.split()), knobs)
    except SystemExit as error:
        said = str(error)
    except PermissionError as error:
        said = f"nothing was made, what was there before stays: {explain_ownership(str(error.filename))}"
    except OSError as error:
        place = error.filename or os.path.abspath(".make")
        hint = "make doctor tells what helps"
        said = f"{place}: {error.strerror}; nothing was made, what was there before stays; {hint}"
    print(said, file=for_make)
