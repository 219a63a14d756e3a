"""Tell recipes apart without looking at the test set: signals of finished runs, from validation and another
hospital.

    python studies/experiments.py --runs-dir outputs/screen --nih NIH_DIR

Ordinary validation cannot tell recipes apart: all reach AUROC 0.99. This prints a row of a markdown table for
each run, from its validation images:

- corrupted: the same images with changed exposure, sharpness, noise, compression and framing, after
  ImageNet-C (Hendrycks and Dietterich 2019, arXiv:1903.12261): mean AUROC, and mean specificity and recall at
  the threshold that was chosen, recall first, on the unchanged images. "worst" is the corruption where the
  sum of the two is least.
- borrowed: AUROC when the border, an eighth of the side, comes from a random validation image of the other
  class. What lies there (markers, tubes, framing, the look of a machine) then speaks for the wrong answer.
  "control" is the same with a border from the same class, which shows what the seams alone do.
- NIH (with --nih DIR): AUROC of "No Finding" against pneumonia, consolidation or infiltration on images of
  another hospital, mostly of adults, from NIH ChestX-ray14 (Wang et al. 2017, arXiv:1705.02315). A different
  shift altogether.
- panel (with --nih): the mean of the NIH AUROC and of (corrupted specificity + corrupted recall) / 2; and
  whether the borrowed AUROC vetoes the run: the rule of docs/notebook/20-accuracy-the-rule.md.
- choice: the mean of the borrowed AUROC and of (corrupted specificity + corrupted recall) / 2. Recipes were
  once chosen by it, badly (see docs/EXPERIMENTS.md); the recipe of ViT-Ti/16 is now chosen by the NIH AUROC.

Figures are kept in signals.json in the run folder, and computed again when the weights, the images or the
corruptions change. The test images are counted, not opened. With --against-test a second table holds the rank
correlation of each signal with the test results that calibrate.py has left: read it after the choice.
"""

import argparse
import sys
from pathlib import Path

from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from common.cli import Parser
from common.console import InputError, say, start
from common.device import add_device_argument, pick_device
from data import load_train_val
from records.run import find_runs
from studies.nih import load_nih
from studies.signals import signals


class Sets:
    """Validation images, and those of `nih_folder` unless it is None, by data settings; each is loaded
    once."""

    def __init__(self, nih_folder):
        self.nih_folder, self.loaded = nih_folder, {}

    def of(self, run):
        """(validation, NIH or None) Subsets of a run; InputError if its images are no longer the same
        files."""
        config = run.config
        if config not in self.loaded:
            _, val, split = load_train_val(config, say)
            nih = load_nih(self.nih_folder, config) if self.nih_folder else None
            self.loaded[config] = (val, nih), split["fingerprint"]
        subsets, fingerprint = self.loaded[config]
        if fingerprint != run.results["split"]["fingerprint"]:
            raise InputError(f"the images in {config.data_dir} are not those {run} was trained on")
        return subsets


def against_test(rows, runs):
    """Markdown: Spearman's rank correlation of each signal with two test results. `rows`: signals of the
    `runs`, which are calibrated."""
    test = [run.calibration()["findings"][run.task.findings[0]]["test"]["at_rec"] for run in runs]
    names = [k for k, v in rows[0].items() if isinstance(v, float) and k != "minutes"]
    columns = {name: [row[name] for row in rows] for name in names}
    for name in rows[0].get("corruptions", ()):
        columns[f"AUROC under {name}"] = [row["corruptions"][name][0] for row in rows]
    lines = [
        f"\n| signal ({len(runs)} runs) | rho with test AUROC | rho with test specificity @Rec |",
        "| --- | ---: | ---: |",
    ]
    for name, values in columns.items():
        rho = [spearmanr(values, [row[k] for row in test])[0] for k in ("auroc", "specificity")]
        lines.append(f"| {name} | {rho[0]:+.2f} | {rho[1]:+.2f} |")
    return "\n".join(lines)


def parse():
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--run", nargs="+", metavar="DIR", help="run folders (default: all in --runs-dir)")
    parser.add_argument("--runs-dir", default="outputs", metavar="DIR", help="folder of the run folders")
    nih_help = "a folder of NIH ChestX-ray14: images/ and sample_labels.csv"
    parser.add_argument("--nih", default=None, metavar="DIR", help=nih_help)
    parser.add_argument(
        "--corruptions",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the figures under corruptions, which take longest",
    )
    parser.add_argument(
        "--against-test",
        action="store_true",
        help="afterwards: how well the signals foretold the test results",
    )
    add_device_argument(parser)
    return parser.parse_args()


def main():
    args = parse()
    runs, device, sets = find_runs(args.runs_dir, args.run), pick_device(args.device), Sets(args.nih)
    calibrated = [run for run in runs if "" in run.calibrated()]
    if args.against_test and len(calibrated) < 4:
        raise InputError(
            f"--against-test needs 4 runs with a calibration.json, found {len(calibrated)}: "
            "run calibrate.py first"
        )
    rows = {}
    for run in runs:
        row = rows[run] = signals(run, *sets.of(run), device, args.corruptions)
        shown = {name: value for name, value in row.items() if name != "corruptions"}
        if len(rows) == 1:
            print(f"| run | {' | '.join(shown)} |\n| --- |{' ---: |' * len(shown)}")
        cells = [value if isinstance(value, str) else f"{value:.3f}" for value in shown.values()]
        print(f"| {run} | {' | '.join(cells)} |", flush=True)
    if args.against_test:
        print(against_test([rows[run] for run in calibrated], calibrated))


if __name__ == "__main__":
    start(main)
