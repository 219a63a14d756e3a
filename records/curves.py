"""Training curves as a picture, and the panels, colours and labels that all pictures share. No torch.

`label` makes any name safe for matplotlib.
"""

import itertools
import textwrap

import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)
import numpy as np

from common.console import printable

# Colours that the colour-blind tell apart (Okabe and Ito 2008), the palest last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#999999"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def label(text, width=80):
    """Text for matplotlib, wrapped: `$` starts no formula, and a leading `_` does not hide it from a "
    "legend."""
    text = "\n".join(textwrap.wrap(printable(text), width)).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def panels(count, width, height, columns=2, names=()):
    """A figure of `count` panels, `width` x `height` inches each, and room for a legend of `names` below."""
    columns = min(columns, count)
    rows = -(-count // columns)
    room = 0.17 * sum(len(name.splitlines()) for name in names)
    size = (width * columns, height * rows + 0.4 + room)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat[count:]:
        ax.axis("off")
    return figure, list(axes.flat)


def line_style(i):
    """The style of line i: eight colours, each with five kinds of dashes."""
    return {"color": COLOURS[i % 8], "linestyle": DASHES[(i + i // 8) % 5]}


def finish(figure, axes):
    """Small titles, a grid, and the legend of the first panel below all of them."""
    for ax in axes:
        ax.title.set_fontsize(9)
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=7)


def _has_further_terms(results):
    """Whether a run's training loss has terms that its validation loss lacks."""
    recipe = results["recipe"]
    return bool(recipe.get("seg_weight") or recipe.get("attention_weight") or "teacher" in results)


# The panels of the training curves, column by column: figure, its word, its unit.
FIGURES = (("loss", "loss", " (nats)"), ("accuracy", "accuracy", ""), ("auroc", "AUROC", ""))
SIDES = {"train": "training", "val": "validation"}


def draw_training(entries, styles=None):
    """Loss, accuracy and AUROC an epoch, those of training above those of validation; a dot marks the epoch
    that was kept. A panel says which figure no run has recorded, or how many have not. What a hybrid or a
    teacher adds to the loss is in that of training alone. `styles`: how to draw each (default:
    `line_style`)."""
    styles = styles or [line_style(i) for i in range(len(entries))]
    names = [label(e.name, 110) for e in entries]
    figure, axes = panels(6, 4.2, 3.1, columns=3, names=names)
    further = any(_has_further_terms(e.results) for e in entries)
    for ax, (side, (key, word, unit)) in zip(axes, itertools.product(SIDES, FIGURES)):
        lines = [_values(e, f"{side}_{key}") for e in entries]
        for e, values, name, style in zip(entries, lines, names, styles):
            ax.plot(range(1, len(values) + 1), values, label=name, **style)
            if best := e.results["best_epoch"]:
                ax.plot(best, values[best - 1], "o", color=style["color"])
        title = f"{SIDES[side]} {word}"
        if further and (side, key) == ("train", "loss"):
            title += " with all its terms"
        ax.set(xlabel="epoch", ylabel=title + unit, title=f"{title[0].upper()}{title[1:]}; dot: epoch kept")
        ax.xaxis.get_major_locator().set_params(integer=True)
        _say_missing(ax, lines)
    finish(figure, axes)
    return figure, "Training curves"


def _values(entry, key):
    """A figure of the history, an epoch each; NaN where it was not recorded."""
    return [np.nan if epoch.get(key) is None else epoch[key] for epoch in entry.results["history"]]


def _say_missing(ax, lines):
    """Write into a panel that its figure was not recorded, by any run or by so many."""
    missing = sum(bool(np.isnan(values).all()) for values in lines)
    if not missing:
        return
    text, place = f"not recorded by {missing} of {len(lines)} runs", (0.5, 0.04)
    if missing == len(lines):
        text, place = "not recorded", (0.5, 0.5)
    ax.text(*place, text, transform=ax.transAxes, ha="center", va="center", fontsize=8, color="0.35")
    if missing == len(lines):
        ax.set(xticks=[], yticks=[])
