"""What is said of thresholds and their figures, on the console and in the report, and what calibrate.py
prints. No torch, no files.
"""

import itertools
import math

from calibration.pooling import plural_of, title_of
from common import scaling
from common.proportions import in_words, reported_interval
from common.scaling import POINTS, SIDES
from common.task import ANSWERS
from metrics import chance_below_floor, temperature_limit

FEW_HEALTHY = 0.05  # a specificity below it is worth nothing
EVERYBODY, NOBODY = "calls everybody sick", "calls nobody sick"
HEALTHY = "calls the healthy sick"
COLUMNS = ("recall", "specificity", "precision", "acc", "f1", "auroc")


def concerns(row, floor):
    """What is bad about a `row` with "tp", "fp", "tn", "fn", at a threshold whose recall floor is `floor`: a
    list of texts, empty if nothing."""
    if (said := calls(row)) == NOBODY:
        return [f"{NOBODY}: recall 0"]
    found, recall = [], row["tp"] / (row["tp"] + row["fn"])
    if recall < floor:
        found.append(f"recall {shown_below(recall, floor)} is below the floor of {floor:g}")
    if said:
        found.append(f"{said}: specificity {row['tn'] / (row['tn'] + row['fp']):.3g}")
    return found


def calls(row):
    """What a `row` with "tp", "fp", "tn", "fn" is worth nothing for: it "calls nobody sick" (no image), or,
    with a specificity below FEW_HEALTHY, "calls everybody sick" (and misses fewer than that share of the
    sick) or "calls the healthy sick" (and misses more); else ""."""
    if row["tp"] + row["fp"] == 0:
        return NOBODY
    if row["tn"] >= FEW_HEALTHY * (row["tn"] + row["fp"]):
        return ""
    return EVERYBODY if row["fn"] < FEW_HEALTHY * (row["tp"] + row["fn"]) else HEALTHY


def rule_in_concerns(row, floor):
    """The same of a `row` at @In or @InGuar, whose specificity floor is `floor`: few of the sick found is no
    concern, because the others are read."""
    if row["tp"] + row["fp"] == 0:
        return ["calls nobody positive"]
    specificity = row["tn"] / (row["tn"] + row["fp"])
    if specificity < floor:
        return [f"specificity {shown_below(specificity, floor)} is below the floor of {floor:g}"]
    return []


def chance_text(images, patients, floor):
    """How likely at most the recall at @Rec is below the floor for new people, as text: by so many patients
    with the finding, of whom there are so many images. With one image each it is the exact chance of scores
    that do not tie, where the threshold is the highest that meets the floor; a lower one, chosen for its
    precision, has a smaller chance. Images of one patient may be alike or not: what is said is the greater of
    the chances by patients and by images, which simulated ones exceed by 0.04 at most."""
    about = "up to" if images == patients else "at most about"
    chance = max(chance_below_floor(number, floor) for number in (patients, images))
    return f"a chance of {about} {chance:.2f}"


def shown_below(value, floor):
    """A value below a floor, with so many digits that it does not look equal to it."""
    digits = 3
    while float(f"{value:.{digits}f}") >= floor and digits < 15:
        digits += 1
    return f"{value:.{digits}f}"


def four_digits(threshold):
    """A threshold with four decimals; with three digits of it, or of what is missing to 1, where these would
    read as 0 or 1."""
    near = min(threshold, 1 - threshold)
    decimals = 2 - math.floor(math.log10(near)) if 0 < near < 0.001 else 4
    return f"{threshold:.3g}" if 0 < threshold < 0.001 else f"{threshold:.{decimals}f}"


