"""Thresholds and figures of merit for a yes/no question: numpy and scikit-learn, no torch, no files.

Everywhere: `y_true` is an array [N] of 0 (NORMAL) and 1 (PNEUMONIA), `p1` an array [N] of scores in
[0, 1], and an image is called positive iff p1 >= threshold. Errors are common.InputError, a ValueError.
"""
import numpy as np
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
        "tp": tp, "fp": fp, "tn": tn, "fn": fn, "thr": float(thr),
    }


def _check_both_classes(y):
    """The number of positives; ValueError if either class is absent."""
    positives = int(y.sum())
    if positives == 0:
        raise InputError("no positives among the labels: recall is undefined")
    if positives == len(y):
        raise InputError("no negatives among the labels (one class only): specificity and AUROC are undefined")
    return positives
