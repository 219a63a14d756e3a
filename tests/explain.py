"""Tests of explain."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import engine
from tests.shared import cli, tiny_vit


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
