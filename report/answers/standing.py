"""Which models validation cannot tell from the best one. No torch, no drawing.

A model stays in the choice while the difference of its AUROC from the best is at most one standard error of
that difference (the rule of one standard error: Breiman et al. 1984, section 3.4.3; here of a paired
difference). The error is the standard deviation over a bootstrap of whole patients, the same ones for all
models. Nothing here looks at test.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from auditing.record import audit_of
from calibration.intervals import mean_auroc_draws
from common.files import sha256

ROUNDING = 1e-9  # differences below it are none


class Candidate(NamedTuple):
    """A model to choose: a run, or the runs of one recipe that differ in the seed alone.

    entries: list of Entry; again: Entries that repeat a seed of these; value: AUROC on validation, the mean
    over seeds and findings; draws: float64 [n], the same of every bootstrap draw; reader: what the audit says
    of a model that it calls a shortcut reader, "" otherwise."""

    entries: list
    again: list
    value: float
    draws: np.ndarray
    reader: str

    @property
    def name(self):
        if len(self.entries) == 1:
            return self.entries[0].name
        return f"{self.entries[0].base}, {len(self.entries)} seeds"


class Behind(NamedTuple):
    """How far a Candidate is behind the best: AUROCs, and the standard error of their difference."""

    candidate: Candidate
    difference: float
    error: float

    @property
    def remains(self):
        """Whether validation cannot tell it from the best."""
        return self.difference <= self.error + ROUNDING


class Standing(NamedTuple):
    """The candidates on one set of validation images. behind: list of Behind, the best first, with those that
    remain before the others; readers: shortcut readers, which are not among them unless all are."""

    behind: list
    readers: list

    @property
    def all_read(self):
        """Whether the audit calls every model here a shortcut reader."""
        return len(self.readers) == len(self.behind) and bool(self.behind[0].candidate.reader)

    @property
    def remaining(self):
        return [b.candidate for b in self.behind if b.remains]

    @property
    def candidates(self):
        ranked = [b.candidate for b in self.behind]
        return ranked if self.all_read else [*ranked, *self.readers]

    @property
    def patients(self):
        """The number of patients (of images, where these are unknown) on validation."""
        column = self.candidates[0].entries[0].columns["val"]
        return len(np.unique(column.patients))


def standings(entries):
    """Standings of Entries on one test set, those on most validation images first.

    Models on other validation images, or other labels of them, cannot be held against each other."""
    by_images = {}
    for entry in entries:
        val = entry.columns["val"]
        key = sha256([val.files.tolist(), val.truth.tolist(), entry.unit])
        by_images.setdefault(key, []).append(entry)
    found = [standing_of(alike) for alike in by_images.values()]
    return sorted(found, key=lambda s: (-len(s.candidates), -s.patients))


def standing_of(entries):
    """The Standing of Entries on the same validation images."""
    draws = min(e.calibration["bootstrap"] for e in entries)
    found = [candidate_of(seeds, again, draws) for seeds, again in recipes(entries)]
    readers = [c for c in found if c.reader]
    # Where all read shortcuts, none can be recommended, but which is the least bad is still asked.
    others = [c for c in found if not c.reader] or found
    others.sort(key=lambda c: (-c.value, c.name))
    behind = [behind_best(others[0], c) for c in others]
    behind.sort(key=lambda b: not b.remains)  # stable: by AUROC within both
    return Standing(behind, readers)


def recipes(entries):
    """[(Entries that differ in the seed alone, Entries that repeat one of these seeds)]."""
    found = {}
    for e in entries:
        key = e.family
        if e.members:  # what it is made of is not in its recipe
            key = str(e.run.folder), e.suffix
        found.setdefault(key, []).append(e)
    split = []
    for alike in found.values():
        by_seed = {}
        for e in alike:
            by_seed.setdefault(e.results.get("seed"), []).append(e)
        first = [seeds[0] for seeds in by_seed.values()]
        split.append((first, [e for seeds in by_seed.values() for e in seeds[1:]]))
    return split


def candidate_of(seeds, again, draws):
    """The Candidate of one recipe."""
    each = [validation_draws(e, draws) for e in seeds]
    # In one draw all seeds are judged on the same patients, so their mean keeps what they share.
    value = float(np.mean([auroc for auroc, _ in each]))
    return Candidate(seeds, again, value, np.mean([drawn for _, drawn in each], axis=0), reader_of(seeds))


def validation_draws(entry, draws):
    """(mean AUROC over findings on validation, float64 [draws] of it)."""
    names = findings_of(entry)
    columns, val = [entry.findings.index(name) for name in names], entry.columns["val"]
    value, drawn, _ = mean_auroc_draws(val.truth[:, columns], val.scores[:, columns], val.patients, draws)
    return value, drawn


def findings_of(entry):
    """The findings that a model is chosen by: those that a mean is taken over, with figures on validation."""
    names = entry.summary["val"]["findings"]
    return names or [name for name in entry.findings if "val" in entry.calibrated[name]["curves"]]


def reader_of(entries):
    """What the audit on validation says of the first Entry that it calls a shortcut reader; "" if none."""
    for e in entries:
        shortcut = shortcut_of(e, "val")
        if shortcut is not None and shortcut["verdict"] == "broken":
            return shortcut["text"]
    return ""


@cache  # so that what audit_of notes is said once
def audit_here(entry):
    """The audit of an Entry, or None."""
    return audit_of(entry.run)


def shortcut_of(entry, side):
    """What the audit says of shortcuts on a side, {"verdict", "text"}: the worst of the findings that were
    asked for; None where it was not audited."""
    audit = audit_here(entry)
    if audit is None or side not in audit["sides"]:
        return None
    found = audit["sides"][side]
    every = [found["shortcut"], *(other["shortcut"] for other in found["others"].values())]
    return max(every, key=lambda shortcut: ("kept", "open", "broken").index(shortcut["verdict"]))


def behind_best(best, candidate):
    """The Behind of a candidate."""
    differences = best.draws - candidate.draws
    differences = differences[np.isfinite(differences)]
    error = float("inf")  # hardly a draw holds both classes: nothing can be told apart
    if len(differences) > 1:
        error = float(np.std(differences, ddof=1))
    return Behind(candidate, best.value - candidate.value, error)


def patients_needed(behind, patients):
    """How many validation patients would make the 95% interval of this difference exclude 0, if the
    difference and the spread of patients stay as they are; None where no number would."""
    if behind.difference <= ROUNDING or not np.isfinite(behind.error):
        return None
    return int(np.ceil(patients * (1.96 * behind.error / behind.difference) ** 2))
