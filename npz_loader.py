"""Pretrained Vision Transformers from disk, offline: Google's JAX `.npz` <-> our state dict.

Also state dicts (.pth, .safetensors) of timm, DeiT and DINOv2, and Hugging Face's `ViTForImageClassification`
and `Dinov2Model`, recognised by their keys (state_names.py). Every array is loaded, resized, reset or dropped
*by name*; whatever is missing, left over or misshapen is an InputError (a ValueError) that lists the names.
Layout of the `.npz`: https://github.com/google-research/vision_transformer (`vit_jax/checkpoint.py`).
Nothing is downloaded.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common.console import InputError
from common.files import sha256
from common.safe_files import check_state_dict, listed, load_arrays, load_safetensors, load_tensors
from models.state_names import GOOGLE, Family, our_names
from vit import CONFIGS, VisionTransformer

DEFAULT_PATH = "weights/ViT-B_16.npz"
KEPT = ("path", "sha256", "source", "resized", "reset", "dropped")  # of the report, in results.json
DOWNLOAD = "https://storage.googleapis.com/vit_models/imagenet21k+imagenet2012/ViT-B_16-224.npz"

_MHA = "MultiHeadDotProductAttention_1"
_TOP = {  # ours -> Google's
    "cls_token": "cls",
    "pos_embed": "Transformer/posembed_input/pos_embedding",
    "patch_embed.proj.weight": "embedding/kernel",
    "patch_embed.proj.bias": "embedding/bias",
    "norm.weight": "Transformer/encoder_norm/scale",
    "norm.bias": "Transformer/encoder_norm/bias",
    "head.weight": "head/kernel",
    "head.bias": "head/bias",
}
_BLOCK = {
    "norm1.weight": "LayerNorm_0/scale",
    "norm1.bias": "LayerNorm_0/bias",
    "norm2.weight": "LayerNorm_2/scale",
    "norm2.bias": "LayerNorm_2/bias",
    "attn.proj.weight": f"{_MHA}/out/kernel",
    "attn.proj.bias": f"{_MHA}/out/bias",
    "mlp.fc1.weight": "MlpBlock_3/Dense_0/kernel",
    "mlp.fc1.bias": "MlpBlock_3/Dense_0/bias",
    "mlp.fc2.weight": "MlpBlock_3/Dense_1/kernel",
    "mlp.fc2.bias": "MlpBlock_3/Dense_1/bias",
}


def usual_size(args, usual):
    """The default of --img-size for --weights: the multiple of the patch that is nearest to `usual`, px."""
    patch = config_from_npz(args.weights)["patch_size"]
    return max(1, round(usual / patch)) * patch


def load_npz(model, path):
    """Copy the weights in `path` into a VisionTransformer; returns the report.

    Loaded: arrays of equal shape. Resized: `pos_embed`, when the model's patch grid differs: bilinear with
    aligned corners, as Google's `scipy.ndimage.zoom(order=1)`; of DINOv2 bicubic with antialiasing, as timm
    does (its authors' code resizes without antialiasing). The [CLS] position is kept. Reset: the
    head, freshly initialised, when its shape differs from the file's. Dropped: the file's head in that
    case, `pre_logits`, `mask_token`, and optimiser state. A matching head is loaded.

    The report is a dict of name lists `loaded, resized, reset, dropped` (our names where there is one), with
    `source`, `path`, `sha256`, `mean` and `std` (3 floats each: the input scaling the weights were trained
    with). InputError (a ValueError) if the file is absent, damaged, pickled, not a plain ViT, or does not
    fit. The model is untouched unless everything fits.
    """
    arrays, dropped, family, heads, _ = _read(path)
    target = {name: p.detach() for name, p in model.named_parameters()}
    resized, reset = [], []
    if "head.weight" not in arrays or arrays["head.weight"].shape != target["head.weight"].shape:
        reset = ["head.weight", "head.bias"]
        dropped += [name for name in reset if arrays.pop(name, None) is not None]
    if arrays["pos_embed"].shape[-1] == model.embed_dim:
        arrays["pos_embed"], changed = _resize_pos_embed(arrays["pos_embed"], model.grid_size, family)
        resized = ["pos_embed"] if changed else []
    misfit = _differences(arrays, {n: p for n, p in target.items() if n not in reset})
    if heads not in (None, model.config["num_heads"]):  # the fused shapes would not show it
        misfit += f"; {heads} heads, the model has {model.config['num_heads']}"
    if misfit:
        raise InputError(f"{path} does not fit the model: {misfit.removeprefix('; ')}")
    with torch.no_grad():
        for name, value in arrays.items():
            target[name].copy_(value)
        if reset:
            torch.nn.init.trunc_normal_(model.head.weight, std=0.02)
            torch.nn.init.zeros_(model.head.bias)
    return dict(
        source=family.source,
        path=str(path),
        sha256=sha256(Path(path)),
        mean=list(family.scaling[0]),
        std=list(family.scaling[1]),
        resized=resized,
        reset=reset,
        loaded=sorted(arrays.keys() - set(resized)),
        dropped=sorted(dropped),
    )


def describe(report):
    """The report of `load_npz` as one line."""
    parts = [f"{len(report['loaded'])} arrays loaded"]
    words = {"resized": "resized", "reset": "drawn anew", "dropped": "not used"}
    parts += [f"{word} [{', '.join(report[key])}]" for key, word in words.items() if report[key]]
    return f"weights: {report['path']} ({report['source']}): " + ", ".join(parts)


def config_from_npz(path):
    """The architecture in a weights file -> keywords of VisionTransformer.

    {patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio}, and layer_scale and reg_tokens where the
    file has them. Heads are read from the shape of the query kernel; a torch state dict does not hold them,
    so there the width decides: as in CONFIGS, else one head for every 64 channels, or a few more channels a
    head where that does not divide the width.
    Every array that such a model needs is in the file, so a few bytes cannot ask for a large model.
    InputError (a ValueError) as in `load_npz`.
    """
    return _read(path).config


def architecture_name(config):
    """The name in vit.CONFIGS of an architecture (a dict as of `config_from_npz`), else vit-d384-l12-h6-p32.

    That is width, layers, heads and patch size, followed by -m3 for an MLP that is 3 and not 4 times as wide;
    either may be followed by -reg4, for as many register tokens.
    """
    keys = ("embed_dim", "depth", "num_heads", "patch_size")
    ratio, scaled = config.get("mlp_ratio", 4), config.get("layer_scale", False)
    registers = f"-reg{config['reg_tokens']}" if config.get("reg_tokens") else ""
    for name, known in CONFIGS.items():
        same = ratio == known.get("mlp_ratio", 4) and scaled == known.get("layer_scale", False)
        if same and all(config[k] == known[k] for k in keys):
            return name + registers
    dim, depth, heads, patch = (config[k] for k in keys)
    mlp = f"-m{ratio:g}" if ratio != 4 else ""
    return f"vit-d{dim}-l{depth}-h{heads}-p{patch}{mlp}{registers}"


# ---------------------------------------------------------------- what a file holds


class _Weights(NamedTuple):
    arrays: dict  # our name -> float32 tensor
    dropped: list  # names in the file
    family: Family
    heads: int | None  # None: the file does not tell
    config: dict  # keywords of VisionTransformer, which needs exactly these arrays (and perhaps a head)


def _read(path):
    """Any weights file -> _Weights, complete and free of contradictions."""
    path = Path(path)
    if not path.exists():
        if path != Path(DEFAULT_PATH):
            raise InputError(f"no weights at {path}: check the path (docs/RUNBOOK.md says where to get it)")
        raise InputError(
            f"no weights at {path}. Fetch them once with:\n"
            f"  mkdir -p weights && curl -L -o {DEFAULT_PATH} {DOWNLOAD}\n"
            "  or copy the file there by hand, or name another with --weights PATH"
        )
    weights = _read_google(path) if path.suffix == ".npz" else _read_state_dict(path)
    if bad := sorted(name for name, value in weights.arrays.items() if not torch.isfinite(value).all()):
        raise InputError(f"{path}: NaN or infinite values in [{listed(bad)}]")
    return weights


def _shape(arrays, name, axes, path):
    """The shape of an array that has `axes` axes, as a tuple; InputError if it is missing or has others."""
    if name not in arrays:
        raise InputError(f"{path} is not a complete plain ViT: {name} is missing")
    shape = tuple(arrays[name].shape)
    if len(shape) != axes or 0 in shape:
        raise InputError(
            f"{path} is not a plain ViT: {name} is {listed([shape])}, needs {axes} axes, none empty"
        )
    return shape


def _expected(config, pos, classes, path, readout="cls"):
    """Our names -> tensors without data ("meta"), in the shapes of a ViT with this configuration.

    `pos` is the shape of the file's position embedding, `classes` the size of its head, None without one.
    """
    side = config["patch_size"] * _grid_side(pos, path)
    try:
        with torch.device("meta"):
            model = VisionTransformer(img_size=side, num_classes=classes or 1, readout=readout, **config)
    except (InputError, RuntimeError) as error:  # RuntimeError: more elements than 64 bits can count
        raise InputError(f"{path} is not a plain ViT: {listed([error])}") from None
    return {n: v for n, v in model.state_dict().items() if classes or not n.startswith("head.")}


def _differences(found, expected):
    """How the names and shapes of two dicts of arrays differ, for a message; "" if they do not."""
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
    return "; ".join(f"{what} [{listed(sorted(names))}]" for what, names in lists.items() if names)


def _grid_side(pos, path):
    """Side of the square grid of patches that a position embedding of shape `pos` (1, 1 + n*n, D) is for."""
    side = math.isqrt(pos[1] - 1)
    if side < 1 or pos[0] != 1 or side * side != pos[1] - 1:
        raise InputError(
            f"{path}: a position embedding of {pos[1]} tokens, shape {pos}, is not [CLS] plus a square grid"
        )
    return side


def _resize_pos_embed(pos, grid, family):
    """(1, 1 + n*n, D) -> (1, 1 + h*w, D), and whether it changed."""
    side = math.isqrt(pos.shape[1] - 1)
    if (side, side) == tuple(grid):
        return pos, False
    cells = pos[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, n*n, D) -> (1, D, n, n)
    how = (
        dict(mode="bicubic", antialias=True) if family.bicubic else dict(mode="bilinear", align_corners=True)
    )
    cells = F.interpolate(cells, size=tuple(grid), **how)
    return torch.cat([pos[:, :1], cells.permute(0, 2, 3, 1).flatten(1, 2)], dim=1), True


# ---------------------------------------------------------------- Google's .npz


def _google_name(name):
    if name.startswith("blocks."):
        _, block, rest = name.split(".", 2)
        return f"Transformer/encoderblock_{block}/{_BLOCK[rest]}"
    return _TOP[name]


def _qkv_names(name, kind):
    """The three arrays of Google's that make up our blocks.N.attn.qkv; kind is "kernel" or "bias"."""
    block = name.split(".")[1]
    return [f"Transformer/encoderblock_{block}/{_MHA}/{part}/{kind}" for part in ("query", "key", "value")]


def _to_google(state, heads):
    """Our state dict -> Google's names and axes. For tensors without data ("meta") it gives the shapes."""
    out = {}
    for name, value in state.items():
        if name.endswith("attn.qkv.weight"):  # (3D, D) -> (D, heads, head_dim) x 3
            for key, piece in zip(_qkv_names(name, "kernel"), value.chunk(3)):
                out[key] = piece.T.reshape(len(piece), heads, -1).contiguous()
            continue
        if name.endswith("attn.qkv.bias"):  # (3D,) -> (heads, head_dim) x 3
            out |= {k: p.reshape(heads, -1) for k, p in zip(_qkv_names(name, "bias"), value.chunk(3))}
            continue
        if name == "patch_embed.proj.weight":
            value = value.permute(2, 3, 1, 0)  # OIHW -> HWIO
        elif name.endswith("attn.proj.weight"):  # (D, D) -> (heads, head_dim, D)
            value = value.T.reshape(heads, -1, len(value))
        elif value.ndim == 2:  # (out, in) -> (in, out)
            value = value.T
        out[_google_name(name)] = value.contiguous()
    return out


def _from_google(arrays, names):
    """Google's arrays (tensors of checked shapes) -> a state dict with our `names`."""
    out = {}
    for name in names:
        if name.endswith("attn.qkv.weight"):  # (D, heads, head_dim) x 3 -> (3D, D)
            out[name] = torch.cat([arrays[key].flatten(1).T for key in _qkv_names(name, "kernel")])
            continue
        if name.endswith("attn.qkv.bias"):  # (heads, head_dim) x 3 -> (3D,)
            out[name] = torch.cat([arrays[key].flatten() for key in _qkv_names(name, "bias")])
            continue
        value = arrays[_google_name(name)]
        if name == "patch_embed.proj.weight":
            value = value.permute(3, 2, 0, 1)  # HWIO -> OIHW
        elif name.endswith("attn.proj.weight"):  # (heads, head_dim, D) -> (D, D)
            value = value.flatten(0, 1).T
        elif value.ndim == 2:  # (in, out) -> (out, in)
            value = value.T
        out[name] = value.contiguous()
    return out


def _read_google(path):
    """Google's .npz -> _Weights."""
    arrays = load_arrays(path)
    if any("opt/target/" in name for name in arrays):  # a training checkpoint: weights and optimiser state
        arrays = {n.removeprefix("opt/target/"): a for n, a in arrays.items()}
    if hybrid := [n for n in arrays if n.startswith(("conv_root", "gn_root", "block1/"))]:
        raise InputError(
            f"{path} is a ResNet hybrid (it has {listed(hybrid, 1)}); only plain ViT files fit: "
            "take one without an R in its name, such as ViT-B_16.npz"
        )
    if "embedding/kernel" not in arrays or "cls" not in arrays:
        raise InputError(
            f"{path} is not a ViT in Google's layout: it lacks embedding/kernel or cls "
            f"(it has {listed(sorted(arrays), 4) or 'no arrays'})"
        )
    dropped = [n for n in arrays if n.startswith(("pre_logits/", "opt/", "state/"))]
    arrays = {n: a for n, a in arrays.items() if n not in dropped}
    if wrong := [n for n, a in arrays.items() if a.dtype.kind != "f"]:
        raise InputError(f"{path}: arrays that are not floating point: [{listed(wrong)}]")
    config, pos, classes = _google_config(arrays, path)
    expected = _expected(config, pos, classes, path)
    if different := _differences(arrays, _to_google(expected, config["num_heads"])):
        raise InputError(f"{path} is not a complete plain ViT: {different}")
    values = {n: torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32)) for n, a in arrays.items()}
    state = _from_google(values, expected)
    return _Weights(state, dropped, GOOGLE, config["num_heads"], config)


