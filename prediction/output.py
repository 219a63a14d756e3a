"""How predict.py writes its rows: order, digits, and where to."""

import contextlib
import csv
import json
import sys
from collections import Counter

import numpy as np

from common.console import InputError, say
from common.files import atomic_path
from common.task import ANSWERS, ANY_DISEASE, ANY_FINDING, Triage

DIGITS = (6, 9, 12, 17)  # significant digits of a score; 17 hold any float exactly


@contextlib.contextmanager
def opened(path):
    """(the stream that rows are written to, files that are no input): a file that appears when all is
    written, or without a path standard output."""
    if path is None:
        yield sys.stdout, ()
        return
    with atomic_path(path) as tmp:
        with open(tmp, "w", newline="", encoding="utf-8") as stream:
            yield stream, (tmp, path)


def write_rows(rows, scorer, stream, jsonl):
    """Write the rows of a Scorer, an iterable of (File, dict), as CSV or JSON lines, each as soon as it is
    known -> how many there were."""
    thresholds, count = thresholds_of_columns(scorer), 0
    writer = csv.DictWriter(stream, scorer.columns, lineterminator="\n")
    if not jsonl:
        writer.writeheader()
    for _, row in rows:
        count += 1
        row = with_six_digits(row, thresholds)
        if jsonl:
            print(json.dumps(row), file=stream)
        else:
            writer.writerow(row)
    return count


# ---------------------------------------------------------------- triage


def counting(rows, scorer, counts):
    """The same rows (File, dict); `counts`, {finding: Counter}, learns how many have which answer of the
    triage. It is empty where the thresholds have no @In."""
    columns = {}
    for decision in scorer.decisions:
        if isinstance(decision, Triage):
            columns[decision.finding] = scorer.column_of_unit(decision.column)
            counts[decision.finding] = Counter()
    for file, row in rows:
        for finding, column in columns.items():
            if row[column] is not None:
                counts[finding][row[column]] += 1
        yield file, row


def triage_text(counts):
    """How many images have which answer of the triage, as text; findings without a threshold are left
    out."""
    texts = []
    for finding, answers in counts.items():
        if answers:
            texts.append(f"{finding} " + ", ".join(f"{answers[word]} {word}" for word in ANSWERS))
    return f"triage of images (unsure: read them): {'; '.join(texts) or 'none has an answer'}"


# ---------------------------------------------------------------- digits


def thresholds_of_columns(scorer):
    """{column of a number: the thresholds that it is held against}."""
    columns = {"typicality": []}
    for finding, column in scorer.task.score_columns.items():
        columns[column] = []
        deciding = scorer.column_of_unit(column)  # by study or patient its score decides, not the image's
        decisions = [decision for decision in scorer.decisions if decision.finding == finding]
        columns[deciding] = [d.threshold for d in decisions if d.threshold is not None]
    return columns


def with_six_digits(row, thresholds):
    """A row with its numbers rounded; `thresholds`: {column: list}, of the columns to round."""
    rounded = dict(row)
    for column, limits in thresholds.items():
        if row[column] is not None:
            rounded[column] = round_score(row[column], limits)
    return rounded


def round_score(value, thresholds):
    """A float with six significant digits, and more near 1, so that its distance from 1 has four. Where these
    would lie on the other side of one of the `thresholds`, it has as many as it takes, so that score >=
    threshold is the decision in print too."""
    far = 4 - int(np.log10(1 - value)) if 0 < value < 1 else 0
    for digits in (max(DIGITS[0], min(far, DIGITS[-1])), *DIGITS[1:]):
        rounded = float(f"{value:.{digits}g}")
        if all((rounded >= at) == (value >= at) for at in thresholds):
            break
    return rounded


# ---------------------------------------------------------------- order


def sort_column(scorer, name):
    """The column that --sort asks for: `name` is "score", or one of several findings. InputError if there is
    no such finding, or if "score" does not say which."""
    task = scorer.task
    if name == "score" and (task.alone or task.findings[0] in (ANY_DISEASE, ANY_FINDING)):
        name = task.findings[0]
    if name not in task.findings:
        raise InputError(f"--sort {name}: by the score of which finding? {', '.join(task.findings)}")
    return scorer.column_of_unit(task.score_columns[name])


def most_suspicious_first(rows, scorer, column):
    """Rows (File, dict) by falling score of a column, those without one last; rows of a study or patient
    stay together."""
    say(f"sorted by {column}: rows are written when the last file is scored")
    rows = list(rows)
    scored = [row for row in rows if row[1][column] is not None]
    unit = scorer.unit
    if unit == "image":
        scored.sort(key=lambda row: -row[1][column])
    else:
        scored.sort(key=lambda row: (-row[1][column], row[1][unit]))
    return scored + [row for row in rows if row[1][column] is None]


# ---------------------------------------------------------------- thresholds by hand


def read_thresholds(texts):
    """The values of --threshold, texts X or FINDING=X -> None without any, the number X, or {finding: X}.
    InputError if one is no number, or a finding is named twice."""
    if not texts:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        return _number(texts[0])
    thresholds = {}
    for text in texts:
        name, sign, number = text.rpartition("=")
        if not sign or name in thresholds:
            raise InputError(f"--threshold {text}: give one number, or FINDING=X once for each finding")
        thresholds[name] = _number(number)
    return thresholds


def _number(text):
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--threshold {text}: {text!r} is not a number") from None
