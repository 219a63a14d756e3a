"""compare.py --list: which run folders there are, in what state, and what may be deleted. No torch."""

import os
import shlex
from pathlib import Path

from common.console import InputError, printable
from common.files import bytes_in, check_regular
from records import lock
from records.run import WITHOUT_CLASSES, Run
from report.rows import architecture, ensemble_name, set_name

HEAD = ("Folder", "Model", "Data", "Seed", "State", "MB")


def list_runs(runs_dir, chosen=None):
    """The run folders directly under `runs_dir`, or those `chosen`, as the lines of a table and what may be
    deleted. A damaged folder is listed as such. InputError if there is none."""
    folders = [Path(os.path.normpath(folder)) for folder in dict.fromkeys(chosen or ())]
    for folder in folders:
        if not is_run(folder):
            raise InputError(f"{folder} is no run folder: it holds no results.json")
    others = []
    if not folders:
        places = sorted(path for path in Path(runs_dir).glob("*") if path.is_dir())
        folders = list(filter(is_run, places))
        others = [path.name for path in places if path not in folders]
    if not folders:
        raise InputError(f"no run folders under {runs_dir}: name their place with --runs-dir")
    rows, spare = [], []
    for folder in folders:
        cells, finished = row_of(folder)
        rows.append([printable(cell) for cell in cells])
        for last in (folder / "last.pth", folder / "masked/last.pth"):
            if finished and last.is_file():
                spare.append(last)
    lines = [*aligned([HEAD, *rows]), "", *totals(folders, spare)]
    if others:
        hold = "other folder holds" if len(others) == 1 else "other folders hold"
        lines.append(f"{len(others)} {hold} no run: {', '.join(map(printable, others))[:200]}")
    return "\n".join(lines)


def is_run(folder):
    """Whether a run was begun in a folder, or is just being begun."""
    return any(run.begun for run in (Run(folder), Run(folder).masked)) or lock.holder(folder) is not None


def row_of(folder):
    """(the cells of a run folder in the order of HEAD, whether its training is finished)."""
    run, size = Run(folder), f"{bytes_in(folder) / 1e6:.1f}"
    if who := lock.holder(folder):
        return [str(folder), "-", "-", "-", f"being trained by {who}", size], False
    stage = ""
    if not run.begun:
        run, stage = run.masked, "masked epochs: "  # it came no further
    try:
        check_regular(run.folder / "results.json")  # to read from a pipe would wait for ever
        results = run.results
        name, shape = results["model"], results["model_config"]
        if stage:  # named as what it is to become
            name, shape = name.removesuffix(", masked"), shape["encoder"] | {"kind": "vit"}
        model = architecture(name, shape)
        if run.kind in WITHOUT_CLASSES and not stage:
            model = {"mae": "masked autoencoder", "lungs": "lung finder"}[run.kind]
        elif members := results.get("members"):
            model = ensemble_name(members, results["model_config"])
        state = f"{stage}{state_of(run)}"
        cells = [str(folder), model, set_name(results), str(results.get("seed", "-")), state, size]
        return cells, bool(results["finished"] and not stage)
    except (InputError, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        why = str(error).replace(f"{folder}{os.sep}", "").replace(f"{folder} ", "")
        return [str(folder), "-", "-", "-", f"damaged: {why[:100]}", size], False


def state_of(run):
    """How far a run has come, as text."""
    results = run.results
    if not results["finished"]:
        return interrupted(run)
    if not run.checkpoint.exists():
        return "finished, but checkpoint.pth is gone"
    if run.kind in WITHOUT_CLASSES:
        return "finished"
    states = ["finished"]
    for name in run.calibrated():
        states.append(calibrated(run, name))
    if not run.calibrated():
        states.append("not calibrated")
    extra = {"audit.json": "audited", "explain": "explained", "sites": "sites", "monitor": "monitored"}
    states += [word for name, word in extra.items() if (run.folder / name).exists()]
    return ", ".join(states)


def interrupted(run):
    """Where training stopped, and whether it can go on."""
    results = run.results
    epochs, wanted = len(results["history"]), results["recipe"].get("epochs")
    text = f"interrupted after epoch {epochs}"
    if isinstance(wanted, int) and wanted:
        text += f" of {wanted}"
    if not (run.folder / "last.pth").exists():
        text += ", cannot be resumed"
    return text


def calibrated(run, name):
    """What is wrong with a calibration, or that nothing is; name: as of Run.calibrated."""
    views = " with TTA" if name else ""
    try:
        run.scores(name)
    except InputError as error:
        if "another checkpoint" in str(error):
            return f"calibrated{views} for another checkpoint"
        return f"calibration{views} damaged"
    return f"calibrated{views}"


def aligned(rows):
    """Rows of texts as lines, the columns under each other, the last one to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for *texts, size in rows:
        cells = [text.ljust(width) for text, width in zip(texts, widths)]
        lines.append("  ".join([*cells, size.rjust(widths[-1])]))
    return lines


def totals(folders, spare):
    """How much all take, and what may be deleted, as lines."""
    total = sum(map(bytes_in, folders)) / 1e6
    count = f"{len(folders)} run folder{'s' if len(folders) > 1 else ''}, {total:.1f} MB"
    if not spare:
        return [f"{count}; no last.pth of a finished run is left to delete"]
    size = sum(path.stat().st_size for path in spare) / 1e6
    command = shlex.join(["rm", "--", *(path.as_posix() for path in spare)])
    return [
        count,
        f"last.pth of finished runs serves only to train them longer; {size:.1f} MB may be deleted:",
        f"  {command}",
    ]
