"""Turn calibrated runs into one report: markdown tables and plots.

    python compare.py > results.md

Reads results.json, calibration.json and scores.npz of every calibrated run under outputs/ (or --run DIR ...).
Standard output is the markdown alone; PNG plots go to outputs/figures/; --html writes the same as one self-contained
page, --csv the main table. Runs on different test sets get sections of their own; runs that differ in the seed alone
get a mean +/- standard deviation and an ensemble of their scores. Needs no torch and takes seconds.
"""

import base64
import csv
import html
import itertools
import os
import re
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

import common
import metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

NAMES = {
    "scratch": "ViT scratch",
    "linear": "Logistic regression 32x32 px",
    "ti16": "ViT-Ti/16",
    "s16": "ViT-S/16",
    "b16": "ViT-B/16",
    "b32": "ViT-B/32",
    "l16": "ViT-L/16",
}
POINTS = {"at_rec": "@Rec", "at_0.5": "@0.5", "at_guaranteed": "@Guar"}
FIGURES = ("acc", "precision", "recall", "specificity", "f1", "auroc")
HEADER = ("Model", "Params (M)", "Time (min)", "Acc", "Prec", "Recall", "Spec", "F1", "AUROC", "Thr")
STYLES = [
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#555555", (0, (5, 1, 1, 1, 1, 1))),
]


# ---------------------------------------------------------------- runs


class Run:
    """A calibrated run: `results`, `calibration` and `scores`, with a readable `name`, the `group` of its test
    files and the `family` of runs that differ from it in the seed alone, which share the name `base`."""

    def __init__(self, name, base, results, calibration, scores, members=1, explained=None):
        self.name, self.base, self.members, self.explained = name, base, members, explained
        self.results, self.calibration, self.scores = results, calibration, scores
        self.points = {
            (s, p): calibration[s][p] for s in ("val", "test") for p in POINTS if p in calibration[s]
        }
        self.threshold, self.min_recall = calibration["threshold"], calibration["min_recall"]
        self.group = common.sha256(sorted(scores["test_files"].tolist()))
        recipe = {k: v for k, v in results["recipe"].items() if k != "seed"}
        data = {k: v for k, v in results["data"].items() if k != "cache_dir"}
        self.family = common.sha256(
            [
                results["model"],
                results["model_config"],
                recipe,
                data,
                calibration.get("tta"),
                results.get("weights"),
                self.min_recall,
                calibration["temperature_applied"],
            ]
        )

    def part(self, split):
        """Labels and scores of "val" or "test"."""
        return self.scores[f"{split}_labels"], self.scores[f"{split}_p1"]


def read_run(folder, suffix):
    """A Run from disk; InputError if it is damaged or was calibrated by another version."""
    results, calibration = common.read_results(folder), common.read_calibration(folder, suffix)
    name = NAMES.get(results["model"], results["model"]) + (" pretrained" if "weights" in results else "")
    if "init" in results:
        name += ", masked pretraining"
        results["minutes"] += results["init"]["minutes"]
    end = (" + TTA" if suffix else "") + (" [SYNTHETIC]" if results["synthetic"] else "")
    usual = ("scratch", "pretrained", "linear")
    stem = re.sub(r"(-demo)?(-seed\d+)?$", "", folder.name)
    base = name + ("" if stem in usual else f" ({stem})") + end
    name += ("" if folder.name.removesuffix("-demo") in usual else f" ({folder.name})") + end
    try:
        with np.load(Path(folder, f"scores{suffix}.npz"), allow_pickle=False) as file:
            scores = {k: file[k] for k in file.files}
        for s in ("val", "test"):
            metrics.check_scores(scores[f"{s}_labels"], scores[f"{s}_p1"])
            if (
                not len(scores[f"{s}_files"])
                == len(scores[f"{s}_patients"])
                == len(scores[f"{s}_logits"])
                == len(scores[f"{s}_labels"])
            ):
                raise ValueError(f"the {s} arrays differ in length")
        explained, path = None, folder / "explain" / "explain.json"
        if path.exists() and not suffix:
            explained = common.read_json(path)
            if explained.get("checkpoint") != calibration["checkpoint"]:
                common.say(f"note: {path} is of another checkpoint and left out; run explain.py again")
                explained = None
        return Run(name, base, results, calibration, scores, explained=explained)
    except (*common.DAMAGED, TypeError) as error:
        raise common.InputError(
            f"{folder} is damaged or incomplete ({error!r}): run calibrate.py again"
        ) from None


