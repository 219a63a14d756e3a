"""Tests of run."""

import json
import math
import pickle
import re
import shutil

import numpy as np
import pytest
import torch

from calibration.ensemble import make_ensemble
from common import files, safe_files
from common.console import InputError
from common.files import write_json
from common.task import Task
from records import scores as scores_module
from records.run import Run
from report.rows import also_trained_on
from tests.shared import (
    Evil,
    cli,
    folder_bytes,
    load_pth,
    of_one,
    read_json,
    refused,
    same_tensors,
    six_digits,
    succeed,
    with_changes,
)

RESULT_KEYS = {
    "model",
    "params",
    "minutes",
    "synthetic",
    "split",
    "history",
    "best_epoch",
    "seed",
    "command",
    "versions",
    "device",
    "format",
}


@pytest.mark.parametrize(
    "name, params, epochs",
    [
        # embedding, [CLS], 5 positions, 2 blocks (norms, qkv, proj, fc1, fc2), norm, head
        (
            "scratch",
            64 * 769 + 64 + 5 * 64 + 2 * (4 * 64 + 192 * 65 + 64 * 65 + 256 * 65 + 64 * 257) + 128 + 130,
            2,
        ),
        ("linear", 32 * 32 + 1, 1),
        (
            "pretrained",
            24 * 769 + 24 + 5 * 24 + 2 * (4 * 24 + 72 * 25 + 24 * 25 + 96 * 25 + 24 * 97) + 48 + 50,
            2,
        ),
    ],
)
def test_results_json(runs, synthetic, name, params, epochs):
    results = read_json(runs.out, name, "results.json")
    assert RESULT_KEYS <= results.keys()
    assert results["params"] == params and len(results["history"]) == epochs and results["synthetic"] is True
    for row in results["history"]:
        assert {"train_loss", "val_loss", "val_auroc", "lr", "seconds"} <= row.keys()
        assert 0 <= row["val_auroc"] <= 1 and row["seconds"] > 0 and math.isfinite(row["val_loss"])
    aurocs = [row["val_auroc"] for row in results["history"]]
    assert results["best_epoch"] == 1 + aurocs.index(max(aurocs))
    split = results["split"]
    assert (split["train"], split["val"], split["test"]) == (76, 20, 40)
    assert split["shared_patients"] == 0 and re.fullmatch("[0-9a-f]{64}", split["fingerprint"])
    assert (
        results["command"].startswith(f"python train_{name}.py --data-dir ")
        and "torch" in results["versions"]
    )
    seconds, expected = results["minutes"] * 60, sum(row["seconds"] for row in results["history"])
    # The default recipe of the pretrained arm trains the head first, which takes time too.
    assert seconds > expected if name == "pretrained" else seconds == pytest.approx(expected)
    assert results["finished"] is True and results["format"] == 1
    assert results["data"]["data_dir"] == str(synthetic)


def test_checkpoint_holds_tensors_only(runs):
    for name in ("scratch", "pretrained", "linear"):
        state = load_pth(runs.out, name, "checkpoint.pth")
        assert all(isinstance(v, torch.Tensor) for v in state.values())
        run = Run(runs.out / name)
        assert same_tensors(run.model().state_dict(), state) and not run.model().training
    assert run.results["model"] == "linear" and run.kind == "linear"


def test_pretrained_run_starts_from_the_weights(runs, tiny_npz):
    """Fine-tuned for a dozen steps, the weights are near those of the file; the JSON says which."""
    with np.load(tiny_npz) as w:
        kernel = w["embedding/kernel"].transpose(3, 2, 0, 1)
    found = load_pth(runs.out, "pretrained", "checkpoint.pth")["patch_embed.proj.weight"].numpy()
    assert 0 < np.abs(found - kernel).max() < 0.01
    results = read_json(runs.out, "pretrained", "results.json")
    assert results["weights"]["path"] == str(tiny_npz) and results["mean"] == [0.5] * 3
    assert sorted(results["weights"]["reset"]) == ["head.bias", "head.weight"]


def test_finished_run_is_not_overwritten(own_runs, flags, tiny_npz):
    """Exit 2 before any work; with --overwrite nothing of the old run stays."""
    before = folder_bytes(own_runs / "outputs")
    for name, more in (("scratch", ["--epochs", 1]), ("linear", []), ("pretrained", ["--weights", tiny_npz])):
        refused(cli(f"train_{name}", *flags, *more, cwd=own_runs), "finished run", "--overwrite", "--out")
    assert folder_bytes(own_runs / "outputs") == before
    succeed("train_pretrained", *flags, "--weights", tiny_npz, "--epochs", 1, "--overwrite", cwd=own_runs)
    out = own_runs / "outputs" / "pretrained"
    assert len(read_json(out, "results.json")["history"]) == 1
    assert not (out / "calibration.json").exists() and not (out / "scores.npz").exists()


