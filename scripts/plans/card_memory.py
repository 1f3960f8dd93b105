"""Print the largest batch of each plan that fits the memory of each kind of GPU.

    python -m scripts.plans.card_memory CARDS.yaml FLEET.yaml 'a100 l4' \\
        build/checks/vit.rtx.json=convertation/vit/config.pbtxt ...

The kinds of GPU are those named, or all in FLEET.yaml.  A plan needs memory for its engine, the activations of its
profile's largest batch (both as scripts/plans/build_rtx.py found them), and an input of that batch.
Exit status 1 if the max_batch_size of a config.pbtxt does not fit a GPU.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from scripts.serve.model_config import read_config

FLOAT32 = 4  # bytes of each number of an input
ECC = 15 / 16  # the share of the memory that error correction leaves on T4, A10, L4, L40S
SPARE = 1 << 30  # bytes for the CUDA context, the driver and the libraries of Triton and TensorRT; an estimate
MANY = 1000  # samples; a larger number, as heads have, is printed as "1000 or more"


class Plan(NamedTuple):
    """The memory that one model's plan needs, in bytes, and the max_batch_size that its config promises."""

    name: str
    config: str
    promised: int
    engine: int
    sample: float

    def count_bytes(self, batch: int) -> float:
        return self.engine + batch * self.sample


def read_plan(record: str, config: str) -> Plan:
    """Return the plan that a record describes, with the max_batch_size of its config.pbtxt."""
    return describe_plan(json.loads(Path(record).read_text()), record, config, read_config(Path(config)).max_batch_size)


def describe_plan(found: dict[str, Any], record: str, config: str, promised: int) -> Plan:
    """Return the plan; activations grow in proportion to the batch (measured: docs/plans.md)."""
    sample = found["activation_bytes"] / max(found["profile"]["batch"]) + FLOAT32 * math.prod(found["profile"]["input"])
    return Plan(Path(record).name.removesuffix(".rtx.json"), config, promised, found["engine_bytes"], sample)


def count_usable_bytes(memory: float) -> float:
    """Return the bytes that plans may use of a GPU that is sold with `memory` GiB."""
    return memory * (1 << 30) * ECC - SPARE


def find_largest_batch(plan: Plan, plans: list[Plan], memory: float) -> int:
    """Return the largest batch of a plan that fits a GPU beside the other plans; 0 if none fits."""
    others = sum(other.count_bytes(other.promised) for other in plans if other.name != plan.name)
    return max(0, math.floor((count_usable_bytes(memory) - others - plan.engine) / plan.sample))


def main(cards_file: str, fleet_file: str, kinds: str, *pairs: str) -> None:
    cards = yaml.safe_load(Path(cards_file).read_text())
    named = kinds.split() or sorted(set(yaml.safe_load(Path(fleet_file).read_text())) - {"common"})
    if unknown := [kind for kind in named if kind not in cards]:
        raise SystemExit(
            f"{cards_file}: no {', '.join(unknown)}; expected a line for each kind of GPU, such as\n"
            f'{unknown[0]}: {{capability: "8.6", memory: 24}}'
        )
    plans = [read_plan(*pair.split("=")) for pair in pairs]
    found = []
    print(f"\n{'GPU':<12}{'memory':<10}" + "".join(f"{plan.name + ', at most':<22}" for plan in plans))
    for kind in named:
        memory = cards[kind]["memory"]
        most = {plan: find_largest_batch(plan, plans, memory) for plan in plans}
        shown = [batch if batch < MANY else f"{MANY} or more" for batch in most.values()]
        print(f"{kind:<12}{f'{memory} GiB':<10}{''.join(f'{batch:<22}' for batch in shown)}".rstrip())
        found += [
            f"{plan.config}: max_batch_size is {plan.promised}; the memory of {kind} ({memory} GiB) is enough for "
            f"{batch or 'none'}:\n"
            "lower it and `batch` in convertation/models.yaml, or use a GPU with more memory"
            for plan, batch in most.items()
            if plan.promised > batch
        ]
    if found:
        raise SystemExit("\n".join(["", *found]))
    print("each max_batch_size fits each kind of GPU")


if __name__ == "__main__":
    main(*sys.argv[1:])
