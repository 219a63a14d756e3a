"""The scores of runs on validation and test, one run after the other.

What a run has scored before is taken from its folder while model, images, labels and patients are unchanged.
"""

import os
import zlib

import numpy as np

from calibration import shares, shift
from common import scaling
from common.console import InputError, say
from common.files import sha256
from common.scaling import SIDES
from images.subset import pixel_fingerprint
from models.inputs import Inputs
from records.run import find_runs
from training.evaluate import predict


def each_run(runs_dir, chosen, read):
    """Yield (Run, read(Run)) for the run folders `chosen`, else for every finished run under `runs_dir`.

    `read` does the work on a run that may fail for it alone. Where it raises InputError, or the folder may
    not be opened, the run is passed over with a note. InputError at the end if a chosen run was passed over,
    or if all were. The error of an only run is raised as it is."""
    if chosen:
        folders = list(dict.fromkeys(map(os.path.normpath, chosen)))
    else:
        folders = find_runs(runs_dir)
    passed_over = []
    for folder in map(str, folders):
        try:
            (run,) = find_runs(None, [folder])  # one at a time, so that its error is its own
            value = read(run)
        except (InputError, PermissionError) as error:
            if len(folders) == 1:
                raise
            passed_over.append(folder)
            say(f"note: {folder} is passed over: {str(error).removeprefix(f'{folder}: ')}")
            continue
        yield run, value
    if passed_over and (chosen or len(passed_over) == len(folders)):
        raise InputError(
            f"{len(passed_over)} of {len(folders)} runs were passed over: {', '.join(passed_over)}; the "
            "notes above say why"
        )


def score(run, sets, *, device, batch_size, tta=None):
    """{val,test}_{files,patients,labels,logits} of a run, from disk if checkpoint and data are unchanged, and
    `cohort_arrays`.

    Sets: training, validation, test. Where it is missing, what new images are held against (shift.py) is
    written too. `tta`: {"flip": bool} for test-time augmentation; None: the views that the run has itself."""
    train, *sides = sets
    inputs, views = Inputs.of_run(run.results, device, tta), tta or scaling.own_views(run.results)
    # The distance from training is learnt from a fixed draw: all images would take long and tell no more.
    drawn = np.random.default_rng(0).permutation(len(train))[: shift.TRAINING]
    sample = train.take(np.sort(drawn))

    # What was scored before is kept. The model is loaded all the same: a damaged run is not calibrated.
    scores_key, reference_key = keys(run, inputs, sides, sample, views)
    name, model = scaling.calibration_name(tta, run), run.model()
    scores, learnt = kept_scores(run, name, scores_key), has_reference(run, name, reference_key)
    if scores and learnt:
        return scores | cohort_arrays(sides)

    # One pass gives logits and features. The reference needs those of validation, even where scores are kept.
    K, subsets = run.task.outputs, dict(zip(SIDES, sides))
    model.to(device)

    def outputs(subset, what):
        settings = dict(output=inputs.logits_and_features, batch_size=batch_size)
        return predict(model, subset, inputs, progress=f"{run} {what}", **settings).numpy()

    scored_sides = SIDES if scores is None else ("val",)
    outputs_of = {side: outputs(subsets[side], SIDES[side]) for side in scored_sides}
    if not learnt:
        usual, val = outputs(sample, "training features"), outputs_of["val"]
        labels = shares.kinds(run.task, subsets["val"].targets)
        arrays = shift.learn(usual[:, K:], val[:, K:], val[:, :K], subsets["val"].patients, labels)
        run.save_reference({"key": np.array(reference_key), **arrays}, name)
    if scores is None:
        scores = {"key": np.array(scores_key)}
        for side, subset in subsets.items():
            scores |= {
                f"{side}_files": np.array(subset.files),
                f"{side}_labels": subset.targets,
                f"{side}_logits": outputs_of[side][:, :K],
                f"{side}_patients": np.array(subset.patients),
            }
    return scores | cohort_arrays(sides)


def cohort_arrays(sides):
    """{SIDE_cohort_NAME: array} of what is known of the patients and exposures of validation and test."""
    arrays = {}
    for side, subset in zip(SIDES, sides):
        for column, values in (subset.cohort or {}).items():
            arrays[f"{side}_cohort_{column}"] = values
    return arrays


def keys(run, inputs, sides, sample, views):
    """What the scores of validation and test depend on, and what the reference does, as checksums; `sample`:
    the training images that the reference is learnt from; `views`: as in a calibration's "tta".

    Whatever decides a figure is in them: the model and how it is built, what it is shown, the images, their
    labels, and whose they are. The size of a batch and the device are not: they change the last digits."""
    decisive = [
        run.checkpoint_sha256,
        run.results["model_config"],  # the same weights make another model with other heads, scaling or looks
        run.results["mean"],
        run.results["std"],
        inputs.amp,
        views,
        "none",  # the exposure, which older versions could change
        [run.task.kind, run.task.classes],
    ]
    if inputs.needs_lungs:
        decisive += [inputs.input_mode, inputs.reads_lungs, run.config.lungs_sha256]
    fingerprints = [shown_fingerprint(side, inputs) for side in sides]
    of_reference = [fingerprints[0], shown_fingerprint(sample, inputs), shift.VERSION]
    return sha256([*decisive, fingerprints]), sha256([*decisive, *of_reference])


def shown_fingerprint(subset, inputs):
    """A checksum of a Subset's files, labels, pixels and patients, and of its lung masks where the model
    needs them."""
    masks_checksum = 0
    if inputs.needs_lungs:
        for row in subset.rows:
            masks_checksum = zlib.crc32(np.ascontiguousarray(subset.masks[row]), masks_checksum)
    return sha256([pixel_fingerprint(subset), list(map(str, subset.patients)), masks_checksum])


def has_reference(run, name, key):
    """Whether a run has the reference with this key."""
    try:
        return shift.reference_of(run, name, key) is not None
    except InputError as error:
        say(f"{error}; it is made again now")
        return False


def kept_scores(run, name, key):
    """The scores that a run has, if they have this key; else None. What was saved of patients and exposures
    is left out: it is taken from the images as they are now."""
    try:
        kept = run.saved_scores(name)
        if "key" in kept and str(kept["key"]) == key:
            derived = [name for name in kept if name.endswith("_p1") or "_cohort_" in name]
            return {name: array for name, array in kept.items() if name not in derived}
    except InputError as error:
        if "does not exist" not in str(error):
            say(f"{error}: scoring again")
    return None
