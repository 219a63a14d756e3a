"""Tests of dicom: what the tags of real files, good and bad, make of the stored values."""

import csv
import hashlib
import hmac
import os
import random
import warnings

import numpy as np
import pytest
from PIL import Image
from scipy.stats.mstats import mquantiles

import data
from calibration import pooling
from common.console import InputError
from images import decode, find
from images.decode import open_dicom, read_image
from images.split import split_patients, without_keys
from layouts import headers
from layouts.listing import Index
from prediction.people import people_of, told_by_names
from prediction.scorer import File
from report.rows import load_entries
from tests.shared import SHARED, cli, of_one, read_json, refused, save_dicom, smooth_picture, succeed


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


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    "slope, intercept, centre", [(-1, 4095, 3000), (-0.5, 2047.5, 1500), (2, -100, 1500)]
)
def test_window_after_a_slope(tmp_path, slope, intercept, centre, photometric):
    """A window acts on rescaled values (part 3, C.11.2), which a negative slope turns round."""
    tags = dict(RescaleSlope=slope, RescaleIntercept=intercept, WindowCenter=centre, WindowWidth=700)
    tags = {name: str(value) for name, value in tags.items()}
    save_dicom(tmp_path / "a.dcm", deep(), 12, photometric=photometric, **tags)
    shown = np.clip((deep().astype(float) * slope + intercept - (centre - 0.5)) / 699 + 0.5, 0, 1)
    expected = by_definition(-shown if photometric == "MONOCHROME1" else shown)
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


# ---------------------------------------------------------------- what headers say of patients


def draw_headers(root, headers, size=16, seed=0):
    """A DICOM of random pixels for each {file: {tag: value}}."""
    rng = np.random.default_rng(seed)
    for name, tags in headers.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        tags = {"PatientName": "Doe^Jane", **tags}
        save_dicom(root / name, rng.integers(0, 255, (size, size)).astype(np.uint8), change=set_raw(tags))
    return list(headers)


def set_raw(tags):
    """A change of a data set that writes values as they are, wrong ones too."""

    def change(file):
        from pydicom import config

        config.settings.writing_validation_mode = config.IGNORE
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, value in tags.items():
                setattr(file, name, value)

    return change


HEADERS = {  # {file: what its header says, and what is made of it: (age, sex, view, machine)}
    "a": (
        {"PatientAge": "045Y", "PatientSex": "F", "ViewPosition": "PA", "Manufacturer": "Kodak "},
        (45, "F", "PA", "Kodak"),
    ),
    "b": ({"PatientAge": "003M", "PatientSex": "M", "ViewPosition": "AP"}, (0.25, "M", "AP", "")),
    "c": ({"PatientAge": "012W", "PatientSex": "O", "ViewPosition": "LL"}, (84 / 365.25, "", "lateral", "")),
    "d.dcm": ({"PatientAge": "010D", "ViewPosition": "LATERAL"}, (10 / 365.25, "", "lateral", "")),
    "e.dcm": ({"PatientAge": "411Y", "PatientSex": ""}, (np.nan, "", "", "")),
    "f.dicom": ({"PatientAge": "abc", "ViewPosition": ""}, (np.nan, "", "", "")),
    "g": ({}, (np.nan, "", "", "")),
}


def test_ages_sexes_views_and_machines_of_headers(tmp_path, capsys):
    files = draw_headers(tmp_path / "in", {name: tags for name, (tags, _) in HEADERS.items()})
    Image.fromarray(full_range()).save(tmp_path / "in" / "h.png")
    found = headers.cohort_of_files(tmp_path / "in", [*files, "h.png"], tmp_path / "cache")
    for i, (_, expected) in enumerate([*HEADERS.values(), ({}, (np.nan, "", "", ""))]):
        assert found["age"][i] == pytest.approx(expected[0], nan_ok=True), i
        assert (found["sex"][i], found["view"][i], found["machine"][i]) == expected[1:], i
    assert (found["patient"] == "").all() and (found["study"] == "").all()
    said = capsys.readouterr().err
    assert "2 ages are not understood (411Y, abc)" in said and "1 sexes are not understood (O)" in said
    assert headers.cohort_of_files(tmp_path / "in", ["h.png"], tmp_path / "cache") is None


