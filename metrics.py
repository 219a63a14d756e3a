"""Thresholds, intervals and calibration for one yes/no question: numpy, scipy and scikit-learn only.

Everywhere `y_true` is an array [N] of 0 (negative) and 1 (positive), `p1` an array [N] of scores in [0, 1],
and an image is called positive if and only if p1 >= threshold. Nothing here reads files, and arguments are
never changed. Errors are common.InputError, which is a ValueError."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax
from scipy.stats import beta, binom, binomtest, norm, rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from common import InputError


def check_scores(y_true, p1):
    """Validate labels and scores and return them as (int64 [N], float64 [N]).

    InputError: not 1-D; empty; lengths differ; labels other than 0 and 1; scores NaN or outside [0, 1]."""
    y, p = np.asarray(y_true), np.asarray(p1, dtype=np.float64)
    if y.ndim != 1 or p.ndim != 1:
        raise InputError(f"labels and scores must be 1-D, got shapes {y.shape} and {p.shape}")
    if len(y) != len(p):
        raise InputError(f"{len(y)} labels but {len(p)} scores")
    if len(y) == 0:
        raise InputError("no labels and no scores")
    if not np.isin(y, (0, 1)).all():
        raise InputError("labels must be 0 (negative) or 1 (positive)")
    if np.isnan(p).any():
        raise InputError(f"{np.isnan(p).sum()} of {len(p)} scores are NaN")
    if p.min() < 0 or p.max() > 1:
        raise InputError(f"scores must lie in [0, 1], got {p.min():g} to {p.max():g}")
    return y.astype(np.int64), p


def choose_threshold_by_min_recall(y_true, p1, min_recall=0.95):
    """The recall-first operating point -> (threshold, recall, precision).

    Among the thresholds with recall >= `min_recall`, the one with the highest precision; ties go to the
    higher recall, then to the higher threshold. Exact: every distinct score is tried, and any other threshold
    makes the same decisions as one of them. O(N log N).

    InputError: as `check_scores`; no positives or no negatives; `min_recall` outside (0, 1].
    """
    y, p = check_scores(y_true, p1)
    if not 0 < min_recall <= 1:
        raise InputError(f"min_recall must lie in (0, 1], got {min_recall}")
    positives = _check_both_classes(y)
    order = np.argsort(-p, kind="stable")
    scores = p[order]
    last = _ends_of_ties(scores)
    tp = np.cumsum(y[order])[last]
    recall, precision = tp / positives, tp / (last + 1)
    ok = np.flatnonzero(recall >= min_recall)  # never empty: the lowest score has recall 1
    best = ok[np.lexsort((scores[last][ok], recall[ok], precision[ok]))[-1]]
    return float(scores[last[best]]), float(recall[best]), float(precision[best])


def summarize_at_threshold(y_true, p1, thr):
    """Compare the decisions p1 >= thr with the truth -> dict of plain Python numbers.

    acc, precision, recall (sensitivity), specificity and f1, all in [0, 1]; auroc and auprc of the scores,
    which do not depend on `thr`; the counts tp, fp, tn, fn; thr. Precision and f1 are 0 when nothing is
    called positive.

    InputError: as `check_scores`; no positives or no negatives; `thr` is NaN.
    """
    y, p = check_scores(y_true, p1)
    positives = _check_both_classes(y)
    if np.isnan(thr):
        raise InputError("the threshold is NaN")
    called = p >= thr
    tp, fp = int((called & (y == 1)).sum()), int((called & (y == 0)).sum())
    fn, tn = positives - tp, len(y) - positives - fp
    return {
        "acc": (tp + tn) / len(y),
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / positives,
        "specificity": tn / (tn + fp),
        "f1": 2 * tp / (2 * tp + fp + fn),
        "auroc": float(roc_auc_score(y, p)),
        "auprc": float(average_precision_score(y, p)),
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "thr": float(thr),
    }


def _check_both_classes(y, where="labels"):
    """The number of positives; InputError if either class is absent."""
    positives = int(y.sum())
    if positives == 0:
        raise InputError(f"no positives among the {where}: recall and AUROC are undefined")
    if positives == len(y):
        raise InputError(f"no negatives among the {where}: specificity and AUROC are undefined")
    return positives


def _check_groups(groups, y):
    """`groups` as an array [N]; InputError if it does not match the labels."""
    groups = np.asarray(groups)
    if groups.shape != y.shape:
        raise InputError(f"{len(y)} labels but groups of shape {groups.shape}: give one group per label")
    return groups


def _ends_of_ties(ordered):
    """The last index of every run of equal values in a sorted array."""
    return np.r_[np.flatnonzero(np.diff(ordered)), len(ordered) - 1]


# ---------------------------------------------------------------- a recall that can be promised


def choose_threshold_with_guarantee(y_true, p1, min_recall=0.95, confidence=0.95, groups=None):
    """A threshold whose true recall is at least `min_recall` with probability at least `confidence`.

    Returns (threshold, recall, precision), the last two on the given images.

    Neyman-Pearson umbrella rule (Tong, Feng and Li 2018, doi:10.1126/sciadv.aao1659, prop. 1), with missed
    positives as the error to control: of the n positive scores in ascending order, take the k-th, with the
    largest k such that P(Binomial(n, 1 - min_recall) <= k - 1) <= 1 - confidence. It is exact and assumes no
    distribution; ties only make the threshold safer. The probability is over the draw of the validation
    positives, and the promise is for new positives from the same distribution: nothing is promised after a
    shift.

    `groups` [N] (patients): images of one patient are not independent, so one positive image of each patient
    is drawn at random and the rule is applied to these. n is then the number of patients, and the promised
    recall is that of a random image of a random new patient. The result is the median threshold of 201 such
    draws: a single draw meets the promise exactly, the median varies less.

    InputError: as `check_scores`; no positives or no negatives; `min_recall` or `confidence` outside (0, 1);
    too few positives (or patients) for any threshold to keep the promise, and how many are needed.
    """
    y, p = check_scores(y_true, p1)
    _check_both_classes(y)
    for name, value in (("min_recall", min_recall), ("confidence", confidence)):
        if not 0 < value < 1:
            raise InputError(f"{name} must lie in (0, 1) for a guarantee, got {value}")
    if groups is None:
        draws = np.sort(p[y == 1])[None]
    else:
        draws = _one_image_per_patient(p[y == 1], _check_groups(groups, y)[y == 1])
    n = draws.shape[1]
    tails = binom.cdf(np.arange(n), n, 1 - min_recall)  # index k - 1
    allowed = np.flatnonzero(tails <= 1 - confidence)
    if len(allowed) == 0:
        needed = math.ceil(math.log(1 - confidence) / math.log(min_recall) - 1e-9)
        raise InputError(
            f"{n} independent positives cannot guarantee a recall of {min_recall:g} with confidence "
            f"{confidence:g}: at least {needed} are needed"
        )
    candidates = np.sort(draws[:, allowed[-1]])
    thr = candidates[(len(candidates) - 1) // 2]
    called = p >= thr
    tp = int((called & (y == 1)).sum())
    return float(thr), tp / int(y.sum()), tp / int(called.sum())


def _one_image_per_patient(scores, patients, draws=201):
    """One random score [M] of each of P patients [M], `draws` times: float64 [draws, P], each row
    ascending."""
    _, codes = np.unique(patients, return_inverse=True)
    order, counts = np.argsort(codes, kind="stable"), np.bincount(codes)
    first = np.cumsum(counts) - counts
    picks = (np.random.default_rng(0).random((draws, len(counts))) * counts).astype(np.int64)
    return np.sort(scores[order[first + picks]], axis=1)


# ---------------------------------------------------------------- intervals


def wilson_interval(k, n, level=0.95):
    """Wilson (1927) score interval of the proportion k/n -> (lo, hi).

    InputError unless n >= 1, 0 <= k <= n and 0 < level < 1."""
    _check_count(k, n, level)
    z = norm.ppf((1 + level) / 2)
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    low = 0.0 if k == 0 else float(max(0, centre - half))
    high = 1.0 if k == n else float(min(1, centre + half))
    return low, high


def clopper_pearson_interval(k, n, level=0.95):
    """Clopper-Pearson (1934) interval of the proportion k/n -> (lo, hi): exact, hence wide.

    InputError unless n >= 1, 0 <= k <= n and 0 < level < 1."""
    _check_count(k, n, level)
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else float(beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k == n else float(beta.ppf(1 - tail, k + 1, n - k))
    return low, high


def _check_count(k, n, level):
    if n < 1 or not 0 <= k <= n:
        raise InputError(f"a proportion k/n needs n >= 1 and 0 <= k <= n, got {k}/{n}")
    _check_level(level)


def _check_level(level):
    if not 0 < level < 1:
        raise InputError(f"the level of an interval must lie in (0, 1), got {level}")


def _delong(y, scores):
    """AUROCs [M] of M scores [M, N] and their covariance [M, M], in O(M N log N).

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
    return v10.mean(axis=1), np.atleast_2d(np.cov(v10)) / m + np.atleast_2d(np.cov(v01)) / n


