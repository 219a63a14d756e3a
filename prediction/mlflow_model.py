"""A run as MLflow loads it from its registry: paths of images in, the rows of predict.py out.

    import mlflow
    model = mlflow.pyfunc.load_model("models:/chest-xray-screening-scratch/latest")
    table = model.predict(["a.png", "folder"])

MLflow keeps this file as the model and runs it when the model is loaded; records/trackers/registry.py puts
the run's files and the code beside it. No other file imports this one.
"""

import os

import mlflow
import pandas as pd

from common import scaling
from common.console import say
from common.device import pick_device
from models.inputs import Inputs
from prediction.output import thresholds_of_columns, with_six_digits
from prediction.scorer import Scorer
from records.run import Run


class NotCalibrated(Run):
    """A run before calibrate.py: its scores as the model gives them, and no thresholds."""

    def __init__(self, folder, device):
        super().__init__(folder)
        self.device = pick_device(device)

    def calibration(self, name=""):
        """A calibration that changes no score and decides nothing; "tta": with the seven views."""
        views = {"flip": False} if name else scaling.own_views(self.results)
        return {
            "findings": {finding: {} for finding in self.task.findings},
            "temperature": 1.0,
            "temperature_applied": False,
            "tta": views,
            "precision": Inputs.of_run(self.results, self.device).precision,
        }


class Unthresholded(Scorer):
    """The Scorer of a run that is not calibrated: probabilities only."""

    def _columns(self):
        self.score_columns = list(self.task.score_columns.values())
        top = ["top_class"] if self.task.one_of_many else []
        self.told = ["path", *top, *self.score_columns, "note"]
        return super()._columns()

    def _say_what_scores_are(self):
        """A note on what is missing, and where scores mean less than they seem to."""
        say(
            "note: this model is not calibrated: it gives no thresholds, decisions and typicality; "
            "calibrate.py --track mlflow registers a version that does"
        )
        if self.results["synthetic"]:
            say("note: this run was trained on SYNTHETIC images; its scores mean nothing for patients")
        if trained := scaling.balances(self.results):
            say(
                f"note: trained with --balance {', '.join(trained)}: scores are no probabilities at the "
                "images' prevalence"
            )


class Screening(mlflow.pyfunc.PythonModel):
    """What MLflow calls. Its model_config: "tta", whether to average over views, as calibrate.py --tta did;
    "device", where to compute (auto: cuda > mps > cpu)."""

    def load_context(self, context):
        """MLflow's name for getting ready: the Scorer of the run that lies among the model's files."""
        folder, options = context.artifacts["run"], context.model_config
        device, tta = options["device"], options["tta"]
        run = Run(folder)
        tta = scaling.asked_views(tta, run)  # None where they are the run's own
        if scaling.calibration_name(tta, run) in run.calibrated():
            self.scorer = Scorer(folder, device, tta=tta)
            self.columns = self.scorer.columns
        else:
            self.scorer = Unthresholded(NotCalibrated(folder, device), device, tta=tta)
            self.columns = self.scorer.told

    def predict(self, context, model_input, params=None):
        """Score images -> pandas.DataFrame, a row a file, with the columns and digits of predict.py. Scores,
        thresholds and typicality are float64, NaN where not known; the others are text, or None.

        `model_input`: paths of files and folders, and globs: a list, an array, or a table whose first column
        they are. InputError for a path that does not exist, and where there is no image file."""
        if isinstance(model_input, pd.DataFrame):
            model_input = model_input.iloc[:, 0]
        paths = [os.fspath(path) for path in model_input]
        rounded_at = thresholds_of_columns(self.scorer)
        rows = [with_six_digits(row, rounded_at) for row in self.scorer(paths)]
        table = pd.DataFrame(rows, columns=self.columns)
        return table.astype({name: "float64" for name in self._numbers() if name in self.columns})

    def _numbers(self):
        """The columns that hold numbers: a set."""
        scorer, columns = self.scorer, set(thresholds_of_columns(self.scorer))
        for column in scorer.threshold_cells():
            columns.add(scorer.column_of_unit(column))
        return columns


mlflow.models.set_model(Screening())
