"""Tests of track: written with each tracker for real, and read back with its own reader."""

from common.prelude import ROOT

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.console import InputError
from records import track
from records.run import Run
from records.trackers.kept import PROJECT, plain, staged
from records.trackers.registry import code_paths
from records.trackers.usage import Usage, measured
from tests.shared import cli, read_json, refused, strip_time, succeed

META = {"model": "scratch", "recipe": {"lr": 3e-4, "augment": "plain"}, "split": {"train": 76}}
ROWS = [{"train_loss": 1.5, "val_loss": 0.75, "val_auroc": 0.5, "lr": 3e-4, "train_auroc": None}]
ROWS += [{"train_loss": 1.0, "val_loss": 0.5, "val_auroc": 0.875, "lr": 6e-5, "train_auroc": 0.9}]
RESULTS = {"history": ROWS, "best_epoch": 2, "minutes": 1.5, "recipe": {"watch": "auroc"}}
CALIBRATION = {"threshold": 0.25, "tta": None, "test": {"at_rec": {"recall": 0.97}}, "command": "x"}
CALIBRATED = ("calibration.json", "reference.npz", "scores.npz")
LOGGED = {"best_val_auroc": 0.875, "minutes": 1.5, "threshold": 0.25, "test.at_rec.recall": 0.97}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No settings of whoever runs the tests."""
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE", "WANDB_SWEEP_ID", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, "")  # so that what a tracker sets there is gone after the test
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder whose runs MLflow keeps in one database: to lay one out takes seconds."""
    return tmp_path_factory.mktemp("mlflow")


def runs_of(client, name):
    """MLflow's runs of that name, of all experiments."""
    places = [experiment.experiment_id for experiment in client.search_experiments()]
    return [found for found in client.search_runs(places) if found.info.run_name == name]


