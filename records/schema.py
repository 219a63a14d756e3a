"""What the files of a run folder must hold, and where one does not; calibrations of older versions in the
present form. No torch, no files."""

from common.cli import Number
from common.files import CALIBRATION as CALIBRATION_FORMAT
from common.proportions import curves_of
from common.scaling import TEST_VIEWS
from common.task import ANSWERS

REAL = Number(float, -1e300, 1e300)
POSITIVE = Number(float, 0, 1e300, above=True)
SHARE = Number(float, 0, 1)
NATURAL = Number(int, 0, 2**53)

GONE = {"data": {"normalise": "none"}, "recipe": {"teacher_features": 0.0}}  # values that changed nothing
# What versions did that did not yet record it.
ADDED = {"recipe": {"optimiser": "adamw", "masked_epochs": 0, "test_views": 1}}

# What a file must hold at least: a type, a Number, [what every item is], {key: what its value is}.
RESULTS = {
    "model": str,
    "model_config": {"kind": str},
    "params": NATURAL,
    "minutes": Number(float, 0, 1e9),
    "synthetic": bool,
    "split": {
        "train": NATURAL,
        "val": NATURAL,
        "test": NATURAL,
        "counts": {"train": dict, "val": dict, "test": dict},
        "fingerprint": str,
        "set": str,
    },
    "data": dict,
    "recipe": {"amp": bool},
    "history": [{"train_loss": REAL, "val_loss": REAL}],
    "best_epoch": NATURAL,
    "mean": [REAL],
    "std": [POSITIVE],
    "finished": bool,
}
NEARLY_SHARE = Number(float, -1e-6, 1 + 1e-6)  # a sum of shares may exceed 1 by rounding
FIGURES = {k: NEARLY_SHARE for k in ("acc", "precision", "recall", "specificity", "f1", "auroc", "auprc")}
POINT = {
    **FIGURES,
    **{k: NATURAL for k in ("tp", "fp", "tn", "fn")},
    "thr": SHARE,
    "interval": {k: {"bootstrap": [REAL]} for k in FIGURES},
    "at_prevalence": {"prevalence": SHARE},
}
QUALITY = {
    "ece": REAL,
    "brier": REAL,
    "nll": REAL,
    "bins": [{"n": NATURAL, "score": REAL, "positives": REAL}],
}
PRECISIONS = ("fp32", "bf16")
CALIBRATION = {
    "temperature": POSITIVE,
    "temperature_applied": bool,
    "min_recall": SHARE,
    "bootstrap": NATURAL,
    "checkpoint": str,
}
UNITS = {"by": ("image", "study", "patient"), "pool": ("max", "mean")}  # whose scores, and of several images
FINDING = {  # under "findings", by name
    "threshold": SHARE,
    "val": {"at_0.5": POINT, "at_rec": POINT},
    "test": {"at_0.5": POINT, "at_rec": POINT},
    "guarantee": {"confidence": SHARE, "positive_patients": NATURAL},
    "probability": {s: {"before": QUALITY, "after": QUALITY} for s in ("val", "test")},
}
SPAN = {k: NEARLY_SHARE for k in ("value", "lo", "hi")}
SHARES = {"n": NATURAL, "patients": NATURAL}  # of a triage: who gets which answer
SHARES |= {word: {"count": NATURAL, **SPAN} for word in ANSWERS}
CLASS_FIGURES = {
    "confusion": [[NATURAL]],
    "accuracy": SPAN,
    "macro_f1": SPAN,
    "classes": dict,
}


def without_gone(results):
    """A results.json without the settings of older versions that changed nothing; those that did stay."""
    present = dict(results)
    for key, settings in GONE.items():
        present[key] = {k: v for k, v in results[key].items() if k not in settings or v != settings[k]}
    return present


def mismatches(value, spec, name=""):
    """Where `value` is not what `spec` asks for: a list of dotted names, at most one an entry."""
    if isinstance(spec, dict):
        if not isinstance(value, dict):
            return [name or "everything"]
        wrong = []
        for key, what in spec.items():
            dotted = f"{name}.{key}" if name else key
            if key in value:
                wrong += mismatches(value[key], what, dotted)
            else:
                wrong.append(dotted)
        return wrong
    return [] if _is_of(value, spec) else [name]


def _is_of(value, spec):
    """Whether `value` is what a `spec` that is no dict asks for."""
    if isinstance(spec, list):
        return isinstance(value, list) and not any(mismatches(item, spec[0]) for item in value)
    if isinstance(spec, Number):
        return spec.contains(value)
    if spec is str and "\0" in str(value):  # it may be a path, and no path holds a NUL byte
        return False
    return isinstance(value, spec)


# What batches/NAME.json of a run holds.
BATCH = {
    "images": NATURAL,
    "patients": NATURAL,
    "checkpoint": str,
    "verdict": str,
    "says": str,
    "called_in_validation": SHARE,
    "odd": (int, float, type(None)),
    "called": (int, float, type(None)),
    "p_joint": (int, float, type(None)),
}


