"""Tests of explain and maps."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

import explain
from common import console
from common.console import InputError, Pace
from common.files import write_json
from common.task import Answer
from data import load_split
from images.augment import gaussian_blur
from models import build, map_pictures, maps
from models.inputs import Inputs
from records.run import Run
from report.rows import Entry
from report.tables.evidence import map_blocks
from tests.shared import CPU, cli, of_one, refused, save_dicom, succeed, tiny_vit

PLAIN = Inputs((0.5,) * 3, (0.5,) * 3, CPU)
GREY = Inputs((0.0,), (1.0,), CPU)


def ensemble_of(*members):
    """A models.Ensemble of models, each ViT with a scaling of its own."""
    means = [[0.5 - 0.1 * i] * m.in_chans for i, m in enumerate(members)]
    stds = [[0.5 + 0.1 * i] * m.in_chans for i, m in enumerate(members)]
    model = build.Ensemble([{"kind": m.kind, **m.config} for m in members], means, stds)
    for own, member in zip(model.members, members):
        own.load_state_dict(member.state_dict())
    return model.eval()


# ---------------------------------------------------------------- maps


def test_rollout_by_hand():
    """(A + I) / 2 of both layers multiplied: [[.75, .25], [.05, .95]] @ [[.8, .2], [.1, .9]]."""
    attention = torch.tensor([[[[0.6, 0.4], [0.2, 0.8]], [[0.5, 0.5], [0.1, 0.9]]]])
    assert torch.allclose(maps.rollout(attention), torch.tensor([[[0.625, 0.375], [0.135, 0.865]]]))
    found = maps.attention_rollout(tiny_vit(), torch.rand(5, 3, 32, 32))
    assert found.shape == (5, 4, 4) and (found >= 0).all()
    assert (found.sum((1, 2)) < 1).all()  # the rest is on [CLS]


@pytest.mark.parametrize("layer", [-1, 0])
def test_grad_cam_against_finite_differences(layer):
    """Every channel of a token is nudged up, then down, in one image of a batch each."""
    model, x = tiny_vit().double(), torch.rand(1, 3, 32, 32, dtype=torch.float64)
    kept, nudge, channels = {}, {}, torch.arange(24)

    def hook(module, inputs, output):
        kept["tokens"] = output.detach().clone()
        if nudge:
            output = output.clone()
            output[channels, nudge["token"], channels] += 1e-5
            output[24 + channels, nudge["token"], channels] -= 1e-5
        return output

    handle = model.blocks[layer].norm1.register_forward_hook(hook)
    with torch.no_grad():
        model(x)
        tokens, gradient = kept["tokens"], torch.zeros(2, 16, 24, dtype=torch.float64)
        for token in range(16):
            nudge.update(token=token + 1)
            up, down = model(x.expand(48, -1, -1, -1)).view(2, 24, 2)
            gradient[:, token] = (up - down).T / 2e-5
    handle.remove()
    want = (tokens[0, 1:] * gradient.mean(1, keepdim=True)).sum(-1).relu().view(2, 4, 4)  # one map a class
    assert want.max() > 1e-3
    for target in (0, 1):
        got = maps.grad_cam(model, x, target, layer)[0].double()
        assert torch.allclose(got, want[target], atol=1e-5, rtol=1e-4)


def test_grad_cam_against_the_grad_cam_package():
    package = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = tiny_vit(3), torch.rand(3, 3, 32, 32)
    ours = maps.grad_cam(model, x, target=0)

    def as_grid(tokens):
        return tokens[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)

    with package.GradCAM(model, [model.blocks[-1].norm1], reshape_transform=as_grid) as cam:
        theirs = cam(x, [ClassifierOutputTarget(0)] * 3)  # scaled to [0, 1] and to 32 px

    def scaled(grids):
        grids = grids - grids.amin((1, 2), True)
        return grids / grids.amax((1, 2), True).clamp(min=1e-7)

    ours = torch.nn.functional.interpolate(scaled(ours)[:, None], size=(32, 32), mode="bilinear")[:, 0]
    assert theirs.max() > 0.5
    assert scaled(ours).numpy() == pytest.approx(theirs, abs=2e-3)  # the package scales twice


def test_explaining_leaves_the_model_as_it_was():
    model = tiny_vit(img_size=384, patch_size=16).train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    x = torch.rand(2, 3, 384, 384)
    assert maps.grad_cam(model, x).shape == maps.attention_rollout(model, x).shape == (2, 24, 24)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    with pytest.raises(InputError):
        maps.attention_rollout(model, x[:, :, :64])
    assert model.training  # after an error too
    for p in model.parameters():
        p.requires_grad_(False)
    assert torch.isfinite(maps.grad_cam(model, x)).all()  # frozen models too


@pytest.mark.parametrize("method", list(maps.METHODS))
def test_map_of_an_ensemble_is_the_mean_of_its_members_maps(method):
    """Each scaled to sum 1, on the grid of the smallest patches; a member without patches does not count."""
    fine, coarse = tiny_vit(1), tiny_vit(2, patch_size=16, in_chans=1)
    model = ensemble_of(fine, coarse, build.PixelLinear(side=8))
    grey = torch.rand(5, 1, 32, 32)
    x_fine, x_coarse, _ = model.scaled(grey)
    assert x_fine.shape[1] == 3 and not torch.equal(x_fine[:, :1], x_coarse)
    for target in (0, 1):
        a = maps.compute(method, fine, x_fine, 0, target)
        b = maps.compute(method, coarse, x_coarse, 0, target)
        b = b.repeat_interleave(2, 1).repeat_interleave(2, 2)  # a 2 x 2 grid on one of 4 x 4
        want = sum(m / m.sum((1, 2), keepdim=True).clamp(min=1e-12) for m in (a, b)) / 2
        got = maps.compute(method, model, grey, 0, target)
        assert want.max() > 0.05 and torch.allclose(got, want, atol=1e-6)
    assert [m.embed_dim for m in maps.explainable(model)] == [24, 24] and len(maps.explainable(fine)) == 1
    assert maps.explainable(build.PixelLinear()) == []


# ---------------------------------------------------------------- are they true?


def brightness_of_patch_6(grey):
    """The probability of something that shows in one patch only: row 1, column 2 of 4 x 4."""
    return 1 / (1 + np.exp(-80 * (grey[:, 0, 8:16, 16:24].mean((1, 2)).double().numpy() - 0.65)))


def test_deletion_and_insertion_know_the_patch_that_matters():
    grey = torch.full((2, 1, 32, 32), 0.2)
    grey[:, :, 8:16, 16:24] = 0.9
    ranks = torch.tensor([6] + [i for i in range(16) if i != 6]).argsort().view(1, 4, 4).repeat(2, 1, 1)
    deletion, insertion = maps.curves(brightness_of_patch_6, grey, ranks)
    late_deletion, late_insertion = maps.curves(brightness_of_patch_6, grey, 15 - ranks)
    full, none = 1 / (1 + math.exp(-20)), brightness_of_patch_6(gaussian_blur(grey, torch.full((2,), 3.2)))
    assert deletion.shape == insertion.shape == (2, maps.STEPS) and none.max() < 0.1
    assert deletion[:, 0] == pytest.approx(full) and insertion[:, 0] == pytest.approx(none, abs=1e-6)
    assert deletion[:, 1:] == pytest.approx(np.repeat(none[:, None], 14, 1), abs=1e-6)
    assert insertion[:, 1:] == pytest.approx(full)
    assert late_deletion[:, -2] == pytest.approx(full)
    assert late_insertion[:, -2] == pytest.approx(none, abs=1e-6)


def test_regions_of_maps():
    lungs = np.zeros((4, 200, 200), bool)
    lungs[:, 50:150, 30:90] = lungs[:, 50:150, 110:170] = True
    edge = np.zeros((4, 20, 20), np.float32)
    edge[:, 0] = edge[:, -1] = 1
    got = maps.regions(edge, lungs)
    assert got["border_share"]["mean"] > 0.95 and got["lung_share"]["mean"] < 0.02
    assert got["border_area"] == pytest.approx(1 - 0.8**2) and got["lung_area"] == pytest.approx(0.3)
    even = maps.regions(np.ones((4, 20, 20), np.float32), lungs)
    assert even["border_share"]["mean"] == pytest.approx(0.36, abs=1e-3)
    assert even["lung_share"]["mean"] == pytest.approx(0.3, abs=1e-3)
    lungs[0] = False  # no mask is known of this one
    some = maps.regions(np.ones((4, 20, 20), np.float32), lungs)
    assert some["lung_share"]["mean"] == pytest.approx(0.3, abs=1e-3) and some["lung_area"] == pytest.approx(
        0.3
    )
    assert some["lung_images"] == 3 and some["empty"] == 0
    even = np.ones((4, 20, 20), np.float32)
    even[1] = 0  # Grad-CAM of an image in which no patch speaks for the class
    shares = maps.regions(even, lungs)
    assert shares["empty"] == 1 and shares["lung_images"] == 2
    assert shares["lung_share"]["mean"] == pytest.approx(0.3, abs=1e-3)
    assert shares["border_share"]["mean"] == pytest.approx(0.36, abs=1e-3)
    none = maps.regions(edge, lungs & False)
    assert none["lung_images"] == 0 and not {"lung_area", "lung_share"} & set(none)


@pytest.mark.parametrize("readout", ["cls", "mean", "cls+mean"])
def test_maps_leave_registers_out_and_follow_the_readout(readout):
    model = tiny_vit(reg_tokens=3, readout=readout, layer_scale=True)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, attention = model.forward_features(x, return_attention=True)
    flow = torch.eye(20).expand(2, -1, -1)
    for block in attention.mean(2).unbind(1):
        flow = (block / 2 + torch.eye(20) / 2) @ flow
    patches = flow[:, 4:].sum(1) / 16
    expected = {"cls": flow[:, 0], "mean": patches, "cls+mean": (flow[:, 0] + patches) / 2}[readout]
    got = maps.attention_rollout(model, x)
    assert torch.allclose(got.flatten(1), expected[:, 4:], atol=1e-6)
    with torch.no_grad():  # what speaks against one class speaks for the other: one of two maps is not empty
        model.head.weight[0] = -model.head.weight[1]
    cams = [maps.grad_cam(model, x, target) for target in (0, 1)]
    assert cams[0].shape == (2, 4, 4) and any(cam.any() for cam in cams)


def changed_parts(model):
    """[(name, the weights that differ from the model's)] of every step of `maps.randomised`."""
    before = {n: p.clone() for n, p in model.state_dict().items()}
    steps = []
    for name, other in maps.randomised(model):
        steps.append((name, {n for n, p in other.state_dict().items() if not torch.equal(p, before[n])}))
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())  # a copy was changed
    assert all(a[1] < b[1] for a, b in zip(steps, steps[1:]))  # one part more each time
    return steps


def test_randomised_weights_change_cumulatively_and_leave_the_model():
    model = tiny_vit()
    state = torch.get_rng_state()
    steps = changed_parts(model)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers change
    assert [name for name, _ in steps] == ["head", "block 1", "block 0", "patches"]
    assert steps[0][1] == {"head.weight", "head.bias"} and "patch_embed.proj.weight" in steps[-1][1]


def test_randomised_members_of_an_ensemble_go_in_step():
    steps = changed_parts(ensemble_of(tiny_vit(1, depth=3), tiny_vit(2), build.PixelLinear(side=8)))
    assert [name for name, _ in steps] == ["head", "block 2", "block 1", "block 0", "patches"]
    heads = {f"members.{i}.head.{name}" for i in range(3) for name in ("weight", "bias")}
    assert steps[0][1] == heads
    assert {n.split(".")[1] for n in steps[1][1] - heads} == {"0", "1"}
    assert "members.0.patch_embed.proj.weight" in steps[-1][1] - steps[-2][1]


@pytest.mark.parametrize("several", [False, True])
def test_faithfulness_is_that_of_the_target(several):
    """The order of attention rollout is the same for both classes, and their probabilities sum to 1."""
    model = ensemble_of(tiny_vit(1), tiny_vit(2)) if several else tiny_vit()
    grey, lungs = torch.rand(20, 1, 32, 32, generator=torch.manual_seed(0)), np.ones((20, 32, 32), bool)
    normal, sick = (
        maps.faithfulness(model, GREY if several else PLAIN, grey, lungs, ["rollout"], target=t)
        for t in (0, 1)
    )
    for curve in ("deletion", "insertion"):
        for name in ("random", "rollout"):
            assert normal[name][curve]["mean"] == pytest.approx(1 - sick[name][curve]["mean"])
    assert abs(sick["rollout"]["deletion"]["mean"] - 0.5) > 1e-3  # or the target could not matter
    assert sick["images"] == 20 and sick["rollout"]["deletion_minus_random"]["mean"] == pytest.approx(
        sick["rollout"]["deletion"]["mean"] - sick["random"]["deletion"]["mean"]
    )
    steps = {step["down_to"]: step["rank_correlation"] for step in sick["rollout"]["randomised"]}
    assert steps["head"] == pytest.approx(1)  # rollout does not know the head
    assert abs(steps["patches"]) < 0.9


# ---------------------------------------------------------------- pictures


def test_pick_takes_confident_and_borderline_of_each_outcome():
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


def test_every_picture_has_a_name_of_its_own():
    files = ["a/x.png", "b/x.png", "x.jpg", "x-2.png", "X.jpeg", "y.dcm", "sheet.png"]
    names = ["x.png", "x-2.png", "x-3.png", "x-2-2.png", "X-4.png", "y.png", "sheet-2.png"]
    assert explain.picture_names(files) == names


def test_pictures_take_names_as_they_are(tmp_path):
    """Dollar signs would begin a formula, and bytes that are no UTF-8 cannot be drawn."""
    image, grid = np.zeros((8, 8), np.uint8), np.random.default_rng(0).random((4, 4), np.float32)
    none = np.zeros((8, 8), bool)
    rows = [("$\\frac$_a^{$", image, [grid], none), ("cost: 5$ or 6$\udcff", image, [0 * grid], none)]
    explain.draw(tmp_path / "a" / "b.png", rows, ["a map"], "run_$x_$\udcff")
    assert np.asarray(Image.open(tmp_path / "a" / "b.png").convert("L")).std() > 20


def test_lungs_are_outlined_where_there_are_any(tmp_path):
    image, grid, lung = np.zeros((40, 40), np.uint8), np.zeros((4, 4), np.float32), np.zeros((40, 40), bool)
    lung[10:30, 10:20] = True
    for mask in (lung, ~lung & lung, lung | True):
        explain.draw(tmp_path / "a.png", [("", image, [grid], mask)], ["a map"], "run")
        drawn = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
        cyan = (drawn[..., 1] > 150) & (drawn[..., 2] > 150) & (drawn[..., 0] < 60)
        assert cyan.any() == (mask is lung)


# ---------------------------------------------------------------- the script


@pytest.fixture
def scratch_run(bench, tmp_path, monkeypatch):
    """A copy of a calibrated run, in the folder where its images are found."""
    monkeypatch.chdir(bench)
    return Run(shutil.copytree(bench / "outputs/scratch-seed0", tmp_path / "run"))


@pytest.mark.parametrize("known", [True, False])
def test_a_picture_says_where_no_lungs_were_found(tmp_path, monkeypatch, known):
    texts = []
    monkeypatch.setattr(
        map_pictures, "save_figure", lambda path, figure, dpi: texts.extend(figure.findobj(Text))
    )
    mask = np.zeros((32, 32), bool)
    mask[8:24, 4:28] = known
    row = ("x.png", np.zeros((32, 32), np.uint8), [np.ones((4, 4), np.float32)], mask)
    map_pictures.draw(tmp_path / "x.png", [row], ["Grad-CAM"], "title")
    assert ("no lungs found" in [text.get_text() for text in texts]) != known


def test_images_without_lungs_are_counted(bench, scratch_run, tmp_path):
    """A file of masks that names none of the images is an error; of those it has no plausible mask for, none
    counts as lungs."""
    names = load_split(scratch_run, "val").files
    lungs = np.zeros((len(names), 32, 32), bool)
    lungs[:, 8:24, 4:28] = True
    lungs[::2] = True  # the whole image: no lungs
    path = tmp_path / "masks.npz"
    np.savez(path, masks=np.packbits(lungs, axis=-1), names=np.array([f"x/{name}" for name in names]))
    argv = ("explain", "--run", scratch_run, "--tests", 8, "--method", "gradcam", "--lungs", path)
    refused(cli(*argv, cwd=bench), "names none of them")
    np.savez(path, masks=np.packbits(lungs, axis=-1), names=np.array(names))
    done = succeed(*argv, cwd=bench)
    found = scratch_run.explained()["val"]["gradcam"]
    assert f"on {8 - found['lung_images']} of 8 images" in done.err and 0 < found["lung_images"] < 8
    assert found["lung_area"] == pytest.approx(16 * 24 / 32**2)
    np.savez(path, masks=np.packbits(lungs[-1:], axis=-1), names=np.array(names[-1:]))  # one image is enough
    succeed(*argv, cwd=bench)
    np.savez(path, masks=np.packbits(lungs | True, axis=-1), names=np.array(names))
    done = succeed(*argv, cwd=bench)
    assert "on no image are the lungs known" in done.out
    succeed("compare", "--run", scratch_run, cwd=bench)


def test_explain_end_to_end(bench, scratch_run, pictures_drawn):
    done = succeed("explain", "--run", scratch_run, "--tests", 4, cwd=bench)
    sheet = np.asarray(Image.open(scratch_run.folder / "explain/val/sheet.png").convert("L"))
    assert sheet.std() > 20 and len(list((scratch_run.folder / "explain/val").glob("*.png"))) >= 3
    report = scratch_run.explained()["val"]
    assert report["images"] == 4 and report["synthetic"] and report["target"] == "PNEUMONIA"
    assert report["split"] == "val" and report["checkpoint"] == scratch_run.checkpoint_sha256
    for method in maps.METHODS:
        assert {"deletion_minus_random", "insertion_minus_random", "lung_share"} < set(report[method])
        assert report[method]["randomised"][-1]["down_to"] == "patches"
    assert "4 validation images rightly called PNEUMONIA" in done.out


@pytest.fixture
def drawn(monkeypatch):
    """The names of the pictures that would be drawn, which takes a second each."""
    names = []
    monkeypatch.setattr(explain, "draw", lambda path, *about: names.append(path.name))
    return names


def test_pictures_are_chosen_on_the_scores_of_calibrate(bench, scratch_run, drawn):
    succeed("explain", "--run", scratch_run, "--split", "test", "--tests", 0, cwd=bench)
    scores = scratch_run.scores()
    rows = explain.pick(
        scores["test_labels"], scores["test_p1"], of_one(scratch_run.calibration())["threshold"]
    )
    assert drawn == [*explain.picture_names(scores["test_files"][i] for _, i in rows), "sheet.png"]


@pytest.mark.parametrize("target", [0, 1])
def test_target_goes_through_everything(bench, scratch_run, drawn, monkeypatch, target):
    """Maps, tests and the images of the tests are those of the class that --target names."""
    compute, test, asked = maps.compute, maps.faithfulness, {"maps": set()}

    def watched_compute(method, model, x, layer, target):
        asked["maps"].add(target)
        return compute(method, model, x, layer, target)

    def watched_test(model, inputs, grey, lungs, methods, layer, target, progress):
        asked.update(pixels=(grey[:, 0] * 255).round().byte().numpy(), tested=target)
        return test(model, inputs, grey[:2], lungs[:2], methods, layer, target)

    monkeypatch.setattr(maps, "compute", watched_compute)
    monkeypatch.setattr(maps, "faithfulness", watched_test)
    name = scratch_run.config.classes[target]
    argv = ["--run", scratch_run, "--target", name, "--tests", 10_000, "--method", "gradcam"]
    done = succeed("explain", *argv, cwd=bench)
    assert scratch_run.explained()["val"]["target"] == name and f"rightly called {name}" in done.out
    assert asked["maps"] == {Answer(target)} and asked["tested"] == Answer(target)
    scores = scratch_run.scores()
    called = scores["val_p1"] >= of_one(scratch_run.calibration())["threshold"]
    right = np.flatnonzero((scores["val_labels"] == target) & (called == target))
    assert len(right) >= 2
    assert np.array_equal(asked["pixels"], load_split(scratch_run, "val").pixels(right))


def test_images_of_one_stem_have_pictures_of_their_own(bench, scratch_run, tmp_path, pictures_drawn):
    values = {"a/x.png": 0, "b/x.png": 120, "x.jpg": 250}
    for name, grey in values.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((40, 40), grey, np.uint8)).save(tmp_path / name)
    files = [tmp_path / name for name in values]
    done = succeed("explain", *files, files[0], "--run", scratch_run, "--method", "rollout", cwd=bench)
    pictures = [scratch_run.folder / "explain" / name for name in ("x.png", "x-2.png", "x-3.png")]
    assert sorted((scratch_run.folder / "explain").iterdir()) == sorted(pictures)
    assert done.out.splitlines() == [f"{f}: wrote {p}" for f, p in zip(files, pictures)]
    for picture, grey in zip(pictures, values.values()):
        pixels = np.asarray(Image.open(picture).convert("RGB"))[60:240, 100:270]  # well inside the image
        assert np.median(pixels) == pytest.approx(grey, abs=2)


