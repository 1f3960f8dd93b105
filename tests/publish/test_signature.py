"""A signature names each file that was altered, added or removed, fails with another key, needs no network."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY, ROOT, Project

from scripts.publish.signature import read_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models, and Git's mark of an empty folder."""
    top = tmp_path / "models"
    for name in ("vit_onnx", "binary_onnx"):
        (top / name / "1").mkdir(parents=True)
        (top / name / "1/model.onnx").write_text(name)
        (top / name / "config.pbtxt").write_text("backend")
    (top / ".gitkeep").write_text("")
    (tmp_path / ".make/lock").mkdir(parents=True)
    return top


def run(signing: Path, verb: str, key: Path, folder: Path, *more: str) -> tuple[int, str]:
    """Exit status and what was said, without any network."""
    command = [signing, "-m", "scripts.publish.signature", verb, key, folder.name, *more]
    offline = ["unshare", "--user", "--map-current-user", "--net"]
    if subprocess.run([*offline, "true"], capture_output=True).returncode:
        offline = []
    said = subprocess.run(
        [*offline, *command], cwd=folder.parent, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert "Traceback" not in said.stderr, said.stderr
    return said.returncode, said.stdout + said.stderr


def test_what_is_signed_is_verified(signing: Path, keys: Path, folder: Path) -> None:
    status, said = run(signing, "sign", keys / "key.pem", folder)
    digest, files = read_bundle(str(folder.parent / "models.sig"))
    assert (status, said) == (0, f"models.sig: models signed, digest {digest}\n")
    assert sorted(files) == [
        f"{name}_onnx/{file}" for name in ("binary", "vit") for file in ("1/model.onnx", "config.pbtxt")
    ]
    (folder / ".gitkeep").unlink()
    assert run(signing, "verify", keys / "key.pub", folder) == (0, f"models is what was signed, digest {digest}\n")


def test_each_file_that_is_not_as_signed_is_named(signing: Path, keys: Path, folder: Path) -> None:
    run(signing, "sign", keys / "key.pem", folder)
    (folder / "vit_onnx/1/model.onnx").write_text("another")
    (folder / "vit_onnx/config.pbtxt").unlink()
    (folder / ".git").mkdir()  # a folder like any other to Triton, which the library leaves out unless told
    (folder / ".git/model.py").write_text("code")
    assert run(signing, "verify", keys / "key.pub", folder) == (
        1,
        "models/.git/model.py: added since it was signed\n"
        "models/vit_onnx/1/model.onnx: altered since it was signed\n"
        "models/vit_onnx/config.pbtxt: removed since it was signed\n"
        "models is not what was signed\n",
    )


def test_another_key_verifies_nothing(signing: Path, keys: Path, folder: Path) -> None:
    run(signing, "sign", keys / "key.pem", folder)
    status, said = run(signing, "verify", keys / "other.pub", folder)
    assert status == 1 and f"models: models.sig cannot be verified with KEY={keys}/other.pub: Key mismatch" in said


def test_an_altered_list_is_no_longer_signed(signing: Path, keys: Path, folder: Path) -> None:
    run(signing, "sign", keys / "key.pem", folder)
    bundle = folder.parent / "models.sig"
    whole = json.loads(bundle.read_text())
    other = folder.parent / "other"
    folder.rename(other)
    (other / "vit_onnx/1/model.onnx").write_text("another")
    run(signing, "sign", keys / "other.pem", other)  # another's list under our signature
    whole["dsseEnvelope"]["payload"] = json.loads((folder.parent / "other.sig").read_text())["dsseEnvelope"]["payload"]
    bundle.write_text(json.dumps(whole))
    other.rename(folder)
    assert run(signing, "verify", keys / "key.pub", folder) == (
        1, f"models.sig: not signed by KEY={keys}/key.pub, or altered since\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "key", "expected"),
    [
        ("sign", "key.pub", "no elliptic private key to sign with"),
        ("verify", "key.pem", "no public key to verify with"),
        ("sign", "absent.pem", "No such file"),
        ("verify", "absent.pub", "absent.pub: no such file; expected the public key"),
    ],
)
def test_a_key_that_is_none_is_one_sentence(
    signing: Path, keys: Path, folder: Path, verb: str, key: str, expected: str
) -> None:
    run(signing, "sign", keys / "key.pem", folder)
    status, said = run(signing, verb, keys / key, folder)
    assert status == 1 and expected in said and len(said.splitlines()) == 1


def test_a_finished_archive_is_published_if_its_signature_fits(
    signing: Path, keys: Path, project: Project, tmp_path: Path
) -> None:
    archive = tmp_path / "finished.zip"
    shutil.make_archive(str(archive.with_suffix("")), "zip", project.path / REPOSITORY)
    take = ("repository", "FROM=prebuilt", f"REPOSITORY_ZIP={archive}", "REPOSITORY=others")
    said = project.fail(*take, f"KEY={keys}/key.pub")
    assert f"{archive}.sig is missing, the signature of {archive} that KEY={keys}/key.pub is to verify" in said
    project.make("sign", f"KEY={keys}/key.pem")
    shutil.copy(project.path / f"{REPOSITORY}.sig", f"{archive}.sig")
    said = project.fail(*take, f"KEY={keys}/other.pub")
    assert "Key mismatch" in said and "no code of it was run, nothing was published" in said
    assert not (project.path / "others").exists()
    said = project.make(*take, f"KEY={keys}/key.pub")
    assert "build/prebuilt is what was signed, digest " in said and "published: others/" in said
    assert "up to date" in project.make(*take, f"KEY={keys}/key.pub")
    assert "KEY=absent.pub: no such file" in project.fail(*take, "KEY=absent.pub")


def test_plans_of_others_are_taken_if_their_folders_signature_fits(
    signing: Path, keys: Path, stand_ins: Project, tmp_path: Path
) -> None:
    (stand_ins.path / ".venv-signing").symlink_to(ROOT / ".venv-signing")  # the real one beside the stand-ins
    plan = tmp_path / "plans/sm86/vit.plan"
    plan.parent.mkdir(parents=True)
    plan.write_bytes(b"plan")
    folder = f"PLANS={tmp_path}/plans"
    assert "plans signed, digest " in stand_ins.make("sign", folder, f"KEY={keys}/key.pem")
    assert "plans is what was signed" in stand_ins.make("verify", folder, f"KEY={keys}/key.pub")
    plan.write_bytes(b"another")
    take = ("build/plan/sm86/vit.plan", "FORMAT=both", "gpu=sm86", "tensorrt=10.1.0.27", folder)
    said = stand_ins.fail(*take, f"KEY={keys}/key.pub")
    assert f"{plan}: altered since it was signed" in said
    assert "vit.plan: new" not in said  # it was not even looked at
    assert "vit.plan: new" in stand_ins.fail(*take)  # without a key it is; what it lacks is told


def test_make_signs_what_was_judged_and_verifies_it(signing: Path, keys: Path, project: Project) -> None:
    assert f"{REPOSITORY} signed, digest " in project.make("sign", f"KEY={keys}/key.pem")
    assert f"{REPOSITORY} is what was signed, digest " in project.make("verify", f"KEY={keys}/key.pub")
    config = project.path / REPOSITORY / "vit_onnx/config.pbtxt"
    config.write_text(config.read_text() + "# harmed\n")
    said = project.fail("verify", f"KEY={keys}/key.pub")
    assert f"{REPOSITORY}/vit_onnx/config.pbtxt: altered since it was signed\n" in said
    said = project.fail("sign", f"KEY={keys}/key.pem")
    assert "vit_onnx/config.pbtxt is not what the verdict was passed on, so that it is not signed" in said
    assert "make sign KEY=key.pem: expected a private key" in project.fail("sign")
