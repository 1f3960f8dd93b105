"""Series of DICOM studies: the choice, the voxels, the warnings and errors."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gdcm  # type: ignore[import-untyped]
import imagecodecs
import numpy as np
import pydicom
import pydicom.data
import pydicom.encaps
import pytest
import SimpleITK as sitk  # type: ignore[import-untyped]  # noqa: N813
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from scripts.infer import decode
from scripts.infer.findings import Result
from scripts.infer.headers import Series, Slice, read_headers
from scripts.infer.messages import StudyError, translate
from scripts.infer.models import Models
from scripts.infer.pixels import Image, read_volume
from scripts.infer.series import choose_series, list_warnings
from scripts.infer.source import open_study
from scripts.infer.study import Reading, examine_study
from scripts.infer.volume import Volume
from tests.dicom_studies import lungs, series, uid

HU = lungs(12)
# Real images that pydicom ships: each compression and byte order
REAL = [
    Path(pydicom.data.get_testdata_file(f"{name}.dcm", download=False))  # type: ignore[arg-type]
    for name in ("693_J2KI", "CT_small", "J2K_pixelrep_mismatch", "JPEG-lossy", "JPEG2000", "JPEGLSNearLossless_08",
                 "JPEGLSNearLossless_16", "JPGExtended", "MR_small", "MR_small_RLE", "MR_small_bigendian",
                 "MR_small_implicit", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless")
]  # fmt: skip


def never(volume: Volume) -> str:
    raise AssertionError("the body-part network was asked")


def chosen(study: Path, body_part: Callable[[Volume], str] = never) -> tuple[Series, Volume, list[str]]:
    """The series chosen from a folder or archive, its volume and the warnings."""
    said: dict[str, list[str]] = {}
    with open_study(study) as source:

        def read(one: Series) -> Volume:
            volume, said[one.uid] = read_volume(source, one)
            return volume

        one, volume = choose_series(read_headers(source)[0], read, body_part)
    return one, volume, list_warnings(one) + said[one.uid]


def name_of(study: Path, names: str, body_part: Callable[[Volume], str] = never) -> str:
    """The one of the series `names`, separated by spaces, that is chosen."""
    one = chosen(study, body_part)[0].uid
    return next(name for name in names.split() if uid("study", name) == one)


def failure(study: Path, body_part: Callable[[Volume], str] = never) -> str:
    """The key of the error."""
    with pytest.raises(StudyError) as error:
        chosen(study, body_part)
    return error.value.key


def edit(path: Path, **tags: Any) -> None:
    """Change tags of a file; None deletes a tag."""
    ds = pydicom.dcmread(path)
    for tag, value in tags.items():
        if value is None:
            delattr(ds, tag)
        else:
            setattr(ds, tag, value)
    ds.save_as(path)


# --- Which series


def test_the_thinnest_slices_are_chosen(tmp_path: Path) -> None:
    series(tmp_path, HU, name="a-thick", SliceThickness=5)
    series(tmp_path, HU, name="b-thin", SliceThickness=1)
    series(tmp_path, HU, name="c-unknown", SliceThickness=None)

    assert name_of(tmp_path, "a-thick b-thin c-unknown") == "b-thin"


def test_among_equally_thin_series_soft_tissue_is_chosen_else_the_first(tmp_path: Path) -> None:
    series(tmp_path / "1", HU, name="lung", WindowCenter=-600, WindowWidth=1500)
    series(tmp_path / "1", HU, name="soft", WindowCenter=[50, -600], WindowWidth=[500, 1500])
    series(tmp_path / "1", HU, name="soft-too", WindowCenter=40, WindowWidth=400)
    assert name_of(tmp_path / "1", "lung soft soft-too") == "soft"

    series(tmp_path / "2", HU, name="lung", WindowCenter=-600, WindowWidth=1500)
    series(tmp_path / "2", HU, name="wide", WindowCenter=40, WindowWidth=501)
    assert name_of(tmp_path / "2", "lung wide") == "lung"


def test_without_thickness_the_window_and_kernel_decide_else_the_first(tmp_path: Path) -> None:
    for case, tags in (("window", {"WindowCenter": -600}), ("kernel", {"ConvolutionKernel": "B70f"}), ("none", {})):
        series(tmp_path / case, HU, name="a", SliceThickness=None, **{"ConvolutionKernel": "B31f", **tags})
        series(tmp_path / case, HU, name="b", SliceThickness=None, ConvolutionKernel="B31f")

        assert name_of(tmp_path / case, "a b") == ("a" if case == "none" else "b")


def test_coverage_of_the_chest_counts_before_thin_slices(tmp_path: Path) -> None:
    series(tmp_path, lungs(60), name="whole")
    series(tmp_path, lungs(5), name="five-thin", spacing=(1, 6, 6.5))
    series(tmp_path, lungs(40), name="half", spacing=(2.5, 6, 6.5))
    series(tmp_path, lungs(2), name="scouts", spacing=(200, 6, 6.5), SliceThickness=0.1)
    assert name_of(tmp_path, "whole five-thin half scouts") == "whole"
    series(tmp_path, lungs(84), name="fine", spacing=(2.5, 6, 6.5))  # 210 mm, nearly a chest
    assert name_of(tmp_path, "whole five-thin half scouts fine") == "fine"


def test_a_thickness_of_0_counts_as_missing(tmp_path: Path) -> None:
    series(tmp_path, HU, name="zero", SliceThickness=0)
    series(tmp_path, HU, name="known", SliceThickness=5)
    assert name_of(tmp_path, "zero known") == "known"


@pytest.mark.parametrize(
    "tags",
    [
        {"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "MIP"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 MIP"]},
        {"ImageType": ["ORIGINAL", "SECONDARY", "SCREEN SAVE"]},
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"},
    ],
)
def test_derived_images_and_captures_are_never_chosen(tmp_path: Path, tags: dict[str, Any]) -> None:
    series(tmp_path / "alone", HU, name="derived", **tags)
    assert failure(tmp_path / "alone") == "only_scouts"
    series(tmp_path / "both", HU, name="derived", spacing=(4, 6, 6.5), **tags)
    series(tmp_path / "both", HU, name="original")
    assert name_of(tmp_path / "both", "derived original") == "original"


def test_lossy_compression_alone_does_not_make_an_image_derived(tmp_path: Path) -> None:
    series(tmp_path, HU, ImageType=["DERIVED", "PRIMARY", "AXIAL"], LossyImageCompression="01")
    assert chosen(tmp_path)[1].hu.shape == (12, 40, 48)


def test_two_or_four_slices_are_not_a_volume(tmp_path: Path) -> None:
    for count in (2, 4):
        series(tmp_path / str(count), lungs(count), spacing=(50, 6, 6.5))
        assert failure(tmp_path / str(count)) == "only_scouts"


# --- Several acquisitions under one series UID


def two_acquisitions(folder: Path, shift: float, first: dict[str, Any], second: dict[str, Any]) -> None:
    """HU, and 8 slices of HU + 500 that lie `shift` mm higher, with file names in random order."""
    kinds = (("A", HU, 0.0, first), ("B", HU[:8] + np.int16(500), shift, second))
    for kind, hu, up, tags in kinds:
        for index, path in enumerate(series(folder / kind, hu, name="mixed", **tags)):
            ds = pydicom.dcmread(path)
            ds.ImagePositionPatient[2] += up
            ds.SOPInstanceUID = uid(kind, index)
            ds.save_as(folder / f"{uid('name', kind, index)[-9:]}.dcm")
        shutil.rmtree(folder / kind)


@pytest.mark.parametrize("shift", [0.0, 2.5])
@pytest.mark.parametrize(
    ("tag", "one", "other"),
    [
        ("ConvolutionKernel", "B31f", "B70f"),
        ("AcquisitionNumber", 1, 2),
        ("AcquisitionTime", "101500", "101530.5"),
        ("TemporalPositionIdentifier", 1, 2),
        ("ImageType", ["ORIGINAL", "PRIMARY", "AXIAL", "A"], ["ORIGINAL", "PRIMARY", "AXIAL", "B"]),
        ("KVP", 80, 140),
    ],
)
def test_acquisitions_under_one_uid_are_never_mixed(
    tmp_path: Path, tag: str, one: Any, other: Any, shift: float
) -> None:
    two_acquisitions(tmp_path, shift, {tag: one}, {tag: other})

    _, volume, said = chosen(tmp_path)

    np.testing.assert_array_equal(volume.hu, HU.transpose(0, 2, 1))
    assert len(said) == 1
    assert said[0].startswith(f"the series holds 2 acquisitions or reconstructions (they differ in {tag}); one of 12")


def test_acquisitions_without_tags_are_told_apart_by_their_numbers(tmp_path: Path) -> None:
    for kind, hu in (("A", HU), ("B", HU[:8] + np.int16(500))):
        for index, path in enumerate(series(tmp_path / kind, hu, name="mixed")):
            edit(path, InstanceNumber=index + (101 if kind == "B" else 1))
            path.rename(tmp_path / f"{index}{kind}")

    _, volume, said = chosen(tmp_path)

    np.testing.assert_array_equal(volume.hu, HU.transpose(0, 2, 1))
    assert "they differ in InstanceNumber" in said[0]


def test_acquisitions_that_no_tag_tells_apart_are_refused(tmp_path: Path) -> None:
    for kind, hu in (("A", HU), ("B", HU + np.int16(500))):
        for path in series(tmp_path / kind, hu, name="mixed"):
            path.rename(tmp_path / (kind + path.name))
    assert failure(tmp_path) == "ambiguous"


def test_rotations_side_by_side_are_one_acquisition(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).permutation(12).tolist()
    for index, path in enumerate(series(tmp_path, HU)):
        edit(path, AcquisitionNumber=index // 2, AcquisitionTime=f"1015{index:02}", InstanceNumber=numbers[index] + 1)

    _, volume, said = chosen(tmp_path)

    np.testing.assert_array_equal(volume.hu, HU.transpose(0, 2, 1))
    assert said == []


def test_the_body_part_network_is_asked_in_order_and_only_until_it_finds_a_chest(tmp_path: Path) -> None:
    series(tmp_path, HU, name="head", SliceThickness=1, BodyPartExamined="HEAD")
    series(tmp_path, HU + 1, name="unnamed", SliceThickness=2, BodyPartExamined=None)
    series(tmp_path, HU, name="chest", SliceThickness=3)
    series(tmp_path, HU, name="later", SliceThickness=3, BodyPartExamined="")
    asked: list[Volume] = []

    def tags(volume: Volume) -> str:
        asked.append(volume)
        return ["NECK-CHEST", "CHEST"][len(asked) - 1]

    assert name_of(tmp_path, "head unnamed chest later", tags) == "unnamed"
    asked.clear()
    assert name_of(tmp_path, "head unnamed chest later", lambda volume: "NONE") == "chest"


def test_a_thin_localiser_is_not_a_volume(tmp_path: Path) -> None:
    series(tmp_path, HU[:2], name="scout", SliceThickness=0.1, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    series(tmp_path, HU[:1], name="single", SliceThickness=0.2)
    series(tmp_path, HU, name="chest", SliceThickness=5)

    assert name_of(tmp_path, "scout single chest") == "chest"


def test_each_way_to_lack_a_chest_ct_has_its_own_error(tmp_path: Path) -> None:
    series(tmp_path / "no_ct", HU, Modality="MR")
    series(tmp_path / "no_chest", HU, BodyPartExamined="HEAD")
    series(tmp_path / "nothing", HU, Modality="MR", BodyPartExamined="HEAD")
    series(tmp_path / "only_scouts", HU, ImageType="LOCALIZER")
    (tmp_path / "empty").mkdir()

    assert failure(tmp_path / "no_ct") == "no_ct"
    assert failure(tmp_path / "no_chest", lambda volume: "HEAD") == "no_chest"
    assert failure(tmp_path / "nothing") == "nothing"
    assert failure(tmp_path / "only_scouts") == "only_scouts"
    assert failure(tmp_path / "empty") == "nothing"


def test_series_of_two_studies_with_one_uid_are_two_series(tmp_path: Path) -> None:
    """As anonymisers make them."""
    for study, hu in (("first", HU), ("second", HU + 1)):
        series(tmp_path, hu, name=study, study=study, SeriesInstanceUID="1.2.3")

    one, volume, _ = chosen(tmp_path)

    assert one.study == uid("first")
    np.testing.assert_array_equal(volume.hu, HU.transpose(0, 2, 1))


def test_images_without_a_series_are_skipped_and_counted(tmp_path: Path) -> None:
    series(tmp_path, HU, SeriesInstanceUID=None)

    with open_study(tmp_path) as source:
        assert read_headers(source) == ([], 12)


# --- Its voxels


def test_hounsfield_units_are_read_from_any_way_to_store_them(tmp_path: Path) -> None:
    for name, options in {
        "unsigned": {}, "signed": {"signed": True, "intercept": 0}, "half": {"slope": 0.5},
        "above": {"slope": 2, "intercept": -3024}, "negative": {"MONOCHROME1": True},
    }.items():  # fmt: skip
        inverted = {"PhotometricInterpretation": "MONOCHROME1"} if options.pop("MONOCHROME1", None) else {}
        series(tmp_path / name, HU // 2 * 2, **options, **inverted)  # type: ignore[arg-type]

        volume = chosen(tmp_path / name)[1]

        assert volume.hu.dtype == (np.float32 if name == "half" else np.int16)
        np.testing.assert_array_equal(volume.hu, (HU // 2 * 2).transpose(0, 2, 1), err_msg=name)
        np.testing.assert_allclose(volume.spacing, (5, 6.5, 6), rtol=1e-6)


def test_extra_bits_of_old_scanners_are_not_density(tmp_path: Path) -> None:
    for path in series(tmp_path, HU, BitsStored=12, HighBit=11):
        pixels = pydicom.dcmread(path).pixel_array | 0x8000
        edit(path, PixelData=pixels.tobytes())

    np.testing.assert_array_equal(chosen(tmp_path)[1].hu, HU.transpose(0, 2, 1))


@pytest.mark.parametrize("turned", ["axial", "feet first", "coronal", "sagittal"])
def test_any_orientation_gives_the_same_volume(tmp_path: Path, turned: str) -> None:
    """The same body (superior, posterior, left), scanned or reformatted; file names have a random order."""
    body = lungs(10, 11, 12)
    orientation, step, planes, spacing = {
        "axial": ((1, 0, 0, 0, 1, 0), (0, 0, 1), body, (3, 2, 1)),
        "feet first": ((1, 0, 0, 0, 1, 0), (0, 0, -1), body[::-1], (3, 2, 1)),
        "coronal": ((1, 0, 0, 0, 0, -1), (0, 1, 0), body.transpose(1, 0, 2)[:, ::-1], (2, 3, 1)),
        "sagittal": ((0, 1, 0, 0, 0, -1), (1, 0, 0), body.transpose(2, 0, 1)[:, ::-1], (1, 3, 2)),
    }[turned]
    paths = series(tmp_path, planes, orientation=orientation, step=step, spacing=spacing)  # type: ignore[arg-type]
    for number, path in enumerate(np.random.default_rng(0).permutation(np.array(paths))):
        Path(path).rename(tmp_path / f"{number}")

    _, volume, said = chosen(tmp_path)

    np.testing.assert_array_equal(volume.hu, body.transpose(0, 2, 1))
    np.testing.assert_allclose(volume.spacing, (3, 1, 2), rtol=1e-6)
    assert said == []


COMPRESSED = {
    "JPEG lossless SV1": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "JPEG lossless": gdcm.TransferSyntax.JPEGLosslessProcess14,
    "JPEG-LS": gdcm.TransferSyntax.JPEGLSLossless,
    "JPEG 2000": gdcm.TransferSyntax.JPEG2000Lossless,
    "RLE": gdcm.TransferSyntax.RLELossless,
    "big endian": gdcm.TransferSyntax.ExplicitVRBigEndian,
    "implicit": gdcm.TransferSyntax.ImplicitVRLittleEndian,
}


def compress(path: Path, syntax: int) -> None:
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("signed", [False, True])
def test_compressed_slices_are_read_without_loss(tmp_path: Path, name: str, signed: bool) -> None:
    for path in series(tmp_path, HU, signed=signed, intercept=0 if signed else -1024):
        compress(path, COMPRESSED[name])
    assert pydicom.dcmread(next(tmp_path.iterdir())).file_meta.TransferSyntaxUID != "1.2.840.10008.1.2.1"

    np.testing.assert_array_equal(chosen(tmp_path)[1].hu, HU.transpose(0, 2, 1))


@pytest.mark.parametrize("name", ["JPEG lossless SV1", "JPEG lossless", "JPEG-LS", "JPEG 2000", "RLE"])
@pytest.mark.parametrize("signed", [False, True])
def test_compressed_slices_are_decoded_while_other_threads_run(
    tmp_path: Path, name: str, signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pydicom's own decoders, which block other threads, are not used."""
    for path in series(tmp_path, HU, signed=signed, intercept=0 if signed else -1024):
        compress(path, COMPRESSED[name])
    monkeypatch.setattr(decode, "get_decoder", None)
    np.testing.assert_array_equal(chosen(tmp_path)[1].hu, HU.transpose(0, 2, 1))


