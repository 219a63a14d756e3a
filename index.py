"""Which images there are, what is asked of them, and whose they are. Here from class folders; tables.py reads
tables. Only names are read, no image is opened.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import InputError, advice
from images import EXTENSIONS
from task import CLASSES, HEALTHY, is_healthy

PARTS = ("train", "val", "test")


class Index(NamedTuple):
    """files: [N] names relative to the data folder; targets: int64 [N] class numbers, or int8 [N, K] of
    findings (1 present, 0 absent, -1 unknown); patients: [N] names; known: bool [N], whether that name is a
    patient's or stands for one image; part: [N] the published side, "train", "val", "test", or "" if there is
    none; content: int64 [N], which files are copies of each other (twins.contents), or None if not asked."""

    files: list
    targets: np.ndarray
    patients: list
    known: np.ndarray
    part: np.ndarray
    content: np.ndarray = None

    def take(self, positions):
        """The Index of these positions."""
        files, patients = ([v[i] for i in positions] for v in (self.files, self.patients))
        content = None if self.content is None else self.content[positions]
        targets, known, part = (values[positions] for values in (self.targets, self.known, self.part))
        return Index(files, targets, patients, known, part, content)

    @property
    def unknown(self):
        """Number of images whose patient is not known."""
        return int((~self.known).sum())


def same_name(files):
    """`known` where only file names tell: whether `patient_id` finds a patient in them."""
    return np.array([patient_id(f) != f for f in files], dtype=bool)


def patient_id(name):
    """The patient in a file name of the Kermany set; any other name stands for a patient of its own.

    person1000_virus_1681.jpeg -> person1000; NORMAL2-IM-0587-0001-0002.jpeg -> NORMAL2-IM-0587.
    The numbers of the test set start again from 1, so ids compare within one split only.
    """
    match = re.match(r"(person\d+)_|((?:NORMAL\d+-)?IM-\d+)-", Path(name).stem)
    return match[1] or match[2] if match else name


# ---------------------------------------------------------------- class folders


def find_root(data_dir, classes=CLASSES):
    """The folder that holds train/: `data_dir`, or the one folder in it (to depth 2) that does.

    InputError if there is none, or several."""
    level = [Path(data_dir)]
    for _ in range(3):
        found = [folder for folder in level if (folder / "train").is_dir()]
        usual = [folder for folder in found if folder.name == "chest_xray"]
        if len(found) > 1 and len(usual) != 1:
            raise InputError(
                f"{data_dir} holds several sets ({', '.join(map(str, found))}): "
                + (advice("--data-dir", "name one with --data-dir") or "name one of them")
            )
        if found:
            return (usual or found)[0]
        level = [
            sub
            for folder in level
            if folder.is_dir()
            for sub in sorted(folder.iterdir())
            if sub.is_dir() and not sub.name.startswith((".", "__MACOSX"))
        ]
    folders = "{train,test}/{" + ",".join(classes) + "}"
    ways = (
        advice("--data-dir", f"  --data-dir DIR   where DIR/{folders} hold the images"),
        # A run knows whether it was trained on a table; only training can begin with another one.
        advice("--demo", "  --labels FILE    a table of findings instead of class folders"),
        advice("--download", "  --download       fetch the Kaggle set (6 GB with its duplicate folder)"),
        advice("--demo", "  --demo           draw a small synthetic set for a first try"),
    )
    ways = "\n".join(filter(None, ways)) or f"  a folder that holds {folders}"
    raise InputError(f"no data: {data_dir} has no train/ folder. What there is to give:\n{ways}")


def find_classes(root, healthy=None):
    """Names of the class folders under root/train, the healthy one first, the others sorted.

    `healthy`: its name, if it is called neither normal nor healthy nor no finding. InputError for fewer than
    two classes, names that differ in case only, or no (or more than one) healthy class."""
    folder = Path(root, "train")
    names = sorted(
        p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX"))
    )
    if len(names) < 2:
        raise InputError(
            f"{folder} holds {' and '.join(names) or 'no class folder'}: a question needs two classes or "
            "more, each in a folder of its own"
        )
    for name in names:
        twins = [other for other in names if other.lower() == name.lower()]
        if len(twins) > 1:
            raise InputError(f"{folder} holds {' and '.join(twins)}, which differ in case only: merge them")
    wanted = (
        [n for n in names if n.lower() == healthy.lower()] if healthy else list(filter(is_healthy, names))
    )
    if healthy and not wanted:
        raise InputError(f"--healthy {healthy}: {folder} holds {', '.join(names)}")
    if len(wanted) != 1:
        found = "more than one" if wanted else "none"
        raise InputError(
            f"{found} of the classes {', '.join(names)} is called {', '.join(HEALTHY[:3])}: "
            "say which is the healthy one with --healthy NAME"
        )
    return (*wanted, *(n for n in names if n not in wanted))


def list_images(root, part, classes=CLASSES):
    """The Index of the image files of root/part/<class>/, sorted by name within each class.

    Hidden files, `._*` and __MACOSX are passed over. Only names are read, no file is opened. InputError if a
    class folder is missing or holds no image, or if there is a folder of a class that is not asked.
    """
    files, targets = [], []
    others = sorted(
        p.name
        for p in (Path(root, part).iterdir() if Path(root, part).is_dir() else ())
        if p.is_dir() and not p.name.startswith((".", "__MACOSX")) and p.name not in classes
    )
    for target, name in enumerate(classes):
        folder = Path(root, part, name)
        if not folder.is_dir():
            hint = f"; there is {', '.join(others)}" if others else ""
            raise InputError(f"{folder} does not exist: each class needs a folder of its own{hint}")
        with os.scandir(folder) as entries:
            found = sorted(entry.name for entry in entries if _is_image(entry))
        if not found:
            raise InputError(f"{folder} holds no {'/'.join(EXTENSIONS)} images")
        files += [f"{part}/{name}/{f}" for f in found]
        targets += [target] * len(found)
    if others:
        raise InputError(
            f"{Path(root, part)} holds {', '.join(others)}, which is none of the classes {', '.join(classes)}"
        )
    patients = [patient_id(f) for f in files]
    sides = np.full(len(files), part, dtype="U5")
    return Index(files, np.array(targets, dtype=np.int64), patients, same_name(files), sides)


def _is_image(entry):
    """Whether a directory entry is an image to be read: no hidden file, named pipe or folder. A broken link
    is one: decoding it gives the reason."""
    name = entry.name
    if not name.lower().endswith(EXTENSIONS) or name.startswith((".", "__MACOSX")):
        return False
    return entry.is_file() or not os.path.exists(entry.path)


def read_folders(root, classes, parts):
    """The Index of all images of `parts`, those of PARTS that are read."""
    found = [list_images(root, part, classes) for part in parts]
    files, patients = ([v for index in found for v in getattr(index, k)] for k in ("files", "patients"))
    targets, known, part = (np.concatenate([index[i] for index in found]) for i in (1, 3, 4))
    return Index(files, targets, patients, known, part)
