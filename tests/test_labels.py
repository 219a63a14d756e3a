"""Tests of tasks with several findings: losses, scores, what is watched, and every figure of them."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import sklearn.metrics
import torch
import torch.nn.functional as F

from calibration.intervals import bootstrap_weights, difference_of_means, mean_auroc_draws, wilson_interval
from calibration.operating_point import LEAST, Rule, class_figures, evaluate
from common.console import InputError
from common.task import Task
from layouts.choices import Choices
from layouts.tables import read_table
from metrics import choose_threshold_with_guarantee, fit_temperature
from records.schema import wrong_calibration
from tests.shared import of_one
from training.loss import Supervised, total_weight, with_both_classes

FOUR = Task(("No Finding", "Effusion", "Mass", "Edema"), "sigmoid")
FIVE = Task(("Normal", "a", "b", "c", "d"))
QUICK = Rule(bootstrap=100, min_recall=0.9, confidence=0.8)


def several(task, n=400, seed=0, unknown=0.0):
    """Scores of a made-up model for evaluate(): better than chance at every finding."""
    rng, arrays = np.random.default_rng(seed), {}
    for side in ("val", "test"):
        if task.kind == "softmax":
            labels = rng.integers(task.outputs, size=n)
            logits = rng.normal(0, 1, (n, task.outputs)) + 1.5 * np.eye(task.outputs)[labels]
        else:
            labels = (rng.random((n, task.outputs)) < 0.3).astype(np.int8)
            logits = rng.normal(0, 1, (n, task.outputs)) + 1.5 * labels - 1
            labels[rng.random(labels.shape) < unknown] = -1
        arrays[f"{side}_labels"], arrays[f"{side}_logits"] = labels, logits.astype(np.float32)
        arrays[f"{side}_patients"] = np.array([f"p{i // 2}" for i in range(n)])
    return arrays


# ---------------------------------------------------------------- the task


def test_findings_of_a_table_are_columns():
    z = np.random.default_rng(0).normal(0, 3, (9, 4))
    p = 1 / (1 + np.exp(-z / 2))
    assert FOUR.findings == ("any finding", "No Finding", "Effusion", "Mass", "Edema") and FOUR.outputs == 4
    assert np.allclose(FOUR.scores(z, 2.0), np.concatenate([1 - p[:, :1], p], axis=1), atol=1e-12)
    truth = FOUR.truth(np.array([[1, 0, 0, -1], [0, 1, -1, 0], [-1, 0, 1, 0], [-1, 0, -1, 0]], dtype=np.int8))
    assert truth.tolist() == [[0, 1, 0, 0, -1], [1, 0, 1, -1, 0], [1, -1, 0, 1, 0], [-1, -1, 0, -1, 0]]
    assert FOUR.averaged == slice(1, None) and FIVE.averaged == slice(0, None)
    for task in (Task(("no finding", "any finding")), Task(("any finding", "Mass"), "sigmoid")):
        assert (
            task.findings[task.averaged] == task.findings
        )  # a name of the user's own, and no column of ours
    plain = Task(("Effusion",), "sigmoid")
    assert plain.findings == ("Effusion",) and plain.scores(z[:, :1]).shape == (9, 1)
    for classes in ((), ("a", "a"), ("No Finding", "any finding")):
        with pytest.raises(InputError, match="different"):
            Task(classes, "sigmoid")


def test_answers():
    """What explains a finding: its own logit, or the healthy one's with the sign turned."""
    z = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    for task in (FIVE, FOUR):
        logits = z[:, : task.outputs]
        for k, name in enumerate(task.findings):
            answer = task.answer(name)
            assert np.allclose(answer.probability(logits), task.scores(logits)[:, k], atol=1e-6)
            assert answer.logit(logits).shape == (5,)
    assert torch.equal(FIVE.answer("any disease").logit(z), -z[:, 0])
    assert FIVE.answer("Normal").k == 0
    with pytest.raises(InputError, match="x is not one of"):
        FIVE.answer("x")


