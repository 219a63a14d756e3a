"""Tests of shift: distances against scikit-learn, false alarms by simulation; test_shares.py has the tests
under another share of sick people."""

import csv
import io
import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import binom
from sklearn.covariance import LedoitWolf

import predict
from calibration import shift
from common.console import InputError
from common.task import Task
from models.build import Ensemble, PixelLinear
from models.inputs import Inputs
from records.run import Run
from report.tables.evidence import batch_blocks
from tests.shared import CPU, cli, predict_rows, read_json, refused, small_vit, succeed

D = 6


def drawn(count, seed, move=0.0):
    """(features float32 [count, D], correlated; logits [count, 2]) of a made-up model."""
    rng = np.random.default_rng([seed, 7])
    mixing = np.random.default_rng(0).normal(size=(D, D))
    features = (rng.normal(size=(count, D)) @ mixing + move).astype(np.float32)
    half = features[:, 0] + rng.normal(size=count)
    return features, np.stack([-half, half], axis=1).astype(np.float32)


def true_labels(logits, seed):
    """int16 [count, 1]: sick with the probability that the logits say."""
    sick = np.random.default_rng([seed, 8]).random(len(logits)) < expit(logits[:, 1] - logits[:, 0])
    return sick.astype(np.int16)[:, None]


def reference(seed=0, validated=300):
    features, logits = drawn(validated, seed)
    training, labels = drawn(400, seed + 1000)[0], true_labels(logits, seed)
    return shift.Reference(shift.learn(training, features, logits, range(validated), labels), "x")


def judged(known, features, logits):
    """The verdict on one image each of so many patients."""
    batch, (typicality, places) = shift.Batch(), known.place(features)
    for i in range(len(features)):
        batch.add(f"{i}", f"p{i}", typicality[i], places[i], logits[i], logits[i, 1] > 0)
    return known.judge(batch, known.logits[:, 1] > 0, Task())


# ---------------------------------------------------------------- an image


def test_distance_is_scikit_learns_and_typicality_a_count():
    train, (val, logits), new = drawn(200, 1)[0], drawn(90, 2), drawn(50, 3, move=1.0)[0]
    fitted = LedoitWolf().fit(train)
    known = shift.Reference(shift.learn(train, val, logits, range(90), true_labels(logits, 0)), "x")
    usual, found = (np.sqrt(fitted.mahalanobis(x)) for x in (val, new))
    expected = [(1 + (usual >= d).sum()) / 91 for d in found]
    assert known.place(new)[0] == pytest.approx(expected)
    assert known.distances == pytest.approx(np.sort(usual), rel=1e-4)


def test_typicality_of_new_images_is_uniform():
    """P(typicality <= t) <= t, over references and images drawn alike."""
    known = [reference(seed, validated=60) for seed in range(40)]
    found = np.concatenate([k.place(drawn(25, 5000 + i)[0])[0] for i, k in enumerate(known)])
    for t in (0.05, 0.1, 0.3):
        assert (found <= t).mean() < t + 4 * np.sqrt(t * (1 - t) / 40)


def test_many_features_are_cut_to_those_of_most_variance(monkeypatch):
    monkeypatch.setattr(shift, "ROOM", 4 * D * 2)
    train, (val, logits) = drawn(200, 1)[0], drawn(90, 2)
    arrays = shift.learn(train, val, logits, range(90), true_labels(logits, 0))
    values, axes = np.linalg.eigh(LedoitWolf().fit(train).covariance_)
    z = (val - train.mean(0)) @ axes[:, -2:] / np.sqrt(values[-2:])
    assert arrays["whiten"].shape == (D, 2)
    assert arrays["distances"] == pytest.approx(np.sort(np.linalg.norm(z, axis=1)), rel=1e-3)


def test_what_a_run_keeps_is_small_and_holds_no_image():
    rng = np.random.default_rng(0)
    for width in (192, 1024):
        train = rng.normal(size=(1100, width)).astype(np.float32)
        labels = np.zeros((1100, 16), np.int16)
        arrays = shift.learn(train[:1024], train, train[:, :2], range(1100), labels)
        assert sum(a.nbytes for a in arrays.values()) < 2 << 20
        assert arrays["features"].shape == (1000, 64)


