"""Tests of report/answers, the main table, --list, and plots.

References: a bootstrap that shares no code, published intervals, simulations."""

import json
import re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from scipy.special import expit, logit
from scipy.stats import binomtest

from calibration.wording import (
    EVERYBODY,
    HEALTHY,
    NOBODY,
    calls,
    four_digits,
    guaranteed_too,
    threshold_text,
)
from common.console import InputError
from common.files import write_json
from common.proportions import wilson_interval
from common.task import Task
from records.curves import COLOURS, GREY
from report import figures, plots
from report.answers import marks
from report.answers.standing import Behind, patients_needed, standings
from report.answers.threshold import floor_verdict, lines_of, recall_span, threshold_blocks
from report.answers.which import which_blocks
from report.render import Bad, Best, to_markdown
from report.rows import Entry, tell_apart
from report.tables import main as tables_module
from report.tables.method import sizes
from report.tables.models import in_order_of, legend, models_table
from report.view import only_top, view_of
from tests.shared import cli, refused, succeed, tables
from tests.test_compare import ASKED, RULE, noisy_scores, write_ensemble, write_run
from tests.test_labels import several


def recipe(rate):
    """The recipe of a run: another learning rate makes another model."""
    return {"amp": False, "lr": float(rate)}


def shifted(scores, by, side="val", seed=5):
    """Scores whose sick images of a side are `by` logits higher, with a little noise."""
    rng = np.random.default_rng(seed)
    changed = {**scores, f"{side}_logits": scores[f"{side}_logits"].copy()}
    noise = rng.normal(0, 0.3, len(scores[f"{side}_labels"]))
    changed[f"{side}_logits"][:, 1] += by * scores[f"{side}_labels"] + noise
    return changed


def many(seed, count=400, strength=2.0, test_strength=None):
    """Scores of `count` validation and test images, two a patient; a sick image's logit is so much higher."""
    rng, arrays = np.random.default_rng(seed), {}
    for side in ("val", "test"):
        labels = (np.arange(count) % 4 > 1).astype(np.int64)
        logits = rng.normal(size=(count, 2)).astype(np.float32)
        height = test_strength if side == "test" and test_strength is not None else strength
        logits[:, 1] += height * labels - height / 2
        files = np.array([f"{side}/{i:04d}.png" for i in range(count)])
        patients = np.array([f"{side}{i // 2}" for i in range(count)])
        found = dict(files=files, patients=patients, labels=labels, logits=logits)
        arrays |= {f"{side}_{key}": value for key, value in found.items()}
    return arrays


# ---------------------------------------------------------------- which model?


def brute_force(entries, rng, draws=400):
    """Mean AUROC over entries in draws of whole validation patients, by counting pairs."""
    column = entries[0].column("PNEUMONIA", "val")
    people, found = np.unique(column.patients), []
    for _ in range(draws):
        chosen = rng.choice(people, len(people))
        images = np.concatenate([np.flatnonzero(column.patients == person) for person in chosen])
        found.append(images)
    return [
        [
            np.mean([auroc_of_pairs(column.truth[i], e.column("PNEUMONIA", "val").scores[i]) for e in seeds])
            for i in found
        ]
        for seeds in entries_of(entries)
    ]


def auroc_of_pairs(truth, scores):
    """The share of pairs of a sick and a healthy image in which the sick one's score is higher."""
    differences = scores[truth == 1][:, None] - scores[truth == 0]
    return ((differences > 0) + (differences == 0) / 2).mean()


def entries_of(entries):
    """Entries by recipe: those of one learning rate belong together."""
    found = {}
    for e in entries:
        found.setdefault(e.results["recipe"]["lr"], []).append(e)
    return found.values()


def test_who_remains_is_what_an_independent_bootstrap_says(tmp_path):
    """A recipe of two seeds, one that is as good, one clearly worse, and one of other validation images."""
    base = noisy_scores(0)
    made = {
        "good-seed0": (base, 0, 1.0),
        "good-seed1": (shifted(base, 0.1, seed=1), 1, 1.0),
        "alike": (shifted(base, 0.1, seed=3), 0, 2.0),
        "worse": (shifted(base, -1.6, seed=3), 0, 3.0),
    }
    entries = []
    for name, (scores, seed, rate) in made.items():
        run = write_run(tmp_path / name, seed, scores=scores, recipe=recipe(rate), rule=RULE)
        entries.append(Entry(run))
    [standing] = standings(entries)
    assert [c.name for c in standing.remaining] == [b.candidate.name for b in standing.behind[:2]]
    assert "worse" in standing.behind[2].candidate.name and not standing.behind[2].remains
    draws = np.array(brute_force(entries, np.random.default_rng(1)))
    means = [np.mean([e.row("PNEUMONIA", "val", "at_rec")["auroc"] for e in s]) for s in entries_of(entries)]
    best = int(np.argmax(means))
    errors = np.std(draws[best] - draws, axis=1, ddof=1)
    remaining = {k for k in range(3) if means[best] - means[k] <= errors[k]}
    assert remaining == {0, 1}
    by_rate = {b.candidate.entries[0].results["recipe"]["lr"]: b for b in standing.behind}
    for k in range(3):
        behind = by_rate[k + 1.0]
        assert behind.difference == pytest.approx(means[best] - means[k], abs=1e-9)
        assert behind.error == pytest.approx(errors[k], rel=0.25, abs=1e-9)  # 100 draws against 400
    text = to_markdown(which_blocks([standing]))
    assert "**Validation cannot tell**" in text and "no winner is named" in text and "2 of 3 models" in text
    assert "calibrate.py --site" in text and "audit.py --run" in text