def test_linear_overwrite_leaves_no_stale_calibration(own_runs, flags):
    """Figures of the old model beside a new one would go into the table unnoticed."""
    out = own_runs / "outputs" / "linear"
    left = [out / name for name in ("calibration.json", "audit.json", "audit-val-clusters.png")]
    for path in left[1:]:
        path.write_text("of the old model")
    succeed("train_linear", *flags, "--C", 1.0, "--overwrite", cwd=own_runs)
    assert not any(path.exists() for path in left)
    refused(cli("compare", "--run", out, cwd=own_runs), "not calibrated")


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_with_code_is_refused(own_runs, zipped):
    out = own_runs / "outputs" / "scratch"
    evil = {"head.weight": Evil(own_runs / "executed")}
    (out / "checkpoint.pth").unlink()
    if zipped:
        torch.save(evil, out / "checkpoint.pth")
    else:
        (out / "checkpoint.pth").write_bytes(pickle.dumps(evil))
    refused(cli("calibrate", "--run", out, cwd=own_runs), "checkpoint.pth", "refused")
    assert not (own_runs / "executed").exists()


def test_last_and_weights_with_code_are_refused(own_runs, flags):
    out = own_runs / "outputs" / "scratch"
    torch.save({"format": 1, "model": Evil(own_runs / "executed")}, out / "last.pth")
    done = cli(
        "train_scratch", *flags, "--epochs", 2, "--batch-size", 16, "--no-amp", "--resume", cwd=own_runs
    )
    refused(done, "last.pth", "refused")
    refused(
        cli("train_pretrained", *flags, "--weights", out / "last.pth", "--out", "x", cwd=own_runs), "refused"
    )
    assert not (own_runs / "executed").exists()


@pytest.mark.parametrize(
    "damage, words",
    [
        ("checkpoint cut", ["checkpoint.pth", "damaged"]),
        ("checkpoint absent", ["checkpoint.pth", "does not exist"]),
        ("checkpoint of another model", ["checkpoint.pth", "does not fit"]),
        ("results cut", ["results.json"]),
        ("results of a newer format", ["results.json", "update"]),
        ("results without split", ["split"]),
        ("results not an object", ["results.json", "list"]),
        ("results of an unknown model", ["does not describe a model"]),
        ("results with strange data", ["data settings"]),
    ],
)
def test_damaged_run(own_runs, damage, words):
    out = own_runs / "outputs" / "scratch"
    results, checkpoint = out / "results.json", out / "checkpoint.pth"
    value = read_json(results)
    if damage == "checkpoint cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:100_000])
    elif damage == "checkpoint absent":
        checkpoint.unlink()
    elif damage == "checkpoint of another model":
        shutil.copy(own_runs / "outputs" / "pretrained" / "checkpoint.pth", checkpoint)
    elif damage == "results cut":
        results.write_text(results.read_text()[:200])
    elif damage == "results of a newer format":
        results.write_text(json.dumps({**value, "format": 99}))
    elif damage == "results without split":
        results.write_text(json.dumps({k: v for k, v in value.items() if k != "split"}))
    elif damage == "results not an object":
        results.write_text("[1, 2]")
    elif damage == "results of an unknown model":
        results.write_text(json.dumps({**value, "model_config": {"kind": "vit", "wings": 2}}))
    elif damage == "results with strange data":
        results.write_text(json.dumps({**value, "data": {"folder": "x"}}))
    refused(cli("calibrate", "--run", out, cwd=own_runs), *words)


def test_a_calibration_of_other_weights_is_refused(bench, tmp_path):
    shutil.copytree(bench / "outputs/scratch-seed1", tmp_path / "run")
    shutil.copy(bench / "outputs/scratch-seed0/checkpoint.pth", tmp_path / "run/checkpoint.pth")
    for script, argv in (("predict", ["xray/test", "--run"]), ("compare", ["--run"])):
        done = cli(script, *argv, tmp_path / "run", cwd=bench)
        assert done.code == 2 and "another checkpoint" in done.err


def test_nan_weights_are_refused(bench, tmp_path):
    shutil.copytree(bench / "outputs/linear", tmp_path / "run")
    state = safe_files.load_tensors(tmp_path / "run/checkpoint.pth")
    state["head.weight"][0, 0] = math.nan
    torch.save(state, tmp_path / "run/checkpoint.pth")
    for script, argv in (("predict", ["xray/test", "--run"]), ("calibrate", ["--run"])):
        done = cli(script, *argv, tmp_path / "run", cwd=bench)
        assert done.code == 2 and "NaN" in done.err