def test_ids_are_known_by_keyed_names_only(tmp_path, monkeypatch):
    """The same patient has the same name in every folder of a cache, and another one under another key.
    Headers are read once; nothing of them lies in the cache folder in clear."""
    tags = {"PatientID": "MRN0042", "StudyInstanceUID": "1.2.840.77.5"}
    other = {"PatientID": "MRN0043", "StudyInstanceUID": "1.2.840.77.6"}
    draw_headers(tmp_path / "one", {"x.dcm": tags, "y.dcm": other, "z.dcm": tags})
    draw_headers(tmp_path / "two", {"q.dcm": {**tags, "PatientID": " MRN0042 "}, "r.dcm": other})
    cache = tmp_path / "cache"
    one = headers.cohort_of_files(tmp_path / "one", ["x.dcm", "y.dcm", "z.dcm"], cache)
    two = headers.cohort_of_files(tmp_path / "two", ["q.dcm", "r.dcm"], cache)
    for name in ("patient", "study"):
        x, y, z = one[name]
        assert x == z == two[name][0] and y == two[name][1] and x != y
    key = bytes.fromhex((cache / "dicom.key").read_text())
    digest = hmac.new(key, b"patient:MRN0042", hashlib.sha256).hexdigest()
    assert one["patient"][0] == f"dicom-{digest[:16]}"
    if os.name == "posix":
        assert (cache / "dicom.key").stat().st_mode & 0o777 == 0o600
    for path in cache.iterdir():
        text = path.read_bytes()
        if path.suffix == ".npz":
            text += b"".join(np.load(path)[name].tobytes() for name in np.load(path).files)
        for secret in ("MRN0042", "1.2.840.77", "Doe"):
            assert secret.encode() not in text and secret.encode("utf-32-le") not in text
    elsewhere = headers.cohort_of_files(tmp_path / "one", ["x.dcm"], tmp_path / "other")
    assert elsewhere["patient"][0] != one["patient"][0]

    # What was read is kept, until a file changes.
    read = []
    monkeypatch.setattr(
        headers, "read_header", lambda path: read.append(path.name) or decode.read_header(path)
    )
    again = headers.cohort_of_files(tmp_path / "one", ["y.dcm", "x.dcm"], cache)
    assert read == [] and again["patient"].tolist() == one["patient"][[1, 0]].tolist()
    draw_headers(tmp_path / "one", {"x.dcm": {**other, "PatientAge": "007Y"}})
    changed = headers.cohort_of_files(tmp_path / "one", ["y.dcm", "x.dcm"], cache)
    assert read == ["x.dcm"] and changed["age"][1] == 7 and len(set(changed["patient"])) == 1
    next(cache.glob("one-headers-*.npz")).write_bytes(b"damaged")
    whole = headers.cohort_of_files(tmp_path / "one", ["y.dcm", "x.dcm"], cache)
    assert {k: v.tolist() for k, v in whole.items() if k != "age"} == {
        k: v.tolist() for k, v in changed.items() if k != "age"
    }
    (cache / "dicom.key").write_text("0123")
    with pytest.raises(InputError, match="dicom.key is damaged"):
        headers.cohort_of_files(tmp_path / "one", ["x.dcm"], cache)


