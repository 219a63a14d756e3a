"""Maps of where a Vision Transformer looked, and tests of whether they are true.

Grad-CAM: Selvaraju et al. 2017 (arXiv:1610.02391) on the tokens of a block's first norm; attention rollout:
Abnar and Zuidema 2020 (arXiv:2005.00928). A map [h, w] has one value, at least 0, for each patch of an image.

The map of an ensemble is the mean of its members' maps, each first scaled to sum 1: every member has the same
total to spread over the image. Members that are not Vision Transformers have no map and are left out.
"""

import contextlib
import copy
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from common.console import progress
from common.proportions import alike_interval, no_width
from common.task import Answer
from images.augment import gaussian_blur

METHODS = {"gradcam": "Grad-CAM", "rollout": "attention rollout"}
BATCH = {"gradcam": 16, "rollout": 4}  # images at once: rollout keeps the attention of every block
PART = 16  # images at once in the curves
STEPS = 15  # points of a deletion or insertion curve


def explainable(model, method="gradcam"):
    """The Vision Transformers and, for Grad-CAM, CNNs and hybrids that make up a model: itself, members of an
    ensemble, or none."""
    kinds = ("vit", "cnn", "hybrid") if method == "gradcam" else ("vit",)
    return [m for m in _members(model) if m.kind in kinds]


def _members(model):
    return list(model.members) if model.kind == "ensemble" else [model]


@contextlib.contextmanager
def _eval_mode(model):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ---------------------------------------------------------------- maps


def as_answer(target):
    """A target, a class number or task.Answer, as Answer."""
    return target if isinstance(target, Answer) else Answer(target)


def grad_cam(model, x, target=1, layer=-1):
    """Grad-CAM of logit `target` of a VisionTransformer, or the stem of a Hybrid, at the output of
    blocks[layer].norm1, or of a Cnn at its last feature map.

    x: scaled images [B, C, H, W] -> float32 [B, h, w]. Channel weights are the mean gradient over the patch
    tokens; [CLS] and registers are left out; ReLU. The model runs in eval mode and is left as it was (mode,
    gradients, hooks).
    """
    kept = []

    def keep(module, inputs, output):
        if not output.requires_grad:  # of a frozen model
            output.requires_grad_()
        kept.append(output)
        return kept[0]

    vit = model.stem if model.kind == "hybrid" else model
    place = model.tap if model.kind == "cnn" else vit.blocks[layer].norm1
    handle = place.register_forward_hook(keep)
    try:
        with _eval_mode(model), torch.enable_grad():
            score = (
                as_answer(target).logit(model(x)).sum()
            )  # images do not mix: each one gets its own gradient
            (gradient,) = torch.autograd.grad(score, kept[0])
    finally:
        handle.remove()
    if model.kind == "cnn":  # (B, D, h, w)
        weight = gradient.mean((2, 3), keepdim=True)
        return (kept[0].detach() * weight).sum(1).relu().float()
    tokens, gradient = kept[0].detach()[:, vit.prefix :], gradient[:, vit.prefix :]  # (B, h*w, D)
    weighted = tokens * gradient.mean(dim=1, keepdim=True)
    return weighted.sum(-1).relu().unflatten(1, vit.grid_size).float()


@torch.no_grad()
def attention_rollout(model, x):
    """Attention from what the head reads ([CLS], the mean patch, or the mean of both) to every patch through
    all blocks of a VisionTransformer.

    x: scaled images [B, C, H, W] -> float32 [B, h, w]. Heads are averaged. It is the same for every class.
    """
    with _eval_mode(model):
        _, attention = model.forward_features(x, return_attention=True)  # (B, depth, heads, N, N)
    flow, first = rollout(attention.float().mean(dim=2)), model.prefix
    rows = {"cls": flow[:, :1], "mean": flow[:, first:].mean(1, keepdim=True)}
    read = torch.cat([rows[name] for name in model.readout.split("+")], dim=1).mean(1)  # (B, N)
    return read[:, first:].unflatten(1, model.grid_size)


def rollout(attention):
    """Head-averaged attention (B, depth, N, N), rows summing to 1 -> the product (B, N, N) of (A + I) / 2
    over all blocks; the identity stands for the residual connection."""
    eye = torch.eye(attention.shape[-1], device=attention.device)
    result = eye.expand(attention.shape[0], -1, -1)
    for block in attention.unbind(1):
        result = (block + eye) / 2 @ result
    return result


