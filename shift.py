"""Is an image, or a batch of images, like those a run was validated on?

An image is judged by what the model's head reads: its Mahalanobis distance from the training images (Lee et
al. 2018, arXiv:1807.03888, without classes), with the covariance shrunk as by Ledoit and Wolf (2004). Its
typicality is a conformal p-value (Vovk et al. 2005): the share of validation images at least as far away.

A batch is judged by three tests at a joint level of 5%: the share of odd images, and two permutation tests
(Gretton et al. 2012, kernel two-sample test), of the features and of the scores. Images that the model calls
sick are compared with such images, and the others with the others, so that another share of sick people alone
is no shift. One image a patient takes part, because images of one patient are no independent draws.
"""

import hashlib
import heapq

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import betabinom
from sklearn.covariance import LedoitWolf

from common import InputError
from intervals import in_short

VERSION = 1  # raise it when what is learnt changes
ODD = 0.01  # an image of this typicality or less is odd
ODD_NEEDS = 99  # validation images that it takes: the oddest of n has typicality 1 / (n + 1)
LEVEL = 0.05  # of the three tests together
LEAST = 20  # patients that a verdict needs
DRAWS = 999  # of the permutation tests
TRAINING = 1024  # training images that the distance is learnt from
DEEP = 64  # directions of the features that the tests look at, those of most variance
BATCH = 1000  # patients of a batch, and of validation, that take part in the tests
ROOM = 1_000_000  # bytes of the largest stored matrix
VERDICTS = {
    "like": "like validation",
    "shifted": "shifted: the recall floor is not promised here",
    "few": f"too few images to tell (n < {LEAST})",
}


# ---------------------------------------------------------------- what a run keeps


