"""The bill of materials of an image: its schema, and licence, origin and source of the weights."""

import json
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from scripts.deploy import sbom

FILES = {
    "vit_onnx/1/model.onnx": "a" * 64,
    "vit_onnx/config.pbtxt": "b" * 64,
    "bpr_model/1/weights/model.onnx": "c" * 64,
}


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of a ViT that was rounded to fp16 from another ONNX file of a checkpoint; Docker is not called."""
    monkeypatch.chdir(tmp_path)
    made = {
        "build/checks/verdict.json": f"{'e' * 64} command : build/onnx/vit.fp16.onnx={'a' * 64} other=1",
        "build/onnx/vit.fp16.onnx": f"{'a' * 64} command : build/onnx/vit.tf32.onnx={'d' * 64}",
        "build/onnx/vit.tf32.onnx": f"{'d' * 64} command : training/weights/CT-RATE/vit.pt={'f' * 64} x.py=2",
    }
    for path, text in made.items():
        file = tmp_path / ".make/made" / path.replace("/", "%")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{path}={text}")
    for name, family in (("vit", "vit"), ("bpr", "bpr")):
        (tmp_path / "build/models").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"build/models/{name}.json").write_text(json.dumps({"family": family}))
    monkeypatch.setattr(sbom, "ARCHIVES", Path(__file__).parents[2] / "training/archives.json")
    monkeypatch.setattr(sbom, "inspect_object", lambda kind, name: {"Id": "sha256:" + "9" * 64, "RepoDigests": []})


def bill(kind: str) -> str:
    pins = "numpy==1.26.4\n# a comment\nonnxruntime_gpu==1.19.2 ; python_version > '3'\n"
    return sbom.make_bill(
        "r.example:5000/chest:1", "nvcr.io/x:24.06-py3", FILES, kind, pins, "1", "build/checks/verdict.json"
    )


@pytest.mark.parametrize("kind", ["real", "synthetic", "prebuilt"])
def test_it_is_valid_and_the_same_twice(records: None, kind: str) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill(kind)) is None
    assert bill(kind) == bill(kind)


def test_real_weights_have_a_licence_an_origin_and_a_source(records: None) -> None:
    told = json.loads(bill("real"))
    parts = {part["bom-ref"]: part for part in told["components"]}
    vit = parts["model/vit_onnx"]
    assert vit["licenses"] == [{"license": {"id": "CC-BY-NC-SA-4.0"}}]
    assert {"name": "chest:origin", "value": f"training/weights/CT-RATE/vit.pt sha256:{'f' * 64}"} in vit["properties"]
    assert vit["externalReferences"][0]["url"].startswith("https://disk.yandex.ru/")
    assert vit["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    assert parts["pypi/onnxruntime-gpu"]["purl"] == "pkg:pypi/onnxruntime-gpu@1.19.2"
    assert (told["metadata"]["component"]["name"], told["metadata"]["component"]["version"]) == (
        "r.example:5000/chest",
        "1",
    )


def test_synthetic_weights_are_nobodys(records: None) -> None:
    parts = {part["bom-ref"]: part for part in json.loads(bill("synthetic"))["components"]}
    assert parts["model/vit_onnx"]["licenses"] == [{"license": {"name": "none: seeded numbers"}}]
    assert "externalReferences" not in parts["model/vit_onnx"]