def test_one_that_validation_prefers_is_named_with_its_distance(tmp_path):
    base = noisy_scores(0)
    a = Entry(write_run(tmp_path / "best", scores=base))
    b = Entry(write_run(tmp_path / "worse", 1, scores=shifted(base, -1.6), recipe=recipe(9)))
    [standing] = standings([b, a])
    text = to_markdown(which_blocks([standing]))
    ratio = standing.behind[1].difference / standing.behind[1].error
    assert (
        ratio > 1
        and f"**Validation prefers {a.name}**: AUROC" in text
        and f"{ratio:.1f} standard errors" in text
    )
    assert "not used to choose" in text
    alone = to_markdown(which_blocks(standings([a])))
    assert "nothing was compared" in alone


def test_a_choice_does_not_look_at_test(tmp_path):
    """Turning all test scores round changes neither who remains nor the order."""
    turned = []
    for sign in (1, -1):
        entries = []
        for k, by in enumerate((0.0, 0.3, -1.6)):
            scores = shifted(noisy_scores(0), by, seed=k)
            scores["test_logits"] = sign * scores["test_logits"]
            entries.append(Entry(write_run(tmp_path / f"{sign}/{k}", scores=scores, recipe=recipe(k))))
        [standing] = standings(entries)
        turned.append([(b.candidate.entries[0].run.folder.name, b.remains) for b in standing.behind])
    assert turned[0] == turned[1]


def test_models_on_other_validation_images_are_said_apart(tmp_path):
    others = noisy_scores(0)
    others["val_files"] = np.char.add(others["val_files"], ".png")
    a = Entry(write_run(tmp_path / "a"))
    b = Entry(write_run(tmp_path / "b", scores=others, recipe=recipe(2)))
    found = standings([a, b])
    assert len(found) == 2 and all(len(s.remaining) == 1 for s in found)
    assert "cannot be held against each other" in to_markdown(which_blocks(found))


def test_shortcut_readers_are_listed_apart(tmp_path):
    base = noisy_scores(0)
    reader = write_run(tmp_path / "reader", scores=base)
    write_audit(reader, "broken")
    other = write_run(tmp_path / "other", 1, scores=shifted(base, -1.6), recipe=recipe(2))
    [standing] = standings([Entry(reader), Entry(other)])
    assert [c.name for c in standing.remaining] == [Entry(other).name]
    text = to_markdown(which_blocks([standing]))
    assert f"**Audit first**. {Entry(other).name} is left only because nobody audited it" in text
    assert (
        f"Not in the choice, as its audit finds a shortcut: {Entry(reader).name}: It reads letters." in text
    )
    assert f"perhaps shortcut readers as well: {Entry(other).name}." in text

    write_audit(other, "kept")
    text = to_markdown(which_blocks(standings([Entry(reader), Entry(other)])))
    assert "the only one that the audit does not call a shortcut reader" in text


def test_where_all_are_shortcut_readers_the_least_bad_is_still_named(tmp_path):
    base = noisy_scores(0)
    best = write_run(tmp_path / "a", scores=base)
    worse = write_run(tmp_path / "b", 1, scores=shifted(base, -1.6), recipe=recipe(2))
    for run in (best, worse):
        write_audit(run, "broken")
    view = view_of([Entry(best), Entry(worse)], ASKED)
    assert [c.name for c in view.remaining] == [Entry(best).name] and len(view.candidates) == 2
    text = to_markdown(which_blocks(view.standings))
    assert f"none can be recommended. The least bad: **Validation prefers {Entry(best).name}**" in text
    assert text.count("Its audit finds a shortcut") == 2


def write_audit(run, verdict):
    shortcut = {"verdict": verdict, "text": "It reads letters."}
    side = dict(finding="PNEUMONIA", images=60, of_images=60, patients=30, lines=[], figures={}, others={})
    audit = dict(
        format=1, version=1, checkpoint=run.checkpoint_sha256, sides={"val": side | {"shortcut": shortcut}}
    )
    write_json(run.folder / "audit.json", audit)


def test_patients_needed():
    """n patients have the standard error s: 1.96 s / sqrt(N / n) equals the difference."""
    number = patients_needed(Behind(None, 0.002, 0.004), 500)
    assert 1.96 * 0.004 / np.sqrt(number / 500) == pytest.approx(0.002, rel=1e-3)
    assert patients_needed(Behind(None, 0.0, 0.004), 500) is None


# ---------------------------------------------------------------- which threshold?


