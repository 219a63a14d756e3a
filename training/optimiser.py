"""What AdamW is given: the learning rate of each step and layer, and which parameters decay; and the average
of the weights that it makes."""

import math

import torch
from torch.optim.swa_utils import AveragedModel

from training.recipe import THAWED

PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.5, 2  # see plateau_factor


def learning_rate(step, total, warmup, peak, schedule="cosine", floor=0.0):
    """Rate at 0-based `step` of `total`: linear from peak/warmup to peak over `warmup` steps, then
    "cosine" to `floor` at `total` (Loshchilov and Hutter 2017, arXiv:1608.03983), else `peak`."""
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)
    if schedule != "cosine":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


def plateau_factor(merits):
    """What a learning rate is multiplied by after epochs of these merits: it halves whenever more than two
    epochs in a row brought nothing better (torch's ReduceLROnPlateau with threshold 0)."""
    best, waited, factor = -math.inf, 0, 1.0
    for merit in merits:
        waited += 1
        if merit > best:
            best, waited = merit, 0
        if waited > PLATEAU_PATIENCE:
            factor, waited = factor * PLATEAU_FACTOR, 0
    return factor


def scheduled_rate(recipe, epoch, step, steps, total, merits):
    """Learning rate of the 0-based `step` of an epoch of `steps`, of `total` steps in all; merits: of the
    epochs before."""
    peak = recipe.lr
    if recipe.frozen_epochs and epoch >= recipe.frozen_epochs:
        peak *= THAWED
    if recipe.schedule == "plateau":
        peak *= plateau_factor(merits)
    warmup = min(recipe.warmup_epochs * steps, total)
    return learning_rate(epoch * steps + step, total, warmup, peak, recipe.schedule, recipe.min_lr)


def rate_scales(model, backbone=1.0, layer_decay=1.0):
    """{parameter name: factor of its learning rate}: layer_decay ** d, d layers below the head (Clark et al.
    2020, arXiv:2003.10555; Bao et al. 2022, arXiv:2106.08254), times `backbone` for all but the head and,
    where model.stem is what came pretrained, the other parts above that.

    A parameter outside model.layers() belongs to the last layer below the head if it is a norm's, else to the
    first: [CLS], positions."""
    layers = [module for _, module in model.layers()]
    depth = {id(p): i for i, module in enumerate(layers) for p in module.parameters()}
    top, scales = len(layers) - 1, {}
    stem = {id(p) for p in getattr(model, "stem", model).parameters()}
    for name, p in model.named_parameters():
        outside = max(0, top - 1) if name.startswith("norm.") else 0
        layer = depth.get(id(p), outside)
        pretrained = layer < top and id(p) in stem
        factor = backbone if pretrained else 1.0
        scales[name] = factor * layer_decay ** (top - layer)
    return scales


def parameter_groups(model, weight_decay, backbone=1.0, layer_decay=1.0):
    """Groups for an optimiser, each with its "weight_decay" and its "lr_scale" (see rate_scales): weight
    decay on matrices and kernels; none on biases, norms, tokens and pos_embed."""
    scales = {}
    if (backbone, layer_decay) != (1, 1):
        scales = rate_scales(model, backbone, layer_decay)
    decaying, plain = {}, {}  # {factor of the learning rate: parameters}
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_plain = p.ndim <= 1 or name.endswith(("_token", "pos_embed"))
            groups = plain if is_plain else decaying
            groups.setdefault(scales.get(name, 1.0), []).append(p)
    out = []
    for groups, decay in ((decaying, weight_decay), (plain, 0.0)):
        out += [{"params": p, "weight_decay": decay, "lr_scale": scale} for scale, p in groups.items()]
    return out


def adamw(model, recipe, device):
    """AdamW for the parameters of a model, as a Recipe asks."""
    groups = parameter_groups(model, recipe.weight_decay, recipe.backbone_lr_scale, recipe.layer_decay)
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=device.type in ("cpu", "cuda"))


def average_decay(decay, updates):
    """The decay of the next update of an average that had `updates` before: it grows from 1/10 to `decay`, so
    that the first weights, which know little, are soon forgotten (as in TensorFlow's ExponentialMovingAverage
    with num_updates)."""
    return min(decay, (1 + updates) / (10 + updates))


class WarmAverage(AveragedModel):
    """An exponential moving average of a model's weights whose decay warms up (average_decay); the first
    update copies the model.

    The statistics of BatchNorm, and every other floating-point buffer, are averaged with the same decay, so
    that they belong to the averaged weights; whole numbers, such as num_batches_tracked, are copied."""

    def __init__(self, model, decay):
        super().__init__(model, multi_avg_fn=self._blend, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def _blend(self, averages, values, _):
        """One update, in place, of lists of tensors of one type and device."""
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, values)
            return
        # n_averaged stays on the CPU: reading it lets no GPU wait.
        decay = average_decay(self.decay, int(self.n_averaged))
        torch._foreach_lerp_(averages, values, 1 - decay)
