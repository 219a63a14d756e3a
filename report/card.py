"""A model card: what is on record of one calibrated run, as markdown, with room for what only people know.
card.jinja holds the text, this file what is filled in. No torch, no drawing.
"""

import math
import re
import shlex
from pathlib import Path

import jinja2

from auditing.record import audit_of
from calibration.wording import calls, four_digits
from common import scaling
from common.console import InputError, say
from common.proportions import in_words
from report.answers.short import MARKS
from report.answers.short import cell as mark_cell
from report.cells import alone, has_epochs, points, questions, with_interval
from report.render import Best, Bullets, Code, Heading, Paragraph, Table, markdown_text, to_markdown
from report.rows import POINTS, Entry
from report.tables import evidence, main, method, probabilities
from report.tables.audit import audit_blocks
from report.tables.cohort import cohort_blocks, group_blocks
from report.tables.triage import triage_blocks

TEMPLATE = Path(__file__).with_name("card.jinja")
FIGURES = {"Recall": "recall", "Specificity": "specificity", "Precision": "precision", "AUROC": "auroc"}
OF_DATA = ("Data", "Reference standard", "Sizes", "Prevalence", "Partition", "Copies")
UNSET = (None, False, 0, 0.0, "", "none", [])  # values of settings that do nothing
FEW = 5  # with more findings, the tables of their groups would fill pages
NEVER = (  # what no script here does
    "No reader study: nobody compared the model with radiologists, or watched one who uses it.",
    "No prospective study: all images were taken before the model was made.",
    "No measurement of benefit, harm or cost.",
)


