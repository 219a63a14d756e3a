"""Tests of task and inputs: from grey pixels to logits, from logits to scores and losses."""

import math

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from common.console import InputError
from common.task import Task
from models.inputs import Inputs
from tests.shared import CPU


def test_scores_do_not_saturate():
    """In float32 softmax of a gap of 20 and of 30 are both 1: a tie that is none."""
    logits = torch.tensor([[-10.0, 10.0], [-15.0, 15.0], [3.0, 1.0]])
    p = Task().scores(logits)
    assert p.dtype == np.float64 and p.shape == (3, 1) and p[0, 0] < p[1, 0] < 1
    assert p[2, 0] == pytest.approx(1 / (1 + math.exp(2)), rel=1e-12)
    assert Task().scores(logits, 2.0)[2, 0] == pytest.approx(1 / (1 + math.exp(1)), rel=1e-12)


def test_columns_of_classes():
    """K classes: "any disease", then a column for every class but the healthy one."""
    task = Task(("healthy", "a", "b"))
    logits = np.random.default_rng(0).normal(0, 3, (20, 3))
    p = scipy.special.softmax(logits / 1.5, axis=1)
    expected = np.stack([1 - p[:, 0], p[:, 1], p[:, 2]], axis=1)
    assert np.allclose(task.scores(logits, 1.5), expected, atol=1e-12)
    assert task.findings == ("any disease", "a", "b") and task.outputs == 3
    assert task.truth([0, 1, 2]).tolist() == [[0, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert task.truth([0]).dtype == np.int8
    assert Task().findings == ("PNEUMONIA",) and Task().truth([0, 1]).tolist() == [[0], [1]]
    for classes in ((), ("a",), ("a", "a"), ("healthy", "any disease", "b")):
        with pytest.raises(InputError, match="different classes"):
            Task(classes)


def test_class_weights():
    assert Task().class_weights(np.array([0, 1, 1, 1])).tolist() == pytest.approx([2, 2 / 3])
    labels = np.random.default_rng(0).choice(5, 200, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    expected = compute_class_weight("balanced", classes=np.arange(5), y=labels)
    found = Task(tuple("abcde")).class_weights(labels)
    assert found.tolist() == pytest.approx(expected.tolist()) and found[labels].mean() == pytest.approx(1)
    assert np.isfinite(Task().class_weights(np.array([0, 0]))).all()


def test_losses_by_hand():
    """Smoothing 0.1 over two classes: targets 0.95 and 0.05; weights as scikit-learn's sample weights."""
    logits, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    log = np.log(scipy.special.softmax(logits.numpy().astype(float), axis=1))
    found = Task().losses(logits, y, label_smoothing=0.1).mean().item()
    expected = -np.mean([0.95 * log[0, 0] + 0.05 * log[0, 1], 0.95 * log[1, 1] + 0.05 * log[1, 0]])
    assert found == pytest.approx(expected, rel=1e-6) and Task().weights(y).tolist() == [1.0, 1.0]
    weight = torch.tensor([2.0, 0.5])
    found = (Task().losses(logits, y, weight).sum() / Task().weights(y, weight).sum()).item()
    assert found == pytest.approx(
        sklearn.metrics.log_loss([0, 1], np.exp(log), sample_weight=[2, 0.5]), rel=1e-6
    )


@pytest.mark.parametrize("weight", [None, torch.tensor([3.0, 0.5, 1.0])])
def test_losses_add_up_to_torchs_mean(weight):
    """Whoever computes which part of a batch: the sum of losses over the sum of weights is the mean loss."""
    task, rng = Task(("a", "b", "c")), torch.Generator().manual_seed(0)
    logits, y = torch.randn(30, 3, generator=rng), torch.randint(3, (30,), generator=rng)
    expected = F.cross_entropy(logits, y, weight=weight, label_smoothing=0.05)
    total = task.weights(y, weight).sum()
    parts = [task.losses(z, t, weight, 0.05).sum() / total for z, t in zip(logits.split(7), y.split(7))]
    assert torch.allclose(sum(parts), expected, rtol=1e-6)


def test_scale():
    x = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)
    assert Inputs((0.5,) * 3, (0.5,) * 3, CPU).scale(x)[:, :, 0, 0].tolist() == [[-1] * 3, [0] * 3, [1] * 3]
    found = Inputs((0.1, 0.2), (0.5, 0.25), CPU).scale(x)
    assert found[2, :, 0, 0].tolist() == pytest.approx([1.8, 3.2])


def test_logits_are_averaged_over_views():
    """And are float32 whatever the model gives."""
    views = (lambda x: x, lambda x: x.flip(-1), lambda x: x * 0)
    inputs = Inputs((0.5,), (0.25,), CPU, views=views)

    def model(x):
        return x.flatten(1).double()

    x = torch.rand(2, 1, 2, 2)
    expected = sum((v(x) - 0.5) / 0.25 for v in views).flatten(1) / 3
    found = inputs.logits(model, x)
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-6)
    pixels = np.array([[[0, 51], [102, 255]]], np.uint8)
    assert inputs.grey(pixels).flatten().tolist() == pytest.approx([0, 0.2, 0.4, 1.0])


def test_focal_loss_is_torchvisions():
    """Of two classes and of findings, without weights; gamma 0 is cross-entropy."""
    from torchvision.ops import sigmoid_focal_loss

    rng = torch.Generator().manual_seed(0)
    logits, findings = torch.randn(20, 3, generator=rng) * 3, torch.randint(0, 2, (20, 3), generator=rng)
    several, two, three = Task(("a", "b", "c"), "sigmoid"), Task(), Task(("a", "b", "c"))
    for gamma in (0.5, 2.0):
        expected = sigmoid_focal_loss(logits, findings.float(), alpha=-1, gamma=gamma).sum(1)
        assert torch.allclose(several.losses(logits, findings, focal_gamma=gamma), expected, atol=1e-6)
        y = findings[:, 0]
        expected = sigmoid_focal_loss(logits[:, 1] - logits[:, 0], y.float(), alpha=-1, gamma=gamma)
        two_sided = torch.stack([0 * logits[:, 0], logits[:, 1] - logits[:, 0]], 1)
        got = two.losses(two_sided, y, focal_gamma=gamma)
        assert torch.allclose(got, expected, atol=1e-6)
        p = logits.softmax(1)[:, 2]  # of three classes, by the paper's formula
        got = three.losses(logits, torch.full((20,), 2), focal_gamma=gamma)
        assert torch.allclose(got, -((1 - p) ** gamma) * p.log(), atol=1e-5)
    unknown = torch.full((20, 3), -1)
    assert not several.losses(logits, unknown, focal_gamma=2.0).any()


def test_focal_loss_has_finite_gradients():
    sure = torch.tensor([[-60.0, 60.0], [-60.0, 60.0]])  # once right, once wrong
    for task, y in ((Task(), [1, 0]), (Task(("a", "b"), "sigmoid"), [[0, 1], [1, 0]])):
        logits = sure.clone().requires_grad_()
        task.losses(logits, torch.tensor(y), focal_gamma=2.0).sum().backward()
        assert torch.isfinite(logits.grad).all()


def test_decisions_of_an_only_finding_and_of_several():
    """The columns of predict.py, their thresholds and answers, written out by hand."""
    two = Task()
    decisions = two.decisions({"PNEUMONIA": 0.7}, guaranteed=0.6)
    assert [(d.column, d.point, d.threshold) for d in decisions] == [
        ("decision@0.5", "@0.5", 0.5),
        ("decision@Rec", "@Rec", 0.7),
        ("decision@Guar", "@Guar", 0.6),
    ]
    assert [d.answer([0.65]) for d in decisions] == ["PNEUMONIA", "NORMAL", "PNEUMONIA"]
    assert [d.answer([0.7]) for d in decisions] == ["PNEUMONIA"] * 3  # from the threshold on
    assert [d.point for d in two.decisions({"PNEUMONIA": 0.7})] == ["@0.5", "@Rec"]
    assert two.score_columns == {"PNEUMONIA": "p_pneumonia"} and two.scores_name == "p_pneumonia"
    assert two.by_finding({"PNEUMONIA": 0.7}) == 0.7 and two.told_apart("PNEUMONIA") == []
    only = Task(("Edema",), "sigmoid").decisions({"Edema": 0.2})
    assert [d.answer([0.3]) for d in only] == ["no Edema", "Edema"]

    table = Task(("Edema", "Mass"), "sigmoid")
    thresholds = {"Edema": 0.2, "Mass": None}  # of Mass there were too few images
    decisions = table.decisions(thresholds, guaranteed=0.6)
    assert [(d.column, d.point, d.finding, d.k) for d in decisions] == [
        ("decision@Rec_edema", "@Rec", "Edema", 0),
        ("decision@Rec_mass", "@Rec", "Mass", 1),
    ]
    assert [d.answer([0.2, 0.9]) for d in decisions] == ["yes", None]
    assert decisions[0].answer([0.1, 0.9]) == "no" and table.scores_name == "p"
    assert table.by_finding(thresholds) == thresholds and table.told_apart("Mass") == ["Mass"]
    many = [Task(("NORMAL", "A", "B")).one_of_many, two.one_of_many, table.one_of_many]
    assert many == [True, False, False]


def test_the_finding_that_a_flag_names():
    two, table = Task(), Task(("Edema", "Mass"), "sigmoid")
    assert two.chosen_finding(None) == two.chosen_finding("PNEUMONIA") == "PNEUMONIA"
    assert table.chosen_finding("Mass") == "Mass"
    with pytest.raises(InputError, match="--finding: which of Edema, Mass"):
        table.chosen_finding(None)
    with pytest.raises(InputError, match="--finding mass is not one of Edema, Mass"):
        table.chosen_finding("mass")
