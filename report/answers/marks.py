"""Can I trust it? Up to eight marks of one run, each kept, open or broken, with its figure. No torch, no
drawing.

"kept" is said where the figures show it, "broken" where they show the contrary beyond chance, "open" where
nobody looked, or where there are too few patients to tell.
"""

import shlex
from typing import NamedTuple

import numpy as np
from scipy.stats import binom, norm

from calibration.shift import one_each
from calibration.wording import calls
from cohort.who import LEAST
from common import scaling
from common.proportions import in_words, reported_interval
from metrics import positives_needed
from report.answers.standing import shortcut_of
from report.answers.threshold import floor_verdict, recall_text
from report.cells import alone, named
from report.render import Code
from report.tables.cohort import groups_on

FAR = 0.1  # a figure on test that is farther than this from validation is another figure
POOR = 0.05  # a calibration error above it is one that people would notice
DRAWS = 999  # simulated label sets
BINS = 15  # of equal size, as of the calibration error
ORDER = ("broken", "open", "kept")
MORE = "more test patients, or another hospital's: calibrate.py --site"
NAMES = "a table that names the patient of every image: --patients in training"


class Mark(NamedTuple):
    """verdict: one of ORDER; text: the figure; settle: what would settle an open mark, Code or text."""

    verdict: str
    text: str
    settle: str = ""


def worst(marks):
    """The worst of the marks of several seeds."""
    found = min(marks, key=lambda mark: ORDER.index(mark.verdict))
    if len(marks) == 1:
        return found
    return found._replace(text=f"{found.text} (worst of {len(marks)} seeds)")


def on_both(entry):
    """The findings with a threshold and figures on validation and on test."""
    return [name for name in entry.findings if entry.row(name, "test", "at_rec")]


# ---------------------------------------------------------------- figures on test


def floor_mark(entry, asked):
    """The recall floor @Rec on test."""
    verdicts = {}
    for name in on_both(entry):
        row = entry.row(name, "test", "at_rec")
        verdict = floor_verdict(entry, name, row)
        if verdict != "broken" and calls(row):  # that keeps any floor, and is worth nothing
            verdict = calls(row)
        verdicts.setdefault(verdict, []).append((row["recall"], name, row))
    if not verdicts:
        return Mark("open", "no threshold has figures on test", MORE)
    order = ("broken", *sorted(verdicts.keys() - {"broken", "not refuted", "kept"}), "not refuted", "kept")
    key = next(word for word in order if word in verdicts)
    _, name, row = min(verdicts[key], key=lambda found: found[0])
    empty = f"; it {calls(row)}" if calls(row) else ""
    text = named(entry, name, f"{recall_text(entry, name, row)}, floor {entry.min_recall:g}{empty}")
    if not alone([entry]):
        total = sum(map(len, verdicts.values()))
        text = f"{len(verdicts[key])} of {total} findings: {key}; lowest {text}"
    return Mark({"kept": "kept", "not refuted": "open"}.get(key, "broken"), text, MORE)


def transport_mark(entry, asked):
    """Whether AUROC, recall and specificity @Rec on test are those of validation. The intervals of the
    differences come from those of the figures (MOVER: Zou and Donner 2008, Statistics in Medicine 27:1693)
    and hold for all of them at once (Bonferroni)."""
    names, found = on_both(entry), []
    level = norm.isf(0.025 / max(1, 3 * len(names))) / norm.isf(0.025)  # by how much wider they are
    for name in names:
        val, test = (entry.row(name, side, "at_rec") for side in ("val", "test"))
        for key, word in (("auroc", "AUROC"), ("recall", "recall"), ("specificity", "specificity")):
            low, high = difference_span(val, test, key, level)
            text = named(entry, name, f"{word} {val[key]:.3f} → {test[key]:.3f}")
            found.append((abs(test[key] - val[key]), low, high, text))
    if not found:
        return Mark("open", "no threshold has figures on both", MORE)
    found.sort(key=lambda one: -one[0])
    differing = [text for _, low, high, text in found if low > 0 or high < 0]
    if differing:
        count = f" ({len(differing)} of {len(found)} figures differ)" if len(differing) > 2 else ""
        return Mark("broken", f"{'; '.join(differing[:2])}{count}")
    unsure = [(low, high, text) for _, low, high, text in found if low < -FAR or high > FAR]
    if unsure:
        low, high, text = max(unsure, key=lambda one: one[1] - one[0])
        text += f": too few patients to exclude a difference of {min(1, max(-low, high)):.2f}"
        return Mark("open", text, MORE)
    return Mark("kept", f"{found[0][3]}: no difference beyond {FAR:g}")


