"""predictions.csv of a run: every validation and test image with its truth, score and decision, for people
with spreadsheets. No torch.
"""

import csv

import numpy as np

from common.console import printable
from common.files import atomic_path
from common.scaling import SIDES

FIRST = ("path", "patient", "study", "age", "sex", "view", "side")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet takes text that begins so for a formula


def write_predictions(path, task, calibration, scores, p1, units=None):
    """Write a row for each image of validation, then of test; an older file is replaced.

    `task`: what was asked; `calibration`: the content of calibration.json; `scores`: the arrays of
    scores.npz; `p1`: {side: scores [N] or [N, F] that thresholds apply to}. `units`, where thresholds are
    those of studies or patients: {side: (truth [N, F], scores [N, F]) of the study of each image}.

    Columns: FIRST, then of each finding truth (1, 0, or empty where unknown), score and decision@Rec, in the
    words of predict.py, and triage where the calibration has @In. Of several findings the columns are called
    truth_WORD and so on. With `units` there are also study_truth and study_score (or patient_...), and
    study_decision@Rec and study_triage in place of the image's. What is not known is empty. Numbers have six
    digits. Text that a spreadsheet would take for a formula begins with an apostrophe."""
    unit = "" if units is None else f"{calibration['by']}_"
    thresholds = {name: found.get("threshold") for name, found in calibration["findings"].items()}
    decisions = [decision for decision in task.decisions(thresholds) if decision.point == "@Rec"]
    triage = task.triage(calibration["findings"])
    with atomic_path(path) as tmp, open(tmp, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*FIRST, *_finding_columns(task, decisions, triage, unit)])
        for side in SIDES:
            # Truth and scores come in pairs: the image's, then those of its study or patient.
            truth = task.truth(scores[f"{side}_labels"])
            pairs = [(truth, np.reshape(p1[side], truth.shape))]
            if units is not None:
                pairs.append(units[side])
            for i, cells in enumerate(zip(*_first_columns(scores, side))):
                row = list(cells)
                for k, decision in enumerate(decisions):
                    for values, probabilities in pairs:
                        row += [_truth(values[i, k]), _number(probabilities[i, k])]
                    # Decided by the scores of the study, if there are any.
                    row.append(decision.answer(probabilities[i]))
                    row += [answers.answer(probabilities[i]) for answers in triage[k : k + 1]]
                writer.writerow(row)


def _finding_columns(task, decisions, triage, unit):
    """The names of the columns of all findings, one finding after the other."""
    columns = []
    for k, (decision, word) in enumerate(zip(decisions, task.column_words)):
        end = "" if task.alone else f"_{word}"
        columns += [f"truth{end}", f"score{end}"]
        if unit:
            columns += [f"{unit}truth{end}", f"{unit}score{end}"]
        columns.append(f"{unit}{decision.column}")
        columns += [f"{unit}{answers.column}" for answers in triage[k : k + 1]]
    return columns


def _first_columns(scores, side):
    """The columns FIRST of a side: lists of text, one for each."""
    files = scores[f"{side}_files"]
    patients = scores[f"{side}_patients"]
    known = patients != files  # a patient who is not known stands under the name of the file
    columns = [files, np.where(known, patients, "")]
    for name in ("study", "age", "sex", "view"):
        columns.append(scores.get(f"{side}_cohort_{name}", np.full(len(files), "")))
    columns.append(np.full(len(files), side))
    return [[cell(value) for value in column] for column in columns]


def cell(value):
    """Text or a number as the text of a cell; NaN is empty."""
    if isinstance(value, (float, np.floating)):
        return _number(value)
    text = printable(str(value))
    if text.startswith(FORMULA):
        text = f"'{text}"
    return text


def _number(value):
    """A number with six digits; NaN is empty."""
    return "" if np.isnan(value) else f"{value:.6g}"


def _truth(value):
    """1, 0, or empty where it is not known."""
    return "" if value < 0 else str(int(value))
