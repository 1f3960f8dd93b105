"""Read the dictionary in a file of `torch.save` or safetensors; code in it never runs."""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

LISTED = 8  # names that a message lists before "and n more"
LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the magic number of torch.save before torch 1.6
SAVE = "save it with torch.save(module.state_dict(), path)"

# First bytes of files that are no checkpoint: what such a file is, and what to do with it
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


def read_checkpoint(checkpoint: Path) -> dict[Any, Any]:
    """Return the dictionary in a file of `torch.save` or safetensors, its tensors mapped; no code in it runs."""
    if not checkpoint.is_file():
        raise SystemExit(f"{checkpoint}: no such file; put it there, or run make with WEIGHTS=synthetic")
    if checkpoint.stat().st_size == 0:
        raise SystemExit(f"{checkpoint}: the file is empty; expected a checkpoint of torch.save; put it there again")
    with checkpoint.open("rb") as file:
        head = file.read(512)
    if said := name_wrong_kind(checkpoint, head):
        raise SystemExit(f"{checkpoint}: {said}")
    zipped = head.startswith(b"PK")  # else it has the format before torch 1.6, which cannot be mapped
    if zipped and not zipfile.is_zipfile(checkpoint):
        raise make_unreadable_error(checkpoint)
    try:
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < checkpoint.stat().st_size:
            from safetensors.torch import load_file

            return dict(load_file(checkpoint))
        found = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file can raise any error
        said = str(error)  # "unsupported GLOBAL posix.mkdir" as well as "Unsupported global: GLOBAL posix.mkdir"
        if isinstance(error, pickle.UnpicklingError) and re.search("global|reduce", said, re.IGNORECASE):
            met = re.search(r"GLOBAL\s+([A-Za-z_][\w.]*)", said)
            raise SystemExit(
                f"{checkpoint}: refused, reading it would run code{f' ({met[1]})' if met else ''}; "
                f"expected tensors only\n{SAVE}"
            ) from None
        raise make_unreadable_error(checkpoint) from None
    if not isinstance(found, dict):
        raise SystemExit(f"{checkpoint}: holds a {type(found).__name__}; expected a state dict\n{SAVE}")
    return found


def name_wrong_kind(checkpoint: Path, head: bytes) -> str:
    """Say what kind of file this is and what to do, by its first bytes or its zip; "" if it may be a checkpoint."""
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
        return f"a zip archive around {join_names(names)}; unpack it and put the checkpoint there"
    return f"a zip archive and no checkpoint; it holds {join_names(names)}; expected a file of torch.save"


def make_unreadable_error(checkpoint: Path) -> SystemExit:
    size = checkpoint.stat().st_size
    return SystemExit(
        f"{checkpoint}: truncated or no checkpoint ({size} bytes); expected a file of torch.save; put it there again"
    )


def walk_keys(found: Mapping[Any, Any]) -> Iterator[str]:
    """Yield each key of a checkpoint's dictionary and of the dictionaries inside it."""
    for key, value in found.items():
        yield str(key)
        if isinstance(value, Mapping):
            yield from walk_keys(value)


def join_names(names: list[Any]) -> str:
    rest = len(names) - LISTED
    return ", ".join(map(str, names[:LISTED])) + (f" and {rest} more" if rest > 0 else "")
