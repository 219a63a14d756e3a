"""Random changes of training images, on the device, image by image; and the fixed views of test-time
augmentation."""

import math
from argparse import ArgumentTypeError
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F

from common.console import InputError


@dataclass(frozen=True)
class Augment:
    """Random changes of a batch [B, C, S, S] in [0, 1], drawn per image on its device; all zero = none.

    The first channel is the image; a second one, if any, says where a model may look (lungs.show) and is only
    moved, together with the image.

    rotate: +/- degrees; translate: +/- fraction of the side; scale: +/- fraction; aspect: +/- fraction by
    which width grows and height shrinks; crop: the smallest area, a share in (0, 1], of the random box that
    is enlarged to the whole, width to height 3/4 to 4/3 (Szegedy et al. 2014, arXiv:1409.4842, as in
    torchvision's RandomResizedCrop; 0: no crop); hflip: probability (0: hearts are on the left). Geometry is
    one bilinear resampling with black outside. brightness: +/- added; contrast: +/- fraction about the
    image's mean; gamma: exponent exp(+/- gamma). blur: probability of a Gaussian of 0.4% to 1.2% of the side
    (a coarser detector); noise: greatest standard deviation; erase: probability that one rectangle of 3% to
    25% of the area turns grey (Zhong et al. 2020, arXiv:1708.04896). frame, tone: probability that the border
    (up to a fifth of the side), or the grey levels (histogram matching), are borrowed from another image of
    the batch, whatever its class: what a machine and its operator add to a picture then says nothing about
    the child.
    """

    rotate: float = 7.0
    translate: float = 0.05
    scale: float = 0.1
    aspect: float = 0.0
    brightness: float = 0.1
    contrast: float = 0.15
    gamma: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    erase: float = 0.0
    hflip: float = 0.0
    frame: float = 0.0
    tone: float = 0.0
    crop: float = 0.0

    def __call__(self, x):
        B, device = x.shape[0], x.device

        def uniform(low, high):
            return low + (high - low) * torch.rand(B, device=device)

        def both(bound):
            return uniform(-bound, bound)

        def chance(p):
            return torch.rand(B, device=device) < p

        if self.rotate or self.translate or self.scale or self.aspect or self.hflip or self.crop:
            x = affine(
                x,
                angle=both(math.radians(self.rotate)),
                zoom=1 + both(self.scale),
                flip=1 - 2 * chance(self.hflip).float(),
                shift_x=both(self.translate),
                shift_y=both(self.translate),
                aspect=1 + both(self.aspect),
                box=self._box(uniform, x.shape[-1]),
            )
        x, where = x[:, :1], x[:, 1:]
        if self.frame or self.tone:
            other = x[torch.randperm(B, device=device)]
            if self.tone:
                x = torch.where(chance(self.tone).view(B, 1, 1, 1), match_levels(x, other), x)
            if self.frame:
                x = borrow_frame(x, other, uniform(0, 0.2) * chance(self.frame))
        if self.blur:
            chosen = chance(self.blur).view(B, 1, 1, 1)
            x = torch.where(chosen, gaussian_blur(x, x.shape[-1] * uniform(0.004, 0.012)), x)
        if self.gamma:
            x = x.clamp(min=1e-6) ** both(self.gamma).exp().view(B, 1, 1, 1)
        if self.brightness or self.contrast:
            mean = x.mean(dim=(1, 2, 3), keepdim=True)
            x = (x - mean) * (1 + both(self.contrast)).view(B, 1, 1, 1) + mean
            x = x + both(self.brightness).view(B, 1, 1, 1)
        if self.noise:
            x = x + torch.randn_like(x) * uniform(0, self.noise).view(B, 1, 1, 1)
        if self.erase:
            area, ratio = uniform(0.03, 0.25), both(0.7).exp()
            across = _span(x.shape[-1], (area * ratio).sqrt(), uniform(0, 1), device)
            down = _span(x.shape[-2], (area / ratio).sqrt(), uniform(0, 1), device)
            inside = across.unsqueeze(1) & down.unsqueeze(2)  # (B, S, S)
            inside = inside & chance(self.erase).view(B, 1, 1)
            x = torch.where(inside.unsqueeze(1), uniform(0, 1).view(B, 1, 1, 1), x)
        return torch.cat([x.clamp(0, 1), where], dim=1) if where.shape[1] else x.clamp(0, 1)

    def _box(self, uniform, side):
        """A random box for every image: (B, 4), its width, height and middle (x, y), where the image spans
        [-1, 1]; its outermost pixels are pixels of the image. A side that would be longer than the image's is
        as long; torchvision draws again. None without `crop`."""
        if not self.crop:
            return None
        area, ratio = uniform(self.crop, 1), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
        size = torch.stack([area * ratio, area / ratio], 1).sqrt().clamp(max=1)
        place = torch.stack([uniform(-1, 1), uniform(-1, 1)], 1)
        return torch.cat([size, place * (1 - size) * (1 - 1 / side)], 1)


