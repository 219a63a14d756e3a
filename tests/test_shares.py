"""Tests of shares: exactness by brute force, level and intervals by simulation with known true labels."""

import warnings
from itertools import combinations, product

import numpy as np
import pytest
from scipy.stats import binom, kstest, multinomial, norm

from calibration import shares, shift
from common.task import Task

D = 6
FINDINGS = Task(("Mass", "Edema"), kind="sigmoid")


def people(rng, chances, count, auroc=0.96):
    """(features [count, D], logits [count, K], classes [count]) of a made-up model that knows the truth:
    class k lies further along axis k, and the logits are those of Bayes for classes of equal shares."""
    apart = norm.ppf(auroc)  # along each of two axes
    classes = rng.choice(len(chances), count, p=chances)
    features = rng.normal(size=(count, D))
    features[np.arange(count), classes] += apart
    return features.astype(np.float32), (apart * features[:, : len(chances)]).astype(np.float32), classes


def reference(rng, chances, count, task, auroc=0.96):
    features, logits, classes = people(rng, chances, count, auroc)
    training = people(rng, chances, 200, auroc)[0]
    labels = shares.kinds(task, classes)
    return shift.Reference(shift.learn(training, features, logits, range(count), labels), "made up")


def judged(known, features, logits, task, name=""):
    """The verdict on one image each of so many patients."""
    batch, (typicality, places) = shift.Batch(), known.place(features)
    called = task.scores(logits)[:, 0] >= 0.5
    for i, row in enumerate(zip(typicality, places, logits, called)):
        batch.add(f"{name}{i}", f"p{i}", *row)
    return known.judge(batch, task.scores(known.logits)[:, 0] >= 0.5, task)


# ---------------------------------------------------------------- the level, with true labels


@pytest.mark.parametrize("auroc", [0.96, 0.99])
def test_another_prevalence_is_no_shift(auroc, monkeypatch):
    """The sick and the healthy are alike in both; 70% are sick in validation, 10% in the batch. A test that
    compares those called sick with one another rejects half of these draws and more."""
    monkeypatch.setattr(shares, "DRAWS", 99)
    task, tries, found = Task(), 20, []
    for seed in range(tries):
        rng = np.random.default_rng([seed, 1])
        known = reference(rng, (0.3, 0.7), 300, task, auroc)
        features, logits, _ = people(rng, (0.9, 0.1), 100, auroc)
        found.append(judged(known, features, logits, task, seed))
    verdicts = [v["verdict"] for v in found]
    assert set(verdicts) <= {"share", "shifted"}
    assert verdicts.count("shifted") <= binom.ppf(0.999, tries, shares.LEVEL)
    spans = [v["shares"]["PNEUMONIA"] for v in found if v["shares"]]
    missed = sum(not low <= 0.1 <= high for low, high in spans)
    assert missed <= binom.ppf(0.999, tries, 0.05)
    assert np.mean([high - low for low, high in spans]) < 0.25
    assert "another share of sick people (" in found[0]["says"]
    assert "precision, accuracy, NPV and calibrated probabilities change" in shift.sentence(found[0])


@pytest.mark.parametrize("chances", [(0.7, 0.1, 0.2), (0.1, 0.1, 0.8)])
def test_other_shares_of_three_classes_are_no_shift(chances, monkeypatch):
    monkeypatch.setattr(shares, "DRAWS", 99)
    task, tries, found = Task(("NORMAL", "TB", "COVID")), 15, []
    for seed in range(tries):
        rng = np.random.default_rng([seed, 2])
        known = reference(rng, (0.4, 0.3, 0.3), 300, task)
        features, logits, _ = people(rng, chances, 120)
        found.append(judged(known, features, logits, task, seed))
    verdicts = [v["verdict"] for v in found]
    assert verdicts.count("shifted") <= binom.ppf(0.999, tries, shares.LEVEL)
    assert verdicts.count("like") <= 2
    covered = [all(lo <= p <= hi for p, (lo, hi) in zip(chances, v["shares"].values())) for v in found]
    assert np.mean(covered) > 0.7
    assert "each class (TB " in next(v["says"] for v in found if v["verdict"] == "share")


