"""Tests of images."""

import io
import json
import os
import random
import re
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import images
from common import InputError
from tests.shared import REPO, SHARED, full_decode, popen, smooth_picture, succeed


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


def test_decode_16_bit_is_scaled(tmp_path):
    """v * 257 in 16 bits is v in 8 bits; clipping would turn all but 0 to 255."""
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values * 257).save(tmp_path / "a.png")
    found = images.decode(tmp_path / "a.png", 16)
    assert np.abs(found.astype(int) - values).max() <= 1
    assert (found[-1, -1], found[0, 0]) == (255, 0)


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
        assert (
            crop[1:-1, 1:-1] == 255
        ).all() and crop.min() > 200  # the filter may see a pixel beyond the edge
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


def load_train(config):
    root = data.find_root(config.data_dir)
    files = data.list_images(root, "train").files
    pixels, kept, sizes = images.load_images(
        root,
        files,
        size=config.img_size,
        resize=config.resize,
        cache_dir=config.cache_dir,
        skip_bad=config.skip_bad,
        name="train",
    )
    assert sizes["width"][0] == sizes["height"][0] == 20  # of the originals
    return files, np.array(pixels), kept.tolist()


EXPECTED_VALUES = [10 * i for i in range(12)] + [100 + 10 * i for i in range(12)]


def cache_file(config):
    [path] = Path(config.cache_dir).glob("*.npy")
    return path


def test_cache_is_reused(small_set):
    files, pixels, kept = load_train(small_set)
    assert pixels[:, 8, 8].tolist() == EXPECTED_VALUES and kept == list(range(24))
    stat = os.stat(cache_file(small_set))
    _, again, _ = load_train(small_set)
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
    files, pixels, _ = load_train(small_set)
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
    _, again, kept = load_train(small_set)
    assert again[:, 8, 8].tolist() == expected and kept == list(range(24))


def test_caches_of_other_settings_do_not_mix(small_set):
    load_train(small_set)
    from dataclasses import replace

    assert load_train(replace(small_set, img_size=8))[1].shape == (24, 8, 8)
    load_train(replace(small_set, resize="pad"))
    assert len(list(Path(small_set.cache_dir).glob("*.npy"))) == 3
    extra = Path(small_set.data_dir, "train/NORMAL/new.png")
    Image.fromarray(np.full((20, 20), 7, np.uint8)).save(extra)
    files, pixels, _ = load_train(small_set)
    assert pixels[files.index("train/NORMAL/new.png")].max() == 7 and len(pixels) == 25


def test_bad_files_are_named_or_skipped(small_set, capsys):
    from dataclasses import replace

    cut, text = (
        Path(small_set.data_dir, "train/NORMAL/n03.jpeg"),
        Path(small_set.data_dir, "train/PNEUMONIA/zz.jpeg"),
    )
    Image.fromarray(smooth_picture(64, 64)).save(cut)
    cut.write_bytes(cut.read_bytes()[:300])
    text.write_text("not an image")
    for _ in range(2):  # decoded now, then from the cache
        with pytest.raises(InputError, match="(?s)2 of 26.*NORMAL/n03.jpeg.*PNEUMONIA/zz.jpeg.*--skip-bad"):
            load_train(small_set)
    capsys.readouterr()
    train, val, info = data.load_train_val(replace(small_set, skip_bad=True))
    assert "left out 2 of 26" in capsys.readouterr().err
    assert info["train"] + info["val"] == 24 == len(train) + len(val)
    assert info["original_size"] == {"width": [20, 20], "height": [20, 20]}
    for subset in (train, val):  # names, labels and pixels still belong together
        for name, label, row in zip(subset.files, subset.targets, subset.rows):
            number = int(re.search(r"[np](\d+)\.png", name)[1])
            assert label == ("PNEUMONIA" in name) and subset.images[row].max() == 10 * number + 100 * label
    Image.fromarray(np.full((20, 20), 1, np.uint8)).save(cut)  # mended: used again
    text.unlink()
    assert load_train(small_set)[2] == list(range(25))


def test_kill_while_the_cache_is_built(synthetic, tmp_path):
    """kill -9 in the middle of decoding leaves no cache that could be trusted; the next run builds it."""
    slow = (
        "import sys, time; sys.path.insert(0, sys.argv.pop(1)); import common, images, train_linear\n"
        "real = images.decode\n"
        "images.decode = lambda *a: (time.sleep(0.3), real(*a))[1]\n"
        "common.start(train_linear.main)"
    )
    argv = ["--data-dir", synthetic, "--img-size", 32]
    process = popen("-c", slow, REPO, *argv, cwd=tmp_path)
    cache, deadline = tmp_path / "Data" / "cache", time.time() + 60
    while not list(cache.glob(".*.npy")) and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.4)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -9
    assert list(cache.glob(".*.npy")) and not list(cache.glob("[!.]*"))  # only the unfinished temporary file
    succeed("train_linear", *argv, cwd=tmp_path)
    [path] = cache.glob("[!.]*-train-*.npy")
    files = data.list_images(synthetic, "train").files
    assert np.array_equal(np.load(path), np.stack([images.decode(synthetic / f, 32) for f in files]))


