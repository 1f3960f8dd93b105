"""Read models.yaml. Write one model's entry as JSON, or what make needs to know about all models.

python -m scripts.convert.model_entry MODELS.yaml vit model OUT       how to build it: everything but the tolerance
python -m scripts.convert.model_entry MODELS.yaml vit tolerance OUT   how far it may differ; vit.tf32: in TF32
python -m scripts.convert.model_entry facts MODELS.yaml OUT           make variables, such as `vit.family := vit`,
                                                                      and beside OUT a .needs.mk with make rules
"""

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from scripts.convert.model_rules import LIMITS, PRECISIONS, Entry, EntryError, Place, check_entry, check_together

NETWORK_OF = {"vit": "vit.ctvit", "head": "head.mlp", "bpr": "bpr.vgg"}  # its module in convertation/
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")  # a model's name is also a folder, a file, a make variable, a Triton model
TEXT = "tag:yaml.org,2002:str"
DEEPEST = 8  # levels of nesting; valid entries have three


class Reader(yaml.SafeLoader):
    """Reads `1e-5` as a number too: YAML 1.1 takes only `1.0e-5` for one."""


Reader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(?:\.[\d_]*)?[eE][-+]?\d+"), list("-+0123456789")
)


def read_models(path: Path) -> dict[str, Entry]:
    """Return every entry of models.yaml by its model's name, in the order of the file.

    Raises SystemExit, with the line, if the file is not YAML, if a key is repeated, unknown or missing, if a value has
    the wrong type, or if two values contradict each other.
    """
    try:
        loader = Reader(path.read_bytes())
        node = loader.get_single_node()
        lines: dict[Place, int] = {}
        if node is not None:
            note_lines(node, (), lines)
        models = loader.construct_document(node) if node is not None else None
    except OSError as error:
        raise SystemExit(
            f"{path}: {error.strerror}; expected the models' description; next: git checkout {path}"
        ) from None
    except EntryError as mistake:
        raise SystemExit(f"{path}: {mistake} (line {lines[mistake.place]})") from None
    except yaml.YAMLError as error:
        raise SystemExit(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # from values such as 2001-99-99 or `!!int x`
        raise SystemExit(f"{path}: no valid YAML: a value does not fit its type ({error})") from None
    if not isinstance(models, dict):
        raise SystemExit(f"{path}: expected one entry per model, such as `vit:`")
    try:
        for model, entry in models.items():
            check_entry(model, entry)
        check_together(models)
    except EntryError as mistake:
        place = mistake.place
        while place and place not in lines:  # the line of a merged key (<<) is not noted under this place
            place = place[:-1]
        raise SystemExit(f"{path}: {mistake}" + (f" (line {lines[place]})" if place else "")) from None
    return models


def read_entry(path: Path, name: str) -> Entry:
    """Return the entry of model `name` with its name added; vit.tf32 gives the entry of vit.

    Raises SystemExit if there is no such model, and as `read_models` does.
    """
    models, name = read_models(path), name.partition(".")[0]
    if name not in models:
        raise SystemExit(f"{path}: has no model {name}; expected one of {', '.join(models)}")
    return {"name": name, **models[name]}


def read_tolerance(path: Path, name: str) -> dict[str, float]:
    """Return the limits of `vit`, or of `vit.tf32`: the same model in that precision.

    Raises SystemExit if the model has no such precision, and as `read_entry` does.
    """
    model, _, precision = name.partition(".")
    limits: dict[str, Any] = read_entry(path, model)["tolerance"]
    if precision and precision not in limits:
        raise SystemExit(f"{path}: {model}: tolerance: {precision} missing, so there is no {name}")
    return {key: value for key, value in (limits | limits.get(precision, {})).items() if key in LIMITS}


def list_facts(models: dict[str, Entry]) -> str:
    """Return make variables about the models: `all_models`, and `MODEL.FACT` for each fact that is not empty."""
    lines = [f"all_models := {' '.join(models)}"]
    for name, entry in models.items():
        facts = {
            "family": entry["family"],
            "checkpoint": entry["checkpoint"].replace("{VIT}", "$(VIT)"),
            "trained_on": entry.get("trained_on", ""),
            "optional": "1" if entry.get("optional") else "",
            "variants": "1" if PRECISIONS.keys() & entry["tolerance"] else "",
        }
        lines += [f"{name}.{fact} := {value}" for fact, value in facts.items() if value]
    return "\n".join([*lines, ""])


def list_needs(models: dict[str, Entry]) -> str:
    """Return make rules without commands: inputs of each model's files that make cannot tell from the model's name."""
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
    """Note the line of every key below `place`. Raise EntryError for a repeated key or a bad name of a model."""
    if len(place) > DEEPEST:
        raise EntryError(place[:1], f"{place[0]}: nested too deep; expected an entry like the others")
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        twice = (below := (*place, str(key.value))) in lines and key.value != "<<"
        lines[below] = key.start_mark.line + 1
        if twice:
            raise EntryError(below, f"{': '.join(below)} is there twice; expected it once")
        if not place and key.value != "<<" and (key.tag != TEXT or not NAME.fullmatch(key.value)):
            quotes = ", in quotes if YAML gives the word another meaning" if key.tag != TEXT else ""
            sentence = f"{key.value!r} cannot name a model; expected a letter, then letters, digits, _ or -{quotes}"
            raise EntryError(below, sentence)
        note_lines(value, below, lines)


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
        content = read_entry(args.models, args.name)
        del content["tolerance"]
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