@pytest.mark.parametrize(
    "file, change",
    [
        ("results.json", {"mean": None}),
        ("results.json", {"mean": [0.5, 0.5]}),
        ("results.json", {"split": {}}),
        ("results.json", {"recipe": {}}),
        ("results.json", {"history": []}),
        ("results.json", {"best_epoch": 99}),
        ("results.json", {"params": "many"}),
        ("results.json", {"format": None}),
        ("calibration.json", {"threshold": None}),
        ("calibration.json", {"temperature": 0}),
        ("calibration.json", {"test": {}}),
        ("calibration.json", {"format": "a"}),
        ("calibration.json", {"guarantee": ...}),
        ("scores.npz", "test_logits"),
    ],
)
def test_damaged_run_files_are_named(bench, tmp_path, file, change):
    """Every reader of the file says which file is damaged, in one line."""
    run = tmp_path / "run"
    shutil.copytree(bench / "outputs/linear", run)
    if file == "scores.npz":
        with np.load(run / file) as arrays:
            kept = {k: v for k, v in arrays.items() if k != change}
        np.savez(run / file, **kept)
    else:
        value = files.read_json(run / file)
        value = {**value, **change} if file == "results.json" else with_changes(value, change)
        (run / file).write_text(json.dumps(value))
    readers = {
        "results.json": ("calibrate", "compare", "predict"),
        "calibration.json": ("compare", "predict"),
        "scores.npz": ("compare",),
    }[file]
    for script in readers:
        done = cli(script, *(["xray/test"] if script == "predict" else []), "--run", run, cwd=bench)
        assert done.code == 2 and str(run) in done.err and "Traceback" not in done.err, (script, done.err)


def test_newer_format_and_too_few_patients_are_refused(bench, tmp_path):
    shutil.copytree(bench / "outputs/linear", tmp_path / "newer")
    results = files.read_json(tmp_path / "newer/results.json")
    write_json(tmp_path / "newer/results.json", {**results, "format": 99})
    for script in ("calibrate", "compare"):
        done = cli(script, "--run", tmp_path / "newer", cwd=bench)
        assert done.code == 2 and "format 99" in done.err
    done = cli("calibrate", "--run", "outputs/linear", "--guarantee", 0.9999999, cwd=bench)
    assert done.code == 2 and "are needed" in done.err


def test_old_runs_without_new_keys_are_read(bench, tmp_path):
    """What earlier versions did not record is not asked for: the split's unknown patients, recipe fields,
    classes' order."""
    shutil.copytree(bench / "outputs/linear", tmp_path / "run")
    results = files.read_json(tmp_path / "run/results.json")
    del results["split"]["unknown_patients"]
    write_json(tmp_path / "run/results.json", results)
    run = Run(tmp_path / "run")
    assert run.results["model"] == "linear" and run.calibrated() == [""]
    assert of_one(run.calibration())["threshold"] > 0
    assert len(run.scores()["test_files"]) == 60


def test_ensemble_is_a_run_of_its_own(bench, tmp_path):
    """Its probability is the mean of its members'; calibrate, predict, compare and explain take it like any
    other."""
    shutil.copytree(bench / "outputs", tmp_path / "outputs")
    (tmp_path / "xray").symlink_to(bench / "xray")
    members = ["outputs/scratch-seed0", "outputs/scratch-seed1"]
    flags = ("--min-recall", 0.9, "--guarantee", 0.9, "--bootstrap", 200, "--ensemble", *members)
    done = succeed("calibrate", *flags, "--out", "outputs/both", cwd=tmp_path)
    assert "ensemble of 2 runs" in done.out
    scores = [Run(tmp_path / f).scores() for f in (*members, "outputs/both")]
    for part in ("val", "test"):
        a, b, both = (s[f"{part}_p1"] for s in scores)
        assert np.allclose(both, (a + b) / 2, atol=1e-6) and a.std() > 1e-4
    run = Run(tmp_path / "outputs/both")
    assert (
        run.kind == "ensemble" and run.results["params"] == 2 * Run(tmp_path / members[0]).results["params"]
    )
    rows = succeed("predict", "xray/test", "--run", "outputs/both", cwd=tmp_path).out.splitlines()[1:]
    assert [float(r.split(",")[1]) for r in rows] == six_digits(scores[2]["test_p1"])
    assert "ensemble" in succeed("compare", cwd=tmp_path).out
    succeed("explain", "--run", "outputs/both", "--tests", 2, cwd=tmp_path)
    refused(cli("calibrate", *flags, "--out", "outputs/both", cwd=tmp_path), "--overwrite")
    for wrong, word in ((members[:1], "two or more"), (["outputs/both", members[0]], "ensemble")):
        argv = ("--ensemble", *wrong, "--out", "outputs/x")
        refused(cli("calibrate", *argv, cwd=tmp_path), word)
    refused(cli("calibrate", "--ensemble", *members, cwd=tmp_path), "--out")
    (tmp_path / "file").write_text("")
    for flags, word in (
        (("--out", "outputs/../outputs/scratch-seed0", "--overwrite"), "one of the members"),
        (("--out", "file"), "is a file"),
        (("--out", "outputs/both", "--overwrite", "--data-dir", "nowhere"), "nowhere"),
    ):
        refused(cli("calibrate", "--ensemble", *members, *flags, cwd=tmp_path), word)
    assert Run(tmp_path / members[0]).kind == "vit" and Run(tmp_path / "outputs/both").calibrated() == [""]
    results = files.read_json(tmp_path / members[1] / "results.json")
    write_json(tmp_path / members[1] / "results.json", {**results, "finished": False})
    refused(cli("calibrate", "--ensemble", *members, "--out", "outputs/x", cwd=tmp_path), "is not finished")
    assert not (tmp_path / "outputs/x").exists()


