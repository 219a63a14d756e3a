"""Views that belong to a run (--test-views 7): all that score it do so with the seven views, unasked."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

import explain
import predict
from auditing.reader import Reader
from calibration.ensemble import make_ensemble
from common import scripts
from common.files import write_json
from data import load_split
from images.augment import tta_views
from models.inputs import Inputs
from records import onnx as onnx_module
from records.run import Run
from tests.shared import CPU, cli, load_pth, predict_rows, read_json, refused, strip_time, succeed
from training.earlier.teacher import Teacher

# Zoom, and shift of the image to the left and up as a share of its side: what docs/MODELS.md says.
SEVEN = ((1, 0, 0), (1, 0.03, 0), (1, -0.03, 0), (1, 0, 0.03), (1, 0, -0.03), (0.95, 0, 0), (1.05, 0, 0))
ONLY = ("--bootstrap", 100, "--min-recall", 0.9)


def moved(images, zoom, left, up):
    """Images [N, S, S], zoomed about the middle, then moved, by interpolation of scipy's; 0 from outside."""
    side = images.shape[-1]
    places = np.arange(side) + 0.5 - side / 2  # pixel centres, from the middle
    rows, columns = (places / zoom + share * side for share in (up, left))
    at = np.stack(np.meshgrid(rows, columns, indexing="ij")) + side / 2 - 0.5
    return np.stack([map_coordinates(image, at, order=1, mode="grid-constant") for image in images])


def logits_by_hand(run, pixels, views=SEVEN):
    """uint8 [N, S, S] -> the mean logits of a run over explicit views, float64 [N, 2]; it is shown all."""
    grey, every, model = pixels.astype(np.float64) / 255, [], run.model()
    mean, std = (np.array(run.results[k]).reshape(1, -1, 1, 1) for k in ("mean", "std"))
    for view in views:
        x = (moved(grey, *view)[:, None] - mean) / std
        with torch.inference_mode():
            every.append(model(torch.from_numpy(x).float()).double().numpy())
    return np.mean(every, axis=0)


def probability(logits):
    """Of class 1 of two."""
    return 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))


@pytest.fixture(scope="module")
def seven(own_build, flags):
    """Of one short training, calibrated: scratch and linear with seven views; plain, scratch with one."""

    def build(folder):
        short = (*flags, "--epochs", 1, "--max-steps", 3, "--batch-size", 16)
        succeed("train_scratch", *short, "--test-views", 7, cwd=folder)
        succeed("train_scratch", *short, "--out", "outputs/plain", cwd=folder)
        succeed("train_linear", *flags, "--test-views", 7, cwd=folder)
        succeed("calibrate", *ONLY, cwd=folder)

    return own_build("seven", build)[0]


@pytest.mark.parametrize("name", ["scratch", "linear"])
def test_a_run_with_views_is_calibrated_and_predicted_by_them_unasked(seven, synthetic, name):
    run = Run(seven / "outputs" / name)
    assert run.results["recipe"]["test_views"] == 7 and not list(run.folder.glob("*-tta*"))
    scores, calibration = run.scores(), run.calibration()
    assert calibration["tta"] == {"flip": False} and run.calibrated() == [""]
    for side in ("val", "test"):
        pixels = load_split(run, side).pixels()
        expected = probability(logits_by_hand(run, pixels))
        assert np.allclose(scores[f"{side}_p1"], expected, atol=1e-5)
        assert np.abs(expected - probability(logits_by_hand(run, pixels, SEVEN[:1]))).max() > 1e-4
    rows = predict_rows(seven, "--run", run, synthetic / "test")
    known = dict(zip(scores["test_files"], scores["test_p1"]))
    for row in rows:
        file = str(row["path"]).removeprefix(f"{synthetic}/")
        assert float(row["p_pneumonia"]) == pytest.approx(known[file], abs=1e-5)


def test_explain_audit_and_the_onnx_file_follow_the_views_of_a_run(seven, synthetic):
    run = Run(seven / "outputs/scratch")
    val = load_split(run, "val")
    expected = run.scores()["val_p1"]
    explainer = explain.Explainer(run, CPU, methods=["gradcam"])
    assert np.allclose(explainer.scores(val), expected, atol=1e-6)
    with torch.inference_mode():
        found, _ = Reader(run, CPU, "PNEUMONIA").outputs(val.pixels(), None)
        assert np.allclose(found, expected, atol=1e-6)
        scorer = predict.Scorer(run, CPU)
        exported = onnx_module.Exported(scorer.model, scorer.inputs, scorer.task, 1.0)
        grey = torch.from_numpy(val.pixels()[:, None]).float() / 255
        assert np.allclose(exported(grey).numpy(), expected, atol=1e-5)
    assert json.loads(onnx_module.described(scorer)["views"]) == {"flip": False}
    uncalibrated = Run(shutil.copytree(run.folder, seven / "bare"))
    (uncalibrated.folder / "calibration.json").unlink()
    assert len(Reader(uncalibrated, CPU, "PNEUMONIA").inputs.views) == 7
    done = succeed("explain", "--run", run, "--method", "gradcam", "--tests", 0, cwd=seven)
    assert "averaged over 7 shifted and zoomed views; its maps are of the image itself" in done.err


