"""Tests of cnn and train_cnn, with timm as the peer."""

import copy
import importlib.util
import sys

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from common.console import InputError
from models import build, cnn, maps
from records import onnx
from tests.shared import SHARED, cli, predict_rows, randomise, read_json, refused, succeed
from training import step
from training.recipe import Recipe

NAME = "mobilenetv3_small_050"  # small, and with a convolution after the pooling
X = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """(timm's network with random weights throughout, the file that holds them)."""
    peer = timm.create_model(NAME, num_classes=10)
    torch.manual_seed(0)
    for name, value in peer.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if "running_var" in name or "bn" in name else value.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("cnn") / "w.safetensors"
    save_file(peer.state_dict(), path)
    return peer.eval(), path


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "regnety_002", "convnextv2_atto"])
def test_features_are_timms_pooled_ones(name):
    torch.manual_seed(0)
    model = cnn.Cnn(name, num_classes=3).eval()
    peer = timm.create_model(name, num_classes=0).eval()
    peer.load_state_dict(model.body.state_dict())
    with torch.no_grad():
        assert torch.equal(model.features(X), peer(X.contiguous(memory_format=torch.channels_last)))
        assert torch.allclose(model.features(X), peer(X), rtol=1e-4, atol=1e-5)
        assert cnn.has_batch_norm(model) == ("convnext" not in name)
        assert model(X).shape == (2, 3) and torch.equal(model(X), model.head(model.features(X)))


def test_weights_of_a_file_reach_the_model(body):
    peer, path = body
    model = cnn.Cnn(NAME).eval()
    report = cnn.load_weights(model, path)
    assert set(report["dropped"]) == {"classifier.weight", "classifier.bias"}
    torch.save(model.state_dict(), path.with_name("own.pth"))  # a checkpoint of train_cnn.py is weights, too
    other = cnn.Cnn(NAME, num_classes=5)
    report = cnn.load_weights(other, path.with_name("own.pth"))
    assert all(torch.equal(v, other.body.state_dict()[n]) for n, v in model.body.state_dict().items())
    assert all(name.startswith("head.") for name in report["dropped"]) and len(report["dropped"]) == 6
    assert sorted(report["loaded"]) == sorted(model.body.state_dict())
    seen = []
    model.tap.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        expected = peer.forward_head(peer.forward_features(X), pre_logits=True)
        assert torch.allclose(model.features(X), expected, atol=1e-4)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)  # the faster layout
    again = build.build_model({"kind": "cnn", **model.config})
    again.load_state_dict(model.state_dict())


def test_files_that_do_not_count_batches_are_read(body, tmp_path):
    """Those of 2017 and 2018, CheXNet's for one: torch 0.4.1 began to count them."""
    peer, path = body
    old = {n: v for n, v in peer.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert len(old) < len(peer.state_dict())
    torch.save(old, tmp_path / "old.pth")
    models = cnn.Cnn(NAME).eval(), cnn.Cnn(NAME).eval()
    for model, file in zip(models, (path, tmp_path / "old.pth")):
        cnn.load_weights(model, file)
    with torch.no_grad():
        assert torch.equal(models[0].features(X), models[1].features(X))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "NaN", "other", "text", "npz"])
def test_wrong_cnn_weights_are_refused(body, tmp_path, change):
    state = {n: v.clone() for n, v in body[0].state_dict().items()}
    first = "conv_stem.weight"
    if change == "missing":
        del state[first]
    elif change == "unknown":
        state["extra.weight"] = torch.ones(1)
    elif change == "shape":
        state[first] = state[first][:, :2].clone()  # one channel would be spread over three
    elif change == "NaN":
        state[first][0, 0, 0, 0] = float("nan")
    elif change == "other":
        state = timm.create_model("resnet10t").state_dict()
    path = tmp_path / ("w.safetensors.npz" if change == "npz" else "w.safetensors")
    if change == "text":
        path.write_text("no weights")
    else:
        save_file(state, path)
    model = cnn.Cnn(NAME)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="w.safetensors"):
        cnn.load_weights(model, path)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_names_that_are_no_cnn():
    with pytest.raises(InputError, match="did you mean .*resnet50"):
        cnn.Cnn("resnet5O")
    with pytest.raises(InputError, match="vit_tiny_patch16_224"):
        cnn.Cnn("vit_tiny_patch16_224")
    with pytest.raises(InputError, match="swin.* is no CNN"):
        cnn.Cnn("swin_tiny_patch4_window7_224")
    for name in (3, None, "x" * 300, "hf-hub:someone/something"):
        with pytest.raises(InputError, match="timm knows no model"):
            cnn.Cnn(name)


