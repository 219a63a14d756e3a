"""Thresholds and figures of merit for a yes/no question: numpy and scikit-learn, no torch, no files.

Everywhere: `y_true` is an array [N] of 0 (NORMAL) and 1 (PNEUMONIA), `p1` an array [N] of scores in
[0, 1], and an image is called positive iff p1 >= threshold. Errors are common.InputError, a ValueError.
"""

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax
from scipy.stats import beta, binom, binomtest, norm, rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from common import InputError


def check_scores(y_true, p1):
    """Validate labels and scores and return them as (int64 [N], float64 [N]).

    ValueError: lengths differ, empty, not 1-D, labels other than 0/1, NaN, scores outside [0, 1].
    """
    y, p = np.asarray(y_true), np.asarray(p1, dtype=np.float64)
    if y.ndim != 1 or p.ndim != 1:
        raise InputError(f"labels and scores must be 1-D, got shapes {y.shape} and {p.shape}")
    if len(y) != len(p):
        raise InputError(f"{len(y)} labels but {len(p)} scores")
    if len(y) == 0:
        raise InputError("no labels and no scores")
    if not np.isin(y, (0, 1)).all():
        raise InputError("labels must be 0 (NORMAL) or 1 (PNEUMONIA)")
    if np.isnan(p).any():
        raise InputError(f"{np.isnan(p).sum()} of {len(p)} scores are NaN")
    if p.min() < 0 or p.max() > 1:
        raise InputError(f"scores must lie in [0, 1], got {p.min():g} to {p.max():g}")
    return y.astype(np.int64), p


def choose_threshold_by_min_recall(y_true, p1, min_recall=0.95):
    """The recall-first operating point -> (threshold, recall, precision).

    Among the thresholds with recall >= `min_recall`, the one with the highest precision; ties go to
    the higher recall, then to the higher threshold. Exact: every distinct score is a candidate, and no
    other threshold gives another decision. O(N log N).

    ValueError: as `check_scores`; no positives, or no negatives; `min_recall` outside (0, 1].
    """
    y, p = check_scores(y_true, p1)
    if not 0 < min_recall <= 1:
        raise InputError(f"min_recall must lie in (0, 1], got {min_recall}")
    positives = _check_both_classes(y)
    order = np.argsort(-p, kind="stable")
    scores = p[order]
    last = np.r_[np.flatnonzero(np.diff(scores)), len(scores) - 1]  # last index of each run of ties
    tp = np.cumsum(y[order])[last]
    recall, precision = tp / positives, tp / (last + 1)
    ok = np.flatnonzero(recall >= min_recall)  # never empty: the lowest score has recall 1
    best = ok[np.lexsort((scores[last][ok], recall[ok], precision[ok]))[-1]]
    return float(scores[last[best]]), float(recall[best]), float(precision[best])


