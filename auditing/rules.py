"""What follows from the figures of an audit: a verdict and a sentence each. The rules are those of
docs/AUDIT.md, and were fixed before a run was looked at. No torch, no files."""

from common.proportions import in_words

MARGIN = 0.05  # of AUROC
RANKS = 0.55  # an AUROC below says too little to lose any of it
FALLS = {"recall": 0.05, "specificity": 0.10}  # margins under changed images
TELLS = 0.60  # an AUROC above tells a signal
CHANCE = 0.05  # a p-value above is no finding
GAP = 0.10  # of specificity, between the worst group and the others


def line(key, verdict, text):
    """A line of audit.json."""
    return {"key": key, "verdict": verdict, "text": text}


def cannot(key, why):
    """The line of a section that could not be run."""
    return line(key, "open", f"not looked at: {why}")


def against(span, margin):
    """ "broken" where an interval lies above a margin, "kept" where it lies below, else "open"."""
    if span["lo"] > margin:
        return "broken"
    return "kept" if span["hi"] < margin else "open"


# ---------------------------------------------------------------- border and lungs


def border(found):
    """The line on borrowed borders; found: looks.border_figures."""
    numbers = (
        f"AUROC {in_words(found['other'])} with the border of an image of the other class, "
        f"{in_words(found['same'])} with one of the same class: a fall of {in_words(found['fall'])}"
    )
    if found["same"]["lo"] < RANKS:
        return line("border", "open", f"it hardly ranks these images, so no border can matter: {numbers}")
    verdict = against(found["fall"], MARGIN)
    says = {
        "broken": "it decides partly by the border",
        "kept": "the border hardly matters",
        "open": f"the border may matter; these images cannot tell (margin {MARGIN:g})",
    }
    return line("border", verdict, f"{says[verdict]}: {numbers}")


def lungs(found):
    """The line on greyed lungs; found: looks.lung_figures."""
    numbers = (
        f"AUROC {in_words(found['whole'])}; with the lungs greyed {in_words(found['without'])} (another "
        f"patient's outline {in_words(found['without_others'])}), with the lungs alone "
        f"{in_words(found['alone'])} (another's outline {in_words(found['alone_others'])})"
    )
    if found["whole"]["lo"] < RANKS:
        return line("lungs", "open", f"it hardly ranks these images at all: {numbers}")
    if found["survives"]["lo"] > 0:
        text = "it can decide without the lungs: more than half of its ranking survives when they are greyed"
        return line("lungs", "broken", f"{text}; {numbers}")
    if found["survives"]["hi"] < 0 and found["own"]["lo"] > 0:
        text = "it needs the lungs: most of its ranking is lost without them"
        return line("lungs", "kept", f"{text}; {numbers}")
    return line("lungs", "open", f"these images cannot tell whether it needs the lungs: {numbers}")


# ---------------------------------------------------------------- other signals


def features(found):
    """The line on other signals; found: {"signals": [{"name", "features", "pixels", "score"}, ...]}, spans of
    AUROCs, that of the score folded to 0.5 and above."""
    signals = found["signals"]
    followed = [s for s in signals if s["score"]["lo"] > TELLS]
    known = [s for s in signals if s["features"]["lo"] > TELLS]
    if followed:
        told = "; ".join(
            f"{s['name']} (score {in_words(s['score'])}, features {in_words(s['features'])}, 32x32 pixels "
            f"{in_words(s['pixels'])})"
            for s in followed
        )
        return line("features", "broken", f"among patients without the finding its score follows {told}")
    quiet = all(max(s["features"]["hi"], s["score"]["hi"]) < TELLS for s in signals)
    told = "; ".join(
        f"{s['name']} {in_words(s['features'])} (32x32 pixels {in_words(s['pixels'])}, score "
        f"{in_words(s['score'])})"
        for s in sorted(known or signals, key=lambda s: -s["features"]["value"])
    )
    if quiet:
        return line("features", "kept", f"its features tell nothing else that is known: {told}")
    if known:
        text = f"its features also tell {told}; nothing shows that the score uses it"
        return line("features", "open", text)
    return line("features", "open", f"these images cannot tell what else its features know: {told}")


# ---------------------------------------------------------------- changed images


def corruptions(found):
    """The line on changed images; found: {"changes": [{"name", "recall", "specificity", "recall_fall",
    "specificity_fall"}, ...], the worst first, "clean": the same of the unchanged}."""
    worst = found["changes"][0]
    verdicts, broken = [], []
    for change in found["changes"]:
        for figure, margin in FALLS.items():
            verdict = against(change[f"{figure}_fall"], margin)
            verdicts.append(verdict)
            if verdict == "broken":
                broken.append(f"{figure} under {change['name']!r} ({in_words(change[figure])})")
    clean = found["clean"]
    numbers = (
        f"unchanged: recall {in_words(clean['recall'])}, specificity {in_words(clean['specificity'])} "
        f"({found['images']} images)"
    )
    if broken:
        return line("corruptions", "broken", f"its threshold does not hold: {', '.join(broken)}; {numbers}")
    text = (
        f"worst under {worst['name']!r}: recall {in_words(worst['recall'])}, specificity "
        f"{in_words(worst['specificity'])}; {numbers}"
    )
    if set(verdicts) == {"kept"}:
        return line(
            "corruptions", "kept", f"its threshold holds under all {len(found['changes'])} changes; {text}"
        )
    return line("corruptions", "open", f"these images cannot tell whether its threshold holds; {text}")


# ---------------------------------------------------------------- false alarms


def clusters(found):
    """The line on false alarms; found: clusters.figures."""
    p, gap = found["p"], found["gap"]
    text = (
        f"the worst of {found['groups']} groups has {found['patients']} patients, specificity "
        f"{found['specificity']:.3f}, of the others {found['others']:.3f} (p {found['p']:.4f} against chance)"
    )
    if gap is not None:
        text += (
            f"; held-out patients: {in_words(found['held_out'])} against {in_words(found['held_out_others'])}"
        )
    if gap is None:
        verdict = "open"
    elif p <= CHANCE and gap["hi"] < 0:
        verdict = "broken"
    elif p > CHANCE and gap["lo"] > -GAP:
        verdict = "kept"
    else:
        verdict = "open"
    says = {
        "broken": "its false alarms are of one kind: look at the sheet",
        "kept": "its false alarms are spread over all kinds of patients",
        "open": "these images cannot tell whether its false alarms are of one kind",
    }
    return line("clusters", verdict, f"{says[verdict]}; {text}")


# ---------------------------------------------------------------- all together


def shortcut(lines):
    """The mark of border, lungs and other signals together, from the lines of a side."""
    by_key = {each["key"]: each["verdict"] for each in lines}
    names = {"border": "by the border", "lungs": "without the lungs", "features": "by another signal"}
    broken = [text for key, text in names.items() if by_key.get(key) == "broken"]
    if broken:
        return {"verdict": "broken", "text": f"it can decide {' and '.join(broken)}"}
    if by_key.get("border") == by_key.get("lungs") == "kept":
        return {"verdict": "kept", "text": "neither the border nor what lies beside the lungs decides"}
    left = [text for key, text in names.items() if by_key.get(key) != "kept"]
    return {"verdict": "open", "text": f"not settled whether it decides {' or '.join(left)}"}
