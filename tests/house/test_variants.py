"""Variants of the ViT and its heads, mistyped knobs, versions of make, and a head that the user adds."""

import pytest
from conftest import REPOSITORY, Project
from published_tree import TREE


@pytest.mark.parametrize("variant", ["Base", "VocabFine"])
def test_a_head_is_never_paired_with_another_vit(stand_ins: Project, variant: str) -> None:
    good = stand_ins.published()
    said = stand_ins.fail("repository", f"VIT={variant}")
    assert (
        f"binary was trained on the LiPro ViT (convertation/models.yaml) and is never paired with VIT={variant}" in said
    )
    assert f"make onnx MODEL=vit VIT={variant}" in said and len(said.splitlines()) == 1
    assert stand_ins.published() == good
    assert f"ProjectionVIT_{variant}_V2.pt" in stand_ins.make("onnx", "MODEL=vit", f"VIT={variant}")


def test_heads_that_were_trained_on_the_variant_are_published_with_it(stand_ins: Project) -> None:
    stand_ins.edit("convertation/models.yaml", "trained_on: LiPro", "trained_on: Base")
    stand_ins.make("repository", "VIT=Base")
    assert stand_ins.published().keys() == TREE


@pytest.mark.parametrize(
    "knob, expected",
    [
        ("VIT=Large", "VIT=Large: expected one of LiPro Base VocabFine"),
        ("WEIGHTS=sinthetic", "WEIGHTS=sinthetic: expected one of yandex synthetic"),
        ("WEIGHTS=", "WEIGHTS=: expected one of yandex synthetic"),
        ("WITH=lipo", "WITH=lipo: expected one of lipro"),
        ("MODEL=heads", "MODEL=heads: expected vit, head, bpr or one of binary bpr multilabel vit"),
        ("MAKE_VERSION=3.82", "GNU Make 3.82 is too old, 4.3 is needed"),
        ("MAKE_VERSION=4.2.1", "GNU Make 4.2.1 is too old, 4.3 is needed"),
    ],
)
def test_a_mistyped_value_is_one_line(stand_ins: Project, knob: str, expected: str) -> None:
    good = stand_ins.published()
    said = stand_ins.fail("onnx" if knob.startswith("MODEL") else "repository", knob)
    assert expected in said and len(said.splitlines()) == 1
    assert stand_ins.published() == good


@pytest.mark.parametrize("version", ["4.3", "4.3.91", "4.4.1", "4.10", "5.0"])
def test_newer_versions_of_make_are_taken(stand_ins: Project, version: str) -> None:
    assert "up to date" in stand_ins.make("repository", f"MAKE_VERSION={version}")


def test_another_head_is_one_entry_and_one_pbtxt(stand_ins: Project) -> None:
    stand_ins.append(
        "convertation/models.yaml",
        """
survival:
  family: head
  checkpoint: CT-RATE/model_survival.pth
  trained_on: LiPro
  network: {sizes: [24, 4], activation: gelu}
  input: [24]
  output: [4]
  batch: [1, 4, 8]
  tolerance: {output: 1.0e-5, served: 1.0e-5}
""",
    )
    config = (stand_ins.path / "convertation/head/binary.pbtxt").read_text().replace("binary", "survival")
    (stand_ins.path / "convertation/head/survival.pbtxt").write_text(config)

    said = stand_ins.make("repository")

    assert stand_ins.published().keys() == TREE | {"survival_onnx/config.pbtxt", "survival_onnx/1/model.onnx"}
    assert f"published: {REPOSITORY}/survival_onnx\n" in said
