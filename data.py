"""Images on disk -> train/validation split -> one grey uint8 array -> batches on the device.

Layout: DIR/{train,test}/{NORMAL,PNEUMONIA}/*.jpeg (DIR/chest_xray/... of the Kaggle zip is found too).
Only pixels reach a model: never file names, sizes, or original widths and heights, which separate the classes.
"""

import argparse
import json
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.model_selection import train_test_split

from common import InputError, atomic_path, read_json, say, sha256, write_json

CLASSES = ("NORMAL", "PNEUMONIA")
EXTENSIONS = (".jpeg", ".jpg", ".png")
DEFAULT_DIR, SYNTHETIC_DIR = "Data/chest_xray", "Data/synthetic"
KAGGLE = "paultimothymooney/chest-xray-pneumonia"
RESIZES, SPLITS, MODES = ("squash", "pad", "crop"), ("patient", "image"), ("none", "standard", "equalise")
CACHE_VERSION = 3  # raise it when decoding changes, so that old caches are rebuilt


@dataclass(frozen=True)
class DataConfig:
    """Everything that decides which images are seen and how; kept in results.json."""

    data_dir: str = DEFAULT_DIR
    img_size: int = 224
    resize: str = "squash"
    split: str = "patient"
    split_seed: int = 0
    val_fraction: float = 0.2
    skip_bad: bool = False
    cache_dir: str = "Data/cache"
    classes: tuple = CLASSES
    normalise: str = "none"


@dataclass
class Subset:
    """`files` [N] relative to the data folder, `labels` int64 [N], `images` uint8 [*, S, S] (memory-mapped,
    shared between subsets), `rows` int64 [N] into it."""

    files: list
    labels: np.ndarray
    images: np.ndarray
    rows: np.ndarray
    normalise: str = "none"

    def __len__(self):
        return len(self.files)

    def take(self, index):
        return Subset(
            [self.files[i] for i in index], self.labels[index], self.images, self.rows[index], self.normalise
        )


# ---------------------------------------------------------------- command line


