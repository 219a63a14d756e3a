"""Tests of augment."""

import itertools
import math
import os
import re
import shutil
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF

from common.cli import Parser
from common.console import InputError
from images import augment, decode
from images.drawn import draw_radiograph, make_synthetic
from layouts import download
from layouts.folders import list_images
from layouts.listing import patient_id
from models import inputs
from tests.shared import NONE, folder_bytes, picture_batch, touch


def extremes(monkeypatch, x, **settings):
    """The augmentation with every random number at its largest and at its smallest."""
    out = []
    for value in (1.0, 0.0):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *size, **kwargs: torch.full(size, value))
            out.append(augment.Augment(**{**NONE, **settings})(x))
    return out


def test_augment_all_zero_is_identity():
    x = torch.rand(4, 1, 16, 16)
    assert torch.equal(augment.Augment(**NONE)(x), x)


def test_augment_flip():
    x = torch.rand(200, 1, 8, 8)
    assert torch.allclose(augment.Augment(**{**NONE, "hflip": 1.0})(x), x.flip(-1), atol=1e-5)
    torch.manual_seed(0)
    y = augment.Augment(**{**NONE, "hflip": 0.25})(x)
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


def test_a_box_is_cut_out_as_torchvision_does():
    """The middle of the result; at its edge torchvision repeats pixels, here the neighbours count."""
    x = picture_batch()
    left, top, width, height = 6, 3, 16, 20  # of 32 px
    want = TF.resized_crop(x, top, left, height, width, [32, 32], antialias=False)
    box = torch.tensor([[width, height, 2 * left + width - 32, 2 * top + height - 32]]) / 32
    same = (torch.zeros(len(x)), *torch.ones(2, len(x)), *torch.zeros(2, len(x)))
    found = augment.affine(x, *same, box=box.expand(len(x), 4))
    assert torch.allclose(found[..., 2:-2, 2:-2], want[..., 2:-2, 2:-2], atol=1e-4)
    assert (found - x).abs().mean() > 0.01
    turn = (torch.full((len(x),), 0.4), *same[1:3], torch.full((len(x),), 0.1), same[4])
    whole = TF.resized_crop(augment.affine(x, *turn), top, left, height, width, [32, 32], antialias=False)
    both = augment.affine(x, *turn, box=box.expand(len(x), 4))  # one resampling: as sharp or sharper
    assert (both - whole)[..., 2:-2, 2:-2].abs().mean() < 0.2 * (both - x).abs().mean()


def test_augment_crop():
    """Areas from the least to all, of the shapes that were asked for, anywhere, and never over the edge."""
    torch.manual_seed(0)
    side = 64
    ramps = torch.linspace(0, 1, side).expand(4000, side, side)
    x = torch.stack([ramps, ramps.transpose(1, 2)], 1)  # values are places; the second only moves along
    found = augment.Augment(**{**NONE, "crop": 0.1})(x)
    across = (found[:, 0, :, -1] - found[:, 0, :, 0]).mean(1)
    down = (found[:, 1, -1] - found[:, 1, 0]).mean(1)
    area, ratio = across * down, across / down
    assert 0.1 - 1e-3 < area.min() < 0.105 and area.max() > 0.97
    assert abs(area.mean() - 0.545) < 0.02  # uniform, but for sides that are cut to the whole
    small = area < 0.5  # of these none is cut: 0.5 * 4 / 3 < 1
    assert abs(ratio[small].log()).max() < math.log(4 / 3) + 1e-3 and abs(ratio[small].log().mean()) < 0.02
    assert found.min() >= 0 and found.max() <= 1 and (found[:, 0, :, 0] <= 0.02).any()
    middle = found[small, 0].mean((1, 2))
    assert abs(middle.mean() - 0.5) < 0.02 and middle.std() > 0.1
    ones = augment.Augment(**{**NONE, "crop": 0.1})(torch.ones(500, 1, 8, 8))
    assert torch.allclose(ones, torch.ones(()), atol=1e-5)  # no black comes in


def test_augment_rotation_keeps_lengths():
    """No shear: a disc stays a disc at any angle."""
    y, x = np.mgrid[-15.5:16, -15.5:16]
    disc = torch.from_numpy((1 / (1 + np.exp(2 * (np.hypot(x, y) - 10)))).astype(np.float32))[None, None]
    turned = augment.Augment(**{**NONE, "rotate": 180})(disc.expand(20, 1, 32, 32))
    assert (turned - disc).abs().max() < 0.1


