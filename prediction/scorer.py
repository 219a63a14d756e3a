"""Files in, a row each out: what predict.py prints, and what `predict.Scorer` gives in Python."""

import itertools
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch

from calibration import shift
from calibration.pooling import columns_of, fill_in, unit_of
from common import scaling
from common.cli import check_name
from common.console import InputError, Pace, say
from common.device import pick_device
from images.decode import read_image
from images.find import Search, find_files
from layouts.choices import VIEWS, view_is_used
from layouts.headers import key_of_call, of_file
from layouts.listing import Index, patient_in_folder
from layouts.patients import read_patients
from lungs import masks as lung_masks
from lungs.show import plausible
from models.inputs import Inputs
from prediction.people import people_of
from records.run import Run

BY_HAND = "@hand"  # the operating point of a threshold by hand
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
        return self.told["patient"] or patient_in_folder(self.name)


# ---------------------------------------------------------------- thresholds by hand


def thresholds_by_hand(task, threshold):
    """{finding: number} of a threshold by hand: None, a number where there is one finding, or a dict.
    InputError for a finding that is not there or not said, and a number outside [0, 1]."""
    if threshold is None:
        return {}
    if not isinstance(threshold, dict):
        if not task.alone:
            raise InputError(f"threshold {threshold}: FINDING=X, for which of {', '.join(task.findings)}?")
        threshold = {task.findings[0]: threshold}
    for finding, number in threshold.items():
        task.chosen_finding(finding, "threshold of")
        # NaN is not between, and True is no threshold of 1.
        if not (isinstance(number, Real) and not isinstance(number, bool) and 0 <= number <= 1):
            raise InputError(f"threshold {number!r} of {finding}: a number between 0 and 1, as scores are")
    return dict(threshold)


def decision_by_hand(decision, by_hand):
    """A Decision at the threshold by hand of its finding, if that has one; that at 0.5 stays as it is."""
    if decision.point != "@Rec" or decision.finding not in by_hand:
        return decision
    column = decision.column.replace(decision.point, BY_HAND, 1)
    return decision._replace(column=column, point=BY_HAND, threshold=by_hand[decision.finding])


# ---------------------------------------------------------------- the scorer


