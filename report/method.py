"""Blocks of the report on how it was made: where the images come from, how they were shared out, what was
done. No torch, no drawing."""

import numpy as np

from images.split import say_shared
from images.twins import say_copies, told
from report.cells import floors, unique
from report.render import Code, Heading, Paragraph, Table
from report.rows import also_trained_on


def shared_text(entry):
    """What is known of patients on both sides of the split, as text."""
    split, val = entry.results["split"], entry.columns["val"]
    # Older runs did not record how many patients are unknown.
    unknown = 0 if val.patients_known else split["train"] + split["val"]
    return say_shared({"unknown_patients": unknown, **split})


def sizes(entry):
    """Images and patients of every side, as text."""
    split = entry.results["split"]
    counts = {
        s: ", ".join(f"{n} {c}" for c, n in split["counts"][s].items()) for s in ("train", "val", "test")
    }
    parts = [f"{s}: {split[s]} images ({counts[s]})" for s in counts]
    patients = [
        f"{len(set(column.patients.tolist())) if column.patients_known else 'unknown'} {side}"
        for column, side in ((entry.columns["val"], "validation"), (entry.columns["test"], "test"))
    ]
    return "; ".join([*parts, f"patients: {', '.join(patients)}"])


def partition(entry):
    """How the images were shared out, as text."""
    d, split = entry.results["data"], entry.results["split"]
    test_from = split.get("test_from", "published")
    text = f"--split {d['split']}, seed {d['split_seed']}: {shared_text(entry)}; "
    if test_from == "published":
        return text + "the test set is the published one"
    if d["split"].startswith("pooled"):
        return text + optimistic(entry)
    return text + "no test set is published, so one was cut off: the same hospital is on both sides"


def optimistic(entry):
    """What to think of a pooled split, as text; empty for any other."""
    if not entry.results["data"]["split"].startswith("pooled"):
        return ""
    text = "train and test were put together"
    if entry.results["data"].get("undersample"):
        text += ", undersampled to classes of equal size,"
    return (
        text + " and cut anew: the same machines and habits are on both sides, so the figures are OPTIMISTIC"
    )


def split_blocks(entries):
    """Warnings above the tables: of a pooled split, of copies on two sides."""
    notes = [unique(filter(None, map(about, entries))) for about in (optimistic, copied)]
    return [Paragraph(f"{text[0].upper()}{text[1:]}.") for text in notes if text]


def copied(entry):
    """What to think of copies on two sides, as text; empty where there are none."""
    exact = told(entry.results["split"].get("copies", {}), "are copies, byte for byte, of")
    same = told(entry.calibration.get("alike", {}), "look like")
    text = "; ".join(filter(None, (exact, same)))
    return f"{text}: the figures are FLATTERED by what the model has seen" if text else ""


def placed(entries):
    """Where the thresholds lie, as text: empty where an older calibration put one on a score."""
    found = [f for e in entries for f in e.calibration["findings"].values() if "threshold" in f]
    return ", in the middle between two scores" if all("gap" in f for f in found) else ""


def prevalence(entry):
    """How common each finding is on validation and test, as text."""
    counted = []
    for side, word in (("val", "validation"), ("test", "test")):
        truth = entry.columns[side].truth
        shares = (truth == 1).sum(axis=0) / np.maximum((truth >= 0).sum(axis=0), 1)
        counted.append(f"{word} " + ", ".join(f"{share:.1%}" for share in shares))
    return f"{', '.join(entry.findings)}: {'; '.join(counted)}"


def method_blocks(entries):
    """The items of STARD-AI and CLAIM that a script can answer."""
    first = entries[0]
    rule = (
        f"@Rec, a finding at a time: highest precision with validation recall >= {floors(entries)}, exact "
        "over all scores; @Guar: Neyman-Pearson umbrella on patients; both chosen on validation"
        f"{placed(entries)} and applied unchanged to test; unknown labels are left out"
    )
    standard = "the table of findings" if first.task.kind == "sigmoid" else "the class folder of each image"
    rows = method_rows(entries, standard, prevalence(first), rule)
    return [Heading(3, "How this was evaluated"), Table(["Item", "Answer"], rows, prose=True)]


def method_rows(entries, standard, prevalence, rule):
    """The rows that every task has."""
    first = entries[0]
    drawn = " (SYNTHETIC drawings, not patients)" if first.synthetic else ""
    figures = {
        "auroc": "best validation AUROC",
        "loss": "least validation loss",
        "accuracy": "best validation accuracy",
    }
    seen, watched = [], []
    for e in entries:
        d = e.results["data"]
        looks, lungs = e.run.looks, d.get("lungs", "?")
        shown = "" if looks == ["full"] else f", --input {' and '.join(looks)} by {lungs}"
        exposure = d.get("normalise", "none")
        reads = d.get("reads_lungs") and len(looks) == 1  # the masks of several looks are for cutting
        beside = f", beside them the lungs by {lungs}" if reads else ""
        seen.append(f"{d['img_size']} px grey, {d['resize']}, exposure {exposure}{shown}{beside}")
        watched.append(figures.get(e.results["recipe"].get("watch", "auroc"), "?"))
    also = {n: k for e in entries for n, k in also_trained_on(e.results).items()}
    others = ", ".join(f"{k} images of {n}" for n, k in also.items())
    taught = [e.results["teacher"] for e in entries if "teacher" in e.results]
    teachers = sorted({f"{t['model']} ({t['run']})" for t in taught})
    rows = [
        ["Data", first.set + drawn],
        ["Reference standard", f"{standard}, as published"],
        ["Sizes", unique(map(sizes, entries), " / ")],
        ["Prevalence", prevalence],
        ["Partition", unique(map(partition, entries))],
        ["Copies", unique(say_copies(e.results["split"], e.calibration.get("alike")) for e in entries)],
        *([["Other hospitals in training", others]] if others else []),
        *([["Taught by", ", ".join(teachers)]] if teachers else []),
        ["Input", f"{unique(sorted(seen))}; pixels only"],
        [
            "Model selection",
            f"the epoch with the {unique(watched, ' or ')}; training never opens the test images",
        ],
        ["Threshold rule", rule],
        ["Intervals", "95%; bootstrap over patients, Wilson, DeLong; seeds as mean ± standard deviation"],
        [
            "Not answered here",
            "other hospitals, other ages, other diseases, agreement between readers, clinical benefit",
        ],
    ]
    for e in entries:
        torch = e.results.get("versions", {}).get("torch", "?")
        where = f" on {e.results['device']}" if "device" in e.results else ""
        made_by = (Code(e.results.get("command", "?")), f"{where}, torch {torch}")
        rows.append([f"Made by: {e.name}", made_by])
    return rows
