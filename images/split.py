"""Which images train, validate and test a model, whole patients on one side; and which make up an epoch."""

import math
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import train_test_split

from common.console import InputError, advice
from images import twins
from images.dicom import KEYED
from layouts.listing import patient_id

POOLED = ("pooled", "pooled-image")
TRIES = 60  # draws of the patients with images of several classes, of which the best is taken
BALANCES = (
    *("weights", "sampler", "both", "undersample", "undersample-once", "none"),
    *("sources", "sources-sampler"),
)


class Part(NamedTuple):
    """What a cut cuts off, for messages. `name`: of the part; `classes`: their names; `by_image`: the --split
    that would cut it by image, "" for none."""

    name: str = "validation"
    classes: tuple = ()
    by_image: str = ""


VALIDATION = Part()


def split_train_val(files, labels, mode="patient", val_fraction=0.2, seed=0, patients=None, part=VALIDATION):
    """Indices (train, val), both sorted, of images with one class each.

    "image": scikit-learn's stratified `train_test_split`. "patient": the same number of validation images
    per class, or the nearest that is found, with whole patients on one side: of patients with images of
    several classes validation's share is drawn (`_share_of_mixed`); the others are shuffled, and per class an
    exact subset sum takes the earliest patients that reach the count. `patients` [N] (default: as the file
    names tell). Depends on names, labels, patients and seed only, not on their order. InputError if a class
    cannot be on both sides.
    """
    labels = np.asarray(labels)
    if patients is None:
        patients = [patient_id(file) for file in files]
    # By name, so that the split does not depend on the order in which the files were found.
    order = np.array(sorted(range(len(files)), key=files.__getitem__))
    _check_counts(labels, val_fraction, part)
    train, val = train_test_split(order, test_size=val_fraction, stratify=labels[order], random_state=seed)
    if mode == "image":
        return np.sort(train), np.sort(val)

    # Whole patients must come near the class counts that the split by image has.
    classes = np.unique(labels)
    wanted = np.array([(labels[val] == k).sum() for k in classes])
    rest = np.array([(labels[train] == k).sum() for k in classes])
    rng = np.random.default_rng(seed)
    single, mixed = _patients_by_class(order, patients, labels, rng)
    chosen = _choose_patients(single, mixed, labels, wanted, len(val) / len(order), rng)
    val = np.sort(np.array(chosen, dtype=np.int64))
    train = np.setdiff1d(order, val)

    for k in classes:
        if not (labels[val] == k).any() or not (labels[train] == k).any():
            number, way = len({patients[i] for i in np.flatnonzero(labels == k)}), ""
            least = 2 if part.name == "test" else 1  # validation is still to be cut off the rest
            if part.by_image and wanted.min() >= 1 and rest.min() >= least:
                way = advice("--split", f": use --split {part.by_image}")
            raise InputError(
                f"no {part.name} part can be cut off by patient: {_class_name(part, k)}, of {number} "
                f"patients, would not be on both sides{way}"
            )
    return train, val


def _class_name(part, k):
    """How messages call the class number `k`."""
    return f"the class {part.classes[k]}" if part.classes else f"class number {k} (the first is 0)"


def _check_counts(labels, fraction, part):
    """InputError where `fraction` of the images with these `labels` [N] cannot be a Part with all classes."""
    classes, counts = np.unique(labels, return_counts=True)
    rare = int(np.argmin(counts))
    if counts[rare] < 2:
        raise InputError(
            f"no {part.name} part can be cut off: {_class_name(part, classes[rare])} has one image only, and "
            "both sides need one"
        )
    inside = math.ceil(fraction * len(labels))
    if min(inside, len(labels) - inside) < len(classes):
        raise InputError(
            f"no {part.name} part can be cut off: it would have {inside} images, and {len(labels) - inside} "
            f"would be left, too few for the {len(classes)} classes"
            + advice("--fractions", ": see --fractions")
        )


def _patients_by_class(order, patients, labels, rng):
    """({class: patients whose images are all of that class}, the patients with images of several classes), in
    random order. A patient is the list of its images, positions as in `order`."""
    images_of = {}
    for i in order:
        images_of.setdefault(patients[i], []).append(i)
    images_of = list(images_of.values())
    single, mixed = {k: [] for k in np.unique(labels)}, []
    for number in rng.permutation(len(images_of)):
        images = images_of[number]
        first = labels[images[0]]
        if (labels[images] == first).all():
            single[first].append(images)
        else:
            mixed.append(images)
    return single, mixed


