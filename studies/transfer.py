"""Does a threshold keep its meaning elsewhere? Ways to train a head on frozen features, compared without the
test set, which is read after the choice has been printed.

    python studies/transfer.py --run outputs/probe-full outputs/probe-masked-crop --nih NIH_DIR

The runs lend their backbones, which are not changed; heads are trained anew, with the run's class weights. In
the table, what is chosen on one source is read on another: the threshold of recall 0.95 on validation read
under the corruptions of studies/signals.py and on another hospital, and that of the other hospital read on
validation. With several runs, the mean of their probabilities makes further rows. The rule is that of
docs/notebook/20-accuracy-the-rule.md: the greatest panel among those without a veto is chosen; all are scored
then.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from calibration.intervals import delong_interval, intervals_at_threshold
from common.cli import Parser
from common.console import InputError, say, start
from common.device import add_device_argument, pick_device
from data import load_test, load_train_val
from images.augment import PRESETS
from metrics import choose_threshold_by_min_recall, summarize_at_threshold
from records.run import find_runs
from studies import kermany
from studies.nih import load_nih
from studies.signals import MIN_RECALL, Scorer, borrow_borders, corruptions, panel, some_to_corrupt

EPOCHS, BATCH, RATE, DECAY = 100, 32, 1e-3, 0.05  # as train_pretrained.py trains a head alone
DIRECTIONS = 4  # taken away where sources are told apart; there is no more to find after that


# ---------------------------------------------------------------- losses and features


def cross_entropy(smoothing=0.0):
    """logits [B, 2], targets int64 [B] -> loss [B]."""
    return lambda logits, y: F.cross_entropy(logits, y, label_smoothing=smoothing, reduction="none")


def of_directions(temperature):
    """Cross-entropy of logits / (temperature * their norm): the loss rewards no confidence beyond that of a
    direction (logit normalisation, Wei et al. 2022, arXiv:2205.09310, equation 5)."""

    def loss(logits, y):
        norm = logits.norm(dim=1, keepdim=True).clamp(min=1e-7)
        return F.cross_entropy(logits / (temperature * norm), y, reduction="none")

    return loss


def telling(features, source, count=DIRECTIONS):
    """Orthonormal directions [D, count] that tell boolean `source` [N] by features [N, D]: each is that of a
    logistic regression on what the former ones left (Ravfogel et al. 2020, arXiv:2004.07667)."""
    found = np.zeros((features.shape[1], 0))
    for _ in range(count):
        left = features - features @ found @ found.T
        w = LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000).fit(left, source).coef_[0]
        w = w - found @ (found.T @ w)
        found = np.column_stack([found, w / np.linalg.norm(w)])
    return found


def varying(differences, count):
    """The `count` orthonormal directions [D, count] of the greatest mean square of differences [N, D]: what
    changes between two views of one image (nuisance attribute projection, Solomonoff et al. 2005)."""
    return np.linalg.eigh(differences.T @ differences)[1][:, ::-1][:, :count]


def methods(known):
    """{name: (loss, directions [D, k] taken away from the features, or None; whether augmented views are
    trained on)} for what Backbone.read says of the training images."""
    x, healthy = known["features"], known["targets"] == 0
    ways = {
        "cross-entropy": (cross_entropy(), None, False),
        "label smoothing 0.1": (cross_entropy(0.1), None, False),
        "label smoothing 0.3": (cross_entropy(0.3), None, False),
        "logit normalisation, temperature 0.1": (of_directions(0.1), None, False),
        "logit normalisation, temperature 1": (of_directions(1.0), None, False),
        "augmented views": (cross_entropy(), None, True),
    }
    sources = {
        "without what tells the healthy series apart": (x[healthy], known["second series"][healthy]),
        "without what tells the stamped unit among the sick": (x[~healthy], known["stamped"][~healthy]),
    }
    for name, (features, source) in sources.items():
        if 0 < source.sum() < len(source):
            ways[name] = (cross_entropy(), telling(features, source), False)
    for count in (8, 32):
        directions = varying(known["views"] - x, count)
        ways[f"without the {count} directions in which views vary"] = (cross_entropy(), directions, False)
    return ways


def fit(features, targets, loss, seed=0):
    """Train a linear head on features [N, D], with class weights -> function: features [M, D] -> probability
    of target 1, float64 [M]."""
    torch.manual_seed(seed)
    head = torch.nn.Linear(features.shape[1], 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
    x, y = torch.from_numpy(features).float(), torch.from_numpy(targets).long()
    balance = len(y) / (2 * torch.bincount(y, minlength=2))
    for _ in range(EPOCHS):
        for some in torch.randperm(len(y)).split(BATCH):
            weights = balance[y[some]]
            optimizer.zero_grad(set_to_none=True)
            ((loss(head(x[some]), y[some]) * weights).sum() / weights.sum()).backward()
            optimizer.step()
    w = head.weight.detach().double().numpy()
    b = head.bias.detach().double().numpy()
    return lambda z: expit(z @ (w[1] - w[0]) + b[1] - b[0])


def trained(known, loss, away=None, views=False):
    """The head of one of `methods`: function: features [M, D] -> probability of target 1."""
    x, y = known["features"], known["targets"]
    if views:
        x, y = np.concatenate([x, known["views"]]), np.concatenate([y, y])
    keep = np.eye(x.shape[1]) if away is None else np.eye(x.shape[1]) - away @ away.T
    head = fit(x @ keep, y, loss)
    return lambda z: head(z @ keep)


# ---------------------------------------------------------------- what is read where


def stamped(train):
    """Boolean [N]: which images carry the stamp of one unit; none where the Kermany set is not at hand."""
    try:
        return np.any([kermany.stamped(train, part) for part in kermany.templates(train)], axis=0)
    except InputError:
        return np.zeros(len(train.files), bool)


class Backbone:
    """The features that a run's frozen backbone makes: float64 arrays [N, D]."""

    def __init__(self, run, device):
        self.name, self.config, self.score = str(run), run.config, Scorer(run, device)

    def features(self, subset, pixels=None, augment=None):
        """Of a Subset, of other pixels in its place, or of one augmented view of each image."""
        inputs = self.score.inputs
        changed = augment and (lambda model, grey: inputs.features(model, augment(grey)))
        return self.score.outputs(subset, pixels, changed or inputs.features).double().numpy()

    def read(self, nih):
        """(what heads are trained on, {part: (features, targets)} of all that the panel needs)."""
        train, val, _ = load_train_val(self.config, say)
        other, some, y = load_nih(nih, self.config), some_to_corrupt(val), val.targets
        torch.manual_seed(0)
        known = {
            "features": self.features(train),
            "views": self.features(train, augment=PRESETS["strong"]),
            "targets": train.targets,
            "validation": val.files,
            "second series": np.array(["NORMAL2" in f for f in train.files]),
            "stamped": stamped(train),
        }
        parts = {
            "validation": (self.features(val), y),
            "borrowed": (self.features(val, borrow_borders(val.pixels(), y, from_other_class=True)), y),
            "NIH": (self.features(other), other.targets),
        }
        for name, change in corruptions().items():
            changed = np.stack([change(image) for image in some.pixels()])
            parts[name] = self.features(some, changed), some.targets
        return known, parts

    def read_test(self):
        """(features, targets, patients) of the test images, which nothing above opens."""
        test = load_test(self.config)
        return self.features(test), test.targets, np.array(test.patients)


