"""The tables of the report, as blocks for render.py. No torch, no drawing."""

import csv
import itertools

import numpy as np

from calibration.intervals import compare_at_thresholds, proportion_interval
from calibration.wording import chance_text, warnings
from common import scaling
from common.console import printable
from common.files import atomic_path
from common.proportions import no_width, reported_interval
from images.split import say_shared
from images.twins import say_copies, told
from metrics import predictive_values
from report.evidence import batch_blocks, map_blocks, unique
from report.render import Code, Heading, Paragraph, Table
from report.rows import POINTS, also_trained_on, families, missing_ensembles

FIGURES = ("acc", "precision", "recall", "specificity", "f1", "auroc")
HEADER = ("Model", "Params (M)", "Time (min)", "Acc", "Prec", "Recall", "Spec", "F1", "AUROC", "Thr")


def section(entries, shown):
    """The blocks of one test set: long tables of `shown`, where an ensemble stands for its members."""
    blocks = main_blocks(entries) + shift_blocks(entries)
    for part in (interval_blocks, pair_blocks, probability_blocks, predictive_blocks, subgroup_blocks):
        blocks += part(shown)
    return blocks + batch_blocks(entries) + map_blocks(entries) + method_blocks(entries)


def interval(low, high):
    return f"[{low:.3f}, {high:.3f}]"


def with_interval(row, key):
    """ "0.951 [0.931, 0.968]": a figure with its 95% interval."""
    return f"{row[key]:.3f} {interval(*reported_interval(row, key))}"


def size_and_time(entry):
    """Millions of parameters and minutes of training, as text."""
    params = entry.results["params"] / 1e6
    return [f"{params:.{4 if params < 0.1 else 2}f}", f"{entry.minutes:.1f}"]


def floors(entries):
    """The recall floors of the entries, as text."""
    return ", ".join(sorted({f"{e.min_recall:g}" for e in entries}))


def main_rows(entries):
    """Rows of the main table, lists of str in the order of HEADER: all @Rec, then all @0.5."""
    rows = []
    for point in ("at_rec", "at_0.5"):
        mark = POINTS[point]
        for e in entries:
            row = e.points["test", point]
            figures = [f"{row[k]:.3f}" for k in FIGURES] + [f"{row['thr']:.4f}"]
            rows.append([f"{e.name} {mark}", *size_and_time(e), *figures])
        for family in families(entries):
            values = [[e.points["test", point][k] for k in (*FIGURES, "thr")] for e in family]
            pairs = zip(np.mean(values, axis=0), np.std(values, axis=0, ddof=1))
            name = f"{family[0].base}, mean ± sd of {len(family)} seeds {mark}"
            size, minutes = family[0].results["params"] / 1e6, np.mean([e.minutes for e in family])
            rows.append([name, f"{size:.2f}", f"{minutes:.1f}", *(f"{m:.3f} ± {s:.3f}" for m, s in pairs)])
    return rows


def main_blocks(entries):
    """The results table, and how to make the ensembles that are missing."""
    first, truth = entries[0], entries[0].test.truth
    warning = "SYNTHETIC data set, not patients: " if first.synthetic else ""
    absent, present = int((truth == 0).sum()), int(truth.sum())
    chosen_on = unique((len(e.val.truth) for e in entries), " or ")
    text = (
        f"Test: {len(truth)} images ({absent} {first.healthy}, {present} {first.finding}), at thresholds "
        f"chosen on validation ({chosen_on} images). @Rec is the threshold of highest precision among those "
        f"with a validation recall >= {floors(entries)}; @0.5 is the threshold 0.5. AUROC does not depend on "
        "the threshold. Time is that of training, validation included."
    )
    blocks = [Heading(2, warning + first.set), *split_blocks(entries)]
    blocks += [Paragraph(text), Table(HEADER, main_rows(entries))]
    return blocks + missing_blocks(entries)


def missing_blocks(entries):
    """How to make the ensembles that are missing."""
    return [
        Paragraph((f"To add the ensemble of the {count} seeds of {name}, run ", Code(command), "."))
        for name, count, command in missing_ensembles(entries)
    ]


