"""Sections of scripts/show/report.py about measurements: fidelity, TensorRT, speed on a GPU, comparison, benchmarks.

Standard library only.
"""

import itertools
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from scripts.show import fidelity_table
from scripts.show.html_parts import (
    make_figure,
    make_heading,
    make_missing_note,
    make_table,
    read_json,
    remark_staleness,
)
from scripts.show.plots import Bar, Histogram, draw_bars, draw_histograms, draw_scatter
from scripts.steps.records import known_digest


def show_fidelity() -> str:
    """Return the table of all hops on the seeded volumes, and three plots."""
    found = read_json("build/fidelity.json")
    if not found:
        return make_heading("Fidelity") + make_missing_note("The difference that each hop makes", "make fidelity")
    about = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found["tissue"].items())
    parts = [
        make_heading("Fidelity", found["weights"]),
        f"<p>{found['volumes']} seeded volumes like CT ({about}) go through every hop that exists. "
        "Differences are relative to the largest value of PyTorch's embeddings."
        f"{remark_staleness('build/fidelity.json', 'make fidelity')}</p>",
    ]
    head, *rows = fidelity_table.list_rows(found)
    parts.append(make_table([head, *[row for row in rows if row[3]]]))
    parts += [make_missing_note(row[0], "", row[2]) for row in rows if not row[3]]
    hops = [hop for hop in found["hops"] if "embedding" in hop]
    for hop in hops:
        if (ties := hop["near_ties"]) and ties["explain"]:
            parts.append(
                f"<p><b>{escape(hop['hop'])}</b>: its codes cannot be seen, but each flip changes the embedding in a "
                f"known way. Flips of {ties['explain']} near ties explain the difference up to {ties['remains']:.1e} "
                "of the scale.</p>"
            )
    return "\n".join([*parts, plot_differences(found, hops), plot_margins(found, hops), plot_distances(found, hops)])


def show_rtx() -> str:
    """Return what NVIDIA's TensorRT for RTX built, without a GPU, from each file that becomes a plan."""
    records = sorted(Path("build/checks").glob("*.rtx.json"))
    if not records:
        return make_heading("TensorRT") + make_missing_note(
            "The check by NVIDIA's parser and builder", "make trt CHECK=1"
        )
    rows: list[tuple[str, ...]] = [
        ("ONNX file", "built for", "layers", "attention nodes", "engine", "weights", "activations")
    ]
    for path in records:
        found = read_json(str(path)) or {}
        sizes = [f"{found[f'{what}_bytes'] / 1e6:.1f} MB" for what in ("engine", "weights", "activation")]
        sizes[-1] += f" at batch {max(found['profile']['batch'])}"
        name, kinds = path.name.removesuffix(".rtx.json"), ", ".join(found["built_for"])
        rows.append((name, kinds, str(found["layers"]), str(found["attention_nodes"]), *sizes))
    note = "".join(sorted({remark_staleness(str(path), "make trt CHECK=1") for path in records}))
    judges = ", ".join(sorted({(read_json(str(path)) or {})["judge"] for path in records}))
    return (
        f"{make_heading('TensorRT')}<p>{escape(judges)} parsed each file and built it on a CPU, for the compute "
        f"capabilities named. This product is not the trtexec that builds plans, and no plan ran. So this suggests "
        f"that TensorRT accepts the files, but does not prove it.{note}</p>{make_table(rows)}{show_rtx_on_gpu()}"
    )


def show_rtx_on_gpu() -> str:
    """Return what these engines answered on a GPU, "" if none was asked."""
    rows: list[tuple[str, ...]] = [
        ("ONNX file", "GPU", "largest difference of its scale", "batch", "p50, ms", "p95, ms")
    ]
    for path in sorted(Path("build/checks").glob("*.rtx-gpu.json")):
        found, name = read_json(str(path)) or {}, path.name.removesuffix(".rtx-gpu.json")
        if "not_run" in found:
            rows.append((name, found["not_run"], "", "", "", ""))
        for batch, ms in found.get("ms", {}).items():
            difference = f"{found['output']:.1e}"
            rows.append((name, found["gpu"], difference, batch, f"{ms['median']:.2f}", f"{ms['p95']:.2f}"))
    return f"<p>The same engines on a GPU, against ONNX Runtime:</p>{make_table(rows)}" if len(rows) > 1 else ""