def test_another_share_of_one_finding_is_no_shift(monkeypatch):
    """Edema is rarer in the batch, Mass is not: among people with any finding the mix differs, too."""
    monkeypatch.setattr(shares, "DRAWS", 99)

    def table(rng, chances, count):
        truth = (rng.random((count, 2)) < chances).astype(np.int8)
        features = rng.normal(size=(count, D)).astype(np.float32)
        features[:, :2] += 3 * truth
        return features, 3 * features[:, :2] - 4.5, truth

    verdicts, tries = [], 8
    for seed in range(tries):
        rng = np.random.default_rng([seed, 3])
        features, logits, truth = table(rng, (0.4, 0.6), 400)
        truth[:20] = -1  # labels of some are unknown
        labels = shares.kinds(FINDINGS, truth)
        arrays = shift.learn(table(rng, (0.4, 0.6), 200)[0], features, logits, range(400), labels)
        features, logits, _ = table(rng, (0.4, 0.05), 200)
        verdicts.append(judged(shift.Reference(arrays, ""), features, logits, FINDINGS, seed))
    found = [v["verdict"] for v in verdicts]
    assert found.count("shifted") <= binom.ppf(0.999, tries, shares.LEVEL)
    assert [v["people"] for v in verdicts].count("people with Edema") > tries / 2
    moved, logits, _ = table(rng, (0.4, 0.05), 200)
    verdict = judged(shift.Reference(arrays, ""), moved + 1, logits, FINDINGS)
    assert verdict["verdict"] == "shifted" and "or with a single one" in verdict["says"]


def test_a_shift_is_noticed_at_another_prevalence():
    """Other images, with or without another share of sick people; few of them, and images far away."""
    task, rng = Task(), np.random.default_rng(0)
    known = reference(rng, (0.3, 0.7), 300, task)
    for sick in (0.1, 0.7):
        features, logits, _ = people(rng, (1 - sick, sick), 80)
        features[:, 2:] += 0.7
        verdict = judged(known, features, logits, task)
        assert verdict["verdict"] == "shifted" and verdict["p_joint"] <= 0.05
        assert set(verdict["p"]) == set(shares.TESTS)
    features, logits, _ = people(rng, (0.9, 0.1), 10)
    assert judged(known, features + 4, logits, task)["verdict"] == "shifted"
    assert judged(known, features, logits, task)["verdict"] == "few"


def test_a_class_that_validation_hardly_has():
    """Four healthy people cannot say how other shares would look: no verdict where the batch differs."""
    task, rng = Task(), np.random.default_rng(0)
    features, logits, _ = people(rng, (0.0, 1.0), 200)
    some = people(rng, (1.0, 0.0), 4)
    features, logits = np.concatenate([features, some[0]]), np.concatenate([logits, some[1]])
    labels = np.repeat([1, 0], [200, 4]).astype(np.int16)[:, None]
    arrays = shift.learn(people(rng, (0.5, 0.5), 200)[0], features, logits, range(204), labels)
    verdict = judged(shift.Reference(arrays, ""), *people(rng, (0.9, 0.1), 100)[:2], task)
    assert verdict["verdict"] == "unknown" and "too few patients of one class" in verdict["says"]
    same = judged(shift.Reference(arrays, ""), *people(rng, (0.0, 1.0), 100)[:2], task)
    assert same["verdict"] == "like"


def test_the_verdict_does_not_depend_on_the_order():
    task, rng = Task(), np.random.default_rng(0)
    known = reference(rng, (0.3, 0.7), 150, task)
    features, logits, _ = people(rng, (0.9, 0.1), 60)
    typicality, places = known.place(features)
    rows = [(f"{i}", f"p{i}", typicality[i], places[i], logits[i], logits[i, 1] > 0) for i in range(60)]
    found = []
    for order in (rows, rows[::-1]):
        batch = shift.Batch()
        for row in order:
            batch.add(*row)
        found.append(known.judge(batch, known.logits[:, 1] > 0, task))
    assert found[0] == found[1]


# ---------------------------------------------------------------- parts, against brute force and closed forms


