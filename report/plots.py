"""The pictures of the report. No torch.

A drawing function takes Entries and returns (figure, caption)."""

import itertools
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)
import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from common import scaling
from common.files import atomic_path
from common.scaling import SIDES
from metrics import net_benefit
from records.curves import COLOURS, FILLS, draw_training, finish, label, line_style, panels
from report.cells import alone, points, span
from report.rows import POINTS

matplotlib.use("Agg")
MARKERS = {"at_rec": "o", "at_0.5": "s"}


def drawings(entries):
    """{name of the file: drawing function} for the task of these entries. What looks at one finding's scores
    and decisions is drawn of an only finding: of fourteen it would fill pages."""
    functions = {"training": draw_training, "roc": draw_roc}
    if alone(entries):
        functions |= {"pr": draw_pr, "confusion": draw_confusion, "scores": draw_scores}
        return functions | {"reliability": draw_reliability, "decision": draw_decision}
    functions["auroc"] = draw_shift
    if "confusion" in entries[0].summary["test"]:
        functions["confusion"] = draw_class_confusion
    return functions


def draw_all(entries, shown, folder, stem):
    """Write every plot of one test set to folder/stem-*.png -> [(path, caption)].

    Training curves are of all `entries`, the others of the `shown` ones."""
    trained = [e for e in entries if len(e.results["history"]) > 1 and not e.suffix]
    mark, written = " [SYNTHETIC]" if entries[0].synthetic else "", []
    for name, draw in drawings(entries).items():
        drawn = trained if name == "training" else shown
        if not drawn:
            continue
        figure, caption = draw(drawn)
        figure.suptitle(label(f"{caption} - {entries[0].set}{mark}", 60), fontsize=11)
        path = Path(folder, f"{stem}-{name}.png")
        dpi = min(130, 60_000 / max(figure.get_size_inches()))  # a PNG has at most 65,535 px a side
        with atomic_path(path) as tmp:
            figure.savefig(tmp, dpi=dpi)
        plt.close(figure)
        written.append((path, caption + mark))
    return written


