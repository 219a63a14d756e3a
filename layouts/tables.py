"""Tables of findings -> Index: which images there are, what is asked of them, whose they are.

A layout (LAYOUTS; a file each) turns its tables into Rows. What all have in common is written here: finding
the images, rows that are repeated, what blank labels mean, which views are used, and a count of whatever is
left out. Only tables and names are read; no image is opened.
"""

import itertools
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.console import InputError, say, say_once
from common.files import check_regular
from common.task import is_healthy
from images.find import Search
from layouts import chexpert, google_nih, medmnist, mimic, nih, padchest, plain, rsna, vindr
from layouts.choices import BLANK, OLDER, Choices, select
from layouts.listing import Index, Reading, joined
from layouts.lookup import Listed
from layouts.rows import BLANK as EMPTY
from layouts.rows import UNCERTAIN, UNUSABLE, Source, infer_healthy, refuse_contradiction
from layouts.sheets import columns, head_of, open_sheet

LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
ROOMS = (chexpert, mimic, rsna, vindr, padchest, medmnist, google_nih, nih, plain)
LAYOUTS = {room.LAYOUT.name: room.LAYOUT for room in ROOMS}
ENDINGS = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".npz")


# ---------------------------------------------------------------- which table, which layout


def find_table(path, data_dir, layout="", flag="--labels", stored=False):
    """The path of a table: as it is, or else inside the data folder; of a folder, the one table in it that
    has a known layout. A path that is absolute, or begins with ./ or ../, is taken as it is. InputError,
    naming the flag, if there is none, or several could be meant; of a setting that a run may have `stored`
    the one that is here is read, and a note says so."""
    here, places = Path(path), [Path(path), Path(data_dir, path)]
    if here.is_absolute() or str(path).replace(os.sep, "/").startswith(("./", "../")):
        places = [here]
    found, empty = [], []
    for place in places:
        table = _table_in(place, layout) if place.is_dir() else place
        if table is None:
            empty.append(place)
        elif table.exists():
            found.append(table)
    two = len(found) == 2 and not os.path.samefile(*found)
    if two and stored:
        say_once(f"note: {flag}: of two tables, {found[0]} is read and not {found[1]}")
    elif two:
        raise InputError(
            f"{flag} {path}: there are two such tables, {found[0]} and {found[1]}: write ./{here} or "
            f"{places[1]} for the one that is meant"
        )
    if found:
        return found[0]
    if empty:
        there = sorted(file.name for file in empty[-1].iterdir() if file.name.lower().endswith(ENDINGS))
        holds = ", ".join(there[:8]) or "no table"
        raise InputError(f"{flag} {path}: it holds no table of a known layout; it holds {holds}")
    where = f", neither here nor in {data_dir}" if len(places) == 2 else ""
    raise InputError(f"{flag} {path}: there is no such file{where}")


def _table_in(folder, layout):
    """The main table in a folder, of the layout of that name, if there is one; None if it holds none.
    InputError if several could be meant."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name.lower().endswith(ENDINGS))
    tables = {}  # {layout: its tables}
    for file in files:
        fitting = [one for one in _fitting(_head(file)) if layout in ("", one.name)]
        for one in fitting:
            tables.setdefault(one.name, []).append(file)
    if len(tables) > 1:
        tables.pop("plain", None)  # many tables beside those of labels have a column path
    if len(tables) > 1:
        listed = "; ".join(f"{', '.join(p.name for p in files)}: {name}" for name, files in tables.items())
        raise InputError(
            f"--labels {folder}: it holds tables of several layouts ({listed}): name the table, or the "
            "layout with --layout"
        )
    if not tables:
        return None
    ((name, there),) = tables.items()
    for part in LAYOUTS[name].main:
        there = [file for file in there if part in file.name.lower()] or there
    if len(there) > 1:
        listed = ", ".join(file.name for file in there[:5])
        raise InputError(f"--labels {folder}: it holds several tables ({listed}): name the one of the labels")
    return there[0]


def _head(path):
    """The column names of a table, or the names of the arrays of an .npz."""
    if str(path).lower().endswith(".npz"):
        return medmnist.names_in(path)
    return head_of(path)


def _fitting(head):
    """The layouts whose columns a table has, without those that another of them beats."""
    fits = [layout for layout in LAYOUTS.values() if not layout.lacks(head)]
    beaten = {name for layout in fits for name in layout.beats}
    return [layout for layout in fits if layout.name not in beaten]


def find_layout(path, name=""):
    """The Layout of a table: the one of this name, else the one whose columns it has. InputError if none or
    several have, or if the one that is named lacks some; `name` OLDER: NIH's or plain."""
    if name and name != OLDER and name not in LAYOUTS:
        raise InputError(f"--layout {name[:40]}: there is no such layout; there are {', '.join(LAYOUTS)}")
    if not str(path).lower().endswith(".npz"):
        head = open_sheet(path).head
    else:
        head = medmnist.names_in(path)
    if name == OLDER:
        return LAYOUTS["plain"] if LAYOUTS["nih"].lacks(head) else LAYOUTS["nih"]
    if name:
        if missing := LAYOUTS[name].lacks(head):
            raise InputError(f"--layout {name}: {path} lacks {', '.join(missing)}; {columns(head)}")
        return LAYOUTS[name]
    fits = _fitting(head)
    if len(fits) > 1:
        named = " or ".join(layout.name for layout in fits)
        raise InputError(f"{path} has the columns of several layouts: say which with --layout {named}")
    if not fits:
        raise InputError(_unknown(path, head))
    return fits[0]


