"""The folder that a training script writes to: what may be there already, and what must not be lost."""

import os
from pathlib import Path

from common.console import InputError, say
from common.device import processes
from common.files import check_folder
from records import lock
from records.run import Run


def runs_to_write(args, seed):
    """{seed: its Run}, one for each of --seeds, or for the one `seed`. InputError as of run_from_args."""
    if args.resume and args.overwrite:
        say("note: --resume goes on with what is there; --overwrite then replaces nothing")
    if not args.seeds:
        return {seed: run_from_args(args)}
    runs = {seed: run_from_args(args, f"-seed{seed}") for seed in args.seeds}
    return without_lost(runs) if args.resume else runs


def run_from_args(args, suffix=""):
    """The Run to write; refuses, before any work is done, to overwrite one silently (InputError)."""
    usual = args.default_out
    if args.demo:
        usual += "-demo"
    folder = Path((args.out or usual) + suffix)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: name a folder")
    first = processes()[0] == 0
    if first:
        check_folder("--out", folder)
    run = Run(folder)
    if first:  # the others might see the lock of the first one
        lock.refuse_held(run, "wait until it has ended, or choose another folder with --out")
    can_go_on = (folder / "last.pth").exists()
    if run.masked.begun and not (run.begun or args.overwrite and not args.resume):
        refuse_masked(run, args)
    elif args.resume:
        refuse_lost(run, can_go_on, suffix)
    elif run.begun and not args.overwrite:
        refuse_begun(run, can_go_on or run.masked.begun)
    refuse_source(run, args)
    return run


def refuse_begun(run, can_go_on):
    """InputError: what can be done where a run is there already."""
    if run.results["finished"]:
        there, resume = "a finished", ""
    else:
        there = "an interrupted"
        resume = "continue it with --resume, " if can_go_on else ""
    raise InputError(
        f"{run} already holds {there} run: {resume}choose another folder with --out, or replace it with "
        "--overwrite"
    )


def refuse_masked(run, args):
    """InputError where a run stopped in its masked epochs, unless the command line goes on with them."""
    if args.resume and getattr(args, "masked_epochs", 0):
        return
    raise InputError(
        f"{run} holds a run that stopped before the end of its masked epochs, or just after: "
        f"{run.masked.to_finish}, choose another folder with --out, or replace it with --overwrite"
    )


def refuse_source(run, args):
    """InputError where the Run to write is the one that a flag reads, and would be replaced."""
    for name in ("init", "teacher", "weights"):
        given = getattr(args, name, None)
        if not given or not run.begun:
            continue
        source = Path(given) if Path(given).is_dir() else Path(given).parent
        if source.name == "masked":  # the first stage of a run
            source = source.parent
        if os.path.realpath(run.folder) == os.path.realpath(source):
            raise InputError(f"--out {run} is the run that --{name} reads: name another folder")


def refuse_lost(run, can_go_on, one_of_many):
    """InputError where --resume finds nothing to go on from; of several seeds, they may just begin."""
    if can_go_on or one_of_many:
        return
    if _is_lost(run):
        raise InputError(
            f"--resume: {run} is finished and its last.pth is gone, so it stays as it is: "
            "--overwrite instead of --resume trains it anew"
        )
    if not run.masked.begun:
        raise InputError(
            f"--resume: there is no {run.folder / 'last.pth'} to continue from; start without --resume"
        )


def without_lost(runs):
    """Of {seed: Run}, to be resumed, those that can be, or just begin; a note names the others. InputError
    where none is left."""
    lost = {seed: run for seed, run in runs.items() if _is_lost(run)}
    if lost:
        say(
            f"note: --resume: finished, and without last.pth: {', '.join(map(str, lost.values()))}; left as "
            "they are, their settings not compared"
        )
    if len(lost) == len(runs):
        raise InputError("--resume: nothing is left to do; --overwrite instead of --resume trains them anew")
    return {seed: run for seed, run in runs.items() if seed not in lost}


def _is_lost(run):
    """Whether a run was finished, and what --resume needs of it was deleted."""
    return run.begun and run.results["finished"] and not (run.folder / "last.pth").exists()


def refuse_new(plan):
    """InputError where another command has begun the run of a Plan since this one looked."""
    if not processes()[0] and plan.run.begun and not plan.begun:
        raise InputError(
            f"{plan.run} was begun by another command meanwhile, and stays as it is: choose another folder "
            "with --out"
        )


def is_over(run, recipe):
    """Whether a run was finished, with as many epochs as a Recipe asks for."""
    if not run.begun or not run.results["finished"]:
        return False
    epochs = run.results["recipe"].get("epochs")
    return isinstance(epochs, int) and epochs >= recipe.epochs
