"""What is printed and written of likely label errors: a list of all labels, and a sheet of the first."""

import csv
import itertools
import os
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from auditing.sheet import draw_sheet
from common.console import say
from common.files import atomic_path
from records.predictions import cell

COLUMNS = ("path", "patient", "label", "probability", "likely", "likely_probability", "rank", "issue")
SHOWN, PRINTED = 12, 10
MANY = 0.1  # of the labels of a class; known sets have 0.1 to 10% in all (arXiv:2103.14749)
ADVICE = (
    "Contradicted is not wrong: look at each image before you believe it. Nothing was changed. To correct a\n"
    "label, move the image to the right class folder, or edit a copy of the table; to leave an image out,\n"
    "move it out of the folder, or delete its row. Then train again (docs/AUDIT.md)."
)


def write_list(path, subset, found):
    """A CSV with a row for every label of `found` ([(Question, Errors)]), the likely errors first. An older
    file is replaced, or kept under another name if it holds what the new one does not (see keep_older).

    COLUMNS: the file, its patient (empty where not known), the label, its out-of-fold probability, the most
    probable class and its probability, the rank from 1 on, and "yes" for a likely error. Of a table of
    findings, "finding" comes first and each has its own ranks."""
    of_table = bool(found[0][0].finding)
    first = ["finding"] if of_table else []
    rows = [[*first, *COLUMNS]]
    for question, errors in found:
        if of_table:
            first = [cell(question.finding)]
        for rank, i in enumerate(errors.order, 1):
            issue = "yes" if errors.issue[i] else "no"
            rows.append([*first, *_row(subset, question, errors, i), rank, issue])
    keep_older(path, rows)
    with atomic_path(path) as tmp, open(tmp, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def keep_older(path, rows):
    """Rename the list at `path` to the next free NAME-1.csv, NAME-2.csv, ..., and say so, if it has a column
    or a label (by finding and path) that `rows`, the new list, lacks: somebody's remarks, other findings,
    other images. A list that cannot be read is kept, too."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            older = [row for row in csv.reader(file) if row]
    except FileNotFoundError:
        return
    except (OSError, ValueError, csv.Error):
        older = [["(not readable)"]]
    columns = [name for name in older[0] if name not in rows[0]] if older else []
    lost = len(labels_in(older) - labels_in(rows))
    if not columns and not lost:
        return
    what = [f"the column{'s' * (len(columns) > 1)} {', '.join(columns)}"] if columns else []
    what += [f"{lost} label{'s that are' if lost > 1 else ' that is'} not asked about now"] if lost else []
    number = next(n for n in itertools.count(1) if not path.with_stem(f"{path.stem}-{n}").exists())
    kept = path.with_stem(f"{path.stem}-{number}")
    os.replace(path, kept)
    say(f"note: the list of before has {' and '.join(what)}: it is kept as {kept}")


def labels_in(rows):
    """The (finding, path) of each label of a list, as a set; of classes the finding is ""."""
    if not rows or "path" not in rows[0]:
        return set()
    at = rows[0].index("path")
    of = rows[0].index("finding") if "finding" in rows[0] else None
    return {("" if of is None else row[of], row[at]) for row in rows[1:] if len(row) > at}


def _row(subset, question, errors, i):
    """The cells of COLUMNS but the last two, of label i."""
    at, likely = question.positions[i], errors.likely[i]
    file, patient = subset.files[at], subset.patients[at]
    return [
        cell(file),
        cell(patient if patient != file else ""),
        cell(question.classes[errors.y[i]]),
        cell(errors.of_label[i]),
        cell(question.classes[likely]),
        cell(errors.p[i, likely]),
    ]


def first_of(found, most):
    """[(Question, Errors, rank, i)] of the likely errors to show: at most `most`, of several findings in
    turn."""
    listed = []
    for number, (question, errors) in enumerate(found):
        for rank, i in enumerate(errors.order[: int(errors.issue.sum())], 1):
            listed.append((rank, number, question, errors, i))
    listed.sort(key=lambda entry: entry[:2])
    return [(question, errors, rank, i) for rank, _, question, errors, i in listed[:most]]


def write_sheet(path, subset, found, title):
    """A PNG of the first likely errors -> True. Where there is none, an older sheet goes -> False."""
    first = first_of(found, SHOWN)
    if not first:
        path.unlink(missing_ok=True)
        return False
    texts = []
    for question, errors, rank, i in first:
        name = Path(subset.files[question.positions[i]]).name
        label, likely = question.classes[errors.y[i]], question.classes[errors.likely[i]]
        texts.append(f"{rank}. {name}\nlabel {label} ({errors.of_label[i]:.3f})\nlikely {likely}")
    positions = np.array([question.positions[i] for question, _, _, i in first])
    draw_sheet(path, subset.pixels(positions), texts, title)
    return True


def lines(subset, found):
    """What is printed of `found`: list of text."""
    told = []
    for question, errors in found:
        told.append(summary(question, errors))
    if many := [name for question, errors in found for name in often_listed(question, errors)]:
        names = ", ".join(many)
        told.append(
            f"more than a tenth is listed of {names}: these are mostly classes that the features cannot tell "
            "apart, not wrong labels"
        )
    first = first_of(found, PRINTED)
    if first:
        told.append(f"first {len(first)}, with the out-of-fold probability of the label:")
    for question, errors, rank, i in first:
        label, likely = question.classes[errors.y[i]], question.classes[errors.likely[i]]
        file = subset.files[question.positions[i]]
        told.append(f"  {rank:>4}  {errors.of_label[i]:.3f}  {label} -> {likely}?  {file}")
    return told


def summary(question, errors):
    """How many labels of a Question are likely errors, of which class, and how well its classes are told
    apart, in a line."""
    parts = []
    for k, name in enumerate(question.classes):
        mine = errors.y == k
        parts.append(f"{int(errors.issue[mine].sum())} of {int(mine.sum())} {name}")
    issues = f"{int(errors.issue.sum())} of {len(errors.y)} labels are likely errors ({', '.join(parts)})"
    about = ""
    if question.finding:
        about = f"{question.finding}: "
    return f"  {about}{issues}; AUROC out of fold {auroc(errors):.3f}"


def often_listed(question, errors):
    """The classes of a Question of whose labels more than MANY are likely errors: list of names."""
    shares = [errors.issue[errors.y == k].mean() for k in range(len(question.classes))]
    return [name for name, share in zip(question.classes, shares) if share > MANY]


def auroc(errors):
    """How well the out-of-fold probabilities tell the labels apart: of several classes, the mean AUROC of
    each against the others."""
    if errors.p.shape[1] == 2:
        return float(roc_auc_score(errors.y, errors.p[:, 1]))
    each = [roc_auc_score(errors.y == k, errors.p[:, k]) for k in range(errors.p.shape[1])]
    return float(np.mean(each))
