"""A run folder on disk: everything that is known of one trained model. Nothing else knows its file names.

results.json                               settings, data, history
checkpoint.pth                             weights of the best epoch, tensors only
last.pth                                   what --resume needs
scores[-tta].npz, calibration[-tta].json   left by calibrate.py
predictions[-tta].csv                      left by calibrate.py: scores and decisions for spreadsheets
reference[-tta].npz                        left by calibrate.py: what new images are held against
batches/, sites/, monitor/                 left by predict.py --keep, calibrate.py --site, monitor.py
audit.json, audit-SIDE-*                   left by audit.py: pictures, and the list of labels
explain/, explain/val/, explain/test/      left by explain.py
training.lock                              there while the run is trained, see lock.py
masked/                                    the run of train_scratch.py --masked-epochs, its first stage
track.json, tensorboard/                   left by --track

What a file says is checked here, once, before anything is built from it. Reports read runs without torch, so
torch is imported only by the methods that need it.
"""

import os
import re
from functools import cached_property
from pathlib import Path

import numpy as np

from common import scaling
from common.console import InputError, say
from common.files import (
    CALIBRATION,
    FORMAT,
    atomic_path,
    check_format,
    check_regular,
    read_json,
    remove,
    sha256,
    write_json,
)
from common.scripts import there_is
from common.task import Task
from records import lock
from records.schema import (
    BATCH,
    in_present_form,
    mismatches,
    without_gone,
    wrong_calibration,
    wrong_results,
    wrong_site,
)
from records.scores import read_scores, with_findings

WITHOUT_CLASSES = ("mae", "lungs")  # kinds of models that are trained for others: no score, no threshold
# What belongs to the scores, and what to the weights. A name with * stands for all that fit.
OF_SCORES = ("scores.npz", "calibration.json", "reference.npz", "predictions.csv", "sites/*.json")
OF_SCORES += ("scores-tta.npz", "calibration-tta.json", "reference-tta.npz", "predictions-tta.csv")
OF_WEIGHTS = ("checkpoint.pth", "last.pth", "results.json", "track.json", "audit.json", "audit-*")
OF_WEIGHTS += ("tensorboard/events.out.tfevents.*",)