def followed(folder, name, runs):
    """A Run that `name` has followed from training, with an interruption, to calibration. Its checkpoint and
    its calibration are those of one of `runs`."""
    run = Run(folder / "outputs" / "scratch")
    shutil.copytree(runs.out / "scratch", run.folder)
    calibrated = {path: path.read_bytes() for path in run.folder.glob("*") if path.name in CALIBRATED}
    run.clear(weights=False)
    tracker = track.Tracker([name], run)
    tracker.begin(META)
    tracker.epoch(1, ROWS[0], 1)
    tracker.close()
    tracker = track.Tracker([name, name], run)
    tracker.begin(META)
    tracker.epoch(2, ROWS[1], 2)
    tracker.end(RESULTS)
    tracker.close()
    for path, content in calibrated.items():
        path.write_bytes(content)
    tracker = track.Tracker([name], run)
    tracker.calibrated(CALIBRATION)
    tracker.close()
    return run


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_tensorboard(tmp_path, runs, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("psutil")
    run = followed(tmp_path, "tensorboard", runs)
    found = accumulator.EventAccumulator(str(run.folder / "tensorboard")).Reload()
    values = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert values["val_auroc"] == [(1, 0.5), (2, 0.875)] and values["stage"] == [(1, 1.0), (2, 2.0)]
    assert values["lr"] == [(1, pytest.approx(3e-4)), (2, pytest.approx(6e-5))]
    assert {k: values[k][0][1] for k in LOGGED} == pytest.approx(LOGGED)
    assert found.Tags()["images"] == ["Training curves"]
    text = found.Tensors("parameters/text_summary")[0].tensor_proto.string_val[0].decode()
    used = [values[f"system/{name}"] for name in ("cpu_percent", "memory_percent")]
    assert all([step for step, _ in value] == [1, 2] for value in used)
    assert all(0 <= percent <= 100 for value in used for _, percent in value)
    assert "| recipe.lr | 0.0003 |" in text and "| recipe.augment | plain |" in text
    assert capsys.readouterr().err == ""


def test_a_new_run_in_a_folder_has_its_own_curves_alone(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = Run(tmp_path / "scratch")
    run.folder.mkdir()
    for value in (0.25, 0.75):
        run.clear(weights=True)
        tracker = track.Tracker(["tensorboard"], run)
        tracker.begin(META)
        tracker.epoch(1, ROWS[0] | {"val_auroc": value}, 1)
        tracker.close()
    found = accumulator.EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [event.value for event in found.Scalars("val_auroc")] == [0.75]


@pytest.fixture(scope="module")
def registered(store, runs):
    """(the run that MLflow has followed, a client that reads where)."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("psutil")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
        # A user's run does not lie under the folder of temporary files, and MLflow follows no link out of it.
        (elsewhere := store / "temporary").mkdir()
        patch.setattr(tempfile, "tempdir", str(elsewhere))
        run = followed(store, "mlflow", runs)
    return run, mlflow.MlflowClient(f"sqlite:///{store}/outputs/mlruns/mlflow.db")


def test_mlflow(registered):
    run, client = registered
    (found,) = runs_of(client, "scratch")
    assert found.info.run_id == run.tracked()["mlflow"] and found.info.status == "FINISHED"
    assert found.info.experiment_id == client.get_experiment_by_name(PROJECT).experiment_id
    assert found.data.params["recipe.lr"] == "0.0003" and found.data.params["split.train"] == "76"
    history = client.get_metric_history(found.info.run_id, "val_loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.75), (2, 0.5)]
    assert {k: found.data.metrics[k] for k in LOGGED} == pytest.approx(LOGGED)


def test_mlflow_keeps_checkpoints(registered, tmp_path):
    run, client = registered
    number = run.tracked()["mlflow"]
    assert "training_curves.png" in [a.path for a in client.list_artifacts(number)]
    folder = Path(client.download_artifacts(number, "checkpoints", str(tmp_path)))
    kept = {path.name: sha256(path) for path in folder.iterdir()}
    names = {"scratch-best.pth": "checkpoint.pth", "scratch-last.pth": "last.pth"}
    names |= {name: name for name in ("results.json", "calibration.json", "reference.npz")}
    assert kept == {name: sha256(run.folder / source) for name, source in names.items()}


def test_mlflow_measures_the_machine(registered):
    run, client = registered
    metrics = client.get_run(run.tracked()["mlflow"]).data.metrics
    for name in ("system/cpu_utilization_percentage", "system/system_memory_usage_percentage"):
        assert 0 <= metrics[name] <= 100


LOAD = """
import sys
import mlflow
from mlflow.types import DataType
_, uri, name, *paths = sys.argv
mlflow.set_tracking_uri(uri)
for version in "12":
    model = mlflow.pyfunc.load_model(f"models:/{name}/{version}", model_config={"device": "cpu"})
    table = model.predict(paths)
    table.to_csv(f"{version}.csv", index=False)
    signature = model.metadata.signature
    assert signature.inputs.input_types() == [DataType.string]
    kinds = {DataType.double: "float64", DataType.string: "object"}
    expected = {column.name: kinds[column.type] for column in signature.outputs}
    assert expected == {c: "float64" if table[c].dtype == "float64" else "object" for c in table}
import data
print(data.__file__)
"""


def test_registered_model_gives_the_rows_of_predict(registered, runs, synthetic, tmp_path):
    """Both versions, loaded in a new process elsewhere: the scores in every digit, the decisions, and of a
    run that is not calibrated probabilities alone."""
    run, client = registered
    name = f"{PROJECT}-scratch"
    old, new = sorted(client.search_model_versions(f"name='{name}'"), key=lambda v: int(v.version))
    assert old.description.startswith("probabilities only") and new.description.startswith(
        "probabilities and"
    )
    assert old.tags == new.tags == {"run": str(run), "checkpoint": sha256(run.checkpoint)}
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no image")
    argv = [sys.executable, "-c", LOAD, client.tracking_uri, name, str(synthetic / "test"), str(damaged)]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout  # the version brings its own code
    assert done.stderr.count("this model is not calibrated") == 1
    assert not list(tmp_path.glob("dicom.key"))
    printed = cli("predict", synthetic / "test", damaged, "--run", run, cwd=runs.cwd)
    assert printed.code == 2  # one file cannot be read
    expected = list(csv.DictReader(printed.out.splitlines()))
    first, second = (list(csv.DictReader(open(tmp_path / f"{version}.csv"))) for version in "12")
    assert len(expected) == 41 and second == expected
    assert list(first[0]) == ["path", "p_pneumonia", "note"]
    # Nothing was scaled here, so calibration has changed no score.
    assert not run.calibration()["temperature_applied"]
    assert [row["p_pneumonia"] for row in first] == [row["p_pneumonia"] for row in expected]


def test_registered_version_holds_no_pickle(registered):
    """Code is kept as files; of torch's own files each opens with weights_only."""
    run, client = registered
    for version in client.search_model_versions(f"name='{PROJECT}-scratch'"):
        folder = Path(version.source.removeprefix("file://"))
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert "mlflow_model.py" in [path.name for path in files]
        assert not [path.name for path in files if path.suffix in (".pkl", ".pickle", ".joblib", ".pyc")]
        (weights,) = [path for path in files if path.suffix == ".pth"]
        assert torch.load(weights, weights_only=True)


def test_code_of_a_version_is_whole():
    """Every folder and file that the library imports, no test and no data."""
    names = {Path(path).name for path in code_paths()}
    assert {"data.py", "vit.py", "common", "lungs", "prediction", "records"} <= names
    assert not {"tests", "studies", "Data", "outputs", "docs"} & names


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format, 32 KiB blocks after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, records, part = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(part))
            part = b""
    return records


def when_written(files, artifacts):
    """The records of .wandb files, once LOGGED and so many artifacts of models are in them: on a busy machine
    the last ones come after `finish`. AssertionError if they do not come within a minute."""
    from google.protobuf.message import DecodeError

    end = time.monotonic() + 60
    while True:
        content = b"".join(file.read_bytes() for file in files)
        # Key and JSON lie side by side in the file.
        pairs = {k: re.escape(k).encode() + rb".{0,3}" + str(v).encode() for k, v in LOGGED.items()}
        missing = [k for k, pair in pairs.items() if not re.search(pair, content, re.DOTALL)]
        try:
            records = [record for file in files for record in wandb_records(file)]
        except DecodeError:  # a record that is just being written
            records = []
        models = [
            r for r in records if r.WhichOneof("record_type") == "artifact" and r.artifact.type == "model"
        ]
        if not missing and len(models) >= artifacts:
            return records
        assert time.monotonic() < end, (missing, len(models))
        time.sleep(0.2)


def check_artifacts(records, run):
    """The versions of a run's artifact: the last checkpoint and the best after training, the best again with
    its thresholds."""
    kept = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    kept = [artifact for artifact in kept if artifact.type == "model"]
    assert {artifact.name for artifact in kept} == {"scratch"}
    aliases = [set(artifact.aliases) - {"latest"} for artifact in kept]
    assert aliases == [{"last"}, {"best"}, {"best"}] and "latest" in kept[2].aliases
    files = [{entry.path: entry.local_path for entry in artifact.manifest.contents} for artifact in kept]
    best = {"scratch-best.pth", "results.json"}
    assert [set(found) for found in files] == [{"scratch-last.pth"}, best, {*best, *CALIBRATED[:2]}]
    assert sha256(files[0]["scratch-last.pth"]) == sha256(run.folder / "last.pth")
    assert sha256(files[2]["scratch-best.pth"]) == sha256(run.checkpoint)
    assert all(str(run.folder.parent) in path for found in files for path in found.values())


def test_wandb(tmp_path, runs, capsys):
    pytest.importorskip("wandb")
    run = followed(tmp_path, "wandb", runs)
    files = sorted((tmp_path / "outputs/wandb").glob("offline-run-*/*.wandb"))
    name = run.tracked()["wandb"]
    assert len(files) == 3 and {f.name for f in files} == {f"run-{name}.wandb"}

    def items(values):
        return {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in values}

    records = when_written(files, 3)
    config = items(u for r in records if r.WhichOneof("record_type") == "run" for u in r.run.config.update)
    config |= items(u for r in records for u in r.config.update)
    assert config["recipe.lr"] == 3e-4 and config["model"] == "scratch"
    history = [items(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    rows = [(h["epoch"], h["val_auroc"], h["stage"]) for h in history if "val_auroc" in h]
    assert rows == [(1, 0.5, 1), (2, 0.875, 2)]
    assert any("Training curves" in str(h) for h in history)
    check_artifacts(records, run)
    assert "note" not in capsys.readouterr().err


def test_artifacts_of_wandb_wait_beside_their_run(tmp_path, monkeypatch):
    """Two runs of two folders in one command; a folder that the user names is left alone."""
    pytest.importorskip("wandb")
    places = []
    for name in ("a", "b"):
        track.Tracker(["wandb"], Run(tmp_path / name / "scratch")).close()
        places.append(os.environ["WANDB_DATA_DIR"])
    assert places == [str(tmp_path / name / "wandb") for name in ("a", "b")]
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "mine"))
    track.Tracker(["wandb"], Run(tmp_path / "c/scratch")).close()
    assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / "mine")


