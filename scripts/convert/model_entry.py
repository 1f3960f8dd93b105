"""Read models.yaml: one model's part as JSON, or what make has to know of all of them.

python -m scripts.convert.model_entry MODELS.yaml vit model OUT       how it is built: everything but the tolerance
python -m scripts.convert.model_entry MODELS.yaml vit tolerance OUT   how far it may differ; vit.tf32: in TF32
python -m scripts.convert.model_entry facts MODELS.yaml OUT           make variables, such as `vit.family := vit`
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

FAMILIES = ("vit", "head", "bpr")
SINGLE = ("vit", "bpr")  # families of one model, which bears the family's name
ACTIVATIONS = ("relu", "leaky_relu", "gelu")
NETWORK_OF = {"vit": "vit.ctvit", "head": "head.mlp", "bpr": "bpr.vgg"}  # its module in convertation/
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
PRECISIONS = {"tf32": ("gpu",), "fp16": ("output", "served", "gpu", "cosine", "probability")}  # what each has to say
TOLERANCES: dict[str, type] = LIMITS | dict.fromkeys(PRECISIONS, dict)
MAY_MISS = {"optional", "state_dict", "trained_on", "activation", "gpu", "cosine", "probability", *PRECISIONS}
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")  # of a model: folder, file, make variable, Triton model
CHECKPOINT = re.compile(r"(?:[\w.+@/-]|\{VIT\})+")  # what make and the shell take as it stands
TEXT = "tag:yaml.org,2002:str"
DEEPEST = 8

Entry = dict[str, Any]
Place = tuple[str, ...]  # keys from the top: ("vit", "network", "patch")


class Reader(yaml.SafeLoader):
    """Takes `1e-5` for the number that it is, where YAML 1.1 asks for `1.0e-5`."""


Reader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(?:\.[\d_]*)?[eE][-+]?\d+"), list("-+0123456789")
)


class EntryError(Exception):
    """What is wrong with models.yaml, and the place in it."""

    def __init__(self, place: Place, sentence: str) -> None:
        super().__init__(sentence)
        self.place = place


def read_models(path: Path) -> dict[str, Entry]:
    """Return every entry of models.yaml by its model's name, in the order of the file.

    Raises SystemExit, with the line, if that is no YAML, has a key twice, an unknown key, lacks one, or has a value of
    another type or one that another value contradicts.
    """
    try:
        loader = Reader(path.read_bytes())
        node = loader.get_single_node()
        lines: dict[Place, int] = {}
        if node is not None:
            note_lines(node, (), lines)
        models = loader.construct_document(node) if node is not None else None
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; it describes the models, git checkout {path}") from None
    except EntryError as mistake:
        raise SystemExit(f"{path}: {mistake} (line {lines[mistake.place]})") from None
    except yaml.YAMLError as error:
        raise SystemExit(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # of values such as 2001-99-99 or `!!int x`
        raise SystemExit(f"{path}: no valid YAML: a value is not what it says it is ({error})") from None
    if not isinstance(models, dict):
        raise SystemExit(f"{path}: expected one entry per model, such as `vit:`")
    try:
        for model, entry in models.items():
            check_entry(model, entry)
        check_together(models)
    except EntryError as mistake:
        place = mistake.place
        while place and place not in lines:  # a merged key (<<) stands elsewhere
            place = place[:-1]
        raise SystemExit(f"{path}: {mistake}" + (f" (line {lines[place]})" if place else "")) from None
    return models


def model_entry(path: Path, name: str) -> Entry:
    """Return the entry `name` of models.yaml, with its name in it, also of vit.tf32; errors as in `read_models`."""
    models, name = read_models(path), name.partition(".")[0]
    if name not in models:
        raise SystemExit(f"{path}: has no model {name}; it describes {', '.join(models)}")
    return {"name": name, **models[name]}


def read_tolerance(path: Path, name: str) -> dict[str, float]:
    """Return how far `vit` may differ, or `vit.tf32`, the model in that precision; errors as in `read_models`."""
    model, _, precision = name.partition(".")
    limits: dict[str, Any] = model_entry(path, model)["tolerance"]
    if precision and precision not in limits:
        raise SystemExit(f"{path}: {model}: tolerance: {precision} missing, so there is no {name}")
    return {key: value for key, value in (limits | limits.get(precision, {})).items() if key in LIMITS}


def list_facts(models: dict[str, Entry]) -> str:
    """Return what make has to know of the models, as variables: `all_models`, and `MODEL.FACT` where there is one."""
    lines = [f"all_models := {' '.join(models)}"]
    for name, entry in models.items():
        told = {
            "family": entry["family"],
            "checkpoint": entry["checkpoint"].replace("{VIT}", "$(VIT)"),
            "trained_on": entry.get("trained_on", ""),
            "optional": "1" if entry.get("optional") else "",
            "variants": "1" if PRECISIONS.keys() & entry["tolerance"] else "",
        }
        lines += [f"{name}.{fact} := {value}" for fact, value in told.items() if value]
    return "\n".join([*lines, ""])


def list_needs(models: dict[str, Entry]) -> str:
    """Return rules without commands: what the files of a model are made of that its name alone does not tell make."""
    lines = []
    for name, entry in models.items():
        network = f"$(call code,convertation.{NETWORK_OF[entry['family']]})"
        varied = PRECISIONS.keys() & entry["tolerance"]
        lines += [f"ifneq ($(filter {name},$(WITH)),)"] if entry.get("optional") else []
        whole = (name, *([f"{name}.tf32"] if varied else ()))
        files = [f"build/{file}" for one in whole for file in (f"onnx/{one}.onnx", f"checks/{one}.json")]
        lines += [f"{' '.join(files)}: $(weights)/$({name}.checkpoint)"]
        lines += [f"build/synthetic/$({name}.checkpoint): build/models/{name}.json {network}"]
        if entry["family"] == "bpr":
            lines += [f"build/synthetic/bpr/inference-settings.json: build/models/{name}.json {network}"]
        else:
            for one in (name, *(f"{name}.{precision}" for precision in sorted(varied))):
                plan = f"$(folders:%=build/plan/%/{one}"
                shared = f"build/models/{one}.json build/models/{one}.tolerance.json"
                lines += [
                    f"{plan}.plan): build/plan/{one}.request.json | build/onnx/{one}.onnx",
                    f"$(filter %/{one}.plan,$(taken)): build/models/{one}.tolerance.json",
                    f"{plan}.check.json): build/plan/{one}.expected.npy {shared} build/checks/{one}.json",
                ]
        lines += ["endif"] if entry.get("optional") else []
    return "\n".join([*lines, ""])


def note_lines(node: yaml.Node, place: Place, lines: dict[Place, int]) -> None:
    """Note the line of every key below `place`; raise EntryError for one that is there twice or can name no model."""
    if len(place) > DEEPEST:
        raise EntryError(place[:1], f"{place[0]}: nested too deep; expected an entry as the others are")
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        twice = (below := (*place, str(key.value))) in lines and key.value != "<<"
        lines[below] = key.start_mark.line + 1
        if twice:
            raise EntryError(below, f"{': '.join(below)} is there twice")
        if not place and key.value != "<<" and (key.tag != TEXT or not NAME.fullmatch(key.value)):
            quotes = ", in quotes where YAML has another meaning for it" if key.tag != TEXT else ""
            sentence = f"{key.value!r} is no name for a model; expected a letter, then letters, digits, _ or -{quotes}"
            raise EntryError(below, sentence)
        note_lines(value, below, lines)


def check_entry(model: str, entry: Any) -> None:
    """Raise EntryError unless `entry` has just the keys and types that are expected, and is of a piece."""
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
            f"{model}: tolerance: expected shares of the scale, from 0 to below 1; found {limits}",
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
    """Raise EntryError unless a ViT says of tf32 and fp16 what each needs, or of neither, and no other model does."""
    for precision in (found := [key for key in PRECISIONS if key in limits]):
        if family != "vit":
            raise EntryError(
                (model, "tolerance", precision),
                f"{model}: tolerance: {precision} is of a vit alone; expected none, a {family} stays fp32",
            )
        check_keys((model, "tolerance", precision), limits[precision], LIMITS, needed=PRECISIONS[precision])
    if missing := [key for key in PRECISIONS if found and key not in found]:
        raise EntryError(
            (model, "tolerance"),
            f"{model}: tolerance: {missing[0]} missing; expected tf32 and fp16, or neither",
        )


def check_keys(place: Place, found: Any, expected: dict[str, type], needed: Sequence[str] | None = None) -> None:
    """Raise EntryError unless `found` is a mapping of just the `expected` keys to values of their types.

    `needed`: those that it must have; unsaid, all that no entry may miss.
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
    """Raise EntryError unless the volume is made of whole patches and the output is a vector."""
    patch, shape = entry["network"]["patch"], entry["input"]
    if len(patch) != 3 or len(shape) != 4 or any(size % part for size, part in zip(shape[1:], patch, strict=True)):
        raise EntryError(
            (model, "input"),
            f"{model}: input is {entry['input']}; expected [1, frames, height, width] in whole patches of {patch}",
        )
    if len(entry["output"]) != 1:
        raise EntryError((model, "output"), f"{model}: output is {entry['output']}; expected one number")


