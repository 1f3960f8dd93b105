"""What a user sees of `make repository` and its neighbours: the published tree, whose files are whose, each refusal."""

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, ROOT, Project

TREE = {
    "binary_onnx/config.pbtxt",
    "binary_onnx/1/model.onnx",
    "multilabel_onnx/config.pbtxt",
    "multilabel_onnx/1/model.onnx",
    "vit_onnx/config.pbtxt",
    "vit_onnx/1/model.onnx",
    "bpr_model/config.pbtxt",
    "bpr_model/1/model.py",
    "bpr_model/1/requirements.txt",
    "bpr_model/1/weights/model.onnx",
    "bpr_model/1/weights/inference-settings.json",
} | {f"bpr_model/1/bpreg/{path.name}" for path in (ROOT / "convertation/bpr/bpreg").glob("*.py")}
CHECKPOINTS = (
    "CT-RATE/ProjectionVIT_LiPro_V2.pt",
    "CT-RATE/model_binary.pth",
    "CT-RATE/model_multilabel.pth",
    "bpr/model.pt",
    "bpr/inference-settings.json",
)
BINARY = "training/weights/CT-RATE/model_binary.pth"
REAL = "WEIGHTS=yandex"


def own_checkpoints(project: Project) -> dict[Path, bytes]:
    """Put checkpoints of the user's own where they belong; return their content."""
    own = {project.path / "training/weights" / name: b"my " + name.encode() for name in CHECKPOINTS}
    for path, content in own.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return own


def content_of(files: dict[Path, bytes]) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in files}


