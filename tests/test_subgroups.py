"""Tests of groups of patients: intervals, gaps and families (cohort/figures), and who is in a group
(cohort/who)."""

import argparse
import itertools

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from calibration.intervals import delong_interval
from cohort import figures as subgroups
from cohort import groups as groups_module
from cohort.who import MOST, Asked, Group, age_bands, groups_of
from studies import subgroups as study


def scored(n, seed=0, levels=30):
    """Truth and scores of n images, with ties."""
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.4).astype(int)
    return y, np.round(levels * np.clip(0.5 * rng.random(n) + 0.35 * y, 0, 1)) / levels


def group(inside, known=None, attribute="sex", value="F"):
    """A Group of images; all are known unless said otherwise."""
    inside = np.asarray(inside, bool)
    return Group(attribute, value, inside, np.ones(len(inside), bool) if known is None else known)


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize("k, n", [(0, 12), (12, 12), (11, 12), (40, 55)])
def test_one_image_a_patient_gives_the_exact_interval(k, n):
    hits = np.arange(n) < k
    found = subgroups.clustered_proportion(hits, np.arange(n), 0.99)
    exact = binomtest(k, n).proportion_ci(0.99, "exact")
    assert found == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_copies_of_an_image_make_no_interval_narrower():
    hits = np.arange(40) < 33
    low, high = subgroups.clustered_proportion(hits, np.arange(40), 0.95)
    copied = subgroups.clustered_proportion(np.repeat(hits, 5), np.repeat(np.arange(40), 5), 0.95)
    assert copied[0] <= low and copied[1] >= high and copied[1] - copied[0] < 1.2 * (high - low)
    # All alike: there is no variance, so a patient counts once.
    assert subgroups.clustered_proportion(np.ones(60, bool), np.repeat(np.arange(12), 5), 0.95) == (
        pytest.approx(binomtest(12, 12).proportion_ci(0.95, "exact").low),
        1.0,
    )


def test_auroc_and_its_variance_are_delongs_for_single_images():
    y, p = scored(150)
    auroc, influences = subgroups.auroc_by_patient(y, p, np.arange(150))
    value, low, high = delong_interval(y, p)
    assert auroc == pytest.approx(roc_auc_score(y, p)) and auroc == pytest.approx(value)
    assert np.sqrt(np.sum(influences**2)) == pytest.approx((high - low) / 2 / 1.959964, rel=0.02)
    again, copied = subgroups.auroc_by_patient(np.repeat(y, 4), np.repeat(p, 4), np.repeat(np.arange(150), 4))
    assert again == pytest.approx(auroc) and np.sort(copied) == pytest.approx(np.sort(influences))


def test_a_perfect_auroc_is_not_certain():
    y = np.repeat([0, 1], 15)
    auroc, low, high = subgroups.auroc_interval(y, y * 0.5 + 0.2, np.arange(30), 0.95)
    assert (auroc, high) == (1.0, 1.0) and low == pytest.approx(0.025 ** (1 / 15))


# ---------------------------------------------------------------- gaps


def exhaustive_p(statistic, labels):
    """The share of all ways to label as many units whose statistic is at least the observed one."""
    units, inside = len(labels), int(sum(labels))
    values = []
    for chosen in itertools.combinations(range(units), inside):
        values.append(statistic(np.isin(np.arange(units), chosen)))
    return twice_the_tail(values, statistic(np.asarray(labels, bool)))


def twice_the_tail(values, observed):
    """Twice the share of the values that lie as far as the observed one on its side."""
    return 2 * np.mean(np.sign(observed) * np.array(values) >= abs(observed) - 1e-9)


