"""Rows of the report: calibrated runs, named, and grouped by what can be compared. No torch."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from calibration.pooling import plural_of, title_of, unit_of, units_of
from cohort import who
from common import scaling
from common.cli import Number
from common.console import InputError, say
from common.files import sha256
from images.twins import PAIRS
from layouts.listing import taken
from metrics import check_both_classes, check_scores
from records.run import WITHOUT_CLASSES, find_runs
from records.schema import ADDED, NATURAL, REAL, mismatches

POINTS = {"at_rec": "@Rec", "at_0.5": "@0.5", "at_guaranteed": "@Guar", "at_in": "@In"}
ARCHITECTURES = {  # width, layers, heads, patch size: those of vit.CONFIGS, which needs torch
    "scratch": ("ViT scratch", (256, 6, 8, 16)),
    "ti16": ("ViT-Ti/16", (192, 12, 3, 16)),
    "s16": ("ViT-S/16", (384, 12, 6, 16)),
    "b16": ("ViT-B/16", (768, 12, 12, 16)),
    "b32": ("ViT-B/32", (768, 12, 12, 32)),
    "l16": ("ViT-L/16", (1024, 24, 16, 16)),
    "s14": ("DINOv2 ViT-S/14", (384, 12, 6, 14)),
    "b14": ("DINOv2 ViT-B/14", (768, 12, 12, 14)),
    "l14": ("DINOv2 ViT-L/14", (1024, 24, 16, 14)),
}
SIZE = Number(int, 1, 2**31)
SIZES = {k: SIZE for k in ("embed_dim", "depth", "num_heads", "patch_size")}
USUAL = ("scratch", "pretrained", "linear")  # folder names that say nothing new
# Settings of the data that name places: one place has many names, so what is there tells recipes apart.
PLACES = ("data_dir", "labels", "patients", "lungs", "also", "also_unlabelled", "cache_dir", "verify_cache")

# What the report shows of results.json and explain.json, beyond what run.Run has checked.
NEEDED = {
    "data": {"classes": [str], "img_size": NATURAL, "resize": str, "split": str, "split_seed": NATURAL},
    "split": {"shared_patients": NATURAL},
}
COPIES = {f"{a}_{b}": NATURAL for a, b in PAIRS}
OPTIONAL = {
    "init": {"minutes": Number(float, 0, 1e9)},
    "teacher": {"minutes": Number(float, 0, 1e9), "run": str, "model": str},
    "weights": {},
    "members": [{"run": str, "checkpoint": str}],
    "seed": NATURAL,
    "command": str,
    "device": str,
    "versions": {"torch": str},
}
SPAN = {k: REAL for k in ("mean", "lo", "hi")}
MAP_TESTS = {
    **{f"{k}_minus_random": SPAN for k in ("deletion", "insertion")},
    **{"border_share": SPAN, "border_area": REAL},
    "randomised": [{"rank_correlation": REAL}],
}
ON_LUNGS = {"lung_share": SPAN, "lung_area": REAL}  # where lungs were known on some image
METHODS = {"gradcam": "Grad-CAM", "rollout": "attention rollout"}


class Column(NamedTuple):
    """One side (validation or test), in the order of the file names: arrays [N], the last three [N, F]; of
    one finding (`Entry.column`) all are [N]. By study or patient, "images" are these (pooling.Units), each
    under the name of its first file.

    truth: int64, 0 or 1 (in [N, F] also -1, unknown); scores: float64 in [0, 1], what thresholds apply to;
    probabilities: float64, the same after the fitted scaling (scaling.fitted)."""

    files: np.ndarray
    patients: np.ndarray
    truth: np.ndarray
    scores: np.ndarray
    probabilities: np.ndarray

    def of(self, k):
        """The Column of finding number k: images of known truth."""
        known = self.truth[:, k] >= 0
        return Column(self.files[known], self.patients[known], *(v[known, k] for v in self[2:]))

    @property
    def patients_known(self):
        """Whether the patient of any image is known; one that is not stands under the name of its file."""
        return bool((self.files != self.patients).any())


class Entry:
    """A row of the report: one calibration of a run.

    `name`; `base`, the name it shares with the runs of its `family`, which differ from it in the seed alone;
    `group`, equal for entries on the same test images; `unit`, "images", or the "studies" or "patients" that
    thresholds and figures are for; `members`, the checkpoints of an ensemble. `findings`, their names;
    `columns` {side: Column of [N, F]}, `calibrated` {finding: what the calibration says of it}, `summary`
    {side: figures over all}; `cohort` {side: {name: array}}, what is known of patients and exposures, in the
    order of the columns; `people` {side: who.summary of its images}. InputError naming the run if
    damaged."""

    def __init__(self, run, suffix=""):
        self.run, self.suffix, self.results = run, suffix, run.results
        if run.kind in WITHOUT_CLASSES:
            raise InputError(f"{run} is of kind {run.kind!r}: it has no classes to score")
        check_results(run)
        self.calibration, self.task = run.calibration(suffix), run.task
        if "alike" in self.calibration and mismatches(self.calibration["alike"], COPIES):
            raise InputError(f"the calibration of {run} is damaged (alike): run calibrate.py again")
        self.findings = self.task.findings
        self.calibrated, self.summary = self.calibration["findings"], self.calibration["summary"]
        # What a threshold decides is recomputed from the scores, so these must be right.
        arrays = run.saved_scores(suffix, self.calibration)
        try:
            self.columns = {side: self._columns(arrays, side) for side in ("val", "test")}
            self.cohort = {side: self._cohort(arrays, side) for side in ("val", "test")}
            self.people = {side: self._people(arrays, side) for side in ("val", "test")}
        except InputError as error:
            raise InputError(f"the scores of {run} are damaged ({error}): run calibrate.py again") from None
        self.min_recall = self.calibration["min_recall"]
        self.members = [m["checkpoint"] for m in self.results.get("members", [])]
        self.minutes = run.minutes
        self.synthetic, self.set = self.results["synthetic"], set_name(self.results)
        self.unit, by = plural_of(self.calibration), title_of(self.calibration)
        if self.unit != "images":
            self.set += f", by {self.calibration['by']}"
        self.base, self.name = (name + by for name in names(run, suffix))
        test = self.columns["test"]
        self.group = sha256([self.task.classes, test.files.tolist(), test.truth.tolist(), self.unit])
        self.family = self._family()

    def column(self, finding, side):
        """The Column of a finding: arrays [N] of the images of known truth."""
        return self.columns[side].of(self.findings.index(finding))

    def row(self, finding, side, point):
        """The figures of a finding on a side at an operating point; None where there are none."""
        return self.calibrated[finding].get(side, {}).get(point)

    def absent(self, finding):
        """What an image without a finding is called."""
        if self.task.kind == "softmax" and self.task.alone:
            return self.task.classes[0]
        return f"no {finding.removeprefix('any ')}"

    def _columns(self, arrays, side):
        """The Column of "val" or "test", arrays [N, F]. InputError if scores or labels cannot be right."""
        files, patients, labels, logits = (
            arrays[f"{side}_{k}"] for k in ("files", "patients", "labels", "logits")
        )
        # Of a table, labels are a column a finding, -1 for unknown; else they are class numbers.
        outputs = self.task.outputs
        allowed, shape = range(outputs), (len(files),)
        if self.task.kind == "sigmoid":
            allowed, shape = (-1, 0, 1), (len(files), outputs)
        if logits.shape[1] != outputs or labels.shape != shape or not np.isin(labels, allowed).all():
            raise InputError(f"the {side} labels or logits are not those of {outputs} classes")
        # Older versions did not save the scores that thresholds apply to.
        scores = arrays.get(f"{side}_p1")
        truth = self.task.truth(labels).astype(np.int64)
        if scores is None:
            scores = self.task.scores_from(logits, self.calibration)
        elif scores.dtype.kind != "f":
            raise InputError(f"{side}_p1 holds no numbers")
        if scores.ndim == 1:  # of an only finding
            scores = scores[:, None]
        if scores.shape != truth.shape:
            raise InputError(f"{side}_p1 is {list(scores.shape)}, not {list(truth.shape)}")
        units = self._units(arrays, side)
        files, patients, truth = files[units.first], units.whose, units.truth(truth)
        scores = units.scores(scores)
        probabilities = units.scores(self.task.scaled_scores(logits, self.calibration))
        for k, name in enumerate(self.findings):
            known = truth[:, k] >= 0
            if known.any():
                check_scores(truth[known, k], scores[known, k])
            if side in self.calibrated[name]:
                check_both_classes(truth[known, k], f"{side} labels")
        # Runs list the same images in different orders; tests between them are paired.
        order = np.argsort(files, kind="stable")
        columns = files, patients, truth, scores, probabilities
        return Column(*(c[order] for c in columns))

    def _units(self, arrays, side):
        """What the images of a side are put together to (pooling.Units)."""
        return units_of(arrays, side, unit_of(self.calibration), self.calibration.get("pool", "max"))

    def _cohort(self, arrays, side):
        """{name: array} of what is known of patients and exposures, in the order of `columns`. InputError."""
        units, known = self._units(arrays, side), who.columns_of(arrays, side)
        if units.by != "image":
            known = who.of_units(known, units.numbers)
        return taken(known, np.argsort(arrays[f"{side}_files"][units.first], kind="stable"))

    def _people(self, arrays, side):
        """Who is on a side: who.summary of its images, with the prevalence of each finding."""
        files, patients = arrays[f"{side}_files"], arrays[f"{side}_patients"]
        truth = self.task.truth(arrays[f"{side}_labels"])
        found = who.summary(files, patients, who.columns_of(arrays, side))
        return found | {"findings": who.prevalences(self.findings, truth)}

    def _family(self):
        """A checksum of all that the runs of a family share: all but the seed; the rule knows the views.
        Files count by what is in them, wherever they are."""
        results, split = self.results, self.results["split"]
        settings = ADDED["recipe"] | results["recipe"] | {"seed": None, "test_views": None}
        data = {k: v for k, v in results["data"].items() if k not in PLACES}
        images = [self.set, split["fingerprint"], split.get("also")]
        weights = {k: v for k, v in results.get("weights", {}).items() if k != "path"}
        begun = [results["model"], results["model_config"], weights]
        for key in ("init", "teacher"):
            other = results.get(key)
            # Masked epochs of its own are part of the recipe, and others for every seed.
            begun.append(other and (other.get("own") or other.get("checkpoint")))
        rule = [self.calibration.get("tta"), self.min_recall, title_of(self.calibration)]
        rule += [scaling.applied(self.calibration), scaling.fitted(self.calibration)]
        rule += [self.calibration.get("min_specificity"), self.calibration["jointly"]]
        rule.append([f.get("guarantee", {}).get("confidence") for f in self.calibrated.values()])
        return sha256([begun, settings, data, images, rule])

    @property
    def explained(self):
        """The tests of explain.py on validation and on test, each by method, with its "target" and "split": a
        list of reports.

        InputError if damaged; tests of another checkpoint are left out with a note."""
        reports = {} if self.suffix else self.run.explained()
        return [report for report in reports.values() if self._is_explained(report)]

    def _is_explained(self, report):
        """Whether a report is of this checkpoint; InputError if it is damaged."""
        wrong = []
        for method in METHODS:
            if method in report:
                found = report[method]
                known = isinstance(found, dict) and "lung_share" in found
                wrong += mismatches(found, MAP_TESTS | (ON_LUNGS if known else {}), method)
        if not wrong:
            wrong = [method for method in METHODS if method in report and not report[method]["randomised"]]
        if wrong:
            raise InputError(f"the explain.json of {self.run} is damaged ({wrong[0]}): run explain.py again")
        if report.get("checkpoint") != self.calibration["checkpoint"]:
            say(f"note: the maps of {self.run} are of another checkpoint, so left out; run explain.py again")
            return False
        return True


def check_results(run):
    """InputError if the results.json of a Run lacks what the report shows of it, or has it wrong."""
    results = run.results
    wrong = mismatches(results, NEEDED)
    for key, spec in OPTIONAL.items():
        if key in results:
            wrong += mismatches(results[key], spec, key)
    if "copies" in results.get("split", {}):
        wrong += mismatches(results["split"]["copies"], COPIES, "split.copies")
    if wrong:
        raise InputError(f"{run}/results.json is damaged: missing or wrong {', '.join(wrong)[:300]}")


# ---------------------------------------------------------------- names


def set_name(results):
    """The name of the data, and how its test part was cut where none is published."""
    split, settings = results["split"], results["data"]
    if split.get("test_from", "published") == "published":
        return split["set"]
    name = f"{split['set']}, {settings['split']} split {settings['split_seed']}"
    if settings.get("undersample"):
        name += ", undersampled"
    return name


def architecture(model, config):
    """A readable name from results["model"] and model_config; where the two differ, the config is right."""
    if config["kind"] == "linear" and SIZE.contains(config.get("side")):
        return "Logistic regression {0}x{0} px".format(config["side"])
    plain = re.sub(r"-reg\d+$", "", model)
    named = plain in ARCHITECTURES or re.fullmatch(r"vit-d\d+-l\d+-h\d+-p\d+(-m[\d.e+-]+)?", plain)
    if not named or config["kind"] != "vit" or mismatches(config, SIZES):
        return model
    shape, ratio = tuple(config[k] for k in SIZES), config.get("mlp_ratio", 4)
    # A known shape has a name. The one of our own is not looked for among the published ones.
    for key, (name, known) in ARCHITECTURES.items():
        if (key == "scratch") == (model == "scratch") and shape == known and ratio == 4:
            if config.get("reg_tokens"):
                name += f", {config['reg_tokens']} registers"
            return name
    width, layers, _, patch = shape
    word = "ViT scratch" if model == "scratch" else "ViT"
    name = f"{word} {width}x{layers}, patch {patch}"
    if ratio != 4:
        name += f", MLP ratio {ratio}"
    return name


def names(run, suffix):
    """(the name shared by all seeds, the name of this run)."""
    results, folder = run.results, Path(os.path.abspath(run.folder)).name
    name = architecture(results["model"], results["model_config"])
    if members := results.get("members"):
        name = ensemble_name(members, results["model_config"])
    # What was done to the model, in the order in which it was done.
    if "weights" in results:
        name += " pretrained"
    if "init" in results:
        name += ", masked pretraining"
    if "teacher" in results:
        name += ", taught"
    if run.input_modes != ["full"]:
        name += f", {' and '.join(run.input_modes)}"
    others = also_trained_on(results)
    if others:
        name += f", also on {', '.join(others)}"
    # The folder tells runs of one recipe apart; the folders of the seeds are one family.
    end = ""
    if suffix:
        end += " + TTA"
    if results["synthetic"]:
        end += " [SYNTHETIC]"
    stem = re.sub(r"(-demo)?(-seed\d+)?$", "", folder)
    of_family = "" if stem in USUAL else f" ({stem})"
    of_run = "" if folder.removesuffix("-demo") in USUAL else f" ({folder})"
    return f"{name}{of_family}{end}", f"{name}{of_run}{end}"


def also_trained_on(results):
    """{name: number of images} of other hospitals that joined training."""
    others = results["split"].get("also")
    if not isinstance(others, dict):
        return {}
    return {n: o["train"] for n, o in others.items() if not mismatches(o, {"train": NATURAL})}


def ensemble_name(members, config):
    """ "ViT scratch, ensemble of 2", or "Ensemble of 3 models" if they are not all of one architecture."""
    configs = config.get("members")
    if isinstance(configs, list) and not mismatches(configs, [{"kind": str}]):
        named = {architecture(str(m.get("model", "ti16")), c) for m, c in zip(members, configs)}
        if len(named) == 1:
            return f"{named.pop()}, ensemble of {len(members)}"
    return f"Ensemble of {len(members)} models"


# ---------------------------------------------------------------- which belong together


def load_entries(runs_dir, chosen=None):
    """Entries of all calibrated runs, as lists of those on the same test images; InputError if there is none.

    Runs without a calibration are left out with a note; if chosen by name, that is an InputError."""
    groups, waiting = {}, []
    # Only figures on the same test images are comparable, so each test set is a group.
    for run in find_runs(runs_dir, chosen):
        if not run.calibrated() and run.kind not in WITHOUT_CLASSES:
            waiting.append(str(run))
            continue
        for suffix in run.calibrated() or [""]:
            entry = Entry(run, suffix)
            groups.setdefault(entry.group, []).append(entry)
    if waiting and groups and not chosen:
        say(f"note: not calibrated, so left out: {', '.join(waiting)}; run python calibrate.py")
    elif waiting:
        raise InputError(f"not calibrated: {', '.join(waiting)}; run python calibrate.py first")
    for entries in groups.values():
        tell_apart(entries)
    return list(groups.values())


def tell_apart(entries):
    """Add to the names of Entries what they are confused without: their folder, their recall floor, whether
    their guarantees hold at once."""
    names_in_group = [entry.name for entry in entries]
    for entry in entries:
        if names_in_group.count(entry.name) > 1:  # folders of one name in several places
            entry.name += f" in {entry.run.folder.parent}"
    rules = (lambda e: f"floor {e.min_recall:g}", lambda e: "jointly" if e.calibration["jointly"] else "")
    for rule in rules:  # not to be compared at their thresholds
        if len({rule(entry) for entry in entries}) > 1:
            for entry in entries:
                text = f" ({rule(entry)})" if rule(entry) else ""
                entry.name, entry.base = entry.name + text, entry.base + text


def families(entries):
    """Lists of two or more entries that differ in the seed alone; a seed trained twice counts once."""
    by_seed = {}
    for entry in entries:
        if not entry.members:
            by_seed.setdefault(entry.family, {}).setdefault(entry.results.get("seed"), entry)
    return [list(seeds.values()) for seeds in by_seed.values() if len(seeds) > 1]


def without_members(entries):
    """The entries that are not part of an ensemble among them, for tables and plots that would be crowded."""
    members = set()
    for entry in entries:
        members |= {(entry.suffix, checkpoint) for checkpoint in entry.members}
    return [e for e in entries if (e.suffix, e.calibration["checkpoint"]) not in members]