def test_ids_that_say_nothing(tmp_path, capsys):
    """Empty, removed, huge; of the file; two in a study; one study for all."""

    def patients(name, rows):
        tags = {f"{k}.dcm": dict(zip(("PatientID", "StudyInstanceUID"), row)) for k, row in enumerate(rows)}
        files = draw_headers(tmp_path / name, tags)
        found = headers.cohort_of_files(tmp_path / name, files, tmp_path / "cache")
        return found["patient"].tolist(), found["study"].tolist()

    ids, studies = patients("none", [("", ""), ("Anonymous", "1.2"), ("ANON", "1.2"), ("0", "")])
    assert ids == ["", studies[1], studies[1], ""] and studies[0] == studies[3] == ""
    assert "2 images name no patient: their study stands for the patient" in capsys.readouterr().err
    ids, _ = patients("huge", [("9" * 60_000, "1.1"), ("9" * 60_001, "1.2"), ("Ä\\B", "1.3")])
    assert len(set(ids)) == 3 and max(map(len, ids)) < 30
    ids, _ = patients("files", [("0", "1.1"), ("1", "1.2"), ("2", "1.3")])
    assert ids == patients("files", [("", "1.1"), ("1", "1.2"), ("2", "1.3")])[0]
    capsys.readouterr()
    ids, studies = patients("two", [("p", "1.1"), ("q", "1.1"), ("q", "1.2"), ("r", "1.3"), ("", "1.3")])
    assert ids[0] == ids[1] == ids[2] != ids[3] == ids[4] and len(set(studies)) == 3
    said = capsys.readouterr().err
    assert "1 studies name several patients: these are taken for one" in said and "1 images name no" in said
    ids, studies = patients("one", [(f"p{k}", "1.1") for k in range(5)])
    assert len(set(ids)) == 5 and set(studies) == {""}
    assert "1 studies name more than 3 patients: the studies of 5 images" in capsys.readouterr().err


def test_damaged_headers(tmp_path, capsys):
    """No header, a cut one, deflated pixels: nothing is known, with a count; the others are."""
    files = draw_headers(tmp_path / "in", {"a.dcm": {"PatientID": "p"}, "b.dcm": {"PatientID": "q"}})
    (tmp_path / "in" / "text.dcm").write_text("no DICOM at all, but long enough " * 10)
    (tmp_path / "in" / "b.dcm").write_bytes((tmp_path / "in" / "b.dcm").read_bytes()[:180])
    files += ["text.dcm", "absent.dcm"]
    found = headers.cohort_of_files(tmp_path / "in", files, tmp_path / "cache")
    assert found["patient"][0] and found["patient"][2:].tolist() == ["", ""]
    said = capsys.readouterr().err
    assert "DICOM headers in" in said and "absent.dcm" in said and "Traceback" not in said


def test_a_number_sign_in_a_folder_hides_no_header(tmp_path):
    names = ["case#1/a.dcm", "case#1/b.dcm"]
    draw_headers(tmp_path / "in", {name: {"PatientID": "one"} for name in names}, size=32)
    found = headers.cohort_of_files(tmp_path / "in", names, tmp_path / "cache")
    assert found["patient"][0] and found["patient"][0] == found["patient"][1]


def test_a_picture_in_upper_bits_is_refused(tmp_path):
    """It would wrap round without a word."""
    save_dicom(tmp_path / "a.dcm", np.arange(720, dtype=np.uint16).reshape(24, 30) << 4, 12, HighBit=15)
    with pytest.raises(OSError, match="HighBit is 15, and BitsStored 12"):
        open_dicom(tmp_path / "a.dcm")


def dicom_set(root, patients=12, seed=0):
    """Class folders of DICOM: each patient has two images, in one or two studies; NORMAL and PNEUMONIA take
    turns. Names of files say nothing."""
    number, tags = 0, {}
    for side, count in (("train", patients), ("test", 6)):
        for p in range(count):
            for image in range(2):
                number += 1
                file = f"{side}/{('NORMAL', 'PNEUMONIA')[p % 2]}/{number:03d}.dcm"
                tags[file] = {
                    "PatientID": f"MRN-{side}-{p}",
                    "StudyInstanceUID": f"1.2.{len(side)}.{p}.{image * (p % 3 == 0)}",
                    "PatientAge": f"{20 + p:03d}Y",
                    "PatientSex": "FM"[p % 2],
                    "ViewPosition": "PA",
                }
    return draw_headers(root, tags, size=32, seed=seed)


