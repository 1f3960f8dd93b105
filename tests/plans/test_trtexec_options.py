"""Options for trtexec: those that it has are passed on, the others are refused with a sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.plans.trtexec_options import FLAGS, OLD, UNSERVABLE, VALUED, check_options, split_options

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--noSuchOption", "has no such option"),
        ("--verbose", "already given"),
        ("--directIO --directIO", "already given"),
        ("--builderOptimizationLevel", "expected a value: --builderOptimizationLevel=…"),
        ("--builderOptimizationLevel=", "expected a value"),
        ("--directIO=1", "takes no value"),
        ("--workspace=4096", "use instead: --memPoolSize=workspace:N"),
        ("--maxBatch=8", "TensorRT 10.1 no longer has it"),
        ("--stripWeights", "no weights"),
        ("--weightless", "no weights"),
        ("--buildDLAStandalone", "which is no plan"),
        ("--fp16", "PRECISION=fp32, tf32 or fp16"),
        ("4", "expected further options"),
        ("'", "No closing quotation"),
    ],
)
def test_an_option_without_a_plan_to_serve_is_refused(flags: str, expected: str) -> None:
    with pytest.raises(SystemExit, match="TRTEXEC_FLAGS") as error:
        check_options(split_options(flags))
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "flags",
    ["", "--directIO --builderOptimizationLevel=4", "--memPoolSize=workspace:4096", "--sparsity", "--sparsity=force",
     "--plugins=a.so --plugins=b.so", "--hardwareCompatibilityLevel=ampere+"],
)  # fmt: skip
def test_options_that_trtexec_has_are_passed_on(flags: str) -> None:
    check_options(split_options(flags))


def test_options_for_another_release_are_left_to_its_trtexec() -> None:
    check_options(["--newOption", "--versionCompatible"], name="26.08")


def test_the_lists_agree() -> None:
    assert not FLAGS & VALUED
    assert not set(OLD) & (FLAGS | VALUED)
    assert set(UNSERVABLE) <= FLAGS | VALUED


def test_the_command_prints_a_sentence_and_exits_with_1() -> None:
    command = [sys.executable, "-m", "scripts.plans.trtexec_options", "--stripWeights"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (
        1,
        "TRTEXEC_FLAGS: --stripWeights; its plan has no weights; leave it out\n",
    )
