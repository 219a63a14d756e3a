"""Tests of Muon: its update against a reference in float64, which parameters it gets, and its way through a
run."""

import io
import json
import os
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from common.console import InputError, Interrupted
from models import cnn
from models.hybrid import Hybrid
from models.inputs import Inputs
from models.mae import MaskedAutoencoder
from tests.shared import (
    CPU,
    cli,
    load_pth,
    read_json,
    refused,
    same_tensors,
    small_vit,
    strip_time,
    toy_subset,
)
from tests.test_loop import toy_fit, toy_loop
from training import step as step_module
from training.optimisers.muon import Muon, hidden_matrices, orthogonal
from training.recipe import Recipe

INPUTS = Inputs((0.5,), (0.5,), CPU)
MUON = replace(Recipe(), optimiser="muon")


def newton_schulz(matrix):
    """Jordan's iteration of one matrix, in float64: x <- a x + b (x x') x + c (x x')^2 x."""
    x = matrix / np.sqrt((matrix**2).sum())
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


@pytest.mark.parametrize("shape", [(8, 8), (24, 6), (6, 24)])
def test_orthogonal_matrices_by_the_definition(shape):
    """Against the iteration in float64, and against the exact answer: U V' of the singular value
    decomposition."""
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.normal(size=(3, *shape)), full_matrices=False)
    matrices = u * rng.uniform(0.2, 1, (3, 1, u.shape[2])) @ v  # the smallest values take more iterations
    found = orthogonal(torch.from_numpy(matrices).float())
    for matrix, x, exact in zip(matrices, found.numpy(), u @ v):
        assert np.allclose(x, newton_schulz(matrix), atol=2e-5)
        values = np.linalg.svd(x)[1]
        assert 0.65 < values.min() and values.max() < 1.25
        cosine = (x * exact).sum() / np.linalg.norm(x) / np.linalg.norm(exact)
        assert cosine > 0.97
    assert not orthogonal(torch.zeros(1, *shape)).any()


@pytest.mark.parametrize("shape, parts", [((12, 5), 1), ((5, 12), 1), ((24, 8), 3), ((16, 8), 2)])
def test_updates_of_muon_by_hand(shape, parts):
    """Four steps in float64: momentum 0.95 with Nesterov, each part orthogonal by itself, root mean square
    0.2, decoupled weight decay."""
    rng = np.random.default_rng(1)
    value, gradients = rng.normal(size=shape), rng.normal(size=(4, *shape))
    p = nn.Parameter(torch.from_numpy(value).float())
    muon = Muon([{"params": [p], "weight_decay": 0.1, "parts": parts}], lr=0.02)
    average = np.zeros(shape)
    for gradient in gradients:
        average = 0.95 * average + 0.05 * gradient
        direction = 0.05 * gradient + 0.95 * average
        pieces = np.split(direction, parts)
        update = np.concatenate([newton_schulz(piece) for piece in pieces])
        update *= 0.2 * np.sqrt(max(pieces[0].shape))
        assert np.sqrt((update**2).mean()) == pytest.approx(0.2, rel=0.2)
        value = value * (1 - 0.02 * 0.1) - 0.02 * update
        p.grad = torch.from_numpy(gradient).float()
        muon.step()
        assert np.allclose(p.detach().numpy(), value, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9 on")
@pytest.mark.parametrize("bf16", [False, True])
def test_muon_is_that_of_torch(bf16):
    """Its iterations are in bfloat16, of which two digits are left; several shapes in one group."""
    rng = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=rng) for shape in ((12, 6), (12, 6), (6, 12), (8, 8))]
    ours, theirs = ([nn.Parameter(x.clone()) for x in starts] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1}
    muon = Muon([{"params": ours, "weight_decay": 0.1}], lr=0.02, bf16=bf16)
    other = torch.optim.Muon(theirs, **settings, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=rng)
            b.grad = a.grad.clone()
        muon.step()
        other.step()
    for a, b, start in zip(ours, theirs, starts):
        assert (a - b).abs().max() < 0.03 * (b - start).abs().max()