def test_unreadable_images_are_named_and_the_others_explained(bench, scratch_run, tmp_path):
    good = sorted(Path("xray/test/NORMAL").iterdir())[0]
    bad = [tmp_path / name for name in ("broken.png", "empty.jpg", "nan.png", "nowhere.png")]
    bad[0].write_bytes(b"no image")
    bad[1].write_bytes(b"")
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(bad[2], format="TIFF")
    done = cli("explain", *bad[:2], good, *bad[2:], "--run", scratch_run, cwd=bench)
    refused(done, "4 of 5 files", *bad)
    assert [p.name for p in (scratch_run.folder / "explain").iterdir()] == [f"{good.stem}.png"]
    refused(cli("explain", bad[0], "--run", scratch_run, cwd=bench), bad[0], "1 of 1 files")


def test_a_folder_is_explained_and_what_is_passed_over_said(bench, scratch_run, tmp_path):
    picture = Image.open(bench / sorted((bench / "xray/test/NORMAL").iterdir())[0]).convert("L")
    (tmp_path / "in").mkdir()
    picture.save(tmp_path / "in/a.bmp")
    save_dicom(tmp_path / "in/IM_1", np.asarray(picture))
    (tmp_path / "in/b.gif").write_bytes(b"GIF89a")
    done = succeed("explain", tmp_path / "in", "--run", scratch_run, "--method", "rollout", cwd=bench)
    assert sorted(p.name for p in (scratch_run.folder / "explain").iterdir()) == ["IM_1.png", "a.png"]
    said = "passed over: 1 .gif; recognised by content, not by name: 1 without extension"
    assert f"note: {tmp_path}/in: {said}\n" in done.err
    (tmp_path / "in/a.bmp").unlink()
    (tmp_path / "in/IM_1").unlink()
    refused(cli("explain", tmp_path / "in", "--run", scratch_run, cwd=bench), "no image files", "1 .gif")


