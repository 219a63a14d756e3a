"""How sure a figure is: intervals, the patient bootstrap, and paired tests. numpy and scipy, no torch, no
files.

Labels, scores and thresholds are those of metrics.py.
"""

import math

import numpy as np
from scipy.stats import norm, rankdata

from common.console import InputError
from common.proportions import (
    alike_figures,
    alike_interval,
    count_of,
    f1_of_patients,
    fewer_patients,
    no_width,
    proportion_of_patients,
    relevant_images,
    sure_share,
    wilson_interval,
)
from metrics import check_groups, check_scores, ends_of_ties, summarize_at_threshold


def _influences(y, scores):
    """AUROCs [M] of M scores [M, N], and by how much each image moves them -> ([M], [M, positives], [M,
    negatives]): its share of won pairs less the AUROC, over the images of its class; in O(M N log N).

    DeLong, DeLong and Clarke-Pearson (1988), by the midranks of Sun and Xu (2014,
    doi:10.1109/LSP.2014.2337313)."""
    pos, neg = scores[:, y == 1], scores[:, y == 0]
    m, n = pos.shape[1], neg.shape[1]
    if min(m, n) < 2:
        raise InputError(
            f"DeLong's method needs two images of each class, got {m} positives and {n} negatives"
        )
    rank_all = rankdata(np.concatenate([pos, neg], axis=1), axis=1)
    # The fraction of negatives below each positive, and of positives above each negative; ties count half.
    v10 = (rank_all[:, :m] - rankdata(pos, axis=1)) / n
    v01 = 1 - (rank_all[:, m:] - rankdata(neg, axis=1)) / m
    auroc = v10.mean(axis=1, keepdims=True)
    return auroc[:, 0], (v10 - auroc) / m, (v01 - auroc) / n


def _variance(sick, healthy):
    """Variance of what independent images or patients move: [m] by the sick, [n] by the healthy."""
    m, n = len(sick), len(healthy)
    return m / (m - 1) * sick @ sick + n / (n - 1) * healthy @ healthy


def delong_interval(y_true, p1):
    """AUROC with DeLong's normal 95% interval, clipped to [0, 1] -> (auroc, lo, hi).

    At an AUROC of 0 or 1 the estimated variance is 0, and so is the width.
    InputError: as `check_scores`; fewer than two images of a class."""
    y, p = check_scores(y_true, p1)
    (auroc,), (sick,), (healthy,) = _influences(y, p[None])
    half = norm.ppf(0.975) * math.sqrt(_variance(sick, healthy))
    return float(auroc), float(max(0.0, auroc - half)), float(min(1.0, auroc + half))


def delong_test(y_true, p1_a, p1_b, groups=None):
    """Paired DeLong test of two scores on the same images -> (AUROC a - AUROC b, two-sided p-value).

    `groups` [N]: the images of one group (patient) are not taken as independent: what they move is summed
    (Obuchowski 1997, Biometrics 53:567); None: each image is one, and that is DeLong's own test.
    The p-value is 1 when both rank every pair alike. Where the estimated variance is 0 but the AUROCs differ
    (1 against one half, say), it is that of a sign test of m pairs of one positive and one negative each, m
    the fewer patients of the two. InputError: as `delong_interval`."""
    y, a = check_scores(y_true, p1_a)
    _, b = check_scores(y_true, p1_b)
    groups = check_groups(np.arange(len(y)) if groups is None else groups, y)
    (auc_a, auc_b), sick, healthy = _influences(y, np.stack([a, b]))
    difference, fewer = float(auc_a - auc_b), fewer_patients(y, groups)
    names, codes = np.unique(groups, return_inverse=True)
    moved = np.zeros((2, len(names)))  # by each patient: its negatives, its positives
    np.add.at(moved[1], codes[y == 1], sick[0] - sick[1])
    np.add.at(moved[0], codes[y == 0], healthy[0] - healthy[1])
    variance = 0.0
    if fewer > 1:
        variance = _variance(*(moved[k, np.unique(codes[y == k])] for k in (1, 0)))
        variance += 2 * len(names) / (len(names) - 1) * moved[0] @ moved[1]  # patients with both
    if variance <= 1e-18:
        return difference, 1.0 if abs(difference) < 1e-12 else 2.0 * 0.5**fewer
    return difference, float(2 * norm.sf(abs(difference) / math.sqrt(variance)))


