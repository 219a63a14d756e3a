"""The sheets of an audit: typical patients of the worst group, and labels that are likely to be wrong."""

import textwrap

import matplotlib
import matplotlib.pyplot as plt

from common.files import save_figure
from models.map_pictures import drawable

matplotlib.use("Agg")
COLUMNS = 3


def draw_sheet(path, images, texts, title):
    """Write a PNG of images, uint8 [S, S] each, with a text under each. Text is drawn as it is: a dollar sign
    begins no formula."""
    lines = -(-len(images) // COLUMNS)
    with plt.rc_context({"text.parse_math": False}):
        size = (3.0 * COLUMNS, 3.4 * lines + 0.9)
        figure, axes = plt.subplots(lines, COLUMNS, figsize=size, squeeze=False, layout="constrained")
        for ax in axes.flat:
            ax.axis("off")
        for ax, image, text in zip(axes.flat, images, texts):
            ax.imshow(image, cmap="gray", vmin=0, vmax=255)
            ax.set_title(drawable(text), fontsize=8)
        figure.suptitle(textwrap.fill(drawable(title), 30 * COLUMNS), fontsize=10)
        save_figure(path, figure, 110)
