"""What lies between a model's logits and the scores of a calibration: the views that they are averaged over,
a temperature or Platt scaling, and the precision in which the logits were computed. What a calibration.json
says of it, in words and for comparison.

A temperature divides all logits: it cannot undo what a weighted loss adds to them, the logarithm of the
weight. Platt scaling gives the log odds of each finding against the rest a slope and a bias, so it can. Its
probabilities hold for people among whom the finding is as common as in validation. No torch, no files.
"""

import numpy as np

from common.console import InputError, say

PLATT, TEMPERATURE = "Platt scaling", "temperature"
POINTS = {"at_0.5": "@0.5", "at_rec": "@Rec", "at_guaranteed": "@Guar", "at_in": "@In"}
SIDES = {"val": "validation", "test": "test"}
SCALING = "scaling (--temperature)"
UNBALANCED = ("none", None)  # values of --balance that leave the prevalence of training as it is
NOTICED = 0.05  # a mean score this far from the share of positives is said
TEST_VIEWS = (1, 7)  # --test-views: of the image itself, or the mean of the views of --tta


# ---------------------------------------------------------------- what is applied


def applied(calibration):
    """The scaling of the scores that the thresholds of a calibration apply to: PLATT or TEMPERATURE; None
    where they are not scaled. No other function decides this."""
    if "platt" in calibration:
        return PLATT
    return TEMPERATURE if calibration["temperature_applied"] else None


def fitted(calibration):
    """The scaling that a calibration has fitted, applied or not: PLATT or TEMPERATURE."""
    return applied(calibration) or TEMPERATURE


def lines(calibration, findings):
    """((slope, bias) of every finding) of a calibration with Platt scaling, None of any other. A finding that
    could not be scaled keeps its log odds: (1, 0)."""
    platt = calibration.get("platt")
    if platt is None:
        return None
    return tuple((platt[n].get("slope", 1.0), platt[n].get("bias", 0.0)) for n in findings)


# ---------------------------------------------------------------- views


def own_views(results):
    """What the scores of a run are averaged over without being asked, of its results.json, in the form of a
    calibration's "tta": None, the image itself; {"flip": False}, the views of --tta; of an ensemble
    {"members": [1 or 7, ...]}, where each member has its own."""
    if members := results["model_config"].get("views"):
        return {"members": members}
    if results["recipe"].get("test_views", 1) == 1:
        return None
    return {"flip": False}


def asked_views(tta, run):
    """What --tta asks of a Run -> `tta` (whether it is given, or {"flip": bool}), but None where it asks for
    nothing more: a run with views of its own is always scored with these, as a note says. InputError where
    mirrored views are asked of such a run."""
    own = own_views(run.results)
    if not tta or own is None:
        return tta or None
    if tta == {"flip": True}:
        raise InputError(
            f"--tta-flip: the score of {run} is {views_in_words(own)} (--test-views), and there are no "
            "thresholds for another one: leave the flag out"
        )
    why = f"its score is {views_in_words(own)} (--test-views)"
    say(f"note: --tta changes nothing of {run}: {why}, with or without it")
    return None


def views_in_words(views):
    """What scores with these views, a calibration's "tta", are of an image."""
    if not views:
        return "that of the image itself"
    if "members" in views:
        return f"the mean of its members', each over its own views ({', '.join(map(str, views['members']))})"
    if views["flip"]:
        return "averaged over 14 shifted, zoomed and mirrored views"
    return "averaged over 7 shifted and zoomed views"


def check_views(calibration, path, run, name):
    """InputError if the thresholds of a Run's own calibration, at `path`, were chosen with other views than
    the run is scored with. `name`: as of `calibration_name`; "tta" is not checked, as its views are its own.
    """
    made, own = calibration.get("tta"), own_views(run.results)
    if not name and made != own:
        raise InputError(
            f"{path} was made with other views than {run} has (--test-views): its score was "
            f"{views_in_words(made)}, now it is {views_in_words(own)}: run calibrate.py again"
        )


def calibration_name(tta, run):
    """What a Run calls a calibration: "tta" if it has other views than the run's own, else "". `tta`: its
    views, or whether --tta asks for any (`asked_views`)."""
    return "tta" if tta and tta != own_views(run.results) else ""


def tta_flag(calibration, run):
    """The flag of calibrate.py that makes a calibration of a Run: " --tta", " --tta-flip" or ""."""
    if not calibration_name(calibration.get("tta"), run):
        return ""
    return " --tta-flip" if calibration["tta"].get("flip") else " --tta"


