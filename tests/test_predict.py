"""Tests of predict."""

import csv
import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from calibration import ensemble
from common.files import read_json, write_json
from data import load_split
from images import decode
from models import inputs as inputs_module
from models.inputs import Inputs
from records import onnx as onnx_module
from records.run import Run
from tests.fixtures import FLOOR
from tests.shared import (
    WRITES_ONNX,
    cli,
    file_list,
    of_one,
    predict_rows,
    refused,
    save_dicom,
    six_digits,
    succeed,
    tempered,
)


@pytest.mark.parametrize("tta", [False, True])
def test_predict_reproduces_calibrate_exactly(bench, tta):
    flags, suffix = (["--tta"], "-tta") if tta else ([], "")
    run = "outputs/scratch-seed0"
    if tta:
        assert cli("calibrate", "--run", run, "--tta", *FLOOR, cwd=bench).code == 0
    predictions = predict_rows(bench, "xray/test", "--run", run, *flags)
    with np.load(bench / run / f"scores{suffix}.npz") as file:
        assert [r["path"] for r in predictions] == [f"xray/{f}" for f in file["test_files"]]
        assert [float(r["p_pneumonia"]) for r in predictions] == six_digits(file["test_p1"])
        thr = of_one(read_json(bench / run / f"calibration{suffix}.json"))["threshold"]
        assert [r["decision@Rec"] == "PNEUMONIA" for r in predictions] == (file["test_p1"] >= thr).tolist()
        assert [r["decision@0.5"] == "PNEUMONIA" for r in predictions] == (file["test_p1"] >= 0.5).tolist()
    backwards = [f"xray/{f}" for f in file_list(bench, run)[::-1][:7]]  # other batches, same scores
    again = predict_rows(bench, *backwards, "--run", run, "--batch-size", 3, *flags)
    by_path = {r["path"]: r["p_pneumonia"] for r in predictions}
    assert [float(r["p_pneumonia"]) for r in again] == pytest.approx(
        [float(by_path[b]) for b in backwards], abs=2e-3
    )