class Run:
    """One run folder. Nothing is read before it is asked for; whatever is damaged is an InputError naming the
    file."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if "\0" in str(folder):
            raise InputError(f"{str(folder)!r} is not a usable folder name")

    def __str__(self):
        return str(self.folder)

    @property
    def masked(self):
        """The Run of its first stage, where it is one of train_scratch.py --masked-epochs."""
        return Run(self.folder / "masked")

    # ------------------------------------------------------------ results.json

    @property
    def begun(self):
        """Whether a run was begun here."""
        return (self.folder / "results.json").exists()

    @cached_property
    def results(self):
        """results.json, checked. InputError if absent, damaged, incomplete, or of a newer format."""
        path = self.folder / "results.json"
        if not path.exists():
            lock.refuse_held(self, "nothing is there yet")
            if self.masked.begun:
                raise InputError(f"{self} has only its masked epochs so far: {self.masked.to_finish}")
            raise InputError(f"{path} does not exist{there_is(self.folder)}")
        results = read_json(path)
        check_format(results, path)
        if wrong := wrong_results(results):
            listed = ", ".join(dict.fromkeys(wrong))
            raise InputError(
                f"{path} is damaged or was not written by a training script: missing or wrong {listed[:300]}"
            )
        return without_gone(results)

    def why_unfinished(self):
        """Why a run that is not finished is not, and what to do, as text."""
        if who := lock.holder(self.folder):
            return f"{self} is being trained by {who}: wait until it has ended"
        return f"{self} is not finished: {self.to_finish}"

    @property
    def kind(self):
        """ "vit", "linear", "ensemble", or one of WITHOUT_CLASSES."""
        return self.results["model_config"]["kind"]

    @property
    def input_modes(self):
        """What of an image the model is shown: lungs.INPUT_MODES, sorted; several only of an ensemble
        whose members differ in it."""
        given = self.results["model_config"].get("looks")
        members = given if isinstance(given, list) else []
        return sorted(set(map(str, members))) or [str(self.results["data"].get("input", "full"))]

    @property
    def minutes(self):
        """Of training, its own masked epochs among it, of other pretraining and of its teacher's."""
        parts = (self.results.get(k, {}) for k in ("init", "teacher"))
        return self.results["minutes"] + sum(p.get("minutes", 0) for p in parts if not p.get("own"))

    @cached_property
    def config(self):
        """The DataConfig of the run."""
        from data import DataConfig

        return DataConfig.from_json(self.results["data"], self)

    @cached_property
    def task(self):
        """What the run was trained to answer."""
        settings = self.results["data"]
        if wrong := mismatches(settings, {"classes": [str]}):
            raise InputError(f"{self.folder / 'results.json'} is damaged: missing or wrong data.{wrong[0]}")
        kind = "sigmoid" if settings.get("labels") else "softmax"
        try:
            return Task(tuple(settings["classes"]), kind)
        except InputError as error:
            raise InputError(f"{self.folder / 'results.json'} is damaged: {error}") from None

    # ------------------------------------------------------------ the model

    @property
    def checkpoint(self):
        return self.folder / "checkpoint.pth"

    @property
    def checkpoint_sha256(self):
        """What a calibration belongs to. InputError if there is no checkpoint."""
        self.check_checkpoint()
        return sha256(self.checkpoint)

    def check_checkpoint(self):
        """InputError if there is no checkpoint: its training has not come so far, or the file is gone."""
        if self.checkpoint.exists():
            return
        lock.refuse_held(self, "wait until it has ended")
        if not self.results["finished"]:  # InputError if no run is here
            raise InputError(f"{self} was interrupted before it had a checkpoint: {self.to_finish}")
        raise InputError(f"{self.checkpoint} does not exist: train the model again, or copy the file back")

    @property
    def to_finish(self):
        """How to go on with an interrupted run, in words: the command that began it, with --resume."""
        command = str(self.results.get("command", "the command that began it"))
        command = re.sub(r" --(resume|overwrite)(?= |$)", "", command)
        if (self.folder / "last.pth").exists() or self.masked.begun:
            return f"continue it with {command} --resume"
        return f"nothing to go on from was saved; start it again with {command} --overwrite"

    def model(self):
        """The model with the weights of the best epoch, in eval mode on the CPU (weights.py)."""
        from records.weights import model_of

        self.check_checkpoint()
        return model_of(self.results, self.folder / "results.json", self.checkpoint)

    def save_results(self, results):
        """Write results.json."""
        write_json(self.folder / "results.json", results)
        self.__dict__.pop("results", None)

    def save_model(self, model):
        """Write checkpoint.pth: the model's state dict, on the CPU."""
        from records.weights import save_tensors

        weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
        save_tensors(self.checkpoint, weights)

    def save_last(self, value):
        """Write last.pth: tensors and plain Python values."""
        from records.weights import save_tensors

        save_tensors(self.folder / "last.pth", {"format": FORMAT, **value})

    def load_last(self):
        """The content of last.pth. InputError if absent, damaged or of another format."""
        from common.safe_files import load_tensors

        path = self.folder / "last.pth"
        if not path.exists():
            raise InputError(f"--resume: there is no {path} to continue from; start without --resume")
        last = load_tensors(path)
        if last.get("format") != FORMAT:
            raise InputError(f"{path} has format {last.get('format')}, this version reads {FORMAT}")
        needed = {"meta": dict, "model": dict, "optimizer": dict, "state": dict, "rng": list}
        if wrong := mismatches(last, needed):
            raise InputError(f"{path} is damaged: missing or wrong {', '.join(wrong)}")
        return last

    def clear(self, *, weights, folder=False):
        """Remove what belongs to earlier weights: scores and calibrations; with `weights` the model itself
        too, with `folder` the folder if that was all in it."""
        remove(self.folder, (*OF_SCORES, *(OF_WEIGHTS if weights else ())), folder)
        self.__dict__.pop("results", None)

    # ------------------------------------------------------------ scores and calibration

    def calibrated(self):
        """The names of the calibrations that are there: "" and "tta"."""
        return [n for n in ("", "tta") if (self.folder / f"calibration{_dash(n)}.json").exists()]

    def calibration(self, name=""):
        """calibration.json (or that of test-time augmentation, "tta"), checked, in the present form: what it
        says of each finding is under "findings", by name, in the order of the columns.
        InputError if absent, newer, damaged, or made for another checkpoint or other views."""
        path = self.folder / f"calibration{_dash(name)}.json"
        if not path.exists():
            lock.refuse_held(self, "calibrate it when that has ended")
            flag = " --tta" if name == "tta" else ""
            raise InputError(f"{self} is not calibrated: run python calibrate.py{flag} first")
        calibration = read_json(path)
        check_format(calibration, path, CALIBRATION)
        calibration = in_present_form(calibration, self.task)
        if wrong := wrong_calibration(calibration, self.task):
            raise InputError(f"{path} is damaged ({', '.join(wrong)[:200]}): run calibrate.py again")
        if calibration["checkpoint"] != self.checkpoint_sha256:
            raise InputError(f"{path} was made for another checkpoint: run calibrate.py again")
        scaling.check_views(calibration, path, self, name)
        return calibration

    def save_calibration(self, calibration, scores, name=""):
        """Write the scores [arrays by name], and calibration.json with their checksum."""
        path = self.folder / f"scores{_dash(name)}.npz"
        with atomic_path(path) as tmp, open(tmp, "wb") as f:
            np.savez(f, **scores)
        made_from = {"scores_sha256": sha256(path)}
        write_json(self.folder / f"calibration{_dash(name)}.json", calibration | made_from)

    def saved_scores(self, name="", calibration=None):
        """The arrays of scores.npz as calibrate.py left them. InputError as of scores.read_scores."""
        return read_scores(self.folder / f"scores{_dash(name)}.npz", calibration)

    def scores(self, name=""):
        """What calibrate.py knows of each validation and test image: {name: array}, N images, F findings.

        findings                         str [F], the names of the columns
        val_files, val_patients          str [N]; a patient who is not known has the name of the file
        val_truth                        int8 [N, F]: 1 present, 0 absent, -1 unknown
        val_scores                       float64 [N, F] in [0, 1]: what the thresholds apply to
        val_logits, val_labels           float32 [N, K], int [N] or [N, K]: of the K classes
        val_cohort_age, ...              [N]: what is known of patients and exposures

        and the same of test. `name`: "tta" for those of --tta. InputError if not calibrated, or damaged."""
        calibration = self.calibration(name)
        return with_findings(self.saved_scores(name, calibration), self, self.task, calibration)

    def save_reference(self, arrays, name=""):
        """Write reference.npz: the arrays of shift.learn and their key."""
        with atomic_path(self.reference_file(name)) as tmp, open(tmp, "wb") as f:
            np.savez(f, **arrays)

    def reference_file(self, name=""):
        """Where the arrays of shift.learn are kept."""
        return self.folder / f"reference{_dash(name)}.npz"

    def predictions_file(self, name=""):
        """Where calibrate.py writes scores and decisions for spreadsheets."""
        return self.folder / f"predictions{_dash(name)}.csv"

    def save_site(self, site, thresholds, name=""):
        """Write sites/SITE.json: thresholds for another hospital."""
        write_json(self.folder / "sites" / f"{site}{_dash(name)}.json", {"format": FORMAT, **thresholds})

    def site(self, site, name=""):
        """sites/SITE.json, checked. InputError if absent, damaged, or made for another checkpoint."""
        path = self.folder / "sites" / f"{site}{_dash(name)}.json"
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "none"
            views = " --tta" if name else ""
            raise InputError(
                f"{self} has no thresholds for the site {site!r} (there is {known}): make them with "
                f"calibrate.py --site DIR --name {site!r}{views}"
            )
        thresholds = read_json(path)
        check_format(thresholds, path)
        if wrong := wrong_site(thresholds, self.task.findings):
            raise InputError(f"{path} is damaged ({', '.join(wrong)[:200]}): run calibrate.py --site again")
        if thresholds["checkpoint"] != self.checkpoint_sha256:
            raise InputError(f"{path} was made for another checkpoint: run calibrate.py --site again")
        scaling.check_site(thresholds, path, self.calibration(name), self)
        return thresholds

    def save_batch(self, name, verdict):
        """Write batches/NAME.json."""
        write_json(self.folder / "batches" / f"{name}.json", {"format": FORMAT, **verdict})

    def batches(self):
        """{name: verdict} of batches/. InputError if one is damaged."""
        verdicts = {}
        for path in sorted(self.folder.glob("batches/*.json")):
            verdicts[path.stem] = read_json(path)
            if wrong := mismatches(verdicts[path.stem], BATCH):
                raise InputError(f"{path} is damaged: missing or wrong {', '.join(wrong)[:200]}")
        return verdicts

    def tracked(self):
        """{tracker: by what name it knows this run}, of track.json; empty if there is none."""
        references = read_json(path) if (path := self.folder / "track.json").exists() else {}
        if mismatches(references, dict.fromkeys(references, str)):
            raise InputError(f"{path} is damaged: delete it")
        return references

    def save_tracked(self, references):
        """Write track.json."""
        write_json(self.folder / "track.json", references)

    def explained_folder(self, split=""):
        """Where explain.py writes: of "val" or "test", else of image files."""
        return self.folder / "explain" / split

    def explained(self):
        """{"val" or "test": explain.json of explain.py}. Older versions had one for both, in explain/; it
        stands for its split until that is explained again."""
        paths = [self.explained_folder(split) / "explain.json" for split in ("", "val", "test")]
        old, *new = [read_json(path) if path.exists() else None for path in paths]
        reports = {} if old is None else {"test" if old.get("split") == "test" else "val": old}
        return reports | {split: report for split, report in zip(("val", "test"), new) if report is not None}