def delong_interval(y_true, p1, level=0.95):
    """AUROC with DeLong's normal interval, clipped to [0, 1] -> (auroc, lo, hi).

    At an AUROC of 0 or 1 the estimated variance is 0, and so is the width.
    InputError: as `check_scores`; `level` outside (0, 1); fewer than two images of a class."""
    y, p = check_scores(y_true, p1)
    _check_level(level)
    (auroc,), ((variance,),) = _delong(y, p[None])
    half = norm.ppf((1 + level) / 2) * math.sqrt(max(0.0, variance))
    return float(auroc), float(max(0.0, auroc - half)), float(min(1.0, auroc + half))


def delong_test(y_true, p1_a, p1_b):
    """Paired DeLong test of two scores on the same images -> (AUROC a - AUROC b, two-sided p-value).

    The p-value is 1 when both rank every pair alike. InputError: as `delong_interval`."""
    y, a = check_scores(y_true, p1_a)
    _, b = check_scores(y_true, p1_b)
    (auc_a, auc_b), cov = _delong(y, np.stack([a, b]))
    difference, variance = auc_a - auc_b, cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]
    if variance <= 1e-18:
        return float(difference), 1.0 if abs(difference) < 1e-12 else 0.0
    return float(difference), float(2 * norm.sf(abs(difference) / math.sqrt(variance)))


