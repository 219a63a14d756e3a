"""Images on disk -> train/validation split -> one grey uint8 array -> batches on the device.

Layout: DIR/{train,test}/{NORMAL,PNEUMONIA}/*.jpeg (DIR/chest_xray/... of the Kaggle zip is found too).
Only pixels reach a model: never file names, sizes, or original widths and heights, which separate the
classes.
"""

import mmap
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from common import InputError, Number, add_flags, check_fields, flag, say, sha256
from images import EXTENSIONS, RESIZES, load_images
from inputs import MODES, normalise
from task import CLASSES, Task

DEFAULT_DIR = "Data/chest_xray"
SPLITS = ("patient", "image")
IMG_SIZE = Number(int, 1, 2048)


@dataclass(frozen=True)
class DataConfig:
    """Everything that decides which images are seen and how; kept in results.json."""

    data_dir: str = flag(DEFAULT_DIR, "folder with train/ and test/", metavar="DIR")
    img_size: int = flag(224, "side of the square input (default: 224; of the drawn set 96)", IMG_SIZE, "PX")
    resize: str = flag("squash", "non-square originals: distort, letterbox, or cut to the middle", RESIZES)
    split: str = flag("patient", "validation split: no patient on both sides, or stratified images", SPLITS)
    split_seed: int = flag(0, "seed of the validation split", Number(int, 0, 2**32 - 1), "N")
    val_fraction: float = 0.2
    skip_bad: bool = flag(False, "leave out unreadable images instead of stopping")
    cache_dir: str = flag("Data/cache", "where decoded images are kept", metavar="DIR")
    classes: tuple = CLASSES
    normalise: str = flag("none", "exposure: as it is, to one mean and spread, or a flat histogram", MODES)

    @property
    def task(self):
        return Task(self.classes)

    @classmethod
    def from_args(cls, args):
        """Parsed flags -> DataConfig."""
        return cls(**{name: getattr(args, name) for name in asdict(cls()) if hasattr(args, name)})

    @classmethod
    def from_json(cls, value):
        """The "data" object of a results.json -> DataConfig; InputError if it is not one."""
        try:
            config = cls(**{**value, "classes": tuple(value["classes"])})
        except (KeyError, TypeError) as error:
            raise InputError(f"the data settings of the run are incomplete or unknown: {error}") from None
        wrong = check_fields(config)
        if not isinstance(value["classes"], (list, tuple)) or not all(
            isinstance(c, str) for c in config.classes
        ):
            wrong.append("classes")
        if wrong:
            named = ", ".join(f"{k} is {str(value.get(k))[:60]}" for k in wrong)
            raise InputError(f"the data settings of the run are damaged: {named}")
        return config


def add_arguments(parser):
    """The data flags that every training script shares."""
    group = parser.add_argument_group("data")
    add_flags(group, DataConfig, img_size=None)  # demo.prepare fills it in
    group.add_argument("--demo", action="store_true", help="draw a small synthetic set and use it")
    group.add_argument("--download", action="store_true", help="fetch the Kaggle set into --data-dir first")


class Subset:
    """Some rows of the cached images.

    `files` [N] relative to the data folder; `targets` int64 [N]; `patients` [N] as `patient_id` gives them;
    `images` uint8 [*, S, S], memory-mapped and shared between subsets; `rows` int64 [N] into it; `normalise`:
    see inputs.normalise.
    """

    def __init__(self, files, targets, images, rows, normalise="none"):
        self.files, self.targets, self.images, self.rows = files, targets, images, rows
        self.normalise = normalise

    @property
    def patients(self):
        return [patient_id(f) for f in self.files]

    def __len__(self):
        return len(self.files)

    def take(self, index):
        """The Subset of these positions."""
        files = [self.files[i] for i in index]
        return Subset(files, self.targets[index], self.images, self.rows[index], self.normalise)

    def pixels(self, index=slice(None)):
        """uint8 [n, S, S] of these positions, in memory."""
        return self.images[self.rows[index]]


class Batch(NamedTuple):
    """x: grey float32 [B, 1, S, S] in [0, 1]; target: int64 [B]; both on the device."""

    x: torch.Tensor
    target: torch.Tensor


# ---------------------------------------------------------------- files


def find_root(data_dir, classes=CLASSES):
    """The folder that holds train/ and test/: `data_dir` or its chest_xray/ (to depth 2).

    InputError if there is none."""
    for nested in ("", "chest_xray", "chest_xray/chest_xray"):
        root = Path(data_dir, nested)
        if (root / "train").is_dir():
            return root
    raise InputError(
        f"no data: {data_dir} has no train/ folder. Three ways to get one:\n"
        "  --data-dir DIR   where DIR/{train,test}/{" + ",".join(classes) + "} hold the images\n"
        "  --download       fetch the Kaggle set (6 GB with its duplicate folder)\n"
        "  --demo           draw a small synthetic set for a first try"
    )


