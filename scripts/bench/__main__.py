"""Measure what the README promises and print each value beside its goal; exit status 1 if a figure misses its goal.

    python -m scripts.bench [--only GROUP,...] [--rounds 3] [--keep] [--compare OLD.json] build/bench.json

The models are built in a copy of the project, build/bench/tree, at the size that convertation/models.yaml says.  All
figures are medians; times are compared within one run only, because machines differ.  GROUP is one of

    cold     make repository WEIGHTS=synthetic in a new copy
    noop     make with nothing to do, with all files touched, after a clone, after one head changed; disk use
    vit      load, memory and run of the ViT, compared with a straight export
    export   the export step, compared with a straight export
    heads    runs of the heads
    fp16     the ViT rounded to fp16; where there is a GPU, its runs compared with fp32
    bpr      one series through bpr_model
    infer    make infer: seconds of each stage, studies per minute, memory; a volume sent to a Triton
    cache    a shared cache folder, cold and warm
    fetch    a download of 1 GiB from a server on this machine
    unpack   unpacking, compared with unzip
"""

import argparse
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from scripts.bench import cache as bench_cache
from scripts.bench import compare as bench_compare
from scripts.bench import fetch as bench_fetch
from scripts.bench import infer as bench_infer
from scripts.bench import models as bench_models
from scripts.bench import pipeline as bench_pipeline
from scripts.bench.measure import BENCH, Row, Tree, watch_others

Group = Callable[[Tree, int], list[Row]]
GROUPS: Mapping[str, Group] = {
    "cold": bench_pipeline.bench_cold,
    "noop": bench_pipeline.bench_noop,
    "vit": bench_models.bench_vit,
    "export": bench_models.bench_export,
    "heads": bench_models.bench_heads,
    "fp16": bench_models.bench_fp16,
    "bpr": bench_models.bench_bpr,
    "infer": bench_infer.bench_infer,
    "cache": bench_cache.bench_cache,
    "fetch": bench_fetch.bench_fetch,
    "unpack": bench_fetch.bench_unpack,
}
DISTURBED = 0.25  # cores that other programs keep busy; above it a line warns that the times are less exact


def run_groups(groups: Mapping[str, Group], rounds: int, out: Path) -> list[Row]:
    """Run the groups in turn, print their rows, write all rows to `out`; return the rows that miss their goals."""
    machine = {"cores": os.cpu_count(), "processor": read_processor_name(), "python": platform.python_version()}
    tree, rows = Tree(), list[Row]()
    busy: dict[str, float] = {}
    for name, group in groups.items():
        print(f"{name}:", flush=True)
        with watch_others() as found:
            rows_here = group(tree, rounds)
        busy[name] = round(found[0], 2)
        for row in rows_here:
            row.group = name
        rows += rows_here
        print("\n".join(format_table(rows_here)), flush=True)
        if busy[name] > DISTURBED:
            print(f"  disturbed: other programs kept {busy[name]:.1f} of {os.cpu_count()} cores busy", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        described = [asdict(row) | {"verdict": row.verdict} for row in rows]
        text = json.dumps({"machine": machine, "others_cores": busy, "rows": described}, indent=1, ensure_ascii=False)
        out.write_text(text + "\n")
    return [row for row in rows if row.verdict == "MISS"]


def format_table(rows: list[Row]) -> list[str]:
    """Return the rows as aligned lines: figure, value, goal, verdict, note."""
    cells = [
        (
            row.what,
            "-" if row.value is None else f"{format_number(row.value)} {row.unit}".strip(),
            "" if row.goal is None else f"{row.relation} {format_number(row.goal)} {row.unit}".strip(),
            row.verdict,
            row.note,
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    ]


def format_number(value: float) -> str:
    """Return a number with three significant digits: 0.0833, 2.5, 300."""
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def read_processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GROUPS), metavar="GROUP,...", help="run these groups alone")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="how many times each measurement is repeated"
    )
    parser.add_argument("--keep", action="store_true", help="keep the copy and the archive for the next run")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="say at the end what moved since this run")
    parser.add_argument("out", type=Path, metavar="OUT.json")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(GROUPS):
        raise SystemExit(f"--only {','.join(sorted(unknown))}: expected some of {','.join(GROUPS)}")
    if options.rounds < 1:
        raise SystemExit(f"--rounds {options.rounds}: expected 1 or more")
    old = bench_compare.read_results(options.compare) if options.compare else None  # read now: it may be OUT itself
    chosen = {name: group for name, group in GROUPS.items() if name in options.only.split(",")}
    try:
        missed = run_groups(chosen, options.rounds, options.out)
    finally:
        if not options.keep:
            for name in ("tree", "straight", "fetch", "exported.onnx", "vit.fp16.onnx"):
                path = BENCH / name
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    if old:
        print("\n".join(bench_compare.compare_runs(old, bench_compare.read_results(options.out))), flush=True)
    if missed:
        names = "\n".join(f"  {row.group}: {row.what}" for row in missed)
        raise SystemExit(f"{len(missed)} figures miss their goals (all figures are in {options.out}):\n{names}")


if __name__ == "__main__":
    main()
