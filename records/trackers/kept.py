"""Which files of a run trackers keep, and by what names."""

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

PROJECT = "chest-xray-screening"
PATIENCE = 15  # seconds that a server may take to answer


def plain(name):
    """A name of ASCII letters, digits, dot, dash and underscore: all trackers allow these."""
    return re.sub(r"[^\w.-]+", "-", str(name), flags=re.ASCII).strip("-") or "unnamed"


def title(run):
    """The name of a Run's folder, as trackers allow it."""
    return plain(Path(os.path.abspath(run.folder)).name)


def best_files(run, name=""):
    """{name: path} of a Run: its best epoch and what scoring with it needs; calibrated, what calibrate.py
    left too (`name`: "tta" for what --tta left)."""
    files = {f"{plain(run.results['model'])}-best.pth": run.checkpoint}
    return files | settings_files(run, name)


def settings_files(run, name=""):
    """{name: path} of what scoring needs besides the weights. Of what calibrate.py writes, the files that
    are there."""
    files = {"results.json": run.folder / "results.json"}
    if name in run.calibrated():
        calibration = run.folder / ("calibration-tta.json" if name else "calibration.json")
        for path in (calibration, run.reference_file(name)):
            if path.exists():
                files[path.name] = path
    return files


def last_files(run):
    """{name: path} of what --resume needs, with the weights of the last epoch; empty of a run without it."""
    path = run.folder / "last.pth"
    return {f"{plain(run.results['model'])}-last.pth": path} if path.exists() else {}


@contextlib.contextmanager
def staged(files):
    """A folder for the time of the block that holds `files`, {name: path}: hard links where the system allows
    them, otherwise copies. MLflow refuses symbolic links that lead out of the folder."""
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            try:
                os.link(os.path.realpath(path), Path(folder, name))
            except OSError:
                shutil.copyfile(path, Path(folder, name))
        yield Path(folder)
