"""From an image file to grey uint8 pixels: finding files, decoding, DICOM, the cache of decoded images.

JPEG and PNG (8 and 16 bit, grey or colour) are read by Pillow, DICOM by pydicom, where it is installed.
Whatever is wrong with a file, reading it raises OSError with the reason and nothing else, so that one bad
file never stops work on the others.
"""

import contextlib
import glob
import itertools
import os
import stat
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from common import InputError, Pace, advice, atomic_path, read_json, say, sha256, write_json

EXTENSIONS = (".jpeg", ".jpg", ".png")
FORMATS = ("JPEG", "PNG")  # what Pillow may open, whatever the file is called
DICOM_EXTENSIONS = (".dcm", ".dicom")
RESIZES = ("squash", "pad", "crop")
CACHE_VERSION = 4  # raise it when decoding changes, so that old caches are rebuilt
MAX_PIXELS = 178_956_970  # Pillow's own limit, applied also where Pillow does not check
SEARCH_NOTE = 10  # seconds between two lines about a search that goes on


# ---------------------------------------------------------------- one file


@contextlib.contextmanager
def _oserror_only():
    """Turn whatever the block raises into an OSError that gives the reason; also usable as a decorator.

    Pillow and pydicom raise nearly anything on damaged files, StopIteration and struct.error included.
    """
    try:
        yield
    except UnidentifiedImageError:
        raise OSError("not a JPEG or PNG image") from None
    except OSError:
        raise
    except Exception as error:  # MemoryError too, but not KeyboardInterrupt
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(": ")
        raise OSError(f"damaged or not supported ({reason})") from None


def _check_regular(path):
    """OSError if `path` is not a regular file: opening a named pipe, say, could wait for ever."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise OSError("a folder, not a file")
    if not stat.S_ISREG(mode):
        raise OSError("a named pipe, socket or device, not a regular file")


def _open(source):
    """A path or file object -> PIL image, its pixels not yet decoded."""
    if isinstance(source, (str, bytes, os.PathLike)):
        _check_regular(source)
        if os.path.getsize(source) == 0:
            raise OSError("the file is empty")
    return Image.open(source, formats=FORMATS)


def decode(source, size, resize="squash"):
    """A JPEG or PNG (path or file object) -> uint8 [size, size], grey.

    Large JPEGs are decoded at reduced scale (never below twice the target, so nothing visible is lost),
    then shrunk with an anti-aliased bilinear filter. 16-bit images are scaled, not clipped, to 8 bits.
    OSError, and nothing else, if the file cannot be read.
    """
    return _decode(source, size, resize)[0]


@_oserror_only()
def _decode(source, size, resize):
    """`decode`, and the original's (width, height)."""
    with _open(source) as image:
        original = image.size
        image.draft("L", (2 * size, 2 * size))
        return to_square(to_grey(image), size, resize), original


