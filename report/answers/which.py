"""Which model? What validation can tell, with the figures that support it. No torch, no drawing."""

import shlex

from report.answers.standing import ROUNDING, patients_needed, shortcut_of
from report.cells import alone, mean, size_and_time, three
from report.render import Best, Bullets, Code, Heading, Paragraph, Table

HEADING = Heading(4, "Which model?")
MANY = 1_000_000  # patients; more than that nobody has


def which_blocks(found):
    """The answer, a part for each set of validation images; `found`: Standings of one test set."""
    blocks = [HEADING]
    for standing in found:
        where = ""
        if len(found) > 1:
            names = "; ".join(c.name for c in standing.candidates)
            where = f"On the {standing.patients} validation patients of {names}: "
        blocks += answer_of(standing, where)
    if len(found) > 1:
        text = "Models on different validation images cannot be held against each other by validation."
        blocks.append(Paragraph(text))
    return blocks


def answer_of(standing, where):
    """The answer for one set of validation images."""
    notes = [*repeated(standing), *ensembles(standing), *shortcut_readers(standing)]
    if len(standing.remaining) == 1:
        text, blocks = one_text(standing), []
    else:
        text, blocks = several_text(standing), [remaining_table(standing), needed_bullets(standing)]
    if notes:
        blocks.append(Bullets(notes))
    answer, rest = text
    before = ""
    if standing.all_read:
        before = (
            "The audit calls every model here a shortcut reader, so none can be recommended. The least bad: "
        )
    return [Paragraph((where, before, Best(answer), rest)), *blocks]


# ---------------------------------------------------------------- one remains


def one_text(standing):
    """(the only one that remains, what supports it)."""
    best, *others = standing.behind
    name, what = best.candidate.name, f": {figure(standing)} {best.candidate.value:.4f} on validation."
    if len(standing.candidates) == 1:
        return name, f"{what} It is the only model here, so nothing was compared."
    if not others and not audited(best.candidate):
        return "Audit first", f". {name} is left only because nobody audited it; the others read shortcuts."
    if not others:
        return name, f"{what} It is the only one that the audit does not call a shortcut reader."
    return f"Validation prefers {name}", f"{what} {distance_text(standing)} {test_text(standing)}"


def distance_text(standing):
    """How far the next model is behind the only one that remains."""
    second, how_far, chance = standing.behind[1], "in every draw", ""
    if second.error > ROUNDING:
        ratio = second.difference / second.error
        how_far = f"{ratio:.1f} standard errors of the difference"
        if ratio < 1.96:
            chance = " Less than 2 may still be chance."
    name = second.candidate.name
    return (
        f"The next, {name}, is {second.difference:.4f} behind: {how_far} (paired bootstrap of "
        f"{people(standing)}; up to 1, it would stay in the choice).{chance}"
    )


def figure(standing):
    """What the models are ranked by, in words."""
    return "AUROC" if alone(standing.candidates[0].entries) else "mean AUROC"


def people(standing):
    """How many the bootstrap draws from, in words."""
    first = standing.candidates[0].entries[0]
    if not first.columns["val"].patients_known:
        return f"{standing.patients} images, patients unknown"
    unknown = first.people["val"]["unknown_patients"]
    of_whom = f", of whom {unknown} are single images of unknown patients" if unknown else ""
    return f"{standing.patients} patients{of_whom}"


def on_test(candidate):
    """{word: mean over seeds of a figure on test, None where one has none}."""
    first = candidate.entries[0]
    if not alone(candidate.entries):
        figures = [e.summary["test"].get("auroc", {}).get("value") for e in candidate.entries]
        return {"Mean AUROC": mean(figures)}
    rows = [e.row(first.findings[0], "test", "at_rec") for e in candidate.entries]
    keys = {"AUROC": "auroc", "Recall @Rec": "recall", "Specificity @Rec": "specificity"}
    return {word: mean([row[key] for row in rows]) for word, key in keys.items()}


