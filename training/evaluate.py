"""A network that is not being trained: what it makes of images, and a head trained on that.

The loop that trains is in loop.py.
"""

import math
import time

import numpy as np
import torch
import torch.distributed as dist

from common import console
from common.console import InputError, say
from common.device import gather, processes
from images.split import epoch_order, image_weights
from models.batches import Batches
from training.loss import total_weight


@torch.inference_mode()
def predict(model, subset, inputs, *, output=None, batch_size=64, progress=None):
    """What `output(model, grey)` gives for every image of a Subset, in order; float32 [N, ...] on the CPU.

    By default the logits, `inputs.logits`. The model is in eval mode meanwhile; no augmentation.
    `progress`: how to call this where it says how far it is; None: it does not."""
    output = output or inputs.logits
    was_training = model.training
    model.eval()
    batches, results = Batches(subset, inputs), []
    chunks = torch.arange(len(subset)).split(batch_size)
    for index in console.progress(chunks, len(subset), progress, "images", size=len):
        results.append(output(model, batches.get(index).x))
    model.train(was_training)
    return torch.cat(results).cpu()


def predict_together(model, subset, inputs, title):
    """The logits of every image of a Subset, in order, on the CPU; under torchrun every process takes its
    share."""
    rank, number = processes()
    if number > 1:  # each has BatchNorm's statistics of its own images; those of the first one are kept
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    mine = subset.take(np.arange(rank, len(subset), number))
    own_logits = predict(model, mine, inputs, progress=title)
    logits = own_logits.new_empty(len(subset), own_logits.shape[1])
    for other, share in enumerate(gather(own_logits)):
        logits[other::number] = share
    return logits


def fit_head(model, train, stage, *, objective, recipe, inputs, augment=None):
    """Stage 1 of two-stage fine-tuning (Kumar et al. 2022, arXiv:2202.10054): train model.head alone, in
    place.

    The frozen backbone's features of each image, and of recipe.probe_views views of it that `augment` draws,
    are computed once, so an epoch costs milliseconds; the result is that of epochs through the frozen
    backbone, to rounding. Returns the last epoch's mean loss, and the outputs for the images themselves, on
    the CPU.
    """
    started = time.perf_counter()
    model.to(inputs.device)

    def view(model, grey):
        return inputs.features(model, augment(grey))

    # Each image as it is, then its views; what the head reads of them does not change any more.
    views = [inputs.features] + [view] * recipe.probe_views
    features = [predict(model, train, inputs, output=v, progress="features") for v in views]
    features = torch.cat(features).to(inputs.device)  # (views * N, D)
    all_targets = np.concatenate([train.targets] * len(views))
    sources = np.concatenate([train.sources] * len(views))
    weights = torch.from_numpy(image_weights(all_targets, sources, recipe.balance)).to(inputs.device)
    targets = torch.from_numpy(all_targets).to(inputs.device)

    # The head's own AdamW, and orders of epochs as in the loop.
    decay = recipe.weight_decay if recipe.head_decay is None else recipe.head_decay
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=stage.lr, weight_decay=decay)
    say_stage(model, stage)
    model.head.train()
    rows, balance = np.arange(len(all_targets)), recipe.balance
    if len(views) > 1 and balance == "undersample-once":  # the same images in all views
        once = epoch_order(recipe.seed, 0, train.targets, balance, train.sources)
        rows, balance = (once + len(train) * np.arange(len(views))[:, None]).ravel(), "none"
    for epoch in range(stage.epochs):
        order = rows[epoch_order(recipe.seed, epoch, all_targets[rows], balance, sources[rows])]
        total = 0.0
        for index in torch.from_numpy(order).to(inputs.device).split(recipe.batch_size):
            y, w = targets[index], weights[index]
            losses = objective.losses(model.head(features[index]), y) * w
            loss = losses.sum() / total_weight(objective, y, w)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(index)

    # The outputs are for the images as they are.
    mean = float(total) / len(order)
    if not math.isfinite(mean):
        raise InputError(
            f"the loss of the head became {mean} at learning rate {stage.lr:g}: try a smaller --head-lr"
        )
    seconds = time.perf_counter() - started
    say(f"head alone, {_epochs(stage)} on frozen features: train loss {mean:.4f}, {seconds:.0f} s")
    model.head.eval()
    with torch.no_grad():
        return mean, model.head(features[: len(train)]).cpu()


def say_stage(model, stage, backbone_lr_scale=1.0):
    """A line on what a Stage trains, and at what rate."""
    part = model.head if stage.trains == "head" else model
    count = sum(p.numel() for p in part.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    rate = f"lr {stage.lr:.1e}"
    if stage.trains == "all" and backbone_lr_scale != 1:
        below = "of the stem" if hasattr(model, "stem") else "below the head"
        rate += f", {below} {stage.lr * backbone_lr_scale:.1e}"
    what = {"head": "the head alone", "neck": "all but the stem", "all": "everything"}[stage.trains]
    say(f"stage: {what}, {_epochs(stage)}, {count:,} of {total:,} parameters, {rate}")


def _epochs(stage):
    return "1 epoch" if stage.epochs == 1 else f"{stage.epochs} epochs"
