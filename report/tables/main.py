"""The main tables of the report, as blocks for render.py: figures, promises, intervals. No torch, no
drawing."""

import itertools

from calibration.operating_point import LEAST
from calibration.wording import NOBODY, calls, four_digits, new_patients
from common.proportions import in_words, no_width
from report.answers.short import in_short
from report.answers.threshold import floor_verdict
from report.cells import (
    alone,
    drawn,
    first_head,
    floors,
    has_epochs,
    interval,
    points,
    questions,
    three,
    title,
    unique,
    with_interval,
)
from report.render import Bad, Code, Heading, Paragraph, Table
from report.rows import POINTS
from report.tables.audit import audit_blocks
from report.tables.classes import report_blocks
from report.tables.cohort import cohort_blocks, group_blocks
from report.tables.evidence import batch_blocks, map_blocks
from report.tables.method import method_blocks, split_blocks, training_blocks
from report.tables.models import behind_table, legend, models_table
from report.tables.pairs import pair_blocks
from report.tables.probabilities import predictive_blocks, probability_blocks
from report.tables.triage import triage_blocks
from report.view import missing_ensembles

NAMED = {"Recall": "recall", "Specificity": "specificity", "Precision": "precision", "Accuracy": "acc"}
NAMED |= {"F1": "f1", "AUROC": "auroc", "AUPRC": "auprc"}


def section(view, pictures=None):
    """The blocks of one test set: the answers, then what they rest on. `pictures`: {name: Image}, see
    figures.draw_all; each stands beside its text."""
    entries, shown, detailed = view.entries, view.shown, view.detailed

    def drawn_here(*names):
        return [pictures[name] for name in names if name in (pictures or {})]

    first = entries[0]
    warning = "SYNTHETIC data set, not patients: " if first.synthetic else ""
    blocks = [Heading(2, warning + first.set), *split_blocks(entries), *in_short(view)]
    blocks += [*models_blocks(view), *drawn_here("roc", "pr")]
    blocks += [*class_blocks(detailed), *drawn_here("confusion")]
    blocks += [*promise_blocks(detailed), *drawn_here("scores", "auroc"), *triage_blocks(detailed)]
    blocks += report_blocks(detailed) + interval_blocks(detailed)
    blocks += pair_blocks(shown)
    blocks += [*probability_blocks(detailed), *drawn_here("reliability")]
    blocks += [*predictive_blocks(detailed), *drawn_here("decision")]
    blocks += group_blocks(detailed, view.asked)
    blocks += audit_blocks(shown) + batch_blocks(shown) + map_blocks(shown)
    blocks += cohort_blocks(entries) + method_blocks(entries)
    return blocks + training_blocks(view, drawn_here("training"))


# ---------------------------------------------------------------- figures


def models_blocks(view):
    """The main table, the seeds behind its means, and how to make the ensembles that are missing."""
    blocks = [Heading(3, "Figures on test"), Paragraph(main_text(view.entries))]
    blocks.append(models_table(view.candidates))
    notes = [legend(view)]
    if view.left_out:
        notes.append(f"Left out by --top: {view.left_out} of {view.left_out + len(view.candidates)} models.")
    if len(view.detailed) < len(view.shown):
        count = len(view.shown) - len(view.detailed)
        notes.append(f"The longer tables below leave out {count} of these runs: --run shows them.")
    blocks.append(Paragraph(" ".join(notes)))
    if behind := behind_table(view):
        blocks += [Paragraph("Each seed and each member of an ensemble by itself:"), behind]
    return blocks + [
        Paragraph((f"To add the ensemble of the {count} seeds of {name}, run ", Code(command), "."))
        for name, count, command in missing_ensembles(view.entries)
    ]


