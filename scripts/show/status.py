"""Tell what `make repository` would run, what it may run, and why. Nothing runs. Standard library only.

    python3 -sES -m scripts.show.status [--check] REPOSITORY [FILE]

FILE: an artifact or a published file. Then show this file and everything it depends on, current or not.
--check: exit status 3 if anything will run (make itself then ends with 2).
"""

import os
import sys

from scripts.steps.explain import ABSENT, FRESH, LOCAL, MAY, STALE, Step, ask_make, judge_steps
from scripts.steps.printing import print_text
from scripts.steps.records import current_digest, known_digest

OUT_OF_DATE = 3  # exit status with --check


def list_states(steps: dict[str, Step]) -> list[str]:
    """Return a line for each step that will run, may run or is the user's own, then a line with the counts."""
    lines = align_rows(
        [(step.state, step.target, step.reason) for step in steps.values() if step.state in (STALE, MAY, LOCAL)]
    )
    count = {state: sum(step.state == state for step in steps.values()) for state in (STALE, MAY, ABSENT, FRESH, LOCAL)}
    current = f"{count[FRESH] + count[ABSENT]} current"
    if count[ABSENT]:
        current += f", {count[ABSENT]} of them absent with a valid record"
    if count[LOCAL]:
        current += f"; {count[LOCAL]} yours"
    if not count[STALE]:
        return [*lines, f"nothing to do: {current}"]
    may = f"{count[MAY]} may run (only if a step before writes other bytes than last time), " if count[MAY] else ""
    return [*lines, f"{count[STALE]} will run, {may}{current}"]


def trace_file(file: str, steps: dict[str, Step]) -> list[str]:
    """Return a line for each file that `file` depends on, and for itself at the end."""
    file = os.path.normpath(file)
    target = next((target for target, step in steps.items() if file == target or file in step.files), "")
    if not target:
        some = ", ".join([name for name in steps if name.startswith("build/onnx/")][:2])
        raise SystemExit(f"{file}: not an artifact of this pipeline; expected one such as {some}, or a published file")
    rows: dict[str, tuple[str, ...]] = {}

    def visit(name: str) -> None:
        if name in rows:
            return
        if name not in steps:
            rows[name] = ("source", name, known_digest(name)[:12], "" if current_digest(name) else "absent")
            return
        step = steps[name]
        for needed in [*step.inputs, *step.needs]:
            visit(needed)
        sha = "" if step.files else known_digest(name)[:12]  # a published model is a folder
        rows[name] = (step.state, name, sha, step.reason or step.script)

    visit(target)
    return align_rows(list(rows.values()))


def align_rows(rows: list[tuple[str, ...]]) -> list[str]:
    """Return the rows with their columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    check, words = sys.argv[1] == "--check", [word for word in sys.argv[1:] if word != "--check"]
    found = judge_steps(ask_make("repository"), words[0])
    print_text("\n".join(trace_file(words[1], found) if words[1:] else list_states(found)))
    if check and any(step.state == STALE for step in found.values()):
        sys.exit(OUT_OF_DATE)