def mcnemar_test(correct_a, correct_b, groups=None):
    """Exact McNemar test of paired booleans [N] -> (only a correct, only b correct, two-sided p-value).

    `groups` [N]: the images of one group (patient) are not taken as independent. Each patient has the number
    of its images that only a gets right, less that of those that only b does; the p-value is the chance of as
    great a sum if each patient's sign were a coin's. With one image a patient, or with None, that is
    McNemar's binomial test."""
    a, b = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    codes = np.arange(len(a)) if groups is None else np.unique(groups, return_inverse=True)[1]
    ahead = np.bincount(codes, weights=a.astype(int) - b).astype(int)
    chances = np.ones(1)  # of the sums -size, -size + 2 ... size of the patients so far, as of a walk
    for step in np.abs(ahead[ahead != 0]):
        longer = np.zeros(len(chances) + step)
        longer[step:] += chances / 2
        longer[: len(chances)] += chances / 2
        chances = longer
    sums = 2 * np.arange(len(chances)) - (len(chances) - 1)
    p = chances[np.abs(sums) >= abs(ahead.sum())].sum()
    return int((a & ~b).sum()), int((b & ~a).sum()), float(min(1.0, p))


# ---------------------------------------------------------------- the patient bootstrap

BLOCK = 2**15  # numbers held in one block of draws, so that memory does not grow with their number