# ---------------------------------------------------------------- a batch


def test_one_image_of_each_patient():
    patients = list("aabbbcaadd")
    some = shift.one_each(patients)
    assert sorted(np.array(patients)[some]) == list("abcd")
    assert {tuple(sorted(shift.one_each(patients, seed))) for seed in range(50)} > {tuple(sorted(some))}


def test_a_batch_neither_grows_nor_minds_the_order(monkeypatch):
    monkeypatch.setattr(shift, "BATCH", 20)
    rows = [(f"image{i}", f"patient{i % 50}", i, np.zeros(2), np.zeros(2), True) for i in range(400)]
    one, two = shift.Batch(), shift.Batch()
    for row in rows:
        one.add(*row)
    for row in rows[::-1]:
        two.add(*row)
    assert len(one.rows) == len(one.heap) == 20
    assert {p: row[:2] for p, row in one.rows.items()} == {p: row[:2] for p, row in two.rows.items()}
    for patient, (here, *_) in one.rows.items():
        names = [name for name, whose, *_ in rows if whose == patient]
        assert here == min(map(shift.checksum, names))
    keys = sorted((shift.checksum(f"patient patient{i}"), f"patient{i}") for i in range(50))
    assert set(one.rows) == {patient for _, patient in keys[:20]}


def test_a_small_validation_set_cannot_tell_what_is_odd(own_runs, synthetic, tmp_path):
    """24 validation images: the oddest has typicality 0.04, so 0% odd would be no news."""
    succeed("calibrate", "--min-recall", 0.9, "--run", "outputs/linear", cwd=own_runs)
    argv = (synthetic / "test", "--run", "outputs/linear", "--summary", "s.json")
    done = succeed("predict", *argv, cwd=own_runs)
    found = read_json(own_runs, "s.json")
    assert found["odd"] is None and found["p"]["odd"] is None
    assert "that takes 99 validation images" in done.err and "% odd" not in done.err


@pytest.mark.parametrize("n", [20, 100])
def test_false_alarms(n, monkeypatch):
    """Batches like validation are called shifted in at most 5% of 150 draws, as far as these can tell."""
    monkeypatch.setattr("calibration.shares.DRAWS", 99)
    found = [judged(reference(s, 150), *drawn(n, 20_000 + s))["verdict"] for s in range(150)]
    assert set(found) <= {"like", "share", "shifted"}
    assert found.count("shifted") <= binom.ppf(0.999, 150, shift.LEVEL)


def test_shifts_are_found():
    known = reference()
    verdict = judged(known, *drawn(80, 5, move=1.5))
    assert verdict["verdict"] == "shifted" and verdict["p_joint"] <= 0.05 and verdict["patients"] == 80
    scores = drawn(80, 6)
    assert judged(known, scores[0], scores[1] * 4)["p"]["scores"] <= 0.01
    few = judged(known, *drawn(10, 7))
    assert few["verdict"] == "few" and "n < 20" in few["says"]
    assert judged(known, *drawn(10, 8, move=9.0))["verdict"] == "shifted"
    empty = known.judge(shift.Batch(), known.logits[:, 1] > 0, Task())
    assert empty["verdict"] == "few" and empty["p"] == {} and "no image" in shift.sentence(empty)


# ---------------------------------------------------------------- in the scripts


def test_features_are_what_the_head_reads():
    torch.manual_seed(0)
    x, view = torch.rand(3, 1, 32, 32), torch.nn.Identity()
    vit = small_vit(img_size=32, patch_size=8).eval()
    inputs = Inputs((0.5,) * vit.in_chans, (0.5,) * vit.in_chans, CPU, views=(view, lambda z: z.flip(3)))
    with torch.no_grad():
        out = inputs.logits_and_features(vit, x)
        assert torch.equal(out[:, : vit.num_classes], inputs.logits(vit, x))
        assert torch.allclose(out[:, vit.num_classes :], inputs.features(vit, x), atol=1e-6)
        both = Ensemble([{"kind": "linear", **PixelLinear().config}] * 2, [[0.5]] * 2, [[0.5]] * 2).eval()
        plain = Inputs((0.0,), (1.0,), CPU)
        assert plain.logits_and_features(both, x).shape == (3, 2 + 2 * 1024)
    assert not vit.head._forward_pre_hooks


