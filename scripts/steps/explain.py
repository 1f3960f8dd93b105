"""Ask make what each record should say (EXPLAIN=1) and compare each step with its record. Standard library only.

    build/onnx/vit.onnx=DIGEST COMMAND TOOLS : INPUT=DIGEST ... | NEEDED ...

is what the record of an artifact should hold.  What is NEEDED (an environment, the archive) must be there before
COMMAND runs and does not change what it writes.  The inputs of the published folder have the form FILE=SOURCE=DIGEST.
"""

import json
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from scripts.steps.records import current_digest, known_digest, read_inputs, read_text, record_path, written_digest
from scripts.steps.step import KEPT, explain_staleness
from scripts.steps.submake import run_make

ARCHIVE = "training/weights.zip"
STALE, MAY, LOCAL, ABSENT, FRESH = "will run", "may run", "local", "absent", "current"


@dataclass
class Step:
    """One artifact, or one model of the published repository."""

    target: str
    command: str
    inputs: dict[str, str]  # name: present digest
    needs: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # for a published model: published file: its source
    state: str = ""
    reason: str = ""

    @property
    def script(self) -> str:
        """The path of the script that the command runs."""
        module = re.search(r"-m (\S+)", self.command)
        return module[1].replace(".", "/") + ".py" if module else self.command.split()[0]


def ask_make(*goals: str) -> str:
    """Return what make prints with EXPLAIN=1 and the present knobs; if it fails, SystemExit with its status."""
    asked = run_make("EXPLAIN=1", *goals, stdout=subprocess.PIPE)
    if asked.returncode:
        raise SystemExit(asked.returncode)
    return asked.stdout


def judge_steps(explained: str, repository: str) -> dict[str, Step]:
    """Return every step, inputs first, with its state and the reason for it.

    A step that will run has a reason of its own.  A step that may run only depends on such a step, which may write the
    same bytes as before.  An absent file is made again if a step reads it, with the content that it had.
    """
    steps = read_steps(explained, repository)
    for step in steps.values():
        judge_step(step, steps)
    for state in (STALE, MAY):
        queue = [step for step in steps.values() if step.state == state]
        while queue:
            reader = queue.pop()
            for name in reader.files.values() if reader.files else [*reader.inputs, *reader.needs]:
                if name in steps and steps[name].state == ABSENT and not is_published(name, steps):
                    steps[name].state = state
                    steps[name].reason = f"absent, needed for {Path(reader.target).name}"
                    queue.append(steps[name])
    return steps


def read_steps(explained: str, repository: str) -> dict[str, Step]:
    """Return the steps by target, inputs first: make's steps, the archive's download, each published model."""
    said: dict[str, Step] = {}
    models: dict[str, Step] = {}
    for line in explained.splitlines():
        if not (match := re.fullmatch(r"(\S+)=[0-9a-f]* (.*) : (.*?)(?: \|(.*))?", line)):
            continue  # a message of make
        target, command, inputs, needs = match[1], match[2], match[3].split(), (match[4] or "").split()
        names = [word.rpartition("=")[0] for word in inputs]
        if command.startswith("publish "):
            for place, _, source in (name.partition("=") for name in names):
                folder = f"{repository}/{place.partition('/')[0]}"
                model = models.setdefault(folder, Step(folder, "scripts/publish/publish.py", {}))
                model.files[f"{repository}/{place}"] = source
                model.inputs[source] = known_digest(source)
        else:
            said[target] = Step(
                target, command, {name: current_digest(name) or known_digest(name) for name in names}, needs
            )
    steps: dict[str, Step] = {}

    def add(target: str) -> None:
        if target in said and target not in steps:
            for name in [*said[target].needs, *said[target].inputs]:
                add(name)
            steps[target] = said[target]
        elif target == ARCHIVE and target not in steps:
            steps[target] = Step(ARCHIVE, "-m scripts.archives.fetch weights.zip", {})

    for target in said:
        add(target)
    for folder in list_gone(repository, {Path(folder).name for folder in models}):
        models[folder] = Step(
            folder, "scripts/publish/publish.py", {}, state=STALE, reason="taken out, it is no longer built"
        )
    return steps | models


def judge_step(step: Step, steps: dict[str, Step]) -> None:
    """Set the state of one step, after those of its inputs; `judge_steps` finds later which absent files are needed."""
    behind = [name for name in step.inputs if name in steps and steps[name].state in (STALE, MAY)]
    if step.state:
        return
    if step.target == ARCHIVE:
        step.state = FRESH if is_archive_here() else ABSENT
    elif step.files:
        if reasons := [
            reason for file, source in step.files.items() if (reason := explain_difference(file, source, step, behind))
        ]:
            step.state, step.reason = STALE, ", ".join(dict.fromkeys(reasons))
    else:
        was, present, mine = read_inputs(step.target), current_digest(step.target), written_digest(step.target)
        own = step.target.startswith(KEPT) and present not in ("", mine)
        words = [f"{name}={was.get(name, '') if name in behind else now}" for name, now in step.inputs.items()]
        recipe = " ".join([step.command, ":", *words])
        expected = mine if own or not present else present
        if read_text(record_path("made", step.target)) != f"{step.target}={expected} {recipe}":
            step.state, step.reason = STALE, explain_staleness(step.target, "" if own else present, recipe)
        elif not present and not is_published(step.target, steps):
            step.state = ABSENT
        if own:
            compared = ", once compared with the archive's" if step.state == STALE and is_archive_here() else ""
            step.state, step.reason = LOCAL, f"yours, used as it is{compared}"
    if not step.state:
        step.state = MAY if behind else FRESH
        step.reason = f"behind {', '.join(Path(name).name for name in behind)}" if behind else ""


def explain_difference(file: str, source: str, model: Step, behind: list[str]) -> str:
    """Say why a published file will be replaced, no matter what the other steps write; "" if it will not."""
    if source in behind or current_digest(file) == known_digest(source):
        return ""
    if not current_digest(file):
        return f"{Path(file).name} is not there" if Path(model.target).is_dir() else "new"
    return f"{Path(file).name} is not {source}"


def is_published(name: str, steps: dict[str, Step]) -> bool:
    """Tell whether an ONNX file is in the published folder, where publishing moved it."""
    files = {source: file for step in steps.values() for file, source in step.files.items()}
    return (
        name.startswith("build/onnx/") and name in files and current_digest(files[name]) == written_digest(name) != ""
    )


def is_archive_here() -> bool:
    """Tell whether weights.zip is there and is the locked one."""
    return current_digest(ARCHIVE) != "" and current_digest(ARCHIVE) == read_lock().get("sha256")


def read_lock() -> dict[str, object]:
    """Return what the lock of weights.zip says, an empty dict if it is absent or cannot be read."""
    try:
        return dict(json.loads(read_text(f"{ARCHIVE}.lock.json")))
    except (ValueError, TypeError):
        return {}


def list_gone(repository: str, models: set[str]) -> list[str]:
    """Return the folders that this build published and would no longer publish."""
    files = read_text(record_path("published", repository)).split("\n")[1:]
    old = sorted({file.partition("/")[0] for file in files if file} - models)
    return [f"{repository}/{model}" for model in old if Path(repository, model).is_dir()]
