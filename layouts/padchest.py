"""PadChest: labels as a Python list in text, 16-bit PNG in numbered folders or in one.

Source: Bustos et al. 2020; PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv. A label that a list does not
hold is absent, because the lists hold what the report says. Where a report says "unchanged", only what it
names is known. Rows with "exclude" or "suboptimal study", or that call an image normal and sick, are left
out.
"""

import ast
from collections import Counter

import numpy as np

from common.console import InputError, say_once
from common.task import is_healthy
from layouts.cohort import OLDEST, sexes, views
from layouts.patients import patients_of
from layouts.rows import ABSENT, BLANK, PRESENT, UNUSABLE, Layout, Rows
from layouts.sheets import open_sheet

IMAGE, FOLDER, PATIENT, STUDY, LABELS = "ImageID", "ImageDir", "PatientID", "StudyID", "Labels"
BIRTH, DATE, SEX = "PatientBirth", "StudyDate_DICOM", "PatientSex_DICOM"
VIEW, MACHINE = "Projection", "Manufacturer_DICOM"
BAD = ("exclude", "suboptimal study")
UNCHANGED = "unchanged"
EMPTY = ("", "nan")
LONGEST = 10_000  # characters of a cell; the longest real one has 400
RARE = 0.01  # of the rows: labels in fewer are findings only where --findings names them


def parse(sheet):
    """(list of N frozensets of labels, None where the cell is empty) of a Sheet. InputError naming the row of
    a cell that is no list of texts."""
    kinds, codes, first = sheet.codes(LABELS)
    found = [_labels(sheet, text, int(sheet.numbers[at])) for text, at in zip(kinds, first)]
    return [found[code] for code in codes]


def _labels(sheet, text, number):
    """The labels in a cell, a frozenset; None where it is empty. No code in it is run."""
    if text.lower() in EMPTY:
        return None
    try:
        value = ast.literal_eval(text) if len(text) <= LONGEST else None
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(
            f"{sheet.path}, row {number}: {LABELS} is {text[:60]!r}, not a list of texts such as ['normal']"
        )
    return frozenset(item.strip().lower() for item in value) - {""}


def findings(path):
    """All labels of the rows that are used: the healthy one first, then alphabetically."""
    known = set().union(*_usable_labels(path)) - {UNCHANGED}
    return tuple(sorted(known, key=lambda name: (not is_healthy(name), name)))


def usual_findings(path):
    """The `findings` that RARE of the rows or more have. A note counts the others."""
    labels = _usable_labels(path)
    counts = Counter(name for row in labels for name in row)
    known = findings(path)
    usual = tuple(name for name in known if counts[name] >= RARE * len(labels))
    if len(usual) < len(known):
        say_once(
            f"note: {path}: {len(known) - len(usual)} labels that fewer than {RARE:.0%} of the rows have are "
            "not asked; --findings A,B,... asks any"
        )
    return usual or known


def _usable_labels(path):
    """The labels of the rows that are not left out: list of frozensets."""
    sheet = open_sheet(path)
    both = zip(parse(sheet), sheet.text(VIEW))
    return [labels for labels, projection in both if not _unusable(labels, projection)]


def rows(source):
    """The Rows of the table."""
    sheet = open_sheet(source.path)
    labels = parse(sheet)
    known = source.findings or findings(source.path)
    values = np.empty((len(sheet), len(known)), dtype=np.int8)
    made = {}  # many rows say the same
    for at, row in enumerate(labels):
        if row not in made:
            absent = BLANK if not row or UNCHANGED in row else ABSENT
            made[row] = [PRESENT if name in (row or ()) else absent for name in known]
        values[at] = made[row]
    left_out = Counter()
    for at, (row, projection) in enumerate(zip(labels, sheet.text(VIEW))):
        if reason := _unusable(row, projection):
            left_out[reason] += 1
            values[at] = UNUSABLE
    cohort = {
        "study": np.array(sheet.text(STUDY), dtype=str),
        "age": _ages(sheet),
        "sex": sexes(["" if text == "nan" else text for text in sheet.text(SEX)], sheet.path),
        "view": views(sheet.text(VIEW), sheet.path),
        "machine": np.array(sheet.text(MACHINE), dtype=str),
    }
    names = []
    for folder, image in zip(sheet.text(FOLDER), sheet.text(IMAGE)):
        names.append(f"{folder}/{image}" if folder else image)
    patients = patients_of(sheet, PATIENT)
    found = Rows(sheet.path, names, sheet.numbers, known, values, patients, cohort=cohort)
    found.left_out = dict(left_out)
    return [found]


def _unusable(labels, projection):
    """Why a row is left out, as text; "" where it is not."""
    if labels is None:
        return "rows have no labels"
    for name in BAD:
        if name in labels:
            return f"rows are labelled {name}"
    if projection.upper() == "EXCLUDE":
        return "rows have the projection EXCLUDE"
    if any(map(is_healthy, labels)) and len(labels - {UNCHANGED}) > 1:
        return "rows say normal and a finding, a contradiction"
    return ""


def _ages(sheet):
    """Years between birth and study, float64 [N]; NaN where one is not known."""
    found = np.full(len(sheet), np.nan)
    for at, (birth, date) in enumerate(zip(sheet.text(BIRTH), sheet.text(DATE))):
        birth = birth.removesuffix(".0")
        if birth.isdigit() and date[:4].isdigit():
            age = int(date[:4]) - int(birth)
            if 0 <= age <= OLDEST:
                found[at] = age
    return found


LAYOUT = Layout(
    name="padchest",
    title="PadChest",
    needs=(IMAGE, PATIENT, LABELS, VIEW),
    findings=findings,
    usual=usual_findings,
    rows=rows,
    placed=True,
    public="padchest",
    by_id=True,
    main=("labels",),
)
