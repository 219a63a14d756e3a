"""What results.json and the terminal say of a split: counts, patients on two sides, where test comes from."""

from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split

from cohort.who import of_sides
from common import prelude  # noqa: F401  (first: see there)
from common.console import advice, say
from common.files import sha256
from images import twins
from images.dicom import keyed
from images.split import say_shared
from layouts.listing import SIDE_WORDS


def describe(config, listing, train, val, indices, readable, unknown):
    """The "split" of a results.json, but for the sizes of the originals and for pictures that look alike.
    listing: the Listing; train, val: Subsets; indices: {side: Index}; readable: number of readable images of
    train and validation, `unknown` of which have no known patient."""
    root, test = listing.root, indices["test"]
    sides, trained_on = {"train": train, "val": val, "test": test}, set(train.patients)
    either = trained_on | set(val.patients)
    info = {
        **{side: len(images.files) for side, images in sides.items()},
        "counts": {side: _counts(config, images.targets) for side, images in sides.items()},
        "shared_patients": sum(patient in trained_on for patient in val.patients),
        "unknown_patients": unknown,
        "cohort": of_sides(config.task, sides),
        "fingerprint": _fingerprint(config, train, val),
        "test_from": listing.test_from,
        "synthetic": Path(root, "SYNTHETIC").exists(),  # drawn.py leaves it in what it draws
        "set": root.resolve().name,
    }
    # The published parts of a set of folders number their patients separately.
    if listing.test_from != "published" or config.labels or config.patients:
        info["shared_patients_test"] = sum(patient in either for patient in test.patients)
    elif keyed(test.patients):
        known = keyed(either)
        info["shared_patients_test"] = sum(patient in known for patient in test.patients)
    info["copies"] = twins.count({side: index.content for side, index in indices.items()})
    info["flow"] = [*listing.flow, ["readable", readable + len(test.files)]]
    info["flow"] += [[side, len(index.files)] for side, index in indices.items()]
    if config.labels:
        info["labels"] = {side: _label_counts(config, index) for side, index in indices.items()}
    return info


def _label_counts(config, index):
    """{finding: {"positive", "negative", "uncertain", "blank": images}} of an Index, as the table says: a
    blank label is none of the others, whatever it counts as."""
    counts = {}
    for k, name in enumerate(config.classes):
        label, blank, uncertain = index.targets[:, k], index.blank[:, k], index.uncertain[:, k]
        counts[name] = {
            "positive": int((label == 1).sum()),
            "negative": int(((label == 0) & ~blank).sum()),
            "uncertain": int(uncertain.sum()),
            "blank": int(blank.sum()),
        }
    return counts


def label_lines(config, labels):
    """The lines that training prints of a table's labels, a finding each, all sides together; none where
    every label is certain."""
    totals = {}
    for name in config.classes:
        sides = [counts[name] for counts in labels.values()]
        totals[name] = {kind: sum(side[kind] for side in sides) for kind in (sides[0] if sides else ())}
    if not any(found.get("uncertain") or found.get("blank") for found in totals.values()):
        return []
    blank = {"ignore": "left out", "negative": "negative"}.get(config.blank, "as the layout has them")
    lines = [
        f"labels: blank ones are {blank}; uncertain ones are, in training, as --uncertain {config.uncertain} "
        "says, and else left out"
    ]
    for name, found in totals.items():
        listed = ", ".join(f"{number} {kind}" for kind, number in found.items())
        lines.append(f"  {name}: {listed}")
    return lines


def say_twice(info, indices, listing):
    """Notes on files that are on two sides, and on copies of a file with other labels."""
    files = {side: index.files for side, index in indices.items()}
    twins.warn(files, {side: index.content for side, index in indices.items()}, info["copies"])
    twins.warn_of_labels(listing.index.files, listing.index.content, listing.index.targets)
    for side in ("val", "test"):
        index = indices[side]
        people = len(set(index.patients))
        if fewer := people - len(set(twins.joined(index.patients, index.content))):
            say(
                f"note: {people} {SIDE_WORDS[side]} patients are {people - fewer} at most, as some share a "
                f"file, byte for byte: figures and promises count {people}"
            )


def _counts(config, targets):
    """{class: number of its images}, or {finding: number of images that have it}."""
    counts = {}
    for k, name in enumerate(config.classes):
        if config.task.kind == "sigmoid":
            has_it = targets[:, k] == 1
        else:
            has_it = targets == k
        counts[name] = int(has_it.sum())
    return counts


def _fingerprint(config, train, val):
    """SHA-256 of the file names of both sides, and of a table's labels, which could change under them."""
    if config.task.kind == "sigmoid":
        labelled = [sorted(zip(side.files, side.targets.tolist())) for side in (train, val)]
        return sha256([config.classes, labelled])
    return sha256([sorted(train.files), sorted(val.files)])


def summary(config, root, info):
    """The line that training prints of a split."""
    synthetic = " (SYNTHETIC)" if info["synthetic"] else ""
    cut = f"--split {config.split}"
    if info["test_from"] != "published":
        cut += f", test {info['test_from']}"
    listed = "; ".join(f"{side} {_count_text(counts)}" for side, counts in info["counts"].items())
    return (
        f"data: {root}{synthetic}, {cut}: (train, val, test) = "
        f"({info['train']}, {info['val']}, {info['test']}): {listed}; {say_shared(info)}; "
        f"{twins.say_copies(info)}"
    )


def _count_text(counts):
    """ "3 A + 5 B", of many findings the first few."""
    items = [f"{number} {name}" for name, number in counts.items()]
    text = " + ".join(items[:6])
    if len(items) > 6:
        text += f" + {len(items) - 6} more"
    return text


def say_absent(config, counts, targets, blank):
    """Notes on what a side lacks. Of findings: those of which no training image is known to have them, or to
    be without them; targets: int8 [N, K], what training learns; blank: bool [N, K], as Index.blank. Of
    classes: those of which validation or test has no image; counts: {side: {class: images}}."""
    if config.task.kind == "softmax":
        for side, number in counts.items():
            names = ", ".join(name for name in config.classes if not number[name])
            if names:
                say(f"note: no {SIDE_WORDS[side]} image is {names}: no figure there tells of it")
        return
    for label, lacks in ((1, "has"), (0, "is without")):
        lacking = np.flatnonzero(~(targets == label).any(axis=0))
        names = ", ".join(config.classes[k] for k in lacking)
        way = ""
        if label == 0 and (blank[:, lacking] & (targets[:, lacking] < 0)).any():
            way = advice("--blank", "; --blank negative takes blank labels for absent")
        if names:
            say(f"note: no training image {lacks} {names}, so nothing can be learnt about it{way}")


def say_inexact(targets, config, have):
    """A note if whole patients do not add up to the class counts of a stratified split of images."""
    _, plain = train_test_split(
        targets, test_size=config.val_share, stratify=targets, random_state=config.split_seed
    )
    want = [int((plain == k).sum()) for k in range(len(config.classes))]
    if want != have:
        say(f"note: whole patients allow no exact stratified split: validation has {have}, nearest to {want}")
