"""Tables of findings and of patients -> Index: which images there are, what is asked of them, whose they are.

Only tables and names are read here; no image is opened.
"""

import itertools
import os
import re
from pathlib import Path

import numpy as np

from common.console import InputError, say, say_once
from common.files import check_regular
from common.task import is_healthy
from images.find import Search
from layouts.listing import Index
from layouts.nih import NIH_FINDINGS, is_nih, nih_names, read_nih
from layouts.plain import read_plain
from layouts.sheets import Listed, column, columns, numbered, open_table, value

LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}


def read_set(table, data_dir, findings, *, published=False, pooled=False):
    """(root, Index) of the images under `data_dir` that a table lists; their published side where NIH's lists
    of files are there, unless the sides are `pooled`. InputError if the `published` split is asked for and
    there are no such lists."""
    root = Path(data_dir)
    index = read_table(table, root, findings)
    if not pooled:
        index = published_lists(index, root)
    if published and not (index.side == "test").any():
        raise InputError(f"--split published: {root} has no {' and '.join(LISTS.values())}")
    return root, index


def find_table(path, data_dir):
    """The path of a table: as it is, or else inside the data folder. InputError if it is in neither."""
    for place in (Path(path), Path(data_dir, path)):
        if place.exists():
            return place
    raise InputError(f"--labels {path}: there is no such file, neither here nor in {data_dir}")


def _patient(path, number, text):
    """`clean_patient` of a row. InputError for a decimal comma: 12,0 may be 12, or a name."""
    if re.fullmatch(r"\d+,0+", text):
        raise InputError(f"{path}, row {number}: the patient is {text!r}: a decimal comma is not read")
    return clean_patient(text)


def clean_patient(text):
    """A patient's name; a number that a spreadsheet wrote as a fraction becomes whole again: 12.0 -> 12."""
    return re.sub(r"^(\d+)\.0+$", r"\1", text.strip())


def table_findings(path, findings=()):
    """Names of the findings in a table: those asked by `findings`, else all, in the table's order (NIH: "No
    Finding" first, then alphabetically). InputError for a name that the table does not have."""
    head, rows = open_table(path)
    if is_nih(head):
        known = NIH_FINDINGS
        seen = {name for names in nih_names(path, head, rows).values() for name in names}
        if others := sorted(seen - set(NIH_FINDINGS)):
            known = tuple(sorted(seen, key=lambda n: (not is_healthy(n), n)))
            some = ", ".join(others[:10]) + (" ..." if len(others) > 10 else "")
            say_once(f"note: {path}: {len(others)} of its {len(known)} findings are not NIH's: {some}")
    else:
        about = {column(head, name) for name in ("path", "patient")}
        known = tuple(name for name in head if name and name not in about)
    if absent := [name for name in findings if name not in known]:
        raise InputError(f"--findings: {path} has no {', '.join(absent)}; it has {', '.join(known)}")
    if not known:
        raise InputError(f"{path} has no column of a finding: it needs path, patient, then one a finding")
    return tuple(findings) or known


def read_table(path, root, findings):
    """The Index of the images of a table that lie under `root`; says what is left out.

    NIH layout: "Image Index", "Finding Labels" joined by |, "Patient ID", images in root/images*/. Plain
    layout: path (relative to `root`), patient (may be absent or empty), and a column a finding with 1, 0, or
    -1 or nothing for unknown. Names of images are understood as sheets.Listed does. InputError if the table
    contradicts itself or no row has an image.
    """
    head, rows = open_table(path)
    nih = is_nih(head)
    name_column, patient_column = column(head, "path"), column(head, "patient")
    if nih:
        name_column, patient_column = column(head, "Image Index"), column(head, "Patient ID")
    if name_column is None:
        raise InputError(
            f"{path} is no table of findings: it needs the columns Image Index and Finding Labels, or path; "
            f"{columns(head)}. Columns are separated by commas, semicolons or tabs"
        )
    here = find_table_images(root, nih, used=(path, *(Path(root, name) for name in LISTS.values())))
    read = read_nih(path, head, rows, findings) if nih else read_plain(path, head, findings)
    name_at, patient_at = (head.index(c) if c in head else None for c in (name_column, patient_column))
    listed = Listed(path, root, here)
    seen, repeated, absent, used = {}, 0, 0, set()
    files, targets, patients, known = [], [], [], []
    for number, row in numbered(rows):
        name = listed.clean(value(row, name_at))
        labels = read(row, number)
        patient = "" if patient_at is None else _patient(path, number, value(row, patient_at))
        if name in seen:
            first, *before = seen[name]
            if before != [labels, patient]:
                raise InputError(
                    f"{path}: {name} stands in row {first} and in row {number} with different findings or "
                    "patients: keep one of them"
                )
            repeated += 1
            continue
        seen[name] = number, labels, patient
        file = listed.find(name, number)
        if file is None:
            absent += 1
            continue
        files.append(file)
        used.add(file)
        targets.append(labels)
        patients.append(patient or file)
        known.append(bool(patient))
    listed.say_guessed()
    _say_left_out(path, root, repeated, f"{absent} of {len(seen)}" if absent else "", len(here) - len(used))
    if not files:
        where = f"{root}/images*/" if nih else str(root)
        there = min(here.values(), default="no image")
        raise InputError(
            f"none of the {len(seen)} images listed in {path} is in {where}: check --data-dir. It lists "
            f"{next(iter(seen))}; there is {there}; {columns(head)}"
        )
    targets = np.array(targets, dtype=np.int8).reshape(len(files), len(findings))
    return Index(files, targets, patients, np.array(known), np.full(len(files), "", dtype="U5"))


