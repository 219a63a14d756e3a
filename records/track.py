"""Experiment trackers that follow a run, if asked to by --track: TensorBoard, MLflow, Weights & Biases.

Each is an optional package. One that is absent or fails costs a note, never the run. Everything stays on this
machine unless the user has said otherwise, in the tracker's own way: TensorBoard writes to RUN/tensorboard;
MLflow to mlruns/ beside the run folder, or to MLFLOW_TRACKING_URI; Weights & Biases to wandb/ beside the run
folder, offline, unless WANDB_API_KEY is set.

RUN/track.json keeps by what name each tracker knows the run, so that --resume and calibrate.py go on with the
same one.
"""

import contextlib
import logging
import os
import re
import tempfile
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

from common.console import say
from common.files import atomic_path

BACKENDS = ("tensorboard", "mlflow", "wandb")
PROJECT = "chest-xray-screening"
PATIENCE = 15  # seconds that a server may take to answer


def add_track_argument(group):
    """--track."""
    text = "follow the run in these trackers, each a package to install; offline unless set up otherwise"
    group.add_argument("--track", nargs="+", choices=BACKENDS, default=[], metavar="TRACKER", help=text)


# ---------------------------------------------------------------- back ends

# Each is opened with (run, known): known is what `reference` gave the last time, or None. `parameters` takes
# {name: text or number}, `figures` {name: float} and the epoch, or None for figures of the whole run;
# `picture` a name and the path of a PNG. `fail`, if it has that, is told that the run is followed no more.


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run, known):
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.reference = SummaryWriter(str(run.folder / "tensorboard")), "tensorboard"

    def parameters(self, values):
        rows = [f"| {name} | {value} |" for name, value in values.items()]
        self.writer.add_text("parameters", "\n".join(["| name | value |", "| --- | --- |", *rows]))

    def figures(self, values, epoch):
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch or 0)

    def picture(self, name, path):
        import matplotlib.image

        self.writer.add_image(name, matplotlib.image.imread(path)[..., :3], dataformats="HWC")

    def close(self):
        self.writer.close()


class MLflow:
    """A run of MLflow's; by default in the database mlruns/mlflow.db beside the run folder."""

    def __init__(self, run, known):
        for name, value in (("MAX_RETRIES", 1), ("TIMEOUT", PATIENCE)):  # else minutes, if a server is down
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", str(value))
        import mlflow
        from mlflow.entities import Metric, Param

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.metric, self.param, self.new = Metric, Param, not known
        folder, place = Path(os.path.abspath(run.folder.parent)) / "mlruns", {}
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            folder.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{folder}/mlflow.db"
            place["artifact_location"] = (folder / "artifacts").as_uri()
        self.client = mlflow.MlflowClient(uri)
        if known:
            self.reference = self.client.get_run(known).info.run_id
            self.client.set_terminated(known, "RUNNING")
            return
        found = self.client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self.client.create_experiment(PROJECT, **place)
        self.reference = self.client.create_run(experiment, run_name=run.folder.name).info.run_id

    @staticmethod
    def _name(name):
        """A name of the few characters that MLflow allows."""
        return re.sub(r"[^\w. /-]", "-", name)[:250]

    def parameters(self, values):
        named = {self._name(k): str(v) for k, v in values.items()}
        params = [self.param(k, v) for k, v in named.items()] if self.new else []  # it lets none change
        for i in range(0, len(params), 100):  # as many as it takes at once
            self.client.log_batch(self.reference, params=params[i : i + 100])

    def figures(self, values, epoch):
        now, named = int(time.time() * 1000), {self._name(k): v for k, v in values.items()}
        metrics = [self.metric(name, value, now, epoch or 0) for name, value in named.items()]
        self.client.log_batch(self.reference, metrics=metrics)

    def picture(self, name, path):
        self.client.log_artifact(self.reference, path)

    def fail(self):
        self.client.set_terminated(self.reference, "FAILED")

    def close(self):
        self.client.set_terminated(self.reference)


class Wandb:
    """A run of Weights & Biases, offline unless WANDB_API_KEY is set; its files are in wandb/ beside the run
    folder."""

    def __init__(self, run, known):
        import wandb

        usual = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        mode = os.environ.get("WANDB_MODE") or usual
        settings = wandb.Settings(silent=True, console="off", init_timeout=PATIENCE)
        self.image, place = wandb.Image, dict(dir=str(run.folder.parent), mode=mode, settings=settings)
        about = dict(project=PROJECT, name=run.folder.name, id=known or uuid.uuid4().hex[:8])
        self.run = wandb.init(**about, **place, resume="allow", reinit="finish_previous")
        self.reference = about["id"]

    def parameters(self, values):
        self.run.config.update(values, allow_val_change=True)

    def figures(self, values, epoch):
        if epoch is None:
            self.run.summary.update(values)
        else:
            self.run.log({**values, "epoch": epoch})

    def picture(self, name, path):
        self.run.log({name: self.image(path)})

    def close(self):
        self.run.finish()


KINDS = dict(zip(BACKENDS, (TensorBoard, MLflow, Wandb)))


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
            detail = " ".join(str(error).split())[:200]
            say(f"note: --track {name}: {reason} ({detail}); the run goes on without it")

    def _all(self, method, *values):
        for name, backend in list(self.open.items()):
            self._try(name, getattr(backend, method), *values)

    def begin(self, meta):
        """The settings of a results.json, as parameters with dotted names."""
        plain = {k: v if isinstance(v, (int, float)) else str(v)[:250] for k, v in flat(meta)}
        self._all("parameters", plain)

    def epoch(self, number, row, stage):
        """A history entry, and the number of its stage of training, from 1."""
        self._all("figures", {**numbers(row), "stage": stage}, number)

    def end(self, results):
        """The best epoch's figures and the training curves; nothing of test."""
        if not self.open:
            return
        best = results["best_epoch"]
        row = results["history"][best - 1] if best else {}
        kept = {f"best_{k}": v for k, v in numbers(row).items() if k.startswith("val_")}
        self._all("figures", {**kept, "best_epoch": best, "minutes": results["minutes"]}, None)
        if "val_auroc" in row:
            self._curves(results)

    def calibrated(self, calibration):
        """What calibrate.py found, with dotted names, and the pictures of explain.py."""
        self._all("figures", numbers(dict(flat(calibration))), None)
        for name, split in (("explain", ""), ("explain_val", "val"), ("explain_test", "test")):
            path = self.run.explained_folder(split) / "sheet.png"
            if path.exists():
                self._all("picture", name, str(path))

    def _curves(self, results):
        from records.curves import draw_training  # slow to import

        entry = SimpleNamespace(name=self.run.folder.name, results=results)
        figure, title = draw_training([entry])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "training_curves.png")
            with atomic_path(path) as tmp:
                figure.savefig(tmp, dpi=110)
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
