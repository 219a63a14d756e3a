"""Tests of studies/transfer.py: heads on frozen features, and whether their thresholds travel."""

import numpy as np
import pytest
import sklearn.decomposition
import torch
from scipy.special import log_softmax, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import data
from records.run import Run
from studies import transfer
from tests.shared import cli, refused, succeed
from tests.test_studies import folder_of_nih


def clouds(count=300, dim=6, apart=1.0, seed=0):
    """(features, targets): two clouds, apart in the first direction."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 3 % 2  # a third is sick
    x = rng.normal(size=(count, dim))
    x[:, 0] += apart * y
    return x, y


def test_normalised_logits_give_the_loss_of_the_paper():
    rng = np.random.default_rng(0)
    z, y = 3 * rng.normal(size=(8, 2)), rng.integers(2, size=8)
    by_hand = -log_softmax(z / (0.5 * np.linalg.norm(z, axis=1, keepdims=True)), axis=1)[np.arange(8), y]
    loss = transfer.of_directions(0.5)
    logits = torch.tensor(z, requires_grad=True)
    got = loss(logits, torch.from_numpy(y))
    assert np.allclose(got.detach(), by_hand)
    assert torch.allclose(loss(7 * logits, torch.from_numpy(y)), got)  # length is not rewarded
    got.sum().backward()
    assert torch.allclose((logits.grad * logits).sum(1), torch.zeros(8, dtype=torch.float64), atol=1e-12)


def test_directions_that_tell_a_source_are_found_and_taken_away():
    x, source = clouds(apart=3.0)
    found = transfer.telling(x, source == 1, count=3)
    assert np.allclose(found.T @ found, np.eye(3))
    assert abs(found[0, 0]) > 0.95  # the first is the direction in which they were put apart
    left = x - x @ found @ found.T
    again = LogisticRegression(class_weight="balanced").fit(left, source).predict_proba(left)[:, 1]
    before = LogisticRegression(class_weight="balanced").fit(x, source).predict_proba(x)[:, 1]
    assert roc_auc_score(source, before) > 0.95 > 0.65 > roc_auc_score(source, again)


def test_directions_in_which_views_vary_are_the_leading_singular_vectors():
    differences = np.random.default_rng(0).normal(size=(200, 5)) * [1, 4, 2, 0.1, 0.5]
    found = transfer.varying(differences, 2)
    fitted = sklearn.decomposition.TruncatedSVD(2, algorithm="arpack").fit(differences)
    assert np.allclose(np.abs(found.T @ fitted.components_.T), np.eye(2), atol=1e-6)


def test_a_head_of_cross_entropy_is_a_balanced_logistic_regression(monkeypatch):
    monkeypatch.setattr(transfer, "EPOCHS", 80)
    monkeypatch.setattr(transfer, "RATE", 1e-2)
    monkeypatch.setattr(transfer, "DECAY", 0.0)
    x, y = clouds(apart=2.0)
    p = transfer.fit(x, y, transfer.cross_entropy())(x)
    peer = LogisticRegression(C=1e6, class_weight="balanced").fit(x, y).predict_proba(x)[:, 1]
    assert np.allclose(logit(p), logit(peer), atol=0.3) and np.ptp(logit(peer)) > 5
    smooth = transfer.fit(x, y, transfer.cross_entropy(0.3))(x)
    assert np.ptp(logit(smooth)) < np.ptp(logit(p)) / 1.5


def rows_of(out):
    """{(backbone, head): {column: cell}} of each table that was printed."""
    found = []
    for part in out.split("| backbone |")[1:]:
        lines = [line.strip("| ").split(" | ") for line in part.splitlines() if "|" in line]
        header, body = lines[0], lines[2:]
        found.append({tuple(row[:2]): dict(zip(header[1:], row[2:])) for row in body})
    return found


def test_the_choice_is_printed_before_the_test_images_are_opened(bench, tmp_path, monkeypatch, capsys):
    nih = folder_of_nih(tmp_path / "nih", [20, 90, 160, 230])
    monkeypatch.setattr(transfer, "EPOCHS", 3)
    opened, load_test = [], data.load_test

    def load_later(config):
        opened.append(capsys.readouterr().out)
        return load_test(config)

    monkeypatch.setattr(transfer, "load_test", load_later)
    monkeypatch.chdir(bench)
    names = [f"outputs/scratch-seed{k}" for k in (0, 1)]
    backbones = [transfer.Backbone(Run(name), torch.device("cpu")) for name in names]
    rows, after = transfer.compare(backbones, nih)
    assert "Chosen: " in opened[0] and "test" not in opened[0].split("Chosen: ")[1]
    (before,) = rows_of(opened[0])
    heads = [head for backbone, head in before if backbone == names[0]]
    assert len(heads) == 8 and len(before) == 3 * 8  # no series and no stamp are told apart on drawn images
    chosen = tuple(opened[0].split("Chosen: ")[1].strip().split(", ", maxsplit=1))
    allowed = {n: row for n, row in before.items() if row["veto"] == "no"} or before
    assert float(before[chosen]["panel"]) == max(float(row["panel"]) for row in allowed.values())
    assert rows_of(capsys.readouterr().out)[0].keys() == before.keys() == after.keys() == rows.keys()
    _, threshold = rows[names[0], heads[0]]
    known, parts = backbones[0].read(nih)
    x, y = parts["validation"]
    p = transfer.trained(known, transfer.cross_entropy())(x)
    assert (p[y == 1] >= threshold).mean() >= 0.95
    assert float(before[names[0], heads[0]]["val AUROC"]) == pytest.approx(roc_auc_score(y, p), abs=6e-4)


def test_transfer_refuses_runs_of_other_validation_images(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "EPOCHS", 1)
    nih = folder_of_nih(tmp_path / "nih", [20, 90, 160, 230])
    how = ("--data-dir", "xray", "--img-size", 32, "--max-steps", 1, "--split-seed", 1)
    succeed("train_scratch", *how, "--out", tmp_path / "other", cwd=bench)
    runs = ("outputs/scratch-seed0", tmp_path / "other")
    refused(cli("studies.transfer", "--run", *runs, "--nih", nih, cwd=bench), "other validation images")
