"""Draw the pipeline as an SVG: which artifacts are fresh, rebuilt, stale, absent or yours, and the script of each.

    python3 -sES -m scripts.show.graph REPOSITORY OUT.svg

The pipeline runs from left to right: each artifact is one column behind the last of its inputs. Each model has a band.
The entries of models.yaml and the environments are drawn only while they are stale. Standard library only.
"""

import json
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

from scripts.steps.explain import ABSENT, FRESH, LOCAL, MAY, STALE, Step, ask_make, judge_steps
from scripts.steps.printing import print_text
from scripts.steps.records import read_text, record_path

REBUILT = "rebuilt"
LOOK = {  # fill, outline, dashes and meaning of each state; a black-and-white print still shows dashes and text
    FRESH: ("#e8f5e8", "#2e7d32", "", "fresh: reused"),
    REBUILT: ("#a5d6a7", "#1b5e20", "", "fresh: rebuilt by the last make"),
    ABSENT: ("#ffffff", "#2e7d32", "5 3", "absent, with a valid record"),
    STALE: ("#f7c1b8", "#b3261e", "", "stale: will run"),
    MAY: ("#ffe7a8", "#a06a00", "2 3", "may run"),
    LOCAL: ("#c9dcf7", "#1a4f9c", "", "yours"),
}
# Sizes in pixels. The widths of the font are not known here, so each letter gets the width of a wide one.
LETTER, SMALL = 7.2, 5.6
LINE, PAD, GAP, COLUMN, MARGIN, TIP = 14, 8, 12, 56, 16, 7
LONGEST = 48  # letters of a line; the tooltip has the whole text


class Box(NamedTuple):
    """The place of a node, or of a frame around nodes."""

    x: float
    y: float
    width: float
    height: float


def select_shown(steps: dict[str, Step]) -> dict[str, Step]:
    """Return the steps that are drawn."""
    return {name: step for name, step in steps.items() if not is_minor(name) or step.state in (STALE, MAY)}


def list_edges(shown: dict[str, Step], steps: dict[str, Step]) -> dict[str, set[str]]:
    """Return the steps from which each drawn step gets an arrow: its inputs, but for inputs of other inputs."""
    sources = {
        name: {source for source in list_prerequisites(step, steps) if source in shown} for name, step in shown.items()
    }
    behind: dict[str, set[str]] = {}
    for name in shown:  # inputs come first
        behind[name] = sources[name].union(*(behind.get(source, set()) for source in sources[name]))
    return {
        name: direct - set().union(*(behind.get(source, set()) for source in direct))
        for name, direct in sources.items()
    }


def assign_columns(edges: dict[str, set[str]]) -> dict[str, int]:
    """Return the column of each step: 0 if it has no inputs, else one more than the last of its inputs."""
    columns: dict[str, int] = {}
    for name, sources in edges.items():  # inputs come first
        columns[name] = 1 + max((columns.get(source, -1) for source in sources), default=-1)
    return columns


