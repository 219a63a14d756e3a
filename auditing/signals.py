"""Section 3 of an audit: what else the features tell, among patients without the finding."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from auditing.figures import ERROR, Curve
from cohort.who import known_ages
from common.console import say
from common.proportions import count_of
from data import read_listing
from images.decode import read_image

FOLDS, LEAST = 5, 20  # patients with a signal, and without, for a probe
SPREAD = 10.0  # of the prior of a probe's log odds: equal for every number of features
COARSE = 32  # side of the pixels that a probe is compared with
MOST_VALUES = 6  # of one column


def signals_of(cohort, sizes):
    """{name: (which images have the signal bool [N], of which images it is known bool [N])}.

    `cohort`: {name: array [N]} or None (listing.COHORT); `sizes`: (width, height) of the originals, float
    [N, 2], NaN where not known. A column of two values is one signal, of more a signal for each value."""
    found, cohort = {}, cohort or {}
    for name in ("sex", "view", "machine"):
        if name not in cohort:
            continue
        known = cohort[name] != ""
        values, counts = np.unique(cohort[name][known], return_counts=True)
        common = values[np.argsort(-counts, kind="stable")][:MOST_VALUES]
        if len(values) == 2:
            common = common[1:]
        for value in common:
            if len(values) > 1:
                found[f"{name} {value}"] = (cohort[name] == value, known)
    numbers = {"width": sizes[:, 0], "aspect ratio": sizes[:, 0] / sizes[:, 1]}
    if "age" in cohort:
        numbers = {"age": np.where(known_ages(cohort["age"]), cohort["age"], np.nan)} | numbers
    for name, values in numbers.items():
        known = np.isfinite(values)
        if known.any():
            middle = np.median(values[known])
            above = np.greater(values, middle, where=known, out=np.zeros(len(values), bool))
            found[f"{name} above {middle:.4g}"] = (above, known)
    return found


def original_sizes(config, files, results):
    """(width, height) of the original of each file of a DataConfig, float [N, 2]; NaN where a file cannot be
    read, or where all originals of the training have one size, which was given them before."""
    ranges = results["split"].get("original_size", {})
    if ranges and all(low == high for low, high in ranges.values()):
        return np.full((len(files), 2), np.nan)

    root = read_listing(config).root

    def read(file):
        try:
            return read_image(os.path.join(root, file), config.img_size)[1]
        except OSError:
            return np.nan, np.nan

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes = np.array(list(pool.map(read, files)), np.float64)
    if lost := int(np.isnan(sizes[:, 0]).sum()):
        say(f"note: the originals of {lost} of {len(files)} images cannot be read: their sizes are unknown")
    return sizes


def probe(x, signal, patients):
    """The probability of a signal for every image by a logistic regression that never saw its patient: x
    [N, D], signal bool [N] -> float64 [N]."""
    return out_of_fold(x, signal.astype(int), patients, 2)[:, 1]


def out_of_fold(x, y, patients, count):
    """The probability of each class for every image by a logistic regression that never saw its patient: x
    [N, D], classes y int [N] from 0 to `count` - 1 -> float64 [N, count].

    Five folds of whole patients, alike in classes. Features are standardised; the prior of the weights gives
    log odds one spread whatever D is."""
    told = np.zeros((len(x), count))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    for rest, held_out in folds.split(x, y, patients):
        model = LogisticRegression(C=SPREAD / x.shape[1], max_iter=2000)
        fitted = make_pipeline(StandardScaler(), model).fit(x[rest], y[rest])
        # A class that is in no other fold keeps probability 0.
        told[np.ix_(held_out, fitted.classes_)] = fitted.predict_proba(x[held_out])
    return told


def coarse(pixels):
    """uint8 [N, S, S] -> float64 [N, COARSE * COARSE], means over areas."""
    from skimage.transform import resize  # slow to import

    small = [resize(image.astype(float), (COARSE, COARSE), order=1, anti_aliasing=True) for image in pixels]
    return np.stack(small).reshape(len(pixels), -1)


def signal_figures(side, signals):
    """{"signals": [{"name", "with", "without" (patients), "features", "pixels", "score": spans of AUROC}],
    "left_out": [text]}; the score's is folded to 0.5 and above.

    signals: `signals_of` the images without the finding, in the order of the Side. Intervals hold for all
    signals together."""
    healthy, left_out, asked = np.flatnonzero(side.y == 0), [], {}
    patients = side.patients[healthy]
    for name, (signal, known) in signals.items():
        counts = [count_of(patients[known & (signal == value)]) for value in (True, False)]
        if min(counts) < LEAST:
            left_out.append(f"{name}: {counts[0]} patients with it and {counts[1]} without, {LEAST} needed")
        else:
            asked[name] = (signal, known, counts)
    rows, pixels = [], coarse(side.subset.pixels(healthy)) if asked else None
    for name, (signal, known, counts) in asked.items():
        curve = Curve(signal[known].astype(int), patients[known], 1 - ERROR / len(asked))
        row = {"name": name, "with": counts[0], "without": counts[1]}
        for key, x in (("features", side.features[healthy]), ("pixels", pixels)):
            told = probe(x[known].astype(np.float64), signal[known], patients[known])
            row[key] = curve.span(curve.draws(told))
        row["score"] = folded(curve.span(curve.draws(side.clean[healthy][known])))
        rows.append(row)
    return {"signals": rows, "left_out": left_out, "images": len(healthy), "patients": count_of(patients)}


def folded(span):
    """An AUROC below 0.5 as one minus it: a score that falls with a signal follows it, too."""
    if span["value"] >= 0.5:
        return span
    return {"value": 1 - span["value"], "lo": 1 - span["hi"], "hi": 1 - span["lo"]}