# What sites/NAME.json of a run holds.
SITE = {"site": str, "checkpoint": str, "images": NATURAL, "findings": dict, "shipped": dict}
SITE |= {"min_recall": SHARE}
BASIS = {"temperature": POSITIVE, "precision": str}  # under "scores", which older versions leave out


def wrong_site(value, findings):
    """Names of what is missing or wrong in a sites/NAME.json of a run with these findings."""
    wrong = mismatches(value, SITE)
    if not wrong:
        wrong = [name for name in findings if name not in value["findings"]]
    if not wrong:
        wrong = [name for name, thresholds in value["findings"].items() if _wrong_site_finding(thresholds)]
    if "scores" in value:
        wrong += mismatches(value["scores"], BASIS, "scores")
    return wrong


def _wrong_site_finding(value):
    """Names of what is wrong in what a site says of one finding."""
    if mismatches(value, {"why_not": str}) == []:
        return []
    wrong = mismatches(value, {"threshold": SHARE})
    if not isinstance(value, dict):
        return wrong
    for point in ("mean", "guaranteed"):  # None: too few patients for it
        threshold = value.get(point, "absent")
        if threshold is not None and not SHARE.contains(threshold):
            wrong.append(point)
    if not wrong and "rule_in" in value:
        wrong += _wrong_triage(value, ("site",))
    return wrong


def wrong_results(results):
    """Names of what is missing or wrong in a results.json."""
    wrong = mismatches(results, RESULTS)
    if wrong:
        return wrong
    # One value a channel, grey or colour.
    wrong += [key for key in ("mean", "std") if len(results[key]) not in (1, 3)]
    if len(results["mean"]) != len(results["std"]):
        wrong.append("std")
    # An ensemble is not trained: it has no epochs. What others watched in each epoch is a share.
    kind, epochs = results["model_config"]["kind"], results["history"]
    if results["best_epoch"] > len(epochs):
        wrong.append("best_epoch")
    elif results["finished"] and kind != "ensemble" and not epochs:
        wrong.append("best_epoch")
    watched = "val_dice" if kind == "lungs" else "val_auroc"
    if kind not in ("mae", "ensemble") and any(not SHARE.contains(h.get(watched)) for h in epochs):
        wrong.append("history")
    if not _test_views(results["recipe"].get("test_views", 1)):
        wrong.append("recipe.test_views")
    views = results["model_config"].get("views", [])  # of an ensemble's members
    if not isinstance(views, list) or not all(map(_test_views, views)):
        wrong.append("model_config.views")
    counts = results["split"]["counts"]
    wrong += [f"split.counts.{side}" for side in counts if not _counts(counts[side])]
    for part, name in (("split", "original_size"), ("data", "input_range")):
        ranges = results[part].get(name, {})
        if not isinstance(ranges, dict) or not all(map(_range, ranges.values())):
            wrong.append(name)
    return wrong


def _test_views(value):
    """Whether a value is one of TEST_VIEWS."""
    return type(value) is int and value in TEST_VIEWS


def wrong_calibration(value, task):
    """Names of what is missing or wrong in a calibration.json of a Task."""
    wrong = [key for key, allowed in UNITS.items() if value.get(key, allowed[0]) not in allowed]
    views = value.get("tta")
    if views is not None and mismatches(views, {"flip": bool}) and mismatches(views, {"members": [int]}):
        wrong.append("tta")
    wrong += mismatches(value, CALIBRATION) + wrong_scaling(value, task)
    return wrong + wrong_findings(value, task)


def wrong_scaling(value, task):
    """Names of what is wrong in what a calibration says of Platt scaling and precision, where it does."""
    wrong = [] if value.get("precision", "fp32") in PRECISIONS else ["precision"]
    platt = value.get("platt")
    if platt is None:
        return wrong
    if not isinstance(platt, dict) or tuple(platt) != task.findings or value.get("temperature_applied"):
        return [*wrong, "platt"]
    # A finding that could not be scaled has a reason instead of a line.
    for name, line in platt.items():
        refused = mismatches(line, {"why_not": str}) == []
        if not refused and mismatches(line, {"slope": POSITIVE, "bias": REAL}):
            wrong.append(f"platt.{name}")
    return wrong


def wrong_finding(value, sides=("val", "test")):
    """Names of what is wrong in what a calibration says of a finding that has figures on `sides`."""
    spec = {k: v for k, v in FINDING.items() if k not in ("val", "test", "probability")}
    spec |= {side: FINDING[side] for side in sides}
    spec["probability"] = {side: FINDING["probability"][side] for side in sides}
    wrong = mismatches(value, spec)
    if wrong:
        return wrong
    for side in sides:
        wrong += [f"{side}.{point}" for point, row in value[side].items() if mismatches(row, POINT)]
    # Without a threshold @Guar there is a reason, and no figures of it.
    guarantee = value["guarantee"]
    if not wrong and "rule_in" in value:
        wrong += _wrong_triage(value, sides)
    if not wrong and not SHARE.contains(guarantee.get("threshold")):
        promised = any("at_guaranteed" in value[side] for side in sides)
        if promised or not isinstance(guarantee.get("why_not"), str):
            wrong.append("guarantee")
    return wrong


