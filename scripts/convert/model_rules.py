"""Check the entries of models.yaml: their keys, the types of values, and values that must fit together.

Each check raises EntryError at the first mistake. scripts/convert/model_entry.py reads the file and calls these checks.
"""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

FAMILIES = ("vit", "head", "bpr")
SINGLE = ("vit", "bpr")  # each of these families has one model, with the family's name
ACTIVATIONS = ("relu", "leaky_relu", "gelu")
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
    "state_dict": str,
    "trained_on": str,
    "network": dict,
    "input": list,
    "output": list,
    "batch": list,
    "tolerance": dict,
}
LIMITS: dict[str, type] = dict.fromkeys(("output", "served", "gpu", "cosine", "probability"), float)
PRECISIONS = {
    "tf32": ("gpu",),
    "fp16": ("output", "served", "gpu", "cosine", "probability"),
}  # the limits that each must give
TOLERANCES: dict[str, type] = LIMITS | dict.fromkeys(PRECISIONS, dict)
MAY_MISS = {"optional", "state_dict", "trained_on", "activation", "gpu", "cosine", "probability", *PRECISIONS}
CHECKPOINT = re.compile(r"(?:[\w.+@/-]|\{VIT\})+")  # characters that make and the shell do not interpret

Entry = dict[str, Any]
Place = tuple[str, ...]  # keys from the top: ("vit", "network", "patch")


class EntryError(Exception):
    """A mistake in models.yaml, and its place in the file."""

    def __init__(self, place: Place, sentence: str) -> None:
        super().__init__(sentence)
        self.place = place


def check_entry(model: str, entry: Any) -> None:
    """Raise EntryError unless `entry` has exactly the expected keys and types, and its values fit together."""
    check_keys((model,), entry, KEYS)
    family, network, limits = entry["family"], entry["network"], entry["tolerance"]
    if family not in FAMILIES:
        raise EntryError((model, "family"), f"{model}: unknown family {family}; expected one of {', '.join(FAMILIES)}")
    if model != family and (model in FAMILIES or family in SINGLE):
        raise EntryError((model, "family"), f"{model}: a model of family {family} cannot be called {model}; rename it")
    check_keys((model, "network"), network, NETWORKS[family])
    check_keys((model, "tolerance"), limits, TOLERANCES)
    check_precisions(model, family, limits)
    checkpoint = entry["checkpoint"]
    if not CHECKPOINT.fullmatch(checkpoint) or not is_inside(checkpoint):
        raise EntryError(
            (model, "checkpoint"),
            f"{model}: checkpoint is {checkpoint!r}; expected a path in training/weights, without spaces: "
            "letters, digits, . _ + @ - and {VIT}",
        )
    if family == "head" and "trained_on" not in entry:
        raise EntryError(
            (model,), f"{model}: trained_on is missing; name the ViT variant that this head was trained on"
        )
    if not re.fullmatch(r"\w+", entry.get("trained_on", "LiPro")):
        raise EntryError((model, "trained_on"), f"{model}: trained_on is {entry['trained_on']!r}; expected one word")
    numbers = [values for values in limits.values() if type(values) is float]
    numbers += [value for values in limits.values() if type(values) is dict for value in values.values()]
    if not all(0 <= value < 1 for value in numbers):
        raise EntryError(
            (model, "tolerance"),
            f"{model}: tolerance: expected fractions of the scale, at least 0 and below 1; found {limits}",
        )
    for key in ("input", "output", "batch"):
        if not all(type(size) is int and size > 0 for size in entry[key]):
            shapes = [*entry["input"], *entry["output"], *entry["batch"]]
            raise EntryError(
                (model, key), f"{model}: input, output and batch hold whole numbers above 0; found {shapes}"
            )
    if len(entry["batch"]) != 3 or entry["batch"] != sorted(entry["batch"]):
        raise EntryError((model, "batch"), f"{model}: batch is [smallest, usual, largest]; found {entry['batch']}")
    CHECKS[family](model, entry)


def check_precisions(model: str, family: str, limits: dict[str, Any]) -> None:
    """Raise EntryError unless a ViT gives all limits of tf32 and fp16, or neither precision. No other model may."""
    for precision in (found := [key for key in PRECISIONS if key in limits]):
        if family != "vit":
            raise EntryError(
                (model, "tolerance", precision),
                f"{model}: tolerance: only a vit may have {precision}; expected none, a {family} stays fp32",
            )
        check_keys((model, "tolerance", precision), limits[precision], LIMITS, needed=PRECISIONS[precision])
    if missing := [key for key in PRECISIONS if found and key not in found]:
        raise EntryError(
            (model, "tolerance"),
            f"{model}: tolerance: {missing[0]} missing; expected tf32 and fp16, or neither",
        )