def test_augment_brightness_and_contrast():
    torch.manual_seed(0)
    grey = torch.full((4000, 1, 4, 4), 0.5)
    added = augment.Augment(**{**NONE, "brightness": 0.1})(grey)
    assert (added.amax((1, 2, 3)) == added.amin((1, 2, 3))).all()
    change = (added - grey)[:, 0, 0, 0]
    assert change.abs().max() <= 0.1 + 1e-6 and change.max() > 0.099 and change.min() < -0.099
    assert abs(change.mean().item()) < 4 * 0.1 / math.sqrt(3 * 4000)  # uniform: variance bound^2 / 3
    steps = torch.tensor([0.4, 0.6]).repeat(4000, 1, 4, 2)
    stretched = augment.Augment(**{**NONE, "contrast": 0.2})(steps)
    assert torch.allclose(stretched.mean((1, 2, 3)), torch.tensor(0.5), atol=1e-6)
    factor = (stretched[:, 0, 0, 1] - stretched[:, 0, 0, 0]) / 0.2
    assert (
        factor.min() >= 0.8 - 1e-5
        and factor.max() <= 1.2 + 1e-5
        and factor.min() < 0.803
        and factor.max() > 1.197
    )
    bright = augment.Augment(**{**NONE, "brightness": 1.0})(torch.rand(50, 1, 4, 4))
    assert bright.min() >= 0 and bright.max() <= 1


def test_augment_each_image_by_itself():
    """An image's result depends on no other image of the batch, and equal images get different changes."""
    x = picture_batch(6)
    other = x.clone()
    other[1:] = torch.rand(5, 1, 32, 32)
    results = []
    for batch in (x, other):
        torch.manual_seed(0)
        results.append(augment.Augment(hflip=0.5)(batch)[0])
    assert torch.allclose(*results, atol=1e-6)
    same = augment.Augment()(x[:1].expand(6, 1, 32, 32))
    assert all((same[i] - same[j]).abs().max() > 0.01 for i, j in itertools.combinations(range(6), 2))


def test_synthetic_set(tmp_path, synthetic):
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    make_synthetic(a, train=16, test=8)
    make_synthetic(b, train=16, test=8)
    make_synthetic(c, train=16, test=8, seed=1)
    assert folder_bytes(a) == folder_bytes(b)
    assert (
        folder_bytes(a)["train/NORMAL/IM-0001-0001.jpeg"] != folder_bytes(c)["train/NORMAL/IM-0001-0001.jpeg"]
    )
    stamp = os.stat(a / "SYNTHETIC").st_mtime_ns
    make_synthetic(a, train=16, test=8)
    assert os.stat(a / "SYNTHETIC").st_mtime_ns == stamp  # kept, not drawn again
    make_synthetic(a, train=24, test=8)
    assert len(list_images(a, "train")[0]) == 24  # another size: drawn again
    files, labels, *_ = list_images(synthetic, "train")
    assert np.bincount(labels).tolist() == [36, 60]  # three in eight are NORMAL
    assert np.bincount(list_images(synthetic, "test")[1]).tolist() == [15, 25]
    assert all(
        re.match(r"(person\d+_(bacteria|virus)_\d+|IM-\d{4}-\d{4})\.jpeg$", Path(f).name) for f in files
    )
    assert len({patient_id(f) for f in files}) < 96  # some patients have several images
    train, test = (
        np.stack([decode.decode(synthetic / f, 32) for f in list_images(synthetic, s)[0]])
        for s in ("train", "test")
    )
    assert test.mean() < train.mean() - 5 and test.std(axis=(1, 2)).mean() < train.std(axis=(1, 2)).mean()
    assert (synthetic / "SYNTHETIC").exists()  # by which the data set is known as drawn


def test_synthetic_never_replaces_a_foreign_folder(tmp_path):
    touch(tmp_path, "real/train/NORMAL/a.jpeg")
    with pytest.raises(InputError, match="was not drawn"):
        make_synthetic(tmp_path / "real", train=8, test=8)
    assert list(folder_bytes(tmp_path)) == ["real/train/NORMAL/a.jpeg"]


def test_download_explains_the_steps_by_hand(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # as if not installed
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError) as error:
        download.download(tmp_path / "chest")
    for word in ("kagglehub", "kaggle.com/datasets/paultimothymooney", str(tmp_path / "chest"), "unzip"):
        assert word in str(error.value)
    touch(tmp_path, "chest/train/NORMAL/a.jpeg")
    assert download.download(tmp_path / "chest") is None  # already there: nothing to do


def test_tta_views_shift_zoom_and_mirror():
    x = torch.rand(2, 1, 100, 100)
    views = augment.tta_views(flip=True)
    assert len(views) == 14 and views[0](x) is x
    right = views[1](x)  # the grid moves by +3 px, so the picture moves left
    assert torch.allclose(right[..., :97], x[..., 3:], atol=1e-4) and right[..., 97:].abs().max() < 1e-4
    assert torch.allclose(views[7](x), x.flip(-1), atol=1e-4)