def test_predict_reports_bad_and_odd_files_and_goes_on(bench):
    odd = bench / "odd"
    odd.mkdir(exist_ok=True)
    good = sorted((bench / "xray/test/NORMAL").iterdir())[0]
    Image.open(good).convert("L").save(odd / "a_good.png")
    (odd / "b_empty.png").write_bytes(b"")
    (odd / "c_text.jpg").write_text("no image")
    (odd / "d_cut.jpeg").write_bytes(good.read_bytes()[:600])
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (300, 300, 3), dtype=np.uint8)).save(odd / "e_colour.png")
    grey = np.asarray(Image.open(good).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(odd / "f_16bit.png")
    Image.fromarray(grey.astype(np.uint16) * 16).save(odd / "h_12bit.png")
    (odd / "g.dcm").write_text("no dicom")
    done = cli("predict", "odd", "--run", "outputs/linear", cwd=bench)
    assert done.code == 2 and "4 of 8" in done.err and "Traceback" not in done.err
    rows = list(csv.DictReader(io.StringIO(done.out)))
    by = {Path(r["path"]).name[0]: r for r in rows}
    assert len(rows) == 8 and [k for k in by if by[k]["p_pneumonia"] == ""] == ["b", "c", "d", "g"]
    assert all(by[k]["note"].startswith("unreadable") for k in "bcdg")
    assert "colour photograph" in by["e"]["note"]
    assert float(by["f"]["p_pneumonia"]) == pytest.approx(float(by["h"]["p_pneumonia"]), abs=1e-6)
    assert cli("predict", "nowhere/*.png", "--run", "outputs/linear", cwd=bench).code == 2
    assert cli("predict", "odd", "--run", "nowhere", cwd=bench).code == 2


def test_predict_notes_what_is_unlike_the_training_images():
    from calibration.shift import unlike

    results = {
        "input_range": {"mean": [0.3, 0.6], "std": [0.1, 0.3]},
        "split": {"original_size": {"width": [400, 2000], "height": [500, 500]}},
    }
    image = np.r_[np.full((8, 16), 60), np.full((8, 16), 160)].astype(np.uint8)  # mean 0.43, std 0.2
    assert unlike(image, (400, 7), 0.0, results) == ""  # one single training height tells nothing
    assert "width 2001 px outside the training range 400 to 2000" in unlike(image, (2001, 500), 0.0, results)
    assert "brightness 0.20" in unlike(image - 59, (400, 500), 0.0, results)
    assert "contrast 0.00" in unlike(np.full((16, 16), 100, np.uint8), (400, 500), 0.0, results)
    assert "colour photograph" in unlike(image, (400, 500), 0.2, results)


def test_predict_reads_dicom(bench):
    """8 bits, plain, inverted and without a name, have the PNG's score; 12 bits that of the 16-bit PNG."""
    grey = np.asarray(Image.open(sorted((bench / "xray/test/PNEUMONIA").iterdir())[0]).convert("L"))
    folder = bench / "dicom"
    folder.mkdir(exist_ok=True)
    Image.fromarray(grey).save(folder / "a.png")
    save_dicom(folder / "b.dcm", 255 - grey, 8, "MONOCHROME1")
    save_dicom(folder / "c_0001", grey)
    deep = grey.astype(np.uint16) * 10 + 7
    Image.fromarray(deep).save(folder / "d.png")
    save_dicom(folder / "e.dcm", deep, 12)
    (folder / "f.txt").write_text("some notes")
    done = cli("predict", "dicom", "--run", "outputs/linear", cwd=bench)
    scores = [row["p_pneumonia"] for row in csv.DictReader(io.StringIO(done.out))]
    assert done.code == 0 and len(scores) == 5 and len(set(scores[:3])) == len(set(scores[3:])) == 1
    said = "passed over: 1 .txt; recognised by content, not by name: 1 without extension"
    assert f"note: dicom: {said}\n" in done.err
    (bench / "nothing").mkdir(exist_ok=True)
    (bench / "nothing/f.txt").write_text("some notes")
    refused(
        cli("predict", "nothing", "--run", "outputs/linear", cwd=bench), "WebP and DICOM", "there is: 1 .txt"
    )


@pytest.mark.parametrize("tag", range(2, 9))
def test_predict_scores_turned_files_alike(bench, tag):
    path = sorted((bench / "xray/test/PNEUMONIA").iterdir())[0]
    grey = Image.open(path).convert("L")
    stored = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    stored |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}  # what the tag says must be undone
    folder, exif = bench / "turned", Image.Exif()
    folder.mkdir(exist_ok=True)
    exif[0x0112] = tag
    grey.save(folder / "a.png")
    grey.transpose(Image.Transpose[stored[tag]]).save(folder / "b.png", exif=exif)
    plain, turned = predict_rows(bench, "turned", "--run", "outputs/linear")
    assert plain.pop("path") != turned.pop("path") and plain == turned


