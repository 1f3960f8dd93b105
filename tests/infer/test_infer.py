"""Run make infer: ONNX Runtime here, a running Triton and the image give the same rows."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import openpyxl
import pydicom
import pydicom.data
import pytest
from conftest import REPOSITORY, ROOT, Project, kill

from scripts.convert.sample import SPACING, make_sample
from scripts.infer import __main__ as program
from scripts.infer import models, tables, worker
from scripts.infer.__main__ import Worker
from scripts.infer.findings import BY_DANGER, FINDINGS, Result, make_result, normalise_embedding
from scripts.infer.messages import StudyError, translate
from scripts.infer.sentences import SENTENCES
from scripts.infer.tables import COLUMNS, Output, show_path
from scripts.infer.triton import SERVED, Triton
from scripts.infer.volume import Volume
from scripts.infer.worker import open_local_models
from scripts.serve.triton_server import triton_server
from tests.dicom_studies import PATIENT, lungs, series, uid
from tests.infer.test_infer_series import COMPRESSED, compress
from tests.inference_base_stand_in import NAME, inference_base_stand_in

BROKEN = {"Petrov_1950.zip", "head", "mr"}
IMAGE = "chest-inference-test:synthetic"
STAMP = "SYNTHETIC WEIGHTS: these results mean nothing and are for tests alone"


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight studies, three of them broken."""
    top = tmp_path_factory.mktemp("studies")
    chest = lungs(20)
    series(top / "chest", chest, name="thick")
    series(top / "chest" / "deeper", lungs(40, seed=1), name="thin", spacing=(2.5, 6, 6.5))
    series(top / "chest", chest[:1], name="scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SliceThickness=0.5)
    for path in series(top / "missing", chest, study="missing")[5:9:3]:
        path.unlink()
    for path in series(top / "files", chest, study="compressed"):
        compress(path, COMPRESSED["JPEG lossless SV1"])
    pack(top / "files", top / "compressed.zip")
    body = make_sample({"family": "bpr"}, 0, 1)["input"][0]
    body[:, :2] = -1000  # without air it would not be CT
    (x, y, z) = SPACING
    series(top / "files", body, study="unnamed", spacing=(z, y, x), BodyPartExamined=None)
    pack(top / "files", top / "unnamed.tar.gz")
    nibabel.save(nibabel.Nifti1Image(lungs(30).transpose(2, 1, 0), np.diag([1.5, 1.5, 3, 1])), top / "volume.nii.gz")
    series(top / "head", chest, study="head", BodyPartExamined="HEAD")
    series(top / "mr", chest, study="mr", Modality="MR", BodyPartExamined=None)
    series(top / "files", chest, study="cut")
    data = pack(top / "files", top / "Petrov_1950.zip").read_bytes()
    (top / "Petrov_1950.zip").write_bytes(data[: len(data) // 2])
    return top


def pack(folder: Path, archive: Path) -> Path:
    """Move a folder into an archive."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
            for path in folder.iterdir():
                out.write(path, f"{PATIENT}/{path.name}")
    else:
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder, PATIENT)
    shutil.rmtree(folder)
    return archive


def rows(output: Path) -> dict[str, dict[str, Any]]:
    return {row["path_to_study"]: row for row in json.loads((output / "output.json").read_text())["studies"]}


def infer(project: Path, *words: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the program as `make infer` and the image do."""
    return subprocess.run(
        [project / ".venv-inference/bin/python3", "-m", "scripts.infer", *map(str, words)],
        cwd=project, text=True, capture_output=True, env={**os.environ, "LC_ALL": "C", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def here(built: Project, studies: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder of make infer, and what it printed."""
    output = tmp_path_factory.mktemp("here") / "made by it"
    said = built.fail("infer", f"INPUT={studies}", f"OUTPUT={output}", LC_ALL="C")
    return output, said


def test_each_of_eight_studies_gets_a_row_also_the_three_broken_ones(here: tuple[Path, str]) -> None:
    output, said = here
    found = rows(output)

    assert {name for name, row in found.items() if row["processing_status"] == "Failure"} == BROKEN
    assert len(found) == 8
    assert found["chest"]["series_uid"] == uid("study", "thin")
    assert found["unnamed.tar.gz"]["study_uid"] == uid("unnamed")  # by the body-part network
    assert found["chest"]["choice"] == (
        "chosen from 2 CT volumes by coverage (100 mm), slice distance (2.5 mm), "
        "thickness, soft-tissue window and kernel, in this order"
    )
    assert found["missing"]["choice"] == "the only CT volume: 90 mm, slices 5.0 mm apart"
    assert found["head"]["error"] == "there are CT series, but none shows the chest"
    assert found["mr"]["error"] == "no CT series and no chest series found"
    assert found["Petrov_1950.zip"]["error"] == "the archive is damaged or incomplete; pack or copy it again"
    assert found["missing"]["warnings"] == [
        "about 10 % of the slices are missing", "2 missing slices were filled in from their neighbours",
    ]  # fmt: skip
    for name, row in found.items():
        assert list(row["findings"]) == ([] if name in BROKEN else list(FINDINGS))
    assert "8 of 8 studies, 3 failed, 0 s left" in said
    assert "8 studies: 5 succeeded, 3 failed, 0 were in the output before; see output.xlsx" in said
    assert "Error 3" in said  # some succeeded


def test_xlsx_and_csv_have_the_columns_of_the_existing_script_and_the_rows_of_the_json(here: tuple[Path, str]) -> None:
    output, _ = here
    expected = rows(output)
    book = openpyxl.load_workbook(output / "output.xlsx")
    header, *table = book.worksheets[0].iter_rows(values_only=True)
    with (output / "output.csv").open() as file:
        csv_header, *csv_table = csv.reader(file)

    assert header == tuple(csv_header) == (*COLUMNS, "weights")
    assert [str(row[0]) for row in table] == [row[0] for row in csv_table] == sorted(expected)
    for line, csv_line in zip(table, csv_table, strict=True):
        row = expected[str(line[0])]
        assert [value if value is not None else "" for value in line[:8]] == [
            row[name] if row[name] is not None else "" for name in COLUMNS
        ]
        assert csv_line == [*("" if row[name] is None else str(row[name]) for name in COLUMNS), "synthetic"]
        if row["processing_status"] == "Success":
            assert row["probability_of_pathology"] == round(row["probability_of_pathology"], 4)
            assert row["pathology"] == int(row["probability_of_pathology"] > 0.5)


def test_results_of_synthetic_weights_are_stamped_in_every_output(here: tuple[Path, str]) -> None:
    output, said = here

    assert said.count(STAMP) == 2
    assert json.loads((output / "output.json").read_text())["weights"] == "synthetic"
    assert (output / "warnings_and_errors.txt").read_text().startswith(f"{STAMP}\n")
    assert all(line.endswith(",synthetic") for line in (output / "output.csv").read_text().splitlines()[1:])
    book = openpyxl.load_workbook(output / "output.xlsx")
    assert book.sheetnames == ["SYNTHETIC", "warnings_and_errors"]
    assert {row[-1] for row in book.worksheets[0].iter_rows(min_row=2, values_only=True)} == {"synthetic"}
    assert book.worksheets[1]["A1"].value == STAMP


def test_no_output_names_a_patient_and_only_the_table_has_paths(here: tuple[Path, str], studies: Path) -> None:
    output, said = here
    remarks = (output / "warnings_and_errors.txt").read_text()
    tables = (output / "output.json").read_text() + (output / "output.csv").read_text()
    for sheet in openpyxl.load_workbook(output / "output.xlsx"):
        tables += str(list(sheet.values))

    said = said.replace(str(studies), "")  # make repeats its command when it fails
    for text in (remarks, tables, said):
        assert not [word for word in ("Ivanov", str(studies), "thick-0") if word in text]
    assert "Petrov" not in remarks + said and "row 2: error: the archive is damaged" in remarks


@pytest.fixture(scope="module")
def served(built: Project) -> Iterator[Any]:
    with triton_server(
        built.path / REPOSITORY, built.path / "build/logs/infer.log", venv=ROOT / ".venv-triton"
    ) as server:
        yield server


def same(found: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    """Assert equal rows, except for times and the rounding of another ONNX Runtime."""
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        other = found[name]
        for key in {*COLUMNS, "warnings", "error"} - {"time_of_processing", "probability_of_pathology"}:
            assert other[key] == row[key], (name, key)
        assert other["probability_of_pathology"] == pytest.approx(row["probability_of_pathology"], abs=2e-4)
        assert other["findings"] == pytest.approx(row["findings"], abs=2e-4)


def states(served: Any) -> set[str]:
    """The states of the server's models, once none is being unloaded."""
    for _ in range(600):
        found = {model.get("state") for model in served.ask("/v2/repository/index", "POST")}
        if "UNLOADING" not in found:
            break
        time.sleep(0.1)
    return found


def test_a_running_triton_gives_the_same_rows(
    built: Project, served: Any, studies: Path, here: tuple[Path, str], tmp_path: Path
) -> None:
    said = built.fail("infer", f"INPUT={studies}", f"OUTPUT={tmp_path}", f"TRITON={served.grpc}", LC_ALL="C")

    assert "Error 3" in said and said.count(STAMP) == 2
    same(rows(tmp_path), rows(here[0]))
    assert states(served) == {"READY"}  # as before


def test_with_a_triton_no_model_files_are_needed_and_a_missing_server_is_an_error(
    built: Project, served: Any, studies: Path, tmp_path: Path
) -> None:
    shutil.copytree(studies / "chest", tmp_path / "in/chest")
    words = ["--models", tmp_path / "nowhere", tmp_path / "in", tmp_path / "out"]

    for name in SERVED.values():
        served.ask(f"/v2/repository/models/{name}/unload", "POST")
    assert states(served) == {"UNAVAILABLE"}
    run = infer(built.path, "--triton", served.grpc, *words)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "out/output.json").read_text())["weights"] == "unknown"
    assert "it is unknown whether" in (tmp_path / "out/warnings_and_errors.txt").read_text()
    assert states(served) == {"UNAVAILABLE"}  # loaded for the run, then unloaded

    run = infer(built.path, "--triton", "127.0.0.1:1", *words)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("TRITON=127.0.0.1:1: ") and "Traceback" not in run.stderr


@pytest.fixture(scope="module")
def image(built: Project, docker_engine: None) -> Iterator[str]:
    said = built.make("image", "TARGET=inference", f"IMAGE={IMAGE}", f"BASE={inference_base_stand_in()}")
    assert f"{IMAGE}: synthetic weights" in said
    yield IMAGE
    subprocess.run(["docker", "image", "rm", "--force", IMAGE, NAME], capture_output=True, check=True)


def test_the_image_gives_the_same_rows_in_files_of_the_folder_s_owner(
    image: str, studies: Path, here: tuple[Path, str], tmp_path: Path
) -> None:
    os.chown(tmp_path, 1234, 1235)

    run = subprocess.run(
        ["docker", "run", "--rm", "--network=none", "--read-only", "--tmpfs=/tmp", f"--volume={studies}:/input:ro",
         f"--volume={tmp_path}:/output", image], capture_output=True, text=True,
    )  # fmt: skip

    assert run.returncode == 3, run.stderr
    assert STAMP in run.stdout and STAMP in run.stderr and "Traceback" not in run.stderr
    same(rows(tmp_path), rows(here[0]))
    assert {(path.stat().st_uid, path.stat().st_gid) for path in tmp_path.iterdir()} == {(1234, 1235)}


def test_the_image_runs_as_any_user_and_has_no_pytorch(image: str, studies: Path, tmp_path: Path) -> None:
    os.chown(tmp_path, 1234, 1235)
    run = subprocess.run(
        ["docker", "run", "--rm", "--user=1234:1235", "--env=LANG=ru_RU.UTF-8", f"--volume={studies}/mr:/input/mr:ro",
         f"--volume={tmp_path}:/output", image], capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 4, run.stderr  # no study succeeded
    assert "осталось 0 с" in run.stderr
    assert (
        "строка 2: ошибка: не найдено ни серий КТ, ни серий грудной клетки"
        in (tmp_path / "warnings_and_errors.txt").read_text()
    )

    python = ["docker", "run", "--rm", "--entrypoint=/opt/inference/bin/python3", image, "-c"]
    assert subprocess.run([*python, "import onnxruntime"], capture_output=True).returncode == 0
    config = [
        *python[:3],
        "--entrypoint=cat",
        image,
        "/models/vit_onnx/config.pbtxt",
    ]  # says whether a GPU may use TF32
    assert b"use_tf32" in subprocess.run(config, capture_output=True).stdout
    assert b"No module named 'torch'" in subprocess.run([*python, "import torch"], capture_output=True).stderr


def test_an_unchanged_image_is_not_built_again_and_a_synthetic_one_is_tagged_so(built: Project, image: str) -> None:
    base = f"BASE={inference_base_stand_in()}"
    assert f"{image} is up to date" in built.make("image", "TARGET=inference", f"IMAGE={image}", base)
    said = built.fail("image", "TARGET=inference", "IMAGE=chest-inference-test:1", base)
    assert "the tag of a synthetic image must say so: IMAGE=chest-inference-test:synthetic" in said


# --- Runs again, and runs that are cut short


def test_studies_in_the_output_are_skipped_until_they_change(built: Project, studies: Path, tmp_path: Path) -> None:
    for name in ("chest", "mr"):
        shutil.copytree(studies / name, tmp_path / "in" / name)
    words = [tmp_path / "in", tmp_path / "out"]
    assert infer(built.path, *words).returncode == 3
    before = rows(tmp_path / "out")

    run = infer(built.path, *words)
    assert run.returncode == 3 and "2 studies: 1 succeeded, 1 failed, 2 were in the output before" in run.stdout
    assert rows(tmp_path / "out") == before

    series(tmp_path / "in/mr", lungs(20), study="now-ct")
    run = infer(built.path, *words)
    assert run.returncode == 0 and "1 were in the output before" in run.stdout
    assert "0 were in the output before" in infer(built.path, "--again", *words).stdout


def started(project: Path, studies: Path, out: Path, *, after: str) -> "subprocess.Popen[str]":
    """The running program, once it has printed `after`."""
    words = [project / ".venv-inference/bin/python3", "-m", "scripts.infer", studies, out]
    run = subprocess.Popen(words, cwd=project, text=True, start_new_session=True, stderr=subprocess.PIPE)
    assert run.stderr
    while after not in run.stderr.readline():
        assert run.poll() is None
    return run


def test_a_kill_loses_only_the_studies_in_work(built: Project, studies: Path, tmp_path: Path) -> None:
    run = started(built.path, studies, tmp_path / "out", after="2 of 8")
    kill(run)
    done = rows(tmp_path / "out")
    assert 2 <= len(done) < 8

    run_again = infer(built.path, studies, tmp_path / "out")

    assert f"3 failed, {len(done)} were in the output before" in run_again.stdout
    after = rows(tmp_path / "out")
    assert len(after) == 8 and all(after[name] == row for name, row in done.items())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "output.csv", "output.json", "output.xlsx", "warnings_and_errors.txt",
    ]  # fmt: skip


def test_ctrl_c_ends_it_without_a_traceback(built: Project, studies: Path, tmp_path: Path) -> None:
    run = started(built.path, studies, tmp_path / "out", after="1 of 8")
    os.killpg(run.pid, signal.SIGINT)
    said = run.communicate(timeout=60)[1]

    assert run.returncode == 130 and "Traceback" not in said
    with pytest.raises(ProcessLookupError):  # no process of the group is left
        for _ in range(100):
            os.killpg(run.pid, 0)
            time.sleep(0.1)


WORKER_STAND_IN = """
import json, os, signal, sys
print(json.dumps({"weights": "real", "models": "m"}), flush=True)
for line in sys.stdin:
    if "crash" in line:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in line:
        signal.pause()
    print(json.dumps({"processing_status": "Success"}), flush=True)
"""


def test_a_study_that_crashes_the_worker_fails_and_the_next_one_is_read() -> None:
    with Worker([sys.executable, "-c", WORKER_STAND_IN]) as worker:
        first, second = worker.rows([(Path("crash"), False), (Path("good"), False)])

    assert (first["processing_status"], first["error"]) == ("Failure", translate("crashed"))
    assert second["processing_status"] == "Success"


def test_a_study_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    with Worker([sys.executable, "-c", WORKER_STAND_IN]) as worker:
        monkeypatch.setattr(program, "LIMIT", 0.01)
        (first,) = worker.rows([(Path("hang"), False)])
        monkeypatch.setattr(program, "LIMIT", 600)
        (second,) = worker.rows([(Path("good"), False)])

    assert (first["processing_status"], first["failure"]) == ("Failure", "slow")
    assert second["processing_status"] == "Success"


def test_two_answers_at_once_are_two_rows() -> None:
    answers = "".join(json.dumps({"number": number}) + "\n" for number in range(2))
    code = f"""
import sys
print({json.dumps({"weights": "real", "models": "m"})!r}, flush=True)
sys.stdin.readline(), sys.stdin.readline()
print({answers!r}, end="", flush=True)
"""
    with Worker([sys.executable, "-c", code]) as worker:
        assert list(worker.rows([(Path("a"), False), (Path("b"), False)])) == [{"number": 0}, {"number": 1}]


# Dies while it reads "crash"; in its first process the networks have begun "b", the study before, and never finish it
OVERLAPPING = """
import json, os, signal, sys, threading, time
from pathlib import Path
from scripts.infer import worker

def prepare(path, models, flat):
    if path.name == "crash":
        while not Path(sys.argv[1]).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGSEGV)
    return worker.Prepared(path.name, None, None, 0.0)

def finish(prepared, models):
    if prepared.reading == "b" and not Path(sys.argv[1]).exists():
        Path(sys.argv[1]).touch()
        threading.Event().wait()
    return {"study": prepared.reading}

worker.prepare_study, worker.finish_study = prepare, finish
answer = lambda content: print(json.dumps(content), flush=True)
answer({"weights": "real", "models": "m"})
worker.read_ahead(sys.stdin, None, answer)
"""


def test_of_two_studies_in_work_only_the_one_that_crashes_the_worker_fails(tmp_path: Path) -> None:
    with Worker([sys.executable, "-c", OVERLAPPING, str(tmp_path / "once")]) as worker:
        rows = list(worker.rows([(Path(name), False) for name in ("a", "b", "crash", "c", "d")]))

    assert [row.get("study", row.get("failure")) for row in rows] == ["a", "b", "crashed", "c", "d"]


def test_only_one_study_is_read_ahead_of_the_networks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The networks wait until the next study is read; the study after that must not be read yet."""
    reading = {name: threading.Event() for name in "abc"}
    begun: list[list[str]] = []

    def prepare(path: Path, models: object, flat: bool) -> worker.Prepared:
        reading[path.name].set()
        return worker.Prepared(path.name, None, None, 0.0)

    def finish(prepared: worker.Prepared, models: object) -> dict[str, Any]:
        name = prepared.reading
        if name != "c":
            assert reading["b" if name == "a" else "c"].wait(60)
        begun.append([other for other in "abc" if reading[other].is_set()])
        return {"study": name}

    monkeypatch.setattr(worker, "prepare_study", prepare)
    monkeypatch.setattr(worker, "finish_study", finish)
    answers: list[dict[str, Any]] = []
    worker.read_ahead((json.dumps({"path": name, "flat": False}) for name in "abc"), None, answers.append)

    assert [answer["study"] for answer in answers] == ["a", "b", "c"]
    assert begun == [["a", "b"], ["a", "b", "c"], ["a", "b", "c"]]


def test_a_study_without_memory_beside_another_is_read_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, done = [], threading.Event()

    def prepare(path: Path, models: object, flat: bool) -> worker.Prepared:
        tried.append(path.name)
        trouble = MemoryError() if path.name == "large" and not done.is_set() else None
        return worker.Prepared(path.name, None, trouble, 0.0)

    def finish(prepared: worker.Prepared, models: object) -> dict[str, Any]:
        if prepared.reading == "first":
            while "large" not in tried:
                time.sleep(0.01)
            done.set()
        return {"study": prepared.reading, "trouble": repr(prepared.trouble)}

    monkeypatch.setattr(worker, "prepare_study", prepare)
    monkeypatch.setattr(worker, "finish_study", finish)
    answers: list[dict[str, Any]] = []
    worker.read_ahead((json.dumps({"path": name, "flat": False}) for name in ("first", "large")), None, answers.append)

    assert answers[1] == {"study": "large", "trouble": "None"}
    assert tried[:2] == ["first", "large"]


def test_models_replaced_between_two_studies_end_the_run() -> None:
    code = WORKER_STAND_IN.replace('"models": "m"', '"models": os.getpid()')
    with pytest.raises(SystemExit, match="the models were replaced during the run; run it again"):  # noqa: SIM117
        with Worker([sys.executable, "-c", code]) as worker:
            list(worker.rows([(Path("crash"), False)]))


def test_models_published_while_they_are_opened_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (*models.ONNX.values(), models.BPREG, models.SETTINGS):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"old")

    def publish(repository: Path) -> None:
        (repository / models.ONNX["binary"]).write_bytes(b"new")

    monkeypatch.setattr(models, "Local", publish)
    with pytest.raises(SystemExit, match="the models were replaced during the run; run it again"):
        open_local_models(tmp_path)


@pytest.mark.parametrize(
    ("failure", "triton", "read_again"),
    [("", None, False), ("no_chest", None, False), ("crashed", None, True), ("network", None, True), ("", "t:1", True)],
)
def test_temporary_failures_and_results_of_triton_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, triton: str | None, read_again: bool
) -> None:
    (tmp_path / "in/study").mkdir(parents=True)
    read: list[Path] = []

    class WorkerStandIn(Worker):
        def __init__(self, command: object) -> None:
            self.about = {"weights": "real", "models": "m"}

        def __exit__(self, *_: object) -> None:
            pass

        def rows(self, studies: Sequence[tuple[Path, bool]]) -> Iterator[dict[str, Any]]:
            for path, _ in studies:
                read.append(path)
                row: dict[str, Any] = dict.fromkeys(COLUMNS[1:], "")
                status = "Failure" if failure else "Success"
                yield row | {"processing_status": status, "warnings": [], "failure": failure, "error": failure}

    monkeypatch.setattr(program, "Worker", WorkerStandIn)
    monkeypatch.setattr(tables.fcntl, "flock", lambda *_: None)  # a process holds the lock until it ends
    for _ in range(2):
        program.infer_studies(tmp_path / "in", tmp_path / "out", tmp_path, triton, again=False)

    assert len(read) == 1 + read_again


# --- A Triton that fails


class TritonStandInError(Exception):
    def status(self) -> str:
        return "StatusCode.INTERNAL"


class ClientStandIn:
    """A client of a server that has one model loaded and fails to infer."""

    def __init__(self, message: str = "", ready: str = "") -> None:
        self.said, self.ready, self.calls = message, ready, list[str]()

    def is_model_ready(self, name: str, *_: object, **__: object) -> bool:
        return name == self.ready

    def load_model(self, name: str, **_: object) -> None:
        self.calls.append(f"load {name}")

    def unload_model(self, name: str, **_: object) -> None:
        self.calls.append(f"unload {name}")

    def infer(self, *_: object, **__: object) -> None:
        raise TritonStandInError(self.said)

    def close(self) -> None:
        pass


def triton_of(client: ClientStandIn) -> Triton:
    triton = Triton.__new__(Triton)
    triton.client = triton.sender = client
    triton.loaded, triton.error, triton.headers, triton.returns = [], TritonStandInError, {}, 0
    return triton


def test_a_model_that_another_client_loaded_stays_loaded() -> None:
    client = ClientStandIn(ready="bpr_model")
    triton = triton_of(client)

    triton.load_model("bpr_model")
    triton.load_model("vit_onnx")
    triton.close()

    assert client.calls == ["load vit_onnx", "unload vit_onnx"]


def test_a_server_error_does_not_mean_that_there_is_no_chest() -> None:
    volume = Volume(lungs(4), (5, 6, 6))

    for message in (
        "bpr_model: no slice is left: each is 0 after preprocessing",
        "bpr_model: 4 voxels of 0.5 mm resample to 1 of 3.5 mm, expected 2 or more",
    ):
        assert triton_of(ClientStandIn(message)).find_body_part(volume) == "NONE"
    for message in ("bpr_model: CUDA out of memory", "Deadline Exceeded"):
        with pytest.raises(StudyError) as error:
            triton_of(ClientStandIn(message)).find_body_part(volume)
        assert error.value.key == "network"


def test_weights_are_real_only_if_every_network_says_so() -> None:
    class SessionStandIn:
        def __init__(self, kind: str) -> None:
            self.custom_metadata_map = {"weights": kind} if kind else {}

        def get_modelmeta(self) -> "SessionStandIn":
            return self

    for kinds, expected in (
        (["real", "real"], "real"), (["real", ""], "unknown"), (["", "synthetic"], "synthetic"), ([""], "unknown"),
    ):  # fmt: skip
        assert models.find_weights_kind(map(SessionStandIn, kinds)) == expected


# --- Real files that packages ship


def test_each_real_file_gets_a_row_with_a_true_reason(built: Project, tmp_path: Path) -> None:
    """Files of pydicom and nibabel, and a scan of 12 slices made from pydicom's one CT slice."""
    shipped = Path(pydicom.data.get_testdata_file("CT_small.dcm", download=False)).parent  # type: ignore[arg-type]
    for number in range(12):
        ds = pydicom.dcmread(shipped / "CT_small.dcm")
        ds.BodyPartExamined, ds.InstanceNumber, ds.SOPInstanceUID = "CHEST", number + 1, uid("real", number)
        ds.ImagePositionPatient[2] = 5 * number
        for kind in ("plain", *COMPRESSED):
            path = tmp_path / "in" / kind / f"{number}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            ds.StudyInstanceUID = uid("real", kind)
            ds.save_as(path)
            if kind != "plain":
                compress(path, COMPRESSED[kind])
    for path in shipped.glob("*.dcm"):
        (tmp_path / "in" / path.stem).mkdir()
        shutil.copy(path, tmp_path / "in" / path.stem)
    shutil.copytree(shipped / "dicomdirtests", tmp_path / "in/dicomdirtests", ignore=shutil.ignore_patterns("*.py"))
    images = Path(nibabel.__file__).parent / "tests/data"
    for name in ("anatomical.nii", "functional.nii", "example4d.nii.gz", "example_nifti2.nii.gz", "standard.nii.gz",
                 "analyze.hdr", "nifti1.hdr", "small.mnc", "reoriented_anat_moved.nii"):  # fmt: skip
        shutil.copy(images / name, tmp_path / "in" / name)

    run = infer(built.path, tmp_path / "in", tmp_path / "out")

    assert run.returncode == 3, run.stderr
    found = rows(tmp_path / "out")
    assert len(found) == len(list((tmp_path / "in").iterdir()))
    good = {name: row for name, row in found.items() if row["processing_status"] == "Success"}
    assert set(good) == {"plain", *COMPRESSED}
    assert len({row["volume"] for row in good.values()}) == 1
    failures = {name: row["failure"] for name, row in found.items() if name not in good}
    assert not {"internal", "crashed", "damaged", ""} & {*failures.values()}, failures
    assert failures["anatomical.nii"] == failures["standard.nii.gz"] == "no_hounsfield"
    assert failures["functional.nii"] == failures["example4d.nii.gz"] == "dimensions"
    assert failures["analyze.hdr"] == failures["nifti1.hdr"] == "no_pair"
    assert failures["small.mnc"] == "unknown_volume"
    assert failures["MR_small"] == "nothing" and failures["CT_small"] == "only_scouts"


# --- What is refused


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("config.tf32.pbtxt", "1"),
        ("config.pbtxt", "0"),
        ('parameters { key: "use_tf32", value: "1" }', "1"),
        ('# parameters { key: "use_tf32" value: "1" }', "0"),
        ("", "0"),
        (None, "0"),
    ],
)
def test_a_gpu_uses_tf32_only_if_the_published_config_allows_it(
    config: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that says nothing, and bpr, mean float32."""
    for name in models.ONNX.values():
        (tmp_path / name).parent.mkdir(parents=True)
    if config is not None:
        ours = ROOT / "convertation/vit" / config if config.endswith(".pbtxt") else None
        (tmp_path / "vit_onnx/config.pbtxt").write_text(ours.read_text() if ours else config)
    opened: dict[str, Any] = {}

    def stand_in(file: str, options: object, providers: list[Any]) -> None:
        opened[file] = dict(providers[:1])["CUDAExecutionProvider"]

    monkeypatch.setattr(models.onnxruntime, "InferenceSession", stand_in)
    monkeypatch.setattr(models.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(models.Path, "exists", lambda path: str(path) == "/dev/nvidiactl")

    for name in models.ONNX.values():
        models.open_session(tmp_path / name, models.may_use_tf32(tmp_path / name))

    found = {name: opened[str(tmp_path / name)]["use_tf32"] for name in models.ONNX.values()}
    assert found == dict.fromkeys(models.ONNX.values(), "0") | {models.ONNX["vit"]: expected}


def test_an_incomplete_repository_is_refused(project: Project, studies: Path, tmp_path: Path) -> None:
    (project.path / REPOSITORY / "bpr_model/1/weights/model.onnx").unlink()

    run = infer(project.path, studies, tmp_path)

    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr == (
        f"{REPOSITORY} lacks bpr_model/1/weights/model.onnx; expected a whole repository with ONNX files; "
        "make repository\n"
    )


def test_a_damaged_network_is_refused(project: Project, studies: Path, tmp_path: Path) -> None:
    (project.path / REPOSITORY / "vit_onnx/1/model.onnx").write_bytes(b"no network")

    run = infer(project.path, studies, tmp_path)

    assert run.returncode == 1 and "vit_onnx/1/model.onnx cannot be opened as an ONNX file" in run.stderr
    assert "Traceback" not in run.stderr


def test_wrong_input_and_output_folders_are_refused(built: Project, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/output.xlsx").write_bytes(b"theirs")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/s.zip").write_bytes(b"")

    for words, error in (
        ((tmp_path / "gone", tmp_path / "out"), "INPUT: no such file or directory"),
        ((tmp_path / "empty", tmp_path / "out"), "INPUT: no studies in it"),
        ((tmp_path / "in", tmp_path / "theirs"), "OUTPUT: another program wrote its output.xlsx"),
        ((tmp_path / "in", tmp_path / "theirs/output.xlsx"), "OUTPUT: file exists"),
    ):
        run = infer(built.path, *words)
        assert run.returncode == 1 and run.stderr.startswith(error), run.stderr
    assert (tmp_path / "theirs/output.xlsx").read_bytes() == b"theirs"
    assert "expected both" in built.fail("infer", f"INPUT={tmp_path}")


def test_an_output_of_other_weights_or_of_a_running_program_is_refused(tmp_path: Path) -> None:
    row = dict.fromkeys(COLUMNS, "") | {"path_to_study": "a", "warnings": [], "error": ""}
    first = Output(tmp_path)
    first.begin("real")
    first.add(row)
    with pytest.raises(SystemExit, match="another run writes there"):
        Output(tmp_path)
    os.close(first.lock)
    with pytest.raises(SystemExit, match="its results come from real weights, not synthetic"):
        Output(tmp_path).begin("synthetic")


def test_an_output_with_rows_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "output.json").write_text('{"weights": "real", "studies": [{"path_to_study": "a"}]}')

    with pytest.raises(SystemExit, match=r"make infer did not write its output\.json"):
        Output(tmp_path)


def test_real_results_have_exactly_the_columns_of_the_existing_script(tmp_path: Path) -> None:
    output = Output(tmp_path)
    output.begin("real")
    output.add(dict.fromkeys(COLUMNS, "") | {"path_to_study": "=1+1", "warnings": [], "error": ""})

    sheet = openpyxl.load_workbook(tmp_path / "output.xlsx").worksheets[0]
    assert [cell.value for cell in sheet[1]] == list(COLUMNS)
    assert (sheet["A2"].value, sheet["A2"].data_type) == ("=1+1", "s")
    assert (tmp_path / "output.csv").read_text().startswith(",".join(COLUMNS) + "\n")
    assert (tmp_path / "warnings_and_errors.txt").read_text() == "no warnings and no errors\n"


def test_paths_in_the_table_are_printable_and_not_formulas() -> None:
    top = Path("/in")

    assert show_path(top, top) == "."
    assert show_path(top / "Иванов.zip", top) == "Иванов.zip"
    assert show_path(top / "=HYPERLINK(1).zip", top) == "./=HYPERLINK(1).zip"
    assert show_path(top / "a\x1b[2J\nb", top) == r"a\x1b[2J\nb"


def test_names_in_an_old_encoding_stay_distinct() -> None:
    names = ["Иванов.zip".encode("cp1251"), "Петров.zip".encode("cp1251"), rb"\udcc8.zip", b"\xc8.zip"]

    assert len({show_path(Path("/in") / os.fsdecode(name), Path("/in")) for name in names}) == 4
    assert show_path(Path("/in") / os.fsdecode(b"\xc8.zip"), Path("/in")) == "И.zip"


# --- Sentences and results


def test_each_sentence_has_both_languages_with_the_same_values_and_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import string

    for key, (english, russian) in SENTENCES.items():
        names = [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in (english, russian)]
        assert names[0] == names[1], key
        assert any("а" <= letter <= "я" for letter in russian)
    code = "".join(path.read_text() for path in (ROOT / "scripts/infer").glob("*.py"))
    assert [key for key in SENTENCES if f'"{key}"' not in code.replace(f'    "{key}": (', "")] == []
    for environment, expected in (
        ({"LC_ALL": "C", "LANG": "ru_RU.UTF-8"}, "error"), ({"LC_ALL": "", "LANG": "ru_RU.UTF-8"}, "ошибка"),
    ):  # fmt: skip
        for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
            monkeypatch.setenv(name, environment.get(name, ""))
        assert translate("error") == expected


def test_logits_give_probabilities_and_the_most_dangerous_finding() -> None:
    logits = np.full((1, 20), -3.0)
    logits[0, [FINDINGS.index("Emphysema"), FINDINGS.index("Lung nodule"), 0]] = 3
    sick, well = make_result(np.array([[1.0, 2.0]]), logits), make_result(np.array([[2.0, 1.0]]), logits)
    unclear = make_result(np.array([[1.0, 2.0]]), np.full((1, 20), -3.0))

    assert sick.probability == pytest.approx(1 / (1 + np.exp(-1)))
    assert sick.findings["Emphysema"] == pytest.approx(1 / (1 + np.exp(-3)))
    assert (sick.pathology, sick.most_dangerous) == (1, "Emphysema")
    assert (well.pathology, well.most_dangerous) == (0, "")
    assert unclear.most_dangerous == "cannot be determined"
    assert Result(0.5, {}).pathology == 0
    assert sorted(FINDINGS) == sorted(BY_DANGER) and len(set(FINDINGS)) == 20
    np.testing.assert_allclose(np.linalg.norm(normalise_embedding(np.array([[3.0, 4.0]]))), 1)


def test_both_requirements_pin_the_same_versions() -> None:
    pins = [
        dict(line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line and line[0] != "#")
        for name in ("requirements-inference.txt", "tests/requirements.txt", "requirements.txt")
    ]
    ours, *others = pins
    for other in others:
        differ = {name for name in ours.keys() & other.keys() if ours[name] != other[name]}
        assert differ <= {"onnxruntime-gpu"}  # for CUDA 12 here, for CUDA 13 there
