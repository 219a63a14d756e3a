"""A run as a version of a registered model of MLflow: prediction/mlflow_model.py, the code that it needs, the
checkpoint and its settings. MLflow keeps the code as files ("models from code"), so nothing is pickled.
"""

from common.prelude import REQUIREMENTS, ROOT

import contextlib
import io
import os
import tempfile
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

from common.console import in_one_line, say
from images.drawn import draw_radiograph
from records.run import WITHOUT_CLASSES
from records.trackers.kept import PROJECT, settings_files, staged, title

WRAPPER = ROOT / "prediction" / "mlflow_model.py"
NOT_NEEDED = ("tests", "studies")
PROBABILITIES = "probabilities only: the run is not calibrated"
DECISIONS = "probabilities and decisions, as predict.py gives them"


def register(client, run_id, run, name):
    """Make a Run the newest version of the model PROJECT-FOLDER, and say so. Where that fails, a note says
    why: the rest of the tracking does not depend on it. `name`: of its calibration, as Run.calibration takes
    it."""
    if run.kind in WITHOUT_CLASSES:
        say(f"note: --track mlflow: {run} has no classes to score, so no model is registered")
        return
    description = DECISIONS if name in run.calibrated() else PROBABILITIES
    try:
        version = _register(client, run_id, run, name, description)
    except Exception as error:  # no registry, no right to write to it, no space
        detail = in_one_line(error)
        say(f"note: --track mlflow: no model is registered: {type(error).__name__} ({detail})")
        return
    say(f"--track mlflow: registered models:/{version.name}/{version.version}, {description}")


def _register(client, run_id, run, name, description):
    """The new ModelVersion."""
    from mlflow.exceptions import MlflowException

    # Each version has a folder of its own: a later one must not change it.
    model, place = f"{PROJECT}-{title(run)}", f"model-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        save_model(run, name, path)
        client.log_artifacts(run_id, str(path), place)
    try:
        client.create_registered_model(model, description="Chest X-ray screening. Not a medical device.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
    tags = {"run": str(run), "checkpoint": run.checkpoint_sha256}
    return client.create_model_version(model, source, run_id, tags=tags, description=description)


def save_model(run, name, path):
    """Write a Run as an MLflow model to the folder `path`, with the signature of what it returns for one
    drawn image. So each model has scored an image before it is registered.

    What MLflow and the model say on stderr meanwhile is for those who load it, and not shown."""
    import mlflow

    files = {"checkpoint.pth": run.checkpoint, **settings_files(run, name)}
    with staged(files) as folder, contextlib.redirect_stderr(io.StringIO()):
        mlflow.pyfunc.save_model(
            path,
            python_model=str(WRAPPER),
            artifacts={"run": str(folder)},
            code_paths=code_paths(),
            pip_requirements=str(REQUIREMENTS),
            model_config={"tta": name == "tta", "device": "auto"},
        )
    with tempfile.TemporaryDirectory() as folder:
        image = os.path.join(folder, "drawn.png")
        Image.fromarray(draw_radiograph(np.random.default_rng(0))).save(image)
        with contextlib.redirect_stderr(io.StringIO()):
            rows = mlflow.pyfunc.load_model(str(path), model_config={"device": "cpu"}).predict([image])
    description = mlflow.models.Model.load(str(path))
    description.signature = signature_of(rows)
    description.save(str(path / "MLmodel"))


def code_paths():
    """The Python files and folders of this project that are no tests and no studies: [str]."""
    folders = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in NOT_NEEDED]
    return [str(path) for path in sorted([*ROOT.glob("*.py"), *folders])]


def signature_of(rows):
    """The ModelSignature of image paths in, and the columns of the DataFrame `rows` out: numbers float64,
    the others text. All but the path may be missing, where an image cannot be read for instance."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    columns = []
    for name in rows.columns:
        kind = "double" if rows[name].dtype == np.float64 else "string"
        columns.append(ColSpec(kind, name, required=name == "path"))
    return ModelSignature(inputs=Schema([ColSpec("string")]), outputs=Schema(columns))
