"""Show build/fidelity.json as a table: python3 -sES -m scripts.show.fidelity_table build/fidelity.json

Standard library only.
"""

import json
import sys
from pathlib import Path
from typing import Any

from scripts.steps.printing import print_text

SYNTHETIC = "SYNTHETIC weights: this shows that the programs work, and says nothing about diagnoses"
HEADER = ("hop", "against", "embedding: max", "99.9 %", "1 - cosine", "codes flipped", "widest margin")


def list_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the header and a row per hop. Differences are relative to the largest value of PyTorch's embeddings."""
    heads = list(found["probabilities"])
    lines = [(*HEADER, *(f"{head} probability" for head in heads), "decisions changed")]
    for hop in found["hops"]:
        words = [hop["hop"], hop["against"]]
        if reason := hop.get("absent") or hop.get("broken"):
            lines.append((*words, reason, *[""] * (len(lines[0]) - 3)))
            continue
        embedding, codes, scores = hop["embedding"], hop["codes"], hop["probabilities"]
        words += [f"{value:.1e}" for value in (embedding["max"], embedding["p999"], hop["cosine_distance"])]
        if codes:
            margin = f"{max(codes['margins']):.1e}" if codes["margins"] else "-"
            words += [f"{codes['flipped']} of {codes['compared']}", margin]
        else:
            ties = hop["near_ties"]
            words += [f"unseen; {ties['explain']} ties leave {ties['remains']:.1e}", "-"]
        words += [f"{scores[head]['max']:.1e}" if head in scores else "-" for head in heads]
        decided = sum(len(row) for score in scores.values() for row in score["values"])
        lines.append((*words, f"{sum(len(score['changed']) for score in scores.values())} of {decided}"))
    return lines


def format_table(found: dict[str, Any]) -> list[str]:
    """Return the table as lines, below a line about the volumes."""
    tissue = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found["tissue"].items())
    about = f"{found['volumes']} seeded volumes ({tissue}); differences are relative to the largest embedding value"
    stamp = [SYNTHETIC] if found["weights"] == "synthetic" else []
    head, *others = list_rows(found)
    whole = [row for row in others if len(row) > 3 and row[3]]
    widths = [max(map(len, column)) for column in zip(head, *whole, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *whole)]
    lines += [f"{row[0]}: {row[2]}" for row in others if row not in whole]
    return [*stamp, about, *lines]


if __name__ == "__main__":
    print_text("\n".join(format_table(json.loads(Path(sys.argv[1]).read_text()))))
