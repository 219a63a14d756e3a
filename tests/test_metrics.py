"""Tests of metrics."""

import itertools
import json
import math
import time
import tracemalloc

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import binomtest

import metrics
from calibration import intervals, operating_point
from common import proportions
from tests.shared import brute_force_threshold, middle_below, of_one, tempered


@given(
    pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=2, max_size=24),
    min_recall=st.sampled_from([0.01, 0.2, 1 / 3, 0.5, 2 / 3, 0.75, 0.9, 0.95, 1.0]),
)
def test_threshold_against_brute_force(pairs, min_recall):
    y, p = [a for a, _ in pairs], [b / 8 for _, b in pairs]
    assume(0 < sum(y) < len(y))
    assert metrics.choose_threshold_by_min_recall(y, p, min_recall) == brute_force_threshold(y, p, min_recall)


def test_threshold_on_continuous_scores_against_brute_force():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    p = (0.3 * y + rng.normal(0.4, 0.15, 300)).clip(0, 1)
    for min_recall in (0.5, 0.9, 0.95, 0.99, 1.0):
        expected = brute_force_threshold(y.tolist(), p.tolist(), min_recall)
        assert metrics.choose_threshold_by_min_recall(y, p, min_recall) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "y, p, target, expected",
    [
        ([1, 1, 0, 0], [0.9, 0.8, 0.2, 0.1], 0.95, (0.8, 1.0, 1.0)),  # separable
        ([1, 1, 0, 0], [0.9, 0.8, 0.2, 0.1], 0.5, (0.8, 1.0, 1.0)),  # equal precision: higher recall
        ([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.6], 0.5, (0.9, 0.5, 1.0)),
        ([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.6], 0.51, (0.7, 1.0, 2 / 3)),
        ([1, 0], [0.5, 0.5], 1.0, (0.5, 1.0, 0.5)),  # a tie cannot be cut
        ([1, 0, 0, 1], [0.0, 0.0, 1.0, 1.0], 0.5, (0.0, 1.0, 0.5)),  # precision 1/2 both times: higher recall
        ([1] * 19 + [1, 0], [0.9] * 19 + [0.1, 0.2], 0.95, (0.9, 0.95, 1.0)),  # 19/20 counts as 0.95
    ],
)
def test_threshold_by_hand(y, p, target, expected):
    assert metrics.choose_threshold_by_min_recall(y, p, target) == pytest.approx(expected)


@settings(max_examples=40)  # scikit-learn checks its input for longer than it counts
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=2, max_size=30), st.integers(-1, 7))
def test_summary_against_scikit_learn(pairs, cut):
    y, p = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs]) / 6
    assume(0 < y.sum() < len(y))
    thr = cut / 6
    found = metrics.summarize_at_threshold(y, p, thr)
    called = (p >= thr).astype(int)
    tn, fp, fn, tp = sklearn.metrics.confusion_matrix(y, called, labels=[0, 1]).ravel()
    assert (found["tn"], found["fp"], found["fn"], found["tp"]) == (tn, fp, fn, tp)
    pairs_won = [(a > b) + 0.5 * (a == b) for a in p[y == 1] for b in p[y == 0]]  # AUROC by counting pairs
    assert found == pytest.approx(
        {
            "acc": sklearn.metrics.accuracy_score(y, called),
            "thr": thr,
            "precision": sklearn.metrics.precision_score(y, called, zero_division=0),
            "recall": sklearn.metrics.recall_score(y, called),
            "specificity": sklearn.metrics.recall_score(y, called, pos_label=0),
            "f1": sklearn.metrics.f1_score(y, called, zero_division=0),
            "auroc": np.mean(pairs_won),
            "auprc": sklearn.metrics.average_precision_score(y, p),
            "tn": tn,
            "fp": fp,
            "fn": fn,
            "tp": tp,
        },
        abs=1e-12,
    )
    assert json.loads(json.dumps(found)) == found  # plain Python values


@pytest.mark.parametrize(
    "y, p, target, message",
    [
        ([0, 0], [0.1, 0.2], 0.9, "no positives"),
        ([1, 1], [0.1, 0.2], 0.9, "no negatives"),
        ([0, 1], [0.1, math.nan], 0.9, "NaN"),
        ([0, 1], [0.1, 1.1], 0.9, "lie in"),
        ([0, 1], [-0.1, 1], 0.9, "lie in"),
        ([0, 1], [0.1, math.inf], 0.9, "lie in"),
        ([0, 1, 1], [0.1, 0.2], 0.9, "3 labels but 2"),
        ([], [], 0.9, "no labels"),
        ([0, 2], [0.1, 0.2], 0.9, "labels must be"),
        ([[0, 1]], [[0.1, 0.2]], 0.9, "1-D"),
        ([0, 1], [0.1, 0.2], 0.0, "min_recall"),
        ([0, 1], [0.1, 0.2], 1.01, "min_recall"),
        ([0, 1], [0.1, 0.2], -0.5, "min_recall"),
        ([0, 1], [0.1, 0.2], math.nan, "min_recall"),
    ],
)
def test_metric_errors(y, p, target, message):
    with pytest.raises(ValueError, match=message):
        metrics.choose_threshold_by_min_recall(y, p, target)
    if message != "min_recall":
        with pytest.raises(ValueError, match=message):
            metrics.summarize_at_threshold(y, p, 0.5)


NEAR_ONE = [1 - 2.0**-k for k in range(50, 54)]
SCORES = [0.0, 5e-324, 1e-320, 1e-300, 0.2, 0.2 + 2**-54, 0.3, 0.5, 0.7, *NEAR_ONE, 1.0]