def bootstrap_weights(groups, n=2000, seed=0):
    """How often each image is drawn when whole groups (patients) are drawn with replacement, n times.

    Yields blocks int64 [rows, N], n rows in all, of about `BLOCK` numbers each (one row if N is larger). The
    draws do not depend on the size of the blocks. InputError: no groups, or n < 1."""
    if n < 1 or len(groups) == 0:
        raise InputError(f"the bootstrap needs a draw and an image, got {n} draws of {len(groups)} images")
    _, codes = np.unique(np.asarray(groups), return_inverse=True)
    count, rng = codes.max() + 1, np.random.default_rng(seed)
    most_rows = max(1, BLOCK // len(codes))
    for start in range(0, n, most_rows):
        rows = min(most_rows, n - start)
        draws = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        hits = np.bincount(draws.ravel(), minlength=rows * count).reshape(rows, count)
        yield hits[:, codes]


def bootstrap_summary(y_true, p1, thresholds, weights):
    """The figures of `summarize_at_threshold` for every bootstrap draw, at each of `thresholds` [T].

    `weights`: blocks [rows, N], n rows in all, as `bootstrap_weights` yields them.
    Returns T dicts {acc, precision, recall, specificity, f1, auroc, auprc}: float64 [n] each, NaN for draws
    of one class only. auroc and auprc do not depend on the threshold: they are computed once, and all dicts
    hold the same arrays. InputError: as `check_scores`; a threshold is NaN."""
    y, p = check_scores(y_true, p1)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    if np.isnan(thresholds).any():
        raise InputError("the threshold is NaN")
    order = np.argsort(-p, kind="stable")
    y, p = y[order], p[order]
    ends = ends_of_ties(p)
    above = np.searchsorted(-p[ends], -thresholds, side="right")  # distinct scores called positive
    blocks = [_bootstrap_block(y, ends, above, block[:, order]) for block in weights]
    positives, negatives, tp, fp, auroc, auprc = (np.concatenate(part, axis=-1) for part in zip(*blocks))
    both_classes, called_positive = (positives > 0) & (negatives > 0), tp + fp
    at_thresholds = {  # [T, n]
        "acc": (tp + negatives - fp) / (positives + negatives),
        "precision": tp / np.maximum(called_positive, 1),
        "recall": tp / np.maximum(positives, 1),
        "specificity": 1 - fp / np.maximum(negatives, 1),
        "f1": 2 * tp / np.maximum(called_positive + positives, 1),
    }
    at_thresholds = {name: np.where(both_classes, values, np.nan) for name, values in at_thresholds.items()}
    curve = {"auroc": np.where(both_classes, auroc, np.nan), "auprc": np.where(both_classes, auprc, np.nan)}
    return [
        {**{name: values[t] for name, values in at_thresholds.items()}, **curve}
        for t in range(len(thresholds))
    ]


def _bootstrap_block(y, ends, above, weights):
    """Positives, negatives [rows], tp, fp [T, rows], AUROC and AUPRC [rows] of the draws `weights` [rows, N].

    Labels [N] and weights are in descending order of score; `ends` are the last indices of the distinct
    scores, and `above` [T] is how many of these each threshold calls positive. AUROC counts pairs, ties as
    one half; AUPRC is average precision, the sum of precision * (increase in recall). Without both classes
    they are 0."""
    rows = len(weights)
    # [rows, k]: true and false positives when the k highest distinct scores are called positive
    tp, fp = np.zeros((2, rows, len(ends) + 1))
    tp[:, 1:] = np.cumsum(weights * y, axis=1)[:, ends]
    fp[:, 1:] = np.cumsum(weights, axis=1)[:, ends] - tp[:, 1:]
    positives, negatives = tp[:, -1].copy(), fp[:, -1].copy()  # views would keep the whole block alive
    tp_steps = np.diff(tp, axis=1)
    pairs_won = (np.diff(fp, axis=1) * (tp[:, 1:] - tp_steps / 2)).sum(axis=1)
    precision = tp[:, 1:] / np.maximum(tp[:, 1:] + fp[:, 1:], 1)
    auroc = pairs_won / np.maximum(positives * negatives, 1)
    auprc = (tp_steps * precision).sum(axis=1) / np.maximum(positives, 1)
    return positives, negatives, tp[:, above].T, fp[:, above].T, auroc, auprc


def percentiles(values, level=0.95):
    """The percentile interval of draws [n], NaN left out -> (lo, hi)."""
    defined = values[np.isfinite(values)]
    if len(defined) == 0 or len(defined) * 2 < len(values):
        raise InputError(
            f"{len(values) - len(defined)} of {len(values)} bootstrap draws are undefined (they hold one "
            "class only, say): too few images or patients for an interval"
        )
    lo, hi = np.percentile(defined, [50 * (1 - level), 50 * (1 + level)])
    return float(lo), float(hi)


def span_of_draws(value, draws, instead, level=0.95):
    """{"value", "lo", "hi"}: the percentile interval of draws [n], or `instead`, (lo, hi), where all of them
    are the same."""
    span = percentiles(draws, level)
    low, high = instead if no_width(span) else span
    return {"value": float(value), "lo": float(low), "hi": float(high)}


def proportion_interval(hits, groups, n):
    """The 95% interval of the mean of `hits`, bool [N], by a bootstrap of whole `groups` [N] (patients);
    Wilson's by patients where every draw is the same -> [lo, hi]. InputError: no image."""
    hits, groups = np.asarray(hits, np.float64), np.asarray(groups)
    draws = [(block @ hits) / block.sum(axis=1) for block in bootstrap_weights(groups, n)]
    instead = proportion_of_patients(float(hits.mean()), count_of(groups))
    found = span_of_draws(hits.mean(), np.concatenate(draws), instead)
    return [found["lo"], found["hi"]]


def intervals_at_threshold(y_true, p1, thr, groups, n=2000):
    """`intervals_of_draws` at one threshold, of whole `groups` [N] (patients) drawn n times.

    InputError: as `summarize_at_threshold` and `percentiles`."""
    y, p = check_scores(y_true, p1)
    groups = check_groups(groups, y)
    draws = bootstrap_summary(y, p, [thr], bootstrap_weights(groups, n))
    return intervals_of_draws(y, p, [thr], draws, groups)[0]


def intervals_of_draws(y, p, thresholds, draws, groups):
    """95% intervals of the figures of `summarize_at_threshold`: {figure: {method: [lo, hi]}} each.
    Labels, scores and groups are checked; `draws`: what `bootstrap_summary` gives of them.

    "bootstrap", for every figure: of whole `groups` [N] (patients), the only method that knows that images of
    one patient are alike. "patients": the interval that takes its place, for figures of which every draw is
    the same. "wilson", of images: recall, specificity, precision and acc; left out where the proportion is of
    nothing. "delong", of images: auroc; left out where a class has one image."""
    rows = [summarize_at_threshold(y, p, thr) for thr in thresholds]
    few = min((y == 1).sum(), (y == 0).sum()) < 2
    delong = None if few else list(delong_interval(y, p)[1:])
    found = []
    for row, figures in zip(rows, draws):
        tp, fp, tn, fn = (row[key] for key in ("tp", "fp", "tn", "fn"))
        intervals = {name: {"bootstrap": list(percentiles(v))} for name, v in figures.items()}
        for name, k, total in (
            ("recall", tp, tp + fn),
            ("specificity", tn, tn + fp),
            ("precision", tp, tp + fp),
            ("acc", tp + tn, tp + tn + fp + fn),
        ):
            if total:
                intervals[name]["wilson"] = list(wilson_interval(k, total))
        if not few:
            intervals["auroc"]["delong"] = list(delong)
        alike = alike_figures(y, p >= row["thr"], groups, row)
        for name, methods in intervals.items():
            if no_width(methods["bootstrap"]):
                methods["patients"] = alike[name]
        found.append(intervals)
    return found


def compare_at_thresholds(y_true, p1_a, thr_a, p1_b, thr_b, groups, n=2000, seed=0):
    """Model a minus model b on the same images, each at its own threshold.

    {figure: {difference, lo, hi}} for acc, precision, recall, specificity, f1, auroc and auprc, with 95%
    intervals by a paired bootstrap of whole `groups` [N] (patients), or by `alike_interval` where every draw
    is the same though the scores are not; "delong": p-value for AUROC;
    "mcnemar_recall" and "mcnemar_specificity": exact p-values on the positives and on the negatives; all
    three by whole groups.

    InputError: as `intervals_at_threshold`."""
    y, a = check_scores(y_true, p1_a)
    _, b = check_scores(y_true, p1_b)
    groups = check_groups(groups, y)
    draws_a, draws_b = (
        bootstrap_summary(y, p, [thr], bootstrap_weights(groups, n, seed))[0]
        for p, thr in ((a, thr_a), (b, thr_b))
    )
    row_a, row_b = summarize_at_threshold(y, a, thr_a), summarize_at_threshold(y, b, thr_b)
    called_a, called_b = a >= thr_a, b >= thr_b
    relevant = relevant_images(y, called_a | called_b)
    relevant["f1"] = relevant["recall"] | relevant["precision"]
    patients = {name: count_of(groups[images]) for name, images in relevant.items()}
    same_model = thr_a == thr_b and np.array_equal(a, b)
    out = {}
    for name in draws_a:
        difference = row_a[name] - row_b[name]
        number = patients.get(name, fewer_patients(y, groups))
        instead = (0.0, 0.0) if same_model else alike_interval(difference, number, least=-1.0)
        found = span_of_draws(difference, draws_a[name] - draws_b[name], instead)
        out[name] = {"difference": found["value"], "lo": found["lo"], "hi": found["hi"]}
    right_a, right_b = called_a == y, called_b == y
    out["delong"] = delong_test(y, a, b, groups)[1]
    for label, name in ((1, "mcnemar_recall"), (0, "mcnemar_specificity")):
        out[name] = mcnemar_test(*(of[y == label] for of in (right_a, right_b, groups)))[2]
    return out


def mean_auroc_draws(truth, scores, groups, n=2000, seed=0):
    """Mean AUROC over findings, its bootstrap draws, and the mean `sure_share` of the findings -> (float,
    float64 [n], float).

    `truth` [N, F] of 1, 0 and -1 for unknown; `scores` [N, F]; `groups` [N] are drawn whole, the same
    ones for every call with this seed. In a draw without both classes of some finding the mean is over the
    others.
    InputError: as `bootstrap_summary`; a finding without both classes."""
    groups, values, drawn, shares = np.asarray(groups), [], [], []
    for k in range(truth.shape[1]):
        known = truth[:, k] >= 0
        y, p = truth[known, k], scores[known, k]
        shares.append(sure_share(fewer_patients(y, groups[known])))
        values.append(summarize_at_threshold(y, p, 0.5)["auroc"])
        weights = (block[:, known] for block in bootstrap_weights(groups, n, seed))
        drawn.append(bootstrap_summary(y, p, [0.5], weights)[0]["auroc"])
    return float(np.mean(values)), mean_of_defined(drawn), float(np.mean(shares))


def difference_of_means(a, b):
    """Two results of `mean_auroc_draws` on the same images -> {difference, lo, hi}, a minus b with a 95%
    interval: a paired bootstrap, because the draws are of the same patients; where every draw is the same,
    the mean of the findings' `alike_interval`."""
    difference, share = a[0] - b[0], a[2]
    instead = difference * share - (1 - share), difference * share + (1 - share)
    found = span_of_draws(difference, a[1] - b[1], instead)
    return {"difference": found["value"], "lo": found["lo"], "hi": found["hi"]}


def mean_of_defined(values):
    """The mean over the first axis of [F, n], NaN left out: [n], NaN where none is defined."""
    values = np.asarray(values)
    defined = np.isfinite(values)
    total = np.where(defined, values, 0).sum(axis=0)
    return np.where(defined.any(axis=0), total / np.maximum(defined.sum(axis=0), 1), np.nan)


# ---------------------------------------------------------------- the most probable class


def class_figures(labels, decided, classes, patients, rule):
    """Figures of the most probable class: labels, decisions int [N] -> {"confusion": counts [K][K], rows the
    truth; "accuracy", "macro_f1": {value, lo, hi} by patient bootstrap; "classes": {name: {n, precision,
    recall, f1, recall_interval (patient bootstrap)}}}. Where every draw is the same, an interval is that of
    so many patients. Precision and F1 are 0 where a class is never decided; macro F1 is over the classes that
    occur."""
    number = len(classes)
    cells = np.zeros((len(labels), number * number))
    cells[np.arange(len(labels)), labels * number + decided] = 1
    confusion = cells.sum(axis=0).reshape(number, number)
    drawn = np.concatenate([block @ cells for block in bootstrap_weights(patients, rule.bootstrap)])
    drawn = drawn.reshape(-1, number, number)
    right, truth, called = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    found = {"confusion": confusion.astype(int).tolist(), "classes": {}}
    limits = []  # of the F1 of every class that occurs, by its patients alone
    for k, name in enumerate(classes):
        of_class, either = labels == k, (labels == k) | (decided == k)
        span = None
        if truth[k]:
            hits = decided[of_class] == k
            span = proportion_interval(hits, patients[of_class], rule.bootstrap)
        f1 = float(2 * right[k] / max(truth[k] + called[k], 1))
        if either.any():
            limits.append(f1_of_patients(f1, count_of(patients[either])))
        found["classes"][name] = {
            "n": int(truth[k]),
            "precision": float(right[k] / max(called[k], 1)),
            "recall": float(right[k] / max(truth[k], 1)),
            "f1": f1,
            "recall_interval": span,
        }
    accuracy, macro_f1 = float(_accuracy(confusion[None])[0]), float(_macro_f1(confusion[None])[0])
    by_patients = proportion_of_patients(accuracy, count_of(patients))
    found["accuracy"] = span_of_draws(accuracy, _accuracy(drawn), by_patients)
    found["macro_f1"] = span_of_draws(macro_f1, _macro_f1(drawn), np.mean(limits, axis=0))
    return found


def _accuracy(confusion):
    """Confusion matrices [n, K, K] -> [n]."""
    return np.trace(confusion, axis1=1, axis2=2) / np.maximum(confusion.sum(axis=(1, 2)), 1)


def _macro_f1(confusion):
    """Confusion matrices [n, K, K] -> [n]: the mean F1 of the classes that occur."""
    right = np.diagonal(confusion, axis1=1, axis2=2)
    occurring = confusion.sum(axis=1) + confusion.sum(axis=2)
    f1 = 2 * right / np.maximum(occurring, 1)
    return f1.sum(axis=1) / np.maximum((occurring > 0).sum(axis=1), 1)
