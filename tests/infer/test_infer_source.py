"""Folders, archives and NIfTI files of studies, also hostile ones."""

import gzip
import io
import os
import shutil
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from scripts.infer import containers as module
from scripts.infer.headers import read_headers
from scripts.infer.messages import StudyError, translate
from scripts.infer.models import Models
from scripts.infer.pixels import read_volume
from scripts.infer.series import choose_series
from scripts.infer.source import find_studies, fingerprint_study, open_study
from scripts.infer.study import Reading, examine_study, read_study
from scripts.infer.values import check_values, find_doubts
from scripts.infer.volume import Volume
from tests.dicom_studies import lungs, series, volume_of

HU = lungs(6)


def read(study: Path) -> Volume:
    with open_study(study) as source:
        found = read_headers(source)[0]
        return choose_series(found, lambda one: read_volume(source, one)[0], lambda volume: "NONE")[1]


def failure(call: Callable[[], object]) -> str:
    with pytest.raises(StudyError) as error:
        call()
    return error.value.key


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return series(tmp_path / "files", HU)


def packed(files: list[Path], archive: Path, prefix: str = "a/b/") -> Path:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
            for file in files:
                out.write(file, prefix + file.name)
    else:
        with tarfile.open(archive, "w:gz" if archive.name.endswith("gz") else "w") as tar:
            for file in reversed(files):
                tar.add(file, prefix + file.name)
    return archive


@pytest.mark.parametrize("name", ["s.zip", "s.tar", "s.tgz", "s.tar.gz", "S.ZIP"])
def test_an_archive_is_read_without_unpacking_it_to_disk(tmp_path: Path, files: list[Path], name: str) -> None:
    archive = packed(files, tmp_path / name.lower()).rename(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))

    np.testing.assert_array_equal(read(archive).hu, HU.transpose(0, 2, 1))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["s.zip", "s.tar"])
def test_names_that_lead_out_of_an_archive_write_nothing(tmp_path: Path, files: list[Path], name: str) -> None:
    archive = packed(files, tmp_path / name, prefix="../../../../tmp/slipped-")
    before = sorted(tmp_path.parent.rglob("*"))

    assert read(archive).hu.shape == (6, 40, 48)
    assert sorted(tmp_path.parent.rglob("*")) == before and not list(Path("/tmp").glob("slipped-*"))


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"m{kind!r}")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)

    assert failure(lambda: read(tmp_path / "s.tar")) == "nothing"


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "many.zip", "w", zipfile.ZIP_DEFLATED) as out:
        for number in range(40):
            out.writestr(f"{number}", b"\0" * 100_000)
    monkeypatch.setattr(module, "LARGEST_STUDY", 3_000_000)
    assert failure(lambda: read(tmp_path / "many.zip")) == "archive_bomb"
    monkeypatch.setattr(module, "MOST_FILES", 30)
    monkeypatch.setattr(module, "LARGEST_STUDY", 64 << 30)
    assert failure(lambda: read(tmp_path / "many.zip")) == "archive_bomb"


def test_a_tar_that_declares_terabytes_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("huge")
    member.size = 1 << 43
    with gzip.open(tmp_path / "s.tgz", "wb") as out:
        out.write(member.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096)

    assert failure(lambda: read(tmp_path / "s.tgz")) == "archive_bomb"


