"""What is minimised: the loss of labelled images, of reconstruction and of segmentation."""

from functools import partial

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from common.console import InputError, say_once


def total_weight(objective, targets, weights=1.0):
    """What the losses of a batch, times the images' own `weights` [B], are divided by; above 0 also where no
    label is known, so that their sum 0 stays 0."""
    return (objective.weights(targets) * weights).sum().clamp(min=1e-6)


WATCHED = ("auroc", "loss", "accuracy")


def with_both_classes(truth):
    """Which columns of int8 [N, F] hold a positive and a negative: bool [F]."""
    return (truth == 1).any(axis=0) & (truth == 0).any(axis=0)


def figures(row, watch):
    """A history entry's validation figures as text; the accuracy where it chooses the epoch."""
    names = {"val_auroc": "val AUROC", "val_dice": "val Dice"}
    if watch == "accuracy":
        names["val_accuracy"] = "val accuracy"
    text = f"val loss {row['val_loss']:.4f}"
    for key, name in names.items():
        if key in row:
            text += f", {name} {row[key]:.4f}"
    for name, held_out in row.get("others", {}).items():
        auroc = held_out.get("held_out_auroc")
        if auroc is not None:
            text += f", {name} AUROC {auroc:.4f}"
    return text


class Supervised:
    """The loss of a Task; `watched`, one of WATCHED, chooses the best epoch.

    The AUROC is the mean over the findings that have both classes. To the loss of an image come, times
    `segmentation` and `attention` and the image's weight, the two that a hybrid appends to its logits."""

    def __init__(
        self,
        task,
        class_weights=None,
        label_smoothing=0.0,
        watched="auroc",
        *,
        focal_gamma=0.0,
        segmentation=0.0,
        attention=0.0,
    ):
        self.task_losses = partial(
            task.losses,
            class_weights=class_weights,
            label_smoothing=label_smoothing,
            focal_gamma=focal_gamma,
        )
        self.weights = partial(task.weights, class_weights=class_weights)
        self.task, self.watched = task, watched
        self.factors = segmentation, attention  # of the two losses that a hybrid appends

    def losses(self, outputs, targets):
        """The loss of every image: outputs [B, K], of a hybrid in training [B, K + 2] -> tensor [B]."""
        losses = self.task_losses(outputs[:, : self.task.outputs], targets)
        for factor, column in zip(self.factors, outputs[:, self.task.outputs :].unbind(1)):
            losses = losses + factor * self.weights(targets) * column
        return losses

    def imitation(self, outputs, wanted):
        """How far every image's probabilities are from a teacher's: outputs, and its logits [B, K] -> [B]."""
        return self.task.imitation(outputs[:, : self.task.outputs], wanted)

    def columns(self, truth, side="val"):
        """The numbers of the findings whose AUROC exists; none on validation is an InputError."""
        averaged = self.task.averaged
        columns = np.flatnonzero(with_both_classes(truth[:, averaged])) + averaged.start
        if len(columns) == 0 and side == "val":
            raise InputError(
                "in validation no finding is present in one image and absent in another, so no AUROC can be "
                "watched: give it more images with --fractions, or ask other --findings"
            )
        return columns

    def watch(self, targets, outputs, side="val"):
        """Targets [N] or [N, K], outputs [N, K or more] on the CPU -> figures for the history. None where no
        finding has both classes, which on validation is an InputError."""
        outputs = outputs[:, : self.task.outputs]
        truth, scores = self.task.truth(targets), self.task.scores(outputs)
        aurocs = []
        for k in self.columns(truth, side):
            known = truth[:, k] >= 0
            aurocs.append(roc_auc_score(truth[known, k], scores[known, k]))
        outputs, targets = np.asarray(outputs), np.asarray(targets)
        if self.task.kind == "softmax":
            right = outputs.argmax(axis=1) == targets
        else:
            right = (outputs > 0) == (targets == 1)
        right = right[targets >= 0]  # where the label is known
        auroc = float(np.mean(aurocs)) if aurocs else None
        accuracy = float(right.mean()) if len(right) else None
        return {f"{side}_auroc": auroc, f"{side}_accuracy": accuracy}

    def merit(self, row):
        """What the best epoch has most of, rounded: figures that rounding errors alone tell apart are equal,
        and then the earlier epoch is kept."""
        if self.watched == "loss":
            return round(-row["val_loss"], 9)
        return round(row[f"val_{self.watched}"], 9)


def supervised(recipe, task, train_targets, val_targets, device):
    """The Supervised of a Recipe and a Task for the targets of training and validation. A note names findings
    whose validation AUROC does not exist; InputError, before training, where none exists."""
    class_weights, focal_gamma = None, 0.0
    if recipe.balance in ("weights", "both"):
        class_weights = torch.from_numpy(task.class_weights(train_targets)).to(device)
    if recipe.loss == "focal":
        focal_gamma = recipe.focal_gamma
    objective = Supervised(
        task,
        class_weights,
        recipe.label_smoothing,
        recipe.watch,
        focal_gamma=focal_gamma,
        segmentation=recipe.seg_weight,
        attention=recipe.attention_weight,
    )
    # What cannot be watched is found before training, not after its first epoch.
    truth = task.truth(val_targets)
    objective.columns(truth)
    missing = ~with_both_classes(truth)
    names = [name for name, absent in zip(task.findings, missing) if absent]
    if names and len(names) < len(missing):
        verb = "is" if len(names) == 1 else "are"
        say_once(
            f"note: {', '.join(names)} {verb} not watched: validation has no image with, or none without"
        )
    return objective


class Reconstruction:
    """The loss that a model without classes computes itself, one value an image; the least on validation is
    best."""

    @staticmethod
    def losses(outputs, targets):
        return outputs[:, 0]

    @staticmethod
    def weights(targets):
        return torch.ones(len(targets), device=targets.device)

    @staticmethod
    def watch(targets, outputs, side="val"):
        return {}

    @staticmethod
    def merit(row):
        return -row["val_loss"]


class Segmentation(Reconstruction):
    """The loss of lungs.LungNet, which computes it itself; the greatest mean Dice on validation is best."""

    @staticmethod
    def watch(targets, outputs, side="val"):
        return {f"{side}_dice": float((outputs[:, 1] / outputs[:, 2].clamp(min=1)).mean())}

    @staticmethod
    def merit(row):
        return row["val_dice"]