def _wrong_triage(value, sides):
    """Names of what is wrong in what a calibration or a site says of @In, at a finding that has it; `sides`
    that have figures of the triage."""
    spec = {"min_specificity": SHARE, "guarantee": {"confidence": SHARE, "negative_patients": NATURAL}}
    wrong = mismatches(value["rule_in"], spec, "rule_in")
    if wrong:
        return wrong
    for name, place in (("rule_in", value["rule_in"]), ("rule_in.guarantee", value["rule_in"]["guarantee"])):
        # Without a threshold there is a reason.
        if not SHARE.contains(place.get("threshold")) and not isinstance(place.get("why_not"), str):
            wrong.append(name)
    # The sides of @Rec to @In are known; those of @Guar to @InGuar are there where both are.
    wrong += mismatches(value, {"triage": dict.fromkeys(sides, dict)})
    if wrong:
        return wrong
    for triage in (value["triage"], value["rule_in"]["guarantee"].get("triage", {})):
        for side, groups in triage.items():
            wrong += mismatches(groups, dict.fromkeys(groups, SHARES), f"triage.{side}")
    return wrong


def wrong_findings(value, task):
    """Names of what is wrong in what a calibration says of each finding, and of all together."""
    figures = {"findings": [str]}
    if task.one_of_many:
        figures |= CLASS_FIGURES
    if wrong := mismatches(value, {"findings": dict}):
        return wrong
    if tuple(value["findings"]) != task.findings:
        return ["the names of the findings"]
    for name, of_finding in value["findings"].items():
        wrong += [f"{name}.{key}" for key in _wrong_in_finding(of_finding, task.alone)]
    wrong += mismatches(value, {"summary": {"val": figures, "test": figures}})
    if wrong:
        return wrong
    for side, summary in value["summary"].items():
        # Means need findings to average: where a side has none with figures, they are absent.
        spans = [key for key in ("auroc", "auprc") if summary["findings"] or key in summary]
        wrong += mismatches(summary, dict.fromkeys(spans, SPAN), f"summary.{side}")
        if not set(summary["findings"]) <= set(task.findings):
            wrong.append(f"summary.{side}.findings")
    return wrong


def _wrong_in_finding(of_finding, alone):
    """Names of what is wrong in what is said of a finding. One of several may have a reason instead of a
    threshold, or of figures on test; an `alone` one has both."""
    if not isinstance(of_finding, dict):
        return ["everything"]
    # A reason why there are no figures replaces them.
    sides, wrong = ("val", "test"), []
    if not alone and isinstance(of_finding.get("test_why_not"), str):
        sides = ("val",)
    if not alone and isinstance(of_finding.get("why_not"), str):
        sides = ()
    else:
        wrong += wrong_finding(of_finding, sides)
    if not isinstance(of_finding.get("curves"), dict):
        return [*wrong, "curves"]
    curves = dict.fromkeys([*sides, *of_finding["curves"]], {"auroc": SPAN, "auprc": SPAN})
    return wrong + mismatches(of_finding["curves"], curves, "curves")


def _counts(value):
    return isinstance(value, dict) and all(NATURAL.contains(v) for v in value.values())


def _range(value):
    return isinstance(value, list) and len(value) == 2 and all(REAL.contains(v) for v in value)


# ---------------------------------------------------------------- older calibrations

# Format 3 of calibration.json has {finding: what is said of it} under "findings", however many there are, and
# figures over all of them under "summary". Formats 1 and 2 (2: with Platt scaling) had that for several
# findings alone; what they say of an only finding stands among the settings.
OF_ONE = (*FINDING, "gap", "changed")  # what an older calibration of one finding says of it


def in_present_form(calibration, task):
    """A calibration.json of any format that this version reads, in the present one; not changed itself.

    What is damaged stays so, for `wrong_calibration` to find."""
    present = {"jointly": None, **calibration, "format": CALIBRATION_FORMAT}
    if calibration["format"] == CALIBRATION_FORMAT or "findings" in calibration:
        return present
    of_finding = {name: present.pop(name) for name in OF_ONE if name in present}
    if not wrong_finding(of_finding):
        of_finding["curves"] = {side: curves_of(of_finding[side]["at_0.5"]) for side in ("val", "test")}
        averaged = {"findings": [task.findings[0]]}
        present["summary"] = {side: averaged | curves for side, curves in of_finding["curves"].items()}
    return present | {"findings": {task.findings[0]: of_finding}}