def main_text(entries):
    """What was tested, and what the first table shows, as text."""
    # All models of a section share the test images, but not the validation images.
    first = entries[0]
    if alone(entries):
        (finding,) = first.findings
        truth = first.column(finding, "test").truth
        chosen_on = unique((len(e.column(finding, "val").truth) for e in entries), " or ")
        counts = f"{int((truth == 0).sum())} {first.absent(finding)}, {int(truth.sum())} {finding}"
        return (
            f"Test: {len(truth)} {first.unit} ({counts}), at thresholds chosen on validation ({chosen_on} "
            f"{first.unit}). {pooled_text(entries)}@Rec is the threshold of highest precision among those "
            f"with a validation recall >= {floors(entries)}; @0.5 is the threshold 0.5. Time is that of "
            "training, validation included."
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
            f"Means on test are over the {len(used)} findings with at least {LEAST} {first.unit} with and "
            f"without them, so not over {', '.join(left_out)}. "
        )
    on_val = first.summary["val"]["findings"]
    if set(on_val) != set(used):
        text += (
            f"Those on validation, by which models are chosen, are over {len(on_val)}, so do not compare the "
            f"two: {', '.join(on_val)}. "
        )
    return f"{text}Intervals: 95%, bootstrap of {drawn(entries)}."


def refusals(refused):
    """[(finding, why it has no @Guar)] as text: of many findings, the names and the reason of the first."""
    named = dict(refused)
    reasons = [f"{name} ({why})" for name, why in named.items()]
    if len(named) <= 3:
        return "; ".join(reasons)
    return f"{len(named)} findings, for like reasons: {reasons[0]}, {', '.join(list(named)[1:])}"


def missing_text(entries):
    """Which findings have no threshold, or no figures on test, with the reason; "" if none."""
    text = ""
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
        f"{drawn(entries)}. The matrix counts {unit} of the test set; rows: truth, columns: decision."
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
    return blocks


def promise_row(e, finding, point):
    """A finding's threshold, and its figures on validation and test, as cells."""
    val, test = (e.row(finding, side, point) for side in ("val", "test"))
    positives = [int(e.column(finding, side).truth.sum()) for side in ("val", "test")]
    cells = [f"{title(e, finding)} {POINTS[point]}", " + ".join(map(str, positives))]
    if val:
        cells += [str(e.calibrated[finding]["guarantee"]["positive_patients"]), four_digits(val["thr"])]
    else:
        cells += ["-", "-"]
    for key in ("recall", "specificity"):
        cells += [three(val and val[key]), marked_figure(e, finding, test, key)]
    # A finding too rare for a threshold may still have curves, which need none.
    curves = e.calibrated[finding]["curves"]
    cells.append(three(curves.get("val", {}).get("auroc", {}).get("value")))
    on_test = curves.get("test")
    return cells + ["-" if on_test is None else in_words(on_test[key]) for key in ("auroc", "auprc")]


def marked_figure(entry, finding, row, key):
    """Recall or specificity of a `row` on test with its interval, marked where it breaks the floor or calls
    everybody (nobody) sick; a dash where there is no row."""
    text = with_interval(row, key)
    if row is None:
        return text
    said = calls(row)
    if key == "recall" and floor_verdict(entry, finding, row) == "broken":
        return Bad(text)
    if said and (key == "recall") == (said == NOBODY):
        return Bad(text), f" {said}"
    return text


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
                refused.append((name, guarantee["why_not"]))
    unit = entries[0].unit
    # What each point promises, then at what confidence, then what breaks the promise.
    text = f"@Rec meets the floor on the validation {unit}. For new patients like them, its true recall is "
    text += f"below the floor with {unique(filter(None, chances), ' or ')}."
    if promised:
        text += f" @Guar applies the Neyman-Pearson umbrella rule to patients: {unique(promised)}."
    joint = [e for e in entries if e.calibration["jointly"]]
    if joint and promised:
        of_whom = "" if len(joint) == len(entries) else f" of {unique(e.name for e in joint)}"
        sure = unique((f"{e.calibration['jointly']['confidence']:g}" for e in joint), " or ")
        text += (
            f" All floors{of_whom} that are granted hold at once with confidence {sure}, by the union bound."
        )
    if promised and not alone(entries) and len(joint) < len(entries):
        others = " of the others" if joint else ""
        text += (
            f" Each{others} holds for its finding alone, not for all at once; calibrate.py --jointly asks "
        )
        text += "for that."
    text += " No such promise survives a shift in the data, so compare validation with test."
    if any(map(has_epochs, entries)):
        text += " The validation images also chose the epoch, which flatters the validation figures a little."
    text += " Patients are those of validation with the finding (images, where patients are unknown)."
    text += (
        " ✗ marks a floor that is broken by the wider intervals of In short, which are exact and hold for all"
    )
    text += " findings at once, or what stands beside it."
    if refused:
        text += f" Where @Guar is missing: {refusals(refused)}."
    return text + missing_text(entries)


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