def row_with(low, high, **counts):
    interval = {key: {"bootstrap": [low, high]} for key in ("recall", "specificity")}
    row = dict(tp=90, fn=10, tn=50, fp=50, recall=0.9, specificity=0.5, thr=0.5, interval=interval)
    return row | counts


@pytest.mark.parametrize(
    "missed, verdict", [(0, "kept"), (1, "kept"), (4, "not refuted"), (6, "not refuted"), (20, "broken")]
)
def test_what_is_left_of_a_floor(missed, verdict):
    """Of 75 sick patients, floor 0.9, by Clopper and Pearson: whoever misses fewer never stands worse."""
    scores = (np.arange(75) >= missed).astype(float)
    test = SimpleNamespace(truth=np.ones(75, int), scores=scores, patients=np.arange(75))
    row = row_with(0, 1)
    entry = SimpleNamespace(findings=["x"], min_recall=0.9, row=lambda *_: row, column=lambda *_: test)
    exact = binomtest(75 - missed, 75).proportion_ci(method="exact")
    assert recall_span(entry, "x", row) == pytest.approx((exact.low, exact.high))
    assert floor_verdict(entry, "x", row) == verdict


def test_who_calls_everybody_sick():
    few = dict(tn=49, fp=951)
    assert calls(row_with(0.9, 1, **few, tp=951, fn=49)) == EVERYBODY
    assert calls(row_with(0.9, 1, **few, tp=950, fn=50)) == "calls the healthy sick"
    assert calls(row_with(0.9, 1, tn=50, fp=950, fn=0)) == ""
    assert calls(row_with(0, 0.1, tp=0, fp=0, tn=100)) == "calls nobody sick"


def test_everybody_sick_and_broken_floors_are_marked_in_the_tables(tmp_path):
    """A model that ranks test backwards, one that is blind there, and a good one."""
    good, backwards, blind = many(0), many(0), many(0)
    backwards["test_logits"] = -backwards["test_logits"]
    blind["test_logits"] = blind["test_logits"] + np.array([0, 30], np.float32)
    entries = [Entry(write_run(tmp_path / "good", scores=good))]
    entries.append(Entry(write_run(tmp_path / "back", scores=backwards, recipe=recipe(2))))
    entries.append(Entry(write_run(tmp_path / "blind", scores=blind, recipe=recipe(3))))
    view = view_of(entries, ASKED)
    table = models_table(view.candidates)
    rows = {row[0]: dict(zip([f"{h}{g}" for h, g in heads(table)], row)) for row in table.rows}
    assert isinstance(rows["ViT scratch (back)"]["Recall@Rec"], Bad)
    assert rows["ViT scratch (blind)"]["Spec@Rec"] == (Bad("0.000"), f" {EVERYBODY}")
    assert isinstance(rows["ViT scratch (good)"]["Recall@Rec"], Best)  # the blind one's 1.000 is not eligible
    assert isinstance(rows["ViT scratch (blind)"]["Recall@Rec"], str)
    text = to_markdown(tables_module.section(view))
    assert "**broken ✗**" in text and text.count(EVERYBODY) > 3
    assert "hold for all findings at once, or what stands beside it." in text  # ✗, of promises
    assert f'"{EVERYBODY}": specificity is below 0.05, and recall above 0.95.' in legend(view)
    assert HEALTHY not in legend(view) and NOBODY not in legend(view)


def test_who_is_sick_by_a_finding_that_is_no_disease(tmp_path):
    """A threshold of No Finding that "calls everybody sick" calls everybody healthy: the report says it."""
    entry = entry_of(tmp_path / "a", many(0))
    remaining = view_of([entry], ASKED).remaining
    assert '"Sick"' not in to_markdown(threshold_blocks(remaining))
    entry.findings, entry.calibrated = ("No Finding",), {"No Finding": entry.calibrated["PNEUMONIA"]}
    text = to_markdown(threshold_blocks(remaining))
    assert '"Sick" means with the finding: of No Finding, the healthy.' in text


def test_the_legend_explains_the_phrases_of_its_table(tmp_path):
    """Scores turned upside down call the healthy and miss the sick; all low they call nobody."""
    upside_down, silent = many(0, strength=8.0), many(0)
    upside_down["test_logits"] = -upside_down["test_logits"]
    silent["test_logits"] = silent["test_logits"] - np.array([0, 30], np.float32)
    found = {}
    for name, scores in (("good", many(0)), ("down", upside_down), ("silent", silent)):
        found[name] = legend(view_of([entry_of(tmp_path / name, scores)], ASKED))
    assert not any(phrase in found["good"] for phrase in (EVERYBODY, HEALTHY, NOBODY))
    assert f'"{HEALTHY}": specificity is below 0.05, and recall not above 0.95.' in found["down"]
    assert f'"{NOBODY}": no score reaches the threshold.' in found["silent"]
    assert EVERYBODY not in found["down"] + found["silent"]


def heads(table):
    groups = [text for text, span in table.groups for _ in range(span)]
    return list(zip(table.head, groups))


# ---------------------------------------------------------------- can I trust it?


