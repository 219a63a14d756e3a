"""Images on disk -> train/validation/test -> one grey uint8 array -> batches on the device.

Layout: DIR/{train,test}/CLASS/*.jpeg, or a table of findings (index.py reads both; split.py splits). Only
pixels reach a model: never file names, sizes, or original widths and heights, which separate the classes.

    python data.py --statistics DIR

prints mean and standard deviation of the training pixels, what --mean auto --std auto take.
"""

import common.prelude  # noqa: F401  (first: see there)

import math
import mmap
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.cli import Number, Parser, add_flags, check_fields, flag
from common.console import InputError, say, start
from common.files import sha256
from common.scripts import LAST_VERSION
from common.task import CLASSES, Task
from images import twins
from images.cache import load_images
from images.decode import RESIZES
from images.describe import _count_text, _say_absent, _say_inexact, describe
from images.split import POOLED, cut, cut_test, image_weights, say_shared, undersampled
from images.subset import Subset
from layouts import tables
from layouts.download import KAGGLE
from layouts.folders import find_classes, find_root, read_folders
from layouts.listing import PARTS
from lungs import masks as lung_masks
from lungs.show import LOOKS
from models.inputs import Inputs

# ---------------------------------------------------------------- what is asked

DEFAULT_DIR = "Data/chest_xray"
SPLITS = ("patient", "image", "published", *POOLED)
IMG_SIZE = Number(int, 1, 2048)
FRACTION = Number(float, 0, 1, above=True, below=True)


@dataclass(frozen=True)
class DataConfig:
    """Everything that decides which images are seen, how, and what is asked; kept in results.json.

    `classes`: of class folders, the healthy one first; with `labels`, the findings asked. `fractions`: of
    train, validation and test, () for the usual ones."""

    data_dir: str = flag(
        DEFAULT_DIR, "folder with train/CLASS/ and test/CLASS/, or with the images of --labels", metavar="DIR"
    )
    img_size: int = flag(
        224,
        "side of the square input, in pixels (default: 224, or what the weights need; 96 with --demo)",
        IMG_SIZE,
        "PX",
    )
    resize: str = flag(
        "squash",
        "images that are not square: squash distorts them, pad adds borders, crop takes the middle",
        RESIZES,
    )
    split: str = flag(
        "patient",
        "validation is cut by patient, by image, or is the published val/; pooled: train and test are put "
        "together and cut again, by patient or by image",
        SPLITS,
    )
    split_seed: int = flag(0, "random seed of the split", Number(int, 0, 2**32 - 1), "N")
    val_fraction: float = 0.2
    skip_bad: bool = flag(False, "leave out unreadable images instead of stopping")
    cache_dir: str = flag("Data/cache", "folder of the decoded images", metavar="DIR")
    verify_cache: bool = flag(False, "read the whole cache at the start, to see that it is intact")
    classes: tuple = CLASSES
    input: str = flag(
        "full",
        "what the model sees: the full image, the lungs' box (crop), the lungs with the rest grey (masked), "
        "both, or, as a control, all but the lungs (outside)",
        LOOKS,
    )
    lungs: str = flag(
        lung_masks.SHIPPED,
        "source of the lung masks for --input and the hybrid: weights of train_lungs.py, heuristic, or a "
        ".npz of masks",
        metavar="SOURCE",
    )
    labels: str = flag(
        "", "table of findings, instead of class folders: NIH's, or path,patient,FINDING,...", metavar="CSV"
    )
    patients: str = flag("", "table path,patient, where file names do not tell the patient", metavar="CSV")
    fractions: tuple = ()
    also: tuple = ()  # DIR or DIR:LABELS.csv of other hospitals, for training
    also_unlabelled: tuple = ()
    lungs_sha256: str = ""  # of the source of masks, where they are needed
    reads_lungs: bool = False  # the model is given the masks themselves, too
    undersample: bool = False  # pooled splits: as many images of each class as of the rarest, before the cut

    @property
    def needs_lungs(self):
        """Whether the images must come with masks of the lungs."""
        return self.input != "full" or self.reads_lungs

    @property
    def task(self):
        return Task(self.classes, "sigmoid" if self.labels else "softmax")

    @property
    def shares(self):
        """The fractions of train, validation and test that a split aims at."""
        if self.fractions:
            return self.fractions
        if self.split in POOLED:
            return 0.6, 0.2, 0.2
        rest = 0.8
        return (
            (0.7, 0.1, 0.2)
            if self.labels
            else (rest * (1 - self.val_fraction), rest * self.val_fraction, 0.2)
        )

    @property
    def val_share(self):
        """Validation's fraction of all that is not test."""
        if not self.fractions and not self.labels and self.split not in POOLED:
            return self.val_fraction
        return self.shares[1] / (self.shares[0] + self.shares[1])

    @classmethod
    def from_args(cls, args):
        """Parsed flags -> DataConfig; the classes are those found. InputError if there are none."""
        values = {name: getattr(args, name) for name in asdict(cls()) if hasattr(args, name)}
        values["fractions"] = check_fractions(values.get("fractions") or ())
        for name in ("also", "also_unlabelled"):
            values[name] = tuple(getattr(args, name, None) or ())
        if values.get("input", "full") != "full" or values.get("reads_lungs"):
            values["lungs_sha256"] = lung_masks.fingerprint(values["lungs"])
            if lung_masks.holds_masks(values["lungs"]) and values.get("input") != "pair":
                say(
                    f"note: {values['lungs']} holds the masks of certain images, so predict.py cannot show "
                    f"others to this run; --lungs {lung_masks.SHIPPED} finds lungs on any"
                )
        if values.get("labels"):
            values["labels"] = str(tables.find_table(values["labels"], values["data_dir"]))
            wanted = [name.strip() for name in (args.findings or "").split(",") if name.strip()]
            values["classes"] = tables.table_findings(values["labels"], wanted)
        else:
            if getattr(args, "findings", None):
                raise InputError("--findings belongs to a table of findings: give --labels too")
            root = find_root(values["data_dir"])
            values["classes"] = find_classes(root, getattr(args, "healthy", None))
        return cls(**values)

    @classmethod
    def from_json(cls, value, run="the run"):
        """The "data" object of the results.json of a `run` -> DataConfig; InputError if it is not one, or of
        a run whose images were changed in a way that is gone."""
        value = dict(value)
        exposure = value.pop("normalise", "none")
        if exposure != "none":
            raise InputError(
                f"{run} was trained with --normalise {str(exposure)[:20]}, which is gone: {LAST_VERSION} is "
                "the last that reads it"
            )
        try:
            lists = {k: tuple(value.get(k, ())) for k in ("classes", "fractions", "also", "also_unlabelled")}
            config = cls(**{**value, **lists})
        except (KeyError, TypeError) as error:
            raise InputError(f"the data settings of the run are incomplete or unknown: {error}") from None
        wrong = check_fields(config)
        if not isinstance(value.get("classes"), (list, tuple)) or not all(
            isinstance(c, str) for c in config.classes
        ):
            wrong.append("classes")
        if config.fractions and not (
            len(config.fractions) == 3 and all(map(FRACTION.contains, config.fractions))
        ):
            wrong.append("fractions")
        if wrong:
            named = ", ".join(f"{k} is {str(value.get(k))[:60]}" for k in wrong)
            raise InputError(f"the data settings of the run are damaged: {named}")
        return config


