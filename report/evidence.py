"""Blocks of the report on what lies beside the figures of test: other images that a run was tried on, and
tests of its maps. No torch, no drawing."""

from common.console import say
from common.proportions import in_short
from report.cells import unique
from report.render import Heading, Paragraph, Table
from report.rows import METHODS


def batch_blocks(entries):
    """Whether the images that predict.py --keep was given are like those of validation."""
    rows = []
    for e in {e.run.folder: e for e in entries}.values():
        for name, found in e.run.batches().items():
            if found["checkpoint"] != e.calibration["checkpoint"]:
                say(f"note: batch {name} of {e.run} was scored by another checkpoint, so left out")
                continue
            odd, called = (
                f"{100 * found[k]:.1f}%" if found[k] is not None else "-" for k in ("odd", "called")
            )
            usual = f"{100 * found['called_in_validation']:.1f}%"
            joint = in_short(found["p_joint"])
            counts = [str(found[k]) for k in ("images", "patients")]
            says = found["says"]
            if "version" not in found:
                says += " (by an older test, which took another share of sick people for a shift)"
            rows.append([f"{e.name}: {name}", *counts, odd, called, usual, joint, says])
    if not rows:
        return []
    text = (
        "From predict.py --keep. Odd: images whose typicality is 0.01 or less, as that of 1% of the "
        "validation images is. Called: those that the model calls sick at @Rec. p: the least of three "
        "p-values (odd images, features, scores; one image a patient), times three, at the share of sick "
        "people that fits best; 0.05 or less is a shift. At another share of sick people, recall and "
        "specificity are as in validation, but precision, accuracy and calibrated probabilities change. "
        "Images that are like validation as far as these tests see may still be of other patients."
    )
    head = ["Model: images", "Images", "Patients", "Odd", "Called", "Called in validation", "p", "Verdict"]
    return [Heading(3, "Other images: are they like validation?"), Paragraph(text), Table(head, rows)]


def map_blocks(entries):
    """Whether the maps of explain.py can be believed."""
    rows, made_on, sources = [], [], []
    reports = [(e, report) for e in entries for report in e.explained]
    for e, report in reports:
        both = sum(other is e for other, _ in reports) > 1
        for method, name in METHODS.items():
            if method not in report:
                continue
            r = report[method]
            minus = [r[f"{k}_minus_random"] for k in ("deletion", "insertion")]
            cells = ["{mean:+.3f} [{lo:+.3f}, {hi:+.3f}]".format(**span) for span in minus]
            for k in ("lung", "border"):
                span = "{mean:.2f} [{lo:.2f}, {hi:.2f}]".format(**r[f"{k}_share"])
                cells.append(f"{span} of {r[f'{k}_area']:.2f}")
            cells += [f"{r['randomised'][i]['rank_correlation']:.2f}" for i in (0, -1)]
            side = "test" if report.get("split") == "test" else "validation"
            where = f" on {side}" if both else ""
            rows.append([f"{e.name}, {name}{where}", *cells])
            made_on.append(f"{side} images rightly called {report.get('target', e.findings[0])}")
            sources.append(report.get("lungs", "heuristic"))
    if not rows:
        return []
    text = (
        f"From explain.py, on {unique(made_on)}. Deletion (lower is better) and insertion (higher is "
        "better): area under the score curve, minus that of random order; where the interval holds 0, the "
        "map ranks patches no better than chance. On the lungs, on the border: how much of the map falls on "
        f"the lungs (masks: {unique(sources)}) and on the outer tenth of the image, of what an even map "
        "would put there. Head redrawn, all redrawn: rank correlation with the map after the weights of the "
        "head, or all weights, are drawn at random; a map that stays the same does not show what was learnt."
    )
    head = ["Map", "Deletion", "Insertion", "On the lungs", "On the border", "Head redrawn", "All redrawn"]
    return [Heading(3, "Does it look at lungs or at letters?"), Paragraph(text), Table(head, rows)]
