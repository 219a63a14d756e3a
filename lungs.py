"""Where the lungs lie in a chest radiograph, roughly: a heuristic, not a trained segmentation."""

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.segmentation import clear_border

LEAST, MOST = 0.08, 0.55  # the area of a mask that can be lungs, as a share of the image


def lung_mask(image):
    """A chest radiograph uint8 [S, S] -> bool [S, S], True on the lung fields.

    Lungs are the dark regions that do not touch the edge of the image: darker than Otsu's threshold (Otsu
    1979, doi:10.1109/TSMC.1979.4310076) after smoothing, then closed and filled. If these cover less than 8%
    or more than 55% of the image (opaque lungs, unusual framing), two upright ellipses take their place.
    """
    side = len(image)
    smooth = ndimage.gaussian_filter(image.astype(np.float32), side / 50)
    regions, _ = ndimage.label(smooth < threshold_otsu(smooth))
    mask = ndimage.binary_closing(clear_border(regions) > 0, iterations=max(1, side // 40))
    mask = ndimage.binary_fill_holes(mask)
    return mask if LEAST < mask.mean() < MOST else _ellipses(side)


def _ellipses(side):
    """Two upright ellipses where lungs usually are: bool [side, side]."""
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j]
    across = np.minimum(((x - 0.31) / 0.17) ** 2, ((x - 0.69) / 0.17) ** 2)  # to the nearer of the two
    return across + ((y - 0.47) / 0.33) ** 2 < 1
