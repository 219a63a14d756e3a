"""What a result depends on besides the data: the flags of training, the "recipe" of results.json and the
check of --resume all come from the fields of Recipe."""

import argparse
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

from common.cli import COUNT, SEED, Number, Parser, add_flags, flag
from common.console import InputError
from common.device import add_device_argument
from common.scaling import TEST_VIEWS
from images.augment import add_augment_argument, parse_augment, parse_randaugment
from images.split import BALANCES
from records.track import add_track_argument
from training.loss import WATCHED

RATE = Number(float, 0, 1e30, above=True)
BELOW_ONE = Number(float, 0, 1, below=True)
ALPHA = Number(float, 0, 100)
WEIGHT = Number(float, 0, 1e6)
SHARE = Number(float, 0, 1)
OPTIMISERS = ("adamw", "muon")
SCHEDULES = ("cosine", "constant", "plateau")
THAWED = 0.2  # learning rate after --frozen-epochs, as a share of that before


class Stage(NamedTuple):
    """A part of training. trains: "head", "neck" (all but the stem of a hybrid) or "all"; epochs; lr: peak
    learning rate."""

    trains: str
    epochs: int
    lr: float


@dataclass(frozen=True)
class Recipe:
    """The settings of training. Fields without help are part of a recipe but no flag of their own."""

    epochs: int = flag(15, "passes over the training images", Number(int, 0, 2**31), "N")
    batch_size: int = flag(32, "images a step, of all processes together", COUNT, "N")
    accumulate: int = flag(
        1,
        "run each step in N parts, which needs less memory; the same step to rounding, but for what a model "
        "with dropout, stochastic depth or left-out patches draws itself",
        COUNT,
        "N",
    )
    optimiser: str = flag(
        "adamw",
        "adamw; or muon for the matrices of attention and MLP, at twice the rate, and AdamW for the rest",
        OPTIMISERS,
    )
    lr: float = flag(3e-4, "peak learning rate of AdamW", RATE, "X")
    weight_decay: float = flag(
        0.05, "weight decay; none on biases, norms, [CLS] and positions", Number(float, 0, 100), "X"
    )
    schedule: str = flag(
        "cosine",
        "learning rate after the warm-up: cosine to 0, constant, or halved at each plateau of validation",
        SCHEDULES,
    )
    min_lr: float = 0.0  # where cosine ends
    backbone_lr_scale: float = flag(
        1.0, "factor on the learning rate of all but the head (and a hybrid's neck)", RATE, "X"
    )
    layer_decay: float = flag(
        1.0,
        "learning rate of each layer, as a share of the next layer's, in (0, 1]",
        Number(float, 0, 1, True),
        "X",
    )
    warmup_epochs: float = 1.0
    clip: float = 1.0
    watch: str = flag(
        "auroc", "validation figure that chooses the epoch: mean AUROC, loss or accuracy", WATCHED
    )
    stop_on: str = "best"  # what patience waits for: a new best epoch, or a lower validation "loss"
    patience: int = flag(
        5,
        "stop after N epochs without a better one; in train_cnn.py, without a lower validation loss",
        COUNT,
        "N",
    )
    max_steps: int = flag(
        None,
        "stop after N steps of the whole model, and of the masked epochs (default: no limit)",
        Number(int, 1, 2**31),
        "N",
    )
    ema: float = flag(
        0.0,
        "validate and keep a moving average of the weights, with this decay a step, in [0, 1), which rises "
        "from 1/10; 0: the weights themselves",
        BELOW_ONE,
        "X",
    )
    loss: str = flag("ce", "cross-entropy (ce), or focal loss", ("ce", "focal"))
    focal_gamma: float = flag(2.0, "exponent of the focal loss", Number(float, 0, 100), "X")
    mixup: float = flag(0.0, "alpha of MixUp, which blends pairs of images; 0: none", ALPHA, "A")
    cutmix: float = flag(0.0, "alpha of CutMix, which pastes parts of other images; 0: none", ALPHA, "A")
    randaugment: str = flag(
        "", "after --augment, N random changes of magnitude M, 0 to 30", parse_randaugment, "N,M"
    )
    label_smoothing: float = flag(
        0.05, "share of each label spread over all classes, in [0, 1)", BELOW_ONE, "X"
    )
    balance: str = flag(
        "weights",
        "rare classes: weights weighs the loss by inverse frequency; sampler draws every class alike; both "
        "does both; undersample draws equal class counts, every epoch again or once; sources: each class of "
        "each hospital (--also) counts alike, or is drawn alike",
        BALANCES,
    )
    test_views: int = flag(
        1,
        "views that the trained run averages its scores over: 1, the image itself; 7, small shifts and zooms "
        "too, for seven times the work",
        TEST_VIEWS,
    )
    patch_drop: float = flag(0.0, "share of patches left out in training, in [0, 1)", BELOW_ONE, "X")
    drop_path: float = flag(0.0, "how often training skips the last block, in [0, 1)", BELOW_ONE, "X")
    drop_rate: float = flag(0.0, "dropout: share of values set to 0, in [0, 1)", BELOW_ONE, "X")
    freeze_epochs: int = flag(
        0,
        "first N epochs of the head alone, on frozen features; with --epochs 0 no others",
        Number(int, 0, 2**20),
        "N",
    )
    head_lr: float = flag(1e-3, "learning rate while --freeze-epochs train the head alone", RATE, "X")
    head_decay: float = None  # weight decay of that stage; None: weight_decay
    probe_views: int = flag(
        0, "while the head is trained alone, augmented views of each image", Number(int, 0, 1000), "N"
    )
    frozen_epochs: int = flag(
        0,
        "of --epochs, the first N train all but the stem; the others everything, at a fifth of the rate",
        Number(int, 0, 2**20),
        "N",
    )
    seg_weight: float = flag(
        0.0, "weight of the loss of a predicted lung mask; 0: none is predicted", WEIGHT, "W"
    )
    attention_weight: float = flag(
        0.0, "weight of a loss on attention outside the lungs; 0: none", WEIGHT, "W"
    )
    teacher_weight: float = flag(0.5, "share of the loss that imitates --teacher, in [0, 1]", SHARE, "W")
    masked_epochs: int = flag(
        0,
        "before --epochs, train N without labels, as pretrain_mae.py --epochs N with this --optimiser; not "
        "with --init",
        Number(int, 0, 2**20),
        "N",
    )
    mask_ratio: float = flag(0.75, "share of patches hidden, in (0, 1)", Number(float, 0, 1, True, True), "X")
    seed: int = flag(0, "random seed of initial weights, order and augmentation", SEED, "N")

    @property
    def stages(self):
        """The stages of training, in order."""
        stages = []
        if self.freeze_epochs:
            stages.append(Stage("head", self.freeze_epochs, self.head_lr))
        if not self.frozen_epochs:
            return [*stages, Stage("all", self.epochs, self.lr)]
        frozen = min(self.epochs, self.frozen_epochs)
        stages.append(Stage("neck", frozen, self.lr))
        if self.epochs > frozen:
            stages.append(Stage("all", self.epochs - frozen, self.lr * THAWED))
        return stages

    def stage_of(self, epoch):
        """The number, from 1, of the stage that an epoch, from 1, of the loop belongs to."""
        stage = 1
        if self.freeze_epochs:
            stage += 1
        if self.frozen_epochs and epoch > self.frozen_epochs:
            stage += 1
        return stage