def _dash(name):
    return f"-{name}" if name else ""


def _say_begun(runs_dir):
    """Notes on the runs that are being trained, or have no more than masked epochs."""
    for run in map(Run, sorted(Path(runs_dir).glob("*"))):
        if who := lock.holder(run):
            say(f"note: {run} is being trained by {who}, passed over")
        elif run.masked.begun and not run.begun:
            say(f"note: {run} has only its masked epochs so far, passed over")


def find_runs(runs_dir, chosen=None):
    """Runs: those in the folders `chosen`, else every finished run directly under `runs_dir`, sorted.

    Unfinished and damaged runs are passed over with a note, unless chosen; so are those that are being
    trained, which cannot be chosen. InputError if there is none.
    """
    if chosen:
        runs = [Run(f) for f in dict.fromkeys(Path(os.path.normpath(f)) for f in chosen)]
        for run in runs:
            lock.refuse_held(run, "wait until it has ended")
            if run.begun and not run.results["finished"]:
                run.check_checkpoint()
        return runs
    runs, damaged = [], []
    _say_begun(runs_dir)
    for path in sorted(Path(runs_dir).glob("*/results.json")):
        run = Run(path.parent)
        try:
            check_regular(path)
            passed_over = run.kind in WITHOUT_CLASSES or lock.holder(run)
        except InputError as error:
            damaged.append(error)
            continue
        if passed_over:
            continue
        if run.results["finished"]:
            runs.append(run)
        else:
            usable = " (name it with --run to use it all the same)" if run.checkpoint.exists() else ""
            say(f"note: {run} is not finished, passed over{usable}; {run.to_finish}")
    if damaged and not runs:
        raise damaged[0]
    for error in damaged:
        say(f"note: passed over: {error}")
    if not runs:
        raise InputError(
            f"no finished runs under {runs_dir}: train one first, "
            "for instance python train_scratch.py --epochs 15"
        )
    return runs
