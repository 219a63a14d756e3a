"""Tests of the classification report, against scikit-learn on the decisions themselves and counts by hand."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import classification_report

from calibration.operating_point import Rule, evaluate
from calibration.pooling import units_of
from common.console import InputError
from common.task import Task
from report.render import to_markdown
from report.rows import Entry
from report.tables import classes
from tests.test_compare import tables, write_run
from tests.test_labels import several

QUICK = Rule(bootstrap=20, min_recall=0.9, confidence=0.8)
FIVE = Task(("Normal", "a", "b", "c", "accuracy"))  # a class that is called as an average
FOUR = Task(("No Finding", "Effusion", "Mass", "Edema"), "sigmoid")


def drawn(task, n=300, unknown=0.0):
    """Scores of a made-up model, as in scores.npz: two images a patient."""
    files = {f"{side}_files": np.array([f"{i}.png" for i in range(n)]) for side in ("val", "test")}
    return several(task, n, unknown=unknown) | files


def answered(task, arrays, rule=QUICK, side="test"):
    """({title: Answers}, the calibration, truth [N, F], scores [N, F])."""
    calibration, _ = evaluate(arrays, rule, task)
    units = units_of(arrays, side, rule.by, rule.pool)
    truth = units.truth(task.truth(arrays[f"{side}_labels"]))
    scores = units.scores(task.scores_from(arrays[f"{side}_logits"], calibration))
    found = classes.answers(task, calibration, side, truth, scores)
    assert len({one.title for one in found}) == len(found)
    return {one.title: one for one in found}, calibration, truth, scores


def test_calibrate_prints_what_scikit_learn_makes_of_predictions_csv(runs):
    """@Rec by the words of predictions.csv, @0.5 by its scores, side by side below the table."""
    printed = runs.calibrated.out.split("\noutputs/")
    for name in ("linear", "scratch", "pretrained"):
        with open(runs.out / name / "predictions.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["side"] == "test"]
        names = ["NORMAL", "PNEUMONIA"]
        truth = [names[int(row["truth"])] for row in rows]
        halves = [names[float(row["score"]) >= 0.5] for row in rows]
        [text] = [part for part in printed if part.startswith(name)]
        table, report = text.split("  classification report on test (images):\n")
        assert "@Rec" in table and "AUROC" not in report
        shown = report.splitlines()
        for decided, place in (([row["decision@Rec"] for row in rows], 0), (halves, 1)):
            theirs = classification_report(truth, decided, labels=names, digits=4, zero_division=0)
            for line in filter(str.strip, theirs.splitlines()):
                assert any(line.strip() == half.strip() for row in shown for half in halves_of(row)), line
            assert shown[0].split()[place] == ("@Rec", "@0.5")[place]


def halves_of(row):
    """The two reports of a printed line: each is as wide as scikit-learn's."""
    width = len("   weighted avg     0.0000    0.0000    0.0000        00") - 1
    return row[2 : 2 + width], row[2 + width :]


@pytest.mark.parametrize("by", ["image", "patient"])
def test_two_classes(by):
    task, arrays = Task(), drawn(Task())
    found, calibration, _, _ = answered(
        task, arrays, Rule(bootstrap=20, min_recall=0.9, confidence=0.8, by=by)
    )
    assert list(found) == ["@Rec", "@0.5", "@Guar"] and found["@Rec"].names == ["NORMAL", "PNEUMONIA"]
    # By hand: the score of a patient is the highest of two images, the truth their "or".
    z = arrays["test_logits"].astype(float)
    p, y = 1 / (1 + np.exp(z[:, 0] - z[:, 1])), arrays["test_labels"]
    if by == "patient":
        p, y = p.reshape(-1, 2).max(axis=1), y.reshape(-1, 2).max(axis=1)
    thr = calibration["findings"]["PNEUMONIA"]["threshold"]
    for title, at in (("@Rec", thr), ("@0.5", 0.5)):
        theirs = classification_report(y, (p >= at).astype(int), target_names=task.classes, digits=4)
        assert classes.as_text(found[title]) == theirs
    rows = classes.rows_of(found["@Rec"])
    called, sick = p >= thr, y == 1
    precision, recall = (called & sick).sum() / called.sum(), (called & sick).sum() / sick.sum()
    f1 = 2 * precision * recall / (precision + recall)
    assert rows[True, "PNEUMONIA"] == [f"{v:.3f}" for v in (precision, recall, f1)] + [str(sick.sum())]
    assert rows[False, "accuracy"] == ["", "", f"{(called == sick).mean():.3f}", str(len(y))]


