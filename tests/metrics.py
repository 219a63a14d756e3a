"""Tests of metrics."""

import json
import math
import time

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import metrics
from tests.shared import brute_force_threshold


@given(
    pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=2, max_size=24),
    min_recall=st.sampled_from([0.01, 0.2, 1 / 3, 0.5, 2 / 3, 0.75, 0.9, 0.95, 1.0]),
)
@settings(max_examples=400)
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
        ([1] * 19 + [1, 0], [0.9] * 19 + [0.1, 0.2], 0.95, (0.9, 0.95, 1.0)),
    ],
)  # 19/20 counts as 0.95
def test_threshold_by_hand(y, p, target, expected):
    assert metrics.choose_threshold_by_min_recall(y, p, target) == pytest.approx(expected)


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
    "y, p, target, word",
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
def test_metric_errors(y, p, target, word):
    with pytest.raises(ValueError, match=word):
        metrics.choose_threshold_by_min_recall(y, p, target)
    if word != "min_recall":
        with pytest.raises(ValueError, match=word):
            metrics.summarize_at_threshold(y, p, 0.5)


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
    """k by summing the binomial by hand: the largest k with P(Bin(n, 1 - target) <= k - 1) <= 1 - confidence."""
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
    """True recall is known: positives score Phi(N(1, 1)). In clusters the images of a patient correlate 0.8."""
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


def test_wilson_and_clopper_pearson_equal_scipy():
    from scipy.stats import binomtest

    for k, n in ((0, 10), (10, 10), (1, 7), (370, 390), (123, 234)):
        for level in (0.9, 0.95):
            result = binomtest(k, n)
            assert metrics.wilson_interval(k, n, level) == pytest.approx(
                tuple(result.proportion_ci(level, "wilson")), abs=1e-12
            )
            assert metrics.clopper_pearson_interval(k, n, level) == pytest.approx(
                tuple(result.proportion_ci(level, "exact")), abs=1e-9
            )
    for bad in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError):
            metrics.wilson_interval(*bad)


def test_wilson_covers():
    """Coverage summed exactly over the binomial: near 95% on average, never far below."""
    from scipy.stats import binom

    cover = []
    for p in np.linspace(0.05, 0.95, 19):
        k = np.arange(101)
        inside = [lo <= p <= hi for lo, hi in (metrics.wilson_interval(int(i), 100) for i in k)]
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
    got, lo, hi = metrics.delong_interval(y, a)
    half = 1.959963984540054 * math.sqrt(cov[0, 0])
    assert (got, lo, hi) == pytest.approx((auc_a, auc_a - half, min(1, auc_a + half)), abs=1e-12)
    difference, p = metrics.delong_test(y, a, b)
    z = (auc_a - auc_b) / math.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
    assert (difference, p) == pytest.approx((auc_a - auc_b, 2 * norm.sf(abs(z))), abs=1e-12)
    assert metrics.delong_test(y, b, a) == pytest.approx((-difference, p))
    assert metrics.delong_test(y, a, a) == (0.0, 1.0)


def test_delong_agrees_with_the_bootstrap_and_covers():
    from scipy.stats import norm

    rng = np.random.default_rng(4)
    y, p = _random_scores(rng, 600)
    _, lo, hi = metrics.delong_interval(y, p)
    boot = metrics.bootstrap_interval(metrics.roc_auc_score, y, p, n=1000)
    assert (lo, hi) == pytest.approx(boot, abs=0.004)
    truth, hits = norm.cdf(1 / math.sqrt(2)), 0  # AUROC of N(1, 1) against N(0, 1)
    for _ in range(400):
        s = norm.cdf(np.r_[rng.normal(1, 1, 60), rng.normal(0, 1, 60)])
        _, lo, hi = metrics.delong_interval(np.r_[np.ones(60, int), np.zeros(60, int)], s)
        hits += lo <= truth <= hi
    assert 0.92 < hits / 400 < 0.98


@pytest.mark.parametrize("grid", [None, 8])
def test_vectorised_bootstrap_equals_resampling(grid):
    """Every draw of every figure against summarize_at_threshold on the repeated rows."""
    rng = np.random.default_rng(6)
    y, p = _random_scores(rng, 120, grid)
    groups = rng.integers(0, 40, 120)
    weights = metrics.bootstrap_weights(groups, 30, seed=2)
    assert (
        weights == weights[:, [np.flatnonzero(groups == g)[0] for g in groups]]
    ).all()  # patients stay whole
    for thr in (0.5, 0.0, 1.0, 0.375):
        draws = metrics.bootstrap_summary(y, p, thr, weights)
        for b, w in enumerate(weights):
            index = np.repeat(np.arange(120), w)
            row = metrics.summarize_at_threshold(y[index], p[index], thr)
            for name, values in draws.items():
                assert values[b] == pytest.approx(row[name], abs=1e-12), (name, thr)
    lo, hi = metrics.bootstrap_interval(metrics.roc_auc_score, y, p, groups, n=200, seed=9)
    fast = metrics.bootstrap_summary(y, p, 0.5, metrics.bootstrap_weights(groups, 200, 9))["auroc"]
    assert (lo, hi) == pytest.approx(tuple(np.percentile(fast, [2.5, 97.5])))


