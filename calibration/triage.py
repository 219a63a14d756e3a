"""Three answers instead of two: negative below @Rec, positive from @In on, between them unsure ("read it").

@Rec keeps a recall, so it says when "negative" can be trusted; @In keeps a specificity, so it says when
"positive" can. Where @In is not above @Rec, nobody is unsure, and @Rec decides.

A calibration that was asked for it (--min-specificity) has, at each finding that has a threshold:

rule_in   {"threshold": @In, None where there is none, and then "why_not"; "gap": logits to the nearest
          validation score; "min_specificity"; "guarantee": {"confidence", "negative_patients", "threshold":
          @InGuar, None with "why_not", "gap"}}
triage    {"val", "test": what `shares` gives between @Rec and @In}; in the guarantee, between @Guar and
          @InGuar, where it has both
and the figures "at_in" and "at_in_guaranteed" of each side. No torch, no files.
"""

import math

import numpy as np
from scipy.special import expit
from scipy.stats import binom

from calibration.intervals import bootstrap_weights, span_of_draws
from common.console import InputError
from common.proportions import count_of, proportion_of_patients
from common.task import ANSWERS, effective_rule_in
from metrics import (
    can_guarantee,
    check_both_classes,
    check_groups,
    check_scores,
    ends_of_ties,
    finite_logit,
    lowered_to_midpoint,
    positives_needed,
)

# ---------------------------------------------------------------- the threshold @In


def choose_threshold_by_min_specificity(y_true, p1, min_specificity):
    """The rule-in operating point -> (threshold, recall, specificity), the last two on the given images.

    Among the thresholds with specificity >= `min_specificity`, the one with the highest recall; ties go to
    the higher specificity. Exact: every distinct score is tried. An image is positive if p1 >= threshold.

    InputError: as `check_scores`; no positives or no negatives; `min_specificity` outside (0, 1]; none of the
    positives is found at any threshold with that specificity."""
    y, p = check_scores(y_true, p1)
    if not 0 < min_specificity <= 1:
        raise InputError(f"min_specificity must lie in (0, 1], got {min_specificity}")
    positives = check_both_classes(y)
    negatives = len(y) - positives
    # From the highest score down; images of equal score are called together.
    order = np.argsort(-p, kind="stable")
    last = ends_of_ties(p[order])
    tp = np.cumsum(y[order])[last]
    fp = last + 1 - tp
    recall, specificity = tp / positives, (negatives - fp) / negatives
    useful = np.flatnonzero((specificity >= min_specificity) & (tp > 0))
    if not len(useful):
        raise InputError(
            f"at every threshold with a specificity of {min_specificity:g} or more none of the sick is found"
        )
    best = useful[np.lexsort((specificity[useful], recall[useful]))[-1]]
    return float(p[order][last[best]]), float(recall[best]), float(specificity[best])


def choose_rule_in_with_guarantee(y_true, p1, min_specificity, confidence, patients):
    """A threshold whose true specificity is at least `min_specificity` with probability at least
    `confidence` -> (threshold, gap in logits to the nearest score).

    The Neyman-Pearson umbrella rule of metrics.choose_threshold_with_guarantee, mirrored. Each of n patients
    with a negative image counts by the highest score of these. In ascending order the k-th is taken, with the
    least k such that P(Binomial(n, min_specificity) >= k) <= 1 - confidence; only what is above it is
    positive. The threshold lies halfway, in logits, up to the next score. Exact for scores of any
    distribution; ties only make it safer. Promised is the chance that no healthy image of a random new
    patient is called positive, so for a random image of such a patient it holds too.

    InputError: as `check_scores`; no positives or no negatives; `min_specificity` or `confidence` outside
    (0, 1); too few patients, and how many are needed; healthy scores of 1, above which nothing lies."""
    y, p = check_scores(y_true, p1)
    check_both_classes(y)
    patients = check_groups(patients, y)
    for name, value in (("specificity", min_specificity), ("confidence", confidence)):
        if not 0 < value < 1:
            raise InputError(f"a {name} of {value:g} cannot be guaranteed: it must lie in (0, 1)")
    _, codes = np.unique(patients[y == 0], return_inverse=True)
    highest = np.zeros(codes.max() + 1)
    np.maximum.at(highest, codes, p[y == 0])
    # With j patients above the threshold the promise is broken with this chance; the largest j is taken.
    n = len(highest)
    allowed = np.flatnonzero(binom.cdf(np.arange(n), n, 1 - min_specificity) <= 1 - confidence)
    if not len(allowed):
        raise InputError(
            f"{n} patients without it cannot guarantee a specificity of {min_specificity:g} with confidence "
            f"{confidence:g}: at least {positives_needed(min_specificity, confidence)} are needed"
            f"{promised_instead(n, confidence)}"
        )
    return raised_to_midpoint(float(np.sort(highest)[n - 1 - allowed[-1]]), p)


