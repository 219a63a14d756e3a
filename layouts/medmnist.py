"""MedMNIST's PneumoniaMNIST and ChestMNIST: images and labels in one .npz, in three published parts.

Source: Yang et al. 2023. PneumoniaMNIST is Kermany's set, ChestMNIST is NIH's; both are scaled down, and
nobody's patients are published.
"""

from pathlib import Path

import numpy as np

from common.console import InputError
from layouts import arrays
from layouts.listing import SIDES
from layouts.rows import Layout, Rows

SETS = {  # part of the file's name: (the set whose images these are, findings in the order of the columns)
    "pneumoniamnist": ("kermany", ("Pneumonia",)),
    "chestmnist": (
        "nih",
        tuple(
            "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax Consolidation "
            "Edema Emphysema Fibrosis Pleural_Thickening Hernia".split()
        ),
    ),
}
ARRAYS = tuple(f"{side}_{kind}" for side in SIDES for kind in ("images", "labels"))


def names_in(path):
    """The names of the arrays of an .npz. InputError if it is damaged or holds a pickle."""
    return list(arrays.shapes(path))


def which(path):
    """The part of SETS that a file's name has. InputError if it has none."""
    for name in SETS:
        if name in Path(path).name.lower():
            return name
    raise InputError(
        f"{path}: of MedMNIST, {' and '.join(SETS)} are read, which are told by the file's name; keep the "
        "name under which it was published"
    )


def findings(path):
    """The findings of the set."""
    return SETS[which(path)][1]


def rows(source):
    """The Rows of an .npz, its three parts in one."""
    known = findings(source.path)
    shapes = arrays.shapes(source.path)
    labels, names, sides = [], [], []
    with np.load(source.path, allow_pickle=False) as archive:
        for side in SIDES:
            images, (shape, dtype) = shapes[f"{side}_images"][0], shapes[f"{side}_labels"]
            if shape != (images[0], len(known)) or dtype.kind not in "ui":
                raise InputError(
                    f"{source.path}: {side}_labels is {dtype} {shape}, not whole numbers "
                    f"{(images[0], len(known))}"
                )
            labels.append(archive[f"{side}_labels"])
            names += _names(source, side, images[0])
            sides += [side] * images[0]
    labels = np.concatenate(labels)
    if not np.isin(labels, (0, 1)).all():
        raise InputError(f"{source.path}: labels other than 0 and 1")
    numbers = np.arange(len(names))
    return [
        Rows(
            source.path,
            names,
            numbers,
            known,
            labels.astype(np.int8),
            [""] * len(names),
            side=np.array(sides, dtype="U5"),
        )
    ]


def _names(source, side, count):
    """The names of the images of a side, relative to the data folder."""
    file = Path(source.path)
    if file.resolve().is_relative_to(source.root.resolve()):
        file = file.resolve().relative_to(source.root.resolve())
    else:
        file = file.resolve()  # an absolute path: the folder does not matter
    return [f"{file.as_posix()}#{side}/{number}" for number in range(count)]


def images(source):
    """{name: name} of all images: they need not be looked for."""
    shapes = arrays.shapes(source.path)
    counts = {side: shapes[f"{side}_images"][0][0] for side in SIDES}
    return {name: name for side, count in counts.items() for name in _names(source, side, count)}


LAYOUT = Layout(
    name="medmnist",
    title="MedMNIST (.npz)",
    needs=ARRAYS,
    findings=findings,
    rows=rows,
    images=images,
)