def model_card(run, asked):
    """The card of a calibrated Run as markdown; `asked`: who.Asked, the groups of patients.

    InputError if the run is absent, damaged, not calibrated, or of a kind without classes."""
    names = run.calibrated() or [""]
    if len(names) > 1:
        say(f"note: the card of {run} is of calibration.json; that with --tta is left out")
    entry = Entry(run, names[0])
    environment = jinja2.Environment(finalize=shown, undefined=jinja2.StrictUndefined, trim_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(contents(entry, asked))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def shown(value):
    """What the template shows of a value: blocks as markdown, in which all text is escaped."""
    return to_markdown(value) if isinstance(value, list) else value


def contents(entry, asked):
    """{name in the template: blocks, or escaped text}."""
    entries = [entry]
    marks = [[name, mark_cell(decide(entry, asked))] for name, (_, decide) in MARKS.items()]
    by_name = {row[0].partition(":")[0]: row for row in method.method_blocks(entries)[-1].rows}
    groups, all_groups = group_parts(entries, asked)
    elsewhere = without_heading(evidence.batch_blocks(entries)) + site_blocks(entry)
    return {
        "name": markdown_text(entry.name),
        "folder": markdown_text(Code(str(entry.run))),
        "sentence": [Paragraph(sentence(entry))],
        "warnings": warnings(entry),
        "summary": [Bullets([summary_line(*question) for question in chosen(entry)])],
        "marks": [Table(["Mark", "Verdict"], marks, prose=True)],
        "purpose": [Paragraph(purpose(entry))],
        "data": [table(pick(by_name, OF_DATA) + data_rows(entry))],
        "cohort": without_heading(cohort_blocks(entries)),
        "model": [table([*model_rows(entry), *pick(by_name, ("Input", "Taught by"))])],
        "training": [table([*training_rows(entry), *pick(by_name, of_training(entry))])],
        "evaluation": [table(pick(by_name, ("Views averaged", "Threshold rule", "Intervals")))],
        "results": result_blocks(entries),
        "promise": without_heading(main.promise_blocks(entries)) + triage_blocks(entries),
        "groups": groups,
        "all_groups": all_groups,
        "looks": look_blocks(entry),
        "elsewhere": elsewhere or [Paragraph("No images of another place are on record.")],
        "not_done": [Bullets([*not_done(entry), *NEVER])],
        "made": [table(made_rows(entry))],
    }


def table(rows):
    """A Table of [item, answer]."""
    return Table(["Item", "Answer"], rows, prose=True)


def pick(by_name, names):
    """The rows of these names, of those that there are."""
    return [by_name[name] for name in names if name in by_name]


def without_heading(blocks):
    """Blocks of the report for a section that has a heading of its own."""
    return [block for block in blocks if not isinstance(block, Heading)]


# ---------------------------------------------------------------- in short


def sentence(entry):
    """What the model is, in one sentence."""
    asked = ", ".join(entry.findings)
    return f"{entry.name} gives a chest radiograph a score for {asked}, and calls it by a threshold."


def purpose(entry):
    """What is asked of an image, and what the threshold is for."""
    if alone([entry]):
        asked = f"whether an image shows {entry.findings[0]}, against {entry.absent(entry.findings[0])}"
    elif entry.task.kind == "softmax":
        asked = f"which of {', '.join(entry.task.classes)} an image shows"
    else:
        asked = f"which of {', '.join(entry.findings)} an image shows, any number of them"
    return (
        f"The model answers {asked}. Its threshold is chosen to miss few of the sick: recall >= "
        f"{entry.min_recall:g} on validation, and then the highest precision."
    )


def warnings(entry):
    """What a reader must know before any figure."""
    texts = []
    if entry.synthetic:
        texts.append("SYNTHETIC: it was trained and tested on drawings. Its figures say nothing of patients.")
    if not entry.results["finished"]:
        done, planned = len(entry.results["history"]), entry.results["recipe"].get("epochs", "?")
        texts.append(f"UNFINISHED: training was interrupted after epoch {done} of {planned}.")
    for warn in (method.optimistic, method.copied):
        if text := warn(entry):
            texts.append(f"{text[0].upper()}{text[1:]}.")
    return [Paragraph(Best(text)) for text in texts]


def chosen(entry):
    """[(finding, row of figures on test)] at @Rec, of those that have one."""
    rows = [(finding, entry.row(finding, "test", "at_rec")) for finding in entry.findings]
    return [(finding, row) for finding, row in rows if row]


def summary_line(finding, row):
    """The figures that matter most, of one finding."""
    sick, healthy = row["tp"] + row["fn"], row["tn"] + row["fp"]
    empty = f"; it {calls(row)}" if calls(row) else ""
    return (
        f"{finding} @Rec {four_digits(row['thr'])}: on test recall {with_interval(row, 'recall')} "
        f"({row['fn']} of {sick} missed), specificity {with_interval(row, 'specificity')} ({row['fp']} false "
        f"alarms of {healthy}), AUROC {with_interval(row, 'auroc')}{empty}"
    )


# ---------------------------------------------------------------- data, model, training


def data_rows(entry):
    """What was done with images that are not plain: views, labels that are missing or uncertain."""
    settings, split = entry.results["data"], entry.results["split"]
    rows = [["Views", settings.get("views", "not told apart by the version that trained")]]
    if entry.task.kind == "sigmoid":
        uncertain = settings.get("uncertain", "ignore")
        rows.append(["Uncertain labels", f"--uncertain {uncertain}"])
        rows.append(
            ["Empty labels", f"--blank {settings.get('blank', 'auto')}; unknown ones train and test nothing"]
        )
        if settings.get("readers"):
            rows.append(["Several readers", f"--readers {settings['readers']}"])
    else:
        rows.append(["Missing labels", "none: the folder of an image is its label"])
    if size := split.get("original_size"):
        spans = [f"{name} {low} to {high} px" for name, (low, high) in size.items()]
        rows.append(["Size of the training images", ", ".join(spans)])
    return rows


def model_rows(entry):
    """What the network is, where it comes from, and what it gives."""
    results, task = entry.results, entry.task
    rows = [
        ["Network", entry.base],
        ["Parameters", f"{results['params']:,}"],
        ["Begins with", beginning(results)],
    ]
    if members := results.get("members"):
        rows.append(["Members", ", ".join(str(member["run"]) for member in members)])
    config = {
        name: value for name, value in results["model_config"].items() if not isinstance(value, (list, dict))
    }
    rows.append(["Shape", settings_text(config)])
    score = ", ".join(task.score_columns.values())
    nature = scaling.nature(entry.calibration, entry.run) or "near the prevalence on validation as they are"
    rows.append(["Output", f"{score}, from 0 to 1; {nature}"])
    rows.append(["Needs", "a radiograph, as DICOM or another image; no clinical data"])
    odd = "scored all the same; predict.py says in a note what is unlike the training images, and why"
    rows.append(["Odd images", odd])
    return rows


def beginning(results):
    """Where the weights come from that training began with, as text."""
    if results.get("members"):
        return "the members, which were trained on their own"
    if results["model_config"]["kind"] == "linear":
        return "nothing: it is fitted in one step"
    parts = []
    if weights := results.get("weights"):
        parts.append(
            f"weights {Path(str(weights.get('path', '?'))).name}, SHA-256 {weights.get('sha256', '?')}"
        )
    init = results.get("init")
    if init and init.get("own"):
        parts.append(f"an encoder trained without labels first, in {init['minutes']:.1f} of the minutes")
    elif init:
        parts.append(f"the encoder of {init.get('run', '?')}, trained without labels")
    return "; ".join(parts) or "random weights"


def of_training(entry):
    """The rows of the report's method that are about training."""
    if not has_epochs(entry):
        return ("Other hospitals in training",)
    return ("Model selection", "Other hospitals in training")


def training_rows(entry):
    """How it was trained."""
    results, recipe = entry.results, entry.results["recipe"]
    rows = []
    if results["history"] and "epochs" in recipe:
        planned = recipe["epochs"]
        rows.append(
            ["Epochs", f"{len(results['history'])} of {planned}, the best is number {results['best_epoch']}"]
        )
    rows.append(["Class imbalance", f"--balance {', '.join(scaling.balances(results)) or 'none'}"])
    if "seed" in results and entry.run.kind != "linear":  # which draws nothing
        rows.append(["Seed", str(results["seed"])])
    rows.append(["Time", f"{entry.minutes:.1f} min on {results.get('device', 'an unknown device')}"])
    # Settings of a part that was not used say nothing.
    idle = {"seed", "epochs", "balance"}
    if recipe.get("loss") != "focal":
        idle.add("focal_gamma")
    if "teacher" not in results:
        idle.add("teacher_weight")
    used = {name: value for name, value in recipe.items() if name not in idle}
    rows.append(["Settings", settings_text(used)])
    return rows


def settings_text(settings):
    """Settings as text; those that do nothing are counted."""
    used = {name: value for name, value in settings.items() if value not in UNSET}
    text = ", ".join(f"{name} {value}" for name, value in used.items()) or "none"
    unset = len(settings) - len(used)
    return f"{text} ({unset} more are off; results.json has all)" if unset else text


# ---------------------------------------------------------------- figures


def result_blocks(entries):
    """The figures on validation and test, of classes, as probabilities, and what they predict."""
    (entry,) = entries
    rows = []
    for finding, e in questions(entries):
        for point in points(entries):
            for side, word in (("val", "validation"), ("test", "test")):
                if row := e.row(finding, side, point):
                    cells = [f"{finding} {POINTS[point]}, {word}", four_digits(row["thr"])]
                    rows.append(cells + [with_interval(row, key) for key in FIGURES.values()])
    blocks = [Paragraph(main.main_text(entries)), Table(["Finding", "Threshold", *FIGURES], rows)]
    if missing := main.missing_text(entries).strip():
        blocks.append(Paragraph(missing))
    if not alone(entries):
        for side, word in (("val", "validation"), ("test", "test")):
            if "auroc" in entry.summary[side]:
                mean = in_words(entry.summary[side]["auroc"])
                blocks.append(Paragraph(f"Mean AUROC on {word}: {mean}."))
    blocks += main.class_blocks(entries) + probabilities.probability_blocks(entries)
    return blocks + probabilities.predictive_blocks(entries)


def group_parts(entries, asked):
    """(Figures of groups of patients, or that none are known; the tables that would fill pages there)."""
    blocks = without_heading(group_blocks(entries, asked, few=math.inf))
    if not blocks:
        return [Paragraph("No group is known: these data tell no age, sex, view, machine or cause.")], []
    if len(entries[0].findings) <= FEW:
        return blocks, []
    return [*blocks[:2], Paragraph("The tables of all findings and groups are at the end.")], blocks[2:]


def look_blocks(entry):
    """What audit.py and explain.py have found."""
    maps = evidence.map_blocks([entry])
    if not maps:
        explain = Code(f"python explain.py --run {shlex.quote(str(entry.run))}")
        maps = [Paragraph(("Its maps are not tested: ", explain, "."))]
    return audit_blocks([entry]) + maps


def site_blocks(entry):
    """Thresholds that were chosen for other hospitals, of this checkpoint."""
    rows, suffix = [], f"-{entry.suffix}" if entry.suffix else ""
    for path in sorted(entry.run.folder.glob(f"sites/*{suffix}.json")):
        name = path.stem.removesuffix(suffix)
        if not suffix and name.endswith("-tta"):
            continue
        try:
            site = entry.run.site(name, entry.suffix)
        except InputError as error:
            say(f"note: left out of the card: {error}")
            continue
        rows += [site_row(name, site, finding) for finding in entry.findings]
    if not rows:
        return []
    text = (
        "From calibrate.py --site: thresholds chosen on labelled images of another place. Held out: chosen "
        "on half of the patients there, tried on the other half (--report)."
    )
    head = ["Place: finding", "Images", "Patients with it", "@Rec there", "Shipped", "Recall @Rec held out"]
    return [Paragraph(text), Table([*head, "Recall as shipped held out"], rows)]


def site_row(name, site, finding):
    """What a site's file says of a finding, as cells."""
    found, shipped = site["findings"][finding], site["shipped"].get(finding)
    tried = (found.get("held_out") or {}).get("points", {})
    cells = [f"{name}: {finding}", str(site["images"]), str(found.get("positive_patients", "-"))]
    for threshold in (found.get("threshold"), shipped):
        cells.append("-" if threshold is None else four_digits(threshold))
    return cells + [with_interval(tried.get(point), "recall") for point in ("at_rec", "at_shipped")]


# ---------------------------------------------------------------- the rest


def not_done(entry):
    """What this run lacks that a script here could have done."""
    run, split, items = entry.run, entry.results["split"], []
    place = shlex.quote(str(run))
    if audit_of(run) is None:
        items.append(
            ("No audit of what it reads besides the lungs: ", Code(f"python audit.py --run {place}"), ".")
        )
    if not entry.explained:
        items.append(("No test of its maps: ", Code(f"python explain.py --run {place}"), "."))
    if split.get("test_from", "published") != "published":
        items.append("No test set apart: training and test images come from the same place.")
    batches = [b for b in run.batches().values() if b["checkpoint"] == entry.calibration["checkpoint"]]
    if not batches and not list(run.folder.glob("sites/*.json")):
        items.append(
            (
                "No images of another hospital: ",
                Code(f"python predict.py FOLDER --run {place} --keep NAME"),
                ".",
            )
        )
    if not (run.folder / "monitor").is_dir():
        items.append("No monitoring of its recall in use: monitor.py.")
    without = [name for name, found in entry.calibrated.items() if not has_guarantee(found)]
    if without:
        items.append(
            f"No threshold with a guarantee for {', '.join(without)}: too few patients in validation."
        )
    if "seed" in entry.results and not entry.members and entry.run.kind != "linear":
        items.append("One seed: this card does not show how much another one changes the figures.")
    return items


def has_guarantee(of_finding):
    """Whether a finding has a threshold @Guar."""
    return of_finding.get("guarantee", {}).get("threshold") is not None


def made_rows(entry):
    """Commands, versions and checksums."""
    results, calibration = entry.results, entry.calibration
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    chosen_by = f"recall floor {entry.min_recall:g}, {calibration['bootstrap']} bootstrap draws, by "
    chosen_by += calibration.get("by", "image")
    if entry.suffix:
        chosen_by += ", test-time augmentation"
    return [
        ["Trained by", Code(results.get("command", "not recorded"))],
        ["Calibrated with", chosen_by],
        ["Device", str(results.get("device", "not recorded"))],
        ["Versions", versions or "not recorded"],
        ["Checkpoint, SHA-256", Code(calibration["checkpoint"])],
        ["Split of the images, SHA-256", Code(results["split"]["fingerprint"])],
    ]
