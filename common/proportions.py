"""Intervals by numbers of people alone: of a proportion, and what replaces a bootstrap whose draws are all
the same. numpy and scipy, no torch, no files."""

import math

import numpy as np
from scipy.stats import norm

from common.console import InputError


def wilson_interval(k, n, level=0.95):
    """Wilson (1927) score interval of the proportion k/n -> (lo, hi). k need not be whole: a proportion of
    images may be taken as one of patients; scipy's `binomtest` takes whole numbers only.

    InputError unless n >= 1, 0 <= k <= n and 0 < level < 1."""
    if n < 1 or not 0 <= k <= n:
        raise InputError(f"a proportion k/n needs n >= 1 and 0 <= k <= n, got {k}/{n}")
    check_level(level)
    z = norm.ppf((1 + level) / 2)
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    low = 0.0 if k == 0 else float(max(0, centre - half))
    high = 1.0 if k == n else float(min(1, centre + half))
    return low, high


def check_level(level):
    if not 0 < level < 1:
        raise InputError(f"the level of an interval must lie in (0, 1), got {level}")


# ---------------------------------------------------------------- where every draw is the same

# If all patients are alike (none missed, say), every draw of the bootstrap gives the same value. Its interval
# would have a width of 0, which would claim certainty. These take its place.


def count_of(groups):
    """The number of different groups (patients)."""
    return len(np.unique(np.asarray(groups)))


def fewer_patients(y, groups):
    """The fewer of the patients with a positive image and those with a negative one: y, groups [N]."""
    return min(count_of(groups[y == 1]), count_of(groups[y == 0]))


def sure_share(n, level=0.95):
    """If n independent people are all alike, at least this share of all people is like them: (a/2)^(1/n), a =
    1 - level. Were it less, n alike would have a chance below a/2."""
    check_level(level)
    return ((1 - level) / 2) ** (1 / n) if n else 0.0


def alike_interval(value, n, level=0.95, least=0.0):
    """The interval of a mean of n independent patients (or pairs of patients) who all gave `value` -> (lo,
    hi). At least `sure_share` of all patients give it; the others may give anything in [least, 1]. With a
    `value` of 1 or 0 it is Clopper and Pearson's."""
    share = sure_share(n, level)
    rest = 1 - share
    return value * share + least * rest, value * share + rest


def auprc_at_least(auroc, prevalence):
    """The least average precision that any ROC curve of this area can have at this prevalence, in (0, 1).

    At recall u and false-positive rate f the precision is u / (u + c), c = f (1 - prevalence) / prevalence,
    and the mean of f over u is 1 - AUROC. Minimising the mean of u / (u + c) over all c of mean C, by its
    Lagrangian dual, gives 1 - sqrt(2 C / 3) where C <= 1/6, and (4/9) / (C + 1/2) otherwise."""
    excess = (1 - auroc) * (1 - prevalence) / prevalence
    if excess <= 1 / 6:
        return 1 - math.sqrt(2 * excess / 3)
    return 4 / 9 / (excess + 0.5)


def relevant_images(y, called):
    """{figure: which images it is a proportion of, bool [N]}."""
    everything = np.ones(len(y), bool)
    return {"recall": y == 1, "specificity": y == 0, "precision": called, "acc": everything}


def proportion_of_patients(value, n):
    """Wilson's interval of a proportion `value`, by n patients instead of images -> (lo, hi).

    Of no patient it is (0, 1)."""
    return wilson_interval(value * n, n) if n else (0.0, 1.0)


def f1_of_patients(value, n):
    """The same of an F1: of the images that are positive or called so, a share J is both, and F1 = 2 J / (1 +
    J). n: the patients of these images."""
    low, high = proportion_of_patients(value / (2 - value), n)
    return 2 * low / (1 + low), 2 * high / (1 + high)


def alike_figures(y, called, groups, row):
    """{figure: [lo, hi]} of a summary `row`, by the number of patients alone."""
    found = {}
    for name, images in relevant_images(y, called).items():
        found[name] = proportion_of_patients(row[name], count_of(groups[images]))
    found["f1"] = f1_of_patients(row["f1"], count_of(groups[called | (y == 1)]))
    pairs = fewer_patients(y, groups)
    for name in ("auroc", "auprc"):
        found[name] = alike_interval(row[name], pairs)
    if no_width((row["auprc"], 1.0)):
        found["auprc"] = auprc_at_least(found["auroc"][0], y.mean()), 1.0
    return {name: list(map(float, span)) for name, span in found.items()}


def no_width(span):
    """Whether an interval (lo, hi) has no width, but for rounding."""
    return span[1] - span[0] <= 1e-12


def reported_interval(row, key):
    """The interval [lo, hi] to show of figure `key` of a summary `row` that has its "interval".

    The patient bootstrap; but where every draw gives the same value (0 or all of n), what the number of
    patients alone tells, because a width of 0 would claim certainty. Older calibrations have Wilson's
    interval of images there."""
    found = row["interval"][key]
    if not no_width(found["bootstrap"]):
        return found["bootstrap"]
    return found.get("patients", found.get("wilson", found["bootstrap"]))


def curves_of(row):
    """{"auroc", "auprc": {value, lo, hi}} of a summary `row` at whatever threshold: they depend on none."""
    found = {}
    for key in ("auroc", "auprc"):
        lo, hi = reported_interval(row, key)
        found[key] = {"value": row[key], "lo": lo, "hi": hi}
    return found


def in_words(span):
    """{value, lo, hi} -> "0.951 [0.931, 0.968]"."""
    return f"{span['value']:.3f} [{span['lo']:.3f}, {span['hi']:.3f}]"


def in_short(p):
    """A p-value, or None, as text."""
    if p is None:
        return "-"
    if p < 0.0005:
        return "< 0.001"
    return f"{p:.3f}"