def encapsulate(path: Path, syntax: str, encode: Callable[[Any], bytes], **tags: Any) -> None:
    ds = pydicom.dcmread(path)
    pixels = ds.pixel_array
    for tag, value in tags.items():
        setattr(ds, tag, value)
    ds.PixelData = pydicom.encaps.encapsulate([bytes(encode(pixels))])
    ds["PixelData"].VR, ds.file_meta.TransferSyntaxUID = "OB", pydicom.uid.UID(syntax)
    ds.save_as(path)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203"])
@pytest.mark.parametrize("signed", [False, True])
def test_high_throughput_jpeg_2000_is_read(tmp_path: Path, syntax: str, signed: bool) -> None:
    for path in series(tmp_path, HU, signed=signed, intercept=0 if signed else -1024):
        encapsulate(path, syntax, lambda pixels: imagecodecs.htj2k_encode(pixels, reversible=True))
    np.testing.assert_array_equal(chosen(tmp_path)[1].hu, HU.transpose(0, 2, 1))


def test_jpeg_of_12_bits_is_read(tmp_path: Path) -> None:
    for path in series(tmp_path, HU, BitsStored=12, HighBit=11):
        encapsulate(
            path, "1.2.840.10008.1.2.4.51",
            lambda pixels: imagecodecs.jpeg8_encode(pixels, level=100, bitspersample=12),
        )  # fmt: skip
    volume = chosen(tmp_path)[1]
    assert np.abs(volume.hu - HU.transpose(0, 2, 1)).max() <= 2  # lossy
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    expected = sitk.GetArrayFromImage(reader.Execute()).transpose(0, 2, 1)
    np.testing.assert_array_equal(volume.hu, expected)


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_images_are_decoded_as_simpleitk_decodes_them(path: Path) -> None:
    ds = pydicom.dcmread(path)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(path))[0]
    pixels = Image(path.read_bytes()).read(Slice("", 0, None, expected.shape, None, None, None, None, None))[0]
    values = pixels * float(ds.get("RescaleSlope") or 1) + float(ds.get("RescaleIntercept") or 0)
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("name", ["JPEG lossless SV1", "JPEG-LS", "JPEG 2000", "RLE"])
def test_a_damaged_compressed_image_does_not_end_the_process(tmp_path: Path, name: str) -> None:
    """It would end GDCM. Each of 100 images is cut or has one to three bits flipped, mostly in its header."""
    path = series(tmp_path, HU[:1])[0]
    compress(path, COMPRESSED[name])
    ds = pydicom.dcmread(path)
    frame = pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1)
    random = np.random.default_rng(0)
    damaged = 0
    for number in range(100):
        broken = bytearray(frame)
        for _ in range(number % 3 + 1):
            broken[random.integers(60 if number % 4 else len(frame))] ^= 1 << random.integers(8)
        if number % 5 == 0:
            del broken[random.integers(len(frame)) :]
        ds.PixelData = pydicom.encaps.encapsulate([bytes(broken)])
        try:
            assert decode.decode_frame(ds, ds.file_meta.TransferSyntaxUID, 0).shape == (48, 40)
        except decode.DamagedError:
            damaged += 1
    assert damaged >= 20


