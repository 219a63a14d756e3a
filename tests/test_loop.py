"""Tests of engine: the loop, what is kept, stopping and resuming. A run here takes a fraction of a second."""

import importlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import socket
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
import torch
import torch.nn.functional as F

import data
from common import console, device
from common.console import InputError, Interrupted, Pace
from common.task import Task
from images.augment import PRESETS, Augment
from images.split import epoch_order
from images.subset import Subset
from models.batches import Batches
from models.inputs import Inputs
from records.run import Run
from tests.shared import (
    CPU,
    NONE,
    Forked,
    cli,
    load_pth,
    randomise,
    read_json,
    refused,
    same_tensors,
    small_vit,
    strip_time,
    succeed,
    toy_subset,
)
from training import evaluate, recipe
from training import loop as loop_module
from training import step as step_module
from training.evaluate import fit_head, predict
from training.loss import Supervised
from training.plan import Plan
from training.resume import Progress

INPUTS = Inputs((0.5,), (0.5,), CPU)


class ToyObjective(Supervised):
    """Cross-entropy; `hook` may change the losses of a batch, `watch` replaces the figure watched on
    validation."""

    def __init__(self, hook=None, watch=None, class_weights=None, label_smoothing=0.05):
        super().__init__(Task(), class_weights, label_smoothing)
        plain = self.losses
        if hook:
            self.losses = lambda outputs, targets: hook(plain(outputs, targets))
        if watch:
            self.watch = lambda targets, outputs, side="val": {"val_auroc": watch()} if side == "val" else {}


def toy_loop(out, *, objective=None, model=None, resume=False, augment=None, settings=None, **fields):
    """A Loop over a small ViT with dropout, DropPath and augmentation: 5 steps an epoch."""
    torch.manual_seed(1)
    model = model or small_vit(in_chans=1, drop_rate=0.1, drop_path_rate=0.1)
    fields = {"epochs": 3, "patience": 9, "lr": 1e-3, "batch_size": 8, **fields}
    plan = Plan(
        replace(recipe.Recipe(), **fields),
        augment or Augment(hflip=0.5),
        data.DataConfig(),
        Run(out),
        CPU,
        False,
        resume,
    )
    counts = {part: {"NORMAL": 1, "PNEUMONIA": 1} for part in ("train", "val", "test")}
    split = {
        "synthetic": True,
        "fingerprint": "f",
        "train": 1,
        "val": 1,
        "test": 1,
        "counts": counts,
        "set": "toy",
    }
    meta = {
        "model": "toy",
        "model_config": {"kind": "vit", **model.config},
        "recipe": recipe.to_json(plan.recipe, plan.augment, False),
        "data": {"data_dir": "toy", "cache_dir": "anywhere"},
        "split": split,
        "seed": 0,
        "mean": [0.5],
        "std": [0.5],
        **(settings or {}),
    }
    return loop_module.Loop(model, objective or ToyObjective(), plan, INPUTS, meta)


def toy_fit(out, **settings):
    """Train `toy_loop` on 40 images, validate on 20 -> the content of results.json."""
    loop = toy_loop(out, **settings)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return loop.fit(toy_subset(40, 0), toy_subset(20, 1))