def test_explain_refuses_what_it_cannot_explain(bench, scratch_run):
    for argv, *words in (
        (["--run", bench / "outputs/linear"], "no Vision Transformer"),
        (["--run", scratch_run, "--layer", 99], "--layer 99"),
        (["--run", scratch_run, "--layer", -100], "--layer -100"),
        (["--run", scratch_run, "--layer", 10**9], "--layer"),
        (["--run", scratch_run, "--target", "CAT"], "CAT", "NORMAL, PNEUMONIA"),
        (["--run", scratch_run, "--tests", -1], "--tests"),
        (["--run", scratch_run, "--tests", "nan"], "--tests"),
        (["--run", scratch_run, "--tes", 3], "--tes"),
        (["--run", bench / "nowhere"], "nowhere"),
    ):
        refused(cli("explain", *argv, cwd=bench), *words)
    results = scratch_run.results
    scratch_run.save_results({**results, "split": {**results["split"], "fingerprint": "of other images"}})
    refused(cli("explain", "--run", scratch_run, cwd=bench), "fingerprint")


def test_the_mean_of_alike_maps_claims_no_certainty():
    """One image, or several of one value: at least 0.025^(1/n) of all images are like them."""
    for n, value, least in ((1, 0.25, -1.0), (20, 0.25, 0.0)):
        share, found = 0.025 ** (1 / n), maps.mean_interval([value] * n, least=least)
        low, high = value * share + least * (1 - share), value * share + 1 - share
        assert found == pytest.approx({"mean": value, "lo": low, "hi": high})
    values = np.random.default_rng(0).random(50)
    assert maps.mean_interval(values)["lo"] < values.mean() < maps.mean_interval(values)["hi"] < 0.65


