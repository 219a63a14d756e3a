"""Show where a calibrated run looked, and measure whether the pictures can be believed.

    python explain.py --run outputs/pretrained

Takes the validation images (--split test on request), picks true and false positives and negatives at the
recall-first threshold, the most confident and the most borderline of each, and writes to RUN/explain/: sheet.png,
one PNG an image, and explain.json with the tests of faithfulness (deletion and insertion curves against random
order, maps after randomising the weights, share of the map on the lungs and on the border), which compare.py tabulates.

    python explain.py IMAGE... --run outputs/pretrained

explains any files instead. Grad-CAM: Selvaraju et al. 2017 (arXiv:1610.02391) on the tokens of a block's first norm;
rollout: Abnar and Zuidema 2020 (arXiv:2005.00928). A map shows what moved the score, not where the disease is.
"""

import copy
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.stats import spearmanr

import common
import data
import engine
import metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

METHODS = {"gradcam": "Grad-CAM", "rollout": "attention rollout"}
STEPS = 15  # points of a deletion or insertion curve


# ---------------------------------------------------------------- maps


def grad_cam(model, x, target=1, layer=-1):
    """Grad-CAM of logit `target` at the output of blocks[layer].norm1: x [B, C, H, W] -> float32 [B, h, w], >= 0.

    Channel weights are the mean gradient over the patch tokens; [CLS] is left out; ReLU. The model is used in eval
    mode and left as it was: mode, gradients, hooks."""
    kept, was_training = [], model.training

    def keep(module, inputs, output):
        kept.append(output if output.requires_grad else output.requires_grad_())
        return kept[0]

    handle = model.blocks[layer].norm1.register_forward_hook(keep)
    try:
        model.eval()
        with torch.enable_grad():
            score = model(x)[
                :, target
            ].sum()  # images do not mix, so the sum gives every image its own gradient
            (gradient,) = torch.autograd.grad(score, kept[0])
    finally:
        handle.remove()
        model.train(was_training)
    tokens, gradient = kept[0].detach()[:, 1:], gradient[:, 1:]  # (B, h*w, D)
    return (tokens * gradient.mean(dim=1, keepdim=True)).sum(-1).relu().unflatten(1, model.grid_size).float()


@torch.no_grad()
def attention_rollout(model, x):
    """Attention from [CLS] to every patch through all blocks: x [B, C, H, W] -> float32 [B, h, w].

    Heads averaged, identity added for the residual, rows scaled to sum to 1, blocks multiplied. It knows no class."""
    was_training = model.training
    model.eval()
    _, maps = model.forward_features(x, return_attention=True)  # (B, depth, heads, N, N)
    model.train(was_training)
    return rollout(maps.float().mean(dim=2))[:, 0, 1:].unflatten(1, model.grid_size)


def rollout(attention):
    """Head-averaged attention (B, depth, N, N), rows summing to 1 -> the product (B, N, N) of (A + I) / 2."""
    eye = torch.eye(attention.shape[-1], device=attention.device)
    result = eye.expand(attention.shape[0], -1, -1)
    for block in attention.unbind(1):
        result = (block + eye) / 2 @ result
    return result


def compute(method, model, x, layer, target=1):
    """Maps [B, h, w] of one method, in parts that keep attention small in memory."""
    if method == "rollout":
        return torch.cat([attention_rollout(model, part) for part in x.split(4)])
    return torch.cat([grad_cam(model, part, target, layer) for part in x.split(16)])


# ---------------------------------------------------------------- are they true


