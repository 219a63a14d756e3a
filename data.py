"""Images on disk -> train/validation/test -> one grey uint8 array -> batches on the device.

Layout: DIR/{train,test}/CLASS/*.jpeg, or a table of findings (index.py reads both; split.py splits). Only
pixels reach a model: never file names, sizes, or original widths and heights, which separate the classes.

    python data.py --statistics DIR

prints mean and standard deviation of the training pixels, what --mean auto --std auto take.
"""

import prelude  # noqa: F401  (first: see there)

import hashlib
import math
import mmap
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split

import index as indices
import masks as lung_masks
import tables
import twins
from common import InputError, Parser, add_flags, say, sha256, start
from dataconfig import DataConfig, add_choices
from images import load_images
from inputs import Inputs
from split import POOLED, cut, cut_test, image_weights, say_shared, undersampled


class Subset:
    """Some rows of the cached images.

    `files` [N] relative to the data folder; `targets` int64 [N] or int8 [N, K]; `images` uint8 [*, S, S],
    memory-mapped and shared between subsets; `rows` int64 [N] into it;
    `patients` [N] (default: as the file names tell); `levels` float64 [N, 2]: mean and standard deviation of
    each image's grey levels, 0 to 1 (default: computed from the images); `masks`: the lungs on `images`,
    packed (lungs.pack), where a model needs them; `sources` int64 [N]: the hospital, 0 the first one.
    """

    def __init__(self, files, targets, images, rows, *, patients=None, levels=None, masks=None, sources=None):
        self.files, self.targets, self.images, self.rows = files, targets, images, rows
        self.masks = masks
        self.sources = np.zeros(len(files), np.int64) if sources is None else sources
        self.patients = [indices.patient_id(f) for f in files] if patients is None else patients
        self._levels = levels

    @property
    def levels(self):
        if self._levels is None:
            images = (self.images[row] for row in self.rows)
            self._levels = np.array([(image.mean() / 255, image.std() / 255) for image in images])
        return self._levels

    def __len__(self):
        return len(self.files)

    def take(self, index):
        """The Subset of these positions."""
        files, patients = ([values[i] for i in index] for values in (self.files, self.patients))
        levels = None if self._levels is None else self._levels[index]
        about = dict(patients=patients, levels=levels, masks=self.masks, sources=self.sources[index])
        return Subset(files, self.targets[index], self.images, self.rows[index], **about)

    def pixels(self, index=slice(None)):
        """uint8 [n, S, S] of these positions, in memory."""
        return self.images[self.rows[index]]

    def lungs(self, index=slice(None)):
        """bool [n, S, S] of these positions, True on the lungs. InputError if the masks are not there."""
        if self.masks is None:
            raise InputError("these images come without lung masks, which the model needs")
        return lung_masks.unpack(self.masks[self.rows[index]])


class Batch(NamedTuple):
    """x: what the model is shown, float32 [B, 1 or 2, S, S] (lungs.show); target: int64 [B] or int8 [B, K];
    weight: float32 [B] (split.image_weights); all on the device."""

    x: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


# ---------------------------------------------------------------- the data set


def open_index(config):
    """(root, Index of all images, positions of train and validation, positions of test, where test comes
    from). Reads names, tables and the bytes of files of equal length; decodes no image."""
    if config.labels:
        root = Path(config.data_dir)
        index = tables.read_table(config.labels, root, config.classes)
        if config.split not in POOLED:
            index = tables.published_lists(index, root)
        if config.split == "published" and not (index.part == "test").any():
            raise InputError(f"--split published: {root} has no {' and '.join(tables.LISTS.values())}")
    else:
        root = indices.find_root(config.data_dir, config.classes)
        there = [p for p in indices.PARTS if p == "train" or (root / p).is_dir()]
        if config.split == "published" and "val" not in there:
            raise InputError(f"--split published: {root} has no val/ folder")
        index = indices.read_folders(
            root, config.classes, [p for p in there if p != "val" or config.split == "published"]
        )
    if config.patients:
        index = tables.read_patients(config.patients, index, root)
    elif config.split in POOLED and not config.labels:  # each part numbers its patients from 1
        named = [
            f"{part}/{name}" if k else name for part, name, k in zip(index.part, index.patients, index.known)
        ]
        index = index._replace(patients=named)
    if config.undersample:
        index = index.take(undersampled(index.targets, config.split_seed))
    index = index._replace(content=twins.contents(root, index.files))
    return (root, index, *cut_test(index, config))


