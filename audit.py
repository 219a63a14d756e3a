"""Ask a run whether it looks at the lungs, or at the machine.

    python audit.py --run outputs/pretrained

Takes the validation images (--side test on request) and asks five questions. Does the border decide? Are the
lungs needed? What else do the features tell? Does the threshold hold under thirteen changes of exposure,
sharpness and framing? Are the false alarms of one kind of patients? Each ends in a verdict, kept, open or
broken, and a sentence with its figures; docs/AUDIT.md has the rules.

Writes audit.json into the run folder, which compare.py shows, and audit-SIDE-clusters.png: typical patients
of the group with the worst specificity. What an earlier call found of other sections, of the other side and
of other findings stays. About ten minutes on two cores for a ViT-Ti/16 and 1,000 images.

--labels looks at the training images instead and lists those whose label the other patients' images
contradict: audit-train-labels.csv and .png. It needs the package cleanlab.

Any classifier can be audited; sections 4 and 5 need a threshold (calibrate.py). An audit can find a shortcut,
not prove that there is none.
"""

import common.prelude  # noqa: F401  (first: see there)

import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from auditing import clusters, looks, rules, signals
from auditing.labels import written
from auditing.labels.asked import (
    answers,
    askable,
    features_of,
    patients_of,
    questions,
    say_limits,
    some_images,
)
from auditing.labels.errors import check_cleanlab
from auditing.reader import Change, Reader
from auditing.record import KEYS, NAME, TITLES, audit_of, kept_of, save_side
from auditing.sheet import draw_sheet
from auditing.side import side_of, some_patients, too_few
from calibration.pooling import say_not_of_images
from common.cli import COUNT, Number, Parser
from common.console import InputError, command_line, say, start
from common.device import add_device_argument, pick_device
from common.proportions import count_of
from common.scaling import SIDES
from data import load_split
from layouts.asked import add_moved_arguments, moved_settings
from layouts.listing import taken
from records.run import Run

LABELS = "labels"  # of --only, besides the sections
SIDES_OF_LABELS = {"train": "training", **SIDES}
MOST_IMAGES = 1200
CORRUPTED = 3  # section 4 scores each image thirteen times, so it takes at most a third of them


