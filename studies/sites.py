"""What do thresholds promise at another hospital, if they are chosen on a few of its labelled images?

    python studies/sites.py --run outputs/pretrained --nih NIH_DIR

The official test set and another hospital (--nih; studies/nih.py says what is in it) stand for sites. Again
and again about n images, whole patients, are drawn, thresholds are chosen on them (hospital.py), and applied
to all other images of the site. Prints markdown: the share of draws in which a threshold could be chosen; of
these, the share whose recall on the others is below the floor; and mean recall and specificity there.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

import common
import hospital
from device import add_device_argument, pick_device
from metrics import summarize_at_threshold
from operating import Rule
from run import Run
from studies.nih import load_nih

SIZES = (25, 50, 100, 200, 400)
POINTS = {"shipped": "as shipped", "threshold": "@Rec", "mean": "@Mean", "guaranteed": "@Guar"}


def official_test(run):
    """(truth, scores, patients, {finding: shipped threshold}) of the official test set, as calibrate.py left
    them."""
    arrays, calibration = run.scores(), run.calibration()
    truth = run.task.truth(arrays["test_labels"])[:, 0].astype(int)
    return truth, arrays["test_p1"], arrays["test_patients"], calibration["threshold"]


def another_hospital(run, folder, device):
    """The same of the images of nih.load_nih."""
    site = load_nih(folder, run.config)
    truth, scores, shipped = hospital.scored(run, site, device, None, 64)
    return truth[:, 0].astype(int), scores[:, 0], np.asarray(site.patients), next(iter(shipped.values()))


def draws(y, p, patients, shipped, rule, n, count):
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
        found = {"shipped": shipped, **hospital.choose(y[local], p[local], patients[local], rule)}
        for point in POINTS:
            if found.get(point) is not None:
                row = summarize_at_threshold(y[others], p[others], found[point])
                out[point].append((row["recall"], row["specificity"]))
    return out


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--run", required=True, metavar="DIR", help="a calibrated run folder of two classes")
    parser.add_argument("--nih", metavar="DIR", help="images of another hospital")
    parser.add_argument("--draws", type=common.COUNT, default=300, metavar="N", help="draws of each size")
    add_device_argument(parser)
    args = parser.parse_args()
    run, rule = Run(args.run), Rule()
    sites = {"official test": official_test(run)}
    if args.nih:
        sites["another hospital"] = another_hospital(run, args.nih, pick_device(args.device))
    print("| site | local images | threshold | given | recall below the floor | recall | specificity |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for name, site in sites.items():
        for n in SIZES:
            if n > 0.8 * len(site[0]):
                continue
            for point, values in draws(*site, rule, n, args.draws).items():
                cells = [f"{len(values) / args.draws:.2f}"]
                if values:
                    recall, specificity = np.array(values).T
                    cells += [f"{(recall < rule.min_recall).mean():.3f}", f"{recall.mean():.3f}"]
                    cells += [f"{specificity.mean():.3f}"]
                else:
                    cells += ["-"] * 3
                print(f"| {name} | {n} | {POINTS[point]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    common.start(main)