@given(
    pairs=st.lists(st.tuples(st.integers(0, 1), st.sampled_from(SCORES)), min_size=2, max_size=24),
    min_recall=st.sampled_from([0.2, 0.5, 0.75, 0.95, 1.0]),
)
def test_a_lowered_threshold_decides_alike_and_lies_on_no_score(pairs, min_recall):
    """Of every score as a threshold, and of the chosen one, with ties, saturated and neighbouring scores."""
    y, p = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
    assume(0 < y.sum() < len(y))
    chosen = metrics.choose_threshold_by_min_recall(y, p, min_recall)[0]
    for thr in {chosen, *p.tolist()}:
        found, gap = metrics.lowered_to_midpoint(thr, p)
        assert ((p >= found) == (p >= thr)).all() and 0 <= found <= thr
        below = [b for b in p if b < thr]
        room = math.nextafter(thr, -1) > max(below) if below else thr > 0
        assert (found < thr) == room and gap >= 0
        if 1e-300 < thr < 1 - 1e-15:  # else scores may be as good as 0 and 1
            assert (gap > 0) == room
        if room and below:
            assert max(below) < found < thr


def test_a_lowered_threshold_lies_in_the_middle():
    rng = np.random.default_rng(1)
    p = np.r_[rng.random(200), 0.25, 0.5, 0.75]
    for thr in p[::20]:
        found, gap = metrics.lowered_to_midpoint(thr, p)
        assert found == pytest.approx(middle_below(thr, p), rel=1e-9)
        distances = [abs(math.log(q / (1 - q)) - math.log(found / (1 - found))) for q in p]
        assert gap == pytest.approx(min(distances), rel=1e-6)
    assert metrics.lowered_to_midpoint(0.5, [0.5, 0.9]) == pytest.approx((1 / (1 + math.exp(0.5)), 0.5))
    assert metrics.lowered_to_midpoint(0.0, [0.0, 0.4]) == (
        0.0,
        0.0,
    )  # everybody is called sick, come what may
    for bad in ((0.5, []), (math.nan, [0.5]), (0.5, [math.nan]), (1.5, [0.5])):
        with pytest.raises(ValueError, match="threshold in"):
            metrics.lowered_to_midpoint(*bad)


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_rounding_flips_no_decision_on_validation(confidence):
    """Scores computed again are off by up to 1e-6 in logits, either way: recall on validation stays."""
    for seed in range(5):
        scores = _scores_of_two_sides(seed)
        rule = operating_point.Rule(confidence=confidence, bootstrap=1)
        calibration, p1 = operating_point.evaluate(scores, rule)
        found = of_one(calibration)
        again = scores["val_logits"] + np.random.default_rng(seed).uniform(-1e-6, 1e-6, (240, 2))
        rounded = tempered(again, 1.0)
        for name in ("at_rec", "at_guaranteed"):
            thr = found["val"][name]["thr"]
            assert ((rounded >= thr) == (p1["val"] >= thr)).all()
            assert found["val"][name]["recall"] == (p1["val"] >= thr)[scores["val_labels"] == 1].mean()
        assert found["gap"] > 2e-6 and found["guarantee"]["gap"] > 2e-6


@pytest.mark.parametrize("n, exact", [(5, 0.774), (20, 0.736), (59, 0.429)])
def test_chance_that_recall_first_is_below_its_floor(n, exact):
    """The binomial summed by hand; and by simulation, with so many healthy scores, fewer towards the top,
    that precision always asks for the highest threshold allowed."""
    missed = max(m for m in range(n) if (n - m) / n >= 0.95)
    by_hand = sum(math.comb(n, k) * 0.05**k * 0.95 ** (n - k) for k in range(missed + 1))
    assert metrics.chance_below_floor(n, 0.95) == pytest.approx(by_hand) == pytest.approx(exact, abs=1e-3)
    rng, below, draws = np.random.default_rng(n), 0, 1500
    y = np.r_[np.ones(n, int), np.zeros(400, int)]
    for _ in range(draws):
        p = np.r_[rng.random(n), rng.random(400) ** 4]
        below += 1 - metrics.choose_threshold_by_min_recall(y, p, 0.95)[0] < 0.95
    assert below / draws == pytest.approx(exact, abs=0.04)
    assert metrics.chance_below_floor(n, 1.0) == 1.0


def test_threshold_is_fast():
    """O(N log N): a hundred thousand scores, where a quadratic search would take minutes."""
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, 100_000), rng.uniform(size=100_000)
    started = time.perf_counter()
    thr, recall, precision = metrics.choose_threshold_by_min_recall(y, p)
    assert time.perf_counter() - started < 5
    assert recall == ((p >= thr) & (y == 1)).sum() / y.sum() >= 0.95


def _random_scores(rng, n, grid=None):
    """Labels of both classes and overlapping scores in [0, 1], on a coarse grid when ties are wanted."""
    y = rng.integers(0, 2, n)
    y[:2] = 0, 1
    p = np.clip(rng.normal(0.35 + 0.3 * y, 0.2), 0, 1)
    return y, (p if grid is None else np.round(p * grid) / grid)


@pytest.mark.parametrize(
    "n, target, confidence", [(59, 0.95, 0.95), (200, 0.95, 0.95), (333, 0.9, 0.99), (775, 0.95, 0.9)]
)
def test_guarantee_is_the_umbrella_order_statistic(n, target, confidence):
    """The binomial summed by hand: the largest k with P(Bin(n, 1 - target) <= k - 1) <= 1 - confidence."""
    rng = np.random.default_rng(n)
    positives = rng.permutation(np.linspace(0.1, 0.9, n))
    y, p = np.r_[np.ones(n, int), np.zeros(30, int)], np.r_[positives, rng.random(30) * 0.5]
    tail, k = 0.0, 0
    while True:
        tail += math.comb(n, k) * (1 - target) ** k * target ** (n - k)
        if tail > 1 - confidence:
            break
        k += 1
    thr, recall, precision = metrics.choose_threshold_with_guarantee(y, p, target, confidence)
    assert thr == np.sort(positives)[k - 1]
    assert recall == pytest.approx((n - k + 1) / n)
    assert precision == pytest.approx((n - k + 1) / (p >= thr).sum())
    alone = metrics.choose_threshold_with_guarantee(y, p, target, confidence, groups=np.arange(len(y)))
    assert alone == (thr, recall, precision)  # one image a patient: the plain rule


