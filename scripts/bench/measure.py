"""Shared by all benchmarks: a row of the table, a fresh process to measure in, a copy of the project to build in."""

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.steps.records import hash_file

ROOT = Path.cwd()
BENCH = ROOT / "build/bench"
REPOSITORY = "model_repository_running"
REQUIREMENTS = tuple(path.name for path in sorted(ROOT.glob("requirements*.txt")))
SOURCES = (
    "Makefile",
    "knobs.mk",
    "artifacts.mk",
    "VERSION",
    *REQUIREMENTS,
    "scripts",
    "convertation",
    "docker",
    "training",
)
ENVIRONMENTS = ".venv", ".venv-triton"
KNOBS = (
    "CI", "FROM", "WEIGHTS", "VIT", "WITH", "REPOSITORY", "MODEL", "PRECISION", "OPSET", "FORMAT", "CACHE",
    "CACHE_MODE", "PYTHON", "EXPLAIN", "PYTHONPATH",
)  # fmt: skip


@dataclass
class Row:
    """One figure.  `value` None: it could not be measured here, and `note` says why; `goal` None: it is only shown."""

    what: str
    value: float | None
    relation: str = ""  # "≤" or "≥"
    goal: float | None = None
    unit: str = ""
    note: str = ""
    samples: list[float] = field(default_factory=list)
    group: str = ""

    @property
    def verdict(self) -> str:
        """Return "pass", "MISS", "not measured" or, without a goal, ""."""
        if self.value is None:
            return "not measured"
        if self.goal is None:
            return ""
        return "pass" if (self.value <= self.goal if self.relation == "≤" else self.value >= self.goal) else "MISS"


def compare_medians(
    what: str, ours: Sequence[float], theirs: Sequence[float], goal: float | None, unit: str, other: str = "straight"
) -> Row:
    """Return a row whose value is the median of `ours` divided by the median of `theirs`, both in `unit`."""
    a, b = statistics.median(ours), statistics.median(theirs)
    note = f"{a:.3g} {unit}, {other} {b:.3g} {unit}"
    return Row(what, a / b, "≤", goal, "x", note, [x / b for x in ours])


def show_progress(text: str) -> None:
    """Print what the benchmark does now."""
    print(f"  … {text}", flush=True)


def clean_environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what a calling make, or the user, set for another build."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS")) and key not in KNOBS
    }
    return kept | more


def run_probe(*words: str | Path, cwd: Path, venv: str = ".venv", **more: str) -> dict[str, Any]:
    """Run scripts/bench/probe.py in a process of its own; return what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        path = os.pathsep.join(filter(None, [more.pop("PYTHONPATH", ""), str(ROOT)]))
        run = subprocess.run(
            [ROOT / venv / "bin/python", "-m", "scripts.bench.probe", out, *words], cwd=cwd, text=True,
            env=clean_environment(PYTHONPATH=path, **more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if run.returncode:
            raise SystemExit(f"bench: {' '.join(map(str, words[:2]))} failed\n{run.stdout[-3000:]}")
        measured: dict[str, Any] = json.loads(out.read_text())
        return measured


class Tree:
    """A copy of the project where the real Makefile builds synthetic models at the size that models.yaml says.

    Its sources are copies of this checkout's, its environments are links to this checkout's.  The user's build/ and
    repository are not touched.
    """

    def __init__(self, path: Path = BENCH / "tree") -> None:
        self.path = path
        self.current: set[str] = set()

    def update_sources(self) -> None:
        """Copy this checkout's sources and the records of its environments; make finds what is stale by content."""
        (self.path / ".make/made").mkdir(parents=True, exist_ok=True)
        copy_sources(self.path)
        for venv in ENVIRONMENTS:
            if not os.path.lexists(self.path / venv):
                (self.path / venv).symlink_to(ROOT / venv)
            made = f".make/made/{venv}%installed"
            if not (ROOT / made).exists():
                raise SystemExit(f"{venv} is not installed; run make bench, which installs it")
            shutil.copy(ROOT / made, self.path / made)
            words = (ROOT / made).read_text().partition(" : ")[2].split()
            inputs = (word.rpartition("=") for word in words)
            # The copy cannot install another environment
            if any(hash_file(self.path / name) != was for name, _, was in inputs):
                raise SystemExit(f"{venv} does not fit its requirements; run make {venv}/installed")

    def make(self, *words: str, loud: bool = False) -> tuple[float, str]:
        """Run make, which must succeed; return its wall time in s and what it printed."""
        start, said = time.perf_counter(), []
        run = subprocess.Popen(
            ["make", "WEIGHTS=synthetic", *words], cwd=self.path, env=clean_environment(), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert run.stdout
        for line in run.stdout:
            said.append(line)
            if loud:
                print(f"  | {line}", end="", flush=True)
        if run.wait():
            raise SystemExit(f"bench: make {' '.join(words)} failed in {self.path}\n{''.join(said)[-3000:]}")
        return time.perf_counter() - start, "".join(said)

    def build(self, goal: str) -> None:
        """Bring `goal`, or the whole repository if one is published here, up to date; once per run."""
        published = any(self.path.glob(f"{REPOSITORY}/*/config.pbtxt"))
        goal = "repository" if published else goal
        if goal not in self.current:
            show_progress(f"{self.path.relative_to(ROOT)}: make {goal}")
            self.update_sources()
            self.make(goal, loud=True)
            self.current.add(goal)

    def find_onnx(self, model: str) -> Path:
        """Return the model's ONNX file: published, or else in build/onnx/."""
        built = f"build/onnx/{model}.onnx"
        self.build(built)
        published = self.path / f"{REPOSITORY}/{model}_onnx/1/model.onnx"
        return published if published.exists() else self.path / built

    def find_entry(self, model: str) -> Path:
        return self.path / f"build/models/{model}.json"

    def find_checkpoint(self, model: str) -> Path:
        return next(
            self.path / word.rpartition("=")[0]
            for word in (self.path / f".make/made/build%onnx%{model}.onnx").read_text().split(" : ")[1].split()
            if word.rpartition("=")[0].endswith((".pt", ".pth"))
        )


def copy_sources(path: Path) -> None:
    """Copy the pipeline's sources into `path`, with new file times, as a clone has them."""
    ignore = shutil.ignore_patterns("__pycache__", "weights")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.rmtree(path / name, ignore_errors=True)
            shutil.copytree(ROOT / name, path / name, ignore=ignore, copy_function=shutil.copy)
        else:
            shutil.copy(ROOT / name, path / name)


@contextmanager
def watch_others() -> Iterator[list[float]]:
    """On leaving, add to the yielded list how many cores, on average, other programs and the kernel kept busy."""
    found: list[float] = []
    before, start = read_busy_seconds(), time.monotonic()
    try:
        yield found
    finally:
        all_busy, ours = (after - was for after, was in zip(read_busy_seconds(), before, strict=True))
        found.append(max(0.0, (all_busy - ours) / (time.monotonic() - start)))


def read_busy_seconds() -> tuple[float, float]:
    """Return the CPU seconds so far of the whole machine, and of this process with its children."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])
