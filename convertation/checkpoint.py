"""Reading checkpoints as people save them: tensors, never code, all that the network needs and nothing besides."""

import math
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LISTED = 8  # keys named in an error before "and n more"
DEEPEST = 3  # dictionaries around the state dict
COMPILED = "_orig_mod."  # what torch.compile puts into keys, wherever a module was compiled
COUNTER = "num_batches_tracked"  # of BatchNorm; inference does not use it
BOOKKEEPING = {"epoch", "step", "global_step", "iteration", "n_averaged"}  # numbers of the training, no layers
LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the magic number of torch.save before torch 1.6
HALVES_AND_DOUBLES = (torch.float16, torch.bfloat16, torch.float64)
SAVE = "save it with torch.save(module.state_dict(), path)"
UNDERSTOOD = "understood"  # attribute of a network: what of its checkpoint was accepted by guess

# What a file begins with that is no checkpoint, and what to do about it
KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for; git lfs pull"),
    (b"\x1f\x8b", "packed by gzip; unpack it: gunzip < packed > checkpoint"),
    (b"BZh", "packed by bzip2; unpack it: bunzip2 < packed > checkpoint"),
    (b"\xfd7zXZ", "packed by xz; unpack it: unxz < packed > checkpoint"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd; unpack it: unzstd < packed > checkpoint"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it and put the checkpoint there"),
    (b"\x93NUMPY", f"a NumPy array (.npy); expected a checkpoint of torch.save; {SAVE}"),
    (b"\x89HDF", f"an HDF5 file, as Keras writes; expected a checkpoint of torch.save; {SAVE}"),
)


@dataclass
class Candidate:
    """Tensors in a file that may be the network's: `keys` of the network -> keys of `holds`."""

    path: tuple[str, ...]  # keys of the dictionaries around it
    prefix: str  # before each of its keys
    stem: str  # before each of the network's keys, and not in the file
    holds: Mapping[Any, Any]
    keys: dict[str, str]
    fits: bool  # no key is missing, no shape another

    @property
    def name(self) -> str:
        return ".".join([*self.path, *([self.prefix.rstrip(".")] if self.prefix else [])]) or "."


def load_state_dict(checkpoint: Path, network: nn.Module, *, state_dict: str = "", unused: str = "") -> None:
    """Give `network` (built on any device, "meta" costs nothing) the tensors of `checkpoint`, in eval mode.

    The tensors are mapped, not copied, unless they have another precision than float32.  `state_dict`: which to take of
    a file that holds several.  `unused`: a pattern of keys that files hold and the network does not need; all others
    that are left over are an error, for they are layers that would be missing.  What was accepted by guess is printed
    and noted as the network's attribute `understood`.
    SystemExit: no file, no checkpoint, a pickle that would run code, several state dicts, a key missing, left over or
    of another shape or type, a weight that is NaN or infinite, a variance below 0.
    """
    found = read_checkpoint(checkpoint)
    needed = network.state_dict()
    chosen = _choose(checkpoint, found, needed, state_dict)
    values = {key: _as_needed(chosen.holds[chosen.keys[key]], needed[key]) for key in chosen.keys}
    missing = [key for key in needed if key not in values and not key.endswith(COUNTER)]
    misfits = [
        f"{chosen.keys[key]} is {_describe(value)}, expected {_describe(needed[key], meta='')}"
        for key, value in values.items()
        if _describe(value) != _describe(needed[key], meta="")
    ]
    if missing or misfits:
        problems = [f"{len(missing)} of {len(needed)} keys missing: {_listing(missing)}"] if missing else []
        problems += [f"{len(misfits)} misshapen: {_listing(misfits)}"] if misfits else []
        raise SystemExit(
            f"{checkpoint}: not a checkpoint of this model; {'; '.join(problems)}\n"
            f"it holds {_listing(list(chosen.holds))}\n"
            "put the model's own checkpoint there, or describe this one in convertation/models.yaml"
        )
    taken = set(chosen.keys.values())
    surplus = [key for key in chosen.holds if key not in taken and not _needless(_plain(chosen, key), unused)]
    if surplus:
        raise SystemExit(
            f"{checkpoint}: holds what this network does not have: {_listing(surplus)}; without it the answers would "
            "be others, so nothing was made\n"
            "train the network that convertation/models.yaml describes (its activation, which has no keys, is what "
            "models.yaml says), or save its layers alone: torch.save(module.state_dict(), path)"
        )
    values |= {key: torch.zeros((), dtype=torch.int64) for key in needed if key not in values}
    if broken := [key for key in needed if not _finite(values[key])]:
        raise SystemExit(f"{checkpoint}: NaN or infinite weights in {_listing(broken)}; put a sound checkpoint there")
    if negative := [key for key in needed if key.endswith("running_var") and (values[key] < 0).any()]:
        raise SystemExit(
            f"{checkpoint}: variances below 0 in {_listing(negative)}, which no training gives; "
            "put a sound checkpoint there"
        )
    network.load_state_dict({key: values[key] for key in needed}, assign=True)
    network.eval().requires_grad_(False)
    network.__dict__[UNDERSTOOD] = "; ".join(_guesses(found, chosen, needed))
    if network.__dict__[UNDERSTOOD]:
        print(f"{checkpoint}: {network.__dict__[UNDERSTOOD]}", flush=True)


