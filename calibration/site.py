"""Thresholds of a trained run for another hospital, chosen on a few images labelled there.

A threshold promises nothing where patients differ from the validation patients. Local labels can promise
again: @Rec and @Guar are chosen on them as on validation. @Guar needs 59 patients with the finding for a
recall of 0.95 with confidence 0.95. No rule that assumes nothing can do with fewer. If the true recall of a
threshold is just below the floor r, all of n patients are found with a chance of nearly r^n; so they refute
it with confidence c only if r^n <= 1 - c.

Fewer can promise less: @Mean, the threshold of split conformal prediction (Vovk et al. 2005; Angelopoulos and
Bates 2023, arXiv:2107.07511, section 1), has a recall of at least the floor on average over samples like this
one. It needs 19 patients for 0.95.
"""

import math
from dataclasses import replace

import numpy as np

from calibration.operating_point import LEAST, Side, joint_promises, shared_out, summarize
from calibration.pooling import PLURAL, grouped, of_calibration, remark, unit_of
from calibration.scores import each_run
from calibration.triage import choose_rule_in, rule_in_points, shares
from calibration.wording import chance_text, concerns, four_digits, rule_in_concerns, site_rule_in_lines
from cohort.groups import console_lines
from cohort.who import Asked, check_columns, of_units
from common import scaling
from common.console import InputError, command_line, say
from common.proportions import reported_interval
from layouts.asked import moved_settings
from metrics import (
    can_guarantee,
    choose_threshold_by_min_recall,
    choose_threshold_with_guarantee,
    counts_at_threshold,
    lowered_to_midpoint,
    one_image_per_patient,
    positives_needed,
)
from models.inputs import Inputs
from training import other_hospitals, seen
from training.evaluate import predict

SHOWN = ("recall", "specificity")
POINTS = {"threshold": "@Rec", "mean": "@Mean", "guaranteed": "@Guar"}  # names in a site's JSON
ROWS = {"at_rec": "threshold", "at_mean": "mean", "at_guaranteed": "guaranteed"}  # of `held_out`: POINTS
MARKS = {row: POINTS[point] for row, point in ROWS.items()}
MARKS |= {"at_in": "@In", "at_in_guaranteed": "@InGuar", "at_shipped": "as shipped"}


def needed_on_average(floor):
    """Patients with the finding that @Mean needs: the least n with (1 - floor) (n + 1) >= 1."""
    return math.ceil(1 / (1 - floor) - 1 - 1e-9)


def instead(patients, floor, confidence):
    """What so few patients can promise, rounded down so that it is granted when asked for: {"floor": the
    recall at the same confidence, "confidence": that of the same recall}, either None where there is none
    above 0."""
    return {
        "floor": granted(
            (1 - confidence) ** (1 / patients), lambda x: can_guarantee(patients, x, confidence)
        ),
        "confidence": granted(1 - floor**patients, lambda x: can_guarantee(patients, floor, x)),
    }


def granted(value, test):
    """The greatest number of three decimals, at most `value`, that passes `test`; with more decimals where
    that would be 0. None if there is none."""
    for digits in range(3, 10):
        steps = math.floor(value * 10**digits)
        for count in (steps, steps - 1):  # one lower, should rounding have lifted the first over the limit
            rounded = round(count / 10**digits, digits)
            if 0 < rounded < 1 and test(rounded):
                return rounded
    return None


def conformal_threshold(scores, patients, floor):
    """The threshold @Mean, of the scores of images with the finding; None if there are too few patients.

    With one image each of n patients it is the k-th smallest score, k = floor((1 - r) (n + 1)): a new
    patient's score is below it with a chance of at most k / (n + 1) <= 1 - r. Of each patient the same image
    is drawn as for @Guar."""
    drawn = one_image_per_patient(scores, patients)
    k = math.floor((1 - floor) * (len(drawn) + 1) + 1e-9)
    return float(drawn[k - 1]) if k else None


