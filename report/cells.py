"""What the cells and sentences of the report's tables are made of. No torch, no drawing."""

import itertools

import numpy as np

from common.proportions import reported_interval
from records.schema import mismatches
from report.rows import POINTS


def unique(values, join="; "):
    """Different texts in the order in which they come, joined."""
    return join.join(dict.fromkeys(map(str, values)))


def interval(low, high):
    return f"[{low:.3f}, {high:.3f}]"


def with_interval(row, key):
    """ "0.951 [0.931, 0.968]": a figure with its 95% interval; a dash where there is no row."""
    return "-" if row is None else f"{row[key]:.3f} {interval(*reported_interval(row, key))}"


def size_and_time(*entries):
    """Millions of parameters and minutes of training, as text; of several seeds, the mean minutes."""
    params = entries[0].results["params"] / 1e6
    digits = 4 if params < 0.1 else 2  # of a logistic regression 0.00 would be left
    return [f"{params:.{digits}f}", f"{np.mean([e.minutes for e in entries]):.1f}"]


def mean(values):
    """The mean; None where a value is missing."""
    return None if None in values else float(np.mean(values))


def three(value):
    """A figure with three digits; a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"


def floors(entries):
    """The recall floors of the entries, as text."""
    return ", ".join(sorted({f"{e.min_recall:g}" for e in entries}))


def drawn(entries):
    """What the bootstrap draws, as text."""
    if entries[0].columns["test"].patients_known:
        return "whole patients"
    return "single images (patients unknown)"


def alone(entries):
    """Whether the task of these entries has one finding."""
    return entries[0].task.alone


def has_epochs(entry):
    """Whether validation chose an epoch of a run, or of a member of an ensemble: not of a logistic
    regression."""
    config = entry.results["model_config"]
    members = config.get("members")
    if not isinstance(members, list) or mismatches(members, [{"kind": str}]):
        members = [config]
    return any(one["kind"] != "linear" for one in members)


def points(entries):
    """The operating points that tables have rows of. Where there are several findings, decisions at 0.5 would
    fill pages; calibration.json has them."""
    if alone(entries):
        return POINTS
    return {point: mark for point, mark in POINTS.items() if point != "at_0.5"}


def named(entry, finding, text):
    """A text with the finding it is of, unless that is the only one."""
    return text if alone([entry]) else f"{finding}: {text}"


def questions(entries):
    """[(finding, entry)], finding by finding."""
    return list(itertools.product(entries[0].findings, entries))


def title(entry, finding):
    """What a row of a finding and an entry is called; the only finding needs no name."""
    return entry.name if alone([entry]) else f"{finding}: {entry.name}"


def first_head(entries):
    """The head of the column of `title`."""
    return "Model" if alone(entries) else "Finding: model"