def understood(network: nn.Module) -> str:
    """What of a checkpoint was accepted by guess when `network`, or a part of it, was loaded; "" if nothing was."""
    return next(filter(None, (module.__dict__.get(UNDERSTOOD, "") for module in network.modules())), "")


def keys_within(found: Mapping[Any, Any]) -> Iterator[str]:
    """Yield each key of a checkpoint's dictionary and of those in it."""
    for key, value in found.items():
        yield str(key)
        if isinstance(value, Mapping):
            yield from keys_within(value)


def read_checkpoint(checkpoint: Path) -> dict[Any, Any]:
    """The dictionary in a file of `torch.save` or safetensors, its tensors mapped; nothing in it is ever executed."""
    if not checkpoint.is_file():
        raise SystemExit(f"{checkpoint}: no such file; put it there, or run make with WEIGHTS=synthetic")
    if checkpoint.stat().st_size == 0:
        raise SystemExit(f"{checkpoint}: the file is empty; expected a checkpoint of torch.save; put it there again")
    with checkpoint.open("rb") as file:
        head = file.read(512)
    if said := _kind(checkpoint, head):
        raise SystemExit(f"{checkpoint}: {said}")
    zipped = head.startswith(b"PK")  # else the format before torch 1.6, which cannot be mapped
    if zipped and not zipfile.is_zipfile(checkpoint):
        raise _unreadable(checkpoint)
    try:
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < checkpoint.stat().st_size:
            from safetensors.torch import load_file

            return dict(load_file(checkpoint))
        found = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever a damaged file leads the reader to
        said = str(error)  # "unsupported GLOBAL posix.mkdir" as well as "Unsupported global: GLOBAL posix.mkdir"
        if isinstance(error, pickle.UnpicklingError) and re.search("global|reduce", said, re.IGNORECASE):
            met = re.search(r"GLOBAL\s+([A-Za-z_][\w.]*)", said)
            raise SystemExit(
                f"{checkpoint}: refused, reading it would run code{f' ({met[1]})' if met else ''}; "
                f"expected tensors only\n{SAVE}"
            ) from None
        raise _unreadable(checkpoint) from None
    if not isinstance(found, dict):
        raise SystemExit(f"{checkpoint}: holds a {type(found).__name__}; expected a state dict\n{SAVE}")
    return found


def _kind(checkpoint: Path, head: bytes) -> str:
    """What this file is, by its first bytes or the names in its zip, and what to do; "" if it may be a checkpoint."""
    if said := next((said for begin, said in KINDS if head.startswith(begin)), ""):
        return said
    if re.match(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|\?xml|head)", head, re.IGNORECASE):
        return "an HTML page, not the file: the download asked to log in, or failed; download it again in a browser"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it and put the checkpoint there"
    if head.startswith(b"\x80") and len(head) > 64 and LEGACY not in head[:64]:
        return f"a plain pickle, which is never read: that could run code; {SAVE}"
    if not head.startswith(b"PK") or not zipfile.is_zipfile(checkpoint):
        return ""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError):
        return ""
    leaves = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in leaves or any("/code/" in f"/{name}" for name in names):
        return (
            "TorchScript, which is code; expected a state dict\n"
            "save that with torch.save(torch.jit.load(path).state_dict(), other_path)"
        )
    if leaves & {"serialized_exported_program.json", "archive_format"} or any(
        "/models/" in f"/{name}" for name in names
    ):
        return (
            "a program of torch.export; expected a state dict\n"
            "save that with torch.save(torch.export.load(path).state_dict, other_path)"
        )
    if "data.pkl" in leaves:
        return ""
    if names and all(name.endswith(".npy") for name in names):
        return f"NumPy arrays (.npz); expected a checkpoint of torch.save; {SAVE}"
    if any(name.endswith((".pt", ".pth", ".safetensors", ".bin", ".ckpt")) for name in names):
        return f"a zip archive around {_listing(names)}; unpack it and put the checkpoint there"
    return f"a zip archive and no checkpoint; it holds {_listing(names)}; expected a file of torch.save"