def test_guarantee_says_how_many_positives_it_needs():
    y, p = np.r_[np.ones(58, int), 0], np.linspace(0, 1, 59)
    with pytest.raises(ValueError, match="at least 59"):
        metrics.choose_threshold_with_guarantee(y, p)
    with pytest.raises(ValueError, match="29 independent.*at least 59"):
        metrics.choose_threshold_with_guarantee(y, p, groups=np.arange(59) // 2)
    for bad in (dict(min_recall=1.0), dict(confidence=1.0), dict(confidence=0.0)):
        with pytest.raises(ValueError, match="guarantee"):
            metrics.choose_threshold_with_guarantee(y, p, **bad)


def test_guarantee_with_constant_scores_calls_everything_positive():
    y = np.r_[np.ones(100, int), np.zeros(20, int)]
    assert metrics.choose_threshold_with_guarantee(y, np.full(120, 0.3))[:2] == (0.3, 1.0)


@pytest.mark.parametrize("clustered", [False, True])
def test_guarantee_holds_in_simulation_and_the_naive_rule_does_not(clustered):
    """The true recall is known: positives are Phi(N(1, 1)). In clusters a patient's images correlate 0.8."""
    from scipy.stats import norm

    rng, draws, patients = np.random.default_rng(5), 400, 250
    violations = np.zeros(3)
    for _ in range(draws):
        sizes = rng.integers(1, 8, patients) if clustered else np.ones(patients, int)
        group = np.repeat(np.arange(patients), sizes)
        noise = math.sqrt(0.8) * rng.normal(size=patients)[group] + math.sqrt(0.2) * rng.normal(
            size=len(group)
        )
        y = np.r_[np.ones(len(group), int), np.zeros(50, int)]
        p = np.r_[norm.cdf(1 + noise), 0.5 * rng.random(50)]
        groups = np.r_[group, patients + np.arange(50)]
        thresholds = (
            metrics.choose_threshold_by_min_recall(y, p, 0.95)[0],
            metrics.choose_threshold_with_guarantee(y, p)[0],
            metrics.choose_threshold_with_guarantee(y, p, groups=groups)[0],
        )
        violations += [norm.sf(norm.ppf(t) - 1) < 0.95 for t in thresholds]
    naive, by_image, by_patient = violations / draws
    assert 0.35 < naive < 0.65
    assert by_patient <= 0.05
    assert by_image > 0.08 if clustered else by_image <= 0.07  # 0.05 + 2 standard errors of 400 draws


def test_guarantee_is_exact_with_several_images_a_patient():
    """Two images a patient, each below or above a threshold of which too much lies below: all samples of five
    patients, each with its probability. The median of many draws would break the promise in 0.39 of them."""
    floor, confidence = 0.8, 0.67  # 0.8^5 = 0.328
    chances = {(0, 0): 0.151, (0, 1): 0.05, (1, 0): 0.05, (1, 1): 0.749}  # scores of a patient
    missed = sum(chance * (2 - sum(scores)) / 2 for scores, chance in chances.items())
    assert missed > 1 - floor
    y, patients, broken = np.repeat([1, 0], [10, 1]), np.r_[np.arange(10) // 2, 5], 0
    for sample in itertools.product(chances, repeat=5):
        p = np.r_[np.ravel(sample), 0].astype(float)
        threshold = metrics.choose_threshold_with_guarantee(y, p, floor, confidence, patients)[0]
        broken += math.prod(chances[scores] for scores in sample) * (threshold > 0)
    assert 0.2 < broken <= 1 - confidence


def test_one_random_image_of_each_patient():
    rng = np.random.default_rng(3)
    patients = rng.integers(0, 400, 1600)
    drawn = metrics.one_image_per_patient(np.arange(1600.0), patients)
    assert sorted(patients[drawn.astype(int)]) == np.unique(patients).tolist()
    assert (np.diff(drawn) > 0).all() and 700 < drawn.mean() < 900


def test_wilson_equals_scipy():

    for k, n in ((0, 10), (10, 10), (1, 7), (370, 390), (123, 234)):
        for level in (0.9, 0.95):
            result = binomtest(k, n)
            assert proportions.wilson_interval(k, n, level) == pytest.approx(
                tuple(result.proportion_ci(level, "wilson")), abs=1e-12
            )
    for bad in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError):
            proportions.wilson_interval(*bad)


def test_wilson_covers():
    """Coverage summed exactly over the binomial: near 95% on average, never far below."""
    from scipy.stats import binom

    cover = []
    for p in np.linspace(0.05, 0.95, 19):
        k = np.arange(101)
        inside = [lo <= p <= hi for lo, hi in (proportions.wilson_interval(int(i), 100) for i in k)]
        cover.append(binom.pmf(k, 100, p)[inside].sum())
    assert 0.94 < np.mean(cover) < 0.965 and min(cover) > 0.91


def _delong_brute(y, scores):
    """The definition: structural components over all pairs, ties one half."""
    pos, neg = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    psi = np.array([[[(s[i] > s[j]) + 0.5 * (s[i] == s[j]) for j in neg] for i in pos] for s in scores])
    return (psi.mean(axis=(1, 2)), np.cov(psi.mean(axis=2)) / len(pos) + np.cov(psi.mean(axis=1)) / len(neg))


@pytest.mark.parametrize("grid", [None, 10])
def test_delong_equals_its_definition(grid):
    from scipy.stats import norm

    rng = np.random.default_rng(3)
    y, a = _random_scores(rng, 80, grid)
    b = np.clip(a + rng.normal(0, 0.15, 80), 0, 1)
    (auc_a, auc_b), cov = _delong_brute(y, [a, b])
    got, lo, hi = intervals.delong_interval(y, a)
    half = 1.959963984540054 * math.sqrt(cov[0, 0])
    assert (got, lo, hi) == pytest.approx((auc_a, auc_a - half, min(1, auc_a + half)), abs=1e-12)
    difference, p = intervals.delong_test(y, a, b)
    z = (auc_a - auc_b) / math.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
    assert (difference, p) == pytest.approx((auc_a - auc_b, 2 * norm.sf(abs(z))), abs=1e-12)
    assert intervals.delong_test(y, b, a) == pytest.approx((-difference, p))
    assert intervals.delong_test(y, a, a) == (0.0, 1.0)


def test_delong_agrees_with_the_bootstrap_and_covers():
    from scipy.stats import norm

    rng = np.random.default_rng(4)
    y, p = _random_scores(rng, 600)
    _, lo, hi = intervals.delong_interval(y, p)
    (draws,) = intervals.bootstrap_summary(y, p, [0.5], intervals.bootstrap_weights(np.arange(600), 1000))
    boot = intervals.percentiles(draws["auroc"])
    assert (lo, hi) == pytest.approx(boot, abs=0.004)
    truth, hits = norm.cdf(1 / math.sqrt(2)), 0  # AUROC of N(1, 1) against N(0, 1)
    for _ in range(400):
        s = norm.cdf(np.r_[rng.normal(1, 1, 60), rng.normal(0, 1, 60)])
        _, lo, hi = intervals.delong_interval(np.r_[np.ones(60, int), np.zeros(60, int)], s)
        hits += lo <= truth <= hi
    assert 0.92 < hits / 400 < 0.98


def _all_draws(groups, n, seed):
    """What `bootstrap_weights` yields, by its definition and in one piece: int64 [n, N]."""
    _, codes = np.unique(groups, return_inverse=True)
    draws = np.random.default_rng(seed).integers(codes.max() + 1, size=(n, codes.max() + 1))
    return np.stack([np.bincount(draw, minlength=codes.max() + 1)[codes] for draw in draws])


@pytest.mark.parametrize("block", [1, 1000, 2**15])
def test_bootstrap_draws_do_not_depend_on_the_blocks(block, monkeypatch):
    monkeypatch.setattr(intervals, "BLOCK", block)
    groups = np.arange(90) % 71  # odd: the generator makes 32-bit numbers in pairs, one may be left over
    blocks = list(intervals.bootstrap_weights(groups, 401, seed=7))
    assert max(b.size for b in blocks) <= max(block, 90)
    assert (np.concatenate(blocks) == _all_draws(groups, 401, 7)).all()
    for groups, n in (([], 5), ([1, 2], 0)):
        with pytest.raises(ValueError, match="bootstrap needs"):
            next(intervals.bootstrap_weights(groups, n))


@pytest.mark.parametrize("grid", [None, 8])
def test_vectorised_bootstrap_equals_resampling(grid, monkeypatch):
    """Every draw of every figure against summarize_at_threshold on the repeated rows."""
    monkeypatch.setattr(intervals, "BLOCK", 1000)  # 8 draws a block
    rng = np.random.default_rng(6)
    y, p = _random_scores(rng, 120, grid)
    groups = rng.integers(0, 40, 120)
    weights = _all_draws(groups, 12, 2)
    same_patient = [np.flatnonzero(groups == g)[0] for g in groups]
    assert (weights == weights[:, same_patient]).all()  # patients stay whole
    thresholds = (0.5, 0.0, 1.0, 0.375)
    summaries = intervals.bootstrap_summary(y, p, thresholds, intervals.bootstrap_weights(groups, 12, 2))
    for thr, draws in zip(thresholds, summaries, strict=True):
        for b, w in enumerate(weights):
            index = np.repeat(np.arange(120), w)
            row = metrics.summarize_at_threshold(y[index], p[index], thr)
            for name, values in draws.items():
                assert values[b] == pytest.approx(row[name], abs=1e-12), (name, thr)


def test_draws_of_one_class_are_undefined_at_every_threshold():
    weights = [np.array([[1, 1, 0], [0, 0, 3], [2, 0, 1]])]  # negatives only, positives only, both
    for draws in intervals.bootstrap_summary([0, 0, 1], [0.1, 0.6, 0.7], [0.2, 0.9], weights):
        for name, values in draws.items():
            assert np.isnan(values[:2]).all() and np.isfinite(values[2]), name
    with pytest.raises(ValueError, match="threshold is NaN"):
        intervals.bootstrap_summary([0, 1], [0.1, 0.6], [0.5, math.nan], [np.ones((1, 2), int)])


def test_bootstrap_memory_is_bounded_and_curves_are_computed_once():
    """800 draws of 8,000 images are 49 MiB as one array; three thresholds share AUROC's and AUPRC's draws."""
    rng = np.random.default_rng(8)
    y, p = _random_scores(rng, 8000)
    groups, peaks = rng.integers(0, 5000, 8000), []
    for n in (100, 800):
        tracemalloc.start()
        draws = intervals.bootstrap_summary(y, p, [0.4, 0.5, 0.6], intervals.bootstrap_weights(groups, n))
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    assert peaks[0] < 10 and peaks[1] < peaks[0] + 1, peaks
    for name in ("auroc", "auprc"):
        assert draws[0][name] is draws[1][name] is draws[2][name]


def test_intervals_at_several_thresholds_are_those_of_each():
    rng = np.random.default_rng(9)
    y, p = _random_scores(rng, 200, 20)
    groups, thresholds = rng.integers(0, 90, 200), [0.3, 0.5, 1.0]
    draws = intervals.bootstrap_summary(y, p, thresholds, intervals.bootstrap_weights(groups, 150))
    together = intervals.intervals_of_draws(y, p, thresholds, draws, groups)
    assert together == [intervals.intervals_at_threshold(y, p, thr, groups, n=150) for thr in thresholds]
    row = metrics.summarize_at_threshold(y, p, 0.5)
    assert together[1]["recall"]["wilson"] == list(
        proportions.wilson_interval(row["tp"], row["tp"] + row["fn"])
    )
    assert together[1]["auroc"]["delong"] == list(intervals.delong_interval(y, p)[1:])
    with pytest.raises(ValueError, match="one group per label"):
        intervals.intervals_at_threshold(y, p, 0.5, groups[1:])


def test_one_image_of_a_class_has_figures_and_no_delong_interval():
    """Its variance cannot be estimated from one image (n - 1 in the denominator)."""
    y, p = np.array([0, 0, 0, 0, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4, 0.6, 0.5])
    found = intervals.intervals_at_threshold(y, p, 0.45, np.arange(6), n=100)
    assert "delong" not in found["auroc"] and found["recall"]["wilson"][1] == 1
    two = intervals.intervals_at_threshold(np.r_[y, 1], np.r_[p, 0.7], 0.45, np.arange(7), n=100)
    assert "delong" in two["auroc"]


def test_bootstrap_is_fast_and_refuses_one_class():
    rng = np.random.default_rng(8)
    y, p = _random_scores(rng, 624)
    started = time.perf_counter()
    intervals.intervals_at_threshold(y, p, 0.5, rng.integers(0, 400, 624), n=2000)
    assert time.perf_counter() - started < 5
    y = np.r_[1, np.zeros(30, int)]  # one patient holds the only positive: a third of the draws lack it
    p, weights = np.linspace(1, 0, 31), intervals.bootstrap_weights(np.arange(31), 300)
    (draws,) = intervals.bootstrap_summary(y, p, [0.5], weights)
    assert np.isnan(draws["auroc"]).sum() > 60
    assert intervals.percentiles(draws["auroc"]) == pytest.approx((1, 1))
    with pytest.raises(ValueError, match="one class"):
        intervals.percentiles(np.full(50, math.nan))


def test_mcnemar_by_hand():
    """8 and 2 discordant pairs: 2 * P(Bin(10, 1/2) <= 2) = 2 * 56 / 1024."""
    a = np.array([True] * 8 + [False] * 2 + [True] * 5 + [False] * 4)
    b = np.array([False] * 8 + [True] * 2 + [True] * 5 + [False] * 4)
    assert intervals.mcnemar_test(a, b) == (8, 2, pytest.approx(112 / 1024))
    assert intervals.mcnemar_test(a, a) == (0, 0, 1.0)


def test_copies_of_an_image_are_no_evidence():
    """Each image five times, of one patient: figures and p-values are those of single images."""
    rng = np.random.default_rng(4)
    y, a = _random_scores(rng, 60, 10)
    b = np.clip(a + rng.normal(0, 0.2, 60), 0, 1)
    five = [np.repeat(values, 5) for values in (y, a, b, np.arange(60))]
    assert intervals.delong_test(*five) == pytest.approx(intervals.delong_test(y, a, b))
    assert intervals.delong_test(*five[:3])[1] < intervals.delong_test(*five)[1] / 2
    right = [(p >= 0.5) == (y == 1) for p in (a, b)]
    once = intervals.mcnemar_test(*right)
    assert 0 < once[2] < 1 and sum(once[:2]) > 5
    several = intervals.mcnemar_test(*(np.repeat(r, 5) for r in right), five[3])
    assert several == (5 * once[0], 5 * once[1], pytest.approx(once[2]))


def test_mcnemar_of_patients_equals_all_signs():
    """Patients with 3, -2, 1, 1, 0 and -1 images ahead: all 2^6 signs, one by one."""
    ahead = np.array([3, -2, 1, 1, 0, -1])
    counts = np.abs(ahead) + 2  # and two images on which both are right
    groups = np.repeat(np.arange(6), counts)
    a = np.concatenate([[True, True] + [n > 0] * abs(n) for n in ahead])
    b = np.concatenate([[True, True] + [n < 0] * abs(n) for n in ahead])
    sums = [abs(sum(s * n for s, n in zip(signs, ahead))) for signs in itertools.product((1, -1), repeat=6)]
    expected = np.mean([total >= abs(ahead.sum()) for total in sums])
    shuffled = np.random.default_rng(0).permutation(len(groups))
    assert intervals.mcnemar_test(a[shuffled], b[shuffled], groups[shuffled]) == (
        5,
        3,
        pytest.approx(expected),
    )


def test_two_equal_models_differ_no_more_often_than_promised():
    """40 patients with one to six images, whose errors are alike: both tests, by patient, at 5% (and far more
    by image)."""
    rng, small, by_image = np.random.default_rng(5), np.zeros(3), 0
    for _ in range(300):
        groups = np.repeat(np.arange(40), rng.integers(1, 7, 40))
        y = (groups % 2).astype(int)
        a, b = (
            expit(2 * y - 1 + rng.normal(0, 1.5, 40)[groups] + rng.normal(0, 0.3, len(y))) for _ in range(2)
        )
        found = intervals.compare_at_thresholds(y, a, 0.5, b, 0.5, groups, n=1)
        small += [found[k] <= 0.05 for k in ("delong", "mcnemar_recall", "mcnemar_specificity")]
        by_image += intervals.delong_test(y, a, b)[1] <= 0.05
    assert (small <= 0.09 * 300).all() and by_image > 0.2 * 300


def test_paired_comparison_signs_and_equality():
    rng = np.random.default_rng(2)
    y, good = _random_scores(rng, 300)
    worse = np.clip(good + rng.normal(0, 0.5, 300), 0, 1)
    got = intervals.compare_at_thresholds(y, good, 0.5, worse, 0.5, np.arange(300), n=300)
    for name in ("auroc", "recall", "specificity"):
        a, b = (metrics.summarize_at_threshold(y, p, 0.5)[name] for p in (good, worse))
        assert got[name]["difference"] == pytest.approx(a - b)
        assert got[name]["lo"] <= a - b <= got[name]["hi"]
    assert got["auroc"]["lo"] > 0 and got["delong"] < 0.01
    same = intervals.compare_at_thresholds(y, good, 0.5, good, 0.5, np.arange(300), n=50)
    assert (
        same["auroc"] == {"difference": 0.0, "lo": 0.0, "hi": 0.0}
        and same["delong"] == same["mcnemar_recall"] == 1.0
    )


def test_temperature_is_recovered_and_minimal():
    """Labels drawn from softmax(z), logits 3 z: T is 3 up to noise, and no point of a grid does better."""
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, (40_000, 3))
    prob = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    y = (rng.random((40_000, 1)) > prob.cumsum(1)).sum(1).clip(0, 2)
    t = metrics.fit_temperature(3 * z, y)
    assert t == pytest.approx(3, rel=0.03)

    def loss(t):
        return torch.nn.functional.cross_entropy(torch.tensor(3 * z / t), torch.tensor(y)).item()

    assert loss(t) <= min(loss(g) for g in np.linspace(1, 6, 51)) + 1e-9
    separable = metrics.fit_temperature(np.array([[1.0, 0], [0, 1.0]]), np.array([0, 1]))
    assert 0.01 <= separable < 0.03  # the loss is 0 to the last bit from there on
    backwards = metrics.fit_temperature(np.array([[0, 1.0], [1.0, 0]]), np.array([0, 1]))
    assert "equal probabilities" in metrics.temperature_limit(backwards) and not metrics.temperature_limit(t)
    assert "separate" in metrics.temperature_limit(metrics.LEAST)
    for logits, y in (
        (np.zeros((2, 2)), [0, 2]),
        (np.full((2, 2), np.nan), [0, 1]),
        (np.zeros((3, 2)), [0, 1]),
    ):
        with pytest.raises(ValueError):
            metrics.fit_temperature(logits, np.array(y))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 8))  # a far smaller T would saturate float64 into ties
