"""What of an image a model is shown: the lungs' box, the lungs, or everything but them. And a heuristic that
finds lungs without a network.
"""

import numpy as np
import torch
import torch.nn.functional as F

from lungs.unet import LEAST, MOST, SIDE, lung_sized

INPUT_MODES = ("full", "crop", "masked", "masked-crop", "outside")  # what a model can be shown of an image
DARK = 16  # a grey level; black is not above it
CUT = 0.45  # an image with less than this share above DARK may show lungs alone, on black
FILL = 3, 4  # lungs fill less of their bounding box than this share; a chest with a black border fills more
ROUNDS, SHORTEN = 8, 5  # of `regions`
MARGIN = 0.05  # around the lungs' box, as a share of its sides
GREY = 0.5  # what is put in the place of the pixels that a model does not see


# ---------------------------------------------------------------- without training


def heuristic_mask(image):
    """A chest radiograph uint8 [S, S] -> bool [S, S], True on the lung fields, as far as grey levels tell.

    After adaptive histogram equalisation (CLAHE, Zuiderveld 1994) and smoothing: the largest region on either
    side of the middle that is darker than Otsu's threshold (Otsu 1979, doi:10.1109/TSMC.1979.4310076), the
    outer part of the image left out; closed, and made convex, as what lies over a lung is bright. All False
    where nothing is left.
    """
    from skimage import exposure, filters, measure, morphology  # slow to import, seldom needed
    from skimage.transform import resize

    small = resize(image / 255.0, (SIDE, SIDE), anti_aliasing=True)
    smooth = filters.gaussian(exposure.equalize_adapthist(small, clip_limit=0.06), SIDE / 85)
    down, across = np.mgrid[0 : 1 : SIDE * 1j, 0 : 1 : SIDE * 1j]
    window = (across > 0.1) & (across < 0.9) & (down > 0.08) & (down < 0.85)
    dark = window & (smooth < filters.threshold_otsu(smooth[window]))
    regions = measure.label(morphology.opening(dark, morphology.disk(2)))
    large = [r for r in measure.regionprops(regions) if r.area > 0.01 * SIDE * SIDE]
    mask = np.zeros((SIDE, SIDE), bool)
    for side in (0, 1):
        here = [r for r in large if (r.centroid[1] >= SIDE / 2) == side]
        if here:
            lung = morphology.closing(regions == max(here, key=lambda r: r.area).label, morphology.disk(5))
            mask |= morphology.convex_hull_image(lung)
    return resize(mask.astype(np.float64), image.shape) > 0.5


# ---------------------------------------------------------------- what a model is shown


def boxes(masks):
    """The lungs' boxes with a margin: masks float (B, 1, S, S), 0 or 1 -> (B, 4): left, top, right, bottom as
    fractions of the side. Half a percent of the mask's area is left out on either side, so that a stray spot
    moves no edge; the whole image where the mask is empty."""
    side, edges = masks.shape[-1], []
    at = torch.arange(side, device=masks.device, dtype=masks.dtype)
    for axis in (2, 3):  # sums over rows: from left to right; over columns: from top to bottom
        along = masks.sum(axis)[:, 0]  # (B, S)
        share = along / along.sum(1, keepdim=True).clamp(min=1)
        inside = (share.cumsum(1) > 0.005) & (share.cumsum(1) - share < 0.995)
        low = torch.where(inside, at, torch.full_like(at, side)).amin(1)
        high = torch.where(inside, at + 1, torch.zeros_like(at)).amax(1)
        edges.append((low / side, high / side))
    (left, right), (top, bottom) = edges
    box = torch.stack([left, top, right, bottom], dim=1)
    room = MARGIN * torch.stack([left - right, top - bottom, right - left, bottom - top], dim=1)
    whole = box.new_tensor([0.0, 0.0, 1.0, 1.0]).expand_as(box)
    return torch.where((right > left).unsqueeze(1), (box + room).clamp(0, 1), whole)


def crop(x, box):
    """Images (B, C, S, S) cut to boxes (B, 4), see `boxes`, and enlarged to (B, C, S, S) again, bilinear."""
    left, top, right, bottom = box.unbind(1)
    zero = torch.zeros_like(left)
    theta = torch.stack(
        [
            torch.stack([right - left, zero, left + right - 1], 1),  # the grid spans [-1, 1]
            torch.stack([zero, bottom - top, top + bottom - 1], 1),
        ],
        dim=1,
    )  # (B, 2, 3)
    return F.grid_sample(
        x, F.affine_grid(theta, x.shape, align_corners=False), padding_mode="border", align_corners=False
    )


