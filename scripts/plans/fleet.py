"""Build TensorRT plans for many kinds of GPU: one Slurm job for each, which runs the same `make trt` in this checkout.

    python -m scripts.plans.fleet fleet.yaml 'a100 l4' 'vit binary' 'binary multilabel' make trt MODEL=vit ...

The arguments: the kinds of GPU, the models that get a plan, the heads, and the command that each job runs.  This
program first makes here what needs no GPU.  A job writes build/plan/fleet/a100.json, which says what GPU that kind is;
from then on Make finds out without a job whether its plans are up to date.  Exit status 1 if a kind failed.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from scripts.plans.trtexec import end_with_parent
from scripts.plans.trtexec_options import check_options, split_options
from scripts.steps.records import read_text, record_path
from scripts.steps.submake import run_make

# The states of squeue in which a job has ended, and GONE: Slurm forgets a job some minutes after its end
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
         "REVOKED", "TIMEOUT", "GONE")  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LONGEST_PAUSE = 15.0  # s between two questions to Slurm
LATE = 60.0  # s until a network file system shows a new file to every machine (acdirmax)


class Kind(NamedTuple):
    """A kind of GPU: sbatch's options, the line of fleet.yaml with them, the plans to build, the command of a job."""

    name: str
    options: tuple[str, ...]
    line: str
    plans: str
    command: tuple[str, ...]

    @property
    def log(self) -> str:
        return f"build/logs/fleet-{self.name}.log"

    @property
    def gpu_record(self) -> tuple[str, dict[str, str]]:
        """The file that says what GPU this kind is, and its content; the job replaces @ by words for that GPU."""
        content = {"make": "@", "image": os.environ["TENSORRT_IMAGE"], "sbatch": shlex.join(self.options)}
        return f"build/plan/fleet/{self.name}.json", content

    def list_files(self, gpu: str) -> list[str]:
        return self.plans.replace("{gpu}", gpu).split()

    def find_current(self) -> str:
        """Return the folder of the plans, such as sm80, if all are there and up to date, else ""."""
        file, content = self.gpu_record
        found = json.loads(read_text(file) or "{}")
        words = found.get("make", "").split()
        if not words or found != content | {"make": found["make"]}:
            return ""
        gpu: str = words[0].removeprefix("gpu=")
        asked = run_command(
            self.command[0], "--question", *self.command[2:], "FORMAT=both", *words, *self.list_files(gpu)
        )
        return "" if asked.returncode else gpu

    def name_job(self) -> str:
        """Return the job's name, made from all that the job is given, so that a later call recognises the job."""
        requests = [
            f"build/plan/{Path(plan).stem}.request.json" for plan in self.list_files("") if plan.endswith(".plan")
        ]
        given = repr((Path.cwd(), self.command, self.gpu_record, [read_text(request) for request in requests]))
        return f"chest-{self.name}-{hashlib.sha256(given.encode()).hexdigest()[:8]}"

    def submit(self) -> str:
        """Submit a job and return its id; OSError with Slurm's own message if it refuses."""
        file, content = self.gpu_record
        for path in file, self.log:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        ours = [
            f"--job-name={self.name_job()}",
            f"--output={self.log}",
            "--export=ALL,DOCKER_GPUS=",
            "--no-requeue",
            *self.options,
        ]
        said = run_command(
            "sbatch", "--parsable", *ours, "scripts/plans/fleet_job.sh", file, json.dumps(content), *self.command
        )
        if said.returncode:
            raise OSError(f"{self.line}: sbatch {shlex.join(self.options)}: {said.stderr.strip()}")
        return said.stdout.strip().partition(";")[0]

    def make_row(self, job: str, state: str) -> tuple[str, ...]:
        """Return this kind's row of the table; it failed if its plans are not there, whatever the job's state."""
        end = time.monotonic() + LATE
        while not (gpu := self.find_current()) and state == "COMPLETED" and time.monotonic() < end:
            time.sleep(1)
        if not gpu:
            return self.name, "", "failed", f"{state}, log: {self.log}" if job else state
        runs = [read_text(record_path("took", file)) for file in self.list_files(gpu) if file.endswith(".plan")]
        return self.name, gpu, "built" if any(f'"slurm-{job}"' in run for run in runs) else "reused", ""


