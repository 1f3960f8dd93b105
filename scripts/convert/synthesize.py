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
    """Write the checkpoint of `entry`, with the keys, shapes and types of the real file, and the same bytes every time.

    If `out` is named inference-settings.json (BPR), write the settings instead.
    """
    network = importlib.import_module(NETWORKS[entry["family"]])
    if out.name == SETTINGS:
        out.write_text(json.dumps(network.make_synthetic_settings(entry), indent=1, sort_keys=True) + "\n")
        return
    with out.open("wb") as file:  # given a path, torch would store its name in the file
        torch.save(network.make_synthetic_state_dict(entry), file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("entry", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    synthesize_checkpoint(json.loads(given.entry.read_text()), given.out)


if __name__ == "__main__":
    main()
