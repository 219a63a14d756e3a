"""Pretrained Vision Transformers from disk, offline: Google's JAX `.npz` <-> our state dict.

Also the state dicts (.pth, .safetensors) of other libraries, recognised by their names: see loading/ and
docs/WEIGHTS.md. Every array is loaded, resized, reset or dropped *by name*; whatever is missing, left over or
misshapen is an InputError (a ValueError) that lists the names.
Layout of the `.npz`: https://github.com/google-research/vision_transformer (`vit_jax/checkpoint.py`).
Nothing is downloaded.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.cli import Number
from common.console import InputError
from common.files import sha256
from common.safe_files import listed, load_arrays
from loading import vits
from loading.families import GOOGLE
from loading.settings import Settings, of_timm
from loading.vits import Weights, architecture, differences, shape_of
from vit import CONFIGS, READOUTS

DEFAULT_PATH = "weights/ViT-B_16.npz"
KEPT = ("path", "sha256", "source", "scaling", "resized", "reset", "dropped", "notes")  # in results.json
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


def add_arguments(group):
    """--weights, and what the file may not say: --heads and --timm-name."""
    text = "a ViT: Google .npz, or .pth/.safetensors of timm, torchvision, Hugging Face, DeiT, DINO, MAE ..."
    group.add_argument("--weights", default=DEFAULT_PATH, metavar="PATH", help=text)
    text = "timm's name of the weights: scaling and heads by its configuration (default: by the file)"
    group.add_argument("--timm-name", default=None, metavar="NAME", help=text)
    text = "attention heads, where neither the file nor its width tells (default: by the file)"
    group.add_argument("--heads", type=Number(int, 1, 256), default=None, metavar="N", help=text)


class Chosen:
    """The weights that a command line names, read once, when they are first asked for."""

    def __init__(self):
        self.weights = None

    def read(self, args):
        """Weights of --weights, as `read` gives them. InputError where nothing says how many heads there
        are."""
        if self.weights is None:
            self.weights = known_heads(read(args.weights, args.heads, args.timm_name), args.weights)
        return self.weights

    def readout(self, args):
        """What a head reads unless --readout says it: as in the run that the weights are of; else the mean
        patch where they were trained so."""
        weights = self.read(args)
        if weights.settings.readout in READOUTS:
            return weights.settings.readout
        config = weights.config
        averaged = config.get("fc_norm") or not config.get("class_token", True)
        return "mean" if averaged else "cls"

    def usual_size(self, args, usual):
        """The default of --img-size: the multiple of the patch that is nearest to `usual`, px."""
        patch = self.read(args).config["patch_size"]
        return max(1, round(usual / patch)) * patch

    def load(self, model, args):
        """Copy the weights into a VisionTransformer, and forget them; returns the report of `load_npz`."""
        weights, self.weights = self.read(args), None
        return load(model, weights, args.weights)


def load_npz(model, path, heads=None, timm_name=None):
    """Copy the weights in `path` into a VisionTransformer; returns the report.

    Loaded: arrays of equal shape. Resized: `pos_embed`, when the model's patch grid differs: bilinear with
    aligned corners, as Google's `scipy.ndimage.zoom(order=1)`; of DINOv2 bicubic with antialiasing, as timm
    does (its authors' code resizes without antialiasing). The [CLS] position is kept. DINOv3 has none. Reset:
    the head, freshly initialised, when its shape differs from the file's, or when the file's reads a layer
    `pre_logits`. Dropped: the file's head in that case, `pre_logits`, `mask_token`, a decoder, and optimiser
    state. A matching head is loaded.

    The report is a dict of name lists `loaded, resized, reset, dropped` (our names where there is one), with
    `source`, `path`, `sha256`, `mean` and `std` (3 floats each: the input scaling the weights were trained
    with), `scaling` (where these come from), `guessed` (whether only the family tells them) and `notes`.
    `heads`, `timm_name`: see settings.settings_of. InputError (a ValueError) if the file is absent, damaged,
    pickled, not a plain ViT, or does not fit. The model is untouched unless everything fits.
    """
    return load(model, read(path, heads, timm_name), path)


def load(model, weights, path):
    """As load_npz, of weights that were read from `path`. They must not be used again."""
    arrays, dropped, family = weights.arrays, list(weights.dropped), weights.family
    target = {name: p.detach() for name, p in model.named_parameters()}
    resized, reset = [], []

    # The file's head is taken where it has our classes and reads what ours reads.
    head = arrays.get("head.weight")
    other_readout = "mean" in (weights.readout, model.readout) and weights.readout != model.readout
    other_readout |= any(name.startswith("pre_logits") for name in dropped)  # a layer that we leave out
    if head is None or head.shape != target["head.weight"].shape or other_readout:
        reset = ["head.weight", "head.bias"]
        dropped += [name for name in reset if arrays.pop(name, None) is not None]
    if "pos_embed" in arrays and arrays["pos_embed"].shape[-1] == model.embed_dim:
        prefix = "cls_token" in arrays
        arrays["pos_embed"], changed = _resize_pos_embed(arrays["pos_embed"], prefix, model.grid_size, family)
        resized = ["pos_embed"] if changed else []
    misfit = differences(arrays, {n: p for n, p in target.items() if n not in reset})
    heads = weights.config["num_heads"]
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
    settings = weights.settings
    guessed = not settings.mean and not family.certain
    scaling = settings.scaling or f"{'guessed by the names' if guessed else 'as trained'} ({family.source})"
    return dict(
        source=family.source,
        path=str(path),
        sha256=sha256(Path(path)),
        mean=list(settings.mean or family.scaling[0]),
        std=list(settings.std or family.scaling[1]),
        scaling=scaling,
        guessed=guessed,
        resized=resized,
        reset=reset,
        loaded=sorted(arrays.keys() - set(resized)),
        dropped=sorted(dropped),
        notes=list(weights.notes),
    )


def describe(report):
    """The report of `load_npz` as one line."""
    parts = [f"{len(report['loaded'])} arrays loaded"]
    words = {"resized": "resized", "reset": "drawn anew", "dropped": "not used"}
    parts += [f"{word} [{listed(report[key])}]" for key, word in words.items() if report[key]]
    parts += report.get("notes", [])
    return f"weights: {report['path']} ({report['source']}): " + ", ".join(parts)


def config_from_npz(path, heads=None, timm_name=None):
    """The architecture in a weights file -> keywords of VisionTransformer, or with `rotary` of DinoV3.

    {patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio}, and of vit.PLAIN what is not as usual.
    Heads are read from the shape of the query kernel; a torch state dict does not hold them: see `read`.
    Every array that such a model needs is in the file, so a few bytes cannot ask for a large model.
    InputError (a ValueError) as in `load_npz`, and where nothing says how many heads there are.
    """
    return known_heads(read(path, heads, timm_name), path).config


def known_heads(weights, path):
    """Weights as they are. InputError where nothing says how many heads they have."""
    if weights.config["num_heads"] is None:
        raise InputError(
            f"{path} does not say how many heads its attention has, and its width of "
            f"{weights.config['embed_dim']} does not tell: give --heads N, or put the model's config.json "
            "beside it"
        )
    return weights


def architecture_name(config):
    """The name in vit.CONFIGS of an architecture (a dict as of `config_from_npz`), else vit-d384-l12-h6-p32.

    That is width, layers, heads and patch size, followed by -m3 for an MLP that is 3 and not 4 times as wide;
    either may be followed by -reg4, for as many register tokens. DINOv3 has names such as dinov3-s16.
    """
    keys = ("embed_dim", "depth", "num_heads", "patch_size")
    ratio, scaled = config.get("mlp_ratio", 4), config.get("layer_scale", False)
    dim, depth, heads, patch = (config[k] for k in keys)
    if config.get("rotary"):
        letter = {(384, 12): "s", (768, 12): "b", (1024, 24): "l", (1280, 32): "h"}.get((dim, depth))
        plus = "+" if config.get("gated") else ""
        return (
            f"dinov3-{letter}{patch}{plus}" if letter else f"dinov3-d{dim}-l{depth}-h{heads}-p{patch}{plus}"
        )
    registers = f"-reg{config['reg_tokens']}" if config.get("reg_tokens") else ""
    for name, known in CONFIGS.items():
        same = ratio == known.get("mlp_ratio", 4) and scaled == known.get("layer_scale", False)
        if same and all(config[k] == known[k] for k in keys):
            return name + registers
    mlp = f"-m{ratio:g}" if ratio != 4 else ""
    return f"vit-d{dim}-l{depth}-h{heads}-p{patch}{mlp}{registers}"


# ---------------------------------------------------------------- what a file holds


def read(path, heads=None, timm_name=None):
    """Any weights file -> vits.Weights, complete and free of contradictions.

    `heads`, `timm_name`: see settings.settings_of. InputError (a ValueError) as in `load_npz`."""
    path = Path(path)
    if not path.exists():
        if path != Path(DEFAULT_PATH):
            raise InputError(f"no weights at {path}: check the path (docs/WEIGHTS.md says where to get them)")
        raise InputError(
            f"no weights at {path}. Fetch them once with:\n"
            f"  mkdir -p weights && curl -L -o {DEFAULT_PATH} {DOWNLOAD}\n"
            "  or copy the file there by hand, or name another with --weights PATH"
        )
    if path.suffix == ".npz":
        weights = _read_google(path, heads, timm_name)
    else:
        weights = vits.read_torch(path, heads, timm_name)
    if bad := sorted(name for name, value in weights.arrays.items() if not torch.isfinite(value).all()):
        raise InputError(f"{path}: NaN or infinite values in [{listed(bad)}]")
    return weights


def _resize_pos_embed(pos, prefix, grid, family):
    """(1, prefix + n*n, D) -> (1, prefix + h*w, D), and whether it changed. `prefix`: 1 for [CLS], else 0."""
    side = math.isqrt(pos.shape[1] - prefix)
    if (side, side) == tuple(grid):
        return pos, False
    cells = pos[:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, n*n, D) -> (1, D, n, n)
    how = dict(mode="bilinear", align_corners=True)
    if family.bicubic:
        how = dict(mode="bicubic", antialias=True)
    cells = F.interpolate(cells, size=tuple(grid), **how)
    return torch.cat([pos[:, :prefix], cells.permute(0, 2, 3, 1).flatten(1, 2)], dim=1), True


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
    """Google's arrays (tensors of checked shapes), which are used up -> a state dict with our `names`."""
    out = {}
    for name in names:
        if name.endswith("attn.qkv.weight"):  # (D, heads, head_dim) x 3 -> (3D, D)
            out[name] = torch.cat([arrays.pop(key).flatten(1).T for key in _qkv_names(name, "kernel")])
            continue
        if name.endswith("attn.qkv.bias"):  # (heads, head_dim) x 3 -> (3D,)
            out[name] = torch.cat([arrays.pop(key).flatten() for key in _qkv_names(name, "bias")])
            continue
        value = arrays.pop(_google_name(name))
        if name == "patch_embed.proj.weight":
            value = value.permute(3, 2, 0, 1)  # HWIO -> OIHW
        elif name.endswith("attn.proj.weight"):  # (heads, head_dim, D) -> (D, D)
            value = value.flatten(0, 1).T
        elif value.ndim == 2:  # (in, out) -> (out, in)
            value = value.T
        out[name] = value.contiguous()
    return out


def _read_google(path, heads, timm_name):
    """Google's .npz -> Weights."""
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
    config, classes = _google_config(arrays, path)
    if heads not in (None, config["num_heads"]):
        raise InputError(f"--heads {heads}: {path} has {config['num_heads']} heads; leave it out")
    expected = vits.expected_arrays(config, arrays[_TOP["pos_embed"]], classes, path)
    if different := differences(arrays, _to_google(expected, config["num_heads"])):
        raise InputError(f"{path} is not a complete plain ViT: {different}")
    settings = Settings()
    if timm_name:
        settings = of_timm(timm_name, config["embed_dim"], "--timm-name")
    values = {}
    while arrays:  # each is let go when it has been converted, so that memory holds the file once
        name, array = arrays.popitem()
        values[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return Weights(_from_google(values, expected), dropped, GOOGLE, config, settings)


def _google_config(arrays, path):
    """(configuration, classes or None), read from a few shapes."""
    first = "Transformer/encoderblock_0/"
    blocks = {n.split("/")[1] for n in arrays if n.startswith("Transformer/encoderblock_")}
    patch, patch_w, chans, dim = shape_of(arrays, "embedding/kernel", 4, path)
    hidden = shape_of(arrays, first + _BLOCK["mlp.fc1.weight"], 2, path)[1]
    heads = shape_of(arrays, f"{first}{_MHA}/query/kernel", 3, path)[1]
    shape_of(arrays, _TOP["pos_embed"], 3, path)
    headless = not arrays.keys() & {"head/kernel", "head/bias"}
    classes = None if headless else shape_of(arrays, "head/kernel", 2, path)[1]
    return architecture((patch, patch_w), chans, dim, len(blocks), heads, hidden, path), classes
