"""Tests of loading: other libraries' files against their own forward passes, and files to refuse."""

import argparse
import json
import struct

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import npz_loader
from common.console import InputError
from loading import settings, vits
from loading.families import Family
from models import build, cnn, maps
from models.dinov3 import DinoV3, make_vit
from studies import weights
from tests.shared import Evil, cli, randomise, read_json, refused, same_tensors, succeed, vit_for

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


SLOW = (  # python studies/weights.py compares these, too; each has a smaller example of its names
    "timm ViT-H/14",
    "DINOv3 S, timm qkvb, 256 px",
    "torchvision ResNet-18",
    "torchvision ResNet-50",
    "torchvision DenseNet-121",
)


@pytest.mark.parametrize("family", [family for family in weights.FAMILIES if family not in SLOW])
def test_values_are_those_of_the_library(tmp_path, family):
    """Our output from a file in a library's layout is the library's own."""
    if family == "torchxrayvision DenseNet":
        pytest.importorskip("torchxrayvision", reason="pip install torchxrayvision; its layout is tested too")
    theirs, ours, report = weights.compared(weights.case_of(family), tmp_path)
    assert theirs.shape == ours.shape and theirs.std() > 0.01
    assert torch.allclose(theirs, ours, rtol=0, atol=2e-5 * max(1, float(theirs.std())))
    if family == "DenseNet-121 of one channel":
        check_scaling_of_torchxrayvision(report)


def check_scaling_of_torchxrayvision(report):
    """(grey - mean) / std is its normalize: (2 grey - 1) 1024."""
    grey = np.linspace(0, 1, 11)
    for mean, std in zip(report["mean"], report["std"]):
        assert np.allclose((grey - mean) / std, (2 * grey - 1) * 1024)
    assert "torchxrayvision" in report["scaling"] and not report["guessed"]
    assert any("spread over three" in note for note in report["notes"])


def test_a_missed_bias_or_transposed_kernel_would_show(tmp_path):
    """The comparison above can fail: one bias of the file is changed."""
    case = weights.timm_dinov3("vit_small_patch16_dinov3_qkvb")
    theirs, _, _ = weights.compared(case, tmp_path)
    case.saved["blocks.0.attn.v_bias"] = case.saved["blocks.0.attn.v_bias"].flip(0)
    ours = weights.compared(case._replace(forward=lambda x: theirs), tmp_path)[1]
    assert (theirs - ours).abs().max() > 1e-3


# ---------------------------------------------------------------- scaling and heads


@pytest.fixture(scope="module")
def plain():
    """The state dict of a ViT of timm: width 192, 2 blocks, 64 px, 5 classes."""
    return weights.timm_vit().saved


@pytest.fixture(scope="module")
def small_cnn():
    return cnn.Cnn("resnet10t")


def report_of(path, **options):
    read = npz_loader.read(path, **options)
    return npz_loader.load(make_vit(**read.config, img_size=64), read, path)


def beside(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))


RAD_DINO = dict(do_normalize=True, image_mean=[0.5307] * 3, image_std=[0.2583] * 3, rescale_factor=1 / 255)


def test_scaling_comes_from_the_first_that_speaks(tmp_path, plain):
    """Flags, the file, what lies beside it, the family: each of them wins over the next."""
    path = tmp_path / "w.pth"
    torch.save(plain, path)
    report = report_of(path)
    assert report["mean"] == [0.5] * 3 and report["guessed"] and "guessed" in report["scaling"]
    torch.save({n: v for n, v in plain.items() if not n.startswith("head.")}, path)
    assert report_of(path)["mean"] == IMAGENET[0]  # of self-supervision
    torch.save(plain, path)

    about = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    beside(tmp_path, config=dict(architecture="vit", num_features=192, pretrained_cfg=about))
    report = report_of(path)
    assert (report["mean"], report["std"]) == (about["mean"], about["std"]) and not report["guessed"]
    assert report["scaling"] == "pretrained_cfg in config.json"

    beside(tmp_path, preprocessor_config=RAD_DINO)
    report = report_of(path)
    assert (report["mean"], report["std"]) == ([0.5307] * 3, [0.2583] * 3)
    assert report["scaling"] == "preprocessor_config.json"

    torch.save({"arch": "deit_tiny_patch16_224", "state_dict": plain}, path)
    report = report_of(path)
    assert (report["mean"], report["std"]) == IMAGENET and "deit_tiny_patch16_224" in report["scaling"]

    report = report_of(path, timm_name="vit_tiny_patch16_224.augreg_in21k")
    assert report["mean"] == [0.5] * 3 and "augreg_in21k" in report["scaling"]
    assert any("arch" in note for note in report["notes"])


