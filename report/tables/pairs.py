"""Blocks of the report on which of two models is better, on the same test images. No torch, no drawing."""

import itertools

from calibration.intervals import compare_at_thresholds, difference_of_means, mean_auroc_draws
from report.cells import alone, drawn
from report.render import Heading, Paragraph, Table
from report.view import MANY

HEADING = Heading(3, "Which model is better on test")


def pair_blocks(entries):
    """Every two models; of more than MANY the first with each other one, because many pairs differ by chance
    and nobody reads them. Of an only finding three figures, of several the mean of their AUROCs."""
    pairs = list(itertools.combinations(entries, 2))
    if not pairs:
        return []
    text = "A finding and no way to choose: choose on validation."
    if len(entries) > MANY:
        pairs = pairs[: len(entries) - 1]
        text += f" Of {len(entries)} runs, the first in the table above is held against each other one."
    found = decision_pairs(pairs) if alone(entries) else mean_pairs(pairs)
    if not found:
        return []
    about, table = found
    return [HEADING, Paragraph(f"{text} {about}"), table]


def decision_pairs(pairs):
    """(what the table shows, Table) of pairs of Entries: AUROC, and recall and specificity @Rec of the only
    finding."""
    first, rows = pairs[0][0], []
    (finding,) = first.findings
    tests = {"auroc": "delong", "recall": "mcnemar_recall", "specificity": "mcnemar_specificity"}
    for a, b in pairs:
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
    text = (
        f"Differences on the same test {first.unit}, recall and specificity @Rec. Intervals: 95%, paired "
        f"bootstrap of {drawn([first])}. p-values: DeLong for AUROC, exact McNemar for the others, both "
        "by patient; not corrected for the number of pairs."
    )
    return text, Table(["Pair", "AUROC", "Recall @Rec", "Specificity @Rec"], rows)


def mean_pairs(pairs):
    """(what the table shows, Table) of pairs of Entries: mean AUROC over the findings that both have figures
    of; None where no pair has one."""
    rows, kept = [], {}

    # A bootstrap of fourteen findings takes seconds, and each model is in several pairs.
    def mean_draws(entry, findings, draws):
        key = id(entry), tuple(findings), draws
        if key not in kept:
            columns, test = [entry.findings.index(n) for n in findings], entry.columns["test"]
            arrays = test.truth[:, columns], test.scores[:, columns]
            kept[key] = mean_auroc_draws(*arrays, test.patients, draws)
        return kept[key]

    for a, b in pairs:
        both = [n for n in a.summary["test"]["findings"] if n in b.summary["test"]["findings"]]
        if not both:
            continue
        d = difference_of_means(*(mean_draws(e, both, a.calibration["bootstrap"]) for e in (a, b)))
        told_apart = "no" if d["lo"] <= 0 <= d["hi"] else "yes"
        cell = "{difference:+.3f} [{lo:+.3f}, {hi:+.3f}]".format(**d)
        rows.append([f"{a.name} minus {b.name}", str(len(both)), cell, told_apart])
    if not rows:
        return None
    first = pairs[0][0]
    text = (
        f"Difference of the mean AUROC on the same test {first.unit}, 95% interval by a paired bootstrap of "
        f"{drawn([first])}; not corrected for the number of pairs."
    )
    return text, Table(["Pair", "Findings", "Mean AUROC", "Interval without 0"], rows)