# ---------------------------------------------------------------- precision, and what differs


def precision_of(calibration, results):
    """("bf16" or "fp32", whether that is certain) of the logits that a calibration was made from. Older
    versions kept no precision: a run that was trained in fp32 was scored so, one trained in bf16 most
    likely."""
    if "precision" in calibration:
        return calibration["precision"], True
    return ("bf16", False) if results["recipe"]["amp"] else ("fp32", True)


def basis(calibration, run):
    """What decides the scores of a calibration, as JSON: thresholds chosen on others do not fit them."""
    temperature = calibration["temperature"] if applied(calibration) == TEMPERATURE else 1.0
    return {
        "temperature": temperature,
        "platt": lines(calibration, run.task.findings),
        "precision": precision_of(calibration, run.results)[0],
        "tta": calibration.get("tta"),
        "unit": [calibration.get("by", "image"), calibration.get("pool", "max")],
    }


def differences(old, new):
    """What differs between two of `basis`, as words; slopes, biases and temperatures that rounding alone
    tells apart are equal."""
    names = {"precision": "precision", "tta": "views"}
    differing = [word for key, word in names.items() if old.get(key) != new[key]]
    if old.get("unit", ["image", "max"]) != new["unit"]:
        differing.append("unit (--by, --pool)")
    try:
        alike = bool(old.get("platt")) == bool(new["platt"])
        alike = alike and np.allclose(old["temperature"], new["temperature"], rtol=1e-3)
        alike = alike and np.allclose(old.get("platt") or [], new["platt"] or [], rtol=1e-3, atol=1e-4)
    except (TypeError, ValueError):  # a damaged file, or other findings
        alike = False
    return differing if alike else [*differing, SCALING]


def check_site(site, path, calibration, run):
    """InputError if the thresholds of a site were chosen on other scores than the calibration of the run
    gives now. Older versions did not keep on which; where that may matter, a note says so."""
    # Older versions kept the thresholds of the run instead: these tell most changes.
    if "scores" in site:
        differ = differences(site["scores"], basis(calibration, run))
    else:
        differ = [SCALING] if applied(calibration) == PLATT else []
        now = {name: of_finding.get("threshold") for name, of_finding in calibration["findings"].items()}
        if not differ and site["shipped"] != now:
            say(
                f"note: {path} was made by an older version, for another calibration: if --temperature or "
                "the precision has changed since, run calibrate.py --site again"
            )
    if differ:
        raise InputError(
            f"{path} was made for scores of another {' and '.join(differ)} than those of {run} now: run "
            "calibrate.py --site again"
        )


# ---------------------------------------------------------------- in words


def averages(of_finding, after):
    """(mean score, share of positives) of one finding's validation images, of what a calibration says of it;
    `after`: of the scaled scores."""
    when = "after" if after else "before"
    bins = of_finding["probability"]["val"][when]["bins"]
    n = sum(b["n"] for b in bins)
    return tuple(sum(b["n"] * b[key] for b in bins) / max(n, 1) for key in ("score", "positives"))


def balances(results):
    """The values of --balance, other than none, that a run or the members of an ensemble were trained with,
    sorted."""
    given, members = [results["recipe"].get("balance")], results.get("members")
    if isinstance(members, list):
        given += [member.get("balance") for member in members if isinstance(member, dict)]
    return sorted({str(name) for name in given if name not in UNBALANCED})


def nature(calibration, run):
    """What the scores p_... of a calibrated run are, as text; "" where they are near the prevalence by
    themselves."""
    if applied(calibration) == PLATT:
        return _of_platt(calibration, run.task)
    # The finding that is farthest off speaks for all. Some finding has figures: evaluate sees to it.
    known = {}
    for name, of_finding in calibration["findings"].items():
        if "probability" in of_finding:
            known[name] = averages(of_finding, applied(calibration))
    name = max(known, key=lambda name: abs(known[name][0] - known[name][1]))
    mean, share = known[name]
    trained, cause = balances(run.results), ""
    if not trained and abs(mean - share) < NOTICED:
        return ""
    if trained:
        cause = f" (trained with --balance {', '.join(trained)})"
    return (
        f"scores, not probabilities at the images' prevalence{cause}: on validation that of {name} is "
        f"{mean:.2f} on average, where {100 * share:.1f}% have it"
    )


