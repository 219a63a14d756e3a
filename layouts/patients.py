"""Names of patients: of a column of a table, and of a table path,patient for images that have none."""

import re

import numpy as np

from common.console import InputError, say_once
from layouts.lookup import Listed
from layouts.sheets import columns, open_sheet

NOBODY = ("na", "n/a", "#n/a", "nan", "null", "none", "unknown", "unk", "-", "?")  # in lower case
ROUNDED = r"\d([.,]\d+[eE]\+?|[eE]\+)\d+"  # a long number as spreadsheets write it: 8.68687E+37


def clean_patient(text):
    """A patient's name, "" where a word says that it is not known (NOBODY); a number that a spreadsheet wrote
    as a fraction becomes whole again: 12.0 -> 12."""
    if text.strip().lower() in NOBODY:
        return ""
    return re.sub(r"^(\d+)\.0+$", r"\1", text.strip())


def patients_of(sheet, name):
    """The patients that a column of a Sheet names, list of N texts, "" where unknown. InputError for a
    decimal comma (12,0 may be 12, or a name) and a rounded number."""
    texts = sheet.text(name)
    clean = {}
    for number, text in zip(sheet.numbers, texts):
        if text in clean:
            continue
        if re.fullmatch(r"\d+,0+", text):
            raise InputError(
                f"{sheet.path}, row {number}: the patient is {text!r}: a decimal comma is not read"
            )
        if re.fullmatch(ROUNDED, text):
            raise InputError(
                f"{sheet.path}, row {number}: the patient is {text!r}, a number that a spreadsheet has "
                "rounded, which several people may have: export the column as text"
            )
        clean[text] = clean_patient(text)
    return [clean[text] for text in texts]


def read_patients(path, index, root=""):
    """The Index with the patients of a table `path,patient`; files it does not list keep none.

    Paths are relative to the data folder `root`, or understood as lookup.Listed does. InputError if a path
    has two patients, or no path is known."""
    sheet = open_sheet(path)
    if not (sheet.find("path") and sheet.find("patient")):
        raise InputError(f"--patients {path} needs the columns path and patient, {columns(sheet.head)}")
    listed = Listed(path, root, {file: file for file in index.files})
    owner, said, absent = {}, {}, 0
    for number, text, patient in zip(sheet.numbers, sheet.text("path"), patients_of(sheet, "patient")):
        name = listed.clean(text)
        if patient and said.setdefault(name, patient) != patient:
            raise InputError(f"--patients {path}, row {number}: {name} has two patients")
        file = listed.find(name, number)
        if file is None:
            absent += 1
        elif patient:
            owner[file] = patient
    listed.say_guessed()
    known = np.array([f in owner for f in index.files], dtype=bool)
    if not known.any():
        first = listed.clean(sheet.text("path")[0])
        raise InputError(
            f"--patients {path} lists none of the images; paths are relative to the data folder, such as "
            f"{index.files[0]}; it lists {first}; {columns(sheet.head)}"
        )
    if absent:
        say_once(f"note: --patients {path}: {absent} rows name no image that is used here; passed over")
    return index._replace(patients=[owner.get(f, f) for f in index.files], known=known)
