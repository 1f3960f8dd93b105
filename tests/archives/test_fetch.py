import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.archives import archive_lock, yandex_disk
from scripts.archives.fetch import fetch_archive
from scripts.archives.partial import Partial
from tests.yandex_disk_stand_in import LINK, PREFIX, Fault, YandexDisk

ROOT = Path(__file__).parents[2]
OUT, LOCK = Path("weights.zip"), Path("training/weights.zip.lock.json")
BUSY = {"error": "TooManyRequestsError", "message": "Too many requests."}
LIMIT = {"error": "DiskResourceDownloadLimitExceededError", "message": "Too many downloads.", "description": "…"}
PAGE = b"<html>Are you a robot?</html>"


def zipped(seed: int, size: int = 300_000) -> bytes:
    """A small archive of incompressible bytes."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("CT-RATE/model_binary.pth", random.Random(seed).randbytes(size))
    return file.getvalue()


DATA = zipped(1)
HALF = len(DATA) // 2


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[YandexDisk]:
    """The stand-in with one weights.zip, and an empty project to work in."""
    (tmp_path / "training").mkdir()
    shutil.copy(ROOT / "training/archives.json", tmp_path / "training")
    monkeypatch.chdir(tmp_path)
    with YandexDisk({"/weights.zip": DATA}) as server:
        for name in list(os.environ):
            if name.lower().endswith("_proxy") or name == "CI":
                monkeypatch.delenv(name)
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


def failure(action: Callable[[], object]) -> str:
    """Return the message that ends the program with a status other than 0."""
    with pytest.raises(SystemExit) as stop:
        action()
    assert isinstance(stop.value.code, str)
    return stop.value.code


def quickly() -> None:
    fetch_archive("weights.zip", OUT, pause=lambda seconds: None)


def program(*words: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.archives.fetch", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited for a minute"
        time.sleep(0.005)


def nothing_else() -> bool:
    """Tell whether only the archive and its lock are left, no unfinished download."""
    return sorted(path.name for path in Path().iterdir()) == ["training", "weights.zip"]


# --- the way it goes --------------------------------------------------------------------------------------------------


def test_the_first_download_records_a_lock_and_the_second_does_nothing(
    disk: YandexDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    quickly()
    assert OUT.read_bytes() == DATA
    assert nothing_else()
    said = disk.describe("/weights.zip")
    lock = yandex_disk.read_json(LOCK)
    assert lock == {"size": len(DATA), "sha256": said["sha256"], "md5": said["md5"], "modified": said["modified"]}
    assert f"{LOCK}: recorded" in capsys.readouterr().out
    asked = disk.kinds()
    quickly()
    assert disk.kinds() == asked
    assert "nothing to download" in capsys.readouterr().out


def test_an_archive_that_was_put_there_by_hand_is_recognised(disk: YandexDisk) -> None:
    OUT.write_bytes(DATA)
    quickly()
    assert disk.kinds() == ["about"]
    assert LOCK.exists()


def test_another_file_in_the_way_is_kept(disk: YandexDisk) -> None:
    OUT.write_bytes(b"mine")
    Path("weights.zip.old").write_bytes(b"older")
    quickly()
    assert OUT.read_bytes() == DATA
    assert Path("weights.zip.old1").read_bytes() == b"mine"
    assert Path("weights.zip.old").read_bytes() == b"older"


def test_without_digests_from_the_api_the_size_and_our_own_sha256_count(disk: YandexDisk) -> None:
    sha256 = disk.describe("/weights.zip")["sha256"]
    disk.about["/weights.zip"] = {"sha256": None, "md5": None}
    quickly()
    assert yandex_disk.read_json(LOCK)["sha256"] == sha256
    OUT.unlink()
    disk.files["/weights.zip"] = zipped(2)  # as many other bytes
    message = failure(quickly)
    assert "is not the one in training/weights.zip.lock.json: sha256" in message
    assert "make update" in message
    assert Path("weights.zip.bad").read_bytes() == zipped(2)
    assert not OUT.exists()


def test_a_lock_without_sha256_is_completed(disk: YandexDisk) -> None:
    LOCK.write_text(f'{{"size": {len(DATA)}}}')
    quickly()
    assert yandex_disk.read_json(LOCK)["sha256"] == disk.describe("/weights.zip")["sha256"]


def test_the_program_reports_progress_in_a_log_and_exits_with_0(disk: YandexDisk) -> None:
    run = program("weights.zip", "weights.zip")
    log = run.communicate()[0]
    assert run.returncode == 0
    assert "weights.zip  100 %  300.1 kB of 300.1 kB" in log


# --- connections that fail --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, HALF, len(DATA) - 1])
def test_a_cut_connection_goes_on_from_the_byte_reached_with_a_fresh_address(disk: YandexDisk, at: int) -> None:
    disk.faults["content"] = [Fault(cut=at)]
    quickly()
    assert OUT.read_bytes() == DATA
    assert disk.sent() == len(DATA)
    assert disk.kinds().count("address") == 2
    assert disk.requests[-1].headers.get("Range") == (f"bytes={at}-" if at else None)


def test_a_connection_cut_again_and_again_is_gone_on_with_as_long_as_it_brings_something(
    disk: YandexDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yandex_disk, "GAIN", 1000)
    disk.faults["content"] = [Fault(cut=10_000)] * 20
    quickly()
    assert OUT.read_bytes() == DATA
    assert disk.sent() == len(DATA)


def test_a_connection_that_brings_nothing_is_given_up_after_six_tries(disk: YandexDisk) -> None:
    disk.faults["content"] = [Fault(cut=HALF)]
    disk.always["content"] = Fault(cut=0)
    message = failure(quickly)
    assert "gave up after 6 tries; 150.1 kB of it are kept in weights.zip.part" in message
    assert f"fetch weights.zip by hand from {LINK} and run: make repository WEIGHTS_ZIP=/path" in message
    assert disk.kinds().count("content") == 6
    disk.always.clear()
    quickly()
    assert disk.sent() == len(DATA)


def test_the_pauses_grow(disk: YandexDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FETCH_BACKOFF")
    disk.always["about"] = Fault(status=500)
    pauses: list[float] = []
    failure(lambda: fetch_archive("weights.zip", OUT, pause=pauses.append))
    assert pauses == [1, 2, 4, 8, 16]


def test_a_server_that_falls_silent_is_left_and_gone_on_with(disk: YandexDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FETCH_TIMEOUT", "0.3")
    disk.faults["content"] = [Fault(stall=HALF)]
    quickly()
    assert OUT.read_bytes() == DATA
    assert disk.requests[-1].headers["Range"] == f"bytes={HALF}-"


def test_an_api_that_never_answers_ends_in_a_message(disk: YandexDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FETCH_TIMEOUT", "0.1")
    disk.always["about"] = Fault(stall=0)
    assert "the server was silent for too long (FETCH_TIMEOUT=0.1 s); gave up after 6 tries" in failure(quickly)


def test_nobody_at_the_address_ends_in_a_message(disk: YandexDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YANDEX_DISK_API", "http://127.0.0.1:1/v1")
    message = failure(quickly)
    assert message.startswith("weights.zip: connection failed: Connection refused; gave up after 6 tries\nOr fetch")


@pytest.mark.parametrize("address", ["no-url", "ftp://x/y", "http://"])
def test_an_address_that_is_none_is_not_tried_twice(
    disk: YandexDisk, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("YANDEX_DISK_API", address)
    assert "see training/archives.json and YANDEX_DISK_API" in failure(
        lambda: fetch_archive("weights.zip", OUT, pause=refuse)
    )


def refuse(seconds: float) -> None:
    raise AssertionError("there was a pause")


def test_a_short_body_that_claims_to_be_all_is_not_taken_for_it(disk: YandexDisk) -> None:
    disk.faults["content"] = [Fault(short=HALF), Fault(short=HALF, length=False)]
    quickly()
    assert OUT.read_bytes() == DATA
    assert disk.requests[-1].headers["Range"] == f"bytes={HALF}-"


def test_more_bytes_than_announced_are_not_written(disk: YandexDisk) -> None:
    disk.always["content"] = Fault(lie=DATA + DATA, length=False)
    assert "more came than the 300.1 kB announced; gave up" in failure(quickly)
    assert nothing_but_training()


def nothing_but_training() -> bool:
    return [path.name for path in Path().iterdir()] == ["training"]


def test_a_server_without_ranges_starts_over_and_nothing_is_appended(disk: YandexDisk) -> None:
    disk.faults["content"] = [Fault(cut=HALF), Fault(ranges=False)]
    quickly()
    assert OUT.read_bytes() == DATA
    assert disk.sent() == HALF + len(DATA)


def test_a_server_that_answers_another_range_is_not_believed(disk: YandexDisk) -> None:
    disk.faults["content"] = [Fault(cut=HALF), Fault(headers={"Content-Range": "x"})]
    disk.faults["content"][1] = Fault(status=206, body=b"abc", headers={"Content-Range": f"bytes 0-2/{len(DATA)}"})
    quickly()
    assert OUT.read_bytes() == DATA


def test_a_range_that_the_server_does_not_have_starts_over(disk: YandexDisk) -> None:
    disk.faults["content"] = [Fault(cut=HALF), Fault(status=416)]
    quickly()
    assert OUT.read_bytes() == DATA


# --- servers that refuse ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [403, 404, 410])
def test_an_expired_address_is_replaced_and_the_download_goes_on(disk: YandexDisk, status: int) -> None:
    disk.faults["content"] = [Fault(cut=HALF), Fault(status=status)]
    quickly()
    assert OUT.read_bytes() == DATA
    assert disk.kinds().count("address") == 3
    assert disk.sent() == len(DATA)


def test_an_address_that_always_expires_ends_in_a_message(disk: YandexDisk) -> None:
    disk.always["content"] = Fault(status=410)
    assert "the download address has expired (410); gave up after 6 tries" in failure(quickly)


@pytest.mark.parametrize("kind", ["about", "address", "content"])
@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_busy_server_is_asked_again(disk: YandexDisk, kind: str, status: int) -> None:
    disk.faults[kind] = [Fault(status=status, body=BUSY), Fault(status=status, body=PAGE)]
    quickly()
    assert OUT.read_bytes() == DATA


@pytest.mark.parametrize("kind", ["about", "address", "content"])
def test_retry_after_is_honoured(disk: YandexDisk, kind: str) -> None:
    disk.faults[kind] = [Fault(status=429, body=LIMIT, headers={"Retry-After": "7"})]
    pauses: list[float] = []
    fetch_archive("weights.zip", OUT, pause=pauses.append)
    assert pauses == [7]


def test_retry_after_may_be_a_date() -> None:
    assert yandex_disk.parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert (yandex_disk.parse_retry_after("Wed, 21 Oct 2099 07:28:00 GMT") or 0) > 3e7
    assert yandex_disk.parse_retry_after("soon") is None
    assert yandex_disk.parse_retry_after("") is None


def test_a_pause_of_hours_is_not_waited_for(disk: YandexDisk) -> None:
    disk.faults["address"] = [Fault(status=429, body=LIMIT, headers={"Retry-After": "7200"})]
    message = failure(lambda: fetch_archive("weights.zip", OUT, pause=refuse))
    assert "DiskResourceDownloadLimitExceededError" in message
    assert "try again in 120 min" in message
    assert "WEIGHTS_ZIP=/path" in message


def test_a_file_downloaded_too_often_ends_in_a_message_and_the_way_out(disk: YandexDisk) -> None:
    for status in 429, 404:
        disk.always["address"] = Fault(status=status, body=LIMIT)
        message = failure(lambda: fetch_archive("weights.zip", OUT, pause=refuse))
        assert f"too many people download this file today ({status} DiskResourceDownloadLimitExceededError" in message
        assert "WEIGHTS_ZIP=/path" in message


@pytest.mark.parametrize("address", ["{}", "http://127.0.0.1:1", "http://[", "ftp://127.0.0.1"])
def test_a_password_in_the_apis_address_is_never_printed(
    disk: YandexDisk, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.always["about"] = Fault(status=403, body={"error": "Forbidden"})
    monkeypatch.setenv("YANDEX_DISK_API", address.format(disk.url).replace("//", "//me:secret@"))
    message = failure(quickly)
    assert "secret" not in message + capsys.readouterr().err


@pytest.mark.parametrize("kind", ["about", "address"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            Fault(status=403, body={"error": "Forbidden", "message": "no"}),
            "owner forbids downloads (403 Forbidden no)",
        ),
        (Fault(status=404, body={"error": "DiskNotFoundError"}), f"there is no /weights.zip in {LINK} (404 DiskNotF"),
        (Fault(status=401, body={"error": "UnauthorizedError"}), "refuses (401 UnauthorizedError)"),
        (Fault(status=200, body={"error": "Strange"}), "refuses (200 Strange)"),
        (Fault(status=200, body=PAGE), "answered 200 with text/html; charset=utf-8, not JSON; a portal or a captcha?"),
        (Fault(status=200, body=b"[1]"), "not JSON"),
    ],
)
def test_a_refusal_is_said_at_once(disk: YandexDisk, kind: str, fault: Fault, words: str) -> None:
    disk.faults[kind] = [fault]
    message = failure(lambda: fetch_archive("weights.zip", OUT, pause=refuse))
    assert words in message
    assert "WEIGHTS_ZIP=/path" in message
    assert nothing_but_training()


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("address", {"method": "GET"}, "gave no address to download /weights.zip from"),
        ("address", {"href": 7}, "gave no address"),
        ("address", {"href": "file:///etc/passwd"}, "gave no address"),
        ("about", {"type": "file"}, "names no size of /weights.zip"),
        ("about", {"size": "many"}, "names no size of /weights.zip"),
        ("about", {"type": "dir", "size": 3}, "is a folder, not a file"),
    ],
)
def test_an_answer_without_what_it_is_for_is_said(
    disk: YandexDisk, kind: str, body: dict[str, object], words: str
) -> None:
    disk.faults[kind] = [Fault(status=200, body=body)]
    assert words in failure(quickly)


def test_a_web_page_instead_of_the_archive_does_not_cost_what_has_come(disk: YandexDisk) -> None:
    disk.faults["content"] = [Fault(cut=HALF)]
    disk.always["content"] = Fault(status=200, body=PAGE)
    assert "a web page came instead of the archive; a portal or a captcha?; gave up" in failure(quickly)
    assert Path("weights.zip.part").read_bytes() == DATA[:HALF]


def test_https_is_not_left(disk: YandexDisk) -> None:
    origin = yandex_disk.Source("weights.zip", "https://api", "l", "p", "h")
    assert yandex_disk.check_https(origin, "https://storage/x") == "https://storage/x"
    with pytest.raises(yandex_disk.RefusedError, match="leads from HTTPS to http://storage"):
        yandex_disk.check_https(origin, "http://storage/x")


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl here to make a certificate with")
def test_certificates_are_verified_and_the_users_own_can_be_named(
    disk: YandexDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = "req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -out c -keyout k"
    subprocess.run(["openssl", *made.split()], check=True, capture_output=True)
    Path("both").write_bytes(Path("c").read_bytes() + Path("k").read_bytes())
    with YandexDisk({"/weights.zip": DATA}, certificate=Path("both")) as secret:
        monkeypatch.setenv("YANDEX_DISK_API", secret.url + PREFIX)
        message = failure(lambda: fetch_archive("weights.zip", OUT, pause=refuse))
        assert "certificate verify failed" in message
        assert "REQUESTS_CA_BUNDLE=" in message
        assert not OUT.exists()
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", "c")
        quickly()
        assert OUT.read_bytes() == DATA


def test_the_proxy_of_the_environment_is_used(disk: YandexDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", disk.url)
    monkeypatch.setenv("YANDEX_DISK_API", f"http://yandex.invalid{PREFIX}")
    quickly()
    assert OUT.read_bytes() == DATA


# --- files that change or are wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("size", [300_000, 310_000])
def test_a_file_that_changes_between_two_ranges_starts_over(disk: YandexDisk, tags: bool, size: int) -> None:
    new = zipped(3, size)
    disk.tags = tags
    disk.faults["content"] = [Fault(cut=HALF, then=lambda: disk.files.update({"/weights.zip": new}))]
    quickly()
    assert OUT.read_bytes() == new
    assert yandex_disk.read_json(LOCK)["size"] == len(new)


def test_a_file_that_changes_while_the_api_still_tells_of_the_old_one_is_not_mixed(disk: YandexDisk) -> None:
    disk.about["/weights.zip"] = disk.describe("/weights.zip")
    disk.about["/weights.zip"]["md5"] = None
    disk.faults["content"] = [Fault(cut=HALF, then=lambda: disk.files.update({"/weights.zip": zipped(3)}))]
    message = failure(quickly)
    assert "the download is not what Yandex.Disk announced: sha256" in message
    assert not OUT.exists()


def test_the_locked_archive_is_not_replaced_by_another(disk: YandexDisk) -> None:
    quickly()
    OUT.unlink()
    old = yandex_disk.read_json(LOCK)
    disk.files["/weights.zip"] = zipped(3, 310_000)
    message = failure(quickly)
    new = disk.describe("/weights.zip")
    assert f"size {old['size']} -> {new['size']}, sha256 {old['sha256']} -> {new['sha256']}" in message
    assert "make update ACCEPT=1" in message
    assert yandex_disk.read_json(LOCK) == old
    assert nothing_but_training()


@pytest.mark.parametrize("known", ["sha256", "md5"])
def test_wrong_bytes_are_set_aside_and_the_next_run_starts_clean(disk: YandexDisk, known: str) -> None:
    other = {"sha256": "md5", "md5": "sha256"}[known]
    disk.about["/weights.zip"] = {other: None}
    disk.faults["content"] = [Fault(lie=zipped(2))]
    message = failure(quickly)
    assert f"the download is not what Yandex.Disk announced: {known}" in message
    assert "it is kept as weights.zip.bad" in message
    assert Path("weights.zip.bad").read_bytes() == zipped(2)
    assert not OUT.exists()
    assert not LOCK.exists()
    quickly()
    assert OUT.read_bytes() == DATA


def test_a_partial_file_of_another_archive_is_not_gone_on_with(disk: YandexDisk) -> None:
    disk.faults["content"] = [Fault(cut=HALF)]
    disk.always["content"] = Fault(status=503)
    failure(quickly)
    disk.always.clear()
    disk.files["/weights.zip"] = zipped(3)
    quickly()
    assert OUT.read_bytes() == zipped(3)


@pytest.mark.parametrize("note", ["", "{", "[]", '{"of": 3}'])
def test_a_partial_file_with_a_broken_note_is_not_gone_on_with(disk: YandexDisk, note: str) -> None:
    Path("weights.zip.part").write_bytes(b"x" * HALF)
    Path("weights.zip.part.json").write_text(note)
    quickly()
    assert OUT.read_bytes() == DATA


def test_a_complete_partial_file_is_checked_and_not_fetched_again(disk: YandexDisk) -> None:
    disk.faults["content"] = [Fault(cut=len(DATA) - 1)]
    disk.always["content"] = Fault(status=503)
    failure(quickly)
    Path("weights.zip.part").write_bytes(DATA)
    disk.requests.clear()
    quickly()
    assert OUT.read_bytes() == DATA
    assert disk.kinds() == ["about"]


def test_a_partial_file_altered_in_the_meantime_is_noticed(disk: YandexDisk) -> None:
    disk.faults["content"] = [Fault(cut=HALF)]
    disk.always["content"] = Fault(status=503)
    failure(quickly)
    disk.always.clear()
    Path("weights.zip.part").write_bytes(b"x" * HALF)
    assert "not what Yandex.Disk announced: sha256" in failure(quickly)
    quickly()
    assert OUT.read_bytes() == DATA


# --- kills, neighbours, full disks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 1000, HALF, len(DATA) - 1])
def test_after_kill_9_the_next_run_fetches_only_what_is_missing(disk: YandexDisk, at: int) -> None:
    disk.faults["content"] = [Fault(stall=at)]
    run = program("weights.zip", "weights.zip")
    part = Path("weights.zip.part")
    until(lambda: "content" in disk.kinds() and part.exists() and part.stat().st_size == at)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    again = program("weights.zip", "weights.zip")
    again.communicate()
    assert again.returncode == 0
    assert OUT.read_bytes() == DATA
    assert disk.requests[-1].headers.get("Range") == (f"bytes={at}-" if at else None)
    assert disk.sent() == len(DATA)
    assert nothing_else()


def test_ctrl_c_says_that_the_next_run_goes_on(disk: YandexDisk) -> None:
    disk.faults["content"] = [Fault(stall=HALF)]
    run = program("weights.zip", "weights.zip")
    part = Path("weights.zip.part")
    until(lambda: part.exists() and part.stat().st_size == HALF)
    run.send_signal(signal.SIGINT)
    log = run.communicate()[0]
    assert run.returncode == 130
    assert "weights.zip: stopped; the next run goes on from 150.1 kB" in log
    assert "Traceback" not in log


def test_the_second_of_two_waits_and_finds_its_work_done(disk: YandexDisk) -> None:
    disk.faults["content"] = [Fault(stall=HALF)]
    first = program("weights.zip", "weights.zip")
    until(lambda: "content" in disk.kinds())
    second = program("weights.zip", "weights.zip")
    assert second.stdout
    assert second.stdout.readline() == "weights.zip: waiting for another process that fetches it\n"
    disk.released.set()
    assert "nothing to download" in second.communicate()[0]
    first.communicate()
    assert (first.returncode, second.returncode) == (0, 0)
    assert disk.kinds().count("content") == 1
    assert nothing_else()


def test_a_full_disk_is_said_before_the_first_byte_with_both_numbers(
    disk: YandexDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = failure(quickly)
    assert message.startswith("weights.zip needs 300.1 kB more in ")
    assert "1.0 kB are free" in message
    assert "content" not in disk.kinds()


def test_a_disk_that_fills_up_meanwhile_keeps_what_has_come(disk: YandexDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Partial.write

    def full(part: Partial, block: bytes) -> None:
        if part.size:
            raise OSError(28, "No space left on device")
        honest(part, block[:1000])

    with monkeypatch.context() as patch:
        patch.setattr(Partial, "write", full)
        disk.faults["content"] = [Fault(stall=1000)]
        patch.setenv("FETCH_TIMEOUT", "0.2")
        assert "No space left on device; free some, the next run goes on from there" in failure(quickly)
    quickly()
    assert OUT.read_bytes() == DATA
    assert disk.requests[-1].headers["Range"] == "bytes=1000-"


# --- locks and archives fetched by hand -------------------------------------------------------------------------------


def test_under_ci_a_missing_lock_is_an_error(disk: YandexDisk) -> None:
    run = program("weights.zip", "weights.zip", CI="true")
    log = run.communicate()[0]
    assert run.returncode == 1
    assert log.startswith("training/weights.zip.lock.json is missing, and CI records none")
    assert disk.requests == []
    quickly()
    OUT.unlink()
    run = program("weights.zip", "weights.zip", CI="true")
    run.communicate()
    assert run.returncode == 0


@pytest.mark.parametrize("text", ["{", "[]", '{"size": "3"}', '{"size": 3, "sha256": 4}'])
def test_a_broken_lock_is_named(disk: YandexDisk, text: str) -> None:
    LOCK.write_text(text)
    assert failure(quickly).startswith("training/weights.zip.lock.json: ")


def test_an_unknown_archive_is_named(disk: YandexDisk) -> None:
    message = failure(lambda: fetch_archive("waits.zip", OUT))
    assert message.startswith("training/archives.json: no archive waits.zip; it names weights.zip, model_rep")


def test_an_archive_fetched_by_hand_is_linked_not_copied(disk: YandexDisk, tmp_path: Path) -> None:
    given = tmp_path / "training/mine.zip"
    given.write_bytes(DATA)
    fetch_archive("weights.zip", OUT, given)
    assert OUT.resolve() == given
    assert yandex_disk.read_json(LOCK)["sha256"] == disk.describe("/weights.zip")["sha256"]
    assert disk.kinds() == ["about"]
    fetch_archive("weights.zip", OUT, given)
    assert disk.kinds() == ["about"]
    fetch_archive("weights.zip", given, given)  # in its place already
    assert given.read_bytes() == DATA
    assert not given.is_symlink()


def test_an_archive_fetched_by_hand_needs_no_network(disk: YandexDisk, capsys: pytest.CaptureFixture[str]) -> None:
    disk.always["about"] = Fault(status=403, body=LIMIT)
    Path("training/mine.zip").write_bytes(DATA)
    fetch_archive("weights.zip", OUT, Path("training/mine.zip"))
    assert OUT.read_bytes() == DATA
    assert "not compared with Yandex.Disk: too many people download" in capsys.readouterr().err
    assert yandex_disk.read_json(LOCK)["sha256"] == disk.describe("/weights.zip")["sha256"]


def test_another_archive_fetched_by_hand_is_refused(disk: YandexDisk) -> None:
    given = Path("training/mine.zip")
    given.write_bytes(zipped(2))
    assert "training/mine.zip: not what Yandex.Disk has now: sha256" in failure(
        lambda: fetch_archive("weights.zip", OUT, given)
    )
    assert not LOCK.exists()
    quickly()
    message = failure(lambda: fetch_archive("weights.zip", OUT, given))
    assert "weights.zip is not the one in training/weights.zip.lock.json: sha256" in message
    assert "make update" in message
    assert OUT.read_bytes() == DATA
    assert not OUT.is_symlink()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "there is no such file"),
        (DATA[:HALF], "only the beginning"),
        (b"", "no zip archive"),
        (b"PK\7\x08" + DATA[:HALF], "one part of an archive in several parts"),
    ],
)
def test_what_is_no_archive_is_refused(disk: YandexDisk, data: bytes | None, words: str) -> None:
    given = Path("training/mine.zip")
    if data is not None:
        given.write_bytes(data)
    assert words in failure(lambda: fetch_archive("weights.zip", OUT, given))
    assert not OUT.exists()
    assert not LOCK.exists()


def test_a_file_in_the_way_of_the_link_is_kept_and_a_link_is_replaced(disk: YandexDisk) -> None:
    given = Path("training/mine.zip")
    given.write_bytes(DATA)
    OUT.write_bytes(b"mine")
    fetch_archive("weights.zip", OUT, given)
    assert Path("weights.zip.old").read_bytes() == b"mine"
    moved = given.rename("training/moved.zip")
    fetch_archive("weights.zip", OUT, moved)
    assert OUT.resolve() == moved.resolve()
    moved.unlink()
    quickly()  # over a link to nothing
    assert OUT.read_bytes() == DATA
    assert not OUT.is_symlink()


def unreadable(seed: int = 5) -> bytes:
    """A zip archive packed by a method that is not read (bzip2)."""
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("CT-RATE/model_binary.pth", random.Random(seed).randbytes(1000))
    return file.getvalue()


@pytest.mark.parametrize("data", [unreadable(), b"", b"PK\5\6" + bytes(18), DATA[:HALF]])
def test_an_archive_that_cannot_be_read_is_not_locked_and_one_packed_anew_is_taken(
    disk: YandexDisk, data: bytes
) -> None:
    disk.files["/weights.zip"] = data
    message = failure(quickly)
    assert f"{LOCK} is not recorded" in message and "WEIGHTS_ZIP=/path" in message
    assert not LOCK.exists()
    Path("training/anew.zip").write_bytes(DATA)
    fetch_archive("weights.zip", OUT, Path("training/anew.zip"))
    assert OUT.read_bytes() == DATA
    assert yandex_disk.read_json(LOCK)["size"] == len(DATA)
    quickly()  # and it stays
    assert OUT.read_bytes() == DATA


def test_one_packed_anew_takes_the_place_of_an_unreadable_one_that_is_locked(disk: YandexDisk) -> None:
    disk.files["/weights.zip"] = unreadable()
    failure(quickly)
    archive_lock.write_lock(
        yandex_disk.read_source("weights.zip"), yandex_disk.ask_for_archive(yandex_disk.read_source("weights.zip"))
    )
    Path("training/anew.zip").write_bytes(DATA)
    fetch_archive("weights.zip", OUT, Path("training/anew.zip"))
    assert OUT.read_bytes() == DATA


@pytest.mark.parametrize("ranged", [True, False])
def test_the_rest_of_a_file_called_all_of_it_starts_anew_once(disk: YandexDisk, ranged: bool) -> None:
    rest = DATA[HALF:]
    headers = {"Content-Range": f"bytes {HALF}-{len(DATA) - 1}/{len(DATA)}"} if ranged else {}
    disk.faults["content"] = [Fault(cut=HALF), Fault(status=200, body=rest, headers=headers)]
    quickly()
    assert OUT.read_bytes() == DATA