def test_names_with_a_tag():
    """NAME.TAG names weights of timm's; a tag that does not exist is an error."""
    assert cnn.Cnn("resnet18.a1_in1k").config["name"] == "resnet18.a1_in1k"
    assert (cnn.usual_size("resnet18.a1_in1k"), cnn.usual_size("resnet18")) == (224, 224)
    for ask in (cnn.Cnn, cnn.usual_size):
        with pytest.raises(InputError, match="nonsense"):
            ask("resnet18.nonsense")


def test_what_a_cnn_cannot_train_on():
    """Too small an image, or a step of one image where BatchNorm sees one value a channel."""
    model = cnn.Cnn("resnet10t", drop_path_rate=0.5)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.check_training(64, 1)
    model.check_training(32, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    with pytest.raises(InputError, match="a training step of one image.*--batch-size"):
        model.check_training(32, 1)
    with pytest.raises(InputError, match="images of 16 px.*--img-size"):
        cnn.Cnn("densenet121").check_training(16, 2)


def test_without_timm_there_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="pip install timm"):
        cnn.Cnn(NAME)


def test_grad_cam_of_a_cnn_by_hand():
    torch.manual_seed(0)
    model = cnn.Cnn("resnet18").eval()
    features = model.body.forward_features(X).detach().requires_grad_()
    model.head(features.mean((2, 3)))[:, 1].sum().backward()
    expected = (features * features.grad.mean((2, 3), keepdim=True)).sum(1).relu().detach()
    assert torch.allclose(maps.grad_cam(model, X), expected, atol=1e-6)


# ---------------------------------------------------------------- rates


def test_layer_decay_is_timms():
    """The scales of the learning rate, by name, against timm's parameter groups of the same ViT."""
    from timm.optim import param_groups_layer_decay

    from vit import build_vit

    ours = build_vit("ti16", depth=4)
    peer = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=2)
    named = {id(p): n for n, p in peer.named_parameters()}
    groups = param_groups_layer_decay(peer, layer_decay=0.7)
    expected = {named[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    got = step.rate_scales(ours, layer_decay=0.7)
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected)


@pytest.mark.parametrize("name, blocks", [("resnet18", (1, 2, 3, 4)), ("convnextv2_atto", (0, 1, 2, 3))])
def test_layer_decay_of_a_cnn_has_no_steps_without_weights(name, blocks):
    """The last part below the head gets the decay once, each part or stage below it once more."""
    model = cnn.Cnn(name)
    scales = step.rate_scales(model, layer_decay=0.5)
    part = "body.layer{}." if name == "resnet18" else "body.stages.{}."
    found = [{v for n, v in scales.items() if n.startswith(part.format(k))} for k in blocks]
    assert all(len(values) == 1 for values in found)
    rates = [values.pop() for values in found]
    assert [b / a for a, b in zip(rates, rates[1:])] == [2, 2, 2]
    assert {v for n, v in scales.items() if n.startswith("head.")} == {1.0}
    assert rates[-1] == 0.5 if name == "resnet18" else rates[-1] in (0.5, 0.25)  # a norm before the head


def test_backbone_rate_and_decay_of_groups():
    model = cnn.Cnn("resnet10t")
    groups = step.parameter_groups(model, 0.01, backbone=0.25)
    head = {id(p) for p in model.head.parameters()}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    for group in groups:
        for p in group["params"]:
            assert group["lr_scale"] == (1.0 if id(p) in head else 0.25)
            assert group["weight_decay"] == (0.01 if p.ndim > 1 else 0.0)


def test_plateau_is_torchs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        merits = rng.integers(0, 6, 30) / 10
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        peer = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            "max",
            factor=step.PLATEAU_FACTOR,
            patience=step.PLATEAU_PATIENCE,
            threshold=0,
        )
        for i, merit in enumerate(merits):
            peer.step(merit)
            assert step.plateau_factor(merits[: i + 1]) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_cosine_ends_at_its_floor():
    rates = [step.learning_rate(s, 100, 0, 3e-5, floor=1e-7) for s in (0, 50, 100)]
    assert rates == pytest.approx([3e-5, (3e-5 + 1e-7) / 2, 1e-7])


