"""Pictures of one thing each, on axes that are given. No torch.

    from report.plots import roc
    from report.rows import Entry
    from records.run import Run
    ax = roc(plt.gca(), [Entry(Run("outputs/pretrained"))])

Each function draws Entries (or one) on a matplotlib Axes and returns it. `finding`: by default the first.
`styles`: {entry: keywords of Axes.plot}, by default a colour each.
"""

import itertools

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from scipy.special import expit, logit
from sklearn.metrics import precision_recall_curve, roc_curve

from calibration.wording import four_digits
from common import scaling
from common.proportions import in_words
from common.scaling import SIDES
from metrics import net_benefit
from records.curves import COLOURS, label, line_style
from report.cells import points
from report.rows import POINTS

MARKERS = {"at_rec": "o", "at_0.5": "s"}


def style_of(entries, entry, styles):
    """The keywords of Axes.plot for an Entry among others."""
    return (styles or {}).get(entry) or line_style(entries.index(entry))


def asked(entries, finding):
    """The finding to draw: the first unless one is named."""
    return entries[0].findings[0] if finding is None else finding


def curve_name(entry, finding, figure):
    """What the legend says of a curve: with its area."""
    curves = entry.calibrated[finding]["curves"]
    if "test" not in curves:
        return label(entry.name, 96)
    return label(f"{entry.name}: {figure.upper()} {in_words(curves['test'][figure])}", 96)


def mark_points(ax, entry, finding, x, y, colour):
    """The operating points of an Entry on test, circle @Rec, square @0.5."""
    for point in points([entry]):
        row = entry.row(finding, "test", point)
        if point in MARKERS and row:
            ax.plot(x(row), y(row), MARKERS[point], markeredgecolor="black", markersize=7, color=colour)


# ---------------------------------------------------------------- several models


def roc(ax, entries, finding=None, styles=None):
    """ROC curves on test with their operating points; dotted: the recall floor."""
    finding = asked(entries, finding)
    for e in entries:
        style, name = style_of(entries, e, styles), curve_name(e, finding, "auroc")
        test = e.column(finding, "test")
        if "test" not in e.calibrated[finding]["curves"]:  # an empty line, so that the legend is complete
            ax.plot([], [], label=name, **style)
            continue
        fpr, tpr, _ = roc_curve(test.truth, test.scores)
        ax.plot(fpr, tpr, label=name, **style)
        mark_points(ax, e, finding, lambda r: 1 - r["specificity"], lambda r: r["recall"], style["color"])
    ax.plot([0, 1], [0, 1], color="0.7", lw=0.8)
    for floor in {e.min_recall for e in entries}:
        ax.axhline(floor, color="0.4", lw=0.8, ls=":")
    ax.set(title=f"{label(finding, 30)}\n({test.truth.sum()} of {len(test.truth)} {entries[0].unit})")
    ax.set(xlabel="1 - specificity", ylabel="recall (sensitivity)")
    return ax


def precision_recall(ax, entries, finding=None, styles=None):
    """Precision and recall on test with the operating points; grey: the prevalence."""
    finding = asked(entries, finding)
    for e in entries:
        style, test = style_of(entries, e, styles), e.column(finding, "test")
        precision, recall, _ = precision_recall_curve(test.truth, test.scores)
        ax.plot(recall, precision, label=curve_name(e, finding, "auprc"), **style)
        mark_points(ax, e, finding, lambda r: r["recall"], lambda r: r["precision"], style["color"])
    # A model that knows nothing has the prevalence as its precision, at every recall.
    prevalence = test.truth.mean()
    ax.axhline(prevalence, color="0.7", lw=0.8)
    for floor in {e.min_recall for e in entries}:
        ax.axvline(floor, color="0.4", lw=0.8, ls=":")
    count = f"n = {len(test.truth)} test {entries[0].unit}, prevalence {prevalence:.2f} (grey line)"
    low = min(0.5, prevalence - 0.05)
    ax.set(xlabel="recall (sensitivity)", ylabel="precision", ylim=(low, 1.01), title=count)
    return ax