def summarize_at_threshold(y_true, p1, thr):
    """Decisions p1 >= thr against the truth -> dict.

    Keys: acc, precision, recall (= sensitivity), specificity, f1, all in [0, 1]; auroc and auprc of the
    scores, which do not depend on `thr`; the counts tp, fp, tn, fn; thr. Precision is 0 when nothing is
    called positive (and so is f1).

    ValueError: as `check_scores`; only one class present; `thr` NaN.
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


def _check_both_classes(y):
    """The number of positives; ValueError if either class is absent."""
    positives = int(y.sum())
    if positives == 0:
        raise InputError("no positives among the labels: recall is undefined")
    if positives == len(y):
        raise InputError(
            "no negatives among the labels (one class only): specificity and AUROC are undefined"
        )
    return positives


# ---------------------------------------------------------------- a recall floor that holds


def choose_threshold_with_guarantee(y_true, p1, min_recall=0.95, confidence=0.95, groups=None):
    """A threshold whose true recall is >= `min_recall` with probability >= `confidence` -> (thr, recall,
    precision).

    Neyman-Pearson umbrella rule (Tong, Feng and Li 2018, doi:10.1126/sciadv.aao1659, prop. 1) with missed
    positives as the controlled error: of the n positive scores in ascending order, take the k-th with the
    largest k such that P(Binomial(n, 1 - min_recall) <= k - 1) <= 1 - confidence. Distribution-free and
    exact; ties only make it more careful. The probability is over the draw of the validation positives, and
    the promise is for new positives of the same distribution: nothing is promised after a shift.

    `groups` [N] (patients): images of one patient are not independent, so one positive image per patient is
    drawn at random and the rule applied to these, which are; n is then the number of patients, and the recall
    promised is that of a random image of a random new patient. Of 201 such draws the median threshold is
    returned: a single draw meets the promise exactly, the median varies less than a single draw.

    `recall` and `precision` are those of all given images at thr. InputError (ValueError): as `check_scores`,
    levels outside (0, 1), or too few positives (patients) for any threshold to promise it; the message says
    how many.
    """
    y, p = check_scores(y_true, p1)
    _check_both_classes(y)
    for name, value in (("min_recall", min_recall), ("confidence", confidence)):
        if not 0 < value < 1:
            raise InputError(f"{name} must lie in (0, 1) for a guarantee, got {value}")
    scores = p[y == 1]
    if groups is None:
        draws = np.sort(scores)[None]
    else:
        groups = np.asarray(groups)
        if groups.shape != y.shape:
            raise InputError(f"{len(y)} labels but {len(groups)} groups")
        _, codes = np.unique(groups[y == 1], return_inverse=True)
        rng = np.random.default_rng(0)
        order = np.argsort(codes, kind="stable")
        counts = np.bincount(codes)
        first = np.cumsum(counts) - counts
        picks = first + (rng.random((201, len(counts))) * counts).astype(
            np.int64
        )  # one image a patient and draw
        draws = np.sort(scores[order[picks]], axis=1)
    n = draws.shape[1]
    tails = binom.cdf(np.arange(n), n, 1 - min_recall)  # index k - 1
    allowed = np.flatnonzero(tails <= 1 - confidence)
    if len(allowed) == 0:
        needed = math.ceil(math.log(1 - confidence) / math.log(min_recall) - 1e-9)
        raise InputError(
            f"{n} independent positives cannot promise recall >= {min_recall:g} with confidence "
            f"{confidence:g}: at least {needed} are needed"
        )
    chosen = np.sort(draws[:, allowed[-1]])
    thr = chosen[(len(chosen) - 1) // 2]
    called = p >= thr
    tp = int((called & (y == 1)).sum())
    return float(thr), tp / int(y.sum()), tp / int(called.sum())


# ---------------------------------------------------------------- intervals


def wilson_interval(k, n, level=0.95):
    """Wilson (1927) score interval of a proportion k/n -> (lo, hi). InputError unless 0 <= k <= n, n >= 1."""
    _check_count(k, n, level)
    z = norm.ppf((1 + level) / 2)
    centre, spread = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return (0.0 if k == 0 else float(max(0, centre - spread))), (
        1.0 if k == n else float(min(1, centre + spread))
    )


def clopper_pearson_interval(k, n, level=0.95):
    """Exact (conservative) interval of a proportion k/n -> (lo, hi). InputError unless 0 <= k <= n, n >= 1."""
    _check_count(k, n, level)
    tail = (1 - level) / 2
    return (0.0 if k == 0 else float(beta.ppf(tail, k, n - k + 1))), (
        1.0 if k == n else float(beta.ppf(1 - tail, k + 1, n - k))
    )


def _check_count(k, n, level):
    if n < 1 or not 0 <= k <= n:
        raise InputError(f"a proportion needs 0 <= k <= n and n >= 1, got {k}/{n}")
    if not 0 < level < 1:
        raise InputError(f"the level must lie in (0, 1), got {level}")


def _delong(y, scores):
    """AUROCs [M] of scores [M, N] and their DeLong covariance [M, M], by midranks in O(M N log N)
    (DeLong, DeLong and Clarke-Pearson 1988; Sun and Xu 2014, doi:10.1109/LSP.2014.2337313)."""
    pos, neg = scores[:, y == 1], scores[:, y == 0]
    m, n = pos.shape[1], neg.shape[1]
    if min(m, n) < 2:
        raise InputError(f"DeLong needs two images of each class, got {m} positives and {n} negatives")
    rank_all = rankdata(np.concatenate([pos, neg], axis=1), axis=1)
    v10 = (
        rank_all[:, :m] - rankdata(pos, axis=1)
    ) / n  # share of negatives below each positive, ties one half
    v01 = 1 - (rank_all[:, m:] - rankdata(neg, axis=1)) / m
    return v10.mean(axis=1), np.atleast_2d(np.cov(v10)) / m + np.atleast_2d(np.cov(v01)) / n


def delong_interval(y_true, p1, level=0.95):
    """AUROC with DeLong's normal interval, cut to [0, 1] -> (auroc, lo, hi). At AUROC 0 or 1 the estimated
    variance, and so the width, is 0. InputError: as `check_scores`; fewer than two images of a class."""
    y, p = check_scores(y_true, p1)
    _check_count(0, 1, level)
    (auroc,), ((variance,),) = _delong(y, p[None])
    half = norm.ppf((1 + level) / 2) * math.sqrt(max(0.0, variance))
    return float(auroc), float(max(0.0, auroc - half)), float(min(1.0, auroc + half))


def delong_test(y_true, p1_a, p1_b):
    """Paired DeLong test of two scores on the same images -> (AUROC a - AUROC b, two-sided p-value).

    The p-value is 1 when the two rank all pairs alike (variance 0, difference 0)."""
    y, a = check_scores(y_true, p1_a)
    _, b = check_scores(y_true, p1_b)
    (auc_a, auc_b), cov = _delong(y, np.stack([a, b]))
    difference, variance = auc_a - auc_b, cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]
    if variance <= 1e-18:
        return float(difference), 1.0 if abs(difference) < 1e-12 else 0.0
    return float(difference), float(2 * norm.sf(abs(difference) / math.sqrt(variance)))


def mcnemar_test(correct_a, correct_b):
    """Exact McNemar test on paired booleans [N] -> (a right and b wrong, b right and a wrong, p-value)."""
    a, b = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return only_a, only_b, float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def bootstrap_weights(groups, n=2000, seed=0):
    """How often each image is drawn when whole groups are drawn with replacement: int64 [n, N]."""
    _, codes = np.unique(np.asarray(groups), return_inverse=True)
    count = codes.max() + 1
    draws = np.random.default_rng(seed).integers(count, size=(n, count))
    hits = np.zeros((n, count), dtype=np.int64)
    np.add.at(hits, (np.arange(n)[:, None], draws), 1)
    return hits[:, codes]


def bootstrap_interval(statistic, y_true, p1, groups=None, n=2000, level=0.95, seed=0):
    """Percentile bootstrap of any `statistic(y_true, p1) -> float` -> (lo, hi).

    `groups` [N] (patients) are drawn whole; without them, images. Draws in which the statistic raises
    ValueError or is NaN (one class only, say) are left out; InputError if fewer than half remain. For the
    figures of `summarize_at_threshold` `bootstrap_summary` gives the same, vectorised.
    """
    y, p = check_scores(y_true, p1)
    _check_count(0, 1, level)
    values = []
    for weights in bootstrap_weights(np.arange(len(y)) if groups is None else groups, n, seed):
        index = np.repeat(np.arange(len(y)), weights)
        try:
            values.append(float(statistic(y[index], p[index])))
        except ValueError:
            values.append(math.nan)
    return _percentiles(np.array(values), level)


def bootstrap_summary(y_true, p1, thr, weights):
    """The figures of `summarize_at_threshold` for every draw of `bootstrap_weights` at once.

    {acc, precision, recall, specificity, f1, auroc, auprc}: float64 [n] each, NaN where undefined (but
    precision and f1 are 0 when nothing is called positive, as there)."""
    y, p = check_scores(y_true, p1)
    order = np.argsort(-p, kind="stable")
    w = np.asarray(weights, dtype=np.float64)[:, order]
    y, p = y[order], p[order]
    last = np.r_[np.flatnonzero(np.diff(p)), len(p) - 1]  # ends of runs of equal scores
    tp_curve, fp_curve = np.cumsum(w * y, axis=1)[:, last], np.cumsum(w * (1 - y), axis=1)[:, last]
    positives, negatives = tp_curve[:, -1], fp_curve[:, -1]
    called = np.searchsorted(-p[last], -thr, side="right") - 1  # last run with score >= thr
    zero = np.zeros(len(w))
    tp, fp = (tp_curve[:, called], fp_curve[:, called]) if called >= 0 else (zero, zero)
    tp_step, fp_step = np.diff(tp_curve, axis=1, prepend=0), np.diff(fp_curve, axis=1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        seen = tp_curve + fp_curve
        out = {
            "acc": (tp + negatives - fp) / (positives + negatives),
            "precision": np.where(tp + fp > 0, tp / (tp + fp), 0.0),
            "recall": tp / positives,
            "specificity": 1 - fp / negatives,
            "f1": np.where(tp > 0, 2 * tp / (tp + fp + positives), 0.0),
            "auroc": (fp_step * (tp_curve - tp_step / 2)).sum(axis=1) / (positives * negatives),
            "auprc": (tp_step * np.where(seen > 0, tp_curve / np.maximum(seen, 1), 0)).sum(axis=1)
            / positives,
        }
    one_class = (positives == 0) | (negatives == 0)
    return {k: np.where(one_class, np.nan, v) for k, v in out.items()}


def _percentiles(values, level):
    ok = values[np.isfinite(values)]
    if len(ok) * 2 < len(values) or len(ok) == 0:
        raise InputError(
            f"{len(values) - len(ok)} of {len(values)} bootstrap draws are undefined (one class only): "
            "too few images or patients for an interval"
        )
    lo, hi = np.percentile(ok, [50 * (1 - level), 50 * (1 + level)])
    return float(lo), float(hi)


def intervals_at_threshold(y_true, p1, thr, groups, n=2000, level=0.95, seed=0):
    """Intervals of the figures of `summarize_at_threshold` -> {figure: {method: [lo, hi]}}.

    recall, specificity, precision, acc: "wilson"; auroc: "delong"; all and f1, auprc: "bootstrap", whole
    `groups` (patients) drawn n times, the only one that knows that images of one patient are alike."""
    row = summarize_at_threshold(y_true, p1, thr)
    tp, fp, tn, fn = (row[k] for k in ("tp", "fp", "tn", "fn"))
    out = {
        name: {"bootstrap": list(_percentiles(values, level))}
        for name, values in bootstrap_summary(y_true, p1, thr, bootstrap_weights(groups, n, seed)).items()
    }
    for name, k, total in (
        ("recall", tp, tp + fn),
        ("specificity", tn, tn + fp),
        ("precision", tp, tp + fp),
        ("acc", tp + tn, tp + tn + fp + fn),
    ):
        if total:
            out[name]["wilson"] = list(wilson_interval(k, total, level))
    out["auroc"]["delong"] = list(delong_interval(y_true, p1, level)[1:])
    return out


def reported_interval(row, key):
    """The interval of a `summarize_at_threshold` row to show: the patient bootstrap, but Wilson where every
    draw is alike (0 or all of n), because a width of 0 would claim certainty."""
    found = row["interval"][key]
    low, high = found["bootstrap"]
    return found["wilson"] if low == high and "wilson" in found else found["bootstrap"]


def compare_at_thresholds(y_true, p1_a, thr_a, p1_b, thr_b, groups, n=2000, level=0.95, seed=0):
    """Model a minus model b on the same images, each at its own threshold.

    {figure: {difference, lo, hi}} for acc, precision, recall, specificity, f1, auroc, auprc by paired
    bootstrap of whole `groups`; "delong": p-value for AUROC; "mcnemar_recall", "mcnemar_specificity": exact
    p-values on the positives and on the negatives."""
    y, a = check_scores(y_true, p1_a)
    _, b = check_scores(y_true, p1_b)
    weights = bootstrap_weights(groups, n, seed)
    draws_a, draws_b = bootstrap_summary(y, a, thr_a, weights), bootstrap_summary(y, b, thr_b, weights)
    row_a, row_b = summarize_at_threshold(y, a, thr_a), summarize_at_threshold(y, b, thr_b)
    out = {}
    for name in draws_a:
        lo, hi = _percentiles(draws_a[name] - draws_b[name], level)
        out[name] = {"difference": row_a[name] - row_b[name], "lo": lo, "hi": hi}
    right_a, right_b = (a >= thr_a) == y, (b >= thr_b) == y
    out["delong"] = delong_test(y, a, b)[1]
    for k, name in ((1, "mcnemar_recall"), (0, "mcnemar_specificity")):
        out[name] = mcnemar_test(right_a[y == k], right_b[y == k])[2]
    return out


# ---------------------------------------------------------------- probabilities


def fit_temperature(logits, y_true):
    """The T > 0 that minimises the NLL of softmax(logits / T), logits [N, K] and labels [N] in 0..K-1
    (Guo et al. 2017, arXiv:1706.04599). Sought in [0.01, 100]; separable data end at 0.01.

    InputError: shapes that differ, NaN or infinite logits, labels out of range.
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
    """P(class 1) of softmax(logits / T), logits [N, 2] -> float64 [N]."""
    z = np.asarray(logits, dtype=np.float64)
    return expit((z[:, 1] - z[:, 0]) / temperature)


