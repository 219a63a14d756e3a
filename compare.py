"""Turn calibrated runs into one markdown table and plots.

    python compare.py > results.md

Reads results.json, calibration.json and scores.npz of every calibrated run under outputs/ (or --run DIR ...).
Standard output is the markdown alone; PNG plots go to outputs/figures/. Runs on different test sets get tables of
their own. Needs no torch and takes seconds.
"""
import csv
import os
from pathlib import Path

import matplotlib
import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

import common

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

NAMES = {"scratch": "ViT scratch", "linear": "Logistic regression 32x32 px", "ti16": "ViT-Ti/16", "s16": "ViT-S/16",
         "b16": "ViT-B/16", "b32": "ViT-B/32", "l16": "ViT-L/16"}
POINTS = (("at_rec", "@Rec"), ("at_0.5", "@0.5"))
FIGURES = ("acc", "precision", "recall", "specificity", "f1", "auroc")
HEADER = ("Model", "Params (M)", "Time (min)", "Acc", "Prec", "Recall", "Spec", "F1", "AUROC", "Thr")
STYLES = [("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"), ("#555555", (0, (5, 1, 1, 1, 1, 1)))]


class Run:
    """A calibrated run on disk: `results`, `calibration` and `scores`, with a readable `name`."""

    def __init__(self, folder):
        self.results = common.read_results(folder)
        self.calibration = common.read_json(Path(folder, "calibration.json"))
        try:
            with np.load(Path(folder, "scores.npz"), allow_pickle=False) as file:
                self.scores = {k: file[k] for k in file.files}
            self.name = NAMES.get(self.results["model"], self.results["model"])
            self.name += " pretrained" if "weights" in self.results else ""
            if folder.name.removesuffix("-demo") not in ("scratch", "pretrained", "linear"):
                self.name += f" ({folder.name})"
            self.name += " [SYNTHETIC]" if self.results["synthetic"] else ""
            self.group = common.sha256(sorted(self.scores["test_files"].tolist()))
            self.points = {(s, p): self.calibration[s][p] for s in ("val", "test") for p, _ in POINTS}
            self.threshold, self.min_recall = self.calibration["threshold"], self.calibration["min_recall"]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise common.InputError(f"{folder} is damaged or incomplete ({error!r}): run calibrate.py again") from None

    def part(self, split):
        """Labels and scores of "val" or "test"."""
        return self.scores[f"{split}_labels"], self.scores[f"{split}_p1"]


def load_runs(runs_dir, chosen):
    """Calibrated runs, grouped by their test files: {group: [Run, ...]}; InputError if none is calibrated."""
    groups, waiting = {}, []
    for folder in common.find_runs(runs_dir, chosen):
        if not (folder / "calibration.json").exists():
            waiting.append(str(folder))
            continue
        run = Run(folder)
        groups.setdefault(run.group, []).append(run)
    if waiting and groups and not chosen:
        common.say(f"note: not calibrated, so left out: {', '.join(waiting)}; run python calibrate.py")
    elif waiting:
        raise common.InputError(f"not calibrated: {', '.join(waiting)}; run python calibrate.py first")
    return groups


def rows(runs):
    """Table rows, a list of strings each, in the order of HEADER: every run @Rec, then every run @0.5."""
    out = []
    for point, mark in POINTS:
        for run in runs:
            row = run.points["test", point]
            out.append([f"{run.name} {mark}", f"{run.results['params'] / 1e6:.{4 if run.results['params'] < 1e5 else 2}f}",
                        f"{run.results['minutes']:.1f}", *(f"{row[k]:.3f}" for k in FIGURES), f"{row['thr']:.4f}"])
    return out


