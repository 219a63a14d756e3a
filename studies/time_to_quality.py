"""Minutes of training until validation AUROC reaches 0.95 and 0.975: AdamW, Muon, and a plain loop.

    python studies/time_to_quality.py --data-dir Data/chest_xray --seeds 0 1 2

Three ways to train one architecture (--model) from scratch, in turns, a seed after the other:

- adamw, muon: this project's loop and ViT, with --optimiser adamw and muon;
- plain: torchvision's ViT, AdamW and cross-entropy in a loop of a few lines.

All get the same decoded images from memory, in float32 or bf16 alike (--amp), unchanged: no augmentation, no
average of the weights. Batch, peak rate, warm-up, cosine, weight decay and epochs are the same. Only the
project's loop has its class weights, label smoothing and clipping.

A target is reached at the end of the first epoch whose validation AUROC is at least as high. Its minutes
count all epochs until then, validation included. Prints a table, and writes each epoch to --out, a JSON file,
after every training.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torchvision.models import VisionTransformer as PlainViT

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

import data
from common.cli import COUNT, SEED, Parser
from common.console import InputError, command_line, start
from common.device import (
    add_device_argument,
    autocast,
    device_name,
    fast_bf16,
    pick_device,
    seed_everything,
    versions,
)
from common.files import write_json
from images.augment import parse_augment
from images.subset import Subset
from models.batches import Batches
from models.inputs import Inputs
from records.run import Run
from training import plan as plans
from training.evaluate import predict
from training.loop import Loop
from training.loss import supervised
from training.recipe import Recipe
from training.step import learning_rate
from vit import CONFIGS, build_vit

TARGETS = (0.95, 0.975)
WAYS = ("adamw", "muon", "plain")


@dataclass(frozen=True)
class Task:
    """What all ways share: the sets, how they are shown, the settings, and the architecture's name."""

    train: Subset
    val: Subset
    config: data.DataConfig
    inputs: Inputs
    recipe: Recipe
    model: str


def by_project(task, optimiser):
    """Train by the project's loop -> [(seconds of an epoch, validation AUROC)]."""
    recipe = replace(task.recipe, optimiser=optimiser)
    seed_everything(recipe.seed)
    model = build_vit(task.model, img_size=task.config.img_size, drop_rate=0.0, drop_path_rate=0.0)
    objective = supervised(recipe, task.config.task, task.train.targets, task.val.targets, task.inputs.device)
    with tempfile.TemporaryDirectory() as folder:
        augment, device, amp = parse_augment("none"), task.inputs.device, task.inputs.amp
        plan = plans.Plan(recipe, augment, task.config, Run(Path(folder, "run")), device, amp)
        about = {"kind": model.kind, **model.config}
        meta = {"model_config": about, "recipe": {}, "data": {}, "split": {"synthetic": False}}
        results = Loop(model, objective, plan, task.inputs, meta).fit(task.train, task.val)
    return [(row["seconds"], row["val_auroc"]) for row in results["history"]]


def plain_model(task):
    """torchvision's ViT of the same size."""
    config = CONFIGS[task.model]
    dim = config["embed_dim"]
    shape = (task.config.img_size, config["patch_size"], config["depth"], config["num_heads"], dim, 4 * dim)
    return PlainViT(*shape, num_classes=2).to(task.inputs.device)


