"""How often is a batch called shifted, if it is like validation and if it is not?

    python studies/typicality.py --run outputs/pretrained --nih NIH_DIR

False alarms: half of the validation patients make the reference, batches are drawn from the other half, once
as they come and once with 10% of sick people, by their true labels. Power: batches from the official test
set, from another hospital (--nih; studies/nih.py says what is in it), and from corrupted validation images
(--only names some), each with the whole of validation as the reference. Prints markdown: the share of draws
called shifted with its 95% interval (Wilson), and of single images called odd.

    python studies/typicality.py --run outputs/pretrained --distances

compares distances instead, on training images alone: each source of the Kermany set (IM-, NORMAL2-, bacteria,
virus) is left out in turn, and the AUROC of its images against others that the distance has not seen is
printed.
"""

import re
import sys
from pathlib import Path

import numpy as np
from scipy.stats import rankdata
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules lie one folder up

from calibration import shares, shift
from calibration.intervals import delong_interval, wilson_interval
from common.cli import COUNT, Parser
from common.console import InputError, say, start
from common.device import add_device_argument, pick_device
from data import load_test, load_train_val
from images.subset import Subset
from lungs import masks as lung_masks
from models.inputs import Inputs
from records.run import Run
from studies.nih import load_nih
from studies.signals import corruptions
from training.evaluate import predict

SIZES = (20, 50, 100, 250)
SICK = 0.1
SHARED = f"validation, {100 * SICK:.0f}% sick"


class Outputs:
    """What a calibrated run makes of images: logits and features, whose they are, whom it calls sick."""

    def __init__(self, run, device):
        self.run, self.calibration = run, run.calibration()
        self.inputs = Inputs.of_calibration(run, self.calibration, device)
        self.model, self.task = run.model().to(device), run.task
        self.threshold = next(iter(self.calibration["findings"].values()))["threshold"]

    def of(self, subset, what):
        """(features [N, D], logits [N, K], patients [N], labels [N, G] of shares.kinds) of a Subset."""
        how = dict(output=self.inputs.logits_and_features, progress=what)
        found = predict(self.model, subset, self.inputs, **how).numpy()
        K = self.task.outputs
        labels = shares.kinds(self.task, subset.targets)
        return found[:, K:], found[:, :K], np.array(subset.patients), labels

    def called(self, logits):
        return self.task.scores_from(logits, self.calibration)[:, 0] >= self.threshold

    def changed(self, subset, change):
        """The Subset after a change of its pixels."""
        pixels = np.stack([change(image) for image in subset.pixels()])
        finder, masks = lung_masks.finder_of(self.run.config), None
        if finder:
            masks = lung_masks.pack(np.concatenate([finder(part) for part in np.array_split(pixels, 16)]))
        about = dict(patients=subset.patients, masks=masks)
        return Subset(subset.files, subset.targets, pixels, np.arange(len(pixels)), **about)


def draw(known, outputs, found, rng, n, sick=None):
    """The verdict of a Reference on one image each of n patients drawn from (features, logits, patients,
    labels); with `sick`, a binomial number of them is sick with this chance. None if there are too few."""
    features, logits, patients, labels = found
    some = shift.one_each(patients, int(rng.integers(2**31)))
    if sick is not None:
        ill = labels[some, 0] > 0
        count = rng.binomial(n, sick)
        if count > ill.sum() or n - count > (~ill).sum():
            return None
        some = np.concatenate([some[ill][:count], some[~ill][: n - count]])
    some = some[:n]
    typicality, places = known.place(features[some])
    batch = shift.Batch()
    for i, row in enumerate(zip(typicality, places, logits[some], outputs.called(logits[some]))):
        batch.add(str(i), str(i), *row)
    return known.judge(batch, outputs.called(known.logits), outputs.task)