def shared_text(calibration):
    """What is said of the thresholds of a calibration and belongs to every run on the same validation
    images."""
    floor, joint, guarantees = calibration["min_recall"], calibration["jointly"], {}
    for name, found in calibration["findings"].items():
        if "guarantee" in found:
            guarantees[name] = found["guarantee"]
    chances = new_patients(calibration["findings"], floor)
    lines = [
        "thresholds are chosen on validation:",
        f"  @Rec: recall >= {floor:g} there; for new patients like them below it with {chances}",
    ]
    granted = [g for g in guarantees.values() if g["threshold"] is not None]
    in_guar = [found.get("rule_in", {}).get("guarantee") for found in calibration["findings"].values()]
    in_guar = [g for g in in_guar if g and g["threshold"] is not None]
    if joint and (granted or in_guar):
        lines.append(joint_text(joint, len(granted), len(in_guar)))
    elif granted:
        alone = ", each finding alone" if len(calibration["findings"]) > 1 else ""
        lines.append(f"  @Guar: true recall >= {floor:g} with confidence {granted[0]['confidence']:g}{alone}")
    for name, guarantee in guarantees.items():
        if guarantee["threshold"] is None:
            lines.append(f"  no @Guar of {name}: {guarantee['why_not']}")
    return "\n".join(lines + rule_in_lines(calibration))


def joint_text(joint, granted, in_guar):
    """What "jointly" of a calibration says, as a line; granted, in_guar: how many findings have @Guar and
    @InGuar."""
    promises = joint.get("promises", joint["findings"])
    some = f"{granted} of " if granted < joint["findings"] else ""
    what = f"the floors of {some}{joint['findings']} findings"
    if in_guar:
        some = f"{granted + in_guar} of " if granted + in_guar < promises else ""
        what = f"@InGuar too: {some}the {promises} floors of recall and specificity"
    return (
        f"  @Guar: {what} hold at once with confidence {joint['confidence']:g}: by the union bound each "
        f"alone with {1 - (1 - joint['confidence']) / promises:.4f}"
    )


def rule_in_lines(calibration):
    """What @In and @InGuar promise, and where they are missing, as lines; none where they were not asked
    for."""
    rules_in = {n: f["rule_in"] for n, f in calibration["findings"].items() if "rule_in" in f}
    if not rules_in:
        return []
    floor = calibration["min_specificity"]
    lines = [
        f"  @In: specificity >= {floor:g} there, and the highest recall; below @Rec negative, from @In on "
        "positive, between them unsure"
    ]
    granted = [r["guarantee"] for r in rules_in.values() if r["guarantee"]["threshold"] is not None]
    if granted:
        lines.append(
            f"  @InGuar: true specificity >= {floor:g} with confidence {granted[0]['confidence']:.4g}"
            f"{both_at_once(calibration)}"
        )
    # A reason that several findings share is said once.
    reasons = {}
    for name, rule_in in rules_in.items():
        for point, place in (("@In", rule_in), ("@InGuar", rule_in["guarantee"])):
            if place["threshold"] is None:
                reasons.setdefault((point, place["why_not"]), []).append(name)
    for (point, why_not), names in reasons.items():
        lines.append(f"  no {point} of {', '.join(names)}: {why_not}")
    return lines


def both_at_once(calibration):
    """With which confidence a finding's guarantees of recall and of specificity hold both, as text; "" where
    no finding has both, or where --jointly has said it."""
    for of_finding in calibration["findings"].values():
        pair = of_finding.get("guarantee"), of_finding.get("rule_in", {}).get("guarantee")
        if None in pair or calibration["jointly"] or any(g["threshold"] is None for g in pair):
            continue
        confidence = sum(g["confidence"] for g in pair) - 1  # the union bound
        if confidence > 0:
            return f"; the floors of recall and specificity hold both with at least {confidence:.4g}"
        return "; at this confidence nothing follows for the floors of recall and specificity together"
    return ""


def new_patients(findings, floor):
    """How likely the recall @Rec is below the floor for new patients like those of validation, by the least
    and the most common of {finding: what a calibration says of it}, as text; "" where none has a
    threshold."""
    known = {}
    for name, found in findings.items():
        if "why_not" not in found:
            row, sick = found["val"]["at_rec"], found["guarantee"]["positive_patients"]
            known[sick] = f"{chance_text(row['tp'] + row['fn'], sick, floor)} by {sick} patients ({name})"
    if not known:
        return ""
    ends = dict.fromkeys([known[min(known)], known[max(known)]])
    return ", and ".join(ends)


def positives_text(found, plural="images"):
    """How many images, or other `plural`, of each side have a finding, as text."""
    counts = []
    for side, word in SIDES.items():
        if side in found:
            row = found[side]["at_rec"]
            counts.append(f"{row['tp'] + row['fn']} {word}")
    return f"{' + '.join(counts)} {plural} with it"


