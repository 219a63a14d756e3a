"""The pictures of the report, from the functions of plots.py. No torch.

A drawing function takes Entries and their styles and returns (figure, title)."""

import itertools
from pathlib import Path

import matplotlib

from common.files import save_figure
from common.scaling import SIDES
from records.curves import COLOURS, DASHES, GREY, draw_training, finish, label, panels
from report import plots
from report.cells import alone
from report.render import Image

matplotlib.use("Agg")

# What each picture shows, after its title in the report.
SHOWN = {
    "training": "Of each epoch; the dot is the epoch that was kept",
    "pr": "Circle: @Rec, square: @0.5 (it covers the circle where both are the same), dotted line: recall "
    "floor, grey line: the prevalence, which is the precision of a model that knows nothing",
    "confusion": "Each percentage is a share of its row",
    "scores": "Share of each class by score, on a logarithmic axis; what lies right of the dashed threshold "
    "is called sick",
    "reliability": "Images sorted by score, in bins of equal size: a bin's share of the sick against its "
    "mean score, before and after scaling. On the thin diagonal scores are probabilities",
    "decision": "Net benefit is the share of true positives less that of false positives, weighted by the "
    "odds of the threshold probability (Vickers and Elkin 2006). A model helps where its curve is above both "
    "grey and black line. Scores are scaled to probabilities here, whether or not the run uses that, so the "
    "circle, @Rec, stands at the probability that its threshold means",
}


def drawings(entries):
    """{name of the file: drawing function} for the task of these Entries. What looks at one finding's scores
    and decisions is drawn of an only finding: of fourteen it would fill pages."""
    functions = {"training": draw_training, "roc": draw_roc}
    if alone(entries):
        functions |= {"pr": draw_pr, "confusion": draw_confusion, "scores": draw_scores}
        return functions | {"reliability": draw_reliability, "decision": draw_decision}
    functions["auroc"] = draw_findings
    if "confusion" in entries[0].summary["test"]:
        functions["confusion"] = draw_class_confusion
    return functions


def styles_of(view):
    """{Entry: keywords of Axes.plot}: one colour a model through the whole report; its seeds differ in the
    dashes. Of more models than there are colours, those that remain are coloured, the others grey, and
    so are members of ensembles, which only the training curves show, unless colours are left for all."""
    coloured = [c for s in view.standings for c in s.candidates]
    if len(coloured) > len(COLOURS):
        coloured = view.remaining[: len(COLOURS)]
    styles = {e: {"color": GREY, "linestyle": "-", "lw": 0.9, "zorder": 1} for e in view.entries}
    for colour, candidate in zip(COLOURS, coloured):
        for k, e in enumerate((*candidate.entries, *candidate.again)):
            styles[e] = {"color": colour, "linestyle": DASHES[k % len(DASHES)], "zorder": 2}
    # Training curves of members could not be told apart in one grey: those of one recipe share a colour.
    recipes = {}
    for e in view.entries:
        if styles[e]["color"] == GREY:
            recipes.setdefault(e.family, []).append(e)
    if len(coloured) + len(recipes) <= len(COLOURS):
        for colour, seeds in zip(COLOURS[len(coloured) :], recipes.values()):
            for k, e in enumerate(seeds):
                styles[e] |= {"color": colour, "linestyle": DASHES[k % len(DASHES)]}
    return styles


def draw_all(view, folder, stem):
    """Write every plot of one test set to folder/stem-*.png -> {name: Image}.

    Training curves are of all Entries that were trained (View.trained). Curves are of those shown; what has a
    panel a model is of those in detail."""
    mark, written, styles = " [SYNTHETIC]" if view.entries[0].synthetic else "", {}, styles_of(view)
    for name, draw in drawings(view.entries).items():
        drawn = view.detailed
        if name in ("roc", "pr", "decision"):
            drawn = view.shown
        if name == "training":
            drawn = view.trained
        if not drawn:
            continue
        figure, title = draw(drawn, [styles[e] for e in drawn])
        figure.suptitle(label(f"{title} - {view.entries[0].set}{mark}", 60), fontsize=11)
        path = Path(folder, f"{stem}-{name}.png")
        dpi = min(130, 60_000 / max(figure.get_size_inches()))  # a PNG has at most 65,535 px a side
        save_figure(path, figure, dpi)
        shown = f". {SHOWN[name]}." if name in SHOWN else ""
        written[name] = Image(path, title + mark + shown)
    return written


