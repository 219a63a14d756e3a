"""Experiment trackers that follow a run, if asked to by --track: TensorBoard, MLflow, Weights & Biases.

Each is an optional package. One that is absent or fails costs a note, never the run. Everything stays on this
machine unless the user has said otherwise, in the tracker's own way: TensorBoard writes to RUN/tensorboard;
MLflow to mlruns/ beside the run folder, or to MLFLOW_TRACKING_URI; Weights & Biases to wandb/ beside the run
folder, offline, unless WANDB_API_KEY is set. What each does is in records/trackers/.

RUN/track.json keeps by what name each tracker knows the run, so that --resume and calibrate.py go on with the
same one.
"""

import contextlib
import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

from common import scaling
from common.console import in_one_line, say
from common.files import save_figure
from records.trackers.kept import best_files, last_files
from records.trackers.mlflow import MLflow
from records.trackers.tensorboard import TensorBoard
from records.trackers.wandb import Wandb

BACKENDS = ("tensorboard", "mlflow", "wandb")
KINDS = dict(zip(BACKENDS, (TensorBoard, MLflow, Wandb)))


def add_track_argument(group):
    """--track."""
    text = "follow the run in these trackers, each a package to install; offline unless set up otherwise"
    group.add_argument("--track", nargs="+", choices=BACKENDS, default=[], metavar="TRACKER", help=text)


def address_of(name):
    """Where the environment sends a tracker, in parentheses, without a password; "" if it says nothing."""
    variable = {"mlflow": "MLFLOW_TRACKING_URI", "wandb": "WANDB_BASE_URL"}.get(name)
    if address := os.environ.get(variable or ""):
        return f" ({variable}={re.sub('//[^/@]*@', '//', address)})"
    return ""


# ---------------------------------------------------------------- a run


class Tracker:
    """The trackers `names` of a Run. Each method passes something on to all that still work."""

    def __init__(self, names, run):
        self.run, self.open = run, {}
        known = run.tracked()
        for name in dict.fromkeys(names):
            self._try(name, self._open, name, known.get(name))
        if self.open:
            run.save_tracked({**known, **{name: backend.reference for name, backend in self.open.items()}})

    def _open(self, name, known):
        self.open[name] = KINDS[name](self.run, known)

    def _try(self, name, action, *values):
        try:
            action(*values)
        except Exception as error:  # whatever goes wrong in there, the run matters more
            failed = self.open.pop(name, None)
            with contextlib.suppress(Exception):  # it cannot fail more than it has
                getattr(failed, "fail", lambda: None)()
            reason = "the package is not here" if isinstance(error, ImportError) else type(error).__name__
            say(
                f"note: --track {name}{address_of(name)}: {reason} ({in_one_line(error)}); the run goes on "
                "without it"
            )

    def _all(self, method, *values):
        for name, backend in list(self.open.items()):
            self._try(name, getattr(backend, method), *values)

    def begin(self, meta):
        """The settings of a results.json, as parameters with dotted names. From now on the use of processor,
        memory and GPU is measured."""
        plain = {k: v if isinstance(v, (int, float)) else str(v)[:250] for k, v in flat(meta)}
        self._all("parameters", plain)
        self._all("watch")

    def epoch(self, number, row, stage):
        """A history entry, and the number of its stage of training, from 1."""
        self._all("figures", {**numbers(row), "stage": stage}, number)

    def end(self, results):
        """The best epoch's figures, the training curves, and the checkpoints of a finished run; nothing of
        test."""
        if not self.open:
            return
        best = results["best_epoch"]
        row = results["history"][best - 1] if best else {}
        kept = {f"best_{k}": v for k, v in numbers(row).items() if k.startswith("val_")}
        self._all("figures", {**kept, "best_epoch": best, "minutes": results["minutes"]}, None)
        if "val_auroc" in row:
            self._curves(results)
        # The last one first: trackers call `latest` what they were given last.
        if files := last_files(self.run):
            self._all("last", files)
        self._all("best", best_files(self.run), "")

    def calibrated(self, calibration):
        """What calibrate.py found, with dotted names, the pictures of explain.py, and the best checkpoint
        with its thresholds."""
        self._all("figures", numbers(dict(flat(calibration))), None)
        for name, split in (("explain", ""), ("explain_val", "val"), ("explain_test", "test")):
            path = self.run.explained_folder(split) / "sheet.png"
            if path.exists():
                self._all("picture", name, str(path))
        if self.open:
            name = scaling.calibration_name(calibration["tta"], self.run)
            self._all("best", best_files(self.run, name), name)

    def _curves(self, results):
        from records.curves import draw_training  # slow to import

        entry = SimpleNamespace(name=self.run.folder.name, results=results)
        figure, title = draw_training([entry])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "training_curves.png")
            save_figure(path, figure, 110)
            self._all("picture", title, str(path))

    def close(self):
        """Write what is pending and let go."""
        self._all("close")
        self.open = {}


def flat(value, prefix=""):
    """Yield (dotted name, value) of everything in nested dicts."""
    for name, item in value.items():
        if isinstance(item, dict):
            yield from flat(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item


def numbers(values):
    """The numbers among the values of a dict, as floats."""
    numeric = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {k: float(v) for k, v in numeric.items()}
