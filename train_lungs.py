"""Train the small U-Net that finds the lungs, on radiographs whose lung masks are known.

    python train_lungs.py --masks MASKS.npz

MASKS.npz holds uint8 `masks` [N, S, S/8] (numpy.packbits) of images squashed to squares, their `names`,
relative to --data-dir, and perhaps bool `confident`; images without a certain mask are left out. No class is
read. Writes checkpoint.pth, last.pth, results.json and lung_unet.safetensors (half precision) to
outputs/lungs. Copy the last one over the project's own, or name it with --lungs. The default recipe
took 13 minutes on two CPU cores without AVX512-BF16.
"""

import common.prelude  # noqa: F401  (first: from here on Ctrl-C and a missing package end in one line)

from dataclasses import replace

from safetensors.torch import save_file

from common.console import start
from common.files import atomic_path
from lungs import masks
from lungs.unet import SIDE, LungNet
from training import plan, recipe
from training.loss import Segmentation

DEFAULTS = recipe.Defaults(
    out="outputs/lungs",
    recipes={
        "default": dict(
            augment="strong,blur=0.3,noise=0.05,hflip=0.5",
            epochs=10,
            lr=2e-3,
            batch_size=16,
            weight_decay=1e-4,
            warmup_epochs=0.5,
            ema=0.99,
        )
    },
    data=dict(img_size=SIDE),
    also=False,
)


def add_own_flags(data_flags, model_flags):
    """--masks."""
    data_flags.add_argument("--masks", required=True, metavar="NPZ", help="file of the true lung masks")


def export(run):
    """Write the weights of a run's best epoch as lung_unet.safetensors, in half precision."""
    path = run.folder / masks.SHIPPED
    state = {name: value.half().contiguous() for name, value in run.model().state_dict().items()}
    with atomic_path(path) as tmp:
        save_file(state, tmp)
    print(f"wrote {path}: {path.stat().st_size / 2**20:.2f} MiB")


def main():
    args, plans = plan.from_command_line(__doc__, DEFAULTS, add_own_flags)
    for p in plans:
        source = dict(input="pair", lungs=args.masks, lungs_sha256=masks.fingerprint(args.masks))
        p = replace(p, config=replace(p.config, **source))
        p.seed()
        model = LungNet()
        plan.train(p, model, name="lungs", mean=(0.0,), std=(1.0,), objective=Segmentation)
        export(p.run)


if __name__ == "__main__":
    start(main)
