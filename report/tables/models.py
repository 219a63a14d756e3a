"""The main table: a row a model, the chosen first; the same as CSV. No torch, no drawing."""

import csv
import itertools
from typing import NamedTuple

import numpy as np

from calibration.wording import EVERYBODY, FEW_HEALTHY, HEALTHY, NOBODY, calls, four_digits
from common.console import InputError, printable, say
from common.files import atomic_path
from common.proportions import reported_interval
from report.answers.standing import Candidate, recipes
from report.answers.threshold import VERDICTS, floor_verdict
from report.cells import alone, mean, size_and_time, title
from report.render import Bad, Best, Table
from report.rows import POINTS, families

FIGURES = ("acc", "precision", "recall", "specificity", "f1", "auroc")
HEADER = ("Model", "Params (M)", "Time (min)", "Acc", "Prec", "Recall", "Spec", "F1", "AUROC", "Thr")
AT_POINT = {"Acc": "acc", "Prec": "precision", "Recall": "recall", "Spec": "specificity", "F1": "f1"}
POINT_OF = {mark: key for key, mark in POINTS.items()}
MEANING = {  # of what is said of a cell (wording.calls)
    EVERYBODY: f"specificity is below {FEW_HEALTHY:g}, and recall above {1 - FEW_HEALTHY:g}",
    HEALTHY: f"specificity is below {FEW_HEALTHY:g}, and recall not above {1 - FEW_HEALTHY:g}",
    NOBODY: "no score reaches the threshold",
}
MEANS = {"auroc": "Mean AUROC", "auprc": "Mean AUPRC", "accuracy": "Accuracy", "macro_f1": "Macro F1"}


class Column(NamedTuple):
    """A column of figures. group: the heading above it; figures(entry) -> float or None; digits; best:
    whether its highest value is marked."""

    head: str
    group: str
    figures: object
    digits: int = 3
    best: bool = True

    @property
    def name(self):
        """How --sort knows it."""
        return f"{self.head} {self.group}".strip()


def columns_of(entries):
    """The columns of the main table of Entries, all of one task."""
    size = [Column("Params (M)", "", lambda e: e.results["params"] / 1e6, 2, False)]
    size.append(Column("Time (min)", "", lambda e: e.minutes, 1, False))
    if not alone(entries):
        return [*size, *means_columns(entries)]
    (finding,) = entries[0].findings

    def at(side, point, key):
        return lambda e: e.row(finding, side, point)[key]

    found = [*size, Column("AUROC val", "", at("val", "at_rec", "auroc"))]
    found.append(Column("AUROC test", "", at("test", "at_rec", "auroc")))
    found.append(Column("Thr", POINTS["at_rec"], at("test", "at_rec", "thr"), 4, False))
    for point in ("at_rec", "at_0.5"):
        found += [Column(head, POINTS[point], at("test", point, key)) for head, key in AT_POINT.items()]
    return found


def means_columns(entries):
    """Columns of figures over several findings. One that a model lacks has no column: accuracy is of classes,
    not of findings."""

    def over_findings(side, key):
        return lambda e: e.summary[side].get(key, {}).get("value")

    found = [Column("Mean AUROC val", "", over_findings("val", "auroc"))]
    for key, head in MEANS.items():
        if all(key in e.summary["test"] for e in entries):
            found.append(Column(f"{head} test", "", over_findings("test", key)))
    for verdict in VERDICTS:
        found.append(Column(verdict.capitalize(), "floors @Rec", counted(verdict), 0, False))
    return found


def counted(verdict):
    """How many findings of an Entry keep, do not refute or break their floor on test."""

    def count(entry):
        rows = [(name, entry.row(name, "test", "at_rec")) for name in entry.findings]
        return sum(floor_verdict(entry, name, row) == verdict for name, row in rows if row)

    return count


# ---------------------------------------------------------------- order


