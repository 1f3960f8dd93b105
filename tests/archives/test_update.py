import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.archives.fetch import fetch_archive
from tests.yandex_disk_stand_in import Fault, YandexDisk

ROOT = Path(__file__).parents[2]


def zipped(content: bytes) -> bytes:
    """An archive with one file."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr(zipfile.ZipInfo("CT-RATE/model_binary.pth"), content)
    return file.getvalue()


OLD, NEW = zipped(b"old" * 200), zipped(b"another" * 200)
LOCK = Path("training/weights.zip.lock.json")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[YandexDisk]:
    """The stand-in with one weights.zip, and a project that has locked it."""
    (tmp_path / "training").mkdir()
    shutil.copy(ROOT / "training/archives.json", tmp_path / "training")
    monkeypatch.chdir(tmp_path)
    with YandexDisk({"/weights.zip": OLD}) as server:
        for name in list(os.environ):
            if name.lower().endswith("_proxy") or name == "CI":
                monkeypatch.delenv(name)
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        fetch_archive("weights.zip", Path("weights.zip"))
        server.requests.clear()
        yield server


def update(*words: str) -> tuple[int, str]:
    """Run the program; return its exit status and output."""
    command = [sys.executable, "-m", "scripts.archives.update", *words]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def test_an_archive_that_is_the_locked_one_is_current(disk: YandexDisk) -> None:
    status, output = update("weights.zip")
    assert status == 0
    assert output.endswith("weights.zip: current\n")
    assert disk.kinds() == ["about"]


def test_an_archive_that_is_another_is_shown_beside_the_old_one_and_nothing_is_written(disk: YandexDisk) -> None:
    old, before = disk.describe("/weights.zip"), LOCK.read_text()
    disk.files["/weights.zip"] = NEW
    new = disk.describe("/weights.zip")
    status, output = update("weights.zip")
    assert status == 1
    lines = [line.split() for line in output.splitlines()]
    for key in ("size", "md5", "sha256"):
        assert [key, str(old[key]), str(new[key])] in lines
    assert "weights.zip: changed: size, sha256, md5" in output
    assert "make update ACCEPT=1" in output
    assert LOCK.read_text() == before
    assert disk.kinds() == ["about"]


def test_accepted_the_new_one_is_current_and_is_what_the_next_download_brings(disk: YandexDisk) -> None:
    disk.files["/weights.zip"] = NEW
    assert update("--accept", "weights.zip")[0] == 0
    assert json.loads(LOCK.read_text())["sha256"] == disk.describe("/weights.zip")["sha256"]
    assert update("weights.zip")[0] == 0
    fetch_archive("weights.zip", Path("weights.zip"))
    assert Path("weights.zip").read_bytes() == NEW


def test_another_date_alone_is_no_change(disk: YandexDisk) -> None:
    disk.modified = "2025-01-01T00:00:00+00:00"
    assert update("weights.zip")[0] == 0


def test_without_digests_the_date_decides_and_only_a_download_can_tell_more(disk: YandexDisk) -> None:
    disk.about["/weights.zip"] = {"sha256": None, "md5": None}
    assert update("weights.zip")[0] == 0
    disk.modified = "2025-01-01T00:00:00+00:00"
    status, output = update("weights.zip")
    assert status == 2
    assert "only a download can tell" in output
    disk.files["/weights.zip"] = NEW
    assert update("weights.zip")[0] == 1


def test_without_a_lock_it_cannot_be_told_but_accepted(disk: YandexDisk) -> None:
    LOCK.unlink()
    status, output = update("weights.zip")
    assert status == 2
    assert "there is no lock yet to compare with" in output
    assert not LOCK.exists()
    assert update("--accept", "weights.zip")[0] == 0
    assert update("weights.zip")[0] == 0


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=404, body={"error": "DiskNotFoundError"}),
        Fault(status=429, body={"error": "TooManyRequestsError"}),
        Fault(status=503),
        Fault(status=200, body=b"<html>"),
    ],
)
def test_an_api_that_does_not_answer_leaves_it_untold(disk: YandexDisk, fault: Fault) -> None:
    disk.always["about"] = fault
    before = LOCK.read_text()
    status, output = update("--accept", "weights.zip")
    assert status == 2
    assert output.startswith("weights.zip: ")
    assert "Traceback" not in output
    assert LOCK.read_text() == before


def test_a_wrong_command_line_a_broken_lock_and_a_bug_are_no_change(disk: YandexDisk) -> None:
    assert update("waits.zip")[0] == 2
    assert update("--what", "weights.zip")[0] == 2
    LOCK.write_text("{")
    status, output = update("weights.zip")
    assert status == 2
    assert output.startswith("training/weights.zip.lock.json: cannot be read")
    LOCK.unlink()
    LOCK.symlink_to(LOCK.name)  # stands for whatever nobody thought of
    Path("training/archives.json").write_text('{"archives": {"weights.zip": 3}, "api": ""}')
    status, output = update("weights.zip")
    assert status == 2
    assert "Traceback" in output
