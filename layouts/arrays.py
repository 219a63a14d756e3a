"""Images that are no files but rows of arrays in an .npz: the name of one is file.npz#train/17.

The headers of the arrays are read and checked before anything is allocated; no pickle is read.
"""

import math
import os
import re
import zipfile
from functools import lru_cache

import numpy as np
from numpy.lib import format as npy

from common.console import InputError

NAME = re.compile(r"(.*\.npz)#(train|val|test)/(\d{1,9})", re.IGNORECASE | re.DOTALL)
LARGEST = 16 << 30  # bytes of an array, unpacked: ChestMNIST at 224 px has 6 GB
GROWTH = 1100  # an array may unpack to this many times its part of the file: deflate does no more


def parts_of(path):
    """(the .npz, side, number) of the name of an image in one; None for the name of a file."""
    match = NAME.fullmatch(os.fspath(path))
    return (match[1], match[2], int(match[3])) if match else None


def shapes(path):
    """{name: (shape, dtype)} of the arrays of an .npz, from their headers. InputError if it is damaged, holds
    Python objects (a pickle), or an array claims more than its bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {m.filename.removesuffix(".npy"): _header(archive, m) for m in archive.infolist()}
    except Exception as error:  # damage shows as almost any exception
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"{path} is not a plain .npz of arrays: truncated, pickled or damaged ({reason}); copy it again "
            "from where it came"
        ) from None


def _header(archive, member):
    """(shape, dtype) of an array; ValueError unless they account for every byte of its part."""
    name = member.filename
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that NumPy never uses")
    if member.file_size > min(LARGEST, GROWTH * max(member.compress_size, 1)):
        raise ValueError(f"{name} would unpack to {member.file_size >> 20} MiB")
    with archive.open(member) as file:
        headers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        version = npy.read_magic(file)
        if version not in headers:
            raise ValueError(f"{name} has the unknown .npy version {version}")
        shape, _, dtype = headers[version](file)
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects")
        held = member.file_size - file.tell()
    if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"{name} claims the shape {str(shape)[:60]} of {dtype} in {held} bytes")
    return shape, dtype


def stamp(path):
    """[bytes of an image, time of change] of an image in an .npz; [None, None] where there is none."""
    file, side, _ = parts_of(path)
    try:
        return [os.path.getsize(file), os.stat(file).st_mtime_ns]
    except OSError:
        return [None, None]


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
    name = f"{side}_images"
    shape, dtype = shapes(file).get(name, (None, None))
    if shape is None:
        raise InputError(f"{file} has no array {name}")
    grey, colour = len(shape) == 3, len(shape) == 4 and shape[-1] == 3
    if dtype != np.uint8 or not (grey or colour) or min(shape) < 1:
        raise InputError(f"{file}: {name} is {dtype} {shape}, no images of 8 bits")
    with np.load(file, allow_pickle=False) as archive:
        return archive[name]
