"""Public sets that hold each other's images: what one of them says of a model that learnt from the other.

RSNA's images and those of Google's four findings are NIH's, ChestMNIST is NIH's set and PneumoniaMNIST is
Kermany's, scaled down.
"""

import itertools
import re
from pathlib import Path

from common.console import InputError, say_once
from images.find import Search
from layouts import medmnist, tables
from layouts.choices import OLDER

KERMANY = re.compile(r"person\d+_(bacteria|virus)_\d+|(NORMAL\d+-)?IM-\d+-\d+(-\d+)?")
NIH = re.compile(r"\d{8}_\d{3}")
LOOKED_AT = 200  # files of a folder that are looked at
PARTS = {"rsna": "nih"}  # a set: the one that its images were taken from
TITLES = {
    "kermany": "Kermany's set",
    "nih": "NIH ChestX-ray14",
    "rsna": "the RSNA pneumonia challenge",
    "chexpert": "CheXpert",
    "mimic": "MIMIC-CXR",
    "vindr": "VinDr-CXR",
    "padchest": "PadChest",
}


def set_of(folder, table, layout=""):
    """(the public set whose images these are, a key of TITLES, or "" if it is none that is known; whether
    they are that set as a whole, scaled down)."""
    if not table:
        return _by_names(folder, KERMANY, "kermany"), False
    path = Path(table)
    if layout == OLDER or not layout:
        if not path.exists():
            return "", False
        found = tables.find_layout(path, layout)
    else:
        found = tables.LAYOUTS[layout]
    if found.name == "medmnist":
        return medmnist.SETS[medmnist.which(path)][0], True
    if found.name == "nih":  # a hospital may have written a table like NIH's
        return _by_names(folder, NIH, "nih"), False
    if found.name == "plain":
        return _by_names(folder, KERMANY, "kermany") or _by_names(folder, NIH, "nih"), False
    return found.public, False


def _by_names(folder, pattern, name):
    """`name` where most of the first image files under a folder are called so, else ""."""
    if not Path(folder).is_dir():
        return ""
    files = list(itertools.islice(Search().walk(folder), LOOKED_AT))
    like = sum(bool(pattern.fullmatch(Path(file).stem)) for file in files)
    return name if 2 * like > len(files) else ""


def refuse_same_set(config, folder, table, flag):
    """InputError where the images that `flag` names, a folder and perhaps a table of findings, are the very
    set that a model with this DataConfig learns from, scaled down (or the other way round); a note where some
    of them may be."""
    learnt, learnt_small = set_of(config.data_dir, config.labels, config.layout)
    other, other_small = set_of(folder, table)
    if not learnt or not other:
        return
    where = f"{flag} {table or folder}"
    if learnt == other and (learnt_small or other_small):
        raise InputError(
            f"{where}: its images are {TITLES[other]}, and so are those in {config.data_dir} that the model "
            "learns from: figures on them would mean nothing"
        )
    if learnt == other:
        say_once(
            f"note: {where}: a leak is possible: by its table or its names it is {TITLES[other]}, as the "
            "images that the model learns from; if so, patients of training may be among these"
        )
    elif other in (PARTS.get(learnt), learnt) or PARTS.get(other) == learnt:
        say_once(
            f"note: {where}: a leak: the images of {TITLES[other]} and of {TITLES[learnt]} are the same "
            "people's, many of them the same pictures, and the model learns from the latter"
        )
