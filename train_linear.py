"""Logistic regression on 32x32 grey pixels: the yardstick that a Vision Transformer must clearly beat.

    python train_linear.py

scikit-learn's LogisticRegression on mean-pooled, standardised pixels; the standardisation is folded into the
weights, so that outputs/linear holds a checkpoint.pth and results.json like any other run and calibrate.py
scores it in the same way. Takes seconds.
"""

import time
from dataclasses import asdict

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import common
import data
import demo
import engine
import plan
import recipe
from inputs import Inputs
from objective import Supervised
from vit import PixelLinear


def fold(fitted, scaler):
    """A LogisticRegression on standardised features -> (weight [K, D], bias [K]) on unscaled ones."""
    weight = fitted.coef_ / scaler.scale_  # [1 or K, D]
    bias = fitted.intercept_ - weight @ scaler.mean_
    if len(weight) == 1:  # two classes: scikit-learn keeps one row of log-odds
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    return weight, bias


def main():
    parser = common.Parser(__doc__)
    data.add_arguments(parser)
    penalty = common.Number(float, 1e-12, 1e12)
    parser.add_argument(
        "--C", type=penalty, default=0.01, metavar="X", help="inverse strength of the L2 penalty"
    )
    recipe.add_run_arguments(parser, out="outputs/linear")
    args = parser.parse_args()
    run = plan.run_from_args(args)
    demo.prepare(args)
    config = data.DataConfig.from_args(args)
    if config.img_size % 32:
        nearest = max(32, round(config.img_size / 32) * 32)
        raise common.InputError(
            f"--img-size must be a multiple of 32 here, such as {nearest}; got {config.img_size}"
        )
    train, val, split = data.load_train_val(config, common.tell)

    started = time.perf_counter()
    task, inputs = config.task, Inputs((0.0,), (1.0,), torch.device("cpu"), normalise=config.normalise)
    model = PixelLinear(num_classes=task.outputs).eval()
    scaler = StandardScaler()
    pooled = engine.predict(model, train, inputs, output=inputs.features, batch_size=256).double().numpy()
    fitted = LogisticRegression(C=args.C, max_iter=2000).fit(scaler.fit_transform(pooled), train.targets)
    weight, bias = fold(fitted, scaler)
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight))
        model.head.bias.copy_(torch.from_numpy(bias))
    seconds = time.perf_counter() - started

    row = {"lr": 0.0, "seconds": seconds}
    for name, subset in (("train", train), ("val", val)):
        logits = engine.predict(model, subset, inputs)
        row[f"{name}_loss"] = float(task.losses(logits, torch.from_numpy(subset.targets)).mean())
    row |= Supervised(task).watch(val.targets, logits)
    results = {
        "model": "linear",
        "model_config": {"kind": "linear", **model.config},
        "data": asdict(config),
        "split": split,
        "recipe": {"C": args.C, "amp": False},
        "mean": inputs.mean,
        "std": inputs.std,
        "input_range": data.input_range(train),
        "params": fitted.coef_.size + len(fitted.intercept_),
        "minutes": seconds / 60,
        "synthetic": split["synthetic"],
        "best_epoch": 1,
        "seed": 0,
        "device": "cpu",
        "history": [row],
    }
    plan.save_run(run, model, results)
    common.tell(
        f"logistic regression on 32x32 pixels: val AUROC {row['val_auroc']:.4f}; "
        f"wrote {run}/checkpoint.pth and results.json"
    )


if __name__ == "__main__":
    common.start(main)
