"""prebuilt.py accepts good models, refuses bad ones, and names those that cannot be served here."""

import json
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from scripts.publish import prebuilt
from scripts.publish.prebuilt import check_contract, judge_archive, make_environment
from tests.triton_models import CONFIG, WEIGHT, answers, bpr, head, linear, tag

ROOT = Path(__file__).parents[2]
ARCHIVE, TREE, MODELS = Path("finished.zip"), Path("build/prebuilt"), Path("build/models")
HEAD = {"family": "head", "output": [2]}
NOT_SERVED = {"vit_onnx", "binary_onnx", "multilabel_onnx"}


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The client's four models with tiny networks, and the files of the project that prebuilt.py reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_VENV", str(ROOT / ".venv-triton"))
    for name in ("vit", "binary", "multilabel"):
        head(tmp_path / "finished", f"{name}_onnx")
        answers(tmp_path / "build", name)
    bpr(tmp_path / "finished")
    tag(tmp_path / "build")
    for path in ("requirements-triton.txt", "convertation/bpr/requirements.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path / "finished"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The models' names of each start; no server is started, and each model counts as good."""
    starts: list[set[str]] = []

    def serve(tree: Path, files: object, configs: dict[str, Any], *rest: object) -> dict[str, Any]:
        starts.append(set(configs))
        return {name: {"state": "READY", "says": "what it should", "latency_ms": 1.0} for name in configs}

    monkeypatch.setattr(prebuilt, "serve_models", serve)
    return starts


def judged(folder: Path, accept: bool = False, gpu: bool = False) -> dict[str, Any]:
    packed(folder)
    return judge_archive(ARCHIVE, TREE, MODELS, accept, gpu)


def packed(folder: Path) -> None:
    with zipfile.ZipFile(ARCHIVE, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder))


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(SystemExit) as stop:
        action()
    assert isinstance(stop.value.code, str)
    return stop.value.code


