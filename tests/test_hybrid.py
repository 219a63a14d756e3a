"""Tests of hybrid and train_hybrid."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import npz_loader
from common.console import InputError
from common.files import write_json
from common.task import Task
from images.split import epoch_order
from lungs.unet import LEAST
from models import build, hybrid
from models.inputs import Inputs
from tests.shared import CPU, cli, copy_set, load_pth, predict_rows, randomise, read_json, refused, succeed
from training.loss import Supervised
from vit import VisionTransformer

STEM = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=1)


def made(**changes):
    """A small hybrid with random weights throughout."""
    return randomise(hybrid.Hybrid(STEM, d_model=16, **{"token_grid": 2, "depth": 1, **changes}))


def shown(count=4, seed=0):
    """Scaled images and masks of two "lungs" each, float32 [count, 4, 32, 32]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 4, 32, 32)).astype(np.float32)
    x[:, 3] = 0
    for image in x:
        left = int(rng.integers(2, 6))
        image[3, 6:26, left : left + 8] = 1
        image[3, 6:26, left + 12 : left + 20] = 1
    return torch.from_numpy(x)


# ---------------------------------------------------------------- the cut and the tokens


def test_the_cut_is_the_mean_of_the_mask():
    masks = torch.zeros(5, 1, 20, 20)
    masks[0, 0, 5:15, 4:10] = 1  # columns 4 to 9: the mean is 7 / 20
    masks[1, 0, :, :2] = 1  # 0.05, held back from the edge
    masks[3] = 1  # no lungs are as large as the image
    masks[4, 0, 0, 0] = 1  # nor as small as this
    assert 1 / 400 < LEAST
    assert hybrid.midlines(masks).tolist() == pytest.approx([0.35, 0.25, 0.5, 0.5, 0.5])
    assert torch.allclose(hybrid.midlines(masks.flip(3)), 1 - hybrid.midlines(masks))