def _choose(checkpoint: Path, found: dict[Any, Any], needed: dict[str, Tensor], state_dict: str) -> Candidate:
    """The one state dict in the file that is this network's, or comes nearest to it."""
    candidates = list(_candidates(found, needed))
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
                f"it holds {_listing(held)}"
            )
        return named[0]
    if len(fitting) > 1:
        names = [candidate.name for candidate in fitting]
        raise SystemExit(
            f"{checkpoint}: holds {len(names)} state dicts of this model: {_listing(names)}; say in the model's entry "
            f"of convertation/models.yaml which it is, such as `state_dict: {names[0]}`"
        )
    keys = [str(key) for mapping in _mappings(found) for key in mapping[1]]
    if not fitting and any(".visual_transformer." in f".{key}" for key in keys):
        lipro = any(f".{key}".endswith(".classifier.weight") for key in keys)
        rest = ", and `classifier.*` goes into ClassifierHead_LiPro_V2.pt" if lipro else ""
        raise SystemExit(
            f"{checkpoint}: a whole {'CT_LiPro' if lipro else 'CT-CLIP'} file, not what was extracted from it for this "
            "place; the team's extraction keeps `visual_transformer.*` as `VIT.*` and `to_visual_latent.weight` as "
            f"`projection_layer.weight`, nothing of the text encoder{rest}"
        )
    return max(fitting or candidates, key=lambda candidate: len(candidate.keys))


def _candidates(found: dict[Any, Any], needed: dict[str, Tensor]) -> Iterator[Candidate]:
    """All in the file that has the network's keys behind one prefix, or else the best try at each dictionary."""
    stems = {key.partition(".")[0] + "." for key in needed}
    counted = {key for key in needed if not key.endswith(COUNTER)}
    for path, mapping in _mappings(found):
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
                    _shape(mapping[keys[key]]) == needed[key].shape for key in counted
                )
                tries.append(Candidate(path, prefix, stem, mapping, keys, fits))
            if any(candidate.fits for candidate in tries):
                break
        yield from [candidate for candidate in tries if candidate.fits] or [max(tries, key=lambda one: len(one.keys))]


def _mappings(
    found: Mapping[Any, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """`found` and the dictionaries in it, with the keys that lead there."""
    yield path, found
    for key, value in found.items():
        if isinstance(value, Mapping) and isinstance(key, str) and len(path) < DEEPEST:
            yield from _mappings(value, (*path, key))


def _plain(candidate: Candidate, key: object) -> str:
    """A key of the file as the network would name it."""
    return candidate.stem + str(key).replace(COMPILED, "").removeprefix(candidate.prefix)


def _needless(key: str, unused: str) -> bool:
    return key.rpartition(".")[2] in BOOKKEEPING or bool(unused and re.match(unused, key))


def _guesses(found: Mapping[Any, Any], chosen: Candidate, needed: dict[str, Tensor]) -> list[str]:
    """What was understood that the file does not say outright."""
    said = []
    if chosen.path:
        around = found
        aside = []
        for key in chosen.path:
            aside += [str(other) for other in around if other != key]
            around = around[key]
        said.append(f"the state dict is `{'.'.join(chosen.path)}`")
        if aside:
            said.append(f"beside it and not read: {_listing(aside)}")
    if chosen.prefix:
        said.append(f"`{chosen.prefix}` is no part of its keys")
    if chosen.stem:
        said.append(f"its keys are those below `{chosen.stem}`")
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


def _as_needed(value: Any, needed: Tensor) -> Any:
    """The value in the type that the network has, where that is only a matter of precision."""
    if needed.dtype == torch.int64 and not needed.shape:  # num_batches_tracked
        number = isinstance(value, int | float) or (_shape(value) is not None and value.numel() == 1)
        if number and math.isfinite(float(value)):
            return torch.tensor(int(value))
    if _shape(value) is not None and value.dtype in HALVES_AND_DOUBLES and needed.dtype == torch.float32:
        return value.to(torch.float32)
    return value


def _shape(value: object) -> torch.Size | None:
    """The shape of a plain tensor with its numbers in memory, None for all else."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and not value.is_quantized
    return value.shape if isinstance(value, Tensor) and plain else None


def _unreadable(checkpoint: Path) -> SystemExit:
    size = checkpoint.stat().st_size
    return SystemExit(
        f"{checkpoint}: truncated or no checkpoint ({size} bytes); expected a file of torch.save; put it there again"
    )


def _describe(value: object, meta: str = "without its numbers (on meta), ") -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    odd = "sparse " if value.layout != torch.strided else "quantised " if value.is_quantized else ""
    return f"{meta if value.is_meta else ''}{odd}{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _listing(names: list[Any]) -> str:
    rest = len(names) - LISTED
    return ", ".join(map(str, names[:LISTED])) + (f" and {rest} more" if rest > 0 else "")


def _finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # both NaN if any element is; no copy as isfinite would make
    return math.isfinite(low.item()) and math.isfinite(high.item())
