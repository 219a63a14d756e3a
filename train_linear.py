"""Logistic regression on 32x32 grey pixels: the yardstick that no Vision Transformer may be proud of only reaching.

    python train_linear.py

scikit-learn's LogisticRegression on mean-pooled, standardised pixels; the standardisation is folded into the
weights, so that outputs/linear holds a checkpoint.pth and results.json like any other run and calibrate.py
scores it in the same way. Takes seconds.
"""

import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import common
import data
import engine
from vit import PixelLinear

MEAN, STD = (0.0,), (1.0,)  # pixels in [0, 1] go in as they are


def pooled(model, subset):
    """Mean-pooled pixels of a Subset, float64 [N, side^2], by the model's own forward pass."""
    batches = data.Batches(subset, "cpu")
    parts = [model.forward_features(batches.get(index)[0]) for index in torch.arange(len(subset)).split(256)]
    return torch.cat(parts).double().numpy()


def main():
    parser = common.parser(__doc__)
    data.add_arguments(parser)
    parser.add_argument("--C", type=float, default=0.01, help="inverse strength of the L2 penalty")
    engine.add_run_arguments(parser, out="outputs/linear")
    args = parser.parse_args()
    if not args.C > 0:
        raise common.InputError(f"--C must be positive, got {args.C}")
    out = engine.out_from_args(args)
    config = data.config_from_args(args)
    if config.img_size % 32:
        raise common.InputError(f"--img-size must be a multiple of 32 here, got {config.img_size}")
    train, val, split = data.load_train_val(config)

    started = time.perf_counter()
    model = PixelLinear(num_classes=len(config.classes)).eval()
    scaler = StandardScaler()
    x = scaler.fit_transform(pooled(model, train))
    fitted = LogisticRegression(C=args.C, max_iter=2000).fit(x, train.labels)
    weight = fitted.coef_ / scaler.scale_  # [1 or K, side^2]
    bias = fitted.intercept_ - weight @ scaler.mean_
    if len(weight) == 1:  # two classes: scikit-learn keeps one row of log-odds
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight))
        model.head.bias.copy_(torch.from_numpy(bias))

    def loss_and_auroc(subset):
        logits = engine.predict(model, subset, mean=MEAN, std=STD, device=torch.device("cpu"), amp=False)
        labels = torch.from_numpy(subset.labels)
        return float(torch.nn.functional.cross_entropy(logits, labels)), engine.binary_auroc(
            subset.labels, logits
        )

    seconds = time.perf_counter() - started
    (train_loss, _), (val_loss, val_auroc) = loss_and_auroc(train), loss_and_auroc(val)
    engine.save_run(
        out,
        model,
        {
            "model": "linear",
            "model_config": {"kind": "linear", **model.config},
            "data": asdict(config),
            "split": split,
            "recipe": {"C": args.C, "amp": False},
            "mean": MEAN,
            "std": STD,
            "input_range": data.input_range(train),
            "params": fitted.coef_.size + len(fitted.intercept_),
            "minutes": seconds / 60,
            "synthetic": split["synthetic"],
            "best_epoch": 1,
            "seed": 0,
            "device": "cpu",
            "history": [
                {
                    "train_loss": train_loss,
                    "val_loss": val_loss,
                    "val_auroc": val_auroc,
                    "lr": 0.0,
                    "seconds": seconds,
                }
            ],
        },
    )
    print(
        f"logistic regression on 32x32 pixels: val AUROC {val_auroc:.4f}; "
        f"wrote {Path(out)}/checkpoint.pth and results.json"
    )


if __name__ == "__main__":
    common.start(main)