def test_interval_of_a_difference_is_newcombes():
    """56/70 minus 48/80 by method 10 of Newcombe (1998), Statistics in Medicine 17:873: 0.0524 to 0.3339."""
    rows = []
    for k, n in ((56, 70), (48, 80)):
        rows.append({"recall": k / n, "interval": {"recall": {"bootstrap": list(wilson_interval(k, n))}}})
    low, high = marks.difference_span(rows[1], rows[0], "recall", 1.0)
    assert low == pytest.approx(0.0524, abs=5e-5) and high == pytest.approx(0.3339, abs=5e-5)


def entry_of(folder, scores=None, **changes):
    return Entry(write_run(folder, scores=scores, rule=RULE, **changes))


def test_mark_of_the_floor(tmp_path):
    verdicts = {}
    for name, strength in (("kept", 5.0), ("open", 2.0), ("broken", -1.0)):
        entry = entry_of(tmp_path / name, many(1, strength=2.0, test_strength=strength))
        verdicts[name] = marks.floor_mark(entry, ASKED)
        recall = entry.row("PNEUMONIA", "test", "at_rec")["recall"]
        assert f"{recall:.3f}" in verdicts[name].text and "floor 0.9" in verdicts[name].text
    assert {name: mark.verdict for name, mark in verdicts.items()} == {n: n for n in verdicts}


def test_of_several_findings_the_mark_says_which_is_worth_nothing():
    """One that calls everybody sick keeps its floor, and breaks the mark; a broken floor comes first."""
    rows = {"a": row_with(0.95, 1, recall=1.0, fn=0, tn=0), "b": row_with(0.9, 1, recall=0.95)}
    test = SimpleNamespace(truth=np.ones(75, int), scores=np.ones(75), patients=np.arange(75))
    entry = SimpleNamespace(
        findings=["a", "b"],
        min_recall=0.9,
        row=lambda name, *_: rows[name],
        column=lambda *_: test,
        task=SimpleNamespace(alone=False),
    )
    mark = marks.floor_mark(entry, ASKED)
    assert mark.verdict == "broken" and mark.text.startswith(f"1 of 2 findings: {EVERYBODY}; lowest a: 1.000")
    test.scores = np.arange(75) / 75
    assert marks.floor_mark(entry, ASKED).text.startswith("2 of 2 findings: broken; lowest b: 0.950")


def test_a_threshold_never_reads_as_0_or_1():
    shown = {0.5: "0.5000", 0.00123: "0.0012", 1.866e-7: "1.87e-07", 0.99995: "0.9999500"}
    shown |= {0: "0.0000", 1: "1.0000"}
    assert {threshold: four_digits(threshold) for threshold in shown} == shown


def test_runs_with_joint_guarantees_are_no_seeds_of_others(tmp_path):
    entries = [Entry(write_run(tmp_path / f"x-seed{seed}", seed)) for seed in range(2)]
    assert entries[0].family == entries[1].family
    entries[1].calibration["jointly"] = {"findings": 1, "confidence": 0.95}
    assert entries[0].family != entries[1]._family()
    tell_apart(entries)
    assert [e.name.endswith(" (jointly)") for e in entries] == [False, True]


def test_rec_is_guaranteed_where_it_does_not_lie_above_guar(tmp_path):
    """@Guar then costs nothing, which the report and calibrate.py say; of several seeds, which ones."""
    seeds = [Entry(write_run(tmp_path / f"x-seed{k}", k, scores=many(0))) for k in range(2)]
    every = [e.calibrated["PNEUMONIA"] for e in seeds]
    assert not any(map(guaranteed_too, every))
    [standing] = standings(seeds)
    costs = "for new patients like those: it costs specificity"
    assert f"{costs}. On test" in to_markdown(threshold_blocks(standing.remaining))
    every[0]["guarantee"]["threshold"] = every[0]["threshold"]
    text = to_markdown(threshold_blocks(standing.remaining))
    assert f"{costs} where it lies below @Rec, and elsewhere @Rec is guaranteed, too. On test" in text
    assert threshold_text(every[0]).endswith("; @Rec is not above @Guar, so it is guaranteed too")
    every[1]["guarantee"]["threshold"] = every[1]["threshold"]
    text = to_markdown(threshold_blocks(standing.remaining))
    assert "so @Rec is guaranteed for new patients like those, too. On test" in text and "costs" not in text
    every[0]["guarantee"]["threshold"] = None
    assert not guaranteed_too(every[0]) and not guaranteed_too({"why_not": "too few"})


def test_mark_of_validation_like_test(tmp_path):
    few = entry_of(tmp_path / "few", noisy_scores(0))
    alike = entry_of(tmp_path / "alike", many(2, count=1600, strength=3.0))
    other = entry_of(tmp_path / "other", many(2, strength=3.0, test_strength=0.5))
    found = [marks.transport_mark(entry, ASKED) for entry in (alike, few, other)]
    assert [mark.verdict for mark in found] == ["kept", "open", "broken"]
    assert "too few patients to exclude" in found[1].text and "→" in found[2].text


