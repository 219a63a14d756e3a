"""Pretrain the encoder of the scratch ViT without labels: a masked autoencoder.

    python pretrain_mae.py --epochs 90
    python train_scratch.py --init outputs/mae

Three quarters of the patches are hidden and guessed from the others (He et al. 2022, arXiv:2111.06377), so a
step costs about a third of a supervised one. Uses no labels; with --also-unlabelled it learns from images of
other hospitals, too. Of the validation images only the reconstruction loss is read, which chooses the epoch.
Writes checkpoint.pth (encoder and decoder), last.pth and results.json. On one CPU core with AVX512-BF16 the
90 epochs take an hour and a quarter.
"""

import common.prelude  # noqa: F401  (first: see there)

from common.cli import Parser
from common.console import start
from data import add_arguments, add_unlabelled_argument
from models.mae import MaskedAutoencoder
from training import plan, recipe
from training.loss import Reconstruction
from vit import CONFIGS

DEFAULTS = recipe.Defaults(
    out="outputs/mae",
    recipes={
        "default": dict(
            augment="plain,rotate=15,translate=0.1,scale=0.25,aspect=0.15,gamma=0.3",
            epochs=90,
            lr=1e-3,
            batch_size=64,
            warmup_epochs=4.0,
        )
    },
    used=recipe.MASKED,
)


def main():
    parser = Parser(__doc__, recipe.EVERYDAY)
    add_unlabelled_argument(add_arguments(parser))
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", choices=tuple(CONFIGS), default="scratch", help="architecture of the encoder"
    )
    recipe.add_arguments(parser, DEFAULTS)
    args, plans = plan.plans_from_args(parser, DEFAULTS)

    for p in plans:
        p.seed()
        shape = dict(
            img_size=p.config.img_size, num_classes=p.config.task.outputs, drop_rate=0.0, drop_path_rate=0.0
        )
        model = MaskedAutoencoder({**CONFIGS[args.model], **shape}, p.recipe.mask_ratio)
        scaling = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
        plan.train(p, model, name=f"{args.model}, masked", objective=Reconstruction, **scaling)


if __name__ == "__main__":
    start(main)