def calibration_error(y_true, p1, bins=15):
    """Expected calibration error over bins of equal mass -> (ece, bins).

    Scores are sorted and cut into `bins` parts of (nearly) equal size; ECE = sum of share * |mean score -
    share of positives| (Naeini et al. 2015). Each bin: {n, score, positives} with the two means. ECE depends
    on `bins`."""
    y, p = check_scores(y_true, p1)
    order = np.argsort(p, kind="stable")
    parts = [i for i in np.array_split(order, min(bins, len(y))) if len(i)]
    rows = [{"n": len(i), "score": float(p[i].mean()), "positives": float(y[i].mean())} for i in parts]
    return sum(r["n"] * abs(r["score"] - r["positives"]) for r in rows) / len(y), rows


def brier(y_true, p1):
    """Mean squared error of the probability, in [0, 1] (Brier 1950)."""
    y, p = check_scores(y_true, p1)
    return float(np.mean((p - y) ** 2))


def nll(y_true, p1):
    """Mean negative log-likelihood in nats; probabilities are kept 1e-15 away from 0 and 1."""
    y, p = check_scores(y_true, p1)
    return float(-np.log(np.clip(np.where(y == 1, p, 1 - p), 1e-15, 1)).mean())


def predictive_values(recall, specificity, prevalence):
    """Bayes: (PPV, NPV) of a test with this recall and specificity where `prevalence` of the people are sick.

    NaN where no one would be called positive (negative). InputError unless 0 < prevalence < 1."""
    if not 0 < prevalence < 1:
        raise InputError(f"the prevalence must lie in (0, 1), got {prevalence}")
    tp, fp = recall * prevalence, (1 - specificity) * (1 - prevalence)
    tn, fn = specificity * (1 - prevalence), (1 - recall) * prevalence
    return (tp / (tp + fp) if tp + fp else math.nan), (tn / (tn + fn) if tn + fn else math.nan)


