"""The README's picture: what one threshold does on validation, and what it does on test.

    python studies/front_picture.py

Reads docs/tables/front_picture.csv, whose rows name the table and the command that each figure comes from, and
writes figures/validation_and_test.png. Takes a second.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from common.cli import Parser
from common.console import InputError, start
from common.files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs/tables/front_picture.csv"
PICTURE = ROOT / "figures/validation_and_test.png"
COLOURS = {"validation": "#9ecae1", "test": "#a63603"}
FLOOR = 95  # % of the sick that the threshold has to find on validation


def read(path):
    """[(model, {side: (% of the sick that are found, % of the healthy that are called sick)})]; InputError
    for a file without the columns, and for a figure outside 0 to 1."""
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            sides = {}
            for side in COLOURS:
                try:
                    recall, specificity = (float(row[f"{name}_{side}"]) for name in ("recall", "specificity"))
                except (KeyError, ValueError) as error:
                    raise InputError(f"{path}: recall and specificity of {side} are missing ({error})")
                if not (0 <= recall <= 1 and 0 <= specificity <= 1):
                    raise InputError(f"{path}, {row['model']}: a figure of {side} lies outside 0 to 1")
                sides[side] = 100 * recall, 100 * (1 - specificity)
            rows.append((row["model"], sides))
    return rows


def draw(rows, path):
    """Two panels with a pair of bars a model: sick people found, and healthy people called sick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 16, "font.family": "DejaVu Sans"}):
        figure, panels = plt.subplots(1, 2, figsize=(13, 5.6), sharey=True, layout="constrained")
        panel_of_bars(panels[0], rows, 0, "Sick children found", 100)
        panel_of_bars(panels[1], rows, 1, "Healthy children called sick", 50)
        panels[0].axvline(FLOOR, color="black", linestyle="--", linewidth=1.5)
        panels[0].text(FLOOR - 1.5, 3.62, f"asked for: {FLOOR}%", ha="right", va="center", fontsize=13)
        panels[0].set_yticks(range(len(rows)), [model for model, _ in rows])
        panels[0].set_ylim(len(rows) - 0.25, -0.55)  # the first model on top
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=16)
        with atomic_path(path) as tmp:
            figure.savefig(tmp, format="png", dpi=100)
        plt.close(figure)


def panel_of_bars(panel, rows, index, title, last):
    """The bars of one figure: on validation above, on test below, each with its per cent beside it; the
    axis is labelled from 0 to `last`."""
    for offset, (side, colour) in zip((-0.19, 0.19), COLOURS.items()):
        values = [sides[side][index] for _, sides in rows]
        places = [number + offset for number in range(len(rows))]
        bars = panel.barh(places, values, 0.36, color=colour, label=f"{side} images")
        panel.bar_label(bars, fmt="%.0f%%", padding=4)
    panel.set_title(title, fontsize=19, fontweight="bold", pad=12)
    ticks = range(0, last + 1, last // 5)
    panel.set_xlim(0, 1.12 * last)
    panel.set_xticks(ticks, [f"{tick}%" for tick in ticks])
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right"]].set_visible(False)


def main():
    Parser(__doc__).parse_args()
    draw(read(TABLE), PICTURE)
    print(f"wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    start(main)
