"""Tests of dicom: what the tags of real files, good and bad, make of the stored values."""

import random

import numpy as np
import pytest

import images
from tests.shared import SHARED, smooth_picture


def save_dicom(path, pixels, bits=8, photometric="MONOCHROME2", change=None, **tags):
    """Write a DICOM image; `tags` replace what it says, `change` edits the data set last."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.Rows, file.Columns = pixels.shape[:2]
    file.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    file.PixelRepresentation, file.PhotometricInterpretation = 0, photometric
    file.BitsAllocated, file.BitsStored, file.HighBit = 8 * pixels.itemsize, bits, bits - 1
    file.PixelData = pixels.tobytes()
    for key, value in tags.items():
        setattr(file, key, value)
    if change:
        change(file)
    file.save_as(path, enforce_file_format=True)


def full_range(height=24, width=30):
    """A picture that uses grey levels 0 to 255."""
    picture = smooth_picture(height, width).astype(float)
    return ((picture - picture.min()) / np.ptp(picture) * 255).round().astype(np.uint8)


def test_dicom_is_read(tmp_path):
    """Inverted, 12 bits with rescale and window, and in grey colour: the same picture each time."""
    picture = full_range()
    save_dicom(tmp_path / "a.dcm", picture)
    save_dicom(tmp_path / "b.dcm", 255 - picture, photometric="MONOCHROME1")
    window = dict(RescaleSlope="2", RescaleIntercept="-14", WindowCenter="2550", WindowWidth="5101")
    save_dicom(tmp_path / "c.dicom", picture.astype(np.uint16) * 10 + 7, 12, **window)
    colour = dict(photometric="RGB", PlanarConfiguration=0)
    save_dicom(tmp_path / "d.DCM", np.repeat(picture[:, :, None], 3, axis=2), **colour)
    for name in ("a.dcm", "b.dcm", "c.dicom", "d.DCM"):
        image = images.open_dicom(tmp_path / name)
        assert image.mode == "L" and image.size == (30, 24)
        assert np.abs(np.asarray(image).astype(int) - picture).max() <= 1
        pixels, size, colour = images.read_image(tmp_path / name, 16)
        assert np.array_equal(pixels, images.to_square(image, 16, "squash"))
        assert size == (30, 24) and colour == 0.0


def with_table(sequence, descriptor, values):
    """A data set edit: a look-up table for the stored values, in its sequence (None: an element left out)."""

    def change(file):
        from pydicom.dataset import Dataset

        table = Dataset()
        if descriptor is not None:
            table.add_new("LUTDescriptor", "US", descriptor)
        if values is not None:
            table.add_new("LUTData", "US", values)
        setattr(file, sequence, [table])

    return change


def without_pixels(file):
    del file.PixelData


def with_float_pixels(file):
    del file.PixelData
    file.BitsAllocated = 32
    file.FloatPixelData = np.full((24, 30), np.nan, np.float32).tobytes()


def compressed(file):
    from pydicom.encaps import encapsulate
    from pydicom.uid import RLELossless

    file.file_meta.TransferSyntaxUID = RLELossless
    file.PixelData = encapsulate([b"\0" * 70])
    file["PixelData"].is_undefined_length = True


def deflated(file):
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    file.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian


DICOM_FAULTS = {
    "empty pixel data": dict(PixelData=b""),
    "no pixel data": dict(change=without_pixels),
    "too little pixel data": dict(PixelData=b"\0" * 100),
    "modality table without values": dict(change=with_table("ModalityLUTSequence", [256, 0, 16], None)),
    "modality table without descriptor": dict(change=with_table("ModalityLUTSequence", None, [1, 2, 3, 4])),
    "window table too short": dict(change=with_table("VOILUTSequence", [256, 0, 16], [1, 2, 3])),
    "window table of 99 bits": dict(change=with_table("VOILUTSequence", [4, 0, 99], [1, 2, 3, 4])),
    "descriptor of one number": dict(change=with_table("VOILUTSequence", [4], [1, 2, 3, 4])),
    "no rows": dict(Rows=0),
    "no photometric interpretation": dict(PhotometricInterpretation=None),
    "unknown photometric interpretation": dict(PhotometricInterpretation="MONOCHROME7"),
    "7 bits allocated": dict(BitsAllocated=7),
    "two samples a pixel": dict(SamplesPerPixel=2),
    "many frames": dict(NumberOfFrames=1_000_000),
    "palette": dict(photometric="PALETTE COLOR"),
    "constant": dict(PixelData=b"\7" * 720),
    "NaN pixels": dict(change=with_float_pixels),
    "huge": dict(Rows=65535, Columns=65535),
    "huge and compressed": dict(Rows=65535, Columns=65535, change=compressed),
    "broken compression": dict(change=compressed),
    "deflated": dict(change=deflated),
}
DICOM_WITHOUT_WINDOW = {
    "empty sequence": dict(VOILUTSequence=[]),
    "table without values": dict(change=with_table("VOILUTSequence", [256, 0, 16], None)),
    "table of no entries": dict(change=with_table("VOILUTSequence", [256, 0, 16], [])),
    "window without width": dict(WindowCenter="100"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", DICOM_FAULTS)
def test_faulty_dicom_raises_oserror_only(tmp_path, fault):
    save_dicom(tmp_path / "a.dcm", full_range(), **DICOM_FAULTS[fault])
    for read in (images.open_dicom, lambda path: images.read_image(path, 16)):
        with pytest.raises(OSError) as found:
            read(tmp_path / "a.dcm")
        assert str(found.value) and "\n" not in str(found.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", DICOM_WITHOUT_WINDOW)
def test_dicom_with_half_a_window_is_read_without_it(tmp_path, fault):
    save_dicom(tmp_path / "a.dcm", full_range(), **DICOM_WITHOUT_WINDOW[fault])
    assert np.array_equal(images.open_dicom(tmp_path / "a.dcm"), full_range())


@pytest.mark.filterwarnings("ignore")
def test_damaged_dicom_raises_oserror_only(tmp_path):
    """Cut or changed bytes give a picture or OSError."""
    rng, failures = random.Random(0), 0
    table = with_table("VOILUTSequence", [256, 0, 16], list(range(256)))
    save_dicom(tmp_path / "a.dcm", full_range(), change=table)
    original = (tmp_path / "a.dcm").read_bytes()
    for trial in range(150):
        raw = bytearray(original)
        if trial % 5 == 0:
            del raw[rng.randrange(128, len(raw)) :]
        else:
            raw[rng.randrange(128, len(raw) - 700)] = rng.randrange(256)
        (tmp_path / "b.dcm").write_bytes(raw)
        try:
            pixels, _, _ = images.read_image(tmp_path / "b.dcm", 16)
            assert pixels.shape == (16, 16) and pixels.dtype == np.uint8
        except OSError:
            failures += 1
    assert failures > 30


def test_dicom_without_pydicom_says_what_to_install(tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pydicom"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    (tmp_path / "a.dcm").write_bytes(b"\0" * 132)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OSError, match="pip install pydicom"):
        images.read_image(tmp_path / "a.dcm", 16)
