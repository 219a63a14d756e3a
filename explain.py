"""Show where a calibrated run looked, and measure whether the pictures can be believed.

    python explain.py --run outputs/pretrained

Takes the validation images (--split test on request), picks true and false positives and negatives at the
recall-first threshold, the most confident and the most borderline of each, and writes to RUN/explain/val/ (or
test/): sheet.png, a PNG for each image, and explain.json with tests of the maps, which compare.py tabulates:
deletion and insertion curves against random order, maps after the weights are drawn anew, and the share of
the map on the lungs and on the border. What an earlier call left there is removed first. The tests use images
that are rightly called --target.

    python explain.py IMAGE... --run outputs/pretrained

draws image files instead, to RUN/explain/, without tests, of a folder all that are in it. A file that cannot
be read is named and makes the exit code 2; the others are drawn all the same.

How maps are made is in models/maps.py. A map shows what moved the score, not where the disease is.
"""

import common.prelude  # noqa: F401  (first: see there)

import itertools
import os
import textwrap
from pathlib import Path

import numpy as np
import torch

from calibration.pooling import say_not_of_images
from common import scaling
from common.cli import Number, Parser
from common.console import InputError, say, start
from common.device import add_device_argument, pick_device
from common.files import FORMAT, write_json
from common.scaling import SIDES
from data import load_split
from images.decode import read_image
from images.find import Search
from images.subset import Subset
from layouts.asked import MOVED, add_moved_arguments, moved_settings
from lungs import masks as lung_masks
from lungs import show
from lungs.show import plausible
from models import maps
from models.inputs import Inputs
from models.map_pictures import draw, picture_names
from records.run import Run
from training.evaluate import predict


def say_members_without(model, methods):
    """Notes on the members of an ensemble that a map is not of."""
    members = len(model.members) if model.kind == "ensemble" else 1
    for method in methods:
        number = len(maps.explainable(model, method))
        if number < members:
            say(f"note: {maps.METHODS[method]} is of {number} of the {members} members: the others have none")


