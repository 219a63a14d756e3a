"""Pretrained Vision Transformers from disk, offline: Google's JAX `.npz` <-> our state dict.

Also timm and DeiT state dicts (.pth, .safetensors) and Hugging Face `ViTForImageClassification`,
recognised by their keys. Every array is loaded, resized, reset or dropped *by name*; whatever is
missing, left over or misshapen is an InputError (a ValueError) that lists the names. Layout of the `.npz`:
https://github.com/google-research/vision_transformer (`vit_jax/checkpoint.py`). Nothing is downloaded.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common import DAMAGED, InputError, atomic_path, load_tensors
from vit import CONFIGS

DEFAULT_PATH = "weights/ViT-B_16.npz"
DOWNLOAD = "https://storage.googleapis.com/vit_models/imagenet21k+imagenet2012/ViT-B_16-224.npz"
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # inputs in [-1, 1]: Google, timm's AugReg, Hugging Face ViT
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # DeiT

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
_LAYER = r"^(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\."  # transformers 4 and 5 name the blocks differently
_HF = [  # Hugging Face -> ours, as (pattern, replacement)
    (r"^(?:vit\.)?embeddings\.cls_token$", "cls_token"),
    (r"^(?:vit\.)?embeddings\.position_embeddings$", "pos_embed"),
    (r"^(?:vit\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (_LAYER + r"attention\.attention\.(query|key|value)\.", r"blocks.\1.attn.\2."),
    (_LAYER + r"attention\.q_proj\.", r"blocks.\1.attn.query."),
    (_LAYER + r"attention\.k_proj\.", r"blocks.\1.attn.key."),
    (_LAYER + r"attention\.v_proj\.", r"blocks.\1.attn.value."),
    (_LAYER + r"attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (_LAYER + r"layernorm_before\.", r"blocks.\1.norm1."),
    (_LAYER + r"layernorm_after\.", r"blocks.\1.norm2."),
    (_LAYER + r"(?:intermediate\.dense|mlp\.fc1)\.", r"blocks.\1.mlp.fc1."),
    (_LAYER + r"(?:output\.dense|mlp\.fc2)\.", r"blocks.\1.mlp.fc2."),
    (r"^(?:vit\.)?layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^(?:vit\.)?pooler\.dense\.", "pre_logits."),
]


def load_npz(model, path):
    """Copy the weights in `path` into a VisionTransformer; returns the report.

    Loaded: arrays of equal shape. Resized: `pos_embed`, when the model's patch grid differs (bilinear with
    aligned corners, as Google's `scipy.ndimage.zoom(order=1)`; the [CLS] position is kept). Reset: the
    head, freshly initialised, when its shape differs from the file's. Dropped: the file's head in that
    case, `pre_logits`, and optimiser state. A matching head (a file of `save_npz`, say) is loaded.

    The report is a dict of name lists `loaded, resized, reset, dropped` (our names where there is one), with
    `source`, `path`, `mean` and `std` (3 floats each: the input scaling the weights were trained with).
    InputError (a ValueError) if the file is absent, damaged, pickled, not a plain ViT, or does not fit.
    The model is untouched unless everything fits.
    """
    arrays, dropped, source, (mean, std), heads = _read(path)
    target = {name: p.detach() for name, p in model.named_parameters()}
    resized, reset = [], []
    for name in ("head.weight", "head.bias"):
        if target["head.weight"].shape != getattr(arrays.get("head.weight"), "shape", None):
            dropped += [name] if arrays.pop(name, None) is not None else []
            reset.append(name)
    pos = arrays.get("pos_embed")
    if pos is not None and pos.ndim == 3 and pos.shape[-1] == model.embed_dim:
        arrays["pos_embed"], changed = _resize_pos_embed(pos, model.grid_size, path)
        resized += ["pos_embed"] if changed else []
    missing = sorted(target.keys() - arrays.keys() - set(reset))
    extra = sorted(arrays.keys() - target.keys())
    wrong = sorted(
        f"{n} is {tuple(arrays[n].shape)}, needs {tuple(target[n].shape)}"
        for n in target.keys() & arrays.keys()
        if arrays[n].shape != target[n].shape
    )
    if heads not in (None, model.config["num_heads"]):  # the fused shapes would not show it
        wrong.append(f"{heads} heads, the model has {model.config['num_heads']}")
    if missing or extra or wrong:
        raise InputError(
            f"{path} does not fit the model: missing from the file [{', '.join(missing)}]; "
            f"not in the model [{', '.join(extra)}]; wrong shape [{'; '.join(wrong)}]"
        )
    with torch.no_grad():
        for name, value in arrays.items():
            target[name].copy_(value)
        if reset:
            torch.nn.init.trunc_normal_(model.head.weight, std=0.02)
            torch.nn.init.zeros_(model.head.bias)
    return dict(
        source=source,
        path=str(path),
        mean=list(mean),
        std=list(std),
        resized=resized,
        reset=reset,
        loaded=sorted(arrays.keys() - set(resized)),
        dropped=sorted(dropped),
    )


def describe(report):
    """The report of `load_npz` as one line."""
    parts = [f"{len(report['loaded'])} arrays loaded"]
    parts += [
        f"{word} [{', '.join(report[word])}]" for word in ("resized", "reset", "dropped") if report[word]
    ]
    return f"weights: {report['path']} ({report['source']}): " + ", ".join(parts)


def config_from_npz(path):
    """The architecture in a weights file -> keywords of VisionTransformer.

    {patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio}. Heads are read from the shape of the
    query kernel; a torch state dict does not hold them, so there the width decides (CONFIGS, else 64 per head).
    """
    arrays, _, _, _, heads = _read(path)
    try:
        dim, chans, patch, patch_w = arrays["patch_embed.proj.weight"].shape
        hidden = arrays["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError):
        raise InputError(f"{path}: the patch embedding or the first block is missing or misshapen") from None
    depth = 1 + max(int(name.split(".")[1]) for name in arrays if name.startswith("blocks."))
    known = {c["embed_dim"]: c["num_heads"] for c in CONFIGS.values()}
    heads = heads or known.get(dim, max(1, dim // 64))
    if patch != patch_w:
        raise InputError(f"{path}: patches of {patch}x{patch_w} are not square")
    return dict(
        patch_size=patch, in_chans=chans, embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=hidden / dim
    )


def save_npz(model, path):
    """Write a VisionTransformer in Google's layout (float32, atomically): `load_npz` gives it back exactly."""
    state = {name: p.detach().float().cpu().numpy() for name, p in model.state_dict().items()}
    heads, out = model.config["num_heads"], {}
    for name, value in state.items():
        dim = model.embed_dim
        if ".attn.qkv." in name:
            block, kind = name.split(".")[1], name.rsplit(".", 1)[1]
            for part, chunk in zip(("query", "key", "value"), np.split(value, 3)):
                key = f"Transformer/encoderblock_{block}/{_MHA}/{part}/"
                if kind == "weight":  # (out, in) -> (in, heads, head_dim)
                    out[key + "kernel"] = chunk.T.reshape(dim, heads, dim // heads)
                else:
                    out[key + "bias"] = chunk.reshape(heads, dim // heads)
            continue
        if name == "patch_embed.proj.weight":
            value = value.transpose(2, 3, 1, 0)  # OIHW -> HWIO
        elif name.endswith("attn.proj.weight"):
            value = value.T.reshape(heads, dim // heads, dim)
        elif value.ndim == 2:
            value = value.T
        out[_google_name(name)] = np.ascontiguousarray(value)
    with atomic_path(path) as tmp, open(tmp, "wb") as f:
        np.savez(f, **out)


def _google_name(name):
    if name.startswith("blocks."):
        _, block, rest = name.split(".", 2)
        return f"Transformer/encoderblock_{block}/{_BLOCK[rest]}"
    return _TOP[name]


def _resize_pos_embed(pos, grid, path):
    """(1, 1 + n*n, D) -> (1, 1 + h*w, D), and whether it changed. The file's grid is square."""
    side = round(max(0, pos.shape[1] - 1) ** 0.5)
    if pos.shape[0] != 1 or side < 1 or side * side != pos.shape[1] - 1:
        raise InputError(
            f"{path}: a position embedding of {pos.shape[1]} tokens, shape {tuple(pos.shape)}, is not "
            "[CLS] plus a square grid"
        )
    if (side, side) == tuple(grid):
        return pos, False
    cells = pos[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, n*n, D) -> (1, D, n, n)
    cells = F.interpolate(cells, size=tuple(grid), mode="bilinear", align_corners=True)
    return torch.cat([pos[:, :1], cells.permute(0, 2, 3, 1).flatten(1, 2)], dim=1), True


class _Weights(NamedTuple):
    arrays: dict  # our name -> float32 tensor
    dropped: list  # names in the file
    source: str
    scaling: tuple  # (mean, std), 3 floats each
    heads: int | None  # None: the file does not tell


def _read(path):
    """Any weights file -> _Weights."""
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"no weights at {path}. Fetch them once with:\n"
            f"  mkdir -p weights && curl -L -o {DEFAULT_PATH} {DOWNLOAD}\n"
            "  or copy the file there by hand, or name another with --weights PATH"
        )
    heads = None
    if path.suffix == ".npz":
        arrays, dropped, heads = _from_google(_read_npz(path), path)
        source, scaling = "Google .npz", HALF
    else:
        state, wrapped = _read_torch(path)
        if any("embeddings.cls_token" in name for name in state):
            (arrays, dropped), source, scaling = _from_hugging_face(state, path), "Hugging Face ViT", HALF
        else:
            arrays, dropped = state, [n for n in state if n.startswith("pre_logits.")]
            source, scaling = ("DeiT", IMAGENET) if wrapped else ("timm", HALF)
            arrays = {n: v for n, v in arrays.items() if n not in dropped}
    bad = [name for name, value in arrays.items() if not torch.isfinite(value).all()]
    if bad:
        raise InputError(f"{path}: NaN or infinite values in [{', '.join(sorted(bad))}]")
    return _Weights(arrays, dropped, source, scaling, heads)


def _read_npz(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (*DAMAGED, AttributeError) as error:
        raise InputError(
            f"{path} is not a plain .npz of arrays: truncated, pickled or damaged ({error}). Fetch it again"
        ) from None
    if any("opt/target/" in name for name in arrays):  # a training checkpoint: weights and optimiser state
        arrays = {n.removeprefix("opt/target/"): a for n, a in arrays.items()}
    return arrays


def _from_google(arrays, path):
    """Google's arrays -> (ours, dropped names, heads)."""
    hybrid = [n for n in arrays if n.startswith(("conv_root", "gn_root", "block1/"))]
    if hybrid:
        raise InputError(
            f"{path} is a ResNet hybrid (it has {hybrid[0]}); only plain ViT files fit: "
            "take one without an R in its name, such as ViT-B_16.npz"
        )
    if "embedding/kernel" not in arrays or "cls" not in arrays:
        raise InputError(
            f"{path} is not a ViT in Google's layout: it lacks embedding/kernel or cls "
            f"(it has {', '.join(sorted(arrays)[:4]) or 'no arrays'})"
        )
    dropped = [n for n in arrays if n.startswith(("pre_logits/", "opt/", "state/"))]
    rest = {n: a for n, a in arrays.items() if n not in dropped}
    wrong = [n for n, a in rest.items() if a.dtype.kind != "f"]
    if wrong:
        raise InputError(f"{path}: arrays that are not floating point: {', '.join(wrong)}")
    depth = len({m[1] for n in rest if (m := re.match(r"Transformer/encoderblock_(\d+)/", n))})
    out, missing, heads = {}, [], set()

    def take(name):
        if name not in rest:
            missing.append(name)
            return None
        return torch.from_numpy(np.ascontiguousarray(rest.pop(name), dtype=np.float32))

    shape = getattr(
        rest.get(f"Transformer/encoderblock_0/{_MHA}/query/kernel"), "shape", ()
    )  # (D, heads, head_dim)
    wrong = []
    for name, array in rest.items():  # these are flattened below, which would hide a wrong order of axes
        part = name.split(f"{_MHA}/")[-1]
        needed = {
            "out/kernel": (*shape[1:], *shape[:1]),
            "query/bias": shape[1:],
            "key/bias": shape[1:],
            "value/bias": shape[1:],
            "query/kernel": shape,
            "key/kernel": shape,
            "value/kernel": shape,
        }.get(part)
        if shape and needed is not None and (array.shape != needed or len(shape) != 3):
            wrong.append(f"{name} is {array.shape}, needs {needed}")
    if wrong:
        raise InputError(f"{path}: misshapen attention arrays: {'; '.join(wrong)}")
    names = list(_TOP) + [f"blocks.{i}.{n}" for i in range(depth) for n in _BLOCK]
    for name in names:
        if name.startswith("head.") and _google_name(name) not in rest:
            continue  # ImageNet-21k files may come without a head
        value = take(_google_name(name))
        if value is None:
            continue
        if name == "patch_embed.proj.weight":
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value  # HWIO -> OIHW
        elif name.endswith("attn.proj.weight"):
            value = value.flatten(0, 1).T  # (heads, head_dim, D) -> (D, D)
        elif value.ndim == 2:
            value = value.T  # (in, out) -> (out, in)
        out[name] = value.contiguous()
    for i in range(depth):
        for kind, ours in (("kernel", "weight"), ("bias", "bias")):
            keys = [
                f"Transformer/encoderblock_{i}/{_MHA}/{part}/{kind}" for part in ("query", "key", "value")
            ]
            parts = [take(key) for key in keys]
            if any(part is None for part in parts):
                continue
            if kind == "kernel":  # (D, heads, head_dim) x 3 -> (3D, D)
                heads.add(parts[0].shape[1])
                fused = torch.cat([p.flatten(1).T for p in parts])
            else:  # (heads, head_dim) x 3 -> (3D,)
                fused = torch.cat([p.flatten() for p in parts])
            out[f"blocks.{i}.attn.qkv.{ours}"] = fused
    if missing or rest or len(heads) != 1:
        raise InputError(
            f"{path} is not a complete plain ViT: missing [{', '.join(missing)}]; "
            f"left over [{', '.join(sorted(rest))}]; {depth} blocks of {sorted(heads)} heads"
        )
    return out, dropped, heads.pop()


def _read_torch(path):
    """A state dict from .pth/.pt/.bin or .safetensors -> ({name: float tensor}, was it inside {"model": ...})."""
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise InputError(f"{path} needs the package safetensors: pip install safetensors") from None
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is not readable safetensors ({error})") from None
    else:
        state = load_tensors(path)
    wrapped = isinstance(state.get("model"), dict)
    state = state["model"] if wrapped else state
    wrong = [str(n) for n, v in state.items() if not isinstance(v, torch.Tensor)]
    if wrong or not state:
        raise InputError(
            f"{path} is not a state dict: {', '.join(wrong[:4]) or 'nothing'} in it is no tensor"
        )
    return {n: v.float() for n, v in state.items()}, wrapped


def _from_hugging_face(state, path):
    """Hugging Face names -> (ours, dropped names); query, key and value are fused."""
    out, dropped, unknown = {}, [], []
    for name, value in state.items():
        for pattern, replacement in _HF:
            ours, hits = re.subn(pattern, replacement, name)
            if hits:
                out[ours] = value
                break
        else:
            unknown.append(name)
    if unknown:
        raise InputError(f"{path}: names that no ViTForImageClassification has: {', '.join(unknown)}")
    dropped = [n for n in out if n.startswith("pre_logits.")]
    out = {n: v for n, v in out.items() if n not in dropped}
    for i in {n.split(".")[1] for n in out if n.startswith("blocks.")}:
        for kind in ("weight", "bias"):
            keys = [f"blocks.{i}.attn.{part}.{kind}" for part in ("query", "key", "value")]
            if not all(k in out for k in keys):
                raise InputError(f"{path}: missing {', '.join(k for k in keys if k not in out)}")
            out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([out.pop(k) for k in keys])
    return out, dropped
