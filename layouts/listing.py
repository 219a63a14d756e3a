"""What a data set holds, as names and labels: the Index that every reader of labels returns, the Listing of a
set, and what file names tell of the patient. No image is opened.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

SIDES = ("train", "val", "test")
SIDE_WORDS = {"train": "training", "val": "validation", "test": "test"}  # how messages call them

# What describes a patient or an exposure: {name: (NumPy kind, what it holds)}. A table may add columns.
COHORT = {
    "study": ("U", "the examination, unique in the data set; empty where it is not known"),
    "age": ("f", "years at the examination; NaN where it is not known"),
    "sex": ("U", "F, M, or empty where it is not known or neither"),
    "view": ("U", "PA, AP, lateral, other (oblique, say), or empty where it is not known"),
    "machine": ("U", "the manufacturer, or the manufacturer and model; empty where it is not known"),
}


class Index(NamedTuple):
    """files: [N] names relative to the data folder; targets: int64 [N] class numbers, or int8 [N, K] of
    findings (1 present, 0 absent, -1 unknown); patients: [N] names; known: bool [N], whether that name is a
    patient's or stands for one image; side: [N] the published one of SIDES, or "" if there is none; content:
    int64 [N], which files are copies of each other (twins.contents), or None if not asked; uncertain: bool
    [N, K], which of the unknown labels the table calls uncertain, or None if it calls none so; cohort: what
    is known of patients and exposures, {a name of COHORT or a column of the table: array [N]}, or None;
    blank: bool [N, K], which labels the table leaves empty, whatever these count as, or None."""

    files: list
    targets: np.ndarray
    patients: list
    known: np.ndarray
    side: np.ndarray
    content: np.ndarray = None
    uncertain: np.ndarray = None
    cohort: dict = None
    blank: np.ndarray = None

    def take(self, positions):
        """The Index of these positions."""
        return Index(*(taken(values, positions) for values in self))

    @property
    def unknown(self):
        """Number of images whose patient is not known."""
        return int((~self.known).sum())


@dataclass(frozen=True)
class Reading:
    """What was found of a data set, before images are left out for their view or labels: the `index`;
    `flow`: [[step, images], ...] of the steps "listed" and "found"; `keeps_unlabelled`: whether images stay
    that have no label (they weigh nothing)."""

    index: Index
    flow: list
    keeps_unlabelled: bool


@dataclass(frozen=True)
class Listing:
    """A data set before any image is decoded. `root`: its folder; `index`: the Index of all images; `others`:
    positions of the images that train and validate; `test`: of those that test; `test_from`: where these come
    from, as text (split.cut_test); `flow`: [[step, images], ...] from "listed" to "labelled"."""

    root: Path
    index: Index
    others: np.ndarray
    test: np.ndarray
    test_from: str
    flow: list

    @property
    def test_index(self):
        """The Index of the test images."""
        return self.index.take(self.test)


def taken(values, positions):
    """The elements of a list or an array at these positions, or of each array of a dict; None of None."""
    if isinstance(values, list):
        return [values[i] for i in positions]
    if isinstance(values, dict):
        return {name: array[positions] for name, array in values.items()}
    return None if values is None else values[positions]


def joined_cohorts(cohorts, lengths):
    """The cohorts of several Indices of these `lengths`, one after the other, as one; what one of them lacks
    is unknown there. None if all are None."""
    names = list(dict.fromkeys(name for cohort in cohorts for name in cohort or ()))
    if not names:
        return None
    return {name: np.concatenate(_filled(cohorts, lengths, name)) for name in names}


def _filled(cohorts, lengths, name):
    """A column of several cohorts: list of arrays, of unknown values where a cohort lacks it."""
    values = []
    for cohort, length in zip(cohorts, lengths):
        unknown = np.nan if name == "age" else ""
        values.append((cohort or {}).get(name, np.full(length, unknown)))
    return values


def patient_id(name):
    """The patient in a file name of the Kermany set; any other name stands for a patient of its own.

    person1000_virus_1681.jpeg -> person1000; NORMAL2-IM-0587-0001-0002.jpeg -> NORMAL2-IM-0587.
    The numbers of the test set start again from 1, so ids compare within one split only.
    """
    match = re.match(r"(person\d+)_|((?:NORMAL\d+-)?IM-\d+)-", Path(name).stem)
    return match[1] or match[2] if match else name


def patient_in_folder(name):
    """patient_id as FOLDER/ID, for images of anywhere: sets and viewers number from 1, so one id in several
    folders is of several people. A name that tells no patient stays as it is."""
    who = patient_id(name)
    return name if who == name else f"{Path(name).parent.as_posix()}/{who}"


def joined(indices):
    """Several Indices, one after the other, as one."""
    first, found = indices[0], {}
    for name, value in first._asdict().items():
        values = [getattr(index, name) for index in indices]
        if isinstance(value, list):
            found[name] = list(itertools.chain.from_iterable(values))
        elif isinstance(value, np.ndarray):
            found[name] = np.concatenate(values)
    lengths = [len(index.files) for index in indices]
    return Index(**found, cohort=joined_cohorts([index.cohort for index in indices], lengths))
