"""Compare what is read from a file in each library's layout with that library's own forward pass.

    python studies/weights.py                  # the table of docs/WEIGHTS.md: real widths, two blocks
    python studies/weights.py --only DINOv3    # the families whose name has this in it
    python studies/weights.py --load           # ViT-B/16: seconds and memory to load

Weights are random, biases too. Needs requirements-test.txt; prints one row a family: the largest absolute
difference, and the spread of the values it is to be held against.
"""

import argparse
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import npz_loader
from common.cli import Parser
from common.console import InputError, start, tell
from models.cnn import Cnn, load_weights
from models.dinov3 import make_vit

WIDTH, HEADS, DEPTH, CLASSES, SIDE = 192, 3, 2, 5, 64
SMALL = dict(depth=DEPTH, img_size=SIDE, num_classes=CLASSES)


class Case(NamedTuple):
    """`saved`: what its library would write; `forward`: the library's function of images [B, 3, S, S];
    `output`: what that gives, "tokens", "logits" or "features"; `network`: timm's name of a CNN, None of a
    ViT; `readout`: of the head; `suffix`: of the file; `side`: of the images."""

    saved: dict
    forward: Callable
    output: str = "tokens"
    network: str | None = None
    readout: str = "cls"
    suffix: str = ".pth"
    side: int = SIDE


class Undrawn(TorchFunctionMode):
    """Within it, models are built without drawing their weights, which takes longer than all that follows."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_):
            return args[0].zero_()  # what draws until a value fits must find one that does
        return func(*args, **(kwargs or {}))


def randomise(model, seed=0):
    """Give every parameter and statistic a value that matters; returns the model, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            drawn = torch.randn(value.shape, generator=generator)
            if "running_var" in name:
                drawn = 0.5 + drawn.abs()
            elif value.ndim > 1:
                drawn *= (2 / value[0].numel()) ** 0.5
            elif name.endswith("bias"):
                drawn *= 0.3
            else:
                drawn = 0.75 + 0.1 * drawn
            value.copy_(drawn)
    return model.eval()


# ---------------------------------------------------------------- ViTs


def google():
    """Google's .npz, which timm reads with code of its own."""
    import timm

    donor = randomise(make_vit(patch_size=16, embed_dim=WIDTH, num_heads=HEADS, **SMALL))
    arrays = npz_loader._to_google(donor.state_dict(), HEADS)
    peer = timm.create_model("vit_tiny_patch16_224", weight_init="skip", **SMALL).eval()
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/w.npz", **{name: value.numpy() for name, value in arrays.items()})
        peer.load_pretrained(f"{folder}/w.npz")
    return Case(arrays, peer, "logits", suffix=".npz")


def timm_vit(name="vit_tiny_patch16_224", output="logits", readout="cls", wrapper=None, **options):
    """A ViT of timm; `wrapper`: the key its trainer puts it under."""
    import timm

    peer = randomise(timm.create_model(name, **{**SMALL, **options}))
    forward = peer if output == "logits" else peer.forward_features
    saved = peer.state_dict()
    return Case({wrapper: saved, "epoch": 3} if wrapper else saved, forward, output, readout=readout)


def dino():
    """DINO's checkpoint: student and teacher, in DataParallel, with the projection that training used."""
    import timm

    peer = randomise(timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 0}))
    teacher = {f"module.backbone.{name}": value for name, value in peer.state_dict().items()}
    teacher["module.head.mlp.0.weight"] = torch.ones(8, WIDTH)
    student = {name: value + 1 for name, value in teacher.items()}
    return Case({"student": student, "teacher": teacher, "epoch": 3}, peer.forward_features)


def vit_huge():
    """ViT-H/14: its width has 16 heads."""
    return timm_vit("vit_huge_patch14_224", output="tokens", depth=1, img_size=28)._replace(side=28)


