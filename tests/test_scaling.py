"""Tests of scaling: what turns logits into probabilities, against sklearn, mpmath and simulations."""

import math
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

import metrics
from calibration import operating_point
from common import scaling
from common.console import InputError
from common.task import Task
from tests.shared import of_one

HERNIA = Task(("Hernia",), "sigmoid")
FOUR = Task(("healthy", "a", "b", "c"))


def sides(truth, logits):
    """The input of `evaluate`, of images in two halves, each of a patient of its own."""
    half, found = len(truth) // 2, {}
    for name, part in (("val", slice(None, half)), ("test", slice(half, None))):
        found[f"{name}_labels"], found[f"{name}_logits"] = truth[part], logits[part]
        found[f"{name}_patients"] = np.arange(len(truth[part]))
    return found


# ---------------------------------------------------------------- the fit


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (0.01, 3.0), (30.0, -400.0)])
def test_platt_is_logistic_regression_without_a_penalty(scale, shift):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=150)
        y = (rng.random(150) < expit(1.5 * z - 1)).astype(int)
        slope, bias = metrics.fit_platt(scale * z + shift, y)
        fitted = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000).fit(z[:, None], y)
        assert slope * scale == pytest.approx(fitted.coef_[0, 0], rel=1e-4)
        assert bias + slope * shift == pytest.approx(fitted.intercept_[0], rel=1e-4, abs=1e-4)
        p = expit(slope * (scale * z + shift) + bias)
        assert p.mean() == pytest.approx(y.mean(), abs=1e-8)  # the bias's own equation
        assert (p * z).mean() == pytest.approx((y * z).mean(), abs=1e-8)  # the slope's


def test_platt_of_images_that_hardly_overlap():
    """One pair in the wrong order: the slope is great, and still the best."""
    z = np.r_[np.linspace(-3, -1, 50), 1e-3, -1e-3, np.linspace(1, 3, 50)]
    y = np.r_[np.zeros(51, int), np.ones(51, int)]
    slope, bias = metrics.fit_platt(z, y)
    least = metrics.nll(y, expit(slope * z + bias))
    for other in (0.9, 0.99, 1.01, 1.1):
        assert least <= metrics.nll(y, expit(other * slope * z + bias))
    assert slope > 1 and abs(bias) < 1e-6  # by symmetry


@pytest.mark.parametrize(
    "z, y, why",
    [
        ([0, 1, 2, 3], [0, 0, 1, 1], "separate"),
        ([0, 1, 1, 3], [0, 0, 1, 1], "separate"),  # they touch: the best slope is infinite all the same
        ([3, 2, 1, 0], [0, 0, 1, 1], "not be above 0"),
        ([1, 1, 1, 1], [0, 0, 1, 1], "not be above 0"),
        ([0, 3, 1, 2, 0, 1], [0, 0, 0, 1, 1, 1], "not above 0"),
        ([0, 1], [1, 1], "no negatives"),
        ([0, np.nan], [0, 1], "finite"),
        ([0, 1], [0, 2], "labels of 0 and 1"),
        ([0, 1], [0, 1, 1], "as many"),
    ],
)
def test_platt_refuses_what_has_no_slope_above_0(z, y, why):
    with pytest.raises(InputError, match=why):
        metrics.fit_platt(z, y)


# ---------------------------------------------------------------- from logits to scores