def in_order_of(views, name):
    """Views with their models in the order of a column: highest first; size, time and names ascending. One
    without the column stays as it is, and this is said. InputError where none has it."""
    if name.lower() == "model":
        return [view._replace(candidates=sorted(view.candidates, key=lambda c: c.name)) for view in views]
    known = [{column.name.lower(): column for column in columns_of(view.entries)} for view in views]
    if not any(name.lower() in columns for columns in known):
        listed = dict.fromkeys(column.name for columns in known for column in columns.values())
        raise InputError(f"--sort {name!r}: there is no such column; there are: Model, {', '.join(listed)}")
    return [sorted_by(view, columns.get(name.lower()), name) for view, columns in zip(views, known)]


def sorted_by(view, column, name):
    """A View with its models in the order of a Column; as it is, with a note, where there is no `name`."""
    if column is None:
        say(f"note: --sort {name}: {view.entries[0].set} has no such column: its usual order stays")
        return view
    sign = 1 if column.head in HEADER[1:3] else -1

    def key(candidate):
        value = value_of(candidate, column)
        return (value is None, sign * (value or 0.0))

    return view._replace(candidates=sorted(view.candidates, key=key))


def value_of(candidate, column):
    """The mean over seeds of a column; None where a seed has none."""
    return mean([column.figures(e) for e in candidate.entries])


# ---------------------------------------------------------------- the table


def models_table(candidates):
    """The main table of Candidates, all on one test set."""
    columns = columns_of([e for c in candidates for e in c.entries])
    best = [best_of(candidates, column) for column in columns]
    rows = []
    for k, c in enumerate(candidates):
        cells = [cell_of(c, column, k in marked) for column, marked in zip(columns, best)]
        rows.append([c.name, *cells])
    groups, last = [["", 1]], ""
    for column in columns:
        if column.group != last:
            groups.append([column.group, 0])
            last = column.group
        groups[-1][1] += 1
    head = ["Model", *(column.head for column in columns)]
    return Table(head, rows, groups=tuple(map(tuple, groups)))


def legend(view):
    """What the marks in the main table, and in the one of its seeds, mean, as text."""
    text, several = "", len(view.candidates) > 1
    if several:
        text = "Bold: the best of a column. "
    if not alone(view.entries):
        return f"{text}A floor is kept, not refuted or broken as under In short."
    if several:
        text += "A model with a ✗ at a threshold is not eligible there. "
    text += "✗: the 95% interval of recall lies below the floor"
    (finding,) = view.entries[0].findings
    said = {calls(e.row(finding, "test", point)) for e in view.entries for point in ("at_rec", "at_0.5")}
    meanings = [f'"{phrase}": {meaning}.' for phrase, meaning in MEANING.items() if phrase in said]
    if meanings:
        text += ", or what stands beside it"
    return " ".join([f"{text}.", *meanings])


def best_of(candidates, column):
    """The positions of the candidates with the best value of a column, as it is shown; none where there is
    only one."""
    if not column.best or len(candidates) < 2:
        return set()
    values = {}
    for k, c in enumerate(candidates):
        value = value_of(c, column)
        if value is not None and not faults(c, column):
            values[k] = f"{value:.{column.digits}f}"
    return {k for k, text in values.items() if text == max(values.values())}


def cell_of(candidate, column, is_best):
    """The text of a cell: "mean ± sd" of several seeds."""
    values = [column.figures(e) for e in candidate.entries]
    if None in values:
        return "-"
    text = f"{np.mean(values):.{column.digits}f}"
    if column.head == "Params (M)":  # of a logistic regression 0.00 would be left
        return size_and_time(*candidate.entries)[0]
    if len(values) > 1 and column.digits > 1:
        text += f" ± {np.std(values, ddof=1):.{column.digits}f}"
    said = remark(candidate, column)
    if said:
        return Bad(text), f" {said}"
    if said is not None:
        return Bad(text)
    return Best(text) if is_best else text


def faults(candidate, column):
    """What is bad about the seeds of a Candidate at the operating point of a column: [(head of the column
    that shows it, what to say there)]."""
    point, found = POINT_OF.get(column.group), []
    if point is None:
        return found
    for e in candidate.entries:
        finding = e.findings[0]
        row = e.row(finding, "test", point)
        said = calls(row)
        if said == NOBODY:
            found.append(("Recall", said))
        elif said:
            found.append(("Spec", said))
        if said != NOBODY and point == "at_rec" and floor_verdict(e, finding, row) == "broken":
            found.append(("Recall", ""))
    return found