def compute(method, model, x, layer=-1, target=1):
    """Maps float32 [B, h, w] by one of METHODS, of a VisionTransformer, a Cnn (Grad-CAM only), or an Ensemble
    that has one.

    x: the model's inputs [B, C, H, W], as Inputs.scale gives them. `layer` and `target` matter to Grad-CAM
    only. If members of an ensemble differ in patch size, the map has the grid of the smallest patches.
    """
    if model.kind == "ensemble":
        chosen = explainable(model, method)
        pairs = [(m, part) for m, part in zip(model.members, model.scaled(x)) if m in chosen]
        maps = [compute(method, m, part, layer, target) for m, part in pairs]
        grid = max(m.shape[1:] for m in maps)
        maps = [F.interpolate(m.unsqueeze(1), size=grid, mode="area")[:, 0] for m in maps]
        return sum(m / m.sum((1, 2), keepdim=True).clamp(min=1e-12) for m in maps) / len(maps)
    parts = x.split(BATCH[method])
    if method == "rollout":
        return torch.cat([attention_rollout(model, part) for part in parts])
    return torch.cat([grad_cam(model, part, target, layer) for part in parts])


# ---------------------------------------------------------------- are they true?


@torch.inference_mode()
def curves(probability, grey, ranks):
    """How a probability changes while patches are blurred (deletion) or uncovered from a blur (insertion).

    probability: function of images like `grey` -> float64 [B]; grey: float32 [B, 1, S, S] in [0, 1], further
    channels are left as they are; ranks: int64 [B, h, w], 0 for the most important patch, which goes first.
    Returns (deletion, insertion), float64 [B, STEPS], at 0 to 100% of the patches (Petsiuk et al. 2018,
    arXiv:1806.07421). The blur is a Gaussian of a tenth of the side.
    """
    blurred = gaussian_blur(grey[:, :1], torch.full((len(grey),), grey.shape[-1] / 10, device=grey.device))
    blurred = torch.cat([blurred, grey[:, 1:]], dim=1)
    counts = [round(share * ranks[0].numel()) for share in np.linspace(0, 1, STEPS)]
    scores = {"deletion": [], "insertion": []}
    for count in counts:
        first = (ranks < count).float().unsqueeze(1)  # (B, 1, h, w)
        first = F.interpolate(first, size=grey.shape[-2:]) > 0.5
        scores["deletion"].append(probability(torch.where(first, blurred, grey)))
        scores["insertion"].append(probability(torch.where(first, grey, blurred)))
    return tuple(np.stack(s, axis=1) for s in scores.values())


def mean_interval(values, least=-1.0):
    """Mean of [N] values in [least, 1] with a 95% percentile bootstrap over images -> {"mean", "lo", "hi"}.

    Where all values are the same (one image, say), it is the interval that so many alike images leave."""
    values = np.asarray(values, dtype=np.float64)
    draws = values[np.random.default_rng(0).integers(len(values), size=(2000, len(values)))].mean(axis=1)
    lo, hi = np.percentile(draws, [2.5, 97.5])
    if no_width((lo, hi)):
        lo, hi = alike_interval(float(values.mean()), len(values), least=least)
    return {"mean": float(values.mean()), "lo": float(lo), "hi": float(hi)}


def randomised(model):
    """Yield (name, model) from the head to the patches: a copy whose linear and convolution weights from the
    head down to the named part are drawn anew, one part more each time (Adebayo et al. 2018,
    arXiv:1810.03292). Norms, positions and the [CLS] token stay as learnt.

    The members of an ensemble lose a part each at every step; the names are those of the deepest member.
    """
    model = copy.deepcopy(model)
    stacks = [m.layers()[::-1] for m in _members(model)]
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for (name, _), step in zip(max(stacks, key=len), itertools.zip_longest(*stacks)):
        for module in itertools.chain.from_iterable(part.modules() for _, part in filter(None, step)):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        yield name, model