def test_subsamples_are_multinomial_and_without_replacement():
    rng, chances, tries = np.random.default_rng(0), np.array([0.2, 0.5, 0.3]), 2000
    orders = np.split(np.arange(60), [10, 40])  # groups of 10, 30 and 20
    m, counts = shares.most(chances, [10, 30, 20]), np.zeros((tries, 3), int)
    for i in range(tries):
        chosen = shares.subsample(chances, orders, rng.random(3))
        assert len(set(chosen)) == len(chosen) == m
        counts[i] = np.bincount(np.digitize(chosen, [10, 40]), minlength=3)
    assert counts.mean(axis=0) == pytest.approx(m * chances, abs=0.2)
    expected = multinomial(m, chances).cov()
    assert np.cov(counts.T) == pytest.approx(expected, abs=0.5)
    assert len(shares.subsample([0.0, 1.0], orders[:2], [0.5, 0.5])) == 30


def test_how_many_can_be_drawn_by_counting():
    """The chance of running short, by simulation, is below SHORT; a few more would exceed it."""
    rng, chances, sizes = np.random.default_rng(0), (0.9, 0.1), (90, 210)
    m = shares.most(chances, sizes)
    assert (rng.binomial(m, 0.9, 400_000) > 90).mean() < shares.SHORT
    assert (rng.binomial(m + 2, 0.9, 400_000) > 90).mean() > shares.SHORT / 2
    assert shares.most((0.3, 0.7), (300, 0)) >= 0 and shares.most((1.0, 0.0), (90, 210)) == 90


def test_subsamples_and_batch_are_exchangeable(monkeypatch):
    """At the true share, p-values of all tests are valid: P(p <= a) <= a."""
    monkeypatch.setattr(shares, "DRAWS", 99)
    monkeypatch.setattr(shares, "CLEAR", 1.0)
    found = {name: [] for name in shares.TESTS}
    for seed in range(150):
        rng = np.random.default_rng([seed, 4])
        x, logits, classes = people(rng, (0.3, 0.7), 120)
        y, other, _ = people(rng, (0.9, 0.1), 30)
        values = np.concatenate([x, y])
        samples = {"features": values, "scores": np.concatenate([logits, other])}
        pool = shares.Pool(np.linalg.norm(values, axis=1), samples, 120)
        orders = [rng.permutation(np.flatnonzero(classes == k)) for k in (0, 1)]
        for name, p in pool.tests(shares.subsample(np.array([0.9, 0.1]), orders, rng.random(2))).items():
            found[name].append(p)
    for a, (name, values) in product((0.05, 0.2), found.items()):
        assert np.mean(np.array(values) <= a) <= binom.ppf(0.9999, 150, a) / 150, name


def test_permutation_test_against_all_permutations(monkeypatch):
    """Two sides so small that every assignment can be tried."""
    monkeypatch.setattr(shares, "CLEAR", 1.0)  # no p-value is left after a few draws
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=(5, 2)), rng.normal(size=(5, 2)) + 0.8])
    new = np.repeat([False, True], 5)
    squared = ((x[:, None] - x[None]) ** 2).sum(2)
    kernel = np.exp(-squared / np.median(squared))
    assert shares.gaussian_kernel(x) == pytest.approx(kernel, abs=1e-6)

    def statistic(first):
        i, j = list(first), list(set(range(10)) - set(first))
        return kernel[np.ix_(i, i)].mean() + kernel[np.ix_(j, j)].mean() - 2 * kernel[np.ix_(i, j)].mean()

    observed = statistic(range(5))
    expected = np.mean([statistic(c) >= observed - 1e-9 for c in combinations(range(10), 5)])
    got = shares.two_sample_test(kernel.astype(np.float32), new, draws=4000)
    assert got == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 4000))
    assert shares.two_sample_test(kernel, np.arange(10) == 0) is None