def test_enhanced_ct_with_all_slices_in_one_file_is_read(tmp_path: Path) -> None:
    path = series(tmp_path, HU[:1])[0]
    ds = pydicom.dcmread(path)
    stored = (HU + 1024).astype(np.uint16)
    measures, shift = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = ds.PixelSpacing, 5
    shift.RescaleSlope, shift.RescaleIntercept = 1, -1024
    shared, orientation = Dataset(), Dataset()
    orientation.ImageOrientationPatient = ds.ImageOrientationPatient
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PixelValueTransformationSequence = Sequence([shift])
    shared.PlaneOrientationSequence = Sequence([orientation])
    frames = []
    for z in range(len(HU)):
        position, frame = Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, -5 * z]
        frame.PlanePositionSequence = Sequence([position])
        frames.append(frame)
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(ds, tag)
    ds.NumberOfFrames, ds.PixelData = len(HU), stored.tobytes()
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    ds.PerFrameFunctionalGroupsSequence = Sequence(frames)
    ds.ImageComments = "x" * 9000  # makes the header longer than the part read first
    ds.AdditionalPatientHistory = "y" * 70000
    ds.save_as(path)

    _, volume, said = chosen(tmp_path)

    np.testing.assert_array_equal(volume.hu, HU[::-1].transpose(0, 2, 1))
    np.testing.assert_allclose(volume.spacing, (5, 6.5, 6), rtol=1e-6)
    assert said == []


