"""The lock of base images: the first image under a name is kept; another one is refused without consent."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.archives.base_image import LOCK, check_base_image

NAME = "mirror.example:5000/nvidia/tritonserver:24.06-py3"
REPOSITORY = NAME.rpartition(":")[0]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACCEPT", raising=False)


def image(identity: str, digest: str = "") -> dict[str, Any]:
    other = "elsewhere.example/tritonserver@sha256:0"
    return {"Id": identity, "RepoDigests": [other, f"{REPOSITORY}@{digest}"] if digest else []}


def test_the_first_one_is_locked_and_stays() -> None:
    assert check_base_image(NAME, image("sha256:a", "sha256:1")) == "sha256:a"
    assert check_base_image("other:1", image("sha256:b")) == "sha256:b"
    text = LOCK.read_text()
    assert json.loads(text)[NAME] == {"digest": "sha256:1", "id": "sha256:a"}
    check_base_image(NAME, image("sha256:a", "sha256:1"))
    assert LOCK.read_text() == text


def test_the_same_from_a_file_or_on_another_kind_of_machine_is_the_same() -> None:
    check_base_image(NAME, image("sha256:a", "sha256:1"))
    assert check_base_image(NAME, image("sha256:a")) == "sha256:a"  # docker load
    assert check_base_image(NAME, image("sha256:arm", "sha256:1")) == "sha256:arm"


def test_another_one_is_refused_and_told_how_to_go_back() -> None:
    check_base_image(NAME, image("sha256:a", "sha256:1"))
    with pytest.raises(SystemExit) as stop:
        check_base_image(NAME, image("sha256:c", "sha256:2"))
    assert stop.value.code == (
        f"{NAME} is another image than the locked one: expected sha256:1, got sha256:2 (docker/images.lock.json)\n"
        "its makers have moved the tag, or a mirror has another; if you want it: ACCEPT=1\n"
        f"the locked one: docker pull {REPOSITORY}@sha256:1 && docker tag {REPOSITORY}@sha256:1 {NAME}"
    )


def test_one_without_any_digest_is_no_match() -> None:
    check_base_image(NAME, image("sha256:a"))
    with pytest.raises(SystemExit, match="expected sha256:a, got sha256:c"):
        check_base_image(NAME, image("sha256:c"))


def test_with_consent_the_new_one_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    check_base_image(NAME, image("sha256:a", "sha256:1"))
    monkeypatch.setenv("ACCEPT", "1")
    check_base_image(NAME, image("sha256:c", "sha256:2"))
    monkeypatch.delenv("ACCEPT")
    assert check_base_image(NAME, image("sha256:c", "sha256:2")) == "sha256:c"