def _choose_patients(single, mixed, labels, wanted, share, rng):
    """The images of the patients that validate. `single`: {class: patients of that class alone}, `mixed`: the
    others, each a list of images; `wanted`: the number of images of each class.

    The mixed patients are drawn several times where that brings the counts nearer to `wanted`. Where a class
    would be missing on a side, more and more of them are drawn, up to half."""
    classes = list(single)
    counts = [[(labels[images] == k).sum() for k in classes] for images in mixed]
    counts = np.array(counts, dtype=int).reshape(-1, len(classes))
    sizes = [[len(images) for images in single[k]] for k in classes]
    totals = np.array([sum(s) for s in sizes]) + counts.sum(axis=0)
    best = None
    attempts = TRIES if mixed else 1
    for attempt in range(attempts):
        # The first half of the attempts draws the usual share; where a class is still missing on a side after
        # them, the share grows up to half.
        growth = max(0, 2 * attempt / TRIES - 1)
        if growth and best[0][0] == 0:
            break
        drawn = _share_of_mixed(counts, share + growth * max(0, 0.5 - share), rng)
        have = counts[drawn].sum(axis=0)
        # The patients of one class alone fill up what the mixed ones leave open.
        alone = [_nearest_subset(s, max(0, n)) for s, n in zip(sizes, (wanted - have).tolist())]
        have = have + [sum(s[g] for g in part) for s, part in zip(sizes, alone)]
        missing = int(((have == 0) | (have == totals)).sum())
        merit = (missing, int(abs(have - wanted).sum()))
        if best is None or merit < best[0]:
            best = merit, drawn, alone
        if best[0] == (0, 0):
            break
    _, drawn, alone = best
    chosen = []
    for group in drawn:
        chosen += mixed[group]
    for k, part in zip(classes, alone):
        for group in part:
            chosen += single[k][group]
    return chosen


def _share_of_mixed(counts, share, rng):
    """Which of the patients with images of several classes are drawn, each with chance `share`: positions.
    counts [M, K]: how many images of each class they have.

    Systematic sampling (Cochran, Sampling Techniques, chapter 8): those alike in classes and numbers stand
    next to each other, otherwise in random order, and from a random start on one in 1 / share is taken. So
    every kind of patient is drawn at nearly its share, and so are the images of every class."""
    shuffled = rng.permutation(len(counts))
    rows = counts[shuffled][:, rng.permutation(counts.shape[1])]
    by_kind = np.lexsort([*rows.T, rows.sum(axis=1), *(rows > 0).T])  # the last key counts first
    steps = np.floor(np.arange(len(counts) + 1) * share + rng.random())
    return shuffled[by_kind[np.diff(steps) > 0]]


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


def split_patients(patients, fraction, seed=0):
    """Indices (rest, part) of images that may have several findings each: random patients, taken whole until
    about `fraction` of the images are in the part. Depends on names and seed, not on their order.

    InputError if one side would be empty."""
    names, codes, counts = np.unique(
        np.asarray(patients, dtype=object), return_inverse=True, return_counts=True
    )
    if len(names) < 2:
        raise InputError(f"a split by patient needs two patients or more, the images are of {len(names)}")
    shuffled = np.random.default_rng(seed).permutation(len(names))
    reached = np.cumsum(counts[shuffled])[:-1]  # one at least stays on the other side
    number = int(np.argmin(np.abs(reached - fraction * len(codes)))) + 1
    inside = np.isin(codes, shuffled[:number])
    return np.flatnonzero(~inside), np.flatnonzero(inside)


def cut(index, task, by_patient, fraction, seed, part=VALIDATION):
    """Positions (rest, part) of an Index, `fraction` of the images in the part: classes stratified, findings
    at random; by whole patients or by image. `part`: what it is in messages.

    By patient, copies of a file (`index.content`) stay together: where a copy would be on the other side, the
    patients that share files are taken as one, and the cut is made again. So a set without such copies is cut
    as if nobody had looked."""
    parts = _cut(index, task, by_patient, fraction, seed, part)
    if by_patient and index.content is not None and twins.on_two_sides(index.content, parts[1]):
        one = index._replace(patients=twins.joined(index.patients, index.content))
        parts = _cut(one, task, by_patient, fraction, seed, part)
    return parts


def _cut(index, task, by_patient, fraction, seed, part):
    """`cut`, which looks at no copies."""
    if task.kind == "softmax":
        mode = "patient" if by_patient else "image"
        part = part._replace(classes=task.classes)
        return split_train_val(index.files, index.targets, mode, fraction, seed, index.patients, part)
    units = without_keys(index.files, index.patients) if by_patient else index.files
    return split_patients(units, fraction, seed)