def test_split_keeps_a_patient_together_whatever_the_key(tmp_path):
    """Studies of one patient lie on one side; another key gives other names and the same sides."""
    files = dicom_set(tmp_path / "set")
    sides = []
    for cache in ("one", "two"):
        settings = dict(data_dir=str(tmp_path / "set"), img_size=16, cache_dir=str(tmp_path / cache))
        config = data.DataConfig(**settings)
        train, val, info = data.load_train_val(config, tell=lambda line: None)
        assert info["shared_patients"] == 0 and info["unknown_patients"] == 0
        assert not set(train.patients) & set(val.patients) and len(set(train.patients + val.patients)) == 12
        assert set(train.cohort["study"]).isdisjoint(val.cohort["study"])
        assert sorted(train.cohort["age"])[0] >= 20 and set(val.cohort["sex"]) <= {"F", "M"}
        sides.append((train.files, val.files, train.patients))
    assert sides[0][:2] == sides[1][:2] and sides[0][2] != sides[1][2]
    patients = [name for name in map(str, np.repeat(np.arange(20), 2))]
    files = [f"{i:02d}" for i in range(40)]
    cuts = []
    for key in (b"1" * 32, b"2" * 32):
        named = [headers.name_of(key, "patient", patient) for patient in patients]
        cuts.append(split_patients(without_keys(files, named), 0.3)[1].tolist())
    assert cuts[0] == cuts[1]


def test_a_run_on_dicom_by_study(tmp_path):
    """Training and calibration by study on DICOM folders: units as the headers say, no id in clear."""
    dicom_set(tmp_path / "set", 40)
    before = {path: path.read_bytes() for path in sorted((tmp_path / "set").rglob("*.dcm"))}
    flags = ("--data-dir", "set", "--cache-dir", "cache", "--img-size", 32)
    succeed("train_linear", *flags, cwd=tmp_path)
    done = succeed("calibrate", "--by", "study", "--min-recall", 0.8, "--bootstrap", 100, cwd=tmp_path)
    folder = tmp_path / "outputs" / "linear"
    arrays = np.load(folder / "scores.npz")
    assert arrays["test_cohort_study"].tolist() and len(set(arrays["test_cohort_study"].tolist())) == 8
    assert "test: 12 images are 8 studies" in done.out and "studies with it" in done.out
    row = of_one(read_json(folder, "calibration.json"))["test"]["at_rec"]
    assert sum(row[k] for k in ("tp", "fp", "tn", "fn")) == 8
    ((entry,),) = load_entries(tmp_path / "outputs")
    assert entry.unit == "studies" and len(entry.column("PNEUMONIA", "test").truth) == 8
    text = b"".join(arrays[name].tobytes() for name in arrays.files)
    for path in [*folder.rglob("*"), *(tmp_path / "cache").iterdir()]:
        text += path.read_bytes() if path.is_file() else b""
    for secret in ("MRN-", "Doe", "1.2.5."):
        assert secret.encode() not in text and secret.encode("utf-32-le") not in text
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("by", ["study", "patient"])
@pytest.mark.parametrize(
    "ids, together",
    [
        (("ANONYMOUS",) * 4, [[0, 1], [2, 3]]),  # the study stands for the patient
        (("a", "b", "c", "d"), [[0, 1], [2, 3]]),  # the names of the files
        (("p", "q", "r", "r"), [[0, 1], [2, 3]]),  # two ids in one study are one patient
    ],
)
def test_predict_tells_patients_as_calibrate_does(tmp_path, ids, together, by):
    """Four files of two studies: the same units in both."""
    tags = {
        f"{name}.dcm": {"PatientID": who, "StudyInstanceUID": f"1.2.{k // 2}"}
        for k, (name, who) in enumerate(zip("abcd", ids))
    }
    draw_headers(tmp_path / "set", tags)
    found = headers.cohort_of_files(tmp_path / "set", sorted(tags), tmp_path / "cache")
    known = [told or name for told, name in zip(found["patient"].tolist(), sorted(tags))]
    calibrated = pooling.grouped(sorted(tags), known, found["study"], by).numbers
    key, _ = headers.key_of_call(tmp_path / "cache")
    paths = [str(tmp_path / "set" / name) for name in sorted(tags)]
    patients, studies = people_of([File(path, headers.of_file(path, key)) for path in paths], key)
    predicted = pooling.grouped(paths, patients, np.array(studies), by).numbers
    assert calibrated.tolist() == predicted.tolist() == [0, 0, 1, 1]
    assert [np.flatnonzero(predicted == k).tolist() for k in (0, 1)] == together