def already_cut(image):
    """The mask of an image that shows lungs alone on black, as some published sets do: uint8 [S, S] -> bool
    [S, S], or None for any other image. The U-Net, which has seen whole chests only, takes such black for
    air.

    A whole chest with a wide black border is told by its bounding box, which it fills."""
    from scipy.ndimage import label

    lit = image > DARK
    edge = max(1, image.shape[0] // 32)
    frame = np.ones_like(lit)
    frame[edge:-edge, edge:-edge] = False
    if lit[frame].mean() > 0.1 or not LEAST < lit.mean() < CUT:
        return None
    parts, _ = label(lit)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    lungs = (sizes > 0.01 * image.size)[parts]  # markers beside the lungs are smaller
    down, across = np.flatnonzero(lungs.any(1)), np.flatnonzero(lungs.any(0))
    box = (np.ptp(down) + 1) * (np.ptp(across) + 1) if len(down) else 0
    return lungs if plausible(lungs) and FILL[1] * lungs.sum() < FILL[0] * box else None


def most(share, whole, below=False):
    """The greatest count c with c / whole <= share (`below`: < share), to the last digit."""
    count = int(share * whole) + 1
    while count / whole > share or below and count / whole == share:
        count -= 1
    return count


def already_cut_in_graph(image):
    """`already_cut` without loops over images or data, for an exported graph, and exactly equal to it.

    image: grey levels, float (B, 1, S, S), whole numbers from 0 to 255. Returns (masks float (B, 1, S, S);
    which images are cut already, to which alone the masks apply, bool (B, 1, 1, 1); which may be, but their
    regions are not settled (see `regions`), bool (B, 1, 1, 1))."""
    lit = image[:, 0] > DARK  # (B, S, S)
    side = lit.shape[-1]
    whole, edge = side * side, max(1, side // 32)
    inner = lit[:, edge : side - edge, edge : side - edge]
    area = lit.sum((1, 2))
    in_frame = area - inner.sum((1, 2))
    frame = whole - (side - 2 * edge) ** 2
    region, settled = regions(lit)
    counts = torch.zeros_like(region).scatter_add(1, region, lit.flatten(1).to(region.dtype))
    large = counts.gather(1, region) > int(0.01 * whole)  # markers beside the lungs are smaller
    masks = lit.flatten(1) & large
    kept = masks.sum(1)
    cut = (
        (in_frame <= most(0.1, frame)) & (area > most(LEAST, whole)) & (area <= most(CUT, whole, below=True))
    )
    lungs = cut & (kept > most(LEAST, whole)) & (kept <= most(MOST, whole, below=True))
    masks = masks.view_as(lit)
    lungs = lungs & (FILL[1] * kept < FILL[0] * _extent(masks, 1) * _extent(masks, 2))
    masks = masks.unsqueeze(1).to(image.dtype)
    return masks, lungs.view(-1, 1, 1, 1), (cut & ~settled).view(-1, 1, 1, 1)


def _extent(masks, axis):
    """How many rows (axis 1) or columns (2) the bounding boxes of masks bool (B, S, S) have: int64 (B,)."""
    there = masks.long().amax(3 - axis) > 0  # (B, S)
    side = masks.shape[-1]
    at = torch.arange(side, device=masks.device).expand_as(there)
    return torch.where(there, at + 1, 0).amax(1) - torch.where(there, at, side).amin(1)


def regions(lit):
    """The connected regions (by edges) of bool (B, S, S), for a graph without loops -> (int64 (B, S * S): of
    every lit pixel the number of its region, the position of one of its pixels, and of every other pixel its
    own; which images are settled, bool (B,)).

    Every round hooks each region to the lowest number beside it and shortens the chains (Shiloach and Vishkin
    1982, J. Algorithms 3). Spirals and labyrinths of 224 px are settled after 5 of the ROUNDS."""
    B, S, _ = lit.shape
    whole, flat = S * S, lit.flatten(1)
    number = torch.arange(whole, device=lit.device).expand(B, whole)
    for _ in range(ROUNDS):
        best = torch.where(flat, torch.minimum(number, _beside(lit, number)), number)
        number = number.scatter_reduce(1, number, best, "amin")
        for _ in range(SHORTEN):
            number = number.gather(1, number)
    settled = (~flat | (number <= _beside(lit, number))).all(1)
    return number, settled


def _beside(lit, number):
    """The lowest number of a lit neighbour, int64 (B, S * S); S * S where there is none."""
    S = lit.shape[-1]
    shown = torch.where(lit.flatten(1), number, S * S).view_as(lit)
    padded = F.pad(shown, (1, 1, 1, 1), value=S * S)
    upright = torch.minimum(padded[:, :-2, 1:-1], padded[:, 2:, 1:-1])
    across = torch.minimum(padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])
    return torch.minimum(upright, across).flatten(1)


def plausible(masks):
    """Which masks, bool [..., S, S], can be lungs by their area: bool [...]."""
    return lung_sized(masks.mean(axis=(-2, -1)))


def show(grey, masks, input_mode):
    """What a model is shown: grey (B, 1, S, S) in [0, 1] and lung masks of the same shape, 0 or 1 -> (B, 1 or
    2, S, S); the second channel is 1 where the model may look (see `cover`).

    input_mode: one of INPUT_MODES; "pair" leaves the image and gives the mask itself. An image without
    plausible lungs is shown as it is."""
    if input_mode == "full":
        return grey
    if input_mode == "pair":
        return torch.cat([grey, masks], 1)
    plausible_ones = lung_sized(masks.mean(dim=(1, 2, 3), keepdim=True)).to(grey.dtype)
    lungs = masks * plausible_ones
    if input_mode == "outside":
        may_look = 1 - lungs
    else:
        may_look = lungs + (1 - plausible_ones)
    pair = torch.cat([grey, may_look], 1)
    if input_mode in ("crop", "masked-crop"):
        pair = crop(pair, boxes(lungs))
    if input_mode == "crop":
        return pair[:, :1]
    return pair


def cover(shown):
    """What `show` gives -> grey (B, 1, S, S) with all that the model may not see in one grey."""
    return shown[:, :1] if shown.shape[1] == 1 else GREY + (shown[:, :1] - GREY) * shown[:, 1:]