def test_predict_says_whether_images_are_like_validation(own_runs, synthetic):
    done = succeed("calibrate", "--min-recall", 0.9, "--run", "outputs/linear", cwd=own_runs)
    assert (own_runs / "outputs/linear/reference.npz").stat().st_size < 2 << 20
    argv = (synthetic / "test", "--run", "outputs/linear", "--summary", "s.json", "--keep", "drawn test")
    done = succeed("predict", *argv, cwd=own_runs)
    found = read_json(own_runs, "s.json")
    assert (
        found["says"] in done.err
        and found["images"] == 40
        and set(found["p"]) == {"odd", "features", "scores"}
    )
    assert read_json(own_runs, "outputs/linear/batches/drawn test.json")["verdict"] == found["verdict"]
    rows = predict_rows(own_runs, synthetic / "test", "--run", "outputs/linear")
    known = shift.reference_of(Run(own_runs / "outputs/linear"))
    least = 1 / (1 + len(known.distances)) - 1e-6  # rows have six digits
    assert all(least <= float(r["typicality"]) <= 1 for r in rows)
    older = {k: found[k] for k in ("images", "patients", "checkpoint", "verdict", "odd", "called", "p_joint")}
    older |= {"says": "as an older version said", "called_in_validation": 0.5}
    (own_runs / "outputs/linear/batches/older.json").write_text(json.dumps(older))
    report = succeed("compare", cwd=own_runs).out
    assert "as an older version said (by an older test" in report
    assert "are they like validation?" in report and found["says"] in report
    # At today's threshold the share that was called is a figure, at that of an earlier calibration none.
    row = next(line for line in report.splitlines() if "drawn test" in line)
    assert f"| {100 * found['called']:.1f}% |" in row
    path = own_runs / "outputs/linear/batches/drawn test.json"
    kept = read_json(own_runs, "outputs/linear/batches/drawn test.json")
    path.write_text(json.dumps({**kept, "called_at": kept["called_at"] + 0.01}))
    done = succeed("compare", cwd=own_runs)
    assert "drawn test" in done.err and "called at another threshold than today's @Rec" in done.err
    row = next(line for line in done.out.splitlines() if "drawn test" in line and line.startswith("|"))
    assert f"| {100 * found['called']:.1f}% |" not in row and "| - | - |" in row
    path.write_text(json.dumps({"images": 3}))
    refused(cli("compare", cwd=own_runs), "drawn test.json is damaged")


@pytest.mark.parametrize("at, known", [(0.5, True), (0.6, True), (0.7, False)])
def test_a_batch_is_of_the_run_with_or_without_tta(at, known, capsys):
    """A run has two thresholds then, and one set of batches: either may have called."""
    figures = {"odd": 0.01, "called": 0.25, "called_in_validation": 0.5, "p_joint": 0.3}
    figures |= {"images": 8, "patients": 8}
    verdict = {**figures, "checkpoint": "c", "says": "like it", "version": 1, "called_at": at}
    run = SimpleNamespace(folder="r", batches=lambda: {"b": verdict})
    entries = [
        SimpleNamespace(
            run=run,
            name="m",
            findings=["A"],
            calibration={"checkpoint": "c"},
            calibrated={"A": {"threshold": threshold}},
        )
        for threshold in (0.5, 0.6)
    ]
    (row,) = batch_blocks(entries)[-1].rows
    assert row[4:6] == (["25.0%", "50.0%"] if known else ["-", "-"])
    assert ("called at another threshold" in capsys.readouterr().err) != known


def test_runs_of_an_older_version_have_no_typicality(own_runs, synthetic):
    (own_runs / "outputs/linear/reference.npz").unlink()
    rows = predict_rows(own_runs, synthetic / "test", "--run", "outputs/linear")
    assert {r["typicality"] for r in rows} == {""}
    argv = ("predict", synthetic / "test", "--run", "outputs/linear")
    asked = "run python calibrate.py --run outputs/linear for typicality"
    assert asked in succeed(*argv, cwd=own_runs).err
    refused(cli(*argv, "--summary", "s.json", cwd=own_runs), "nothing to hold images against")
    refused(cli(*argv, "--keep", "../x", cwd=own_runs), "--keep '../x'")


