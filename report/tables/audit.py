"""Blocks of the report on audits: what audit.py found of each run. No torch, no drawing."""

import shlex

from auditing.record import KEYS, TITLES, audit_of
from common.scaling import SIDES
from report.cells import unique
from report.render import Code, Heading, Paragraph, Table, marked


def audit_blocks(entries):
    """The verdicts of every audited run, and the sentence behind each; how to audit those that are not."""
    by_folder = {entry.run.folder: entry for entry in entries}
    found, missing = [], []
    for entry in by_folder.values():  # a run with and without TTA has one audit
        audit = audit_of(entry.run)
        if audit is None:
            missing.append(entry)
            continue
        found += [(entry, side, each) for side in SIDES if side in audit["sides"] for each in of(audit, side)]
    blocks = [Heading(3, "Does it read the lungs or the machine?")]
    if found:
        verdicts = [verdict_row(*each) for each in found]
        blocks.append(Paragraph(audit_text(found)))
        blocks.append(Table(["Model", "Images", "Shortcut", *TITLES.values()], verdicts))
        head = ["Model", "Section", "Verdict", "What follows"]
        blocks.append(Table(head, sentence_rows(found), prose=True))
    if missing:
        command = f"python audit.py --run {shlex.quote(str(missing[0].run))}"
        names = unique((entry.name for entry in missing), ", ")
        blocks.append(Paragraph(("Not audited: ", names, ". To audit one, run ", Code(command), ".")))
    return blocks


def of(audit, side):
    """What was found of a side, of each finding that was asked for: list of dicts."""
    shown = audit["sides"][side]
    return [shown, *shown["others"].values()]


def audit_text(found):
    """What was done, as text."""
    text = (
        "From audit.py. Broken: the effect is larger than its margin with 95% confidence. Kept: it is "
        "smaller. Open: these images cannot tell, or the section could not be run. Intervals are 95%, of "
        "whole patients. Shortcut puts border, lungs and other signals together. An audit can find a "
        "shortcut; it cannot prove that there is none. docs/AUDIT.md has the rules."
    )
    for entry, side, each in found:
        counts = images_of(each)
        if min(counts.values()) == each["of_images"]:
            continue
        taken = str(each["images"])
        if len(set(counts.values())) > 1:
            taken = ", ".join(f"{count} ({title})" for title, count in counts.items())
        text += (
            f" Of {entry.name}, {taken} of {each['of_images']} {SIDES[side]} images were taken, at random by "
            "patient."
        )
    return text


def images_of(found):
    """{title of a section: how many images it looked at}; calls of audit.py may take different ones."""
    counts = {TITLES[line["key"]]: line.get("images", found["images"]) for line in found["lines"]}
    return counts or {"": found["images"]}


def name_of(entry, side, found):
    """A model, the side and, of several findings, which."""
    return ", ".join([entry.name, *entry.task.told_apart(found["finding"]), SIDES[side]])


def verdict_row(entry, side, found):
    """The verdicts of a side, a dash for sections that were not run."""
    verdicts = {line["key"]: line["verdict"] for line in found["lines"]}
    verdicts = [found["shortcut"]["verdict"], *(verdicts.get(key, "-") for key in KEYS)]
    counts = sorted(set(images_of(found).values()))
    images = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return [name_of(entry, side, found), images, *map(marked, verdicts)]


def sentence_rows(found):
    """A row a section of every side: model, section, verdict, sentence."""
    rows = []
    for entry, side, each in found:
        name = name_of(entry, side, each)
        rows.append([name, "Shortcut", marked(each["shortcut"]["verdict"]), each["shortcut"]["text"]])
        rows += [[name, TITLES[line["key"]], marked(line["verdict"]), line["text"]] for line in each["lines"]]
    return rows
