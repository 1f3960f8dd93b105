"""`make trt-fleet` on a real Slurm with four nodes that declare a GPU; a stand-in for trtexec runs in Docker.

Slurm and the stand-ins are explained in tests/slurm.py, tests/gpu_stand_in.py and tests/trtexec_stand_in.py.
"""

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Project, kill
from gpu_stand_in import docker_gpus, import_image, remove_image
from slurm import PATH as WITH_DAEMONS
from slurm import PROGRAMS, Slurm, until

from scripts.steps import records

CAPABILITY = {"a100": "8.0", "l4": "8.9", "rtx3090": "8.6", "a10": "8.6"}
KNOBS = ("REGISTRY=chest-fleet-test/", "NGC_RELEASE=stand-in-test", "MODEL=binary")
IMAGE = "chest-fleet-test/nvcr.io/nvidia/tensorrt:stand-in-test-py3"
KINDS = "common: {mem: 100M, time: 1:00:00}\n" + "".join(
    f"{kind}: {{gres: 'gpu:{kind}:1'}}\n" for kind in (*CAPABILITY, "h100")
)


@pytest.fixture(scope="module")
def slurm(docker_engine: None) -> Iterator[Slurm]:
    if lacking := [name for name in PROGRAMS if not shutil.which(name, path=WITH_DAEMONS)]:
        pytest.skip(f"{', '.join(lacking)}: not installed; apt install slurm-wlm munge")
    slurm = Slurm(list(CAPABILITY))
    try:
        slurm.start()
        import_image(IMAGE)
        yield slurm
    finally:
        slurm.stop()
        remove_image(IMAGE)