def promised_instead(patients, confidence):
    """The specificity that so few patients can promise, to three digits, as text; "" where there is none."""
    steps = math.floor(1000 * (1 - confidence) ** (1 / patients))
    if steps and not can_guarantee(patients, steps / 1000, confidence):  # rounding lifted it over the limit
        steps -= 1
    return f"; so few can promise {steps / 1000:g}" if steps else ""


def raised_to_midpoint(score, scores):
    """The threshold above which `score`, one of `scores` [N] in [0, 1], is not positive, but the next higher
    one is -> (threshold, gap), as metrics.lowered_to_midpoint. Half a unit of logit higher where no score is
    above. InputError where that is above 1."""
    above = scores[scores > score]
    if len(above):
        return lowered_to_midpoint(float(above.min()), scores)
    if score >= 1:
        raise InputError("healthy people score 1, and no threshold lies above that")
    threshold = float(max(expit(finite_logit(score) + 0.5), np.nextafter(score, 1)))
    return threshold, float(finite_logit(threshold) - finite_logit(score))


def choose_rule_in(y, p, patients, rule):
    """What a calibration says of @In -> JSON ("rule_in" above): truth int [N], scores [N], patients [N] of
    validation, an operating_point.Rule with a `min_specificity`. InputError where `rule.strict` and there are
    too few healthy patients for the guarantee."""
    floor = rule.min_specificity
    found = {"threshold": None, "min_specificity": floor}
    try:
        chosen, _, _ = choose_threshold_by_min_specificity(y, p, floor)
        found["threshold"], found["gap"] = lowered_to_midpoint(chosen, p)
    except InputError as error:
        found["why_not"] = str(error)
    found["guarantee"] = {
        "confidence": rule.confidence,
        "threshold": None,
        "negative_patients": count_of(patients[y == 0]),
    }
    try:
        promised = choose_rule_in_with_guarantee(y, p, floor, rule.confidence, patients)
        found["guarantee"]["threshold"], found["guarantee"]["gap"] = promised
    except InputError as error:
        if rule.strict:
            raise
        found["guarantee"]["why_not"] = str(error)
    return found


def rule_in_points(rule_in):
    """{"at_in", "at_in_guaranteed": threshold} of a "rule_in", those that there are."""
    points = {"at_in": rule_in["threshold"], "at_in_guaranteed": rule_in["guarantee"]["threshold"]}
    return {name: threshold for name, threshold in points.items() if threshold is not None}


# ---------------------------------------------------------------- who gets which answer


def answers(scores, at_rec, at_in):
    """Scores [N] -> int [N]: 0 negative, 1 unsure, 2 positive (ANSWERS). `at_in`: None where there is none,
    and then nobody is positive."""
    found = (scores >= at_rec).astype(int)
    if at_in is not None:
        found += scores >= effective_rule_in(at_rec, at_in)
    return found


def shares(truth, scores, patients, thresholds, bootstrap):
    """Who gets which answer -> {"sick", "healthy", "all": {"n": images, "patients", "negative", "unsure",
    "positive": {"count", "value", "lo", "hi"}}}. A group without an image is left out.

    truth int [N], 0 or 1; scores [N]; patients [N]; `thresholds`: (@Rec, @In or None). Intervals: 95%, of
    `bootstrap` draws of whole patients of the group; Wilson's by patients where every draw is the same."""
    answer, found = answers(scores, *thresholds), {}
    groups = {"sick": truth == 1, "healthy": truth == 0, "all": np.ones(len(truth), bool)}
    for name, members in groups.items():
        if members.any():
            found[name] = _shares_of_group(answer[members], patients[members], bootstrap)
    return found


def _shares_of_group(answer, patients, bootstrap):
    """`shares` of one group."""
    given = (answer[:, None] == np.arange(len(ANSWERS))).astype(float)  # [n, 3]
    blocks = bootstrap_weights(patients, bootstrap)
    draws = np.concatenate([(block @ given) / block.sum(axis=1, keepdims=True) for block in blocks])
    found = {"n": len(answer), "patients": count_of(patients)}
    for k, word in enumerate(ANSWERS):
        value = float(given[:, k].mean())
        instead = proportion_of_patients(value, found["patients"])
        found[word] = {"count": int(given[:, k].sum()), **span_of_draws(value, draws[:, k], instead)}
    return found
