"""Check that the published repository is exactly what the verdict is about, before it is signed or made an image."""

import json
from pathlib import Path

from scripts.publish.published import hash_content
from scripts.steps.records import current_digest, read_text, written_digest


def check_vouched(repository: str, verdict: str, then: str = "no image is made of it") -> dict[str, str]:
    """Return each published file and its digest; SystemExit unless they are exactly what the verdict is about."""
    if current_digest(verdict) != written_digest(verdict) or not (told := read_text(verdict)):
        raise SystemExit(f"{verdict}: not what its step wrote, so that {then}; make {verdict}")
    if unserved := json.loads(told).get("unserved"):
        raise SystemExit(f"{', '.join(unserved)}: never served here (ACCEPT=unserved), so that {then}")
    right: dict[str, str] = json.loads(told)["files"]
    here: dict[str, str] = {}
    for model in list_models(repository):
        here |= hash_content(repository, model)
    if not here:
        raise SystemExit(f"{repository}: no models there; make repository")
    for path in sorted(here.keys() | right.keys()):
        if here.get(path) != right.get(path):
            there = "is not there" if path not in here else "is not what the verdict was passed on"
            raise SystemExit(f"{repository}/{path} {there}, so that {then}; make repository")
    return here


def list_models(repository: str) -> list[str]:
    """Return the names of the published models."""
    return sorted(path.name for path in Path(repository).glob("*") if path.is_dir())
