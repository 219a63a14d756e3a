"""Blocks of the report on three answers instead of two: negative, unsure, positive. No torch, no drawing."""

from calibration.wording import four_digits, nobody_is_unsure
from common.proportions import in_words
from common.scaling import SIDES
from report.cells import alone, first_head, questions, title, unique
from report.render import Bad, Heading, Paragraph, Table

# Which share of whom is shown; the last one is how much is left to read.
SHOWN = (
    ("Sick", "negative", "sick"),
    ("Sick", "unsure", "sick"),
    ("Healthy", "unsure", "healthy"),
    ("Healthy", "positive", "healthy"),
    ("All", "unsure", "all"),
)


def triage_blocks(entries):
    """Who is called negative, unsure and positive, on validation and test; nothing where no calibration has
    @In."""
    asked = [(finding, e) for finding, e in questions(entries) if "rule_in" in e.calibrated[finding]]
    if not asked:
        return []
    rows = []
    for finding, e in asked:
        for mark, place in pairs_of(e.calibrated[finding]):
            for side, word in SIDES.items():
                if side in place:
                    rows.append(row_of(e, finding, mark, word, place[side]))
    head = [
        first_head(entries),
        "Thresholds",
        "Side",
        *(f"{group} {word}".capitalize() for group, word, _ in SHOWN),
    ]
    blocks = [Heading(3, "Three answers: who is left to read"), Paragraph(promise_text(asked, entries))]
    blocks.append(Table(head, rows))
    if texts := remarks(asked, entries):
        blocks.append(Paragraph(" ".join(texts)))
    return blocks


def pairs_of(found):
    """[(the thresholds of a triage, {side: shares})] of what a calibration says of a finding."""
    at_in = found["rule_in"]["threshold"]
    upper = "none" if at_in is None else four_digits(at_in)
    pairs = [(f"@Rec {four_digits(found['threshold'])}, @In {upper}", found["triage"])]
    promised = found["rule_in"]["guarantee"]
    if "triage" in promised:
        guaranteed, upper = (four_digits(g["threshold"]) for g in (found["guarantee"], promised))
        mark = f"@Guar {guaranteed}, @InGuar {upper}"
        pairs.append((mark, promised["triage"]))
    return pairs


def row_of(entry, finding, mark, side, groups):
    """The cells of one triage on one side."""
    most = {
        ("sick", "negative"): 1 - entry.min_recall,
        ("healthy", "positive"): 1 - entry.calibrated[finding]["rule_in"]["min_specificity"],
    }
    cells = [title(entry, finding), mark, side]
    for _, word, group in SHOWN:
        share = groups[group][word]
        limit = most.get((group, word))
        broken = limit is not None and share["lo"] > limit
        cells.append(Bad(in_words(share)) if broken else in_words(share))
    return cells


def promise_text(asked, entries):
    """What the three answers are and promise, as text."""
    floors = unique(sorted({f"recall >= {e.min_recall:g}" for _, e in asked}), " or ")
    floors_in = {f"specificity >= {e.calibrated[f]['rule_in']['min_specificity']:g}" for f, e in asked}
    text = (
        "Below @Rec an image is negative, from @In on positive, and between them unsure: somebody reads it. "
        f"@Rec keeps {floors} on validation, @In {unique(sorted(floors_in), ' or ')}, with the highest "
        "recall. So the share of the sick called negative and that of the healthy called positive have "
        "limits there; the unsure have none. Sick: with the finding; healthy: without it. "
    )
    promised = [f"{e.calibrated[f]['rule_in']['guarantee']['confidence']:.4g}" for f, e in guaranteed(asked)]
    if promised:
        text += (
            "@InGuar promises the specificity for new patients like those of validation, with confidence "
            f"{unique(promised, ' or ')}: only what lies above an order statistic of the healthy patients' "
            "highest scores is positive. "
        )
    joint = [e.calibration["jointly"] for _, e in asked if "promises" in (e.calibration["jointly"] or {})]
    if joint and promised:
        text += "All floors that are granted, of recall too, hold at once with confidence "
        text += f"{joint[0]['confidence']:g}. "
    elif promised:
        text += "The chance that it or @Guar fails is at most the two chances added up (the union bound). "
        if not alone(entries):
            text += "Each holds for its finding alone; calibrate.py --jointly asks for all at once. "
    return (
        f"{text}Intervals: 95%, each by itself, bootstrap of the group's patients. ✗: the interval lies "
        "beyond the limit."
    )


def guaranteed(asked):
    """Those of [(finding, entry)] that have the threshold @InGuar."""
    found = []
    for finding, entry in asked:
        if entry.calibrated[finding]["rule_in"]["guarantee"]["threshold"] is not None:
            found.append((finding, entry))
    return found


def remarks(asked, entries):
    """Where a threshold is missing, and where nobody is unsure, as sentences."""
    missing, nobody = {}, []
    for finding, e in asked:
        found = e.calibrated[finding]
        if nobody_is_unsure(found["threshold"], found["rule_in"]["threshold"]):
            nobody.append(title(e, finding))
        for point, place in (("@In", found["rule_in"]), ("@InGuar", found["rule_in"]["guarantee"])):
            if place["threshold"] is None:
                missing.setdefault((point, place["why_not"]), []).append(title(e, finding))
    texts = [f"No {point} of {unique(names)}: {reason}." for (point, reason), names in missing.items()]
    if nobody:
        texts.append(
            f"Nobody is unsure by {unique(nobody)}: @In is not above @Rec, which decides alone and keeps "
            "both floors on validation."
        )
    without = unique(e.name for e in entries if e not in [other for _, other in asked])
    if without:
        texts.append(f"Not asked for three answers (calibrate.py --min-specificity): {without}.")
    return texts
