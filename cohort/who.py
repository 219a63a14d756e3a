"""Who took part: what is known of the patients and exposures of a side, counted, and the groups they form. No
image is opened.
"""

import argparse
import math
from typing import NamedTuple

import numpy as np

from common.console import InputError
from layouts.listing import COHORT

ATTRIBUTES = ("sex", "age", "view", "machine")  # those of listing.COHORT that make groups
BANDS = "0-1,1-5,5-18,18-40,40-65,65+"  # years; newborn, infant, school, adult, older, old
LEAST = 10  # patients of a group that gets figures
MOST = 30  # values of one column that get figures, and that a summary counts one by one
UNKNOWN = "unknown"


class Group(NamedTuple):
    """Patients with one `value` of an `attribute`. `inside`: bool [N], which images are theirs; `known`: bool
    [N], of which images the attribute is known. The rest of a group is known & ~inside."""

    attribute: str
    value: str
    inside: np.ndarray
    known: np.ndarray

    def at(self, images):
        """The Group among some images: bool [N] or positions."""
        return self._replace(inside=self.inside[images], known=self.known[images])


class Asked(NamedTuple):
    """Which groups were asked for. bands: ((low, high), ...) in years (`age_bands`); columns: names of
    further columns."""

    bands: tuple
    columns: tuple = ()


def add_arguments(group):
    """The flags of Asked."""
    group.add_argument(
        "--subgroups",
        type=column_names,
        default=(),
        metavar="COL,COL",
        help="further columns of the table whose values are groups of patients (default: sex, age, view and "
        "machine, where they are known)",
    )
    group.add_argument(
        "--age-bands",
        type=age_bands,
        default=BANDS,
        metavar="A-B,...",
        help="age groups in years, each from its first age to below its second",
    )