def test_binary_loss_is_torchs():
    rng = torch.Generator().manual_seed(0)
    logits, y = torch.randn(20, 4, generator=rng), torch.randint(2, (20, 4), generator=rng)
    weight = torch.tensor([0.5, 2.0, 7.0, 1.0])
    found = FOUR.losses(logits, y, weight).sum() / FOUR.weights(y).sum()
    expected = F.binary_cross_entropy_with_logits(logits, y.float(), pos_weight=weight)
    assert torch.allclose(found, expected, rtol=1e-6)
    smooth = FOUR.losses(logits, y, label_smoothing=0.2).sum() / 80
    assert torch.allclose(smooth, F.binary_cross_entropy_with_logits(logits, 0.1 + 0.8 * y), rtol=1e-6)


def test_unknown_labels_weigh_nothing():
    """The loss of a finding is the mean over the images whose label is known."""
    rng = np.random.default_rng(0)
    targets = rng.choice([-1, 0, 1], size=(30, 4)).astype(np.int8)
    logits = torch.tensor(rng.normal(0, 1, (30, 4)), dtype=torch.float32, requires_grad=True)
    y = torch.from_numpy(targets)
    for k in range(4):  # one finding alone
        one, labels = (
            Task((FOUR.classes[k],), "sigmoid"),
            torch.tensor(np.where(targets < 0, np.nan, targets)),
        )
        known = ~torch.isnan(labels[:, k])
        theirs = F.binary_cross_entropy_with_logits(logits[known, k], labels[known, k].float())
        ours = one.losses(logits[:, [k]], y[:, [k]]).sum() / one.weights(y[:, [k]]).sum()
        assert torch.allclose(ours, theirs, rtol=1e-6)
    (FOUR.losses(logits, y).sum() / FOUR.weights(y).sum()).backward()
    assert ((logits.grad == 0) == (y < 0)).all()
    total = FOUR.weights(y).sum()
    parts = [FOUR.losses(z, t).sum() / total for z, t in zip(logits.split(7), y.split(7))]
    assert torch.allclose(sum(parts), FOUR.losses(logits, y).sum() / total)
    expected = [(targets[:, k] == 0).sum() / (targets[:, k] == 1).sum() for k in range(4)]
    assert FOUR.class_weights(targets).tolist() == pytest.approx(expected, rel=1e-6)
    assert FOUR.class_weights(np.zeros((3, 4), np.int8)).tolist() == [1] * 4


def test_scores_and_truth_of_classes_against_scipy():
    rng = np.random.default_rng(4)
    z, y = rng.normal(0, 30, (50, 5)), rng.integers(5, size=50)
    p = scipy.special.softmax(z / 1.7, axis=1)
    scores, truth = FIVE.scores(z, 1.7), FIVE.truth(y)
    assert FIVE.findings == ("any disease", "a", "b", "c", "d")
    assert np.allclose(scores, np.c_[1 - p[:, 0], p[:, 1:]], atol=1e-12) and scores.max() <= 1
    assert truth.tolist() == [[int(k > 0), *(int(k == j) for j in (1, 2, 3, 4))] for k in y]
    counts = [sum(y == k) for k in range(5)]
    assert FIVE.class_weights(y) == pytest.approx([50 / (5 * n) for n in counts])


def test_a_batch_without_a_known_label_changes_nothing():
    """Its loss is 0, not 0 / 0: in a sparse table such batches happen, and the run goes on."""
    y = torch.tensor([[-1, -1, -1, -1], [-1, 1, -1, -1]], dtype=torch.int8)
    for rows, loss in ((y[:1], 0.0), (y, np.log(2))):
        logits = torch.zeros(len(rows), 4, requires_grad=True)
        found = FOUR.losses(logits, rows).sum() / total_weight(Supervised(FOUR), rows)
        found.backward()
        assert found.item() == pytest.approx(loss) and ((logits.grad != 0) == (rows == 1)).all()


