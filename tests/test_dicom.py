"""Tests of dicom: what the tags of real files, good and bad, make of the stored values."""

import random

import numpy as np
import pytest
from PIL import Image
from scipy.stats.mstats import mquantiles

from images import decode, find
from images.decode import open_dicom, read_image
from tests.shared import SHARED, save_dicom, smooth_picture


def full_range(height=24, width=30):
    """A picture that uses grey levels 0 to 255."""
    picture = smooth_picture(height, width).astype(float)
    return ((picture - picture.min()) / np.ptp(picture) * 255).round().astype(np.uint8)


def test_dicom_of_eight_bits_is_read_as_it_is(tmp_path):
    """Stored inverted, with a window that is the whole range, in grey colour, in 16 bits: one picture."""
    picture = full_range() // 2 + 30
    save_dicom(tmp_path / "a.dcm", picture)
    save_dicom(tmp_path / "b.dcm", 255 - picture, photometric="MONOCHROME1")
    window = dict(RescaleSlope="1", RescaleIntercept="0", WindowCenter="128", WindowWidth="256")
    save_dicom(tmp_path / "c.dicom", picture, **window)
    colour = dict(photometric="RGB", PlanarConfiguration=0)
    save_dicom(tmp_path / "d.DCM", np.repeat(picture[:, :, None], 3, axis=2), **colour)
    save_dicom(
        tmp_path / "IM_0001", picture.astype(np.uint16) + 0xA00, 8
    )  # what is above bit 8 means nothing
    for name in ("a.dcm", "b.dcm", "c.dicom", "d.DCM", "IM_0001"):
        assert np.array_equal(open_dicom(tmp_path / name).convert("L"), picture), name
        pixels, size, colour = read_image(tmp_path / name, 16)
        assert np.array_equal(pixels, decode.decode(tmp_path / name, 16))
        assert size == (30, 24) and colour == 0.0
    save_dicom(tmp_path / "e.dcm", picture // 16, 4)
    assert np.array_equal(open_dicom(tmp_path / "e.dcm"), picture // 16 * 17)
    red = np.stack([picture, picture * 0, picture * 0], axis=2)
    save_dicom(tmp_path / "f.dcm", red, photometric="RGB", PlanarConfiguration=0)
    assert read_image(tmp_path / "f.dcm", 16)[2] == pytest.approx(picture.mean() / 255, abs=0.02)


def deep():
    """A picture of 12 bits that leaves some of the range free, but for a marker of three pixels."""
    values = full_range().astype(np.uint16) * 8 + 5
    values[12, 3:6] = 4095
    return values


def by_definition(values, padding=None):
    """The grey range of the pixels that are not padding, by scipy's quantiles."""
    known = values if padding is None else values[~padding]
    low, high = mquantiles(known.ravel(), (0.005, 0.995), alphap=1, betap=1)
    grey = np.round((values - low) / (high - low) * 255).clip(0, 255)
    return grey if padding is None else np.where(padding, 0, grey)


DEEP = {
    "plain": (lambda v: v, {}),
    "rescaled": (lambda v: v, dict(RescaleSlope="-2", RescaleIntercept="70")),
    "inverted": (lambda v: -v, dict(photometric="MONOCHROME1")),
    "window": (lambda v: v.clip(300, 1000), dict(WindowCenter="650.5", WindowWidth="701")),
    "two windows": (lambda v: v.clip(300, 1000), dict(WindowCenter=[650.5, 9], WindowWidth=[701, 3])),
    "exact": (
        lambda v: v.clip(300, 1000),
        dict(WindowCenter="650", WindowWidth="700", VOILUTFunction="LINEAR_EXACT"),
    ),
    "sigmoid": (
        lambda v: 1 / (1 + np.exp(-4 * (v - 650) / 700)),
        dict(WindowCenter="650", WindowWidth="700", VOILUTFunction="SIGMOID"),
    ),
}


@pytest.mark.parametrize("kind", DEEP)
def test_dicom_grey_range(tmp_path, kind):
    """Against the standard's formulas (part 3, C.11.2.1.2) and the percentiles."""
    shown, tags = DEEP[kind]
    values = deep()
    save_dicom(tmp_path / "a.dcm", values, 12, **tags)
    values = values.astype(float)
    expected = by_definition(-values if kind == "rescaled" else shown(values))
    assert np.abs(np.asarray(open_dicom(tmp_path / "a.dcm")) - expected).max() <= 1


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("sequence", ["ModalityLUTSequence", "VOILUTSequence"])
def test_dicom_tables(tmp_path, sequence, bits):
    """A look-up table of 1,200 entries for values from 200 on, against numpy.interp's clipping."""
    entries = (np.linspace(0, 1, 1200) ** 2 * (2**bits - 1)).round().astype(int)
    change = with_table(sequence, [1200, 200, bits], entries.tolist())
    save_dicom(tmp_path / "a.dcm", deep(), 12, change=change)
    expected = by_definition(np.interp(deep(), np.arange(200, 1400), entries))
    assert np.abs(np.asarray(open_dicom(tmp_path / "a.dcm")) - expected).max() <= 1


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("kind", ["one", "range", "as unsigned", "above the used bits", "8 bits"])
def test_padding_takes_no_part(tmp_path, kind, photometric):
    """Half of the picture is padding: it is black, and the rest has the grey range that it has alone."""
    values = full_range() // 2 if kind == "8 bits" else deep().astype(np.int16) // 2
    padding = np.zeros(values.shape, bool)
    padding[:, 15:] = True
    stored, signed = values.copy(), int(kind != "8 bits")
    stored[padding] = {"8 bits": 255, "above the used bits": -32768}.get(kind, -2000)
    if kind == "range":
        stored[:5, 15:] = -1500
    bits = {"8 bits": 8, "above the used bits": 12}.get(kind, 16)
    value = {"8 bits": 255, "above the used bits": -32768}.get(kind, -2000)
    sort = "SS" if signed and kind != "as unsigned" else "US"

    def pad(file):
        file.add_new("PixelPaddingValue", sort, value if sort == "SS" or value > 0 else 65536 + value)
        if kind == "range":
            file.add_new("PixelPaddingRangeLimit", sort, -1500)

    save_dicom(tmp_path / "a.dcm", stored, bits, photometric, pad, PixelRepresentation=signed)
    found = np.asarray(open_dicom(tmp_path / "a.dcm"))
    known = values.astype(float) if photometric == "MONOCHROME2" else 255.0 - values
    expected = np.where(padding, 0, known) if kind == "8 bits" else by_definition(known, padding)
    assert np.array_equal(found, expected)


def test_all_padding_is_no_picture(tmp_path):
    save_dicom(tmp_path / "a.dcm", np.full((20, 20), 7, np.uint16), 12, PixelPaddingValue=7)
    with pytest.raises(OSError, match="all pixels of the image are padding"):
        open_dicom(tmp_path / "a.dcm")


def test_one_picture_in_png_and_dicom(tmp_path):
    values = deep()
    Image.fromarray(values).save(tmp_path / "a.png")
    save_dicom(tmp_path / "a.dcm", values, 12)
    assert np.array_equal(*(decode.decode(tmp_path / name, 24) for name in ("a.png", "a.dcm")))


def test_dicom_cases():
    folder = SHARED / "cases"
    if not folder.exists():
        pytest.skip("../shared is absent")
    plain = decode.decode(folder / "pixel_padding/dcm_12bit.dcm", 224).astype(int)
    for name in ("IM_0001", "slope_empty.dcm"):
        assert np.array_equal(decode.decode(folder / "dicom_odd_tags" / name, 224), plain)
    padded = np.asarray(open_dicom(folder / "pixel_padding/dcm_pad_minus32768.dcm"))
    whole = np.asarray(open_dicom(folder / "pixel_padding/dcm_12bit.dcm"))
    import pydicom

    raw = pydicom.dcmread(folder / "pixel_padding/dcm_pad_minus32768.dcm").pixel_array
    assert (raw == -32768).mean() > 0.1 and (padded[raw == -32768] == 0).all()
    left = np.abs(padded.astype(int) - whole)[raw != -32768]
    assert left.mean() < 5  # the percentiles are those of the part that is there


# ---------------------------------------------------------------- compressed, bare, and no pictures


@pytest.mark.parametrize(
    "syntax, package",
    [
        ("1.2.840.10008.1.2.4.70", "pylibjpeg pylibjpeg-libjpeg"),
        ("1.2.840.10008.1.2.4.80", "pylibjpeg pylibjpeg-libjpeg"),
        ("1.2.840.10008.1.2.4.90", "pylibjpeg pylibjpeg-openjpeg"),
        ("1.2.840.10008.1.2.4.201", "pylibjpeg pylibjpeg-openjpeg"),
        ("1.2.840.10008.1.2.4.102", "convert it first"),
    ],
)
def test_compressed_dicom_names_the_package(tmp_path, monkeypatch, syntax, package):
    """However long the name of the syntax is; whether or not the package is installed here."""
    import pydicom.pixels.common

    monkeypatch.setattr(pydicom.pixels.common.CoderBase, "is_available", property(lambda self: False))

    def change(file):
        compressed(file)
        file.file_meta.TransferSyntaxUID = syntax

    save_dicom(tmp_path / "a.dcm", full_range(), change=change)
    with pytest.raises(OSError, match=f"^DICOM compressed as .*{package}$"):
        read_image(tmp_path / "a.dcm", 16)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implicit", [True, False])
def test_bare_dicom_is_read(tmp_path, implicit):
    """A data set without the 128 bytes, the mark and the header."""
    import pydicom

    save_dicom(tmp_path / "a.dcm", full_range(), Modality="DX", ImageType=["ORIGINAL"])
    file = pydicom.dcmread(tmp_path / "a.dcm")
    bare = pydicom.Dataset(file)
    bare.save_as(tmp_path / "IM1", implicit_vr=implicit, little_endian=True)
    assert (tmp_path / "IM1").read_bytes()[:2] == b"\x08\0"
    assert np.array_equal(open_dicom(tmp_path / "IM1"), full_range())
    assert list(find.Search().walk(tmp_path)) == [str(tmp_path / name) for name in ("IM1", "a.dcm")]


def test_dicom_without_a_picture_says_so(tmp_path):
    report = dict(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", change=without_pixels)
    save_dicom(tmp_path / "a.dcm", full_range(), **report)
    with pytest.raises(OSError, match="DICOM without a picture .Basic Text SR Storage"):
        read_image(tmp_path / "a.dcm", 16)


def test_table_of_contents_of_a_disc_is_no_image(tmp_path):
    def change(file):
        file.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
        without_pixels(file)

    save_dicom(tmp_path / "DICOMDIR", full_range(), change=change)
    (tmp_path / "DICOM/PA0").mkdir(parents=True)
    save_dicom(tmp_path / "DICOM/PA0/IM_0001", full_range())
    search = find.Search()
    assert list(search.walk(tmp_path)) == [str(tmp_path / "DICOM/PA0/IM_0001")]
    assert search.passed == {"DICOMDIR": 1} and search.by_content == {"without extension": 1}


# ---------------------------------------------------------------- damage


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
    "window of width 0": dict(WindowCenter="100", WindowWidth="0"),
    "window of negative width": dict(WindowCenter="100", WindowWidth="-3"),
    "exact window of width 0": dict(WindowCenter="9", WindowWidth="0", VOILUTFunction="LINEAR_EXACT"),
    "empty window": dict(WindowCenter=None, WindowWidth=None),
    "window without centre": dict(WindowCenter=None, WindowWidth="20"),
    "empty slope": dict(RescaleSlope=None, RescaleIntercept="3"),
    "empty slope and intercept": dict(RescaleSlope=None, RescaleIntercept=None),
    "empty intercept": dict(RescaleSlope="2", RescaleIntercept=None),
    "slope of 0": dict(RescaleSlope="0", RescaleIntercept="3"),
    "empty padding value": dict(PixelPaddingValue=None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", DICOM_FAULTS)
def test_faulty_dicom_raises_oserror_only(tmp_path, fault):
    save_dicom(tmp_path / "a.dcm", full_range(), **DICOM_FAULTS[fault])
    for read in (open_dicom, lambda path: read_image(path, 16)):
        with pytest.raises(OSError) as found:
            read(tmp_path / "a.dcm")
        assert str(found.value) and "\n" not in str(found.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", DICOM_WITHOUT_WINDOW)
def test_dicom_with_half_a_window_is_read_without_it(tmp_path, fault):
    save_dicom(tmp_path / "a.dcm", full_range(), **DICOM_WITHOUT_WINDOW[fault])
    assert np.array_equal(open_dicom(tmp_path / "a.dcm"), full_range())


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
            pixels, _, _ = read_image(tmp_path / "b.dcm", 16)
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

    (tmp_path / "a.dcm").write_bytes(b"\0" * 128 + b"DICM")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OSError, match="pip install pydicom"):
        read_image(tmp_path / "a.dcm", 16)