def test_chance_of_a_calibration_error(tmp_path):
    """Labels drawn by the scores: p-values are not small too often. Scores that are too sure: they are."""
    rng = np.random.default_rng(0)
    p = rng.random((60, 300))
    right = [p_of(p[k], rng.random(300) < p[k]) for k in range(60)]
    assert 0.2 < np.mean(np.array(right) < 0.5) < 0.8 and np.mean(np.array(right) < 0.05) < 0.15
    wrong = p_of(p[0], rng.random(300) < 0.5)
    assert wrong == pytest.approx(1 / 1000)


def p_of(scores, truth):
    people = np.arange(len(scores)).astype(str)
    column = SimpleNamespace(scores=scores, truth=truth.astype(int), patients=people)
    return marks.chance_of_error(SimpleNamespace(column=lambda *_: column), "x")


def test_mark_of_probabilities(tmp_path):
    good = many(3, count=1600, strength=2.0)
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 2, 1600).astype(np.float32)
    for side in ("val", "test"):  # the truth is drawn by the scores, so these are probabilities
        good[f"{side}_logits"] = np.stack([np.zeros(1600), odds], axis=1).astype(np.float32)
        good[f"{side}_labels"] = (rng.random(1600) < 1 / (1 + np.exp(-odds))).astype(np.int64)
    sure = {**good, "test_logits": good["test_logits"] * 6}
    few = {**{k: v for k, v in good.items() if k.startswith("val")}}
    few |= {k: v[:30] for k, v in good.items() if k.startswith("test")}
    found = [
        marks.probability_mark(entry_of(tmp_path / n, s), ASKED)
        for n, s in dict(a=good, b=few, c=sure).items()
    ]
    assert [mark.verdict for mark in found] == ["kept", "open", "broken"]


