"""`make compare` of tiny repositories, which the real Triton serves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import REPOSITORY, Project
from google.protobuf import text_format
from onnx import numpy_helper
from tritonclient.grpc import model_config_pb2 as schema

from scripts.convert.sample import make_sample
from scripts.show import compare_repositories as program
from scripts.show import volumes
from scripts.show.asked_repository import IncomparableError, Repository, explain_difference
from tests.dicom_studies import lungs, series

SAME = ["binary_onnx: same files", "bpr_model: same files", "multilabel_onnx: same files", "vit_onnx: same files"]


@pytest.fixture
def other(project: Project) -> Path:
    """A copy of the published repository, for the test to change."""
    path = project.path / "other"
    shutil.copytree(project.path / REPOSITORY, path, ignore=shutil.ignore_patterns(".gitkeep"))
    return path


def alter(path: Path, change: Callable[[str, Any], None]) -> None:
    """Change each weight of an ONNX file in place."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        change(tensor.name, values)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)


def resave(path: Path) -> None:
    """Change the bytes of an ONNX file but not its numbers, as in an export made by hand."""
    model = onnx.load(path)
    model.doc_string = "made by hand"
    onnx.save(model, path)


def load(project: Project) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project.path / "build/compare.json").read_text())
    return found


# --- The whole -----------------------------------------------------------------


def test_models_with_the_same_files_are_not_asked(project: Project, other: Path) -> None:
    said = project.make("compare", f"WITH={other}")

    assert said.startswith("  vit_onnx: the same files\n") and "asking" not in said
    assert "SYNTHETIC weights: this shows that the programs work" in said
    assert "no model was asked" in said and all(line in said for line in SAME)
    found = load(project)
    assert found["agree"] and found["weights"] == {"ours": "synthetic", "theirs": "synthetic"}
    assert "vit_onnx/1/model.onnx" in found["files"]


def test_a_repository_made_by_hand_may_give_the_same_answers(project: Project, other: Path) -> None:
    for model in ("vit", "binary"):
        resave(other / f"{model}_onnx/1/model.onnx")
    # As people write it: with the older platform and a GPU, and without what Triton completes by itself
    (other / "vit_onnx/config.pbtxt").write_text(
        'platform: "onnxruntime_onnx" max_batch_size: 4 instance_group [{ kind: KIND_GPU gpus: [0] }]\n'
        'input [{ name: "input" data_type: TYPE_FP32 dims: [1, 20, 40, 40] }]\n'
        'output [{ name: "output" data_type: TYPE_FP32 dims: [24] }]\n'
    )
    (other / "binary_onnx/config.pbtxt").write_text('name: "binary_onnx"\n')
    before = {path: path.read_bytes() for path in other.rglob("*.pbtxt")}

    said = project.make("compare", "WITH=other")

    assert "vit_onnx: same answers, difference 0.0e+00 of the scale, allowed 0.0001" in said
    assert "binary_onnx: same answers, difference 0.0e+00 of the scale, allowed 1e-05, 0 decisions changed" in said
    assert "asked: seed 1, seed 2, seed 3, seed 4" in said
    result = load(project)["models"]
    assert result["multilabel_onnx"]["verdict"] == "same files"
    assert result["binary_onnx"]["files"] == ["1/model.onnx", "config.pbtxt"]
    assert {path: path.read_bytes() for path in other.rglob("*.pbtxt")} == before
    assert not list(other.rglob("__pycache__"))


