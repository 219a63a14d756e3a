"""Pretrain the encoder of the scratch ViT without labels: a masked autoencoder on the training images alone.

    python pretrain_mae.py --epochs 90
    python train_scratch.py --init outputs/mae

Three quarters of the patches are hidden and guessed from the others (He et al. 2022, arXiv:2111.06377), so a step
costs about a third of a supervised one. Uses neither labels nor other data, nor the validation or test images except
that the validation images choose the epoch. Writes checkpoint.pth (encoder and decoder), last.pth and results.json.
On one CPU core with AVX512-BF16 the 90 epochs take an hour and a quarter.
"""

import common
import data
import engine
from vit import CONFIGS, MaskedAutoencoder

RECIPES = {"default": dict(rotate=15.0, translate=0.1, scale=0.25, aspect=0.15, gamma=0.3, warmup_epochs=4.0)}


def main():
    parser = common.parser(__doc__)
    data.add_arguments(parser)
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=CONFIGS, default="scratch", help="architecture of the encoder")
    group.add_argument("--mask-ratio", type=float, default=0.75, help="share of patches hidden, in (0, 1)")
    data.add_augment_arguments(parser)
    engine.add_arguments(parser, out="outputs/mae", epochs=90, lr=1e-3, batch_size=64, supervised=False)
    args = engine.parse(parser, RECIPES)

    for plan in engine.plans_from_args(args):
        encoder = {
            **CONFIGS[args.model],
            "img_size": plan.config.img_size,
            "num_classes": len(plan.config.classes),
            "drop_rate": 0.0,
            "drop_path_rate": 0.0,
        }
        engine.train(
            plan,
            MaskedAutoencoder(encoder, args.mask_ratio),
            name=f"{args.model}, masked",
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            loss_fn=lambda errors, labels: errors.mean(),
        )


if __name__ == "__main__":
    common.start(main)