def test_files_of_another_model_are_not_used(tmp_path, plain):
    path = tmp_path / "w.pth"
    torch.save(plain, path)
    beside(tmp_path, config=dict(hidden_size=768, num_attention_heads=12), preprocessor_config=RAD_DINO)
    report = report_of(path)
    assert report["guessed"] and "hidden_size is 768, the weights have 192" in report["notes"][-1]


@pytest.mark.parametrize(
    "files, words",
    [
        (dict(config="{"), "config.json is not readable JSON.*mend it"),
        (dict(config="[]"), "JSON object"),
        (dict(preprocessor_config=RAD_DINO | {"image_std": [0, 1, 1]}), "std"),
        (dict(preprocessor_config=RAD_DINO | {"image_mean": ["a"]}), "mean"),
        (dict(preprocessor_config=RAD_DINO | {"image_mean": [float("nan")] * 3}), "mean"),
        (dict(preprocessor_config=RAD_DINO | {"rescale_factor": 1}), "rescale_factor"),
        (dict(config=dict(hidden_act="quick_gelu")), "quick_gelu"),
        (dict(config=dict(hidden_act="silu")), "silu.*gelu"),
        (dict(config=dict(rope_theta=10000)), "rope_theta"),
    ],
)
def test_wrong_files_beside_the_weights(tmp_path, plain, files, words):
    torch.save(plain, tmp_path / "w.pth")
    beside(tmp_path, **files)
    with pytest.raises(InputError, match=words) as error:
        report_of(tmp_path / "w.pth")
    assert str(error.value).isprintable()


def test_pixels_that_are_only_rescaled(tmp_path, plain):
    torch.save(plain, tmp_path / "w.pth")
    beside(tmp_path, preprocessor_config=RAD_DINO | {"do_normalize": False})
    report = report_of(tmp_path / "w.pth")
    assert (report["mean"], report["std"]) == ([0.0] * 3, [1.0] * 3)
    beside(tmp_path, preprocessor_config={"size": 224})
    report = report_of(tmp_path / "w.pth")
    assert report["guessed"] and "has no image_mean" in report["notes"][-1]


def test_heads_are_never_guessed(tmp_path):
    """From config.json, from --heads, by the family's width; else an error that asks."""
    donor = randomise(vit_for(dict(dim=36, heads=4, patch=4, grid=2)))
    path = tmp_path / "w.pth"
    torch.save(donor.state_dict(), path)
    with pytest.raises(InputError, match="width of 36 does not tell: give --heads"):
        npz_loader.config_from_npz(path)
    assert npz_loader.config_from_npz(path, heads=4)["num_heads"] == 4
    with pytest.raises(InputError, match="5 heads do not divide the width of the weights, 36"):
        npz_loader.config_from_npz(path, heads=5)
    beside(tmp_path, config=dict(hidden_size=36, num_attention_heads=4, layer_norm_eps=1e-12))
    config = npz_loader.config_from_npz(path)
    assert (config["num_heads"], config["norm_eps"]) == (4, 1e-12)
    with pytest.raises(InputError, match="4 heads, the model has 3"):
        npz_loader.load_npz(vit_for(dict(dim=36, heads=3), norm_eps=1e-12), path)

    vit, rotary = Family("", ()), Family("", (), rotary=True)
    found = [vits._numbers(settings.Settings(), f, {"embed_dim": 1280})["num_heads"] for f in (vit, rotary)]
    assert found == [16, 20]  # ViT-H and DINOv3-H+
    peers = [timm.create_model(name, depth=1) for name in ("vit_small_patch16_224", "vit_base_patch16_224")]
    assert [settings.HEADS[p.embed_dim] for p in peers] == [p.blocks[0].attn.num_heads for p in peers]