def mcnemar_test(correct_a, correct_b):
    """Exact McNemar test of paired booleans [N] -> (only a correct, only b correct, two-sided p-value)."""
    a, b = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return only_a, only_b, float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


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


def bootstrap_interval(statistic, y_true, p1, groups=None, n=2000, level=0.95, seed=0):
    """Percentile bootstrap interval of any `statistic(y_true, p1) -> float` -> (lo, hi).

    `groups` [N] (patients) are drawn whole; without them, single images are drawn. Draws for which the
    statistic is NaN or raises ValueError (only one class, say) are left out. `bootstrap_summary` is far
    faster for the figures it knows. InputError: as `check_scores`; `level` outside (0, 1); fewer than half of
    the draws are left."""
    y, p = check_scores(y_true, p1)
    _check_level(level)
    groups = np.arange(len(y)) if groups is None else _check_groups(groups, y)
    values = []
    for block in bootstrap_weights(groups, n, seed):
        for weights in block:
            index = np.repeat(np.arange(len(y)), weights)
            try:
                values.append(float(statistic(y[index], p[index])))
            except ValueError:
                values.append(math.nan)
    return _percentiles(np.array(values), level)


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
    ends = _ends_of_ties(p)
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


def _percentiles(values, level):
    """The percentile interval of draws [n], NaN left out -> (lo, hi)."""
    defined = values[np.isfinite(values)]
    if len(defined) == 0 or len(defined) * 2 < len(values):
        raise InputError(
            f"{len(values) - len(defined)} of {len(values)} bootstrap draws are undefined (they hold one "
            "class only, say): too few images or patients for an interval"
        )
    lo, hi = np.percentile(defined, [50 * (1 - level), 50 * (1 + level)])
    return float(lo), float(hi)


def intervals_at_threshold(y_true, p1, thr, groups, n=2000, level=0.95, seed=0):
    """`intervals_at_thresholds` for a single threshold -> {figure: {method: [lo, hi]}}."""
    return intervals_at_thresholds(y_true, p1, [thr], groups, n, level, seed)[0]


