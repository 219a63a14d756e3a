"""Blocks of the report on people: who took part, what was left out, and figures of groups of patients. No
torch, no drawing."""

from functools import cache

import numpy as np

from cohort.groups import METHOD, groups_on_side, table_of, verdicts
from common.console import InputError
from common.scaling import SIDES
from records.schema import NATURAL, mismatches
from report.cells import first_head, questions, title, unique
from report.render import Heading, Paragraph, Table
from report.rows import also_trained_on

ALL_SIDES = ("train", "val", "test")
COUNTED = {"images": NATURAL, "patients": NATURAL, "unknown_patients": NATURAL, "findings": dict}
WORDS = {  # of the steps in results.json
    "listed": "named by the table or the folders",
    "found": "whose file is there",
    "published": "in a published list of files",
    "view": "of a view that was asked for",
    "labelled": "with a label",
    "undersampled": "drawn, equal counts of each class",
    "readable": "that can be read",
    "train": "in training",
    "val": "in validation",
    "test": "in test",
}
HERE = ("sex", "view", "machine")
FEW = 3  # of more findings, groups have a table only where something stands out on test


# ---------------------------------------------------------------- who took part


def cohort_blocks(entries):
    """Who took part, a table for each way the images were shared out, and the flow of exclusions."""
    blocks, tables = [Heading(3, "Who took part")], {}
    for e in entries:
        sides = sides_of(e)
        tables.setdefault(repr(sides), (sides, []))[1].append(e)
    for sides, sharing in tables.values():
        if len(tables) > 1:
            blocks.append(Paragraph(f"{unique(e.name for e in sharing)}:"))
        rows = cohort_rows(sides, entries[0].findings)
        blocks.append(Table(["", "Training", "Validation", "Test"], rows, prose=True))
    tells = any(tells_of_patients(sides) for sides, _ in tables.values())
    return blocks + [Paragraph(cohort_text(entries, tells)), *flow_blocks(entries)]


def sides_of(entry):
    """{side: cohort.who.summary, with "findings"} of an entry: training's as it was recorded, the others by
    its scores."""
    return {"train": recorded(entry), **entry.people}


def recorded(entry):
    """What training wrote of its own images; the number alone where an older version trained. InputError if
    damaged."""
    split = entry.results["split"]
    if "cohort" not in split:
        return {"images": split["train"]}
    if mismatches(split["cohort"], {"train": COUNTED}) or not _is_summary(split["cohort"]["train"]):
        raise InputError(f"{entry.run}/results.json is damaged: wrong split.cohort")
    return split["cohort"]["train"]


def _is_summary(found):
    """Whether the parts of a summary that may be missing are as cohort.who.summary writes them."""
    counts = [found[name] for name in HERE if name in found]
    good = all(isinstance(c, dict) and all(map(NATURAL.contains, c.values())) for c in counts)
    for pair in found["findings"].values():
        good = good and isinstance(pair, list) and len(pair) == 2 and all(map(NATURAL.contains, pair))
    if "age" not in found:
        return good
    age = found["age"]
    numbers = (int, float, type(None))
    return good and isinstance(age, list) and len(age) == 4 and all(isinstance(v, numbers) for v in age)


def cohort_rows(sides, findings):
    """The rows of the cohort table; `sides`: as `sides_of`."""
    rows = [
        ["Images", *(str(sides[side]["images"]) for side in ALL_SIDES)],
        ["Studies", *(str(sides[side].get("studies", "-")) for side in ALL_SIDES)],
        ["Patients", *(_people(sides[side]) for side in ALL_SIDES)],
        ["Age in years: median (range)", *(_age(sides[side].get("age")) for side in ALL_SIDES)],
    ]
    for name, head in (("sex", "Sex (patients)"), ("view", "View (images)"), ("machine", "Machine (images)")):
        rows.append([head, *(_listed(sides[side].get(name)) for side in ALL_SIDES)])
    for name in findings:
        cells = [_share(sides[side].get("findings", {}).get(name)) for side in ALL_SIDES]
        rows.append([f"With {name}", *cells])
    return [row for row in rows if row[1:] != ["-"] * 3]


def _people(side):
    """The number of patients, as text."""
    if "patients" not in side:
        return "-"
    if not side["unknown_patients"]:
        return str(side["patients"])
    return f"{side['patients']}; unknown: {side['unknown_patients']} images"


def _age(age):
    """[median, least, greatest, unknown] as text."""
    if age is None or age[0] is None:
        return "-"
    text = f"{age[0]:.3g} ({age[1]:.3g} to {age[2]:.3g})"
    if age[3]:
        text += f"; unknown: {age[3]}"
    return text


def _listed(counts):
    """{value: count} as text; a dash where nothing is known."""
    if not counts or set(counts) == {"unknown"}:
        return "-"
    return ", ".join(f"{value} {count}" for value, count in counts.items())


def _share(pair):
    """[images with a finding, without] as text."""
    if pair is None or not sum(pair):
        return "-"
    return f"{pair[0]} of {sum(pair)} ({pair[0] / sum(pair):.1%})"


