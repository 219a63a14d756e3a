"""Pretrain the encoder of the scratch ViT without labels: a masked autoencoder.

    python pretrain_mae.py --epochs 25 --optimiser muon
    python train_scratch.py --init outputs/mae

train_scratch.py does both by itself; this command keeps an encoder for several runs.

Three quarters of the patches are hidden and guessed from the others (He et al. 2022, arXiv:2111.06377), so a
step costs about a third of a supervised one. Uses no labels; with --also-unlabelled it learns from images of
other hospitals, too. Of the validation images only the reconstruction loss is read, which chooses the epoch.
Writes checkpoint.pth (encoder and decoder), last.pth and results.json. On one CPU core with AVX512-BF16 the
90 epochs take an hour and a quarter.
"""

import common.prelude  # noqa: F401  (first: from here on Ctrl-C and a missing package end in one line)

from common.console import start
from training import plan, recipe
from training.earlier import masked
from vit import CONFIGS

DEFAULTS = recipe.Defaults(
    out="outputs/mae",
    recipes={"default": masked.RECIPE},
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
        masked.train(p, args.model)


if __name__ == "__main__":
    start(main)