class Explainer:
    """A calibrated run, ready to be explained: model, inputs, the threshold of `finding` (default: the task's
    first), and whose score is explained how (`methods`, `layer`): the finding's, or of a task of two classes
    that of the class `target`.

    InputError if the run has no Vision Transformer, no such class or block, or no threshold."""

    def __init__(self, run, device, *, methods, layer=-1, target=None, finding=None):
        self.run, self.config, self.methods, self.layer = run, run.config, methods, layer
        model = run.model() if run.kind in ("vit", "cnn", "hybrid", "ensemble") else None
        parts = maps.explainable(model) if model else []
        if not parts:
            raise InputError(f"{run} has no Vision Transformer and no CNN: there is no map to draw")
        if any("crop" in look for look in model.config.get("looks", ())):
            raise InputError(
                f"{run}: its members cut an image themselves, perhaps to different cuts, so their maps do "
                "not fit together: explain one of them"
            )
        stems = [getattr(part, "stem", part) for part in parts if part.kind != "cnn"]
        depth = min((len(stem.blocks) for stem in stems), default=None)
        if depth is not None and not -depth <= layer < depth:
            raise InputError(f"--layer {layer}: the model has blocks 0 to {depth - 1}")
        if depth is None and layer != -1:
            raise InputError(f"--layer {layer}: of a CNN the last feature map is meant; leave it out")
        if not maps.explainable(model, "rollout"):  # of a hybrid no token of the stem collects what is read
            self.methods = [method for method in methods if method != "rollout"]
            if not self.methods:
                raise InputError(f"{run} has no attention to roll out: --method gradcam")
            if len(self.methods) < len(methods):
                say(f"note: {run} has no attention to roll out: {maps.METHODS[self.methods[0]]} alone")
        say_members_without(model, self.methods)
        self.calibration, task = run.calibration(), run.task
        self.finding = task.chosen_finding(task.findings[0] if finding is None else finding)
        self.column = task.findings.index(self.finding)
        self.classes = (f"no {self.finding}", self.finding)
        if task.kind == "softmax" and task.alone:
            self.classes = task.classes
        if target is not None and target not in task.classes:
            raise InputError(f"--target {target} is not one of {', '.join(task.classes)}")
        if target is not None and self.classes != task.classes:
            raise InputError("--target is for two classes: name one of several findings with --finding")
        self.explained = target or self.finding
        self.answer = task.answer(self.explained)
        self.target = int(self.explained == self.finding)  # its number in `classes`
        found = self.calibration["findings"][self.finding]
        if "why_not" in found:
            raise InputError(f"{run} has no threshold for {self.finding}: {found['why_not']}")
        self.threshold = found["threshold"]
        say_not_of_images(run, self.calibration)
        self.model = model.to(device)
        self.inputs = Inputs.of_calibration(run, self.calibration, device)
        self.exact = self.inputs.on(device)  # float32, for maps and curves

    def scores(self, subset):
        """Probability of the finding, float64 [N], as calibrate.py gives it: no image may change sides."""
        logits = predict(self.model, subset, self.inputs).numpy()
        scores = self.run.task.scores_from(logits, self.calibration)[:, self.column]
        if not np.isfinite(scores).all():
            raise InputError(f"{self.run} gives NaN scores: its checkpoint is damaged")
        return scores

    def shown(self, subset, index):
        """What the model sees of these positions: float32 [n, 1, S, S] in [0, 1], and the lungs if it reads
        them (Inputs.cover)."""
        masks = subset.lungs(index) if self.exact.needs_lungs else None
        return self.exact.cover(self.exact.grey(subset.pixels(index), masks))

    def lung_masks(self, subset, index, source):
        """The lungs on what the model sees of these positions, by a source of masks: bool [n, S, S]."""
        files, pixels = [subset.files[i] for i in index], subset.pixels(index)
        resize = self.run.config.resize
        masks_of = lung_masks.open_source(source, pixels.shape[-1], subset.files, "the images", resize)
        found = masks_of(pixels, files)
        found = found & plausible(found)[:, None, None]
        if none := int((~found.any(axis=(1, 2))).sum()):
            say(
                f"note: no plausible lungs by {source} on {none} of {len(files)} images: no outline, no share"
            )
        if self.exact.input_mode not in ("crop", "masked-crop"):
            return found
        own = torch.from_numpy(subset.lungs(index)).unsqueeze(1).float()
        pair = show.show(torch.from_numpy(found).unsqueeze(1).float(), own, "crop")
        return (pair[:, 0] > 0.5).numpy()

    def row(self, file, grey, score, mask, *more):
        """A line of a picture: (text, image uint8 [S, S], maps float32 [h, w] in the order of `methods`,
        mask). grey: what the model sees of one image, see `shown`; mask: its lungs, bool [S, S]."""
        x = self.exact.scale(grey)
        found = [maps.compute(m, self.model, x, self.layer, self.answer)[0] for m in self.methods]
        called = [self.classes[int(score >= threshold)] for threshold in (0.5, self.threshold)]
        lines = [f"P({self.classes[1]}) = {score:.3f}", f"@0.5 {called[0]}, @Rec {called[1]}"]
        return (
            "\n".join([*more, *textwrap.wrap(Path(file).name, 42), *lines]),
            (grey[0, 0] * 255).round().byte().cpu().numpy(),
            [grid.cpu().numpy() for grid in found],
            mask,
        )

    def draw(self, name, rows, *more):
        """Write a picture of `rows` under RUN/explain/ and return its path; `more` goes into its title."""
        path, about = self.run.explained_folder() / name, [self.run.folder.resolve().name, *more]
        about.append(f"threshold @Rec {self.threshold:.3f}")
        if "gradcam" in self.methods:
            about.append(f"Grad-CAM of {self.explained}")
        mark = " [SYNTHETIC]" if self.run.results["synthetic"] else ""
        draw(path, rows, [maps.METHODS[m] for m in self.methods], ", ".join(about) + mark)
        return path


