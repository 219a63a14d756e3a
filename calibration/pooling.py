"""One score for all images of a study or a patient: which images belong together, and how their scores and
labels become one. Whoever decides or reports by study takes it from here. No torch, no files.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from common.console import InputError, say
from common.scaling import SIDES

BY = ("image", "study", "patient")  # the first one unless asked
POOLS = ("max", "mean")
PLURAL = {"image": "images", "study": "studies", "patient": "patients"}


@dataclass(frozen=True)
class Units:
    """The images of one side, put together by image, study or patient.

    `by`: of BY; `pool`: of POOLS, how scores become one; `numbers`: int64 [N], the unit of each image, in the
    order in which units appear; `patients`: [N]; `alone`: images whose study or patient is not known, each a
    unit of its own; `shared`: studies that name several patients, of which each is a unit."""

    by: str
    pool: str
    numbers: np.ndarray
    patients: np.ndarray
    alone: int = 0
    shared: int = 0

    def __len__(self):
        """How many units M there are."""
        return len(self.first)

    @property
    def plural(self):
        """What several of them are called."""
        return PLURAL[self.by]

    @cached_property
    def first(self):
        """int64 [M]: the position of the first image of each unit."""
        return np.unique(self.numbers, return_index=True)[1]

    @property
    def whose(self):
        """[M]: the patient of each unit."""
        return self.patients[self.first]

    def scores(self, values):
        """Scores float64 [N] or [N, F] -> [M] or [M, F]: the highest of a unit's images, or their mean."""
        if self.by == "image":
            return values
        if self.pool == "max":
            return self._reduced(np.maximum, values)
        counts = np.bincount(self.numbers).reshape(-1, *[1] * (np.ndim(values) - 1))
        return self._reduced(np.add, values) / counts

    def truth(self, values):
        """Truth [N] or [N, F] of 1, 0 and -1 (unknown) -> [M] or [M, F]: 1 where any image of the unit has
        the finding, -1 where nothing is known of any."""
        if self.by == "image":
            return values
        return self._reduced(np.maximum, values)

    def classes(self, labels):
        """Class numbers int64 [N] -> int64 [M]: the class of all images of a unit, -1 where they are of
        several or of an unknown one."""
        if self.by == "image":
            return labels
        least, most = self._reduced(np.minimum, labels), self._reduced(np.maximum, labels)
        return np.where(least == most, most, -1)

    def differing(self, truth):
        """Truth [N, F] -> int [F]: how many units have images that are labelled 1 and images labelled 0."""
        highest = self._reduced(np.maximum, truth)
        lowest = self._reduced(np.minimum, np.where(truth < 0, 2, truth))
        return ((highest == 1) & (lowest == 0)).sum(axis=0)

    def of_images(self, values):
        """What is known of units, [M] or [M, F], for each of their images: [N] or [N, F]."""
        return values[self.numbers]

    def _reduced(self, operation, values):
        """A NumPy ufunc over the images of each unit: [N, ...] -> [M, ...]."""
        order = np.argsort(self.numbers, kind="stable")
        starts = np.searchsorted(self.numbers[order], np.arange(len(self)))
        return operation.reduceat(np.asarray(values)[order], starts, axis=0)


# ---------------------------------------------------------------- which images belong together


def units_of(arrays, side, by="image", pool="max"):
    """The Units of a side: `arrays` as in scores.npz, {SIDE_files, SIDE_patients: [N]} and, where studies are
    known, SIDE_cohort_study.

    InputError where `by` asks for studies or patients and none is known."""
    files, patients = arrays[f"{side}_files"], arrays[f"{side}_patients"]
    studies = arrays.get(f"{side}_cohort_study")
    if studies is not None and studies.shape != files.shape:
        raise InputError(f"there are {len(files)} {side} images, but {len(studies)} studies")
    return grouped(files, patients, studies, by, pool)


def grouped(files, patients, studies, by="image", pool="max", strict=True):
    """The Units of images: files, patients [N] (the name of the file where not known), studies [N] ("" where
    not known) or None. InputError as `units_of`; unless `strict`, every image is then a unit of its own."""
    files, patients = np.asarray(files), np.asarray(patients)
    if by == "image":
        return Units(by, pool, np.arange(len(files)), patients)
    known_patients = patients != files
    if by == "patient":
        if strict and not known_patients.any():
            raise InputError(
                "--by patient: no image's patient is known; --patients CSV names them (path,patient)"
            )
        return Units(by, pool, _numbered(patients.tolist()), patients, int((~known_patients).sum()))
    known = np.zeros(len(files), bool) if studies is None else np.asarray(studies) != ""
    if strict and not known.any():
        raise InputError(
            "--by study: no image's study is known: DICOM files tell it (StudyInstanceUID), and tables that "
            "have studies; file names and class folders do not. --by patient needs patients only"
        )
    if not known.any():
        return Units(by, pool, np.arange(len(files)), patients, len(files))
    names, shared, owners = _study_names(files, patients, studies, known, known_patients)
    # The patient of a study whose first image names nobody.
    pairs = zip(patients, studies, known_patients)
    patients = np.array([who if tells else owners.get(study, who) for who, study, tells in pairs], dtype=str)
    return Units(by, pool, _numbered(names), patients, int((~known).sum()), shared)


