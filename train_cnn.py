"""Fine-tune a convolutional network of timm in two stages: first the head, then everything, gently.

    python train_cnn.py --model tf_efficientnet_lite0 --weights weights/tf_efficientnet_lite0.safetensors

--model is any CNN of timm (pip install timm). Weights come from a file of timm, torchvision, CheXNet or
torchxrayvision, or with --pretrained from timm's own download; without either they are random. Input size and
scaling are those of the weights (docs/WEIGHTS.md). Writes
checkpoint.pth, last.pth and results.json to outputs/cnn.
"""

import common.prelude  # noqa: F401  (first: from here on Ctrl-C and a missing package end in one line)

import npz_loader
from common.cli import Parser
from common.console import say, start, tell
from common.device import processes
from models import cnn, inputs
from training import plan, recipe

# The settings of earlier work on this set. The default differs in its augmentation, that of ViT-Ti/16; no run
# compared the two on a CNN.
TWO_STAGES = dict(
    freeze_epochs=5,
    head_lr=1e-4,
    head_decay=0.0,
    epochs=15,
    lr=3e-5,
    backbone_lr_scale=1 / 6,
    weight_decay=0.01,
    warmup_epochs=0.0,
    min_lr=1e-7,
    label_smoothing=0.1,
    watch="accuracy",
    stop_on="loss",
)
USUAL = "convnextv2_tiny"
BATCH = {"convnextv2_base": 16, "tf_efficientnetv2_m": 16, "tf_efficientnetv2_l": 8}  # else 32


def defaults(name):
    """The Defaults for a model of timm."""
    common_part = {**TWO_STAGES, "batch_size": BATCH.get(name.partition(".")[0], 32)}
    return recipe.Defaults(
        out="outputs/cnn",
        recipes={
            "default": {**common_part, "augment": "strong"},
            "paper": {**common_part, "augment": "plain"},
        },
        used=recipe.SUPERVISED + recipe.TWO_STAGES,
    )


def add_own_flags(data_flags, model_flags):
    """The flags of the model."""
    model_flags.add_argument("--model", default=USUAL, metavar="NAME", help="any CNN of timm")
    inputs.add_scaling_arguments(model_flags)
    weights = model_flags.add_mutually_exclusive_group()
    text = "file of its weights: .pth or .safetensors of timm, torchvision, CheXNet or torchxrayvision"
    weights.add_argument("--weights", metavar="PATH", help=text)
    weights.add_argument("--pretrained", action="store_true", help="let timm download the weights")


def usual_size(args, usual):
    """The default of --img-size: that of timm's weights, of drawn images the `usual` one."""
    return usual if args.demo else cnn.usual_size(args.model)


def load_weights(args, model):
    """Load the weights that --weights or --pretrained name -> their report; of random ones, which are said in
    a note, only the scaling."""
    if args.weights:
        report = cnn.load_weights(model, args.weights)
    elif args.pretrained:
        report = cnn.download(model)
    else:
        say(f"note: {args.model} starts from random weights; --weights or --pretrained name others")
        mean, std = model.scaling
        return {"mean": mean, "std": std, "scaling": "timm's configuration"}
    tell(npz_loader.describe(report))
    return report


def main():
    # The model decides the default of --batch-size, so it is read first.
    early = Parser(None, add_help=False)
    early.add_argument("--model", default=USUAL)
    chosen = defaults(early.parse_known_args()[0].model)

    args, plans = plan.from_command_line(__doc__, chosen, add_own_flags, usual_size)
    for p in plans:
        p.seed()
        model = cnn.Cnn(args.model, p.config.task.outputs, p.recipe.drop_path)
        report, described = load_weights(args, model), {}
        if p.recipe.accumulate * processes()[1] > 1 and cnn.has_batch_norm(model):
            say("note: BatchNorm takes the statistics of each part of a batch by itself")
        mean, std, report["scaling"] = inputs.chosen_scaling(args, report)
        if "path" in report:
            described["weights"] = {key: report[key] for key in npz_loader.KEPT if key in report}
        plan.train(p, model, name=args.model, mean=mean, std=std, **described)


if __name__ == "__main__":
    start(main)
