"""The chain of scripts on questions with several answers: three classes in folders, findings in a table."""

import csv
import io
import json
import os
import shutil
import signal

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image

from common import scaling
from models.build import Ensemble, PixelLinear
from models.inputs import Inputs
from records.onnx import Exported
from records.run import Run
from tests.shared import (
    CPU,
    WRITES_ONNX,
    cli,
    load_pth,
    of_one,
    read_json,
    refused,
    same_tensors,
    strip_time,
    succeed,
    tables,
)
from training import step

CLASSES = ("Normal", "Round One", "Square")
FINDINGS = ("No Finding", "Round", "Square")
TINY = ("--img-size", 32, "--epochs", 1, "--batch-size", 16, "--max-steps", 3)


def picture(rng, round_one, square):
    """A noisy 32 px image with a bright disc at the left, a bright square at the right, or neither."""
    pixels = rng.normal(90, 25, (32, 32))
    y, x = np.mgrid[:32, :32]
    pixels[((x - 9) ** 2 + (y - 16) ** 2 < 36) & round_one] += 60
    pixels[(abs(x - 23) < 5) & (abs(y - 16) < 5) & square] += 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folders(own_build):
    """Three classes with runs: a linear and a short scratch one, calibrated and compared."""

    def build(root):
        rng = np.random.default_rng(0)
        for (part, count), (k, name) in [
            (p, c) for p in (("train", 40), ("test", 12)) for c in enumerate(CLASSES)
        ]:
            folder = root / "shapes" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(rng, k == 1, k == 2).save(folder / f"{name[0]}{i:02d}.png")
        flags = ("--data-dir", "shapes")
        printed = [succeed("train_linear", *flags, "--img-size", 32, cwd=root).out]
        succeed("train_scratch", *flags, *TINY, "--watch", "accuracy", "--balance", "undersample", cwd=root)
        printed.append(succeed("calibrate", "--bootstrap", 100, cwd=root).out)
        argv = ("--html", "r.html", "--csv", "r.csv")
        printed.append(succeed("compare", *argv, cwd=root).out)
        return printed

    root, printed = own_build("several", build)
    return root, *printed


@pytest.fixture(scope="module")
def findings(own_build):
    """A table of findings, some unknown, with the same runs."""

    def build(root):
        rng = np.random.default_rng(1)
        (root / "set/images").mkdir(parents=True)
        lines = ["path,patient," + ",".join(FINDINGS)]
        for i in range(150):
            a, b = rng.random(2) < 0.4
            picture(rng, a, b).save(root / f"set/images/{i:03d}.png")
            labels = [int(not (a or b)), int(a), "" if i % 7 == 0 else int(b)]
            lines.append(f"images/{i:03d}.png,{i // 2}," + ",".join(map(str, labels)))
        (root / "set/labels.csv").write_text("\n".join(lines))
        flags = ("--data-dir", "set", "--labels", "labels.csv", "--fractions", 0.4, 0.3, 0.3)
        printed = [succeed("train_linear", *flags, "--img-size", 32, cwd=root).out]
        succeed("train_scratch", *flags, *TINY, cwd=root)
        joint = ("--bootstrap", 100, "--jointly", "--min-recall", 0.8)
        printed.append(succeed("calibrate", *joint, cwd=root).out)
        printed.append(succeed("compare", cwd=root).out)
        return printed

    root, printed = own_build("findings", build)
    return root, *printed


def test_classes_in_the_report(folders):
    root, trained, calibrated, report = folders
    assert "train 32 Normal + 32 Round One + 32 Square" in trained and "patients unknown" in trained
    assert read_json(root, "outputs/linear/results.json")["split"]["unknown_patients"] == 120
    assert "any disease" in calibrated and "macro F1" in calibrated
    for words in (
        "| any disease: Logistic regression 32x32 px |",
        "| Round One: ViT scratch |",
        "| Class | Images | Precision | Recall | F1 | → Normal | → Round One | → Square |",
        "patients unknown, so images of one patient may be on both sides",
        "Logistic regression 32x32 px minus ViT scratch",
        "best validation accuracy",
    ):
        assert words in report
    assert "whole patients" not in report
    names = {p.name for p in (root / "outputs/figures").iterdir()}
    assert names == {"shapes-roc.png", "shapes-auroc.png", "shapes-confusion.png"}
    page = (root / "r.html").read_text()
    assert page.count("data:image/png") == 3 and "Square: ViT scratch" in page
    rows = list(csv.DictReader((root / "r.csv").open()))
    assert [r["Model"] for r in rows[::2]] == [
        f"{n}: Logistic regression 32x32 px @Rec" for n in ("any disease", "Round One", "Square")
    ]


