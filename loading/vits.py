"""A complete ViT from a torch state dict: its arrays under our names, its architecture and its settings."""

import math
from typing import NamedTuple

import torch

from common.console import InputError
from common.safe_files import check_state_dict, listed
from loading import cnns, dinov3
from loading.families import ROOTS, Family, our_names, refuse_others
from loading.files import read_state_dict
from loading.settings import HEADS, OURS, Settings, settings_of
from models.dinov3 import make_vit


class Weights(NamedTuple):
    """`arrays`: {our name: tensor}; `dropped`: names in the file; `family`; `config`: keywords of the ViT
    that needs exactly these arrays (and perhaps a head), num_heads None where that is not known; `settings`;
    `notes`: a line on each thing that was changed; `readout`: what the file's head reads."""

    arrays: dict
    dropped: list
    family: Family
    config: dict
    settings: Settings = Settings()
    notes: tuple = ()
    readout: str = "cls"


def read_torch(path, heads=None, timm_name=None):
    """A state dict (.pth, .pt, .bin, .safetensors) under any names that families.py knows -> Weights,
    complete and free of contradictions. `heads`, `timm_name`: see settings_of."""
    held = read_state_dict(path, (*ROOTS, *cnns.ROOTS))
    refuse_others(held.state, path)
    if found := [name for name in cnns.ROOTS if name in held.state]:
        raise InputError(f"{path} holds a CNN (it has {found[0]}): train_cnn.py --model NAME reads it")
    check_state_dict(held.state, path)
    wrapped = bool({"model", "teacher", "student"} & set(held.wrappers))
    named = our_names(held.state, wrapped, path)
    state = {name: value.float() for name, value in named.state.items()}
    config, classes, readout = _config_of(state, named.family, path)
    settings = settings_of(
        path,
        config["embed_dim"],
        config["depth"],
        heads=heads,
        timm_name=timm_name,
        around=held.around,
    )
    if settings.readout in ("cls", "mean") and readout != "cls+mean":  # the width does not tell these apart
        readout = settings.readout
    config |= _numbers(settings, named.family, config)
    if config["class_token"] and not named.family.rotary:
        _give_class_token_a_position(state, path)
    config = {k: v for k, v in config.items() if v is not None or k == "num_heads"}
    expected = expected_arrays(config, state.get("pos_embed"), classes, path, readout)
    if different := differences(state, expected, held.state):
        raise InputError(f"{path} is not a complete plain ViT: {different}")
    notes = (*held.notes, *named.notes, *settings.notes)
    return Weights(state, named.dropped, named.family, plain(config), settings, notes, readout)


def plain(config):
    """A config without what every ViT has."""
    usual = dict(class_token=True, fc_norm=False, norm_eps=1e-6, layer_scale=False, reg_tokens=0, gated=False)
    if config.get("rotary"):
        del usual["reg_tokens"], usual["norm_eps"]
    return {k: v for k, v in config.items() if k not in usual or v != usual[k]}


def _config_of(state, family, path):
    """(configuration, classes or None, what the head reads), read from a few shapes."""
    dim, chans, *patch = shape_of(state, "patch_embed.proj.weight", 4, path)
    gated = "blocks.0.mlp.fc1_g.weight" in state
    first = "fc1_g" if gated else "fc1"
    hidden = shape_of(state, f"blocks.0.mlp.{first}.weight", 2, path)[0]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    registers = shape_of(state, "reg_token", 3, path)[1] if "reg_token" in state else 0
    headless = not state.keys() & {"head.weight", "head.bias"}
    classes, read = (None, dim) if headless else shape_of(state, "head.weight", 2, path)
    config = architecture(patch, chans, dim, depth, None, hidden, path)
    config["class_token"], config["fc_norm"] = "cls_token" in state, "fc_norm.weight" in state
    readout = "mean" if config["fc_norm"] or not config["class_token"] else "cls"
    if read == 2 * dim:
        readout = "cls+mean"
    config |= {"layer_scale": "blocks.0.ls1.gamma" in state, "reg_tokens": registers}
    if family.rotary:
        if not config["class_token"] or config["fc_norm"] or registers != 4:
            raise InputError(
                f"{path} has rotary positions, but is no DINOv3, which has [CLS] and four registers and no "
                "fc_norm: its positions are written otherwise, see docs/WEIGHTS.md"
            )
        config |= {"rotary": True, "gated": gated}
        del config["layer_scale"]
    return config, classes, readout