def add_arguments(parser):
    """The data flags that every training script shares."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", default=DEFAULT_DIR, help="folder with train/ and test/")
    group.add_argument(
        "--demo", action="store_true", help=f"draw a synthetic set in {SYNTHETIC_DIR} and use it"
    )
    group.add_argument("--download", action="store_true", help="fetch the Kaggle set into --data-dir first")
    group.add_argument("--img-size", type=int, default=224, metavar="PX", help="side of the square input")
    group.add_argument(
        "--resize",
        choices=RESIZES,
        default="squash",
        help="non-square originals: distort, letterbox, or cut to the middle",
    )
    group.add_argument(
        "--normalise",
        choices=MODES,
        default="none",
        help="exposure of each image: as it is, to one mean and spread, or a flat histogram",
    )
    group.add_argument(
        "--split",
        choices=SPLITS,
        default="patient",
        help="validation split: no patient on both sides, or plain stratified images",
    )
    group.add_argument("--split-seed", type=int, default=0, help="seed of the validation split")
    group.add_argument(
        "--skip-bad",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave out unreadable images instead of stopping",
    )
    group.add_argument("--cache-dir", default="Data/cache", help="where decoded images are kept")


def config_from_args(args):
    """Parsed data flags -> DataConfig; draws or downloads the set first where asked to."""
    if args.demo and (args.download or args.data_dir != DEFAULT_DIR):
        raise InputError("--demo brings its own data: leave out --data-dir and --download")
    if not 0 <= args.split_seed < 2**32:
        raise InputError(f"--split-seed must lie in [0, 2^32), got {args.split_seed}")
    if not 1 <= args.img_size <= 4096:
        raise InputError(f"--img-size must lie in [1, 4096], got {args.img_size}")
    if Path(args.cache_dir).exists() and not Path(args.cache_dir).is_dir():
        raise InputError(f"--cache-dir {args.cache_dir} is a file: name a folder")
    if args.demo:
        args.data_dir = SYNTHETIC_DIR
        make_synthetic(SYNTHETIC_DIR)
    elif args.download:
        download(args.data_dir)
    return DataConfig(
        args.data_dir,
        args.img_size,
        args.resize,
        args.split,
        args.split_seed,
        skip_bad=args.skip_bad,
        cache_dir=args.cache_dir,
        normalise=args.normalise,
    )


def config_from_json(value):
    """The "data" object of a results.json -> DataConfig; InputError if it is not one."""
    try:
        config = DataConfig(**{**value, "classes": tuple(value["classes"])})
    except (KeyError, TypeError) as error:
        raise InputError(f"the data settings of the run are incomplete or unknown: {error}") from None
    wrong = [
        k for k, default in asdict(DataConfig()).items() if not isinstance(getattr(config, k), type(default))
    ]
    choices = {"resize": RESIZES, "split": SPLITS, "normalise": MODES}
    wrong += [k for k, known in choices.items() if getattr(config, k) not in known]
    if wrong:
        raise InputError(
            f"the data settings of the run are damaged: {', '.join(f'{k} is {value[k]!r}' for k in wrong)}"
        )
    return config


# ---------------------------------------------------------------- files


def find_root(data_dir, classes=CLASSES):
    """The folder that holds train/ and test/: `data_dir` or its chest_xray/ (to depth 2); InputError if none."""
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


def list_images(root, split, classes=CLASSES):
    """Image files of root/split/<class>/ -> (names relative to root, int64 labels), sorted by name.

    Hidden files, `._*` and __MACOSX are passed over. Only names are read, no file is opened.
    InputError if a class folder is missing or holds no image.
    """
    names, labels = [], []
    for label, name in enumerate(classes):
        folder = Path(root, split, name)
        if not folder.is_dir():
            raise InputError(f"{folder} does not exist: each class needs a folder of its own")
        found = sorted(
            p.name
            for p in folder.iterdir()
            if p.suffix.lower() in EXTENSIONS and not p.name.startswith((".", "__MACOSX"))
        )
        if not found:
            raise InputError(f"{folder} holds no {'/'.join(EXTENSIONS)} images")
        names += [f"{split}/{name}/{f}" for f in found]
        labels += [label] * len(found)
    return names, np.array(labels, dtype=np.int64)


def patient_id(name):
    """The patient in a file name of the Kermany set; any other name is a patient of its own.

    person1000_virus_1681.jpeg -> person1000; NORMAL2-IM-0587-0001-0002.jpeg -> NORMAL2-IM-0587.
    The numbers of the test set start again from 1, so ids compare within one split only.
    """
    stem = Path(name).stem
    match = re.match(r"(person\d+)_|((?:NORMAL\d+-)?IM-\d+)-", stem)
    return match[1] or match[2] if match else name


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


# ---------------------------------------------------------------- decoding and cache


def decode(source, size, resize="squash"):
    """An image file (path or file object) -> uint8 [size, size], grey.

    Large JPEGs are decoded at reduced scale (never below twice the target, so nothing visible is lost),
    then shrunk with an anti-aliased bilinear filter. 16-bit images are scaled, not clipped, to 8 bits.
    OSError if the file is not a readable image.
    """
    try:
        with Image.open(source) as image:
            image.draft("L", (2 * size, 2 * size))
            if image.mode.startswith("I") or image.mode == "F":
                pixels = np.asarray(image, dtype=np.float32)
                white = next(
                    w for w in (255, 4095, math.inf) if pixels.max() <= w
                )  # 8, 12 or 16 bits are in use
                image = Image.fromarray(
                    (pixels / min(white, 65535) * 255).round().clip(0, 255).astype(np.uint8)
                )
            return to_square(image.convert("L"), size, resize)
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from None


def to_square(image, size, resize):
    """A grey PIL image -> uint8 [size, size]: "squash" to the square, "pad" with black, or "crop" to the middle."""
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


def load_images(root, files, config, split):
    """Decoded images of `files` -> (uint8 [len(files), S, S] memory-mapped read-only, readable rows int64 [M],
    {"width": [least, greatest], "height": ...} of the originals, in px).

    Kept on disk under `config.cache_dir`, keyed by names, sizes, modification times and settings, with a
    checksum: a stale or damaged cache is rebuilt. Unreadable images: InputError naming them, or with
    `skip_bad` they are left out and counted.
    """
    stats = [os.stat(Path(root, f)) for f in files]
    size = config.img_size
    key = sha256(
        [CACHE_VERSION, size, config.resize, [[f, s.st_size, s.st_mtime_ns] for f, s in zip(files, stats)]]
    )
    place = sha256([str(Path(root).resolve()), split, size, config.resize])[:8]
    path = Path(config.cache_dir, f"{Path(root).name}-{split}-{size}-{config.resize}-{place}.npy")
    info = _valid_cache(path, key)
    if info is None:
        info = _build_cache(path, key, root, files, config)
    bad = info["bad"]
    if not info["kept"]:
        raise InputError(
            f"{len(bad)} of {len(files)} images in {Path(root, split)} cannot be read, so none is left: "
            f"{'; '.join(bad[:3])}"
        )
    if bad and not config.skip_bad:
        raise InputError(
            f"{len(bad)} of {len(files)} images in {Path(root, split)} cannot be read: "
            f"{'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}. "
            "Mend or remove them, or leave them out with --skip-bad"
        )
    if bad:
        say(
            f"--skip-bad: left out {len(bad)} of {len(files)} images in {Path(root, split)}: "
            f"{'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}"
        )
    sizes = {"width": info["width"], "height": info["height"]}
    return np.load(path, mmap_mode="r", allow_pickle=False), np.array(info["kept"], dtype=np.int64), sizes


def _valid_cache(path, key):
    """The cache's side file if it belongs to `key` and the array is intact, else None."""
    try:
        info = read_json(path.with_suffix(".json"))
        check = info.pop("check", None)
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


