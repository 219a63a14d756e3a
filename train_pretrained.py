"""Fine-tune a pretrained Vision Transformer (ViT-B/16, or whatever the weights hold), offline.

    python train_pretrained.py --weights weights/ViT-B_16.npz

Width, depth and heads are read from the file, so Ti/16 or L/16 weights need no other flag; the position
embedding is resized to --img-size. Writes checkpoint.pth, last.pth and results.json to outputs/pretrained.
On 2 CPU cores with AVX512-BF16 an epoch of 4,172 images takes about a minute and a half for Ti/16.
"""

import common
import data
import engine
import npz_loader
from vit import CONFIGS, build_vit

# Defaults of flags; EXPERIMENTS.md has what each choice was made on.
RECIPES = {"default": dict(data.STRONG, epochs=3, freeze_epochs=30, lr=3e-5, ema=0.99), "paper": {}}


def main():
    parser = common.parser(__doc__)
    data.add_arguments(parser)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--weights",
        default=npz_loader.DEFAULT_PATH,
        metavar="PATH",
        help="Google .npz, timm or DeiT .pth/.safetensors, or Hugging Face ViT state dict",
    )
    group.add_argument(
        "--mean", type=float, nargs=3, default=None, help="input mean (default: the weights' own)"
    )
    group.add_argument(
        "--std", type=float, nargs=3, default=None, help="input std (default: the weights' own)"
    )
    data.add_augment_arguments(parser)
    group = parser.add_argument_group("fine-tuning")
    group.add_argument(
        "--freeze-epochs", type=int, default=0, help="first train the head alone, on frozen features"
    )
    group.add_argument("--head-lr", type=float, default=1e-3, help="rate of that stage")
    engine.add_arguments(parser, out="outputs/pretrained", epochs=10, lr=1e-4)
    args = engine.parse(parser, RECIPES)

    shape = npz_loader.config_from_npz(args.weights)  # first: a missing file should not cost a decoding pass
    for plan in engine.plans_from_args(args):
        keys = ("embed_dim", "depth", "patch_size")
        name = next((n for n, c in CONFIGS.items() if all(shape[k] == c[k] for k in keys)), "b16")
        model = build_vit(
            name,
            num_classes=len(plan.config.classes),
            img_size=plan.config.img_size,
            **{
                **shape,
                "drop_rate": 0.0,
                "drop_path_rate": args.drop_path,
                "patch_drop_rate": args.patch_drop,
            },
        )
        report = npz_loader.load_npz(model, args.weights)
        print(npz_loader.describe(report), flush=True)
        engine.train(
            plan,
            model,
            name=name,
            mean=args.mean or report["mean"],
            std=args.std or report["std"],
            weights={k: report[k] for k in ("path", "source", "resized", "reset", "dropped")},
        )


if __name__ == "__main__":
    common.start(main)