def test_wandb_measures_the_machine(tmp_path):
    """Its own system metrics, as soon as a run is open."""
    pytest.importorskip("wandb")
    tracker = track.Tracker(["wandb"], Run(tmp_path / "outputs" / "scratch"))
    settings = tracker.open["wandb"].run.settings
    tracker.close()
    assert not settings.x_disable_stats and settings.x_stats_sampling_interval == 5


def test_a_tracker_that_is_absent_or_fails_costs_a_note(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    run = Run(tmp_path / "outputs" / "scratch")
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = track.Tracker(["wandb", "tensorboard"], run)
    assert "--track wandb: the package is not here" in capsys.readouterr().err
    tracker.epoch(1, ROWS[0], 1)

    def broken(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(tracker.open["tensorboard"].writer, "add_scalar", broken)
    tracker.epoch(2, ROWS[1], 1)
    tracker.end(RESULTS)
    tracker.close()
    said = capsys.readouterr().err
    assert said.count("note:") == 1 and "--track tensorboard: OSError (no space left on device)" in said


def test_a_server_that_is_down_costs_a_note(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    started = time.monotonic()
    tracker = track.Tracker(["mlflow"], Run(tmp_path / "scratch"))
    tracker.begin(META)
    tracker.close()
    said = capsys.readouterr().err
    assert "--track mlflow (MLFLOW_TRACKING_URI=http://127.0.0.1:9):" in said
    assert "refused" in said and time.monotonic() - started < 60
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@there/a@b")
    assert track.address_of("mlflow") == " (MLFLOW_TRACKING_URI=http://there/a@b)"


def test_mlflow_gets_names_it_allows(store, capsys):
    """Classes of any name, and more parameters than it takes at once."""
    mlflow = pytest.importorskip("mlflow")
    counts = {"Pneumonia (viral, mild)": 3, **{f"class {i}": i for i in range(150)}}
    run = Run(store / "outputs/odd")
    tracker = track.Tracker(["mlflow"], run)
    tracker.begin({"split": {"train": counts}})
    tracker.close()
    client = mlflow.MlflowClient(f"sqlite:///{store}/outputs/mlruns/mlflow.db")
    found = client.get_run(run.tracked()["mlflow"])
    assert found.data.params["split.train.Pneumonia -viral- mild-"] == "3"
    assert found.data.params["split.train.class 149"] == "149" and found.info.status == "FINISHED"
    assert "note" not in capsys.readouterr().err


def test_a_run_that_mlflow_loses_is_marked(store, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow")
    run = Run(store / "outputs/lost")
    tracker = track.Tracker(["mlflow"], run)

    def refuse(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(tracker.open["mlflow"].client, "log_batch", refuse)
    tracker.begin(META)
    tracker.close()
    client = mlflow.MlflowClient(f"sqlite:///{store}/outputs/mlruns/mlflow.db")
    assert client.get_run(run.tracked()["mlflow"]).info.status == "FAILED"
    assert "RuntimeError (no)" in capsys.readouterr().err


def test_damaged_reference(tmp_path):
    (tmp_path / "track.json").write_text('{"mlflow": 3}')
    with pytest.raises(InputError, match="track.json is damaged"):
        track.Tracker(["tensorboard"], Run(tmp_path))


def test_tracking_changes_no_run(flags, tmp_path):
    pytest.importorskip("tensorboard")
    argv = ("train_scratch", *flags, "--epochs", 1, "--max-steps", 2, "--batch-size", 16)
    succeed(*argv, "--out", "outputs/a", cwd=tmp_path)
    succeed(*argv, "--out", "outputs/b", "--track", "tensorboard", cwd=tmp_path)
    one, two = (read_json(tmp_path, f"outputs/{name}/results.json") for name in "ab")
    assert strip_time(one["history"]) == strip_time(two["history"]) and one["recipe"] == two["recipe"]
    calibrate = ("calibrate", "--min-recall", 0.9, "--run", "outputs/b", "--track", "tensorboard")
    succeed(*calibrate, cwd=tmp_path)
    assert len(list((tmp_path / "outputs/b/tensorboard").iterdir())) == 2
    succeed("train_linear", *flags[:4], "--img-size", 64, "--track", "tensorboard", cwd=tmp_path)
    assert list((tmp_path / "outputs/linear/tensorboard").iterdir())
    refused(cli(*argv, "--out", "outputs/c", "--track", "excel", cwd=tmp_path), "--track", "tensorboard")


def test_a_registry_that_refuses_costs_a_note(store, runs, monkeypatch, capsys):
    """The run is followed all the same."""
    mlflow = pytest.importorskip("mlflow")
    run = Run(store / "outputs/refused")
    shutil.copytree(runs.out / "linear", run.folder)
    tracker = track.Tracker(["mlflow"], run)

    def refuse(*args, **kwargs):
        raise RuntimeError("no registry")

    monkeypatch.setattr(tracker.open["mlflow"].client, "create_model_version", refuse)
    tracker.end(RESULTS)
    tracker.close()
    assert "no model is registered: RuntimeError (no registry)" in capsys.readouterr().err
    client = mlflow.MlflowClient(f"sqlite:///{store}/outputs/mlruns/mlflow.db")
    number = run.tracked()["mlflow"]
    assert client.get_run(number).info.status == "FINISHED"
    kept = {Path(a.path).name for a in client.list_artifacts(number, "checkpoints")}
    assert {"linear-best.pth", "results.json"} <= kept and "linear-last.pth" not in kept


def test_a_run_without_classes_is_not_registered(tmp_path, runs, capsys):
    """An encoder that was pretrained: there is nothing to score with."""
    from records.trackers.registry import register

    run = Run(tmp_path / "mae")
    run.folder.mkdir()
    results = read_json(runs.out / "scratch/results.json")
    results["model_config"] = {"kind": "mae"}
    (run.folder / "results.json").write_text(json.dumps(results))
    register(None, "", run, "")
    assert "no classes to score, so no model is registered" in capsys.readouterr().err


def test_usage_of_gpu(monkeypatch, capsys):
    """Its mean between two calls, and memory, by what the driver is made to say."""
    psutil = pytest.importorskip("psutil")
    shown = iter([10, 30])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "utilization", lambda: next(shown))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6e9, 10e9))
    monkeypatch.setattr("records.trackers.usage.GPU_SECONDS", 0.01)
    usage = Usage()
    end = time.monotonic() + 30
    while len(usage.gpu) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    figures = usage.figures()
    assert figures["system/gpu_percent"] == 20 and figures["system/gpu_memory_gb"] == 4
    memory = psutil.Process().memory_info().rss
    assert figures["system/process_memory_gb"] * 1e9 == pytest.approx(memory, rel=0.2)
    assert "system/gpu_percent" not in usage.figures()  # the driver has told no more
    monkeypatch.setitem(sys.modules, "pynvml", None)
    measured("tensorboard", lambda: usage)
    assert "use of the GPU is not measured: pip install nvidia-ml-py" in capsys.readouterr().err


def test_usage_needs_psutil(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert measured("mlflow", Usage) is None
    assert "--track mlflow: use of processor, memory and GPU is not measured: pip install psutil" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "name, expected", [("ViT-B/16", "ViT-B-16"), ("ti16, masked", "ti16-masked"), ("肺", "unnamed")]
)
def test_names_that_trackers_allow(name, expected):
    assert plain(name) == expected


def test_staged_files_where_there_are_no_links(tmp_path, monkeypatch):
    """As on Windows without the right to make them."""
    (tmp_path / "a").write_bytes(np.arange(9, dtype=np.uint8).tobytes())

    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    with staged({"b.pth": tmp_path / "a"}) as folder:
        assert not (folder / "b.pth").is_symlink() and sha256(folder / "b.pth") == sha256(tmp_path / "a")
    assert not folder.exists()


def test_registered_model_averages_over_the_views_of_a_run(tmp_path, runs):
    """Before it is calibrated, too: a run that was trained with --test-views 7 is scored with these."""
    pytest.importorskip("mlflow")
    from prediction.mlflow_model import NotCalibrated, Unthresholded

    for views, count in ((1, 0), (7, 7)):
        run = tmp_path / str(views)
        shutil.copytree(runs.out / "linear", run)
        results = read_json(run / "results.json")
        results["recipe"]["test_views"] = views
        (run / "results.json").write_text(json.dumps(results))
        scorer = Unthresholded(NotCalibrated(run, "cpu"), "cpu")
        assert len(scorer.inputs.views) == count and scorer.told == ["path", "p_pneumonia", "note"]
    asked = Unthresholded(NotCalibrated(tmp_path / "1", "cpu"), "cpu", tta=True)  # model_config={"tta": True}
    assert len(asked.inputs.views) == 7
