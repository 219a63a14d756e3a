"""Tests of the whole project: pytest test_all.py (about three minutes on two cores; needs no data and no network).

Expected values come from brute force, closed form, counts by hand, or an independent library (timm, scipy,
scikit-learn, torchvision, PIL), never from recorded output. Tests on real files skip where ../shared is absent.
"""

import csv
import importlib
import io
import itertools
import json
import math
import os
import platform
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault(
    "HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir(), "hypothesis"))
)  # not the repo

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import scipy.ndimage  # noqa: E402
import scipy.special  # noqa: E402
import scipy.stats  # noqa: E402
import sklearn.metrics  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import torchvision.transforms.functional as TF  # noqa: E402
from hypothesis import assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.class_weight import compute_class_weight  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
import engine  # noqa: E402
import metrics  # noqa: E402
import npz_loader  # noqa: E402
import vit  # noqa: E402
from common import InputError  # noqa: E402

torch.set_num_threads(1)  # tiny models: more threads only wait for each other
settings.register_profile("ci", database=None, deadline=None, derandomize=True, max_examples=150)
settings.load_profile("ci")

REPO = Path(__file__).resolve().parent
SHARED = REPO.parent / "shared"
SCRIPTS = ("train_scratch", "train_pretrained", "train_linear", "calibrate", "compare", "predict")
CPU = torch.device("cpu")


# ================================================================ helpers


def cli(script, *argv, cwd):
    """Run a script's main() in this process, as its command line would -> (code, out, err)."""
    main = importlib.import_module(script).main
    out, err, code = io.StringIO(), io.StringIO(), 0
    old = os.getcwd(), sys.argv
    os.chdir(cwd)
    sys.argv = [f"{script}.py", *map(str, argv)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            common.start(main)
    except SystemExit as stop:
        code = stop.code
    finally:
        os.chdir(old[0])
        sys.argv = old[1]
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def succeed(script, *argv, cwd):
    """`cli` that must exit with 0."""
    done = cli(script, *argv, cwd=cwd)
    assert done.code == 0, done.err
    return done


def refused(done, *words):
    """Exit code 2 and one error message that contains `words`."""
    assert done.code == 2, done.err
    assert done.err.count("error: ") == 1 and "Traceback" not in done.err
    for word in words:
        assert str(word) in done.err


def popen(*argv, cwd):
    """A real process of this interpreter, stdout piped, stderr in cwd/stderr.txt."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    with open(Path(cwd, "stderr.txt"), "w") as err:
        return subprocess.Popen(
            [sys.executable, *map(str, argv)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=err, text=True
        )


def read_json(*parts):
    return json.loads(Path(*parts).read_text())


def load_pth(*parts):
    return torch.load(Path(*parts), weights_only=True)


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def strip_time(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """A small synthetic data folder: train 36 + 60, test 15 + 25 images. Read only: tests that change it copy it."""
    root = tmp_path_factory.mktemp("data") / "synthetic"
    data.make_synthetic(root, train=96, test=40)
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache folder that runs on the unchanged synthetic set share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory):
    """Weights in Google's layout of a very small ViT (width 24, depth 2, heads 3, patch 16, 32 px, 1,000 classes)."""
    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    np.savez(path, **google_arrays(dim=24, depth=2, heads=3, patch=16, grid=2, classes=1000))
    return path


@pytest.fixture(scope="session")
def flags(synthetic, cache):
    """Data flags for a run of seconds."""
    return ["--data-dir", synthetic, "--cache-dir", cache, "--img-size", 32]


@pytest.fixture(scope="session")
def runs(tmp_path_factory, flags, tiny_npz):
    """One run of each kind, calibrated and compared: folder, and what calibrate and compare printed. Read only."""
    cwd = tmp_path_factory.mktemp("runs")
    succeed("train_scratch", *flags, "--epochs", 2, "--batch-size", 16, "--no-amp", cwd=cwd)
    succeed("train_pretrained", *flags, "--weights", tiny_npz, "--epochs", 2, "--batch-size", 16, cwd=cwd)
    succeed("train_linear", *flags[:4], "--img-size", 64, cwd=cwd)
    calibrated = succeed("calibrate", "--min-recall", 0.9, cwd=cwd)
    compared = succeed("compare", "--csv", "table.csv", cwd=cwd)
    return SimpleNamespace(cwd=cwd, out=cwd / "outputs", calibrated=calibrated, compared=compared)


@pytest.fixture
def own_runs(runs, tmp_path):
    """A copy of `runs` that a test may change."""
    shutil.copytree(runs.out, tmp_path / "outputs")
    return tmp_path


# ================================================================ vit


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
def test_parameter_counts(name, classes, count):
    with torch.device("meta"):
        model = vit.build_vit(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == count


def small_vit(**changes):
    """A ViT of a few thousand parameters for 16 px images, in eval mode."""
    torch.manual_seed(0)
    settings = dict(
        img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, drop_rate=0.0, drop_path_rate=0.0
    )
    return vit.VisionTransformer(**{**settings, **changes}).eval()


def randomise(model, seed=0):
    """Give every parameter values that matter (a fresh model's biases are 0 and its attention is flat)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim < 2 else p[0].numel() ** -0.5))
    return model


def test_initial_values():
    model = vit.build_vit("scratch")
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
    """Same names, same shapes, same logits, at 224 px in Ti/16 and (random initial values) in B/16's names."""
    theirs = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=2)).eval()
    ours = vit.build_vit("ti16").eval()
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
    with torch.no_grad(), engine.autocast(CPU, amp):
        tokens = model.forward_features(x)
        explicit, attention = model.forward_features(x, return_attention=True)
    assert attention.shape == (4, 3, 3, 17, 17)
    assert (tokens - explicit).abs().max() < tolerance
    assert (attention.float().sum(-1) - 1).abs().max() < (0.02 if amp else 1e-5)
    assert attention.min() >= 0 and attention.float().std() > 0.01  # not the flat attention of a fresh model


def test_attention_by_hand():
    """One attention layer against the formula, head by head in NumPy: softmax(q k' / sqrt(d)) v."""
    layer = randomise(vit.Attention(6, 2))
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
        with engine.autocast(CPU, True):
            half = model(x)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()  # autocast acted, and only rounded
    assert not torch.equal(half, half.bfloat16().float())


@pytest.mark.parametrize("amp", [False, True])
def test_every_parameter_gets_a_gradient(amp):
    model = randomise(small_vit(drop_rate=0.1, drop_path_rate=0.1)).train()
    torch.manual_seed(0)
    with engine.autocast(CPU, amp):
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
    layer = vit.DropPath(0.3).train()
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
    assert vit.DropPath(0.0).train()(x) is x


def test_drop_path_schedule_is_linear_in_depth():
    model = vit.build_vit("scratch")
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
    """The 8-bit mask: rate (the nearest 1/256), scale, and independence of neighbours; its gradient is the mask."""
    layer = vit.Dropout(p).train()
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
    model = vit.build_vit("scratch", img_size=size, depth=1, embed_dim=16, num_heads=2).eval()
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
        lambda: vit.build_vit("scratch", img_size=225),
        lambda: vit.build_vit("scratch", img_size=(224, 100)),
        lambda: vit.build_vit("scratch", img_size=8),
        lambda: vit.build_vit("scratch", img_size=0),
        lambda: vit.build_vit("scratch", num_heads=7),
        lambda: vit.build_vit("scratch", num_classes=0),
        lambda: vit.build_vit("resnet50"),
        lambda: vit.build_model({"kind": "forest"}),
        lambda: vit.build_model({}),
        lambda: small_vit()(torch.zeros(1, 3, 16, 20)),
        lambda: small_vit()(torch.zeros(1, 1, 16, 16)),
        lambda: small_vit()(torch.zeros(3, 16, 16)),
    ],
)
def test_vit_errors(make):
    with pytest.raises(InputError):
        make()


def test_build_model_from_config_after_json():
    for model in (small_vit(img_size=(16, 8)), vit.PixelLinear(4)):
        kind = "vit" if isinstance(model, vit.VisionTransformer) else "linear"
        again = vit.build_model(json.loads(json.dumps({"kind": kind, **model.config}))).eval()
        again.load_state_dict(model.state_dict())
        x = torch.randn(2, model.in_chans, 16, 8)
        assert torch.equal(again(x), model(x))


def test_pixel_linear_by_hand():
    model = vit.PixelLinear(side=2)
    x = torch.arange(32.0).view(2, 1, 4, 4)
    expected = [[2.5, 4.5, 10.5, 12.5], [18.5, 20.5, 26.5, 28.5]]  # means of 2x2 cells
    assert model.forward_features(x).tolist() == expected
    logits = torch.tensor(expected) @ model.head.weight.T + model.head.bias
    with engine.autocast(CPU, True):
        assert torch.allclose(model(x), logits)  # float32 under autocast too


# ================================================================ npz_loader


