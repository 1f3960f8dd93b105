"""Plans that a stand-in for trtexec builds in a container: Docker is real, the GPU and TensorRT are not.

The stand-ins are explained in tests/gpu_stand_in.py and tests/trtexec_stand_in.py.  This file is long because all its
tests share the two Docker images, which take long to import.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import trtexec_stand_in
from conftest import ROOT, Project, announced
from gpu_stand_in import KNOBS, TENSORRT_IMAGE, TRITON_IMAGE, docker_gpus, import_image, remove_image
from triton_models import ENTRY, linear

from scripts.plans import compare_plan, expected, plan, plan_request, trtexec
from scripts.serve.check_repository import STAND_IN_PLAN

pytestmark = pytest.mark.usefixtures("docker_engine")

PYTHON = [sys.executable, "-sESB", "-m"]
PLAN = "build/plan/sm86/binary.plan"
TOLERANCE = {"gpu": 2e-3, "probability": 1e-3}


@pytest.fixture(scope="module")
def images() -> Iterator[None]:
    for name in (TENSORRT_IMAGE, TRITON_IMAGE):
        import_image(name)
    yield
    for name in (TENSORRT_IMAGE, TRITON_IMAGE):
        remove_image(name)


@pytest.fixture
def desk(images: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one small ONNX file and the request for its plan."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENSORRT_IMAGE", TENSORRT_IMAGE)
    monkeypatch.setenv("DOCKER_GPUS", docker_gpus())
    Path("scripts").symlink_to(ROOT / "scripts")
    Path("build").mkdir()
    Path(".make/seen").mkdir(parents=True)
    onnx.save(linear(), "model.onnx")
    ask()
    return tmp_path


def ask(precision: str = "fp32", flags: str = "") -> None:
    request = plan_request.make_request(Path("model.onnx"), ENTRY, precision, flags)
    Path("request.json").write_text(json.dumps(request))
    Path("entry.json").write_text(json.dumps(ENTRY))


def words(*more: str, folder: str = "sm86", tensorrt: str = "10.1.0.27") -> list[str]:
    return [
        *PYTHON,
        "scripts.plans.plan",
        "--gpu",
        folder,
        "--tensorrt",
        tensorrt,
        "request.json",
        "model.onnx",
        PLAN,
        "out.plan",
    ]


def build(fault: str = "", **target: str) -> tuple[int, str]:
    """Build the plan as a step of make does; return the status and the output."""
    environment = os.environ | ({"DOCKER_GPUS": docker_gpus(f"--env=STAND_IN={fault}")} if fault else {})
    run = subprocess.run(
        words(**target), env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert "Traceback" not in run.stdout
    return run.returncode, run.stdout


def built(fault: str = "") -> str:
    status, said = build(fault)
    assert status == 0, said
    return said


def refused(fault: str = "", **target: str) -> str:
    status, said = build(fault, **target)
    assert status != 0, said
    assert not Path("out.plan").exists()
    assert not Path("out.plan.d").exists()
    return said


# One plan


def test_a_plan_has_a_record_of_what_it_was_made_of_by_and_on(desk: Path) -> None:
    built()
    record = json.loads(Path("build/plan/sm86/binary.json").read_text())
    assert record["plan_sha256"] == plan.hash_file("out.plan")
    assert record["request"] == json.loads(Path("request.json").read_text())
    assert record["request"]["profile"] == {"input": [8], "batch": [1, 4, 8]}
    assert (record["gpu"], record["compute_capability"]) == ("NVIDIA Stand-in RTX 3090", "8.6")
    assert (record["tensorrt"], record["driver"]) == ("10.1.0.27", "555.42.06")
    assert record["image_id"].startswith("sha256:")
    assert record["build_seconds"] > 0
    assert record["latency_ms"].keys() >= {"median", "mean", "percentile(99%)"}


def test_the_command_is_the_hand_run_one_in_a_container(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_GPUS")
    monkeypatch.setenv("PATH", "/nonexistent")
    arguments = [*PYTHON, "scripts.plans.plan", "--print", "--gpu", "sm86", "entry.json", "model.onnx", PLAN]
    said = subprocess.run(arguments, text=True, capture_output=True, check=True).stdout.splitlines()
    here, me = desk.resolve(), f"{os.getuid()}:{os.getgid()}"
    scratch = f"{here}/.make/out/{PLAN}.d"
    assert said[:2] == [f"# {PLAN}", f"mkdir -p .make/out/{PLAN}.d"]
    assert said[2] == (
        f"docker run --rm --name={trtexec.name_container(PLAN)} --network=none --user={me} --gpus all "
        f"--env=CUDA_DEVICE_ORDER=PCI_BUS_ID --mount=type=bind,source={here}/model.onnx,target=/in/model.onnx,readonly "
        f"--mount=type=bind,source={scratch},target=/out {TENSORRT_IMAGE} trtexec --onnx=/in/model.onnx "
        "--saveEngine=/out/binary.plan --timingCacheFile=/out/timing.cache --minShapes=input:1x8 --optShapes=input:4x8 "
        "--maxShapes=input:8x8 --noTF32 --verbose --device=0"
    )


def test_printed_commands_can_be_pasted(desk: Path) -> None:
    arguments = [*PYTHON, "scripts.plans.plan", "--print", "--gpu", "sm86", "entry.json", "model.onnx", PLAN]
    script = subprocess.run(arguments, text=True, capture_output=True, check=True).stdout
    said = subprocess.run(["bash", "-e"], input=script, text=True, capture_output=True, check=True).stdout
    assert "&&&& PASSED" in said
    assert Path(f".make/out/{PLAN}.d/binary.plan").stat().st_uid == os.getuid()


FAULTS = [
    ("fail", "Could not find any implementation"),
    ("killed", "container was killed"),
    ("silent", "trtexec failed"),
    ("memory", "the GPU has too little free memory"),
    ("driver", "driver is too old for this image; install R555 or newer"),
]


@pytest.mark.parametrize(("fault", "expected"), FAULTS)
def test_a_failure_of_trtexec_is_explained_and_nothing_is_left(desk: Path, fault: str, expected: str) -> None:
    said = refused(fault)
    assert expected in said
    assert "whole log: build/logs/trtexec-sm86-binary.plan.log" in said
    assert not Path("build/plan/sm86/binary.json").exists()


def test_an_option_that_another_releases_trtexec_lacks_is_refused_by_it(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NGC_RELEASE", "25.01")
    ask(flags="--noSuchOption")
    assert "Unknown option: --noSuchOption" in refused()


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--fp16", "another knob sets the precision: PRECISION=fp32, tf32 or fp16"),
        ("--noTF32", "another knob sets the precision: PRECISION=fp32, tf32 or fp16"),
        ("--maxShapes=input:16x8", "expected further options"),
        ("fp16", "expected further options"),
    ],
)
def test_options_that_would_make_the_record_wrong_are_refused(desk: Path, flag: str, expected: str) -> None:
    with pytest.raises(SystemExit, match=expected):
        ask(flags=flag)


def test_a_profile_that_does_not_fit_the_onnx_file_is_refused(desk: Path) -> None:
    request = plan_request.make_request(Path("model.onnx"), ENTRY | {"input": [9]}, "fp32", "")
    Path("request.json").write_text(json.dumps(request))
    assert "do not fit" in refused()


def test_another_gpu_or_tensorrt_is_refused_with_both_named(desk: Path) -> None:
    said = refused(folder="sm89", tensorrt="10.3.0.26")
    assert "is for sm89 and TensorRT 10.3.0.26; this machine builds for sm86 (NVIDIA Stand-in RTX 3090) and" in said
    assert "TensorRT 10.1.0.27" in said


def test_an_fp16_onnx_file_gives_a_plan_whose_layers_are_checked(desk: Path) -> None:
    ask("fp16")
    assert "1 of 1 tensors of its layers are fp16" in built()
    Path("out.plan").unlink()
    assert "asked for fp16, but none of the 1 tensors that TensorRT lists is fp16" in refused("fp32")


# The timing cache


def test_the_timing_cache_is_kept_for_the_next_plan(desk: Path) -> None:
    built()
    cache = Path("build/plan/timing/sm86-10.1.0.27.cache")
    assert cache.read_bytes().startswith(trtexec_stand_in.CACHE)
    built()
    assert f"Loaded {len(trtexec_stand_in.CACHE) + 6} bytes of timing cache" in trtexec.log_path(PLAN).read_text()


@pytest.mark.parametrize("kind", ["corrupt", "mismatch"])
def test_a_rejected_timing_cache_is_set_aside_and_the_plan_is_built(desk: Path, kind: str) -> None:
    cache = Path("build/plan/timing/sm86-10.1.0.27.cache")
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"none" if kind == "corrupt" else trtexec_stand_in.CACHE)
    assert "TensorRT rejects it; renamed to " in built("" if kind == "corrupt" else kind)
    assert Path(f"{cache}.rejected").exists()
    assert cache.read_bytes().startswith(trtexec_stand_in.CACHE)


# The container


@pytest.fixture
def hanging(desk: Path) -> Iterator["subprocess.Popen[str]"]:
    """A build that does not end while its container runs."""
    environment = os.environ | {"DOCKER_GPUS": docker_gpus("--env=STAND_IN=hang")}
    run = subprocess.Popen(words(), env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    name = trtexec.name_container(PLAN)
    wait_for(lambda: '"Running":true' in docker("inspect", "--format={{json .State}}", name))
    yield run
    run.kill()
    docker("rm", "--force", name)


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False).stdout


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited for a minute")


def test_it_runs_as_the_caller_without_network_and_writes_to_one_folder(hanging: "subprocess.Popen[str]") -> None:
    told = json.loads(docker("inspect", trtexec.name_container(PLAN)))[0]
    assert told["Config"]["User"] == f"{os.getuid()}:{os.getgid()}"
    assert told["HostConfig"]["NetworkMode"] == "none"
    assert told["HostConfig"]["AutoRemove"]
    writable = {mount["Destination"] for mount in told["Mounts"] if mount["RW"]}
    assert writable == {"/out"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_removes_the_container(hanging: "subprocess.Popen[str]", number: signal.Signals) -> None:
    hanging.send_signal(number)
    hanging.communicate(timeout=60)
    assert hanging.returncode != 0
    assert docker("ps", "--all", "--quiet", f"--filter=name={trtexec.name_container(PLAN)}") == ""
    assert not Path("out.plan").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_make_removes_the_container(project: Project, images: None, number: signal.Signals) -> None:
    run = project.start("trt", "MODEL=binary", *KNOBS, DOCKER_GPUS=docker_gpus("--env=STAND_IN=hang"))
    name = f"chest-{hashlib.sha256(str(project.path).encode()).hexdigest()[:6]}-sm86-binary.plan"
    wait_for(lambda: name in docker("ps", "--format={{.Names}}"))
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # as Ctrl-C does
    else:
        run.send_signal(number)
    run.communicate(timeout=60)
    wait_for(lambda: name not in docker("ps", "--all", "--format={{.Names}}"))
    assert not (project.path / "build/plan/sm86/binary.plan").exists()


def test_the_container_of_a_killed_build_is_removed_first(hanging: "subprocess.Popen[str]") -> None:
    hanging.kill()
    hanging.communicate(timeout=60)
    name = trtexec.name_container(PLAN)
    assert name in docker("ps", "--format={{.Names}}")
    built()
    assert name not in docker("ps", "--all", "--format={{.Names}}")


# What a machine may lack


def asked(**environment: str) -> str:
    """Ask for the GPU as make trt does, which must fail; return the output."""
    run = subprocess.run(
        [*PYTHON, "scripts.plans.gpu"], env=os.environ | environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert run.returncode != 0
    assert "Traceback" not in run.stdout
    return run.stdout


def test_make_is_told_the_gpu_and_tensorrt(desk: Path) -> None:
    said = subprocess.run(
        [*PYTHON, "scripts.plans.gpu", "--triton", TRITON_IMAGE], text=True, capture_output=True, check=True
    )
    assert said.stdout == "gpu=sm86 tensorrt=10.1.0.27\n"


def test_images_of_two_releases_are_refused_with_both_named(desk: Path) -> None:
    other = "chest-stand-in-test/tritonserver:other"
    import_image(other, tensorrt="10.3.0.26")
    try:
        run = subprocess.run(
            [*PYTHON, "scripts.plans.gpu", "--triton", other], text=True, capture_output=True, check=False
        )
    finally:
        remove_image(other)
    assert run.returncode != 0
    assert f"{other} has TensorRT 10.3.0.26, {TENSORRT_IMAGE} has 10.1.0.27" in run.stderr


def test_no_docker(desk: Path) -> None:
    assert "docker is not installed; trtexec and Triton run in it: apt install docker.io" in asked(PATH="/nonexistent")


def test_no_daemon(desk: Path) -> None:
    said = asked(DOCKER_HOST=f"unix://{desk}/absent.sock")
    assert "the Docker daemon does not answer; start it: sudo systemctl start docker" in said


def test_no_permission_on_the_socket(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program prints Docker's message, because root, who may run these tests, can always open the socket."""
    fake = desk / "bin/docker"
    fake.parent.mkdir()
    words = (
        "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock: connect"
    )
    fake.write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 1\n")
    fake.chmod(0o755)
    assert "join its group: sudo usermod -aG docker $USER" in asked(PATH=f"{fake.parent}:/usr/bin:/bin")