def test_odd_images_against_simulation():
    """How many of n uniform numbers beat the r-th best of N: counted."""
    rng, validated, n, tries = np.random.default_rng(0), 300, 40, 40_000
    limit = np.sort(rng.random((tries, validated)), axis=1)[:, -3]  # r = 3 = 0.01 * 301
    beaten = (rng.random((tries, n)) > limit[:, None]).sum(axis=1)
    for odd in (1, 2, 3):
        p = (beaten >= odd).mean()
        assert shares.odd_test(odd, n, validated) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / tries))
    assert shares.odd_test(0, n, validated) == 1.0
    assert shares.odd_test(0, n, 98) is None
    assert shares.odd_test(0, n, 99) == 1.0  # 1 / (99 + 1) is odd enough


def test_p_values_of_shares_are_uniform():
    """The z-test of the mean scores at the true shares, and the permutation test at equal ones."""
    quick, means = [], []
    for seed in range(300):
        rng = np.random.default_rng([seed, 5])
        _, logits, classes = people(rng, (0.4, 0.6), 150)
        values = np.concatenate([logits, people(rng, (0.8, 0.2), 60)[1], people(rng, (0.4, 0.6), 60)[1]])
        values = (values[:, 1] - values[:, 0])[:, None]
        orders, batch = [np.flatnonzero(classes == k) for k in (0, 1)], np.arange(150, 210)
        quick.append(shares.shares_test(values, orders, batch, np.array([[0.8, 0.2]]))[0])
        means.append(shares.mean_test(values, np.arange(150), batch + 60))
    assert kstest(quick, "uniform").pvalue > 0.001 and kstest(means, "uniform").pvalue > 0.001


def test_shares_of_a_known_mixture():
    """Means of three groups, mixed by hand, give the shares back; a mean outside gives the nearest shares."""
    corners = np.array([[0.1, 0.2], [0.8, 0.3], [0.4, 0.9]])
    values = np.concatenate([np.repeat(corners, 4, axis=0), np.array([[0.2, 0.5, 0.3]]) @ corners])
    labels = np.repeat([0, 1, 2], 4)
    assert shares.estimate(values, labels, np.array([12])) == pytest.approx([0.2, 0.5, 0.3], abs=1e-4)
    values[12] = [0.9, 0.2]
    assert shares.estimate(values, labels, np.array([12])) == pytest.approx([0, 1, 0], abs=1e-4)


def test_grid_is_fine_everywhere():
    """Near shares differ by at most half a standard error, at the ends too."""
    for count in (20, 300, 1000):
        found = shares.grid(count)
        middle = (found[1:] + found[:-1]) / 2
        steps = np.diff(found) / np.sqrt(middle * (1 - middle) / count)
        assert found[0] == 0 and found[-1] == pytest.approx(1) and steps.max() < 0.51


def test_whose_share_may_differ():
    """Tables: any finding, from the columns where no column says so; unknown where nothing is known."""
    truth = np.array([[1, 0], [0, 0], [-1, 0], [-1, 1], [-1, -1]], np.int8)
    expected = [[1, 1, 0], [0, 0, 0], [-1, -1, 0], [1, -1, 1], [-1, -1, -1]]
    assert shares.kinds(FINDINGS, truth).tolist() == expected
    none = Task(("No Finding", "Mass"), kind="sigmoid")
    assert shares.kinds(none, np.array([[1, 0], [0, 1]])).tolist() == [[0, 1, 0], [1, 0, 1]]
    assert shares.kinds(Task(), np.array([0, 1, -1])).tolist() == [[0], [1], [-1]]
    labels = shares.kinds(FINDINGS, np.repeat(truth[:2], 6, axis=0))
    asked = shares.questions(FINDINGS, labels, np.random.default_rng(0).random((14, 2)))
    assert [q.people for q in asked] == ["people with any finding", "people with Mass"]  # nobody has Edema


def test_rare_classes_have_no_share_of_their_own():
    task, labels = Task(("NORMAL", "TB", "COVID")), np.repeat([0, 1, 2], [9, 4, 6])[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [asked] = shares.questions(task, labels, np.random.default_rng(0).random((25, 3)))
    assert asked.groups == ("NORMAL", "COVID") and np.bincount(asked.labels).tolist() == [13, 6]
    assert shares.questions(Task(), np.repeat([0, 1], [9, 4])[:, None], np.zeros((20, 1))) == []