def test_labels_and_loss_of_torchxrayvision(tmp_path):
    """A table as CheXpert has it: 1, 0 and NaN of that package are our 1, 0 and -1, and the loss over its
    known labels is ours."""
    xrv = pytest.importorskip("torchxrayvision")
    names, rng = ("Edema", "Fracture", "Pneumonia"), np.random.default_rng(0)
    lines = [",".join(("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", *names))]
    for i in range(40):
        name = f"train/patient{i:03d}/study1/view1.jpg"
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
        cells = rng.choice(["1.0", "0.0", "-1.0", ""], 3)
        lines.append(f"{name},Male,50,Frontal,PA,,{','.join(cells)}")
    (tmp_path / "train.csv").write_text("\n".join(lines))
    theirs = xrv.datasets.CheX_Dataset(str(tmp_path), str(tmp_path / "train.csv"), unique_patients=False)
    columns = [theirs.pathologies.index(name) for name in names]
    labels = torch.from_numpy(theirs.labels[:, columns])
    ours = torch.from_numpy(
        read_table(tmp_path / "train.csv", tmp_path, names, Choices(blank="ignore")).targets
    )
    known = ~torch.isnan(labels)
    assert torch.equal(known, ours >= 0) and torch.equal(labels[known], ours[known].float())
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    expected = F.binary_cross_entropy_with_logits(logits[known], labels[known])
    task = Task(names, "sigmoid")
    assert torch.allclose(task.losses(logits, ours).sum() / task.weights(ours).sum(), expected, rtol=1e-6)


def test_temperature_of_findings_against_scipy():
    arrays = several(FOUR, unknown=0.2)
    z, y = arrays["val_logits"].astype(float), arrays["val_labels"]
    known = y >= 0

    def loss(t):
        return sklearn.metrics.log_loss(y[known], scipy.special.expit(z / t)[known])

    best = scipy.optimize.minimize_scalar(loss, bounds=(0.05, 20), method="bounded").x
    assert fit_temperature(z, y) == pytest.approx(best, rel=1e-3)
    with pytest.raises(InputError, match="known label"):
        fit_temperature(z, np.full_like(y, -1))
    with pytest.raises(InputError, match="-1..1"):
        fit_temperature(z, y + 1)


# ---------------------------------------------------------------- what is watched


def test_watched_figures_against_sklearn():
    s = several(FIVE)
    found = Supervised(FIVE).watch(s["val_labels"], s["val_logits"])
    p = scipy.special.softmax(s["val_logits"].astype(float), axis=1)
    expected = sklearn.metrics.roc_auc_score(s["val_labels"], p, multi_class="ovr", average="macro")
    assert found["val_auroc"] == pytest.approx(expected, abs=1e-12)
    assert found["val_accuracy"] == sklearn.metrics.accuracy_score(s["val_labels"], p.argmax(axis=1))

    s = several(FOUR, unknown=0.1)
    y, z = s["val_labels"], s["val_logits"]
    y[:, 2] = np.minimum(y[:, 2], 0)  # never present: not part of the mean
    columns = [sklearn.metrics.roc_auc_score(y[y[:, k] >= 0, k], z[y[:, k] >= 0, k]) for k in (0, 1, 3)]
    found = Supervised(FOUR).watch(y, z, "train")
    accuracy = sklearn.metrics.accuracy_score(y[y >= 0], z[y >= 0] > 0)
    assert found["train_accuracy"] == pytest.approx(accuracy)
    assert found["train_auroc"] == pytest.approx(np.mean(columns), abs=1e-12)
    assert with_both_classes(FOUR.truth(y)).tolist() == [True, True, True, False, True]
    with pytest.raises(InputError, match="no finding is present"):
        Supervised(FOUR).watch(np.zeros_like(y), z)
    assert Supervised(FOUR).watch(np.zeros_like(y), z, "train")["train_auroc"] is None