@pytest.mark.parametrize("kind", module.NAME_TYPES)
def test_a_name_of_gigabytes_in_a_tar_is_refused_before_it_is_unpacked(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("name")
    member.type, member.size = kind, 2_000_000
    with gzip.open(tmp_path / "s.tgz", "wb") as out:
        out.write(tarfile.TarInfo("folder").tobuf() + member.tobuf(tarfile.GNU_FORMAT) + b"x" * 3_000_000)

    with pytest.raises(tarfile.ReadError):
        module.Member.frombuf(member.tobuf(tarfile.GNU_FORMAT), "utf-8", "strict")
    assert failure(lambda: read(tmp_path / "s.tgz")) == "bad_archive"


def test_folders_in_a_tar_count_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for number in range(40):
            member = tarfile.TarInfo(f"{number}")
            member.type = tarfile.DIRTYPE
            tar.addfile(member)
    monkeypatch.setattr(module, "MOST_FILES", 30)

    assert failure(lambda: read(tmp_path / "s.tar")) == "archive_bomb"


def test_pipes_are_not_opened(tmp_path: Path, files: list[Path]) -> None:
    for name in ("s.zip", "s.tgz", "s.nii.gz", "loose", "files/within"):
        os.mkfifo(tmp_path / name)

    assert [path.name for path in find_studies(tmp_path, tmp_path / "out")] == ["files", "s.nii.gz", "s.tgz", "s.zip"]
    for name in ("s.zip", "s.tgz", "s.nii.gz"):
        assert failure(lambda name=name: examine_study(tmp_path / name, Models(), Reading())) == "unreadable"  # type: ignore[misc]
        assert len(fingerprint_study(tmp_path / name, tmp_path)) == 16
    assert read(tmp_path / "files").hu.shape == (6, 40, 48)


def test_a_zip_that_lies_about_its_sizes_gives_no_more_than_declared(tmp_path: Path) -> None:
    archive = tmp_path / "s.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("x.dcm", b"\0" * 128 + b"DICM" + b"\0" * 5_000_000)
    data = bytearray(archive.read_bytes())
    central = data.rindex(b"PK\x01\x02")
    data[central + 24 : central + 28] = struct.pack("<I", 1000)
    archive.write_bytes(bytes(data))

    assert failure(lambda: read(archive)) in ("bad_archive", "nothing")


@pytest.mark.parametrize("name", ["s.zip", "s.tar", "s.tgz"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98])
def test_a_cut_archive_is_refused(tmp_path: Path, files: list[Path], name: str, kept: float) -> None:
    archive = packed(files, tmp_path / name)
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * kept)])

    if (name, kept) != ("s.tar", 0.98):  # only the padding at its end is cut
        assert failure(lambda: read(archive)) in ("bad_archive", "damaged")


def test_random_bytes_are_refused_as_archive_and_as_nifti(tmp_path: Path) -> None:
    for name in ("s.zip", "s.tar", "s.tgz", "s.nii", "s.nii.gz"):
        (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(5000))
    for name in ("s.zip", "s.tar", "s.tgz"):
        assert failure(lambda name=name: read(tmp_path / name)) == "bad_archive"  # type: ignore[misc]
    for name in ("s.nii", "s.nii.gz"):
        assert failure(lambda name=name: volume_of(tmp_path / name)) == "bad_nifti"  # type: ignore[misc]


def test_a_damaged_member_is_refused(tmp_path: Path, files: list[Path]) -> None:
    archive = packed(files, tmp_path / "s.zip")
    data = bytearray(archive.read_bytes())
    data[3000:3100] = b"\x55" * 100
    archive.write_bytes(bytes(data))

    assert failure(lambda: read(archive)) in ("bad_archive", "damaged")


def test_a_password_and_an_unknown_kind_of_archive_are_refused(tmp_path: Path, files: list[Path]) -> None:
    archive = packed(files, tmp_path / "s.zip")
    data = bytearray(archive.read_bytes())
    central = data.index(b"PK\x01\x02")
    data[central + 8] |= 1
    archive.write_bytes(bytes(data))
    (tmp_path / "s.rar").write_bytes(b"Rar!")

    assert failure(lambda: read(archive)) == "locked_archive"
    assert failure(lambda: read(tmp_path / "s.rar")) == "unknown_archive"


def test_a_link_to_nothing_and_a_loop_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "gone.zip").symlink_to("nowhere")
    (tmp_path / "loop.zip").symlink_to("loop.zip")
    (tmp_path / "gone.nii").symlink_to("nowhere")

    assert failure(lambda: read(tmp_path / "gone.zip")) == "unreadable"
    assert failure(lambda: volume_of(tmp_path / "gone.nii")) == "unreadable"


def test_a_folder_without_permission_cannot_be_read() -> None:
    """Tests may run as root, who needs no permission, so a child process becomes another user."""
    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    study = top / "study"
    series(study, HU)
    study.chmod(0)
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            os._exit(
                0 if failure(lambda: read(study)) == "unreadable" and len(fingerprint_study(study, top)) == 16 else 1
            )
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    study.chmod(0o755)
    shutil.rmtree(top)