def torchvision_vit():
    from torchvision.models.vision_transformer import VisionTransformer

    sizes = dict(image_size=SIDE, patch_size=16, num_layers=DEPTH, num_heads=HEADS, hidden_dim=WIDTH)
    peer = randomise(VisionTransformer(**sizes, mlp_dim=4 * WIDTH, num_classes=CLASSES))
    return Case(peer.state_dict(), peer, "logits")


def hugging_face(kind, body, **options):
    """A model of transformers, `kind`Config and `kind``body`."""
    import transformers

    sizes = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, image_size=SIDE)
    sizes |= dict(intermediate_size=4 * WIDTH, layer_norm_eps=1e-6, num_labels=CLASSES)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **options})
    return randomise(getattr(transformers, kind + body)(config))


def hugging_face_vit():
    peer = hugging_face("ViT", "ForImageClassification")
    return Case(peer.state_dict(), lambda x: peer(x).logits, "logits")


def hugging_face_deit():
    peer = hugging_face("DeiT", "ForImageClassificationWithTeacher")
    return Case(peer.state_dict(), lambda x: peer.deit(x).last_hidden_state)


def hugging_face_mae():
    """The whole masked autoencoder; nothing is masked, and the patches keep their order."""
    sizes = dict(decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    peer = hugging_face("ViTMAE", "ForPreTraining", mask_ratio=0.0, **sizes)
    order = torch.arange((SIDE // 16) ** 2).float()
    return Case(peer.state_dict(), lambda x: peer.vit(x, noise=order.repeat(len(x), 1)).last_hidden_state)


def hugging_face_dinov2(registers):
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    options = dict(patch_size=14, image_size=56, mlp_ratio=4)
    peer = hugging_face(kind, "Model", **options)
    return Case(peer.state_dict(), lambda x: peer(x).last_hidden_state, side=56)


def hugging_face_dinov3(gated=False, side=SIDE):
    act = "silu" if gated else "gelu"
    options = dict(num_register_tokens=4, use_gated_mlp=gated, hidden_act=act, layer_norm_eps=1e-5)
    peer = hugging_face("DINOv3ViT", "Model", **options)
    # As save_pretrained writes it, without the "model." of transformers 5.
    saved = {re.sub(r"^model\.layer", "layer", name): value for name, value in peer.state_dict().items()}
    return Case(saved, lambda x: peer(x).last_hidden_state, side=side)


def timm_dinov3(name, side=SIDE, **options):
    case = timm_vit(name, "tokens", num_classes=0, img_size=side, **options)
    return case._replace(side=side)


def authors_dinov3(gated=False):
    """The authors' file: a key bias that their mask takes away, and the periods of the rotations."""
    case = timm_dinov3(f"vit_small_{'plus_' * gated}patch16_dinov3_qkvb")
    names = {"reg_token": "storage_tokens", ".gamma_1": ".ls1.gamma", ".gamma_2": ".ls2.gamma"}
    names |= {".mlp.fc1_g.": ".mlp.w1.", ".mlp.fc1_x.": ".mlp.w2."}
    names |= {".mlp.fc2.": ".mlp.w3."} if gated else {}
    saved = {"mask_token": torch.zeros(1, 384), "rope_embed.periods": 100 ** (torch.arange(16) / 16)}
    for name, value in case.saved.items():
        if name.endswith("q_bias"):
            keys, values = torch.ones(len(value)), case.saved[name.replace("q_bias", "v_bias")]
            attention = name.removesuffix("q_bias")
            saved[f"{attention}qkv.bias"] = torch.cat([value, keys, values])
            saved[f"{attention}qkv.bias_mask"] = torch.cat([keys, 0 * keys, keys])
        elif not name.endswith("v_bias"):
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            saved[name] = value
    return case._replace(saved=saved)


# ---------------------------------------------------------------- CNNs


def resnet(name="resnet18"):
    from torchvision import models

    peer = randomise(getattr(models, name)(weights=None))
    saved = {n: v.clone() for n, v in peer.state_dict().items()}
    peer.fc = torch.nn.Identity()
    return Case(saved, peer, "features", name)


def densenet_features(peer):
    """What the classifier of a DenseNet reads, of images [B, C, S, S]."""
    return lambda x: F.relu(peer.features(x)).mean((2, 3))


def densenet():
    from torchvision.models import densenet121

    peer = randomise(densenet121(weights=None))
    return Case(peer.state_dict(), densenet_features(peer), "features", "densenet121")


def chexnet():
    """CheXNet's file of 2017: wrapped, in DataParallel, names with dots, a classifier with a sigmoid, and
    before torch 0.4.1, which began to count BatchNorm's batches."""
    case, saved = densenet(), {}
    for name, value in case.saved.items():
        name = re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name)
        if name.endswith("num_batches_tracked"):
            continue
        saved["module.densenet121." + name.replace("classifier.", "classifier.0.")] = value
    return case._replace(saved={"epoch": 3, "state_dict": saved, "best_loss": 0.1})


def one_channel_densenet():
    """torchxrayvision's layout from torchvision's network with one channel: it needs no torchxrayvision."""
    from torchvision.models import densenet121

    peer = densenet121(weights=None, num_classes=18)
    peer.features.conv0 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    randomise(peer)
    saved, forward = {**peer.state_dict(), "op_threshs": torch.ones(18)}, densenet_features(peer)
    return Case(saved, lambda x: forward(x[:, :1]), "features", "densenet121")


def torchxrayvision():
    """torchxrayvision's own network; its inputs in [-1024, 1024]."""
    from torchxrayvision.models import DenseNet

    peer = randomise(DenseNet(weights=None))
    saved = {name: value.clone() for name, value in peer.state_dict().items()}
    return Case(saved, lambda x: peer.features2(x[:, :1]), "features", "densenet121")


def efficientnet(theirs="efficientnet_b0", ours="efficientnet_b0"):
    from torchvision import models

    peer = randomise(getattr(models, theirs)(weights=None))
    return Case(peer.state_dict(), lambda x: peer.avgpool(peer.features(x)).flatten(1), "features", ours)


FAMILIES = {
    "Google .npz": google,
    "timm ViT": timm_vit,
    "timm ViT, average pooling": lambda: timm_vit(
        class_token=False, global_pool="avg", fc_norm=True, readout="mean"
    ),
    "timm ViT-H/14": vit_huge,
    "DeiT, distilled": lambda: timm_vit("deit_tiny_distilled_patch16_224", "tokens", wrapper="model"),
    "DINO": dino,
    "MAE, fine-tuned": lambda: timm_vit(global_pool="avg", readout="mean", wrapper="model"),
    "torchvision ViT": torchvision_vit,
    "Hugging Face ViT": hugging_face_vit,
    "Hugging Face DeiT": hugging_face_deit,
    "Hugging Face MAE": hugging_face_mae,
    "Hugging Face DINOv2": lambda: hugging_face_dinov2(False),
    "Hugging Face DINOv2 with registers": lambda: hugging_face_dinov2(True),
    "timm DINOv2": lambda: timm_vit("vit_small_patch14_dinov2", "tokens", img_size=56)._replace(side=56),
    "DINOv3 S, timm, 224 px": lambda: timm_dinov3("vit_small_patch16_dinov3", 224),
    "DINOv3 S, timm qkvb, 256 px": lambda: timm_dinov3("vit_small_patch16_dinov3_qkvb", 256),
    "DINOv3 S+, timm qkvb, 224 px": lambda: timm_dinov3("vit_small_plus_patch16_dinov3_qkvb", 224),
    "DINOv3 S+, timm, 256 px": lambda: timm_dinov3("vit_small_plus_patch16_dinov3", 256),
    "DINOv3 B, timm qkvb, 256 px": lambda: timm_dinov3("vit_base_patch16_dinov3_qkvb", 256, depth=1),
    "DINOv3 L, timm qkvb, 224 px": lambda: timm_dinov3("vit_large_patch16_dinov3_qkvb", 224, depth=1),
    "DINOv3, Hugging Face, 224 px": lambda: hugging_face_dinov3(side=224),
    "DINOv3, Hugging Face, gated, 256 px": lambda: hugging_face_dinov3(True, 256),
    "DINOv3 S, its authors": authors_dinov3,
    "DINOv3 S+, its authors": lambda: authors_dinov3(True),
    "torchvision ResNet-18": resnet,
    "torchvision ResNet-50": lambda: resnet("resnet50"),
    "torchvision DenseNet-121": densenet,
    "CheXNet": chexnet,
    "DenseNet-121 of one channel": one_channel_densenet,
    "torchxrayvision DenseNet": torchxrayvision,
    "torchvision EfficientNet-B0": efficientnet,
    "torchvision EfficientNetV2-S": lambda: efficientnet("efficientnet_v2_s", "efficientnetv2_s"),
}


# ---------------------------------------------------------------- comparing


def case_of(family):
    """The Case of one of FAMILIES. ImportError where its library is missing."""
    with Undrawn():
        return FAMILIES[family]()


def compared(case, folder):
    """(the library's output, ours, the report of loading) of a Case; its file is written to `folder`."""
    path = Path(folder) / f"w{case.suffix}"
    if case.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in case.saved.items()})
    else:
        torch.save(case.saved, path)
    grey = torch.rand(2, 1, case.side, case.side, generator=torch.Generator().manual_seed(0))
    x = grey.expand(-1, 3, -1, -1).contiguous()
    if case.network:
        with Undrawn():  # the head is not compared
            model = Cnn(case.network).eval()
        report, ours = load_weights(model, path), model.features
    else:
        weights = npz_loader.known_heads(npz_loader.read(path), path)
        with torch.device("meta"):  # what loading does not fill is drawn by it
            settings = dict(img_size=case.side, num_classes=CLASSES, readout=case.readout)
            model = make_vit(**weights.config, **settings)
        model = model.to_empty(device="cpu").eval()
        report = npz_loader.load(model, weights, path)
        ours = model if case.output == "logits" else model.forward_features
    with torch.no_grad():
        return case.forward(x), ours(x), report