def _build_cache(path, key, root, files, config):
    from tqdm import tqdm

    size, kept, bad, sizes = config.img_size, [], [], []

    def one(name):
        try:
            with Image.open(Path(root, name)) as image:
                original = image.size
            return decode(Path(root, name), size, config.resize), original
        except OSError as error:
            return f"{name} ({error})"

    # Decoding releases the interpreter lock, so threads use every core; `map` keeps the order, and the
    # window keeps memory constant however many images there are.
    with atomic_path(path) as tmp, ThreadPoolExecutor(os.cpu_count()) as pool:
        array = np.lib.format.open_memmap(tmp, mode="w+", dtype=np.uint8, shape=(len(files), size, size))
        with tqdm(
            total=len(files), desc=f"decoding {path.name}", unit="img", disable=not sys.stderr.isatty()
        ) as bar:
            for begin in range(0, len(files), 512):
                for i, result in enumerate(pool.map(one, files[begin : begin + 512]), begin):
                    if isinstance(result, str):
                        bad.append(result)
                    else:
                        array[i], original = result
                        sizes.append(original)
                        kept.append(i)
                    bar.update()
        array.flush()
        del array
        info = {"key": key, "crc32": _crc32(tmp), "files": len(files), "kept": kept, "bad": bad}
        for name, values in zip(("width", "height"), zip(*sizes) if sizes else ((0,), (0,))):
            info[name] = [min(values), max(values)]
    write_json(path.with_suffix(".json"), {**info, "check": sha256(info)})
    return info


# ---------------------------------------------------------------- the data set


