"""From the command line to plans, and from a plan to a trained run: all that a training script needs besides
its model. The epochs stand in loop.py.
"""

import signal
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import data
from common.cli import Parser
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
from data import load_train_val, statistics
from images.augment import Augment, RandAugment
from images.drawn import SYNTHETIC_DIR, SYNTHETIC_PX, make_synthetic
from images.split import POOLED
from images.subset import Subset, input_range
from layouts.download import download
from models.inputs import AUTO, Inputs
from records import lock
from records.run import Run
from training import other_hospitals, seen, step
from training import recipe as recipes
from training.earlier import folder
from training.evaluate import fit_head, say_stage
from training.loop import Loop
from training.loss import supervised


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
    begun: bool = True  # whether a run may be there: one was when the command began
    deterministic: bool = False
    used: tuple = recipes.SOME_ARM
    track: tuple = ()
    seeds: int = 1  # how many the command trains
    following: int = 0  # of them after this one
    outer: Run = None  # the run that this is the first stage of, see earlier/masked.py
    after: float = 0.0  # seconds that each takes after these epochs; None: not known

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


def from_command_line(doc, defaults, add_own_flags, size=lambda args, usual: usual):
    """Parse the command line of a training script -> (args, [Plan, ...]), one a seed.

    `doc`: the script's docstring, for --help; `add_own_flags(data_flags, model_flags)` adds what it alone has
    to these two groups of flags; `size(args, usual)`: the default of --img-size where other models take
    `usual`.

    Every flag and every run folder is checked before any work is done; then data are drawn or fetched if
    asked to. With --seeds and --resume, seeds not begun are begun.
    """
    # --help shows the groups in this order: data, model, recipe, run.
    parser = Parser(doc, recipes.EVERYDAY)
    data_flags = data.add_arguments(parser, defaults.also, defaults.unlabelled)
    add_own_flags(data_flags, parser.add_argument_group("model"))
    recipes.add_arguments(parser, defaults)
    parser.set_defaults(**defaults.data)
    args, recipe, augment = recipes.parse(parser, defaults)

    # What can be refused at once is: folders that hold a run, a device that is not there.
    join_processes(args.device)
    runs = folder.runs_to_write(args, recipe.seed)
    device, amp = pick_device(args.device), args.amp
    if amp is None:
        amp = fast_bf16(device)

    # Nothing is written before every process has come so far. The first one draws or fetches the data.
    with first_process_first():
        provide_data(args, size)
        config = data.DataConfig.from_args(args)
    apart = recipe.masked_epochs > 0 and not getattr(args, "teacher", None)
    config, balance = balanced(config, recipe.balance, parser.get_default("balance"), apart)

    plans, waiting = [], list(runs.values())
    if args.resume:
        waiting = [run for run in waiting if not folder.is_over(run, recipe)]
    for seed, run in runs.items():
        waiting = [other for other in waiting if other is not run]
        plan = Plan(
            replace(recipe, balance=balance, seed=seed),
            augment,
            config,
            run,
            device,
            amp,
            resume=args.resume and (run.folder / "last.pth").exists(),
            begun=run.begun,
            deterministic=args.deterministic,
            used=defaults.used,
            track=tuple(args.track),
            seeds=len(runs),
            following=len(waiting),
        )
        plans.append(plan)
    return args, plans


# ---------------------------------------------------------------- the data


def provide_data(args, size=lambda args, usual: usual):
    """Draw or download the data that the parsed data flags ask for; fills in --data-dir, and --img-size by
    `size` (see from_command_line).

    InputError, before any work, for flags that do not go together and a --cache-dir that is a file."""
    if Path(args.cache_dir).exists() and not Path(args.cache_dir).is_dir():
        raise InputError(f"--cache-dir {args.cache_dir} is a file: name a folder")
    if args.demo and (args.download or args.labels or args.data_dir != data.DEFAULT_DIR):
        raise InputError("--demo brings its own data: leave out --data-dir, --labels and --download")
    if args.img_size is None:
        usual = SYNTHETIC_PX if args.demo else data.DataConfig().img_size
        args.img_size = size(args, usual)
    if args.demo:
        args.data_dir = SYNTHETIC_DIR
        make_synthetic(SYNTHETIC_DIR)
    elif args.download:
        download(args.data_dir, args.download)


