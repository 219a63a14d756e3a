"""A small U-Net that finds the lungs in a chest radiograph."""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from common.console import InputError, in_one_line
from common.safe_files import load_safetensors

SIDE = 128  # px, of the images that the U-Net and the heuristic look at
LEAST, MOST = 0.05, 0.75  # the area of a mask that can be lungs, as a share of the image
UNSURE = 0.4  # 99.9% of the Kermany training images are below 0.38, half of other pictures above 0.4


# ---------------------------------------------------------------- masks


def lung_sized(area):
    """Whether an area, as a share of the image, can be that of lungs: float, array or tensor -> bool of the
    same shape."""
    return (area > LEAST) & (area < MOST)


def soft_dice(soft, truth):
    """Dice of soft masks and true ones, (B, 1, H, W), each 0 to 1 -> (B,); 1 pixel is added to either, so
    that two empty masks agree."""
    sides = (1, 2, 3)
    return (2 * (soft * truth).sum(sides) + 1) / (soft.sum(sides) + truth.sum(sides) + 1)


# ---------------------------------------------------------------- the U-Net


def _convolutions(inside, outside):
    layers = []
    for channels in (inside, outside):
        layers += [
            nn.Conv2d(channels, outside, 3, padding=1, bias=False),
            nn.GroupNorm(4, outside),
            nn.ReLU(True),
        ]
    return nn.Sequential(*layers)


class LungNet(nn.Module):
    """A small U-Net (Ronneberger et al. 2015, arXiv:1505.04597) with group norm: `widths` channels at full
    resolution, half of it, and so on.

    forward: pairs of image and true mask (B, 2, H, W), as `show` gives them with "pair" -> float32 (B, 3):
    each image's loss (binary cross-entropy + 1 - soft Dice), twice the intersection of predicted and true
    mask, and the sum of their areas. H and W must be multiples of 2 ** (len(widths) - 1).
    """

    kind = "lungs"

    def __init__(self, widths=(8, 16, 32, 64, 128)):
        super().__init__()
        self.config, self.in_chans = dict(widths=list(widths)), 1
        self.down = nn.ModuleList(_convolutions(a, b) for a, b in zip((1, *widths), widths))
        pairs = list(zip(widths[:-1], widths[1:]))[::-1]
        self.up = nn.ModuleList(_convolutions(above + below, above) for above, below in pairs)
        self.head = nn.Conv2d(widths[0], 1, 1)

    def logits(self, image):
        """Grey images (B, 1, H, W), each standardised here -> logits of "lung" (B, 1, H, W)."""
        std, mean = torch.std_mean(image, dim=(1, 2, 3), keepdim=True)
        x, kept = (image - mean) / (std + 1e-3), []
        for i, block in enumerate(self.down):
            if i > 0:
                x = F.max_pool2d(x, 2)
            x = block(x)
            kept.append(x)
        kept.pop()
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, kept.pop()], dim=1))
        return self.head(x)

    def forward(self, pair):
        image, truth = pair[:, :1], (pair[:, 1:] > 0.5).float()
        logits = self.logits(image).float()
        sides = (1, 2, 3)
        dice = soft_dice(logits.sigmoid(), truth)
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(sides) + 1 - dice
        found = (logits > 0).float()
        return torch.stack([loss, 2 * (found * truth).sum(sides), found.sum(sides) + truth.sum(sides)], dim=1)

    def masks(self, grey):
        """Grey (B, 1, S, S) in [0, 1] -> masks float32 (B, 1, S, S), 1 on the lungs, else 0; all 0 where the
        net is unsure (probability 0.1 to 0.9) of more than UNSURE times the area that it calls lung."""
        side, sides = grey.shape[-1], (1, 2, 3)
        small = F.interpolate(grey, size=(SIDE, SIDE), mode="bilinear", antialias=side > SIDE)
        logits = self.logits(small)
        unsure = (logits.abs() < math.log(9)).float().mean(sides, keepdim=True)
        sure = unsure < UNSURE * (logits > 0).float().mean(sides, keepdim=True)
        large = F.interpolate(logits, size=(side, side), mode="bilinear")
        return ((large > 0) & sure).float()


def load_net(path):
    """LungNet with the weights in a .safetensors file, float32, in eval mode. InputError if it is no such
    file."""
    state, widths = {name: value.float() for name, value in load_safetensors(path).items()}, []
    try:
        widths = [state[n].shape[0] for n in sorted(state) if re.fullmatch(r"down\.\d\.0\.weight", n)]
        with torch.device("meta"):
            net = LungNet(tuple(widths))
        net.load_state_dict(state, assign=True)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        reason = in_one_line(error) if widths else "other names of tensors"
        raise InputError(f"{path} does not hold the U-Net of train_lungs.py: {reason}") from None
    return net.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # faster on a CPU
