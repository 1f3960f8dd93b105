"""Let the running Triton load the models that were published since the last time: scripts/deploy/reload.py REPOSITORY

Triton loads each changed model beside the old one, which answers until the new one is ready. If the new model does not
load, the old one goes on. A model that is no longer published is unloaded.
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
from scripts.publish.published import hash_content
from scripts.publish.vouch import list_models
from scripts.steps.records import lock_file, read_text, write_text


def reload_models(repository: str) -> None:
    """Load each changed model and print whether it is READY; SystemExit at the first model that does not load."""
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
            raise SystemExit(
                "bpr_model's requirements have changed; they are installed when the container starts; make up"
            )
        # The ViT first: it needs the most memory, and if it does not load, the old heads still fit the old ViT
        networks: list[float] = []  # time at which the load of each began
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
                    raise SystemExit(f"{model}: loaded, but not READY; make logs")
                took[model] = files
                print(f"{model}: READY, loaded in {time.monotonic() - started:.1f} s", flush=True)
                if not model.startswith("bpr_"):  # no other model reads bpr's answers
                    networks.append(started)
            write_text(SERVING, json.dumps({"container": identity, "models": took}))
    if len(networks) > 1:
        print(warn_of_two_sets(time.monotonic() - networks[0]), flush=True)


def warn_of_two_sets(seconds: float) -> str:
    """Return a warning for the last `seconds`: Triton exchanges models one by one, not as a set."""
    now = time.time()
    start, end = (time.strftime("%H:%M:%S", time.localtime(moment)) for moment in (now - seconds, now))
    return (
        f"every request was answered meanwhile; but from {start} to {end} ({seconds:.1f} s) a new ViT and an old head\n"
        "may have answered one study: ask again for the studies of that time"
    )


def list_ready(identity: str) -> set[str]:
    """Return the names of the models that are READY."""
    return {model["name"] for model in read_index(identity) if model.get("state") == "READY"}


def request_model(identity: str, model: str, what: str) -> None:
    """Ask Triton to load or unload a model (`what`); SystemExit with its reason if it refuses."""
    try:
        ask_container(identity, f"/v2/repository/models/{model}/{what}", b"{}")
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace").strip()
        raise SystemExit(
            f"{model}: Triton refuses to {what} it, and serves what it served before: {said}\nfor more: make logs"
        ) from None


if __name__ == "__main__":
    try:
        reload_models(sys.argv[1])
    except OSError as error:
        raise SystemExit(f"tritonserver does not answer ({error}); make logs") from None