def test_temperature_changes_no_ranking_and_no_decision(seed, temperature):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, 60)
    y[:2] = 0, 1
    logits = rng.normal(0, 2, (60, 2)) + np.stack([-y, y], 1)
    before, after = tempered(logits, 1.0), tempered(logits, temperature)
    assert (np.argsort(before, kind="stable") == np.argsort(after, kind="stable")).all()
    assert ((before >= 0.5) == (after >= 0.5)).all()
    a, b = (metrics.choose_threshold_by_min_recall(y, p, 0.9) for p in (before, after))
    assert ((before >= a[0]) == (after >= b[0])).all() and a[1:] == b[1:]


def test_calibration_error_brier_nll_by_hand():
    """Two bins of two: |0.15 - 0.5| and |0.8 - 1| with weight one half each."""
    y, p = np.array([0, 1, 1, 1]), np.array([0.1, 0.2, 0.7, 0.9])
    ece, bins = metrics.calibration_error(y, p, bins=2)
    assert ece == pytest.approx(0.5 * 0.35 + 0.5 * 0.2)
    assert bins == [
        {"n": 2, "score": pytest.approx(0.15), "positives": 0.5},
        {"n": 2, "score": pytest.approx(0.8), "positives": 1.0},
    ]
    from sklearn.metrics import brier_score_loss, log_loss

    assert metrics.brier(y, p) == pytest.approx(brier_score_loss(y, p))
    assert metrics.nll(y, p) == pytest.approx(log_loss(y, p))