# --- Warnings and errors


def test_missing_slices_are_filled_from_neighbours_with_a_warning(tmp_path: Path) -> None:
    paths = series(tmp_path, HU)
    for index in (3, 7, 8):
        paths[index].unlink()

    _, volume, said = chosen(tmp_path)

    assert said == ["about 25 % of the slices are missing", "3 missing slices were filled in from their neighbours"]
    assert volume.hu.shape == (12, 40, 48) and volume.spacing[0] == pytest.approx(5)
    np.testing.assert_array_equal(volume.hu[3], np.rint(HU[2] / 2 + HU[4] / 2).T)
    np.testing.assert_array_equal(volume.hu[9], HU[9].T)


def test_duplicates_and_missing_rescale_tags_are_warnings(tmp_path: Path) -> None:
    paths = series(tmp_path, HU, RescaleSlope=None, RescaleIntercept=None, PhotometricInterpretation="MONOCHROME1")
    shutil.copy(paths[4], tmp_path / "copy")

    _, volume, said = chosen(tmp_path)

    np.testing.assert_array_equal(volume.hu, (HU + 1024).transpose(0, 2, 1))
    assert said == [
        "RescaleSlope is missing or 0; 1 was used",
        "RescaleIntercept is missing; 0 was used",
        "the images are marked for inverted display; their Hounsfield units were used as stored",
        "1 duplicate slices were left out",
    ]


