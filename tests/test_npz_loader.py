"""Tests of npz_loader."""

import math
import os
import pickle
import random
import re
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import scipy.stats
import timm
import torch

import npz_loader
from common.console import InputError
from common.safe_files import load_safetensors
from images import decode
from models.inputs import Inputs
from tests.shared import SHARED, Evil, google_arrays, randomise, same_tensors, vit_for
from vit import CONFIGS, VisionTransformer, build_vit


def save_npz(model, path):
    """Write a VisionTransformer in Google's layout."""
    arrays = npz_loader._to_google(model.state_dict(), model.config["num_heads"])
    np.savez(path, **{name: value.numpy() for name, value in arrays.items()})


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


@pytest.mark.parametrize(
    "ours, theirs, dim, heads, depth",
    [("ti16", "vit_tiny_patch16_224", 192, 3, 12), ("b16", "vit_base_patch16_224", 768, 12, 2)],
)
def test_npz_logits_against_timm_and_numpy(tmp_path, ours, theirs, dim, heads, depth):
    """A whole checkpoint, of ViT-B/16 two blocks: our loader = timm's = the Flax definition; then saved back,
    the same arrays."""
    w = google_arrays(dim=dim, depth=depth, heads=heads, patch=16, grid=14, classes=7)
    path = tmp_path / "weights.npz"
    np.savez(path, **w)
    with torch.device("meta"):
        model = build_vit(ours, num_classes=7, depth=depth)
    model = model.to_empty(device="cpu").eval()
    report = npz_loader.load_npz(model, path)
    assert sorted(report["loaded"]) == sorted(model.state_dict())
    assert (report["resized"], report["reset"], report["dropped"]) == ([], [], [])
    other = timm.create_model(theirs, num_classes=7, depth=depth, weight_init="skip").eval()
    other.load_pretrained(str(path))
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
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
    save_npz(model, tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz") as again:
        assert sorted(again.files) == sorted(w)
        for name in w:
            assert again[name].dtype == np.float32 and np.array_equal(again[name], w[name]), name
    path.unlink(), (tmp_path / "again.npz").unlink()


def test_npz_round_trip(tmp_path):
    model = randomise(vit_for())
    save_npz(model, tmp_path / "w.npz")
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
    for word in ("head.weight", "pre_logits/kernel", "drawn anew", "not used"):
        assert word in line


def test_a_head_that_reads_pre_logits_is_not_taken(tmp_path):
    """Though it has as many classes: it reads a layer that the model lacks."""
    extras = {"pre_logits/kernel": np.ones((12, 12), np.float32), "pre_logits/bias": np.ones(12, np.float32)}
    for more, reset in (({}, []), (extras, ["head.bias", "head.weight"])):
        np.savez(tmp_path / "w.npz", **google_arrays(classes=2), **more)
        report = npz_loader.load_npz(vit_for(), tmp_path / "w.npz")
        assert sorted(report["reset"]) == reset


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
    model = VisionTransformer(img_size=24, **config)
    assert npz_loader.load_npz(model, tmp_path / "w.npz")["reset"] == []
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "w.pth")
    expected = dict(patch_size=16, in_chans=3, embed_dim=192, depth=12, num_heads=3, mlp_ratio=4)
    assert npz_loader.config_from_npz(tmp_path / "w.pth") == expected


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
        ("absent", ["check the path", "WEIGHTS.md"]),
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
        ("misshapen", ["encoderblock_1/MlpBlock_3/Dense_1/kernel is (48, 11), needs (48, 12)"]),
        ("transposed", ["encoderblock_1/MlpBlock_3/Dense_1/kernel is (12, 48), needs (48, 12)"]),
        ("extra", ["encoderblock_1/LayerNorm_9/scale"]),
        ("integers", ["embedding/bias"]),
        ("NaN", ["blocks.1.attn.proj.bias"]),
        ("infinite", ["blocks.1.attn.qkv.bias"]),
        ("heads", ["4 heads", "has 3"]),
        ("heads of one block", ["query/kernel is (12, 4, 3), needs (12, 3, 4)"]),
        ("width", ["blocks.0.attn.qkv.weight"]),
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
    """Each array with a wrong shape in turn, even with the right number of elements, is refused by name."""
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
    """A changed byte or a cut anywhere in the file is refused or has no effect: never another error."""
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
    model = build_vit("ti16", depth=2).eval()
    report = npz_loader.load_npz(model, path)
    assert sorted(report["loaded"]) == sorted(model.state_dict())
    imagenet = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (report["mean"], report["std"]) == (imagenet if form == "DeiT" else ([0.5] * 3, [0.5] * 3))
    assert (
        report["source"].split()[0].rstrip(",")
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
        state["blocks.0.attn.gamma"] = torch.ones(12)
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
        "name": "blocks.0.attn.gamma",
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
    model = build_vit("ti16", num_classes=1000).eval()
    assert npz_loader.load_npz(model, path)["reset"] == []
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=1000).eval()
    theirs.load_pretrained(str(path))
    x = torch.rand(2, 3, 224, 224) * 2 - 1
    with np.load(path) as file, torch.no_grad():
        logits = model(x)
        assert torch.allclose(logits, theirs(x), atol=1e-4)
        expected = flax_forward({n: file[n] for n in file.files}, x.permute(0, 2, 3, 1).numpy())
    assert np.allclose(logits.numpy(), expected, atol=1e-3) and logits.std() > 0.5
    two = build_vit("ti16", img_size=384)
    report = npz_loader.load_npz(two, path)
    assert report["resized"] == ["pos_embed"] and sorted(report["dropped"]) == ["head.bias", "head.weight"]


