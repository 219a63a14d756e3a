"""Tests of images."""

import io
import json
import multiprocessing
import os
import random
import signal
import socket
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.console import InputError
from common.files import sha256
from images import cache, decode, find
from images.cache import load_images
from images.decode import MAX_PIXELS, RESIZES, open_dicom, read_image, to_grey
from tests.shared import SHARED, full_decode, smooth_picture

# ---------------------------------------------------------------- decoding


def test_decode_rgb_jpeg_like_pil(tmp_path):
    rgb = np.stack([smooth_picture(48, 48, seed) for seed in range(3)], axis=2)
    Image.fromarray(rgb).save(tmp_path / "a.jpeg", quality=95)
    found = decode.decode(tmp_path / "a.jpeg", 48)
    with Image.open(tmp_path / "a.jpeg") as image:
        expected = np.asarray(image.convert("L")).astype(float)
    assert found.dtype == np.uint8 and found.shape == (48, 48)
    assert np.abs(found - expected).mean() < 0.7 and np.abs(found - expected).max() <= 4


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1"])
def test_decode_png_modes(tmp_path, mode):
    grey = (smooth_picture(20, 20) > 128).astype(np.uint8) * 255
    Image.fromarray(grey).convert(mode).save(tmp_path / "a.png")
    assert np.abs(decode.decode(tmp_path / "a.png", 20).astype(int) - grey).max() <= 1


def test_resize_geometry(tmp_path):
    """200 x 100, black | white | black: squashed, cut to the white middle, or letterboxed."""
    picture = np.zeros((100, 200), np.uint8)
    picture[:, 50:150] = 255
    Image.fromarray(picture).save(tmp_path / "wide.png")
    Image.fromarray(picture.T.copy()).save(tmp_path / "tall.png")
    for name in ("wide", "tall"):
        squash, crop, pad = (
            decode.decode(tmp_path / f"{name}.png", 40, r) for r in ("squash", "crop", "pad")
        )
        if name == "tall":
            squash, crop, pad = squash.T, crop.T, pad.T
        assert (crop[1:-1, 1:-1] == 255).all() and crop.min() > 200  # the filter sees a pixel beyond the edge
        row = squash[20]
        assert (row[:9] == 0).all() and (row[11:29] == 255).all() and (row[31:] == 0).all()
        assert (squash == row).all()
        assert (pad[:9] == 0).all() and (pad[31:] == 0).all()  # 10 rows above, 20 of picture, 10 below
        assert (pad[11:29, 11:29] == 255).all() and (pad[11:29, :9] == 0).all()
        assert pad.sum() == pytest.approx(255 * 20 * 20, rel=0.01)


def test_square_pictures_are_resized_alike(tmp_path):
    Image.fromarray(smooth_picture(64, 64)).save(tmp_path / "a.png")
    squash = decode.decode(tmp_path / "a.png", 32, "squash")
    assert np.array_equal(squash, full_decode(tmp_path / "a.png", 32))
    for resize in ("pad", "crop"):
        assert np.array_equal(decode.decode(tmp_path / "a.png", 32, resize), squash)


def test_reduced_decoding_is_close_to_full(tmp_path):
    """A large JPEG is decoded at a fraction of its size, and that is not visible."""
    picture = smooth_picture(1600, 2000).astype(float) + np.random.default_rng(0).normal(0, 10, (1600, 2000))
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(tmp_path / "a.jpeg", quality=90)
    expected = full_decode(tmp_path / "a.jpeg", 64)
    assert np.abs(decode.decode(tmp_path / "a.jpeg", 64) - expected).mean() < 1


def test_reduced_decoding_of_real_originals():
    files = sorted((SHARED / "chest_xray_originals").glob("train/*/*.jpeg"))[::10]
    if not files:
        pytest.skip("no originals here")
    for path in files:
        difference = np.abs(decode.decode(path, 224) - full_decode(path, 224))
        assert difference.mean() < 1.5, path


