"""Copies of the project in temporary folders, where the real Makefile runs with tiny networks or stand-in steps."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from starter import start_alike

ROOT = Path(__file__).parents[1]

start_alike()
REPOSITORY = "model_repository_running"
SOURCES = (
    *(path.name for path in sorted(ROOT.glob("*.mk"))),
    "Makefile",
    "VERSION",
    *(path.name for path in sorted(ROOT.glob("requirements*"))),
    "scripts",
    "convertation",
    "docker",
    "training",
    "tests",
)

# What models.yaml says of the tiny networks; its other values are kept
TINY: dict[str, dict[str, object]] = {
    "vit": {
        "network": {
            "dim": 32, "heads": 2, "dim_head": 16, "spatial_depth": 1, "temporal_depth": 1, "patch": [10, 20, 20],
            "codebook": 64,
        },
        "input": [1, 20, 40, 40],
        "output": [24],
    },
    "binary": {"network": {"sizes": [24, 16, 2], "activation": "gelu"}, "input": [24]},
    "multilabel": {"network": {"sizes": [24, 16, 20], "activation": "leaky_relu"}, "input": [24]},
    "lipro": {"network": {"sizes": [24, 18], "activation": "relu"}, "input": [24]},
    "bpr": {"network": {"channels": 2}},
}  # fmt: skip


class Project:
    """A copy of the project; `make` runs the real Makefile in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, *args: str, **environment: str) -> "subprocess.Popen[str]":
        """Start make in a process group of its own, with WEIGHTS=synthetic unless `args` have another."""
        command = (
            ["make", *args] if any(arg.startswith("WEIGHTS=") for arg in args) else ["make", "WEIGHTS=synthetic", *args]
        )
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "CI"}
        return subprocess.Popen(
            command, cwd=self.path, text=True, start_new_session=True, env=clean | environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def make(self, *args: str, **environment: str) -> str:
        """Run make, which must succeed; return its output."""
        run = self.start(*args, **environment)
        said = run.communicate()[0]
        assert run.returncode == 0, said
        return said

    def fail(self, *args: str, **environment: str) -> str:
        """Run make, which must fail without a traceback; return its output."""
        run = self.start(*args, **environment)
        said = run.communicate()[0]
        assert run.returncode != 0, said
        assert "Traceback" not in said, said
        return said

    def steps(self, *args: str, **environment: str) -> set[str]:
        """Run make repository; return the artifacts that it announced."""
        return announced(self.make("repository", *args, **environment))

    def published(self) -> dict[str, bytes]:
        """Return name and content of each published file."""
        top = self.path / REPOSITORY
        return {
            str(path.relative_to(top)): path.read_bytes()
            for path in sorted(top.rglob("*"))
            if path.is_file() and path.name != ".gitkeep"
        }

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace text in a file, which must have it; replace a pin also in the lock beside a requirements file."""
        path = self.path / name
        lock = path.with_suffix(".lock")
        if "requirements" in path.name and lock.is_file():
            lock.write_text(lock.read_text().replace(old, new))
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def append(self, name: str, text: str) -> None:
        """Add text at the end of a file."""
        with (self.path / name).open("a") as file:
            file.write(text)


def announced(said: str) -> set[str]:
    """Return the artifacts that make announced: lines such as `build/onnx/vit.onnx: models.yaml changed`."""
    return set(re.findall(r"^((?:build|training|\.venv)[^ :]*): (?!waiting)", said, re.MULTILINE))


def copy_of_the_project(path: Path) -> Project:
    """Copy the sources, with tiny networks in models.yaml and the environments of this checkout."""
    path.mkdir(parents=True, exist_ok=True)
    ignore = shutil.ignore_patterns("__pycache__", "reference", "weights.zip*", "test_*")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, path / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, path)
    (path / "training/weights").mkdir(exist_ok=True)
    for stray in (path / "training/weights").iterdir():
        shutil.rmtree(stray) if stray.is_dir() else stray.unlink()
    models = yaml.safe_load((ROOT / "convertation/models.yaml").read_text())
    for name, tiny in TINY.items():
        models[name] |= tiny
    (path / "convertation/models.yaml").write_text(yaml.safe_dump(models, sort_keys=False))
    for config in path.glob("convertation/*/*.pbtxt"):
        config.write_text(tiny_dims(config.read_text()))
    (path / ".make/made").mkdir(parents=True)
    for venv in (".venv", ".venv-triton", ".venv-inference"):
        (path / venv).symlink_to(ROOT / venv)
        shutil.copy(ROOT / f".make/made/{venv}%installed", path / ".make/made")
    if (ROOT / ".venv-signing/installed").exists():
        (path / ".venv-signing").symlink_to(ROOT / ".venv-signing")
        shutil.copy(ROOT / ".make/made/.venv-signing%installed", path / ".make/made")
    return Project(path)


def tiny_dims(config: str) -> str:
    """Return a config.pbtxt of the full-size models with the shapes of the tiny ones."""
    config = re.sub(r"dims: *\[ *1, *240, *480, *480 *\]", "dims: [ 1, 20, 40, 40 ]", config)
    return re.sub(r"dims: *\[ *512 *\]", "dims: [ 24 ]", config)


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Project], object]) -> Project:
    """Return a copy of a project that the first of pytest's workers completes by `make`, while the others wait.

    Each worker has a copy of its own, as some tests run make in it.
    """
    top = factory.getbasetemp()
    folder = (top.parent if "PYTEST_XDIST_WORKER" in os.environ else top) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "project").exists():
            shutil.rmtree(folder / "draft", ignore_errors=True)
            project = copy_of_the_project(folder / "draft")
            make(project)
            project.path.rename(folder / "project")
    return copy_of(Project(folder / "project"), factory.mktemp(name) / "project")


def copy_of(project: Project, path: Path) -> Project:
    """Copy a project; every inode, mtime and ctime in the copy is new."""
    shutil.copytree(project.path, path, symlinks=True, copy_function=shutil.copy)
    return Project(path)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The tiny project, built once, its verdict passed by the real Triton; tests copy it."""
    return make_once(tmp_path_factory, "built", lambda project: project.make("repository"))


@pytest.fixture
def project(built: Project, tmp_path: Path) -> Iterator[Project]:
    """A copy of the built tiny project."""
    yield (copy := copy_of(built, tmp_path / "project"))
    shutil.rmtree(copy.path)


@pytest.fixture(scope="session")
def measured(built: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the built tiny project with build/fidelity.json; tests only read it."""
    copy = copy_of(built, tmp_path_factory.mktemp("measured") / "project")
    copy.make("fidelity")
    return copy


# Stands in for Python: instead of a script, except model_entry, it writes the command and the digests of the files that
# the command names
PYTHON_STAND_IN = f"""#!/bin/bash
if [[ $2 == pip ]]; then exit; fi
if [[ $2 == scripts.convert.model_entry ]]; then exec {ROOT}/.venv/bin/python "$@"; fi
sleep "${{SLOW:-0}}"
out=${{!#}}
for word in "${{@:2:$#-2}}"; do
  file=${{word#*=}}
  if [[ -f $file ]]; then echo "${{word%%=*}} $(sha256sum < "$file")"; else echo "$word"; fi
done > "$out"
if [[ $2 == scripts.convert.compare?(_fp16) ]]; then echo '{{"difference": 0.0}}' > "$out"; fi
"""


@pytest.fixture(scope="session")
def built_by_stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """All artifacts of the Makefile, made within seconds by a stand-in for Python; for kills, races and rebuilds."""
    return make_once(tmp_path_factory, "stand-ins", build_by_stand_ins)


def build_by_stand_ins(project: Project) -> None:
    (project.path / ".venv-signing").unlink(missing_ok=True)
    for venv in (".venv", ".venv-triton", ".venv-inference"):
        (project.path / venv).unlink()
        (project.path / venv / "bin").mkdir(parents=True)
        shutil.copy(ROOT / venv / "installed", project.path / venv)
        stand_in = project.path / venv / "bin" / next((ROOT / ".venv/bin").glob("python3.??")).name
        stand_in.write_text(PYTHON_STAND_IN)
        stand_in.chmod(0o755)
    project.make("repository")


@pytest.fixture
def stand_ins(built_by_stand_ins: Project, tmp_path: Path) -> Iterator[Project]:
    """A copy of what the stand-in built."""
    yield (copy := copy_of(built_by_stand_ins, tmp_path / "stand-ins"))
    shutil.rmtree(copy.path)


@pytest.fixture(scope="session")
def signing() -> Path:
    """The Python of the environment that signs; the test is skipped if it is not installed."""
    if not (pythons := sorted(ROOT.glob(".venv-signing/bin/python3.??"))):
        pytest.skip("the environment that signs is not installed here: make .venv-signing/installed")
    return pythons[0]


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair of keys, key.pem and key.pub, and another pair, other.pem and other.pub."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("key", "other"):
        pair = folder / f"{name}.pem", folder / f"{name}.pub"
        generate = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", pair[0]]
        subprocess.run(generate, check=True, capture_output=True)
        subprocess.run(["openssl", "ec", "-in", pair[0], "-pubout", "-out", pair[1]], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def docker_engine() -> None:
    """Skip a test that needs containers if no Docker engine answers; .ci/run starts one."""
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("no Docker engine answers here (apt install docker.io, and the right to use it)")


def kill(run: "subprocess.Popen[str]") -> None:
    """Kill the whole process group (-9)."""
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


# The longest first, so that no worker is left with one of them at the end
LONGEST = (
    "steps/test_kills.py", "steps/test_rebuild.py", "archives/test_download.py", "deploy/test_stack.py",
    "plans/test_plan.py", "steps/test_cache.py", "infer/test_infer.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: tests/run.sh gives each worker whole files, in this order."""
    places = {f"tests/{file}": place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONGEST)))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With CI=true, fail the run if a test was skipped for another reason than a missing GPU."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [str(report.longrepr) for report in reporter.stats.get("skipped", [])] if reporter else []
    if os.environ.get("CI") == "true" and (others := [reason for reason in skipped if "no GPU" not in reason]):
        print("\nskipped, which CI does not accept:", *others, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