def mark_points(ax, entry, finding, x, y, i):
    """The operating points in the colour of curve i; from the sixth on half of the mark is white."""
    style = dict(color=line_style(i)["color"], fillstyle=FILLS[i // 5 % 5], markerfacecoloralt="white")
    for point in points([entry]):
        row = entry.row(finding, "test", point)
        if point in MARKERS and row:
            ax.plot(x(row), y(row), MARKERS[point], markeredgecolor="black", markersize=7, **style)


def draw_roc(entries):
    """Test ROC curves with their operating points, a panel a finding."""
    first, names, size = entries[0], [label(e.name, 110) for e in entries], (3.1, 3.1)
    findings = [f for f in first.findings if any("test" in e.calibrated[f]["curves"] for e in entries)]
    if alone(entries):  # a large panel, and room for the AUROC in the legend
        spans = [span(e.calibrated[first.findings[0]]["curves"]["test"]["auroc"]) for e in entries]
        names = [label(f"{e.name}: AUROC {text}", 96) for e, text in zip(entries, spans)]
        size = (6.4, 5.4)
    figure, axes = panels(len(findings), *size, columns=4, names=names)
    for ax, finding in zip(axes, findings):
        roc_panel(ax, finding, entries, names)
    finish(figure, axes[: len(findings)])
    squares = ", square: @0.5" if alone(entries) else ""
    return figure, f"ROC on test; circle: @Rec{squares}, dotted line: recall floor"


def roc_panel(ax, finding, entries, names):
    """The curves of one finding."""
    aurocs = []
    for i, (e, name) in enumerate(zip(entries, names)):
        test, curves = e.column(finding, "test"), e.calibrated[finding]["curves"]
        if "test" not in curves:
            ax.plot([], [], label=name, **line_style(i))
            continue
        fpr, tpr, _ = roc_curve(test.truth, test.scores)
        ax.plot(fpr, tpr, label=name, **line_style(i))
        mark_points(ax, e, finding, lambda r: 1 - r["specificity"], lambda r: r["recall"], i)
        aurocs.append(f"{curves['test']['auroc']['value']:.3f}")
    ax.plot([0, 1], [0, 1], color="0.7", lw=0.8)
    for floor in {e.min_recall for e in entries}:
        ax.axhline(floor, color="0.4", lw=0.8, ls=":")
    shown = ", ".join(aurocs[:3])
    if len(aurocs) > 3:
        shown += " ..."
    count = f"{test.truth.sum()} of {len(test.truth)} {entries[0].unit}"
    ax.set(title=f"{label(finding, 30)} ({count})\nAUROC {shown}")
    ax.set(xlabel="1 - specificity", ylabel="recall (sensitivity)")
    ax.tick_params(labelsize=7)


def draw_pr(entries):
    """Test precision-recall curves with both operating points."""
    (finding,) = entries[0].findings
    spans = [span(e.calibrated[finding]["curves"]["test"]["auprc"]) for e in entries]
    names = [label(f"{e.name}: AUPRC {text}", 96) for e, text in zip(entries, spans)]
    figure, (ax,) = panels(1, 6.4, 5.4, names=names)
    for i, (e, name) in enumerate(zip(entries, names)):
        test = e.column(finding, "test")
        precision, recall, _ = precision_recall_curve(test.truth, test.scores)
        ax.plot(recall, precision, label=name, **line_style(i))
        mark_points(ax, e, finding, lambda r: r["recall"], lambda r: r["precision"], i)
    prevalence = test.truth.mean()
    ax.axhline(prevalence, color="0.7", lw=0.8)
    for floor in {e.min_recall for e in entries}:
        ax.axvline(floor, color="0.4", lw=0.8, ls=":")
    count = f"n = {len(test.truth)} test {entries[0].unit}, prevalence {prevalence:.2f} (grey line)"
    title = f"{count}\ncircle: @Rec, square: @0.5, dotted line: recall floor"
    low = min(0.5, prevalence - 0.05)
    ax.set(xlabel="recall (sensitivity)", ylabel="precision", ylim=(low, 1.01), title=title)
    finish(figure, [ax])
    return figure, "Precision and recall on test"


def draw_confusion(entries):
    """Test confusion matrices, a row per entry, @Rec and @0.5."""
    (finding,) = entries[0].findings
    figure, axes = panels(2 * len(entries), 4.2, 3.3)
    for ax, (e, point) in zip(axes, itertools.product(entries, ("at_rec", "at_0.5"))):
        row = e.row(finding, "test", point)
        counts = np.array([[row["tn"], row["fp"]], [row["fn"], row["tp"]]])
        draw_matrix(ax, counts, [label(name, 12) for name in (e.absent(finding), finding)])
        title = label(f"{e.name} {POINTS[point]}", 42)
        title += f"\nn = {counts.sum()}, threshold {row['thr']:.4f}"
        ax.set(xlabel="decision", ylabel="truth", title=title)
        ax.tick_params(labelsize=8)
        ax.title.set_fontsize(9)
    return figure, "Confusion matrices on test"


def draw_matrix(ax, counts, classes, **style):
    """Counts [K, K], rows the truth; shade and text: share of the true class. `style`: of the text."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    for i, j in itertools.product(range(len(classes)), repeat=2):
        colour = "white" if shares[i, j] > 0.6 else "black"
        text = f"{counts[i, j]}\n{shares[i, j]:.1%}"
        ax.text(j, i, text, ha="center", va="center", color=colour, **style)
    ticks = range(len(classes))
    ax.set(xticks=ticks, yticks=ticks, xticklabels=classes, yticklabels=classes)


def draw_scores(entries):
    """Histograms of the scores by class, validation beside test, with the threshold."""
    (finding,) = entries[0].findings
    figure, axes = panels(2 * len(entries), 5.2, 2.7)
    bins = np.linspace(0, 1, 41)
    filled = dict(histtype="stepfilled", color="#9ecae1", edgecolor="#3182bd")
    outline = dict(histtype="step", color="#a63603", lw=1.6)
    for ax, (e, side) in zip(axes, itertools.product(entries, SIDES)):
        column, row = e.column(finding, side), e.row(finding, side, "at_rec")
        for k, name, style in ((0, e.absent(finding), filled), (1, finding, outline)):
            # Per cent of the class: the sick outnumber the healthy, or are outnumbered by them.
            scores = column.scores[column.truth == k]
            weights = np.full(len(scores), 100 / len(scores))
            ax.hist(scores, bins, weights=weights, label=label(name, 30), **style)
        ax.axvline(row["thr"], color="black", ls="--", lw=1, label="threshold @Rec")
        sizes = f"{(column.truth == 0).sum()} + {column.truth.sum()}"
        figures = f"recall {row['recall']:.3f}, specificity {row['specificity']:.3f} @Rec {row['thr']:.3f}"
        title = f"{label(e.name, 66)}\n{SIDES[side]}, n = {sizes}: {figures}"
        ax.set(xlabel=label(f"score for {finding}", 60), ylabel="% of the class (log scale)", title=title)
        ax.set(ylim=(0.1, 120), yscale="log", yticks=(0.1, 1, 10, 100), yticklabels=("0.1", "1", "10", "100"))
        ax.title.set_fontsize(8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure, "Scores on validation and test"


def draw_reliability(entries):
    """Share of positives against mean score in bins of equal size, before and after the fitted scaling."""
    (finding,) = entries[0].findings
    figure, axes = panels(2 * len(entries), 4.4, 3.6)
    styles = {
        "before": dict(color="#0072B2", marker="o"),
        "after": dict(color="#D55E00", marker="^", ls="--"),
    }
    for ax, (e, side) in zip(axes, itertools.product(entries, SIDES)):
        ax.plot([0, 1], [0, 1], color="0.7", lw=0.8)
        name = scaling.fitted(e.calibration)
        for when, style in styles.items():
            quality = e.calibrated[finding]["probability"][side][when]
            x, y = ([b[k] for b in quality["bins"]] for k in ("score", "positives"))
            ax.plot(x, y, ms=4, lw=1, label=f"{when} {name}: ECE {quality['ece']:.3f}", **style)
        sizes = " or ".join(str(n) for n in sorted({b["n"] for b in quality["bins"]}))
        title = f"{label(e.name, 56)}\n{SIDES[side]}, {len(quality['bins'])} bins of {sizes} {e.unit}"
        ax.set(xlabel="mean score of the bin", ylabel=label(f"share of {finding}", 30), title=title)
        ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        ax.legend(fontsize=7, loc="best")
        ax.title.set_fontsize(8)
        ax.grid(alpha=0.3)
    return figure, "Reliability"


def draw_decision(entries):
    """Net benefit of acting on the calibrated probability, against treating everybody or nobody."""
    (finding,) = entries[0].findings
    names = [label(e.name) for e in entries] + ["treat everybody", "treat nobody"]
    figure, (ax,) = panels(1, 6.4, 4.4, names=names)
    chances = np.linspace(0.01, 0.95, 95)
    for i, (e, name) in enumerate(zip(entries, names)):
        test = e.column(finding, "test")
        model, everybody = net_benefit(test.truth, test.probabilities, chances)
        lost = np.maximum.accumulate(model < -0.1)  # below the frame: the curve ends there
        ax.plot(chances, np.where(lost, np.nan, model), label=name, **line_style(i))
    ax.plot(chances, everybody, color="0.5", lw=1, label=names[-2])
    ax.axhline(0, color="black", lw=1, label=names[-1])
    prevalence = test.truth.mean()
    count = f"n = {len(test.truth)} test {entries[0].unit}, prevalence {prevalence:.2f}"
    ax.set(ylim=(-0.1, prevalence + 0.05), title=f"{count}; probabilities after scaling")
    ax.set(xlabel="threshold probability", ylabel="net benefit (true positives per image)")
    finish(figure, [ax])
    return figure, "Decision curve on test"


# ---------------------------------------------------------------- several findings


def draw_class_confusion(entries):
    """K x K confusion matrices of the most probable class."""
    classes = [label(name, 14) for name in entries[0].task.classes]
    side = max(4.2, 0.9 * len(classes) + 1.4)
    figure, axes = panels(len(entries), side, side * 0.85)
    for ax, e in zip(axes, entries):
        summary = e.summary["test"]
        counts = np.array(summary["confusion"])
        draw_matrix(ax, counts, classes, fontsize=7)
        ax.tick_params(axis="x", labelrotation=30)
        ax.tick_params(labelsize=7)
        accuracy = summary["accuracy"]["value"]
        ax.set(xlabel="most probable class", ylabel="truth")
        ax.set_title(f"{label(e.name, 50)}\nn = {counts.sum()}, accuracy {accuracy:.3f}", fontsize=9)
    return figure, "Confusion matrices on test"


def draw_shift(entries):
    """AUROC on validation and test, a panel a model, a line a finding."""
    findings = entries[0].findings[::-1]
    figure, axes = panels(len(entries), 5.6, 0.28 * len(findings) + 1.4)
    for ax, e in zip(axes, entries):
        for y, name in enumerate(findings):
            # The legend names each kind of mark once.
            curves, labels = e.calibrated[name]["curves"], {"test": None, "val": None}
            if y == len(findings) - 1:
                labels = {"test": "test, 95% interval", "val": "validation"}
            if "test" in curves:
                auroc = curves["test"]["auroc"]
                ax.plot([auroc["lo"], auroc["hi"]], [y, y], color=COLOURS[0], lw=2, alpha=0.5)
                ax.plot(auroc["value"], y, "o", color=COLOURS[0], label=labels["test"])
            if "val" in curves:
                ax.plot(curves["val"]["auroc"]["value"], y, "x", color=COLOURS[1], label=labels["val"])
        ax.set(yticks=range(len(findings)), yticklabels=[label(n, 24) for n in findings], xlabel="AUROC")
        ax.axvline(0.5, color="0.7", lw=0.8)
        ax.tick_params(labelsize=7)
        ax.set_title(label(e.name, 60), fontsize=9)
        ax.legend(fontsize=7)
    # One scale for all models, or the panels could not be compared.
    least = min(ax.get_xlim()[0] for ax in axes[: len(entries)])
    for ax in axes[: len(entries)]:
        ax.set_xlim(least, 1.01)
    return figure, "AUROC of every finding, validation and test"