def load_train_val(config):
    """(train, val) Subsets and `info`, the JSON description of the split; prints the split line.

    `info`: train, val, test (image counts), counts (per class), shared_patients (validation images whose
    patient is in train too), fingerprint (SHA-256 of both sides' file names), synthetic, set, original_size.
    The files of the test folder are counted, never opened.
    """
    root = find_root(config.data_dir, config.classes)
    files, labels = list_images(root, "train", config.classes)
    _, test_labels = list_images(root, "test", config.classes)
    images, kept, sizes = load_images(root, files, config, "train")
    everything = Subset([files[i] for i in kept], labels[kept], images, kept, config.normalise)
    index = split_train_val(
        everything.files, everything.labels, config.split, config.val_fraction, config.split_seed
    )
    train, val = (everything.take(i) for i in index)
    ids = {patient_id(f) for f in train.files}
    info = {
        "train": len(train),
        "val": len(val),
        "test": len(test_labels),
        "counts": {
            s: {c: int((y == k).sum()) for k, c in enumerate(config.classes)}
            for s, y in (("train", train.labels), ("val", val.labels), ("test", test_labels))
        },
        "shared_patients": sum(patient_id(f) in ids for f in val.files),
        "fingerprint": sha256([sorted(train.files), sorted(val.files)]),
        "synthetic": is_synthetic(root),
        "set": root.resolve().name,
        "original_size": sizes,
    }
    counts = "; ".join(
        f"{s} " + " + ".join(f"{n} {c}" for c, n in info["counts"][s].items()) for s in info["counts"]
    )
    name = f"{root} (SYNTHETIC)" if info["synthetic"] else str(root)
    print(
        f"data: {name}, --split {config.split}: (train, val, test) = "
        f"({len(train)}, {len(val)}, {len(test_labels)}): {counts}; "
        f"{info['shared_patients']} validation images share a patient with train",
        flush=True,
    )
    if config.split == "patient":
        _, plain = train_test_split(
            everything.labels,
            test_size=config.val_fraction,
            stratify=everything.labels,
            random_state=config.split_seed,
        )
        want = [int((plain == k).sum()) for k in range(len(config.classes))]
        have = list(info["counts"]["val"].values())
        if want != have:
            say(
                f"note: whole patients allow no exact stratified split: validation has {have}, nearest to {want}"
            )
    return train, val, info


def load_test(config):
    """The test Subset. Only calibrate.py, and explain.py and experiments.py on request, may call this: it opens the test images."""
    root = find_root(config.data_dir, config.classes)
    files, labels = list_images(root, "test", config.classes)
    images, kept, _ = load_images(root, files, config, "test")
    return Subset([files[i] for i in kept], labels[kept], images, kept, config.normalise)


def pixel_fingerprint(subset):
    """SHA-256 over a subset's file names, labels and pixels: equal iff a model sees the same data."""
    crc = 0
    for row in subset.rows:
        crc = zlib.crc32(subset.images[row], crc)
    return sha256([subset.files, subset.labels.tolist(), crc])


def input_range(subset):
    """Least and greatest per-image mean and standard deviation (grey levels 0 to 1): what a model was trained on."""
    values = (
        np.array([(image.mean(), image.std()) for image in (subset.images[row] for row in subset.rows)]) / 255
    )
    return {name: [float(v.min()), float(v.max())] for name, v in zip(("mean", "std"), values.T)}


# ---------------------------------------------------------------- batches on the device


