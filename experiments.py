"""Tell recipes apart without looking at the test set: selection signals made of the training folder alone.

    python experiments.py plain strong --weights ../shared/weights/ViT-Ti_16-224.npz --epochs 3 --img-size 112

Ordinary validation cannot tell recipes apart (all reach AUROC 0.99). For each named recipe this trains a small
proxy twice, each time with half of the sources left out, and prints a markdown row as soon as it is known:

- source: NORMAL images of one file-name series (IM- or NORMAL2-IM-) and PNEUMONIA of one half of the patient numbers
  are trained on, the others scored. "Spec" and "recall" are at the recall-first threshold of the held-out patients
  of the sources that were trained on, as calibrate.py does with validation and test.
- corrupted: the same held-out patients under corruptions (after ImageNet-C, Hendrycks and Dietterich 2019,
  arXiv:1903.12261): mean AUROC, and specificity and recall at the clean threshold.

The test folder is counted, never opened. Results go to stdout and, one JSON line each, to outputs/experiments.jsonl.
"""
import contextlib
import io
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common
import data
import engine
import metrics
import npz_loader
from vit import CONFIGS, build_vit

STRONG = dict(rotate=15.0, translate=0.1, scale=0.25, aspect=0.15, brightness=0.25, contrast=0.4, gamma=0.5)
RECIPES = {  # name -> changes of Augment, of DataConfig ("normalise") and of the optimisation
    "plain": {},
    "none": dict(rotate=0.0, translate=0.0, scale=0.0, brightness=0.0, contrast=0.0),
    "strong": STRONG,
    "geometry": {k: STRONG[k] for k in ("rotate", "translate", "scale", "aspect")},
    "exposure": {k: STRONG[k] for k in ("brightness", "contrast", "gamma")},
    "strong-erase": {**STRONG, "erase": 0.5},
    "strong-blur": {**STRONG, "blur": 0.3, "noise": 0.05},
    "strong-all": {**STRONG, "blur": 0.3, "noise": 0.05, "erase": 0.5},
    "standard": dict(normalise="standard"),
    "equalise": dict(normalise="equalise"),
    "standard-strong": {**STRONG, "normalise": "standard"},
    "equalise-strong": {**STRONG, "normalise": "equalise"},
    "strong-flip": {**STRONG, "hflip": 0.5},
    "strong-slow": {**STRONG, "lr_factor": 0.3},
    "strong-fast": {**STRONG, "lr_factor": 2.0},
}


def source_fold(files, labels, fold):
    """Boolean [N]: is the image of a source that `fold` (0 or 1) trains on."""
    patients = [data.patient_id(f) for f in files]
    numbers = np.array([int(p[6:]) if p.startswith("person") else -1 for p in patients])
    series = np.array([p.startswith("NORMAL2") for p in patients])
    first = np.where(labels == 1, numbers <= np.median(numbers[labels == 1]), ~series)
    if min(first[labels == k].mean() for k in (0, 1)) in (0, 1) or not (numbers[labels == 1] >= 0).all():
        raise common.InputError("the file names do not tell sources apart: this needs the Kermany set's own names")
    return first if fold == 0 else ~first


def corruptions():
    """{name: uint8 [S, S] -> uint8 [S, S]}: fixed changes of exposure, sharpness, noise, compression and framing."""
    rng = np.random.default_rng(0)

    def levels(f):
        return lambda x: (f(x / 255.0).clip(0, 1) * 255).round().astype(np.uint8)

    def through(f):
        return lambda x: np.asarray(f(Image.fromarray(x)))

    def jpeg(image):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=15)
        return Image.open(buffer)

    def smaller(image, factor):
        side = image.size[0]
        return image.resize((round(side * factor),) * 2, Image.Resampling.BILINEAR).resize((side,) * 2, Image.Resampling.BILINEAR)

    def crop(image):
        side = image.size[0]
        box = (0.1 * side, 0.04 * side, 0.96 * side, 0.9 * side)
        return image.resize((side, side), Image.Resampling.BILINEAR, box=box)

    return {"darker": levels(lambda x: x - 0.15), "brighter": levels(lambda x: x + 0.15),
            "flatter": levels(lambda x: (x - x.mean()) * 0.6 + x.mean()),
            "harder": levels(lambda x: (x - x.mean()) * 1.5 + x.mean()),
            "gamma 0.6": levels(lambda x: x ** 0.6), "gamma 1.6": levels(lambda x: x ** 1.6),
            "noise": levels(lambda x: x + rng.normal(0, 0.06, x.shape)), "jpeg 15": through(jpeg),
            "blur": through(lambda i: smaller(i, 0.35)), "crop and shift": through(crop)}


def operating_point(y, p, thr):
    """(specificity, recall) of p >= thr."""
    row = metrics.summarize_at_threshold(y, p, thr)
    return row["specificity"], row["recall"]