@pytest.mark.parametrize("positives, n", [(3, 10), (500, 1000), (390, 624)])
def test_constant_score_at_the_prevalence_is_calibrated(positives, n):
    """Labels in class order, as the files are: cutting ties by order gave 0.447 for 390 of 624."""
    y = np.r_[np.zeros(n - positives, int), np.ones(positives, int)]
    ece, bins = metrics.calibration_error(y, np.full(n, positives / n))
    assert ece == pytest.approx(0, abs=1e-12)
    assert len(bins) == min(15, n)
    assert metrics.calibration_error(y, np.full(n, 1.0))[0] == pytest.approx(1 - positives / n)


@given(
    pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=1, max_size=40),
    bins=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_calibration_error_does_not_depend_on_the_order_of_the_input(pairs, bins, seed):
    y, p = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs]) / 6
    order = np.random.default_rng(seed).permutation(len(y))
    assert metrics.calibration_error(y, p, bins) == metrics.calibration_error(y[order], p[order], bins)
    _, rows = metrics.calibration_error(y, p, bins)
    assert sum(r["n"] * r["positives"] for r in rows) == pytest.approx(y.sum())  # no label is lost
    sizes = [r["n"] for r in rows]
    assert sum(sizes) == len(y) and max(sizes) - min(sizes) <= 1