def net_benefit(y_true, p1, odds_thresholds):
    """Decision curve (Vickers and Elkin 2006): TP/N - FP/N * pt / (1 - pt) when treating iff p1 >= pt.

    `odds_thresholds` [M] in (0, 1) -> (model [M], treat all [M]); treat none is 0."""
    y, p = check_scores(y_true, p1)
    pt = np.asarray(odds_thresholds, dtype=np.float64)
    if ((pt <= 0) | (pt >= 1)).any():
        raise InputError("threshold probabilities must lie in (0, 1)")
    odds, called = pt / (1 - pt), p[None] >= pt[:, None]
    model = (called * y).mean(axis=1) - (called * (1 - y)).mean(axis=1) * odds
    return model, y.mean() - (1 - y.mean()) * odds


# ---------------------------------------------------------------- all of it


def evaluate(scores, *, min_recall, confidence, strict, temperature, bootstrap, prevalence):
    """Thresholds from validation and every figure on both sides: the content of calibration.json.

    `scores`: {val,test}_{labels [N], logits [N, 2], patients [N]}; {val,test}_p1 are added to it.
    `confidence`: of the guaranteed threshold; where it cannot be given, InputError if `strict`, else a note
    in the result. `temperature`: divide the logits by the fitted temperature before anything else."""
    fitted = fit_temperature(scores["val_logits"], scores["val_labels"])
    used = fitted if temperature else 1.0
    probability = {}
    for name in ("val", "test"):
        y = scores[f"{name}_labels"]
        probability[name] = {}
        for word, t in (("before", 1.0), ("after", fitted)):
            p = tempered(scores[f"{name}_logits"], t)
            ece, bins = calibration_error(y, p)
            probability[name][word] = {"ece": ece, "brier": brier(y, p), "nll": nll(y, p), "bins": bins}
        scores[f"{name}_p1"] = tempered(scores[f"{name}_logits"], used)
    y, p = scores["val_labels"], scores["val_p1"]
    thresholds = {"at_0.5": 0.5, "at_rec": choose_threshold_by_min_recall(y, p, min_recall)[0]}
    guarantee = {
        "confidence": confidence,
        "threshold": None,
        "positive_patients": len(np.unique(scores["val_patients"][y == 1])),
    }
    try:
        thr, _, _ = choose_threshold_with_guarantee(y, p, min_recall, confidence, scores["val_patients"])
        thresholds["at_guaranteed"] = guarantee["threshold"] = thr
    except InputError as error:
        if strict:
            raise
        guarantee["why_not"] = str(error)
    summaries = {}
    for name in ("val", "test"):
        y, p, patients = (scores[f"{name}_{k}"] for k in ("labels", "p1", "patients"))
        summaries[name] = {}
        for point, thr in thresholds.items():
            row = summarize_at_threshold(y, p, thr)
            row["interval"] = intervals_at_threshold(y, p, thr, patients, bootstrap)
            ppv, npv = predictive_values(row["recall"], row["specificity"], prevalence)
            row["at_prevalence"] = {
                "prevalence": prevalence,
                "ppv": None if np.isnan(ppv) else ppv,
                "npv": None if np.isnan(npv) else npv,
            }
            summaries[name][point] = row
    if guarantee["threshold"] is not None:
        guarantee |= {name: {"at_guaranteed": summaries[name]["at_guaranteed"]} for name in summaries}
    return {
        "min_recall": min_recall,
        "threshold": thresholds["at_rec"],
        **summaries,
        "guarantee": guarantee,
        "temperature": fitted,
        "temperature_applied": temperature,
        "probability": probability,
        "bootstrap": bootstrap,
    }