def has_enough(y):
    """Whether a finding gets a threshold: truth [N] of 0, 1 and -1 for unknown."""
    return bool(min((y == 1).sum(), (y == 0).sum()) >= LEAST)


def choose(y, p, patients, rule):
    """Local thresholds for one finding -> JSON: truth int [N], 0 or 1; scores [N]; patients [N]; an
    operating.Rule.

    {"positives", "negatives": images; "positive_patients", "negative_patients"; "needed": of the former for
    @Guar; "threshold": @Rec; "mean", "guaranteed": thresholds or None; "gaps": {name: how far each of these
    lies from the nearest score, in logits}; "specificities": {name: on these images}; "concerns": {name: what
    is bad about it on these images}; "instead": what so few can promise, where @Guar cannot be given; where
    the rule asks for @In, "rule_in" as in triage.py, and "triage": {"site": who gets which answer on these
    images}}, or {"why_not": text, ...} where there are too few images for any threshold.

    Each threshold lies between two scores of these images (metrics.lowered_to_midpoint)."""
    chosen = {
        "positives": int(y.sum()),
        "negatives": int((y == 0).sum()),
        "positive_patients": len(np.unique(patients[y == 1])),
        "negative_patients": len(np.unique(patients[y == 0])),
        "needed": positives_needed(rule.min_recall, rule.confidence) if rule.min_recall < 1 else None,
    }
    if not has_enough(y):
        counts = f"{chosen['positives']} images with it and {chosen['negatives']} without"
        return chosen | {"why_not": f"{counts}; {LEAST} of each are needed"}
    thr, recall, _ = choose_threshold_by_min_recall(y, p, rule.min_recall)
    chosen |= {"threshold": thr, "recall": recall, "mean": None, "guaranteed": None}
    # A floor of 1 can be neither promised nor kept on average: the next patient may score lower than all.
    if rule.min_recall < 1:
        chosen["mean"] = conformal_threshold(p[y == 1], patients[y == 1], rule.min_recall)
        try:
            promised = choose_threshold_with_guarantee(y, p, rule.min_recall, rule.confidence, patients)
            chosen["guaranteed"] = min(promised[0], thr)  # lowering it only raises the recall
        except InputError:
            if rule.strict:
                raise
            chosen["instead"] = instead(chosen["positive_patients"], rule.min_recall, rule.confidence)
    # Rounding must change no decision on these images, so each threshold moves between two scores.
    chosen |= {"gaps": {}, "specificities": {}, "concerns": {}}
    for name in POINTS:
        if chosen[name] is None:
            continue
        chosen[name], chosen["gaps"][name] = lowered_to_midpoint(chosen[name], p)
        row = counts_at_threshold(y, p, chosen[name])
        chosen["specificities"][name] = row["tn"] / chosen["negatives"]
        # @Mean may miss more of these images than the floor allows: it promises an average.
        floor = rule.min_recall if name == "threshold" else 0
        chosen["concerns"][name] = concerns(row, floor)
    if rule.min_specificity is not None:
        add_rule_in(chosen, y, p, patients, rule)
    return chosen


def add_rule_in(chosen, y, p, patients, rule):
    """Add @In and who gets which answer to what `choose` gives."""
    rule_in = choose_rule_in(y, p, patients, rule)
    pair = chosen["threshold"], rule_in["threshold"]
    chosen |= {"rule_in": rule_in, "triage": {"site": shares(y, p, patients, pair, rule.bootstrap)}}


