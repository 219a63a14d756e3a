"""From an image file to grey pixels: finding files, decoding them, and the cache of a whole data set.

Only JPEG, PNG (8 and 16 bit, grey or colour) and DICOM are opened. Whatever goes wrong in one file is an
OSError about that file, so that the others can go on.
"""

import functools
import glob
import itertools
import math
import os
import stat
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from common import InputError, Pace, atomic_path, check_regular, read_json, say, sha256, write_json

EXTENSIONS = (".jpeg", ".jpg", ".png")
DICOM_EXTENSIONS = (".dcm", ".dicom")
FORMATS = ("JPEG", "PNG")
RESIZES = ("squash", "pad", "crop")
CACHE_VERSION = 3  # raise it when decoding changes, so that old caches are rebuilt


# ---------------------------------------------------------------- finding files


def find_files(paths):
    """Yield the image files of files, folders (recursive, sorted, hidden ones passed over) and globs, lazily.

    InputError for a path that is none of these, before the first file is yielded."""
    expanded = []
    for path in paths:
        found = [path] if os.path.lexists(path) else sorted(_glob(path))
        if not found:
            raise InputError(f"{path} is no file, no folder and no glob that matches anything")
        expanded += found
    return itertools.chain.from_iterable(map(_walk, expanded))


def _glob(pattern):
    """The matches of a glob; a search that takes long says that it goes on."""
    pace = Pace(every=10)
    for count, path in enumerate(glob.iglob(pattern, recursive=True), 1):
        pace.count(count, f"paths found, still looking for {pattern}")
        yield path


def _walk(path):
    if not os.path.isdir(path):
        yield path
        return
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        for name in sorted(files):
            full = os.path.join(folder, name)
            wanted = name.lower().endswith(EXTENSIONS + DICOM_EXTENSIONS) and not name.startswith(".")
            if wanted and (
                os.path.isfile(full) or os.path.islink(full)
            ):  # no named pipes; broken links are named
                yield full


# ---------------------------------------------------------------- decoding


def one_file(function):
    """Decorator: whatever reading one file raises becomes an OSError that gives the reason."""

    @functools.wraps(function)
    def wrapped(source, *args, **kwargs):
        try:
            if isinstance(source, (str, os.PathLike)):
                status = os.stat(source)
                if not stat.S_ISREG(status.st_mode):
                    raise OSError("not a regular file")
                if status.st_size == 0:
                    raise OSError("the file is empty")
            return function(source, *args, **kwargs)
        except UnidentifiedImageError:
            raise OSError("not a JPEG or PNG image") from None
        except OSError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise OSError(f"{type(error).__name__}: {reason}" if reason else type(error).__name__) from None

    return wrapped


@one_file
def decode(source, size, resize="squash"):
    """A JPEG or PNG (path or file object) -> uint8 [size, size], grey.

    Large JPEGs are decoded at reduced scale (never below twice the target, so nothing visible is lost), then
    shrunk with an anti-aliased bilinear filter. 16-bit images are scaled, not clipped, to 8 bits. OSError if
    the file is not a readable image.
    """
    with Image.open(source, formats=FORMATS) as image:
        image.draft("L", (2 * size, 2 * size))
        if image.mode.startswith("I") or image.mode == "F":
            image = Image.fromarray(_eight_bits(np.asarray(image, dtype=np.float32)))
        return to_square(image.convert("L"), size, resize)


def _eight_bits(pixels):
    """Grey levels of 8, 12 or 16 bits, float32 -> uint8 of the same shape. OSError for NaN or infinite ones.
    """
    if not np.isfinite(pixels).all():
        raise OSError("some pixels are NaN or infinite")
    white = next(w for w in (255, 4095, math.inf) if pixels.max() <= w)
    return (pixels / min(white, 65535) * 255).round().clip(0, 255).astype(np.uint8)


def to_square(image, size, resize):
    """A grey PIL image -> uint8 [size, size]: "squash" to the square, "pad" with black, or "crop" to the
    middle."""
    width, height = image.size
    box = None
    if resize == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    elif resize == "pad" and width != height:
        side = max(width, height)
        canvas = Image.new("L", (side, side))
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        image = canvas
    if image.size != (size, size) or box:
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image)


@one_file
def open_dicom(path):
    """A DICOM file -> grey 8-bit PIL image, dense = bright, window and rescale applied. OSError if
    impossible."""
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError:
        raise OSError("DICOM needs the package pydicom: pip install pydicom") from None
    file = pydicom.dcmread(path)
    stored = file.pixel_array
    if stored.ndim == 3 and file.get("SamplesPerPixel", 1) == 3:
        return Image.fromarray(stored.astype(np.uint8)).convert("L")
    if stored.ndim != 2:
        raise OSError(f"DICOM with {stored.shape[0]} frames: give single images")
    values = np.asarray(apply_voi_lut(apply_modality_lut(stored, file), file), dtype=np.float64)
    if not np.isfinite(values).all():
        raise OSError("some pixels are NaN or infinite")
    low, high = values.min(), values.max()
    if high <= low:
        raise OSError("DICOM image is constant")
    grey = (values - low) / (high - low)
    if file.get("PhotometricInterpretation") == "MONOCHROME1":  # low values are bright there
        grey = 1 - grey
    return Image.fromarray(np.round(grey * 255).astype(np.uint8))


