"""Load a checkpoint into a network: every tensor that the network needs, and no layer left over."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convertation.checkpoint_file import join_names, read_checkpoint
from convertation.find_state_dict import COMPILED, COUNTER, Candidate, choose_candidate, name_in_network, read_shape

BOOKKEEPING = {"epoch", "step", "global_step", "iteration", "n_averaged"}  # numbers about the training, not layers
HALVES_AND_DOUBLES = (torch.float16, torch.bfloat16, torch.float64)
GUESSES = "guesses"  # attribute of a network: what was guessed when its checkpoint was loaded


def load_state_dict(checkpoint: Path, network: nn.Module, *, state_dict: str = "", unused: str = "") -> None:
    """Load the tensors of `checkpoint` into `network` (on any device; "meta" needs no memory) and set eval mode.

    The tensors are mapped and not copied, unless their precision is not float32.  `state_dict` says which one to take
    from a file that holds several.  `unused` is a pattern of keys that files hold and the network does not need; any
    other key that is left over is an error, because it belongs to a layer that the network lacks.  Each guess about
    the file is printed and kept in the network's attribute `guesses`.
    SystemExit: there is no file; it is no checkpoint; reading it would run code; it holds several state dicts; a key is
    missing, left over, or has another shape or type; a weight is NaN or infinite; a variance is below 0.
    """
    found = read_checkpoint(checkpoint)
    needed = network.state_dict()
    chosen = choose_candidate(checkpoint, found, needed, state_dict)
    values = {key: convert_value(chosen.holds[chosen.keys[key]], needed[key]) for key in chosen.keys}
    missing = [key for key in needed if key not in values and not key.endswith(COUNTER)]
    misfits = [
        f"{chosen.keys[key]} is {describe_value(value)}, expected {describe_value(needed[key], meta='')}"
        for key, value in values.items()
        if describe_value(value) != describe_value(needed[key], meta="")
    ]
    if missing or misfits:
        problems = [f"{len(missing)} of {len(needed)} keys missing: {join_names(missing)}"] if missing else []
        problems += [f"{len(misfits)} misshapen: {join_names(misfits)}"] if misfits else []
        raise SystemExit(
            f"{checkpoint}: not a checkpoint of this model; {'; '.join(problems)}\n"
            f"it holds {join_names(list(chosen.holds))}\n"
            "put the model's own checkpoint there, or describe this one in convertation/models.yaml"
        )
    taken = set(chosen.keys.values())
    surplus = [
        key for key in chosen.holds if key not in taken and not is_needless(name_in_network(chosen, key), unused)
    ]
    if surplus:
        raise SystemExit(
            f"{checkpoint}: holds what this network does not have: {join_names(surplus)}; without these tensors the "
            "answers would be wrong, so nothing was made\n"
            "train the network that convertation/models.yaml describes (the activation has no keys: models.yaml names "
            "it), or save its layers alone: torch.save(module.state_dict(), path)"
        )
    values |= {key: torch.zeros((), dtype=torch.int64) for key in needed if key not in values}
    if broken := [key for key in needed if not is_finite(values[key])]:
        raise SystemExit(f"{checkpoint}: NaN or infinite weights in {join_names(broken)}; put a sound checkpoint there")
    if negative := [key for key in needed if key.endswith("running_var") and (values[key] < 0).any()]:
        raise SystemExit(
            f"{checkpoint}: variances below 0 in {join_names(negative)}, which no training gives; "
            "put a sound checkpoint there"
        )
    network.load_state_dict({key: values[key] for key in needed}, assign=True)
    network.eval().requires_grad_(False)
    network.__dict__[GUESSES] = "; ".join(describe_guesses(found, chosen, needed))
    if network.__dict__[GUESSES]:
        print(f"{checkpoint}: {network.__dict__[GUESSES]}", flush=True)


def read_guesses(network: nn.Module) -> str:
    """Return what was guessed when a checkpoint was loaded into `network` or a part of it, "" if nothing was."""
    return next(filter(None, (module.__dict__.get(GUESSES, "") for module in network.modules())), "")


def describe_guesses(found: Mapping[Any, Any], chosen: Candidate, needed: dict[str, Tensor]) -> list[str]:
    """Return a phrase for each thing that the file does not say itself and that was guessed."""
    said = []
    if chosen.path:
        around = found
        aside = []
        for key in chosen.path:
            aside += [str(other) for other in around if other != key]
            around = around[key]
        said.append(f"the state dict is `{'.'.join(chosen.path)}`")
        if aside:
            said.append(f"keys beside it, not read: {join_names(aside)}")
    if chosen.prefix:
        said.append(f"`{chosen.prefix}` is no part of its keys")
    if chosen.stem:
        said.append(f"its keys lack `{chosen.stem}`, which the network's keys begin with")
    if any(COMPILED in key for key in chosen.keys.values()):
        said.append(f"nor is `{COMPILED}`" if chosen.prefix else f"`{COMPILED}` is no part of its keys")
    tensors = [chosen.holds[key] for key in chosen.keys.values()]
    kinds = {
        str(one.dtype).removeprefix("torch.")
        for one in tensors
        if isinstance(one, Tensor) and one.dtype in HALVES_AND_DOUBLES
    }
    if kinds:
        said.append(f"{', '.join(sorted(kinds))} became float32")
    if any(key not in chosen.keys for key in needed):
        said.append(f"{COUNTER}, which inference does not use, is absent")
    return said


def convert_value(value: Any, needed: Tensor) -> Any:
    """Return the value in the type that the network has, if only the precision differs; else the value as it is."""
    if needed.dtype == torch.int64 and not needed.shape:  # num_batches_tracked
        number = isinstance(value, int | float) or (read_shape(value) is not None and value.numel() == 1)
        if number and math.isfinite(float(value)):
            return torch.tensor(int(value))
    if read_shape(value) is not None and value.dtype in HALVES_AND_DOUBLES and needed.dtype == torch.float32:
        return value.to(torch.float32)
    return value


def is_needless(key: str, unused: str) -> bool:
    return key.rpartition(".")[2] in BOOKKEEPING or bool(unused and re.match(unused, key))


def is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # both NaN if any element is; no copy as isfinite would make
    return math.isfinite(low.item()) and math.isfinite(high.item())


def describe_value(value: object, meta: str = "without its numbers (on meta), ") -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    odd = "sparse " if value.layout != torch.strided else "quantised " if value.is_quantized else ""
    return f"{meta if value.is_meta else ''}{odd}{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
