"""Tell what each card holds of the plans: python -m scripts.plans.card_memory CARDS.yaml FLEET.yaml 'a100 l4'
build/checks/vit.rtx.json=convertation/vit/config.pbtxt ...

The kinds of GPU: those named, or all in FLEET.yaml.  A plan asks for its engine, the activations of its profile's
largest batch, both as TensorRT for RTX found them (scripts/plans/build_rtx.py), and the input of as many samples.
Exit status 1 where a config.pbtxt promises more than a card holds.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from scripts.serve.model_config import read_config

FLOAT32 = 4  # bytes of each number of an input
ECC = 15 / 16  # of the memory is left where error correction has its part in it, as on T4, A10, L4, L40S
SPARE = 1 << 30  # bytes for the CUDA context, the libraries of Triton and TensorRT, and the driver; an estimate
MANY = 1000  # samples; beyond, a head's number says nothing


class Plan(NamedTuple):
    """What one model's plan asks for, in bytes, and what its config promises."""

    name: str
    config: str
    promised: int
    engine: int
    sample: float

    def needs(self, batch: int) -> float:
        return self.engine + batch * self.sample


def read_plan(record: str, config: str) -> Plan:
    """Return the plan of a record, with the promise of its config.pbtxt."""
    return describe_plan(json.loads(Path(record).read_text()), record, config, read_config(Path(config)).max_batch_size)


def describe_plan(found: dict[str, Any], record: str, config: str, promised: int) -> Plan:
    """Activations grow with the batch (measured: docs/plans.md), so the largest batch tells what one sample takes."""
    sample = found["activation_bytes"] / max(found["profile"]["batch"]) + FLOAT32 * math.prod(found["profile"]["input"])
    return Plan(Path(record).name.removesuffix(".rtx.json"), config, promised, found["engine_bytes"], sample)


def usable_bytes(memory: float) -> float:
    """Return the bytes that plans may take of a card sold with `memory` GiB."""
    return memory * (1 << 30) * ECC - SPARE


def largest_batch(plan: Plan, plans: list[Plan], memory: float) -> int:
    """Return the largest max_batch_size, and profile, of a plan on a card beside the others; 0 if none fits."""
    others = sum(other.needs(other.promised) for other in plans if other.name != plan.name)
    return max(0, math.floor((usable_bytes(memory) - others - plan.engine) / plan.sample))


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
    print(f"\n{'card':<12}{'memory':<10}" + "".join(f"{plan.name + ', at most':<22}" for plan in plans))
    for kind in named:
        memory = cards[kind]["memory"]
        most = {plan: largest_batch(plan, plans, memory) for plan in plans}
        shown = [batch if batch < MANY else f"{MANY} or more" for batch in most.values()]
        print(f"{kind:<12}{f'{memory} GiB':<10}{''.join(f'{batch:<22}' for batch in shown)}".rstrip())
        found += [
            f"{plan.config}: max_batch_size {plan.promised}, of whose plan {kind} ({memory} GiB) holds "
            f"{batch or 'none'}; expected no more:\n"
            "lower it and `batch` in convertation/models.yaml, or use a larger card"
            for plan, batch in most.items()
            if plan.promised > batch
        ]
    if found:
        raise SystemExit("\n".join(["", *found]))
    print("each promise of max_batch_size fits each card")


if __name__ == "__main__":
    main(*sys.argv[1:])
