"""The main tables of the report, as blocks for render.py: figures, promises, intervals. No torch, no
drawing."""

import csv
import itertools

import numpy as np

from calibration.operating_point import LEAST
from calibration.wording import new_patients, warnings
from common.console import printable
from common.files import atomic_path
from common.proportions import no_width
from report.cells import (
    alone,
    drawn,
    first_head,
    floors,
    interval,
    points,
    questions,
    size_and_time,
    span,
    title,
    unique,
    with_interval,
)
from report.render import Code, Heading, Paragraph, Table
from report.rows import POINTS, families, missing_ensembles
from report.tables.cohort import cohort_blocks, group_blocks
from report.tables.evidence import batch_blocks, map_blocks
from report.tables.method import method_blocks, split_blocks
from report.tables.pairs import pair_blocks
from report.tables.probabilities import predictive_blocks, probability_blocks, subgroup_blocks

FIGURES = ("acc", "precision", "recall", "specificity", "f1", "auroc")
HEADER = ("Model", "Params (M)", "Time (min)", "Acc", "Prec", "Recall", "Spec", "F1", "AUROC", "Thr")
NAMED = {"Recall": "recall", "Specificity": "specificity", "Precision": "precision", "Accuracy": "acc"}
NAMED |= {"F1": "f1", "AUROC": "auroc", "AUPRC": "auprc"}
MEANS = {"auroc": "Mean AUROC", "auprc": "Mean AUPRC", "accuracy": "Accuracy", "macro_f1": "Macro F1"}


def section(entries, shown, asked):
    """The blocks of one test set: long tables of `shown`, where an ensemble stands for its members; `asked`:
    the groups of patients (who.Asked)."""
    detailed = entries if alone(entries) else shown
    blocks = main_blocks(entries, detailed) + promise_blocks(detailed)
    blocks += interval_blocks(shown) + class_blocks(shown) + pair_blocks(shown)
    blocks += probability_blocks(shown) + predictive_blocks(shown) + subgroup_blocks(shown)
    blocks += group_blocks(shown, asked)
    return blocks + batch_blocks(entries) + map_blocks(entries) + method_blocks(entries)


# ---------------------------------------------------------------- figures


def main_rows(entries):
    """Rows of the main table, lists of str in the order of HEADER: first @Rec, then @0.5 of an only
    finding."""
    rows = []
    for point, finding in itertools.product(points(entries), entries[0].findings):
        if point in ("at_guaranteed", "at_in"):  # in the tables of promises and of the triage
            continue
        with_row = [e for e in entries if e.row(finding, "test", point)]
        for e in with_row:
            row = e.row(finding, "test", point)
            figures = [f"{row[k]:.3f}" for k in FIGURES] + [f"{row['thr']:.4f}"]
            rows.append([f"{title(e, finding)} {POINTS[point]}", *size_and_time(e), *figures])
        for family in families(with_row):
            values = [[e.row(finding, "test", point)[k] for k in (*FIGURES, "thr")] for e in family]
            name = f"{title(family[0], finding).removesuffix(family[0].name)}{of_seeds(family)}"
            rows.append([f"{name} {POINTS[point]}", *mean_size_and_time(family), *spread(values)])
    return rows


def of_seeds(family):
    """What the row of a family is called."""
    return f"{family[0].base}, mean ± sd of {len(family)} seeds"


def mean_size_and_time(family):
    """Millions of parameters and mean minutes of training, as text."""
    return [f"{family[0].results['params'] / 1e6:.2f}", f"{np.mean([e.minutes for e in family]):.1f}"]


def spread(values):
    """Mean and standard deviation over the first axis of [seeds, figures], as texts."""
    pairs = zip(np.mean(values, axis=0), np.std(values, axis=0, ddof=1))
    return [f"{mean:.3f} ± {sd:.3f}" for mean, sd in pairs]


