"""Print what the present run made and what it reused. Standard library only.

    python3 -sES -m scripts.steps.summary build/onnx/vit.onnx...

Each ONNX file and each plan gets a row; the other artifacts are only counted.
"""

import json
import os
import sys

from scripts.steps.printing import print_text
from scripts.steps.records import known_digest, read_inputs, read_status, read_text, record_path, written_digest


def summarise(roots: list[str]) -> list[str]:
    """Return the lines of the table about `roots` and every artifact that they were made from."""
    artifacts = sorted(list_reached(roots))
    took = {path: json.loads(read_text(record_path("took", path)) or "{}") for path in artifacts}
    recent = [path for path in artifacts if took[path].get("run") == os.environ.get("MAKE_RUN")]
    cached = [path for path in recent if "read" in took[path]]
    rebuilt = [path for path in recent if path not in cached]
    rows = [("artifact", "made from", "size", "sha256", "difference", "time", "")]
    for path in artifacts:
        if path.startswith("build/plan/") and path.endswith(".plan"):
            source, check = os.path.basename(next(iter(read_inputs(path)))), path.removesuffix(".plan") + ".check.json"
        elif path.startswith("build/onnx/"):
            checkpoint = find_source(path)
            own = checkpoint not in artifacts or known_digest(checkpoint) != written_digest(checkpoint)
            source = os.path.basename(checkpoint) + (" (local)" if own else "")
            check = f"build/checks/{os.path.basename(path).removesuffix('.onnx')}.json"
        else:
            continue
        result = json.loads(read_text(check) or "{}")
        rows.append(
            (
                path,
                source,
                format_size(path),
                known_digest(path)[:12],
                f"{result['difference']:.1e}" if result else "in tolerance",
                f"{took[path].get('seconds', 0):.1f} s",
                "rebuilt" if path in rebuilt else "cached" if path in cached else "reused",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    seconds = sum(took[path]["seconds"] for path in rebuilt)
    peak = max((took[path]["peak_mb"] for path in rebuilt), default=0)
    lines.append(
        f"{len(rebuilt)} steps rebuilt, {len(artifacts) - len(recent)} reused; {seconds:.0f} s of work, peak {peak} MB"
    )
    if cache := os.environ.get("CACHE"):
        taken, put = (sum(took[path].get(way, 0) / 1e6 for path in recent) for way in ("read", "stored"))
        lines.append(f"cache {cache}: {len(cached)} hits, {taken:.1f} MB taken, {put:.1f} MB put there")
    return lines


def list_reached(roots: list[str]) -> set[str]:
    """Return `roots` and every artifact (a file with a record) that they were made from."""
    reached: set[str] = set()
    queue = list(roots)
    while queue:
        path = queue.pop()
        if path not in reached and os.path.exists(record_path("made", path)):
            reached.add(path)
            queue += read_inputs(path)
    return reached


def find_source(path: str) -> str:
    """Return the checkpoint or the other ONNX file that an ONNX file was made from."""
    inputs, tops = list(read_inputs(path)), ("training/", "build/synthetic/", "build/onnx/")
    return next((name for name in inputs if name.startswith(tops)), inputs[0])


def format_size(path: str) -> str:
    """Return the size of an artifact in kB or MB; it may have been moved to the published folder."""
    stat = read_status(path)
    sha = known_digest(path)
    for name in () if stat else os.listdir(".make/seen"):
        words = read_text(f".make/seen/{name}").split()
        if words[:1] == [sha] and len(words) > 1:
            stat = words[1:]
    number = int(stat[0]) if stat else 0
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"


if __name__ == "__main__":
    print_text("\n".join(["", *summarise(sys.argv[1:])]))