def test_a_hybrid_is_asked_for_findings(findings, tiny_npz):
    """Its default draws classes alike, which findings have none of: it says so, and weighs them."""
    argv = (
        "--data-dir",
        "set",
        "--labels",
        "labels.csv",
        "--fractions",
        0.4,
        0.3,
        0.3,
        "--weights",
        tiny_npz,
    )
    done = succeed("train_hybrid", *argv, *TINY, "--max-steps", 1, "--out", "hybrid", cwd=findings[0])
    assert "note: --balance weights" in done.err
    assert read_json(findings[0], "hybrid/results.json")["recipe"]["balance"] == "weights"
    asked = ("--balance", "sampler", "--out", "o")
    refused(cli("train_hybrid", *argv, *TINY, *asked, cwd=findings[0]), "--balance sampler needs one class")


def test_findings_in_the_report(findings):
    _, trained, calibrated, report = findings
    assert "test cut off" in trained and "0 test images with train or validation" in trained
    assert "the floors of 1 of 4 findings hold at once with confidence 0.95" in calibrated
    assert calibrated.count("no @Guar of") == 3
    for words in ("| any finding: ", "| Square: ViT scratch |", "by the union bound", "whole patients"):
        assert words in report
    assert "Precision | Recall | F1" not in report


def test_the_report_counts_what_scores_hold(folders, findings):
    """A row a finding and run; the confusion matrix is scikit-learn's of the stored scores."""
    names = {"linear": "Logistic regression 32x32 px", "scratch": "ViT scratch"}
    for root, report in ((folders[0], folders[-1]), (findings[0], findings[-1])):
        head, *rows = next(table for table in tables(report) if "Positives val + test" in table[0])
        rows = [row for row in rows if row[0].endswith(" @Rec")]
        run = Run(root / "outputs/linear")
        assert [row[0] for row in rows] == [
            f"{name}: {model} @Rec" for name in run.task.findings for model in names.values()
        ]
        for kind, model in names.items():
            arrays = Run(root / "outputs" / kind).scores()
            truth = run.task.truth(arrays["test_labels"])
            for k, name in enumerate(run.task.findings):
                known = truth[:, k] >= 0
                auroc = sklearn.metrics.roc_auc_score(truth[known, k], arrays["test_p1"][known, k])
                (row,) = [dict(zip(head, r)) for r in rows if r[0] == f"{name}: {model} @Rec"]
                assert row["Positives val + test"].split(" + ")[1] == str((truth[:, k] == 1).sum())
                assert row["AUROC test"].startswith(f"{auroc:.3f} [")
    matrices = [
        table for table in tables(folders[-1]) if table[0][0] == "Class" and len(table) == 1 + len(CLASSES)
    ]
    for kind, matrix in zip(names, matrices, strict=True):
        arrays = Run(folders[0] / "outputs" / kind).scores()
        y, decided = arrays["test_labels"], arrays["test_logits"].argmax(axis=1)
        cells = [[int(cell) for cell in row[-3:]] for row in matrix[1:]]
        assert cells == sklearn.metrics.confusion_matrix(y, decided).tolist()
        assert [float(row[2]) for row in matrix[1:]] == pytest.approx(
            sklearn.metrics.precision_score(y, decided, average=None, zero_division=0), abs=5e-4
        )


@pytest.mark.parametrize("kind", ["linear", "scratch"])
def test_predictions_are_those_of_calibrate(folders, findings, kind):
    for root, pattern in ((folders[0], "shapes/test"), (findings[0], "set/images")):
        run = Run(root / "outputs" / kind)
        done = succeed("predict", pattern, "--run", f"outputs/{kind}", cwd=root)
        rows = {r["path"]: r for r in csv.DictReader(io.StringIO(done.out))}
        scores, found = run.scores(), run.calibration()["findings"]
        prefix = "shapes/" if run.task.kind == "softmax" else "set/"
        for i, file in enumerate(scores["test_files"]):
            row = rows[prefix + str(file)]
            for k, (name, about) in enumerate(found.items()):
                word = name.lower().replace(" ", "_")
                assert float(row[f"p_{word}"]) == pytest.approx(scores["test_p1"][i, k], abs=1e-6)
                decision = "yes" if scores["test_p1"][i, k] >= about["threshold"] else "no"
                assert row[f"decision@Rec_{word}"] == decision
            top = run.task.classes[scores["test_logits"][i].argmax()]
            assert row.get("top_class", top) == top
    assert ("top_class" in rows["set/images/000.png"]) is False