def test_no_toolkit(desk: Path) -> None:
    said = asked(DOCKER_GPUS="--gpus all")  # this Docker engine has no toolkit
    assert "install the NVIDIA Container Toolkit:\napt install nvidia-container-toolkit" in said
    assert "could not select device driver" in said


def test_no_gpu_that_a_container_sees(desk: Path) -> None:
    gone = docker_gpus("--env=STAND_IN_GPU_STATUS=6", '"--env=STAND_IN_GPU=No devices were found"')
    assert "there is a driver, but no NVIDIA GPU" in asked(DOCKER_GPUS=gone)


@pytest.mark.skipif(
    Path("/proc/driver/nvidia").exists() or bool(shutil.which("nvidia-smi")),
    reason="has a GPU; no GPU is what is tested",
)
def test_a_missing_gpu_is_named_before_an_image_is_pulled(desk: Path) -> None:
    said = asked(DOCKER_GPUS="", TENSORRT_IMAGE="127.0.0.1:1/absent:1")
    assert "there is no NVIDIA GPU here" in said
    assert "make trt CHECK=1" in said
    assert "pulling" not in said


def test_an_absent_image_offline(desk: Path) -> None:
    said = asked(TENSORRT_IMAGE="127.0.0.1:1/absent:1")
    assert "127.0.0.1:1/absent:1: not on this machine, and pulling it failed" in said
    assert "then here: docker load < image.tgz" in said


