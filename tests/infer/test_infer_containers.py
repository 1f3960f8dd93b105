"""Studies as hospitals and public data sets pack them: nested archives, packed files, NIfTI in folders."""

import bz2
import gzip
import io
import lzma
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import inflate64
import nibabel
import numpy as np
import pytest

from scripts.infer import source as module
from scripts.infer.containers import DEFLATE64, ZSTD
from scripts.infer.messages import StudyError
from scripts.infer.models import Models
from scripts.infer.source import find_studies
from scripts.infer.study import Reading, read_study
from tests.dicom_studies import lungs, series, volume_of

HU = lungs(6)


def failure(call: Callable[[], object]) -> str:
    with pytest.raises(StudyError) as error:
        call()
    return error.value.key


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return series(tmp_path / "files", HU)


def zipped(archive: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return archive


def zipped_by(method: int, archive: Path, files: list[Path]) -> Path:
    """A zip with a method that zipfile cannot write: its headers are edited to the method and the true sizes."""
    packed = []
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as out:
        for file in files:
            content = file.read_bytes()
            if method == DEFLATE64:
                deflater = inflate64.Deflater()
                packed.append((content, deflater.deflate(content) + deflater.flush()))
            else:
                packed.append((content, bytes(imagecodecs.zstd_encode(content))))
            out.writestr(file.name, packed[-1][1])
    data = bytearray(archive.read_bytes())
    for signature, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        start = 0
        for content, small in packed:
            start = data.index(signature, start)
            data[start + at : start + at + 2] = struct.pack("<H", method)
            crc = start + at + 6
            data[crc : crc + 12] = struct.pack("<3I", zlib.crc32(content), len(small), len(content))
            start += 4 + (30 + len(small) if at == 8 else 0)
    archive.write_bytes(data)
    return archive


def tarred(archive: Path, mode: str, files: list[Path]) -> Path:
    with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
        for file in files:
            tar.add(file, f"a/{file.name}")
    return archive


def make(kind: str, top: Path, files: list[Path]) -> Path:
    """A study of one of KINDS that holds `files`."""
    contents = {file.name: file.read_bytes() for file in files}
    if kind in ("tbz2", "tar.bz2", "txz", "tar.xz"):
        return tarred(top / f"s.{kind}", "w:bz2" if "b" in kind else "w:xz", files)
    if kind in ("deflate64", "zstd"):
        return zipped_by(DEFLATE64 if kind == "deflate64" else ZSTD, top / "s.zip", files)
    if kind in ("gz", "bz2", "xz"):
        pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind]
        (top / "s").mkdir()
        for name, content in contents.items():
            (top / "s" / f"{name}.{kind}").write_bytes(pack(content))
        return top / "s"
    inner = io.BytesIO()
    if kind == "zip in zip":
        with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as out:
            for name, content in contents.items():
                out.writestr(name, content)
        return zipped(top / "s.zip", {"from/study.zip": inner.getvalue(), "readme.txt": b"hello"})
    if kind == "tar.gz in zip":
        return zipped(top / "s.zip", {"study.tar.gz": tarred(top / "t.tar.gz", "w:gz", files).read_bytes()})
    if kind == "gz in zip":
        return zipped(top / "s.zip", {f"{name}.gz": gzip.compress(content) for name, content in contents.items()})
    if kind == "zips in tgz":
        half = [dict(list(contents.items())[part]) for part in (slice(3), slice(3, None))]
        parts = [zipped(top / f"{number}.zip", part) for number, part in enumerate(half)]
        return tarred(top / "s.tgz", "w:gz", parts)
    assert kind == "zips in folder"
    (top / "s").mkdir()
    zipped(top / "s/1.zip", dict(list(contents.items())[:3]))
    zipped(top / "s/2.zip", dict(list(contents.items())[3:]))
    return top / "s"