def test_the_gap_of_proportions_is_tested_by_all_permutations(monkeypatch):
    monkeypatch.setattr(subgroups, "ENOUGH", 10**6)  # no early end, so the p-value is a mean of many draws
    sizes = np.array([1, 2, 3, 1, 2, 4, 1, 2, 3, 1])
    whose = np.repeat(np.arange(10), sizes)
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], bool)
    hits = np.random.default_rng(2).random(len(whose)) < np.where(labels[whose], 0.5, 0.9)

    shares = np.array([hits[whose == person].mean() for person in range(10)])

    def statistic(chosen):
        spread = (shares - shares.mean()) ** 2
        variance = spread[chosen].sum() / chosen.sum() ** 2 + spread[~chosen].sum() / (~chosen).sum() ** 2
        return (shares[chosen].mean() - shares[~chosen].mean()) / np.sqrt(variance)

    gap, p = subgroups.proportion_gap(hits, labels[whose], whose, 5000)
    assert gap == pytest.approx(shares[labels].mean() - shares[~labels].mean())
    truth = exhaustive_p(statistic, labels)
    assert 0.02 < truth < 0.4
    assert p == pytest.approx(truth, rel=0.15)


def test_the_gap_of_aurocs_is_tested_by_permutations_within_kinds(monkeypatch):
    monkeypatch.setattr(subgroups, "ENOUGH", 10**6)
    y = np.array([0] * 7 + [1] * 6)
    p = np.array([0.1, 0.9, 0.8, 0.3, 0.15, 0.25, 0.05, 0.2, 0.35, 0.7, 0.75, 0.6, 0.95])
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0], bool)

    def curve(y, p):
        wins = (p[y == 1][:, None] > p[y == 0][None]).astype(float)
        return wins.mean(), wins.mean(axis=1).var() / len(wins) + wins.mean(axis=0).var() / len(wins.T)

    def statistic(inside):
        (inner, spread), (outer, rest) = curve(y[inside], p[inside]), curve(y[~inside], p[~inside])
        return (inner - outer) / np.sqrt(max(1e-18, spread + rest))

    values = []
    for healthy in itertools.combinations(range(7), 3):
        for sick in itertools.combinations(range(7, 13), 3):
            values.append(statistic(np.isin(np.arange(13), healthy + sick)))
    truth = twice_the_tail(values, statistic(labels))
    gap, found = subgroups.auroc_gap(y, p, labels, np.arange(13), 5000)
    assert gap == pytest.approx(roc_auc_score(y[labels], p[labels]) - roc_auc_score(y[~labels], p[~labels]))
    assert 0.02 < truth < 0.4
    assert found == pytest.approx(truth, rel=0.15)


def test_a_verdict_has_the_sign_of_what_was_tested():
    """F: 5 patients with 100 images, all found, and 55 with one, 22 of them found. M: 100 with two images, 90
    found. By image F is ahead, by patient far behind."""
    sizes = np.r_[np.full(5, 100), np.ones(55, int), np.full(100, 2)]
    found = np.r_[np.ones(5, bool), np.arange(55) < 22, np.arange(100) < 90]
    whose, female = np.repeat(np.arange(160), sizes), np.arange(160) < 60
    hits, inside = found[whose], female[whose]
    assert hits[inside].mean() > hits[~inside].mean()
    gap, p = subgroups.proportion_gap(hits, inside, whose, 2000)
    assert gap == pytest.approx(27 / 60 - 0.9) and p < 0.01
    # AUROC likewise: the sick of F with many images score high, those with one score as the healthy do.
    y = np.r_[np.ones(len(whose), int), np.zeros(160, int)]
    scores = np.r_[np.where(hits, 0.9, 0.1), np.tile([0.1, 0.5], 80)]
    groups, people = np.r_[inside, np.arange(160) < 60], np.r_[whose, np.arange(1000, 1160)]
    images = [roc_auc_score(y[part], scores[part]) for part in (groups, ~groups)]
    gap, p = subgroups.auroc_gap(y, scores, groups, people, 2000)
    assert images[0] > images[1] and gap < -0.2 and p < 0.01


def test_a_permutation_test_ends_when_it_is_lost():
    blocks = iter([np.r_[np.zeros(5), np.ones(30)], np.ones(5)])
    assert subgroups.permutation_p(1.0, blocks, 1000) == 1  # twice 20 / 25
    blocks = [np.r_[np.zeros(75), -np.ones(30)], np.ones(5)]
    assert subgroups.permutation_p(-1.0, iter(blocks), 1000) == 2 * 20 / 95
    assert subgroups.permutation_p(1.0, iter([np.zeros(600), np.r_[1, -5, np.zeros(598)]]), 999) == 4 / 1000


