"""VinDr-CXR: several readers an image. Kaggle's train.csv has a row a box, PhysioNet's tables a row a reader.

Source: Nguyen et al. 2022; train.csv of the Kaggle competition, image_labels_train.csv and
image_labels_test.csv of PhysioNet, whose test part holds the consensus of five readers. Nobody's patients are
published. --readers says how many readers must see a finding: any, more than half, or all.
"""

from pathlib import Path

import numpy as np

from common.console import InputError, say_once
from common.task import is_healthy
from layouts.rows import ABSENT, PRESENT, UNUSABLE, Layout, Rows, columns_of
from layouts.sheets import open_sheet
from layouts.synonyms import same_key

ID, READER, NAME = "image_id", "rad_id", "class_name"
MARK = "Aortic enlargement"  # a column of PhysioNet's tables
WORDS = {"1": PRESENT, "1.0": PRESENT, "0": ABSENT, "0.0": ABSENT}


def findings(path):
    """The healthy one first; Kaggle's others alphabetically, PhysioNet's as the columns stand."""
    sheet = open_sheet(path)
    if sheet.find(NAME):
        known = sorted(set(_names(sheet)) - {""})
    else:
        known = [name for name in sheet.head if name and name.lower() not in (ID, READER)]
    return tuple(sorted(known, key=lambda name: not is_healthy(name)))


def _names(sheet):
    """The class of each row of a Sheet, every one in one spelling, that of its first in the alphabet: readers
    who spell a finding differently mean one."""
    first, spelt, texts = {}, {}, sheet.text(NAME)
    for name in sorted(set(texts)):
        spelt[name] = first.setdefault("healthy" if is_healthy(name) else same_key(name), name)
    if other := [name for name in set(texts) if spelt[name] != name]:
        listed = ", ".join(f"{name} as {spelt[name]}" for name in sorted(other)[:5])
        say_once(f"note: {sheet.path}: {len(other)} other spellings are read, {listed}")
    return [spelt[name] for name in texts]


def rows(source):
    """The Rows of the table; of PhysioNet's the test part, too, if its table lies beside that of training."""
    path = Path(source.path)
    parts = [_rows_of(path, source.readers)]
    beside = path.with_name(path.name.replace("train", "test"))
    if "image_labels_train" in path.name and beside.is_file():
        test = _rows_of(beside, source.readers)
        if set(test.findings) != set(parts[0].findings):
            raise InputError(f"{beside} does not have the findings of {path}")
        order = [test.findings.index(name) for name in parts[0].findings]
        test.findings, test.labels = parts[0].findings, test.labels[:, order]
        for part, side in ((parts[0], "train"), (test, "test")):
            part.side = np.full(len(part.names), side, dtype="U5")
        parts.append(test)
    return parts


def _rows_of(path, how):
    """The Rows of one table."""
    sheet = open_sheet(path)
    known = findings(path)
    ids, images, first = sheet.codes(ID)
    readers = np.array(sheet.text(READER), dtype=object)
    if sheet.find(NAME):
        said = np.zeros((len(sheet), len(known)), dtype=bool)
        at = {name: k for k, name in enumerate(known)}
        for row, name in enumerate(_names(sheet)):
            if name not in at:
                raise InputError(f"{path}, row {sheet.numbers[row]}: {NAME} is empty; healthy is No finding")
            said[row, at[name]] = True
    else:
        said = columns_of(sheet, known, WORDS) == PRESENT
    # One row a reader of an image: what this reader said in all rows.
    pairs = [f"{image}\0{reader}" for image, reader in zip(images, readers)]
    _, start, reading = np.unique(pairs, return_index=True, return_inverse=True)
    opinions = np.zeros((len(start), len(known)), dtype=np.int64)
    np.maximum.at(opinions, reading, said.astype(np.int64))
    _refuse_torn(sheet, opinions, start, known, ids, images, readers)
    votes = np.zeros((len(ids), len(known)), dtype=np.int64)
    np.add.at(votes, images[start], opinions)
    count = np.bincount(images[start], minlength=len(ids))[:, None]
    labels = agreed(votes, count, how, known)
    return Rows(path, ids, sheet.numbers[first], known, labels, [""] * len(ids))


def _refuse_torn(sheet, opinions, start, known, ids, images, readers):
    """InputError naming the row of a reader who says both healthy and a finding of the same image."""
    healthy = np.array([is_healthy(name) for name in known])
    torn = opinions[:, healthy].any(axis=1) & opinions[:, ~healthy].any(axis=1)
    if torn.any():
        row = start[torn].min()
        who = f"reader {readers[row]}" if readers[row] else "it"
        raise InputError(
            f"{sheet.path}, row {sheet.numbers[row]}: of {ids[images[row]]}, {who} says No finding and, in "
            "this or another row, a finding: a contradiction; correct the rows"
        )


def agreed(votes, count, how, known):
    """int8 [N, K]: what readers agree on. `votes` [N, K] of `count` [N, 1] readers; `how`: "any",
    "majority" (more than half) or "all". Where a finding is present, the image is not healthy; where all
    readers are asked and differ on that, it is unknown."""
    if how == "any":
        present = votes > 0
    elif how == "majority":
        present = 2 * votes > count
    else:
        present = votes == count
    healthy = np.array([is_healthy(name) for name in known])
    sick = present[:, ~healthy].any(axis=1)
    present[:, healthy] &= ~sick[:, None]
    labels = present.astype(np.int8)
    if how == "all":  # where they do not agree on anything, nobody knows
        apart = (votes[:, healthy] > 0) & (votes[:, healthy] < count) & ~sick[:, None]
        labels[:, healthy] = np.where(apart, UNUSABLE, labels[:, healthy])
    return labels


LAYOUT = Layout(
    name="vindr",
    title="VinDr-CXR",
    needs=(ID, (NAME, MARK)),
    findings=findings,
    rows=rows,
    public="vindr",
    by_id=True,
    main=("train",),
)