def google_arrays(dim=12, depth=2, heads=3, patch=4, grid=2, classes=2, hidden=None, seed=0):
    """Random arrays in the layout of Google's checkpoints, all distinct, with outputs of order 1."""
    rng = np.random.default_rng(seed)
    hidden = hidden or 4 * dim

    def draw(*shape, scale=1.0, centre=0.0):
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale) + np.float32(centre)

    w = {
        "cls": draw(1, 1, dim),
        "Transformer/posembed_input/pos_embedding": draw(1, 1 + grid * grid, dim),
        "embedding/kernel": draw(patch, patch, 3, dim, scale=(3 * patch * patch) ** -0.5),
        "embedding/bias": draw(dim),
        "Transformer/encoder_norm/scale": draw(dim, scale=0.2, centre=1),
        "Transformer/encoder_norm/bias": draw(dim),
        "head/kernel": draw(dim, classes, scale=dim**-0.5),
        "head/bias": draw(classes),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}/"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            w[f"{block}{norm}/scale"] = draw(dim, scale=0.2, centre=1)
            w[f"{block}{norm}/bias"] = draw(dim, scale=0.2)
        attention = f"{block}MultiHeadDotProductAttention_1/"
        for part in ("query", "key", "value"):
            w[f"{attention}{part}/kernel"] = draw(dim, heads, dim // heads, scale=dim**-0.5)
            w[f"{attention}{part}/bias"] = draw(heads, dim // heads, scale=0.2)
        w[f"{attention}out/kernel"] = draw(heads, dim // heads, dim, scale=dim**-0.5)
        w[f"{attention}out/bias"] = draw(dim, scale=0.2)
        w[f"{block}MlpBlock_3/Dense_0/kernel"] = draw(dim, hidden, scale=dim**-0.5)
        w[f"{block}MlpBlock_3/Dense_0/bias"] = draw(hidden, scale=0.2)
        w[f"{block}MlpBlock_3/Dense_1/kernel"] = draw(hidden, dim, scale=hidden**-0.5)
        w[f"{block}MlpBlock_3/Dense_1/bias"] = draw(dim, scale=0.2)
    return w


def flax_forward(w, images):
    """The Flax model written out in NumPy over Google's arrays: images [B, H, W, 3] -> logits [B, K]."""

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w[f"{name}/scale"] + w[f"{name}/bias"]

    def einsum(*args):
        return np.einsum(*args, optimize=True)

    kernel = w["embedding/kernel"]
    p, dim, batch = kernel.shape[0], kernel.shape[3], len(images)
    cells = images.reshape(batch, images.shape[1] // p, p, images.shape[2] // p, p, 3)
    x = (einsum("bhpwqc,pqcd->bhwd", cells, kernel) + w["embedding/bias"]).reshape(batch, -1, dim)
    x = np.concatenate([np.broadcast_to(w["cls"], (batch, 1, dim)), x], axis=1)
    x = x + w["Transformer/posembed_input/pos_embedding"]
    for i in range(len([n for n in w if n.endswith("LayerNorm_0/scale")])):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        y = norm(x, f"{block}/LayerNorm_0")
        q, k, v = (
            einsum("bnd,dhk->bnhk", y, w[f"{attention}/{part}/kernel"]) + w[f"{attention}/{part}/bias"]
            for part in ("query", "key", "value")
        )
        weights = scipy.special.softmax(
            einsum("bqhk,bnhk->bhqn", q, k) / np.sqrt(np.float32(q.shape[-1])), axis=-1
        )
        y = einsum("bhqn,bnhk->bqhk", weights, v)
        x = x + einsum("bqhk,hkd->bqd", y, w[f"{attention}/out/kernel"]) + w[f"{attention}/out/bias"]
        y = norm(x, f"{block}/LayerNorm_2")
        y = y @ w[f"{block}/MlpBlock_3/Dense_0/kernel"] + w[f"{block}/MlpBlock_3/Dense_0/bias"]
        y = y * 0.5 * (1 + scipy.special.erf(y / np.sqrt(np.float32(2))))
        x = x + y @ w[f"{block}/MlpBlock_3/Dense_1/kernel"] + w[f"{block}/MlpBlock_3/Dense_1/bias"]
    return norm(x, "Transformer/encoder_norm")[:, 0] @ w["head/kernel"] + w["head/bias"]


def vit_for(arrays_settings=None, **changes):
    """A fresh model for `google_arrays()` of the given settings."""
    s = {**dict(dim=12, depth=2, heads=3, patch=4, grid=2, classes=2), **(arrays_settings or {})}
    torch.manual_seed(5)
    return vit.VisionTransformer(
        **{
            **dict(
                img_size=s["grid"] * s["patch"],
                patch_size=s["patch"],
                embed_dim=s["dim"],
                depth=s["depth"],
                num_heads=s["heads"],
                num_classes=s["classes"],
            ),
            **changes,
        }
    ).eval()


@pytest.mark.parametrize(
    "ours, theirs, dim, heads, batch",
    [("ti16", "vit_tiny_patch16_224", 192, 3, 2), ("b16", "vit_base_patch16_224", 768, 12, 1)],
)
def test_npz_logits_against_timm_and_numpy(tmp_path, ours, theirs, dim, heads, batch):
    """A whole checkpoint: our loader = timm's loader = the Flax definition; then saved back, the same arrays."""
    w = google_arrays(dim=dim, depth=12, heads=heads, patch=16, grid=14, classes=7)
    path = tmp_path / "weights.npz"
    np.savez(path, **w)
    with torch.device("meta"):
        model = vit.build_vit(ours, num_classes=7)
    model = model.to_empty(device="cpu").eval()
    report = npz_loader.load_npz(model, path)
    assert sorted(report["loaded"]) == sorted(model.state_dict())
    assert (report["resized"], report["reset"], report["dropped"]) == ([], [], [])
    other = timm.create_model(theirs, num_classes=7, weight_init="skip").eval()
    other.load_pretrained(str(path))
    x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(x)
        assert torch.allclose(logits, other(x), atol=1e-5)
    expected = flax_forward(w, x.permute(0, 2, 3, 1).numpy())
    assert expected.std() > 0.3
    assert np.allclose(logits.numpy(), expected, atol=1e-4)
    # Strict state dicts both ways: names and shapes, and with the values loaded above, the same model.
    other.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(other.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.allclose(model(x), logits, atol=1e-6)
    del other
    npz_loader.save_npz(model, tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz") as again:
        assert sorted(again.files) == sorted(w)
        for name in w:
            assert again[name].dtype == np.float32 and np.array_equal(again[name], w[name]), name
    path.unlink(), (tmp_path / "again.npz").unlink()


def test_npz_round_trip(tmp_path):
    model = randomise(vit_for())
    npz_loader.save_npz(model, tmp_path / "w.npz")
    again = vit_for()
    npz_loader.load_npz(again, tmp_path / "w.npz")
    assert same_tensors(model.state_dict(), again.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["w.npz"]


def test_npz_prefix_pre_logits_and_21843_classes(tmp_path):
    """An ImageNet-21k training checkpoint: prefix taken off, optimiser and pre_logits dropped, head reset."""
    w = google_arrays(classes=21843)
    plain = google_arrays(classes=21843)
    extras = {"pre_logits/kernel": np.ones((12, 12), np.float32), "pre_logits/bias": np.ones(12, np.float32)}
    full = {f"opt/target/{n}": a for n, a in (w | extras).items()}
    full |= {
        "opt/state/step": np.array(7),
        "opt/state/param_states/cls/momentum": np.ones((1, 1, 12), np.float32),
    }
    np.savez(tmp_path / "w.npz", **full)
    model = vit_for()
    report = npz_loader.load_npz(model, tmp_path / "w.npz")
    assert sorted(report["reset"]) == ["head.bias", "head.weight"]
    assert sorted(report["dropped"]) == sorted(
        ["head.bias", "head.weight", *extras, "opt/state/step", "opt/state/param_states/cls/momentum"]
    )
    assert sorted(report["loaded"] + report["reset"]) == sorted(model.state_dict())
    assert not model.head.bias.any() and 0 < model.head.weight.abs().max() < 0.1
    reference = vit_for(dict(classes=21843))
    np.savez(tmp_path / "plain.npz", **plain)
    npz_loader.load_npz(reference, tmp_path / "plain.npz")
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), reference.forward_features(x))
    line = npz_loader.describe(report)
    assert "\n" not in line
    for word in ("head.weight", "pre_logits/kernel", "reset", "dropped"):
        assert word in line


def test_npz_without_head(tmp_path):
    w = {n: a for n, a in google_arrays().items() if not n.startswith("head/")}
    np.savez(tmp_path / "w.npz", **w)
    model = vit_for()
    report = npz_loader.load_npz(model, tmp_path / "w.npz")
    assert sorted(report["reset"]) == ["head.bias", "head.weight"] and report["dropped"] == []


def test_npz_float16(tmp_path):
    w = {n: a.astype(np.float16) for n, a in google_arrays().items()}
    np.savez(tmp_path / "w.npz", **w)
    model = vit_for()
    npz_loader.load_npz(model, tmp_path / "w.npz")
    x = torch.randn(2, 3, 8, 8)
    expected = flax_forward({n: a.astype(np.float32) for n, a in w.items()}, x.permute(0, 2, 3, 1).numpy())
    with torch.no_grad():
        assert np.allclose(model(x).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("grid", [(24, 24), (7, 28), (28, 7), (5, 9), (14, 14)])
def test_position_embedding_resize(tmp_path, grid):
    """Google's rule is scipy's zoom(order=1): corner cells stay; 7 x 28 has the token count of 14 x 14."""
    s = dict(grid=14, depth=1)
    w = google_arrays(**s)
    np.savez(tmp_path / "w.npz", **w)
    model = vit_for(s, img_size=(grid[0] * 4, grid[1] * 4))
    report = npz_loader.load_npz(model, tmp_path / "w.npz")
    assert report["resized"] == ([] if grid == (14, 14) else ["pos_embed"])
    assert ("pos_embed" in report["loaded"]) == (grid == (14, 14))
    pos = w["Transformer/posembed_input/pos_embedding"][0].astype(np.float64)
    expected = scipy.ndimage.zoom(pos[1:].reshape(14, 14, 12), (grid[0] / 14, grid[1] / 14, 1), order=1)
    found = model.pos_embed.detach()[0].double().numpy()
    assert np.array_equal(found[0], pos[0])
    assert expected.shape[:2] == grid
    assert np.allclose(found[1:].reshape(*grid, 12), expected, atol=1e-5)


def test_config_from_npz(tmp_path):
    np.savez(tmp_path / "w.npz", **google_arrays(dim=20, depth=3, heads=5, patch=8, grid=3, hidden=50))
    config = npz_loader.config_from_npz(tmp_path / "w.npz")
    assert config == dict(patch_size=8, in_chans=3, embed_dim=20, depth=3, num_heads=5, mlp_ratio=2.5)
    model = vit.VisionTransformer(img_size=24, **config)
    assert npz_loader.load_npz(model, tmp_path / "w.npz")["reset"] == []
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "w.pth")
    expected = dict(patch_size=16, in_chans=3, embed_dim=192, depth=12, num_heads=3, mlp_ratio=4)
    assert npz_loader.config_from_npz(tmp_path / "w.pth") == expected


class Evil:
    """Unpickling it would create a file: whoever loads it carelessly runs somebody else's code."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def _bad_npz(path, change):
    w = google_arrays()
    block = "Transformer/encoderblock_1/"
    attention = f"{block}MultiHeadDotProductAttention_1/"
    if change == "truncated":
        np.savez(path, **w)
        path.write_bytes(path.read_bytes()[:-3000])
        return
    if change == "text":
        path.write_text("<html>404 Not Found</html>")
        return
    if change == "empty":
        path.write_bytes(b"")
        return
    if change == "pickle":
        path.write_bytes(pickle.dumps({"cls": Evil(path.with_name("executed"))}))
        return
    if change == "object arrays":
        w["cls"] = np.array([Evil(path.with_name("executed"))], dtype=object)
    elif change == "compressed and damaged":
        np.savez_compressed(path, **w)
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2 : len(raw) // 2 + 40] = bytes(40)
        path.write_bytes(raw)
        return
    elif change == "hybrid":
        w["conv_root/kernel"] = np.ones((7, 7, 3, 8), np.float32)
    elif change == "nothing of a ViT":
        w = {"weights": np.ones(3)}
    elif change == "array missing":
        del w[f"{block}MlpBlock_3/Dense_0/bias"]
    elif change == "key missing":
        del w[f"{attention}key/kernel"]
    elif change == "block missing":
        w = {n: a for n, a in w.items() if "encoderblock_0" not in n}
    elif change == "head bias missing":
        del w["head/bias"]
    elif change == "misshapen":
        w[f"{block}MlpBlock_3/Dense_1/kernel"] = w[f"{block}MlpBlock_3/Dense_1/kernel"][:, :-1]
    elif change == "transposed":
        w[f"{block}MlpBlock_3/Dense_1/kernel"] = w[f"{block}MlpBlock_3/Dense_1/kernel"].T
    elif change == "extra":
        w[f"{block}LayerNorm_9/scale"] = np.ones(12, np.float32)
    elif change == "integers":
        w["embedding/bias"] = np.arange(12)
    elif change == "NaN":
        w[f"{attention}out/bias"][3] = np.nan
    elif change == "infinite":
        w[f"{attention}query/bias"][0, 3] = np.inf
    elif change == "heads":
        w = google_arrays(heads=4)
    elif change == "heads of one block":
        w |= {n: a for n, a in google_arrays(heads=4).items() if n.startswith(block)}
    elif change == "width":
        w = google_arrays(dim=24)
    elif change == "depth":
        w = google_arrays(depth=3)
    elif change == "position grid":
        w["Transformer/posembed_input/pos_embedding"] = np.ones((1, 7, 12), np.float32)
    np.savez(path, **w)


@pytest.mark.parametrize(
    "change, words",
    [
        ("absent", ["curl", npz_loader.DOWNLOAD, npz_loader.DEFAULT_PATH]),
        ("truncated", ["truncated"]),
        ("text", ["damaged"]),
        ("empty", ["damaged"]),
        ("pickle", ["pickled"]),
        ("object arrays", ["pickled"]),
        ("compressed and damaged", ["damaged"]),
        ("hybrid", ["hybrid", "conv_root"]),
        ("nothing of a ViT", ["weights"]),
        ("array missing", ["encoderblock_1/MlpBlock_3/Dense_0/bias"]),
        ("key missing", ["encoderblock_1", "key/kernel"]),
        ("block missing", ["encoderblock_0"]),
        ("head bias missing", ["head"]),
        ("misshapen", ["blocks.1.mlp.fc2.weight"]),
        ("transposed", ["blocks.1.mlp.fc2.weight"]),
        ("extra", ["encoderblock_1/LayerNorm_9/scale"]),
        ("integers", ["embedding/bias"]),
        ("NaN", ["blocks.1.attn.proj.bias"]),
        ("infinite", ["blocks.1.attn.qkv.bias"]),
        ("heads", ["4 heads", "has 3"]),
        ("heads of one block", ["heads"]),
        ("width", ["blocks.0.norm1.weight"]),
        ("depth", ["blocks.2"]),
        ("position grid", ["7 tokens"]),
    ],
)
def test_bad_npz(tmp_path, change, words):
    path = tmp_path / "w.npz"
    if change != "absent":
        _bad_npz(path, change)
    model = vit_for()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        npz_loader.load_npz(model, path)
    for word in [*words, str(path)]:
        assert word in str(error.value)
    assert same_tensors(model.state_dict(), before)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("img_size", [8, 12])  # with and without a resized position embedding
def test_npz_every_array_misshapen(tmp_path, img_size):
    """Each array with a wrong shape in turn, also one with the right number of elements, is refused by name."""
    w = google_arrays(dim=12, depth=1, heads=3)
    model = vit_for(dict(depth=1), img_size=img_size)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    accepted = []
    for name, array in w.items():
        if name.startswith("head/"):  # a head of another shape is reset by design
            continue
        changes = {
            "cut": array[..., :-1],
            "repeated": np.concatenate([array, array]),
            "leading axis": array[None],
            "flat": array.ravel(),
            "reversed axes": array.T,
        }
        if array.ndim > 1:
            changes["swapped axes"] = np.swapaxes(array, 0, 1)
        for what, wrong in changes.items():
            if wrong.shape == array.shape:
                continue
            np.savez(tmp_path / "w.npz", **{**w, name: wrong})
            try:
                npz_loader.load_npz(model, tmp_path / "w.npz")
                accepted.append(f"{name}, {what} {wrong.shape}: accepted")
                model.load_state_dict(before)
            except InputError:
                assert same_tensors(model.state_dict(), before)
            except Exception as error:  # noqa: BLE001  (listed with the rest)
                accepted.append(f"{name}, {what} {wrong.shape}: {error!r}")
    assert accepted == []


def test_npz_damaged_anywhere(tmp_path):
    """A changed byte or a cut anywhere in the file: refused, or without effect; never another error or value."""
    np.savez_compressed(tmp_path / "good.npz", **google_arrays(dim=6, heads=2, depth=1, patch=2, hidden=6))
    raw = (tmp_path / "good.npz").read_bytes()
    s = dict(dim=6, heads=2, depth=1, patch=2)
    good = vit_for(s, mlp_ratio=1)
    npz_loader.load_npz(good, tmp_path / "good.npz")
    model, rng = vit_for(s, mlp_ratio=1), random.Random(0)
    names = Path(tmp_path, "w.npz")
    errors = []
    for trial in range(400):
        damaged = bytearray(raw)
        if trial % 4:
            at = rng.randrange(len(raw))
            damaged[at] ^= 1 << rng.randrange(8)
        else:
            at = rng.randrange(len(raw))
            del damaged[at:]
        names.write_bytes(damaged)
        try:
            npz_loader.load_npz(model, names)
            assert same_tensors(model.state_dict(), good.state_dict())
        except InputError:
            pass
        except Exception as error:  # noqa: BLE001  (the finding itself)
            errors.append(f"{'cut' if trial % 4 == 0 else 'bit'} at {at}: {error!r}")
    assert errors == []


def hugging_face_names(state):
    """Our state dict under the names of transformers' ViTForImageClassification."""
    out = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            block, kind = name.split(".")[1], name.split(".")[-1]
            for part, piece in zip(("query", "key", "value"), value.chunk(3)):
                out[f"vit.encoder.layer.{block}.attention.attention.{part}.{kind}"] = piece.clone()
            continue
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            for ours, theirs in (
                ("attn.proj", "attention.output.dense"),
                ("norm1", "layernorm_before"),
                ("norm2", "layernorm_after"),
                ("mlp.fc1", "intermediate.dense"),
                ("mlp.fc2", "output.dense"),
            ):
                rest = rest.replace(ours, theirs)
            out[f"vit.encoder.layer.{block}.{rest}"] = value.clone()
            continue
        for ours, theirs in (
            ("cls_token", "vit.embeddings.cls_token"),
            ("head.", "classifier."),
            ("pos_embed", "vit.embeddings.position_embeddings"),
            ("norm.", "vit.layernorm."),
            ("patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
        ):
            if name.startswith(ours):
                out[theirs + name.removeprefix(ours)] = value.clone()
    return out


@pytest.mark.parametrize("form", ["timm", "DeiT", "Hugging Face", "safetensors", "safetensors Hugging Face"])
def test_torch_state_dicts(tmp_path, form):
    """Each form gives the donor's logits; the input scaling is the form's own."""
    donor = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=2, depth=2)).eval()
    state = {n: v.clone() for n, v in donor.state_dict().items()}
    if "Hugging Face" in form:
        state = hugging_face_names(state)
        assert (
            len(state) == len(donor.state_dict()) + 2 * 2 * 2
        )  # two blocks, weight and bias, two more names
    if form.startswith("safetensors"):
        path = tmp_path / "w.safetensors"
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        path = tmp_path / "w.pth"
        torch.save({"model": state} if form == "DeiT" else state, path)
    model = vit.build_vit("ti16", depth=2).eval()
    report = npz_loader.load_npz(model, path)
    assert sorted(report["loaded"]) == sorted(model.state_dict())
    imagenet = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (report["mean"], report["std"]) == (imagenet if form == "DeiT" else ([0.5] * 3, [0.5] * 3))
    assert (
        report["source"].split()[0]
        in {
            "DeiT": "DeiT",
            "Hugging Face": "Hugging",
            "timm": "timm",
            "safetensors": "timm",
            "safetensors Hugging Face": "Hugging",
        }[form]
    )
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(model(x), donor(x), atol=1e-5)


def test_real_hugging_face_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        num_labels=2,
        layer_norm_eps=1e-6,
    )
    donor = randomise(transformers.ViTForImageClassification(config)).eval()
    torch.save(donor.state_dict(), tmp_path / "w.bin")
    model = vit_for(dict(dim=24, patch=16))
    npz_loader.load_npz(model, tmp_path / "w.bin")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(x), donor(x).logits, atol=1e-5)


@pytest.mark.parametrize(
    "what", ["name", "missing", "shape", "query", "NaN", "not tensors", "code", "text", "empty"]
)
def test_bad_torch_state_dict(tmp_path, what):
    model = vit_for()
    state = {n: v.clone() for n, v in randomise(vit_for()).state_dict().items()}
    before = {n: v.clone() for n, v in model.state_dict().items()}
    path = tmp_path / "w.pth"
    if what == "name":
        state["blocks.0.ls1.gamma"] = torch.ones(12)
    elif what == "missing":
        del state["norm.bias"]
    elif what == "shape":
        state["norm.bias"] = torch.ones(1)  # copy_ would broadcast it
    elif what == "query":
        state = hugging_face_names(state)
        del state["vit.encoder.layer.1.attention.attention.query.bias"]
    elif what == "NaN":
        state["cls_token"][0, 0, 0] = math.nan
    elif what == "not tensors":
        state = {"epoch": 3, "arch": "vit"}
    elif what == "code":
        state = {"cls_token": Evil(tmp_path / "executed")}
    if what in ("text", "empty"):
        path.write_text("hello" if what == "text" else "")
    else:
        torch.save(state, path)
    words = {
        "name": "blocks.0.ls1.gamma",
        "missing": "norm.bias",
        "shape": "norm.bias",
        "query": "query.bias",
        "NaN": "cls_token",
    }
    with pytest.raises(InputError, match=re.escape(words.get(what, "w.pth"))):
        npz_loader.load_npz(model, path)
    assert same_tensors(model.state_dict(), before) and not (tmp_path / "executed").exists()


def test_real_weights_against_timm():
    path = SHARED / "weights" / "ViT-Ti_16-224.npz"
    if not path.exists():
        pytest.skip("no real weights here")
    config = npz_loader.config_from_npz(path)
    assert config == dict(patch_size=16, in_chans=3, embed_dim=192, depth=12, num_heads=3, mlp_ratio=4)
    model = vit.build_vit("ti16", num_classes=1000).eval()
    assert npz_loader.load_npz(model, path)["reset"] == []
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=1000).eval()
    theirs.load_pretrained(str(path))
    x = torch.rand(2, 3, 224, 224) * 2 - 1
    with np.load(path) as file, torch.no_grad():
        logits = model(x)
        assert torch.allclose(logits, theirs(x), atol=1e-4)
        expected = flax_forward({n: file[n] for n in file.files}, x.permute(0, 2, 3, 1).numpy())
    assert np.allclose(logits.numpy(), expected, atol=1e-3) and logits.std() > 0.5
    two = vit.build_vit("ti16", img_size=384)
    report = npz_loader.load_npz(two, path)
    assert report["resized"] == ["pos_embed"] and sorted(report["dropped"]) == ["head.bias", "head.weight"]


# ================================================================ data: names, files, split


@pytest.mark.parametrize(
    "name, patient",
    [
        ("person1000_bacteria_2931.jpeg", "person1000"),
        ("person1000_virus_1681.jpeg", "person1000"),
        ("person10_virus_35.jpeg", "person10"),
        ("IM-0115-0001.jpeg", "IM-0115"),
        ("IM-0011-0001-0002.jpeg", "IM-0011"),
        ("NORMAL2-IM-0587-0001-0002.jpeg", "NORMAL2-IM-0587"),
        ("NORMAL2-IM-0115-0001.jpeg", "NORMAL2-IM-0115"),
        ("train/NORMAL/IM-0115-0001.jpeg", "IM-0115"),
    ],
)
def test_patient_id(name, patient):
    assert data.patient_id(name) == patient


def test_any_other_name_is_a_patient_of_its_own():
    """Numbered files are common: 1.png of one class folder is not the child of 1.png of the other."""
    names = [
        "train/NORMAL/1.png",
        "train/PNEUMONIA/1.png",
        "train/NORMAL/2.png",
        "train/NORMAL/a_1.png",
        "train/NORMAL/a_2.png",
        "train/NORMAL/person.png",
        "train/NORMAL/IM.png",
    ]
    assert len({data.patient_id(n) for n in names}) == len(names)
    files = [f"train/{c}/{i}.png" for c in data.CLASSES for i in range(12)]
    labels = np.arange(24) // 12
    _, plain = data.split_train_val(files, labels, "image")
    _, val = data.split_train_val(files, labels, "patient")
    assert np.bincount(labels[val]).tolist() == np.bincount(labels[plain]).tolist()


def touch(root, *names):
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_listing(tmp_path):
    """Three extensions in any case; hidden files and the litter of a Mac's zip are passed over."""
    touch(
        tmp_path,
        "train/NORMAL/b.JPEG",
        "train/NORMAL/a.jpg",
        "train/NORMAL/c.PnG",
        "train/NORMAL/.DS_Store",
        "train/NORMAL/._a.jpg",
        "train/NORMAL/.jpeg",
        "train/NORMAL/notes.txt",
        "train/NORMAL/__MACOSX/._a.jpg",
        "train/PNEUMONIA/x.jpeg",
        "__MACOSX/train/NORMAL/._a.jpg",
        "val/NORMAL/official.jpeg",
    )
    files, labels = data.list_images(data.find_root(tmp_path), "train")
    assert files == [
        "train/NORMAL/a.jpg",
        "train/NORMAL/b.JPEG",
        "train/NORMAL/c.PnG",
        "train/PNEUMONIA/x.jpeg",
    ]
    assert labels.tolist() == [0, 0, 0, 1]
    assert data.list_images(tmp_path, "train", ("PNEUMONIA", "NORMAL"))[1].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("nested", ["", "chest_xray", "chest_xray/chest_xray"])
def test_nested_folder_of_the_kaggle_zip(tmp_path, nested):
    touch(tmp_path, "__MACOSX/chest_xray/._train", f"{nested}/train/NORMAL/a.jpeg".lstrip("/"))
    assert data.find_root(tmp_path) == tmp_path / nested


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(InputError, match="(?s)--data-dir.*--download.*--demo"):
        data.find_root(tmp_path)
    touch(tmp_path, "train/NORMAL/a.jpeg")
    with pytest.raises(InputError, match="PNEUMONIA"):
        data.list_images(tmp_path, "train")
    touch(tmp_path, "train/PNEUMONIA/.DS_Store")
    with pytest.raises(InputError, match="PNEUMONIA holds no"):
        data.list_images(tmp_path, "train")


def made_up_listing(seed=0):
    """File names and labels like those of the Kermany set: patients of 1 to 30 images, one class each."""
    rng, files, labels = random.Random(seed), [], []
    for patient in range(120):
        for k in range(rng.choice([1, 1, 1, 2, 3, 5, 30 if patient == 7 else 4])):
            files.append(
                f"train/PNEUMONIA/person{patient}_{rng.choice(['virus', 'bacteria'])}_{len(files)}.jpeg"
            )
    labels += [1] * len(files)
    for patient in range(80):
        for k in range(rng.choice([1, 1, 2, 3])):
            files.append(f"train/NORMAL/{rng.choice(['', 'NORMAL2-'])}IM-{patient:04d}-{k:04d}.jpeg")
            labels.append(0)
    return files, np.array(labels)


def shared_images(files, train, val):
    ids = {data.patient_id(files[i]) for i in train}
    return sum(data.patient_id(files[i]) in ids for i in val)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_patient_split_has_the_counts_of_the_plain_split(seed):
    files, labels = made_up_listing(seed)
    train, val = data.split_train_val(files, labels, "patient", 0.2, seed)
    plain_train, plain_val = data.split_train_val(files, labels, "image", 0.2, seed)
    assert sorted([*train, *val]) == list(range(len(files))) == sorted([*plain_train, *plain_val])
    assert np.bincount(labels[val]).tolist() == np.bincount(labels[plain_val]).tolist()
    assert len(val) == math.ceil(0.2 * len(files))
    assert shared_images(files, train, val) == 0 < shared_images(files, plain_train, plain_val)


def test_image_split_is_scikit_learns(synthetic):
    files, labels = data.list_images(synthetic, "train")
    train, val = data.split_train_val(files, labels, "image", 0.2, 3)
    expected = sklearn.model_selection.train_test_split(
        np.arange(96), test_size=0.2, stratify=labels, random_state=3
    )
    assert set(train) == set(expected[0]) and set(val) == set(expected[1])


@pytest.mark.parametrize("mode", ["patient", "image"])
def test_split_depends_on_names_and_seed_alone(mode):
    files, labels = made_up_listing()

    def names(order, seed):
        train, val = data.split_train_val([files[i] for i in order], labels[order], mode, 0.2, seed)
        return frozenset(files[order[i]] for i in train), frozenset(files[order[i]] for i in val)

    order = np.arange(len(files))
    shuffled = np.random.default_rng(1).permutation(order)
    assert names(order, 0) == names(shuffled, 0) == names(order[::-1], 0)
    assert len({names(order, seed) for seed in range(5)}) == 5


def test_patient_with_both_classes_stays_whole():
    files = [f"train/X/person{p}_virus_{k}.jpeg" for p in range(40) for k in range(3)]
    labels = np.array([(p + (k == 2)) % 2 if p % 5 == 0 else p % 2 for p in range(40) for k in range(3)])
    train, val = data.split_train_val(files, labels)
    assert shared_images(files, train, val) == 0 and len(train) + len(val) == 120
    assert (
        np.abs(np.bincount(labels[val]) - [12, 12]).max() <= 1
    )  # sizes 1, 2 and 3: the count can nearly be met


@given(sizes=st.lists(st.integers(1, 12), max_size=9), target=st.integers(0, 60))
def test_nearest_subset_against_brute_force(sizes, target):
    chosen = data._nearest_subset(sizes, target)
    assert len(set(chosen)) == len(chosen)
    found = sum(sizes[i] for i in chosen)
    sums = [sum(c) for n in range(len(sizes) + 1) for c in itertools.combinations(sizes, n)]
    assert abs(found - target) == min(abs(s - target) for s in sums)


@given(
    sizes=st.tuples(*[st.lists(st.sampled_from([1, 2, 3, 7]), min_size=2, max_size=7)] * 2),
    seed=st.integers(0, 99),
)
def test_patient_split_against_brute_force(sizes, seed):
    """Per class, the nearest count to the plain split's that whole patients can give."""
    files, labels = [], []
    for label, patients in enumerate(sizes):
        for p, size in enumerate(patients):
            files += [
                f"{'train/NORMAL/IM-' if label == 0 else 'train/PNEUMONIA/person'}{p:02d}"
                f"{'-' if label == 0 else '_virus_'}{k:04d}.jpeg"
                for k in range(size)
            ]
            labels += [label] * size
    labels = np.array(labels)
    assume(np.bincount(labels).min() >= 5)
    _, plain = data.split_train_val(files, labels, "image", 0.2, seed)
    best, possible = [], True
    for label, patients in enumerate(sizes):
        target = (labels[plain] == label).sum()
        sums = {sum(c) for n in range(len(patients) + 1) for c in itertools.combinations(patients, n)}
        best.append(min(abs(s - target) for s in sums))
        nearest = {s for s in sums if abs(s - target) == best[-1]}
        possible &= not nearest & {0, sum(patients)}
    try:
        train, val = data.split_train_val(files, labels, "patient", 0.2, seed)
    except InputError:
        assert not possible
        return
    assert shared_images(files, train, val) == 0 and len(train) + len(val) == len(files)
    for label in range(2):
        assert abs((labels[val] == label).sum() - (labels[plain] == label).sum()) == best[label]


def test_split_errors():
    with pytest.raises(InputError):
        data.split_train_val(["a.png", "b.png", "c.png"], [0, 1, 1])
    with pytest.raises(InputError, match="patients"):  # ten images of one patient cannot be on both sides
        data.split_train_val(
            [f"person1_virus_{i}.jpeg" for i in range(10)] + [f"x{i}.jpeg" for i in range(10)],
            [1] * 10 + [0] * 10,
        )


def test_real_split():
    root = SHARED / "chest_xray"
    if not root.is_dir():
        pytest.skip("no real data here")
    files, labels = data.list_images(root, "train")
    assert (len(files), len(data.list_images(root, "test")[0])) == (5216, 624)
    ids = [{data.patient_id(f) for f, y in zip(files, labels) if y == k} for k in (0, 1)]
    assert [len(i) for i in ids] == [1211, 1635] and not ids[0] & ids[1]
    for seed in (0, 1):
        train, val = data.split_train_val(files, labels, "patient", 0.2, seed)
        assert (len(train), len(val)) == (4172, 1044)
        assert np.bincount(labels[train]).tolist() == [1073, 3099]
        assert shared_images(files, train, val) == 0
        train, val = data.split_train_val(files, labels, "image", 0.2, seed)
        assert np.bincount(labels[train]).tolist() == [1073, 3099]
        assert 0.39 <= shared_images(files, train, val) / 1044 <= 0.62


# ================================================================ data: decoding and cache


def smooth_picture(height, width, seed=0):
    """A smooth random grey picture, uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.uniform(0, 255, (12, 12)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 255).astype(np.uint8)


def full_decode(path, size):
    """Plain PIL at full resolution."""
    with Image.open(path) as image:
        return np.asarray(image.convert("L").resize((size, size), Image.Resampling.BILINEAR)).astype(float)


def test_decode_rgb_jpeg_like_pil(tmp_path):
    rgb = np.stack([smooth_picture(48, 48, seed) for seed in range(3)], axis=2)
    Image.fromarray(rgb).save(tmp_path / "a.jpeg", quality=95)
    found = data.decode(tmp_path / "a.jpeg", 48)
    with Image.open(tmp_path / "a.jpeg") as image:
        expected = np.asarray(image.convert("L")).astype(float)
    assert found.dtype == np.uint8 and found.shape == (48, 48)
    assert np.abs(found - expected).mean() < 0.7 and np.abs(found - expected).max() <= 4


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1"])
def test_decode_png_modes(tmp_path, mode):
    grey = (smooth_picture(20, 20) > 128).astype(np.uint8) * 255
    Image.fromarray(grey).convert(mode).save(tmp_path / "a.png")
    assert np.abs(data.decode(tmp_path / "a.png", 20).astype(int) - grey).max() <= 1


def test_decode_16_bit_is_scaled(tmp_path):
    """v * 257 in 16 bits is v in 8 bits; clipping would turn all but 0 to 255."""
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values * 257).save(tmp_path / "a.png")
    found = data.decode(tmp_path / "a.png", 16)
    assert np.abs(found.astype(int) - values).max() <= 1
    assert (found[-1, -1], found[0, 0]) == (255, 0)


def test_resize_geometry(tmp_path):
    """200 x 100, black | white | black: squashed, cut to the white middle, or letterboxed."""
    picture = np.zeros((100, 200), np.uint8)
    picture[:, 50:150] = 255
    Image.fromarray(picture).save(tmp_path / "wide.png")
    Image.fromarray(picture.T.copy()).save(tmp_path / "tall.png")
    for name in ("wide", "tall"):
        squash, crop, pad = (data.decode(tmp_path / f"{name}.png", 40, r) for r in ("squash", "crop", "pad"))
        if name == "tall":
            squash, crop, pad = squash.T, crop.T, pad.T
        assert (
            crop[1:-1, 1:-1] == 255
        ).all() and crop.min() > 200  # the filter may see a pixel beyond the edge
        row = squash[20]
        assert (row[:9] == 0).all() and (row[11:29] == 255).all() and (row[31:] == 0).all()
        assert (squash == row).all()
        assert (pad[:9] == 0).all() and (pad[31:] == 0).all()  # 10 rows above, 20 of picture, 10 below
        assert (pad[11:29, 11:29] == 255).all() and (pad[11:29, :9] == 0).all()
        assert pad.sum() == pytest.approx(255 * 20 * 20, rel=0.01)


def test_square_pictures_are_resized_alike(tmp_path):
    Image.fromarray(smooth_picture(64, 64)).save(tmp_path / "a.png")
    squash = data.decode(tmp_path / "a.png", 32, "squash")
    assert np.array_equal(squash, full_decode(tmp_path / "a.png", 32))
    for resize in ("pad", "crop"):
        assert np.array_equal(data.decode(tmp_path / "a.png", 32, resize), squash)


def test_reduced_decoding_is_close_to_full(tmp_path):
    """A large JPEG is decoded at a fraction of its size, and that is not visible."""
    picture = smooth_picture(1600, 2000).astype(float) + np.random.default_rng(0).normal(0, 10, (1600, 2000))
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(tmp_path / "a.jpeg", quality=90)
    expected = full_decode(tmp_path / "a.jpeg", 64)
    assert np.abs(data.decode(tmp_path / "a.jpeg", 64) - expected).mean() < 1


def test_reduced_decoding_of_real_originals():
    files = sorted((SHARED / "chest_xray_originals").glob("train/*/*.jpeg"))[::10]
    if not files:
        pytest.skip("no originals here")
    for path in files:
        difference = np.abs(data.decode(path, 224) - full_decode(path, 224))
        assert difference.mean() < 1.5, path


def test_damaged_pictures_raise_oserror_only():
    """Cut or changed bytes give a picture or OSError, which load_images turns into a named error."""
    rng, failures = random.Random(0), 0
    for kind in ("jpeg", "png"):
        buffer = io.BytesIO()
        Image.fromarray(smooth_picture(40, 40)).save(buffer, kind)
        for trial in range(250):
            raw = bytearray(buffer.getvalue())
            if trial % 5 == 0:
                del raw[rng.randrange(len(raw)) :]
            else:
                raw[rng.randrange(min(len(raw), 400 if trial % 2 else len(raw)))] = rng.randrange(256)
            try:
                image = data.decode(io.BytesIO(raw), 16)
                assert image.shape == (16, 16) and image.dtype == np.uint8
            except OSError:
                failures += 1
    assert failures > 100


@pytest.fixture
def small_set(tmp_path):
    """A data folder of its own: 12 + 12 training and 3 + 3 test PNGs of one grey value each, known by name."""
    for split, count in (("train", 12), ("test", 3)):
        for k, name in enumerate(data.CLASSES):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((20, 20), 10 * i + 100 * k, np.uint8)).save(
                    folder / f"{'np'[k]}{i:02d}.png"
                )
    return data.DataConfig(data_dir=str(tmp_path / "set"), img_size=16, cache_dir=str(tmp_path / "cache"))


def load_train(config):
    root = data.find_root(config.data_dir)
    files, _ = data.list_images(root, "train")
    images, kept, sizes = data.load_images(root, files, config, "train")
    assert sizes["width"][0] == sizes["height"][0] == 20  # of the originals
    return files, np.array(images), kept.tolist()


EXPECTED_VALUES = [10 * i for i in range(12)] + [100 + 10 * i for i in range(12)]


def cache_file(config):
    [path] = Path(config.cache_dir).glob("*.npy")
    return path


def test_cache_is_reused(small_set):
    files, images, kept = load_train(small_set)
    assert images[:, 8, 8].tolist() == EXPECTED_VALUES and kept == list(range(24))
    stat = os.stat(cache_file(small_set))
    _, again, _ = load_train(small_set)
    assert np.array_equal(images, again)
    assert (os.stat(cache_file(small_set)).st_mtime_ns, os.stat(cache_file(small_set)).st_ino) == (
        stat.st_mtime_ns,
        stat.st_ino,
    )
    assert not list(Path(small_set.cache_dir).glob(".*"))


@pytest.mark.parametrize(
    "damage",
    [
        "image changed",
        "image replaced in the same second",
        "byte flipped",
        "truncated",
        "emptied",
        "array missing",
        "description missing",
        "description damaged",
        "description changed",
    ],
)
def test_cache_is_rebuilt(small_set, damage):
    """A stale or damaged cache never reaches a model."""
    files, images, _ = load_train(small_set)
    path = cache_file(small_set)
    side = path.with_suffix(".json")
    expected = list(EXPECTED_VALUES)
    if damage.startswith("image"):
        image = Path(small_set.data_dir, files[5])
        before = os.stat(image)
        Image.fromarray(np.full((20, 20), 222, np.uint8)).save(image)
        expected[5] = 222
        if damage != "image changed":
            os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    elif damage == "byte flipped":
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "array missing":
        path.unlink()
    elif damage == "description missing":
        side.unlink()
    elif damage == "description damaged":
        side.write_bytes(side.read_bytes()[:-20])
    elif damage == "description changed":  # still JSON, but it would read image 3 in the place of image 4
        value = json.loads(side.read_text())
        value["kept"][4] = 3
        side.write_text(json.dumps(value))
    _, again, kept = load_train(small_set)
    assert again[:, 8, 8].tolist() == expected and kept == list(range(24))


def test_caches_of_other_settings_do_not_mix(small_set):
    load_train(small_set)
    from dataclasses import replace

    assert load_train(replace(small_set, img_size=8))[1].shape == (24, 8, 8)
    load_train(replace(small_set, resize="pad"))
    assert len(list(Path(small_set.cache_dir).glob("*.npy"))) == 3
    extra = Path(small_set.data_dir, "train/NORMAL/new.png")
    Image.fromarray(np.full((20, 20), 7, np.uint8)).save(extra)
    files, images, _ = load_train(small_set)
    assert images[files.index("train/NORMAL/new.png")].max() == 7 and len(images) == 25


def test_bad_files_are_named_or_skipped(small_set, capsys):
    from dataclasses import replace

    cut, text = (
        Path(small_set.data_dir, "train/NORMAL/n03.jpeg"),
        Path(small_set.data_dir, "train/PNEUMONIA/zz.jpeg"),
    )
    Image.fromarray(smooth_picture(64, 64)).save(cut)
    cut.write_bytes(cut.read_bytes()[:300])
    text.write_text("not an image")
    for _ in range(2):  # decoded now, then from the cache
        with pytest.raises(InputError, match="(?s)2 of 26.*NORMAL/n03.jpeg.*PNEUMONIA/zz.jpeg.*--skip-bad"):
            load_train(small_set)
    capsys.readouterr()
    train, val, info = data.load_train_val(replace(small_set, skip_bad=True))
    assert "left out 2 of 26" in capsys.readouterr().err
    assert info["train"] + info["val"] == 24 == len(train) + len(val)
    assert info["original_size"] == {"width": [20, 20], "height": [20, 20]}
    for subset in (train, val):  # names, labels and pixels still belong together
        for name, label, row in zip(subset.files, subset.labels, subset.rows):
            number = int(re.search(r"[np](\d+)\.png", name)[1])
            assert label == ("PNEUMONIA" in name) and subset.images[row].max() == 10 * number + 100 * label
    Image.fromarray(np.full((20, 20), 1, np.uint8)).save(cut)  # mended: used again
    text.unlink()
    assert load_train(small_set)[2] == list(range(25))


def test_load_train_val(small_set, capsys):
    train, val, info = data.load_train_val(small_set)
    assert (info["train"], info["val"], info["test"]) == (19, 5, 6) == (len(train), len(val), info["test"])
    assert info["synthetic"] is False and info["shared_patients"] == 0 and info["set"] == "set"
    assert sum(info["counts"]["val"].values()) == 5 and info["counts"]["test"] == {
        "NORMAL": 3,
        "PNEUMONIA": 3,
    }
    assert "(train, val, test) = (19, 5, 6)" in capsys.readouterr().out
    test = data.load_test(small_set)
    assert test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    x, y = data.Batches(test, "cpu").get(torch.tensor([5, 0, 1]))
    assert x.dtype == torch.float32 and x.shape == (3, 1, 16, 16) and y.tolist() == [1, 0, 0]
    assert x[:, 0, 3, 3].tolist() == pytest.approx([120 / 255, 0, 10 / 255])
    again = data.load_train_val(small_set)[2]
    assert again["fingerprint"] == info["fingerprint"]
    Path(small_set.data_dir, "train/NORMAL/n00.png").rename(Path(small_set.data_dir, "train/NORMAL/q00.png"))
    assert data.load_train_val(small_set)[2]["fingerprint"] != info["fingerprint"]


def test_pixel_fingerprint_sees_names_labels_pixels_and_order(small_set):
    test = data.load_test(small_set)
    base = data.pixel_fingerprint(test)
    assert data.pixel_fingerprint(test.take(np.arange(6))) == base
    others = [test.take(np.arange(5)), test.take(np.array([1, 0, 2, 3, 4, 5]))]
    for field in ("files", "labels", "images"):
        changed = test.take(np.arange(6))
        if field == "files":
            changed.files[0] = "other"
        elif field == "labels":
            changed.labels[0] = 1
        else:
            changed.images = np.array(changed.images)
            changed.images[3, 0, 0] ^= 1
        others.append(changed)
    assert len({base, *map(data.pixel_fingerprint, others)}) == 6


# ================================================================ data: augmentation and the synthetic set

NONE = dict(rotate=0, translate=0, scale=0, brightness=0, contrast=0, hflip=0)


def extremes(monkeypatch, x, **settings):
    """The augmentation with every random number at its largest and at its smallest."""
    out = []
    for value in (1.0, 0.0):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *size, **kwargs: torch.full(size, value))
            out.append(data.Augment(**{**NONE, **settings})(x))
    return out


def picture_batch(count=4, side=32):
    images = np.stack([smooth_picture(side, side, seed) for seed in range(count)])
    return torch.from_numpy(images)[:, None].float() / 255


def test_augment_all_zero_is_identity():
    x = torch.rand(4, 1, 16, 16)
    assert torch.equal(data.Augment(**NONE)(x), x)


def test_augment_flip():
    x = torch.rand(200, 1, 8, 8)
    assert torch.allclose(data.Augment(**{**NONE, "hflip": 1.0})(x), x.flip(-1), atol=1e-5)
    torch.manual_seed(0)
    y = data.Augment(**{**NONE, "hflip": 0.25})(x)
    flipped = (y - x.flip(-1)).abs().amax((1, 2, 3)) < 1e-5
    kept = (y - x).abs().amax((1, 2, 3)) < 1e-5
    assert (flipped ^ kept).all() and 25 <= flipped.sum() <= 77  # 50 expected, standard deviation 6


def test_augment_translation(monkeypatch):
    """A quarter of 32 px is 8 px, on both axes, with black coming in."""
    x = torch.rand(2, 1, 32, 32)
    a, b = torch.zeros_like(x), torch.zeros_like(x)
    a[..., :-8, :-8] = x[..., 8:, 8:]
    b[..., 8:, 8:] = x[..., :-8, :-8]
    found = extremes(monkeypatch, x, translate=0.25)
    if not torch.allclose(found[0], a, atol=1e-4):
        found.reverse()
    assert torch.allclose(found[0], a, atol=1e-4) and torch.allclose(found[1], b, atol=1e-4)


def test_augment_rotation_by_90_degrees(monkeypatch):
    x = torch.rand(2, 1, 9, 9)
    found = extremes(monkeypatch, x, rotate=90)
    left, right = (torch.rot90(x, k, (2, 3)) for k in (1, -1))
    if not torch.allclose(found[0], left, atol=1e-4):
        found.reverse()
    assert torch.allclose(found[0], left, atol=1e-4) and torch.allclose(found[1], right, atol=1e-4)


@pytest.mark.parametrize(
    "settings, affine",
    [
        (dict(rotate=20), (dict(angle=20, scale=1), dict(angle=-20, scale=1))),
        (dict(scale=0.25), (dict(angle=0, scale=1.25), dict(angle=0, scale=0.75))),
    ],
)
def test_augment_geometry_against_torchvision(monkeypatch, settings, affine):
    x = picture_batch()
    found = extremes(monkeypatch, x, **settings)
    expected = [
        TF.affine(x, translate=[0, 0], shear=[0.0], interpolation=TF.InterpolationMode.BILINEAR, **a)
        for a in affine
    ]
    if (found[0] - expected[0]).abs().mean() > (found[0] - expected[1]).abs().mean():
        found.reverse()
    inside = (
        slice(None),
        slice(None),
        slice(7, 25),
        slice(7, 25),
    )  # clear of the border, where padding differs
    for a, b in zip(found, expected):
        assert torch.allclose(a[inside], b[inside], atol=1e-3)
        assert (a - x).abs().mean() > 0.01


def test_augment_rotation_keeps_lengths():
    """No shear: a disc stays a disc at any angle."""
    y, x = np.mgrid[-15.5:16, -15.5:16]
    disc = torch.from_numpy((1 / (1 + np.exp(2 * (np.hypot(x, y) - 10)))).astype(np.float32))[None, None]
    turned = data.Augment(**{**NONE, "rotate": 180})(disc.expand(20, 1, 32, 32))
    assert (turned - disc).abs().max() < 0.1


def test_augment_brightness_and_contrast():
    torch.manual_seed(0)
    grey = torch.full((4000, 1, 4, 4), 0.5)
    added = data.Augment(**{**NONE, "brightness": 0.1})(grey)
    assert (added.amax((1, 2, 3)) == added.amin((1, 2, 3))).all()
    change = (added - grey)[:, 0, 0, 0]
    assert change.abs().max() <= 0.1 + 1e-6 and change.max() > 0.099 and change.min() < -0.099
    assert abs(change.mean().item()) < 4 * 0.1 / math.sqrt(3 * 4000)  # uniform: variance bound^2 / 3
    steps = torch.tensor([0.4, 0.6]).repeat(4000, 1, 4, 2)
    stretched = data.Augment(**{**NONE, "contrast": 0.2})(steps)
    assert torch.allclose(stretched.mean((1, 2, 3)), torch.tensor(0.5), atol=1e-6)
    factor = (stretched[:, 0, 0, 1] - stretched[:, 0, 0, 0]) / 0.2
    assert (
        factor.min() >= 0.8 - 1e-5
        and factor.max() <= 1.2 + 1e-5
        and factor.min() < 0.803
        and factor.max() > 1.197
    )
    bright = data.Augment(**{**NONE, "brightness": 1.0})(torch.rand(50, 1, 4, 4))
    assert bright.min() >= 0 and bright.max() <= 1


def test_augment_each_image_by_itself():
    """An image's result depends on no other image of the batch, and equal images get different changes."""
    x = picture_batch(6)
    other = x.clone()
    other[1:] = torch.rand(5, 1, 32, 32)
    results = []
    for batch in (x, other):
        torch.manual_seed(0)
        results.append(data.Augment(hflip=0.5)(batch)[0])
    assert torch.allclose(*results, atol=1e-6)
    same = data.Augment()(x[:1].expand(6, 1, 32, 32))
    assert all((same[i] - same[j]).abs().max() > 0.01 for i, j in itertools.combinations(range(6), 2))


def folder_bytes(root):
    return {
        p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()
    }


def test_synthetic_set(tmp_path, synthetic):
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    data.make_synthetic(a, train=16, test=8)
    data.make_synthetic(b, train=16, test=8)
    data.make_synthetic(c, train=16, test=8, seed=1)
    assert folder_bytes(a) == folder_bytes(b)
    assert (
        folder_bytes(a)["train/NORMAL/IM-0001-0001.jpeg"] != folder_bytes(c)["train/NORMAL/IM-0001-0001.jpeg"]
    )
    stamp = os.stat(a / "SYNTHETIC").st_mtime_ns
    data.make_synthetic(a, train=16, test=8)
    assert os.stat(a / "SYNTHETIC").st_mtime_ns == stamp  # kept, not drawn again
    data.make_synthetic(a, train=24, test=8)
    assert len(data.list_images(a, "train")[0]) == 24  # another size: drawn again
    files, labels = data.list_images(synthetic, "train")
    assert np.bincount(labels).tolist() == [36, 60]  # three in eight are NORMAL
    assert np.bincount(data.list_images(synthetic, "test")[1]).tolist() == [15, 25]
    assert all(
        re.match(r"(person\d+_(bacteria|virus)_\d+|IM-\d{4}-\d{4})\.jpeg$", Path(f).name) for f in files
    )
    assert len({data.patient_id(f) for f in files}) < 96  # some patients have several images
    train, test = (
        np.stack([data.decode(synthetic / f, 32) for f in data.list_images(synthetic, s)[0]])
        for s in ("train", "test")
    )
    assert test.mean() < train.mean() - 5 and test.std(axis=(1, 2)).mean() < train.std(axis=(1, 2)).mean()
    assert data.is_synthetic(synthetic) and not data.is_synthetic(tmp_path)


def test_synthetic_never_replaces_a_foreign_folder(tmp_path):
    touch(tmp_path, "real/train/NORMAL/a.jpeg")
    with pytest.raises(InputError, match="was not drawn"):
        data.make_synthetic(tmp_path / "real", train=8, test=8)
    assert list(folder_bytes(tmp_path)) == ["real/train/NORMAL/a.jpeg"]


def test_download_explains_the_steps_by_hand(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # as if not installed
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError) as error:
        data.download(tmp_path / "chest")
    for word in ("kagglehub", "kaggle.com/datasets/paultimothymooney", str(tmp_path / "chest"), "unzip"):
        assert word in str(error.value)
    touch(tmp_path, "chest/train/NORMAL/a.jpeg")
    assert data.download(tmp_path / "chest") is None  # already there: nothing to do


# ================================================================ metrics


def brute_force_threshold(y, p, min_recall):
    """Every distinct score as threshold, in exact fractions: (precision, recall, threshold), the largest wins."""
    candidates = []
    for threshold in set(p):
        called = [a >= threshold for a in p]
        tp = sum(c and t for c, t in zip(called, y))
        recall, precision = Fraction(tp, sum(y)), Fraction(tp, sum(called))
        if float(recall) >= min_recall:
            candidates.append((precision, recall, threshold))
    precision, recall, threshold = max(candidates)
    return threshold, float(recall), float(precision)


@given(
    pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=2, max_size=24),
    min_recall=st.sampled_from([0.01, 0.2, 1 / 3, 0.5, 2 / 3, 0.75, 0.9, 0.95, 1.0]),
)
@settings(max_examples=400)
def test_threshold_against_brute_force(pairs, min_recall):
    y, p = [a for a, _ in pairs], [b / 8 for _, b in pairs]
    assume(0 < sum(y) < len(y))
    assert metrics.choose_threshold_by_min_recall(y, p, min_recall) == brute_force_threshold(y, p, min_recall)


