"""Pretrain the encoder of the scratch ViT without labels: a masked autoencoder.

    python pretrain_mae.py --epochs 90
    python train_scratch.py --init outputs/mae

Three quarters of the patches are hidden and guessed from the others (He et al. 2022, arXiv:2111.06377), so a
step costs about a third of a supervised one. Uses no labels; with --also-unlabelled it learns from images of
other hospitals, too. Of the validation images only the reconstruction loss is read, which chooses the epoch.
Writes checkpoint.pth (encoder and decoder), last.pth and results.json. On one CPU core with AVX512-BF16 the
90 epochs take an hour and a quarter.
"""

import common.prelude  # noqa: F401  (first: from here on Ctrl-C and a missing package end in one line)

from common.console import start
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
    unlabelled=True,
)


def add_own_flags(data_flags, model_flags):
    """The flags that training with labels does not have, or has in other words."""
    text = "architecture of the encoder"
    model_flags.add_argument("--model", choices=tuple(CONFIGS), default="scratch", help=text)


def main():
    args, plans = plan.from_command_line(__doc__, DEFAULTS, add_own_flags)
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