def main_blocks(entries, detailed):
    """The results table; where there are several findings, after one of the figures over all of them. Then
    how to make the ensembles that are missing."""
    first = entries[0]
    warning = "SYNTHETIC data set, not patients: " if first.synthetic else ""
    blocks = [Heading(2, warning + first.set), *split_blocks(entries), *cohort_blocks(entries)]
    blocks += [Heading(3, "Figures on test"), Paragraph(main_text(entries))]
    if not alone(entries):  # fourteen rows a model hide which model is better, so means come first
        blocks += [means_table(entries), Heading(3, "Finding by finding"), Paragraph(findings_text(entries))]
    blocks.append(Table(HEADER, main_rows(detailed)))
    return blocks + [
        Paragraph((f"To add the ensemble of the {count} seeds of {name}, run ", Code(command), "."))
        for name, count, command in missing_ensembles(entries)
    ]


def main_text(entries):
    """What was tested, and what the first table shows, as text."""
    # All models of a section share the test images, but not the validation images.
    first = entries[0]
    points_text = (
        f"@Rec is the threshold of highest precision among those with a validation recall >= "
        f"{floors(entries)}; @0.5 is the threshold 0.5. AUROC does not depend on the threshold. Time is that "
        "of training, validation included."
    )
    if alone(entries):
        (finding,) = first.findings
        truth = first.column(finding, "test").truth
        chosen_on = unique((len(e.column(finding, "val").truth) for e in entries), " or ")
        counts = f"{int((truth == 0).sum())} {first.absent(finding)}, {int(truth.sum())} {finding}"
        return (
            f"Test: {len(truth)} {first.unit} ({counts}), at thresholds chosen on validation ({chosen_on} "
            f"{first.unit}). {pooled_text(entries)}{points_text}"
        )
    count = len(first.columns["test"].files)
    return f"Test: {count} {first.unit}. {pooled_text(entries)}{means_text(entries)}"


def pooled_text(entries):
    """What the figures of studies or patients are, as text; "" by image."""
    first = entries[0]
    if first.unit == "images":
        return ""
    pools = unique((e.calibration["pool"] for e in entries), " or ")
    return (
        f"All figures are of {first.unit}: the score is the {pools} over the images, the truth positive if "
        "any of them is. "
    )


# ---------------------------------------------------------------- several findings together


def means_text(entries):
    """What the means over several findings are, as text."""
    first = entries[0]
    used, asked = first.summary["test"]["findings"], first.findings[first.task.averaged]
    if first.task.kind == "softmax":
        text = (
            f"{len(first.task.classes)} classes; the screening question is {first.findings[0]!r}, "
            f"1 - P({first.task.classes[0]}). Mean AUROC is that of each class against all others; accuracy "
            "and F1 are those of the most probable class. "
        )
    else:
        text = f"{len(asked)} findings, any number of them in an image. "
    # A mean over fewer findings than were asked would be compared with one over all.
    left_out = [name for name in asked if name not in used]
    if left_out:
        text += (
            f"Means are over the {len(used)} findings with at least {LEAST} {first.unit} with and without "
            f"them, so not over {', '.join(left_out)}. "
        )
    return f"{text}Intervals: 95%, bootstrap of {drawn(entries)}."


def means_table(entries):
    """One row a model: figures over all findings."""
    # A figure that one model lacks has no column: accuracy is of classes, not of findings.
    keys, rows = [k for k in MEANS if all(k in e.summary["test"] for e in entries)], []
    for e in entries:
        figures = [span(e.summary["test"][k]) for k in keys]
        val_auroc = three_digits(e.summary["val"].get("auroc"))
        rows.append([e.name, *size_and_time(e), val_auroc, *figures])
    for family in families(entries):
        values = [[e.summary["test"][k]["value"] for k in keys] for e in family]
        val_aurocs = [[e.summary["val"]["auroc"]["value"]] for e in family if "auroc" in e.summary["val"]]
        val_spread = spread(val_aurocs) if len(val_aurocs) > 1 else ["-"]
        rows.append([of_seeds(family), *mean_size_and_time(family), *val_spread, *spread(values)])
    return Table([*HEADER[:3], "Mean AUROC val", *(f"{MEANS[k]} test" for k in keys)], rows)


