"""Choose each run's threshold on validation, recall first, and apply it, unchanged, to test.

    python calibrate.py --min-recall 0.95

For every finished run under outputs/ (or --run DIR ...): scores the validation images, chooses among the
thresholds with recall >= --min-recall the one with the highest precision, then scores the test images: the only
script that opens them. Writes scores.npz and calibration.json beside the checkpoint and prints @0.5 and @Rec.
Scores are kept while checkpoint and data are unchanged, so another --min-recall takes seconds.
"""
from pathlib import Path

import numpy as np

import common
import data
import engine
import metrics

COLUMNS = ("recall", "specificity", "precision", "acc", "f1", "auroc")


def load_sets(config, fingerprint, loaded):
    """(validation, test) Subsets of a run's data settings, kept in `loaded`; InputError if the split differs."""
    if config not in loaded:
        _, val, split = data.load_train_val(config)
        loaded[config] = val, data.load_test(config), split["fingerprint"]
    val, test, found = loaded[config]
    if found != fingerprint:
        raise common.InputError(f"the images in {config.data_dir} are not those the run was trained on (the split's "
                                "fingerprint differs): point --data-dir at the same files")
    return val, test


def score(run, sets, *, device, batch_size):
    """{val,test}_{files,labels,p1,logits} of a run, from scores.npz if checkpoint and data are unchanged."""
    model, results = engine.load_run(run)
    amp = bool(results["recipe"]["amp"]) and engine.fast_bf16(device)
    key = common.sha256([common.sha256(Path(run, "checkpoint.pth")), results["mean"], results["std"], amp,
                         [data.pixel_fingerprint(s) for s in sets]])
    path = Path(run, "scores.npz")
    if (kept := read_scores(path, key)) is not None:
        return kept
    model.to(device)
    scores = {"key": np.array(key)}
    for name, subset in zip(("val", "test"), sets):
        logits = engine.predict(model, subset, mean=results["mean"], std=results["std"], device=device, amp=amp,
                                batch_size=batch_size, progress=f"{run} {name}").numpy()
        scores |= {f"{name}_files": np.array(subset.files), f"{name}_labels": subset.labels,
                   f"{name}_p1": engine.probabilities(logits)[:, 1], f"{name}_logits": logits}
    with common.atomic_path(path) as tmp, open(tmp, "wb") as f:
        np.savez(f, **scores)
    return scores


def read_scores(path, key):
    """The arrays of scores.npz if it is intact and belongs to `key`, else None."""
    try:
        with np.load(path, allow_pickle=False) as file:
            scores = {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, KeyError) as error:
        common.say(f"{path} is damaged ({error}): scoring again")
        return None
    return scores if "key" in scores and str(scores["key"]) == key else None


def calibrate(scores, min_recall):
    """Scores of a run -> the content of calibration.json."""
    thr, _, _ = metrics.choose_threshold_by_min_recall(scores["val_labels"], scores["val_p1"], min_recall)
    summaries = {name: {point: metrics.summarize_at_threshold(scores[f"{name}_labels"], scores[f"{name}_p1"], t)
                        for point, t in (("at_0.5", 0.5), ("at_rec", thr))} for name in ("val", "test")}
    return {"format": common.FORMAT, "min_recall": min_recall, "threshold": thr, **summaries}


def show(run, result):
    """Print a run's figures, validation beside test."""
    print(f"\n{run}: threshold {result['threshold']:.4f}, chosen on validation for recall >= {result['min_recall']:g}")
    print(f"  {'':12}" + "".join(f"{c:>12}" for c in COLUMNS))
    for name, title in (("val", "validation"), ("test", "test")):
        for point, mark in (("at_0.5", "@0.5"), ("at_rec", "@Rec")):
            row = result[name][point]
            print(f"  {title + ' ' + mark:16}" + "".join(f"{row[c]:12.4f}" for c in COLUMNS)[4:])


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--min-recall", type=float, default=0.95, help="recall floor on validation, in (0, 1]")
    parser.add_argument("--run", nargs="+", metavar="DIR", help="run folders (default: all under --runs-dir)")
    parser.add_argument("--runs-dir", default="outputs", help="where the run folders lie")
    parser.add_argument("--data-dir", default=None, help="the same images elsewhere (default: as trained)")
    parser.add_argument("--cache-dir", default=None, help="decoded images (default: as trained)")
    parser.add_argument("--device", default="auto", help="auto (cuda > mps > cpu), cuda, mps, cpu")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step")
    args = parser.parse_args()
    if not 0 < args.min_recall <= 1:
        raise common.InputError(f"--min-recall must lie in (0, 1], got {args.min_recall}")
    if args.batch_size < 1:
        raise common.InputError(f"--batch-size must be at least 1, got {args.batch_size}")

    device, loaded = engine.pick_device(args.device), {}
    for run in common.find_runs(args.runs_dir, args.run):
        results = common.read_results(run)
        moved = {k: v for k, v in (("data_dir", args.data_dir), ("cache_dir", args.cache_dir)) if v}
        config = data.config_from_json({**results["data"], **moved})
        sets = load_sets(config, results["split"]["fingerprint"], loaded)
        result = calibrate(score(run, sets, device=device, batch_size=args.batch_size), args.min_recall)
        result["synthetic"] = results["synthetic"]
        common.write_json(Path(run, "calibration.json"), result)
        show(str(run) + (" (SYNTHETIC data)" if results["synthetic"] else ""), result)


if __name__ == "__main__":
    common.start(main)