def regions(maps, lungs):
    """Share of maps [N, h, w] on the lungs, masks bool [N, S, S], and on the outer tenth of the image, with
    the areas of these regions: {"lung_share": mean_interval, "lung_area": share of the image, "lung_images":
    N of both, "border_...", "empty": maps that are 0 everywhere}. Empty maps are nowhere, so they are left
    out of shares, unless all are; and so is an image without a mask of those of the lungs, which are left out
    where none has one."""
    side = lungs.shape[-1]
    border = np.ones((side, side), bool)
    border[side // 10 : side - side // 10, side // 10 : side - side // 10] = False
    shares, areas = [], []
    for grid, lung in zip(torch.as_tensor(maps), lungs):
        full = F.interpolate(grid[None, None], size=(side, side), mode="bilinear")[0, 0].numpy()
        full = full / max(full.sum(), 1e-12)
        masks = lung, border
        shares.append([(full * mask).sum() for mask in masks])
        areas.append([mask.mean() for mask in masks])
    drawn = np.asarray(maps).any(axis=(1, 2))
    counted = drawn if drawn.any() else ~drawn
    rows = {"lung": lungs.any(axis=(1, 2)) & counted, "border": counted}
    out = {"lung_images": int(rows["lung"].sum()), "empty": int((~drawn).sum())}
    for i, name in enumerate(rows):
        if not rows[name].any():
            continue
        out[f"{name}_share"] = mean_interval(np.array(shares)[rows[name], i], least=0.0)
        out[f"{name}_area"] = float(np.array(areas)[rows[name], i].mean())
    return out


def faithfulness(model, inputs, grey, lungs, methods, layer=-1, target=1, title=None):
    """Every test of the maps for class `target` -> JSON for explain.json.

    grey: float32 [N, 1 or 2, S, S], N >= 1, images as the model sees them (Inputs.cover), which it rightly
    calls `target`; lungs: bool [N, S, S], the lungs on them. Returns {"images": N,
    "random" and each of `methods`: {"deletion", "insertion": mean_interval of the area under the curve}}. A
    method also has both areas minus those of random order, what `regions` gives, and "randomised": the mean
    rank correlation of its maps with those of each `randomised` model, on the first 8 images. `title`: how
    to call this where it says how far it is; None: it does not.
    """
    redrawn = max(len(member.layers()) for member in _members(model))
    maps, areas = _areas_under_curves(model, inputs, grey, methods, layer, target, title)
    out = {"images": len(grey)}
    for name, found in areas.items():
        out[name] = {curve: mean_interval(area) for curve, area in found.items()}
    x = inputs.scale(grey[:8].to(inputs.device))
    for method in methods:
        for curve, area in areas[method].items():
            out[method][f"{curve}_minus_random"] = mean_interval(area - areas["random"][curve])
        out[method] |= regions(maps[method], lungs)
        out[method]["randomised"] = []
        models_title = title and f"{title}, {METHODS[method]} of redrawn weights"
        for name, other in progress(randomised(model), redrawn, models_title, "models"):
            rho = _rank_correlation(maps[method][:8], compute(method, other, x, layer, target).cpu())
            out[method]["randomised"].append({"down_to": name, "rank_correlation": rho})
    return out


def _areas_under_curves(model, inputs, images, methods, layer, target, title):
    """({method: maps [N, h, w] on the CPU}, {method or "random": {"deletion", "insertion": float64 [N]}})."""

    def probability(grey):
        return as_answer(target).probability(inputs.logits(model, grey).cpu().numpy())

    rng, maps, areas = np.random.default_rng(0), {m: [] for m in methods}, {}
    for part in progress(images.split(PART), len(images), title, "images", size=len):
        grey, ranks = part.to(inputs.device), {}
        for method in methods:
            found = compute(method, model, inputs.scale(grey), layer, target)
            maps[method].append(found.cpu())
            ranks[method] = found.flatten(1).argsort(dim=1, descending=True).argsort(dim=1).view(found.shape)
        shape = ranks[methods[0]].shape  # (B, h, w)
        random = [rng.permutation(shape[1] * shape[2]).argsort() for _ in grey]
        ranks["random"] = torch.from_numpy(np.stack(random)).view(shape).to(grey.device)
        for name, order in ranks.items():
            for curve, scores in zip(("deletion", "insertion"), curves(probability, grey, order)):
                areas.setdefault(name, {}).setdefault(curve, []).extend(scores.mean(axis=1))
    areas = {name: {c: np.array(a) for c, a in found.items()} for name, found in areas.items()}
    return {m: torch.cat(parts) for m, parts in maps.items()}, areas


def _rank_correlation(maps, others):
    """Mean Spearman correlation of pairs of maps [N, h, w]; 0 for a pair where one is constant."""
    correlations = []
    for a, b in zip(maps.flatten(1).numpy(), others.flatten(1).numpy()):
        correlation = 0.0
        if a.std() > 0 and b.std() > 0:
            correlation = spearmanr(a, b).statistic
        correlations.append(correlation)
    return float(np.mean(correlations))