def shift_blocks(entries):
    """What the recall floor promises, and what is left of it on test."""
    sides = ("val", "test")
    head = ["Model", "Threshold", *(f"{k} {s}" for k in ("Recall", "Spec", "AUROC") for s in sides)]
    rows = []
    for e, point in itertools.product(entries, ("at_rec", "at_guaranteed")):
        if ("val", point) in e.points and ("test", point) in e.points:
            val, test = e.points["val", point], e.points["test", point]
            cells = [f"{val['recall']:.3f}", with_interval(test, "recall")]
            cells += [f"{val['specificity']:.3f}", with_interval(test, "specificity")]
            cells += [f"{val['auroc']:.3f}", f"{test['auroc']:.3f}"]
            rows.append([f"{e.name} {POINTS[point]}", f"{val['thr']:.4f}", *cells])
    promised, refused, chances = set(), set(), set()
    for e in entries:
        g, row = e.found[e.finding]["guarantee"], e.points["val", "at_rec"]
        chances.add(chance_text(row["tp"] + row["fn"], g["positive_patients"], e.min_recall))
        if g.get("threshold") is None:
            refused.add(g["why_not"])
        else:
            promise = f"recall >= {e.min_recall:g} with confidence {g['confidence']:g}"
            promised.add(f"{promise}, from {g['positive_patients']} patients with {e.finding}")
    text = (
        "@Rec meets the floor on the validation images. For new patients like them, its true recall is "
        f"below the floor with {' or '.join(sorted(chances))}."
    )
    if promised:
        text += f" @Guar applies the Neyman-Pearson umbrella rule to patients: {'; '.join(sorted(promised))}."
    text += (
        " No such promise survives a shift in the data, so compare validation with test. The validation "
        "images also chose the epoch, which flatters the validation figures a little."
    )
    if refused:
        text += f" Where @Guar is missing: {'; '.join(sorted(refused))}."
    title = "What the threshold promises, and the shift from validation to test"
    blocks = [Heading(3, title), Paragraph(text), Table(head, rows)]
    return blocks + warning_blocks([(e.name, warnings(e.found[e.finding], e.min_recall)) for e in entries])


def warning_blocks(found):
    """A paragraph of what is bad about figures: [(model, texts)]; none where nothing is."""
    texts = [f"{name}: {'; '.join(each)}" for name, each in found if each]
    return [Paragraph(f"Warning. {'. '.join(texts)}.")] if texts else []


def interval_blocks(entries):
    """95% intervals of the test figures."""
    named = {"Recall": "recall", "Specificity": "specificity", "Precision": "precision", "Accuracy": "acc"}
    named |= {"F1": "f1", "AUROC": "auroc", "AUPRC": "auprc"}
    rows = []
    for point, e in itertools.product(POINTS, entries):
        if row := e.points.get(("test", point)):
            delong = row["interval"]["auroc"].get("delong")
            cells = [with_interval(row, k) for k in named.values()]
            cells.append("-" if delong is None or no_width(delong) else interval(*delong))
            rows.append([f"{e.name} {POINTS[point]}", *cells])
    draws = unique((e.calibration["bootstrap"] for e in entries), " or ")
    drawn = "whole patients" if entries[0].test.patients_known else "single images (patients unknown)"
    text = (
        f"Percentile bootstrap: {drawn} are drawn {draws} times. Where every draw gives the same value, "
        "what the number of patients alone tells: Wilson's interval; for an AUROC of 1 the lower limit "
        "0.025^(1/m), m the fewer of sick and healthy patients. The intervals of DeLong (none at an AUROC "
        "of 1) and Wilson in calibration.json treat images as independent."
    )
    table = Table(["Model", *named, "AUROC (DeLong)"], rows)
    return [Heading(3, "How sure: 95% intervals on test"), Paragraph(text), table]


def leader(figure, names, values, spans, tied):
    """A sentence on which model is best: its names, values and their spans as text; tied: the pairs of
    positions whose difference has an interval with 0 inside."""
    best = max(range(len(names)), key=lambda i: values[i])
    level = [names[i] for i in range(len(names)) if (min(i, best), max(i, best)) in tied]
    text = f"Highest {figure} on test: {names[best]}, {spans[best]}; "
    text += f"not told apart from it: {'; '.join(level)}." if level else "it is told apart from every other."
    return f"{text} That is a finding and no way to choose: choose on validation."


def pair_blocks(entries):
    """Every two models on the same test images."""
    rows, tied = [], set()
    tests = {"auroc": "delong", "recall": "mcnemar_recall", "specificity": "mcnemar_specificity"}
    for (i, a), (j, b) in itertools.combinations(enumerate(entries), 2):
        sides = a.test.scores, a.threshold, b.test.scores, b.threshold
        d = compare_at_thresholds(a.test.truth, *sides, a.test.patients, a.calibration["bootstrap"])
        cells = [
            "{difference:+.3f} [{lo:+.3f}, {hi:+.3f}], p = {p:.2g}".format(**d[figure], p=d[test])
            for figure, test in tests.items()
        ]
        rows.append([f"{a.name} minus {b.name}", *cells])
        if d["auroc"]["lo"] <= 0 <= d["auroc"]["hi"] and d["delong"] > 0.05:
            tied.add((i, j))
    if not rows:
        return []
    drawn = "whole patients" if entries[0].test.patients_known else "images (patients unknown)"
    text = (
        "Differences on the same test images, recall and specificity @Rec. Intervals: 95%, paired bootstrap "
        f"of {drawn}. p-values: DeLong for AUROC, exact McNemar for the others, not corrected for the number "
        "of pairs."
    )
    found = [e.points["test", "at_rec"] for e in entries]
    spans = [with_interval(row, "auroc") for row in found]
    best = leader("AUROC", [e.name for e in entries], [row["auroc"] for row in found], spans, tied)
    head = ["Pair", "AUROC", "Recall @Rec", "Specificity @Rec"]
    return [Heading(3, "Which model is better"), Paragraph(best), Paragraph(text), Table(head, rows)]


