"""Push an image that `make image` built, once the user accepts its weights' licences: scripts/deploy/push.py IMAGE"""

import os
import subprocess
import sys

from scripts.deploy.docker_engine import inspect_object, run_docker

LICENCES = """\
{image} holds {kind} weights. Whoever can pull it gets
  CT-CLIP and CT-RATE        CC BY-NC-SA 4.0: name them, no commercial use, share alike
  body part regression       Apache-2.0
  the team's heads           as the team says
  NVIDIA's Triton image      NVIDIA Deep Learning Container License"""


def push_image(image: str) -> None:
    """Run docker push; SystemExit if there is no such image, or it must not be pushed."""
    if not image:
        raise SystemExit("no image is named; make push IMAGE=registry.example/chest-ct-triton:1")
    run_docker("version")
    if not (there := inspect_object("image", image)):
        raise SystemExit(f"{image} does not exist here; make image IMAGE={image}")
    kind = (there["Config"].get("Labels") or {}).get("chest.weights")
    if not kind:
        raise SystemExit(f"{image} was not made by `make image`, so its content is unknown; not pushed")
    if kind == "synthetic":
        raise SystemExit(f"{image} holds synthetic weights, which answer nonsense; not pushed")
    print(LICENCES.format(image=image, kind=kind), flush=True)
    if os.environ.get("ACCEPT") != "licences":
        raise SystemExit(f"not pushed; if these licences allow it: make push IMAGE={image} ACCEPT=licences")
    if subprocess.run(["docker", "push", image]).returncode:
        raise SystemExit(f"{image} was not pushed; see Docker's message above (perhaps: docker login)")


if __name__ == "__main__":
    push_image(sys.argv[1])
