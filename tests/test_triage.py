"""Tests of the triage: @In by brute force, its promise by the exact tail and by simulation, the commands."""

import csv
import io
import json
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

import monitor
from calibration import site as site_module
from calibration import triage, wording
from calibration.operating_point import Rule, evaluate
from common.console import InputError
from common.task import Task
from metrics import choose_threshold_with_guarantee
from records.run import Run
from report.tables.triage import triage_blocks
from tests.shared import cli, middle_below, of_one, read_json, refused, succeed

RULE = Rule(min_specificity=0.9, bootstrap=100)
WORDS = ("negative", "unsure", "positive")


def one_each(y):
    """A patient an image: [N]."""
    return np.arange(len(y)).astype(str)


def brute_force_rule_in(y, p, floor):
    """(recall, specificity, threshold), exact, of the best of all distinct scores; None where no positive is
    found at any with the specificity."""
    best = None
    for threshold in sorted(set(p)):
        called = [score >= threshold for score in p]
        tp = sum(c and t for c, t in zip(called, y))
        tn = sum(not c and not t for c, t in zip(called, y))
        specificity = Fraction(tn, len(y) - sum(y))
        if tp and float(specificity) >= floor:
            best = max(best or (0, 0, 0), (Fraction(tp, sum(y)), specificity, threshold))
    return best


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 12)), min_size=2, max_size=40),
    st.sampled_from([0.5, 0.8, 0.9, 0.95, 1.0]),
)
def test_rule_in_against_all_thresholds(images, floor):
    y, p = np.array([int(sick) for sick, _ in images]), np.array([score / 12 for _, score in images])
    if len(set(y)) < 2:
        return
    best = brute_force_rule_in(y.tolist(), p.tolist(), floor)
    if best is None:
        with pytest.raises(InputError, match="none of the sick is found"):
            triage.choose_threshold_by_min_specificity(y, p, floor)
        return
    threshold, recall, specificity = triage.choose_threshold_by_min_specificity(y, p, floor)
    assert (recall, specificity, threshold) == tuple(map(float, best))
    # What is kept lies between two scores, and decides in the same way.
    kept = triage.choose_rule_in(y, p, one_each(y), Rule(min_specificity=floor))
    assert ((p >= kept["threshold"]) == (p >= threshold)).all()


