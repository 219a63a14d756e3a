"""Every kind of model that a run folder can hold, rebuilt from its config; and those that are no network of
their own: logistic regression on pixels, and ensembles."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from common.console import InputError
from images.augment import tta_views
from lungs.show import INPUT_MODES
from lungs.unet import LungNet
from models.cnn import Cnn
from models.dinov3 import make_vit
from models.hybrid import Hybrid
from models.inputs import Inputs
from models.mae import MaskedAutoencoder
from vit import VisionTransformer


class PixelLinear(nn.Module):
    """Logistic regression on a coarse picture: images (B, 1, H, W) -> mean-pooled side x side pixels ->
    logits.

    The yardstick that every other model is held against; H and W must be multiples of `side`.
    """

    kind = "linear"

    def __init__(self, side=32, num_classes=2):
        super().__init__()
        self.config = dict(side=side, num_classes=num_classes)
        self.side, self.in_chans = side, 1
        self.head = nn.Linear(side * side, num_classes)

    def features(self, x):
        """(B, 1, H, W) -> (B, side^2) float32."""
        return F.adaptive_avg_pool2d(x, self.side).flatten(1)

    def layers(self):
        """Parts from input to head: (name, module) pairs."""
        return [("head", self.head)]

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self.head(self.features(x.float()))


class Ensemble(nn.Module):
    """The mean of several models' probabilities: grey images (B, 1, H, W) in [0, 1], and masks of the lungs
    as a second channel where a member needs them -> logits (B, K).

    `members`: their model_configs; `means`, `stds`: the input scaling of each, one float a channel; `looks`:
    what each is shown of the image, one of lungs.INPUT_MODES, None for all of it; `views`: over how many
    views the logits of each are averaged first, 1 or 7 (augment.tta_views), None for 1. Softmax of the logits
    (with `sigmoid`: sigmoid) gives the mean, which is computed without leaving logarithms.
    """

    kind = "ensemble"

    def __init__(self, members, means, stds, looks=None, sigmoid=False, views=None):
        super().__init__()
        self.config = dict(members=members, means=means, stds=stds)
        self.config |= dict(looks=looks) if looks else {}
        self.config |= dict(sigmoid=True) if sigmoid else {}
        self.config |= dict(views=views) if views else {}
        self.in_chans, self.looks = 1, looks or ["full"] * len(members)
        self.views = [tuple(tta_views()) if number > 1 else () for number in views or [1] * len(members)]
        self.shows = bool(looks or views)  # it cuts or moves the image itself, so it must be told the view
        self.reads_lungs = bool(looks) or any(member.get("kind") == Hybrid.kind for member in members)
        self.members = nn.ModuleList(build_model(config) for config in members)
        if not len(self.members) == len(means) == len(stds) == len(self.looks) == len(self.views) >= 2:
            raise InputError("an ensemble needs two or more members, each with its mean, std, look and views")
        if unknown := set(self.looks) - set(INPUT_MODES):
            raise InputError(
                f"an ensemble's member is shown {unknown.pop()!r}, not one of {', '.join(INPUT_MODES)}"
            )

    def parts(self, x):
        """Grey, and masks where a member needs them -> (member, its Inputs, its grey) of every member, as for
        a run of its own."""
        parts = []
        for member, look, views, *scaling in zip(
            self.members, self.looks, self.views, self.config["means"], self.config["stds"]
        ):
            reads = getattr(member, "reads_lungs", False)
            inputs = Inputs(*map(tuple, scaling), x.device, views=views, input_mode=look, reads_lungs=reads)
            parts.append((member, inputs, inputs.shown(x[:, :1], x[:, 1:])))
        return parts

    def scaled(self, x):
        """Grey, and masks where a member needs them -> the inputs of every member, of the image itself: a
        list of (B, C, H, W)."""
        return [inputs.scale(grey) for _, inputs, grey in self.parts(x)]

    def forward(self, x, view=None, together=False):
        """`view`: the one that all members are shown in place of their own, as in Inputs.views; `together`:
        as in Inputs.mean_logits."""
        logits = []
        for member, inputs, grey in self.parts(x):
            if view is not None:
                inputs = replace(inputs, views=(view,))
            logits.append(inputs.mean_logits(member, grey, together))
        if self.config.get("sigmoid"):
            z = torch.stack(logits)
            return F.logsigmoid(z).logsumexp(0) - F.logsigmoid(-z).logsumexp(0)
        return torch.stack([z.log_softmax(1) for z in logits]).logsumexp(0) - math.log(len(logits))


# The greatest value of every size in a model_config: room for any model in use, none for a damaged file.
LIMITS = dict(
    img_size=2048,
    patch_size=2048,
    in_chans=16,
    num_classes=100_000,
    embed_dim=16_384,
    depth=256,
    num_heads=256,
    mlp_ratio=64,
    side=2048,
    decoder_dim=16_384,
    decoder_depth=256,
    decoder_heads=256,
    d_model=16_384,
    token_grid=56,
)


SWITCHES = ("layer_scale", "class_token", "fc_norm", "rotary", "gated")


def check_config(config):
    """InputError if a size in a model_config is not a positive number within LIMITS."""
    for name, value in config.items():
        values = [value]
        if name == "img_size" and isinstance(value, list):  # height and width
            values = value
        number = (int, float) if name == "mlp_ratio" else int
        for v in values if name in LIMITS else []:
            if isinstance(v, bool) or not isinstance(v, number) or not 0 < v <= LIMITS[name]:
                raise InputError(f"{name} is {str(value)[:40]}, not a number from 1 to {LIMITS[name]}")
        if name == "reg_tokens" and not (type(value) is int and 0 <= value <= 256):
            raise InputError(f"reg_tokens is {str(value)[:40]}, not a whole number from 0 to 256")
        if name in SWITCHES and not isinstance(value, bool):
            raise InputError(f"{name} is {str(value)[:40]}, not true or false")
        if name == "norm_eps" and not (isinstance(value, float) and 0 < value < 0.1):
            raise InputError(f"norm_eps is {str(value)[:40]}, not a number in (0, 0.1)")
        if name.endswith("_rate") and not (isinstance(value, (int, float)) and 0 <= value < 1):
            raise InputError(f"{name} is {str(value)[:40]}, not a number in [0, 1)")


def build_model(config):
    """Rebuild a model from the `model_config` of a results.json: {"kind": "vit" | "linear" | "mae" |
    "ensemble" | "lungs" | "cnn" | "hybrid", **its keywords}. InputError for an unknown kind or a size that is
    out of all proportion."""
    known = (PixelLinear, MaskedAutoencoder, Ensemble, LungNet, Cnn, Hybrid)
    kinds = {VisionTransformer.kind: make_vit, **{m.kind: m for m in known}}
    config = dict(config)
    kind = config.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"unknown kind of model {kind!r}; known: {', '.join(kinds)}")
    check_config(config)
    for part in {"mae": ["encoder"], "hybrid": ["stem"]}.get(kind, ()):
        check_config(config[part])
    return kinds[kind](**config)