def save_dicom(path, **changes):
    """A small DICOM file; `changes` replace elements, None removes one."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    values = dict(Rows=8, Columns=8, SamplesPerPixel=1, PixelRepresentation=0, BitsAllocated=8, BitsStored=8)
    values |= dict(HighBit=7, PhotometricInterpretation="MONOCHROME2", PixelData=bytes(range(64)))
    for key, value in {**values, **changes}.items():
        if value is not None:
            setattr(file, key, value)
    file.save_as(path, enforce_file_format=True)


def broken_table():
    """A look-up table whose description promises more than it holds."""
    pydicom = pytest.importorskip("pydicom")
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [256, 0, 12], b""
    return pydicom.Sequence([table])


@pytest.mark.parametrize(
    "changes",
    [
        dict(PixelData=b""),
        dict(PixelData=None),
        dict(PixelData=b"ab"),
        dict(Rows=0),
        dict(Rows=60000, Columns=60000),
        dict(BitsAllocated=7),
        dict(PhotometricInterpretation="PURPLE"),
        dict(SamplesPerPixel=9),
        dict(WindowCenter="nan", WindowWidth="nan"),
        dict(RescaleSlope="inf", RescaleIntercept="0"),
        dict(ModalityLUTSequence="broken"),
        dict(VOILUTSequence="broken"),
    ],
)
def test_broken_dicom_is_an_oserror(tmp_path, changes):
    """Whatever pydicom raises; or the file is read after all."""
    changes = {k: broken_table() if v == "broken" else v for k, v in changes.items()}
    save_dicom(tmp_path / "a.dcm", **changes)
    try:
        assert images.read_image(tmp_path / "a.dcm", 16)[0].shape == (16, 16)
    except OSError as error:
        assert str(error) and "\n" not in str(error)
    save_dicom(tmp_path / "good.dcm")
    assert images.read_image(tmp_path / "good.dcm", 16)[0].std() > 10


@pytest.mark.parametrize("kind", ["TIFF", "DDS", "BMP", "GIF", "PPM", "ICO", "TGA"])
def test_only_named_formats_are_opened(tmp_path, kind):
    """Another format under the name x.jpg is refused whatever is in it."""
    Image.fromarray(smooth_picture(32, 32)).convert("RGB").save(tmp_path / "x.jpg", format=kind)
    for read in (images.decode, images.read_image):
        with pytest.raises(OSError, match="JPEG or PNG"):
            read(tmp_path / "x.jpg", 16)


def test_nan_pixels_are_an_oserror(tmp_path):
    pixels = np.full((20, 20), 0.5, np.float32)
    pixels[2, 3] = np.nan
    with pytest.raises(OSError, match="NaN"):
        images._eight_bits(pixels)
    Image.fromarray(pixels).save(tmp_path / "x.png", format="TIFF")
    with pytest.raises(OSError):
        images.decode(tmp_path / "x.png", 16)


def test_a_png_that_claims_to_be_huge(tmp_path):
    """100,000 x 100,000 pixels in the header of a file of 70 bytes: refused, not allocated."""
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "x.png")
    raw = bytearray((tmp_path / "x.png").read_bytes())
    raw[16:24] = (100_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(bytes(raw[12:29])).to_bytes(4, "big")
    (tmp_path / "x.png").write_bytes(raw)
    with pytest.raises(OSError):
        images.read_image(tmp_path / "x.png", 16)


def test_named_pipes_are_passed_over_and_refused(tmp_path):
    """Walking a folder passes them over; naming one is an error about that file. Nothing hangs."""
    for name in ("a.dcm", "b.jpg"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(OSError, match="regular"):
            images.read_image(tmp_path / name, 16)
    (tmp_path / "c.png").touch()
    (tmp_path / ".d.png").touch()
    (tmp_path / "e.txt").touch()
    assert list(images.find_files([str(tmp_path)])) == [str(tmp_path / "c.png")]
    assert list(images.find_files([str(tmp_path / "*.jpg")])) == [str(tmp_path / "b.jpg")]
    with pytest.raises(InputError, match="nowhere"):
        images.find_files(["nowhere/*.png"])


def test_a_long_search_says_that_it_goes_on(tmp_path, monkeypatch, capsys):
    for i in range(3):
        (tmp_path / f"{i}.png").touch()
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("common.time.monotonic", lambda: next(clock))
    assert len(list(images.find_files([str(tmp_path / "**")]))) == 6  # the folder itself, then each file
    assert "still looking" in capsys.readouterr().err


def test_names_that_are_no_unicode_are_cached(tmp_path):
    """A file name of any bytes goes through the cache and its JSON."""
    name = os.path.join(os.fsencode(tmp_path), b"\xff.png").decode("utf-8", "surrogateescape")
    Image.fromarray(smooth_picture(20, 20)).save(name)
    settings = dict(size=16, cache_dir=tmp_path / "cache", name="train")
    for _ in range(2):
        pixels, rows, _ = images.load_images(tmp_path, [os.path.basename(name)], **settings)
        assert pixels.shape == (1, 16, 16) and rows.tolist() == [0]