def remark(candidate, column):
    """What a cell says of its faults; None where it has none."""
    here = [said for head, said in faults(candidate, column) if head == column.head]
    if not here:
        return None
    said = max(here, key=len)
    if len(here) < len(candidate.entries):
        said += f" ({len(here)} of {len(candidate.entries)} seeds)"
    return said.strip()


def behind_table(view):
    """The runs that have no row of their own in the main table: the seeds behind its means, and the members
    of ensembles with their mean; None where there are none."""
    columns = [c for c in columns_of(view.entries) if c.head != "Params (M)" and c.group != POINTS["at_0.5"]]
    rows = []
    for c in view.candidates:
        if len(c.entries) + len(c.again) > 1:
            rows += [row_of(c._replace(entries=[e]), columns) for e in (*c.entries, *c.again)]
    standing = {id(e) for s in view.standings for c in s.candidates for e in (*c.entries, *c.again)}
    for seeds, again in recipes([e for e in view.entries if id(e) not in standing]):
        if len(seeds) > 1:
            mean = Candidate(seeds, again, 0.0, None, "")
            rows.append(row_of(mean, columns))
        rows += [row_of(Candidate([e], [], 0.0, None, ""), columns) for e in (*seeds, *again)]
    if not rows:
        return None
    return Table(["Run", *(column.name for column in columns)], rows)


def row_of(candidate, columns):
    """A row of a table, none of its values marked as best."""
    return [candidate.name, *(cell_of(candidate, column, False) for column in columns)]


# ---------------------------------------------------------------- CSV

MORE = ("Run", "Finding", "Point", "Seed", "Recall low", "Recall high", "Spec val", "Recall val", "AUROC val")


def main_rows(entries):
    """Rows of the CSV, lists of str: the data set, then in the order of HEADER and MORE: a run, a finding and
    an operating point each, then the mean and standard deviation of runs that differ in the seed alone."""
    rows, shown = [], ("at_rec",)
    if alone(entries):  # of several findings decisions at 0.5 would fill pages
        shown = ("at_rec", "at_0.5")
    for point, finding in itertools.product(shown, entries[0].findings):
        rows += rows_at(entries, finding, point)
    return rows


def rows_at(entries, finding, point):
    """The rows of one finding at one operating point."""
    rows, mark = [], POINTS[point]
    with_row = [e for e in entries if e.row(finding, "test", point)]
    for e in with_row:
        row, val = e.row(finding, "test", point), e.row(finding, "val", point)
        figures = [f"{row[k]:.3f}" for k in FIGURES] + [four_digits(row["thr"])]
        low, high = reported_interval(row, "recall")
        more = [e.run.folder.as_posix(), finding, mark, str(e.results.get("seed", ""))]
        more += [f"{v:.4f}" for v in (low, high, val["specificity"], val["recall"], val["auroc"])]
        rows.append([e.set, f"{title(e, finding)} {mark}", *size_and_time(e), *figures, *more])
    for family in families(with_row):
        values = [[e.row(finding, "test", point)[k] for k in (*FIGURES, "thr")] for e in family]
        name = title(family[0], finding).removesuffix(family[0].name)
        name += f"{family[0].base}, mean ± sd of {len(family)} seeds {mark}"
        more = ["", finding, mark, *[""] * (len(MORE) - 3)]
        rows.append([family[0].set, name, *size_and_time(*family), *spread(values), *more])
    return rows


def spread(values):
    """Mean and standard deviation over the first axis of [seeds, figures], as texts."""
    pairs = zip(np.mean(values, axis=0), np.std(values, axis=0, ddof=1))
    return [f"{mean:.3f} ± {sd:.3f}" for mean, sd in pairs]


def write_csv(path, groups):
    """`main_rows` as CSV; `groups` are lists of Entries."""
    with atomic_path(path) as tmp, open(tmp, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Data", *HEADER, *MORE])
        for entries in groups:
            for row in main_rows(entries):
                writer.writerow([printable(cell) for cell in row])
