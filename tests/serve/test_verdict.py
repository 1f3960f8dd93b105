"""The real Triton's verdict on small models, over gRPC."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.serve import verdict as judge
from scripts.serve.triton_server import Server
from scripts.serve.verdict import compare_answers, stage_files
from tests.triton_models import CONFIG, answers, tag
from tests.triton_servers import VENV, judged, processes, regions, write_repository

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_VENV", str(VENV))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a proxy that answers nobody
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_repository(tmp_path)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run scripts/serve/verdict.py as a program."""
    words = [sys.executable, "-m", "scripts.serve.verdict", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def folders(build: Path) -> list[object]:
    return ["--checks", build / "checks", "--models", build / "models", "--log", build / "log"]


# --- Good ---------------------------------------------------------------------


def test_a_good_repository_is_ready_and_right(repository: Path) -> None:
    before, shared = sorted(repository.rglob("*")), regions()
    result = judged(repository)
    assert result["server"] == "tritonserver 2.47.0"
    assert list(result["models"]) == ["binary_onnx", "bpr_model"]
    binary, tagger = result["models"].values()
    assert (binary["state"], tagger["state"]) == ("READY", "READY")
    assert 0 <= binary["difference"] < 1e-5
    assert 0 <= binary["relative"] < 1e-5
    assert tagger["difference"] == 0
    assert binary["latency_ms"] > 0
    assert sorted(result["files"]) == [
        "binary_onnx/1/model.onnx", "binary_onnx/config.pbtxt",
        "bpr_model/1/helper.py", "bpr_model/1/model.py", "bpr_model/config.pbtxt",
    ]  # fmt: skip
    assert all(len(digest) == 64 for digest in result["files"].values())
    assert sorted(repository.rglob("*")) == before  # no __pycache__
    assert processes(repository) == []
    assert regions() == shared


def test_the_command_judges_links_to_the_sources(repository: Path) -> None:
    build = repository.parent / "build"
    files = [path for path in sorted(repository.rglob("*")) if path.is_file()]
    contents = [f"{path.relative_to(repository)}={path}" for path in files]
    for _ in range(2):  # the second run finds the staging folder of the first
        run = command(*folders(build), "--staging", build / "staging", *contents, build / "verdict.json")
        assert (run.returncode, run.stderr) == (0, "")
    said = [
        line.split(",")[0] for line in run.stdout.splitlines() if not line.startswith("  ")
    ]  # without progress lines
    assert said == ["binary_onnx: READY", "bpr_model: READY"]
    result = json.loads((build / "verdict.json").read_text())
    assert len(result["files"]) == len(files)
    links = [path for path in (build / "staging").rglob("*") if not path.is_dir()]
    assert all(path.is_symlink() for path in links)
    assert not list(repository.rglob("__pycache__")) + list((build / "staging").rglob("__pycache__"))


def test_a_published_repository_is_judged_where_it_lies(repository: Path) -> None:
    build = repository.parent / "build"
    run = command("--repository", repository, *folders(build), build / "verify.json")
    assert run.returncode == 0, run.stderr
    assert json.loads((build / "verify.json").read_text())["models"]["bpr_model"]["state"] == "READY"


# --- Bad ----------------------------------------------------------------------


def test_a_model_that_answers_otherwise_is_refused(repository: Path) -> None:
    answers(repository.parent / "build", shift=1e-3)
    with pytest.raises(
        SystemExit, match=r"binary_onnx: 3 of 3 values beyond the tolerance, the first at \(0, 0\): expected"
    ):
        judged(repository)
    assert processes(repository) == []


def test_a_wrong_tag_is_refused(repository: Path) -> None:
    tag(repository.parent / "build", "NECK")
    with pytest.raises(SystemExit, match=r"bpr_model: expected \['NECK'\], answered \['CHEST'\]"):
        judged(repository)


def test_a_precision_is_judged_by_its_own_check_and_a_gpu_by_what_it_may_differ(tmp_path: Path) -> None:
    for name, allowed in (("vit", 1), ("vit.tf32", 2), ("binary", 3)):
        answer = {"output": [[0.0]], "allowed": allowed, "allowed_gpu": 10 * allowed, "flips": [[]]}
        (tmp_path / f"{name}.json").write_text(json.dumps({"served": [answer]}))
    (tmp_path / "vit.plan.json").write_text(json.dumps({"served": [{"output": [[0.0]], "allowed": 7}]}))

    def allowed_to(model: str, variants: list[str], gpu: bool = False, pattern: str | None = None) -> float:
        (answer,) = judge.find_expected(tmp_path, pattern, model, variants, gpu=gpu)["served"]
        found: float = answer["allowed"]
        return found

    assert [
        allowed_to("vit_onnx", []),
        allowed_to("vit_trt", ["vit.tf32"]),
        allowed_to("binary_onnx", ["vit.tf32"]),
    ] == [1, 2, 3]
    assert [allowed_to("vit_onnx", ["vit.tf32"], gpu=True), allowed_to("binary_onnx", [], gpu=True)] == [20, 30]
    assert allowed_to("vit_onnx", [], gpu=True, pattern=f"{tmp_path}/{{}}.plan.json") == 7
    tagged = {"output": ["CHEST"]}
    (tmp_path / "bpr.json").write_text(json.dumps({"served": [tagged]}))
    assert judge.find_expected(tmp_path, None, "bpr_model", gpu=True)["served"] == [tagged]
    with pytest.raises(SystemExit, match=r"vit\.fp16\.json: no such file, but vit_onnx is judged by it"):
        allowed_to("vit_onnx", ["vit.fp16"])


def test_nan_is_no_answer() -> None:
    answer = {"output": [[1.0, 2.0]], "allowed": 0.1}
    with pytest.raises(SystemExit, match="1 of 2 values beyond the tolerance"):
        compare_answers("m", answer, np.array([[1.0, np.nan]], np.float32))
    with pytest.raises(SystemExit, match=r"expected an answer of shape \(1, 2\), found \(2,\)"):
        compare_answers("m", answer, np.array([1.0, 2.0], np.float32))


def test_a_near_tie_that_fell_the_other_way_is_explained_and_everything_else_is_strict() -> None:
    chance = np.random.default_rng(0)
    flips = chance.normal(size=(40, 64))
    answer = {"output": [[0.0] * 64], "allowed": 1e-3, "flips": [flips.tolist()]}
    turned = (flips[3] + flips[17])[None]
    assert compare_answers("m", answer, turned + 1e-4) == (pytest.approx(1e-4), 2)
    for wrong in (1.1 * turned, turned + 2e-3, chance.normal(size=(1, 64)), turned * np.nan):
        with pytest.raises(SystemExit, match="values beyond the tolerance"):
            compare_answers("m", answer, wrong)


def test_a_token_falls_the_other_way_once_and_nothing_wider_is_forgiven() -> None:
    chance = np.random.default_rng(0)
    ties = [chance.normal(size=(2, 64)).tolist() for _ in range(3)]  # three tokens with two other rows each
    answer = {"output": [[0.0] * 64], "allowed": 1e-3, "flips": [ties]}
    one, other = np.array(ties[0])
    assert compare_answers("m", answer, one[None]) == (pytest.approx(0), 1)
    assert compare_answers("m", answer, (other + ties[1][0])[None]) == (pytest.approx(0), 2)
    for wrong in (2 * one, one + other):  # the same token twice
        with pytest.raises(SystemExit, match="values beyond the tolerance"):
            compare_answers("m", answer, wrong[None])


def test_findings_of_the_offline_check_stop_it_before_a_server_starts(repository: Path) -> None:
    (repository / "binary_onnx/1/model.onnx").unlink()
    with pytest.raises(SystemExit, match=r"expected a file, found nothing\n.*1 findings; nothing was served"):
        judged(repository)
    assert not (repository.parent / "build/triton.log").exists()


def test_a_model_that_does_not_load_is_named_with_the_reason(repository: Path) -> None:
    (repository / "bpr_model/1/helper.py").write_text(
        "import importlib\n\nTAG = importlib.import_module('surely_not_installed')\n"
    )
    with pytest.raises(
        SystemExit, match=r"ended with status 1 before it was ready:\n(.|\n)*surely_not_installed"
    ) as error:
        judged(repository)
    assert "bpr_model" in str(error.value)
    assert str(repository.parent / "build/triton.log") in str(error.value)
    assert len(str(error.value).splitlines()) <= 6


def test_a_model_that_cannot_answer_is_named_with_the_reason(repository: Path) -> None:
    model = repository / "bpr_model/1/model.py"
    model.write_text(
        model.read_text().replace(
            "        tensor =", "        if requests:\n            raise ValueError('no slices')\n        tensor ="
        )
    )
    with pytest.raises(SystemExit, match=r"bpr_model: Triton says: .*no slices"):
        judged(repository)


def test_a_model_without_expected_answers_is_an_error(repository: Path) -> None:
    (repository.parent / "build/checks/binary.json").unlink()
    with pytest.raises(
        SystemExit, match=r"binary\.json: no such file, but binary_onnx is judged by it; make it with: make"
    ):
        judged(repository)


def test_a_plan_needs_an_image(repository: Path) -> None:
    folder = repository / "binary_onnx"
    (folder / "config.pbtxt").write_text(CONFIG.replace('backend: "onnxruntime"', 'platform: "tensorrt_plan"'))
    (folder / "1/model.onnx").unlink()
    (folder / "1/model.plan").write_bytes(b"ftrt" + bytes(100))
    with pytest.raises(SystemExit, match="binary_onnx: only an image with a GPU serves a TensorRT plan"):
        judged(repository)


def test_a_server_that_dies_is_told_from_one_that_answers_wrongly(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(server: Server, *rest: Any) -> dict[str, Any]:
        server.process.kill()
        return ask(server, *rest)

    ask = judge.ask_model
    monkeypatch.setattr(judge, "ask_model", dying)
    with pytest.raises(SystemExit, match=r"binary_onnx: tritonserver was killed by SIGKILL\n"):
        judged(repository)
    assert processes(repository) == []


def test_a_server_that_never_gets_ready_is_stopped(repository: Path) -> None:
    (repository / "bpr_model/1/helper.py").write_text("import time\ntime.sleep(10000)\nTAG = 1\n")
    with pytest.raises(SystemExit, match="tritonserver was not ready within 2 s, so it was stopped:\n"):
        judged(repository, timeout=2)
    assert processes(repository) == []


def test_files_that_change_meanwhile_are_not_judged(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changing(server: Server, name: str, *rest: Any) -> dict[str, Any]:
        os.utime(repository / "bpr_model/config.pbtxt")
        return ask(server, name, *rest)

    ask = judge.ask_model
    monkeypatch.setattr(judge, "ask_model", changing)
    with pytest.raises(SystemExit, match="its files changed while they were judged"):
        judged(repository)


def test_nothing_is_written_when_the_verdict_is_bad(repository: Path) -> None:
    build = repository.parent / "build"
    answers(build, shift=1.0)
    run = command("--repository", repository, *folders(build), build / "out.json")
    assert run.returncode == 1
    assert run.stderr.startswith("binary_onnx: 3 of 3 values beyond the tolerance")
    assert "Traceback" not in run.stderr
    assert not (build / "out.json").exists()


# --- Staging ------------------------------------------------------------------


def test_staging_is_made_anew(tmp_path: Path) -> None:
    source = tmp_path / "a.onnx"
    source.write_text("a")
    stage_files([f"m_onnx/1/model.onnx={source}", f"m_onnx/config.pbtxt={source}"], tmp_path / "staging")
    stage_files([f"m_onnx/1/model.onnx={source}"], tmp_path / "staging")
    links = {path: path.readlink() for path in (tmp_path / "staging").rglob("*") if not path.is_dir()}
    assert links == {tmp_path / "staging/m_onnx/1/model.onnx": source}


@pytest.mark.parametrize("other", ["file", "folder/file", "link"])
def test_staging_clears_nothing_that_it_did_not_make(tmp_path: Path, other: str) -> None:
    staging = tmp_path / "staging"
    (staging / "folder").mkdir(parents=True)
    if other == "link":
        (staging / "link").symlink_to(tmp_path)
    else:
        (staging / other).write_text("mine")
    with pytest.raises(SystemExit, match=rf"staging/{other}: no link of an earlier staging"):
        stage_files([], staging)
    assert os.path.lexists(staging / other)


@pytest.mark.parametrize("item", ["model.onnx", "/etc/model.onnx=a", "../model.onnx=a"])
def test_staging_takes_pairs_inside_the_folder(tmp_path: Path, item: str) -> None:
    with pytest.raises(SystemExit, match="expected FILE=SOURCE"):
        stage_files([item], tmp_path / "staging")


def test_staging_names_a_source_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"vit\.onnx: no such file, expected for m/1/model\.onnx; make it with: make"):
        stage_files([f"m/1/model.onnx={tmp_path}/vit.onnx"], tmp_path / "staging")