def test_threshold_on_continuous_scores_against_brute_force():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    p = (0.3 * y + rng.normal(0.4, 0.15, 300)).clip(0, 1)
    for min_recall in (0.5, 0.9, 0.95, 0.99, 1.0):
        expected = brute_force_threshold(y.tolist(), p.tolist(), min_recall)
        assert metrics.choose_threshold_by_min_recall(y, p, min_recall) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "y, p, target, expected",
    [
        ([1, 1, 0, 0], [0.9, 0.8, 0.2, 0.1], 0.95, (0.8, 1.0, 1.0)),  # separable
        ([1, 1, 0, 0], [0.9, 0.8, 0.2, 0.1], 0.5, (0.8, 1.0, 1.0)),  # equal precision: higher recall
        ([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.6], 0.5, (0.9, 0.5, 1.0)),
        ([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.6], 0.51, (0.7, 1.0, 2 / 3)),
        ([1, 0], [0.5, 0.5], 1.0, (0.5, 1.0, 0.5)),  # a tie cannot be cut
        ([1, 0, 0, 1], [0.0, 0.0, 1.0, 1.0], 0.5, (0.0, 1.0, 0.5)),  # precision 1/2 both times: higher recall
        ([1] * 19 + [1, 0], [0.9] * 19 + [0.1, 0.2], 0.95, (0.9, 0.95, 1.0)),
    ],
)  # 19/20 counts as 0.95
def test_threshold_by_hand(y, p, target, expected):
    assert metrics.choose_threshold_by_min_recall(y, p, target) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=2, max_size=30), st.integers(-1, 7))
def test_summary_against_scikit_learn(pairs, cut):
    y, p = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs]) / 6
    assume(0 < y.sum() < len(y))
    thr = cut / 6
    found = metrics.summarize_at_threshold(y, p, thr)
    called = (p >= thr).astype(int)
    tn, fp, fn, tp = sklearn.metrics.confusion_matrix(y, called, labels=[0, 1]).ravel()
    assert (found["tn"], found["fp"], found["fn"], found["tp"]) == (tn, fp, fn, tp)
    pairs_won = [(a > b) + 0.5 * (a == b) for a in p[y == 1] for b in p[y == 0]]  # AUROC by counting pairs
    assert found == pytest.approx(
        {
            "acc": sklearn.metrics.accuracy_score(y, called),
            "thr": thr,
            "precision": sklearn.metrics.precision_score(y, called, zero_division=0),
            "recall": sklearn.metrics.recall_score(y, called),
            "specificity": sklearn.metrics.recall_score(y, called, pos_label=0),
            "f1": sklearn.metrics.f1_score(y, called, zero_division=0),
            "auroc": np.mean(pairs_won),
            "auprc": sklearn.metrics.average_precision_score(y, p),
            "tn": tn,
            "fp": fp,
            "fn": fn,
            "tp": tp,
        },
        abs=1e-12,
    )
    assert json.loads(json.dumps(found)) == found  # plain Python values


@pytest.mark.parametrize(
    "y, p, target, word",
    [
        ([0, 0], [0.1, 0.2], 0.9, "no positives"),
        ([1, 1], [0.1, 0.2], 0.9, "no negatives"),
        ([0, 1], [0.1, math.nan], 0.9, "NaN"),
        ([0, 1], [0.1, 1.1], 0.9, "lie in"),
        ([0, 1], [-0.1, 1], 0.9, "lie in"),
        ([0, 1], [0.1, math.inf], 0.9, "lie in"),
        ([0, 1, 1], [0.1, 0.2], 0.9, "3 labels but 2"),
        ([], [], 0.9, "no labels"),
        ([0, 2], [0.1, 0.2], 0.9, "labels must be"),
        ([[0, 1]], [[0.1, 0.2]], 0.9, "1-D"),
        ([0, 1], [0.1, 0.2], 0.0, "min_recall"),
        ([0, 1], [0.1, 0.2], 1.01, "min_recall"),
        ([0, 1], [0.1, 0.2], -0.5, "min_recall"),
        ([0, 1], [0.1, 0.2], math.nan, "min_recall"),
    ],
)
def test_metric_errors(y, p, target, word):
    with pytest.raises(ValueError, match=word):
        metrics.choose_threshold_by_min_recall(y, p, target)
    if word != "min_recall":
        with pytest.raises(ValueError, match=word):
            metrics.summarize_at_threshold(y, p, 0.5)


def test_threshold_is_fast():
    """O(N log N): a hundred thousand scores, where a quadratic search would take minutes."""
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, 100_000), rng.uniform(size=100_000)
    started = time.perf_counter()
    thr, recall, precision = metrics.choose_threshold_by_min_recall(y, p)
    assert time.perf_counter() - started < 5
    assert recall == ((p >= thr) & (y == 1)).sum() / y.sum() >= 0.95