def build(args, img_size):
    """A fresh model and its input scaling: pretrained with --weights, else the scratch ViT."""
    if not args.weights:
        return build_vit("scratch", img_size=img_size), (0.5,) * 3, (0.5,) * 3
    shape = npz_loader.config_from_npz(args.weights)
    name = next((n for n, c in CONFIGS.items() if c["embed_dim"] == shape["embed_dim"] and n != "scratch"), "b16")
    model = build_vit(name, img_size=img_size, **{**shape, "drop_rate": 0.0})
    report = npz_loader.load_npz(model, args.weights)
    return model, report["mean"], report["std"]


def signals(name, everything, config, args, device):
    """Train both folds of a recipe and measure -> {signal: value}."""
    changes = dict(RECIPES[name])
    mode = changes.pop("normalise", "none")
    lr = args.lr * changes.pop("lr_factor", 1.0)
    amp, rows = engine.fast_bf16(device), []
    for fold in (0, 1):
        inside = source_fold(everything.files, everything.labels, fold)
        known, other = (replace(everything.take(np.flatnonzero(m)), normalise=mode) for m in (inside, ~inside))
        train, val = (known.take(i) for i in data.split_train_val(known.files, known.labels, seed=args.seed))
        engine.seed_everything(args.seed)
        model, mean, std = build(args, config.img_size)
        weight = engine.class_weights(train.labels, 2).to(device)
        augment = replace(data.Augment(), **changes)
        meta = {"model": name, "model_config": {"kind": "vit", **model.config}, "recipe": asdict(augment), "data": {},
                "split": {"synthetic": False}, "mean": mean, "std": std}
        with contextlib.redirect_stdout(sys.stderr):
            engine.fit(model, train, val, out=Path(args.work, f"{name}-{fold}"), meta=meta, mean=mean, std=std,
                       augment=augment, loss_fn=engine.cross_entropy(weight, 0.05), device=device, amp=amp,
                       epochs=args.epochs, batch_size=32, lr=lr, weight_decay=0.05, schedule="cosine",
                       warmup_epochs=0.5, clip=1.0, patience=args.epochs, seed=args.seed)

        def score(subset):
            logits = engine.predict(model, subset, mean=mean, std=std, device=device, amp=amp, batch_size=128)
            return engine.probabilities(logits)[:, 1]

        p_val, p_other = score(val), score(other)
        thr, _, _ = metrics.choose_threshold_by_min_recall(val.labels, p_val, 0.95)
        broken = []
        for change in corruptions().values():
            images = np.stack([change(val.images[r]) for r in val.rows])
            p = score(data.Subset(val.files, val.labels, images, np.arange(len(images)), mode))
            broken.append((metrics.roc_auc_score(val.labels, p), *operating_point(val.labels, p, thr)))
        rows.append([metrics.roc_auc_score(val.labels, p_val), metrics.roc_auc_score(other.labels, p_other),
                     *operating_point(other.labels, p_other, thr), *np.mean(broken, axis=0)])
    names = ("val AUROC", "source AUROC", "source spec", "source recall", "corrupted AUROC", "corrupted spec",
             "corrupted recall")
    return dict(zip(names, np.mean(rows, axis=0).tolist()))


def main():
    parser = common.parser(__doc__)
    parser.add_argument("recipes", nargs="+", choices=RECIPES, metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("--data-dir", default=data.DEFAULT_DIR, help="folder with train/ and test/")
    parser.add_argument("--cache-dir", default="Data/cache", help="where decoded images are kept")
    parser.add_argument("--img-size", type=int, default=112, help="side of the proxy's input, px")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of the proxy; its last one is scored")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights, order and augmentation")
    parser.add_argument("--weights", default=None, metavar="PATH", help="pretrained weights (default: from scratch)")
    parser.add_argument("--device", default="auto", help="auto (cuda > mps > cpu), cuda, mps, cpu")
    parser.add_argument("--work", default="outputs/experiments", help="folder for the proxies' files")
    args = parser.parse_args()
    device = engine.pick_device(args.device)
    config = data.DataConfig(args.data_dir, args.img_size, cache_dir=args.cache_dir)
    train, val, _ = data.load_train_val(config)
    everything = data.Subset(train.files + val.files, np.r_[train.labels, val.labels], train.images,
                             np.r_[train.rows, val.rows])
    header = None
    for name in args.recipes:
        started = time.perf_counter()
        row = {**signals(name, everything, config, args, device), "minutes": (time.perf_counter() - started) / 60}
        if header is None:
            header = ["recipe", *row]
            print("| " + " | ".join(header) + " |\n| --- |" + " ---: |" * len(row))
        print(f"| {name} | " + " | ".join(f"{v:.3f}" for v in row.values()) + " |", flush=True)
        with open(Path(args.work).with_suffix(".jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps({"recipe": name, "changes": RECIPES[name], "command": common.command_line(), **row}) + "\n")


if __name__ == "__main__":
    common.start(main)
