"""Show what was built, of what, and how well, on one page: build/report.html. Standard library only.

    make --no-print-directory EXPLAIN=1 repository | python3 -sES scripts/report.py REPOSITORY build/report.html

One file, which asks no network: it may be mailed, printed, kept beside the models.  It shows what is there by now, and
names the command for what is not.  No clock and no machine's name is in it.
"""

import itertools
import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import fidelity_table
from explain import FRESH, LOCAL, Step, judged
from graph import picture
from page import figure, heading, missing, table
from plots import Bar, Histogram, bars, histograms, scatter
from provenance import provenance
from records import digest, holds, known, made_from, read, record
from summary import size

HERE = Path(__file__).parent
# Nothing is asked for, wherever the page is opened
POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
)


def report(repository: str, steps: dict[str, Step]) -> str:
    """Return the whole page."""
    kind = read(record("published", repository)).partition("\n")[0]
    parts = {
        "Models": models(kind),
        "Pipeline": pipeline(repository, steps),
        "Made of": made_of(repository, steps),
        "Fidelity": fidelity(),
        "Compared": compared(repository),
        "Speed and size": benchmark(),
    }
    anchors = {title: title.lower().replace(" ", "-") for title in parts}
    links = "".join(f'<a href="#{anchor}">{title}</a>' for title, anchor in anchors.items())
    banner = f'<p class="banner">{escape(fidelity_table.SYNTHETIC)}.</p>' if kind == "synthetic" else ""
    body = "\n".join(f'<section id="{anchors[title]}">{part}</section>' for title, part in parts.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{POLICY}\n"
        f'<title>Chest-CT models: {escape(repository)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{(HERE / 'report.css').read_text()}</style>\n</head>\n<body>\n<header>\n"
        "<h1>Chest-CT models for NVIDIA Triton</h1>\n"
        f'<p class="lead">{escape(repository)}: what was built, of what, and how well.</p>\n'
        f"<nav>{links}</nav>\n{banner}{figures(repository, kind)}</header>\n<main>\n{body}\n</main>\n"
        "<footer>This is no medical device: what the networks say of a patient is for physicians to judge.</footer>\n"
        "</body>\n</html>\n"
    )


def figures(repository: str, kind: str) -> str:
    """The handful of numbers that one looks for first."""
    verdict, measured = load("build/checks/verdict.json"), load("build/fidelity.json")
    files = [path for path in Path(repository).rglob("*") if path.is_file() and path.name != ".gitkeep"]
    shown = [
        (kind or "none", "weights"),
        (f"{sum(path.stat().st_size for path in files) / 1e6:.0f} MB", f"{len(files)} published files"),
    ]
    if verdict:
        ready = sum(model["state"] == "READY" for model in verdict["models"].values())
        shown.append((f"{ready} of {len(verdict['models'])}", f"models READY, {verdict['server']}"))
        worst = max(model["relative"] for model in verdict["models"].values())
        shown.append((f"{worst:.1e}", "largest difference served, of the scale"))
    if hops := [hop for hop in (measured or {}).get("hops", []) if "probabilities" in hop]:
        scores = [score for hop in hops for score in hop["probabilities"].values()]
        shown.append((f"{sum(len(score['changed']) for score in scores)}", "decisions changed by a hop"))
        shown.append((f"{max(score['max'] for score in scores):.1e}", "largest change of a probability"))
    return (
        '<div class="figures">' + "".join(f"<div><b>{a}</b><span>{escape(b)}</span></div>" for a, b in shown) + "</div>"
    )