def _say_left_out(path, root, repeated, absent, unlisted):
    """Notes on the rows and images that a table's Index leaves out: numbers; `absent`: "3 of 10", or ""."""
    if repeated:
        say(f"note: {path}: {repeated} rows repeat an earlier row; counted once")
    if absent:
        say(f"note: {path}: {absent} images listed are not under {root}; passed over")
    if unlisted:
        say(f"note: {unlisted} images under {root} are not listed in {path}; passed over")


def find_table_images(root, nih, used=()):
    """{name in a table: path relative to `root`} of the images under `root`: of the NIH layout the bare names
    in images*/ and images*/images/, else the relative paths. `used`: files there that are read as tables.
    InputError if a bare name occurs twice."""
    found, root = {}, Path(root)
    if not root.is_dir():
        raise InputError(f"no data: the folder {root} does not exist")
    tops = sorted(p for p in root.glob("images*") if p.is_dir()) if nih else [root]
    search = Search(used)
    for path in itertools.chain.from_iterable(map(search.walk, tops)):
        file = Path(path).relative_to(root).as_posix()
        key = os.path.basename(file) if nih else file
        if key in found:
            raise InputError(f"{key} is in {root} twice: {found[key]} and {file}; keep one of them")
        found[key] = file
    search.tell(root)
    return found


def published_lists(index, root):
    """The Index with `side` filled in from train_val_list.txt and test_list.txt under `root`, where these are
    there. InputError if only one is, or a file stands in both."""
    paths = {side: Path(root, name) for side, name in LISTS.items()}
    there = [path for path in paths.values() if path.is_file()]
    if not there:
        return index
    if len(there) == 1:
        missing = next(path for path in paths.values() if path not in there)
        raise InputError(f"{there[0]} is there, but not {missing}: the published split needs both")
    side_of = {}  # {name in a list: its side}
    for side, path in paths.items():
        check_regular(path)
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
        for name in filter(None, map(str.strip, lines)):
            if side_of.setdefault(name, side) != side:
                raise InputError(f"{name} is in {paths['train']} and in {path}: it can be on one side only")
    sides = []
    for file in index.files:
        bare = side_of.get(os.path.basename(file), "")  # NIH's lists hold names without folders
        sides.append(side_of.get(file, bare))
    sides = np.array(sides, dtype="U5")
    if not (sides == "train").any():
        raise InputError(f"none of the images is in {paths['train']}, so none can train: check --data-dir")
    if unlisted := int((sides == "").sum()):
        say(f"note: {unlisted} images are in neither {LISTS['train']} nor {LISTS['test']}; passed over")
    return index._replace(side=sides).take(np.flatnonzero(sides != ""))


def read_patients(path, index, root=""):
    """The Index with the patients of a table `path,patient`; files it does not list keep none.

    Paths are relative to the data folder `root`, or understood as sheets.Listed does. InputError if a path
    has two patients, or no path is known."""
    head, rows = open_table(path)
    found = [column(head, name) for name in ("path", "patient")]
    if None in found:
        raise InputError(f"--patients {path} needs the columns path and patient, {columns(head)}")
    name_at, patient_at = map(head.index, found)
    listed = Listed(path, root, {file: file for file in index.files})
    owner, said, absent = {}, {}, 0
    for number, row in numbered(rows):
        name = listed.clean(value(row, name_at))
        patient = _patient(path, number, value(row, patient_at))
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
        first = listed.clean(value(next(filter(None, rows)), name_at))
        raise InputError(
            f"--patients {path} lists none of the images; paths are relative to the data folder, such as "
            f"{index.files[0]}; it lists {first}; {columns(head)}"
        )
    if absent:
        say_once(f"note: --patients {path}: {absent} rows name no image that is used here; passed over")
    return index._replace(patients=[owner.get(f, f) for f in index.files], known=known)