def test_explain_a_finding(folders, findings):
    root, argv = folders[0], ("--run", "outputs/scratch", "--method", "gradcam")
    succeed("explain", *argv, "--tests", 0, "--finding", "Square", cwd=root)
    assert (root / "outputs/scratch/explain/val/sheet.png").exists()
    questions = {
        root: ("shapes/test/Square/S00.png", "Square"),
        findings[0]: ("set/images/001.png", "Round"),
    }
    for place, (image, name) in questions.items():
        succeed("explain", *argv, image, cwd=place)  # any disease, any finding
        succeed("explain", *argv, image, "--finding", name, cwd=place)
        refused(cli("explain", *argv, image, "--finding", "Oval", cwd=place), "--finding Oval", name)
        refused(cli("explain", *argv, image, "--target", name, cwd=place), "--target is for two classes")


def test_exported_probabilities(folders, findings):
    """What goes into the ONNX file gives the columns of the task."""
    x = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for root in (folders[0], findings[0]):
        run = Run(root / "outputs/linear")
        model, inputs = run.model(), Inputs.of_run(run.results, CPU)
        with torch.inference_mode():
            expected = run.task.scores(inputs.logits(model, x).numpy(), 1.7)
            assert np.allclose(Exported(model, inputs, run.task, 1.7)(x).numpy(), expected, atol=1e-6)
            platt = {name: {"slope": 0.5 + k, "bias": 1.0 - k} for k, name in enumerate(run.task.findings)}
            logits = inputs.logits(model, x).numpy()
            expected = run.task.scores_from(logits, {"temperature_applied": False, "platt": platt})
            lines = scaling.lines({"platt": platt}, run.task.findings)
            exported = Exported(model, inputs, run.task, 1.0, lines=lines)(x).numpy()
            assert np.allclose(exported, expected, atol=1e-6)


