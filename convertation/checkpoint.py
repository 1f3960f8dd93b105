"""Reading a checkpoint: tensors alone, mapped from the file, those that the network needs."""

import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LISTED = 8  # keys named in an error before "and n more"


def load_state_dict(checkpoint: Path, network: nn.Module) -> None:
    """Give `network` (built on any device, "meta" costs nothing) the tensors of `checkpoint`, in eval mode.

    The tensors are mapped, not copied: memory is used where weights are read. Keys the network has not are ignored.
    SystemExit: no file, no checkpoint, a pickle that would run code, a needed key missing or of another shape or type,
    a weight that is NaN or infinite.
    """
    found = read_checkpoint(checkpoint)
    needed = network.state_dict()
    missing = [key for key in needed if key not in found]
    misfits = [
        f"{key} is {_describe(found[key])}, expected {_describe(tensor)}"
        for key, tensor in needed.items()
        if key in found and _describe(found[key]) != _describe(tensor)
    ]
    if missing or misfits:
        problems = [f"{len(missing)} of {len(needed)} keys missing: {_listing(missing)}"] if missing else []
        problems += [f"{len(misfits)} misshapen: {_listing(misfits)}"] if misfits else []
        raise SystemExit(
            f"{checkpoint}: not a checkpoint of this model; {'; '.join(problems)}\n"
            f"it holds {_listing(list(found))}\n"
            "put the model's own checkpoint there, or describe this one in convertation/models.yaml"
        )
    broken = [key for key in needed if not _finite(found[key])]
    if broken:
        raise SystemExit(f"{checkpoint}: NaN or infinite weights in {_listing(broken)}; put a sound checkpoint there")
    network.load_state_dict({key: found[key] for key in needed}, assign=True)
    network.eval().requires_grad_(False)


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The dictionary in a file of `torch.save`, its tensors mapped from the file; nothing in it is ever executed."""
    if not checkpoint.is_file():
        raise SystemExit(f"{checkpoint}: no such file; put it there, or run make with WEIGHTS=synthetic")
    if checkpoint.stat().st_size == 0:
        raise SystemExit(f"{checkpoint}: the file is empty; expected a checkpoint of torch.save; put it there again")
    with checkpoint.open("rb") as file:
        zipped = file.read(2) == b"PK"  # else the format before torch 1.6, which cannot be mapped
    if zipped and not zipfile.is_zipfile(checkpoint):
        raise _unreadable(checkpoint)
    try:
        found = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever a damaged file leads the reader to
        said = str(error).lower()  # "unsupported GLOBAL posix.mkdir" as well as "Unsupported global"
        if isinstance(error, pickle.UnpicklingError) and ("global" in said or "reduce" in said):
            raise SystemExit(
                f"{checkpoint}: refused, reading it would run code; expected tensors only\n"
                "save it with torch.save(module.state_dict(), path)"
            ) from None
        raise _unreadable(checkpoint) from None
    if not isinstance(found, dict):
        raise SystemExit(
            f"{checkpoint}: holds a {type(found).__name__}; expected a state dict\n"
            "save it with torch.save(module.state_dict(), path)"
        )
    return found


def _unreadable(checkpoint: Path) -> SystemExit:
    size = checkpoint.stat().st_size
    return SystemExit(
        f"{checkpoint}: truncated or no checkpoint ({size} bytes); expected a file of torch.save; put it there again"
    )


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _listing(names: list[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # both NaN if any element is; no copy as isfinite would make
    return math.isfinite(low.item()) and math.isfinite(high.item())
