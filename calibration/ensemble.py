"""Several runs made one: a run folder whose probability is the mean of theirs."""

import contextlib
import os

from common import scaling
from common.console import InputError, say
from models.build import Ensemble
from records import lock
from records.run import Run, find_runs
from training import plan

SINGLE = ("vit", "linear", "cnn", "hybrid")  # kinds of models that can be members
SAME = {"img_size": "--img-size", "resize": "--resize", "classes": "classes"}


def make_ensemble(folders, out, overwrite, ready):
    """Write the run `out` whose probability is the mean of those of the runs in `folders`; returns the Run.
    `ready` is called with its results before anything is written: to see whether the images are there.

    InputError unless these are two or more finished runs on the same images in the same form."""
    runs, run = find_runs(None, folders), Run(out)
    refuse_twice(runs)
    check_out(run, runs, overwrite)
    check_members(runs)
    results = [r.results for r in runs]
    shown, looks, views = looks_of(runs)
    with_lungs = [r for r in runs if r.config.reads_lungs or (looks and r.config.needs_lungs)]
    seen = {"input": shown, "reads_lungs": True} if with_lungs else {}  # by one member at least
    model = Ensemble(
        [r["model_config"] for r in results],
        [r["mean"] for r in results],
        [r["std"] for r in results],
        looks,
        sigmoid=runs[0].task.kind == "sigmoid",
        views=views,
    )
    for member, r in zip(model.members, runs):
        member.load_state_dict(r.model().state_dict())
    also = {}
    for r in results:
        also |= r["split"]["also"] if isinstance(r["split"].get("also"), dict) else {}
    split = dict(results[0]["split"])
    if also:
        split["also"] = also
    about = {
        "data": (with_lungs or runs)[0].results["data"] | seen,
        **{k: results[0][k] for k in ("input_range", "synthetic") if k in results[0]},
        "split": split,
        "model": "ensemble",
        "model_config": {"kind": model.kind, **model.config},
        "members": [
            {
                "run": str(r),
                "checkpoint": r.checkpoint_sha256,
                "model": r.results["model"],
                "balance": r.results["recipe"].get("balance", "none"),
            }
            for r in runs
        ],
        "recipe": {"amp": all(r["recipe"]["amp"] for r in results)},
        "mean": [0.0],
        "std": [1.0],
        "params": sum(r["params"] for r in results),
        "minutes": sum(r.minutes for r in runs),
        "best_epoch": 0,
        "history": [],
    }
    say_precision(runs)
    ready(about)
    plan.save_run(run, model, about)
    print(f"ensemble of {len(runs)} runs; wrote {run}/checkpoint.pth and results.json", flush=True)
    return run


def looks_of(runs):
    """(what an ensemble of Runs is shown of an image, what each member then cuts out itself, or None, the
    number of views of each member, or None where all have one)."""
    looks = [r.config.input for r in runs]
    views = [r.results["recipe"].get("test_views", 1) for r in runs]
    if max(views) == 1:
        views = None
    # A run moves an image before what it may not see is covered: so must a member that has several views.
    if len(set(looks)) > 1 or views and looks[0] != "full":
        return "full", looks, views
    return looks[0], None, views


def say_precision(runs):
    """A note where the members are in different precision: the ensemble is computed in one for all."""
    words = {}
    for run in runs:
        word = "bf16" if run.results["recipe"]["amp"] else "fp32"
        with contextlib.suppress(InputError):  # not calibrated, or not with these weights
            word = scaling.precision_of(run.calibration(), run.results)[0]
        words.setdefault(word, []).append(str(run))
    if len(words) > 1:
        listed = "; ".join(f"{word}: {', '.join(names)}" for word, names in sorted(words.items()))
        say(
            f"note: the members are scored in different precision ({listed}), the ensemble in one for all, "
            "so its probability is the mean of theirs to about 0.01; its thresholds are chosen on its own"
        )


def refuse_twice(runs):
    """InputError unless these are two or more Runs, no two of which are one model: it would count double."""
    if len(runs) < 2:
        raise InputError("--ensemble needs two or more different run folders")
    first = {}
    for run in runs:
        results = run.results
        shown = results["model_config"], results["data"].get("input"), results["recipe"].get("test_views", 1)
        if (same := first.setdefault((run.checkpoint_sha256, repr(shown)), run)) is not run:
            raise InputError(f"--ensemble: {same} and {run} are the same model: give it once")


def check_out(run, members, overwrite):
    """InputError if the Run to be written is a file, one of its members, or there already."""
    if run.folder.exists() and not run.folder.is_dir():
        raise InputError(f"--out {run} is a file: name a folder")
    if os.path.realpath(run.folder) in [os.path.realpath(member.folder) for member in members]:
        raise InputError(f"--out {run} is one of the members, and would replace it: choose another folder")
    lock.refuse_held(run, "choose another --out")
    if run.begun and not overwrite:
        raise InputError(f"{run} already holds a run: choose another --out, or replace it with --overwrite")


def check_members(runs):
    """InputError unless every Run is a finished single classifier, and all saw the same images in the same
    form, or different parts of them (--input)."""
    first = runs[0]
    for other in runs:
        if other.kind not in SINGLE:
            raise InputError(f"--ensemble: {other} is of kind {other.kind!r}, not a single classifier")
        if not other.results["finished"]:
            raise InputError(f"--ensemble: {other.why_unfinished()}")
        differ = [name for k, name in SAME.items() if getattr(other.config, k) != getattr(first.config, k)]
        if other.results["split"]["fingerprint"] != first.results["split"]["fingerprint"]:
            differ.append("split")
        if differ:
            raise InputError(f"--ensemble: {other} and {first} differ in {', '.join(differ)}")
    if len({r.config.lungs_sha256 for r in runs if r.config.needs_lungs}) > 1:  # some may need none
        raise InputError("--ensemble: the members differ in --lungs, so their masks are not the same")