@pytest.mark.parametrize("floor, confidence", [(0.95, 0.95), (0.9, 0.95), (0.95, 0.9), (0.8, 0.6)])
def test_guarantee_is_the_order_statistic_of_the_exact_tail(floor, confidence):
    """Three images a patient, of whom one in four is seen sick later: the k-th highest score, with the least
    k whose tail, summed in fractions, is small enough."""
    rng = np.random.default_rng(0)
    for n in (11, 22, 45, 59, 80, 137):
        y = np.r_[np.zeros(3 * n, int), np.ones(n // 4, int)]
        p = np.round(0.01 + 0.98 * rng.random(len(y)), 2)  # many ties, none at 0 or 1
        patients = np.r_[np.repeat(np.arange(n), 3), np.arange(n // 4)].astype(str)
        maxima = sorted(p[: 3 * n].reshape(n, 3).max(axis=1))
        share, kept = Fraction(str(floor)), None
        for k in range(1, n + 1):
            tail = sum(math.comb(n, j) * share**j * (1 - share) ** (n - j) for j in range(k, n + 1))
            if tail <= 1 - Fraction(str(confidence)):
                kept = maxima[k - 1]
                break
        if kept is None:
            assert floor**n > 1 - confidence
            with pytest.raises(InputError, match=f"{n} patients without it .* at least"):
                triage.choose_rule_in_with_guarantee(y, p, floor, confidence, patients)
            continue
        threshold, gap = triage.choose_rule_in_with_guarantee(y, p, floor, confidence, patients)
        above = [score for score in p if score > kept]
        expected = middle_below(min(above), p) if above else 1 / (1 + (1 - kept) / kept * math.exp(-0.5))
        assert threshold == pytest.approx(expected, rel=1e-9) and gap > 0
        assert threshold > kept and not any(kept < score < threshold for score in p)


def test_needed_for_the_specificity():
    """59 patients without it for 0.95 with confidence 0.95; images of one patient are no patients."""
    y, p = np.r_[np.zeros(118, int), 1], np.linspace(0, 0.9, 119)
    with pytest.raises(InputError, match="at least 59 are needed"):
        triage.choose_rule_in_with_guarantee(y, p, 0.95, 0.95, np.r_[np.repeat(np.arange(58), 2), 0, 0, 99])
    threshold, _ = triage.choose_rule_in_with_guarantee(y, p, 0.95, 0.95, np.r_[np.arange(118) // 2, 99])
    assert threshold > p[y == 0].max()  # positive only above the highest of all
    found = triage.choose_rule_in(y[60:], p[60:], np.arange(59), RULE)
    assert "at least 29 are needed" not in str(found) and found["guarantee"]["negative_patients"] == 58
    # What so few can promise is what they are granted, and no more.
    few, less = np.repeat(np.arange(59), 2) // 2 * 2, 0.05 ** (1 / 30)
    assert f"; so few can promise {math.floor(1000 * less) / 1000:g}" in triage.promised_instead(30, 0.95)
    assert len(set(few)) == 30
    for floor in (0.904, 0.905):
        if floor <= less:
            triage.choose_rule_in_with_guarantee(y, p, floor, 0.95, np.r_[few, 99])
            continue
        with pytest.raises(InputError, match="so few can promise 0.904"):
            triage.choose_rule_in_with_guarantee(y, p, floor, 0.95, np.r_[few, 99])
    with pytest.raises(InputError, match="at least 59"):
        triage.choose_rule_in(y[61:], p[61:], np.arange(58), Rule(min_specificity=0.95, strict=True))


def test_the_promises_hold_alone_and_both_at_once():
    """300 hospitals of 77 sick and 77 healthy patients with two images each. A healthy patient's higher score
    is below t with chance t^2; a sick one's image is above it with 1 - t^3."""
    rng, confidence, broken = np.random.default_rng(5), 0.9, []
    y = np.repeat([0, 1], 154)
    patients = np.repeat(np.arange(154), 2).astype(str)
    for _ in range(300):
        p = np.where(y == 1, rng.random(308) ** (1 / 3), rng.random(308))
        upper, _ = triage.choose_rule_in_with_guarantee(y, p, 0.95, confidence, patients)
        lower, _, _ = choose_threshold_with_guarantee(y, p, 0.95, confidence, patients)
        broken.append((upper**2 < 0.95, 1 - lower**3 < 0.95))
    specificity, recall = np.transpose(broken)
    most = binom.ppf(0.999, 300, 1 - confidence)
    assert 10 < specificity.sum() <= most and recall.sum() <= most  # kept, and little is given away
    assert (specificity | recall).sum() <= binom.ppf(0.999, 300, 2 * (1 - confidence))


def test_awkward_scores():
    """All equal; one healthy image; a specificity of 1; healthy scores of 1; more than one at the top."""
    y = np.array([0, 0, 1, 1])
    equal = triage.choose_rule_in(y, np.full(4, 0.3), one_each(y), RULE)
    assert equal["threshold"] is None and "none of the sick is found" in equal["why_not"]
    assert triage.answers(np.full(4, 0.3), 0.2, None).tolist() == [1, 1, 1, 1]  # nobody is positive
    alone = triage.choose_rule_in(y[1:], np.array([0.5, 0.4, 0.6]), one_each(y[1:]), RULE)
    assert alone["threshold"] == pytest.approx(middle_below(0.6, [0.4, 0.5, 0.6]))
    strictest = triage.choose_rule_in(
        y, np.array([0.2, 0.7, 0.6, 0.9]), one_each(y), Rule(min_specificity=1.0)
    )
    assert strictest["threshold"] == pytest.approx(middle_below(0.9, [0.2, 0.7, 0.6, 0.9]))
    assert "a specificity of 1 cannot be guaranteed" in strictest["guarantee"]["why_not"]
    assert triage.raised_to_midpoint(0.5, np.array([0.2, 0.5]))[0] == pytest.approx(1 / (1 + math.exp(-0.5)))
    near = np.nextafter(1, 0)
    for top in (near, 0.5, 0.0, 1e-300):
        assert top < triage.raised_to_midpoint(top, np.array([0.0, top]))[0] <= 1
    assert triage.raised_to_midpoint(near, np.array([near, 1.0])) == (1.0, 0.0)  # no double lies between
    with pytest.raises(InputError, match="score 1"):
        triage.raised_to_midpoint(1.0, np.array([0.2, 1.0]))
    for wrong in (0, 1.01, float("nan")):
        with pytest.raises(InputError):
            Rule(min_specificity=wrong)


def test_the_warning_is_of_the_threshold_that_decides():
    """Where @In is not above @Rec, its own specificity matters to nobody."""
    good, bad = {"tp": 5, "fp": 1, "tn": 99, "fn": 0}, {"tp": 5, "fp": 30, "tn": 70, "fn": 0}
    rule_in = {"threshold": 0.3, "min_specificity": 0.9}
    found = {"threshold": 0.4, "rule_in": rule_in, "test": {"at_rec": good, "at_in": bad}}
    assert wording.rule_in_warnings(found, "test") == []
    found["threshold"] = 0.2
    assert wording.rule_in_warnings(found, "test") == ["@In: specificity 0.700 is below the floor of 0.9"]
    found |= {"threshold": 0.4, "test": {"at_rec": bad, "at_in": good}}
    assert wording.rule_in_warnings(found, "test") == ["@Rec: specificity 0.700 is below the floor of 0.9"]
    assert wording.rule_in_warnings({"test": {"at_in": bad}}, "test") == []


def test_shares_are_counts():
    rng = np.random.default_rng(1)
    y, p = rng.integers(0, 2, 60), np.round(rng.random(60), 1)
    patients = rng.integers(0, 25, 60).astype(str)
    found = triage.shares(y, p, patients, (0.3, 0.7), 200)
    for name, members in (("sick", y == 1), ("healthy", y == 0), ("all", y >= 0)):
        group, score = found[name], p[members]
        counts = [(score < 0.3).sum(), ((score >= 0.3) & (score < 0.7)).sum(), (score >= 0.7).sum()]
        assert [group[word]["count"] for word in WORDS] == counts and group["n"] == members.sum()
        assert group["patients"] == len(set(patients[members]))
        for word, count in zip(WORDS, counts):
            assert group[word]["value"] == pytest.approx(count / members.sum())
            assert group[word]["lo"] <= group[word]["value"] <= group[word]["hi"]
    turned = triage.shares(y, p, patients, (0.7, 0.3), 200)["sick"]  # @In below @Rec: @Rec decides
    assert turned["unsure"]["count"] == 0 and turned["positive"]["count"] == (p[y == 1] >= 0.7).sum()
    # Where every draw is the same, the interval is that of the patients: not of width 0.
    assert 0 < turned["unsure"]["hi"] < 0.3 and turned["unsure"]["lo"] == 0
    single = triage.shares(y, p, patients, (0.3, None), 200)["all"]
    assert single["positive"]["count"] == 0


# ---------------------------------------------------------------- calibrations


def drawn(rng, n, outputs=2):
    """Scores of a made-up model for `evaluate`: classes 0..K-1, two images a patient."""
    arrays = {}
    for side in ("val", "test"):
        labels = np.repeat(rng.integers(0, outputs, n), 2)
        logits = rng.normal(size=(2 * n, outputs)).astype(np.float32)
        logits[np.arange(2 * n), labels] += 1.2
        patients = np.repeat([f"{side}{i}" for i in range(n)], 2)
        files = np.array([f"{side}{i}.png" for i in range(2 * n)])
        arrays |= {f"{side}_labels": labels, f"{side}_logits": logits}
        arrays |= {f"{side}_patients": patients, f"{side}_files": files}
    return arrays


def keys_of(value, name=""):
    """All dotted names of keys."""
    if not isinstance(value, dict):
        return {name}
    found = set()
    for key, inner in value.items():
        found |= {f"{name}.{key}"} | keys_of(inner, f"{name}.{key}")
    return found


def test_calibrations_without_it_are_as_they_were():
    """Asking adds keys, and changes no figure; without asking there is none of them."""
    arrays = drawn(np.random.default_rng(0), 70)
    plain, _ = evaluate(arrays, Rule(bootstrap=100))
    asked, _ = evaluate(arrays, Rule(bootstrap=100, min_specificity=0.9))
    assert set(plain) == {
        *("min_recall", "bootstrap", "by", "pool", "temperature", "temperature_applied"),
        *("findings", "summary", "jointly"),
    }
    found = of_one(plain)
    assert list(found) == ["threshold", "gap", "val", "test", "guarantee", "curves", "probability"]
    assert set(found["val"]) <= {"at_0.5", "at_rec", "at_guaranteed"}
    more = {key for key in keys_of(asked) - keys_of(plain) if ".at_in" not in key}
    assert more and all(
        key.split(".")[-1] == "min_specificity" or ".rule_in" in key or ".triage" in key for key in more
    )
    kept = of_one(asked)
    for side in ("val", "test"):
        for point in found[side]:
            assert kept[side][point] == found[side][point]
    assert kept["val"]["at_in"]["specificity"] >= 0.9 and kept["threshold"] == found["threshold"]


def test_figures_and_shares_agree():
    """What is called negative and positive is what @Rec and @In decide, by image and patient, and scaled."""
    arrays = drawn(np.random.default_rng(1), 70)
    for changes in ({}, {"by": "patient", "pool": "mean"}, {"platt": True}):
        calibration, p1 = evaluate(arrays, Rule(bootstrap=100, min_specificity=0.9, **changes))
        found = of_one(calibration)
        for side in ("val", "test"):
            rec, into, shares = found[side]["at_rec"], found[side]["at_in"], found["triage"][side]
            if found["rule_in"]["threshold"] <= found["threshold"]:
                into = rec
            assert shares["sick"]["negative"]["count"] == rec["fn"]
            assert shares["sick"]["positive"]["count"] == into["tp"]
            assert shares["healthy"]["positive"]["count"] == into["fp"]
            assert shares["healthy"]["negative"]["count"] == rec["tn"]
            n = sum(shares["all"][word]["count"] for word in WORDS)
            assert n == (70 if "by" in changes else len(p1[side]))
        promised = found["rule_in"]["guarantee"]
        assert promised["negative_patients"] <= 70 and promised["threshold"] is not None
        # The patient counts by the highest score of his healthy images: few patients are above.
        healthy = np.asarray(arrays["val_labels"]) == 0
        if not changes:
            whose, scores = arrays["val_patients"][healthy], p1["val"][healthy]
            above = len(set(whose[scores >= promised["threshold"]]))
            n = len(set(whose))
            assert binom.cdf(above, n, 0.1) <= 0.05 < binom.cdf(above + 1, n, 0.1)


def test_several_promises_share_the_confidence():
    """Three classes are three findings with two promises each; an only finding shares between its two."""
    arrays, three = drawn(np.random.default_rng(2), 40, 3), Task(("Healthy", "A", "B"))
    calibration, _ = evaluate(
        arrays, Rule(bootstrap=100, jointly=True, min_specificity=0.9, confidence=0.8), three
    )
    assert calibration["jointly"] == {"confidence": 0.8, "findings": 3, "promises": 6}
    for found in calibration["findings"].values():
        assert found["guarantee"]["confidence"] == found["rule_in"]["guarantee"]["confidence"]
        assert found["guarantee"]["confidence"] == pytest.approx(1 - 0.2 / 6)
    arrays = drawn(np.random.default_rng(0), 70)
    alone, _ = evaluate(arrays, Rule(bootstrap=100, jointly=True, min_specificity=0.9))
    assert of_one(alone)["guarantee"]["confidence"] == pytest.approx(0.975)
    plain, _ = evaluate(arrays, Rule(bootstrap=100, jointly=True))
    assert plain["jointly"] is None and of_one(plain)["guarantee"]["confidence"] == 0.95


def test_answers_of_a_task():
    """Columns and words; @In below @Rec is moved to it; without @In nobody is positive."""
    (only,) = Task().triage({"PNEUMONIA": {"threshold": 0.4, "rule_in": {"threshold": 0.7}}})
    assert only.column == "triage" and only.threshold_column == "threshold@In"
    assert [only.answer([score]) for score in (0.39, 0.4, 0.69, 0.7)] == [
        "negative",
        "unsure",
        "unsure",
        "positive",
    ]
    several = Task(("Round One", "B"), "sigmoid").triage(
        {
            "Round One": {"threshold": 0.4, "rule_in": {"threshold": 0.3}},
            "B": {"threshold": None},
        }
    )
    assert [t.column for t in several] == ["triage_round_one", "triage_b"]
    assert several[0].threshold == 0.4 and several[0].threshold_column == "threshold@In_round_one"
    assert [several[0].answer([s, 1]) for s in (0.35, 0.4)] == ["negative", "positive"]
    assert several[1].answer([1, 1]) is None
    (never,) = Task().triage({"PNEUMONIA": {"threshold": 0.4, "rule_in": {"threshold": None}}})
    assert never.answer([1.0]) == "unsure"
    assert Task().triage({"PNEUMONIA": {"threshold": 0.4}}) == []


# ---------------------------------------------------------------- the commands


def calibrated(own_runs, *more):
    """`linear` calibrated with @In -> (what was printed, what its calibration says of the finding)."""
    argv = ("--run", "outputs/linear", "--min-recall", 0.9, "--bootstrap", 100)
    done = succeed("calibrate", *argv, *more, cwd=own_runs)
    return done, of_one(read_json(own_runs, "outputs/linear/calibration.json"))


def test_the_chain_of_commands(own_runs, synthetic, tmp_path):
    """calibrate, predictions.csv, predict, compare and monitor answer alike, by thresholds set apart by hand
    of the data: the drawn set is too easy for anyone to be unsure."""
    done, found = calibrated(own_runs, "--min-specificity", 0.9)
    assert "@In: specificity >= 0.9 there" in done.out and "@Rec to @In: sick " in done.out
    folder = own_runs / "outputs/linear"
    rows = list(csv.DictReader((folder / "predictions.csv").open()))
    pair = found["threshold"], found["rule_in"]["threshold"]
    for row in rows:
        number = triage.answers(np.array([float(row["score"])]), *pair)[0]
        assert row["triage"] == WORDS[number]
    for side in ("val", "test"):
        sick = [row["triage"] for row in rows if row["side"] == side and row["truth"] == "1"]
        assert {w: sick.count(w) for w in WORDS} == {
            w: found["triage"][side]["sick"][w]["count"] for w in WORDS
        }

    # A wide gap between the thresholds, so that all three answers occur.
    calibration = read_json(folder, "calibration.json")
    scores = sorted(float(row["score"]) for row in rows if row["side"] == "test")
    of_one(calibration).update(threshold=(scores[9] + scores[10]) / 2)
    of_one(calibration)["rule_in"]["threshold"] = (scores[24] + scores[25]) / 2
    (folder / "calibration.json").write_text(json.dumps(calibration))
    predicted = succeed("predict", synthetic / "test", "--run", folder, cwd=tmp_path)
    answered = list(csv.DictReader(io.StringIO(predicted.out)))
    words = [row["triage"] for row in answered]
    assert [words.count(word) for word in WORDS] == [10, 15, 15]
    assert "PNEUMONIA 10 negative, 15 unsure, 15 positive" in predicted.err
    assert {row["triage"] for row in answered if row["decision@Rec"] == "NORMAL"} == {"negative"}
    by_hand = succeed("predict", synthetic / "test", "--run", folder, "--threshold", 0.5, cwd=tmp_path)
    assert "triage" not in by_hand.out.splitlines()[0] and "no column triage" in by_hand.err

    log = tmp_path / "log.csv"
    lines = [f"a{i}.png,{row['p_pneumonia']},{i % 2}" for i, row in enumerate(answered)]
    log.write_text("\n".join(["path,score,diagnosis", *lines]) + "\n")
    argv = ("monitor", "--run", folder, log)
    watched = succeed(*argv, "--min-recall", 0.1, cwd=own_runs)
    sick = words[1::2]
    text = ", ".join(f"{sick.count(word)} {word}" for word in WORDS)
    assert f"triage      sick {text}; healthy" in watched.out and "count as found" in watched.out
    assert f"recall      {1 - sick.count('negative') / 20:.3f}" in watched.out
    other = cli(*argv, "--point", "in", cwd=own_runs)
    assert f"specificity {1 - words[::2].count('positive') / 20:.3f}" in other.out
    assert other.code == 3 and "ALARM: specificity >= 0.9 was refuted" in other.err
    refused(cli(*argv, "--point", "in", "--min-recall", 0.9, cwd=own_runs), "--min-recall")
    refused(
        cli("monitor", "--run", "outputs/scratch", log, "--point", "in", cwd=own_runs), "--min-specificity"
    )


def test_three_answers_are_watched_at_rec_alone(own_runs):
    """They lie between @Rec and @In; of @Guar, which is lower, they would call a sick patient who is found
    negative."""
    run = Run(own_runs / "outputs/linear")
    task = SimpleNamespace(chosen_finding=lambda finding: "PNEUMONIA")
    found = {"threshold": 0.5, "guarantee": {"threshold": 0.2}, "rule_in": {"threshold": 0.8}}
    fake = SimpleNamespace(
        task=task,
        results=run.results,
        calibration=lambda name: {"findings": {"PNEUMONIA": found}, "min_recall": 0.9},
    )
    for point, threshold, answers in (("rec", 0.5, (0.5, 0.8)), ("guar", 0.2, ())):
        args = SimpleNamespace(finding=None, tta=False, site=None, point=point, min_recall=None)
        watched = monitor.watched_of(fake, args)
        assert (watched.threshold, watched.triage) == (threshold, answers)


def test_the_report_shows_who_is_left_to_read(own_runs):
    calibrated(own_runs, "--min-specificity", 0.9)
    done = succeed("compare", "--run", "outputs/linear", "outputs/scratch", cwd=own_runs)
    assert "### Three answers: who is left to read" in done.out and "Not asked for three answers" in done.out
    done = succeed("compare", "--run", "outputs/scratch", cwd=own_runs)
    assert "Three answers" not in done.out and "@In" not in done.out
    # A share whose interval lies beyond its limit is marked.
    share = {"count": 1, "value": 0.5, "lo": 0.3, "hi": 0.7}
    group = {"n": 2, "patients": 2, **dict.fromkeys(WORDS, share)}
    triage_of = {side: dict.fromkeys(("sick", "healthy", "all"), group) for side in ("val", "test")}
    promised = {"threshold": None, "why_not": "too few", "confidence": 0.95}
    rule_in = {"threshold": 0.3, "min_specificity": 0.9, "guarantee": promised}
    of_finding = {"threshold": 0.4, "rule_in": rule_in, "triage": triage_of}
    entry = SimpleNamespace(
        name="m", findings=("x",), task=Task(("x",), "sigmoid"), calibrated={"x": of_finding}, min_recall=0.95
    )
    entry.calibration = {"jointly": None}
    _, _, table, remarks = triage_blocks([entry])
    marked = [type(cell).__name__ for cell in table.rows[0][3:]]
    assert marked == ["Bad", "str", "str", "Bad", "str"]
    assert "No @InGuar of m: too few." in remarks.text and "Nobody is unsure by m" in remarks.text


def test_damaged_and_refused(own_runs):
    _, found = calibrated(own_runs, "--min-specificity", 0.9)
    path = own_runs / "outputs/linear/calibration.json"
    whole = path.read_text()
    for change in (
        {"rule_in": {}},
        {"rule_in": {**found["rule_in"], "threshold": 2}},
        {"triage": None},
        {"triage": {**found["triage"], "val": {"sick": {}}}},
        {"triage": {"val": found["triage"]["val"]}},
    ):
        calibration = json.loads(whole)
        of_one(calibration).update(change)
        path.write_text(json.dumps(calibration))
        with pytest.raises(InputError, match="is damaged"):
            Run(path.parent).calibration()
    for wrong in (0, 1.5, -1, "high"):
        refused(cli("calibrate", "--min-specificity", wrong, cwd=own_runs), "--min-specificity")
    strict = ("--run", "outputs/linear", "--min-recall", 0.5, "--guarantee", 0.9, "--min-specificity", 0.999)
    refused(
        cli("calibrate", *strict, cwd=own_runs), "patients without it cannot guarantee a specificity of 0.999"
    )


def test_thresholds_of_a_site(own_runs, synthetic):
    """@In chosen on the site's images, kept with who gets which answer; predict.py takes both from there."""
    calibrated(own_runs)
    argv = ("--run", "outputs/linear", "--site", synthetic / "test", "--name", "clinic", "--bootstrap", 100)
    plain = succeed("calibrate", *argv, cwd=own_runs)
    sites = own_runs / "outputs/linear/sites/clinic.json"
    before = read_json(sites)
    assert "@In" not in plain.out and "rule_in" not in of_one(before) and "min_specificity" not in before
    predict = ("predict", synthetic / "test", "--run", "outputs/linear", "--site", "clinic")
    calibrated(own_runs, "--min-specificity", 0.9)
    done = succeed(*predict, cwd=own_runs)
    assert "triage" not in done.out.splitlines()[0] and "no column triage" in done.err
    done = succeed("calibrate", *argv, "--min-specificity", 0.8, "--report", cwd=own_runs)
    assert "specificity >= 0.8 on these" in done.out and "site       @Rec to @In: sick" in done.out
    kept = of_one(read_json(sites))
    assert {k: v for k, v in kept.items() if k in of_one(before)}["threshold"] == of_one(before)["threshold"]
    done = succeed(*predict, cwd=own_runs)
    words = [row["triage"] for row in csv.DictReader(io.StringIO(done.out))]
    shares = kept["triage"]["site"]["all"]
    assert {word: words.count(word) for word in WORDS} == {word: shares[word]["count"] for word in WORDS}
    y = np.repeat([0, 1], 40)
    p = np.random.default_rng(0).random(80) / 2 + y / 2.5
    chosen = site_module.choose(y, p, one_each(y), RULE)
    recall, specificity, threshold = brute_force_rule_in(y.tolist(), p.tolist(), 0.9)
    assert ((p >= chosen["rule_in"]["threshold"]) == (p >= threshold)).all()


def test_only_floors_that_are_granted_are_said_to_hold_at_once():
    joint = {"confidence": 0.95, "findings": 2, "promises": 4}
    assert "3 of the 4 floors" in wording.joint_text(joint, 2, 1)
    assert "@InGuar too: the 4 floors" in wording.joint_text(joint, 2, 2)
    alone = wording.joint_text(joint, 1, 0)
    assert "the floors of 1 of 2 findings" in alone and "InGuar" not in alone
