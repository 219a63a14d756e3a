"""The gradient of a batch: precision, mixed images, a teacher, small parts, and the share of each process."""

import math
from contextlib import nullcontext

import torch

from augment import Mix
from device import autocast, processes
from frozen import total_weight


class Gradient:
    """Adds up the gradient of whole batches, whose grey images `change` augments.

    Under torchrun each of n processes takes every n-th image of a batch. A `teacher` takes its share of the
    loss. seen: [(positions, outputs)] of the images so far, on the device; an epoch begins by emptying it.
    """

    def __init__(self, objective, recipe, inputs, change, teacher=None):
        self.objective, self.recipe, self.inputs = objective, recipe, inputs
        self.change, self.teacher, self.seen = change, teacher, []
        self.mix = Mix(recipe.mixup, recipe.cutmix) if recipe.mixup or recipe.cutmix else None
        self.rank, self.number = processes()

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

    def add(self, net, source, whole):
        """Add the gradient of this process's images of the batch `whole` (positions in the Batches `source`,
        int64 [B]) to that of `net`'s parameters; returns their part of the batch's loss, detached: the parts
        of all processes add up to it."""
        mine = whole[self.rank :: self.number]
        there = whole.to(self.inputs.device)
        total = total_weight(self.objective, source.targets[there], source.weights[there])
        parts = (mine if len(mine) else whole[:1]).split(self._part(len(mine)))
        result = 0.0
        for i, index in enumerate(parts):
            batch = source.get(index)
            with torch.no_grad():
                grey, share = self.change(batch.x), 1.0
                x = self.inputs.scale(grey)
                if self.mix:
                    x, share = self.mix(x)
            wait = net.no_sync() if self.number > 1 and i < len(parts) - 1 else nullcontext()
            with wait:
                with autocast(self.inputs.device, self.inputs.amp):
                    outputs = net(x)
                if len(mine):
                    self.seen.append((index, outputs.detach().float()))
                loss = self._loss(outputs.float(), batch, share) / total
                if self.teacher:
                    loss = self._taught(loss, outputs.float(), grey, len(whole))
                loss = loss * bool(len(mine))
                (loss * self.number).backward()  # DistributedDataParallel takes the mean over processes
            result += loss.detach()
        return result

    def _loss(self, outputs, batch, share):
        """The sum of the images' losses; of the mixed image each label has its `share`."""
        losses = share * self.objective.losses(outputs, batch.target) * batch.weight
        if share < 1:  # the weights of a batch add up to the same, whatever is mixed with what
            other, weight = batch.target.roll(1, 0), batch.weight.roll(1, 0)
            losses += (1 - share) * self.objective.losses(outputs, other) * weight
        return losses.sum()

    def _taught(self, loss, outputs, grey, count):
        """The loss with the teacher's part in it; `count`: of the whole batch."""
        teacher = self.teacher
        far = self.objective.imitation(outputs, teacher(grey)).sum() / count
        loss = (1 - teacher.share) * loss + teacher.share * far
        if teacher.match:
            loss += self.recipe.teacher_features * teacher.match().sum() / count
        return loss

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
