"""Tests of vit."""

import json
import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import scipy.stats
import timm
import torch

from common.console import InputError
from common.device import autocast
from models import build
from models.mae import MaskedAutoencoder
from tests.shared import CPU, randomise, small_vit
from vit import Attention, Dropout, DropPath, VisionTransformer, build_vit


@pytest.mark.parametrize(
    "name, classes, count",
    [
        ("scratch", 2, 4_987_138),
        ("ti16", 2, 5_524_802),
        ("ti16", 1000, 5_717_416),
        ("s16", 2, 21_666_434),
        ("b16", 2, 85_800_194),
        ("b16", 1000, 86_567_656),
        ("b32", 2, 87_456_770),
        ("l16", 2, 303_303_682),
    ],
)
def test_parameter_counts(name, classes, count, shipped_scratch):
    with torch.device("meta"):
        model = build_vit(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == count


def test_initial_values(shipped_scratch):
    model = build_vit("scratch")
    state = dict(model.named_parameters())
    for name in (
        "blocks.0.attn.qkv.weight",
        "blocks.5.mlp.fc1.weight",
        "patch_embed.proj.weight",
        "pos_embed",
    ):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.03), name
        assert state[name].abs().max() <= 2.0
    for name, p in state.items():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name


def test_timm_state_dict_both_ways():
    """Same names, same shapes, same logits, at 224 px in Ti/16 and, from random values, in B/16."""
    theirs = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=2)).eval()
    ours = build_vit("ti16").eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs(x)
        assert torch.allclose(ours(x), expected, atol=1e-5)
        assert torch.allclose(ours.forward_features(x), theirs.forward_features(x), atol=1e-4)
        randomise(ours, seed=1)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
        assert (theirs(x) - expected).abs().max() > 0.1  # the second set of weights was another one


@pytest.mark.parametrize("amp, tolerance", [(False, 1e-5), (True, 0.06)])
def test_fused_and_explicit_attention(amp, tolerance):
    model = randomise(small_vit())
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad(), autocast(CPU, amp):
        tokens = model.forward_features(x)
        explicit, attention = model.forward_features(x, return_attention=True)
    assert attention.shape == (4, 3, 3, 17, 17)
    assert (tokens - explicit).abs().max() < tolerance
    assert (attention.float().sum(-1) - 1).abs().max() < (0.02 if amp else 1e-5)
    assert attention.min() >= 0 and attention.float().std() > 0.01  # not the flat attention of a fresh model


def test_attention_by_hand():
    """One attention layer against the formula, head by head in NumPy: softmax(q k' / sqrt(d)) v."""
    layer = randomise(Attention(6, 2))
    x = np.random.default_rng(0).normal(size=(1, 5, 6))
    w, b = (p.detach().double().numpy() for p in (layer.qkv.weight, layer.qkv.bias))
    q, k, v = np.split(x[0] @ w.T + b, 3, axis=1)
    heads = []
    for h in (slice(0, 3), slice(3, 6)):
        scores = q[:, h] @ k[:, h].T / math.sqrt(3)
        heads.append(scipy.special.softmax(scores, axis=1) @ v[:, h])
    expected = (
        np.hstack(heads) @ layer.proj.weight.detach().double().numpy().T + layer.proj.bias.detach().numpy()
    )
    with torch.no_grad():
        assert np.allclose(layer(torch.from_numpy(x).float()).numpy()[0], expected, atol=1e-5)


def test_bf16_is_near_fp32_and_logits_are_float32():
    """bf16 logits would tie scores, so the head runs in float32 under autocast too."""
    model = randomise(small_vit())
    x = torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        full = model(x)
        with autocast(CPU, True):
            half = model(x)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()  # autocast acted, and only rounded
    assert not torch.equal(half, half.bfloat16().float())


@pytest.mark.parametrize("amp", [False, True])
def test_every_parameter_gets_a_gradient(amp):
    model = randomise(small_vit(drop_rate=0.1, drop_path_rate=0.1)).train()
    torch.manual_seed(0)
    with autocast(CPU, amp):
        logits = model(torch.randn(16, 3, 16, 16))
    torch.nn.functional.cross_entropy(logits, torch.arange(16) % 2).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name
    assert (model.pos_embed.grad.abs().amax(dim=2) > 0).all()  # every position, not only the first