@pytest.mark.parametrize("kind, least", [("JPEG", 15), ("PNG", 15), ("TIFF", 10), ("BMP", 10), ("WEBP", 10)])
def test_damaged_pictures_raise_oserror_only(kind, least, tmp_path):
    """Cut or changed bytes give a picture or OSError, which load_images turns into a named error."""
    rng, failures, buffer = random.Random(0), 0, io.BytesIO()
    Image.fromarray(smooth_picture(40, 40)).save(buffer, kind)
    for trial in range(80):
        raw = bytearray(buffer.getvalue())
        if trial % 5 == 0:
            del raw[rng.randrange(len(raw)) :]
        else:  # every second one in the header
            raw[rng.randrange(len(raw) if trial % 2 else min(len(raw), 100))] = rng.randrange(256)
        try:
            (tmp_path / "picture").write_bytes(raw)
            image = decode.decode(tmp_path / "picture", 16)
            assert image.shape == (16, 16) and image.dtype == np.uint8
        except OSError:
            failures += 1
    assert failures >= least


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_pixels_are_refused(value):
    picture = Image.fromarray(np.array([[0, 100], [200, value]], np.float32))
    with pytest.raises(OSError, match="NaN or infinite"):
        to_grey(picture)


@pytest.mark.parametrize("kind", ["GIF", "DDS", "PPM", "ICO", "TGA"])
def test_other_formats_are_refused_whatever_their_name(tmp_path, kind):
    for name in ("x.jpg", "x.png"):
        Image.fromarray(smooth_picture(32, 32)).save(tmp_path / name, kind)
        for read in (decode.decode, read_image):
            with pytest.raises(
                OSError, match="^not a file that is read .JPEG, PNG, TIFF, BMP, WebP and DICOM"
            ):
                read(tmp_path / name, 16)


ERRORS = [
    StopIteration(),
    KeyError("PixelData"),
    struct.error("unpack requires 4 bytes"),
    NotImplementedError("BLP7"),
    IndexError("tuple index"),
    RuntimeError("tables"),
    TypeError("None"),
    SyntaxError("broken PNG file"),
    SystemError("tile"),
    RecursionError("depth"),
    MemoryError(),
    AssertionError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: repr(type(error)))
def test_whatever_one_file_raises_is_an_oserror(tmp_path, monkeypatch, error):
    Image.fromarray(smooth_picture(32, 32)).save(tmp_path / "a.png")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    for read in (decode.decode, read_image):
        with pytest.raises(OSError, match=type(error).__name__) as found:
            read(tmp_path / "a.png", 16)
        assert type(found.value) is OSError and "\n" not in str(found.value)