def by_plain_loop(task):
    """Train torchvision's ViT -> as by_project."""
    recipe, inputs = task.recipe, task.inputs
    seed_everything(recipe.seed)
    model, source = plain_model(task), Batches(task.train, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps, history = -(-len(task.train) // recipe.batch_size), []
    for epoch in range(recipe.epochs):
        began = time.perf_counter()
        model.train()
        for step, index in enumerate(torch.randperm(len(task.train)).split(recipe.batch_size)):
            done, total = epoch * steps + step, recipe.epochs * steps
            optimizer.param_groups[0]["lr"] = learning_rate(done, total, steps, recipe.lr)
            batch = source.get(index)
            with autocast(inputs.device, inputs.amp):
                outputs = model(inputs.scale(batch.x))
            loss = F.cross_entropy(outputs.float(), batch.target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        logits = predict(model, task.val, inputs).float()
        quality = float(roc_auc_score(task.val.targets, logits[:, 1] - logits[:, 0]))
        history.append((time.perf_counter() - began, quality))
        print(f"plain, epoch {epoch + 1}/{recipe.epochs}: val AUROC {quality:.4f}", flush=True)
    return history


def minutes_until(history, target):
    """Minutes until the end of the first epoch that reaches a target; None if none does."""
    passed = 0.0
    for seconds, quality in history:
        passed += seconds
        if quality >= target:
            return passed / 60
    return None


def cell(minutes):
    """The mean of several trainings' minutes with their spread; how many reached the target, if not all."""
    reached = [m for m in minutes if m is not None]
    if not reached:
        return "never"
    text = f"{np.mean(reached):.1f}"
    if len(reached) > 1:
        text += f" ({min(reached):.1f} to {max(reached):.1f})"
    if len(reached) < len(minutes):
        text += f", {len(reached)} of {len(minutes)} seeds"
    return text


def table(trainings):
    """Lines of the table of [{"way", "seed", "history"}]."""
    head = " | ".join(f"minutes to {target:g}" for target in TARGETS)
    lines = [
        f"| way | seeds | {head} | minutes an epoch | best AUROC |",
        "| --- | ---: | " + "---: | " * len(TARGETS) + "---: | ---: |",
    ]
    for way in WAYS:
        histories = [t["history"] for t in trainings if t["way"] == way]
        if not histories:
            continue
        cells = [cell([minutes_until(h, target) for h in histories]) for target in TARGETS]
        seconds = np.mean([row[0] for h in histories for row in h])
        best = np.mean([max(row[1] for row in h) for h in histories])
        words = [way, str(len(histories)), *cells, f"{seconds / 60:.2f}", f"{best:.4f}"]
        lines.append(f"| {' | '.join(words)} |")
    return lines


def add_own_arguments(parser):
    """The flags besides those of data."""
    group = parser.add_argument_group("study")
    group.add_argument("--model", choices=tuple(CONFIGS), default="scratch", help="architecture")
    group.add_argument("--epochs", type=COUNT, default=15, metavar="N", help="epochs of each training")
    group.add_argument("--seeds", type=SEED, nargs="+", default=[0, 1, 2], metavar="N", help="one turn each")
    group.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS), help="which to train")
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, default=None, help="bf16")
    out = "time_to_quality.json"
    group.add_argument("--out", type=Path, default=Path(out), metavar="FILE", help="JSON file to write")
    add_device_argument(group)


def main():
    parser = Parser(__doc__)
    data.add_arguments(parser, also=False)
    add_own_arguments(parser)
    args = parser.parse_args()
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: name a file in a folder that is there")
    device, amp = pick_device(args.device), args.amp
    if amp is None:
        amp = fast_bf16(device)
    plans.provide_data(args)
    config = data.DataConfig.from_args(args)
    if config.task.outputs != 2:
        raise InputError("this study compares two classes: leave out --labels and --classes of more")
    train, val, split = data.load_train_val(config)

    inputs, trainings = Inputs((0.5,) * 3, (0.5,) * 3, device, amp=amp), []
    described = {"device": device_name(device), "amp": amp, "versions": versions()}
    described |= {"command": command_line(), "synthetic": split["synthetic"], "model": args.model}
    for seed in args.seeds:
        recipe = Recipe(epochs=args.epochs, patience=args.epochs + 1, seed=seed)
        task = Task(train, val, config, inputs, recipe, args.model)
        for way in args.ways:
            history = by_plain_loop(task) if way == "plain" else by_project(task, way)
            trainings.append({"way": way, "seed": seed, "history": history})
            write_json(args.out, {**described, "targets": TARGETS, "trainings": trainings})
    drawn = " on drawn images, not patients" if split["synthetic"] else ""
    print(f"\n{args.epochs} epochs of {len(train)} images{drawn}, {device_name(device)}\n")
    print("\n".join(table(trainings)))


if __name__ == "__main__":
    start(main)
