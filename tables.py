"""Tables of findings and of patients -> Index: which images there are, what is asked of them, whose they are.

Only tables and names are read here; no image is opened.
"""

import csv
import io
import itertools
import os
import re
from functools import cache
from pathlib import Path

import numpy as np

from common import InputError, check_regular, say
from index import Index
from listing import Search
from task import is_healthy

NIH_COLUMNS = ("Image Index", "Finding Labels", "Patient ID")
NIH_FINDINGS = ("No Finding",) + tuple(
    "Atelectasis Cardiomegaly Consolidation Edema Effusion Emphysema Fibrosis Hernia Infiltration Mass "
    "Nodule Pleural_Thickening Pneumonia Pneumothorax".split()
)
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
LABELS = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1, "": -1}


def find_table(path, data_dir):
    """The path of a table: as it is, or else inside the data folder. InputError if it is in neither."""
    for place in (Path(path), Path(data_dir, path)):
        if place.exists():
            return place
    raise InputError(f"--labels {path}: there is no such file, neither here nor in {data_dir}")


def open_table(path):
    """(column names, rows) of a CSV file, read whole: UTF-8, with or without a byte order mark, else Latin-1.
    A row is a list of str, an empty list where it is blank.

    InputError if it cannot be read, is no table, or names a column twice."""
    check_regular(path)
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        say(f"note: {path} is not UTF-8; read as Latin-1")
        text = raw.decode("latin-1")
    try:
        reader = csv.reader(io.StringIO(text, newline=""))  # splitlines would also break at U+0085 and others
        head = [name.strip() for name in next(reader, [])]
        rows = [row if any(map(str.strip, row)) else [] for row in reader]
    except csv.Error as error:
        raise InputError(f"{path} is not a readable CSV file ({error})") from None
    twice = {name for name in head if name and head.count(name) > 1}
    if twice:
        raise InputError(f"{path} names the column {', '.join(sorted(twice))} twice")
    for number, row in numbered(rows):
        if len(row) > len(head) and any(row[len(head) :]) or len(row) < len(head) and len(row) < 2:
            raise InputError(f"{path}, row {number}: {len(row)} values for {len(head)} columns")
    if not any(rows):
        raise InputError(f"{path} has no rows")
    return head, rows


def numbered(rows):
    """(number, row) of those that are not blank, as a spreadsheet counts: the first under the names is 2."""
    return ((number, row) for number, row in enumerate(rows, 2) if row)


def _value(row, at):
    """The value of a row in column number `at`, without spaces around it; "" where the row is too short."""
    return row[at].strip() if at < len(row) else ""


def clean_patient(text):
    """A patient's name; a number that a spreadsheet wrote as a fraction becomes whole again: 12.0 -> 12."""
    return re.sub(r"^(\d+)\.0+$", r"\1", text.strip())


def table_findings(path, findings=()):
    """Names of the findings in a table: those asked by `findings`, else all, in the table's order (NIH: "No
    Finding" first, then alphabetically). InputError for a name that the table does not have."""
    head, rows = open_table(path)
    if is_nih(head):
        at = head.index("Finding Labels")
        seen = {name.strip() for row in rows if at < len(row) for name in row[at].split("|")} - {""}
        known = (
            NIH_FINDINGS
            if seen <= set(NIH_FINDINGS)
            else tuple(sorted(seen, key=lambda n: (not is_healthy(n), n)))
        )
    else:
        about = {plain_column(head, name) for name in ("path", "patient")}
        known = tuple(name for name in head if name and name not in about)
    if absent := [name for name in findings if name not in known]:
        raise InputError(f"--findings: {path} has no {', '.join(absent)}; it has {', '.join(known)}")
    if not known:
        raise InputError(f"{path} has no column of a finding: it needs path, patient, then one a finding")
    return tuple(findings) or known


def is_nih(head):
    """Whether these are the columns of the NIH ChestX-ray14 table."""
    return all(name in head for name in NIH_COLUMNS[:2])


def plain_column(head, name):
    """The column of this name in any case, or None."""
    return next((column for column in head if column.lower() == name), None)


def read_table(path, root, findings):
    """The Index of the images of a table that lie under `root`; says what is left out.

    NIH layout: "Image Index", "Finding Labels" joined by |, "Patient ID", images in root/images*/. Plain
    layout: path (relative to `root`), patient (may be absent or empty), and a column a finding with 1, 0, or
    -1 or nothing for unknown. InputError if the table contradicts itself or no row has an image.
    """
    head, rows = open_table(path)
    nih = is_nih(head)
    name_column = "Image Index" if nih else plain_column(head, "path")
    patient_column = "Patient ID" if nih else plain_column(head, "patient")
    if name_column is None:
        raise InputError(
            f"{path} is no table of findings: it needs the columns Image Index and Finding Labels, or path"
        )
    here, read = find_table_images(root, nih), (_nih_labels if nih else _plain_labels)(path, head, findings)
    name_at, patient_at = (head.index(c) if c in head else None for c in (name_column, patient_column))
    seen, repeated, absent, used = {}, 0, 0, set()
    files, targets, patients, known = [], [], [], []
    for number, row in numbered(rows):
        name = _value(row, name_at).replace("\\", "/").removeprefix("./")
        labels = read(row, number)
        patient = "" if patient_at is None else clean_patient(_value(row, patient_at))
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
        file = here.get(name)
        if file is None:
            absent += 1
            continue
        files.append(file)
        used.add(file)
        targets.append(labels)
        patients.append(patient or file)
        known.append(bool(patient))
    if repeated:
        say(f"note: {path}: {repeated} rows repeat an earlier row; counted once")
    if absent:
        say(f"note: {path}: {absent} of {len(seen)} images listed are not under {root}; passed over")
    unlisted = len(here) - len(used)
    if unlisted:
        say(f"note: {unlisted} images under {root} are not listed in {path}; passed over")
    if not files:
        where = f"{root}/images*/" if nih else str(root)
        raise InputError(f"none of the {len(seen)} images listed in {path} is in {where}: check --data-dir")
    targets = np.array(targets, dtype=np.int8).reshape(len(files), len(findings))
    return Index(files, targets, patients, np.array(known), np.full(len(files), "", dtype="U5"))


