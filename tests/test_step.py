"""Tests of a step in parts, and of several processes: the images are changed and mixed as a whole batch."""

import io
from contextlib import nullcontext, redirect_stderr

import pytest
import torch
import torch.nn.functional as F

from images.augment import Augment, RandAugment, parse_augment
from models.batches import Batches
from models.inputs import Inputs
from tests.shared import CPU, NONE, randomise, small_vit, toy_subset, two_class_gradient
from training import step as step_module

INPUTS = Inputs((0.5,), (0.5,), CPU)
CHANGES = {
    "frame and tone": (parse_augment("robust,frame=0.9,tone=0.9"), {}),
    "strong": (parse_augment("strong,noise=0.05,erase=0.5,crop=0.3"), {}),
    "randaugment": (RandAugment(2, 9), {}),
    "mixup": (Augment(**NONE), {"mixup": 0.5}),
    "cutmix": (Augment(**NONE), {"cutmix": 1.0}),
    "all": (parse_augment("robust,frame=0.5,tone=0.5"), {"mixup": 0.4, "cutmix": 0.4}),
}


def step(made, model, count=24):
    """(loss, gradient by name) of a batch of `count`, from one seed."""
    torch.manual_seed(3)
    loss = made.add(model, Batches(toy_subset(32, 0), INPUTS), torch.randperm(32)[:count])
    return float(loss), {n: p.grad.clone() for n, p in model.named_parameters()}


def alike(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    for name in wanted[1]:
        assert torch.allclose(found[1][name], wanted[1][name], atol=2e-6), name


@pytest.mark.parametrize("name", CHANGES)
def test_a_step_in_parts_is_the_step(name):
    """Three parts, and seven uneven ones, against the loss of the batch that was changed at once."""
    change, fields = CHANGES[name]
    whole = step(two_class_gradient(INPUTS, 1, change, **fields), randomise(small_vit(in_chans=1)).train())
    for n in (3, 7):
        made = two_class_gradient(INPUTS, n, change, **fields)
        alike(step(made, randomise(small_vit(in_chans=1)).train()), whole)
    # the same by hand: what is drawn, in the order in which one part draws it
    torch.manual_seed(3)
    index = torch.randperm(32)[:24]
    batch = Batches(toy_subset(32, 0), INPUTS).get(index)
    x, share = (change(batch.x) - 0.5) / 0.5, 1.0
    if fields:
        x, share = two_class_gradient(INPUTS, **fields).mix(x)
    soft = share * F.one_hot(batch.target, 2) + (1 - share) * F.one_hot(batch.target.roll(1, 0), 2)
    logits = randomise(small_vit(in_chans=1))(x)
    wanted = F.cross_entropy(logits, soft)
    assert whole[0] == pytest.approx(wanted.item(), rel=1e-4)


class Several(torch.nn.Module):
    """A model that DistributedDataParallel would wrap, as Gradient needs it."""

    def __init__(self, model):
        super().__init__()
        self.model, self.no_sync = model, nullcontext

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("number", [2, 3])
def test_processes_change_and_mix_one_batch(parts, number):
    """The mean gradient of the processes is that of one, though their own random numbers differ; also where
    one process gets no image."""
    change, fields = CHANGES["all"]
    for count in (24, 25, 2):
        one = step(two_class_gradient(INPUTS, 1, change, **fields), randomise(small_vit(in_chans=1)), count)
        loss, mean = 0.0, {name: torch.zeros_like(g) for name, g in one[1].items()}
        for rank in range(number):
            made = two_class_gradient(INPUTS, parts, change, **fields)
            made.rank, made.number = rank, number
            torch.manual_seed(3)
            torch.randperm(32)
            made.draws = step_module.SharedDraws(CPU)
            torch.manual_seed(100 + rank)
            model = randomise(small_vit(in_chans=1))
            source = Batches(toy_subset(32, 0), INPUTS)
            own = torch.get_rng_state()
            torch.manual_seed(3)
            index = torch.randperm(32)[:count]
            torch.set_rng_state(own)
            loss += float(made.add(Several(model), source, index))
            assert torch.equal(torch.get_rng_state(), own)  # its own stream was not touched
            for name, p in model.named_parameters():
                mean[name] += p.grad / number
        alike((loss, mean), one)


def test_a_model_that_draws_itself_is_said_once():
    """Dropout and left-out patches are drawn part by part, with a note; otherwise there is none."""
    quiet, drawing = small_vit(in_chans=1), small_vit(in_chans=1, drop_rate=0.1, patch_drop_rate=0.5)
    for model, n, notes in ((quiet, 3, 0), (drawing, 1, 0), (drawing, 3, 1)):
        made, err = two_class_gradient(INPUTS, n), io.StringIO()
        with redirect_stderr(err):
            for _ in range(2):
                step(made, model.train())
        assert err.getvalue().count("note: the model draws at random itself") == notes
