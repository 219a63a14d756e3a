"""What is chosen where a table leaves it open: its layout, what uncertain and blank mean, which views."""

from dataclasses import dataclass

import numpy as np

from common.cli import flag
from common.console import InputError, say_once
from layouts.synonyms import same_finding

UNCERTAIN = {"ignore": -1, "negative": 0, "positive": 1}  # U-Ignore, U-Zeros, U-Ones of Irvin et al. 2019
BLANK = {"ignore": -1, "negative": 0}
VIEWS = ("frontal", "PA", "AP", "all")
READERS = ("any", "majority", "all")
OLDER = (
    "nih or plain"  # the layout of runs from before there were others: whichever fits, as it was read then
)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How a table of findings is read. An empty `layout`: the one that has its columns; `blank` "auto": as
    the layout has it. `uncertain` may name findings: Edema=positive,..."""

    layout: str = flag(
        "",
        "layout of --labels (default: the one that has its columns; docs/LAYOUTS.md lists them)",
        metavar="NAME",
    )
    uncertain: str = flag(
        "ignore",
        "uncertain labels (-1) in training: ignore, negative or positive; also by finding, "
        "Edema=positive,Mass=negative. Evaluation always leaves them out",
        metavar="MEANING",
    )
    blank: str = flag(
        "auto",
        "blank labels: ignore or negative (default: negative for CheXpert and MIMIC, whose blanks are "
        "findings that the report does not mention; else ignore)",
        ("auto", *BLANK),
    )
    views: str = flag("frontal", "views that are used, where the view is known", VIEWS)
    readers: str = flag(
        "majority", "VinDr's training images have three readers: how many must see a finding", READERS
    )

    def of_other(self, layout):
        """The Choices for the table of another hospital, which has this layout: --layout and --blank are of
        the first one's, but --blank of the others' where the first has class folders."""
        blank = self.blank if self.layout in ("", layout) else "auto"
        return Choices(uncertain=self.uncertain, blank=blank, views=self.views, readers=self.readers)


def uncertain_values(text, findings):
    """What --uncertain says of each of these findings, int8 [K]: -1, 0 or 1. InputError if it says something
    else, or names a finding that is none of them."""
    values = np.full(len(findings), -1, dtype=np.int8)
    parts = filter(None, map(str.strip, text.split(",")))
    for part in sorted(parts, key=lambda part: "=" in part):  # what is said of all comes before exceptions
        name, equals, word = part.rpartition("=")
        if word.strip() not in UNCERTAIN:
            ways = ", ".join(UNCERTAIN)
            raise InputError(
                f"--uncertain {text[:60]}: {word.strip()[:40]!r} is not one of {ways}; write one of these, "
                "or FINDING=MEANING,..."
            )
        here = [k for k, finding in enumerate(findings) if not equals or same_finding(finding, name)]
        if not here:
            raise InputError(
                f"--uncertain {text[:60]}: {name.strip()[:40]} is none of the findings {', '.join(findings)}"
            )
        values[here] = UNCERTAIN[word.strip()]
    return values


def training_targets(targets, uncertain, config):
    """The targets int8 [N, K] that training images have: where a label is `uncertain` (bool [N, K], or None
    for nowhere), what --uncertain of a DataConfig says of its finding."""
    if uncertain is None or not uncertain.any():
        return targets
    values = uncertain_values(config.uncertain, config.classes)
    return np.where(uncertain, values[None, :], targets).astype(targets.dtype)


def view_is_used(views, wanted):
    """bool [N]: whether images of these `views` (text [N], "" for unknown) are used where --views is
    `wanted`. Unknown views are."""
    views = np.asarray(views)
    if wanted == "all":
        return np.ones(len(views), dtype=bool)
    kept = ("PA", "AP", "") if wanted == "frontal" else (wanted, "")
    return np.isin(views, kept)


def select(reading, choices):
    """(Index, flow) of the images of a Reading that are used: of a view that --views wants, or of an unknown
    one, and, but where the layout keeps them, with a label of a finding that is asked. Notes count the
    others. InputError if none is left."""
    index, flow = reading.index, list(reading.flow)
    views = (index.cohort or {}).get("view")
    if views is not None and choices.layout != OLDER:
        used = view_is_used(views, choices.views)
        _say_views(views, used, choices.views)
        index = index.take(np.flatnonzero(used))
    elif choices.views in ("PA", "AP"):
        say_once(f"note: --views {choices.views}: nothing tells the view of these images: all are kept")
    flow.append(["view", len(index.files)])
    if not reading.keeps_unlabelled:
        labelled = (index.targets >= 0).any(axis=1) | index.uncertain.any(axis=1)
        if not labelled.all():
            count = f"{(~labelled).sum()} of {len(labelled)}"
            say_once(f"note: {count} images have no usable label of any finding that is asked; left out")
        index = index.take(np.flatnonzero(labelled))
    flow.append(["labelled", len(index.files)])
    if not index.files:
        count, seen = flow[1][1], flow[2][1]
        why = (
            "none of these has a label of a finding that is asked" if seen else "--views all uses every view"
        )
        raise InputError(
            f"no image is left of {count}: {seen} are of the views --views {choices.views}; {why}"
        )
    return index, flow


def _say_views(views, used, wanted):
    """A note on images of other views than those `wanted`, and on those whose view is unknown."""
    parts = []
    for name in np.unique(views[~used]):
        parts.append(f"{(views == name).sum()} {name}")
    if parts:
        say_once(f"note: --views {wanted}: left out {', '.join(parts)} of {len(views)} images")
    unknown = int((views == "").sum())
    if unknown and wanted != "all":
        say_once(f"note: the view of {unknown} of {len(views)} images is unknown: they are kept")
