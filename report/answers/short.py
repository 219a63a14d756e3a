"""The block "In short": three answers for one test set. No torch, no drawing."""

from report.answers import marks
from report.answers.threshold import SHOWN, threshold_blocks
from report.answers.which import which_blocks
from report.render import Bullets, Heading, Link, Paragraph, Table, marked

HEADING = Heading(3, "In short")
TRUST = Heading(4, "Can I trust it?")
PROMISES = "#what-the-threshold-promises-and-the-shift-from-validation-to-test"
METHOD = "#how-this-was-evaluated"
MARKS = {  # what is asked: (the section that answers it at length, the function that decides)
    "Recall floor on test": (PROMISES, marks.floor_mark),
    "Validation like test": (PROMISES, marks.transport_mark),
    "Reads no shortcut": ("#does-it-read-the-lungs-or-the-machine", marks.shortcut_mark),
    "Patients known and apart": (METHOD, marks.patients_mark),
    "No image on two sides": (METHOD, marks.copies_mark),
    "Scores are probabilities": ("#are-the-probabilities-right", marks.probability_mark),
    "No group under the floor": ("#groups-of-patients", marks.group_mark),
    "Enough patients for @Guar": (PROMISES, marks.promise_mark),
}


def in_short(view):
    """The block of one test set, a View."""
    remaining = view.remaining
    blocks = [HEADING, *which_blocks(view.standings), *transport_blocks(remaining, view.asked)]
    return blocks + threshold_blocks(remaining) + trust_blocks(remaining, view.asked)


def transport_blocks(remaining, asked):
    """A sentence on what a choice by validation is worth, where validation is not like test."""
    found = marks_of(marks.transport_mark, remaining, asked)
    broken = [mark.text for mark in found if mark.verdict == "broken"]
    if not broken:
        return []
    text = f"Validation is not like test here ({broken[0]}): "
    text += "what validation prefers may not hold on other images."
    return [Paragraph(text)]


def trust_blocks(remaining, asked):
    """The marks of those that remain (Candidates), models in columns."""
    shown = remaining[:SHOWN]
    found = {name: marks_of(decide, shown, asked) for name, (_, decide) in MARKS.items()}
    rows = [[Link(name, MARKS[name][0]), *map(cell, each)] for name, each in found.items()]
    text = (
        "Kept: the figures show it. Broken: they show the contrary, beyond chance. Open: nobody looked, or "
        "there are too few patients to tell. No mark stands for another, and none is about another hospital."
    )
    if len(remaining) > SHOWN:
        text += f" Shown: the first {SHOWN} of {len(remaining)} that remain."
    blocks = [TRUST, Paragraph(text), Table(["Mark", *(c.name for c in shown)], rows, prose=True)]
    if settling := settled_by(found):
        blocks += [Paragraph("What would settle the open marks:"), Bullets(settling)]
    return blocks


def marks_of(decide, candidates, asked):
    """A Mark for each Candidate: that of its worst seed."""
    return [marks.worst([decide(e, asked) for e in c.entries]) for c in candidates]


def cell(mark):
    """A Mark as a cell."""
    return marked(mark.verdict), f": {mark.text}"


def settled_by(found):
    """What would settle the open marks, each thing once, with the marks that it settles."""
    by_means, by_names = {}, {}
    for name, each in found.items():
        for mark in each:
            if mark.verdict == "open":
                by_means.setdefault(mark.settle, {})[name] = True
    for means, names in by_means.items():
        by_names.setdefault(", ".join(names), []).append(means)
    items = []
    for names, every in by_names.items():
        parts = [part for means in every for part in ("; ", means)]
        items.append((f"{names}: ", *parts[1:], "."))
    return items
