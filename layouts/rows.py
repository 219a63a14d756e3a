"""What every layout turns its tables into: Rows, an image each; and what a Layout is."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from common.console import InputError
from common.task import is_device, is_healthy
from layouts.listing import taken

PRESENT, ABSENT, UNCERTAIN, BLANK = 1, 0, -1, -2  # labels, before a choice is made of the last two
UNUSABLE = -3  # no label, whatever blank ones count as: the image is left out
WORDS = {
    "1": PRESENT,
    "1.0": PRESENT,
    "0": ABSENT,
    "0.0": ABSENT,
    "-1": UNCERTAIN,
    "-1.0": UNCERTAIN,
    "": BLANK,
}


@dataclass
class Rows:
    """What a table says of N images. `path`: the table; `names` [N]: how it calls them; `numbers` int64 [N]:
    its rows, as a spreadsheet counts; `findings` [K]; `labels` int8 [N, K] of PRESENT, ABSENT, UNCERTAIN,
    BLANK and UNUSABLE; `patients` [N], "" where unknown; `side` [N] of SIDES or "", None where nothing is
    published; `cohort`: {name of listing.COHORT or of a column: array [N]}; `left_out`: {reason: rows}, why
    some are UNUSABLE."""

    path: Path
    names: list
    numbers: np.ndarray
    findings: tuple
    labels: np.ndarray
    patients: list
    side: np.ndarray = None
    cohort: dict = field(default_factory=dict)
    left_out: dict = field(default_factory=dict)

    def take(self, positions):
        """The Rows of these positions."""
        columns = ("names", "numbers", "labels", "patients", "side", "cohort")
        return replace(self, **{name: taken(getattr(self, name), positions) for name in columns})


@dataclass(frozen=True)
class Source:
    """Where a layout reads: `path`: the table that was named; `root`: the data folder; `findings`: those
    asked, () for all; `readers`: of choices.READERS; `published`: whether the published split
    is asked for."""

    path: Path
    root: Path
    findings: tuple = ()
    readers: str = "majority"
    published: bool = False


@dataclass(frozen=True)
class Layout:
    """A layout of labels.

    `name`: as --layout takes it; `title`; `needs`: the columns that tell it, each a name or a tuple of names
    of which one is enough; `findings`: function (path) -> all its findings; `rows`: function (Source) -> list
    of Rows, one a table. `beats`: layouts that would fit too; `blank`: what blank labels mean unless
    --blank says so; `public`: the set of images, where the layout is that of one public set; `by_id`: the
    table's names are ids, not files; `keeps_unlabelled`: images without any label stay (they weigh nothing);
    `trains`: whether it may be trained on; `main`: of several tables of the layout in a folder, parts of the
    name of the one that is meant, the best first; `infers`: a healthy row has no disease, and a sick one is
    not healthy, where the cell is blank; `bare`: images are called by their bare names and lie in images*/;
    `placed`: the table's names are paths in the set as it was published;
    `images`: function (Source) -> {name in the table: path relative to the root}, where they are no files;
    `usual`: function (path) -> the findings that are asked where none is named, if not all."""

    name: str
    title: str
    needs: tuple
    findings: Callable
    rows: Callable
    beats: tuple = ()
    blank: str = "ignore"
    public: str = ""
    by_id: bool = False
    keeps_unlabelled: bool = False
    trains: bool = True
    main: tuple = ()
    infers: bool = False
    bare: bool = False
    placed: bool = False
    images: Callable = None
    usual: Callable = None

    def lacks(self, head):
        """The columns that a table with these column names lacks, as text each; [] where it has all."""
        there = {name.lower() for name in head}
        missing = []
        for need in self.needs:
            names = (need,) if isinstance(need, str) else need
            if there.isdisjoint(name.lower() for name in names):
                missing.append(" or ".join(names))
        return missing


def coded(sheet, name, words, allowed, hint=lambda text: ""):
    """The column `name` of a Sheet by `words`, {text: label} -> int8 [N]. InputError for the first row that
    has another text: it says what is `allowed`, and what `hint`(the text) gives."""
    kinds, codes, first = sheet.codes(name)
    strange = [k for k, text in enumerate(kinds) if text not in words]
    if strange:
        k = min(strange, key=lambda k: first[k])
        where = f"{sheet.path}, row {sheet.numbers[first[k]]}"
        raise InputError(f"{where}: {name} is {kinds[k][:40]!r}, not {allowed}{hint(kinds[k])}")
    return np.array([words[text] for text in kinds], dtype=np.int8)[codes]


def columns_of(sheet, findings, words=WORDS, hint=lambda text: ""):
    """int8 [N, K] of columns that hold a label a row. InputError for any other value."""
    allowed = ", ".join(text for text in ("1", "0", "-1") if text in words) + " or empty"
    labels = np.empty((len(sheet), len(findings)), dtype=np.int8)
    for k, name in enumerate(findings):
        labels[:, k] = coded(sheet, name, words, allowed, hint)
    return labels


def _health(rows):
    """(columns of health, columns of diseases, which of these Rows say healthy, which say ill). Devices are
    no disease."""
    healthy = [k for k, name in enumerate(rows.findings) if is_healthy(name)]
    sick = [k for k, name in enumerate(rows.findings) if k not in healthy and not is_device(name)]
    well, ill = ((rows.labels[:, columns] == PRESENT).any(axis=1) for columns in (healthy, sick))
    return healthy, sick, well, ill


def refuse_contradiction(rows):
    """InputError naming the first of these Rows that says healthy and sick."""
    healthy, sick, well, ill = _health(rows)
    both = np.flatnonzero(well & ill)
    if len(both):
        row = rows.labels[both[0]]
        named = [rows.findings[k] for k in (*healthy, *sick) if row[k] == PRESENT]
        raise InputError(
            f"{rows.path}, row {rows.numbers[both[0]]}: {named[0]} is 1 and {named[1]} is 1, a "
            "contradiction: correct the row, or leave what is not known empty"
        )


def infer_healthy(rows):
    """Labels that follow from others are filled in, where they are blank: a healthy image has no disease,
    and one with a disease is not healthy."""
    healthy, sick, well, ill = _health(rows)
    for columns, implied in ((sick, well), (healthy, ill)):
        for k in columns:
            rows.labels[implied & (rows.labels[:, k] == BLANK), k] = ABSENT
