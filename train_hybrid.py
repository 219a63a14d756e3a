"""Train the two-lung hybrid: a pretrained ViT as stem, then a small transformer that reads left and right.

    python train_hybrid.py --weights weights/ViT-B_16.npz

The stem's feature map is cut at the mean x of each image's lung mask (--lungs), mirrored views cut the
mirrored mask. First all but the stem is trained, then everything at a fifth of the rate. Any weights that
train_pretrained.py reads will do. Writes checkpoint.pth, last.pth and results.json to outputs/hybrid.
"""

import common.prelude  # noqa: F401  (first: from here on Ctrl-C and a missing package end in one line)

import npz_loader
from common.cli import Number
from common.console import start, tell
from models import inputs
from models.build import LIMITS
from models.hybrid import Hybrid
from training import plan, recipe

# The settings of earlier work on this set, its learning rate halved when validation AUROC stands still. The
# default is shorter, under the augmentation of ViT-Ti/16; the two were not compared.
COMMON = dict(
    lr=3e-4,
    frozen_epochs=3,
    schedule="plateau",
    balance="both",
    label_smoothing=0.1,
    patience=5,
    warmup_epochs=0.0,
)
DEFAULTS = recipe.Defaults(
    out="outputs/hybrid",
    recipes={
        "default": {**COMMON, "augment": "strong", "epochs": 6, "ema": 0.99},
        "paper": {**COMMON, "augment": "plain", "epochs": 15},
    },
    used=recipe.SUPERVISED + recipe.DROPOUT + recipe.HYBRID,
    data=dict(reads_lungs=True),
)


def add_own_flags(data_flags, model_flags):
    """The flags of the hybrid itself."""
    npz_loader.add_arguments(model_flags)
    inputs.add_scaling_arguments(model_flags)
    sizes = dict(
        d_model=(192, "channels behind the stem, a multiple of 4"),
        token_grid=(4, "tokens a side of each lung's part"),
        depth=(2, "blocks that read each part"),
    )
    for name, (usual, text) in sizes.items():
        flag = f"--{name.replace('_', '-')}"
        kind = Number(int, 1, LIMITS[name])
        model_flags.add_argument(flag, type=kind, default=usual, metavar="N", help=text)
    text = "let the query read the tokens of the whole map too"
    model_flags.add_argument("--global-tokens", action="store_true", help=text)


def main():
    chosen = npz_loader.Chosen()
    args, plans = plan.from_command_line(__doc__, DEFAULTS, add_own_flags, chosen.usual_size)
    shape = chosen.read(args).config
    if not shape.get("class_token", True):  # the stem's own head, which nothing reads, must fit
        shape["readout"] = "mean"
    for p in plans:
        p.seed()
        rates = dict(drop_path_rate=p.recipe.drop_path, patch_drop_rate=0.0)
        model = Hybrid(
            {**shape, **rates, "num_classes": 1, "img_size": p.config.img_size},
            num_classes=p.config.task.outputs,
            d_model=args.d_model,
            token_grid=args.token_grid,
            depth=args.depth,
            num_heads=4,
            drop_rate=p.recipe.drop_rate,
            global_tokens=args.global_tokens,
            segment=p.recipe.seg_weight > 0,
        )
        report = chosen.load(model.stem, args)
        tell(npz_loader.describe(report))
        mean, std, report["scaling"] = inputs.chosen_scaling(args, report)
        name = f"hybrid-{npz_loader.architecture_name(model.stem.config)}"
        weights = {k: report[k] for k in npz_loader.KEPT}
        plan.train(p, model, name=name, mean=mean, std=std, weights=weights)


if __name__ == "__main__":
    start(main)