def intervals_at_thresholds(y_true, p1, thresholds, groups, n=2000, level=0.95, seed=0):
    """Intervals of the figures of `summarize_at_threshold`: {figure: {method: [lo, hi]}} for each threshold.

    "bootstrap", for every figure: `groups` [N] (patients) drawn whole, n times; the only method that knows
    that images of one patient are alike. "wilson": recall, specificity, precision and acc; left out where the
    proportion is of nothing. "delong": auroc.

    InputError: as `summarize_at_threshold`, `delong_interval` and `bootstrap_interval`."""
    y, p = check_scores(y_true, p1)
    _check_level(level)
    rows = [summarize_at_threshold(y, p, thr) for thr in thresholds]
    draws = bootstrap_summary(y, p, thresholds, bootstrap_weights(_check_groups(groups, y), n, seed))
    delong = list(delong_interval(y, p, level)[1:])
    found = []
    for row, figures in zip(rows, draws):
        tp, fp, tn, fn = (row[key] for key in ("tp", "fp", "tn", "fn"))
        intervals = {name: {"bootstrap": list(_percentiles(v, level))} for name, v in figures.items()}
        for name, k, total in (
            ("recall", tp, tp + fn),
            ("specificity", tn, tn + fp),
            ("precision", tp, tp + fp),
            ("acc", tp + tn, tp + tn + fp + fn),
        ):
            if total:
                intervals[name]["wilson"] = list(wilson_interval(k, total, level))
        intervals["auroc"]["delong"] = list(delong)
        found.append(intervals)
    return found


def reported_interval(row, key):
    """The interval [lo, hi] to show of figure `key` of a summary `row` that has its "interval".

    The patient bootstrap; but Wilson's where every draw gives the same value (0 or all of n), because a width
    of 0 would claim certainty."""
    found = row["interval"][key]
    low, high = found["bootstrap"]
    return found["wilson"] if low == high and "wilson" in found else found["bootstrap"]


def compare_at_thresholds(y_true, p1_a, thr_a, p1_b, thr_b, groups, n=2000, seed=0):
    """Model a minus model b on the same images, each at its own threshold.

    {figure: {difference, lo, hi}} for acc, precision, recall, specificity, f1, auroc and auprc, with 95%
    intervals by a paired bootstrap of whole `groups` [N] (patients); "delong": p-value for AUROC;
    "mcnemar_recall" and "mcnemar_specificity": exact p-values on the positives and on the negatives.

    InputError: as `intervals_at_thresholds`."""
    y, a = check_scores(y_true, p1_a)
    _, b = check_scores(y_true, p1_b)
    groups = _check_groups(groups, y)
    draws_a, draws_b = (
        bootstrap_summary(y, p, [thr], bootstrap_weights(groups, n, seed))[0]
        for p, thr in ((a, thr_a), (b, thr_b))
    )
    row_a, row_b = summarize_at_threshold(y, a, thr_a), summarize_at_threshold(y, b, thr_b)
    out = {}
    for name in draws_a:
        lo, hi = _percentiles(draws_a[name] - draws_b[name], 0.95)
        out[name] = {"difference": row_a[name] - row_b[name], "lo": lo, "hi": hi}
    right_a, right_b = (a >= thr_a) == y, (b >= thr_b) == y
    out["delong"] = delong_test(y, a, b)[1]
    for label, name in ((1, "mcnemar_recall"), (0, "mcnemar_specificity")):
        out[name] = mcnemar_test(right_a[y == label], right_b[y == label])[2]
    return out


# ---------------------------------------------------------------- probabilities