def test_learning_rate_by_hand():
    def rate(step, schedule="cosine"):
        return step_module.learning_rate(step, total=110, warmup=10, peak=2.0, schedule=schedule)

    assert [rate(0), rate(4), rate(9), rate(10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert rate(60) == pytest.approx(1.0)  # half-way down
    assert rate(35) == pytest.approx(1 + math.sqrt(0.5))  # a quarter of the way: cos 45 degrees
    assert rate(110) == pytest.approx(0, abs=1e-12) and 0 < rate(109) < 0.001
    assert [rate(s, "constant") for s in (4, 9, 10, 109)] == pytest.approx([1, 2, 2, 2])
    assert step_module.learning_rate(0, total=10, warmup=0, peak=2.0) == 2.0
    low = [step_module.learning_rate(step, total=10, warmup=0, peak=1e-8, floor=1e-7) for step in range(11)]
    assert low == [1e-8] * 11  # never above its peak


@pytest.mark.parametrize("warmup", [0.001, 0.5, 1, 1.31, 2.5, 13.1])
def test_learning_rate_never_exceeds_the_peak(warmup):
    """--warmup-epochs is a float, so the warm-up need not be a whole number of steps."""
    for schedule in ("cosine", "constant"):
        rates = [step_module.learning_rate(s, 100, warmup, 1.0, schedule) for s in range(100)]
        assert max(rates) <= 1 + 1e-9 and min(rates) > 0
        peak = rates.index(max(rates))
        assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_parameter_groups():
    model = small_vit()
    decay, plain = step_module.parameter_groups(model, 0.05)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    with_decay, without = ([names[id(p)] for p in g["params"]] for g in (decay, plain))
    assert sorted(with_decay + without) == sorted(names.values())  # each once
    assert all(n.endswith("weight") and "norm" not in n for n in with_decay)
    assert {
        "cls_token",
        "pos_embed",
        "norm.weight",
        "blocks.0.norm1.weight",
        "head.bias",
        "patch_embed.proj.bias",
    } <= set(without)
    assert {"patch_embed.proj.weight", "head.weight", "blocks.2.attn.qkv.weight"} <= set(with_decay)


def test_predict_keeps_order_and_mode():
    model = randomise(small_vit(in_chans=1, drop_rate=0.5, drop_path_rate=0.5)).train()
    subset = toy_subset(11, 0)
    logits = predict(model, subset, INPUTS, batch_size=4)
    assert model.training and logits.dtype == torch.float32 and not logits.requires_grad
    model.eval()
    with torch.no_grad():
        expected = torch.cat(
            [model(torch.from_numpy(i)[None, None].float() / 255 * 2 - 1) for i in subset.images]
        )
    assert torch.allclose(logits, expected, atol=1e-5) and logits.std() > 0.1
    order = np.array([7, 2, 10])
    assert torch.allclose(predict(model, subset.take(order), INPUTS), expected[order], atol=1e-5)


def test_stop_requests():
    """The first signal is only noted, the second acts at once; the old handlers come back."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stop, device.stop_requests() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    assert stop.value.signum == signal.SIGINT
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.fixture(scope="module")
def toy_reference(tmp_path_factory):
    """The uninterrupted toy run: (results, checkpoint)."""
    out = tmp_path_factory.mktemp("toy")
    results = toy_fit(out)
    return results, load_pth(out, "checkpoint.pth")


@pytest.fixture(scope="module")
def toy_reference_of_two(tmp_path_factory):
    """As `toy_reference`, of two epochs: for the tests that train it many times."""
    out = tmp_path_factory.mktemp("toy")
    results = toy_fit(out, epochs=2)
    return results, load_pth(out, "checkpoint.pth")


def agrees(out, results, reference):
    """Bit for bit the reference run: weights, history, best epoch; finished, with its minutes."""
    assert same_tensors(load_pth(out, "checkpoint.pth"), reference[1])
    assert strip_time(results["history"]) == strip_time(reference[0]["history"])
    assert results["best_epoch"] == reference[0]["best_epoch"] and results["finished"] is True
    assert read_json(out, "results.json") == json.loads(json.dumps(results))
    assert results["minutes"] == pytest.approx(sum(h["seconds"] for h in results["history"]) / 60)
    assert results["minutes"] > 0


def test_fit_is_deterministic_and_learns(tmp_path, toy_reference):
    results = toy_fit(tmp_path)
    agrees(tmp_path, results, toy_reference)
    losses = [h["train_loss"] for h in results["history"]]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert [h["lr"] for h in results["history"]] == pytest.approx(
        [step_module.learning_rate(s, 15, 5, 1e-3) for s in (4, 9, 14)]
    )


def test_val_loss_and_auroc_of_the_history(tmp_path):
    """The history's figures recomputed from the kept weights."""
    results = toy_fit(tmp_path, epochs=2)
    model, read = Run(tmp_path).model(), Run(tmp_path).results
    assert not model.training and read == json.loads(json.dumps(results))
    val = toy_subset(20, 1)
    with torch.no_grad():
        logits = model(torch.from_numpy(val.images)[:, None].float() / 255 * 2 - 1)
    row = results["history"][results["best_epoch"] - 1]
    p = scipy.special.softmax(logits.double().numpy(), axis=1)[:, 1]
    assert row["val_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(val.targets, p), abs=1e-9)
    targets = np.where(val.targets == 1, 0.975, 0.025)  # smoothing 0.05
    assert row["val_loss"] == pytest.approx(
        -np.mean(targets * np.log(p) + (1 - targets) * np.log(1 - p)), rel=1e-5
    )


def test_one_step_is_adamw_with_clipping(tmp_path):
    """A single step against torch's plain AdamW on the same batch, the gradient clipped to norm 1."""
    torch.manual_seed(1)
    trained = small_vit(in_chans=1)  # no dropout: comparable
    start = {n: p.clone() for n, p in trained.state_dict().items()}
    large = ToyObjective(lambda losses: losses * 50, label_smoothing=0.0)  # so that clipping matters
    toy_fit(tmp_path, epochs=1, max_steps=1, augment=PRESETS["none"], objective=large, model=trained)
    after = trained.state_dict()
    model = small_vit(in_chans=1)
    model.load_state_dict(start)
    train = toy_subset(40, 0)
    index = np.random.default_rng([0, 0]).permutation(40)[:8]
    x = torch.from_numpy(train.images[index])[:, None].float() / 255 * 2 - 1
    (F.cross_entropy(model(x), torch.from_numpy(train.targets[index])) * 50).backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    assert norm > 1
    for name, p in model.named_parameters():
        p.grad /= norm
        decay = 0.05 if p.ndim > 1 and name not in ("cls_token", "pos_embed") else 0.0
        torch.optim.AdamW([p], lr=1e-3, weight_decay=decay).step()
        # After one step Adam moves by lr * sign(gradient), which rounding may turn only where it is 0.
        assert (p - after[name]).abs().mean() < 2e-5, name
        assert (p - start[name]).abs().mean() > 1e-4 or name.endswith("qkv.bias"), name


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stop_at_every_step_and_resume(tmp_path, toy_reference_of_two, signum):
    """A signal in each of the 10 steps and the validation between: the end is the uninterrupted one. The
    other signal in one step, for they meet in one handler."""
    stopped = []
    for at in range(1, 12) if signum == signal.SIGINT else (8,):
        calls = itertools.count(1)

        def hook(losses, at=at, calls=calls):
            if next(calls) == at:
                os.kill(os.getpid(), signum)
            return losses

        out = tmp_path / str(at)
        with pytest.raises(Interrupted) as stop:
            toy_fit(out, epochs=2, objective=ToyObjective(hook))
        assert stop.value.signum == signum and "--resume" in str(stop.value)
        state = load_pth(out, "last.pth")["state"]
        stopped.append((state["epoch"], state["step"]))
        assert read_json(out, "results.json")["finished"] is False
        agrees(out, toy_fit(out, epochs=2, resume=True), toy_reference_of_two)
        shutil.rmtree(out)
    if signum == signal.SIGINT:  # after its step; during a validation: after the first step of the next epoch
        assert stopped == [(e, s) for e in range(2) for s in (1, 1, 2, 3, 4, 5)[e == 0 :]]


def test_death_at_every_write_and_resume(tmp_path, toy_reference_of_two, monkeypatch):
    """The process dies just before each rename, which is just after the one before: what lies there is
    complete, and goes on to the end."""

    class Died(BaseException):
        pass

    real, deaths = os.replace, 0
    for at in range(1, 40):
        out, calls = tmp_path / f"{at}", itertools.count(1)

        def replace(a, b):
            if next(calls) == at:
                raise Died
            real(a, b)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                toy_fit(out, epochs=2)
                break  # fewer writes than that: every one has been tried
            except Died:
                deaths += 1
        for path in out.glob("*.pth"):
            load_pth(path)
        again = toy_fit(out, epochs=2, resume=(out / "last.pth").exists())
        agrees(out, again, toy_reference_of_two)
    assert deaths >= 2 * 2 + 2  # at least last.pth and results.json an epoch, a checkpoint, and the end


def test_resume_of_a_finished_run_changes_nothing(tmp_path, toy_reference, capsys):
    """It says so, and scores and calibration stay, as do all files to the byte."""
    toy_fit(tmp_path)
    (tmp_path / "scores.npz").write_bytes(b"kept")
    (tmp_path / "calibration.json").write_text("kept")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    again = toy_loop(tmp_path, resume=True).fit(toy_subset(40, 0), toy_subset(20, 1))
    agrees(tmp_path, again, toy_reference)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert "finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed, word",
    [
        (dict(lr=2e-3), "recipe.lr"),
        (dict(settings={"mean": [0.4]}), "mean"),
        (dict(settings={"std": [0.4]}), "std"),
        (dict(settings={"model": "other"}), "model"),
        (dict(settings={"weights": {"path": "a.npz", "sha256": "1"}}), "weights"),
        (dict(settings={"init": {"run": "outputs/mae", "checkpoint": "1"}}), "init"),
        (dict(settings={"data": {"data_dir": "elsewhere"}}), "data.data_dir"),
    ],
)
def test_resume_refuses_other_settings(tmp_path, changed, word):
    """Whatever decides a result must be the same; a refusal changes nothing."""
    toy_fit(tmp_path, epochs=1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(InputError, match=word):
        toy_fit(tmp_path, epochs=1, resume=True, **changed)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_resume_knows_weights_by_their_content(tmp_path):
    """The same file under another name may go on; another file under the same name may not."""
    toy_fit(tmp_path, epochs=1, settings={"weights": {"path": "a.npz", "sha256": "1"}})
    toy_fit(tmp_path, epochs=1, settings={"weights": {"path": "b.npz", "sha256": "1"}}, resume=True)
    with pytest.raises(InputError, match="weights.sha256"):
        toy_fit(tmp_path, epochs=1, settings={"weights": {"path": "a.npz", "sha256": "2"}}, resume=True)


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_a_run_whose_rate_does_not_know_its_end_can_be_made_longer(tmp_path, capsys, schedule):
    """Bit for bit the run of so many epochs, from a finished one and from one that was stopped; the old
    calibration goes; fewer epochs, or another setting that differs, are refused."""
    how = dict(schedule=schedule, ema=0.9, warmup_epochs=1.0)
    reference = toy_fit(tmp_path / "a", epochs=4, **how), load_pth(tmp_path, "a", "checkpoint.pth")
    toy_fit(tmp_path / "b", epochs=2, **how)
    (tmp_path / "b/calibration.json").write_text("old")
    with pytest.raises(InputError, match="recipe.lr: was 0.001, now 0.002"):
        toy_fit(tmp_path / "b", epochs=4, resume=True, lr=2e-3, **how)
    loop = toy_loop(tmp_path / "b", epochs=4, resume=True, **how)
    agrees(tmp_path / "b", loop.fit(toy_subset(40, 0), toy_subset(20, 1)), reference)
    said = capsys.readouterr().err
    assert f"--epochs 2 and goes on to 4, as if begun with these (--schedule {schedule}" in said
    assert f"the calibration of {tmp_path / 'b'} is removed" in said
    assert not (tmp_path / "b/calibration.json").exists()
    calls = itertools.count(1)
    stop = ToyObjective(lambda losses: next(calls) == 3 and os.kill(os.getpid(), signal.SIGINT) or losses)
    with pytest.raises(Interrupted):
        toy_fit(tmp_path / "c", epochs=2, objective=stop, **how)
    agrees(tmp_path / "c", toy_fit(tmp_path / "c", epochs=4, resume=True, **how), reference)
    with pytest.raises(InputError, match="recipe.epochs: was 4, now 2"):
        toy_fit(tmp_path / "c", epochs=2, resume=True, **how)


def test_a_run_that_patience_ended_stays_as_it_is(tmp_path, capsys):
    """With its calibration, though more epochs are asked for."""
    how = dict(schedule="constant", warmup_epochs=0.0, patience=1)
    aurocs = iter([0.9, 0.8])
    toy_fit(tmp_path, epochs=3, objective=ToyObjective(watch=lambda: next(aurocs)), **how)
    (tmp_path / "calibration.json").write_text("old")
    loop = toy_loop(tmp_path, epochs=5, resume=True, **how)
    assert loop.fit(toy_subset(40, 0), toy_subset(20, 1))["finished"]
    assert "ended by --patience 1, and stays as it is" in capsys.readouterr().err
    assert (tmp_path / "calibration.json").exists()


def test_a_run_that_max_steps_ended_says_so(tmp_path, capsys):
    how = dict(schedule="constant", warmup_epochs=0.0, patience=5)
    toy_fit(tmp_path, epochs=2, max_steps=2, **how)
    toy_loop(tmp_path, epochs=4, resume=True, max_steps=2, **how).fit(toy_subset(40, 0), toy_subset(20, 1))
    assert "ended by --max-steps 2, and stays as it is" in capsys.readouterr().err


@pytest.mark.parametrize("schedule, said", [("cosine", True), ("constant", False)])
def test_an_early_end_at_a_high_rate_is_told(tmp_path, capsys, schedule, said):
    aurocs = iter([0.9, 0.8])
    how = dict(schedule=schedule, warmup_epochs=0.0, patience=1)
    loop = toy_loop(tmp_path, epochs=20, objective=ToyObjective(watch=lambda: next(aurocs)), **how)
    loop.fit(toy_subset(40, 0), toy_subset(20, 1))
    out = capsys.readouterr().out
    assert "(ended after epoch 2 of 20 by --patience 1" in out
    assert ("with the learning rate still at" in out) == said


def test_the_best_epoch_is_needed_to_go_on(tmp_path):
    """Its weights are not in last.pth once another epoch has ended."""
    aurocs = iter([0.9, 0.8])
    toy_fit(tmp_path, epochs=2, objective=ToyObjective(watch=lambda: next(aurocs)), schedule="constant")
    (tmp_path / "checkpoint.pth").unlink()
    with pytest.raises(InputError, match="weights of epoch 1, the best: copy it back"):
        toy_fit(tmp_path, epochs=4, resume=True, schedule="constant")


def test_a_run_that_was_all_warm_up_cannot_be_made_longer(tmp_path):
    """Its rate rose faster than that of a longer run."""
    toy_fit(tmp_path, epochs=1, schedule="constant", warmup_epochs=2.0)
    with pytest.raises(InputError, match="--epochs 1, too few for its warm-up"):
        toy_fit(tmp_path, epochs=4, resume=True, schedule="constant", warmup_epochs=2.0)


def test_a_run_that_died_in_its_first_epoch_has_no_checkpoint(tmp_path):
    """Nor after it went on and died again: untrained weights are no model."""
    broken = ToyObjective(lambda losses: 1 / 0)
    for resume in (False, True):
        with pytest.raises(ZeroDivisionError):
            toy_fit(tmp_path, epochs=2, resume=resume, objective=broken)
        assert (tmp_path / "last.pth").exists() and not (tmp_path / "checkpoint.pth").exists()


def test_more_epochs_of_a_planned_rate_are_another_run(tmp_path):
    """The message says how to train longer; nothing is changed."""
    toy_fit(tmp_path, epochs=1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(InputError, match="begun with --epochs 1, .*go on with --epochs 1, or train anew"):
        toy_fit(tmp_path, epochs=2, resume=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_best_epoch_and_patience(tmp_path):
    """The first of equal maxima is kept; three epochs without a better one end the run."""
    script, states = [0.6, 0.8, 0.7, 0.8, 0.75, 0.99], []

    def watch():
        states.append({n: p.clone() for n, p in model.state_dict().items()})
        return script[len(states) - 1]

    torch.manual_seed(1)
    model = small_vit(in_chans=1, drop_rate=0.1)
    results = toy_fit(tmp_path, epochs=6, objective=ToyObjective(watch=watch), patience=3, model=model)
    assert [h["val_auroc"] for h in results["history"]] == script[:5]
    assert results["best_epoch"] == 2 and results["finished"]
    kept = load_pth(tmp_path, "checkpoint.pth")
    assert same_tensors(kept, states[1]) and not same_tensors(kept, states[3])


def test_nobody_loses_patience_while_a_stem_is_frozen(tmp_path):
    """Two epochs without a better one after those with a frozen stem end the run, not those before."""
    aurocs = iter([0.9, 0.8, 0.8, 0.8, 0.8, 0.8])
    loop = toy_loop(tmp_path, epochs=6, patience=2, objective=ToyObjective(watch=lambda: next(aurocs)))
    loop.recipe = replace(loop.recipe, frozen_epochs=3)
    loop._enter_stage = lambda: None
    assert len(loop.fit(toy_subset(40, 0), toy_subset(20, 1))["history"]) == 5


def test_figures_that_rounding_tells_apart_are_equal():
    """Two sums of the same AUROC in another order; an image more or less is seen."""
    merit = Supervised(Task()).merit
    assert merit({"val_auroc": 0.8472222222222223}) == merit({"val_auroc": 0.8472222222222222})
    assert merit({"val_auroc": 0.8472223}) > merit({"val_auroc": 0.8472222})


def test_patience_can_wait_for_the_loss(tmp_path, monkeypatch):
    """The AUROC gets better in every epoch, the loss only until the second: two more end the run."""
    losses, aurocs = iter([0.5, 0.4, 0.45, 0.42, 0.3, 0.2]), iter([0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
    real = loop_module.Loop._validate
    monkeypatch.setattr(loop_module.Loop, "_validate", lambda *a: {**real(*a), "val_loss": next(losses)})
    objective = ToyObjective(watch=lambda: next(aurocs))
    results = toy_fit(tmp_path, epochs=6, objective=objective, patience=2, stop_on="loss")
    assert len(results["history"]) == 4 and results["best_epoch"] == 4


def test_plateau_halves_the_rate_of_every_group(tmp_path):
    """After three epochs without a better one the rate is half; below the head it is a tenth."""
    aurocs, seen = iter([0.9, 0.8, 0.8, 0.8, 0.8]), []
    loop = toy_loop(
        tmp_path,
        objective=ToyObjective(watch=lambda: next(aurocs)),
        epochs=5,
        schedule="plateau",
        warmup_epochs=0.0,
        backbone_lr_scale=0.1,
    )
    real = loop._train_epoch

    def watched(*args):
        done = real(*args)
        seen.append(sorted({group["lr"] for group in loop.optimizer.param_groups}))
        return done

    loop._train_epoch = watched
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        loop.fit(toy_subset(40, 0), toy_subset(20, 1))
    assert [rates[-1] for rates in seen] == pytest.approx([1e-3] * 4 + [5e-4])
    assert all(rates == pytest.approx([rates[-1] / 10, rates[-1]]) for rates in seen)


def test_mixed_batches_have_the_loss_of_soft_targets(tmp_path):
    """The loss of a step is that of the soft targets."""
    objective = ToyObjective(label_smoothing=0.0)
    loop = toy_loop(tmp_path / "a", objective=objective, mixup=0.5, cutmix=0.5, augment=Augment(**NONE))
    loop.prepare(40)
    train = toy_subset(40, 0)
    torch.manual_seed(3)
    loop.net.eval()
    loss = loop.gradient.add(loop.net, Batches(train, INPUTS), torch.arange(8))
    torch.manual_seed(3)
    batch = Batches(train, INPUTS).get(torch.arange(8))
    mixed, share = loop.gradient.mix(INPUTS.scale(batch.x))
    soft = share * F.one_hot(batch.target, 2) + (1 - share) * F.one_hot(batch.target.roll(1, 0), 2)
    with torch.no_grad():
        assert float(loss) == pytest.approx(float(F.cross_entropy(loop.model(mixed), soft)), rel=1e-5)
    whole = toy_fit(tmp_path / "b", mixup=0.5, epochs=2)
    assert whole["recipe"]["mixup"] == 0.5 and len(whole["history"]) == 2


def test_every_image_once_an_epoch_in_a_new_order(tmp_path, monkeypatch):
    seen, real = [], Batches.get

    def get(self, index):
        if len(self.subset) == 40:  # training
            seen.extend(index.tolist())
        return real(self, index)

    monkeypatch.setattr(Batches, "get", get)
    toy_fit(tmp_path)
    epochs = [seen[i : i + 40] for i in (0, 40, 80)]
    assert len(seen) == 120 and all(sorted(order) == list(range(40)) for order in epochs)
    assert len({tuple(order) for order in [*epochs, range(40)]}) == 4


def test_max_steps(tmp_path):
    calls = []

    def hook(losses):
        calls.append(len(losses))
        return losses

    results = toy_fit(tmp_path, objective=ToyObjective(hook), max_steps=7)
    assert calls == [8] * 5 + [20] + [8] * 2 + [20]  # an epoch of 5, validation, 2 steps, validation
    assert len(results["history"]) == 2 and results["finished"]


def test_non_finite_loss_names_epoch_step_and_rate(tmp_path):
    calls = itertools.count(1)

    def hook(losses):  # 5 steps, a validation, then the third step
        return losses * (math.nan if next(calls) == 9 else 1)

    with pytest.raises(InputError) as error:
        toy_fit(tmp_path, objective=ToyObjective(hook))
    rate = step_module.learning_rate(7, 15, 5, 1e-3)
    for word in ("epoch 2", "step 3", f"{rate:.2e}", "nan"):
        assert word in str(error.value)
    assert len(read_json(tmp_path, "results.json")["history"]) == 1
    assert load_pth(tmp_path, "last.pth")["state"]["epoch"] == 1


def test_non_finite_weights_after_the_last_step_of_an_epoch(tmp_path):
    """The loss was finite, the step was not: validation sees it first and says so too."""
    with pytest.raises(InputError, match="epoch 1"):
        toy_fit(tmp_path, max_steps=1, lr=1e38)


def test_head_on_cached_features_equals_frozen_epochs(tmp_path):
    """Stage 1 against the plain loop that runs the frozen backbone in every step."""
    train, settings = toy_subset(40, 0), replace(recipe.Recipe(), batch_size=8, seed=3)
    model = randomise(small_vit(in_chans=1))
    slow = randomise(small_vit(in_chans=1)).eval()
    slow.load_state_dict(model.state_dict())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stage, objective = recipe.Stage("head", 3, 1e-2), ToyObjective(label_smoothing=0.0)
    fit_head(model, train, stage, objective=objective, recipe=settings, inputs=INPUTS)
    optimizer = torch.optim.AdamW(slow.head.parameters(), lr=1e-2, weight_decay=0.05)
    for epoch in range(3):
        for index in torch.from_numpy(np.random.default_rng([3, epoch]).permutation(len(train))).split(8):
            x, y, _ = Batches(train, INPUTS).get(index)
            optimizer.zero_grad()
            F.cross_entropy(slow((x - 0.5) / 0.5), y).backward()
            optimizer.step()
    for name, value in model.state_dict().items():
        if name.startswith("head"):
            assert torch.allclose(value, slow.state_dict()[name], atol=1e-5) and not torch.equal(
                value, before[name]
            )
        else:
            assert torch.equal(value, before[name]), name


def test_probe_views_are_more_rows_of_the_table(tmp_path):
    """Two views of each image, here darker ones, are as good as a set of three times the images."""
    train, settings = toy_subset(12, 0), replace(recipe.Recipe(), batch_size=8, probe_views=2)
    stage, objective = recipe.Stage("head", 3, 1e-2), ToyObjective(label_smoothing=0.0)
    more = np.concatenate([train.pixels(), train.pixels() // 2, train.pixels() // 2])
    tripled = Subset(train.files * 3, np.tile(train.targets, 3), more, np.arange(36))
    heads = []
    for subset, own in ((train, settings), (tripled, replace(settings, probe_views=0))):
        model = randomise(small_vit(in_chans=1))
        how = dict(objective=objective, recipe=own, inputs=INPUTS)
        loss, outputs = fit_head(model, subset, stage, augment=lambda x: (x * 255 / 2).floor() / 255, **how)
        heads.append((loss, outputs[:12], model.head.weight.detach()))
        assert len(outputs) == len(subset)
    for a, b in zip(*heads):
        assert np.allclose(a, b, atol=1e-4)


def test_probe_views_are_of_the_images_that_undersampling_leaves(tmp_path):
    """What the images look like that it leaves out changes nothing."""
    settings = replace(recipe.Recipe(), batch_size=8, probe_views=2, balance="undersample-once")
    stage, weights = recipe.Stage("head", 2, 1e-2), []
    targets = np.array([0] * 4 + [1] * 14)
    kept = epoch_order(settings.seed, 0, targets, "undersample-once")
    assert len(kept) == 8
    for grey in (0, 200):
        pixels = toy_subset(18, 0).pixels()
        pixels[np.setdiff1d(np.arange(18), kept)] = grey
        train = Subset([f"{i}.png" for i in range(18)], targets, pixels, np.arange(18))
        model = randomise(small_vit(in_chans=1))
        how = dict(objective=ToyObjective(label_smoothing=0.0), recipe=settings, inputs=INPUTS)
        fit_head(model, train, stage, augment=lambda x: x / 2, **how)
        weights.append(model.head.weight.detach().clone())
    assert torch.equal(*weights)


def test_processes_validate_with_the_statistics_that_are_kept(monkeypatch):
    """BatchNorm's of the first process, before anything is scored."""
    model, sent = torch.nn.BatchNorm2d(3), []
    monkeypatch.setattr(evaluate, "processes", lambda: (1, 2))
    monkeypatch.setattr(evaluate.dist, "broadcast", lambda buffer, source: sent.append((buffer, source)))
    monkeypatch.setattr(evaluate, "predict", lambda *about, **how: torch.full((10, 2), float(len(sent))))
    monkeypatch.setattr(evaluate, "gather", lambda own: [own, own])
    logits = evaluate.predict_together(model, toy_subset(20, 0), INPUTS, "validation")
    assert [source for _, source in sent] == [0, 0, 0] and (logits == 3).all()
    assert all(a is b for (a, _), b in zip(sent, model.buffers()))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_the_images(tmp_path):
    """50,000 cached images (200 MB) read twice over, in random order: resident memory stays within 40 MB."""
    array = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.uint8, shape=(50_000, 64, 64))
    array[::100] = 7
    array.flush()
    del array
    images = np.load(tmp_path / "a.npy", mmap_mode="r")
    subset = Subset([""] * 50_000, np.zeros(50_000, np.int64), images, np.arange(50_000))
    batches = Batches(subset, INPUTS)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    batches.get(torch.arange(64))
    before, most, seen = resident(), 0.0, 0
    for _ in range(2):
        for index in torch.from_numpy(np.random.default_rng(0).permutation(50_000)).split(64):
            x = batches.get(index).x
            seen += round(float(x[:, 0, 0, 0].sum() * 255 / 7))
            most = max(most, resident() - before)
    assert seen == 1000 and most < 40


@pytest.mark.parametrize("weight", [None, torch.tensor([3.0, 0.5])])
def test_accumulated_step_equals_the_whole_one(tmp_path, weight):
    """Batches in 3 uneven parts: the same losses and weights as in one part, class weights or not."""
    histories, ends = [], []
    for n in (1, 3):
        torch.manual_seed(1)
        results = toy_fit(
            tmp_path / str(n),
            epochs=2,
            accumulate=n,
            augment=PRESETS["none"],
            model=small_vit(in_chans=1),
            objective=ToyObjective(class_weights=weight),
        )
        histories.append([(h["train_loss"], h["val_loss"]) for h in results["history"]])
        ends.append(load_pth(tmp_path, str(n), "last.pth")["model"])
    assert np.array(histories[1]) == pytest.approx(np.array(histories[0]), rel=1e-5)
    for name in ends[0]:
        assert torch.allclose(ends[0][name], ends[1][name], atol=2e-4), name


def told_by_torchrun(cwd):
    """The environment that torchrun gives each of two processes."""
    (cwd / "told.py").write_text(
        "import json, os\n"
        "with open(os.environ['RANK'] + '.json', 'w') as file:\n"
        "    json.dump(dict(os.environ), file)\n"
    )
    argv = ("--standalone", "--nproc_per_node", 2, "told.py")
    launcher = Forked("torch.distributed.run", *argv, cwd=cwd)
    launcher.communicate(timeout=120)
    assert launcher.returncode == 0, (cwd / "stderr.txt").read_text()
    return [read_json(cwd, f"{rank}.json") for rank in (0, 1)]


def two_processes(told, argv, cwd):
    """train_scratch.py in the processes of `told` -> [(exit code, stdout, stderr)]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = {"MASTER_PORT": str(free.getsockname()[1])}
    # The launcher has ended, and the place where its processes met with it.
    port |= {"TORCHELASTIC_USE_AGENT_STORE": "False"}
    both = []
    for rank, about in enumerate(told):
        folder = cwd / str(rank)
        folder.mkdir(exist_ok=True)
        both.append(Forked("train_scratch", *argv, cwd=folder, about={**about, **port}))
    printed = [process.communicate(timeout=120)[0] for process in both]
    errors = [(cwd / f"{rank}/stderr.txt").read_text() for rank in (0, 1)]
    return list(zip([process.returncode for process in both], printed, errors))


def test_two_processes_give_the_loss_of_one(synthetic, cache, tmp_path):
    """torchrun's 2 gloo processes against one process: same global batch, changed and mixed alike, same
    losses and scores to rounding; one writer; a resume with another number of processes is refused."""
    flags = [
        "--data-dir",
        synthetic,
        "--cache-dir",
        cache,
        "--img-size",
        32,
        "--epochs",
        2,
        "--batch-size",
        10,
        "--no-amp",
        *("--drop-rate", 0, "--drop-path", 0, "--patch-drop", 0, "--lr", 1e-4),
    ]
    succeed("train_scratch", *flags, "--out", "one", cwd=tmp_path)
    told = told_by_torchrun(tmp_path)
    argv = (*flags, "--out", tmp_path / "two")
    first, second = two_processes(told, argv, tmp_path)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert (first[1] + second[1]).count("model: scratch") == 1
    one, two = (read_json(tmp_path, name, "results.json") for name in ("one", "two"))
    for a, b in zip(one["history"], two["history"], strict=True):
        for key in ("train_loss", "val_loss", "val_auroc"):
            assert b[key] == pytest.approx(a[key], rel=2e-4), key
    first, second = two_processes(told, (*argv, "--resume"), tmp_path)
    assert first[0] == second[0] == 0 and "and stays as it is" in first[2]
    assert read_json(tmp_path, "two", "results.json")["history"] == two["history"]


def test_resume_with_another_number_of_processes_is_refused(tmp_path):
    """The random state of every process is in last.pth: made by two, it cannot go on in one."""
    stop = ToyObjective(lambda losses: os.kill(os.getpid(), signal.SIGINT) or losses)
    with pytest.raises(Interrupted):
        toy_fit(tmp_path, objective=stop)
    last = load_pth(tmp_path, "last.pth")
    torch.save({**last, "rng": last["rng"] * 2}, tmp_path / "last.pth")
    with pytest.raises(InputError, match="2 processes"):
        toy_fit(tmp_path, resume=True)


def test_damaged_last_is_refused(tmp_path):
    """Truncated anywhere, or with a part missing: one message, nothing changed."""
    toy_fit(tmp_path, epochs=1)
    results = read_json(tmp_path, "results.json")
    (tmp_path / "results.json").write_text(json.dumps({**results, "finished": False}))
    raw, last = (tmp_path / "last.pth").read_bytes(), load_pth(tmp_path, "last.pth")
    for size in (0, 10, len(raw) // 2, len(raw) - 10):
        (tmp_path / "last.pth").write_bytes(raw[:size])
        with pytest.raises(InputError, match="last.pth"):
            toy_fit(tmp_path, epochs=1, resume=True)
    for key in ("rng", "state", "model", "optimizer"):
        torch.save({k: v for k, v in last.items() if k != key}, tmp_path / "last.pth")
        with pytest.raises(InputError, match="last.pth"):
            toy_fit(tmp_path, epochs=1, resume=True)


def test_ema_is_the_average_of_the_steps_and_resumes(tmp_path):
    """Average by hand from the weights after each step, its decay growing to 0.45; stopped in step 7 and
    resumed, it ends bit for bit the same."""
    settings = dict(epochs=2, ema=0.45)
    loop, weights = toy_loop(tmp_path / "a", **settings), []
    hook = importlib.import_module("torch.optim.optimizer").register_optimizer_step_post_hook(
        lambda *_: weights.append({n: p.detach().double().clone() for n, p in loop.model.named_parameters()})
    )
    try:
        loop.fit(toy_subset(40, 0), toy_subset(20, 1))
    finally:
        hook.remove()
    average = weights[0]
    for updates, now in enumerate(weights[1:], 1):
        decay = min(0.45, (1 + updates) / (10 + updates))
        average = {n: decay * average[n] + (1 - decay) * now[n] for n in now}
    last = load_pth(tmp_path, "a", "last.pth")
    for name, value in average.items():
        assert torch.allclose(last["average"][f"module.{name}"].double(), value, atol=1e-6), name
    best, checkpoint = (
        read_json(tmp_path, "a", "results.json")["best_epoch"],
        load_pth(tmp_path, "a", "checkpoint.pth"),
    )
    if best == 2:
        assert all(torch.equal(checkpoint[n], last["average"][f"module.{n}"]) for n in checkpoint)
    assert not any(torch.equal(checkpoint[n], last["model"][n]) for n in average if n.endswith("weight"))
    calls = itertools.count(1)

    def stop(losses):
        if next(calls) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return losses

    with pytest.raises(Interrupted):
        toy_fit(tmp_path / "b", objective=ToyObjective(stop), **settings)
    toy_fit(tmp_path / "b", resume=True, **settings)
    assert same_tensors(load_pth(tmp_path, "b", "checkpoint.pth"), checkpoint)
    assert same_tensors(load_pth(tmp_path, "b", "last.pth")["average"], last["average"])


def test_masked_pretraining_feeds_the_scratch_arm(synthetic, cache, tmp_path):
    """pretrain_mae.py -> --init: the encoder arrives whole, head apart; the run is no candidate of calibrate
    or compare; a wrong folder, shape or split is refused."""
    common_flags = ("--data-dir", synthetic, "--cache-dir", cache, "--img-size", 32)
    done = succeed(
        "pretrain_mae", *common_flags, "--epochs", 2, "--batch-size", 32, "--max-steps", 4, cwd=tmp_path
    )
    assert "val loss" in done.out and "AUROC" not in done.out
    results = read_json(tmp_path, "outputs/mae/results.json")
    assert [set(h) for h in results["history"]] == [{"train_loss", "val_loss", "lr", "seconds"}] * 2
    refused(cli("calibrate", cwd=tmp_path), "no finished runs")
    flags = (
        *common_flags,
        "--init",
        "outputs/mae",
        "--epochs",
        1,
        "--max-steps",
        1,
        "--lr",
        1e-12,
        "--weight-decay",
        0,
    )
    succeed("train_scratch", *flags, cwd=tmp_path)
    encoder = load_pth(tmp_path, "outputs/mae/checkpoint.pth")
    for name, value in load_pth(tmp_path, "outputs/scratch/checkpoint.pth").items():
        if not name.startswith("head"):
            assert torch.allclose(value, encoder[f"encoder.{name}"], atol=1e-9), name
    run = read_json(tmp_path, "outputs/scratch/results.json")
    assert run["init"]["run"] == "outputs/mae" and run["init"]["minutes"] == results["minutes"]
    refused(
        cli("train_scratch", *flags, "--out", "other", "--init", "outputs/scratch", cwd=tmp_path),
        "pretrain_mae.py",
    )
    refused(cli("train_scratch", *flags, "--overwrite", "--model", "ti16", cwd=tmp_path), "does not fit")
    refused(cli("train_scratch", *flags, "--overwrite", "--split-seed", 1, cwd=tmp_path), "--split")
    refused(cli("train_scratch", *flags, "--overwrite", "--init", "nowhere", cwd=tmp_path), "nowhere")


# ---------------------------------------------------------------- how far it is


def test_progress_reads_what_earlier_versions_saved():
    """The "state" of a last.pth of version 82507f6, within an epoch and before the first step."""
    row = {"train_loss": 0.8, "val_loss": 0.7, "val_auroc": 0.6, "lr": 3e-4, "seconds": 6.0}
    within = {"epoch": 1, "step": 3, "loss_sum": 2.1, "seconds": 0.5, "history": [row], "best_epoch": 1}
    within |= {"head_seconds": 54.0, "lr": 2e-4}
    read = Progress.from_saved(within)
    assert read.saved() == within and list(read.saved()) == list(within)
    assert read.minutes == 1.0 and read.mean_loss == pytest.approx(0.7)
    new = {"epoch": 0, "step": 0, "loss_sum": 0.0, "seconds": 0.0, "history": [], "best_epoch": 0}
    assert Progress().saved() == {**new, "head_seconds": 0.0}
    older = {k: v for k, v in within.items() if k != "head_seconds"}  # before the head's stage was timed
    assert Progress.from_saved(older).minutes == 0.1


def test_progress_knows_the_best_epoch_and_how_long_ago_it_was():
    """Merits by hand: the second epoch is best, a draw later is not; the loss is lowest in the third."""
    at, better = Progress(), []
    for auroc, loss in ((0.6, 0.7), (0.8, 0.6), (0.7, 0.5), (0.8, 0.55)):
        at.step, at.loss_sum = 5, 3.0
        better.append(at.end_epoch({"auroc": auroc, "val_loss": loss}, lambda row: row["auroc"]))
    assert better == [True, True, False, False] and at.best_epoch == 2 and at.epoch == 4
    assert (at.step, at.loss_sum) == (0, 0.0)
    assert at.waited("best") == 2 and at.waited("loss") == 1


def test_long_work_says_how_far_it_is(monkeypatch, capsys):
    """Items of 10, 10 and 5 units, after 10 that were done before: a line each, if it were time for one."""
    monkeypatch.setattr(console, "Pace", lambda: Pace(every=-1))
    words = dict(size=lambda n: n, begin=10, status=lambda: "loss 0.5")
    assert list(console.progress([10, 10, 5], 35, "epoch 1/2", "images", **words)) == [10, 10, 5]
    lines = capsys.readouterr().err.splitlines()
    starts = [f"epoch 1/2: {done} of 35 images, loss 0.5: " for done in (20, 30, 35)]
    assert [line.startswith(start) for line, start in zip(lines, starts)] == [True] * 3 and len(lines) == 3
    assert list(console.progress(range(3), 3, None)) == [0, 1, 2]
    monkeypatch.setenv("RANK", "1")  # under torchrun the first process alone speaks
    assert list(console.progress(range(3), 3, "epoch")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