class Mix:
    """torchvision's MixUp (Zhang et al. 2018, arXiv:1710.09412) and CutMix (Yun et al. 2019,
    arXiv:1905.04899) of whole batches, with these alphas; where both are above 0, one of them at random.

    Returns (mixed images, share): each image keeps `share` of itself, the rest comes from the image before it
    in the batch (torch.roll), and so does its loss: losses are linear in the targets, so this is the loss of
    soft targets, for classes and findings alike."""

    def __init__(self, mixup=0.0, cutmix=0.0):
        from torchvision.transforms import v2  # slow to import, seldom needed

        self.kinds = [kind(alpha=a) for kind, a in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if a]

    def __call__(self, x):
        kind = self.kinds[int(torch.randint(len(self.kinds), ()))]
        kind.num_classes = len(x)  # every image a class of its own: its share is read from the soft labels
        mixed, soft = kind(x, torch.arange(len(x), device=x.device))
        return mixed, float(soft[0, 0])


class RandAugment:
    """torchvision's RandAugment (Cubuk et al. 2020, arXiv:1909.13719), drawn anew for every image: `ops` of
    its 14 changes, each of `magnitude` (0 to 30), one after the other.

    Images [B, C, S, S] in [0, 1], the first channel grey; the others, masks, are only moved along."""

    MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")

    def __init__(self, ops, magnitude):
        from torchvision.transforms import v2  # slow to import, seldom needed

        class Changes(v2.RandAugment):
            def _apply_image_or_video_transform(self, image, name, *args, **kwargs):
                apply = super()._apply_image_or_video_transform
                if name in RandAugment.MOVES:
                    return apply(image, name, *args, **kwargs)
                return torch.cat([apply(image[:1], name, *args, **kwargs), image[1:]])

        self.change = Changes(ops, magnitude, interpolation=v2.InterpolationMode.BILINEAR, fill=0.0)

    def __call__(self, x):
        return torch.stack([self.change(image) for image in x]).clamp(0, 1)


# ---------------------------------------------------------------- the flag

PRESETS = {
    "none": Augment(**dict.fromkeys(asdict(Augment()), 0.0)),
    "plain": Augment(),
    "robust": Augment(scale=0.2, gamma=0.3, blur=0.5, noise=0.05),
    "strong": Augment(
        rotate=15.0, translate=0.1, scale=0.25, aspect=0.15, brightness=0.25, contrast=0.4, gamma=0.5
    ),
}
UNITS = {
    "rotate": "+/- degrees",
    "translate": "+/- fraction of the side",
    "scale": "+/- fraction",
    "aspect": "+/- fraction",
    "brightness": "+/- of the grey range",
    "contrast": "+/- fraction",
    "gamma": "exponent exp(+/- X)",
    "blur": "probability",
    "noise": "greatest standard deviation",
    "erase": "probability",
    "hflip": "probability",
    "frame": "probability of another image's border",
    "tone": "probability of another image's grey levels",
    "crop": "smallest area of a random crop, 0: none",
}
LIMITS = {"rotate": 180.0, "gamma": 3.0, "scale": 0.99, "aspect": 0.99}  # of the others: 1


def add_augment_argument(parser, default):
    """--augment NAME[,change=X ...]."""
    parser.add_argument(
        "--augment",
        default=default,
        metavar="NAME[,CHANGE=X...]",
        help=f"random changes of training images: {', '.join(PRESETS)}, with changes of it, for instance "
        "strong,rotate=10,noise=0: " + ", ".join(f"{name} ({unit})" for name, unit in UNITS.items()),
    )


def parse_randaugment(text):
    """An argparse type: "2,9" -> the same text, checked; "" is none. ArgumentTypeError unless it is a number
    of changes, 1 to 14, and a magnitude, 0 to 30."""
    ops, _, magnitude = text.partition(",")
    good = ops.isdecimal() and magnitude.isdecimal() and 1 <= int(ops) <= 14 and int(magnitude) <= 30
    if text and not good:
        raise ArgumentTypeError(f"{text[:40]!r}: give N,M, for instance 2,9, N in 1 to 14, M in 0 to 30")
    return text


def parse_augment(text):
    """ "strong,rotate=10,noise=0" -> Augment. InputError for unknown names and values out of range."""
    name, *changes = text.split(",")
    if name not in PRESETS:
        raise InputError(f"--augment {text}: {name!r} is not one of {', '.join(PRESETS)}")
    values = {}
    for change in changes:
        key, _, value = change.partition("=")
        if key not in UNITS:
            raise InputError(f"--augment {text}: {key!r} is not one of {', '.join(UNITS)}")
        limit = LIMITS.get(key, 1.0)
        try:
            values[key] = float(value)
        except ValueError:
            values[key] = math.nan
        if not 0 <= values[key] <= limit:
            raise InputError(f"--augment {text}: {key} must be a number in [0, {limit:g}]")
    return replace(PRESETS[name], **values)


# ---------------------------------------------------------------- operations on batches


