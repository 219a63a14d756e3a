"""Names of patients: of a column of a table, and of a table path,patient for images that have none."""

import itertools
import re
from collections import Counter

import numpy as np

from common.console import InputError, say_once
from images import twins
from layouts.lookup import Listed
from layouts.sheets import columns, open_sheet

NOBODY = ("na", "n/a", "#n/a", "nan", "null", "none", "unknown", "unk", "-", "?")  # in lower case
ROUNDED = r"\d([.,]\d+[eE]\+?|[eE]\+)\d+"  # a long number as spreadsheets write it: 8.68687E+37
MOST_PATIENTS = 3  # of one study or id: more, and its number says nothing


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
    several = [found for found in sheet.head if found.lower() == name.lower()]
    if len(several) > 1:
        say_once(f"note: {sheet.path} has the columns {' and '.join(several)}: {sheet.find(name)} is read")
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
    """The Index with the patients of a table `path,patient`; files that it does not list keep the patient
    that was known (`_with_those_known`).

    Paths are relative to the data folder `root`, or understood as lookup.Listed does. InputError if a path
    has two patients, or no path is known."""
    sheet = open_sheet(path)
    if not (sheet.find("path") and sheet.find("patient")):
        raise InputError(f"--patients {path} needs the columns path and patient, {columns(sheet.head)}")
    listed = Listed(path, root, {file: file for file in index.files})
    owner, said, absent = {}, {}, 0
    for number, text, patient in zip(sheet.numbers, sheet.text("path"), patients_of(sheet, "patient")):
        name = listed.clean(text)
        if name and patient and said.setdefault(name, patient) != patient:
            raise InputError(f"--patients {path}, row {number}: {name} has two patients")
        file = listed.find(name, number)
        if file is None:
            absent += 1
        elif patient:
            owner[file] = patient
    listed.say_guessed()
    if not owner:
        first = listed.clean(sheet.text("path")[0])
        raise InputError(
            f"--patients {path} lists none of the images; paths are relative to the data folder, such as "
            f"{index.files[0]}; it lists {first}; {columns(sheet.head)}"
        )
    if absent:
        say_once(f"note: --patients {path}: {absent} rows name no image that is used here; passed over")
    return _with_those_known(index, owner, f"--patients {path}")


def _with_those_known(index, owner, where):
    """The Index with the patients of a table, `owner` {file: patient}; a file that is not listed there keeps
    the patient that was known. Notes count these, and the known patients whose images the table divides or
    joins otherwise.

    People of two sources are taken for one rather than for two, which could train and validate: so are those
    of equal names (SIDE/NAME of a published part equals the NAME of a listed file there), and images of a
    known patient are of the one whom the table names on others of them."""
    listed = np.array([file in owner for file in index.files], dtype=bool)
    kept = index.known & ~listed
    spoken_of = {(side, owner[file]) for side, file in zip(index.side, index.files) if file in owner}
    names = []
    for file, old, side, stays in zip(index.files, index.patients, index.side, kept):
        bare = old.removeprefix(f"{side}/")
        if stays and (side, bare) in spoken_of:
            old = bare
        names.append(owner.get(file, old))

    # Of a known patient whom the table lists in part only, its names hold for the other images.
    in_part = set(np.array(index.patients, dtype=object)[kept].tolist())
    ids = np.array([old if old in in_part else "" for old in index.patients], dtype=object)
    ids[~index.known] = ""
    names = as_the_table_calls_them(names, ids, listed)
    _say_kept(index, names, kept, set(owner.values()), where)
    return index._replace(patients=names, known=listed | index.known)


def _say_kept(index, names, kept, table_names, where):
    """The notes of `_with_those_known`; `names` [N]: the patients of the Index now; `kept`: bool [N], which
    images the table does not list though their patient was known."""
    pairs = set(itertools.compress(zip(index.patients, names), index.known))
    olds, news = Counter(old for old, _ in pairs), Counter(new for _, new in pairs)
    changed = {old for old, new in pairs if olds[old] > 1 or news[new] > 1}
    own = sum(name not in table_names for name in itertools.compress(names, kept))
    parts = []
    if own:
        parts.append(f"{own} images that it does not list keep the patient of their name, header or table")
    if own < kept.sum():
        parts.append(f"{kept.sum() - own} images that it does not list are taken for patients whom it names")
    if changed:
        parts.append(f"it divides or joins the images of {len(changed)} patients otherwise")
    if parts:
        say_once(f"note: {where}: {'; '.join(parts)}")


def as_the_table_calls_them(names, patients, known):
    """The names of patients [N], where images with one id (`patients` [N], of a header, say; "" for none)
    go by one name, that of a table (where `known`): or else a person whom the table names on some images only
    would be two. An id that the table gives more than MOST_PATIENTS names says nothing."""
    called, named = {}, np.array(names, dtype=object)
    for name, patient in zip(named[known].tolist(), patients[known].tolist()):
        if patient:
            called.setdefault(patient, set()).add(name)
    ids = {patient: number for number, patient in enumerate(called) if len(called[patient]) <= MOST_PATIENTS}
    number = np.array([ids.get(patient, -1) for patient in patients.tolist()])
    for i in np.flatnonzero(~known & (number >= 0)):
        named[i] = min(called[patients[i]])
    several = np.array([number < 0 or len(called[patient]) < 2 for number, patient in zip(number, patients)])
    return twins.joined(named, np.where(several, -1, number)) if not several.all() else named.tolist()
