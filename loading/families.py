"""Names of parameters in other people's ViT state dicts -> ours, which are timm's; and what kind of ViT a
file holds, or why it cannot be read.
"""

import re
from typing import NamedTuple

import torch

from common.console import InputError
from common.safe_files import listed
from loading import dinov3
from loading.files import renamed

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # inputs in [-1, 1]: Google, timm's AugReg, Hugging Face ViT
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # DeiT, DINO, MAE, torchvision

# Names of the outermost layers: where one of them is, no prefix is left to take off.
ROOTS = (
    *("patch_embed.proj.weight", "conv_proj.weight"),
    *("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.weight"),
)

_LAYER = r"^(?:encoder\.layer|layers)\.([0-9]+)\."  # transformers 4, 5
_HF = [  # Hugging Face -> ours, as (pattern, replacement)
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
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
    (r"^layernorm\.", "norm."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
    (r"^pooler\.dense\.", "pre_logits."),
    (r"^(decoder\.)", r"\1"),
]
_TV_LAYER = r"^encoder\.layers\.encoder_layer_([0-9]+)\."
_TORCHVISION = [  # torchvision's vit_b_16 and its kin -> ours
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (_TV_LAYER + r"ln_([12])\.", r"blocks.\1.norm\2."),
    (_TV_LAYER + r"self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (_TV_LAYER + r"self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (_TV_LAYER + r"mlp\.(?:0|linear_1)\.", r"blocks.\1.mlp.fc1."),
    (_TV_LAYER + r"mlp\.(?:3|linear_2)\.", r"blocks.\1.mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    (r"^heads\.pre_logits\.", "pre_logits."),
]
_REFUSED = [  # a name that only such a model has -> what it is
    (
        r"(^|\.)vision_model\.head\.|(^|\.)attn_pool\.",
        "SigLIP's image tower, which reads by attention pooling",
    ),
    (r"(^|\.)vision_model\.|(^|\.)resblocks\.[0-9]+\.|(^|\.)norm_pre\.", "CLIP's image tower"),
    (r"^visual\.trunk\.|^logit_scale$", "a CLIP or SigLIP model of an image and a text tower"),
    (r"swiglu|\.mlp\.w12\.|\.mlp\.weights_in\.", "DINOv2's giant, which has SwiGLU layers"),
    (r"rel_pos|relative_position", "a BEiT, SAM or Swin, which has relative positions"),
    (r"\.attn\.(q|k|v)_proj\.|\.attn\.rope\.", "an EVA, which has attention layers of another kind"),
    (r"^layers\.[0-9]+\.blocks\.", "a Swin, which is no plain ViT"),
]
# What training had besides the encoder, and fine-tuning here has no use for.
_UNUSED = re.compile(
    r"(pre_logits|decoder|decoder_\w+|head\.mlp|head\.last_layer)\.|(mask_token|decoder_pos_embed)$"
)


class Family(NamedTuple):
    """Where weights come from, and what they were trained with."""

    source: str
    scaling: tuple  # (mean, std) of the inputs, 3 floats each
    bicubic: bool = False  # how positions are resized: bicubic, antialiased; else bilinear, see load_npz
    rotary: bool = False  # DINOv3
    certain: bool = False  # whether the scaling is known, and no guess by the names


GOOGLE = Family("Google .npz", HALF, certain=True)


class Named(NamedTuple):
    """A ViT's `state` {our name: tensor}; its Family; `dropped`, names in the file that are not used;
    `notes`, a line on each thing that was changed."""

    state: dict
    family: Family
    dropped: list
    notes: list


def refuse_others(state, path):
    """InputError for models that are no plain ViT, by the names that only they have."""
    for pattern, what in _REFUSED:
        if found := [name for name in state if isinstance(name, str) and re.search(pattern, name)]:
            raise InputError(
                f"{path} is {what} (it has {listed(found, 1)}): take a plain ViT, DINOv2 or DINOv3, "
                "see docs/WEIGHTS.md"
            )


def our_names(state, wrapped, path):
    """A torch state dict of a ViT -> Named. `wrapped`: whether it stood in a dict, as DeiT's and MAE's do.
    InputError for names that no ViT has.

    LayerScale tells DINOv2 (and DeiT III), which share scaling and interpolation.
    """
    if dinov3.is_dinov3(state):
        state, layout, dropped, notes = dinov3.our_names(state, path)
        return Named(state, Family(f"DINOv3, {layout}", IMAGENET, rotary=True), dropped, notes)
    if "conv_proj.weight" in state:
        state, family = (
            _renamed(state, _TORCHVISION, "torchvision ViT", path),
            Family("torchvision", IMAGENET),
        )
    elif any(name.startswith("embeddings.") for name in state):
        state, family = _from_hugging_face(state, path)
    else:
        state = {("reg_token" if name == "register_tokens" else name): v for name, v in state.items()}
        family = _family_of_plain_names(state, wrapped)
    dropped = [name for name in state if _UNUSED.match(name)]
    state = {name: value for name, value in state.items() if name not in dropped}
    notes = _keep_distillation_token(state, dropped) if "dist_token" in state else []
    return Named(state, family, dropped, notes)


def _family_of_plain_names(state, wrapped):
    if any(name.endswith(".ls1.gamma") for name in state):
        return Family("DINOv2", IMAGENET, bicubic=True)
    if any(name.startswith("decoder") for name in state):
        return Family("MAE", IMAGENET)
    if wrapped or "dist_token" in state:
        return Family("DeiT, DINO or MAE", IMAGENET)
    if "head.weight" not in state:  # AugReg's files have a head; those of self-supervision do not
        return Family("timm, without a head", IMAGENET)
    return Family("timm", HALF)


def _keep_distillation_token(state, dropped):
    """DeiT's second token takes part in every block, so it stays, as a register; its position is added to it.
    Its head is left out. Changes both arguments; returns a note."""
    position = state.get("pos_embed")
    if position is not None and position.ndim == 3 and position.shape[1] > 2:
        first, second, rest = position.split([1, 1, position.shape[1] - 2], dim=1)
        state["pos_embed"] = torch.cat([first, rest], dim=1)
        state["reg_token"] = state.pop("dist_token") + second
    heads = [name for name in state if name.startswith("head_dist.")]
    for name in heads:
        del state[name]
    dropped += heads
    return ["the distillation token is kept, as a register token; the head that read it is not used"]


def _renamed(state, patterns, what, path):
    """`state` under the names that `patterns` give. InputError for names that no `what` has, or has once."""

    def ours_of(name):
        return next((re.sub(p, r, name) for p, r in patterns if re.search(p, name)), None)

    return renamed(state, ours_of, f"{path}: names that no {what} has, or has only once")


def _from_hugging_face(state, path):
    """(state with our names, Family); query, key and value are fused."""
    out = _renamed(state, _HF, "Hugging Face ViT, DeiT, ViTMAE or DINOv2", path)
    fuse(out, path)
    if any(name.endswith(".ls1.gamma") for name in out):
        return out, Family("DINOv2, Hugging Face", IMAGENET, bicubic=True)
    if any(name.startswith("decoder.") for name in out):
        return out, Family("MAE, Hugging Face", IMAGENET)
    if "dist_token" in out:
        return out, Family("DeiT, Hugging Face", IMAGENET)
    return out, Family("Hugging Face ViT", HALF)


def fuse(state, path):
    """Put blocks.N.attn.query, key and value together as blocks.N.attn.qkv, in place. InputError where they
    are not all there or differ in shape."""
    for block in {n.split(".")[1] for n in state if n.startswith("blocks.")}:
        for kind in ("weight", "bias"):
            keys = [f"blocks.{block}.attn.{part}.{kind}" for part in ("query", "key", "value")]
            if missing := [k for k in keys if k not in state]:
                raise InputError(f"{path}: missing [{listed(missing)}]; it has [{listed(sorted(state), 4)}]")
            parts = [state.pop(k) for k in keys]
            if len({p.shape for p in parts}) > 1:
                raise InputError(f"{path}: {', '.join(keys)} differ in shape")
            state[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
