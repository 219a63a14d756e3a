"""How fast is each arm, against the same network in a plain timm loop?

    python studies/arms.py

Random weights, random images in memory, no decoding: one training step (scaling, the plain augmentation,
loss, gradient, AdamW) and one evaluation of a batch, ours and the baseline's in turns. The baseline is timm's
own model, cross-entropy and AdamW in fp32, on scaled images, without augmentation. The hybrid has no twin in
timm: its baseline is its stem. Prints markdown: medians in images a second, and their ratio with its range.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

import timm

import data
from common.cli import COUNT, Parser
from common.console import start
from common.device import add_device_argument, fast_bf16, pick_device
from data import Batches
from images.augment import Augment
from images.subset import Subset
from models.cnn import Cnn
from models.hybrid import Hybrid
from models.inputs import Inputs
from records.run import Run
from studies import workload
from training import loop as loop_module
from training.evaluate import predict
from training.plan import Plan
from vit import CONFIGS, build_vit

SIDE = 224
CNNS = ("tf_efficientnet_lite0", "resnet50", "densenet121", "regnety_004", "convnextv2_tiny")
ARMS = {  # name: (ours, timm's)
    "ViT-Ti/16": (lambda: build_vit("ti16"), "vit_tiny_patch16_224"),
    "DINOv2 ViT-S/14": (lambda: build_vit("s14"), "vit_small_patch14_dinov2"),
    "two-lung hybrid on Ti/16": (
        lambda: Hybrid({**CONFIGS["ti16"], "img_size": SIDE, "num_classes": 1}),
        "vit_tiny_patch16_224",
    ),
    **{name: (lambda name=name: Cnn(name), name) for name in CNNS},
}


def ours(model, count, args, folder):
    """(a training step, an evaluation) of `count` images by this project's modules."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, SIDE, SIDE), dtype=np.uint8)
    masks = np.zeros((count, SIDE, SIDE // 8), np.uint8)
    masks[:, SIDE // 4 : 3 * SIDE // 4, SIDE // 32 : SIDE * 3 // 32] = 255
    files, targets = [f"{i}.png" for i in range(count)], np.arange(count) % 2
    subset = Subset(files, targets, images, np.arange(count), masks=masks)
    reads = getattr(model, "reads_lungs", False)
    inputs = Inputs(workload.MEAN, workload.MEAN, args.device, args.amp, reads_lungs=reads)
    config = data.DataConfig(str(folder), SIDE)
    plan = Plan(workload.RECIPE, Augment(), config, Run(folder / "run"), args.device, args.amp)
    objective = workload.Unwatched(config.task)
    loop = loop_module.Loop(model, objective, plan, inputs, {"split": {"synthetic": False}})
    loop.prepare(count)
    source, index = Batches(subset, inputs), torch.arange(count)

    def step():
        loop.net.train()
        loop.optimizer.zero_grad(set_to_none=True)
        loop.gradient.add(loop.net, source, index)
        torch.nn.utils.clip_grad_norm_(loop.net.parameters(), workload.RECIPE.clip)
        loop.optimizer.step()
        loop.gradient.seen = []

    return step, lambda: predict(model, subset, inputs, batch_size=count)


def plain(name, count, args):
    """The same by timm."""
    size = {"img_size": SIDE} if "dinov2" in name else {}
    model = timm.create_model(name, num_classes=2, **size).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x, y = torch.randn(count, 3, SIDE, SIDE, device=args.device), torch.arange(count, device=args.device) % 2

    def step():
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate():
        return model.eval()(x).cpu()

    return step, evaluate


def seconds(function):
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main():
    parser = Parser(__doc__)
    parser.add_argument("--batch-size", type=COUNT, default=16, metavar="N", help="images a step")
    parser.add_argument("--repeats", type=COUNT, default=5, metavar="N", help="turns that are counted")
    parser.add_argument(
        "--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="which (default: all)"
    )
    text = "ours in bf16 (default: where the device does it fast); timm's loop is always fp32"
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=None, help=text)
    add_device_argument(parser)
    args = parser.parse_args()
    args.device = pick_device(args.device)
    args.amp, count = fast_bf16(args.device) if args.amp is None else args.amp, args.batch_size
    print("| arm | training: ours | timm | ratio | evaluation: ours | timm | ratio |")
    print("| --- |" + " ---: |" * 6)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.arms:
            build, peer = ARMS[name]
            model, cells = build().to(args.device), []
            for mine, theirs in zip(ours(model, count, args, Path(folder)), plain(peer, count, args)):
                turns = [(seconds(mine), seconds(theirs)) for _ in range(args.repeats + 1)][1:]
                a, b = (count / statistics.median(t) for t in zip(*turns))
                ratios = [theirs / mine for mine, theirs in turns]
                spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                cells += [f"{a:.1f}", f"{b:.1f}", spread]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    start(main)