def pick(y, p, threshold):
    """Images for the sheet, [(title, index)]: the most confident and borderline of each outcome there is."""
    rows = []
    for title, wanted in (
        ("true positive", (y == 1) & (p >= threshold)),
        ("false positive", (y == 0) & (p >= threshold)),
        ("false negative", (y == 1) & (p < threshold)),
        ("true negative", (y == 0) & (p < threshold)),
    ):
        index = np.flatnonzero(wanted)
        if len(index):
            far = index[np.argsort(np.abs(p[index] - threshold), kind="stable")]
            rows.append((f"{title}, most confident", far[-1]))
            if len(far) > 1:
                rows.append((f"{title}, most borderline", far[0]))
    return rows


# ---------------------------------------------------------------- main


def explain_files(explainer, paths, source):
    """Draw image files and those of folders, with the lungs by `source`. InputError at the end if some could
    not be read."""
    config, read, search = explainer.config, {}, Search()
    folders = [path for path in paths if os.path.isdir(path)]
    paths = list(dict.fromkeys(itertools.chain.from_iterable(map(search.walk, paths))))
    if not paths:
        raise InputError(f"no image files in {', '.join(folders)}: {search.nothing()}")
    search.tell(", ".join(folders))
    for path in paths:
        try:
            read[path] = read_image(path, config.img_size, config.resize)[0]
        except OSError as error:
            say(f"{path} cannot be read: {error.strerror or error}")
    if read:
        files, images, rows = list(read), np.stack(list(read.values())), np.arange(len(read))
        finder = lung_masks.finder_of(config)
        masks = lung_masks.pack(finder(images)) if finder else None
        subset = Subset(files, np.zeros_like(rows), images, rows, masks=masks)
        whole = ~plausible(lung_masks.unpack(masks)) if finder else np.zeros(len(files), bool)
        outlines = explainer.lung_masks(subset, rows, source)
        for i, (name, score) in enumerate(zip(picture_names(files), explainer.scores(subset))):
            file, note = files[i], [lung_masks.not_found(config)] if whole[i] else []
            row = explainer.row(file, explainer.shown(subset, [i]), score, outlines[i], *note)
            path = explainer.draw(name, [row])
            print("; ".join([f"{file}: wrote {path}", *note]), flush=True)
    if len(read) < len(paths):
        raise InputError(
            f"{len(paths) - len(read)} of {len(paths)} files could not be read: see the lines above"
        )


def clear(folder):
    """Remove what an earlier call left in the folder of a split: no test may stay beside pictures that it is
    not of."""
    for path in (folder / "explain.json", *folder.glob("*.png")):
        path.unlink(missing_ok=True)


def explain_split(explainer, split, tests, source, moved=None):
    """Draw the sheet and its images, and write explain.json from at most `tests` images, if any; `source`:
    whose lung masks the shares are of; `moved`: see `load_split`."""
    run, classes, subset = explainer.run, explainer.classes, load_split(explainer.run, split, moved)
    y, p, rows = run.task.truth(subset.targets)[:, explainer.column], explainer.scores(subset), []
    chosen = pick(y, p, explainer.threshold)
    outlines = explainer.lung_masks(subset, [i for _, i in chosen], source)
    folder = run.explained_folder(split)
    clear(folder)
    for (outcome, i), mask in zip(chosen, outlines):
        text = outcome, f"truth {classes[y[i]]}"
        rows.append(explainer.row(subset.files[i], explainer.shown(subset, [i]), p[i], mask, *text))
    for name, row in zip(picture_names(subset.files[i] for _, i in chosen), rows):
        explainer.draw(f"{split}/{name}", [row], SIDES[split])
    path = explainer.draw(f"{split}/sheet.png", rows, SIDES[split])
    print(f"wrote {path} and its {len(rows)} images beside it", flush=True)
    if not tests:
        return
    target = explainer.target
    called = f"{SIDES[split]} images rightly called {classes[target]}"
    right = np.flatnonzero((y == target) & ((p >= explainer.threshold) == y))
    if len(right) < 2:
        raise InputError(
            f"{run}: the maps cannot be tested on fewer than two {called}; --tests 0 leaves the tests out"
        )
    some = np.sort(np.random.default_rng(0).choice(right, min(tests, len(right)), replace=False))
    grey, masks = explainer.shown(subset, some).cpu(), explainer.lung_masks(subset, some, source)
    model, inputs, methods, layer = explainer.model, explainer.exact, explainer.methods, explainer.layer
    say(f"testing the maps on {len(some)} {called} ...")
    report = maps.faithfulness(model, inputs, grey, masks, methods, layer, explainer.answer, "tests")
    about = {"format": FORMAT, "synthetic": run.results["synthetic"], "split": split}
    about |= {"target": classes[target], "checkpoint": run.checkpoint_sha256, "layer": layer}
    about["lungs"] = source
    write_json(folder / "explain.json", {**about, **report})
    print(f"tests on {len(some)} {called}:")
    for method in methods:
        print(summary(maps.METHODS[method], report[method]))


