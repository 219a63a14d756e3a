"""What training minimises, and what is watched on validation to choose the best epoch."""

from functools import partial

import torch
from sklearn.metrics import roc_auc_score


class Supervised:
    """Cross-entropy of a Task; what is watched on validation is the AUROC of its first finding."""

    def __init__(self, task, class_weights=None, label_smoothing=0.0):
        self.losses = partial(task.losses, class_weights=class_weights, label_smoothing=label_smoothing)
        self.weights = partial(task.weights, class_weights=class_weights)
        self.task = task

    def watch(self, targets, outputs):
        """Targets [N], logits [N, K] on the CPU -> figures for the history."""
        truth, scores = self.task.truth(targets)[:, 0], self.task.scores(outputs)[:, 0]
        return {"val_auroc": float(roc_auc_score(truth, scores))}

    @staticmethod
    def merit(row):
        """What the best epoch has most of."""
        return row["val_auroc"]


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
    def watch(targets, outputs):
        return {}

    @staticmethod
    def merit(row):
        return -row["val_loss"]
