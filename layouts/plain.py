"""A plain table: path, patient, and a column a finding with 1, 0, -1 (uncertain) or nothing."""

import re

import numpy as np

from common.console import InputError, advice, say_once
from common.task import is_device, is_healthy
from layouts import chexpert
from layouts.cohort import ages, further_columns, sexes, views
from layouts.nih import NIH_FINDINGS
from layouts.patients import patients_of
from layouts.rows import ABSENT, PRESENT, WORDS, Layout, Rows, columns_of
from layouts.sheets import columns, open_sheet
from layouts.synonyms import same_key

DESCRIBES = ("study", "age", "sex", "view", "machine")  # columns of these names are no findings
NAMES = ("path", "patient", *DESCRIBES)
PATIENTS = ("patientid", "subjectid", "patientname", "patientnumber")  # other names of the column patient


def findings(path):
    """The columns that are none of NAMES, in the table's order."""
    head = open_sheet(path).head
    known = tuple(name for name in head if name and name.lower() not in NAMES)
    if not known:
        raise InputError(f"{path} has no column of a finding: it needs path, patient, then one a finding")
    return known


def labels_of(sheet, asked):
    """int8 [N, K] of the findings `asked`. InputError for a value that is no label, and for a row that says
    both healthy and sick, whichever findings are asked. Sick is a 1 in a column that is asked, or has the
    name of a disease of NIH's or CheXpert's: others, such as one that says whether the picture is frontal,
    may be no findings."""
    if absent := [name for name in asked if name not in sheet.head]:
        raise InputError(f"{sheet.path} has no column {', '.join(absent)}; {columns(sheet.head)}")
    labels = columns_of(sheet, asked, hint=_hint)
    _refuse_both(sheet, asked)
    return labels


def _hint(text):
    """What may be wrong with a cell that holds no label."""
    comma = ". A decimal comma is not read" if re.fullmatch(r"-?\d+,\d+", text) else ""
    return comma + advice("--findings", ". If it is no finding, name those that are with --findings A,B,C")


def _refuse_both(sheet, asked):
    """InputError naming the first row that says healthy and sick."""
    diseases = {same_key(name) for name in (*NIH_FINDINGS, *chexpert.FINDINGS, *asked)}
    healthy = [name for name in sheet.head if is_healthy(name)]
    sick = [name for name in sheet.head if same_key(name) in diseases and not is_device(name)]
    sick = [name for name in sick if name not in healthy]
    is_it = {name: _equals(sheet, name, PRESENT) for name in (*healthy, *sick)}
    against = {f"{name} is 1": is_it[name] for name in sick}
    against |= {f"{name} is 0": _equals(sheet, name, ABSENT) for name in healthy}
    nowhere = np.zeros(len(sheet), dtype=bool)
    well = np.any([nowhere, *(is_it[name] for name in healthy)], axis=0)
    wrong = np.flatnonzero(well & np.any([nowhere, *against.values()], axis=0))
    if len(wrong):
        row = wrong[0]
        first = next(name for name in healthy if is_it[name][row])
        other = next(text for text, rows_of in against.items() if rows_of[row])
        raise InputError(
            f"{sheet.path}, row {sheet.numbers[row]}: {first} is 1 and {other}, a contradiction: correct the "
            "row, or leave what is not known empty"
        )


def _equals(sheet, name, label):
    """bool [N]: where a column says this label; its other values may be no labels."""
    kinds, codes, _ = sheet.codes(name)
    return np.array([WORDS.get(text) == label for text in kinds], dtype=bool)[codes]


def rows(source):
    """The Rows of a table."""
    sheet = open_sheet(source.path)
    asked = source.findings or findings(source.path)
    _hint_at_patients(sheet)
    labels = labels_of(sheet, asked)
    cohort = {}
    described = [name for name in DESCRIBES if sheet.find(name) and sheet.find(name) not in asked]
    for name in described:
        values = sheet.text(name)
        if name == "age":
            cohort[name] = ages(values, sheet.path)
        elif name == "sex":
            cohort[name] = sexes(values, sheet.path)
        elif name == "view":
            cohort[name] = views(values, sheet.path)
        else:
            cohort[name] = np.array(values, dtype=str)
    cohort |= further_columns(sheet, (*NAMES, *asked))
    patients = patients_of(sheet, "patient")
    return [Rows(sheet.path, sheet.text("path"), sheet.numbers, asked, labels, patients, cohort=cohort)]


def _hint_at_patients(sheet):
    """A note where a column seems to be that of the patients, and has another name."""
    meant = [name for name in sheet.head if re.sub(r"[\W_]", "", name.lower()) in PATIENTS]
    if meant and not sheet.find("patient"):
        say_once(f"note: {sheet.path} has a column {meant[0]} and no column patient: call it patient")


LAYOUT = Layout(
    name="plain",
    title="plain",
    needs=("path",),
    findings=findings,
    rows=rows,
    keeps_unlabelled=True,
)