KINDS = (
    "tbz2", "tar.bz2", "txz", "tar.xz", "deflate64", "zstd", "gz", "bz2", "xz", "zip in zip", "tar.gz in zip",
    "gz in zip", "zips in tgz", "zips in folder",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_packing_gives_the_same_voxels(tmp_path: Path, files: list[Path], kind: str) -> None:
    study = make(kind, tmp_path, files)
    before = sorted(tmp_path.rglob("*"))
    np.testing.assert_array_equal(volume_of(study).hu, HU.transpose(0, 2, 1))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["tbz2", "txz", "deflate64", "zstd", "zip in zip", "gz in zip", "gz"])
def test_no_flipped_bit_changes_voxels_without_a_warning(tmp_path: Path, kind: str) -> None:
    """If files are packed one by one, a damaged one is filled from its neighbours, with a warning."""
    study = make(kind, tmp_path, series(tmp_path / "files", lungs(6, 16, 16)))
    path = sorted(study.iterdir())[3] if study.is_dir() else study
    usual = Reading()
    true, whole = read_study(study, Models(), usual), path.read_bytes()
    random = np.random.default_rng(0)
    refused = told = 0
    for place, bit in zip(random.integers(0, len(whole), 200), random.integers(0, 8, 200), strict=True):
        broken = bytearray(whole)
        broken[place] ^= 1 << bit
        path.write_bytes(broken)
        reading = Reading()
        try:
            volume = read_study(study, Models(), reading)
        except StudyError:
            refused += 1
            continue
        if reading.warnings != usual.warnings:
            told += 1
        else:
            assert np.array_equal(volume.hu, true.hu), (place, bit)
            assert volume.spacing == true.spacing, (place, bit)
    assert refused + told > 50


def test_an_inner_archive_that_cannot_be_read_is_left_out(tmp_path: Path, files: list[Path]) -> None:
    contents = {file.name: file.read_bytes() for file in files}
    study = zipped(tmp_path / "s.zip", {**contents, "report.zip": b"PK\x03\x04 no zip", "more.7z": b"7z"})
    reading = Reading()
    np.testing.assert_array_equal(read_study(study, Models(), reading).hu, HU.transpose(0, 2, 1))
    assert reading.warnings and reading.warnings[0] == "2 archives in the study could not be read and were left out"
    assert failure(lambda: volume_of(zipped(tmp_path / "t.zip", {"study.7z": b"7z"}))) == "unknown_archive"


def test_archives_nested_too_deep_are_refused(tmp_path: Path, files: list[Path]) -> None:
    content = files[0].read_bytes()
    for _ in range(module.DEEPEST + 2):
        content = zipped(tmp_path / "s.zip", {"inner.zip": content}).read_bytes()
    assert failure(lambda: volume_of(tmp_path / "s.zip")) == "too_deep"


def test_dicom_files_of_any_name_are_read(tmp_path: Path, files: list[Path]) -> None:
    for file, end in zip(files, (".001", ".img", "", ".IMA", ".1.2.840", ".zip.dcm"), strict=True):
        file.rename(file.with_name(file.stem + end))
    np.testing.assert_array_equal(volume_of(tmp_path / "files").hu, HU.transpose(0, 2, 1))
    assert find_studies(tmp_path / "files", tmp_path / "out") == [tmp_path / "files"]


def test_a_bomb_inside_an_archive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[Path]
) -> None:
    inner = zipped(tmp_path / "inner.zip", {str(number): b"\0" * 100_000 for number in range(40)})
    study = zipped(tmp_path / "s.zip", {"inner.zip": inner.read_bytes()})
    packed = zipped(tmp_path / "p.zip", {"x.dcm.gz": gzip.compress(b"\0" * 3_000_000)})
    strange = zipped_by(ZSTD, tmp_path / "z.zip", files)
    monkeypatch.setattr(module.limits, "LARGEST_STUDY", 3_000_000)
    assert failure(lambda: volume_of(study)) == "archive_bomb"
    monkeypatch.setattr(module.limits, "LARGEST_FILE", 4000)
    assert failure(lambda: volume_of(packed)) == "archive_bomb"
    assert failure(lambda: volume_of(strange)) == "archive_bomb"


