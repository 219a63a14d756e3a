"""Training curves as a picture, and the panels, colours and labels that all pictures share. No torch.

`label` makes any name safe for matplotlib.
"""

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


def finish(figure, axes, legend=True):
    """Small titles, a grid, and the legend of the first panel below all of them."""
    for ax in axes:
        ax.title.set_fontsize(9)
        ax.grid(alpha=0.3)
    if legend:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=7)


def _has_further_terms(results):
    """Whether a run's training loss has terms that its validation loss lacks."""
    recipe = results["recipe"]
    return bool(recipe.get("seg_weight") or recipe.get("attention_weight") or "teacher" in results)


def draw_training(entries, styles=None):
    """Loss and AUROC (or accuracy, if that was watched) per epoch, training beside validation; a dot marks
    the epoch that was kept. Runs that did not record a figure have no line for it. What a hybrid or a teacher
    adds to the loss is in that of training alone. `styles`: how to draw each (default: `line_style`)."""
    styles = styles or [line_style(i) for i in range(len(entries))]
    names = [label(e.name, 110) for e in entries]
    accuracy = all(e.results["recipe"].get("watch") == "accuracy" for e in entries)
    figure_name, word = ("accuracy", "accuracy") if accuracy else ("auroc", "AUROC")
    training_loss = "training loss"
    if any(_has_further_terms(e.results) for e in entries):
        training_loss += " with all its terms"
    keys = {"train_loss": training_loss, "val_loss": "validation loss"}
    keys |= {f"train_{figure_name}": f"training {word}", f"val_{figure_name}": f"validation {word}"}
    figure, axes = panels(4, 4.6, 3.2, names=names)
    for e, name, style in zip(entries, names, styles):
        history, best = e.results["history"], e.results["best_epoch"]
        for ax, key in zip(axes, keys):
            values = [np.nan if epoch.get(key) is None else epoch[key] for epoch in history]
            ax.plot(range(1, len(history) + 1), values, label=name, **style)
            if best:
                ax.plot(best, values[best - 1], "o", color=style["color"])
    for ax, word in zip(axes, keys.values()):
        unit = " (nats)" if "loss" in word else ""
        ax.set(xlabel="epoch", ylabel=word + unit, title=f"{word[0].upper()}{word[1:]}; dot: epoch kept")
        ax.xaxis.get_major_locator().set_params(integer=True)
    finish(figure, axes)
    return figure, "Training curves"