def show_gpu() -> str:
    """Return what `make verify-gpu` measured: each model alone, by batch and number of clients."""
    found = read_json("build/verify-gpu.json")
    if not found:
        return make_heading("On a GPU") + make_missing_note("The speed of the models on a GPU", "make verify-gpu")
    about = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in found["on"].items() if value)
    rows: list[tuple[str, ...]] = [
        (
            "model",
            "batch",
            "clients at once",
            "p50, ms",
            "p95, ms",
            "requests per s",
            "spread",
            "first request, ms",
            "peak GPU memory, MiB",
        )
    ]
    for name, batches in found["measured"].items():
        for batch, row in batches.items():
            for clients, one in row["load"].items():
                figures = (f"{one[key]:g}" for key in ("p50_ms", "p95_ms", "per_s"))
                more = f"{100 * one['spread']:.0f} %", f"{row['first_ms']:g}", str(row["memory_mib"])
                rows.append((name, batch, clients, *figures, *more))
    late = "".join(
        f"<p><b>{escape(name)} is slower than its ONNX model: {escape(figures)}.</b></p>"
        for name, figures in found["slower"].items()
    )
    return (
        f"{make_heading('On a GPU')}<p>{escape(about)}. Each model ran alone in its own server. Clients sent requests "
        "until the rates of three windows in a row agreed; the spread is how far these rates differ.</p>"
        f"{late}{make_table(rows)}"
    )


def plot_differences(found: dict[str, Any], hops: Sequence[dict[str, Any]]) -> str:
    """Plot the distribution of each hop's differences, and the limit of the build's check."""
    check = read_json("build/checks/vit.json")
    marks = [(check["tolerance"], f"allowed by the build's check: {check['tolerance']:g}")] if check else []
    rows = [Histogram(hop["hop"], hop["embedding"]["histogram"], "values") for hop in hops]
    axis = "difference of each embedding value, relative to the largest value (equal values count at the left end)"
    return make_figure(
        "Differences of the embeddings",
        draw_histograms(found["edges"], rows, marks, "Distribution of the embeddings' differences", axis),
        "How large the differences are. Each hop is compared with the one in the column “against” of the table. Far "
        "left of the line, the differences are rounding.",
    )


def plot_margins(found: dict[str, Any], hops: Sequence[dict[str, Any]]) -> str:
    """Plot the margins of all tokens, and of the codes that flipped."""
    rows = [Histogram("every token", found["token_margins"], "tokens", "all")]
    rows += [Histogram(hop["hop"], hop["codes"]["histogram"], "codes flipped", "other") for hop in hops if hop["codes"]]
    marks = [(found["rounding"], f"float32 rounding explains up to {found['rounding']:.1e}")]
    axis = "cosine with the nearest codebook row minus cosine with the other"
    return make_figure(
        "Margins of the codes",
        draw_histograms(found["edges"], rows, marks, "Margins of all tokens and of flipped codes", axis),
        "Grey: the cosine of each token's best codebook row minus that of its second best. Below: the margins of the "
        "codes that flipped. Left of the line, rounding explains a flip; right of it, the network has changed.",
    )


def plot_distances(found: dict[str, Any], hops: Sequence[dict[str, Any]]) -> str:
    """Plot histograms of |p - 0.5| per head, with the largest change as a line."""
    edges = found["edges"]
    rows = []
    for head, values in found["probabilities"].items():
        powers = [math.log10(max(abs(value - 0.5), 1e-10)) for row in values for value in row]
        counts = [sum(low <= power < high for power in powers) for low, high in itertools.pairwise(edges)]
        rows.append(Histogram(head, counts, "probabilities"))
    changes = [score["max"] for hop in hops for score in hop["probabilities"].values()]
    marks = [(max(changes), f"largest change: {max(changes):.1e}")] if changes and max(changes) else []
    plot = draw_histograms(
        edges, rows, marks, "Distances of the probabilities from 0.5", "distance of a probability from 0.5"
    )
    return make_figure(
        "Distances of the decisions",
        plot,
        "How close the decisions are: the distance of every probability from 0.5, and the largest change by a hop. "
        "If the line is left of all bars, no hop can change a decision.",
    )