class Index(NamedTuple):
    """Which images there are. files: [N] relative to the data folder; targets: int64 [N]; patients: [N]
    names; unknown: how many of them are no patient's name but stand for one image each."""

    files: list
    targets: np.ndarray
    patients: list
    unknown: int


def list_images(root, part, classes=CLASSES):
    """The Index of the image files of root/part/<class>/, sorted by name within each class.

    Hidden files, `._*` and __MACOSX are passed over. Only names are read, no file is opened.
    InputError if a class folder is missing or holds no image.
    """
    files, targets = [], []
    for target, name in enumerate(classes):
        folder = Path(root, part, name)
        if not folder.is_dir():
            raise InputError(f"{folder} does not exist: each class needs a folder of its own")
        found = sorted(
            p.name
            for p in folder.iterdir()
            if p.suffix.lower() in EXTENSIONS
            and not p.name.startswith((".", "__MACOSX"))
            and (p.is_file() or not p.exists())  # no named pipes or folders; a broken link is a bad image
        )
        if not found:
            raise InputError(f"{folder} holds no {'/'.join(EXTENSIONS)} images")
        files += [f"{part}/{name}/{f}" for f in found]
        targets += [target] * len(found)
    patients = [patient_id(f) for f in files]
    unknown = sum(patient == file for patient, file in zip(patients, files))
    return Index(files, np.array(targets, dtype=np.int64), patients, unknown)


def patient_id(name):
    """The patient in a file name of the Kermany set; any other name stands for a patient of its own.

    person1000_virus_1681.jpeg -> person1000; NORMAL2-IM-0587-0001-0002.jpeg -> NORMAL2-IM-0587.
    The numbers of the test set start again from 1, so ids compare within one split only.
    """
    match = re.match(r"(person\d+)_|((?:NORMAL\d+-)?IM-\d+)-", Path(name).stem)
    return match[1] or match[2] if match else name


def say_shared(split):
    """What the "split" of a results.json says about patients on both sides, as text."""
    unknown = split.get("unknown_patients", 0)
    if unknown >= split["train"] + split["val"]:
        return "patients unknown, so images of one patient may be on both sides"
    text = f"{split['shared_patients']} validation images share a patient with train"
    return text + (f" (patients unknown for {unknown} images)" if unknown else "")


# ---------------------------------------------------------------- split


def split_train_val(files, labels, mode="patient", val_fraction=0.2, seed=0):
    """Indices (train, val), both sorted, of the original training files.

    "image": scikit-learn's stratified `train_test_split`. "patient": the same number of validation images
    per class, or the nearest reachable, with whole patients on one side: patients are shuffled, and per
    class an exact subset sum takes the earliest patients that reach the count. A patient with images of
    several classes goes to validation while every class still has room. Depends on names, labels and
    seed only, not on their order. InputError if a class cannot be on both sides.
    """
    labels = np.asarray(labels)
    order = np.array(sorted(range(len(files)), key=files.__getitem__))
    try:
        train, val = train_test_split(
            order, test_size=val_fraction, stratify=labels[order], random_state=seed
        )
    except ValueError as error:
        raise InputError(f"the training images cannot be split: {error}") from None
    if mode == "image":
        return np.sort(train), np.sort(val)
    kinds = np.unique(labels)
    room = {k: int((labels[val] == k).sum()) for k in kinds}
    patients = {}
    for i in order:
        patients.setdefault(patient_id(files[i]), []).append(i)
    shuffled = [list(patients.values())[i] for i in np.random.default_rng(seed).permutation(len(patients))]
    single = {k: [] for k in kinds}
    chosen = []
    for images in shuffled:
        counts = {k: int((labels[images] == k).sum()) for k in np.unique(labels[images])}
        if len(counts) == 1:
            single[labels[images[0]]].append(images)
        elif all(counts[k] <= room[k] for k in counts):
            chosen += images
            room = {k: room[k] - counts.get(k, 0) for k in kinds}
    for k in kinds:
        for g in _nearest_subset([len(images) for images in single[k]], room[k]):
            chosen += single[k][g]
    val = np.sort(np.array(chosen, dtype=np.int64))
    train = np.setdiff1d(order, val)
    for k in kinds:
        if not (labels[val] == k).any() or not (labels[train] == k).any():
            raise InputError(
                f"class number {k} has too few patients to be in train and validation: use --split image"
            )
    return train, val


def _nearest_subset(sizes, target):
    """Indices of a subset of `sizes` whose sum is nearest to `target`, built from the earliest items.

    Subset sum over a bitset of reachable sums; `first[s]` is the item that first made sum s reachable,
    so following it back never uses an item twice.
    """
    limit = target + max(sizes, default=0)
    reachable, first, mask = 1, {}, (1 << (limit + 1)) - 1
    for i, size in enumerate(sizes):
        new = (reachable << size) & ~reachable & mask
        reachable |= new
        while new:
            low = new & -new
            first[low.bit_length() - 1] = i
            new ^= low
        if reachable >> target & 1:
            break
    total = min((s for s in (0, *first)), key=lambda s: (abs(s - target), s))
    chosen = []
    while total:
        chosen.append(first[total])
        total -= sizes[first[total]]
    return chosen


