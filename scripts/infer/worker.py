"""The process that reads studies and runs the networks. It answers each line of JSON with one line of JSON.

    python -m scripts.infer.worker REPOSITORY [host:port]

A study may crash it; `scripts.infer` then starts another one. Output of libraries is discarded, so nothing of a study
reaches the terminal.
"""

import hashlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Semaphore, Thread
from types import FrameType
from typing import Any

from scripts.infer.messages import REPLACED, StudyError, translate


def run_worker(repository: Path, triton: str | None) -> None:
    """Write `{"weights", "models", "handover"}` or `{"fatal"}`, then a row for each `{"path", "flat"}` from stdin."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too, and ends this process
    signal.signal(signal.SIGTERM, exit_on_signal)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")

    try:
        from scripts.infer.triton import Triton  # takes seconds and may fail, so not before errors can be answered

        key = os.environ.get("CHEST_KEY", "")
        models, name = (
            (Triton(triton, repository, key), f"triton {triton}") if triton else open_local_models(repository)
        )
    except SystemExit as error:
        return answer({"fatal": str(error)})
    except Exception as error:
        return answer({"fatal": translate("internal", what=locate_error(error))})
    with models:
        answer({"weights": models.weights, "models": name, "handover": models.handover})
        read_ahead(sys.stdin, models, answer)


def read_ahead(questions: Iterable[str], models: Any, answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer each question in turn; read a study while the networks run on the one before.

    At most two studies are in memory: the next one is opened only after the networks have taken the last tensor.
    """
    from scripts.infer.triton import UnreachableError

    ready: Queue[Prepared | None] = Queue()
    room = Semaphore(1)

    def run_networks() -> None:
        failed = False
        while (prepared := ready.get()) is not None:
            room.release()
            if not failed:
                try:
                    if isinstance(prepared.trouble, UnreachableError):
                        raise prepared.trouble
                    answer(finish_study(prepared, models))
                except UnreachableError as error:
                    failed = True
                    answer({"fatal": str(error)})
            del prepared  # free its memory before waiting for the next one
            ready.task_done()

    networks = Thread(target=run_networks, daemon=True)
    networks.start()
    for line in questions:
        room.acquire()
        question = json.loads(line)
        prepared = prepare_study(Path(question["path"]), models, flat=question["flat"])
        if isinstance(prepared.trouble, MemoryError) and ready.unfinished_tasks:
            del prepared
            ready.join()  # the study may fit alone
            prepared = prepare_study(Path(question["path"]), models, flat=question["flat"])
        ready.put(prepared)
        del prepared
    ready.put(None)
    networks.join()


def open_local_models(repository: Path) -> tuple[Any, str]:
    """The models and their digest. SystemExit: others were published meanwhile, or a file is missing or damaged."""
    from scripts.infer.models import Local, check_complete

    check_complete(repository)
    before = fingerprint_results(repository)
    models = Local(repository)
    if fingerprint_results(repository) != before:
        raise SystemExit(REPLACED)
    return models, before


@dataclass
class Prepared:
    """A study with its tensor, float32 of the ViT's shape, or with the error that prevented it."""

    reading: Any
    tensor: Any
    trouble: BaseException | None
    seconds: float


def prepare_study(path: Path, models: Any, *, flat: bool) -> Prepared:
    """Read and preprocess a study; keep an error for its row."""
    from scripts.infer.study import Reading, make_tensor

    start, reading, found = time.monotonic(), Reading(), None
    trouble: BaseException | None = None
    try:
        found = make_tensor(path, models, reading, flat=flat)
    except (StudyError, MemoryError) as error:
        trouble = error.with_traceback(None)  # a traceback would keep the voxels in memory
    except Exception as error:
        trouble = error
    return Prepared(reading, found, trouble, time.monotonic() - start)


def finish_study(prepared: Prepared, models: Any) -> dict[str, Any]:
    """Run the networks and make the study's row, without its path. UnreachableError: Triton is gone."""
    from scripts.infer.triton import UnreachableError

    start, reading, trouble, failure, error = time.monotonic(), prepared.reading, prepared.trouble, "", ""
    if not trouble:
        try:
            reading.result = models.infer(prepared.tensor)
        except UnreachableError:
            raise
        except Exception as found:
            trouble = found
    if isinstance(trouble, StudyError):
        failure, error = trouble.key, str(trouble)
    elif isinstance(trouble, MemoryError):
        failure, error = "no_memory", translate("no_memory")
    elif trouble:  # its text may repeat content of a file, so the row tells only its place
        failure, error = "internal", translate("internal", what=locate_error(trouble))
    result, networks = reading.result, time.monotonic() - start
    return {
        "study_uid": clean_uid(reading.study_uid),
        "series_uid": clean_uid(reading.series_uid),
        "probability_of_pathology": round(result.probability, 4) if result else None,
        "pathology": result.pathology if result else None,
        "processing_status": "Success" if result else "Failure",
        "time_of_processing": round(prepared.seconds + networks, 2),
        "most_dangerous_pathology_type": result.most_dangerous if result else "",
        "findings": {name: round(value, 4) for name, value in result.findings.items()} if result else {},
        "choice": reading.choice,
        "volume": reading.volume,
        "warnings": reading.warnings or [],
        "failure": failure,
        "error": error,
        "seconds": {
            "reading": round(prepared.seconds - reading.preprocessing, 3),
            "preprocessing": round(reading.preprocessing, 3),
            "networks": round(networks, 3),
        },
    }


def clean_uid(text: str) -> str:
    """`text` if it is a DICOM UID, else ""."""
    return text if re.fullmatch(r"[0-9.]{1,64}", text) else ""


def locate_error(error: BaseException) -> str:
    """The error's class, file and line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}, {Path(frame.filename).name}:{frame.lineno}"


def fingerprint_results(repository: Path) -> str:
    """Digest of all that results depend on: the networks, and the programs that read studies for them."""
    from scripts.infer.models import BPREG, ONNX, SETTINGS

    total = hashlib.sha256()
    programs = [*sorted((repository / BPREG).parent.glob("*.py")), *sorted(Path(__file__).parent.glob("*.py"))]
    for path in [*(repository / file for file in (*ONNX.values(), SETTINGS)), *programs]:
        with path.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def exit_on_signal(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    run_worker(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