def cohort_text(entries, tells):
    """What the tables leave open, as text; `tells`: whether they tell more of patients than their number."""
    texts = ["This set tells nothing of its patients: no age, sex, view or machine."]
    if tells:
        texts = ["Age is that at a patient's earliest image here."]
    if any("cohort" not in e.results["split"] for e in entries):
        texts.append("An earlier version trained: of the training images it recorded the number alone.")
    if others := {name for e in entries for name in also_trained_on(e.results)}:
        texts.append(f"Images of {', '.join(sorted(others))}, which joined training, are not counted.")
    return " ".join(texts)


def tells_of_patients(sides):
    """Whether anything but files, patients and labels is known of validation or test; `sides`: as
    `sides_of`."""
    for side in SIDES:
        cells = [_age(sides[side].get("age")), *(_listed(sides[side].get(name)) for name in HERE)]
        if cells != ["-"] * len(cells):
            return True
    return False


def flow_blocks(entries):
    """How many images each step left, from what is listed to the sides."""
    flows = {}
    for e in entries:
        flow = e.results["split"].get("flow")
        if flow is not None:
            check_flow(flow, e.run)
            flows.setdefault(repr(flow), (flow, []))[1].append(e.name)
    if not flows:
        return [Paragraph("How many images were listed, found and left out on the way was not recorded.")]
    blocks = []
    for flow, names in flows.values():
        whose = f" ({unique(names)})" if len(flows) > 1 else ""
        blocks.append(Paragraph(f"From what is listed to the images used{whose}:"))
        blocks.append(Table(["Images", "Number", "Left out here"], flow_rows(flow)))
    return blocks


def check_flow(flow, run):
    """InputError unless a flow is a list of [step, images]."""
    good = isinstance(flow, list)
    for step in flow if good else ():
        good = good and isinstance(step, list) and len(step) == 2
        good = good and isinstance(step[0], str) and NATURAL.contains(step[1])
    if not good:
        raise InputError(f"{run}/results.json is damaged: wrong split.flow")


def flow_rows(flow):
    """Rows of the flow: what each step before the sides left out, and what is on no side."""
    rows, before, placed = [], None, 0
    for step, images in flow:
        lost = "-"
        if step in ALL_SIDES:
            placed += images
        else:
            if before is not None:
                lost = str(before - images)
            before = images
        rows.append([WORDS.get(step, step), str(images), lost])
    if placed and before is not None and before > placed:
        rows.append(["on no side", str(before - placed), "-"])
    return rows


# ---------------------------------------------------------------- groups of patients


def group_blocks(entries, asked, few=FEW):
    """Figures of groups of patients, on test and on validation, where columns tell them apart; of more than
    `few` findings only those tables in which something stands out."""
    blocks, standing_out, left_out = [], [], 0
    for name, e in questions(entries):
        for side, word in reversed(SIDES.items()):
            found, notes = groups_on(e, name, side, asked)
            if not found["groups"] and not notes:
                continue
            caption, warned = f"{title(e, name)}, {word}", verdicts(found, e.min_recall)
            standing_out += [[caption, text] for text in warned]
            # Of many findings only some tables are worth the room.
            if len(e.findings) > few and (side == "val" or not warned):
                left_out += 1
                continue
            remarks = f" ({'; '.join(notes)})" if notes else ""
            blocks.append(Paragraph(f"{caption}{remarks}{':' if found['groups'] else ': no group.'}"))
            if found["groups"]:
                blocks.append(Table(*table_of(found)))
    if left_out:
        text = (
            f"Left out: {left_out} tables in which nothing stands out (--card RUN has all figures of a run)."
        )
        blocks.append(Paragraph(text))
    if not blocks:
        return []
    said = Paragraph("No group is large enough to be tested.")
    if left_out or any(isinstance(block, Table) for block in blocks):
        text = "No group that was tested differs from the rest, and no floor is broken, beyond chance."
        said = Paragraph(text)
    if standing_out:
        said = Table([first_head(entries), "Warning"], standing_out, prose=True)
    return [Heading(3, "Groups of patients"), Paragraph(METHOD), said, *blocks]


@cache  # permutation tests take seconds, and the answers need them as well as the tables
def groups_on(entry, finding, side, asked):
    """groups_on_side (figures, notes) of an entry's finding."""
    k, column, known = entry.findings.index(finding), entry.columns[side], dict(entry.cohort[side])
    causes = causes_of(entry, side)
    if (causes != "").any():
        known["cause"] = causes
        asked = asked._replace(columns=(*asked.columns, "cause"))
    images = column.truth[:, k], column.scores[:, k], column.patients, known
    return groups_on_side(*images, asked, entry.calibrated[finding], entry.min_recall)


def causes_of(entry, side):
    """The cause of each image of a pneumonia, as the file names of the Kermany set tell it: "bacteria",
    "virus" or "", [N]. A study or patient may have images of both, so there it is "" everywhere."""
    names = np.char.lower(entry.columns[side].files)
    causes = np.full(len(names), "", dtype="U8")
    if entry.unit == "images":
        for word in ("bacteria", "virus"):
            causes[np.char.find(names, f"_{word}_") >= 0] = word
    return causes