# ---------------------------------------------------------------- splits apart, nothing stale, progress


def test_splits_are_kept_apart_and_nothing_stale_stays(bench, scratch_run, monkeypatch):
    """The sheet of test does not replace that of validation, and no test of other pictures lies beside it."""

    def draw(path, rows, methods, title):  # a second a picture is left out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(title)

    monkeypatch.setattr(explain, "draw", draw)
    argv = ["--run", scratch_run, "--method", "rollout"]
    succeed("explain", *argv, "--tests", 2, cwd=bench)
    val, test = (scratch_run.explained_folder(split) for split in ("val", "test"))
    before = (val / "sheet.png").read_bytes()
    (val / "of_another_sheet.png").write_bytes(b"")
    done = succeed("explain", *argv, "--tests", 2, "--split", "test", cwd=bench)
    assert f"wrote {test}/sheet.png" in done.out and (val / "sheet.png").read_bytes() == before
    assert {k: r["split"] for k, r in scratch_run.explained().items()} == {"val": "val", "test": "test"}
    assert "testing the maps on 2 test images" in done.err
    rows = map_blocks([Entry(scratch_run)])[2].rows
    assert [row[0].rpartition(" on ")[2] for row in rows] == ["validation", "test"]
    succeed("explain", *argv, "--tests", 0, cwd=bench)
    assert not (val / "explain.json").exists() and not (val / "of_another_sheet.png").exists()
    assert (test / "explain.json").exists() and list(scratch_run.explained()) == ["test"]