# ---------------------------------------------------------------- the script


def test_cnn_from_training_to_prediction(flags, synthetic, tmp_path):
    name, weights = "test_resnet", tmp_path / "w.safetensors"  # timm's own for tests: four blocks
    torch.manual_seed(0)
    save_file(timm.create_model(name, num_classes=10).state_dict(), weights)
    argv = ("train_cnn", *flags, "--model", name, "--weights", weights, "--epochs", 1, "--batch-size", 16)
    done = succeed(*argv, "--accumulate", 2, cwd=tmp_path)
    assert "BatchNorm" in done.err and f"weights: {weights} (timm CNN)" in done.out
    assert "the head alone, 5 epochs" in done.err and "below the head 5.0e-06" in done.err
    results = read_json(tmp_path, "outputs/cnn/results.json")
    recipe = results["recipe"]
    assert (recipe["freeze_epochs"], recipe["head_lr"], recipe["head_decay"]) == (5, 1e-4, 0)
    assert (recipe["min_lr"], recipe["stop_on"], recipe["watch"]) == (1e-7, "loss", "accuracy")
    assert (
        results["model_config"]["name"] == name
        and results["mean"] == [0.5] * 3
        or results["mean"][0] == 0.485
    )
    succeed("calibrate", "--min-recall", 0.9, cwd=tmp_path)
    rows = predict_rows(tmp_path, "--run", "outputs/cnn", synthetic / "test")
    scores = np.load(tmp_path / "outputs/cnn/scores.npz", allow_pickle=False)
    assert sorted(float(r["p_pneumonia"]) for r in rows) == pytest.approx(sorted(scores["test_p1"]), abs=1e-5)
    needed = ("onnx", "onnxscript", "onnxruntime")
    if onnx.exports() and all(importlib.util.find_spec(name) for name in needed):
        done = succeed("predict", "--export", "m.onnx", "--run", "outputs/cnn", cwd=tmp_path)
        assert "by at most" in done.out
    succeed("explain", "--run", "outputs/cnn", "--tests", 1, cwd=tmp_path)
    assert "gradcam" in read_json(tmp_path, "outputs/cnn/explain/val/explain.json")
    refused(cli("explain", "--run", "outputs/cnn", "--method", "rollout", cwd=tmp_path), "no attention")
    refused(cli("explain", "--run", "outputs/cnn", "--layer", 3, cwd=tmp_path), "--layer 3", "leave it out")
    refused(cli("train_cnn", *flags, "--model", "resnet5O", "--out", "o", cwd=tmp_path), "did you mean")
    one = ("--model", "resnet10t", "--batch-size", 1, "--out", "o")
    refused(cli("train_cnn", *flags, *one, cwd=tmp_path), "step of one image", "--batch-size")
    assert not (tmp_path / "o").exists()


def test_recipes_of_cnns_have_batch_sizes_of_their_own():
    import train_cnn

    sizes = {
        n: train_cnn.defaults(n).recipes["default"]["batch_size"] for n in ("resnet50", "tf_efficientnetv2_l")
    }
    assert sizes == {"resnet50": 32, "tf_efficientnetv2_l": 8}
    assert Recipe().backbone_lr_scale == Recipe().layer_decay == 1


def test_real_lite0_equals_timm():
    path = SHARED / "weights/tf_efficientnet_lite0.safetensors"
    if not path.exists():
        pytest.skip("no real weights here")
    model = cnn.Cnn("tf_efficientnet_lite0").eval()
    cnn.load_weights(model, path)
    peer = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(path)).eval()
    with torch.no_grad():
        expected = peer.forward_head(peer.forward_features(X), pre_logits=True)
        assert torch.allclose(model.features(X), expected, atol=1e-4)
    assert model.scaling == ((0.5,) * 3, (0.5,) * 3)


def test_every_parameter_of_a_cnn_has_a_gradient():
    model = randomise(cnn.Cnn("resnet10t"))
    model(X).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