def test_parameters_without_a_gradient_stay():
    """As those of a frozen stem; no momentum is kept of them."""
    still, moved = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    muon = Muon([{"params": [still, moved], "weight_decay": 0.1}], lr=0.1)
    moved.grad = torch.eye(4)
    muon.step()
    assert torch.equal(still, torch.ones(4, 4)) and not torch.equal(moved, still)
    assert list(muon.state) == [moved]


# ---------------------------------------------------------------- which parameters


def by_muon(model, **fields):
    """{name of a parameter that Muon trains: (parts, factor of its rate, its decay)}; checks that each
    trained parameter is in one group alone."""
    made = step_module.optimiser(model, replace(MUON, **fields), INPUTS)
    names = {id(p): name for name, p in model.named_parameters()}
    held = [names[id(p)] for group in made.param_groups for p in group["params"]]
    assert sorted(held) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    muon, adamw = made.optimisers
    assert type(muon) is Muon and type(adamw) is torch.optim.AdamW
    found = {}
    for group in muon.param_groups:
        told = group["parts"], group["lr_scale"], group["weight_decay"]
        found |= {names[id(p)]: told for p in group["params"]}
    return found


def of_blocks(root, depth):
    """What Muon gets of the blocks of vit.py."""
    layers = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}
    return {f"{root}{i}.{name}.weight": parts for i in range(depth) for name, parts in layers.items()}


def test_muon_gets_the_matrices_of_a_vit():
    """At twice the rate, with AdamW's weight decay; backbone and layer decay act on both."""
    wanted = of_blocks("blocks.", 3)
    assert by_muon(small_vit()) == {name: (parts, 2.0, 0.05) for name, parts in wanted.items()}
    found = by_muon(small_vit(), backbone_lr_scale=0.5, layer_decay=0.8)
    for name, (parts, scale, _) in found.items():
        below = 4 - int(name.split(".")[1])  # the final norm belongs to the last block
        assert parts == wanted[name]
        assert scale == pytest.approx(2 * 0.5 * 0.8 ** (below - 1)), name


def test_muon_gets_both_transformers_of_a_masked_autoencoder_and_a_hybrid():
    stem = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    found = by_muon(MaskedAutoencoder(stem, decoder_dim=16, decoder_depth=1, decoder_heads=2))
    assert set(found) == {*of_blocks("encoder.blocks.", 2), *of_blocks("blocks.", 1)}
    hybrid = Hybrid(stem, d_model=16, token_grid=2, depth=1, num_heads=2)
    found = {name: parts for name, (parts, *_) in by_muon(hybrid).items()}
    read = {"neck.read.q.weight": 1, "neck.read.kv.weight": 2, "neck.read.proj.weight": 1}
    assert found == {**of_blocks("stem.blocks.", 2), **of_blocks("neck.blocks.", 1), **read}


def test_muon_and_convolutional_networks(capsys):
    """EdgeNeXt has matrices, which is said; ResNet has none, which is refused."""
    edgenext = cnn.Cnn("edgenext_xx_small")
    found = by_muon(edgenext)
    kinds = ("mlp.fc1", "mlp.fc2", "xca.proj", "xca.qkv")
    assert {".".join(name.split(".")[-3:-1]) for name in found} == set(kinds)
    assert all(parts == (3 if "qkv" in name else 1) for name, (parts, *_) in found.items())
    step_module.check_optimiser(MUON, edgenext)
    weights = sum(edgenext.get_parameter(name).numel() for name in found)
    rest = sum(p.numel() for p in edgenext.parameters()) - weights
    out = capsys.readouterr().out
    told = f"Muon for {len(found)} layers of attention and MLP ({', '.join(kinds)}: {weights:,} weights)"
    assert told in out
    assert f"AdamW for the other {rest:,} weights" in out
    resnet = cnn.Cnn("resnet10t")
    assert not hidden_matrices(resnet)
    step_module.check_optimiser(Recipe(), resnet)
    with pytest.raises(InputError, match="--optimiser muon is for the matrices of attention and MLP"):
        step_module.check_optimiser(MUON, resnet)