def summary(name, found):
    """The tests of one method in a line."""
    mean = {k: v["mean"] for k, v in found.items() if isinstance(v, dict)}
    head, *_, everything = (step["rank_correlation"] for step in found["randomised"])
    if found["empty"]:
        name += f" ({found['empty']} of the maps are empty, and count nowhere)"
    on_lungs = "on no image are the lungs known"
    if "lung_share" in mean:
        on_lungs = f"on the lungs {mean['lung_share']:.2f} (their area {found['lung_area']:.2f})"
    return (
        f"{name}: deletion minus random {mean['deletion_minus_random']:+.3f} (lower is better), insertion "
        f"minus random {mean['insertion_minus_random']:+.3f} (higher is better); {on_lungs}, on the border "
        f"{mean['border_share']:.2f} (its area {found['border_area']:.2f}); rank correlation {head:.2f} "
        f"after the head is drawn anew, {everything:.2f} after all layers' weights are (near 1: what "
        "they learnt does not show)"
    )


def refuse_moved(args):
    """InputError for flags of a data set where image files are named."""
    given = [f"--{name.replace('_', '-')}" for name in MOVED if getattr(args, name)]
    if given and args.images:
        raise InputError(f"{', '.join(given)}: files that are named are drawn as they are; leave it out")


def parse():
    """Checked command line."""
    parser = Parser(__doc__)
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="files or folders to draw instead of a data split"
    )
    parser.add_argument("--run", default="outputs/pretrained", metavar="DIR", help="a calibrated run folder")
    parser.add_argument(
        "--split", choices=tuple(SIDES), default="val", help="part of the data to choose images from"
    )
    parser.add_argument(
        "--method", choices=(*maps.METHODS, "both"), default="both", help="which maps to draw"
    )
    parser.add_argument("--finding", metavar="NAME", help="which of several findings (default: the first)")
    parser.add_argument(
        "--target",
        metavar="CLASS",
        help="of two classes, the one to explain (default: the finding)",
    )
    parser.add_argument(
        "--layer",
        type=Number(int, -256, 255),
        default=-1,
        metavar="N",
        help="block that Grad-CAM looks at, from 0, or from the end: -1 is the last",
    )
    parser.add_argument(
        "--tests",
        type=Number(int, 0, 10_000),
        default=40,
        metavar="N",
        help="number of images to test the maps on",
    )
    parser.add_argument(
        "--lungs",
        default=lung_masks.SHIPPED,
        metavar="SOURCE",
        help="source of the lungs that are outlined and compared with the maps: weights of train_lungs.py, "
        "heuristic, or a .npz of masks",
    )
    add_moved_arguments(parser)
    add_device_argument(parser)
    return parser.parse_args()


def main():
    args = parse()
    methods = list(maps.METHODS) if args.method == "both" else [args.method]
    device, run = pick_device(args.device), Run(args.run)
    refuse_moved(args)
    explainer = Explainer(
        run, device, methods=methods, layer=args.layer, target=args.target, finding=args.finding
    )
    if views := explainer.calibration.get("tta"):
        say(f"note: the score of {run} is {scaling.views_in_words(views)}; its maps are of the image itself")
    if args.images:
        explain_files(explainer, args.images, args.lungs)
    else:
        moved = moved_settings(args, run.config.data_dir)
        explain_split(explainer, args.split, args.tests, args.lungs, moved)


if __name__ == "__main__":
    start(main)
