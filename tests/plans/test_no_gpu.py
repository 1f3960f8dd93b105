"""What needs plans ends with a sentence where no GPU can be asked, whatever other knobs say, and publishes nothing."""

import pytest
from conftest import Project

LACKING = {"DOCKER_HOST": "unix:///absent"}


@pytest.mark.parametrize("more", [(), ("CHECK=1",), ("DRY=1",)], ids=["alone", "CHECK=1", "DRY=1"])
@pytest.mark.parametrize("goal", [("repository", "FORMAT=plan"), ("repository", "FORMAT=both"), ("verify-gpu",)])
def test_nothing_is_published_without_the_plans_that_were_asked_for(
    stand_ins: Project, goal: tuple[str, ...], more: tuple[str, ...]
) -> None:
    before = stand_ins.published()
    assert "no plan was made; what is lacking stands above" in stand_ins.fail(*goal, *more, **LACKING)
    assert stand_ins.published() == before


def test_a_dry_run_of_plans_says_what_prints_the_commands(stand_ins: Project) -> None:
    assert "make -n asks for no GPU; make trt DRY=1 prints the commands" in stand_ins.fail("-n", "trt", **LACKING)


def test_status_of_plans_says_what_make_would_say(stand_ins: Project) -> None:
    assert "no plan was made; what is lacking stands above" in stand_ins.fail("status", "FORMAT=both", **LACKING)
    stand_ins.make("status", **LACKING)
