"""Tests of lungs and masks: the U-Net, the heuristic, what a model is shown, the cache of masks."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import label

import predict
from common.console import InputError
from common.files import write_json
from data import load_train_val
from images import decode
from images.augment import Augment
from images.drawn import draw_radiograph
from lungs import masks as masks_module
from lungs import show
from lungs.show import (
    INPUT_MODES,
    MARGIN,
    already_cut,
    already_cut_in_graph,
    boxes,
    cover,
    crop,
    heuristic_mask,
    plausible,
    regions,
)
from lungs.unet import LungNet, load_net
from models.inputs import Inputs
from records.onnx import Exported
from records.run import Run
from tests.shared import WRITES_ONNX, cli, predict_rows, read_json, refused, succeed
from training.loss import Segmentation

SHARED = Path(__file__).resolve().parents[1].with_name("shared")
NOTHING = dict.fromkeys(("rotate", "translate", "scale", "aspect", "brightness", "contrast", "gamma"), 0.0)


def overlap(a, b):
    """Intersection over union of two masks."""
    return (a & b).sum() / (a | b).sum()


def two_lungs(side=64):
    """A mask of two rectangles: bool [side, side]."""
    mask = np.zeros((side, side), bool)
    mask[side // 4 : side // 4 * 3, side // 8 : side // 8 * 3] = True
    mask[side // 4 : side // 4 * 3, side // 8 * 5 : side // 8 * 7] = True
    return mask


def as_tensor(mask):
    """bool [S, S] -> float (1, 1, S, S)."""
    return torch.from_numpy(mask).float()[None, None]


# ---------------------------------------------------------------- the heuristic


def test_heuristic_finds_the_lungs_of_drawn_chests():
    y, x = np.mgrid[-1:1:200j, -1:1:200j]
    drawn = (((x + 0.42) / 0.3) ** 2 + (y / 0.62) ** 2 < 1) | (((x - 0.42) / 0.28) ** 2 + (y / 0.6) ** 2 < 1)
    for seed in range(4):
        image = draw_radiograph(np.random.default_rng(seed), side=200)
        mask = heuristic_mask(image)
        assert mask.shape == image.shape and mask.dtype == bool
        assert overlap(mask, drawn) > 0.5  # the drawn heart lies over one lung


def test_heuristic_leaves_out_what_is_dark_at_the_edge_and_fills_holes():
    image = np.full((100, 100), 220, np.uint8)
    image[:, :12] = image[:, -12:] = 10  # air beside the patient
    truth = np.zeros((100, 100), bool)
    truth[25:75, 25:45] = truth[25:75, 55:75] = True
    image[truth] = 30
    image[48:52, 33:37] = 220  # a nodule
    mask = heuristic_mask(image)
    assert overlap(mask, truth) > 0.8 and mask[50, 35] and not mask[:, :15].any() and not mask[:, -15:].any()


@pytest.mark.parametrize("grey", [0, 128])
def test_heuristic_finds_nothing_on_an_empty_image(grey):
    for side in (1, 60):
        assert not heuristic_mask(np.full((side, side), grey, np.uint8)).any()


# ---------------------------------------------------------------- the U-Net


def test_lung_net_outputs_are_loss_and_overlap():
    torch.manual_seed(0)
    net, pair = LungNet((4, 8)), torch.rand(3, 2, 16, 16)
    got = net(pair).detach().numpy()
    z = net.logits(pair[:, :1]).detach().double().numpy()
    p, t = 1 / (1 + np.exp(-z)), (pair[:, 1:] > 0.5).numpy().astype(float)
    for i in range(3):
        entropy = -(t[i] * np.log(p[i]) + (1 - t[i]) * np.log(1 - p[i])).mean()
        dice = (2 * (p[i] * t[i]).sum() + 1) / (p[i].sum() + t[i].sum() + 1)
        assert got[i, 0] == pytest.approx(entropy + 1 - dice, rel=1e-5)
        assert got[i, 1] == 2 * ((z[i] > 0) & (t[i] > 0)).sum()
        assert got[i, 2] == (z[i] > 0).sum() + t[i].sum()


def test_lung_net_learns_and_every_parameter_has_a_gradient():
    torch.manual_seed(0)
    net = LungNet((4, 8, 16))
    image = torch.rand(4, 1, 32, 32)
    truth = F.avg_pool2d(image, 9, 1, 4) > 0.5
    pair = torch.cat([image, truth.float()], 1)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for step in range(60):
        optimizer.zero_grad()
        outputs = net(pair)
        outputs[:, 0].mean().backward()
        if step == 0:
            assert all(p.grad is not None and p.grad.any() for p in net.parameters())
        optimizer.step()
    row = Segmentation.watch(None, outputs.detach())
    assert row["val_dice"] > 0.85 and Segmentation.merit(row) == row["val_dice"]


def test_lung_net_does_not_depend_on_exposure():
    torch.manual_seed(0)
    net, image = LungNet((4, 8)).eval(), torch.rand(1, 1, 16, 16)
    assert torch.allclose(net.logits(image), net.logits(image * 0.5 + 0.2), atol=2e-2)
    assert net.masks(torch.rand(2, 1, 40, 40)).shape == (2, 1, 40, 40)  # of any side


def test_shipped_weights_are_small_and_find_lungs():
    path = Path(masks_module.find_source(masks_module.SHIPPED))
    assert path.stat().st_size <= 1.5 * 2**20
    truth = SHARED / "lung_masks/kermany_lung_masks_224.npz"
    if not truth.exists():
        pytest.skip("the real images are not here")
    given, finder, dices = masks_module.GivenMasks(truth, 224), masks_module.Finder(masks_module.SHIPPED), []
    files = sorted(f for f in given.row if f.startswith("test/"))[::60]
    for file in files:
        image = np.asarray(Image.open(SHARED / "chest_xray" / file).convert("L"))
        found, true = finder(image[None])[0], given.of([file])[0]
        dices.append(2 * (found & true).sum() / (found.sum() + true.sum()))
    assert len(files) >= 8 and np.mean(dices) > 0.93


@pytest.mark.parametrize("content", ["other", "empty", "text"])
def test_wrong_lung_weights_are_refused(tmp_path, content):
    from safetensors.torch import save_file

    path = tmp_path / "net.safetensors"
    if content == "text":
        path.write_text("no weights")
    else:
        state = LungNet((4, 8)).state_dict() if content == "other" else {}
        state = {n: v for n, v in state.items() if n != "head.bias"}
        save_file(state or {"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="net.safetensors"):
        load_net(path)


# ---------------------------------------------------------------- what a model is shown


def test_box_of_lungs_has_a_margin_and_ignores_stray_pixels():
    mask = two_lungs()  # columns 8 to 56, rows 16 to 48
    margin = MARGIN
    expected = [8 - 48 * margin, 16 - 32 * margin, 56 + 48 * margin, 48 + 32 * margin]
    stray = mask.copy()
    stray[2, 2] = stray[60, 62] = True
    for one in (mask, stray):
        assert boxes(as_tensor(one))[0].mul(64).tolist() == pytest.approx(expected, abs=1e-4)
    whole = np.ones((64, 64), bool)
    for one in (whole, np.zeros((64, 64), bool)):
        assert boxes(as_tensor(one))[0].tolist() == pytest.approx([0, 0, 1, 1], abs=1e-4)


def test_crop_enlarges_a_box():
    image = torch.rand(2, 1, 32, 32)
    box = torch.tensor([[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 1.0, 1.0]])
    got = crop(image, box)
    expected = F.interpolate(image[:1, :, 16:, 8:24], size=(32, 32), mode="bilinear")
    assert torch.allclose(got[0, :, 1:-1, 1:-1], expected[0, :, 1:-1, 1:-1], atol=1e-5)
    assert torch.allclose(got[1], image[1], atol=1e-5)


def test_what_each_look_shows():
    grey, mask = torch.rand(1, 1, 64, 64), as_tensor(two_lungs())
    inside = mask.bool()
    shown = {look: cover(show.show(grey, mask, look)) for look in INPUT_MODES}
    assert torch.equal(shown["full"], grey)
    assert torch.equal(shown["masked"][inside], grey[inside]) and (shown["masked"][~inside] == 0.5).all()
    assert torch.equal(shown["outside"][~inside], grey[~inside]) and (shown["outside"][inside] == 0.5).all()
    box = boxes(mask)
    assert torch.allclose(shown["crop"], crop(grey, box))
    moved = crop(mask, box)
    assert torch.allclose(shown["masked-crop"], 0.5 + (crop(grey, box) - 0.5) * moved, atol=1e-6)
    assert torch.equal(show.show(grey, mask, "pair"), torch.cat([grey, mask], 1))


@pytest.mark.parametrize("mask", [np.zeros((64, 64), bool), np.ones((64, 64), bool), np.eye(64, dtype=bool)])
def test_images_without_plausible_lungs_are_shown_as_they_are(mask):
    grey = torch.rand(1, 1, 64, 64)
    assert not plausible(mask)
    for look in INPUT_MODES:
        assert torch.allclose(cover(show.show(grey, as_tensor(mask), look)), grey, atol=1e-5)


def test_augmentation_moves_image_and_mask_together():
    torch.manual_seed(0)
    mask = as_tensor(two_lungs()).repeat(4, 1, 1, 1)
    pair = torch.cat([mask, mask], 1)
    geometry = dict(rotate=20.0, translate=0.1, scale=0.2, aspect=0.1, hflip=0.5, crop=0.3)
    moved = Augment(**{**NOTHING, **geometry})(pair)
    assert torch.equal(moved[:, 0], moved[:, 1]) and not torch.equal(moved, pair)
    tone = dict(brightness=0.3, contrast=0.3, gamma=0.3, blur=1.0, noise=0.1, erase=1.0, frame=1.0)
    toned = Augment(**{**NOTHING, **tone})(pair)
    assert torch.equal(toned[:, 1], pair[:, 1]) and not torch.allclose(toned[:, 0], pair[:, 0], atol=0.05)
    inputs = Inputs((0.5,), (0.25,), torch.device("cpu"), input_mode="masked")
    assert (inputs.scale(toned)[:, 0][~mask[:, 0].bool()] == 0).all()  # what is hidden stays one grey


# ---------------------------------------------------------------- sources and cache


def test_masks_survive_packing():
    found = np.random.default_rng(0).random((5, 33, 33)) > 0.5
    assert masks_module.pack(found).shape == (5, 33, 5) and np.array_equal(
        masks_module.unpack(masks_module.pack(found)), found
    )


def write_masks(path, names, found, **more):
    np.savez(path, masks=np.packbits(found, axis=-1), names=np.array(names), **more)
    return path


def test_given_masks_go_by_name_and_certainty(tmp_path):
    found = np.stack([two_lungs(), two_lungs().T])
    path = write_masks(tmp_path / "m.npz", ["a.png", "b.png"], found, confident=np.array([True, False]))
    got = masks_module.open_source(path, 32)(np.zeros((3, 32, 32), np.uint8), ["b.png", "a.png", "c.png"])
    assert np.array_equal(got[1], two_lungs(32)) and not got[0].any() and not got[2].any()


@pytest.mark.parametrize("resize", ["pad", "crop"])
def test_masks_of_a_file_are_not_laid_over_images_resized_otherwise(tmp_path, resize):
    path = write_masks(tmp_path / "m.npz", ["a.png"], two_lungs()[None])
    pixels = np.zeros((1, 32, 32), np.uint8)
    with pytest.raises(InputError, match="masks from a file go with --resize squash only"):
        masks_module.open_source(path, pixels.shape[-1], resize=resize)
    assert masks_module.open_source(path, pixels.shape[-1])(pixels, ["a.png"]).any()


def test_masks_of_other_images_are_refused(small_set, tmp_path, capsys):
    """Names relative to another folder match nothing: the run would be one of whole images, unnoticed."""
    file = f"train/NORMAL/{min(f.name for f in Path(small_set.data_dir, 'train/NORMAL').iterdir())}"

    def load(name):
        path = write_masks(tmp_path / f"{len(name)}.npz", [name], two_lungs()[None])
        how = dict(input="masked", lungs=str(path), lungs_sha256=masks_module.fingerprint(path))
        load_train_val(replace(small_set, **how))

    with pytest.raises(InputError, match=f"names none of them, as set/{file}; .* --data-dir, as {file}"):
        load(f"set/{file}")
    load(file)
    assert "has no certain mask for 23 of 24 train images" in capsys.readouterr().err


def test_two_masks_of_one_image_are_refused(tmp_path):
    path = write_masks(tmp_path / "m.npz", ["a", "b", "a"], np.stack([two_lungs()] * 3))
    with pytest.raises(InputError, match="two masks of a: leave one"):
        masks_module.GivenMasks(path, 8)


@pytest.mark.parametrize(
    "arrays",
    [
        {"names": np.array(["a"])},
        {"masks": np.zeros((1, 8, 8), np.uint8), "names": np.array(["a"])},
        {"masks": np.zeros((1, 8, 1)), "names": np.array(["a"])},
        {"masks": np.zeros((2, 8, 1), np.uint8), "names": np.array(["a"])},
        {"masks": np.zeros((1, 8, 1), np.uint8), "names": np.array(["a"]), "confident": np.array([])},
        {"masks": np.uint8(3), "names": np.array("a")},
    ],
)
def test_wrong_mask_files_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(InputError, match="m.npz needs uint8 masks"):
        masks_module.GivenMasks(tmp_path / "m.npz", 8)


def test_sources_are_found_and_checked(tmp_path):
    assert masks_module.find_source("heuristic") == "heuristic"
    for wrong, words in ((tmp_path / "none.npz", "no such file"), (tmp_path / "x.txt", "neither")):
        (tmp_path / "x.txt").write_text("")
        with pytest.raises(InputError, match=words):
            masks_module.find_source(str(wrong))
    with pytest.raises(InputError, match="not those the run was trained with"):
        masks_module.check_source("heuristic", "0" * 64)
    path = write_masks(tmp_path / "m.npz", ["a"], np.ones((1, 8, 8), bool))
    with pytest.raises(InputError, match="not a way to find lungs on others"):
        masks_module.Finder(path)


def masked(config, **changes):
    return replace(
        config,
        input="masked",
        lungs="heuristic",
        lungs_sha256=masks_module.fingerprint("heuristic"),
        **changes,
    )


def test_stale_and_damaged_mask_caches_are_made_again(small_set, capsys):
    config = masked(small_set)
    folder = Path(config.data_dir, "train", "NORMAL")
    chest = draw_radiograph(np.random.default_rng(0), side=64)
    for i, file in enumerate(folder.iterdir()):
        chest[0, 0] = i  # no two files are copies of each other: a split keeps those together
        Image.fromarray(chest).save(file)
    train, val, _ = load_train_val(config)
    assert "no lungs found on 12 of 24 train images" in capsys.readouterr().err
    expected = heuristic_mask(train.images[0])
    healthy = train.lungs()[train.targets == 0]
    assert plausible(healthy).all() and np.array_equal(healthy[0], expected)
    assert not train.lungs()[train.targets == 1].any() and len(val.lungs([0, 1])) == 2
    before = train.lungs()
    (cache,) = Path(config.cache_dir).glob("*.lungs.npy")
    raw = bytearray(cache.read_bytes())
    raw[-1] ^= 255
    cache.write_bytes(raw)
    again, _, _ = load_train_val(config)
    assert "is damaged: rebuilding it" in capsys.readouterr().err
    assert np.array_equal(again.lungs(), before)
    for i, file in enumerate(folder.iterdir()):  # other images: no lungs on these
        Image.fromarray(np.full((20, 20), 9 + i, np.uint8)).save(file)
    changed, _, _ = load_train_val(config)
    assert not changed.lungs().any()
    assert "no lungs found on 24 of 24" in capsys.readouterr().err


# ---------------------------------------------------------------- the whole chain


@pytest.fixture(scope="module")
def looks(own_build, flags):
    """Calibrated runs that see the lungs by the shipped U-Net: linear (masked-crop), scratch (masked)."""

    def build(cwd):
        how = ("--input", "masked-crop")
        succeed("train_linear", *flags[:4], "--img-size", 64, *how, cwd=cwd)
        scratch = ("--max-steps", 2, "--batch-size", 16, "--no-amp", "--input", "masked")
        succeed("train_scratch", *flags, *scratch, cwd=cwd)
        succeed("calibrate", "--min-recall", 0.9, "--bootstrap", 100, cwd=cwd)

    return own_build("looks", build)[0]


def test_predict_gives_the_scores_of_a_masked_run(looks, synthetic):
    for name in ("linear", "scratch"):
        run = looks / "outputs" / name
        assert read_json(run, "results.json")["data"]["lungs_sha256"] == masks_module.fingerprint(
            masks_module.SHIPPED
        )
        rows = predict_rows(looks, "--run", run, synthetic / "test")
        scores = np.load(run / "scores.npz", allow_pickle=False)
        expected = dict(zip(scores["test_files"], scores["test_p1"]))
        for row in rows:
            known = expected[str(Path(row["path"]).relative_to(synthetic))]
            assert float(row["p_pneumonia"]) == pytest.approx(known, abs=1e-5)


@pytest.fixture(scope="module")
def parts(own_build, flags, tiny_npz):
    """Runs that are shown different parts of an image, and their ensemble "mean", all calibrated."""
    members = [f"outputs/{look}" for look in ("full", "masked-crop", "outside")]

    def build(cwd):
        rule = ("--min-recall", 0.9, "--bootstrap", 100)
        for member in members:
            argv = ("train_pretrained", *flags, "--weights", tiny_npz, "--max-steps", 2, "--epochs", 1)
            succeed(*argv, "--input", Path(member).name, "--out", member, cwd=cwd)
        succeed("calibrate", "--ensemble", *members, "--out", "outputs/mean", *rule, cwd=cwd)
        succeed("calibrate", "--run", *members, *rule, cwd=cwd)

    cwd, _ = own_build("parts", build)
    return [Run(cwd / folder) for folder in (*members, "outputs/mean")]


def test_an_ensemble_of_models_that_are_shown_different_parts(parts, synthetic):
    """Its probability is the mean of its members', as each gives it alone."""
    scores, cwd = [run.scores() for run in parts], parts[0].folder.parents[1]
    for side in ("val_p1", "test_p1"):
        *single, mean = (s[side] for s in scores)
        assert min(np.abs(a - b).max() for a, b in zip(single, single[1:])) > 0.01  # each sees something else
        assert np.allclose(mean, np.mean(single, axis=0), atol=1e-6)
    rows = predict_rows(cwd, "--run", "outputs/mean", synthetic / "test")
    expected = dict(zip(scores[3]["test_files"], scores[3]["test_p1"]))
    for row in rows:
        known = expected[str(Path(row["path"]).relative_to(synthetic))]
        assert float(row["p_pneumonia"]) == pytest.approx(known, abs=1e-5)
    text = succeed("compare", cwd=cwd).out
    assert "ensemble of 3, full and masked-crop and outside (mean)" in text
    assert f"--input full and masked-crop and outside by {masks_module.SHIPPED}" in text


