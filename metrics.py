"""Thresholds and probabilities for one yes/no question: numpy, scipy and scikit-learn only.

Everywhere `y_true` is an array [N] of 0 (negative) and 1 (positive), `p1` an array [N] of scores in [0, 1],
and an image is called positive if and only if p1 >= threshold. Nothing here reads files, and arguments are
never changed. Errors are common.InputError, which is a ValueError."""

import math

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, logit
from scipy.stats import binom
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from common.console import InputError


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
    positives = check_both_classes(y)
    # From the highest score down: with a threshold at position i the first i + 1 images are called positive.
    order = np.argsort(-p, kind="stable")
    scores = p[order]
    # Images of equal score are called together, so only the last of each tie is a threshold.
    last = ends_of_ties(scores)
    tp = np.cumsum(y[order])[last]
    recall, precision = tp / positives, tp / (last + 1)
    high_enough = np.flatnonzero(recall >= min_recall)  # never empty: the lowest score has recall 1
    ranked = np.lexsort((scores[last][high_enough], recall[high_enough], precision[high_enough]))
    best = high_enough[ranked[-1]]
    return float(scores[last[best]]), float(recall[best]), float(precision[best])


def summarize_at_threshold(y_true, p1, thr):
    """Compare the decisions p1 >= thr with the truth -> dict of plain Python numbers.

    acc, precision, recall (sensitivity), specificity and f1, all in [0, 1]; auroc and auprc of the scores,
    which do not depend on `thr`; the counts tp, fp, tn, fn; thr. Precision and f1 are 0 when nothing is
    called positive.

    InputError: as `check_scores`; no positives or no negatives; `thr` is NaN.
    """
    y, p = check_scores(y_true, p1)
    positives = check_both_classes(y)
    if np.isnan(thr):
        raise InputError("the threshold is NaN")
    counts = counts_at_threshold(y, p, thr)
    tp, fp, tn, fn = counts.values()
    return {
        "acc": (tp + tn) / len(y),
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / positives,
        "specificity": tn / (tn + fp),
        "f1": 2 * tp / (2 * tp + fp + fn),
        "auroc": float(roc_auc_score(y, p)),
        "auprc": float(average_precision_score(y, p)),
        **counts,
        "thr": float(thr),
    }


def counts_at_threshold(y, p, thr):
    """{"tp", "fp", "tn", "fn"} of the decisions p >= thr: checked labels and scores [N]."""
    called, sick = p >= thr, y == 1
    tp, fp = int((called & sick).sum()), int((called & ~sick).sum())
    return {"tp": tp, "fp": fp, "tn": int((~sick).sum()) - fp, "fn": int(sick.sum()) - tp}


def check_both_classes(y, where="labels"):
    """The number of positives; InputError if either class is absent."""
    positives = int(y.sum())
    if positives == 0:
        raise InputError(f"no positives among the {where}: recall and AUROC are undefined")
    if positives == len(y):
        raise InputError(f"no negatives among the {where}: specificity and AUROC are undefined")
    return positives


def check_groups(groups, y):
    """`groups` as an array [N]; InputError if it does not match the labels."""
    groups = np.asarray(groups)
    if groups.shape != y.shape:
        raise InputError(f"{len(y)} labels but groups of shape {groups.shape}: give one group per label")
    return groups


def ends_of_ties(ordered):
    """The last index of every run of equal values in a sorted array."""
    return np.r_[np.flatnonzero(np.diff(ordered)), len(ordered) - 1]


# ---------------------------------------------------------------- room for rounding