def learn(train, val, logits, patients):
    """What `Reference` needs, as arrays by name: train float [n, D] and val [N, D], features of training and
    of validation images; logits [N, K] and `patients` [N] of the latter."""
    mean = train.mean(axis=0, dtype=np.float64)
    variances, axes = np.linalg.eigh(LedoitWolf(assume_centered=True).fit(train - mean).covariance_)
    kept = max(1, min(len(mean), ROOM // (4 * len(mean))))  # those of most variance, where all take much room
    whiten = (axes / np.sqrt(variances.clip(min=1e-12)))[:, ::-1][:, :kept]
    arrays = {"mean": mean.astype(np.float32), "whiten": whiten.astype(np.float32)}
    z, some = _project(arrays, val), one_each(patients)[:BATCH]
    arrays["distances"] = np.sort(np.linalg.norm(z, axis=1)).astype(np.float32)
    return arrays | {"features": z[some, :DEEP].astype(np.float32), "logits": logits[some].astype(np.float32)}


def _project(arrays, features):
    """Features float [N, D] -> float64 [N, k], of unit covariance on the training images, most variance
    first."""
    return (features.astype(np.float64) - arrays["mean"]) @ arrays["whiten"].astype(np.float64)


def one_each(patients, seed=0):
    """The positions of one image of each patient, drawn at random, in random order."""
    order = np.random.default_rng(seed).permutation(len(patients))
    _, first = np.unique(np.asarray(patients)[order], return_index=True)
    return order[np.sort(first)]


class Reference:
    """What a run was validated on, from the arrays of `learn`. InputError naming `path` if these are
    damaged."""

    def __init__(self, arrays, path):
        try:
            D, k = arrays["whiten"].shape
            M, K = arrays["logits"].shape
            shapes = {"mean": (D,), "features": (M, min(k, DEEP)), "distances": (len(arrays["distances"]),)}
            good = all(arrays[name].shape == shape for name, shape in shapes.items()) and M * k * K > 0
            names = ("mean", "whiten", "distances", "features", "logits")
            good = good and all(arrays[n].dtype == np.float32 and np.isfinite(arrays[n]).all() for n in names)
        except (KeyError, ValueError, AttributeError):
            good = False
        if not good:
            raise InputError(f"{path} is damaged: run calibrate.py again")
        self.arrays, self.distances = arrays, np.sort(arrays["distances"])

    @property
    def logits(self):
        """Logits [M, K] of the validation images that take part in the tests, one a patient."""
        return self.arrays["logits"]

    def place(self, features):
        """Features [N, D] -> (typicality float64 [N] in (0, 1], what `judge` takes [N, k])."""
        z = _project(self.arrays, features)
        far = len(self.distances) - np.searchsorted(self.distances, np.float32(np.linalg.norm(z, axis=1)))
        return (1 + far) / (1 + len(self.distances)), z[:, :DEEP].astype(np.float32)

    def judge(self, batch, usual_called):
        """The verdict on a Batch, as JSON; usual_called bool [M]: whom of its validation images the model
        calls sick."""
        n = len(batch.typicality)
        report = {
            "patients": n,
            "odd": float((batch.typicality <= ODD).mean())
            if n and len(self.distances) >= ODD_NEEDS
            else None,
            "called": float(batch.called.mean()) if n else None,
            "called_in_validation": float(usual_called.mean()),
        }
        tests = {}
        if n:
            tests["odd"] = odd_test(int((batch.typicality <= ODD).sum()), n, len(self.distances))
            strata, usual = batch.called, usual_called
            pairs = {
                "features": (self.arrays["features"], batch.places),
                "scores": (self.logits, batch.logits),
            }
            for name, (here, there) in pairs.items():
                tests[name] = two_sample_test(here, there, usual, strata)
        known = [p for p in tests.values() if p is not None]
        joint = min(1.0, len(tests) * min(known)) if known else None
        verdict = "shifted" if joint is not None and joint <= LEVEL else "few" if n < LEAST else "like"
        return report | {"p": tests, "p_joint": joint, "verdict": verdict, "says": VERDICTS[verdict]}


def sentence(verdict):
    """A verdict in a line."""
    if not verdict["patients"]:
        return "no image could be read: nothing can be said of these"
    p = verdict["p"]
    tests = ", ".join(f"{name} {in_short(value)}" for name, value in p.items())
    odd = f"which are odd cannot be told (that takes {ODD_NEEDS} validation images)"
    if verdict["odd"] is not None:
        odd = f"{100 * verdict['odd']:.1f}% odd (validation {100 * ODD:.0f}%)"
    called, usual = verdict["called"], verdict["called_in_validation"]
    return (
        f"{verdict['says']}; {verdict['patients']} patients, {odd}, {100 * called:.0f}% called sick "
        f"(validation {100 * usual:.0f}%); p: {tests}"
    )


# ---------------------------------------------------------------- tests


def odd_test(odd, n, validated):
    """P(at least `odd` of n images are odd), if they are drawn like `validated` validation images, none tied:
    beta-binomial, since the limit is the r-th largest distance of validation. None if validation is too small
    for any image to be odd."""
    if validated < ODD_NEEDS:
        return None
    r = int(ODD * (validated + 1))
    return 1.0 if odd == 0 else float(betabinom.sf(odd - 1, n, r, validated + 1 - r))


def two_sample_test(usual, new, usual_strata, new_strata, draws=DRAWS, seed=0):
    """Whether two samples [m, D] and [n, D] come from one distribution within each stratum (labels [m], [n]):
    the p-value of a permutation test of the squared maximum mean discrepancy, added up over the strata, with
    a Gaussian kernel as wide as the median distance. None if no stratum has two of each."""
    rng, observed, drawn, some = np.random.default_rng(seed), 0.0, np.zeros(draws), False
    for stratum in np.unique(new_strata):
        a, b = usual[usual_strata == stratum], new[new_strata == stratum]
        if min(len(a), len(b)) < 2:
            continue
        some, both = True, np.concatenate([a, b]).astype(np.float64)
        squared = cdist(both, both, "sqeuclidean")
        kernel = np.exp(-squared / max(np.median(squared), 1e-12))
        weights = np.concatenate([np.full(len(a), -1 / len(a)), np.full(len(b), 1 / len(b))])
        scale = len(a) * len(b) / len(both)  # else small strata, which vary more, would decide
        mixed = rng.permuted(np.tile(weights, (draws, 1)), axis=1).T  # (N, draws)
        observed += scale * (weights @ kernel @ weights)
        drawn += scale * ((kernel @ mixed) * mixed).sum(axis=0)
    return float(1 + (drawn >= observed - 1e-12).sum()) / (1 + draws) if some else None


# ---------------------------------------------------------------- a batch as it comes in


def checksum(text):
    """64 bits of a text, as good as random."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big"
    )


class Batch:
    """One image each of at most BATCH patients, of all images that come in: those whose names have the least
    checksums (bottom-k sampling, Cohen and Kaplan 2007), so that neither memory nor the order matters."""

    def __init__(self):
        self.rows = {}  # patient: (checksum of the image, typicality, place, logits, called)
        self.heap = []  # (-checksum, patient) of each

    def add(self, name, patient, *values):
        """An image: its name, whose it is, and its typicality, place (see Reference.place), logits, and
        whether it is called sick."""
        here = checksum(name)
        if patient in self.rows:
            if here < self.rows[patient][0]:
                self.rows[patient] = (here, *values)
            return
        key = -checksum(f"patient {patient}")
        if len(self.heap) < BATCH:
            heapq.heappush(self.heap, (key, patient))
        elif key > self.heap[0][0]:
            del self.rows[heapq.heapreplace(self.heap, (key, patient))[1]]
        else:
            return
        self.rows[patient] = (here, *values)

    def _column(self, i):
        return np.array([row[i] for row in self.rows.values()])

    typicality = property(lambda self: self._column(1))
    places = property(lambda self: self._column(2))
    logits = property(lambda self: self._column(3))
    called = property(lambda self: self._column(4).astype(bool))