def draw_roc(entries, styles):
    """Test ROC curves with their operating points, a panel a finding."""
    first, by_entry = entries[0], dict(zip(entries, styles))
    findings = [f for f in first.findings if any("test" in e.calibrated[f]["curves"] for e in entries)]
    names, size = [label(e.name, 110) for e in entries], (3.1, 3.1)
    if alone(entries):  # a large panel, and room for the AUROC in the legend
        names, size = [plots.curve_name(e, first.findings[0], "auroc") for e in entries], (6.4, 5.4)
    figure, axes = panels(len(findings), *size, columns=4, names=names)
    for ax, finding in zip(axes, findings):
        plots.roc(ax, entries, finding, by_entry)
        if not alone(entries):
            add_aurocs(ax, entries, finding)
    finish(figure, axes[: len(findings)])
    squares = ", square: @0.5" if alone(entries) else ""
    return figure, f"ROC on test; circle: @Rec{squares}, dotted line: recall floor"


def add_aurocs(ax, entries, finding):
    """The AUROCs of the first models in the title; the legend, of all panels, names models alone."""
    of_curve = {plots.curve_name(e, finding, "auroc"): label(e.name, 110) for e in entries}
    for line in ax.get_lines():  # of a curve, or of its point
        line.set_label(of_curve.get(line.get_label(), line.get_label()))
    known = [e.calibrated[finding]["curves"] for e in entries if "test" in e.calibrated[finding]["curves"]]
    shown = ", ".join(f"{curves['test']['auroc']['value']:.3f}" for curves in known[:3])
    if len(known) > 3:
        shown += " ..."
    ax.set_title(f"{ax.get_title()}\nAUROC {shown}")
    ax.tick_params(labelsize=7)


def draw_pr(entries, styles):
    """Test precision-recall curves with both operating points."""
    names = [plots.curve_name(e, e.findings[0], "auprc") for e in entries]
    figure, (ax,) = panels(1, 6.4, 5.4, names=names)
    plots.precision_recall(ax, entries, styles=dict(zip(entries, styles)))
    ax.set_title(f"{ax.get_title()}\ncircle: @Rec, square: @0.5, dotted line: recall floor")
    finish(figure, [ax])
    return figure, "Precision and recall on test"


def draw_decision(entries, styles):
    """Decision curves."""
    names = [label(e.name) for e in entries] + ["treat everybody", "treat nobody"]
    figure, (ax,) = panels(1, 6.4, 4.4, names=names)
    plots.decision(ax, entries, styles=dict(zip(entries, styles)))
    finish(figure, [ax])
    return figure, "Decision curve on test"


def draw_confusion(entries, styles):
    """Test confusion matrices @Rec and @0.5."""
    figure, axes = panels(2 * len(entries), 2.5, 2.2, columns=4)
    every = itertools.product(zip(entries, styles), ("at_rec", "at_0.5"))
    for ax, ((e, style), point) in zip(axes, every):
        plots.confusion(ax, e, point=point, colour=style["color"])
    return figure, "Confusion matrices on test (rows: truth, columns: decision)"


def draw_class_confusion(entries, styles):
    """K x K confusion matrices of the most probable class."""
    # Panels grow with the number of classes, or the counts in them could not be read.
    side = max(2.8, 0.6 * len(entries[0].task.classes) + 1.2)
    figure, axes = panels(len(entries), side, side * 0.9)
    for ax, e, style in zip(axes, entries, styles):
        plots.class_confusion(ax, e, style["color"])
    return figure, "Confusion matrices on test (rows: truth, columns: most probable class)"


def draw_scores(entries, styles):
    """Histograms of the scores, validation beside test."""
    figure, axes = panels(2 * len(entries), 5.2, 2.7)
    for ax, ((e, style), side) in zip(axes, itertools.product(zip(entries, styles), SIDES)):
        plots.scores(ax, e, side=side, colour=style["color"])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure, "Scores on validation and test"


def draw_reliability(entries, styles):
    """Reliability, validation beside test."""
    figure, axes = panels(2 * len(entries), 4.4, 3.2)
    for ax, ((e, style), side) in zip(axes, itertools.product(zip(entries, styles), SIDES)):
        plots.reliability(ax, e, side=side, colour=style["color"])
    return figure, "Reliability on validation and test"


def draw_findings(entries, styles):
    """AUROC on validation and test, a panel a model, a line a finding."""
    figure, axes = panels(len(entries), 5.6, 0.28 * len(entries[0].findings) + 1.4)
    for ax, e, style in zip(axes, entries, styles):
        plots.findings(ax, e, style["color"])
    # One scale for all models, or the panels could not be compared.
    least = min(ax.get_xlim()[0] for ax in axes[: len(entries)])
    for ax in axes[: len(entries)]:
        ax.set_xlim(least, 1.01)
    return figure, "AUROC of every finding, validation and test"
