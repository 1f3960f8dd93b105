"""Draw the pipeline with Graphviz: what is fresh, stale, absent or yours, and by which script. Standard library only.

    make --no-print-directory EXPLAIN=1 repository | python3 -sES scripts/graph.py REPOSITORY OUT.svg

Left to right, one box per model.  The parts of models.yaml and the environments appear only while they are stale.
"""

import html
import shutil
import subprocess
import sys
from pathlib import Path

from explain import ABSENT, FRESH, LOCAL, MAY, STALE, Step, judged

LOOK = {  # colour, outline and meaning of each state
    FRESH: ("#cfe8cf", "#2e7d32", "solid", "fresh"),
    ABSENT: ("#f4faf4", "#2e7d32", "dashed", "absent, vouched for by its record"),
    STALE: ("#f7c1b8", "#b3261e", "solid", "stale: will run"),
    MAY: ("#ffe7a8", "#a06a00", "solid", "may run"),
    LOCAL: ("#c9dcf7", "#1a4f9c", "solid", "yours"),
}


def dot(steps: dict[str, Step], repository: str) -> str:
    """Return the pipeline in the DOT language."""
    shown = {name: step for name, step in steps.items() if not minor(name) or step.state in (STALE, MAY)}
    edges = {name: {source for source in above(step, steps) if source in shown} for name, step in shown.items()}
    behind: dict[str, set[str]] = {}
    for name in shown:  # inputs come first
        behind[name] = edges[name].union(*(behind.get(source, set()) for source in edges[name]))
    lines = [
        "digraph pipeline {",
        'graph [rankdir=LR, fontname="Helvetica", fontsize=13, nodesep=0.18, ranksep=0.55, newrank=true, pad=0.3];',
        'node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=11, margin="0.12,0.07"];',
        'edge [color="#777777", arrowsize=0.7];',
    ]
    groups: dict[str, list[str]] = {}
    for name in shown:
        groups.setdefault(group(name, shown, repository), []).append(node(shown[name]))
    for title, nodes in groups.items():
        box = f'subgraph "cluster {title}" {{ label="{title}"; labeljust=l; color="#bbbbbb"; style=rounded;'
        lines += [box, *nodes, "}"] if title else nodes
    for name, sources in edges.items():
        direct = sources - set().union(*(behind[source] for source in sources))
        lines += [f'"{source}" -> "{name}";' for source in sorted(direct)]
    return "\n".join([*lines, legend(), "}"])


def above(step: Step, steps: dict[str, Step]) -> list[str]:
    """Return what a step hangs on: nothing of ours if it is the user's own, on the verdict too if it is published."""
    if step.state == LOCAL:
        return []
    if step.script == "scripts/publish.py":
        return [*step.inputs, *(name for name in steps if Path(name).name == "verdict.json")]
    return [*step.inputs, *step.needs]


def minor(name: str) -> bool:
    """Tell whether a file is too small a thing to be seen while it is current."""
    return name.startswith(("build/models/", ".venv"))


def group(name: str, shown: dict[str, Step], repository: str) -> str:
    """Return the title of the box that a node stands in: its model, or the repository; "" is none."""
    if name.startswith(f"{repository}/"):
        return repository
    if name.startswith(("build/onnx/", "build/models/", "build/checks/")) and "verdict" not in name:
        return Path(name).name.partition(".")[0]
    readers = [other for other, step in shown.items() if name in step.inputs and "verdict" not in other]
    readers = [other for other in readers if other.startswith(("build/onnx/", "build/checks/"))]
    return Path(readers[0]).name.partition(".")[0] if readers else ""


def node(step: Step) -> str:
    """Return a node: the artifact, the script that makes it, and why it is to run."""
    fill, line, style, _ = LOOK[step.state]
    name = Path(step.target).name
    if step.target.startswith(("build/checks/", "build/models/")):
        name = step.target.removeprefix("build/")
    rows = [f"<b>{html.escape(name)}</b>"]
    small = '<font point-size="9" color="{}">{}</font>'
    if step.state != LOCAL:
        rows.append(small.format("#555555", html.escape(step.script)))
    if step.reason and step.state != MAY:  # of that one the arrows tell
        rows.append(small.format(line, html.escape(step.reason)))
    tip = html.escape(f"{step.target}: {step.state} {step.reason}".strip())
    look = f'fillcolor="{fill}", color="{line}", style="rounded,filled,{style}", tooltip="{tip}"'
    return f'"{step.target}" [label=<{"<br/>".join(rows)}>, {look}];'


def legend() -> str:
    """Return one small table with the colour of each state."""
    cells = "".join(
        f'<td bgcolor="{fill}" color="{line}" style="{style}" border="1">{meaning}</td>'
        for fill, line, style, meaning in LOOK.values()
    )
    table = f'<table border="0" cellborder="1" cellspacing="6" cellpadding="4"><tr>{cells}</tr></table>'
    return f"label=<{table}>; labelloc=b; labeljust=l;"


def picture(steps: dict[str, Step], repository: str) -> str:
    """Return the pipeline as an SVG file."""
    if not shutil.which("dot"):
        raise SystemExit("make graph draws with Graphviz, and there is no `dot` here; apt install graphviz")
    text = dot(steps, repository)
    return subprocess.run(["dot", "-Tsvg"], input=text, text=True, check=True, stdout=subprocess.PIPE).stdout


def main(repository: str, out: str) -> None:
    """Draw what standard input says to `out`."""
    drawn = picture(judged(sys.stdin.read(), repository), repository)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(drawn)
    print(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