def difference_span(val, test, key, wider):
    """The interval (lo, hi) of a figure of the row `test` minus that of `val`."""
    a, (a_low, a_high) = test[key], reported_interval(test, key)
    b, (b_low, b_high) = val[key], reported_interval(val, key)
    below, above = np.hypot(a - a_low, b_high - b), np.hypot(a_high - a, b - b_low)
    return a - b - wider * below, a - b + wider * above


def probability_mark(entry, asked):
    """Whether the scores that predict.py gives are probabilities on test: the calibration error is small, or
    what chance alone would make of it."""
    when = "after" if scaling.applied(entry.calibration) else "before"
    found = []
    for name in entry.findings:
        quality = entry.calibrated[name].get("probability", {}).get("test")
        if quality:
            found.append((quality[when]["ece"], name))
    if not found:
        return Mark("open", "no finding has figures on test", MORE)
    ece, name = max(found)
    if ece <= POOR:
        return Mark("kept", named(entry, name, f"calibration error {ece:.3f} on test"))
    # Of several findings the one that chance explains least speaks, with Bonferroni's correction for all.
    p_value, ece, name = min((chance_of_error(entry, name), ece, name) for ece, name in found if ece > POOR)
    p_value = min(1.0, p_value * len(found))
    text = named(entry, name, f"calibration error {ece:.3f} on test")
    if p_value <= 0.05:
        return Mark("broken", f"{text}, more than chance")
    return Mark("open", f"{text}, which chance could make of right probabilities (p {p_value:.2f})", MORE)


def chance_of_error(entry, finding):
    """The p-value of the calibration error of a finding's test images, one a patient: the share of label sets
    drawn by the scores themselves that have a larger one."""
    test = entry.column(finding, "test")
    one = one_each(test.patients)
    p, y = test.scores[one], test.truth[one]
    order = np.argsort(p, kind="stable")
    p, y = p[order], y[order]
    starts = np.unique(np.linspace(0, len(p), BINS, endpoint=False).astype(int))
    drawn = np.random.default_rng(0).random((DRAWS, len(p))) < p
    errors = np.abs(np.add.reduceat(np.vstack([y, drawn]) - p, starts, axis=1)).sum(axis=1)
    return (1 + int((errors[1:] >= errors[0] - 1e-12).sum())) / (1 + DRAWS)


def group_mark(entry, asked):
    """Whether a group of patients lies under the recall floor on test."""
    rows, names = [], on_both(entry)
    for name in names:
        found, _ = groups_on(entry, name, "test", asked)
        for (attribute, value), row in zip(found["groups"], found["figures"].get("recall @Rec", ())):
            if "hi" in row:
                rows.append((row, named(entry, name, f"{attribute} {value} {in_words(row)}"), name))
    if not rows:
        settle = "a table with age, sex, view or machine (docs/GROUPS.md)"
        return Mark("open", f"no group of {LEAST} patients is known", settle)
    low = [one for one in rows if one[0]["broken"]]
    # The intervals hold for all groups of a finding at once. Where all floors hold, so many findings have a
    # broken group with a chance of 0.025 each.
    by_chance = binom.sf(len({one[2] for one in low}) - 1, len(names), 0.025)
    if low and by_chance <= 0.05:
        return Mark("broken", f"{len(low)} of {len(rows)} groups; {least_of(low)}")
    if low:
        lie = "lies below it by its" if len(low) == 1 else "lie below it by their"
        chance = f"chance among {len(names)} findings may explain (p {by_chance:.2f})"
        text = f"{len(low)} of {len(rows)} groups {lie} own interval, which {chance}; {least_of(low)}"
        return Mark("open", text, MORE)
    unsure = [one for one in rows if one[0]["lo"] < entry.min_recall]
    if unsure:
        text = f"{len(unsure)} of {len(rows)} groups could be under it; {least_of(unsure)}"
        return Mark("open", text, MORE)
    return Mark("kept", f"none of {len(rows)} groups; {least_of(rows)}")