def test_predict_streams(bench):
    """Files are taken from the iterator batch by batch: never more than two batches are in the air."""
    scorer = predict.Scorer(Run(bench / "outputs/linear"), torch.device("cpu"), tta=False)
    path, taken = str(bench / "xray" / file_list(bench, "outputs/linear")[0]), 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield path

    rows = scorer.rows(endless(), batch_size=4)
    for i in range(1, 30):
        next(rows)
        assert taken <= 4 * (2 + i // 4 + 1)


@pytest.fixture(scope="module")
def halves(bench):
    """A run whose checkpoint was trained in bf16 and whose calibration was made in it."""
    folder = bench / "half"
    shutil.copytree(bench / "outputs/scratch-seed0", folder / "run")
    results = read_json(folder / "run/results.json")
    write_json(folder / "run/results.json", {**results, "recipe": {**results["recipe"], "amp": True}})
    fast, inputs_module.fast_bf16 = inputs_module.fast_bf16, lambda device: True
    try:
        assert cli("calibrate", "--run", folder / "run", *FLOOR, cwd=bench).code == 0
        assert cli("calibrate", "--run", folder / "run", *site_of("here"), cwd=bench).code == 0
    finally:
        inputs_module.fast_bf16 = fast
    return Run(folder / "run")


def site_of(name):
    return ("--site", "xray/test", "--name", name, "--min-recall", 0.8, "--bootstrap", 100)


def test_precision_belongs_to_the_calibration(bench, halves, monkeypatch):
    """Calibrated in bf16, then scored on a machine that is slow in it (as this one is made to believe): the
    very same scores from predict, explain and for a site."""
    import explain

    kept, plain = halves.scores(), Run(bench / "outputs/scratch-seed0").scores()
    assert (
        halves.calibration()["precision"] == "bf16"
        and np.abs(kept["test_p1"] - plain["test_p1"]).max() > 1e-6
    )
    rows = predict_rows(bench, "xray/test", "--run", halves)
    assert [float(r["p_pneumonia"]) for r in rows] == six_digits(kept["test_p1"])
    monkeypatch.chdir(bench)
    explainer = explain.Explainer(halves, torch.device("cpu"), methods=["gradcam"])
    assert np.array_equal(explainer.scores(load_split(halves, "test")), kept["test_p1"])
    sites = []
    for name in ("here", "there"):  # made where bf16 is fast, and where it is not
        assert name == "here" or cli("calibrate", "--run", halves, *site_of(name), cwd=bench).code == 0
        sites.append(halves.site(name)["findings"])
    assert sites[0] == sites[1]
    done = cli("predict", "xray/test/NORMAL", "--run", halves, cwd=bench)
    assert "calibrated in bf16" in done.err and "slow" in done.err
    plain_run = cli("predict", "xray/test/NORMAL", "--run", "outputs/scratch-seed0", cwd=bench)
    assert "bf16" not in plain_run.err


def test_members_in_different_precision_are_named(bench, halves, capsys):
    other = Run(bench / "outputs/scratch-seed1")
    ensemble.say_precision([halves, other])
    said = capsys.readouterr().err
    assert f"bf16: {halves}" in said and f"fp32: {other}" in said
    ensemble.say_precision([other, Run(bench / "outputs/scratch-seed0")])
    assert capsys.readouterr().err == ""


def test_a_calibration_in_fp32_is_scored_so_where_bf16_is_fast(bench, halves, monkeypatch, tmp_path):
    run = Run(shutil.copytree(halves.folder, tmp_path / "run"))
    assert cli("calibrate", "--run", run, *FLOOR, cwd=bench).code == 0
    assert run.calibration()["precision"] == "fp32"
    monkeypatch.setattr(inputs_module, "fast_bf16", lambda device: True)
    rows = predict_rows(bench, "xray/test", "--run", run)
    assert [float(r["p_pneumonia"]) for r in rows] == six_digits(run.scores()["test_p1"])
    refused(cli("predict", "xray/test", "--run", run, "--site", "here", cwd=bench), "another precision")


def test_precision_that_cannot_be_had_or_was_not_kept_is_said(bench, halves, monkeypatch, tmp_path):
    """A device without bf16: fp32, and why scores differ. A calibration of an older version: bf16, if the run
    was trained so."""
    kept = halves.scores()["test_p1"]
    run = Run(shutil.copytree(halves.folder, tmp_path / "run"))
    old = {k: v for k, v in run.calibration().items() if k != "precision"}
    write_json(run.folder / "calibration.json", old)
    done = succeed("predict", "xray/test", "--run", run, cwd=bench)
    assert "older version, which kept no precision: bf16 is taken" in done.err
    scores = [float(r["p_pneumonia"]) for r in csv.DictReader(io.StringIO(done.out))]
    assert scores == six_digits(kept)
    monkeypatch.setattr(inputs_module, "can_bf16", lambda device: False)
    done = succeed("predict", "xray/test", "--run", halves, cwd=bench)
    assert "calibrated in bf16, which cpu cannot do here: fp32 is used" in done.err
    scores = [float(r["p_pneumonia"]) for r in csv.DictReader(io.StringIO(done.out))]
    assert 1e-5 < np.abs(scores - kept).max() < 0.02


@WRITES_ONNX
def test_export_matches_pytorch_and_counts_decisions_that_precision_changes(bench, halves, monkeypatch):
    """The file computes in fp32 what was calibrated in bf16: its probabilities and the count are those of a
    pass in fp32 by hand."""
    onnx, _, runtime = (pytest.importorskip(n) for n in ("onnx", "onnxscript", "onnxruntime"))
    done = succeed("predict", "--export", "half.onnx", "--run", halves, cwd=bench)
    meta = {p.key: p.value for p in onnx.load(bench / "half.onnx").metadata_props}
    assert meta["precision"] == "fp32" and meta["calibrated in"] == "bf16"
    kept, threshold = halves.scores(), of_one(halves.calibration())["threshold"]
    assert float(meta["threshold@Rec"]) == threshold
    pixels = np.stack([decode.decode(bench / "xray" / f, 32) for f in kept["val_files"]])
    inputs = Inputs.of_run(halves.results, torch.device("cpu"))  # fp32 here
    with torch.inference_mode():
        p = tempered(inputs.logits(halves.model(), inputs.grey(pixels)).numpy(), 1.0)
    session = runtime.InferenceSession(str(bench / "half.onnx"))
    got = session.run(None, {"image": pixels[:5, None].astype(np.float32) / 255})[0]
    assert got == pytest.approx(p[:5], abs=1e-5)
    changed = [((kept["val_p1"] >= t) != (p >= t)).sum() for t in (0.5, threshold)]
    close = [(np.abs(p - t) < 1e-6).sum() for t in (0.5, threshold)]  # rounding may turn these either way
    said = re.search(r"\(bf16 there, fp32 here\): @0.5 (\d+) of (\d+), @Rec (\d+) of", done.out)
    assert int(said[2]) == len(p) and np.abs(p - kept["val_p1"]).max() > 1e-6
    for k, group in enumerate((1, 3)):
        assert abs(int(said[group]) - changed[k]) <= close[k]
    scorer = predict.Scorer(halves, torch.device("cpu"), tta=False)
    monkeypatch.chdir(bench.parent)  # the images are not where they were
    assert "could not be counted: " in onnx_module.counted(scorer, None)


def test_exported_views_are_those_of_test_time_augmentation(bench):
    """A graph of a run calibrated with --tta averages over the same views."""
    run = Run(bench / "outputs/scratch-seed1")
    assert cli("calibrate", "--run", run, "--tta", *FLOOR, cwd=bench).code == 0
    kept, scorer = run.scores("tta"), predict.Scorer(run, torch.device("cpu"), tta=True)
    pixels = np.stack([decode.decode(bench / "xray" / f, 32) for f in kept["test_files"]])[:, None]
    with torch.inference_mode():
        model = onnx_module.Exported(scorer.model, scorer.inputs.on("cpu"), scorer.task, 1.0)
        got = model(torch.from_numpy(pixels).float() / 255).numpy()
    assert got == pytest.approx(kept["test_p1"], abs=1e-5)
    assert np.abs(kept["test_p1"] - run.scores()["test_p1"]).max() > 1e-3


def test_predict_goes_on_after_whatever_one_file_raises(bench):
    """A float TIFF with a NaN pixel under another name, a named pipe, a name that is no Unicode."""
    folder = bench / "strange"
    folder.mkdir(exist_ok=True)
    good = sorted((bench / "xray/test/NORMAL").iterdir())[0]
    Image.open(good).convert("L").save(folder / "a.png")
    pixels = np.full((40, 40), 0.5, np.float32)
    pixels[3, 3] = np.nan
    Image.fromarray(pixels).save(folder / "b.png", format="TIFF")
    os.mkfifo(folder / "c.dcm")
    Image.open(good).save(os.path.join(os.fsencode(folder), b"d\xff.jpeg").decode("utf-8", "surrogateescape"))
    done = cli("predict", "strange", "--run", "outputs/linear", cwd=bench)
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert done.code == 2 and [bool(r["p_pneumonia"]) for r in rows] == [True, False, True], done.err
    shutil.rmtree(folder)