def test_calibration_error_without_ties_is_a_plain_cut():
    rng = np.random.default_rng(3)
    y, p = _random_scores(rng, 208)
    p = p * 0.9 + np.arange(208) * 1e-9  # no ties
    order, expected = np.argsort(p), 0.0
    ece, bins = metrics.calibration_error(y, p, 10)
    for part, row in zip(np.array_split(order, 10), bins, strict=True):
        expected += abs(p[part].sum() - y[part].sum()) / 208
        assert (row["n"], row["positives"]) == (len(part), y[part].mean())
    assert ece == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="at least one bin"):
        metrics.calibration_error(y, p, 0)


def test_predictive_values_and_net_benefit_by_hand():
    """Of 1,000 children 100 are sick; recall 0.9 and specificity 0.8 give 90 true and 180 false alarms, and
    call 720 children rightly and 10 wrongly healthy."""
    assert metrics.predictive_values(0.9, 0.8, 0.1) == pytest.approx((90 / 270, 720 / 730))
    y, p = np.array([1, 1, 0, 0]), np.array([0.9, 0.3, 0.6, 0.1])
    model, treat_all = metrics.net_benefit(y, p, [0.5, 0.2])
    assert model == pytest.approx([1 / 4 - 1 / 4, 2 / 4 - 1 / 4 * 0.25])
    assert treat_all == pytest.approx([0.5 - 0.5, 0.5 - 0.5 * 0.25])