@pytest.mark.parametrize("method", [DEFLATE64, ZSTD])
def test_a_member_larger_than_declared_is_damage(tmp_path: Path, files: list[Path], method: int) -> None:
    archive = zipped_by(method, tmp_path / "s.zip", files)
    data = bytearray(archive.read_bytes())
    central = data.index(b"PK\x01\x02")
    data[central + 24 : central + 28] = struct.pack("<I", 1000)
    archive.write_bytes(data)
    assert failure(lambda: volume_of(archive)) == "bad_archive"


def test_a_zip_of_an_unknown_method_is_refused_and_the_method_named(tmp_path: Path, files: list[Path]) -> None:
    archive = zipped(tmp_path / "s.zip", {files[0].name: files[0].read_bytes()})
    data = bytearray(archive.read_bytes())
    central = data.index(b"PK\x01\x02")
    for at in (8, central + 10):
        data[at : at + 2] = struct.pack("<H", 98)
    archive.write_bytes(data)
    with pytest.raises(StudyError, match=r"this compression of the archive cannot be read here \(PPMd\)"):
        volume_of(archive)


def test_members_of_the_same_name_are_all_read(tmp_path: Path, files: list[Path]) -> None:
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as out, tarfile.open(tmp_path / "s.tar", "w") as tar:
        for file in files:
            out.writestr("IM", file.read_bytes())
            tar.add(file, "IM")
    for name in ("s.zip", "s.tar"):
        np.testing.assert_array_equal(volume_of(tmp_path / name).hu, HU.transpose(0, 2, 1))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("s.7z", "unknown_archive"), ("s.iso", "unknown_archive"), ("s.zst", "unknown_archive"),
        ("s.zip.001", "split_archive"), ("s.7z.001", "split_archive"), ("s.z01", "split_archive"),
        ("s.nrrd", "unknown_volume"),
        ("s.mha", "unknown_volume"), ("s.mhd", "unknown_volume"), ("s.img", "no_pair"), ("s.hdr", "no_pair"),
    ],
)  # fmt: skip
def test_an_unreadable_kind_of_file_gets_a_row_with_its_reason(tmp_path: Path, name: str, key: str) -> None:
    (tmp_path / name).write_bytes(b"x" * 1000)
    assert [path.name for path in find_studies(tmp_path, tmp_path / "out")] == [name]
    assert failure(lambda: volume_of(tmp_path / name)) == key


def test_a_zip_beside_its_other_parts_is_a_split_archive(tmp_path: Path, files: list[Path]) -> None:
    (tmp_path / "s.z01").write_bytes(b"")
    zipped(tmp_path / "s.zip", {file.name: file.read_bytes() for file in files})
    assert failure(lambda: volume_of(tmp_path / "s.zip")) == "split_archive"


def test_a_single_dicom_file_is_a_study_and_another_file_is_refused(tmp_path: Path, files: list[Path]) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    assert failure(lambda: volume_of(files[0])) == "only_scouts"
    assert failure(lambda: volume_of(tmp_path / "notes.txt")) == "unknown_file"


def test_loose_dicom_files_packed_or_not_are_one_study(tmp_path: Path, files: list[Path]) -> None:
    top = tmp_path / "files"
    for file in files[::2]:
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    zipped(top / "other.zip", {"x": b""})
    assert find_studies(top, tmp_path / "out") == [top, top / "other.zip"]
    volume = read_study(top, Models(), Reading(), flat=True)
    np.testing.assert_array_equal(volume.hu, HU.transpose(0, 2, 1))


# --- NIfTI


def saved(path: Path, hu: "np.ndarray[Any, Any]", **units: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-1.5, -1.5, 3, 1]))
    image.header.set_xyzt_units(**units)
    nibabel.save(image, path)
    return path


BODY = lungs(40, 20, 16)


def test_a_folder_of_totalsegmentator_gives_its_ct_and_not_a_mask(tmp_path: Path) -> None:
    saved(tmp_path / "s/ct.nii.gz", BODY)
    for name in ("aorta", "lung"):
        saved(tmp_path / f"s/segmentations/{name}.nii.gz", np.repeat(BODY > 0, 2, 0).astype(np.uint8))
    reading = Reading()
    np.testing.assert_array_equal(read_study(tmp_path / "s", Models(), reading).hu, BODY.transpose(0, 2, 1))
    assert reading.warnings and "the study holds 3 NIfTI volumes; one was read" in reading.warnings
    assert reading.choice.startswith("chosen from 3 NIfTI volumes by depth in folders")