class Scorer:
    """A calibrated run, ready to score new images.

        scorer = Scorer("outputs/pretrained")
        rows = scorer(["a.png", "b.dcm"])

    `run`: a run folder, or a Run; `device`: "auto" (cuda > mps > cpu), "cuda:1", "cpu" or a torch.device;
    `tta`: average over views, as calibrate.py --tta did (a run with views of its own does so without it);
    `site`: a name of calibrate.py --site, for its thresholds; `views`: one of choices.VIEWS (default: those
    of the training); `threshold`: one by hand in place of the run's, of several findings {finding: number}.

    `columns`: the keys of a row; `decisions`: list of task.Decision, what is decided of each image, and of
    task.Triage where the thresholds have @In and none is by hand; `task`, `config`, `results`,
    `calibration`: of the run. InputError for a run that is absent, damaged or not calibrated (so), and for a
    device that is not there."""

    def __init__(self, run, device="auto", *, tta=False, site=None, views=None, threshold=None):
        run = run if isinstance(run, Run) else Run(run)
        check_name("site", site)
        if views not in (None, *VIEWS):
            raise InputError(f"views {views!r} is not one of {', '.join(VIEWS)}")
        device = pick_device(str(device))
        self.model, name = run.model(), scaling.calibration_name(scaling.asked_views(tta, run), run)
        self.calibration, self.site = run.calibration(name), site
        self.run, self.results, self.config, self.task = run, run.results, run.config, run.task
        # A site has its own thresholds, and @Guar decides only there.
        source, guaranteed = self.calibration, None
        if site:
            source = run.site(site, name)
            guaranteed = source["findings"][self.task.findings[0]].get("guaranteed")
        thresholds = {finding: source["findings"][finding].get("threshold") for finding in self.task.findings}
        self.decisions = self.task.decisions(thresholds, guaranteed)
        self.by_hand = thresholds_by_hand(self.task, threshold)
        if self.by_hand and site:
            raise InputError(f"a threshold by hand replaces those of the site {site}: leave one of them out")
        self.decisions = [decision_by_hand(decision, self.by_hand) for decision in self.decisions]
        self.triage = self.task.triage(source["findings"])
        if not self.by_hand:
            self.decisions += self.triage

        # What is missing is found now, not in the middle of a thousand files.
        try:
            self.inputs = Inputs.of_calibration(run, self.calibration, device)
            shift.unlike(np.zeros((2, 2)), (1, 1), 0.0, self.results)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{run}: results.json or its calibration is incomplete ({error!r})") from None
        self.unit = unit_of(self.calibration)
        self.columns = self._columns()
        self.views = views or getattr(self.config, "views", "frontal")
        self.key, self.key_stays = key_of_call(self.config.cache_dir if self.unit != "image" else "")

        self.reference, self.batch = shift.reference_of(run, name), shift.Batch()
        self.waiting = []  # images of a run by study or patient, whose patients are known after the last file
        self.notes = Counter()  # files with a note, and by kind
        self.finder = lung_masks.finder_of(self.config, device)
        self.without_lungs = lung_masks.not_found(self.config)
        self.model.to(device)
        self._say_what_scores_are()

    def _columns(self):
        """The names of the columns of a row, in order."""
        scores, decided = list(self.task.score_columns.values()), [d.column for d in self.decisions]
        decided += self.threshold_cells()
        if self.unit == "image":
            columns = ["path", *scores, *decided]
        else:  # thresholds decide on studies: none is printed that would decide on an image
            columns = ["path", self.unit, *scores, *columns_of(self.unit, [*scores, *decided])]
        columns += ["typicality", "note"]
        if self.task.one_of_many:
            columns.insert(1, "top_class")
        return columns

    def column_of_unit(self, column):
        """What a column of scores or decisions is called where thresholds decide: on images, or on studies or
        patients."""
        return column if self.unit == "image" else columns_of(self.unit, [column])[0]

    def threshold_cells(self):
        """{column: the threshold}, of all decisions but those at 0.5; None where a finding has none."""
        cells = {}
        for decision in self.decisions:
            if decision.point != "@0.5":
                cells[decision.threshold_column] = decision.threshold
        return cells

    def _say_what_scores_are(self):
        """A note where scores mean nothing for patients, where they are no probabilities, and where the
        threshold is one by hand."""
        if self.results["synthetic"]:
            say("note: this run was trained on SYNTHETIC images; its scores mean nothing for patients")
        if line := scaling.remark(self.calibration, self.run):
            say(line)
        for finding, number in self.by_hand.items():
            chosen = self.calibration["findings"][finding].get("threshold")
            instead = "" if chosen is None else f", not at the run's @Rec of {chosen:.6g}"
            say(
                f"note: {finding} is decided at {number:g}, a threshold by hand{instead}: no recall is "
                "promised; calibrate.py --min-recall chooses one that keeps a floor"
            )
        if self.by_hand and self.triage:
            say("note: no column triage: it is for the run's own thresholds @Rec and @In")
        if self.site and not self.triage and self.task.triage(self.calibration["findings"]):
            say(
                f"note: no column triage: the run has @In, {self.site} has not; calibrate.py --site "
                "--min-specificity chooses it there"
            )

    def __call__(self, paths, *, batch_size=64, patients=None):
        """Score images -> list of dicts, one a file, in the order of predict.py. Keys: `columns`.

        `paths`: a file, folder or glob, text or Path, or several of them; `batch_size`: images a step;
        `patients`: a CSV path,patient, of a run calibrated by patient. Scores and typicality are floats,
        decisions are words, and what is not known is None: the scores of a file that cannot be read, say,
        whose `note` gives the reason.

        Each call is a batch of its own for `verdict` and `notes`. InputError for a path that does not exist,
        and where there is no image file."""
        if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
            raise InputError(f"batch_size {batch_size!r}: a whole number from 1 on")
        try:
            several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
            paths = list(map(os.fspath, several))
        except TypeError as error:
            raise InputError(f"paths {paths!r}: file names, folders or globs are read ({error})") from None
        self.batch, self.waiting, self.notes, search = shift.Batch(), [], Counter(), Search()
        files = find_files(paths, search)
        rows = [row for _, row in self.finished(self.rows(files, batch_size), patients)]
        if paths and not rows:
            raise InputError(f"no image files in {', '.join(map(str, paths))}: {search.nothing()}")
        if text := search.summary():
            say(f"note: {text}")
        if unreadable := self.notes["unreadable"]:
            say(f"note: {unreadable} of {len(rows)} files could not be read; their rows say why")
        return rows

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

    @property
    def called_at(self):
        """The threshold at which the model calls sick by its first finding: @Rec, of the run or its site, or
        one by hand."""
        first = next(decision for decision in self.decisions if decision.point in ("@Rec", BY_HAND))
        return 0.5 if first.threshold is None else first.threshold

    def called(self, scores):
        """Whom the model calls sick by its first finding, bool [N]: scores [N, F]."""
        return scores[:, 0] >= self.called_at

    def typicalities(self, files, scores, logits, features):
        """The typicality of every image, float [B], or None each without a reference; they join the batch, or
        those that wait for it."""
        if self.reference is None:
            return [None] * len(files)
        typicality, places = self.reference.place(features)
        names, patients = zip(*((file.name, file.patient) for file in files))
        images = zip(names, patients, typicality, places, logits, self.called(scores))
        if self.unit == "image":
            for image in images:
                self.batch.add(*image)
        else:
            self.waiting += images
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
        cells |= {self.column_of_unit(column): at for column, at in self.threshold_cells().items()}
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
        """Yield (File without its image, dict of `columns`) for every path, in order, and say every half
        minute how many there were; files that are not scored have None for scores and decisions. What is of
        the study or patient is not filled in: see `finished`."""
        paths, pace, count = iter(paths), Pace(), 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            names = list(itertools.islice(paths, batch_size))
            reading = pool.map(self.read, names)
            while names:
                files = list(reading)
                names = list(itertools.islice(paths, batch_size))
                reading = pool.map(self.read, names)  # the next batch is decoded while this one is scored
                yield from self.rows_of_batch(files)
                count += len(files)
                pace.count(count, "files")

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

    def finished(self, rows, table=None):
        """What `rows` gives, with the columns of studies or patients: these are known after the last file
        only, so that list of (File, row) is held in memory. By image the same iterator.

        `table`: a CSV path,patient, or None. InputError where a table is given, but not needed."""
        if table and self.unit != "patient":
            raise InputError(f"--patients: the thresholds of {self.run} are by {self.unit}, not by patient")
        if self.unit == "image":
            return rows
        rows = list(rows)
        names = [file.name for file, _ in rows]
        patients, studies = people_of([file for file, _ in rows], self.key)
        if table and rows:
            nothing = np.zeros(len(names), dtype=int)
            known = np.array([patient != name for patient, name in zip(patients, names)], dtype=bool)
            patients = read_patients(
                table, Index(names, nothing, patients, known, nothing.astype(str))
            ).patients
        whose = dict(zip(names, patients))
        for name, _, *values in self.waiting:
            self.batch.add(name, whose[name], *values)
        self.waiting = []
        if self.unit == "study" and not self.key_stays:
            say("note: no key in the run's cache folder: the names of studies are of this call only")
        columns = list(self.task.score_columns.values())
        fill_in([row for _, row in rows], patients, studies, self.calibration, columns, self.decisions)
        return rows
