"""Figures that might tell recipes apart without the test set: what a run makes of changed validation images,
and of another hospital's."""

from functools import cached_property
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from auditing.changes import corruptions, framed
from common.console import InputError
from common.files import read_json, sha256, write_json
from images.subset import Subset, pixel_fingerprint
from lungs import masks as lung_masks
from metrics import choose_threshold_by_min_recall
from models.inputs import Inputs
from records.run import WITHOUT_CLASSES
from records.schema import REAL, mismatches
from training.evaluate import predict

VERSION = 1  # of everything below that decides a figure: raise it with any change of the corruptions
MIN_RECALL = 0.95
BORROWED_LEAST = 0.9  # a recipe whose AUROC with borrowed borders is below is not chosen


# ---------------------------------------------------------------- changed images


def borrow_borders(images, targets, from_other_class):
    """Images uint8 [N, S, S] with the border (an eighth of the side) of another image, drawn with seed 0: one
    of the other class, or of the same class (perhaps the image itself). Targets int64 [N], 0 or 1; both must
    occur."""
    rng = np.random.default_rng(0)
    donors = np.array([rng.choice(np.flatnonzero((targets != y) == from_other_class)) for y in targets])
    return framed(images, images[donors])


# ---------------------------------------------------------------- figures


class Scorer:
    """What a finished run of two classes makes of images. InputError for other runs."""

    def __init__(self, run, device):
        self.run, self.inputs, self.task = run, Inputs.of_run(run.results, device), run.config.task
        if run.kind in WITHOUT_CLASSES or len(self.task.findings) != 1:
            raise InputError(f"{run}: signals are defined for classifiers of two classes only")

    @cached_property
    def finder(self):
        """Finds the lungs on changed images; None where the model needs none."""
        return lung_masks.finder_of(self.run.config, self.inputs.device)

    @cached_property
    def model(self):
        return self.run.model().to(self.inputs.device)

    def outputs(self, subset, pixels=None, output=None):
        """The logits of a Subset, or of other `pixels` uint8 [N, S, S] in its place, float32 [N, 2] on the
        CPU; or what `output` makes of them, as for frozen.predict."""
        if pixels is not None:
            rows, masks = np.arange(len(pixels)), None
            if self.finder:
                masks = np.concatenate(
                    [lung_masks.pack(self.finder(some)) for some in np.array_split(pixels, 16)]
                )
            subset = Subset(subset.files, subset.targets, pixels, rows, masks=masks)
        how = dict(output=output, batch_size=128, progress=str(self.run))
        return predict(self.model, subset, self.inputs, **how)

    def __call__(self, subset, pixels=None):
        """Probability of the finding, float64 [N], of images as for `outputs`."""
        return self.task.scores(self.outputs(subset, pixels))[:, 0]

    def key(self, subset):
        """SHA-256 of all that decides the figures: weights, model, input scaling, exposure, precision, the
        images with their names and targets, and VERSION."""
        results, inputs = self.run.results, self.inputs
        how = [results["model_config"], inputs.mean, inputs.std, "none", inputs.amp, VERSION]
        how += [inputs.input_mode, self.run.config.lungs_sha256] if inputs.needs_lungs else []
        return sha256([self.run.checkpoint_sha256, how, pixel_fingerprint(subset)])


# What signals.json holds of a run, in the order of the table's columns.
VALIDATION = {
    "val AUROC": REAL,
    "corrupted AUROC": REAL,
    "corrupted spec": REAL,
    "corrupted recall": REAL,
    "worst": str,
    "borrowed AUROC": REAL,
    "control AUROC": REAL,
    "choice": REAL,
    "corruptions": dict.fromkeys(corruptions(), [REAL]),
}
NIH = {"NIH AUROC": REAL}
BORDERS = {name: REAL for name in ("val AUROC", "borrowed AUROC", "control AUROC")}
PARTS = {"validation": VALIDATION, "borders": BORDERS, "nih": NIH}


def border_figures(score, val):
    """The figures of BORDERS of a Scorer on a Subset."""
    y, images = val.targets, val.pixels()
    shown = {"val AUROC": None}  # the pixels of the Subset itself
    shown |= {f"{n} AUROC": borrow_borders(images, y, n == "borrowed") for n in ("borrowed", "control")}
    return {name: float(roc_auc_score(y, score(val, pixels))) for name, pixels in shown.items()}


