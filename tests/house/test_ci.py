"""The workflows: a clone with a restored cache runs no step, or only the steps of a changed head."""

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, ROOT, Project

BINARY = {"build/onnx/binary.onnx", "build/checks/binary.json", "build/checks/verdict.json"}


def github(name: str = "models") -> Any:
    return yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())


def gitlab() -> Any:
    return yaml.safe_load((ROOT / ".gitlab-ci.yml").read_text())


def cached() -> list[str]:
    """Return the paths that GitHub's workflow caches, without those of pip."""
    caches = [step["with"] for step in github()["jobs"]["repository"]["steps"] if "cache" in step.get("uses", "")]
    paths: str = next(cache["path"] for cache in caches if ".make" in cache["path"].split())
    return paths.split()


def git(folder: Path, *args: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, *args], cwd=folder, check=True, capture_output=True)


def clone_with_cache(project: Project, folder: Path) -> Project:
    """Commit the sources, clone them, and restore in the clone what the workflows cache and the environments."""
    shutil.copy(ROOT / ".gitignore", project.path)
    git(project.path, "init")
    git(project.path, "add", ".")
    git(project.path, "commit", "-m", "tiny")
    git(folder, "clone", str(project.path), "clone")
    clone = folder / "clone"
    paths = [path for path in cached() if (project.path / path).exists()]
    tar = subprocess.Popen(["tar", "c", *paths], cwd=project.path, stdout=subprocess.PIPE)
    subprocess.run(["tar", "xm", "--no-same-owner"], cwd=clone, stdin=tar.stdout, check=True)
    assert tar.wait() == 0
    for venv in (".venv", ".venv-triton"):
        shutil.copytree(project.path / venv, clone / venv)
    return Project(clone)


def test_both_workflows_cache_the_same_and_build_the_same() -> None:
    job = gitlab()["repository"]
    assert next(cache["paths"] for cache in job["cache"] if ".make" in cache["paths"]) == cached()
    commands = [step["run"] for step in github()["jobs"]["repository"]["steps"] if "run" in step]
    assert commands == job["script"]
    assert github()["env"]["CT_WEIGHTS"] == job["variables"]["CT_WEIGHTS"] == "synthetic"


def test_a_clone_with_the_cache_runs_no_step(stand_ins: Project, tmp_path: Path) -> None:
    clone = clone_with_cache(stand_ins, tmp_path)
    assert not (clone.path / "build/onnx").exists()
    assert "nothing to do" in clone.make("status")
    assert clone.steps() == set()
    assert clone.published() == stand_ins.published()


def test_a_changed_head_runs_only_its_own_steps(stand_ins: Project, tmp_path: Path) -> None:
    clone = clone_with_cache(stand_ins, tmp_path)
    clone.edit("convertation/models.yaml", "gelu", "leaky_relu")
    made = clone.steps()
    assert {name for name in made if not name.startswith("build/models/")} == {
        "build/synthetic/CT-RATE/model_binary.pth",
        *BINARY,
    }
    assert clone.published()["vit_onnx/1/model.onnx"] == stand_ins.published()["vit_onnx/1/model.onnx"]
    assert clone.steps() == set()


def test_a_changed_head_of_the_teams_needs_neither_archive_nor_other_checkpoints(
    stand_ins: Project, tmp_path: Path
) -> None:
    shutil.rmtree(stand_ins.path / REPOSITORY)
    shutil.rmtree(stand_ins.path / ".make/published")
    lock = "257a4c075a4c2721970ffc7ef0380d0bf7329185de8f34ff9a6ac8336561c34c"  # of "zip\n"
    (stand_ins.path / "training/weights.zip").write_text("zip\n")
    (stand_ins.path / "training/weights.zip.lock.json").write_text(f'{{"size": 4, "sha256": "{lock}"}}')
    stand_ins.make("repository", "WEIGHTS=yandex")
    clone = clone_with_cache(stand_ins, tmp_path)
    own = clone.path / "training/weights/CT-RATE/model_binary.pth"
    own.parent.mkdir(exist_ok=True)
    own.write_text("mine")
    assert clone.steps("WEIGHTS=yandex") == BINARY
    assert not (clone.path / "training/weights.zip").exists()


def test_the_page_explains_each_cached_path() -> None:
    page = (ROOT / "docs/ci.md").read_text()
    assert [path for path in cached() if f"| `{path}` |" not in page] == []


def test_plans_are_built_for_each_runner_and_merged_in_both_workflows() -> None:
    jobs, ours = github("plans")["jobs"], gitlab()
    assert jobs["plan"]["strategy"]["matrix"]["gpu"] == ours["plan"]["parallel"]["matrix"][0]["GPU"]
    assert jobs["repository"]["needs"] == "plan" and ours["plans"]["needs"] == ["plan"]
    up, down = (uses(jobs[job], f"{way}-artifact")[0] for job, way in (("plan", "upload"), ("repository", "download")))
    assert "${{ matrix.gpu }}" in up["name"]  # two artifacts cannot have the same name
    assert fnmatch(up["name"], down["pattern"])
    assert commands(jobs["plan"]) == ["make trt"]
    assert commands(jobs["repository"]) == [f'make repository FORMAT=both PLANS="$(echo {down["path"]}/*)"']
    assert ours["plan"]["script"] == ["make trt", "mkdir plans && mv build/plan/sm* plans/"]
    assert ours["plans"]["script"] == ["make repository FORMAT=both PLANS=plans"]
    assert ours["plan"]["artifacts"]["paths"] == ["plans"]


def test_plans_are_built_from_the_cache_of_the_main_workflow() -> None:
    for job in github("plans")["jobs"].values():
        assert [cache["path"].split() for cache in uses(job, "cache/restore")] == [cached()]
    for name in "plan", "plans":
        assert gitlab()[name]["cache"]["paths"] == cached()
        assert gitlab()[name]["cache"]["key"] == gitlab()["repository"]["cache"][1]["key"]
    assert github("plans")["env"]["CT_WEIGHTS"] == github()["env"]["CT_WEIGHTS"]


def uses(job: Any, action: str) -> list[Any]:
    """Return the inputs that a job gives to an action, for each use of it."""
    return [step["with"] for step in job["steps"] if action in step.get("uses", "")]


def commands(job: Any) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_both_services_run_the_projects_own_tests() -> None:
    assert commands(github("tests")["jobs"]["tests"]) == gitlab()["tests"]["script"] == ["CI= make test"]


def test_the_hooks_before_a_commit_are_tools_that_the_tests_pin() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    tools = [hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks]
    assert tools == ["ruff", "ruff", "mypy", "shellcheck"]
    assert {tool.split("=")[0] for tool in (ROOT / "tests/requirements.txt").read_text().split()} >= {"ruff", "mypy"}
    run = (ROOT / "tests/run.sh").read_text()
    assert all(re.search(rf"\b{tool}\b", run) for tool in tools)  # the hooks check what make test checks


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_each_action_is_named_by_its_commit_and_may_only_read(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        for step in job["steps"]:
            if action := step.get("uses", ""):
                assert re.fullmatch(r"[\w-]+/[\w/-]+@[0-9a-f]{40}", action), (
                    f"{action}: expected a commit, for a tag moves"
                )
                if "/checkout@" in action:
                    assert step["with"]["persist-credentials"] is False
