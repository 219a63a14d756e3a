"""How many labels that were flipped on purpose does audit.py --labels find?

    python studies/label_errors.py --run outputs/linear outputs/dinov2

Takes the training images of each run, flips the labels of 50 at random, and lists likely errors as audit.py
does; three times, with other images. Flips do not change the features of a backbone that has seen no label,
so these are computed once and kept in --keep. Prints a row of a markdown table for each run and seed: how
many are listed, how many of the flipped ones are among them, and how many a list of the same length drawn at
random would hold. What is listed besides may be an error of the set's own, so the precision is a lower bound.
With seed "none" nothing is flipped. A minute a run after the features, which take ten on two cores for
DINOv2 ViT-S/14 and 4,000 images."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from auditing.labels.asked import features_of, has_learnt, patients_of, questions, some_images
from auditing.labels.errors import find_errors
from auditing.labels.written import auroc
from auditing.reader import Reader
from common.cli import COUNT, Number, Parser
from common.console import InputError, say, start
from common.device import add_device_argument, pick_device
from common.files import atomic_path, sha256
from data import load_split
from layouts.asked import add_moved_arguments, moved_settings
from records.run import Run

HEAD = """| run | images | seed | AUROC | listed | flipped among them | by chance | first FLIPS | precision |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def features_kept(run, subset, reader, folder, batch_size):
    """What the backbone of a Run makes of a Subset, float32 [N, D], from `folder` where it is there."""
    path = Path(folder) / f"{run.checkpoint_sha256[:12]}-{sha256(subset.files)[:12]}.npz"
    if path.exists():
        return np.load(path, allow_pickle=False)["features"]
    features = features_of(reader, subset, batch_size)
    with atomic_path(path) as tmp:
        np.savez(tmp, features=features)
    return features


def flipped(y, count, flips, seed):
    """Labels [N] with `flips` of them changed to another of `count` classes; which, bool [N]."""
    rng = np.random.default_rng(seed)
    wrong = rng.choice(len(y), flips, replace=False)
    y = y.copy()
    y[wrong] = (y[wrong] + rng.integers(1, count, flips)) % count
    return y, np.isin(np.arange(len(y)), wrong)


def row(name, seed, found, wrong):
    """A row of the table: Errors found, and which labels were flipped."""
    listed, hits, flips = int(found.issue.sum()), int((found.issue & wrong).sum()), int(wrong.sum())
    cells = [name, f"{len(wrong):,}", seed, f"{auroc(found):.3f}", listed]
    if not flips:
        return [*cells, "-", "-", "-", "-"]
    by_chance = flips * listed / len(wrong)
    first = int(wrong[found.order[:flips]].sum())
    precision = hits / max(listed, 1)
    return [*cells, f"{hits} of {flips}", f"{by_chance:.1f}", f"{first} of {flips}", f"{precision:.2f}"]


def study(run, args):
    """Print the rows of a Run."""
    if has_learnt(run):
        raise InputError(
            f"the backbone of {run} has seen the labels before they are flipped: name another run"
        )
    moved = moved_settings(args, run.config.data_dir)
    subset = some_images(load_split(run, "train", moved), args.most_images)
    (question,) = questions(run.task, subset.targets, args.finding)
    reader = Reader(run, pick_device(args.device), run.task.findings[0])
    features = features_kept(run, subset, reader, args.keep, args.batch_size)[question.positions]
    patients = patients_of(subset, run.config)[question.positions]
    count, name = len(question.classes), run.folder.resolve().name
    for seed in ("none", *range(args.seeds)):
        y, wrong = question.y, np.zeros(len(question.y), bool)
        if seed != "none":
            y, wrong = flipped(y, count, args.flips, seed)
        cells = row(name, seed, find_errors(features, y, patients, count), wrong)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main():
    parser = Parser(__doc__)
    parser.add_argument(
        "--run", nargs="+", required=True, metavar="DIR", help="runs whose backbone saw no label"
    )
    parser.add_argument("--finding", metavar="NAME", help="of a table: which (default: the only one)")
    parser.add_argument("--flips", type=COUNT, default=50, metavar="N", help="labels that are flipped")
    parser.add_argument("--seeds", type=COUNT, default=3, metavar="N", help="times that labels are flipped")
    parser.add_argument(
        "--most-images", type=Number(int, 20, 10**9), metavar="N", help="at most this many (default: all)"
    )
    parser.add_argument("--batch-size", type=COUNT, default=32, metavar="N", help="images a step")
    parser.add_argument("--keep", default="outputs/features", metavar="DIR", help="where features are kept")
    add_moved_arguments(parser.add_argument_group("where the images are now"))
    add_device_argument(parser)
    args = parser.parse_args()
    print(HEAD.replace("FLIPS", str(args.flips)))
    for folder in args.run:
        say(f"{folder} ...")
        study(Run(folder), args)


if __name__ == "__main__":
    start(main)