def test_mark_of_groups(tmp_path):
    scores, verdicts = many(4, count=800, strength=2.0, test_strength=6.0), []
    for name, weak in (("kept", 0.0), ("open", None), ("broken", 8.0)):
        changed = {**scores, "test_logits": scores["test_logits"].copy()}
        sexes = np.where(np.arange(800) // 2 % 3 == 0, "F", "M")
        if weak is not None:
            changed |= {"test_cohort_sex": sexes, "val_cohort_sex": sexes}
            changed["test_logits"][sexes == "F", 1] -= weak
        verdicts.append(marks.group_mark(entry_of(tmp_path / name, changed), ASKED))
    assert [mark.verdict for mark in verdicts] == ["kept", "open", "broken"]
    assert "sex F" in verdicts[2].text


def test_a_group_below_the_floor_that_chance_may_explain_is_told(monkeypatch):
    """The table of groups says BROKEN of it: the mark is open, and says why. Each of three findings has such
    a group by chance with 0.025: 1 - 0.975^3 = 0.07."""
    spans = {"a": (0.82, 0.685, 0.915), "b": (0.98, 0.96, 0.99), "c": (0.97, 0.9, 0.99)}

    def groups(entry, name, side, asked):
        value, low, high = spans[name]
        row = dict(value=value, lo=low, hi=high, broken=high < 0.95)
        return {"groups": [("sex", "F")], "figures": {"recall @Rec": [row]}}, []

    monkeypatch.setattr(marks, "groups_on", groups)
    entry = SimpleNamespace(findings=["a", "b", "c"], min_recall=0.95, row=lambda *where: True)
    entry.task = SimpleNamespace(alone=False)
    mark = marks.group_mark(entry, ASKED)
    assert mark.verdict == "open" and mark.text == (
        "1 of 3 groups lies below it by its own interval, which chance among 3 findings may explain "
        "(p 0.07); lowest a: sex F 0.820 [0.685, 0.915]"
    )
    spans["b"] = spans["a"]
    assert marks.group_mark(entry, ASKED).verdict == "broken"  # two of three: 0.002
    spans["a"] = spans["b"] = spans["c"]
    assert marks.group_mark(entry, ASKED).text.startswith("3 of 3 groups could be under it")


@pytest.mark.parametrize(
    "split, verdict",
    [
        ({"shared_patients_test": 0}, "kept"),
        ({}, "open"),
        ({"shared_patients_test": 0, "unknown_patients": 7}, "open"),
        ({"shared_patients_test": 0, "unknown_patients": 260}, "open"),
        ({"shared_patients": 3}, "broken"),
        ({"shared_patients_test": 2}, "broken"),
    ],
)
def test_mark_of_patients(tmp_path, split, verdict):
    entry = entry_of(tmp_path / "a", split=split)
    assert marks.patients_mark(entry, ASKED).verdict == verdict
    # Unknown patients of test may be on two sides.
    entry.people["test"]["unknown_patients"] = 12
    assert marks.patients_mark(entry, ASKED).verdict == ("open" if verdict == "kept" else verdict)


@pytest.mark.parametrize(
    "copies, alike, verdict",
    [
        (0, 0, "kept"),
        (None, 0, "open"),
        (0, None, "open"),
        (2, 0, "broken"),
        (0, 1, "broken"),
        (None, 1, "broken"),
    ],
)
def test_mark_of_copies(tmp_path, copies, alike, verdict):
    pairs = ("val_train", "test_train", "test_val")
    split = {} if copies is None else {"copies": dict.fromkeys(pairs, copies)}
    run = write_run(tmp_path / "a", split=split)
    calibration = run.calibration()
    if alike is not None:
        calibration["alike"] = dict.fromkeys(pairs, alike)
    run.save_calibration(calibration, run.scores())
    assert marks.copies_mark(Entry(run), ASKED).verdict == verdict


def test_marks_of_audit_and_of_enough_patients(tmp_path):
    run = write_run(tmp_path / "a")
    assert marks.shortcut_mark(Entry(run), ASKED)[:2] == ("open", "not audited")
    for verdict in ("kept", "open", "broken"):
        write_audit(run, verdict)
        assert marks.shortcut_mark(Entry(run), ASKED)[:2] == (verdict, "It reads letters.")
    # At a floor of 0.9 and confidence 0.9, 0.9^22 < 0.1 < 0.9^21: 22 patients are needed; here are 15.
    mark = marks.promise_mark(Entry(run), ASKED)
    assert mark[:2] == ("broken", "15 validation patients with it, 22 needed")
    assert marks.promise_mark(entry_of(tmp_path / "b", many(0)), ASKED).verdict == "kept"


def test_the_worst_seed_speaks_for_a_recipe():
    found = marks.worst([marks.Mark("kept", "a"), marks.Mark("broken", "b"), marks.Mark("open", "c")])
    assert found[:2] == ("broken", "b (worst of 3 seeds)")
    assert marks.worst([marks.Mark("open", "c")]).text == "c"


# ---------------------------------------------------------------- the table and its order


def test_sort_and_top(tmp_path):
    """--sort orders by a column, --top cuts and says how many are left out; a wrong name lists the right."""
    for k in range(3):
        write_run(tmp_path / f"outputs/r{k}", scores=noisy_scores(k + 1), recipe=recipe(k), minutes=5.0 - k)

    def order(*flags):
        done = succeed("compare", *flags, cwd=tmp_path)
        [table] = [t for t in tables(done.out) if "Recall @0.5" in t[0]]
        return table, done.out

    table, text = order("--sort", "time (min)")
    assert [row[0] for row in table[1:]] == [f"ViT scratch (r{k})" for k in (2, 1, 0)]
    table, text = order("--sort", "Spec @Rec", "--top", 2)
    shown = [float(re.search(r"[\d.]+", row[table[0].index("Spec @Rec")])[0]) for row in table[1:]]
    every, _ = order()
    specificities = [float(re.search(r"[\d.]+", row[every[0].index("Spec @Rec")])[0]) for row in every[1:]]
    assert shown == sorted(specificities, reverse=True)[:2] and "Left out by --top: 1 of 3 models" in text
    refused(cli("compare", "--sort", "speed", cwd=tmp_path), "--sort", "speed", "Recall @Rec", "AUROC val")
    refused(cli("compare", "--top", "0", cwd=tmp_path), "--top")


def test_sort_by_a_column_that_one_section_lacks(tmp_path, capsys):
    """Of one finding there are other columns than of several: only a section that has the column is sorted,
    and the usual order of the others is said."""
    ones = [write_run(tmp_path / f"r{k}", scores=noisy_scores(k), recipe=recipe(k)) for k in (1, 2)]
    one = view_of([Entry(run) for run in ones], ASKED)
    classes, names = ["Normal", "a", "b"], np.array([f"{i}.png" for i in range(400)])
    scores = several(Task(tuple(classes))) | {f"{side}_files": names for side in ("val", "test")}
    many_findings = Entry(write_run(tmp_path / "s", scores=scores, data={"classes": classes}))
    other = view_of([many_findings], ASKED)
    ordered, kept = in_order_of([one, other], "spec @rec")
    figures = [c.entries[0].row("PNEUMONIA", "test", "at_rec")["specificity"] for c in ordered.candidates]
    assert figures == sorted(figures, reverse=True) and kept is other
    said = f"note: --sort spec @rec: {many_findings.set} has no such column: its usual order stays"
    assert said in capsys.readouterr().err
    with pytest.raises(InputError, match="'speed': there is no such column; .*Spec @Rec.*Kept floors @Rec"):
        in_order_of([one, other], "speed")


def test_of_many_models_only_pairs_with_the_first(tmp_path):
    for k in range(6):
        write_run(tmp_path / f"outputs/r{k}", scores=noisy_scores(k % 2), recipe=recipe(k))
    done = succeed("compare", cwd=tmp_path)
    [pairs] = [t for t in tables(done.out) if t[0][0] == "Pair"]
    [main] = [t for t in tables(done.out) if "Recall @0.5" in t[0]]
    assert len(pairs) - 1 == 5 and all(row[0].startswith(f"{main[1][0]} minus ") for row in pairs[1:])
    assert "first in the table above is held against each other one" in done.out
    assert "longer tables below leave out 1 of these runs" in done.out


# ---------------------------------------------------------------- --list


def test_list_of_runs(tmp_path):
    """Every state a folder can be in, and last.pth of finished runs alone as what may go."""
    outputs = tmp_path / "outputs"
    done = write_run(outputs / "done")
    (done.folder / "last.pth").write_bytes(b"x" * 3_000_000)
    half = write_run(outputs / "half", 1, finished=False, recipe={"amp": False, "epochs": 9})
    (half.folder / "last.pth").write_bytes(b"x" * 1000)
    again = write_run(outputs / "again's", 2)
    again.checkpoint.write_bytes(b"other weights")
    (write_run(outputs / "new", 3).folder / "calibration.json").unlink()
    (write_run(outputs / "broken", 4).folder / "results.json").write_text("{")
    write_run(outputs / "gone", 5).checkpoint.unlink()
    (outputs / "figures").mkdir()
    out = succeed("compare", "--list", cwd=tmp_path).out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "finished, calibrated" in lines["outputs/done"] and lines["outputs/done"].endswith(" 3.0")
    assert "interrupted after epoch 3 of 9" in lines["outputs/half"]
    assert "calibrated for another checkpoint" in lines["outputs/again's"]
    assert "finished, not calibrated" in lines["outputs/new"] and "damaged: " in lines["outputs/broken"]
    assert "checkpoint.pth is gone" in lines["outputs/gone"]
    assert "6 run folders" in out and "rm -- outputs/done/last.pth" in out and "half/last.pth" not in out
    assert "1 other folder holds no run: figures" in out
    one = succeed("compare", "--list", "--run", "outputs/new", cwd=tmp_path).out
    assert "outputs/new" in one and "outputs/done" not in one and "no last.pth" in one
    refused(cli("compare", "--list", "--runs-dir", "nowhere", cwd=tmp_path), "no run folders")
    refused(cli("compare", "--list", "--top", 2, cwd=tmp_path), "--list", "--top")
    refused(cli("compare", "--list", "--run", "outputs/figures", cwd=tmp_path), "outputs/figures")


def test_one_threshold_of_several_findings_is_named(tmp_path, monkeypatch):
    entry = Entry(write_run(tmp_path / "a"))
    candidate = view_of([entry], ASKED).candidates[0]
    ((first, *_),) = lines_of(candidate, "at_rec")
    assert first.endswith(", @Rec ")
    rows = entry.row
    monkeypatch.setattr(entry, "findings", ("PNEUMONIA", "Edema", "Mass"))
    monkeypatch.setattr("report.answers.threshold.alone", lambda entries: False)
    monkeypatch.setattr(entry, "row", lambda name, *at: rows(name, *at) if name == "PNEUMONIA" else None)
    ((first, *_),) = lines_of(candidate, "at_rec")
    assert first.endswith(", @Rec, PNEUMONIA alone (2 other findings have none) ")


def test_images_of_unknown_patients_are_no_patients(tmp_path):
    entry = Entry(write_run(tmp_path / "a"))
    for known, unknown, words in (
        (184, 231, "184 and 231 images of unknown patients in validation"),
        (184, 0, "patients: 184 validation"),
        (0, 231, "patients: unknown validation"),
    ):
        entry.people["val"] |= {"patients": known, "unknown_patients": unknown}
        assert words in sizes(entry)


# ---------------------------------------------------------------- plots


def test_plots_take_axes_and_return_them(tmp_path):
    """Each draws on the axes it is given, and what it draws is in the scores."""
    entry = Entry(write_run(tmp_path / "a"))
    several = [plots.roc, plots.precision_recall, plots.decision]
    for draw in several:
        figure, ax = plt.subplots()
        assert draw(ax, [entry]) is ax and ax.get_lines()
        plt.close(figure)
    for draw in (plots.confusion, plots.scores, plots.reliability, plots.findings):
        figure, ax = plt.subplots()
        assert draw(ax, entry) is ax and ax.has_data()
        plt.close(figure)
    figure, ax = plt.subplots()
    line = plots.roc(ax, [entry]).get_lines()[0]
    area = np.trapezoid(line.get_ydata(), line.get_xdata())
    assert area == pytest.approx(entry.row("PNEUMONIA", "test", "at_rec")["auroc"])
    [circle] = [x for x in ax.get_lines() if x.get_marker() == "o"]
    row = entry.row("PNEUMONIA", "test", "at_rec")
    assert (circle.get_xdata()[0], circle.get_ydata()[0]) == (1 - row["specificity"], row["recall"])
    plt.close(figure)


def test_rec_on_the_decision_curve(tmp_path):
    """The circle is the net benefit of the decisions @Rec, at the probability its threshold stands for."""
    entry = Entry(write_run(tmp_path / "a"))
    figure, ax = plt.subplots()
    plots.decision(ax, [entry])
    [circle] = [line for line in ax.get_lines() if line.get_marker() == "o"]
    chance, benefit = float(circle.get_xdata()[0]), float(circle.get_ydata()[0])
    row, n = entry.row("PNEUMONIA", "test", "at_rec"), len(entry.column("PNEUMONIA", "test").truth)
    assert benefit == pytest.approx(row["tp"] / n - row["fp"] / n * chance / (1 - chance))
    plt.close(figure)


def test_probability_of_a_threshold_between_images():
    """Platt scaling, and a temperature, of any threshold: that of a score at the threshold itself."""
    scores = np.array([0.03, 0.4, 0.41, 0.9, 0.62])
    for slope, bias in ((1 / 0.268, 0.0), (0.4, -1.3)):
        scaled = expit(slope * logit(scores) + bias)
        column = SimpleNamespace(scores=scores, probabilities=scaled)
        for threshold in (0.05, 0.39178, 0.41, 0.5, 0.899):
            expected = expit(slope * logit(threshold) + bias)
            assert plots.probability_at(column, threshold) == pytest.approx(expected, abs=1e-9)
        assert plots.probability_at(column, 0.95) == 1.0
        assert plots.probability_at(column, 0.01) == pytest.approx(scaled.min())
    sure = SimpleNamespace(scores=np.array([0.0, 1.0]), probabilities=np.array([0.0, 1.0]))
    assert plots.probability_at(sure, 0.5) == pytest.approx(0.5)


@pytest.mark.parametrize("count", [3, 10])
def test_one_colour_a_model(tmp_path, count):
    """Different colours of up to eight models; of more, those that do not remain are grey."""
    entries = []
    for k in range(count):
        scores = shifted(noisy_scores(0), 0.0 if k < 2 else -1.8, seed=k)
        entries.append(Entry(write_run(tmp_path / f"r{k}", scores=scores, recipe=recipe(k))))
    view = view_of(entries, ASKED)
    styles = figures.styles_of(view)
    colours = [styles[e]["color"] for c in view.remaining for e in c.entries]
    assert set(colours) <= set(COLOURS) and len(set(colours)) == len(colours)
    others = {styles[e]["color"] for e in entries} - set(colours)
    assert others == {GREY} if count == 10 else GREY not in others
    figure, _ = figures.draw_roc(view.shown, [styles[e] for e in view.shown])
    drawn = [to_hex(line.get_color()) for line in figure.axes[0].get_lines()[::3][:count]]
    assert drawn == [styles[e]["color"].lower() for e in view.shown]
    plt.close(figure)


def test_seeds_of_a_recipe_share_their_colour(tmp_path):
    runs = [write_run(tmp_path / f"s-seed{k}", k) for k in range(2)]
    other = write_run(tmp_path / "o", 3, recipe=recipe(1))
    styles = figures.styles_of(view_of([Entry(run) for run in (*runs, other)], ASKED))
    by_name = {e.run.folder.name: style for e, style in styles.items()}
    assert by_name["s-seed0"]["color"] == by_name["s-seed1"]["color"] != by_name["o"]["color"]
    assert by_name["s-seed0"]["linestyle"] != by_name["s-seed1"]["linestyle"]
    made = write_ensemble(tmp_path / "e", runs)
    view = view_of([Entry(run) for run in (*runs, other, made)], ASKED)
    [ensemble] = [e for e in view.entries if e.members]
    styles = figures.styles_of(view)
    assert styles[ensemble]["color"] in COLOURS and ensemble in view.shown
    first, second = (style for e, style in styles.items() if e.run.folder.name.startswith("s-seed"))
    assert first["color"] == second["color"] not in (GREY, styles[ensemble]["color"])
    assert first["linestyle"] != second["linestyle"]
    assert only_top(view, 1).left_out == 1 and len(in_order_of([view], "Model")[0].candidates) == 2


def test_marks_are_links_to_sections_that_are_there(tmp_path):
    run = write_run(tmp_path / "outputs/a")
    write_audit(run, "open")
    out = succeed("compare", cwd=tmp_path).out
    headings = [line.lstrip("# ").lower() for line in out.splitlines() if line.startswith("#")]
    anchors = {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in headings}
    links = re.findall(r"\]\(#([^)]*)\)", out)
    assert len(links) >= 7 and set(links) <= anchors
    assert json.loads((run.folder / "audit.json").read_text())["version"] == 1


def test_the_legend_of_several_findings_names_models_alone(tmp_path):
    """Each curve is followed by its point; no model has the AUROC of one finding beside its name."""
    classes, names = ["Normal", "a", "b"], np.array([f"{i}.png" for i in range(400)])
    files, entries = {f"{side}_files": names for side in ("val", "test")}, []
    for k in range(3):
        scores = several(Task(tuple(classes)), seed=k) | files
        entries.append(Entry(write_run(tmp_path / f"r{k}", k, scores=scores, data={"classes": classes})))
    view = view_of(entries, ASKED)
    figure, _ = figures.draw_roc(view.shown, [figures.styles_of(view)[e] for e in view.shown])
    labels = {line.get_label() for ax in figure.axes for line in ax.get_lines()}
    assert {e.name for e in entries} <= {" ".join(text.split()) for text in labels}
    assert not any("AUROC" in text for text in labels)
    plt.close(figure)
