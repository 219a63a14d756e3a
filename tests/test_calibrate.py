"""Tests of calibrate."""

import csv
import hashlib
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

import calibrate
import metrics
from calibration import intervals, shift, wording
from calibration import scores as scores_module
from common import files as files_module
from common import proportions, safe_files
from common.console import InputError
from common.files import CALIBRATION, write_json
from common.task import Task
from images.subset import Subset
from layouts.listing import patient_id
from models.inputs import Inputs
from records import run as run_module
from records.run import Run
from tests.fixtures import FLOOR
from tests.shared import (
    brute_force_threshold,
    cli,
    copy_set,
    full_decode,
    load_pth,
    middle_below,
    of_one,
    predict_rows,
    read_json,
    refused,
    six_digits,
    succeed,
    toy_subset,
)
from training.evaluate import predict

POINTS = ("at_0.5", "at_rec")


@pytest.mark.parametrize("name", ["scratch", "pretrained", "linear"])
def test_calibration_recomputed_from_scores(runs, synthetic, name):
    with np.load(runs.out / name / "scores.npz", allow_pickle=False) as file:
        scores = {k: file[k] for k in file.files}
    assert {f"{s}_{k}" for s in ("val", "test") for k in ("files", "labels", "p1")} <= scores.keys()
    result = read_json(runs.out, name, "calibration.json")
    assert result["min_recall"] == 0.9
    thr, recall, precision = brute_force_threshold(
        scores["val_labels"].tolist(), scores["val_p1"].tolist(), 0.9
    )
    between = middle_below(
        thr, scores["val_p1"]
    )  # no image lies on the threshold, the decisions are the same
    result = of_one(result)
    assert result["threshold"] == pytest.approx(between, rel=1e-9)
    assert result["val"]["at_rec"]["recall"] == pytest.approx(recall)
    thr = result["threshold"]
    assert result["val"]["at_rec"]["precision"] == pytest.approx(precision)
    for split, count in (("val", 20), ("test", 40)):
        y, p = scores[f"{split}_labels"], scores[f"{split}_p1"]
        assert len(y) == count and p.dtype == np.float64
        files = scores[f"{split}_files"].tolist()
        assert [("PNEUMONIA" in f) == bool(k) for f, k in zip(files, y)] == [True] * count
        assert all((synthetic / f).is_file() for f in files) and len(set(files)) == count
        for point, t in zip(POINTS, (0.5, thr)):
            row = result[split][point]
            assert (row["thr"], row["tp"]) == (t, ((p >= t) & (y == 1)).sum())
            assert (row["fp"], row["fn"]) == (((p >= t) & (y == 0)).sum(), ((p < t) & (y == 1)).sum())
            won = [(a > b) + (a == b) / 2 for a in p[y == 1] for b in p[y == 0]]
            assert row["auroc"] == pytest.approx(np.mean(won))
    assert f"{thr:.4f}" in runs.calibrated.out
    assert f"{result['test']['at_rec']['specificity']:.4f}" in runs.calibrated.out


def test_scores_are_those_of_the_images(runs, synthetic):
    """Single images through the kept weights by hand: file -> PIL -> logits -> softmax -> the row in
    scores.npz."""
    model = Run(runs.out / "scratch").model()
    with np.load(runs.out / "scratch" / "scores.npz") as scores:
        for split in ("val", "test"):
            for i in (0, 7, 19):
                x = torch.from_numpy(full_decode(synthetic / str(scores[f"{split}_files"][i]), 32))[
                    None, None
                ].float()
                with torch.no_grad():
                    logits = model((x / 255 - 0.5).expand(1, 3, 32, 32) / 0.5)
                # A reduced JPEG decode may differ by a grey level from PIL's full one.
                assert logits.softmax(1)[0, 1].item() == pytest.approx(scores[f"{split}_p1"][i], abs=5e-3)


