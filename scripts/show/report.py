"""Write a report on one page: what was built, from what, and how good it is. Standard library only.

    python3 -sES -m scripts.show.report REPOSITORY build/report.html

The page is one file and loads nothing from a network: it can be mailed, printed, and kept beside the models. It shows
what exists so far, and names the command that makes the rest. It holds no time and no machine's name.
"""

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

from scripts.publish.licences import LICENCES
from scripts.publish.provenance import trace_repository
from scripts.serve.releases import list_notes
from scripts.show import fidelity_table
from scripts.show.graph import draw_pipeline
from scripts.show.html_parts import make_heading, make_missing_note, make_table, read_json, remark_staleness
from scripts.show.report_sections import show_benchmark, show_comparison, show_fidelity, show_gpu, show_rtx
from scripts.steps.explain import FRESH, LOCAL, Step, ask_make, judge_steps
from scripts.steps.printing import print_text
from scripts.steps.records import known_digest, read_text, record_path
from scripts.steps.summary import format_size

HERE = Path(__file__).parent
# Forbids the browser to load anything
POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
)


def make_report(repository: str, steps: dict[str, Step]) -> str:
    """Return the whole page."""
    kind = read_text(record_path("published", repository)).partition("\n")[0]
    parts = {
        "Model card": describe_models(kind),
        "Models": show_models(repository, kind),
        "Pipeline": show_pipeline(repository, steps),
        "Made of": show_sources(repository, steps),
        "Fidelity": show_fidelity(),
        "TensorRT": show_rtx(),
        "On a GPU": show_gpu(),
        "Compared": show_comparison(repository),
        "Speed and size": show_benchmark(),
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
        f'<p class="lead">{escape(repository)}: what was built, from what, and how good it is.</p>\n'
        f"<nav>{links}</nav>\n{banner}{show_figures(repository, kind)}</header>\n<main>\n{body}\n</main>\n"
        "<footer>This is not a medical device: a physician must judge what the networks say about a patient.</footer>\n"
        "</body>\n</html>\n"
    )


def describe_models(kind: str) -> str:
    """Return what the models are for, what they take, and how far each may differ from PyTorch."""
    lines = [
        "Intended use: research on chest CT. A physician reads the answers. "
        "This is not a medical device: it decides nothing about a patient.",
        "Input: one chest CT series in Hounsfield units. The ViT gets HU / 1000, clipped to [-1, 1], as 240 "
        "slices of 480 × 480. Other parts of the body, contrast phases and scanners than those of the training "
        "data were not tested here.",
        *list_notes(),
    ]
    rows: list[tuple[str, ...]] = [
        (
            "model",
            "one input",
            "one output",
            "batches",
            "trained on the ViT",
            "allowed difference",
            "licence of the weights",
        )
    ]
    for path in sorted(Path("build/models").glob("*.json")):
        entry = read_json(str(path)) or {}
        if "family" in entry:
            limits = read_json(f"build/models/{path.stem}.tolerance.json") or {}
            allowed = limits.get("tolerance", limits)
            words = ", ".join(f"{name} {value:g}" for name, value in allowed.items() if isinstance(value, float | int))
            shapes = ["×".join(map(str, entry.get(end, []))) or "-" for end in ("input", "output")]
            batches = ", ".join(map(str, entry.get("batch", []))) or "-"
            licence = (
                "none: seeded numbers" if kind == "synthetic" else LICENCES.get(entry["family"], ("", "unknown"))[1]
            )
            rows.append((path.stem, *shapes, batches, str(entry.get("trained_on", "-")), words or "-", licence))
    made = make_table(rows) if rows[1:] else make_missing_note("What each model takes", "make repository")
    return make_heading("Model card", kind) + "".join(f"<p>{escape(line)}</p>" for line in lines) + made


def read_verdict(repository: str) -> Any:
    """Return the verdict if it is about exactly the published files, else None."""
    verdict = read_json("build/checks/verdict.json")
    fits = verdict and all(known_digest(f"{repository}/{path}") == sha for path, sha in verdict["files"].items())
    return verdict if fits else None


