"""Tests of studies/choice.py: the rule by which defaults are chosen, on candidates made by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from studies import choice, matrix, signals
from tests.shared import cli, refused, succeed


def made(name, panels, minutes=30.0, borrowed=0.95, complete=True):
    """A Candidate with a panel for each seed."""
    folders = [Path("m", f"{name}-seed{k}") for k in range(len(panels))]
    per_seed = [np.full(len(panels), value) for value in (borrowed, minutes)]
    return choice.Candidate(name, folders, np.array(panels), *per_seed, complete, choice.barred(name))


def test_the_greatest_mean_panel_wins_unless_it_may_not_be_chosen():
    good, better = made("ti16-a", [0.80, 0.81, 0.82]), made("ti16-b", [0.82, 0.83, 0.84])
    assert choice.winner([good, better]) == (better, False)
    for barred in (
        made("ti16-c", [0.9] * 3, borrowed=0.89),  # misled by the border
        made("ti16-d", [0.9] * 3, complete=False),
        made("scratch-e-nih", [0.9] * 3),
    ):
        assert choice.winner([good, better, barred])[0] is better, barred.standing
        assert barred.standing != "stands" == better.standing
    vetoed = made("ti16-c", [0.9] * 3, borrowed=0.89)
    assert choice.winner([vetoed]) == (vetoed, True)  # all are: the veto is dropped
    assert choice.winner([made("ti16-d", [0.9], complete=False)]) == (None, False)


def test_of_level_candidates_the_shorter_training_wins():
    long, short = made("ti16-a", [0.810] * 3, minutes=60), made("ti16-b", [0.806] * 3, minutes=10)
    assert choice.winner([long, short])[0] is short
    assert choice.winner([long, made("ti16-c", [0.804] * 3, minutes=10)])[0] is long


def test_the_default_changes_only_beyond_the_larger_spread():
    default = made("ti16-full", [0.79, 0.80, 0.81])  # spread 0.01
    assert choice.changes(made("ti16-a", [0.8101] * 3), default)
    assert not choice.changes(made("ti16-a", [0.8099] * 3), default)
    assert not choice.changes(made("ti16-a", [0.80, 0.82, 0.84]), default)  # 0.02 ahead, spread 0.02
    assert not choice.changes(default, default)


def test_verdicts_name_the_finalists_and_an_ensemble_of_two_backbones():
    a, b = made("ti16-masked-crop", [0.83] * 3), made("ti16-other", [0.82] * 3)
    dino, taught = made("dinov2-full", [0.81] * 3), made("scratch-full-taught", [0.9] * 3)
    default = made("ti16-full", [0.80] * 3, borrowed=0.7)
    lines = list(choice.verdicts([a, b, dino, default, taught, made("scratch-full", [0.7] * 3)]))
    assert lines[0].startswith("pretrained: ti16-masked-crop wins, +0.030 against ti16-full")
    assert lines[0].endswith("it becomes the default")
    assert lines[1] == "scratch: the default, scratch-full, is ahead and stays"
    assert "row of its own" in lines[2]
    run, together = lines[3].split(), lines[4].split()
    finalists = {Path(f).name.rsplit("-seed", 1)[0] for f in run if "-seed" in f}
    assert finalists == {"ti16-masked-crop", "ti16-full", "scratch-full", "scratch-full-taught"}
    assert {Path(f).name.rsplit("-seed", 1)[0] for f in together if "-seed" in f} == {a.name, dino.name}
    (missing,) = choice.verdicts([made("ti16-full", [0.8], complete=False)])
    assert missing == "pretrained: no candidate has all of its seeds"


def test_an_ensemble_is_of_the_two_best_that_calibrate_takes_together():
    ti, dino = made("ti16-a", [0.80] * 3), made("dinov2-a", [0.82] * 3)
    large = made("dinov2-b-336", [0.84] * 3)._replace(size=336)
    assert choice.ensemble([ti, dino, large]) == (dino, ti)
    assert choice.ensemble([ti, large]) == choice.ensemble([dino, large]) == choice.ensemble([ti]) == ()
    hybrid = made("hybrid-a", [0.83] * 3, borrowed=0.87)  # misled by the border
    assert choice.ensemble([ti, dino, hybrid]) == (dino, ti)


@pytest.mark.parametrize("name", [row.name for row in matrix.accuracy() if row.script != "pretrain_mae"])
def test_candidates_of_the_matrix_are_of_one_arm_and_barred_if_they_saw_nih(name):
    c = made(name, [0.8] * 3)
    assert c.arm in choice.DEFAULTS and bool(c.barred) == ("nih" in name)


def test_a_row_without_a_reason_to_transfer_is_not_chosen():
    strong, masked = made("scratch-masked-strong", [0.7] * 3), made("scratch-masked-first", [0.9] * 3)
    assert choice.winner([strong, masked])[0] is strong and masked.standing == "no reason to transfer"
    assert {row.name for row in matrix.scratch()} >= {"scratch-full", *choice.NO_REASON}


def test_choice_reads_what_the_matrix_left(bench, tmp_path):
    out = tmp_path / "m"
    figures = dict.fromkeys(signals.VALIDATION, 0.5) | {
        "worst": "blur",
        "corruptions": dict.fromkeys(signals.corruptions(), [0.5]),
    }
    figures |= {"corrupted spec": 0.9, "corrupted recall": 0.94, "borrowed AUROC": 0.97}
    for seed, auroc in enumerate((0.70, 0.68, 0.72)):
        folder = shutil.copytree(bench / "outputs/scratch-seed0", out / f"ti16-masked-crop-seed{seed}")
        parts = {"validation": {"figures": figures}, "nih": {"figures": {"NIH AUROC": auroc}}}
        (folder / "signals.json").write_text(json.dumps(parts))
    shutil.copytree(bench / "outputs/scratch-seed1", out / "ti16-full-seed0")  # trained, no panel yet
    done = succeed("studies.choice", "--out", out, cwd=tmp_path).out.splitlines()
    assert done[2].startswith("| ti16-masked-crop | 3 | 0.810 ± 0.010 | 0.970 | ")
    assert done[2].endswith(" | stands |") and done[3] == ""
    assert done[4].startswith("pretrained: ti16-masked-crop is ahead; the default, ti16-full, lacks seeds")
    assert done[-1].startswith("python calibrate.py --run") and done[-1].count("-seed") == 3
    refused(cli("studies.choice", "--out", tmp_path / "none", cwd=tmp_path), "studies/matrix.py accuracy")
    for damaged in ({"nih": {"key": "x"}}, {"nih": {"figures": {"NIH AUROC": "high"}}}):
        (folder / "signals.json").write_text(json.dumps(damaged))
        refused(cli("studies.choice", "--out", out, cwd=tmp_path), "seed2/signals.json is damaged", "nih.")