def test_views_of_such_an_ensemble_are_those_of_its_members(parts):
    """Test-time augmentation moves what each member is shown, not what is cut for it afterwards."""
    _, val, _ = load_train_val(parts[3].config)
    found = []
    for run in parts:
        inputs, model = Inputs.of_run(run.results, torch.device("cpu"), {"flip": True}), run.model()
        grey = inputs.grey(val.pixels(), val.lungs() if inputs.needs_lungs else None)
        views = [replace(inputs, views=(view,)).logits(model, grey) for view in inputs.views]
        found.append(torch.stack(views).softmax(dim=2)[..., 1].detach())
        assert torch.allclose(inputs.logits(model, grey), torch.stack(views).mean(0), atol=1e-5)
    *single, mean = found
    assert torch.allclose(mean, torch.stack(single).mean(0), atol=1e-5)
    assert (single[1].std(dim=0) > 0.005).any()  # the views do move the member that is cut


def test_no_maps_of_an_ensemble_whose_members_are_cut_differently(looks, flags):
    argv = ("--ensemble", "outputs/scratch", "cuts/one", "--out", "cuts/both", "--bootstrap", 100)
    shutil.copytree(looks / "outputs/scratch", looks / "cuts/one")
    results = read_json(looks, "cuts/one/results.json")
    write_json(looks / "cuts/one/results.json", {**results, "data": {**results["data"], "input": "crop"}})
    succeed("calibrate", *argv, cwd=looks)
    refused(cli("explain", "--run", "cuts/both", cwd=looks), "different cuts", "explain one of them")
    argv = ("train_scratch", *flags, "--teacher", "cuts/both", "--out", "cuts/student")
    refused(cli(*argv, cwd=looks), "cuts/both", "different parts")
    path = looks / "cuts/both/results.json"
    results = read_json(path)
    for wrong in (["masked", "everything"], ["masked"], 3):
        config = {**results["model_config"], "looks": wrong}
        write_json(path, {**results, "model_config": config})
        refused(
            cli("predict", "x.png", "--run", "cuts/both", cwd=looks),
            "results.json does not describe a model",
        )


