"""The block of test images behind half of the false alarms (docs/notebook/10-another-hospital.md): which
runs it misleads, and by what.

    python studies/unit.py --run outputs/ti16-full outputs/ti16-masked-crop
    python studies/unit.py --run outputs/ti16-masked-crop --transplant

Prints, for calibrated runs, how many of the block's healthy children, and of all others, are called sick at
the recall-first threshold; no image is opened. With --transplant it opens test images, to explain errors that
are known already and to choose nothing: it gives healthy validation children the grey levels, the sharpness,
or both, of one of the block, of another healthy child of test or of training, and the block's those of
healthy training children, and counts who is called sick. The masks of the lungs are found anew on the changed
images, as they would be.
"""

import re
import sys
from pathlib import Path

import numpy as np
from skimage.exposure import match_histograms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from common.cli import Parser
from common.console import InputError, say, start
from common.device import add_device_argument, pick_device
from data import load_test, load_train_val
from models.inputs import Inputs
from records.run import find_runs
from studies.signals import Scorer

FIRST, LAST = 195, 256  # NORMAL2-IM-0195 to 0256; drawn after the errors had been looked at
DRAWS = 3


def in_block(files):
    """Boolean [N]: which file names are of the block."""
    numbers = [re.search(r"NORMAL2-IM-(\d+)", name) for name in files]
    return np.array([bool(n) and FIRST <= int(n.group(1)) <= LAST for n in numbers])


def radial_mean(values):
    """(mean of `values` [S, S] over rings around the centre, a pixel wide [R], the ring of each [S, S])."""
    y, x = np.indices(values.shape) - values.shape[0] // 2
    ring = np.hypot(y, x).astype(int)
    return np.bincount(ring.ravel(), values.ravel()) / np.bincount(ring.ravel()), ring


def sharpened_like(image, donor, kept=3):
    """An image, uint8 [S, S], with the mean Fourier amplitude of `donor` at each spatial frequency, but for
    the `kept` lowest: exposure and large shapes stay. -> float64 [S, S], not clipped."""
    own, other = (np.fft.fftshift(np.fft.fft2(x.astype(float))) for x in (image, donor))
    (own_mean, ring), (other_mean, _) = radial_mean(np.abs(own)), radial_mean(np.abs(other))
    gain = other_mean / np.maximum(own_mean, 1e-9)
    gain[:kept] = 1
    return np.fft.ifft2(np.fft.ifftshift(own * gain[ring])).real


CHANGES = {
    "grey levels": match_histograms,
    "sharpness": sharpened_like,
    "both": lambda image, donor: match_histograms(sharpened_like(image, donor), donor),
}


def transplanted(pixels, donors, change, rng):
    """Images uint8 [N, S, S], each changed by `change` after one of `donors` [M, S, S], drawn at random."""
    drawn = donors[rng.integers(len(donors), size=len(pixels))]
    out = [np.clip(change(image, donor), 0, 255).round() for image, donor in zip(pixels, drawn)]
    return np.stack(out).astype(np.uint8)


def false_alarms(run):
    """A table row on a calibrated run: how many of the healthy test children are called sick."""
    scores, calibration = run.scores(), run.calibration()
    threshold = calibration["findings"][run.task.findings[0]]["threshold"]
    called = run.task.scores_from(scores["test_logits"], calibration)[:, 0] >= threshold
    healthy, block = scores["test_labels"] == 0, in_block(scores["test_files"])
    inside, outside = called[healthy & block], called[healthy & ~block]
    cells = [f"{part.sum()} of {len(part)}" for part in (inside, outside)]
    return f"| {run} | {' | '.join(cells)} | {1 - outside.mean():.3f} |"


def transplants(run, device):
    """Table rows: the share called sick after each of CHANGES."""
    scorer, calibration = Scorer(run, device), run.calibration()
    scorer.inputs = Inputs.of_calibration(run, calibration, device)
    threshold = calibration["findings"][run.task.findings[0]]["threshold"]

    def called(subset, pixels=None):
        scores = run.task.scores_from(scorer.outputs(subset, pixels), calibration)[:, 0]
        return (scores >= threshold).mean()

    train, val, _ = load_train_val(run.config, say)
    test = load_test(run.config)
    healthy = {name: s.take(np.flatnonzero(s.targets == 0)) for name, s in (("train", train), ("val", val))}
    block = in_block(test.files) & (test.targets == 0)
    groups = {
        "the block": test.take(np.flatnonzero(block)),
        "other healthy test children": test.take(np.flatnonzero((test.targets == 0) & ~block)),
        "healthy training children": healthy["train"],
    }
    pairs = [("healthy validation children", healthy["val"], donors) for donors in groups]
    pairs.append(("the block", groups["the block"], "healthy training children"))
    for name, subset, donors in pairs:
        shares = [called(subset)]
        pixels, rng, lent = subset.pixels(), np.random.default_rng(0), groups[donors].pixels()
        for change in CHANGES.values():
            drawn = [called(subset, transplanted(pixels, lent, change, rng)) for _ in range(DRAWS)]
            shares.append(np.mean(drawn))
        yield f"| {name} | {donors} | {' | '.join(f'{s:.3f}' for s in shares)} |"


def main():
    parser = Parser(__doc__)
    parser.add_argument("--run", nargs="+", metavar="DIR", help="run folders (default: all in --runs-dir)")
    parser.add_argument("--runs-dir", default="outputs", metavar="DIR", help="folder of the run folders")
    parser.add_argument("--transplant", action="store_true", help="change images, too")
    add_device_argument(parser)
    args = parser.parse_args()
    runs, device = find_runs(args.runs_dir, args.run), pick_device(args.device)
    for run in runs:
        if len(run.task.findings) != 1 or not in_block(run.scores()["test_files"]).any():
            raise InputError(f"{run} was not scored on the Kermany set's official test images")
    print("| run | of the block | of the other healthy | specificity on those |\n| --- |" + " ---: |" * 3)
    print("\n".join(map(false_alarms, runs)))
    for run in runs if args.transplant else ():
        print(f"\n{run}: called sick\n\n| images | made like | unchanged | {' | '.join(CHANGES)} |")
        print("| --- | --- |" + " ---: |" * (len(CHANGES) + 1))
        for row in transplants(run, device):
            print(row, flush=True)


if __name__ == "__main__":
    start(main)