def test_each_model_that_differs_is_reported(project: Project, other: Path) -> None:
    def opposite(name: str, values: Any) -> None:
        if name.endswith("bias") and values.shape == (20,):
            values -= 3.0  # no finding anywhere

    alter(other / "multilabel_onnx/1/model.onnx", opposite)
    code = other / "bpr_model/1/model.py"
    code.write_text(code.read_text().replace("[part.encode()]", '["NONE"]'))
    shutil.copytree(other / "binary_onnx", other / "older_onnx")
    (other / "older_onnx/config.pbtxt").write_text(
        (other / "binary_onnx/config.pbtxt").read_text().replace("binary_onnx", "older_onnx")
    )
    (other / "binary_onnx/config.pbtxt").write_text(
        (other / "binary_onnx/config.pbtxt").read_text().replace('name: "input"', 'name: "embedding"')
    )

    said = project.fail("compare", "WITH=other")

    found = load(project)
    verdicts = {name: result["verdict"] for name, result in found["models"].items()}
    assert verdicts == {
        "vit_onnx": "same files",
        "binary_onnx": "not compared",
        "bpr_model": "differs",
        "multilabel_onnx": "differs",
        "older_onnx": "only in the other one",
    }
    assert "binary_onnx: not compared, input: input in the new one, embedding in the other" in said
    assert "bpr_model: differs, 2 of 2 answers differ, new " in said and "other NONE, NONE" in said
    many = found["models"]["multilabel_onnx"]
    assert many["difference"] > 1 and many["beyond"] == many["asked"] == 8 + program.VECTORS
    old, new = (np.array(found["probabilities"]["multilabel"][side]) for side in ("old", "new"))
    assert old.shape == new.shape == (4, 20) and old.max() < 0.5
    assert len(many["decisions_changed"]) == (new > 0.5).sum() > 0
    assert f"  {many['decisions_changed'][0]['input']}, finding " in said
    assert "the repositories do not agree within the tolerances of models.yaml; details: build/compare.json" in said


def test_volumes_of_a_folder_replace_the_seeded_ones(project: Project, other: Path) -> None:
    resave(other / "vit_onnx/1/model.onnx")
    folder = project.path / "volumes"
    folder.mkdir()
    entry = json.loads((project.path / "build/models/vit.json").read_text())
    for seed, name in ((7, "b.npy"), (8, "a.npy")):
        np.save(folder / name, make_sample(entry, seed, 1)["input"][0])
    np.savez(folder / "c.npz", volume=make_sample(entry, 9, 1)["input"][0])

    said = project.make("compare", "WITH=other", "INPUT=volumes")

    assert "asked: a.npy, b.npy, c.npz" in said
    assert load(project)["models"]["vit_onnx"]["asked"] == 3


def test_studies_of_a_folder_become_volumes(project: Project, other: Path) -> None:
    resave(other / "vit_onnx/1/model.onnx")
    folder = project.path / "my studies"
    series(folder / "chest", lungs(20))
    series(folder / "head", lungs(20), study="head", BodyPartExamined="HEAD")

    said = project.make("compare", "WITH=other", f"INPUT={folder}")

    assert "  reading study 002 head\n  left out: " in said
    assert "asked: 001 chest.npy\n" in said
    assert not list((project.path / "build").rglob("*chest*"))
    assert load(project)["models"]["vit_onnx"]["asked"] == 1


def test_a_mistyped_folder_is_an_error_even_if_no_model_is_asked(project: Project, other: Path) -> None:
    assert "INPUT=absent: no such folder" in project.fail("compare", "WITH=other", "INPUT=absent")


def test_a_folder_without_studies_is_refused(project: Project, other: Path) -> None:
    resave(other / "vit_onnx/1/model.onnx")
    (folder := project.path / "nothing").mkdir()
    assert f"INPUT={folder}: no study in it can be read" in project.fail("compare", "WITH=other", f"INPUT={folder}")


# --- What cannot be compared ------------------------------------------------------


def test_the_knob_with_is_a_folder_for_compare_and_a_list_of_models_elsewhere(stand_ins: Project) -> None:
    assert "make compare WITH=: expected the folder of another repository" in stand_ins.fail("compare")
    assert "expected the folder of another repository" in stand_ins.fail("compare", "WITH=a b")
    assert "WITH=/elsewhere: expected one of lipro" in stand_ins.fail("repository", "WITH=/elsewhere")


@pytest.mark.parametrize("name", ["absent", "scripts"])
def test_a_folder_that_is_not_a_repository_is_refused(project: Project, name: str) -> None:
    said = project.fail("compare", f"WITH={name}")
    assert f"{name}: no model repository; expected folders with a config.pbtxt" in said