def load_runs(runs_dir, chosen):
    """Calibrated runs, grouped by their test files: {group: [Run, ...]}; InputError if none is calibrated."""
    groups, waiting = {}, []
    for folder in common.find_runs(runs_dir, chosen):
        suffixes = [s for s in ("", "-tta") if (folder / f"calibration{s}.json").exists()]
        if not suffixes:
            waiting.append(str(folder))
        for suffix in suffixes:
            run = read_run(folder, suffix)
            groups.setdefault(run.group, []).append(run)
    if waiting and groups and not chosen:
        common.say(f"note: not calibrated, so left out: {', '.join(waiting)}; run python calibrate.py")
    elif waiting:
        raise common.InputError(f"not calibrated: {', '.join(waiting)}; run python calibrate.py first")
    return groups


def families(runs):
    """Lists of two or more runs that differ in the seed alone; a seed trained twice counts once."""
    found = {}
    for run in runs:
        if run.members == 1:
            found.setdefault(run.family, {}).setdefault(run.results.get("seed"), run)
    return [list(f.values()) for f in found.values() if len(f) > 1]


def ensemble(family):
    """The mean of the members' scores as a run of its own, its thresholds chosen on validation like theirs."""
    first, scores = family[0], dict(family[0].scores)
    for split in ("val", "test"):
        if any((r.scores[f"{split}_files"] != scores[f"{split}_files"]).any() for r in family):
            return None  # another validation split: nothing to average
        p = np.mean([r.scores[f"{split}_p1"] for r in family], axis=0).clip(1e-15, 1 - 1e-15)
        scores[f"{split}_logits"] = np.stack([np.log1p(-p), np.log(p)], axis=1)
    calibration = metrics.evaluate(
        scores,
        min_recall=first.min_recall,
        confidence=first.calibration["guarantee"]["confidence"],
        strict=False,
        temperature=False,
        bootstrap=first.calibration["bootstrap"],
        prevalence=first.points["test", "at_rec"]["at_prevalence"]["prevalence"],
    )
    results = {
        **first.results,
        "params": sum(r.results["params"] for r in family),
        "minutes": sum(r.results["minutes"] for r in family),
    }
    name = f"{first.base}, ensemble of {len(family)} seeds"
    return Run(name, name, results, calibration, scores, len(family))


# ---------------------------------------------------------------- tables: each is a list of blocks
# A block is ("h2" | "h3" | "p", text), ("table", header, rows) or ("image", path, caption).