def models(kind: str) -> str:
    """Triton's verdict per model, and the comparison of each ONNX file with PyTorch."""
    parts = [heading("Models", kind)]
    if verdict := load("build/checks/verdict.json"):
        parts.append(
            f"<p>{escape(verdict['server'])} loaded each model strictly, and each was asked over gRPC what PyTorch had "
            f"answered before.{stale('build/checks/verdict.json', 'make repository')}</p>"
        )
        rows = [("model", "state", "difference from PyTorch", "near ties explained", "answers in")]
        rows += [
            (
                name,
                model["state"],
                f"{model['relative']:.1e}",
                str(model["codes_flipped"]),
                f"{model['latency_ms']:g} ms",
            )
            for name, model in verdict["models"].items()
        ]
        parts.append(table(rows, good={"READY"}))
    else:
        parts.append(missing("Triton's verdict", "make repository"))
    checks: list[tuple[str, ...]] = [
        ("ONNX against PyTorch", "difference", "allowed", "batches", "codes flipped", "near ties")
    ]
    for path in sorted(Path("build/checks").glob("*.json")):
        check = load(str(path)) or {}
        if "difference" in check and "tolerance" in check:
            codes = check.get("codes", {})
            flipped = f"{codes['flipped']} of {codes['compared']}" if codes else "-"
            sizes = ", ".join(map(str, check.get("batches", [])))
            name = path.name.removesuffix(".json")
            row = (
                f"{check['difference']:.1e}",
                f"{check['tolerance']:g}",
                sizes,
                flipped,
                str(codes.get("near_ties", "-")),
            )
            checks.append((name, *row))
    if checks[1:]:
        parts.append(table(checks))
        parts.append('<p class="note">Differences are relative to the largest value of PyTorch\'s output.</p>')
    return "\n".join(parts)


def pipeline(repository: str, steps: dict[str, Step]) -> str:
    """The graph as `make graph` draws it, and how many steps are current."""
    current = sum(step.state in (FRESH, LOCAL) for step in steps.values())
    try:
        drawn = picture(steps, repository)
    except SystemExit as reason:
        return heading("Pipeline") + missing("The graph", str(reason).split("; ")[-1], str(reason))
    drawn = drawn[drawn.index("<svg") :]
    caption = f"{current} of {len(steps)} artifacts are current. Each box names the script that makes it."
    return f'{heading("Pipeline")}<figure class="graph wide">{drawn}<figcaption>{caption}</figcaption></figure>'


def made_of(repository: str, steps: dict[str, Step]) -> str:
    """Each published file with its origin, as `make provenance` tells it, and the versions that shaped it."""
    title = heading("Made of")
    try:
        told = provenance(repository, steps)
    except SystemExit as reason:
        return title + missing("What the published files were made from", "make repository", str(reason))
    rows = [("published file", "size", "sha256", "made by", "of")]
    for file, entry in told["published"].items():
        made = told["made"].get(entry["copy_of"])
        script = step_script(made["command"]) if made else "copied"
        inputs = [name for name in made["inputs"] if not name.endswith(".py")] if made else [entry["copy_of"]]
        marked = [name + (" (yours)" if told["origin"].get(name, {}).get("kind") == "local" else "") for name in inputs]
        rows.append((file, size(entry["copy_of"]), entry["sha256"][:12], script, ", ".join(marked)))
    versions = sorted({pair for made in told["made"].values() for pair in made["versions"].items()})
    took = [("artifact", "took", "peak memory of a process")]
    for name in told["made"]:
        cost = json.loads(read(record("took", name)) or "{}")
        if cost.get("seconds", 0) >= 1:
            took.append((name, f"{cost['seconds']:.1f} s", f"{cost['peak_mb']} MB"))
    origin = ", ".join(
        f"{name} ({entry['kind']})" for name, entry in told["origin"].items() if entry["kind"] != "source"
    )
    parts = [title, table(rows)]
    parts.append(f"<p>Weights: {escape(told['weights'])}{escape(f'; {origin}' if origin else '')}. Shaped by ")
    parts.append(", ".join(f"{escape(name)}&nbsp;{escape(version)}" for name, version in versions) + ".</p>")
    parts += ["<h3>What it took</h3>", table(took)] if took[1:] else []
    return "\n".join(parts)