def test_scores_are_reused_until_something_changes(own_runs, monkeypatch):
    """Another --min-recall scores nothing again; another checkpoint, or damaged scores, does."""
    out = own_runs / "outputs" / "pretrained"
    path, scored, real = out / "scores.npz", [], predict
    monkeypatch.setattr(scores_module, "predict", lambda *a, **k: scored.append(1) or real(*a, **k))

    def p1():
        with np.load(path) as file:
            return file["test_p1"]

    before = p1()
    succeed("calibrate", "--run", out, "--min-recall", 0.5, cwd=own_runs)
    result = read_json(out, "calibration.json")
    assert result["min_recall"] == 0.5 and of_one(result)["val"]["at_rec"]["recall"] >= 0.5
    assert scored == [] and np.array_equal(p1(), before)
    state = load_pth(out, "checkpoint.pth")
    state["head.weight"] *= -1
    state["head.bias"] *= -1
    torch.save(state, out / "checkpoint.pth")
    succeed("calibrate", "--run", out, "--min-recall", 0.5, cwd=own_runs)
    assert scored == [1, 1, 1] and np.allclose(p1(), 1 - before, atol=1e-5)  # both logits negated
    (out / "reference.npz").write_bytes(b"")
    scored.clear()
    succeed("calibrate", "--run", out, cwd=own_runs)
    assert len(scored) == 2 and shift.reference_of(Run(out)) is not None  # validation and training features
    for damaged in (path.read_bytes()[:500], b""):
        scored.clear()
        path.write_bytes(damaged)
        succeed("calibrate", "--run", out, cwd=own_runs)
        assert scored == [1, 1] and np.allclose(p1(), 1 - before, atol=1e-5)


def test_a_table_of_patients_is_part_of_the_scores(synthetic, tmp_path):
    """Another --patients on a calibrated run: @Guar counts the patients of the new table."""
    argv = ["--data-dir", synthetic, "--img-size", 32, "--split", "image"]
    succeed("train_linear", *argv, "--cache-dir", tmp_path / "c", cwd=tmp_path)
    succeed("calibrate", "--min-recall", 0.5, "--bootstrap", 100, cwd=tmp_path)
    run = Run(tmp_path / "outputs/linear")
    before = of_one(run.calibration())["guarantee"]
    sick = {patient_id(f) for f in run.scores()["val_files"] if "PNEUMONIA" in f}
    assert before["positive_patients"] == len(sick) > 9
    files = [f for side in ("val", "test") for f in run.scores()[f"{side}_files"]]
    rows = [f"{f},{'AB'[i % 2]}{'NP'['PNEUMONIA' in f]}" for i, f in enumerate(files)]
    (tmp_path / "P.csv").write_text("\n".join(["path,patient", *rows]))
    again = ("calibrate", "--min-recall", 0.5, "--bootstrap", 100, "--patients", tmp_path / "P.csv")
    with np.load(run.folder / "reference.npz") as file:
        old_reference = str(file["key"])
    succeed(*again, cwd=tmp_path)
    assert of_one(run.calibration())["guarantee"]["positive_patients"] == 2
    assert set(run.scores()["val_patients"]) <= {"AN", "BN", "AP", "BP"}
    with np.load(run.folder / "reference.npz") as file:
        assert str(file["key"]) != old_reference


def test_whatever_decides_a_figure_is_in_the_keys():
    """Each change of the model's build, of what it is shown, of images, labels, or patients changes the keys
    of what depends on it: validation and training of the reference, validation and test of the scores."""
    results = {"model_config": {"kind": "vit", "num_heads": 3}, "mean": [0.5], "std": [0.2]}
    run = SimpleNamespace(checkpoint_sha256="x", results=results, task=Task(), config=SimpleNamespace())
    run.config.lungs_sha256 = "y"
    inputs = Inputs((0.5,), (0.2,), torch.device("cpu"), input_mode="masked")

    def subset(seed, masks=0):
        found = toy_subset(8, seed)
        found.masks = np.full((8, 16, 2), masks, np.uint8)
        return found

    def keys(val=0, test=1, train=2, run=run, inputs=inputs, tta=None):
        sides = [s if isinstance(s, Subset) else subset(s) for s in (val, test, train)]
        return scores_module.keys(run, inputs, sides[:2], sides[2], tta)

    others = subset(0)
    others.patients = ["one", *others.patients[1:]]
    relabelled = subset(0)
    relabelled.targets = relabelled.targets[::-1].copy()
    heads = SimpleNamespace(**{**vars(run), "results": {**results, "model_config": {"num_heads": 6}}})
    scores, reference = keys()
    assert (scores, reference) == keys()
    for change in (
        {"val": 5},
        {"val": others},
        {"val": relabelled},
        {"val": subset(0, masks=7)},
        {"run": heads},
        {"inputs": replace(inputs, reads_lungs=True)},
        {"inputs": replace(inputs, input_mode="crop")},
        {"inputs": replace(inputs, amp=True)},
        {"tta": {"flip": False}},
    ):
        a, b = keys(**change)
        assert a != scores and b != reference, change
    assert keys(test=9)[0] != scores and keys(test=9)[1] == reference
    assert keys(train=9)[0] == scores and keys(train=9)[1] != reference


