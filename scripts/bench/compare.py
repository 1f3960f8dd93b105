"""Say what moved between two benchmarks beyond their noise: python -m scripts.bench.compare OLD.json NEW.json

The noise of a figure is the sum of its spreads in the two runs; a spread is the largest round minus the smallest.  A
figure moved if its medians differ by more than the noise.  The noise of a figure that was measured once is unknown:
such a figure is only shown.
"""

import argparse
import json
from pathlib import Path
from typing import Any

BETTER, WORSE, MOVED, SAME, ONCE = "better", "WORSE", "moved", "within noise", "measured once"
SMALL = 0.001  # share of the value; a smaller change of a figure that was measured once counts as none


def compare_runs(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the lines to print: how the machines differ, then each figure, those that moved first."""
    lines = [
        f"other {what}: {old['machine'][what]}, now {new['machine'][what]}; times of two machines cannot be compared"
        for what in old["machine"]
        if old["machine"][what] != new["machine"].get(what)
    ]
    was = {(row["group"], row["what"]): row for row in old["rows"]}
    now = {(row["group"], row["what"]): row for row in new["rows"]}
    found = [(*judge_figure(was[key], row), key) for key, row in now.items() if key in was]
    order = (WORSE, BETTER, MOVED, ONCE, SAME)
    rows = [
        (f"{group}: {what}", verdict, words)
        for verdict, words, (group, what) in sorted(found, key=lambda one: order.index(one[0]))
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines += [f"{group}: {what}  only in the {side} run" for side, here, there in (("old", was, now), ("new", now, was))
              for group, what in here if (group, what) not in there]  # fmt: skip
    moved = sum(verdict in (BETTER, WORSE, MOVED) for verdict, _, _ in found)
    return [*lines, f"{moved} of {len(found)} figures moved beyond the noise"]


def judge_figure(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, str]:
    """Return how one figure changed (BETTER, WORSE, MOVED, SAME or ONCE) and a text with the numbers."""
    before, after = old["value"], new["value"]
    if before is None or after is None:
        sides = [row["note"] or "not measured" for row in (old, new) if row["value"] is None]
        return ONCE, f"not comparable: {sides[0]}"
    noise = measure_spread(old) + measure_spread(new)
    share = f" ({100 * (after / before - 1):+.0f} %)" if before else ""
    words = f"{before:.3g} → {after:.3g} {new['unit']}".rstrip() + share
    if min(len(old["samples"]), len(new["samples"])) < 2:
        return (ONCE if abs(after - before) > SMALL * abs(before) else SAME), words
    words += f", noise ±{noise:.2g}"
    if abs(after - before) <= noise:
        return SAME, words
    if not new["relation"]:
        return MOVED, words
    return (BETTER if (after < before) == (new["relation"] == "≤") else WORSE), words


def measure_spread(row: dict[str, Any]) -> float:
    """Return the largest minus the smallest of a figure's rounds."""
    return float(max(row["samples"]) - min(row["samples"])) if row["samples"] else 0.0


def read_results(path: Path) -> dict[str, Any]:
    """Read a file that scripts/bench/__main__.py wrote; SystemExit if it is something else."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        for row in found["rows"]:
            row["group"], row["what"], row["value"], row["unit"], row["relation"], row["note"], row["samples"]
        dict(found["machine"])
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; expected an earlier build/bench.json") from None
    except (ValueError, LookupError, TypeError):
        raise SystemExit(f"{path}: not the result of a benchmark; expected an earlier build/bench.json") from None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args()
    print("\n".join(compare_runs(read_results(given.old), read_results(given.new))))


if __name__ == "__main__":
    main()
