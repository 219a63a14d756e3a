"""Do the checks for another hospital keep what they promise? Simulated, so that the truth is known.

    python studies/promises.py

Prints four markdown tables:

- notice (shift.py): how often a batch of n patients that are like the 344 of validation is called shifted.
  It should be in at most 5% of the draws.
- shares (shift.py): the same where 70% of the validation patients and 10% of the batch are sick, and the sick
  and the healthy are each alike in both. The last column: how often the interval of the share holds 10%.
- promise (site.py): thresholds chosen on n local patients with the finding and as many without; how often
  their true recall is below the floor of 0.95, and what it is on average.
- watch (sequential.py): how many of the hospitals with a true recall at the floor of 0.95 are ever alarmed in
  3,000 sick patients (at most 5%), and after how many the alarm comes where it is lower.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from calibration import shift, site
from calibration.intervals import wilson_interval
from calibration.operating_point import Rule
from common.cli import COUNT, Parser
from common.console import start
from common.task import Task
from monitoring import sequential

DIMENSIONS, VALIDATED = 24, 344
BATCHES = (20, 50, 100, 250, 500, 1000)
AUROCS, REFERENCES = (0.96, 0.99, 0.999), (300, 1000)
LOCAL = (19, 40, 59, 100, 200)
RECALLS = (0.95, 0.90, 0.85, 0.80)
SICK = 3000
TABLES = ("notice", "shares", "promise", "watch")


def patients(rng, count, sick=0.7, auroc=0.96):
    """(features [count, D], correlated; logits [count, 2]; true labels [count, 1]) of a made-up model of this
    AUROC, one image each: the sick lie further along one direction, and the logits are those of Bayes."""
    mixing = np.random.default_rng(0).normal(size=(DIMENSIONS, DIMENSIONS))
    labels = (rng.random(count) < sick).astype(np.int16)
    apart = np.sqrt(2) * norm.ppf(auroc)
    values = rng.normal(size=(count, DIMENSIONS))
    values[:, 0] += apart * labels
    half = apart * (values[:, 0] - apart / 2) / 2
    logits = np.stack([-half, half], axis=1)
    return (values @ mixing).astype(np.float32), logits.astype(np.float32), labels[:, None]


def verdict_on(seed, n, *, validated=VALIDATED, sick=0.7, auroc=0.96):
    """The verdict on a batch of n patients, of whom a share `sick` is sick; of validation's, 70%."""
    rng, task = np.random.default_rng([seed, n, validated]), Task()
    training = patients(rng, 1024, auroc=auroc)[0]
    features, logits, labels = patients(rng, validated, auroc=auroc)
    known = shift.Reference(shift.learn(training, features, logits, range(validated), labels), "made up")
    features, logits, _ = patients(rng, n, sick, auroc)
    batch, (typicality, places) = shift.Batch(), known.place(features)
    for i, row in enumerate(zip(typicality, places, logits, logits[:, 1] > 0)):
        batch.add(f"{seed} {i}", str(i), *row)
    return known.judge(batch, known.logits[:, 1] > 0, task)


def true_recalls(seed, n, rule):
    """{point: true recall} of thresholds chosen on n sick and n healthy patients; scores of the sick are
    uniform, so that the recall of a threshold t is 1 - t."""
    rng = np.random.default_rng([seed, n])
    y, p = np.repeat([0, 1], n), np.concatenate([rng.random(n) ** 3, rng.random(n)])
    found = site.choose(y, p, np.arange(2 * n), rule)
    points = {"@Rec": "threshold", "@Mean": "mean", "@Guar": "guaranteed"}
    return {point: 1 - found[key] for point, key in points.items() if found.get(key) is not None}


def share(count, total):
    low, high = wilson_interval(count, total)
    return f"{count / total:.3f} [{low:.3f}, {high:.3f}]"


def notice(draws):
    """Print how often batches like validation are called shifted."""
    print("| patients | called shifted |\n| ---: | ---: |")
    for n in BATCHES:
        shifted = sum(verdict_on(seed, n)["verdict"] == "shifted" for seed in range(draws))
        print(f"| {n} | {share(shifted, draws)} |", flush=True)


def shares(draws):
    """Print how often batches that differ from validation by their share of sick people alone are called
    shifted, by AUROC, validation and batch."""
    print("\n| AUROC | validation | patients | called shifted | interval holds 10% |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for auroc, validated, n in itertools.product(AUROCS, REFERENCES, BATCHES):
        about = dict(validated=validated, sick=0.1, auroc=auroc)
        verdicts = [verdict_on(seed, n, **about) for seed in range(draws)]
        shifted = sum(v["verdict"] == "shifted" for v in verdicts)
        spans = [v["shares"]["PNEUMONIA"] for v in verdicts if v["shares"]]
        held = "-"
        if spans:
            held = share(sum(low <= 0.1 <= high for low, high in spans), len(spans))
        print(f"| {auroc} | {validated} | {n} | {share(shifted, draws)} | {held} |", flush=True)


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
        found = [sequential.refuted_at(rng.random(SICK) < recall, 0.95) for _ in range(draws)]
        delays = [f for f in found if f]
        spans = [f"{np.percentile(delays, q):.0f}" for q in (50, 95)] if recall < 0.95 else ["-", "-"]
        print(f"| {recall:.2f} | {share(len(delays), draws)} | {' | '.join(spans)} |", flush=True)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--draws", type=COUNT, default=1000, metavar="N", help="draws of each row")
    parser.add_argument("--only", nargs="+", metavar="TABLE", choices=TABLES, help="these tables")
    args = parser.parse_args()
    tables = dict(zip(TABLES, (notice, shares, promise, watch)))
    for table in args.only or TABLES:
        tables[table](args.draws)


if __name__ == "__main__":
    start(main)
