"""What do thresholds promise at another hospital, if they are chosen on a few of its labelled images?

    python studies/sites.py --run outputs/pretrained --nih NIH_DIR

The official test set and another hospital (--nih; studies/nih.py says what is in it) stand for sites. Again
and again about n images, whole patients, are drawn, thresholds are chosen on them (site.py), and applied
to all other images of the site. Prints markdown: the share of draws in which a threshold could be chosen; of
these, the share whose recall on the others is below the floor, with a 95% Wilson interval over draws; and
mean recall and specificity there, with the range of the middle 95% of the draws.

"borrowed" is the greatest of ten thresholds fixed beforehand on validation (their recalls there: LISTED) that
passes the local test of @Guar. Such thresholds are nested, so testing them from the least one up needs no
correction (fixed sequence; Angelopoulos et al. 2021, arXiv:2110.01052). None can lie above the local score
that @Guar is chosen by (@Guar itself lies between this score and the next lower one).
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import binom

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from calibration import site as site_module
from calibration.intervals import wilson_interval
from calibration.operating_point import Rule
from common.cli import COUNT, Parser
from common.console import start
from common.device import add_device_argument, pick_device
from metrics import one_image_per_patient, summarize_at_threshold
from records.run import Run
from studies.nih import load_nih

SIZES = (25, 50, 100, 200, 400)
POINTS = {"shipped": "as shipped", "threshold": "@Rec", "mean": "@Mean", "guaranteed": "@Guar"}
POINTS["borrowed"] = "borrowed"
LISTED = (0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.9925, 0.995, 0.9975, 1.0)


def official_test(run):
    """(truth, scores, patients, {finding: shipped threshold}) of the official test set, as calibrate.py left
    them."""
    arrays, calibration = run.scores(), run.calibration()
    truth = run.task.truth(arrays["test_labels"])[:, 0].astype(int)
    return (
        truth,
        arrays["test_p1"],
        arrays["test_patients"],
        calibration["findings"][run.task.findings[0]]["threshold"],
    )


def another_hospital(run, folder, device):
    """The same of the images of nih.load_nih."""
    site = load_nih(folder, run.config)
    _, (truth, scores, shipped), _ = site_module.scored(run, site, device, None, 64)
    return truth[:, 0].astype(int), scores[:, 0], np.asarray(site.patients), next(iter(shipped.values()))


def listed(run):
    """The thresholds that LISTED stands for, ascending: validation scores of sick images."""
    arrays = run.scores()
    sick = np.sort(arrays["val_p1"][run.task.truth(arrays["val_labels"])[:, 0] == 1])
    return sorted({float(sick[int((1 - recall) * len(sick) + 1e-9)]) for recall in LISTED})


def borrowed(candidates, scores, patients, rule):
    """The greatest of ascending candidates that pass, one after the other; None if the first does not.

    A candidate passes if so few of the local sick patients (`scores` [N] of their images) lie below it that a
    recall at the floor would seldom do that. One image a patient is drawn, as for @Guar."""
    images, best = one_image_per_patient(scores, patients), None
    for candidate in candidates:
        if binom.cdf((images < candidate).sum(), len(images), 1 - rule.min_recall) > 1 - rule.confidence:
            break
        best = candidate
    return best


def draws(y, p, patients, shipped, rule, n, count, candidates=()):
    """{point: [(recall, specificity) on the other images, of each draw in which there is a threshold]}."""
    rng, names, out = np.random.default_rng(n), np.unique(patients), {point: [] for point in POINTS}
    of_patient = {name: np.flatnonzero(patients == name) for name in names}
    for _ in range(count):
        local, order = [], rng.permutation(names)
        for name in order:
            if len(local) >= n:
                break
            local += of_patient[name].tolist()
        others = np.setdiff1d(np.arange(len(y)), local)
        found = {"shipped": shipped, **site_module.choose(y[local], p[local], patients[local], rule)}
        sick = np.array(local)[y[local] == 1]
        if len(sick):
            found["borrowed"] = borrowed(candidates, p[sick], patients[sick], rule)
        for point in POINTS:
            if found.get(point) is not None:
                row = summarize_at_threshold(y[others], p[others], found[point])
                out[point].append((row["recall"], row["specificity"]))
    return out


def row(values, floor):
    """The cells of [(recall, specificity), ...]: the share of recalls below the floor, mean recall, mean
    specificity."""
    if not values:
        return ["-"] * 3
    recall, specificity = np.array(values).T
    below = int((recall < floor).sum())
    lo, hi = wilson_interval(below, len(recall))
    cells = [f"{below / len(recall):.3f} [{lo:.2f}, {hi:.2f}]"]
    for figures in (recall, specificity):
        lo, hi = np.quantile(figures, (0.025, 0.975))
        cells.append(f"{figures.mean():.3f} [{lo:.2f}, {hi:.2f}]")
    return cells


def main():
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, metavar="DIR", help="a calibrated run folder of two classes")
    parser.add_argument("--nih", metavar="DIR", help="images of another hospital")
    parser.add_argument("--draws", type=COUNT, default=300, metavar="N", help="draws of each size")
    add_device_argument(parser)
    args = parser.parse_args()
    run, rule = Run(args.run), Rule()
    candidates = listed(run)
    sites = {"official test": official_test(run)}
    if args.nih:
        sites["another hospital"] = another_hospital(run, args.nih, pick_device(args.device))
    print("| site | local images | threshold | given | recall below the floor | recall | specificity |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for name, site in sites.items():
        for n in SIZES:
            if n > 0.8 * len(site[0]):
                continue
            for point, values in draws(*site, rule, n, args.draws, candidates).items():
                cells = [f"{len(values) / args.draws:.2f}", *row(values, rule.min_recall)]
                print(f"| {name} | {n} | {POINTS[point]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    start(main)