@pytest.mark.parametrize("archive", ["zip", "tar.gz", "tar"])
def test_a_folder_of_ct_rate_gives_the_volume_that_covers_most(tmp_path: Path, archive: str) -> None:
    saved(tmp_path / "v/train_1/train_1_a/train_1_a_1.nii.gz", BODY[:20])
    saved(tmp_path / "v/train_1/train_1_a/train_1_a_2.nii.gz", BODY)
    saved(tmp_path / "v/train_1/train_1_b/train_1_b_1.nii.gz", BODY - BODY.min())  # no Hounsfield units
    for study in (tmp_path / "v", Path(shutil.make_archive(str(tmp_path / "s"), {"tar.gz": "gztar"}.get(
        archive, archive), tmp_path / "v"))):  # fmt: skip
        volume = volume_of(study)
        np.testing.assert_array_equal(volume.hu, BODY.transpose(0, 2, 1))
        assert volume.spacing == (3, 1.5, 1.5)


def test_nifti_beside_a_ct_series_is_not_read(tmp_path: Path, files: list[Path]) -> None:
    saved(tmp_path / "files/mask.nii.gz", BODY)
    reading = Reading()
    np.testing.assert_array_equal(read_study(files[0].parent, Models(), reading).hu, HU.transpose(0, 2, 1))
    assert reading.warnings == ["the series covers only 30 mm, less than a chest"]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_nifti_in_two_files_is_one_study(tmp_path: Path, packed: str) -> None:
    pair = nibabel.Nifti1Pair(BODY.transpose(2, 1, 0), np.diag([-1.5, -1.5, 3, 1]))
    nibabel.save(pair, tmp_path / f"s.img{packed}")
    assert [path.name for path in find_studies(tmp_path, tmp_path / "out")] == [f"s.hdr{packed}"]
    np.testing.assert_array_equal(volume_of(tmp_path / f"s.hdr{packed}").hu, BODY.transpose(0, 2, 1))
    archive = zipped(tmp_path / "t.zip", {path.name: path.read_bytes() for path in tmp_path.glob("s.*")})
    np.testing.assert_array_equal(volume_of(archive).hu, BODY.transpose(0, 2, 1))


def test_analyze_files_are_refused_as_they_have_no_orientation(tmp_path: Path) -> None:
    nibabel.save(nibabel.AnalyzeImage(BODY.transpose(2, 1, 0), np.eye(4)), tmp_path / "s.img")
    assert failure(lambda: volume_of(tmp_path / "s.hdr")) == "no_orientation"


def test_nifti_2_is_read(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti2Image(BODY.transpose(2, 1, 0), np.diag([-1.5, -1.5, 3, 1])), tmp_path / "s.nii.gz")
    np.testing.assert_array_equal(volume_of(tmp_path / "s.nii.gz").hu, BODY.transpose(0, 2, 1))


@pytest.mark.parametrize(("unit", "scale"), [("meter", 1e-3), ("micron", 1e3), ("mm", 1.0)])
def test_other_units_of_length_are_read(tmp_path: Path, unit: str, scale: float) -> None:
    image = nibabel.Nifti1Image(BODY.transpose(2, 1, 0), np.diag([-1.5 * scale, -1.5 * scale, 3 * scale, 1]))
    image.header.set_xyzt_units(xyz=unit)
    nibabel.save(image, tmp_path / "s.nii")
    np.testing.assert_allclose(volume_of(tmp_path / "s.nii").spacing, (3, 1.5, 1.5), rtol=1e-6)


def test_impossible_units_are_a_warning(tmp_path: Path) -> None:
    reading = Reading()
    volume = read_study(saved(tmp_path / "s.nii", BODY, xyz="meter"), Models(), reading)
    assert volume.spacing == (3, 1.5, 1.5)
    assert reading.warnings and "the units in the NIfTI file give an impossible voxel size" in reading.warnings[-1]