def test_gaussian_blur_equals_scipy():
    x = torch.rand(3, 1, 40, 40)
    sigma = torch.tensor([0.7, 1.5, 3.0])
    got = augment.gaussian_blur(x, sigma)
    for i in range(3):
        radius = math.ceil(9.0)  # the widest kernel serves all
        want = scipy.ndimage.gaussian_filter(
            x[i, 0].double().numpy(), float(sigma[i]), mode="nearest", truncate=radius / float(sigma[i])
        )
        assert got[i, 0].numpy() == pytest.approx(want, abs=1e-5)


def test_match_levels_is_quantile_mapping():
    """Against rank statistics: in its middle every image gets the quantiles of the other one, and keeps its
    own order."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(
        np.stack([rng.beta(4, 2, (64, 64)), rng.beta(2, 5, (64, 64)), np.full((64, 64), 0.4)])
    ).float()[:, None]
    like = torch.from_numpy(
        np.stack([rng.normal(0.6, 0.1, (64, 64)).clip(0, 1), rng.random((64, 64)), rng.random((64, 64))])
    ).float()[:, None]
    got, middle, q = augment.match_levels(x, like), slice(8, 56), np.linspace(0.02, 0.98, 49)
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
    assert (augment.match_levels(x, x) - x)[..., middle, middle].abs().max() <= 1 / 255
    assert augment.match_levels(x.bfloat16(), like.bfloat16()).dtype == torch.bfloat16


def test_borrow_frame_takes_the_border_and_leaves_the_middle():
    x, other, width = (
        torch.full((4, 1, 100, 100), 0.2),
        torch.full((4, 1, 100, 100), 0.8),
        torch.tensor([0.0, 0.1, 0.2, 0.0]),
    )
    got = augment.borrow_frame(x, other, width)
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
    """Both keep the labels' images: no image is replaced, about the given share is changed, and 0 draws
    nothing."""
    x = torch.arange(1, 401).view(-1, 1, 1, 1) / 500 * (0.5 + 0.5 * torch.rand(400, 1, 40, 40))
    torch.manual_seed(0)
    toned = augment.Augment(**{**NONE, "tone": 0.5})(x)
    assert (toned != x).flatten(1).any(1).float().mean() == pytest.approx(0.5, abs=0.08)
    framed = augment.Augment(**{**NONE, "frame": 0.5})(x)
    assert torch.equal(framed[..., 10:30, 10:30], x[..., 10:30, 10:30])
    assert (
        0.35 < (framed != x).flatten(1).any(1).float().mean() < 0.55
    )  # the narrowest frames are no pixel wide
    state = torch.get_rng_state()
    augment.Augment(**NONE)(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_gamma_noise_and_erase_do_what_they_say():
    torch.manual_seed(0)
    half = torch.full((400, 1, 16, 16), 0.5)
    exponents = torch.log(augment.Augment(**{**NONE, "gamma": 0.5})(half)[:, 0, 0, 0]) / math.log(0.5)
    assert exponents.min() >= math.exp(-0.5) - 1e-4 and exponents.max() <= math.exp(0.5) + 1e-4
    assert exponents.log().mean() == pytest.approx(0, abs=0.05) and exponents.log().std() == pytest.approx(
        0.5 / 3**0.5, abs=0.03
    )
    spread = augment.Augment(**{**NONE, "noise": 0.05})(half).std(dim=(1, 2, 3))
    assert spread.max() < 0.06 and spread.mean() == pytest.approx(0.025, abs=0.004)
    erased = augment.Augment(**{**NONE, "erase": 0.5})(torch.full((400, 1, 64, 64), 0.123)) != 0.123
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
    wide = augment.affine(disc, 0 * full, full, full, 0 * full, 0 * full, aspect=1.3 * full) > 0.5
    assert wide.any(2).sum() == pytest.approx(2 * 13, abs=2) and wide.any(3).sum() == pytest.approx(
        2 * 10 / 1.3, abs=2
    )


def test_unit_grey_is_a_255th_of_a_pixel():
    x = torch.arange(256, dtype=torch.uint8).view(4, 8, 8)
    assert torch.equal(inputs.unit_grey(x), x.unsqueeze(1) / 255) and x.dtype == torch.uint8


def test_presets_are_the_recipes_of_the_experiments():
    """The numbers that earlier versions had, written out."""
    plain = dict(rotate=7, translate=0.05, scale=0.1, brightness=0.1, contrast=0.15)
    robust = {**plain, "scale": 0.2, "gamma": 0.3, "blur": 0.5, "noise": 0.05}
    strong = dict(rotate=15, translate=0.1, scale=0.25, aspect=0.15, brightness=0.25, contrast=0.4, gamma=0.5)
    for name, expected in (("none", {}), ("plain", plain), ("robust", robust), ("strong", strong)):
        found = {k: v for k, v in vars(augment.PRESETS[name]).items() if v}
        assert found == expected, name


def test_augment_flag():
    """NAME, then single changes."""
    strong = augment.PRESETS["strong"]
    assert augment.parse_augment("strong") == strong
    changed = augment.parse_augment("strong,rotate=10,noise=0,frame=.5")
    assert (changed.rotate, changed.noise, changed.frame, changed.scale) == (10, 0, 0.5, strong.scale)
    wrong = [
        "",
        "wild",
        "rotate=3",
        "plain,",
        "plain,wings=1",
        "plain,rotate",
        "plain,rotate=x",
        "plain,rotate=-1",
    ]
    wrong += ["plain,rotate=181", "plain,scale=1", "plain,blur=nan", "plain,noise=inf"]
    wrong += ["plain,hflip=1.1", "plain,crop=1.1"]
    for text in wrong:
        with pytest.raises(InputError, match="--augment") as error:
            augment.parse_augment(text)
        assert "\n" not in str(error.value)
    assert set(augment.UNITS) == set(vars(strong))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mix_is_torchvisions_with_soft_targets(kind):
    """The same images, and the loss of torchvision's soft targets."""
    from torchvision.transforms import v2

    x, y = torch.rand(6, 1, 16, 16), torch.tensor([0, 1, 1, 2, 0, 1])
    logits, shares = torch.randn(6, 3), set()
    for seed in range(8):
        torch.manual_seed(seed)
        torch.randint(1, ())  # the choice between the kinds
        peer = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[kind](alpha=0.7, num_classes=3)
        expected, soft = peer(x, y)
        torch.manual_seed(seed)
        mixed, share = augment.Mix(**{kind: 0.7})(x)
        assert torch.equal(mixed, expected)
        want = F.cross_entropy(logits, soft, reduction="none")
        hard = [F.cross_entropy(logits, t, reduction="none") for t in (y, y.roll(1, 0))]
        assert torch.allclose(share * hard[0] + (1 - share) * hard[1], want, atol=1e-5)
        shares.add(round(share, 3))
    assert len(shares) > 4


