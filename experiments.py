"""Tell recipes apart without looking at the test set: signals of finished runs, from validation and another hospital.

    python experiments.py --runs-dir outputs/screen --nih NIH_DIR

Ordinary validation cannot tell recipes apart (all reach AUROC 0.99). For each run this scores its validation images
and prints a markdown row:

- corrupted: the same images with changed exposure, sharpness, noise, compression and framing (after ImageNet-C,
  Hendrycks and Dietterich 2019, arXiv:1903.12261): mean AUROC, and mean specificity and recall at the recall-first
  threshold of the clean images. "worst" is the corruption with the least mean of the two.
- borrowed: the border (an eighth of the side) comes from a random validation image of the *other* class, so that what lies
  there (markers, tubes, framing, the look of a machine) speaks for the wrong answer: AUROC. "control" is the same with
  a border from the own class, for what the seams alone do.
- NIH (with --nih DIR): images of another hospital, mostly adults, from NIH ChestX-ray14 (Wang et al. 2017,
  arXiv:1705.02315): AUROC of "No Finding" against pneumonia, consolidation or infiltration. Another shift altogether.
- choice: the mean of borrowed AUROC and of (corrupted specificity + corrupted recall) / 2. It was the rule once, and
  chose badly (EXPERIMENTS.md); ViT-Ti/16's recipe is now chosen on the NIH AUROC.

The test folder is counted, not opened (but by --stamps, which says so). With --against-test a second table holds the
rank correlation of each signal with the test results that calibrate.py has left: read it after the choice.
"""

import csv
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import common
import data
import engine
import metrics
import npz_loader
from vit import VisionTransformer

PNEUMONIA_LIKE = {"Pneumonia", "Consolidation", "Infiltration"}