def lowered_to_midpoint(thr, scores):
    """A threshold with the same decisions that does not sit on a score -> (threshold, gap).

    `thr` is one of `scores` [N] in [0, 1], of either class. A score that is computed in another batch, or by
    another library, differs in its last digits, and an image on the threshold may then change sides. So
    the threshold moves to the middle, in logits, between `thr` and the next lower distinct score; where none
    is lower, by half a unit of logit. Scores of 0 and 1 count as the doubles next to them. The result lies
    strictly between the lower score and `thr`; where no double lies there, it is `thr`.

    `gap`: the distance in logits from the result to the nearest score; 0 if it is `thr`.
    InputError: NaN scores or threshold; no score; `thr` outside [0, 1]."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.size == 0 or np.isnan(scores).any() or not 0 <= thr <= 1:
        raise InputError(f"a threshold in [0, 1] and scores without NaN are needed, got {thr}")
    thr = float(thr)
    below = scores[scores < thr]
    if len(below):
        lower = float(below.max())
        middle = (finite_logit(lower) + finite_logit(thr)) / 2
    else:
        lower = -math.inf
        middle = finite_logit(thr) - 0.5
    # Near 0 and 1 the doubles are coarse in logits, so a rounded middle may land on an end.
    for candidate in (float(expit(middle)), (lower + thr) / 2):
        if lower < candidate < thr:
            return candidate, float(np.abs(finite_logit(scores) - finite_logit(candidate)).min())
    return thr, 0.0


def finite_logit(p):
    """log(p / (1 - p)) in float64; 0 and 1 count as the doubles next to them."""
    return logit(np.clip(p, np.nextafter(0.0, 1.0), np.nextafter(1.0, 0.0)))


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

    `groups` [N] (patients): images of one patient are not independent, so one positive image of each is drawn
    at random (by a fixed seed) and the rule applied to these. n is then the number of patients, and the
    promised recall is that of a random image of a random new patient. Several draws would vary less, but
    their median may break the promise up to twice as often (Markov's inequality).

    InputError: as `check_scores`; no positives or no negatives; `min_recall` or `confidence` outside (0, 1);
    too few positives (or patients) for any threshold to keep the promise, and how many are needed.
    """
    y, p = check_scores(y_true, p1)
    check_both_classes(y)
    for name, value in (("recall", min_recall), ("confidence", confidence)):
        if not 0 < value < 1:
            raise InputError(f"a {name} of {value:g} cannot be guaranteed: it must lie in (0, 1)")
    if groups is None:
        positives = np.sort(p[y == 1])
    else:
        positives = one_image_per_patient(p[y == 1], check_groups(groups, y)[y == 1])
    # The k-th smallest score breaks the promise with this chance; the largest k that may is taken.
    n = len(positives)
    tails = binom.cdf(np.arange(n), n, 1 - min_recall)  # index k - 1
    allowed = np.flatnonzero(tails <= 1 - confidence)
    if len(allowed) == 0:
        counted = "" if groups is None else " (one a patient)"
        raise InputError(
            f"{n} independent positives{counted} cannot guarantee a recall of {min_recall:g} with confidence "
            f"{confidence:g}: at least {positives_needed(min_recall, confidence)} are needed"
        )
    thr = positives[allowed[-1]]
    called = p >= thr
    tp = int((called & (y == 1)).sum())
    return float(thr), tp / int(y.sum()), tp / int(called.sum())


def can_guarantee(positives, min_recall, confidence):
    """Whether `positives` independent positives, none of them missed, are enough for
    `choose_threshold_with_guarantee`: the very comparison that it makes."""
    return bool(binom.cdf(0, positives, 1 - min_recall) <= 1 - confidence)


def positives_needed(min_recall, confidence):
    """The fewest independent positives for which `can_guarantee` holds; both numbers in (0, 1)."""
    needed = max(1, math.ceil(math.log(1 - confidence) / math.log(min_recall) - 1e-9))
    while not can_guarantee(needed, min_recall, confidence):  # the formula may be one short by rounding
        needed += 1
    return needed


def chance_below_floor(positives, min_recall):
    """The chance that the recall at @Rec is below its floor for new people, with `positives` independent
    positives and scores that do not tie: float in [0, 1].

    At most m of n positives are missed, the largest m with (n - m) / n >= `min_recall`. Where that many are
    missed, the true share of the missed is Beta(m + 1, n - m), and it exceeds 1 - `min_recall` with the
    chance P(Binomial(n, 1 - min_recall) <= m). Fewer missed, ties, or a threshold between two scores only
    lower the chance."""
    missed = np.flatnonzero((positives - np.arange(positives)) / positives >= min_recall)[-1]
    return float(binom.cdf(missed, positives, 1 - min_recall))


def one_image_per_patient(scores, patients):
    """One random score [M] of each of P patients [M], always the same ones: float64 [P], ascending."""
    # Sorted by patient, the images of one stand together, from position `first` on.
    _, codes = np.unique(patients, return_inverse=True)
    order, counts = np.argsort(codes, kind="stable"), np.bincount(codes)
    first = np.cumsum(counts) - counts
    picks = (np.random.default_rng(0).random(len(counts)) * counts).astype(np.int64)
    return np.sort(scores[order[first + picks]])


# ---------------------------------------------------------------- probabilities


LEAST, MOST = 0.01, 100.0  # temperatures
EXACT = {"gtol": 1e-10, "max_trust_radius": 1e6}  # of the slope and bias of Platt scaling


