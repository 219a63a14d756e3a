"""Train a Vision Transformer from scratch (4.99 M parameters) on chest radiographs: NORMAL or PNEUMONIA,
or whatever the class folders, or the table of --labels, ask.

    python train_scratch.py --epochs 15

Writes checkpoint.pth (best epoch by validation AUROC), last.pth and results.json to outputs/scratch. Prints
the split, then one line per epoch. On 2 CPU cores with AVX512-BF16 an epoch of 4,172 images takes just under
a minute (a minute and a half with --recipe paper), on older ones about four. The test images are not opened:
that is calibrate.py's job.
"""

import common.prelude  # noqa: F401  (first: see there)

from common.cli import Parser
from common.console import InputError, start
from data import add_arguments, add_unlabelled_argument
from records.run import Run
from training import plan, recipe
from training.teacher import Teacher
from vit import CONFIGS, build_vit

# Defaults of flags; docs/EXPERIMENTS.md has what each choice was made on.
DEFAULTS = recipe.Defaults(
    out="outputs/scratch",
    recipes={
        "default": dict(augment="robust,frame=0.5,tone=0.5", drop_path=0.05, patch_drop=0.5, ema=0.99),
        "paper": dict(augment="plain", drop_rate=0.1, drop_path=0.05),
    },
    used=recipe.SUPERVISED + recipe.PATCH_DROP + recipe.DROPOUT + recipe.TAUGHT,
)


def main():
    parser = Parser(__doc__, recipe.EVERYDAY)
    add_unlabelled_argument(add_arguments(parser))
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=tuple(CONFIGS), default="scratch", help="which Vision Transformer")
    group.add_argument(
        "--init", default=None, metavar="DIR", help="start from the encoder that pretrain_mae.py left in DIR"
    )
    about = "imitate the probabilities of this finished run, too"
    group.add_argument("--teacher", default=None, metavar="DIR", help=about)
    recipe.add_arguments(parser, DEFAULTS)
    args, plans = plan.plans_from_args(parser, DEFAULTS)
    if args.also_unlabelled and not args.teacher:
        raise InputError("--also-unlabelled: images without labels teach nothing: give --teacher, which does")
    if args.teacher and (args.mixup or args.cutmix):
        raise InputError("--teacher judges images one by one: leave out --mixup and --cutmix")
    how = (plans[0].config, plans[0].device, plans[0].recipe.teacher_weight)
    teacher = Teacher(Run(args.teacher), *how) if args.teacher else None

    for p in plans:
        p.seed()
        model = build_vit(
            args.model,
            num_classes=p.config.task.outputs,
            img_size=p.config.img_size,
            drop_rate=p.recipe.drop_rate,
            drop_path_rate=p.recipe.drop_path,
            patch_drop_rate=p.recipe.patch_drop,
        )
        encoder = Run(args.init) if args.init else None
        more = {"init": plan.load_encoder(model, encoder, p.config)} if encoder else {}
        made_from = dict(teacher=teacher, encoder=encoder)
        plan.train(p, model, name=args.model, mean=(0.5,) * 3, std=(0.5,) * 3, **made_from, **more)


if __name__ == "__main__":
    start(main)
