"""What `make repository` publishes, and what it does with the files of the user and of other builds."""

import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY, Project
from published_tree import BINARY, CHECKPOINTS, REAL, TREE, put_own_checkpoints, read_files, read_folder

# --- What is published --------------------------------------------------------


def test_the_published_tree_is_exact(stand_ins: Project) -> None:
    assert stand_ins.published().keys() == TREE
    top = stand_ins.path / REPOSITORY
    assert not [path for path in top.rglob("*") if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1)]


def test_the_table_shows_where_each_file_came_from(stand_ins: Project) -> None:
    stand_ins.append("convertation/head/mlp.py", "# a remark\n")
    lines = stand_ins.make("onnx", "MODEL=binary").splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith("artifact"))
    assert lines[head].split() == ["artifact", "made", "from", "size", "sha256", "difference", "time"]
    row = lines[head + 1].split()
    assert row[:2] == ["build/onnx/binary.onnx", "model_binary.pth"]
    assert re.fullmatch(r"[0-9a-f]{12}", row[4])
    assert re.fullmatch(r"\d\.\de[+-]\d\d", row[5])
    assert row[-1] == "rebuilt"
    assert re.search(r"^\d+ steps rebuilt, \d+ reused", lines[-1])


def test_an_optional_model_is_published_only_if_named_and_can_be_rolled_back(stand_ins: Project) -> None:
    stand_ins.make("repository", "WITH=lipro")
    with_lipro = stand_ins.published()
    assert with_lipro.keys() == TREE | {"lipro_onnx/config.pbtxt", "lipro_onnx/1/model.onnx"}
    stand_ins.make("repository")
    assert stand_ins.published().keys() == TREE
    stand_ins.make("rollback")
    assert stand_ins.published() == with_lipro
    stand_ins.make("rollback")
    assert stand_ins.published().keys() == TREE


def test_rollback_puts_the_replaced_models_back_and_forth(stand_ins: Project) -> None:
    before = stand_ins.published()
    stand_ins.edit("convertation/models.yaml", "gelu", "leaky_relu")
    stand_ins.make("repository")
    after = stand_ins.published()
    assert before["binary_onnx/1/model.onnx"] != after["binary_onnx/1/model.onnx"]
    assert f"rolled back: {REPOSITORY}/binary_onnx" in stand_ins.make("rollback")
    assert stand_ins.published() == before
    stand_ins.make("rollback")
    assert stand_ins.published() == after


def test_after_a_rollback_make_publishes_what_the_inputs_make_without_computing_it_again(stand_ins: Project) -> None:
    stand_ins.edit("convertation/models.yaml", "gelu", "leaky_relu")
    stand_ins.make("repository")
    after = stand_ins.published()
    stand_ins.make("rollback")
    python = next((stand_ins.path / ".venv/bin").iterdir())
    python.write_text("#!/bin/bash\necho computed: $* >> computed\nexit 1\n")
    stand_ins.make("repository")
    assert stand_ins.published() == after
    assert not (stand_ins.path / "computed").exists()


@pytest.mark.parametrize("rule", ["relative", "absolute", "slash", "dot"])
def test_another_folder_is_the_same_folder_in_every_spelling(stand_ins: Project, tmp_path: Path, rule: str) -> None:
    folder = tmp_path / "outside/published" if rule == "absolute" else stand_ins.path / "sub/published"
    spelt = {
        "relative": "sub/published",
        "absolute": str(folder),
        "slash": "sub/published/",
        "dot": "./sub/../sub/published",
    }
    good = stand_ins.published()

    stand_ins.make("repository", f"REPOSITORY={spelt[rule]}")

    assert read_folder(folder) == good == stand_ins.published()
    assert "up to date" in stand_ins.make("repository", f"REPOSITORY={spelt[rule]}")
    if rule != "absolute":
        assert "up to date" in stand_ins.make("repository", f"REPOSITORY={folder}")
        assert "up to date" in stand_ins.make("repository", "REPOSITORY=sub/published")
    stand_ins.append("convertation/head/binary.pbtxt", "# newer\n")
    stand_ins.make("repository", f"REPOSITORY={spelt[rule]}")
    assert stand_ins.published() == good
    stand_ins.make("rollback", f"REPOSITORY={spelt[rule]}")
    assert read_folder(folder) == good


def test_a_link_to_a_repository_on_another_file_system_is_followed(stand_ins: Project) -> None:
    good, shared = stand_ins.published(), Path(f"/dev/shm/test-repository-{os.getpid()}")
    try:
        shared.mkdir()
        (stand_ins.path / "linked").symlink_to(shared / "repository")
        stand_ins.make("repository", "REPOSITORY=linked")
        assert read_folder(shared / "repository") == good
        assert "up to date" in stand_ins.make("repository", "REPOSITORY=linked")
    finally:
        shutil.rmtree(shared)


# --- Whose files are whose ----------------------------------------------------