def test_reported_interval_never_claims_certainty():
    y, p = np.r_[np.zeros(20, int), np.ones(20, int)], np.linspace(0, 1, 40)
    row = metrics.summarize_at_threshold(y, p, 0.5)
    row["interval"] = intervals.intervals_at_threshold(y, p, 0.5, np.arange(40), n=200)
    assert row["interval"]["recall"]["bootstrap"] == [1.0, 1.0]
    assert proportions.reported_interval(row, "recall") == pytest.approx(proportions.wilson_interval(20, 20))
    row = metrics.summarize_at_threshold(y, p, 0.6)
    row["interval"] = intervals.intervals_at_threshold(y, p, 0.6, np.arange(40), n=200)
    assert proportions.reported_interval(row, "recall") == row["interval"]["recall"]["bootstrap"]


def _clustered(seed, sick=40, healthy=20, images=8):
    """Truth, scores and patients: `images` alike of each healthy patient, one of each sick; a healthy patient
    is rightly called with a chance of 0.95."""
    rng = np.random.default_rng(seed)
    wrong = np.repeat(rng.random(healthy) < 0.05, images)
    y = np.r_[np.ones(sick, int), np.zeros(healthy * images, int)]
    p = np.r_[rng.uniform(0.6, 1, sick), np.where(wrong, 0.9, 0.1)]
    return y, p, np.r_[np.arange(sick), sick + np.repeat(np.arange(healthy), images)]


def test_interval_of_alike_patients_counts_patients():
    """20 healthy patients of 8 alike images, true specificity 0.95: counting images, 36% of the intervals
    missed it."""
    missed, degenerate = 0, 0
    for seed in range(100):
        y, p, patients = _clustered(seed)
        row = metrics.summarize_at_threshold(y, p, 0.5)
        row["interval"] = intervals.intervals_at_threshold(y, p, 0.5, patients, n=40)
        low, high = proportions.reported_interval(row, "specificity")
        missed += not low <= 0.95 <= high
        if row["specificity"] == 1:
            degenerate += 1
            assert [low, high] == pytest.approx(proportions.wilson_interval(20, 20))
    assert 25 < degenerate < 50 and missed / 100 <= 0.07


def test_no_reported_interval_claims_certainty():
    """A model that is right about everything; limits against closed forms and brute force."""
    y, p, patients = _clustered(0, sick=30)
    p = np.where(y == 1, p, 0.1)
    row = metrics.summarize_at_threshold(y, p, 0.5)
    row["interval"] = intervals.intervals_at_threshold(y, p, 0.5, patients, n=50)
    spans = {k: proportions.reported_interval(row, k) for k in row["interval"]}
    assert all(row[k] > 1 - 1e-12 and 0 < lo < hi == 1 for k, (lo, hi) in spans.items()), spans
    assert spans["auroc"] == pytest.approx([0.025 ** (1 / 20), 1])
    for key, n in (("recall", 30), ("specificity", 20), ("precision", 30), ("acc", 50)):
        assert spans[key] == pytest.approx(proportions.wilson_interval(n, n)), key
    share = proportions.wilson_interval(30, 30)[0]  # of the images that are sick or called so
    assert spans["f1"][0] == pytest.approx(2 * share / (1 + share))
    for n in (1, 7, 200):
        found = proportions.alike_interval(1.0, n), proportions.alike_interval(0.0, n)
        expected = [binomtest(k, n).proportion_ci(method="exact") for k in (n, 0)]
        assert np.allclose(found, expected, atol=1e-12)
    nothing = metrics.summarize_at_threshold(y, p, 1.0)  # calls nobody: a precision of nothing
    nothing["interval"] = intervals.intervals_at_threshold(y, p, 1.0, patients, n=50)
    assert proportions.reported_interval(nothing, "precision") == [0, 1]
    old = {
        "interval": {
            "recall": {"bootstrap": [1.0, 1.0], "wilson": [0.9, 1.0]},
            "auroc": {"bootstrap": [1.0, 1.0]},
        }
    }
    assert proportions.reported_interval(old, "recall") == [0.9, 1.0]  # as an older version wrote it
    assert proportions.reported_interval(old, "auroc") == [1.0, 1.0]


@pytest.mark.parametrize("auroc, prevalence", [(0.99, 0.5), (0.9, 0.3), (0.7, 0.5), (0.95, 0.02)])
def test_least_auprc_of_an_auroc(auroc, prevalence):
    """No random ROC curve of this area has less, and the worst curve without order reaches it."""
    u = (np.arange(20_000) + 0.5) / 20_000
    odds = (1 - prevalence) / prevalence
    wanted = (1 - auroc) * odds  # the mean of c = f * odds
    bound = proportions.auprc_at_least(auroc, prevalence)
    rng, least = np.random.default_rng(0), 1.0
    for _ in range(100):
        f = np.cumsum(rng.random(20_000) * (rng.random(20_000) < rng.random() ** 6))
        c = f / max(f.mean(), 1e-12) * wanted
        if c.max() <= odds:
            least = min(least, (u / (u + c)).mean())
    low, high = 1e-9, 1e9  # of the multiplier l of c = sqrt(u / l) - u, by bisection
    for _ in range(200):
        middle = math.sqrt(low * high)
        c = np.maximum(np.sqrt(u / middle) - u, 0)
        low, high = (middle, high) if c.mean() > wanted else (low, middle)
    assert bound == pytest.approx((u / (u + c)).mean(), abs=1e-3)
    assert bound - 1e-9 <= least