def run_command(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run a command without the variables of the calling make; Slurm's and Docker's settings stay."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=mine)


def read_kinds(file: str, wanted: list[str]) -> list[tuple[str, tuple[str, ...], str]]:
    """Return name, options for sbatch, and line in `file` of each wanted kind; SystemExit if one is unknown."""
    try:  # BaseLoader reads all values as texts; otherwise YAML would read 2:00:00 as a number
        tree: Any = yaml.compose(Path(file).read_text(), yaml.BaseLoader)
        kinds = {kind.value: ({key.value: text.value for key, text in more.value}, kind) for kind, more in tree.value}
    except (yaml.YAMLError, AttributeError, ValueError, TypeError) as error:
        raise SystemExit(f"{file}: expected lines such as a100: {{gres: 'gpu:a100:1'}}; {error}") from None
    common = kinds.pop("common", ({}, None))[0]
    if unknown := [name for name in wanted or ["(nothing)"] if name not in kinds]:
        raise SystemExit(f"GPUS: {' '.join(unknown)}; expected some of {' '.join(kinds)}, the kinds in {file}")
    lines = {name: f"{file}:{kinds[name][1].start_mark.line + 1}" for name in wanted}
    asked = {name: [f"--{key}={text}" for key, text in (common | kinds[name][0]).items()] for name in wanted}
    return [(name, tuple(asked[name]), lines[name]) for name in lines]


def list_jobs() -> dict[str, list[str]]:
    """Return name, state and reason of this user's jobs by id, also of those that ended some minutes ago."""
    said = run_command("squeue", "--me", "--states=all", "--noheader", "--format=%i|%j|%T|%r")
    if said.returncode:
        raise OSError(f"Slurm does not answer: {said.stderr.strip()}")
    return {line.split("|")[0]: line.split("|")[1:] for line in said.stdout.splitlines()}


def build_plans(kinds: list[Kind]) -> list[tuple[str, ...]]:
    """Submit a job for each kind that needs one, wait for all, return the rows; if stopped, cancel the new jobs."""
    ours, waiting, ends, seen, pause = set[str](), dict[str, Kind](), dict[Kind, tuple[str, str]](), set[str](), 1.0
    try:
        there = list_jobs()
        for kind in kinds:
            found = [job for job, (name, state, _) in there.items() if name == kind.name_job() and state not in ENDED]
            if found:
                print(f"{kind.name}: job {found[0]} of another call builds this; waiting for it", flush=True)
                waiting[found[0]] = kind
            elif not kind.find_current():
                # A signal between submit and add would hide the new job from the cancelling below
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
                try:
                    waiting[job := kind.submit()] = kind
                    ours.add(job)
                except OSError as error:
                    print(error, flush=True)
                    ends[kind] = "", f"refused, {kind.line}"
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        while waiting:
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)
            try:
                there = list_jobs()
            except OSError as error:  # Slurm's controller may be restarting; it forgets no job
                print(error, flush=True)
                continue
            for job, kind in list(waiting.items()):
                _, state, reason = there.get(job, ["", "GONE", "None"])
                if (line := f"{kind.name}: job {job} {state} {reason}".removesuffix(" None")) not in seen:
                    print(line, flush=True)
                    seen.add(line)
                    pause = 1.0
                if state in ENDED:
                    ends[waiting.pop(job)] = job, state
    finally:
        if left := sorted(ours & waiting.keys()):
            print(f"cancelling {' '.join(left)}", flush=True)
            run_command("scancel", *left)
    return [kind.make_row(*ends.get(kind, ("", ""))) for kind in kinds]


def main(file: str, gpus: str, models: str, heads: str, *command: str) -> None:
    end_with_parent()
    files = "build/plan/{0}.request.json build/plan/{0}.expected.npy build/models/{0}.tolerance.json"
    prepared = [name for model in models.split() for name in files.format(model).split()]
    if "vit" in models:  # the comparison of the ViT's plan also needs the heads
        prepared += [f"build/plan/{head}.request.json" for head in heads.split()]
    plans = " ".join(
        f"build/plan/{{gpu}}/{model}.plan build/plan/{{gpu}}/{model}.check.json" for model in models.split()
    )
    if not shutil.which("sbatch"):
        raise SystemExit(
            "sbatch: not found; make trt-fleet submits jobs to Slurm: run it where sbatch works, on a login node\n"
            "without Slurm: .github/workflows/plans.yml builds on one runner for each kind, and make repository\n"
            "FORMAT=both PLANS=dir takes the plans that make trt built on other machines"
        )
    kinds = [Kind(*told, plans, command) for told in read_kinds(file, gpus.split())]
    check_options(
        split_options(next((word.partition("=")[2] for word in command if word.startswith("TRTEXEC_FLAGS=")), ""))
    )
    if run_make("--silent", "FORMAT=both", *dict.fromkeys(prepared)).returncode:
        raise SystemExit("the files that the jobs need could not be made; nothing was submitted")
    try:
        rows = build_plans(kinds)
    except OSError as error:
        raise SystemExit(str(error)) from None
    print()
    for row in ("kind", "GPU", "plans", ""), *rows:
        print("{:<12}{:<7}{:<8}{}".format(*row).rstrip(), flush=True)
    if failed := [row[0] for row in rows if row[2] == "failed"]:
        raise SystemExit(f"failed: {' '.join(failed)}; run the same command again; it repeats only these")


if __name__ == "__main__":
    main(*sys.argv[1:])
