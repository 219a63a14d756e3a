"""The log of scores and diagnoses that monitor.py reads: one image a patient, in order. No torch."""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np

from calibration.pooling import columns_of
from common.console import InputError, say
from layouts.listing import patient_in_folder
from layouts.patients import patients_of
from layouts.sheets import open_sheet


class Log(NamedTuple):
    """One image a patient, in order. sick, called: bool [N]; scores: float [N]."""

    sick: np.ndarray
    called: np.ndarray
    scores: np.ndarray
    images: int  # that were looked at
    left_out: int  # further images of patients
    unnamed: int  # images that count as a patient each, because nothing tells whose they are
    waiting: int  # rows without a diagnosis
    unscored: int  # rows of files that predict.py could not read
    score: str  # the column that the scores are from
    named: bool  # whether there is a column patient


class Row(NamedTuple):
    """A row of the log, checked. score: None where predict.py could not read the file; sick: None where there
    is no diagnosis yet; patient: "" where nothing tells."""

    path: str
    score: float | None
    sick: bool | None
    patient: str
    time: str
    study: str  # of its patient; "" where one patient's rows are one, or nothing tells


def truths(task, finding):
    """What a diagnosis may say -> (words for the absence of a finding, for its presence), in lower case."""
    absent, present = [f"no {finding}", "0", "0.0"], [finding, "1", "1.0"]
    if task.kind == "softmax" and finding in task.classes:
        absent += [name for name in task.classes if name != finding]
    elif task.kind == "softmax":  # any disease
        absent.append(task.classes[0])
        present += task.classes[1:]
    return tuple([word.lower() for word in words] for words in (absent, present))


def threshold_columns(task, finding, mark, unit="image"):
    """How predict.py calls the columns of a finding's threshold at the point `mark` (None where it writes
    none), and of one by hand; `unit`: as for read_log."""
    word = "" if task.alone else task.score_columns[finding].removeprefix("p")
    columns = [f"threshold{point}{word}" for point in (mark, "@hand") if point]
    return columns if unit == "image" else columns_of(unit, columns)


def check_row(cell, score, words, where, unit="image"):
    """{column: text} -> Row; `score`: the column of the scores; `unit`: as for read_log; the patient is clean
    already. InputError for a value that is wrong."""
    try:
        value = float(cell[score])
    except ValueError:
        value = float("nan")
    if not cell[score] and score != "score":  # predict.py leaves the score of an unreadable file empty
        value = None
    elif not 0 <= value <= 1:
        raise InputError(f"{where}: {score} {cell[score][:40]!r} is no probability from 0 to 1")
    if not cell["path"]:
        raise InputError(f"{where}: path is empty: each image is to have one row")
    diagnosis, (absent, present) = cell["diagnosis"].lower(), words
    if diagnosis and diagnosis not in (*absent, *present):
        known = ", ".join((*absent, *present))
        raise InputError(f"{where}: diagnosis {cell['diagnosis'][:40]!r} is not one of {known}")
    sick = diagnosis in present if diagnosis else None
    # Without a column patient the file name may tell, as in training.
    patient = cell["patient"]
    who = patient_in_folder(cell["path"])
    if not patient and who != cell["path"]:
        patient = who
    study = cell.get("study", "") if unit == "study" else ""
    return Row(cell["path"], value, sick, patient, cell.get("time", ""), study)


def check_columns(path, head, score):
    """InputError if a log with these columns lacks one; `score`: the column of scores."""
    missing = [name for name in ("path", score, "diagnosis") if name not in head]
    if not missing:
        return
    if score in missing and score != "score":
        missing[missing.index(score)] = f"{score} (nor score)"
    raise InputError(f"{path} has no column {' and '.join(missing)}; it has {', '.join(head)}")


def read_log(path, threshold, words, column="score", unit="image"):
    """LOG.csv -> Log; `words`: see `truths`; `column`: how predict.py calls the scores, used where no column
    is called score; `unit`: what has one score, an image, a study or a patient. A study or patient is sick if
    any of its rows says so, and counts at its first.

    InputError naming the row for anything wrong: no such column, a score that is no probability, an unknown
    diagnosis, an image or a time out of order that comes twice."""
    sheet = open_sheet(path)
    usual = ("path", "score", column, "diagnosis", "patient", "study", "time")
    in_any_case = {sheet.find(name): name for name in usual}
    head = [in_any_case.get(name, name) for name in sheet.head]
    score = "score" if "score" in head else column
    check_columns(path, head, score)
    images, patients, last = set(), set(), ""
    places, sick, scores = {}, [], []
    counts = dict.fromkeys(("images", "left_out", "unnamed", "waiting", "unscored"), 0)
    named = patients_of(sheet, "patient")
    for number, patient, *values in zip(sheet.numbers, named, *map(sheet.text, sheet.head)):
        where = f"{path}, row {number}"
        row = check_row(dict(zip(head, values)) | {"patient": patient}, score, words, where, unit)
        # The sequential test counts patients in the order of their diagnoses, each image once.
        if row.path in images:
            raise InputError(f"{where}: {row.path} is there twice: each image is to have one row")
        if row.time and row.time < last:  # what waits for a diagnosis need not have one
            raise InputError(
                f"{where}: time {row.time[:40]} is before that of an earlier row: sort the rows by time"
            )
        images.add(row.path)
        last = row.time or last
        if row.score is None:
            counts["unscored"] += 1
            continue
        if row.sick is None:
            counts["waiting"] += 1
            continue
        counts["images"] += 1
        counts["unnamed"] += not row.patient
        # Images of one patient are no independent draws, so the first one counts.
        patient = row.patient or row.path
        if patient in patients:
            counts["left_out"] += 1
            if (patient, row.study) in places and unit != "image":
                sick[places[patient, row.study]] |= row.sick
            continue
        patients.add(patient)
        places[patient, row.study] = len(sick)
        sick.append(row.sick)
        scores.append(row.score)
    scores = np.array(scores, float)
    return Log(
        np.array(sick, bool), scores >= threshold, scores, **counts, score=score, named="patient" in head
    )


def say_counts(path, log):
    """Notes on rows that do not count, and on images that count as patients."""
    if log.unscored:
        say(f"note: passed over, without a score (unreadable files?): {log.unscored} rows of {path}")
    if log.waiting:
        say(f"note: passed over, without a diagnosis yet: {log.waiting} rows of {path}")
    if log.unnamed:
        why = "the column patient is empty there" if log.named else f"{path} has no column patient"
        say(
            f"note: {log.unnamed} of {log.images} images count as a patient each: {why}, and their names "
            "tell no patient. If some are of the same patient, name it in a column patient"
        )


def say_other_thresholds(path, columns, watched):
    """A note on the rows of a log that were decided at another threshold than the `watched` one, as one of
    the `columns` of thresholds says. InputError for one that is no number."""
    sheet, found = open_sheet(path), Counter()
    for name in columns:
        for number, text in zip(sheet.numbers, sheet.text(name)):
            if not text:  # a file that could not be read, or a row of another column
                continue
            try:
                found[float(text)] += 1
            except ValueError:
                raise InputError(f"{path}, row {number}: {name} {text[:40]!r} is no number") from None
    others = [at for at in found if not math.isclose(at, watched, rel_tol=1e-9)]
    if others:
        count = sum(found[at] for at in others)
        listed = ", ".join(f"{at:.6g}" for at in others[:3]) + ", ..." * (len(others) > 3)
        say(
            f"note: {count} of {found.total()} rows were decided at another threshold ({listed}): what is "
            f"watched is {watched:.6g}"
        )
