"""What lies between a model's logits and the scores of a calibration: a temperature or Platt scaling, and the
precision in which the logits were computed. What a calibration.json says of it, in words and for comparison.

A temperature divides all logits: it cannot undo what a weighted loss adds to them, the logarithm of the
weight. Platt scaling gives the log odds of each finding against the rest a slope and a bias, so it can. Its
probabilities are those of people of whom as many have the finding as in validation. No torch, no files.
"""

import numpy as np

from common import InputError, say

PLATT, TEMPERATURE = "Platt scaling", "temperature"
POINTS = {"at_0.5": "@0.5", "at_rec": "@Rec", "at_guaranteed": "@Guar"}
SIDES = {"val": "validation", "test": "test"}
SCALING = "scaling (--temperature)"
UNBALANCED = ("none", None)  # values of --balance that leave the prevalence of training as it is
NOTICED = 0.05  # a mean score this far from the share of positives is said


# ---------------------------------------------------------------- what is applied


def applied(calibration):
    """Whether the thresholds of a calibration apply to scaled scores."""
    return bool(calibration["temperature_applied"] or "platt" in calibration)


def fitted(calibration):
    """The name of the scaling that a calibration has fitted, applied or not."""
    return PLATT if "platt" in calibration else TEMPERATURE


def lines(calibration, findings):
    """((slope, bias) of every finding) of a calibration with Platt scaling, None of any other. A finding that
    could not be scaled keeps its log odds: (1, 0)."""
    platt = calibration.get("platt")
    if platt is None:
        return None
    return tuple((platt[n].get("slope", 1.0), platt[n].get("bias", 0.0)) for n in findings)


def precision_of(calibration, results):
    """("bf16" or "fp32", whether that is certain) of the logits that a calibration was made from. Older
    versions kept no precision: a run that was trained in fp32 was scored so, one that was trained in bf16 most
    likely."""
    if "precision" in calibration:
        return calibration["precision"], True
    return ("bf16", False) if results["recipe"]["amp"] else ("fp32", True)


def basis(calibration, run):
    """What the scores of a calibration are, as JSON: thresholds that were chosen on others do not fit them."""
    temperature = calibration["temperature"] if calibration["temperature_applied"] else 1.0
    return {
        "temperature": temperature,
        "platt": lines(calibration, run.task.findings),
        "precision": precision_of(calibration, run.results)[0],
        "tta": calibration.get("tta"),
    }


def differences(old, new):
    """What differs between two of `basis`, as words; slopes, biases and temperatures that rounding alone tells
    apart are equal."""
    names = {"precision": "precision", "tta": "views"}
    found = [word for key, word in names.items() if old.get(key) != new[key]]
    try:
        alike = bool(old.get("platt")) == bool(new["platt"])
        alike = alike and np.allclose(old["temperature"], new["temperature"], rtol=1e-3)
        alike = alike and np.allclose(old.get("platt") or [], new["platt"] or [], rtol=1e-3, atol=1e-4)
    except (TypeError, ValueError):  # a damaged file, or other findings
        alike = False
    return found if alike else [*found, SCALING]


def check_site(site, path, calibration, run):
    """InputError if the thresholds of a site were chosen on other scores than the calibration of the run gives
    now. Older versions did not keep on which; where that may matter, a note says so."""
    if "scores" in site:
        differ = differences(site["scores"], basis(calibration, run))
    else:
        differ = [SCALING] if "platt" in calibration else []
        now = {name: found.get("threshold") for name, found in run.findings(calibration).items()}
        if not differ and site["shipped"] != now:
            say(
                f"note: {path} was made by an older version, for another calibration: if --temperature or the "
                "precision has changed since, run calibrate.py --site again"
            )
    if differ:
        raise InputError(
            f"{path} was made for scores of another {' and '.join(differ)} than those of {run} now: run "
            "calibrate.py --site again"
        )


# ---------------------------------------------------------------- in words


