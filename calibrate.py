"""Choose each run's threshold on validation, recall first, and apply it, unchanged, to test.

    python calibrate.py --min-recall 0.95

For every finished run under outputs/ (or --run DIR ...): scores the validation images and chooses two thresholds
there: @Rec, the highest precision among thresholds with recall >= --min-recall; and @Guar, whose true recall is
>= --min-recall with probability --guarantee, for patients like the validation patients. Then scores the test
images (the only script that opens them for that) and prints both sides with intervals. Writes scores.npz and
calibration.json beside the checkpoint (with --tta: scores-tta.npz, calibration-tta.json). Scores are kept while
checkpoint and data are unchanged, so another --min-recall takes seconds.
"""

import argparse
from pathlib import Path

import numpy as np

import common
import data
import engine
import metrics

COLUMNS = ("recall", "specificity", "precision", "acc", "f1", "auroc")
POINTS = {"at_0.5": "@0.5", "at_rec": "@Rec", "at_guaranteed": "@Guar"}


def load_sets(config, fingerprint, loaded):
    """(validation, test) Subsets of a run's data settings, kept in `loaded`; InputError if the split differs."""
    if config not in loaded:
        _, val, split = data.load_train_val(config)
        loaded[config] = val, data.load_test(config), split["fingerprint"]
    val, test, found = loaded[config]
    if found != fingerprint:
        raise common.InputError(
            f"the images in {config.data_dir} are not those the run was trained on (the split's "
            "fingerprint differs): point --data-dir at the same files"
        )
    return val, test


def score(run, sets, *, device, batch_size, tta=None):
    """{val,test}_{files,patients,labels,logits} of a run, from disk if checkpoint and data are unchanged.

    `tta`: None, or {"flip": bool} for test-time augmentation."""
    model, results = engine.load_run(run)
    amp = engine.trained_precision(results, device)
    key = common.sha256(
        [
            common.sha256(Path(run, "checkpoint.pth")),
            results["mean"],
            results["std"],
            amp,
            tta,
            results["data"].get("normalise", "none"),
            [data.pixel_fingerprint(s) for s in sets],
        ]
    )
    path = Path(run, "scores-tta.npz" if tta else "scores.npz")
    if (kept := read_scores(path, key)) is not None:
        return kept
    model.to(device)
    scores = {"key": np.array(key)}
    for name, subset in zip(("val", "test"), sets):
        logits = engine.predict(
            model,
            subset,
            mean=results["mean"],
            std=results["std"],
            device=device,
            amp=amp,
            batch_size=batch_size,
            views=data.tta_views(**tta) if tta else None,
            progress=f"{run} {name}",
        ).numpy()
        scores |= {
            f"{name}_files": np.array(subset.files),
            f"{name}_labels": subset.labels,
            f"{name}_logits": logits,
            f"{name}_patients": np.array([data.patient_id(f) for f in subset.files]),
        }
    return scores


