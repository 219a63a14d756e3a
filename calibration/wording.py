"""What is said of thresholds and their figures, on the console and in the report. No torch, no files."""

from metrics import chance_below_floor

POINTS = {"at_0.5": "@0.5", "at_rec": "@Rec", "at_guaranteed": "@Guar"}
SIDES = {"val": "validation", "test": "test"}


def concerns(row, floor):
    """What is bad about a `row` with "tp", "fp", "tn", "fn", at a threshold whose recall floor is `floor`: a
    list of texts, empty if nothing."""
    if row["tp"] + row["fp"] == 0:
        return ["calls nobody sick: recall 0"]
    found, recall = [], row["tp"] / (row["tp"] + row["fn"])
    if recall < floor:
        found.append(f"recall {shown_below(recall, floor)} is below the floor of {floor:g}")
    if row["tn"] == 0:
        who = "everybody" if row["fn"] == 0 else "every healthy image"
        found.append(f"calls {who} sick: specificity 0")
    return found


def chance_text(images, patients, floor):
    """How likely the recall at @Rec is below the floor for new people, as text: by so many patients with the
    finding, of whom there are so many images. With one image each it is the exact chance of scores that do
    not tie; images of one patient make it an approximation."""
    about = "up to" if images == patients else "about"
    return f"a chance of {about} {chance_below_floor(patients, floor):.2f}"


def shown_below(value, floor):
    """A value below a floor, with so many digits that it does not look equal to it."""
    digits = 3
    while float(f"{value:.{digits}f}") >= floor and digits < 15:
        digits += 1
    return f"{value:.{digits}f}"


def shared_text(result, finding):
    """What is said of a calibration of one finding and belongs to every run on the same validation images."""
    guarantee, floor = result["guarantee"], result["min_recall"]
    sick, row = guarantee["positive_patients"], result["val"]["at_rec"]
    chance = chance_text(row["tp"] + row["fn"], sick, floor)
    text = (
        f"thresholds are chosen on validation, {sick} patients with {finding}:\n"
        f"  @Rec: recall >= {floor:g} there; for new patients like them below it with {chance}\n"
    )
    if guarantee["threshold"] is None:
        return f"{text}  no @Guar: {guarantee['why_not']}"
    return f"{text}  @Guar: true recall >= {floor:g} with confidence {guarantee['confidence']:g}"


def threshold_text(result):
    """The thresholds of one finding, and how far each lies from the nearest validation score."""
    guarantee = result["guarantee"]
    text = f"@Rec {result['threshold']:.4f} ({result['gap']:.2g} logits from the nearest validation score)"
    if guarantee["threshold"] is None:
        return text
    return f"{text}, @Guar {guarantee['threshold']:.4f} ({guarantee['gap']:.2g})"


def warnings(found, floor):
    """What is bad about the figures @Rec and @Guar of one finding of a calibration, as a list of texts."""
    texts = []
    for side, word in SIDES.items():
        for point in ("at_rec", "at_guaranteed"):
            row = found.get(side, {}).get(point)
            if row:
                texts += [f"{word} {POINTS[point]}: {text}" for text in concerns(row, floor)]
    return texts


def several_warnings(findings, floor):
    """The same of several findings, {finding: what the calibration says of it}, each text with its name."""
    texts = []
    for name, found in findings.items():
        texts += [f"{name}, {text}" for text in warnings(found, floor)]
    return texts


def smallest_gap(findings):
    """The finding whose threshold @Rec lies nearest to a validation score, as text; "" where older
    calibrations do not say."""
    gaps = {name: found["gap"] for name, found in findings.items() if "gap" in found}
    if not gaps:
        return ""
    name = min(gaps, key=gaps.get)
    return f"each @Rec lies {gaps[name]:.2g} logits or more from the nearest validation score (least: {name})"