def some_to_corrupt(val):
    """All images of a Subset without the finding and every third with it: the specificity is what varies."""
    return val.take(np.flatnonzero((val.targets == 0) | (np.cumsum(val.targets) % 3 == 0)))


def validation_figures(score, val):
    """The figures of VALIDATION of a Scorer on a Subset; "corruptions" holds AUROC, specificity and recall of
    each."""
    y = val.targets
    borders = border_figures(score, val)
    threshold, _, _ = choose_threshold_by_min_recall(y, score(val), MIN_RECALL)
    some, rows = some_to_corrupt(val), {}
    for name, change in corruptions().items():
        q = score(some, np.stack([change(image) for image in some.pixels()]))
        called, sick = q >= threshold, some.targets == 1
        rows[name] = [roc_auc_score(some.targets, q), (~called[~sick]).mean(), called[sick].mean()]
    auroc, specificity, recall = (float(v) for v in np.mean(list(rows.values()), axis=0))
    return {
        "val AUROC": borders["val AUROC"],
        "corrupted AUROC": auroc,
        "corrupted spec": specificity,
        "corrupted recall": recall,
        "worst": min(rows, key=lambda name: sum(rows[name][1:])),
        "borrowed AUROC": borders["borrowed AUROC"],
        "control AUROC": borders["control AUROC"],
        "choice": (borders["borrowed AUROC"] + (specificity + recall) / 2) / 2,
        "corruptions": {name: [round(float(v), 4) for v in row] for name, row in rows.items()},
    }


def nih_figures(score, nih):
    """The figure of NIH of a Scorer on the Subset of nih.load_nih."""
    return {"NIH AUROC": float(roc_auc_score(nih.targets, score(nih)))}


def panel(found):
    """The panel by which recipes are chosen (docs/notebook/20-accuracy-the-rule.md) -> {"panel": the mean of
    the NIH AUROC and of recall and specificity under corruptions at the unchanged threshold; "veto": "yes" if
    the border of another child misleads the model, else "no"}."""
    transfer = (found["corrupted spec"] + found["corrupted recall"]) / 2
    veto = "yes" if found["borrowed AUROC"] < BORROWED_LEAST else "no"
    return {"panel": (found["NIH AUROC"] + transfer) / 2, "veto": veto}


def kept_figures(score, part, subset, compute, spec):
    """compute(score, subset), or what signals.json in the run folder holds of `part` if that was computed
    from the same model and images. `spec`: what the figures must look like, as for schema.mismatches. Other
    parts are left alone."""
    path, key = score.run.folder / "signals.json", score.key(subset)
    try:
        kept = read_json(path)
    except InputError:  # absent or damaged
        kept = {}
    if mismatches(kept.get(part), {"key": str, "figures": spec}) or kept[part]["key"] != key:
        kept = {name: kept[name] for name in PARTS if name in kept}  # no part of older versions
        kept[part] = {"key": key, "figures": compute(score, subset)}
        write_json(path, kept)
    return kept[part]["figures"]


def read_figures(folder):
    """All figures in the signals.json of a run folder, {name: figure}; none without that file. InputError if
    it is damaged."""
    path, found = Path(folder, "signals.json"), {}
    kept = read_json(path) if path.is_file() else {}
    for part, spec in PARTS.items():
        if part in kept:
            if wrong := mismatches(kept[part], {"figures": spec}, part):
                listed = ", ".join(wrong)[:200]
                raise InputError(f"{path} is damaged: wrong {listed}; run studies/experiments.py again")
            found |= kept[part]["figures"]
    return found


def signals(run, val, nih, device, corrupted=True):
    """{signal: value} of a finished run on its validation Subset and that of load_nih (or None); those of the
    corruptions, which take longest, only if `corrupted`."""
    score = Scorer(run, device)
    if not corrupted:
        found = kept_figures(score, "borders", val, border_figures, BORDERS)
        found = found | (kept_figures(score, "nih", nih, nih_figures, NIH) if nih is not None else {})
        return {**found, "minutes": run.results["minutes"]}
    found = dict(kept_figures(score, "validation", val, validation_figures, VALIDATION))
    after = {name: found.pop(name) for name in ("choice", "corruptions")}
    if nih is not None:
        found |= kept_figures(score, "nih", nih, nih_figures, NIH)
        found |= panel(found)
    return {**found, "choice": after["choice"], "minutes": run.results["minutes"], **after}