def _google_config(arrays, path):
    """(configuration, shape of the position embedding, classes or None), read from a few shapes."""
    first = "Transformer/encoderblock_0/"
    blocks = {n.split("/")[1] for n in arrays if n.startswith("Transformer/encoderblock_")}
    patch, patch_w, chans, dim = _shape(arrays, "embedding/kernel", 4, path)
    hidden = _shape(arrays, first + _BLOCK["mlp.fc1.weight"], 2, path)[1]
    heads = _shape(arrays, f"{first}{_MHA}/query/kernel", 3, path)[1]
    pos = _shape(arrays, _TOP["pos_embed"], 3, path)
    headless = not arrays.keys() & {"head/kernel", "head/bias"}
    classes = None if headless else _shape(arrays, "head/kernel", 2, path)[1]
    return _config((patch, patch_w), chans, dim, len(blocks), heads, hidden, path), pos, classes


def _config(patch, chans, dim, depth, heads, hidden, path):
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


# ---------------------------------------------------------------- state dicts


def _read_state_dict(path):
    """A state dict (.pth, .pt, .bin, .safetensors) under any names that state_names.py knows -> _Weights."""
    if path.suffix == ".safetensors":
        state = load_safetensors(path)
    else:
        state = load_tensors(path)
    inside = state.get("model")
    if not isinstance(inside, dict):
        inside = state
    check_state_dict(inside, path)
    state, family = our_names(state, path)
    dropped = [n for n in state if n.startswith("pre_logits.") or n == "mask_token"]
    state = {n: v.float() for n, v in state.items() if n not in dropped}
    config, classes, readout = _state_dict_config(state, path)
    rows, dim = _shape(state, "pos_embed", 3, path)[1:]
    if rows > 1 and math.isqrt(rows) ** 2 == rows:  # timm's with registers, DeiT III: [CLS] has no position
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, dim), state["pos_embed"]], dim=1)
    expected = _expected(config, tuple(state["pos_embed"].shape), classes, path, readout)
    if different := _differences(state, expected):
        raise InputError(f"{path} is not a complete plain ViT: {different}")
    return _Weights(state, dropped, family, None, config)


def _state_dict_config(state, path):
    """(configuration, classes or None, what the head reads), read from a few shapes."""
    dim, chans, *patch = _shape(state, "patch_embed.proj.weight", 4, path)
    hidden = _shape(state, "blocks.0.mlp.fc1.weight", 2, path)[0]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    registers = _shape(state, "reg_token", 3, path)[1] if "reg_token" in state else 0
    headless = not state.keys() & {"head.weight", "head.bias"}
    classes, read = (None, dim) if headless else _shape(state, "head.weight", 2, path)
    known = {c["embed_dim"]: c["num_heads"] for c in CONFIGS.values()}
    heads = known.get(dim) or next(n for n in range(max(1, dim // 64), 0, -1) if dim % n == 0)
    config = _config(patch, chans, dim, depth, heads, hidden, path)
    config |= {"layer_scale": True} if "blocks.0.ls1.gamma" in state else {}
    config |= {"reg_tokens": registers} if registers else {}
    return config, classes, "cls+mean" if read == 2 * dim else "cls"