# ================================================================ engine: pure functions


def test_learning_rate_by_hand():
    def rate(step, schedule="cosine"):
        return engine.learning_rate(step, total=110, warmup=10, peak=2.0, schedule=schedule)

    assert [rate(0), rate(4), rate(9), rate(10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert rate(60) == pytest.approx(1.0)  # half-way down
    assert rate(35) == pytest.approx(1 + math.sqrt(0.5))  # a quarter of the way: cos 45 degrees
    assert rate(110) == pytest.approx(0, abs=1e-12) and 0 < rate(109) < 0.001
    assert [rate(s, "constant") for s in (4, 9, 10, 109)] == pytest.approx([1, 2, 2, 2])
    assert engine.learning_rate(0, total=10, warmup=0, peak=2.0) == 2.0


@pytest.mark.parametrize("warmup", [0.001, 0.5, 1, 1.31, 2.5, 13.1])
def test_learning_rate_never_exceeds_the_peak(warmup):
    """--warmup-epochs is a float, so the warm-up need not be a whole number of steps."""
    for schedule in ("cosine", "constant"):
        rates = [engine.learning_rate(s, 100, warmup, 1.0, schedule) for s in range(100)]
        assert max(rates) <= 1 + 1e-9 and min(rates) > 0
        peak = rates.index(max(rates))
        assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_parameter_groups():
    model = small_vit()
    decay, plain = engine.parameter_groups(model, 0.05)
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


def test_class_weights():
    labels = np.array([0] * 1 + [1] * 3)
    assert engine.class_weights(labels, 2).tolist() == pytest.approx([2, 2 / 3])
    labels = np.random.default_rng(0).choice(5, 200, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    expected = compute_class_weight("balanced", classes=np.arange(5), y=labels)
    assert engine.class_weights(labels, 5).tolist() == pytest.approx(expected.tolist())
    assert engine.class_weights(labels, 5)[labels].mean().item() == pytest.approx(1)
    assert torch.isfinite(engine.class_weights(np.array([0, 0]), 2)).all()


def test_cross_entropy_by_hand():
    """Smoothing 0.1 over two classes: targets 0.95 and 0.05; weights as scikit-learn's sample weights."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    log = np.log(scipy.special.softmax(logits.numpy().astype(float), axis=1))
    found = engine.cross_entropy(None, 0.1)(logits, torch.tensor([0, 1])).item()
    expected = -np.mean([0.95 * log[0, 0] + 0.05 * log[0, 1], 0.95 * log[1, 1] + 0.05 * log[1, 0]])
    assert found == pytest.approx(expected, rel=1e-6)
    found = engine.cross_entropy(torch.tensor([2.0, 0.5]), 0.0)(logits, torch.tensor([0, 1])).item()
    assert found == pytest.approx(
        sklearn.metrics.log_loss([0, 1], np.exp(log), sample_weight=[2, 0.5]), rel=1e-6
    )


def test_probabilities_do_not_saturate():
    """In float32 softmax of a gap of 20 and of 30 are both 1: a tie that is none."""
    logits = torch.tensor([[-10.0, 10.0], [-15.0, 15.0], [3.0, 1.0]])
    p = engine.probabilities(logits)
    assert p.dtype == np.float64 and p[0, 1] < p[1, 1] < 1
    assert p[2, 1] == pytest.approx(1 / (1 + math.exp(2)), rel=1e-12)
    assert np.allclose(p.sum(1), 1, atol=1e-15)
    assert engine.binary_auroc([0, 1, 0], logits) == 1.0 and engine.binary_auroc([1, 0, 0], logits) == 0.5


def test_scale_input():
    x = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)
    assert engine.scale_input(x, (0.5,) * 3, (0.5,) * 3)[:, :, 0, 0].tolist() == [[-1] * 3, [0] * 3, [1] * 3]
    found = engine.scale_input(x, (0.1, 0.2), (0.5, 0.25))
    assert found[2, :, 0, 0].tolist() == pytest.approx([1.8, 3.2])


def toy_subset(count, seed, side=16):
    """Noise images; those of class 1 are brighter."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = (rng.uniform(0, 180, (count, side, side)) + 25 * labels[:, None, None]).astype(np.uint8)
    return data.Subset([f"{i}.png" for i in range(count)], labels, images, np.arange(count))


def test_predict_keeps_order_and_mode():
    model = randomise(small_vit(in_chans=1, drop_rate=0.5, drop_path_rate=0.5)).train()
    subset = toy_subset(11, 0)
    kwargs = dict(mean=(0.5,), std=(0.5,), device=CPU, amp=False)
    logits = engine.predict(model, subset, batch_size=4, **kwargs)
    assert model.training and logits.dtype == torch.float32 and not logits.requires_grad
    model.eval()
    with torch.no_grad():
        expected = torch.cat(
            [model(torch.from_numpy(i)[None, None].float() / 255 * 2 - 1) for i in subset.images]
        )
    assert torch.allclose(logits, expected, atol=1e-5) and logits.std() > 0.1
    order = np.array([7, 2, 10])
    assert torch.allclose(engine.predict(model, subset.take(order), **kwargs), expected[order], atol=1e-5)


def test_stop_requests():
    """The first signal is only noted, the second acts at once; the old handlers come back."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(common.Interrupted) as stop, engine.stop_requests() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    assert stop.value.signum == signal.SIGINT
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_pick_device():
    assert engine.pick_device("cpu") == CPU
    assert engine.pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(InputError, match="--device"):
        engine.pick_device("abacus")


# ================================================================ engine: fit


def toy_fit(
    out,
    *,
    epochs=3,
    resume=False,
    loss_fn=None,
    monitor=engine.binary_auroc,
    patience=9,
    lr=1e-3,
    max_steps=None,
    augment=data.Augment(hflip=0.5),
    capture=None,
    **more,
):
    """`engine.fit` of a small ViT with dropout, DropPath and augmentation: 5 steps an epoch, a fraction of a second."""
    torch.manual_seed(1)
    model = small_vit(in_chans=1, drop_rate=0.1, drop_path_rate=0.1)
    if capture is not None:
        capture.append(model)
    meta = {
        "model": "toy",
        "model_config": {"kind": "vit", **model.config},
        "recipe": {"lr": lr, "amp": False},
        "data": {"data_dir": "toy", "cache_dir": "anywhere"},
        "split": {
            "synthetic": True,
            "fingerprint": "f",
            "train": 1,
            "val": 1,
            "test": 1,
            "counts": {},
            "set": "toy",
        },
        "seed": 0,
        "mean": [0.5],
        "std": [0.5],
    }
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return engine.fit(
            model,
            toy_subset(40, 0),
            toy_subset(20, 1),
            out=out,
            meta=meta,
            loss_fn=loss_fn or engine.cross_entropy(None, 0.05),
            monitor=monitor,
            mean=(0.5,),
            std=(0.5,),
            augment=augment,
            device=CPU,
            amp=False,
            epochs=epochs,
            batch_size=8,
            lr=lr,
            weight_decay=0.05,
            schedule="cosine",
            warmup_epochs=1.0,
            clip=1.0,
            patience=patience,
            seed=0,
            max_steps=max_steps,
            resume=resume,
            **more,
        )


@pytest.fixture(scope="module")
def toy_reference(tmp_path_factory):
    """The uninterrupted toy run: (results, checkpoint)."""
    out = tmp_path_factory.mktemp("toy")
    results = toy_fit(out)
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
        [engine.learning_rate(s, 15, 5, 1e-3) for s in (4, 9, 14)]
    )


def test_val_loss_and_auroc_of_the_history(tmp_path):
    """The history's figures recomputed from the kept weights."""
    results = toy_fit(tmp_path, epochs=2)
    model, read = engine.load_run(tmp_path)
    assert not model.training and read == json.loads(json.dumps(results))
    val = toy_subset(20, 1)
    with torch.no_grad():
        logits = model(torch.from_numpy(val.images)[:, None].float() / 255 * 2 - 1)
    row = results["history"][results["best_epoch"] - 1]
    p = scipy.special.softmax(logits.double().numpy(), axis=1)[:, 1]
    assert row["val_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(val.labels, p), abs=1e-9)
    targets = np.where(val.labels == 1, 0.975, 0.025)  # smoothing 0.05
    assert row["val_loss"] == pytest.approx(
        -np.mean(targets * np.log(p) + (1 - targets) * np.log(1 - p)), rel=1e-5
    )


def test_one_step_is_adamw_with_clipping(tmp_path):
    """A single step against torch's plain AdamW on the same batch, the gradient clipped to norm 1 beforehand."""
    captured, losses = [], []
    plain = engine.cross_entropy(None, 0.0)
    torch.manual_seed(1)
    expected = small_vit(in_chans=1)

    def loss_fn(logits, y):
        losses.append(plain(logits, y) * 50)  # a large gradient, so that clipping matters
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "small_vit", lambda **kw: expected)  # no dropout: comparable
        start = {n: p.clone() for n, p in expected.state_dict().items()}
        toy_fit(
            tmp_path, epochs=1, max_steps=1, augment=data.Augment(**NONE), loss_fn=loss_fn, capture=captured
        )
    after = captured[0].state_dict()
    model = vit.VisionTransformer(**expected.config)
    model.load_state_dict(start)
    train = toy_subset(40, 0)
    index = np.random.default_rng([0, 0]).permutation(40)[:8]
    x = torch.from_numpy(train.images[index])[:, None].float() / 255 * 2 - 1
    (plain(model(x), torch.from_numpy(train.labels[index])) * 50).backward()
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
def test_stop_at_every_step_and_resume(tmp_path, toy_reference, signum):
    """A signal in each of the 15 steps and the 2 validations before the last: the end is the uninterrupted one."""
    plain = engine.cross_entropy(None, 0.05)
    stopped = []
    for at in range(1, 18, 1 if signum == signal.SIGINT else 5):
        calls = itertools.count(1)

        def loss_fn(logits, y):
            if next(calls) == at:
                os.kill(os.getpid(), signum)
            return plain(logits, y)

        out = tmp_path / str(at)
        with pytest.raises(common.Interrupted) as stop:
            toy_fit(out, loss_fn=loss_fn)
        assert stop.value.signum == signum and "--resume" in str(stop.value)
        state = load_pth(out, "last.pth")["state"]
        stopped.append((state["epoch"], state["step"]))
        assert read_json(out, "results.json")["finished"] is False
        agrees(out, toy_fit(out, resume=True), toy_reference)
        shutil.rmtree(out)
    if signum == signal.SIGINT:  # after its step; during a validation: after the first step of the next epoch
        assert stopped == [(e, s) for e in range(3) for s in (1, 1, 2, 3, 4, 5)[e == 0 :]]


def test_death_at_every_write_and_resume(tmp_path, toy_reference, monkeypatch):
    """The process dies just before or just after each rename: what lies there is complete, and goes on to the end."""

    class Died(BaseException):
        pass

    real, deaths = os.replace, 0
    for at, done in itertools.product(range(1, 40), (False, True)):
        out, calls = tmp_path / f"{at}{done}", itertools.count(1)

        def replace(a, b):
            now = next(calls)
            if now == at and not done:
                raise Died
            real(a, b)
            if now == at:
                raise Died

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                toy_fit(out)
                break  # fewer writes than that: every one has been tried
            except Died:
                deaths += 1
        for path in out.glob("*.pth"):
            load_pth(path)
        agrees(out, toy_fit(out, resume=(out / "last.pth").exists()), toy_reference)
    assert deaths >= 2 * (2 * 3 + 2)  # at least last.pth and results.json an epoch, a checkpoint, and the end


def test_resume_of_a_finished_run_changes_nothing(tmp_path, toy_reference):
    first = toy_fit(tmp_path)
    again = toy_fit(tmp_path, resume=True)
    agrees(tmp_path, again, toy_reference)
    assert again["minutes"] == pytest.approx(first["minutes"])


def test_resume_refuses_other_settings(tmp_path):
    toy_fit(tmp_path, epochs=1)
    with pytest.raises(InputError, match="recipe.lr"):
        toy_fit(tmp_path, epochs=2, lr=2e-3, resume=True)


def test_best_epoch_and_patience(tmp_path):
    """The first of equal maxima is kept; three epochs without a better one end the run."""
    script, states, models = [0.6, 0.8, 0.7, 0.8, 0.75, 0.99], [], []

    def monitor(labels, logits):
        states.append({n: p.clone() for n, p in models[0].state_dict().items()})
        return script[len(states) - 1]

    results = toy_fit(tmp_path, epochs=6, monitor=monitor, patience=3, capture=models)
    assert [h["val_auroc"] for h in results["history"]] == script[:5]
    assert results["best_epoch"] == 2 and results["finished"]
    kept = load_pth(tmp_path, "checkpoint.pth")
    assert same_tensors(kept, states[1]) and not same_tensors(kept, states[3])


def test_every_image_once_an_epoch_in_a_new_order(tmp_path, monkeypatch):
    seen, real = [], data.Batches.get

    def get(self, index):
        if len(self.subset) == 40:  # training
            seen.extend(index.tolist())
        return real(self, index)

    monkeypatch.setattr(data.Batches, "get", get)
    toy_fit(tmp_path)
    epochs = [seen[i : i + 40] for i in (0, 40, 80)]
    assert len(seen) == 120 and all(sorted(order) == list(range(40)) for order in epochs)
    assert len({tuple(order) for order in [*epochs, range(40)]}) == 4


def test_max_steps(tmp_path):
    calls = []
    plain = engine.cross_entropy(None, 0.05)

    def loss_fn(logits, y):
        calls.append(len(y))
        return plain(logits, y)

    results = toy_fit(tmp_path, loss_fn=loss_fn, max_steps=7)
    assert calls == [8] * 5 + [20] + [8] * 2 + [20]  # an epoch of 5, validation, 2 steps, validation
    assert len(results["history"]) == 2 and results["finished"]


def test_non_finite_loss_names_epoch_step_and_rate(tmp_path):
    plain, calls = engine.cross_entropy(None, 0.05), itertools.count(1)

    def loss_fn(logits, y):
        return plain(logits, y) * (
            math.nan if next(calls) == 9 else 1
        )  # 5 steps, a validation, then the third step

    with pytest.raises(InputError) as error:
        toy_fit(tmp_path, loss_fn=loss_fn)
    rate = engine.learning_rate(7, 15, 5, 1e-3)
    for word in ("epoch 2", "step 3", f"{rate:.2e}", "nan"):
        assert word in str(error.value)
    assert len(read_json(tmp_path, "results.json")["history"]) == 1
    assert load_pth(tmp_path, "last.pth")["state"]["epoch"] == 1


def test_non_finite_weights_after_the_last_step_of_an_epoch(tmp_path):
    """The loss was finite, the step was not: validation sees it first and says so too."""
    with pytest.raises(InputError, match="epoch 1"):
        toy_fit(tmp_path, max_steps=1, lr=1e38)


# ================================================================ engine: files of a run

RESULT_KEYS = {
    "model",
    "params",
    "minutes",
    "synthetic",
    "split",
    "history",
    "best_epoch",
    "seed",
    "command",
    "versions",
    "device",
    "format",
}


@pytest.mark.parametrize(
    "name, params, epochs",
    [
        # 32 px: 5 positions in the place of 197, each 256 wide
        ("scratch", 4_987_138 - 192 * 256, 2),
        ("linear", 32 * 32 + 1, 1),
        # embedding, [CLS], 5 positions, 2 blocks (norms, qkv, proj, fc1, fc2), norm, head
        (
            "pretrained",
            24 * 769 + 24 + 5 * 24 + 2 * (4 * 24 + 72 * 25 + 24 * 25 + 96 * 25 + 24 * 97) + 48 + 50,
            2,
        ),
    ],
)
def test_results_json(runs, synthetic, name, params, epochs):
    results = read_json(runs.out, name, "results.json")
    assert RESULT_KEYS <= results.keys()
    assert results["params"] == params and len(results["history"]) == epochs and results["synthetic"] is True
    for row in results["history"]:
        assert {"train_loss", "val_loss", "val_auroc", "lr", "seconds"} <= row.keys()
        assert 0 <= row["val_auroc"] <= 1 and row["seconds"] > 0 and math.isfinite(row["val_loss"])
    aurocs = [row["val_auroc"] for row in results["history"]]
    assert results["best_epoch"] == 1 + aurocs.index(max(aurocs))
    split = results["split"]
    assert (split["train"], split["val"], split["test"]) == (76, 20, 40)
    assert split["shared_patients"] == 0 and re.fullmatch("[0-9a-f]{64}", split["fingerprint"])
    assert (
        results["command"].startswith(f"python train_{name}.py --data-dir ")
        and "torch" in results["versions"]
    )
    assert results["minutes"] * 60 == pytest.approx(sum(row["seconds"] for row in results["history"]))
    assert results["finished"] is True and results["format"] == 1
    assert results["data"]["data_dir"] == str(synthetic)


def test_checkpoint_holds_tensors_only(runs):
    for name in ("scratch", "pretrained", "linear"):
        state = load_pth(runs.out, name, "checkpoint.pth")
        assert all(isinstance(v, torch.Tensor) for v in state.values())
        model, results = engine.load_run(runs.out / name)
        assert same_tensors(model.state_dict(), state)
    assert results["model"] == "linear"


def test_pretrained_run_starts_from_the_weights(runs, tiny_npz):
    """Fine-tuned for a dozen steps, the weights are still near those of the file; the report is in the JSON."""
    with np.load(tiny_npz) as w:
        kernel = w["embedding/kernel"].transpose(3, 2, 0, 1)
    found = load_pth(runs.out, "pretrained", "checkpoint.pth")["patch_embed.proj.weight"].numpy()
    assert 0 < np.abs(found - kernel).max() < 0.01
    results = read_json(runs.out, "pretrained", "results.json")
    assert results["weights"]["path"] == str(tiny_npz) and results["mean"] == [0.5] * 3
    assert sorted(results["weights"]["reset"]) == ["head.bias", "head.weight"]


def test_finished_run_is_not_overwritten(own_runs, flags, tiny_npz):
    """Exit 2 before any work; with --overwrite nothing of the old run stays."""
    before = folder_bytes(own_runs / "outputs")
    for name, more in (("scratch", ["--epochs", 1]), ("linear", []), ("pretrained", ["--weights", tiny_npz])):
        refused(cli(f"train_{name}", *flags, *more, cwd=own_runs), "finished run", "--overwrite", "--out")
    assert folder_bytes(own_runs / "outputs") == before
    succeed("train_pretrained", *flags, "--weights", tiny_npz, "--epochs", 1, "--overwrite", cwd=own_runs)
    out = own_runs / "outputs" / "pretrained"
    assert len(read_json(out, "results.json")["history"]) == 1
    assert not (out / "calibration.json").exists() and not (out / "scores.npz").exists()


def test_linear_overwrite_leaves_no_stale_calibration(own_runs, flags):
    """Figures of the old model beside a new one would go into the table unnoticed."""
    out = own_runs / "outputs" / "linear"
    succeed("train_linear", *flags, "--C", 1.0, "--overwrite", cwd=own_runs)
    assert not (out / "calibration.json").exists()
    refused(cli("compare", "--run", out, cwd=own_runs), "not calibrated")


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_with_code_is_refused(own_runs, zipped):
    out = own_runs / "outputs" / "scratch"
    evil = {"head.weight": Evil(own_runs / "executed")}
    (out / "checkpoint.pth").unlink()
    if zipped:
        torch.save(evil, out / "checkpoint.pth")
    else:
        (out / "checkpoint.pth").write_bytes(pickle.dumps(evil))
    refused(cli("calibrate", "--run", out, cwd=own_runs), "checkpoint.pth", "refused")
    assert not (own_runs / "executed").exists()


def test_last_and_weights_with_code_are_refused(own_runs, flags):
    out = own_runs / "outputs" / "scratch"
    torch.save({"format": 1, "model": Evil(own_runs / "executed")}, out / "last.pth")
    done = cli(
        "train_scratch", *flags, "--epochs", 2, "--batch-size", 16, "--no-amp", "--resume", cwd=own_runs
    )
    refused(done, "last.pth", "refused")
    refused(
        cli("train_pretrained", *flags, "--weights", out / "last.pth", "--out", "x", cwd=own_runs), "refused"
    )
    assert not (own_runs / "executed").exists()


@pytest.mark.parametrize(
    "damage, words",
    [
        ("checkpoint cut", ["checkpoint.pth", "damaged"]),
        ("checkpoint absent", ["checkpoint.pth", "does not exist"]),
        ("checkpoint of another model", ["checkpoint.pth", "does not fit"]),
        ("results cut", ["results.json"]),
        ("results of a newer format", ["results.json", "update"]),
        ("results without split", ["split"]),
        ("results not an object", ["results.json", "list"]),
        ("results of an unknown model", ["does not describe a model"]),
        ("results with strange data", ["data settings"]),
    ],
)
def test_damaged_run(own_runs, damage, words):
    out = own_runs / "outputs" / "scratch"
    results, checkpoint = out / "results.json", out / "checkpoint.pth"
    value = read_json(results)
    if damage == "checkpoint cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:100_000])
    elif damage == "checkpoint absent":
        checkpoint.unlink()
    elif damage == "checkpoint of another model":
        shutil.copy(own_runs / "outputs" / "pretrained" / "checkpoint.pth", checkpoint)
    elif damage == "results cut":
        results.write_text(results.read_text()[:200])
    elif damage == "results of a newer format":
        results.write_text(json.dumps({**value, "format": 99}))
    elif damage == "results without split":
        results.write_text(json.dumps({k: v for k, v in value.items() if k != "split"}))
    elif damage == "results not an object":
        results.write_text("[1, 2]")
    elif damage == "results of an unknown model":
        results.write_text(json.dumps({**value, "model_config": {"kind": "vit", "wings": 2}}))
    elif damage == "results with strange data":
        results.write_text(json.dumps({**value, "data": {"folder": "x"}}))
    refused(cli("calibrate", "--run", out, cwd=own_runs), *words)


# ================================================================ command lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_docstring(script, tmp_path):
    done = cli(script, "--help", cwd=tmp_path)
    assert done.code == 0 and done.err == ""
    doc = importlib.import_module(script).__doc__
    assert doc.strip() in done.out and f"python {script}.py" in doc
    assert "default:" in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "script, argv, word",
    [
        ("train_scratch", ["--epochs", "0"], "--epochs"),
        ("train_scratch", ["--batch-size", "0"], "--batch-size"),
        ("train_scratch", ["--lr", "nan"], "--lr"),
        ("train_scratch", ["--lr", "-1"], "--lr"),
        ("train_scratch", ["--clip", "0"], "--clip"),
        ("train_scratch", ["--weight-decay", "-1"], "--weight-decay"),
        ("train_scratch", ["--warmup-epochs", "-1"], "--warmup-epochs"),
        ("train_scratch", ["--patience", "0"], "--patience"),
        ("train_scratch", ["--label-smoothing", "1"], "--label-smoothing"),
        ("train_scratch", ["--rotate", "999"], "--rotate"),
        ("train_scratch", ["--scale", "1"], "--scale"),
        ("train_scratch", ["--hflip", "-0.1"], "--hflip"),
        ("train_scratch", ["--max-steps", "0"], "--max-steps"),
        ("train_scratch", ["--device", "abacus"], "abacus"),
        ("train_scratch", ["--img-size", "33"], "33"),
        ("train_scratch", ["--img-size", "0"], "--img-size"),
        ("train_scratch", ["--resume"], "last.pth"),
        ("train_scratch", ["--seed", "-1"], "seed"),
        ("train_scratch", ["--split-seed", "-1"], "-1"),
        ("train_linear", ["--C", "0"], "--C"),
        ("train_linear", ["--img-size", "48"], "multiple of 32"),
        ("train_pretrained", ["--drop-path", "1"], "--drop-path"),
        ("train_pretrained", ["--weights", "w.npz"], "curl"),
    ],
)
def test_bad_flags(script, argv, word, flags, tiny_npz, tmp_path):
    more = ["--weights", tiny_npz] if script == "train_pretrained" and "--weights" not in argv else []
    refused(cli(script, *flags, *more, *argv, cwd=tmp_path), word)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_flag_is_a_usage_error(script, tmp_path):
    done = cli(script, "--no-such-flag", cwd=tmp_path)
    assert done.code == 2 and "--no-such-flag" in done.err


@pytest.mark.parametrize("script", ["train_scratch", "train_linear"])
def test_no_data(script, tmp_path):
    refused(cli(script, cwd=tmp_path), "--data-dir", "--download", "--demo", "Data/chest_xray")
    refused(cli(script, "--data-dir", "nowhere", cwd=tmp_path), "nowhere", "--demo")


def copy_set(synthetic, tmp_path):
    return Path(shutil.copytree(synthetic, tmp_path / "set"))


def test_bad_images_and_folders(synthetic, tmp_path):
    root = copy_set(synthetic, tmp_path)
    argv = ["--data-dir", root, "--img-size", 32]
    cut = next((root / "train" / "NORMAL").iterdir())
    cut.write_bytes(cut.read_bytes()[:2000])
    (root / "train" / "PNEUMONIA" / "notes.jpeg").write_text("not an image")
    refused(cli("train_linear", *argv, cwd=tmp_path), cut.name, "notes.jpeg", "--skip-bad", "2 of 97")
    done = succeed("train_linear", *argv, "--skip-bad", cwd=tmp_path)
    assert "left out 2 of 97" in done.err
    split = read_json(tmp_path, "outputs/linear/results.json")["split"]
    assert split["train"] + split["val"] == 95
    succeed("calibrate", cwd=tmp_path)  # the run's own settings: bad images left out there too
    for path in (root / "test" / "NORMAL").iterdir():
        path.unlink()
    refused(cli("train_linear", *argv, "--out", "y", cwd=tmp_path), "test/NORMAL")
    shutil.rmtree(root / "train" / "NORMAL")
    refused(cli("train_linear", *argv, "--out", "y", cwd=tmp_path), "train/NORMAL", "does not exist")


def test_training_never_opens_a_test_image(synthetic, tmp_path, tiny_npz, monkeypatch):
    """With garbage for test images every training script works, and calibrate.py names them."""
    root = copy_set(synthetic, tmp_path)
    for path in (root / "test").rglob("*.jpeg"):
        path.write_bytes(b"garbage")
    opened, real = [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda source, *a, **k: opened.append(str(source)) or real(source, *a, **k)
    )
    argv = ["--data-dir", root, "--img-size", 32]
    succeed("train_linear", *argv, cwd=tmp_path)
    succeed("train_pretrained", *argv, "--weights", tiny_npz, "--max-steps", 2, cwd=tmp_path)
    done = succeed("train_scratch", *argv, "--max-steps", 2, cwd=tmp_path)
    assert ", 40): " in done.out  # counted
    assert len(set(opened)) == 96 and not any("/test/" in name for name in opened)
    refused(cli("calibrate", cwd=tmp_path), "40 of 40", "test/NORMAL/IM-0001-0001.jpeg")
    assert not list((tmp_path / "outputs").rglob("calibration.json"))


def test_demo(tmp_path, monkeypatch):
    """--demo draws the set, appends -demo to the run's folder and says what it is."""
    real = data.make_synthetic
    monkeypatch.setattr(data, "make_synthetic", lambda root: real(root, train=48, test=16))
    done = succeed("train_linear", "--demo", "--img-size", 32, cwd=tmp_path)
    assert "SYNTHETIC" in done.out
    results = read_json(tmp_path, "outputs/linear-demo/results.json")
    assert results["synthetic"] is True and results["data"]["data_dir"] == "Data/synthetic"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Data", "outputs"]
    assert "SYNTHETIC" in succeed("calibrate", cwd=tmp_path).out


def test_image_split_reports_shared_patients(flags, tmp_path):
    done = succeed("train_linear", *flags, "--split", "image", cwd=tmp_path)
    split = read_json(tmp_path, "outputs/linear/results.json")["split"]
    assert split["shared_patients"] > 0 and f"{split['shared_patients']} validation images share" in done.out


@pytest.mark.parametrize("more", [["--warmup-epochs", 0], ["--warmup-epochs", 0, "--batch-size", 100]])
def test_diverging_run(more, flags, tiny_npz, tmp_path):
    """In the middle of an epoch, or after its only step."""
    done = cli(
        "train_pretrained", *flags, "--weights", tiny_npz, "--lr", "1e38", "--no-amp", *more, cwd=tmp_path
    )
    refused(done, "epoch 1", "--lr")
    assert not (tmp_path / "outputs" / "pretrained" / "checkpoint.pth").exists()


# ================================================================ interruption of real processes

LONG = ["--epochs", 4, "--batch-size", 4, "--patience", 9, "--no-amp", "--device", "cpu"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, flags, tiny_npz):
    """The same runs as those interrupted below, left alone: {script: (arguments, run folder)}."""
    cwd, out = tmp_path_factory.mktemp("uninterrupted"), {}
    for script, more in (
        ("train_scratch", []),
        ("train_pretrained", ["--weights", tiny_npz, "--drop-path", 0.2]),
    ):
        argv = [*flags, *LONG, *more, "--out", "run"]
        succeed(script, *argv[:-1], cwd / script, cwd=cwd)
        out[script] = argv, cwd / script
    return out


@pytest.mark.parametrize(
    "script, signum, code",
    [
        ("train_scratch", signal.SIGINT, 130),
        ("train_pretrained", signal.SIGTERM, 143),
        ("train_pretrained", signal.SIGKILL, -9),
    ],
)
def test_interrupted_process_resumes_bit_for_bit(uninterrupted, tmp_path, script, signum, code):
    argv, reference = uninterrupted[script]
    process = popen(REPO / f"{script}.py", *argv, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("epoch 1/4"):
            time.sleep(0.02)  # into the second epoch
            process.send_signal(signum)
            break
    process.communicate(timeout=60)
    err, run = (tmp_path / "stderr.txt").read_text(), tmp_path / "run"
    assert process.returncode == code, err
    assert "Traceback" not in err
    state = load_pth(run, "last.pth")["state"]
    assert 1 <= state["epoch"] < 4 and len(state["history"]) == state["epoch"]
    if signum != signal.SIGKILL:
        assert state["step"] > 0
        command = err.strip().splitlines()[-1].strip()
        assert command == " ".join(["python", f"{script}.py", *map(str, argv), "--resume"])
    refused(cli(script, *argv, cwd=tmp_path), "interrupted run", "--resume")
    succeed(script, *argv, "--resume", cwd=tmp_path)
    assert same_tensors(load_pth(run, "checkpoint.pth"), load_pth(reference, "checkpoint.pth"))
    found, expected = read_json(run, "results.json"), read_json(reference, "results.json")
    assert strip_time(found["history"]) == strip_time(expected["history"]) and len(found["history"]) == 4
    assert found["best_epoch"] == expected["best_epoch"] and found["finished"]


def test_kill_while_the_cache_is_built(synthetic, tmp_path):
    """kill -9 in the middle of decoding leaves no cache that could be trusted; the next run builds it."""
    slow = (
        "import sys, time; sys.path.insert(0, sys.argv.pop(1)); import common, data, train_linear\n"
        "real = data.decode\n"
        "data.decode = lambda *a: (time.sleep(0.3), real(*a))[1]\n"
        "common.start(train_linear.main)"
    )
    argv = ["--data-dir", synthetic, "--img-size", 32]
    process = popen("-c", slow, REPO, *argv, cwd=tmp_path)
    cache, deadline = tmp_path / "Data" / "cache", time.time() + 60
    while not list(cache.glob(".*.npy")) and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.4)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -9
    assert list(cache.glob(".*.npy")) and not list(cache.glob("[!.]*"))  # only the unfinished temporary file
    succeed("train_linear", *argv, cwd=tmp_path)
    [path] = cache.glob("[!.]*-train-*.npy")
    files, _ = data.list_images(synthetic, "train")
    assert np.array_equal(np.load(path), np.stack([data.decode(synthetic / f, 32) for f in files]))


def test_whole_chain_as_processes(flags, tmp_path):
    """Train, calibrate, compare > results.md, from another folder, with real exit codes and streams."""
    for script, argv in (("train_scratch", [*flags, "--epochs", 1]), ("calibrate", []), ("compare", [])):
        process = popen(REPO / f"{script}.py", *argv, cwd=tmp_path)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, (tmp_path / "stderr.txt").read_text()
    assert out.startswith("# ") and "| ViT scratch [SYNTHETIC] @Rec |" in out
    assert (tmp_path / "outputs/figures/synthetic-roc.png").exists()


# ================================================================ calibrate, compare, train_linear

POINTS = ("at_0.5", "at_rec")


@pytest.mark.parametrize("name", ["scratch", "pretrained", "linear"])
def test_calibration_recomputed_from_scores(runs, synthetic, name):
    with np.load(runs.out / name / "scores.npz", allow_pickle=False) as file:
        scores = {k: file[k] for k in file.files}
    assert {f"{s}_{k}" for s in ("val", "test") for k in ("files", "labels", "p1")} <= scores.keys()
    result = read_json(runs.out, name, "calibration.json")
    assert result["min_recall"] == 0.9
    thr, recall, precision = brute_force_threshold(
        scores["val_labels"].tolist(), scores["val_p1"].tolist(), 0.9
    )
    assert result["threshold"] == thr and result["val"]["at_rec"]["recall"] == pytest.approx(recall)
    assert result["val"]["at_rec"]["precision"] == pytest.approx(precision)
    for split, count in (("val", 20), ("test", 40)):
        y, p = scores[f"{split}_labels"], scores[f"{split}_p1"]
        assert len(y) == count and p.dtype == np.float64
        files = scores[f"{split}_files"].tolist()
        assert [("PNEUMONIA" in f) == bool(k) for f, k in zip(files, y)] == [True] * count
        assert all((synthetic / f).is_file() for f in files) and len(set(files)) == count
        for point, t in zip(POINTS, (0.5, thr)):
            row = result[split][point]
            assert (row["thr"], row["tp"]) == (t, ((p >= t) & (y == 1)).sum())
            assert (row["fp"], row["fn"]) == (((p >= t) & (y == 0)).sum(), ((p < t) & (y == 1)).sum())
            won = [(a > b) + (a == b) / 2 for a in p[y == 1] for b in p[y == 0]]
            assert row["auroc"] == pytest.approx(np.mean(won))
    assert f"{thr:.4f}" in runs.calibrated.out
    assert f"{result['test']['at_rec']['specificity']:.4f}" in runs.calibrated.out


def test_scores_are_those_of_the_images(runs, synthetic):
    """Single images through the kept weights by hand: file -> PIL -> logits -> softmax -> the row in scores.npz."""
    model, results = engine.load_run(runs.out / "scratch")
    with np.load(runs.out / "scratch" / "scores.npz") as scores:
        for split in ("val", "test"):
            for i in (0, 7, 19):
                x = torch.from_numpy(full_decode(synthetic / str(scores[f"{split}_files"][i]), 32))[
                    None, None
                ].float()
                with torch.no_grad():
                    logits = model((x / 255 - 0.5).expand(1, 3, 32, 32) / 0.5)
                # A reduced JPEG decode may differ by a grey level from PIL's full one.
                assert logits.softmax(1)[0, 1].item() == pytest.approx(scores[f"{split}_p1"][i], abs=5e-3)


def test_scores_are_reused_until_something_changes(own_runs, monkeypatch):
    """Another --min-recall scores nothing again; another checkpoint, or damaged scores, does."""
    out = own_runs / "outputs" / "pretrained"
    path, scored, real = out / "scores.npz", [], engine.predict
    monkeypatch.setattr(engine, "predict", lambda *a, **k: scored.append(1) or real(*a, **k))

    def p1():
        with np.load(path) as file:
            return file["test_p1"]

    before = p1()
    succeed("calibrate", "--run", out, "--min-recall", 0.5, cwd=own_runs)
    result = read_json(out, "calibration.json")
    assert result["min_recall"] == 0.5 and result["val"]["at_rec"]["recall"] >= 0.5
    assert scored == [] and np.array_equal(p1(), before)
    state = load_pth(out, "checkpoint.pth")
    state["head.weight"] *= -1
    state["head.bias"] *= -1
    torch.save(state, out / "checkpoint.pth")
    succeed("calibrate", "--run", out, "--min-recall", 0.5, cwd=own_runs)
    assert scored == [1, 1] and np.allclose(p1(), 1 - before, atol=1e-5)  # both logits negated
    for damaged in (path.read_bytes()[:500], b""):
        scored.clear()
        path.write_bytes(damaged)
        succeed("calibrate", "--run", out, cwd=own_runs)
        assert scored == [1, 1] and np.allclose(p1(), 1 - before, atol=1e-5)


def test_data_elsewhere_and_other_data(own_runs, synthetic, tmp_path):
    """The same files in another folder serve; another training set is refused."""
    root = copy_set(synthetic, tmp_path)
    out, argv = own_runs / "outputs" / "linear", ["--data-dir", root, "--cache-dir", tmp_path / "c"]
    before = {**read_json(out, "calibration.json"), "command": None}
    succeed("calibrate", "--run", out, "--min-recall", 0.9, *argv, cwd=own_runs)
    assert {**read_json(out, "calibration.json"), "command": None} == before
    next((root / "train" / "NORMAL").iterdir()).unlink()
    refused(cli("calibrate", "--run", out, *argv, cwd=own_runs), "fingerprint")


def test_nothing_to_calibrate_or_compare(runs, own_runs, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for script in ("calibrate", "compare"):
        done = cli(script, cwd=empty)
        refused(done, "no finished runs")
        assert len(done.err.strip().splitlines()) == 1 and done.out.count("|") == 0
    refused(cli("calibrate", "--run", "nowhere", cwd=empty), "nowhere")
    for value in ("0", "1.5", "-1", "nan"):
        refused(cli("calibrate", "--min-recall", value, cwd=own_runs), "--min-recall")
    for path in (own_runs / "outputs").glob("*/calibration.json"):
        path.unlink()
    done = cli("compare", cwd=own_runs)
    refused(done, "not calibrated", "calibrate.py")
    assert len(done.err.strip().splitlines()) == 1 and done.out == ""


def test_uncalibrated_run_is_left_out_with_a_note(own_runs):
    (own_runs / "outputs" / "pretrained" / "calibration.json").unlink()
    done = succeed("compare", cwd=own_runs)
    assert "pretrained" in done.err and "pretrained" not in done.out and "ViT scratch" in done.out


@pytest.mark.parametrize(
    "damage", ["calibration cut", "scores cut", "calibration of a newer format", "calibration without test"]
)
def test_compare_of_damaged_files(own_runs, damage):
    out = own_runs / "outputs" / "scratch"
    path = out / ("scores.npz" if damage == "scores cut" else "calibration.json")
    if damage.endswith("cut"):
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "calibration without test":
        path.write_text(json.dumps({k: v for k, v in read_json(path).items() if k != "test"}))
    else:
        path.write_text(json.dumps({**read_json(path), "format": 99}))
    refused(cli("compare", cwd=own_runs), "scratch")


def tables(markdown):
    """The tables of a markdown text, each a list of rows of cells, the rule under the header left out."""
    out, last = [], False
    for line in markdown.splitlines():
        if line.startswith("|"):
            if not last:
                out.append([])
            if not re.fullmatch(r"[|\s:-]+", line):
                out[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
        last = line.startswith("|")
    return out


HEADER = ["Model", "Params (M)", "Time (min)", "Acc", "Prec", "Recall", "Spec", "F1", "AUROC", "Thr"]
NAMES = {"scratch": "ViT scratch", "pretrained": "pretrained", "linear": "Logistic regression 32x32 px"}
LINK = r"!\[.*?\]\(([^()\s]+)\)"


def test_compare_table(runs):
    """A row for every run @Rec and @0.5, each figure that of calibration.json; then validation beside test."""
    [[_, *rows]] = [t for t in tables(runs.compared.out) if t[0] == HEADER]
    [[head, *shift]] = [t for t in tables(runs.compared.out) if {"Recall val", "Recall test"} <= set(t[0])]
    assert len(rows) == 6
    for name, word in NAMES.items():
        results, result = (
            read_json(runs.out, name, "results.json"),
            read_json(runs.out, name, "calibration.json"),
        )
        for point, mark in (("at_rec", "@Rec"), ("at_0.5", "@0.5")):
            [row] = [r for r in rows if r[0].endswith(mark) and word in r[0]]
            assert "[SYNTHETIC]" in row[0]
            c = result["test"][point]
            assert float(row[1]) == pytest.approx(results["params"] / 1e6, abs=0.006)
            assert float(row[2]) == pytest.approx(results["minutes"], abs=0.051)
            expected = [c[k] for k in ("acc", "precision", "recall", "specificity", "f1", "auroc")]
            assert [float(v) for v in row[3:9]] == pytest.approx(expected, abs=5.1e-4)
            assert float(row[9]) == pytest.approx(c["thr"], abs=5.1e-5)
        [row] = [dict(zip(head, r)) for r in shift if word in r[0] and "@Guar" not in r[0]]
        for title, key in (("Recall", "recall"), ("Spec", "specificity"), ("AUROC", "auroc")):
            for split in ("val", "test"):  # an interval may follow the figure
                found = float(row[f"{title} {split}"].split()[0])
                assert found == pytest.approx(result[split]["at_rec"][key], abs=5.1e-4)


def test_compare_prints_markdown_only(runs):
    out = runs.compared.out
    assert out.startswith("# ") and "SYNTHETIC" in out
    assert "40 images (15 NORMAL, 25 PNEUMONIA)" in out and "recall >= 0.9" in out
    for line in filter(None, out.splitlines()):
        assert line[0] in "#|" or re.fullmatch(LINK, line) or (line[-1] in ".:" and len(line.split()) > 5), (
            line
        )


def test_compare_plots(runs):
    """Every linked picture is there, opens, and is not blank; the training curve is not that of the histogram."""
    links = re.findall(LINK, runs.compared.out)
    assert len(links) >= 5 and len(set(links)) == len(links)
    seen = set()
    for link in links:
        with Image.open(runs.cwd / link) as image:
            image.load()
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 300 and pixels.std() > 5 and (pixels < 128).mean() > 0.002, link
        seen.add(pixels.tobytes())
    assert len(seen) == len(links)
    found = {p.resolve() for p in (runs.out / "figures").iterdir()}
    assert found == {(runs.cwd / link).resolve() for link in links}


def test_compare_csv(runs):
    import csv

    with open(runs.cwd / "table.csv", newline="") as f:
        header, *rows = csv.reader(f)
    [table] = [t for t in tables(runs.compared.out) if t[0] == HEADER]
    assert header == ["Data", *HEADER] and [row[1:] for row in rows] == table[1:]


def test_compare_separates_test_sets(own_runs, tmp_path):
    """Runs on other test images get a table of their own, and plots of their own."""
    data.make_synthetic(tmp_path / "other", train=48, test=16, seed=3)
    succeed(
        "train_linear",
        "--data-dir",
        tmp_path / "other",
        "--img-size",
        32,
        "--out",
        "outputs/second",
        cwd=own_runs,
    )
    succeed("calibrate", "--run", "outputs/second", cwd=own_runs)
    done = succeed("compare", cwd=own_runs)
    assert sorted(len(t) - 1 for t in tables(done.out) if t[0] == HEADER) == [2, 6]
    links = re.findall(LINK, done.out)
    one = succeed("compare", "--run", "outputs/linear", cwd=own_runs)
    assert (
        len(set(links)) == len(links) == 2 * len(re.findall(LINK, one.out)) + 1
    )  # no curves of a linear model
    assert all((own_runs / link).exists() for link in links)


def test_linear_is_scikit_learns_logistic_regression(runs, synthetic):
    """Pooling, standardising and fitting again by hand gives the decision function that the run's logits have."""

    def pixels(files):  # 64 px, means of 2 x 2 cells
        images = np.stack([data.decode(synthetic / str(f), 64) for f in files]) / 255
        return images.reshape(len(files), 32, 2, 32, 2).mean((2, 4)).reshape(len(files), 1024)

    files, labels = data.list_images(synthetic, "train")
    train, val = data.split_train_val(files, labels)
    scaler = StandardScaler().fit(pixels([files[i] for i in train]))
    fitted = LogisticRegression(C=0.01, max_iter=2000)
    fitted.fit(scaler.transform(pixels([files[i] for i in train])), labels[train])
    with np.load(runs.out / "linear" / "scores.npz") as scores:
        assert scores["val_files"].tolist() == [files[i] for i in val]
        for split in ("val", "test"):
            decision = fitted.decision_function(scaler.transform(pixels(scores[f"{split}_files"])))
            assert np.abs(scores[f"{split}_p1"] - scipy.special.expit(decision)).max() < 1e-3
            assert decision.std() > 0.3


def test_min_recall_from_the_command_line_is_met_on_validation(own_runs):
    for target in (0.5, 0.95, 1.0):
        succeed("calibrate", "--min-recall", target, cwd=own_runs)
        for name in ("scratch", "pretrained", "linear"):
            assert (
                read_json(own_runs, "outputs", name, "calibration.json")["val"]["at_rec"]["recall"] >= target
            )


# ================================================================ common


def test_atomic_path(tmp_path):
    """The old content stays until the new is complete; a failure leaves nothing behind."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), common.atomic_path(path) as tmp:
        tmp.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert folder_bytes(tmp_path) == {"a.txt": b"old"}
    with common.atomic_path(path) as tmp:
        tmp.write_text("new")
    assert folder_bytes(tmp_path) == {"a.txt": b"new"}


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        common.write_json(tmp_path / "a.json", {"x": math.nan})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error, code",
    [
        (InputError("bad"), 2),
        (FileNotFoundError(2, "No such file", "x.txt"), 2),
        (PermissionError(13, "Denied", "x"), 2),
        (KeyboardInterrupt(), 130),
        (common.Interrupted("stopped", signal.SIGTERM), 143),
    ],
)
def test_exit_codes(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        common.start(main)
    assert stop.value.code == code and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_bugs_are_not_hidden_as_bad_input():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        common.start(main)


# ================================================================ metrics: guarantee, intervals, probabilities


def _random_scores(rng, n, grid=None):
    """Labels of both classes and overlapping scores in [0, 1], on a coarse grid when ties are wanted."""
    y = rng.integers(0, 2, n)
    y[:2] = 0, 1
    p = np.clip(rng.normal(0.35 + 0.3 * y, 0.2), 0, 1)
    return y, (p if grid is None else np.round(p * grid) / grid)


@pytest.mark.parametrize(
    "n, target, confidence", [(59, 0.95, 0.95), (200, 0.95, 0.95), (333, 0.9, 0.99), (775, 0.95, 0.9)]
)
def test_guarantee_is_the_umbrella_order_statistic(n, target, confidence):
    """k by summing the binomial by hand: the largest k with P(Bin(n, 1 - target) <= k - 1) <= 1 - confidence."""
    rng = np.random.default_rng(n)
    positives = rng.permutation(np.linspace(0.1, 0.9, n))
    y, p = np.r_[np.ones(n, int), np.zeros(30, int)], np.r_[positives, rng.random(30) * 0.5]
    tail, k = 0.0, 0
    while True:
        tail += math.comb(n, k) * (1 - target) ** k * target ** (n - k)
        if tail > 1 - confidence:
            break
        k += 1
    thr, recall, precision = metrics.choose_threshold_with_guarantee(y, p, target, confidence)
    assert thr == np.sort(positives)[k - 1]
    assert recall == pytest.approx((n - k + 1) / n)
    assert precision == pytest.approx((n - k + 1) / (p >= thr).sum())
    alone = metrics.choose_threshold_with_guarantee(y, p, target, confidence, groups=np.arange(len(y)))
    assert alone == (thr, recall, precision)  # one image a patient: the plain rule


def test_guarantee_says_how_many_positives_it_needs():
    y, p = np.r_[np.ones(58, int), 0], np.linspace(0, 1, 59)
    with pytest.raises(ValueError, match="at least 59"):
        metrics.choose_threshold_with_guarantee(y, p)
    with pytest.raises(ValueError, match="29 independent.*at least 59"):
        metrics.choose_threshold_with_guarantee(y, p, groups=np.arange(59) // 2)
    for bad in (dict(min_recall=1.0), dict(confidence=1.0), dict(confidence=0.0)):
        with pytest.raises(ValueError, match="guarantee"):
            metrics.choose_threshold_with_guarantee(y, p, **bad)


def test_guarantee_with_constant_scores_calls_everything_positive():
    y = np.r_[np.ones(100, int), np.zeros(20, int)]
    assert metrics.choose_threshold_with_guarantee(y, np.full(120, 0.3))[:2] == (0.3, 1.0)


@pytest.mark.parametrize("clustered", [False, True])
def test_guarantee_holds_in_simulation_and_the_naive_rule_does_not(clustered):
    """True recall is known: positives score Phi(N(1, 1)). In clusters the images of a patient correlate 0.8."""
    from scipy.stats import norm

    rng, draws, patients = np.random.default_rng(5), 400, 250
    violations = np.zeros(3)
    for _ in range(draws):
        sizes = rng.integers(1, 8, patients) if clustered else np.ones(patients, int)
        group = np.repeat(np.arange(patients), sizes)
        noise = math.sqrt(0.8) * rng.normal(size=patients)[group] + math.sqrt(0.2) * rng.normal(
            size=len(group)
        )
        y = np.r_[np.ones(len(group), int), np.zeros(50, int)]
        p = np.r_[norm.cdf(1 + noise), 0.5 * rng.random(50)]
        groups = np.r_[group, patients + np.arange(50)]
        thresholds = (
            metrics.choose_threshold_by_min_recall(y, p, 0.95)[0],
            metrics.choose_threshold_with_guarantee(y, p)[0],
            metrics.choose_threshold_with_guarantee(y, p, groups=groups)[0],
        )
        violations += [norm.sf(norm.ppf(t) - 1) < 0.95 for t in thresholds]
    naive, by_image, by_patient = violations / draws
    assert 0.35 < naive < 0.65
    assert by_patient <= 0.05
    assert by_image > 0.08 if clustered else by_image <= 0.07  # 0.05 + 2 standard errors of 400 draws


def test_wilson_and_clopper_pearson_equal_scipy():
    from scipy.stats import binomtest

    for k, n in ((0, 10), (10, 10), (1, 7), (370, 390), (123, 234)):
        for level in (0.9, 0.95):
            result = binomtest(k, n)
            assert metrics.wilson_interval(k, n, level) == pytest.approx(
                tuple(result.proportion_ci(level, "wilson")), abs=1e-12
            )
            assert metrics.clopper_pearson_interval(k, n, level) == pytest.approx(
                tuple(result.proportion_ci(level, "exact")), abs=1e-9
            )
    for bad in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError):
            metrics.wilson_interval(*bad)


def test_wilson_covers():
    """Coverage summed exactly over the binomial: near 95% on average, never far below."""
    from scipy.stats import binom

    cover = []
    for p in np.linspace(0.05, 0.95, 19):
        k = np.arange(101)
        inside = [lo <= p <= hi for lo, hi in (metrics.wilson_interval(int(i), 100) for i in k)]
        cover.append(binom.pmf(k, 100, p)[inside].sum())
    assert 0.94 < np.mean(cover) < 0.965 and min(cover) > 0.91


def _delong_brute(y, scores):
    """The definition: structural components over all pairs, ties one half."""
    pos, neg = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    psi = np.array([[[(s[i] > s[j]) + 0.5 * (s[i] == s[j]) for j in neg] for i in pos] for s in scores])
    return (psi.mean(axis=(1, 2)), np.cov(psi.mean(axis=2)) / len(pos) + np.cov(psi.mean(axis=1)) / len(neg))


@pytest.mark.parametrize("grid", [None, 10])
def test_delong_equals_its_definition(grid):
    from scipy.stats import norm

    rng = np.random.default_rng(3)
    y, a = _random_scores(rng, 80, grid)
    b = np.clip(a + rng.normal(0, 0.15, 80), 0, 1)
    (auc_a, auc_b), cov = _delong_brute(y, [a, b])
    got, lo, hi = metrics.delong_interval(y, a)
    half = 1.959963984540054 * math.sqrt(cov[0, 0])
    assert (got, lo, hi) == pytest.approx((auc_a, auc_a - half, min(1, auc_a + half)), abs=1e-12)
    difference, p = metrics.delong_test(y, a, b)
    z = (auc_a - auc_b) / math.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
    assert (difference, p) == pytest.approx((auc_a - auc_b, 2 * norm.sf(abs(z))), abs=1e-12)
    assert metrics.delong_test(y, b, a) == pytest.approx((-difference, p))
    assert metrics.delong_test(y, a, a) == (0.0, 1.0)


def test_delong_agrees_with_the_bootstrap_and_covers():
    from scipy.stats import norm

    rng = np.random.default_rng(4)
    y, p = _random_scores(rng, 600)
    _, lo, hi = metrics.delong_interval(y, p)
    boot = metrics.bootstrap_interval(metrics.roc_auc_score, y, p, n=1000)
    assert (lo, hi) == pytest.approx(boot, abs=0.004)
    truth, hits = norm.cdf(1 / math.sqrt(2)), 0  # AUROC of N(1, 1) against N(0, 1)
    for _ in range(400):
        s = norm.cdf(np.r_[rng.normal(1, 1, 60), rng.normal(0, 1, 60)])
        _, lo, hi = metrics.delong_interval(np.r_[np.ones(60, int), np.zeros(60, int)], s)
        hits += lo <= truth <= hi
    assert 0.92 < hits / 400 < 0.98


@pytest.mark.parametrize("grid", [None, 8])
def test_vectorised_bootstrap_equals_resampling(grid):
    """Every draw of every figure against summarize_at_threshold on the repeated rows."""
    rng = np.random.default_rng(6)
    y, p = _random_scores(rng, 120, grid)
    groups = rng.integers(0, 40, 120)
    weights = metrics.bootstrap_weights(groups, 30, seed=2)
    assert (
        weights == weights[:, [np.flatnonzero(groups == g)[0] for g in groups]]
    ).all()  # patients stay whole
    for thr in (0.5, 0.0, 1.0, 0.375):
        draws = metrics.bootstrap_summary(y, p, thr, weights)
        for b, w in enumerate(weights):
            index = np.repeat(np.arange(120), w)
            row = metrics.summarize_at_threshold(y[index], p[index], thr)
            for name, values in draws.items():
                assert values[b] == pytest.approx(row[name], abs=1e-12), (name, thr)
    lo, hi = metrics.bootstrap_interval(metrics.roc_auc_score, y, p, groups, n=200, seed=9)
    fast = metrics.bootstrap_summary(y, p, 0.5, metrics.bootstrap_weights(groups, 200, 9))["auroc"]
    assert (lo, hi) == pytest.approx(tuple(np.percentile(fast, [2.5, 97.5])))


def test_bootstrap_is_fast_and_refuses_one_class():
    rng = np.random.default_rng(8)
    y, p = _random_scores(rng, 624)
    started = time.perf_counter()
    metrics.intervals_at_threshold(y, p, 0.5, rng.integers(0, 400, 624), n=2000)
    assert time.perf_counter() - started < 5
    y = np.r_[1, np.zeros(30, int)]  # one patient holds the only positive: a third of the draws lack it
    lo, hi = metrics.bootstrap_interval(metrics.roc_auc_score, y, np.linspace(1, 0, 31), n=300)
    assert (lo, hi) == pytest.approx((1, 1))
    with pytest.raises(ValueError, match="one class"):
        metrics.bootstrap_interval(lambda y, p: math.nan, y, np.linspace(1, 0, 31), n=50)


def test_mcnemar_by_hand():
    """8 and 2 discordant pairs: 2 * P(Bin(10, 1/2) <= 2) = 2 * 56 / 1024."""
    a = np.array([True] * 8 + [False] * 2 + [True] * 5 + [False] * 4)
    b = np.array([False] * 8 + [True] * 2 + [True] * 5 + [False] * 4)
    assert metrics.mcnemar_test(a, b) == (8, 2, pytest.approx(112 / 1024))
    assert metrics.mcnemar_test(a, a) == (0, 0, 1.0)


def test_paired_comparison_signs_and_equality():
    rng = np.random.default_rng(2)
    y, good = _random_scores(rng, 300)
    worse = np.clip(good + rng.normal(0, 0.5, 300), 0, 1)
    got = metrics.compare_at_thresholds(y, good, 0.5, worse, 0.5, np.arange(300), n=300)
    for name in ("auroc", "recall", "specificity"):
        a, b = (metrics.summarize_at_threshold(y, p, 0.5)[name] for p in (good, worse))
        assert got[name]["difference"] == pytest.approx(a - b)
        assert got[name]["lo"] <= a - b <= got[name]["hi"]
    assert got["auroc"]["lo"] > 0 and got["delong"] < 0.01
    same = metrics.compare_at_thresholds(y, good, 0.5, good, 0.5, np.arange(300), n=50)
    assert (
        same["auroc"] == {"difference": 0.0, "lo": 0.0, "hi": 0.0}
        and same["delong"] == same["mcnemar_recall"] == 1.0
    )


def test_temperature_is_recovered_and_minimal():
    """Labels drawn from softmax(z), logits given as 3 z: T is 3 up to noise, and no grid point does better."""
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, (40_000, 3))
    prob = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    y = (rng.random((40_000, 1)) > prob.cumsum(1)).sum(1).clip(0, 2)
    t = metrics.fit_temperature(3 * z, y)
    assert t == pytest.approx(3, rel=0.03)

    def loss(t):
        return torch.nn.functional.cross_entropy(torch.tensor(3 * z / t), torch.tensor(y)).item()

    assert loss(t) <= min(loss(g) for g in np.linspace(1, 6, 51)) + 1e-9
    separable = metrics.fit_temperature(np.array([[1.0, 0], [0, 1.0]]), np.array([0, 1]))
    assert 0.01 <= separable < 0.03  # the loss is 0 to the last bit from there on
    for logits, y in (
        (np.zeros((2, 2)), [0, 2]),
        (np.full((2, 2), np.nan), [0, 1]),
        (np.zeros((3, 2)), [0, 1]),
    ):
        with pytest.raises(ValueError):
            metrics.fit_temperature(logits, np.array(y))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 8))  # a far smaller T would saturate float64 into ties
def test_temperature_changes_no_ranking_and_no_decision(seed, temperature):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, 60)
    y[:2] = 0, 1
    logits = rng.normal(0, 2, (60, 2)) + np.stack([-y, y], 1)
    before, after = metrics.tempered(logits, 1.0), metrics.tempered(logits, temperature)
    assert (np.argsort(before, kind="stable") == np.argsort(after, kind="stable")).all()
    assert ((before >= 0.5) == (after >= 0.5)).all()
    a, b = (metrics.choose_threshold_by_min_recall(y, p, 0.9) for p in (before, after))
    assert ((before >= a[0]) == (after >= b[0])).all() and a[1:] == b[1:]


def test_calibration_error_brier_nll_by_hand():
    """Two bins of two: |0.15 - 0.5| and |0.8 - 1| with weight one half each."""
    y, p = np.array([0, 1, 1, 1]), np.array([0.1, 0.2, 0.7, 0.9])
    ece, bins = metrics.calibration_error(y, p, bins=2)
    assert ece == pytest.approx(0.5 * 0.35 + 0.5 * 0.2)
    assert bins == [
        {"n": 2, "score": pytest.approx(0.15), "positives": 0.5},
        {"n": 2, "score": pytest.approx(0.8), "positives": 1.0},
    ]
    from sklearn.metrics import brier_score_loss, log_loss

    assert metrics.brier(y, p) == pytest.approx(brier_score_loss(y, p))
    assert metrics.nll(y, p) == pytest.approx(log_loss(y, p))


def test_predictive_values_and_net_benefit_by_hand():
    """1,000 children, 100 sick, recall 0.9, specificity 0.8: 90 true and 180 false alarms; 720 true, 10 false rests."""
    assert metrics.predictive_values(0.9, 0.8, 0.1) == pytest.approx((90 / 270, 720 / 730))
    y, p = np.array([1, 1, 0, 0]), np.array([0.9, 0.3, 0.6, 0.1])
    model, treat_all = metrics.net_benefit(y, p, [0.5, 0.2])
    assert model == pytest.approx([1 / 4 - 1 / 4, 2 / 4 - 1 / 4 * 0.25])
    assert treat_all == pytest.approx([0.5 - 0.5, 0.5 - 0.5 * 0.25])


# ================================================================ test-time augmentation, predict.py, the report


def test_tta_views_shift_zoom_and_mirror():
    x = torch.rand(2, 1, 100, 100)
    views = data.tta_views(flip=True)
    assert len(views) == 14 and views[0](x) is x
    right = views[1](x)  # the grid moves by +3 px, so the picture moves left
    assert torch.allclose(right[..., :97], x[..., 3:], atol=1e-4) and right[..., 97:].abs().max() < 1e-4
    assert torch.allclose(views[7](x), x.flip(-1), atol=1e-4)


FLOOR = ("--min-recall", 0.9, "--guarantee", 0.9, "--bootstrap", 200)  # 22 patients are enough for these


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A synthetic set with enough patients for a guarantee, and calibrated runs: linear, and scratch with two seeds."""
    folder = tmp_path_factory.mktemp("bench")
    data.make_synthetic(folder / "xray", train=420, test=60)
    common_flags = ("--data-dir", "xray", "--img-size", "32")
    assert cli("train_linear", *common_flags, cwd=folder).code == 0
    assert cli("train_scratch", *common_flags, "--seeds", 0, 1, "--max-steps", 3, cwd=folder).code == 0
    assert cli("calibrate", *FLOOR, cwd=folder).code == 0
    return folder


def test_seeds_train_one_run_each(bench):
    runs = [common.read_results(bench / f"outputs/scratch-seed{s}") for s in (0, 1)]
    assert [r["seed"] for r in runs] == [0, 1] and runs[0]["split"] == runs[1]["split"]
    a, b = (
        common.load_tensors(bench / f"outputs/scratch-seed{s}/checkpoint.pth")["head.weight"] for s in (0, 1)
    )
    assert not torch.equal(a, b)


def test_calibration_json_holds_guarantee_temperature_intervals(bench):
    got = common.read_json(bench / "outputs/linear/calibration.json")
    with np.load(bench / "outputs/linear/scores.npz") as file:
        s = dict(file)
    groups = [data.patient_id(f) for f in s["val_files"]]
    thr, recall, precision = metrics.choose_threshold_with_guarantee(
        s["val_labels"], s["val_p1"], 0.9, 0.9, groups
    )
    assert got["guarantee"]["threshold"] == thr and got["guarantee"]["confidence"] == 0.9
    val = got["guarantee"]["val"]["at_guaranteed"]
    assert (val["recall"], val["precision"]) == pytest.approx((recall, precision)) and got["val"][
        "at_guaranteed"
    ] == val
    assert got["temperature"] == pytest.approx(metrics.fit_temperature(s["val_logits"], s["val_labels"]))
    row = got["test"]["at_rec"]
    assert row["interval"]["recall"]["wilson"] == pytest.approx(
        metrics.wilson_interval(row["tp"], row["tp"] + row["fn"])
    )
    assert row["interval"]["auroc"]["delong"] == pytest.approx(
        metrics.delong_interval(s["test_labels"], s["test_p1"])[1:]
    )
    for name in ("acc", "precision", "recall", "specificity", "f1", "auroc", "auprc"):
        lo, hi = row["interval"][name]["bootstrap"]
        assert lo <= row[name] <= hi


def test_temperature_flag_keeps_decisions(bench):
    plain = common.read_json(bench / "outputs/linear/calibration.json")
    assert cli("calibrate", "--run", "outputs/linear", "--temperature", *FLOOR, cwd=bench).code == 0
    warm = common.read_json(bench / "outputs/linear/calibration.json")
    assert warm["temperature_applied"] and warm["threshold"] != plain["threshold"]
    for side in ("val", "test"):
        for point in ("at_0.5", "at_rec", "at_guaranteed"):
            assert all(
                warm[side][point][k] == plain[side][point][k] for k in ("tp", "fp", "tn", "fn", "auroc")
            )
    predictions = predict_rows(bench, "xray/test", "--run", "outputs/linear")
    with np.load(bench / "outputs/linear/scores.npz") as file:
        assert [float(r["p_pneumonia"]) for r in predictions] == file["test_p1"].tolist()
    assert cli("calibrate", "--run", "outputs/linear", *FLOOR, cwd=bench).code == 0


def predict_rows(folder, *argv, code=0):
    """Rows of predict.py's CSV."""
    done = cli("predict", *argv, cwd=folder)
    assert done.code == code, done.err
    assert done.out.splitlines()[0] == "path,p_pneumonia,decision@0.5,decision@Rec,note"
    return list(csv.DictReader(io.StringIO(done.out)))


@pytest.mark.parametrize("tta", [False, True])
def test_predict_reproduces_calibrate_exactly(bench, tta):
    flags, suffix = (["--tta"], "-tta") if tta else ([], "")
    run = "outputs/scratch-seed0"
    if tta:
        assert cli("calibrate", "--run", run, "--tta", *FLOOR, cwd=bench).code == 0
    predictions = predict_rows(bench, "xray/test", "--run", run, *flags)
    with np.load(bench / run / f"scores{suffix}.npz") as file:
        assert [r["path"] for r in predictions] == [f"xray/{f}" for f in file["test_files"]]
        assert [float(r["p_pneumonia"]) for r in predictions] == file["test_p1"].tolist()
        thr = common.read_json(bench / run / f"calibration{suffix}.json")["threshold"]
        assert [r["decision@Rec"] == "PNEUMONIA" for r in predictions] == (file["test_p1"] >= thr).tolist()
        assert [r["decision@0.5"] == "PNEUMONIA" for r in predictions] == (file["test_p1"] >= 0.5).tolist()
    backwards = [f"xray/{f}" for f in file_list(bench, run)[::-1][:7]]  # other batches, same scores
    again = predict_rows(bench, *backwards, "--run", run, "--batch-size", 3, *flags)
    by_path = {r["path"]: r["p_pneumonia"] for r in predictions}
    assert [float(r["p_pneumonia"]) for r in again] == pytest.approx(
        [float(by_path[b]) for b in backwards], abs=2e-3
    )


def file_list(folder, run):
    with np.load(folder / run / "scores.npz") as file:
        return file["test_files"].tolist()


def test_predict_reports_bad_and_odd_files_and_goes_on(bench):
    odd = bench / "odd"
    odd.mkdir(exist_ok=True)
    good = sorted((bench / "xray/test/NORMAL").iterdir())[0]
    Image.open(good).convert("L").save(odd / "a_good.png")
    (odd / "b_empty.png").write_bytes(b"")
    (odd / "c_text.jpg").write_text("no image")
    (odd / "d_cut.jpeg").write_bytes(good.read_bytes()[:600])
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (300, 300, 3), dtype=np.uint8)).save(odd / "e_colour.png")
    grey = np.asarray(Image.open(good).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(odd / "f_16bit.png")
    (odd / "g.dcm").write_text("no dicom")
    done = cli("predict", "odd", "--run", "outputs/linear", cwd=bench)
    assert done.code == 2 and "4 of 7" in done.err and "Traceback" not in done.err
    rows = list(csv.DictReader(io.StringIO(done.out)))
    by = {Path(r["path"]).name[0]: r for r in rows}
    assert len(rows) == 7 and [k for k in by if by[k]["p_pneumonia"] == ""] == ["b", "c", "d", "g"]
    assert all(by[k]["note"].startswith("unreadable") for k in "bcdg")
    assert "colour photograph" in by["e"]["note"]
    assert float(by["f"]["p_pneumonia"]) == pytest.approx(float(by["a"]["p_pneumonia"]), abs=1e-6)
    assert cli("predict", "nowhere/*.png", "--run", "outputs/linear", cwd=bench).code == 2
    assert cli("predict", "odd", "--run", "nowhere", cwd=bench).code == 2


def test_predict_notes_what_is_unlike_the_training_images():
    from predict import unlike

    results = {
        "input_range": {"mean": [0.3, 0.6], "std": [0.1, 0.3]},
        "split": {"original_size": {"width": [400, 2000], "height": [500, 500]}},
    }
    image = np.r_[np.full((8, 16), 60), np.full((8, 16), 160)].astype(np.uint8)  # mean 0.43, std 0.2
    assert unlike(image, (400, 7), 0.0, results) == ""  # one single training height tells nothing
    assert "width 2001 px outside the training range 400 to 2000" in unlike(image, (2001, 500), 0.0, results)
    assert "brightness 0.20" in unlike(image - 59, (400, 500), 0.0, results)
    assert "contrast 0.00" in unlike(np.full((16, 16), 100, np.uint8), (400, 500), 0.0, results)
    assert "colour photograph" in unlike(image, (400, 500), 0.2, results)


def test_a_calibration_of_other_weights_is_refused(bench, tmp_path):
    shutil.copytree(bench / "outputs/scratch-seed1", tmp_path / "run")
    shutil.copy(bench / "outputs/scratch-seed0/checkpoint.pth", tmp_path / "run/checkpoint.pth")
    for script, argv in (("predict", ["xray/test", "--run"]), ("compare", ["--run"])):
        done = cli(script, *argv, tmp_path / "run", cwd=bench)
        assert done.code == 2 and "another checkpoint" in done.err


def test_nan_weights_are_refused(bench, tmp_path):
    shutil.copytree(bench / "outputs/linear", tmp_path / "run")
    state = common.load_tensors(tmp_path / "run/checkpoint.pth")
    state["head.weight"][0, 0] = math.nan
    torch.save(state, tmp_path / "run/checkpoint.pth")
    for script, argv in (("predict", ["xray/test", "--run"]), ("calibrate", ["--run"])):
        done = cli(script, *argv, tmp_path / "run", cwd=bench)
        assert done.code == 2 and "NaN" in done.err


def test_a_seed_trained_twice_counts_once(bench, tmp_path):
    shutil.copytree(bench / "outputs", tmp_path / "outputs")
    shutil.copytree(bench / "outputs/scratch-seed0", tmp_path / "outputs/scratch")
    done = cli("compare", cwd=tmp_path)
    assert done.code == 0 and "mean ± sd of 2 seeds" in done.out and "of 3 seeds" not in done.out


@pytest.mark.parametrize(
    "file, change",
    [
        ("results.json", {"mean": None}),
        ("results.json", {"mean": [0.5, 0.5]}),
        ("results.json", {"split": {}}),
        ("results.json", {"recipe": {}}),
        ("results.json", {"history": []}),
        ("results.json", {"best_epoch": 99}),
        ("results.json", {"params": "many"}),
        ("results.json", {"format": None}),
        ("calibration.json", {"threshold": None}),
        ("calibration.json", {"temperature": 0}),
        ("calibration.json", {"test": {}}),
        ("calibration.json", {"format": "a"}),
        ("calibration.json", {"guarantee": ...}),
        ("scores.npz", "test_p1"),
    ],
)
def test_damaged_run_files_are_named(bench, tmp_path, file, change):
    """Every reader of the file says which file is damaged, in one line."""
    run = tmp_path / "run"
    shutil.copytree(bench / "outputs/linear", run)
    if file == "scores.npz":
        with np.load(run / file) as arrays:
            kept = {k: v for k, v in arrays.items() if k != change}
        np.savez(run / file, **kept)
    else:
        value = {**common.read_json(run / file), **change}
        (run / file).write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))
    readers = {
        "results.json": ("calibrate", "compare", "predict"),
        "calibration.json": ("compare", "predict"),
        "scores.npz": ("compare",),
    }[file]
    for script in readers:
        done = cli(script, *(["xray/test"] if script == "predict" else []), "--run", run, cwd=bench)
        assert done.code == 2 and str(run) in done.err and "Traceback" not in done.err, (script, done.err)


def test_flags_that_would_be_ignored_or_overflow(tmp_path):
    for argv in (
        ["--demo", "--data-dir", "elsewhere"],
        ["--seed", 1, "--seeds", 0, 1],
        ["--seed", 2**70],
        ["--demo", "--img-size", 100_000],
        ["--demo", "--cache-dir", __file__],
        ["--out", __file__],
    ):
        done = cli("train_scratch", *argv, cwd=tmp_path)
        assert done.code == 2 and done.err.startswith("error: "), (argv, done.err)


def test_predict_reads_dicom(bench):
    """MONOCHROME1 stored inverted, and 12 bits with a window, both give the PNG's score."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset

    grey = np.asarray(Image.open(sorted((bench / "xray/test/PNEUMONIA").iterdir())[0]).convert("L"))
    full = ((grey.astype(float) - grey.min()) / (grey.max() - grey.min()) * 255).round().astype(np.uint8)
    folder = bench / "dicom"
    folder.mkdir(exist_ok=True)
    Image.fromarray(full).save(folder / "a.png")

    def save(name, pixels, bits, photometric, **extra):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
            pydicom.uid.generate_uid(),
            pydicom.uid.generate_uid(),
        )
        file = FileDataset(str(folder / name), {}, file_meta=meta, preamble=b"\0" * 128)
        file.Rows, file.Columns = pixels.shape
        file.SamplesPerPixel, file.PixelRepresentation, file.PhotometricInterpretation = 1, 0, photometric
        file.BitsAllocated = 8 * pixels.itemsize
        file.BitsStored, file.HighBit = bits, bits - 1
        file.PixelData = pixels.tobytes()
        for key, value in extra.items():
            setattr(file, key, value)
        file.save_as(folder / name, enforce_file_format=True)

    save("b.dcm", 255 - full, 8, "MONOCHROME1")
    save(
        "c.dcm",
        full.astype(np.uint16) * 10 + 7,
        12,
        "MONOCHROME2",
        RescaleSlope="2",
        RescaleIntercept="-14",
        WindowCenter="2550",
        WindowWidth="5101",
    )
    rows = predict_rows(bench, "dicom", "--run", "outputs/linear")
    scores = [float(r["p_pneumonia"]) for r in rows]
    assert scores[1] == pytest.approx(scores[0], abs=1e-9) and scores[2] == pytest.approx(scores[0], abs=0.02)


def test_predict_streams(bench):
    """Files are taken from the iterator batch by batch: never more than two batches are in the air."""
    import predict

    scorer = predict.Scorer(bench / "outputs/linear", torch.device("cpu"), tta=False)
    path, taken = str(bench / "xray" / file_list(bench, "outputs/linear")[0]), 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield path

    rows = scorer.rows(endless(), batch_size=4)
    for i in range(1, 30):
        next(rows)
        assert taken <= 4 * (2 + i // 4 + 1)


def test_export_matches_pytorch(bench):
    onnx, _, runtime = (pytest.importorskip(n) for n in ("onnx", "onnxscript", "onnxruntime"))
    run = "outputs/scratch-seed0"
    assert cli("predict", "--export", "m.onnx", "--run", run, cwd=bench).code == 0
    meta = {p.key: p.value for p in onnx.load(bench / "m.onnx").metadata_props}
    assert float(meta["threshold@Rec"]) == common.read_json(bench / run / "calibration.json")["threshold"]
    pixels = np.stack([data.decode(bench / "xray" / f, 32) for f in file_list(bench, run)[:5]])
    got = runtime.InferenceSession(str(bench / "m.onnx")).run(
        None, {"image": pixels[:, None].astype(np.float32) / 255}
    )[0]
    model, results = engine.load_run(bench / run)
    with torch.inference_mode():
        logits = engine.forward(
            model,
            torch.from_numpy(pixels)[:, None] / 255,
            mean=results["mean"],
            std=results["std"],
            amp=False,
        )
    assert got == pytest.approx(metrics.tempered(logits.numpy(), 1.0), abs=1e-4)


def test_report_has_every_section_and_html_stands_alone(bench):
    done = cli("compare", "--html", "report.html", "--csv", "t.csv", cwd=bench)
    assert done.code == 0, done.err
    text = done.out
    for heading in (
        "What the threshold promises",
        "95% intervals",
        "Which model is better",
        "Are the probabilities right",
        "Subgroups",
        "How this was evaluated",
        "mean ± sd of 2 seeds",
        "ensemble of 2 seeds",
        "@Guar",
        "SYNTHETIC",
    ):
        assert heading in text, heading
    with (
        np.load(bench / "outputs/scratch-seed0/scores.npz") as a,
        np.load(bench / "outputs/scratch-seed1/scores.npz") as b,
    ):
        y, aurocs = a["test_labels"], [metrics.roc_auc_score(s["test_labels"], s["test_p1"]) for s in (a, b)]
        both = metrics.roc_auc_score(y, (a["test_p1"] + b["test_p1"]) / 2)
    mean_row = next(line for line in text.splitlines() if "mean ± sd of 2 seeds @Rec" in line)
    assert f"{np.mean(aurocs):.3f} ± {np.std(aurocs, ddof=1):.3f}" in mean_row
    assert f"| {both:.3f} |" in next(line for line in text.splitlines() if "ensemble of 2 seeds @Rec" in line)
    page = (bench / "report.html").read_text()
    assert (
        "http" not in page.replace("http-equiv", "")
        and page.count("data:image/png;base64,") == 6
        and "SYNTHETIC" in page
    )
    assert (bench / "t.csv").read_text().splitlines()[0].startswith("Data,Model,Params (M)")


def test_newer_format_and_too_few_patients_are_refused(bench, tmp_path):
    shutil.copytree(bench / "outputs/linear", tmp_path / "newer")
    results = common.read_json(tmp_path / "newer/results.json")
    common.write_json(tmp_path / "newer/results.json", {**results, "format": 99})
    for script in ("calibrate", "compare"):
        done = cli(script, "--run", tmp_path / "newer", cwd=bench)
        assert done.code == 2 and "format 99" in done.err
    done = cli("calibrate", "--run", "outputs/linear", "--guarantee", 0.9999999, cwd=bench)
    assert done.code == 2 and "are needed" in done.err


# ================================================================ recipes: augmentation, exposure, selection signals


def test_gaussian_blur_equals_scipy():
    x = torch.rand(3, 1, 40, 40)
    sigma = torch.tensor([0.7, 1.5, 3.0])
    got = data.gaussian_blur(x, sigma)
    for i in range(3):
        radius = math.ceil(9.0)  # the widest kernel serves all
        want = scipy.ndimage.gaussian_filter(
            x[i, 0].double().numpy(), float(sigma[i]), mode="nearest", truncate=radius / float(sigma[i])
        )
        assert got[i, 0].numpy() == pytest.approx(want, abs=1e-5)


def test_match_levels_is_quantile_mapping():
    """Against rank statistics: in its middle every image gets the quantiles of the other one, and keeps its own order."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(
        np.stack([rng.beta(4, 2, (64, 64)), rng.beta(2, 5, (64, 64)), np.full((64, 64), 0.4)])
    ).float()[:, None]
    like = torch.from_numpy(
        np.stack([rng.normal(0.6, 0.1, (64, 64)).clip(0, 1), rng.random((64, 64)), rng.random((64, 64))])
    ).float()[:, None]
    got, middle, q = data.match_levels(x, like), slice(8, 56), np.linspace(0.02, 0.98, 49)
    for i in range(2):
        have, want = (t[i, 0, middle, middle].double().numpy() for t in (got, like))
        assert np.quantile(have, q) == pytest.approx(np.quantile(want, q), abs=0.02)
        by_rank = np.sort(want.ravel())[
            scipy.stats.rankdata(x[i, 0, middle, middle].numpy().ravel(), "ordinal") - 1
        ]
        assert have.ravel() == pytest.approx(by_rank, abs=0.03)
        order = x[i].flatten().argsort()
        assert (got[i].flatten()[order].diff() >= -0.006).all()  # one step of 1/255
    assert got[2].unique().numel() == 1 and float(got[2].mean()) == pytest.approx(
        float(like[2, 0, middle, middle].median()), abs=0.02
    )
    assert (data.match_levels(x, x) - x)[..., middle, middle].abs().max() <= 1 / 255
    assert data.match_levels(x.bfloat16(), like.bfloat16()).dtype == torch.bfloat16