# The fields that every training script uses, and those that some do.
EVERY_ARM = (
    *("epochs", "batch_size", "accumulate", "optimiser", "lr", "weight_decay", "schedule", "min_lr"),
    *("warmup_epochs", "clip", "stop_on", "max_steps", "ema", "head_decay", "seed"),
)
SUPERVISED = (
    *("layer_decay", "backbone_lr_scale", "loss", "focal_gamma", "mixup", "cutmix", "randaugment", "watch"),
    *("patience", "label_smoothing", "balance", "test_views", "drop_path"),
)
PATCH_DROP = ("patch_drop",)
DROPOUT = ("drop_rate",)
TWO_STAGES = ("freeze_epochs", "head_lr", "probe_views")
MASKED = ("mask_ratio",)
MASKED_FIRST = ("masked_epochs",)
TAUGHT = ("teacher_weight",)
HYBRID = ("frozen_epochs", "seg_weight", "attention_weight")
SOME_ARM = (*SUPERVISED, *PATCH_DROP, *DROPOUT, *TWO_STAGES, *MASKED, *MASKED_FIRST, *TAUGHT, *HYBRID)


def not_used(used):
    """The fields of Recipe that a script has no use for which, besides EVERY_ARM, uses these."""
    return [f.name for f in fields(Recipe) if f.name not in EVERY_ARM and f.name not in used]


# What --help of a training script shows; --help-all shows the rest.
EVERYDAY = (
    *("--data-dir", "--labels", "--split", "--img-size", "--input", "--demo", "--download"),
    *("--model", "--weights", "--pretrained", "--init", "--masks", "--C"),
    *("--recipe", "--augment", "--epochs", "--batch-size", "--lr", "--freeze-epochs"),
    "--masked-epochs",
    *("--out", "--overwrite", "--resume", "--seed", "--seeds", "--device"),
)