def test_a_tilted_gantry_is_a_warning_and_a_steep_one_refused(tmp_path: Path) -> None:
    series(tmp_path / "little", HU, step=(0, 0.05, 0.9987))
    series(tmp_path / "steep", HU, step=(0, 0.5, 0.866))

    _, volume, said = chosen(tmp_path / "little")

    assert said == ["the gantry was tilted by 2.9°"] and volume.spacing[0] == pytest.approx(5, rel=1e-3)
    assert failure(tmp_path / "steep") == "tilt_failure"


@pytest.mark.parametrize(
    ("key", "tags"),
    [
        ("no_geometry", {"ImagePositionPatient": None}),
        ("no_geometry", {"ImageOrientationPatient": None}),
        ("no_geometry", {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}),
        ("no_geometry", {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}),
        ("no_geometry", {"PixelSpacing": None}),
        ("spacing", {"PixelSpacing": [0, 0]}),
        ("spacing", {"PixelSpacing": [1e6, 1]}),
        ("damaged", {"PixelData": None}),
        ("damaged", {"PixelData": b"\0" * 100}),
        ("damaged", {"BitsAllocated": 17}),
        ("too_large", {"Rows": 65535, "Columns": 65535}),
    ],
)
def test_missing_or_impossible_tags_are_refused_with_the_reason(tmp_path: Path, key: str, tags: dict[str, Any]) -> None:
    for path in series(tmp_path, np.repeat(HU, 30 if key == "too_large" else 1, 0)):
        edit(path, **tags)

    assert failure(tmp_path) == key


