"""What every conversion shares: reading a checkpoint safely and writing a network as one reproducible ONNX file."""

import argparse
import gc
import hashlib
import json
import logging
import math
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxscript.optimizer
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from convertation.onnx_file import write

ANY_SIZE = 2**40  # bytes; constants are folded however large they are
BEGINNING = 64  # numbers of a weight that say whether another may be equal
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


def export(
    network: nn.Module,
    sample_input: Tensor,
    out: Path,
    *,
    opset: int,
    batch_max: int,
    metadata: dict[str, str],
    inner: tuple[str, ...] = (),
) -> None:
    """Write `network` as the ONNX file `out`: `input` (batch, …) -> `output` (batch, …), batch 1 … `batch_max`.

    `sample_input` gives shape and type; its batch must be 2 or more, values do not matter. If `inner` is given, the
    network returns (output, *inner) and the file has values of those names inside the graph.
    The same network gives the same bytes: no path, time or version is written.
    """
    print("  tracing the network", flush=True)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # or it tells that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        program = torch.onnx.export(
            network,
            (sample_input,),
            dynamo=True,
            opset_version=opset,
            input_names=["input"],
            output_names=["output", *inner],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=max(2, batch_max))},),
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model = program.model
    print("  folding what depends on weights alone", flush=True)
    onnxscript.optimizer.optimize(model, num_iterations=1, input_size_limit=ANY_SIZE, output_size_limit=ANY_SIZE)
    _share_equal_weights(model)
    print("  writing", flush=True)
    write(model, out, metadata)


def _share_equal_weights(model: onnx_ir.Model) -> None:
    """Keep one of equal initializers: folding gives each use of a transposed weight a copy of its own."""
    kept: dict[tuple[object, ...], list[onnx_ir.Value]] = {}
    for name, value in sorted(model.graph.initializers.items()):
        array = _array(value)
        # Reading all of each would cost as long as writing it: only what begins alike is compared
        alike = kept.setdefault((value.dtype, array.shape, array.flat[:BEGINNING].tobytes()), [])
        if first := next((other for other in alike if np.array_equal(_array(other), array)), None):
            onnx_ir.convenience.replace_all_uses_with(value, first)
            del model.graph.initializers[name]
        else:
            alike.append(value)


def _array(value: onnx_ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def main(convert: Callable[..., None]) -> None:
    """The command line of every torch2onnx: `convert(checkpoint, entry, out, opset=…, metadata=…)`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--opset", type=int, default=20)
    parser.add_argument("--weights", choices=["synthetic", "real"], required=True, help="what the checkpoint holds")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("entry", type=Path, help="the model's entry, JSON")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)  # sums in float64 must not depend on the number of cores
    gc.disable()  # tracing makes very many objects, and this process ends soon
    entry = json.loads(given.entry.read_text())
    try:
        convert(
            given.checkpoint, entry, given.out, opset=given.opset, metadata=identity(given.checkpoint, given.weights)
        )
    except OSError as error:
        raise SystemExit(
            f"{error.filename or given.out}: {error.strerror}; make room or access, then run make again"
        ) from None


def identity(checkpoint: Path, weights: str) -> dict[str, str]:
    """What a model file says about itself: the kind of weights, the model's name, the sha256 of its checkpoint."""
    if not checkpoint.is_file():
        raise SystemExit(f"{checkpoint}: no such file; put it there, or run make with WEIGHTS=synthetic")
    with checkpoint.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"weights": weights, "model": checkpoint.stem, "checkpoint_sha256": digest.hexdigest()}