def fit_temperature(logits, y_true):
    """The T > 0 that minimises the negative log-likelihood of softmax(logits / T) (Guo et al. 2017,
    arXiv:1706.04599).

    Logits [N, K], labels [N] in 0..K-1. T is sought in [0.01, 100]; logits that separate the classes end at
    0.01.
    InputError: shapes that do not match, no rows, NaN or infinite logits, labels out of range.
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(y_true)
    if z.ndim != 2 or y.shape != z.shape[:1] or len(y) == 0:
        raise InputError(f"temperature needs logits [N, K] and labels [N], got {z.shape} and {y.shape}")
    if not np.isfinite(z).all():
        raise InputError("some logits are NaN or infinite")
    if not np.isin(y, np.arange(z.shape[1])).all():
        raise InputError(f"labels must lie in 0..{z.shape[1] - 1}")
    rows = np.arange(len(y))

    def loss(log_t):  # convex in 1/T, so one minimum in log T
        return -log_softmax(z * math.exp(-log_t), axis=1)[rows, y].mean()

    return math.exp(
        minimize_scalar(
            loss, bounds=(math.log(0.01), math.log(100)), method="bounded", options={"xatol": 1e-8}
        ).x
    )


def tempered(logits, temperature):
    """P(class 1) of softmax(logits / temperature), logits [N, 2], temperature > 0 -> float64 [N].

    InputError: any other shape."""
    z = np.asarray(logits, dtype=np.float64)
    if z.ndim != 2 or z.shape[1] != 2:
        raise InputError(f"a score of two classes needs logits [N, 2], got {z.shape}")
    return expit((z[:, 1] - z[:, 0]) / temperature)


def calibration_error(y_true, p1, bins=15):
    """Expected calibration error over bins of equal size -> (ECE, bins).

    Scores are sorted and cut into `bins` parts of (nearly) equal size; ECE is the mean over images of their
    bin's |mean score - fraction of positives| (Naeini et al. 2015). Each bin: {n, score, positives}, the last
    two the means of its scores and labels. Before the cut, images of equal score share the mean of their
    labels, so the order of the input does not matter where a cut falls among equal scores; without ties this
    changes nothing. ECE depends on `bins`.

    InputError: as `check_scores`; `bins` < 1."""
    y, p = check_scores(y_true, p1)
    if bins < 1:
        raise InputError(f"calibration needs at least one bin, got {bins}")
    _, codes = np.unique(p, return_inverse=True)
    y = (np.bincount(codes, weights=y) / np.bincount(codes))[codes]
    parts = np.array_split(np.argsort(p, kind="stable"), min(bins, len(y)))
    rows = [{"n": len(i), "score": float(p[i].mean()), "positives": float(y[i].mean())} for i in parts]
    return sum(r["n"] * abs(r["score"] - r["positives"]) for r in rows) / len(y), rows


def brier(y_true, p1):
    """Mean squared error of the probability of class 1, in [0, 1] (Brier 1950). InputError: as
    `check_scores`."""
    y, p = check_scores(y_true, p1)
    return float(np.mean((p - y) ** 2))


def nll(y_true, p1):
    """Mean negative log-likelihood in nats; a probability below 1e-15 counts as 1e-15.

    InputError: as `check_scores`."""
    y, p = check_scores(y_true, p1)
    return float(-np.log(np.clip(np.where(y == 1, p, 1 - p), 1e-15, 1)).mean())


def predictive_values(recall, specificity, prevalence):
    """(PPV, NPV) by Bayes' rule: how often a positive (negative) call is right where a fraction `prevalence`
    are sick.

    NaN where the test calls nobody positive (negative). InputError unless 0 < prevalence < 1."""
    if not 0 < prevalence < 1:
        raise InputError(f"the prevalence must lie in (0, 1), got {prevalence}")
    tp, fp = recall * prevalence, (1 - specificity) * (1 - prevalence)
    tn, fn = specificity * (1 - prevalence), (1 - recall) * prevalence
    return (tp / (tp + fp) if tp + fp else math.nan), (tn / (tn + fn) if tn + fn else math.nan)


def net_benefit(y_true, p1, odds_thresholds):
    """Decision curve (Vickers and Elkin 2006): net benefit of treating whoever has p1 >= pt.

    Net benefit is TP/N - FP/N * pt / (1 - pt); `odds_thresholds` [M] are the threshold probabilities pt, in
    (0, 1). Returns (this model [M], treating everybody [M]); treating nobody gives 0.
    InputError: as `check_scores`; a threshold probability outside (0, 1)."""
    y, p = check_scores(y_true, p1)
    pt = np.asarray(odds_thresholds, dtype=np.float64)
    if not ((pt > 0) & (pt < 1)).all():
        raise InputError("threshold probabilities must lie in (0, 1)")
    odds, called = pt / (1 - pt), p[None] >= pt[:, None]
    model = (called * y).mean(axis=1) - (called * (1 - y)).mean(axis=1) * odds
    return model, y.mean() - (1 - y.mean()) * odds


# ---------------------------------------------------------------- all of it


@dataclass(frozen=True)
class Rule:
    """How an operating point is chosen and reported.

    min_recall: the recall that the thresholds must reach on validation, in (0, 1].
    confidence: of the guaranteed threshold, in (0, 1).
    strict: whether it is an error that this threshold cannot be given; if not, the result says why.
    temperature: whether to divide the logits by the fitted temperature before anything else.
    bootstrap: draws of the patient bootstrap, 1 to 1,000,000.
    prevalence: fraction of sick people for which predictive values are reported, in (0, 1).

    InputError: a number out of its range.
    """

    min_recall: float = 0.95
    confidence: float = 0.95
    strict: bool = False
    temperature: bool = False
    bootstrap: int = 2000
    prevalence: float = 0.1

    def __post_init__(self):
        if not 0 < self.min_recall <= 1:
            raise InputError(f"min_recall must lie in (0, 1], got {self.min_recall}")
        for name in ("confidence", "prevalence"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} must lie in (0, 1), got {getattr(self, name)}")
        if not 1 <= self.bootstrap <= 1_000_000:
            raise InputError(f"bootstrap must lie in 1..1,000,000, got {self.bootstrap}")


def evaluate(scores, rule):
    """Choose thresholds on validation and report every figure on validation and test.

    `scores`: {val,test}_{labels [N], logits [N, 2], patients [N]}; not changed.
    Returns (the content of calibration.json, {"val": p1 [N], "test": p1 [N]}), p1 being the probabilities
    that the thresholds apply to.
    InputError: no positives or no negatives on one side; arrays that do not match; where `rule.strict`, no
    guarantee."""
    fitted = fit_temperature(scores["val_logits"], scores["val_labels"])
    p1, probability, summaries = {}, {}, {}
    for split, full_name in (("val", "validation"), ("test", "test")):
        y, logits = scores[f"{split}_labels"], scores[f"{split}_logits"]
        _check_both_classes(np.asarray(y), f"{full_name} labels")
        probability[split] = {
            "before": _probability_figures(y, tempered(logits, 1.0)),
            "after": _probability_figures(y, tempered(logits, fitted)),
        }
        p1[split] = tempered(logits, fitted if rule.temperature else 1.0)
    thresholds, guarantee = _choose_thresholds(scores["val_labels"], p1["val"], scores["val_patients"], rule)
    for split in p1:
        y, patients = scores[f"{split}_labels"], scores[f"{split}_patients"]
        summaries[split] = _summarize(y, p1[split], patients, thresholds, rule)
        if guarantee["threshold"] is not None:
            guarantee[split] = {"at_guaranteed": summaries[split]["at_guaranteed"]}
    calibration = {
        "min_recall": rule.min_recall,
        "threshold": thresholds["at_rec"],
        **summaries,
        "guarantee": guarantee,
        "temperature": fitted,
        "temperature_applied": rule.temperature,
        "probability": probability,
        "bootstrap": rule.bootstrap,
    }
    return calibration, p1


def _probability_figures(y, p):
    """Quality of p as a probability: calibration error with its bins, Brier score and log-likelihood."""
    ece, bins = calibration_error(y, p)
    return {"ece": ece, "brier": brier(y, p), "nll": nll(y, p), "bins": bins}


def _choose_thresholds(y, p, patients, rule):
    """The operating points, chosen on validation -> ({name: threshold}, what is guaranteed)."""
    thresholds = {"at_0.5": 0.5, "at_rec": choose_threshold_by_min_recall(y, p, rule.min_recall)[0]}
    guarantee = {
        "confidence": rule.confidence,
        "threshold": None,
        "positive_patients": len(np.unique(patients[y == 1])),
    }
    try:
        thr, _, _ = choose_threshold_with_guarantee(y, p, rule.min_recall, rule.confidence, patients)
        thresholds["at_guaranteed"] = guarantee["threshold"] = thr
    except InputError as error:
        if rule.strict:
            raise
        guarantee["why_not"] = str(error)
    return thresholds, guarantee


def _summarize(y, p, patients, thresholds, rule):
    """{name: figures, intervals and predictive values at that threshold} of one side, validation or test."""
    intervals = intervals_at_thresholds(y, p, list(thresholds.values()), patients, rule.bootstrap)
    rows = {}
    for (name, thr), interval in zip(thresholds.items(), intervals):
        row = summarize_at_threshold(y, p, thr)
        ppv, npv = predictive_values(row["recall"], row["specificity"], rule.prevalence)
        row["interval"] = interval
        row["at_prevalence"] = {
            "prevalence": rule.prevalence,
            "ppv": None if np.isnan(ppv) else ppv,
            "npv": None if np.isnan(npv) else npv,
        }
        rows[name] = row
    return rows
