"""A base image is the one that was first seen under its name, whatever its tag says later: docker/images.lock.json.

The lock has for each name the registry's digest and the identity of the image here, which is all that an image has that
came as a file (docker load).  Either tells that it is the same.  Commit it, and each machine takes the same images.
Standard library only.
"""

import json
import os
from pathlib import Path
from typing import Any

from scripts.steps.records import write_text

LOCK = Path("docker/images.lock.json")


def check_base_image(name: str, found: dict[str, Any], accept: bool | None = None) -> str:
    """Return the identity of an image, `found` as docker image inspect tells; lock it if it has no lock yet.

    SystemExit where another one is locked under this name, unless `accept` (None: ACCEPT=1 in the environment).
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
    """Return the digest that a registry has for this name, "" if it came from none."""
    told = [one.partition("@") for one in found.get("RepoDigests") or []]
    return next((sha for repository, _, sha in told if repository == name.rpartition(":")[0]), "")