def test_scores_of_another_batch_size_decide_alike(own_runs):
    """Chosen with batches of 64 and scored again one by one: no validation image changes sides."""
    out = own_runs / "outputs" / "scratch"
    chosen, before = of_one(read_json(out, "calibration.json")), Run(out).scores()
    (out / "scores.npz").unlink()
    succeed("calibrate", "--run", out, "--min-recall", 0.9, "--batch-size", 1, cwd=own_runs)
    after, thr = Run(out).scores(), chosen["threshold"]
    assert ((after["val_p1"] >= thr) == (before["val_p1"] >= thr)).all()
    logits = np.log(before["val_p1"] / (1 - before["val_p1"]))
    assert chosen["gap"] == pytest.approx(np.abs(logits - np.log(thr / (1 - thr))).min(), rel=1e-6)


def test_what_belongs_to_all_runs_is_said_once(runs):
    """Three runs on the same images."""
    out = runs.calibrated.out
    assert out.count("data: ") == out.count("thresholds are chosen on validation") == 1
    assert out.count("logits from the nearest validation score") == 3


def test_bad_figures_are_warned_of_in_print_and_report(own_runs):
    """Scores of validation that promise, scores of test that break it."""
    run = Run(own_runs / "outputs/linear")
    arrays = dict(run.scores())
    sick, healthy = arrays["test_labels"] == 1, arrays["test_labels"] == 0
    arrays["test_logits"] = np.zeros_like(arrays["test_logits"])
    arrays["test_logits"][healthy, 1] = 50  # every healthy image called sick,
    arrays["test_logits"][np.flatnonzero(sick)[:5], 1] = -50  # and five sick ones missed
    arrays["test_logits"][np.flatnonzero(sick)[5:], 1] = 50
    np.savez(run.folder / "scores.npz", **{k: v for k, v in arrays.items() if not k.endswith("_p1")})
    done = succeed("calibrate", "--run", run, "--min-recall", 0.9, cwd=own_runs)
    missed = "test @Rec: recall 0.800 is below the floor of 0.9"
    nobody = "test @Rec: calls the healthy sick: specificity 0"
    assert f"warning: {missed}" in done.out and f"warning: {nobody}" in done.out
    report = succeed("compare", "--run", run, cwd=own_runs).out
    assert "recall 0.800 [" in report and "**calls the healthy sick ✗**" in report
    assert "**0.000 [" in report and "half the time" not in report


def test_a_finding_that_is_rare_on_test_has_a_threshold(tmp_path):
    """Through training, calibration, report and prediction; test figures are dashes, with the reason."""
    rng, rows = np.random.default_rng(0), []
    (tmp_path / "set").mkdir()
    for i in range(70):
        pixels = rng.integers(0, 120, (32, 32), dtype=np.uint8) + np.uint8(100 * (i % 2))
        Image.fromarray(pixels).save(tmp_path / f"set/x{i:02d}.png")
        rows.append(f"x{i:02d}.png,{i},{i % 2},{int(i % 3 == 0 and i < 50)}")
    (tmp_path / "set/t.csv").write_text("path,patient,Edema,Mass\n" + "\n".join(rows))
    (tmp_path / "set/train_val_list.txt").write_text("\n".join(f"x{i:02d}.png" for i in range(50)))
    (tmp_path / "set/test_list.txt").write_text("\n".join(f"x{i:02d}.png" for i in range(50, 70)))
    argv = ["--data-dir", "set", "--labels", "t.csv", "--img-size", 32, "--fractions", 0.4, 0.5, 0.1]
    succeed("train_linear", *argv, cwd=tmp_path)
    done = succeed("calibrate", "--bootstrap", 100, "--jointly", cwd=tmp_path)
    reason = "0 test images with it, fewer than 5"
    assert f"no figures on test: {reason}" in done.out
    assert "no @Guar of Mass" in done.out and "hold at once" not in done.out  # none is granted
    mass = read_json(tmp_path, "outputs/linear/calibration.json")["findings"]["Mass"]
    assert mass["test_why_not"] == reason and 0 < mass["threshold"] < 1
    report = succeed("compare", "--csv", "t.csv", cwd=tmp_path).out
    assert f"No figures on test: Mass ({reason})" in report
    printed = succeed("predict", "set", "--run", "outputs/linear", cwd=tmp_path).out.splitlines()
    for row in csv.DictReader(printed):
        assert row["decision@Rec_mass"] == ("yes" if float(row["p_mass"]) >= mass["threshold"] else "no")


