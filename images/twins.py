"""Images that are in a set twice: the same file, byte for byte, or the same picture saved anew.

A test or validation image that was trained on flatters the model. Copies byte for byte are found in the
files, without decoding. A picture that was saved anew (other quality, size, format, a little brighter) is
found by a perceptual hash of 255 bits: the lowest frequencies of the picture, above or below their median
(pHash, Zauner 2010, with 16 x 16 instead of 8 x 8 frequencies: to the latter all chests look alike).

LIMIT, the number of different bits up to which two pictures are called alike, was measured. 1,672 images of
another set are Kermany images saved anew: they differ from these in 0 to 18 bits; its other 1,678 images
differ from every Kermany image in 64 or more. Of the 17 million pairs of Kermany images, the nearest that are
no copies (two children) differ in 36 bits; of 1,500 adults' lungs on black in 36, too. Mirrored, turned or
cropped copies (2% of the side or more) are not found. All pairs are compared: a second for 6,000 images, two
minutes for 112,000, on one core.
"""

import itertools
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.fft import dct
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.console import progress, say
from common.files import sha256
from layouts import arrays
from layouts.listing import SIDE_WORDS

LIMIT = 28  # different bits of 255
SIDE, FREQUENCIES = 32, 16  # the picture is averaged to SIDE x SIDE; FREQUENCIES x FREQUENCIES are kept
BLOCK = 4096  # bytes in the middle of a file that are compared first
PAIRS = (("val", "train"), ("test", "train"), ("test", "val"))


# ---------------------------------------------------------------- the same bytes


def contents(root, files):
    """A number for each of `files` (names relative to `root`), int64 [N]: the same for those with the same
    bytes, -1 for a file that has no copy among them, is empty, or cannot be read.

    Only files of equal length are opened, and only those with an equal middle are read whole."""
    paths = tuple(os.path.join(root, file) for file in files)
    return _contents(paths, tuple(map(arrays.stamp, paths)))


@lru_cache(maxsize=4)  # the same set is opened several times in a run
def _contents(paths, stamps):
    """`contents` of files with these lengths and times of change."""
    groups = [range(len(paths))]
    for marks in (lambda i: stamps[i][0], lambda i: _middle(paths[i]), lambda i: _whole(paths[i])):
        finer = {}
        for number, group in enumerate(groups):
            for i in group:
                mark = marks(i)
                if mark:
                    finer.setdefault((number, mark), []).append(i)
        groups = [group for group in finer.values() if len(group) > 1]
    found = np.full(len(paths), -1, dtype=np.int64)
    for number, group in enumerate(groups):
        found[group] = number
    return found


def _middle(path):
    """The bytes in the middle of a file; None if it cannot be read, which decoding it will tell."""
    try:
        if arrays.parts_of(path):
            return arrays.pixels(path).tobytes()
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - BLOCK) // 2)
            return file.read(BLOCK)
    except OSError:
        return None


def _whole(path):
    """The SHA-256 of a file; None if it cannot be read."""
    try:
        if arrays.parts_of(path):
            return arrays.pixels(path).tobytes()
        return sha256(Path(path))
    except OSError:
        return None


def same_files(root, files, other_root, others):
    """Which of `files` have the very bytes of one of `others`: list of names. No image is decoded."""
    paths = [str(Path(root, name).absolute()) for name in files]
    theirs = [str(Path(other_root, name).absolute()) for name in others]
    found = contents("/", paths + theirs)
    known = set(found[len(files) :].tolist()) - {-1}
    return [name for name, number in zip(files, found.tolist()) if number in known]


def on_two_sides(content, part):
    """Whether a copy of one of the positions `part` of an Index with these `contents` is not among them."""
    inside = np.zeros(len(content), dtype=bool)
    inside[part] = True
    return bool(np.intersect1d(content[inside & (content >= 0)], content[~inside]).size)


def joined(patients, content):
    """The names of the patients [N], where those that share a file go by one name, the first of them."""
    names, codes = np.unique(np.asarray(patients, dtype=object), return_inverse=True)
    has = content >= 0
    edges = codes[has], len(names) + content[has]
    size = len(names) + int(content.max(initial=-1)) + 1
    graph = coo_array((np.ones(int(has.sum())), edges), shape=(size, size))
    part = connected_components(graph, directed=False)[1][: len(names)]
    first = {}
    for name, number in zip(names, part):  # in the order of the names
        first.setdefault(number, name)
    return [first[part[code]] for code in codes]


def warn_of_labels(files, content, targets):
    """A note on copies of a file that are said to be different things: `targets` [N] or [N, K]."""
    first, wrong = {}, []
    for file, number, target in zip(files, content.tolist(), np.asarray(targets).tolist()):
        if number >= 0 and first.setdefault(number, (file, target))[1] != target:
            wrong.append(f"{first[number][0]} and {file}")
    if wrong:
        say(f"note: {len(wrong)} files have the bytes of another with other labels, such as {wrong[0]}")


def count(content):
    """{"val_train", "test_train", "test_val": images of the first side with a copy on the second} of the
    contents {side: int64 [n]}."""
    found = {}
    for a, b in PAIRS:
        known = content[b][content[b] >= 0]
        found[f"{a}_{b}"] = int(np.isin(content[a], known).sum())
    return found


# ---------------------------------------------------------------- the same picture


