"""Score new radiographs with a calibrated run: probability and decision for each file.

    python predict.py PATHS... --run outputs/pretrained > predictions.csv

PATHS are files, folders (searched recursively) or quoted globs: JPEG, PNG, TIFF, BMP, WebP and DICOM, of 8
bits or more, grey or colour. In folders, files are recognised by name, or else by content; a line on stderr
counts what is passed over.

Stdout is CSV, or JSON lines with --jsonl: path, p_pneumonia, decision@0.5, decision@Rec (with --site also
decision@Guar), typicality, note. Several findings have p_FINDING and decision@Rec_FINDING each (yes or no,
empty without a threshold); several classes also top_class, the most probable one. Of a run calibrated --by
study, study, study_p_... and study_decision... replace the decisions on images, and rows come last.
Preprocessing, precision, scaling and thresholds come from the run's calibration, so the test folder gives
calibrate.py's scores. A line on stderr says where scores are no probabilities (a run trained with class
weights).

`typicality` is the share of validation images at least as odd. `note` says when it is 0.01 or less, or when
brightness, contrast, colour or size is unlike the training images. A file that cannot be read gets a note in
its row, and the exit code is 2; the others are scored. DICOM files of a view that the run was not trained on
(lateral, say) get a note and no score; --views all scores them. Memory does not grow with the number of
files.

Stderr ends with the count of notes by kind, a verdict on all images together, and what to do next. The
verdict: like validation, like validation at another share of sick people, or others (calibration/shift.py).
--summary writes it to a file, --keep to the run, for compare.py.

    python predict.py --export model.onnx --run outputs/pretrained

writes an ONNX file instead (needs onnx, onnxscript and onnxruntime), checked against PyTorch. Not a medical
device.
"""

import common.prelude  # noqa: F401  (first: see there)

import csv
import itertools
import json
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from calibration import shift
from calibration.pooling import columns_of, fill_in, unit_of
from common import scaling
from common.cli import COUNT, Parser, add_calibrated_run_arguments, check_name
from common.console import InputError, Pace, say, start
from common.device import add_device_argument, pick_device
from common.files import check_output, write_json
from images.decode import read_image
from images.find import Search, find_files
from layouts.choices import VIEWS, view_is_used
from layouts.headers import key_of_call, of_file
from layouts.listing import Index, patient_id
from layouts.patients import read_patients
from lungs import masks as lung_masks
from lungs.show import plausible
from models.inputs import Inputs
from records.onnx import export
from records.run import Run

NOTES = ("unlike", "odd", "lungs")  # the kinds of notes of an image that can be read


class File(NamedTuple):
    """A file that was looked at. `image`: what read_image gives, or None, and then `note` says why not and
    `kind` what kind of note that is; `told`: what its DICOM header says (headers.of_file)."""

    name: str
    told: dict
    image: tuple = None
    note: str = ""
    kind: str = ""

    @property
    def patient(self):
        """The patient, by the header or else by the name; the name itself where neither tells."""
        return self.told["patient"] or patient_id(self.name)