def show_comparison(repository: str) -> str:
    """Return the last comparison with another repository."""
    found = read_json("build/compare.json")
    if not found:
        return make_heading("Compared") + make_missing_note(
            "A comparison with another repository", "make compare WITH=/path/to/it"
        )
    kind = "synthetic" if "synthetic" in found["weights"].values() else ""
    changed = [f for f, sha in found["files"].items() if known_digest(f"{repository}/{f}") != sha]
    note = " <b>Other models were published since; run again: make compare WITH=….</b>" if changed else ""
    parts = [
        make_heading("Compared", kind),
        f"<p>New: <code>{escape(found['ours'])}</code>, weights {found['weights']['ours']}. ",
    ]
    parts.append(f"Other: <code>{escape(found['theirs'])}</code>, weights {found['weights']['theirs']}.{note}</p>")
    rows = [("model", "verdict", "difference", "allowed", "decisions changed", "reason")]
    for name, result in found["models"].items():
        apart = (f"{result['difference']:.1e}", f"{result['tolerance']:g}") if "difference" in result else ("", "")
        decisions = str(len(result["decisions_changed"])) if "decisions_changed" in result else ""
        rows.append((name, result["verdict"], *apart, decisions, result.get("reason", "")))
    parts.append(
        make_table(rows, good={"same files", "same answers"}, bad={"differs", "not compared", "only in the other one"})
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
        caption = (
            f"Each probability for {len(found['inputs'])} volumes: new model against the other. Red: the decision at "
            "0.5 changes."
        )
        parts.append(
            make_figure(
                "Probabilities",
                draw_scatter(panels, "Probabilities of the new and the other models", "other", "new"),
                caption,
            )
        )
    return "\n".join(parts)


def show_benchmark() -> str:
    """Return the figures of `make bench`, as shares of their goals."""
    found = read_json("build/bench.json")
    if not found:
        return make_heading("Speed and size") + make_missing_note("The benchmarks", "make bench")
    machine = found["machine"]
    parts = [
        make_heading("Speed and size"),
        f"<p>{machine['cores']} cores, {escape(machine['processor'])}, Python {machine['python']}. Both "
        "sides of a ratio were measured in the same run on this machine. A bar is a share of its goal; a whisker is "
        "the spread of its rounds.</p>",
    ]
    groups = dict.fromkeys(row["group"] for row in found["rows"])
    for group in groups:
        rows = [row for row in found["rows"] if row["group"] == group]
        judged_rows = [make_bar(row) for row in rows if row["value"] is not None and row["goal"]]
        parts.append(make_figure(group, draw_bars(judged_rows, f"Benchmarks: {group}") if judged_rows else "", ""))
        others = [("figure", "value", "note")]
        for row in rows:
            if row["value"] is None or not row["goal"]:
                value = "not measured" if row["value"] is None else f"{row['value']:.3g} {row['unit']}".strip()
                others.append((row["what"], value, row["note"]))
        parts += [make_table(others)] if others[1:] else []
    return "\n".join(parts)


def make_bar(row: dict[str, Any]) -> Bar:
    """Return a row of bench.json as a share of its goal: at most 1 is good, for an upper and for a lower limit."""

    def share(value: float) -> float:
        return value / row["goal"] if row["relation"] == "≤" else row["goal"] / value if value else math.inf

    ends = [share(value) for value in row["samples"] or [row["value"]]]
    words = f"{row['value']:.3g} {row['unit']} ({row['relation']} {row['goal']:.3g})"
    return Bar(row["what"], share(row["value"]), min(ends), max(ends), words, row["verdict"] == "pass")