def hashes(subset):
    """int8 [N, 255] of a data.Subset's images: 1 and -1; 0 for an image without any structure."""
    rows = subset.rows
    found = np.zeros((len(rows), FREQUENCIES**2 - 1), dtype=np.int8)
    if len(rows):
        project = _projection(len(subset.images[rows[0]]))
    starts = range(0, len(rows), 256)
    for begin in progress(starts, len(starts), "looking for copies", "parts of the images"):
        grey = subset.images[rows[begin : begin + 256]].astype(np.float32)  # (n, S, S)
        low = (project @ grey @ project.T).reshape(len(grey), -1)[:, 1:]  # (n, 255), without the mean
        signs = np.where(low > np.median(low, axis=1, keepdims=True), 1, -1)
        flat = np.abs(low).max(axis=1) < 0.5  # grey levels
        found[begin : begin + 256] = np.where(flat[:, None], 0, signs)
    return found


@lru_cache(maxsize=4)
def _projection(side):
    """float32 [FREQUENCIES, side]: averages `side` pixels to SIDE, then takes their lowest frequencies."""
    edges = np.arange(SIDE + 1) * side / SIDE
    pixel = np.arange(side)
    upper = np.minimum(edges[1:, None], pixel + 1)
    lower = np.maximum(edges[:-1, None], pixel)
    average = np.clip(upper - lower, 0, None) * SIDE / side  # (SIDE, side); each row adds up to 1
    return dct(average, axis=0, norm="ortho")[:FREQUENCIES].astype(np.float32)


def nearest(here, there):
    """For each of the hashes `here` [N, 255] the nearest of `there` [M, 255]: its position, int64 [N], and
    the number of different bits, int64 [N]. Exact: all pairs are compared, in blocks."""
    position, least = np.zeros(len(here), np.int64), np.full(len(here), here.shape[1] + 1)
    blocks = list(itertools.product(range(0, len(here), 2048), range(0, len(there), 8192)))
    for a, b in progress(blocks, len(blocks), "comparing pictures", "blocks of pairs"):
        mine, other = here[a : a + 2048].astype(np.float32), there[b : b + 8192].astype(np.float32)
        agreement = mine @ other.T  # equal bits minus different ones; 0 for an image of zeros
        best = agreement.argmax(axis=1)
        most = agreement[np.arange(len(mine)), best]
        bits = np.rint((here.shape[1] - most) / 2).astype(np.int64)
        better = bits < least[a : a + 2048]
        least[a : a + 2048][better] = bits[better]
        position[a : a + 2048][better] = b + best[better]
    return position, least


def alike(here, there):
    """[(file of Subset `here`, file of `there`)] of those that look the same, copies byte for byte among
    them."""
    if not len(here) or not len(there):
        return []
    position, bits = nearest(hashes(here), hashes(there))
    return [(here.files[i], there.files[position[i]]) for i in np.flatnonzero(bits <= LIMIT)]


def count_alike(subsets):
    """{"val_train", ...: images of the first side that look like one of the second} of {side: Subset}, those
    pairs whose sides are there, and the note that says so where there are any, else None."""
    prints = {side: hashes(subset) for side, subset in subsets.items()}
    counts, examples = {}, []
    for a, b in PAIRS:
        if a not in subsets or b not in subsets:
            continue
        position, bits = nearest(prints[a], prints[b])
        found = np.flatnonzero(bits <= LIMIT)
        counts[f"{a}_{b}"] = len(found)
        examples += [f"{subsets[a].files[i]} and {subsets[b].files[position[i]]}" for i in found[:1]]
    note = f"note: {told(counts, 'look like')}, such as {'; '.join(examples)}" if examples else None
    return counts, note


# ---------------------------------------------------------------- as text


def told(counts, verb):
    """Counts by pairs of sides as text, "12 test images VERB training images"; "" where all are 0."""
    found = []
    for a, b in PAIRS:
        if n := counts.get(f"{a}_{b}", 0):
            found.append(f"{n} {SIDE_WORDS[a]} images {verb} {SIDE_WORDS[b]} images")
    return ", ".join(found)


def say_copies(split, look_alikes=None):
    """What the "split" of a results.json, and a calibration's count of `look_alikes`, say about copies, as
    text."""
    if "copies" not in split:
        return "copies on both sides: not looked for by the version that made the run"
    exact = told(split["copies"], "are copies, byte for byte, of")
    text = exact or "no file is on two sides"
    counts = split.get("alike", {}) if look_alikes is None else look_alikes
    none = "no picture looks the same on two sides"
    if "test_train" not in counts:  # training decodes no test image
        none = "no validation image looks like a training image"
    if not counts:
        return text
    look_alikes = told(counts, "look like") or none
    if exact and any(counts.values()):
        look_alikes += " (copies included)"
    return f"{text}; {look_alikes}"


def warn(files, content, counts):
    """A note on files that are on two sides, if there are any. `files`, `content`: by side; `counts`: what
    `count` gives."""
    if not any(counts.values()):
        return
    examples = []
    for a, b in PAIRS:
        if counts[f"{a}_{b}"]:
            i = int(np.flatnonzero(np.isin(content[a], content[b][content[b] >= 0]))[0])
            j = int(np.flatnonzero(content[b] == content[a][i])[0])
            examples.append(f"{files[a][i]} and {files[b][j]}")
    say(
        f"note: {told(counts, 'are copies, byte for byte, of')}, such as {'; '.join(examples)}: figures on "
        "them flatter the model. Delete one of each two, or cut by patient, which keeps copies on one side "
        "(--split patient for validation, --split pooled for test too)"
    )
