"""Images on disk -> train/validation/test -> one grey uint8 array. models/batches.py makes batches of it.

DIR/{train,test}/CLASS/*.jpeg, or a table of findings: layouts/ reads both, images/split.py splits. Only
pixels reach a model: no file names, no sizes, no original widths and heights, which separate the classes.

    python data.py --statistics DIR

prints mean and standard deviation of the training pixels, what --mean auto --std auto take.
"""

import common.prelude  # noqa: F401  (first: see there)

import math
from dataclasses import asdict, dataclass, replace

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
from images.describe import describe, label_lines, say_absent, say_inexact, say_twice, summary
from images.split import POOLED, cut_test, cut_validation, undersampled
from images.subset import Subset
from layouts import folders, tables
from layouts.asked import asked
from layouts.choices import OLDER, Choices, select, training_targets
from layouts.download import KAGGLE
from layouts.headers import with_headers
from layouts.listing import SIDES, Listing
from layouts.patients import read_patients
from lungs import masks as lung_masks
from lungs.show import INPUT_MODES
from models.batches import Batches
from models.inputs import Inputs

# ---------------------------------------------------------------- what is asked

DEFAULT_DIR = "Data/chest_xray"
SPLITS = ("patient", "image", "published", *POOLED)
IMG_SIZE = Number(int, 1, 2048)
FRACTION = Number(float, 0, 1, above=True, below=True)


