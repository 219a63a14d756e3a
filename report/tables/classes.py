"""The classification report: precision, recall, F1 and support of every class, laid out as scikit-learn's
`classification_report` prints them, which computes them. No torch, no drawing.
"""

from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from sklearn.metrics import classification_report

from common.console import InputError, printable
from common.scaling import SIDES
from report.cells import unique
from report.render import Heading, Paragraph, Table
from report.rows import POINTS

FIGURES = ("precision", "recall", "f1-score", "support")
WIDTH = 126  # of two reports side by side on a terminal: that of the table above them


class Answers(NamedTuple):
    """What one rule answers on one side, beside the truth.

    title: the rule; names: the K classes or F findings; truth, decided: int [N], numbers of classes, or of
    several findings [N, F] of 0 and 1; left_out: findings without a threshold, and classes that no image is
    or is taken for; short: whether calibrate.py prints it."""

    title: str
    names: list
    truth: np.ndarray
    decided: np.ndarray
    left_out: tuple = ()
    short: bool = False


# ---------------------------------------------------------------- what was decided


def answers(task, calibration, side, truth, scores):
    """The list of Answers of a calibration on "val" or "test": `truth` [N, F] of 1, 0 and -1 (unknown) and
    `scores` [N, F] of the images, studies or patients that thresholds are for.

    A yes/no question is answered at every point that it has: the only finding, or "any disease". Of K classes
    the most probable one is an answer, too. Several findings are answered together, a row each."""
    question, others = task.findings[0], ()
    if not task.alone:
        others = task.findings[1:] if question not in task.classes else task.findings
    found = []
    for point in POINTS:
        if task.one_of_many and point == "at_0.5":  # there the most probable class decides
            continue
        if question not in others:
            found += _yes_or_no(task, calibration, side, point, question, truth, scores)
        if others:
            found += _together(task, calibration, side, point, others, truth, scores)
    if task.one_of_many:
        found[1:1] = _most_probable(task, calibration["summary"][side].get("confusion"), side, len(truth))
    return found


def _most_probable(task, confusion, side, most):
    """[Answers] of the most probable of K classes, from the counts [K, K] of a calibration, rows the truth;
    [] where there are none. InputError if they are not those of `most` images or fewer."""
    if confusion is None:
        return []
    k = len(task.classes)
    if [len(row) for row in confusion] != [k] * k or sum(map(sum, confusion)) > most:
        raise InputError(
            f"the calibration is damaged (summary.{side}.confusion is not that of {most} images and {k} "
            "classes): run calibrate.py again"
        )
    pairs = np.array(list(np.ndindex(k, k)))
    # A class that does not occur has no figures, and would count as 0 in the macro average.
    occurring, numbers = np.unique(np.repeat(pairs, np.ravel(confusion), axis=0).T, return_inverse=True)
    truth, decided = numbers.reshape(2, -1)
    names = [task.classes[i] for i in occurring]
    absent = tuple(name for name in task.classes if name not in names)
    return [Answers("most probable class", names, truth, decided, absent, short=True)]


def _row(calibration, name, side, point):
    """The figures of a finding at a point on a side; None where there are none."""
    return calibration["findings"][name].get(side, {}).get(point)


def _yes_or_no(task, calibration, side, point, name, truth, scores):
    """[Answers] of one finding at a point; [] where it has no threshold."""
    row, k = _row(calibration, name, side, point), task.findings.index(name)
    if row is None:
        return []
    known = truth[:, k] >= 0
    names = [f"no {name.removeprefix('any ')}", name]
    if task.alone and task.kind == "softmax":
        names = list(task.classes)
    title = POINTS[point] if task.alone else f"{name} {POINTS[point]}"
    # Of several findings, a terminal has room for the others alone.
    short = point in ("at_rec", "at_0.5") and (task.alone or task.one_of_many)
    return [Answers(title, names, truth[known, k], scores[known, k] >= row["thr"], short=short)]


def _together(task, calibration, side, point, names, truth, scores):
    """[Answers] of several findings at a point, of those that have a threshold there; [] if none has."""
    rows = {name: _row(calibration, name, side, point) for name in names}
    with_row = {name: row for name, row in rows.items() if row is not None}
    left_out = tuple(name for name in names if name not in with_row)
    short = point in ("at_rec", "at_0.5") and not task.one_of_many
    if len(with_row) < 2:  # a column alone would be taken for two classes
        found = []
        for name in with_row:
            found += _yes_or_no(task, calibration, side, point, name, truth, scores)
        return [one._replace(left_out=left_out, short=short) for one in found]
    columns = [task.findings.index(name) for name in with_row]
    thresholds = np.array([row["thr"] for row in with_row.values()])
    truth, decided = truth[:, columns], scores[:, columns] >= thresholds
    # No figure counts what is neither there nor found, so with both at 0 an unknown label has no part in any.
    known = truth >= 0
    seen = known.any(axis=1)
    truth, decided = np.where(known, truth, 0)[seen], np.where(known, decided, 0)[seen]
    title = f"each {'class' if task.one_of_many else 'finding'} {POINTS[point]}"
    return [Answers(title, list(with_row), truth, decided, left_out, short)]