def load(config, root, index, part):
    """(Subset of an Index, the sizes of the originals, which positions were readable)."""
    usual = not config.labels and config.split in ("patient", "image") and (index.part == part).all()
    name = part if usual else f"{part}-{sha256(index.files)[:8]}"
    found = load_images(
        root,
        index.files,
        size=config.img_size,
        resize=config.resize,
        cache_dir=config.cache_dir,
        skip_bad=config.skip_bad,
        name=name,
        verify=config.verify_cache,
    )
    masks = None
    if config.needs_lungs:
        if lung_masks.holds_masks(config.lungs) and config.resize != "squash":
            raise InputError(f"--lungs {config.lungs}: masks from a file go with --resize squash only")
        what = f"{part} images in {root}"
        fate = "these are left out" if config.input == "pair" else "these are shown as they are"
        if config.reads_lungs:
            fate += ", cut in the middle where left and right are read apart"
        masks = lung_masks.load_masks(config.lungs, found, index.files, what, config.lungs_sha256, fate)
    kept = index.take(found.rows) if len(found.rows) < len(index.files) else index
    about = dict(patients=kept.patients, levels=found.levels, masks=masks)
    return Subset(kept.files, kept.targets, found.images, found.rows, **about), kept, found.sizes


def load_test(config):
    """The test Subset. Only calibrate.py, and explain.py and studies on request, may ask for it: this opens
    the images."""
    root, index, _, test, _ = open_index(config)
    return load(config, root, index.take(test), "test")[0]


def load_train_val(config, tell=print):
    """(train, val) Subsets and `info`, the JSON description of the split; `tell`s the split in a line.

    `info`: train, val, test (image counts), counts (images of every class, or positives of every finding),
    shared_patients (validation images whose patient is in train too), unknown_patients (images whose patient
    is not known), fingerprint (SHA-256 of both sides' file names, and of a table's labels), test_from,
    synthetic, set, original_size, copies (images with the bytes of one on another side), alike (validation
    images that look like a training image; twins.py). The images of the test part are counted, and the bytes
    of those as long as another file compared; they are never decoded.
    """
    root, index, others, test, test_from = open_index(config)
    test_index = index.take(test)
    everything, kept, sizes = load(config, root, index.take(others), "train")
    if config.split == "published" and (kept.part == "val").any():
        positions = np.flatnonzero(kept.part == "train"), np.flatnonzero(kept.part == "val")
    else:
        by_patient = not config.split.endswith("image")
        positions = cut(kept, config.task, by_patient, config.val_share, config.split_seed)
    if config.input == "pair":  # there is nothing to learn where no mask is known
        known = everything.lungs().any(axis=(1, 2))
        positions = [i[known[i]] for i in positions]
    train, val = (everything.take(i) for i in positions)
    info = describe(config, root, train, val, test_index, kept, test_from)
    info["original_size"] = sizes
    files = {"train": train.files, "val": val.files, "test": test_index.files}
    content = {s: kept.content[i] for s, i in zip(files, positions)} | {"test": test_index.content}
    info["copies"] = twins.count(content)
    info["alike"], note = twins.count_alike({"train": train, "val": val})
    listed = "; ".join(f"{s} {_count_text(info['counts'][s])}" for s in info["counts"])
    where = "" if test_from == "published" else f", test {test_from}"
    tell(
        f"data: {root}{' (SYNTHETIC)' if info['synthetic'] else ''}, --split {config.split}{where}: "
        f"(train, val, test) = ({len(train)}, {len(val)}, {len(test)}): {listed}; {say_shared(info)}; "
        f"{twins.say_copies(info)}"
    )
    twins.warn(files, content, info["copies"])
    twins.warn_of_labels(index.files, index.content, index.targets)
    if note:
        say(note)
    _say_absent(config.task, info)
    if config.split == "patient" and config.task.kind == "softmax":
        _say_inexact(everything.targets, config, list(info["counts"]["val"].values()))
    return train, val, info