def test_a_full_disk_is_named_before_the_plan_is_built(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20))  # type: ignore[attr-defined]
    with pytest.raises(SystemExit, match="1 MiB free, a plan needs 200; make clean"):
        plan.prepare_folder(Path("out.plan"), "model.onnx")


def test_a_folder_that_cannot_be_written(desk: Path) -> None:
    with pytest.raises(SystemExit, match=r"make it writable|read-only"):
        plan.prepare_folder(Path("/sys/out.plan"), "model.onnx")


def test_the_doctor_misses_a_gpu_without_calling_it_a_failure(desk: Path) -> None:
    environment = {"TRITON_IMAGE": TRITON_IMAGE, "DOCKER_HOST": f"unix://{desk}/absent.sock"}
    command = [*PYTHON, "scripts.plans.doctor"]
    run = subprocess.run(command, env=os.environ | environment, text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stdout
    assert "ok       GNU Make: " in run.stdout
    assert "lacking  Docker: none that answers" in run.stdout
    assert "plans cannot be built here yet" in run.stdout
    run = subprocess.run([*command, "--gpu"], env=os.environ | environment, capture_output=True, check=False)
    assert run.returncode == 1


def test_the_doctor_finds_what_is_here(desk: Path) -> None:
    run = subprocess.run(
        [*PYTHON, "scripts.plans.doctor", "--gpu"], env=os.environ | {"TRITON_IMAGE": TRITON_IMAGE}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert "NVIDIA GPU: NVIDIA Stand-in RTX 3090, compute capability 8.6, 24576 MiB, driver 555.42.06" in run.stdout
    assert run.stdout.rstrip().endswith("plans can be built here")


# The comparison


def compared(fault: str, tolerance: dict[str, float] = TOLERANCE) -> dict[str, Any]:
    built(fault)
    right = expected.answer_samples(Path("model.onnx"), ENTRY)
    plan = Path("out.plan")
    return compare_plan.compare_answers(
        plan, lambda request: compare_plan.run_plan(plan, request, Path("scratch")), right, ENTRY, tolerance, []
    )


def test_a_plan_within_the_tolerance_is_accepted_with_its_difference(desk: Path) -> None:
    result = compared("error=0.001")
    assert result["difference"] == pytest.approx(1e-3, rel=0.05)
    assert 0 < result["probability"] < 1e-3
    assert result["batches"] == [1, 4, 8]
    assert np.array(result["served"][0]["output"]).shape == (1, 3)
    assert not Path("scratch").exists()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (
            "error=0.01",
            r"output \(share of its scale\) differs from ONNX Runtime's by 1\.0.e-02, expected at most 0\.002",
        ),
        ("same", "gives the same answer for every sample"),
        ("nan", "1 of 3 values are NaN or infinite"),
        ("half", "trtexec does not run this plan"),
    ],
)
def test_a_plan_that_is_wrong_is_refused(desk: Path, fault: str, expected: str) -> None:
    with pytest.raises(SystemExit, match=expected):
        compared(fault)


