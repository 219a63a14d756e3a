"""Names of parameters in other people's ViT state dicts -> ours, which are timm's.

timm's own and DeiT's need no change; Hugging Face's ViT and DINOv2, and the files that DINOv2's authors
published, do.
"""

import re
from typing import NamedTuple

import torch

from common.console import InputError
from common.safe_files import listed

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # inputs in [-1, 1]: Google, timm's AugReg, Hugging Face ViT
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # DeiT, DINOv2

_MODEL = r"^(?:vit\.|dinov2\.|dinov2_with_registers\.)?"
_LAYER = _MODEL + r"(?:encoder\.layer|layers)\.([0-9]+)\."  # transformers 4, 5
_HF = [  # Hugging Face -> ours, as (pattern, replacement)
    (_MODEL + r"embeddings\.cls_token$", "cls_token"),
    (_MODEL + r"embeddings\.mask_token$", "mask_token"),
    (_MODEL + r"embeddings\.register_tokens$", "reg_token"),
    (_MODEL + r"embeddings\.position_embeddings$", "pos_embed"),
    (_MODEL + r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (_LAYER + r"attention\.attention\.(query|key|value)\.", r"blocks.\1.attn.\2."),
    (_LAYER + r"attention\.q_proj\.", r"blocks.\1.attn.query."),
    (_LAYER + r"attention\.k_proj\.", r"blocks.\1.attn.key."),
    (_LAYER + r"attention\.v_proj\.", r"blocks.\1.attn.value."),
    (_LAYER + r"attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (_LAYER + r"(?:layernorm_before|norm1)\.", r"blocks.\1.norm1."),
    (_LAYER + r"(?:layernorm_after|norm2)\.", r"blocks.\1.norm2."),
    (_LAYER + r"(?:intermediate\.dense|mlp\.fc1)\.", r"blocks.\1.mlp.fc1."),
    (_LAYER + r"(?:output\.dense|mlp\.fc2)\.", r"blocks.\1.mlp.fc2."),
    (_LAYER + r"layer_scale([12])\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (_MODEL + r"layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (_MODEL + r"pooler\.dense\.", "pre_logits."),
]


class Family(NamedTuple):
    """Where weights come from, and what they were trained with."""

    source: str
    scaling: tuple  # (mean, std) of the inputs, 3 floats each
    bicubic: bool = (
        False  # how their positions are resized: bicubic, antialiased; else bilinear, see load_npz
    )


GOOGLE = Family("Google .npz", HALF)


def our_names(state, path):
    """A torch state dict of a ViT -> (state dict with our names, Family). InputError for names that no ViT
    has.

    LayerScale tells DINOv2 (and DeiT III), which share scaling and interpolation; a dict under "model", DeiT.
    """
    wrapped = isinstance(state.get("model"), dict)
    state = state["model"] if wrapped else state
    if any("swiglu" in n or ".mlp.w12." in n or ".mlp.weights_in." in n for n in state):
        raise InputError(f"{path} has SwiGLU layers (DINOv2's giant): take the small, base or large model")
    if hugging_face := any("embeddings.cls_token" in name for name in state):
        state = _from_hugging_face(state, path)
    state = {("reg_token" if name == "register_tokens" else name): v for name, v in state.items()}
    if any(name.endswith(".ls1.gamma") for name in state):
        name = "DINOv2, Hugging Face" if hugging_face else "DINOv2"
        return state, Family(name, IMAGENET, bicubic=True)
    if hugging_face:
        return state, Family("Hugging Face ViT", HALF)
    return state, Family("DeiT", IMAGENET) if wrapped else Family("timm", HALF)


def _from_hugging_face(state, path):
    """Hugging Face names -> ours; query, key and value are fused."""
    out, unknown = {}, []
    for name, value in state.items():
        ours = next((re.sub(p, r, name) for p, r in _HF if re.search(p, name)), None)
        if ours is None or ours in out:
            unknown.append(name)
        out[ours] = value
    if unknown:
        raise InputError(
            f"{path}: names that no ViTForImageClassification has, or has only once: [{listed(unknown)}]"
        )
    for block in {n.split(".")[1] for n in out if n.startswith("blocks.")}:
        for kind in ("weight", "bias"):
            keys = [f"blocks.{block}.attn.{part}.{kind}" for part in ("query", "key", "value")]
            if missing := [k for k in keys if k not in out]:
                raise InputError(f"{path}: missing [{listed(missing)}]")
            parts = [out.pop(k) for k in keys]
            if len({p.shape for p in parts}) > 1:
                raise InputError(f"{path}: {', '.join(keys)} differ in shape")
            out[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return out