def figures(p, truth):
    """(a row of the table, the threshold of validation) from {part: probabilities [N]} and {part: 0 or 1}."""

    def read(part, threshold):
        return summarize_at_threshold(truth[part], p[part], threshold)

    home, away = (
        choose_threshold_by_min_recall(truth[k], p[k], MIN_RECALL)[0] for k in ("validation", "NIH")
    )
    changed = [read(part, home) for part in corruptions()]
    there, back = read("NIH", home), read("validation", away)
    row = {
        "val AUROC": back["auroc"],
        "corrupted recall": np.mean([c["recall"] for c in changed]),
        "corrupted spec": np.mean([c["specificity"] for c in changed]),
        "NIH AUROC": there["auroc"],
        "NIH recall": there["recall"],
        "NIH spec": there["specificity"],
        "back recall": back["recall"],
        "back spec": back["specificity"],
        "borrowed AUROC": roc_auc_score(truth["borrowed"], p["borrowed"]),
    }
    return {**row, **panel(row)}, home


def add_means(found):
    """To {(backbone, method): {part: probabilities}} the means over backbones, where there are several."""
    backbones = {backbone for backbone, _ in found}
    for method in [m for b, m in found if b == next(iter(found))[0]]:
        members = [found[b, method] for b in backbones if (b, method) in found]
        if len(members) == len(backbones) > 1:
            found["their mean", method] = {
                part: np.mean([member[part] for member in members], axis=0) for part in members[0]
            }