class Audit:
    """The sections `asked` for, on a Side, by a Reader. `left_out`: {key: why a section cannot be run}."""

    def __init__(self, side, reader, asked, most):
        self.side, self.reader, self.asked = side, reader, asked
        self.left_out, self.scores, self.lungs, self.typical = {}, {}, None, None
        self.corrupted = some_patients(side.y, side.patients, max(1, most // CORRUPTED))

        # What cannot be run is known before anything is scored.
        few, no_threshold = too_few(side.y, side.patients), ""
        if reader.threshold is None:
            no_threshold = reader.why_not
        reasons = {
            "border": few or reader.why_no_changes,
            "lungs": few,
            "corruptions": few or no_threshold or reader.why_no_changes,
            "clusters": no_threshold,
        }
        self.left_out = {key: why for key, why in reasons.items() if why}
        if self.runs("lungs"):
            self.find_lungs()

    def runs(self, key):
        """Whether a section is asked for and can be run."""
        return key in self.asked and key not in self.left_out

    def find_lungs(self):
        """The lungs of all images, or a reason why the section is left out."""
        try:
            self.lungs = looks.Lungs(self.side, self.reader)
        except InputError as error:
            self.left_out["lungs"] = str(error)
            return
        found = self.lungs.positions
        if few := too_few(self.side.y[found], self.side.patients[found]):
            self.left_out["lungs"] = f"lungs are found on {len(found)} images: {few}"

    def score(self, batch_size):
        """Score all that the sections need in one go, so that the remaining time is that of the whole."""
        side = self.side
        changes = [Change(("clean", ""), np.arange(len(side.y)))]
        if self.runs("border"):
            changes += looks.border_changes(side)
        if self.runs("lungs"):
            changes += self.lungs.changes()
        if self.runs("corruptions"):
            changes += looks.corruption_changes(self.corrupted)
        self.scores, side.features = self.reader.score(side.subset, changes, batch_size)
        side.clean = self.scores["clean", ""]

    def answers(self):
        """{key: (line, figures)} of the sections asked for."""
        sections = {
            "border": self.on_border,
            "lungs": self.on_lungs,
            "features": self.on_features,
            "corruptions": self.on_corruptions,
            "clusters": self.on_clusters,
        }
        found = {}
        for key in self.asked:
            if key in self.left_out:
                found[key] = rules.cannot(key, self.left_out[key]), {}
            else:
                found[key] = sections[key]()
        return found

    def on_border(self):
        """(line, figures) of section 1."""
        figures = looks.border_figures(self.side, self.scores)
        return rules.border(figures), figures

    def on_lungs(self):
        """(line, figures) of section 2."""
        figures = looks.lung_figures(self.side, self.lungs, self.scores)
        return rules.lungs(figures), figures

    def on_corruptions(self):
        """(line, figures) of section 4."""
        figures = looks.corruption_figures(self.side, self.corrupted, self.scores, self.reader.threshold)
        return rules.corruptions(figures), figures

    def on_features(self):
        """(line, figures) of section 3, of the images without the finding: the disease cannot tell there."""
        side, reader, healthy = self.side, self.reader, np.flatnonzero(self.side.y == 0)
        files = [side.subset.files[i] for i in healthy]
        sizes = signals.original_sizes(reader.config, files, reader.run.results)
        known = signals.signals_of(taken(side.subset.cohort, healthy), sizes)
        figures = signals.signal_figures(side, known)
        if not figures["signals"]:
            why = "; ".join(figures["left_out"]) or "no sex, view, machine, age or original size that varies"
            return rules.cannot("features", f"nothing else is known of these images ({why})"), figures
        return rules.features(figures), figures

    def on_clusters(self):
        """(line, figures) of section 5; what is typical of its worst group is kept for the sheet."""
        side, healthy = self.side, np.flatnonzero(self.side.y == 0)
        called = side.clean[healthy] >= self.reader.threshold
        features = self.reader.without_head(side.features)[healthy]
        files = [side.subset.files[i] for i in healthy]
        figures, typical = clusters.figures(features, called, side.patients[healthy], files)
        if figures is None:
            people = count_of(side.patients[healthy])
            alarms = count_of(side.patients[healthy][called])
            why = (
                f"{alarms} of {people} patients without the finding have a false alarm; {clusters.LEAST} "
                f"patients, and {clusters.LEAST_ALARMS} of them with an alarm, are needed"
            )
            return rules.cannot("clusters", why), {}
        self.typical = healthy[typical]
        return rules.clusters(figures), figures


# ---------------------------------------------------------------- what becomes of it


def write_sheet(audit):
    """Draw the typical patients of the worst group, if there is one; an earlier sheet goes."""
    side, reader = audit.side, audit.reader
    path = reader.run.folder / f"audit-{side.name}-clusters.png"
    if audit.typical is None:
        path.unlink(missing_ok=True)
        return
    texts = []
    for i in audit.typical:
        called = "called sick" if side.clean[i] >= reader.threshold else "not called"
        texts.append(f"{Path(side.subset.files[i]).name}\n{side.clean[i]:.3f}, {called}")
    mark = " [SYNTHETIC]" if reader.run.results["synthetic"] else ""
    title = (
        f"{reader.run.folder.resolve().name}, {SIDES[side.name]}, without {reader.finding}: typical patients "
        f"of the group with the worst specificity (threshold {reader.threshold:.3f}){mark}"
    )
    draw_sheet(path, side.subset.pixels(audit.typical), texts, title)
    print(f"wrote {path}")


def keep(audit, found):
    """Write `found`, as Audit.answers, into audit.json, with what an earlier call found of the other
    sections -> the side's record."""
    side, reader = audit.side, audit.reader
    earlier = kept_of(audit_of(reader.run), side.name, reader.finding) or {"lines": [], "figures": {}}
    for key, (line, _) in found.items():
        line["images"] = len(side.y)  # an earlier call may have taken others
        if key in ("corruptions", "clusters"):
            line["threshold"] = reader.threshold
    lines = {line["key"]: line for line in earlier["lines"]} | {k: line for k, (line, _) in found.items()}
    lines = [lines[key] for key in KEYS if key in lines]
    record = {
        "finding": reader.finding,
        "images": len(side.y),
        "of_images": side.of_images,
        "patients": count_of(side.patients),
        "synthetic": reader.run.results["synthetic"],
        "command": command_line(),
        "lines": lines,
        "shortcut": rules.shortcut(lines),
        "figures": earlier["figures"] | {key: figures for key, (_, figures) in found.items()},
    }
    save_side(reader.run, side.name, record, reader.task.findings[0])
    return record


def show(run, record, side, asked):
    """Print the lines of the sections that were asked for, and the mark."""
    mark = " [SYNTHETIC]" if record["synthetic"] else ""
    print(
        f"{run}, {SIDES[side]}: {record['images']} of {record['of_images']} images, {record['patients']} "
        f"patients; {record['finding']}{mark}"
    )
    for line in record["lines"]:
        if line["key"] in asked:
            print(f"  {TITLES[line['key']]}: {line['verdict'].upper()}: {line['text']}")
    print(f"  Shortcut: {record['shortcut']['verdict'].upper()}: {record['shortcut']['text']}")
    print(f"wrote {run.folder / NAME}")


# ---------------------------------------------------------------- labels


def list_labels(args, run, moved):
    """Write and show which labels of a side are likely to be wrong."""
    check_cleanlab()  # now, not after ten minutes
    side = args.side or "train"
    reader = Reader(run, pick_device(args.device), run.task.findings[0])
    # An uncertain label is none: what training made of it says nothing of the image.
    subset = some_images(load_split(run, side, moved | {"uncertain": "ignore"}), args.most_images)
    patients = patients_of(subset, replace(run.config, **moved))
    asked = askable(questions(run.task, subset.targets, args.finding), subset, patients)
    say_limits(run, side)
    found = answers(asked, features_of(reader, subset, args.batch_size), patients)

    paths = [run.folder / f"audit-{side}-labels.{ending}" for ending in ("csv", "png")]
    mark = " [SYNTHETIC]" if run.results["synthetic"] else ""
    name = f"{SIDES_OF_LABELS[side]} images"
    written.write_list(paths[0], subset, found)
    title = f"{run.folder.resolve().name}, {name}: labels that other patients' images contradict most{mark}"
    if not written.write_sheet(paths[1], subset, found, title):
        paths.pop()
    print(f"{run}, labels of {len(subset)} {name}, {count_of(patients)} patients{mark}")
    for line in written.lines(subset, found):
        print(line)
    print(written.ADVICE)
    for path in paths:
        print(f"wrote {path}")


# ---------------------------------------------------------------- main


def parse():
    """Checked command line; `only` are the sections, `lists_labels` is whether labels are asked about."""
    parser = Parser(__doc__)
    parser.add_argument("--run", default="outputs/pretrained", metavar="DIR", help="a run folder")
    parser.add_argument(
        "--side", choices=tuple(SIDES_OF_LABELS), help="the images to look at (default: val, of labels train)"
    )
    parser.add_argument(
        "--finding", metavar="NAME", help="of several findings (default: the first, of labels all)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=(*KEYS, LABELS), help="sections, or labels (default: all sections)"
    )
    parser.add_argument(
        "--most-images",
        type=Number(int, 20, 10**9),
        metavar="N",
        help="at most this many images, whole patients at random; a third as many under the thirteen changes "
        f"(default: {MOST_IMAGES}, of labels all)",
    )
    parser.add_argument("--batch-size", type=COUNT, default=64, metavar="N", help="images a step")
    group = parser.add_argument_group("where the images are now")
    add_moved_arguments(group, leave_out=("labels",))
    group.add_argument(
        "--labels",
        nargs="?",
        const=True,
        metavar="CSV",
        help="alone: list labels that are likely to be wrong, as --only labels; with CSV: where the table of "
        "findings is now (default: as trained)",
    )
    add_device_argument(parser)
    args = parser.parse_args()

    # --labels alone is what to do; with a table it is where that is.
    alone, given = args.labels is True, args.only or []
    if alone:
        args.labels = None
    args.lists_labels = alone or LABELS in given
    args.only = [key for key in KEYS if key in given]
    if not given and not alone:
        args.only = list(KEYS)
    if args.only and args.side == "train":
        raise InputError(
            "--side train is for --labels alone: the other sections look at images not trained on"
        )
    return args


def main():
    args, started = parse(), time.monotonic()
    run = Run(args.run)
    moved = moved_settings(args, run.config.data_dir)
    if args.lists_labels:
        list_labels(args, run, moved)
    if args.only:
        ask_sections(args, run, moved)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")


def ask_sections(args, run, moved):
    """Ask the sections of the command line about a run; write and show what they say."""
    asked, side = args.only, args.side or "val"
    finding = run.task.chosen_finding(args.finding or run.task.findings[0])
    audit_of(run)  # a damaged file is said now, not after ten minutes
    reader = Reader(run, pick_device(args.device), finding)
    if not run.task.alone and not args.finding:
        others = ", ".join(run.task.findings[1:])
        say(f"note: audited for {finding!r}; --finding names another: {others}")
    if reader.calibration:
        say_not_of_images(run, reader.calibration)

    reader.config = replace(run.config, **moved)
    subset, most = load_split(run, side, moved), args.most_images or MOST_IMAGES
    audit = Audit(side_of(subset, run.task, finding, side, most), reader, asked, most)
    audit.score(args.batch_size)
    found = audit.answers()
    if "clusters" in asked:
        write_sheet(audit)
    show(run, keep(audit, found), side, asked)


if __name__ == "__main__":
    start(main)