def column_names(text):
    """An argparse type: "ward, scanner" -> ("ward", "scanner")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def check_columns(asked, there, where):
    """InputError unless all of asked.columns are among `there`, the names of columns of `where`."""
    for name in asked.columns:
        if name not in there:
            known = ", ".join(sorted(there)) or "none"
            raise InputError(f"--subgroups: {where} has no column {name[:60]!r}; there are: {known[:300]}")


# ---------------------------------------------------------------- columns


def columns_of(arrays, side):
    """{name: array [N]} of what scores.npz holds of the patients and exposures of a side. InputError where an
    array has another length or kind than listing.COHORT says."""
    prefix, number, found = f"{side}_cohort_", arrays[f"{side}_files"].shape, {}
    for key, values in arrays.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            kind = COHORT.get(name, ("U", ""))[0]
            if values.shape != number or values.dtype.kind != kind:
                raise InputError(f"{key} is no column of {number[0]} values of its kind")
            found[name] = values
    return found


def of_units(cohort, numbers):
    """The columns of studies or patients, from those of their images: {name: [M]}; numbers: int64 [N], the
    unit of each image. A unit has the value that its images have, and none where they differ; the age of the
    earliest."""
    found, count = {}, numbers.max() + 1
    for name, values in cohort.items():
        if values.dtype.kind == "f":
            found[name] = np.full(count, np.nan)
            np.fmin.at(found[name], numbers, values)
            continue
        names, codes = np.unique(values, return_inverse=True)
        known = values != ""
        least, most = np.full(count, len(names)), np.full(count, -1)
        np.minimum.at(least, numbers[known], codes[known])
        np.maximum.at(most, numbers[known], codes[known])
        found[name] = np.where(least == most, names[np.minimum(least, len(names) - 1)], "")
    return found


# ---------------------------------------------------------------- age bands


def age_bands(text=BANDS):
    """An argparse type: "0-18,18-65,65+" -> ((0, 18), (18, 65), (65, inf)), each band [low, high) in years.

    The bands cover every age once, so that nobody is left out in silence. argparse.ArgumentTypeError where
    they overlap, leave a gap, or do not run from 0 to an open end."""
    bands = [_band(part.strip(), text) for part in text.split(",")]
    for (low, high), (following, _) in zip(bands, bands[1:]):
        if following < high:
            raise _bad_bands(text, f"{_label(low, high)} and the band from {following:g} overlap")
        if following > high:
            raise _bad_bands(text, f"no band holds {high:g} to {following:g}")
    if bands[0][0] != 0:
        raise _bad_bands(text, f"no band holds 0 to {bands[0][0]:g}")
    if bands[-1][1] != math.inf:
        raise _bad_bands(text, f"no band holds {bands[-1][1]:g} and more")
    return tuple(bands)


def _band(part, text):
    """One band -> (low, high)."""
    ends = [part[:-1], "inf"] if part.endswith("+") else part.split("-")
    try:
        low, high = map(float, ends)
    except ValueError:
        raise _bad_bands(text, f"{part[:20]!r} is no band") from None
    if not 0 <= low < high or low == math.inf:
        raise _bad_bands(text, f"{part[:20]!r} does not run from a lower to a higher age")
    return low, high


def _bad_bands(text, why):
    return argparse.ArgumentTypeError(
        f"{text[:60]!r}: {why}; bands follow one another from 0 to an open end, as in 0-18,18-65,65+"
    )


def _label(low, high):
    """ "18-40", or "65+" of a band without an end."""
    return f"{low:g}+" if high == math.inf else f"{low:g}-{high:g}"


# ---------------------------------------------------------------- groups


def label_of(name, value, bands):
    """The group of one known value of an attribute, as text: of an age its band, else the value itself."""
    return str(_labels(name, np.array([value]), bands)[0][0])


def groups_of(cohort, patients, asked):
    """The groups of a side -> (list of Groups, notes: list of text on who is in none).

    `cohort`: {name: array [N]} (listing.Index), or None; `patients`: [N] names; `asked`: an Asked. A value
    of fewer than LEAST patients is no group, and of the others the MOST common are taken; the notes count
    what is left out."""
    groups, notes = [], []
    for name in dict.fromkeys([*ATTRIBUTES, *asked.columns]):
        if cohort is None or name not in cohort:
            continue
        labels, order = _labels(name, cohort[name], asked.bands)
        known = labels != ""
        if not known.any():
            continue
        if not known.all():
            notes.append(
                f"{name} unknown: {len(set(np.asarray(patients)[~known]))} patients, in no group of it"
            )
        values, left_out = _large_enough(labels, order, np.asarray(patients))
        notes += [f"{name}: {text}" for text in left_out]
        groups += [Group(name, value, labels == value, known) for value in values]
    return groups, notes


def known_ages(ages):
    """Which ages [N] are known: finite and not negative."""
    return np.isfinite(ages) & (ages >= 0)


def _labels(name, column, bands):
    """(the value of each image as text, "" where it is not known; the values in the order to show them)."""
    if name != "age":
        labels = np.asarray(column).astype(str)
        return labels, sorted(set(labels.tolist()) - {""})
    ages = np.asarray(column, np.float64)
    labels = np.full(len(ages), "", dtype="U24")
    for low, high in bands:
        labels[known_ages(ages) & (ages >= low) & (ages < high)] = _label(low, high)
    return labels, [_label(low, high) for low, high in bands]


def _large_enough(labels, order, patients):
    """(values with enough patients, texts on the others)."""
    counts = {value: len(set(patients[labels == value].tolist())) for value in order}
    there = [value for value in order if counts[value]]
    large = [value for value in there if counts[value] >= LEAST]
    notes = []
    if small := [value for value in there if counts[value] < LEAST]:
        named = ", ".join(f"{value} ({counts[value]})" for value in small[:6])
        more = f" and {len(small) - 6} more values" if len(small) > 6 else ""
        notes.append(f"fewer than {LEAST} patients, so no group: {named}{more}")
    if len(large) > MOST:
        common = set(sorted(large, key=lambda value: -counts[value])[:MOST])
        notes.append(f"{len(large)} values have {LEAST} patients: the {MOST} with the most are groups")
        large = [value for value in large if value in common]
    return large, notes


# ---------------------------------------------------------------- a summary


def of_sides(task, sides):
    """{side: `summary`} of {side: Subset or Index}, what training writes into results.json: a Task and its
    data."""
    found = {}
    for side, images in sides.items():
        found[side] = summary(images.files, images.patients, images.cohort)
        found[side]["findings"] = prevalences(task.findings, task.truth(images.targets))
    return found


def prevalences(findings, truth):
    """{finding: [images with it, images without]}; truth: [N, F] of 1, 0 and -1 for unknown."""
    with_it, without = (truth == 1).sum(axis=0), (truth == 0).sum(axis=0)
    return {name: [int(with_it[k]), int(without[k])] for k, name in enumerate(findings)}


def summary(files, patients, cohort):
    """Who is on a side -> JSON. files, patients: [N] names (a patient who is not known stands under the name
    of the file); `cohort`: {name: array [N]}, or None.

    {"images", "patients", "unknown_patients" (images); and where the cohort has them "studies"; "age":
    [median, min, max, unknown], the first three None where no age is known; "sex", "view", "machine":
    {value: count}}. Age and sex are counted in patients, age at the earliest image; view and machine in
    images."""
    files, patients, cohort = np.asarray(files), np.asarray(patients), cohort or {}
    unknown = int((files == patients).sum())
    people = len(np.unique(patients))
    found = {"images": len(files), "patients": people - unknown, "unknown_patients": unknown}
    if "study" in cohort:
        found["studies"] = len(set(cohort["study"].tolist()) - {""})
    _, whose = np.unique(patients, return_inverse=True)
    if "age" in cohort:
        found["age"] = _ages(cohort["age"], whose, people)
    if "sex" in cohort:
        found["sex"] = _counts(_of_patients(cohort["sex"], whose, people))
    for name in ("view", "machine"):
        if name in cohort:
            found[name] = _counts(cohort[name])
    return found


def _ages(ages, whose, people):
    """[median, least, greatest, unknown] of the patients' ages at their earliest image."""
    youngest = np.full(people, np.inf)
    known = known_ages(ages)
    np.minimum.at(youngest, whose[known], ages[known])
    there = youngest[np.isfinite(youngest)]
    unknown = people - len(there)
    if not len(there):
        return [None, None, None, unknown]
    return [float(np.median(there)), float(there.min()), float(there.max()), unknown]


def _of_patients(values, whose, people):
    """The value of each patient as text: "" where none is known, "contradictory" where there are several."""
    found = [set() for _ in range(people)]
    for person, value in zip(whose.tolist(), values.tolist()):
        if value:
            found[person].add(value)
    return np.array([_only(each) for each in found])


def _only(values):
    """The only value of a set of texts."""
    if len(values) > 1:
        return "contradictory"
    return "".join(values)


def _counts(values):
    """{value: how often}, the most common first; beyond MOST values together; unknown last."""
    names, counts = np.unique(values[values != ""], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    found = {str(names[k]): int(counts[k]) for k in order[:MOST]}
    if len(order) > MOST:
        found[f"{len(order) - MOST} other values"] = int(counts[order[MOST:]].sum())
    if unknown := int((values == "").sum()):
        found[UNKNOWN] = unknown
    return found