def test_log_odds_against_mpmath():
    """Each class against the rest and any disease against none, where p itself would round to 0 or 1."""
    logits = np.random.default_rng(0).normal(0, 40, (20, 4))
    found = FOUR.log_odds(logits)
    with mpmath.workdps(80):
        for row, odds in zip(logits, found):
            e = [mpmath.exp(mpmath.mpf(float(z))) for z in row]
            parts = [sum(e[1:]) / e[0], *(e[k] / (sum(e) - e[k]) for k in (1, 2, 3))]
            assert odds == pytest.approx([float(mpmath.log(part)) for part in parts], rel=1e-12, abs=1e-12)
    two = logits[:, :2]
    assert np.array_equal(Task().log_odds(two)[:, 0], two[:, 1] - two[:, 0])
    chest = Task(("Edema", "No Finding"), "sigmoid")
    assert np.array_equal(chest.log_odds(two), np.stack([-two[:, 1], two[:, 0], two[:, 1]], axis=1))
    for task, z in ((FOUR, logits / 20), (Task(), two / 20), (chest, two / 20)):
        assert np.allclose(expit(task.log_odds(z)), task.scores(z), rtol=1e-10)


def test_scores_from_a_calibration():
    logits = np.random.default_rng(1).normal(size=(9, 2))
    plain = {"temperature": 2.0, "temperature_applied": False}
    assert np.array_equal(Task().scores_from(logits, plain), Task().scores(logits))
    applied = {**plain, "temperature_applied": True}
    assert np.array_equal(Task().scores_from(logits, applied), Task().scores(logits, 2.0))
    assert np.array_equal(Task().scaled_scores(logits, plain), Task().scores(logits, 2.0))
    platt = {**plain, "platt": {"PNEUMONIA": {"slope": 0.5, "bias": -2.0}}}
    expected = expit(0.5 * (logits[:, 1] - logits[:, 0]) - 2)
    assert np.array_equal(Task().scores_from(logits, platt)[:, 0], expected)
    kept = {**plain, "platt": {"PNEUMONIA": {"why_not": "too few"}}}
    assert np.allclose(Task().scores_from(logits, kept), Task().scores(logits), rtol=1e-12)


# ---------------------------------------------------------------- what it is for


def test_platt_undoes_a_positive_weight():
    """Simulation with known truth: a loss with pos_weight w adds log w to the true log odds. 4% have the
    finding, and their mean score is far above that until the bias is taken away."""
    rng, weight = np.random.default_rng(0), 24.0
    odds = rng.normal(-4.5, 1.8, 8000)
    y = (rng.random(8000) < expit(odds)).astype(np.int8)
    scores = sides(y[:, None], odds[:, None] + math.log(weight))
    rule = operating_point.Rule(min_recall=0.9, bootstrap=10)
    plain, _ = operating_point.evaluate(scores, rule, HERNIA)
    found, p1 = operating_point.evaluate(scores, operating_point.Rule(0.9, bootstrap=10, platt=True), HERNIA)
    line = found["platt"]["Hernia"]
    plain, found = of_one(plain), of_one(found)
    assert line["slope"] == pytest.approx(1, abs=0.15) and line["bias"] == pytest.approx(
        -math.log(weight), abs=0.3
    )
    share, before = y[:4000].mean(), expit(scores["val_logits"]).mean()
    assert p1["val"].mean() == pytest.approx(share, abs=1e-8) and before > 5 * share
    assert scaling.averages(plain, False) == pytest.approx((before, share))
    assert scaling.averages(found, True) == pytest.approx((share, share), abs=1e-8)
    for side in ("val", "test"):
        quality = found["probability"][side]
        assert quality["before"]["ece"] > 0.2 > 0.02 > quality["after"]["ece"]
        temperature = plain["probability"][side]["after"]  # no temperature can do that
        assert temperature["ece"] > 0.1 and quality["after"]["nll"] < temperature["nll"]
    called = [(expit(z) >= 0.5).ravel() for z in (scores["test_logits"], odds[4000:])]
    changed = found["changed"]["test"]
    assert changed["at_0.5"] == pytest.approx((called[0] != called[1]).sum(), rel=0.1)
    assert changed["at_rec"] == changed["at_guaranteed"] == found["changed"]["val"]["at_rec"] == 0