def test_tta_of_a_run_with_views_of_its_own(seven, synthetic, tmp_path):
    """--tta adds nothing, in one line; mirrored views are refused; other runs have --tta as before."""
    before = read_json(seven, "outputs/linear/calibration.json")["findings"]
    done = succeed(
        "calibrate", "--run", "outputs/linear", "--tta", "--bootstrap", 100, "--min-recall", 0.5, cwd=seven
    )
    assert done.err.count("note: --tta changes nothing of outputs/linear") == 1
    assert "outputs/linear keeps its calibration" in done.err
    assert not list(seven.glob("outputs/linear/*-tta*"))
    assert read_json(seven, "outputs/linear/calibration.json")["findings"] == before
    plain = predict_rows(seven, "--run", "outputs/linear", synthetic / "test")
    assert predict_rows(seven, "--run", "outputs/linear", "--tta", synthetic / "test") == plain
    words = "--tta-flip: the score of outputs/linear is averaged over 7", "leave the flag out"
    refused(cli("calibrate", "--run", "outputs/linear", "--tta-flip", *ONLY, cwd=seven), *words)
    log = tmp_path / "log.csv"
    rows = [f"{i}.png,{i % 2},{'PNEUMONIA' if i % 2 else 'NORMAL'}" for i in range(8)]
    log.write_text("\n".join(["path,score,diagnosis", *rows]))
    done = succeed("monitor", "--run", "outputs/linear", "--tta", log, cwd=seven)
    threshold = before["PNEUMONIA"]["threshold"]
    assert f"linear: threshold {threshold:.4f}" in done.out and "--tta changes nothing" in done.err


def test_thresholds_of_a_site_are_chosen_on_the_views_of_the_run(seven, synthetic):
    argv = ("--run", "outputs/linear", "--site", synthetic / "test", "--name", "clinic", "--min-recall", 0.9)
    succeed("calibrate", *argv, "--tta", cwd=seven)
    assert not (seven / "outputs/linear/sites/clinic-tta.json").exists()
    site = Run(seven / "outputs/linear").site("clinic")
    assert site["scores"]["tta"] == {"flip": False}


def test_thresholds_chosen_with_other_views_are_refused(seven, tmp_path):
    """As those that another version made, or of results.json edited since."""
    for name, views, said in (("linear", 1, "averaged over 7"), ("plain", 7, "that of the image itself")):
        run = Run(shutil.copytree(seven / "outputs" / name, tmp_path / name))
        results, words = run.results, (f"{name}/calibration.json was made with other views", f"was {said}")
        run.save_results({**results, "recipe": {**results["recipe"], "test_views": views}})
        refused(cli("predict", "x.png", "--run", name, cwd=tmp_path), *words)
        refused(cli("compare", "--run", name, cwd=tmp_path), *words)
    succeed("calibrate", "--run", name, *ONLY, cwd=tmp_path)
    assert run.calibration()["tta"] == {"flip": False}
    for wrong in (3, "7", True, None):
        run.save_results({**results, "recipe": {**results["recipe"], "test_views": wrong}})
        refused(cli("calibrate", "--run", name, cwd=tmp_path), "recipe.test_views")


def test_runs_of_older_versions_have_one_view(seven, tmp_path):
    run = Run(shutil.copytree(seven / "outputs/plain", tmp_path / "old"))
    scores, calibration = run.saved_scores(), run.calibration()
    recipe = {k: v for k, v in run.results["recipe"].items() if k != "test_views"}
    run.save_results({**run.results, "recipe": recipe})
    write_json(run.folder / "calibration.json", {k: v for k, v in calibration.items() if k != "tta"})
    assert Inputs.of_run(run.results, CPU).views == ()
    assert predict.Scorer(run, CPU).inputs.views == ()
    done = succeed("calibrate", "--run", "old", *ONLY, cwd=tmp_path)
    assert "100%" not in done.err and str(run.saved_scores()["key"]) == str(scores["key"])