def test_borrow_frame_takes_the_border_and_leaves_the_middle():
    x, other, width = (
        torch.full((4, 1, 100, 100), 0.2),
        torch.full((4, 1, 100, 100), 0.8),
        torch.tensor([0.0, 0.1, 0.2, 0.0]),
    )
    got = data.borrow_frame(x, other, width)
    assert torch.equal(got[[0, 3]], x[[0, 3]])
    for i, w in ((1, 10), (2, 20)):
        own = got[i, 0] == 0.2
        assert (
            own[w + 2 : 98 - w, w + 2 : 98 - w].all()
            and (got[i, 0, : w - 2] == 0.8).all()
            and (got[i, 0, :, 102 - w :] == 0.8).all()
        )
        assert 1 - (got[i] - 0.2).mean() / 0.6 == pytest.approx(
            (1 - 2 * w / 100) ** 2, abs=0.01
        )  # the area that stays


def test_frame_and_tone_come_from_the_batch_at_their_probability():
    """Both keep the labels' images: no image is replaced, about the given share is changed, and 0 draws nothing."""
    x = torch.arange(1, 401).view(-1, 1, 1, 1) / 500 * (0.5 + 0.5 * torch.rand(400, 1, 40, 40))
    torch.manual_seed(0)
    toned = data.Augment(**{**NONE, "tone": 0.5})(x)
    assert (toned != x).flatten(1).any(1).float().mean() == pytest.approx(0.5, abs=0.08)
    framed = data.Augment(**{**NONE, "frame": 0.5})(x)
    assert torch.equal(framed[..., 10:30, 10:30], x[..., 10:30, 10:30])
    assert (
        0.35 < (framed != x).flatten(1).any(1).float().mean() < 0.55
    )  # the narrowest frames are no pixel wide
    state = torch.get_rng_state()
    data.Augment(**NONE)(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_gamma_noise_and_erase_do_what_they_say():
    torch.manual_seed(0)
    half = torch.full((400, 1, 16, 16), 0.5)
    exponents = torch.log(data.Augment(**{**NONE, "gamma": 0.5})(half)[:, 0, 0, 0]) / math.log(0.5)
    assert exponents.min() >= math.exp(-0.5) - 1e-4 and exponents.max() <= math.exp(0.5) + 1e-4
    assert exponents.log().mean() == pytest.approx(0, abs=0.05) and exponents.log().std() == pytest.approx(
        0.5 / 3**0.5, abs=0.03
    )
    spread = data.Augment(**{**NONE, "noise": 0.05})(half).std(dim=(1, 2, 3))
    assert spread.max() < 0.06 and spread.mean() == pytest.approx(0.025, abs=0.004)
    erased = data.Augment(**{**NONE, "erase": 0.5})(torch.full((400, 1, 64, 64), 0.123)) != 0.123
    share = erased.float().mean(dim=(1, 2, 3))
    assert (share > 0).float().mean() == pytest.approx(0.5, abs=0.08)
    assert 0.02 < share[share > 0].min() and share.max() < 0.27
    box = erased[share.argmax(), 0]  # one solid rectangle
    rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
    assert box.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)