def table(only):
    """Print the rows of the families whose name has `only` in it."""
    chosen = [name for name in FAMILIES if only.lower() in name.lower()]
    if not chosen:
        raise InputError(f"--only {only}: no family has this in its name; there are {', '.join(FAMILIES)}")
    tell("| family | compared | largest difference | standard deviation |\n| --- | --- | --- | --- |")
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            try:
                case = case_of(name)
            except ImportError as error:
                tell(f"| {name} | not compared: {error} | | |")
                continue
            theirs, ours, _ = compared(case, folder)
        tell(f"| {name} | {case.output} | {(theirs - ours).abs().max():.1e} | {theirs.std():.2f} |")


def load():
    """Print how long ViT-B/16 takes to load, and what the process grows by."""
    import gc

    model = make_vit(num_classes=1000)
    megabytes = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "b16.pth"
        torch.save(model.state_dict(), path)
        gc.collect()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.perf_counter(), time.process_time()
        npz_loader.load_npz(model, path)
        seconds, busy = time.perf_counter() - begin[0], time.process_time() - begin[1]
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    tell(f"ViT-B/16, {megabytes:.0f} MiB: {seconds:.1f} s, of the processor {busy:.1f} s")
    tell(f"peak memory grows by {grown:.0f} MiB")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="families with this in their name")
    text = "time and memory to load ViT-B/16 instead"
    parser.add_argument("--load", action=argparse.BooleanOptionalAction, default=False, help=text)
    args = parser.parse_args()
    if args.load:
        load()
    else:
        table(args.only)


if __name__ == "__main__":
    start(main)
