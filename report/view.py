"""What the report of one test set shows, and in which order. No torch, no drawing."""

import re
import shlex
from typing import NamedTuple

from cohort.who import Asked
from report.answers.standing import Standing, standings
from report.rows import families, without_members

MANY = 5  # with more models, long tables are of those that remain


class View(NamedTuple):
    """One test set. entries: all of its Entries; standings: how its models stand on validation; candidates:
    the models to show, in the order of the report; left_out: how many --top leaves out; asked: the groups of
    patients."""

    entries: list
    standings: list[Standing]
    candidates: list
    left_out: int
    asked: Asked

    @property
    def shown(self):
        """The Entries of the models to show: an ensemble stands for its members."""
        return [e for c in self.candidates for e in (*c.entries, *c.again)]

    @property
    def remaining(self):
        """The Candidates that validation cannot tell from the best."""
        return [c for standing in self.standings for c in standing.remaining]

    @property
    def detailed(self):
        """The Entries that long tables and large pictures are of."""
        if len(self.candidates) <= MANY:
            return self.shown
        return [e for c in first_of(self, MANY) for e in (*c.entries, *c.again)]

    @property
    def trained(self):
        """The Entries that training curves are of: each run once. None where no run has two epochs."""
        entries = [e for e in self.entries if e.results["history"] and not e.suffix]
        if any(len(e.results["history"]) > 1 for e in entries):
            return entries
        return []


def first_of(view, number):
    """The first Candidates of a View, those that remain before others."""
    remain = [c for c in view.candidates if any(c is one for one in view.remaining)]
    others = [c for c in view.candidates if not any(c is one for one in remain)]
    return [*remain, *others][:number]


def view_of(entries, asked):
    """The View of the Entries of one test set: models that remain first, then by AUROC on validation."""
    found = standings(without_members(entries))
    candidates = [c for standing in found for c in standing.candidates]
    return View(entries, found, candidates, 0, asked)


def only_top(view, number):
    """A View of its first models."""
    kept = view.candidates[:number]
    return view._replace(candidates=kept, left_out=len(view.candidates) - len(kept))


def missing_ensembles(entries):
    """[(base name, number of seeds, command)] of the families that no ensemble here holds whole."""
    missing = []
    for family in families(entries):
        # Members must share one split, or an ensemble would have seen images that it is tested on.
        checkpoints = {e.calibration["checkpoint"] for e in family}
        one_split = len({e.results["split"]["fingerprint"] for e in family}) == 1
        made = any(e.suffix == family[0].suffix and checkpoints <= set(e.members) for e in entries)
        if one_split and not made:
            folders = [e.run.folder.as_posix() for e in family]
            out = re.sub(r"-seed\d+$", "", folders[0]) + "-ensemble"
            words = ["python", "calibrate.py", "--ensemble", *folders, "--out", out]
            if family[0].suffix:
                words.append("--tta")
            missing.append((family[0].base, len(family), shlex.join(words)))
    return missing