def test_each_folder_archive_and_nifti_file_is_a_study(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("b.zip", "a.NII.GZ", "c.tar.gz", "d.7z", ".hidden.zip", "names.txt"):
        (tmp_path / name).write_bytes(b"")

    names = [path.name for path in find_studies(tmp_path, tmp_path / "out")]
    assert names == [
        "a.NII.GZ",
        "b.zip",
        "c.tar.gz",
        "d.7z",
        "folder",
    ]

    series(tmp_path, HU)
    assert find_studies(tmp_path, tmp_path / "out")[0] == tmp_path


def test_a_fingerprint_changes_with_a_study_s_files(tmp_path: Path, files: list[Path]) -> None:
    folder = files[0].parent
    before = fingerprint_study(folder, tmp_path)
    assert fingerprint_study(folder, tmp_path) == before

    files[0].write_bytes(files[0].read_bytes() + b"\0")
    after = fingerprint_study(folder, tmp_path)
    files[1].unlink()
    assert len({before, after, fingerprint_study(folder, tmp_path)}) == 3


def test_a_file_replaced_by_one_of_equal_size_and_time_changes_the_fingerprint(
    tmp_path: Path, files: list[Path]
) -> None:
    os.utime(files[0], (0, 0))
    before, state = fingerprint_study(files[0].parent, tmp_path), files[0].stat()

    while files[0].stat().st_ctime_ns == state.st_ctime_ns:  # clocks of file systems tick every few milliseconds
        files[0].write_bytes(files[0].read_bytes()[::-1])
        os.utime(files[0], (0, 0))

    assert files[0].stat().st_mtime_ns == 0
    assert fingerprint_study(files[0].parent, tmp_path) != before


# --- NIfTI


def saved(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:  # type: ignore[type-arg]
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0]) if affine is None else affine), path)
    return path


def test_nifti_of_any_type_gives_its_hounsfield_units(tmp_path: Path) -> None:
    body = lungs(5, 6, 7).transpose(2, 1, 0)  # left, posterior, superior; NIfTI counts from Left and Posterior up
    for kind in (np.int16, np.int32, np.float32, np.float64):
        affine = np.diag([-1.0, -2.0, 3.0, 1.0])
        volume = volume_of(saved(tmp_path / "v.nii.gz", body.astype(kind), affine))
        np.testing.assert_allclose(volume.hu, body.transpose(2, 0, 1), err_msg=str(kind))
        np.testing.assert_allclose(volume.spacing, (3, 1, 2))


def test_scaled_nifti_is_scaled(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.full((4, 5, 6), 100, np.int16), np.diag([1.0, 1, 1, 1]))
    image.header.set_slope_inter(2, -1000)
    nibabel.save(image, tmp_path / "v.nii")

    assert (volume_of(tmp_path / "v.nii").hu == -800).all()


def test_hostile_nifti_is_refused_with_the_reason(tmp_path: Path) -> None:
    four = saved(tmp_path / "4d.nii.gz", np.zeros((4, 4, 4, 3), np.int16))
    flat = saved(tmp_path / "flat.nii", np.zeros((4, 4, 1), np.int16))
    nan = saved(tmp_path / "nan.nii", np.zeros((4, 4, 4), np.int16))
    data = bytearray(nan.read_bytes())
    data[280:284] = struct.pack("<f", np.nan)
    nan.write_bytes(bytes(data))
    cut = saved(tmp_path / "cut.nii.gz", np.random.default_rng(0).integers(0, 99, (40, 40, 40), np.int16))
    cut.write_bytes(cut.read_bytes()[:-2000])
    huge = saved(tmp_path / "huge.nii", np.zeros((4, 4, 4), np.int16))
    data = bytearray(huge.read_bytes())
    data[42:48] = struct.pack("<3h", 32000, 32000, 32000)
    huge.write_bytes(bytes(data))
    bomb = io.BytesIO()
    with gzip.GzipFile(fileobj=bomb, mode="wb") as out:
        out.write(bytes(data[:352]) + b"\0" * 1_000_000)
    (tmp_path / "bomb.nii.gz").write_bytes(bomb.getvalue())

    for path, key in ((four, "dimensions"), (flat, "few_slices"), (nan, "spacing"), (cut, "bad_nifti"),
                      (huge, "too_large"), (tmp_path / "bomb.nii.gz", "too_large")):  # fmt: skip
        assert failure(lambda path=path: volume_of(path)) == key, path  # type: ignore[misc]


def test_nifti_of_colours_or_complex_numbers_is_refused(tmp_path: Path) -> None:
    for kind in (np.complex64, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])):
        path = saved(tmp_path / "v.nii", np.zeros((4, 4, 4), kind))
        assert failure(lambda path=path: volume_of(path)) == "no_densities"  # type: ignore[misc]


def test_one_volume_in_four_dimensions_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "v.nii.gz", np.zeros((4, 5, 6, 1), np.int16))

    assert volume_of(path).hu.shape == (6, 4, 5)


def test_voxels_that_are_not_numbers_are_a_warning(tmp_path: Path) -> None:
    array = np.zeros((4, 4, 4), np.float32)
    array[0, 0, :3] = np.nan
    reading = Reading(warnings=[])

    read_study(saved(tmp_path / "v.nii.gz", array), Models(), reading)

    assert reading.warnings and reading.warnings[-1] == "3 voxels are not numbers and count as air"


