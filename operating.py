"""An operating point: thresholds chosen on validation by a Rule, and every figure of merit on both sides."""

from dataclasses import dataclass

import numpy as np

from common import InputError
from intervals import intervals_at_thresholds
from metrics import (
    brier,
    calibration_error,
    check_both_classes,
    choose_threshold_by_min_recall,
    choose_threshold_with_guarantee,
    fit_temperature,
    nll,
    predictive_values,
    summarize_at_threshold,
    tempered,
)


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
        check_both_classes(np.asarray(y), f"{full_name} labels")
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