def corruptions():
    """{name: uint8 [S, S] -> uint8 [S, S]}: fixed changes of exposure, sharpness, noise, compression and framing."""
    rng = np.random.default_rng(0)

    def levels(f):
        return lambda x: (f(x / 255.0).clip(0, 1) * 255).round().astype(np.uint8)

    def through(f):
        return lambda x: np.asarray(f(Image.fromarray(x)))

    def jpeg(image):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=15)
        return Image.open(buffer)

    def smaller(image, factor):
        side = image.size[0]
        return image.resize((round(side * factor),) * 2, Image.Resampling.BILINEAR).resize(
            (side,) * 2, Image.Resampling.BILINEAR
        )

    def framed(left, top, right, bottom):
        def crop(image):
            side = image.size[0]
            return image.resize(
                (side, side),
                Image.Resampling.BILINEAR,
                box=(left * side, top * side, right * side, bottom * side),
            )

        return crop

    def wider(image):
        side = image.size[0]
        canvas, inner = Image.new("L", (side, side)), round(0.85 * side)
        canvas.paste(image.resize((side, inner), Image.Resampling.BILINEAR), (0, (side - inner) // 2))
        return canvas

    return {
        "darker": levels(lambda x: x - 0.15),
        "brighter": levels(lambda x: x + 0.15),
        "flatter": levels(lambda x: (x - x.mean()) * 0.6 + x.mean()),
        "harder": levels(lambda x: (x - x.mean()) * 1.5 + x.mean()),
        "gamma 0.6": levels(lambda x: x**0.6),
        "gamma 1.6": levels(lambda x: x**1.6),
        "noise": levels(lambda x: x + rng.normal(0, 0.06, x.shape)),
        "jpeg 15": through(jpeg),
        "blur": through(lambda i: smaller(i, 0.35)),
        "coarse": through(lambda i: smaller(i, 0.2)),
        "crop and shift": through(framed(0.1, 0.04, 0.96, 0.9)),
        "zoom": through(framed(0.1, 0.1, 0.9, 0.9)),
        "wider": through(wider),
    }


def borrowed(images, labels, other):
    """uint8 [N, S, S] whose borders come from images of the other class (`other`) or of the same one, drawn with seed 0."""
    rng = np.random.default_rng(0)
    donors = np.array([rng.choice(np.flatnonzero((labels != y) == other)) for y in labels])
    own, border = (
        torch.from_numpy(images[rows]).unsqueeze(1) / 255 for rows in (np.arange(len(images)), donors)
    )
    framed = data.borrow_frame(own, border, torch.full((len(images),), 1 / 8))
    return framed.mul_(255).round_().byte().squeeze(1).numpy()


def load_nih(folder, config):
    """Images of `folder`/images with their findings in `folder`/sample_labels.csv, prepared as `config` says: a Subset of those
    with "No Finding" (0) and those with one of PNEUMONIA_LIKE (1). InputError if there are none of either."""
    found, path = {0: [], 1: []}, Path(folder, "sample_labels.csv")
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                findings, name = set(row["Finding Labels"].split("|")), f"images/{row['Image Index']}"
                if Path(folder, name).exists() and (findings == {"No Finding"} or findings & PNEUMONIA_LIKE):
                    found[int(findings != {"No Finding"})].append(name)
    except (OSError, KeyError, csv.Error, UnicodeDecodeError) as error:
        raise common.InputError(
            f"--nih: {path} is no list of NIH findings: {type(error).__name__} {error}"
        ) from None
    if not found[0] or not found[1]:
        raise common.InputError(
            f"--nih: {folder}/images holds {len(found[0])} images of {path} without and {len(found[1])} with "
            "pneumonia, consolidation or infiltration; both are needed"
        )
    files, labels = found[0] + found[1], np.repeat([0, 1], [len(found[0]), len(found[1])])
    images, rows, _ = data.load_images(folder, files, config, "nih")
    return data.Subset([files[r] for r in rows], labels[rows], images, rows, config.normalise)


def border_alone(train, weights, device, folds=5):
    """How much of the classes lies where little lung is: AUROC of a logistic regression on the frozen features that the
    pretrained ViT of `weights` makes of the border (outer eighth), the middle of every image grey. Out of fold, each
    patient in one fold. InputError for weights that cannot be read."""
    side, shape = train.images.shape[1], npz_loader.config_from_npz(weights)
    images = train.images[train.rows].copy()
    images[:, side // 8 : -(side // 8), side // 8 : -(side // 8)] = 128
    model = VisionTransformer(**{**shape, "img_size": side, "num_classes": 2})
    report = npz_loader.load_npz(model, weights)
    subset = data.Subset(train.files, train.labels, images, np.arange(len(images)), train.normalise)
    x = engine.cls_features(
        model,
        subset,
        mean=report["mean"],
        std=report["std"],
        device=device,
        amp=engine.fast_bf16(device),
        progress="features",
    )
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.01, max_iter=2000, class_weight="balanced")
    )
    p = cross_val_predict(
        probe,
        x.cpu().numpy(),
        train.labels,
        groups=[data.patient_id(f) for f in train.files],
        cv=GroupKFold(folds),
        method="predict_proba",
    )
    return roc_auc_score(train.labels, p[:, 1])


def stamped(subset, template, near=0.75):
    """Boolean [N]: does the lower right corner hold the `template` (float32 [h, w]), by normalised cross-correlation >= near."""
    side = subset.images.shape[1]
    x = torch.from_numpy(subset.images[subset.rows][:, -side // 8 :, -side // 5 :].astype(np.float32))[
        :, None
    ]
    t, ones = template - template.mean(), torch.ones(1, 1, *template.shape)
    var = F.conv2d(x * x, ones) - F.conv2d(x, ones) ** 2 / template.numel()
    return (
        (F.conv2d(x, t[None, None]) / t.norm() / var.clamp(min=1).sqrt()).flatten(1).amax(1) >= near
    ).numpy()


def count_stamps(train, val, test):
    """Markdown: how many images carry the tube voltage ("KV59") that one X-ray unit burns in, by class and split.

    The templates are that text in three training images (224 px); the test images are opened for this count alone."""
    places = {
        "person1077_virus_1787": (216, 222, 211, 223),
        "person1124_virus_1851": (213, 222, 209, 223),
        "person1125_virus_1852": (213, 222, 206, 223),
    }
    names = [Path(f).stem for f in train.files]
    if train.images.shape[1] != 224 or not set(places) <= set(names):
        raise common.InputError("--stamps needs the Kermany set's training images at 224 px")
    templates = [
        torch.from_numpy(train.images[train.rows[names.index(n)]][a:b, c:d].astype(np.float32))
        for n, (a, b, c, d) in places.items()
    ]
    lines = ["| images with the stamp | NORMAL | PNEUMONIA |", "| --- | ---: | ---: |"]
    for name, subset in (("train", train), ("validation", val), ("test", test)):
        hit = np.any([stamped(subset, t) for t in templates], axis=0)
        lines.append(
            f"| {name} | "
            + " | ".join(f"{hit[subset.labels == k].sum()} of {(subset.labels == k).sum()}" for k in (0, 1))
            + " |"
        )
    return "\n".join(lines)


def signals(run, val, nih, device):
    """{signal: value} of a finished run on its validation images and those of load_nih (or None)."""
    model, results = engine.load_run(run)
    amp = engine.trained_precision(results, device)
    model.to(device)

    def score(images, subset=val):
        changed = data.Subset(subset.files, subset.labels, images, np.arange(len(images)), subset.normalise)
        logits = engine.predict(
            model,
            changed,
            mean=results["mean"],
            std=results["std"],
            device=device,
            amp=amp,
            batch_size=128,
            progress=str(run),
        )
        return engine.probabilities(logits)[:, 1]

    y, images = val.labels, val.images[val.rows]
    p = score(images)
    thr, _, _ = metrics.choose_threshold_by_min_recall(y, p, 0.95)
    wrong, control = (roc_auc_score(y, score(borrowed(images, y, other))) for other in (True, False))
    far = {"NIH AUROC": roc_auc_score(nih.labels, score(nih.images[nih.rows], nih))} if nih else {}
    # All the NORMAL images and every third of the others: the specificity is what varies.
    few = val.take(np.flatnonzero((y == 0) | (np.cumsum(y) % 3 == 0)))
    rows = {}
    for name, change in corruptions().items():
        q = score(np.stack([change(few.images[r]) for r in few.rows]), few)
        rows[name] = [
            roc_auc_score(few.labels, q),
            (q[few.labels == 0] < thr).mean(),
            (q[few.labels == 1] >= thr).mean(),
        ]
    auroc, spec, recall = np.mean(list(rows.values()), axis=0)
    return {
        "val AUROC": roc_auc_score(y, p),
        "corrupted AUROC": auroc,
        "corrupted spec": spec,
        "corrupted recall": recall,
        "worst": min(rows, key=lambda n: sum(rows[n][1:])),
        "borrowed AUROC": wrong,
        "control AUROC": control,
        **far,
        "choice": (wrong + (spec + recall) / 2) / 2,
        "minutes": results["minutes"],
        "corruptions": {n: [round(float(v), 4) for v in r] for n, r in rows.items()},
    }


def against_test(table, runs):
    """Markdown: Spearman's rank correlation of each signal with two test results, over runs with a calibration."""
    done = [
        (row, common.read_calibration(run))
        for row, run in zip(table, runs)
        if Path(run, "calibration.json").exists()
    ]
    if len(done) < 4:
        raise common.InputError(f"--against-test needs 4 runs with a calibration.json, found {len(done)}")
    lines = [
        f"\n| signal ({len(done)} runs) | rho with test AUROC | rho with test specificity @Rec |",
        "| --- | ---: | ---: |",
    ]
    columns = {
        k: [row[k] for row, _ in done] for k, v in table[0].items() if isinstance(v, float) and k != "minutes"
    }
    columns |= {
        f"AUROC under {k}": [row["corruptions"][k][0] for row, _ in done] for k in table[0]["corruptions"]
    }
    for name, have in columns.items():
        rho = [
            spearmanr(have, [c["test"]["at_rec"][k] for _, c in done])[0] for k in ("auroc", "specificity")
        ]
        lines.append(f"| {name} | {rho[0]:+.2f} | {rho[1]:+.2f} |")
    return "\n".join(lines)


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--run", nargs="+", metavar="DIR", help="run folders (default: all under --runs-dir)")
    parser.add_argument("--runs-dir", default="outputs", help="where the run folders lie")
    parser.add_argument(
        "--against-test",
        action="store_true",
        help="afterwards: how well the signals foresaw the test results",
    )
    parser.add_argument(
        "--nih",
        metavar="DIR",
        default=None,
        help="a folder of NIH ChestX-ray14: images/ and sample_labels.csv",
    )
    parser.add_argument(
        "--stamps",
        metavar="DIR",
        default=None,
        help="instead: count the images of one X-ray unit by the text "
        "it burns in, in the data folder DIR (opens the test images)",
    )
    parser.add_argument(
        "--border",
        metavar="DIR",
        default=None,
        help="instead: how well the border alone tells the classes of the "
        "training images in the data folder DIR apart, by the frozen ViT of --weights",
    )
    parser.add_argument(
        "--weights", metavar="PATH", default=npz_loader.DEFAULT_PATH, help="for --border: pretrained weights"
    )
    parser.add_argument("--device", default="auto", help="auto (cuda > mps > cpu), cuda, mps, cpu")
    args = parser.parse_args()
    if args.stamps:
        config = data.DataConfig(args.stamps)
        train, val, _ = data.load_train_val(config)
        print(count_stamps(train, val, data.load_test(config)))
        return
    device, loaded, table = engine.pick_device(args.device), {}, []
    if args.border:
        train, _, _ = data.load_train_val(data.DataConfig(args.border))
        auroc = border_alone(train, args.weights, device)
        print(
            f"the border alone (outer eighth of {len(train)} training images), out of fold by patient: AUROC {auroc:.3f}"
        )
        return
    runs = common.find_runs(args.runs_dir, args.run)
    for run in runs:
        results = common.read_results(run)
        config = data.config_from_json(results["data"])
        if config not in loaded:
            _, val, split = data.load_train_val(config)
            loaded[config] = val, args.nih and load_nih(args.nih, config), split["fingerprint"]
        val, nih, fingerprint = loaded[config]
        if fingerprint != results["split"]["fingerprint"]:
            raise common.InputError(f"the images in {config.data_dir} are not those {run} was trained on")
        path, checkpoint = Path(run, "signals.json"), common.sha256(Path(run, "checkpoint.pth"))
        kept = common.read_json(path) if path.exists() else {}
        if (
            kept.get("checkpoint") != checkpoint
            or "borrowed AUROC" not in kept["signals"]
            or nih
            and "NIH AUROC" not in kept["signals"]
        ):
            kept = {"checkpoint": checkpoint, "signals": signals(run, val, nih, device)}
            common.write_json(path, kept)
        table.append(kept["signals"])
        shown = {k: v for k, v in table[-1].items() if k != "corruptions" and (nih or k != "NIH AUROC")}
        if len(table) == 1:
            print("| run | " + " | ".join(shown) + " |\n| --- |" + " ---: |" * len(shown))
        print(
            f"| {run} | "
            + " | ".join(v if isinstance(v, str) else f"{v:.3f}" for v in shown.values())
            + " |",
            flush=True,
        )
    if args.against_test:
        print(against_test(table, runs))


if __name__ == "__main__":
    common.start(main)
