"""Figures of groups of patients, and whether a group differs from the rest. numpy and scipy, no torch, no
files.

All groups of one figure are a family: whoever looks at twenty groups finds one below the floor by chance. So
p-values are Holm's over the family, and intervals are simultaneous: each at 1 - 0.05 / G, G the number of
its groups (Bonferroni), so that all of them hold at once with confidence 0.95. Two groups that are each
other's rest (F and M, where nobody's sex is unknown) ask one question, and it counts once in Holm's
procedure. Groups of the same images count once in both.

Everything is by patient. Proportions: Clopper and Pearson's interval at an effective number of images (Korn
and Graubard 1998, Survey Methodology 24:193), which allows for images of one patient being alike. AUROC: the
logit interval (Pepe 2003, section 5.2) with the variance of DeLong for clusters (Obuchowski 1997, Biometrics
53:567). Gaps: a permutation test of a studentised difference. It is exact where group and rest are alike in
all that matters to the figure, and holds for many patients where they only share the figure (Janssen 1997;
Chung and Romano 2013, Annals of Statistics 41:484). What is permuted is whole patients; one with images in
the group and in the rest counts once in each, and as their two parts are alike, that makes the test
cautious."""

import numpy as np
from scipy.special import expit, logit
from scipy.stats import beta, t

from cohort.who import LEAST
from common.proportions import alike_interval

ERROR = 0.05  # of a family: the chance that any gap is found, or any interval misses, where there is nothing
ENOUGH = 20  # draws as extreme as the data end a permutation test: it will not be significant
FEWEST_DRAWS, DRAWS_A_TEST = 1999, 400  # of a permutation test, the second times the tests of the family
FEW = 30  # patients whose images' likeness cannot be estimated well
BLOCK = 2**19  # numbers held at once


# ---------------------------------------------------------------- one figure of one group


def clustered_proportion(hits, whose, level):
    """Interval of the mean of `hits`, bool [n], of patients `whose` [n] -> (lo, hi).

    Clopper and Pearson's, of n / D images: D, the design effect, is the variance by patients (of a ratio)
    over that of independent images; n / D is at most n, and less for few patients by the square of a ratio of
    t quantiles (Korn and Graubard 1998). Patients count by their effective number P = n^2 / (sum of squares
    of their images), the fewer the more unequal they are. Below FEW of them, and where all images are alike,
    the variance cannot be trusted, and n / D is at most P. With one image a patient it is Clopper and
    Pearson's interval itself."""
    _, codes, sizes = np.unique(whose, return_inverse=True, return_counts=True)
    n, share = len(hits), float(np.mean(hits))
    people = effective_number(whose)
    if len(sizes) == n or not 0 < share < 1:
        return clopper_pearson(share * people, people, level)
    residuals = np.bincount(codes, weights=hits - share)
    variance = people / max(people - 1, 0.5) * np.sum(residuals**2) / n**2
    effective = float(n)
    if variance * n > share * (1 - share):
        effective = max(1.0, share * (1 - share) / variance * n / (n - 1))
    if people < FEW:
        effective = min(effective, people)
    tail = (1 - level) / 2
    effective *= (t.isf(tail, n - 1) / t.isf(tail, max(1.0, people - 1))) ** 2
    return clopper_pearson(share * effective, effective, level)