@pytest.mark.parametrize(
    "thresholds, said",
    [
        ((0.1, 0.2), "@Guar: the floors of 2 findings hold at once"),
        ((0.1, None), "@Guar: the floors of 1 of 2 findings hold at once"),
        ((None, None), ""),
    ],
)
def test_joint_floors_are_those_that_were_granted(thresholds, said):
    findings = {}
    for name, threshold in zip("AB", thresholds):
        guarantee = {"threshold": threshold, "confidence": 0.95, "why_not": "too few"}
        val = {"at_rec": {"tp": 29, "fn": 1}}
        findings[name] = {"guarantee": guarantee | {"positive_patients": 30}, "val": val}
    joint = {"findings": 2, "confidence": 0.95}
    text = wording.shared_text({"min_recall": 0.95, "jointly": joint, "findings": findings})
    assert said in text and ("hold at once" in text) == bool(said)
    assert text.count("no @Guar of") == thresholds.count(None)


def test_data_elsewhere_and_other_data(own_runs, synthetic, tmp_path):
    """The same files in another folder serve; another training set is refused."""
    root = copy_set(synthetic, tmp_path)
    out, argv = own_runs / "outputs" / "linear", ["--data-dir", root, "--cache-dir", tmp_path / "c"]
    before = {**read_json(out, "calibration.json"), "command": None}
    succeed("calibrate", "--run", out, "--min-recall", 0.9, *argv, cwd=own_runs)
    assert {**read_json(out, "calibration.json"), "command": None} == before
    next((root / "train" / "NORMAL").iterdir()).unlink()
    refused(cli("calibrate", "--run", out, *argv, cwd=own_runs), "fingerprint")


