"""A step of training: the gradient of a batch, the learning rate, AdamW, and the average of the weights.

Gradient knows of precision, mixed images, a teacher, small parts, and the share of each process. When which
of these is called stands in loop.py.
"""

import itertools
import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch.optim.swa_utils import AveragedModel

from common.console import InputError, say, tell
from common.device import autocast, gather, processes
from images.augment import Mix
from training.loss import total_weight
from training.optimisers.muon import Joined, Muon, hidden_matrices
from training.recipe import THAWED

PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.5, 2  # see plateau_factor
# Muon's learning rate, as a share of AdamW's: of 2 and 5, 2 was better for the scratch ViT (validation and
# the panel of docs/notebook/20).
MUON_RATE = 2.0
STAGES = ("stages", "blocks", "features")  # what timm calls the part of a CNN that holds its blocks


def random_state(device):
    """The state of torch's random numbers on the CPU and on `device`: a list of tensors."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(states, device):
    """Go on from what random_state gave."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


class SharedDraws:
    """Within `with` random numbers come from a stream that all processes share, so that each changes and
    mixes the whole batch alike and then takes its own images; outside each goes on with its own.

    It goes on from where the first process is when this is made; `states`: where it is now."""

    def __init__(self, device):
        self.device, self.states = device, gather(random_state(device))[0]

    def __enter__(self):
        self.own = random_state(self.device)
        set_random_state(self.states, self.device)

    def __exit__(self, *_):
        self.states = random_state(self.device)
        set_random_state(self.own, self.device)


class Changed(NamedTuple):
    """A whole batch as the network gets it (`x`, scaled and mixed) and as a teacher does (`grey`); each image
    keeps `share` of itself, the rest is the image before it."""

    x: torch.Tensor
    grey: torch.Tensor
    share: float


