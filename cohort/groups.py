"""Every figure of every group of a side, as JSON, as a table and in words. No torch, no files."""

from collections import Counter

import numpy as np

from cohort.figures import ERROR, Curve, Proportion, family
from cohort.who import LEAST, groups_of
from common.proportions import in_short, in_words


def groups_on_side(truth, scores, patients, cohort, asked, found, floor):
    """(`figures_of_groups`, notes on who is in no group) of one finding on a side.

    truth: int [N], 1, 0 or -1 for unknown, which is left out; scores, patients: [N]; cohort: {name: array
    [N]} or None; asked: a who.Asked; found: what the calibration says of the finding; floor: of its
    recall."""
    known = truth >= 0
    there = {name: values[known] for name, values in (cohort or {}).items()}
    y, p, whose = truth[known].astype(int), scores[known], np.asarray(patients)[known]
    groups, notes = groups_of(there, whose, asked)
    missing = [name for name in asked.columns if name not in there]
    notes += [f"no column {name} here" for name in missing]
    return figures_of_groups(y, p, whose, groups, thresholds_of(found), floor), notes


def figures_of_groups(y, p, whose, groups, thresholds, floor):
    """Every figure of every group -> JSON: {"groups": [[attribute, value]], "patients": [[with the finding,
    without]], "figures": {name: `family`}}, the lists in the order of `groups`.

    The figures are "AUROC", and "recall POINT" and "specificity POINT" for each of `thresholds`, {point:
    threshold}. y: int [N], 0 or 1; p: scores [N]; whose: patients [N]; groups: list of Groups of these
    images. Each row of a recall says whether the `floor` is "broken": whether the simultaneous interval lies
    wholly below it."""
    p, whose = np.asarray(p), np.asarray(whose)
    found = {"groups": [[group.attribute, group.value] for group in groups], "patients": []}
    for group in groups:
        sides = (group.inside & (y == 1), group.inside & (y == 0))
        found["patients"].append([len(np.unique(whose[images])) for images in sides])
    figures = {"AUROC": family(Curve(y, p, whose), groups)}
    for point, threshold in thresholds.items():
        for name, label, right in (("recall", 1, p >= threshold), ("specificity", 0, p < threshold)):
            images = np.flatnonzero(y == label)
            inside = [group.at(images) for group in groups]
            figures[f"{name} {point}"] = family(Proportion(right[images], whose[images]), inside)
        for row in figures[f"recall {point}"]:
            if "hi" in row:
                row["broken"] = row["hi"] < floor
    return found | {"figures": figures}


def thresholds_of(found):
    """{point: threshold} of what a calibration says of a finding: "@Rec", and "@Guar" where it has one."""
    if "threshold" not in found:
        return {}
    thresholds = {"@Rec": found["threshold"]}
    if found["guarantee"]["threshold"] is not None:
        thresholds["@Guar"] = found["guarantee"]["threshold"]
    return thresholds


# ---------------------------------------------------------------- as text


def table_of(found):
    """What `figures_of_groups` found -> (head, rows of cells), texts: a row a group."""
    head = ["Group", "Patients with / without"]
    for name in found["figures"]:
        head += [name, "gap (p)"]
    rows = []
    for k, (attribute, value) in enumerate(found["groups"]):
        cells = [f"{attribute} {value}", "{} / {}".format(*found["patients"][k])]
        for figures in found["figures"].values():
            cells += _cells(figures[k])
        rows.append(cells)
    return head, rows


def _cells(row):
    """[a figure with its interval, its gap to the rest with the p-value], as texts."""
    if "value" not in row:
        return [f"- ({row['patients']} patients)", "-"]
    figure = in_words(row)
    if row.get("broken"):
        figure += " BROKEN"
    if "gap" not in row:
        return [figure, f"- (rest: {row['rest']} patients)"]
    gap = round(row["gap"], 3) + 0.0  # -0.0 would be shown as -0.000
    return [figure, f"{gap:+.3f} ({in_short(row['adjusted'])})"]


METHOD = (
    f"The intervals of a figure hold for all groups at once with confidence {1 - ERROR:g} (Bonferroni). The "
    "gap is to the rest of those whose value is known, with each patient counted once. Its p-value is Holm's "
    f"over all groups of the figure. A dash stands where fewer than {LEAST} patients count (recall: those "
    "with the finding; specificity: those without; AUROC: the fewer of both). BROKEN: the interval of recall "
    "lies below the floor."
)


def verdicts(found, floor):
    """What stands out in what `figures_of_groups` found, as a list of texts: broken floors, gaps that are no
    chance. Of two groups that are each other's rest the one with the lower figure is named."""
    texts, sizes = [], Counter(attribute for attribute, _ in found["groups"])
    for name, rows in found["figures"].items():
        told = set()
        for (attribute, value), row in sorted(zip(found["groups"], rows), key=_gap):
            if row.get("broken"):
                texts.append(f"{name} of {attribute} {value} is {row['value']:.3f}, floor {floor:g}")
            question = attribute if sizes[attribute] == 2 else (attribute, value)
            if row.get("adjusted", 1) <= ERROR and question not in told:
                told.add(question)
                gap = f"{row['gap']:+.3f} (p {in_short(row['adjusted'])})"
                texts.append(f"{name} of {attribute} {value} differs from the rest by {gap}")
    return texts


def _gap(pair):
    """The gap of a (group, row); 0 where it has none."""
    return pair[1].get("gap", 0)


def lines_of(found):
    """`table_of` as lines of a console, the columns under each other."""
    head, rows = table_of(found)
    widths = [max(len(line[k]) for line in (head, *rows)) for k in range(len(head))]
    lines = []
    for first, *others in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def side_lines(title, found, notes, floor):
    """What `groups_on_side` found, as lines of a console; none where there is no group and no note."""
    if not found["groups"] and not notes:
        return []
    lines = ["; ".join([title, *notes])]
    if found["groups"]:
        lines += [f"  {line}" for line in lines_of(found)]
    return lines + [f"  warning: {text}" for text in verdicts(found, floor)]


def console_lines(title, images, calibration, asked):
    """The groups of patients of a site at a run's own thresholds, finding by finding, as lines of a console.

    images: (truth [N, F], scores [N, F], patients [N], cohort {name: array [N]} or None); calibration: the
    run's; asked: a who.Asked."""
    truth, scores, *people = images
    floor, lines = calibration["min_recall"], []
    for k, (name, found) in enumerate(calibration["findings"].items()):
        figures, notes = groups_on_side(truth[:, k], scores[:, k], *people, asked, found, floor)
        lines += side_lines(f"{title}: groups of patients, as shipped: {name}", figures, notes, floor)
    if not lines:
        return [f"{title}: no groups of patients: no age, sex, view or machine is known"]
    return [*lines, METHOD]