def test_platt_undoes_the_weights_of_classes():
    """Three classes and "any disease", each column against the rest: the weights 1, 3, 9 add their logarithms
    to the logits. No sum of the columns is asked for."""
    task, rng = Task(("healthy", "a", "b")), np.random.default_rng(1)
    logits = rng.normal(0, 1.5, (6000, 3)) + [2.0, 0.0, -1.0]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    y = (rng.random((6000, 1)) > p.cumsum(axis=1)).sum(axis=1)
    scores = sides(y, logits + np.log([1.0, 3.0, 9.0]))
    found, p1 = operating_point.evaluate(scores, operating_point.Rule(0.9, bootstrap=10, platt=True), task)
    truth = task.truth(y)
    assert p1["val"].mean(axis=0) == pytest.approx(truth[:3000].mean(axis=0), abs=1e-7)
    for k, name in enumerate(task.findings):
        quality = found["findings"][name]["probability"]["test"]
        assert quality["after"]["ece"] < 0.035 < quality["before"]["ece"], name
        assert p1["test"][:, k].mean() == pytest.approx(truth[3000:, k].mean(), abs=0.015)


@settings(max_examples=8)
@given(st.integers(0, 10**6), st.sampled_from([0, 1, 2]), st.booleans())
def test_platt_decides_alike_at_rec_and_guar(seed, digits, several):
    """Thresholds move along with the scores: the same images are called, on both sides, ties and all; at 0.5
    as many change as are counted."""
    rng, n = np.random.default_rng(seed), 160
    task = Task(("Edema", "Hernia"), "sigmoid") if several else HERNIA
    y = rng.integers(0, 2, (n, task.outputs))
    logits = np.round(rng.normal(0, 2, y.shape) + 1.5 * y - rng.normal(0, 2), digits)
    scores = sides(y.astype(np.int8), logits)
    scores["val_patients"] = scores["test_patients"] = np.arange(n // 2) // 2
    rule = dict(min_recall=0.8, confidence=0.8, bootstrap=2)
    plain, p_plain = operating_point.evaluate(scores, operating_point.Rule(**rule), task)
    try:
        found, p_found = operating_point.evaluate(scores, operating_point.Rule(**rule, platt=True), task)
    except InputError as error:  # a draw without a slope above 0
        assert "--temperature platt" in str(error)
        return
    for k, name in enumerate(task.findings):
        a, b = (part["findings"][name] for part in (plain, found))
        for side in ("val", "test"):
            before, after = (p[side].reshape(n // 2, -1)[:, k] for p in (p_plain, p_found))
            for point in ("at_rec", "at_guaranteed"):
                if point in a[side]:
                    thr = a[side][point]["thr"]
                    called = before >= thr, after >= b[side][point]["thr"]
                    differ = called[0] != called[1]
                    assert b["changed"][side][point] == differ.sum()
                    # A test score may lie exactly between two of validation: then rounding decides.
                    assert np.abs(before[differ] - thr).max(initial=0) < 1e-12
                    assert side == "test" or not differ.any()
            assert b["changed"][side]["at_0.5"] == ((before >= 0.5) != (after >= 0.5)).sum()


def test_a_finding_that_cannot_be_scaled_keeps_its_score_and_says_why():
    """Two images with it; another ranked the wrong way round. Where that is all there is, it is an error."""
    task, rng = Task(("Edema", "Hernia", "Mass"), "sigmoid"), np.random.default_rng(0)
    logits = rng.normal(size=(400, 3))
    y = (rng.random((400, 3)) < expit(logits * [1, 1, -2])).astype(np.int8)
    y[:, 1] = np.arange(400) % 100 == 7
    found, p1 = operating_point.evaluate(
        sides(y, logits), operating_point.Rule(bootstrap=20, platt=True), task
    )
    assert "fewer than 5" in found["platt"]["Hernia"]["why_not"] and "slope" in found["platt"]["Edema"]
    assert "above 0" in found["platt"]["Mass"]["why_not"]
    assert np.allclose(p1["val"][:, 1:], expit(logits[:200, 1:])) and not np.allclose(
        p1["val"][:, 0], expit(logits[:200, 0])
    )
    text = "\n".join(scaling.told(found))
    assert "Hernia: not scaled" in text and "Mass: not scaled" in text and "Edema: slope" in text
    backwards = sides(y[:, 2:], logits[:, 2:])
    with pytest.raises(InputError, match="--temperature platt: Hernia: .*above 0"):
        operating_point.evaluate(backwards, operating_point.Rule(bootstrap=20, platt=True), HERNIA)
    with pytest.raises(InputError, match="exclude each other"):
        operating_point.Rule(temperature=True, platt=True)


# ---------------------------------------------------------------- what is said


def as_run(results, task):
    """What scaling asks of a run.Run."""
    return SimpleNamespace(results=results, task=task, __str__="run")


def test_it_is_said_which_scores_are_no_probabilities():
    """By numbers of the calibration itself, so of old ones too, and by how run or members were trained."""
    bins = [{"n": 30, "score": 0.5, "positives": 0.0}, {"n": 10, "score": 0.9, "positives": 0.2}]
    quality = {
        "val": {"before": {"bins": bins}, "after": {"bins": [{"n": 40, "score": 0.05, "positives": 0.05}]}}
    }
    calibration = {"temperature": 1.0, "temperature_applied": False}
    calibration["findings"] = {"Hernia": {"probability": quality}}
    weighted, plain = {"recipe": {"balance": "weights"}}, {"recipe": {"balance": "none"}}
    of_members = {"recipe": {}, "members": [{"balance": "none"}, {"balance": "sampler"}, {"run": "old"}]}
    for results, cause in ((weighted, "--balance weights"), (plain, ""), (of_members, "--balance sampler")):
        line = scaling.remark(calibration, as_run(results, HERNIA))
        assert "scores, not probabilities" in line and cause in line and "--temperature platt" in line
        assert "Hernia is 0.60 on average, where 5.0% have it" in line
    near = {**calibration, "temperature_applied": True}
    assert scaling.remark(near, as_run(plain, HERNIA)) == ""
    assert "trained with --balance weights" in scaling.remark(near, as_run(weighted, HERNIA))
    platt = {**calibration, "platt": {"Hernia": {"slope": 1.0, "bias": -3.0}}}
    line = scaling.remark(platt, as_run(weighted, HERNIA))
    assert "probabilities, by Platt scaling" in line and "where 5.0% have Hernia" in line
    assert "not probabilities" not in line


def test_scores_of_another_scaling_or_precision_are_told_apart():
    results = {"recipe": {"amp": True}}
    plain = {"temperature": 1.7, "temperature_applied": False, "precision": "bf16", "tta": None}
    run = as_run(results, HERNIA)
    base = scaling.basis(plain, run)
    assert scaling.differences(base, scaling.basis({**plain, "temperature": 9.0}, run)) == []  # not applied
    assert scaling.differences(base, scaling.basis({**plain, "precision": "fp32"}, run)) == ["precision"]
    warm = scaling.basis({**plain, "temperature_applied": True}, run)
    assert scaling.differences(base, warm) == [scaling.SCALING]
    assert scaling.differences(warm, {**warm, "temperature": 1.7000001}) == []
    platt = scaling.basis({**plain, "platt": {"Hernia": {"slope": 1.0, "bias": -3.0}}}, run)
    assert scaling.differences(base, platt) == scaling.differences(platt, base) == [scaling.SCALING]
    assert scaling.differences(platt, {**platt, "platt": [[1.0, -2.0]]}) == [scaling.SCALING]
    assert scaling.differences(platt, {**platt, "platt": [[1.0, -3.0]]}) == []
    assert scaling.differences({**platt, "platt": "x"}, platt) == [scaling.SCALING]
    del plain["precision"]  # an older version
    assert scaling.precision_of(plain, results) == ("bf16", False)
    assert scaling.precision_of(plain, {"recipe": {"amp": False}}) == ("fp32", True)
