"""Names of other libraries' convolutional networks -> timm's: torchvision's ResNets, DenseNets and
EfficientNets, CheXNet, torchxrayvision."""

import re

from common.console import InputError
from common.safe_files import listed
from loading.families import IMAGENET
from loading.files import renamed
from loading.settings import Settings

# Names of the outermost layers: where one of them is, no prefix is left to take off.
ROOTS = ("conv1.weight", "conv_stem.weight", "features.conv0.weight", "features.0.0.weight")

# Inputs in [-1024, 1024]: (2 grey - 1) 1024 = (grey - 0.5) / (1 / 2048).
XRV = Settings((0.5,) * 3, (1 / 2048,) * 3, "torchxrayvision's, to [-1024, 1024]")

_DOTS = re.compile(r"(denselayer[0-9]+\.(?:norm|relu|conv))\.([12])\.")  # CheXNet and others of 2017

# Of these torchvision's BatchNorm has this eps, timm's another one: 1e-5.
_COARSE, EPS = re.compile(r"efficientnet(_b[567]|v2_)"), 1e-3


def timm_names(state, wanted, name, path):
    """A state dict of a CNN -> (state with timm's names, Settings, notes), for timm's model `name`, whose
    arrays are `wanted` {timm's name: tensor}. What needs no change is passed on. One grey channel is spread
    over three. Settings.norm_eps: of BatchNorm, where it is not timm's."""
    settings, notes = Settings(), []
    if dotted := [key for key in state if _DOTS.search(key)]:
        before, state = state, {_DOTS.sub(r"\1\2.", key): value for key, value in state.items()}
        if len(state) < len(before):
            raise InputError(f"{path} has [{listed(dotted)}] twice, with and without the second dot")
        notes.append(f"{len(dotted)} names with dots, as of 2017")
    if "features.0.0.weight" in state and "conv_stem.weight" in wanted:
        if name.startswith("tf_"):
            raise InputError(
                f"{path} is torchvision's EfficientNet, which pads images otherwise than {name}: take "
                f"--model {name.removeprefix('tf_')}"
            )
        state = _efficientnet(state, wanted, path)
        settings = Settings(*IMAGENET, "torchvision's")
        if _COARSE.match(name):
            settings = settings._replace(norm_eps=EPS)
        notes.append("torchvision's EfficientNet")
    if not state.keys() & wanted.keys():
        return state, settings, notes
    first = next(key for key in wanted if wanted[key].ndim == 4)
    kernel = state.get(first)
    if kernel is not None and kernel.ndim == 4 and kernel.shape[1] == 1 and wanted[first].shape[1] == 3:
        # All three channels of our inputs are the same grey image, so a third of the kernel on each is exact.
        state = {**state, first: kernel.float().expand(-1, 3, -1, -1) / 3}
        notes.append("the first layer's one channel is spread over three")
        settings = XRV._replace(scaling=f"guessed by the one channel: {XRV.scaling}")
    if "op_threshs" in state:
        state = {key: value for key, value in state.items() if key != "op_threshs"}
        settings = XRV
        notes.append("torchxrayvision's op_threshs are not used")
    return state, settings, notes


def _efficientnet(state, wanted, path):
    """torchvision's EfficientNet (V1, V2) -> timm's names.

    torchvision numbers stages from 1 and the layers of a block as block.0, block.1, ...; timm names them by
    what they do. Which layers a block has is read from `wanted`, timm's names."""
    stages = [re.match(r"features\.([0-9]{1,2})\.", name) for name in state]
    last = max((int(found[1]) for found in stages if found), default=0)

    def ours_of(name):
        ours = _outer(name, last)
        inner = re.fullmatch(r"features\.([0-9]{1,2})\.([0-9]{1,2})\.block\.([0-9])\.(.+)", name)
        if inner and ours is None:
            stage, block, layer, rest = inner.groups()
            prefix = f"blocks.{int(stage) - 1}.{int(block)}."
            ours = _inner(prefix, int(layer), rest, wanted)
        return ours

    return renamed(state, ours_of, f"{path}: not torchvision's EfficientNet of this size")


def _outer(name, last):
    """timm's name of what stands before or after the blocks, None for what does not. `last`: the number of
    torchvision's last stage."""
    patterns = {
        r"features\.0\.0\.": "conv_stem.",
        r"features\.0\.1\.": "bn1.",
        rf"features\.{last}\.0\.": "conv_head.",
        rf"features\.{last}\.1\.": "bn2.",
        r"classifier\.1\.": "classifier.",
    }
    for pattern, ours in patterns.items():
        if re.match(pattern, name):
            return re.sub(pattern, ours, name)
    return None


def _inner(prefix, layer, rest, wanted):
    """timm's name of `rest` in the numbered layer of a block, None for none."""
    has = {
        part: f"{prefix}{part}" in wanted for part in ("conv_exp.weight", "conv.weight", "conv_pwl.weight")
    }
    squeeze = f"{prefix}se.conv_reduce.weight" in wanted
    if has["conv.weight"]:  # V2's ConvBnAct
        order = [("conv", "bn1")]
    elif has["conv_exp.weight"]:  # V2's fused block
        order = [("conv_exp", "bn1"), ("conv_pwl", "bn2")]
    elif has["conv_pwl.weight"]:  # the inverted residual
        order = [("conv_pw", "bn1"), ("conv_dw", "bn2"), "se", ("conv_pwl", "bn3")]
    else:  # depthwise separable, without expansion
        order = [("conv_dw", "bn1"), "se", ("conv_pw", "bn2")]
    order = [step for step in order if step != "se" or squeeze]
    if layer >= len(order):
        return None
    if order[layer] == "se":
        rest = re.sub(r"^fc([12])\.", lambda m: {"1": "conv_reduce.", "2": "conv_expand."}[m[1]], rest)
        return f"{prefix}se.{rest}"
    part, _, leaf = rest.partition(".")
    return f"{prefix}{order[layer][int(part)]}.{leaf}" if part in ("0", "1") else None
