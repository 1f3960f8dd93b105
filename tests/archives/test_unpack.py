import errno
import hashlib
import io
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.archives import unpack as unpacking
from scripts.archives import zip_archive
from scripts.archives.unpack import main, unpack_all, unpack_member, unpack_tree

ROOT = Path(__file__).parents[2]
ZIP, WEIGHTS, BINARY = Path("weights.zip"), Path("training/weights"), "CT-RATE/model_binary.pth"
FILES = {
    BINARY: b"binary" * 1000,
    "CT-RATE/model_multilabel.pth": b"multilabel" * 1000,
    "bpr/config.json": b"{}",
    "faiss_database/all/empty": b"",
}


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pack(files: dict[str, bytes], top: str = "", how: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(ZIP, "w", how) as archive:
        for name, data in files.items():
            archive.writestr(top + name, data)


def everything(folder: Path = WEIGHTS) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failure(action: Callable[[], object]) -> str:
    with pytest.raises(SystemExit) as stop:
        action()
    assert isinstance(stop.value.code, str)
    return stop.value.code


def run_all(tree: str = "") -> None:
    unpack_tree(ZIP, WEIGHTS, tree)


# --- one member -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["", "weights/", "weights (1)/", "[w]/", "training/weights/"])
@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_is_found_also_in_one_more_top_folder(top: str, how: int) -> None:
    pack(FILES | {"__MACOSX/CT-RATE/._model_binary.pth": b"junk"}, top, how)
    unpack_member(ZIP, BINARY, Path("out/binary.pth"))
    assert everything(Path("out")) == {"binary.pth": FILES[BINARY]}


def test_a_member_of_no_bytes_is_written() -> None:
    pack(FILES)
    unpack_member(ZIP, "faiss_database/all/empty", Path("empty"))
    assert Path("empty").read_bytes() == b""


def test_an_absent_member_is_named_with_what_there_is() -> None:
    pack({name: data for name, data in FILES.items() if name != BINARY})
    assert failure(lambda: unpack_member(ZIP, BINARY, Path("out"))) == (
        "weights.zip has no CT-RATE/model_binary.pth; "
        "it holds CT-RATE/model_multilabel.pth, bpr/config.json, faiss_database/all/empty"
    )
    pack({f"{number:02}": b"" for number in range(20)})
    assert failure(lambda: unpack_member(ZIP, "x", Path("out"))).endswith("10, 11 and 8 more")
    pack({BINARY: b"1"}, "a/b/c/")
    assert "has no CT-RATE/model_binary.pth" in failure(lambda: unpack_member(ZIP, BINARY, Path("out")))


def test_a_member_in_two_folders_is_not_guessed() -> None:
    pack({f"old/{BINARY}": b"1", f"new/{BINARY}": b"2"})
    assert "in more than one folder: new, old" in failure(lambda: unpack_member(ZIP, BINARY, Path("out")))


def test_a_file_with_the_members_content_is_left_untouched() -> None:
    pack(FILES)
    unpack_member(ZIP, BINARY, Path("out"))
    os.utime("out", (1, 1))
    unpack_member(ZIP, BINARY, Path("out"))
    assert Path("out").stat().st_mtime == 1
    Path("out").write_bytes(b"b" * len(FILES[BINARY]))
    unpack_member(ZIP, BINARY, Path("out"))
    assert Path("out").read_bytes() == FILES[BINARY]


def test_same_size_and_crc_are_not_yet_the_same_content() -> None:
    first = b"first" * 4
    target = zlib.crc32(first)  # four bytes at the end give any text this CRC
    other = forge(b"other" * 3 + b"!", target)
    assert len(other) == len(first)
    assert zlib.crc32(other) == target
    pack({BINARY: first})
    Path("out").write_bytes(other)
    unpack_member(ZIP, BINARY, Path("out"))
    assert Path("out").read_bytes() == first


def forge(data: bytes, crc: int) -> bytes:
    """Return `data` and four more bytes that give it this CRC-32, by running the register backwards from it."""
    table = [zlib.crc32(bytes([value])) ^ zlib.crc32(b"\0") for value in range(256)]
    register, state = crc ^ 0xFFFFFFFF, zlib.crc32(data) ^ 0xFFFFFFFF
    picks: list[int] = []
    for _ in range(4):
        pick = next(value for value in range(256) if table[value] >> 24 == register >> 24)
        picks.insert(0, pick)
        register = (register ^ table[pick]) << 8 & 0xFFFFFFFF
    tail = b""
    for pick in picks:
        byte = (state ^ pick) & 0xFF
        tail += bytes([byte])
        state = (state >> 8) ^ table[pick]
    return data + tail


# --- the whole tree ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["", "weights/"])
def test_the_whole_tree_is_unpacked_without_junk(top: str, capsys: pytest.CaptureFixture[str]) -> None:
    junk = {"__MACOSX/x": b"1", "CT-RATE/.DS_Store": b"2"}
    pack(FILES | junk, top)
    run_all("CT-RATE/*")
    digests = everything().pop(".unpacked").decode()
    assert everything() == FILES | {".unpacked": digests.encode()}
    assert f"{hashlib.sha256(FILES[BINARY]).hexdigest()}  {BINARY}\n" in digests
    size = ZIP.stat().st_size
    assert f"training/weights: all of weights.zip; rm weights.zip would free {size} bytes" in capsys.readouterr().out
    assert subprocess.run(["sha256sum", "--check", ".unpacked"], cwd=WEIGHTS, stdout=subprocess.DEVNULL).returncode == 0


def test_a_tree_that_is_another_is_refused() -> None:
    pack({"holiday/photo.jpg": b"1"})
    assert failure(lambda: run_all("CT-RATE/*")) == "weights.zip has no CT-RATE/*; it holds holiday/photo.jpg"
    pack({"vit_onnx/config.pbtxt": b"1", "vit_onnx/1/model.onnx": b"2"}, "model_repository_running/")
    run_all("*/config.pbtxt")
    assert (WEIGHTS / "vit_onnx/1/model.onnx").read_bytes() == b"2"


def test_of_a_new_archive_only_what_changed_is_written() -> None:
    pack(FILES)
    run_all()
    for path in WEIGHTS.rglob("*"):
        os.utime(path, (1, 1))
    pack(FILES | {BINARY: b"new"}, how=zipfile.ZIP_STORED)
    run_all()
    written = [name for name in FILES if (WEIGHTS / name).stat().st_mtime != 1]
    assert written == [BINARY]
    assert (WEIGHTS / BINARY).read_bytes() == b"new"


def test_the_users_own_files_are_kept_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    (WEIGHTS / "CT-RATE").mkdir(parents=True)
    (WEIGHTS / BINARY).write_bytes(b"mine")
    (WEIGHTS / "bpr").write_bytes(b"a file where the archive has a folder")
    (WEIGHTS / "CT-RATE/model_multilabel.pth").symlink_to("/nowhere")
    pack(FILES)
    run_all()
    assert (WEIGHTS / BINARY).read_bytes() == b"mine"
    assert (WEIGHTS / "CT-RATE/model_multilabel.pth").is_symlink()
    kept = [line for line in capsys.readouterr().out.splitlines() if line.startswith("local: ")]
    assert kept == [
        "local: training/weights/CT-RATE/model_binary.pth is not what weights.zip holds; it is kept",
        "local: training/weights/CT-RATE/model_multilabel.pth is not what weights.zip holds; it is kept",
        "local: training/weights/bpr/config.json is not what weights.zip holds; it is kept",
    ]


def test_a_file_of_the_archive_that_the_user_changed_is_kept() -> None:
    pack(FILES)
    run_all()
    (WEIGHTS / BINARY).write_bytes(b"trained anew")
    pack(FILES | {BINARY: b"new", "bpr/config.json": b"[]"})
    run_all()
    assert (WEIGHTS / BINARY).read_bytes() == b"trained anew"
    assert (WEIGHTS / "bpr/config.json").read_bytes() == b"[]"


def test_a_file_that_a_step_of_make_wrote_is_replaced() -> None:
    (WEIGHTS / "CT-RATE").mkdir(parents=True)
    (WEIGHTS / BINARY).write_bytes(b"old")
    Path(".make/made").mkdir(parents=True)
    record = f"training/weights/{BINARY}={hashlib.sha256(b'old').hexdigest()} command : weights.zip=1"
    Path(f".make/made/training%weights%{BINARY.replace('/', '%')}").write_text(record)
    pack(FILES)
    run_all()
    assert (WEIGHTS / BINARY).read_bytes() == FILES[BINARY]


def test_a_file_found_with_the_archives_content_counts_as_the_archives() -> None:
    pack(FILES)
    (WEIGHTS / "CT-RATE").mkdir(parents=True)
    (WEIGHTS / BINARY).write_bytes(FILES[BINARY])
    run_all()
    pack(FILES | {BINARY: b"new"})
    run_all()
    assert (WEIGHTS / BINARY).read_bytes() == b"new"


def test_a_link_of_the_users_is_kept_also_to_a_file_of_the_archive() -> None:
    pack(FILES)
    run_all()
    (WEIGHTS / BINARY).rename("elsewhere.pth")
    (WEIGHTS / BINARY).symlink_to(Path("elsewhere.pth").resolve())
    pack(FILES | {BINARY: b"new"})
    run_all()
    assert (WEIGHTS / BINARY).is_symlink()
    assert Path("elsewhere.pth").read_bytes() == FILES[BINARY]


def test_ownership_is_asked_for_and_reported() -> None:
    pack(FILES)
    (WEIGHTS / "CT-RATE").mkdir(parents=True)
    (WEIGHTS / BINARY).write_bytes(b"old")
    asked: list[tuple[str, str]] = []
    noted: list[tuple[str, str]] = []
    kept = unpack_all(
        ZIP,
        WEIGHTS,
        is_ours=lambda path, digest: not asked.append((path, digest)),  # type: ignore[func-returns-value]
        note_written=lambda path, digest: noted.append((path, digest)),
    )
    assert kept == []
    assert asked == [(str(WEIGHTS / BINARY), hashlib.sha256(b"old").hexdigest())]
    assert sorted(noted) == sorted(
        (str(WEIGHTS / name), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()
    )


def test_the_modes_of_the_archive_are_ignored() -> None:
    info = zipfile.ZipInfo(BINARY)
    info.external_attr = (stat.S_IFREG | stat.S_ISUID | 0o777) << 16
    with zipfile.ZipFile(ZIP, "w") as archive:
        archive.writestr(info, b"1")
    run_all()
    Path("plain").touch()
    assert (WEIGHTS / BINARY).stat().st_mode == Path("plain").stat().st_mode


def test_a_folder_on_another_disk_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Path.replace

    def across(path: Path, target: Path) -> Path:
        if ".unpacking" in path.parts:
            raise OSError(18, "Invalid cross-device link")
        return honest(path, target)

    monkeypatch.setattr(Path, "replace", across)
    pack(FILES)
    run_all()
    assert {name: data for name, data in everything().items() if name != ".unpacked"} == FILES


def test_what_the_archive_frees_is_told_of_the_file_behind_the_link(capsys: pytest.CaptureFixture[str]) -> None:
    pack(FILES)
    real = ZIP.rename("real.zip").resolve()
    ZIP.symlink_to(real)
    run_all()
    assert f"rm {real} would free {real.stat().st_size} bytes" in capsys.readouterr().out


# --- archives that are damaged or hostile -----------------------------------------------------------------------------


def special(name: str, kind: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o644) << 16
    return info


def with_flags(data: bytes, flags: int) -> bytes:
    """Set the general purpose flags of the last member, in both of its headers."""
    local, central = data.rindex(b"PK\3\4"), data.rindex(b"PK\1\2")
    data = data[: local + 6] + struct.pack("<H", flags) + data[local + 8 :]
    return data[: central + 8] + struct.pack("<H", flags) + data[central + 10 :]


def with_size(data: bytes, size: int) -> bytes:
    """Declare another size of the last member, in both of its headers."""
    local, central = data.rindex(b"PK\3\4"), data.rindex(b"PK\1\2")
    data = data[: local + 22] + struct.pack("<I", size) + data[local + 26 :]
    return data[: central + 24] + struct.pack("<I", size) + data[central + 28 :]


def hostile(kind: str) -> bytes:
    """Write an archive whose last member is hostile in this way."""
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(BINARY, b"new")
        members: dict[str, str | zipfile.ZipInfo] = {
            "absolute": "/tmp/evil",
            "drive": "C:/evil",
            "up": "bpr/../../evil",
            "backslash": "bpr\\..\\..\\evil",
            "turned": "bpr/\u202egpj.pt",
            "long": "bpr/" + "ж" * 128,
            "unprintable": "bpr/\x1b[2J",
            "symlink": special("bpr/link", stat.S_IFLNK),
            "device": special("bpr/device", stat.S_IFCHR),
            "pipe": special("bpr/pipe", stat.S_IFIFO),
            "twice": f"./{BINARY}",
            "file and folder": f"{BINARY}/more",
            "drafts": ".unpacking/0",
            "list": ".unpacked",
        }
        member = members.get(kind, "bpr/evil")
        if kind == "bzip2":
            archive.writestr(member, b"evil" * 100, zipfile.ZIP_BZIP2)
        else:
            archive.writestr(member, b"evil" * 100)
    data = file.getvalue()
    if kind == "encrypted":
        return with_flags(data, 1)
    if kind == "larger":
        return with_size(data, 4)
    if kind == "smaller":
        return with_size(data, 4000)
    if kind == "bomb":
        return with_size(data, 2**32 - 2)
    if kind == "stored larger":
        with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
            archive.writestr("bpr/evil", b"evil" * 100)
        return with_size(file.getvalue(), 4)
    if kind == "crc":
        at = data.rindex(b"PK\1\2")
        return data[: at + 16] + b"\0\0\0\0" + data[at + 20 :]
    if kind == "nul":
        return data.replace(b"bpr/evil", b"bpr/\0vil")
    if kind == "overlap":
        at = data.rindex(b"PK\1\2")  # both members begin where the first does
        return data[: at + 42] + struct.pack("<I", 0) + data[at + 46 :]
    if kind == "truncated":
        return data[: len(data) // 2]
    if kind == "no archive":
        return b"<html>"
    return data


KINDS = {
    "absolute": "'/tmp/evil' has an absolute path",
    "drive": "'C:/evil' has an absolute path",
    "up": "'bpr/../../evil' has a path with ..",
    "backslash": "'bpr/../../evil' has a path with ..",
    "turned": "has an unprintable name",
    "long": "has a name of more than 255 bytes",
    "unprintable": "'bpr/\\x1b[2J' has an unprintable name",
    "nul": "has an unprintable name",
    "symlink": "'bpr/link' has a link or a special file",
    "device": "'bpr/device' has a link or a special file",
    "pipe": "'bpr/pipe' has a link or a special file",
    "twice": "has the same name as another member",
    "file and folder": "'CT-RATE/model_binary.pth' is a file and a folder",
    "drafts": "a name that unpacking itself uses",
    "list": "a name that unpacking itself uses",
    "encrypted": "'bpr/evil' has a password",
    "larger": "'bpr/evil' holds more than the 4 bytes it declares",
    "stored larger": "'bpr/evil' has a size that its packed size cannot have",
    "smaller": "'bpr/evil' holds less than the 4000 bytes it declares",
    "bomb": "'bpr/evil' has a size that its packed size cannot have",
    "overlap": "has bytes that are another member's too",
    "crc": "Bad CRC-32 for file 'bpr/evil'",
    "bzip2": "bpr/evil is packed by method 12 of zip",
    "truncated": "not all of one",
    "no archive": "no zip archive",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_archive_is_refused_with_the_tree_untouched(kind: str) -> None:
    pack(FILES)
    run_all()
    before, times = everything(), {path: path.stat().st_mtime_ns for path in WEIGHTS.rglob("*") if path.is_file()}
    ZIP.write_bytes(hostile(kind))
    message = failure(run_all)
    assert message.startswith("weights.zip: ")
    assert KINDS[kind] in message
    assert everything() == before
    assert times == {path: path.stat().st_mtime_ns for path in WEIGHTS.rglob("*") if path.is_file()}
    assert sorted(path.name for path in Path().iterdir()) == ["training", "weights.zip"]
    if kind not in ("larger", "smaller", "crc"):  # a member that is not asked for is not read
        assert KINDS[kind] in failure(lambda: unpack_member(ZIP, BINARY, Path("out")))
    member = "bpr/evil" if kind in ("larger", "smaller", "crc") else BINARY
    assert KINDS[kind] in failure(lambda: unpack_member(ZIP, member, Path("out")))
    assert sorted(path.name for path in Path().iterdir()) == ["training", "weights.zip"]


@pytest.mark.parametrize(
    ("written", "flags", "meant"),
    [
        (b"bpr\\notes\\read me.txt", 0, "bpr/notes/read me.txt"),  # Windows PowerShell 5
        ("bpr/10.14\u202fAM.png".encode(), 0x800, "bpr/10.14\u202fAM.png"),  # every screenshot of macOS
        ("bpr/a\u00a0b.txt".encode(), 0x800, "bpr/a\u00a0b.txt"),
        ("bpr/\u2764\u200d\u2764.txt".encode(), 0x800, "bpr/\u2764\u200d\u2764.txt"),
        ("bpr/отчёт.txt".encode("cp866"), 0, "bpr/отчёт.txt"),
        ("bpr/отчёт.txt".encode(), 0, "bpr/отчёт.txt"),
    ],
)
def test_names_as_peoples_programs_write_them_are_read(written: bytes, flags: int, meant: str) -> None:
    pack({BINARY: b"1", "N" * len(written): b"2"})
    ZIP.write_bytes(with_flags(ZIP.read_bytes().replace(b"N" * len(written), written), flags))
    run_all("CT-RATE/*")
    assert everything(WEIGHTS / "bpr") == {meant.removeprefix("bpr/"): b"2"}


def test_a_whole_tree_written_with_backslashes_is_read() -> None:
    pack({name.replace("/", "\\"): data for name, data in FILES.items()}, "training\\weights\\")
    run_all("CT-RATE/*")
    assert (WEIGHTS / BINARY).read_bytes() == FILES[BINARY]


def test_what_macos_lays_beside_files_is_left_out() -> None:
    pack(FILES | {"CT-RATE/._model_binary.pth": b"junk"})
    run_all()
    assert sorted(everything(WEIGHTS / "CT-RATE")) == ["model_binary.pth", "model_multilabel.pth"]


def test_a_part_of_a_split_archive_is_called_so() -> None:
    pack(FILES)
    data = ZIP.read_bytes()
    ZIP.write_bytes(b"PK\7\x08" + data[:200])  # the first of several, as `zip -s` writes it
    assert "one part of an archive in several parts; unpack them together with 7-Zip" in failure(run_all)
    for name in "weights.zip.001", "weights.zip.002", "weights.z01":
        Path(name).write_bytes(data[:200])  # as 7-Zip cuts an archive
        with pytest.raises(SystemExit, match="one part of an archive in several"):
            unpack_tree(Path(name), WEIGHTS, "")
    at = data.index(b"PK\1\2")
    ZIP.write_bytes(data[: at + 34] + struct.pack("<H", 1) + data[at + 36 :])  # the last: a member begins in the second
    assert "one part of an archive in several" in failure(run_all)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG])
def test_a_name_that_the_file_system_refuses_leaves_the_tree_as_it_was(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows shares refuse a colon, for instance, and encrypted folders a name of more than 143 bytes."""
    pack(FILES)
    run_all()
    before = everything()
    honest = os.mkdir, Path.open

    def refuses(path: object) -> None:
        if ":" in Path(str(path)).name:
            raise OSError(code, os.strerror(code), str(path))

    def mkdir(path: object, *words: Any, **named: Any) -> None:
        refuses(path)
        honest[0](path, *words, **named)  # type: ignore[arg-type]

    def opens(path: Path, *words: Any, **named: Any) -> Any:
        refuses(path)
        return honest[1](path, *words, **named)

    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.setattr(Path, "open", opens)
    for name in "bpr/10:14.png", "bpr/10:14/note":
        pack(FILES | {BINARY: b"new", name: b"2", "later": b"3"})
        message = failure(run_all)
        assert message.startswith(f"weights.zip: not unpacked, what was there before stays: {name!r} is no name"), (
            message
        )
        assert everything() == before


def test_two_names_that_are_one_to_the_file_system_leave_the_tree_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is on disks of Windows and macOS, where case does not count."""
    honest = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *words, **named: honest(Path(str(path).replace("README", "readme")), *words, **named)
    )
    pack(FILES | {"bpr/readme": b"1", "bpr/README": b"2"})
    assert "'bpr/README' is no name that this file system takes beside the others (File exists)" in failure(run_all)
    assert everything() == {}


def run_zip(*words: str, folder: str = ".") -> None:
    """Run Info-ZIP's zip, which Debian and Ubuntu have."""
    if not shutil.which("zip"):
        pytest.skip("no zip here (apt install zip)")
    subprocess.run(["zip", "-q", *words], cwd=folder, check=True)


def lay_out(folder: str) -> None:
    for name, data in FILES.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_what_zip_packs_two_folders_above_the_tree_is_read() -> None:
    lay_out("desk/training/weights")
    Path("desk/training/weights/bpr/отчёт 10.14\u202fAM.png").write_bytes(b"2")
    run_zip("-r", "../weights.zip", "training/weights", folder="desk")
    run_all("CT-RATE/*")
    unpacked = everything()
    unpacked.pop(".unpacked")
    assert unpacked == FILES | {"bpr/отчёт 10.14\u202fAM.png": b"2"}


def test_each_part_of_what_zip_splits_is_called_so() -> None:
    lay_out("desk")
    Path("desk/CT-RATE/large").write_bytes(random.Random(3).randbytes(200_000))
    run_zip("-s", "64k", "-r", "../weights.zip", ".", folder="desk")
    parts = sorted(Path().glob("weights.z*"))
    assert len(parts) == 4
    for part in parts[0], parts[-1]:
        with pytest.raises(
            SystemExit, match="one part of an archive in several parts; unpack them together with 7-Zip"
        ):
            unpack_tree(part, WEIGHTS, "CT-RATE/*")
    assert not WEIGHTS.exists()


def test_the_harmless_twin_of_the_hostile_archives_is_taken() -> None:
    ZIP.write_bytes(hostile("none"))
    run_all()
    assert (WEIGHTS / "bpr/evil").read_bytes() == b"evil" * 100


def test_more_than_a_sane_total_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pack(FILES)
    monkeypatch.setattr(zip_archive, "MOST_FILES", 3)
    assert "refused, nothing was unpacked: it holds 16.0 kB in 4 files, expected at most" in failure(run_all)
    monkeypatch.setattr(zip_archive, "MOST_FILES", 4)
    monkeypatch.setattr(zip_archive, "MOST_BYTES", 16_001)
    assert "expected at most 16.0 kB in 4 files" in failure(run_all)
    assert not WEIGHTS.exists()


def test_damage_in_the_middle_is_found_by_the_crc() -> None:
    pack({BINARY: random.Random(1).randbytes(3_000_000)}, how=zipfile.ZIP_STORED)
    data = bytearray(ZIP.read_bytes())
    data[2_000_000] ^= 1
    ZIP.write_bytes(data)
    message = failure(lambda: unpack_member(ZIP, BINARY, Path("out")))
    assert message.startswith("weights.zip: damaged, nothing was unpacked: Bad CRC-32")
    assert not Path("out").exists()
    assert not Path("out.part").exists()


def test_a_missing_archive_is_named() -> None:
    assert failure(run_all) == "weights.zip is missing; make fetches it, see make help"


def test_a_full_disk_is_said_with_both_numbers_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    pack(FILES)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = failure(run_all)
    assert "weights.zip needs 16.0 kB in " in message
    assert "1.0 kB are free" in message
    assert not list(WEIGHTS.iterdir())
    assert "weights.zip needs 6.0 kB in " in failure(lambda: unpack_member(ZIP, BINARY, Path("out")))
    assert not list(Path().glob("out*"))


def test_a_disk_that_fills_up_meanwhile_leaves_the_tree_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pack(FILES)
    honest = unpacking.read_blocks

    def full(*words: object) -> object:
        yield from honest(*words)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unpacking, "read_blocks", full)
    assert "not unpacked, what was there before stays: No space left on device" in failure(run_all)
    assert not list(WEIGHTS.iterdir())
    assert "No space left" in failure(lambda: unpack_member(ZIP, BINARY, Path("out")))
    assert not list(Path().glob("out*"))


# --- kills and the program --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(1, 14))
def test_after_kill_9_every_file_is_whole_and_the_next_run_ends_right(at: int) -> None:
    """The program kills itself before its n-th write or rename, or before its n-th line in the list."""
    pack(FILES)
    run_all()
    new = FILES | {BINARY: b"new", "bpr/config.json": b"[]", "bpr/more": b"more"}
    pack(new)
    code = f"""
import os, pathlib, runpy, signal, sys
left = {at}
def last(honest):
    def call(*words, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*words, **named)
    return call
pathlib.Path.replace, pathlib.Path.open, os.mkdir = map(last, (pathlib.Path.replace, pathlib.Path.open, os.mkdir))
sys.argv[1:] = ["--all", "weights.zip", "training/weights"]
runpy.run_module("scripts.archives.unpack", run_name="__main__")
"""
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    for name, data in new.items():
        path = WEIGHTS / name
        assert not path.exists() or path.read_bytes() in (data, FILES.get(name))
    run_all()
    assert {name: data for name, data in everything().items() if name != ".unpacked"} == new
    pack(FILES)
    run_all()  # and it still knows whose files they are
    assert (WEIGHTS / BINARY).read_bytes() == FILES[BINARY]


def test_the_program_takes_both_command_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(FILES, "weights/")
    monkeypatch.setattr(sys, "argv", ["unpack", "weights.zip", BINARY, "out"])
    main()
    assert Path("out").read_bytes() == FILES[BINARY]
    (WEIGHTS / "bpr").mkdir(parents=True)
    (WEIGHTS / "bpr/config.json").write_bytes(b"mine")
    words = ["unpack", "--all", "weights.zip", str(WEIGHTS), "--tree", "CT-RATE/*"]
    monkeypatch.setattr(sys, "argv", words)
    main()
    assert (WEIGHTS / BINARY).read_bytes() == FILES[BINARY]
    assert "local: training/weights/bpr/config.json" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["unpack", "weights.zip", BINARY])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