def test_references_of_an_older_version_hold_no_labels(own_runs, synthetic):
    """Images are scored and odd ones told; the verdict has to wait until the run is calibrated again."""
    path, argv = own_runs / "outputs/linear/reference.npz", ("--run", "outputs/linear")
    arrays = dict(np.load(path, allow_pickle=False))
    del arrays["labels"], arrays["far"]
    np.savez(path, **(arrays | {"key": np.array("older")}))
    done = succeed("predict", synthetic / "test", *argv, cwd=own_runs)
    assert "which needs the true labels of validation" in done.err and "p: odd" not in done.err
    assert all(row["typicality"] for row in predict_rows(own_runs, synthetic / "test", *argv))
    refused(cli("predict", synthetic / "test", *argv, "--keep", "x", cwd=own_runs), "nothing to hold")
    succeed("calibrate", "--min-recall", 0.9, *argv, cwd=own_runs)
    assert "p: odd" in succeed("predict", synthetic / "test", *argv, cwd=own_runs).err
    labels = dict(np.load(path, allow_pickle=False))["labels"]
    assert labels.dtype == np.int16 and set(labels.ravel()) == {0, 1}


def test_notes_are_counted_by_kind():
    """Every kind that a row's note can name, and what to do next after each verdict."""
    notes = {"noted": 124, "odd": 122, "unlike": 3, "unreadable": 1, "lungs": 0}
    text = predict.count_of_notes(300, notes, True)
    assert text.startswith(
        "300 files, 124 with a note: 1 unreadable, 122 odd (typicality 0.01 or less), 3 of a "
    )
    assert predict.count_of_notes(3, Counter(), True) == "3 files, 0 with a note"
    assert "how many are odd cannot be told" in predict.count_of_notes(3, Counter(), False)
    shifted = {"verdict": "shifted", "patients": 300}
    advice = predict.advice(shifted, "outputs/linear", None)
    assert "label some" in advice and "calibrate.py --run outputs/linear --site DIR --name" in advice
    assert "monitor.py" in predict.advice(shifted, "outputs/linear", "clinic")
    assert "to be sure, label some" in predict.advice({"verdict": "share", "patients": 30}, "x", None)
    assert predict.advice({"verdict": "like", "patients": 30}, "x", None) == ""
    assert "20 patients" in predict.advice({"verdict": "few", "patients": 3}, "x", None)


def test_the_last_lines_of_predict_agree_with_its_rows(own_runs, synthetic, tmp_path):
    """Odd and unreadable files are counted, and no line says that there are none."""
    folder = tmp_path / "new"
    shutil.copytree(synthetic / "test/NORMAL", folder)
    (folder / "broken.png").write_bytes(b"no image")
    done = cli("predict", folder, "--run", "outputs/linear", cwd=own_runs)
    notes = [row["note"] for row in csv.DictReader(io.StringIO(done.out))]
    unlike = sum("unlike the training" in note for note in notes)
    assert f"{len(notes)} files, {sum(map(bool, notes))} with a note: 1 unreadable" in done.err
    assert unlike == 0 or f"{unlike} of a brightness" in done.err


@pytest.mark.parametrize("change", ["nan", "shape", "absent", "text", "labels"])
def test_damaged_references_are_one_line(own_runs, synthetic, change):
    path = own_runs / "outputs/linear/reference.npz"
    arrays = dict(np.load(path, allow_pickle=False))
    if change == "nan":
        arrays["mean"][0] = np.nan
    elif change == "shape":
        arrays["features"] = arrays["features"][:, :3]
    elif change == "labels":
        arrays["labels"] = arrays["labels"] + np.int16(9)
    elif change == "absent":
        del arrays["whiten"]
    np.savez(path, **arrays)
    if change == "text":
        path.write_text("no arrays")
    argv = ("predict", synthetic / "test", "--run", "outputs/linear")
    refused(cli(*argv, cwd=own_runs), "reference.npz")


def test_bad_arrays():
    with pytest.raises(InputError, match="x is damaged"):
        shift.Reference({"whiten": np.zeros((2, 2))}, "x")