def _span(side, length, place, device):
    """Booleans (B, side): True on a run of `length` (fraction) that starts at `place` of the room left for
    it."""
    at = (torch.arange(side, device=device) + 0.5) / side
    start = place * (1 - length.clamp(max=1))
    return (at >= start.unsqueeze(1)) & (at < (start + length).unsqueeze(1))


def match_levels(x, like, levels=256):
    """Images [B, 1, S, S] in [0, 1] with their grey levels moved, in order, to the distribution of `like`'s,
    pair by pair: histogram matching (Gonzalez and Woods, Digital Image Processing, section 3.3) in `levels`
    steps. The distributions are those of the middle (three quarters of each side), without the black beside a
    body."""

    def steps(z):
        return (z.flatten(1) * (levels - 1)).round().long()

    def cumulative(z):  # (B, levels): share of the pixels below the middle of each level
        margin = z.shape[-1] // 8
        step = steps(z[..., margin : z.shape[-2] - margin, margin : z.shape[-1] - margin])
        share = torch.zeros(len(z), levels, device=z.device).scatter_add_(
            1, step, torch.ones_like(step, dtype=torch.float)
        )
        share = share / step.shape[1]
        return share.cumsum(1) - share / 2

    have, want = cumulative(x), cumulative(like)
    high = torch.searchsorted(want, have).clamp(1, levels - 1)
    below, above = want.gather(1, high - 1), want.gather(1, high)
    level = (
        high - 1 + ((have - below) / (above - below).clamp(min=1e-9)).clamp(0, 1)
    )  # between the two neighbours
    return (level / (levels - 1)).gather(1, steps(x)).view_as(x).to(x.dtype)


def borrow_frame(x, other, width):
    """Images [B, 1, S, S] whose border, `width` [B] of the side wide, comes from `other`; a soft edge of 4%;
    0: none."""
    side = x.shape[-1]
    at = (torch.arange(side, device=x.device) + 0.5) / side
    depth = torch.minimum(at, 1 - at)
    depth = torch.minimum(depth[:, None], depth[None])  # (S, S): distance to the nearest edge
    own = ((depth - width.view(-1, 1, 1, 1)) / 0.04 + 0.5).clamp(0, 1)
    return torch.where(width.view(-1, 1, 1, 1) > 0, x * own + other * (1 - own), x)


def gaussian_blur(x, sigma):
    """Blur images [B, 1, S, S], each by its own sigma [B] in pixels (at most S/6); edges are repeated."""
    B, radius = len(x), max(1, math.ceil(3 * float(sigma.max())))
    at = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (at / sigma.view(B, 1)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)  # (B, 2r + 1)
    x = F.pad(
        x.transpose(0, 1), (radius,) * 4, mode="replicate"
    )  # (1, B, S + 2r, S + 2r): one group an image
    x = F.conv2d(F.conv2d(x, kernel.view(B, 1, 1, -1), groups=B), kernel.view(B, 1, -1, 1), groups=B)
    return x.transpose(0, 1)


def affine(x, angle, zoom, flip, shift_x, shift_y, aspect=1.0, box=None):
    """Turn, zoom, mirror (flip = -1) and shift images [B, C, S, S], by one bilinear resampling, black
    outside.

    Each parameter is a tensor [B]: radians; factor; +/- 1; fraction of the side, in the output's axes; width
    grows by `aspect` and height shrinks by it. box [B, 4], if any: the part of the result that is enlarged to
    the whole, its width, height and middle, where the result spans [-1, 1].
    """
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    theta = torch.stack(
        [
            torch.stack(
                [cos * flip / aspect, -sin * flip * aspect, 2 * shift_x], 1
            ),  # the grid spans [-1, 1]
            torch.stack([sin / aspect, cos * aspect, 2 * shift_y], 1),
        ],
        dim=1,
    )  # (B, 2, 3)
    if box is not None:
        turn, shift = theta[:, :, :2], theta[:, :, 2:]
        theta = torch.cat([turn * box[:, None, :2], shift + turn @ box[:, 2:, None]], dim=2)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


# ---------------------------------------------------------------- test-time augmentation


def tta_views(flip=False):
    """Test-time augmentation: fixed views, each a function [B, C, S, S] -> the same shape.

    The image itself, shifted 3% in four directions, zoomed by 0.95 and 1.05; with `flip` all of them mirrored
    too.
    """
    settings = [
        (1.0, 0.0, 0.0),
        (1.0, 0.03, 0.0),
        (1.0, -0.03, 0.0),
        (1.0, 0.0, 0.03),
        (1.0, 0.0, -0.03),
        (0.95, 0.0, 0.0),
        (1.05, 0.0, 0.0),
    ]

    def view(zoom, dx, dy, mirrored):
        def apply(x):
            sign = -1.0 if mirrored else 1.0
            values = (0.0, zoom, sign, dx, dy)
            return affine(x, *(torch.full((x.shape[0],), v, device=x.device) for v in values))

        changed = mirrored or (zoom, dx, dy) != (1.0, 0.0, 0.0)
        return apply if changed else lambda x: x

    views = [view(*setting, False) for setting in settings]
    if flip:
        views += [view(*setting, True) for setting in settings]
    return views
