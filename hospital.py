"""Thresholds of a trained run for another hospital, chosen on a few of its own labelled images.

A threshold promises nothing where patients differ from those of validation. Local labels can promise again:
@Rec and @Guar are chosen on them as on validation. @Guar needs 59 patients with the finding for a recall of
0.95 with confidence 0.95. No rule that assumes nothing can do with fewer: if the true recall of a threshold
is just below the floor r, all of n patients are found with a chance of nearly r^n, so they refute it with
confidence c only if r^n <= 1 - c.

Fewer can promise less: @Mean, the threshold of split conformal prediction (Vovk et al. 2005; Angelopoulos and
Bates 2023, arXiv:2107.07511, section 1), has a recall of at least the floor on average over samples like this
one. It needs 19 patients for 0.95.
"""

import math
from dataclasses import replace

import numpy as np

import data
import frozen
import scaling
import sources
from common import InputError, command_line, say
from inputs import Inputs
from intervals import reported_interval
from metrics import choose_threshold_by_min_recall, choose_threshold_with_guarantee, one_image_per_patient
from operating import LEAST, Side, summarize
from run import find_runs

SHOWN = ("recall", "specificity")


def needed(floor, confidence):
    """Patients with the finding that @Guar needs, all of them found."""
    return math.ceil(math.log(1 - confidence) / math.log(floor) - 1e-9)


def needed_on_average(floor):
    """Patients with the finding that @Mean needs: the least n with (1 - floor) (n + 1) >= 1."""
    return math.ceil(1 / (1 - floor) - 1 - 1e-9)


def instead(patients, floor, confidence):
    """What so few patients can promise: {"floor": the recall at the same confidence, "confidence": that of
    the same recall}."""
    return {"floor": (1 - confidence) ** (1 / patients), "confidence": 1 - floor**patients}


