"""The largest batch that fits a GPU follows from the memory that TensorRT needs; a config with a larger one fails."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from scripts.plans.card_memory import Plan, count_usable_bytes, describe_plan, find_largest_batch

GIB = 1 << 30
CARDS = ROOT / "scripts/plans/cards.yaml"
# What TensorRT for RTX 1.7.1 measured for the ViT at full size: build/checks/vit.rtx.json, vit.fp16.rtx.json
FP32 = {"engine_bytes": 749_682_932, "activation_bytes": 1_419_116_544}
FP16 = {"engine_bytes": 391_807_244, "activation_bytes": 945_782_784}
PROFILE = {"profile": {"input": [1, 240, 480, 480], "batch": [1, 2, 4]}}


def vit(found: dict[str, int], promised: int = 4) -> Plan:
    return describe_plan(found | PROFILE, "build/checks/vit.rtx.json", "convertation/vit/config.pbtxt", promised)


def test_the_find_largest_batch_fits_and_one_more_does_not() -> None:
    plan = vit(FP32)
    for memory in (8, 16, 24, 48, 80):
        most = find_largest_batch(plan, [plan], memory)
        assert plan.count_bytes(most) <= count_usable_bytes(memory) < plan.count_bytes(most + 1)


def test_a_sample_takes_its_input_and_its_activations() -> None:
    assert vit(FP32).sample == FP32["activation_bytes"] / 4 + 4 * 240 * 480 * 480


def test_the_other_plans_have_their_part_of_the_card() -> None:
    big, small = Plan("vit", "", 4, GIB, GIB), Plan("head", "", 8, GIB, GIB / 8)
    alone, beside = find_largest_batch(big, [big], 24), find_largest_batch(big, [big, small], 24)
    assert alone - beside == 2


def test_a_card_that_does_not_hold_the_weights_holds_none() -> None:
    plan = Plan("vit", "", 4, 40 * GIB, GIB)
    assert find_largest_batch(plan, [plan], 24) == 0


def test_the_page_tells_what_follows() -> None:
    rows = re.findall(r"^\| (\d+) GB \| (\d+) \| (\d+) \|$", (ROOT / "docs/plans.md").read_text(), re.MULTILINE)
    both = [vit(FP32), vit(FP16)]
    expected = [
        (str(size), *(str(find_largest_batch(plan, [plan], size)) for plan in both)) for size in (8, 16, 24, 48, 80)
    ]
    assert rows == expected


def test_each_kind_of_gpu_in_the_fleet_is_known() -> None:
    cards = yaml.safe_load(CARDS.read_text())
    assert set(yaml.safe_load((ROOT / "scripts/plans/fleet.yaml").read_text())) - {"common"} <= set(cards)
    for name, card in cards.items():
        assert re.fullmatch(r"\d+\.\d", card["capability"]), name
        assert 8 <= card["memory"] <= 200, name


def tell(folder: Path, batch: list[int], promised: int, kinds: str, **cards: Any) -> "subprocess.CompletedProcess[str]":
    """Run the command on a record of the ViT with these batches, and on a config with this max_batch_size."""
    found = FP32 | {"activation_bytes": FP32["activation_bytes"] // 4 * max(batch)}
    (folder / "vit.rtx.json").write_text(json.dumps(found | {"profile": PROFILE["profile"] | {"batch": batch}}))
    config = (ROOT / "convertation/vit/config.pbtxt").read_text()
    (folder / "config.pbtxt").write_text(re.sub(r"max_batch_size: \d+", f"max_batch_size: {promised}", config))
    (folder / "cards.yaml").write_text(json.dumps(yaml.safe_load(CARDS.read_text()) | cards))
    command = [sys.executable, "-m", "scripts.plans.card_memory", folder / "cards.yaml",
               ROOT / "scripts/plans/fleet.yaml", kinds, f"{folder}/vit.rtx.json={folder}/config.pbtxt"]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_what_fits_is_told_of_each_kind_in_the_fleet(tmp_path: Path) -> None:
    run = tell(tmp_path, [1, 2, 4], 4, "")
    assert run.returncode == 0, run.stderr
    assert re.search(r"^t4 +16 GiB +24$", run.stdout, re.MULTILINE)
    assert run.stdout.endswith("each max_batch_size fits each kind of GPU\n")


def test_a_config_that_promises_more_than_its_card_holds_is_a_finding(tmp_path: Path) -> None:
    run = tell(tmp_path, [1, 2, 32], 32, "t4 l40s")
    assert run.returncode == 1
    assert "config.pbtxt: max_batch_size is 32; the memory of t4 (16 GiB) is enough for 24" in run.stderr
    assert "l40s" not in run.stderr
    assert "fits each kind" not in run.stdout


def test_a_small_card_of_the_fleet_is_a_finding(tmp_path: Path) -> None:
    run = tell(tmp_path, [1, 2, 4], 4, "small", small={"capability": "8.6", "memory": 3})
    assert run.returncode == 1
    assert "small (3 GiB) is enough for 2:" in run.stderr


@pytest.mark.parametrize("kinds", ["bigbox", "l4 bigbox"])
def test_an_unknown_card_is_asked_for(tmp_path: Path, kinds: str) -> None:
    run = tell(tmp_path, [1, 2, 4], 4, kinds)
    assert run.returncode == 1
    assert "cards.yaml: no bigbox; expected a line for each kind of GPU, such as\nbigbox: {capability:" in run.stderr
