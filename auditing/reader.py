"""A run as it is audited: the scores that it gives changed images, and what its head reads."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from common.console import InputError, progress
from lungs import masks as lung_masks
from models.inputs import Inputs
from records.run import WITHOUT_CLASSES

SMALL = 0.01  # a direction of the head with less than this part of the strongest is rounding
MOST_IMAGES_OF_HEAD = 256  # of which the head's directions are taken


class Change(NamedTuple):
    """Images to be scored. `key`: (section, name); `positions`: int64 [n], which images of the Subset;
    `make`: function: (pixels uint8 [B, S, S], their places in `positions`, int64 [B]) -> changed pixels, or
    None for images as they are; `finds_anew`: whether the lungs are found on the changed images, where the
    model needs them (else those of the unchanged ones are taken)."""

    key: tuple
    positions: np.ndarray
    make: object = None
    finds_anew: bool = True


class Reader:
    """A run ready to score changed images for a `finding`, on a `device`.

    `threshold`: its @Rec, or None, and then `why_not` says why. InputError for a run without classes."""

    def __init__(self, run, device, finding):
        if run.kind in WITHOUT_CLASSES:
            raise InputError(f"{run} is of kind {run.kind!r}: it has no classes to audit")
        self.run, self.config, self.task, self.finding = run, run.config, run.task, finding
        self.column = self.task.findings.index(finding)
        self.calibration, self.threshold, self.why_not = None, None, ""
        if "" in run.calibrated():
            self.calibration = run.calibration()
            found = self.calibration["findings"][finding]
            self.threshold, self.why_not = found.get("threshold"), found.get("why_not", "")
            self.inputs = Inputs.of_calibration(run, self.calibration, device)
        else:
            self.why_not = f"the run is not calibrated: run python calibrate.py --run {run}, then this again"
            self.inputs = Inputs.of_run(run.results, device)
        self.model = run.model().to(device)

    @cached_property
    def finder(self):
        """Finds the lungs on changed images; None where the model needs none."""
        return lung_masks.finder_of(self.config, self.inputs.device)

    @property
    def why_no_changes(self):
        """Why changed images cannot be shown to the model; "" if they can."""
        if self.inputs.needs_lungs and lung_masks.holds_masks(self.config.lungs):
            return f"{self.config.lungs} has no lung masks of changed images, which the model needs"
        return ""

    @torch.inference_mode()
    def outputs(self, pixels, masks):
        """uint8 [B, S, S], and lungs bool [B, S, S] or None -> (scores of the finding float64 [B], features
        float32 [B, D])."""
        if self.inputs.needs_lungs and masks is None:
            masks = self.finder(pixels)
        grey = self.inputs.grey(pixels, masks)
        found = self.inputs.logits_and_features(self.model, grey).cpu().numpy()
        logits, features = found[:, : self.task.outputs], found[:, self.task.outputs :]
        if self.calibration is None:
            scores = self.task.scores(logits)
        else:
            scores = self.task.scores_from(logits, self.calibration)
        if not np.isfinite(scores).all():
            raise InputError(f"{self.run} gives NaN scores: its checkpoint is damaged")
        return scores[:, self.column], features

    def score(self, subset, changes, batch_size):
        """What the model makes of every Change -> ({key: scores [n]}, features float32 [N, D] of the Change
        without `make`). Says how far it is, and what remains of the whole."""
        jobs = []
        for change in changes:
            places = np.arange(len(change.positions))
            jobs += [(change, some) for some in np.split(places, range(batch_size, len(places), batch_size))]
        scores, features = {change.key: [] for change in changes}, []
        total = sum(len(places) for _, places in jobs)
        for change, places in progress(jobs, total, "audit", "images", size=lambda job: len(job[1])):
            positions = change.positions[places]
            pixels, masks = subset.pixels(positions), None
            if self.inputs.needs_lungs and not (change.make and change.finds_anew):
                masks = subset.lungs(positions)
            if change.make:
                pixels = change.make(pixels, places)
            found, read = self.outputs(pixels, masks)
            scores[change.key].append(found)
            if not change.make:
                features.append(read)
        return {key: np.concatenate(parts) for key, parts in scores.items()}, np.concatenate(features)

    # ------------------------------------------------------------ the head

    def without_head(self, features):
        """Features [N, D] without the directions in which the finding's log odds change -> float64 [N, D].

        The directions are those of the gradient of the log odds: one of a linear head and two classes, more
        of several classes or of a head with hidden units, which bends. Of an ensemble, each member's."""
        parts, begin = [], 0
        for member in getattr(self.model, "members", [self.model]):
            width = self._width_of(member)
            own = features[:, begin : begin + width]
            parts.append(project_out(own.astype(np.float64), self._gradients(member.head, own)))
            begin += width
        return np.concatenate(parts, axis=1)

    @staticmethod
    def _width_of(member):
        """How many features the head of a model reads."""
        layers = member.head.modules()
        return next(layer.in_features for layer in layers if isinstance(layer, torch.nn.Linear))

    def _gradients(self, head, features):
        """The gradients of the finding's log odds at some features [N, D]: float64 [n, D]."""
        answer = self.task.answer(self.finding)
        x = torch.from_numpy(np.array(features[:MOST_IMAGES_OF_HEAD])).to(self.inputs.device)
        x.requires_grad_(True)
        z = head(x).float()  # no float64 on mps
        log_odds = answer.logit(z)
        if self.task.kind == "softmax":
            others = [k for k in range(z.shape[1]) if k != answer.k]
            log_odds = answer.sign * (z[:, answer.k] - z[:, others].logsumexp(1))
        (gradient,) = torch.autograd.grad(log_odds.sum(), x)
        return gradient.cpu().double().numpy()


def project_out(features, gradients):
    """Features float64 [N, D] without the directions of `gradients` [n, D], as far as these are no
    rounding."""
    _, strength, directions = np.linalg.svd(gradients, full_matrices=False)
    directions = directions[strength > SMALL * strength[0]]
    return features - features @ directions.T @ directions
