"""How good lung masks are, and what they tell about the class by themselves.

    python studies/lung_masks.py --data-dir DIR --masks MASKS.npz --work DIR

For the U-Net and the heuristic: Dice and intersection over union with the masks of MASKS.npz (see
train_lungs.py) on validation and test images, by group of file names. For these and for MASKS.npz: AUROC of a
logistic regression that sees only the mask, in place, cut to its own box, or its area, and of convex and
dilated masks, which are written to DIR/convex.npz and DIR/dilated.npz for --lungs. Writes contours of 40
test images to DIR/contours.png, red the U-Net's, green those of MASKS.npz. No model is chosen here; the test
images are read for these tables.
"""

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data as pictures
from skimage import img_as_ubyte
from skimage.measure import label
from skimage.morphology import convex_hull_image, dilation, disk
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

import data
from common.cli import Parser
from common.console import say, start
from common.files import atomic_path, save_figure
from data import DEFAULT_DIR, Batches, load_test, load_train_val
from images.decode import to_square
from lungs import masks as masks_module
from lungs.show import INPUT_MODES, boxes, crop, plausible
from models.inputs import Inputs
from studies.kermany import group

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

PARTS = ("train", "val", "test")
PICTURES = "camera coins moon page text brick grass gravel clock cell shepp_logan_phantom horse checkerboard "
PICTURES += "astronaut coffee cat rocket colorwheel immunohistochemistry retina hubble_deep_field"
PICTURES = PICTURES.split()  # those that scikit-image ships
SMALL = 128  # px, of convex and dilated masks


def load(config, source):
    """{part: Subset} with the masks of a source."""
    about = dict(input="masked", lungs=str(source), lungs_sha256=masks_module.fingerprint(source))
    config = replace(config, **about)
    train, val, _ = load_train_val(config, say)
    return {"train": train, "val": val, "test": load_test(config)}


def overlaps(found, truth):
    """Masks bool [N, S, S] twice -> Dice and intersection over union of each, float64 [N]."""
    both = (found & truth).sum((1, 2))
    total = found.sum((1, 2)) + truth.sum((1, 2))
    return 2 * both / np.maximum(total, 1), both / np.maximum(total - both, 1)


