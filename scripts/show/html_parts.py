"""HTML parts for the page of scripts/show/report.py: headings, tables, figures, notes. Standard library only."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from scripts.steps.records import current_digest, is_true, known_digest, read_inputs, read_text

STAMP = '<span class="stamp">SYNTHETIC</span>'
HEXADECIMAL = frozenset("0123456789abcdef")


def read_json(path: str) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if there is no such file."""
    text = read_text(path)
    found: dict[str, Any] | None = json.loads(text) if text else None
    return found


def remark_staleness(path: str, command: str) -> str:
    """Return a remark if an input of `path` has changed since it was made, or `path` itself; else ""."""
    fresh = all(known_digest(name) == was and is_true(name) for name, was in read_inputs(path).items())
    if fresh and current_digest(path):
        return ""
    return f" <b>Something it was made from has changed since. Run <code>{command}</code>.</b>"


def make_heading(title: str, kind: str = "") -> str:
    return f"<h2>{title}{STAMP if kind == 'synthetic' else ''}</h2>"


def make_figure(title: str, plot: str, caption: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{plot}<figcaption>{escape(caption)}</figcaption></figure>"


def make_missing_note(what: str, command: str, reason: str = "") -> str:
    """Return a note that `what` does not exist, why, and the command that makes it."""
    words = f"{escape(what)}: not made yet" if not reason else f"{escape(what)}: {escape(reason)}"
    return f'<p class="missing">{words}{f". Make it with <code>{escape(command)}</code>" if command else ""}.</p>'


def make_table(rows: Sequence[Sequence[str]], good: Iterable[str] = (), bad: Iterable[str] = ()) -> str:
    """Return a table. The first row is its head; cells whose text is in `good` or `bad` are coloured."""

    def make_cell(words: str) -> str:
        kind = ' class="good"' if words in good else ' class="bad"' if words in bad else ""
        return f"<td{kind}>{format_code(words)}</td>"

    head = "".join(f"<th>{escape(words)}</th>" for words in rows[0])
    body = "\n".join(f"<tr>{''.join(map(make_cell, row))}</tr>" for row in rows[1:])
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def format_code(words: str) -> str:
    """Return the text of a cell, with a path or a digest set as code."""
    if len(words) == 12 and HEXADECIMAL.issuperset(words):
        return f'<code class="digest">{words}</code>'
    return f"<code>{escape(words)}</code>" if "/" in words and "://" not in words else escape(words)