def test_differences_that_never_vary_have_a_width():
    """Two models that decide and rank alike without being one: 20 healthy and 30 sick patients cannot exclude
    a small difference."""
    y, p, patients = _clustered(0, sick=30)
    p = np.where(y == 1, p, 0.1)
    found = intervals.compare_at_thresholds(y, p, 0.5, p**2, 0.25, patients, n=50)
    for key, n in (("recall", 30), ("specificity", 20), ("acc", 50), ("auroc", 20), ("precision", 30)):
        rest = 1 - 0.025 ** (1 / n)
        assert found[key] == pytest.approx({"difference": 0, "lo": -rest, "hi": rest}), key
    constant = intervals.compare_at_thresholds(y, p, 0.5, np.full(len(p), 0.4), 0.5, patients, n=50)
    assert (
        constant["auroc"]["difference"] == 0.5 and 0 < constant["auroc"]["lo"] < 0.5 < constant["auroc"]["hi"]
    )
    assert constant["delong"] == 2.0**-19  # a sign test of 20 pairs of patients, not 0
    truth, a, b = y[:, None].repeat(2, 1), p[:, None].repeat(2, 1), (p**2)[:, None].repeat(2, 1)
    means = intervals.difference_of_means(
        *(intervals.mean_auroc_draws(truth, scores, patients, n=50) for scores in (a, b))
    )
    assert [means["lo"], means["hi"]] == pytest.approx([-(1 - 0.025 ** (1 / 20)), 1 - 0.025 ** (1 / 20)])


def test_interval_of_a_proportion_draws_patients():
    rng = np.random.default_rng(3)
    hits, patients = rng.random(60) < 0.7, np.arange(60) // 4
    draws = []
    for weights in _all_draws(patients, 200, 0):
        draws.append(np.repeat(hits, weights).mean())
    found = intervals.proportion_interval(hits, patients, n=200)
    assert found == pytest.approx(np.percentile(draws, [2.5, 97.5]))
    assert intervals.proportion_interval(np.ones(60), patients, n=200) == pytest.approx(
        proportions.wilson_interval(15, 15)
    )


def _scores_of_two_sides(seed, n=240):
    """The input of `evaluate`: overlapping classes, two images a patient."""
    rng, scores = np.random.default_rng(seed), {}
    for split in ("val", "test"):
        y = rng.permutation(np.arange(n) % 2)
        logits = rng.normal(0, 1, (n, 2)) + np.stack([-y, y], axis=1)
        scores |= {f"{split}_labels": y, f"{split}_logits": logits, f"{split}_patients": np.arange(n) // 2}
    return scores


@pytest.mark.parametrize("temperature", [False, True])
def test_evaluate_returns_its_parts_and_leaves_its_input_alone(temperature):
    scores = _scores_of_two_sides(0)
    before = {name: values.copy() for name, values in scores.items()}
    rule = operating_point.Rule(min_recall=0.9, temperature=temperature, bootstrap=60, prevalence=0.2)
    calibration, p1 = operating_point.evaluate(scores, rule)
    found = of_one(calibration)
    assert list(scores) == list(before) and all((scores[k] == before[k]).all() for k in before)
    fitted = metrics.fit_temperature(scores["val_logits"], scores["val_labels"])
    assert calibration["temperature"] == fitted and calibration["temperature_applied"] is temperature
    for split in ("val", "test"):
        y, patients = scores[f"{split}_labels"], scores[f"{split}_patients"]
        logits = scores[f"{split}_logits"]
        expected = tempered(logits, fitted if temperature else 1.0)
        assert (p1[split] == expected).all()
        for name in ("at_0.5", "at_rec", "at_guaranteed"):
            row = dict(found[split][name])
            interval, at_prevalence = row.pop("interval"), row.pop("at_prevalence")
            assert row == metrics.summarize_at_threshold(y, expected, row["thr"])
            assert interval == intervals.intervals_at_threshold(y, expected, row["thr"], patients, 60)
            ppv, npv = metrics.predictive_values(row["recall"], row["specificity"], 0.2)
            assert at_prevalence == {"prevalence": 0.2, "ppv": ppv, "npv": npv}
        assert (
            found["probability"][split]["before"]["ece"]
            == metrics.calibration_error(y, tempered(logits, 1.0))[0]
        )
        after = found["probability"][split]["after"]
        assert after["nll"] == metrics.nll(y, tempered(logits, fitted))
    y, p = scores["val_labels"], p1["val"]
    chosen = metrics.choose_threshold_by_min_recall(y, p, 0.9)[0]
    assert found["threshold"] == pytest.approx(middle_below(chosen, p), rel=1e-9)
    promised = metrics.choose_threshold_with_guarantee(y, p, 0.9, 0.95, scores["val_patients"])[0]
    thr = found["guarantee"]["threshold"]
    assert thr == found["test"]["at_guaranteed"]["thr"] == pytest.approx(middle_below(promised, p))
    assert json.loads(json.dumps(calibration)) == calibration


def test_evaluate_says_why_there_is_no_guarantee_or_refuses():
    scores = _scores_of_two_sides(1, n=60)
    found = of_one(operating_point.evaluate(scores, operating_point.Rule(bootstrap=60))[0])
    assert found["guarantee"]["threshold"] is None and "at_guaranteed" not in found["test"]
    assert "at least 59 are needed" in found["guarantee"]["why_not"]
    with pytest.raises(ValueError, match="at least 59 are needed"):
        operating_point.evaluate(scores, operating_point.Rule(bootstrap=60, strict=True))


@pytest.mark.parametrize("split, where", [("val", "validation"), ("test", "test")])
@pytest.mark.parametrize("label, missing", [(0, "no positives"), (1, "no negatives")])
def test_evaluate_names_the_side_that_lacks_a_class(split, where, label, missing):
    scores = _scores_of_two_sides(2, n=60)
    scores[f"{split}_labels"] = np.full(60, label)
    with pytest.raises(metrics.InputError, match=f"{missing} among the {where} labels"):
        operating_point.evaluate(scores, operating_point.Rule(bootstrap=60))


@pytest.mark.parametrize(
    "setting",
    [
        {"min_recall": 0},
        {"min_recall": math.nan},
        {"confidence": 1},
        {"bootstrap": 0},
        {"bootstrap": 10**9},
        {"prevalence": 0.0},
        {"prevalence": math.nan},
    ],
)
def test_a_rule_checks_its_numbers(setting):
    with pytest.raises(metrics.InputError, match=next(iter(setting))):
        operating_point.Rule(**setting)