class Scorer:
    """A calibrated run, ready to score: model, preprocessing, precision, scaling, and the `decisions`
    (task.Decision) that it gives of each image."""

    def __init__(self, run, device, tta, site=None, views=None):
        self.model, name = run.model(), scaling.calibration_name(tta)
        self.calibration, self.site = run.calibration(name), site
        self.run, self.results, self.config, self.task = run, run.results, run.config, run.task
        # A site has its own thresholds, and @Guar decides only there.
        source, guaranteed = self.calibration, None
        if site:
            source = run.site(site, name)
            guaranteed = source["findings"][self.task.findings[0]].get("guaranteed")
        thresholds = {finding: source["findings"][finding].get("threshold") for finding in self.task.findings}
        self.decisions = self.task.decisions(thresholds, guaranteed)

        # What is missing is found now, not in the middle of a thousand files.
        try:
            self.inputs = Inputs.of_calibration(run, self.calibration, device)
            shift.unlike(np.zeros((2, 2)), (1, 1), 0.0, self.results)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{run}: results.json or its calibration is incomplete ({error!r})") from None
        scores, decided = list(self.task.score_columns.values()), [d.column for d in self.decisions]
        self.unit = unit_of(self.calibration)
        if self.unit == "image":
            self.columns = ["path", *scores, *decided]
        else:  # thresholds decide on studies: none is printed that would decide on an image
            self.columns = ["path", self.unit, *scores, *columns_of(self.unit, [*scores, *decided])]
        self.columns += ["typicality", "note"]
        if self.task.one_of_many:
            self.columns.insert(1, "top_class")
        self.views = views or getattr(self.config, "views", "frontal")
        self.key, self.key_stays = key_of_call(self.config.cache_dir if self.unit != "image" else "")

        self.reference, self.batch = shift.reference_of(run, name), shift.Batch()
        self.notes = Counter()  # files with a note, and by kind
        self.finder = lung_masks.finder_of(self.config, device)
        self.without_lungs = lung_masks.not_found(self.config)
        self.model.to(device)

    @torch.inference_mode()
    def scores(self, images):
        """uint8 [B, S, S] -> (probabilities float64 [B, F], logits [B, K], whether the image has no lungs
        although they are needed, bool [B], features float32 [B, D])."""
        masks = self.finder(images) if self.finder else None
        whole = ~plausible(masks) if self.finder else np.zeros(len(images), bool)
        outputs = self.inputs.logits_and_features(self.model, self.inputs.grey(images, masks)).cpu().numpy()
        logits, features = outputs[:, : self.task.outputs], outputs[:, self.task.outputs :]
        scores = self.task.scores_from(logits, self.calibration)
        if not np.isfinite(scores).all():
            raise InputError(
                "the model gives NaN scores: its checkpoint is damaged, or its precision too low"
            )
        return scores, logits, whole, features

    def called(self, scores):
        """Whom the model calls sick by its first finding, bool [N]: scores [N, F]."""
        first = next(decision for decision in self.decisions if decision.point == "@Rec")
        threshold = 0.5 if first.threshold is None else first.threshold
        return scores[:, 0] >= threshold

    def typicalities(self, files, scores, logits, features):
        """The typicality of every image, float [B], or None each without a reference; they join the batch."""
        if self.reference is None:
            return [None] * len(files)
        typicality, places = self.reference.place(features)
        names, patients = zip(*((file.name, file.patient) for file in files))
        for image in zip(names, patients, typicality, places, logits, self.called(scores)):
            self.batch.add(*image)
        return typicality.tolist()

    def verdict(self):
        """Whether all images so far are like validation, as JSON; None without a reference that holds labels
        (older versions kept none)."""
        if self.reference is None or not self.reference.labelled:
            return None
        usual = self.called(self.task.scores_from(self.reference.logits, self.calibration))
        return self.reference.judge(self.batch, usual, self.task)

    def answers(self, scores, top):
        """{column: cell} of one image, its top class, scores [F] and, by image, decisions."""
        cells = dict(zip(self.task.score_columns.values(), scores.tolist()))
        if self.unit == "image":
            cells |= {decision.column: decision.answer(scores) for decision in self.decisions}
        if self.task.one_of_many:
            cells["top_class"] = self.task.classes[top]
        return cells

    def read(self, path):
        """The File at a path."""
        file = File(path, of_file(path, self.key))
        view = file.told["view"]
        if not view_is_used([view], self.views)[0]:
            return file._replace(note=f"{view} view: not scored (--views all scores it)", kind="view")
        try:
            return file._replace(image=read_image(path, self.config.img_size, self.config.resize))
        except OSError as error:
            return file._replace(note=f"unreadable: {error}", kind="unreadable")

    def rows(self, paths, batch_size):
        """Yield (File without its image, dict of `columns`) for every path, in order; files that are not
        scored have None for scores and decisions. What is of the study or patient is not filled in."""
        paths = iter(paths)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            names = list(itertools.islice(paths, batch_size))
            reading = pool.map(self.read, names)
            while names:
                files = list(reading)
                names = list(itertools.islice(paths, batch_size))
                reading = pool.map(self.read, names)  # the next batch is decoded while this one is scored
                yield from self.rows_of_batch(files)

    def rows_of_batch(self, files):
        """The same of the Files of one batch."""
        readable = [file for file in files if file.image is not None]
        scored = self.scored(readable) if readable else iter(())
        for file in files:
            row = {**dict.fromkeys(self.columns), "path": file.name, "note": file.note}
            if file.image is None:
                self.notes.update([file.kind, "noted"])
            else:
                cells, row["typicality"], without_lungs = next(scored)
                row |= cells
                row["note"] = self.note(file.image, row["typicality"], without_lungs)
            yield file._replace(image=None), row

    def scored(self, files):
        """Yield (`answers`, typicality, whether no lungs were found) of Files that could be read."""
        scores, logits, whole, features = self.scores(np.stack([file.image[0] for file in files]))
        typicality = self.typicalities(files, scores, logits, features)
        cells = map(self.answers, scores, logits.argmax(axis=1))
        yield from zip(cells, typicality, whole)

    def note(self, image, typicality, without_lungs):
        """What is to be said of an image that could be read, as text; counted in `notes` by kind."""
        texts = dict.fromkeys(NOTES, "")
        texts["unlike"] = shift.unlike(*image, self.results)
        if typicality is not None and typicality <= shift.ODD:
            texts["odd"] = f"odd: typicality {typicality:.4f}"
        if without_lungs:
            texts["lungs"] = self.without_lungs
        said = {kind: text for kind, text in texts.items() if text}
        self.notes.update(said.keys())
        self.notes["noted"] += bool(said)
        return "; ".join(said.values())