def findings_text(entries):
    """What the thresholds of several findings are, and which have none, as text."""
    text = (
        f"@Rec is each finding's threshold of highest precision among those with a validation recall >= "
        f"{floors(entries)}, applied unchanged to test. A finding that is rare in validation has a threshold "
        "that rests on few images: its test recall may be far from the floor. AUPRC of a model that knows "
        "nothing is the share of positives."
    )
    # What is missing from the table is said with its reason.
    for key, words in (("why_not", "No threshold"), ("test_why_not", "No figures on test")):
        reasons = [
            f"{name} ({e.calibrated[name][key]})"
            for name, e in questions(entries)
            if key in e.calibrated[name]
        ]
        if reasons:
            text += f" {words}: {unique(reasons)}."
    return text


def class_blocks(entries):
    """Precision, recall and F1 of every class, and the confusion matrix, of the most probable class."""
    if "confusion" not in entries[0].summary["test"]:
        return []
    unit = entries[0].unit
    text = (
        "Each image is given its most probable class; no threshold. Recall with a 95% interval, bootstrap of "
        f"patients. The matrix counts {unit} of the test set; rows: truth, columns: decision."
    )
    if unit != "images":
        left_out = unique((e.summary["test"].get("several_classes", 0) for e in entries), " or ")
        text += f" Those with images of several classes are left out ({left_out})."
    blocks, classes = [Heading(3, "The most probable class"), Paragraph(text)], entries[0].task.classes
    for e in entries:
        rows, summary = [], e.summary["test"]
        for name, counts in zip(classes, summary["confusion"]):
            # A class that test lacks has no recall.
            of_class, recall = summary["classes"][name], "-"
            if of_class["recall_interval"]:
                recall = f"{of_class['recall']:.3f} {interval(*of_class['recall_interval'])}"
            figures = [str(of_class["n"]), f"{of_class['precision']:.3f}", recall, f"{of_class['f1']:.3f}"]
            rows.append([name, *figures, *map(str, counts)])
        head = ["Class", unit.capitalize(), "Precision", "Recall", "F1", *(f"→ {name}" for name in classes)]
        blocks += [Paragraph(f"{e.name}:"), Table(head, rows)]
    return blocks


# ---------------------------------------------------------------- promises


def promise_blocks(entries):
    """What the recall floor promises, and what is left of it on test."""
    rows = []
    for finding, e in questions(entries):
        for point in ("at_rec", "at_guaranteed"):
            # @Rec has a row even where there is no threshold: that there is none is worth knowing.
            if point == "at_rec" or e.row(finding, "val", point):
                rows.append(promise_row(e, finding, point))
    head = [first_head(entries), "Positives val + test", "Patients val", "Threshold"]
    for figure in ("Recall", "Spec", "AUROC"):
        head += [f"{figure} val", f"{figure} test"]
    head.append("AUPRC test")
    heading = "What the threshold promises, and the shift from validation to test"
    blocks = [Heading(3, heading), Paragraph(promise_text(entries)), Table(head, rows)]
    texts = []
    for finding, e in questions(entries):
        if concerns := warnings(e.calibrated[finding], e.min_recall):
            texts.append(f"{title(e, finding)}: {'; '.join(concerns)}")
    if texts:
        blocks.append(Paragraph(f"Warning. {'. '.join(texts)}."))
    return blocks


def promise_row(e, finding, point):
    """A finding's threshold, and its figures on validation and test, as cells."""
    val, test = (e.row(finding, side, point) for side in ("val", "test"))
    positives = [int(e.column(finding, side).truth.sum()) for side in ("val", "test")]
    cells = [f"{title(e, finding)} {POINTS[point]}", " + ".join(map(str, positives))]
    if val:
        cells += [str(e.calibrated[finding]["guarantee"]["positive_patients"]), f"{val['thr']:.4f}"]
    else:
        cells += ["-", "-"]
    for key in ("recall", "specificity"):
        on_val = f"{val[key]:.3f}" if val else "-"
        cells += [on_val, with_interval(test, key)]
    # A finding too rare for a threshold may still have curves, which need none.
    curves = e.calibrated[finding]["curves"]
    cells.append(three_digits(curves.get("val", {}).get("auroc")))
    on_test = curves.get("test")
    return cells + ["-" if on_test is None else span(on_test[key]) for key in ("auroc", "auprc")]