def table(header, body):
    """A markdown table; the first column is left-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def section(runs, figures, slug):
    """The markdown of one test set."""
    first, warn = runs[0], runs[0].results["synthetic"]
    split, y = first.results["split"], first.part("test")[0]
    title = f"{'SYNTHETIC data set, not patients: ' if warn else ''}{split['set']}"
    text = [f"## {title}", "",
            f"Test: {len(y)} images ({int((y == 0).sum())} NORMAL, {int(y.sum())} PNEUMONIA), scored once at thresholds "
            f"chosen on validation ({split['val']} images). @Rec: the highest precision among thresholds with "
            f"validation recall >= {', '.join(sorted({f'{r.min_recall:g}' for r in runs}))}; @0.5: the threshold 0.5. "
            "AUROC does not depend on the threshold. Time: training, validation included.", "",
            table(HEADER, rows(runs)), "",
            "From validation to test at the same threshold (@Rec):", "",
            table(["Model", "Recall val", "Recall test", "Spec val", "Spec test", "AUROC val", "AUROC test"],
                  [[r.name] + [f"{r.points[s, 'at_rec'][k]:.3f}" for k in ("recall", "specificity", "auroc")
                               for s in ("val", "test")] for r in runs]), ""]
    mark = " [SYNTHETIC]" if warn else ""
    for name, draw in (("training", draw_training), ("roc", draw_roc), ("pr", draw_pr),
                       ("confusion", draw_confusion), ("scores", draw_scores)):
        path = Path(figures, f"{slug}-{name}.png")
        figure, caption = draw(runs)
        figure.suptitle(f"{caption} - {split['set']}{mark}", fontsize=11)
        with common.atomic_path(path) as tmp:
            figure.savefig(tmp, dpi=130)
        plt.close(figure)
        text += [f"![{caption}{mark}]({Path(os.path.relpath(path)).as_posix()})", ""]
    return "\n".join(text)


def _axes(count, width=5.2, height=4.2, columns=2):
    columns = min(columns, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(width * columns, height * lines + 0.4),
                                layout="constrained", squeeze=False)
    for ax in axes.flat[count:]:
        ax.axis("off")
    return figure, axes.flat


def _style(i):
    return dict(zip(("color", "linestyle"), STYLES[i % len(STYLES)]))


def draw_training(runs):
    """Loss and validation AUROC per epoch; a dot marks the epoch that was kept."""
    trained = [r for r in runs if r.results["model"] != "linear"]
    figure, (loss, auroc) = _axes(2)
    for i, run in enumerate(trained):
        history, color = run.results["history"], _style(i)["color"]
        epochs, best = range(1, len(history) + 1), run.results["best_epoch"]
        marker = "" if len(history) > 1 else "."
        loss.plot(epochs, [h["train_loss"] for h in history], color=color, marker=marker, label=f"{run.name}, train")
        loss.plot(epochs, [h["val_loss"] for h in history], color=color, marker=marker, ls="--", label=f"{run.name}, validation")
        auroc.plot(epochs, [h["val_auroc"] for h in history], label=run.name, **_style(i))
        auroc.plot(best, history[best - 1]["val_auroc"], "o", color=color)
    loss.set(xlabel="epoch", ylabel="loss (nats)", title="Training and validation loss")
    auroc.set(xlabel="epoch", ylabel="AUROC", title=f"Validation AUROC (n = {runs[0].results['split']['val']}); dot: kept epoch")
    for ax in (loss, auroc):
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        if trained:
            ax.legend(fontsize=8)
        else:
            ax.text(0.5, 0.5, "no run trained by epochs", ha="center", transform=ax.transAxes)
    return figure, "Training curves"


def _mark_points(ax, run, x, y, i):
    for point, marker in (("at_rec", "o"), ("at_0.5", "s")):
        row = run.points["test", point]
        ax.plot(x(row), y(row), marker, color=_style(i)["color"], markeredgecolor="black", markersize=7)


def draw_roc(runs):
    """Test ROC curves with both operating points."""
    figure, (ax,) = _axes(1, width=6, height=5.4)
    for i, run in enumerate(runs):
        y, p = run.part("test")
        fpr, tpr, _ = roc_curve(y, p)
        ax.plot(fpr, tpr, label=f"{run.name}: AUROC {run.points['test', 'at_rec']['auroc']:.3f}", **_style(i))
        _mark_points(ax, run, lambda r: 1 - r["specificity"], lambda r: r["recall"], i)
    ax.plot([0, 1], [0, 1], color="0.7", lw=0.8)
    ax.axhline(runs[0].min_recall, color="0.4", lw=0.8, ls=":")
    ax.set(xlabel="1 - specificity (false-positive rate)", ylabel="recall (sensitivity)",
           title=f"n = {len(y)} test images; circle: @Rec, square: @0.5, dotted: recall floor")
    ax.title.set_fontsize(9)
    ax.legend(loc="lower right", fontsize=8)
    ax.grid(alpha=0.3)
    return figure, "ROC on test"


def draw_pr(runs):
    """Test precision-recall curves with both operating points."""
    figure, (ax,) = _axes(1, width=6, height=5.4)
    for i, run in enumerate(runs):
        y, p = run.part("test")
        precision, recall, _ = precision_recall_curve(y, p)
        ax.plot(recall, precision, label=f"{run.name}: AUPRC {run.points['test', 'at_rec']['auprc']:.3f}", **_style(i))
        _mark_points(ax, run, lambda r: r["recall"], lambda r: r["precision"], i)
    ax.axhline(y.mean(), color="0.7", lw=0.8)
    ax.axvline(runs[0].min_recall, color="0.4", lw=0.8, ls=":")
    ax.set(xlabel="recall (sensitivity)", ylabel="precision", ylim=(min(0.5, y.mean() - 0.05), 1.01),
           title=f"n = {len(y)} test images, prevalence {y.mean():.2f} (grey line); circle: @Rec, square: @0.5")
    ax.title.set_fontsize(9)
    ax.legend(loc="lower left", fontsize=8)
    ax.grid(alpha=0.3)
    return figure, "Precision and recall on test"


def draw_confusion(runs):
    """Test confusion matrices, a line a run, @Rec and @0.5; shade and text: share of the true class."""
    figure, axes = _axes(2 * len(runs), width=4.2, height=3.1)
    for ax, (run, (point, mark)) in zip(axes, ((r, p) for r in runs for p in POINTS)):
        c = run.points["test", point]
        counts = np.array([[c["tn"], c["fp"]], [c["fn"], c["tp"]]])
        share = counts / counts.sum(axis=1, keepdims=True)
        ax.imshow(share, cmap="Greys", vmin=0, vmax=1)
        for i in range(2):
            for j in range(2):
                ax.text(j, i, f"{counts[i, j]}\n{share[i, j]:.1%}", ha="center", va="center",
                        color="white" if share[i, j] > 0.5 else "black")
        ax.set(xticks=(0, 1), yticks=(0, 1), xticklabels=("NORMAL", "PNEUMONIA"), yticklabels=("NORMAL", "PNEUMONIA"),
               xlabel="decision", ylabel="truth", title=f"{run.name} {mark}\nn = {counts.sum()}, threshold {c['thr']:.4f}")
        ax.title.set_fontsize(9)
    return figure, "Confusion matrices on test"


def draw_scores(runs):
    """Histograms of the scores by class, validation beside test, with the threshold."""
    figure, axes = _axes(2 * len(runs), width=5.2, height=2.7)
    for ax, (run, split) in zip(axes, ((r, s) for r in runs for s in ("val", "test"))):
        y, p = run.part(split)
        bins = np.linspace(0, 1, 41)
        for k, name, style in ((0, "NORMAL", dict(histtype="stepfilled", color="#9ecae1", edgecolor="#3182bd")),
                               (1, "PNEUMONIA", dict(histtype="step", color="#a63603", lw=1.6))):
            n = int((y == k).sum())
            ax.hist(p[y == k], bins, weights=np.full(n, 100 / n), label=f"{name} (n = {n})", **style)
        ax.axvline(run.threshold, color="black", ls="--", lw=1, label=f"threshold @Rec {run.threshold:.3f}")
        row = run.points[split, "at_rec"]
        ax.set(yscale="log", xlabel="score for PNEUMONIA", ylabel="% of the class",
               title=f"{run.name}, {'validation' if split == 'val' else 'test'}: "
                     f"recall {row['recall']:.3f}, specificity {row['specificity']:.3f}")
        ax.title.set_fontsize(8)
        ax.legend(fontsize=7, loc="upper center")
    return figure, "Scores on validation and test"


def write_csv(path, groups):
    """All rows with their data set as CSV."""
    with common.atomic_path(path) as tmp, open(tmp, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["Data", *HEADER])
        for runs in groups.values():
            name = runs[0].results["split"]["set"]
            writer.writerows([[name, *row] for row in rows(runs)])


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--run", nargs="+", metavar="DIR", help="run folders (default: all under --runs-dir)")
    parser.add_argument("--runs-dir", default="outputs", help="where the run folders lie")
    parser.add_argument("--figures", default=None, help="folder for the plots (default: RUNS_DIR/figures)")
    parser.add_argument("--csv", default=None, metavar="PATH", help="write the table as CSV too")
    args = parser.parse_args()
    groups = load_runs(args.runs_dir, args.run)
    figures = args.figures or Path(args.runs_dir, "figures")
    print("# Recall-first chest X-ray screening: results\n")
    for i, runs in enumerate(groups.values()):
        name = runs[0].results["split"]["set"]
        slug = name if name not in [r[0].results["split"]["set"] for r in list(groups.values())[:i]] else f"{name}-{i}"
        print(section(runs, figures, slug))
    if args.csv:
        write_csv(args.csv, groups)


if __name__ == "__main__":
    common.start(main)