def balanced(config, balance, usual, in_masked_epochs=False):
    """(DataConfig, balance) as --balance asks for them; `usual` is its default, which gives way where images
    have no one class: those without labels, unless `in_masked_epochs` alone. InputError for other data."""
    by_source = balance.startswith("sources")
    without_class = ""  # the flag by which images have no one class
    if config.task.kind == "sigmoid":
        without_class = "--labels"
    elif config.also_unlabelled and not in_masked_epochs:
        without_class = "--also-unlabelled"
    if without_class and not by_source and balance not in ("weights", "none"):
        if balance != usual:
            raise InputError(
                f"--balance {balance} needs one class an image; with {without_class}: weights or none"
            )
        say(f"note: --balance weights, as with {without_class} no image has one class to be sampled by")
        balance = "weights"
    if by_source and not config.also:
        raise InputError(f"--balance {balance} is for images of several hospitals: give --also DIR")
    if config.split in POOLED and balance == "undersample-once":  # test is balanced too
        config = replace(config, undersample=True)
    return config, balance


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
    step.check_optimiser(plan.recipe, model)
    with training(plan.run):
        folder.refuse_new(plan)
        # Prepare the data: images, their scaling, and the loss of their classes.
        first = seen.run_of_weights(described.get("weights", {}))
        images = prepare_data(plan.config, {"--init": encoder, "--weights": first}, teacher)
        if teacher:
            teacher.begin()
            described["teacher"] = teacher.description()
        inputs = scaled_inputs(plan, images.train, mean, std)
        if objective is None:
            targets = images.train.targets, images.val.targets
            objective = supervised(plan.recipe, plan.config.task, *targets, plan.device)

        # Describe the run: what results.json keeps, and --resume compares.
        meta = describe_run(plan, model, name, images, inputs) | described
        tell(training_line(plan, model, name))
        loop = Loop(model, objective, plan, inputs, meta, teacher)
        own = described.get("init", {}).get("own")  # masked epochs, of which this is the second stage
        if own:
            loop.progress.head_seconds = 60 * described["init"]["minutes"]
        if check := getattr(model, "check_training", None):  # batches too small for BatchNorm
            check(plan.config.img_size, min(2, loop.smallest_part(images.train)))

        # What an earlier run left makes way: masked epochs to others, a run to its new first stage.
        if not own and not encoder and not plan.resume:
            plan.run.masked.clear(weights=True, folder=True)
        if plan.outer:
            plan.outer.clear(weights=True)

        # Train the head alone, then all of it; the loop writes what it reaches.
        if plan.recipe.freeze_epochs:
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


def prepare_data(config, begun_with, teacher=None):
    """The Images of a DataConfig, those of other hospitals among them. InputError where one of the Runs
    `begun_with` {flag: Run or None} or the Teacher learnt from images that are held out here."""
    with first_process_first():
        own_train, val, split = load_train_val(config, tell)
        train, others = own_train, {}
        if config.also or config.also_unlabelled:
            train, others, split["also"] = other_hospitals.join(config, own_train, val, tell)
        # What another run has learnt must not be held out here.
        sides = own_train, val
        for flag, run in (begun_with | {"--teacher": teacher and teacher.run}).items():
            if run:
                seen.refuse_known(flag, run, config, sides, split, others)
    return Images(train, val, others, split)


def scaled_inputs(plan, train_set, mean, std):
    """The Inputs of `plan`; a `mean` or `std` that is AUTO becomes that of the training pixels."""
    config = plan.config
    # The pixels are measured as the model is shown them, before any scaling.
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
    """The stage of a recipe that trains the head alone; where it is the only one, a linear probe, the loop
    keeps it as its epoch. A run that is resumed has had it. Interrupted, which says that nothing is saved,
    where it is stopped."""
    recipe, started = plan.recipe, time.perf_counter()
    stage = recipe.stages[0]
    if not plan.resume:
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
        except KeyboardInterrupt as stop:
            text = "stopped while the head was trained alone; nothing is saved yet: start the same again"
            raise Interrupted(text, getattr(stop, "signum", signal.SIGINT)) from None
        loop.progress.head_seconds += time.perf_counter() - started
        if not recipe.epochs:
            loop.keep_head(loss, outputs, stage)
    if recipe.epochs:  # what comes next
        say_stage(loop.model, recipe.stages[-1], recipe.backbone_lr_scale)


def save_run(run, model, results):
    """Write checkpoint.pth and a finished results.json for a model that `Loop` did not train."""
    run.folder.mkdir(parents=True, exist_ok=True)
    run.clear(weights=True)
    run.save_model(model)
    made_by = {"format": FORMAT, "finished": True, "versions": versions(), "command": command_line()}
    run.save_results({**results, **made_by})