def test_classes_of_one_image():
    """The most probable class; the screening question; each class at its threshold."""
    arrays = drawn(FIVE)
    found, calibration, truth, scores = answered(FIVE, arrays)
    assert list(found)[:3] == ["any disease @Rec", "most probable class", "each class @Rec"]
    assert [one.title for one in found.values() if one.short] == ["any disease @Rec", "most probable class"]
    y, z = arrays["test_labels"], arrays["test_logits"]
    theirs = classification_report(y, z.argmax(axis=1), target_names=FIVE.classes, digits=4)
    assert classes.as_text(found["most probable class"]) == theirs
    rows = classes.rows_of(found["most probable class"])
    assert len(rows) == 8 and rows[True, "accuracy"] != rows[False, "accuracy"]
    at = np.array([calibration["findings"][name]["threshold"] for name in FIVE.findings])
    theirs = classification_report(
        y > 0, scores[:, 0] >= at[0], target_names=["no disease", "any disease"], digits=4
    )
    assert classes.as_text(found["any disease @Rec"]) == theirs
    each = classification_report(
        np.eye(5, dtype=int)[y][:, 1:],
        (scores >= at)[:, 1:],
        target_names=FIVE.classes[1:],
        digits=4,
        zero_division=0,
    )
    assert classes.as_text(found["each class @Rec"]) == each


@pytest.mark.parametrize(
    "damage", [lambda c: c.pop(), lambda c: c[0].pop(), lambda c: c[0].__setitem__(0, 10**9)]
)
def test_counts_that_cannot_be_right_are_refused(damage):
    arrays = drawn(FIVE)
    _, calibration, truth, scores = answered(FIVE, arrays)
    damage(calibration["summary"]["test"]["confusion"])
    with pytest.raises(InputError, match="confusion"):
        classes.answers(FIVE, calibration, "test", truth, scores)


def test_findings_of_which_some_are_unknown():
    """Every row by the known labels alone, and the averages from these, by brute force."""
    arrays = drawn(FOUR, unknown=0.2)
    arrays["test_labels"][:5] = -1  # of these images nothing is known
    found, calibration, truth, scores = answered(FOUR, arrays)
    assert [one.title for one in found.values() if one.short] == ["each finding @Rec", "each finding @0.5"]
    rows, counted, per_image = classes.rows_of(found["each finding @Rec"]), [], []
    decided = np.stack(
        [scores[:, k] >= calibration["findings"][n]["threshold"] for k, n in enumerate(FOUR.findings)], axis=1
    )
    for k, name in enumerate(FOUR.findings[1:], start=1):
        known = truth[:, k] >= 0
        y, d = truth[known, k], decided[known, k]
        tp, fp, fn = (y * d).sum(), ((1 - y) * d).sum(), (y * ~d).sum()
        counted.append((tp, fp, fn))
        assert rows[True, name] == [*three(tp, fp, fn), str(tp + fn)]
    assert rows[False, "micro avg"][:3] == three(*np.sum(counted, axis=0))
    figures = np.array(
        [[tp / (tp + fp), tp / (tp + fn), 2 * tp / (2 * tp + fp + fn)] for tp, fp, fn in counted]
    )
    assert rows[False, "macro avg"][:3] == [f"{v:.3f}" for v in figures.mean(axis=0)]
    for y, d in zip(truth[:, 1:], decided[:, 1:]):
        if (y >= 0).any():
            tp, fp, fn = ((y == 1) & d).sum(), ((y == 0) & d).sum(), ((y == 1) & ~d).sum()
            parts = ((tp, tp + fp), (tp, tp + fn), (2 * tp, 2 * tp + fp + fn))
            per_image.append([a / b if b else 0.0 for a, b in parts])
    assert rows[False, "samples avg"][:3] == [f"{v:.3f}" for v in np.mean(per_image, axis=0)]
    # The yes/no question is a table of two classes.
    assert found["any finding @Rec"].names == ["no finding", "any finding"]
    assert (found["any finding @Rec"].truth >= 0).all()