def parse():
    """Checked command line."""
    parser = Parser(__doc__)
    parser.add_argument("paths", nargs="*", metavar="PATHS", help="images to score: files, folders or globs")
    add_calibrated_run_arguments(parser)
    parser.add_argument("--tta", action="store_true", help="average over views, as calibrate.py --tta did")
    parser.add_argument("--jsonl", action="store_true", help="print JSON lines instead of CSV")
    parser.add_argument(
        "--export", default=None, metavar="FILE.onnx", help="write an ONNX model instead of scoring"
    )
    parser.add_argument(
        "--summary", metavar="FILE.json", help="write the verdict on all images together to this file"
    )
    parser.add_argument(
        "--keep", metavar="NAME", help="keep that verdict in the run under this name, for compare.py"
    )
    parser.add_argument(
        "--views",
        choices=VIEWS,
        help="score only these, where a DICOM header tells the view (default: those of the training)",
    )
    parser.add_argument(
        "--patients",
        metavar="CSV",
        help="table path,patient: which images belong together, where thresholds are by patient",
    )
    parser.add_argument("--batch-size", type=COUNT, default=64, metavar="N", help="images a step")
    add_device_argument(parser)
    args = parser.parse_args()
    check_name("--keep", args.keep)
    check_name("--site", args.site)
    for flag, path in (("--summary", args.summary), ("--export", args.export)):
        if path:
            check_output(flag, path)
    if bool(args.paths) == bool(args.export):  # both, or neither
        raise InputError("give either PATHS to score or --export FILE.onnx")
    return args


def count_of_notes(count, notes, typicality):
    """How many of `count` files have a note, and how many notes of each kind, as text. `typicality`: whether
    odd images can be told at all."""
    kinds = {
        "unreadable": "unreadable",
        "view": "of a view that is not scored",
        "odd": f"odd (typicality {shift.ODD:g} or less)",
        "unlike": "of a brightness, contrast, colour or size unlike the training images",
        "lungs": "without lungs, though the model needs them",
    }
    # Kinds that do not occur are not listed; that one could not be looked for is.
    counts = [f"{notes[kind]} {text}" for kind, text in kinds.items() if notes.get(kind)]
    if not typicality:
        counts.append("which are odd cannot be told")
    text = f"{count} files, {notes['noted']} with a note"
    if counts:
        text += f": {', '.join(counts)}"
    return text


def advice(verdict, run, site):
    """What to do next, as text; empty if nothing."""
    if verdict["verdict"] == "shifted":
        if site:  # its thresholds were chosen for such images, so nothing need be labelled again
            return (
                f"next: the thresholds of {site} hold while patients stay like those labelled there; "
                "python monitor.py watches that as diagnoses come in"
            )
        return (
            "next: label some of these images; "
            f"python calibrate.py --run {run} --site DIR --name WHERE chooses thresholds on them"
        )
    if verdict["verdict"] == "few" and verdict["patients"]:
        return f"next: score {shift.LEAST} patients or more together"
    return ""


