"""From a checked command line to a trained run: what a training script needs beside its model."""

import signal
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

import data
from common.console import InputError, Interrupted, command_line, say, tell
from common.device import (
    device_name,
    fast_bf16,
    first_process_first,
    join_processes,
    pick_device,
    processes,
    seed_everything,
    versions,
)
from common.files import FORMAT
from common.scripts import there_is
from data import load_train_val, statistics
from images.augment import Augment, RandAugment
from images.drawn import SYNTHETIC_DIR, SYNTHETIC_PX, make_synthetic
from images.split import POOLED
from images.subset import Subset, input_range
from layouts.download import download
from models.inputs import AUTO, Inputs
from records import lock
from records.begin import runs_to_write
from records.run import Run
from training import other_hospitals, seen
from training import recipe as recipes
from training.evaluate import fit_head, say_stage
from training.loop import Loop
from training.loss import Supervised, with_both_classes


@dataclass(frozen=True)
class Plan:
    """A checked command line: what to train on, how, and where to."""

    recipe: recipes.Recipe
    augment: Augment
    config: data.DataConfig
    run: Run
    device: torch.device
    amp: bool
    resume: bool = False
    deterministic: bool = False
    used: tuple = recipes.SOME_ARM
    track: tuple = ()

    def seed(self):
        """Seed everything that is random, before the model is built."""
        seed_everything(self.recipe.seed, self.deterministic)

    def change(self, x):
        """The random changes of training images: what lungs.show gives -> the same shape."""
        x = self.augment(x)
        if self.recipe.randaugment:
            number, magnitude = map(int, self.recipe.randaugment.split(","))
            x = RandAugment(number, magnitude)(x)
        return x


# ---------------------------------------------------------------- from the command line to plans


def plans_from_args(parser, defaults, size=lambda args, usual: usual):
    """Parse the command line -> (args, [Plan, ...]), one a seed. `size(args, usual)`: the default of
    --img-size where other models take `usual`.

    Every flag and every run folder is checked before any work is done; then data are drawn or fetched if
    asked to. With --seeds and --resume, seeds not begun are begun.
    """
    args, recipe, augment = recipes.parse(parser, defaults)
    join_processes(args.device)
    runs = runs_to_write(args, recipe.seed)
    device, amp = device_and_precision(args)
    config = checked_data(args, size)
    config, balance = balanced(config, recipe.balance, parser.get_default("balance"))
    plans = []
    for seed, run in runs.items():
        plan = Plan(
            replace(recipe, balance=balance, seed=seed),
            augment,
            config,
            run,
            device,
            amp,
            resume=args.resume and (run.folder / "last.pth").exists(),
            deterministic=args.deterministic,
            used=defaults.used,
            track=tuple(args.track),
        )
        plans.append(plan)
    return args, plans


def device_and_precision(args):
    """(torch.device, whether training is in bf16) of --device and --amp."""
    device = pick_device(args.device)
    if args.amp is None:
        return device, fast_bf16(device)
    return device, args.amp


def checked_data(args, size):
    """The DataConfig of the flags; the data are drawn or fetched if asked to. `size`: see plans_from_args."""
    with first_process_first():  # nothing is written before every process has checked the flags and folders
        prepare(args, partial(size, args))
        return data.DataConfig.from_args(args)


def balanced(config, balance, usual):
    """(DataConfig, balance) as --balance asks for them; `usual` is its default, which gives way where images
    have no one class. InputError where the data cannot be balanced so."""
    by_source = balance.startswith("sources")
    without_class = ""  # the flag by which images have no one class
    if config.task.kind == "sigmoid":
        without_class = "--labels"
    elif config.also_unlabelled:
        without_class = "--also-unlabelled"
    if without_class and not by_source and balance not in ("weights", "none"):
        if balance != usual:
            raise InputError(
                f"--balance {balance} needs one class an image; with {without_class}: weights, none, or "
                "sources"
            )
        say(f"note: --balance weights, as with {without_class} no image has one class to be sampled by")
        balance = "weights"
    if by_source and not config.also:
        raise InputError(f"--balance {balance} is for images of several hospitals: give --also DIR")
    if config.split in POOLED and balance == "undersample-once":  # test is balanced too
        config = replace(config, undersample=True)
    return config, balance