def test_holm_by_hand():
    assert subgroups.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert subgroups.holm([0.6, 0.9]) == [1, 1] and subgroups.holm([]) == []


# ---------------------------------------------------------------- families


def test_complements_are_one_question():
    rng = np.random.default_rng(0)
    sex, known = rng.random(200) < 0.4, rng.random(200) < 0.9
    machine = rng.random(200) < 0.3
    groups = [
        group(sex & known, known),
        group(~sex & known, known, value="M"),
        group(machine, attribute="machine", value="A"),
        group(sex & known, known, attribute="colour", value="red"),  # the same people under another name
        group(np.ones(200), attribute="view", value="PA"),  # everybody: there is no rest
        group(np.arange(200) < 9, attribute="view", value="AP"),
    ]
    figure = subgroups.Proportion(rng.random(200) < 0.8, np.arange(200))
    women, men, a, red, everybody, few = subgroups.family(figure, groups)
    assert women["gap"] == -men["gap"] and women["p"] == men["p"] == red["p"]
    low, high = sorted([women["p"], a["p"]])  # two questions
    assert sorted([women["adjusted"], a["adjusted"]]) == pytest.approx([min(1, 2 * low), max(2 * low, high)])
    assert "adjusted" not in everybody and everybody["rest"] == 0
    assert few == {"patients": 9, "rest": 191}
    # Four different sets of images have an interval: women, men, machine A, everybody.
    exact = binomtest(int(figure.hits[machine].sum()), int(machine.sum())).proportion_ci(
        1 - 0.05 / 4, "exact"
    )
    assert (a["lo"], a["hi"]) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_recall_counts_the_sick_and_specificity_the_healthy():
    y = np.repeat([1, 0, 1, 0], [9, 40, 30, 12])  # nine sick women, twelve healthy men
    p = np.where(y == 1, 0.9, 0.2)
    p[60:79] = 0.1  # of the 30 sick men 19 are missed
    groups = [group(np.arange(91) < 49), group(np.arange(91) >= 49, value="M")]
    found = groups_module.figures_of_groups(y, p, np.arange(91), groups, {"@Rec": 0.5}, 0.95)
    assert found["patients"] == [[9, 40], [30, 12]]
    women, men = found["figures"]["recall @Rec"]
    assert women == {"patients": 9, "rest": 30} and men["broken"] and men["value"] == pytest.approx(11 / 30)
    assert "adjusted" not in men  # the rest has nine
    women, men = found["figures"]["specificity @Rec"]
    assert women["value"] == men["value"] == 1 and women["adjusted"] == 1 and women["hi"] == 1 > women["lo"]
    _, rows = groups_module.table_of(found)
    assert rows[0][:4] == ["sex F", "9 / 40", "- (9 patients)", "-"]
    assert rows[1][4].endswith(" BROKEN") and rows[1][5] == "- (rest: 9 patients)"
    assert groups_module.verdicts(found, 0.95) == ["recall @Rec of sex M is 0.367, floor 0.95"]


def test_only_groups_that_are_each_others_rest_are_told_once():
    rows = [{"gap": gap, "p": 0.003, "adjusted": 0.01} for gap in (-0.25, -0.25, 0.5)]
    found = {"groups": [("ward", name) for name in "abc"], "figures": {"specificity @Rec": rows}}
    told = groups_module.verdicts(found, 0.95)
    assert [text.split(" differs")[0][-6:] for text in told] == ["ward a", "ward b", "ward c"]
    rows = [{"gap": gap, "p": 0.003, "adjusted": 0.01} for gap in (0.25, -0.25)]
    found = {"groups": [("sex", "F"), ("sex", "M")], "figures": {"specificity @Rec": rows}}
    assert [text.split(" differs")[0] for text in groups_module.verdicts(found, 0.95)] == [
        "specificity @Rec of sex M"
    ]


