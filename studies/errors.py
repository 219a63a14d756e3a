"""The errors that remain: which test images several runs of a recipe call wrongly, and how often.

    python studies/errors.py --run outputs/ti16-seed0 outputs/ti16-seed1 outputs/ti16-seed2 --sheet errors.png

Prints, by class and source of the Kermany set, how many images are called wrongly at the recall-first
threshold of each run: on average, by all of them, by some; and names those that all get wrong. No image is
opened for that. --sheet draws them, to look at errors that are known already and to choose nothing. Above
each stand its name and the mean score less the mean threshold.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from common.cli import Parser
from common.console import InputError, start
from common.files import save_figure
from data import load_test
from records.run import find_runs
from studies.kermany import group
from studies.unit import in_block

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

ACROSS = 8  # images in a row of the sheet


def margins(runs):
    """(file names [N], labels int64 [N], score less threshold of each run float64 [R, N]) of the test images.

    InputError unless all runs have the same images and one finding."""
    for run in runs:
        if len(run.task.findings) != 1:
            raise InputError(f"{run} has {len(run.task.findings)} findings: this study is about one")
    found = [run.scores() for run in runs]
    for run, scores in zip(runs, found):
        if not np.array_equal(scores["test_files"], found[0]["test_files"]):
            raise InputError(f"{run} was scored on other test images than {runs[0]}")
    above = []
    for run, scores in zip(runs, found):
        chosen = run.calibration()
        p = run.task.scores_from(scores["test_logits"], chosen)[:, 0]
        above.append(p - chosen["findings"][run.task.findings[0]]["threshold"])
    return found[0]["test_files"], found[0]["test_labels"], np.stack(above)


def tally(wrong, kinds):
    """Markdown: errors, boolean [R, N], by the kinds [N] of the images."""
    lines = ["| images | n | wrong in a run | in all runs | in some |", "| --- |" + " ---: |" * 4]
    every, some = wrong.all(axis=0), wrong.any(axis=0) & ~wrong.all(axis=0)
    for kind in np.unique(kinds):
        rows = kinds == kind
        mean = wrong[:, rows].sum(axis=1).mean()
        lines.append(f"| {kind} | {rows.sum()} | {mean:.1f} | {every[rows].sum()} | {some[rows].sum()} |")
    return "\n".join(lines)


def draw(subset, rows, above, path):
    """The images `rows` of a Subset on one sheet, with `above` float64 [N]."""
    down = -(-len(rows) // ACROSS)
    figure, axes = plt.subplots(down, ACROSS, figsize=(2.2 * ACROSS, 2.5 * down), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, i, pixels in zip(axes.flat, rows, subset.pixels(rows)):
        ax.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        ax.set_title(f"{Path(subset.files[i]).stem[:24]}\n{above[i]:+.2f}", fontsize=7)
    figure.tight_layout()
    save_figure(path, figure, 80)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--run", nargs="+", metavar="DIR", help="run folders (default: all in --runs-dir)")
    parser.add_argument("--runs-dir", default="outputs", metavar="DIR", help="folder of the run folders")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="draw what all get wrong (.png, .jpg)")
    args = parser.parse_args()
    if args.sheet and args.sheet.suffix not in (".png", ".jpg"):
        raise InputError(f"--sheet {args.sheet}: name a .png or .jpg file")
    runs = find_runs(args.runs_dir, args.run)
    files, labels, above = margins(runs)
    wrong = (above >= 0) != (labels == 1)
    kinds = np.where(in_block(files) & (labels == 0), "NORMAL, the block", [group(f) for f in files])
    print(f"{len(runs)} runs: {', '.join(map(str, runs))}\n\n{tally(wrong, kinds)}\n")
    always = np.flatnonzero(wrong.all(axis=0))
    for title, label in (("missed by all", 1), ("false alarms of all", 0)):
        names = [Path(files[i]).stem for i in always if labels[i] == label]
        print(f"{title}: {', '.join(names) or 'none'}")
    if args.sheet and len(always):
        subset = load_test(runs[0].config)  # in the order of the scores
        draw(subset, always[np.argsort(-labels[always], kind="stable")], above.mean(axis=0), args.sheet)
        print(f"wrote {args.sheet}")


if __name__ == "__main__":
    start(main)
