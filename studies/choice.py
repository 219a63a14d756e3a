"""Apply the rule of docs/notebook/20-accuracy-the-rule.md to the runs that studies/matrix.py has left; for
its part scratch that of 37-scratch-the-rule.md.

    python studies/matrix.py accuracy --data-dir DIR --weights-dir W --nih NIH_DIR --out outputs/matrix
    python studies/choice.py accuracy --out outputs/matrix

Prints, for each candidate with at least one run, the mean and the standard deviation over its seeds; for each
arm the winner, and whether the default changes; and the commands that score the finalists on the test images.
Nothing here opens an image, and no test result is read.
"""

import sys
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from common.cli import Parser
from common.console import InputError, start
from records.run import Run
from studies import matrix
from studies.signals import BORROWED_LEAST, panel, read_figures

# arm: the row of its default when the rule was written; a taught model is no pure one, so it is listed beside
DEFAULTS = {"pretrained": "ti16-full", "scratch": "scratch-full", "scratch with a teacher": None}
TIE = 0.005
# trained longer or better, with no reason to transfer
NO_REASON = ("scratch-muon", "scratch-masked-first", "scratch-masked-strong-long")


class Candidate(NamedTuple):
    """A row of the accuracy part. panels, borrowed, minutes: float [seeds that have run]; complete: whether
    all seeds have; barred: why it cannot be chosen, or ""; size: --img-size."""

    name: str
    folders: list
    panels: np.ndarray
    borrowed: np.ndarray
    minutes: np.ndarray
    complete: bool
    barred: str
    size: int = 224

    @property
    def arm(self):
        if not self.name.startswith("scratch"):
            return "pretrained"
        return "scratch with a teacher" if "-taught" in self.name else "scratch"

    @property
    def backbone(self):
        return self.name.split("-")[0]

    @property
    def vetoed(self):
        return self.borrowed.mean() < BORROWED_LEAST

    @property
    def spread(self):
        return self.panels.std(ddof=1) if len(self.panels) > 1 else 0.0

    @property
    def standing(self):
        """What the table says of it."""
        if not self.complete:
            return "seeds missing"
        if self.barred:
            return self.barred
        return "vetoed" if self.vetoed else "stands"


def candidate(row, out):
    """The Candidate of a matrix.Row whose runs lie in the folder `out`; None if none has its panel."""
    kept = []
    for seed in row.seeds:
        folder = Path(out, row.name if len(row.seeds) == 1 else f"{row.name}-seed{seed}")
        found = read_figures(folder)
        if {"NIH AUROC", "corrupted spec"} <= found.keys():
            kept.append(
                (folder, panel(found)["panel"], found["borrowed AUROC"], Run(folder).results["minutes"])
            )
    if not kept:
        return None
    folders, *columns = zip(*kept)
    figures = [np.array(column) for column in columns]
    complete, size = len(kept) == len(row.seeds), Run(folders[0]).config.img_size
    return Candidate(row.name, list(folders), *figures, complete, barred(row.name), size)


def barred(name):
    """Why the row of this name cannot be chosen, "" if it can."""
    if name.endswith("-nih"):
        return "has seen NIH"
    return "no reason to transfer" if name in NO_REASON else ""


def winner(candidates):
    """(the Candidate that the rule prefers, whether the veto was dropped); (None, False) where none has all
    of its seeds and may be chosen."""
    able = [c for c in candidates if c.complete and not c.barred]
    standing = [c for c in able if not c.vetoed]
    pool = standing or able
    if not pool:
        return None, False
    best = max(c.panels.mean() for c in pool)
    level = [c for c in pool if best - c.panels.mean() <= TIE]
    return min(level, key=lambda c: c.minutes.mean()), not standing


def changes(best, default):
    """Whether `best` becomes the default in the place of `default`."""
    gain = best.panels.mean() - default.panels.mean()
    return best.name != default.name and gain > max(best.spread, default.spread)


def ensemble(candidates):
    """The two best Candidates of different backbones and one image size, as calibrate.py takes them, best
    first; () where there are no two."""
    able = [c for c in candidates if c.complete and not c.barred and not c.vetoed]
    ranked = sorted(able, key=lambda c: -c.panels.mean())
    pairs = (p for p in combinations(ranked, 2) if p[0].backbone != p[1].backbone and p[0].size == p[1].size)
    return next(pairs, ())


def verdicts(candidates):
    """Lines that say what the rule decides for each arm, and the commands for the finalists."""
    finalists = {}
    for arm, name in DEFAULTS.items():
        among = [c for c in candidates if c.arm == arm]
        best, dropped = winner(among)
        default = next((c for c in among if c.name == name and c.complete), None)
        if best is None:
            if among:
                yield f"{arm}: no candidate has all of its seeds"
            continue
        finalists |= {c.name: c for c in (best, default) if c}
        note = " (all are vetoed, so the veto was dropped)" if dropped else ""
        if name is None:
            yield f"{arm}: {best.name} wins{note}; it is reported as a row of its own"
        elif default is None:
            yield f"{arm}: {best.name} is ahead{note}; the default, {name}, lacks seeds, so nothing changes"
        elif best is default:
            yield f"{arm}: the default, {name}, is ahead{note} and stays"
        else:
            gain, spread = best.panels.mean() - default.panels.mean(), max(best.spread, default.spread)
            what = "becomes the default" if changes(best, default) else f"does not replace {name}"
            yield f"{arm}: {best.name} wins{note}, {gain:+.3f} against {name}, spread {spread:.3f}: it {what}"
    folders = [str(f) for c in finalists.values() for f in c.folders]
    if folders:
        yield f"\npython calibrate.py --run {' '.join(folders)}"
    members = ensemble([c for c in candidates if c.arm == "pretrained"])
    if members:
        names = " ".join(str(f) for c in members for f in c.folders)
        yield f"python calibrate.py --ensemble {names} --out {members[0].folders[0].parent}/ensemble"


def main():
    parser = Parser(__doc__)
    parts = ("accuracy", "scratch")
    text = f"part of studies/matrix.py: {' or '.join(parts)}"
    parser.add_argument("part", nargs="?", choices=parts, default=parts[0], metavar="PART", help=text)
    parser.add_argument("--out", default="outputs/matrix", metavar="DIR", help="where the run folders are")
    args = parser.parse_args()
    found = [candidate(row, args.out) for row in matrix.PARTS[args.part]()]
    candidates = [c for c in found if c]
    if not candidates:
        raise InputError(
            f"{args.out} holds no run of the {args.part} part with its panel: run studies/matrix.py "
            f"{args.part} --nih DIR first"
        )
    columns = ("seeds", "panel", "borrowed AUROC", "minutes", "")
    print(f"| candidate | {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)} --- |")
    for c in sorted(candidates, key=lambda c: -c.panels.mean()):
        cells = [f"{c.panels.mean():.3f} ± {c.spread:.3f}", f"{c.borrowed.mean():.3f}"]
        cells = [c.name, str(len(c.panels)), *cells, f"{c.minutes.mean():.1f}", c.standing]
        print(f"| {' | '.join(cells)} |")
    print()
    print("\n".join(verdicts(candidates)))


if __name__ == "__main__":
    start(main)