def test_gradient_equals_finite_difference():
    model = randomise(small_vit(depth=1)).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model(x).sum().backward()
    for p in (model.cls_token, model.blocks[0].attn.qkv.weight, model.patch_embed.proj.weight):
        step = torch.randn_like(p)
        values = []
        with torch.no_grad():
            for sign in (1e-5, -2e-5):
                p.add_(step, alpha=sign)
                values.append(model(x).sum().item())
            p.add_(step, alpha=1e-5)
        assert (values[0] - values[1]) / 2e-5 == pytest.approx((p.grad * step).sum().item(), rel=1e-5)


def test_drop_path():
    layer = DropPath(0.3).train()
    torch.manual_seed(0)
    x = torch.rand(20000, 2, 3) + 0.5
    y = layer(x)
    kept = (y != 0).flatten(1)
    assert (kept.all(1) | ~kept.any(1)).all()  # a sample goes or stays as a whole
    assert torch.allclose(y[kept[:, 0]], x[kept[:, 0]] / 0.7)
    # Binomial(20000, 0.7): standard deviation of the mean 0.0032; four of them
    assert kept[:, 0].float().mean().item() == pytest.approx(0.7, abs=0.013)
    assert y.mean().item() == pytest.approx(x.mean().item(), rel=0.02)
    assert layer.eval()(x) is x
    assert DropPath(0.0).train()(x) is x


def test_drop_path_schedule_is_linear_in_depth(shipped_scratch):
    model = build_vit("scratch")
    assert [block.drop_path.p for block in model.blocks] == pytest.approx([0, 0.01, 0.02, 0.03, 0.04, 0.05])
    assert small_vit(depth=1, drop_path_rate=0.3).blocks[0].drop_path.p == 0


def test_drop_path_acts_on_both_branches():
    """With p near 1 in the last block, nearly every sample passes it unchanged."""
    model = randomise(small_vit(depth=2, drop_path_rate=0.999)).train()
    x = torch.randn(8, 17, 24)
    torch.manual_seed(0)
    assert torch.equal(model.blocks[1](x), x)
    assert not torch.equal(model.blocks[0](x), x)


@pytest.mark.parametrize("p, dtype", [(0.1, torch.float32), (0.5, torch.float32), (0.1, torch.bfloat16)])
def test_dropout(p, dtype):
    """The 8-bit mask: rate (the nearest 1/256), scale, and independence of neighbours; its gradient is the
    mask."""
    layer = Dropout(p).train()
    p = round(p * 256) / 256
    torch.manual_seed(0)
    x = torch.ones(
        301, 999, dtype=dtype, requires_grad=True
    )  # an odd count: the last random word is used in part
    y = layer(x)
    n = x.numel()
    kept = y.detach() != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=4 * math.sqrt(p * (1 - p) / n))
    rounding = 1e-5 if dtype == torch.float32 else 4e-3
    assert torch.allclose(y.detach()[kept].float(), torch.tensor(1 / (1 - p)), rtol=rounding)
    flat = kept.flatten().double()
    for lag in (1, 2, 4, 7, 8, 9):  # eight elements share a 64-bit word
        covariance = ((flat[lag:] - 1 + p) * (flat[:-lag] - 1 + p)).mean().item()
        assert abs(covariance) < 5 * p * (1 - p) / math.sqrt(n)
    weight = torch.randn(x.shape, dtype=dtype)
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight * y.detach())
    assert not torch.equal(layer(x) != 0, kept)  # a new mask each time
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("size, tokens", [(384, 577), (224, 197), ((64, 160), 41), (16, 2)])
def test_other_image_sizes(size, tokens):
    model = build_vit("scratch", img_size=size, depth=1, embed_dim=16, num_heads=2).eval()
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(1, 3, height, width)
    with torch.no_grad():
        assert model.forward_features(x).shape == (1, tokens, 16)
        assert model.pos_embed.shape[1] == tokens
        patches = model.patch_embed(x)
        # The last patch is the lower right corner, in row-major order.
        corner = (model.patch_embed.proj.weight * x[:, :, -16:, -16:]).sum(
            (1, 2, 3)
        ) + model.patch_embed.proj.bias
    assert torch.allclose(patches[0, -1], corner, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: build_vit("scratch", img_size=225),
        lambda: build_vit("scratch", img_size=(224, 100)),
        lambda: build_vit("scratch", img_size=8),
        lambda: build_vit("scratch", img_size=0),
        lambda: build_vit("scratch", num_heads=7),
        lambda: build_vit("scratch", num_classes=0),
        lambda: build_vit("resnet50"),
        lambda: build.build_model({"kind": "forest"}),
        lambda: build.build_model({}),
        lambda: small_vit()(torch.zeros(1, 3, 16, 20)),
        lambda: small_vit()(torch.zeros(1, 1, 16, 16)),
        lambda: small_vit()(torch.zeros(3, 16, 16)),
    ],
)
def test_vit_errors(make):
    with pytest.raises(InputError):
        make()