@dataclass(frozen=True)
class DataConfig(Choices):
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
        INPUT_MODES,
    )
    lungs: str = flag(
        lung_masks.SHIPPED,
        "source of the lung masks for --input and the hybrid: weights of train_lungs.py, heuristic, or a "
        ".npz of masks",
        metavar="SOURCE",
    )
    labels: str = flag(
        "", "table of findings, instead of class folders, or the folder that holds it", metavar="CSV"
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
        if self.labels:
            return 0.7, 0.1, 0.2
        rest = 0.8
        return rest * (1 - self.val_fraction), rest * self.val_fraction, 0.2

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
        values |= asked(args, values)
        return cls(**values)

    @classmethod
    def from_json(cls, value, run="the run"):
        """The "data" object of the results.json of a `run` -> DataConfig; InputError if it is not one, or of
        a run whose images were changed in a way that is gone."""
        value = dict(value)
        if value.get("input") == "pair":
            raise InputError(f"{run} finds lungs (train_lungs.py): it has no classes to score")
        if value.get("labels"):
            value.setdefault("layout", OLDER)
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


def add_arguments(parser, also=True, unlabelled=False):
    """The data flags that every training script shares; `also`: labelled images of other hospitals, too,
    `unlabelled`: others. Returns their group."""
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
    about = "folders of unlabelled images of other hospitals that join training"
    if unlabelled:
        group.add_argument("--also-unlabelled", nargs="+", default=[], metavar="DIR", help=about)
    return group


def add_choices(group):
    """The flags that choose classes, findings and fractions."""
    group.add_argument("--findings", metavar="A,B,...", help="findings asked, of --labels (default: all)")
    text = "the healthy class (default: normal, healthy or no finding)"
    group.add_argument("--healthy", metavar="CLASS", help=text)
    group.add_argument(
        "--fractions",
        type=FRACTION,
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        help="shares of the images, where no split is published (default: 0.6 0.2 0.2 pooled, 0.7 0.1 0.2 "
        "of a table)",
    )


# ---------------------------------------------------------------- the data set


def read_listing(config):
    """The Listing of a DataConfig's images. Reads names, tables and the bytes of files of equal length;
    decodes no image."""
    published, pooled = config.split == "published", config.split in POOLED
    if config.labels:
        sides = dict(published=published, pooled=pooled)
        root, reading = tables.read_set(config.labels, config.data_dir, config.classes, config, **sides)
    else:
        sides = dict(published=published, by_side=pooled or bool(config.patients))
        root, reading = folders.read_set(config.data_dir, config.classes, **sides)
        folders.say_unused(root, config.split, config.classes)
    known = with_headers(root, reading.index, config.cache_dir, names_tell=not config.labels)
    index, flow = select(replace(reading, index=known), config)
    if config.patients:
        index = read_patients(config.patients, index, root)
        index = with_headers(root, index, config.cache_dir)
    if config.undersample:
        index = index.take(undersampled(index.targets, config.split_seed))
        flow = [*flow, ["undersampled", len(index.files)]]
    index = index._replace(content=twins.contents(root, index.files))
    return Listing(root, index, *cut_test(index, config), flow)


def load(config, root, index, side):
    """(Subset of an Index, the Index of the readable images, the sizes of the originals). `side`: what they
    are, in messages and in the name of the cache."""
    # Other splits and tables put other files on a side, which need a cache of another name.
    as_published = side in SIDES and not config.labels and config.split in ("patient", "image")
    as_published &= (index.side == side).all()
    decoded = load_images(
        root,
        index.files,
        size=config.img_size,
        resize=config.resize,
        cache_dir=config.cache_dir,
        skip_bad=config.skip_bad,
        name=side if as_published else f"{side}-{sha256(index.files)[:8]}",
        verify=config.verify_cache,
    )
    masks = None
    if config.needs_lungs:
        masks = lung_masks.of_images(config, decoded, index.files, f"{side} images in {root}")
    if len(decoded.rows) < len(index.files):
        index = index.take(decoded.rows)
    subset = Subset(
        index.files,
        index.targets,
        decoded.images,
        decoded.rows,
        patients=index.patients,
        levels=decoded.levels,
        masks=masks,
    )
    subset.cohort = index.cohort
    return subset, index, decoded.sizes


def load_test(config):
    """The test Subset. Only calibrate.py, and explain.py and studies on request, may ask for it: this opens
    the images."""
    listing = read_listing(config)
    return load(config, listing.root, listing.test_index, "test")[0]


def load_train_val(config, tell=print):
    """(train, val) Subsets and `info`, the JSON description of the split; `tell`s the split in a line.

    `info`: train, val, test (image counts), counts (images of every class, or positives of every finding),
    shared_patients (validation images whose patient is in train too), unknown_patients (images whose patient
    is not known), fingerprint (SHA-256 of both sides' file names, and of a table's labels), test_from,
    synthetic, set, original_size, copies (images with the bytes of one on another side), alike (validation
    images that look like a training image; twins.py), flow ([[step, images left], ...] from "listed" to
    "test"), labels ({side: {finding: {"positive", "negative", "uncertain", "blank"}}} as a table says). The
    test images are counted, and the bytes of those as long as another file compared; none is decoded.
    """
    listing = read_listing(config)
    root, others, test = listing.root, listing.index.take(listing.others), listing.test_index
    everything, readable, sizes = load(config, root, others, "train")
    positions = cut_validation(readable, config)
    if config.input == "pair":  # there is nothing to learn where no mask is known
        has_mask = lung_masks.plausible(everything.lungs())
        positions = [side[has_mask[side]] for side in positions]
    train, val = (everything.take(side) for side in positions)
    if config.task.kind == "softmax":
        there = np.bincount(train.targets[train.targets >= 0], minlength=len(config.classes))
        if absent := [name for name, count in zip(config.classes, there) if not count]:
            raise InputError(f"no training image is left of {', '.join(absent)}: see the notes above")

    # The fingerprint is that of the table; only then is it said what uncertain labels are in training.
    indices = {side: readable.take(some) for side, some in zip(("train", "val"), positions)} | {"test": test}
    info = describe(config, listing, train, val, indices, len(readable.files), readable.unknown)
    info["original_size"] = sizes
    info["alike"], note = twins.count_alike({"train": train, "val": val})
    train.targets = training_targets(train.targets, indices["train"].uncertain, config)

    tell(summary(config, root, info))
    for line in label_lines(config, info.get("labels", {})):
        tell(line)
    say_twice(info, indices, listing)
    if note:
        say(note)
    say_absent(config, info["counts"], train.targets, indices["train"].blank)
    if config.split == "patient" and config.task.kind == "softmax":
        say_inexact(everything.targets, config, list(info["counts"]["val"].values()))
    return train, val, info


def load_split(run, split, moved=None):
    """The Subset "train", "val" or "test" of a run's images; `moved`: settings of the data that are not as
    they were trained. InputError if they are not those it was trained with."""
    config = replace(run.config, **(moved or {}))
    train, val, info = load_train_val(config, tell=say)
    refuse_other_images(config, info["fingerprint"], run.results["split"]["fingerprint"], run)
    if split == "test":
        return load_test(config)
    return {"train": train, "val": val}[split]


def refuse_other_images(config, here, trained_on, run):
    """InputError where the split's fingerprint `here` is not the one that `run` was trained on: its
    thresholds and its held-out images would mean nothing."""
    if here == trained_on:
        return
    patients = ""
    if config.patients and config.split in ("patient", "pooled"):
        patients = (
            f"; {config.patients} decides who is on which side, so give the table of the training: images "
            "that it does not list keep their patient now"
        )
    raise InputError(
        f"the images in {config.data_dir} are not those that {run} was trained on (the split's fingerprint "
        f"differs): put those back, or point --data-dir at them{patients}. Train again if they are the same: "
        "copies of a file are kept on one side now"
    )


def statistics(subset, inputs):
    """(mean, standard deviation) of all pixels that a model is shown of a Subset, before scaling: floats in
    [0, 1], the same for every channel. Random changes are left out."""
    batches, sums = Batches(subset, inputs), np.zeros(2)
    for index in torch.arange(len(subset)).split(64):
        grey = inputs.cover(batches.get(index).x)[:, :1].double()
        sums += [float(grey.sum()), float(grey.square().sum())]
    mean, square = sums / (len(subset) * subset.images[0].size)
    return mean, math.sqrt(max(0.0, square - mean**2))


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
    shown = Inputs((0.0,), (1.0,), torch.device("cpu"), input_mode=config.input)
    mean, std = statistics(train, shown)
    print(f"{len(train)} training images, {config.img_size} px: mean {mean:.4f}, std {std:.4f}")


if __name__ == "__main__":
    start(main)