def load_split(run, split, moved=None):
    """The Subset "val" or "test" of a run's images; `moved`: settings of the data that are not as they were
    trained. InputError if they are not those it was trained with."""
    config = DataConfig.from_json({**run.results["data"], **(moved or {})})
    _, val, found = load_train_val(config, tell=say)
    if found["fingerprint"] != run.results["split"]["fingerprint"]:
        raise InputError(
            f"the images in {config.data_dir} are not those that {run} was trained on (the split's "
            "fingerprint differs): put those back, or point --data-dir at them"
        )
    return val if split == "val" else load_test(config)


def same_images(here, there):
    """Which images of Subset `here` have the very pixels of one of the Subsets `there`: list of files."""

    def prints(subset):
        return [hashlib.blake2b(subset.images[row].tobytes(), digest_size=16).digest() for row in subset.rows]

    known = {p for subset in there for p in prints(subset)}
    return [file for file, p in zip(here.files, prints(here)) if p in known]


def describe(config, root, train, val, test, kept, test_from):
    """The "split" of a results.json, but for the sizes of the originals."""
    sides, seen = {"train": train, "val": val, "test": test}, set(train.patients)
    either = seen | set(val.patients)
    sigmoid = config.task.kind == "sigmoid"
    counts = {
        s: {
            c: int(((i.targets[:, k] == 1) if sigmoid else (i.targets == k)).sum())
            for k, c in enumerate(config.classes)
        }
        for s, i in sides.items()
    }
    info = {
        **{s: len(i.files) for s, i in sides.items()},
        "counts": counts,
        "shared_patients": sum(patient in seen for patient in val.patients),
        "unknown_patients": kept.unknown,
        "fingerprint": sha256([sorted(train.files), sorted(val.files)]),
        "test_from": test_from,
        "synthetic": Path(root, "SYNTHETIC").exists(),  # demo.py leaves it in what it draws
        "set": root.resolve().name,
    }
    if sigmoid:
        labelled = [sorted(zip(i.files, i.targets.tolist())) for i in (train, val)]
        info["fingerprint"] = sha256([config.classes, labelled])
    # The published parts of a set of folders number their patients separately.
    if test_from != "published" or config.labels or config.patients:
        info["shared_patients_test"] = sum(patient in either for patient in test.patients)
    return info


def _count_text(counts):
    """ "3 A + 5 B", of many findings the first few."""
    items = [f"{n} {c}" for c, n in counts.items()]
    return " + ".join(items[:6]) + (f" + {len(items) - 6} more" if len(items) > 6 else "")


def _say_absent(task, info):
    """A note on findings that no training image, or every one, has."""
    total = info["train"]
    never = [c for c, n in info["counts"]["train"].items() if n == 0]
    always = [c for c, n in info["counts"]["train"].items() if n == total]
    for names, text in ((never, "no training image has"), (always, "every training image has")):
        if names and task.kind == "sigmoid":
            say(f"note: {text} {', '.join(names)}, so nothing can be learnt about it")


def _say_inexact(targets, config, have):
    """A note if whole patients do not add up to the class counts of a stratified split of images."""
    _, plain = train_test_split(
        targets, test_size=config.val_share, stratify=targets, random_state=config.split_seed
    )
    want = [int((plain == k).sum()) for k in range(len(config.classes))]
    if want != have:
        say(f"note: whole patients allow no exact stratified split: validation has {have}, nearest to {want}")


