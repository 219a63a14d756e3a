"""Do the checks for another hospital keep what they promise? Simulated, so that the truth is known.

    python studies/promises.py

Prints three markdown tables:

- notice (shift.py): how often a batch of n patients that are like the 344 of validation is called shifted.
  It should be in at most 5% of the draws.
- promise (hospital.py): thresholds chosen on n local patients with the finding and as many without; how often
  their true recall is below the floor of 0.95, and what it is on average.
- watch (betting.py): how many of the hospitals with a true recall at the floor of 0.95 are ever alarmed in
  3,000 sick patients (at most 5%), and after how many the alarm comes where it is lower.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

import betting
import common
import hospital
import shift
from intervals import wilson_interval
from operating import Rule

DIMENSIONS, VALIDATED = 24, 344
BATCHES = (20, 50, 100, 250, 500, 1000)
LOCAL = (19, 40, 59, 100, 200)
RECALLS = (0.95, 0.90, 0.85, 0.80)
SICK = 3000


def patients(rng, count):
    """(features [count, D], correlated; logits [count, 2]) of a made-up model, one image each."""
    mixing = np.random.default_rng(0).normal(size=(DIMENSIONS, DIMENSIONS))
    features = (rng.normal(size=(count, DIMENSIONS)) @ mixing).astype(np.float32)
    half = features[:, 0] / 3 + rng.normal(size=count)
    return features, np.stack([-half, half], axis=1).astype(np.float32)


def called_shifted(seed, n):
    """Whether a batch of n patients like those of validation is called shifted."""
    rng = np.random.default_rng([seed, n])
    features, logits = patients(rng, VALIDATED)
    known = shift.Reference(
        shift.learn(patients(rng, 1024)[0], features, logits, range(VALIDATED)), "made up"
    )
    features, logits = patients(rng, n)
    batch, (typicality, places) = shift.Batch(), known.place(features)
    for i, row in enumerate(zip(typicality, places, logits, logits[:, 1] > 0)):
        batch.add(str(i), str(i), *row)
    return known.judge(batch, known.logits[:, 1] > 0)["verdict"] == "shifted"


def true_recalls(seed, n, rule):
    """{point: true recall} of thresholds chosen on n sick and n healthy patients; scores of the sick are
    uniform, so that the recall of a threshold t is 1 - t."""
    rng = np.random.default_rng([seed, n])
    y, p = np.repeat([0, 1], n), np.concatenate([rng.random(n) ** 3, rng.random(n)])
    found = hospital.choose(y, p, np.arange(2 * n), rule)
    points = {"@Rec": "threshold", "@Mean": "mean", "@Guar": "guaranteed"}
    return {point: 1 - found[key] for point, key in points.items() if found.get(key) is not None}


def share(count, total):
    low, high = wilson_interval(count, total)
    return f"{count / total:.3f} [{low:.3f}, {high:.3f}]"


def notice(draws):
    """Print how often batches like validation are called shifted."""
    print("| patients | called shifted |\n| ---: | ---: |")
    for n in BATCHES:
        print(f"| {n} | {share(sum(called_shifted(seed, n) for seed in range(draws)), draws)} |", flush=True)


def promise(draws):
    """Print how often thresholds chosen on local patients have a true recall below the floor."""
    print("\n| local patients with it | threshold | recall below the floor | mean recall |")
    print("| ---: | --- | ---: | ---: |")
    for n in LOCAL:
        found = [true_recalls(seed, n, Rule()) for seed in range(draws)]
        for point in ("@Rec", "@Mean", "@Guar"):
            recalls = [f[point] for f in found if point in f]
            cells = "- | -"
            if recalls:
                below = share(sum(r < Rule().min_recall for r in recalls), len(recalls))
                cells = f"{below} | {np.mean(recalls):.3f}"
            print(f"| {n} | {point} | {cells} |", flush=True)


def watch(draws):
    """Print how often, and after how many sick patients, a watched hospital raises the alarm."""
    print(f"\n| true recall | ever alarmed in {SICK} | after (median) | 95th percentile |")
    print("| ---: | ---: | ---: | ---: |")
    for recall in RECALLS:
        rng = np.random.default_rng(int(100 * recall))
        found = [betting.refuted_at(rng.random(SICK) < recall, 0.95) for _ in range(draws)]
        delays = [f for f in found if f]
        spans = [f"{np.percentile(delays, q):.0f}" for q in (50, 95)] if recall < 0.95 else ["-", "-"]
        print(f"| {recall:.2f} | {share(len(delays), draws)} | {' | '.join(spans)} |", flush=True)


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--draws", type=common.COUNT, default=1000, metavar="N", help="draws of each row")
    args = parser.parse_args()
    notice(args.draws)
    promise(args.draws)
    watch(args.draws)


if __name__ == "__main__":
    common.start(main)