@pytest.mark.parametrize("watched, best", [("auroc", 0), ("loss", 1), ("accuracy", 2)])
def test_watch_chooses_the_epoch(watched, best):
    rows = [
        {"val_auroc": 0.9, "val_loss": 0.5, "val_accuracy": 0.6},
        {"val_auroc": 0.8, "val_loss": 0.4, "val_accuracy": 0.7},
        {"val_auroc": 0.7, "val_loss": 0.6, "val_accuracy": 0.8},
    ]
    merits = [Supervised(FIVE, watched=watched).merit(row) for row in rows]
    assert int(np.argmax(merits)) == best


# ---------------------------------------------------------------- figures


def test_class_figures_against_sklearn():
    s = several(FIVE)
    calibration, _ = evaluate(s, QUICK, FIVE)
    for side in ("val", "test"):
        y, z = s[f"{side}_labels"], s[f"{side}_logits"]
        decided, found = z.argmax(axis=1), calibration["summary"][side]
        report = sklearn.metrics.classification_report(
            y, decided, target_names=FIVE.classes, output_dict=True, zero_division=0
        )
        for name in FIVE.classes:
            row = found["classes"][name]
            theirs = [report[name][k] for k in ("precision", "recall", "f1-score", "support")]
            assert [row["precision"], row["recall"], row["f1"], row["n"]] == pytest.approx(theirs)
        assert found["accuracy"]["value"] == pytest.approx(report["accuracy"])
        assert found["macro_f1"]["value"] == pytest.approx(report["macro avg"]["f1-score"])
        assert found["confusion"] == sklearn.metrics.confusion_matrix(y, decided).tolist()
        p = scipy.special.softmax(z.astype(float), axis=1)
        mean = sklearn.metrics.roc_auc_score(y, p, multi_class="ovr", average="macro")
        assert found["auroc"]["value"] == pytest.approx(mean)
        for key in ("accuracy", "macro_f1", "auroc", "auprc"):
            assert found[key]["lo"] < found[key]["value"] < found[key]["hi"]


def test_class_figures_where_classes_are_absent():
    """A class that is never decided, one that never occurs, and one that does neither; intervals against a
    bootstrap of scikit-learn's figures."""
    rng = np.random.default_rng(5)
    y, decided = rng.choice([0, 1, 3], 40), rng.choice([0, 1, 2], 40)
    patients = np.arange(40) // 3
    found = class_figures(y, decided, FIVE.classes, patients, QUICK)
    kinds = dict(labels=range(5), average=None, zero_division=0)
    for key in ("precision", "recall", "f1"):
        theirs = getattr(sklearn.metrics, f"{key}_score")(y, decided, **kinds)
        assert [found["classes"][name][key] for name in FIVE.classes] == pytest.approx(theirs.tolist())
    assert [found["classes"][name]["recall_interval"] is None for name in FIVE.classes] == [0, 0, 1, 0, 1]
    draws = []
    for weights in np.concatenate(list(bootstrap_weights(patients, 100))):
        i = np.repeat(np.arange(40), weights)
        f1 = sklearn.metrics.f1_score(y[i], decided[i], average="macro", zero_division=0)
        draws.append((sklearn.metrics.accuracy_score(y[i], decided[i]), f1))
    for key, values in zip(("accuracy", "macro_f1"), np.transpose(draws)):
        span = [found[key]["lo"], found[key]["hi"]]
        assert span == pytest.approx(np.percentile(values, [2.5, 97.5]))
    f1 = sklearn.metrics.f1_score(y, decided, average="macro", zero_division=0)
    assert found["macro_f1"]["value"] == pytest.approx(f1)