def clopper_pearson(k, n, level):
    """The exact interval of a proportion k / n, whole numbers or not (scipy's takes whole ones only) -> (lo,
    hi)."""
    tail = (1 - level) / 2
    low = 0.0 if k <= 0 else float(beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k >= n else float(beta.isf(tail, k + 1, n - k))
    return low, high


def auroc_by_patient(y, p, whose):
    """AUROC and each patient's influence on it -> (float, float64 [P]): y, p, whose [n], both classes there.

    The influence of an image is its share of won pairs less the AUROC, over the images of its class; that of
    a patient is the sum over the images. The AUROC's variance is about the sum of their squares (Obuchowski
    1997)."""
    order = np.argsort(p, kind="stable")
    _, codes = np.unique(whose[order], return_inverse=True)
    scored = _Scored(y[order], p[order])
    auroc, influences = scored.curve(np.ones((1, len(y))))
    return float(auroc[0]), np.bincount(codes, weights=influences[0])


def auroc_interval(y, p, whose, level):
    """AUROC and its interval -> (auroc, lo, hi). InputError: none; both classes must be there.

    The logit of AUROC plus and minus Student's t times its standard error, with one degree of freedom less
    than the fewer of sick and healthy patients (their effective number). An AUROC without variance (1, say)
    has `alike_interval`."""
    fewer = min(effective_number(whose[y == k]) for k in (0, 1))
    auroc, influences = auroc_by_patient(y, p, whose)
    variance = np.sum(influences**2) * fewer / max(1.0, fewer - 1)
    if fewer < 2 or not 0 < auroc < 1 or variance <= 1e-18:
        return auroc, *map(float, alike_interval(auroc, fewer, level))
    half = t.isf((1 - level) / 2, fewer - 1) * np.sqrt(variance) / (auroc * (1 - auroc))
    return auroc, float(expit(logit(auroc) - half)), float(expit(logit(auroc) + half))


def effective_number(whose):
    """The effective number of patients (Kish 1965), from whose images these are [n]: n^2 / (sum of squares of
    their images). With as many images each it is their number."""
    sizes = np.unique(whose, return_counts=True)[1].astype(float)
    return float(np.sum(sizes) ** 2 / np.sum(sizes**2))


class _Scored:
    """Labels and scores in ascending order of score, ready for AUROCs of many selections."""

    def __init__(self, y, p):
        self.sick = y == 1
        new = np.r_[True, np.diff(p) > 0]
        self.starts, self.code = np.flatnonzero(new), np.cumsum(new) - 1  # of the distinct scores

    def curve(self, chosen):
        """(AUROC [rows], influence of each image [rows, n]) of selections `chosen`, 0 or 1, [rows, n]; NaN
        without both classes."""
        # Weights may be any numbers from 0: of a patient's images together 1, say.
        sick, healthy = chosen * self.sick, chosen * ~self.sick
        m, n = sick.sum(axis=1, keepdims=True), healthy.sum(axis=1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            won = self._below(healthy) / n  # of the pairs with a healthy image, if this one is sick
            lost = 1 - self._below(sick) / m
            auroc = (sick * won).sum(axis=1, keepdims=True) / m
            influences = sick * (won - auroc) / m + healthy * (lost - auroc) / n
        return auroc[:, 0], influences

    def _below(self, weights):
        """The weight below each score, and half of the weight at it: [rows, n]."""
        at = np.add.reduceat(weights, self.starts, axis=1)
        return (np.cumsum(at, axis=1) - at / 2)[:, self.code]


# ---------------------------------------------------------------- a gap


def permutation_p(observed, statistics, most):
    """Two-sided p-value of a permutation test whose draws come one block after the other: twice the share of
    the draws that lie as far on the side of `observed`, float. (Both tails together would be wrong for a
    studentised share: a group that happens to have no miss has hardly any variance, so it lies far out.)

    `statistics`: an iterator of arrays; at most `most` of their numbers are looked at. Stops at the draw
    that is the ENOUGH-th as extreme: the share is ENOUGH / draws; else (1 + extreme) / (1 + draws). Both are
    valid (Besag and Clifford 1991, Biometrika 78:301)."""
    extreme, drawn, sign = 0, 0, np.sign(observed)
    for block in statistics:
        block = block[: most - drawn]
        hits = np.flatnonzero(sign * block >= sign * observed * (1 - 1e-9) - 1e-12)
        if extreme + len(hits) >= ENOUGH:
            return min(1.0, 2 * ENOUGH / (drawn + int(hits[ENOUGH - extreme - 1]) + 1))
        extreme, drawn = extreme + len(hits), drawn + len(block)
        if drawn >= most:
            break
    return min(1.0, 2 * (1 + extreme) / (1 + drawn))


def shuffled(inside, strata, columns):
    """Yields float64 [rows, U]: `inside`, bool [U], permuted within `strata` [U]. Blocks of few rows come
    first, since most tests end early; `columns` is how many numbers a row will need."""
    rng, rows = np.random.default_rng(0), 64
    members = [np.flatnonzero(strata == k) for k in np.unique(strata)]
    while True:
        block = np.empty((rows, len(inside)))
        for units in members:
            block[:, units] = rng.permuted(np.broadcast_to(inside[units], (rows, len(units))), axis=1)
        yield block
        rows = int(max(1, min(4 * rows, BLOCK // columns)))


def units_of(inside, whose):
    """Patients in the group and in the rest -> (unit of each image [n], whether each unit is inside, bool
    [U]); a patient with images in both is two units."""
    _, codes = np.unique(whose, return_inverse=True)
    names, units = np.unique(2 * codes + inside, return_inverse=True)
    return units, names % 2 == 1


def proportion_gap(hits, inside, whose, most):
    """(share inside - share outside, p-value): hits, inside: bool [n], whose [n], `most` draws.

    Both are of the patients' own shares, so that each counts once: patients of many images in one group and
    of few in the other could not be exchanged, and a gap of images could even have the other sign."""
    units, labels = units_of(inside, whose)
    shares = np.bincount(units, weights=hits) / np.bincount(units)
    residuals = (shares - shares.mean()) ** 2  # under the hypothesis, both sides have the same mean
    n, m = labels.sum(), (~labels).sum()

    def statistic(chosen):
        other = 1 - chosen
        variance = chosen @ residuals / n**2 + other @ residuals / m**2
        return _studentised(chosen @ shares / n - other @ shares / m, variance)

    gap = float(shares[labels].mean() - shares[~labels].mean())
    draws = shuffled(labels, np.zeros(len(labels), int), len(labels))
    return gap, permutation_p(statistic(labels[None].astype(float))[0], map(statistic, draws), most)


def auroc_gap(y, p, inside, whose, most):
    """(AUROC inside - AUROC outside, p-value): y, p, inside, whose [n]; both sides have both classes.

    In both each patient counts once, with all of the images of one class together. Patients are permuted
    among those with the same kinds of images (sick, healthy, both), so that a group may have another share of
    the sick."""
    order = np.argsort(p, kind="stable")
    y, p, inside = y[order], p[order], inside[order]
    units, labels = units_of(inside, whose[order])
    scored, kinds = _Scored(y, p), np.zeros(len(labels), int)
    weights = np.zeros(len(y))
    for label in (0, 1):
        counts = np.bincount(units, weights=y == label)
        kinds += (label + 1) * (counts > 0)
        weights[y == label] = 1 / counts[units[y == label]]
    by_unit = np.argsort(units, kind="stable")
    first = np.searchsorted(units[by_unit], np.arange(len(labels)))

    def side(chosen):
        auroc, influences = scored.curve(chosen[:, units] * weights)
        return auroc, (np.add.reduceat(influences[:, by_unit], first, axis=1) ** 2).sum(axis=1)

    def statistic(chosen):
        (inner, spread), (outer, rest) = side(chosen), side(1 - chosen)
        return _studentised(inner - outer, spread + rest)

    inner, outer = scored.curve(np.stack([labels, ~labels])[:, units] * weights)[0]
    draws = map(statistic, shuffled(labels, kinds, 4 * len(y)))
    return float(inner - outer), permutation_p(statistic(labels[None].astype(float))[0], draws, most)


def _studentised(difference, variance):
    """A difference over its standard error; 0 where there is none."""
    return np.where(np.abs(difference) < 1e-12, 0.0, difference / np.sqrt(np.maximum(variance, 1e-18)))


def holm(p_values):
    """Holm's (1979) adjusted p-values, in the same order."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values, kind="stable")
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted.tolist()


# ---------------------------------------------------------------- a family


class Proportion:
    """Recall or specificity of some images: `hits`, bool [n], which decisions are right; `whose` [n]."""

    def __init__(self, hits, whose):
        self.hits, self.whose = hits, whose

    def patients(self, images):
        """The number that must reach LEAST among images, bool [n]."""
        return len(np.unique(self.whose[images]))

    def interval(self, images, level):
        """(value, lo, hi) of these images."""
        hits = self.hits[images]
        return float(hits.mean()), *clustered_proportion(hits, self.whose[images], level)

    def gap(self, inside, known, most):
        """(difference to the rest, p-value) of a group among the known."""
        return proportion_gap(self.hits[known], inside[known], self.whose[known], most)


class Curve:
    """The AUROC of some images: truth y, 0 or 1, scores p, patients `whose`: [n]."""

    def __init__(self, y, p, whose):
        self.y, self.p, self.whose = y, p, whose

    def patients(self, images):
        """The fewer of sick and healthy patients."""
        return min(len(np.unique(self.whose[images & (self.y == k)])) for k in (0, 1))

    def interval(self, images, level):
        """(value, lo, hi) of these images."""
        return auroc_interval(self.y[images], self.p[images], self.whose[images], level)

    def gap(self, inside, known, most):
        """(difference to the rest, p-value) of a group among the known."""
        values = (values[known] for values in (self.y, self.p, inside, self.whose))
        return auroc_gap(*values, most)


def family(figure, groups):
    """One figure of all groups -> a list of dicts, one a group. figure: Proportion or Curve of n images;
    groups: list of Groups of the same images.

    {"patients", "rest": int, those of the kind that the figure needs, in the group and in its rest; from
    LEAST patients on "value", "lo", "hi"; and where the rest has as many "gap", "p", "adjusted"}."""
    rows = []
    for group in groups:
        rest = figure.patients(group.known & ~group.inside)
        rows.append({"patients": figure.patients(group.inside), "rest": rest})
    shown = [k for k, row in enumerate(rows) if row["patients"] >= LEAST]
    level = 1 - ERROR / max(1, len({groups[k].inside.tobytes() for k in shown}))
    for k in shown:
        rows[k] |= dict(zip(("value", "lo", "hi"), figure.interval(groups[k].inside, level)))
    # Group and rest, whichever is which, are one question.
    questions = {}
    for k in shown:
        inside, rest = groups[k].inside, groups[k].known & ~groups[k].inside
        if rows[k]["rest"] >= LEAST:
            questions.setdefault(frozenset((inside.tobytes(), rest.tobytes())), []).append(k)
    most = max(FEWEST_DRAWS, DRAWS_A_TEST * len(questions))
    tested = [figure.gap(groups[same[0]].inside, groups[same[0]].known, most) for same in questions.values()]
    for same, (gap, p), adjusted in zip(questions.values(), tested, holm([p for _, p in tested])):
        for k in same:
            turned = 1 if np.array_equal(groups[k].inside, groups[same[0]].inside) else -1
            rows[k] |= {"gap": turned * gap, "p": p, "adjusted": adjusted}
    return rows