def check_fractions(values):
    """The fractions of train, validation and test as a tuple; InputError unless they add up to 1."""
    if values and abs(sum(values) - 1) > 1e-6:
        raise InputError(f"--fractions must add up to 1, got {' + '.join(f'{v:g}' for v in values)}")
    return tuple(values)


def add_arguments(parser, also=True):
    """The data flags that every training script shares; `also`: images of other hospitals, too. Returns their
    group."""
    group = parser.add_argument_group("data")
    add_flags(group, DataConfig, img_size=None)  # demo.prepare fills it in
    add_choices(group)
    about = "labelled images of other hospitals that join training: folders of the classes, or a table"
    if also:
        group.add_argument("--also", nargs="+", default=[], metavar="DIR[:LABELS.csv]", help=about)
    group.add_argument("--demo", action="store_true", help="draw a small synthetic set and use it")
    group.add_argument(
        "--download",
        nargs="?",
        const=KAGGLE,
        metavar="OWNER/NAME",
        help=f"fetch a Kaggle set into --data-dir first, {KAGGLE} unless another is named",
    )
    return group


def add_unlabelled_argument(group):
    """--also-unlabelled, for training that needs no labels."""
    about = "folders of unlabelled images of other hospitals that join training"
    group.add_argument("--also-unlabelled", nargs="+", default=[], metavar="DIR", help=about)


def add_choices(group):
    """The flags that choose classes, findings and fractions."""
    group.add_argument("--findings", metavar="A,B,...", help="findings asked, of --labels (default: all)")
    group.add_argument(
        "--healthy",
        metavar="CLASS",
        help="the healthy class (default: normal, healthy or no finding)",
    )
    group.add_argument(
        "--fractions",
        type=FRACTION,
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        help="shares of the images, where no split is published (default: 0.6 0.2 0.2 pooled, 0.7 0.1 0.2 "
        "of a table)",
    )


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
        root = find_root(config.data_dir, config.classes)
        there = [p for p in PARTS if p == "train" or (root / p).is_dir()]
        if config.split == "published" and "val" not in there:
            raise InputError(f"--split published: {root} has no val/ folder")
        index = read_folders(
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
    config = replace(run.config, **(moved or {}))
    _, val, found = load_train_val(config, tell=say)
    if found["fingerprint"] != run.results["split"]["fingerprint"]:
        raise InputError(
            f"the images in {config.data_dir} are not those that {run} was trained on (the split's "
            "fingerprint differs): put those back, or point --data-dir at them"
        )
    return val if split == "val" else load_test(config)


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
        "--statistics", metavar="DIR", required=True, help="data folder, as --data-dir of train_scratch.py"
    )
    group = parser.add_argument_group("data")
    add_flags(group, DataConfig, leave_out=("data_dir",))
    add_choices(group)
    args = parser.parse_args()
    args.data_dir = args.statistics
    config = DataConfig.from_args(args)
    train = load_train_val(config, say)[0]
    shown = Inputs((0.0,), (1.0,), torch.device("cpu"), look=config.input)
    mean, std = statistics(train, shown)
    print(f"{len(train)} training images, {config.img_size} px: mean {mean:.4f}, std {std:.4f}")


if __name__ == "__main__":
    start(main)
