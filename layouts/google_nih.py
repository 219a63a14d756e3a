"""Four findings of NIH images, read again by radiologists: for evaluation only.

Source: Majkowska et al. 2020; the columns Fracture, Pneumothorax, Airspace opacity and Nodule or mass with
YES and NO, as torchxrayvision joins them with NIH's own columns, or as published (Image ID).
"""

import numpy as np

from layouts import nih
from layouts.cohort import further_columns
from layouts.patients import patients_of
from layouts.rows import ABSENT, BLANK, PRESENT, Layout, Rows, columns_of
from layouts.sheets import open_sheet

FINDINGS = ("Fracture", "Pneumothorax", "Airspace opacity", "Nodule or mass")
IMAGE = (nih.NAME, "Image ID")
SET = "Set Id"
WORDS = {"YES": PRESENT, "NO": ABSENT, "": BLANK}
SIDE = {"test": "test", "val": "val", "validation": "val"}


def findings(path):
    """FINDINGS."""
    return FINDINGS


def rows(source):
    """The Rows of the table."""
    sheet = open_sheet(source.path)
    image = next(name for name in IMAGE if sheet.find(name))
    patients = patients_of(sheet, nih.PATIENT)
    cohort = nih.cohort_of_sheet(sheet, patients)
    used = (*IMAGE, nih.PATIENT, nih.AGE, nih.SEX, nih.VIEW, nih.NUMBER, nih.LABELS, *FINDINGS)
    cohort |= further_columns(sheet, used)
    labels = columns_of(sheet, FINDINGS, WORDS)
    side = np.array([SIDE.get(text.lower(), "") for text in sheet.text(SET)], dtype="U5")
    names = sheet.text(image)
    return [Rows(sheet.path, names, sheet.numbers, FINDINGS, labels, patients, side=side, cohort=cohort)]


LAYOUT = Layout(
    name="google_nih",
    title="four findings of NIH images by Google's readers",
    needs=(IMAGE, *FINDINGS),
    findings=findings,
    rows=rows,
    beats=("nih", "plain"),
    public="nih",
    bare=True,
    trains=False,
)