def test_numbers_of_other_folders_are_other_patients():
    names = [
        "ann/IM-0001-0001.png",
        "bob/IM-0001-0001.png",
        "bob/IM-0001-0002.png",
        "test/person7_virus_1.png",
    ]
    names += ["test/person7_virus_2.png", "x.png"]
    patients = ["ann/IM-0001", "bob/IM-0001", "bob/IM-0001", "person7", "person7", "x.png"]
    assert told_by_names(names) == patients


def test_predict_and_site_by_study(tmp_path):
    """predict.py and --site take the unit of the run; lateral views are left out, and counted."""
    dicom_set(tmp_path / "set", 40)
    flags = ("--data-dir", "set", "--cache-dir", "cache", "--img-size", 32)
    succeed("train_linear", *flags, cwd=tmp_path)
    succeed("calibrate", "--by", "study", "--min-recall", 0.8, "--bootstrap", 100, cwd=tmp_path)
    folder = tmp_path / "outputs" / "linear"

    # The test images have the scores and decisions that predictions.csv says.
    done = succeed("predict", "set/test", "--run", folder, cwd=tmp_path)
    assert "by study (max): 12 images are 8 studies" in done.err
    ours = list(csv.DictReader(open(folder / "predictions.csv", newline="")))
    ours = {f"set/{row['path']}": row for row in ours}
    rows = list(csv.DictReader(done.out.splitlines()))
    assert "decision@Rec" not in rows[0] and len(rows) == 12
    for row in rows:
        mine = ours[row["path"]]
        assert row["study"] == mine["study"] and row["study_decision@Rec"] == mine["study_decision@Rec"]
        assert float(row["study_p_pneumonia"]) == pytest.approx(float(mine["study_score"]), rel=1e-4)

    # A new folder: a lateral view, a picture without header, an unreadable file.
    base = {"PatientID": "new", "StudyInstanceUID": "1.2.99"}
    draw_headers(tmp_path / "new", {"a.dcm": {**base, "ViewPosition": "LL"}, "b.dcm": base, "c.dcm": base})
    Image.fromarray(full_range(32, 32)).save(tmp_path / "new" / "d.png")
    (tmp_path / "new" / "e.dcm").write_bytes(b"")
    done = cli("predict", "new", "--run", folder, cwd=tmp_path)
    assert done.code == 2 and "1 of a view that is not scored" in done.err
    assert "3 images are 2 studies; 1 images whose study is not known stand alone" in done.err
    rows = {row["path"][4:]: row for row in csv.DictReader(done.out.splitlines())}
    assert rows["a.dcm"]["note"].startswith("lateral view: not scored") and not rows["a.dcm"]["p_pneumonia"]
    scores = [float(rows[name]["p_pneumonia"]) for name in ("b.dcm", "c.dcm")]
    assert float(rows["b.dcm"]["study_p_pneumonia"]) == max(scores)
    assert rows["b.dcm"]["study_decision@Rec"] == rows["c.dcm"]["study_decision@Rec"]
    assert rows["d.png"]["study"] == "" and rows["d.png"]["study_p_pneumonia"] == rows["d.png"]["p_pneumonia"]
    assert rows["e.dcm"]["study_decision@Rec"] == ""
    done = cli("predict", "new", "--run", folder, "--views", "all", cwd=tmp_path)
    assert "4 images are 2 studies" in done.err
    refused(cli("predict", "new", "--run", folder, "--patients", "p.csv", cwd=tmp_path), "are by study")

    # A site is judged by study, too; another unit is refused.
    dicom_set(tmp_path / "elsewhere", 24, seed=1)  # the same patients, other pictures
    site = ("--site", "elsewhere/train", "--name", "there", "--min-recall", 0.8)
    done = succeed("calibrate", *site, cwd=tmp_path)
    assert "site: 48 images are 32 studies" in done.out and "16 studies of 12 patients with" in done.out
    assert "24 of its patients were seen when outputs/linear was trained" in done.err
    assert read_json(folder, "sites", "there.json")["scores"]["unit"] == ["study", "max"]
    refused(cli("calibrate", *site, "--by", "patient", cwd=tmp_path), "was calibrated by study (max)")
    succeed("calibrate", "--by", "patient", "--min-recall", 0.8, "--bootstrap", 100, cwd=tmp_path)
    done = cli("predict", "new", "--run", folder, "--site", "there", cwd=tmp_path)
    refused(done, "another unit (--by, --pool)")