def show_figures(repository: str, kind: str) -> str:
    """Return the most important numbers, as tiles."""
    verdict, measured = read_verdict(repository), read_json("build/fidelity.json")
    files = [path for path in Path(repository).rglob("*") if path.is_file() and path.name != ".gitkeep"]
    shown = [
        (kind or "none", "weights"),
        (f"{sum(path.stat().st_size for path in files) / 1e6:.0f} MB", f"{len(files)} published files"),
    ]
    if verdict:
        ready = sum(model["state"] == "READY" for model in verdict["models"].values())
        shown.append((f"{ready} of {len(verdict['models'])}", f"models READY, {verdict['server']}"))
        worst = max(model["relative"] for model in verdict["models"].values())
        shown.append((f"{worst:.1e}", "of the scale: largest difference served"))
    if hops := [hop for hop in (measured or {}).get("hops", []) if "probabilities" in hop]:
        scores = [score for hop in hops for score in hop["probabilities"].values()]
        shown.append((f"{sum(len(score['changed']) for score in scores)}", "decisions changed by a hop"))
        shown.append((f"{max(score['max'] for score in scores):.1e}", "largest change of a probability by a hop"))
    return (
        '<div class="figures">' + "".join(f"<div><b>{a}</b><span>{escape(b)}</span></div>" for a, b in shown) + "</div>"
    )


def show_models(repository: str, kind: str) -> str:
    """Return Triton's verdict per model, and the comparison of each ONNX file with PyTorch."""
    parts = [make_heading("Models", kind)]
    if verdict := read_verdict(repository):
        parts.append(
            f"<p>{escape(verdict['server'])} loaded each model strictly. Then each got, over gRPC, the input that "
            f"PyTorch had answered before.{remark_staleness('build/checks/verdict.json', 'make repository')}</p>"
        )
        rows = [("model", "state", "difference from PyTorch", "near ties explained", "time of an answer")]
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
        parts.append(make_table(rows, good={"READY"}))
    else:
        parts.append(make_missing_note("Triton's verdict", "make repository"))
    checks: list[tuple[str, ...]] = [("ONNX file", "difference", "allowed", "batches", "codes flipped", "near ties")]
    for path in sorted(Path("build/checks").glob("*.json")):
        check = read_json(str(path)) or {}
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
        parts.append(make_table(checks))
        parts.append(
            '<p class="note">Each file is compared with PyTorch, an fp16 file with its fp32 file. Differences are '
            "relative to the largest output.</p>"
        )
    return "\n".join(parts)


def show_pipeline(repository: str, steps: dict[str, Step]) -> str:
    """Return the graph that `make graph` draws, and how many steps are current."""
    current = sum(step.state in (FRESH, LOCAL) for step in steps.values())
    drawn = draw_pipeline(steps, repository)
    caption = f"{current} of {len(steps)} artifacts are current. Each box names the script that makes it."
    return f'{make_heading("Pipeline")}<figure class="graph wide">{drawn}<figcaption>{caption}</figcaption></figure>'


def show_sources(repository: str, steps: dict[str, Step]) -> str:
    """Return each published file with its origin, as in `make provenance`, and the versions of the tools."""
    title = make_heading("Made of")
    try:
        traced = trace_repository(repository, steps)
    except SystemExit as reason:
        return title + make_missing_note("What the published files were made from", "make repository", str(reason))
    rows = [("published file", "size", "sha256", "made by", "made from")]
    for file, entry in traced["published"].items():
        made = traced["made"].get(entry["copy_of"])
        script = find_script(made["command"]) if made else "copied"
        inputs = [name for name in made["inputs"] if not name.endswith(".py")] if made else [entry["copy_of"]]
        marked = [
            name + (" (yours)" if traced["origin"].get(name, {}).get("kind") == "local" else "") for name in inputs
        ]
        rows.append((file, format_size(entry["copy_of"]), entry["sha256"][:12], script, ", ".join(marked)))
    versions = sorted({pair for made in traced["made"].values() for pair in made["versions"].items()})
    took = [("artifact", "time", "peak memory of a process")]
    for name in traced["made"]:
        cost = json.loads(read_text(record_path("took", name)) or "{}")
        if cost.get("seconds", 0) >= 1:
            took.append((name, f"{cost['seconds']:.1f} s", f"{cost['peak_mb']} MB"))
    origin = ", ".join(
        f"{name} ({entry['kind']})" for name, entry in traced["origin"].items() if entry["kind"] != "source"
    )
    parts = [title, make_table(rows)]
    parts.append(f"<p>Weights: {escape(traced['weights'])}{escape(f'; {origin}' if origin else '')}. Made with ")
    parts.append(", ".join(f"{escape(name)}&nbsp;{escape(version)}" for name, version in versions) + ".</p>")
    parts += ["<h3>Time and memory of the steps</h3>", make_table(took)] if took[1:] else []
    return "\n".join(parts)


def find_script(command: str) -> str:
    """Return the module that a command runs with -m, without its room, else the program."""
    words = command.split()
    return words[words.index("-m") + 1].rpartition(".")[2] if "-m" in words else words[0]


def main(repository: str, out: str) -> None:
    page = make_report(repository, judge_steps(ask_make("repository"), repository))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    draft = Path(f"{out}.part")
    draft.write_text(page)
    draft.replace(out)
    print_text(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