def read_scores(path, key):
    """The arrays of a scores file if it is intact and belongs to `key`, else None."""
    try:
        with np.load(path, allow_pickle=False) as file:
            scores = {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except common.DAMAGED as error:
        common.say(f"{path} is damaged ({error}): scoring again")
        return None
    needed = [f"{s}_{k}" for s in ("val", "test") for k in ("files", "labels", "patients", "logits")]
    return (
        scores if "key" in scores and str(scores["key"]) == key and all(k in scores for k in needed) else None
    )


def show(title, result):
    """Print a run's figures, validation beside test, with intervals of recall and specificity."""
    guarantee = result["guarantee"]
    print(
        f"\n{title}: thresholds chosen on validation: @Rec {result['threshold']:.4f} (recall >= "
        f"{result['min_recall']:g} there); "
        + (
            f"@Guar {guarantee['threshold']:.4f} (true recall >= {result['min_recall']:g} with confidence "
            f"{guarantee['confidence']:g}, by {guarantee['positive_patients']} patients)"
            if guarantee["threshold"] is not None
            else f"no @Guar: {guarantee['why_not']}"
        )
    )
    print(" " * 18 + "".join(f"{c:>12}" for c in COLUMNS) + "   95% recall      95% specificity")
    for name, word in (("val", "validation"), ("test", "test")):
        for point, mark in POINTS.items():
            if point in result[name]:
                row = result[name][point]
                spans = [
                    "{:.3f} to {:.3f}".format(*metrics.reported_interval(row, k))
                    for k in ("recall", "specificity")
                ]
                print(
                    f"  {word:10} {mark:5}"
                    + "".join(f"{row[c]:12.4f}" for c in COLUMNS)
                    + "   "
                    + "  ".join(spans)
                )
    calib, row = result["probability"], result["test"]["at_rec"]["at_prevalence"]
    print(
        f"  temperature {result['temperature']:.3f} ({'applied' if result['temperature_applied'] else 'not applied'}): "
        + "; ".join(
            f"{name} ECE {calib[name]['before']['ece']:.3f} -> {calib[name]['after']['ece']:.3f}, "
            f"NLL {calib[name]['before']['nll']:.3f} -> {calib[name]['after']['nll']:.3f}"
            for name in ("val", "test")
        )
    )
    if row["ppv"] is not None and row["npv"] is not None:
        print(
            f"  if {row['prevalence']:.0%} of the children were sick, @Rec on test: PPV {row['ppv']:.3f}, "
            f"NPV {row['npv']:.3f}"
        )


def parse():
    """Checked command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--min-recall", type=float, default=0.95, help="recall floor, in (0, 1]")
    parser.add_argument(
        "--guarantee",
        type=float,
        default=None,
        metavar="CONFIDENCE",
        help="confidence of the guaranteed threshold, in (0, 1); naming it makes too few patients an "
        "error (default: 0.95, left out where it cannot be given)",
    )
    parser.add_argument(
        "--temperature",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="divide logits by the temperature fitted on validation: same decisions, other probabilities",
    )
    parser.add_argument(
        "--tta", action="store_true", help="average over small shifts and zooms; kept as a row of its own"
    )
    parser.add_argument("--tta-flip", action="store_true", help="mirrored views too (implies --tta)")
    parser.add_argument(
        "--bootstrap", type=int, default=2000, metavar="N", help="draws of the patient bootstrap"
    )
    parser.add_argument(
        "--prevalence", type=float, default=0.1, help="share of sick for predictive values, in (0, 1)"
    )
    parser.add_argument("--run", nargs="+", metavar="DIR", help="run folders (default: all under --runs-dir)")
    parser.add_argument("--runs-dir", default="outputs", help="where the run folders lie")
    parser.add_argument("--data-dir", default=None, help="the same images elsewhere (default: as trained)")
    parser.add_argument("--cache-dir", default=None, help="decoded images (default: as trained)")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out unreadable images (default: as trained)"
    )
    parser.add_argument("--device", default="auto", help="auto (cuda > mps > cpu), cuda, mps, cpu")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step")
    args = parser.parse_args()
    for name, high in (("min_recall", True), ("guarantee", False), ("prevalence", False)):
        value = getattr(args, name)
        if value is not None and not (0 < value < 1 or value == 1 and high):
            raise common.InputError(
                f"--{name.replace('_', '-')} must lie in (0, 1{']' if high else ')'}, got {value}"
            )
    for name, least in (("batch_size", 1), ("bootstrap", 100)):
        if getattr(args, name) < least:
            raise common.InputError(
                f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}"
            )
    return args


def main():
    args = parse()
    device, loaded, promised = engine.pick_device(args.device), {}, False
    tta = {"flip": args.tta_flip} if args.tta or args.tta_flip else None
    suffix = "-tta" if tta else ""
    for run in common.find_runs(args.runs_dir, args.run):
        results = common.read_results(run)
        moved = {k: getattr(args, k) for k in ("data_dir", "cache_dir", "skip_bad") if getattr(args, k)}
        config = data.config_from_json({**results["data"], **moved})
        sets = load_sets(config, results["split"]["fingerprint"], loaded)
        scores = score(run, sets, device=device, batch_size=args.batch_size, tta=tta)
        try:
            result = metrics.evaluate(
                scores,
                min_recall=args.min_recall,
                confidence=args.guarantee or 0.95,
                strict=args.guarantee is not None,
                temperature=args.temperature,
                bootstrap=args.bootstrap,
                prevalence=args.prevalence,
            )
        except common.InputError as error:
            raise common.InputError(f"{run}: {error}") from None
        promised = promised or result["guarantee"]["threshold"] is not None
        result |= {
            "format": common.FORMAT,
            "checkpoint": common.sha256(Path(run, "checkpoint.pth")),
            "synthetic": results["synthetic"],
            "tta": tta,
            "command": common.command_line(),
        }
        with common.atomic_path(Path(run, f"scores{suffix}.npz")) as tmp, open(tmp, "wb") as f:
            np.savez(f, **scores)
        common.write_json(Path(run, f"calibration{suffix}.json"), result)
        show(
            str(run) + (" with TTA" if tta else "") + (" (SYNTHETIC data)" if results["synthetic"] else ""),
            result,
        )
    if promised:
        print(
            "\n@Guar holds for patients like the validation patients. It does not survive a shift: compare the "
            "validation and test lines."
        )


if __name__ == "__main__":
    common.start(main)