def least_of(rows):
    """The text of the group with the lowest recall."""
    return "lowest " + min(rows, key=lambda one: one[0]["value"])[1]


# ---------------------------------------------------------------- what is on record


def shortcut_mark(entry, asked):
    """What audit.py says of shortcuts: on validation, on which a choice may rest, or else on test."""
    audit = Code(shlex.join(["python", "audit.py", "--run", entry.run.folder.as_posix()]))
    if shortcut := shortcut_of(entry, "val"):
        return Mark(shortcut["verdict"], shortcut["text"], "its audit says why")
    if shortcut := shortcut_of(entry, "test"):
        return Mark(shortcut["verdict"], f"{shortcut['text']} (on test alone)", audit)
    return Mark("open", "not audited", audit)


def patients_mark(entry, asked):
    """Whether patients are known, and on one side each."""
    split = entry.results["split"]
    unknown = split.get("unknown_patients", 0)
    shared, shared_test = split["shared_patients"], split.get("shared_patients_test")
    if shared or shared_test:
        text = f"{shared} validation images share a patient with training"
        if shared_test:
            text += f", {shared_test} test images with either"
        return Mark("broken", text)
    if not entry.columns["val"].patients_known or unknown >= split["train"] + split["val"]:
        return Mark("open", "patients unknown", NAMES)
    if unknown:
        return Mark("open", f"unknown for {unknown} images; no other is on two sides", NAMES)
    test_unknown = entry.people["test"]["unknown_patients"]
    if shared_test is not None and test_unknown:
        return Mark("open", f"unknown for {test_unknown} test images; no other is on two sides", NAMES)
    if shared_test is None:
        text = "apart in training and validation; those of test are numbered separately"
        return Mark("open", text, NAMES)
    return Mark("kept", "no patient is on two sides")


def copies_mark(entry, asked):
    """Whether an image is on two sides, byte for byte or by its looks."""
    exact, alike = entry.results["split"].get("copies"), entry.calibration.get("alike")
    counts = {**(exact or {})}
    for pair, number in (alike or {}).items():
        counts[pair] = max(number, counts.get(pair, 0))
    if any(counts.values()):
        words = {"val_train": "validation and training", "test_train": "test and training"}
        pairs = [f"{n} on {words.get(pair, 'test and validation')}" for pair, n in counts.items() if n]
        return Mark("broken", f"images {', '.join(pairs)}")
    if exact is None or alike is None:
        looked = "looks were not compared" if alike is None else "bytes were not compared"
        return Mark("open", f"{looked} by the version that made it", "training and calibrating it again")
    return Mark("kept", "none, by bytes and by looks")


def promise_mark(entry, asked):
    """Whether validation has enough patients for @Guar."""
    enough, few = [], []
    for name, of_finding in entry.calibrated.items():
        guarantee = of_finding.get("guarantee")
        if guarantee is None:
            few.append((0, named(entry, name, of_finding["why_not"])))
            continue
        count = guarantee["positive_patients"]
        needed = "no number is enough"
        if entry.min_recall < 1:
            needed = f"{positives_needed(entry.min_recall, guarantee['confidence'])} needed"
        text = named(entry, name, f"{count} validation patients with it, {needed}")
        kept = guarantee["threshold"] is not None
        (enough if kept else few).append((count, text))
    if few:
        count = "" if alone([entry]) else f"{len(few)} of {len(entry.findings)} findings have too few; "
        return Mark("broken", f"{count}{min(few)[1]}")
    return Mark("kept", min(enough)[1])
