"""Labels from class folders, DIR/{train,val,test}/CLASS/ -> Index. No image is opened."""

import contextlib
import itertools
import os
import re
from pathlib import Path

import numpy as np

from common.console import InputError, advice, say_once
from common.task import CLASSES, HEALTHY, is_healthy
from images.find import EXTENSIONS, MASKS, Search, is_passed_over, subfolders
from layouts.listing import SIDES, Index, Reading, joined, patient_id

TRAIN_NAMES = ("train", "training", "train_data", "trainset")  # in any case; only the first is read
SIDE_NAMES = (*TRAIN_NAMES, *SIDES, "valid", "validation", "testing")


# ---------------------------------------------------------------- a data set


def read_set(data_dir, classes, *, published=False, by_side=False):
    """(root, Reading) of a set of class folders: of train/, of test/ if there is one and, if the `published`
    split is asked for, of val/. `by_side`: patients of two sides must not bear one name, because the sides
    are put together, or compared. InputError if there is no such set, or no published validation."""
    root = find_root(data_dir, classes)
    if published and not (root / "val").is_dir():
        raise InputError(f"--split published: {root} has no val/ folder")
    sides = ["train"]
    if published:
        sides.append("val")
    if (root / "test").is_dir():
        sides.append("test")
    index = read_folders(root, classes, sides)
    if by_side:
        index = index._replace(patients=named_by_side(index))
    count = len(index.files)
    return root, Reading(index, [["listed", count], ["found", count]], True)


def say_unused(root, split, classes):
    """A note on the images of a val/ folder, which only the published `split` reads."""
    place = Path(root, "val")
    count = sum(1 for _ in Search().walk(place)) if place.is_dir() else 0
    if not count or split == "published":
        return
    way = ""
    if set(classes) <= set(subfolders(place)) and split in ("patient", "image"):
        way = advice("--split", "; --split published validates on it")
    say_once(f"note: {place} is not used by --split {split} ({count} images){way}")


def named_by_side(index):
    """The patients of an Index, each with its side: every side numbers its patients from 1. A name that
    stands for one image is left as it is."""
    names = []
    for side, patient, known in zip(index.side, index.patients, index.known):
        if known:
            patient = f"{side}/{patient}"
        names.append(patient)
    return names


def find_root(data_dir, classes=CLASSES):
    """The folder that holds train/: `data_dir`, or the one folder in it (to depth 2) that does.

    InputError if there is none, or several."""
    level, visited = [Path(data_dir)], []
    for _ in range(3):
        sets = [folder for folder in level if (folder / "train").is_dir()]
        # Among several sets, the one with the name of the Kaggle set is meant.
        usual = [folder for folder in sets if folder.name == "chest_xray"]
        if len(usual) == 1:
            return usual[0]
        if len(sets) == 1:
            return sets[0]
        if sets:
            way = advice("--data-dir", "name one with --data-dir") or "name one of them"
            raise InputError(f"{data_dir} holds several sets ({', '.join(map(str, sets))}): {way}")
        visited += level
        level = [path for folder in level for path in _inside(folder)]
    raise InputError(_no_data(data_dir, classes, visited))


def _inside(folder):
    """The folders in a folder."""
    return [folder / name for name in subfolders(folder)]


def _no_data(data_dir, classes, visited):
    """The message where there is no train/ in the folders `visited`: what is nearly a set, and what can be
    given."""
    near = next(filter(None, map(_almost, visited[:100])), "")
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
    return f"no data: {data_dir} has no train/ folder.{near} What there is to give:\n{ways}"


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
    for place in (folder, *_inside(folder)):
        with contextlib.suppress(OSError), os.scandir(place) as entries:
            if any(entry.name.lower().endswith(EXTENSIONS) for entry in itertools.islice(entries, 1000)):
                return True
    return False


