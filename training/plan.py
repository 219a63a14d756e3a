"""From a checked command line to a trained run: what a training script needs beside its model."""

import signal
import tempfile
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
from images.subset import input_range
from layouts.download import download
from models.inputs import AUTO, Inputs
from records import lock
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
    unused: tuple = ()
    track: tuple = ()

    def seed(self):
        """Seed everything that is random, before the model is built."""
        seed_everything(self.recipe.seed, self.deterministic)

    def change(self, x):
        """The random changes of training images: what lungs.show gives -> the same shape."""
        x, more = self.augment(x), self.recipe.randaugment
        return RandAugment(*map(int, more.split(",")))(x) if more else x


def check_folder(folder):
    """InputError if a folder cannot be made or written to; none is left behind."""
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written to: {error.strerror}") from None
    finally:
        for p in new:
            if p.exists():
                p.rmdir()


def run_from_args(args, suffix=""):
    """The Run to write; refuses, before any work is done, to overwrite one silently (InputError)."""
    folder = Path((args.out or args.default_out + ("-demo" if args.demo else "")) + suffix)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: name a folder")
    if not processes()[0]:
        check_folder(folder)
    run = Run(folder)
    if not processes()[0]:  # the others might see the lock of the first one
        lock.refuse_held(run, "wait until it has ended, or choose another folder with --out")
    if args.resume:
        if not (folder / "last.pth").exists() and not suffix:
            raise InputError(
                f"--resume: there is no {folder / 'last.pth'} to continue from; start without --resume"
            )
    elif not args.overwrite and run.begun:
        done = run.results["finished"]
        can_go_on = not done and (folder / "last.pth").exists()
        raise InputError(
            f"{run} already holds {'a finished' if done else 'an interrupted'} run: "
            + ("continue it with --resume, " if can_go_on else "")
            + "choose another folder with --out, or replace it with --overwrite"
        )
    return run


def balanced(config, balance, usual):
    """(DataConfig, balance) as --balance asks for them; `usual` is its default, which gives way where images
    have no one class. InputError where the data cannot be balanced so."""
    by_source = balance.startswith("sources")
    unclear = "--labels" if config.task.kind == "sigmoid" else "--also-unlabelled"
    if (unclear == "--labels" or config.also_unlabelled) and not by_source:
        if balance not in ("weights", "none"):
            if balance != usual:
                raise InputError(
                    f"--balance {balance} needs one class an image; with {unclear}: weights, none, or sources"
                )
            say(f"note: --balance weights, as with {unclear} no image has one class to be sampled by")
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


def plans_from_args(parser, defaults, size=lambda args, usual: usual):
    """Parse the command line -> (args, [Plan, ...]), one a seed. `size(args, usual)`: the default of
    --img-size where other models take `usual`.

    Every flag and every run folder is checked before any work is done; then data are drawn or fetched if
    asked to. With --seeds and --resume, seeds not begun are begun.
    """
    args, recipe, augment = recipes.parse(parser, defaults)
    join_processes(args.device)
    seeds = args.seeds or [recipe.seed]
    runs = [run_from_args(args, f"-seed{seed}" if args.seeds else "") for seed in seeds]
    device = pick_device(args.device)
    amp = fast_bf16(device) if args.amp is None else args.amp
    with first_process_first():  # nothing is written before every process has checked the flags and folders
        prepare(args, partial(size, args))
        config = data.DataConfig.from_args(args)
    config, balance = balanced(config, recipe.balance, parser.get_default("balance"))
    recipe = replace(recipe, balance=balance)
    plans = []
    for seed, run in zip(seeds, runs):
        resume = args.resume and (run.folder / "last.pth").exists()
        seeded = replace(recipe, seed=seed)
        plans.append(
            Plan(
                *(seeded, augment, config, run, device, amp, resume),
                deterministic=args.deterministic,
                unused=defaults.unused,
                track=tuple(args.track),
            )
        )
    return args, plans


@contextmanager
def training(run):
    """Within the block the run is locked, so that no other process trains in its folder; under torchrun by
    the first process. InputError if another one does."""
    with ExitStack() as stack:
        with first_process_first():
            if not processes()[0]:
                stack.enter_context(lock.held(run.folder))
        yield


def train(plan, model, **about):
    """Load the data of `plan`, train `model` with its recipe, write the run, which is locked meanwhile;
    returns results.json's content. `about`: see _train."""
    with training(plan.run):
        return _train(plan, model, **about)


