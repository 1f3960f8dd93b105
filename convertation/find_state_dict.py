"""Find the state dict of a network in what a checkpoint holds: under which key, behind which prefix."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convertation.checkpoint_file import join_names

DEEPEST = 3  # levels of dictionaries that are searched
COMPILED = "_orig_mod."  # torch.compile puts this into keys, wherever a module was compiled
COUNTER = "num_batches_tracked"  # of BatchNorm; inference does not use it


@dataclass
class Candidate:
    """A dictionary in a file that may be the network's state dict."""

    path: tuple[str, ...]  # keys of the dictionaries around it
    prefix: str  # stands before each key in the file, and not in the network
    stem: str  # stands before each key in the network, and not in the file
    holds: Mapping[Any, Any]  # the dictionary itself
    keys: dict[str, str]  # key in the network: key in `holds`
    fits: bool  # no key is missing, and every shape is right

    @property
    def name(self) -> str:
        return ".".join([*self.path, *([self.prefix.rstrip(".")] if self.prefix else [])]) or "."


def choose_candidate(checkpoint: Path, found: dict[Any, Any], needed: dict[str, Tensor], state_dict: str) -> Candidate:
    """Return the one state dict in the file that fits the network, or the nearest one if none fits."""
    candidates = list(list_candidates(found, needed))
    fitting = [candidate for candidate in candidates if candidate.fits]
    if state_dict:
        named = [
            candidate
            for candidate in fitting or candidates
            if candidate.name == state_dict or candidate.name.startswith(f"{state_dict}.")
        ]
        if len(named) != 1:
            held = [candidate.name for candidate in fitting] or list(found)
            raise SystemExit(
                f"{checkpoint}: has no state dict {state_dict} of this model, which convertation/models.yaml asks for; "
                f"it holds {join_names(held)}"
            )
        return named[0]
    if len(fitting) > 1:
        names = [candidate.name for candidate in fitting]
        raise SystemExit(
            f"{checkpoint}: holds {len(names)} state dicts of this model: {join_names(names)}; name the right one in "
            f"the model's entry of convertation/models.yaml, such as `state_dict: {names[0]}`"
        )
    keys = [str(key) for mapping in walk_dictionaries(found) for key in mapping[1]]
    if not fitting and any(".visual_transformer." in f".{key}" for key in keys):
        lipro = any(f".{key}".endswith(".classifier.weight") for key in keys)
        rest = ", and `classifier.*` goes into ClassifierHead_LiPro_V2.pt" if lipro else ""
        raise SystemExit(
            f"{checkpoint}: a whole {'CT_LiPro' if lipro else 'CT-CLIP'} file; expected the part of it that the "
            "team extracts: `visual_transformer.*` as `VIT.*` and `to_visual_latent.weight` as "
            f"`projection_layer.weight`, without the text encoder{rest}"
        )
    return max(fitting or candidates, key=lambda candidate: len(candidate.keys))


def list_candidates(found: dict[Any, Any], needed: dict[str, Tensor]) -> Iterator[Candidate]:
    """Yield each candidate that fits the network; for a dictionary without one, the candidate with the most keys."""
    stems = {key.partition(".")[0] + "." for key in needed}
    counted = {key for key in needed if not key.endswith(COUNTER)}
    for path, mapping in walk_dictionaries(found):
        plain = {key.replace(COMPILED, ""): key for key in mapping if isinstance(key, str)}
        tries = []
        for stem in ["", *(stems if len(stems) == 1 else [])]:
            wanted = {key.removeprefix(stem): key for key in needed}
            prefixes = Counter(
                key.removesuffix(short) for key in plain for short in wanted if f".{key}".endswith(f".{short}")
            )
            for prefix in prefixes or [""]:
                keys = {key: plain[prefix + short] for short, key in wanted.items() if prefix + short in plain}
                fits = counted <= keys.keys() and all(
                    read_shape(mapping[keys[key]]) == needed[key].shape for key in counted
                )
                tries.append(Candidate(path, prefix, stem, mapping, keys, fits))
            if any(candidate.fits for candidate in tries):
                break
        yield from [candidate for candidate in tries if candidate.fits] or [max(tries, key=lambda one: len(one.keys))]


def walk_dictionaries(
    found: Mapping[Any, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Yield `found` and the dictionaries inside it, each with the keys that lead to it."""
    yield path, found
    for key, value in found.items():
        if isinstance(value, Mapping) and isinstance(key, str) and len(path) < DEEPEST:
            yield from walk_dictionaries(value, (*path, key))


def name_in_network(candidate: Candidate, key: object) -> str:
    """Return the name that a key of the file would have in the network."""
    return candidate.stem + str(key).replace(COMPILED, "").removeprefix(candidate.prefix)


def read_shape(value: object) -> torch.Size | None:
    """Return the shape of a plain tensor whose numbers are in memory, None for anything else."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and not value.is_quantized
    return value.shape if isinstance(value, Tensor) and plain else None
