"""The tables of the report for tasks with several findings, as blocks for render.py. No torch, no drawing."""

import itertools

import numpy as np

from calibration.intervals import difference_of_means, mean_auroc_draws
from calibration.operating_point import LEAST
from calibration.wording import chance_text, several_warnings
from common import scaling
from report.evidence import batch_blocks, unique
from report.render import Heading, Paragraph, Table
from report.rows import families
from report.tables import (
    HEADER,
    floors,
    interval,
    leader,
    method_rows,
    missing_blocks,
    placed,
    size_and_time,
    split_blocks,
    warning_blocks,
    with_interval,
)

WHEN = ("before", "after")
MEANS = {"auroc": "Mean AUROC", "auprc": "Mean AUPRC", "accuracy": "Accuracy", "macro_f1": "Macro F1"}


def section(entries, shown):
    """The blocks of one test set: long tables of `shown`, where an ensemble stands for its members."""
    blocks = main_blocks(entries) + finding_blocks(shown) + promise_blocks(shown)
    if entries[0].task.kind == "softmax":
        blocks += class_blocks(shown)
    return (
        blocks
        + probability_blocks(shown)
        + pair_blocks(shown)
        + batch_blocks(entries)
        + method_blocks(entries)
    )


def span(figure):
    """{value, lo, hi} -> "0.951 [0.931, 0.968]"."""
    return f"{figure['value']:.3f} {interval(figure['lo'], figure['hi'])}"


def shown_means(entries):
    """The keys of MEANS that these entries have."""
    return [k for k in MEANS if all(k in e.summary["test"] for e in entries)]


# ---------------------------------------------------------------- all findings together


def main_blocks(entries):
    """One row a model: figures over all findings."""
    first, keys, rows = entries[0], shown_means(entries), []
    for e in entries:
        val = e.summary["val"].get("auroc")
        cells = [*size_and_time(e), f"{val['value']:.3f}" if val else "-"]
        rows.append([e.name, *cells, *(span(e.summary["test"][k]) for k in keys)])
    for family in families(entries):
        values = np.array([[e.summary["test"][k]["value"] for k in keys] for e in family])
        spread = [f"{m:.3f} ± {s:.3f}" for m, s in zip(values.mean(axis=0), values.std(axis=0, ddof=1))]
        val = [e.summary["val"]["auroc"]["value"] for e in family if "auroc" in e.summary["val"]]
        cells = [f"{family[0].results['params'] / 1e6:.2f}", f"{np.mean([e.minutes for e in family]):.1f}"]
        cells.append(f"{np.mean(val):.3f} ± {np.std(val, ddof=1):.3f}" if len(val) > 1 else "-")
        rows.append([f"{family[0].base}, mean ± sd of {len(family)} seeds", *cells, *spread])
    head = [*HEADER[:3], "Mean AUROC val", *(f"{MEANS[k]} test" for k in keys)]
    blocks = [Heading(2, ("SYNTHETIC data set, not patients: " if first.synthetic else "") + first.set)]
    blocks += [*split_blocks(entries), Paragraph(main_text(entries)), Table(head, rows)]
    return blocks + missing_blocks(entries)


def main_text(entries):
    """What the main table shows, as text."""
    first = entries[0]
    used, asked = first.summary["test"]["findings"], first.task.findings[first.task.averaged]
    text = f"Test: {len(first.columns['test'].files)} images. "
    if first.task.kind == "softmax":
        text += (
            f"{len(first.task.classes)} classes; the screening question is {first.task.findings[0]!r}, "
            f"1 - P({first.task.classes[0]}). Mean AUROC is that of each class against all others; accuracy "
            "and F1 are those of the most probable class. "
        )
    else:
        text += f"{len(asked)} findings, any number of them in an image. "
    left_out = [name for name in asked if name not in used]
    if left_out:
        text += (
            f"Means are over the {len(used)} findings with at least {LEAST} images with and without them, so "
            f"not over {', '.join(left_out)}. "
        )
    drawn = "whole patients" if first.columns["test"].patients_known else "images (patients unknown)"
    return text + f"Intervals: 95%, bootstrap of {drawn}."


# ---------------------------------------------------------------- finding by finding


def names(entries):
    """Names of the findings, in the order of the task."""
    return entries[0].task.findings


def positives(entry, side, k):
    """Images of a side with finding number k."""
    return int((entry.columns[side].truth[:, k] == 1).sum())