def test_nothing_to_calibrate_or_compare(runs, own_runs, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for script in ("calibrate", "compare"):
        done = cli(script, cwd=empty)
        refused(done, "no finished runs")
        assert len(done.err.strip().splitlines()) == 1 and done.out.count("|") == 0
    refused(cli("calibrate", "--run", "nowhere", cwd=empty), "nowhere")
    for value in ("0", "1.5", "-1", "nan"):
        refused(cli("calibrate", "--min-recall", value, cwd=own_runs), "--min-recall")
    for path in (own_runs / "outputs").glob("*/calibration.json"):
        path.unlink()
    done = cli("compare", cwd=own_runs)
    refused(done, "not calibrated", "calibrate.py")
    assert len(done.err.strip().splitlines()) == 1 and done.out == ""


def damage_some(folder):
    """Runs that cannot be used: of an older version, cut, of other images; "linear" is left whole."""
    old = folder / "scratch/results.json"
    results = read_json(old)
    write_json(old, {**results, "data": {**results["data"], "normalise": "standard"}})
    for name in ("cut", "weights", "elsewhere"):
        shutil.copytree(folder / "pretrained", folder / name)
    (folder / "cut/results.json").write_bytes((folder / "cut/results.json").read_bytes()[:200])
    (folder / "weights/checkpoint.pth").write_bytes(b"")
    results = read_json(folder, "elsewhere/results.json")
    elsewhere = {**results, "data": {**results["data"], "data_dir": "gone"}}
    write_json(folder / "elsewhere/results.json", elsewhere)
    return {"scratch": "is gone", "cut": "JSON", "weights": "checkpoint", "elsewhere": "gone"}


@pytest.mark.parametrize("site", [False, True])
def test_a_run_that_cannot_be_used_keeps_no_other_waiting(own_runs, synthetic, site):
    """By itself it is passed over in one line; asked for by name, it also makes the exit code 2."""
    folder, written, flags = own_runs / "outputs", "calibration.json", ["--bootstrap", 100]
    broken = damage_some(folder)
    if site:
        written = "sites/clinic.json"
        flags += ["--site", synthetic / "test", "--name", "clinic"]

    def floors():
        return [read_json(folder, name, written)["min_recall"] for name in ("linear", "pretrained")]

    done = succeed("calibrate", *flags, "--min-recall", 0.5, cwd=own_runs)
    assert floors() == [0.5, 0.5]
    notes = [line for line in done.err.splitlines() if "passed over: " in line]
    assert len(notes) == len(broken)
    for name, word in broken.items():
        assert sum(f"outputs/{name}" in line and word in line for line in notes) == 1

    named = [f"outputs/{name}" for name in ("scratch", "linear", "cut", "pretrained")]
    done = cli("calibrate", "--run", *named, *flags, "--min-recall", 0.6, cwd=own_runs)
    refused(done, "2 of 4 runs were passed over: outputs/scratch, outputs/cut")
    assert floors() == [0.6, 0.6]
    alone = cli("calibrate", "--run", "outputs/scratch", *flags, cwd=own_runs)
    refused(alone, "which is gone")
    assert "passed over" not in alone.err
    refused(cli("calibrate", "--run", "outputs/scratch", "outputs/cut", *flags, cwd=own_runs), "2 of 2 runs")


def test_a_run_without_figures_keeps_no_other_waiting(own_runs, monkeypatch):
    """Also where it fails only when the threshold is chosen."""
    real = calibrate.evaluate

    def evaluate(scores, rule, task):
        if (scores["val_logits"][:, 0] == first).all():
            raise InputError("no figures")
        return real(scores, rule, task)

    first = Run(own_runs / "outputs/linear").scores()["val_logits"][:, 0]
    monkeypatch.setattr(calibrate, "evaluate", evaluate)
    done = succeed("calibrate", "--bootstrap", 100, "--min-recall", 0.6, cwd=own_runs)
    assert "note: outputs/linear is passed over: no figures" in done.err
    assert read_json(own_runs, "outputs/scratch/calibration.json")["min_recall"] == 0.6
    assert read_json(own_runs, "outputs/linear/calibration.json")["min_recall"] != 0.6


def test_scores_that_are_not_those_of_the_calibration_are_refused(own_runs, monkeypatch):
    """As where calibrate.py was stopped between scores.npz and calibration.json."""
    run = Run(own_runs / "outputs/linear")
    checksum = hashlib.sha256((run.folder / "scores.npz").read_bytes()).hexdigest()
    assert run.calibration()["scores_sha256"] == checksum

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_json", stopped)
        assert cli("calibrate", "--run", run, "--temperature", cwd=own_runs).code != 0
    with pytest.raises(InputError, match="not what its calibration was made from"):
        run.scores()
    refused(cli("compare", cwd=own_runs), "not what its calibration was made from: run calibrate.py again")
    succeed("calibrate", "--run", run, "--temperature", cwd=own_runs)
    run.scores()


def test_a_model_counts_once_in_an_ensemble(own_runs):
    shutil.copytree(own_runs / "outputs/linear", own_runs / "outputs/copied")
    argv = ("calibrate", "--out", "outputs/e", "--ensemble", "outputs/scratch", "outputs/linear")
    refused(cli(*argv, "outputs/copied", cwd=own_runs), "are the same model")
    (own_runs / "link").symlink_to("outputs/linear")
    refused(cli(*argv, "link", cwd=own_runs), "are the same model")
    refused(cli(*argv, own_runs / "outputs/linear", cwd=own_runs), "are the same model")


def test_uncalibrated_run_is_left_out_with_a_note(own_runs):
    (own_runs / "outputs" / "pretrained" / "calibration.json").unlink()
    done = succeed("compare", cwd=own_runs)
    assert "pretrained" in done.err and "pretrained" not in done.out and "ViT scratch" in done.out


def test_min_recall_from_the_command_line_is_met_on_validation(own_runs):
    for target in (0.5, 0.95, 1.0):
        succeed("calibrate", "--min-recall", target, cwd=own_runs)
        for name in ("scratch", "pretrained", "linear"):
            assert (
                of_one(read_json(own_runs, "outputs", name, "calibration.json"))["val"]["at_rec"]["recall"]
                >= target
            )


def test_seeds_train_one_run_each(bench):
    runs = [Run(bench / f"outputs/scratch-seed{s}").results for s in (0, 1)]
    assert [r["seed"] for r in runs] == [0, 1] and runs[0]["split"] == runs[1]["split"]
    a, b = (
        safe_files.load_tensors(bench / f"outputs/scratch-seed{s}/checkpoint.pth")["head.weight"]
        for s in (0, 1)
    )
    assert not torch.equal(a, b)


def test_calibration_json_holds_guarantee_temperature_intervals(bench):
    got = files_module.read_json(bench / "outputs/linear/calibration.json")
    with np.load(bench / "outputs/linear/scores.npz") as file:
        s = dict(file)
    groups = [patient_id(f) for f in s["val_files"]]
    thr, recall, precision = metrics.choose_threshold_with_guarantee(
        s["val_labels"], s["val_p1"], 0.9, 0.9, groups
    )
    assert got["temperature"] == pytest.approx(metrics.fit_temperature(s["val_logits"], s["val_labels"]))
    got = of_one(got)
    assert got["guarantee"]["threshold"] == pytest.approx(middle_below(thr, s["val_p1"]), rel=1e-9)
    assert got["guarantee"]["confidence"] == 0.9
    val = got["guarantee"]["val"]["at_guaranteed"]
    assert (val["recall"], val["precision"]) == pytest.approx((recall, precision)) and got["val"][
        "at_guaranteed"
    ] == val
    row = got["test"]["at_rec"]
    assert row["interval"]["recall"]["wilson"] == pytest.approx(
        proportions.wilson_interval(row["tp"], row["tp"] + row["fn"])
    )
    assert row["interval"]["auroc"]["delong"] == pytest.approx(
        intervals.delong_interval(s["test_labels"], s["test_p1"])[1:]
    )
    for name in ("acc", "precision", "recall", "specificity", "f1", "auroc", "auprc"):
        lo, hi = row["interval"][name]["bootstrap"]
        assert lo <= row[name] <= hi


def test_temperature_flag_keeps_decisions(bench):
    plain = files_module.read_json(bench / "outputs/linear/calibration.json")
    assert cli("calibrate", "--run", "outputs/linear", "--temperature", *FLOOR, cwd=bench).code == 0
    warm = files_module.read_json(bench / "outputs/linear/calibration.json")
    assert warm["temperature_applied"]
    warm, plain = of_one(warm), of_one(plain)
    assert warm["threshold"] != plain["threshold"]
    for side in ("val", "test"):
        for point in ("at_0.5", "at_rec", "at_guaranteed"):
            assert all(
                warm[side][point][k] == plain[side][point][k] for k in ("tp", "fp", "tn", "fn", "auroc")
            )
    predictions = predict_rows(bench, "xray/test", "--run", "outputs/linear")
    with np.load(bench / "outputs/linear/scores.npz") as file:
        assert [float(r["p_pneumonia"]) for r in predictions] == six_digits(file["test_p1"])
    assert cli("calibrate", "--run", "outputs/linear", *FLOOR, cwd=bench).code == 0


def test_platt_scaling_from_calibrate_to_predict_and_compare(bench, tmp_path):
    """Slope and bias from the command line: probabilities change, decisions @Rec and @Guar do not, and who
    scores by the calibration, or by an older site's thresholds, follows."""
    shutil.copytree(bench / "outputs/scratch-seed0", tmp_path / "outputs/run")
    shutil.copytree(bench / "xray/test", tmp_path / "clinic")
    (tmp_path / "xray").symlink_to(bench / "xray")
    argv = ("calibrate", "--run", "outputs/run", *FLOOR)
    site = ("calibrate", "--run", "outputs/run", "--site", "clinic", "--name", "here", "--min-recall", 0.8)
    succeed(*site, cwd=tmp_path)
    plain, before = (
        read_json(tmp_path, "outputs/run/calibration.json"),
        Run(tmp_path / "outputs/run").scores(),
    )
    done = succeed(*argv, "--temperature", "platt", cwd=tmp_path)
    found, run = read_json(tmp_path, "outputs/run/calibration.json"), Run(tmp_path / "outputs/run")
    line, after = found["platt"]["PNEUMONIA"], run.scores()
    assert found["format"] == CALIBRATION and not found["temperature_applied"]
    odds = before["val_logits"][:, 1].astype(float) - before["val_logits"][:, 0]
    fitted = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000).fit(odds[:, None], before["val_labels"])
    assert line["slope"] == pytest.approx(fitted.coef_[0, 0], rel=1e-3)
    assert line["bias"] == pytest.approx(fitted.intercept_[0], rel=1e-3, abs=1e-3)
    assert after["val_p1"].mean() == pytest.approx(before["val_labels"].mean(), abs=1e-6)
    for side in ("val", "test"):
        for point in ("at_rec", "at_guaranteed"):
            rows = of_one(found)[side][point], of_one(plain)[side][point]
            assert all(rows[0][k] == rows[1][k] for k in ("tp", "fp", "tn", "fn"))
        changed = ((before[f"{side}_p1"] >= 0.5) != (after[f"{side}_p1"] >= 0.5)).sum()
        assert of_one(found)["changed"][side] == {"at_0.5": changed, "at_rec": 0, "at_guaranteed": 0}
        assert f"@0.5 {changed}, @Rec 0, @Guar 0" in done.out
    assert "slope" in done.out and "as common as in validation" in done.out
    rows = predict_rows(tmp_path, "xray/test", "--run", "outputs/run")
    assert [float(r["p_pneumonia"]) for r in rows] == six_digits(after["test_p1"])
    decided = after["test_p1"] >= of_one(found)["threshold"]
    assert [r["decision@Rec"] == "PNEUMONIA" for r in rows] == decided.tolist()
    said = cli("predict", "xray/test/NORMAL", "--run", "outputs/run", cwd=tmp_path).err
    share = 100 * before["val_labels"].mean()
    assert "p_... are probabilities, by Platt scaling" in said and f"{share:.1f}% have PNEUMONIA" in said
    text = succeed("compare", cwd=tmp_path).out
    assert f"slope {line['slope']:.3f}, bias {line['bias']:+.3f}" in text and "by Platt scaling" in text
    row = f"xray/x.jpeg,{of_one(found)['threshold']},PNEUMONIA"
    (tmp_path / "log.csv").write_text(f"path,score,diagnosis\n{row}\n")
    said = succeed("monitor", "log.csv", "--run", "outputs/run", cwd=tmp_path).err
    assert "for scores after Platt scaling" in said
    # Thresholds of a site belong to the scores they were chosen on.
    refused(cli("predict", "clinic", "--run", "outputs/run", "--site", "here", cwd=tmp_path), "--temperature")
    refused(cli(*site, "--temperature", "platt", cwd=tmp_path), "--temperature belongs to the run")
    succeed(*site, cwd=tmp_path)
    succeed("predict", "clinic", "--run", "outputs/run", "--site", "here", cwd=tmp_path)
    for damage in (
        {"platt": 3},
        {"platt": {"PNEUMONIA": {"slope": -1.0, "bias": 0.0}}},
        {"precision": "int4"},
    ):
        write_json(run.folder / "calibration.json", {**found, **damage})
        refused(cli("predict", "clinic", "--run", "outputs/run", cwd=tmp_path), "is damaged", *damage)
    for words, kept in (((), False), (("scale",), True)):
        succeed(*argv, *(("--temperature", *words) if words else ()), cwd=tmp_path)
        last = read_json(tmp_path, "outputs/run/calibration.json")
        assert last["temperature_applied"] is kept and "platt" not in last and last["format"] == CALIBRATION
    refused(cli(*argv, "--temperature", "isotonic", cwd=tmp_path), "isotonic")


def test_platt_scaling_of_a_run_that_separates_validation_is_refused(bench):
    argv = ("calibrate", "--run", "outputs/linear", "--temperature", "platt")
    before = read_json(bench, "outputs/linear/calibration.json")
    refused(cli(*argv, cwd=bench), "separate", "--temperature scale")
    assert read_json(bench, "outputs/linear/calibration.json") == before