def test_interruption_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    Image.fromarray(smooth_picture(32, 32)).save(tmp_path / "a.png")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode.decode(tmp_path / "a.png", 16)


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def jpeg_header(width, height):
    """A JPEG whose header claims another size."""
    buffer = io.BytesIO()
    Image.fromarray(smooth_picture(32, 32)).save(buffer, "jpeg")
    raw = bytearray(buffer.getvalue())
    at = raw.index(b"\xff\xc0") + 5  # marker, length, bits a sample, then height and width
    raw[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(raw)


@pytest.mark.parametrize(
    "raw", [png_header(100_000, 10_000), jpeg_header(65_000, 16_000)], ids=["png", "jpeg"]
)
def test_header_of_a_billion_pixels_is_refused(tmp_path, raw):
    (tmp_path / "a.png").write_bytes(raw)
    for resize in RESIZES:
        for read in (decode.decode, read_image):
            with pytest.raises(OSError, match="exceeds limit"):
                read(tmp_path / "a.png", 16, resize)


def test_long_narrow_picture_is_not_padded_to_a_huge_square(tmp_path):
    """20,000 x 2 pixels are a file of a few hundred bytes; the square around them takes 400 MB."""
    Image.new("L", (20_000, 2)).save(tmp_path / "a.png")
    with pytest.raises(OSError, match="too many to be padded"):
        decode.decode(tmp_path / "a.png", 16, "pad")
    for resize in ("squash", "crop"):
        assert decode.decode(tmp_path / "a.png", 16, resize).shape == (16, 16)


def test_read_image_gives_size_and_colourfulness(tmp_path):
    rgb = np.zeros((30, 40, 3), np.uint8)
    rgb[:, :20, 0] = 255  # half red, half black
    Image.fromarray(rgb).save(tmp_path / "red.png")
    pixels, size, colour = read_image(tmp_path / "red.png", 16, "crop")
    assert size == (40, 30) and colour == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(pixels, decode.decode(tmp_path / "red.png", 16, "crop"))
    grey = smooth_picture(30, 40)
    for mode in ("L", "RGB"):
        Image.fromarray(grey).convert(mode).save(tmp_path / "grey.png")
        assert read_image(str(tmp_path / "grey.png"), 16)[1:] == ((40, 30), 0.0)


# ---------------------------------------------------------------- orientation

UPRIGHT = {  # orientation tag -> the upright picture of what is stored, as Exif 2.32 (4.6.4) defines it
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: a.T[:, ::-1],
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: a.T[::-1],
}


def stored_as(picture, tag):
    """The picture as a file with this orientation tag stores it."""
    views = (np.ascontiguousarray(change(picture)) for change in UPRIGHT.values())
    return next(view for view in views if np.array_equal(UPRIGHT[tag](view), picture))


def exif_of(tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif.tobytes()


@pytest.mark.parametrize("tag", UPRIGHT)
@pytest.mark.parametrize("kind", ["png", "16 bit png", "webp", "tiff", "lzw tiff", "16 bit tiff", "jpeg"])
def test_orientation_is_undone(tmp_path, kind, tag):
    """Stored in any of the eight ways: the very same picture and size; of a JPEG, to rounding."""
    picture, form, deep = smooth_picture(40, 64), kind.split()[-1], kind.startswith("16")
    if deep:
        picture = picture.astype(np.uint16) * 200
    stored, exif = stored_as(picture, tag), exif_of(tag)
    how = {"webp": dict(lossless=True), "jpeg": dict(quality=95), "tiff": dict(compression=None)}.get(
        form, {}
    )
    if kind == "lzw tiff":
        how = dict(compression="tiff_lzw")
    for name, pixels, about in (("a", picture, {}), ("b", stored, dict(exif=exif))):
        if form == "tiff" and about:
            about = dict(tiffinfo={0x0112: tag})
        Image.fromarray(pixels).save(tmp_path / name, form, **how, **about)
    for resize in RESIZES:
        plain, size, _ = read_image(tmp_path / "a", 16, resize)
        found, upright_size, _ = read_image(tmp_path / "b", 16, resize)
        assert upright_size == size == (64, 40)
        assert np.abs(found.astype(int) - plain).max() <= (2 if form == "jpeg" else 0)
        assert np.array_equal(decode.decode(tmp_path / "b", 16, resize), found)


@pytest.mark.parametrize("tag", UPRIGHT)
def test_orientation_of_a_jpeg_that_is_decoded_at_reduced_scale(tmp_path, tag):
    picture = smooth_picture(640, 1200)
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(stored_as(picture, tag)).save(tmp_path / "b.jpg", quality=95, exif=exif_of(tag))
    (a, size, _), (b, turned, _) = (read_image(tmp_path / name, 32) for name in ("a.jpg", "b.jpg"))
    assert size == turned == (1200, 640) and np.abs(a.astype(int) - b).max() <= 2


@pytest.mark.parametrize("raw", [b"II*\0\xff\xff\xff\xff", b"no tags at all", b""])
def test_damaged_exif_data_do_not_spoil_a_good_picture(tmp_path, raw):
    Image.fromarray(smooth_picture(32, 32)).save(tmp_path / "a.jpg")
    Image.fromarray(smooth_picture(32, 32)).save(tmp_path / "b.jpg", exif=b"Exif\0\0" + raw)
    assert np.array_equal(decode.decode(tmp_path / "a.jpg", 16), decode.decode(tmp_path / "b.jpg", 16))
    for tag in (0, 9, 77):
        Image.fromarray(smooth_picture(32, 32)).save(tmp_path / "b.jpg", exif=exif_of(tag))
        assert np.array_equal(decode.decode(tmp_path / "a.jpg", 16), decode.decode(tmp_path / "b.jpg", 16))


def test_turned_case():
    folder = SHARED / "cases/exif_orientation"
    if not folder.exists():
        pytest.skip("../shared is absent")
    turned, upright = (decode.decode(folder / name, 224).astype(int) for name in ("exif3.jpg", "upright.png"))
    assert np.abs(turned - upright).mean() < 1.5


# ---------------------------------------------------------------- grey range


def stretched(values):
    """The grey range by its definition, on sorted values: percentiles between the two nearest ranks."""
    order = np.sort(np.asarray(values, dtype=float).ravel())
    ends = []
    for share in (0.005, 0.995):
        at = share * (len(order) - 1)
        below = int(at)
        ends.append(order[below] + (at - below) * (order[min(below + 1, len(order) - 1)] - order[below]))
    low, high = ends
    return ((np.asarray(values, dtype=float) - low) / (high - low) * 255).round().clip(0, 255)


def deep_picture(top=4095):
    """A picture of whole numbers from 0 to about `top`, a few markers and dead pixels in it."""
    picture = np.random.default_rng(0).normal(0.5, 0.12, (60, 60)).clip(0.1, 0.9)
    picture += smooth_picture(60, 60) / 2000
    picture[:2, :3], picture[5, 7] = 1, 0
    return (picture / picture.max() * top).round().astype(np.uint16)


@pytest.mark.parametrize("kind", ["png", "tiff", "lzw", "float", "signed", "big", "inverted"])
def test_grey_range_of_deep_files(tmp_path, kind):
    """Against the definition, at full size."""
    values, path = deep_picture(), tmp_path / "x"
    if kind == "png":
        Image.fromarray(values).save(path, "PNG")
    elif kind in ("tiff", "lzw"):
        Image.fromarray(values).save(path, "TIFF", compression="tiff_lzw" if kind == "lzw" else None)
    elif kind == "float":
        Image.fromarray((values / 7 - 100).astype(np.float32)).save(path, "TIFF")
    else:
        signed = values.astype(np.int32) - 1000
        pixels = {"signed": signed.astype("<i2"), "big": values.astype("<u4") * 1_000_000, "inverted": values}
        path.write_bytes(tiff(pixels[kind], photometric=0 if kind == "inverted" else 1))
    expected = stretched(4095 - values.astype(int)) if kind == "inverted" else stretched(values)
    assert np.abs(decode.decode(path, 60) - expected).max() <= (1 if kind == "float" else 0)


def tiff(pixels, photometric=1, changes=()):
    """A TIFF by hand, little endian, one strip; `changes`: {tag: another value, or None to leave it out}."""
    kind = 2 if pixels.dtype.kind == "i" else 1
    height, width = pixels.shape
    tags = {256: width, 257: height, 258: 8 * pixels.itemsize, 259: 1, 262: photometric, 273: 8, 277: 1}
    tags |= {278: height, 279: pixels.nbytes, 339: kind, **dict(changes)}
    kept = sorted((tag, value) for tag, value in tags.items() if value is not None)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in kept)
    directory = struct.pack("<H", len(kept)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + pixels.nbytes) + pixels.tobytes() + directory


def test_tiff_of_signed_bytes(tmp_path):
    ramp = np.repeat(np.arange(-128, 128, dtype=np.int8)[None], 64, axis=0)
    (tmp_path / "a.tif").write_bytes(tiff(ramp))
    found = decode.decode(tmp_path / "a.tif", 64)
    assert (np.diff(found.astype(int), axis=1) >= 0).all() and found[0, 0] < 5 and found[0, -1] > 250


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_depth_decides_nothing(tmp_path, kind):
    """10, 12, 14 and 16 bits: one picture; and one marker pixel changes nothing."""
    seen = []
    for bits in (10, 12, 14, 16):
        values = deep_picture(2**bits - 1)
        Image.fromarray(values).save(tmp_path / "a", kind)
        seen.append(decode.decode(tmp_path / "a", 60).astype(int))
        Image.fromarray(np.maximum(values, 0) // 2).save(tmp_path / "a", kind)
        seen.append(decode.decode(tmp_path / "a", 60).astype(int))
        values[30, 30] = 65535
        Image.fromarray(values).save(tmp_path / "a", kind)
        marked = decode.decode(tmp_path / "a", 60).astype(int)
        marked[30, 30] = seen[0][30, 30]
        seen.append(marked)
    assert all(np.abs(one - seen[0]).max() <= 2 for one in seen)


def test_depth_cases():
    files = sorted((SHARED / "cases/png_bit_depth").glob("*.png"))
    if not files:
        pytest.skip("../shared is absent")
    seen = [decode.decode(file, 224).astype(int) for file in files]
    assert len(seen) == 4 and all(np.abs(one - seen[0]).max() <= 1 for one in seen)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_deep_png_in_colour(tmp_path, mode):
    """12 bits in three or two channels of 16: Pillow alone would keep the upper 8, which are nearly black."""
    values = deep_picture()
    count, colour = {"RGB": (3, 2), "RGBA": (4, 6), "LA": (2, 4)}[mode]
    channels = np.repeat(values[:, :, None], count, axis=2)
    if mode != "RGB":
        channels[:, :, -1] = 65535
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in channels)

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 60, 60, 16, colour, 0, 0, 0)
    raw = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + raw)
    assert np.abs(decode.decode(tmp_path / "a.png", 60) - stretched(values)).max() <= 1
    pixels, size, _ = read_image(tmp_path / "a.png", 60)
    assert size == (60, 60) and np.array_equal(pixels, decode.decode(tmp_path / "a.png", 60))