class Gradient:
    """Adds up the gradient of whole batches, whose grey images `change` augments.

    Under torchrun each of n processes takes every n-th image of a batch. Images are changed and mixed as a
    whole batch before any of it is taken (see SharedDraws), so parts and processes make the same step to
    rounding; what the model itself draws at random (dropout, patches left out) is drawn for each part, and
    that is said. A `teacher` takes its share of the loss. seen: [(positions, outputs)] of the images so far,
    on the device; an epoch begins by emptying it.
    """

    def __init__(self, objective, recipe, inputs, change, teacher=None):
        self.objective, self.recipe, self.inputs = objective, recipe, inputs
        self.change, self.teacher, self.seen = change, teacher, []
        self.mix = None
        if recipe.mixup or recipe.cutmix:
            self.mix = Mix(recipe.mixup, recipe.cutmix)
        self.rank, self.number = processes()
        self.draws = None  # under torchrun the SharedDraws of all processes, made by the loop
        self.looked = self.number == recipe.accumulate == 1  # whether the model draws anything at random

    def smallest_part(self, count):
        """How many images the smallest part has, in epochs of `count` images."""
        size = self.recipe.batch_size
        last_batch = count % size or size
        least = []
        for batch in (min(count, size), last_batch):
            for mine in (max(1, batch // self.number), math.ceil(batch / self.number)):
                part = self._part_size(mine)
                least.append(mine % part or part)
        return min(least)

    def add(self, net, source, whole):
        """Add the gradient of this process's images of the batch `whole` (positions in the Batches `source`,
        int64 [B]) to that of `net`'s parameters; returns their part of the batch's loss, detached: the parts
        of all processes add up to it."""
        # Changed and mixed as a whole, before any of it is taken: see SharedDraws.
        batch = source.get(whole)
        changed = self._changed(batch)
        # One part in one process, unless --accumulate or torchrun say otherwise.
        mine, parts = self._own_parts(len(whole))
        loss_sum = 0.0
        for number, places in enumerate(parts, 1):
            with self._exchange(net, last=number == len(parts)):
                rows = self._rows(places, len(whole))
                outputs = self._forward(net, changed.x[rows])
                loss = self._labelled_loss(outputs.float(), batch, changed.share, rows)
                if self.teacher:
                    loss = self._taught(loss, outputs.float(), changed.grey[rows], len(whole))
                if len(mine):
                    self.seen.append((whole[places], outputs.detach().float()))
                else:
                    loss = loss * 0.0  # it takes part for the others' sake
                # DistributedDataParallel takes the mean over processes, and the sum is wanted.
                (loss * self.number).backward()
            loss_sum += loss.detach()
        return loss_sum

    # ------------------------------------------------------------ mixing

    @torch.no_grad()
    def _changed(self, batch):
        """A whole batch, changed, scaled and mixed."""
        with self.draws or nullcontext():
            grey, share = self.change(batch.x), 1.0
            x = self.inputs.scale(grey)
            if self.mix:
                x, share = self.mix(x)
        return Changed(x, grey, share)

    def _labelled_loss(self, outputs, batch, share, rows):
        """The losses of a part of a Batch, its `rows`, added up and divided by the weight of the whole; of
        mixed images each label has its share."""
        target, weight = batch.target, batch.weight
        losses = share * self.objective.losses(outputs, target[rows]) * weight[rows]
        if share < 1:  # the weights of a batch add up to the same, whatever is mixed with what
            before, before_weight = target.roll(1, 0)[rows], weight.roll(1, 0)[rows]
            losses += (1 - share) * self.objective.losses(outputs, before) * before_weight
        return losses.sum() / total_weight(self.objective, target, weight)

    # ------------------------------------------------------------ small parts

    def _part_size(self, count):
        """How many of a process's `count` images go through the network at once."""
        return math.ceil(max(1, count) / self.recipe.accumulate)

    def _rows(self, places, count):
        """Places in a batch of `count` images as an index; all of them: a slice, which copies nothing."""
        if len(places) == count:
            return slice(None)
        return places.to(self.inputs.device)

    def _forward(self, net, x):
        """What the network gives for a part of a batch; the first time, a note if it draws at random."""
        before = None if self.looked else random_state(self.inputs.device)
        with autocast(self.inputs.device, self.inputs.amp):
            outputs = net(x)
        if before is not None:
            self.looked = True
            after = random_state(self.inputs.device)
            if not all(torch.equal(a, b) for a, b in zip(before, after)):
                say(
                    "note: the model draws at random itself (dropout, stochastic depth or patches left out), "
                    "for each part of a batch by itself: the step is as good as the undivided one, but not "
                    "the same; the images are changed and mixed as in one"
                )
        return outputs

    # ------------------------------------------------------------ processes

    def _own_parts(self, count):
        """(places of this process's images in a batch of `count`, the parts that they go through the network
        in). Without an image of its own it takes one of another's, so that all processes go through it."""
        places = torch.arange(count)
        mine = places[self.rank :: self.number]
        taken = mine if len(mine) else places[:1]
        return mine, taken.split(self._part_size(len(mine)))

    def _exchange(self, net, last):
        """A context in which processes exchange their gradients after the `last` part alone."""
        if self.number > 1 and not last:
            return net.no_sync()
        return nullcontext()

    # ------------------------------------------------------------ a teacher

    def _taught(self, loss, outputs, grey, count):
        """The loss with the teacher's part in it; `count`: of the whole batch."""
        teacher = self.teacher
        distance = self.objective.imitation(outputs, teacher(grey)).sum() / count
        return (1 - teacher.share) * loss + teacher.share * distance

    # ------------------------------------------------------------ what was seen

    def outputs(self):
        """`seen`, in one piece and on the CPU; [] if nothing was."""
        if not self.seen:
            return []
        index, outputs = _joined(self.seen)
        self.seen = [(index, outputs)]
        return [(index, outputs.cpu())]

    def seen_by_all(self):
        """(positions, outputs) of the images that all processes have seen, on the CPU."""
        return _joined(list(itertools.chain.from_iterable(gather(self.outputs()))))

    def put_back(self, seen):
        """Go on from what `outputs` gave before an interruption."""
        self.seen = [(index, outputs.to(self.inputs.device)) for index, outputs in seen]


def _joined(seen):
    """[(positions, outputs)] -> one such pair."""
    indices, outputs = zip(*seen)
    return torch.cat(indices), torch.cat(outputs)


# ---------------------------------------------------------------- learning rate and AdamW


def learning_rate(step, total, warmup, peak, schedule="cosine", floor=0.0):
    """Rate at 0-based `step` of `total`: linear from peak/warmup to peak over `warmup` steps, then
    "cosine" to `floor` at `total` (Loshchilov and Hutter 2017, arXiv:1608.03983), else `peak`."""
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)
    if schedule != "cosine":
        return peak
    done, floor = (step - warmup) / max(1, total - warmup), min(floor, peak)
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
    # The peak of the stage and plateau that the epoch is in; then the warm-up, and what follows it.
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

    Layers are those of model.layers() that have weights; of a CNN's stages each block is one. A parameter
    outside them belongs to the last pretrained layer if it is a norm's, else to the first: [CLS],
    positions."""
    layers = []
    for name, module in model.layers():
        inner = list(module.children()) if name in STAGES else [module]
        layers += [part for part in inner if any(True for _ in part.parameters())]
    depth = {}
    for i, module in enumerate(layers):
        depth |= {id(p): i for p in module.parameters()}
    top, scales = len(layers) - 1, {}
    stem = {id(p) for p in getattr(model, "stem", model).parameters()}
    # Without a stem, all but the head came pretrained.
    last = max((i for i in range(top) if any(id(p) in stem for p in layers[i].parameters())), default=0)
    for name, p in model.named_parameters():
        outside = last if name.removeprefix("stem.").startswith(("norm.", "fc_norm.")) else 0
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


def optimiser(model, recipe, inputs):
    """The optimiser of a model's parameters, as a Recipe asks: AdamW, or Muon for the matrices of attention
    and MLP with AdamW for the rest. `inputs`: an Inputs, which knows device and precision."""
    groups = parameter_groups(model, recipe.weight_decay, recipe.backbone_lr_scale, recipe.layer_decay)
    by_muon = []
    if recipe.optimiser == "muon":
        by_muon, groups = muon_groups(model, groups)
    fused = inputs.device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW(groups, lr=recipe.lr, fused=fused)
    if not by_muon:
        return adamw
    return Joined(Muon(by_muon, recipe.lr, inputs.amp), adamw)


def check_optimiser(recipe, model):
    """Say what --optimiser muon is for in this model. InputError where there is nothing."""
    if recipe.optimiser != "muon":
        return
    matrices = hidden_matrices(model)
    if not matrices:
        raise InputError(
            "--optimiser muon is for the matrices of attention and MLP, and this model has none (no "
            "convolution counts): leave it out, and AdamW trains everything"
        )
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    weights = sum(trained[key] for key in matrices)
    rest = sum(trained.values()) - weights
    kinds = sorted({".".join(name.split(".")[-3:-1]) for name, _ in matrices.values()})
    tell(
        f"optimiser: Muon for {len(matrices)} layers of attention and MLP ({', '.join(kinds)}: {weights:,} "
        f"weights), AdamW for the other {rest:,} weights"
    )


def muon_groups(model, groups):
    """Split the groups of parameter_groups -> (those for Muon, those left for AdamW)."""
    matrices = hidden_matrices(model)
    by_muon, rest = [], []
    for group in groups:
        by_parts = {}  # how many matrices a parameter holds, 0 for those that stay with AdamW: parameters
        for p in group["params"]:
            _, parts = matrices.get(id(p), ("", 0))
            by_parts.setdefault(parts, []).append(p)
        if left := by_parts.pop(0, []):
            rest.append({**group, "params": left})
        for parts, parameters in sorted(by_parts.items()):
            scale = group["lr_scale"] * MUON_RATE
            by_muon.append({**group, "params": parameters, "parts": parts, "lr_scale": scale})
    return by_muon, rest


# ---------------------------------------------------------------- the average of the weights


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
        # Counters of BatchNorm are whole numbers, which have no average.
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, values)
            return
        # n_averaged stays on the CPU: reading it lets no GPU wait.
        decay = average_decay(self.decay, int(self.n_averaged))
        torch._foreach_lerp_(averages, values, 1 - decay)
