"""What needs no Docker: options for trtexec, config.pbtxt of plans, the comparison, plans of other machines."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from google.protobuf import text_format
from triton_models import ENTRY
from tritonclient.grpc.model_config_pb2 import ModelConfig

from scripts.plans import compare_plan, expected, plan_config, plan_request, take_plan
from scripts.steps.records import hash_file

TOLERANCE = {"gpu": 2e-3, "probability": 1e-3}


@pytest.mark.parametrize(
    ("precision", "words"),
    [("fp32", ["--noTF32"]), ("tf32", []), ("fp16", ["--stronglyTyped", "--profilingVerbosity=detailed", "--noTF32"])],
)
def test_a_plan_multiplies_in_tf32_where_that_is_asked_for_and_only_there(precision: str, words: list[str]) -> None:
    shapes = ["--minShapes=input:1x8", "--optShapes=input:4x8", "--maxShapes=input:8x8"]
    assert plan_request.list_options(ENTRY, precision, "") == [*shapes, *words, "--verbose", "--device=0"]


def test_the_config_names_a_plan_for_each_compute_capability() -> None:
    entry = {"name": "binary", "batch": [1, 4, 8]}
    text = plan_config.make_plan_config(ROOT / "convertation/head/binary.pbtxt", entry, ["sm86", "sm120"])
    assert 'name: "binary_trt"\nplatform: "tensorrt_plan"\nmax_batch_size: 8\n' in text
    assert 'key: "12.0"\n  value: "sm120.plan"' in text
    assert 'default_model_filename: "sm86.plan"' in text
    assert "use_tf32" not in text and "cudnn" not in text  # options of ONNX Runtime; a plan does not need them
    with pytest.raises(SystemExit, match="max_batch_size is 8; expected 1 to 4"):
        plan_config.make_plan_config(
            ROOT / "convertation/head/binary.pbtxt", {"name": "binary", "batch": [1, 4]}, ["sm86"]
        )


def test_with_a_gpu_each_model_is_asked_once_before_it_is_ready() -> None:
    entry = {"name": "binary", "batch": [1, 4, 8]}
    text = plan_config.make_plan_config(ROOT / "convertation/head/binary.pbtxt", entry, ["sm86"])
    ours = text_format.Parse(text, ModelConfig()).model_warmup
    for path in sorted(ROOT.glob("convertation/*/*.pbtxt")):
        before = text_format.Parse(path.read_text(), ModelConfig())
        assert not before.model_warmup  # the verdict on a CPU serves these
        if path.parent.name != "bpr":  # BPR's model.py warms itself up
            after = text_format.Parse(plan_config.make_warm_config(path), ModelConfig())
            (sample,) = after.model_warmup
            assert (sample.batch_size, sample.count) == (1, 0)
            assert {name: list(tensor.dims) for name, tensor in sample.inputs.items()} == {
                tensor.name: list(tensor.dims) for tensor in after.input
            }
            assert all(tensor.zero_data for tensor in sample.inputs.values())
            del after.model_warmup[:]
            assert after == before
            if path.name == "binary.pbtxt":
                assert list(ours) == [sample]


REQUEST = {"onnx_graph_sha256": "a" * 64, "precision": "fp32", "options": ["--verbose"]}


ALTERED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("none", {}, {}, ""),
    ("tensorrt", {"tensorrt": "10.3.0.26"}, {}, "built by TensorRT 10.3.0.26, the images here have 10.1.0.27"),
    ("capability", {"compute_capability": "8.6"}, {}, "it was built for sm86, its folder says sm89"),
    ("graph", {"request": REQUEST | {"onnx_graph_sha256": "b" * 64}}, {}, "is bbbbbbbbbbbb, ours is aaaaaaaaaaaa"),
    ("options", {"request": REQUEST | {"options": []}}, {}, 'its options is [], ours is ["--verbose"]'),
    ("digest", {"plan_sha256": "c" * 64}, {}, "its record is of cccccccccccc"),
    ("comparison", {}, {"plan_sha256": "c" * 64}, "its comparison is of cccccccccccc"),
    ("difference", {}, {"difference": 0.5}, "gave gpu 0.5, the tolerance of convertation/models.yaml is 0.002"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "check", "expected"), [row[1:] for row in ALTERED], ids=[row[0] for row in ALTERED])
def test_a_plan_of_another_machine_is_taken_if_its_records_fit(
    tmp_path: Path, record: dict[str, Any], check: dict[str, Any], expected: str
) -> None:
    brought = tmp_path / "binary.plan"
    brought.write_bytes(b"plan")
    told = {
        "plan_sha256": hash_file(str(brought)),
        "tensorrt": "10.1.0.27",
        "compute_capability": "8.9",
        "request": REQUEST,
    }
    judged = {"plan_sha256": told["plan_sha256"], "difference": 1e-4, "probability": 0.0, "tolerance": {"gpu": 1.0}}
    (tmp_path / "binary.json").write_text(json.dumps(told | record))
    (tmp_path / "binary.check.json").write_text(json.dumps(judged | check))
    reason = take_plan.explain_refusal(brought, REQUEST, TOLERANCE, "sm89", "10.1.0.27")
    assert (expected in reason) if expected else not reason


def test_the_effect_of_a_possible_flip_is_removed_from_a_plans_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For a ViT, which is asked the same two volumes in turn up to the largest batch."""
    monkeypatch.chdir(tmp_path)
    Path("out.plan").write_bytes(b"plan")
    entry = {"name": "vit", "family": "vit", "input": [1, 10, 20, 20], "output": [64], "batch": [1, 2, 4]}
    chance = np.random.default_rng(0)
    two, turned = chance.normal(size=(2, 64)).astype(np.float32), chance.normal(size=(1, 1, 64))
    right = two[[0, 1, 0, 1]]
    assert expected.choose_samples(entry) == [0, 1, 0, 1]
    ours = right.copy()
    ours[1::2] += turned[0, 0].astype(np.float32)
    strict = {"gpu": 1e-4, "cosine": 0.999999, "probability": 1e-4}
    check = {"served": [{"first": 0, "flips": [[]]}, {"first": 1, "flips": [turned.tolist()]}]}

    def judge(ties: dict[int, Any]) -> dict[str, Any]:
        return compare_plan.compare_answers(
            Path("out.plan"), lambda request: ours[: len(request)].copy(), right, entry, strict, [], ties
        )

    result = judge(compare_plan.find_ties(check))

    assert result["flips"] == 3 and result["difference"] < 1e-5 and result["cosine"] > 0.999999
    assert [answer["flips"] for answer in result["served"]] == [[[]], [[], turned.tolist()]]
    with pytest.raises(SystemExit, match=r"expected at most 0\.0001"):
        judge({})
    with pytest.raises(SystemExit, match=r"expected at most 0\.0001"):
        judge({0: turned.tolist()})
