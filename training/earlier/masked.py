"""Masked pretraining: a command of its own (pretrain_mae.py), or the first stage of train_scratch.py."""

from dataclasses import replace

from common.console import InputError, say
from common.device import first_process_first
from data import load_train_val
from images.augment import parse_augment
from models.mae import MaskedAutoencoder
from training import plan as plans
from training import recipe as recipes
from training.loss import Reconstruction, supervised
from vit import CONFIGS

# The settings of both; docs/EXPERIMENTS.md has what they were chosen on.
RECIPE = dict(
    augment="plain,rotate=15,translate=0.1,scale=0.25,aspect=0.15,gamma=0.3",
    epochs=90,
    lr=1e-3,
    batch_size=64,
    warmup_epochs=4.0,
)
SHARED = (
    "optimiser",
    "accumulate",
    "max_steps",
    "seed",
)  # what the first stage takes from the recipe of the second


def train(plan, model):
    """Train a masked autoencoder of the ViT config `model` by a Plan; returns results.json's content."""
    plan.seed()
    shape = dict(
        img_size=plan.config.img_size,
        num_classes=plan.config.task.outputs,
        drop_rate=0.0,
        drop_path_rate=0.0,
    )
    autoencoder = MaskedAutoencoder({**CONFIGS[model], **shape}, plan.recipe.mask_ratio)
    scaling = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    return plans.train(plan, autoencoder, name=f"{model}, masked", objective=Reconstruction, **scaling)


def first_stage(plan, *, resume, after):
    """The Plan of the masked epochs that come first in a Plan: what `pretrain_mae.py --epochs N` does on its
    images, in the folder masked/ of its run.

    resume: whether an interrupted stage goes on; after: the seconds that the epochs after it take, None if
    that is not known."""
    changes = {name: value for name, value in RECIPE.items() if name != "augment"}
    changes |= {name: getattr(plan.recipe, name) for name in SHARED}
    run = plan.run.masked
    return replace(
        plan,
        recipe=replace(recipes.Recipe(), **changes | {"epochs": plan.recipe.masked_epochs}),
        augment=parse_augment(RECIPE["augment"]),
        run=run,
        resume=resume and (run.folder / "last.pth").exists(),
        begun=run.begun,
        used=recipes.MASKED,
        track=(),
        outer=plan.run,
        after=after,
    )


def first(plan, model, *, resume, after=None, teacher=None):
    """Train the masked epochs of a Plan, or what an interruption left of them; of a run that has begun its
    other epochs nothing is left. resume, after: see first_stage; teacher: the Teacher of the other epochs.

    InputError if the run is one without masked epochs."""
    if plan.resume:
        if not plan.run.results.get("init", {}).get("own"):
            raise InputError(
                f"--resume: {plan.run} was begun without masked epochs: go on with --recipe supervised if a "
                "bare command began it before 2026-11-30, else with --masked-epochs 0"
            )
        return
    stage = first_stage(plan, resume=resume, after=after)
    if stage.resume:
        refuse_other_length(stage)
        say("note: settings of the epochs with labels, which have not begun, are those of this command")
    with plans.training(plan.run):
        refuse_labels(plan)
        if teacher:  # whether it saw images held out here is better known now than after this stage
            plans.prepare_data(plan.config, {}, teacher)
        if plan.track:
            say(f"note: --track follows the epochs with labels; {stage.run}/results.json has the masked ones")
        recipe = stage.recipe
        say(
            f"masked epochs first: {recipe.epochs}, in batches of {recipe.batch_size}, lr up to "
            f"{recipe.lr:g}; --batch-size, --lr and other flags of the recipe are for the epochs with labels"
        )
        train(stage, model)


def refuse_labels(plan):
    """InputError, before the masked epochs of a Plan, where the others could not be trained on its labels."""
    with first_process_first():
        sides = load_train_val(plan.config, lambda text: None)[:2]
    supervised(plan.recipe, plan.config.task, *(side.targets for side in sides), plan.device)


def refuse_other_length(stage):
    """InputError where masked epochs that go on were begun as another number of them."""
    before = stage.run.results["recipe"].get("epochs")
    if before != stage.recipe.epochs:
        raise InputError(
            f"--resume: {stage.run} was begun with --masked-epochs {before}, over which its learning rate "
            "falls: go on with that number, or train anew with --overwrite"
        )
