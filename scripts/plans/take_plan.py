"""Take a plan that was built on another machine, if its records say that it fits. Standard library only.

    python3 -sESB -m scripts.plans.take_plan --gpu sm89 --tensorrt 10.1.0.27 build/brought/sm89/vit.json REQUEST.json \
        TOLERANCE.json build/plan/sm89/vit.plan OUT

It fits if it was built from the same ONNX graph with the same options, by the same TensorRT, for the GPU of its folder;
if its comparison with ONNX Runtime is within this project's tolerance; and if it is the file that its records describe.
The records, vit.json and vit.check.json beside it, are copied, too.
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from scripts.steps.records import hash_file


def explain_refusal(
    plan: Path, request: dict[str, Any], tolerance: dict[str, float], folder: str, tensorrt: str
) -> str:
    """Return why a plan does not fit, with its value and ours; "" if it fits."""
    record, check = read_record(plan.with_suffix(".json")), read_record(plan.with_suffix(".check.json"))
    if record["tensorrt"] != tensorrt:
        return (
            f"it was built by TensorRT {record['tensorrt']}, the images here have {tensorrt}; use the same NGC_RELEASE"
        )
    if (built := "sm" + record["compute_capability"].replace(".", "")) != folder:
        return f"it was built for {built}, its folder says {folder}; put it into the folder of its GPU"
    for key, value in request.items():
        if record["request"].get(key) != value:
            its, ours = shorten_digest(record["request"].get(key)), shorten_digest(value)
            return f"its {key} is {its}, ours is {ours}; build it from the same files"
    digest = hash_file(str(plan))
    for name, told in (("record", record), ("comparison", check)):
        if told["plan_sha256"] != digest:
            return f"its sha256 is {digest[:12]}, its {name} is of {told['plan_sha256'][:12]}; copy the folder again"
    for key in ["gpu", *(key for key in ("cosine", "probability") if key in tolerance)]:
        value, allowed = check["difference" if key == "gpu" else key], tolerance[key]
        if not (value >= allowed if key == "cosine" else value <= allowed):
            return f"its comparison gave {key} {value:.3g}, the tolerance of convertation/models.yaml is {allowed:g}"
    return ""


def read_record(path: Path) -> Any:
    """Return the content of a record; SystemExit if it is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise SystemExit(
            f"{path}: not there; copy a plan together with the records that make trt wrote beside it"
        ) from None
    except ValueError:
        raise SystemExit(f"{path}: not JSON; copy the folder again") from None


def shorten_digest(value: object) -> str:
    """Return the first 12 characters of a text, such as a digest; any other value as JSON."""
    return value[:12] if isinstance(value, str) else json.dumps(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--tensorrt", required=True)
    for name in "brought", "request", "tolerance", "plan", "out":
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    request, tolerance = read_record(given.request), read_record(given.tolerance)
    given.brought = Path(read_record(given.brought)["plan"])
    try:
        reason = explain_refusal(given.brought, request, tolerance, given.gpu, given.tensorrt)
    except (LookupError, TypeError, AttributeError):
        reason = f"its records lack entries that make trt writes; see {given.brought.with_suffix('.json')}"
    if reason:
        raise SystemExit(f"{given.brought}: refused, {reason}")
    subprocess.run(["cp", "--reflink=auto", given.brought, given.out], check=True)
    given.plan.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ".json", ".check.json":
        shutil.copyfile(given.brought.with_suffix(suffix), given.plan.with_suffix(suffix))


if __name__ == "__main__":
    main()