def check_keys(place: Place, found: Any, expected: dict[str, type], needed: Sequence[str] | None = None) -> None:
    """Raise EntryError unless `found` is a mapping with only `expected` keys, each with a value of its type.

    `needed`: the keys that it must have. None: all keys but those of MAY_MISS.
    """
    where = ": ".join(place)
    if not isinstance(found, dict):
        raise EntryError(place, f"{where}: expected the keys {', '.join(expected)}; found {found!r}")
    for key, value in found.items():
        if key not in expected:
            raise EntryError((*place, str(key)), f"{where}: unknown key {key}; expected {', '.join(expected)}")
        if expected[key] is float and type(value) is int:
            found[key] = float(value)
        elif type(value) is not expected[key]:
            kind = expected[key].__name__
            raise EntryError((*place, str(key)), f"{where}: {key} is {value!r}; expected a value of type {kind}")
        if type(value) is int and expected[key] is int and value <= 0:
            raise EntryError((*place, str(key)), f"{where}: {key} is {value}; expected a whole number above 0")
        if key in ("sizes", "patch") and not all(type(size) is int and size > 0 for size in value):
            raise EntryError((*place, str(key)), f"{where}: {key} holds whole numbers above 0; found {value}")
    wanted = [key for key in expected if key not in MAY_MISS] if needed is None else needed
    if missing := [key for key in wanted if key not in found]:
        raise EntryError(place, f"{where}: {', '.join(missing)} missing")


def check_vit(model: str, entry: Entry) -> None:
    """Raise EntryError unless whole patches fill the volume and the output is a vector."""
    patch, shape = entry["network"]["patch"], entry["input"]
    if len(patch) != 3 or len(shape) != 4 or any(size % part for size, part in zip(shape[1:], patch, strict=True)):
        raise EntryError(
            (model, "input"),
            f"{model}: input is {entry['input']}; expected [1, frames, height, width], multiples of the patch {patch}",
        )
    if len(entry["output"]) != 1:
        raise EntryError((model, "output"), f"{model}: output is {entry['output']}; expected one number, as in [512]")


def check_head(model: str, entry: Entry) -> None:
    """Raise EntryError unless input and output are the ends of `sizes`, and hidden layers have an activation."""
    sizes, activation = entry["network"]["sizes"], entry["network"].get("activation")
    if len(sizes) < 2:
        raise EntryError(
            (model, "network", "sizes"), f"{model}: network: sizes is {sizes}; expected [input, …, output]"
        )
    for key, size, end in (("input", sizes[0], "first"), ("output", sizes[-1], "last")):
        if entry[key] != [size]:
            raise EntryError(
                (model, key), f"{model}: {key} is {entry[key]} and the {end} of sizes {size}; expected the same"
            )
    if activation is None and len(sizes) > 2:
        raise EntryError(
            (model, "network"),
            f"{model}: network: activation is missing, and hidden layers of {sizes[1:-1]} need one; expected the one "
            f"that the head was trained with, of {', '.join(ACTIVATIONS)}: the checkpoint does not hold it",
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise EntryError(
            (model, "network", "activation"),
            f"{model}: network: activation {activation}; expected one of {', '.join(ACTIVATIONS)}",
        )


def check_bpr(model: str, entry: Entry) -> None:
    """Raise EntryError unless the input is a square slice that can be halved five times, and the output one score."""
    side = entry["input"][-1:] or [0]
    if entry["input"] != [1, *side, *side] or side[0] % 32 or entry["output"] or entry["network"]["channels"] < 2:
        raise EntryError(
            (model, "input"),
            f"{model}: expected input [1, side, side], side a multiple of 32, output [] and 2 or more channels; found "
            f"{entry['input']}, {entry['output']} and {entry['network']['channels']}",
        )


CHECKS = {"vit": check_vit, "head": check_head, "bpr": check_bpr}


def check_together(models: dict[str, Entry]) -> None:
    """Raise EntryError unless there are a ViT and a BPR, and each model has its own checkpoint."""
    if missing := [family for family in SINGLE if family not in models]:
        raise EntryError((), f"{missing[0]} is missing; expected an entry for vit, each head and bpr")
    owner: dict[str, str] = {"bpr/inference-settings.json": "bpr"}
    for model, entry in models.items():
        if (other := owner.setdefault(entry["checkpoint"], model)) != model:
            raise EntryError(
                (model, "checkpoint"),
                f"{model}: {entry['checkpoint']} is already the checkpoint of {other}; expected another file",
            )


def is_inside(path: str) -> bool:
    """Return whether `path` is relative, in its shortest spelling, and does not leave its folder."""
    return str(PurePosixPath(path)) == path and path != "." and path[0] != "/" and ".." not in path.split("/")
