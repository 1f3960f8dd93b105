"""Exchange two folders atomically, with a journal from which the exchange is finished after a kill.

scripts/steps/before_make.py calls `finish_swap` before every make, and so do the scripts that publish. Standard library
only.
"""

import ctypes
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from scripts.steps.printing import print_text
from scripts.steps.records import current_digest, explain_ownership, note_digest, read_text, record_path, write_text


def check_movable(path: str, copies: str) -> None:
    """Make sure that the folder `path` can be renamed, before the journal is written; SystemExit if it cannot be.

    A folder of a lower layer of overlayfs (an image that holds a built checkout) cannot be renamed: EXDEV, although it
    lies on the same device (docs.kernel.org/filesystems/overlayfs.html, "Renaming directories").  A copy in the upper
    layer replaces it; after a kill, `finish_copies` puts the copy in its place.
    """
    if not os.path.isdir(path):
        return
    os.makedirs(f"{copies}/full/of", exist_ok=True)
    try:
        os.rename(path, f"{copies}/full")  # always fails, because the target is not empty; any other error comes first
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return
        if error.errno in (errno.EACCES, errno.EPERM):
            raise SystemExit(f"models cannot be exchanged: {explain_ownership(path)}") from None
        if error.errno != errno.EXDEV:
            raise
    with open(f"{copies}/file", "w"):
        os.rename(
            f"{copies}/file", f"{os.path.dirname(path)}/.file"
        )  # EXDEV: another mount, where a copy does not help
    os.remove(f"{os.path.dirname(path)}/.file")
    copy = f"{copies}/{os.path.basename(path)}"
    shutil.copytree(path, f"{copies}/full/{os.path.basename(path)}", symlinks=True, dirs_exist_ok=True)
    os.rename(f"{copies}/full/{os.path.basename(path)}", copy)
    shutil.rmtree(path)
    os.rename(copy, path)


def finish_copies(repository: str) -> None:
    """Put each folder that was copied completely (see `check_movable`) in its place."""
    for kind, folder in (("live", repository), ("previous", hidden_folder(repository, "previous"))):
        copies = hidden_folder(repository, f"copies/{kind}")
        for model in os.listdir(copies) if os.path.isdir(copies) else []:
            if model != "full":
                shutil.rmtree(f"{folder}/{model}", ignore_errors=True)
                os.rename(f"{copies}/{model}", f"{folder}/{model}")
    shutil.rmtree(hidden_folder(repository, "copies"), ignore_errors=True)


def finish_swap(journal: str) -> None:
    """Finish what the journal describes; a kill may have come after any part of it."""
    if not (text := read_text(journal)):
        return
    job: dict[str, Any] = json.loads(text)
    repository, source = job["repository"], hidden_folder(job["repository"], job["source"])
    previous = hidden_folder(repository, "previous")
    if os.path.isdir(source):
        os.makedirs(repository, exist_ok=True)
        for model, inode in job["inodes"].items():
            new = f"{source}/{model}"
            if model in job["harmed"] and not os.path.exists(new) and not os.path.exists(f"{new}~"):
                continue  # it was moved to harmed/ already
            check_movable(f"{repository}/{model}", hidden_folder(repository, "copies/live"))
            swap_folders(new, f"{repository}/{model}", inode)
            if model in job["harmed"]:  # it is no published version, so a rollback must not bring it back
                shutil.rmtree(hidden_folder(repository, f"harmed/{model}"), ignore_errors=True)
                os.makedirs(hidden_folder(repository, "harmed"), exist_ok=True)
                os.rename(new, hidden_folder(repository, f"harmed/{model}"))
        if source != previous and os.listdir(source):
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(source, previous)
        elif source != previous:
            os.rmdir(source)
    shutil.rmtree(hidden_folder(repository, "copies"), ignore_errors=True)
    for path, sha in job["notes"].items():
        note_digest(f"{repository}/{path}", sha)
        Path(record_path("seen", f"{source}/{path}")).unlink(missing_ok=True)
    for folder, _, names in os.walk(previous):
        for name in names:
            current_digest(f"{folder}/{name}")
    write_text(record_path("published", repository), job["record"])
    os.remove(journal)


def swap_folders(new: str, live: str, inode: int) -> None:
    """Exchange two folders, unless `new` no longer has this inode: then they were exchanged already.

    If `inode` is 0, there is no `new`, and `live` is moved there.  An empty `new` means that the model did not exist
    before: `live` is moved there, too.
    """
    aside = f"{new}~"
    if inode == 0:
        if os.path.isdir(live):
            os.rename(live, new)
        return
    if os.path.isdir(new) and os.stat(new).st_ino == inode:
        if not os.path.exists(live):
            os.rename(new, live)
        elif not os.listdir(new):
            os.rename(live, new)
            return
        else:
            try:
                exchange_folders(new, live)
            except (OSError, AttributeError) as error:
                print_text(f"{live} is away for a moment, as folders cannot be exchanged here ({error})")
                os.rename(live, aside)
                os.rename(new, live)
    if not os.path.exists(new):
        if os.path.exists(aside):
            os.rename(aside, new)
        else:
            os.mkdir(new)


def exchange_folders(one: str, other: str) -> None:
    """Exchange two folders atomically: renameat2(2) with RENAME_EXCHANGE (2); -100 is AT_FDCWD."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def hidden_folder(repository: str, name: str) -> str:
    """Return the folder `name` in the hidden folder beside `repository`."""
    head, tail = os.path.split(repository.rstrip("/"))
    return os.path.join(head, f".{tail}", name)
