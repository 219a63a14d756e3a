"""Tests of images."""

import io
import json
import os
import random
import shutil
import signal
import socket
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import images
import listing
from common import InputError, sha256
from tests.shared import REPO, SHARED, full_decode, popen, smooth_picture

# ---------------------------------------------------------------- decoding


def test_decode_rgb_jpeg_like_pil(tmp_path):
    rgb = np.stack([smooth_picture(48, 48, seed) for seed in range(3)], axis=2)
    Image.fromarray(rgb).save(tmp_path / "a.jpeg", quality=95)
    found = images.decode(tmp_path / "a.jpeg", 48)
    with Image.open(tmp_path / "a.jpeg") as image:
        expected = np.asarray(image.convert("L")).astype(float)
    assert found.dtype == np.uint8 and found.shape == (48, 48)
    assert np.abs(found - expected).mean() < 0.7 and np.abs(found - expected).max() <= 4


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1"])
def test_decode_png_modes(tmp_path, mode):
    grey = (smooth_picture(20, 20) > 128).astype(np.uint8) * 255
    Image.fromarray(grey).convert(mode).save(tmp_path / "a.png")
    assert np.abs(images.decode(tmp_path / "a.png", 20).astype(int) - grey).max() <= 1


def test_resize_geometry(tmp_path):
    """200 x 100, black | white | black: squashed, cut to the white middle, or letterboxed."""
    picture = np.zeros((100, 200), np.uint8)
    picture[:, 50:150] = 255
    Image.fromarray(picture).save(tmp_path / "wide.png")
    Image.fromarray(picture.T.copy()).save(tmp_path / "tall.png")
    for name in ("wide", "tall"):
        squash, crop, pad = (
            images.decode(tmp_path / f"{name}.png", 40, r) for r in ("squash", "crop", "pad")
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
    squash = images.decode(tmp_path / "a.png", 32, "squash")
    assert np.array_equal(squash, full_decode(tmp_path / "a.png", 32))
    for resize in ("pad", "crop"):
        assert np.array_equal(images.decode(tmp_path / "a.png", 32, resize), squash)


def test_reduced_decoding_is_close_to_full(tmp_path):
    """A large JPEG is decoded at a fraction of its size, and that is not visible."""
    picture = smooth_picture(1600, 2000).astype(float) + np.random.default_rng(0).normal(0, 10, (1600, 2000))
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(tmp_path / "a.jpeg", quality=90)
    expected = full_decode(tmp_path / "a.jpeg", 64)
    assert np.abs(images.decode(tmp_path / "a.jpeg", 64) - expected).mean() < 1


def test_reduced_decoding_of_real_originals():
    files = sorted((SHARED / "chest_xray_originals").glob("train/*/*.jpeg"))[::10]
    if not files:
        pytest.skip("no originals here")
    for path in files:
        difference = np.abs(images.decode(path, 224) - full_decode(path, 224))
        assert difference.mean() < 1.5, path


def test_damaged_pictures_raise_oserror_only():
    """Cut or changed bytes give a picture or OSError, which load_images turns into a named error."""
    rng, failures = random.Random(0), 0
    for kind in ("jpeg", "png"):
        buffer = io.BytesIO()
        Image.fromarray(smooth_picture(40, 40)).save(buffer, kind)
        for trial in range(250):
            raw = bytearray(buffer.getvalue())
            if trial % 5 == 0:
                del raw[rng.randrange(len(raw)) :]
            else:
                raw[rng.randrange(min(len(raw), 400 if trial % 2 else len(raw)))] = rng.randrange(256)
            try:
                image = images.decode(io.BytesIO(raw), 16)
                assert image.shape == (16, 16) and image.dtype == np.uint8
            except OSError:
                failures += 1
    assert failures > 100


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_pixels_are_refused(value):
    picture = Image.fromarray(np.array([[0, 100], [200, value]], np.float32))
    with pytest.raises(OSError, match="NaN or infinite"):
        images.to_grey(picture)


@pytest.mark.parametrize("kind", ["GIF", "DDS", "PPM", "ICO", "TGA"])
def test_other_formats_are_refused_whatever_their_name(tmp_path, kind):
    for name in ("x.jpg", "x.png"):
        Image.fromarray(smooth_picture(32, 32)).save(tmp_path / name, kind)
        for read in (images.decode, images.read_image):
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
    for read in (images.decode, images.read_image):
        with pytest.raises(OSError, match=type(error).__name__) as found:
            read(tmp_path / "a.png", 16)
        assert type(found.value) is OSError and "\n" not in str(found.value)


def test_interruption_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    Image.fromarray(smooth_picture(32, 32)).save(tmp_path / "a.png")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        images.decode(tmp_path / "a.png", 16)


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
    for resize in images.RESIZES:
        for read in (images.decode, images.read_image):
            with pytest.raises(OSError, match="exceeds limit"):
                read(tmp_path / "a.png", 16, resize)


def test_long_narrow_picture_is_not_padded_to_a_huge_square(tmp_path):
    """20,000 x 2 pixels are a file of a few hundred bytes; the square around them takes 400 MB."""
    Image.new("L", (20_000, 2)).save(tmp_path / "a.png")
    with pytest.raises(OSError, match="too many to be padded"):
        images.decode(tmp_path / "a.png", 16, "pad")
    for resize in ("squash", "crop"):
        assert images.decode(tmp_path / "a.png", 16, resize).shape == (16, 16)


def test_read_image_gives_size_and_colourfulness(tmp_path):
    rgb = np.zeros((30, 40, 3), np.uint8)
    rgb[:, :20, 0] = 255  # half red, half black
    Image.fromarray(rgb).save(tmp_path / "red.png")
    pixels, size, colour = images.read_image(tmp_path / "red.png", 16, "crop")
    assert size == (40, 30) and colour == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(pixels, images.decode(tmp_path / "red.png", 16, "crop"))
    grey = smooth_picture(30, 40)
    for mode in ("L", "RGB"):
        Image.fromarray(grey).convert(mode).save(tmp_path / "grey.png")
        assert images.read_image(str(tmp_path / "grey.png"), 16)[1:] == ((40, 30), 0.0)


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
    readers = {"a.jpg": images.decode, "b.png": images.read_image, "c.dcm": images.read_image}
    for name, read in readers.items():
        make_odd(tmp_path / name, kind)
        with pytest.raises(OSError, match="not a "):
            read(tmp_path / name, 16)
    with pytest.raises(OSError, match="not a "):
        images.open_dicom(tmp_path / "c.dcm")
    Image.fromarray(smooth_picture(32, 32)).save(tmp_path / "good.png")
    search = listing.Search()
    assert list(listing.find_files(["."], search)) == ["./good.png"]
    assert search.passed == ({} if kind == "folder" else {"no regular files": 3})
    if kind != "folder":
        named = [str(tmp_path / name) for name in readers]
        assert (
            list(listing.find_files(named, search)) == named
        )  # read_image gives the reason in each one's row
        assert list(listing.find_files(["*.jpg", "g*"], search)) == ["a.jpg", "good.png"]


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_empty_and_text_files_are_refused(tmp_path, content):
    pytest.importorskip("pydicom")
    for name in ("a.jpeg", "a.png", "a.dcm"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError, match="empty|^not a file that is read"):
            images.read_image(tmp_path / name, 16)
    with pytest.raises(OSError):
        images.read_image(tmp_path / "absent.png", 16)
    with pytest.raises(OSError, match="null byte|null character"):
        images.read_image("a\0b.png", 16)


# ---------------------------------------------------------------- the cache


def load_small(config, **changes):
    """The training images of `small_set`: names, pixels, readable rows."""
    root = Path(config.data_dir)
    files = sorted(p.relative_to(root).as_posix() for p in root.glob("train/*/*"))
    settings = dict(size=config.img_size, resize="squash", cache_dir=config.cache_dir, skip_bad=False)
    pixels, rows, levels, sizes, *_ = images.load_images(
        root, files, **{**settings, "name": "train", **changes}
    )
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
    """The key and the file's name are those of version 5: changing either would decode every set again."""
    files, _, _ = load_small(small_set)
    root = Path(small_set.data_dir)
    stats = [os.stat(root / file) for file in files]
    key = [5, 16, "squash", [[f, s.st_size, s.st_mtime_ns] for f, s in zip(files, stats)]]
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
    names = "(?s)4 of 28 train .*NORMAL/n03.jpeg.*NORMAL/p.png.*NORMAL/q.png.*PNEUMONIA/x.png.*--skip-bad"
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


def test_no_readable_image_is_an_input_error(tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    settings = dict(size=8, resize="pad", cache_dir=tmp_path / "cache", name="train")
    with pytest.raises(InputError, match="1 of 1 .* none is left: a.png .not a file that is read"):
        images.load_images(tmp_path, ["a.png"], skip_bad=True, **settings)


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
    names = [Path(name).name for name in listing.Search().walk(os.fsdecode(folder))]
    assert "z\udcff1.png" in names and len(names) == 13
    assert images.read_image(os.fsdecode(good), 8)[0].max() == 55


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
    script = (
        "import sys, time, pathlib; sys.path.insert(0, sys.argv[1]); import images\n"
        "real, root = images._decode, pathlib.Path(sys.argv[2])\n"
        "if sys.argv[3] == 'slow': images._decode = lambda *a: (time.sleep(0.3), real(*a))[1]\n"
        "files = sorted(str(p.relative_to(root)) for p in root.glob('train/*/*'))\n"
        "images.load_images(root, files, size=32, resize='squash', cache_dir='cache', skip_bad=False,\n"
        "                   name='train')"
    )
    process = popen("-c", script, REPO, synthetic, "slow", cwd=tmp_path)
    cache, deadline = tmp_path / "cache", time.time() + 60
    while not list(cache.glob(".*.npy")) and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.4)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -9
    assert list(cache.glob(".*.npy")) and not list(cache.glob("[!.]*"))  # only the unfinished temporary file
    process = popen("-c", script, REPO, synthetic, "fast", cwd=tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == 0 and not list(cache.glob(".*"))
    [path] = cache.glob("[!.]*-train-*.npy")
    files = sorted(Path(synthetic).glob("train/*/*"))
    assert np.array_equal(np.load(path), np.stack([images.decode(f, 32) for f in files]))