def test_aspect_widens_and_flattens():
    """A centred disc of radius 10 becomes an ellipse whose axes multiply to the same area."""
    y, x = torch.meshgrid(torch.arange(65.0) - 32, torch.arange(65.0) - 32, indexing="ij")
    disc = ((x**2 + y**2) <= 100).float().view(1, 1, 65, 65)
    full = torch.ones(1)
    wide = data.affine(disc, 0 * full, full, full, 0 * full, 0 * full, aspect=1.3 * full) > 0.5
    assert wide.any(2).sum() == pytest.approx(2 * 13, abs=2) and wide.any(3).sum() == pytest.approx(
        2 * 10 / 1.3, abs=2
    )


def test_normalise_modes():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(40, 200, (4, 32, 32), dtype=np.uint8))
    assert torch.equal(data.normalise(x, "none"), x.unsqueeze(1) / 255)
    standard = data.normalise(x, "standard")
    assert standard.mean(dim=(1, 2, 3)).numpy() == pytest.approx(np.full(4, 0.5), abs=1e-3)
    assert standard.std(dim=(1, 2, 3)).numpy() == pytest.approx(np.full(4, 0.22), abs=1e-3)
    flat = data.normalise(x, "equalise")
    for image, got in zip(x.numpy(), flat[:, 0].numpy()):  # mid-ranks, by scipy
        want = (scipy.stats.rankdata(image, method="average").reshape(image.shape) - 0.5) / image.size
        assert got == pytest.approx(want, abs=1e-5)
    darker = torch.from_numpy(
        (x.numpy().astype(float) ** 1.2 / 3).round().astype(np.uint8)
    )  # monotone, merges few levels
    assert torch.allclose(data.normalise(darker, "equalise"), flat, atol=0.05)


