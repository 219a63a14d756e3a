"""What is asked of an image: a few yes/no questions ("findings"), each a column of scores and of truth.

Everything that chooses thresholds or draws tables works on such columns, one at a time.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, softmax

from common import InputError

CLASSES = ("NORMAL", "PNEUMONIA")


@dataclass(frozen=True)
class Task:
    """One of K classes an image, the healthy one first: K - 1 findings, one for every other class.

    Targets are class numbers, int64 [N]. InputError for fewer than two classes, or names that are not unique.
    """

    classes: tuple = CLASSES

    def __post_init__(self):
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise InputError(f"a task needs two or more different classes, got {', '.join(self.classes)}")

    @property
    def findings(self):
        """Names of the columns."""
        return self.classes[1:]

    @property
    def outputs(self):
        """Number of logits a model needs."""
        return len(self.classes)

    def scores(self, logits, temperature=1.0):
        """Logits [N, K] -> float64 [N, F], the probability of every finding after dividing by `temperature`.

        In float64, because float32 would round confident scores to 1 and tie them."""
        z = np.asarray(logits, dtype=np.float64)
        if self.outputs == 2:  # exact also where the other class's probability is below 1e-16
            return expit((z[:, 1:] - z[:, :1]) / temperature)  # as metrics.tempered, to the last digit
        return softmax(z / temperature, axis=1)[:, 1:]

    def truth(self, targets):
        """Targets int64 [N] -> int8 [N, F]: 1 where the finding is present, else 0."""
        return (np.asarray(targets)[:, None] == np.arange(1, self.outputs)).astype(np.int8)

    def class_weights(self, targets):
        """n / (K n_k) for every class k, float32 [K]: 1 on average over the images."""
        counts = np.bincount(targets, minlength=self.outputs)
        return (len(targets) / (self.outputs * np.maximum(counts, 1))).astype(np.float32)

    def losses(self, logits, targets, class_weights=None, label_smoothing=0.0):
        """Cross-entropy of every image, times its class weight: logits [B, K], targets [B] -> tensor [B].

        A batch's loss is the sum of these over the sum of `weights`, whoever computes which part of it."""
        from torch.nn import functional as F  # here, not above: reports need no torch

        return F.cross_entropy(
            logits, targets, weight=class_weights, label_smoothing=label_smoothing, reduction="none"
        )

    def weights(self, targets, class_weights=None):
        """What each image counts for in the mean loss: targets [B] -> tensor [B]."""
        if class_weights is None:
            return targets.new_ones(targets.shape, dtype=None).float()
        return class_weights[targets]