def test_values_that_are_not_numbers_count_as_missing(tmp_path: Path) -> None:
    for path in series(tmp_path, HU, SliceThickness=None):
        raw = path.read_bytes().replace(b"DS\x08\x006.0\\6.5 ", b"DS\x08\x00nan\\nan ")
        assert b"nan" in raw
        path.write_bytes(raw)

    assert failure(tmp_path) == "no_geometry"


def test_uneven_steps_are_refused(tmp_path: Path) -> None:
    paths = series(tmp_path, HU)
    for index, path in enumerate(paths):
        edit(path, ImagePositionPatient=[0, 0, 5 * index - 2 * (index in (5, 8))])
    assert failure(tmp_path) == "uneven"


@pytest.mark.parametrize("position", [[-100, -100, -73], [-100, -40, -75], [40, -100, -75]])
def test_one_slice_beside_its_place_does_not_spoil_the_study(tmp_path: Path, position: list[float]) -> None:
    edit(series(tmp_path, HU, step=(0, 0, 1))[5], ImagePositionPatient=position)
    _, volume, said = chosen(tmp_path)
    assert said == [translate("far", count=1), translate("filled", count=1)]
    np.testing.assert_array_equal(np.delete(volume.hu, 5, 0), np.delete(HU, 5, 0).transpose(0, 2, 1))


def test_one_slice_between_the_others_does_not_spoil_the_study(tmp_path: Path) -> None:
    series(tmp_path, HU)
    edit(series(tmp_path, HU[:1] + np.int16(9), name="between")[0], SeriesInstanceUID=uid("study", "series"),
         InstanceNumber=None, ImagePositionPatient=[-100, -100, -77.5])  # fmt: skip
    _, volume, said = chosen(tmp_path)
    np.testing.assert_array_equal(volume.hu, HU.transpose(0, 2, 1))
    assert said == [translate("far", count=1)]


def test_a_turned_volume_is_a_warning(tmp_path: Path) -> None:
    series(tmp_path, HU, orientation=(1, 0, 0, 0, 0.9397, 0.342), step=(0, -0.342, 0.9397))
    assert chosen(tmp_path)[2] == [translate("turned", angle=20)]


@pytest.mark.parametrize(
    "tags",
    [
        {"PixelSpacing": [1, 1]},
        {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]},
        {"ImagePositionPatient": None},
        {"Rows": 40, "Columns": 48},
    ],
)
def test_one_image_of_another_geometry_does_not_spoil_the_study(tmp_path: Path, tags: dict[str, Any]) -> None:
    edit(series(tmp_path, HU)[5], **tags)

    _, volume, said = chosen(tmp_path)

    assert volume.hu.shape == (12, 40, 48)
    assert said[0].startswith("1 images of the series were left out: their size") and len(said) == 3


def test_pixel_spacings_that_differ_by_rounding_are_equal(tmp_path: Path) -> None:
    edit(series(tmp_path, HU)[5], PixelSpacing=["6.0000001", "6.5"])
    _, volume, said = chosen(tmp_path)
    np.testing.assert_array_equal(volume.hu, HU.transpose(0, 2, 1))
    assert said == []