def false_alarms(usual, val, outputs, draws, n, sick=None):
    """How many of `draws` batches of n validation patients are called shifted; None if too few are left for
    one of them."""
    rng, (features, logits, patients, labels) = np.random.default_rng(n), val
    names, shifted = np.unique(patients), 0
    if n > len(names) // 2:
        return None
    for _ in range(draws):
        here = np.isin(patients, rng.permutation(names)[: len(names) // 2])
        arrays = shift.learn(usual, features[here], logits[here], patients[here], labels[here])
        batch = [v[~here] for v in val]
        verdict = draw(shift.Reference(arrays, ""), outputs, batch, rng, n, sick)
        if verdict is None:
            return None
        shifted += verdict["verdict"] == "shifted"
    return shifted


# ---------------------------------------------------------------- which distance


def source(file):
    """The source of a file of the Kermany set, by its name."""
    match = re.search(r"(NORMAL2|IM|bacteria|virus)", Path(file).name)
    return match[0] if match else "other"


def mahalanobis(x, y):
    return LedoitWolf().fit(x).mahalanobis


def class_mahalanobis(x, y):
    """The distance to the nearest class mean, with one covariance within all classes."""
    means = np.stack([x[y == k].mean(axis=0) for k in np.unique(y)])
    fitted = LedoitWolf(assume_centered=True).fit(x - means[np.searchsorted(np.unique(y), y)])
    return lambda z: np.min([fitted.mahalanobis(z - mean) for mean in means], axis=0)


def neighbours(x, y):
    """The distance to the tenth neighbour."""
    fitted = NearestNeighbors(n_neighbors=10).fit(x)
    return lambda z: fitted.kneighbors(z)[0][:, -1]


def white_neighbours(x, y):
    """The same where the features have unit covariance."""
    values, axes = np.linalg.eigh(LedoitWolf().fit(x).covariance_)
    found = neighbours(x @ axes / np.sqrt(values), y)
    return lambda z: found(z @ axes / np.sqrt(values))


DISTANCES = {
    "Mahalanobis": mahalanobis,
    "Mahalanobis to the nearest class": class_mahalanobis,
    "tenth neighbour": neighbours,
    "tenth neighbour, unit covariance": white_neighbours,
}


def compare_distances(features, targets, files):
    """Print the AUROC of each left-out source, by distance, with DeLong's 95% interval."""
    names, half = np.array([source(f) for f in files]), np.arange(len(files)) % 2 == 0
    sources = sorted(set(names))
    print("| distance | " + " | ".join(f"without {s}" for s in sources) + " | mean |")
    print("| --- |" + " ---: |" * (len(sources) + 1))
    for title, distance in DISTANCES.items():
        aurocs, cells = [], []
        for left_out in sources:
            known = names != left_out
            far = distance(features[known & half], targets[known & half])
            seen, unseen = far(features[known & ~half]), far(features[~known])
            truth = np.repeat([0, 1], [len(seen), len(unseen)])
            score = rankdata(np.concatenate([seen, unseen]))
            score /= len(score)  # of the same order as the distance, in (0, 1]
            auroc, low, high = delong_interval(truth, score)
            aurocs.append(auroc)
            cells.append(f"{auroc:.3f} [{low:.3f}, {high:.3f}]")
        print(f"| {title} | {' | '.join(cells)} | {np.mean(aurocs):.3f} |", flush=True)


# ---------------------------------------------------------------- batches


def main():
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, metavar="DIR", help="a calibrated run folder")
    parser.add_argument("--nih", metavar="DIR", help="images of another hospital")
    parser.add_argument("--draws", type=COUNT, default=300, metavar="N", help="batches of each size")
    parser.add_argument("--corrupted", type=COUNT, default=300, metavar="N", help="images to corrupt")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these corruptions")
    parser.add_argument("--distances", action="store_true", help="compare distances on training images")
    add_device_argument(parser)
    args = parser.parse_args()
    changes = corruptions()
    if unknown := set(args.only or ()) - set(changes):
        raise InputError(f"--only {', '.join(sorted(unknown))}: there is {', '.join(changes)}")
    outputs = Outputs(Run(args.run), pick_device(args.device))
    config, rng = outputs.run.config, np.random.default_rng(0)
    train, val, _ = load_train_val(config, say)
    if args.distances:
        few = train.take(np.sort(rng.permutation(len(train))[: 2 * shift.TRAINING]))
        return compare_distances(outputs.of(few, "training")[0].astype(float), few.targets, few.files)
    some = np.sort(np.random.default_rng(0).permutation(len(train))[: shift.TRAINING])
    usual = outputs.of(train.take(some), "training")[0]
    found = {
        "validation": outputs.of(val, "validation"),
        "official test": outputs.of(load_test(config), "test"),
    }
    if args.nih:
        found["another hospital"] = outputs.of(load_nih(args.nih, config), "nih")
    few = val.take(np.sort(rng.permutation(len(val))[: args.corrupted]))
    for name in args.only or changes:
        found[f"validation, {name}"] = outputs.of(outputs.changed(few, changes[name]), name)
    known = shift.Reference(shift.learn(usual, *found["validation"]), "")
    rows = {"validation": found.pop("validation")}
    rows[SHARED] = rows["validation"]
    rows |= found
    print("| images | odd | " + " | ".join(f"{n} patients" for n in SIZES) + " |")
    print("| --- | ---: |" + " ---: |" * len(SIZES))
    for name, batch in rows.items():
        cells = [f"{100 * (known.place(batch[0])[0] <= shift.ODD).mean():.1f}%"]
        for n in SIZES:
            if name in ("validation", SHARED):
                sick = SICK if name == SHARED else None
                count = false_alarms(usual, batch, outputs, args.draws, n, sick)
            elif n > len(set(batch[2])):
                count = None
            else:
                verdicts = [draw(known, outputs, batch, rng, n)["verdict"] for _ in range(args.draws)]
                count = verdicts.count("shifted")
            low, high = wilson_interval(count, args.draws) if count is not None else (0, 0)
            cells.append("-" if count is None else f"{count / args.draws:.3f} [{low:.3f}, {high:.3f}]")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    start(main)
