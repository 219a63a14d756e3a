"""Train a Vision Transformer from scratch (4.99 M parameters) on chest radiographs: NORMAL or PNEUMONIA,
or whatever the class folders, or the table of --labels, ask.

    python train_scratch.py --epochs 15

First come 25 epochs without labels, in which the model learns to fill in hidden patches (--masked-epochs),
then those with labels; --recipe supervised begins with these. On 2 CPU cores with bf16, an epoch of 4,172
images takes half a minute without labels and just under a minute with them, on older ones about four.

Writes checkpoint.pth (best epoch by validation AUROC), last.pth and results.json to outputs/scratch. Prints
the split, then one line per epoch. The test images are not opened: that is calibrate.py's job.
"""

import common.prelude  # noqa: F401  (first: from here on Ctrl-C and a missing package end in one line)

from dataclasses import replace

from common.console import InputError, in_one_line, say, start
from common.device import first_process_first
from common.scripts import there_is
from records.run import Run
from training import plan, recipe, resume
from training.earlier import masked
from training.earlier.teacher import Teacher
from vit import CONFIGS, build_vit

# Defaults of flags; docs/EXPERIMENTS.md has what each choice was made on.
COMMON = dict(drop_path=0.05, patch_drop=0.5, ema=0.99)
DEFAULTS = recipe.Defaults(
    out="outputs/scratch",
    recipes={
        "default": dict(augment="strong,frame=0.5,tone=0.5", optimiser="muon", masked_epochs=25, **COMMON),
        "supervised": dict(augment="robust,frame=0.5,tone=0.5", **COMMON),
        "paper": dict(augment="plain", drop_rate=0.1, drop_path=0.05),
    },
    used=recipe.SUPERVISED + recipe.PATCH_DROP + recipe.DROPOUT + recipe.TAUGHT + recipe.MASKED_FIRST,
    unlabelled=True,
)


def add_own_flags(data_flags, model_flags):
    """The flags that no other script has."""
    text = "which Vision Transformer"
    model_flags.add_argument("--model", choices=tuple(CONFIGS), default="scratch", help=text)
    text = "start from the encoder that pretrain_mae.py left in DIR"
    model_flags.add_argument("--init", default=None, metavar="DIR", help=text)
    text = "imitate the probabilities of this finished run, too"
    model_flags.add_argument("--teacher", default=None, metavar="DIR", help=text)


def teacher_of(args, plan):
    """The Teacher of --teacher, None without it; it is the same for every seed. InputError for flags that do
    not go with one, or need one."""
    if args.also_unlabelled and not args.teacher and not args.masked_epochs:
        raise InputError(
            "--also-unlabelled: images without labels teach nothing: give --teacher or --masked-epochs"
        )
    if not args.teacher:
        return None
    if args.mixup or args.cutmix:
        raise InputError("--teacher judges images one by one: leave out --mixup and --cutmix")
    return Teacher(Run(args.teacher), plan.config, plan.device, plan.recipe.teacher_weight)


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
        reason = in_one_line(error)
        raise InputError(f"--init {run} does not fit this model: {reason}") from None
    return {"run": str(run), "checkpoint": run.checkpoint_sha256, "minutes": run.results["minutes"]}


def masked_first(p, args, teacher, after):
    """Train the masked epochs of a Plan, if it has some -> the Plan of the others. after: of masked.first."""
    if not p.recipe.masked_epochs:
        return p
    masked.first(p, args.model, resume=args.resume, after=after, teacher=teacher)
    if not p.config.also_unlabelled or teacher:
        return p
    say("note: --also-unlabelled: these images join the masked epochs alone")
    return replace(p, config=replace(p.config, also_unlabelled=()))


def begin_with(p, args, model):
    """Load the encoder that a Plan begins with into a model -> (its Run where images must be compared with
    those that it saw, else None; what results.json says of it, {} without one)."""
    if args.init:
        encoder = Run(args.init)
        return encoder, {"init": load_encoder(model, encoder, p.config)}
    if not p.recipe.masked_epochs:
        return None, {}
    if p.resume:  # the weights are those of last.pth
        return None, {"init": p.run.results["init"]}
    with first_process_first():  # which has written it
        described = load_encoder(model, p.run.masked, p.config) | {"own": True}
    return None, {"init": described}


def train_one(p, args, teacher, after):
    """Train the run of one Plan, its masked epochs first; returns how many seconds the others took, None
    without masked ones. after: of masked.first."""
    p = masked_first(p, args, teacher, after)
    p.seed()
    model = build_vit(
        args.model,
        num_classes=p.config.task.outputs,
        img_size=p.config.img_size,
        drop_rate=p.recipe.drop_rate,
        drop_path_rate=p.recipe.drop_path,
        patch_drop_rate=p.recipe.patch_drop,
    )
    encoder, described = begin_with(p, args, model)
    scaling = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    results = plan.train(p, model, name=args.model, **scaling, teacher=teacher, encoder=encoder, **described)
    if not p.recipe.masked_epochs:
        return None
    return 60 * (results["minutes"] - results["init"]["minutes"])


def main():
    args, plans = plan.from_command_line(__doc__, DEFAULTS, add_own_flags)
    if args.init and args.masked_epochs:
        raise InputError(
            f"--init brings an encoder, --masked-epochs {args.masked_epochs} trains one: leave out --init, "
            "or give --masked-epochs 0"
        )
    teacher, after = teacher_of(args, plans[0]), None
    for p in plans:
        with resume.stopped_between_stages(p.run):
            after = train_one(p, args, teacher, after)


if __name__ == "__main__":
    start(main)
