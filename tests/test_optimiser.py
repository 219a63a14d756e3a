"""Tests of the average of the weights: its decay, its statistics of BatchNorm, its way through a run."""

import importlib
import io
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from torch import nn

from models import cnn
from tests.shared import load_pth, toy_subset
from tests.test_loop import toy_loop
from training.step import WarmAverage


def averaged_by_hand(steps, decay):
    """The average of arrays, one a step, in float64: the first is copied, then decay min(d, (1+t)/(10+t))."""
    average = np.asarray(steps[0], dtype=np.float64)
    for updates, value in enumerate(steps[1:], 1):
        share = min(decay, (1 + updates) / (10 + updates))
        average = share * average + (1 - share) * np.asarray(value, dtype=np.float64)
    return average


def test_the_decay_of_the_average_warms_up():
    """A single number, thirty steps: the formula in float64; after them little is left of the first value."""
    model, values = nn.Linear(1, 1), np.random.default_rng(0).normal(size=30)
    for decay in (0.99, 0.3):
        average = WarmAverage(model, decay)
        for value in values:
            nn.init.constant_(model.weight, value)
            average.update_parameters(model)
        assert average.module.weight.item() == pytest.approx(averaged_by_hand(values, decay), abs=1e-6)
    spike = averaged_by_hand([1.0] + [0.0] * 35, 0.99)
    assert spike < 1e-6  # what a constant 0.99 leaves of it is 0.70
    average = WarmAverage(model, 0.99)
    for step in range(36):
        nn.init.constant_(model.weight, float(step == 0))
        average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(spike, rel=1e-3)


def test_batch_norm_is_averaged_with_the_weights():
    """Running mean and variance of a CNN of timm follow the same formula; the number of batches is copied."""
    torch.manual_seed(0)
    model = cnn.Cnn("resnet10t").train()
    average, steps = WarmAverage(model, 0.99), []
    rate = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        rate.zero_grad()
        model(torch.rand(2, 3, 32, 32)).square().sum().backward()
        rate.step()
        average.update_parameters(model)
        steps.append({n: v.clone() for n, v in model.state_dict().items()})
    kept, last = average.module.state_dict(), steps[-1]
    for name, value in kept.items():
        wanted = averaged_by_hand([s[name].numpy() for s in steps], 0.99)
        if name.endswith("num_batches_tracked"):
            assert int(value) == 3
        else:
            assert np.allclose(value.numpy(), wanted, rtol=1e-4, atol=1e-5), name
    moved = [n for n in kept if n.endswith("running_var") and not torch.equal(kept[n], last[n])]
    assert len(moved) == sum(n.endswith("running_var") for n in kept) > 5


def test_thirty_steps_leave_raw_weights_alone_and_keep_the_average(tmp_path):
    """The trained weights are those of a run without an average, bit for bit; those that are kept are their
    average, step by step, in numpy."""
    loops = [toy_loop(tmp_path / str(ema), epochs=6, ema=ema) for ema in (0.0, 0.99)]
    steps = []
    hook = importlib.import_module("torch.optim.optimizer").register_optimizer_step_post_hook(
        lambda *_: steps.append({n: p.detach().numpy().copy() for n, p in loops[1].model.named_parameters()})
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for loop in loops:
            steps.clear()
            torch.manual_seed(2)
            loop.fit(toy_subset(40, 0), toy_subset(20, 1))
    hook.remove()
    assert len(steps) == 30
    plain, last = (load_pth(tmp_path, str(ema), "last.pth") for ema in (0.0, 0.99))
    assert int(last["average"]["n_averaged"]) == 30
    for name in steps[0]:
        assert torch.equal(plain["model"][name], last["model"][name]), name
        wanted = averaged_by_hand([s[name] for s in steps], 0.99)
        assert np.allclose(last["average"][f"module.{name}"].numpy(), wanted, atol=1e-6), name


def test_an_average_of_an_older_version_goes_on():
    """The state has the names it always had; from there on the decay follows from the number of updates."""
    model = nn.Linear(1, 1)
    old = torch.optim.swa_utils.AveragedModel(model)
    for value in (0.0, 1.0, 2.0):
        nn.init.constant_(model.weight, value)
        old.update_parameters(model)
    average = WarmAverage(model, 0.99)
    average.load_state_dict(old.state_dict())
    before = average.module.weight.item()
    nn.init.constant_(model.weight, 5.0)
    average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(4 / 13 * before + 9 / 13 * 5, rel=1e-6)
