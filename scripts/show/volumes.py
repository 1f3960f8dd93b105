"""Read the volumes for `make compare`: seeded ones, or those of a folder.

A file is .npy, or .npz with one array in it: float32 [1, 240, 480, 480], HU / 1000 in [-1, 1] (axes S, L, P), as the
ViT takes it.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic
from numpy.typing import NDArray

from scripts.convert.sample import make_sample

SEEDED = 4
FIRST_SEED = 1  # the build's own checks use seed 0


def list_names(folder: Path | None, entry: dict[str, Any]) -> list[str]:
    """Return the names of the volumes that `read_volumes` yields. SystemExit if a file has another shape or type."""
    if folder is None:
        return [f"seed {FIRST_SEED + number}" for number in range(SEEDED)]
    files = find_volumes(folder)
    for path in files:
        with open_volume(path) as stream:
            try:
                version = read_magic(stream)  # type: ignore[no-untyped-call]
                read = read_array_header_1_0 if version == (1, 0) else read_array_header_2_0
                shape, _, dtype = read(stream)  # type: ignore[no-untyped-call]
            except ValueError as error:
                raise SystemExit(f"{path}: not a NumPy array ({error}); write it with numpy.save") from None
        if list(shape) != entry["input"] or dtype != np.float32:
            raise SystemExit(
                f"{path}: holds {dtype} {list(shape)}; expected float32 {entry['input']}, HU / 1000 in [-1, 1]"
            )
    return [path.name for path in files]


def read_volumes(folder: Path | None, entry: dict[str, Any]) -> Iterator[NDArray[np.float32]]:
    """Yield each volume, (1, 1, frames, height, width). SystemExit if its values are not HU / 1000 in [-1, 1]."""
    if folder is None:
        for number in range(SEEDED):
            yield make_sample(entry, FIRST_SEED + number, 1)["input"]
        return
    for path in find_volumes(folder):
        try:
            with open_volume(path) as stream:
                volume = np.load(stream, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise SystemExit(f"{path}: not an array of numpy.save ({error}); write the file again") from None
        low, high = float(volume.min()), float(volume.max())
        if not -1.001 <= low <= high <= 1.001:  # refuses NaN, too
            raise SystemExit(f"{path}: values from {low:.4g} to {high:.4g}; expected HU / 1000, clipped to [-1, 1]")
        yield volume[None]


def find_volumes(folder: Path) -> list[Path]:
    """Return the volume files of a folder, sorted by name."""
    if not folder.is_dir():
        raise SystemExit(f"INPUT={folder}: no such folder; expected a folder of studies, or of volumes as .npy or .npz")
    return sorted(path for path in folder.iterdir() if path.suffix in (".npy", ".npz"))


def open_volume(path: Path) -> IO[bytes]:
    """Return a stream of the array's bytes, as numpy.save writes them."""
    if path.suffix == ".npy":
        return path.open("rb")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            if len(members) != 1:
                raise SystemExit(f"{path}: holds {len(members)} arrays; expected one")
            return archive.open(members[0])
    except zipfile.BadZipFile as error:
        raise SystemExit(f"{path}: not an .npz file ({error}); write it with numpy.savez") from None
