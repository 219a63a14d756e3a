"""Logistic regression on 32x32 grey pixels: the yardstick that a Vision Transformer must clearly beat.

    python train_linear.py

scikit-learn's LogisticRegression on mean-pooled, standardised pixels; the standardisation is folded into the
weights, so that outputs/linear holds a checkpoint.pth and results.json like any other run and calibrate.py
scores it in the same way. Takes seconds.
"""

import common.prelude  # noqa: F401  (first: from here on Ctrl-C and a missing package end in one line)

import time
from dataclasses import asdict, fields

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import data
from common.cli import Number, Parser, add_flags
from common.console import InputError, start, tell
from data import add_arguments
from images.split import epoch_order, image_weights
from images.subset import input_range
from models.build import PixelLinear
from models.inputs import Inputs
from records.track import Tracker
from training import plan, recipe
from training.earlier import folder
from training.evaluate import predict
from training.loss import Supervised

BALANCES = ("none", "weights", "undersample-once", "sources")


def fit(features, targets, C, task, weights=None, balanced=False):
    """Logistic regression on standardised features [N, D] -> (weight [K, D], bias [K]) on unscaled ones.
    weights: float [N], what each image counts for; `balanced`: times Task.class_weights.

    Classes: one multinomial model. Findings: a model each, on the images whose label is known; one that has
    no positive or no negative image gets the same small or great score everywhere."""
    scaler = StandardScaler()
    scaled = scaler.fit_transform(features)
    weights = np.ones(len(features)) if weights is None else weights
    rare = task.class_weights(targets) if balanced else np.ones(task.outputs)

    def regression(known, y, factor):
        return LogisticRegression(C=C, max_iter=2000).fit(scaled[known], y, weights[known] * factor)

    if task.kind == "softmax":
        everything = np.arange(len(targets))
        return fold(regression(everything, targets, rare[targets]), scaler, both=True)
    rows = []
    for k in range(task.outputs):
        known = np.flatnonzero(targets[:, k] >= 0)
        y = targets[known, k]
        if 0 < y.sum() < len(y):
            rows.append(fold(regression(known, y, np.where(y == 1, rare[k], 1)), scaler))
        else:
            rows.append((np.zeros((1, features.shape[1])), np.log([(y.sum() + 0.5) / ((1 - y).sum() + 0.5)])))
    return tuple(np.concatenate(parts) for parts in zip(*rows))


def fold(fitted, scaler, both=False):
    """A LogisticRegression on standardised features -> (weight [K, D], bias [K]) on unscaled ones; `both`: of
    two classes a row each, where scikit-learn keeps one row of log-odds."""
    weight = fitted.coef_ / scaler.scale_  # [1 or K, D]
    bias = fitted.intercept_ - weight @ scaler.mean_
    if both and len(weight) == 1:
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    return weight, bias


def watched(model, task, inputs, parts, others):
    """What a row of the history says of a fitted model on the Subsets in `parts` and in `others`, by name."""
    row = {"others": {}}
    for name, subset in parts.items():
        logits, targets = predict(model, subset, inputs), torch.from_numpy(subset.targets)
        row[f"{name}_loss"] = float(task.losses(logits, targets).sum() / task.weights(targets).sum())
        row |= Supervised(task).watch(subset.targets, logits, name)
    for name, subset in others.items():
        logits = predict(model, subset, inputs)
        row["others"][name] = Supervised(task).watch(subset.targets, logits, "held_out")
    return row


def main():
    parser = Parser(__doc__, recipe.EVERYDAY)
    add_arguments(parser)
    group = parser.add_argument_group("recipe")
    penalty = Number(float, 1e-12, 1e12)
    group.add_argument(
        "--C", type=penalty, default=0.01, metavar="X", help="inverse strength of the L2 penalty"
    )
    text = "rare classes, as in the other training scripts"
    group.add_argument("--balance", choices=BALANCES, default="none", help=text)
    others = [field.name for field in fields(recipe.Recipe) if field.name != "test_views"]
    add_flags(group, recipe.Recipe, leave_out=others)
    recipe.add_run_arguments(parser, out="outputs/linear")
    args = parser.parse_args()
    # As in training by epochs: what can be refused is, before data are drawn or fetched.
    run = folder.run_from_args(args)
    plan.provide_data(args)
    config, _ = plan.balanced(data.DataConfig.from_args(args), args.balance, None)
    if config.img_size % 32:
        nearest = max(32, round(config.img_size / 32) * 32)
        raise InputError(
            f"--img-size must be a multiple of 32 here, such as {nearest}; got {config.img_size}"
        )
    with plan.training(run):
        train_linear(args, config, run)


def train_linear(args, config, run):
    """Load the data, fit the model, write the run."""
    images = plan.prepare_data(config, {})
    train = images.train
    if args.balance == "undersample-once":  # the images that the other arms are trained on, with --seed 0
        train = train.take(np.sort(epoch_order(0, 0, train.targets, args.balance)))
        tell(f"trained on {len(train)} images, as many of each class as of the rarest")

    # The features are pooled pixels; the model is linear in them, so the fit becomes its weights.
    started = time.perf_counter()
    task, inputs = config.task, Inputs((0.0,), (1.0,), torch.device("cpu"), input_mode=config.input)
    model = PixelLinear(num_classes=task.outputs).eval()
    pooled = predict(model, train, inputs, output=inputs.features, batch_size=256).double().numpy()
    weights = image_weights(train.targets, train.sources, args.balance)
    weight, bias = fit(pooled, train.targets, args.C, task, weights, args.balance == "weights")
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight))
        model.head.bias.copy_(torch.from_numpy(bias))
    seconds = time.perf_counter() - started

    # The same keys as those of a run of several epochs, so that reports need not tell them apart.
    sides = {"train": train, "val": images.val}
    row = {"lr": 0.0, "seconds": seconds} | watched(model, task, inputs, sides, images.others)
    free = len(weight)
    if task.outputs == 2 and task.kind == "softmax":  # two classes have one row of log-odds
        free = 1
    results = {
        "model": "linear",
        "model_config": {"kind": "linear", **model.config},
        "data": asdict(config),
        "split": images.split,
        "recipe": {"C": args.C, "balance": args.balance, "test_views": args.test_views, "amp": False},
        "mean": inputs.mean,
        "std": inputs.std,
        "input_range": input_range(images.train),
        "params": free * (weight.shape[1] + 1),
        "minutes": seconds / 60,
        "synthetic": images.split["synthetic"],
        "best_epoch": 1,
        "seed": 0,
        "device": "cpu",
        "history": [row],
    }
    plan.save_run(run, model, results)
    tracker = Tracker(args.track, run)
    tracker.begin({k: results[k] for k in ("model", "data", "split", "recipe")})
    tracker.end(results)
    tracker.close()
    tell(
        f"logistic regression on 32x32 pixels: val AUROC {row['val_auroc']:.4f}; "
        f"wrote {run}/checkpoint.pth and results.json"
    )


if __name__ == "__main__":
    start(main)