@pytest.mark.parametrize(
    "name, words", [("vit_tini_patch16_224", "did you mean"), ("vit_small_patch16_224", "384 wide")]
)
def test_timm_names_that_do_not_fit(tmp_path, plain, name, words):
    torch.save(plain, tmp_path / "w.pth")
    with pytest.raises(InputError, match=words):
        npz_loader.config_from_npz(tmp_path / "w.pth", timm_name=name)


def test_results_say_where_the_scaling_came_from(flags, plain, tmp_path):
    """The command line, from a wrapped file: the guess in a note; then the file beside it; then the flags."""
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in plain.items()}}, path)
    argv = ("train_pretrained", *flags, "--weights", path, "--epochs", 0, "--freeze-epochs", 1, "--overwrite")
    done = succeed(*argv, cwd=tmp_path)
    assert "note: nothing says how the inputs of" in done.err and "--timm-name NAME or --mean" in done.err
    assert '"module." is taken off' in done.out
    assert "guessed" in read_json(tmp_path, "outputs/pretrained/results.json")["weights"]["scaling"]

    beside(tmp_path, preprocessor_config=RAD_DINO)
    done = succeed(*argv, cwd=tmp_path)
    results = read_json(tmp_path, "outputs/pretrained/results.json")
    assert "nothing says" not in done.err and results["mean"] == [0.5307] * 3
    assert results["weights"]["scaling"] == "preprocessor_config.json"

    done = succeed(*argv, "--mean", 0.1, 0.2, 0.3, cwd=tmp_path)
    results = read_json(tmp_path, "outputs/pretrained/results.json")
    assert (results["mean"], results["std"]) == ([0.1, 0.2, 0.3], [0.2583] * 3)
    assert results["weights"]["scaling"] == "--mean, else preprocessor_config.json"
    again = report_of(tmp_path / "outputs/pretrained/checkpoint.pth")  # a run's weights are weights, too
    assert (again["scaling"], again["mean"]) == ("results.json", results["mean"])
    refused(cli(*argv, "--heads", 5, cwd=tmp_path), "5 heads do not divide the width of the weights, 192")
    refused(cli(*argv, "--timm-name", "nonsense", cwd=tmp_path), "timm knows no model")


# ---------------------------------------------------------------- wrapped files


@pytest.mark.parametrize(
    "wrapper", ["state_dict", "model_state_dict", "model", "teacher", "student", "other"]
)
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.module.", "model.encoder.", "backbone.", "vit."]
)
def test_wrappers_and_prefixes_are_taken_off(tmp_path, wrapper, prefix):
    donor = randomise(vit_for())
    state = {prefix + name: value for name, value in donor.state_dict().items()}
    torch.save(
        {"epoch": 3, wrapper: state, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "w.pth"
    )
    if wrapper == "other":  # two dicts: which is meant is not clear
        with pytest.raises(InputError, match=r"several dicts.*\[other, optimizer\]"):
            npz_loader.load_npz(vit_for(), tmp_path / "w.pth")
        return
    model = vit_for()
    report = npz_loader.load_npz(model, tmp_path / "w.pth")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), donor.parameters()))
    assert f'"{wrapper}" of the file is read, not epoch, optimizer' in report["notes"]
    assert len(report["notes"]) == 1 + prefix.count(".")