def _train(plan, model, *, name, mean, std, objective=None, teacher=None, encoder=None, **more):
    """What `train` does once the run is locked.

    `name` goes into results.json as "model"; `mean` and `std` are the input scaling, one float a channel, or
    AUTO: that of the training pixels; `more` is copied into results.json. Without an `objective` it is the
    classes of the data. `teacher`: a Teacher, or None; `encoder`: the Run that the model's weights came from,
    or None. InputError where one of the two learnt from images that are held out here.
    """
    with first_process_first():
        train_set, val_set, split = load_train_val(plan.config, tell)
        sides = train_set, val_set
        train_set, others, also = other_hospitals.join(plan.config, train_set, val_set, tell)
        split |= {"also": also} if also else {}
        for flag, run in (("--init", encoder), ("--teacher", teacher and teacher.run)):
            if run:
                seen.refuse_known(flag, run, plan.config, sides, split, others)
    if teacher:
        teacher.begin()
        more["teacher"] = teacher.about()
    recipe, inputs = plan.recipe, scaled_inputs(plan, train_set, mean, std)
    objective = objective or supervised(plan, train_set, val_set)
    meta = {
        "model": name,
        "model_config": {"kind": model.kind, **model.config},
        "recipe": recipes.to_json(recipe, plan.augment, plan.amp, plan.unused),
        "data": asdict(plan.config),
        "split": split,
        "seed": recipe.seed,
        "mean": list(inputs.mean),
        "std": list(inputs.std),
        "input_range": input_range(train_set),
        **more,
    }
    count = sum(p.numel() for p in model.parameters())
    tell(
        f"model: {name}, {count:,} parameters, {plan.config.img_size} px, on {device_name(plan.device)}, "
        f"{'bf16' if plan.amp else 'fp32'}; writing to {plan.run}"
    )
    started, loop = time.perf_counter(), Loop(model, objective, plan, inputs, meta, teacher)
    if check := getattr(model, "check_training", None):
        check(plan.config.img_size, min(2, loop.smallest_part(train_set)))
    for stage in recipe.stages:
        if stage.trains == "head" and not plan.resume:
            how = dict(objective=objective, recipe=recipe, inputs=inputs, augment=plan.change)
            try:
                loss, outputs = fit_head(model, train_set, stage, **how)
            except KeyboardInterrupt:
                text = "stopped while the head was trained alone; nothing is saved yet: start the same again"
                raise Interrupted(text, signal.SIGINT) from None
            loop.progress.head_seconds = time.perf_counter() - started
            if not recipe.epochs:
                loop.keep_head(loss, outputs, stage)
    if recipe.freeze_epochs and recipe.epochs:
        say_stage(model, recipe.stages[-1], recipe.backbone_lr_scale)
    return loop.fit(train_set, val_set, others)


def scaled_inputs(plan, train_set, mean, std):
    """The Inputs of `plan`; a `mean` or `std` that is AUTO becomes that of the training pixels."""
    config = plan.config
    how = dict(look=config.input, reads_lungs=config.reads_lungs)
    if AUTO in (mean, std):
        found = statistics(train_set, Inputs((0.0,), (1.0,), plan.device, **how))
        used = [f"{n} {f:.4f}" for n, given, f in zip(("mean", "std"), (mean, std), found) if given == AUTO]
        mean, std = ([f] * 3 if given == AUTO else given for given, f in zip((mean, std), found))
        tell(f"training pixels: {', '.join(used)}")
    return Inputs(tuple(mean), tuple(std), plan.device, plan.amp, **how)


def supervised(plan, train_set, val_set):
    """The loss of the classes of the data. InputError, before training, where no AUROC can be watched."""
    recipe, task, weights = plan.recipe, plan.config.task, None
    if recipe.balance in ("weights", "both"):
        weights = torch.from_numpy(task.class_weights(train_set.targets)).to(plan.device)
    how = dict(focal_gamma=recipe.focal_gamma if recipe.loss == "focal" else 0.0)
    how |= dict(segmentation=recipe.seg_weight, attention=recipe.attention_weight)
    objective = Supervised(task, weights, recipe.label_smoothing, recipe.watch, **how)
    objective.columns(task.truth(val_set.targets))
    say_unwatched(task, val_set)
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
    about = {"format": FORMAT, "finished": True, "versions": versions(), "command": command_line()}
    run.save_results({**results, **about})


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
    auto, there, flags = run.model(), run.config, ("input", "lungs_sha256")
    if differ := [k for k in flags if getattr(there, k) != getattr(config, k)]:
        values = [[str(getattr(c, k))[:12] or "none" for c in (there, config)] for k in differ]
        before = "; ".join(f"--{k.partition('_')[0]} {a}, here {b}" for k, (a, b) in zip(differ, values))
        raise InputError(f"--init {run} was shown something else: {before}; make the two alike")
    weights = {k: v for k, v in auto.encoder.state_dict().items() if not k.startswith("head.")}
    try:
        model.load_state_dict({**model.state_dict(), **weights})
    except RuntimeError as error:
        raise InputError(
            f"--init {run} does not fit this model: {' '.join(str(error).split())[:300]}"
        ) from None
    return {"run": str(run), "checkpoint": run.checkpoint_sha256, "minutes": run.results["minutes"]}