def inside(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def last_line(said: str) -> str:
    """Return the message: the last line that is not Make's own remark about a failed recipe."""
    return [line for line in said.splitlines() if line and not re.match(r"make(\[\d+\])?: \*\*\* \[", line)][-1]


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


def test_an_optional_model_comes_with_its_name_leaves_without_and_rolls_back(stand_ins: Project) -> None:
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
def test_another_folder_is_one_folder_however_it_is_spelt(stand_ins: Project, tmp_path: Path, rule: str) -> None:
    folder = tmp_path / "outside/published" if rule == "absolute" else stand_ins.path / "sub/published"
    spelt = {
        "relative": "sub/published",
        "absolute": str(folder),
        "slash": "sub/published/",
        "dot": "./sub/../sub/published",
    }
    good = stand_ins.published()

    stand_ins.make("repository", f"REPOSITORY={spelt[rule]}")

    assert inside(folder) == good == stand_ins.published()
    assert "up to date" in stand_ins.make("repository", f"REPOSITORY={spelt[rule]}")
    if rule != "absolute":
        assert "up to date" in stand_ins.make("repository", f"REPOSITORY={folder}")
        assert "up to date" in stand_ins.make("repository", "REPOSITORY=sub/published")
    stand_ins.append("convertation/head/binary.pbtxt", "# newer\n")
    stand_ins.make("repository", f"REPOSITORY={spelt[rule]}")
    assert stand_ins.published() == good
    stand_ins.make("rollback", f"REPOSITORY={spelt[rule]}")
    assert inside(folder) == good


def test_a_link_to_a_repository_on_another_file_system_is_followed(stand_ins: Project) -> None:
    good, shared = stand_ins.published(), Path(f"/dev/shm/test-repository-{os.getpid()}")
    try:
        shared.mkdir()
        (stand_ins.path / "linked").symlink_to(shared / "repository")
        stand_ins.make("repository", "REPOSITORY=linked")
        assert inside(shared / "repository") == good
        assert "up to date" in stand_ins.make("repository", "REPOSITORY=linked")
    finally:
        shutil.rmtree(shared)


# --- Whose files are whose ----------------------------------------------------


def test_own_checkpoints_are_used_shown_and_kept_by_every_target(stand_ins: Project) -> None:
    own = own_checkpoints(stand_ins)
    said = stand_ins.make("repository", REAL, "REPOSITORY=real")
    for name in CHECKPOINTS:
        assert said.count(f"local: training/weights/{name} is yours") == 1
    assert "model_binary.pth (local)" in said
    record = (stand_ins.path / ".make/made/build%onnx%binary.onnx").read_text()
    assert f" {BINARY}=" in record

    assert f"local: {BINARY}" in stand_ins.make("repository", REAL, "REPOSITORY=real")
    for target in ("onnx", "rollback", "clean", "repository", "distclean"):
        stand_ins.start(target, REAL, "REPOSITORY=real").communicate()
        assert content_of(own) == own, target
    assert (stand_ins.path / "real/vit_onnx/1/model.onnx").exists()


def test_one_own_checkpoint_reaches_one_model(stand_ins: Project) -> None:
    own_checkpoints(stand_ins)
    stand_ins.make("repository", REAL, "REPOSITORY=real")
    before = inside(stand_ins.path / "real")
    (stand_ins.path / BINARY).write_text("better weights")

    said = stand_ins.make("repository", REAL, "REPOSITORY=real")

    after = inside(stand_ins.path / "real")
    assert {name for name in after if after[name] != before[name]} == {"binary_onnx/1/model.onnx"}
    assert "published: real/binary_onnx\n" in said


def test_without_records_own_checkpoints_are_still_the_users(stand_ins: Project) -> None:
    own = own_checkpoints(stand_ins)
    stand_ins.make("onnx", REAL)
    for kind in ("made", "seen", "took"):
        shutil.rmtree(stand_ins.path / ".make" / kind)
    assert f"local: {BINARY}" in stand_ins.make("onnx", REAL, "MODEL=head")
    assert content_of(own) == own


def test_synthetic_checkpoints_lie_apart(stand_ins: Project) -> None:
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
    assert inside(theirs) == {file: b"another's"}
    assert len(said.splitlines()) == 1


def test_synthetic_never_replaces_real_nor_real_synthetic(stand_ins: Project) -> None:
    own_checkpoints(stand_ins)
    synthetic = stand_ins.published()
    said = stand_ins.fail("repository", REAL)
    assert f"{REPOSITORY} is made from synthetic weights and these are real; move it away (mv {REPOSITORY}" in said
    assert stand_ins.published() == synthetic

    stand_ins.make("repository", REAL, "REPOSITORY=real")
    real = inside(stand_ins.path / "real")
    assert "real is made from real weights and these are synthetic" in stand_ins.fail("repository", "REPOSITORY=real")
    assert inside(stand_ins.path / "real") == real


def test_what_is_moved_away_makes_room(stand_ins: Project) -> None:
    own_checkpoints(stand_ins)
    (stand_ins.path / REPOSITORY).rename(stand_ins.path / f"{REPOSITORY}.old")
    stand_ins.make("repository", REAL)
    assert stand_ins.published().keys() == TREE
    assert inside(stand_ins.path / f"{REPOSITORY}.old").keys() - {".gitkeep"} == TREE
    assert "were made by" not in stand_ins.make("repository", REAL)


@pytest.mark.parametrize("folder", ["", "a b", ".", "/", "build", "build/x", ".make"])
def test_a_folder_that_cannot_be_one_of_models_is_refused(stand_ins: Project, folder: str) -> None:
    good, parent = stand_ins.published(), sorted(stand_ins.path.parent.iterdir())
    said = stand_ins.fail("repository", f"REPOSITORY={folder}")
    assert f"REPOSITORY={folder}" in said or f"REPOSITORY={(stand_ins.path / folder).resolve()}" in said
    assert "expected" in said and len(said.splitlines()) == 1
    assert stand_ins.published() == good and sorted(stand_ins.path.parent.iterdir()) == parent


# --- Variants -----------------------------------------------------------------


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


# --- make help ----------------------------------------------------------------


def test_help_is_the_default_and_names_targets_and_values(stand_ins: Project) -> None:
    said = stand_ins.make("VIT=Base")
    for target in ("repository", "onnx", "verify", "serve", "rollback", "bench", "test", "clean", "distclean", "help"):
        assert re.search(rf"^  make {target} +\S", said, re.MULTILINE), target
    assert said == stand_ins.make("help", "VIT=Base")
    said = stand_ins.make("help", "VIT=Base", "KNOBS=1")
    assert re.search(r"^  WEIGHTS=synthetic$", said, re.MULTILINE)
    assert re.search(r"^  VIT=Base$", said, re.MULTILINE)


def test_help_needs_nothing_and_leaves_nothing(stand_ins: Project) -> None:
    for name in (".venv", ".venv-triton", "build"):
        shutil.rmtree(stand_ins.path / name)
    stand_ins.make("help")
    assert not any((stand_ins.path / name).exists() for name in (".venv", "build"))


# --- A step fails: what is published stays ------------------------------------


@pytest.mark.parametrize(
    "step",
    ["scripts.convert.synthesize", "convertation.head.torch2onnx", "scripts.convert.compare", "scripts.serve.verdict"],
)
def test_a_step_that_fails_leaves_the_published_set(stand_ins: Project, step: str) -> None:
    """Whatever the reason: no free port, a server that dies, a difference beyond tolerance."""
    good = stand_ins.published()
    python = next((stand_ins.path / ".venv/bin").iterdir())
    works = python.read_text()
    python.write_text(works.replace("sleep", f'if [[ $2 == {step} ]]; then echo "the reason" >&2; exit 3; fi\nsleep'))
    stand_ins.edit("convertation/models.yaml", "gelu", "leaky_relu")
    stand_ins.append("convertation/head/multilabel.pbtxt", "# newer\n")

    said = stand_ins.fail("repository", "-k")

    assert "the reason" in said and "was not made, what was there before stays" in said
    assert stand_ins.published() == good
    assert "not made" in stand_ins.fail("repository")
    python.write_text(works)
    stand_ins.make("repository")
    assert stand_ins.published()["binary_onnx/1/model.onnx"] != good["binary_onnx/1/model.onnx"]


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("family: head", "family: heads", "unknown family heads; expected one of vit, head, bpr"),
        ("trained_on: LiPro", "trained: LiPro", "unknown key trained"),
        ("batch:\n  - 1\n", "batch:\n  - one\n", "input, output and batch hold whole numbers above 0"),
        ("  family: vit\n", "  family: vit\n :\n", "no valid YAML"),
    ],
    ids=["family", "key", "type", "syntax"],
)
def test_a_mistake_in_models_yaml_is_named(stand_ins: Project, old: str, new: str, expected: str) -> None:
    good = stand_ins.published()
    stand_ins.edit("convertation/models.yaml", old, new)
    said = stand_ins.fail("repository")
    assert "convertation/models.yaml" in said and expected in said
    assert stand_ins.published() == good