@dataclass(frozen=True)
class Augment:
    """Random changes of a batch [B, 1, S, S] in [0, 1], drawn per image on its device; all zero = none.

    rotate: +/- degrees; translate: +/- fraction of the side; scale: +/- fraction; aspect: +/- fraction by which
    width grows and height shrinks; hflip: probability (0: hearts are on the left). Geometry is one bilinear
    resampling with black outside. brightness: +/- added; contrast: +/- fraction about the image's mean; gamma:
    exponent exp(+/- gamma). blur: probability of a Gaussian of 0.4% to 1.2% of the side (a coarser detector);
    noise: greatest standard deviation; erase: probability that one rectangle of 3% to 25% of the area turns grey
    (Zhong et al. 2020, arXiv:1708.04896). frame, tone: probability that the border (up to a fifth of the side), or
    the grey levels (histogram matching), are borrowed from another image of the batch, whatever its class: what a
    machine and its operator add to a picture then tells nothing of the child.
    """

    rotate: float = 7.0
    translate: float = 0.05
    scale: float = 0.1
    aspect: float = 0.0
    brightness: float = 0.1
    contrast: float = 0.15
    gamma: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    erase: float = 0.0
    hflip: float = 0.0
    frame: float = 0.0
    tone: float = 0.0

    def __call__(self, x):
        B, device = x.shape[0], x.device

        def uniform(low, high):
            return low + (high - low) * torch.rand(B, device=device)

        def both(bound):
            return uniform(-bound, bound)

        def chance(p):
            return torch.rand(B, device=device) < p

        if self.rotate or self.translate or self.scale or self.aspect or self.hflip:
            x = affine(
                x,
                angle=both(math.radians(self.rotate)),
                zoom=1 + both(self.scale),
                flip=1 - 2 * chance(self.hflip).float(),
                shift_x=both(self.translate),
                shift_y=both(self.translate),
                aspect=1 + both(self.aspect),
            )
        if self.frame or self.tone:
            other = x[torch.randperm(B, device=device)]
            if self.tone:
                x = torch.where(chance(self.tone).view(B, 1, 1, 1), match_levels(x, other), x)
            if self.frame:
                x = borrow_frame(x, other, uniform(0, 0.2) * chance(self.frame))
        if self.blur:
            side = x.shape[-1]
            x = torch.where(
                chance(self.blur).view(B, 1, 1, 1), gaussian_blur(x, side * uniform(0.004, 0.012)), x
            )
        if self.gamma:
            x = x.clamp(min=1e-6) ** both(self.gamma).exp().view(B, 1, 1, 1)
        if self.brightness or self.contrast:
            mean = x.mean(dim=(1, 2, 3), keepdim=True)
            x = (
                (x - mean) * (1 + both(self.contrast)).view(B, 1, 1, 1)
                + mean
                + both(self.brightness).view(B, 1, 1, 1)
            )
        if self.noise:
            x = x + torch.randn_like(x) * uniform(0, self.noise).view(B, 1, 1, 1)
        if self.erase:
            area, ratio = uniform(0.03, 0.25), both(0.7).exp()
            inside = _span(x.shape[-1], (area * ratio).sqrt(), uniform(0, 1), device).unsqueeze(1) & _span(
                x.shape[-2], (area / ratio).sqrt(), uniform(0, 1), device
            ).unsqueeze(2)  # (B, S, S)
            x = torch.where(
                (inside & chance(self.erase).view(B, 1, 1)).unsqueeze(1), uniform(0, 1).view(B, 1, 1, 1), x
            )
        return x.clamp(0, 1)


# Augmentation of the recipes, where it differs from Augment's own defaults, which are the plain one.
ROBUST = dict(scale=0.2, gamma=0.3, blur=0.5, noise=0.05)
STRONG = dict(rotate=15.0, translate=0.1, scale=0.25, aspect=0.15, brightness=0.25, contrast=0.4, gamma=0.5)


def _span(side, length, place, device):
    """Booleans (B, side): True on a run of `length` (fraction) that starts at `place` of the room left for it."""
    at = (torch.arange(side, device=device) + 0.5) / side
    start = place * (1 - length.clamp(max=1))
    return (at >= start.unsqueeze(1)) & (at < (start + length).unsqueeze(1))


def match_levels(x, like, levels=256):
    """Images [B, 1, S, S] in [0, 1] with their grey levels moved, in order, to the distribution of `like`'s, pair by
    pair: histogram matching (Gonzalez and Woods, Digital Image Processing, section 3.3) in `levels` steps. The distributions
    are those of the middle (three quarters of each side), without the black beside a body."""

    def steps(z):
        return (z.flatten(1) * (levels - 1)).round().long()

    def cumulative(z):  # (B, levels): share of the pixels below the middle of each level
        margin = z.shape[-1] // 8
        step = steps(z[..., margin : z.shape[-2] - margin, margin : z.shape[-1] - margin])
        share = torch.zeros(len(z), levels, device=z.device).scatter_add_(
            1, step, torch.ones_like(step, dtype=torch.float)
        )
        share = share / step.shape[1]
        return share.cumsum(1) - share / 2

    have, want = cumulative(x), cumulative(like)
    high = torch.searchsorted(want, have).clamp(1, levels - 1)
    below, above = want.gather(1, high - 1), want.gather(1, high)
    level = (
        high - 1 + ((have - below) / (above - below).clamp(min=1e-9)).clamp(0, 1)
    )  # between the two neighbours
    return (level / (levels - 1)).gather(1, steps(x)).view_as(x).to(x.dtype)