def test_predict_notes_images_without_lungs(looks, tmp_path):
    Image.fromarray(np.full((64, 64), 120, np.uint8)).save(tmp_path / "blank.png")
    (row,) = predict_rows(looks, "--run", looks / "outputs/linear", tmp_path / "blank.png")
    assert "no lungs found: the whole image was used" in row["note"] and row["p_pneumonia"]
    done = succeed("explain", tmp_path / "blank.png", "--run", "outputs/scratch", cwd=looks)
    assert "blank.png; no lungs found: the whole image was used" in done.out.replace(
        "explain/blank.png", "blank.png"
    )


def test_a_lung_model_learns_from_plausible_masks_alone(synthetic, cache, tmp_path):
    """A mask of the whole picture is none of lungs: it is left out, and counted."""
    files = sorted(path.relative_to(synthetic).as_posix() for path in (synthetic / "train").rglob("*.jpeg"))
    lungs = np.zeros((len(files), 32, 32), bool)
    lungs[:, 8:24, 4:28] = True
    lungs[::2] = True
    np.savez(tmp_path / "masks.npz", masks=np.packbits(lungs, axis=-1), names=np.array(files))
    flags = ("--data-dir", synthetic, "--cache-dir", cache, "--img-size", 32, "--epochs", 1, "--max-steps", 1)
    done = succeed("train_lungs", "--masks", tmp_path / "masks.npz", *flags, cwd=tmp_path)
    left_out = (len(files) + 1) // 2
    assert f"no certain mask for {left_out} of {len(files)}" in done.err
    split = read_json(tmp_path / "outputs/lungs/results.json")["split"]
    assert split["train"] + split["val"] == len(files) - left_out
    refused(cli("explain", "--run", "outputs/lungs", cwd=tmp_path), "it has no classes to score")