def test_a_model_without_a_tolerance_for_plans_is_refused(desk: Path) -> None:
    with pytest.raises(SystemExit, match="a plan's tolerance lacks gpu, probability"):
        compared("", {"output": 1e-5})


# Request, config, plans of other machines


def test_the_request_of_two_checkpoints_with_one_graph_is_the_same(desk: Path) -> None:
    model = linear()
    digests = set()
    for checkpoint in ("a", "b"):
        onnx.helper.set_model_props(model, {"checkpoint_sha256": checkpoint})
        onnx.save(model, "model.onnx")
        digests.add(plan_request.hash_graph(Path("model.onnx")))
    model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
    onnx.save(model, "model.onnx")
    assert len(digests) == 1
    assert plan_request.hash_graph(Path("model.onnx")) not in digests


def test_the_stand_in_says_what_it_is_as_the_offline_check_knows_it() -> None:
    assert STAND_IN_PLAN in trtexec_stand_in.MARKER


# The Makefile


@pytest.fixture(scope="module")
def published(built: Project, images: None, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The tiny project with plans published beside the ONNX models; its offline check accepts plans of the stand-in."""
    copy = Project(tmp_path_factory.mktemp("plans") / "project")
    shutil.copytree(built.path, copy.path, symlinks=True, copy_function=shutil.copy)
    copy.edit(
        "scripts/serve/check_repository.py",
        f"STAND_IN_PLAN = {STAND_IN_PLAN!r}".replace("'", '"'),
        'STAND_IN_PLAN = b"known in no test"',
    )
    copy.make("repository", "FORMAT=both", *KNOBS, DOCKER_GPUS=docker_gpus())
    return copy


@pytest.fixture
def both(published: Project, tmp_path: Path) -> Iterator[Project]:
    copy = Project(tmp_path / "project")
    shutil.copytree(published.path, copy.path, symlinks=True, copy_function=shutil.copy)
    yield copy
    shutil.rmtree(copy.path)


def test_plans_lie_beside_the_onnx_models(published: Project) -> None:
    files = published.published()
    for model in ("vit", "binary", "multilabel"):
        assert files[f"{model}_trt/1/sm86.plan"] == (published.path / f"build/plan/sm86/{model}.plan").read_bytes()
        assert b'platform: "tensorrt_plan"' in files[f"{model}_trt/config.pbtxt"]
        assert f"{model}_onnx/1/model.onnx" in files
    verdict = json.loads((published.path / "build/checks/verdict.json").read_text())
    assert verdict["models"]["vit_trt"]["state"] == "READY"
    assert verdict["server"].startswith(TRITON_IMAGE)


def test_another_precision_has_plans_of_its_own_under_the_same_names(both: Project) -> None:
    before = both.published()
    both.make("repository", "FORMAT=both", "PRECISION=tf32", *KNOBS, DOCKER_GPUS=docker_gpus())

    files, folder = both.published(), both.path / "build/plan/sm86"
    assert files.keys() == before.keys()
    assert {name for name in files if files[name] != before[name] and "/1/" not in name} == {"vit_onnx/config.pbtxt"}
    requests = {name: json.loads((folder / f"{name}.json").read_text())["request"] for name in ("vit.tf32", "binary")}
    assert {name: request["precision"] for name, request in requests.items()} == {"vit.tf32": "tf32", "binary": "fp32"}
    assert ["--noTF32" in request["options"] for request in requests.values()] == [False, True]
    limits = [json.loads((folder / f"{name}.check.json").read_text())["tolerance"]["gpu"] for name in requests]
    assert limits == [0.14, 1e-4]


def test_a_second_call_does_nothing_and_another_head_changes_its_plan_alone(both: Project) -> None:
    said = both.make("trt", *KNOBS, DOCKER_GPUS=docker_gpus())
    assert "up to date" in said
    assert "nothing rebuilt" in both.make("repository", "FORMAT=both", *KNOBS, DOCKER_GPUS=docker_gpus())
    assert "nothing to do: " in both.make("status", "FORMAT=both", *KNOBS, DOCKER_GPUS=docker_gpus())
    # As if another checkpoint file had the same numbers: the ONNX file's metadata change, its graph does not
    both.append("convertation/head/torch2onnx.py", "\n# nothing\n")
    both.edit("convertation/export.py", '{"weights": weights, "model"', '{"weights": weights, "by": "test", "model"')
    steps = both.make("trt", "MODEL=binary", *KNOBS, DOCKER_GPUS=docker_gpus())
    assert "build/onnx/binary.onnx: " in steps
    assert "build/plan/binary.request.json: " in steps
    assert "build/plan/binary.expected.npy: " in steps
    assert "build/plan/sm86/binary.plan" not in announced(steps)
    assert "build/plan/sm86/binary.check.json: " not in steps
    flags = "TRTEXEC_FLAGS=--builderOptimizationLevel=4"
    steps = both.make("trt", "MODEL=binary", flags, *KNOBS, DOCKER_GPUS=docker_gpus())
    assert "build/plan/sm86/binary.plan: binary.request.json changed" in steps


def test_a_repository_without_plans_needs_no_docker(both: Project) -> None:
    said = both.make("repository", PATH=f"{both.path}/.venv/bin:/usr/bin:/bin", DOCKER_HOST="unix:///absent")
    assert "removed: " in said  # the plans' folders; the ONNX models are unchanged
    assert not [name for name in both.published() if "_trt/" in name]
    assert "nothing rebuilt" in both.make("repository", DOCKER_HOST="unix:///absent")


def test_a_plan_that_differs_publishes_nothing(both: Project) -> None:
    before = both.published()
    said = both.fail(
        "repository",
        "FORMAT=both",
        "TRTEXEC_FLAGS=--builderOptimizationLevel=4",
        *KNOBS,
        DOCKER_GPUS=docker_gpus("--env=STAND_IN=error=0.5"),
    )
    assert "differs from ONNX Runtime's" in said
    assert both.published() == before


def test_format_plan_names_the_models_that_the_client_will_miss(both: Project) -> None:
    said = both.make("repository", "FORMAT=plan", *KNOBS, DOCKER_GPUS=docker_gpus())
    assert "the existing client asks for binary_onnx multilabel_onnx vit_onnx and will not find them" in said
    assert {name.partition("/")[0] for name in both.published()} == {
        "vit_trt",
        "binary_trt",
        "multilabel_trt",
        "bpr_model",
    }


def test_plans_of_another_gpu_join_those_of_this_one(both: Project) -> None:
    other = both.path / "brought/sm89"
    shutil.copytree(both.path / "build/plan/sm86", other)
    for record in other.glob("*[!k].json"):
        if ".check" not in record.name:
            record.write_text(record.read_text().replace('"compute_capability": "8.6"', '"compute_capability": "8.9"'))
    said = both.make("repository", "FORMAT=both", "PLANS=brought", *KNOBS, DOCKER_GPUS=docker_gpus())
    assert "build/plan/sm89/vit.plan: new" in said
    files = both.published()
    assert {"vit_trt/1/sm86.plan", "vit_trt/1/sm89.plan"} <= files.keys()
    assert b'key: "8.9"' in files["vit_trt/config.pbtxt"]
    shutil.copytree(other, both.path / "again/sm89")
    said = both.fail("repository", "FORMAT=both", "PLANS=brought again", *KNOBS, DOCKER_GPUS=docker_gpus())
    assert "expected one sm89/binary.plan; leave out all of these folders but one" in said
    record = other / "binary.json"
    record.write_text(record.read_text().replace('"tensorrt": "10.1.0.27"', '"tensorrt": "10.3.0.26"'))
    said = both.fail("repository", "FORMAT=both", "PLANS=brought", *KNOBS, DOCKER_GPUS=docker_gpus())
    assert (
        "brought/sm89/binary.plan: refused, it was built by TensorRT 10.3.0.26, the images here have 10.1.0.27" in said
    )
    assert both.published() == files


def test_outside_a_test_a_stand_ins_plan_is_not_published(both: Project) -> None:
    before = both.published()
    both.edit("scripts/serve/check_repository.py", 'b"known in no test"', repr(STAND_IN_PLAN).replace("'", '"'))
    said = both.fail("repository", "FORMAT=both", *KNOBS, DOCKER_GPUS=docker_gpus())
    assert "expected a TensorRT engine, found a stand-in's file, which is no engine" in said
    assert both.published() == before


def test_make_prints_what_it_would_run_without_docker(project: Project) -> None:
    said = project.make(
        "trt", "DRY=1", "MODEL=head", PATH=f"{project.path}/.venv/bin:/usr/bin:/bin", DOCKER_HOST="unix:///absent"
    )
    assert "no GPU could be asked (make doctor): sm86 stands for its compute capability" in said
    assert said.count("\ndocker run --rm ") == 2
    assert "nvcr.io/nvidia/tensorrt:24.06-py3 trtexec" in said


def test_without_a_daemon_make_says_so_and_leaves_the_repository(project: Project) -> None:
    before = project.published()
    for target in (["trt"], ["repository", "FORMAT=both"], ["verify", "FORMAT=both"]):
        assert "the Docker daemon does not answer" in project.fail(*target, DOCKER_HOST="unix:///absent")
    assert project.published() == before


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        (["repository", "FORMAT=trt"], "FORMAT=trt: expected one of onnx plan both"),
        (["repository", "FORMAT=both", "FROM=prebuilt"], "FROM=prebuilt has none"),
        (["repository", "FORMAT=both", "PLANS=nowhere"], "PLANS=nowhere: no plan there"),
        (["repository", "PLANS=nowhere"], "PLANS=nowhere: no plan there"),
        (["trt", "TRTEXEC_FLAGS=--stripWeights"], "TRTEXEC_FLAGS: --stripWeights; its plan has no weights"),
        (["repository", "TRTEXEC_FLAGS=--builderOptimizationLevel=4"], "have no effect with FORMAT=onnx"),
        (["trt", "MODEL=bpr"], "MODEL=bpr: no plan is made of it"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(project: Project, knobs: list[str], expected: str) -> None:
    assert expected in project.fail(*knobs)


def test_verify_gpu_measures_a_model_at_one_sample_and_at_the_most(both: Project) -> None:
    smi = both.path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho $(( $(date +%s%N) / 100000000 % 1000 ))\n")  # a number that grows
    smi.chmod(0o755)
    contents = [
        "binary_trt/config.pbtxt=build/plan/binary.config.pbtxt",
        "binary_trt/1/sm86.plan=build/plan/sm86/binary.plan",
    ]
    said = subprocess.run(
        [".venv/bin/python", "-m", "scripts.plans.verify_gpu", "--image", TRITON_IMAGE,
         "--gpu-checks", "build/plan/sm86/{}.check.json", *contents, "out.json"],
        cwd=both.path, env=os.environ | {"PATH": f"{smi.parent}:{os.environ['PATH']}", "DOCKER_GPUS": docker_gpus()},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout
    told = json.loads((both.path / "out.json").read_text())
    assert told["on"]["gpu"] == "NVIDIA Stand-in RTX 3090"
    assert list(told["measured"]["binary_trt"]) == ["1", "8"]
    for row in told["measured"]["binary_trt"].values():
        assert row["way"] == "shared memory"
        assert list(row["load"]) == ["1", "2", "4"]
        assert all(0 < one["p50_ms"] <= one["p95_ms"] and one["per_s"] > 0 for one in row["load"].values())
    assert told["slower"] == {}  # its ONNX model was not measured