def borrow_frame(x, other, width):
    """Images [B, 1, S, S] whose border, `width` [B] of the side wide, comes from `other`; a soft edge of 4%; 0: none."""
    side = x.shape[-1]
    at = (torch.arange(side, device=x.device) + 0.5) / side
    depth = torch.minimum(at, 1 - at)
    depth = torch.minimum(depth[:, None], depth[None])  # (S, S): distance to the nearest edge
    own = ((depth - width.view(-1, 1, 1, 1)) / 0.04 + 0.5).clamp(0, 1)
    return torch.where(width.view(-1, 1, 1, 1) > 0, x * own + other * (1 - own), x)


def gaussian_blur(x, sigma):
    """Blur images [B, 1, S, S], each by its own sigma [B] in pixels (at most S/6); edges are repeated."""
    B, radius = len(x), max(1, math.ceil(3 * float(sigma.max())))
    at = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (at / sigma.view(B, 1)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)  # (B, 2r + 1)
    x = F.pad(
        x.transpose(0, 1), (radius,) * 4, mode="replicate"
    )  # (1, B, S + 2r, S + 2r): one group an image
    x = F.conv2d(F.conv2d(x, kernel.view(B, 1, 1, -1), groups=B), kernel.view(B, 1, -1, 1), groups=B)
    return x.transpose(0, 1)


def add_augment_arguments(parser):
    """Flags for every field of Augment, with its defaults."""
    group = parser.add_argument_group("augmentation of training images (0 turns one off)")
    units = {
        "rotate": "+/- degrees",
        "translate": "+/- fraction of the side",
        "scale": "+/- fraction",
        "aspect": "+/- fraction",
        "brightness": "+/- of the grey range",
        "contrast": "+/- fraction",
        "gamma": "exponent exp(+/- X)",
        "blur": "probability",
        "noise": "greatest standard deviation",
        "erase": "probability",
        "hflip": "probability",
        "frame": "probability of the border of another image",
        "tone": "probability of the grey levels of another image",
    }
    for name, default in asdict(Augment()).items():
        group.add_argument(f"--{name}", type=float, default=default, metavar="X", help=units[name])


def augment_from_args(args):
    """Parsed flags -> Augment; InputError for negative or too large values."""
    values = {name: getattr(args, name) for name in asdict(Augment())}
    for name, value in values.items():
        limit = {"rotate": 180, "gamma": 3, "scale": 0.99, "aspect": 0.99}.get(name, 1)
        if not 0 <= value <= limit:
            raise InputError(f"--{name} must lie in [0, {limit}], got {value}")
    return Augment(**values)


def affine(x, angle, zoom, flip, shift_x, shift_y, aspect=1.0):
    """Turn, zoom, mirror (flip = -1) and shift images [B, 1, S, S], by one bilinear resampling, black outside.

    Each parameter is a tensor [B]: radians; factor; +/- 1; fraction of the side, in the output's axes; width
    grows by `aspect` and height shrinks by it.
    """
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    theta = torch.stack(
        [
            torch.stack(
                [cos * flip / aspect, -sin * flip * aspect, 2 * shift_x], 1
            ),  # the grid spans [-1, 1]
            torch.stack([sin / aspect, cos * aspect, 2 * shift_y], 1),
        ],
        dim=1,
    )  # (B, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


def tta_views(flip=False):
    """Test-time augmentation: fixed views, each a function [B, 1, S, S] -> the same shape.

    The image itself, shifted 3% in four directions, zoomed by 0.95 and 1.05; with `flip` all of them mirrored too.
    """
    settings = [
        (1.0, 0.0, 0.0),
        (1.0, 0.03, 0.0),
        (1.0, -0.03, 0.0),
        (1.0, 0.0, 0.03),
        (1.0, 0.0, -0.03),
        (0.95, 0.0, 0.0),
        (1.05, 0.0, 0.0),
    ]

    def view(zoom, dx, dy, mirrored):
        def apply(x):
            values = (0.0, zoom, -1.0 if mirrored else 1.0, dx, dy)
            return affine(x, *(torch.full((len(x),), v, device=x.device) for v in values))

        return apply if mirrored or (zoom, dx, dy) != (1.0, 0.0, 0.0) else lambda x: x

    return [view(*s, mirrored) for mirrored in ((False, True) if flip else (False,)) for s in settings]