def test_good_models_are_served_and_asked(finished: Path) -> None:
    result = judged(finished)
    assert result["unserved"] == {} and result["remarks"] == []
    assert result["models"]["bpr_model"]["says"] == "says CHEST"
    assert result["models"]["vit_onnx"]["says"].startswith("answers within -")
    assert set(result["files"]) == {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    json.dumps(result)


def test_with_a_key_nothing_runs_that_its_owner_did_not_sign(
    finished: Path, served: list[set[str]], signing: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(".venv-signing").symlink_to(ROOT / ".venv-signing")
    Path("scripts").symlink_to(ROOT / "scripts")
    Path(".make/lock").mkdir(parents=True)
    sign = [signing, "-m", "scripts.publish.signature", "sign", keys / "key.pem", finished]
    subprocess.run(sign, check=True, capture_output=True)

    def judge_signed(key: str) -> dict[str, Any]:
        packed(finished)
        return judge_archive(ARCHIVE, TREE, MODELS, False, False, key=str(keys / key), signature="finished.sig")

    assert set(judge_signed("key.pub")["models"]) == NOT_SERVED | {"bpr_model"}
    assert "build/prebuilt is what was signed, digest" in capsys.readouterr().out
    served.clear()
    assert "Key mismatch" in refused(lambda: judge_signed("other.pub"))
    (finished / "bpr_model/1/model.py").write_text("import os")
    said = refused(lambda: judge_signed("key.pub"))
    assert said.startswith("build/prebuilt/bpr_model/1/model.py: altered since it was signed\n")
    assert said.endswith("is not what was signed; no code of it was run, nothing was published") and not served


def test_a_python_model_that_does_not_start_is_named_and_the_others_are_judged(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "bpr_model/1/model.py").write_text(
        "import importlib\n\nimportlib.import_module('nowhere')\n\n"
        "class TritonPythonModel:\n    def execute(self, requests): ...\n"
    )
    assert "finished.zip: bpr_model could not be tried here; nothing was published" in refused(lambda: judged(finished))
    said = capsys.readouterr().out
    assert "bpr_model: not served here: " in said and "No module named 'nowhere'" in said
    assert "binary_onnx: READY" in said
    result = judged(finished, accept=True)
    assert set(result["unserved"]) == {"bpr_model"} and set(result["models"]) == NOT_SERVED


@pytest.mark.parametrize(
    "line",
    ["--index-url https://other.example/simple", "-e .", "evil @ https://other.example/evil.tar.gz", "./evil",
     "https://other.example/evil-1.0-py3-none-any.whl", "-r /etc/passwd", "git+https://other.example/evil",
     "evil==1 \\", "evil==${AWS_SECRET_ACCESS_KEY}"],
)  # fmt: skip
def test_requirements_that_hold_more_than_names_and_versions_are_not_installed(finished: Path, line: str) -> None:
    (finished / "bpr_model/1/requirements.txt").write_text(f"# usual\nnumpy==1.26.4\n{line}\n")
    assert make_environment(finished) == (
        None, f"its requirements hold more than names and versions, and are not installed: {line!r}",
    )  # fmt: skip


def test_requirements_as_people_write_them_are_plain() -> None:
    text = (ROOT / "convertation/bpr/requirements.txt").read_text()
    for line in [
        *text.splitlines(),
        "numpy",
        "a.b-c[extra, more] >= 1.0, <2 ; python_version < '3.12'  # why",
        "",
        "x~=1",
    ]:
        assert prebuilt.PLAIN.fullmatch(line), line


def test_installing_runs_no_code_of_theirs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sdist is built, and no Python starts that would run the wheel's code."""
    mark = tmp_path / "mark"
    index = tmp_path / "index"
    index.mkdir()
    files = {
        "probe.pth": f"import pathlib; pathlib.Path({str(mark)!r}).write_text('ran')\n",
        "probe-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n",
        "probe-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files["probe-1.0.dist-info/RECORD"] = "".join(f"{name},,\n" for name in [*files, "probe-1.0.dist-info/RECORD"])
    with zipfile.ZipFile(index / "probe-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    (tmp_path / "sdist/built-1.0").mkdir(parents=True)
    (tmp_path / "sdist/built-1.0/setup.py").write_text(f"open({str(mark)!r}, 'w').write('ran')\n")
    (tmp_path / "sdist/built-1.0/PKG-INFO").write_text("Metadata-Version: 2.1\nName: built\nVersion: 1.0\n")
    with tarfile.open(index / "built-1.0.tar.gz", "w:gz") as sdist:
        sdist.add(tmp_path / "sdist/built-1.0", "built-1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "requirements-triton.txt").write_text("")
    monkeypatch.setattr(prebuilt, "ALWAYS", [])
    for name in ("built", "probe"):
        (finished / "bpr_model/1/requirements.txt").write_text(
            f"{name}==1.0\nonnxruntime-none==1 ; python_version < '3'\n"
        )
        venv, trouble = make_environment(finished)
        assert (venv is None) == (name == "built"), trouble
        assert not mark.exists()
    assert list(Path(".venv-prebuilt").glob("lib/*/site-packages/probe.pth"))


def test_a_wrong_answer_is_no_matter_of_acceptance(finished: Path) -> None:
    model = linear()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(WEIGHT * np.float32("nan"), "weight"))
    onnx.save(model, finished / "binary_onnx/1/model.onnx")
    said = refused(lambda: judged(finished, accept=True))
    assert said == "binary_onnx: 3 of 3 values of its answer are not finite"


def test_a_missing_model_is_named(finished: Path, served: list[set[str]]) -> None:
    shutil.rmtree(finished / "vit_onnx")
    assert "finished.zip has no vit_onnx, which the client asks" in refused(lambda: judged(finished, accept=True))
    assert served == []


def test_a_gpu_only_model_is_served_only_where_there_is_one(finished: Path, served: list[set[str]]) -> None:
    config = finished / "vit_onnx/config.pbtxt"
    config.write_text(config.read_text().replace("KIND_AUTO", "KIND_GPU"))
    assert "ACCEPT=unserved" in refused(lambda: judged(finished))
    assert judged(finished, accept=True)["unserved"] == {
        "vit_onnx": "its config.pbtxt says KIND_GPU, and this machine has no GPU"
    }
    assert judged(finished, gpu=True)["unserved"] == {}
    assert [len(start) for start in served] == [3, 3, 4]


def test_a_plan_needs_an_image_whatever_the_machine(finished: Path, served: list[set[str]]) -> None:
    folder = finished / "vit_trt"
    shutil.copytree(finished / "vit_onnx", folder)
    (folder / "1/model.onnx").rename(folder / "1/model.plan")
    config = CONFIG.replace("binary_onnx", "vit_trt").replace('backend: "onnxruntime"', 'platform: "tensorrt_plan"')
    (folder / "config.pbtxt").write_text(config)
    (folder / "1/model.plan").write_bytes(bytes(range(256)))
    result = judged(finished, accept=True, gpu=True)
    assert result["unserved"] == {"vit_trt": "only an image with a GPU serves a TensorRT plan"}


def test_what_only_our_own_models_must_have_is_a_remark(finished: Path, served: list[set[str]]) -> None:
    config = finished / "binary_onnx/config.pbtxt"
    text = config.read_text().replace("instance_group [{ count: 1 kind: KIND_AUTO }]", "")
    config.write_text(text.replace("max_batch_size: 8", "max_batch_size: 64"))
    assert len(judged(finished)["remarks"]) == 2


def test_a_model_that_names_no_backend_is_served_by_its_file(finished: Path) -> None:
    config = finished / "binary_onnx/config.pbtxt"
    config.write_text(config.read_text().replace('backend: "onnxruntime"', 'platform: "onnxruntime_onnx"'))
    bpr = finished / "bpr_model/config.pbtxt"
    bpr.write_text(bpr.read_text().replace('backend: "python"\n', ""))
    assert set(judged(finished)["models"]) >= {"binary_onnx", "bpr_model"}


def test_any_other_finding_refuses_even_what_is_accepted(finished: Path, served: list[set[str]]) -> None:
    config = finished / "binary_onnx/config.pbtxt"
    config.write_text(config.read_text().replace("TYPE_FP32", "TYPE_FP16", 1))
    said = refused(lambda: judged(finished, accept=True))
    assert "binary_onnx/config.pbtxt: client's contract, input 'input'" in said and "nothing was published" in said
    assert served == []


@pytest.mark.parametrize(
    "answer, reason",
    [
        ([[1.0, np.nan]], "1 of 2 values of its answer are not finite"),
        ([[3.0, 3.0]], "every value of its answer is 3"),
        ([[1.0, 2.0, 3.0]], "expected float32 (1, 2), answered (1, 3)"),
        ([[1.0, 2.0]], "two different requests have the same answer"),
    ],
)
def test_an_answer_that_no_good_model_gives_is_refused(answer: list[list[float]], reason: str) -> None:
    array = np.array(answer, np.float32)
    assert reason in refused(lambda: check_contract("binary_onnx", [array, array], HEAD))


def test_a_tag_is_one_text() -> None:
    good = np.array([b"CHEST"], object)
    assert check_contract("bpr_model", [good, good], {"family": "bpr"}) == "says CHEST"
    assert "expected one tag" in refused(lambda: check_contract("bpr_model", [good[None], good], {"family": "bpr"}))


# --- The environment of the archive's own code --------------------------------


def venv_script(text: str) -> None:
    Path("scripts/steps").mkdir(parents=True)
    Path("scripts/steps/venv.sh").write_text(f"#!/bin/bash\n{text}\n")
    Path("scripts/steps/venv.sh").chmod(0o755)


def requirements(text: str) -> None:
    path = TREE / "bpr_model/1/requirements.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_requirements_of_its_own_it_gets_the_usual_one(finished: Path) -> None:
    assert make_environment(TREE) == (None, "")
    requirements(Path("convertation/bpr/requirements.txt").read_text())
    assert make_environment(TREE) == (None, "")


def test_requirements_of_its_own_get_an_environment_with_the_server_once(finished: Path) -> None:
    venv_script('echo made >> calls; mkdir -p "$2"; cp "$3" seen')
    requirements("torch==2.0\n")
    for _ in range(2):
        assert make_environment(TREE) == (Path(".venv-prebuilt"), "")
    wanted = Path("seen").read_text().splitlines()
    assert {"nvidia-pytriton==0.5.9", "numpy<2", "torch==2.0"} < set(wanted)
    assert sum(line.startswith("onnxruntime") for line in wanted) == 1  # for the ONNX models
    assert Path("calls").read_text() == "made\n"
    requirements("onnxruntime-gpu==1.22.0\n")
    make_environment(TREE)
    assert [line for line in Path("seen").read_text().splitlines() if line.startswith("onnxruntime")] == [
        "onnxruntime-gpu==1.22.0"
    ]


def test_requirements_that_cannot_be_installed_leave_the_model_unserved(finished: Path, served: list[set[str]]) -> None:
    venv_script('mkdir "$2"; echo "ERROR: No matching distribution found for bpreg==9" >&2; exit 1')
    (finished / "bpr_model/1/requirements.txt").write_text("bpreg==9\n")
    result = judged(finished, accept=True)
    assert "ERROR: No matching distribution found for bpreg==9" in result["unserved"]["bpr_model"]
    assert served == [NOT_SERVED] and not Path(".venv-prebuilt").exists()