# ---------------------------------------------------------------- as text


def as_text(one):
    """The text that scikit-learn's classification_report makes of Answers."""
    names = [printable(name) for name in one.names]
    numbers = range(len(names))
    return classification_report(
        one.truth, one.decided, labels=numbers, target_names=names, digits=4, zero_division=0
    )


def printed_text(task, calibration, truth, scores, unit):
    """What calibrate.py prints of the test images, or another `unit`, as lines: two reports side by side
    where they fit; "" where there is none."""
    shown = [one for one in answers(task, calibration, "test", truth, scores) if one.short]
    if not shown:
        return ""
    blocks = []
    for one in shown:
        lines = as_text(one).splitlines()
        blocks.append([one.title, *(line for line in lines if line.strip())])
    width = max(len(line) for line in blocks[0])
    if len(blocks) > 1 and width + 4 + max(map(len, blocks[1])) <= WIDTH:
        pairs = zip_longest(*blocks[:2], fillvalue="")
        lines = [f"{left:{width}}    {right}".rstrip() for left, right in pairs]
    else:
        lines = [line for block in blocks for line in block]
    text = [f"classification report on test ({unit}):", *lines]
    if left_out := list(dict.fromkeys(name for one in shown for name in one.left_out)):
        text.append(
            f"{len(left_out)} left out, without a threshold or figures on test: {', '.join(left_out)}"
        )
    return "\n".join(f"  {line}" for line in text)


# ---------------------------------------------------------------- in the report


def report_blocks(entries):
    """The classification report of each entry at every point, validation beside test."""
    tables = []
    for e in entries:
        sides, left_out = {}, []
        for side, word in SIDES.items():
            column = e.columns[side]
            of_side = answers(e.task, e.calibration, side, column.truth, column.scores)
            sides[side] = {one.title: rows_of(one) for one in of_side}
            if names := unique((name for one in of_side for name in one.left_out), ", "):
                left_out.append(f"on {word} {names}")
        rows = []
        for title in dict.fromkeys(title for of_side in sides.values() for title in of_side):
            rows += _beside(title, *(sides[side].get(title, {}) for side in SIDES))
        if rows:
            head, groups = ["Class", *FIGURES * 2], [("", 1), *((word, 4) for word in SIDES.values())]
            tables += [
                Paragraph(f"Every class, rule by rule, of {e.name}:"),
                Table(head, rows, groups=tuple(groups)),
            ]
            if left_out:
                why = "for want of a threshold or of figures"
                tables.append(Paragraph(f"Missing by one rule or more, {why}: {'; '.join(left_out)}."))
    if not tables:
        return []
    return [Heading(3, "Classification report"), Paragraph(report_text(entries)), *tables]


def rows_of(one):
    """{name of a row: four cells} of Answers, in scikit-learn's order."""
    report = classification_report(
        one.truth, one.decided, labels=range(len(one.names)), output_dict=True, zero_division=0
    )
    rows = {}
    for key, figures in report.items():
        # Classes are known by number here, so that none can be taken for an average.
        if key == "accuracy":
            cells = ["", "", f"{figures:.3f}", str(len(one.truth))]
        else:
            cells = [f"{figures[name]:.3f}" for name in FIGURES[:3]] + [f"{figures['support']:.0f}"]
        name = one.names[int(key)] if key.isdigit() else key
        rows[key.isdigit(), name] = cells
    return rows


def _beside(title, val, test):
    """The rows of one rule, validation beside test, dashes where a side lacks a row."""
    none = ["-"] * len(FIGURES)
    return [[f"{title}: {key[1]}", *val.get(key, none), *test.get(key, none)] for key in {**val, **test}]


def report_text(entries):
    """What the rows are, as text."""
    first = entries[0]
    text = (
        f"As scikit-learn's classification_report lays it out. Support: how many {first.unit} are of the "
        "class. Macro avg is the plain mean over the rows, weighted avg weights each by its support. A "
        "precision or recall of 0/0 counts as 0."
    )
    if first.task.one_of_many:
        text += (
            f" The most probable class is the answer of K classes; {first.findings[0]!r} and each class "
            "against all others are decided at their thresholds, so any number of classes may be called."
        )
    if first.task.kind == "sigmoid" and not first.task.alone:
        text += (
            " Only known labels count. Micro avg is of all decisions; samples avg is the mean over "
            f"{first.unit}, where one with nothing to find counts as 0."
        )
    return text