def find_table_images(root, nih):
    """{name in a table: path relative to `root`} of the images under `root`: of the NIH layout the bare names
    in images*/ and images*/images/, else the relative paths. InputError if a bare name occurs twice."""
    found, root = {}, Path(root)
    if not root.is_dir():
        raise InputError(f"no data: the folder {root} does not exist")
    tops = sorted(p for p in root.glob("images*") if p.is_dir()) if nih else [root]
    search = Search()
    for path in itertools.chain.from_iterable(map(search.walk, tops)):
        file = Path(path).relative_to(root).as_posix()
        key = os.path.basename(file) if nih else file
        if key in found:
            raise InputError(f"{key} is in {root} twice: {found[key]} and {file}; keep one of them")
        found[key] = file
    search.tell(root)
    return found


def _nih_labels(path, head, findings):
    """A function (row, its number) -> labels of the NIH layout, a tuple of 0 and 1."""
    at = head.index("Finding Labels")

    @cache  # few combinations, many rows
    def labels(text):
        present = {name.strip() for name in text.split("|")} - {""}
        if not present or len(present) > 1 and any(map(is_healthy, present)):
            return None
        return tuple(int(name in present) for name in findings)

    def read(row, number):
        text = _value(row, at)
        if (found := labels(text)) is None:
            what = f"{text}, which contradicts itself" if text.strip("| ") else "empty"
            raise InputError(
                f"{path}, row {number}: Finding Labels is {what}; an image without findings says No Finding "
                "alone"
            )
        return found

    return read


def _plain_labels(path, head, findings):
    """A function (row, its number) -> labels of the plain layout, a tuple of 1, 0 and -1."""
    columns = [head.index(name) for name in findings]

    def read(row, number):
        try:
            return tuple(LABELS[_value(row, at)] for at in columns)
        except KeyError:
            name, at = next((n, at) for n, at in zip(findings, columns) if _value(row, at) not in LABELS)
            raise InputError(
                f"{path}, row {number}: {name} is {_value(row, at)[:40]!r}, not 1, 0, -1 or empty. If it is "
                "no finding, name those that are with --findings A,B,C"
            ) from None

    return read


def published_lists(index, root):
    """The Index with `part` filled in from train_val_list.txt and test_list.txt under `root`, where these are
    there. InputError if only one is, or a file stands in both."""
    paths = {part: Path(root, name) for part, name in LISTS.items()}
    there = [path for path in paths.values() if path.is_file()]
    if not there:
        return index
    if len(there) == 1:
        missing = next(path for path in paths.values() if path not in there)
        raise InputError(f"{there[0]} is there, but not {missing}: the published split needs both")
    sides = {}
    for part, path in paths.items():
        check_regular(path)
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
        for name in filter(None, map(str.strip, lines)):
            if sides.setdefault(name, part) != part:
                raise InputError(f"{name} is in {paths['train']} and in {path}: it can be on one side only")
    part = np.array([sides.get(f, sides.get(os.path.basename(f), "")) for f in index.files], dtype="U5")
    if not (part == "train").any():
        raise InputError(f"none of the images is in {paths['train']}, so none can train: check --data-dir")
    if unlisted := int((part == "").sum()):
        say(f"note: {unlisted} images are in neither {LISTS['train']} nor {LISTS['test']}; passed over")
    return index._replace(part=part).take(np.flatnonzero(part != ""))


def read_patients(path, index):
    """The Index with the patients of a table `path,patient`; files it does not list keep none.

    Paths are relative to the data folder. InputError if a path has two patients, or no path is known."""
    head, rows = open_table(path)
    columns = [plain_column(head, name) for name in ("path", "patient")]
    if None in columns:
        raise InputError(f"--patients {path} needs the columns path and patient, it has {', '.join(head)}")
    columns = [head.index(name) for name in columns]
    owner = {}
    for number, row in numbered(rows):
        name, patient = (_value(row, at) for at in columns)
        name, patient = name.replace("\\", "/").removeprefix("./"), clean_patient(patient)
        if patient and owner.setdefault(name, patient) != patient:
            raise InputError(f"--patients {path}, row {number}: {name} has two patients")
    known = np.array([f in owner for f in index.files], dtype=bool)
    if not known.any():
        raise InputError(
            f"--patients {path} lists none of the images; paths are relative to the data folder, such as "
            f"{index.files[0]}"
        )
    return index._replace(patients=[owner.get(f, f) for f in index.files], known=known)
