"""The questions that the labels of a run answer, and what its backbone makes of the images."""

from dataclasses import dataclass

import numpy as np

from auditing.labels.errors import LEAST, find_errors, too_rare
from auditing.reader import Change
from auditing.side import say_unknown_patients, some_patients
from common.console import InputError, say
from common.task import is_healthy
from data import read_listing
from images import twins
from records.run import WITHOUT_CLASSES
from training.seen import forebears


@dataclass(frozen=True)
class Question:
    """A question that has one label an image. `finding`: what is asked of a table, "" where images are of
    classes; `classes`: the labels in words; `positions`: int64 [n], the images of a Subset that have a label;
    `y`: the labels, int [n]."""

    finding: str
    classes: tuple
    positions: np.ndarray
    y: np.ndarray


def questions(task, targets, finding=None):
    """The Questions of targets (see Task): one of classes, however many; one a finding of a table, or that of
    `finding` alone. InputError for a finding that the table has no labels of."""
    if finding is not None:
        task.chosen_finding(finding)  # InputError if there is none of this name
    if task.kind == "softmax":
        if finding is not None:
            say("note: --finding is not used for labels: an image is of one class, so all are asked together")
        known = np.flatnonzero(targets >= 0)
        return [Question("", task.classes, known, targets[known].astype(int))]
    if finding is not None and finding not in task.classes:
        raise InputError(f"the table has no labels of {finding}: --finding {task.classes[0]}, say")
    found = []
    for k, name in enumerate(task.classes):
        if finding in (None, name):
            known = np.flatnonzero(targets[:, k] >= 0)
            absent = "a finding" if is_healthy(name) else f"no {name}"
            found.append(Question(name, (absent, name), known, targets[known, k].astype(int)))
    return found


def askable(asked, subset, patients):
    """The Questions that a Subset's images can answer, patients [N]; what is left out is said. InputError if
    there is none."""
    found = []
    for question in asked:
        if len(question.y) < len(subset):
            missing = len(subset) - len(question.y)
            say(f"note: {missing} of {len(subset)} images have no label{of_finding(question)}: left out")
        question = without_rare(question, patients)
        if question is not None:
            found.append(question)
    if not found:
        raise InputError(
            f"no question has two classes of {LEAST} patients or more, so label errors cannot be found here"
        )
    return found


def answers(asked, features, patients):
    """[(Question, Errors)] of Questions, by features [N, D] and patients [N] of the Subset's images."""
    found = []
    for question in asked:
        at = question.positions
        errors = find_errors(features[at], question.y, patients[at], len(question.classes))
        found.append((question, errors))
    return found


def of_finding(question):
    """ " of FINDING", of a table; "" of classes."""
    if question.finding:
        return f" of {question.finding}"
    return ""


def without_rare(question, patients):
    """A Question without the classes of too few patients; None where fewer than two classes are left. What is
    left out is said."""
    rare = too_rare(question.y, patients[question.positions], len(question.classes))
    if not rare:
        return question
    kept = [k for k in range(len(question.classes)) if k not in rare]
    inside = np.isin(question.y, kept)
    counts = ", ".join(f"{question.classes[k]} ({number} patients)" for k, number in rare.items())
    if len(kept) < 2:
        say(f"note: not asked, since {LEAST} patients of a class are needed: {counts}")
        return None
    say(f"note: {int((~inside).sum())} images are left out, since {LEAST} patients are needed: {counts}")
    classes = tuple(question.classes[k] for k in kept)
    y = np.searchsorted(kept, question.y[inside])
    return Question(question.finding, classes, question.positions[inside], y)


def some_images(subset, most):
    """A Subset, or that of at most `most` images of random patients, which is said."""
    if most is None or len(subset) <= most:
        return subset
    sick = (subset.targets > 0).reshape(len(subset), -1).any(axis=1)
    some = some_patients(sick, np.asarray(subset.patients), most)
    say(
        f"note: {len(some)} of {len(subset)} images are asked about, whole patients at random (--most-images)"
    )
    return subset.take(some)


def patients_of(subset, config):
    """Who must stay together in a fold: the patient's name of each image of a Subset, [N]. Patients who share
    a file count as one, and copies with other labels are said."""
    content = twins.contents(read_listing(config).root, subset.files)
    twins.warn_of_labels(subset.files, content, subset.targets)
    say_unknown_patients(subset)
    return np.asarray(twins.joined(subset.patients, content))


def features_of(reader, subset, batch_size):
    """What the head of a Reader's model reads of each image: float32 [N, D]."""
    clean = Change(("clean", ""), np.arange(len(subset)))
    return reader.score(subset, [clean], batch_size)[1]


def say_limits(run, side):
    """Notes where a run's backbone was trained on the very labels that are asked about, and where it was
    trained on images that are not asked about."""
    if side == "train" and run.config.also:
        also = ", ".join(run.config.also)
        say(f"note: training images of other hospitals ({also}) are not asked about")
    if side == "train" and has_learnt(run):
        say(
            f"note: the backbone of {run} was trained on these labels, so it may hide their errors; a "
            "run of train_pretrained.py --epochs 0, whose backbone has seen no label, may find more"
        )


def has_learnt(run):
    """Whether labels have changed a Run's backbone, or that of a member of an ensemble."""
    if run.kind == "ensemble":
        members = [member for _, member in forebears(run)]
        return any(member is None or has_learnt(member) for member in members)
    if run.kind == "linear" or run.kind in WITHOUT_CLASSES:  # pixels; masked images
        return False
    return run.results["recipe"].get("epochs", 1) > 0