def test_own_checkpoints_are_used_shown_and_kept_by_every_target(stand_ins: Project) -> None:
    own = put_own_checkpoints(stand_ins)
    said = stand_ins.make("repository", REAL, "REPOSITORY=real")
    for name in CHECKPOINTS:
        assert said.count(f"local: training/weights/{name} is yours") == 1
    assert "model_binary.pth (local)" in said
    record = (stand_ins.path / ".make/made/build%onnx%binary.onnx").read_text()
    assert f" {BINARY}=" in record

    assert f"local: {BINARY}" in stand_ins.make("repository", REAL, "REPOSITORY=real")
    for target in ("onnx", "rollback", "clean", "repository", "distclean"):
        stand_ins.start(target, REAL, "REPOSITORY=real").communicate()
        assert read_files(own) == own, target
    assert (stand_ins.path / "real/vit_onnx/1/model.onnx").exists()


def test_one_own_checkpoint_changes_one_model(stand_ins: Project) -> None:
    put_own_checkpoints(stand_ins)
    stand_ins.make("repository", REAL, "REPOSITORY=real")
    before = read_folder(stand_ins.path / "real")
    (stand_ins.path / BINARY).write_text("better weights")

    said = stand_ins.make("repository", REAL, "REPOSITORY=real")

    after = read_folder(stand_ins.path / "real")
    assert {name for name in after if after[name] != before[name]} == {"binary_onnx/1/model.onnx"}
    assert "published: real/binary_onnx\n" in said


def test_own_checkpoints_are_kept_even_without_records(stand_ins: Project) -> None:
    own = put_own_checkpoints(stand_ins)
    stand_ins.make("onnx", REAL)
    for kind in ("made", "seen", "took"):
        shutil.rmtree(stand_ins.path / ".make" / kind)
    assert f"local: {BINARY}" in stand_ins.make("onnx", REAL, "MODEL=head")
    assert read_files(own) == own


def test_synthetic_checkpoints_are_in_another_folder(stand_ins: Project) -> None:
    assert [path.name for path in (stand_ins.path / "training/weights").iterdir() if path.name != ".gitkeep"] == []
    assert all((stand_ins.path / "build/synthetic" / name).exists() for name in CHECKPOINTS)


@pytest.mark.parametrize("target", ["clean", "distclean"])
def test_cleaning_leaves_the_published_repository_and_its_rollback(stand_ins: Project, target: str) -> None:
    before = stand_ins.published()
    stand_ins.append("convertation/head/binary.pbtxt", "# newer\n")
    stand_ins.make("repository")
    after = stand_ins.published()
    stand_ins.make(target)
    assert not (stand_ins.path / "build").exists()
    assert stand_ins.published() == after
    stand_ins.make("rollback")
    assert stand_ins.published() == before


@pytest.mark.parametrize("file", ["vit_onnx/config.pbtxt", "vit_onnx/1/model.onnx", "vit_onnx/1/model.plan"])
def test_a_repository_of_another_build_is_refused_and_untouched(stand_ins: Project, file: str) -> None:
    theirs = stand_ins.path / "theirs"
    (theirs / file).parent.mkdir(parents=True)
    (theirs / file).write_text("another's")
    said = stand_ins.fail("repository", "REPOSITORY=theirs")
    assert "was not made by this build" in said
    assert "mv theirs theirs.old" in said and "REPOSITORY=dir" in said
    assert read_folder(theirs) == {file: b"another's"}
    assert len(said.splitlines()) == 1


def test_synthetic_models_never_replace_real_ones_nor_the_reverse(stand_ins: Project) -> None:
    put_own_checkpoints(stand_ins)
    synthetic = stand_ins.published()
    said = stand_ins.fail("repository", REAL)
    assert f"{REPOSITORY} is made from synthetic weights and these are real; move it away (mv {REPOSITORY}" in said
    assert stand_ins.published() == synthetic

    stand_ins.make("repository", REAL, "REPOSITORY=real")
    real = read_folder(stand_ins.path / "real")
    assert "real is made from real weights and these are synthetic" in stand_ins.fail("repository", "REPOSITORY=real")
    assert read_folder(stand_ins.path / "real") == real


def test_after_the_old_repository_is_moved_away_a_new_one_is_published(stand_ins: Project) -> None:
    put_own_checkpoints(stand_ins)
    (stand_ins.path / REPOSITORY).rename(stand_ins.path / f"{REPOSITORY}.old")
    stand_ins.make("repository", REAL)
    assert stand_ins.published().keys() == TREE
    assert read_folder(stand_ins.path / f"{REPOSITORY}.old").keys() - {".gitkeep"} == TREE
    assert "were made by" not in stand_ins.make("repository", REAL)


@pytest.mark.parametrize("folder", ["", "a b", ".", "/", "build", "build/x", ".make"])
def test_a_folder_that_cannot_be_a_repository_is_refused(stand_ins: Project, folder: str) -> None:
    good, parent = stand_ins.published(), sorted(stand_ins.path.parent.iterdir())
    said = stand_ins.fail("repository", f"REPOSITORY={folder}")
    assert f"REPOSITORY={folder}" in said or f"REPOSITORY={(stand_ins.path / folder).resolve()}" in said
    assert "expected" in said and len(said.splitlines()) == 1
    assert stand_ins.published() == good and sorted(stand_ins.path.parent.iterdir()) == parent
