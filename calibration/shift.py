"""Is an image, or a batch of images, like those a run was validated on?

An image is judged by what the model's head reads: its Mahalanobis distance from the training images (Lee et
al. 2018, arXiv:1807.03888, without classes), with the covariance shrunk as by Ledoit and Wolf (2004). Its
typicality is a conformal p-value (Vovk et al. 2005): the share of validation images at least as far away.

A batch is judged by three tests at a joint level of 5%: the share of odd images, and two permutation tests
(Gretton et al. 2012, kernel two-sample test), of the features and of the scores. Another share of sick people
alone is no shift, since recall does not depend on it: shares.py tries whether validation images, drawn by
their true labels at another share, are like the batch. One image a patient takes part, because images of one
patient are no independent draws.
"""

import hashlib
import heapq

import numpy as np
from sklearn.covariance import LedoitWolf

from calibration.shares import LEVEL, ODD, ODD_NEEDS, Pool, joint, mean_test, questions, search
from common.console import InputError
from common.proportions import in_short
from common.safe_files import load_arrays

VERSION = 2  # raise it when what is learnt, or how it is judged, changes
LEAST = 20  # patients that a verdict needs
TRAINING = 1024  # training images that the distance is learnt from
DEEP = 64  # directions of the features that the tests look at, those of most variance
BATCH = 1000  # patients of a batch, and of validation, that take part in the tests
ROOM = 1_000_000  # bytes of the largest stored matrix
VERDICTS = {
    "like": "like validation",
    "share": "compatible with the validation images at another share of {people} ({spans})",
    "shifted": "shifted: other images than those of validation, and not only another share of {people}; the "
    "recall floor is not promised here",
    "few": f"too few images to tell (n < {LEAST})",
    "unknown": "cannot be told: validation has too few patients of one class to try another share",
}
DEPENDS = (
    "if nothing else differs, recall and specificity are as in validation, and precision, accuracy, NPV and "
    "calibrated probabilities change with that share. Sick people whom the model misses here would look the "
    "same: labels alone can tell"
)


# ---------------------------------------------------------------- what a run keeps