def test_build_model_from_config_after_json():
    for model in (small_vit(img_size=(16, 8)), build.PixelLinear(4)):
        kind = "vit" if isinstance(model, VisionTransformer) else "linear"
        again = build.build_model(json.loads(json.dumps({"kind": kind, **model.config}))).eval()
        again.load_state_dict(model.state_dict())
        x = torch.randn(2, model.in_chans, 16, 8)
        assert torch.equal(again(x), model(x))


def test_pixel_linear_by_hand():
    model = build.PixelLinear(side=2)
    x = torch.arange(32.0).view(2, 1, 4, 4)
    expected = [[2.5, 4.5, 10.5, 12.5], [18.5, 20.5, 26.5, 28.5]]  # means of 2x2 cells
    assert model.features(x).tolist() == expected
    logits = torch.tensor(expected) @ model.head.weight.T + model.head.bias
    with autocast(CPU, True):
        assert torch.allclose(model(x), logits)  # float32 under autocast too


def test_patch_drop_is_a_forward_on_the_kept_patches():
    """Leaving patches out equals running the blocks by hand on the tokens that stay; eval mode drops none."""
    model = randomise(small_vit(patch_drop_rate=0.5))
    x = torch.rand(3, 3, 16, 16)
    plain = randomise(small_vit())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))
    torch.manual_seed(1)
    got = model.train().forward_features(x)
    torch.manual_seed(1)
    keep = torch.rand(3, 16).argsort(1)[:, :8]
    assert got.shape == (3, 9, 24)
    tokens = model.patch_embed(x) + model.pos_embed[:, 1:]
    for i in range(3):
        t = torch.cat([model.cls_token[0] + model.pos_embed[0, :1], tokens[i][keep[i]]])[None]
        for block in model.blocks:
            t = block(t)
        assert torch.allclose(got[i], model.norm(t)[0], atol=1e-5)