def test_a_full_disk_leaves_the_published_set(stand_ins: Project, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk to fill cannot be mounted here: {mounted.stderr.strip()}")
    try:
        project = Project(disk / "project")
        for name in ("build", ".model_repository_running"):
            shutil.rmtree(stand_ins.path / name, ignore_errors=True)
        shutil.copytree(stand_ins.path, project.path, copy_function=shutil.copy)
        good = project.published()
        project.append("convertation/head/mlp.py", "# a remark\n")
        project.append("convertation/head/binary.pbtxt", "# newer\n")
        room = disk / "room"
        with room.open("wb", buffering=0) as file, contextlib.suppress(OSError):  # until it is full to the last page
            while file.write(bytes(4096)):
                pass
        assert "make repository" in project.make("help")
        for free in (0, 4096, 20480, 61440):
            os.truncate(room, room.stat().st_size - free)
            said = project.start("repository").communicate()[0]
            if f"published: {REPOSITORY}" in said:
                break
            assert "No space left on device" in said, said
            assert "Traceback" not in said, said
            assert project.published() == good
        room.unlink()
        project.make("repository")
        assert project.published()["binary_onnx/config.pbtxt"].endswith(b"# newer\n")
        assert "up to date" in project.make("repository")
    finally:
        subprocess.run(["umount", disk], check=True)


# --- Checkpoints that are none, by the real steps -----------------------------


class Malice:
    """Unpickled by anything less than weights_only=True, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture(scope="module")
def real(built: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The tiny project, published from checkpoints that are the user's own."""
    project = Project(tmp_path_factory.mktemp("real") / "project")
    shutil.copytree(built.path, project.path, symlinks=True, copy_function=shutil.copy)
    for name in (REPOSITORY, f".{REPOSITORY}"):
        shutil.rmtree(project.path / name)
    shutil.copytree(project.path / "build/synthetic", project.path / "training/weights", dirs_exist_ok=True)
    said = project.make("repository", REAL)
    assert "model_binary.pth (local)" in said
    yield project


def test_the_record_of_a_published_file_tells_its_checkpoint(real: Project) -> None:
    import onnx

    model = onnx.load(real.path / REPOSITORY / "binary_onnx/1/model.onnx")
    facts = {prop.key: prop.value for prop in model.metadata_props}
    sha256 = subprocess.check_output(["sha256sum", BINARY], cwd=real.path, text=True).split()[0]
    assert facts == {"weights": "real", "model": "model_binary", "checkpoint_sha256": sha256}


def empty(path: Path, trace: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path, trace: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def running_code(path: Path, trace: Path) -> None:
    torch.save({"layers": Malice(trace)}, path)


def running_code_in_the_old_format(path: Path, trace: Path) -> None:
    path.write_bytes(pickle.dumps({"layers": Malice(trace)}, protocol=2))


def of_another_model(path: Path, trace: Path) -> None:
    shutil.copy(path.with_name("model_multilabel.pth"), path)


def with_nan(path: Path, trace: Path) -> None:
    state = torch.load(path, weights_only=True)
    next(tensor for tensor in state.values() if tensor.is_floating_point()).view(-1)[0] = float("nan")
    torch.save(state, path)


def with_infinity(path: Path, trace: Path) -> None:
    state = torch.load(path, weights_only=True)
    next(tensor for tensor in state.values() if tensor.is_floating_point()).view(-1)[0] = float("inf")
    torch.save(state, path)


@pytest.mark.parametrize(
    "harm, expected",
    [
        (empty, "the file is empty"),
        (truncated, "truncated or no checkpoint"),
        (running_code, "refused, reading it would run code"),
        (running_code_in_the_old_format, "a plain pickle, which is never read: that could run code"),
        (of_another_model, "not a checkpoint of this model"),
        (with_nan, "NaN or infinite weights"),
        (with_infinity, "NaN or infinite weights"),
    ],
)
def test_a_checkpoint_that_is_none_is_named_with_the_reason(
    real: Project, tmp_path: Path, harm: Callable[[Path, Path], None], expected: str
) -> None:
    checkpoint, trace, good = real.path / BINARY, tmp_path / "it ran", real.published()
    sound = checkpoint.read_bytes()
    try:
        harm(checkpoint, trace)
        harmed = checkpoint.read_bytes()

        said = real.fail("repository", REAL)

        assert f"{BINARY}: {expected}" in said
        assert "the command failed with status" in said
        assert not trace.exists()
        assert real.published() == good
        assert checkpoint.read_bytes() == harmed  # theirs, even so
    finally:
        checkpoint.write_bytes(sound)
    assert "up to date" in real.make("repository", REAL)


def test_the_trace_would_be_left_by_a_careless_reader(tmp_path: Path) -> None:
    running_code(tmp_path / "model.pth", tmp_path / "it ran")
    torch.load(tmp_path / "model.pth", weights_only=False)
    assert (tmp_path / "it ran").exists()


@pytest.fixture
def nothing_there() -> Iterator[str]:
    """The address of a server that has nothing."""

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

    with ThreadingHTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_missing_checkpoints_say_how_to_get_them(real: Project, tmp_path: Path, nothing_there: str) -> None:
    """Neither the file nor the archive is there, nor is it on Yandex.Disk."""
    checkpoint, good = real.path / BINARY, real.published()
    checkpoint.rename(tmp_path / "away")
    try:
        said = real.fail("repository", REAL, YANDEX_DISK_API=nothing_there)
        assert "make repository WEIGHTS_ZIP=" in said and "make repository WEIGHTS=synthetic" in said
        assert real.published() == good
    finally:
        (tmp_path / "away").rename(checkpoint)


def test_the_checks_tell_what_was_measured(real: Project) -> None:
    for name in ("vit", "binary", "multilabel", "bpr"):
        check = json.loads((real.path / f"build/checks/{name}.json").read_text())
        assert 0 <= check["difference"] <= check["tolerance"]