def prepare(args, size=lambda usual: usual):
    """Draw or download the data that the parsed data flags ask for; fills in --data-dir, and --img-size by
    what `size` makes of the usual one.

    InputError, before any work, for flags that do not go together and a --cache-dir that is a file."""
    if Path(args.cache_dir).exists() and not Path(args.cache_dir).is_dir():
        raise InputError(f"--cache-dir {args.cache_dir} is a file: name a folder")
    if args.demo and (args.download or args.labels or args.data_dir != data.DEFAULT_DIR):
        raise InputError("--demo brings its own data: leave out --data-dir, --labels and --download")
    if args.img_size is None:
        usual = SYNTHETIC_PX if args.demo else data.DataConfig().img_size
        args.img_size = size(usual)
    if args.demo:
        args.data_dir = SYNTHETIC_DIR
        make_synthetic(SYNTHETIC_DIR)
    elif args.download:
        download(args.data_dir, args.download)


# ---------------------------------------------------------------- from a plan to a run


@contextmanager
def training(run):
    """Within the block the run is locked, so that no other process trains in its folder; under torchrun by
    the first process. InputError if another one does."""
    with ExitStack() as stack:
        with first_process_first():
            if not processes()[0]:
                stack.enter_context(lock.held(run.folder))
        yield


def train(plan, model, *, name, mean, std, objective=None, teacher=None, encoder=None, **described):
    """Load the data of `plan`, train `model` with its recipe, write the run, which is locked meanwhile;
    returns results.json's content.

    `name` goes into results.json as "model"; `mean` and `std` are the input scaling, one float a channel, or
    AUTO: that of the training pixels; `described` is copied into results.json. Without an `objective` it is
    the classes of the data. `teacher`: a Teacher, or None; `encoder`: the Run that the model's weights came
    from, or None. InputError where one of the two learnt from images that are held out here.
    """
    with training(plan.run):
        images = prepare_data(plan, encoder, teacher)
        if teacher:
            teacher.begin()
            described["teacher"] = teacher.about()
        inputs = scaled_inputs(plan, images.train, mean, std)
        objective = objective or supervised(plan, images)
        meta = describe_run(plan, model, name, images, inputs) | described
        tell(training_line(plan, model, name))
        loop = Loop(model, objective, plan, inputs, meta, teacher)
        if check := getattr(model, "check_training", None):
            check(plan.config.img_size, min(2, loop.smallest_part(images.train)))
        train_head(plan, loop, images)
        return loop.fit(images.train, images.val, images.others)


@dataclass(frozen=True)
class Images:
    """The images of a training: Subsets `train` and `val`; `others`: {name: Subset held out} of other
    hospitals; `split`: their description, for results.json."""

    train: Subset
    val: Subset
    others: dict
    split: dict


def prepare_data(plan, encoder=None, teacher=None):
    """The Images of a Plan, those of other hospitals among them. InputError where the Run `encoder` or the
    Teacher learnt from images that are held out here."""
    with first_process_first():
        own_train, val, split = load_train_val(plan.config, tell)
        train, others, also = other_hospitals.join(plan.config, own_train, val, tell)
        if also:
            split["also"] = also
        earlier = {"--init": encoder, "--teacher": teacher and teacher.run}
        for flag, run in earlier.items():
            if run:
                seen.refuse_known(flag, run, plan.config, (own_train, val), split, others)
    return Images(train, val, others, split)


def describe_run(plan, model, name, images, inputs):
    """What results.json says of a training before it begins."""
    return {
        "model": name,
        "model_config": {"kind": model.kind, **model.config},
        "recipe": recipes.to_json(plan.recipe, plan.augment, plan.amp, plan.used),
        "data": asdict(plan.config),
        "split": images.split,
        "seed": plan.recipe.seed,
        "mean": list(inputs.mean),
        "std": list(inputs.std),
        "input_range": input_range(images.train),
    }


def training_line(plan, model, name):
    """The line that is printed before training."""
    count = sum(p.numel() for p in model.parameters())
    precision = "bf16" if plan.amp else "fp32"
    return (
        f"model: {name}, {count:,} parameters, {plan.config.img_size} px, on {device_name(plan.device)}, "
        f"{precision}; writing to {plan.run}"
    )


