"""Two looks at the Kermany set itself: what tells its classes apart besides the lungs.

    python studies/kermany.py --stamps DIR
    python studies/kermany.py --border DIR --weights ViT-Ti_16-224.npz

--stamps counts, by class and split, the images that carry the tube voltage ("KV59") which one X-ray unit
burns into the lower right corner. It opens the test images, for this count alone. --border prints the AUROC
of a logistic regression that sees only the outer eighth of the training images, through a frozen pretrained
Vision Transformer, of any set of class folders (K classes: the mean AUROC of each against all others).
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

import data
from common.cli import Parser
from common.console import InputError, say, start
from common.device import add_device_argument, fast_bf16, pick_device
from data import load_test, load_train_val
from images.subset import Subset
from layouts.folders import find_classes, find_root
from models.dinov3 import make_vit
from models.inputs import Inputs
from npz_loader import DEFAULT_PATH, config_from_npz, load_npz
from training.evaluate import predict

# Where three training images of 224 px show the stamp: rows from, to; columns from, to.
STAMPS = {
    "person1077_virus_1787": (216, 222, 211, 223),
    "person1124_virus_1851": (213, 222, 209, 223),
    "person1125_virus_1852": (213, 222, 206, 223),
}


def group(file):
    """The class and source that a file name of the Kermany set tells."""
    name = Path(file).name
    found = re.search(r"_(bacteria|virus)_", name)
    return found[1] if found else "NORMAL, NORMAL2-" if name.startswith("NORMAL2") else "NORMAL, IM-"


def stamped(subset, template, least=0.75):
    """Boolean [N]: whether the lower right corner of an image holds the `template`, float32 [h, w]: whether
    the normalised cross-correlation reaches `least` anywhere there."""
    side = subset.images.shape[1]
    corner = subset.pixels()[:, -side // 8 :, -side // 5 :].astype(np.float32)
    x = torch.from_numpy(corner).unsqueeze(1)  # (N, 1, S / 8, S / 5)
    t, ones = template - template.mean(), torch.ones(1, 1, *template.shape)
    variance = F.conv2d(x * x, ones) - F.conv2d(x, ones) ** 2 / template.numel()
    correlation = F.conv2d(x, t[None, None]) / t.norm() / variance.clamp(min=1).sqrt()
    return (correlation.flatten(1).amax(1) >= least).numpy()


def templates(train):
    """The STAMPS cut from training images: float32 tensors [h, w].

    InputError unless `train` holds the three images they are cut from, at 224 px."""
    names = [Path(f).stem for f in train.files]
    if train.images.shape[1] != 224 or not set(STAMPS) <= set(names):
        raise InputError("--stamps needs the training images of the Kermany set")
    found = []
    for name, (top, bottom, left, right) in STAMPS.items():
        image = train.pixels(names.index(name))
        found.append(torch.from_numpy(image[top:bottom, left:right].astype(np.float32)))
    return found


def count_stamps(train, val, test):
    """Markdown: how many images of each class and split carry one of STAMPS. InputError as for templates."""
    parts = templates(train)
    lines = ["| images with the stamp | NORMAL | PNEUMONIA |", "| --- | ---: | ---: |"]
    for name, subset in (("train", train), ("validation", val), ("test", test)):
        hit = np.any([stamped(subset, part) for part in parts], axis=0)
        cells = [f"{hit[subset.targets == k].sum()} of {(subset.targets == k).sum()}" for k in (0, 1)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def border_alone(train, weights, device, folds=5):
    """AUROC of a logistic regression on the features that the frozen ViT of the file `weights` makes of the
    border: the outer eighth of each image, the rest grey. Each image is scored by a model that saw neither it
    nor its patient.

    InputError if the weights cannot be read, or for fewer patients than `folds`."""
    side, patients = train.images.shape[1], train.patients
    if len(set(patients)) < folds:
        raise InputError(f"--border needs {folds} patients, found {len(set(patients))}")
    images = train.pixels().copy()
    images[:, side // 8 : -(side // 8), side // 8 : -(side // 8)] = 128
    model = make_vit(**{**config_from_npz(weights), "img_size": side, "num_classes": 2})
    report = load_npz(model, weights)
    subset = Subset(train.files, train.targets, images, np.arange(len(images)))
    scaling = tuple(report["mean"]), tuple(report["std"])
    inputs = Inputs(*scaling, device, fast_bf16(device))
    features = predict(model.to(device), subset, inputs, output=inputs.features, progress="features")
    p = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000, class_weight="balanced")),
        features.numpy(),
        train.targets,
        groups=patients,
        cv=GroupKFold(folds),
        method="predict_proba",
    )
    if p.shape[1] == 2:
        return roc_auc_score(train.targets, p[:, 1])
    return roc_auc_score(train.targets, p, multi_class="ovr", average="macro")


def main():
    parser = Parser(__doc__)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--stamps", metavar="DIR", help="count the stamped images in this data folder")
    group.add_argument("--border", metavar="DIR", help="judge the borders of the images in this data folder")
    parser.add_argument(
        "--weights", default=DEFAULT_PATH, metavar="PATH", help="for --border: pretrained weights"
    )
    parser.add_argument("--healthy", metavar="CLASS", help="for --border: the healthy class")
    add_device_argument(parser)
    args = parser.parse_args()
    config = data.DataConfig(args.stamps or args.border)
    if args.border:
        config = replace(config, classes=find_classes(find_root(args.border), args.healthy))
        device = pick_device(args.device)
        train, _, _ = load_train_val(config, say)
        auroc = border_alone(train, args.weights, device)
        print(
            f"the border alone (outer eighth of {len(train)} training images): out-of-fold AUROC {auroc:.3f}"
        )
    else:
        train, val, _ = load_train_val(config, say)
        print(count_stamps(train, val, load_test(config)))


if __name__ == "__main__":
    start(main)