def pixel_fingerprint(subset):
    """SHA-256 over a subset's file names, targets and pixels: equal iff a model sees the same data."""
    crc = 0
    for row in subset.rows:
        crc = zlib.crc32(subset.images[row], crc)
    return sha256([subset.files, subset.targets.tolist(), crc])


def input_range(subset):
    """Least and greatest mean and standard deviation of an image (grey levels 0 to 1) that a model saw."""
    low, high = subset.levels.min(axis=0), subset.levels.max(axis=0)
    return {name: [float(low[i]), float(high[i])] for i, name in enumerate(("mean", "std"))}


def statistics(subset, inputs):
    """(mean, standard deviation) of all pixels that a model is shown of a Subset, before scaling: floats in
    [0, 1], the same for every channel. Random changes are left out."""
    sums, batches = np.zeros(2), Batches(subset, inputs)
    for index in torch.arange(len(subset)).split(64):
        grey = inputs.cover(batches.get(index).x)[:, :1].double()
        sums += [float(grey.sum()), float(grey.square().sum())]
    mean, square = sums / (len(subset) * subset.images[0].size)
    return mean, math.sqrt(max(0.0, square - mean**2))


# ---------------------------------------------------------------- batches on the device


class Batches:
    """Batches of a Subset on the device of `inputs`.

    On CUDA the whole uint8 array is kept on the device if it takes less than half the free memory; otherwise
    rows are gathered from the memory map, whose pages are let go again every 4 batches: resident memory does
    not grow with the number of images (the system's file cache still holds them).
    """

    def __init__(self, subset, inputs, balance="none"):
        self.subset, self.inputs = subset, inputs
        self.targets = torch.from_numpy(subset.targets).to(inputs.device)
        weights = image_weights(subset.targets, subset.sources, balance)
        self.weights = torch.from_numpy(weights).to(inputs.device)
        self.resident, self.taken = None, 0
        size = len(subset) * subset.images[0].nbytes
        if inputs.device.type == "cuda" and size < torch.cuda.mem_get_info(inputs.device)[0] / 2:
            self.resident = torch.from_numpy(subset.pixels()).to(inputs.device)

    def get(self, index):
        """Positions `index` (int64 tensor [B] on the CPU) -> Batch."""
        masks = self.subset.lungs(index.numpy()) if self.inputs.needs_lungs else None
        if self.resident is not None:
            index = index.to(self.inputs.device)
            grey = self.inputs.grey(self.resident[index], masks)
            return Batch(grey, self.targets[index], self.weights[index])
        pixels = self.subset.images[self.subset.rows[index.numpy()]]
        x = self.inputs.grey(pixels, masks)
        self.taken += 1
        for part in getattr(self.subset.images, "parts", [self.subset.images]):
            file = getattr(part, "_mmap", None)
            if self.taken % 4 == 0 and file is not None and hasattr(mmap, "MADV_DONTNEED"):
                file.madvise(mmap.MADV_DONTNEED)
        index = index.to(self.inputs.device)
        return Batch(x, self.targets[index], self.weights[index])


def main():
    parser = Parser(__doc__)
    parser.add_argument(
        "--statistics", metavar="DIR", required=True, help="data folder; see train_scratch.py"
    )
    group = parser.add_argument_group("data")
    add_flags(group, DataConfig, leave_out=("data_dir",))
    add_choices(group)
    args = parser.parse_args()
    args.data_dir = args.statistics
    config = DataConfig.from_args(args)
    train = load_train_val(config, say)[0]
    shown = Inputs((0.0,), (1.0,), torch.device("cpu"), normalise=config.normalise, look=config.input)
    mean, std = statistics(train, shown)
    print(f"{len(train)} training images, {config.img_size} px: mean {mean:.4f}, std {std:.4f}")


if __name__ == "__main__":
    start(main)
