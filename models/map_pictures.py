"""Maps drawn beside the images they explain, as PNG files. No model is run here."""

import itertools
import textwrap
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

from common.files import save_figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)


def picture_names(files):
    """A file name for the picture of each image: its stem, with -2, -3, ... where that is taken already.

    Upper and lower case count as the same, as they do on some systems; sheet.png is taken."""
    taken, names = {"sheet"}, []
    for stem in (Path(file).stem for file in files):
        tries = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        names.append(next(name for name in tries if name.casefold() not in taken))
        taken.add(names[-1].casefold())
    return [f"{name}.png" for name in names]


def draw(path, rows, methods, title):
    """Write `rows` (see Explainer.row) as a PNG: each image, its maps, and the first map laid over the image
    and the outline of the lungs.

    methods: names of the maps. Text is drawn as it is: a dollar sign begins no formula."""
    lines, columns = len(rows), 2 + len(methods)
    with plt.rc_context({"text.parse_math": False}):
        size = (2.6 * columns + 0.8, 2.75 * lines + 0.8)
        figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        for ax, name in zip(axes[0], ["image", *methods, f"{methods[0]}, lungs outlined"]):
            ax.set_title(name, fontsize=9)
        for line, (text, image, found, mask) in zip(axes, rows):
            line[0].set_ylabel(drawable(text), fontsize=7)
            shown = draw_row(line, image, found)
            if mask.any():
                line[-1].contour(mask, levels=[0.5], colors="cyan", linewidths=0.8)
            else:
                where = dict(ha="center", va="bottom", transform=line[-1].transAxes)
                line[-1].text(0.5, 0.02, "no lungs found", color="white", fontsize=8, **where)
        about = dict(shrink=min(1, 2 / lines), label="relative to the map's own maximum")
        figure.colorbar(shown, ax=axes[:, -1].tolist(), **about)
        figure.suptitle(textwrap.fill(drawable(title), 26 * columns), fontsize=11)
        save_figure(path, figure, 110)


def draw_row(axes, image, grids):
    """Draw an image uint8 [S, S] and its maps [h, w], each relative to its maximum -> the last one drawn."""
    scale = dict(cmap="inferno", vmin=0, vmax=1)
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    for ax in (axes[0], axes[-1]):
        ax.imshow(image, cmap="gray", vmin=0, vmax=255)
    for ax, grid in zip(axes[1:], grids):
        ax.imshow(grid / max(grid.max(), 1e-12), **scale)
        if not grid.any():
            style = dict(color="white", ha="center", va="center", fontsize=8, transform=ax.transAxes)
            ax.text(0.5, 0.5, "no patch speaks\nfor this class", **style)
    first = torch.from_numpy(grids[0])[None, None]
    smooth = F.interpolate(first, size=image.shape, mode="bilinear")[0, 0].numpy()
    return axes[-1].imshow(smooth / max(smooth.max(), 1e-12), alpha=0.45, **scale)


def drawable(text):
    """Text that matplotlib can draw: whatever is not valid Unicode in a file name is escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