def test_findings_are_evaluated_as_if_alone():
    """Thresholds, figures and intervals of a finding are those of a task of this finding only, on the images
    whose label is known (and on the patients of these)."""
    s = several(FOUR)
    calibration, p1 = evaluate(s, QUICK, FOUR)
    assert list(calibration["findings"]) == list(FOUR.findings) and p1["test"].shape == (400, 5)
    for k, name in enumerate(FOUR.classes):
        alone = {
            f"{side}_{key}": s[f"{side}_{key}"][:, k].astype(int) if key == "labels" else s[f"{side}_{key}"]
            for side in ("val", "test")
            for key in ("labels", "patients")
        }
        for side in ("val", "test"):
            z = s[f"{side}_logits"][:, k].astype(float)
            alone[f"{side}_logits"] = np.stack([0 * z, z], axis=1)
        expected = of_one(evaluate(alone, QUICK)[0])
        found = calibration["findings"][name]
        assert found["threshold"] == pytest.approx(expected["threshold"], rel=1e-12)
        for point in ("at_rec", "at_0.5"):
            for key in ("recall", "specificity", "auroc", "auprc", "tp", "fp"):
                assert found["test"][point][key] == pytest.approx(expected["test"][point][key])
            assert found["test"][point]["interval"] == expected["test"][point]["interval"]


def test_unknown_labels_are_in_no_figure():
    s = several(FOUR, unknown=0.3)
    found = evaluate(s, QUICK, FOUR)[0]["findings"]["Mass"]["test"]["at_rec"]
    y, z = s["test_labels"][:, 2], s["test_logits"][:, 2].astype(float)
    known = y >= 0
    assert found["tp"] + found["fp"] + found["tn"] + found["fn"] == known.sum() < 400
    expected = sklearn.metrics.average_precision_score(y[known], scipy.special.expit(z[known]))
    assert found["auprc"] == pytest.approx(expected)