@pytest.fixture(scope="module")
def published(built: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The tiny project, built and published, with the kinds of GPU of this Slurm."""
    project = Project(tmp_path_factory.mktemp("fleet") / "project")
    shutil.copytree(built.path, project.path, symlinks=True, copy_function=shutil.copy)
    (project.path / "scripts/plans/fleet.yaml").write_text(KINDS)
    return project


class Checkout(Project):
    """A copy of the project that every node sees; it runs make trt-fleet."""

    def __init__(self, path: Path, slurm: Slurm) -> None:
        super().__init__(path)
        self.slurm = slurm

    def fleet(self, gpus: str, *knobs: str) -> "subprocess.Popen[str]":
        return self.start("trt-fleet", f"GPUS={gpus}", *KNOBS, *knobs, SLURM_CONF=str(self.slurm.conf))

    def built(self, gpus: str) -> dict[str, str]:
        """Run make trt-fleet, which must succeed; return the table: the rest of each row, by kind."""
        return self.table(self.fleet(gpus), 0)

    def failed(self, gpus: str) -> dict[str, str]:
        return self.table(self.fleet(gpus), 2)

    def table(self, run: "subprocess.Popen[str]", status: int) -> dict[str, str]:
        self.said = run.communicate()[0]
        assert run.returncode == status, self.said
        assert "Traceback" not in self.said
        lines = self.said.partition("kind ")[2].splitlines()[1:]
        return {words[0]: " ".join(words[1:]) for words in map(str.split, lines) if words and words[0] in CAPABILITY}

    def plans(self) -> set[str]:
        return {str(path.relative_to(self.path / "build/plan")) for path in self.path.glob("build/plan/*/*.plan")}

    def log(self, kind: str) -> str:
        return (self.path / f"build/logs/fleet-{kind}.log").read_text()

    def container(self, capability: str) -> str:
        """Return the name that scripts/plans/trtexec.py gives the container that builds the plan of a capability."""
        return f"chest-{hashlib.sha256(str(self.path).encode()).hexdigest()[:6]}-sm{capability}-binary.plan"

    def runs(self, capability: str) -> bool:
        run = subprocess.run(["docker", "ps", "--format={{.Names}}"], capture_output=True, text=True, check=True)
        return self.container(capability) in run.stdout.split()


@pytest.fixture
def checkout(slurm: Slurm, published: Project, tmp_path: Path) -> Iterator[Checkout]:
    shutil.copytree(published.path, tmp_path / "project", symlinks=True, copy_function=shutil.copy)
    for kind in CAPABILITY:
        stand_in(slurm, kind)
    checkout = Checkout((tmp_path / "project").resolve(), slurm)
    yield checkout
    slurm.cancel_all()
    for capability in ("80", "86", "89"):
        subprocess.run(["docker", "rm", "--force", checkout.container(capability)], capture_output=True, check=False)


def stand_in(slurm: Slurm, kind: str, fault: str = "") -> None:
    """Give containers on a node that kind of GPU, and a trtexec with this fault."""
    gpu = f"STAND_IN_GPU=NVIDIA Stand-in {kind}, {CAPABILITY[kind]}, 555.42.06, 24576"
    (slurm.folder / f"{kind}.docker").write_text(docker_gpus(f"--env={shlex.quote(gpu)}", f"--env=STAND_IN={fault}"))


def steps(log: str) -> set[str]:
    """Return the artifacts that a job made and that were not there before."""
    return set(re.findall(r"^(\S+): new$", log, re.MULTILINE))


def test_plans_of_two_kinds_meet_in_one_tree_and_only_what_is_stale_is_submitted_again(checkout: Checkout) -> None:
    assert checkout.built("a100 l4") == {"a100": "sm80 built", "l4": "sm89 built"}
    assert checkout.plans() == {"sm80/binary.plan", "sm89/binary.plan"}
    for kind, folder in (("a100", "sm80"), ("l4", "sm89")):
        plan = f"build/plan/{folder}/binary"
        assert steps(checkout.log(kind)) == {f"{plan}.plan", f"{plan}.check.json"}  # nothing else costs GPU time
        assert json.loads((checkout.path / f"{plan}.json").read_text())["gpu"] == f"NVIDIA Stand-in {kind}"
    jobs = checkout.slurm.jobs()
    assert checkout.built("a100 l4") == {"a100": "sm80 reused", "l4": "sm89 reused"}
    assert set(checkout.slurm.jobs()) == set(jobs)
    (checkout.path / "build/plan/sm89/binary.plan").write_text("damaged")
    assert checkout.built("a100 l4") == {"a100": "sm80 reused", "l4": "sm89 built"}
    assert len(checkout.slurm.jobs()) == len(jobs) + 1


def test_all_plans_are_published_in_one_folder_and_their_comparisons_count(checkout: Checkout) -> None:
    for folder in ("sm80", "sm89"):
        (checkout.path / "build/plan" / folder).mkdir(parents=True)
        (checkout.path / "build/plan" / folder / "binary.plan").touch()
    target = ("gpu=sm80", "tensorrt=10.1.0.27", "FORMAT=both", "PLANS=build/plan", *KNOBS)
    checkout.make("build/plan/binary.config.pbtxt", *target)
    config = (checkout.path / "build/plan/binary.config.pbtxt").read_text()
    pairs = re.findall(r'cc_model_filenames \{\s*key: "(.*)"\s*value: "(.*)"', config)
    assert pairs == [("8.0", "sm80.plan"), ("8.9", "sm89.plan")]
    explained = checkout.make("EXPLAIN=1", "repository", *target)
    verdict = next(line for line in explained.splitlines() if line.startswith("build/checks/verdict.json="))
    compared = re.findall(r"build/plan/(\S+)/binary.check.json=", verdict)
    assert compared == ["sm80", "sm89"]


def test_a_kind_that_fails_is_told_with_its_log_and_alone_done_again(checkout: Checkout) -> None:
    stand_in(checkout.slurm, "l4", "fail")
    assert checkout.failed("a100 l4") == {"a100": "sm80 built", "l4": "failed FAILED, log: build/logs/fleet-l4.log"}
    assert "failed: l4; run the same command again; it repeats only these" in checkout.said
    assert "Could not find any implementation" in checkout.log("l4")
    stand_in(checkout.slurm, "l4")
    jobs = checkout.slurm.jobs()
    assert checkout.built("a100 l4") == {"a100": "sm80 reused", "l4": "sm89 built"}
    assert len(checkout.slurm.jobs()) == len(jobs) + 1


def test_two_kinds_of_one_compute_capability_get_one_plan(checkout: Checkout) -> None:
    table = checkout.built("rtx3090 a10")
    assert sorted(table.values()) == ["sm86 built", "sm86 reused"]
    assert sorted([*steps(checkout.log("rtx3090")), *steps(checkout.log("a10"))]) == [
        "build/plan/sm86/binary.check.json",
        "build/plan/sm86/binary.plan",
    ]


def test_a_node_that_dies_is_a_failure_and_its_kind_is_done_again(checkout: Checkout) -> None:
    stand_in(checkout.slurm, "l4", "hang")
    run = checkout.fleet("l4")
    until(lambda: checkout.runs("89"), "trtexec")
    checkout.slurm.kill_node("l4")
    assert checkout.table(run, 2) == {"l4": "failed NODE_FAIL, log: build/logs/fleet-l4.log"}
    assert checkout.plans() == set()
    checkout.slurm.revive_node("l4")
    stand_in(checkout.slurm, "l4")
    assert checkout.built("l4") == {"l4": "sm89 built"}
    assert not checkout.runs("89")


def test_ctrl_c_cancels_what_it_submitted_running_or_not(checkout: Checkout) -> None:
    stand_in(checkout.slurm, "l4", "hang")
    checkout.slurm.ask("scontrol", "update", "nodename=a100", "state=drain", "reason=test")
    run = checkout.fleet("a100 l4")
    until(lambda: checkout.runs("89"), "trtexec")
    os.killpg(run.pid, signal.SIGINT)
    said = run.communicate()[0]
    checkout.slurm.ask("scontrol", "update", "nodename=a100", "state=resume")
    assert run.returncode != 0
    assert "cancelling " in said
    assert "Traceback" not in said
    until(lambda: not checkout.slurm.active(), "the jobs' end")
    until(lambda: not checkout.runs("89"), "the container's end")
    assert checkout.plans() == set()


def test_a_job_of_a_call_that_was_killed_is_found_and_not_submitted_again(checkout: Checkout) -> None:
    stand_in(checkout.slurm, "l4", "hang")
    first = checkout.fleet("l4")
    until(lambda: checkout.runs("89"), "trtexec")
    kill(first)
    jobs = checkout.slurm.jobs()
    second = checkout.fleet("l4")
    assert second.stdout
    said = next(line for line in second.stdout if "of another call" in line)
    assert said == f"l4: job {checkout.slurm.active()[0]} of another call builds this; waiting for it\n"
    subprocess.run(["docker", "rm", "--force", checkout.container("89")], capture_output=True, check=True)
    assert checkout.table(second, 2) == {"l4": "failed FAILED, log: build/logs/fleet-l4.log"}
    assert set(checkout.slurm.jobs()) == set(jobs)


def test_a_gpu_that_slurm_refuses_is_told_in_its_words_with_the_line(checkout: Checkout) -> None:
    run = checkout.fleet("h100")
    said = run.communicate()[0]
    assert run.returncode != 0
    assert "h100               failed  refused, scripts/plans/fleet.yaml:6" in said
    assert "scripts/plans/fleet.yaml:6: sbatch --mem=100M --time=1:00:00 --gres=gpu:h100:1: sbatch: error:" in said
    assert "Requested node configuration is not available" in said


def test_an_unknown_kind_is_told_with_those_that_are_known(checkout: Checkout) -> None:
    for gpus, told in (("l4 v100", "v100"), ("", "(nothing)")):
        said = checkout.fail("trt-fleet", f"GPUS={gpus}", *KNOBS)
        assert f"GPUS: {told}; expected some of a100 l4 rtx3090 a10 h100, the kinds in scripts/plans/fleet.yaml" in said


def test_without_slurm_the_other_ways_are_told(published: Project, tmp_path: Path) -> None:
    for command in Path("/usr/bin").iterdir():
        if command.name != "sbatch":
            (tmp_path / command.name).symlink_to(command)
    said = published.fail("trt-fleet", "GPUS=a100", *KNOBS, PATH=str(tmp_path))
    assert "sbatch: not found" in said
    assert ".github/workflows/plans.yml" in said
    assert "FORMAT=both PLANS=dir" in said


def test_a_lock_is_open_for_reading_and_writing_as_nfs_demands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with records.lock_file("build/plan/sm86/vit.plan") as file:
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def test_every_kind_that_is_shipped_has_options_of_sbatch() -> None:
    kinds = yaml.safe_load((ROOT / "scripts/plans/fleet.yaml").read_text())
    assert {"a100", "l4", "rtx3090"} <= kinds.keys()
    options = {option for kind in kinds.values() for option in kind}
    assert options == {"gres", "constraint", "time", "cpus-per-task", "mem"}