class Batches:
    """Batches of a Subset, made on `device`: x float32 [B, 1, S, S] in [0, 1] and y int64 [B].

    On CUDA the whole uint8 array is kept on the device if it takes less than half the free memory;
    otherwise rows are gathered from the memory map, whose pages are let go again every 4 batches: resident memory
    does not grow with the number of images (the system's file cache still holds them).
    """

    def __init__(self, subset, device):
        self.subset, self.device = subset, torch.device(device)
        self.labels = torch.from_numpy(subset.labels).to(self.device)
        self.resident, self.taken = None, 0
        size = len(subset) * subset.images[0].nbytes
        if self.device.type == "cuda" and size < torch.cuda.mem_get_info(self.device)[0] / 2:
            self.resident = torch.from_numpy(subset.images[subset.rows]).to(self.device)

    def get(self, index):
        """Rows `index` (int64 tensor [B] on the CPU) -> (x, y)."""
        if self.resident is not None:
            index = index.to(self.device)
            x, y = self.resident[index], self.labels[index]
        else:
            x = torch.from_numpy(self.subset.images[self.subset.rows[index.numpy()]]).to(self.device)
            y = self.labels[index.to(self.device)]
            self.taken += 1
            file = getattr(self.subset.images, "_mmap", None)
            if self.taken % 4 == 0 and file is not None and hasattr(mmap, "MADV_DONTNEED"):
                file.madvise(mmap.MADV_DONTNEED)
        return normalise(x, self.subset.normalise), y


def normalise(x, mode):
    """uint8 [B, S, S] -> float32 [B, 1, S, S] in [0, 1], the same for training, validation and new images.

    "none": x / 255. "standard": each image to mean 0.5 and standard deviation 0.22, cut to [0, 1]. "equalise": each
    image's histogram made flat (mid-ranks of its grey levels), so that no monotone change of exposure is left."""
    if mode == "equalise":
        levels = x.flatten(1).long()  # (B, S*S)
        ones = torch.ones_like(levels, dtype=torch.float32)
        counts = torch.zeros(len(x), 256, device=x.device).scatter_add_(1, levels, ones)
        ranks = (counts.cumsum(1) - counts / 2) / levels.shape[
            1
        ]  # (B, 256): mid-rank of each grey level, in (0, 1)
        return ranks.gather(1, levels).view(x.shape).unsqueeze(1)
    x = x.unsqueeze(1).float().div_(255)
    if mode == "standard":
        std, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
        x = ((x - mean) / std.clamp(min=1e-3) * 0.22 + 0.5).clamp_(0, 1)
    return x


# ---------------------------------------------------------------- synthetic set, download


def is_synthetic(root):
    """Whether `root` was drawn by `make_synthetic`."""
    return Path(root, "SYNTHETIC").exists()