def span(row, key):
    """ "0.951 [0.931, 0.968]": a figure with its 95% interval."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(row[key], *metrics.reported_interval(row, key))


def rows(runs):
    """Rows of the main table, lists of strings in the order of HEADER: every run @Rec, then every run @0.5."""
    out = []
    for point in ("at_rec", "at_0.5"):
        for run in runs:
            row, params = run.points["test", point], run.results["params"] / 1e6
            out.append(
                [
                    f"{run.name} {POINTS[point]}",
                    f"{params:.{4 if params < 0.1 else 2}f}",
                    f"{run.results['minutes']:.1f}",
                    *(f"{row[k]:.3f}" for k in FIGURES),
                    f"{row['thr']:.4f}",
                ]
            )
        for family in families(runs):
            values = [[r.points["test", point][k] for k in FIGURES + ("thr",)] for r in family]
            minutes = np.mean([r.results["minutes"] for r in family])
            cells = [
                f"{m:.3f} ± {s:.3f}" for m, s in zip(np.mean(values, axis=0), np.std(values, axis=0, ddof=1))
            ]
            out.append(
                [
                    f"{family[0].base}, mean ± sd of {len(family)} seeds {POINTS[point]}",
                    f"{family[0].results['params'] / 1e6:.2f}",
                    f"{minutes:.1f}",
                    *cells,
                ]
            )
    return out


def floors(runs):
    """The recall floors of the runs, as text."""
    return ", ".join(sorted({f"{r.min_recall:g}" for r in runs}))


def main_blocks(runs):
    """The results table."""
    split, (y, _) = runs[0].results["split"], runs[0].part("test")
    warn = "SYNTHETIC data set, not patients: " if runs[0].results["synthetic"] else ""
    return [
        ("h2", warn + split["set"]),
        (
            "p",
            f"Test: {len(y)} images ({int((y == 0).sum())} NORMAL, {int(y.sum())} PNEUMONIA), scored at thresholds "
            f"chosen on validation ({split['val']} images). @Rec: the highest precision among thresholds with "
            f"validation recall >= {floors(runs)}; @0.5: the threshold 0.5. AUROC does not depend on the threshold. "
            "Time: training, validation included.",
        ),
        ("table", HEADER, rows(runs)),
    ]


def interval_blocks(runs):
    """95% intervals of the test figures."""
    keys = ("recall", "specificity", "precision", "acc", "f1", "auroc", "auprc")
    head = [
        "Model",
        "Recall",
        "Specificity",
        "Precision",
        "Accuracy",
        "F1",
        "AUROC",
        "AUPRC",
        "AUROC (DeLong)",
    ]
    body = []
    for point, run in itertools.product(POINTS, runs):
        if ("test", point) in run.points:
            row = run.points["test", point]
            body.append(
                [
                    f"{run.name} {POINTS[point]}",
                    *(span(row, k) for k in keys),
                    "[{:.3f}, {:.3f}]".format(*row["interval"]["auroc"]["delong"]),
                ]
            )
    return [
        ("h3", "How sure: 95% intervals on test"),
        (
            "p",
            f"Percentile bootstrap, whole patients drawn {runs[0].calibration['bootstrap']} times; Wilson where "
            "every draw is alike. DeLong and Wilson (all in calibration.json) take images as independent.",
        ),
        ("table", head, body),
    ]


def shift_blocks(runs):
    """What the recall floor promises, and what is left of it on test."""
    head = [
        "Model",
        "Threshold",
        "Recall val",
        "Recall test",
        "Spec val",
        "Spec test",
        "AUROC val",
        "AUROC test",
    ]
    body = []
    for run in runs:
        for point in ("at_rec", "at_guaranteed"):
            if ("val", point) in run.points:
                val, test = run.points["val", point], run.points["test", point]
                body.append(
                    [
                        f"{run.name} {POINTS[point]}",
                        f"{val['thr']:.4f}",
                        f"{val['recall']:.3f}",
                        span(test, "recall"),
                        f"{val['specificity']:.3f}",
                        span(test, "specificity"),
                        f"{val['auroc']:.3f}",
                        f"{test['auroc']:.3f}",
                    ]
                )
    told = {
        f"recall >= {r.min_recall:g} with confidence {r.calibration['guarantee']['confidence']:g}, from "
        f"{r.calibration['guarantee']['positive_patients']} patients with pneumonia"
        for r in runs
        if r.calibration["guarantee"]["threshold"] is not None
    }
    refused = sorted(
        {
            r.calibration["guarantee"]["why_not"]
            for r in runs
            if r.calibration["guarantee"]["threshold"] is None
        }
    )
    text = (
        "@Rec meets the floor on the validation images; for new patients like them its true recall is below the floor "
        "about half the time. "
        + (
            f"@Guar is the Neyman-Pearson umbrella rule on patients: {'; '.join(sorted(told))}. "
            if told
            else ""
        )
        + "No such promise survives a shift: compare validation and test. The validation images also chose the epoch, "
        "which flatters validation a little."
    )
    text += f" Where @Guar is missing: {'; '.join(refused)}." if refused else ""
    return [
        ("h3", "What the threshold promises, and the shift from validation to test"),
        ("p", text),
        ("table", head, body),
    ]


def pair_blocks(runs):
    """Every two models on the same test images."""
    body, same = [], []
    for a, b in itertools.combinations(runs, 2):
        y = a.part("test")[0]
        if not np.array_equal(a.scores["test_files"], b.scores["test_files"]):
            continue
        d = metrics.compare_at_thresholds(
            y,
            a.part("test")[1],
            a.threshold,
            b.part("test")[1],
            b.threshold,
            a.scores["test_patients"],
            a.calibration["bootstrap"],
        )
        cells = [
            "{difference:+.3f} [{lo:+.3f}, {hi:+.3f}]".format(**d[k])
            for k in ("auroc", "recall", "specificity")
        ]
        body.append(
            [
                f"{a.name} minus {b.name}",
                f"{cells[0]}, p = {d['delong']:.2g}",
                f"{cells[1]}, p = {d['mcnemar_recall']:.2g}",
                f"{cells[2]}, p = {d['mcnemar_specificity']:.2g}",
            ]
        )
        if d["auroc"]["lo"] <= 0 <= d["auroc"]["hi"] and d["delong"] > 0.05:
            same.append(f"{a.name} and {b.name}")
    if not body:
        return []
    text = (
        "Differences on the same test images, recall and specificity @Rec: 95% paired patient bootstrap; p-values "
        "by DeLong (AUROC) and exact McNemar, not corrected for the number of pairs."
    )
    text += (
        f" By AUROC these cannot be told apart: {'; '.join(same)}." if same else " By AUROC all pairs differ."
    )
    return [
        ("h3", "Which model is better"),
        ("p", text),
        ("table", ["Pair", "AUROC", "Recall @Rec", "Specificity @Rec"], body),
    ]


def probability_blocks(runs):
    """Temperature, calibration error and predictive values."""
    head = ["Model", "Temperature", *(f"{k} {s}" for s in ("val", "test") for k in ("ECE", "Brier", "NLL"))]
    body = []
    for run in runs:
        cells = [
            "{:.3f} → {:.3f}".format(
                *(run.calibration["probability"][s][word][k] for word in ("before", "after"))
            )
            for s in ("val", "test")
            for k in ("ece", "brier", "nll")
        ]
        used = "" if run.calibration["temperature_applied"] else " (not applied)"
        body.append([run.name, f"{run.calibration['temperature']:.3f}{used}", *cells])
    blocks = [
        ("h3", "Are the probabilities right"),
        (
            "p",
            "One temperature, fitted on validation by NLL; before → after. It changes no ranking and no decision. "
            "ECE: 15 bins of equal mass.",
        ),
        ("table", head, body),
    ]
    body = []
    for run in runs:
        row, (y, _) = run.points["test", "at_rec"], run.part("test")
        here = metrics.predictive_values(row["recall"], row["specificity"], float(y.mean()))
        there = row["at_prevalence"]
        cell = [
            f"{v:.3f}" if v is not None and np.isfinite(v) else "-"
            for v in (*here, there["ppv"], there["npv"])
        ]
        body.append([f"{run.name} @Rec", *cell])
    named = runs[0].points["test", "at_rec"]["at_prevalence"]["prevalence"]
    return blocks + [
        (
            "p",
            f"Predictive values depend on how common the disease is: {y.mean():.1%} of the test images are PNEUMONIA, far "
            f"more than in a screening room. At a prevalence of {named:.0%}, with the same recall and specificity:",
        ),
        (
            "table",
            [
                "Model",
                f"PPV at {y.mean():.1%}",
                f"NPV at {y.mean():.1%}",
                f"PPV at {named:.0%}",
                f"NPV at {named:.0%}",
            ],
            body,
        ),
    ]


def subgroup_blocks(runs):
    """Recall of bacterial and viral pneumonia, from the file names."""
    body = []
    for run in runs:
        y, p = run.part("test")
        called, names = p >= run.threshold, np.char.lower(run.scores["test_files"])
        cells = []
        for word in ("bacteria", "virus"):
            inside = (y == 1) & (np.char.find(names, word) >= 0)
            k, n = int(called[inside].sum()), int(inside.sum())
            cells.append(
                "{:.3f} [{:.3f}, {:.3f}] (n = {})".format(k / n, *metrics.wilson_interval(k, n), n)
                if n
                else "-"
            )
        body.append([f"{run.name} @Rec", *cells])
    return [
        ("h3", "Subgroups"),
        ("p", "Test recall @Rec by cause, from the file names; 95% Wilson intervals."),
        ("table", ["Model", "Recall, bacterial", "Recall, viral"], body),
    ]


def explain_blocks(runs):
    """Where the maps of explain.py lie, and whether they can be believed."""
    body = []
    for run in runs:
        for method, name in (("gradcam", "Grad-CAM"), ("rollout", "attention rollout")):
            if run.explained and method in run.explained:
                r = run.explained[method]
                cells = [
                    "{mean:+.3f} [{lo:+.3f}, {hi:+.3f}]".format(**r[f"{k}_minus_random"])
                    for k in ("deletion", "insertion")
                ]
                cells += [
                    "{:.2f} [{:.2f}, {:.2f}] of {:.2f}".format(
                        r[f"{k}_share"]["mean"], r[f"{k}_share"]["lo"], r[f"{k}_share"]["hi"], r[f"{k}_area"]
                    )
                    for k in ("lung", "border")
                ]
                body.append(
                    [
                        f"{run.name}, {name}",
                        *cells,
                        *(f"{r['randomised'][i]['rank_correlation']:.2f}" for i in (0, -1)),
                    ]
                )
    if not body:
        return []
    return [
        ("h3", "Does it look at lungs or at letters?"),
        (
            "p",
            "From explain.py, on validation images rightly called PNEUMONIA. Deletion (lower is better) and insertion (higher "
            "is better): area under the score curve minus that of random order; an interval that holds 0 means the map "
            "ranks patches no better than chance. Shares of the map on the lung fields (a heuristic mask) and on the outer "
            "tenth of the image, of the share an even map would have. Rank correlation with the map after the head, or all "
            "weights, are drawn anew: a map that stays the same does not show what was learnt.",
        ),
        (
            "table",
            ["Map", "Deletion", "Insertion", "On the lungs", "On the border", "Head anew", "All anew"],
            body,
        ),
    ]


def method_blocks(runs):
    """The items of STARD-AI and CLAIM that a script can answer."""
    r, (y, _), (yv, _) = runs[0].results, runs[0].part("test"), runs[0].part("val")
    split, data = r["split"], r["data"]
    counts = "; ".join(
        f"{s}: {split[s]} images ({', '.join(f'{n} {c}' for c, n in split['counts'][s].items())})"
        for s in ("train", "val", "test")
    )
    patients = {s: len(set(runs[0].scores[f"{s}_patients"].tolist())) for s in ("val", "test")}
    rows = [
        ["Data", f"{split['set']}" + (" (SYNTHETIC drawings, not patients)" if r["synthetic"] else "")],
        ["Reference standard", "the class folder of each image, as published"],
        [
            "Sizes",
            f"{counts}; {patients['val']} validation and {patients['test']} test patients by file name",
        ],
        ["Prevalence of PNEUMONIA", f"validation {yv.mean():.1%}, test {y.mean():.1%}"],
        [
            "Partition",
            f"--split {data['split']}, seed {data['split_seed']}: {split['shared_patients']} validation images "
            "share a patient with train; train and test are the published folders",
        ],
        [
            "Input",
            "; ".join(
                sorted(
                    {
                        f"{r.results['data']['img_size']} px grey, {r.results['data']['resize']}, exposure "
                        f"{r.results['data'].get('normalise', 'none')}"
                        for r in runs
                    }
                )
            )
            + "; pixels only",
        ],
        ["Model selection", "epoch with the best validation AUROC; test never opened in training"],
        [
            "Threshold rule",
            f"@Rec: highest precision with validation recall >= {floors(runs)}, exact over all "
            "scores; @Guar: Neyman-Pearson umbrella on patients; both chosen on validation, applied "
            "unchanged to test",
        ],
        ["Intervals", "95%; bootstrap over patients, Wilson, DeLong; seeds as mean ± standard deviation"],
        [
            "Not answered here",
            "other hospitals, adults, other diseases, inter-reader agreement, clinical benefit",
        ],
    ]
    for run in runs:
        if run.members == 1:
            rows.append(
                [
                    f"Made by: {run.name}",
                    f"`{run.results.get('command', '?')}` on {run.results.get('device', '?')}, "
                    f"torch {run.results.get('versions', {}).get('torch', '?')}",
                ]
            )
    return [("h3", "How this was evaluated"), ("table", ["Item", "Answer"], rows)]


def figure_blocks(runs, shown, figures, slug):
    """Draw every plot of one test set: training curves of all `runs`, the others of the `shown` ones."""
    mark, blocks = " [SYNTHETIC]" if runs[0].results["synthetic"] else "", [("h3", "Plots")]
    for name, draw in (
        ("training", draw_training),
        ("roc", draw_roc),
        ("pr", draw_pr),
        ("confusion", draw_confusion),
        ("scores", draw_scores),
        ("reliability", draw_reliability),
        ("decision", draw_decision),
    ):
        path = Path(figures, f"{slug}-{name}.png")
        drawn = (
            [
                r
                for r in runs
                if len(r.results["history"]) > 1 and r.members == 1 and not r.calibration.get("tta")
            ]
            if draw is draw_training
            else shown
        )
        if not drawn:
            continue
        figure, caption = draw(drawn)
        figure.suptitle(f"{caption} - {runs[0].results['split']['set']}{mark}", fontsize=11)
        with common.atomic_path(path) as tmp:
            figure.savefig(tmp, dpi=130)
        plt.close(figure)
        blocks.append(("image", path, caption + mark))
    return blocks


# ---------------------------------------------------------------- rendering


def to_markdown(blocks):
    """Blocks -> markdown text."""
    out = []
    for kind, *rest in blocks:
        if kind == "table":
            head, body = rest
            lines = [
                head,
                ["---"] + ["---:"] * (len(head) - 1) if head[0] != "Item" else ["---"] * len(head),
                *body,
            ]
            out.append(
                "\n".join(
                    "| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines
                )
            )
        elif kind == "image":
            out.append(f"![{rest[1]}]({Path(os.path.relpath(rest[0])).as_posix()})")
        else:
            out.append({"h1": "# ", "h2": "## ", "h3": "### ", "p": ""}[kind] + rest[0])
    return "\n\n".join(out)


STYLE = """body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:72rem;padding:1rem;color:#111;background:#fff}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;margin:.5rem 0}
th,td{border-bottom:1px solid #ccc;padding:.25rem .6rem;text-align:right;white-space:nowrap}
td:first-child,th:first-child,.text td,.text th{text-align:left}.text td{white-space:normal}tr:hover{background:#f4f6f8}
img{max-width:100%;height:auto}figure{margin:1rem 0}figcaption{color:#555;font-size:.85rem}
.warn{background:#fff3cd;border:1px solid #c90;padding:.5rem 1rem}
@media print{body{max-width:none;font-size:10px}table{font-size:7px}th,td{white-space:normal;padding:.1rem .2rem}
figure,table{break-inside:avoid}}"""


def to_html(blocks, synthetic):
    """Blocks -> one self-contained page: pictures embedded, nothing fetched."""
    out = []
    for kind, *rest in blocks:
        if kind == "table":
            head, body = (
                [[html.escape(str(c)).replace("`", "") for c in line] for line in part]
                for part in ([rest[0]], rest[1])
            )
            cells = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in line)}</tr>\n" for line in body)
            text = ' class="text"' if rest[0][0] == "Item" else ""
            out.append(
                f'<div class="wide"><table{text}><thead><tr>{"".join(f"<th>{c}</th>" for c in head[0])}</tr></thead>'
                f"<tbody>\n{cells}</tbody></table></div>"
            )
        elif kind == "image":
            code = base64.b64encode(Path(rest[0]).read_bytes()).decode()
            out.append(
                f'<figure><img alt="{html.escape(rest[1])}" src="data:image/png;base64,{code}">'
                f"<figcaption>{html.escape(rest[1])}</figcaption></figure>"
            )
        else:
            out.append(f"<{kind}>{html.escape(rest[0])}</{kind}>")
    warn = (
        '<p class="warn">Parts of this page come from SYNTHETIC drawings, not from patients.</p>'
        if synthetic
        else ""
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1"><title>Recall-first chest X-ray screening: results</title>'
        f"<style>{STYLE}</style></head><body>{warn}\n" + "\n".join(out) + "\n</body></html>\n"
    )


def write_csv(path, groups):
    """All rows of the main tables with their data set as CSV."""
    with common.atomic_path(path) as tmp, open(tmp, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["Data", *HEADER])
        for runs in groups.values():
            writer.writerows([[runs[0].results["split"]["set"], *row] for row in rows(runs)])


# ---------------------------------------------------------------- plots


def _axes(count, width=5.2, height=4.2, columns=2):
    columns = min(columns, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(width * columns, height * lines + 0.4), layout="constrained", squeeze=False
    )
    for ax in axes.flat[count:]:
        ax.axis("off")
    return figure, axes.flat


def _style(i):
    return {"color": STYLES[i % 5][0], "linestyle": STYLES[(i + i // 5) % 5][1]}  # 25 different ones


def draw_training(runs):
    """Loss and validation AUROC per epoch; a dot marks the epoch that was kept."""
    figure, (loss, auroc) = _axes(2)
    for i, run in enumerate(runs):
        history, color, best = run.results["history"], _style(i)["color"], run.results["best_epoch"]
        epochs = range(1, len(history) + 1)
        loss.plot(epochs, [h["train_loss"] for h in history], color=color, label=f"{run.name}, train")
        loss.plot(
            epochs, [h["val_loss"] for h in history], color=color, ls="--", label=f"{run.name}, validation"
        )
        auroc.plot(epochs, [h["val_auroc"] for h in history], label=run.name, **_style(i))
        auroc.plot(best, history[best - 1]["val_auroc"], "o", color=color)
    loss.set(xlabel="epoch", ylabel="loss (nats)", title="Training and validation loss")
    auroc.set(
        xlabel="epoch",
        ylabel="AUROC",
        title=f"Validation AUROC (n = {runs[0].results['split']['val']}); dot: kept epoch",
    )
    for ax in (loss, auroc):
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.title.set_fontsize(10)
        ax.legend(fontsize=7)
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
        ax.plot(
            fpr, tpr, label=f"{run.name}: AUROC {span(run.points['test', 'at_rec'], 'auroc')}", **_style(i)
        )
        _mark_points(ax, run, lambda r: 1 - r["specificity"], lambda r: r["recall"], i)
    ax.plot([0, 1], [0, 1], color="0.7", lw=0.8)
    ax.axhline(runs[0].min_recall, color="0.4", lw=0.8, ls=":")
    ax.set(
        xlabel="1 - specificity (false-positive rate)",
        ylabel="recall (sensitivity)",
        title=f"n = {len(y)} test images; circle: @Rec, square: @0.5, dotted: recall floor",
    )
    ax.title.set_fontsize(9)
    ax.legend(loc="lower right", fontsize=7)
    ax.grid(alpha=0.3)
    return figure, "ROC on test"


def draw_pr(runs):
    """Test precision-recall curves with both operating points."""
    figure, (ax,) = _axes(1, width=6, height=5.4)
    for i, run in enumerate(runs):
        y, p = run.part("test")
        precision, recall, _ = precision_recall_curve(y, p)
        ax.plot(
            recall,
            precision,
            label=f"{run.name}: AUPRC {span(run.points['test', 'at_rec'], 'auprc')}",
            **_style(i),
        )
        _mark_points(ax, run, lambda r: r["recall"], lambda r: r["precision"], i)
    ax.axhline(y.mean(), color="0.7", lw=0.8)
    ax.axvline(runs[0].min_recall, color="0.4", lw=0.8, ls=":")
    ax.set(
        xlabel="recall (sensitivity)",
        ylabel="precision",
        ylim=(min(0.5, y.mean() - 0.05), 1.01),
        title=f"n = {len(y)} test images, prevalence {y.mean():.2f} (grey line); circle: @Rec, square: @0.5",
    )
    ax.title.set_fontsize(9)
    ax.legend(loc="lower left", fontsize=7)
    ax.grid(alpha=0.3)
    return figure, "Precision and recall on test"


def draw_confusion(runs):
    """Test confusion matrices, a line a run, @Rec and @0.5; shade and text: share of the true class."""
    figure, axes = _axes(2 * len(runs), width=4.2, height=3.1)
    for ax, (run, point) in zip(axes, itertools.product(runs, ("at_rec", "at_0.5"))):
        c = run.points["test", point]
        counts = np.array([[c["tn"], c["fp"]], [c["fn"], c["tp"]]])
        share = counts / counts.sum(axis=1, keepdims=True)
        ax.imshow(share, cmap="Greys", vmin=0, vmax=1)
        for i, j in itertools.product(range(2), range(2)):
            ax.text(
                j,
                i,
                f"{counts[i, j]}\n{share[i, j]:.1%}",
                ha="center",
                va="center",
                color="white" if share[i, j] > 0.5 else "black",
            )
        names = ("NORMAL", "PNEUMONIA")
        ax.set(
            xticks=(0, 1),
            yticks=(0, 1),
            xticklabels=names,
            yticklabels=names,
            xlabel="decision",
            ylabel="truth",
            title=f"{run.name} {POINTS[point]}\nn = {counts.sum()}, threshold {c['thr']:.4f}",
        )
        ax.title.set_fontsize(9)
    return figure, "Confusion matrices on test"


def draw_scores(runs):
    """Histograms of the scores by class, validation beside test, with the threshold."""
    figure, axes = _axes(2 * len(runs), width=5.2, height=2.7)
    for ax, (run, split) in zip(axes, itertools.product(runs, ("val", "test"))):
        y, p = run.part(split)
        bins = np.linspace(0, 1, 41)
        for k, name, style in (
            (0, "NORMAL", dict(histtype="stepfilled", color="#9ecae1", edgecolor="#3182bd")),
            (1, "PNEUMONIA", dict(histtype="step", color="#a63603", lw=1.6)),
        ):
            n = int((y == k).sum())
            ax.hist(p[y == k], bins, weights=np.full(n, 100 / n), label=name, **style)
        ax.axvline(run.threshold, color="black", ls="--", lw=1, label="threshold @Rec")
        row = run.points[split, "at_rec"]
        ax.set(
            yscale="log",
            ylim=(0.1, 120),
            yticks=(0.1, 1, 10, 100),
            yticklabels=("0.1", "1", "10", "100"),
            xlabel="score for PNEUMONIA",
            ylabel="% of the class",
            title=textwrap.fill(
                f"{run.name}, {'validation' if split == 'val' else 'test'} (n = {(y == 0).sum()} + {y.sum()}), "
                f"threshold {run.threshold:.3f}",
                72,
            )  # two panels side by side: a long name wraps
            + f":\nrecall {row['recall']:.3f}, specificity {row['specificity']:.3f}",
        )
        ax.title.set_fontsize(8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure, "Scores on validation and test"


def draw_reliability(runs):
    """Share of positives against mean score in bins of equal mass, before and after temperature."""
    figure, axes = _axes(2 * len(runs), width=4.4, height=3.6)
    for ax, (run, split) in zip(axes, itertools.product(runs, ("val", "test"))):
        part = run.calibration["probability"][split]
        ax.plot([0, 1], [0, 1], color="0.7", lw=0.8)
        for word, style in (
            ("before", dict(color="#0072B2", marker="o", ls="-")),
            ("after", dict(color="#D55E00", marker="^", ls="--")),
        ):
            bins = part[word]["bins"]
            ax.plot(
                [b["score"] for b in bins],
                [b["positives"] for b in bins],
                ms=4,
                lw=1,
                label=f"{word} temperature: ECE {part[word]['ece']:.3f}",
                **style,
            )
        sizes = sorted({b["n"] for b in bins})
        ax.set(
            xlabel="mean score of the bin",
            ylabel="share of PNEUMONIA",
            xlim=(-0.03, 1.03),
            ylim=(-0.03, 1.03),
            title=f"{run.name}, {'validation' if split == 'val' else 'test'}: {len(bins)} bins of "
            f"{' or '.join(map(str, sizes))}",
        )
        ax.title.set_fontsize(8)
        ax.legend(fontsize=7, loc="lower right" if split == "val" else "upper left")
        ax.grid(alpha=0.3)
    return figure, "Reliability"


def draw_decision(runs):
    """Net benefit of acting on the calibrated probability, against treating all and none."""
    figure, (ax,) = _axes(1, width=6.4, height=4.8)
    pt = np.linspace(0.01, 0.95, 95)
    for i, run in enumerate(runs):
        y, _ = run.part("test")
        p = metrics.tempered(run.scores["test_logits"], run.calibration["temperature"])
        model, treat_all = metrics.net_benefit(y, p, pt)
        ax.plot(pt, model, label=run.name, **_style(i))
    ax.plot(pt, treat_all, color="0.5", lw=1, label="treat all")
    ax.axhline(0, color="black", lw=1, label="treat none")
    ax.set(
        ylim=(-0.1, y.mean() + 0.05),
        xlabel="threshold probability",
        ylabel="net benefit (true positives per image)",
        title=f"n = {len(y)} test images, prevalence {y.mean():.2f}; probabilities after temperature",
    )
    ax.title.set_fontsize(9)
    ax.legend(fontsize=7)
    ax.grid(alpha=0.3)
    return figure, "Decision curve on test"


# ---------------------------------------------------------------- main


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--run", nargs="+", metavar="DIR", help="run folders (default: all under --runs-dir)")
    parser.add_argument("--runs-dir", default="outputs", help="where the run folders lie")
    parser.add_argument("--figures", default=None, help="folder for the plots (default: RUNS_DIR/figures)")
    parser.add_argument("--csv", default=None, metavar="PATH", help="write the main table as CSV too")
    parser.add_argument(
        "--html", default=None, metavar="PATH", help="write the report as one self-contained page too"
    )
    args = parser.parse_args()
    groups = load_runs(args.runs_dir, args.run)
    figures = args.figures or Path(args.runs_dir, "figures")
    blocks, used = [("h1", "Recall-first chest X-ray screening: results")], {}
    for key, singles in groups.items():
        together = [(f, e) for f in families(singles) if (e := ensemble(f))]
        groups[key] = runs = singles + [e for _, e in together]
        replaced = [r for f, _ in together for r in singles if r.family == f[0].family]
        shown = [
            r for r in runs if r not in replaced
        ]  # an ensemble stands for its seeds where rows would be too many
        name = runs[0].results["split"]["set"]
        used[name] = used.get(name, 0) + 1
        slug = name if used[name] == 1 else f"{name}-{used[name]}"
        for part in (main_blocks, shift_blocks):
            blocks += part(runs)
        for part in (interval_blocks, pair_blocks, probability_blocks, subgroup_blocks):
            blocks += part(shown)
        blocks += explain_blocks(runs) + method_blocks(runs) + figure_blocks(runs, shown, figures, slug)
    if args.csv:
        write_csv(args.csv, groups)
    if args.html:
        page = to_html(blocks, any(r.results["synthetic"] for runs in groups.values() for r in runs))
        with common.atomic_path(args.html) as tmp:
            tmp.write_text(page, encoding="utf-8")
    print(to_markdown(blocks))  # last: the reader may close the pipe


if __name__ == "__main__":
    common.start(main)
