"""Figures with 95% intervals by patient, and differences between two scores of the same images. numpy, no
torch, no files.

A span is {"value", "lo", "hi"}. Draws are those of one bootstrap of whole patients, so draws of two figures
of the same images may be subtracted from each other: the difference is paired."""

from functools import partial

import numpy as np

from calibration.intervals import bootstrap_summary, bootstrap_weights, span_of_draws
from common.proportions import alike_interval, count_of, fewer_patients, no_width, proportion_of_patients
from metrics import summarize_at_threshold

DRAWS = 2000
FINE_DRAWS = 10_000  # for intervals of many figures at once, which lie far out in the tails
ERROR = 0.05


class Curve:
    """AUROC of several scores of the same images. y: int [N], 0 or 1; patients: [N] names."""

    def __init__(self, y, patients, level=1 - ERROR):
        self.y, self.patients, self.level = np.asarray(y), np.asarray(patients), level
        self.people = fewer_patients(self.y, self.patients)

    def draws(self, p):
        """AUROC of scores p [N] -> (value, draws float64 [DRAWS]); NaN for draws of one class only."""
        p = np.asarray(p, np.float64)
        scaled = (p - p.min()) / max(np.ptp(p), 1e-300)  # only the order counts; metrics.py asks for [0, 1]
        weights = bootstrap_weights(self.patients, DRAWS)
        value = summarize_at_threshold(self.y, scaled, 0.5)["auroc"]
        return np.array(value), bootstrap_summary(self.y, scaled, [0.5], weights)[0]["auroc"]

    def span(self, found):
        """(value, draws) of an AUROC -> its span."""
        value, draws = found
        return span_of_draws(value, draws, alike_interval(float(value), self.people, self.level), self.level)

    def difference(self, found):
        """(value, draws) of what AUROCs add up to -> its span; a difference may lie in [-1, 1]."""
        value, draws = found
        instead = alike_interval(float(value), self.people, self.level, least=-1.0)
        return span_of_draws(value, draws, instead, self.level)


def minus(a, b):
    """(value, draws) a - b."""
    return a[0] - b[0], a[1] - b[1]


def plus(a, b):
    """(value, draws) a + b."""
    return a[0] + b[0], a[1] + b[1]


# ---------------------------------------------------------------- shares of images


def share(hits, patients):
    """The span of the mean of `hits`, bool [N], at least one."""
    return shares(np.asarray(hits)[:, None], patients)[0]


def shares(hits, patients):
    """The spans of the means of `hits`, bool [N, M], by a bootstrap of whole patients: a list of M."""
    return _means(hits.astype(float), patients, 1 - ERROR, DRAWS, proportion_of_patients)


def falls(before, after, patients, level):
    """By how much shares fall: spans of the mean of before [N] - after [N, M], a list of M. They are paired,
    and by whole patients."""
    change = np.asarray(before, float)[:, None] - np.asarray(after, float)
    return _means(change, patients, level, FINE_DRAWS, partial(alike_interval, level=level, least=-1.0))


def _means(values, patients, level, draws, instead):
    """Spans of the means of values [N, M] by a bootstrap of whole patients, a list of M; where all draws are
    the same, `instead`(value, patients) gives (lo, hi)."""
    sums, counts = by_patient(values, patients)
    rng, people, drawn = np.random.default_rng(0), len(counts), []
    for _ in range(0, draws, DRAWS):
        weights = rng.multinomial(people, np.full(people, 1 / people), size=DRAWS)
        drawn.append((weights @ sums) / (weights @ counts)[:, None])
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2], axis=0)
    spans = []
    for value, *span in zip(values.mean(axis=0), low, high):
        if no_width(span):
            span = instead(float(value), people)
        spans.append({"value": float(value), "lo": float(span[0]), "hi": float(span[1])})
    return spans


def difference_of_shares(hits, inside, patients):
    """The span of the mean of `hits`, bool [N], inside minus that outside, inside bool [N], by a bootstrap of
    whole patients; both kinds must occur."""
    columns = np.stack([hits & inside, inside, hits & ~inside, ~inside], axis=1).astype(float)
    sums, counts = by_patient(columns, patients)
    people = len(counts)
    weights = np.random.default_rng(0).multinomial(people, np.full(people, 1 / people), size=DRAWS)
    drawn = weights @ sums
    with np.errstate(invalid="ignore"):  # draws without one kind are NaN, and left out
        draws = drawn[:, 0] / drawn[:, 1] - drawn[:, 2] / drawn[:, 3]
    value = float(hits[inside].mean() - hits[~inside].mean())
    fewer = min(count_of(patients[inside]), count_of(patients[~inside]))
    return span_of_draws(value, draws, alike_interval(value, fewer, least=-1.0))


def by_patient(values, patients):
    """Sums of values [N, M] over the images of each patient [P, M], and how many images each has [P]."""
    _, codes, counts = np.unique(np.asarray(patients), return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, codes, values)
    return sums, counts