def test_deep_files_without_a_picture(tmp_path):
    flat = np.full((40, 40), 700, np.uint16)
    Image.fromarray(flat).save(tmp_path / "a.png")
    with pytest.raises(OSError, match="all pixels of the image are equal"):
        decode.decode(tmp_path / "a.png", 16)
    flat[3, 3] = 65535
    Image.fromarray(flat).save(tmp_path / "a.png")
    with pytest.raises(OSError, match="hardly any pixel"):
        decode.decode(tmp_path / "a.png", 16)
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "b.png")  # of 8 bits: as it is
    assert (decode.decode(tmp_path / "b.png", 8) == 7).all()
    pixels = np.full((40, 40), np.nan, np.float32)
    Image.fromarray(pixels).save(tmp_path / "c.png", "TIFF")
    with pytest.raises(OSError, match="NaN or infinite"):
        read_image(tmp_path / "c.png", 16)


def test_eight_bits_stay_as_they_are(tmp_path):
    """TIFF, BMP and lossless WebP, grey and colour: the very pixels of the PNG, which are Pillow's own."""
    grey = smooth_picture(48, 48) // 2
    for picture in (grey, np.stack([grey, grey // 2, 255 - grey], axis=2)):
        Image.fromarray(picture).save(tmp_path / "a.png")
        expected = full_decode(tmp_path / "a.png", 48)
        for kind, how in (("PNG", {}), ("TIFF", {}), ("BMP", {}), ("WEBP", dict(lossless=True))):
            for name in ("x.dcm", "x.jpg", "IM_0001"):  # whatever the file is called
                Image.fromarray(picture).save(tmp_path / name, kind, **how)
                assert np.array_equal(read_image(tmp_path / name, 48)[0], expected)
    inverted = tmp_path / "w.tif"
    inverted.write_bytes(tiff(grey, photometric=0))
    assert np.array_equal(decode.decode(inverted, 48), 255 - grey)


def test_pictures_of_several_pages_are_refused(tmp_path):
    pages = [Image.fromarray(smooth_picture(20, 20, seed)) for seed in range(3)]
    for kind, name in (("TIFF", "a.tif"), ("WEBP", "a.webp"), ("PNG", "a.png")):
        pages[0].save(tmp_path / name, kind, save_all=True, append_images=pages[1:])
        for read in (decode.decode, read_image):
            with pytest.raises(OSError, match=f"a {kind} file of several pages or frames"):
                read(tmp_path / name, 16)
    pages[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=pages[1:])  # previews follow
    pages[0].save(tmp_path / "b.jpg", "JPEG")
    assert np.array_equal(decode.decode(tmp_path / "a.jpg", 20), decode.decode(tmp_path / "b.jpg", 20))


def test_headers_that_promise_too_much(tmp_path):
    """Refused before anything is allocated: a huge picture, and a small one in a huge tile."""
    picture, path = smooth_picture(20, 20), tmp_path / "a"
    Image.fromarray(picture).save(path, "BMP")
    bitmap = bytearray(path.read_bytes())
    bitmap[18:26] = struct.pack("<ii", 20_000, 10_000)
    tile = {273: None, 278: None, 279: None, 322: 50_000, 323: 50_000, 324: 8, 325: 400}
    for raw in (bitmap, tiff(picture, changes={256: 20_000, 257: 10_000}), tiff(picture, changes=tile)):
        path.write_bytes(raw)
        for read in (decode.decode, read_image):
            with pytest.raises(OSError, match=f"limit of {MAX_PIXELS}"):
                read(path, 16)


def test_deep_tiff_in_colour_says_what_to_do(tmp_path):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "a.tif", "TIFF")
    raw = bytearray((tmp_path / "a.tif").read_bytes())
    at = raw.index(struct.pack("<HHI", 258, 3, 3))  # bits of the three channels, which stand elsewhere
    where = struct.unpack("<I", raw[at + 8 : at + 12])[0]
    raw[where : where + 6] = struct.pack("<HHH", 16, 16, 16)
    (tmp_path / "a.tif").write_bytes(raw)
    with pytest.raises(OSError, match="colour TIFF of 16 bits: save it as grey"):
        decode.decode(tmp_path / "a.tif", 16)


# ---------------------------------------------------------------- not regular files


@pytest.fixture
def no_hang():
    """Fail a test that waits for a named pipe instead of letting it wait for ever."""

    def fail(*args):
        pytest.fail("still waiting after 20 seconds")

    old = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def make_odd(path, kind):
    """Something that is not a regular file, at `path`."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))  # the full path may be too long for a socket
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_only_regular_files_are_opened(tmp_path, monkeypatch, no_hang, kind):
    pytest.importorskip("pydicom")
    monkeypatch.chdir(tmp_path)
    readers = {"a.jpg": decode.decode, "b.png": read_image, "c.dcm": read_image}
    for name, read in readers.items():
        make_odd(tmp_path / name, kind)
        with pytest.raises(OSError, match="not a "):
            read(tmp_path / name, 16)
    with pytest.raises(OSError, match="not a "):
        open_dicom(tmp_path / "c.dcm")
    Image.fromarray(smooth_picture(32, 32)).save(tmp_path / "good.png")
    search = find.Search()
    assert list(find.find_files(["."], search)) == ["./good.png"]
    assert search.passed == ({} if kind == "folder" else {"no regular files": 3})
    if kind != "folder":
        named = [str(tmp_path / name) for name in readers]
        assert list(find.find_files(named, search)) == named  # read_image gives the reason in each one's row
        assert list(find.find_files(["*.jpg", "g*"], search)) == ["a.jpg", "good.png"]


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_empty_and_text_files_are_refused(tmp_path, content):
    pytest.importorskip("pydicom")
    for name in ("a.jpeg", "a.png", "a.dcm"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError, match="empty|^not a file that is read"):
            read_image(tmp_path / name, 16)
    with pytest.raises(OSError):
        read_image(tmp_path / "absent.png", 16)
    with pytest.raises(OSError, match="null byte|null character"):
        read_image("a\0b.png", 16)


# ---------------------------------------------------------------- the cache


def load_small(config, **changes):
    """The training images of `small_set`: names, pixels, readable rows."""
    root = Path(config.data_dir)
    files = sorted(p.relative_to(root).as_posix() for p in root.glob("train/*/*"))
    settings = dict(size=config.img_size, resize="squash", cache_dir=config.cache_dir, skip_bad=False)
    pixels, rows, levels, sizes, *_ = load_images(root, files, **{**settings, "name": "train", **changes})
    assert rows.dtype == np.int64 and pixels.dtype == np.uint8
    assert sizes == {"width": [20, 20], "height": [20, 20]}  # of the originals
    expected = [(image.mean() / 255, image.std() / 255) for image in pixels[rows]]
    assert np.allclose(levels, expected, atol=1e-12)
    return files, np.array(pixels), rows.tolist()


EXPECTED_VALUES = [10 * i for i in range(12)] + [100 + 10 * i for i in range(12)]


def cache_file(config):
    [path] = Path(config.cache_dir).glob("*.npy")
    return path


def test_cache_is_reused(small_set):
    _, pixels, kept = load_small(small_set)
    assert pixels[:, 8, 8].tolist() == EXPECTED_VALUES and kept == list(range(24))
    stat = os.stat(cache_file(small_set))
    _, again, _ = load_small(small_set)
    assert np.array_equal(pixels, again)
    assert (os.stat(cache_file(small_set)).st_mtime_ns, os.stat(cache_file(small_set)).st_ino) == (
        stat.st_mtime_ns,
        stat.st_ino,
    )
    assert not list(Path(small_set.cache_dir).glob(".*"))


@pytest.mark.parametrize(
    "damage",
    [
        "image changed",
        "image replaced in the same second",
        "byte flipped",
        "truncated",
        "emptied",
        "array missing",
        "description missing",
        "description damaged",
        "description changed",
    ],
)
def test_cache_is_rebuilt(small_set, damage):
    """A stale or damaged cache never reaches a model."""
    files, _, _ = load_small(small_set)
    path = cache_file(small_set)
    side = path.with_suffix(".json")
    expected = list(EXPECTED_VALUES)
    if damage.startswith("image"):
        image = Path(small_set.data_dir, files[5])
        before = os.stat(image)
        Image.fromarray(np.full((20, 20), 222, np.uint8)).save(image)
        expected[5] = 222
        if damage != "image changed":
            os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    elif damage == "byte flipped":
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "array missing":
        path.unlink()
    elif damage == "description missing":
        side.unlink()
    elif damage == "description damaged":
        side.write_bytes(side.read_bytes()[:-20])
    elif damage == "description changed":  # still JSON, but it would read image 3 in the place of image 4
        value = json.loads(side.read_text())
        value["kept"][4] = 3
        side.write_text(json.dumps(value))
    _, again, kept = load_small(small_set)
    assert again[:, 8, 8].tolist() == expected and kept == list(range(24))


def test_why_a_cache_is_rebuilt_and_which_images_are_bad(small_set, capsys):
    """No damage is claimed of a cache of other files; messages say training, and no name of a cache."""
    files, _, _ = load_small(small_set)
    path = cache_file(small_set)
    Path(small_set.data_dir, files[3]).write_bytes(b"no picture")
    name = "train-3df6c216"
    place = dict(root=small_set.data_dir, cache_dir=small_set.cache_dir, size=16, resize="squash")
    with pytest.raises(InputError, match=f"^1 of 24 training images in {small_set.data_dir} cannot be read"):
        load_images(files=files, skip_bad=False, name=name, **place)
    capsys.readouterr()
    with pytest.raises(InputError):
        load_small(small_set)
    assert f"cache {path} is of other files or settings: rebuilding it" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError):
        load_small(small_set)
    assert f"cache {path} is damaged: rebuilding it" in capsys.readouterr().err


def test_caches_of_other_settings_do_not_mix(small_set):
    load_small(small_set)
    assert load_small(small_set, size=8)[1].shape == (24, 8, 8)
    load_small(small_set, resize="pad")
    assert len(list(Path(small_set.cache_dir).glob("*.npy"))) == 3
    extra = Path(small_set.data_dir, "train/NORMAL/new.png")
    Image.fromarray(np.full((20, 20), 7, np.uint8)).save(extra)
    files, pixels, _ = load_small(small_set)
    assert pixels[files.index("train/NORMAL/new.png")].max() == 7 and len(pixels) == 25


def test_cache_of_this_version_stays_valid(small_set):
    """The key and the file's name are those of version 7: changing either would decode every set again."""
    files, _, _ = load_small(small_set)
    root = Path(small_set.data_dir)
    stats = [os.stat(root / file) for file in files]
    key = [7, 16, "squash", [[f, s.st_size, s.st_mtime_ns] for f, s in zip(files, stats)]]
    assert json.loads(cache_file(small_set).with_suffix(".json").read_text())["key"] == sha256(key)
    place = sha256([str(root.resolve()), "train", 16, "squash"])[:8]
    assert cache_file(small_set).name == f"set-train-16-squash-{place}.npy"


def test_bad_files_are_named_or_skipped(small_set, capsys, no_hang):
    train = Path(small_set.data_dir, "train")
    cut, text, pipe, link = (
        train / f for f in ("NORMAL/n03.jpeg", "PNEUMONIA/x.png", "NORMAL/p.png", "NORMAL/q.png")
    )
    Image.fromarray(smooth_picture(64, 64)).save(cut)
    cut.write_bytes(cut.read_bytes()[:300])
    text.write_text("not an image")
    os.mkfifo(pipe)
    link.symlink_to("nowhere")
    names = "(?s)4 of 28 training .*NORMAL/n03.jpeg.*NORMAL/p.png.*NORMAL/q.png.*PNEUMONIA/x.png.*--skip-bad"
    for _ in range(2):  # decoded now, then from the cache
        with pytest.raises(InputError, match=names):
            load_small(small_set)
    capsys.readouterr()
    files, pixels, rows = load_small(small_set, skip_bad=True)
    assert "left out 4 of 28" in capsys.readouterr().err
    assert [files[i] for i in rows] == [f for f in files if Path(f).name[1:].removesuffix(".png").isdigit()]
    assert pixels[rows, 8, 8].tolist() == EXPECTED_VALUES  # names and pixels still belong together
    Image.fromarray(np.full((20, 20), 1, np.uint8)).save(cut)  # mended: used again
    for path in (text, pipe, link):
        path.unlink()
    assert load_small(small_set)[2] == list(range(25))


def test_images_that_can_be_read_later_are_read_again(small_set, monkeypatch, capsys):
    """A decoder that is installed changes neither the size nor the time of a file."""
    good = cache._decode

    def without_decoder(path, size, resize):
        if path.name == "n03.jpeg":
            raise OSError("needs other packages")
        return good(path, size, resize)

    Image.fromarray(np.full((20, 20), 9, np.uint8)).save(Path(small_set.data_dir, "train/NORMAL/n03.jpeg"))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_decode", without_decoder)
        for _ in range(2):
            files, _, rows = load_small(small_set, skip_bad=True)
            assert len(rows) == len(files) - 1
    capsys.readouterr()
    files, pixels, rows = load_small(small_set)
    assert len(rows) == len(files) and pixels[files.index("train/NORMAL/n03.jpeg")].max() == 9
    assert "lacks images that can be read now" in capsys.readouterr().err
    load_small(small_set)
    assert "rebuilding" not in capsys.readouterr().err


def test_no_readable_image_is_an_input_error(tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    settings = dict(size=8, resize="pad", cache_dir=tmp_path / "cache", name="train")
    with pytest.raises(InputError, match="1 of 1 .* none is left: a.png .not a file that is read"):
        load_images(tmp_path, ["a.png"], skip_bad=True, **settings)


def test_names_that_are_not_unicode(small_set):
    """Linux allows any bytes in a name; they travel as surrogates and come back from the cache unchanged."""
    folder = os.fsencode(Path(small_set.data_dir, "train", "NORMAL"))
    good, bad = (folder + b"/" + name for name in (b"z\xff1.png", b"z\xff2.png"))
    try:
        with open(bad, "wb") as f:
            f.write(b"not an image")
    except OSError:
        pytest.skip("this file system allows only Unicode names")
    with open(good, "wb") as f:
        Image.fromarray(np.full((20, 20), 55, np.uint8)).save(f, "png")
    for _ in range(2):
        with pytest.raises(InputError) as found:
            load_small(small_set)
        assert "z\udcff2.png (not a file that is read" in str(found.value)
    os.unlink(bad)
    for _ in range(2):
        files, pixels, rows = load_small(small_set)
        assert pixels[files.index("train/NORMAL/z\udcff1.png"), 8, 8] == 55 and len(rows) == 25
    names = [Path(name).name for name in find.Search().walk(os.fsdecode(folder))]
    assert "z\udcff1.png" in names and len(names) == 13
    assert read_image(os.fsdecode(good), 8)[0].max() == 55


def test_decoding_says_what_remains(small_set, monkeypatch, capsys):
    """In a log, which is what the tests' standard error is: one line each half minute."""
    clock = iter(range(0, 10**6, 4))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    load_small(small_set)
    lines = [line for line in capsys.readouterr().err.splitlines() if "min left" in line]
    assert len(lines) == 3 and all("decoding" in line and "of 24 images" in line for line in lines)
    done = [int(line.split(" of 24")[0].split()[-1]) for line in lines]
    assert done == [8, 16, 24]
    assert 1 < float(lines[0].split()[-3]) < 1.3  # 16 images at 4 s each
    load_small(small_set)
    assert capsys.readouterr().err == ""  # nothing to decode


def test_kill_while_the_cache_is_built(synthetic, tmp_path):
    """kill -9 in the middle of decoding leaves no cache that could be trusted; the next run builds it."""
    files = sorted(str(p.relative_to(synthetic)) for p in synthetic.glob("train/*/*"))
    folder, real = tmp_path / "cache", cache._decode
    settings = dict(size=32, resize="squash", cache_dir=str(folder), skip_bad=False, name="train")

    def slow(*arguments):
        time.sleep(0.3)
        return real(*arguments)

    def build():
        cache._decode = slow  # of this process alone
        cache.load_images(synthetic, files, **settings)

    process = multiprocessing.get_context("fork").Process(target=build)
    process.start()
    deadline = time.time() + 60
    while not list(folder.glob(".*.npy")) and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.4)
    process.kill()
    process.join(timeout=60)
    assert process.exitcode == -9
    # Only the unfinished temporary file.
    assert list(folder.glob(".*.npy")) and not list(folder.glob("[!.]*"))
    cache.load_images(synthetic, files, **settings)
    assert not list(folder.glob(".*"))
    [path] = folder.glob("[!.]*-train-*.npy")
    assert np.array_equal(np.load(path), np.stack([decode.decode(synthetic / f, 32) for f in files]))
