"""Tests of card: compare.py --card."""

import re

import numpy as np
import pytest

from auditing.record import save_side
from calibration.operating_point import evaluate
from common.files import FORMAT
from common.task import Task
from records.run import Run
from report.card import TEMPLATE
from tests.shared import cli, refused, succeed, tables
from tests.test_compare import RULE, edit_results, write_ensemble, write_run

QUESTIONS = len(re.findall(r"\{\{ ask\(", TEMPLATE.read_text(encoding="utf-8")))


def sections(card):
    """{heading of level 2 without its number: text}."""
    parts = re.split(r"^## \d+\. (.*)$", card, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def answers(section):
    """{item: answer} of the first table of a section."""
    return {row[0]: row[1] for row in tables(section)[0][1:]}


def card_of(cwd, run, *flags):
    return succeed("compare", "--card", run, *flags, cwd=cwd).out


def test_a_card_has_the_figures_of_its_run(tmp_path):
    """Recall and specificity, counted by hand from scores, threshold and labels."""
    run = write_run(tmp_path / "outputs/scratch")
    card = card_of(tmp_path, "outputs/scratch")
    arrays, threshold = run.saved_scores(), run.calibration()["findings"]["PNEUMONIA"]["threshold"]
    sick, called = arrays["test_labels"] == 1, arrays["test_p1"] >= threshold
    missed, alarms = int((sick & ~called).sum()), int((~sick & called).sum())
    parts = sections(card)
    summary = parts["Summary"]
    assert f"@Rec {threshold:.4f}: on test recall {called[sick].mean():.3f} [" in summary
    assert (
        f"({missed} of {sick.sum()} missed)" in summary
        and f"({alarms} false alarms of {(~sick).sum()})" in summary
    )
    (row,) = [row for row in tables(parts["Results"])[0] if row[0] == "PNEUMONIA @Rec, test"]
    assert row[1] == f"{threshold:.4f}" and row[3].startswith(f"{(~called)[~sick].mean():.3f} [")
    made = answers(parts["How it was made"])
    assert made["Checkpoint, SHA-256"] == f"`{run.checkpoint_sha256}`"
    assert made["Trained by"] == "`python train_scratch.py`"
    assert answers(parts["Training"])["Seed"] == "0"
    assert "cause" in parts["Groups of patients"]
    assert "python audit.py --run outputs/scratch" in parts["What it looks at"]


def test_a_card_leaves_a_line_for_every_question(tmp_path):
    write_run(tmp_path / "outputs/scratch")
    card = card_of(tmp_path, "outputs/scratch")
    assert card.count("\n**To fill in: ") == card.count("\n\n____") == QUESTIONS >= 15
    assert "{{" not in card and "{%" not in card and "\n\n\n" not in card
    assert "SYNTHETIC" not in card and "UNFINISHED" not in card


def test_what_is_on_record_of_a_run_is_on_its_card(tmp_path):
    """An audit, and nothing of another checkpoint."""
    run = write_run(tmp_path / "outputs/scratch")
    line = {"key": "border", "verdict": "broken", "text": "It reads the border."}
    found = {"finding": "PNEUMONIA", "images": 9, "of_images": 60, "patients": 5, "lines": [line]}
    found |= {"shortcut": {"verdict": "broken", "text": "A shortcut."}, "figures": {}}
    save_side(run, "val", found, "PNEUMONIA")
    card = card_of(tmp_path, "outputs/scratch")
    assert "It reads the border." in sections(card)["What it looks at"] and "Not audited" not in card
    assert "No audit" not in sections(card)["What was not done"]
    run.checkpoint.write_bytes(b"other weights")
    refused(cli("compare", "--card", "outputs/scratch", cwd=tmp_path), "another checkpoint")


def test_a_card_says_what_a_reader_must_know_first(tmp_path):
    """Drawings, an interrupted training, names that look like markup."""
    run = write_run(tmp_path / "outputs/a|b_*c*", synthetic=True, split={"set": "<b>ours</b>"})

    def interrupt(results):
        results["finished"] = False
        results["recipe"]["epochs"] = 15

    edit_results(run, interrupt)
    card = card_of(tmp_path, "outputs/a|b_*c*")
    before = card.partition("## 1.")[0]
    assert (
        "**SYNTHETIC: " in before
        and "**UNFINISHED: training was interrupted after epoch 3 of 15.**" in before
    )
    assert answers(sections(card)["Data"])["Data"].startswith("&lt;b>ours") and "<b>" not in card
    assert r"a\|b" in card.splitlines()[0]


def test_the_card_of_an_ensemble_names_its_members(tmp_path):
    members = [write_run(tmp_path / f"outputs/scratch-seed{i}", i) for i in (0, 1)]
    write_ensemble(tmp_path / "outputs/both", members)
    card = card_of(tmp_path, "outputs/both")
    assert answers(sections(card)["Model"])["Members"] == ", ".join(map(str, members))
    assert "One seed" not in card


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_card_of_several_findings(tmp_path, kind):
    """A line and rows for each finding, and why one has no threshold."""
    run = write_run(tmp_path / "outputs/scratch")
    rng, classes = np.random.default_rng(0), ("Normal", "Flu", "TB")
    task, arrays = Task(classes, kind), {}
    for side, count in (("val", 90), ("test", 60)):
        labels = np.arange(count) % 3
        files = np.array([f"{side}/{i}.png" for i in range(count)])
        arrays |= {
            f"{side}_files": files,
            f"{side}_patients": np.array([f"{side}{i // 2}" for i in range(count)]),
        }
        truth = (labels[:, None] == np.arange(3)).astype(np.int64)
        if kind == "sigmoid":
            truth[:, 2] = np.arange(count) < 3  # too rare for a threshold
        arrays[f"{side}_labels"] = labels if kind == "softmax" else truth
        arrays[f"{side}_logits"] = (2 * truth + rng.normal(size=(count, 3))).astype(np.float32)
    calibration, p1 = evaluate(arrays, RULE, task)
    calibration |= dict(format=FORMAT, checkpoint=run.checkpoint_sha256, tta=None)

    def other_task(results):
        results["data"]["classes"] = list(classes)
        results["data"]["labels"] = "t.csv" if kind == "sigmoid" else ""
        counts = dict.fromkeys(classes, 20)
        results["split"]["counts"] = {side: counts for side in ("train", "val", "test")}

    edit_results(run, other_task)
    run = Run(run.folder)
    run.save_calibration(calibration, {**arrays, **{f"{side}_p1": p for side, p in p1.items()}})
    parts = sections(card_of(tmp_path, "outputs/scratch"))
    with_threshold = [name for name, found in run.calibration()["findings"].items() if "threshold" in found]
    assert [name for name in task.findings if f"- {name} @Rec" in parts["Summary"]] == with_threshold
    rows = [row[0] for row in tables(parts["Results"])[0]]
    assert all(f"{name} @Rec, test" in rows for name in with_threshold)
    assert "Mean AUROC on test: " in parts["Results"]
    assert ("No threshold: TB (" in parts["Results"]) == (kind == "sigmoid") == ("TB" not in with_threshold)


def test_a_card_is_refused_where_it_cannot_be(tmp_path):
    run = write_run(tmp_path / "outputs/scratch")
    refused(
        cli("compare", "--card", "outputs/scratch", "--html", "x.html", cwd=tmp_path), "--html is for reports"
    )
    refused(cli("compare", "--card", "outputs/none", cwd=tmp_path), "outputs/none")
    (run.folder / "calibration.json").unlink()
    refused(cli("compare", "--card", "outputs/scratch", cwd=tmp_path), "not calibrated")


def test_a_card_goes_to_a_file(tmp_path):
    write_run(tmp_path / "outputs/scratch")
    done = succeed("compare", "--card", "outputs/scratch", "--out", "MODEL_CARD.md", cwd=tmp_path)
    assert done.out == "" and "model card: MODEL_CARD.md" in done.err
    assert (tmp_path / "MODEL_CARD.md").read_text() == card_of(tmp_path, "outputs/scratch")
