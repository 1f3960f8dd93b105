"""Read the table of NVIDIA's releases, scripts/serve/releases.yaml. Standard library only.

python3 -sESB -m scripts.serve.releases [RELEASE]        print its known security holes, and the release without them
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).with_name("releases.yaml")


class Release(NamedTuple):
    """One of NVIDIA's releases. `name`: year.month; `driver`: the oldest that works; `opset`, `ir`: ONNX's largest."""

    name: str
    triton: str
    python: str
    cuda: str
    driver: int
    tensorrt: str
    onnxruntime: str
    opset: int
    ir: int

    @property
    def grammar(self) -> tuple[int, int]:
        """The Python version of the release's image, major and minor."""
        major, minor = map(int, self.python.split("."))
        return major, minor


def read_table(path: Path = TABLE) -> dict[str, Any]:
    """Return the table as a YAML reader does. It is mappings, two deep, of JSON values; SystemExit names a bad line."""
    table: dict[str, Any] = {}
    part = table
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = re.fullmatch(r"(  )?\"?([\w.]+)\"?:(?: (.+))?", line)
        try:
            if not found or (found[1] and not found[3]):
                raise ValueError
            if not found[3]:
                part = table[found[2]] = {}
            else:
                (part if found[1] else table)[found[2]] = json.loads(found[3])
        except ValueError:
            raise SystemExit(f"{path}:{number}: {line.strip()}; expected name: and a value in JSON") from None
    return table


def find_release(name: str = "") -> Release:
    """Return the named release, else NGC_RELEASE's. A release that the table lacks gets the usual one's limits."""
    table = read_table()
    name = name or os.environ.get("NGC_RELEASE", "") or table["usual"]
    return Release(name=name, **table[name if name in list_releases(table) else table["usual"]])


def list_releases(table: dict[str, Any]) -> list[str]:
    """Return the releases of a table, the oldest first."""
    return sorted((key for key in table if key not in ("usual", "bulletins")), key=sort_key)


def list_notes(name: str = "") -> list[str]:
    """Return notes on a release, a sentence each: the table lacks it; its security holes, and who mends them."""
    table = read_table()
    name = name or os.environ.get("NGC_RELEASE", "") or table["usual"]
    told = []
    if name not in list_releases(table):
        told.append(
            f"NGC_RELEASE={name} is not in scripts/serve/{TABLE.name}, which knows {', '.join(list_releases(table))}; "
            f"files are checked by the limits of {table['usual']}"
        )
    if not sort_key(name):
        return told
    bulletins = [entry for entry in table["bulletins"].values() if sort_key(name) < sort_key(entry["mended"])]
    if bulletins:
        dates = sorted(entry["date"] for entry in bulletins)
        mended = max((entry["mended"] for entry in bulletins), key=sort_key)
        known = [key for key in list_releases(table) if sort_key(key) >= sort_key(mended)]
        told.append(
            f"Triton {name} has {sum(entry['holes'] for entry in bulletins)} known security holes, the worst rated "
            f"{max(entry['worst'] for entry in bulletins)} of 10 (NVIDIA's bulletins, {dates[0]} to {dates[-1]}); "
            f"{mended} mends them{f': NGC_RELEASE={known[0]}' if known else ''}"
        )
    return told


def sort_key(name: str) -> tuple[int, ...]:
    """Return the numbers that releases are sorted by, () if the name is no year.month."""
    return tuple(map(int, name.split("."))) if re.fullmatch(r"\d\d\.\d\d", name) else ()


if __name__ == "__main__":
    print("\n".join(list_notes(*sys.argv[1:2])) or "no known security holes")