def test_a_plan_is_not_compared_without_a_gpu(project: Project, other: Path) -> None:
    (other / "binary_onnx/config.pbtxt").write_text(
        'platform: "tensorrt_plan" max_batch_size: 8\n'
        'input [{ name: "input" data_type: TYPE_FP32 dims: [24] }]\n'
        'output [{ name: "output" data_type: TYPE_FP32 dims: [2] }]\n'
    )
    ours, theirs = (Repository(project.path / name, None) for name in (REPOSITORY, "other"))
    config = theirs.read_model_config("binary_onnx")

    with pytest.raises(IncomparableError, match="is a TensorRT plan: only an image on a machine with a GPU serves it"):
        theirs.ask_model("binary_onnx", config, [])
    assert explain_difference(ours.read_model_config("binary_onnx"), config) == ""


def test_a_model_that_triton_does_not_load_is_reported_with_its_log(
    project: Project, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (other / "binary_onnx/1/model.onnx").write_bytes(b"no model")
    monkeypatch.chdir(project.path)

    said = project.fail("compare", "WITH=other")

    assert "binary_onnx: not compared" in said and "build/logs/compare.log" in said
    assert load(project)["models"]["multilabel_onnx"]["verdict"] == "same files"


def config(text: str) -> Any:
    return text_format.Parse(text, schema.ModelConfig())


BASE = 'max_batch_size: 4 input [{ name: "input" data_type: TYPE_FP32 dims: [512] }]'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BASE, ""),
        (BASE.replace("512", "-1"), ""),
        ('max_batch_size: 0 input [{ name: "input" data_type: TYPE_FP32 dims: [-1, 512] }]', ""),
        ("", ""),  # an empty config: Triton completes it from the file
        (BASE.replace("input\"", "x\""), "input: input in the new one, x in the other"),
        (BASE.replace("512", "256"), "input input is FP32 [-1, 512] in the new one, FP32 [-1, 256] in the other"),
        (BASE.replace("FP32", "FP16"), "input input is FP32 [-1, 512] in the new one, FP16 [-1, 512] in the other"),
        (BASE.replace("[512]", "[1, 512]"), "input input is FP32 [-1, 512] in the new one, FP32 [-1, 1, 512] in"),
    ],
)  # fmt: skip
def test_different_names_and_shapes_are_explained(text: str, reason: str) -> None:
    said = explain_difference(config(BASE), config(text))
    assert said.startswith(reason) and bool(said) == bool(reason)


def test_an_answer_of_nan_does_not_agree() -> None:
    with pytest.raises(IncomparableError, match="the other one answers NaN or infinity"):
        program.compare_answers(np.ones((2, 3), np.float32), np.full((2, 3), np.nan, np.float32), 0.1)


# --- Volumes ----------------------------------------------------------------------

ENTRY = {"family": "vit", "input": [1, 20, 40, 40]}


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((20, 40, 40), np.float32),
            r"a\.npy: holds float32 \[20, 40, 40\]; expected float32 \[1, 20, 40, 40\]",
        ),
        (np.zeros((1, 20, 40, 40)), r"a\.npy: holds float64 \[1, 20, 40, 40\]; expected float32"),
        (np.full((1, 20, 40, 40), -1000, np.float32), r"a\.npy: values from -1000 to -1000; expected HU / 1000"),
        (np.full((1, 20, 40, 40), np.nan, np.float32), r"a\.npy: values from nan to nan; expected HU / 1000"),
    ],
)
def test_a_file_that_is_not_a_volume_is_refused(tmp_path: Path, array: Any, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(SystemExit, match=message):
        volumes.list_names(tmp_path, ENTRY)
        list(volumes.read_volumes(tmp_path, ENTRY))


def test_a_file_that_is_not_an_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such folder"):
        volumes.list_names(tmp_path / "absent", ENTRY)
    (tmp_path / "a.npy").write_text("nothing")
    with pytest.raises(SystemExit, match=r"a\.npy: not a NumPy array"):
        volumes.list_names(tmp_path, ENTRY)
    (tmp_path / "a.npy").unlink()
    np.savez(tmp_path / "a.npz", one=np.zeros(1), two=np.zeros(1))
    with pytest.raises(SystemExit, match=r"a\.npz: holds 2 arrays; expected one"):
        volumes.list_names(tmp_path, ENTRY)
