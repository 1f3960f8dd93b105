"""Before Make decides: take note of every file that moved, finish a publication that was cut short.

    python3 -sES scripts/steps/look.py FILE...

Prints a token of this run, by which steps and the summary know what was made in it.
"""

import fcntl
import os
import sys
import time

sys.path[:0] = [os.path.abspath(f"{__file__}/../../..")]  # not run with -m: that costs every make 5 ms

from scripts.steps.records import digest, lock, look, owned, read, record  # noqa: E402

ENVIRONMENTS = (".venv", ".venv-triton", ".venv-inference", ".venv-signing")


def take_notes(files: list[str]) -> None:
    """Bring .make/seen up to date with each of `files` and each file that it has a note of."""
    os.makedirs(".make/seen", exist_ok=True)
    noted = {name.replace("%", "/") for name in os.listdir(".make/seen") if not name.endswith("~")}
    moved = [path for path in noted.union(files) if read(record("seen", path)).split()[1:] != look(path)]
    if moved:
        from concurrent.futures import ThreadPoolExecutor  # hashing releases the interpreter's lock

        list(ThreadPoolExecutor().map(digest, moved))


def forget_dead_environments() -> None:
    """Forget that an environment was installed whose Python, a link, went away; the next step makes it anew."""
    for folder in ENVIRONMENTS:
        if not os.path.isfile(f"{folder}/installed") or not os.path.isdir(f"{folder}/bin"):
            continue
        pythons = [f"{folder}/bin/{name}" for name in os.listdir(f"{folder}/bin") if name.startswith("python3.")]
        if pythons and not any(os.access(python, os.X_OK) for python in pythons):
            for name in os.listdir(folder):
                if name.startswith("installed"):
                    os.remove(f"{folder}/{name}")
            gone = os.path.realpath(pythons[0])
            print(f"{folder}: its Python went away ({gone}); it is made anew when a step needs it", file=sys.stderr)


def refuse_links_to_nowhere(files: list[str]) -> None:
    """Raise SystemExit for a link, on the way to one of the user's own files, whose target is away."""
    for path in files:
        if path.startswith("training/") and not os.path.exists(path):
            parts = path.split("/")
            for above in ("/".join(parts[:count]) for count in range(1, len(parts) + 1)):
                if os.path.islink(above) and not os.path.exists(above):
                    raise SystemExit(
                        f"{above} is a link to {os.readlink(above)}, which is not there (a share not mounted?); "
                        f"mount it, or remove the link: rm {above}"
                    )


def finish_what_was_cut_short() -> None:
    """Finish each publication under way; a draft (~) of a journal was cut short itself, before anything moved."""
    from scripts.steps.swap import finish

    with lock("publish"):
        for journal in os.listdir(".make/journal"):
            if journal.endswith("~"):
                os.remove(f".make/journal/{journal}")
                continue
            finish(f".make/journal/{journal}")


if __name__ == "__main__":
    try:
        refuse_links_to_nowhere(sys.argv[1:])
        if os.path.isdir(".make/journal") and os.listdir(".make/journal"):
            finish_what_was_cut_short()
        forget_dead_environments()
        with lock("publish", fcntl.LOCK_SH):
            take_notes(sys.argv[1:])
    except PermissionError as error:
        raise SystemExit(f"nothing was made, what was there before stays: {owned(str(error.filename))}") from None
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}; nothing was made, what was there before stays") from None
    print(time.time_ns())
