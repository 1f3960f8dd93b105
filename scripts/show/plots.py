"""Draw small plots as inline SVG for scripts/show/report.py. Standard library only.

Colours and fonts come from the page's CSS. Every plot is 720 units wide. Its words are SVG text, so they can be
searched, read aloud and printed.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, LEFT, RIGHT = 720, 190, 24
ROW, GAP = 54, 14


class Histogram(NamedTuple):
    """One row of `draw_histograms`: counts of `unit` between the common edges. `kind` is a CSS class."""

    label: str
    counts: Sequence[int]
    unit: str
    kind: str = "main"


class Bar(NamedTuple):
    """One row of `draw_bars`: a value, its smallest and its largest sample, each as a share of the goal."""

    label: str
    share: float
    low: float
    high: float
    text: str
    good: bool


def draw_histograms(
    edges: Sequence[float], rows: Sequence[Histogram], marks: Sequence[tuple[float, str]], title: str, axis: str
) -> str:
    """Draw histograms over log10 edges, one below the other, each with its own vertical scale.

    `marks`: values that get a vertical line with words.
    """
    first, last = find_span(edges, rows, [math.log10(value) for value, _ in marks if value > 0])
    top = 26 + 14 * len(marks)
    height = top + len(rows) * (ROW + GAP) + 40
    parts = []

    def x(power: float) -> float:
        return LEFT + (power - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    bottom = top + len(rows) * (ROW + GAP)
    for power in range(math.ceil(first), math.floor(last) + 1):
        parts.append(draw_line(x(power), top, x(power), bottom, "grid"))
        below = "≤ " if power == edges[0] else ""
        parts.append(draw_text(x(power), bottom + 16, f"{below}10{format_superscript(power)}", "middle"))
    for number, row in enumerate(rows):
        base = top + number * (ROW + GAP) + ROW
        most = max([*row.counts, 1])
        total = f"{sum(row.counts):,} {row.unit}".replace(",", " ")
        parts.append(draw_text(LEFT - 12, base - ROW / 2, row.label, "end", "label"))
        parts.append(draw_text(LEFT - 12, base - ROW / 2 + 15, total, "end", "small"))
        for count, low, high in zip(row.counts, edges, edges[1:], strict=False):
            if count:
                tall = max(1.5, ROW * count / most)
                words = f"{count} from 10^{low:g} to 10^{high:g}"
                parts.append(draw_rectangle(x(low) + 0.5, base - tall, x(high) - x(low) - 1, tall, row.kind, words))
        parts.append(draw_line(LEFT, base, WIDTH - RIGHT, base, "axis"))
    for number, (value, words) in enumerate(marks):
        place, y = x(math.log10(value)), 20 + 14 * number
        anchor = "end" if place > WIDTH * 0.6 else "start"
        parts.append(draw_line(place, y - 8, place, bottom, "mark"))
        parts.append(draw_text(place + (-5 if anchor == "end" else 5), y, words, anchor, "small strong"))
    parts.append(draw_text((LEFT + WIDTH - RIGHT) / 2, height - 6, axis, "middle", "small"))
    return make_svg(height, title, parts)


def find_span(edges: Sequence[float], rows: Sequence[Histogram], others: Sequence[float]) -> tuple[float, float]:
    """Return the first and the last power of ten to draw, at least two apart, so that all counts and `others` fit."""
    held = [edges[place] for row in rows for place, count in enumerate(row.counts) if count]
    held += [edges[place + 1] for row in rows for place, count in enumerate(row.counts) if count]
    held += others or []
    low, high = (math.floor(min(held)), math.ceil(max(held))) if held else (-10, 0)
    return low, max(high, low + 2)


def draw_scatter(panels: Sequence[tuple[str, Sequence[tuple[float, float]]]], title: str, across: str, up: str) -> str:
    """Draw probabilities before and after, one square per panel. Points that change sides of 0.5 are red."""
    side, gap = 270, 70
    parts = []
    for number, (label, points) in enumerate(panels):
        row, column = divmod(number, 2)
        left, top = 60 + column * (side + gap), 30 + row * (side + 70)
        parts.append(draw_text(left + side / 2, top - 10, label, "middle", "label"))
        parts.append(f'<rect x="{left}" y="{top}" width="{side}" height="{side}" class="frame"/>')
        for tick in (0.0, 0.5, 1.0):
            kind = "mark" if tick == 0.5 else "grid"
            parts.append(draw_line(left + side * tick, top, left + side * tick, top + side, kind))
            parts.append(draw_line(left, top + side * tick, left + side, top + side * tick, kind))
            parts.append(draw_text(left + side * tick, top + side + 15, f"{tick:g}", "middle", "small"))
            parts.append(draw_text(left - 8, top + side * (1 - tick) + 4, f"{tick:g}", "end", "small"))
        parts.append(draw_line(left, top + side, left + side, top, "axis"))
        for before, after in points:
            kind = "point" if (before > 0.5) == (after > 0.5) else "point bad"
            words = f"{before:.4f} → {after:.4f}"
            place = f'cx="{left + side * before:.1f}" cy="{top + side * (1 - after):.1f}"'
            parts.append(f'<circle {place} r="3.2" class="{kind}"><title>{words}</title></circle>')
        parts.append(draw_text(left + side / 2, top + side + 32, across, "middle", "small"))
        parts.append(
            f'<text transform="translate({left - 34} {top + side / 2}) rotate(-90)" text-anchor="middle" '
            f'class="small">{escape(up)}</text>'
        )
    return make_svg(30 + -(-len(panels) // 2) * (side + 70), title, parts)


def draw_bars(rows: Sequence[Bar], title: str) -> str:
    """Draw values as shares of their goals: a bar that ends left of the line meets its goal."""
    label, most = 300, 1.5
    full = WIDTH - label - 170

    def x(share: float) -> float:
        return label + full * min(share, most) / most

    height = 30 + 26 * len(rows) + 8
    parts = [draw_text(x(1), 16, "goal", "middle", "small strong")]
    for number, row in enumerate(rows):
        y = 30 + 26 * number
        parts.append(draw_text(label - 10, y + 12, row.label, "end", "label"))
        parts.append(
            draw_rectangle(label, y, max(1.0, x(row.share) - label), 16, "good" if row.good else "bad", row.text)
        )
        if row.high > row.low:
            parts.append(draw_line(x(row.low), y + 8, x(row.high), y + 8, "whisker"))
            parts += [draw_line(x(end), y + 4, x(end), y + 12, "whisker") for end in (row.low, row.high)]
        parts.append(
            draw_text(label + full + 8, y + 12, ("» " if row.share > most else "") + row.text, "start", "small")
        )
    parts.append(draw_line(x(1), 20, x(1), height - 4, "mark"))
    return make_svg(height, title, parts)


def format_superscript(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def draw_line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def draw_rectangle(x: float, y: float, width: float, height: float, kind: str, words: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} class="{kind}"><title>{escape(words)}</title></rect>'


def draw_text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def make_svg(height: float, title: str, parts: Sequence[str]) -> str:
    inside = "\n".join(parts)
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">\n'
        f"<title>{escape(title)}</title>\n{inside}\n</svg>"
    )