def find_classes(root, healthy=None):
    """Names of the class folders under root/train, the healthy one first, the others sorted.

    `healthy`: its name, if it is called neither normal nor healthy nor no finding. InputError for fewer than
    two classes, names that differ in case only, or no (or more than one) healthy class."""
    folder = Path(root, "train")
    found = subfolders(folder)
    names = [name for name in found if not MASKS.fullmatch(name.lower())]
    if masks := [name for name in found if name not in names]:
        say_once(f"note: {folder}: folders of masks are no classes: {', '.join(masks)}")
    if len(names) < 2:
        inner = [path.relative_to(folder).as_posix() for name in names for path in _inside(folder / name)]
        inside = f" (in it {', '.join(inner[:5])})" if inner else ""
        there = " and ".join(names) or "no class folder"
        raise InputError(
            f"{folder} holds {there}{inside}: a question needs two classes or more, each in its own folder"
        )
    for name in names:
        twins = [other for other in names if other.lower() == name.lower()]
        if len(twins) > 1:
            raise InputError(f"{folder} holds {' and '.join(twins)}, which differ in case only: merge them")
    if healthy:
        wanted = [name for name in names if name.lower() == healthy.lower()]
        if not wanted:
            raise InputError(f"--healthy {healthy}: {folder} holds {', '.join(names)}")
    else:
        wanted = [name for name in names if is_healthy(name)]
    if len(wanted) != 1:
        count = "more than one" if wanted else "none"
        raise InputError(
            f"{count} of the classes {', '.join(names)} is called {', '.join(HEALTHY[:3])}: "
            "say which is the healthy one with --healthy NAME"
        )
    others = [name for name in names if name not in wanted]
    return (*wanted, *others)


# ---------------------------------------------------------------- images


def list_images(root, side, classes=CLASSES):
    """The Index of the image files of root/side/<class>/ and of the folders below, sorted by name within each
    folder.

    A line says what was passed over (listing.Search). InputError if a class folder is missing or holds no
    image, or if there is a folder of a class that is not asked."""
    files, targets, place, search = [], [], Path(root, side), Search()
    others = [n for n in subfolders(place) if n not in classes and not MASKS.fullmatch(n.lower())]
    for target, name in enumerate(classes):
        folder, inside = place / name, Search()
        if not folder.is_dir():
            hint = f"; there is {', '.join(others)}" if others else ""
            raise InputError(f"{folder} does not exist: each class needs a folder of its own{hint}")
        images = [Path(path).relative_to(root).as_posix() for path in inside.walk(folder)]
        if not images:
            raise InputError(f"{folder} holds no image: {inside.nothing()}")
        files += images
        targets += [target] * len(images)
        search.add(inside)
    if others:
        raise InputError(
            f"{place} holds {', '.join(others)}, which is none of the classes {', '.join(classes)}"
        )
    search.pass_over(_loose(place), "files beside the class folders")
    search.tell(place)
    patients = [_patient(file) for file in files]
    known = np.array([patient != file for patient, file in zip(patients, files)], dtype=bool)
    sides = np.full(len(files), side, dtype="U5")
    return Index(files, np.array(targets, dtype=np.int64), patients, known, sides)


def _patient(file):
    """patient_id of a file SIDE/CLASS/...; but an image in a folder of its case, as viewers export them
    (SIDE/CLASS/case7/IM-0001-0001.jpg), stands for itself: these numbers start again in every folder."""
    *folders, name = Path(file).parts
    if len(folders) > 2 and re.match(r"IM-\d+-", name):
        return file
    return patient_id(file)


def _loose(folder):
    """Number of files in a folder that has folders only, the hidden and the system's apart."""
    return sum(not p.is_dir() and not is_passed_over(p.name) for p in Path(folder).iterdir())


def read_folders(root, classes, sides):
    """The Index of all images of `sides`, those of SIDES that are read. A line names folders of other names
    that may be sides."""
    real = {os.path.realpath(Path(root, side)) for side in SIDES}  # where Train and train are one folder
    ignored = []
    for name in subfolders(root):
        like_a_side = name.lower() in SIDE_NAMES and name not in SIDES
        if like_a_side and os.path.realpath(Path(root, name)) not in real:
            ignored.append(name)
    if ignored:
        say_once(f"note: {root}: passed over: {', '.join(ignored)}; parts are called {', '.join(SIDES)}")
    return joined([list_images(root, side, classes) for side in sides])
