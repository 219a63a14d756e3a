"""The pictures of README.md and docs/RESULTS.md that are drawn from tables.

    python studies/pictures.py

Reads docs/tables/front_picture.csv (the README's picture: what one threshold does on validation, and what on
test) and docs/tables/what_the_models_reach.csv (specificity by what a model sees), and writes
figures/validation_and_test.png and figures/lungs_specificity.png. docs/tables/README.md names the data and
the command behind each table. Takes seconds.
"""

import csv
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from common.cli import Parser
from common.console import InputError, start
from common.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
TABLES, FIGURES = ROOT / "docs/tables", ROOT / "figures"
SIDES = {"validation": "#9ecae1", "test": "#a63603"}  # colours
FLOOR = 95  # % of the sick that the threshold has to find on validation
ARMS = ("ViT-Ti/16, probe", "DINOv2 ViT-S/14, probe", "ViT-Ti/16, default", "DINOv2 ViT-S/14, default")
INPUTS = {
    "full": "black",
    "crop": "#e08214",
    "masked": "#7b3294",
    "masked-crop": "#008837",
    "outside": "#999999",
}


def read_table(path):
    """The rows of a CSV file: list of {column: text}."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_sides(path):
    """[(model, {side: (% of the sick that are found, % of the healthy that are called sick)})]; InputError
    for a file without the columns, and for a figure outside 0 to 1."""
    models = []
    for row in read_table(path):
        sides = {}
        for side in SIDES:
            try:
                recall, specificity = float(row[f"recall_{side}"]), float(row[f"specificity_{side}"])
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path}: recall or specificity of {side} is missing ({error})") from None
            if not (0 <= recall <= 1 and 0 <= specificity <= 1):
                raise InputError(f"{path}, {row['model']}: a figure of {side} lies outside 0 to 1")
            sides[side] = 100 * recall, 100 * (1 - specificity)
        models.append((row["model"], sides))
    return models


def read_specificity(path):
    """{(arm, input mode): (specificity, lower, upper)} of the rows with ARMS and INPUTS; InputError where a
    cell is not written as 0.688 [0.623, 0.748], or a row is missing."""
    found = {}
    for row in read_table(path):
        key, cell = (row["arm"], row["--input"]), row["test specificity"]
        if row["arm"] in ARMS and row["--input"] in INPUTS:
            numbers = re.fullmatch(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", cell)
            if not numbers:
                raise InputError(f"{path}, {key}: {cell!r} is no figure with an interval")
            found[key] = tuple(map(float, numbers.groups()))
    missing = [(arm, look) for arm in ARMS for look in INPUTS if (arm, look) not in found]
    if missing:
        raise InputError(f"{path}: no row for {missing}")
    return found


def draw_validation_and_test(models, plt):
    """Two panels with a pair of bars a model: sick people found, and healthy people called sick."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.6), sharey=True, layout="constrained")
    panel_of_bars(panels[0], models, 0, "Sick children found", 100)
    panel_of_bars(panels[1], models, 1, "Healthy children called sick", 50)

    # What was asked for, as a line that the left bars have to reach.
    panels[0].axvline(FLOOR, color="black", linestyle="--", linewidth=1.5)
    panels[0].text(
        FLOOR - 1.5, len(models) - 0.38, f"asked for: {FLOOR}%", ha="right", va="center", fontsize=13
    )

    panels[0].set_yticks(range(len(models)), [model for model, _ in models])
    panels[0].set_ylim(len(models) - 0.25, -0.55)  # the first model on top
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def panel_of_bars(panel, models, index, title, last):
    """The bars of one figure: on validation above, on test below, each with its per cent beside it; the
    axis is labelled from 0 to `last`."""
    for offset, (side, colour) in zip((-0.19, 0.19), SIDES.items()):
        values = [sides[side][index] for _, sides in models]
        places = [number + offset for number in range(len(models))]
        bars = panel.barh(places, values, 0.36, color=colour, label=f"{side} images")
        panel.bar_label(bars, fmt="%.0f%%", padding=4)
    ticks = range(0, last + 1, last // 5)
    panel.set_title(title, fontsize=19, fontweight="bold", pad=12)
    panel.set_xlim(0, 1.12 * last)
    panel.set_xticks(ticks, [f"{tick}%" for tick in ticks])
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right"]].set_visible(False)


def draw_lungs_specificity(found, plt):
    """A dot with its 95% interval for each arm and input mode."""
    figure, panel = plt.subplots(figsize=(13, 6), layout="constrained")
    for place, (look, colour) in enumerate(INPUTS.items()):
        rows = [found[arm, look] for arm in ARMS]
        heights = [number + 0.15 * (place - 2) for number in range(len(ARMS))]
        errors = [[value - lower for value, lower, _ in rows], [upper - value for value, _, upper in rows]]
        values = [value for value, _, _ in rows]
        panel.errorbar(values, heights, xerr=errors, fmt="o", color=colour, label=look, capsize=3)
    panel.set_yticks(range(len(ARMS)), ARMS)
    panel.invert_yaxis()
    panel.set_xlabel("test specificity at the threshold chosen on validation, 95% interval")
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", title="--input", frameon=False)
    return figure


def main():
    Parser(__doc__).parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 16})
    pictures = {
        "validation_and_test.png": (draw_validation_and_test, read_sides(TABLES / "front_picture.csv")),
        "lungs_specificity.png": (
            draw_lungs_specificity,
            read_specificity(TABLES / "what_the_models_reach.csv"),
        ),
    }
    for name, (draw, rows) in pictures.items():
        with atomic_path(FIGURES / name) as tmp:
            draw(rows, plt).savefig(tmp, format="png", dpi=100)
        print(f"wrote figures/{name}")


if __name__ == "__main__":
    start(main)