def to_grey(image):
    """A PIL image of any mode -> mode "L" (8-bit grey). OSError if a pixel is NaN or infinite."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image.convert("L")
    pixels = np.asarray(image, dtype=np.float32)
    if not np.isfinite(pixels).all():
        raise OSError("some pixels are NaN or infinite")
    brightest = pixels.max()
    white = 255 if brightest <= 255 else 4095 if brightest <= 4095 else 65535  # 8, 12 or 16 bits are in use
    return Image.fromarray((pixels / white * 255).round().clip(0, 255).astype(np.uint8))


def to_square(image, size, resize):
    """A grey PIL image -> uint8 [size, size]: "squash" it, "pad" it with black, or "crop" it to the middle.

    OSError for an image so long and narrow that its padded square would not fit in memory.
    """
    width, height = image.size
    box = None
    if resize == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    elif resize == "pad" and width != height:
        side = max(width, height)
        if side * side > MAX_PIXELS:
            raise OSError(f"{width} x {height} pixels are too many to be padded to a square")
        canvas = Image.new("L", (side, side))
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        image = canvas
    if image.size != (size, size) or box:
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image)


@_oserror_only()
def open_dicom(path):
    """A DICOM file of one image -> PIL image of mode "L": dense = bright, rescale and window applied, the
    darkest pixel 0 and the brightest 255.

    OSError, and nothing else, if the file cannot be read or pydicom is not installed.
    """
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError:
        raise OSError("DICOM needs the package pydicom: pip install pydicom") from None
    _check_regular(path)
    try:
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
            raise OSError("deflated DICOM is not supported: a small file could unpack to any size")
        file = pydicom.dcmread(path)
    except InvalidDicomError:
        raise OSError("not a DICOM file") from None
    frames = int(file.get("NumberOfFrames") or 1)
    if frames != 1:
        raise OSError(f"DICOM of {frames} frames: only single images can be read")
    if file.Rows * file.Columns > MAX_PIXELS:
        raise OSError(f"{file.Columns} x {file.Rows} pixels are more than the limit of {MAX_PIXELS}")
    stored, photometric = file.pixel_array, file.get("PhotometricInterpretation")
    if stored.ndim == 3 and stored.dtype == np.uint8:
        return Image.fromarray(stored).convert("L")
    if stored.ndim != 2 or photometric == "PALETTE COLOR":
        raise OSError("only grey and 8-bit RGB DICOM images are supported")
    values = np.asarray(apply_voi_lut(apply_modality_lut(stored, file), file), dtype=np.float64)
    if not np.isfinite(values).all():
        raise OSError("some pixels are NaN or infinite")
    low, high = values.min(), values.max()
    if high <= low:
        raise OSError("all pixels of the DICOM image are equal")
    grey = (values - low) / (high - low)
    if photometric == "MONOCHROME1":  # low values are bright there
        grey = 1 - grey
    return Image.fromarray(np.round(grey * 255).astype(np.uint8))


@_oserror_only()
def read_image(path, size, resize="squash"):
    """A JPEG, PNG or DICOM file -> (uint8 [size, size], original (width, height), colourfulness in [0, 1]).

    Colourfulness is the mean difference between the strongest and the weakest of red, green and blue: 0 for
    grey. Files called .dcm or .dicom are read as DICOM. OSError, and nothing else, if it cannot be read.
    """
    if os.fspath(path).lower().endswith(DICOM_EXTENSIONS):
        image = open_dicom(path)
        return to_square(image, size, resize), image.size, 0.0
    colour = 0.0
    with _open(path) as image:
        if image.mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr"):
            image.draft("RGB", (64, 64))
            small = np.asarray(image.convert("RGB").resize((64, 64)), dtype=np.float64)
            colour = float((small.max(axis=2) - small.min(axis=2)).mean() / 255)
    return *_decode(path, size, resize), colour


# ---------------------------------------------------------------- finding files


def find_files(paths):
    """Files, folders and globs -> iterator over the names of image files.

    Folders are searched as the iterator advances, recursively and in sorted order; hidden files and folders,
    and whatever is not a regular file, are passed over. A file that is named or matched by a glob is yielded
    whatever its name. InputError, before the first file, for a path that does not exist and matches nothing.
    """
    expanded = []
    for path in paths:
        found = [path] if os.path.exists(path) else _expand(path)
        if not found:
            raise InputError(f"{path} is not a file, not a folder, and as a glob matches nothing")
        expanded += found
    return itertools.chain.from_iterable(map(_walk, expanded))


def _expand(pattern):
    """What a glob matches, sorted, less what lies in a matched folder, which is searched anyway (`**` matches
    both)."""
    found, done = [], threading.Event()

    def report():  # in a thread, because a search may go on for long without any match
        while not done.wait(SEARCH_NOTE):
            say(f"still looking for {pattern}: {len(found)} found so far")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        for path in glob.iglob(pattern, recursive=True):
            found.append(path)
        folders = {Path(path) for path in found if os.path.isdir(path)}
    finally:
        done.set()
        thread.join()
    return sorted(path for path in found if folders.isdisjoint(Path(path).parents))


def _walk(path):
    """The image files under a folder; anything else is yielded as it is."""
    if not os.path.isdir(path):
        yield path
        return

    def passed_over(error):
        say(f"note: the folder {error.filename} cannot be read ({error.strerror}), passed over")

    last = time.monotonic()
    for folder, folders, files in os.walk(path, onerror=passed_over):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        if time.monotonic() - last > SEARCH_NOTE:
            last = time.monotonic()
            say(f"still looking for images, now in {folder}")
        for name in sorted(files):
            file = os.path.join(folder, name)
            if name.startswith(".") or not name.lower().endswith(EXTENSIONS + DICOM_EXTENSIONS):
                continue
            if os.path.isfile(file) or not os.path.exists(file):  # a broken link is reported when it is read
                yield file
                last = time.monotonic()


# ---------------------------------------------------------------- many files, cached


class Decoded(NamedTuple):
    """images: uint8 [N, S, S], memory-mapped read-only; rows: int64 [M], those that could be read; levels:
    float64 [M, 2], mean and standard deviation of their grey levels, 0 to 1; sizes: {"width": [least,
    greatest], "height": ...} of the originals, px; path, crc32: the file of `images` and its checksum."""

    images: np.ndarray
    rows: np.ndarray
    levels: np.ndarray
    sizes: dict
    path: Path
    crc32: int


def load_images(root, files, *, size, resize, cache_dir, skip_bad, name, verify=False):
    """The Decoded images of `files`, names relative to `root`.

    Kept on disk under `cache_dir`, keyed by names, sizes, modification times and settings: a stale cache is
    rebuilt, and a damaged one too, as far as a sample of its rows tells; with `verify` all of it is read.
    `name` ("train", say) is part of the cache file's name and of messages. Unreadable images: InputError
    naming them, or with `skip_bad` they are left out and counted.
    """
    key = sha256([CACHE_VERSION, size, resize, [[file, *_stamp(os.path.join(root, file))] for file in files]])
    place = sha256([str(Path(root).resolve()), name, size, resize])[:8]
    path = Path(cache_dir, f"{Path(root).name}-{name}-{size}-{resize}-{place}.npy")
    info = valid_cache(path, key, verify)
    if info is None:
        info = _build_cache(path, key, root, files, size, resize)
    bad = info["bad"]
    count = f"{len(bad)} of {len(files)} {name} images in {root}"
    some = "; ".join(bad[:5]) + (" ..." if len(bad) > 5 else "")
    if not info["kept"]:
        raise InputError(f"{count} cannot be read, so none is left: {some}")
    if bad and not skip_bad:
        raise InputError(
            f"{count} cannot be read: {some}. Mend or remove them"
            + advice("--skip-bad", ", or leave them out with --skip-bad")
        )
    if bad:
        say(f"--skip-bad: left out {count}: {some}")
    sizes = {"width": info["width"], "height": info["height"]}
    images, levels = np.load(path, mmap_mode="r", allow_pickle=False), np.array(info["levels"])
    return Decoded(images, np.array(info["kept"], dtype=np.int64), levels, sizes, path, info["crc32"])


def _stamp(path):
    """[size in bytes, modification time in ns] of a file; [None, None] if there is none."""
    try:
        about = os.stat(path)
    except OSError:
        return [None, None]  # a broken link, say: decoding it will give the reason
    return [about.st_size, about.st_mtime_ns]


def valid_cache(path, key, verify):
    """The cache's side file if it belongs to `key` and the array is intact, else None.

    Every byte is read if `verify`, or if the file is not the one that was written here (it was copied, say);
    else a sample of rows."""
    try:
        info = read_json(path.with_suffix(".json"))
        check = info.pop("check", None)
        if info.get("key") == key and check == sha256(info):
            unchanged = info["stamp"] == _stamp(path) and not verify
            if (_sample(path) == info["sample"]) if unchanged else (_crc32(path) == info["crc32"]):
                return info
        say(f"cache {path} is stale or damaged: rebuilding it")
    except (InputError, OSError, KeyError):
        pass  # absent or unreadable: build it
    return None


def _sample(path, count=64):
    """CRC-32 of `count` rows of the array at `path`, evenly spread; None if it is no array."""
    _check_regular(path)
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        return None
    return zlib.crc32(np.ascontiguousarray(images[np.linspace(0, len(images) - 1, count).astype(int)]))


def _crc32(path):
    _check_regular(path)
    crc = 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def _build_cache(path, key, root, files, size, resize):
    """Decode every file into the array at `path`; write its side file and return that file's content."""
    kept, bad, sizes, levels = [], [], [], []

    def one(file):
        try:
            return _decode(Path(root, file), size, resize)
        except OSError as error:
            return f"{file} ({error})"

    # Decoding releases the interpreter lock, so threads use every core; `map` keeps the order, and the
    # window keeps memory constant however many images there are.
    with atomic_path(path) as tmp, ThreadPoolExecutor(os.cpu_count()) as pool:
        array = allocate(tmp, (len(files), size, size))
        windows = (files[begin : begin + 512] for begin in range(0, len(files), 512))
        results = itertools.chain.from_iterable(pool.map(one, window) for window in windows)
        for i, result in enumerate(_progress(results, len(files), f"decoding {path.name}")):
            if isinstance(result, str):
                bad.append(result)
            else:
                array[i], original = result
                sizes.append(original)
                levels.append([float(array[i].mean() / 255), float(array[i].std() / 255)])
                kept.append(i)
        array.flush()
        del array
    info = {"key": key, "files": len(files), "kept": kept, "bad": bad, "levels": levels}
    for side, values in zip(("width", "height"), zip(*sizes) if sizes else ((0,), (0,))):
        info[side] = [min(values), max(values)]
    return seal(path, info)


def allocate(path, shape):
    """A new uint8 array of zeros on disk, memory-mapped. OSError if there is no room for it: without that, a
    full disk would kill the process later."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    return array


def seal(path, info):
    """Write the side file of the array at `path`: `info`, which has its key, and what `valid_cache` compares;
    returns all of it."""
    info = {**info, "crc32": _crc32(path), "sample": _sample(path), "stamp": _stamp(path)}
    write_json(path.with_suffix(".json"), {**info, "check": sha256(info)})
    return info


def _progress(results, total, title):
    """Pass `results` on; show a bar on a terminal, and elsewhere say every half minute what remains."""
    quiet = sys.stderr is None or not sys.stderr.isatty()
    pace = Pace()
    with tqdm(total=total, desc=title, unit="img", disable=quiet) as bar:
        for done, result in enumerate(results, 1):
            yield result
            bar.update()
            if quiet:
                pace.step(done, total, f"{title}: {done} of {total} images")
