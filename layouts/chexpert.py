"""CheXpert: patient and study stand in the path, labels are 1, 0, -1 (uncertain) or blank (not mentioned).

Source: Irvin et al. 2019; train.csv and valid.csv of CheXpert-v1.0 and -small. Blank counts as negative
unless --blank says otherwise: the labeller leaves a finding blank that the report does not mention, and a
radiologist mentions what is there. Nothing is published for testing.
"""

import re
from pathlib import Path

import numpy as np

from common.console import say_once
from layouts.cohort import ages, further_columns, sexes, views
from layouts.rows import Layout, Rows, columns_of
from layouts.sheets import open_sheet

FINDINGS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other"),
    *("Fracture", "Support Devices"),
)
ABOUT = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA")
PREFIX = re.compile(r"^CheXpert-v1\.0[^/]*/")
PLACE = re.compile(r"(patient\d+)/(study\d+)/")


def findings(path):
    """Those of FINDINGS that are columns, in any case, in the table's order."""
    known = {name.lower(): name for name in FINDINGS}
    return tuple(known[name.lower()] for name in open_sheet(path).head if name.lower() in known)


def rows(source):
    """The Rows of the table; with the published split those of valid.csv beside it, too."""
    first = _rows_of(source.path, source.root)
    beside = _valid_beside(source.path)
    if beside is None:
        return [first]
    if not source.published:
        say_once(f"note: {beside} is read with --split published only, as validation; test is cut by patient")
        return [first]
    first.side = np.full(len(first.names), "train", dtype="U5")
    second = _rows_of(beside, source.root)
    second.side = np.full(len(second.names), "val", dtype="U5")
    return [first, second]


def _valid_beside(path):
    """The path of the published validation's table beside that of training, or None."""
    name = Path(path).name
    beside = Path(path).with_name(name.replace("train", "valid"))
    return beside if "train" in name and beside.is_file() else None


def _rows_of(path, root):
    """The Rows of one table."""
    sheet = open_sheet(path)
    names, patients, studies, stays = [], [], [], {}
    for name in sheet.text("Path"):
        name = name.replace("\\", "/")
        prefix = PREFIX.match(name)
        if prefix:
            if prefix[0] not in stays:  # only where that folder lies in the data folder
                stays[prefix[0]] = (root / prefix[0]).is_dir()
            if not stays[prefix[0]]:
                name = name[prefix.end() :]
        place = PLACE.search(name)
        names.append(name)
        patients.append(place[1] if place else "")
        studies.append(f"{place[1]}/{place[2]}" if place else "")
    seen_from = []
    for frontal, position in zip(sheet.text("Frontal/Lateral"), sheet.text("AP/PA")):
        seen_from.append(position if frontal.lower() == "frontal" else frontal)
    known = findings(path)
    cohort = {
        "study": np.array(studies, dtype=str),
        "age": ages(sheet.text("Age"), path),
        "sex": sexes(sheet.text("Sex"), path),
        "view": views(seen_from, sheet.path),
    }
    cohort |= further_columns(sheet, (*ABOUT, *known))
    return Rows(path, names, sheet.numbers, known, columns_of(sheet, known), patients, cohort=cohort)


LAYOUT = Layout(
    name="chexpert",
    title="CheXpert",
    needs=(*ABOUT, "No Finding"),
    findings=findings,
    rows=rows,
    beats=("plain",),
    blank="negative",
    placed=True,
    public="chexpert",
    main=("train",),
    infers=True,
)