def check_head(model: str, entry: Entry) -> None:
    """Raise EntryError unless input and output are the ends of `sizes`, and hidden sizes have an activation."""
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
            f"{model}: network: activation is missing, which {sizes[1:-1]} hidden sizes need; "
            f"expected one of {', '.join(ACTIVATIONS)}, as the head was trained: the checkpoint does not tell",
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise EntryError(
            (model, "network", "activation"),
            f"{model}: network: activation {activation}; expected one of {', '.join(ACTIVATIONS)}",
        )


def check_bpr(model: str, entry: Entry) -> None:
    """Raise EntryError unless the input is a square slice that five pools halve, and the output one score."""
    side = entry["input"][-1:] or [0]
    if entry["input"] != [1, *side, *side] or side[0] % 32 or entry["output"] or entry["network"]["channels"] < 2:
        raise EntryError(
            (model, "input"),
            f"{model}: expected input [1, side, side], side a multiple of 32, output [] and 2 or more channels; found "
            f"{entry['input']}, {entry['output']} and {entry['network']['channels']}",
        )


CHECKS = {"vit": check_vit, "head": check_head, "bpr": check_bpr}


def check_together(models: dict[str, Entry]) -> None:
    """Raise EntryError unless there is a ViT and a BPR, and each model has a checkpoint of its own."""
    if missing := [family for family in SINGLE if family not in models]:
        raise EntryError((), f"{missing[0]} is missing; the repository is made of a ViT, its heads and bpr")
    owner: dict[str, str] = {"bpr/inference-settings.json": "bpr"}
    for model, entry in models.items():
        if (other := owner.setdefault(entry["checkpoint"], model)) != model:
            raise EntryError(
                (model, "checkpoint"),
                f"{model}: {entry['checkpoint']} is the checkpoint of {other}; expected one of its own",
            )


def is_inside(path: str) -> bool:
    """Tell whether this is the one spelling of a path below where it starts from."""
    return str(PurePosixPath(path)) == path and path != "." and path[0] != "/" and ".." not in path.split("/")


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    if words[:1] == ["facts"]:
        parser.add_argument("out", type=Path)
        args = parser.parse_args(words[1:])
        read = args.models.read_bytes()
        models = read_models(args.models)
        if args.models.read_bytes() != read or not hashlib.sha256(read).hexdigest().startswith(args.out.stem):
            raise SystemExit(f"{args.models} changed while it was read; run make again")
        for out, text in ((args.out.with_suffix(".needs.mk"), list_needs(models)), (args.out, list_facts(models))):
            draft = out.with_name(f"{out.name}.{os.getpid()}~")
            draft.write_text(text, encoding="utf-8")
            draft.replace(out)
        return
    parser.add_argument("name")
    parser.add_argument("part", choices=["model", "tolerance"])
    parser.add_argument("out", type=Path)
    args = parser.parse_args(words)
    if args.part == "tolerance":
        content = read_tolerance(args.models, args.name)
    else:
        content = model_entry(args.models, args.name)
        del content["tolerance"]
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