def test_an_ensemble_names_the_hospitals_of_all_its_members(bench, tmp_path):
    """Whichever member is named first."""
    shutil.copytree(bench / "outputs", tmp_path / "outputs")
    members = [tmp_path / f"outputs/scratch-seed{seed}" for seed in (0, 1)]
    results = files.read_json(members[1] / "results.json")
    results["split"]["also"] = {"elsewhere": {"train": 3}}
    write_json(members[1] / "results.json", results)
    for name, order in (("a", members), ("b", members[::-1])):
        run = make_ensemble(order, tmp_path / name, overwrite=False, ready=lambda results: None)
        assert also_trained_on(run.results) == {"elsewhere": 3}


def test_members_on_other_images_make_no_ensemble(bench, tmp_path):
    """Another validation split, or other settings: one line, nothing written."""
    shutil.copytree(bench / "outputs", tmp_path / "outputs")
    path = tmp_path / "outputs/scratch-seed1/results.json"
    results = files.read_json(path)
    write_json(path, {**results, "split": {**results["split"], "fingerprint": "0"}})
    argv = ("--ensemble", "outputs/scratch-seed0", "outputs/scratch-seed1", "--out", "outputs/x")
    refused(cli("calibrate", *argv, cwd=tmp_path), "differ in split")
    assert not (tmp_path / "outputs/x").exists()


def test_scores_are_arrays_of_findings(bench):
    """Truth against the folders that files lie in, scores against the logits and predict.py's CSV; the same
    of an older scores.npz, which held no scores."""
    run = Run(bench / "outputs/linear")
    found = run.scores()
    assert found["findings"].tolist() == ["PNEUMONIA"]
    for side, count in (("val", 84), ("test", 60)):
        names, logits = found[f"{side}_files"], found[f"{side}_logits"].astype(float)
        truth, scores = found[f"{side}_truth"], found[f"{side}_scores"]
        assert truth.dtype == np.int8 and truth[:, 0].tolist() == ["/PNEUMONIA/" in f for f in names]
        assert scores.dtype == np.float64 and scores.shape == (count, 1) == truth.shape
        assert scores[:, 0] == pytest.approx(1 / (1 + np.exp(logits[:, 0] - logits[:, 1])), rel=1e-12)
        older = {name: array for name, array in run.saved_scores().items() if not name.endswith("_p1")}
        again = scores_module.with_findings(older, "x", run.task, run.calibration())
        assert np.array_equal(again[f"{side}_scores"], scores)


def test_scores_of_several_findings():
    """Columns as Task has them: "any finding" first, unknown labels -1."""
    task = Task(("No Finding", "Mass"), "sigmoid")
    labels = np.array([[1, 0], [0, 1], [-1, -1]])
    arrays = {f"{side}_labels": labels for side in ("val", "test")}
    arrays |= {f"{side}_logits": np.array([[2.0, -1.0]] * 3) for side in ("val", "test")}
    plain = {"temperature": 1.0, "temperature_applied": False}
    found = scores_module.with_findings(arrays, "x", task, plain)
    assert found["findings"].tolist() == ["any finding", "No Finding", "Mass"]
    assert found["val_truth"].tolist() == [[0, 1, 0], [1, 0, 1], [-1, -1, -1]]
    expected = [1 / (1 + np.exp(2)), 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(1))]
    assert found["test_scores"] == pytest.approx(np.array([expected] * 3))
    for damage in (
        {"val_labels": labels[:, 0]},
        {"val_p1": np.zeros((3, 2))},
        {"val_p1": np.array(["a"] * 9)},
    ):
        with pytest.raises(InputError, match="the scores of x are damaged"):
            scores_module.with_findings(arrays | damage, "x", task, plain)