def fidelity() -> str:
    """Every hop on the seeded volumes: the table, and three plots."""
    found = load("build/fidelity.json")
    if not found:
        return heading("Fidelity") + missing("How far each hop moves the answers", "make fidelity")
    about = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found["tissue"].items())
    parts = [
        heading("Fidelity", found["weights"]),
        f"<p>{found['volumes']} seeded volumes with the statistics of CT ({about}) go through every hop that exists. "
        "Differences are relative to the largest value of PyTorch's embeddings."
        f"{stale('build/fidelity.json', 'make fidelity')}</p>",
    ]
    head, *rows = fidelity_table.rows(found)
    parts.append(table([head, *[row for row in rows if row[3]]]))
    parts += [missing(row[0], "", row[2]) for row in rows if not row[3]]
    hops = [hop for hop in found["hops"] if "embedding" in hop]
    return "\n".join([*parts, differences(found, hops), margins(found, hops), distances(found, hops)])


def differences(found: dict[str, Any], hops: Sequence[dict[str, Any]]) -> str:
    """The distribution of each hop's differences, and what the build's check allows."""
    check = load("build/checks/vit.json")
    marks = [(check["tolerance"], f"allowed by the build's check: {check['tolerance']:g}")] if check else []
    rows = [Histogram(hop["hop"], hop["embedding"]["histogram"], "values") for hop in hops]
    axis = "difference of each value of an embedding, relative to the largest (equal ones count at the left end)"
    return figure(
        "Differences of the embeddings",
        histograms(found["edges"], rows, marks, "Distribution of the embeddings' differences", axis),
        "Where the differences lie, each hop against what the table says. Far left of the line is rounding.",
    )


def margins(found: dict[str, Any], hops: Sequence[dict[str, Any]]) -> str:
    """The margins of all tokens, and of the codes that flipped."""
    rows = [Histogram("every token", found["token_margins"], "tokens", "all")]
    rows += [Histogram(hop["hop"], hop["codes"]["histogram"], "codes flipped", "other") for hop in hops if hop["codes"]]
    marks = [(found["rounding"], f"float32 rounding explains up to {found['rounding']:.1e}")]
    axis = "cosine with the nearest codebook row minus cosine with the other"
    return figure(
        "Margins of the codes",
        histograms(found["edges"], rows, marks, "Margins of all tokens and of flipped codes", axis),
        "The quantiser's near ties. Grey: how far each token's best codebook row is ahead of its second. Below: the "
        "margins of the codes that differ. Left of the line rounding decides; right of it the network has changed.",
    )


def distances(found: dict[str, Any], hops: Sequence[dict[str, Any]]) -> str:
    """Histograms of |p - 0.5| per head, with the largest change as a line."""
    edges = found["edges"]
    rows = []
    for head, values in found["probabilities"].items():
        powers = [math.log10(max(abs(value - 0.5), 1e-10)) for row in values for value in row]
        counts = [sum(low <= power < high for power in powers) for low, high in itertools.pairwise(edges)]
        rows.append(Histogram(head, counts, "probabilities"))
    changes = [score["max"] for hop in hops for score in hop["probabilities"].values()]
    marks = [(max(changes), f"largest change: {max(changes):.1e}")] if changes and max(changes) else []
    plot = histograms(
        edges, rows, marks, "Distances of the probabilities from 0.5", "distance of a probability from 0.5"
    )
    return figure(
        "Distances of the decisions",
        plot,
        "How close the decisions are: the distance of every probability from 0.5, and the largest change that a hop "
        "makes. While the line stays left of all bars, no hop can turn a decision.",
    )


