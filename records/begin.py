"""The run folder that a training command may write: checked before any work is done."""

import tempfile
from pathlib import Path

from common.console import InputError
from common.device import processes
from records import lock
from records.run import Run


def runs_to_write(args, seed):
    """{seed: its Run}, one for each of --seeds, or for the one `seed`. InputError as of run_from_args."""
    if not args.seeds:
        return {seed: run_from_args(args)}
    return {seed: run_from_args(args, f"-seed{seed}") for seed in args.seeds}


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
        check_folder(folder)
    run = Run(folder)
    if first:  # the others might see the lock of the first one
        lock.refuse_held(run, "wait until it has ended, or choose another folder with --out")
    can_go_on = (folder / "last.pth").exists()
    if args.resume:
        if not can_go_on and not suffix:
            raise InputError(
                f"--resume: there is no {folder / 'last.pth'} to continue from; start without --resume"
            )
    elif run.begun and not args.overwrite:
        refuse_begun(run, can_go_on)
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


def check_folder(folder):
    """InputError if a folder cannot be made or written to; none is left behind."""
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written to: {error.strerror}") from None
    finally:
        for p in new:
            if p.exists():
                p.rmdir()