# ---------------------------------------------------------------- in a run


def test_a_run_with_muon_resumes_bit_for_bit(tmp_path):
    """Stopped in the second epoch and continued: weights, average and history are those of the run that was
    left alone; Muon's rate is twice AdamW's at every step."""
    changes = {"epochs": 3, "optimiser": "muon", "ema": 0.9}
    whole = toy_fit(tmp_path / "whole", **changes)
    loop, rates = toy_loop(tmp_path / "parts", **changes), []
    change_weights = loop._change_weights

    def change_and_stop():
        change_weights()
        rates.append({group["lr"] / loop.progress.lr for group in loop.optimizer.param_groups})
        if len(rates) == 6:
            os.kill(os.getpid(), signal.SIGINT)

    loop._change_weights = change_and_stop
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), pytest.raises(Interrupted):
        loop.fit(toy_subset(40, 0), toy_subset(20, 1))
    assert len(rates) in (6, 7) and all(found == {1.0, 2.0} for found in rates)
    again = toy_fit(tmp_path / "parts", resume=True, **changes)
    assert strip_time(again["history"]) == strip_time(whole["history"])
    last, first = (load_pth(tmp_path, name, "last.pth") for name in ("parts", "whole"))
    for key in ("model", "average"):
        assert same_tensors(last[key], first[key])
    for mine, its in zip(last["optimizer"]["joined"], first["optimizer"]["joined"]):
        assert all(same_tensors(mine["state"][i], its["state"][i]) for i in its["state"])


def test_muon_and_adamw_differ_in_the_matrices_alone_after_one_step(tmp_path):
    """After one step from the same weights AdamW's part is as without Muon."""
    ends = {}
    for name in ("adamw", "muon"):
        toy_fit(tmp_path / name, epochs=1, max_steps=1, optimiser=name)
        ends[name] = load_pth(tmp_path, name, "last.pth")["model"]
    differ = {n for n, value in ends["adamw"].items() if not torch.equal(value, ends["muon"][n])}
    assert differ == set(of_blocks("blocks.", 3))


def test_a_step_of_muon_in_parts_is_the_step(tmp_path):
    """--accumulate 4 makes the same weights, to rounding."""
    ends = []
    for parts in (1, 4):
        fields = dict(epochs=1, max_steps=2, optimiser="muon", accumulate=parts, model=small_vit(in_chans=1))
        toy_fit(tmp_path / str(parts), **fields)
        ends.append(load_pth(tmp_path, str(parts), "last.pth")["model"])
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], atol=2e-5), name


def test_a_run_without_the_field_was_trained_by_adamw(tmp_path):
    """Its last.pth goes on with AdamW; with Muon the settings differ."""
    toy_fit(tmp_path, epochs=2, max_steps=3)
    path = tmp_path / "results.json"
    results, last = read_json(path), load_pth(tmp_path, "last.pth")
    for recipe in (results["recipe"], last["meta"]["recipe"]):
        assert recipe.pop("optimiser") == "adamw"
    results["finished"] = False
    path.write_text(json.dumps(results))
    torch.save(last, tmp_path / "last.pth")
    with pytest.raises(InputError, match="recipe.optimiser: was 'adamw', now 'muon'"):
        toy_fit(tmp_path, epochs=2, max_steps=3, resume=True, optimiser="muon")
    assert toy_fit(tmp_path, epochs=2, max_steps=3, resume=True)["finished"]


def test_muon_is_refused_where_it_would_train_nothing(flags, tiny_npz, tmp_path):
    """Before any work: no run folder is made."""
    argv = [*flags, "--optimiser", "muon"]
    for script, *more in (
        ("train_cnn", "--model", "resnet10t"),
        ("train_pretrained", "--weights", tiny_npz, "--epochs", 0, "--freeze-epochs", 1),
    ):
        refused(cli(script, *argv, *more, "--out", "run", cwd=tmp_path), "--optimiser muon", "leave it out")
        assert not (tmp_path / "run").exists()