def test_text(standing):
    """What test shows of all candidates, as text."""
    shown, each = [], [on_test(c) for c in standing.candidates]
    for word in each[0]:
        known = [figures[word] for figures in each if figures[word] is not None]
        if known:
            word = word[0].lower() + word[1:] if word != "AUROC" else word
            shown.append(f"{word} runs from {min(known):.3f} to {max(known):.3f}")
    return f"Test is shown and was not used to choose: {', '.join(shown)} over all models."


# ---------------------------------------------------------------- several remain


def several_text(standing):
    """(that there is no winner, why)."""
    count, total = len(standing.remaining), len(standing.candidates)
    which = f"These {count}" if count == total else f"{count} of {total} models"
    return "Validation cannot tell", (
        f". {which} are within one standard error of the best {figure(standing)} there "
        f"(paired bootstrap of {people(standing)}), so no winner is named. {test_text(standing)}"
    )


def remaining_table(standing):
    """Those that remain, with size and time; what test shows of them stands apart."""
    rows = []
    for b in standing.behind:
        if b.remains:
            cells = [f"{b.candidate.value:.4f}", f"{b.difference:.4f}", f"{b.error:.4f}"]
            shown = [three(value) for value in on_test(b.candidate).values()]
            rows.append([b.candidate.name, *cells, *size_and_time(*b.candidate.entries), *shown])
    words = list(on_test(standing.remaining[0]))
    head = ["Model", figure(standing), "Behind", "SE", "Params (M)", "Time (min)", *words]
    groups = (("", 1), ("on validation", 3), ("", 2), ("on test, not used", len(words)))
    return Table(head, rows, groups=groups)


def needed_bullets(standing):
    """What would tell apart those that remain."""
    second = standing.behind[1]
    number = patients_needed(second, standing.patients)
    text = "More validation patients like these would not tell the first two apart: their AUROC is the same."
    if number is not None:
        count = f"About {number:,}" if number <= MANY else "More than a million"
        text = (
            f"{count} validation patients instead of {standing.patients}, if the first two stay "
            f"{second.difference:.4f} apart."
        )
    entries, sites = [e for c in standing.remaining for e in c.entries], []
    for suffix, flag in (("", ""), ("-tta", " --tta")):
        if folders := [e.run.folder.as_posix() for e in entries if e.suffix == suffix]:
            command = f"python calibrate.py --site DIR --name NAME{flag} --run {shlex.join(folders)}"
            sites += [" and "] * bool(sites) + [Code(command)]
    audit = Code(f"python audit.py --run {shlex.quote(entries[0].run.folder.as_posix())}")
    return Bullets(
        [
            ("What would tell them apart: labelled images of another hospital, ", *sites, "."),
            ("Whether one reads shortcuts: ", audit, ", and so on for the others."),
            text,
        ]
    )


# ---------------------------------------------------------------- apart


def shortcut_readers(standing):
    """A line on each model that the audit calls a shortcut reader, and one on those not audited."""
    start = "Not in the choice, as its audit finds a shortcut"
    if standing.all_read:
        start = "Its audit finds a shortcut"
    lines = [f"{start}: {c.name}: {c.reader.rstrip('.')}." for c in standing.readers]
    unknown = [c for c in standing.remaining if not audited(c)]
    if lines and unknown:
        names = "; ".join(c.name for c in unknown)
        lines.append(f"Not audited on validation, so perhaps shortcut readers as well: {names}.")
    return lines


def audited(candidate):
    """Whether all runs of a Candidate were audited on validation."""
    return all(shortcut_of(e, "val") is not None for e in candidate.entries)


def ensembles(standing):
    """A line on each ensemble, which stands for its members."""
    return [
        f"{c.name} stands for its {len(c.entries[0].members)} members; the second table of figures has those "
        "that are among these runs."
        for c in standing.candidates
        if c.entries[0].members
    ]


def repeated(standing):
    """A line on each run that repeats a seed."""
    lines = []
    for c in standing.candidates:
        if c.again:
            names = ", ".join(e.run.folder.as_posix() for e in c.again)
            lines.append(f"{names}: recipe and seed are those of {c.name}, so it is counted once.")
    return lines
