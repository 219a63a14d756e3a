"""What is asked of an image: yes/no questions ("findings"), each a column of scores and of truth.

Everything that chooses thresholds or draws tables works on such columns, one at a time.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import expit, logsumexp, softmax

from common import scaling
from common.console import InputError

CLASSES = ("NORMAL", "PNEUMONIA")
HEALTHY = ("normal", "healthy", "no finding", "no findings")  # in any case, with "_" or "-" for a space
DEVICES = ("support devices", "support device", "medical devices", "medical device", "devices", "device")
ANY_DISEASE, ANY_FINDING = "any disease", "any finding"
ANSWERS = ("negative", "unsure", "positive")  # of the triage: below @Rec, between, from @In on


def is_healthy(name):
    """Whether a class or finding of this name is the absence of any."""
    return name.lower().replace("_", " ").replace("-", " ").strip() in HEALTHY


def is_device(name):
    """Whether a finding of this name is no disease: a healthy person may have it too."""
    return name.lower().replace("_", " ").replace("-", " ").strip() in DEVICES


class Answer(NamedTuple):
    """Which logit answers a question: sign +1, or -1 where the question is whether that class is absent."""

    k: int
    sign: int = 1
    kind: str = "softmax"

    def logit(self, logits):
        """What rises with the probability: tensor [B, K] -> [B]."""
        return self.sign * logits[:, self.k]

    def probability(self, logits):
        """Logits [N, K] -> float64 [N]."""
        z = np.asarray(logits, dtype=np.float64)
        if self.kind == "sigmoid":
            return expit(self.sign * z[:, self.k])
        p = softmax(z, axis=1)[:, self.k]
        return p if self.sign > 0 else 1 - p


class Decision(NamedTuple):
    """A yes/no answer of predict.py: what `column` says of an image.

    `point`: "@Rec" and so on; `finding`: what is asked, and `k` its column of scores; `threshold`: None where
    there were too few images for one; `words`: the answers below it, and from it on."""

    column: str
    point: str
    finding: str
    k: int
    threshold: float | None
    words: tuple

    @property
    def threshold_column(self):
        """The name of a column that holds the threshold."""
        return "threshold" + self.column.removeprefix("decision")

    def answer(self, scores):
        """Scores [F] of one image -> one of `words`, None without a threshold."""
        if self.threshold is None:
            return None
        return self.words[int(scores[self.k] >= self.threshold)]


def effective_rule_in(at_rec, at_in):
    """From which score on the triage answers "positive": @In, or @Rec where that is not below it; then nobody
    is unsure. None without @In: nobody is positive."""
    return None if at_in is None else max(at_rec, at_in)


class Triage(NamedTuple):
    """One of ANSWERS for each image (calibration/triage.py), beside the Decisions of predict.py.

    `column`, `point`, `finding`, `k`: as of a Decision; `at_rec`: the threshold @Rec, None where there is
    none; `threshold`: that of "positive" (`effective_rule_in`), None where nobody is called so."""

    column: str
    point: str
    finding: str
    k: int
    at_rec: float | None
    threshold: float | None

    @property
    def threshold_column(self):
        """The name of a column that holds the threshold."""
        return f"threshold{self.point}" + self.column.removeprefix("triage")

    def answer(self, scores):
        """Scores [F] of one image -> one of ANSWERS, None without a threshold @Rec."""
        if self.at_rec is None:
            return None
        score = scores[self.k]
        if self.threshold is not None and score >= self.threshold:
            return ANSWERS[2]
        return ANSWERS[int(score >= self.at_rec)]


@dataclass(frozen=True)
class Task:
    """kind "softmax": an image is of one of K classes, the healthy one first. Its findings are the other
    classes and, where there are several, first of all "any disease", 1 - P(healthy). Targets are class
    numbers, int64 [N]; -1 unknown.

    kind "sigmoid": any number of K findings may be present. If "No Finding" is among them, "any finding",
    1 - P(No Finding), comes before them. Targets are int8 [N, K]: 1 present, 0 absent, -1 unknown.

    InputError for fewer than two classes (one finding), or names that are not unique.
    """

    classes: tuple = CLASSES
    kind: str = "softmax"

    def __post_init__(self):
        least = 1 if self.kind == "sigmoid" else 2
        if self.kind not in ("softmax", "sigmoid"):
            raise InputError(f"a task is softmax or sigmoid, not {self.kind!r}")
        if len(self.classes) < least or len(set(self.findings)) < len(self.findings):
            what = "a finding or more, all" if least == 1 else "two or more"
            raise InputError(f"a task needs {what} different classes, got {', '.join(self.classes)}")
        if len(set(self.classes)) < len(self.classes):
            raise InputError(f"a task needs two or more different classes, got {', '.join(self.classes)}")

    @property
    def _none(self):
        """The number of the class or finding that is the absence of all others; None if there is none."""
        if self.kind == "softmax":
            return 0
        return next((k for k, name in enumerate(self.classes) if is_healthy(name)), None)

    @property
    def findings(self):
        """Names of the columns."""
        if self.kind == "sigmoid":
            return self.classes if self._none is None else (ANY_FINDING, *self.classes)
        return self.classes[1:] if len(self.classes) == 2 else (ANY_DISEASE, *self.classes[1:])

    # ------------------------------------------------------------ names of columns

    # An only finding needs no name, and is decided at 0.5 too. All else is the same however many there are.

    @property
    def alone(self):
        """Whether there is one finding only."""
        return len(self.findings) == 1

    @property
    def one_of_many(self):
        """Whether an image is of one of three classes or more, so that it has a most probable class."""
        return self.kind == "softmax" and self.outputs > 2

    @property
    def column_words(self):
        """The findings as parts of column names, in order."""
        words = [re.sub(r"\s+", "_", name.lower()) for name in self.findings]
        if len(set(words)) < len(words):  # Edema beside edema: no two columns of one name
            return list(self.findings)
        return words

    @property
    def score_columns(self):
        """{finding: name of the column of its scores} in predict.py and monitor.py."""
        return {name: f"p_{word}" for name, word in zip(self.findings, self.column_words)}

    @property
    def scores_name(self):
        """What the scores of all findings together are called."""
        if self.alone:
            return self.score_columns[self.findings[0]]
        return "p"

    def decisions(self, thresholds, guaranteed=None):
        """What predict.py decides of each image: list of Decision, in the order of its columns.

        `thresholds`: {finding: threshold @Rec or None}; `guaranteed`: threshold @Guar of an only finding, if
        it has one."""
        if not self.alone:
            asked = enumerate(zip(self.findings, self.column_words))
            return [
                Decision(f"decision@Rec_{word}", "@Rec", name, k, thresholds[name], ("no", "yes"))
                for k, (name, word) in asked
            ]
        # An only finding is answered by the names of the classes.
        (name,) = self.findings
        words = self.classes if self.kind == "softmax" else (f"no {name}", name)
        points = {"@0.5": 0.5, "@Rec": thresholds[name]}
        if guaranteed is not None:
            points["@Guar"] = guaranteed
        return [Decision(f"decision{point}", point, name, 0, at, words) for point, at in points.items()]

    def triage(self, findings):
        """What predict.py answers besides `decisions`: list of Triage, empty where no finding has a
        "rule_in". `findings`: {name: what a calibration or a site says of it}."""
        if not any("rule_in" in of_finding for of_finding in findings.values()):
            return []
        found = []
        for k, (name, word) in enumerate(zip(self.findings, self.column_words)):
            column = "triage" if self.alone else f"triage_{word}"
            at_rec, at_in = findings[name].get("threshold"), None
            if "rule_in" in findings[name]:
                at_in = effective_rule_in(at_rec, findings[name]["rule_in"]["threshold"])
            found.append(Triage(column, "@In", name, k, at_rec, at_in))
        return found

    def by_finding(self, values):
        """{finding: value} as files for other programs hold it: the value itself of an only finding."""
        return values[self.findings[0]] if self.alone else values

    def told_apart(self, finding):
        """[finding], as a part of a name; [] of an only finding, which needs none."""
        return [] if self.alone else [finding]

    def chosen_finding(self, name, flag="--finding"):
        """The finding that a flag names, the only one without it. InputError if there is none of this name,
        or if the flag is needed."""
        if name is None and not self.alone:
            raise InputError(f"{flag}: which of {', '.join(self.findings)}?")
        if name is not None and name not in self.findings:
            raise InputError(f"{flag} {name} is not one of {', '.join(self.findings)}")
        return name or self.findings[0]

    # ------------------------------------------------------------ scores and truth

    @property
    def averaged(self):
        """Columns (a slice) over which a mean is taken. "any finding" is left out, because its AUROC is that
        of "No Finding"; "any disease" stands for the healthy class, so that the mean AUROC over K classes is
        that of each class against all others."""
        if self.kind == "softmax":
            return slice(0, None)
        return slice(len(self.findings) - len(self.classes), None)

    @property
    def outputs(self):
        """Number of logits a model needs."""
        return len(self.classes)

    def scores(self, logits, temperature=1.0):
        """Logits [N, K] -> float64 [N, F], the probability of every finding after dividing by `temperature`.

        In float64, because float32 would round confident scores to 1 and tie them."""
        z = np.asarray(logits, dtype=np.float64)
        if self.kind == "sigmoid":
            p = expit(z / temperature)
            if self._none is None:
                return p
            return np.concatenate([expit(-z[:, [self._none]] / temperature), p], axis=1)
        if self.outputs == 2:  # exact also where the other class's probability is below 1e-16
            return expit((z[:, 1:] - z[:, :1]) / temperature)
        p = softmax(z / temperature, axis=1)[:, 1:]
        return np.concatenate([p.sum(axis=1, keepdims=True).clip(max=1.0), p], axis=1)

    def log_odds(self, logits):
        """Logits [N, K] -> float64 [N, F]: log(p / (1 - p)) of every finding against the rest, not by way of
        p, which rounds to 1."""
        z = np.asarray(logits, dtype=np.float64)
        if self.kind == "sigmoid":
            return z if self._none is None else np.concatenate([-z[:, [self._none]], z], axis=1)
        if self.outputs == 2:
            return z[:, 1:] - z[:, :1]
        sick = [z[:, k] - logsumexp(np.delete(z, k, axis=1), axis=1) for k in range(1, self.outputs)]
        return np.stack([logsumexp(z[:, 1:], axis=1) - z[:, 0], *sick], axis=1)

    def scaled_scores(self, logits, calibration):
        """Logits [N, K] -> float64 [N, F]: probabilities after the scaling that a calibration.json has
        fitted, Platt's or by a temperature, whether its thresholds apply to these or not."""
        lines = scaling.lines(calibration, self.findings)
        if lines is None:
            return self.scores(logits, calibration["temperature"])
        slope, bias = np.array(lines).T
        return expit(self.log_odds(logits) * slope + bias)

    def scores_from(self, logits, calibration):
        """Logits [N, K] -> float64 [N, F]: the scores that the thresholds of a calibration.json apply to.
        Whoever decides by a calibration takes them from here."""
        if scaling.applied(calibration):
            return self.scaled_scores(logits, calibration)
        return self.scores(logits)

    def truth(self, targets):
        """Targets -> int8 [N, F]: 1 where the finding is present, 0 where it is not, -1 where unknown."""
        targets = np.asarray(targets)
        if self.kind == "sigmoid":
            truth = targets.astype(np.int8)
            if self._none is None:
                return truth
            none = truth[:, [self._none]]
            diseases = [not is_healthy(name) and not is_device(name) for name in self.classes]
            found = (truth[:, diseases] == 1).any(axis=1, keepdims=True)  # tables may leave No Finding empty
            derived = np.where(none >= 0, 1 - none, np.where(found, 1, -1))
            return np.concatenate([derived, truth], axis=1).astype(np.int8)
        truth = (targets[:, None] == np.arange(1, self.outputs)).astype(np.int8)
        truth[targets < 0] = -1
        return (
            truth if self.outputs == 2 else np.concatenate([truth.max(axis=1, keepdims=True), truth], axis=1)
        )

    def answer(self, name):
        """The Answer of a class or finding. InputError if there is none of this name."""
        if name in (ANY_DISEASE, ANY_FINDING) and name in self.findings and name not in self.classes:
            return Answer(self._none, -1, self.kind)
        if name not in self.classes:
            raise InputError(
                f"{name} is not one of {', '.join(dict.fromkeys((*self.classes, *self.findings)))}"
            )
        return Answer(self.classes.index(name), 1, self.kind)

    # ------------------------------------------------------------ training

    def class_weights(self, targets):
        """What balances the loss, float32 [K]. softmax: n / (K n_k) for every class k, 1 on average over the
        images. sigmoid: negatives / positives of every finding, for `pos_weight`; 1 where it has none."""
        targets = np.asarray(targets)
        if self.kind == "sigmoid":
            positives, negatives = (targets == 1).sum(axis=0), (targets == 0).sum(axis=0)
            return np.where(positives * negatives, negatives / np.maximum(positives, 1), 1).astype(np.float32)
        counts = np.bincount(targets[targets >= 0], minlength=self.outputs)
        return (counts.sum() / (self.outputs * np.maximum(counts, 1))).astype(np.float32)

    def losses(self, logits, targets, class_weights=None, label_smoothing=0.0, focal_gamma=0.0):
        """The loss of every image: logits [B, K], targets [B] or [B, K] -> tensor [B].

        softmax: cross-entropy times the class weight; 0 where the class is unknown. sigmoid: the sum over the
        known findings of binary cross-entropy, its positive part times `class_weights`; unknown findings add
        nothing. With `focal_gamma` each term is multiplied by (1 - p) ** gamma, p the probability of what is
        true: the focal loss (Lin et al. 2017, arXiv:1708.02002). A batch's loss is the sum of these over the
        sum of `weights`, whoever computes which part of it."""
        from torch.nn import functional as F  # here, not above: reports need no torch

        if self.kind == "sigmoid":
            known = targets >= 0
            true = targets.clamp(min=0).to(logits.dtype)
            wanted = true * (1 - label_smoothing) + label_smoothing / 2
            each = F.binary_cross_entropy_with_logits(
                logits, wanted, pos_weight=class_weights, reduction="none"
            )
            if focal_gamma:
                each = each * (logits * (1 - 2 * true)).sigmoid() ** focal_gamma
            return (each * known).sum(dim=1)
        known, targets = targets >= 0, targets.clamp(min=0)
        each = F.cross_entropy(
            logits, targets, weight=class_weights, label_smoothing=label_smoothing, reduction="none"
        )
        each = each * known
        if focal_gamma:
            others = logits.scatter(1, targets.unsqueeze(1), -math.inf)  # 1 - p without loss of digits
            each = each * (others.logsumexp(1) - logits.logsumexp(1)).exp() ** focal_gamma
        return each

    def imitation(self, logits, wanted):
        """How far every image's probabilities are from those of a teacher: logits and the teacher's, [B, K]
        -> tensor [B], 0 where they agree. softmax: the Kullback-Leibler divergence from the teacher's;
        sigmoid: its mean over the findings."""
        from torch.nn import functional as F

        if self.kind == "sigmoid":
            p = wanted.sigmoid()
            each = p * (F.logsigmoid(wanted) - F.logsigmoid(logits))
            return (each + (1 - p) * (F.logsigmoid(-wanted) - F.logsigmoid(-logits))).mean(dim=1)
        there = wanted.log_softmax(dim=1)
        return (there.exp() * (there - logits.log_softmax(dim=1))).sum(dim=1)

    def weights(self, targets, class_weights=None):
        """What each image counts for in the mean loss: targets [B] or [B, K] -> tensor [B]; sigmoid: the
        number of its known findings; softmax: the weight of its class, 0 where that is unknown."""
        if self.kind == "sigmoid":
            return (targets >= 0).sum(dim=1).float()
        known = (targets >= 0).float()
        return known if class_weights is None else class_weights[targets.clamp(min=0)] * known
