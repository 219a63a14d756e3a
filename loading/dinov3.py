"""The three layouts of DINOv3: its authors', Hugging Face's and timm's, which is ours (models/dinov3.py)."""

import re

import torch

from common.console import InputError
from common.safe_files import listed

BASE = 100.0  # of the rotations, as in models/dinov3.py
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32}  # width: heads

_LAYER = r"^(?:model\.)?layer\.([0-9]+)\."  # transformers 5 puts "model." before it
_HF = [  # Hugging Face -> timm, as (pattern, replacement)
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (_LAYER + r"attention\.(q|k|v)_proj\.", r"blocks.\1.attn.\2."),
    (_LAYER + r"attention\.o_proj\.", r"blocks.\1.attn.proj."),
    (_LAYER + r"layer_scale([12])\.lambda1$", r"blocks.\1.gamma_\2"),
    (_LAYER + r"mlp\.gate_proj\.", r"blocks.\1.mlp.fc1_g."),
    (_LAYER + r"mlp\.up_proj\.", r"blocks.\1.mlp.fc1_x."),  # without a gate it is fc1
    (_LAYER + r"mlp\.down_proj\.", r"blocks.\1.mlp.fc2."),
    (_LAYER, r"blocks.\1."),
]
_AUTHORS = [  # its authors -> timm
    (r"^storage_tokens$", "reg_token"),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
]
_UNUSED = re.compile(r"mask_token$|local_cls_norm\.|projectors\.|rope\w*\.|head\.(mlp|last_layer)\.")


def is_dinov3(state):
    """Whether names are those of a DINOv3: registers, but no learnt positions."""
    if "storage_tokens" in state or any(name.startswith("rope_embed.") for name in state):
        return True
    positions = {"pos_embed", "embeddings.position_embeddings"} & state.keys()
    return not positions and bool({"reg_token", "embeddings.register_tokens"} & state.keys())


def our_names(state, path):
    """(state with timm's names, whose layout it was, names in the file that are not used, notes). InputError
    for a file that contradicts itself."""
    if "embeddings.register_tokens" in state:
        layout, patterns = "Hugging Face", _HF
    elif "storage_tokens" in state:
        layout, patterns = "its authors' file", _AUTHORS
    else:
        layout, patterns = "timm", []
    _check_periods(state, path)
    dropped, out, twice = [], {}, []
    for name, value in state.items():
        if _UNUSED.match(name.removeprefix("embeddings.")):
            dropped.append(name)
            continue
        ours = name
        for pattern, replacement in patterns:
            ours, found = re.subn(pattern, replacement, name)
            if found:
                break
        if ours in out:
            twice.append(name)
        out[ours] = value
    if twice:
        raise InputError(f"{path} has [{listed(sorted(twice))}] twice, under two names")
    if not any(".mlp.fc1_g." in name for name in out):
        out = {name.replace(".mlp.fc1_x.", ".mlp.fc1."): value for name, value in out.items()}
    _separate_biases(out, dropped, path)
    return out, layout, sorted(dropped), _fill_biases(out)


def _check_periods(state, path):
    """InputError where the authors' file has rotations of other periods than ours."""
    periods = state.get("rope_embed.periods")
    if periods is None or periods.ndim != 1 or not 1 <= len(periods) <= 1024:
        return
    expected = BASE ** (torch.arange(len(periods)) / len(periods))
    if not torch.allclose(periods.float(), expected, rtol=0.02):  # they may be of 16 bits
        raise InputError(f"{path} has rotary positions of another base than {BASE:g}: no DINOv3 that we know")


def _separate_biases(state, dropped, path):
    """Fused or separate query, key and value -> attn.qkv.weight, attn.q_bias and attn.v_bias, in place. The
    authors' key bias is masked out by their code, so it is dropped. InputError where one is in use."""
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    for attention in (f"blocks.{block}.attn." for block in blocks):
        # Hugging Face: three matrices, and no bias of the keys.
        parts = [state.get(f"{attention}{part}.weight") for part in "qkv"]
        if all(part is not None for part in parts):
            if len({part.shape for part in parts}) > 1:
                raise InputError(f"{path}: {attention}q, k and v differ in shape")
            for part in "qkv":
                del state[f"{attention}{part}.weight"]
            state[f"{attention}qkv.weight"] = torch.cat(parts)
        for part in "qv":
            if f"{attention}{part}.bias" in state:
                state[f"{attention}{part}_bias"] = state.pop(f"{attention}{part}.bias")

        # The authors: one bias, and a mask that is 0 for the keys.
        bias, mask = (state.pop(f"{attention}qkv.{name}", None) for name in ("bias", "bias_mask"))
        if bias is None:
            continue
        if bias.ndim != 1 or len(bias) % 3:
            raise InputError(f"{path}: {attention}qkv.bias is {tuple(bias.shape)}, needs three equal parts")
        state[f"{attention}q_bias"], keys, state[f"{attention}v_bias"] = bias.chunk(3)
        masked = mask is not None and mask.shape == bias.shape and not mask.chunk(3)[1].nan_to_num().any()
        if keys.any() and not masked:
            raise InputError(f"{path}: {attention}qkv.bias has values for keys, which DINOv3 has not")
        dropped += [] if mask is None else [f"{attention}qkv.bias_mask"]


def _fill_biases(state):
    """timm's plain files have no bias of queries and values, because it is 0: add zeros. Returns notes."""
    filled = 0
    for name in [name for name in state if name.endswith(".attn.qkv.weight")]:
        attention, width = name.removesuffix("qkv.weight"), state[name].shape[-1]
        if not {f"{attention}q_bias", f"{attention}v_bias"} & state.keys() and width <= 16_384:
            state[f"{attention}q_bias"] = torch.zeros(width)
            state[f"{attention}v_bias"] = torch.zeros(width)
            filled += 1
    return [f"queries and values of {filled} blocks have no bias in the file: 0 is taken"] if filled else []