def test_tables_outrank_headers(tmp_path):
    """A header fills in what a table leaves open; it knows patients better than file names do."""
    tags = {"PatientID": "p", "StudyInstanceUID": "1.2.3", "PatientAge": "045Y", "PatientSex": "F"}
    files = draw_headers(tmp_path / "in", {"person1_virus_1.dcm": tags, "b.dcm": tags})
    index = Index(
        files,
        np.zeros(2, int),
        ["table's", "b.dcm"],
        np.array([True, False]),
        np.array(["", ""]),
        cohort={"age": np.array([50.0, np.nan]), "sex": np.array(["", "M"])},
    )
    found = headers.with_headers(tmp_path / "in", index, tmp_path / "cache")
    assert found.cohort["age"].tolist() == [50, 45] and found.cohort["sex"].tolist() == ["F", "M"]
    assert found.patients == ["table's", "table's"] and found.known.all()  # one person, by both headers
    assert set(found.cohort) == {"age", "sex", "study"}  # no header tells view or machine
    named = headers.with_headers(tmp_path / "in", index, tmp_path / "cache", names_tell=True)
    assert named.patients[0] == named.patients[1] and named.patients[0].startswith("dicom-")
    several = index._replace(
        files=[*files, *draw_headers(tmp_path / "in", {"c.dcm": tags})],
        patients=["one", "two", "c.dcm"],
        known=np.array([True, True, False]),
        cohort=None,
    )
    again = headers.with_headers(tmp_path / "in", several, tmp_path / "cache")
    assert len(set(again.patients)) == 1  # two names of the table for one id: on one side, whoever is right
    plain = index._replace(files=["a.png", "b.jpg"])
    assert headers.with_headers(tmp_path / "in", plain, tmp_path / "cache") is plain


def test_a_patient_in_train_and_test_is_counted(tmp_path):
    """The parts of a set of folders number their patients anew, but an id of DICOM is one person's."""
    tags = {}
    for k in range(12):
        tags[f"train/{('NORMAL', 'PNEUMONIA')[k % 2]}/{k}a.dcm"] = {"PatientID": f"MRN{k}"}
        tags[f"test/{('NORMAL', 'PNEUMONIA')[k % 2]}/{k}b.dcm"] = {"PatientID": f"MRN{k + 8}"}
    draw_headers(tmp_path / "set", tags)
    config = data.DataConfig(data_dir=str(tmp_path / "set"), img_size=16, cache_dir=str(tmp_path / "cache"))
    info = data.load_train_val(config, tell=lambda line: None)[2]
    assert info["shared_patients_test"] == 4