def learn(train, val, logits, patients, labels):
    """What `Reference` needs, as arrays by name: train float [n, D] and val [N, D], features of training and
    of validation images; logits [N, K], `patients` [N] and true labels int [N, G] (see shares.kinds) of the
    latter."""
    mean = train.mean(axis=0, dtype=np.float64)
    # Nothing reads the inverse, which takes minutes of an ensemble with thousands of features.
    shrunk = LedoitWolf(assume_centered=True, store_precision=False).fit(train - mean)
    variances, axes = np.linalg.eigh(shrunk.covariance_)
    kept = max(1, min(len(mean), ROOM // (4 * len(mean))))  # those of most variance, where all take much room
    whiten = (axes / np.sqrt(variances.clip(min=1e-12)))[:, ::-1][:, :kept]
    arrays = {"mean": mean.astype(np.float32), "whiten": whiten.astype(np.float32)}
    z, some = _project(arrays, val), one_each(patients)[:BATCH]
    distances = np.linalg.norm(z, axis=1).astype(np.float32)
    arrays |= {"distances": np.sort(distances), "far": distances[some], "labels": labels[some]}
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
    damaged.

    Those of version 1 hold no labels: they tell odd images, but cannot judge a batch."""

    def __init__(self, arrays, path):
        try:
            good = _whole(arrays)
        except (KeyError, ValueError, AttributeError):
            good = False
        if not good:
            raise InputError(f"{path} is damaged: run calibrate.py again")
        self.arrays, self.distances = arrays, np.sort(arrays["distances"])
        self.labelled = "labels" in arrays

    @property
    def logits(self):
        """Logits [M, K] of the validation images that take part in the tests, one a patient."""
        return self.arrays["logits"]

    def place(self, features):
        """Features [N, D] -> (typicality float64 [N] in (0, 1], what `judge` takes [N, 1 + k]: the distance,
        and the features of unit covariance)."""
        z = _project(self.arrays, features)
        distance = np.linalg.norm(z, axis=1).astype(np.float32)
        far = len(self.distances) - np.searchsorted(self.distances, distance)
        places = np.concatenate([distance[:, None], z[:, :DEEP].astype(np.float32)], axis=1)
        return (1 + far) / (1 + len(self.distances)), places

    def judge(self, batch, usual_called, task):
        """The verdict on a Batch of images of a Task, as JSON; usual_called bool [M]: whom of its validation
        images the model calls sick."""
        n, odd = len(batch.typicality), None
        if n and len(self.distances) >= ODD_NEEDS:
            odd = float((batch.typicality <= ODD).mean())
        report = {
            "version": VERSION,
            "patients": n,
            "odd": odd,
            "called": float(batch.called.mean()) if n else None,
            "called_in_validation": float(usual_called.mean()),
        }
        if not n:
            return report | _conclusion("few", {}, None)
        scores = task.scores(np.concatenate([self.logits, batch.logits]))
        pool = self._pool(batch)
        asked = questions(task, self.arrays["labels"], scores)

        alike = "few" if n < LEAST else "like"  # the verdict where no test finds a difference

        # First against all of validation, at its own shares.
        tests = pool.tests(np.arange(pool.M))
        p = joint(tests)
        if p is None or (p > LEVEL and not asked):
            return report | _conclusion(alike, tests, p)
        if not asked:
            return report | _conclusion("unknown", tests, p)
        usual = np.flatnonzero(asked[0].labels >= 0)
        same_share = mean_test(asked[0].values, usual, pool.batch) > LEVEL
        if p > LEVEL and same_share:
            return report | _conclusion(alike, tests, p)

        # Then at other shares, of one kind of people at a time: one explanation is enough.
        answers = []
        for question in asked:
            answers.append((question, search(question, pool, batch.seed)))
            if answers[-1][1].p_joint > LEVEL:
                break
        question, found = max(answers, key=lambda answer: answer[1].p_joint)
        if found.p_joint <= LEVEL:
            tried = asked[0]
            if len(asked) > 1:
                tried = tried._replace(people="people with any finding, or with a single one")
            return report | _conclusion("shifted", found.tests, found.p_joint, tried)
        verdict = "few" if n < LEAST else "share"
        return report | _conclusion(verdict, found.tests, found.p_joint, question, found.spans)

    def _pool(self, batch):
        """All that is compared, validation first. Not divided by score: on corrupted validation images that
        found fewer shifts (docs/notebook/22-silently-wrong.md)."""
        places = batch.places
        samples = {
            "features": np.concatenate([self.arrays["features"], places[:, 1:]]),
            "scores": np.concatenate([self.logits, batch.logits]),
        }
        distances = np.concatenate([self.arrays["far"], places[:, 0]])
        return Pool(distances, samples, len(self.logits))


def reference_of(run, name="", key=None):
    """The Reference in a run's reference.npz; None if there is none, or none with this key. InputError if it
    is damaged."""
    path = run.reference_file(name)
    if not path.exists():
        return None
    arrays = load_arrays(path)
    if key is not None and str(arrays.get("key")) != key:
        return None
    return Reference(arrays, path)


def _whole(arrays):
    """Whether the arrays of `learn` are all there, of the right kind and shape."""
    D, k = arrays["whiten"].shape
    M, K = arrays["logits"].shape
    shapes = {"mean": (D,), "features": (M, min(k, DEEP)), "distances": (len(arrays["distances"]),)}
    floats = ["mean", "whiten", "distances", "features", "logits"]
    good = M * k * K > 0
    if "labels" in arrays:
        labels = arrays["labels"]
        shapes["far"] = (M,)
        floats.append("far")
        good = good and labels.ndim == 2 and len(labels) == M and labels.dtype == np.int16
        good = good and labels.shape[1] > 0 and labels.min() >= -1 and labels.max() <= max(1, K - 1)
    good = good and all(arrays[name].shape == shape for name, shape in shapes.items())
    return good and all(arrays[n].dtype == np.float32 and np.isfinite(arrays[n]).all() for n in floats)


def _conclusion(verdict, tests, p_joint, question=None, spans=None):
    """The part of a verdict that the tests decide, as JSON."""
    people = question.people if question else "sick people"
    shares = None
    if spans is not None:
        shares = {name: span.tolist() for name, span in zip(question.groups, spans)}
    usual = None
    if question:
        known = question.labels[question.labels >= 0]
        usual = {name: float((known == k).mean()) for k, name in enumerate(question.groups)}
    says = VERDICTS[verdict].format(people=people, spans=_in_words(shares, usual))
    found = {"p": tests, "p_joint": p_joint, "verdict": verdict, "says": says}
    return found | {"people": people, "shares": shares, "shares_in_validation": usual}


def _in_words(shares, usual):
    """The spans of all groups but the first, as text."""
    if shares is None:
        return ""
    texts = []
    for name in list(shares)[1:]:
        low, high = shares[name]
        text = f"{100 * low:.0f}% to {100 * high:.0f}%; validation {100 * usual[name]:.0f}%"
        if len(shares) > 2:
            text = f"{name} {text}"
        texts.append(text)
    return ", ".join(texts)


def sentence(verdict):
    """A verdict in a line."""
    if not verdict["patients"]:
        return "no image could be read: nothing can be said of these"
    p = verdict["p"]
    tests = ", ".join(f"{name} {in_short(value)}" for name, value in p.items())
    odd = f"how many are odd cannot be told (that takes {ODD_NEEDS} validation images)"
    if verdict["odd"] is not None:
        odd = f"{100 * verdict['odd']:.1f}% odd (validation {100 * ODD:.0f}%)"
    called, usual = verdict["called"], verdict["called_in_validation"]
    says = verdict["says"]
    if verdict["verdict"] == "share":
        says += f": {DEPENDS}"
    return (
        f"{says}; {verdict['patients']} patients, {odd}, {100 * called:.0f}% called sick "
        f"(validation {100 * usual:.0f}%); p: {tests}"
    )


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
        """One value of each row, in the order of the checksums, so that the verdict does not depend on the
        order in which images came in."""
        rows = sorted(self.rows.values(), key=lambda row: row[0])
        return np.array([row[i] for row in rows])

    seed = property(lambda self: sum(row[0] for row in self.rows.values()) % 2**32)
    typicality = property(lambda self: self._column(1))
    places = property(lambda self: self._column(2))
    logits = property(lambda self: self._column(3))
    called = property(lambda self: self._column(4).astype(bool))


# ---------------------------------------------------------------- one image


def unlike(pixels, size, colour, results):
    """What about an image is unlike the training images, as text; empty if nothing."""
    notes = []
    values = {"mean": float(pixels.mean()) / 255, "std": float(pixels.std()) / 255}
    for key, word in (("mean", "brightness"), ("std", "contrast")):
        low, high = results["input_range"][key]
        if not low - 1e-6 <= values[key] <= high + 1e-6:
            notes.append(f"{word} {values[key]:.2f} outside the training range {low:.2f} to {high:.2f}")
    for value, key in zip(size, ("width", "height")):
        low, high = results["split"]["original_size"][key]
        resized_before = low == high  # such a set has one size, which says nothing
        if not resized_before and not low <= value <= high:
            notes.append(f"{key} {value} px outside the training range {low} to {high}")
    if colour > 0.08:
        notes.append("colour photograph?")
    if not notes:
        return ""
    return "unlike the training images: " + ", ".join(notes)