def lay_out_boxes(
    shown: dict[str, Step], edges: dict[str, set[str]], repository: str
) -> tuple[dict[str, Box], dict[str, Box]]:
    """Return the box of each step, and the frame of each group by its title. Boxes do not overlap."""
    columns = assign_columns(edges)
    cells: dict[tuple[str, int], list[str]] = {}
    for name in shown:
        cells.setdefault((find_group(name, shown, repository), columns[name]), []).append(name)
    size = {name: (measure_box_width(shown[name]), PAD * 2 + LINE * len(list_box_lines(shown[name]))) for name in shown}
    left, lefts = float(MARGIN), {}
    widest = {column: max(size[name][0] for name in shown if columns[name] == column) for column in columns.values()}
    for column in sorted(widest):
        lefts[column] = left
        left += widest[column] + COLUMN
    last = max(widest, default=0)
    bands = [title for title in dict.fromkeys(title for title, _ in cells) if title not in ("", repository)]
    boxes: dict[str, Box] = {}
    frames: dict[str, Box] = {}

    def place_group(title: str, top: float, height: float) -> None:
        """Place the steps of a group, each of its columns in the middle of the height."""
        for (of, column), names in cells.items():
            if of == title:
                y = top + (height - measure_column(names)) / 2
                for name in names:
                    boxes[name] = Box(lefts[column], y, widest[column], size[name][1])
                    y += size[name][1] + GAP

    def measure_column(names: list[str]) -> float:
        return sum(size[name][1] + GAP for name in names) - GAP

    def measure_group(title: str) -> float:
        return max((measure_column(names) for (of, _), names in cells.items() if of == title), default=0)

    top = float(MARGIN)
    for title in bands:
        place_group(title, top + LINE + PAD, height := measure_group(title))
        inner = [boxes[name] for name in shown if find_group(name, shown, repository) == title]
        right = max(box.x + box.width for box in inner)
        start = min(box.x for box in inner)
        frames[title] = Box(start - PAD, top, right - start + 2 * PAD, height + LINE + 2 * PAD)
        top += frames[title].height + GAP
    for title in ("", repository):  # beside the bands if its columns are free, else below them
        mine = {column for of, column in cells if of == title}
        free = not any(column in mine for of, column in cells if of in bands or (title and of == ""))
        height = measure_group(title)
        if mine and free:
            middle = max(top - GAP - MARGIN, height + LINE + PAD)
            place_group(title, MARGIN + LINE + PAD, middle - LINE - PAD)
            top = max(top, MARGIN + middle + GAP)
        elif mine:
            place_group(title, top + LINE + PAD, height)
            top += height + LINE + 2 * PAD + GAP
        if mine and title:
            inner = [boxes[name] for name in shown if find_group(name, shown, repository) == title]
            start, first = min(box.x for box in inner), min(box.y for box in inner)
            end = max(box.y + box.height for box in inner)
            frames[title] = Box(start - PAD, first - LINE - PAD, widest[last] + 2 * PAD, end - first + LINE + 2 * PAD)
    return boxes, frames


def list_prerequisites(step: Step, steps: dict[str, Step]) -> list[str]:
    """Return what a step depends on: nothing if its file is the user's own; a published model also on the verdict."""
    if step.state == LOCAL:
        return []
    if step.script == "scripts/publish/publish.py":
        return [*step.inputs, *(name for name in steps if Path(name).name == "verdict.json")]
    return [*step.inputs, *step.needs]


def is_minor(name: str) -> bool:
    """Return whether a file is too unimportant to be drawn while it is current."""
    return name.startswith(("build/models/", ".venv"))


def find_group(name: str, shown: dict[str, Step], repository: str) -> str:
    """Return the title of the frame around a node: its model, or the repository; "" for no frame."""
    if name.startswith(f"{repository}/"):
        return repository
    if name.startswith(("build/onnx/", "build/models/", "build/checks/")) and "verdict" not in name:
        return Path(name).name.partition(".")[0]
    readers = [other for other, step in shown.items() if name in step.inputs and "verdict" not in other]
    readers = [other for other in readers if other.startswith(("build/onnx/", "build/checks/"))]
    return Path(readers[0]).name.partition(".")[0] if readers else ""


def find_state(step: Step) -> str:
    """Return the state that gives a step its colour: REBUILT for a fresh step that the last make ran."""
    took = json.loads(read_text(record_path("took", step.target)) or "{}")
    return (
        REBUILT
        if step.state == FRESH and "read" not in took and took.get("run", "") == read_last_run() != ""
        else step.state
    )


def read_last_run() -> str:
    """Return the token of the last make that ran a step, or "" if none did."""
    texts = (path.read_text() for path in Path(".make/took").glob("*") if not path.name.endswith("~"))
    return max((str(json.loads(text).get("run", "")) for text in texts if text), default="")


def list_box_lines(step: Step) -> list[str]:
    """Return the lines in a box: the artifact, the script that makes it, and why it will run."""
    short = step.target.startswith(("build/checks/", "build/models/"))
    lines = [step.target.removeprefix("build/") if short else Path(step.target).name]
    if step.state != LOCAL:
        lines.append(step.script)
    if step.reason and step.state != MAY:  # the arrows show why a step may run
        lines.append(step.reason)
    return [line if len(line) <= LONGEST else line[: LONGEST - 1] + "…" for line in lines]


def measure_box_width(step: Step) -> float:
    """Return the width of a box that holds its text."""
    name, *small = list_box_lines(step)
    return 2 * PAD + max(LETTER * len(name), *(SMALL * len(line) for line in small), 0)


