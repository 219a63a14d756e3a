"""Do the tests and intervals of groups keep what they promise? Simulated, so that the truth is known.

    python studies/subgroups.py

Made-up patients of both sexes, six age bands, two views and five machines, with one image each or with
several that are alike. For each case a row of a markdown table, per figure: in which share of the simulated
sets any group is said to differ from the rest (Holm, 0.05), any interval misses the truth, and any floor,
put exactly at the true recall, is called broken. Where nothing differs, each is to be at most 5%. The last
cases break one group; there the shares count that group alone: how often it is found. 300 sets a case take
about half an hour on one core."""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from calibration.intervals import wilson_interval
from cohort.figures import ERROR
from cohort.groups import figures_of_groups
from cohort.who import Asked, age_bands, groups_of
from common.cli import COUNT, Parser
from common.console import start

POINT, RECALL = "@Rec", 0.95
APART = 2.4  # standard deviations between the mean scores of sick and healthy
SPECIFICITY = norm.cdf(APART - norm.ppf(RECALL))
AUROC = norm.cdf(APART / np.sqrt(2))
TRUTH = {"AUROC": AUROC, f"recall {POINT}": RECALL, f"specificity {POINT}": SPECIFICITY}
MACHINES, SHARES = np.array(["A", "B", "C", "D", "E"]), [0.55, 0.2, 0.15, 0.07, 0.03]


def draw(rng, people, *, images=1, alike=0.5, broken=0.0, unequal=False, mixed=False):
    """One set -> (truth, scores in (0, 1), patients, cohort).

    images: the most of one patient; alike: the correlation of their scores; broken: by how much lower the
    sick of machine B score; unequal: machine B's patients have three times the images, all of one score, so
    that it has the same figures but is not exchangeable with the rest; mixed: an image may be sick, not a
    patient."""
    sick = rng.random(people) < 0.4
    machine = rng.choice(MACHINES, people, p=SHARES)
    count = rng.integers(1, images + 1, people)
    if unequal:
        count = np.where(machine == "B", 3 * count, count)
    whose = np.repeat(np.arange(people), count)
    n = len(whose)
    y = sick[whose].astype(int)
    if mixed:
        y = (rng.random(n) < np.where(sick, 0.8, 0.1)[whose]).astype(int)
    shared = np.full(n, alike)
    if unequal:
        shared[machine[whose] == "B"] = 1.0
    noise = np.sqrt(shared) * rng.normal(size=people)[whose] + np.sqrt(1 - shared) * rng.normal(size=n)
    z = APART * y + noise - broken * y * (machine[whose] == "B")
    threshold = APART - norm.ppf(RECALL)
    cohort = {
        "sex": rng.choice(["F", "M", ""], people, p=[0.45, 0.45, 0.1])[whose],
        "age": (90 * rng.random(people) ** 2)[whose],
        "view": rng.choice(["PA", "AP"], n, p=[0.7, 0.3]),
        "machine": machine[whose],
    }
    return y, norm.cdf(z - threshold), whose, cohort


def simulate(seed, people, **case):
    """What one set says: {figure: [any gap found, any interval misses, any floor broken, the same of machine
    B alone]}, bools."""
    y, p, whose, cohort = draw(np.random.default_rng([seed, people]), people, **case)
    groups, _ = groups_of(cohort, whose, Asked(age_bands()))
    found = {}
    for name, rows in figures_of_groups(y, p, whose, groups, {POINT: 0.5}, RECALL)["figures"].items():
        gaps = [row.get("adjusted", 1) <= ERROR for row in rows]
        misses = ["lo" in row and not row["lo"] <= TRUTH[name] <= row["hi"] for row in rows]
        broken = [row.get("broken", False) for row in rows]
        at_b = [(group.attribute, group.value) == ("machine", "B") for group in groups]
        alone = [any(np.logical_and(said, at_b)) for said in (gaps, broken)]
        found[name] = [any(gaps), any(misses), any(broken), *alone]
    return found


CASES = {
    "100 patients, an image each": dict(people=100),
    "300 patients, an image each": dict(people=300),
    "300 patients, up to 6 images, alike": dict(people=300, images=6, alike=0.8),
    "300 patients, up to 6 images, sick and healthy mixed": dict(people=300, images=6, mixed=True),
    "300 patients, machine B with three times the images, all alike": dict(
        people=300, images=3, unequal=True
    ),
    "1,000 patients, up to 2 images": dict(people=1000, images=2),
}
BROKEN = {
    "300 patients, the sick of machine B 1 lower (recall 0.74)": dict(people=300, broken=1.0),
    "1,000 patients, up to 2 images, the same": dict(people=1000, images=2, broken=1.0),
}


def percent(hits):
    """A share of the sets with Wilson's 95% interval, as text."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(np.mean(hits), *wilson_interval(int(np.sum(hits)), len(hits)))


def table(cases, columns, sets):
    """Print a markdown table: a row a case and figure, of the `columns` {head: position in `simulate`'s
    list}."""
    print(f"| case | figure | {' | '.join(columns)} |\n| --- | --- |{' ---: |' * len(columns)}")
    for name, case in cases.items():
        results = [simulate(seed, **case) for seed in range(sets)]
        for figure in TRUTH:
            cells = []
            for k in columns.values():
                cells.append(percent([result[figure][k] for result in results]))
            print(f"| {name} | {figure} | {' | '.join(cells)} |", flush=True)
    print()


def main():
    parser = Parser(__doc__)
    parser.add_argument("--sets", type=COUNT, default=300, metavar="N", help="simulated sets of each case")
    args = parser.parse_args()
    table(CASES, {"a gap is found": 0, "an interval misses": 1, "a floor is broken": 2}, args.sets)
    table(BROKEN, {"its gap is found": 3, "its floor is broken": 4}, args.sets)


if __name__ == "__main__":
    start(main)
