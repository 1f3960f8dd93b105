"""The process that reads studies and runs the networks: one line of JSON in, one out.

    python -m scripts.infer.worker REPOSITORY [host:port]

It may be killed by what it reads; `scripts.infer` then starts another one. Nothing of a study reaches its terminal:
what libraries print is thrown away.
"""

import hashlib
import json
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from scripts.infer.words import REPLACED, StudyError, say


def work(repository: Path, triton: str | None) -> None:
    """Answers the first line, `{"weights", "models"}` or `{"fatal"}`, then a row for each `{"path", "flat"}`."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it as well
    signal.signal(signal.SIGTERM, leave)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")

    try:
        from scripts.infer.models import Triton, UnreachableError  # seconds, and not without a word

        models, name = (Triton(triton, repository), f"triton {triton}") if triton else local(repository)
    except SystemExit as error:
        return answer({"fatal": str(error)})
    except Exception as error:
        return answer({"fatal": say("internal", what=place(error))})
    with models:
        answer({"weights": models.weights, "models": name})
        for line in sys.stdin:
            question = json.loads(line)
            try:
                answer(row(Path(question["path"]), models, flat=question["flat"]))
            except UnreachableError as error:
                answer({"fatal": str(error)})


def local(repository: Path) -> tuple[Any, str]:
    """The models and their digest. SystemExit: other ones were published while they were opened."""
    from scripts.infer.models import Local, complete

    complete(repository)
    before = digest(repository)
    models = Local(repository)
    if digest(repository) != before:
        raise SystemExit(REPLACED)
    return models, before


def row(path: Path, models: Any, *, flat: bool) -> dict[str, Any]:
    """All of a study's row but its path."""
    from scripts.infer.models import UnreachableError
    from scripts.infer.study import Reading, examine

    start, reading, failure, error = time.monotonic(), Reading(), "", ""
    try:
        examine(path, models, reading, flat=flat)
    except StudyError as trouble:
        failure, error = trouble.key, str(trouble)
    except UnreachableError:
        raise
    except MemoryError:
        failure, error = "no_memory", say("no_memory")
    except Exception as bug:  # its text may hold content of a file, so only where it happened is told
        failure, error = "internal", say("internal", what=place(bug))
    result = reading.result
    return {
        "study_uid": uid(reading.study_uid),
        "series_uid": uid(reading.series_uid),
        "probability_of_pathology": round(result.probability, 4) if result else None,
        "pathology": result.pathology if result else None,
        "processing_status": "Success" if result else "Failure",
        "time_of_processing": round(time.monotonic() - start, 2),
        "most_dangerous_pathology_type": result.most_dangerous if result else "",
        "findings": {name: round(value, 4) for name, value in result.findings.items()} if result else {},
        "choice": reading.choice,
        "volume": reading.volume,
        "warnings": reading.warnings or [],
        "failure": failure,
        "error": error,
    }


def uid(text: str) -> str:
    """A DICOM UID; whatever else stood in its place is not repeated."""
    return text if re.fullmatch(r"[0-9.]{1,64}", text) else ""


def place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}, {Path(frame.filename).name}:{frame.lineno}"


def digest(repository: Path) -> str:
    """Of all that results come from: the networks, and the programs that read studies for them."""
    from scripts.infer.models import BPREG, ONNX, SETTINGS

    total = hashlib.sha256()
    programs = [*sorted((repository / BPREG).parent.glob("*.py")), *sorted(Path(__file__).parent.glob("*.py"))]
    for path in [*(repository / file for file in (*ONNX.values(), SETTINGS)), *programs]:
        with path.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