def test_reports_of_older_versions_stand_until_their_split_is_explained_again(scratch_run):
    old = {"split": "test", "images": 1}
    write_json(scratch_run.folder / "explain/explain.json", old)
    assert scratch_run.explained() == {"test": old}
    write_json(scratch_run.folder / "explain/val/explain.json", {"split": "val"})
    assert scratch_run.explained() == {"test": old, "val": {"split": "val"}}
    write_json(scratch_run.folder / "explain/test/explain.json", {"split": "test", "images": 2})
    assert scratch_run.explained()["test"]["images"] == 2


def test_tests_of_maps_say_how_far_they_are(monkeypatch, capsys):
    """Every step is counted, and there are as many as were announced; without a title it is silent."""
    monkeypatch.setattr(console, "Pace", lambda: Pace(every=-1))
    lungs, grey = np.ones((20, 32, 32), bool), torch.rand(20, 1, 32, 32)
    maps.faithfulness(tiny_vit(), PLAIN, grey, lungs, ["rollout", "gradcam"], title="tests")
    lines = capsys.readouterr().err.splitlines()
    counts = [re.match(r"tests(?:, .+)?: (\d+) of (\d+) (images|models): ", line).groups() for line in lines]
    redrawn = [(str(i + 1), "4", "models") for i in range(4)]  # the head, two blocks and the patches
    assert counts == [("16", "20", "images"), ("20", "20", "images"), *redrawn, *redrawn]
    maps.faithfulness(tiny_vit(), PLAIN, grey[:2], lungs[:2], ["rollout"])
    assert capsys.readouterr().err == ""
