"""MIMIC-CXR-JPG: labels are a study's; two other tables tell the images of a study, their view and side.

Source: Johnson et al. 2019; mimic-cxr-2.0.0-chexpert.csv.gz (or -negbio), -split.csv.gz and -metadata.csv.gz.
An image lies at files/p10/p10000032/s50414267/DICOM_ID.jpg. Age and sex are known where MIMIC-IV's
patients.csv.gz lies beside them. Blank counts as negative, as for CheXpert, whose labeller wrote the labels.
"""

import numpy as np

from common.console import InputError, say_once
from layouts.chexpert import findings
from layouts.cohort import OLDEST, sexes, views
from layouts.rows import UNUSABLE, Layout, Rows, columns_of
from layouts.sheets import open_sheet, sheet_beside

SIDE = {"train": "train", "validate": "val", "test": "test"}
IMAGES, SPLIT = ("dicom_id", "subject_id", "study_id"), "split"
VIEW, DATE = "ViewPosition", "StudyDate"
ANCHOR = ("subject_id", "gender", "anchor_age", "anchor_year")


def _row_of(sheet, *names):
    """{(values of these columns): position of the row} of a Sheet."""
    return {key: at for at, key in enumerate(zip(*map(sheet.text, names)))}


def rows(source):
    """The Rows of the images of the studies that have labels."""
    labels = open_sheet(source.path)
    metadata = sheet_beside(source.path, (*IMAGES, VIEW))
    split = sheet_beside(source.path, (*IMAGES, SPLIT))
    images = metadata or split
    if images is None:
        raise InputError(
            f"{source.path} has the labels of studies: put mimic-cxr-2.0.0-metadata.csv.gz and -split.csv.gz "
            "beside it, which say which images these have"
        )
    study_row, known = _row_of(labels, "subject_id", "study_id"), findings(source.path)
    values = columns_of(labels, known)
    for at, study in enumerate(zip(*map(labels.text, ("subject_id", "study_id")))):
        if not np.array_equal(values[at], values[study_row[study]]):
            raise InputError(
                f"{labels.path}, row {labels.numbers[at]}: the labels of study {study[1]} are not what they "
                f"are in row {labels.numbers[study_row[study]]}: correct one of them"
            )
    positions, names = np.full(len(images), len(labels)), []  # images without labels: a row after the last
    for at, (image, patient, study) in enumerate(zip(*map(images.text, IMAGES))):
        names.append(f"files/p{patient[:2]}/p{patient}/s{study}/{image}.jpg")
        positions[at] = study_row.get((patient, study), len(labels))
    without = int((positions == len(labels)).sum())
    left_out = {f"images of {images.path} have no labels": without} if without else {}
    side = _sides(split, images.text("dicom_id"))
    if side is not None:
        lost = (side == "") & (positions < len(labels))
        positions[lost] = len(labels)
        if lost.any():
            left_out[f"images of {images.path} are not in {split.path}"] = int(lost.sum())
    unread = set(study_row) - set(zip(images.text("subject_id"), images.text("study_id")))
    if unread:
        say_once(f"note: {labels.path}: {len(unread)} studies have labels and no image in {images.path}")
    values = np.vstack([values, np.full((1, len(known)), UNUSABLE, dtype=np.int8)])
    patients = images.text("subject_id")
    cohort = {"study": np.array(images.text("study_id"), dtype=str)}
    if metadata:
        cohort["view"] = views(metadata.text(VIEW), metadata.path)
    cohort |= _people(source.path, patients, images.text(DATE))
    return [
        Rows(
            source.path,
            names,
            np.append(labels.numbers, 0)[positions],
            known,
            values[positions],
            patients,
            side=side,
            cohort=cohort,
            left_out=left_out,
        )
    ]


def _sides(split, images):
    """The published side of images, U5 [N], "" for those that the table does not list; None without one."""
    if split is None:
        say_once(
            "note: there is no table mimic-cxr-2.0.0-split.csv.gz beside the labels: the sides are cut anew"
        )
        return None
    side_of = {}
    for number, image, word in zip(split.numbers, split.text("dicom_id"), split.text(SPLIT)):
        if word not in SIDE:
            raise InputError(
                f"{split.path}, row {number}: split is {word[:40]!r}, not one of {', '.join(SIDE)}"
            )
        side_of[image] = SIDE[word]
    return np.array([side_of.get(image, "") for image in images], dtype="U5")


def _people(path, patients, dates):
    """Age at the study and sex, of MIMIC-IV's table of patients, where it is there: its years are shifted for
    each patient as the dates of the studies are."""
    sheet = sheet_beside(path, ANCHOR)
    if sheet is None:
        return {}
    row = _row_of(sheet, "subject_id")
    gender, age, year = (sheet.text(name) for name in ANCHOR[1:])
    years, words = [], []
    for patient, date in zip(patients, dates):
        at = row.get((patient,))
        words.append("" if at is None else gender[at])
        known = at is not None and date[:4].isdigit() and age[at].isdigit() and year[at].isdigit()
        years.append(int(age[at]) + int(date[:4]) - int(year[at]) if known else np.nan)
    years = np.array(years, dtype=np.float64)
    years[~((years >= 0) & (years <= OLDEST))] = np.nan
    return {"age": years, "sex": sexes(words, sheet.path)}


LAYOUT = Layout(
    name="mimic",
    title="MIMIC-CXR-JPG",
    needs=("subject_id", "study_id", "No Finding"),
    findings=findings,
    rows=rows,
    beats=("plain",),
    blank="negative",
    placed=True,
    public="mimic",
    main=("chexpert",),
    infers=True,
)
