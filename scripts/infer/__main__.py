"""From CT studies to findings: each study in a folder becomes a row of a table.

    python -m scripts.infer [--models REPOSITORY] [--triton host:port] [--again] INPUT OUTPUT

INPUT: a folder of studies, each a folder or archive of DICOM or NIfTI, or a NIfTI file; or one archive or file.
OUTPUT: see tables.py.
Exit status: 0 every study succeeded, 3 some did, 4 none did; 1 or 2 the run could not start or go on.
"""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from scripts.infer.messages import REPLACED, TEMPORARY, translate
from scripts.infer.source import find_studies, fingerprint_study
from scripts.infer.tables import Output, show_path

ALL, SOME, NONE = 0, 3, 4
PATIENCE = 30  # s for a worker to end
LIMIT = 1800  # s for a study; a large one on two CPUs takes one or two minutes


class Worker:
    """The process scripts.infer.worker; if it dies, another one."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = command
        self.about = self.start()

    def start(self) -> dict[str, Any]:
        """Start the process and return what it says about its models. SystemExit: it cannot open them."""
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.heard = b""
        about = self.read_answer()
        if about is None:
            raise SystemExit(f"the models could not be opened: the process {self.end()}; is there enough memory?")
        return about

    def read_answer(self, limit: float | None = None) -> dict[str, Any] | None:
        """The next answer; None if the process died or took more than `limit` s. SystemExit: it cannot go on."""
        assert self.process.stdout
        file = self.process.stdout.fileno()
        end = None if limit is None else time.monotonic() + limit
        while b"\n" not in self.heard:  # one read may bring two answers, so the rest is kept
            if not select.select([file], [], [], None if end is None else max(0.0, end - time.monotonic()))[0]:
                self.process.kill()
                return None
            if not (part := os.read(file, 1 << 16)):
                return None
            self.heard += part
        line, _, self.heard = self.heard.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "fatal" in answer:
            raise SystemExit(answer["fatal"])
        return answer

    def rows(self, studies: Sequence[tuple[Path, bool]]) -> Iterator[dict[str, Any]]:
        """Yield the row of each study (path, whether it is flat) in turn, without its path.

        The worker reads one study ahead of the networks. If it dies with two studies, each of them is read again alone.
        """
        sent = alone = 0
        for number in range(len(studies)):
            start = time.monotonic()
            while sent < len(studies) and sent <= number + (number >= alone):
                self.send(*studies[sent])
                sent += 1
            row = self.read_answer(LIMIT)
            if row is None and sent > number + 1:
                alone, sent, start = sent, number + 1, time.monotonic()
                self.restart()
                self.send(*studies[number])
                row = self.read_answer(LIMIT)
            yield row or self.make_failure(time.monotonic() - start)

    def send(self, path: Path, flat: bool) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"path": str(path), "flat": flat}) + "\n")
            self.process.stdin.flush()

    def make_failure(self, seconds: float) -> dict[str, Any]:
        """Start another worker; the row of the study that ended the last one after `seconds`."""
        self.restart()
        failure = "slow" if seconds > LIMIT else "crashed"
        return {
            "study_uid": "", "series_uid": "", "probability_of_pathology": None, "pathology": None,
            "processing_status": "Failure", "time_of_processing": round(seconds, 2),
            "most_dangerous_pathology_type": "", "findings": {}, "warnings": [], "failure": failure,
            "error": translate(failure, minutes=LIMIT // 60),
        }  # fmt: skip

    def restart(self) -> None:
        """Start another process. SystemExit: its models are not those of the last one."""
        self.end()
        about = self.start()
        if any(about[key] != self.about[key] for key in ("weights", "models")):
            raise SystemExit(REPLACED)
        self.about = about

    def end(self) -> str:
        """Tell the process to end and wait up to PATIENCE; say how it ended."""
        with suppress(BrokenPipeError):
            self.process.communicate("", timeout=PATIENCE)
        return f"ended with status {self.process.returncode}"

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            self.process.terminate()
        try:
            self.end()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def infer_studies(top: Path, out: Path, repository: Path, triton: str | None, again: bool) -> int:
    """Write the row of each study in `top` to `out`; the exit status."""
    try:
        paths = [top] if top.is_file() else find_studies(top, out)
    except OSError as error:
        raise SystemExit(f"INPUT: {(error.strerror or 'unreadable').lower()}; expected a folder of studies") from None
    if not paths:
        raise SystemExit("INPUT: no studies in it; expected folders, archives or NIfTI files, one per study")
    if top.is_file():
        top = top.parent
    output = Output(out)
    command = [sys.executable, "-m", "scripts.infer.worker", str(repository), *([triton] if triton else [])]
    with Worker(command) as worker:
        about = worker.about
        output.begin(about["weights"], (show_path(path, top) for path in paths))
        if about["weights"] != "real":
            print(
                translate({"synthetic": "synthetic"}.get(about["weights"], "unknown_weights")),
                file=sys.stderr,
                flush=True,
            )
        todo, statuses = [], []
        for path in paths:
            key = {
                "path_to_study": show_path(path, top),
                "fingerprint": fingerprint_study(path, top),
                "models": about["models"],
            }
            old = output.find(key["path_to_study"], key["fingerprint"])
            same = all(old.get(name) == value for name, value in key.items())
            # Triton does not tell which models it serves, so its earlier results may be out of date
            if same and not again and not triton and old.get("failure") not in TEMPORARY:
                statuses.append(old["processing_status"])
            else:
                todo.append((path, key))
        skipped, start = len(statuses), time.monotonic()
        output.write()
        if about.get("handover") and todo:
            print(translate(about["handover"], triton=triton), file=sys.stderr, flush=True)
        found = worker.rows([(path, path == top) for path, _ in todo])
        for done, ((_, key), row) in enumerate(zip(todo, found, strict=True), 1):
            output.add(key | row)
            statuses.append(row["processing_status"])
            left = (time.monotonic() - start) / done * (len(todo) - done)
            failed = statuses.count("Failure")
            print(translate("progress", done=skipped + done, total=len(paths), failed=failed, left=round(left)),
                  file=sys.stderr, flush=True)  # fmt: skip
    good = statuses.count("Success")
    print(
        translate("summary", total=len(paths), good=good, failed=len(paths) - good, skipped=skipped, out="output.xlsx")
    )
    if about["weights"] == "synthetic":
        print(translate("synthetic"))
    return ALL if good == len(paths) else SOME if good else NONE


@contextmanager
def unwind_on_signals() -> Iterator[None]:
    """Let SIGTERM, which `docker stop` sends, unwind the stack as Ctrl-C does."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Find what the networks see in each CT study.")
    parser.add_argument("input", type=Path, help="folder of studies, or one study in a file")
    parser.add_argument("output", type=Path, help="folder for output.xlsx, .csv, .json and warnings_and_errors.txt")
    parser.add_argument("--models", type=Path, default=Path("model_repository_running"), help="model repository")
    parser.add_argument("--triton", help="gRPC address host:port of a running Triton that serves the models")
    parser.add_argument("--again", action="store_true", help="read also the studies that are in the output already")
    given = parser.parse_args(argv)
    with unwind_on_signals():
        raise SystemExit(infer_studies(given.input, given.output, given.models, given.triton or None, given.again))


if __name__ == "__main__":
    main()