def report(scorer, args, counts):
    """Say the verdict on all images together and what to do next, and write it where --summary and --keep ask
    for it."""
    run, verdict = scorer.run, scorer.verdict()
    if verdict is None:
        say_no_verdict(scorer, args.tta)
        if args.summary or args.keep:
            raise InputError(f"--summary, --keep: {run} has nothing to hold images against")
        return
    say(shift.sentence(verdict))
    if next_step := advice(verdict, run, args.site):
        say(next_step)
    # compare.py leaves out what another checkpoint has said, so the checkpoint is kept.
    origin = {"run": str(run), "checkpoint": run.checkpoint_sha256, "paths": args.paths[:20]}
    summary = {**origin, **counts, **verdict}
    if args.summary:
        write_json(args.summary, summary)
    if args.keep:
        run.save_batch(args.keep, summary)


def say_no_verdict(scorer, tta):
    """Say what an older calibration lacks for a verdict, and how to get it."""
    flags = " --tta" if tta else ""
    lacking = "typicality and a verdict on all images together"
    if scorer.reference is not None:
        lacking = "a verdict on all images together, which needs the true labels of validation"
    say(
        f"note: {scorer.run} was calibrated by an older version: run python calibrate.py "
        f"--run {scorer.run}{flags} for {lacking}"
    )


def pooled(scorer, rows, table):
    """What Scorer.rows gives of all files, list of (File, row), with the columns of studies or patients;
    `table`: of --patients, or None."""
    names, patients = [file.name for file, _ in rows], [file.patient for file, _ in rows]
    if table and rows:
        nothing = np.zeros(len(names), dtype=int)
        index = read_patients(table, Index(names, nothing, patients, nothing > 0, nothing.astype(str)))
        patients = [new if known else old for new, known, old in zip(index.patients, index.known, patients)]
    if scorer.unit == "study" and not scorer.key_stays:
        say("note: no key in the run's cache folder: the names of studies are of this call only")
    studies, columns = [file.told["study"] for file, _ in rows], list(scorer.task.score_columns.values())
    fill_in([row for _, row in rows], patients, studies, scorer.calibration, columns, scorer.decisions)
    return rows


def main():
    args = parse()
    scorer = Scorer(Run(args.run), pick_device(args.device), args.tta, args.site, args.views)
    if args.patients and scorer.unit != "patient":
        raise InputError(f"--patients: the thresholds of {scorer.run} are by {scorer.unit}, not by patient")
    if scorer.results["synthetic"]:
        say("note: this run was trained on SYNTHETIC images; its scores mean nothing for patients")
    if line := scaling.remark(scorer.calibration, scorer.run):
        say(line)
    if args.export:
        return export(scorer, args.export)
    # A row is printed as soon as it is known: there may be more files than fit into memory. By study or
    # patient that is after the last file.
    search, pace, count = Search(), Pace(), 0
    rows = scorer.rows(find_files(args.paths, search), args.batch_size)
    if scorer.unit != "image":
        rows = pooled(scorer, list(rows), args.patients)
    writer = csv.DictWriter(sys.stdout, scorer.columns, lineterminator="\n")
    if not args.jsonl:
        writer.writeheader()
    for _, row in rows:
        count += 1
        if args.jsonl:
            print(json.dumps(row))
        else:
            writer.writerow(row)
        pace.count(count, "files")
    if not count:
        raise InputError(f"no image files in {', '.join(args.paths)}: {search.nothing()}")

    # What was passed over, what was odd, and the verdict come last, where they are seen.
    search.tell(", ".join(args.paths[:3]))
    reference, unreadable = scorer.reference, scorer.notes["unreadable"]
    typicality = reference is not None and len(reference.distances) >= shift.ODD_NEEDS
    say(count_of_notes(count, scorer.notes, typicality))
    report(scorer, args, {"images": count, "unreadable": unreadable})
    if unreadable:
        raise InputError(f"{unreadable} of {count} files could not be read; their rows say why")


if __name__ == "__main__":
    start(main)