def decision(ax, entries, finding=None, styles=None):
    """Net benefit on test of acting on the calibrated probability, against treating everybody or nobody. The
    circle is @Rec: it lies on the curve at the probability that its threshold stands for."""
    finding = asked(entries, finding)
    chances = np.linspace(0.01, 0.95, 95)
    for e in entries:
        style, test = style_of(entries, e, styles), e.column(finding, "test")
        model, everybody = net_benefit(test.truth, test.probabilities, chances)
        lost = np.maximum.accumulate(model < -0.1)  # below the frame: the curve ends there
        ax.plot(chances, np.where(lost, np.nan, model), label=label(e.name), **style)
        if row := e.row(finding, "test", "at_rec"):
            chance = probability_at(test, row["thr"])
            if 0 < chance < 1:
                (benefit,), _ = net_benefit(test.truth, test.probabilities, np.array([chance]))
                ax.plot(chance, benefit, "o", color=style["color"], markeredgecolor="black", markersize=7)
    ax.plot(chances, everybody, color="0.5", lw=1, label="treat everybody")
    ax.axhline(0, color="black", lw=1, label="treat nobody")
    prevalence = test.truth.mean()
    count = f"n = {len(test.truth)} test {entries[0].unit}, prevalence {prevalence:.2f}"
    ax.set(ylim=(-0.1, prevalence + 0.05), title=f"{count}; probabilities after scaling; circle: @Rec")
    ax.set(xlabel="threshold probability", ylabel="net benefit (true positives per image)")
    return ax


def probability_at(column, threshold):
    """The scaled probability that a threshold on the scores stands for: between the images on either side of
    it log-odds are interpolated, of which the scaling of one finding is a straight line (of three and more
    classes it is not). The least probability where all are called sick; 1 where none is."""
    called = column.scores >= threshold
    if not called.any():
        return 1.0
    above = np.flatnonzero(called)[column.scores[called].argmin()]
    if called.all():
        return float(column.probabilities[above])
    below = np.flatnonzero(~called)[column.scores[~called].argmax()]
    ends = [below, above]
    x, y = (logit(np.clip(v[ends], 1e-12, 1 - 1e-12)) for v in (column.scores, column.probabilities))
    at = np.interp(logit(np.clip(threshold, 1e-12, 1 - 1e-12)), x, y)
    return float(expit(at))


# ---------------------------------------------------------------- one model


def pale(colour):
    """A colour map from white to a light shade of a colour."""
    light = tuple(0.45 + 0.55 * part for part in LinearSegmentedColormap.from_list("", [colour] * 2)(0)[:3])
    return LinearSegmentedColormap.from_list("pale", ["white", light])


def confusion(ax, entry, finding=None, point="at_rec", colour=COLOURS[0]):
    """The confusion matrix of a finding on test at an operating point: rows truth, columns decision."""
    finding = asked([entry], finding)
    row = entry.row(finding, "test", point)
    counts = np.array([[row["tn"], row["fp"]], [row["fn"], row["tp"]]])
    matrix(ax, counts, [label(name, 12) for name in (entry.absent(finding), finding)], colour)
    text = f"{POINTS[point]}, threshold {four_digits(row['thr'])}"
    ax.set_title(f"{label(entry.name, 34)}\n{text}", fontsize=7)
    return ax


def class_confusion(ax, entry, colour=COLOURS[0]):
    """The K x K confusion matrix on test: rows truth, columns the most probable class."""
    summary = entry.summary["test"]
    counts = np.array(summary["confusion"])
    matrix(ax, counts, [label(name, 14) for name in entry.task.classes], colour)
    ax.tick_params(axis="x", labelrotation=30)
    accuracy = summary["accuracy"]["value"]
    ax.set_title(f"{label(entry.name, 40)}\nn = {counts.sum()}, accuracy {accuracy:.3f}", fontsize=7)
    return ax


