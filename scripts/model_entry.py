"""Write one model's part of models.yaml as JSON: how it is built, or how far it may differ.

python -m scripts.model_entry convertation/models.yaml vit model OUT       everything but the tolerance
python -m scripts.model_entry convertation/models.yaml vit tolerance OUT   the tolerance alone
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

FAMILIES = ("vit", "head", "bpr")
ACTIVATIONS = ("gelu", "leaky_relu", "relu")
NETWORKS: dict[str, dict[str, type]] = {
    "vit": {
        "dim": int,
        "heads": int,
        "dim_head": int,
        "spatial_depth": int,
        "temporal_depth": int,
        "patch": list,
        "codebook": int,
    },
    "head": {"sizes": list, "activation": str},
    "bpr": {"channels": int},
}
KEYS: dict[str, type] = {
    "family": str,
    "optional": bool,
    "checkpoint": str,
    "trained_on": str,
    "network": dict,
    "input": list,
    "output": list,
    "batch": list,
    "tolerance": dict,
}
TOLERANCES: dict[str, type] = dict.fromkeys(("output", "served", "fp16", "gpu", "cosine", "probability"), float)
MAY_MISS = {"optional", "trained_on", "activation", "fp16", "gpu", "cosine", "probability"}


class Reader(yaml.SafeLoader):
    """Refuses a key that is there twice, where YAML's own reader takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]} is there twice")
        return super().construct_mapping(node, deep)


def model_entry(path: Path, name: str) -> dict[str, Any]:
    """Return the entry `name` of models.yaml, with its name in it.

    Raises SystemExit if any entry of the file has an unknown key, lacks one, or has a value of another type.
    """
    try:
        models = yaml.load(path.read_text(), Reader)
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; it describes the models, git checkout {path}") from None
    except yaml.YAMLError as error:
        raise SystemExit(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(models, dict):
        raise SystemExit(f"{path}: expected one entry per model, such as `vit:`")
    for model, entry in models.items():
        check_entry(f"{path}: {model}", entry)
    if name not in models:
        raise SystemExit(f"{path}: has no model {name}; it describes {', '.join(models)}")
    return {"name": name, **models[name]}


def check_entry(where: str, entry: Any) -> None:
    """Raise SystemExit, beginning with `where`, unless `entry` has just the keys and types that are expected."""
    check_keys(where, entry, KEYS)
    if entry["family"] not in FAMILIES:
        raise SystemExit(f"{where}: unknown family {entry['family']}; expected one of {', '.join(FAMILIES)}")
    check_keys(f"{where}: network", entry["network"], NETWORKS[entry["family"]])
    check_keys(f"{where}: tolerance", entry["tolerance"], TOLERANCES)
    if entry["family"] == "head" and "trained_on" not in entry:
        raise SystemExit(f"{where}: trained_on is missing; name the ViT variant that this head was trained on")
    network, tolerance, checkpoint = entry["network"], entry["tolerance"], Path(entry["checkpoint"])
    if checkpoint.is_absolute() or ".." in checkpoint.parts or " " in entry["checkpoint"]:
        raise SystemExit(f"{where}: checkpoint is {checkpoint}; expected a path in training/weights, without spaces")
    for key in {"sizes", "patch"} & set(network):
        if not all(type(size) is int and size > 0 for size in network[key]):
            raise SystemExit(f"{where}: network: {key} holds whole numbers above 0; found {network[key]}")
    if (activation := network.get("activation", ACTIVATIONS[0])) not in ACTIVATIONS:
        raise SystemExit(f"{where}: network: activation {activation}; expected one of {', '.join(ACTIVATIONS)}")
    if not all(0 <= value < 1 for value in tolerance.values()):
        raise SystemExit(f"{where}: tolerance: expected shares of the scale, from 0 to below 1; found {tolerance}")
    shapes = [*entry["input"], *entry["output"], *entry["batch"]]
    if not all(type(size) is int and size > 0 for size in shapes):
        raise SystemExit(f"{where}: input, output and batch hold whole numbers above 0; found {shapes}")
    if len(entry["batch"]) != 3 or entry["batch"] != sorted(entry["batch"]):
        raise SystemExit(f"{where}: batch is [smallest, usual, largest]; found {entry['batch']}")


def check_keys(where: str, found: Any, expected: dict[str, type]) -> None:
    """Raise SystemExit unless `found` is a mapping of just the `expected` keys to values of their types."""
    if not isinstance(found, dict):
        raise SystemExit(f"{where}: expected the keys {', '.join(expected)}; found {found!r}")
    for key, value in found.items():
        if key not in expected:
            raise SystemExit(f"{where}: unknown key {key}; expected {', '.join(expected)}")
        if type(value) is not expected[key]:
            raise SystemExit(f"{where}: {key} is {value!r}; expected a value of type {expected[key].__name__}")
    if missing := [key for key in expected if key not in found and key not in MAY_MISS]:
        raise SystemExit(f"{where}: {', '.join(missing)} missing")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("name")
    parser.add_argument("part", choices=["model", "tolerance"])
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    entry = model_entry(args.models, args.name)
    tolerance = entry.pop("tolerance")
    args.out.write_text(json.dumps(entry if args.part == "model" else tolerance, indent=1) + "\n")
