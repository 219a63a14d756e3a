"""The gradient of a batch: precision, mixed images, a teacher, small parts, and the share of each process."""

import math
from contextlib import nullcontext

import torch

from common.console import say
from common.device import autocast, gather, processes
from images.augment import Mix
from training.loss import total_weight


def random_state(device):
    """The state of torch's random numbers on the CPU and on `device`: a list of tensors."""
    more = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *more]


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


def _rows(here, count, device):
    """Places `here` of a batch of `count` images as an index; all: a slice, which copies nothing."""
    return slice(None) if len(here) == count else here.to(device)


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
        self.mix = Mix(recipe.mixup, recipe.cutmix) if recipe.mixup or recipe.cutmix else None
        self.rank, self.number = processes()
        self.draws = None  # under torchrun the SharedDraws of all processes, made by the loop
        self.looked = self.number == recipe.accumulate == 1  # whether the model draws anything at random

    def _part(self, count):
        """How many of a process's `count` images go through the network at once."""
        return math.ceil(max(1, count) / self.recipe.accumulate)

    def smallest_part(self, count):
        """How many images the smallest part has, in epochs of `count` images."""
        size, least = self.recipe.batch_size, []
        for step in (min(count, size), count % size or size):
            for mine in (max(1, step // self.number), math.ceil(step / self.number)):
                least.append(mine % self._part(mine) or self._part(mine))
        return min(least)

    @torch.no_grad()
    def _shown(self, batch):
        """The images of a whole batch as the network and a teacher get them: (scaled, grey, share); each
        image keeps `share` of itself, the rest is the image before it."""
        with self.draws or nullcontext():
            grey, share = self.change(batch.x), 1.0
            x = self.inputs.scale(grey)
            if self.mix:
                x, share = self.mix(x)
        return x, grey, share

    def add(self, net, source, whole):
        """Add the gradient of this process's images of the batch `whole` (positions in the Batches `source`,
        int64 [B]) to that of `net`'s parameters; returns their part of the batch's loss, detached: the parts
        of all processes add up to it."""
        batch = source.get(whole)
        total = total_weight(self.objective, batch.target, batch.weight)
        x, grey, share = self._shown(batch)
        others = batch.target.roll(1, 0), batch.weight.roll(1, 0)
        places = torch.arange(len(whole))
        mine = places[self.rank :: self.number]
        # A process without an image of its own takes part all the same, with one that counts for nothing.
        parts = (mine if len(mine) else places[:1]).split(self._part(len(mine)))
        counts = float(len(mine) > 0)
        result = 0.0
        for i, here in enumerate(parts):
            rows = _rows(here, len(whole), self.inputs.device)
            wait = net.no_sync() if self.number > 1 and i < len(parts) - 1 else nullcontext()
            with wait:
                outputs = self._forward(net, x[rows])
                if len(mine):
                    self.seen.append((whole[here], outputs.detach().float()))
                labels = batch.target[rows], batch.weight[rows], *(v[rows] for v in others)
                loss = self._loss(outputs.float(), labels, share) / total
                if self.teacher:
                    loss = self._taught(loss, outputs.float(), grey[rows], len(whole))
                loss = loss * counts
                (loss * self.number).backward()  # DistributedDataParallel takes the mean over processes
            result += loss.detach()
        return result

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

    def _loss(self, outputs, labels, share):
        """The sum of the images' losses; of the mixed image each label has its `share`. labels: targets and
        weights of the images, then those of the images before them in the batch."""
        target, weight, other, other_weight = labels
        losses = share * self.objective.losses(outputs, target) * weight
        if share < 1:  # the weights of a batch add up to the same, whatever is mixed with what
            losses += (1 - share) * self.objective.losses(outputs, other) * other_weight
        return losses.sum()

    def _taught(self, loss, outputs, grey, count):
        """The loss with the teacher's part in it; `count`: of the whole batch."""
        teacher = self.teacher
        far = self.objective.imitation(outputs, teacher(grey)).sum() / count
        return (1 - teacher.share) * loss + teacher.share * far

    def outputs(self):
        """`seen`, in one piece and on the CPU; [] if nothing was."""
        if not self.seen:
            return []
        index, outputs = (torch.cat(values) for values in zip(*self.seen))
        self.seen = [(index, outputs)]
        return [(index, outputs.cpu())]

    def put_back(self, seen):
        """Go on from what `outputs` gave before an interruption."""
        self.seen = [(index, outputs.to(self.inputs.device)) for index, outputs in seen]