# ---------------------------------------------------------------- the data set


def load_part(config, part):
    """The Subset of a folder ("train" or "test"), the number of images whose patient is unknown, and the
    range of the originals' sizes. Only calibrate.py, and explain.py and studies on request, may ask for
    "test": this opens it.
    """
    root = find_root(config.data_dir, config.classes)
    index = list_images(root, part, config.classes)
    images, kept, sizes = load_images(
        root,
        index.files,
        size=config.img_size,
        resize=config.resize,
        cache_dir=config.cache_dir,
        skip_bad=config.skip_bad,
        name=part,
    )
    files = [index.files[i] for i in kept]
    return Subset(files, index.targets[kept], images, kept, config.normalise), index.unknown, sizes


def load_test(config):
    """The test Subset: see `load_part` for who may call this."""
    return load_part(config, "test")[0]


def load_train_val(config, tell=print):
    """(train, val) Subsets and `info`, the JSON description of the split; `tell`s the split in a line.

    `info`: train, val, test (image counts), counts (per class), shared_patients (validation images whose
    patient is in train too), unknown_patients (images whose patient is not known), fingerprint (SHA-256 of
    both sides' file names), synthetic, set, original_size. The files of the test folder are counted, never
    opened.
    """
    root = find_root(config.data_dir, config.classes)
    # Both folders are listed before any image is decoded.
    _, test = (list_images(root, part, config.classes).targets for part in ("train", "test"))
    everything, unknown, sizes = load_part(config, "train")
    index = split_train_val(
        everything.files, everything.targets, config.split, config.val_fraction, config.split_seed
    )
    train, val = (everything.take(i) for i in index)
    seen = set(train.patients)
    targets = {"train": train.targets, "val": val.targets, "test": test}
    counts = {s: {c: int((y == k).sum()) for k, c in enumerate(config.classes)} for s, y in targets.items()}
    info = {
        **{name: len(y) for name, y in targets.items()},
        "counts": counts,
        "shared_patients": sum(patient in seen for patient in val.patients),
        "unknown_patients": unknown,
        "fingerprint": sha256([sorted(train.files), sorted(val.files)]),
        "synthetic": Path(root, "SYNTHETIC").exists(),  # demo.py leaves it in what it draws
        "set": root.resolve().name,
        "original_size": sizes,
    }
    listed = "; ".join(f"{s} " + " + ".join(f"{n} {c}" for c, n in counts[s].items()) for s in counts)
    tell(
        f"data: {root}{' (SYNTHETIC)' if info['synthetic'] else ''}, --split {config.split}: "
        f"(train, val, test) = ({len(train)}, {len(val)}, {len(test)}): {listed}; {say_shared(info)}"
    )
    if config.split == "patient":
        _say_inexact(everything.targets, config, list(counts["val"].values()))
    return train, val, info


def _say_inexact(targets, config, have):
    """A note if whole patients do not add up to the class counts of a stratified split of images."""
    _, plain = train_test_split(
        targets, test_size=config.val_fraction, stratify=targets, random_state=config.split_seed
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
    values = [
        (image.mean() / 255, image.std() / 255) for image in (subset.images[row] for row in subset.rows)
    ]
    return {name: [float(min(v)), float(max(v))] for name, v in zip(("mean", "std"), zip(*values))}


# ---------------------------------------------------------------- batches on the device


class Batches:
    """Batches of a Subset on the device of `inputs`.

    On CUDA the whole uint8 array is kept on the device if it takes less than half the free memory; otherwise
    rows are gathered from the memory map, whose pages are let go again every 4 batches: resident memory does
    not grow with the number of images (the system's file cache still holds them).
    """

    def __init__(self, subset, inputs):
        self.subset, self.inputs = subset, inputs
        self.targets = torch.from_numpy(subset.targets).to(inputs.device)
        self.resident, self.taken = None, 0
        size = len(subset) * subset.images[0].nbytes
        if inputs.device.type == "cuda" and size < torch.cuda.mem_get_info(inputs.device)[0] / 2:
            self.resident = torch.from_numpy(subset.pixels()).to(inputs.device)

    def get(self, index):
        """Positions `index` (int64 tensor [B] on the CPU) -> Batch."""
        if self.resident is not None:
            index = index.to(self.inputs.device)
            return Batch(normalise(self.resident[index], self.subset.normalise), self.targets[index])
        pixels = self.subset.images[self.subset.rows[index.numpy()]]
        x = torch.from_numpy(pixels).to(self.inputs.device)
        self.taken += 1
        file = getattr(self.subset.images, "_mmap", None)
        if self.taken % 4 == 0 and file is not None and hasattr(mmap, "MADV_DONTNEED"):
            file.madvise(mmap.MADV_DONTNEED)
        return Batch(normalise(x, self.subset.normalise), self.targets[index.to(self.inputs.device)])
