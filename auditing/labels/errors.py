"""Which labels are likely to be wrong: confident learning (Northcutt et al. 2021, arXiv:1911.00068), as the
package cleanlab does it, on the probabilities of a classifier that never saw the patient. No torch."""

from dataclasses import dataclass

import numpy as np

from auditing.signals import FOLDS, out_of_fold
from common.console import InputError
from common.proportions import count_of

LEAST = 2 * FOLDS  # patients of a class, so that each fold can hold some and leave most to learn from
INSTALL = "python -m pip install 'cleanlab>=2.9'"


def check_cleanlab():
    """InputError if the optional package cleanlab is not installed."""
    try:
        import cleanlab.filter  # noqa: F401
    except ImportError as error:
        raise InputError(f"likely label errors need the package cleanlab ({error}): {INSTALL}") from None


@dataclass(frozen=True)
class Errors:
    """What is said of N labels. `y`: the labels, int [N]; `p`: out-of-fold probabilities, float64 [N, K];
    `issue`: bool [N], whether the label is likely to be wrong; `order`: positions int64 [N], the likely
    errors first, each part from the least probable label on."""

    y: np.ndarray
    p: np.ndarray
    issue: np.ndarray
    order: np.ndarray

    @property
    def of_label(self):
        """The probability of each label: float64 [N]. cleanlab calls it self-confidence."""
        return self.p[np.arange(len(self.y)), self.y]

    @property
    def likely(self):
        """The most probable class of each image: int64 [N]."""
        return self.p.argmax(axis=1)


def too_rare(y, patients, count):
    """How many patients each class has that has too few to be asked: {class: patients} of 0 to `count` - 1.

    y: int [N]; patients: [N]."""
    people = {k: count_of(patients[y == k]) for k in range(count)}
    return {k: number for k, number in people.items() if number < LEAST}


def find_errors(x, y, patients, count):
    """The Errors of labels y, int [N] from 0 to `count` - 1, of images with features x, float [N, D].

    patients: [N]; no image is judged by a classifier that saw its patient. Every class needs LEAST patients
    (`too_rare`). InputError without cleanlab."""
    check_cleanlab()
    return judged(y, out_of_fold(np.asarray(x, np.float64), y, np.asarray(patients), count))


def judged(y, p):
    """The Errors of labels y, int [N], by out-of-fold probabilities p, float64 [N, K].

    The confident joint estimates how many images of each class carry which label; of each pair of classes,
    as many labels as are estimated to be wrong are called so, the least probable ones first."""
    from cleanlab.filter import find_label_issues  # slow to import

    # Its default, "prune by noise rate", and one process: the work takes a second.
    issue = find_label_issues(y, p, filter_by="prune_by_noise_rate", n_jobs=1)
    of_label = p[np.arange(len(y)), y]
    return Errors(y, p, issue, np.lexsort([of_label, ~issue]))
