"""MLflow: runs in the database mlruns/mlflow.db next to the run folder, or at MLFLOW_TRACKING_URI."""

import inspect
import logging
import os
import re
import time
from pathlib import Path

from records.trackers.kept import PATIENCE, PROJECT, staged
from records.trackers.registry import register
from records.trackers.usage import SECONDS, measured


class MLflow:
    """A run of MLflow's."""

    def __init__(self, run, known):
        for name, value in (("MAX_RETRIES", 1), ("TIMEOUT", PATIENCE)):  # else minutes, if a server is down
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", str(value))
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        import mlflow
        from mlflow.entities import Metric, Param

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.run, self.metric, self.param, self.known = run, Metric, Param, known
        self.monitor = None
        folder, place = Path(os.path.abspath(run.folder.parent)) / "mlruns", {}
        self.uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not self.uri:
            folder.mkdir(parents=True, exist_ok=True)
            self.uri = f"sqlite:///{folder}/mlflow.db"
            place["artifact_location"] = (folder / "artifacts").as_uri()
        self.client = mlflow.MlflowClient(self.uri)
        if known:
            self.reference = self.client.get_run(known).info.run_id
            self.client.set_terminated(known, "RUNNING")
            return
        # All runs of this project stand in one experiment.
        experiment = self.client.get_experiment_by_name(PROJECT)
        if experiment:
            number = experiment.experiment_id
        else:
            number = self.client.create_experiment(PROJECT, **place)
        self.reference = self.client.create_run(number, run_name=run.folder.name).info.run_id

    @staticmethod
    def _name(name):
        """A name of the few characters that MLflow allows."""
        return re.sub(r"[^\w. /-]", "-", name)[:250]

    def parameters(self, values):
        named = {self._name(k): str(v) for k, v in values.items()}
        params = [] if self.known else [self.param(k, v) for k, v in named.items()]  # it lets none change
        for i in range(0, len(params), 100):  # as many as it takes at once
            self.client.log_batch(self.reference, params=params[i : i + 100])

    def watch(self):
        self.monitor = measured("mlflow", self._begin_monitor)

    def _begin_monitor(self):
        """MLflow's own system metrics, begun. ImportError without psutil, or of an older MLflow."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if "tracking_uri" not in inspect.signature(SystemMetricsMonitor).parameters:
            raise ImportError("it would write elsewhere", name="'mlflow>=3.7'")
        place = dict(resume_logging=bool(self.known), tracking_uri=self.uri)
        monitor = SystemMetricsMonitor(self.reference, sampling_interval=SECONDS, **place)
        monitor.start()
        return monitor

    def figures(self, values, epoch):
        now, named = int(time.time() * 1000), {self._name(k): v for k, v in values.items()}
        metrics = [self.metric(name, value, now, epoch or 0) for name, value in named.items()]
        self.client.log_batch(self.reference, metrics=metrics)

    def picture(self, name, path):
        self.client.log_artifact(self.reference, path)

    def last(self, files):
        with staged(files) as folder:
            self.client.log_artifacts(self.reference, str(folder), "checkpoints")

    def best(self, files, name):
        with staged(files) as folder:
            self.client.log_artifacts(self.reference, str(folder), "checkpoints")
        register(self.client, self.reference, self.run, name)

    def _stop_monitor(self):
        """Its thread writes to the run, so it ends before the run does."""
        if self.monitor:
            self.monitor.finish()

    def fail(self):
        self._stop_monitor()
        self.client.set_terminated(self.reference, "FAILED")

    def close(self):
        self._stop_monitor()
        self.client.set_terminated(self.reference)
