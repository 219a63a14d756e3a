"""Images that are no files but rows of arrays in an .npz: the name of one is file.npz#train/17.

The headers of the arrays are read and checked before anything is allocated; no pickle is read.
"""

import os
import re
import stat
from functools import lru_cache

import numpy as np

from common.console import InputError
from common.safe_files import array_header, opened_npz

NAME = re.compile(r"(.*\.npz)#(train|val|test)/(\d{1,9})", re.IGNORECASE | re.DOTALL)
LARGEST = 16 << 30  # bytes of an array, unpacked: ChestMNIST at 224 px has 6 GB
GROWTH = 1100  # an array may unpack to this many times its part of the file: deflate does no more


def parts_of(path):
    """(the .npz, side, number) of the name of an image in one; None for the name of a file."""
    path = os.fspath(path)
    if "#" not in path:  # hundreds of thousands of files are asked
        return None
    match = NAME.fullmatch(path)
    return (match[1], match[2], int(match[3])) if match else None


def shapes(path):
    """{name: (shape, dtype)} of the arrays of an .npz, from their headers. InputError if it is damaged, holds
    Python objects (a pickle), or an array claims more than its bytes."""
    with opened_npz(path) as archive:
        return {m.filename.removesuffix(".npy"): _header(archive, m) for m in archive.infolist()}


def _header(archive, member):
    """safe_files.array_header of an array; ValueError also where it would unpack to more than it can hold."""
    if member.file_size > min(LARGEST, GROWTH * max(member.compress_size, 1)):
        raise ValueError(f"{member.filename} would unpack to {member.file_size >> 20} MiB")
    return array_header(archive, member)


def stamp(path):
    """(bytes, time of change in ns) of a regular file, or of the .npz that holds an image of this name;
    (None, None) where there is none: decoding it will give the reason."""
    parts = parts_of(path)
    try:
        status = os.stat(parts[0] if parts else path)
    except (OSError, ValueError):
        return None, None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (None, None)


def pixels(path):
    """The image of this name: uint8 [H, W] or [H, W, 3]. OSError where there is none, or none of these."""
    file, side, number = parts_of(path)
    try:
        images = _images(file, side, os.stat(file).st_mtime_ns)
    except InputError as error:
        raise OSError(str(error)) from None
    if number >= len(images):
        raise OSError(f"there is no image {number} among the {len(images)} of {side}")
    return images[number]


@lru_cache(maxsize=3)  # the three sides of a set
def _images(file, side, changed):
    """The array SIDE_images of an .npz, changed at this time."""
    count_images(file, side)
    with np.load(file, allow_pickle=False) as archive:
        return archive[f"{side}_images"]


def count_images(file, side):
    """Number of images of a side of an .npz. InputError if it has none, or something else."""
    name = f"{side}_images"
    shape, dtype = shapes(file).get(name, (None, None))
    if shape is None:
        raise InputError(f"{file} has no array {name}")
    grey, colour = len(shape) == 3, len(shape) == 4 and shape[-1] == 3
    if dtype != np.uint8 or not (grey or colour) or min(shape) < 1:
        raise InputError(f"{file}: {name} is {dtype} {shape}, no images of 8 bits")
    return shape[0]