def guaranteed_too(found):
    """Whether what @Guar promises of a finding holds for @Rec, which does not lie above it."""
    guaranteed = found.get("guarantee", {}).get("threshold")
    return guaranteed is not None and guaranteed >= found["threshold"]


def threshold_text(found):
    """The thresholds of one finding, and how far each lies from the nearest validation score."""
    gap = f"({found['gap']:.2g} logits from the nearest validation score)"
    text = f"@Rec {four_digits(found['threshold'])} {gap}"
    others = [("@Guar", found["guarantee"])]
    if "rule_in" in found:
        others += [("@In", found["rule_in"]), ("@InGuar", found["rule_in"]["guarantee"])]
    for mark, chosen in others:
        if chosen["threshold"] is not None:
            text += f", {mark} {four_digits(chosen['threshold'])} ({chosen['gap']:.2g})"
    if guaranteed_too(found):
        text += "; @Rec is not above @Guar, so it is guaranteed too"
    return text


def triage_lines(found):
    """Who gets which answer of one finding of a calibration or a site, as lines; none without @In."""
    if "rule_in" not in found:
        return []
    lines, guarantee = [], found["rule_in"]["guarantee"]
    if nobody_is_unsure(found["threshold"], found["rule_in"]["threshold"]):
        lines.append("  nobody is unsure: @In is not above @Rec, which decides alone and keeps both floors")
    for mark, triage in (("@Rec to @In", found["triage"]), ("@Guar to @InGuar", guarantee.get("triage", {}))):
        for side, groups in triage.items():
            lines.append(f"  {SIDES.get(side, side):10} {mark}: {'; '.join(map(group_text, groups.items()))}")
    return lines


def site_rule_in_lines(chosen, rule):
    """What @In and @InGuar of site.choose promise, or why they are missing, and who gets which answer, as
    lines; none where they were not asked for."""
    if "rule_in" not in chosen:
        return []
    floor, rule_in, out = rule.min_specificity, chosen["rule_in"], []
    promises = {
        "@In": (rule_in, f"specificity >= {floor:g} on these, and the highest recall"),
        "@InGuar": (rule_in["guarantee"], f"true specificity >= {floor:g} with confidence "),
    }
    for mark, (place, promise_of) in promises.items():
        if place["threshold"] is None:
            out.append(f"  no {mark}: {place['why_not']}")
            continue
        if mark == "@InGuar":
            promise_of += f"{rule.confidence:.6g}, while patients stay like these"
        gap = f"{place['gap']:.2g} logits from the nearest score"
        out.append(f"  {mark:5} {four_digits(place['threshold'])}: {promise_of} ({gap})")
    return out + triage_lines(chosen)


def nobody_is_unsure(at_rec, at_in):
    """Whether @In is there, but not above @Rec."""
    return at_in is not None and at_in <= at_rec


def group_text(group):
    """(name, shares) of a group of triage.shares -> "sick 2.1% negative, 30.0% unsure, 67.9% positive"."""
    name, shares = group
    return f"{name} " + ", ".join(f"{100 * shares[word]['value']:.1f}% {word}" for word in ANSWERS)


def warnings(found, floor):
    """What is bad about the figures @Rec, @Guar, @In and @InGuar of one finding of a calibration, as a list
    of texts."""
    texts = []
    for side, word in SIDES.items():
        for point in ("at_rec", "at_guaranteed"):
            row = found.get(side, {}).get(point)
            if row:
                texts += [f"{word} {POINTS[point]}: {text}" for text in concerns(row, floor)]
        texts += [f"{word} {text}" for text in rule_in_warnings(found, side)]
    return texts


def rule_in_warnings(found, side):
    """What is bad about the specificity of "positive" on a side, as a list of texts; none without @In. Where
    nobody is unsure, it is that of @Rec."""
    if "rule_in" not in found:
        return []
    rule_in, texts = found["rule_in"], []
    deciding = "at_in"
    if nobody_is_unsure(found["threshold"], rule_in["threshold"]):
        deciding = "at_rec"
    for point, mark in ((deciding, POINTS[deciding]), ("at_in_guaranteed", "@InGuar")):
        row = found.get(side, {}).get(point)
        if row:
            texts += [f"{mark}: {text}" for text in rule_in_concerns(row, rule_in["min_specificity"])]
    return texts