def three(tp, fp, fn):
    return [f"{v:.3f}" for v in (tp / (tp + fp), tp / (tp + fn), 2 * tp / (2 * tp + fp + fn))]


def test_a_finding_without_a_threshold_is_left_out_by_name():
    arrays = drawn(FOUR)
    arrays["val_labels"][:, 3] = 0
    found, calibration, truth, scores = answered(FOUR, arrays)
    assert found["each finding @Rec"].names == ["No Finding", "Effusion", "Mass"]
    text = classes.printed_text(FOUR, calibration, truth, scores, "images")
    assert text.endswith("1 left out, without a threshold or figures on test: Edema")
    arrays["val_labels"][:, 1:3] = 0  # one is left: two classes, not a table of one column
    found, calibration, truth, scores = answered(FOUR, arrays)
    [one] = [one for one in found.values() if one.short and one.title.endswith("@Rec")]
    assert one.names == ["no No Finding", "No Finding"] and one.truth.ndim == 1
    assert one.left_out == ("Effusion", "Mass", "Edema")


def test_a_finding_with_one_rule_alone_is_not_said_to_be_missing_everywhere():
    """Edema has @Rec but too few patients for @Guar: it has rows, and lacks some."""
    arrays = drawn(FOUR)
    arrays["val_labels"][8:, 3] = 0
    arrays["val_labels"][:8, 3] = 1
    _, calibration, truth, scores = answered(FOUR, arrays)
    side = SimpleNamespace(truth=truth, scores=scores)
    entry = SimpleNamespace(name="x", task=FOUR, calibration=calibration, unit="images")
    entry.columns, entry.findings = {"val": side, "test": side}, FOUR.findings
    text = to_markdown(classes.report_blocks([entry]))
    assert "| each finding @Rec: Edema |" in text and "@Guar: Edema |" not in text and "Not in it" not in text
    missing = "for want of a threshold or of figures: on validation Edema; on test Edema."
    assert f"Missing by one rule or more, {missing}" in text


def test_long_names_stand_below_each_other():
    task = Task(("NORMAL", "a very long name " * 5))
    _, calibration, truth, scores = answered(task, drawn(task))
    lines = classes.printed_text(task, calibration, truth, scores, "images").splitlines()
    assert [line.strip() for line in lines if line.strip() in ("@Rec", "@0.5")] == ["@Rec", "@0.5"]
    assert sum("weighted avg" in line for line in lines) == 2 and not any("\n" in line for line in lines)


def test_the_report_has_it_for_both_sides(tmp_path):
    entry = Entry(write_run(tmp_path / "scratch"))
    *_, table = classes.report_blocks([entry])
    assert [name for name, _ in table.groups] == ["", "validation", "test"]
    assert {len(row) for row in table.rows} == {9}
    by_name = {row[0]: row[1:] for row in table.rows}
    for k, side in enumerate(("val", "test")):
        column, row = entry.column("PNEUMONIA", side), entry.row("PNEUMONIA", side, "at_rec")
        cells = by_name["@Rec: PNEUMONIA"][4 * k : 4 * k + 4]
        assert cells == [f"{row[key]:.3f}" for key in ("precision", "recall", "f1")] + [
            str(column.truth.sum())
        ]
    assert len(tables(to_markdown(classes.report_blocks([entry])))) == 1


def test_a_class_that_does_not_occur_has_no_row():
    """Scikit-learn's averages without it; with it, it would count as 0."""
    task = Task(("Normal", "a", "b", "c"))
    arrays = drawn(task)
    labels = arrays["test_labels"]
    labels[labels == 3] = 2
    arrays["test_logits"][:, 3] = -20
    found, _, _, _ = answered(task, arrays)
    one = found["most probable class"]
    assert one.names == ["Normal", "a", "b"] and one.left_out == ("c",)
    decided = arrays["test_logits"].argmax(axis=1)
    theirs = classification_report(labels, decided, target_names=one.names, digits=4, zero_division=0)
    assert classes.as_text(one) == theirs and "accuracy" in theirs
