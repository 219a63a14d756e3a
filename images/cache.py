"""A set of images as one uint8 array on disk, decoded once.

The cache is read as a memory map. It is rebuilt where a file of the set has changed, or where decoding has
(CACHE_VERSION).
"""

import contextlib
import itertools
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.console import InputError, advice, progress, say
from common.files import atomic_path, read_json, sha256, write_json
from images.decode import _check_regular, _decode
from layouts import arrays
from layouts.listing import SIDE_WORDS

CACHE_VERSION = 7  # raise it when decoding changes, so that old caches are rebuilt


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
    key = sha256(
        [CACHE_VERSION, size, resize, [[file, *arrays.stamp(os.path.join(root, file))] for file in files]]
    )
    place = sha256([str(Path(root).resolve()), name, size, resize])[:8]
    path = Path(cache_dir, f"{Path(root).name}-{name}-{size}-{resize}-{place}.npy")
    info = valid_cache(path, key, verify)
    if info and _now_readable(info, root, files, size, resize):
        say(f"cache {path} lacks images that can be read now: rebuilding it")
        info = None
    if info is None:
        info = _build_cache(path, key, root, files, size, resize)
    bad = info["bad"]
    side = name.partition("-")[0]  # without what tells caches apart
    count = f"{len(bad)} of {len(files)} {SIDE_WORDS.get(side, side)} images in {root}"
    some = "; ".join(bad[:5])
    if len(bad) > 5:
        some += " ..."
    if not info["kept"]:
        raise InputError(f"{count} cannot be read, so none is left: {some}")
    if bad and not skip_bad:
        leave_out = advice("--skip-bad", ", or leave them out with --skip-bad")
        raise InputError(f"{count} cannot be read: {some}. Mend or remove them{leave_out}")
    if bad:
        say(f"--skip-bad: left out {count}: {some}")
    sizes = {"width": info["width"], "height": info["height"]}
    images, levels = np.load(path, mmap_mode="r", allow_pickle=False), np.array(info["levels"])
    return Decoded(images, np.array(info["kept"], dtype=np.int64), levels, sizes, path, info["crc32"])


def _now_readable(info, root, files, size, resize):
    """Whether an image that could not be read when a cache was built can be read now: a decoder was
    installed, or a disk is back, which changes neither size nor time of the file."""
    for i in sorted(set(range(len(files))) - set(info["kept"])):
        with contextlib.suppress(OSError):
            _decode(Path(root, files[i]), size, resize)
            return True
    return False


def valid_cache(path, key, verify):
    """The cache's side file if it belongs to `key` and the array is intact, else None.

    Every byte is read if `verify`, or if the file is not the one that was written here (it was copied, say);
    else a sample of rows."""
    try:
        info = read_json(path.with_suffix(".json"))
        check = info.pop("check", None)
        why = "is damaged"
        if check == sha256(info) and info["key"] != key:
            why = "is of other files or settings"
        elif check == sha256(info):
            if info["stamp"] == list(arrays.stamp(path)) and not verify:
                intact = _sample(path) == info["sample"]
            else:
                intact = _crc32(path) == info["crc32"]
            if intact:
                return info
        say(f"cache {path} {why}: rebuilding it")
    except (InputError, OSError, KeyError):
        pass  # absent or unreadable: build it
    return None


def _sample(path):
    """CRC-32 of 64 rows of the array at `path`, evenly spread; None if it is no array."""
    _check_regular(path)
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        return None
    rows = np.linspace(0, len(images) - 1, 64).astype(int)
    return zlib.crc32(np.ascontiguousarray(images[rows]))


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

    def decode(file):
        """The pixels and the size of an image, or why it cannot be read."""
        try:
            return _decode(Path(root, file), size, resize)
        except OSError as error:
            return f"{file} ({error})"

    # Decoding releases the interpreter lock, so threads use every core; `map` keeps the order, and the
    # window keeps memory constant however many images there are.
    with atomic_path(path) as tmp, ThreadPoolExecutor(os.cpu_count()) as pool:
        array = allocate(tmp, (len(files), size, size))
        windows = (files[begin : begin + 512] for begin in range(0, len(files), 512))
        results = itertools.chain.from_iterable(pool.map(decode, window) for window in windows)
        for i, result in enumerate(progress(results, len(files), f"decoding {path.name}", "images")):
            if isinstance(result, str):
                bad.append(result)
                continue
            array[i], original = result
            sizes.append(original)
            levels.append([float(array[i].mean() / 255), float(array[i].std() / 255)])
            kept.append(i)
        array.flush()
        del array
    info = {"key": key, "files": len(files), "kept": kept, "bad": bad, "levels": levels}
    for name, values in zip(("width", "height"), np.array(sizes or [(0, 0)]).T.tolist()):
        info[name] = [min(values), max(values)]
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
    info = {**info, "crc32": _crc32(path), "sample": _sample(path), "stamp": list(arrays.stamp(path))}
    write_json(path.with_suffix(".json"), {**info, "check": sha256(info)})
    return info