def fit_temperature(logits, y_true):
    """The T > 0 that minimises the negative log-likelihood of softmax(logits / T) (Guo et al. 2017,
    arXiv:1706.04599), or of sigmoid(logits / T).

    Logits [N, K] with labels [N] in 0..K-1 (softmax), or with labels [N, K] of 0, 1 and -1 for unknown
    (sigmoid, one T for all K). T is sought in [LEAST, MOST], see `temperature_limit`.
    InputError: shapes that do not match, no known label, NaN or infinite logits, labels out of range.
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(y_true)
    if z.ndim != 2 or y.shape not in (z.shape[:1], z.shape) or len(y) == 0:
        raise InputError(f"temperature needs logits [N, K] and labels [N] or [N, K]: {z.shape}, {y.shape}")
    if not np.isfinite(z).all():
        raise InputError("some logits are NaN or infinite")
    sigmoid, known = y.ndim == 2, y >= 0
    low, high = (-1, 1) if sigmoid else (0, z.shape[1] - 1)
    if not np.isin(y, np.arange(low, high + 1)).all():
        raise InputError(f"labels must lie in {low}..{high}")
    if not known.any():
        raise InputError("temperature needs a known label")
    # Of a sigmoid, the loss of a label is log(1 + exp(-z)) where it is 1, and log(1 + exp(z)) where it is 0.
    signed = np.where(y == 1, -z, z)[known] if sigmoid else None

    def loss(log_t):  # convex in 1/T, so one minimum in log T
        if sigmoid:
            return np.logaddexp(0, signed * math.exp(-log_t)).mean()
        return -log_softmax(z * math.exp(-log_t), axis=1)[np.arange(len(y)), y].mean()

    bounds = math.log(LEAST), math.log(MOST)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-8}).x)


def temperature_limit(temperature):
    """What it means that a fitted temperature lies at an end of its range; "" where it does not."""
    if temperature < LEAST * 1.001:
        return "as low as it is sought: the logits separate the classes"
    if temperature > MOST / 1.001:
        return "as high as it is sought: equal probabilities for all would do as well"
    return ""


def fit_platt(log_odds, y_true):
    """Platt scaling of one yes/no question -> (slope, bias), those with which expit(slope * z + bias) has the
    least negative log-likelihood (Platt 1999; his smoothing of the labels is left out). Temperature is the
    case without bias: slope 1 / T.

    `log_odds` z: float [N]; `y_true`: [N], 0 or 1. The problem is convex. It has a solution exactly where
    neither class lies wholly above the other.
    InputError: shapes that do not match; values that are not finite; no positives or no negatives; classes
    that z separates; a slope that is not above 0, which would turn the ranking round.
    """
    z, y = np.asarray(log_odds, dtype=np.float64), np.asarray(y_true)
    if z.ndim != 1 or z.shape != y.shape:
        raise InputError(f"Platt scaling needs as many log odds as labels: {z.shape}, {y.shape}")
    if not np.isfinite(z).all() or not np.isin(y, (0, 1)).all():
        raise InputError("Platt scaling needs finite log odds, and labels of 0 and 1")
    check_both_classes(y, "validation labels")
    sick, healthy = z[y == 1], z[y == 0]
    if sick.max() <= healthy.min():
        raise InputError(
            "the slope would not be above 0: no log odds of a positive exceed those of a negative"
        )
    if healthy.max() <= sick.min():
        raise InputError("the logits separate the classes: the steeper the slope the better, so none is best")
    # In units of the spread the search begins near its end, however large the logits are.
    centre, spread = z.mean(), z.std()
    u, sign = (z - centre) / spread, np.where(y == 1, -1.0, 1.0)

    def loss(line):
        return np.logaddexp(0, sign * (line[0] * u + line[1])).mean()

    def gradient(line):
        off = expit(line[0] * u + line[1]) - y
        return np.array([(off * u).mean(), off.mean()])

    def hessian(line):
        p = expit(line[0] * u + line[1])
        w = p * (1 - p)
        return np.array([[(w * u * u).mean(), (w * u).mean()], [(w * u).mean(), w.mean()]])

    fit = minimize(loss, [1.0, 0.0], jac=gradient, hess=hessian, method="trust-exact", options=EXACT)
    steepness, height = fit.x
    if steepness <= 1e-6:
        raise InputError(
            f"the slope would be {steepness / spread:.3g}, not above 0: the logits do not rank the classes"
        )
    return float(steepness / spread), float(height - steepness * centre / spread)


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
    members = np.array_split(np.argsort(p, kind="stable"), min(bins, len(y)))
    rows = [{"n": len(i), "score": float(p[i].mean()), "positives": float(y[i].mean())} for i in members]
    return sum(row["n"] * abs(row["score"] - row["positives"]) for row in rows) / len(y), rows


def brier(y_true, p1):
    """Mean squared error of the probability of class 1, in [0, 1] (Brier 1950). InputError: as
    `check_scores`."""
    y, p = check_scores(y_true, p1)
    return float(brier_score_loss(y, p))


def nll(y_true, p1):
    """Mean negative log-likelihood in nats; a probability below 1e-15 counts as 1e-15 (scikit-learn's
    `log_loss` clips at 2e-16). InputError: as `check_scores`."""
    y, p = check_scores(y_true, p1)
    return float(-np.log(np.clip(np.where(y == 1, p, 1 - p), 1e-15, 1)).mean()) + 0.0  # not -0.0


def predictive_values(recall, specificity, prevalence):
    """(PPV, NPV) by Bayes' rule: how often a positive (negative) call is right where a fraction `prevalence`
    are sick.

    NaN where the test calls nobody positive (negative). InputError unless 0 < prevalence < 1."""
    if not 0 < prevalence < 1:
        raise InputError(f"the prevalence must lie in (0, 1), got {prevalence}")
    tp, fp = recall * prevalence, (1 - specificity) * (1 - prevalence)
    tn, fn = specificity * (1 - prevalence), (1 - recall) * prevalence
    ppv = tp / (tp + fp) if tp + fp else math.nan
    npv = tn / (tn + fn) if tn + fn else math.nan
    return ppv, npv


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