@pytest.mark.parametrize("far", [-900, 700, 701.3])
def test_one_slice_far_from_the_others_does_not_spoil_the_study(tmp_path: Path, far: float) -> None:
    series(tmp_path, HU)
    edit(series(tmp_path, HU[:1], name="far")[0], SeriesInstanceUID=uid("study", "series"), InstanceNumber=13,
         ImagePositionPatient=[-100, -100, far])  # fmt: skip

    _, volume, said = chosen(tmp_path)

    np.testing.assert_array_equal(volume.hu, HU.transpose(0, 2, 1))
    assert said == [translate("far", count=1)]


def test_a_damaged_copy_beside_a_good_one_does_no_harm(tmp_path: Path) -> None:
    paths = series(tmp_path, HU)
    for name in ("0", "z"):
        copy = tmp_path / f"{name}-copy"
        shutil.copy(paths[4], copy)
        copy.write_bytes(copy.read_bytes()[:-900])

    _, volume, said = chosen(tmp_path)

    np.testing.assert_array_equal(volume.hu, HU.transpose(0, 2, 1))
    assert said == [translate("damaged_images", count=2)]


def test_padding_counts_as_air(tmp_path: Path) -> None:
    padding = HU.copy()
    padding[:, :, :5] = 500
    for signed, value, end in ((False, 1524, None), (True, 500, None), (False, 1520, 1530)):
        folder = tmp_path / f"{signed} {end}"
        for path in series(folder, padding, signed=signed, intercept=0 if signed else -1024):
            ds = pydicom.dcmread(path)
            ds.add_new("PixelPaddingValue", "SS" if signed else "US", value)
            if end is not None:
                ds.add_new("PixelPaddingRangeLimit", "US", end)
            ds.save_as(path)
        expected = np.where(padding == 500, -1000, padding)
        np.testing.assert_array_equal(chosen(folder)[1].hu, expected.transpose(0, 2, 1))


def test_a_negative_padding_written_unsigned_is_padding(tmp_path: Path) -> None:
    padding = HU.copy()
    padding[:, :, :5] = -2000
    for path in series(tmp_path, padding, signed=True, intercept=0):
        ds = pydicom.dcmread(path)
        ds.add_new("PixelPaddingValue", "US", 63536)
        ds.save_as(path)
    assert chosen(tmp_path)[1].hu.min() == -1000


def test_decimal_commas_are_read(tmp_path: Path) -> None:
    for path in series(tmp_path, HU, RescaleIntercept=-1024.0):
        raw = path.read_bytes().replace(b"-1024.0", b"-1024,0").replace(b"6.0\\6.5", b"6,0\\6,5")
        assert raw.count(b",") > 2
        path.write_bytes(raw)

    _, volume, said = chosen(tmp_path)

    np.testing.assert_array_equal(volume.hu, HU.transpose(0, 2, 1))
    np.testing.assert_allclose(volume.spacing, (5, 6.5, 6), rtol=1e-6)
    assert said == []


def test_a_rescale_that_cannot_be_read_is_not_taken_for_0(tmp_path: Path) -> None:
    for path in series(tmp_path, HU):
        raw = path.read_bytes()
        assert b"-1024" in raw
        path.write_bytes(raw.replace(b"-1024", b"-1O24"))
    assert failure(tmp_path) == "bad_rescale"


def test_a_few_unusable_images_do_not_spoil_the_study(tmp_path: Path) -> None:
    paths = series(tmp_path, HU)
    paths[3].write_bytes(paths[3].read_bytes().replace(b"-1024", b"-1O24"))
    edit(paths[6], BitsAllocated=17)
    ds = pydicom.dcmread(paths[8])
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
    ds.PixelData, ds["PixelData"].VR = pydicom.encaps.encapsulate([b"video"]), "OB"
    ds.save_as(paths[8])

    _, volume, said = chosen(tmp_path)

    assert translate("damaged_images", count=3) in said
    np.testing.assert_array_equal(np.delete(volume.hu, [3, 6, 8], 0), np.delete(HU, [3, 6, 8], 0).transpose(0, 2, 1))


def test_a_file_that_does_not_name_its_transfer_syntax_is_read(tmp_path: Path) -> None:
    for path in series(tmp_path, HU):
        raw = path.read_bytes()
        start = raw.index(b"\x02\x00\x10\x00UI")
        length = 8 + int.from_bytes(raw[start + 6 : start + 8], "little")
        total = int.from_bytes(raw[140:144], "little") - length
        raw = raw[:140] + total.to_bytes(4, "little") + raw[144:start] + raw[start + length :]
        path.write_bytes(raw)
    np.testing.assert_array_equal(chosen(tmp_path)[1].hu, HU.transpose(0, 2, 1))