RECIPES = {
    "default": "the settings chosen in docs/EXPERIMENTS.md",
    "supervised": "labels from the first epoch on, the default until 2026-11-30",
    "paper": "the plain ones of earlier work",
}


class Defaults(NamedTuple):
    """What a training script brings: `out`, its run folder; `recipes` {name: {field: value, "augment":
    text}}, the first of which is meant unless --recipe names another; `used`, the fields of Recipe that it
    uses besides EVERY_ARM; `data`, {field of DataConfig: default}; `also`, whether labelled
    images of other hospitals may join, `unlabelled`, whether others may."""

    out: str
    recipes: dict
    used: tuple = ()
    data: dict = {}
    also: bool = True
    unlabelled: bool = False


def add_arguments(parser, defaults):
    """The flags of training that all arms share."""
    first = next(iter(defaults.recipes))
    group = parser.add_argument_group("recipe")
    if len(defaults.recipes) > 1:
        text = "; ".join(f"{name}: {RECIPES[name]}" for name in defaults.recipes)
        group.add_argument("--recipe", choices=tuple(defaults.recipes), default=first, help=text)
    add_augment_argument(group, "plain")
    add_flags(group, Recipe, leave_out=(*not_used(defaults.used), "seed", "max_steps"))
    group = add_run_arguments(parser, defaults.out)
    add_flags(
        group, Recipe, leave_out=[f.name for f in fields(Recipe) if f.name not in ("seed", "max_steps")]
    )
    group.add_argument(
        "--seeds",
        type=SEED,
        nargs="+",
        default=None,
        metavar="N",
        help="one run for each seed, in OUT-seedN (default: one run, of --seed)",
    )
    group.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compute in bf16 by autocast (default: where the device does it fast)",
    )
    group.add_argument("--deterministic", action="store_true", help="deterministic kernels, slower on a GPU")
    group.add_argument("--resume", action="store_true", help="continue the interrupted run in --out")
    add_device_argument(group)


def add_run_arguments(parser, out):
    """--out, --overwrite and --track; returns their group."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--out",
        default=None,
        metavar="DIR",
        help=f"run folder; with --demo its usual name ends in -demo (default: {out})",
    )
    group.add_argument("--overwrite", action="store_true", help="replace a run that is already in --out")
    add_track_argument(group)
    parser.set_defaults(default_out=out, resume=False)
    return group


def parse(parser, defaults, argv=None):
    """The command line -> (args, Recipe, Augment). The named recipe gives the defaults; a flag given by hand
    wins.

    InputError if a value is out of range, or seeds are given twice."""
    # The recipe that is named changes the defaults, so it is read first, and --help shows these.
    early = Parser(None, add_help=False)
    early.add_argument("--recipe", default=None)
    early.add_argument("--init", default=None)
    given = early.parse_known_args(argv)[0]
    chosen = defaults.recipes.get(given.recipe) or next(iter(defaults.recipes.values()))
    if given.init and "masked_epochs" in chosen:  # it brings what these would train
        chosen = chosen | {"masked_epochs": 0}
    flags = {f.name for f in fields(Recipe)} | {"augment"}
    parser.set_defaults(**{k: v for k, v in chosen.items() if k in flags})
    args = parser.parse_args(argv)

    # Values that no flag of this script changes come from the recipe itself.
    values = {f.name: getattr(args, f.name) for f in fields(Recipe) if hasattr(args, f.name)}
    fixed = {k: v for k, v in chosen.items() if k in flags and not hasattr(args, k)}
    if args.seeds is not None and (len(set(args.seeds)) < len(args.seeds) or args.seed):
        raise InputError("give each seed once, by --seeds or by --seed")
    if not values["epochs"] and not values.get("freeze_epochs"):
        advice = ""
        if "freeze_epochs" in values:
            advice = ": give --freeze-epochs for a linear probe"
        raise InputError(f"--epochs 0 trains nothing{advice}")
    if values["optimiser"] == "muon" and not values["epochs"]:
        raise InputError("--optimiser muon: --epochs 0 trains the head alone, which AdamW does: leave it out")
    return args, replace(Recipe(), **fixed, **values), parse_augment(args.augment)


def to_json(recipe, augment, amp, used=SOME_ARM):
    """The "recipe" of a results.json: the fields the script uses, those of the augmentation, and bf16."""
    left_out = not_used(used)
    values = {k: v for k, v in asdict(recipe).items() if k not in left_out}
    return {**values, **asdict(augment), "amp": amp}