def test_masked_autoencoder_loss_by_brute_force():
    torch.manual_seed(0)
    encoder = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    model = randomise(
        MaskedAutoencoder(encoder, 0.75, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    ).eval()
    x = torch.rand(2, 1, 16, 16).expand(-1, 3, -1, -1)
    errors = model(x)
    assert torch.equal(errors, model(x)) and errors.shape == (2, 1)  # eval hides the same patches again
    order = torch.rand(16, generator=torch.Generator().manual_seed(0)).argsort().expand(2, -1)
    for i in range(2):
        keep, hide = order[i, 12:], order[i, :12]
        seen = model.embed(model.encoder.forward_features(x[i : i + 1], keep=keep[None]))[0]
        tokens = model.mask_token[0].repeat(16, 1)
        tokens[keep] = seen[1:]
        t = (torch.cat([seen[:1], tokens]) + model.pos_embed[0])[None]
        guess = model.predict(model.norm(model.blocks[0](t)))[0, 1:]
        total = 0.0
        for patch in hide.tolist():
            r, c = 4 * (patch // 4), 4 * (patch % 4)
            want = x[i, 0, r : r + 4, c : c + 4].reshape(-1)
            want = (want - want.mean()) / (want.var() + 1e-6).sqrt()
            total += ((guess[patch] - want) ** 2).mean().item()
        assert errors[i].item() == pytest.approx(total / 12, rel=1e-4)


def test_masked_loss_of_an_image_does_not_depend_on_its_batch():
    """In eval mode: alone, in a batch, at another place of it. Else the loss would differ under torchrun."""
    torch.manual_seed(0)
    encoder = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    model = randomise(MaskedAutoencoder(encoder, 0.75, decoder_dim=8, decoder_heads=2)).eval()
    x = torch.rand(5, 1, 16, 16).expand(-1, 3, -1, -1)
    with torch.no_grad():
        together, turned = model(x), model(x.flip(0)).flip(0)
        alone = torch.cat([model(image[None]) for image in x])
    assert together.std() > 1e-3
    assert torch.allclose(together, alone, atol=1e-6) and torch.allclose(together, turned, atol=1e-6)


def every_model():
    """(model, images) of every kind that has classes."""
    yield small_vit(), torch.rand(3, 3, 16, 16)
    yield build.PixelLinear(8), torch.rand(3, 1, 16, 16)


def test_model_contract():
    """What the loop stands on: head(features(x)) is the model, layers go from input to head."""
    for model, x in every_model():
        randomise(model).eval()
        with torch.no_grad():
            assert torch.allclose(model.head(model.features(x)), model(x), atol=1e-6)
        names, parts = zip(*model.layers())
        assert names[-1] == "head" and parts[-1] is model.head and len(set(names)) == len(names)
        assert model.features(x).shape == (3, model.head.in_features)
        assert (
            build.build_model(json.loads(json.dumps({"kind": model.kind, **model.config}))).config
            == model.config
        )


def test_ensemble_is_the_mean_of_probabilities():
    """Of members with other shapes and scalings, at confident scores too; and it can be rebuilt from its
    config."""
    torch.manual_seed(0)
    members = [randomise(small_vit(in_chans=1), i).eval() for i in range(2)] + [
        randomise(build.PixelLinear(8), 3)
    ]
    configs = [{"kind": m.kind, **m.config} for m in members]
    means, stds = [[0.5], [0.2], [0.0]], [[0.5], [0.1], [1.0]]
    model = build.Ensemble(configs, means, stds).eval()
    for own, member in zip(model.members, members):
        own.load_state_dict(member.state_dict())
        own.head.weight.data *= 30  # saturates float32 probabilities
    x = torch.rand(4, 1, 16, 16)
    with torch.no_grad():
        found = model(x).double()
        parts = [m((x - a[0]) / s[0]).double().softmax(1) for m, a, s in zip(model.members, means, stds)]
    expected = torch.stack(parts).mean(0)
    assert torch.allclose(found.softmax(1), expected, atol=1e-6)
    assert torch.allclose(found, expected.log(), atol=1e-4)
    again = build.build_model(json.loads(json.dumps({"kind": "ensemble", **model.config}))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    with pytest.raises(InputError, match="two or more"):
        build.Ensemble(configs[:1], means[:1], stds[:1])


@pytest.mark.parametrize(
    "changes",
    [
        {"img_size": 5000},
        {"depth": 10**9},
        {"embed_dim": -1},
        {"num_heads": True},
        {"patch_size": "16"},
        {"mlp_ratio": math.nan},
        {"mlp_ratio": 1e9},
        {"drop_rate": 1.0},
        {"drop_path_rate": None},
        {"kind": ["vit"]},
        {"kind": None},
    ],
)
def test_sizes_out_of_proportion_are_refused(changes):
    with pytest.raises(InputError):
        build.build_model({"kind": "vit", **small_vit().config, **changes})


@pytest.mark.parametrize("readout", ["cls", "mean", "cls+mean"])
def test_readout(readout):
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, 3, 2, 12, 2, 3, reg_tokens=2, readout=readout).eval()
    x = torch.rand(2, 3, 32, 32)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 1 + 2 + 16, 12)
    mean = sum(tokens[:, i] for i in range(3, 19)) / 16
    expected = {"cls": tokens[:, 0], "mean": mean, "cls+mean": torch.cat([tokens[:, 0], mean], 1)}[readout]
    assert torch.allclose(model.features(x), expected, atol=1e-6)
    assert torch.allclose(model(x), model.head(expected), atol=1e-6)
    rebuilt = build.build_model({"kind": "vit", **model.config})
    rebuilt.load_state_dict(model.state_dict())


def test_layer_scale_and_registers_reach_every_parameter():
    model = randomise(VisionTransformer(32, 8, 3, 2, 12, 2, 3, layer_scale=True, reg_tokens=2))
    model(torch.rand(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        dict(readout="all"),
        dict(readout=["cls"]),
        dict(reg_tokens=-1),
        dict(reg_tokens=True),
        dict(layer_scale=1),
    ],
)
def test_wrong_extras_are_refused(config):
    with pytest.raises(InputError):
        build.build_model({"kind": "vit", "img_size": 32, "patch_size": 8, **config})


def test_a_plain_vit_is_described_as_before():
    """Run folders of earlier versions know nothing of LayerScale, registers and readout."""
    assert (
        not {"layer_scale", "reg_tokens", "readout"} & VisionTransformer(32, 8, 3, 2, 12, 2, 3).config.keys()
    )
