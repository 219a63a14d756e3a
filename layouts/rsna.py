"""The RSNA pneumonia challenge (2018): a row a box, images called by an id.

Source: Shih et al. 2019; stage_2_train_labels.csv, with stage_2_detailed_class_info.csv and a table of the
DICOM headers where these lie beside it. The id names an image, not a person. The images are NIH's: where
pneumonia-challenge-dataset-mappings_2018.json lies beside the table, NIH's patient is known.
"""

import json
import re
from pathlib import Path

import numpy as np

from common.console import InputError, say_once
from layouts.cohort import ages, sexes, views
from layouts.rows import ABSENT, BLANK, PRESENT, Layout, Rows, coded
from layouts.sheets import open_sheet, sheet_beside

ID, TARGET, CLASS = "patientId", "Target", "class"
HEADERS = ("PatientID", "PatientAge", "PatientSex", "ViewPosition")
TARGETS = {"1": PRESENT, "1.0": PRESENT, "0": ABSENT, "0.0": ABSENT, "": BLANK}
CLASSES = {"Normal": PRESENT, "No Lung Opacity / Not Normal": ABSENT, "Lung Opacity": ABSENT}  # healthy?
NIH_NAME = re.compile(r"(\d{8})_\d{3}\.png")


def findings(path):
    """ "Pneumonia", and "No Finding" before it where the table of classes is there."""
    return ("Pneumonia",) if sheet_beside(path, (ID, CLASS)) is None else ("No Finding", "Pneumonia")


def rows(source):
    """The Rows of the images; boxes are not read. InputError for rows of an image that contradict each
    other."""
    sheet = open_sheet(source.path)
    ids, codes, first = sheet.codes(ID)
    targets = coded(sheet, TARGET, TARGETS, "1 or 0")
    other = np.flatnonzero(targets != targets[first][codes])
    if len(other):
        row = other[0]
        raise InputError(
            f"{sheet.path}, row {sheet.numbers[row]}: {TARGET} of {ids[codes[row]]} is not what it is in row "
            f"{sheet.numbers[first[codes[row]]]}: correct one of them"
        )
    labels = targets[first][:, None]
    classes = sheet_beside(source.path, (ID, CLASS))
    if classes is not None:
        labels = np.column_stack([_healthy(classes, ids), labels])
    patients = _patients(source.path, ids)
    cohort = _headers(source.path, ids)
    return [
        Rows(sheet.path, ids, sheet.numbers[first], findings(source.path), labels, patients, cohort=cohort)
    ]


def _healthy(sheet, ids):
    """int8 [N]: whether the table of classes calls these images normal; BLANK where it does not list them."""
    words = coded(sheet, CLASS, CLASSES, ", ".join(CLASSES))
    known = {}
    for number, image, word in zip(sheet.numbers, sheet.text(ID), words.tolist()):
        if known.setdefault(image, word) != word:
            raise InputError(f"{sheet.path}, row {number}: {image} has another {CLASS} than in a row before")
    return np.array([known.get(image, BLANK) for image in ids], dtype=np.int8)


def _headers(path, ids):
    """Age, sex and view of a table of the DICOM headers, where it is there."""
    sheet = sheet_beside(path, HEADERS)
    if sheet is None:
        return {}
    row = {image: at for at, image in enumerate(sheet.text("PatientID"))}

    def column(name):
        values = sheet.text(name)
        return [values[row[image]] if image in row else "" for image in ids]

    return {
        "age": ages(column("PatientAge"), sheet.path),
        "sex": sexes(column("PatientSex"), sheet.path),
        "view": views(column("ViewPosition"), sheet.path),
    }


def _patients(path, ids):
    """NIH's patients of these images, by the published mapping; "" where it does not tell."""
    there = sorted(Path(path).parent.glob("pneumonia-challenge-dataset-mappings*.json"))
    if not there:
        say_once(f"note: {path}: its ids name images, not people: patients are unknown")
        return [""] * len(ids)
    patient_of = {}
    for entry in _entries(there[0]):
        match = NIH_NAME.fullmatch(str(entry.get("img_id", "")))
        if match:
            patient_of[str(entry.get("subset_img_id", ""))] = str(int(match[1]))
    return [patient_of.get(image, "") for image in ids]


def _entries(path):
    """The entries of the mapping, dicts. InputError if it holds something else."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{path} cannot be read: copy it again from where it came") from None
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise InputError(f"{path} is not the list of images that RSNA published")
    return content


LAYOUT = Layout(
    name="rsna",
    title="RSNA pneumonia challenge",
    needs=(ID, TARGET),
    findings=findings,
    rows=rows,
    public="rsna",
    by_id=True,
    main=("label",),
)
