"""What the page needs to compute figures at any threshold: scores, truth and patients, packed into text.

The page computes with the same float64 scores as Python, so its figures are Python's at every threshold. An
interval is Wilson's of n / D images. D, the design effect of the patients at that threshold, is the variance
of the proportion by whole patients over that of n independent images, and at least 1. Where all images are
right, or all wrong, the variance says nothing, and n / D is Kish's effective number of patients: n^2 / (sum
of squares of their images).
"""

import base64

import numpy as np
from scipy.stats import norm

from common.console import printable
from common.scaling import SIDES
from report.answers.threshold import floor_verdict
from report.cells import alone
from report.rows import POINTS

MOST = 600_000  # scores in one page: 6.4 MB of text


class Store:
    """Arrays as base64 text, each kept once however many models share it."""

    def __init__(self):
        self.texts, self.scores, self._places = [], 0, {}

    def add(self, values, kind):
        """The place of an array in `texts`. kind: a NumPy type, little-endian: "<f8", "<i4" or "i1"."""
        text = base64.b64encode(np.ascontiguousarray(values, kind).tobytes()).decode()
        if text not in self._places:
            self._places[text] = len(self.texts)
            self.texts.append(text)
        return self._places[text]


def panel(entries, store):
    """What the page needs of one test set -> (JSON, a list of texts on what was left out).

    {"models": [{"name", "findings": [{"name", "absent", "unit", "floor", "marks": [[name, threshold], ...],
    "verdicts": [[threshold, verdict on test], ...], "sides": {side: [scores, truth, patients]}}]}]}, the last
    three being places in the `store`."""
    models, left_out, without = [], [], []
    for entry in entries:
        findings = []
        for finding in entry.findings:
            columns = {side: entry.column(finding, side) for side in SIDES}
            columns = {side: c for side, c in columns.items() if 0 < c.truth.sum() < len(c.truth)}
            name = printable(f"{entry.name}: {finding}")
            if "val" not in columns or not marks_of(entry, finding):
                without.append(name)
            elif store.scores + sum(len(c.truth) for c in columns.values()) > MOST:
                left_out.append(name)
            else:
                findings.append(_finding(entry, finding, columns, store))
        if findings:
            models.append({"name": printable(entry.name), "findings": findings})
    notes = []
    if without:
        notes.append(f"No threshold, so not here: {', '.join(without)}.")
    if left_out:
        notes.append(
            f"The page holds at most {MOST:,} scores, so {len(left_out)} pairs of model and finding are not "
            "here: compare.py --run RUN --html PATH shows a run alone."
        )
    return {"models": models}, notes


def _finding(entry, finding, columns, store):
    """One finding of one model, its arrays put into the store."""
    sides = {}
    for side, column in columns.items():
        store.scores += len(column.truth)
        patients = np.unique(column.patients, return_inverse=True)[1]
        sides[side] = [
            store.add(column.scores, "<f8"),
            store.add(column.truth, "i1"),
            store.add(patients, "<i4"),
        ]
    return {
        "name": printable(finding),
        "absent": printable(entry.absent(finding)),
        "unit": entry.unit,
        "floor": entry.min_recall,
        "marks": marks_of(entry, finding),
        "verdicts": verdicts_of(entry, finding),
        "sides": sides,
    }


def marks_of(entry, finding):
    """[[name, threshold], ...]: the thresholds to snap to, in the order of POINTS."""
    found, marks = entry.calibrated[finding], []
    thresholds = {
        "at_rec": found.get("threshold"),
        "at_guaranteed": found.get("guarantee", {}).get("threshold"),
        "at_in": found.get("rule_in", {}).get("threshold"),
    }
    if "threshold" in found and alone([entry]):
        thresholds["at_0.5"] = 0.5
    for point, name in POINTS.items():
        if thresholds.get(point) is not None:
            marks.append([name, float(thresholds[point])])
    return marks


def verdicts_of(entry, finding):
    """[[threshold, verdict], ...]: what In short says of the recall floor on test at these, by intervals that
    are exact and hold for all findings at once."""
    rows = [entry.row(finding, "test", point) for point in POINTS]
    return [[float(row["thr"]), floor_verdict(entry, finding, row)] for row in rows if row]


def quantiles():
    """{"one", "each"}: how many standard errors Wilson's interval spans at 95%, and at 97.5%. Two of the
    latter hold at once with 95%, by the union bound: predictive values rest on recall and specificity."""
    return {"one": float(norm.ppf(0.975)), "each": float(norm.ppf(0.9875))}