def compared(repository: str) -> str:
    """The last comparison with another repository."""
    found = load("build/compare.json")
    if not found:
        return heading("Compared") + missing("A comparison with another repository", "make compare WITH=/path/to/it")
    kind = "synthetic" if "synthetic" in found["weights"].values() else ""
    changed = [f for f, sha in found["files"].items() if known(f"{repository}/{f}") != sha]
    note = " <b>Another set is published since: make compare WITH=… again.</b>" if changed else ""
    parts = [
        heading("Compared", kind),
        f"<p>New: <code>{escape(found['ours'])}</code>, weights {found['weights']['ours']}. ",
    ]
    parts.append(f"Other: <code>{escape(found['theirs'])}</code>, weights {found['weights']['theirs']}.{note}</p>")
    rows = [("model", "verdict", "difference", "allowed", "decisions changed", "")]
    for name, result in found["models"].items():
        apart = (f"{result['difference']:.1e}", f"{result['tolerance']:g}") if "difference" in result else ("", "")
        decisions = str(len(result["decisions_changed"])) if "decisions_changed" in result else ""
        rows.append((name, result["verdict"], *apart, decisions, result.get("reason", "")))
    parts.append(
        table(rows, good={"same files", "same answers"}, bad={"differs", "not compared", "only in the other one"})
    )
    if found["probabilities"]:
        panels = [
            (
                head,
                [
                    pair
                    for old, new in zip(sides["old"], sides["new"], strict=True)
                    for pair in zip(old, new, strict=True)
                ],
            )
            for head, sides in found["probabilities"].items()
        ]
        caption = f"Each probability of {len(found['inputs'])} volumes, old against new; red: another decision at 0.5."
        parts.append(figure("Probabilities", scatter(panels, "Probabilities old and new", "other", "new"), caption))
    return "\n".join(parts)


def benchmark() -> str:
    """The figures of `make bench` as shares of their goals."""
    found = load("build/bench.json")
    if not found:
        return heading("Speed and size") + missing("The benchmarks", "make bench")
    machine = found["machine"]
    parts = [
        heading("Speed and size"),
        f"<p>{machine['cores']} cores, {escape(machine['processor'])}, Python {machine['python']}; a ratio is of one "
        "run on one machine. A bar is a share of its goal, a whisker the spread of its rounds.</p>",
    ]
    groups = dict.fromkeys(row["group"] for row in found["rows"])
    for group in groups:
        rows = [row for row in found["rows"] if row["group"] == group]
        judged_rows = [bar(row) for row in rows if row["value"] is not None and row["goal"]]
        parts.append(figure(group, bars(judged_rows, f"Benchmarks: {group}") if judged_rows else "", ""))
        others = [("figure", "value", "note")]
        for row in rows:
            if row["value"] is None or not row["goal"]:
                value = "not measured" if row["value"] is None else f"{row['value']:.3g} {row['unit']}".strip()
                others.append((row["what"], value, row["note"]))
        parts += [table(others)] if others[1:] else []
    return "\n".join(parts)


def bar(row: dict[str, Any]) -> Bar:
    """A row of bench.json as share of its goal: at most 1 is good, whatever way the goal is meant."""

    def share(value: float) -> float:
        return value / row["goal"] if row["relation"] == "≤" else row["goal"] / value if value else math.inf

    ends = [share(value) for value in row["samples"] or [row["value"]]]
    words = f"{row['value']:.3g} {row['unit']} ({row['relation']} {row['goal']:.3g})"
    return Bar(row["what"], share(row["value"]), min(ends), max(ends), words, row["verdict"] == "pass")


def step_script(command: str) -> str:
    words = command.split()
    return words[words.index("-m") + 1].rpartition(".")[2] if "-m" in words else words[0]


def load(path: str) -> dict[str, Any] | None:
    """Return the JSON object in a file, None if there is no such file."""
    text = read(path)
    found: dict[str, Any] | None = json.loads(text) if text else None
    return found


def stale(path: str, command: str) -> str:
    """Return a remark if what `path` was made from is no longer so."""
    fresh = all(known(name) == was and holds(name) for name, was in made_from(path).items())
    if fresh and digest(path):
        return ""
    return f" <b>Something it was made from has changed since: <code>{command}</code>.</b>"


def main(repository: str, out: str) -> None:
    page = report(repository, judged(sys.stdin.read(), repository))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    draft = Path(f"{out}.part")
    draft.write_text(page)
    draft.replace(out)
    print(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