def finding_blocks(entries):
    """A row a finding and model."""
    rows, reasons, rare = [], [], []
    for (k, name), e in itertools.product(enumerate(names(entries)), entries):
        found = e.found[name]
        val, test = (found["curves"].get(side) for side in ("val", "test"))
        cells = [" + ".join(str(positives(e, side, k)) for side in ("val", "test"))]
        cells.append(f"{val['auroc']['value']:.3f}" if val else "-")
        cells += [span(test["auroc"]), span(test["auprc"])] if test else ["-", "-"]
        if "why_not" in found:
            cells += ["-"] * 4
            reasons.append(f"{name} ({found['why_not']})")
        else:
            cells += [f"{found['threshold']:.4f}", f"{found['val']['at_rec']['recall']:.3f}"]
            cells += test_cells(found, "at_rec")
            if "test_why_not" in found:
                rare.append(f"{name} ({found['test_why_not']})")
        rows.append([f"{name}: {e.name}", *cells])
    text = (
        f"@Rec is each finding's threshold of highest precision among those with a validation recall >= "
        f"{floors(entries)}, applied unchanged to test. A finding that is rare in validation has a threshold "
        "that rests on few images: its test recall may be far from the floor. AUPRC of a model that knows "
        "nothing is the share of positives."
    )
    text += new_patients(entries)
    if reasons:
        text += f" No threshold: {unique(reasons)}."
    if rare:
        text += f" No figures on test: {unique(rare)}."
    head = ["Finding: model", "Positives val + test", "AUROC val", "AUROC test", "AUPRC test", "Thr @Rec"]
    head += ["Recall val", "Recall test", "Specificity test"]
    blocks = [Heading(3, "Finding by finding"), Paragraph(text), Table(head, rows)]
    return blocks + warning_blocks([(e.name, several_warnings(e.found, e.min_recall)) for e in entries])


def test_cells(found, point):
    """Recall and specificity of a finding on test at a threshold, as text."""
    if "test" not in found:
        return ["-", "-"]
    return [with_interval(found["test"][point], key) for key in ("recall", "specificity")]


def new_patients(entries):
    """What @Rec promises for new patients, by the least and the most common finding, as text."""
    known = {}
    for e in entries:
        for name, found in e.found.items():
            if "why_not" not in found:
                row, sick = found["val"]["at_rec"], found["guarantee"]["positive_patients"]
                chance = chance_text(row["tp"] + row["fn"], sick, e.min_recall)
                known[sick] = f"{chance} by {sick} patients ({name})"
    if not known:
        return ""
    ends = dict.fromkeys([known[min(known)], known[max(known)]])
    return f" For new patients like those of validation it is below the floor with {', and '.join(ends)}."


def promise_blocks(entries):
    """The guaranteed thresholds, where there are any."""
    rows, refused = [], []
    for name, e in itertools.product(names(entries), entries):
        guarantee = e.found[name].get("guarantee")
        if guarantee and guarantee["threshold"] is not None:
            cells = [
                f"{guarantee['positive_patients']}",
                f"{guarantee['confidence']:.4g}",
                f"{guarantee['threshold']:.4f}",
            ]
            rows.append([f"{name}: {e.name}", *cells, *test_cells(e.found[name], "at_guaranteed")])
        elif guarantee:
            refused.append(name)
    if not rows:
        text = f"No finding has enough patients for a guaranteed recall of {floors(entries)} (@Guar)."
        return [Paragraph(text)]
    joint = [e.calibration["jointly"] for e in entries if e.calibration["jointly"]]
    text = (
        f"@Guar has a true recall >= {floors(entries)} with the confidence given, for new patients like the "
        "validation patients, by the Neyman-Pearson umbrella rule. "
    )
    if joint:
        text += (
            f"The floors of all {joint[0]['findings']} findings hold at once with confidence "
            f"{joint[0]['confidence']:g}, by the union bound. "
        )
    else:
        text += (
            "Each holds for its finding alone, not for all at once; calibrate.py --jointly asks for that. "
        )
    if refused:
        text += f"Too few patients for it: {unique(refused, ', ')}. "
    text += "No such promise survives a shift in the data."
    head = [
        "Finding: model",
        "Patients (images, where unknown) with it, val",
        "Confidence",
        "Thr @Guar",
        "Recall test",
        "Specificity test",
    ]
    return [Heading(3, "What the thresholds promise"), Paragraph(text), Table(head, rows)]


def class_blocks(entries):
    """Precision, recall and F1 of every class, and the confusion matrix, of the most probable class."""
    blocks = [Heading(3, "The most probable class")]
    text = (
        "Each image is given its most probable class; no threshold. Recall with a 95% interval, bootstrap of "
        "patients. The matrix counts images of the test set; rows: truth, columns: decision."
    )
    blocks.append(Paragraph(text))
    classes = entries[0].task.classes
    for e in entries:
        rows = []
        summary = e.summary["test"]
        for name, counts in zip(classes, summary["confusion"]):
            c = summary["classes"][name]
            recall = f"{c['recall']:.3f} {interval(*c['recall_interval'])}" if c["recall_interval"] else "-"
            rows.append(
                [name, str(c["n"]), f"{c['precision']:.3f}", recall, f"{c['f1']:.3f}", *map(str, counts)]
            )
        head = ["Class", "Images", "Precision", "Recall", "F1", *(f"→ {name}" for name in classes)]
        blocks += [Paragraph(f"{e.name}:"), Table(head, rows)]
    return blocks


