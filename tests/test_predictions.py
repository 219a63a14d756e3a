"""Tests of predictions.csv: what spreadsheets see of a run's scores."""

import csv

import numpy as np
import pytest

from common.task import Task
from records.predictions import write_predictions
from records.run import Run
from tests.shared import of_one, read_json, succeed


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_one_finding(own_runs):
    """Every image of both sides, against scores.npz. A re-run replaces the file; it goes with the scores."""
    folder = own_runs / "outputs" / "linear"
    path = folder / "predictions.csv"
    path.write_text("old")
    succeed("calibrate", "--run", folder, "--min-recall", 0.9, "--bootstrap", 100, cwd=own_runs)
    rows, arrays = read_rows(path), np.load(folder / "scores.npz")
    threshold = of_one(read_json(folder, "calibration.json"))["threshold"]
    columns = "path,patient,study,age,sex,view,side,truth,score,decision@Rec"
    assert path.read_text().splitlines()[0] == columns
    at = 0
    for side in ("val", "test"):
        for i, file in enumerate(arrays[f"{side}_files"]):
            row, score = rows[at], arrays[f"{side}_p1"][i]
            at += 1
            assert (row["path"], row["side"], row["patient"]) == (file, side, arrays[f"{side}_patients"][i])
            assert row["truth"] == str(arrays[f"{side}_labels"][i])
            assert float(row["score"]) == pytest.approx(score, rel=1e-5)
            assert row["decision@Rec"] == ("PNEUMONIA" if score >= threshold else "NORMAL")
            assert (row["study"], row["age"], row["sex"], row["view"]) == ("", "", "", "")
    assert at == len(rows)
    tta = folder / "predictions-tta.csv"
    tta.write_text("views")
    Run(folder).clear(weights=False)
    assert not path.exists() and not tta.exists()


def test_the_same_decisions_as_predict(runs, synthetic, tmp_path):
    """The test images through predict.py have the decisions of predictions.csv."""
    run = runs.out / "linear"
    done = succeed("predict", synthetic / "test", "--run", run, cwd=tmp_path)
    theirs = {}
    for row in csv.DictReader(done.out.splitlines()):
        theirs[row["path"].removeprefix(f"{synthetic}/")] = row
    ours = [row for row in read_rows(run / "predictions.csv") if row["side"] == "test"]
    assert len(ours) == len(theirs)
    for row in ours:
        assert row["decision@Rec"] == theirs[row["path"]]["decision@Rec"]
        assert float(row["score"]) == pytest.approx(float(theirs[row["path"]]["p_pneumonia"]), rel=1e-4)


def arrays_of(files, patients, labels, scores, **cohort):
    """Arrays as in scores.npz and p1, both sides alike."""
    arrays, p1 = {}, {}
    for side in ("val", "test"):
        arrays |= {f"{side}_files": np.array(files), f"{side}_patients": np.array(patients)}
        arrays[f"{side}_labels"] = np.array(labels)
        arrays |= {f"{side}_cohort_{name}": np.array(values) for name, values in cohort.items()}
        p1[side] = np.array(scores)
    return arrays, p1


def test_several_findings_and_what_is_known(tmp_path):
    """Unknown is empty; a finding without a threshold decides nothing; formulas become text."""
    labels = np.array([[1, -1], [0, 1]], dtype=np.int8)
    arrays, p1 = arrays_of(
        ["=1+1.png", "plain.png"],
        ["@p", "plain.png"],
        labels,
        [[0.123456789, 1e-9], [0.5, 1.0]],
        study=["-s", ""],
        age=[0.25, np.nan],
        sex=["F", ""],
        view=["PA", "lateral"],
    )
    calibration = {"findings": {"Pleural Effusion": {"threshold": 0.5}, "Edema": {"why_not": "few"}}}
    task = Task(("Pleural Effusion", "Edema"), "sigmoid")
    write_predictions(tmp_path / "p.csv", task, calibration, arrays, p1)
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert lines[0].split(",")[7:] == [
        *("truth_pleural_effusion", "score_pleural_effusion", "decision@Rec_pleural_effusion"),
        *("truth_edema", "score_edema", "decision@Rec_edema"),
    ]
    assert lines[1] == "'=1+1.png,'@p,'-s,0.25,F,PA,val,1,0.123457,no,,1e-09,"
    assert lines[2] == "plain.png,,,,,lateral,val,0,0.5,yes,1,1,"
    assert len(lines) == 5 and lines[3] == lines[1].replace(",val,", ",test,")


def test_by_study_has_both_scores(tmp_path):
    arrays, p1 = arrays_of(["a", "b"], ["a", "b"], [0, 1], [0.1, 0.9], study=["s", "s"])
    calibration = {"by": "study", "findings": {"PNEUMONIA": {"threshold": 0.5}}}
    units = {side: (np.array([[1], [1]]), np.array([[0.9], [0.9]])) for side in ("val", "test")}
    write_predictions(tmp_path / "p.csv", Task(), calibration, arrays, p1, units)
    first = read_rows(tmp_path / "p.csv")[0]
    assert list(first)[7:] == ["truth", "score", "study_truth", "study_score", "study_decision@Rec"]
    assert list(first.values())[7:] == ["0", "0.1", "1", "0.9", "PNEUMONIA"]