def make_synthetic(root, train=480, test=120, seed=0):
    """Draw a set of radiograph-like JPEGs under `root` (once; a complete set is kept).

    Ribs, two lungs and a heart; the sick get haze and cloudy opacities in the lungs. The test half is darker,
    flatter and framed wider, so that validation and test disagree as they do on real data. Three in eight
    are NORMAL; patients have one to three images.
    """
    root = Path(root)
    settings = {"train": train, "test": test, "seed": seed, "version": 2}
    marker = root / "SYNTHETIC"
    if marker.exists() and marker.read_text() == json.dumps(settings):
        return
    if root.exists() and any(root.iterdir()) and not marker.exists():
        raise InputError(f"{root} exists and was not drawn by --demo: move it away")
    say(f"drawing {train + test} synthetic radiographs in {root}")
    tmp = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    rng = np.random.default_rng(seed)
    try:
        for split, total in (("train", train), ("test", test)):
            for label, name in enumerate(CLASSES):
                folder = tmp / split / name
                folder.mkdir(parents=True)
                count = round(total * (3 / 8, 5 / 8)[label])
                made, patient = 0, 0
                while made < count:
                    patient += 1
                    for k in range(min(int(rng.choice([1, 1, 1, 2, 3])), count - made)):
                        made += 1
                        file = (
                            f"person{patient}_{('bacteria', 'virus')[patient % 2]}_{made}.jpeg"
                            if label
                            else f"IM-{patient:04d}-{k + 1:04d}.jpeg"
                        )
                        pixels = _draw_radiograph(rng, sick=bool(label), shifted=split == "test")
                        Image.fromarray(pixels).save(folder / file, quality=90)
        (tmp / "SYNTHETIC").write_text(json.dumps(settings))
        if root.exists():
            shutil.rmtree(root)
        tmp.rename(root)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _draw_radiograph(rng, sick, shifted, side=256):
    """One drawn chest, uint8 [side, side]; bright = dense, as on a radiograph."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    zoom = rng.normal(1.12 if shifted else 1.0, 0.05)
    x, y = (x - rng.normal(0, 0.04)) * zoom, (y - rng.normal(0, 0.04)) * zoom

    def blob(cx, cy, rx, ry, soft):
        d = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2)
        return 1 / (1 + np.exp((d - 1) / soft))

    body = blob(0, 0.1, 0.95, 1.3, 0.05)
    lungs = np.maximum(blob(-0.42, 0, 0.3, 0.62, 0.06), blob(0.42, 0, 0.28, 0.6, 0.06))
    wave = np.cos(2 * np.pi * (5.5 * (y - 0.35 * x**2) + rng.uniform()))
    image = 0.62 * body - 0.4 * lungs + 0.07 * lungs * np.clip(wave, 0, 1) ** 2
    image += 0.3 * blob(0, 0, 0.09, 1.2, 0.2) + 0.28 * blob(0.16, 0.3, 0.3, 0.3, 0.08)
    if sick:
        image += rng.uniform(0.0, 0.13) * lungs  # haze over both lungs
        for _ in range(rng.integers(1, 4)):
            cx = rng.choice([-1, 1]) * rng.uniform(0.3, 0.5)
            cloud = blob(cx, rng.uniform(-0.3, 0.4), rng.uniform(0.15, 0.3), rng.uniform(0.15, 0.35), 0.35)
            image += rng.uniform(0.1, 0.3) * cloud * lungs
    coarse = Image.fromarray(rng.normal(0, 1, (16, 16)).astype(np.float32))
    image += 0.02 * np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    image = (
        (image - 0.4) * rng.normal(0.85 if shifted else 1.0, 0.06)
        + 0.4
        + rng.normal(-0.07 if shifted else 0, 0.04)
    )
    image += rng.normal(0, 0.02, image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8)


def download(data_dir):
    """Fetch the Kaggle set into `data_dir`: kagglehub, then the kaggle command; InputError with the steps
    by hand if neither gets through. Nothing is done when `data_dir` already has a train/ folder."""
    try:
        find_root(data_dir)
        return
    except InputError:
        pass
    target, tries = Path(data_dir), []
    try:
        import kagglehub

        source = Path(kagglehub.dataset_download(KAGGLE))
        shutil.copytree(find_root(source), target, dirs_exist_ok=True)
        return
    except ImportError:
        tries.append("kagglehub is not installed (pip install kagglehub)")
    except (OSError, RuntimeError, ValueError) as error:  # no network, no account, no such set: the next way
        tries.append(f"kagglehub: {error}")
    if shutil.which("kaggle"):
        done = subprocess.run(
            ["kaggle", "datasets", "download", "-d", KAGGLE, "-p", str(target), "--unzip"],
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            find_root(target)
            return
        tries.append(f"kaggle: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    else:
        tries.append("the kaggle command is not installed (pip install kaggle)")
    raise InputError(
        "the download did not get through: " + "; ".join(tries) + ". By hand:\n"
        f"  1. open https://www.kaggle.com/datasets/{KAGGLE} in a browser and download the zip\n"
        f"  2. unzip it so that {target}/train/NORMAL and {target}/test/NORMAL exist\n"
        "  3. run the same command again without --download"
    )