def ece_cell(quality):
    """Calibration error before and after scaling; a dash where a side has too few images for it."""
    if quality is None:
        return "-"
    return "{:.3f} → {:.3f}".format(*(quality[when]["ece"] for when in WHEN))


def probability_blocks(entries):
    """Mean score against share of positives, calibration error, and the scaling, finding by finding."""
    rows = []
    for name, e in itertools.product(names(entries), entries):
        if "probability" not in e.found[name]:
            continue
        after, quality = scaling.applied(e.calibration), e.found[name]["probability"]
        mean, share = scaling.averages(e.found[name], after)
        errors = [ece_cell(quality.get(side)) for side in ("val", "test")]
        cells = [scaling.cell(e.calibration, name), f"{mean:.3f}", f"{share:.3f}", *errors]
        rows.append([f"{name}: {e.name}", *cells])
    text = (
        "One temperature for all findings, which minimises NLL on validation, or a slope and a bias for each "
        "(Platt scaling) where calibrate.py was asked for them. The mean score is that of validation, as "
        "thresholds apply to it; of probabilities at validation's prevalence it is the share of images with "
        "the finding. ECE, over 15 bins of equal size, is before → after scaling, applied or not. "
        f"{scaling.in_report(entries)}"
    )
    head = ["Finding: model", "Temperature", "Mean score val", "Share val", "ECE val", "ECE test"]
    return [Heading(3, "Are the probabilities right"), Paragraph(text), Table(head, rows)] if rows else []


# ---------------------------------------------------------------- pairs, method


def pair_blocks(entries):
    """Every two models on the same test images, by mean AUROC."""
    rows, kept, tied = [], {}, set()

    def mean_draws(entry, findings, draws):
        key = id(entry), tuple(findings), draws
        if key not in kept:
            columns, test = [names(entries).index(n) for n in findings], entry.columns["test"]
            arrays = test.truth[:, columns], test.scores[:, columns]
            kept[key] = mean_auroc_draws(*arrays, test.patients, draws)
        return kept[key]

    for (i, a), (j, b) in itertools.combinations(enumerate(entries), 2):
        both = [n for n in a.summary["test"]["findings"] if n in b.summary["test"]["findings"]]
        if not both:
            continue
        d = difference_of_means(*(mean_draws(e, both, a.calibration["bootstrap"]) for e in (a, b)))
        word = "no" if d["lo"] <= 0 <= d["hi"] else "yes"
        tied |= {(i, j)} if word == "no" else set()
        cell = "{difference:+.3f} [{lo:+.3f}, {hi:+.3f}]".format(**d)
        rows.append([f"{a.name} minus {b.name}", str(len(both)), cell, word])
    if not rows:
        return []
    drawn = "whole patients" if entries[0].columns["test"].patients_known else "images (patients unknown)"
    text = (
        "Difference of the mean AUROC on the same test images, 95% interval by a paired bootstrap of "
        f"{drawn}; not corrected for the number of pairs."
    )
    head = ["Pair", "Findings", "Mean AUROC", "Interval without 0"]
    blocks = [Heading(3, "Which model is better"), Paragraph(text), Table(head, rows)]
    asked = [e.summary["test"]["findings"] for e in entries]
    if all(names == asked[0] for names in asked):  # means of other findings cannot be ranked
        found = [e.summary["test"]["auroc"] for e in entries]
        values = [figure["value"] for figure in found]
        best = leader("mean AUROC", [e.name for e in entries], values, [span(f) for f in found], tied)
        blocks.insert(1, Paragraph(best))
    return blocks


def method_blocks(entries):
    """How this was evaluated."""
    first = entries[0]
    kinds = {"softmax": "the class folder of each image", "sigmoid": "the table of findings"}
    counted = []
    for side in ("val", "test"):
        known = first.columns[side].truth >= 0
        rates = (first.columns[side].truth == 1).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        counted.append(f"{side}: " + ", ".join(f"{n} {r:.1%}" for n, r in zip(first.task.findings, rates)))
    rule = (
        f"@Rec, a finding at a time: highest precision with validation recall >= {floors(entries)}, exact "
        "over all scores; @Guar: Neyman-Pearson umbrella on patients; both chosen on validation"
        f"{placed(entries)} and applied unchanged to test; unknown labels are left out"
    )
    rows = method_rows(entries, kinds[first.task.kind], "; ".join(counted), rule)
    return [Heading(3, "How this was evaluated"), Table(["Item", "Answer"], rows, prose=True)]
