"""NIH ChestX-ray14: findings joined by | in one column, images in images*/.

Source: Wang et al. 2017; the columns of Data_Entry_2017.csv.
"""

import re

import numpy as np

from common.console import InputError, say_once
from common.task import is_device, is_healthy
from layouts.cohort import ages, further_columns, sexes, views
from layouts.patients import NOBODY, patients_of
from layouts.rows import Layout, Rows
from layouts.sheets import open_sheet
from layouts.synonyms import same_key

NAME, LABELS, PATIENT = "Image Index", "Finding Labels", "Patient ID"
AGE, SEX, VIEW, NUMBER = "Patient Age", "Patient Gender", "View Position", "Follow-up #"
NIH_FINDINGS = ("No Finding",) + tuple(
    "Atelectasis Cardiomegaly Consolidation Edema Effusion Emphysema Fibrosis Hernia Infiltration Mass "
    "Nodule Pleural_Thickening Pneumonia Pneumothorax".split()
)
NO_NAME = ("", "0", *NOBODY)  # of a finding
JOINED = r"[,;/\\&+\t\r\n]|\s(and|plus)\s"  # in the name of a finding: it could be two


def nih_names(sheet):
    """{a text in Finding Labels: frozenset of its findings, as NIH writes those that are NIH's} of a Sheet.

    InputError naming the row where a name could be several findings: joined otherwise than by |, they would
    all be taken for absent. So would those in a second spelling."""
    path, parts, rows_of = sheet.path, {}, {}
    texts, _, positions = sheet.codes(LABELS)
    first = {text: int(sheet.numbers[at]) for text, at in zip(texts, positions)}
    for text, number in first.items():
        parts[text] = [name.strip() for name in text.split("|") if name.strip().lower() not in NO_NAME]
        for name in parts[text]:
            rows_of.setdefault(name, number)
    spelt = _spellings(path, rows_of)
    healthy = {spelt[same_key(name)]: number for name, number in rows_of.items() if is_healthy(name)}
    if len(healthy) > 1:
        words = " and elsewhere ".join(healthy)
        raise InputError(
            f"{path}, row {max(healthy.values())}: Finding Labels says {words}, which mean the same: write "
            "one of them"
        )
    if changed := [name for name in rows_of if spelt[same_key(name)] != name]:
        listed = ", ".join(f"{name} as {spelt[same_key(name)]}" for name in changed[:5])
        say_once(f"note: {path}: {len(changed)} other spellings are read, {listed}")
    return {text: frozenset(spelt[same_key(name)] for name in names) for text, names in parts.items()}


def _spellings(path, rows_of):
    """{same_key of a name: how it is written} of {name in Finding Labels: its first row} and of NIH's."""
    spelt = {same_key(name): name for name in NIH_FINDINGS}
    others = [name for name in rows_of if same_key(name) not in spelt]
    known = [*spelt, *(same_key(name) for name in others if not re.search(JOINED, name))]
    for name in others:
        where = f"{path}, row {rows_of[name]}: Finding Labels has {name[:60]!r}"
        if re.search(JOINED, name) or _is_made_of(same_key(name), known):
            raise InputError(
                f"{where}, which could be several findings: join findings by |, and give one finding a name "
                "without , ; / & + and"
            )
        if (other := spelt.setdefault(same_key(name), name)) != name:
            raise InputError(f"{where}, and elsewhere {other!r}: write them alike")
    return spelt


def _is_made_of(name, known):
    """Whether a name is two or more of the others in a row, with or without spaces and signs between."""
    words = "|".join(map(re.escape, sorted(set(known) - {name}, key=len, reverse=True)))
    return re.fullmatch(rf"(?:(?:{words})\W*){{2,}}", name) is not None


def findings(path):
    """All findings of the table: "No Finding" first, then alphabetically."""
    sheet = open_sheet(path)
    seen = {name for names in nih_names(sheet).values() for name in names}
    others = sorted(seen - set(NIH_FINDINGS))
    if not others:
        return NIH_FINDINGS
    known = tuple(sorted(seen, key=lambda name: (not is_healthy(name), name)))
    some = ", ".join(others[:10]) + (" ..." if len(others) > 10 else "")
    say_once(f"note: {path}: {len(others)} of its {len(known)} findings are not NIH's: {some}")
    return known


def labels_of(sheet, asked):
    """int8 [N, K]: which of the findings `asked` the cells of Finding Labels name. InputError for a cell that
    is empty or contradicts itself."""
    names = nih_names(sheet)
    texts, codes, first = sheet.codes(LABELS)
    table = np.zeros((len(texts), len(asked)), dtype=np.int8)
    wrong = {}
    for k, text in enumerate(texts):
        present = names[text]
        sick = [name for name in present if not is_healthy(name) and not is_device(name)]
        if not present or sick and any(map(is_healthy, present)):
            wrong[int(first[k])] = text
        table[k] = [name in present for name in asked]
    if wrong:
        at = min(wrong)
        text = wrong[at]
        what = "empty" if not text.strip("| ") else f"{text[:40]!r}, which is no finding"
        what = f"{text}, which contradicts itself" if names[text] else what
        raise InputError(
            f"{sheet.path}, row {sheet.numbers[at]}: Finding Labels is {what}; an image without findings "
            "says No Finding alone"
        )
    return table[codes]


def cohort_of_sheet(sheet, patients):
    """What a table with NIH's columns says of patients and exposures, {name: array [N]}."""
    found = {}
    if sheet.find(NUMBER):
        found["study"] = np.array(
            [f"{who}/{k}" if who else "" for who, k in zip(patients, sheet.text(NUMBER))]
        )
    if sheet.find(AGE):
        found["age"] = ages(sheet.text(AGE), sheet.path)
    if sheet.find(SEX):
        found["sex"] = sexes(sheet.text(SEX), sheet.path)
    if sheet.find(VIEW):
        found["view"] = views(sheet.text(VIEW), sheet.path)
    return found


def rows(source):
    """The Rows of a table."""
    sheet = open_sheet(source.path)
    patients = patients_of(sheet, PATIENT)
    cohort = cohort_of_sheet(sheet, patients)
    used = (NAME, LABELS, PATIENT, AGE, SEX, VIEW, NUMBER)
    cohort |= further_columns(sheet, used)
    asked = source.findings or findings(source.path)
    labels = labels_of(sheet, asked)
    return [Rows(sheet.path, sheet.text(NAME), sheet.numbers, asked, labels, patients, cohort=cohort)]


LAYOUT = Layout(
    name="nih",
    title="NIH ChestX-ray14",
    needs=(NAME, LABELS),
    findings=findings,
    rows=rows,
    beats=("plain",),
    public="nih",
    bare=True,
    keeps_unlabelled=True,
)