def test_explain_follows_what_the_model_sees(looks, synthetic, tmp_path):
    run = looks / "outputs/scratch"
    succeed("explain", "--run", run, "--tests", 3, "--method", "gradcam", cwd=looks)
    assert 0 < read_json(run, "explain/val/explain.json")["gradcam"]["lung_area"] < 1
    image = next((synthetic / "test/NORMAL").iterdir())
    done = succeed("explain", image, "--run", run, cwd=looks)
    assert f"wrote {run}" in done.out


@WRITES_ONNX
def test_a_graph_with_the_lungs_inside_gives_what_predict_does(
    looks, flags, tiny_npz, synthetic, monkeypatch, graph_as_it_is
):
    """Whole chests, lungs alone on black, and no lungs: what is exported of a masked run, and the file of a
    hybrid, which is shown the masks too."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(show, "ROUNDS", 3)  # enough for these shapes: unsettled ones would be NaN
    argv = ("train_hybrid", *flags, "--weights", tiny_npz, "--d-model", 24, "--batch-size", 32)
    argv = (*argv, "--depth", 1)
    succeed(*argv, "--epochs", 1, "--input", "masked-crop", "--out", "hybrid", cwd=looks)
    succeed("calibrate", "--run", "hybrid", "--min-recall", 0.9, "--bootstrap", 100, cwd=looks)
    assert "by at most" in succeed("predict", "--export", "m.onnx", "--run", "hybrid", cwd=looks).out
    session = runtime.InferenceSession(str(looks / "m.onnx"), providers=["CPUExecutionProvider"])
    scorer = predict.Scorer(looks / "outputs/linear", "cpu")
    exported = Exported(scorer.model, scorer.inputs, scorer.task, 1.0, scorer.finder.net).eval()
    chests = sorted((synthetic / "test/NORMAL").iterdir())[:4]
    graphs = {
        "hybrid": (32, lambda x: session.run(None, {"image": x})[0]),
        "outputs/linear": (64, lambda x: exported(torch.from_numpy(x)).numpy()),
    }
    for run, (side, graph) in graphs.items():
        files = list(chests)
        for i, picture in enumerate(lungs_alone(decode.decode(files[0], side))):
            Image.fromarray(picture).save(looks / f"strange{i}-{side}.png")
            files.append(looks / f"strange{i}-{side}.png")
        rows = predict_rows(looks, "--run", run, *files)
        assert ["no lungs" in row["note"] for row in rows] == [False] * 6 + [True], run
        pixels = np.stack([decode.decode(file, side) for file in files])[:, None]
        with torch.inference_mode():
            got = graph(pixels.astype(np.float32) / 255)
        expected = [float(row["p_pneumonia"]) for row in rows]
        assert got == pytest.approx(expected, abs=1e-3) and np.ptp(expected) > 0.01, run


def lungs_alone(chest):
    """A chest's two lungs alone on black, the same with a marker beside them, and a blank image."""
    down, across = np.abs(np.mgrid[-1 : 1 : len(chest) * 1j, -1 : 1 : len(chest) * 1j])
    inside = ((across - 0.42) / 0.3) ** 2 + (down / 0.62) ** 2 < 1
    alone = np.where(inside, np.maximum(chest, 40), 0).astype(np.uint8)
    marked = alone.copy()
    marked[2:6, 2:6] = 255
    return alone, marked, np.full_like(chest, 120)