def train_head(plan, loop, images):
    """The stage that trains the head alone, if the recipe has one; where it is the only one, a linear probe,
    the loop keeps it as its epoch. A run that is resumed has had it."""
    recipe, started = plan.recipe, time.perf_counter()
    for stage in recipe.stages:
        if stage.trains != "head" or plan.resume:
            continue
        try:
            loss, outputs = fit_head(
                loop.model,
                images.train,
                stage,
                objective=loop.objective,
                recipe=recipe,
                inputs=loop.inputs,
                augment=plan.change,
            )
        except KeyboardInterrupt:
            text = "stopped while the head was trained alone; nothing is saved yet: start the same again"
            raise Interrupted(text, signal.SIGINT) from None
        loop.progress.head_seconds = time.perf_counter() - started
        if not recipe.epochs:
            loop.keep_head(loss, outputs, stage)
    if recipe.freeze_epochs and recipe.epochs:
        say_stage(loop.model, recipe.stages[-1], recipe.backbone_lr_scale)


def scaled_inputs(plan, train_set, mean, std):
    """The Inputs of `plan`; a `mean` or `std` that is AUTO becomes that of the training pixels."""
    config = plan.config
    unscaled = Inputs(
        (0.0,),
        (1.0,),
        plan.device,
        input_mode=config.input,
        reads_lungs=config.reads_lungs,
    )
    if AUTO in (mean, std):
        measured_mean, measured_std = statistics(train_set, unscaled)
        used = []
        if mean == AUTO:
            mean = [measured_mean] * 3
            used.append(f"mean {measured_mean:.4f}")
        if std == AUTO:
            std = [measured_std] * 3
            used.append(f"std {measured_std:.4f}")
        tell(f"training pixels: {', '.join(used)}")
    return replace(unscaled, mean=tuple(mean), std=tuple(std), amp=plan.amp)


def supervised(plan, images):
    """The loss of the classes of the data. InputError, before training, where no AUROC can be watched."""
    recipe, task, class_weights = plan.recipe, plan.config.task, None
    if recipe.balance in ("weights", "both"):
        class_weights = torch.from_numpy(task.class_weights(images.train.targets)).to(plan.device)
    objective = Supervised(
        task,
        class_weights,
        recipe.label_smoothing,
        recipe.watch,
        focal_gamma=recipe.focal_gamma if recipe.loss == "focal" else 0.0,
        segmentation=recipe.seg_weight,
        attention=recipe.attention_weight,
    )
    objective.columns(task.truth(images.val.targets))
    say_unwatched(task, images.val)
    return objective


def say_unwatched(task, val):
    """A note on findings whose validation AUROC does not exist."""
    missing = ~with_both_classes(task.truth(val.targets))
    names = [name for name, absent in zip(task.findings, missing) if absent]
    if names and len(names) < len(missing):
        verb = "is" if len(names) == 1 else "are"
        say(f"note: {', '.join(names)} {verb} not watched: validation has no image with, or none without")


def save_run(run, model, results):
    """Write checkpoint.pth and a finished results.json for a model that `Loop` did not train."""
    run.folder.mkdir(parents=True, exist_ok=True)
    run.clear(weights=True)
    run.save_model(model)
    made_by = {"format": FORMAT, "finished": True, "versions": versions(), "command": command_line()}
    run.save_results({**results, **made_by})


def load_encoder(model, run, config):
    """Load the encoder of a pretrain_mae.py run into a VisionTransformer, all but its head; returns what it
    was, for results.json. InputError if the run is another kind, its shape differs, or it was shown something
    else than a model of `config`. Whether it saw images that are held out is looked at by `train`.
    """
    if not run.begun:
        raise InputError(f"--init {run} holds no run{there_is(run.folder, 'pretrain_mae')}")
    if run.kind != "mae":
        raise InputError(f"--init {run} is no run of pretrain_mae.py")
    if not run.results["finished"]:
        say(f"note: --init: {run.why_unfinished()}; here its best epoch so far is used")
    there, differ = run.config, []
    for name in ("input", "lungs_sha256"):
        before, here = getattr(there, name), getattr(config, name)
        if before != here:
            flag = name.partition("_")[0]
            differ.append(f"--{flag} {str(before)[:12] or 'none'}, here {str(here)[:12] or 'none'}")
    if differ:
        listed = "; ".join(differ)
        raise InputError(f"--init {run} was shown something else: {listed}; make the two alike")
    encoder = run.model().encoder.state_dict()
    weights = {name: value for name, value in encoder.items() if not name.startswith("head.")}
    try:
        model.load_state_dict({**model.state_dict(), **weights})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"--init {run} does not fit this model: {reason}") from None
    return {"run": str(run), "checkpoint": run.checkpoint_sha256, "minutes": run.results["minutes"]}
