"""The images that an audit looks at: those of one side whose truth is known, or some of them."""

from dataclasses import dataclass, field

import numpy as np

from common.console import InputError, say
from common.proportions import count_of

LEAST = 10  # patients with the finding, and without, for a figure of both


@dataclass
class Side:
    """`subset`: a Subset; `y`: int [N], 1 with the finding; `of_images`: how many the side has; `name`: "val"
    or "test"; `clean`: scores [N] and `features` [N, D] of the images as they are, once they are scored."""

    subset: object
    y: np.ndarray
    name: str
    of_images: int
    clean: np.ndarray = None
    features: np.ndarray = None
    patients: np.ndarray = field(init=False)

    def __post_init__(self):
        self.patients = np.asarray(self.subset.patients)


def too_few(y, patients):
    """Why there are too few patients for an AUROC, as text; "" if there are enough. y, patients: [N]."""
    counts = [count_of(patients[y == label]) for label in (1, 0)]
    if min(counts) >= LEAST:
        return ""
    return f"{counts[0]} patients with the finding and {counts[1]} without; {LEAST} of each are needed"


def side_of(subset, task, finding, name, most):
    """The Side of a Subset for a finding, of at most `most` images. What is left out is said.

    InputError if no image has a label."""
    truth = task.truth(subset.targets)[:, task.findings.index(finding)]
    known = np.flatnonzero(truth >= 0)
    if not len(known):
        raise InputError(f"none of the {len(subset)} {name} images has a label for {finding}: choose another")
    if len(known) < len(subset):
        say(f"note: {len(subset) - len(known)} of {len(subset)} images have no label for {finding}: left out")
    y, patients = truth[known].astype(int), np.asarray(subset.patients)[known]
    some = some_patients(y, patients, most)
    if len(some) < len(known):
        say(
            f"note: {len(some)} of {len(known)} images ({count_of(patients[some])} of {count_of(patients)} "
            f"patients) are audited, drawn at random; --most-images {len(known)} takes all"
        )
    taken = subset.take(known[some])
    say_unknown_patients(taken)
    return Side(taken, y[some], name, len(known))


def say_unknown_patients(subset):
    """A note on images of a Subset whose patient is not known."""
    if unknown := int((np.asarray(subset.files) == np.asarray(subset.patients)).sum()):
        say(f"note: the patients of {unknown} of {len(subset)} images are unknown: each counts as its own")


def some_patients(y, patients, most):
    """Positions int64, ascending, of all images of random patients, at most `most` of them: patients with and
    without the finding in turn, so that each kind is nearly half, as long as there are any.

    y: int [N]; patients: [N] names. A patient with both kinds of images counts as one with the finding."""
    if len(y) <= most:
        return np.arange(len(y))
    names, codes, counts = np.unique(patients, return_inverse=True, return_counts=True)
    sick = np.zeros(len(names), bool)
    np.logical_or.at(sick, codes, y == 1)
    order = np.random.default_rng(0).permutation(len(names))
    queues = [[k for k in order if sick[k] == kind] for kind in (True, False)]
    chosen, images = [], [0, 0]
    while any(queues):
        # The kind with fewer images so far is next, if there is one left of it.
        kind = int(images[1] < images[0])
        if not queues[kind]:
            kind = 1 - kind
        patient = queues[kind].pop(0)
        if chosen and sum(images) + counts[patient] > most:
            break
        images[kind] += counts[patient]
        chosen.append(patient)
    return np.flatnonzero(np.isin(codes, chosen))
