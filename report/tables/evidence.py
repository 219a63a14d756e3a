"""Blocks of the report on other images that a run was tried on, and on tests of its maps. No torch, no
drawing."""

import itertools

from common.console import say
from common.proportions import in_short
from report.cells import unique
from report.render import Heading, Paragraph, Table
from report.rows import METHODS


def batch_blocks(entries):
    """Whether images that predict.py --keep has scored are like validation."""
    rows, by_folder = [], {entry.run.folder: entry for entry in entries}
    for entry in by_folder.values():  # a run with and without TTA has one set of batches
        for name, verdict in entry.run.batches().items():
            if verdict["checkpoint"] != entry.calibration["checkpoint"]:
                say(f"note: batch {name} of {entry.run} was scored by another checkpoint, so left out")
                continue
            counts = [str(verdict[key]) for key in ("images", "patients")]
            shares = [per_cent(verdict[key]) for key in ("odd", "called", "called_in_validation")]
            same_run = [e for e in entries if e.run.folder == entry.run.folder]  # with and without TTA
            if all(of_other_threshold(verdict, e) for e in same_run):
                say(
                    f"note: batch {name} of {entry.run} was called at another threshold than today's @Rec "
                    "(of a site, an earlier calibration, or other views): the shares called are left out"
                )
                shares[1:] = "-", "-"
            says = verdict["says"]
            if "version" not in verdict:
                says += " (by an older test, which took another share of sick people for a shift)"
            rows.append([f"{entry.name}: {name}", *counts, *shares, in_short(verdict["p_joint"]), says])
    if not rows:
        return []
    text = (
        "From predict.py --keep. Odd: images whose typicality is 0.01 or less, as that of 1% of the "
        "validation images is. Called: those that the model calls sick at @Rec. p: the least of three "
        "p-values (odd images, features, scores; one image a patient), times three, at the share of sick "
        "people that fits best; 0.05 or less is a shift. Where only that share "
        "differs, recall and specificity are as in validation, but precision, accuracy and calibrated "
        "probabilities change; sick people whom the model misses there would look the same. "
        "Images that are like validation as far as these tests see may still be of other patients."
    )
    head = ["Model: images", "Images", "Patients", "Odd", "Called", "Called in validation", "p", "Verdict"]
    return [Heading(3, "Other images: are they like validation?"), Paragraph(text), Table(head, rows)]


def of_other_threshold(verdict, entry):
    """Whether what predict.py --keep wrote was decided at another threshold than the @Rec of an Entry. Older
    versions did not say."""
    at, today = verdict.get("called_at"), entry.calibrated[entry.findings[0]].get("threshold", 0.5)
    return isinstance(at, float) and abs(at - today) > 1e-9


def per_cent(share):
    """A share as text, a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f}%"


def map_cells(tests):
    """The tests of one kind of map, as cells."""
    cells = []
    for name in ("deletion", "insertion"):
        cells.append("{mean:+.3f} [{lo:+.3f}, {hi:+.3f}]".format(**tests[f"{name}_minus_random"]))
    for place in ("lung", "border"):
        if f"{place}_share" not in tests:  # no lungs were known
            cells.append("-")
            continue
        span = "{mean:.2f} [{lo:.2f}, {hi:.2f}]".format(**tests[f"{place}_share"])
        cells.append(f"{span} of {tests[f'{place}_area']:.2f}")
    # Weights were redrawn step by step: the head is the first step, all weights the last.
    return cells + [f"{tests['randomised'][step]['rank_correlation']:.2f}" for step in (0, -1)]


def map_blocks(entries):
    """Whether the maps of explain.py can be believed."""
    rows, made_on, sources = [], [], []
    for entry in entries:
        reports = entry.explained
        for report, (method, name) in itertools.product(reports, METHODS.items()):
            if method not in report:
                continue
            # The side is named where both have been explained; older reports do not say it.
            side = "test" if report.get("split") == "test" else "validation"
            where = f" on {side}" if len(reports) > 1 else ""
            rows.append([f"{entry.name}, {name}{where}", *map_cells(report[method])])
            made_on.append(f"{side} images rightly called {report.get('target', entry.findings[0])}")
            sources.append(report.get("lungs", "heuristic"))
    if not rows:
        return []
    text = (
        f"From explain.py, on {unique(made_on)}. Deletion (lower is better) and insertion (higher is "
        "better): area under the score curve, minus that of random order; where the interval holds 0, the "
        "map ranks patches no better than chance. On the lungs, on the border: how much of the map falls on "
        f"the lungs (masks: {unique(sources)}) and on the outer tenth of the image, of what an even map "
        "would put there. Head redrawn, all redrawn: rank correlation with the map after the weights of the "
        "head, or of all layers, are random; a map that stays the same does not show what was learnt."
    )
    head = ["Map", "Deletion", "Insertion", "On the lungs", "On the border", "Head redrawn", "All redrawn"]
    return [Heading(3, "Does it look at lungs or at letters?"), Paragraph(text), Table(head, rows)]
