"""Make a seeded checkpoint in place of a real one: python -m scripts.convert.synthesize ENTRY.json OUT"""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import torch

NETWORKS = {"vit": "convertation.vit.ctvit", "head": "convertation.head.mlp", "bpr": "convertation.bpr.vgg"}
SETTINGS = "inference-settings.json"


def synthesize_checkpoint(entry: dict[str, Any], out: Path) -> None:
    """Write the checkpoint of `entry`: keys, shapes and types of the real file, the same bytes every time.

    For BPR and an `out` named inference-settings.json, write these instead.
    """
    network = importlib.import_module(NETWORKS[entry["family"]])
    if out.name == SETTINGS:
        out.write_text(json.dumps(network.make_synthetic_settings(entry), indent=1, sort_keys=True) + "\n")
        return
    with out.open("wb") as file:  # an open file has no name, so none gets into the archive
        torch.save(network.make_synthetic_state_dict(entry), file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("entry", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    synthesize_checkpoint(json.loads(given.entry.read_text()), given.out)


if __name__ == "__main__":
    main()