def windings(side):
    """Shapes whose pixels are far from each other along the shape, and noise of several densities."""
    spiral, comb = np.zeros((2, side, side), bool)
    for k in range(2, side // 2, 4):  # rings, each joined to the next
        spiral[k, k : side - k] = spiral[side - k - 1, k : side - k] = True
        spiral[k : side - k, k] = spiral[k : side - k, side - k - 1] = True
        spiral[k + 1 : k + 4, k + (k % 8) // 4] = True
    comb[2::2, 2:-2] = True
    comb[3::4, -3] = comb[1::4, 2] = True
    noise = [np.random.default_rng(seed).random((side, side)) < 0.3 + 0.08 * seed for seed in range(5)]
    shapes = [spiral, comb, two_lungs(side), np.zeros_like(comb), np.ones_like(comb), *noise]
    return np.stack([shape[::down, ::across] for shape in shapes for down in (1, -1) for across in (1, -1)])


@pytest.mark.parametrize("side", [33, 64, 224])
def test_regions_without_loops_are_those_of_scipy(side):
    lit = windings(side)
    found, settled = regions(torch.from_numpy(lit))
    assert settled.all()
    for shape, numbers in zip(lit, found.numpy().reshape(lit.shape)):
        labels, count = label(shape)
        pairs = np.unique(np.stack([labels[shape], numbers[shape]]), axis=1)
        assert pairs.shape[1] == count == len(set(pairs[1]))  # one number each, of no other region


def test_what_is_cut_already_is_found_alike_in_the_graph():
    """Around every limit: lit area, frame, the size of regions; and on images that are no cuts."""
    rng, cases = np.random.default_rng(0), list(lungs_alone(np.full((64, 64), 130, np.uint8)))
    for shape in windings(64):
        cases.append(np.where(shape, rng.integers(0, 256, shape.shape), 0))
    for share in (0.049, 0.0501, 0.2, 0.4499, 0.4501, 0.6):  # a block of that area
        rows = np.arange(64 * 64).reshape(64, 64)
        cases.append(np.where((rows >= 600) & (rows < 600 + share * 64 * 64), 17, 16))
    for spot in (39, 40, 41, 42):  # 1% are 40.96 pixels
        image = np.where(two_lungs(), 90, 0)
        image[30:34, 30:41].flat[:spot] = 90
        cases.append(image)
    for count in (1199, 1200, 1201):  # 75% of their box, of 40 by 40 pixels, are 1200
        block = np.zeros((40, 40), np.uint8)
        block[-1] = block[:, 0] = 90
        block.flat[np.flatnonzero(block == 0)[: count - 79]] = 90
        cases.append(np.pad(block, 12))
    for lit in (47, 48, 49, 50, 51):  # of the 496 pixels of the frame
        image = np.where(two_lungs(), 90, 0)
        image[0, :lit] = 255
        cases.append(image)
    pixels, found = np.stack(cases).astype(np.uint8), []
    graph = already_cut_in_graph(torch.from_numpy(pixels).float().unsqueeze(1))
    masks, is_cut, unsettled = (part.numpy() for part in graph)
    for image, mask, cut in zip(pixels, masks, is_cut.ravel()):
        expected = already_cut(image)
        found.append(expected is not None)
        assert cut == found[-1]
        assert not cut or np.array_equal(mask[0] > 0, expected)
    assert not unsettled.any() and 5 < sum(found) < len(found) - 5


def test_regions_that_are_not_settled_are_told(monkeypatch):
    monkeypatch.setattr(show, "ROUNDS", 1)
    monkeypatch.setattr(show, "SHORTEN", 1)
    lit = windings(64)
    _, settled = regions(torch.from_numpy(lit))
    assert not settled[:8].any() and settled[12:16].all()  # windings; no pixel at all


@pytest.mark.skipif(not (SHARED / "rsna_lungs").exists(), reason="needs the shared images")
def test_real_lungs_on_black_are_found_alike_in_the_graph():
    files = sorted((SHARED / "rsna_lungs/images").iterdir())[:60]
    pixels = np.stack([decode.decode(file, 224) for file in files])
    masks, is_cut, unsettled = already_cut_in_graph(torch.from_numpy(pixels).float().unsqueeze(1))
    expected = [already_cut(image) for image in pixels]
    assert is_cut.ravel().tolist() == [mask is not None for mask in expected] and not unsettled.any()
    for mask, wanted in zip(masks[:, 0].numpy() > 0, expected):
        assert wanted is None or np.array_equal(mask, wanted)
    assert is_cut.float().mean() > 0.5


def test_a_run_refuses_another_source_of_masks(looks, tmp_path, synthetic):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(LungNet((4, 8)).state_dict(), tmp_path / "net.safetensors")
    flags = ("--data-dir", synthetic, "--cache-dir", tmp_path / "cache", "--img-size", 32)
    chosen = ("--input", "crop", "--lungs", "net.safetensors")
    succeed("train_linear", *flags, *chosen, cwd=tmp_path)
    succeed("calibrate", cwd=tmp_path)
    torch.manual_seed(1)
    save_file(LungNet((4, 8)).state_dict(), tmp_path / "net.safetensors")
    for script, *more in (("calibrate",), ("predict", synthetic / "test", "--run", "outputs/linear")):
        refused(cli(script, *more, cwd=tmp_path), "not those the run was trained with", "net.safetensors")


def test_train_lungs_makes_weights_that_other_scripts_use(synthetic, cache, tmp_path):
    files = sorted(str(p.relative_to(synthetic)) for p in (synthetic / "train").rglob("*.jpeg"))
    write_masks(tmp_path / "true.npz", files[5:], np.stack([two_lungs()] * (len(files) - 5)))
    flags = ("--data-dir", synthetic, "--cache-dir", cache)
    argv = ("train_lungs", "--masks", "true.npz", *flags, "--img-size", 32, "--max-steps", 2)
    done = succeed(*argv, "--batch-size", 16, cwd=tmp_path)
    results = read_json(tmp_path, "outputs/lungs/results.json")
    assert results["split"]["train"] + results["split"]["val"] == len(files) - 5
    assert 0 <= results["history"][0]["val_dice"] <= 1 and "val Dice" in done.out
    made = "outputs/lungs/lung_unet.safetensors"
    assert masks_module.Finder(tmp_path / made)(np.zeros((2, 40, 40), np.uint8)).shape == (2, 40, 40)
    refused(cli(*argv, cwd=tmp_path), "already holds a finished run")
    refused(cli("calibrate", "--run", "outputs/lungs", cwd=tmp_path), "no classes")
    chosen = ("--input", "masked", "--lungs", "none.npz")
    refused(cli("train_linear", *flags, *chosen, cwd=tmp_path), "no such file")