def test_normalise_reaches_training_calibration_and_prediction(bench, tmp_path):
    shutil.copytree(bench / "xray", tmp_path / "xray")
    assert (
        cli(
            "train_linear", "--data-dir", "xray", "--img-size", 32, "--normalise", "equalise", cwd=tmp_path
        ).code
        == 0
    )
    assert cli("calibrate", *FLOOR, cwd=tmp_path).code == 0
    rows = predict_rows(tmp_path, "xray/test", "--run", "outputs/linear")
    with (
        np.load(tmp_path / "outputs/linear/scores.npz") as file,
        np.load(bench / "outputs/linear/scores.npz") as plain,
    ):
        assert [float(r["p_pneumonia"]) for r in rows] == file["test_p1"].tolist()
        assert np.abs(file["test_p1"] - plain["test_p1"]).max() > 1e-3


def test_corruptions_keep_shape_and_change_the_image():
    import experiments

    image = data._draw_radiograph(np.random.default_rng(0), sick=True, shifted=False, side=96)
    for name, change in experiments.corruptions().items():
        out = change(image)
        assert out.shape == image.shape and out.dtype == np.uint8, name
        assert 1 < np.abs(out.astype(int) - image).mean() < 80, name


def test_reported_interval_never_claims_certainty():
    y, p = np.r_[np.zeros(20, int), np.ones(20, int)], np.linspace(0, 1, 40)
    row = metrics.summarize_at_threshold(y, p, 0.5)
    row["interval"] = metrics.intervals_at_threshold(y, p, 0.5, np.arange(40), n=200)
    assert row["interval"]["recall"]["bootstrap"] == [1.0, 1.0]
    assert metrics.reported_interval(row, "recall") == pytest.approx(metrics.wilson_interval(20, 20))
    row = metrics.summarize_at_threshold(y, p, 0.6)
    row["interval"] = metrics.intervals_at_threshold(y, p, 0.6, np.arange(40), n=200)
    assert metrics.reported_interval(row, "recall") == row["interval"]["recall"]["bootstrap"]


def test_load_nih_takes_clear_lungs_and_pneumonia_like_findings(tmp_path):
    import experiments

    (tmp_path / "images").mkdir()
    listed = {
        "a.png": "No Finding",
        "b.png": "Infiltration|Mass",
        "c.png": "Hernia",
        "d.png": "Pneumonia",
        "gone.png": "Pneumonia",
    }
    for i, name in enumerate(list(listed)[:4]):
        Image.fromarray(np.full((40, 40), 50 * i, np.uint8)).save(tmp_path / "images" / name)
    csv_path = tmp_path / "sample_labels.csv"
    csv_path.write_text(
        "Image Index,Finding Labels,Patient Age\n" + "".join(f"{k},{v},1\n" for k, v in listed.items())
    )
    config = data.DataConfig(str(tmp_path), 32, cache_dir=str(tmp_path / "cache"))
    nih = experiments.load_nih(tmp_path, config)
    assert nih.files == ["images/a.png", "images/b.png", "images/d.png"] and nih.labels.tolist() == [0, 1, 1]
    assert nih.images[nih.rows][:, 0, 0].tolist() == [0, 50, 150]
    for text, message in (
        ("Image Index\na.png\n", "Finding Labels"),
        ("Image Index,Finding Labels\na.png,No Finding\n", "1 images"),
        (None, "No such file"),
    ):
        csv_path.write_text(text) if text else csv_path.unlink()
        with pytest.raises(common.InputError, match=message):
            experiments.load_nih(tmp_path, config)


def test_border_alone_sees_the_border_and_nothing_else(tiny_npz):
    """Noise images whose class is told by the grey of a corner, or of the middle: separated, or at chance (sd 0.05)."""
    import experiments

    rng = np.random.default_rng(0)
    labels = np.arange(160) % 2
    for place, low, high in (((slice(0, 4),) * 2, 0.98, 1), ((slice(4, 28),) * 2, 0.3, 0.7)):
        images = rng.integers(0, 60, (160, 32, 32), np.uint8)
        images[(slice(None), *place)] += (labels * 150).astype(np.uint8)[:, None, None]
        train = data.Subset([f"{i}.png" for i in range(160)], labels, images, np.arange(160))
        before = images.copy()
        assert low <= experiments.border_alone(train, tiny_npz, torch.device("cpu")) <= high
        assert (images == before).all()


def test_borrowed_borders_come_from_the_class_asked_for():
    """Flat images, NORMAL dark and PNEUMONIA bright: the border shows whose it is, the middle stays."""
    import experiments

    labels = np.array([0, 0, 1, 1, 1])
    images = np.where(labels, 200, 50).astype(np.uint8)[:, None, None] + np.zeros((5, 64, 64), np.uint8)
    for other in (True, False):
        got = experiments.borrowed(images, labels, other)
        assert got.dtype == np.uint8 and (got[:, 16:48, 16:48] == images[:, 16:48, 16:48]).all()
        assert got[:, 0, 0].tolist() == np.where(labels == other, 50, 200).tolist()


def test_stamped_finds_the_template_whatever_its_contrast():
    import experiments

    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (40, 224, 224)).astype(np.uint8)
    template = rng.integers(0, 2, (8, 13)) * 200.0
    for i in range(0, 40, 3):  # brighter or darker, anywhere in the lower right corner
        y, x = rng.integers(197, 216), rng.integers(182, 211)
        images[i, y : y + 8, x : x + 13] = 20 + template * rng.uniform(0.4, 1.1)
    images[1, 20:28, 20:33] = template  # another corner
    subset = data.Subset([""] * 40, np.zeros(40, np.int64), images, np.arange(40))
    hit = experiments.stamped(subset, torch.from_numpy(template.astype(np.float32)))
    assert np.flatnonzero(hit).tolist() == list(range(0, 40, 3))


@pytest.mark.skipif(not (SHARED / "chest_xray").is_dir(), reason="needs the real set")
def test_one_unit_has_no_healthy_child_in_training(tmp_path):
    """The two images of test NORMAL that show the stamp to the eye are among the hits, and train NORMAL has none."""
    done = succeed("experiments", "--stamps", SHARED / "chest_xray", cwd=tmp_path)
    rows = {r.split(" | ")[0][2:]: r for r in done.out.splitlines() if r.startswith("| ")}
    assert rows["train"].split(" | ")[1] == "0 of 1073" and rows["validation"].split(" | ")[1] == "0 of 268"
    assert int(rows["test"].split(" | ")[1].split()[0]) >= 2


