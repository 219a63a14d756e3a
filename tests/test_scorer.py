"""Tests of predict.Scorer: scoring from Python."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.console import InputError
from common.task import Task
from predict import Scorer
from prediction import output
from prediction.scorer import decision_by_hand, thresholds_by_hand
from tests.shared import REPO, cli, of_one, read_json, refused, succeed


def printed(done):
    return list(csv.DictReader(io.StringIO(done.out)))


def as_text(row):
    """A row of a Scorer as the cells of predict.py's CSV, of scores that are on no threshold's brink."""
    cells = {key: "" if value is None else str(value) for key, value in row.items()}
    for key in ("p_pneumonia", "typicality"):
        if row[key] is not None:
            cells[key] = str(output.round_score(row[key], []))
    return cells


def test_scorer_gives_the_rows_of_predict(bench, monkeypatch):
    """Files, folders and globs, as text or Path, one or several."""
    monkeypatch.chdir(bench)
    done = cli("predict", "xray/test", "--run", "outputs/linear", cwd=bench)
    expected = printed(done)
    scorer = Scorer("outputs/linear", device="cpu")
    rows = scorer("xray/test")
    assert list(map(as_text, rows)) == expected and len(rows) == 60
    assert type(rows[0]["p_pneumonia"]) is float and type(rows[0]["typicality"]) is float
    one = Path(expected[0]["path"])
    for paths in (str(one), one, [one], (path for path in [str(one)])):
        (row,) = scorer(paths)
        alone = row["p_pneumonia"]  # another batch, so other last bits
        assert alone == pytest.approx(rows[0]["p_pneumonia"], abs=1e-5)
        assert {**row, "p_pneumonia": rows[0]["p_pneumonia"]} == rows[0]
    assert [row["path"] for row in scorer([one, "xray/test/PNEU*/*"])[1:]] == [
        row["path"] for row in expected if "/PNEUMONIA/" in row["path"]
    ]
    assert scorer([]) == []


def test_scorer_raises_and_never_exits(bench, tmp_path):
    scorer = Scorer(bench / "outputs/linear", torch.device("cpu"))
    with pytest.raises(InputError, match="no image files in"):
        scorer(tmp_path)
    with pytest.raises(InputError, match="nowhere.png is not a file"):
        scorer([tmp_path / "nowhere.png"])
    for arguments, text in (
        ({"device": "cpu:9"}, "is not one of"),
        ({"site": "../x"}, "give a name"),
        ({"site": "clinic"}, "no thresholds for the site"),
        ({"tta": True}, "calibrate.py --tta"),
        ({"views": "sideways"}, "not one of"),
        ({"threshold": 1.5}, "between 0 and 1"),
        ({"threshold": float("nan")}, "between 0 and 1"),
        ({"threshold": {"Mass": 0.5}}, "Mass is not one of PNEUMONIA"),
    ):
        with pytest.raises(InputError, match=text):
            Scorer(bench / "outputs/linear", **{"device": "cpu"} | arguments)
    with pytest.raises(InputError, match="does not exist"):
        Scorer(tmp_path, "cpu")


@pytest.mark.parametrize("wrong", [{"paths": None}, {"paths": [1]}, {"batch_size": 0}, {"batch_size": "2"}])
def test_wrong_arguments_of_a_scorer_are_input_errors(bench, monkeypatch, wrong):
    monkeypatch.chdir(bench)
    with pytest.raises(InputError, match=r"^(paths|batch_size) "):
        Scorer("outputs/linear")(**{"paths": "xray/test", **wrong})


@pytest.mark.parametrize("threshold", ["0.3", True, float("nan"), 1.5])
def test_a_threshold_by_hand_is_a_number(bench, monkeypatch, threshold):
    monkeypatch.chdir(bench)
    with pytest.raises(InputError, match="a number between 0 and 1"):
        Scorer("outputs/linear", threshold=threshold)


def test_scorer_tells_of_files_that_cannot_be_read(bench, tmp_path, capsys):
    (tmp_path / "empty.png").write_bytes(b"")
    (row,) = Scorer(bench / "outputs/linear", "cpu")(tmp_path)
    assert row["p_pneumonia"] is None and row["note"].startswith("unreadable")
    said = capsys.readouterr().err
    assert "SYNTHETIC" in said and "1 of 1 files could not be read" in said


def test_each_call_of_a_scorer_is_judged_by_itself(bench):
    """A cell of a notebook that is run twice counts no image twice."""
    scorer = Scorer(bench / "outputs/linear", "cpu")
    verdicts = []
    for _ in range(2):
        scorer(bench / "xray/test")
        verdicts.append(scorer.verdict())
    assert verdicts[0] == verdicts[1] and verdicts[0]["patients"] > 20


def test_a_notebook_needs_four_lines(bench):
    """In another folder than the scripts' own, by Python alone."""
    path = next((bench / "xray/test/NORMAL").iterdir())
    lines = [
        "from predict import Scorer",
        "s = Scorer('outputs/linear')",
        f"print(s([{str(path)!r}])[0]['path'])",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=bench,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == f"{path}\n", done.stderr


# ---------------------------------------------------------------- the flags of predict.py


def test_rows_go_to_a_file_most_suspicious_first(bench, tmp_path):
    """The same rows as on standard output, with the threshold; files that cannot be read come last."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a_empty.png").write_bytes(b"")
    for i, path in enumerate(sorted((bench / "xray/test").rglob("*.jpeg"))[::9]):
        (folder / f"{i}.jpeg").write_bytes(path.read_bytes())
    argv = ("predict", folder, "--run", "outputs/linear")
    expected = printed(cli(*argv, cwd=bench))
    out = folder / "scores.csv"
    done = cli(*argv, "-o", out, "--sort", "score", cwd=bench)
    assert done.code == 2 and done.out == "" and "when the last file is scored" in done.err
    assert "passed over" not in done.err  # what is written is no input
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scores = [float(row["p_pneumonia"]) for row in rows[:-1]]
    assert scores == sorted(scores, reverse=True) and rows[-1]["path"].endswith("a_empty.png")
    assert sorted(rows, key=lambda row: row["path"]) == sorted(expected, key=lambda row: row["path"])
    threshold = of_one(read_json(bench / "outputs/linear/calibration.json"))["threshold"]
    for row in rows[:-1]:
        assert float(row["threshold@Rec"]) == threshold
        assert (row["decision@Rec"] == "PNEUMONIA") == (float(row["p_pneumonia"]) >= threshold)
    assert rows[-1]["threshold@Rec"] == ""


def test_a_threshold_by_hand(bench, tmp_path):
    path = sorted((bench / "xray/test/PNEUMONIA").iterdir())[0]
    argv = ("predict", path, "--run", "outputs/linear")
    done = succeed(*argv, "--threshold", 0.999999, "--jsonl", "--summary", tmp_path / "s.json", cwd=bench)
    row = json.loads(done.out)
    assert list(row)[2:5] == ["decision@0.5", "decision@hand", "threshold@hand"]
    assert row["threshold@hand"] == 0.999999 and row["decision@hand"] == "NORMAL"
    assert "decided at 0.999999, a threshold by hand" in done.err
    assert read_json(tmp_path / "s.json")["thresholds_by_hand"] == {"PNEUMONIA": 0.999999}
    at_score = succeed(*argv, "--threshold", "PNEUMONIA=0", cwd=bench)  # a score is at its threshold or above
    assert printed(at_score)[0]["decision@hand"] == "PNEUMONIA"
    for flags, text in (
        (["--threshold", "high"], "not a number"),
        (["--threshold", "2"], "between 0 and 1"),
        (["--threshold", "0.3", "--threshold", "0.4"], "once for each finding"),
        (["--threshold", "0.3", "--site", "clinic"], "leave one of them out"),
        (["--threshold", "0.3", "--keep", "x"], "the run's own thresholds"),
        (["--sort", "size"], "which finding"),
        (["-o", tmp_path / "nowhere/x.csv"], "there is no folder"),
    ):
        refused(cli(*argv, *flags, cwd=bench), text)
    refused(
        cli("predict", "--export", "m.onnx", "--run", "outputs/linear", "-o", "x", cwd=bench), "--out is for"
    )


@given(st.floats(0, 1), st.floats(0, 1), st.integers(-3, 3))
def test_a_rounded_score_stays_on_its_side_of_the_threshold(score, threshold, steps):
    """Also a few units of the last place away from it."""
    near = threshold * (1 + steps * 2.3e-16)
    for value in (score, min(near, 1.0)):
        rounded = output.round_score(value, [threshold, 0.5])
        assert (rounded >= threshold) == (value >= threshold) and (rounded >= 0.5) == (value >= 0.5)
        assert rounded == pytest.approx(value, rel=5.1e-6)


def test_a_score_far_from_thresholds_has_six_digits():
    assert output.round_score(0.123456789, [0.9]) == 0.123457
    assert output.round_score(1.23456789e-7, [0.9]) == 1.23457e-7
    assert output.round_score(0.49999999, [0.5]) == 0.49999999


def test_scores_near_one_keep_their_order():
    """Their distance from 1 has four digits, so that any threshold among them decides in print as it did."""
    far = np.logspace(-12, -0.01, 300)
    printed = np.array([output.round_score(float(1 - x), []) for x in far])
    np.testing.assert_allclose(1 - printed, 1 - (1 - far), rtol=5e-4)
    assert (np.diff(printed) <= 0).all() and len(np.unique(printed)) == 300
    assert output.round_score(0.9987654321, []) == 0.998765 and output.round_score(1.0, []) == 1.0


def test_thresholds_by_hand_of_several_findings():
    task = Task(("Edema", "Mass"), "sigmoid")
    by_hand = thresholds_by_hand(task, output.read_thresholds(["Mass=0.3"]))
    edema, mass = (decision_by_hand(d, by_hand) for d in task.decisions({"Edema": 0.1, "Mass": 0.2}))
    assert (edema.column, edema.threshold) == ("decision@Rec_edema", 0.1)
    assert (mass.column, mass.threshold, mass.answer([0.9, 0.3])) == ("decision@hand_mass", 0.3, "yes")
    with pytest.raises(InputError, match="for which of Edema, Mass"):
        thresholds_by_hand(task, 0.3)
    with pytest.raises(InputError, match="once for each finding"):
        output.read_thresholds(["Mass=0.3", "Mass=0.4"])
    assert output.read_thresholds(["a=b=0.3"]) == {"a=b": 0.3} and output.read_thresholds([]) is None


class Scored:
    """What the order of rows needs of a Scorer."""

    def __init__(self, task, unit):
        self.task, self.unit = task, unit

    def column_of_unit(self, column):
        return column if self.unit == "image" else f"{self.unit}_{column}"


def test_rows_of_a_study_stay_together_when_sorted():
    scorer = Scored(Task(), "study")
    column = output.sort_column(scorer, "score")
    values = [("a", 0.7), ("b", 0.7), ("a", 0.7), ("c", None), ("d", 0.9), ("b", 0.7)]
    rows = [(None, {"study": study, column: score}) for study, score in values]
    found = output.most_suspicious_first(rows, scorer, column)
    assert [row["study"] for _, row in found] == ["d", "a", "a", "b", "b", "c"]


def test_the_score_to_sort_by():
    """Of several findings without one that stands for all, the finding must be named."""
    classes = Scored(Task(("Normal", "Flu", "TB")), "image")
    assert output.sort_column(classes, "score") == "p_any_disease"
    assert output.sort_column(classes, "TB") == "p_tb"
    findings = Scored(Task(("Edema", "Mass"), "sigmoid"), "image")
    with pytest.raises(InputError, match="which finding"):
        output.sort_column(findings, "score")
    assert output.sort_column(findings, "Mass") == "p_mass"