@one_file
def read_image(path, size, resize="squash"):
    """A JPEG, PNG or DICOM file -> (uint8 [size, size], (width, height) of the original, colourfulness in [0,
    1]).

    OSError if it cannot be read.
    """
    if str(path).lower().endswith(DICOM_EXTENSIONS):
        image = open_dicom(path)
        return to_square(image, size, resize), image.size, 0.0
    colour = 0.0
    with Image.open(path, formats=FORMATS) as image:
        original = image.size
        if image.mode in ("RGB", "RGBA", "P", "CMYK", "YCbCr"):
            image.draft("RGB", (64, 64))
            small = np.asarray(image.convert("RGB").resize((64, 64)), dtype=np.float64)
            colour = float((small.max(axis=2) - small.min(axis=2)).mean() / 255)
    return decode(path, size, resize), original, colour


# ---------------------------------------------------------------- cache


def load_images(root, files, *, size, resize="squash", cache_dir, skip_bad=False, name):
    """Decoded images of `files` -> (uint8 [len(files), S, S] memory-mapped read-only, readable rows int64
    [M], {"width": [least, greatest], "height": ...} of the originals, in px).

    Kept on disk under `cache_dir`, keyed by names, sizes, modification times and settings, with a checksum: a
    stale or damaged cache is rebuilt. `name` ("train") is part of its file's name. Unreadable images:
    InputError naming them, or with `skip_bad` they are left out and counted.
    """
    stats = [os.stat(Path(root, f)) for f in files]
    key = sha256([CACHE_VERSION, size, resize, [[f, s.st_size, s.st_mtime_ns] for f, s in zip(files, stats)]])
    place = sha256([str(Path(root).resolve()), name, size, resize])[:8]
    path = Path(cache_dir, f"{Path(root).name}-{name}-{size}-{resize}-{place}.npy")
    info = _valid_cache(path, key)
    if info is None:
        info = _build_cache(path, key, root, files, size, resize)
    bad, where = info["bad"], Path(root, name)
    if not info["kept"]:
        raise InputError(
            f"{len(bad)} of {len(files)} images in {where} cannot be read, so none is left: {'; '.join(bad[:3])}"
        )
    if bad:
        listed = f"{'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}"
        if not skip_bad:
            raise InputError(
                f"{len(bad)} of {len(files)} images in {where} cannot be read: {listed}. "
                "Mend or remove them, or leave them out with --skip-bad"
            )
        say(f"--skip-bad: left out {len(bad)} of {len(files)} images in {where}: {listed}")
    sizes = {"width": info["width"], "height": info["height"]}
    return np.load(path, mmap_mode="r", allow_pickle=False), np.array(info["kept"], dtype=np.int64), sizes


def _valid_cache(path, key):
    """The cache's side file if it belongs to `key` and the array is intact, else None."""
    try:
        info = read_json(path.with_suffix(".json"))
        check = info.pop("check", None)
        check_regular(path)
        if info.get("key") == key and check == sha256(info) and info.get("crc32") == _crc32(path):
            return info
        say(f"cache {path} is stale or damaged: rebuilding it")
    except (InputError, OSError):
        pass  # absent or unreadable: build it
    return None


def _crc32(path):
    crc = 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


@one_file
def _decode_with_size(path, size, resize):
    with Image.open(path, formats=FORMATS) as image:
        original = image.size
    return decode(path, size, resize), original


def _build_cache(path, key, root, files, size, resize):
    """Decode `files` into the array at `path`; returns the content of its side file."""
    kept, bad, sizes, pace = [], [], [], Pace()

    def one(name):
        try:
            return _decode_with_size(Path(root, name), size, resize)
        except OSError as error:
            return f"{name} ({error})"

    # Decoding releases the interpreter lock, so threads use every core; `map` keeps the order, and the window
    # keeps memory constant however many images there are.
    with atomic_path(path) as tmp, ThreadPoolExecutor(os.cpu_count()) as pool:
        array = np.lib.format.open_memmap(tmp, mode="w+", dtype=np.uint8, shape=(len(files), size, size))
        quiet = not sys.stderr.isatty()
        with tqdm(total=len(files), desc=f"decoding {path.name}", unit="img", disable=quiet) as bar:
            for begin in range(0, len(files), 512):
                for i, result in enumerate(pool.map(one, files[begin : begin + 512]), begin):
                    if isinstance(result, str):
                        bad.append(result)
                    else:
                        array[i], original = result
                        sizes.append(original)
                        kept.append(i)
                    bar.update()
                    if quiet:
                        pace.step(i + 1, len(files), f"decoded {i + 1} of {len(files)} images")
        array.flush()
        del array
        info = {"key": key, "crc32": _crc32(tmp), "files": len(files), "kept": kept, "bad": bad}
        for name, values in zip(("width", "height"), zip(*sizes) if sizes else ((0,), (0,))):
            info[name] = [min(values), max(values)]
    write_json(path.with_suffix(".json"), {**info, "check": sha256(info)})
    return info