def show(title, rows):
    """Print {(backbone, head): {column: figure}} as a markdown table."""
    columns = list(next(iter(rows.values())))
    print(f"{title}\n\n| backbone | head | {' | '.join(columns)} |\n| --- | --- |{' ---: |' * len(columns)}")
    for names, row in rows.items():
        cells = [v if isinstance(v, str) else f"{v:.3f}" for v in row.values()]
        print(f"| {' | '.join([*names, *cells])} |")


def compare(backbones, nih):
    """Train all heads, print the panel and the choice, and then what the test images say."""
    found, heads, files = {}, {}, None
    for backbone in backbones:
        known, parts = backbone.read(nih)
        if files not in (None, known["validation"]):
            raise InputError(f"{backbone.name} has other validation images than {backbones[0].name}")
        files, truth = known["validation"], {name: y for name, (_, y) in parts.items()}
        for method, way in methods(known).items():
            head = heads[backbone.name, method] = trained(known, *way)
            found[backbone.name, method] = {name: head(x) for name, (x, _) in parts.items()}
    add_means(found)
    rows = {names: figures(p, truth) for names, p in found.items()}
    show("Before the test set", {names: row for names, (row, _) in rows.items()})
    panels = {n: row["panel"] for n, (row, _) in rows.items() if row["veto"] == "no"}
    panels = panels or {n: row["panel"] for n, (row, _) in rows.items()}
    print(f"\nChosen: {', '.join(max(panels, key=panels.get))}\n", flush=True)
    tested, after = {}, {}
    for backbone in backbones:
        x, y, patients = backbone.read_test()
        tested |= {n: {"test": head(x)} for n, head in heads.items() if n[0] == backbone.name}
    add_means(tested)
    for names, (_, threshold) in rows.items():
        p = tested[names]["test"]
        at, (auroc, low, high) = summarize_at_threshold(y, p, threshold), delong_interval(y, p)
        intervals = intervals_at_threshold(y, p, threshold, patients)
        after[names] = {"test AUROC": f"{auroc:.3f} [{low:.3f}, {high:.3f}]"}
        for key in ("recall", "specificity"):
            low, high = intervals[key]["bootstrap"]
            after[names][key] = f"{at[key]:.3f} [{low:.3f}, {high:.3f}]"
    show("On the test set, read after the choice", after)
    return rows, after


def main():
    parser = Parser(__doc__)
    parser.add_argument("--run", nargs="+", metavar="DIR", help="run folders (default: all in --runs-dir)")
    parser.add_argument("--runs-dir", default="outputs", metavar="DIR", help="folder of the run folders")
    parser.add_argument("--nih", required=True, metavar="DIR", help="images of another hospital")
    add_device_argument(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    compare([Backbone(run, device) for run in find_runs(args.runs_dir, args.run)], args.nih)


if __name__ == "__main__":
    start(main)