def without_keys(files, patients):
    """The patients [N], those named by a secret key (dicom.KEYED) by the first of their files instead: a
    split depends on the order of the names, and must not depend on the key."""
    first = {}
    for file, patient in sorted(zip(files, patients)):
        first.setdefault(patient, file)
    return [first[patient] if patient.startswith(KEYED) else patient for patient in patients]


def cut_test(index, config):
    """Positions (others, test) of an Index and where the test part comes from, as text."""
    pooled, by_patient = config.split in POOLED, not config.split.endswith("image")
    published = index.side == "test"
    if not pooled and published.any():
        return np.flatnonzero(~published), np.flatnonzero(published), "published"
    free = np.flatnonzero(index.side != "val")  # a published validation part stays whole
    part = Part("test", by_image=_by_image(config))
    _, chosen = cut(index.take(free), config.task, by_patient, config.shares[2], config.split_seed, part)
    test = free[chosen]
    others = np.setdiff1d(np.arange(len(index.files)), test)
    test_from = "pooled and cut anew" if pooled else "cut off"
    return others, test, test_from


def cut_validation(index, config):
    """Positions (train, val) of the Index of all that is not test: as published, or cut."""
    if config.split == "published" and (index.side == "val").any():
        return np.flatnonzero(index.side == "train"), np.flatnonzero(index.side == "val")
    by_patient = not config.split.endswith("image")
    part = Part(by_image=_by_image(config))
    return cut(index, config.task, by_patient, config.val_share, config.split_seed, part)


def _by_image(config):
    """The --split that cuts by image what that of a DataConfig cuts by patient."""
    return "pooled-image" if config.split in POOLED else "image"


def say_shared(split):
    """What the "split" of a results.json says about patients on both sides, as text."""
    unknown = split.get("unknown_patients", 0)
    if unknown >= split["train"] + split["val"]:
        return "patients unknown, so images of one patient may be on both sides"
    text = f"{split['shared_patients']} validation images share a patient with train"
    if "shared_patients_test" in split:
        text += f", {split['shared_patients_test']} test images with train or validation"
    if unknown:
        text += f" (patients unknown for {unknown} images)"
    return text


# ---------------------------------------------------------------- an epoch


def undersampled(targets, seed):
    """Positions, sorted, of as many random images of each class as the rarest has."""
    return np.sort(_as_many_of_each(np.asarray(targets), np.random.default_rng(seed)))


def _members(targets):
    """The positions of each class: list of int64 arrays."""
    return [np.flatnonzero(targets == k) for k in np.unique(targets)]


def _as_many_of_each(targets, rng):
    """Positions of as many random images of each class as the rarest has, one class after the other."""
    classes = _members(targets)
    least = min(map(len, classes))
    return np.concatenate([rng.choice(members, least, replace=False) for members in classes])


def groups(targets, sources):
    """A number for every class of every source, int64 [N]; of findings, of which an image may have several,
    for every source."""
    pairs = np.asarray(sources) if np.ndim(targets) == 2 else np.stack([sources, targets])
    return np.unique(pairs, axis=-1, return_inverse=True)[1].reshape(-1)


def image_weights(targets, sources, balance):
    """What an image's loss counts for beside its class weight, float32 [N], 1 on average: with "sources" that
    every group adds up to the same, otherwise 1."""
    if balance != "sources":
        return np.ones(len(targets), dtype=np.float32)
    group = groups(targets, sources)
    counts = np.bincount(group)
    return (len(group) / (len(counts) * counts[group])).astype(np.float32)


def epoch_order(seed, epoch, targets, balance="none", sources=None):
    """The positions of an epoch, int64 [M], in order: a function of (seed, epoch) alone, so that a resumed
    epoch continues in the same order.

    "sampler" and "both": N drawn with replacement, every class alike; "sources-sampler": every class of every
    source; "undersample": as many of each class as the rarest has, drawn again in every epoch;
    "undersample-once": the same ones in every epoch. Otherwise all once."""
    rng, targets = np.random.default_rng([seed, epoch]), np.asarray(targets)
    if balance in ("weights", "none", "sources"):
        return rng.permutation(len(targets))
    if balance == "sources-sampler":
        targets = groups(targets, sources)
    if balance in ("sampler", "both", "sources-sampler"):
        classes = _members(targets)
        # First the class of each place, then an image of it.
        picks = rng.integers(len(classes), size=len(targets))
        order = np.empty(len(targets), dtype=np.int64)
        for k, members in enumerate(classes):
            order[picks == k] = rng.choice(members, (picks == k).sum())
        return order
    chooser = rng
    if balance == "undersample-once":
        chooser = np.random.default_rng([seed, 2**32])  # the same in every epoch
    return rng.permutation(_as_many_of_each(targets, chooser))
