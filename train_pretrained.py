"""Fine-tune a pretrained Vision Transformer (ViT-B/16, or whatever the weights hold), offline.

    python train_pretrained.py --weights weights/ViT-B_16.npz

Width, depth, heads and patch size are read from the file, so Ti/16, L/16, DINOv2 or DINOv3 weights need no
other flag; the position embedding is resized to --img-size. docs/WEIGHTS.md lists what is read. Writes
checkpoint.pth, last.pth and results.json to outputs/pretrained. On 2 CPU cores with AVX512-BF16 an epoch of
4,172 images takes about a minute and a half for Ti/16.

    python train_pretrained.py --weights weights/dinov2_vits14_pretrain.pth --freeze-epochs 30 --epochs 0

trains the head alone on frozen features: a linear probe.
"""

import common.prelude  # noqa: F401  (first: from here on Ctrl-C and a missing package end in one line)

import npz_loader
from common.console import start, tell
from models import inputs
from models.dinov3 import make_vit
from training import plan, recipe
from vit import READOUTS

# Defaults of flags; docs/EXPERIMENTS.md has what each choice was made on.
DEFAULTS = recipe.Defaults(
    out="outputs/pretrained",
    recipes={
        "default": dict(augment="strong", epochs=3, freeze_epochs=30, lr=3e-5, ema=0.99),
        "paper": dict(augment="plain", epochs=10, lr=1e-4),
    },
    used=recipe.SUPERVISED + recipe.PATCH_DROP + recipe.TWO_STAGES,
)


def add_own_flags(data_flags, model_flags):
    """The flags of the model."""
    npz_loader.add_arguments(model_flags)
    text = (
        "what the head reads: [CLS], the mean patch token, or both (default: as the weights' own, else cls)"
    )
    model_flags.add_argument("--readout", choices=READOUTS, default=None, help=text)
    inputs.add_scaling_arguments(model_flags)


def main():
    chosen = npz_loader.Chosen()
    args, plans = plan.from_command_line(__doc__, DEFAULTS, add_own_flags, chosen.usual_size)
    shape, readout = chosen.read(args).config, args.readout or chosen.readout(args)
    for p in plans:
        p.seed()
        model = make_vit(
            **shape,
            num_classes=p.config.task.outputs,
            img_size=p.config.img_size,
            drop_path_rate=p.recipe.drop_path,
            patch_drop_rate=p.recipe.patch_drop,
            readout=readout,
        )
        report = chosen.load(model, args)
        tell(npz_loader.describe(report))
        mean, std, report["scaling"] = inputs.chosen_scaling(args, report)
        plan.train(
            p,
            model,
            name=npz_loader.architecture_name(model.config),
            mean=mean,
            std=std,
            weights={k: report[k] for k in npz_loader.KEPT},
        )


if __name__ == "__main__":
    start(main)
