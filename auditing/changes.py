"""Changed images: what an audit shows a model instead of the real ones. All images are uint8 [S, S], grey."""

import io

import numpy as np
import torch
from PIL import Image

from images.augment import borrow_frame
from lungs.show import GREY

BORDER = 1 / 8  # of the side


# ---------------------------------------------------------------- exposure, sharpness, framing


def _levels(change):
    """A change of float grey levels in [0, 1] as one of uint8 images."""
    return lambda x: (change(x / 255.0).clip(0, 1) * 255).round().astype(np.uint8)


def _picture(change):
    """A change of square PIL images as one of uint8 arrays."""
    return lambda x: np.asarray(change(Image.fromarray(x)))


def _jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=15)
    return Image.open(buffer)


def _coarser(factor):
    def shrink_and_enlarge(image):
        size, small = image.size, (round(image.size[0] * factor),) * 2
        return image.resize(small, Image.Resampling.BILINEAR).resize(size, Image.Resampling.BILINEAR)

    return shrink_and_enlarge


def _cut_out(*box):
    def enlarge_part(image):
        part = [fraction * image.size[0] for fraction in box]  # left, top, right, bottom
        return image.resize(image.size, Image.Resampling.BILINEAR, box=part)

    return enlarge_part


def _wider(image):
    side = image.size[0]
    canvas, height = Image.new("L", (side, side)), round(0.85 * side)
    canvas.paste(image.resize((side, height), Image.Resampling.BILINEAR), (0, (side - height) // 2))
    return canvas


def corruptions():
    """{name: uint8 [S, S] -> uint8 [S, S]}: fixed changes of exposure, sharpness, noise, compression and
    framing.

    The noise is drawn anew for each image, from seed 0 at every call of this function."""
    rng = np.random.default_rng(0)
    return {
        "darker": _levels(lambda x: x - 0.15),
        "brighter": _levels(lambda x: x + 0.15),
        "flatter": _levels(lambda x: (x - x.mean()) * 0.6 + x.mean()),
        "harder": _levels(lambda x: (x - x.mean()) * 1.5 + x.mean()),
        "gamma 0.6": _levels(lambda x: x**0.6),
        "gamma 1.6": _levels(lambda x: x**1.6),
        "noise": _levels(lambda x: x + rng.normal(0, 0.06, x.shape)),
        "jpeg 15": _picture(_jpeg),
        "blur": _picture(_coarser(0.35)),
        "coarse": _picture(_coarser(0.2)),
        "crop and shift": _picture(_cut_out(0.1, 0.04, 0.96, 0.9)),
        "zoom": _picture(_cut_out(0.1, 0.1, 0.9, 0.9)),
        "wider": _picture(_wider),
    }


# ---------------------------------------------------------------- borders and lungs


def framed(images, others):
    """Images uint8 [N, S, S] with the border, an eighth of the side, of `others` of the same shape."""
    own, border = (torch.from_numpy(np.array(x)).unsqueeze(1) / 255 for x in (images, others))
    changed = borrow_frame(own, border, torch.full((len(images),), BORDER))
    return changed.mul_(255).round_().byte().squeeze(1).numpy()


def greyed(images, masks):
    """Images uint8 [N, S, S] with one grey where `masks`, bool [N, S, S], is True."""
    return np.where(masks, np.uint8(round(255 * GREY)), images)


def donors(patients, allowed, rng):
    """For each of N images another one, of another patient, drawn at random: int64 [N].

    `patients`: [N] names; `allowed`: function: position -> bool [N], who may give. -1 where nobody can."""
    patients, drawn = np.asarray(patients), []
    for i, patient in enumerate(patients):
        could = np.flatnonzero(allowed(i) & (patients != patient))
        drawn.append(rng.choice(could) if len(could) else -1)
    return np.array(drawn, np.int64)
