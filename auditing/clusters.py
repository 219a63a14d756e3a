"""Section 5 of an audit: whether the false alarms are of one kind of patients."""

import numpy as np
from sklearn.cluster import KMeans
from sklearn.preprocessing import StandardScaler

from auditing.figures import by_patient, difference_of_shares, share
from common.proportions import count_of

SIZE = 25  # patients of a group, about
MOST_GROUPS, LEAST = 12, 40  # groups; patients without the finding for the section
LEAST_IN_GROUP = 10  # patients: a group of one outlier is no kind
LEAST_ALARMS = 5  # patients with a false alarm: two may lie anywhere
FOLDS, PERMUTATIONS, SHOWN = 5, 10_000, 6


class Kind:
    """Patients of one kind: k-means of `x` [P, D], one row a patient, and the group with the greatest excess
    of `alarms`, float [P] in [0, 1]: the share of a patient's images that are called sick."""

    def __init__(self, x, alarms):
        count = int(np.clip(len(x) // SIZE, 2, MOST_GROUPS))
        self.scaler = StandardScaler().fit(x)
        self.means = KMeans(count, n_init=5, random_state=0).fit(self.scaler.transform(x))
        self.groups, self.count = self.means.labels_, count
        found = excesses(alarms[None], self.groups, count)[0]  # -inf of groups that are too small
        self.worst, self.excess = int(found.argmax()), float(found.max())

    def of(self, x):
        """Which patients [P, D] fall into the worst group: bool [P]."""
        return self.means.predict(self.scaler.transform(x)) == self.worst

    def nearest(self, x):
        """The patients of the worst group, the most typical first: int64 [p]."""
        distance = self.means.transform(self.scaler.transform(x))[:, self.worst]
        return np.array([k for k in np.argsort(distance, kind="stable") if self.groups[k] == self.worst])


def excesses(alarms, groups, count):
    """How many standard deviations the alarms of each group lie above chance: alarms [B, P], groups [P] ->
    [B, count]; -inf of groups of fewer than LEAST_IN_GROUP patients.

    Chance is a draw without replacement of as many patients as the group has."""
    people = len(groups)
    sizes = np.bincount(groups, minlength=count)
    sums = alarms @ np.eye(count)[groups]
    mean, variance = alarms.mean(axis=1, keepdims=True), alarms.var(axis=1, ddof=1)[:, None]
    spread = np.sqrt(variance * sizes * (1 - sizes / people))
    found = (sums - sizes * mean) / np.maximum(spread, 1e-12)
    return np.where(sizes >= LEAST_IN_GROUP, found, -np.inf)


def p_of_worst(kind, alarms, seed=0):
    """How often the worst group is as bad when alarms [P] are permuted among patients, the worst chosen each
    time: a max statistic. The groups do not depend on the alarms, so they stay."""
    rng, as_bad = np.random.default_rng(seed), 0
    for _ in range(0, PERMUTATIONS, 1000):
        shuffled = rng.permuted(np.tile(alarms, (1000, 1)), axis=1)
        worst = excesses(shuffled, kind.groups, kind.count).max(axis=1)
        as_bad += int((worst >= kind.excess - 1e-9).sum())
    return (as_bad + 1) / (PERMUTATIONS + 1)


def held_out(x, alarms, seed=0):
    """Which patients fall into the worst group of the other four fifths: bool [P]. Neither the groups nor the
    choice have seen them."""
    inside = np.zeros(len(x), bool)
    folds = np.random.default_rng(seed).permutation(len(x)) % FOLDS
    for fold in range(FOLDS):
        rest = folds != fold
        inside[~rest] = Kind(x[rest], alarms[rest]).of(x[~rest])
    return inside


def figures(features, called, patients, files):
    """What is known of the worst group, as JSON; and its most typical images, positions int64 [n].

    features: float64 [N, D] of images without the finding; called: bool [N]; patients, files: [N]. "gap" and
    what is held out are None where no held-out patient falls into a worst group, or all do. None, None
    where there are too few patients, or too few of them with an alarm, or only alarms."""
    if count_of(patients) < LEAST or count_of(patients[called]) < LEAST_ALARMS or called.all():
        return None, None
    (x, counts), names = by_patient(features, patients), np.unique(patients)
    x = x / counts[:, None]
    alarms = by_patient(called[:, None].astype(float), patients)[0][:, 0] / counts
    kind = Kind(x, alarms)
    inside, spared = np.isin(patients, names[kind.groups == kind.worst]), ~called
    found = {
        "groups": kind.count,
        "patients": int((kind.groups == kind.worst).sum()),
        "of_patients": len(names),
        "images": int(inside.sum()),
        "specificity": float(spared[inside].mean()),
        "others": float(spared[~inside].mean()),
        "excess": kind.excess,
        "p": p_of_worst(kind, alarms),
        "files": [str(file) for file in np.asarray(files)[inside]],
        "gap": None,
    }
    elsewhere = np.isin(patients, names[held_out(x, alarms)])
    if elsewhere.any() and not elsewhere.all():
        found["held_out"] = share(spared[elsewhere], patients[elsewhere])
        found["held_out_others"] = share(spared[~elsewhere], patients[~elsewhere])
        found["held_out_patients"] = count_of(patients[elsewhere])
        found["gap"] = difference_of_shares(spared, elsewhere, patients)
    typical = [np.flatnonzero(patients == names[k])[0] for k in kind.nearest(x)[:SHOWN]]
    return found, np.array(typical)