def remark(calibration, run):
    """`nature` as a note of predict.py, with what to do; "" where there is nothing to say."""
    text = nature(calibration, run)
    if text and applied(calibration) != PLATT:
        flag = tta_flag(calibration, run)
        text += f"; calibrate.py{flag} --temperature platt makes probabilities of them"
    return f"note: p_... are {text}" if text else ""


def _of_platt(calibration, task):
    """What the scores of Platt scaling are."""
    unscaled = [name for name, line in calibration["platt"].items() if "slope" not in line]
    text = "probabilities, by Platt scaling, for people among whom findings are as common as in validation"
    if task.alone:
        (name,) = task.findings
        text += f", where {100 * averages(calibration['findings'][name], True)[1]:.1f}% have {name}"
    if task.one_of_many:
        text += "; each is scaled by itself, so those of the classes do not add up to 1"
    if unscaled:
        text += f"; not scaled, so no probabilities: {', '.join(unscaled)}"
    return text


def cell(calibration, finding):
    """The fitted scaling of a finding, for a table."""
    line = calibration.get("platt", {}).get(finding)
    if line is None:
        used = "" if applied(calibration) else " (not applied)"
        return f"{calibration['temperature']:.3f}{used}"
    if "slope" not in line:
        return "not scaled"
    return f"slope {line['slope']:.3f}, bias {line['bias']:+.3f}"


def in_report(entries):
    """What the scores of entries.Entry are, and which decisions their scaling changes, as text."""
    text = "A temperature of two classes and Platt scaling change no ranking and no decision @Rec and @Guar"
    averaged = any(e.calibration.get("pool") == "mean" for e in entries)
    text += " by image; the mean score of a study or patient may change sides. " if averaged else ". "
    for e in entries:
        changed = _changes(e.calibration["findings"])
        if changed:
            text += f"{e.name}: decisions changed by {fitted(e.calibration)}, {changed}. "
        scores_are = nature(e.calibration, e.run)
        if scores_are:
            text += f"{e.name} gives {scores_are}. "
    return text.strip()


def told(calibration):
    """Lines for calibrate.py on the scaling that is applied."""
    findings = calibration["findings"]
    out, changed = [], _changes(findings)
    if applied(calibration) == PLATT:
        known = {name: of_finding for name, of_finding in findings.items() if "changed" in of_finding}
        out = _platt_lines(calibration["platt"], known)
    if changed:
        out.append(f"  decisions changed by {fitted(calibration)}, {changed}")
    return out


def _changes(findings):
    """How many decisions a scaling has changed, of all findings together, as text; "" where it has none."""
    known = [of_finding for of_finding in findings.values() if "changed" in of_finding]
    if not known:
        return ""
    sides = []
    for side in SIDES:
        # A finding without a threshold @Guar, or too rare on this side, has no count there.
        changed = [of_finding["changed"][side] for of_finding in known]
        counts = []
        for point, mark in POINTS.items():
            at_point = [by_point[point] for by_point in changed if point in by_point]
            if at_point:
                counts.append(f"{mark} {sum(at_point)}")
        decisions = sum(_decisions(of_finding, side) for of_finding in known)
        sides.append(f"of {decisions} on {SIDES[side]}: {', '.join(counts)}")
    return "; ".join(sides)


def _decisions(of_finding, side):
    """How many images of a side have a known truth for a finding."""
    return sum(of_finding[side]["at_0.5"][key] for key in ("tp", "fp", "tn", "fn"))


def _platt_lines(platt, known):
    """Slopes and biases, what they do to the calibration error, and what could not be scaled."""
    out = ["  Platt scaling, for probabilities where findings are as common as in validation:"]
    for name, line in platt.items():
        if "slope" in line:
            quality = _quality(known[name]) if name in known else ""
            out.append(f"    {name}: slope {line['slope']:.3f}, bias {line['bias']:+.3f}{quality}")
    for name, line in platt.items():
        if "slope" not in line:
            out.append(f"    {name}: not scaled, so no probability: {line['why_not']}")
    return out


def _quality(of_finding):
    """How common a finding is in validation, and its calibration errors before and after scaling."""
    text = f"; {100 * averages(of_finding, True)[1]:.1f}% of validation have it"
    for side in SIDES:
        before, after = (of_finding["probability"][side][when] for when in ("before", "after"))
        text += f"; {side} ECE {before['ece']:.3f} -> {after['ece']:.3f}"
        text += f", NLL {before['nll']:.3f} -> {after['nll']:.3f}"
    return text
