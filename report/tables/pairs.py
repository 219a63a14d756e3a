"""Blocks of the report on which of two models is better, on the same test images. No torch, no drawing."""

import itertools

from calibration.intervals import compare_at_thresholds, difference_of_means, mean_auroc_draws
from report.cells import alone, drawn, span, with_interval
from report.render import Heading, Paragraph, Table

HEADING = Heading(3, "Which model is better")


def pair_blocks(entries):
    """Every two models: an only finding by three figures, several by the mean of their AUROCs, because as
    many tests as findings would find differences by chance."""
    return decision_pairs(entries) if alone(entries) else mean_pairs(entries)


def leader(figure, names, values, spans, tied):
    """A sentence on which model is best: its names, values and their spans as text; tied: the pairs of
    positions with a difference that may be 0."""
    best = max(range(len(names)), key=lambda i: values[i])
    level = [names[i] for i in range(len(names)) if (min(i, best), max(i, best)) in tied]
    apart = f"not told apart from it: {'; '.join(level)}" if level else "it is told apart from every other"
    text = f"Highest {figure} on test: {names[best]}, {spans[best]}; {apart}."
    return f"{text} That is a finding and no way to choose: choose on validation."


def decision_pairs(entries):
    """Every two models, by AUROC, and by recall and specificity @Rec of the only finding."""
    (finding,) = entries[0].findings
    rows, tied = [], set()
    tests = {"auroc": "delong", "recall": "mcnemar_recall", "specificity": "mcnemar_specificity"}
    for (i, a), (j, b) in itertools.combinations(enumerate(entries), 2):
        # Both columns hold the same images in the same order, so the tests are paired.
        test, both = a.column(finding, "test"), []
        for e in (a, b):
            both += [e.column(finding, "test").scores, e.calibrated[finding]["threshold"]]
        d = compare_at_thresholds(test.truth, *both, test.patients, a.calibration["bootstrap"])
        cells = []
        for figure, p_value in tests.items():
            text = "{difference:+.3f} [{lo:+.3f}, {hi:+.3f}], p = {p:.2g}"
            cells.append(text.format(**d[figure], p=d[p_value]))
        rows.append([f"{a.name} minus {b.name}", *cells])
        # Told apart means by both: by the interval of patients and by DeLong.
        if d["auroc"]["lo"] <= 0 <= d["auroc"]["hi"] and d["delong"] > 0.05:
            tied.add((i, j))
    if not rows:
        return []
    text = (
        f"Differences on the same test {entries[0].unit}, recall and specificity @Rec. Intervals: 95%, "
        f"paired bootstrap of {drawn(entries)}. p-values: DeLong for AUROC, exact McNemar for the others, "
        "not corrected for the number of pairs."
    )
    points = [e.row(finding, "test", "at_rec") for e in entries]
    spans = [with_interval(row, "auroc") for row in points]
    best = leader("AUROC", [e.name for e in entries], [row["auroc"] for row in points], spans, tied)
    head = ["Pair", "AUROC", "Recall @Rec", "Specificity @Rec"]
    return [HEADING, Paragraph(best), Paragraph(text), Table(head, rows)]


def mean_pairs(entries):
    """Every two models, by mean AUROC over the findings that both have figures of."""
    rows, kept, tied = [], {}, set()

    # A bootstrap of fourteen findings takes seconds, and each model is in several pairs.
    def mean_draws(entry, findings, draws):
        key = id(entry), tuple(findings), draws
        if key not in kept:
            columns, test = [entry.findings.index(n) for n in findings], entry.columns["test"]
            arrays = test.truth[:, columns], test.scores[:, columns]
            kept[key] = mean_auroc_draws(*arrays, test.patients, draws)
        return kept[key]

    for (i, a), (j, b) in itertools.combinations(enumerate(entries), 2):
        both = [n for n in a.summary["test"]["findings"] if n in b.summary["test"]["findings"]]
        if not both:
            continue
        d = difference_of_means(*(mean_draws(e, both, a.calibration["bootstrap"]) for e in (a, b)))
        told_apart = "yes"
        if d["lo"] <= 0 <= d["hi"]:
            told_apart = "no"
            tied.add((i, j))
        cell = "{difference:+.3f} [{lo:+.3f}, {hi:+.3f}]".format(**d)
        rows.append([f"{a.name} minus {b.name}", str(len(both)), cell, told_apart])
    if not rows:
        return []
    text = (
        f"Difference of the mean AUROC on the same test {entries[0].unit}, 95% interval by a paired "
        f"bootstrap of {drawn(entries)}; not corrected for the number of pairs."
    )
    head = ["Pair", "Findings", "Mean AUROC", "Interval without 0"]
    blocks = [HEADING, Paragraph(text), Table(head, rows)]
    averaged = [e.summary["test"]["findings"] for e in entries]
    if all(names == averaged[0] for names in averaged):  # means of other findings cannot be ranked
        aurocs = [e.summary["test"]["auroc"] for e in entries]
        values, spans = [figure["value"] for figure in aurocs], list(map(span, aurocs))
        best = leader("mean AUROC", [e.name for e in entries], values, spans, tied)
        blocks.insert(1, Paragraph(best))
    return blocks