def draw_box(step: Step, box: Box) -> str:
    """Return a box with its text, and the whole text as a tooltip."""
    fill, line, dashes, _ = LOOK[state := find_state(step)]
    tip = f"{step.target}: {state} {step.reason}".strip()
    text = "".join(
        f'<text x="{box.x + box.width / 2:.0f}" y="{box.y + PAD + LINE * (number + 0.8):.0f}"'
        + (' font-size="12" font-weight="bold">' if number == 0 else f' fill="{"#444444" if number == 1 else line}">')
        + f"{escape(words)}</text>"
        for number, words in enumerate(list_box_lines(step))
    )
    return f'<g class="node"><title>{escape(tip)}</title>{draw_rectangle(box, fill, line, dashes)}{text}</g>'


def draw_rectangle(box: Box, fill: str, line: str, dashes: str = "") -> str:
    """Return a box with round corners."""
    return (
        f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{box.height:.0f}" rx="6" fill="{fill}" '
        f'stroke="{line}"' + (f' stroke-dasharray="{dashes}"/>' if dashes else "/>")
    )


def draw_arrow(source: str, target: str, boxes: dict[str, Box]) -> str:
    """Return an arrow from the right of one box to the left of another."""
    one, other = boxes[source], boxes[target]
    x, y, to_x, to_y = one.x + one.width, one.y + one.height / 2, other.x, other.y + other.height / 2
    end, bend = to_x - TIP, min(COLUMN, to_x - x) / 2
    path = f"M{x:.0f},{y:.0f} C{x + bend:.0f},{y:.0f} {end - bend:.0f},{to_y:.0f} {end:.0f},{to_y:.0f}"
    tip = f"M{end:.0f},{to_y - TIP / 2:.1f} L{to_x:.0f},{to_y:.1f} L{end:.0f},{to_y + TIP / 2:.1f} z"
    title = escape(f"{source} -> {target}")
    drawn = f'<path d="{path}" fill="none" stroke="#777777"/><path d="{tip}" fill="#777777"/>'
    return f'<g class="edge"><title>{title}</title>{drawn}</g>'


def draw_legend(top: float) -> str:
    """Return one row with the colour of each state."""
    left, parts = float(MARGIN), []
    for fill, line, dashes, meaning in LOOK.values():
        box = Box(left, top, 2 * PAD + SMALL * len(meaning), LINE + PAD)
        middle = f'x="{left + box.width / 2:.0f}" y="{top + LINE:.0f}"'
        parts.append(
            f'<g class="legend">{draw_rectangle(box, fill, line, dashes)}<text {middle}>{escape(meaning)}</text></g>'
        )
        left += box.width + GAP
    return "\n".join(parts)


def draw_pipeline(steps: dict[str, Step], repository: str) -> str:
    """Return the pipeline as an SVG file."""
    shown = select_shown(steps)
    edges = list_edges(shown, steps)
    boxes, frames = lay_out_boxes(shown, edges, repository)
    everything = [*boxes.values(), *frames.values()]
    right = max([box.x + box.width for box in everything] + [900.0]) + MARGIN
    bottom = max(box.y + box.height for box in everything) + MARGIN
    named = "".join(
        f'<g class="frame">{draw_rectangle(box, "none", "#bbbbbb")}<text x="{box.x + PAD:.0f}" y="{box.y + LINE:.0f}" '
        f'text-anchor="start">{escape(title)}</text></g>\n'
        for title, box in frames.items()
    )
    arrows = "\n".join(draw_arrow(source, name, boxes) for name, direct in edges.items() for source in sorted(direct))
    nodes = "\n".join(draw_box(shown[name], box) for name, box in boxes.items())
    size = f"{right:.0f} {bottom + 2 * LINE + MARGIN:.0f}"
    wide, high = size.split()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{wide}" height="{high}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="10" text-anchor="middle">\n'
        f'<rect width="{wide}" height="{high}" fill="#ffffff"/>\n'
        f"{named}{arrows}\n{nodes}\n{draw_legend(bottom)}\n</svg>\n"
    )


def main(repository: str, out: str) -> None:
    """Draw the pipeline into the file `out`."""
    drawn = draw_pipeline(judge_steps(ask_make("repository"), repository), repository)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(drawn)
    print_text(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