def overlap_table(found, true):
    """Markdown: overlap of {name: {part: Subset}} with the Subsets `true`, where these have a mask."""
    lines = ["| masks | images | group | n | Dice | IoU | 5th percentile of Dice | below 0.8 | none found |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, subsets in found.items():
        for part in ("val", "test"):
            truth = true[part].lungs()
            known = truth.any((1, 2))
            drawn, groups = subsets[part].lungs(), np.array([group(f) for f in true[part].files])
            for one in ("all", *np.unique(groups)):
                rows = known & ((groups == one) | (one == "all"))
                dice, iou = overlaps(drawn[rows], truth[rows])
                none = (~plausible(drawn[rows])).sum()
                lines.append(
                    f"| {name} | {part} | {one} | {rows.sum()} | {dice.mean():.3f} | {iou.mean():.3f} | "
                    f"{np.percentile(dice, 5):.3f} | {(dice < 0.8).sum()} | {none} |"
                )
    return "\n".join(lines)


def small(masks):
    """bool [N, S, S] -> bool [N, SMALL, SMALL]."""
    parts = torch.from_numpy(masks).unsqueeze(1).split(512)
    return torch.cat([F.interpolate(p.float(), (SMALL, SMALL), mode="area") > 0.5 for p in parts])[
        :, 0
    ].numpy()


def convex(masks):
    """Each region of each mask bool [N, S, S] as its convex hull."""
    out = np.zeros_like(masks)
    for mask, filled in zip(masks, out):
        regions = label(mask)
        for i in np.flatnonzero(np.bincount(regions.ravel())[1:] > 50) + 1:
            filled |= convex_hull_image(regions == i)
    return out


def dilated(masks):
    """Masks bool [N, S, S] grown by a twentieth of the side."""
    return np.stack([dilation(mask, disk(masks.shape[-1] // 20)) for mask in masks])


def features(masks):
    """{what is seen of masks bool [N, S, S]: float32 [N, D]}."""
    whole = torch.from_numpy(masks).unsqueeze(1).float()
    cut = torch.cat([crop(part, boxes(part)) for part in whole.split(512)])
    return {
        "in place": F.adaptive_avg_pool2d(whole, 16).flatten(1).numpy(),
        "cut to its box": F.adaptive_avg_pool2d(cut, 16).flatten(1).numpy(),
        "area": masks.mean((1, 2))[:, None],
    }


def alone_table(found, targets):
    """Markdown: what {name: {part: masks bool [N, S, S]}} tell of {part: int [N]}; empty masks are left
    out."""
    lines = [
        "| masks | what is seen of them | validation AUROC | test AUROC |",
        "| --- | --- | ---: | ---: |",
    ]
    for name, parts in found.items():
        rows = {part: parts[part].any((1, 2)) for part in PARTS}
        y = {part: targets[part][rows[part]] for part in PARTS}
        x = {part: features(parts[part][rows[part]]) for part in PARTS}
        for view in x["train"]:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
            model.fit(x["train"][view], y["train"])
            got = [roc_auc_score(y[p], model.predict_proba(x[p][view])[:, 1]) for p in ("val", "test")]
            lines.append(f"| {name} | {view} | {got[0]:.3f} | {got[1]:.3f} |")
    return "\n".join(lines)


def contours(subset, true, path, count=40):
    """Draw the masks of `count` images, evenly spread over a Subset, and those of `true` where known."""
    chosen = np.linspace(0, len(subset) - 1, count).astype(int)
    figure, axes = plt.subplots(5, 8, figsize=(16, 11), layout="constrained")
    dice, _ = overlaps(subset.lungs(chosen), true.lungs(chosen))
    for ax, i, d in zip(axes.flat, chosen, dice):
        ax.imshow(subset.pixels(i), cmap="gray", vmin=0, vmax=255)
        for drawn, colour in ((true, "lime"), (subset, "red")):
            mask = drawn.lungs([i])[0]
            if mask.any():
                ax.contour(mask, [0.5], colors=colour, linewidths=1)
        known = true.lungs([i]).any()
        ax.set_title(
            f"{Path(subset.files[i]).stem[:22]}\n" + (f"Dice {d:.2f}" if known else "no true mask"),
            fontsize=7,
        )
        ax.axis("off")
    save_figure(path, figure, 90)


def refused(finder):
    """(on how many pictures of scikit-image, none a radiograph, the finder finds no lungs; of how many)."""
    found = []
    for name in PICTURES:
        picture = Image.fromarray(img_as_ubyte(getattr(pictures, name)()))
        found.append(finder(to_square(picture.convert("L"), 224, "squash")[None])[0])
    return int((~plausible(np.stack(found))).sum()), len(found)


def speeds(subset, unet, count=640):
    """Markdown: images a second of processor time, on one thread, of making masks and of batches that use
    them."""
    torch.set_num_threads(1)
    lines, pixels = ["| step | images/s |", "| --- | ---: |"], subset.pixels(np.arange(count))

    def add(name, work, images=count):
        work(torch.arange(32))  # warm-up
        begin = time.process_time()
        for chunk in torch.arange(images).split(32):
            work(chunk)
        lines.append(f"| {name} | {images / (time.process_time() - begin):.0f} |")

    for name, source, images in (("U-Net", unet, count), ("heuristic", masks_module.HEURISTIC, 64)):
        finder = masks_module.Finder(source)
        add(f"masks by the {name}", partial(lambda find, chunk: find(pixels[chunk.numpy()]), finder), images)
    for look in INPUT_MODES:
        inputs = Inputs((0.5,) * 3, (0.5,) * 3, torch.device("cpu"), input_mode=look)
        batches = Batches(subset, inputs)
        add(f"a batch, --input {look}", partial(lambda i, b, chunk: i.scale(b.get(chunk).x), inputs, batches))
    return "\n".join(lines)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--data-dir", default=DEFAULT_DIR, metavar="DIR", help="the images")
    parser.add_argument("--cache-dir", default="Data/cache", metavar="DIR", help="decoded images and masks")
    parser.add_argument("--masks", required=True, metavar="NPZ", help="the true masks")
    parser.add_argument(
        "--unet", default=masks_module.SHIPPED, metavar="PATH", help="weights of train_lungs.py"
    )
    parser.add_argument("--work", default="outputs", metavar="DIR", help="where contours.png is written")
    parser.add_argument("--speed", action="store_true", help="print images a second instead")
    args = parser.parse_args()
    config = data.DataConfig(args.data_dir, cache_dir=args.cache_dir)
    if args.speed:
        return print(speeds(load(config, args.unet)["train"], args.unet))
    sets = {}
    for name, source in (("people", args.masks), ("U-Net", args.unet), ("heuristic", masks_module.HEURISTIC)):
        begin = time.perf_counter()
        sets[name] = load(config, source)
        seconds, count = time.perf_counter() - begin, sum(map(len, sets[name].values()))
        print(f"masks of {name}: {seconds:.1f} s for {count} images")
    print(
        "no lungs found on {} of {} pictures that are no radiographs".format(
            *refused(masks_module.Finder(args.unet))
        )
    )
    true = sets["people"]
    contours(sets["U-Net"]["test"], true["test"], Path(args.work, "contours.png"))
    print(overlap_table({name: sets[name] for name in ("U-Net", "heuristic")}, true), "\n", flush=True)
    targets = {part: subset.targets for part, subset in true.items()}
    found = {name: {p: small(s.lungs()) for p, s in parts.items()} for name, parts in sets.items()}
    for change in (convex, dilated):
        changed = found[f"U-Net, {change.__name__}"] = {p: change(m) for p, m in found["U-Net"].items()}
        files = [file for part in PARTS for file in sets["U-Net"][part].files]
        packed = np.concatenate([masks_module.pack(changed[part]) for part in PARTS])
        with atomic_path(Path(args.work, f"{change.__name__}.npz")) as tmp, open(tmp, "wb") as file:
            np.savez_compressed(file, masks=packed, names=np.array(files))
    print(alone_table(found, targets))


if __name__ == "__main__":
    start(main)