# ---------------------------------------------------------------- hostile files


def _rename(state, old, new):
    return {n.replace(old, new): v for n, v in state.items()}


def _wide(state, name, axis, size=10**9):
    """`state` with one tensor of `size` along an axis, by strides of 0: a few bytes in the file."""
    shape = [1] * state[name].ndim
    shape[axis] = size
    return {**state, name: torch.ones([1] * len(shape)).expand(shape)}


# Each turns the state dict of a small ViT (2 blocks, width 12) into one that must be refused.
HOSTILE_STATES = {
    "meta": lambda s: {**s, "norm.bias": torch.empty(12, device="meta")},
    "sparse": lambda s: {**s, "norm.bias": s["norm.bias"].to_sparse()},
    "quantised": lambda s: {**s, "norm.bias": torch.quantize_per_tensor(s["norm.bias"], 0.1, 0, torch.qint8)},
    "scalar": lambda s: {**s, "norm.bias": torch.tensor(1.0)},
    "scalar for the patch embedding": lambda s: {**s, "patch_embed.proj.weight": torch.tensor(1.0)},
    "scalar for the positions": lambda s: {**s, "pos_embed": torch.tensor(1.0)},
    "axis of length 0": lambda s: {**s, "norm.bias": torch.ones(0)},
    "width 0": lambda s: {**s, "patch_embed.proj.weight": torch.ones(0, 3, 4, 4)},
    "hidden 0": lambda s: {**s, "blocks.0.mlp.fc1.weight": torch.ones(0, 12)},
    "positions 0": lambda s: {**s, "pos_embed": torch.ones(1, 0, 12)},
    "integer keys": lambda s: dict(enumerate(s.values())),
    "one integer key": lambda s: {**s, 7: torch.ones(3)},
    "integer values": lambda s: {**s, "norm.bias": torch.ones(12, dtype=torch.int64)},
    "complex values": lambda s: {**s, "norm.bias": torch.ones(12, dtype=torch.complex64)},
    "list in place of a tensor": lambda s: {**s, "norm.bias": [1.0] * 12},
    "nothing": lambda s: {},
    "nothing in model": lambda s: {"model": {}},
    "no blocks": lambda s: {n: v for n, v in s.items() if not n.startswith("blocks.")},
    "block x": lambda s: _rename(s, "blocks.1.", "blocks.x."),
    "one name in block x": lambda s: {**s, "blocks.x.norm1.bias": torch.ones(12)},
    "block without a number": lambda s: {**s, "blocks.": torch.ones(12)},
    "block 100000": lambda s: _rename(s, "blocks.1.", "blocks.100000."),
    "one name in block 100000": lambda s: {**s, "blocks.100000.norm1.bias": torch.ones(12)},
    "block of 5000 digits": lambda s: _rename(s, "blocks.1.", f"blocks.{'9' * 5000}."),
    "block 2 without 1": lambda s: _rename(s, "blocks.1.", "blocks.2."),
    "block 01": lambda s: _rename(s, "blocks.1.", "blocks.01."),
    "block in Arabic digits": lambda s: _rename(s, "blocks.1.", "blocks.\u0661."),
    "1001 blocks": lambda s: {**s, **{f"blocks.{i}.norm1.bias": torch.ones(1) for i in range(2, 1001)}},
    "width 10^9": lambda s: _wide(s, "patch_embed.proj.weight", 0),
    "channels 10^9": lambda s: _wide(s, "patch_embed.proj.weight", 1),
    "hidden 10^9": lambda s: _wide(s, "blocks.0.mlp.fc1.weight", 0),
    "positions 10^9": lambda s: _wide(s, "pos_embed", 1),
    "classes 10^9": lambda s: _wide(s, "head.weight", 0),
    "hidden width of the first block only": lambda s: {**s, "blocks.0.mlp.fc1.weight": torch.ones(99999, 12)},
    "patch embedding too wide": lambda s: {
        **s,
        "patch_embed.proj.weight": torch.ones(9999, 3, 4, 4),
    },
    "patches not square": lambda s: {**s, "patch_embed.proj.weight": torch.ones(12, 3, 4, 5)},
    "qkv flat": lambda s: {**s, "blocks.0.attn.qkv.weight": torch.ones(36 * 12)},
    "positions flat": lambda s: {**s, "pos_embed": torch.ones(5 * 12)},
    "one position": lambda s: {**s, "pos_embed": torch.ones(1, 1, 12)},
    "two position embeddings": lambda s: {**s, "pos_embed": torch.ones(2, 5, 12)},
    "head without a bias": lambda s: {n: v for n, v in s.items() if n != "head.bias"},
    "head without a weight": lambda s: {n: v for n, v in s.items() if n != "head.weight"},
    "head flat": lambda s: {**s, "head.weight": torch.ones(24)},
    "one tensor under every name": lambda s: {n: s["blocks.0.mlp.fc1.weight"] for n in s},
    "control characters": lambda s: {**s, "\x1b[31m\n" * 10**5: torch.ones(1)},
    "Hugging Face, query flat": lambda s: {
        **hugging_face_names(s),
        "vit.encoder.layer.0.attention.attention.query.weight": torch.ones(144),
    },
    "Hugging Face, query wider": lambda s: {
        **hugging_face_names(s),
        "vit.encoder.layer.0.attention.attention.query.weight": torch.ones(13, 12),
    },
    "Hugging Face, one array under two names": lambda s: {
        **hugging_face_names(s),
        "embeddings.cls_token": torch.ones(1, 1, 12),
    },
    "Hugging Face, block 2 without 1": lambda s: _rename(hugging_face_names(s), "layer.1.", "layer.2."),
    "Hugging Face, Arabic digits": lambda s: _rename(hugging_face_names(s), "layer.1.", "layer.\u0661."),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("what", HOSTILE_STATES)
def test_hostile_state_dict(tmp_path, what):
    state = {n: v.clone() for n, v in randomise(vit_for()).state_dict().items()}
    path = tmp_path / "w.pth"
    torch.save(HOSTILE_STATES[what](state), path)
    _refused_in_one_line(path)


_FIRST = "Transformer/encoderblock_0/"
HOSTILE_ARRAYS = {
    "scalar": lambda w: {**w, "embedding/bias": np.float32(1)},
    "scalar for the kernel": lambda w: {**w, "embedding/kernel": np.float32(1)},
    "axis of length 0": lambda w: {**w, "embedding/bias": np.ones(0, np.float32)},
    "width 0": lambda w: {**w, "embedding/kernel": np.ones((4, 4, 3, 0), np.float32)},
    "heads 0": lambda w: {
        **w,
        f"{_FIRST}MultiHeadDotProductAttention_1/query/kernel": np.ones((12, 0, 4), np.float32),
    },
    "5 heads for width 12": lambda w: {
        **w,
        f"{_FIRST}MultiHeadDotProductAttention_1/query/kernel": np.ones((12, 5, 2), np.float32),
    },
    "query flat": lambda w: {
        **w,
        f"{_FIRST}MultiHeadDotProductAttention_1/query/kernel": np.ones(144, np.float32),
    },
    "first query missing": lambda w: {
        n: a for n, a in w.items() if n != f"{_FIRST}MultiHeadDotProductAttention_1/query/kernel"
    },
    "complex values": lambda w: {**w, "embedding/bias": np.ones(12, np.complex64)},
    "text": lambda w: {**w, "embedding/bias": np.array(["a"] * 12)},
    "block x": lambda w: _rename(w, "encoderblock_1/", "encoderblock_x/"),
    "block 100000": lambda w: _rename(w, "encoderblock_1/", "encoderblock_100000/"),
    "one name in block 100000": lambda w: {
        **w,
        "Transformer/encoderblock_100000/LayerNorm_0/bias": np.ones(12, np.float32),
    },
    "block 2 without 1": lambda w: _rename(w, "encoderblock_1/", "encoderblock_2/"),
    "1001 blocks": lambda w: {
        **w,
        **{f"Transformer/encoderblock_{i}/x": np.ones(1, np.float32) for i in range(1001)},
    },
    "hidden width of the first block only": lambda w: {
        **w,
        f"{_FIRST}MlpBlock_3/Dense_0/kernel": np.ones((12, 9999), np.float32),
    },
    "patches not square": lambda w: {**w, "embedding/kernel": np.ones((4, 5, 3, 12), np.float32)},
    "positions flat": lambda w: {
        **w,
        "Transformer/posembed_input/pos_embedding": np.ones(60, np.float32),
    },
    "head flat": lambda w: {**w, "head/kernel": np.ones(24, np.float32)},
    "head without a kernel": lambda w: {n: a for n, a in w.items() if n != "head/kernel"},
}


@pytest.mark.parametrize("what", HOSTILE_ARRAYS)
def test_hostile_npz(tmp_path, what):
    path = tmp_path / "w.npz"
    np.savez(path, **HOSTILE_ARRAYS[what](google_arrays()))
    _refused_in_one_line(path)


@pytest.mark.parametrize("shape", [(4, 4, 3, 10**9), (10**12,), (10**6, 10**6, 10**6, 10**6)])
def test_npz_claims_more_than_it_holds(tmp_path, shape):
    """The header of one array claims a shape that the file cannot hold."""
    path = tmp_path / "w.npz"
    np.savez(path, **google_arrays())
    with zipfile.ZipFile(path, "a") as archive, archive.open("huge.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.write(bytes(64))
    _refused_in_one_line(path)


@pytest.mark.parametrize("suffix", [".npz", ".pth", ".safetensors"])
def test_weights_that_are_no_regular_file(tmp_path, suffix):
    pipe, folder = tmp_path / f"pipe{suffix}", tmp_path / f"folder{suffix}"
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (pipe, folder):
        _refused_in_one_line(path)


def _refused_in_one_line(path):
    """Both readers refuse the file in one short line; the model keeps its weights; little memory is taken."""
    model = vit_for()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (npz_loader.config_from_npz, lambda p: npz_loader.load_npz(model, p)):
        with pytest.raises(InputError) as error:
            read(path)
        text = str(error.value)
        assert path.name in text and len(text) < 3000 and text.isprintable(), text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KiB
    assert same_tensors(model.state_dict(), before)


@pytest.mark.parametrize("form", ["npz", "pth"])
def test_configuration_is_backed_by_the_file(tmp_path, form):
    """The model that a configuration describes has as many weights as the file, head and all."""
    donor = vit_for(dict(dim=24, depth=3, heads=4, patch=2, grid=3, classes=5), mlp_ratio=2.5)
    path = tmp_path / f"w.{form}"
    save_npz(donor, path) if form == "npz" else torch.save(donor.state_dict(), path)
    config = npz_loader.config_from_npz(path, heads=4)
    assert config == {**config, "embed_dim": 24, "depth": 3, "patch_size": 2, "mlp_ratio": 2.5}
    with torch.device("meta"):
        model = VisionTransformer(img_size=6, num_classes=5, **config)
    numbers = sum(p.numel() for p in model.parameters())
    assert numbers == sum(p.numel() for p in donor.parameters()) <= path.stat().st_size / 4


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0.safetensors"])
def test_other_real_weights_are_named_in_the_refusal(name):
    """Files of other architectures are refused for what they are, not for damage."""
    path = SHARED / "weights" / name
    if not path.exists():
        pytest.skip("no real weights here")
    with pytest.raises(InputError, match="holds a CNN .it has conv_stem.weight"):
        npz_loader.config_from_npz(path)


# ---------------------------------------------------------------- names


def _architecture(dim, depth, heads, patch, ratio=4.0):
    return dict(patch_size=patch, in_chans=3, embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=ratio)


def test_architecture_name():
    for name, known in CONFIGS.items():
        config = _architecture(known["embed_dim"], known["depth"], known["num_heads"], known["patch_size"])
        config |= {k: known[k] for k in ("layer_scale",) if k in known}
        assert npz_loader.architecture_name(config) == name
        assert npz_loader.architecture_name({**config, "reg_tokens": 4}) == f"{name}-reg4"
    s32 = _architecture(384, 12, 6, 32)
    with torch.device("meta"):
        model = VisionTransformer(num_classes=2, **s32)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 22.5
    assert npz_loader.architecture_name(s32) == "vit-d384-l12-h6-p32"
    for config, name in [  # each differs in one number from b16
        (_architecture(768, 12, 6, 16), "vit-d768-l12-h6-p16"),
        (_architecture(768, 12, 12, 14), "vit-d768-l12-h12-p14"),
        (_architecture(768, 11, 12, 16), "vit-d768-l11-h12-p16"),
        (_architecture(780, 12, 12, 16), "vit-d780-l12-h12-p16"),
        (_architecture(768, 12, 12, 16, 3.0), "vit-d768-l12-h12-p16-m3"),
    ]:
        assert npz_loader.architecture_name(config) == name


# ---------------------------------------------------------------- DINOv2


def dino_peer(registers, size=70):
    """timm's ViT as DINOv2 is made, of random weights throughout, and images at `size` px."""
    peer = timm.models.vision_transformer.VisionTransformer(
        img_size=size,
        patch_size=14,
        embed_dim=24,
        depth=3,
        num_heads=1,
        num_classes=0,
        reg_tokens=registers,
        no_embed_class=bool(registers),
        init_values=1e-5,
    )
    return randomise(peer).eval(), torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def loaded(path, size, **more):
    """Our model with the weights of a file, and the loader's report."""
    config = npz_loader.config_from_npz(path, heads=1 if path.suffix == ".pth" else None)
    model = VisionTransformer(img_size=size, **config, **more)
    return model.eval(), npz_loader.load_npz(model, path)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", [70, 42])
def test_dinov2_equals_timm(tmp_path, registers, size):
    """Positions of 5x5 patches, kept at 70 px and resized to 3x3 at 42; the file holds half precision."""
    peer, _ = dino_peer(registers)
    halved = {n: v.half() for n, v in peer.state_dict().items()}
    torch.save(halved, tmp_path / "w.pth")
    other, x = dino_peer(registers, size)
    state = timm.models.vision_transformer.checkpoint_filter_fn(
        {n: v.float() for n, v in halved.items()}, other, interpolation="bicubic", antialias=True
    )
    other.load_state_dict(state)
    model, report = loaded(tmp_path / "w.pth", size)
    assert report["source"] == "DINOv2" and report["mean"] == [0.485, 0.456, 0.406]
    assert report["resized"] == ([] if size == 70 else ["pos_embed"])
    assert model.config["layer_scale"] and model.config.get("reg_tokens", 0) == registers
    with torch.no_grad():
        expected, got = other.forward_features(x), model.forward_features(x)
        assert got.shape == expected.shape and torch.allclose(got, expected, atol=2e-5)
        explicit, attention = model.forward_features(x, return_attention=True)
    assert torch.allclose(explicit, got, atol=1e-4) and attention.shape[1] == 3


def test_dinov2_of_hugging_face_and_of_its_authors(tmp_path):
    """Hugging Face's own forward pass; the same weights under the names of the authors' files."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification

    settings = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=1, image_size=56, patch_size=14)
    peer = Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**settings, num_labels=3))
    randomise(peer).eval()
    torch.save(peer.state_dict(), tmp_path / "w.pth")
    x = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    model, report = loaded(tmp_path / "w.pth", 56, num_classes=3, readout="cls+mean")
    assert report["reset"] == [] and report["dropped"] == ["mask_token"]
    with torch.no_grad():
        expected = peer.dinov2_with_registers(x).last_hidden_state
        assert torch.allclose(model.forward_features(x), expected, atol=2e-5)
        assert torch.allclose(model(x), peer(x).logits, atol=1e-4)
    state = {n: v for n, v in model.state_dict().items() if not n.startswith("head.")}
    state["register_tokens"] = state.pop("reg_token")
    torch.save({**state, "mask_token": torch.zeros(1, 24)}, tmp_path / "authors.pth")
    again, report = loaded(tmp_path / "authors.pth", 56)
    assert report["reset"] == ["head.weight", "head.bias"] and report["dropped"] == ["mask_token"]
    with torch.no_grad():
        assert torch.equal(again.forward_features(x), model.forward_features(x))


def test_real_dinov2_equals_timm_on_real_images():
    path, folder = SHARED / "weights/dinov2_vits14.safetensors", SHARED / "chest_xray/train/PNEUMONIA"
    if not path.exists() or not folder.exists():
        pytest.skip("no real weights here")
    peer = timm.create_model("vit_small_patch14_dinov2", img_size=112, num_classes=0)
    state = {n: v.float() for n, v in load_safetensors(path).items()}
    peer.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, peer))
    model, report = loaded(path, 112)
    assert sum(p.numel() for p in model.parameters()) - 2 * 385 == sum(p.numel() for p in peer.parameters())
    assert npz_loader.architecture_name(model.config) == "s14"
    pixels = np.stack([decode.decode(f, 112) for f in sorted(folder.iterdir())[:2]])
    inputs = Inputs(tuple(report["mean"]), tuple(report["std"]), torch.device("cpu"))
    x = inputs.scale(inputs.grey(pixels))
    with torch.no_grad():
        assert torch.allclose(model.forward_features(x), peer.eval().forward_features(x), atol=1e-4)


def test_weights_with_swiglu_are_refused(tmp_path):
    state = {"blocks.0.mlp.w12.weight": torch.zeros(4, 4), "cls_token": torch.zeros(1, 1, 4)}
    torch.save(state, tmp_path / "g.pth")
    with pytest.raises(InputError, match="SwiGLU"):
        npz_loader.config_from_npz(tmp_path / "g.pth")