def test_bins_against_brute_force():
    """Each bin's mean, counted on a picture so fine that every edge lies between two of its pixels."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        side, count, fine = int(rng.integers(1, 9)), int(rng.integers(1, 6)), 840
        low, high = np.sort(rng.choice(np.arange(0, 21), 2, replace=False)) / 20
        values = rng.normal(size=side)
        weights = hybrid.overlaps(torch.tensor([low]), torch.tensor([high]), count, side)[0].double().numpy()
        at = (np.arange(fine * 20) + 0.5) / (fine * 20)
        inside = (at > low) & (at < high)
        number = np.minimum(((at[inside] - low) / (high - low) * count).astype(int), count - 1)
        picture = values[(at[inside] * side).astype(int)]
        expected = [picture[number == k].mean() for k in range(count)]
        assert weights @ values == pytest.approx(expected, abs=1e-3)


def test_pooling_is_torchs_on_either_half():
    neck, x = made(token_grid=2).neck, torch.randn(2, 3, 8, 8)
    left, right = neck.pool(x, torch.full((2,), 0.5)).unbind(1)
    for tokens, half in ((left, x[..., :4]), (right, x[..., 4:])):
        expected = F.adaptive_avg_pool2d(half, 2).flatten(2).transpose(1, 2)
        assert torch.allclose(tokens, expected, atol=1e-6)
    whole = made(global_tokens=True).neck.pool(x, torch.full((2,), 0.3))[:, 2]
    assert torch.allclose(whole, F.adaptive_avg_pool2d(x, 2).flatten(2).transpose(1, 2), atol=1e-6)


def test_tokens_of_one_side_see_that_side_alone():
    neck, x, cut = made().neck, torch.randn(3, 4, 16, 16), torch.tensor([0.3, 0.5, 0.6])
    other = x.clone()
    other[..., 10:] += 1  # right of every cut
    before, after = neck.pool(x, cut), neck.pool(other, cut)
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.allclose(before[:, 1], after[:, 1])


def test_cross_attention_is_torchs():
    torch.manual_seed(0)
    ours, peer = hybrid.CrossAttention(12, 3), torch.nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        peer.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
        peer.out_proj.weight.copy_(ours.proj.weight)
        peer.out_proj.bias.copy_(ours.proj.bias)
    query, tokens = torch.randn(2, 1, 12), torch.randn(2, 7, 12)
    read, attention = ours(query, tokens)
    expected, weights = peer(query, tokens, tokens)
    assert torch.allclose(read, expected, atol=1e-6) and torch.allclose(attention, weights[:, 0], atol=1e-6)


# ---------------------------------------------------------------- the losses


def test_lung_losses_by_hand():
    """Segmentation against NumPy; attention: its share off the lungs."""
    model, x = made(segment=True).train(), shown()
    model.head[0].p = 0.0
    for block in model.neck.blocks:
        block.attn.proj_drop.p = block.mlp.drop.p = 0.0
    out = model(x)
    assert out.shape == (4, 4)
    _, attention, share, large = model._read(x)
    assert torch.allclose(attention.sum(1), torch.ones(4), atol=1e-6)
    assert torch.allclose(out[:, 3], 1 - (attention * share).sum(1), atol=1e-6)
    logits = model.neck.segment(large).detach().double().numpy()[:, 0]
    masks = (torch.rand(4, 1, 112, 112) > 0.5).float()
    truth = masks.double().numpy()[:, 0].reshape(4, 56, 2, 56, 2).mean((2, 4))
    soft = 1 / (1 + np.exp(-logits))
    entropy = -(truth * np.log(soft) + (1 - truth) * np.log(1 - soft)).mean((1, 2))
    dice = (2 * (soft * truth).sum((1, 2)) + 1) / (soft.sum((1, 2)) + truth.sum((1, 2)) + 1)
    expected = torch.from_numpy(0.5 * entropy + 0.5 * (1 - dice)).float()
    assert torch.allclose(model._segmentation(large, masks), expected, atol=1e-5)
    assert torch.allclose(out[:, 2], model._segmentation(large, x[:, 3:]), atol=1e-5)
    assert made().train()(x)[:, 2].tolist() == [0.0] * 4
    x[1, 3], x[2, 3] = 0, 1  # no lungs were found there
    without = model(x)[:, 2:]
    assert (without[[1, 2]] == 0).all() and (without[[0, 3]] > 0).all()


def test_the_two_losses_come_on_top():
    targets, outputs = torch.tensor([0, 1, 1]), torch.randn(3, 4)
    weights = torch.tensor([0.5, 2.0])
    plain = Supervised(Task(), weights)
    both = Supervised(Task(), weights, segmentation=0.3, attention=0.7)
    extra = weights[targets] * (0.3 * outputs[:, 2] + 0.7 * outputs[:, 3])
    assert torch.allclose(both.losses(outputs, targets), plain.losses(outputs[:, :2], targets) + extra)
    assert torch.equal(both.losses(outputs[:, :2], targets), plain.losses(outputs[:, :2], targets))


def test_both_balances_draw_and_weigh():
    targets = np.array([0] * 5 + [1] * 95)
    assert np.array_equal(epoch_order(0, 3, targets, "both"), epoch_order(0, 3, targets, "sampler"))


# ---------------------------------------------------------------- the model


def test_every_parameter_has_a_gradient():
    model, x = made(segment=True, global_tokens=True).train(), shown()
    model(x).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == ["stem.head.weight", "stem.head.bias"]


def test_a_frozen_stem_is_as_without_training():
    model, x = hybrid.Hybrid({**STEM, "drop_path_rate": 0.5}, d_model=16), shown()
    model.train().freeze(True)
    assert not model.stem.training and model.neck.training
    model(x).sum().backward()
    assert all(p.grad is None for p in model.stem.parameters())
    assert all(p.grad is not None for p in model.neck.parameters())
    model.freeze(False)
    assert model.stem.training and model.stem.patch_embed.proj.weight.requires_grad


def test_mirrored_views_mirror_the_mask():
    """Test-time augmentation with mirrored views, against images and masks that are mirrored by hand."""
    model, x = made().eval(), shown()
    grey = torch.cat([x[:, :1].sigmoid(), x[:, 3:]], dim=1)
    one = Inputs((0.5,) * 3, (0.5,) * 3, CPU, reads_lungs=True)
    both = Inputs((0.5,) * 3, (0.5,) * 3, CPU, reads_lungs=True, views=(lambda z: z, lambda z: z.flip(3)))
    with torch.no_grad():
        expected = (one.logits(model, grey) + one.logits(model, grey.flip(3))) / 2
        unmirrored = torch.cat([grey[:, :1].flip(3), grey[:, 1:]], dim=1)
        assert torch.allclose(both.logits(model, grey), expected, atol=1e-6)
        assert not torch.allclose(one.logits(model, unmirrored), one.logits(model, grey.flip(3)), atol=1e-5)


@pytest.mark.parametrize("look", ["full", "crop", "masked-crop", "masked", "outside"])
def test_the_mask_follows_what_is_shown(look):
    """The last channel is the mask of the picture before it, cut as that is."""
    masks = shown()[:, 3].bool().numpy()
    pixels = np.where(masks, 200, 50).astype(np.uint8)
    inputs = Inputs((0.0,) * 3, (1.0,) * 3, CPU, input_mode=look, reads_lungs=True)
    scaled = inputs.scale(inputs.grey(pixels, masks))
    assert scaled.shape == (4, 4, 32, 32)
    on = scaled[:, 3] > 0.99
    grey = 0.5 if look == "outside" else 200 / 255
    assert torch.allclose(scaled[:, 0][on], torch.tensor(grey), atol=0.02)
    if look in ("crop", "masked-crop"):
        assert on.float().mean() > masks.mean() * 1.5


def test_bad_sizes():
    with pytest.raises(InputError, match="d_model 18"):
        hybrid.Hybrid(STEM, d_model=18)
    with pytest.raises(InputError, match="no option colour"):
        hybrid.Hybrid(STEM, colour=3)
    config = {"kind": "hybrid", **made().config}
    for change in ({"d_model": 10**9}, {"token_grid": 0}, {"stem": {**STEM, "depth": 10**6}}):
        with pytest.raises(InputError):
            build.build_model({**config, **change})


# ---------------------------------------------------------------- the script


def test_a_hybrid_drops_no_patches(tmp_path):
    refused(cli("train_hybrid", "--demo", "--patch-drop", 0.5, cwd=tmp_path), "--patch-drop is a flag of")


@pytest.fixture(scope="module")
def hybrids(flags, tiny_npz, own_build):
    """A folder with a calibrated hybrid of two seeds, with all options."""

    def build(cwd):
        argv = ("train_hybrid", *flags, "--weights", tiny_npz, "--batch-size", 16, "--d-model", 24)
        argv = (*argv, "--epochs", 3, "--frozen-epochs", 1, "--seg-weight", 0.5, "--attention-weight", 0.3)
        done = succeed(*argv, "--global-tokens", "--seeds", 0, 1, cwd=cwd)
        assert "stage: all but the stem, 1 epoch" in done.err and "stage: everything, 2 epochs" in done.err
        succeed("calibrate", "--min-recall", 0.9, "--bootstrap", 100, cwd=cwd)

    return own_build("hybrids", build)[0]


def test_stages_of_the_script(hybrids, flags, tiny_npz, tmp_path):
    results = read_json(hybrids, "outputs/hybrid-seed0/results.json")
    rates = [row["lr"] for row in results["history"]]
    assert rates == pytest.approx([3e-4, 6e-5, 6e-5])
    assert results["model_config"]["global_tokens"] and results["data"]["reads_lungs"]
    argv = ("train_hybrid", *flags, "--weights", tiny_npz, "--batch-size", 16, "--ema", 0)
    succeed(*argv, "--epochs", 1, "--frozen-epochs", 1, cwd=tmp_path)
    weights = load_pth(tmp_path, "outputs/hybrid/checkpoint.pth")
    stem = VisionTransformer(**{**npz_loader.config_from_npz(tiny_npz), "img_size": 32, "num_classes": 1})
    npz_loader.load_npz(stem, tiny_npz)
    kept = {n: v for n, v in stem.state_dict().items() if not n.startswith("head.")}
    assert all(torch.equal(weights[f"stem.{n}"], v) for n, v in kept.items())
    later = load_pth(hybrids, "outputs/hybrid-seed0/last.pth")["model"]
    assert not torch.equal(later["stem.blocks.0.attn.qkv.weight"], kept["blocks.0.attn.qkv.weight"])


def test_a_hybrid_in_other_scripts(hybrids, synthetic, tmp_path):
    folder = "outputs/hybrid-seed0"
    rows = predict_rows(hybrids, "--run", folder, synthetic / "test")
    scores = np.load(hybrids / folder / "scores.npz", allow_pickle=False)
    assert sorted(float(r["p_pneumonia"]) for r in rows) == pytest.approx(sorted(scores["test_p1"]), abs=1e-6)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "black.png")
    assert "cut in the middle where left and right are read apart" in cut_in_the_middle(
        hybrids, synthetic, tmp_path
    )
    (row,) = predict_rows(hybrids, "--run", folder, tmp_path / "black.png")
    assert "no lungs found: the whole image was used, cut in the middle" in row["note"]
    assert 0 <= float(row["p_pneumonia"]) <= 1
    succeed("calibrate", "--run", folder, "--min-recall", 0.9, "--tta-flip", cwd=hybrids)
    succeed("explain", "--run", folder, "--tests", 2, cwd=hybrids)
    assert "gradcam" in read_json(hybrids, folder, "explain/val/explain.json")
    refused(cli("explain", "--run", folder, "--method", "rollout", cwd=hybrids), "no attention")
    both = ("outputs/hybrid-seed0", "outputs/hybrid-seed1")
    succeed("calibrate", "--ensemble", *both, "--out", "outputs/both", "--min-recall", 0.9, cwd=hybrids)
    rows = predict_rows(hybrids, "--run", "outputs/both", synthetic / "test")
    single = [np.load(hybrids / one / "scores.npz", allow_pickle=False)["test_p1"] for one in both]
    expected = sorted(np.mean(single, axis=0))
    assert sorted(float(r["p_pneumonia"]) for r in rows) == pytest.approx(expected, abs=2e-6)
    assert "beside them the lungs by lung_unet.safetensors; pixels" in succeed("compare", cwd=hybrids).out


def test_an_ensemble_of_a_hybrid_and_a_model_without_lungs(hybrids, flags, synthetic):
    """The mean of the two, whichever is named first: masks are found because one of them needs them."""
    argv = ("train_linear", *flags, "--out", "plain/linear")
    succeed(*argv, cwd=hybrids)
    succeed("calibrate", "--run", "plain/linear", "--min-recall", 0.9, cwd=hybrids)
    two = ("plain/linear", "outputs/hybrid-seed0")
    succeed("calibrate", "--ensemble", *two, "--out", "plain/both", "--min-recall", 0.9, cwd=hybrids)
    results = read_json(hybrids, "outputs/hybrid-seed1/results.json")
    shutil.copytree(hybrids / "outputs/hybrid-seed1", hybrids / "plain/other")
    results["data"]["lungs_sha256"] = "0" * 64
    write_json(hybrids / "plain/other/results.json", results)
    three = ("calibrate", "--ensemble", *two, "plain/other", "--out", "plain/three")
    refused(cli(*three, cwd=hybrids), "differ in --lungs")
    single = [np.load(hybrids / one / "scores.npz", allow_pickle=False)["test_p1"] for one in two]
    rows = predict_rows(hybrids, "--run", "plain/both", synthetic / "test")
    assert sorted(float(r["p_pneumonia"]) for r in rows) == pytest.approx(
        sorted(np.mean(single, axis=0)), abs=2e-6
    )


def cut_in_the_middle(folder, synthetic, tmp_path):
    """What training says of a set with a black image."""
    root = copy_set(synthetic, tmp_path)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(root / "train/NORMAL/black.png")
    results = read_json(folder, "outputs/hybrid-seed0/results.json")
    argv = ("train_hybrid", "--data-dir", root, "--cache-dir", tmp_path / "c", "--img-size", 32)
    argv = (*argv, "--weights", results["weights"]["path"], "--max-steps", 1, "--epochs", 1)
    return succeed(*argv, "--out", "outputs/black", cwd=tmp_path).err


def test_wrong_input_to_the_hybrid(flags, tiny_npz, tmp_path):
    argv = ("train_hybrid", *flags[:4], "--weights", tiny_npz)
    refused(cli(*argv, "--depth", 300, cwd=tmp_path), "--depth", "[1, 256]")  # as a run folder may hold
    refused(cli(*argv, "--img-size", 40, cwd=tmp_path), "40x40", "patch size 16", "take")
    refused(cli(*argv, "--img-size", 32, "--d-model", 30, cwd=tmp_path), "d_model 30")
    refused(cli("train_hybrid", *flags, "--weights", "nowhere.npz", cwd=tmp_path), "nowhere.npz")
    refused(
        cli(*argv, "--img-size", 32, "--lungs", "nowhere.npz", cwd=tmp_path),
        "lung masks nowhere.npz",
        "--lungs",
    )