def _numbers(settings, family, config):
    """{num_heads, norm_eps} of a configuration: the settings', else the family's or those of the width.
    InputError for heads that do not divide it."""
    usual = dinov3.HEADS if family.rotary else HEADS
    heads = settings.heads or usual.get(config["embed_dim"])
    if heads is None and OURS[0].items() <= config.items():
        heads = OURS[1]
    if heads and config["embed_dim"] % heads:
        raise InputError(
            f"{heads} heads do not divide the width of the weights, {config['embed_dim']}: see --heads"
        )
    return {"num_heads": heads, "norm_eps": None if family.rotary else settings.norm_eps}


def _give_class_token_a_position(state, path):
    """timm's ViTs with registers, and DeiT III, have no position for [CLS]: add one of zeros, in place."""
    rows, dim = shape_of(state, "pos_embed", 3, path)[1:]
    if rows > 1 and math.isqrt(rows) ** 2 == rows:
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, dim), state["pos_embed"]], dim=1)


# ---------------------------------------------------------------- checks, of Google's files too


def shape_of(arrays, name, axes, path):
    """The shape of an array that has `axes` axes, as a tuple; InputError if it is missing or has others."""
    if name not in arrays:
        raise InputError(
            f"{path} is not a complete plain ViT: {name} is missing; it has [{listed(sorted(arrays), 4)}]"
        )
    shape = tuple(arrays[name].shape)
    if len(shape) != axes or 0 in shape:
        raise InputError(
            f"{path} is not a plain ViT: {name} is {listed([shape])}, needs {axes} axes, none empty"
        )
    return shape


def architecture(patch, chans, dim, depth, heads, hidden, path):
    """The keywords of a plain ViT of these sizes. InputError for sizes that no ViT has."""
    if chans != 3:
        raise InputError(f"{path}: its patches have {chans} channels; a ViT of 3 is needed")
    if patch[0] != patch[1]:
        raise InputError(f"{path}: patches of {patch[0]}x{patch[1]} are not square")
    if depth > 1000:  # the largest published ViT has 48; building many empty blocks would take minutes
        raise InputError(f"{path} is not a plain ViT: it has {depth} blocks, the limit is 1000")
    return dict(
        patch_size=patch[0],
        in_chans=chans,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=hidden / dim,
    )


def expected_arrays(config, positions, classes, path, readout="cls"):
    """Our names -> tensors without data ("meta"), in the shapes of a ViT with this configuration.

    `positions`: the file's position embedding, None of a DINOv3; `classes`: the size of its head, None
    without one. Heads do not change a shape, so one stands for an unknown number."""
    side, heads = 1, config["num_heads"] or 1
    if not config.get("rotary"):
        shape = shape_of({"pos_embed": positions} if positions is not None else {}, "pos_embed", 3, path)
        side = grid_side(shape, config.get("class_token", True), path)
    settings = {**config, "num_heads": heads, "img_size": config["patch_size"] * side}
    try:
        with torch.device("meta"):
            model = make_vit(**settings, num_classes=classes or 1, readout=readout)
    except (InputError, RuntimeError) as error:  # RuntimeError: more elements than 64 bits can count
        raise InputError(f"{path} is not a plain ViT: {listed([error])}") from None
    return {n: v for n, v in model.state_dict().items() if classes or not n.startswith("head.")}


def differences(found, expected, held=None):
    """How the names and shapes of two dicts of arrays differ, for a message; "" if they do not. `held`: the
    arrays under the names that the file has, some of which are shown where one is missing."""
    common = found.keys() & expected.keys()
    lists = {
        "unknown": found.keys() - expected.keys(),
        "missing": expected.keys() - found.keys(),
        "wrong shape": {
            f"{n} is {tuple(found[n].shape)}, needs {tuple(expected[n].shape)}"
            for n in common
            if found[n].shape != expected[n].shape
        },
    }
    parts = [f"{what} [{listed(sorted(names))}]" for what, names in lists.items() if names]
    if lists["missing"]:
        parts.append(f"the file has [{listed(sorted(held or found), 4)}]")
    return "; ".join(parts)


def grid_side(shape, class_token, path):
    """Side of the square grid of patches that a position embedding of this shape, (1, 1 + n*n, D), is for;
    (1, n*n, D) without a class token."""
    cells = shape[1] - class_token
    side = math.isqrt(max(0, cells))
    if side < 1 or shape[0] != 1 or side * side != cells:
        first = "[CLS] plus " if class_token else ""
        raise InputError(
            f"{path}: a position embedding of {shape[1]} tokens, shape {shape}, is not {first}a square grid"
        )
    return side