@WRITES_ONNX
def test_exported_findings(findings, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    succeed("predict", "--export", tmp_path / "m.onnx", "--run", "outputs/linear", cwd=findings[0])
    session = ort.InferenceSession(str(tmp_path / "m.onnx"))
    run = Run(findings[0] / "outputs/linear")
    x = np.random.default_rng(0).random((4, 1, 32, 32), dtype=np.float32)
    with torch.inference_mode():
        expected = run.task.scores(run.model()(torch.from_numpy(x)).numpy())
    assert np.allclose(session.run(None, {"image": x})[0], expected, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["findings"]) == list(run.task.findings)
    assert json.loads(about["threshold@Rec"]).keys() == set(run.task.findings)


def test_ensemble_of_findings(findings):
    """Its probabilities are the means of its members'."""
    torch.manual_seed(0)
    configs = [{"kind": "linear", "side": 4, "num_classes": 3}] * 2
    model = Ensemble(configs, [[0.0]] * 2, [[1.0]] * 2, sigmoid=True)
    for member in model.members:
        torch.nn.init.normal_(member.head.weight)
    x = torch.rand(5, 1, 8, 8)
    expected = torch.stack([m(x).sigmoid() for m in model.members]).mean(0)
    assert torch.allclose(model(x).sigmoid(), expected, atol=1e-6)
    assert isinstance(model.members[0], PixelLinear)
    root, argv = findings[0], ("--out", "outputs/both", "--bootstrap", 100)
    succeed("calibrate", "--ensemble", "outputs/linear", "outputs/scratch", *argv, cwd=root)
    both, one, two = (Run(root / "outputs" / n).scores()["test_p1"] for n in ("both", "linear", "scratch"))
    assert np.allclose(both, (one + two) / 2, atol=1e-6)


def test_an_interrupted_run_of_findings_goes_on(findings, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch and resumed: the same weights and history, bit for bit."""
    root, real, steps = findings[0], step.Gradient.add, []
    argv = ["--data-dir", root / "set", "--labels", "labels.csv", "--fractions", 0.4, 0.3, 0.3]
    argv += ["--img-size", 32, "--batch-size", 8, "--epochs", 2, "--cache-dir", root / "Data/cache"]

    def backward(self, *batch):
        steps.append(1)
        if len(steps) == 11:  # of 8 an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *batch)

    monkeypatch.setattr(step.Gradient, "add", backward)
    assert cli("train_scratch", *argv, "--out", "stopped", cwd=tmp_path).code == 143
    monkeypatch.setattr(step.Gradient, "add", real)
    succeed("train_scratch", *argv, "--out", "stopped", "--resume", cwd=tmp_path)
    succeed("train_scratch", *argv, "--out", "whole", cwd=tmp_path)
    runs = [tmp_path / name for name in ("stopped", "whole")]
    assert same_tensors(*(load_pth(run, "checkpoint.pth") for run in runs))
    first, second = (strip_time(read_json(run, "results.json")["history"]) for run in runs)
    assert first == second and all("train_auroc" in row for row in first)


# ---------------------------------------------------------------- tables of other kinds


def write_table(root, findings, labels, count=80):
    """A set of `count` noise images, two a patient, whose labels are text, `labels(i)` for image i."""
    rng = np.random.default_rng(2)
    (root / "set/images").mkdir(parents=True)
    for i in range(count):
        picture(rng, i % 2 == 0, False).save(root / f"set/images/{i:02d}.png")
    rows = [f"images/{i:02d}.png,{i // 2},{labels(i)}" for i in range(count)]
    (root / "set/t.csv").write_text("\n".join([f"path,patient,{findings}", *rows]))
    return "--data-dir", "set", "--labels", "t.csv", "--fractions", 0.4, 0.3, 0.3, "--img-size", 32


def test_one_finding_and_unknown_labels(tmp_path):
    """The chain of a table with one column, some of it empty: figures are of the known labels alone."""
    argv = write_table(tmp_path, "Round", lambda i: "" if i % 5 == 0 else (i + 1) % 2)
    succeed("train_scratch", *argv, *TINY[2:], cwd=tmp_path)
    succeed("calibrate", "--bootstrap", 100, cwd=tmp_path)
    report = succeed("compare", cwd=tmp_path).out
    run = Run(tmp_path / "outputs/scratch")
    arrays, calibration = run.scores(), of_one(run.calibration())
    y, p = arrays["test_labels"][:, 0], arrays["test_p1"]
    known = y >= 0
    auroc = sklearn.metrics.roc_auc_score(y[known], p[known])
    assert calibration["test"]["at_rec"]["auroc"] == pytest.approx(auroc) and 0 < known.sum() < len(y)
    negative, positive = (int((y == k).sum()) for k in (0, 1))
    assert f"Test: {known.sum()} images ({negative} no Round, {positive} Round)" in report
    done = succeed("predict", "set/images", "--run", "outputs/scratch", cwd=tmp_path)
    rows = {r["path"]: r for r in csv.DictReader(io.StringIO(done.out))}
    for file, score in zip(arrays["test_files"], p):
        row = rows[f"set/{file}"]
        assert float(row["p_round"]) == pytest.approx(score, abs=1e-6)
        assert row["decision@Rec"] == ("Round" if score >= calibration["threshold"] else "no Round")
    argv = ("--run", "outputs/scratch", "--method", "gradcam", "--finding", "Round")
    succeed("explain", *argv, "set/images/00.png", cwd=tmp_path)


def test_names_that_differ_in_case_only_and_a_sparse_table(tmp_path):
    """Each finding has a column of predict.py of its own; batches without a known label stop no training."""
    argv = write_table(tmp_path, "Round,round,Rare", lambda i: f"{i % 2},{i // 2 % 2},{int(i == 0)}")
    succeed("train_linear", *argv, cwd=tmp_path)
    succeed("calibrate", "--bootstrap", 100, cwd=tmp_path)
    done = succeed("predict", "set/images", "--run", "outputs/linear", cwd=tmp_path)
    rows = {r["path"]: r for r in csv.DictReader(io.StringIO(done.out))}
    run = Run(tmp_path / "outputs/linear")
    arrays = run.scores()
    for file, scores in zip(arrays["test_files"], arrays["test_p1"]):
        row = rows[f"set/{file}"]
        assert [float(row[f"p_{n}"]) for n in run.task.findings] == pytest.approx(scores.tolist(), abs=1e-6)
        assert row["decision@Rec_Rare"] == ""
    report = succeed("compare", cwd=tmp_path).out
    assert "No threshold: Rare (" in report and "not over Rare" in report

    labels = [line.rsplit(",", 3)[0] for line in (tmp_path / "set/t.csv").read_text().splitlines()[1:]]
    sparse = [f"{line},{i // 8 % 2 if i % 4 == 0 else ''}" for i, line in enumerate(labels)]
    (tmp_path / "set/t.csv").write_text("\n".join(["path,patient,Round", *sparse]))
    short = ("--batch-size", 2, "--epochs", 1, "--out", "sparse")
    succeed("train_scratch", *argv, *short, cwd=tmp_path)


def test_a_table_that_moved_or_changed(findings, tmp_path):
    """The table is looked for in the new folder too; a changed label is another question."""
    root, table = findings[0], tmp_path / "moved/labels.csv"
    shutil.copytree(root / "set", tmp_path / "moved")
    shutil.copytree(root / "outputs/linear", tmp_path / "run")
    before = Run(tmp_path / "run").scores()
    argv = ("--run", "run", "--data-dir", "moved", "--labels", "labels.csv", "--bootstrap", 100)
    argv += ("--cache-dir", tmp_path / "cache")
    succeed("calibrate", *argv, cwd=tmp_path)
    after = Run(tmp_path / "run").scores()
    assert all(np.array_equal(before[k], after[k]) for k in before)
    text = table.read_text()
    train = set(range(150)) - {int(f[-7:-4]) for s in ("val", "test") for f in before[f"{s}_files"]}
    line = next(row for row in text.splitlines() if row.startswith(f"images/{min(train):03d}.png"))
    swapped = line.rsplit(",", 3)[0] + ",-1,-1,-1"
    table.write_text(text.replace(line, swapped))
    refused(cli("calibrate", *argv, cwd=tmp_path), "fingerprint differs")


def test_classes_of_other_names_and_their_ensemble(folders, tmp_path):
    """--healthy names the first class; an ensemble's probabilities are the mean of its members'."""
    (tmp_path / "set").mkdir()
    for part in ("train", "test"):
        for old, new in zip(CLASSES, ("Well", "Flu A", "TB")):
            shutil.copytree(folders[0] / "shapes" / part / old, tmp_path / "set" / part / new)
    argv = ("--data-dir", "set", "--img-size", 32)
    refused(cli("train_linear", *argv, cwd=tmp_path), "--healthy NAME", "Flu A, TB, Well")
    succeed("train_linear", *argv, "--healthy", "well", cwd=tmp_path)
    assert Run(tmp_path / "outputs/linear").task.classes == ("Well", "Flu A", "TB")
    both = ("--ensemble", "outputs/linear", "outputs/scratch", "--out", "outputs/both", "--bootstrap", 100)
    shutil.copytree(folders[0] / "outputs", tmp_path / "outputs", dirs_exist_ok=True)
    shutil.copytree(folders[0] / "shapes", tmp_path / "shapes")
    succeed("calibrate", *both, cwd=tmp_path)
    mean, one, two = (
        Run(tmp_path / "outputs" / n).scores()["test_p1"] for n in ("both", "linear", "scratch")
    )
    assert np.allclose(mean, (one + two) / 2, atol=1e-6)


def test_seeds_and_views_of_findings(findings, tiny_npz, tmp_path):
    """Fine-tuning with the head first, of two seeds: the report's mean and sd over them are NumPy's, and with
    test-time augmentation predict.py gives calibrate.py's scores."""
    shutil.copytree(findings[0] / "set", tmp_path / "set")
    argv = ("--data-dir", "set", "--labels", "labels.csv", "--fractions", 0.4, 0.3, 0.3, "--watch", "loss")
    argv += ("--weights", tiny_npz, "--freeze-epochs", 1, *TINY, "--seeds", 0, 1)
    succeed("train_pretrained", *argv, cwd=tmp_path)
    succeed("calibrate", "--bootstrap", 100, cwd=tmp_path)
    runs = [Run(tmp_path / f"outputs/pretrained-seed{seed}") for seed in (0, 1)]
    values = [run.calibration()["summary"]["test"]["auroc"]["value"] for run in runs]
    report = tables(succeed("compare", cwd=tmp_path).out)
    first = next(table for table in report if "Mean AUROC test" in table[0])
    (row,) = [row for row in first if row[0].endswith(", 2 seeds")]
    cell = row[first[0].index("Mean AUROC test")]
    assert cell == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    folder = "outputs/pretrained-seed0"
    succeed("calibrate", "--run", folder, "--tta", "--bootstrap", 100, cwd=tmp_path)
    done = succeed("predict", "set/images", "--run", folder, "--tta", "--jsonl", cwd=tmp_path)
    rows = {row["path"]: row for row in map(json.loads, done.out.splitlines())}
    arrays = runs[0].scores("tta")
    assert not np.allclose(arrays["test_p1"], runs[0].scores()["test_p1"], atol=1e-6)
    columns = [f"p_{n.lower().replace(' ', '_')}" for n in runs[0].task.findings]
    found = [[rows[f"set/{file}"][column] for column in columns] for file in arrays["test_files"]]
    assert np.allclose(found, arrays["test_p1"], atol=1e-6)
