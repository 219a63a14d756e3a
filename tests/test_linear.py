"""Tests of train_linear's --balance."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import train_linear
from common.task import Task
from data import load_train_val
from images.split import epoch_order
from records.run import Run
from tests.shared import cli, read_json, refused, succeed

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 5)) * [1, 2, 3, 4, 5]
SHORT = ("--epochs", 1, "--max-steps", 1, "--batch-size", 16)


def test_balanced_regression_is_scikit_learns():
    """Weights of classes, of two and three of them, and of findings, against class_weight="balanced"."""
    scaler = StandardScaler().fit(X)

    def logits(weight, bias):
        return X @ np.atleast_2d(weight).T + bias

    for kinds in (2, 3):
        y = np.minimum(RNG.integers(0, 6, 120), kinds - 1)
        peer = LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000).fit(scaler.transform(X), y)
        wanted = peer.decision_function(scaler.transform(X))
        found = logits(*train_linear.fit(X, y, 0.1, Task(tuple("abc")[:kinds]), None, True))
        found = found[:, 1] - found[:, 0] if kinds == 2 else found - found.mean(1, keepdims=True)
        assert np.allclose(found, wanted, atol=1e-3)
    y = (RNG.random((120, 2)) < 0.2).astype(np.int8)
    y[:20, 0] = -1
    found = logits(*train_linear.fit(X, y, 0.1, Task(("a", "b"), "sigmoid"), None, True))
    for k in range(2):
        known = y[:, k] >= 0
        ratio = (y[:, k] == 0).sum() / (y[:, k] == 1).sum()
        peer = LogisticRegression(C=0.1, class_weight={0: 1, 1: ratio}, max_iter=2000)
        peer.fit(scaler.transform(X)[known], y[known, k])
        assert np.allclose(found[:, k], peer.decision_function(scaler.transform(X)), atol=1e-3)


def test_an_image_of_weight_three_counts_three_times():
    y, weights = (X[:, 0] + RNG.normal(size=120) > 0).astype(int), RNG.integers(1, 4, 120)
    scaled = StandardScaler().fit_transform(X)
    peer = LogisticRegression(C=0.1, max_iter=2000).fit(np.repeat(scaled, weights, 0), np.repeat(y, weights))
    weight, bias = train_linear.fit(X, y, 0.1, Task(), weights.astype(float))
    found = X @ (weight[1] - weight[0]) + bias[1] - bias[0]
    assert np.allclose(found, peer.decision_function(scaled), atol=1e-3)


@pytest.mark.parametrize("split", ["pooled", "patient"])
def test_the_yardstick_is_trained_on_the_images_of_the_other_arms(flags, tmp_path, monkeypatch, split):
    """--balance undersample-once: the same split as the scratch arm, and the same images of its epochs."""
    seen, real = [], train_linear.fit

    def watched(features, *more):
        seen.append(len(features))
        return real(features, *more)

    monkeypatch.setattr(train_linear, "fit", watched)
    how = (*flags, "--split", split, "--balance", "undersample-once")
    done = succeed("train_linear", *how, cwd=tmp_path)
    succeed("train_scratch", *how, *SHORT, cwd=tmp_path)
    linear, scratch = (read_json(tmp_path, "outputs", n, "results.json") for n in ("linear", "scratch"))
    assert linear["split"] == scratch["split"] and linear["data"] == scratch["data"]
    assert linear["recipe"]["balance"] == "undersample-once"
    train = load_train_val(Run(tmp_path / "outputs/scratch").config, lambda line: None)[0]
    order = epoch_order(0, 5, train.targets, "undersample-once")  # of any epoch
    counts = np.bincount(train.targets[order])
    assert seen == [len(order)] and counts[0] == counts[1] and f"trained on {len(order)} images" in done.out
    history = linear["history"][0]
    assert 0 <= history["train_auroc"] <= 1


def test_balances_that_need_epochs_or_classes_are_refused(flags, tmp_path):
    refused(cli("train_linear", *flags, "--balance", "undersample", cwd=tmp_path), "undersample-once")
    refused(cli("train_linear", *flags, "--balance", "sources", cwd=tmp_path), "give --also DIR")
    files = sorted(p.relative_to(flags[1]).as_posix() for p in flags[1].glob("train/*/*"))
    (tmp_path / "t.csv").write_text("path,Edema\n" + "\n".join(f"{f},{i % 2}" for i, f in enumerate(files)))
    how = (*flags, "--labels", "t.csv", "--balance")
    refused(cli("train_linear", *how, "undersample-once", cwd=tmp_path), "needs one class an image")
    succeed("train_linear", *how, "weights", cwd=tmp_path)
    assert not (tmp_path / "outputs/linear/training.lock").exists()


def test_the_report_of_logistic_regression_has_no_epoch(own_runs):
    """It is fitted once; of a network validation chose the epoch."""
    alone = succeed("compare", "--run", "outputs/linear", cwd=own_runs).out
    assert "chose the epoch" not in alone and "| Model selection | none; training never opens" in alone
    both = succeed("compare", cwd=own_runs).out
    assert "chose the epoch" in both and "the epoch with the best validation AUROC" in both
