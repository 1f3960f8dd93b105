"""Let the running Triton take the models that were published since it last did: scripts/deploy/reload.py REPOSITORY

Each changed model is loaded: Triton loads it beside the old one, which answers until the new one can; a model that
does not load leaves the old one serving. A model that is no longer published is unloaded.
"""

import fcntl
import hashlib
import json
import sys
import time
import urllib.error

from scripts.deploy.docker_engine import inspect_object
from scripts.deploy.image import list_requirements
from scripts.deploy.stack import SERVING, ask_container, find_container, identify_folder, read_index
from scripts.publish.publish import hash_content
from scripts.publish.vouch import list_models
from scripts.steps.records import lock_file, read_text, write_text


def reload_models(repository: str) -> None:
    """Print for each model whether it was taken and is READY; SystemExit at the first that cannot be."""
    if not (identity := find_container()):
        raise SystemExit("no tritonserver runs here; make up")
    labels = inspect_object("container", identity)["Config"]["Labels"]
    if "chest.repository" not in labels:
        raise SystemExit("tritonserver serves the models of its image; make image, then make up IMAGE=…")
    if labels["chest.repository"] != identify_folder(repository):
        raise SystemExit(f"tritonserver serves another folder than {repository}; make up")
    told = json.loads(read_text(SERVING) or "{}")
    took = dict(told.get("models", {})) if told.get("container") == identity else {}
    with lock_file("publish", fcntl.LOCK_SH):  # a model's files must not change while it loads
        if labels.get("chest.requirements") != hashlib.sha256(list_requirements(repository)).hexdigest():
            raise SystemExit("what bpr_model requires has changed, and is installed when the container starts; make up")
        # The ViT first: it needs the most memory, and where it does not load the heads stay those that belong to it
        networks: list[float] = []  # when each of them was begun to be loaded
        here = sorted(list_models(repository), key=lambda name: (not name.startswith("vit_"), name))
        for model in [*here, *sorted(list_ready(identity) - set(here))]:
            files = hash_content(repository, model)
            if not files:
                request_model(identity, model, "unload")
                took.pop(model, None)
                print(f"{model}: no longer published, unloaded", flush=True)
            elif took.get(model) == files:
                print(f"{model}: unchanged, {'READY' if model in list_ready(identity) else 'not loaded'}", flush=True)
            else:
                started = time.monotonic()
                request_model(identity, model, "load")
                if model not in list_ready(identity):
                    raise SystemExit(f"{model}: loaded, and yet not READY; make logs")
                took[model] = files
                print(f"{model}: READY, taken in {time.monotonic() - started:.1f} s", flush=True)
                if not model.startswith("bpr_"):  # whose answers go to no other model
                    networks.append(started)
            write_text(SERVING, json.dumps({"container": identity, "models": took}))
    if len(networks) > 1:
        print(warn_of_two_sets(time.monotonic() - networks[0]), flush=True)


def warn_of_two_sets(seconds: float) -> str:
    """Return what a client saw during the last `seconds`: Triton exchanges one model after another, not a set."""
    now = time.time()
    start, end = (time.strftime("%H:%M:%S", time.localtime(moment)) for moment in (now - seconds, now))
    return (
        f"every request was answered meanwhile; but from {start} to {end} ({seconds:.1f} s) a new ViT and an old head\n"
        "may have answered one study: ask again for what was asked then"
    )


def list_ready(identity: str) -> set[str]:
    """Return the models that answer now."""
    return {model["name"] for model in read_index(identity) if model.get("state") == "READY"}


def request_model(identity: str, model: str, what: str) -> None:
    """Ask Triton to load or unload a model; SystemExit with its own reason if it does not."""
    try:
        ask_container(identity, f"/v2/repository/models/{model}/{what}", b"{}")
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace").strip()
        raise SystemExit(f"{model}: not taken, what was loaded before goes on: {said}\nmake logs tells more") from None


if __name__ == "__main__":
    try:
        reload_models(sys.argv[1])
    except OSError as error:
        raise SystemExit(f"tritonserver does not answer ({error}); make logs") from None