def probability_blocks(entries):
    """Temperature or Platt scaling, and calibration error."""
    figures = list(itertools.product(("val", "test"), ("ECE", "Brier", "NLL")))
    rows = []
    for e in entries:
        quality = e.found[e.finding]["probability"]
        values = [[quality[s][when][k.lower()] for when in ("before", "after")] for s, k in figures]
        cells = ["{:.3f} → {:.3f}".format(*pair) for pair in values]
        rows.append([e.name, scaling.cell(e.calibration, e.finding), *cells])
    text = (
        "Each model has one temperature, which minimises NLL on validation, or a slope and a bias (Platt "
        "scaling) where calibrate.py was asked for them; figures are before → after. ECE is over 15 bins of "
        f"equal size. {scaling.in_report(entries)}"
    )
    head = ["Model", "Temperature", *(f"{k} {s}" for s, k in figures)]
    return [Heading(3, "Are the probabilities right"), Paragraph(text), Table(head, rows)]


def predictive_blocks(entries):
    """Predictive values where the finding is as common as on test, and where it is rarer."""
    first = entries[0]
    here = float(first.test.truth.mean())
    there = first.points["test", "at_rec"]["at_prevalence"]["prevalence"]
    there = there if 0 < there < 1 else 0.1
    rows = []
    for e in entries:
        row = e.points["test", "at_rec"]
        values = [v for p in (here, there) for v in predictive_values(row["recall"], row["specificity"], p)]
        rows.append([f"{e.name} @Rec", *(f"{v:.3f}" if np.isfinite(v) else "-" for v in values)])
    text = (
        f"Predictive values depend on how common the finding is: {here:.1%} of these test images show "
        f"{first.finding}. The last two columns assume a prevalence of {there:.0%}, with the same recall and "
        "specificity."
    )
    head = ["Model", *(f"{k} at {p}" for p in (f"{here:.1%}", f"{there:.0%}") for k in ("PPV", "NPV"))]
    return [Paragraph(text), Table(head, rows)]


def subgroup_blocks(entries):
    """Recall of bacterial and viral pneumonia, where the file names tell them apart."""
    causes, rows = {"bacteria": "bacterial", "virus": "viral"}, []
    for e in entries:
        called, names, cells = e.test.scores >= e.threshold, np.char.lower(e.test.files), []
        for word in causes:
            inside = (e.test.truth == 1) & (np.char.find(names, word) >= 0)
            if not inside.any():
                cells.append("-")
                continue
            hits, draws = called[inside], e.calibration["bootstrap"]
            span = interval(*proportion_interval(hits, e.test.patients[inside], draws))
            cells.append(f"{hits.mean():.3f} {span} (n = {inside.sum()})")
        rows.append([f"{e.name} @Rec", *cells])
    if all(cell == "-" for cell in rows[0][1:]):
        return []
    text = "Test recall @Rec by cause, as the file names tell it; 95% intervals, bootstrap of patients."
    head = ["Model", *(f"Recall, {cause}" for cause in causes.values())]
    return [Heading(3, "Subgroups"), Paragraph(text), Table(head, rows)]


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


def method_blocks(entries):
    """The items of STARD-AI and CLAIM that a script can answer."""
    first = entries[0]
    prevalence = f"validation {first.val.truth.mean():.1%}, test {first.test.truth.mean():.1%}"
    rule = (
        f"@Rec: highest precision with validation recall >= {floors(entries)}, exact over all scores; @Guar: "
        f"Neyman-Pearson umbrella on patients; both chosen on validation{placed(entries)} and applied "
        "unchanged to test"
    )
    standard = "the table of findings" if first.task.kind == "sigmoid" else "the class folder of each image"
    rows = method_rows(entries, standard, f"{first.finding}: {prevalence}", rule)
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
        looks, lungs = e.run.input_modes, d.get("lungs", "?")
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


def finding_rows(entries):
    """Rows of several findings @Rec on test, lists of str in the order of HEADER."""
    rows = []
    for e in entries:
        for name, found in e.found.items():
            if "test" in found:
                row = found["test"]["at_rec"]
                figures = [f"{row[k]:.3f}" for k in FIGURES] + [f"{row['thr']:.4f}"]
                rows.append([f"{e.name}, {name} @Rec", *size_and_time(e), *figures])
    return rows


def write_csv(path, groups):
    """The rows of the main tables with their data set, as CSV; `groups` are lists of Entries."""
    with atomic_path(path) as tmp, open(tmp, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Data", *HEADER])
        for entries in groups:
            for row in (finding_rows if entries[0].several else main_rows)(entries):
                writer.writerow([printable(cell) for cell in (entries[0].set, *row)])
