"""The scores that calibrate.py keeps of validation and test: what scores.npz must hold, and the columns of
findings that follow from it. No torch.
"""

import numpy as np

from common.console import InputError
from common.files import sha256
from common.safe_files import load_arrays
from common.scaling import SIDES

NEEDED = ("files", "patients", "labels", "logits")


def read_scores(path, calibration=None):
    """The arrays of a scores.npz, checked. InputError if the file is absent, damaged, or not the one that a
    `calibration` was made from: then calibrate.py was stopped between the two."""
    if not path.exists():
        raise InputError(f"{path} does not exist: run calibrate.py again")
    arrays = load_arrays(path)
    if (calibration or {}).get("scores_sha256") not in (None, sha256(path)):  # older ones do not say it
        raise InputError(f"{path} is not what its calibration was made from: run calibrate.py again")
    for side in SIDES:
        of_side = [arrays.get(f"{side}_{name}") for name in NEEDED]
        if any(a is None or a.ndim < 1 or len(a) != len(of_side[0]) for a in of_side):
            raise InputError(f"{path} is damaged: the {side} arrays are incomplete or differ in length")
        kinds, shapes = [a.dtype.kind for a in of_side], [a.ndim for a in of_side]
        typed = kinds == ["U", "U", "i", "f"] and shapes in ([1, 1, 1, 2], [1, 1, 2, 2])
        if not (typed and np.isfinite(of_side[-1]).all()):  # the last are the logits
            raise InputError(f"{path} is damaged: {side} arrays have a wrong type: run calibrate.py again")
    return arrays


def with_findings(arrays, run, task, calibration):
    """The arrays of `read_scores` of a `run` with a column a finding: see run.Run.scores. `calibration`: the
    content of calibration.json, for older files, which lack the scores. InputError if labels or scores have a
    wrong shape."""
    whole = {**arrays, "findings": np.array(task.findings)}
    for side in SIDES:
        labels, scores = arrays[f"{side}_labels"], arrays.get(f"{side}_p1")
        shape = (len(labels),)
        if task.kind == "sigmoid":  # of a table: a column a finding
            shape = (len(labels), task.outputs)
        if labels.shape != shape:
            raise InputError(
                f"the scores of {run} are damaged: {side} labels of other classes: run calibrate.py again"
            )
        truth = task.truth(labels)
        if scores is None:
            scores = task.scores_from(arrays[f"{side}_logits"], calibration)
        if scores.dtype.kind != "f" or scores.size != truth.size:
            raise InputError(
                f"the scores of {run} are damaged: {side}_p1 does not fit the labels: run calibrate.py again"
            )
        whole |= {f"{side}_truth": truth, f"{side}_scores": scores.reshape(truth.shape)}
    return whole
