"""Tests of predict.Scorer: scoring from Python."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.console import InputError
from predict import Scorer
from tests.shared import REPO, cli


def printed(done):
    return list(csv.DictReader(io.StringIO(done.out)))


def as_text(row):
    return {key: "" if value is None else str(value) for key, value in row.items()}


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
        assert as_text(row) == expected[0]
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
    ):
        with pytest.raises(InputError, match=text):
            Scorer(bench / "outputs/linear", **{"device": "cpu"} | arguments)
    with pytest.raises(InputError, match="does not exist"):
        Scorer(tmp_path, "cpu")


def test_scorer_tells_of_files_that_cannot_be_read(bench, tmp_path, capsys):
    (tmp_path / "empty.png").write_bytes(b"")
    (row,) = Scorer(bench / "outputs/linear", "cpu")(tmp_path)
    assert row["p_pneumonia"] is None and row["note"].startswith("unreadable")
    said = capsys.readouterr().err
    assert "SYNTHETIC" in said and "1 of 1 files could not be read" in said


def test_each_call_of_a_scorer_is_judged_by_itself(bench):
    """A cell of a notebook that is run twice counts no image twice."""
    scorer = Scorer(bench / "outputs/linear", "cpu")
    for _ in range(2):
        scorer(bench / "xray/test")
        assert scorer.verdict()["patients"] == 60


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