def test_bootstrap_is_fast_and_refuses_one_class():
    rng = np.random.default_rng(8)
    y, p = _random_scores(rng, 624)
    started = time.perf_counter()
    metrics.intervals_at_threshold(y, p, 0.5, rng.integers(0, 400, 624), n=2000)
    assert time.perf_counter() - started < 5
    y = np.r_[1, np.zeros(30, int)]  # one patient holds the only positive: a third of the draws lack it
    lo, hi = metrics.bootstrap_interval(metrics.roc_auc_score, y, np.linspace(1, 0, 31), n=300)
    assert (lo, hi) == pytest.approx((1, 1))
    with pytest.raises(ValueError, match="one class"):
        metrics.bootstrap_interval(lambda y, p: math.nan, y, np.linspace(1, 0, 31), n=50)


def test_mcnemar_by_hand():
    """8 and 2 discordant pairs: 2 * P(Bin(10, 1/2) <= 2) = 2 * 56 / 1024."""
    a = np.array([True] * 8 + [False] * 2 + [True] * 5 + [False] * 4)
    b = np.array([False] * 8 + [True] * 2 + [True] * 5 + [False] * 4)
    assert metrics.mcnemar_test(a, b) == (8, 2, pytest.approx(112 / 1024))
    assert metrics.mcnemar_test(a, a) == (0, 0, 1.0)


def test_paired_comparison_signs_and_equality():
    rng = np.random.default_rng(2)
    y, good = _random_scores(rng, 300)
    worse = np.clip(good + rng.normal(0, 0.5, 300), 0, 1)
    got = metrics.compare_at_thresholds(y, good, 0.5, worse, 0.5, np.arange(300), n=300)
    for name in ("auroc", "recall", "specificity"):
        a, b = (metrics.summarize_at_threshold(y, p, 0.5)[name] for p in (good, worse))
        assert got[name]["difference"] == pytest.approx(a - b)
        assert got[name]["lo"] <= a - b <= got[name]["hi"]
    assert got["auroc"]["lo"] > 0 and got["delong"] < 0.01
    same = metrics.compare_at_thresholds(y, good, 0.5, good, 0.5, np.arange(300), n=50)
    assert (
        same["auroc"] == {"difference": 0.0, "lo": 0.0, "hi": 0.0}
        and same["delong"] == same["mcnemar_recall"] == 1.0
    )


def test_temperature_is_recovered_and_minimal():
    """Labels drawn from softmax(z), logits given as 3 z: T is 3 up to noise, and no grid point does better."""
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
    before, after = metrics.tempered(logits, 1.0), metrics.tempered(logits, temperature)
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


def test_predictive_values_and_net_benefit_by_hand():
    """1,000 children, 100 sick, recall 0.9, specificity 0.8: 90 true and 180 false alarms; 720 true, 10 false
    rests."""
    assert metrics.predictive_values(0.9, 0.8, 0.1) == pytest.approx((90 / 270, 720 / 730))
    y, p = np.array([1, 1, 0, 0]), np.array([0.9, 0.3, 0.6, 0.1])
    model, treat_all = metrics.net_benefit(y, p, [0.5, 0.2])
    assert model == pytest.approx([1 / 4 - 1 / 4, 2 / 4 - 1 / 4 * 0.25])
    assert treat_all == pytest.approx([0.5 - 0.5, 0.5 - 0.5 * 0.25])


def test_reported_interval_never_claims_certainty():
    y, p = np.r_[np.zeros(20, int), np.ones(20, int)], np.linspace(0, 1, 40)
    row = metrics.summarize_at_threshold(y, p, 0.5)
    row["interval"] = metrics.intervals_at_threshold(y, p, 0.5, np.arange(40), n=200)
    assert row["interval"]["recall"]["bootstrap"] == [1.0, 1.0]
    assert metrics.reported_interval(row, "recall") == pytest.approx(metrics.wilson_interval(20, 20))
    row = metrics.summarize_at_threshold(y, p, 0.6)
    row["interval"] = metrics.intervals_at_threshold(y, p, 0.6, np.arange(40), n=200)
    assert metrics.reported_interval(row, "recall") == row["interval"]["recall"]["bootstrap"]
