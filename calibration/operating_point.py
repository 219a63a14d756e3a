"""An operating point: thresholds chosen on validation by a Rule, and every figure of merit on both sides."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.special import softmax

from calibration.intervals import (
    bootstrap_summary,
    bootstrap_weights,
    class_figures,
    intervals_of_draws,
    mean_of_defined,
    span_of_draws,
)
from calibration.pooling import BY, PLURAL, POOLS, Units, units_of
from calibration.triage import choose_rule_in, rule_in_points, shares
from common.console import InputError, progress
from common.proportions import count_of, curves_of
from common.scaling import SIDES
from common.task import Task
from metrics import (
    brier,
    calibration_error,
    check_both_classes,
    choose_threshold_by_min_recall,
    choose_threshold_with_guarantee,
    fit_platt,
    fit_temperature,
    lowered_to_midpoint,
    nll,
    predictive_values,
    summarize_at_threshold,
)


@dataclass(frozen=True)
class Rule:
    """How an operating point is chosen and reported.

    min_recall: the recall that the thresholds must reach on validation, in (0, 1].
    confidence: of the guaranteed threshold, in (0, 1).
    strict: whether it is an error that this threshold cannot be given; if not, the result says why.
    jointly: whether the guarantees of several findings are to hold all at once.
    temperature: whether to divide the logits by the fitted temperature before anything else.
    platt: whether to give the log odds of each finding a fitted slope and bias instead (metrics.fit_platt).
    bootstrap: draws of the patient bootstrap, 1 to 1,000,000.
    prevalence: fraction of sick people for which predictive values are reported, in (0, 1).
    by: whether thresholds and figures are those of an "image", a "study" or a "patient" (pooling.BY).
    pool: how the scores of a study's or patient's images become one, of pooling.POOLS.
    min_specificity: the specificity that @In must reach on validation, in (0, 1]; None: no @In (triage.py).

    InputError: a number out of its range; both temperature and platt; another unit or pool.
    """

    min_recall: float = 0.95
    confidence: float = 0.95
    strict: bool = False
    jointly: bool = False
    temperature: bool = False
    bootstrap: int = 2000
    prevalence: float = 0.1
    platt: bool = False
    by: str = "image"
    pool: str = "max"
    min_specificity: float | None = None

    def __post_init__(self):
        if self.temperature and self.platt:
            raise InputError("temperature and platt exclude each other: Platt scaling holds the temperature")
        if self.by not in BY or self.pool not in POOLS:
            raise InputError(
                f"by is {' or '.join(BY)}, pool {' or '.join(POOLS)}, got {self.by}, {self.pool}"
            )
        if not 0 < self.min_recall <= 1:
            raise InputError(f"min_recall must lie in (0, 1], got {self.min_recall}")
        if self.min_specificity is not None and not 0 < self.min_specificity <= 1:
            raise InputError(f"min_specificity must lie in (0, 1], got {self.min_specificity}")
        for name in ("confidence", "prevalence"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} must lie in (0, 1), got {getattr(self, name)}")
        if not 1 <= self.bootstrap <= 1_000_000:
            raise InputError(f"bootstrap must lie in 1..1,000,000, got {self.bootstrap}")

    @property
    def promises(self):
        """How many guarantees a finding gets: of its recall and, with @In, of its specificity."""
        return 1 if self.min_specificity is None else 2


LEAST = 5  # images with and without a finding, of several, that figures of it need on each side (`least_of`)
LONG = 50_000_000  # draws times images from which on a bootstrap says how far it is


class Side(NamedTuple):
    """One finding on one side, by image or, by `Rule.by`, by study or patient (below, "images" are these).
    truth: int [N], 0 or 1; before, after: its probability without and with the fitted temperature or Platt
    scaling; p1: the one of them that thresholds apply to; patients [N]; known: bool, which of all images of
    the side these are, those whose truth is known."""

    truth: np.ndarray
    before: np.ndarray
    after: np.ndarray
    p1: np.ndarray
    patients: np.ndarray
    known: np.ndarray


def evaluate(scores, rule, task=None):
    """Choose thresholds on validation and report every figure on validation and test.

    `scores`: {val,test}_{labels [N] or [N, K], logits [N, K], patients [N]}, unless by image also files [N]
    and cohort_study [N]; not changed. `task`: NORMAL or PNEUMONIA unless given.
    Returns (the content of calibration.json, {"val": p1, "test": p1}), p1 being the probabilities of images
    that the thresholds apply to, by image or pooled: [N] for one finding, [N, F] for several.
    InputError: no positives or no negatives of the only finding on one side; arrays that do not match; where
    `rule.strict`, no guarantee; studies or patients that are not known."""
    task = task or Task()
    units = {side: _units(scores, side, rule) for side in SIDES}
    fitted = fit_temperature(scores["val_logits"], scores["val_labels"])
    calibration = {"min_recall": rule.min_recall, "bootstrap": rule.bootstrap}
    calibration |= {"by": rule.by, "pool": rule.pool}
    if rule.min_specificity is not None:
        calibration["min_specificity"] = rule.min_specificity
    calibration |= {"temperature": fitted, "temperature_applied": rule.temperature}
    if rule.platt:
        calibration["platt"] = _fit_platt(scores, task)
    columns, p1 = _columns(scores, calibration, task, units)
    calibration |= _evaluate_findings(columns, scores, rule, task, units)
    if len(columns) == 1:
        p1 = {side: values[:, 0] for side, values in p1.items()}
    return calibration, p1


def _units(scores, side, rule):
    """The Units of a side. By image no names are needed."""
    patients = np.asarray(scores[f"{side}_patients"])
    if rule.by == "image":
        return Units(rule.by, rule.pool, np.arange(len(patients)), patients)
    return units_of(scores, side, rule.by, rule.pool)


def _columns(scores, calibration, task, units):
    """({finding: {side: Side}}, {side: scores [N, F] of the images}); a Side is pooled by the Units of its
    side."""
    columns, p1 = {name: {} for name in task.findings}, {}
    for side, unit in units.items():
        logits = scores[f"{side}_logits"]
        truth = unit.truth(task.truth(scores[f"{side}_labels"]))
        p1[side] = task.scores_from(logits, calibration)
        images = (task.scores(logits), task.scaled_scores(logits, calibration), p1[side])
        before, after, deciding = map(unit.scores, images)
        for k, name in enumerate(task.findings):
            known = truth[:, k] >= 0
            values = (values[known, k] for values in (truth, before, after, deciding))
            columns[name][side] = Side(*values, unit.whose[known], known)
    return columns, p1


def least_of(task):
    """Images with and without a finding that figures of it need on each side. An only finding is what is
    asked: it gets figures of however few, and is an error without them (`evaluate`)."""
    return LEAST if len(task.findings) > 1 else 1


def _fit_platt(scores, task):
    """Platt scaling of every finding on validation: {finding: {"slope", "bias"}, or {"why_not": text} where
    it cannot be}. InputError where no finding can be scaled."""
    truth, odds = task.truth(scores["val_labels"]), task.log_odds(scores["val_logits"])
    found, least = {}, least_of(task)  # as for thresholds
    for k, name in enumerate(task.findings):
        y, z = truth[truth[:, k] >= 0, k], odds[truth[:, k] >= 0, k]
        if min((y == 1).sum(), (y == 0).sum()) < least:
            found[name] = {"why_not": f"fewer than {least} validation images with it, or without it"}
            continue
        try:
            found[name] = dict(zip(("slope", "bias"), fit_platt(z, y)))
        except InputError as error:
            found[name] = {"why_not": str(error)}
    if not any("slope" in line for line in found.values()):
        reasons = "; ".join(f"{name}: {line['why_not']}" for name, line in found.items())
        raise InputError(f"--temperature platt: {reasons[:400]}; --temperature scale asks for no bias")
    return found


# ---------------------------------------------------------------- one finding


def _evaluate_finding(sides, everyone, rule):
    """(What calibration.json says of one finding, {side: its bootstrap draws}), on the sides given;
    `everyone`: {side: patients [N] of all images}, who are drawn."""
    val = sides["val"]
    thresholds, chosen = _choose_thresholds(val.truth, val.p1, val.patients, rule)
    guarantee, found, draws = (
        chosen["guarantee"],
        {"threshold": chosen["threshold"], "gap": chosen["gap"]},
        {},
    )
    for side, s in sides.items():
        found[side], draws[side] = summarize(s, everyone[side], thresholds, rule)
        if guarantee["threshold"] is not None:
            guarantee[side] = {"at_guaranteed": found[side]["at_guaranteed"]}
    found |= chosen
    found["curves"] = {side: curves_of(found[side]["at_0.5"]) for side in sides}
    if rule.temperature or rule.platt:
        found["changed"] = _changed(sides, thresholds, rule)
    found["probability"] = {
        side: {
            "before": _probability_figures(s.truth, s.before),
            "after": _probability_figures(s.truth, s.after),
        }
        for side, s in sides.items()
    }
    if rule.min_specificity is not None:
        _add_triage(found, sides, rule)
    return found, draws


def _add_triage(found, sides, rule):
    """Add to what calibration.json says of a finding who gets which answer on the sides given (triage.py)."""
    rule_in, promised = found["rule_in"], found["rule_in"]["guarantee"]
    pairs = [(found, (found["threshold"], rule_in["threshold"]))]
    if None not in (found["guarantee"]["threshold"], promised["threshold"]):
        pairs.append((promised, (found["guarantee"]["threshold"], promised["threshold"])))
    for place, pair in pairs:
        place["triage"] = {}
        for side, s in sides.items():
            place["triage"][side] = shares(s.truth, s.p1, s.patients, pair, rule.bootstrap)


def _changed(sides, thresholds, rule):
    """How many decisions of each side are others than without the scaling, where thresholds are chosen in the
    same way: {side: {name of the threshold: count}}. Those chosen on validation move along with the scores;
    0.5 does not."""
    val = sides["val"]
    plain = _choose_thresholds(val.truth, val.before, val.patients, rule)[0]
    changed = {}
    for side, s in sides.items():
        changed[side] = {}
        for name, threshold in thresholds.items():
            before = s.before >= plain.get(name, np.inf)  # without @In nobody is positive there
            changed[side][name] = int((before != (s.p1 >= threshold)).sum())
    return changed


def _probability_figures(y, p):
    """Quality of p as a probability: calibration error with its bins, Brier score and log-likelihood."""
    ece, bins = calibration_error(y, p)
    return {"ece": ece, "brier": brier(y, p), "nll": nll(y, p), "bins": bins}


def _choose_thresholds(y, p, patients, rule):
    """The operating points, chosen on validation -> ({name: threshold}, {"threshold", "gap": of @Rec;
    "guarantee": what is guaranteed; "rule_in": see triage.py, if it is asked for}).

    Each lies between two validation scores, `gap` logits from the nearest (metrics.lowered_to_midpoint)."""
    chosen, _, _ = choose_threshold_by_min_recall(y, p, rule.min_recall)
    threshold, gap = lowered_to_midpoint(chosen, p)
    guarantee = {
        "confidence": rule.confidence,
        "threshold": None,
        "positive_patients": len(np.unique(patients[y == 1])),
    }
    found = {"threshold": threshold, "gap": gap, "guarantee": guarantee}
    thresholds = {"at_0.5": 0.5, "at_rec": threshold}
    try:
        granted, _, _ = choose_threshold_with_guarantee(y, p, rule.min_recall, rule.confidence, patients)
        # Lowering a threshold, down to @Rec too, can only raise recall, so the promise holds.
        thresholds["at_guaranteed"], guarantee["gap"] = lowered_to_midpoint(min(granted, chosen), p)
        guarantee["threshold"] = thresholds["at_guaranteed"]
    except InputError as error:
        if rule.strict:
            raise
        guarantee["why_not"] = str(error)
    if rule.min_specificity is not None:
        found["rule_in"] = choose_rule_in(y, p, patients, rule)
        thresholds |= rule_in_points(found["rule_in"])
    return thresholds, found


def summarize(side, everyone, thresholds, rule):
    """({name: figures, intervals and predictive values at that threshold} of a Side, its draws)."""
    y, p, values = side.truth, side.p1, list(thresholds.values())
    title = "bootstrap of one side" if rule.bootstrap * len(everyone) > LONG else None
    weights = progress(bootstrap_weights(everyone, rule.bootstrap), rule.bootstrap, title, "draws", size=len)
    draws = bootstrap_summary(y, p, values, (block[:, side.known] for block in weights))
    intervals, rows = intervals_of_draws(y, p, values, draws, side.patients), {}
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
    return rows, draws[0]


# ---------------------------------------------------------------- all findings


def _too_few(side, name, least, plural="images"):
    """Why a finding has no figures on a Side called `name`, of so many `plural`, as text; None if it has."""
    for count, word in ((int(side.truth.sum()), "with"), (int((side.truth == 0).sum()), "without")):
        if count < least:
            return f"{count} {SIDES[name]} {plural} {word} it, fewer than {least}"
    if (people := count_of(side.patients)) < least:  # most draws of the bootstrap could lack a class
        return f"{SIDES[name]} {plural} of {people} patients, fewer than {least}"
    return None


def shared_out(rule, findings):
    """The Rule of each of so many findings. With `rule.jointly` their guarantees are to hold all at once: by
    the union bound each is given the confidence 1 - (1 - confidence) / promises, `rule.promises` a
    finding."""
    if not rule.jointly:
        return rule
    return replace(rule, confidence=1 - (1 - rule.confidence) / (rule.promises * findings))


def joint_promises(rule, findings):
    """What a calibration says of the promises of so many findings that are to hold all at once; None where
    each is for itself."""
    if not rule.jointly:
        return None
    joint = {"confidence": rule.confidence, "findings": findings}
    if rule.promises > 1:
        joint["promises"] = rule.promises * findings
    return joint


def _evaluate_findings(columns, scores, rule, task, units):
    """What calibration.json says of each finding by name, and figures over all of them.

    Whether a finding gets a threshold, and how many share the confidence where `rule.jointly`, is decided by
    the validation images alone. One that is too rare on test has no figures there, and "test_why_not"."""
    least, plural = least_of(task), PLURAL[rule.by]
    if len(columns) == 1:
        # One promise has nothing to share; those of recall and specificity do.
        rule = replace(rule, jointly=rule.jointly and rule.promises > 1)
        (only,) = columns.values()
        for side, word in SIDES.items():
            check_both_classes(only[side].truth, f"{word} labels")
    why_not = {name: _too_few(sides["val"], "val", least, plural) for name, sides in columns.items()}
    usable = [name for name, reason in why_not.items() if reason is None]
    if not usable:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in why_not.items())
        raise InputError(f"no finding has enough {plural}: {reasons[:300]}")
    each = shared_out(rule, len(usable))
    everyone = {side: unit.whose for side, unit in units.items()}
    findings, draws = {}, {}
    for name, sides in progress(columns.items(), len(columns), "figures and intervals", "findings"):
        there = {side: s for side, s in sides.items() if _too_few(s, side, least) is None}
        if why_not[name]:
            findings[name], draws[name] = {"why_not": why_not[name], "curves": {}}, {}
            for side, s in there.items():  # enough for AUROC, if not for a threshold
                rows, draws[name][side] = summarize(s, everyone[side], {"at_0.5": 0.5}, rule)
                findings[name]["curves"][side] = curves_of(rows["at_0.5"])
            continue
        try:
            findings[name], draws[name] = _evaluate_finding(there, everyone, each)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        if "test" not in there:
            findings[name]["test_why_not"] = _too_few(sides["test"], "test", least, plural)
    summary = {side: _means(findings, draws, side, task) for side in SIDES}
    if task.one_of_many:
        for side, unit in units.items():
            logits, labels = scores[f"{side}_logits"], np.asarray(scores[f"{side}_labels"])
            summary[side] |= _most_probable(logits, labels, unit, task, rule)
    return {"findings": findings, "summary": summary, "jointly": joint_promises(rule, len(usable))}


def _most_probable(logits, labels, unit, task, rule):
    """`class_figures` of the most probable of three classes or more (of two, that is the decision at 0.5).

    The probabilities of a study's or patient's images are pooled class by class. One whose images are of
    several classes has no class: it is left out, and counted under "several_classes"."""
    truth = unit.classes(labels)
    likely = logits if unit.by == "image" else unit.scores(softmax(logits.astype(np.float64), axis=1))
    known, decided = truth >= 0, likely.argmax(axis=1)
    found = class_figures(truth[known], decided[known], task.classes, unit.whose[known], rule)
    return found | {"several_classes": int((~known).sum())}


def _means(findings, draws, side, task):
    """{"findings": names; "auroc", "auprc": {value, lo, hi}}: means over findings on one side; the draws of
    all are of the same patients. In a draw without a positive of some finding the mean is over the others.
    Where every draw is the same, the limits are the means of the findings' own."""
    names = [name for name in task.findings[task.averaged] if side in draws[name]]
    found = {"findings": names}
    for key in ("auroc", "auprc") if names else ():
        each = [findings[name]["curves"][side][key] for name in names]
        value, *own = (float(np.mean([figure[k] for figure in each])) for k in ("value", "lo", "hi"))
        drawn = mean_of_defined([draws[name][side][key] for name in names])
        found[key] = span_of_draws(value, drawn, own)
    return found