@torch.inference_mode()
def curves(model, x, order):
    """P(PNEUMONIA) while patches are replaced by a blurred image (deletion) or uncovered from it (insertion).

    x [B, C, H, W] scaled input; order int64 [B, h*w], most important first -> two float64 [B, STEPS] arrays, at 0 to
    100% of the patches (Petsiuk et al. 2018, arXiv:1806.07421; blur: Gaussian of a tenth of the side)."""
    B, h, w = len(x), *model.grid_size
    blurred = data.gaussian_blur(x[:, :1], torch.full((B,), x.shape[-1] / 10, device=x.device)).expand_as(x)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(h * w, device=x.device).expand(B, -1))
    out = []
    for first, second in ((blurred, x), (x, blurred)):
        scores = []
        for share in np.linspace(0, 1, STEPS):
            taken = (rank < round(share * h * w)).view(B, 1, h, w).repeat_interleave(x.shape[-2] // h, 2)
            taken = taken.repeat_interleave(x.shape[-1] // w, 3)
            scores.append(engine.probabilities(model(torch.where(taken, first, second)).cpu())[:, 1])
        out.append(np.stack(scores, axis=1))
    return out


def mean_interval(values, seed=0):
    """Mean of [N] values with a 95% percentile bootstrap over images -> {"mean", "lo", "hi"}."""
    values = np.asarray(values, dtype=np.float64)
    draws = values[np.random.default_rng(seed).integers(len(values), size=(2000, len(values)))].mean(axis=1)
    lo, hi = np.percentile(draws, [2.5, 97.5])
    return {"mean": float(values.mean()), "lo": float(lo), "hi": float(hi)}


def randomised(model):
    """Yield (name, copy of the model with the weights from the head down to that part drawn anew), cumulatively
    (Adebayo et al. 2018, arXiv:1810.03292)."""
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    parts = [("head", model.head)] + [(f"block {i}", b) for i, b in reversed(list(enumerate(model.blocks)))]
    for name, part in parts + [("patches", model.patch_embed)]:
        for module in part.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                torch.nn.init.trunc_normal_(module.weight, std=0.02)
                torch.nn.init.zeros_(module.bias)
        yield name, model


def lung_mask(image):
    """Heuristic lung fields of a chest image uint8 [S, S] -> bool [S, S]: the "dark field" mask.

    Darker than Otsu's threshold after smoothing, not touching the border, closed and filled; where that is less than
    8% or more than 55% of the image (opaque lungs, odd framing), two upright ellipses instead. It is no segmentation."""
    side = len(image)
    smooth = ndimage.gaussian_filter(image.astype(np.float32), side / 50)
    labels, count = ndimage.label(smooth < _otsu(smooth))
    border = np.unique(np.r_[labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    mask = np.isin(labels, np.setdiff1d(np.arange(1, count + 1), border))
    mask = ndimage.binary_fill_holes(ndimage.binary_closing(mask, iterations=max(1, side // 40)))
    if not 0.08 < mask.mean() < 0.55:
        y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j]
        mask = np.minimum(((x - 0.31) / 0.17) ** 2, ((x - 0.69) / 0.17) ** 2) + ((y - 0.47) / 0.33) ** 2 < 1
    return mask


def _otsu(values):
    """The threshold that maximises the variance between the two classes it makes (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    centres, total = (edges[1:] + edges[:-1]) / 2, counts.sum()
    weight, mass = np.cumsum(counts), np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mass[-1] * weight / total - mass) ** 2 / (weight * (total - weight))
    return centres[
        np.argmax(np.nan_to_num(between[:-1], nan=-1.0))
    ]  # a constant image has no such threshold: the lowest


def regions(maps, images):
    """Share of each map [N, h, w] on the lung fields and on the outer tenth of the image, with the regions' areas."""
    side = images.shape[-1]
    full = F.interpolate(torch.as_tensor(maps).unsqueeze(1), size=(side, side), mode="bilinear")[:, 0].numpy()
    full = full / np.maximum(full.sum(axis=(1, 2), keepdims=True), 1e-12)
    lungs = np.stack([lung_mask(i) for i in images])
    edge = np.ones((side, side), bool)
    edge[side // 10 : side - side // 10, side // 10 : side - side // 10] = False
    return {
        "lung_share": mean_interval((full * lungs).sum(axis=(1, 2))),
        "lung_area": float(lungs.mean()),
        "border_share": mean_interval((full * edge).sum(axis=(1, 2))),
        "border_area": float(edge.mean()),
    }


def faithfulness(model, x, images, methods, layer):
    """Every test of the maps on N images called PNEUMONIA -> JSON for explain.json."""
    n, patches = len(x), model.grid_size[0] * model.grid_size[1]
    rng = np.random.default_rng(0)
    orders = {"random": torch.from_numpy(np.stack([rng.permutation(patches) for _ in range(n)])).to(x.device)}
    maps = {m: compute(m, model, x, layer) for m in methods}
    orders |= {m: maps[m].flatten(1).argsort(dim=1, descending=True) for m in methods}
    out, areas = {"images": n}, {}
    for name, order in orders.items():
        parts = [curves(model, a, b) for a, b in zip(x.split(16), order.split(16))]
        areas[name] = [np.concatenate([p[i] for p in parts]).mean(axis=1) for i in (0, 1)]
        out[name] = {k: mean_interval(v) for k, v in zip(("deletion", "insertion"), areas[name])}
    for m in methods:
        out[m] |= {
            f"{k}_minus_random": mean_interval(areas[m][i] - areas["random"][i])
            for i, k in enumerate(("deletion", "insertion"))
        }
        out[m] |= regions(maps[m].cpu(), images)
        some = x[:8]
        out[m]["randomised"] = []
        for name, broken in randomised(model):
            pairs = zip(
                maps[m][:8].flatten(1).cpu().numpy(), compute(m, broken, some, layer).flatten(1).cpu().numpy()
            )
            rho = [spearmanr(a, b).statistic if a.std() and b.std() else 0.0 for a, b in pairs]
            out[m]["randomised"].append({"down_to": name, "rank_correlation": float(np.mean(rho))})
    return out


# ---------------------------------------------------------------- pictures


def pick(y, p, thr):
    """Rows of the sheet: [(title, index)]: most confident and most borderline of every outcome that occurs."""
    rows = []
    for title, wanted in (
        ("true positive", (y == 1) & (p >= thr)),
        ("false positive", (y == 0) & (p >= thr)),
        ("false negative", (y == 1) & (p < thr)),
        ("true negative", (y == 0) & (p < thr)),
    ):
        index = np.flatnonzero(wanted)
        if len(index):
            far = index[np.argsort(np.abs(p[index] - thr), kind="stable")]
            rows.append((f"{title}, most confident", far[-1]))
            if len(far) > 1:
                rows.append((f"{title}, most borderline", far[0]))
    return rows


def draw(rows, methods, mark, title):
    """A sheet: rows of (text, image uint8 [S, S], {method: map [h, w]}) -> figure: image, maps, overlay, colour bar."""
    columns = 2 + len(methods)
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(2.6 * columns + 0.8, 2.75 * len(rows) + 0.8),
        squeeze=False,
        layout="constrained",
    )
    for line, (text, image, maps) in zip(axes, rows):
        side = len(image)
        line[0].imshow(image, cmap="gray", vmin=0, vmax=255)
        line[0].set_ylabel(text, fontsize=7)
        shown = None
        for ax, method in zip(line[1:], methods):
            grid = maps[method] / max(float(maps[method].max()), 1e-12)
            ax.imshow(grid, cmap="inferno", vmin=0, vmax=1)
            if not maps[method].any():
                ax.text(
                    0.5,
                    0.5,
                    "nothing speaks\nfor this class",
                    color="white",
                    ha="center",
                    va="center",
                    transform=ax.transAxes,
                    fontsize=8,
                )
        for ax in line:
            ax.set(xticks=[], yticks=[])
        grid = torch.as_tensor(maps[methods[0]])[None, None]
        smooth = F.interpolate(grid, size=(side, side), mode="bilinear")[0, 0].numpy()
        line[-1].imshow(image, cmap="gray", vmin=0, vmax=255)
        shown = line[-1].imshow(
            smooth / max(float(smooth.max()), 1e-12), cmap="inferno", vmin=0, vmax=1, alpha=0.45
        )
    for ax, name in zip(
        axes[0], ["image", *(METHODS[m] for m in methods), f"overlay of {METHODS[methods[0]]}"]
    ):
        ax.set_title(name, fontsize=9)
    figure.colorbar(
        shown, ax=axes[:, -1].tolist(), shrink=min(1, 2 / len(rows)), label="share of the image's own maximum"
    )
    figure.suptitle(title + mark, fontsize=11)
    return figure


def save(figure, path):
    with common.atomic_path(path) as tmp:
        figure.savefig(tmp, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- main


def parse():
    """Checked command line."""
    parser = common.parser(__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="files to explain instead of a data split")
    parser.add_argument("--run", default="outputs/pretrained", metavar="DIR", help="a calibrated run folder")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="which images to choose from")
    parser.add_argument("--method", choices=(*METHODS, "both"), default="both", help="which maps to draw")
    parser.add_argument(
        "--target", default="PNEUMONIA", metavar="CLASS", help="whose logit Grad-CAM explains"
    )
    parser.add_argument("--layer", type=int, default=-1, help="block of Grad-CAM; -1 is the last")
    parser.add_argument(
        "--tests", type=int, default=40, metavar="N", help="images for the faithfulness tests; 0: none"
    )
    parser.add_argument("--device", default="auto", help="auto (cuda > mps > cpu), cuda, mps, cpu")
    return parser.parse_args()


def main():
    args = parse()
    device, run = engine.pick_device(args.device), Path(args.run)
    model, results = engine.load_run(run)
    if results["model_config"]["kind"] != "vit":
        raise common.InputError(f"{run} is no Vision Transformer: it has no tokens to explain")
    if not -len(model.blocks) <= args.layer < len(model.blocks):
        raise common.InputError(f"--layer {args.layer}: the model has blocks 0 to {len(model.blocks) - 1}")
    calibration, config = common.read_calibration(run), data.config_from_json(results["data"])
    if args.target not in config.classes:
        raise common.InputError(f"--target {args.target} is not one of {', '.join(config.classes)}")
    target = config.classes.index(args.target)
    thr, t = (
        calibration["threshold"],
        calibration["temperature"] if calibration["temperature_applied"] else 1.0,
    )
    methods = list(METHODS) if args.method == "both" else [args.method]
    mark = " [SYNTHETIC]" if results["synthetic"] else ""
    model.to(device)

    def prepare(pixels):
        x = data.normalise(torch.from_numpy(np.ascontiguousarray(pixels)).to(device), config.normalise)
        return engine.scale_input(x, results["mean"], results["std"])

    def score(pixels):  # as calibrate.py and predict.py do, or an image on the threshold could change sides
        parts, amp = torch.from_numpy(pixels).split(64), engine.trained_precision(results, device)
        with torch.inference_mode():
            logits = [
                engine.forward(
                    model,
                    data.normalise(part.to(device), config.normalise),
                    mean=results["mean"],
                    std=results["std"],
                    amp=amp,
                )
                for part in parts
            ]
        return metrics.tempered(torch.cat(logits).cpu().numpy(), t)

    def row(head, name, pixels, p, truth):
        decisions = [config.classes[int(p >= point)] for point in (0.5, thr)]
        maps = {
            m: compute(m, model, prepare(pixels[None]), args.layer, target)[0].cpu().numpy() for m in methods
        }
        text = f"{head}\n{Path(name).name}\np = {p:.3f}; @0.5 {decisions[0]}, @Rec {decisions[1]}" + (
            f"\ntruth {truth}" if truth else ""
        )
        return text, pixels, maps

    folder = run / "explain"
    if args.images:
        try:
            pixels = np.stack([data.decode(path, config.img_size, config.resize) for path in args.images])
        except OSError as error:
            raise common.InputError(f"an image cannot be read: {error}") from None
        rows = [row("", n, i, p, "") for n, i, p in zip(args.images, pixels, score(pixels))]
    else:
        subset = data.load_train_val(config)[1] if args.split == "val" else data.load_test(config)
        pixels, y = np.stack([subset.images[r] for r in subset.rows]), subset.labels
        p = score(pixels)
        rows = [
            row(head, subset.files[i], pixels[i], p[i], config.classes[y[i]]) for head, i in pick(y, p, thr)
        ]
        save(
            draw(
                rows,
                methods,
                mark,
                f"{run.name}, {args.split}: threshold @Rec {thr:.3f}; Grad-CAM of {args.target}",
            ),
            folder / "sheet.png",
        )
    for text, image, maps in rows:
        save(
            draw([(text, image, maps)], methods, mark, run.name),
            folder / f"{Path(text.splitlines()[1]).stem}.png",
        )
    print(f"wrote {len(rows)} pictures{'' if args.images else ' and sheet.png'} to {folder}", flush=True)
    if args.images or not args.tests:
        return
    called = np.flatnonzero((y == 1) & (p >= thr))
    if len(called) < 2:
        raise common.InputError(
            f"{run}: fewer than two true positives on {args.split}: nothing to test the maps on"
        )
    chosen = np.sort(np.random.default_rng(0).choice(called, min(args.tests, len(called)), replace=False))
    report = faithfulness(model, prepare(pixels[chosen]), pixels[chosen], methods, args.layer)
    common.write_json(
        folder / "explain.json",
        {
            "format": common.FORMAT,
            "synthetic": results["synthetic"],
            "split": args.split,
            "checkpoint": calibration["checkpoint"],
            "layer": args.layer,
            **report,
        },
    )
    for m in methods:
        r = report[m]
        print(
            f"{METHODS[m]}: deletion minus random {r['deletion_minus_random']['mean']:+.3f}, insertion minus random "
            f"{r['insertion_minus_random']['mean']:+.3f}; on the lungs {r['lung_share']['mean']:.2f} (area "
            f"{r['lung_area']:.2f}), on the border {r['border_share']['mean']:.2f} (area {r['border_area']:.2f}); rank "
            f"correlation after randomising the head {r['randomised'][0]['rank_correlation']:.2f}, everything "
            f"{r['randomised'][-1]['rank_correlation']:.2f}"
        )


if __name__ == "__main__":
    common.start(main)