@pytest.mark.parametrize("name", ["s.nii.gz", "s.tar.gz", "s.tar", "s.zip"])
def test_no_flipped_bit_changes_voxels_without_a_warning(tmp_path: Path, name: str) -> None:
    """A plain tar has no checksum of its content, so there only bits of members' headers are flipped."""
    small = lungs(6, 16, 16)
    path = tmp_path / name
    if name == "s.nii.gz":
        nibabel.save(nibabel.Nifti1Image(small.transpose(2, 1, 0), np.diag([1.5, 1.5, 3, 1])), path)
    else:
        packed(series(tmp_path / "files", small), path)

    def voxels() -> Volume:
        return volume_of(path) if name == "s.nii.gz" else read(path)

    true, whole = voxels(), path.read_bytes()
    places = np.arange(len(whole))
    if name == "s.tar":
        with tarfile.open(path) as tar:
            places = np.concatenate([np.arange(member.offset, member.offset_data) for member in tar])
    random = np.random.default_rng(0)
    refused = 0
    for place, bit in zip(random.choice(places, 200), random.integers(0, 8, 200), strict=True):
        broken = bytearray(whole)
        broken[place] ^= 1 << bit
        path.write_bytes(broken)
        try:
            volume = voxels()
        except StudyError:
            refused += 1
        else:
            assert np.array_equal(volume.hu, true.hu), (place, bit)
            assert volume.spacing == true.spacing, (place, bit)
    assert refused > 50


def test_a_tar_cut_between_two_members_is_refused(tmp_path: Path, files: list[Path]) -> None:
    archive = packed(files, tmp_path / "s.tar")
    with tarfile.open(archive) as tar:
        start = tar.getmembers()[4].offset
    archive.write_bytes(archive.read_bytes()[:start])
    assert failure(lambda: read(archive)) == "bad_archive"


@pytest.mark.parametrize(("sform", "qform", "key"), [
    (None, None, "no_orientation"),
    (np.diag([1.5, 1.5, 3, 1]), np.diag([-1.5, -1.5, 3, 1]), "forms"),
    (np.array([[1.5, 0, 0, 0], [0, 1.5, 1.5, 0], [0, 0, 3, 0], [0, 0, 0, 1]]), None, "sheared"),
])  # fmt: skip
def test_nifti_with_no_two_or_sheared_orientations_is_refused(
    tmp_path: Path, sform: np.ndarray | None, qform: np.ndarray | None, key: str
) -> None:
    image = nibabel.Nifti1Image(lungs(30, 30, 30), np.eye(4))
    image.set_sform(sform, 1 if sform is not None else 0)
    image.set_qform(qform, 1 if qform is not None else 0)
    nibabel.save(image, tmp_path / "v.nii")
    assert failure(lambda: volume_of(tmp_path / "v.nii")) == key


@pytest.mark.parametrize("moved", [range(2, 4), range(3, 6)])
def test_slices_shifted_sideways_are_refused(tmp_path: Path, moved: range) -> None:
    for index, file in enumerate(series(tmp_path / "s", HU)):
        header = pydicom.dcmread(file)
        if index in moved:
            header.ImagePositionPatient[0] = float(header.ImagePositionPatient[0]) + 60
            header.save_as(file)
    assert failure(lambda: read(tmp_path / "s")) == "shifted"


def test_values_that_are_not_hounsfield_units_are_a_warning_or_refused() -> None:
    hu = lungs(40)
    padding = np.where(hu < -700, np.int16(-2000), hu)
    for values in (hu, padding, hu.astype(np.float32)):
        check_values(values)
        assert find_doubts(values) == []
    mask, scaled = (hu < -500).astype(np.int16), ((hu + 1000) / 1200).astype(np.float32)
    windowed = np.clip((hu + 160) / 400 * 255, 0, 255).astype(np.int16)
    unsigned = np.clip(hu.astype(np.uint16).astype(np.int32), 0, 32767)
    nothing = np.full((9, 9, 9), np.nan, np.float32)
    for values in (hu + 1024, mask, scaled, windowed, unsigned, nothing):
        assert failure(lambda values=values: check_values(values)) == "no_hounsfield"  # type: ignore[misc]

    soft = np.maximum(hu, np.int16(-100))  # negative somewhere, and no air
    check_values(soft)
    assert find_doubts(soft) == [translate("no_air")]
    metal = hu.copy()
    metal[:, :8, :8] = 3500
    check_values(metal)
    assert len(find_doubts(metal)) == 1 and "above 3071 HU" in find_doubts(metal)[0]
    bone = hu.copy()
    bone[:, 24:, :24] = 1500
    assert len(find_doubts(bone)) == 1 and "were clipped" in find_doubts(bone)[0]