def conformal_threshold(scores, patients, floor):
    """The threshold @Mean, of the scores of images with the finding; None if there are too few patients.

    With one image each of n patients it is the k-th smallest score, k = floor((1 - r) (n + 1)): a new
    patient's score is below it with a chance of at most k / (n + 1) <= 1 - r. One image a patient is drawn
    201 times, as for @Guar, and the median threshold taken."""
    draws = one_image_per_patient(scores, patients)  # (201, n), ascending
    k = math.floor((1 - floor) * (draws.shape[1] + 1) + 1e-9)
    return float(np.sort(draws[:, k - 1])[len(draws) // 2]) if k else None


def choose(y, p, patients, rule):
    """Local thresholds for one finding -> JSON: truth int [N], 0 or 1; scores [N]; patients [N]; an
    operating.Rule.

    {"positives", "negatives": images; "positive_patients", "negative_patients"; "needed": of the former for
    @Guar; "threshold": @Rec; "mean", "guaranteed": thresholds or None; "instead": what so few can promise,
    where @Guar cannot be given}, or {"why_not": text, ...} where there are too few images for any
    threshold."""
    found = {
        "positives": int(y.sum()),
        "negatives": int((y == 0).sum()),
        "positive_patients": len(np.unique(patients[y == 1])),
        "negative_patients": len(np.unique(patients[y == 0])),
        "needed": needed(rule.min_recall, rule.confidence) if rule.min_recall < 1 else None,
    }
    if min(found["positives"], found["negatives"]) < LEAST:
        counts = f"{found['positives']} images with it and {found['negatives']} without"
        return found | {"why_not": f"{counts}; {LEAST} of each are needed"}
    thr, recall, _ = choose_threshold_by_min_recall(y, p, rule.min_recall)
    found |= {"threshold": thr, "recall": recall, "mean": None, "guaranteed": None}
    if rule.min_recall == 1:
        return found
    found["mean"] = conformal_threshold(p[y == 1], patients[y == 1], rule.min_recall)
    try:
        how = (rule.min_recall, rule.confidence, patients)
        found["guaranteed"] = choose_threshold_with_guarantee(y, p, *how)[0]
    except InputError:
        if rule.strict:
            raise
        found["instead"] = instead(found["positive_patients"], rule.min_recall, rule.confidence)
    return found


def halves(patients, y, seed=0):
    """Two halves of the images, whole patients on one side, alike in their truth [N]: index arrays."""
    names, first = np.unique(patients, return_index=True)
    sick = np.array([y[patients == name].max() for name in names])
    rng, side = np.random.default_rng(seed), np.zeros(len(names), int)
    for k in (0, 1):
        members = rng.permutation(np.flatnonzero(sick == k))
        side[members[: (len(members) + k) // 2]] = 1
    chosen = np.isin(patients, names[side == 1])
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def scored(run, subset, device, tta, batch_size):
    """(truth int8 [N, F], scores float64 [N, F]) of a calibrated run on a Subset: what its own thresholds,
    also returned {finding: threshold or None}, apply to."""
    calibration = run.calibration("tta" if tta else "")
    inputs = Inputs.of_calibration(run, calibration, device)
    if tta and tta != calibration["tta"]:
        say(f"note: {run} was calibrated with the views {calibration['tta']}, so these are taken, not {tta}")
    model = run.model().to(device)
    logits = frozen.predict(model, subset, inputs, batch_size=batch_size, progress=f"{run} site").numpy()
    shipped = {name: f.get("threshold") for name, f in run.findings(calibration).items()}
    return run.task.truth(subset.targets), run.task.scores_from(logits, calibration), shipped


def held_out(y, p, patients, shipped, rule):
    """How local thresholds would fare on new patients: chosen on one half of the patients, figures of the
    other half, those of the `shipped` threshold beside them, with intervals (as operating.summarize gives
    them) -> JSON; None where a half has too few images."""
    here, there = halves(patients, y)
    found = choose(y[here], p[here], patients[here], replace(rule, strict=False))
    if "why_not" in found or min((y[there] == 1).sum(), (y[there] == 0).sum()) < LEAST:
        return None
    names = dict(at_rec="threshold", at_mean="mean", at_guaranteed="guaranteed")
    thresholds = {k: found[name] for k, name in names.items() if found[name] is not None}
    thresholds |= {"at_shipped": shipped} if shipped is not None else {}
    side = Side(y[there], *[p[there]] * 3, patients[there], np.ones(len(there), bool))
    rows, _ = summarize(side, patients[there], thresholds, rule)
    return {"chosen_on": found["positive_patients"], "images": len(there), "points": rows}


def promise(run, name, subset, rule, *, device, tta=None, batch_size=64, report=False):
    """Choose the thresholds of `run` for the Subset of a site called `name`, print them, and keep them in the
    run; with `report` what they are worth, too.

    InputError where no finding gets a threshold."""
    truth, scores, shipped = scored(run, subset, device, tta, batch_size)
    patients, findings = np.asarray(subset.patients), {}
    for k, (finding, usual) in enumerate(shipped.items()):
        known = truth[:, k] >= 0
        y, p, whose = truth[known, k].astype(int), scores[known, k], patients[known]
        findings[finding] = choose(y, p, whose, rule)
        print("\n".join(lines(f"{run} at {name}", finding, findings[finding], rule)), flush=True)
        if report and "why_not" not in findings[finding]:
            found = findings[finding]["held_out"] = held_out(y, p, whose, usual, rule)
            print("\n".join(held_out_lines(found)), flush=True)
    if all("why_not" in f for f in findings.values()):
        raise InputError(f"{name}: too few labelled images for a threshold, see above: nothing was kept")
    about = dict(site=name, checkpoint=run.checkpoint_sha256, images=len(subset), shipped=shipped)
    about |= dict(min_recall=rule.min_recall, confidence=rule.confidence, command=command_line())
    about["scores"] = scaling.basis(run.calibration("tta" if tta else ""), run)
    run.save_site(name, {**about, "findings": findings}, "tta" if tta else "")


def calibrate(args, rule, device, tta):
    """What calibrate.py does with --site: thresholds for another hospital, for every run."""
    if rule.min_recall < 1:
        guaranteed = needed(rule.min_recall, rule.confidence)
        print(
            f"needed at {args.name}: {guaranteed} patients with a finding for @Guar, "
            f"{needed_on_average(rule.min_recall)} for @Mean; {LEAST} images with it and without it "
            "for @Rec; 97 patients without it tell the specificity to 0.10 either way"
        )
    for run in find_runs(args.runs_dir, args.run):
        moved = {"cache_dir": args.cache_dir} if args.cache_dir else {}
        config = data.DataConfig.from_json({**run.results["data"], **moved})
        site = sources.load_site(config, args.site, args.labels or "", args.patients or "")
        refuse_seen(run, site, args.site, moved)
        if len(set(site.patients)) == len(site):
            say("note: every image counts as a patient of its own; --patients CSV says otherwise")
        how = dict(device=device, tta=tta, batch_size=args.batch_size, report=args.report)
        promise(run, args.name, site, rule, **how)


def refuse_seen(run, site, folder, moved):
    """InputError if the Subset `site` holds images that the run, or one it was made from, was trained or
    validated on. `moved`: settings of the data that are not as they were trained."""
    for name, other in [(str(run), run), *run.forebears()]:
        if other is None:
            say(f"note: {run} was made from {name}, which is not there any more: its images are not compared")
            continue
        config = data.DataConfig.from_json({**other.results["data"], **moved})
        train, val, _ = data.load_train_val(config, say)
        train = sources.join(config, train, val, say)[0]
        if twins := data.same_images(site, (train, val)):
            by = str(run) if other is run else f"{name}, from which {run} was made,"
            raise InputError(
                f"--site {folder}: {len(twins)} images, {', '.join(twins[:3])} and so on, are among those "
                f"that {by} was trained and validated on: they can promise nothing"
            )


def held_out_lines(found):
    """What `held_out` gives, as lines of text."""
    if found is None:
        return ["  too few images to hold out half of the patients"]
    out = [
        f"  chosen on half of the patients ({found['chosen_on']} with it), on the {found['images']} images "
        "of the other half:"
    ]
    for point, row in found["points"].items():
        spans = ["{:.3f} [{:.3f}, {:.3f}]".format(row[k], *reported_interval(row, k)) for k in SHOWN]
        word = {"at_rec": "@Rec", "at_mean": "@Mean", "at_guaranteed": "@Guar"}.get(point, "as shipped")
        out.append(f"    {word:11}{row['thr']:.4f}  recall {spans[0]}, specificity {spans[1]}")
    return out


def lines(name, finding, found, rule):
    """What `choose` found, as lines of text."""
    floor, confidence = rule.min_recall, rule.confidence
    counts = f"{found['positives']} images of {found['positive_patients']} patients with {finding}, "
    counts += f"{found['negatives']} of {found['negative_patients']} without"
    if "why_not" in found:
        return [f"{name}: {counts}: no threshold: {found['why_not']}"]
    out = [f"{name}: {counts}"]
    out.append(f"  @Rec  {found['threshold']:.4f}: recall >= {floor:g} on these; for new patients, a toss-up")
    if found["mean"] is not None:
        out.append(f"  @Mean {found['mean']:.4f}: recall >= {floor:g} on average over samples like this one")
    elif floor < 1:
        out.append(f"  no @Mean: needs {needed_on_average(floor)} patients with {finding}")
    if found["guaranteed"] is not None:
        promise = f"true recall >= {floor:g} with confidence {confidence:g}"
        out.append(f"  @Guar {found['guaranteed']:.4f}: {promise}, while patients stay like these")
    elif "instead" in found:
        more, less = found["needed"] - found["positive_patients"], found["instead"]
        out.append(
            f"  no @Guar: needs {found['needed']} patients with {finding}, {more} more. These can promise a "
            f"recall of {less['floor']:.3f} with confidence {confidence:g} (--min-recall), or of {floor:g} "
            f"with confidence {less['confidence']:.3f} (--guarantee)"
        )
    return out