def averages(found, after):
    """(mean score, share of positives) of one finding's validation images, of what a calibration says of it;
    `after`: of the scaled scores."""
    bins = found["probability"]["val"]["after" if after else "before"]["bins"]
    n = sum(b["n"] for b in bins)
    return tuple(sum(b["n"] * b[key] for b in bins) / max(n, 1) for key in ("score", "positives"))


def balances(results):
    """The values of --balance, other than none, that a run or the members of an ensemble were trained with,
    sorted."""
    given = {results["recipe"].get("balance"), *(m.get("balance") for m in results.get("members", []))}
    return sorted(str(name) for name in given if name not in UNBALANCED)


def remark(calibration, run):
    """What the columns p_... of a calibrated run are, as one line; "" where they are near the prevalence by
    themselves."""
    findings = run.findings(calibration)
    if "platt" in calibration:
        return "note: " + _of_platt(calibration, run.task)
    known = {n: averages(f, applied(calibration)) for n, f in findings.items() if "probability" in f}
    name = max(known, key=lambda n: abs(known[n][0] - known[n][1]))
    mean, share = known[name]
    trained = balances(run.results)
    if not trained and abs(mean - share) < NOTICED:
        return ""
    cause = f" (trained with --balance {', '.join(trained)})" if trained else ""
    views = "".join([" --tta"] * bool(calibration.get("tta")))
    return (
        f"note: p_... are scores, not probabilities at the images' prevalence{cause}: on validation that of "
        f"{name} is {mean:.2f} on average, where {100 * share:.1f}% have it; calibrate.py{views} --temperature "
        "platt makes probabilities of them"
    )


def _of_platt(calibration, task):
    """What the scores of Platt scaling are."""
    names = [n for n, line in calibration["platt"].items() if "slope" in line]
    kept = [f"{n} ({line['why_not']})" for n, line in calibration["platt"].items() if "slope" not in line]
    text = "p_... are probabilities, by Platt scaling, for people among whom findings are as common as in "
    text += "validation"
    if len(task.findings) == 1:
        share = averages(calibration, True)[1]
        text += f", where {100 * share:.1f}% have {names[0]}"
    if task.kind == "softmax" and task.outputs > 2:
        text += "; each is scaled by itself, so those of the classes do not add up to 1"
    if kept:
        text += f"; not scaled, so no probabilities: {'; '.join(kept)}"
    return text


def told(calibration, findings):
    """Lines for calibrate.py on the scaling that is applied: {finding: what a calibration says of it}."""
    out, known = [], {n: f for n, f in findings.items() if "changed" in f}
    if "platt" in calibration:
        out += _platt_lines(calibration["platt"], known)
    counts = []
    for point, mark in POINTS.items():
        having = [f for f in known.values() if point in f["changed"]["val"]]
        if having:
            changes = [sum(f["changed"][side][point] for f in having) for side in SIDES]
            counts.append(f"{mark} {changes[0]} and {changes[1]}")
    if counts:
        sizes = [sum(_decisions(f, side) for f in known.values()) for side in SIDES]
        out.append(
            f"  decisions that {fitted(calibration)} changes, of {sizes[0]} on validation and {sizes[1]} on "
            f"test: {', '.join(counts)}"
        )
    return out


def _decisions(found, side):
    """How many images of a side have a known truth for a finding."""
    return sum(found[side]["at_0.5"][key] for key in ("tp", "fp", "tn", "fn"))


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


def _quality(found):
    """How common a finding is in validation, and its calibration errors before and after scaling."""
    text = f"; {100 * averages(found, True)[1]:.1f}% of validation have it"
    for side in SIDES:
        before, after = (found["probability"][side][when] for when in ("before", "after"))
        text += f"; {side} ECE {before['ece']:.3f} -> {after['ece']:.3f}"
        text += f", NLL {before['nll']:.3f} -> {after['nll']:.3f}"
    return text