def matrix(ax, counts, classes, colour=COLOURS[0]):
    """Counts [K, K], rows the truth; shade and text: share of the true class."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.imshow(shares, cmap=pale(colour), vmin=0, vmax=1)
    for i, j in itertools.product(range(len(classes)), repeat=2):
        text = f"{counts[i, j]}\n{shares[i, j]:.1%}"
        ax.text(j, i, text, ha="center", va="center", fontsize=7)
    ticks = range(len(classes))
    ax.set(xticks=ticks, yticks=ticks, xticklabels=classes, yticklabels=classes)
    ax.tick_params(labelsize=7)
    return ax


def scores(ax, entry, finding=None, side="test", colour=COLOURS[0]):
    """Histograms of the scores by class on "val" or "test", with the threshold @Rec."""
    finding = asked([entry], finding)
    column, row = entry.column(finding, side), entry.row(finding, side, "at_rec")
    bins = np.linspace(0, 1, 41)
    filled = dict(histtype="stepfilled", color="0.85", edgecolor="0.55")
    outline = dict(histtype="step", color=colour, lw=1.6)
    for k, name, style in ((0, entry.absent(finding), filled), (1, finding, outline)):
        # Per cent of the class: the sick outnumber the healthy, or are outnumbered by them.
        of_class = column.scores[column.truth == k]
        weights = np.full(len(of_class), 100 / len(of_class))
        ax.hist(of_class, bins, weights=weights, label=label(name, 30), **style)
    ax.axvline(row["thr"], color="black", ls="--", lw=1, label="threshold @Rec")
    sizes = f"{(column.truth == 0).sum()} + {column.truth.sum()}"
    figures = f"recall {row['recall']:.3f}, specificity {row['specificity']:.3f} @Rec {row['thr']:.3f}"
    title = f"{label(entry.name, 66)}\n{SIDES[side]}, n = {sizes}: {figures}"
    ax.set(xlabel=label(f"score for {finding}", 60), ylabel="% of the class (log scale)")
    ax.set(ylim=(0.1, 120), yscale="log", yticks=(0.1, 1, 10, 100), yticklabels=("0.1", "1", "10", "100"))
    ax.set_title(title, fontsize=8)
    return ax


def reliability(ax, entry, finding=None, side="test", colour=COLOURS[0]):
    """Share of positives against mean score in bins of equal size, before and after the fitted scaling."""
    finding, name = asked([entry], finding), scaling.fitted(entry.calibration)
    styles = {"before": dict(marker="o", alpha=0.5, ls=":"), "after": dict(marker="^", ls="-")}
    ax.plot([0, 1], [0, 1], color="0.7", lw=0.8)  # where scores are probabilities
    for when, style in styles.items():
        quality = entry.calibrated[finding]["probability"][side][when]
        x, y = ([b[k] for b in quality["bins"]] for k in ("score", "positives"))
        text = f"{when} {name}: ECE {quality['ece']:.3f}"
        ax.plot(x, y, ms=4, lw=1, color=colour, label=text, **style)
    sizes = " or ".join(str(n) for n in sorted({b["n"] for b in quality["bins"]}))
    title = f"{label(entry.name, 56)}\n{SIDES[side]}, {len(quality['bins'])} bins of {sizes} {entry.unit}"
    ax.set(xlabel="mean score of the bin", ylabel=label(f"share of {finding}", 30))
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    ax.set_title(title, fontsize=8)
    ax.legend(fontsize=7, loc="best")
    ax.grid(alpha=0.3)
    return ax


def findings(ax, entry, colour=COLOURS[0]):
    """AUROC of every finding, validation (cross) and test (dot with its 95% interval)."""
    names, labels = entry.findings[::-1], {"test": "test, 95% interval", "val": "validation"}
    for y, name in enumerate(names):
        curves = entry.calibrated[name]["curves"]
        # The legend names each kind of mark once.
        if "test" in curves:
            auroc = curves["test"]["auroc"]
            ax.plot([auroc["lo"], auroc["hi"]], [y, y], color=colour, lw=2, alpha=0.5)
            ax.plot(auroc["value"], y, "o", color=colour, label=labels.pop("test", None))
        if "val" in curves:
            ax.plot(curves["val"]["auroc"]["value"], y, "x", color="black", label=labels.pop("val", None))
        if not curves:
            ax.text(0.5, y, " no figures: too few images", fontsize=6, va="center")
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set(yticks=range(len(names)), yticklabels=[label(n, 24) for n in names], xlabel="AUROC")
    ax.axvline(0.5, color="0.7", lw=0.8)
    ax.tick_params(labelsize=7)
    ax.set_title(label(entry.name, 60), fontsize=9)
    ax.legend(fontsize=7)
    return ax