def test_training_itself_looks_at_one_view(seven):
    """Which epoch is best is told from the image itself; and so is what a teacher says."""
    runs = [Run(seven / "outputs" / name) for name in ("scratch", "plain")]
    first, second = (strip_time(run.results["history"]) for run in runs)
    assert first == second
    weights = [run.model().state_dict() for run in runs]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    teacher = Teacher(runs[0], runs[0].config, CPU, 0.5)
    pixels = load_split(runs[0], "val").pixels()[:4]
    found = teacher(teacher.inputs.grey(pixels)).numpy()
    assert np.allclose(found, logits_by_hand(runs[0], pixels, SEVEN[:1]), atol=1e-5)


# ---------------------------------------------------------------- ensembles


def test_an_ensemble_of_runs_with_views_and_without(seven):
    """Its probability is the mean of its members', each with its own views, and so is that of its ONNX
    graph."""
    members = ("outputs/scratch", "outputs/linear", "outputs/plain")
    done = succeed("calibrate", "--ensemble", *members, "--out", "mean", "--tta", *ONLY, cwd=seven)
    assert (
        "changes nothing of mean: its score is the mean of its members', each over its own views (7, 7, 1)"
        in done.err
    )
    mean, runs = Run(seven / "mean"), [Run(seven / folder) for folder in members]
    assert mean.calibration()["tta"] == {"members": [7, 7, 1]} and mean.calibrated() == [""]
    for side in ("val_p1", "test_p1"):
        every = [run.scores()[side] for run in runs]
        assert np.allclose(mean.scores()[side], np.mean(every, axis=0), atol=1e-6)
    scorer = predict.Scorer(mean, CPU)
    pixels = load_split(mean, "val").pixels()[:6]
    expected = mean.scores()["val_p1"][:6]
    assert np.allclose(scorer.scores(pixels)[0][:, 0], expected, atol=1e-6)
    with torch.inference_mode():
        exported = onnx_module.Exported(scorer.model, scorer.inputs, scorer.task, 1.0)
        found = exported(torch.from_numpy(pixels[:, None]).float() / 255).numpy()
    assert np.allclose(found, expected, atol=1e-5)
    results = mean.results
    for wrong in ([7, 7], [7, 7, 3], "7", [True, 7, 1]):
        mean.save_results({**results, "model_config": {**results["model_config"], "views": wrong}})
        refused(cli("predict", "x.png", "--run", "mean", cwd=seven), "results.json")
    mean.save_results(results)


def test_views_of_members_that_see_the_lungs_only(seven, tmp_path):
    """A member that is shown a part is moved before what it may not see is covered, as when it is alone."""
    looks = {"a": "masked", "b": "masked", "c": "masked-crop"}
    for name, look in looks.items():
        run = Run(shutil.copytree(seven / "outputs/scratch", tmp_path / name))
        run.save_results({**run.results, "data": {**run.results["data"], "input": look}})
    weights = load_pth(tmp_path, "b/checkpoint.pth")
    torch.save(weights | {"head.bias": weights["head.bias"] + 0.1}, tmp_path / "b/checkpoint.pth")
    pixels = load_split(Run(seven / "outputs/scratch"), "val").pixels()[:6]
    masks = np.zeros(pixels.shape, bool)
    masks[:, 6:27, 5:14] = masks[:, 4:25, 18:28] = True

    def found(run, **changes):
        inputs = replace(Inputs.of_run(run.results, CPU), **changes)
        with torch.inference_mode():
            return inputs.logits(run.model(), inputs.grey(pixels, masks))

    alone = {}
    for name in looks:
        by_view = [found(Run(tmp_path / name), views=(view,)) for view in tta_views()]
        alone[name] = torch.stack(by_view).mean(0).softmax(1)
    assert (alone["a"] - alone["c"]).abs().max() > 1e-4
    for members in ("ab", "bc"):
        run = make_ensemble(
            [tmp_path / name for name in members], tmp_path / members, False, lambda about: None
        )
        assert run.input_modes == sorted({looks[name] for name in members})
        expected = torch.stack([alone[name] for name in members]).mean(0)
        assert torch.allclose(found(run).softmax(1), expected, atol=1e-6)


# ---------------------------------------------------------------- what is said


def test_the_report_and_the_card_say_which_views(seven):
    text = succeed("compare", cwd=seven).out
    row = next(line for line in text.splitlines() if line.startswith("| Views averaged"))
    assert "averaged over 7 shifted and zoomed views: " in row and "that of the image itself: " in row
    card = succeed("compare", "--card", "outputs/linear", cwd=seven).out
    assert "the score of an image is averaged over 7 shifted and zoomed views" in card


def test_every_training_script_of_images_has_the_flag(tmp_path):
    having = {script for script in scripts.TRAINING if "--test-views" in scripts.flags_of(script)}
    assert having == {"train_scratch", "train_pretrained", "train_linear", "train_cnn", "train_hybrid"}
    for wrong in ("3", "seven"):
        refused(cli("train_scratch", "--test-views", wrong, cwd=tmp_path), "--test-views")