def test_captures_and_litter_give_no_warning(tmp_path: Path) -> None:
    series(tmp_path, HU, name="capture", SamplesPerPixel=3, PhotometricInterpretation="RGB")
    series(tmp_path, HU)
    for name in ("__MACOSX/x.dcm", "._series-000.dcm", ".DS_Store", "Thumbs.db", "viewer/run.exe", "a.jpg", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"litter")
    with open_study(tmp_path) as source:
        assert read_headers(source)[1] == 0
    for name in ("cut.dcm", "IM0001", "1.2.840.113"):
        (tmp_path / name).write_bytes(b"no image")
    with open_study(tmp_path) as source:
        assert read_headers(source)[1] == 3


def test_errors_of_another_body_part_are_not_reported(tmp_path: Path) -> None:
    for path in series(tmp_path, HU, BodyPartExamined="HEAD"):
        edit(path, PixelData=b"")
    assert failure(tmp_path) == "no_chest"


def test_a_series_without_most_slices_is_refused(tmp_path: Path) -> None:
    paths = series(tmp_path, lungs(30))
    for path in paths[3:-3]:
        path.unlink()

    assert failure(tmp_path) == "gaps"


def test_a_file_cut_in_its_pixels_is_damaged_and_one_cut_in_its_header_skipped(tmp_path: Path) -> None:
    paths = series(tmp_path, HU)
    paths[2].write_bytes(paths[2].read_bytes()[:300])
    with open_study(tmp_path) as source:
        found, skipped = read_headers(source)
    assert (len(found[0].slices), skipped) == (11, 1)

    paths[5].write_bytes(paths[5].read_bytes()[:-900])
    paths[11].write_bytes(paths[11].read_bytes()[:-900])
    _, volume, said = chosen(tmp_path)
    assert translate("damaged_images", count=2) in said
    assert volume.hu.shape == (11, 40, 48)
    np.testing.assert_array_equal(volume.hu[5], np.rint(HU[4] / 2 + HU[6] / 2).T)

    for path in paths[4:9]:
        path.write_bytes(path.read_bytes()[:-900])
    assert failure(tmp_path) == "damaged"


def test_a_broken_compressed_slice_counts_as_damaged(tmp_path: Path) -> None:
    for path in series(tmp_path, HU):
        compress(path, COMPRESSED["JPEG lossless SV1"])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 + 500] + b"\0" * 300)

    assert translate("damaged_images", count=1) in chosen(tmp_path)[2]


def test_a_compression_without_a_decoder_is_named(tmp_path: Path) -> None:
    for path in series(tmp_path, HU):
        compress(path, COMPRESSED["JPEG 2000"])
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
        ds.save_as(path)

    with pytest.raises(StudyError, match="MPEG-4 AVC"):
        chosen(tmp_path)


def test_deflated_files_are_not_inflated(tmp_path: Path) -> None:
    """pydicom would inflate them without a limit."""
    paths = series(tmp_path, HU)
    for path in paths:
        compress(path, gdcm.TransferSyntax.DeflatedExplicitVRLittleEndian)
    with pytest.raises(StudyError, match="Deflated Explicit VR"):
        chosen(tmp_path)

    series(tmp_path, HU, name="plain")
    with open_study(tmp_path) as source:
        found, skipped = read_headers(source)
    assert ([one.uid for one in found], skipped) == ([uid("study", "plain")], 12)


def test_a_slope_of_0_counts_as_missing(tmp_path: Path) -> None:
    for path in series(tmp_path, HU):
        edit(path, RescaleSlope=0)

    _, volume, said = chosen(tmp_path)

    np.testing.assert_array_equal(volume.hu, HU.transpose(0, 2, 1))
    assert said == ["RescaleSlope is missing or 0; 1 was used"]


def test_a_damaged_series_of_the_chest_gives_way_to_the_next(tmp_path: Path) -> None:
    class ModelsStandIn(Models):
        shape = 4, 8, 8

        def infer(self, tensor: Any) -> Result:
            return Result(0.5, {})

    for path in series(tmp_path, HU, name="damaged", SliceThickness=1):
        edit(path, PixelData=b"")
    with pytest.raises(StudyError, match="12 images are damaged"):
        examine_study(tmp_path, ModelsStandIn(), Reading())
    series(tmp_path, HU, name="whole")
    reading = Reading()

    examine_study(tmp_path, ModelsStandIn(), reading)

    assert reading.series_uid == uid("study", "whole") and reading.result
    assert reading.warnings == [
        "a chest series that fits better was passed over: 12 images are damaged or incomplete; send the series again",
        "the series covers only 60 mm, less than a chest",
    ]
    assert reading.choice.startswith("chosen from 2 CT volumes by coverage (60 mm)")


def test_colour_captures_are_not_slices(tmp_path: Path) -> None:
    series(tmp_path, HU, name="capture", SamplesPerPixel=3, PhotometricInterpretation="RGB", SliceThickness=0.1)
    series(tmp_path, HU, name="chest")

    assert name_of(tmp_path, "capture chest") == "chest"
