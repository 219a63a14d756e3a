"""Tests of track: written with each tracker for real, and read back with its own reader."""

import json
import re
import sys
import time

import pytest

from common.console import InputError
from records import track
from records.run import Run
from tests.shared import cli, read_json, refused, strip_time, succeed

META = {"model": "scratch", "recipe": {"lr": 3e-4, "augment": "plain"}, "split": {"train": 76}}
ROWS = [{"train_loss": 1.5, "val_loss": 0.75, "val_auroc": 0.5, "lr": 3e-4, "train_auroc": None}]
ROWS += [{"train_loss": 1.0, "val_loss": 0.5, "val_auroc": 0.875, "lr": 6e-5, "train_auroc": 0.9}]
RESULTS = {"history": ROWS, "best_epoch": 2, "minutes": 1.5, "recipe": {"watch": "auroc"}}
CALIBRATION = {"threshold": 0.25, "tta": None, "test": {"at_rec": {"recall": 0.97}}, "command": "x"}
LOGGED = {"best_val_auroc": 0.875, "minutes": 1.5, "threshold": 0.25, "test.at_rec.recall": 0.97}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No settings of whoever runs the tests."""
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder whose runs MLflow keeps in one database: to lay one out takes seconds."""
    return tmp_path_factory.mktemp("mlflow")


def runs_of(client, name):
    """MLflow's runs of that name, of all experiments."""
    places = [experiment.experiment_id for experiment in client.search_experiments()]
    return [found for found in client.search_runs(places) if found.info.run_name == name]


def followed(folder, name):
    """A Run that `name` has followed from training, with an interruption, to calibration."""
    run = Run(folder / "outputs" / "scratch")
    tracker = track.Tracker([name], run)
    tracker.begin(META)
    tracker.epoch(1, ROWS[0], 1)
    tracker.close()
    tracker = track.Tracker([name, name], run)
    tracker.begin(META)
    tracker.epoch(2, ROWS[1], 2)
    tracker.end(RESULTS)
    tracker.close()
    tracker = track.Tracker([name], run)
    tracker.calibrated(CALIBRATION)
    tracker.close()
    return run


def test_tensorboard(tmp_path, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = followed(tmp_path, "tensorboard")
    found = accumulator.EventAccumulator(str(run.folder / "tensorboard")).Reload()
    values = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert values["val_auroc"] == [(1, 0.5), (2, 0.875)] and values["stage"] == [(1, 1.0), (2, 2.0)]
    assert values["lr"] == [(1, pytest.approx(3e-4)), (2, pytest.approx(6e-5))]
    assert {k: values[k][0][1] for k in LOGGED} == pytest.approx(LOGGED)
    assert found.Tags()["images"] == ["Training curves"]
    text = found.Tensors("parameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| recipe.lr | 0.0003 |" in text and "| recipe.augment | plain |" in text
    assert capsys.readouterr().err == ""


def test_mlflow(store, capsys):
    mlflow = pytest.importorskip("mlflow")
    run = followed(store, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{store}/outputs/mlruns/mlflow.db")
    (found,) = runs_of(client, "scratch")
    assert found.info.run_id == run.tracked()["mlflow"] and found.info.status == "FINISHED"
    assert found.info.experiment_id == client.get_experiment_by_name(track.PROJECT).experiment_id
    assert found.data.params["recipe.lr"] == "0.0003" and found.data.params["split.train"] == "76"
    history = client.get_metric_history(found.info.run_id, "val_loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.75), (2, 0.5)]
    assert {k: found.data.metrics[k] for k in LOGGED} == pytest.approx(LOGGED)
    assert [a.path for a in client.list_artifacts(found.info.run_id)] == ["training_curves.png"]
    assert "note" not in capsys.readouterr().err


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


def test_wandb(tmp_path, capsys):
    pytest.importorskip("wandb")
    run = followed(tmp_path, "wandb")
    files = sorted((tmp_path / "outputs/wandb").glob("offline-run-*/*.wandb"))
    name = run.tracked()["wandb"]
    assert len(files) == 3 and {f.name for f in files} == {f"run-{name}.wandb"}

    def items(values):
        return {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in values}

    records = [record for file in files for record in wandb_records(file)]
    config = items(u for r in records if r.WhichOneof("record_type") == "run" for u in r.run.config.update)
    config |= items(u for r in records for u in r.config.update)
    assert config["recipe.lr"] == 3e-4 and config["model"] == "scratch"
    history = [items(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    rows = [(h["epoch"], h["val_auroc"], h["stage"]) for h in history if "val_auroc" in h]
    assert rows == [(1, 0.5, 1), (2, 0.875, 2)]
    assert any("Training curves" in str(h) for h in history)
    # On a busy machine the last records come after `finish`; key and JSON lie side by side in the file.
    end, missing = time.monotonic() + 60, set(LOGGED)
    while missing and time.monotonic() < end:
        content = b"".join(file.read_bytes() for file in files)
        pairs = {k: re.escape(k).encode() + rb".{0,3}" + str(v).encode() for k, v in LOGGED.items()}
        missing = {k for k, pair in pairs.items() if not re.search(pair, content, re.DOTALL)}
        time.sleep(0.2 if missing else 0)
    assert not missing
    assert "note" not in capsys.readouterr().err


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
    assert "--track mlflow:" in capsys.readouterr().err and time.monotonic() - started < 60


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