def halves(patients, y):
    """Two halves of the images, whole patients on one side, alike in their truth [N]: index arrays."""
    names = np.unique(patients)
    sick = np.array([y[patients == name].max() for name in names])
    rng, in_first = np.random.default_rng(0), np.zeros(len(names), bool)
    # The healthy and the sick are halved apart; of an odd number of the sick the first half gets one more.
    for k in (0, 1):
        members = rng.permutation(np.flatnonzero(sick == k))
        in_first[members[: (len(members) + k) // 2]] = True
    first = np.isin(patients, names[in_first])
    return np.flatnonzero(first), np.flatnonzero(~first)


def scored(run, subset, device, tta, batch_size):
    """(patients [N], (truth int8 [N, F], scores float64 [N, F], {finding: threshold or None}), cohort {name:
    array [N]} or None) of a Subset: what the own thresholds of a calibrated run apply to. By study or
    patient, N counts these."""
    calibration = run.calibration(scaling.calibration_name(tta, run))
    inputs = Inputs.of_calibration(run, calibration, device)
    if tta and tta != calibration["tta"]:
        say(f"note: {run} was calibrated with the views {calibration['tta']}, so these are taken, not {tta}")
    model = run.model().to(device)
    logits = predict(model, subset, inputs, batch_size=batch_size, progress=f"{run} site").numpy()
    shipped = {name: f.get("threshold") for name, f in calibration["findings"].items()}
    truth, scores = run.task.truth(subset.targets), run.task.scores_from(logits, calibration)
    studies = (subset.cohort or {}).get("study")
    by, pool = unit_of(calibration), calibration.get("pool", "max")
    units = grouped(subset.files, subset.patients, studies, by, pool)
    if by != "image":
        print(remark("site", units, truth, run.task.findings), flush=True)
    site_cohort = subset.cohort
    if site_cohort and by != "image":
        site_cohort = of_units(site_cohort, units.numbers)
    return units.whose, (units.truth(truth), units.scores(scores), shipped), site_cohort


def held_out(y, p, patients, shipped, rule):
    """How local thresholds would fare on new patients: they are chosen on one half of the patients and tried
    on the other, as is the `shipped` threshold -> JSON, figures with intervals as summarize gives them; None
    where a half has too few images."""
    here, there = halves(patients, y)
    chosen = choose(y[here], p[here], patients[here], replace(rule, strict=False))
    if "why_not" in chosen or not has_enough(y[there]):
        return None
    thresholds = {row: chosen[point] for row, point in ROWS.items() if chosen[point] is not None}
    if "rule_in" in chosen:
        thresholds |= rule_in_points(chosen["rule_in"])
    if shipped is not None:
        thresholds["at_shipped"] = shipped
    # Local thresholds apply to the scores as they are, so "before" and "after" scaling are the same here.
    side = Side(y[there], *[p[there]] * 3, patients[there], np.ones(len(there), bool))
    rows, _ = summarize(side, patients[there], thresholds, rule)
    return {"chosen_on": chosen["positive_patients"], "images": len(there), "points": rows}


def promise(run, name, patients, scored_images, rule, *, tta=None, report=False):
    """Choose the thresholds of `run` for a site called `name`, print them, and keep them in the run; with
    `report` what they are worth, too.

    `patients` [N], `scored_images`: what `scored` gives. InputError where no finding gets a threshold."""
    truth, scores, shipped = scored_images
    alone = len(shipped) == 1
    # Joint floors share the confidence among the findings that can have a threshold at all.
    usable = sum(has_enough(column) for column in truth.T)
    if alone and rule.promises == 1:
        rule = replace(rule, jointly=False)  # there is nothing to share
    each, joint = shared_out(rule, max(1, usable)), joint_promises(rule, usable)
    if joint and usable:
        print(joint_line(f"{run} at {name}", joint, each), flush=True)

    findings = {}
    for k, (finding, usual) in enumerate(shipped.items()):
        known = truth[:, k] >= 0
        y, p, whose = truth[known, k].astype(int), scores[known, k], patients[known]
        try:
            chosen = choose(y, p, whose, each)
        except InputError as error:
            raise InputError(f"{run} at {name}: {finding}: {error}") from None
        findings[finding] = chosen
        print("\n".join(lines(f"{run} at {name}", finding, chosen, each, alone)), flush=True)
        if report and "why_not" not in chosen:
            chosen["held_out"] = held_out(y, p, whose, usual, each)
            print("\n".join(held_out_lines(chosen["held_out"], each)), flush=True)
    if all("why_not" in chosen for chosen in findings.values()):
        raise InputError(f"{name}: too few labelled images for a threshold, see above: nothing was kept")
    for line in advice(findings, rule):
        print(line, flush=True)

    kept = dict(site=name, checkpoint=run.checkpoint_sha256, images=len(patients), shipped=shipped)
    kept |= dict(min_recall=rule.min_recall, confidence=rule.confidence, command=command_line())
    kept["jointly"] = joint
    if rule.min_specificity is not None:
        kept["min_specificity"] = rule.min_specificity
    calibration_name = scaling.calibration_name(tta, run)
    kept["scores"] = scaling.basis(run.calibration(calibration_name), run)
    run.save_site(name, {**kept, "findings": findings}, calibration_name)


def calibrate(args, rule, device, asked_views):
    """What calibrate.py does with --site: thresholds for another hospital, for every run. `asked_views`:
    {"flip": bool} of --tta, or None."""
    if rule.min_recall < 1:
        guaranteed, more_if_joint = positives_needed(rule.min_recall, rule.confidence), ""
        if rule.jointly:
            more_if_joint = " (with --jointly more, where there are several findings)"
        print(
            f"needed at {args.name}: {guaranteed} patients with a finding for @Guar{more_if_joint}, "
            f"{needed_on_average(rule.min_recall)} for @Mean; {LEAST} images with it and without it "
            "for @Rec; 97 patients without it tell the specificity to 0.10 either way"
        )
    # All that can fail for one run alone comes before its thresholds are chosen.
    # The tables that are named are the site's, the other flags say where the images of the run are now.
    moved = moved_settings(args, None, "skip_bad", "verify_cache", leave_out=("labels", "patients"))
    asked = Asked(args.age_bands, args.subgroups)

    def score_site(run):
        """The views of a Run, what `scored` gives of the site, and the Rule of its calibration."""
        tta = scaling.asked_views(asked_views, run)
        calibration = run.calibration(scaling.calibration_name(tta, run))
        unit_rule = of_calibration(rule, calibration, run, (args.by, args.pool))
        config = replace(run.config, **moved)
        site = other_hospitals.load_site(config, args.site, args.labels or "", args.patients or "")
        seen.refuse_seen(run, site, args.site, moved)
        check_columns(asked, site.cohort or {}, f"--site {args.site}")
        return tta, *scored(run, site, device, tta, args.batch_size), unit_rule

    for run, (tta, patients, scored_images, site_cohort, unit_rule) in each_run(
        args.runs_dir, args.run, score_site
    ):
        if args.report:
            images = (*scored_images[:2], patients, site_cohort)
            calibration = run.calibration(scaling.calibration_name(tta, run))
            print("\n".join(console_lines(f"{run} at {args.name}", images, calibration, asked)), flush=True)
        promise(run, args.name, patients, scored_images, unit_rule, tta=tta, report=args.report)


def held_out_lines(figures, rule):
    """What `held_out` gives by a Rule, as lines of text, with warnings where figures are bad."""
    if figures is None:
        return ["  too few images to hold out half of the patients"]
    out = [
        f"  chosen on half of the patients ({figures['chosen_on']} with it), on the {figures['images']} "
        "images of the other half:"
    ]
    for point, row in figures["points"].items():
        spans = ["{:.3f} [{:.3f}, {:.3f}]".format(row[k], *reported_interval(row, k)) for k in SHOWN]
        mark, bad = MARKS[point], concerns(row, rule.min_recall)
        if point in ("at_in", "at_in_guaranteed"):
            bad = rule_in_concerns(row, rule.min_specificity)
        out.append(f"    {mark:11}{four_digits(row['thr'])}  recall {spans[0]}, specificity {spans[1]}")
        out += [f"      warning: {text}" for text in bad]
    return out


def joint_line(name, joint, each):
    """What --jointly asks of every finding, as text; `each`: the Rule of one finding."""
    what = "recall and specificity of " if "promises" in joint else ""
    text = f"{name}: the floors of {what}{joint['findings']} findings hold at once with confidence "
    text += f"{joint['confidence']:g}: by the union bound each alone with {each.confidence:.6g}"
    if each.min_recall < 1:
        text += (
            f", which needs {positives_needed(each.min_recall, each.confidence)} patients with it for @Guar"
        )
    return text


def advice(findings, rule):
    """With several findings, the confidence at which all of them get @Guar, as lines of text; none where all
    have it, or @In is asked for, too."""
    decided = [chosen for chosen in findings.values() if "why_not" not in chosen]
    if len(findings) == 1 or not any("instead" in chosen for chosen in decided):
        return []
    if rule.min_specificity:  # @InGuar would have to be granted, too
        return []
    # The rarest finding limits all; joint floors share the confidence (shared_out).
    fewest, sharing = min(chosen["positive_patients"] for chosen in decided), 1
    if rule.jointly:
        sharing = rule.promises * len(decided)

    def all_get_it(confidence):
        return can_guarantee(fewest, rule.min_recall, 1 - (1 - confidence) / sharing)

    confidence = granted(1 - sharing * rule.min_recall**fewest, all_get_it)
    if confidence is None:
        return ["  no --guarantee gives all of these findings @Guar: too few patients with one of them"]
    together = "all floors at once" if rule.jointly else "each floor alone"
    return [
        f"  with --guarantee {confidence:g} all {len(decided)} findings that have a threshold get @Guar, "
        f"{together}"
    ]


def lines(name, finding, chosen, rule, alone=True):
    """What `choose` gives, as lines of text; `alone`: whether it is the only finding."""
    floor, confidence = rule.min_recall, rule.confidence
    counts = (
        f"{chosen['positives']} {PLURAL[rule.by]} of {chosen['positive_patients']} patients with {finding}, "
    )
    counts += f"{chosen['negatives']} of {chosen['negative_patients']} without"
    if "why_not" in chosen:
        return [f"{name}: {counts}: no threshold: {chosen['why_not']}"]
    chance = chance_text(chosen["positives"], chosen["positive_patients"], floor)
    promises = {
        "threshold": f"recall >= {floor:g} on these; for new patients below it with {chance}",
        "mean": f"recall >= {floor:g} on average over samples like this one",
        "guaranteed": f"true recall >= {floor:g} with confidence {confidence:.6g}, while patients stay like "
        "these",
    }
    # Each point with what it promises, or why it is not there.
    out = [f"{name}: {counts}"]
    for point, mark in POINTS.items():
        if chosen[point] is not None:
            gap = f"{chosen['gaps'][point]:.2g} logits from the nearest score"
            out.append(f"  {mark:5} {four_digits(chosen[point])}: {promises[point]} ({gap})")
            out += [f"    warning: on these images {text}" for text in chosen["concerns"][point]]
        elif point == "mean" and floor < 1:
            out.append(f"  no @Mean: needs {needed_on_average(floor)} patients with {finding}")
    if "instead" in chosen:
        out.append(instead_line(finding, chosen, rule, alone))
    return out + site_rule_in_lines(chosen, rule)


def instead_line(finding, chosen, rule, alone):
    """Why there is no @Guar, and what so few patients can promise, as text. Flags are named where they are
    sure to be granted: --guarantee asks for @Guar of all findings, so with several see `advice`."""
    floor, confidence, less = rule.min_recall, rule.confidence, chosen["instead"]
    lacking = chosen["needed"] - chosen["positive_patients"]
    text = f"  no @Guar: needs {chosen['needed']} patients with {finding}, {lacking} more."
    # Either the same confidence of a lower recall, or the same recall with less confidence.
    options = []
    if less["floor"] is not None:
        options.append(
            f"of {less['floor']:g} with confidence {confidence:.6g} (--min-recall {less['floor']:g})"
        )
    if less["confidence"] is not None:
        sure = alone and not rule.jointly and not rule.min_specificity  # nothing else must be granted too
        flag = f" (--guarantee {less['confidence']:g})" if sure else ""
        options.append(f"of {floor:g} with confidence {less['confidence']:g}{flag}")
    if not options:
        return text
    return f"{text} These can promise a recall {', or '.join(options)}"
