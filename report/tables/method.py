"""Blocks of the report on how it was made: where the images come from, how they were shared out, what was
done. No torch, no drawing."""

import numpy as np

from common import scaling
from common.scaling import SIDES
from images.split import say_shared
from images.twins import say_copies, told
from report.cells import floors, has_epochs, unique
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
    split, images, patients = entry.results["split"], [], []
    for side in ("train", "val", "test"):
        counts = ", ".join(f"{count} {name}" for name, count in split["counts"][side].items())
        images.append(f"{side}: {split[side]} images ({counts})")
    for side, word in SIDES.items():
        known, unknown = entry.people[side]["patients"], entry.people[side]["unknown_patients"]
        if known and unknown:
            patients.append(f"{known} and {unknown} images of unknown patients in {word}")
        else:
            patients.append(f"{known or 'unknown'} {word}")
    return "; ".join([*images, f"patients: {', '.join(patients)}"])


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
        f"{text} and cut anew: the same machines and habits are on both sides, so the figures are OPTIMISTIC"
    )


def split_blocks(entries):
    """Warnings above the tables: of a pooled split, of copies on two sides, of sets that may differ."""
    notes = [unique(filter(None, map(warning, entries))) for warning in (optimistic, copied)]
    notes.append(called_differently(entries))
    return [Paragraph(f"{text[0].upper()}{text[1:]}.") for text in notes if text]


def copied(entry):
    """What to think of copies on two sides, as text; empty where there are none."""
    exact = told(entry.results["split"].get("copies", {}), "are copies, byte for byte, of")
    same = told(entry.calibration.get("alike", {}), "look like")
    text = "; ".join(filter(None, (exact, same)))
    return f"{text}: the figures are FLATTERED by what the model has seen" if text else ""


def called_differently(entries):
    """That the sets of Entries on one test set have several names, as text; empty where they have one. What
    is in the images is not on record."""
    sets = sorted({entry.results["split"]["set"] for entry in entries})
    if len(sets) == 1:
        return ""
    names = f"{', '.join(sets[:-1])} and {sets[-1]}"
    return f"compared as the same images by names and labels, though the sets are called {names}"


def placed(entries):
    """Where the thresholds lie, as text: empty where an older calibration put one on a score."""
    for entry in entries:
        for of_finding in entry.calibrated.values():
            if "threshold" in of_finding and "gap" not in of_finding:
                return ""
    return ", in the middle between two scores"


def prevalence(entry):
    """How common each finding is on validation and test, as text."""
    counted = []
    for side, word in SIDES.items():
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


def input_text(entry):
    """What the model of an Entry is shown, as text."""
    settings, modes = entry.results["data"], entry.run.input_modes
    lungs, exposure = settings.get("lungs", "?"), settings.get("normalise", "none")
    text = f"{settings['img_size']} px grey, {settings['resize']}, exposure {exposure}"
    if modes != ["full"]:
        text += f", --input {' and '.join(modes)} by {lungs}"
    if settings.get("reads_lungs") and len(modes) == 1:  # the masks of several input modes are for cutting
        text += f", beside them the lungs by {lungs}"
    return text


def views_text(entries):
    """What the score of an image is taken of, as text; of which models, where they differ."""
    names = {}
    for e in entries:
        views = scaling.views_in_words(e.calibration.get("tta"))
        names.setdefault(f"the score of an image is {views}", []).append(e.name)
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{text}: {', '.join(of)}" for text, of in names.items())


def helped_by(entries):
    """Rows on other hospitals and teachers, where training had any."""
    rows, others, teachers = [], {}, set()
    for entry in entries:
        others |= also_trained_on(entry.results)
        if "teacher" in entry.results:
            teacher = entry.results["teacher"]
            teachers.add(f"{teacher['model']} ({teacher['run']})")
    if others:
        counts = ", ".join(f"{count} images of {name}" for name, count in others.items())
        rows.append(["Other hospitals in training", counts])
    if teachers:
        rows.append(["Taught by", ", ".join(sorted(teachers))])
    return rows


def method_rows(entries, standard, prevalence, rule):
    """The rows that every task has."""
    first = entries[0]
    drawn = " (SYNTHETIC drawings, not patients)" if first.synthetic else ""
    figures = {
        "auroc": "best validation AUROC",
        "loss": "least validation loss",
        "accuracy": "best validation accuracy",
    }
    # Answers that differ between models are joined; the first model's data are those of all.
    inputs = sorted(map(input_text, entries))
    by_epoch = [e for e in entries if has_epochs(e)]
    watched = [figures.get(e.results["recipe"].get("watch", "auroc"), "?") for e in by_epoch]
    chosen = f"the epoch with the {unique(watched, ' or ')}" if watched else "none"
    rows = [
        ["Data", first.set + drawn],
        ["Reference standard", f"{standard}, as published"],
        ["Sizes", unique(map(sizes, entries), " / ")],
        ["Prevalence", prevalence],
        ["Partition", unique(map(partition, entries))],
        ["Copies", unique(say_copies(e.results["split"], e.calibration.get("alike")) for e in entries)],
        *helped_by(entries),
        ["Input", f"{unique(inputs)}; pixels only"],
        ["Model selection", f"{chosen}; training never opens the test images"],
        ["Views averaged", views_text(entries)],
        ["Threshold rule", rule],
        ["Intervals", "95%; bootstrap over patients, Wilson, DeLong; seeds as mean ± standard deviation"],
        [
            "Not answered here",
            "other hospitals, other ages, other diseases, agreement between readers, clinical benefit",
        ],
    ]
    # Figures differ in the last digits between versions and devices, so both are named.
    for e in entries:
        torch = e.results.get("versions", {}).get("torch", "?")
        where = f" on {e.results['device']}" if "device" in e.results else ""
        made_by = (Code(e.results.get("command", "?")), f"{where}, torch {torch}")
        rows.append([f"Made by: {e.name}", made_by])
    return rows


def training_blocks(view, pictures):
    """The training curves, what they are of, and which runs have none; nothing without `pictures`."""
    if not pictures:
        return []
    text = (
        "Top: training, as its steps saw the images, augmented and with weights on their way, so its figures "
        "may lie below those of validation (bottom). "
    )
    if view.entries[0].task.kind == "softmax":
        text += "Accuracy is that of the most probable class. "
    else:
        text += "Accuracy is the share of all known labels that are right at 0.5. "
    text += "A dot alone is a model that was fitted at once, or in one epoch."
    without = [e.name for e in view.entries if not e.results["history"]]
    if without:
        text += f" No curve: {unique(without)}, which was put together without training."
    return [Heading(3, "Training"), Paragraph(text), *pictures]