def test_one_finding_with_unknown_labels():
    """Patients are drawn from all images of the table, figures are of those whose label is known."""
    task, s = Task(("Mass",), "sigmoid"), several(Task(("Mass",), "sigmoid"), unknown=0.3)
    calibration, p1 = evaluate(s, QUICK, task)
    y, p = s["test_labels"][:, 0], scipy.special.expit(s["test_logits"][:, 0].astype(float))
    known, only = y >= 0, of_one(calibration)
    found = only["test"]["at_rec"]
    assert np.allclose(p1["test"], p) and len(p) == 400 > known.sum()
    called = p[known] >= only["threshold"]
    matrix = sklearn.metrics.confusion_matrix(y[known], called)
    assert [[found["tn"], found["fp"]], [found["fn"], found["tp"]]] == matrix.tolist()
    assert found["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(y[known], p[known]))
    accuracies = []
    for weights in np.concatenate(list(bootstrap_weights(s["test_patients"], 100))):
        i = np.repeat(np.flatnonzero(known), weights[known])
        accuracies.append(((p[i] >= only["threshold"]) == y[i]).mean())
    assert found["interval"]["acc"]["bootstrap"] == pytest.approx(np.percentile(accuracies, [2.5, 97.5]))


def test_rare_findings_get_a_reason_instead_of_a_threshold():
    s = several(FOUR)
    s["val_labels"][:, 1] = 0
    s["val_labels"][: LEAST - 1, 1] = 1
    calibration, _ = evaluate(s, QUICK, FOUR)
    rare = calibration["findings"]["Effusion"]
    assert rare["why_not"] == f"{LEAST - 1} validation images with it, fewer than {LEAST}"
    assert "threshold" not in rare and set(rare["curves"]) == {"test"}
    expected = sklearn.metrics.roc_auc_score(s["test_labels"][:, 1], s["test_logits"][:, 1])
    assert rare["curves"]["test"]["auroc"]["value"] == pytest.approx(expected)
    assert "Effusion" not in calibration["summary"]["val"]["findings"]
    assert "Effusion" in calibration["summary"]["test"]["findings"]
    for side in ("val", "test"):
        s[f"{side}_labels"][:] = 0
    with pytest.raises(InputError, match="no finding has enough images"):
        evaluate(s, QUICK, FOUR)


def test_a_finding_of_two_patients_does_not_cost_the_others_their_thresholds():
    """Ten images with a known label, of one sick and one healthy patient: half of the draws lack one."""
    s = several(FOUR)
    s["val_labels"][:, 1] = -1
    s["val_labels"][:10, 1] = np.repeat([1, 0], 5)
    s["val_patients"][:10] = np.repeat(["a", "b"], 5)
    found = evaluate(s, QUICK, FOUR)[0]["findings"]
    assert found["Effusion"]["why_not"] == "validation images of 2 patients, fewer than 5"
    assert all("threshold" in found[name] for name in FOUR.findings if name != "Effusion")


@pytest.mark.parametrize("count", [0, 3])
def test_test_images_decide_nothing_about_thresholds(count):
    """A finding that is rare on test keeps the threshold, and the share of the confidence, of validation."""
    rule = Rule(0.8, 0.8, jointly=True, bootstrap=100)
    usual, _ = evaluate(several(FOUR), rule, FOUR)
    s = several(FOUR)
    s["test_labels"][:, 1] = 0
    s["test_labels"][:count, 1] = 1
    rare, _ = evaluate(s, rule, FOUR)
    assert rare["jointly"] == usual["jointly"]
    for name in FOUR.findings:
        a, b = usual["findings"][name], rare["findings"][name]
        assert (a["threshold"], a["val"]) == (b["threshold"], b["val"])
        assert {k: a["guarantee"][k] for k in ("threshold", "confidence")} == {
            k: b["guarantee"][k] for k in ("threshold", "confidence")
        }
    effusion = rare["findings"]["Effusion"]
    assert effusion["test_why_not"] == f"{count} test images with it, fewer than {LEAST}"
    assert "test" not in effusion and set(effusion["curves"]) == {"val"} == set(effusion["probability"])
    assert "Effusion" not in rare["summary"]["test"]["findings"]
    assert wrong_calibration(rare | {"checkpoint": "x"}, FOUR) == []
    del effusion["test_why_not"]
    assert wrong_calibration(rare | {"checkpoint": "x"}, FOUR) == [
        "Effusion.test",
        "Effusion.probability.test",
        "Effusion.curves.test",
    ]


def test_class_figures_of_a_perfect_model_claim_no_certainty():
    """Recall, accuracy and F1 are 1 in every draw; limits are those of so many patients."""
    y, patients = np.repeat([0, 1, 2], [40, 20, 12]), np.repeat(np.arange(18), 4)
    found = class_figures(y, y, ("a", "b", "c"), patients, QUICK)
    lows = [wilson_interval(n, n)[0] for n in (10, 5, 3)]
    assert [found["classes"][k]["recall_interval"] for k in "abc"] == [
        pytest.approx([low, 1]) for low in lows
    ]
    assert found["accuracy"] == pytest.approx({"value": 1, "lo": wilson_interval(18, 18)[0], "hi": 1})
    f1 = np.mean([2 * low / (1 + low) for low in lows])
    assert found["macro_f1"] == pytest.approx({"value": 1, "lo": f1, "hi": 1})


def test_mean_auroc_of_perfect_findings_claims_no_certainty():
    s = several(FOUR)
    for side in ("val", "test"):
        s[f"{side}_logits"] = (s[f"{side}_labels"] * 2.0 - 1).astype(np.float32)
    found = evaluate(s, QUICK, FOUR)[0]
    lows = []
    for k in range(4):
        y, patients = s["test_labels"][:, k], np.asarray(s["test_patients"])
        lows.append(0.025 ** (1 / min(len(set(patients[y == 1])), len(set(patients[y == 0])))))
        curve = found["findings"][FOUR.classes[k]]["curves"]["test"]["auroc"]
        assert (curve["value"], curve["lo"], curve["hi"]) == pytest.approx((1, lows[k], 1))
    mean = found["summary"]["test"]["auroc"]
    assert (mean["value"], mean["lo"], mean["hi"]) == pytest.approx((1, np.mean(lows), 1))


def test_jointly_promises_all_floors_at_once():
    """The union bound gives every finding its share of what may go wrong, and in a simulation with known true
    recalls all floors hold at once at least as often as promised."""
    task, rule = Task(("a", "b", "c"), "sigmoid"), Rule(0.8, 0.8, jointly=True, bootstrap=100)
    calibration, _ = evaluate(several(task), rule, task)
    assert calibration["jointly"] == {"confidence": 0.8, "findings": 3}
    for found in calibration["findings"].values():
        assert found["guarantee"]["confidence"] == pytest.approx(1 - 0.2 / 3)
    with pytest.raises(InputError, match="^a: .* with confidence 0.999667: at least"):
        evaluate(several(task), Rule(0.99, 0.999, strict=True, jointly=True, bootstrap=100), task)
    rng, held, alone, draws = np.random.default_rng(0), 0, 0, 300
    for _ in range(draws):
        p = rng.random((40, 3))  # scores of positives: the true recall of a threshold t is 1 - t
        y, negatives = np.r_[np.ones(40, int), 0], np.r_[0.0]
        for confidence, count in ((1 - 0.2 / 3, "all"), (0.8, "each")):
            floors = [
                1 - choose_threshold_with_guarantee(y, np.r_[p[:, k], negatives], 0.8, confidence)[0] >= 0.8
                for k in range(3)
            ]
            held += all(floors) if count == "all" else 0
            alone += all(floors) if count == "each" else 0
    assert held / draws >= 0.8 - 2 * np.sqrt(0.8 * 0.2 / draws)
    assert alone / draws < held / draws  # without the bound less is promised, and less holds


def test_difference_of_means_against_a_plain_bootstrap():
    """With unknown labels; a draw without both classes of a finding has the mean of the others."""
    s, other = several(FOUR, n=60, unknown=0.2), several(FOUR, n=60, seed=1)
    truth, groups = FOUR.truth(s["test_labels"])[:, 1:], s["test_patients"]
    truth[np.flatnonzero(truth[:, 3] == 1)[2:], 3] = 0  # two images: missing in some draws
    a, b = (FOUR.scores(x["test_logits"])[:, 1:] for x in (s, other))
    found = difference_of_means(*(mean_auroc_draws(truth, x, groups, n=50) for x in (a, b)))

    def mean(scores, i):
        values = []
        for k in range(4):
            j = i[truth[i, k] >= 0]
            if len(set(truth[j, k])) == 2:
                values.append(sklearn.metrics.roc_auc_score(truth[j, k], scores[j, k]))
        fewer.append(len(values) < 4)
        return np.mean(values)

    fewer, values = [], []
    for weights in np.concatenate(list(bootstrap_weights(groups, 50))):
        i = np.repeat(np.arange(60), weights)
        values.append(mean(a, i) - mean(b, i))
    assert 5 < sum(fewer) < 50
    assert [found["lo"], found["hi"]] == pytest.approx(np.percentile(values, [2.5, 97.5]))
    assert found["difference"] == pytest.approx(mean(a, np.arange(60)) - mean(b, np.arange(60)))


def test_a_guaranteed_threshold_is_never_above_the_recall_first_one():
    """Where validation is separated perfectly, every score between keeps any floor: the lower one is both."""
    s = several(Task(("NORMAL", "PNEUMONIA")))
    for side in ("val", "test"):
        s[f"{side}_logits"][:, 1] = (
            np.where(s[f"{side}_labels"] == 1, 3, -3) + s[f"{side}_logits"][:, 1] * 0.1
        )
        s[f"{side}_logits"][:, 0] = 0
    found = of_one(evaluate(s, Rule(0.8, 0.95, bootstrap=50))[0])
    assert found["guarantee"]["threshold"] <= found["threshold"]
