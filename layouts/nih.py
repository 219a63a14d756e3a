"""What the cells of NIH's table say of an image: findings joined by | in one column. No files."""

import re
from functools import cache

from common.console import InputError, say_once
from common.task import is_device, is_healthy
from layouts.sheets import column, numbered, value

NIH_COLUMNS = ("Image Index", "Finding Labels", "Patient ID")
NIH_FINDINGS = ("No Finding",) + tuple(
    "Atelectasis Cardiomegaly Consolidation Edema Effusion Emphysema Fibrosis Hernia Infiltration Mass "
    "Nodule Pleural_Thickening Pneumonia Pneumothorax".split()
)
JOINED = r"[,;/\\&+\t\r\n]|\s(and|plus)\s"  # in the name of a finding: it could be two


def same_key(name):
    """What the spellings of a name have in common: "Pleural Thickening", "pleural_thickening"."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


# ---------------------------------------------------------------- NIH


def is_nih(head):
    """Whether these are the columns of the NIH ChestX-ray14 table."""
    return all(column(head, name) for name in NIH_COLUMNS[:2])


def nih_names(path, head, rows):
    """{a text in Finding Labels: frozenset of its findings, as NIH writes those that are NIH's}.

    InputError naming the row where a name could be several findings: joined otherwise than by |, they would
    all be taken for absent. So would those in a second spelling."""
    at, first = head.index(column(head, "Finding Labels")), {}
    for number, row in numbered(rows):
        first.setdefault(value(row, at), number)
    parts, rows_of = {}, {}
    for text, number in first.items():
        parts[text] = [name.strip() for name in text.split("|") if name.strip()]
        for name in parts[text]:
            rows_of.setdefault(name, number)
    spelt = _spellings(path, rows_of)
    healthy = {spelt[same_key(name)]: number for name, number in rows_of.items() if is_healthy(name)}
    if len(healthy) > 1:
        words = " and elsewhere ".join(healthy)
        raise InputError(
            f"{path}, row {max(healthy.values())}: Finding Labels says {words}, which mean the same: write "
            "one of them"
        )
    if changed := [name for name in rows_of if spelt[same_key(name)] != name]:
        listed = ", ".join(f"{name} as {spelt[same_key(name)]}" for name in changed[:5])
        say_once(f"note: {path}: {len(changed)} other spellings are read, {listed}")
    return {text: frozenset(spelt[same_key(name)] for name in names) for text, names in parts.items()}


def _spellings(path, rows_of):
    """{same_key of a name: how it is written} of {name in Finding Labels: its first row} and of NIH's."""
    spelt = {same_key(name): name for name in NIH_FINDINGS}
    others = [name for name in rows_of if same_key(name) not in spelt]
    known = [*spelt, *(same_key(name) for name in others if not re.search(JOINED, name))]
    for name in others:
        where = f"{path}, row {rows_of[name]}: Finding Labels has {name[:60]!r}"
        if re.search(JOINED, name) or _is_made_of(same_key(name), known):
            raise InputError(
                f"{where}, which could be several findings: join findings by |, and give one finding a name "
                "without , ; / & + and"
            )
        if (other := spelt.setdefault(same_key(name), name)) != name:
            raise InputError(f"{where}, and elsewhere {other!r}: write them alike")
    return spelt


def _is_made_of(name, known):
    """Whether a name is two or more of the others in a row, with or without spaces and signs between."""
    words = "|".join(map(re.escape, sorted(set(known) - {name}, key=len, reverse=True)))
    return re.fullmatch(rf"(?:(?:{words})\W*){{2,}}", name) is not None


def read_nih(path, head, rows, findings):
    """A function (row, its number) -> labels of the NIH layout, a tuple of 0 and 1."""
    at, names = head.index(column(head, "Finding Labels")), nih_names(path, head, rows)

    @cache  # few combinations, many rows
    def labels(text):
        present = names[text]
        sick = [name for name in present if not is_healthy(name) and not is_device(name)]
        if not present or sick and any(map(is_healthy, present)):
            return None
        return tuple(int(name in present) for name in findings)

    def read(row, number):
        text = value(row, at)
        if (found := labels(text)) is None:
            what = f"{text}, which contradicts itself" if text.strip("| ") else "empty"
            raise InputError(
                f"{path}, row {number}: Finding Labels is {what}; an image without findings says No Finding "
                "alone"
            )
        return found

    return read
