"""Hostile and unlucky files: whatever is in them, a script ends with exit code 2 and one line. Nothing is
lost."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch

from common import safe_files
from common.console import InputError
from records.run import Run
from tests.shared import cli, read_json, refused, with_changes


@pytest.mark.parametrize(
    "script, argv",
    [
        ("train_linear", ["--C", "inf"]),
        ("train_linear", ["--C", "nan"]),
        ("train_linear", ["--C", "-1"]),
        ("train_pretrained", ["--std", "nan", "1", "1"]),
        ("train_pretrained", ["--std", "0", "1", "1"]),
        ("train_pretrained", ["--mean", "inf", "0", "0"]),
        ("train_pretrained", ["--freeze-epochs", str(2**70)]),
        ("pretrain_mae", ["--mask-ratio", "nan"]),
        ("pretrain_mae", ["--mask-ratio", "inf"]),
        ("train_scratch", ["--batch-size", str(2**64)]),
        ("train_scratch", ["--img-size", "5000"]),
        ("train_scratch", ["--device", "meta"]),
        ("train_scratch", ["--device", "hpu"]),
        ("train_scratch", ["--device", "privateuseone"]),
        ("calibrate", ["--bootstrap", str(10**9)]),
        ("calibrate", ["--min-recall", "nan"]),
        ("calibrate", ["--prevalence", "inf"]),
        ("calibrate", ["--batch-size", str(10**12)]),
        ("predict", ["x.png", "--batch-size", str(10**12)]),
        ("explain", ["--tests", str(10**12)]),
        ("studies.benchmark", ["--images", str(10**12)]),
    ],
)
def test_numbers_are_finite_and_have_ranges(script, argv, flags, tmp_path):
    data = flags if script.startswith(("train", "pretrain")) else []
    refused(cli(script, *data, *argv, cwd=tmp_path), argv[-4] if argv[0] in ("--std", "--mean") else argv[-2])
    assert list(tmp_path.iterdir()) == []


def deep(results):
    return "[" * 100_000


def changed(**values):
    """results.json with other values at the top."""
    return lambda results: json.dumps({**results, **values})


def configured(**values):
    """results.json with another model_config."""
    return lambda results: json.dumps({**results, "model_config": {**results["model_config"], **values}})


def data_changed(**values):
    return lambda results: json.dumps({**results, "data": {**results["data"], **values}})


DAMAGED_RESULTS = {
    "nested 100,000 deep": deep,
    "zeros": lambda r: "0" * 4000,
    "a huge integer": changed(params=10**400),
    "a huge minute count": changed(minutes=10**400),
    "a negative best epoch": changed(best_epoch=-1),
    "a list as kind": configured(kind=["vit"]),
    "strings as history": changed(history=["epoch 1"]),
    "a depth of 10^9": configured(depth=10**9),
    "a width of 10^9": configured(embed_dim=10**9),
    "a negative width": configured(embed_dim=-256),
    "no heads": configured(num_heads=0),
    "a fraction of a head": configured(num_heads=1.5),
    "a patch of 0": configured(patch_size=0),
    "an image size of 5000": configured(img_size=5000),
    "an image size of 2000": configured(img_size=2000),
    "a list of image sizes": configured(img_size=[]),
    "a dropout of 7": configured(drop_rate=7),
    "10^9 classes": configured(num_classes=10**9),
    "another class": configured(num_classes=3),
    "a data size of 5000": data_changed(img_size=5000),
    "a negative data size": data_changed(img_size=-1),
    "a NUL in a path": data_changed(data_dir="a\0b"),
    "a number as path": data_changed(cache_dir=7),
    "an unknown resize": data_changed(resize=["squash"]),
    "numbers as classes": data_changed(classes=[1, 2]),
    "NaN as mean": changed(mean=[math.nan] * 3),
    "a std of 0": changed(std=[0, 1, 1]),
    "two channels": changed(mean=[0.5], std=[0.5]),
    "text as split": changed(split="patient"),
    "text as recipe": changed(recipe="paper"),
}


@pytest.mark.parametrize("damage", DAMAGED_RESULTS)
def test_damaged_results(bench, tmp_path, damage):
    """Nothing is built or allocated from sizes that the checkpoint does not have."""
    run = tmp_path / "run"
    shutil.copytree(bench / "outputs/scratch-seed0", run)
    results = read_json(run, "results.json")
    (run / "results.json").write_text(DAMAGED_RESULTS[damage](results))
    for script in ("calibrate", "predict"):
        done = cli(script, *(["xray/test"] if script == "predict" else []), "--run", run, cwd=bench)
        refused(done, "run")
        assert len(done.err.strip().splitlines()) == 1, done.err


@pytest.mark.parametrize(
    "changes",
    [
        {"findings": []},
        {"findings": {"PNEUMONIA": 3}},
        {"findings": {"PNEUMONIA": {"why_not": "too few", "curves": {}}}},
        {"summary": {"val": {}, "test": {}}},
        {"curves": {"val": {"auroc": 0.5}}},
        {"guarantee": []},
        {"guarantee": {"threshold": "0.5", "confidence": 0.95, "positive_patients": 3}},
        {"val": {"at_rec": 0.5, "at_0.5": 0.5}},
        {"test": [1]},
        {"threshold": True},
        {"threshold": 1e400},
        {"temperature": 10**400},
        {"probability": {"val": 1, "test": 2}},
        {"checkpoint": None},
        {"bootstrap": -1},
        {"format": True},
    ],
)
def test_damaged_calibration(bench, tmp_path, changes):
    run = tmp_path / "run"
    shutil.copytree(bench / "outputs/linear", run)
    value = with_changes(read_json(run, "calibration.json"), changes)
    (run / "calibration.json").write_text(json.dumps(value))
    for script in ("compare", "predict"):
        done = cli(script, *(["xray/test"] if script == "predict" else []), "--run", run, cwd=bench)
        refused(done, "calibration.json")


def test_truncated_checkpoint_of_a_linear_run(bench, tmp_path):
    """What a full disk or a broken copy leaves, cut anywhere."""
    run = tmp_path / "run"
    shutil.copytree(bench / "outputs/linear", run)
    raw = (run / "checkpoint.pth").read_bytes()
    for size in [*range(0, len(raw), len(raw) // 25), len(raw) - 1]:
        (run / "checkpoint.pth").write_bytes(raw[:size])
        with pytest.raises(InputError, match="checkpoint.pth"):
            Run(run).model()
    refused(cli("calibrate", "--run", run, cwd=bench), "checkpoint.pth")


@pytest.mark.parametrize("name", ["results.json", "checkpoint.pth", "scores.npz", "calibration.json"])
def test_named_pipes_do_not_hang(bench, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(bench / "outputs/linear", run)
    (run / name).unlink()
    os.mkfifo(run / name)
    refused(cli("compare", "--run", run, cwd=bench), name)
    if name in ("results.json", "checkpoint.pth"):
        refused(cli("calibrate", "--run", run, cwd=bench), name)
        refused(cli("predict", "xray/test", "--run", run, cwd=bench), name)


@pytest.mark.parametrize("kind", ["meta", "sparse", "scalar", "empty", "integer key", "expanded", "half"])
def test_strange_tensors_in_a_checkpoint(bench, tmp_path, kind):
    run = tmp_path / "run"
    shutil.copytree(bench / "outputs/linear", run)
    state = safe_files.load_tensors(run / "checkpoint.pth")
    weight = state["head.weight"]
    strange = {
        "meta": weight.to("meta"),
        "sparse": weight.to_sparse(),
        "scalar": torch.tensor(1.0),
        "empty": weight[:0],
        "integer key": weight,
        "expanded": torch.zeros(1).expand(weight.shape[0], 10**10),
        "half": weight[:1],
    }[kind]
    state[3 if kind == "integer key" else "head.weight"] = strange
    torch.save(state, run / "checkpoint.pth")
    refused(cli("calibrate", "--run", run, cwd=bench), "checkpoint.pth")


def test_scores_that_promise_too_much(bench, tmp_path):
    """An array whose header claims 10^12 numbers: refused before anything is allocated."""
    run = tmp_path / "run"
    shutil.copytree(bench / "outputs/linear", run)
    header = (
        b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    )
    with np.load(run / "scores.npz") as file:
        arrays = dict(file)
    np.savez(run / "scores.npz", **{k: v for k, v in arrays.items() if k != "val_p1"})
    import zipfile

    with zipfile.ZipFile(run / "scores.npz", "a") as file:
        file.writestr("val_p1.npy", header.ljust(127) + b"\n" + bytes(80))
    refused(cli("compare", "--run", run, cwd=bench), "scores.npz")