def test_experiments_prints_signals_and_keeps_them(bench, tmp_path):
    shutil.copytree(bench, tmp_path / "b")
    done = succeed("experiments", "--run", "outputs/linear", cwd=tmp_path / "b")
    header, _, row = [line for line in done.out.splitlines() if line.startswith("|")]
    values = dict(zip(header.split(" | "), row.split(" | ")))
    kept = read_json(tmp_path / "b/outputs/linear/signals.json")["signals"]
    with np.load(bench / "outputs/linear/scores.npz") as file:
        assert kept["val AUROC"] == pytest.approx(
            sklearn.metrics.roc_auc_score(file["val_labels"], file["val_p1"])
        )
    assert float(values["corrupted spec"]) == pytest.approx(kept["corrupted spec"], abs=6e-4)
    assert kept["choice"] == pytest.approx(
        (kept["borrowed AUROC"] + (kept["corrupted spec"] + kept["corrupted recall"]) / 2) / 2
    )
    assert kept["corrupted spec"] == pytest.approx(
        np.mean([v[1] for v in kept["corruptions"].values()]), abs=1e-4
    )
    refused(
        cli("experiments", "--run", "outputs/linear", "--against-test", cwd=tmp_path / "b"), "needs 4 runs"
    )


# ================================================================ recipes


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


def test_head_on_cached_features_equals_frozen_epochs(tmp_path):
    """Stage 1 against the plain loop that runs the frozen backbone in every step: the same head to rounding."""
    train, loss_fn = toy_subset(40, 0), engine.cross_entropy(None, 0.0)
    model = randomise(small_vit(in_chans=1))
    slow = randomise(small_vit(in_chans=1)).eval()
    slow.load_state_dict(model.state_dict())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    engine.fit_head(
        model,
        train,
        epochs=3,
        batch_size=8,
        lr=1e-2,
        weight_decay=0.05,
        loss_fn=loss_fn,
        mean=[0.5],
        std=[0.5],
        device=CPU,
        amp=False,
        seed=3,
    )
    optimizer = torch.optim.AdamW(slow.head.parameters(), lr=1e-2, weight_decay=0.05)
    for epoch in range(3):
        for index in torch.from_numpy(np.random.default_rng([3, epoch]).permutation(len(train))).split(8):
            x, y = data.Batches(train, CPU).get(index)
            optimizer.zero_grad()
            loss_fn(slow((x - 0.5) / 0.5), y).backward()
            optimizer.step()
    for name, value in model.state_dict().items():
        if name.startswith("head"):
            assert torch.allclose(value, slow.state_dict()[name], atol=1e-5) and not torch.equal(
                value, before[name]
            )
        else:
            assert torch.equal(value, before[name]), name


def test_masked_autoencoder_loss_by_brute_force():
    torch.manual_seed(0)
    encoder = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    model = randomise(
        vit.MaskedAutoencoder(encoder, 0.75, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    ).eval()
    x = torch.rand(2, 1, 16, 16).expand(-1, 3, -1, -1)
    errors = model(x)
    assert torch.equal(errors, model(x)) and errors.shape == (2, 1)  # eval hides the same patches again
    order = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)).argsort(1)
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


def test_benchmark_prints_its_table_as_json(synthetic, tmp_path):
    done = succeed(
        "benchmark",
        "--data-dir",
        synthetic,
        "--quick",
        "--img-size",
        32,
        "--images",
        8,
        "--workers",
        0,
        cwd=tmp_path,
    )
    result = json.loads(done.out.splitlines()[-1])
    assert [row["name"] for row in result["rows"]] == [
        "decode_small",
        "decode_original",
        "train_step_scratch",
        "train_step_ti16",
        "train_step_b16",
        "evaluate_scratch",
        "epoch_scratch",
        "epoch_scratch_originals",
        "frozen_stage",
    ]
    for row in result["rows"]:
        assert row.keys() == {
            "name",
            "unit",
            "ours",
            "baseline",
            "ratio",
            "ratio_min",
            "ratio_max",
            "peak_mib",
        }
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"] and row["unit"] == "images/s"
        assert row["ratio"] == pytest.approx(row["ours"] / row["baseline"])  # one turn
    assert set(result["fraction_of_peak"]) == {"train_step_scratch", "train_step_ti16", "train_step_b16"}
    assert result["matmul_peak_gflops"] > 0 and result["device"].startswith("cpu")
    refused(cli("benchmark", "--data-dir", "nowhere", cwd=tmp_path), "nowhere")
    refused(cli("benchmark", "--data-dir", synthetic, "--img-size", 30, cwd=tmp_path), "divisible by 16")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a switch of glibc")
def test_freed_memory_is_kept_for_the_next_tensors():
    """Page faults, counted by the kernel, of 20 tensors of 64 MiB (16,384 pages), one after the other. Without the switch
    each costs all of its pages; with it the first one does, and one more wherever a small block took the hole's end."""
    code = (
        "import resource, torch, engine; engine.keep_freed_memory({keep}); faults = lambda: resource.getrusage("
        "resource.RUSAGE_SELF).ru_minflt; before = faults()\n"
        "for _ in range(20): torch.ones(2**24)\n"
        "print(faults() - before)"
    )
    kept, returned = (
        int(
            subprocess.run(
                [sys.executable, "-c", code.format(keep=keep)],
                cwd=REPO,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for keep in (True, False)
    )
    assert kept < 10 * 2**14 and (
        returned > 18 * 2**14 or returned < kept
    )  # fewer where the system gives huge pages


def test_start_script_tells_time_memory_and_failure():
    import benchmark

    seconds, memory = benchmark.start_script("-c", "import time; x = b'1' * 2**26; time.sleep(0.3)")
    assert 0.3 <= seconds < 20 and (memory is None or 64 < memory < 400)
    with pytest.raises(common.InputError, match="the reason"):
        benchmark.start_script("-c", "import sys; sys.exit('the reason')")


def test_step_flops_against_torch_counter():
    """The formula against torch's own count of a forward and backward pass (which skips the gradient by the image)."""
    import benchmark
    from torch.utils.flop_counter import FlopCounterMode

    for name, size in (("scratch", 64), ("ti16", 224)):
        model = vit.build_vit(name, img_size=size)
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            model(torch.randn(1, 3, size, size, requires_grad=True)).sum().backward()
        assert benchmark.step_flops(vit.CONFIGS[name], size) == pytest.approx(
            counter.get_total_flops(), rel=1e-3
        )


def test_recipe_flag_chooses_the_defaults(monkeypatch):
    """--recipe swaps defaults, a flag given by hand wins over both, and results.json tells what was used."""
    import train_scratch

    def parsed(*argv):
        seen = {}
        monkeypatch.setattr(sys, "argv", ["train_scratch.py", *argv])
        monkeypatch.setattr(engine, "plans_from_args", lambda args: seen.update(vars(args)) or [])
        train_scratch.main()
        return seen

    default, paper = parsed(), parsed("--recipe", "paper")
    assert {k: default[k] for k in train_scratch.RECIPES["default"]} == train_scratch.RECIPES["default"]
    plain = vars(data.Augment()) | {
        "drop_rate": 0.1,
        "drop_path": 0.05,
        "patch_drop": 0.0,
        "ema": 0.0,
        "epochs": 15,
        "batch_size": 32,
        "lr": 3e-4,
        "label_smoothing": 0.05,
    }
    assert {k: paper[k] for k in plain} == plain
    assert parsed("--recipe", "paper", "--rotate", "3")["rotate"] == 3.0
    assert parsed("--patch-drop", "0.1")["patch_drop"] == 0.1


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_the_images(tmp_path):
    """50,000 cached images (200 MB) read twice over, in random order: resident memory stays within 40 MB."""
    array = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.uint8, shape=(50_000, 64, 64))
    array[::100] = 7
    array.flush()
    del array
    images = np.load(tmp_path / "a.npy", mmap_mode="r")
    batches = data.Batches(
        data.Subset([""] * 50_000, np.zeros(50_000, np.int64), images, np.arange(50_000)), CPU
    )

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    batches.get(torch.arange(64))
    before, most, seen = resident(), 0.0, 0
    for _ in range(2):
        for index in torch.from_numpy(np.random.default_rng(0).permutation(50_000)).split(64):
            x, _ = batches.get(index)
            seen += round(float(x[:, 0, 0, 0].sum() * 255 / 7))
            most = max(most, resident() - before)
    assert seen == 1000 and most < 40


@pytest.mark.parametrize("weight", [None, torch.tensor([3.0, 0.5])])
def test_accumulated_step_equals_the_whole_one(tmp_path, weight):
    """Batches in 3 uneven parts: the same losses and weights as in one part, class weights or not."""
    histories, ends = [], []
    for n in (1, 3):
        with pytest.MonkeyPatch.context() as patch:
            plain = vit.VisionTransformer
            patch.setattr(
                sys.modules[__name__],
                "small_vit",
                lambda drop_rate, drop_path_rate, **kw: plain(
                    **dict(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3), **kw
                ),
            )
            results = toy_fit(
                tmp_path / str(n),
                epochs=2,
                accumulate=n,
                augment=data.Augment(**NONE),
                loss_fn=engine.cross_entropy(weight, 0.05),
            )
        histories.append([(h["train_loss"], h["val_loss"]) for h in results["history"]])
        ends.append(load_pth(tmp_path, str(n), "last.pth")["model"])
    assert np.array(histories[1]) == pytest.approx(np.array(histories[0]), rel=1e-5)
    for name in ends[0]:
        assert torch.allclose(ends[0][name], ends[1][name], atol=2e-4), name


def test_two_processes_give_the_loss_of_one(synthetic, cache, tmp_path):
    """torchrun with 2 gloo processes against one process: same global batch, same losses and scores to rounding; one
    writer; a resume with another number of processes is refused."""
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
        "--drop-rate",
        0,
        "--drop-path",
        0,
        "--patch-drop",
        0,
        "--lr",
        1e-4,
        *itertools.chain(*((f"--{k}", 0) for k in vars(data.Augment()))),
    ]
    succeed("train_scratch", *flags, "--out", "one", cwd=tmp_path)

    def torchrun(*more):
        return popen(
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            2,
            REPO / "train_scratch.py",
            *flags,
            "--out",
            "two",
            *more,
            cwd=tmp_path,
        )

    process = torchrun()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, (tmp_path / "stderr.txt").read_text()
    assert out.count("model: scratch") == 1
    one, two = (read_json(tmp_path, name, "results.json") for name in ("one", "two"))
    for a, b in zip(one["history"], two["history"], strict=True):
        for key in ("train_loss", "val_loss", "val_auroc"):
            assert b[key] == pytest.approx(a[key], rel=2e-4), key
    process = torchrun("--resume")  # finished: nothing to do
    assert process.wait(timeout=120) == 0
    assert read_json(tmp_path, "two", "results.json")["history"] == two["history"]
    refused(
        cli("train_scratch", *flags, "--epochs", 2, "--out", "two", "--resume", cwd=tmp_path), "2 processes"
    )


def test_ema_is_the_average_of_the_steps_and_resumes(tmp_path):
    """Average by hand from the weights after each step; stopped in step 7 and resumed, it ends bit for bit the same."""
    captured, weights = [], []
    hook = importlib.import_module("torch.optim.optimizer").register_optimizer_step_post_hook(
        lambda *_: weights.append({n: p.detach().double().clone() for n, p in captured[0].named_parameters()})
    )
    try:
        toy_fit(tmp_path / "a", epochs=2, ema=0.8, capture=captured)
    finally:
        hook.remove()
    average = weights[0]
    for now in weights[1:]:
        average = {n: 0.8 * average[n] + 0.2 * now[n] for n in now}
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
    calls, plain = itertools.count(1), engine.cross_entropy(None, 0.05)

    def loss_fn(logits, y):
        if next(calls) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(logits, y)

    with pytest.raises(common.Interrupted):
        toy_fit(tmp_path / "b", epochs=2, ema=0.8, loss_fn=loss_fn)
    toy_fit(tmp_path / "b", epochs=2, ema=0.8, resume=True)
    assert same_tensors(load_pth(tmp_path, "b", "checkpoint.pth"), checkpoint)
    assert same_tensors(load_pth(tmp_path, "b", "last.pth")["average"], last["average"])


def test_masked_pretraining_feeds_the_scratch_arm(synthetic, cache, tmp_path):
    """pretrain_mae.py -> --init: the encoder arrives whole, head apart; the run is no candidate of calibrate or compare;
    a wrong folder, shape or split is refused."""
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
    assert run["recipe"]["init"] == "outputs/mae" and run["init"]["minutes"] == results["minutes"]
    refused(
        cli("train_scratch", *flags, "--overwrite", "--init", "outputs/scratch", cwd=tmp_path),
        "pretrain_mae.py",
    )
    refused(cli("train_scratch", *flags, "--overwrite", "--model", "ti16", cwd=tmp_path), "does not fit")
    refused(cli("train_scratch", *flags, "--overwrite", "--split-seed", 1, cwd=tmp_path), "--split")
    refused(cli("train_scratch", *flags, "--overwrite", "--init", "nowhere", cwd=tmp_path), "nowhere")


# ================================================================ explain.py


def tiny_vit(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = vit.VisionTransformer(
        **{**dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3), **kwargs}
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def test_rollout_by_hand():
    """(A + I) / 2 of both layers multiplied: [[.75, .25], [.05, .95]] @ [[.8, .2], [.1, .9]]."""
    import explain

    attention = torch.tensor([[[[0.6, 0.4], [0.2, 0.8]], [[0.5, 0.5], [0.1, 0.9]]]])
    assert torch.allclose(explain.rollout(attention), torch.tensor([[[0.625, 0.375], [0.135, 0.865]]]))
    model = tiny_vit()
    maps = explain.attention_rollout(model, torch.rand(5, 3, 32, 32))
    assert (
        maps.shape == (5, 4, 4) and (maps >= 0).all() and (maps.sum((1, 2)) < 1).all()
    )  # the rest is on [CLS]


@pytest.mark.parametrize("layer", [-1, 0])
def test_grad_cam_against_finite_differences(layer):
    import explain

    model, x = tiny_vit().double(), torch.rand(1, 3, 32, 32, dtype=torch.float64)
    kept, nudge = {}, {}

    def hook(module, inputs, output):
        kept["tokens"] = output.detach().clone()
        if nudge:
            output = output.clone()
            output[0, nudge["token"], nudge["channel"]] += nudge["by"]
        return output

    handle = model.blocks[layer].norm1.register_forward_hook(hook)
    with torch.no_grad():
        model(x)
        tokens, gradient = kept["tokens"], torch.zeros(2, 16, 24, dtype=torch.float64)
        for token in range(16):
            for channel in range(24):
                ends = []
                for by in (1e-5, -1e-5):
                    nudge.update(token=token + 1, channel=channel, by=by)
                    ends.append(model(x)[0])
                gradient[:, token, channel] = (ends[0] - ends[1]) / 2e-5
    handle.remove()
    want = (tokens[0, 1:] * gradient.mean(1, keepdim=True)).sum(-1).relu().view(2, 4, 4)  # one map a class
    assert want.max() > 1e-3
    for target in (0, 1):
        got = explain.grad_cam(model, x, target, layer)[0].double()
        assert torch.allclose(got, want[target], atol=1e-5, rtol=1e-4)


def test_grad_cam_against_the_grad_cam_package():
    package = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    import explain

    model, x = tiny_vit(3), torch.rand(3, 3, 32, 32)
    ours = explain.grad_cam(model, x, target=0)
    with package.GradCAM(
        model,
        [model.blocks[-1].norm1],
        reshape_transform=lambda t: t[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2),
    ) as cam:
        theirs = cam(x, [ClassifierOutputTarget(0)] * 3)  # scaled to [0, 1] and to 32 px

    def scaled(maps):
        maps = maps - maps.amin((1, 2), True)
        return maps / maps.amax((1, 2), True).clamp(min=1e-7)

    ours = torch.nn.functional.interpolate(scaled(ours)[:, None], size=(32, 32), mode="bilinear")[:, 0]
    assert theirs.max() > 0.5 and scaled(ours).numpy() == pytest.approx(
        theirs, abs=2e-3
    )  # the package scales twice


def test_explaining_leaves_the_model_as_it_was():
    import explain

    model = tiny_vit(img_size=384, patch_size=16).train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    x = torch.rand(2, 3, 384, 384)
    assert explain.grad_cam(model, x).shape == explain.attention_rollout(model, x).shape == (2, 24, 24)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    for p in model.parameters():
        p.requires_grad_(False)
    assert torch.isfinite(explain.grad_cam(model, x)).all()  # frozen models too


class OnePatch(torch.nn.Module):
    """Scores the brightness of one patch: the truth about which patch matters is known."""

    grid_size = (4, 4)

    def forward(self, x):
        z = 40 * (x[:, 0, 8:16, 16:24].mean((1, 2)) - 0.5)  # row 1, column 2: patch 6
        return torch.stack([-z, z], dim=1)


def test_deletion_and_insertion_know_the_patch_that_matters():
    import explain

    x = torch.full((2, 3, 32, 32), 0.2)
    x[:, :, 8:16, 16:24] = 0.9
    first = torch.tensor([[6] + [i for i in range(16) if i != 6]] * 2)
    deletion, insertion = explain.curves(OnePatch(), x, first)
    late_deletion, late_insertion = explain.curves(OnePatch(), x, first.flip(1))
    full, none = (
        1 / (1 + math.exp(-32)),
        engine.probabilities(OnePatch()(data.gaussian_blur(x[:, :1], torch.full((2,), 3.2))))[:, 1],
    )
    assert deletion[:, 0] == pytest.approx(full) and deletion[:, 1:] == pytest.approx(
        np.repeat(none[:, None], 14, 1), abs=1e-6
    )
    assert insertion[:, 0] == pytest.approx(none, abs=1e-6) and insertion[:, 1:] == pytest.approx(full)
    assert late_deletion[:, -2] == pytest.approx(full) and late_insertion[:, -2] == pytest.approx(
        none, abs=1e-6
    )


def test_regions_and_lung_mask():
    import explain

    images = np.stack(
        [data._draw_radiograph(np.random.default_rng(i), False, False, side=200) for i in range(4)]
    )
    y, x = np.mgrid[-1:1:200j, -1:1:200j]
    drawn = (((x + 0.42) / 0.3) ** 2 + (y / 0.62) ** 2 < 1) | (((x - 0.42) / 0.28) ** 2 + (y / 0.6) ** 2 < 1)
    for image in images:
        mask = explain.lung_mask(image)
        assert (mask & drawn).sum() / (mask | drawn).sum() > 0.5  # the drawn heart lies over one lung
    assert (
        0.1 < explain.lung_mask(np.full((100, 100), 128, np.uint8)).mean() < 0.5
    )  # nothing to see: the ellipses
    edge = np.zeros((4, 20, 20), np.float32)
    edge[:, 0] = edge[:, -1] = 1
    got = explain.regions(edge, images)
    assert got["border_share"]["mean"] > 0.95 and got["lung_share"]["mean"] < 0.02
    assert got["border_area"] == pytest.approx(1 - 0.8**2)
    even = explain.regions(np.ones((4, 20, 20), np.float32), images)
    assert even["border_share"]["mean"] == pytest.approx(0.36, abs=1e-3)
    assert even["lung_share"]["mean"] == pytest.approx(even["lung_area"], abs=1e-3)


def test_randomised_weights_change_cumulatively_and_leave_the_model():
    import explain

    model = tiny_vit()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    changed = []
    for name, broken in explain.randomised(model):
        changed.append((name, {n for n, p in broken.state_dict().items() if not torch.equal(p, before[n])}))
    assert [c[0] for c in changed] == ["head", "block 1", "block 0", "patches"]
    assert changed[0][1] == {"head.weight", "head.bias"}
    assert (
        all(a[1] < b[1] for a, b in zip(changed, changed[1:])) and "patch_embed.proj.weight" in changed[-1][1]
    )
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_pick_takes_confident_and_borderline_of_each_outcome():
    import explain

    y, p = np.array([1, 1, 1, 0, 0, 1, 0, 0]), np.array([0.99, 0.6, 0.7, 0.8, 0.55, 0.1, 0.45, 0.01])
    assert explain.pick(y, p, 0.5) == [
        ("true positive, most confident", 0),
        ("true positive, most borderline", 1),
        ("false positive, most confident", 3),
        ("false positive, most borderline", 4),
        ("false negative, most confident", 5),
        ("true negative, most confident", 7),
        ("true negative, most borderline", 6),
    ]


def test_explain_end_to_end(bench):
    run = bench / "outputs/scratch-seed0"
    done = cli("explain", "--run", run, "--tests", 4, cwd=bench)
    assert done.code == 0, done.err
    sheet = np.asarray(Image.open(run / "explain/sheet.png").convert("L"))
    assert sheet.std() > 20 and len(list((run / "explain").glob("*.png"))) >= 3
    report = common.read_json(run / "explain/explain.json")
    assert report["images"] == 4 and report["synthetic"]
    for method in ("gradcam", "rollout"):
        r = report[method]
        assert r["deletion_minus_random"]["mean"] == pytest.approx(
            r["deletion"]["mean"] - report["random"]["deletion"]["mean"]
        )
        assert r["randomised"][-1]["down_to"] == "patches"
    assert report["rollout"]["randomised"][0]["rank_correlation"] == pytest.approx(
        1
    )  # rollout does not know the head
    text = cli("compare", "--run", run, cwd=bench).out
    assert "lungs or at letters" in text
    done = cli("explain", "--run", run, "--split", "test", "--tests", 0, "--target", "NORMAL", cwd=bench)
    assert done.code == 0, done.err
    with np.load(run / "scores.npz") as file:  # the pictures are chosen on calibrate's own scores
        import explain

        thr = common.read_calibration(run)["threshold"]
        rows = explain.pick(file["test_labels"], file["test_p1"], thr)
        assert all((run / f"explain/{Path(file['test_files'][i]).stem}.png").exists() for _, i in rows)
    image = sorted((bench / "xray/test/NORMAL").iterdir())[0]
    assert cli("explain", image, "--run", run, "--method", "rollout", cwd=bench).code == 0
    assert (run / f"explain/{image.stem}.png").exists()
    for argv in (
        ["--run", bench / "outputs/linear"],
        ["--run", run, "--layer", 99],
        ["--run", run, "--target", "CAT"],
        [__file__, "--run", run],
        ["--run", bench / "nowhere"],
    ):
        done = cli("explain", *argv, cwd=bench)
        assert done.code == 2 and "Traceback" not in done.err, argv
