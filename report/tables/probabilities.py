"""Blocks of the report on scores as probabilities, and on what they say of groups of people. No torch, no
drawing."""

import itertools

import numpy as np

from common import scaling
from common.scaling import SIDES
from metrics import predictive_values
from report.cells import first_head, questions, title
from report.render import Heading, Paragraph, Table

WHEN = ("before", "after")


def probability_blocks(entries):
    """Temperature or Platt scaling, mean score against share of positives, and calibration error."""
    figures = list(itertools.product(SIDES, ("ECE", "Brier", "NLL")))
    rows = []
    for name, e in questions(entries):
        if "probability" not in e.calibrated[name]:
            continue
        # Scores are probabilities where their mean is the share of positives, at the least.
        mean, share = scaling.averages(e.calibrated[name], scaling.applied(e.calibration))
        cells = [scaling.cell(e.calibration, name), f"{mean:.3f}", f"{share:.3f}"]
        quality = e.calibrated[name]["probability"]
        for side, figure in figures:
            cells.append(before_and_after(quality.get(side), figure.lower()))
        rows.append([title(e, name), *cells])
    if not rows:
        return []
    text = (
        "Each model has one temperature, which minimises NLL on validation, or a slope and a bias for each "
        "finding (Platt scaling) where calibrate.py was asked for them; figures are before → after, applied "
        "or not. The mean score is that of validation, as thresholds apply to it; of probabilities at "
        f"validation's prevalence it is the share of {entries[0].unit} with the finding. ECE is over 15 bins "
        f"of equal size. {scaling.in_report(entries)}"
    )
    head = [first_head(entries), "Temperature", "Mean score val", "Share val"]
    head += [f"{figure} {side}" for side, figure in figures]
    return [Heading(3, "Are the probabilities right"), Paragraph(text), Table(head, rows)]


def before_and_after(quality, figure):
    """A figure before and after scaling; a dash where a side has too few images for it."""
    if quality is None:
        return "-"
    return "{:.3f} → {:.3f}".format(*(quality[when][figure] for when in WHEN))


def predictive_blocks(entries):
    """Predictive values where a finding is as common as on test, and where it is rarer."""
    known = [(name, e) for name, e in questions(entries) if e.row(name, "test", "at_rec")]
    if not known:
        return []
    # One assumed prevalence for all rows, so that they can be compared: the first calibration's.
    name, first = known[0]
    assumed = first.row(name, "test", "at_rec")["at_prevalence"]["prevalence"]
    if not 0 < assumed < 1:
        assumed = 0.1
    at = f"{100 * assumed:.3g}%"
    rows, shares = [], {}
    for name, e in known:
        row, on_test = e.row(name, "test", "at_rec"), float(e.column(name, "test").truth.mean())
        cells = [f"{title(e, name)} @Rec"]
        for prevalence in (on_test, assumed):
            values = predictive_values(row["recall"], row["specificity"], prevalence)
            cells += ["-" if np.isnan(value) else f"{value:.3f}" for value in values]
        rows.append(cells)
        shares[name] = f"{on_test:.1%} show {name}"
    text = (
        f"Predictive values depend on how common the finding is. Of these test {first.unit} "
        f"{', '.join(shares.values())}. The last two columns assume a prevalence of {at}, with the "
        "same recall and specificity."
    )
    head = [first_head(entries), "PPV as on test", "NPV as on test", f"PPV at {at}", f"NPV at {at}"]
    return [Paragraph(text), Table(head, rows)]