# ---------------------------------------------------------------- what calibrate.py prints


def show(title, calibration):
    """Print a run's figures, finding by finding, validation beside test, then those over all findings."""
    findings = calibration["findings"]
    print(f"\n{title}{title_of(calibration)}:\n" + " " * 18 + "".join(f"{c:>12}" for c in COLUMNS), end="")
    print("   95% recall      95% specificity")
    for name, found in findings.items():
        show_finding(name, found, calibration)
    if len(findings) > 1:
        for side, word in SIDES.items():
            show_summary(word, calibration["summary"][side])
    if scaling.fitted(calibration) == scaling.TEMPERATURE:
        used = "applied" if scaling.applied(calibration) else "not applied; --temperature applies it"
        used = "; ".join(filter(None, [used, temperature_limit(calibration["temperature"])]))
        print(f"  temperature {calibration['temperature']:.3f} ({used})")
    for line in scaling.told(calibration):
        print(line)


def show_finding(name, found, calibration):
    """Print what a calibration says of one finding: thresholds, figures with intervals of recall and
    specificity, what is bad about them. Figures @0.5 and of the probability only where it is the only one;
    calibration.json has those of several."""
    alone = len(calibration["findings"]) == 1
    if "why_not" in found:
        curves = [
            f"{word} AUROC {found['curves'][s]['auroc']['value']:.3f}"
            for s, word in SIDES.items()
            if s in found["curves"]
        ]
        print("; ".join([f"{name}: no threshold: {found['why_not']}", *curves]))
        return
    sides = {side: word for side, word in SIDES.items() if side in found}
    print(f"{name}: {positives_text(found, plural_of(calibration))}; {threshold_text(found)}")
    for (side, word), (point, mark) in itertools.product(sides.items(), POINTS.items()):
        if point in found[side] and (alone or point != "at_0.5"):
            row = found[side][point]
            spans = ["{:.3f} to {:.3f}".format(*reported_interval(row, k)) for k in COLUMNS[:2]]
            figures = "".join(f"{row[c]:12.4f}" for c in COLUMNS)
            print(f"  {word:10} {mark:5}{figures}   {'  '.join(spans)}")
    if "test_why_not" in found:
        print(f"  no figures on test: {found['test_why_not']}")
    for line in triage_lines(found):
        print(line)
    for text in warnings(found, calibration["min_recall"]):
        print(f"  warning: {text}")
    if alone:
        show_probabilities(found, calibration)


def show_probabilities(found, calibration):
    """Print how good a finding's scores are as probabilities, and what they say of people."""
    quality, row = found["probability"], found["test"]["at_rec"]["at_prevalence"]
    changes = []
    for side, when in quality.items():
        before, after = when["before"], when["after"]
        changes.append(
            f"{side} ECE {before['ece']:.3f} -> {after['ece']:.3f}, "
            f"NLL {before['nll']:.3f} -> {after['nll']:.3f}"
        )
    if scaling.fitted(calibration) == scaling.TEMPERATURE:  # of Platt scaling scaling.told says it
        print(f"  by the temperature: {'; '.join(changes)}")
    if row["ppv"] is not None and row["npv"] is not None:
        print(
            f"  if {100 * row['prevalence']:.3g}% of the patients were sick, @Rec on test: PPV "
            f"{row['ppv']:.3f}, NPV {row['npv']:.3f}"
        )


def show_summary(word, summary):
    """Print the figures over all findings on one side."""
    parts = []
    for key, label in (("auroc", "mean AUROC"), ("accuracy", "accuracy"), ("macro_f1", "macro F1")):
        if key in summary:
            parts.append(f"{label} {in_words(summary[key])}")
    if out := summary.get("several_classes"):
        parts.append(f"accuracy and F1 without the {out} whose images are of several classes")
    print(f"  {word}: {', '.join(parts)} ({len(summary['findings'])} findings)")
