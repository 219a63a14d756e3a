"""Labels from class folders, DIR/{train,val,test}/CLASS/ -> Index. No image is decoded."""

import contextlib
import itertools
import os
from pathlib import Path

import numpy as np

from common.console import InputError, advice, say_once
from common.task import CLASSES, HEALTHY, is_healthy
from images.find import EXTENSIONS, Search, is_passed_over, subfolders
from layouts.listing import PARTS, Index, patient_id, same_name

TRAIN_NAMES = ("train", "training", "train_data", "trainset")  # in any case; only the first is read
PART_NAMES = (*TRAIN_NAMES, *PARTS, "valid", "validation", "testing")


# ---------------------------------------------------------------- class folders


def find_root(data_dir, classes=CLASSES):
    """The folder that holds train/: `data_dir`, or the one folder in it (to depth 2) that does.

    InputError if there is none, or several."""
    level, seen = [Path(data_dir)], []
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
        seen += level
        level = [folder / name for folder in level for name in subfolders(folder)]
    near = next(filter(None, map(_almost, seen[:100])), "")
    if not Path(data_dir).is_dir():
        near = " There is no such folder."
    folders = "{train,test}/{" + ",".join(classes) + "}"
    ways = (
        advice("--data-dir", f"  --data-dir DIR   where DIR/{folders} hold the images"),
        # A run knows whether it was trained on a table; only training can begin with another one.
        advice("--demo", "  --labels FILE    a table of findings instead of class folders"),
        advice("--download", "  --download       fetch the Kaggle set (6 GB with its duplicate folder)"),
        advice("--demo", "  --demo           draw a small synthetic set for a first try"),
    )
    ways = "\n".join(filter(None, ways)) or f"  a folder that holds {folders}"
    raise InputError(f"no data: {data_dir} has no train/ folder.{near} What there is to give:\n{ways}")


def _almost(folder):
    """What a folder without train/ holds that is nearly a set, and what to do, as a sentence, else ""."""
    names = subfolders(folder)
    other = [name for name in names if name.lower() in TRAIN_NAMES]
    if other:
        return f" {folder} holds {other[0]}/: call it train (and the others test and val)."
    full = [name for name in names if _holds_images(folder / name)]
    if len(full) < 2:
        return ""
    some = ", ".join(full[:5])
    if folder.name.lower() in TRAIN_NAMES:
        return f" {folder} itself holds folders of images ({some}): give --data-dir {folder.parent}."
    return (
        f" {folder} holds folders of images ({some}): if these are the classes, move them into "
        f"{folder / 'train'}/. Without a test/ beside it, a test part is cut from train."
    )


def _holds_images(folder):
    """Whether a folder, or a folder in it, holds files with the names of images. The first thousand count."""
    for place in (folder, *(folder / name for name in subfolders(folder))):
        with contextlib.suppress(OSError), os.scandir(place) as entries:
            if any(entry.name.lower().endswith(EXTENSIONS) for entry in itertools.islice(entries, 1000)):
                return True
    return False


def find_classes(root, healthy=None):
    """Names of the class folders under root/train, the healthy one first, the others sorted.

    `healthy`: its name, if it is called neither normal nor healthy nor no finding. InputError for fewer than
    two classes, names that differ in case only, or no (or more than one) healthy class."""
    folder = Path(root, "train")
    names = subfolders(folder)
    if len(names) < 2:
        inner = [f"{name}/{inner}" for name in names for inner in subfolders(folder / name)]
        inside = f" (in it {', '.join(inner[:5])})" if inner else ""
        there = " and ".join(names) or "no class folder"
        raise InputError(
            f"{folder} holds {there}{inside}: a question needs two classes or more, each in its own folder"
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
    """The Index of the image files of root/part/<class>/ and of the folders below, sorted by name within each
    folder.

    A line says what was passed over (listing.Search). InputError if a class folder is missing or holds no
    image, or if there is a folder of a class that is not asked."""
    files, targets, place, search = [], [], Path(root, part), Search()
    others = [name for name in subfolders(place) if name not in classes]
    for target, name in enumerate(classes):
        folder, inside = place / name, Search()
        if not folder.is_dir():
            hint = f"; there is {', '.join(others)}" if others else ""
            raise InputError(f"{folder} does not exist: each class needs a folder of its own{hint}")
        found = [Path(path).relative_to(root).as_posix() for path in inside.walk(folder)]
        if not found:
            raise InputError(f"{folder} holds no image: {inside.nothing()}")
        files += found
        targets += [target] * len(found)
        search.add(inside)
    if others:
        raise InputError(
            f"{place} holds {', '.join(others)}, which is none of the classes {', '.join(classes)}"
        )
    search.pass_over(_loose(place), "files beside the class folders")
    search.tell(place)
    patients = [patient_id(f) for f in files]
    sides = np.full(len(files), part, dtype="U5")
    return Index(files, np.array(targets, dtype=np.int64), patients, same_name(files), sides)


def _loose(folder):
    """Number of files in a folder that has folders only, the hidden and the system's apart."""
    return sum(not p.is_dir() and not is_passed_over(p.name) for p in Path(folder).iterdir())


def read_folders(root, classes, parts):
    """The Index of all images of `parts`, those of PARTS that are read. A line names folders of other names
    that may be parts."""
    real = {os.path.realpath(Path(root, part)) for part in PARTS}  # where Train and train are one folder
    like = [n for n in subfolders(root) if n.lower() in PART_NAMES]
    ignored = [n for n in like if n not in PARTS and os.path.realpath(Path(root, n)) not in real]
    if ignored:
        say_once(f"note: {root}: passed over: {', '.join(ignored)}; parts are called {', '.join(PARTS)}")
    found = [list_images(root, part, classes) for part in parts]
    files, patients = ([v for index in found for v in getattr(index, k)] for k in ("files", "patients"))
    targets, known, part = (np.concatenate([index[i] for index in found]) for i in (1, 3, 4))
    return Index(files, targets, patients, known, part)
