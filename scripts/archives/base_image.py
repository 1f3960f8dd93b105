"""Check that a base image is the one that was first seen under its name, even if its tag was moved later.

The lock, docker/images.lock.json, holds for each name the registry's digest and the image's identity on this machine;
an image that came as a file (docker load) has only the identity.  If one of them is equal, the image is the same.
Commit the lock, and each machine takes the same images.  Standard library only.
"""

import json
import os
from pathlib import Path
from typing import Any

from scripts.steps.records import write_text

LOCK = Path("docker/images.lock.json")


def check_base_image(name: str, found: dict[str, Any], accept: bool | None = None) -> str:
    """Return the identity of an image, whose `docker image inspect` is `found`; lock it if it has no lock yet.

    SystemExit if another image is locked under this name, unless `accept` (None: ACCEPT=1 in the environment).
    """
    accept = os.environ.get("ACCEPT") == "1" if accept is None else accept
    here = {"digest": find_digest(name, found), "id": str(found["Id"])}
    known: dict[str, dict[str, str]] = json.loads(LOCK.read_text()) if LOCK.exists() else {}
    if there := known.get(name):
        if here["id"] == there["id"] or (here["digest"] and here["digest"] == there["digest"]):
            return here["id"]
        if not accept:
            was, now = (one["digest"] or one["id"] for one in (there, here))
            locked = f"{name.rpartition(':')[0]}@{was}"
            back = f"\nthe locked one: docker pull {locked} && docker tag {locked} {name}" if there["digest"] else ""
            raise SystemExit(
                f"{name} is another image than the locked one: expected {was}, got {now} ({LOCK})\n"
                f"its makers have moved the tag, or a mirror has another; if you want it: ACCEPT=1{back}"
            )
    write_text(str(LOCK), json.dumps({**known, name: here}, indent=2, sort_keys=True) + "\n")
    return here["id"]


def find_digest(name: str, found: dict[str, Any]) -> str:
    """Return the digest that a registry has for this name, "" if the image came from no registry."""
    told = [one.partition("@") for one in found.get("RepoDigests") or []]
    return next((sha for repository, _, sha in told if repository == name.rpartition(":")[0]), "")