def test_cnns_are_unwrapped_by_the_same_reader(tmp_path):
    donor = randomise(timm.create_model("resnet10t"))
    state = {f"module.model.{name}": value for name, value in donor.state_dict().items()}
    torch.save({"model": {"state_dict": state}, "epoch": 3}, tmp_path / "w.pth")
    model = cnn.Cnn("resnet10t")
    report = cnn.load_weights(model, tmp_path / "w.pth")
    assert len(report["notes"]) == 4 and set(report["dropped"]) == {"fc.weight", "fc.bias"}
    assert torch.equal(model.body.conv1[0].weight, donor.conv1[0].weight)
    del state["module.model.conv1.0.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"missing \[conv1.0.weight\]; the file has \[bn1"):
        cnn.load_weights(model, tmp_path / "w.pth")


class Network(torch.nn.Linear):
    """A model that somebody pickled whole."""


@pytest.mark.parametrize(
    "around, weights_are",
    [
        (dict(args=argparse.Namespace(lr=0.1)), "held[key] for key in"),
        (dict(best=np.float64(0.5)), "held[key] for key in"),
        (None, "held.state_dict()"),
    ],
)
def test_refused_files_say_how_to_save_the_weights(tmp_path, around, weights_are):
    """Nothing is unpickled; the three lines of Python that the message ends with do what they say."""
    path = tmp_path / "w.pth"
    state = randomise(vit_for()).state_dict()
    torch.save({"model": state, **around} if around else Network(2, 3), path)
    with pytest.raises(InputError) as error:
        npz_loader.load_npz(vit_for(), path)
    first, *lines = str(error.value).split("\n")
    assert "was refused: it names" in first and len(lines) == 3 and weights_are in lines[2]
    exec("\n".join(line.strip() for line in lines), {})
    if around:
        npz_loader.load_npz(vit_for(), tmp_path / "w-weights.pth")
    else:
        assert sorted(torch.load(tmp_path / "w-weights.pth", weights_only=True)) == ["bias", "weight"]


def test_code_beside_the_weights_does_not_run(tmp_path, small_cnn):
    evil = Evil(tmp_path / "executed")
    for name, value in (("a", {"model": vit_for().state_dict(), "x": evil}), ("b", evil)):
        torch.save(value, tmp_path / f"{name}.pth")
        for load in (npz_loader.config_from_npz, lambda p: cnn.load_weights(small_cnn, p)):
            with pytest.raises(InputError, match="perhaps code"):
                load(tmp_path / f"{name}.pth")
    assert not (tmp_path / "executed").exists()


def test_counters_of_batchnorm_may_have_any_type(tmp_path, small_cnn):
    """As in a file that `{k: v.half()}` wrote; nothing reads them."""
    saved = {name: value.half() for name, value in small_cnn.body.state_dict().items()}
    assert any(value.ndim == 0 for value in saved.values())
    torch.save(saved, tmp_path / "w.pth")
    model = cnn.Cnn("resnet10t")
    cnn.load_weights(model, tmp_path / "w.pth")
    assert torch.equal(model.body.conv1[0].weight, saved["conv1.0.weight"].float())


# ---------------------------------------------------------------- what must be refused


def test_a_value_beyond_float32_is_refused(tmp_path, small_cnn):
    saved = {name: value.clone() for name, value in small_cnn.body.state_dict().items()}
    saved["conv1.0.weight"] = saved["conv1.0.weight"].double() * 1e60
    torch.save(saved, tmp_path / "w.pth")
    with pytest.raises(InputError, match="NaN or infinite values in .conv1.0.weight"):
        cnn.load_weights(cnn.Cnn("resnet10t"), tmp_path / "w.pth")


def names_only(name):
    """The names of a model of timm, on tensors of one number."""
    with torch.device("meta"):
        peer = timm.create_model(name)
    return {n: torch.ones(1) for n in peer.state_dict()}


def hugging_face_tower(kind):
    import transformers

    sizes = dict(
        hidden_size=12, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32
    )
    config = getattr(transformers, f"{kind}VisionConfig")(**sizes, patch_size=16)
    state = getattr(transformers, f"{kind}VisionModel")(config).state_dict()
    return {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in state.items()}


OTHER_MODELS = {
    "CLIP, timm": (lambda: names_only("vit_base_patch16_clip_224"), "CLIP"),
    "SigLIP, timm": (lambda: names_only("vit_base_patch16_siglip_224"), "SigLIP"),
    "CLIP, Hugging Face": (lambda: hugging_face_tower("CLIP"), "CLIP"),
    "SigLIP, Hugging Face": (lambda: hugging_face_tower("Siglip"), "SigLIP"),
    "OpenAI CLIP": (
        lambda: {"logit_scale": torch.tensor(1.0), "visual.transformer.resblocks.0.ln_1.bias": torch.ones(2)},
        "CLIP",
    ),
    "BiomedCLIP": (lambda: {f"visual.trunk.{n}": v for n, v in vit_for().state_dict().items()}, "CLIP"),
    "BEiT": (lambda: names_only("beit_base_patch16_224"), "BEiT"),
    "Swin": (lambda: names_only("swin_tiny_patch4_window7_224"), "Swin"),
}


def test_cnns_and_vits_are_told_apart(tmp_path, plain, small_cnn):
    torch.save({"model": small_cnn.body.state_dict()}, tmp_path / "cnn.pth")
    torch.save({"module.conv1.weight": torch.ones(64, 3, 7, 7)}, tmp_path / "old.pth")
    torch.save(plain, tmp_path / "vit.pth")
    with pytest.raises(InputError, match="old.pth holds a CNN .it has conv1.weight.: train_cnn.py"):
        npz_loader.config_from_npz(tmp_path / "old.pth")
    with pytest.raises(InputError, match="patch_embed.proj.weight is missing; it has .bn1.bias"):
        npz_loader.config_from_npz(tmp_path / "cnn.pth")
    with pytest.raises(InputError, match="vit.pth holds a ViT .*train_pretrained.py"):
        cnn.load_weights(small_cnn, tmp_path / "vit.pth")


@pytest.mark.parametrize("what", OTHER_MODELS)
def test_other_models_are_refused_by_name(tmp_path, what):
    state, word = OTHER_MODELS[what]
    torch.save(state(), tmp_path / "w.pth")
    with pytest.raises(InputError, match=rf"w.pth is .*{word}.*docs/WEIGHTS.md"):
        npz_loader.config_from_npz(tmp_path / "w.pth")


def _dinov3_state():
    model = randomise(DinoV3(img_size=32, embed_dim=192, depth=2, num_heads=3))
    return {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}


HOSTILE = {
    "empty": lambda s: {},
    "empty wrapper": lambda s: {"state_dict": {}},
    "wrappers in wrappers": lambda s: {"model": {"model": {"model": {"model": s | {"x": torch.ones(1)}}}}},
    "the same name with and without a prefix": lambda s: {
        **{n: v for n, v in s.items() if "patch_embed" not in n},
        **{f"module.{n}": v for n, v in s.items()},
    },
    "half of the names with a prefix": lambda s: {
        (f"module.{n}" if "blocks.1" in n else n): v for n, v in s.items()
    },
    "registers flat": lambda s: {**s, "reg_token": torch.ones(4 * 192)},
    "one register": lambda s: {**s, "reg_token": s["reg_token"][:, :1]},
    "no [CLS]": lambda s: {n: v for n, v in s.items() if n != "cls_token"},
    "another norm before the head": lambda s: {**s, "fc_norm.weight": torch.ones(192)},
    "registers missing": lambda s: {n: v for n, v in s.items() if n != "reg_token"},
    "kernel flat": lambda s: {**s, "blocks.0.attn.qkv.weight": torch.ones(3 * 192 * 192)},
    "only a bias of queries": lambda s: {n: v for n, v in s.items() if n != "blocks.1.attn.v_bias"},
    "bias of keys in use": lambda s: {**s, "blocks.0.attn.qkv.bias": torch.ones(3 * 192)},
    "bias not in three": lambda s: {**s, "blocks.0.attn.qkv.bias": torch.ones(7)},
    "rotations of another base": lambda s: {**s, "rope_embed.periods": 1000 ** (torch.arange(16) / 16)},
    "gated in one block": lambda s: {**s, "blocks.1.mlp.fc1_g.weight": torch.ones(768, 192)},
    "registers 10^9": lambda s: {**s, "reg_token": torch.ones(1, 1, 192).expand(1, 10**9, 192)},
    "scalar": lambda s: {**s, "norm.bias": torch.tensor(1.0)},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_dinov3_files(tmp_path, what):
    path = tmp_path / "w.pth"
    torch.save(HOSTILE[what](_dinov3_state()), path)
    with pytest.raises(InputError) as error:
        npz_loader.config_from_npz(path)
    assert "w.pth" in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "header",
    [
        {"patch_embed.proj.weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 64]}},
        {"patch_embed.proj.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 10**12]}},
        {"patch_embed.proj.weight": {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]}},
    ],
)
def test_safetensors_whose_header_lies(tmp_path, small_cnn, header):
    text = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    for load in (npz_loader.config_from_npz, lambda p: cnn.load_weights(small_cnn, p)):
        with pytest.raises(InputError, match="w.safetensors cannot be loaded"):
            load(tmp_path / "w.safetensors")


HOSTILE_CNNS = {
    "one channel of 10^9 filters": lambda s: {
        **s,
        "conv_stem.weight": torch.ones(1, 1, 1, 1).expand(10**9, 1, 3, 3),
    },
    "features.0.0 alone": lambda s: {"features.0.0.weight": torch.ones(32, 3, 3, 3)},
    "a block too many": lambda s: {**s, "features.1.9.block.0.0.weight": torch.ones(32, 1, 3, 3)},
    "a layer too many": lambda s: {**s, "features.1.0.block.9.0.weight": torch.ones(32, 1, 3, 3)},
    "a number of 5000 digits": lambda s: {**s, f"features.{'9' * 5000}.0.weight": torch.ones(1)},
    "two names that become one": lambda s: {**s, "conv_stem.weight": torch.ones(32, 3, 3, 3)},
    "transposed": lambda s: {**s, "features.0.0.weight": torch.ones(3, 32, 3, 3)},
}


@pytest.fixture(scope="module")
def efficientnet():
    return weights.efficientnet().saved, cnn.Cnn("efficientnet_b0")


@pytest.mark.parametrize("what", HOSTILE_CNNS)
def test_hostile_cnn_files(efficientnet, tmp_path, what):
    state, model = efficientnet
    torch.save(HOSTILE_CNNS[what](state), tmp_path / "w.pth")
    with pytest.raises(InputError) as error:
        cnn.load_weights(model, tmp_path / "w.pth")
    assert "w.pth" in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 3000


# ---------------------------------------------------------------- DINOv3 as a model


def test_dinov3_has_the_parameters_of_timm():
    """Names and shapes at the real widths, without memory."""
    sizes = {"small": (384, 6), "small_plus": (384, 6), "base": (768, 12), "large": (1024, 16)}
    for name, (width, heads) in sizes.items():
        with torch.device("meta"):
            peer = timm.create_model(f"vit_{name}_patch16_dinov3_qkvb", num_classes=2, depth=1)
            ours = DinoV3(gated="plus" in name, embed_dim=width, depth=1, num_heads=heads)
        shapes = [{n: tuple(v.shape) for n, v in m.state_dict().items()} for m in (ours, peer)]
        assert shapes[0] == shapes[1]
    config = dict(ours.config, depth=24)
    names = [npz_loader.architecture_name(dict(config, gated=gated)) for gated in (False, True)]
    assert names == ["dinov3-l16", "dinov3-l16+"]


def test_dinov3_trains_explains_and_comes_back():
    """A gradient for every parameter; dropped patches keep their positions; maps; a config round trip."""
    model = randomise(
        DinoV3(img_size=64, embed_dim=24, depth=2, num_heads=3, gated=True, num_classes=3)
    ).eval()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    with torch.no_grad():
        whole, attention = model.forward_features(x, return_attention=True)
        assert torch.allclose(whole, model.forward_features(x), atol=1e-5)
        order = torch.stack([torch.randperm(16), torch.randperm(16)])
        shuffled = model.forward_features(x, keep=order)[:, 5:]
        expected = whole[:, 5:].gather(1, order.unsqueeze(2).expand(-1, -1, 24))
        assert torch.allclose(shuffled, expected, atol=1e-5)
        again = build.build_model({"kind": "vit", **json.loads(json.dumps(model.config))}).eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x), model(x))
    assert attention.shape == (2, 2, 3, 21, 21)
    for method in maps.METHODS:
        assert maps.compute(method, model, x).shape == (2, 4, 4)
    stem = {**model.config, "num_classes": 1}
    hybrid = build.build_model({"kind": "hybrid", "stem": stem, "d_model": 24, "depth": 1}).eval()
    assert hybrid(torch.cat([x, torch.ones(2, 1, 64, 64)], dim=1)).shape == (2, 2)


@pytest.mark.parametrize("key, value", [("rotary", 1), ("norm_eps", 0), ("fc_norm", "yes"), ("gated", None)])
def test_configs_of_runs_are_checked(key, value):
    config = {"kind": "vit", "img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3, key: value}
    with pytest.raises(InputError, match=key):
        build.build_model(config)


def test_averaged_vits_read_the_mean_patch(tmp_path):
    """Without [CLS] only the mean can be read; the file's head is not put on another readout."""
    with pytest.raises(InputError, match="needs a .CLS. token"):
        make_vit(embed_dim=24, num_heads=3, depth=1, class_token=False)
    case = weights.timm_vit(global_pool="avg")
    torch.save(case.saved, tmp_path / "w.pth")
    config = npz_loader.config_from_npz(tmp_path / "w.pth")
    model = make_vit(**config, img_size=64, num_classes=weights.CLASSES, readout="cls")
    assert npz_loader.load_npz(model, tmp_path / "w.pth")["reset"] == ["head.weight", "head.bias"]


def test_sizes_do_not_change_what_dinov3_holds(tmp_path):
    state = _dinov3_state()
    save_file(state, tmp_path / "w.safetensors")
    config = npz_loader.config_from_npz(tmp_path / "w.safetensors")
    for side in (32, 48):
        report = npz_loader.load_npz(make_vit(**config, img_size=side), tmp_path / "w.safetensors")
        assert report["resized"] == [] and len(report["loaded"]) == len(state)


def test_heads_are_those_of_the_architecture_in_timms_config(tmp_path):
    """A ViT of timm that is 256 wide has 4 heads, ours has 8: without the config nothing is guessed."""
    timm = pytest.importorskip("timm")
    name = "vit_wee_patch16_reg1_gap_256"
    if not timm.is_model(name):
        pytest.skip("this timm does not know it")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0, depth=2).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match="width of 256 does not tell: give --heads"):
        npz_loader.config_from_npz(tmp_path / "w.pth")
    beside(tmp_path, config=dict(architecture=name, num_features=256))
    assert model.blocks[0].attn.num_heads == 4
    assert npz_loader.read(tmp_path / "w.pth").config["num_heads"] == 4


def test_weights_of_a_run_are_read_as_the_run_reads_them(tmp_path):
    """Its readout, which no shape shows, decides what the head stands for; last.pth is no file of weights."""
    small = dict(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=2)
    model = randomise(make_vit(**small, readout="mean"))
    torch.save(model.state_dict(), tmp_path / "checkpoint.pth")
    about = {"kind": "vit", "num_heads": 3, "readout": "mean"}
    (tmp_path / "results.json").write_text(
        json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3, "model_config": about})
    )
    chosen = npz_loader.Chosen()
    args = argparse.Namespace(weights=tmp_path / "checkpoint.pth", heads=None, timm_name=None)
    assert chosen.readout(args) == "mean"
    other = make_vit(**small, readout="mean")
    assert chosen.load(other, args)["reset"] == [] and same_tensors(other.state_dict(), model.state_dict())
    report = npz_loader.load_npz(make_vit(**small), args.weights)
    assert report["reset"] == ["head.weight", "head.bias"]
    last = {"model": model.state_dict(), "optimizer": {}, "state": {}, "rng": []}
    torch.save(last, tmp_path / "last.pth")
    with pytest.raises(InputError, match="take checkpoint.pth"):
        npz_loader.config_from_npz(tmp_path / "last.pth")