def _study_names(files, patients, studies, known, known_patients):
    """(a name for the study of each image, list [N]; how many studies name several patients; {study: patient}
    of those that name one).

    A study is of one person, so one that names several is taken as one study for each of them. An image whose
    study is not known stands alone, under the name of its file."""
    patients_of = {}
    for study, patient in zip(studies[known & known_patients], patients[known & known_patients]):
        patients_of.setdefault(study, set()).add(patient)
    shared = {study for study, found in patients_of.items() if len(found) > 1}
    names = []
    for i, study in enumerate(studies):
        if not known[i]:
            names.append(("image", files[i]))
        elif study in shared:
            names.append(("study", study, patients[i]))
        else:
            names.append(("study", study))
    owners = {study: next(iter(found)) for study, found in patients_of.items() if len(found) == 1}
    return names, len(shared), owners


def _numbered(names):
    """Names [N] -> int64 [N]: the number of each, in the order in which they first appear."""
    numbers = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def of_calibration(rule, calibration, run, asked):
    """The Rule with the unit of a calibration: a site takes over the scores and thresholds of the run.

    `asked`: (--by, --pool) of the command line, None where not given. InputError if these are others."""
    by, pool = unit_of(calibration), calibration.get("pool", "max")
    if (asked[0] or by, asked[1] or pool) != (by, pool):
        raise InputError(
            f"--by, --pool: with --site they are those of the run, and {run} was calibrated by {by} "
            f"({pool}): leave them out, or calibrate the run with them first"
        )
    return replace(rule, by=by, pool=pool)


def spread_over_images(scores, p1, rule, task):
    """What is known of the study or patient of every image: {side: (truth [N, F], scores [N, F])}; None by
    image. `scores`: the arrays of scores.npz; `p1`: {side: scores [N] or [N, F] that thresholds apply to}."""
    if rule.by == "image":
        return None
    found = {}
    for side in SIDES:
        units, truth = units_of(scores, side, rule.by, rule.pool), task.truth(scores[f"{side}_labels"])
        pooled = units.truth(truth), units.scores(np.reshape(p1[side], truth.shape))
        found[side] = tuple(map(units.of_images, pooled))
    return found


def columns_of(unit, columns):
    """What columns of scores and decisions are called where they are those of a study or patient."""
    return [f"{unit}_{column}" for column in columns]


def fill_in(rows, patients, studies, calibration, columns, decisions):
    """Fill in what is known of the study or patient of each row of predict.py, and say how many there are.

    `rows`: dicts with "path" and scores by column, None where an image was not scored; `patients` [N]: the
    path where not known; `studies` [N]: "" where not known; `columns`: names of the scores; `decisions`: list
    of task.Decision. An image whose study is not known stands alone."""
    by, pool = calibration["by"], calibration["pool"]
    scored = np.flatnonzero([row[columns[0]] is not None for row in rows])
    if not scored.size:
        return
    paths, patients, studies = (
        np.array(values, dtype=str)[scored] for values in ([row["path"] for row in rows], patients, studies)
    )
    units = grouped(paths, patients, studies, by, pool, strict=False)
    scores = np.array([[rows[i][column] for column in columns] for i in scored])
    names = studies if by == "study" else np.where(patients == paths, "", patients)
    for i, name, pooled in zip(scored, names.tolist(), units.of_images(units.scores(scores))):
        rows[i][by] = name
        rows[i] |= zip(columns_of(by, columns), pooled.tolist())
        decided = [decision.answer(pooled) for decision in decisions]
        rows[i] |= zip(columns_of(by, [decision.column for decision in decisions]), decided)
    say(remark(f"by {by} ({pool})", units))


# ---------------------------------------------------------------- in words


def unit_of(calibration):
    """What the thresholds of a calibration decide on: "image", "study" or "patient"."""
    return calibration.get("by", "image")


def plural_of(calibration):
    """What several of those are called."""
    return PLURAL[unit_of(calibration)]


def say_not_of_images(run, calibration):
    """A note where the thresholds of a Run's calibration are not for images, but applied to them here."""
    if unit_of(calibration) != "image":
        say(f"note: the threshold of {run} is for {plural_of(calibration)}; here it is for images")


def title_of(calibration):
    """What is added to the name of a run that is not judged by image: ", by study (mean)"; else ""."""
    if unit_of(calibration) == "image":
        return ""
    return f", by {calibration['by']} ({calibration['pool']})"


def remark(side, units, truth=None, findings=()):
    """A line on the Units of a side: how many there are, which images stand alone, and which units are
    labelled differently. `truth` [N, F], if it is known; `findings`: F names."""
    line = f"{SIDES.get(side, side)}: {len(units.numbers)} images are {len(units)} {units.plural}"
    if units.alone:
        line += f"; {units.alone} images whose {units.by} is not known stand alone"
    if units.shared:
        line += f"; {units.shared} studies name several patients: each patient's images count as one study"
    named, differing = [], [] if truth is None else units.differing(truth)
    for name, count in zip(findings, differing):
        if count:
            named.append(f"{name} {count}")
    if named:
        line += (
            f"; {units.plural} whose images are labelled differently count as positive: {', '.join(named)}"
        )
    return line


def remarks(scores, rule, task):
    """`remark` of validation and of test, as lines; none by image."""
    if rule.by == "image":
        return []
    lines = []
    for side in SIDES:
        units = units_of(scores, side, rule.by, rule.pool)
        lines.append(remark(side, units, task.truth(scores[f"{side}_labels"]), task.findings))
    return lines


def say_scaling(rule):
    """A note where scaled scores are pooled: the scaling is fitted to images."""
    if rule.by != "image" and (rule.temperature or rule.platt):
        say(
            f"note: --temperature is fitted to images; the {rule.pool} over the images of a {rule.by} is "
            "taken after it, which need not be a probability: see ECE"
        )
