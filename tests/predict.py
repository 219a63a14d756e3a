"""Tests of predict."""

import csv
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import images
import metrics
from inputs import Inputs
from run import Run
from tests.fixtures import FLOOR
from tests.shared import cli, file_list, predict_rows, refused, save_dicom


@pytest.mark.parametrize("tta", [False, True])
def test_predict_reproduces_calibrate_exactly(bench, tta):
    flags, suffix = (["--tta"], "-tta") if tta else ([], "")
    run = "outputs/scratch-seed0"
    if tta:
        assert cli("calibrate", "--run", run, "--tta", *FLOOR, cwd=bench).code == 0
    predictions = predict_rows(bench, "xray/test", "--run", run, *flags)
    with np.load(bench / run / f"scores{suffix}.npz") as file:
        assert [r["path"] for r in predictions] == [f"xray/{f}" for f in file["test_files"]]
        assert [float(r["p_pneumonia"]) for r in predictions] == file["test_p1"].tolist()
        thr = common.read_json(bench / run / f"calibration{suffix}.json")["threshold"]
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
    from predict import unlike

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
    import predict

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


def test_export_matches_pytorch(bench):
    onnx, _, runtime = (pytest.importorskip(n) for n in ("onnx", "onnxscript", "onnxruntime"))
    run = "outputs/scratch-seed0"
    assert cli("predict", "--export", "m.onnx", "--run", run, cwd=bench).code == 0
    meta = {p.key: p.value for p in onnx.load(bench / "m.onnx").metadata_props}
    assert float(meta["threshold@Rec"]) == common.read_json(bench / run / "calibration.json")["threshold"]
    pixels = np.stack([images.decode(bench / "xray" / f, 32) for f in file_list(bench, run)[:5]])
    got = runtime.InferenceSession(str(bench / "m.onnx")).run(
        None, {"image": pixels[:, None].astype(np.float32) / 255}
    )[0]
    run = Run(bench / run)
    inputs = Inputs.of_run(run.results, torch.device("cpu")).on("cpu")
    with torch.inference_mode():
        logits = inputs.logits(run.model(), inputs.grey(pixels))
    assert got == pytest.approx(metrics.tempered(logits.numpy(), 1.0), abs=1e-4)


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