def test_one_class_alone_has_no_auroc():
    y, groups = np.ones(30, int), [group(np.arange(30) < 15), group(np.arange(30) >= 15, value="M")]
    found = groups_module.figures_of_groups(
        y, np.linspace(0, 1, 30), np.arange(30), groups, {"@Rec": 0.5}, 0.9
    )
    assert [row["patients"] for row in found["figures"]["AUROC"]] == [0, 0]
    assert [row["patients"] for row in found["figures"]["specificity @Rec"]] == [0, 0]
    assert all("adjusted" in row for row in found["figures"]["recall @Rec"])


def test_promises_to_groups_hold_in_simulation():
    """studies/subgroups.py, small: 12 sets where nothing differs, 4 where machine B is broken."""
    null = [study.simulate(seed, 100, images=2) for seed in range(12)]
    for figure in study.TRUTH:
        # Each at most 5%: more than 3 of 12 would have a chance of 0.002.
        for k, what in enumerate(("gaps", "missed", "broken")):
            assert sum(found[figure][k] for found in null) <= 3, (figure, what)
    broken = [study.simulate(seed, 300, broken=2.0) for seed in range(4)]
    found = np.array([result[f"recall {study.POINT}"][3:] for result in broken])
    assert (found.mean(axis=0) > 0.7).all()


# ---------------------------------------------------------------- who is in a group


def test_age_bands_cover_every_age_once():
    assert age_bands("0-18, 18-65,65+") == ((0, 18), (18, 65), (65, np.inf))
    assert age_bands("0+") == ((0, np.inf),)
    for text, why in {
        "0-18,16-65,65+": "overlap",
        "0-18,20-65,65+": "no band holds 18 to 20",
        "18-65,65+": "no band holds 0 to 18",
        "0-18,18-65": "no band holds 65 and more",
        "0-18,18-x,65+": "'18-x' is no band",
        "0-18,,18+": "'' is no band",
        "18-0,18+": "lower to a higher",
        "0-nan,5+": "lower to a higher",
        "65+,0-65": "overlap",
        "": "is no band",
    }.items():
        with pytest.raises(argparse.ArgumentTypeError, match=why):
            age_bands(text)


def test_children_are_in_the_band_of_their_fraction_of_a_year():
    ages = np.repeat([0.0, 0.999, 1.0, 4.99, 65.0, 110.0, np.nan, -1.0, np.inf], 10)
    groups, notes = groups_of({"age": ages}, np.arange(90).astype(str), Asked(age_bands()))
    assert {g.value: int(g.inside.sum()) for g in groups} == {"0-1": 20, "1-5": 20, "65+": 20}
    assert all(g.known.sum() == 60 for g in groups) and notes == [
        "age unknown: 30 patients, in no group of it"
    ]


def test_small_and_many_values_are_counted_not_shown():
    patients = np.arange(3000).astype(str)
    machine = np.array([f"m{i % 300}" for i in range(3000)])
    groups, notes = groups_of({"machine": machine}, patients, Asked(age_bands()))
    assert len(groups) == MOST and notes == [
        "machine: 300 values have 10 patients: the 30 with the most are groups"
    ]
    groups, notes = groups_of({"ward": machine[:2990]}, patients[:2990], Asked(age_bands(), ("ward",)))
    assert len(groups) == MOST and "fewer than 10 patients, so no group: m290 (9), " in notes[0]
    assert "and 4 more values" in notes[0]
    # An image of the same patient is no further patient.
    groups, notes = groups_of({"view": np.full(50, "PA")}, np.repeat("p", 50), Asked(age_bands()))
    assert groups == [] and notes == ["view: fewer than 10 patients, so no group: PA (1)"]


def test_columns_that_tell_nothing_make_no_group():
    cohort = {"sex": np.full(20, ""), "age": np.full(20, np.nan)}
    assert groups_of(cohort, np.arange(20), Asked(age_bands())) == ([], [])
    assert groups_of(None, np.arange(20), Asked(age_bands())) == ([], [])
