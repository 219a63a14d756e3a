"""Sections 1, 2 and 4 of an audit: what the model makes of borrowed borders, greyed lungs and changed images.

Each has a function that lists the Changes to be scored, and one that makes figures of the scores."""

import numpy as np

from auditing.changes import corruptions, donors, framed, greyed
from auditing.figures import ERROR, Curve, falls, minus, plus, share, shares
from auditing.reader import Change
from auditing.rules import FALLS
from common.console import progress, say
from common.proportions import count_of
from lungs import masks as lung_masks
from lungs.show import plausible

# ---------------------------------------------------------------- 1. the border


def border_changes(side):
    """Every image with the border of another class's image, and with that of another patient of its own."""
    allowed = {"other": lambda i: side.y != side.y[i], "same": lambda i: side.y == side.y[i]}
    changes = []
    for name, may_lend in allowed.items():
        lenders = donors(side.patients, may_lend, np.random.default_rng(0))
        changes.append(Change(("border", name), np.arange(len(side.y)), _framed_by(side.subset, lenders)))
    return changes


def _framed_by(subset, lenders):
    return lambda pixels, places: framed(pixels, subset.pixels(lenders[places]))


def border_figures(side, scores):
    """{"whole", "other", "same": spans of AUROC, "fall": same - other, "images", "patients"}."""
    curve = Curve(side.y, side.patients)
    found = {name: curve.draws(scores["border", name]) for name in ("other", "same")}
    spans = {name: curve.span(values) for name, values in found.items()}
    spans["whole"] = curve.span(curve.draws(side.clean))
    spans["fall"] = curve.difference(minus(found["same"], found["other"]))
    return spans | {"images": len(side.y), "patients": count_of(side.patients)}


# ---------------------------------------------------------------- 2. the lungs

LUNGS = ("without", "without_others", "alone", "alone_others")


class Lungs:
    """The lungs on the images of a Side, by the run's lung finder, and each patient's donor of an outline.

    `positions`: int64 [n], images with plausible lungs; `why_not`: why the section cannot be run, or ""."""

    def __init__(self, side, reader):
        subset, source = side.subset, reader.config.lungs
        what, resize = f"{side.name} images", reader.config.resize
        find = lung_masks.open_source(source, subset.images.shape[-1], subset.files, what, resize)
        packed, good = [], []
        batches = np.array_split(np.arange(len(subset)), max(1, len(subset) // 64))
        for some in progress(batches, len(subset), "finding lungs", "images", size=len):
            masks = find(subset.pixels(some), [subset.files[i] for i in some])
            packed.append(lung_masks.pack(masks))
            good.append(plausible(masks))
        self.positions = np.flatnonzero(np.concatenate(good))
        self.packed = np.concatenate(packed)[self.positions]
        self.of_images, self.why_not = len(subset), ""
        left_out = len(subset) - len(self.positions)
        if left_out:
            say(f"note: no lungs found on {left_out} of {len(subset)} images: section 2 leaves them out")
        everybody = np.ones(len(self.positions), bool)
        rng = np.random.default_rng(0)
        self.lenders = donors(side.patients[self.positions], lambda i: everybody, rng)

    def masks(self, places):
        """bool [B, S, S]."""
        return lung_masks.unpack(self.packed[places])

    def changes(self):
        """The four ways to grey an image."""
        makers = {
            "without": lambda x, places: greyed(x, self.masks(places)),
            "without_others": lambda x, places: greyed(x, self.masks(self.lenders[places])),
            "alone": lambda x, places: greyed(x, ~self.masks(places)),
            "alone_others": lambda x, places: greyed(x, ~self.masks(self.lenders[places])),
        }
        return [Change(("lungs", name), self.positions, makers[name], finds_anew=False) for name in LUNGS]


def lung_figures(side, lungs, scores):
    """Spans of AUROC: "whole", and as LUNGS; "survives": without lungs - the middle between whole and 0.5;
    "own": what it matters that the outline is the patient's. "images", "patients", "without_lungs"."""
    y, patients = side.y[lungs.positions], side.patients[lungs.positions]
    curve = Curve(y, patients)
    found = {name: curve.draws(scores["lungs", name]) for name in LUNGS}
    found["whole"] = curve.draws(side.clean[lungs.positions])
    spans = {name: curve.span(values) for name, values in found.items()}
    middle = tuple((values + 0.5) / 2 for values in found["whole"])
    spans["survives"] = curve.difference(minus(found["without"], middle))
    needed = minus(found["without_others"], found["without"])
    enough = minus(found["alone"], found["alone_others"])
    spans["own"] = curve.difference(plus(needed, enough))
    counts = {"images": len(y), "patients": count_of(patients)}
    return spans | counts | {"without_lungs": lungs.of_images - len(y)}


# ---------------------------------------------------------------- 4. changed images


def corruption_changes(positions):
    """These images under each of the thirteen changes."""
    return [Change(("corruptions", name), positions, _each(change)) for name, change in corruptions().items()]


def _each(change):
    return lambda pixels, places: np.stack([change(image) for image in pixels])


def corruption_figures(side, positions, scores, threshold):
    """{"changes": [{"name", "recall", "specificity", and of each its fall}], by the greater of the two falls,
    in margins; "clean": recall and specificity unchanged; "images", "patients"}.

    Falls are paired with the unchanged images, and hold all at once."""
    names = [name for section, name in scores if section == "corruptions"]
    level = 1 - ERROR / (2 * len(names))
    changes, clean = [{"name": name} for name in names], {}
    for figure, label in (("recall", 1), ("specificity", 0)):
        of_label = side.y[positions] == label
        whose = side.patients[positions][of_label]
        before = _right(side.clean[positions][of_label], threshold, label)
        after = np.stack(
            [_right(scores["corruptions", n][of_label], threshold, label) for n in names], axis=1
        )
        clean[figure] = share(before, whose)
        spans, fallen = shares(after, whose), falls(before, after, whose, level)
        for change, span, fall in zip(changes, spans, fallen):
            change[figure], change[f"{figure}_fall"] = span, fall
    changes.sort(key=_worst, reverse=True)
    return {
        "changes": changes,
        "clean": clean,
        "threshold": threshold,
        "images": len(positions),
        "patients": count_of(side.patients[positions]),
    }


def _worst(change):
    """The greater fall of a change, in margins."""
    return max(change[f"{figure}_fall"]["value"] / margin for figure, margin in FALLS.items())


def _right(scores, threshold, label):
    """Which images are decided rightly, bool [N], of those that all have the `label`."""
    return (scores >= threshold) == label