def _unknown(path, head):
    """The message on a table of no known layout: what is there, the nearest layout, what it lacks."""
    text = (
        f"{path} is no table of findings: it needs the columns {nih.NAME} and {nih.LABELS}, or path; "
        f"{columns(head)}. Columns are separated by commas, semicolons or tabs"
    )
    share = {name: 1 - len(layout.lacks(head)) / len(layout.needs) for name, layout in LAYOUTS.items()}
    nearest = max(share, key=share.get)
    if share[nearest] > 0:
        text += f". The nearest layout is {nearest}: it lacks {', '.join(LAYOUTS[nearest].lacks(head))}"
    return text


def table_findings(path, findings=(), layout=""):
    """Names of the findings in a table: those asked by `findings`, else all, in the layout's order.
    InputError for a name that the table does not have."""
    found = find_layout(path, layout)
    if not findings and found.usual:
        known = found.usual(path)
    else:
        known = found.findings(path)
    if not known:
        raise InputError(f"{path} names no finding at all: it has nothing that could be learnt or measured")
    if absent := [name for name in findings if name not in known]:
        raise InputError(f"--findings: {path} has no {', '.join(absent)}; it has {', '.join(known)}")
    return tuple(findings) or known


# ---------------------------------------------------------------- a data set


def read_set(table, data_dir, findings, choices=None, *, published=False, pooled=False):
    """(root, Reading) of the images under `data_dir` that a table lists, before any is left out for its view
    or labels; their published side where the layout, or NIH's lists of files, tell it, unless the sides are
    `pooled`. A published validation part is part of training unless the `published` split is asked for.
    InputError if that is asked for and nothing is published."""
    root = Path(data_dir)
    reading = read(table, root, findings, choices, published=published)
    index, flow = reading.index, reading.flow
    if not pooled:
        index = published_lists(index, root)
    if len(index.files) < len(reading.index.files):
        flow = [*flow, ["published", len(index.files)]]
    if not published:
        index = index._replace(side=np.where(index.side == "val", "train", index.side))
    elif not np.isin(index.side, ("val", "test")).any():
        lists = " and ".join(LISTS.values())
        raise InputError(f"--split published: {root} has no {lists}, and the table publishes no parts either")
    return root, replace(reading, index=index, flow=flow)


def read_table(path, root, findings, choices=None):
    """The Index of the images of a table that lie under `root` and are used; says what is left out.

    Names of images are understood as lookup.Listed does. InputError if the table contradicts itself or no
    row has an image."""
    choices = choices or Choices()
    return select(read(path, root, findings, choices), choices)[0]


def read(path, root, findings, choices=None, *, published=False):
    """The Reading of all images of a table that lie under `root`."""
    choices = choices or Choices()
    layout = find_layout(path, choices.layout)
    source = Source(Path(path), Path(root), tuple(findings), choices.readers, published)
    parts = [_with_names(rows) for rows in layout.rows(source)]
    files = _images(layout, source, parts)
    listed = Listed(path, root, files, layout.by_id)
    indices, counts = [], np.zeros(2, dtype=int)
    for rows in parts:
        index, numbers = _index_of(rows, listed, layout, choices, findings)
        indices.append(index)
        counts += numbers
    listed.say_guessed()
    index = joined(indices)
    if twice := [file for file, count in Counter(index.files).items() if count > 1]:
        raise InputError(f"{twice[0]} is in two of the tables: it can be on one side only")
    total, found = counts.tolist()
    if found < total:
        say(f"note: {path}: {total - found} of {total} images listed are not under {root}; passed over")
    if len(files) > found:
        say(f"note: {len(files) - found} images under {root} are not listed in {path}; passed over")
    if not found:
        where = f"{root}/images*/" if layout.bare else str(root)
        there = min(files.values(), default="no image")
        example = next((listed.clean(rows.names[0]) for rows in parts if rows.names), "no image")
        raise InputError(
            f"none of the {total} images listed in {path} is in {where}: check --data-dir. It lists {example}"
            f"; there is {there}; {_columns_there(path)}"
        )
    return Reading(index, [["listed", total], ["found", found]], layout.keeps_unlabelled)


def _with_names(rows):
    """The Rows that name an image; a note counts the others."""
    named = np.flatnonzero([bool(name) for name in rows.names])
    if len(named) == len(rows.names):
        return rows
    say(f"note: {rows.path}: {len(rows.names) - len(named)} rows name no image; passed over")
    return rows.take(named)