def test_mix_of_both_kinds_and_of_one_image():
    torch.manual_seed(0)
    x, both = torch.rand(4, 1, 16, 16), augment.Mix(0.5, 0.5)
    kinds = {bool((torch.isin(both(x)[0], x)).all()) for _ in range(12)}
    assert kinds == {True, False}  # CutMix moves pixels, MixUp makes new ones
    alone, share = augment.Mix(0.5)(x[:1])
    assert torch.allclose(alone, x[:1]) and share == pytest.approx(1)


# ---------------------------------------------------------------- RandAugment


@pytest.mark.parametrize("channels", [1, 2])
def test_randaugment_is_torchvisions_image_by_image(channels):
    from torchvision.transforms import v2

    x = torch.rand(4, channels, 24, 24)
    peer = v2.RandAugment(2, 9, interpolation=v2.InterpolationMode.BILINEAR, fill=0.0)
    torch.manual_seed(0)
    expected = torch.stack([peer(image[:1]) for image in x]).clamp(0, 1)
    torch.manual_seed(0)
    got = augment.RandAugment(2, 9)(x)
    assert torch.equal(got[:, :1], expected) and got.shape == x.shape
    assert not torch.equal(got, x)


def test_randaugment_moves_masks_and_changes_nothing_else_of_them():
    rand = augment.RandAugment(1, 25).change
    image = torch.from_numpy(draw_radiograph(np.random.default_rng(0), side=32) / 255).float()
    twice = torch.stack([image, image])
    moved = []
    for name, (magnitudes, _) in rand._AUGMENTATION_SPACE.items():
        found = magnitudes(31, 32, 32)
        size = 0.0 if found is None else float(found[25])
        out = rand._apply_image_or_video_transform(
            twice, name, size, TF.InterpolationMode.BILINEAR, rand._fill
        )
        if torch.equal(out[1], image):
            continue
        assert torch.equal(out[1], out[0]), name
        moved.append(name)
    assert tuple(moved) == augment.RandAugment.MOVES


def test_randaugment_flag():
    assert augment.parse_randaugment("2,9") == "2,9" and augment.parse_randaugment("") == ""
    for text in ("2", "2,", "0,9", "2,31", "a,9", "2,9,1", "-1,9", "2, 9", "15,1"):
        with pytest.raises(ArgumentTypeError, match="give N,M"):
            augment.parse_randaugment(text)
    parser = Parser(None)
    parser.add_argument("--randaugment", type=augment.parse_randaugment)
    with pytest.raises(InputError, match="--randaugment: '2,31': give N,M"):  # its own words reach the user
        parser.parse_args(["--randaugment", "2,31"])