def three_digits(figure):
    """{value, lo, hi} -> "0.951", a dash where there is none."""
    return "-" if figure is None else f"{figure['value']:.3f}"


def promise_text(entries):
    """What @Rec and @Guar promise, and where @Guar is missing, as text."""
    chances, promised, refused = [], [], []
    for e in entries:
        chances.append(new_patients(e.calibrated, e.min_recall))
        for name, of_finding in e.calibrated.items():
            guarantee = of_finding.get("guarantee", {"threshold": None})
            if guarantee.get("threshold") is not None:
                promised.append(f"recall >= {e.min_recall:g} with confidence {guarantee['confidence']:.4g}")
            elif "why_not" in guarantee:
                refused.append(f"{name} ({guarantee['why_not']})")
    unit = entries[0].unit
    # What each point promises, then at what confidence, then what breaks the promise.
    text = f"@Rec meets the floor on the validation {unit}. For new patients like them, its true recall is "
    text += f"below the floor with {unique(filter(None, chances), ' or ')}."
    if promised:
        text += f" @Guar applies the Neyman-Pearson umbrella rule to patients: {unique(promised)}."
    joint = [e.calibration["jointly"] for e in entries if e.calibration["jointly"]]
    if joint:
        text += (
            f" The floors of all {joint[0]['findings']} findings hold at once with confidence "
            f"{joint[0]['confidence']:g}, by the union bound."
        )
    elif promised and not alone(entries):
        text += (
            " Each holds for its finding alone, not for all at once; calibrate.py --jointly asks for that."
        )
    text += (
        " No such promise survives a shift in the data, so compare validation with test. The validation "
        "images also chose the epoch, which flatters the validation figures a little. Patients are those of "
        f"validation with the finding ({unit}, where patients are unknown)."
    )
    if refused:
        text += f" Where @Guar is missing: {unique(refused)}."
    return text


# ---------------------------------------------------------------- intervals, CSV


def interval_blocks(entries):
    """95% intervals of the test figures."""
    rows = []
    for point, (finding, e) in itertools.product(points(entries), questions(entries)):
        if row := e.row(finding, "test", point):
            cells = [with_interval(row, k) for k in NAMED.values()]
            rows.append([f"{title(e, finding)} {POINTS[point]}", *cells, delong_interval(row)])
    draws = unique((e.calibration["bootstrap"] for e in entries), " or ")
    text = (
        f"Percentile bootstrap: {drawn(entries)} are drawn {draws} times. Where every draw gives the same "
        "value, what the number of patients alone tells: Wilson's interval; for an AUROC of 1 the lower "
        "limit 0.025^(1/m), m the fewer of sick and healthy patients. The intervals of DeLong (none at an "
        f"AUROC of 1) and Wilson in calibration.json treat {entries[0].unit} as independent."
    )
    table = Table([first_head(entries), *NAMED, "AUROC (DeLong)"], rows)
    return [Heading(3, "How sure: 95% intervals on test"), Paragraph(text), table]


def delong_interval(row):
    """DeLong's interval of an AUROC as text; a dash where the AUROC is 1, of which it tells nothing."""
    limits = row["interval"]["auroc"].get("delong")
    if limits is None or no_width(limits):
        return "-"
    return interval(*limits)


def write_csv(path, groups):
    """The rows of the main tables with their data set, as CSV; `groups` are lists of Entries."""
    with atomic_path(path) as tmp, open(tmp, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Data", *HEADER])
        for entries in groups:
            for row in main_rows(entries):
                writer.writerow([printable(cell) for cell in (entries[0].set, *row)])