def _lies_in(root, name):
    """Whether there is a file of this name below a folder; a name that leads out of it is none."""
    if name.startswith(("/", "\\")) or ".." in name:
        return False
    return os.path.isfile(f"{root}/{name}")


def _columns_there(path):
    """What columns a table has, as text."""
    return columns(_head(path)) if str(path).lower().endswith(".npz") else columns(open_sheet(path).head)


def _images(layout, source, parts):
    """{name in a table: path relative to the root} of the images that are there; `parts`: its Rows."""
    if layout.images:
        return layout.images(source)
    if layout.placed:
        names, folder = itertools.chain.from_iterable(part.names for part in parts), os.fspath(source.root)
        there = {name: name for name in names if _lies_in(folder, name)}
        if there:  # the set lies as it was published: to search all its folders would take minutes
            return there
    used = (source.path, *(part.path for part in parts), *(source.root / name for name in LISTS.values()))
    return find_table_images(source.root, layout.bare, used=used)


def _index_of(rows, listed, layout, choices, findings):
    """(the Index of the images of Rows that are there, [images listed, images found])."""
    for reason, count in rows.left_out.items():
        say_once(f"note: {rows.path}: {count} {reason}; left out")
    if layout.infers or layout is rsna.LAYOUT:  # the others look themselves
        refuse_contradiction(rows)
    if layout.infers:
        infer_healthy(rows)
    names, kept = _once(rows, [listed.clean(name) for name in rows.names])
    files, positions = [], []
    for name, i in zip(names, kept):
        file = listed.find(name, rows.numbers[i])
        if file is not None:
            files.append(file)
            positions.append(i)
    rows = rows.take(np.array(positions, dtype=np.int64))
    asked = [rows.findings.index(name) for name in findings]
    labels = rows.labels[:, asked]
    uncertain, blank = labels == UNCERTAIN, labels == EMPTY
    targets = np.where(
        blank, BLANK[layout.blank if choices.blank == "auto" else choices.blank], labels
    ).astype(np.int8)
    if layout.infers:
        _leave_health_open(targets, labels, findings, rows.path)
    known = np.array([bool(patient) for patient in rows.patients], dtype=bool)
    patients = [patient or file for patient, file in zip(rows.patients, files)]
    side = np.full(len(files), "", dtype="U5") if rows.side is None else rows.side.astype("U5")
    targets[labels == UNUSABLE] = -1
    targets = targets.reshape(len(files), len(findings))
    index = Index(files, targets, patients, known, side, None, uncertain, rows.cohort or None, blank)
    return index, [len(kept), len(files)]


def _leave_health_open(targets, labels, findings, path):
    """Whether an image is healthy is unknown, in place in `targets` [N, K], where the table says neither that
    nor a disease: a blank is a finding that a report does not mention, and no report mentions health."""
    for k, name in enumerate(findings):
        if is_healthy(name):
            unsaid = labels[:, k] == EMPTY
            targets[unsaid, k] = -1
            if unsaid.any():
                say_once(
                    f"note: {path}: {int(unsaid.sum())} images are neither {name} nor surely of any disease: "
                    "whether they are healthy is unknown"
                )


def _once(rows, names):
    """(the different `names`, the position of the first row of each). A note counts rows that repeat an
    earlier one; InputError if a second one says something else."""
    first, repeated, other = {}, 0, Counter()
    for i, name in enumerate(names):
        j = first.setdefault(name, i)
        if i == j:
            continue
        if rows.patients[i] != rows.patients[j] or (rows.labels[i] != rows.labels[j]).any():
            raise InputError(
                f"{rows.path}: {name} stands in row {rows.numbers[j]} and in row "
                f"{rows.numbers[i]} with different findings or patients: keep one of them"
            )
        repeated += 1
        other.update(column for column, values in rows.cohort.items() if _says_other(values[i], values[j]))
    if repeated:
        listed = ", ".join(f"{count} say another {column}" for column, count in other.items())
        counts = f"; of them {listed}: the first row counts" if other else ""
        say(f"note: {rows.path}: {repeated} rows repeat an earlier row; counted once{counts}")
    return list(first), list(first.values())


def _says_other(value, first):
    """Whether a value of a cohort is known (no empty text, no NaN) and not what the `first` row says."""
    return value != "" and value == value and value != first


# ---------------------------------------------------------------- images and lists


def find_table_images(root, bare, used=()):
    """{name in a table: path relative to `root`} of the images under `root`: with `bare` the names alone, in
    images*/ and images*/images/, else the relative paths. `used`: files there that are read as tables.
    InputError if a bare name occurs twice."""
    found, root = {}, Path(root)
    if not root.is_dir():
        raise InputError(f"no data: the folder {root} does not exist")
    tops = sorted(p for p in root.glob("images*") if p.is_dir()) if bare else [root]
    search, start = Search(used), len(os.path.join(os.fspath(root), ""))
    for path in itertools.chain.from_iterable(map(search.walk, tops)):
        file = os.fspath(path)[start:].replace(os.sep, "/")
        if os.fspath(root) == ".":
            file = Path(path).relative_to(root).as_posix()
        key = os.path.basename(file) if bare else file
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
