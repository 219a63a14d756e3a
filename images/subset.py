"""A side of the data (Subset): files, labels, patients and pixels, side by side; and what is told from pixels
alone.
"""

import hashlib
import zlib

import numpy as np

from common import prelude  # noqa: F401  (first: see there)
from common.console import InputError
from common.files import sha256
from layouts.listing import patient_id, taken
from lungs import masks as lung_masks


class Subset:
    """Some rows of the cached images.

    `files` [N] relative to the data folder; `targets` int64 [N] or int8 [N, K]; `images` uint8 [*, S, S],
    memory-mapped and shared between subsets; `rows` int64 [N] into it;
    `patients` [N] (default: as the file names tell); `levels` float64 [N, 2]: mean and standard deviation of
    each image's grey levels, 0 to 1, of the images of a data set; `masks`: the lungs on `images`,
    packed (lungs.pack), where a model needs them; `sources` int64 [N]: the hospital, 0 the first one.
    The attribute `cohort`: what is known of patients and exposures, {name: array [N]} (listing.Index), or
    None.
    """

    def __init__(self, files, targets, images, rows, *, patients=None, levels=None, masks=None, sources=None):
        self.files, self.targets, self.images, self.rows = files, targets, images, rows
        self.masks, self.cohort = masks, None
        self.sources = np.zeros(len(files), np.int64) if sources is None else sources
        self.patients = [patient_id(f) for f in files] if patients is None else patients
        self.levels = levels

    def __len__(self):
        return len(self.files)

    def take(self, index):
        """The Subset of these positions."""
        some = Subset(
            taken(self.files, index),
            self.targets[index],
            self.images,
            self.rows[index],
            patients=taken(self.patients, index),
            levels=taken(self.levels, index),
            masks=self.masks,
            sources=self.sources[index],
        )
        some.cohort = taken(self.cohort, index)
        return some

    def pixels(self, index=slice(None)):
        """uint8 [n, S, S] of these positions, in memory."""
        return self.images[self.rows[index]]

    def lungs(self, index=slice(None)):
        """bool [n, S, S] of these positions, True on the lungs. InputError if the masks are not there."""
        if self.masks is None:
            raise InputError("these images come without lung masks, which the model needs")
        return lung_masks.unpack(self.masks[self.rows[index]])


def same_images(here, there):
    """Which images of Subset `here` have the very pixels of one of the Subsets `there`: list of files."""

    def digests(subset):
        return [hashlib.blake2b(subset.images[row].tobytes(), digest_size=16).digest() for row in subset.rows]

    known = set()
    for subset in there:
        known.update(digests(subset))
    return [file for file, digest in zip(here.files, digests(here)) if digest in known]


def pixel_fingerprint(subset):
    """SHA-256 over a subset's file names, targets and pixels: equal iff a model sees the same data."""
    crc = 0
    for row in subset.rows:
        crc = zlib.crc32(subset.images[row], crc)
    return sha256([subset.files, subset.targets.tolist(), crc])


def input_range(subset):
    """Least and greatest mean and standard deviation of an image (grey levels 0 to 1) that a model saw."""
    low, high = subset.levels.min(axis=0), subset.levels.max(axis=0)
    return {"mean": [float(low[0]), float(high[0])], "std": [float(low[1]), float(high[1])]}
